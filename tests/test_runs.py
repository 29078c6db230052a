"""Whole runs: what they leave and print; that kills, processes and neighbors change nothing."""

import csv
import json
import os
import shutil
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
    content,
    finish,
    flags,
    here,
    moving_squares,
    start,
    wait_until,
)
from PIL import Image

import figures
import main
import metrics
from moving_mnist import Sequences
from support import UserError, checkpoint, evaluation

PREDICTIONS = [f"predict_{k}.png" for k in (1, 2, 3, 4, "best", "median", "worst", "last_frame")]
PICTURES = ["loss.png", "per_frame.png", *PREDICTIONS, "predict.gif"]
RESULTS = [*PICTURES, "log.csv", "metrics.json", "forecast.npy"]
FILES = [*RESULTS, "config.json", "last.pt", "best.pt"]
SOURCES = ["main.py", "my_model.py", "motion.py", "convlstm.py", "moving_mnist.py", "metrics.py"]
FEW = {"epochs": 1, "train_sequences": 10, "max_minutes": 0}
WIDE = {"hidden_channels": [32, 32], "patch_size": 2, **FEW}  # dilation, Winograd and the threads take part
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at other processes as Linux has them")


def results(folder):
    return json.loads((folder / "metrics.json").read_text("utf-8"))


def mean(folder, metric="mse_per_frame", who="my_model"):
    return results(folder)["scores"][who][metric]["mean"]


def evaluations(folder):
    """The rows of log.csv that have them."""
    with open(folder / "log.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["val_loss"]]
    return [{name: float(value) for name, value in row.items() if name != "minutes"} for row in rows]


def split(array, sequences):
    """(past, truth) as float64 (B, T, H, W) in [0, 1], straight from the file."""
    frames = np.load(array)[:, sequences].swapaxes(0, 1) / 255
    return frames[:, :FRAMES_IN], frames[:, FRAMES_IN : FRAMES_IN + FRAMES_OUT]


def mse(prediction, truth):
    return np.square(prediction - truth).sum((2, 3)).mean()


def state(folder):
    """Content and time of each file."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def same(folder, reference, files=("log.csv", "metrics.json", "forecast.npy")):
    """The end of the uninterrupted run, bit for bit."""
    for name in ("last.pt", "best.pt"):
        ours, theirs = (checkpoint.load(f / name) for f in (folder, reference))
        for part in ("step", "best", "baselines"):
            assert ours.get(part) == theirs.get(part), part
        logs = [[row | {"minutes": 0} for row in state.get("history", [])] for state in (ours, theirs)]
        assert logs[0] == logs[1]
        for part in ("model", "optimizers"):
            torch.testing.assert_close(ours.get(part), theirs.get(part), rtol=0, atol=0)
    for name in files:
        assert content(folder / name) == content(reference / name), name


# What a run leaves and prints


def test_a_run_leaves_every_file(reference):
    folder, _ = reference
    assert {path.name for path in folder.iterdir()} == {*FILES, ".lock", "source"}
    assert all((folder / name).stat().st_size for name in FILES)
    for name in SOURCES:
        assert (folder / "source" / name).read_bytes() == (ROOT / name).read_bytes()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["asked"]["knobs"]["hidden_channels"] == [8]
    assert (config["torch"], config["device"], config["threads"]) == (torch.__version__, "cpu", 1)
    rows = evaluations(folder)
    assert len(rows) == 10 and (rows[-1]["epoch"], rows[-1]["step"]) == (2, 2 * STEPS)
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
    assert set(found["scores"]["my_model"]) == set(metrics.METRICS)
    for scores in found["scores"].values():
        for name, score in scores.items():
            assert score["unit"] == metrics.METRICS[name][1]
            assert score["mean"] == pytest.approx(np.mean(score["per_frame"]))
    model = main.build(main.parse(flags(array, folder)), 1)  # nothing fast is attached
    best = torch.load(folder / "best.pt")
    model.load_state_dict(best["model"])
    past, truth = split(array, TEST)
    with torch.no_grad():
        logits = model(torch.from_numpy(past[:, :, None]).float(), FRAMES_OUT)[:, :, 0].double().numpy()
    assert mean(folder) == pytest.approx(mse(1 / (1 + np.exp(-logits)), truth), rel=1e-4)
    nats = (np.logaddexp(0, logits) - truth * logits).sum((1, 2, 3)).mean()
    assert mean(folder, "cross_entropy_per_sequence") == pytest.approx(nats, rel=1e-4)
    assert mean(folder, who="black") == pytest.approx(mse(0, truth))
    assert mean(folder, who="copy_last") == pytest.approx(mse(past[:, -1:], truth))
    drawn = 255 / (1 + np.exp(-logits[0]))  # forecast.npy: of the first sequence, to a grey level
    np.testing.assert_allclose(np.load(folder / "forecast.npy")[:, 0], drawn, atol=0.51)
    best_row = min(evaluations(folder), key=lambda row: row["val_mse_per_frame"])
    assert found["step"] == best["step"] == best_row["step"]
    assert found["weights"] == checkpoint.weights_hash(model) and f"weights   {found['weights']}" in printed


def test_the_best_weights_are_scored_and_not_the_last(array, tmp_path):
    """Of a run that learns five sequences by heart."""
    folder = here(array, tmp_path, train_sequences=5, epochs=18, learning_rate=1)
    rows = evaluations(folder)
    best = min(rows, key=lambda row: row["val_mse_per_frame"])
    assert results(folder)["step"] == best["step"] < rows[-1]["step"]
    assert mean(here(array, tmp_path, eval_only=True, weights=folder / "last.pt")) != mean(folder)


def test_first_lines_say_what_runs(reference):
    first, parameters = reference[1].split("epoch")[0], results(reference[0])["parameters"]
    data = "squares.npy: 46 training, 5 validation, 6 test"
    device = "fp32", "threads: 1, processes: 1", f"torch {torch.__version__}"
    for fact in (
        f"my_model, {parameters:,} parameters",
        *device,
        data,
        "16×16, grey, values 0 to 255",
        "last frame copied",
    ):
        assert fact in first


def test_baselines_stand_beside_every_epoch(array, tmp_path, monkeypatch):
    drawn, loss = [], figures.loss
    monkeypatch.setattr(figures, "loss", lambda *given: drawn.append(given) or loss(*given))
    folder = here(array, tmp_path, pictures=True, epochs=1, train_sequences=5)
    past, truth = split(array, VALIDATION)
    flow = metrics.optical_flow(torch.from_numpy(past[:, :, None]).float(), FRAMES_OUT)[:, :, 0].numpy()
    expected = {"black": 0, "copy_last": past[:, -1:], "optical_flow": flow}
    expected = {who: mse(prediction, truth) for who, prediction in expected.items()}
    assert drawn and all(means == pytest.approx(expected) for _, means, _, _ in drawn)
    curves = checkpoint.load(folder / "last.pt")["baselines"]
    assert {who: np.mean(curve) for who, curve in curves.items()} == pytest.approx(expected)


def test_the_best_the_median_and_the_worst_are_drawn(tmp_path, monkeypatch):
    """Of sequences of one grey level each, which a black forecast misses by that level."""
    levels = torch.tensor([90, 200, 10, 160, 40], dtype=torch.uint8)
    dataset, titles, grids = levels[:, None, None, None, None].expand(5, 3, 1, 16, 16), {}, []
    black = lambda past, n: (metrics.black(past, n), torch.zeros(len(past), n, *past.shape[2:]))
    task = evaluation.Task(black, 2, 1, torch.device("cpu"))
    _, ranking = evaluation.score("a", task, Sequences(dataset.swapaxes(0, 1).numpy()))
    keep = lambda past, truth, forecast, title: titles.update({int(truth.max() * 255): title}) or b""
    monkeypatch.setattr(figures, "prediction", keep)
    monkeypatch.setattr(figures, "grid", lambda rows, title: grids.append(rows) or b"")
    evaluation.draw_ranked(tmp_path, task, dataset, ranking, "of a")
    error = lambda level: f"MSE {256 * (level / 255) ** 2:.0f}"
    ranks = ("best", 10), ("median", 90), ("worst", 200)
    assert titles == {level: f"of a: the {name} of 5 sequences, {error(level)}" for name, level in ranks}
    (numbers, truth), (errors, last) = grids[0].values()
    assert numbers == [f"sequence {n}" for n in (3, 5, 1, 4, 2)]
    assert errors == [error(level) for level in (10, 40, 90, 160, 200)]
    assert (truth[:, 0, 0, 0] * 255).round().tolist() == [10, 40, 90, 160, 200] and not last.any()


# Stopped, killed, ended


@pytest.mark.parametrize("model", ["my_model", "paper", "convlstm", "seq2seq"])
def test_others_go_on_as_exactly(model, array, tmp_path, monkeypatch):
    """The references, and a network with dropout. Stopped after its first checkpoint, as by a crash."""
    if model == "my_model":
        build = main.build

        def with_dropout(*arguments):
            network = build(*arguments)
            network.head.insert(1, torch.nn.Dropout())
            return network

        monkeypatch.setattr(main, "build", with_dropout)
    alone = here(array, tmp_path / "alone", model=model, **FEW)
    assert alone == tmp_path / "alone" / model
    assert set(results(alone)["scores"][model]) == set(metrics.METRICS)

    class Crash(Exception):
        pass

    def crash(path, state, save=checkpoint.save):
        save(path, state)
        if path.name == "last.pt":
            raise Crash

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(checkpoint, "save", crash)
        here(array, tmp_path, model=model, **FEW)
    assert checkpoint.load(tmp_path / model / "last.pt")["step"] == 1
    same(here(array, tmp_path, model=model, **FEW), alone)


def kill(kills, data, out, **changes):
    """How many runs were at work when tests/killer.py killed them, before the one that ended as if alone."""
    environment = {**ENVIRONMENT, "OMP_WAIT_POLICY": "passive"}  # two threads that spin disturb others' tests
    command = [sys.executable, ROOT / "tests" / "killer.py", kills, data, *flags(data, out, **changes)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    same(out / "my_model", out / "alone" / "my_model", RESULTS)
    config = json.loads((out / "my_model" / "config.json").read_text("utf-8"))
    assert config["threads"] == 2 and not list(out.rglob("*.tmp"))
    return int(ran.stdout)


@linux
@pytest.mark.parametrize(
    ("data", "kills", "changes"),
    [("array", 12, WIDE), ("array", 4, {**WIDE, "precision": "bf16"}), ("fresh", 4, FEW)],
)
def test_killed_at_random_moments(data, kills, changes, array, tmp_path):
    """In a step, a checkpoint, an evaluation or a picture: the same command ends as if nothing had been."""
    assert kill(str(kills), data if data == "fresh" else str(array), tmp_path, **changes) >= kills - 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
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


def test_resuming_elsewhere_says_that_it_is_not_exact(reference, array, tmp_path, capsys):
    folder = shutil.copytree(reference[0], tmp_path / "my_model")
    state = checkpoint.load(folder / "last.pt")
    checkpoint.save(folder / "last.pt", {**state, "step": 2 * STEPS - 1})
    here(array, tmp_path, fast=False)
    printed = capsys.readouterr().out
    assert "resuming with kernels plain PyTorch" in printed and "no longer bit-exact" in printed
    assert f"resuming at step {2 * STEPS - 1}" in printed


def test_lost_files_of_a_run_that_has_ended_come_back(reference, array, tmp_path):
    folder = shutil.copytree(reference[0], tmp_path / "my_model")
    for lost in ("log.csv",), ("loss.png",), RESULTS:  # the first two without an evaluation
        for name in lost:
            (folder / name).unlink()
        before = state(folder)
        assert here(array, tmp_path, pictures=True) == folder
        same(folder, reference[0], lost)
        assert len(lost) > 1 or state(folder)["metrics.json"] == before["metrics.json"]


def test_minutes_instead_of_epochs(tmp_path):
    np.save(tmp_path / "long.npy", moving_squares(1000))
    folder = here(tmp_path / "long.npy", tmp_path, max_minutes=0.05)  # 3 seconds
    last = checkpoint.load(folder / "last.pt")
    assert last["step"] == last["steps"] > 13
    assert 1 < last["seconds"] < 9  # the pace is guessed from ten steps, and other work disturbs it
    assert evaluations(folder)[-1]["learning_rate"] < 0.1 * main.Knobs.learning_rate
    assert results(here(tmp_path / "long.npy", tmp_path, max_minutes=1e-6))["scores"]  # ends, too


# Processes

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


SHORT = {"epochs": 1, "train_sequences": 20}


@pytest.fixture(scope="module")
def of_two_processes(array, tmp_path_factory):
    """(folder, stdout) of the uninterrupted run, shared by two. Read only."""
    out = tmp_path_factory.mktemp("two")
    printed, _ = finish(start(*flags(array, out, **SHORT), launcher=(*TORCHRUN, *ABORTS_AT_SHUTDOWN)))
    return out / "my_model", printed


def test_processes_share_the_batch(array, tmp_path, of_two_processes):
    """Parts of 3 and 2, with the same sequences merged into them."""
    (folder, printed), alone = of_two_processes, here(array, tmp_path, pictures=True, **SHORT)
    assert printed.count("processes: 2") == 1
    assert {p.name for p in folder.iterdir()} == {p.name for p in alone.iterdir()}
    ours, theirs = (torch.load(f / "last.pt") for f in (folder, alone))
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=2e-6)  # the rounding of sums
    for mine, other in zip(evaluations(folder), evaluations(alone), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    for name in metrics.METRICS:
        assert mean(folder, name) == pytest.approx(mean(alone, name), rel=1e-3)


def children(number):
    files = Path("/proc").glob(f"{number}/task/*/children")
    return [int(n) for path in files for n in path.read_text().split()]


def kill_with_children(number):
    for child in children(number):
        kill_with_children(child)
    os.kill(number, signal.SIGKILL)


@linux
def test_killed_with_two_processes(of_two_processes, array, tmp_path):
    command, last = flags(array, tmp_path, **SHORT), tmp_path / "my_model" / "last.pt"
    for wanted in (1, 2):
        process = start(*command, launcher=TORCHRUN)
        wait_until(lambda n=wanted: last.exists() and checkpoint.load(last)["step"] >= n, process)
        if wanted == 1:  # one of them alone: the other may not wait for it
            workers = children(process.pid)
            os.kill(workers[1], signal.SIGKILL)
            process.communicate(timeout=20)
            assert process.returncode > 0 and not any(Path(f"/proc/{worker}").exists() for worker in workers)
        else:
            kill_with_children(process.pid)
            process.communicate()
    finish(start(*command, launcher=TORCHRUN))
    same(tmp_path / "my_model", of_two_processes[0])


@linux
def test_two_machines(array, tmp_path):
    """The README's command, a machine on each of two addresses. Only the first has the file of weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    rendezvous += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    launcher = lambda k: (*rendezvous, f"--local_addr=127.0.0.{k}")
    machines = [start(*flags(array, tmp_path / k, **FEW), launcher=launcher(k)) for k in "12"]
    speaks = ["processes: 2" in finish(machine)[0] for machine in machines]
    assert sorted(speaks) == [False, True]
    assert [(tmp_path / k).exists() for k in "12"] == speaks  # the other writes nothing
    assert [(tmp_path / k / "my_model" / "metrics.json").exists() for k in "12"] == speaks
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for eval_only, words in (False, "this run has ended"), (True, "weights of "):
        more, ranks = {**FEW, "eval_only": eval_only}, "01" if speaks[0] else "10"
        if eval_only:
            more["weights"] = tmp_path / "12"[speaks.index(True)] / "my_model" / "best.pt"
        pairs = zip("12", ranks, strict=True)
        again = [start(*flags(array, tmp_path / k, **more), RANK=rank, **world) for k, rank in pairs]
        assert words in "".join([finish(machine)[0] for machine in again])  # the other has to be told


# Weights that are given


def test_weights_bring_their_network_along(array, tmp_path, capsys):
    network = {"hidden_channels": [6, 4], "head_channels": [], "max_motion": 0, "equivariant": False}
    trained = here(array, tmp_path, epochs=1, **network)
    brought = {"hidden_channels": main.Knobs.hidden_channels, "head_channels": main.Knobs.head_channels}
    halves = torch.load(trained / "best.pt")
    halves["model"] = {name: weight.half() for name, weight in halves["model"].items()}
    given = tmp_path / "small.pt"
    checkpoint.save(given, halves)
    before = state(trained)
    folder = here(array, tmp_path, weights=given, eval_only=True, pictures=True, **brought)
    assert folder == tmp_path / "small-eval" and "weights of" in capsys.readouterr().out
    assert (folder / "predict_worst.png").exists() and not (folder / "last.pt").exists()
    assert mean(folder) == pytest.approx(mean(trained), rel=1e-3) and mean(folder) != mean(trained)
    assert "| small-eval |" in (tmp_path / "compare.md").read_text("utf-8")
    assert here(array, tmp_path, weights=given, eval_only=True, **brought) == folder
    with pytest.raises(
        UserError, match=r"has hidden_channels \(6, 4\), not \(8,\); leave out --hidden_channels"
    ):
        here(array, tmp_path, weights=given)
    scores = state(folder)
    tuned = here(array, tmp_path, weights=given, learning_rate=1e-9, epochs=1, **brought)
    assert tuned == tmp_path / "my_model-2" and state(folder) == scores and state(trained) == before
    found, expected = (evaluations(f)[-1]["val_mse_per_frame"] for f in (tuned, trained))
    assert found == pytest.approx(expected, rel=1e-3)


def test_evaluation_alone(reference, array, tmp_path):
    """With the network and the frames of the weights, in a folder of its own. It trains nothing."""
    folder = shutil.copytree(reference[0], tmp_path / "my_model")
    before = state(folder)
    words = ["--eval_only", "--weights", str(folder / "best.pt")]
    words += ["--data", str(array), "--out", str(tmp_path)]
    for _ in range(2):  # the second time into the same folder
        main.main(main.parse([*words, "--device", "cpu", "--precision", "fp32"]))
        again = tmp_path / "my_model-eval"
        assert results(again) == results(folder) and state(folder) == before
    made = {path.name for path in again.iterdir()}
    assert {*PREDICTIONS, "predict.gif", "per_frame.png"} <= made and not {"last.pt", "loss.png"} & made
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["my_model", "my_model-eval"]


def test_scores_of_a_training_are_not_replaced_by_others(reference, array, tmp_path):
    folder = shutil.copytree(reference[0], tmp_path / "my_model")
    before, scores = state(folder), results(folder)
    np.save(tmp_path / "other.npy", moving_squares(57, seed=1))
    evaluate = lambda file="best.pt", data=array, **changes: here(
        data, tmp_path, weights=folder / file, eval_only=True, **changes
    )
    others = evaluate(frames_out=3), evaluate("last.pt"), evaluate(data=tmp_path / "other.npy")
    assert [path.name for path in others] == ["my_model-eval", "my_model-eval-2", "my_model-eval-3"]
    assert state(folder) == before
    assert results(others[0])["frames_out"] == 3
    assert mean(others[2]) != mean(folder)
    again = evaluate()
    assert again.name == "my_model-eval-4" and results(again) == scores and state(folder) == before
    assert (evaluate().name, evaluate(name="mine").name) == ("my_model-eval-4", "mine")
