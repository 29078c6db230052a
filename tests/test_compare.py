"""Runs side by side and beyond their training: what is compared with what."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import finish, flags, here, results, start, wait_until
from PIL import Image

from support import checkpoint, compare


def rows(path):
    lines = [line for line in path.read_text("utf-8").splitlines() if line[:2] == "| "]
    cells = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:])
    return {name: values for name, *values in cells}


BASELINES = {"black frame", "last frame copied", "optical flow"}


@pytest.mark.skipif(sys.platform == "win32", reason="locks a folder that others read")
def test_two_runs_that_start_and_end_at_once_are_both_compared(array, tmp_path, capsys):
    """Held up until both want to write compare.md."""
    models = "my_model", "convlstm"
    few = {"epochs": 1, "train_sequences": 10, "fast": False}
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
    here(array, tmp_path, pictures=True, model=models[0], **few)
    assert "run has ended" in capsys.readouterr().out
    found = rows(tmp_path / "compare.md")
    assert set(found) == {*models, *BASELINES}
    for name in models:
        scored, (parameters, seen, _, validated, error, *_) = results(tmp_path / name), found[name]
        assert (parameters, seen) == (f"{scored['parameters']:,}", "10")
        assert validated == f"{scored['validation_mse']:#.4g}"
        assert error == f"{scored['scores'][name]['mse_per_frame']['mean']:#.4g}"
    for picture in ("compare.png", "compare_strip.png"):
        with Image.open(tmp_path / picture) as image:
            image.load()


def edited(change, name="metrics.json"):
    """The file after change(its dict)."""

    def damage(folder):
        change(found := json.loads((folder / name).read_text("utf-8")))
        (folder / name).write_text(json.dumps(found))

    return damage


DAMAGE = {
    "half": lambda folder: (folder / "metrics.json").write_text("{"),
    "other data": edited(lambda found: found.update(first_sequence="0")),
    "other forecast": lambda folder: np.save(folder / "forecast.npy", np.zeros((4, 1, 8, 8), np.uint8)),
    "other version": edited(lambda found: found.pop("asked"), "config.json"),
    "no config": lambda folder: (folder / "config.json").unlink(),
}


def test_damaged_neighbors_are_left_out(short_run, tmp_path):
    for name in ("one", "scored", "again", "a|b", *DAMAGE):
        shutil.copytree(short_run, tmp_path / name)
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
    compare.compare_runs(tmp_path, results(short_run), np.zeros((20, 1, 16, 16), np.uint8))
    found = rows(tmp_path / "compare.md")
    one = "one: main.py: \ufffd, model my_model"
    assert set(found) == {one, "scored", "a\\|b: model my_model", *BASELINES}
    assert found[one][8] == "–" != found["scored"][8]
    assert not list(tmp_path.glob("*.half")) and (tmp_path / "mine.2026-draft.tmp").exists()
    assert f": {', '.join(sorted(DAMAGE))}.\n" in (tmp_path / "compare.md").read_text("utf-8")
