"""Runs side by side and beyond their training: what is compared with what."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import finish, flags, results, start, wait_until
from PIL import Image
from test_runs import of_model

import metrics
import moving_mnist
from moving_mnist import generate
from support import checkpoint, compare, report


def rows(path):
    lines = [line for line in path.read_text("utf-8").splitlines() if line[:2] == "| "]
    cells = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:])
    return {name: values for name, *values in cells}


BASELINES = {"black frame", "last frame copied", "optical flow"}


@pytest.mark.skipif(sys.platform == "win32", reason="locks a folder that others read")
def test_two_runs_that_start_and_end_at_once_are_both_compared(array, tmp_path):
    """Held up until both want to write compare.md."""
    models = "my_model", "convlstm"
    few = {"epochs": 1, "train_sequences": 10}
    processes = [start(*flags(array, tmp_path, model=model, **few)) for model in models]
    for model, process in zip(models, processes, strict=True):
        wait_until((tmp_path / model / "best.pt").exists, process)
    with checkpoint.lock_folder(tmp_path):
        for model, process in zip(models, processes, strict=True):
            wait_until((tmp_path / model / "metrics.json").exists, process)
        assert not (tmp_path / "compare.md").exists()
    printed = [finish(process)[0] for process in processes]
    assert sorted("new run   differs from" in text for text in printed) == [False, True]
    (tmp_path / "compare.md").unlink()
    assert "run has ended" in finish(start(*flags(array, tmp_path, model=models[0], **few)))[0]
    found = rows(tmp_path / "compare.md")
    assert set(found) == {*models, *BASELINES}
    for name in models:
        scored, (parameters, seen, _, validated, error, *_) = results(tmp_path / name), found[name]
        assert (parameters, seen) == (f"{scored['parameters']:,}", "10")
        assert validated == f"{scored['validation_mse']:.2f}"
        assert error == f"{scored['scores'][name]['mse_per_frame']['mean']:#.4g}"
    for picture in ("compare.png", "compare_strip.png"):
        with Image.open(tmp_path / picture) as image:
            image.load()


def test_labels_name_what_differs_from_the_first_run_of_the_model(tmp_path):
    cases = [
        ("my_model", {"epochs": 3}, "my_model"),
        ("my_model-2", {}, "my_model-2: epochs 2 (was 3)"),
        ("mine", {"model": "paper", "seed": 1}, "mine: model paper"),
        ("my_model-3", {"epochs": 3, "seed": 7}, "my_model-3: seed 7 (was 0)"),
    ]
    runs = []
    for name, changes, _ in cases:
        knobs = {"model": "my_model", "epochs": 2, "seed": 0, "train_sequences": 40, **changes}
        asked = {"knobs": knobs, "data": "array", "sources": {}}
        run = {"label": name, "folder": tmp_path, "model": knobs["model"], "is_trained": True}
        runs.append({**run, "asked": asked})
    compare.label_runs(runs)
    assert [run["label"] for run in runs] == [label for *_, label in cases]


def edited(change, name="metrics.json"):
    """The file after change(its dict)."""

    def damage(folder):
        change(found := json.loads((folder / name).read_text("utf-8")))
        (folder / name).write_text(json.dumps(found))

    return damage


DAMAGE = {
    "half": lambda folder: (folder / "metrics.json").write_text("{"),
    "other data": edited(lambda found: found.update(first_sequence="0")),
    "scores of another": edited(lambda found: found["scores"].pop("my_model")),
    "parameters of text": edited(lambda found: found.update(parameters="many")),
    "shorter curve": edited(lambda found: found["scores"]["my_model"]["mse_per_frame"]["per_frame"].pop()),
    "other forecast": lambda folder: np.save(folder / "forecast.npy", np.zeros((4, 1, 8, 8), np.uint8)),
    "other version": edited(lambda found: found.pop("asked"), "config.json"),
    "no config": lambda folder: (folder / "config.json").unlink(),
}


def test_damaged_neighbors_are_left_out(reference, tmp_path):
    folder, _ = reference
    for name in ("one", "scored", "again", "a|b", *DAMAGE):
        shutil.copytree(folder, tmp_path / name)
    for name in ("scored", "again"):
        edited(lambda found: found["asked"]["knobs"].update(eval_only=True), "config.json")(tmp_path / name)
    for name in ("one", "a|b", "again"):  # of before this metric
        edited(lambda found: found["scores"]["my_model"].pop("psnr"))(tmp_path / name)
    edited(lambda found: found["asked"]["sources"].update({"main.py": "0"}), "config.json")(tmp_path / "one")
    (tmp_path / "one" / "source" / "main.py").write_bytes(b"\xff")  # no text
    for name, damage in DAMAGE.items():
        damage(tmp_path / name)
    for name in ("compare.md.123.half", "mine.2026-draft.tmp"):  # of a run that was killed, and another's
        (tmp_path / name).write_bytes(b"half")
    compare.compare_runs(tmp_path, results(folder), np.zeros((20, 1, 16, 16), np.uint8))
    found = rows(tmp_path / "compare.md")
    one = "one: main.py: \ufffd, model my_model"
    assert set(found) == {one, "scored", "a\\|b: model my_model", *BASELINES}
    assert found[one][8] == "–" != found["scored"][8]
    assert not list(tmp_path.glob("*.half")) and (tmp_path / "mine.2026-draft.tmp").exists()
    assert f": {', '.join(sorted(DAMAGE))}.\n" in (tmp_path / "compare.md").read_text("utf-8")


def test_cases_beyond_training_are_what_they_say(tmp_path, capsys, monkeypatch):
    """The forecast that is tested notes what it is shown."""
    monkeypatch.setattr(report, "N_BEYOND", 8)
    seen, folder = [], tmp_path / "run"
    folder.mkdir()

    def noting(past, n):
        seen.extend([(past, n)] if len(past) > 1 else [])
        return torch.logit(metrics.copy_last(past, n))

    found = report.score_beyond_training(of_model(noting, 10, 10), folder)
    assert list(found) == ["as in training", "20 frames", "30 frames", "three digits", "96×96 pixels"]
    assert [len(curves["my_model"]) for curves in found.values()] == [10, 20, 30, 10, 10]
    for curves in found.values():
        assert curves["my_model"] == pytest.approx(curves["copy_last"])  # the same frames
    assert [(past.shape[-1], n) for past, n in seen] == [(64, 30), (64, 10), (96, 10)]
    usual, three, large = (past for past, _ in seen)
    digits = moving_mnist.read_digits(moving_mnist.RAW / "digits_test.png")
    squares = np.square(generate(digits, 8, 0, n_frames=40)[:, 10:] / 255).sum((2, 3, 4)).mean(0)
    for part, n in ("as in training", 10), ("20 frames", 20), ("30 frames", 30):
        np.testing.assert_allclose(found[part]["black"], squares[:n])
    ink = lambda past: past.sum((2, 3, 4)).mean().item()
    assert 1.3 < ink(three) / ink(usual) < 1.5  # as digits overlap
    assert 0.9 < ink(large) / ink(usual) < 1.15
    motion = lambda past: np.abs(np.diff(past.numpy(), axis=1)).sum((2, 3, 4)).mean()
    assert 0.85 < motion(large) / motion(usual) < 1.2  # as many pixels a frame
    pictures = {f"beyond{case}.png" for case in ("", "_three_digits", "_30_frames", "_96x96_pixels")}
    assert {path.name for path in folder.iterdir()} == pictures
    monkeypatch.setattr(moving_mnist, "RAW", tmp_path)
    assert report.score_beyond_training(of_model(noting, 10, 10), folder) == {}
    assert "digits_test.png is missing or damaged" in capsys.readouterr().out
