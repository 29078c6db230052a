"""Files that survive a crash: written whole or not at all, loaded only if intact. And locks of folders."""

import copy
import errno
import hashlib
import io
import os
import re
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from support import UserError
from support.distributed import print0

CHECKSUM = 64  # characters of a SHA-256, in the zip archive's comment


@contextmanager
def open_atomic(path):
    """A file to write. It gets the name `path` only when the block ends well and all is safe on the disk.

    So a crash at any moment leaves the old file or the new one. Raises UserError.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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
        with suppress(OSError):
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
    """Give a model the weights of a checkpoint. Raises UserError where they do not fit."""
    try:
        model.load_state_dict(state["model"])
    except Exception as error:  # untrusted file: anything may be in it
        reason = "the network's code, a knob of your own or the channels of the data have changed"
        advice = "undo that, or use another file"
        raise UserError(f"weights in {path} do not fit this model: {reason}; {advice}") from error


def report_edits(model, state, path):
    """Print a line if the loaded weights forecast something else than when they were saved."""
    if (before := state.get("fixed_forecast")) is None:
        return
    now = fixed_forecast(model, state["channels"])
    same_shape = now is not None and now.shape == before.shape
    if not (same_shape and torch.allclose(before, now, rtol=1e-4, atol=1e-4)):
        words = "the network, or a knob of your own, has changed"
        print0(f"edited    {words}: {path} forecasts other frames than when it was saved")


def fixed_forecast(model, channels):
    """Logits of a fixed input, by which an edited network is noticed; None where it cannot read that."""
    # an edited network may raise anything, and may draw random numbers
    with suppress(Exception), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = copy.deepcopy(model).to("cpu", torch.float32).eval()
        patch = getattr(model, "patch_size", 1)
        size = -(-64 // patch) * patch
        frames = torch.rand(1, 4, channels, size, size, generator=torch.Generator().manual_seed(0))
        return model(frames, 2)[..., ::8, ::8].clone()


def lock_folder(folder, wait=False):
    """Make a folder, hold it until a `with` block ends, and remove what killed runs left half-written.

    Raises UserError where it cannot be held. wait: until another process releases it. Where the file system
    has no locks, none is held.
    """
    folder, lock = Path(folder), nullcontext()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        words = f"{folder} is in use by another run; wait for it, or give this one a --name"
        raise UserError(words) from error
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    for stray in filter(is_half_written, (*folder.glob("*.tmp"), *folder.glob("source/**/*.tmp"))):
        with suppress(OSError):
            stray.unlink()
    return lock


def is_half_written(path):
    """Whether it has a temporary name of open_atomic's: what a killed run leaves."""
    return re.fullmatch(r".+\.\d+\.tmp", path.name) is not None


def weights_hash(model):
    """A fingerprint of the weights. The same seed, machine and thread count give the same."""
    sha = hashlib.sha256()
    for value in model.state_dict().values():
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # NumPy has no bf16
    return sha.hexdigest()[:16]
