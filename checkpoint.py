"""What survives: a checkpoint is wholly old or wholly new on disk, and nothing damaged is ever loaded."""

import hashlib
import io
import os
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

# Windows replaces no file that is open elsewhere: seconds to wait for a virus scanner, a spreadsheet, OneDrive
PAUSES = (0.1, 0.4, 1.5, 3) if os.name == "nt" else ()


class CheckpointError(Exception):
    """A checkpoint or results folder that cannot be used, in one sentence."""


def replace(source, target):
    for pause in PAUSES:
        with suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(pause)
    os.replace(source, target)


@contextmanager
def replacing(path):
    """A file to write that gets the name `path`, whole and safe on the disk, only if the block ends well."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs that end at once write one compare.md
    try:
        with open(temporary, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(path, content):
    """Write bytes so that a crash at any moment leaves the old file or the new one. Raises CheckpointError."""
    try:
        with replacing(Path(path)) as out:
            out.write(content)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}; the file before it is intact") from error


def save(path, state):
    """torch.save, whole or not at all, with a checksum in the zip archive's comment; no weights that are not finite."""
    if not all(weight.isfinite().all() for weight in state["model"].values()):
        raise FloatingPointError(f"weights are not finite, and {path} was left as it is; lower learning_rate")
    # straight to a file, torch.save hides a full disk behind an error about positions
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()  # ends in the comment's length, 0
    comment = hashlib.sha256(content).hexdigest().encode()
    publish(path, content[:-2] + len(comment).to_bytes(2, "little") + comment)


def load(path, advice="give another file to --weights"):
    """The dict that was saved, on the CPU; no pickled code runs. Raises CheckpointError, with advice at its end."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {advice}") from error
    # torch.load accepts most files with a flipped bit; the checksum, none
    content, checksum = content[:-66] + b"\0\0", content[-64:]
    try:
        whole = hashlib.sha256(content).hexdigest().encode() == checksum
        # torch.save packs without compressing; what would inflate is a bomb
        if whole and sum(f.file_size for f in zipfile.ZipFile(io.BytesIO(content)).infolist()) <= len(content):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            kinds = {"knobs": dict, "step": int, "model": dict}
            if all(isinstance(state[part], kind) for part, kind in kinds.items()):
                return state
    except Exception as error:  # whoever made the file chose what its reading meets
        raise CheckpointError(f"{path} holds what no checkpoint holds and was not loaded; {advice}") from error
    raise CheckpointError(f"{path} is damaged or no checkpoint of this script; {advice}")


def lock(folder, names="*"):
    """Hold the folder for this process, until it ends however it ends; a second run is refused.

    Files of these names that killed runs left half written are removed. Where the file system has no locks, none is
    held.
    """
    file = open(Path(folder) / ".lock", "w")  # noqa: SIM115 (stays open as long as the run)
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise CheckpointError(f"{folder} is in use by another run; wait for it, or give another --out") from error
    except OSError:
        pass  # a file system without locks
    else:
        sweep(folder, names)
    return file


def sweep(folder, names, seconds=0):
    """Remove what killed runs left half written of these files, where it is older than so many seconds."""
    for stray in Path(folder).glob(f"{names}.[0-9]*.tmp"):
        with suppress(OSError):
            if not seconds or time.time() - stray.stat().st_mtime > seconds:
                stray.unlink()


def claim(folder):
    """Make the run's folder and hold it, until the lock that is returned goes. Raises CheckpointError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}; give another --out") from error


def resume(path, knobs, may_differ):
    """The state to go on from, or None where there is none. Refuses one of other knobs, and names them."""
    if not path.exists():
        return None
    state = load(path, "without it, a run starts over")
    then = state["knobs"]
    both = then.keys() & knobs.keys()
    same = lambda k: k in both and repr(then[k]) == repr(knobs[k])  # a tensor's == would be no answer
    changed = [k for k in {**knobs, **then} if k not in may_differ and not same(k)]
    longer = type(then.get("epochs")) is int and knobs["epochs"] > then["epochs"] and not knobs["max_minutes"]
    if changed == ["epochs"] and longer:
        print(f"going on to {knobs['epochs']} epochs: the learning rate follows the longer schedule from here on, "
              "so this is not the run it would have been from the start")  # fmt: skip
        return {**state, "steps": 0}
    if changed:
        value = lambda of, k: repr(of[k]) if k in of else "no knob of the script"
        differing = "; ".join(f"{k} was {value(then, k)} and is now {value(knobs, k)}" for k in changed)
        # a knob that this version has not cannot be set back
        advice = "Set them back, or give another --out" if both >= set(changed) else "Give another --out"
        raise CheckpointError(f"{path} belongs to other knobs: {differing}. {advice}")
    return state


def like(value, example):
    """Whether it has the types of the example, and no count below 0: in lists as the first, in dicts by key."""
    if isinstance(example, dict):
        return isinstance(value, dict) and all(key in value and like(value[key], example[key]) for key in example)
    if isinstance(example, list):
        return isinstance(value, list) and all(like(part, example[0]) for part in value)
    return type(value) is type(example) and not (type(value) is int and value < 0)


def code():
    """A fingerprint of each source file, by which a run that goes on knows that one was edited meanwhile."""
    beside = sorted(path for path in Path(__file__).parent.iterdir() if path.is_file())
    sources = (path for path in beside if path.suffix in (".py", ".c"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sources}


def digest(model):
    """A fingerprint of the weights: the same seed, machine and thread count give the same."""
    sha = hashlib.sha256()
    for value in model.state_dict().values():
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
