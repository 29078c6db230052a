"""The bench does the work it names: a step trains, and every contender is in the table."""

import json

import pytest
import torch

from support import bench

CPU = torch.device("cpu")


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
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
