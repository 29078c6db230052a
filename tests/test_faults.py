"""Faults, each on purpose: a clear sentence, a non-zero status, no traceback, and nothing lost."""

import ast
import dataclasses
import hashlib
import math
import random
import re
import shutil
import signal
from contextlib import suppress
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    STEPS,
    Malice,
    clone,
    content,
    finish,
    flags,
    here,
    largest_file,
    moving_squares,
    start,
    state,
    stopped_after_a_checkpoint,
    wait_until,
)

import main
import metrics
import moving_mnist
from support import UserError, checkpoint, download, folders, prepare, progress

FEW = {"epochs": 1, "train_sequences": 10, "fast": False}  # two steps; after each, last.pt is saved
MORE = {"train_sequences": 20, "fast": False}  # eight of them


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_minutes": "nan"}, "max_minutes is nan; it must be at least 0"),
        ({"hidden_channels": [8, 0]}, r"hidden_channels is \(8, 0\); expected numbers of channels"),
        ({"grow_horizon": [0.9, 0.1]}, "grow_horizon is 0.9 0.1; expected"),
        ({"name": "../elsewhere"}, r"name is \.\./elsewhere; it must be"),
        ({"weights": "nowhere.pt"}, r"cannot read nowhere\.pt: No such file"),
        ({"max_motion": 2, "model": "convlstm"}, "convlstm does not use max_motion; leave it out"),
        ({"weight_decay": 0.1, "model": "plain"}, "plain does not use weight_decay; leave it out"),
        ({"frames_in": 18}, r"too few frames: expected .* three of 22 .*; found none so long"),
        ({"batch_size": 18}, "batch_size is 18, for 17 training sequences"),
    ],
    ids=str,
)
def test_a_knob_that_cannot_be(changes, sentence, array, tmp_path):
    with pytest.raises(UserError, match=sentence):
        here(**{"data": array, "out": tmp_path / "out", "epochs": 1, "fast": False} | changes)
    assert not (tmp_path / "out").exists()


def test_a_knob_of_a_wrong_type_in_main(tmp_path, monkeypatch):
    """Flags are checked by tyro, an edit of main.py is not. A forgotten comma is the likely one."""
    with pytest.raises(UserError, match=r"hidden_channels is 48; expected .* as in \(96, 96\)"):
        main.main(dataclasses.replace(main.Knobs(), hidden_channels=48, out=str(tmp_path / "out")))


def test_a_metric_of_another_shape_is_refused_before_training(array, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "mae_per_frame", lambda x, y: (x - y).abs().sum((2, 3, 4)).mean(0, True))
    with pytest.raises(UserError, match=r"mae_per_frame gives values of shape \(1, 4\); expected \(5, 4\)"):
        here(array, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def folder_of(**changes):
    """The folder that a run would have. It does not train."""
    knobs = main.parse(flags(**changes))
    with folders.run_folder(prepare.prepare(knobs, main.build)) as folder:
        return folder


def test_data_replaced_by_other_of_its_shape_is_another_run(tmp_path, capsys):
    knobs = {"data": tmp_path / "mine.npy", "out": tmp_path / "out", **FEW}
    first = moving_squares(57)
    np.save(knobs["data"], first)
    folder = folder_of(**knobs)
    before = state(folder)
    # training and the first to be validated stay
    longer = np.concatenate((first, moving_squares(1, seed=1)), 1)
    middle = first.copy()
    middle[:, 5] //= 2
    for other, number in (moving_squares(57, seed=1), "-2"), (longer, "-3"), (middle, "-4"):
        np.save(knobs["data"], other)
        assert folder_of(**knobs) == folder.with_name(f"my_model{number}")
        assert "other data\n" in capsys.readouterr().out
    for fewer in {"train_sequences": 8}, {"frames_in": 2}:  # of the same data
        folder_of(**{**knobs, **fewer})
        assert "other data" not in capsys.readouterr().out
    assert state(folder) == before


@pytest.fixture(scope="module")
def begun(array, tmp_path_factory):
    """Knobs of a run of two steps, and its folder as an interrupt after the first left it. Read only."""
    knobs = {"data": array, "out": tmp_path_factory.mktemp("begun"), **FEW}
    with stopped_after_a_checkpoint():
        here(**knobs)
    return knobs, knobs["out"] / "my_model"


@pytest.fixture(scope="module")
def ended(begun, tmp_path_factory):
    """The same after its end. Read only."""
    knobs, _ = copy(begun, tmp_path_factory.mktemp("ended"))
    return knobs, here(**knobs)


def copy(run, out):
    """(knobs, path of last.pt) of a copy of the run, to be damaged."""
    knobs, folder = run
    shutil.copytree(folder, out / "my_model")
    return knobs | {"out": out}, out / "my_model" / "last.pt"


def sign(content):
    """The content of a zip archive, as checkpoint.save would leave it."""
    checksum = hashlib.sha256(content).hexdigest().encode()
    return content[:-2] + bytes([len(checksum), 0]) + checksum


def test_a_damaged_checkpoint_stops_the_run_and_stays(begun, ended, tmp_path):
    knobs, last = copy(begun, tmp_path)
    whole = last.read_bytes()
    for damaged in b"", whole[: len(whole) // 2]:
        last.write_bytes(damaged)
        before = {path: path.read_bytes() for path in last.parent.glob("*.*")}
        with pytest.raises(UserError, match=r"last\.pt is damaged, .*; delete it to start over"):
            here(**knobs)
        assert {path: path.read_bytes() for path in before} == before
    last.replace(stray := last.with_name("last.pt.12345.half"))  # what the message advises; a stray file
    here(**knobs)
    assert last.with_name("metrics.json").read_bytes() == (ended[1] / "metrics.json").read_bytes()
    assert not stray.exists()


def test_any_flipped_bit_is_found_or_does_no_harm(tmp_path):
    path, rng = tmp_path / "x.pt", random.Random(0)
    state = {"knobs": {"epochs": 1}, "step": 3, "model": {"weight": torch.arange(9.0)}}
    checkpoint.save(path, state)
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")  # names, sizes and checksums: what misleads a reader most
    places = [*range(directory, len(content)), *(rng.randrange(len(content)) for _ in range(100))]
    harmless = 0
    for byte in places:
        flipped = bytes([content[byte] ^ 1 << rng.randrange(8)])
        path.write_bytes(content[:byte] + flipped + content[byte + 1 :])
        with suppress(UserError):
            torch.testing.assert_close(checkpoint.load(path), state, rtol=0, atol=0)
            harmless += 1
    assert harmless < 10


@pytest.mark.parametrize("sealed", [bytes, sign])
def test_a_malicious_checkpoint_runs_nothing(sealed, begun, tmp_path):
    knobs, last = copy(begun, tmp_path)
    torch.save({"knobs": {}, "step": 1, "model": Malice(tmp_path / "run")}, last)
    last.write_bytes(sealed(last.read_bytes()))
    sentence = "not loaded" if sealed is sign else "damaged"
    for load in (lambda: here(**knobs), lambda: here(**knobs, weights=last), lambda: main.load(last)):
        with pytest.raises(UserError, match=sentence):
            load()
    assert not (tmp_path / "run").exists()


def test_a_notebook_that_was_interrupted_starts_again(array, tmp_path, monkeypatch):
    """A notebook keeps the traceback, and with it all that was in use."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:
        patch.setattr(main, "load_batch", mock.Mock(side_effect=KeyboardInterrupt))
        here(array, tmp_path, **FEW)
    assert here(array, tmp_path, **FEW) == tmp_path / "my_model"
    del kept


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(begun, ended, tmp_path, monkeypatch):
    """As good as: no file may be as large as last.pt."""
    knobs, last = copy(begun, tmp_path)
    before, room, train = last.read_bytes(), last.stat().st_size - 1, main.train

    def full(*arguments):
        with largest_file(room):
            train(*arguments)

    sentence = r"cannot write .*last\.pt: File too large.* nothing was overwritten"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=sentence):
        patch.setattr(main, "train", full)
        here(**knobs)
    assert last.read_bytes() == before and not list(last.parent.glob("*.half"))
    here(**knobs)
    assert last.with_name("metrics.json").read_bytes() == (ended[1] / "metrics.json").read_bytes()


@pytest.mark.parametrize("what", ["loss nan", "gradient norm nan"])
def test_training_stops_before_a_step_that_would_spoil_the_weights(what, array, tmp_path, monkeypatch):
    calls, models, train = iter(range(10**6)), [], main.train
    really = torch.nn.functional.binary_cross_entropy_with_logits

    def bad_after_an_epoch(logits, truth, reduction):
        if logits.requires_grad and next(calls) >= STEPS:
            if what == "loss nan":
                return really(logits * math.nan, truth, reduction=reduction)
            logits.register_hook(lambda gradient: gradient * math.inf)
        return really(logits, truth, reduction=reduction)

    noting = lambda setup, *given: models.append(setup.model) or train(setup, *given)
    monkeypatch.setattr(main, "train", noting)
    with monkeypatch.context() as patch:
        patch.setattr(main.F, "binary_cross_entropy_with_logits", bad_after_an_epoch)
        place = rf"{what}.* epoch 2, step {STEPS + 1}, .*learning rate 0\.\d+ \(last logged loss: 0\.\d+\)"
        with pytest.raises(UserError, match=place):
            here(array, tmp_path, fast=False)
    last = tmp_path / "my_model" / "last.pt"
    state = checkpoint.load(last)
    assert state["step"] == len(state["progress"]["history"]) == STEPS
    torch.testing.assert_close(state["model"], dict(models[0].state_dict()), rtol=0, atol=0)
    log = last.with_name("log.csv").read_text("utf-8")
    assert log.count("\n") == STEPS + 1 and not re.search("nan|inf", log)
    here(array, tmp_path, weights=last, learning_rate=0.01, **FEW)  # what the message advises


def test_weights_that_a_step_spoils_are_not_saved(array, tmp_path, monkeypatch):
    """The loss of the only step is finite, and nothing after it."""
    spoil = lambda muon: muon.param_groups[0]["params"][0].data.fill_(math.inf)
    monkeypatch.setattr(main.Muon, "step", spoil)
    with pytest.raises(UserError, match=r"(not finite|NaN or infinite).* in epoch 1, step 1, "):
        here(array, tmp_path, **FEW)
    monkeypatch.setattr(progress.Progress, "save_due", lambda progress: True)
    monkeypatch.setattr(progress.Progress, "evaluation_due", lambda progress: False)
    with pytest.raises(UserError, match="weights are not finite, and were not saved"):
        here(array, tmp_path, **FEW)
    assert not list(tmp_path.glob("my_model/*.pt")) and not list(tmp_path.glob("my_model/log.csv"))


def test_a_bug_in_an_edited_cell_is_no_sentence(array, tmp_path):
    folder = clone(tmp_path, my_model=[("i, f, o, g = z", "i, f, o = z")])
    process = start(*flags(array, tmp_path / "out", **FEW), script=folder / "main.py")
    _, err = process.communicate()
    assert process.returncode == 1 and "main.py: " not in err
    assert err.startswith("Traceback") and "i, f, o = " in err
    assert err.strip().endswith("ValueError: too many values to unpack (expected 3)")


@pytest.fixture(scope="module")
def whole(array, tmp_path_factory):
    """The folder of eight steps without a fault. Read only."""
    return here(array, tmp_path_factory.mktemp("whole"), **MORE)


def goes_on(array, out, whole, capsys, step=r"\d"):
    """The same command goes on, and ends as if nothing had been."""
    folder = here(array, out, **MORE)
    printed = capsys.readouterr().out
    assert re.search(f"resuming at step {step}\n", printed) and "bit-exact" not in printed
    for name in ("metrics.json", "log.csv"):
        assert content(folder / name) == content(whole / name)


def test_memory_that_runs_out_in_the_third_step(whole, array, tmp_path, capsys):
    """As the optimizer steps, on a CPU a RuntimeError."""
    code = "import torch; left, step = iter([1, 1, 0]), torch.optim.AdamW.step; "
    code += "torch.optim.AdamW.step = lambda *a: step(*a) if next(left) else torch.empty(2**60)"
    _, err = finish(start(*flags(array, tmp_path, **MORE), code=code, pictures=False), 1)
    assert "main.py: out of memory; lower batch_size, hidden_channels, frames_out" in err
    goes_on(array, tmp_path, whole, capsys, step=2)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_how_to_go_on(number, status, whole, array, tmp_path, capsys):
    out = tmp_path / "a folder"
    slow = "import figures, time; figures.loss = lambda *_: time.sleep(0.3) or b''"  # after each step
    process = start(*flags(array, out, **MORE), code=slow, pictures=False)
    wait_until((out / "my_model" / "last.pt").exists, process)
    process.send_signal(number)
    _, err = finish(process, status)
    assert err.endswith("\nstopped; run the same command again to continue\n")
    goes_on(array, out, whole, capsys)


def test_no_source_loads_a_pickle_or_uses_the_network():
    """Nor evaluates text; support/download.py alone has an address to ask."""
    elsewhere = {"tests", "results", "site-packages"}
    paths = {path for path in ROOT.rglob("*.py") if not elsewhere & {*path.relative_to(ROOT).parts}}
    downloads = ROOT / "support" / "download.py"
    assert {downloads, ROOT / "support" / "fast" / "build.py"} < paths
    pickles = {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    network = {"urllib", "http", "socket", "requests", "ftplib", "ssl", "pooch"}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            text = ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call)) else ""
            words = set() if isinstance(node, ast.Call) else {*re.findall(r"\w+", text)}
            assert not words & pickles and (path == downloads or not words & network), path
            assert not text.startswith(("eval(", "exec(", "torch.hub.load(")), path
            assert "allow_pickle=" not in text.replace("allow_pickle=False", ""), path
            assert "torch.load(" not in text or "weights_only=True" in text, path


def test_without_internet_a_run_goes_on_with_the_committed_digits(tmp_path, monkeypatch, capsys):
    for module in (download, moving_mnist):
        monkeypatch.setattr(module, "RAW", tmp_path)
    monkeypatch.setattr(moving_mnist, "N_SEQUENCES", 40)
    for name in ("digits_train.png", "digits_test.png"):
        shutil.copy(ROOT / "raw" / name, tmp_path)
    load = lambda kind: moving_mnist.moving_mnist_data(kind, 0, 0)
    for name in ("ARRAY", "DIGITS"):
        file = getattr(download, name)._replace(urls=("http://127.0.0.1:1/x.gz",))
        monkeypatch.setattr(moving_mnist, name, file)
    *splits, name, _ = load("array")
    assert (*map(len, splits), name) == (32, 4, 4, "stand-in array")
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert "(819,200,080 bytes) from" in first and "refused" in first
    assert str(tmp_path / "mnist_test_seq.npy") in first and "a stand-in array" in second
    with monkeypatch.context() as patch:  # the next run asks nobody
        patch.setattr(moving_mnist, "fetch", lambda *_: pytest.fail("the network was asked"))
        assert load("array").name == "stand-in array"
        (tmp_path / "mnist_test_seq.npy").touch()
        assert load("stand_in").name == "stand-in array"  # whatever else is in raw/
        (tmp_path / "mnist_test_seq.npy").unlink()
    training, _, test, name, _ = load("fresh")
    assert (len(training), test.split) == (40, "test")
    assert name == "stand-in array, trained on fresh sequences of 9,167 digits"
