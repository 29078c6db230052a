"""The bench times every contender at all the work it names."""

import json

import torch

from support import bench


def test_the_table_has_every_contender(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "choose_device", lambda *_: (torch.device("cpu"), torch.float32, "fp32"))
    small = {"hidden_channels": (8,), "head_channels": (8,), "kernel_size": 3}
    for name, knobs in bench.CONTENDERS.items():
        monkeypatch.setitem(bench.CONTENDERS, name, knobs | small)
    bench.bench(rounds=1, batch=1, forecasts=(1, 2))
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    for work, batch in (("training step", 1), ("forecast", 1), ("forecast", 2)):
        names = {row["name"] for row in rows if (row["work"], row["batch"]) == (work, batch)}
        assert names >= {f"{name}, fp32" for name in bench.CONTENDERS}
    default = {row["name"] for row in rows if row["work"] == "default, horizon 10"}
    assert default >= {"step, fp32", "step without symmetry, fp32", "bare convolutions, fp32"}
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)
