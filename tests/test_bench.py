"""The bench does the work it names: the same convolutions in each contender, every contender in every row."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from my_model import ConvLSTMCell, EncoderForecaster

SMALL = {"hidden": (8, 4), "kernel_size": 3, "patch": 2}


def operations(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_bare_convolutions_are_those_of_a_training_step(monkeypatch):
    model, past = EncoderForecaster(1, **SMALL, fast=False), torch.rand(2, 3, 1, 16, 16)
    of_the_model = operations(lambda: model(past, 3).sum().backward())
    head = 3 * 2 * 3 * (2 * 8 * 8 * 12 * 4)  # forward and two gradients, frames, batch, one 1×1 convolution
    step = bench.bare_convolutions(2, 3, 8, (8, 4), 4, 3, torch.float32)
    blank = 2 * (2 * 8 * 8 * 9 * 2 * (8 * 32 + 4 * 16))  # forward and weight gradient of the encoder's zeros, likewise
    assert operations(step) == of_the_model - head - blank
    backward, wanted = torch.ops.aten.convolution_backward, []
    spy = lambda *args: wanted.append(args[-1][1]) or backward(*args)
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", spy)
    step()
    assert sum(wanted) == 4 + 3  # weight gradients: one a kernel, as our step has them


def test_an_edited_cell_is_timed_as_it_stands(monkeypatch):
    build, _ = bench.CONTENDERS["my_model, fp32"]
    assert all(layer.fast for layer in build(1, **SMALL).encoder)
    monkeypatch.setattr(ConvLSTMCell, "forward", lambda self, x, state: state)
    assert not any(layer.fast for layer in build(1, **SMALL).encoder)


@pytest.mark.parametrize("name", bench.CONTENDERS)
def test_a_step_trains(name):
    """Which can be seen from the memory that gradients leave, and from a loss that falls."""
    losses = []
    original = bench.F.binary_cross_entropy_with_logits

    def watched(logits, truth):
        losses.append(original(logits, truth))
        return losses[-1]

    bench.F.binary_cross_entropy_with_logits = watched
    try:
        step = bench.step_of(name, 2, frames=3, size=16, **SMALL)
        for _ in range(30):
            step()
    finally:
        bench.F.binary_cross_entropy_with_logits = original
    assert losses[-1] < losses[0]


def test_contenders_take_turns():
    calls = []
    bench.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3  # one round warms up


def test_the_table_has_every_contender(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "PAPER", SMALL)
    monkeypatch.setattr(bench, "peak_memory", lambda name, batch, **work: 2**20)
    monkeypatch.setattr(bench, "step_of", lambda *args, **work: lambda: None)
    monkeypatch.setattr(bench, "bare_convolutions", lambda *args, **work: lambda: None)
    monkeypatch.setattr(bench, "choose_device", lambda *args: (None, bench.torch.bfloat16, "bf16 (AMX-BF16)"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "1"])
    monkeypatch.chdir(tmp_path)
    bench.main()
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    for work, batch in (("training step", 16), ("forecast", 1), ("forecast", 64)):
        names = {row["name"] for row in rows if (row["work"], row["batch"]) == (work, batch)}
        assert set(bench.CONTENDERS) <= names
    assert "reference, fp32" in capsys.readouterr().out


def test_bf16_is_left_out_where_it_would_be_emulated(monkeypatch):
    monkeypatch.setattr(bench.torch.cpu, "get_capabilities", dict, raising=False)
    assert bench.here() == ["reference, fp32", "my_model, fp32"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_memory_is_measured_in_a_process_of_its_own():
    little, much = (bench.peak_memory("my_model, fp32", batch, frames=4, size=64, **SMALL) for batch in (1, 64))
    assert little < 2**26 < much < 2**30


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_memory_counts_weights_gradients_and_moments():
    network = {"hidden": (256,), "kernel_size": 5, "patch": 4}
    weights = sum(p.numel() for p in EncoderForecaster(1, **network).parameters())
    peak = bench.peak_memory("my_model, fp32", 1, frames=1, size=16, **network)
    assert peak > 4 * 4 * weights > 2**27  # float32
