"""Whole runs on a small array: what is made and printed, and that interruptions and processes change nothing."""

import csv
import dataclasses
import functools
import inspect
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ABORTS_AT_SHUTDOWN,
    ENVIRONMENT,
    FRAMES_IN,
    FRAMES_OUT,
    ROOT,
    STEPS,
    TEST,
    VALIDATION,
    finish,
    flags,
    here,
    moving_squares,
    skip_without_compiler,
    start,
)
from conftest import wait_until as wait
from PIL import Image

import checkpoint
import evaluate
import fast_convlstm
import journal
import main
import metrics
import my_model
from knobs import knob, names_under, parse
from moving_mnist import MovingMNIST, Sequences
from my_model import EncoderForecaster

PREDICTIONS = [f"predict_{k}.png" for k in (1, 2, 3, 4, "best", "median", "worst", "last_frame")]
PICTURES = ["loss.png", "per_frame.png", *PREDICTIONS, "predict.gif"]
FILES = [
    *PICTURES,
    "forecast.npy",
    "log.csv",
    "timing.csv",
    "config.json",
    "metrics.json",
    "last.pt",
    "best.pt",
    "main.py",
    "my_model.py",
    "symmetry.py",
    "advection.py",
    "convlstm.py",
]
# main.py's network, with a small head
RECIPE = {"head": (8,), "feedback": True, "search": 4, "reach": 4, "sheets": 2, "symmetric": True}


def results(folder):
    return json.loads((folder / "metrics.json").read_text())


def log(folder):
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(row.pop("data") for row in rows)  # which says, where it is one, "stand-in array"
    return [{name: float(value) for name, value in row.items()} for row in rows]


def split(array, sequences):
    """(past, truth) as float64 (B, T, H, W) in [0, 1], straight from the file."""
    frames = np.load(array)[:, sequences].swapaxes(0, 1) / 255
    return frames[:, :FRAMES_IN], frames[:, FRAMES_IN : FRAMES_IN + FRAMES_OUT]


def mse(prediction, truth):
    return np.square(prediction - truth).sum((2, 3)).mean()


def test_a_run_leaves_every_file(reference):
    folder, _ = reference
    assert all((folder / name).stat().st_size for name in FILES)
    assert not list(folder.glob("*.tmp"))
    for name in ("main.py", "my_model.py"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden"] == [8] and config["torch"] == torch.__version__ and config["device_used"]
    assert [(row["epoch"], row["step"]) for row in log(folder)] == [(1, STEPS), (2, 2 * STEPS)]


def test_pictures_open(reference):
    for name in PICTURES:
        with Image.open(reference[0] / name) as image:
            image.load()
    with Image.open(reference[0] / "predict.gif") as gif:
        assert gif.n_frames == FRAMES_IN + FRAMES_OUT
        assert gif.info["loop"] == 0  # for ever


def test_scores_are_those_of_the_best_weights_on_the_test_split(reference, array):
    folder, printed = reference
    found = results(folder)
    assert (found["split"], found["sequences"], found["data"]) == ("test", 6, "squares.npy")
    assert set(found["scores"]) == {"my_model", "black", "copy_last", "optical_flow"}
    assert set(found["scores"]["my_model"]) == set(metrics.METRICS)
    for scores in found["scores"].values():
        for name, score in scores.items():
            assert score["unit"] == metrics.METRICS[name][1]
            assert score["mean"] == pytest.approx(np.mean(score["per_frame"]))
    model = EncoderForecaster(1, (8,), 3, fast=False, **RECIPE)  # the plain twin
    best = torch.load(folder / "best.pt")
    model.load_state_dict(best["model"])
    past, truth = split(array, TEST)
    with torch.no_grad():
        logits = model(torch.from_numpy(past[:, :, None]).float(), FRAMES_OUT)[:, :, 0].double().numpy()
    scores = found["scores"]
    assert scores["my_model"]["mse_per_frame"]["mean"] == pytest.approx(mse(1 / (1 + np.exp(-logits)), truth), rel=1e-4)
    nats = (np.logaddexp(0, logits) - truth * logits).sum((1, 2, 3)).mean()
    assert scores["my_model"]["cross_entropy_per_sequence"]["mean"] == pytest.approx(nats, rel=1e-4)
    assert scores["black"]["mse_per_frame"]["mean"] == pytest.approx(mse(0, truth))
    assert scores["copy_last"]["mse_per_frame"]["mean"] == pytest.approx(mse(past[:, -1:], truth))
    drawn = 255 / (1 + np.exp(-logits[0]))  # forecast.npy: of the first sequence, to a grey level
    np.testing.assert_allclose(np.load(folder / "forecast.npy")[:, 0], drawn, atol=0.51)
    assert best["val_mse_per_frame"] == min(row["val_mse_per_frame"] for row in log(folder))
    assert found["weights"] == checkpoint.digest(model) and f"weights   {found['weights']}" in printed


def test_first_lines_say_what_runs(reference):
    first = reference[1].split("epoch")[0]
    parameters = sum(p.numel() for p in EncoderForecaster(1, (8,), 3, **RECIPE).parameters())
    for fact in (f"my_model, {parameters:,} parameters", "device    ", "1 process,", "1 threads", "fp32", "1×16×16",
                 f"torch {torch.__version__}", "squares.npy: 46 training, 5 validation, 6 test"):  # fmt: skip
        assert fact in first


def test_baselines_stand_beside_every_epoch(reference, array):
    past, truth = split(array, VALIDATION)
    black, copied = mse(0, truth), mse(past[:, -1:], truth)
    lines = [line for line in reference[1].splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    assert all(f"(black {black:.1f}, last frame copied {copied:.1f})" in line for line in lines)
    frames = torch.from_numpy(past[:, :, None]).float()
    flow = mse(metrics.optical_flow(frames, FRAMES_OUT)[:, :, 0].numpy(), truth)
    for row in log(reference[0]):
        found = [row[f"val_mse_{who}"] for who in ("black", "copy_last", "optical_flow")]
        assert found == pytest.approx([black, copied, flow])


def test_a_finished_run_stays_as_it_is(reference, array, capsys):
    folder, printed = reference
    state = lambda: {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir() if p.name != ".lock"}
    before = state()
    here(array, folder.parent, pictures=True)
    assert state() == before
    again = capsys.readouterr().out
    assert "this run has ended; nothing was changed" in again
    assert printed.split("\n\n")[1] in again  # the table


def same(folder, reference):
    """The end of the uninterrupted run, bit for bit."""
    for name in ("last.pt", "best.pt"):
        ours, theirs = (torch.load(f / name) for f in (folder, reference))
        assert ours["step"] == theirs["step"]
        assert ours.get("history") == theirs.get("history")
        for part in ("model", "optimisers"):
            torch.testing.assert_close(ours.get(part), theirs.get(part), rtol=0, atol=0)
    for name in (*PICTURES, "log.csv", "metrics.json", "forecast.npy"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name


@pytest.mark.parametrize("model", ["convlstm", "seq2seq", "my_model"])
def test_others_go_on_as_exactly(model, array, tmp_path, monkeypatch):
    """The references, and a network with dropout. Stopped in the middle, as by a crash: from its last checkpoint."""
    if model == "my_model":
        build = main.build

        def with_dropout(*arguments):
            network = build(*arguments)
            network.head.insert(1, torch.nn.Dropout())
            return network

        monkeypatch.setattr(main, "build", with_dropout)
    few = {"model": model, "train_sequences": 10, "pictures": True}
    alone = here(array, tmp_path / "alone", **few)
    assert alone == tmp_path / "alone" / model and all((alone / name).stat().st_size for name in FILES)
    assert set(results(alone)["scores"][model]) == set(metrics.METRICS)
    assert not (alone.parent / "compare.md").exists()  # nothing to compare with

    class Crash(Exception):
        pass

    def crash(path, state, save=checkpoint.save):
        save(path, state)
        if path.name == "last.pt":
            raise Crash

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(checkpoint, "save", crash)
        here(array, tmp_path, **few)
    assert 0 < checkpoint.load(tmp_path / model / "last.pt")["step"] < checkpoint.load(alone / "last.pt")["step"]
    same(here(array, tmp_path, **few), alone)


def test_large_frames_are_evaluated_a_few_at_a_time():
    dataset = Sequences(np.random.default_rng(0).integers(256, size=(4, 11, 1, 96, 128), dtype=np.uint8))
    sizes = []

    def forecast(past, n):
        sizes.append(len(past))
        return metrics.copy_last(past, n), None

    found = evaluate.curve(forecast, dataset, 2, 2, "cpu")
    past, truth = evaluate.cut(dataset[np.arange(11)], 2, 2)
    assert sizes == [6, 5]
    assert found == pytest.approx(metrics.mse_per_frame(metrics.copy_last(past, 2), truth).tolist())


def kill(kills, data, command):
    """How many of the runs were at work when tests/killer.py killed them, before the one that ended."""
    killer = [sys.executable, str(ROOT / "tests" / "killer.py"), kills, data, *command]
    ran = subprocess.run(killer, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


EVERY_STEP = 1e-6  # minutes between checkpoints: also inside an epoch


@pytest.mark.skipif(sys.platform != "linux", reason="reads the clock of another process")
@pytest.mark.parametrize(
    ("data", "precision", "kills"), [("array", "fp32", 20), ("array", "bf16", 6), ("fresh", "fp32", 6)]
)
def test_killed_at_random_moments(data, precision, kills, array, tmp_path):
    """In a step, a checkpoint, an evaluation or a picture: the same command ends as if nothing had been."""
    source = data if data == "fresh" else array
    command = flags(source, tmp_path, save_minutes=EVERY_STEP, precision=precision, overlay=2)
    assert kill(str(kills), data, command) >= kills - 2
    same(tmp_path / "my_model", tmp_path / "alone" / "my_model")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_killed_inside_a_checkpoint_an_evaluation_and_a_picture(reference, array, tmp_path):
    places = "last.pt", "evaluation", "best.pt", "log.csv", "predict_2.png", "predict.gif", "last.pt", "metrics.json"
    command = flags(array, tmp_path, save_minutes=EVERY_STEP)
    assert kill(",".join(places), "array", command) == len(places)
    assert not list((tmp_path / "my_model").glob("*.tmp"))
    same(tmp_path / "my_model", reference[0])


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def of_two_processes(array, tmp_path_factory):
    """(folder, stdout) of the uninterrupted run, shared by two. Read only."""
    out = tmp_path_factory.mktemp("two")
    printed, _ = finish(start(*flags(array, out), launcher=(*TORCHRUN, *ABORTS_AT_SHUTDOWN)))
    return out / "my_model", printed


def children(number):
    return [int(n) for path in Path("/proc").glob(f"{number}/task/*/children") for n in path.read_text().split()]


def kill_with_children(number):
    for child in children(number):
        kill_with_children(child)
    os.kill(number, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the children in /proc")
def test_killed_with_two_processes(of_two_processes, array, tmp_path):
    command, last = flags(array, tmp_path, save_minutes=EVERY_STEP), tmp_path / "my_model" / "last.pt"
    for wanted in (2, 5):
        process = start(*command, launcher=TORCHRUN)
        wait(lambda wanted=wanted: last.exists() and checkpoint.load(last)["step"] >= wanted, process)
        if wanted == 2:  # one of them alone: the other may not wait for it
            workers = children(process.pid)
            os.kill(workers[1], signal.SIGKILL)
            process.communicate(timeout=10)
            assert process.returncode > 0 and not any(Path(f"/proc/{worker}").exists() for worker in workers)
        else:
            kill_with_children(process.pid)
            process.communicate()
    finish(start(*command, launcher=TORCHRUN))
    same(tmp_path / "my_model", of_two_processes[0])


def test_two_machines(array, tmp_path):
    """The README's command, a machine on each of two addresses of this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                  f"--rdzv_endpoint=127.0.0.1:{port}")  # fmt: skip
    machines = [
        start(*flags(array, tmp_path / str(k), epochs=1), launcher=(*rendezvous, f"--local_addr=127.0.0.{k}"))
        for k in (1, 2)
    ]
    printed = [finish(machine)[0] for machine in machines]
    speaks = ["2 processes" in text for text in printed]
    assert sorted(speaks) == [False, True]
    assert [(tmp_path / k / "my_model" / "metrics.json").exists() for k in "12"] == speaks
    assert [(tmp_path / k).exists() for k in "12"] == speaks  # the other writes nothing
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    again = [
        start(*flags(array, tmp_path / k, epochs=1), RANK="01"[not first], **world)
        for k, first in zip("12", speaks, strict=True)
    ]
    assert "this run has ended" in "".join([finish(machine)[0] for machine in again])  # the other has to be told


def test_processes_share_what_is_overlaid(array, tmp_path):
    """The same partners, and the same loss, of parts of 3 and 2; one epoch, as rounding grows."""
    changes = {"epochs": 1, "train_sequences": 20, "overlay": 2, "sharpen_from": 0}
    finish(start(*flags(array, tmp_path / "two", **changes), launcher=TORCHRUN))
    one, two = here(array, tmp_path, **changes), tmp_path / "two" / "my_model"
    ours, theirs = (torch.load(folder / "last.pt") for folder in (two, one))
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=2e-6)
    assert ours["history"][-1]["train_loss"] == pytest.approx(theirs["history"][-1]["train_loss"], abs=1e-6)


def test_processes_share_the_batch(reference, of_two_processes):
    folder, printed = of_two_processes
    assert printed.count("2 processes") == 1
    assert {p.name for p in folder.iterdir()} == {p.name for p in reference[0].iterdir()}
    ours, theirs = (torch.load(f / "last.pt") for f in (folder, reference[0]))
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=2e-6)  # the rounding of sums
    for mine, other in zip(ours["history"], theirs["history"], strict=True):
        assert mine.pop("data") == other.pop("data")
        assert mine == pytest.approx(other, rel=1e-5)
    for name, score in results(folder)["scores"]["my_model"].items():
        assert score["mean"] == pytest.approx(results(reference[0])["scores"]["my_model"][name]["mean"], rel=1e-3)


def test_the_best_the_median_and_the_worst_are_drawn(tmp_path, monkeypatch):
    """Of sequences of one grey level each, which a black forecast misses by that level."""
    levels = torch.tensor([90, 200, 10, 160, 40], dtype=torch.uint8)
    dataset, pictures = levels[:, None, None, None, None].expand(5, 3, 1, 16, 16), {}
    forecast = lambda past, n: (metrics.black(past, n), torch.zeros(len(past), n, *past.shape[2:]))
    _, order = evaluate.test("a", forecast, dataset, 2, 1, torch.device("cpu"))
    keep = lambda path, past, truth, prediction, title: pictures.update({path.stem: (int(truth.max() * 255), title)})
    monkeypatch.setattr(evaluate.figures, "prediction", keep)
    monkeypatch.setattr(evaluate.figures, "grid", lambda path, rows, title: pictures.update({path.stem: rows}))
    evaluate.draw_ranked(tmp_path, forecast, dataset, order, 2, 1, torch.device("cpu"), "of a")
    expected = {"best": 10, "median": 90, "worst": 200}
    for name, level in expected.items():
        mse = 256 * (level / 255) ** 2
        assert pictures[f"predict_{name}"] == (level, f"of a: the {name} of 5 sequences, MSE {mse:.0f}")
    (numbers, truth), (errors, last) = pictures["predict_last_frame"].values()
    assert numbers == [f"sequence {n}" for n in (3, 5, 1, 4, 2)]
    assert errors == [f"MSE {256 * (level / 255) ** 2:.0f}" for level in (10, 40, 90, 160, 200)]
    assert (truth[:, 0, 0, 0] * 255).round().tolist() == [10, 40, 90, 160, 200] and not last.any()


def test_weights_bring_their_network_along(array, tmp_path, capsys):
    trained = here(array, tmp_path, epochs=1, hidden="6,4", head=0, feedback=False, reach=0)
    halves = torch.load(trained / "best.pt")
    halves["model"] = {name: weight.half() for name, weight in halves["model"].items()}
    checkpoint.save(tmp_path / "small.pt", halves)
    folder = here(array, tmp_path, weights=tmp_path / "small.pt", eval_only=True, pictures=True)
    assert folder.name == "my_model"
    folder = tmp_path / "weights_small"  # of its own, so that no training's results are lost
    assert not (folder / "last.pt").exists() and (folder / "predict_worst.png").exists()
    ours, theirs = (results(f)["scores"]["my_model"]["mse_per_frame"]["mean"] for f in (folder, trained))
    assert ours == pytest.approx(theirs, rel=1e-3) and ours != theirs
    assert "weights_small" in (tmp_path / "compare.md").read_text()
    assert f"from {tmp_path / 'small.pt'}" in capsys.readouterr().out
    for name in ("best.pt", "last.pt"):
        here(array, tmp_path, weights=trained / name, eval_only=True)
    assert (tmp_path / f"weights_{tmp_path.name}_my_model_last" / "metrics.json").exists()
    # a name that tells it from other best.pt
    assert (tmp_path / f"weights_{tmp_path.name}_my_model_best" / "metrics.json").exists()
    reference = here(array, tmp_path, model="convlstm", epochs=1, train_sequences=10) / "best.pt"
    here(array, tmp_path / "tuned", weights=reference, epochs=1, train_sequences=10)
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == ["convlstm"]
    tuned = here(array, tmp_path / "tuned", weights=tmp_path / "small.pt", learning_rate=1e-9, epochs=1)
    assert log(tuned)[-1]["val_mse_per_frame"] == pytest.approx(log(trained)[-1]["val_mse_per_frame"], rel=1e-3)


def test_every_knob_of_the_network_comes_with_its_weights():
    """One that did not would silently score another network than was trained."""
    network = {"model"} | {*inspect.signature(EncoderForecaster).parameters} & {*vars(main.Knobs())}
    assert set(names_under("model", main.Knobs())) == network and len(network) == 13


def test_weights_near_the_root_are_scored_within_out(array, tmp_path, monkeypatch):
    """A folder's name joined to it by / would lead out of there."""
    trained = here(array, tmp_path, epochs=1, train_sequences=10)
    monkeypatch.setattr(Path, "resolve", lambda self: Path("/") / self.name)
    here(array, tmp_path / "scored", weights=trained / "best.pt", eval_only=True)
    assert [path.name for path in (tmp_path / "scored").iterdir()] == ["weights_best"]


def test_what_is_not_compiled_is_named(monkeypatch):
    skip_without_compiler()
    named = lambda **knobs: [source for source, _ in main.not_compiled(main.Knobs(**knobs), torch.float32)]
    assert named() == named(reach=0) == named(patch=64, reach=0, search=0) == []
    assert named(patch=64) == ["advect.c"]
    monkeypatch.setattr(fast_convlstm.native, "build", lambda *args: None)
    monkeypatch.setattr(fast_convlstm, "gate_functions", fast_convlstm.gate_functions.__wrapped__)
    monkeypatch.setattr(main.advection, "library", main.advection.library.__wrapped__)
    assert named() == ["gates.c", "advect.c"] and named(reach=0, search=0) == ["gates.c"]


def test_the_seed_decides(array, tmp_path):
    few = {"epochs": 1, "train_sequences": 5, "precision": "auto", "frames_out": 2}
    digests = [results(here(array, tmp_path / str(k), seed=seed, **few))["weights"] for k, seed in enumerate((1, 1, 2))]
    assert digests[0] == digests[1] != digests[2]


def test_more_epochs_go_on(array, tmp_path, capsys):
    folder = here(array, tmp_path, epochs=1, train_sequences=10, pictures=True)
    first = log(folder)
    (folder / "log.csv").write_text("step\n\0")
    (folder / "loss.png").write_bytes(b"GIF")
    (folder / "predict_1.png").unlink()
    here(array, tmp_path, epochs=2, train_sequences=10, pictures=True)
    printed = capsys.readouterr().out
    assert "going on to 2 epochs: the learning rate follows the longer schedule" in printed
    assert "going on at step 2" in printed
    assert len(log(folder)) == 2 and log(folder)[:1] == first  # from the checkpoint, as the file was garbled
    for name in ("loss.png", "predict_1.png"):
        Image.open(folder / name).verify()
    assert results(folder)["step"] == min(log(folder), key=lambda row: float(row["val_mse_per_frame"]))["step"]


def test_minutes_instead_of_epochs(tmp_path):
    np.save(tmp_path / "long.npy", moving_squares(1000))
    folder = here(tmp_path / "long.npy", tmp_path, max_minutes=0.05)  # 3 seconds
    last = torch.load(folder / "last.pt")
    assert last["step"] == last["steps"] > 13
    assert 1 < last["seconds"] < 9  # the pace is guessed from ten steps, and other work disturbs it
    assert 0 <= log(folder)[-1]["learning_rate"] < 0.01 * main.Knobs.learning_rate


def test_the_pace_is_of_the_steps_that_are_left(capsys):
    knobs, run = main.Knobs(), {"step": 113, "steps": 213, "loss_sum": 1.0, "loss_count": 1}
    # from here on all frames are trained on: 100 steps of 3 seconds
    main.announce_pace(run, 3.0, dataclasses.replace(knobs, grow_until=0), main.tqdm(disable=True))
    assert "3 sequences/s: 100 more steps of 8 will take about 5 min" in capsys.readouterr().out


def test_the_pace_is_of_the_horizon_that_was_timed():
    """The steps that were timed forecast all frames, as nearly all steps will: a second each, 900 of them."""
    timed = main.Knobs(max_minutes=15, dense=False, warmup=0.5, grow_from=0, grow_until=0.05)
    run = {"step": 13, "steps": 0, "loss_sum": 1.0, "loss_count": 1}
    main.announce_pace(run, 1.0, timed, main.tqdm(disable=True))
    assert 900 <= run["steps"] < 930


@pytest.mark.parametrize(
    ("steps", "steps_per_epoch", "expected"),
    [
        (90, 30, [30, 50, 60, 90]),
        (4000, 1, [40, 50, *range(80, 4001, 40)]),  # ten sequences for minutes
        (150, 1, [*range(2, 151, 2)]),
        (36_000, 1, [50, *range(360, 36_001, 360)]),  # for hours
        (12_000, 60, [50, *range(60, 12_001, 60)]),
        (2024, 1012, [50, 506, 1012, 1518, 2024]),  # as shipped
        (303, 101, [50, 76, 152, 228, 303]),
        (2026, 1013, [50, 507, 1014, 1521, 2026]),
        (50, 50, [13, 26, 39, 50]),
        (49, 49, [49]),
        (0, 1, [50]),  # as the clock will tell
    ],
)
def test_evaluations_are_neither_too_few_nor_too_many(steps, steps_per_epoch, expected):
    assert [s for s in range(1, 1 + (steps or 100)) if main.evaluation_due(s, steps, steps_per_epoch)] == expected


def test_sequences_of_ones_own_are_trained_on(array, tmp_path, monkeypatch):
    frames = np.load(array)[:, :, None]
    splits = [Sequences(frames[:, first:last]) for first, last in ((0, 40), (40, 48), (48, 57))]
    monkeypatch.setattr(main, "load_data", lambda knobs: (*splits, "squares"))
    found = results(here("squares", tmp_path, epochs=1))
    assert (found["data"], found["split"], found["sequences"]) == ("squares", "all", 9) and "beyond" not in found


@pytest.mark.parametrize(("frames", "halves"), [(16, (8, 8)), (7, (4, 3))])
def test_shorter_sequences_are_halved(frames, halves, tmp_path, capsys):
    np.save(tmp_path / "short.npy", moving_squares(57)[:frames])
    words = ["--data", tmp_path / "short.npy", "--out", tmp_path, "--hidden", "4", "--head", "4", "--epochs", "1"]
    main.main(parse(main.Knobs, list(map(str, words))))
    found = results(tmp_path / "my_model")
    assert (found["frames_in"], found["frames_out"]) == halves
    assert f"has {frames} a sequence: frames_in {halves[0]}, frames_out {halves[1]}" in capsys.readouterr().out
    with pytest.raises(main.DataError, match=f"has {frames} frames a sequence, too few for frames_in 12"):
        main.main(parse(main.Knobs, [*map(str, words), "--frames_in", "12", "--frames_out", "9"]))


def test_few_minutes_and_many_sequences_still_end(tmp_path):
    np.save(tmp_path / "long.npy", moving_squares(200))
    folder = here(tmp_path / "long.npy", tmp_path, max_minutes=1e-6)
    assert results(folder)["scores"]["my_model"]


def test_lost_files_of_a_run_that_has_ended_come_back(array, tmp_path):
    folder = here(array, tmp_path, epochs=1, train_sequences=10, pictures=True)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".csv", ".png", ".json")}
    for name in files:
        (folder / name).unlink()
    here(array, tmp_path, epochs=1, train_sequences=10, pictures=True)
    assert {name: (folder / name).read_bytes() for name in files} == files


def test_weights_that_are_gone_are_no_loss_to_a_run_that_began_with_them(array, tmp_path, capsys):
    knobs = {"weights": tmp_path / "small.pt", "epochs": 1, "train_sequences": 10}
    given = here(array, tmp_path, epochs=1, train_sequences=10, hidden="6,4") / "best.pt"
    given.rename(knobs["weights"])
    folder = here(array, tmp_path / "tuned", **knobs)
    knobs["weights"].unlink()
    here(array, tmp_path / "tuned", **knobs)
    assert "this run has ended" in capsys.readouterr().out
    here(array, tmp_path / "tuned", **knobs | {"epochs": 2})
    assert checkpoint.load(folder / "last.pt")["step"] == 4
    for others in ({"out": tmp_path / "new"}, {"out": tmp_path / "tuned", "weights": tmp_path / "typo.pt"}):
        with pytest.raises(checkpoint.CheckpointError, match=r"cannot read .*\.pt: No such file"):
            here(**{"data": array, "out": None} | knobs | others)


@pytest.mark.parametrize("damage", ["", "step,val_loss\n1", "step\n\0", b"\xff\xfe"], ids=repr)
def test_evaluation_alone_with_a_damaged_log(damage, array, tmp_path):
    folder = here(array, tmp_path, epochs=1, train_sequences=10)
    (folder / "log.csv").write_bytes(damage.encode() if isinstance(damage, str) else damage)
    (folder / "metrics.json").unlink()
    here(array, tmp_path, epochs=1, train_sequences=10, eval_only=True)
    assert (folder / "metrics.json").exists()


def test_evaluation_alone_trains_nothing(array, tmp_path):
    folder = here(array, tmp_path, epochs=1, train_sequences=10, pictures=True)
    weights, scores = (folder / "best.pt").read_bytes(), results(folder)
    look = lambda: {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".png", ".gif")}
    pictures = look()
    assert "predict.gif" in pictures
    for name in ("metrics.json", *pictures):
        (folder / name).unlink()
    here(array, tmp_path, epochs=1, train_sequences=10, eval_only=True, pictures=True)
    assert (folder / "best.pt").read_bytes() == weights and results(folder) == scores
    assert look() == pictures  # each drawn again


def test_scores_of_a_training_are_not_replaced_by_others(array, tmp_path):
    folder = here(array, tmp_path, epochs=1, train_sequences=10)
    scores = (folder / "metrics.json").read_bytes()
    other = {"frames_out": 3, "eval_only": True}
    with pytest.raises(checkpoint.CheckpointError, match=r"frames_out was 4 and is now 3.*--weights .*best\.pt scores"):
        here(array, tmp_path, **other)
    with pytest.raises(checkpoint.CheckpointError, match=r"video_stride was 1 and is now 2"):
        here(array, tmp_path, video_stride=2, eval_only=True)
    here(array, tmp_path, **other, weights=folder / "best.pt")
    assert (folder / "metrics.json").read_bytes() == scores
    assert results(tmp_path / f"weights_{tmp_path.name}_my_model_best")["frames_out"] == 3


@pytest.mark.parametrize("then", ["array (stand-in array, 10 sequences of 20×1×16×16)", None])
def test_scores_of_a_training_on_other_data_are_not_replaced(then, array, tmp_path):
    folder = here(array, tmp_path, epochs=1, train_sequences=10)
    state = checkpoint.load(folder / "best.pt")
    state["knobs"].pop("data")
    checkpoint.save(folder / "best.pt", {**state, "knobs": {**state["knobs"], **({"data": then} if then else {})}})
    with pytest.raises(checkpoint.CheckpointError, match=rf"data was {re.escape(str(then))} and is now .* \(squares"):
        here(array, tmp_path, eval_only=True)


def test_code_edited_during_a_run_is_named(array, tmp_path, monkeypatch, capsys):
    for _ in range(2):
        here(array, tmp_path, epochs=1, train_sequences=10)
    assert "edited  " not in capsys.readouterr().out
    code = checkpoint.code() | {"metrics.py": "other"}
    monkeypatch.setattr(checkpoint, "code", lambda: code)
    here(array, tmp_path, epochs=1, train_sequences=10)
    assert "edited    since this run began: metrics.py; a new --out" in capsys.readouterr().out


def test_an_edited_cell_is_what_runs(monkeypatch, capsys):
    knobs = parse(main.Knobs, ["--hidden", "8", "--head", "0"])
    fast = lambda: {layer.fast for layer in main.build(knobs, 1).encoder}
    assert fast() == {True} and not capsys.readouterr().out
    forward = my_model.ConvLSTMCell.forward
    edited = lambda self, x, state: [2 * s for s in forward(self, x, state)]
    only_without = lambda self, x, state: edited(self, x, state) if self.peephole is None else forward(self, x, state)
    clamped = lambda self, x, state: [s.clamp(-9, 9) for s in forward(self, x, state)]  # beyond what c soon reaches
    detached = lambda self, x, state: forward(self, x, (state[0], state[1].detach()))  # the same hidden states
    cut_off = lambda self, x, state: forward(self, None if x is None else x.detach(), state)  # from the layer below
    for change in (edited, only_without, clamped, detached, cut_off):
        monkeypatch.setattr(my_model.ConvLSTMCell, "forward", change)
        assert fast() == {False} and "ConvLSTMCell and fast_convlstm.py differ" in capsys.readouterr().out


def test_a_learned_first_state_runs_fast(monkeypatch):
    """A parameter of the cell that neither of the twins reads."""
    begin, first = my_model.ConvLSTMCell.__init__, lambda: torch.nn.Parameter(torch.zeros(4))
    learned = lambda self, *args, **options: (begin(self, *args, **options), setattr(self, "first", first()))[0]
    monkeypatch.setattr(my_model.ConvLSTMCell, "__init__", learned)
    assert my_model.twin_agrees()
    plain = my_model.ConvLSTMCell.forward
    read = lambda self, x, state: plain(self, x, tuple(s + self.first[:, None, None] for s in state))
    monkeypatch.setattr(my_model.ConvLSTMCell, "forward", read)
    assert not my_model.twin_agrees()


def test_knobs_reach_the_network_and_its_optimiser(array, tmp_path):
    """Those whose other defaults, of my_model.py and torch, would do as well."""
    model = main.build(main.Knobs(dilation=3, search=2, reach=5, sheets=3), 1)
    assert [layer.cell.dilation for layer in model.encoder] == [1, 3]
    assert (model.search, model.reach, model.sheets) == (2, 5, 3)
    tied = lambda symmetric: bool(main.build(main.Knobs(symmetric=symmetric), 1).motion.weight._backward_hooks)
    assert tied(True) and not tied(False)
    folder = here(array, tmp_path, epochs=1, train_sequences=10, weight_decay=0.07)
    (group,) = torch.load(folder / "last.pt")["optimisers"][0]["param_groups"]
    assert group["weight_decay"] == 0.07


def test_a_frozen_layer_stays(array, tmp_path, monkeypatch):
    """And all the others learn."""
    start, build = {}, main.build

    def frozen(*arguments):
        model = build(*arguments)
        model.encoder[0].requires_grad_(False)
        start.update({name: value.clone() for name, value in model.state_dict().items()})
        return model

    monkeypatch.setattr(main, "build", frozen)
    last = torch.load(here(array, tmp_path, epochs=1, train_sequences=10) / "last.pt")["model"]
    same = {name for name, value in start.items() if torch.equal(last[name], value)}
    assert same == {name for name in start if name.startswith("encoder.0.")} and len(same) == 4


def test_edited_gates_are_noticed(monkeypatch):
    """By both of their twins: the cell, and gates.c for fp32 and for bf16. An edit doubles one of the results."""
    skip_without_compiler()
    monkeypatch.setattr(fast_convlstm.native, "build", functools.cache(fast_convlstm.native.build))
    monkeypatch.setattr(fast_convlstm, "gate_functions", functools.cache(fast_convlstm.gate_functions.__wrapped__))

    def compiled(dtype):
        return fast_convlstm.gate_functions("cpu", dtype)[0] is not fast_convlstm.gates_forward

    found = lambda: (my_model.twin_agrees(), compiled(torch.float32), compiled(torch.bfloat16))
    assert found() == (True, True, True)
    results = {"gates_forward": {"z": 0, "c": 2, "c_before": 3, "h": 4}, "gates_backward": {"z": 0, "dc": 5, "sums": 6}}
    for name, places in results.items():
        right = getattr(fast_convlstm, name)
        for result, place in places.items():
            edited = lambda *tensors, right=right, place=place: (right(*tensors), tensors[place].mul_(2))
            monkeypatch.setattr(fast_convlstm, name, edited)
            fast_convlstm.gate_functions.cache_clear()
            assert found() == (False, False, False), (name, result)
        monkeypatch.setattr(fast_convlstm, name, right)
    right = fast_convlstm.gates_forward
    clamped = lambda *tensors: (right(*tensors), tensors[2].clamp_(-9, 9))  # beyond what c soon reaches
    monkeypatch.setattr(fast_convlstm, "gates_forward", clamped)
    fast_convlstm.gate_functions.cache_clear()
    assert found() == (False, False, False)


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (40, 2, 3, 3), (6, 6, 1, 1)])  # wide, tall, square
def test_muon_is_torchs(shape):
    """Bit by bit in bf16; in fp32, which torch has not, up to bf16's rounding, and exactly by singular values."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    torchs = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.2)
    for gradient in gradients:
        matrix.grad = gradient.flatten(1)
        torchs.step()
    expected = matrix.detach().view(shape)
    for dtype in (torch.bfloat16, torch.float32):
        kernel = torch.nn.Parameter(start.clone())
        muon = main.Muon([kernel], dtype, 0.2)
        muon.param_groups[0]["lr"] = 0.1
        for kernel.grad in gradients:
            muon.step()
        (momentum,) = [state["momentum_buffer"] for state in muon.state.values()]
        if dtype == torch.bfloat16:
            assert torch.equal(kernel, expected)
        assert (kernel - expected).norm() < 0.03 * (expected - start).norm()
    expected = torch.zeros(shape)
    for gradient in gradients:
        expected = 0.95 * expected + 0.05 * gradient
    torch.testing.assert_close(momentum, expected.flatten(1))

    u, s, v = torch.linalg.svd(gradients[0].flatten(1).double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    found = main.Muon.orthogonal(gradients[0].flatten(1), muon.param_groups[0])
    torch.testing.assert_close(found.double(), u @ s.diag() @ v, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_computes_as_training_does(array, tmp_path, monkeypatch, precision):
    steps = []
    monkeypatch.setattr(main.Muon, "step", lambda self: steps.append(self.dtype))
    here(array, tmp_path, epochs=1, train_sequences=10, precision=precision)
    assert steps == [torch.bfloat16 if precision == "bf16" else torch.float32] * 2


@pytest.mark.parametrize(("overlay", "expected"), [(0, [0, 0, 0, 0]), (1, [1, 1, 1, 0]), (2, [2, 2, 1, 0])])
def test_overlaid_until_all_frames_are_trained_on(array, tmp_path, monkeypatch, overlay, expected):
    """Each sequence is the larger value of itself and of so many others, drawn anew, and some need all of them."""
    batches, fetched, cut, fetch = [], [], main.cut, MovingMNIST.__getitem__
    monkeypatch.setattr(main, "cut", lambda frames, *others: batches.append(frames) or cut(frames, *others))
    keep = lambda data, index: data.split == "train" and len(index) == 5 and fetched.append(index)
    monkeypatch.setattr(MovingMNIST, "__getitem__", lambda data, index: keep(data, index) or fetch(data, index))
    knobs = {"epochs": 1, "train_sequences": 20, "grow_until": 0.7, "overlay": overlay}
    here(array, tmp_path, **knobs)  # progress 1/8, 3/8, 5/8, 7/8, with 1, 1, 3 and 4 forecast frames
    known = MovingMNIST(array, "train")[np.arange(20)]
    made_of = lambda frames, n: any(
        torch.equal(frames, torch.stack(some).amax(0)) for some in itertools.combinations_with_replacement(known, n)
    )
    batches = [batch for batch in batches if len(batch) == 5]  # no dry run on one sequence
    for batch, n in zip(batches, expected, strict=True):
        assert all(made_of(frames, 1 + n) for frames in batch)
        assert n == 0 or not all(made_of(frames, n) for frames in batch)
    fetched = iter(fetched)
    steps = [list(itertools.islice(fetched, 1 + n)) for n in expected]
    for batch, (index, *others) in zip(batches, steps, strict=True):
        assert torch.equal(batch, torch.stack([known[row] for row in (index, *others)]).amax(0))
    assert sorted(np.concatenate([index for index, *_ in steps])) == list(range(20))  # each itself, once
    partners = [tuple(row) for _, *others in steps for row in others]
    assert len(set(partners)) == len(partners) and all(len(set(row)) > 1 for row in partners)


def test_one_optimiser_is_enough(array, tmp_path, monkeypatch):
    alone = lambda model, *_: [torch.optim.AdamW(model.parameters(), amsgrad=True)]
    monkeypatch.setattr(main, "make_optimisers", alone)
    for epochs in (1, 2):
        folder = here(array, tmp_path, epochs=epochs, train_sequences=10, learning_rate=0.01)
    assert (folder / "metrics.json").exists()
    (group,) = torch.load(folder / "last.pt")["optimisers"][0]["param_groups"]
    assert 0 < group["lr"] < 0.01


@pytest.mark.parametrize(
    ("changes", "scored"),
    [
        ({"grow_from": 1}, [(t, 1) for t in range(3, 10)]),
        ({"grow_from": 1, "dense": False}, [(6, 1)]),
        ({"grow_from": 0, "grow_until": 1}, [*((t, 1) for t in range(3, 9)), (8, 2)]),
        ({"grow_from": 0, "grow_until": 1, "dense": False}, [(6, 1), (6, 2)]),
        ({"grow_until": 0}, [(6, 1), (6, 2), (6, 3), (6, 4)]),
        ({"grow_until": 0, "sharpen_from": 0}, [(6, 1), (6, 2), (6, 3), (6, 4)]),  # whatever is minimised
    ],
)
def test_what_a_step_is_scored_on(changes, scored, array, tmp_path):
    """Of each frame: how many input frames it is drawn from, and how far behind the last of them it lies."""
    folder = here(array, tmp_path, epochs=1, train_sequences=5, batch_size=5, reach=0, overlay=0, **changes)
    torch.manual_seed(0)
    model = main.build(parse(main.Knobs, flags(array, tmp_path, reach=0)), 1)
    frames = torch.from_numpy(np.concatenate(split(array, slice(0, 5)), 1)[:, :, None]).float()
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits
    with torch.no_grad():
        losses = [cross_entropy(model(frames[:, :t], lead)[:, -1], frames[:, t + lead - 1]) for t, lead in scored]
    assert log(folder)[-1]["train_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_dissimilarity_is_that_of_scikit_image():
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    truth, forecast = np.random.default_rng(0).random((2, 3, 2, 1, 16, 20))
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0)
    pairs = zip(forecast.reshape(6, 1, 16, 20), truth.reshape(6, 1, 16, 20), strict=True)
    expected = 1 - np.mean([structural_similarity(x, y, **options) for x, y in pairs])
    logits, truth = torch.logit(torch.from_numpy(forecast)).float(), torch.from_numpy(truth).float()
    assert main.dissimilarity(logits, truth).item() == pytest.approx(expected, rel=1e-5)
    few = logits[:1, :1].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: main.dissimilarity(logits, truth[:1, :1].double()), few)


def test_the_loss_sharpens(array, tmp_path, monkeypatch):
    steps, dissimilarity = [], main.dissimilarity
    monkeypatch.setattr(main, "dissimilarity", lambda *pair: steps.append(len(pair[0])) or dissimilarity(*pair))
    weights = set()
    for sharpen_from, expected in (1, []), (0.9, []), (0.7, [5]), (0, [5] * 4):  # progress 1/8, 3/8, 5/8, 7/8
        steps.clear()
        folder = here(array, tmp_path / str(sharpen_from), epochs=1, train_sequences=20, sharpen_from=sharpen_from)
        assert steps == expected
        weights.add(results(folder)["weights"])
    assert len(weights) == 3  # 1 and 0.9 are the same


def test_frames_beyond_those_used_change_nothing(array, tmp_path):
    np.save(tmp_path / "short.npy", np.load(array)[: FRAMES_IN + FRAMES_OUT])
    ends = [here(data, tmp_path / data.stem, epochs=1) for data in (array, tmp_path / "short.npy")]
    weights = [json.loads((folder / "metrics.json").read_text())["weights"] for folder in ends]
    assert weights[0] == weights[1]


def test_schedules():
    knobs = main.Knobs(learning_rate=0.02, warmup=0.1, grow_from=0.2, grow_until=0.7, frames_out=11)
    rates = [main.learning_rate(knobs, p) for p in (0, 0.05, 0.1, 0.325, 0.55, 1)]
    assert rates == pytest.approx([0, 0.01, 0.02, 0.015, 0.01, 0], abs=1e-12)
    assert [main.horizon(knobs, p) for p in (0, 0.2, 0.24, 0.26, 0.46, 0.69, 0.7, 1)] == [1, 1, 1, 2, 6, 10, 11, 11]
    assert main.horizon(dataclasses.replace(knobs, grow_until=0), 0) == 11
    assert main.horizon(dataclasses.replace(knobs, frames_out=1), 0.5) == 1
    assert [main.horizon(dataclasses.replace(knobs, grow_until=0.2), p) for p in (0.1, 0.2)] == [1, 11]  # at once
    assert [main.inputs(knobs, n_future) for n_future in (1, 6, 11)] == [20, 15, 10]
    for change in ({"dense": False}, {"model": "convlstm"}):
        assert main.inputs(dataclasses.replace(knobs, **change), 1) == 10
    assert [main.overlays(main.Knobs(overlay=2), n_future) for n_future in (1, 5, 6, 9, 10)] == [2, 2, 1, 1, 0]
    assert main.overlays(main.Knobs(overlay=2, frames_out=1), 1) == 0
    assert main.overlays(main.Knobs(overlay=0), 1) == 0
    # a frame that is fed back costs 1.3 input frames
    assert main.cost(knobs, 0) == pytest.approx(20 + 1.3)
    assert main.cost(dataclasses.replace(knobs, dense=False), 0) == pytest.approx(10 + 1.3)
    assert main.cost(dataclasses.replace(knobs, feedback=False), 0.5) == 10 + 11


def test_what_is_overlaid_unless_a_knob_says_so():
    moving_mnist, larger = (Sequences(np.zeros((20, 1, 1, size, size), np.uint8)) for size in (64, 96))
    overlay = lambda training, **knobs: main.follow_data(main.Knobs(**knobs), training).overlay
    assert [overlay(moving_mnist, data=data) for data in ("array", "fresh", "recut", "my_videos.npy")] == [2, 2, 2, 0]
    assert overlay(larger) == 0  # someone's own file in the array's place
    assert overlay(moving_mnist, overlay=0) == 0 and overlay(larger, data="my_videos.npy", overlay=3) == 3


def test_help_has_every_knob(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(main.Knobs, ["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{f.name} " in printed for f in dataclasses.fields(main.Knobs))


def test_flags_are_read():
    knobs = parse(main.Knobs, ["--hidden", "4,5", "--dense", "False", "--learning_rate", "0.5", "--data", "x.npy"])
    assert (knobs.hidden, knobs.dense, knobs.learning_rate, knobs.data) == ((4, 5), False, 0.5, "x.npy")
    assert parse(main.Knobs, ["--eval_only"]).eval_only
    assert parse(main.Knobs, []) == main.Knobs()


def test_an_edited_default_may_be_a_whole_number(capsys):
    @dataclasses.dataclass(frozen=True)
    class Edited(main.Knobs):
        max_minutes: float = knob(30, "", 0, 1e6)
        hidden: tuple[int, ...] = knob((64, 64), "", 1, 10**6)

    assert repr(parse(Edited, []).max_minutes) == "30.0"  # as a checkpoint of --max_minutes 30 has it
    assert parse(Edited, ["--max_minutes", "15"]).max_minutes == 15

    @dataclasses.dataclass(frozen=True)
    class WithoutComma(main.Knobs):
        hidden: tuple[int, ...] = knob((64), "", 1, 10**6)

    with pytest.raises(SystemExit):
        parse(WithoutComma, [])
    assert "hidden is 64, which it cannot be" in capsys.readouterr().err


def test_a_column_added_to_the_log_is_written_when_a_run_goes_on(tmp_path):
    journal.write_csv(tmp_path / "log.csv", [{"step": 1}, {"step": 2, "ssim": 0.5}])
    assert (tmp_path / "log.csv").read_text() == "step,ssim\n1,\n2,0.5\n"
