"""Faults, each on purpose: a clear sentence, a non-zero status, no traceback, and nothing lost.

What needs no process of its own is asked of the functions; the last part ends real processes.
"""

import ast
import dataclasses
import errno
import hashlib
import io
import math
import os
import pickle
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import zipfile
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import pytest
import torch
from conftest import (
    ABORTS_AT_SHUTDOWN,
    ENVIRONMENT,
    ROOT,
    STEPS,
    finish,
    flags,
    here,
    largest_file,
    mounted,
    moving_squares,
    start,
)
from conftest import wait_until as wait
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import download
import journal
import machine
import main
from knobs import parse
from machine import DeviceError, choose_device
from moving_mnist import DataError, MovingMNIST
from my_model import ConvLSTMCell

# Knobs


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--epoch", "2", "unrecognized arguments"),  # no abbreviations: a typing error is not a knob
        ("--epochs", "two", "invalid int value: 'two'"),
        ("--epochs", "1.5", "invalid int value"),
        ("--epochs", "-1", "epochs is -1; it must be from 1 to"),
        ("--batch_size", "0", "batch_size is 0; it must be at least 1"),
        ("--peephole", "perhaps", "'perhaps'"),
        ("--hidden", "8,x", "8,x"),
        ("--hidden", "8,0", "hidden is (8, 0); it must be from 1 to"),
        ("--hidden", f"8,{10**19}", "it must be from 1 to 1000000"),  # beyond: torch's and numpy's own tracebacks
        ("--kernel_size", "1000000001", "it must be from 1 to 255"),
        ("--state_kernel_size", str(10**19 + 1), "it must be from 0 to 255"),
        ("--head", str(10**19), "it must be from 0 to"),
        ("--patch", str(10**19), "it must be from 1 to"),
        ("--epochs", str(10**30), "it must be from 1 to"),
        ("--train_sequences", str(10**30), "it must be from 0 to"),
        ("--learning_rate", "1e308", "it must be from 1e-09 to 1e+37"),
        ("--clip", "1e308", "it must be from 1e-09 to 1e+37"),
        ("--learning_rate", "nan", "learning_rate is nan"),
        ("--learning_rate", "-1", "learning_rate is -1.0"),
        ("--max_minutes", "nan", "max_minutes is nan"),
        ("--max_minutes", "inf", "max_minutes is inf"),
        ("--save_minutes", "nan", "save_minutes is nan"),
        ("--warmup", "2", "warmup is 2.0"),
        ("--frames_in", "1", "frames_in is 1"),  # the baseline by optical flow needs two
        ("--seed", "-1", "seed is -1"),
        ("--seed", str(2**70), "seed is"),
        ("--model", "lstm", "'lstm' (choose from"),
        ("--device", "tpu", "'tpu' (choose from"),
    ],
)
def test_a_knob_that_means_nothing(flag, value, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(main.Knobs, [flag, value])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kernel_size": 4}, "kernel size 4 is even"),
        ({"state_kernel_size": 2}, "kernel size 2 is even"),
        ({"model": "convlstm", "kernel_size": 4}, "kernel size 4 .*odd"),
        ({"patch": 5}, "16×16 cannot be cut into patches of 5"),
        ({"model": "convlstm", "patch": 5}, "16.* 5"),
        ({"frames_in": 18}, "20 frames a sequence, too few for frames_in 18 and frames_out 4"),
        ({"batch_size": 47}, r"batch_size is 47; .*46 \(training sequences\)"),
        ({"train_sequences": 4}, r"batch_size is 5; .*4 \(training sequences\)"),
    ],
)
def test_a_knob_that_does_not_fit(changes, sentence, array, tmp_path):
    with pytest.raises(DataError, match=sentence):
        here(array, tmp_path, epochs=1, **changes)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("machine.LOCAL_RANK", 2)
    with pytest.raises(DeviceError, match=r"process 3 of this machine finds 2 GPUs; .*--nproc_per_node=2"):
        choose_device("auto", "auto")


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        ("CUDA error: no kernel image is available\nmore", DeviceError, "GPU: .* image is available; install a torch"),
        ("", DeviceError, "GPU: ; install a torch"),
        ("CUDA error: out of memory", RuntimeError, "^CUDA error: out of memory$"),  # of which main.py makes a sentence
    ],
)
def test_a_gpu_that_cannot_be_used(error, kind, sentence, monkeypatch):
    def zeros(*shape, device):
        raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(kind, match=sentence):
        choose_device("auto", "auto")


# Data


def good(path):
    np.save(path, moving_squares(57))


def shorter(path):
    good(path)
    path.write_bytes(path.read_bytes()[:-1])


def longer(path):
    good(path)
    path.write_bytes(path.read_bytes() + b"x")


def flipped_header(path):
    good(path)
    path.write_bytes(path.read_bytes().replace(b"'descr'", b"'descx'", 1))


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


ARRAYS = {
    "No such file": lambda path: None,
    "holds no video": lambda path: path.mkdir(),
    "is not a .npy array": lambda path: path.write_text("<html>404</html>"),
    r"is not a \.npy array": flipped_header,
    "holds float64; expected uint8": lambda path: np.save(path, moving_squares(57) / 255),
    r"has shape \(20, 57, 256\); expected": lambda path: np.save(path, moving_squares(57).reshape(20, 57, 256)),
    "is in Fortran order": lambda path: np.save(path, np.asfortranarray(moving_squares(57))),
    "bytes; its header says .* damaged": shorter,
    "bytes; its header says .*: it is damaged": longer,
    "holds pickled objects": lambda path: np.save(path, np.array([Malice(path.with_name("run"))], object)),
    "sequences, too few for a validation split": lambda path: np.save(path, moving_squares(2)),
    "16.*11|11.*window": lambda path: np.save(path, moving_squares(57)[:, :, :8, :8].copy()),  # SSIM's window
}


@pytest.mark.parametrize("sentence", ARRAYS)
def test_an_array_that_cannot_be_used(sentence, tmp_path):
    path = tmp_path / "own.npy"
    ARRAYS[sentence](path)
    with pytest.raises(DataError, match=sentence):
        here(path, tmp_path / "out", epochs=1)
    assert not (tmp_path / "run").exists()


@contextmanager
def bound_by_permissions():
    """Root is not: as nobody."""
    me = os.geteuid()
    os.seteuid(me or 65534)
    try:
        yield
    finally:
        os.seteuid(me)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs the permissions of a POSIX system")
@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("closed", "cannot read closed: Permission denied"),
        ("closed/own.npy", "cannot read closed/own.npy: Permission denied"),
        ("list_only", "cannot read list_only: Permission denied|list_only holds no video"),
        ("array", "cannot write in raw: Permission denied"),
        (f"{'x' * 300}.npy", "cannot read x*.npy: File name too long"),
        ("\udcff.npy", r"udcff\.npy' is a name with characters that cannot be printed; rename"),
    ],
)
def test_data_that_may_not_be_read(data, sentence, tmp_path, monkeypatch):
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for name, mode in ("closed", 0), ("raw", 0), ("list_only", 0o744):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.avi").touch()
        (tmp_path / name).chmod(mode)
    with bound_by_permissions(), pytest.raises((DataError, download.DownloadError), match=sentence):
        main.load_data(main.Knobs(data=data))


# Checkpoints and the results folder


@pytest.fixture(scope="module")
def small(array, tmp_path_factory):
    """Keyword arguments of a finished run of two steps, and its folder. Read only."""
    knobs = {"data": array, "out": tmp_path_factory.mktemp("small"), "epochs": 1, "train_sequences": 10}
    return knobs, here(**knobs)


def copy(small, tmp_path):
    """The same, with last.pt alone, to be damaged."""
    knobs, folder = small
    (tmp_path / "my_model").mkdir()
    last = tmp_path / "my_model" / "last.pt"
    last.write_bytes((folder / "last.pt").read_bytes())
    return knobs | {"out": tmp_path}, last


def flip(content, byte, bit):
    return content[:byte] + bytes([content[byte] ^ 1 << bit]) + content[byte + 1 :]


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "a web page": lambda content: b"<html><body>404</body></html>",
    "another pickle": lambda content: pickle.dumps({"knobs": {}, "step": 1, "model": {}}),
    "a flipped bit": lambda content: flip(content, len(content) // 2, 3),
}


def test_data_replaced_by_other_of_its_shape_stops_the_run(tmp_path):
    knobs = {"data": tmp_path / "mine.npy", "out": tmp_path, "train_sequences": 10}
    first = moving_squares(57)
    np.save(knobs["data"], first)
    here(**knobs, epochs=1)
    longer = np.concatenate((first, moving_squares(1, seed=1)), 1)  # training and the first to be validated stay
    for other in (moving_squares(57, seed=1), longer):
        np.save(knobs["data"], other)
        with pytest.raises(checkpoint.CheckpointError, match=r"belongs to other knobs: data was .*sha256 of four"):
            here(**knobs, epochs=2)
        with pytest.raises(checkpoint.CheckpointError, match="has scores of its training's data"):
            here(**knobs, eval_only=True)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_stops_the_run_and_stays(how, small, tmp_path):
    knobs, last = copy(small, tmp_path)
    last.write_bytes(DAMAGE[how](last.read_bytes()))
    before = last.read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt is damaged .*; without it, a run starts over"):
        here(**knobs)
    assert last.read_bytes() == before and {p.name for p in last.parent.iterdir()} == {"last.pt", ".lock"}


def test_any_flipped_bit_is_found_or_does_no_harm(tmp_path):
    path, rng = tmp_path / "x.pt", random.Random(0)
    state = {"knobs": {"epochs": 1}, "step": 3, "model": {"weight": torch.arange(9.0)}}
    checkpoint.save(path, state)
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")  # names, sizes and checksums: the part that misleads a reader most
    places = [*range(directory, len(content)), *(rng.randrange(len(content)) for _ in range(300))]
    found = 0
    for byte in places:
        path.write_bytes(flip(content, byte, rng.randrange(8)))
        try:
            loaded = checkpoint.load(path)
        except checkpoint.CheckpointError:
            found += 1
        else:
            torch.testing.assert_close(loaded, state, rtol=0, atol=0)
    assert found > len(places) - 10


def sign(content):
    """The content of a zip archive, as checkpoint.save would leave it."""
    checksum = hashlib.sha256(content).hexdigest().encode()
    return content[:-2] + bytes([len(checksum), 0]) + checksum


def content(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("sealed", [bytes, sign])
def test_a_malicious_checkpoint_runs_nothing(sealed, small, tmp_path):
    knobs, last = copy(small, tmp_path)
    last.write_bytes(sealed(content({"knobs": {}, "step": 1, "model": Malice(tmp_path / "run")})))
    with pytest.raises(checkpoint.CheckpointError, match="not loaded" if sealed is sign else "damaged"):
        here(**knobs)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("state", [3, {"step": 3}, {"knobs": 1, "step": 1, "model": {}}], ids=str)
def test_a_file_of_torch_that_is_no_checkpoint(state, tmp_path):
    (tmp_path / "x.pt").write_bytes(sign(content(state)))
    with pytest.raises(checkpoint.CheckpointError, match=r"x\.pt (holds what no checkpoint holds|is .* no checkpoint)"):
        checkpoint.load(tmp_path / "x.pt")


def test_a_checkpoint_that_would_inflate(tmp_path):
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(
            io.BytesIO(content({"knobs": {}, "step": 1, "model": {"weight": torch.zeros(10**6)}}))
        ) as plain,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    (tmp_path / "x.pt").write_bytes(sign(buffer.getvalue()))
    sentence = r"x\.pt is damaged or no checkpoint .*; give another file to --weights"
    with pytest.raises(checkpoint.CheckpointError, match=sentence):
        checkpoint.load(tmp_path / "x.pt")


@pytest.mark.parametrize("damage", [os.unlink, lambda path: path.write_text("")], ids=["lost", "damaged"])
def test_best_weights_of_an_ended_run_are_lost(damage, small, tmp_path):
    """What the message says helps."""
    knobs, last = copy(small, tmp_path)
    best = last.with_name("best.pt")
    best.write_text("")
    damage(best)
    with pytest.raises(checkpoint.CheckpointError, match=r"best\.pt.*; without it and .*last\.pt, a run starts over"):
        here(**knobs)
    best.unlink(missing_ok=True)
    last.unlink()
    here(**knobs)
    assert best.exists() and last.exists()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """(where a malicious checkpoint would make a file; the files in the zip archives of a good and of that one)."""
    run = tmp_path_factory.mktemp("archives") / "run"
    good = {"knobs": {"hidden": (8,)}, "step": 1, "model": {"weight": torch.arange(9.0)}}
    evil = {**good, "model": Malice(run)}
    zips = [zipfile.ZipFile(io.BytesIO(content(state))) for state in (good, evil)]
    return run, [{name: archive.read(name) for name in archive.namelist()} for archive in zips]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    evil=st.booleans(),
    inside=st.booleans(),  # in one of the files, with the right checksums around it, or anywhere
    file=st.integers(0, 9),
    changes=st.lists(st.tuples(st.integers(0, 2**11), st.integers(0, 255)), max_size=5),
)
def test_a_checkpoint_made_to_mislead_is_read_or_refused(archives, reader, evil, inside, file, changes):
    run, both = archives
    files = {name: bytearray(part) for name, part in both[evil].items()}
    mutated = [*files.values()][file % len(files) if file < 5 else 0]  # more in the pickle, which comes first
    buffer = io.BytesIO()
    for place, byte in changes if inside else []:
        mutated[place % len(mutated)] = byte
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, part in files.items():
            archive.writestr(name, bytes(part))
    whole = bytearray(buffer.getvalue())
    for place, byte in [] if inside else changes:
        whole[place % len(whole)] = byte
    path = run.with_name("x.pt")
    path.write_bytes(sign(bytes(whole)))
    assert reader("checkpoint", path).startswith("read [") or evil or changes
    assert not run.exists()


OLDER = {
    "feedback was no knob of the script and is now True. Give": lambda state: state["knobs"].pop("feedback"),
    "sampling was 0.5 and is now no knob of the script. Give": lambda state: state["knobs"].update(sampling=0.5),
    "is no checkpoint of this version of main.py ('timing')": lambda state: state.pop("timing"),
    "is no checkpoint of this version of main.py ('optimisers')": lambda state: state.pop("optimisers"),
    "is no checkpoint of this version of main.py (zip()": lambda state: state["optimisers"].pop(),
}


@pytest.mark.parametrize("sentence", OLDER)
def test_a_checkpoint_of_another_version_of_the_script(sentence, small, tmp_path):
    knobs, last = copy(small, tmp_path)
    state = checkpoint.load(last)
    OLDER[sentence](state)
    checkpoint.save(last, state)
    with pytest.raises(checkpoint.CheckpointError, match=re.escape(sentence)):
        here(**knobs)


ROW = dict.fromkeys(journal.DRAWN, 0.0) | {"sequences": 5}
ODD = {
    "optimisers": [3, [3, 3], None],
    "history": [5, [5], [{"a": 1}], [ROW, ROW | {"val_loss": "a"}], [ROW | {"sequences": -1}]],
    "timing": [3, [{}]],
    "baselines": [{}, 3, {"black": [1.0], "copy_last": "a"}],
    "best": [None, "a"],
    "step": [-1, True],
    "steps": ["x", -1, 1.5],
    "steps_per_epoch": [None],
    "loss_sum": ["a"],
    "loss_count": [-1],
    "seconds": [None],
    "code": [3],
    "model": [{1: torch.ones(2)}, {"a": torch.ones(2)}],
}


@pytest.mark.parametrize(
    ("part", "value"), [(part, value) for part, values in ODD.items() for value in values], ids=str
)
def test_a_checkpoint_of_what_cannot_be(part, value, small, begun):
    state = checkpoint.load(small[1] / "last.pt") | {part: value}
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt (is no checkpoint of this v|holds other weights)"):
        begun(state)


@pytest.mark.parametrize("shape", [(7, 5, 3), (1,)], ids=str)  # the second would be broadcast
def test_a_checkpoint_with_the_moments_of_other_weights(shape, small, begun):
    for k, name in enumerate(("momentum_buffer", "exp_avg")):
        state = checkpoint.load(small[1] / "last.pt")
        state["optimisers"][k]["state"][0][name] = torch.zeros(shape)
        with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt is no checkpoint of this version"):
            begun(state)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda muon, adam: adam["param_groups"][0].update(betas=(0.5, "x")), "its optimiser has other options"),
        (lambda muon, adam: muon["param_groups"][0].pop("momentum"), ""),
        (lambda muon, adam: muon["state"][0].pop("momentum_buffer"), "its optimiser has other moments"),
        (lambda muon, adam: adam["state"][0].pop("exp_avg"), "its optimiser has other moments"),
    ],
)
def test_a_checkpoint_of_an_optimiser_that_was_edited(edit, sentence, small, begun):
    state = checkpoint.load(small[1] / "last.pt")
    edit(*state["optimisers"])
    with pytest.raises(checkpoint.CheckpointError, match=rf"last\.pt is no checkpoint of this version.*{sentence}"):
        begun(state)


@pytest.mark.parametrize("knobs", [{"hidden": (10**30,)}, {"epochs": "x"}, {"epochs": torch.ones(3)}, {3: 4}], ids=str)
def test_a_checkpoint_of_knobs_that_cannot_be(knobs, small, begun):
    state = checkpoint.load(small[1] / "last.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt belongs to other knobs"):
        begun(state | {"knobs": state["knobs"] | knobs})


@pytest.fixture
def begun(small, tmp_path, monkeypatch):
    """journal.begin_or_go_on, of the small run, where last.pt has this state."""
    knobs, folder = small
    training = MovingMNIST(knobs["data"], "train", 10)
    asked = main.follow_data(parse(main.Knobs, flags(**knobs)), training)
    model = main.build(asked, 1)
    scored = MovingMNIST(knobs["data"], "validation"), MovingMNIST(knobs["data"], "test")
    setup = journal.Setup(asked, tmp_path, "squares.npy", training, *scored, torch.device("cpu"), None, None)

    def begin(state):
        (tmp_path / "last.pt").touch()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "load", lambda *arguments: state)
            return journal.begin_or_go_on(setup, model, main.make_optimisers(model, 0.03, torch.float32))

    assert begin(checkpoint.load(folder / "last.pt"))["step"] == 2
    return begin


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": 0.5}, f"learning_rate was {main.Knobs.learning_rate} and is now 0.5"),
        ({"hidden": "4,4"}, "hidden was (8,) and is now (4, 4)"),
        (
            {"seed": 1, "epochs": 2},
            "epochs was 1 and is now 2; seed was 0 and is now 1",
        ),  # both, or it is no longer run
    ],
)
def test_a_checkpoint_of_other_knobs(changes, sentence, small, tmp_path):
    knobs, last = copy(small, tmp_path)
    before = last.read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=re.escape(sentence)):
        here(**knobs | changes)
    assert last.read_bytes() == before


def test_weights_of_a_model_that_was_edited(small, tmp_path, monkeypatch):
    knobs, _ = copy(small, tmp_path)
    build = main.build
    monkeypatch.setattr(main, "build", lambda k, channels: torch.nn.ModuleDict({"renamed": build(k, channels)}))
    monkeypatch.setattr(torch.nn.ModuleDict, "forward", lambda self, *a: self["renamed"](*a), raising=False)
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt"):
        here(**knobs)


def test_scores_of_an_earlier_end_are_not_shown_for_a_later_one(small, tmp_path, monkeypatch, capsys):
    knobs, folder = small
    (tmp_path / "my_model").mkdir()
    for name in ("last.pt", "best.pt", "metrics.json"):
        (tmp_path / "my_model" / name).write_bytes((folder / name).read_bytes())
    more = knobs | {"out": tmp_path, "epochs": 2}

    def killed(*arguments):
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(journal, "test", killed)  # after the last checkpoint, before the scores
        here(**more)
    here(**more)
    assert "this run has ended" not in capsys.readouterr().out


DAMAGED_SCORES = {
    "truncated": lambda content: content[: len(content) // 2],
    "no text": lambda content: b"\xff",
    "another version's": lambda content: content.replace(b'"weights"', b'"digest"'),
    "a list": lambda content: b"[]",
}


@pytest.mark.parametrize("how", DAMAGED_SCORES)
def test_scores_that_cannot_be_read_are_made_again(how, small, tmp_path, capsys):
    knobs, folder = small
    copy(small, tmp_path)
    (tmp_path / "my_model" / "best.pt").write_bytes((folder / "best.pt").read_bytes())
    scores = (folder / "metrics.json").read_bytes()
    (tmp_path / "my_model" / "metrics.json").write_bytes(DAMAGED_SCORES[how](scores))
    here(**knobs | {"out": tmp_path})
    assert (tmp_path / "my_model" / "metrics.json").read_bytes() == scores
    assert "this run has ended" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", "abc"),
        ("hidden", ()),
        ("hidden", 8),
        ("hidden", (8, -1)),
        ("head", "a"),
        ("kernel_size", "a"),
        ("patch", 0),
        ("model", "lstm"),
    ],
)
def test_weights_of_a_network_that_cannot_be(name, value, small, tmp_path):
    knobs, folder = small
    best = checkpoint.load(folder / "best.pt")
    checkpoint.save(tmp_path / "odd.pt", best | {"knobs": best["knobs"] | {name: value}})
    with pytest.raises(checkpoint.CheckpointError, match=rf"odd\.pt is of no network of this script: {name} is"):
        here(**knobs | {"out": tmp_path, "weights": tmp_path / "odd.pt"})


def test_weights_of_a_version_without_a_knob(small, tmp_path):
    """Its default of now may not be what the network had."""
    knobs, folder = small
    best = checkpoint.load(folder / "best.pt")
    del best["knobs"]["dilation"]
    checkpoint.save(tmp_path / "old.pt", best)
    with pytest.raises(checkpoint.CheckpointError, match=r"earlier version of this script, without dilation"):
        here(**knobs | {"out": tmp_path, "weights": tmp_path / "old.pt"})


def test_evaluation_without_weights(array, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"best\.pt: No such file"):
        here(array, tmp_path, eval_only=True)


def test_a_folder_in_use_by_another_process(array, tmp_path):
    other = start(*flags(array, tmp_path, epochs=500))
    try:
        wait((tmp_path / "my_model" / "config.json").exists, other)
        with pytest.raises(checkpoint.CheckpointError, match=r"my_model is in use by another run; .* another --out"):
            here(array, tmp_path)
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()
    checkpoint.claim(tmp_path / "my_model").close()  # which it holds no longer


def test_a_folder_that_may_only_be_read(small, tmp_path):
    knobs, last = copy(small, tmp_path)
    with mounted(tmp_path, ["--bind", tmp_path], ["-o", "remount,bind,ro"]):
        for changes in ({}, {"out": tmp_path / "new"}):
            with pytest.raises(checkpoint.CheckpointError, match=r"cannot write to .*my_model: Read-only file system"):
                here(**knobs | changes)
    assert {path.name for path in last.parent.iterdir()} == {"last.pt"}


@pytest.mark.parametrize(("held", "written"), [(2, True), (9, False)])
def test_a_file_that_is_open_elsewhere_for_a_while(held, written, tmp_path, monkeypatch):
    """As Windows has it: nobody can replace it until it is closed."""
    file, refused, really = tmp_path / "log.csv", [], os.replace

    def replace(source, target):
        if len(refused) < held:
            refused.append(target)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return really(source, target)

    file.write_bytes(b"old")
    monkeypatch.setattr(checkpoint, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "replace", replace)
    with nullcontext() if written else pytest.raises(checkpoint.CheckpointError, match=r"log\.csv: Permission denied"):
        checkpoint.publish(file, b"new")
    assert file.read_bytes() == (b"new" if written else b"old")
    assert len(refused) == (2 if written else 4) and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("how", ["a small disk", "a limit on files"])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(how, small, tmp_path, monkeypatch):
    train, more = main.train, {"epochs": 2, "save_minutes": 1e-6}
    disk = mounted(tmp_path, ["-t", "tmpfs", "-o", "size=4m", "none"]) if how == "a small disk" else nullcontext()
    with disk:
        knobs, last = copy(small, tmp_path)
        before = last.read_bytes()

        def full(*arguments):
            if how == "a limit on files":
                with largest_file(len(before) // 2):
                    return train(*arguments)
            with suppress(OSError):
                (tmp_path / "filler").write_bytes(bytes(2**23))
            return train(*arguments)

        monkeypatch.setattr(main, "train", full)
        cause = r"cannot write .*last\.pt: (No space left|File too large).*; the file before it is intact"
        with pytest.raises(checkpoint.CheckpointError, match=cause):
            here(**knobs | more)
        assert last.read_bytes() == before and not list(last.parent.glob("*.tmp"))
        monkeypatch.setattr(main, "train", train)
        (tmp_path / "filler").unlink(missing_ok=True)
        here(**knobs | more)
        assert checkpoint.load(last)["step"] == 4


@pytest.mark.skipif(os.name == "nt", reason="has no flock")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EWOULDBLOCK])
def test_a_file_system_without_locks_is_no_other_run(number, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    used = pytest.raises(checkpoint.CheckpointError, match="in use by another run")
    with used if number == errno.EWOULDBLOCK else nullcontext():
        checkpoint.claim(tmp_path)


def test_two_runs_write_one_file_at_once(tmp_path, monkeypatch):
    with checkpoint.replacing(tmp_path / "compare.md") as out:
        out.write(b"first")
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            checkpoint.publish(tmp_path / "compare.md", b"second")
    assert (tmp_path / "compare.md").read_bytes() == b"first"


def test_an_editor_s_lock_beside_the_code(tmp_path, monkeypatch):
    (tmp_path / "main.py").write_text("")
    (tmp_path / ".#main.py").symlink_to("user@host.123")  # of Emacs, for a file with changes that are not saved
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    assert [*checkpoint.code()] == ["main.py"]


def test_an_output_that_is_a_file(array, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot write to .*out"):
        here(array, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(call, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    state = {"knobs": {}, "step": 1, "model": {}}
    checkpoint.save(path, state)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot write .*last\.pt: No space left on device"):
        checkpoint.save(path, state | {"step": 2})
    assert checkpoint.load(path) == state and list(tmp_path.iterdir()) == [path]


def test_a_stray_half_written_file_does_no_harm(small, tmp_path):
    knobs, last = copy(small, tmp_path)
    stray = last.with_name("last.pt.12345.tmp")
    stray.write_bytes(b"half")
    here(**knobs | {"epochs": 2})
    assert checkpoint.load(last)["step"] == 4 and not stray.exists()


# Numbers


@pytest.mark.parametrize("what", ["loss nan", "loss inf", "gradient norm nan"])
def test_training_stops_before_a_step_that_would_spoil_the_weights(what, array, tmp_path, monkeypatch):
    build, models = main.build, []

    def spoiled(*arguments):
        model = build(*arguments)
        forward, calls = model.forward, iter(range(10**6))

        def bad_after_an_epoch(*inputs):
            logits = forward(*inputs)
            if model.training and torch.is_grad_enabled() and next(calls) >= STEPS:
                if what.startswith("loss"):
                    return logits * 0 + (math.nan if what == "loss nan" else 3e38)
                logits.register_hook(lambda gradient: gradient * float("inf"))
            return logits

        model.forward = bad_after_an_epoch
        models.append(model)
        return model

    monkeypatch.setattr(main, "build", spoiled)
    place = rf"{what}.* epoch 2, step {STEPS + 1}, at learning rate 0\.\d+ \(last finite loss: 0\.\d+\)"
    with pytest.raises(FloatingPointError, match=place):
        here(array, tmp_path)
    state = checkpoint.load(tmp_path / "my_model" / "last.pt")
    assert state["step"] == STEPS and len(state["history"]) == 1
    torch.testing.assert_close(state["model"], dict(models[0].state_dict()), rtol=0, atol=0)
    assert (tmp_path / "my_model" / "log.csv").read_text().count("\n") == 2
    monkeypatch.setattr(main, "build", build)  # what the message advises
    here(array, tmp_path / "on", weights=tmp_path / "my_model" / "last.pt", learning_rate=0.01, train_sequences=5)


def test_weights_that_a_step_spoils_are_not_saved(array, tmp_path, monkeypatch):
    few = {"epochs": 1, "warmup": 0, "learning_rate": 1e37}
    with pytest.raises(FloatingPointError, match=r"NaN or infinite .*after step 1, at learning rate .*start over with"):
        here(array, tmp_path, train_sequences=5, **few)  # the loss of the only step is finite, and nothing after it
    monkeypatch.setattr(main.Muon, "step", lambda self: self.kernels[0].data.fill_(math.inf))
    with pytest.raises(FloatingPointError, match=r"weights are not finite, and .*last\.pt was left as it is"):
        here(array, tmp_path, train_sequences=10, save_minutes=1e-6, **few)
    assert not list(tmp_path.glob("my_model/*.pt"))


def test_a_bug_in_an_edited_cell_is_no_sentence(array, tmp_path, monkeypatch):
    def three_gates(self, x, state):
        i, f, o = state[0].chunk(4, 1)
        return f * o, i

    monkeypatch.setattr(ConvLSTMCell, "forward", three_gates)
    with pytest.raises(ValueError, match="values to unpack"):
        here(array, tmp_path)


# Processes


def test_a_terminal_without_all_characters(array, tmp_path):
    out, _ = finish(start(*flags(array, tmp_path, epochs=1, train_sequences=5), PYTHONIOENCODING="ascii"))
    assert r" frames, 1\xd716\xd716" in out


def test_a_refusal_through_a_link(array, tmp_path):
    (tmp_path / "link").symlink_to(ROOT, target_is_directory=True)
    command = [sys.executable, str(tmp_path / "link" / "main.py"), *flags(array, tmp_path, kernel_size=4)]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.startswith("main.py: kernel size 4 is even")


@pytest.mark.parametrize(
    ("changes", "status", "sentence"),
    [
        ({"data": "nowhere.npy"}, 1, "main.py: cannot read nowhere.npy: No such file"),
        ({"hidden": 10**6}, 1, "out of memory at batch_size 5"),
    ],
)
def test_a_refusal_is_a_sentence(changes, status, sentence, array, tmp_path):
    _, err = finish(start(*flags(**{"data": array, "out": tmp_path} | changes)), status)
    assert sentence in err


@pytest.mark.parametrize(
    "short",
    [
        "torch.empty(2**60)",  # a RuntimeError
        "numpy.empty(2**59)",  # a MemoryError with words of its own
        "(_ for _ in ()).throw(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'))",
        "(_ for _ in ()).throw(RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate'))",
    ],
)
def test_memory_that_runs_out_in_the_third_step(short, reference, array, tmp_path, capsys):
    """As the optimiser steps; the run then goes on from the second, and ends as if nothing had been."""
    step = f"step = torch.optim.AdamW.step; torch.optim.AdamW.step = lambda *a: step(*a) if next(left) else {short}"
    launcher = (str(ROOT / "tests" / "after.py"), f"import numpy, torch; left = iter([1, 1, 0]); {step}")
    knobs = {"data": array, "out": tmp_path, "save_minutes": 1e-6}
    _, err = finish(start(*flags(**knobs), launcher=launcher), 1)
    assert "main.py: out of memory at batch_size 5; lower it, " in err
    assert f"last.pt under {tmp_path}, if there is one, is intact: --weights that file, and another --out" in err
    here(**knobs)
    assert "going on at step 2" in capsys.readouterr().out
    assert (tmp_path / "my_model" / "metrics.json").read_bytes() == (reference[0] / "metrics.json").read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_how_to_go_on(number, status, reference, array, tmp_path, capsys):
    out = tmp_path / "a folder"
    process = start(*flags(array, out))
    wait((out / "my_model" / "last.pt").exists, process)
    process.send_signal(number)
    _, err = finish(process, status)
    (command,) = re.findall("^stopped; this goes on: (.*)$", err, re.M)
    assert shlex.split(command) == process.args
    here(array, out)
    assert f"going on at step {STEPS}" in capsys.readouterr().out
    assert (out / "my_model" / "metrics.json").read_bytes() == (reference[0] / "metrics.json").read_bytes()


@pytest.mark.parametrize("where", ["watch = weakref.ref(thing, end)", "Thing.__del__ = end"])
def test_a_signal_where_python_ignores_exceptions(where, array, tmp_path):
    """In the third step, as an object goes."""
    short = f"""
import os, signal, torch, weakref
class Thing: pass
left, step = iter([0, 0, 1]), torch.optim.AdamW.step
def end(_): os.kill(os.getpid(), signal.SIGTERM); [None for _ in range(1000)]
def steps(*arguments):
    if next(left):
        thing = Thing()
        {where}
        del thing
    return step(*arguments)
torch.optim.AdamW.step = steps
"""
    process = start(*flags(array, tmp_path), launcher=(str(ROOT / "tests" / "after.py"), short))
    _, err = finish(process, 143)
    assert "stopped; this goes on: " in err


def test_a_lost_process_is_a_sentence(array, tmp_path):
    """NCCL's error, as no NCCL is here; gloo's is raised for real where two processes are killed."""
    lost = "raise torch.distributed.DistBackendError('NCCL error: remote process exited\\nmore')"
    launcher = (
        str(ROOT / "tests" / "after.py"),
        f"import torch\ndef step(self): {lost}\ntorch.optim.AdamW.step = step",
    )
    _, err = finish(start(*flags(array, tmp_path), launcher=launcher), 1)
    words = "lost the other processes (NCCL error: remote process exited more); if one has ended, its message says why"
    assert err.strip().endswith(words)


def test_a_process_that_does_not_know_its_rank(monkeypatch):
    monkeypatch.setattr(machine, "WORLD", 2)
    words = "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT are not set; start it with torchrun"
    with pytest.raises(DeviceError, match=words):
        machine.join(torch.device("cpu"))


def test_processes_that_do_not_find_each_other(array, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        world = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        _, err = finish(start(*flags(array, tmp_path), **world), 1)
    assert "main.py, rank 0: the processes did not find each other: " in err


def test_ctrl_c_during_the_imports(tmp_path):
    (tmp_path / "tqdm.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    finish(start("--help", PYTHONPATH=str(tmp_path)), -signal.SIGINT)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_that_cannot_be_printed(array, tmp_path):
    with open("/dev/full", "w") as full:
        _, err = finish(start(*flags(array, tmp_path), stdout=full), 1)
    assert "main.py: cannot print: No space left on device" in err
    process = start(*flags(array, tmp_path))
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 1 and "main.py: cannot print: Broken pipe" in err and "Traceback" not in err


def two(*commands, **launcher):
    """Two processes of one run, without torchrun, which would stop the one where the other fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(*commands[-k], RANK=str(k), LOCAL_RANK=str(k), **world, **launcher) for k in (0, 1)]


def test_two_processes_of_two_precisions(array, tmp_path):
    """As on two machines, one of them without a bf16 unit: their weights would part."""
    both = two(*(flags(array, tmp_path, precision=precision) for precision in ("bf16", "fp32")))
    first, second = (finish(process, 1)[1] for process in both)
    words = "this process computes in fp32 (chosen by knob), the first in bf16 (chosen by knob); set precision to fp32"
    assert f"rank 1: {words}" in second
    assert "rank 0: lost the other processes (" in first


def test_a_refusal_of_two_processes(array, tmp_path):
    (tmp_path / "my_model").mkdir()
    (tmp_path / "my_model" / "last.pt").write_text("damaged")
    errors = [finish(process, 1)[1] for process in two(flags(array, tmp_path), launcher=ABORTS_AT_SHUTDOWN)]
    assert "main.py, rank 0: " in errors[0] and "last.pt is damaged" in errors[0]
    assert "main.py, rank 1: lost the other processes (" in errors[1] and "its message says why" in errors[1]


def test_two_processes_stop(array, tmp_path):
    """Without Python's shutdown, in which a thread of gloo's may abort."""
    both = two(flags(array, tmp_path, epochs=500), launcher=ABORTS_AT_SHUTDOWN)
    wait((tmp_path / "my_model" / "last.pt").exists, both[0])
    both[0].send_signal(signal.SIGTERM)
    assert "stopped; this goes on: the same torchrun command" in finish(both[0], 143)[1]
    assert "lost the other processes (" in finish(both[1], 1)[1]


def test_one_of_two_processes_dies(array, tmp_path):
    both = two(flags(array, tmp_path, epochs=500))
    try:
        last = tmp_path / "my_model" / "last.pt"
        wait(last.exists, both[0])
        both[1].kill()
        both[0].communicate(timeout=10)
        assert both[0].returncode > 0
        assert checkpoint.load(last)["step"] >= STEPS
        checkpoint.lock(last.parent).close()  # the next run may have it
    finally:
        for process in both:
            process.kill()
            process.communicate()


# Supply chain


def calls(tree):
    """(name of what is called, its keywords) in a parsed source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_no_source_loads_a_pickle_or_uses_the_network(path):
    """Nor evaluates text; download.py alone has an address to ask."""
    tree = ast.parse(path.read_text())
    imports = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in imports}
    assert not roots & {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    assert not roots & {"urllib", "http", "socket", "requests", "ftplib", "ssl"} or path.name == "download.py"
    for name, keywords in calls(tree):
        assert name not in {"eval", "exec", "torch.hub.load"}
        assert keywords.get("allow_pickle", "False") == "False"
        assert name != "torch.load" or keywords["weights_only"] == "True"


def test_every_dependency_has_a_lower_bound():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[a-z-]+>=[\d.]+", line) for line in lines)
    assert "torch>=2.10" in lines  # before, weights_only could be got around


# No internet


def test_without_internet_a_run_goes_on_with_the_committed_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "SEQUENCES", 40)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = (f"http://127.0.0.1:{closed.getsockname()[1]}/x.gz",)
        for name in ("ARRAY", "DIGITS"):
            monkeypatch.setattr(download, name, getattr(download, name)._replace(urls=nowhere))
        *splits, name = main.load_data(main.Knobs())
        said = capsys.readouterr().out.splitlines()
        assert (*map(len, splits), name) == (32, 4, 4, "stand-in array")
        assert said[0].startswith("no official array: going on with a stand-in")
        assert "(819,200,080 bytes) cannot be had from" in said[1] and "refused" in said[1]
        with monkeypatch.context() as patch:  # the next run asks nobody
            patch.setattr(download, "urlopen", lambda *arguments, **options: pytest.fail("the network was asked"))
            assert main.load_data(main.Knobs())[-1] == "stand-in array"
        assert "using the stand-in" in capsys.readouterr().out
        *splits, name = main.load_data(main.Knobs(data="fresh", train_sequences=20))
        assert (len(splits[0]), name) == (20, "stand-in array, trained on fresh sequences of 9,167 digits")
        scored = main.Knobs(data="fresh", eval_only=True)  # under the same name; another's weights are not so trained
        assert main.load_data(scored)[-1] == name
        assert main.load_data(dataclasses.replace(scored, weights="a.pt"))[-1] == "stand-in array"
        assert "going on with the 10,000 training digits" in capsys.readouterr().out
        *splits, name = main.load_data(main.Knobs(data="recut"))
        assert tuple(map(len, splits)) == (10_000, 4, 4) and splits[2].split == "test"
        assert 40 < len(splits[0].digits) <= 64  # of 32 pairs
        assert name == f"stand-in array, trained on new sequences of {len(splits[0].digits)} digits cut out of it"
        scored = main.Knobs(data="recut", train_sequences=7, eval_only=True)
        training, *_, same = main.load_data(scored)
        assert (len(training), same) == (7, name)
        assert main.load_data(dataclasses.replace(scored, weights="a.pt"))[-1] == "stand-in array"
        setup = main.Setup(scored, None, name, *[None] * 6)
        assert setup.validated == "validation split of the stand-in array"
        np.save("raw/mnist_test_seq.npy", np.zeros((30, 12, 64, 64), np.uint8))  # someone's own, to be tested on
        with pytest.raises(DataError, match=r"\(30, 1, 64, 64\), but fresh ones are \(20, 1, 64, 64\)"):
            main.load_data(main.Knobs(data="fresh"))
        with pytest.raises(DataError, match=r"mnist_test_seq.npy has no sequences of 20 .* --data array"):
            main.load_data(main.Knobs(data="recut"))
