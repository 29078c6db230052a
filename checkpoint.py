"""What survives: a checkpoint is wholly old or wholly new on disk, and nothing damaged is ever loaded."""

import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path

import torch


class CheckpointError(Exception):
    """A checkpoint or results folder that cannot be used, in one sentence."""


def publish(path, content):
    """Write bytes so that a crash at any moment leaves the old file or the new one. Raises CheckpointError."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror}; what was there before is intact") from error


def save(path, state):
    # torch.save to a file hides a full disk behind an error about positions; to memory it cannot fail that way
    buffer = io.BytesIO()
    torch.save(state, buffer)
    publish(path, buffer.getbuffer())


def load(path):
    """The dict that was saved, on the CPU; no pickled code runs. Raises CheckpointError."""
    refusal = f"{path} is damaged or no checkpoint of this script; delete or move it to start over"
    try:
        # torch.load misses most flipped bits; the zip archive carries a checksum of every tensor
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        raise CheckpointError(refusal) from error
    if not isinstance(state, dict) or not {"knobs", "step", "model"} <= state.keys():
        raise CheckpointError(refusal)
    return state


def lock(folder):
    """Hold the results folder for this process, until it ends however it ends; a second run is refused."""
    file = open(Path(folder) / ".lock", "w")  # noqa: SIM115 (stays open as long as the run)
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CheckpointError(
            f"{folder} is in use by another run; wait for it, or set out to another folder"
        ) from error
    return file


def claim(out, model):
    """The run's folder, made and held; (folder, lock). Raises CheckpointError where that cannot be."""
    folder = Path(out) / model
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder, lock(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}; set out to another folder") from error


def resume(path, knobs, may_differ):
    """The state to go on from, or None where there is none. Refuses one of other knobs, and names them."""
    if not path.exists():
        return None
    state = load(path)
    then = state["knobs"]
    changed = [k for k in knobs if k not in may_differ and then.get(k) != knobs[k]]
    if changed == ["epochs"] and knobs["epochs"] > then["epochs"] and not knobs["max_minutes"]:
        print(f"going on to {knobs['epochs']} epochs: the learning rate follows the longer schedule from here on, "
              "so this is not the run it would have been from the start")  # fmt: skip
        return {**state, "steps": 0}
    if changed:
        differing = "; ".join(f"{k} was {then.get(k)!r} and is now {knobs[k]!r}" for k in changed)
        raise CheckpointError(
            f"{path} belongs to other knobs: {differing}. Set them back, or set out to another folder"
        )
    return state


def digest(model):
    """A fingerprint of the weights: the same seed, machine and thread count give the same."""
    sha = hashlib.sha256()
    for value in model.state_dict().values():
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
