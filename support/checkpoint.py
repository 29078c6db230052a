"""Files that survive a crash: written whole or not at all, loaded only if intact. And locks of folders."""

import contextlib
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from support import UserError, sources
from support.devices import print0

CHECKSUM = 64  # characters of a SHA-256, in the zip archive's comment
HALF = ".half"  # the last letters of a file's name while it is written


@contextlib.contextmanager
def open_atomic(path):
    """A file to write. It gets the name `path` only when the block ends well and all is safe on the disk.

    So a crash at any moment leaves the old file or the new one. Raises UserError.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{HALF}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or f"{error} (is the disk full?)"  # NumPy's errors have no strerror
        raise UserError(f"cannot write {path}: {reason}; nothing was overwritten") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_atomic(path, content):
    with open_atomic(path) as file:
        file.write(content)


def save(path, state):
    """torch.save with a checksum, whole or not at all."""
    # to memory first: when it writes a file, torch.save reports a full disk as an unrelated error
    buffer = io.BytesIO()
    torch.save(without_numpy(state), buffer)
    content = buffer.getvalue()  # a zip archive ends with the length of its comment, here 0
    comment = hashlib.sha256(content).hexdigest().encode()
    write_atomic(path, content[:-2] + len(comment).to_bytes(2, "little") + comment)


def without_numpy(value):
    """The same with Python's numbers: an edit may leave NumPy's, which torch.load refuses."""
    if isinstance(value, dict):
        return {name: without_numpy(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(without_numpy, value))
    return value.item() if isinstance(value, np.generic) else value


def load(path, advice="give another file to --weights"):
    """The saved dict, on the CPU; no pickled code runs. Raises UserError, with the advice at its end."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {advice}") from error
    # torch.load accepts most files with a flipped bit; the checksum accepts none
    content, checksum = content[: -CHECKSUM - 2] + b"\0\0", content[-CHECKSUM:]
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        raise UserError(f"{path} is damaged, or no checkpoint of this script; {advice}")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        # knobs were saved as JSON has them: tuples as lists
        knobs = {k: tuple(v) if isinstance(v, list) else v for k, v in state["knobs"].items()}
        return {**state, "knobs": knobs, "model": dict(state["model"])}
    except Exception as error:  # untrusted file: loading may raise anything
        raise UserError(f"{path} is no checkpoint of this script, and was not loaded; {advice}") from error


def load_weights(model, state, path):
    """Give a model the weights of a checkpoint. Raises UserError where they do not fit.

    Prints a line if the network's code is not that with which the weights were trained.
    """
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = "the network's code, a knob of your own or the channels of the data have changed"
        raise UserError(f"weights in {path} do not fit: {reason}; undo that, or use another file") from error
    if "network" not in state:
        print0(f"edited    {path} is of an earlier version of this code")
    then, now = state.get("network", {}), sources.network()
    if edited := [name for name in then if now.get(name, then[name]) != then[name]]:
        print0(f"edited    {', '.join(edited)}: no longer the code with which {path} was trained")


def make_folder(folder):
    """Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


@contextlib.contextmanager
def lock_folder(folder, wait=False):
    """Make a folder, and hold it until the `with` block ends. Raises UserError where that fails.

    wait: until another process releases it. Where the file system has no locks, none is held. What killed
    runs left half-written is removed.
    """
    make_folder(folder)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        advice = "wait for it, or give this one a --name"
        raise UserError(f"{folder} is in use by another run; {advice}") from error
    except (OSError, NotImplementedError):  # a file system without locks, or a folder that is read-only
        lock = contextlib.nullcontext()
    with lock:
        for stray in (*folder.glob(f"*{HALF}"), *folder.glob(f"source/**/*{HALF}")):
            with contextlib.suppress(OSError):
                stray.unlink()
        yield


def weights_hash(model):
    """A fingerprint of the weights. The same seed, machine and thread count give the same."""
    sha = hashlib.sha256()
    for value in model.state_dict().values():
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # NumPy has no bf16
    return sha.hexdigest()[:16]
