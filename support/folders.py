"""Folders of runs: the same knobs, code and data find their folder again, anything else gets a new one."""

import dataclasses
import hashlib
import itertools
import json
import platform
import re
import subprocess
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from support import checkpoint, sources
from support.checkpoint import write_atomic

SELECTING = "data", "train_sequences", "video"  # knobs that choose what is read of the data
NOT_THE_EXPERIMENT = "out", "name", "device", "fast"  # knobs that do not make another experiment


def describe_identity(knobs, data):
    """What makes a run the same run: knobs, data, sources, and the content of the file of weights."""
    sha = hashlib.sha256()
    for split in (data.training, data.validation, data.test):
        sha.update(split.content)
    values = {k: v for k, v in dataclasses.asdict(knobs).items() if k not in NOT_THE_EXPERIMENT}
    shape = "×".join(map(str, data.training.shape))
    words = f"{data.name}, sequences of {shape}, sha256 {sha.hexdigest()[:16]}"
    hashes = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in sources.used().items()}
    asked = {"knobs": values, "data": words, "sources": hashes}
    if knobs.weights:
        asked["weights"] = hashlib.sha256(Path(knobs.weights).read_bytes()).hexdigest()
    return json.loads(json.dumps(asked))  # as it comes back from config.json


def to_text(value):
    return " ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value) or "none"


def describe_changes(asked, before, old_folder, new_folder):
    """What differs from the run in old_folder: ["epochs 3 (was 2)", "main.py: loss = 2 * loss", …]."""
    old, new = before["knobs"], asked["knobs"]
    changed = [name for name in new if old.get(name) != new[name]]
    changes = [f"{name} {to_text(new[name])} (was {to_text(old.get(name))})" for name in changed]
    if asked["data"] != before["data"] and not set(SELECTING) & set(changed):
        changes.append("other data")
    if asked.get("weights") != before.get("weights") and "weights" not in changed:
        changes.append("other content of the file of weights")
    for name, value in asked["sources"].items():
        if before["sources"].get(name) != value:
            changes.append(describe_edit(name, read_source(old_folder, name), read_source(new_folder, name)))
    return list(filter(None, changes))


def describe_edit(name, old, new):
    """The first new line of a file, in words; nothing where only knobs differ, which are listed anyway."""
    before, after = old.splitlines(), new.splitlines()
    added = [line for line in after if line.strip() and line not in before]
    removed = [line for line in before if line.strip() and line not in after]
    is_knob = lambda line: "class Knobs" in new and re.match(r" {4}\w+: .* = ", line)
    code = [line.strip() for line in added if not is_knob(line)]
    if not old or not added:
        return f"{name} edited"
    if not code:
        return "" if all(map(is_knob, removed)) else f"{name} edited"
    more = f" (+ {len(code) - 1} more)" if len(code) > 1 else ""
    return f"{name}: {textwrap.shorten(code[0], 90, placeholder=' …')}{more}"


def read_source(folder, name):
    path = folder / "source" / name
    return path.read_text("utf-8", errors="replace") if path.exists() else ""


def choose_folder(knobs, asked, facts, stack):
    """The folder of the run that was asked for: an earlier one, or a new one named base, base-2, …

    It is locked until the stack unwinds. No other run's folder is changed. If weights are only scored,
    base is their folder or file, and "-eval". facts: more for config.json.
    """
    out, base, path = Path(knobs.out), knobs.name or knobs.model, Path(knobs.weights).resolve()
    if knobs.eval_only and not knobs.name:
        base = f"{path.parent.name if path.stem in ('best', 'last') else path.stem}-eval"
    with checkpoint.lock_folder(out, wait=True):  # of two runs that start at once, each gets its own
        configs = read_configs(out)
        fits = lambda name: not knobs.name or re.fullmatch(rf"{re.escape(base)}(-\d+)?", name)
        same = [name for name, config in configs.items() if config["asked"] == asked and fits(name)]
        is_left = lambda p: p.name == ".lock" or checkpoint.is_half_written(p)  # by a run that never began
        is_taken = lambda f: not all(map(is_left, f.iterdir())) if f.is_dir() else f.exists()
        numbered = (out / (f"{base}-{k}" if k > 1 else base) for k in itertools.count(1))
        folder = out / same[0] if same else next(f for f in numbered if not is_taken(f))
        config = configs[same[0]] if same else {"asked": asked, "started": time.time()}
        stack.enter_context(checkpoint.lock_folder(folder))
        write_facts(folder, config | facts)
    trained = [(name, c["asked"]) for name, c in configs.items() if not c["asked"]["knobs"]["eval_only"]]
    if trained and not same and not knobs.eval_only:
        name, last = trained[-1]
        words = "only its name" if asked == last else "lines of Knobs, but with the same values here"
        changes = describe_changes(asked, last, out / name, folder) or [words]
        print(f"new run   differs from {out / name} (which is kept) in: {', '.join(changes)}", flush=True)
    return folder


def read_configs(out):
    """The config.json of each run in the folder, the earliest run first."""
    configs = {}
    for path in out.glob("*/config.json"):
        with suppress(Exception):  # damaged, or of another version: such a run is kept, but not continued
            config = json.loads(path.read_text("utf-8"))
            asked = config["asked"]
            _ = asked["sources"], asked["data"], asked["knobs"]["eval_only"], float(config["started"])
            configs[path.parent.name] = config
    return dict(sorted(configs.items(), key=lambda item: item[1]["started"]))


def write_facts(folder, config):
    """Write config.json, and the sources that run. A trained run that has ended keeps its own."""
    if (folder / "metrics.json").exists() and not config["asked"]["knobs"]["eval_only"]:
        return
    git = ["git", "-C", str(sources.ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None  # in a copy without its history
    with suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    config |= {"commit": commit, "numpy": np.__version__, "python": platform.python_version()}
    config["machine"] = f"{platform.system()} {platform.machine()}"
    write_atomic(folder / "config.json", json.dumps(config, indent=1).encode())
    for name, text in sources.used().items():
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
