"""Files that survive a crash: written whole or not at all, loaded only if intact. And locks of folders."""

import contextlib
import hashlib
import io
import os
import zipfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from support import UserError, sources
from support.devices import print0

HALF = ".half"  # the last letters of a file's name while it is written


@contextlib.contextmanager
def open_atomic(path):
    """A file to write. It gets the name `path` only when the block ends well and all is safe on the disk.

    So a crash at any moment leaves the old file or the new one. Raises UserError.
    """
    temporary = path.with_name(path.name + HALF)
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
    """torch.save, whole or not at all."""
    # to memory first: when it writes a file, torch.save reports a full disk as an unrelated error
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load(path, advice="give another file to --weights"):
    """The saved dict, on the CPU; no pickled code runs. Raises UserError, with the advice at its end."""
    try:
        content = io.BytesIO(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {advice}") from error
    try:
        if zipfile.ZipFile(content).testzip():  # torch.load accepts most files with a flipped bit
            raise ValueError("a part has another checksum")
        content.seek(0)
        state = torch.load(content, map_location="cpu", weights_only=True)
        # knobs were saved as JSON has them: tuples as lists
        knobs = {k: tuple(v) if isinstance(v, list) else v for k, v in state["knobs"].items()}
        return {**state, "knobs": knobs, "model": dict(state["model"])}
    except Exception as error:  # untrusted file: loading may raise anything
        raise UserError(f"{path} is damaged, or no checkpoint of this script; {advice}") from error


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

    wait: until another process releases it. Where the file system has no locks, none is held.
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
        yield


def weights_hash(model):
    """A fingerprint of the weights. The same seed, machine and thread count give the same."""
    sha = hashlib.sha256()
    for value in model.state_dict().values():
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # NumPy has no bf16
    return sha.hexdigest()[:16]
