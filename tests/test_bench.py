"""The bench does the work it names: the convolutions of a training step, and every contender in every row."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from my_model import EncoderForecaster
from support import bench

CPU = torch.device("cpu")


def operations(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("hidden_channels", [(8, 4), bench.PAPER["hidden_channels"]], ids=["small", "paper"])
def test_bare_convolutions_are_those_of_a_training_step(hidden_channels):
    """Of the paper's network on 2 sequences of 3 + 3 frames of 16×16, without its head and its zeros."""
    model, past = EncoderForecaster(1, hidden_channels), torch.rand(2, 3, 1, 16, 16)
    of_the_model = operations(lambda: model(past, 3).sum().backward())
    positions = 2 * 4 * 4  # of the states, in a frame of each sequence
    head = 3 * 3 * (2 * positions * sum(hidden_channels) * 16)  # forward and two gradients, of 3 frames
    zeros = 2 * sum(2 * positions * 25 * n * 4 * n for n in hidden_channels)  # forward and weight gradient
    convolutions = bench.paper_convolutions(2, 3, hidden_channels)
    step = bench.bare_convolutions(convolutions, torch.float32, CPU, size=4)
    assert operations(step) == of_the_model - head - zeros


@pytest.fixture
def small(monkeypatch):
    """Contenders of few channels."""
    for name, knobs in bench.CONTENDERS.items():
        monkeypatch.setitem(bench.CONTENDERS, name, {**knobs, "hidden_channels": (8,), "kernel_size": 3})


def test_steps_train(small):
    for name in bench.CONTENDERS:
        step = bench.make_step(name, torch.float32, CPU, 1, frames=2)
        losses = [step() for _ in range(5)]
        assert losses[-1] < losses[0]


def test_the_table_has_every_contender(small, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    bench.bench(rounds=1, batch=1, forecasts=(1, 2))
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    for work, batch in (("training step", 1), ("forecast", 1), ("forecast", 2)):
        names = {row["name"] for row in rows if (row["work"], row["batch"]) == (work, batch)}
        assert names >= {f"{name}, fp32" for name in bench.CONTENDERS}
        assert ("bare convolutions, fp32" in names) == (work == "training step")
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
