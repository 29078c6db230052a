"""Models side by side and beyond their training: what is compared with what, and that the cases are what they say."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import here
from PIL import Image

import beyond
import compare
import download
import metrics
from moving_mnist import generate


def rows(path):
    lines = [
        line.strip("| ").split(" | ")
        for line in path.read_text().splitlines()
        if line.startswith("| ") and "---" not in line
    ][1:]
    return {cells[0].strip("| "): cells[1:] for cells in lines}


def test_every_model_that_has_results_is_compared(array, tmp_path):
    few = {"epochs": 1, "train_sequences": 10}
    folders = [here(array, tmp_path, pictures=True, model=model, **few) for model in ("my_model", "convlstm")]
    found = rows(tmp_path / "compare.md")
    assert set(found) == {"my_model", "convlstm", "black frame", "last frame copied", "optical flow"}
    for folder in folders:
        results = json.loads((folder / "metrics.json").read_text())
        parameters, seen, _, _, mse, *_ = found[folder.name]
        assert (parameters, seen) == (f"{results['parameters']:,}", "10")
        assert mse == f"{results['scores'][folder.name]['mse_per_frame']['mean']:.4g}"
    for picture in ("compare.png", "compare_strip.png"):
        with Image.open(tmp_path / picture) as image:
            image.load()


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def edited(change):
    """metrics.json after change(its dict)."""

    def damage(folder):
        results = json.loads((folder / "metrics.json").read_text())
        change(results)
        (folder / "metrics.json").write_text(json.dumps(results))

    return damage


DAMAGE = {
    "half": text("metrics.json", "{"),
    "list": text("metrics.json", "[]"),
    "null": text("metrics.json", "null"),
    "nested": text("metrics.json", "[" * 100_000),
    "no scores": edited(lambda results: results.pop("scores")),
    "other data": edited(lambda results: results.update(first_sequence="0")),
    "scores of another": edited(lambda results: results["scores"].pop("my_model")),
    "score of text": edited(lambda results: results["scores"]["my_model"]["mse_per_frame"].update(mean="low")),
    "shorter curve": edited(lambda results: results["scores"]["my_model"]["mse_per_frame"]["per_frame"].pop()),
    "parameters of text": edited(lambda results: results.update(parameters="many")),
    "empty forecast": text("forecast.npy", ""),
    "other forecast": lambda folder: np.save(folder / "forecast.npy", np.zeros((4, 1, 8, 8), np.uint8)),
    "forecast of text": lambda folder: np.save(folder / "forecast.npy", np.full((4, 1, 16, 16), "x")),
    "empty log": text("log.csv", "step\n1\n"),
}


def test_damaged_neighbours_are_left_out(reference, tmp_path):
    folder, _ = reference
    unprintable = "~caf\udce9"  # no UTF-8
    for name in ("one", "two", unprintable, *DAMAGE):
        shutil.copytree(folder, tmp_path / name)
    for name, damage in DAMAGE.items():
        damage(tmp_path / name)
    stray, young = (tmp_path / f"compare.md.{number}.tmp" for number in (1, 2))
    for half in stray, young:
        half.write_bytes(b"half")
    os.utime(stray, (0, 0))
    latest = json.loads((folder / "metrics.json").read_text())
    compare.compare(tmp_path, latest, np.zeros((20, 1, 16, 16), np.uint8))
    assert young.exists() and not stray.exists()  # of a run that was killed long ago
    assert set(rows(tmp_path / "compare.md")) == {"one", "two", "black frame", "last frame copied", "optical flow"}
    left_out = ", ".join([*sorted(DAMAGE), ascii(unprintable)])
    words = f"Left out, as they do not fit together with these: {left_out}.\n"
    assert (tmp_path / "compare.md").read_text().endswith(words)


def test_cases_beyond_training_are_what_they_say(tmp_path, capsys, monkeypatch):
    """The forecast that is tested notes what it is shown."""
    seen = []

    def forecast(past, n):
        seen.append((past, n))
        return metrics.copy_last(past, n), None

    results = beyond.beyond(tmp_path, "my_model", forecast, 10, 10, torch.device("cpu"), n_sequences=8)
    assert list(results) == ["as in training", "20 frames", "30 frames", "three digits", "96×96 pixels"]
    assert [len(curves["my_model"]) for curves in results.values()] == [10, 20, 30, 10, 10]
    for curves in results.values():
        assert set(curves) == {"my_model", "black", "copy_last", "optical_flow"}
        assert curves["my_model"] == curves["copy_last"]  # the same frames for everyone
    usual, three, large = [past for past, n in seen if len(past) == 8]
    assert [(p.shape, n) for p, n in seen if len(p) == 8] == [
        ((8, 10, 1, 64, 64), 30),
        ((8, 10, 1, 64, 64), 10),
        ((8, 10, 1, 96, 96), 10),
    ]
    digits = download.digit_sheet(download.RAW / "digits_test.png")
    ink_squared = np.square(generate(digits, 8, 0, n_frames=40)[:, 10:] / 255).sum((2, 3, 4)).mean(0)
    for part, n in ("as in training", 10), ("20 frames", 20), ("30 frames", 30):
        np.testing.assert_allclose(results[part]["black"], ink_squared[:n])
    ink = lambda past: past.sum((2, 3, 4)).mean().item()
    assert 1.3 < ink(three) / ink(usual) < 1.5  # as digits overlap
    assert 0.9 < ink(large) / ink(usual) < 1.15
    motion = lambda past: np.abs(np.diff(past.numpy(), axis=1)).sum((2, 3, 4)).mean()
    assert 0.85 < motion(large) / motion(usual) < 1.2  # as many pixels a frame
    pictures = {path.name for path in tmp_path.iterdir()}
    cases = ("three_digits", "20_frames", "30_frames", "96x96_pixels")
    assert pictures == {"beyond.png", *(f"beyond_{case}.png" for case in cases)}
    of_one_size = lambda past, n: forecast(past, n) if past.shape[-1] == 64 else past[:, :, :, :65].view(1)
    fewer = beyond.beyond(tmp_path, "my_model", of_one_size, 10, 10, torch.device("cpu"), n_sequences=8)
    assert list(fewer) == list(results)[:-1] and "beyond    96×96 pixels: not possible (" in capsys.readouterr().out
    none = beyond.beyond(tmp_path, "my_model", lambda past, n: past.view(1), 10, 10, torch.device("cpu"), n_sequences=8)
    assert none == {} and beyond.table(none)
    with monkeypatch.context() as without_digits:
        without_digits.setattr(download, "RAW", tmp_path)
        assert beyond.beyond(tmp_path, "my_model", forecast, 10, 10, torch.device("cpu")) == {}
        assert "digits_test.png is missing or damaged" in capsys.readouterr().out
    monkeypatch.setattr(beyond, "WORLD", 2)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        beyond.beyond(tmp_path, "my_model", of_one_size, 10, 10, torch.device("cpu"), n_sequences=8)
    lines = beyond.table(results).splitlines()
    assert f"{np.mean(results['three digits']['black']):.1f}" in lines[5] and lines[5].startswith("three digits")
