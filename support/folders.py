"""Folders of runs: the same knobs, code and data find their folder again, anything else gets a new one."""

import dataclasses
import hashlib
import json
import platform
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from support import checkpoint
from support.checkpoint import write_atomic
from support.distributed import on_rank_0

ROOT = Path(__file__).parent.parent
MODEL_SOURCES = "my_model.py", "motion.py", "convlstm.py"
# As imported: what is edited later on the disk is not what runs
SOURCES = {
    name: (ROOT / name).read_text("utf-8")
    for name in ("main.py", *MODEL_SOURCES, "moving_mnist.py", "metrics.py")
}
NOT_THE_EXPERIMENT = "out", "name", "device", "fast"  # knobs that may change when a run resumes


def source_hashes():
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in SOURCES.items()}


def describe_identity(knobs, data, weights=None):
    """What makes a run the same run: the knobs, the data, the sources and the file of weights."""
    sha = hashlib.sha256(data.training[np.arange(1)].numpy())
    for split in (data.validation, data.test):
        sha.update(split[np.array([0, len(split) - 1])].numpy())
    kept = {k: v for k, v in dataclasses.asdict(knobs).items() if k not in NOT_THE_EXPERIMENT}
    if weights:
        kept["weights"] = f"{weights}, sha256 {hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}"
    shape = "×".join(map(str, data.training.shape))
    words = f"{data.name}, sequences of {shape}, sha256 of five {sha.hexdigest()[:16]}"
    asked = {"knobs": kept, "data": words, "sources": source_hashes()}
    return json.loads(json.dumps(asked))  # as it comes back from config.json


def describe_changes(asked, before, sources=tuple(SOURCES)):
    """What differs from another run, in words: "hidden_channels 64 64 (was 96 96), my_model.py edited"."""
    text = lambda v: " ".join(map(str, v)) or "none" if isinstance(v, list) else str(v) or "none"
    old, new = before["knobs"], asked["knobs"]
    changes = [f"{k} {text(v)} (was {text(old.get(k))})" for k, v in new.items() if old.get(k) != v]
    changes += [] if asked["data"] == before["data"] else ["other data"]
    edited = [k for k in sources if before["sources"].get(k) != asked["sources"][k]]
    return ", ".join(changes + [f"{name} edited" for name in edited])


@contextmanager
def open_folder(out, base, asked):
    """Hold the folder of the run that was asked for: an earlier one, or a new one named base, base-2, …"""
    with ExitStack() as stack:
        yield on_rank_0(choose_folder, Path(out), base, asked, stack)


@contextmanager
def hold(folder):
    """Hold an earlier run's folder."""
    with ExitStack() as stack:
        on_rank_0(lambda: stack.enter_context(checkpoint.lock_folder(folder)))
        yield folder


def choose_folder(out, base, asked, stack):
    """The folder, locked until the stack unwinds. Nothing in `out` is overwritten."""
    with checkpoint.lock_folder(out, wait=True):  # of two runs that start at once, each gets its own
        configs = read_configs(out)
        for name, config in configs.items():
            if config["asked"] == asked and base in (name.rpartition("-")[0], name, asked["knobs"]["model"]):
                stack.enter_context(checkpoint.lock_folder(out / name))
                checkpoint.remove_strays(out / name)
                return out / name
        number, folder = 1, out / base
        while folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
            number += 1
            folder = out / f"{base}-{number}"
        stack.enter_context(checkpoint.lock_folder(folder))
        first = next(iter(configs.values()), None)
        changes = describe_changes(asked, first["asked"]) if first else ""
        config = {"asked": asked, "changes": changes, "started": time.time()}
        write_atomic(folder / "config.json", json.dumps(config, indent=1).encode())
    if configs:
        name, last = list(configs.items())[-1]
        changes = describe_changes(asked, last["asked"]) or "only its name"
        print(f"new run   differs from {out / name}, which is kept: {changes}", flush=True)
    return folder


def read_configs(out):
    """The config.json of each run in the folder, the earliest run first."""
    configs = {}
    for path in out.glob("*/config.json"):
        try:
            config = json.loads(path.read_text("utf-8"))
            configs[path.parent.name] = config
            config["asked"]["knobs"], config["asked"]["sources"], config["asked"]["data"]
            config["changes"], float(config["started"])
        except Exception:  # damaged, or of another version: such a run is kept, but not continued
            configs.pop(path.parent.name, None)
    return dict(sorted(configs.items(), key=lambda item: item[1]["started"]))


def write_facts(folder, environment, model):
    """Add facts to config.json, and keep the sources that run. A run that has ended keeps its own."""
    if (folder / "metrics.json").exists():
        return
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None  # a copy without its history
    config = json.loads((folder / "config.json").read_text("utf-8")) | environment
    config["parameters"] = sum(p.numel() for p in model.parameters())
    config |= {"commit": commit, "numpy": np.__version__, "python": platform.python_version()}
    config["machine"] = f"{platform.system()} {platform.machine()}"
    write_atomic(folder / "config.json", json.dumps(config, indent=1).encode())
    (folder / "source").mkdir(exist_ok=True)
    for name, text in SOURCES.items():
        write_atomic(folder / "source" / name, text.encode())
