"""Whole runs: what they leave and print; that kills and given weights change nothing."""

import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import (
    FRAMES_IN,
    FRAMES_OUT,
    ROOT,
    STEPS,
    content,
    finish,
    flags,
    here,
    moving_squares,
    results,
    start,
    state,
    stopped_after_a_checkpoint,
    without_pictures,
)
from PIL import Image

import figures
import main
import metrics
from support import UserError, checkpoint, report

PREDICTIONS = [f"predict_{k}.png" for k in (1, 2, 3, 4, "best", "median", "worst", "last_frame")]
PICTURES = ["loss.png", "per_frame.png", *PREDICTIONS, "predict.gif"]
RESULTS = [*PICTURES, "log.csv", "metrics.json", "forecast.npy"]
FILES = [*RESULTS, "config.json", "last.pt", "best.pt"]
VALIDATION, TEST = slice(46, 51), slice(51, 57)  # 9 and 10 percent of the 57 sequences
SOURCES = ["main.py", "my_model.py", "motion.py", "equivariant.py", "convlstm.py"]
SOURCES += ["moving_mnist.py", "metrics.py"]
FEW = {"epochs": 1, "train_sequences": 10}
WIDE = {"hidden_channels": [32, 32], "patch_size": 2, **FEW}  # dilation, Winograd and the threads take part
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at other processes as Linux has them")


def mean(folder, metric="mse_per_frame", who="my_model"):
    return results(folder)["scores"][who][metric]["mean"]


def evaluations(folder):
    """The rows of log.csv that have them."""
    with open(folder / "log.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["val_loss"]]
    return [{name: float(value) for name, value in row.items() if name != "minutes"} for row in rows]


def split(array, sequences):
    """(past, truth) as float64 (B, T, H, W) in [0, 1], straight from the file."""
    frames = np.load(array)[sequences] / 255
    return frames[:, :FRAMES_IN], frames[:, FRAMES_IN : FRAMES_IN + FRAMES_OUT]


@torch.no_grad()
def logits_of(folder, array, sequences):
    """(logits (B, T, H, W) of best.pt, by nothing fast; past; truth)."""
    past, truth = split(array, sequences)
    model = main.build(main.parse(flags(array, folder)), 1)
    model.load_state_dict(torch.load(folder / "best.pt")["model"])
    logits = model(torch.from_numpy(past[:, :, None]).float(), FRAMES_OUT)
    return logits[:, :, 0].double().numpy(), past, truth


def mse(prediction, truth):
    return np.square(prediction - truth).sum((2, 3)).mean()


def same(folder, reference, files=("log.csv", "metrics.json", "forecast.npy")):
    """The end of the uninterrupted run, bit for bit."""
    for name in ("last.pt", "best.pt"):
        ours, theirs = (checkpoint.load(f / name) for f in (folder, reference))
        assert ours["step"] == theirs["step"]
        counted = [state.get("progress", {"history": []}) for state in (ours, theirs)]
        for part in ("best_mse", "best_step", "baselines"):
            assert counted[0].get(part) == counted[1].get(part), part
        logs = [[row | {"minutes": 0} for row in state["history"]] for state in counted]
        assert logs[0] == logs[1]
        for part in ("model", "optimizers"):
            torch.testing.assert_close(ours.get(part), theirs.get(part), rtol=0, atol=0)
    for name in files:
        assert content(folder / name) == content(reference / name), name


def test_a_run_leaves_every_file(reference, array):
    folder, printed = reference
    assert printed.count(" of 5 sequences, ") == 2 * STEPS and "scoring   6 test sequences" in printed
    assert {path.name for path in folder.iterdir()} == {*FILES, ".lock", "source"}
    assert all((folder / name).stat().st_size for name in FILES)
    for name in SOURCES:
        assert (folder / "source" / name).read_bytes() == (ROOT / name).read_bytes()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["asked"]["knobs"]["hidden_channels"] == [8]
    assert (config["torch"], config["device"], config["threads"]) == (torch.__version__, "cpu", 1)
    rows = evaluations(folder)
    assert len(rows) == 2 * STEPS and (rows[-1]["epoch"], rows[-1]["step"]) == (2, 2 * STEPS)
    knobs, parts = main.parse(flags(array, folder)), [(row["step"] - 0.5) / (2 * STEPS) for row in rows]
    assert [row["forecast_frames"] for row in rows] == [main.horizon_at(knobs, part)[1] for part in parts]
    assert [row["SSIM_in_loss"] for row in rows] == [part >= knobs.ssim_from for part in parts]
    for name in PICTURES:
        with Image.open(folder / name) as image:
            image.load()
    with Image.open(folder / "predict.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (FRAMES_IN + FRAMES_OUT, 0)  # for ever


def test_scores_are_those_of_the_best_weights_on_the_test_split(reference, array):
    folder, printed = reference
    found = results(folder)
    assert (found["split"], found["sequences"], found["data"]) == ("test", 6, "squares.npy")
    assert set(found["scores"]) == {"my_model", "black", "copy_last", "optical_flow"}
    for scores in found["scores"].values():
        skill, rmse = scores.pop("skill"), scores.pop("rmse")  # in grey levels
        assert skill == 1 - scores["mse_per_frame"]["mean"] / mean(folder, who="copy_last")
        assert rmse == pytest.approx([255 * (scores["mse_per_frame"]["mean"] / 256) ** 0.5])
        for name, found_score in scores.items():
            assert found_score["unit"] == metrics.METRICS[name][1]
            assert found_score["mean"] == pytest.approx(np.mean(found_score["per_frame"]))
    logits, past, truth = logits_of(folder, array, TEST)
    assert mean(folder) == pytest.approx(mse(1 / (1 + np.exp(-logits)), truth), rel=1e-4)
    nats = (np.logaddexp(0, logits) - truth * logits).sum((1, 2, 3)).mean()
    assert mean(folder, "cross_entropy_per_sequence") == pytest.approx(nats, rel=1e-4)
    assert mean(folder, who="black") == pytest.approx(mse(0, truth))
    assert mean(folder, who="copy_last") == pytest.approx(mse(past[:, -1:], truth))
    drawn = 255 / (1 + np.exp(-logits[0]))  # forecast.npy: of the first sequence, to a grey level
    np.testing.assert_allclose(np.load(folder / "forecast.npy")[:, 0], drawn, atol=0.51)
    weights = checkpoint.weights_hash(main.load(folder / "best.pt"))
    assert found["weights"] == weights and f"hash {weights}, validation MSE" in printed
    assert checkpoint.weights_hash(torch.nn.Linear(1, 1, dtype=torch.bfloat16))  # as an edit may have it


def test_the_best_weights_are_scored_and_not_the_last(array, tmp_path, monkeypatch):
    """Of a run that learns five sequences by heart, and watches two of the five validation sequences."""
    monkeypatch.setattr(report, "WATCHED", 2)
    folder = here(array, tmp_path, train_sequences=5, epochs=18, learning_rate=1)
    rows = evaluations(folder)
    best = min(rows, key=lambda row: row["val_mse_per_frame"])
    assert results(folder)["step"] == best["step"] < rows[-1]["step"]
    logits, _, truth = logits_of(folder, array, VALIDATION)
    errors = (1 / (1 + np.exp(-logits)) - truth) ** 2
    for found, some in (best["val_mse_per_frame"], [0, 4]), (results(folder)["validation_mse"], range(5)):
        assert found == pytest.approx(errors[some].sum((2, 3)).mean(), rel=1e-4)
    assert mean(here(array, tmp_path, eval_only=True, weights=folder / "last.pt")) != mean(folder)


def test_baselines_stand_beside_every_epoch(array, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "loss", lambda *given: drawn.append(given) or b"")
    folder = here(array, tmp_path, pictures=True, epochs=1, train_sequences=5)
    past, truth = split(array, VALIDATION)
    flow = metrics.optical_flow(torch.from_numpy(past[:, :, None]).float(), FRAMES_OUT)[:, :, 0].numpy()
    expected = {"black": 0, "copy_last": past[:, -1:], "optical_flow": flow}
    expected = {who: mse(prediction, truth) for who, prediction in expected.items()}
    assert drawn and all(means == pytest.approx(expected) for _, means, _ in drawn)
    assert checkpoint.load(folder / "last.pt")["progress"]["baselines"] == pytest.approx(expected)


def test_the_best_the_median_and_the_worst_are_drawn(array, tmp_path, monkeypatch):
    drawn = {}

    def keep(past, truth, forecast, title, values):
        drawn[title] = float((forecast - truth).square().sum((1, 2, 3)).mean())
        return b""

    monkeypatch.setattr(figures, "prediction", keep)
    folder = here(array, tmp_path, pictures=True, **FEW)
    logits, _, truth = logits_of(folder, array, TEST)
    errors = sorted(np.square(1 / (1 + np.exp(-logits)) - truth).sum((2, 3)).mean(1))
    for name, k in ("best", 0), ("median", 3), ("worst", 5):
        (found,) = (error for title, error in drawn.items() if f"{name} of 6 forecasts" in title)
        assert found == pytest.approx(errors[k], rel=1e-4)


@pytest.mark.parametrize("model", ["my_model", "paper", "plain", "convlstm", "seq2seq"])
def test_others_go_on_as_exactly(model, array, tmp_path, monkeypatch):
    """The references; a network with dropout in evaluation, too, rates by NumPy, and a mask. Stopped once.

    The weights of the references draw the same forecast again.
    """
    if model == "my_model":
        build, schedule = main.build, main.learning_rate_at

        def with_dropout(*arguments):
            network = build(*arguments)
            network.head.insert(1, torch.nn.Dropout())
            network.register_forward_hook(lambda *given: torch.nn.functional.dropout(given[-1]))
            network.register_buffer("mask", torch.tensor(-torch.inf))
            return network

        monkeypatch.setattr(main, "build", with_dropout)
        monkeypatch.setattr(main, "learning_rate_at", lambda *given: np.float64(schedule(*given)))
        monkeypatch.setattr(main, "ADAMW_RATE", np.float64(main.ADAMW_RATE))
    alone = here(array, tmp_path / "alone", model=model, **FEW)
    assert set(results(alone)["scores"][model]) == {*metrics.METRICS, "rmse", "skill"}
    with stopped_after_a_checkpoint():
        here(array, tmp_path, model=model, **FEW)
    assert checkpoint.load(tmp_path / model / "last.pt")["step"] == 1
    same(here(array, tmp_path, model=model, **FEW), alone)
    if model != "my_model":
        past, _ = split(array, TEST)
        past = torch.from_numpy(past[:1, :, None]).float()
        drawn = 255 * main.load(alone / "best.pt").forecast(past, FRAMES_OUT)[0].numpy()
        np.testing.assert_allclose(np.load(alone / "forecast.npy"), drawn, atol=0.51)
        assert main.load(alone / "last.pt").frames_out == FRAMES_OUT


def kill(places, data, out, **changes):
    """How many runs died in tests/killer.py, as it counts them, before the one that ended as if alone."""
    words, script = flags(data, out, **changes), ROOT / "tests" / "killer.py"
    # two threads that spin would disturb others' tests
    printed, _ = finish(start(places, data, *words, script=script, OMP_WAIT_POLICY="passive"), timeout=300)
    same(out / "my_model", out / "alone" / "my_model", RESULTS)
    config = json.loads((out / "my_model" / "config.json").read_text("utf-8"))
    assert config["threads"] == 2 and not list(out.rglob("*.half"))
    return int(printed)


@forks
def test_killed_at_random_moments(tmp_path):
    """In a step, a checkpoint, an evaluation or a picture: the same command ends as if nothing had been."""
    changes = {**WIDE, "train_sequences": 25, "patch_size": 4, "precision": "bf16"}
    assert kill("random", "fresh", tmp_path, **changes) >= 2


@forks
def test_killed_inside_a_checkpoint_an_evaluation_and_a_picture(array, tmp_path):
    places = "last.pt,evaluation,best.pt,log.csv,predict.gif,last.pt,metrics.json"
    assert kill(places, str(array), tmp_path, **WIDE, overlay=2) == 7


def test_a_finished_run_stays_as_it_is(reference, array, capsys):
    """Also on another machine, as good as: with other kernels and threads."""
    folder, printed = reference
    before = state(folder)
    torch.set_num_threads(2)
    here(array, folder.parent, pictures=True, fast=False)
    torch.set_num_threads(1)
    assert state(folder) == before
    again = capsys.readouterr().out
    assert "this run has ended; nothing was changed" in again and "bit-exact" not in again
    assert printed.split("\n\n")[1] in again  # the table


def test_lost_and_damaged_files_of_a_run_that_has_ended_come_back(reference, array, tmp_path, capsys):
    """Without its checkpoint, it is not trained again."""
    folder = shutil.copytree(reference[0], tmp_path / "my_model")
    lost = [name for name in RESULTS if name not in ("loss.png", "log.csv")]
    for name in lost:
        (folder / name).unlink()
    assert here(array, tmp_path, pictures=True) == folder
    same(folder, reference[0], lost)
    for damaged in (b"\xff", b"[]", b"{"):
        (folder / "metrics.json").write_bytes(damaged)
        here(array, tmp_path)
        same(folder, reference[0])
    (folder / "last.pt").unlink()
    before = state(folder)
    capsys.readouterr()
    here(array, tmp_path)
    assert state(folder) == before and "this run has ended" in capsys.readouterr().out


def test_resuming_elsewhere_says_that_it_is_not_exact(reference, array, tmp_path, capsys):
    folder = shutil.copytree(reference[0], tmp_path / "my_model")
    (folder / "metrics.json").unlink()
    state = checkpoint.load(folder / "last.pt")
    state["progress"]["step"] = 2 * STEPS - 1
    checkpoint.save(folder / "last.pt", state)
    here(array, tmp_path, fast=False)
    printed = capsys.readouterr().out
    assert "resuming with kernels plain PyTorch" in printed and "no longer bit-exact" in printed
    assert f"resuming at step {2 * STEPS - 1}" in printed


def test_minutes_instead_of_epochs(array, tmp_path):
    folder = here(array, tmp_path, max_minutes=0.05)  # 3 seconds
    progress = checkpoint.load(folder / "last.pt")["progress"]
    assert progress["seconds"] >= 3 > progress["seconds"] - progress["duration"]
    rates = [row["learning_rate"] for row in evaluations(folder)]
    last_began = (progress["seconds"] - progress["duration"]) / 3  # the last step, as a fraction
    assert min(rates) > 0 and rates[-1] == pytest.approx(main.learning_rate_at(main.Knobs(), last_began))
    assert results(here(array, tmp_path, max_minutes=1e-6))["scores"]  # ends, too


def test_weights_bring_their_network_along(array, tmp_path, capsys):
    network = {"hidden_channels": [6, 4], "head_channels": [], "max_motion": 0, "equivariant": False}
    trained = here(array, tmp_path, **FEW, **network)
    halves = torch.load(trained / "best.pt")
    halves["model"] = {name: weight.half() for name, weight in halves["model"].items()}
    checkpoint.save(given := tmp_path / "small.pt", halves)
    before = state(trained)
    folder = here(array, tmp_path, weights=given, eval_only=True)
    printed = capsys.readouterr().out
    assert folder == tmp_path / "small-eval" and "weights of" in printed and "edited" not in printed
    assert (folder / "predict_worst.png").exists() and not (folder / "last.pt").exists()
    assert mean(folder) == pytest.approx(mean(trained), rel=1e-3) and mean(folder) != mean(trained)
    assert "| small-eval " in (tmp_path / "compare.md").read_text("utf-8")
    with pytest.raises(UserError, match=r"hidden_channels \(6, 4\), not \(8,\); leave out --hidden_channels"):
        here(array, tmp_path, weights=given, hidden_channels=8)
    scores = state(folder)
    tuned = here(array, tmp_path, weights=given, learning_rate=1e-9, **FEW)
    assert tuned == tmp_path / "my_model-2" and state(folder) == scores and state(trained) == before
    found, expected = (evaluations(f)[-1]["val_mse_per_frame"] for f in (tuned, trained))
    assert found == pytest.approx(expected, rel=1e-3)


def test_evaluation_alone_replaces_no_scores(reference, array, tmp_path):
    """With the network and the frames of the weights, in folders of its own. It trains nothing."""
    folder = shutil.copytree(reference[0], tmp_path / "my_model")
    before, best = state(folder), str(folder / "best.pt")
    words = ["--eval_only", "--weights", best, "--data", str(array), "--out", str(tmp_path)]
    for _ in range(2):  # the second time into the same folder
        with without_pictures():
            main.main(main.parse([*words, "--device", "cpu", "--precision", "fp32"]))
        again = tmp_path / "my_model-eval"
        assert results(again) == results(folder) | {"validation_mse": None}
        text = (again / "config.json").read_text("utf-8")
        assert '"threads": 1,' in text  # not as it was left
        (again / "config.json").write_text(text.replace('"threads": 1,', '"threads": 9,'))
    made = {path.name for path in again.iterdir()}
    assert {*PREDICTIONS, "predict.gif", "per_frame.png"} <= made and not {"last.pt", "loss.png"} & made
    other = tmp_path / "other.npy"
    np.save(other, moving_squares(57, seed=1))
    of_best = {"data": array, "out": tmp_path, "weights": best, "eval_only": True}
    changes = {"frames_out": 3}, {"weights": folder / "last.pt"}, {"data": other}, {"name": "mine"}
    folders = fewer, _, others, _ = [here(**of_best | change) for change in changes]
    names = ["my_model-eval-2", "my_model-eval-3", "my_model-eval-4", "mine"]
    assert [path.name for path in folders] == names
    assert results(fewer)["frames_out"] == 3 and mean(others) != mean(folder)
    made = {path.name for path in tmp_path.iterdir() if path.is_dir() and path.name[0] != "."}
    assert made == {*names, folder.name, again.name}
    assert state(folder) == before
