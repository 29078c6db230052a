"""Folders of runs: the same knobs, code and data find their folder again, anything else gets a new one."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import platform
import re
import subprocess
import textwrap
import time
from pathlib import Path

import numpy as np

from support import sources
from support.checkpoint import HALF, lock_folder, write_atomic
from support.devices import on_rank_0, print0

# knobs that choose what is read of the data
SELECTING = "data", "train_sequences", "video", "frames_in", "frames_out"
NOT_THE_EXPERIMENT = "out", "name", "device", "fast"  # knobs that do not make another experiment


def describe_identity(knobs, data):
    """What makes a run the same run: knobs, data, sources, and the content of the file of weights."""
    sha = hashlib.sha256()
    for split in (data.training, data.validation, data.test):
        for part in split.parts:
            sha.update(part)
    values = {k: v for k, v in dataclasses.asdict(knobs).items() if k not in NOT_THE_EXPERIMENT}
    shape = "×".join(map(str, data.training.shape))
    text = f"{data.name}, sequences of {shape}, sha256 {sha.hexdigest()[:16]}"
    asked = {"knobs": values, "data": text, "sources": sources.fingerprints()}
    if knobs.weights:
        asked["weights"] = hashlib.sha256(Path(knobs.weights).read_bytes()).hexdigest()
    return json.loads(json.dumps(asked))  # as it comes back from config.json


@contextlib.contextmanager
def run_folder(setup):
    """The folder of the run that was asked for: an earlier one, or a new one. Locked until the block ends."""
    with contextlib.ExitStack() as stack:
        yield on_rank_0(choose_folder, setup.knobs, setup.asked, setup.environment, stack)


def choose_folder(knobs, asked, environment, stack):
    """The folder of an earlier run that asked for the same, or a new one: base, base-2, …

    base: the knob `name`, or the model, or for weights that are only scored their folder and "-eval".
    No other run's folder is changed. The folder is locked until the stack unwinds.
    """
    out, base = Path(knobs.out), knobs.name or knobs.model
    if knobs.eval_only and not knobs.name:
        path = Path(knobs.weights).resolve()
        base = f"{path.parent.name if path.stem in ('best', 'last') else path.stem}-eval"
    with lock_folder(out, wait=True):  # of two runs that start at once, each gets its own
        configs = read_configs(out)
        is_named = re.compile(rf"{re.escape(base)}(-\d+)?").fullmatch
        same = [name for name, config in configs.items() if config["asked"] == asked]
        same = [name for name in same if not knobs.name or is_named(name)]
        if same:
            folder, config = out / same[0], configs[same[0]]
        else:
            paths = (out / (f"{base}-{k}" if k > 1 else base) for k in itertools.count(1))
            folder = next(path for path in paths if is_free(path))
            config = {"asked": asked, "started": time.time()}
        stack.enter_context(lock_folder(folder))
        write_config(folder, config | environment)
    trained = {name: c["asked"] for name, c in configs.items() if not c["asked"]["knobs"]["eval_only"]}
    if trained and not same and not knobs.eval_only:
        name, last = trained.popitem()
        changes = describe_changes(asked, last, out / name, folder) or ["its name"]
        print0(f"new run   differs from {out / name} (which is kept) in: {', '.join(changes)}")
    return folder


def is_free(path):
    """Whether nothing is there, or only files of a run that never began."""
    if not path.is_dir():
        return not path.exists()
    return all(p.name == ".lock" or p.suffix == HALF for p in path.iterdir())


def read_configs(out):
    """The config.json of each run in the folder, the earliest run first."""
    configs = {}
    for path in sorted(out.glob("*/config.json")):
        # damaged, or of another version: such a run is kept, but not continued
        with contextlib.suppress(ValueError, KeyError, TypeError):
            config = read_json(path)
            asked = config["asked"]
            _ = asked["sources"], asked["data"], asked["knobs"]["eval_only"], float(config["started"])
            configs[path.parent.name] = config
    return dict(sorted(configs.items(), key=lambda item: item[1]["started"]))


def read_json(path):
    """The content of a file; None where it is lost or damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def write_config(folder, config):
    """Write config.json, and the sources that run. A trained run that has ended keeps its own."""
    if (folder / "metrics.json").exists() and not config["asked"]["knobs"]["eval_only"]:
        return
    git = ["git", "-C", str(sources.ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None  # in a copy without its history
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    config |= {"commit": commit, "numpy": np.__version__, "python": platform.python_version()}
    config["machine"] = f"{platform.system()} {platform.machine()}"
    write_atomic(folder / "config.json", json.dumps(config, indent=1).encode())
    for name in sources.used():
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, sources.read(name).encode())


def describe_changes(asked, before, old_folder, new_folder):
    """What differs from the run in old_folder: ["epochs 3 (was 2)", "main.py: loss = 2 * loss", …]."""
    old, new = before["knobs"], asked["knobs"]
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    changes = [f"{name} {to_text(new.get(name))} (was {to_text(old.get(name))})" for name in changed]
    if asked["data"] != before["data"] and not set(SELECTING) & set(changed):
        changes.append("other data")
    if asked.get("weights") != before.get("weights") and "weights" not in changed:
        changes.append("other content of the file of weights")
    for name, value in asked["sources"].items():
        if before["sources"].get(name) != value:
            changes.append(describe_edit(name, *(read_source(f, name) for f in (old_folder, new_folder))))
    return changes


def to_text(value):
    if isinstance(value, (list, tuple)):
        value = " ".join(map(str, value))
    return str(value) or "none"


def describe_edit(name, old, new):
    """The first new line of a file, in words. Knobs are listed anyway."""
    lines = [line for line in new.splitlines() if line.strip() and line not in old.splitlines()]
    added = [line.strip() for line in lines if not re.match(r" {4}\w+: .* = ", line)]
    if not (old and added):
        return f"{name} edited"
    more = f" (+ {len(added) - 1} more)" if len(added) > 1 else ""
    return f"{name}: {textwrap.shorten(added[0], 90, placeholder=' …')}{more}"


def read_source(folder, name):
    path = folder / "source" / name
    return path.read_text("utf-8", errors="replace") if path.exists() else ""
