"""A run's folder: how a run begins or goes on, what each evaluation leaves there, and how it ends.

`run` is what a checkpoint holds beside the weights and the optimisers, as a dict; RUN has it by example.
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import beyond
import checkpoint
import figures
from compare import compare
from download import is_moving_mnist
from evaluate import BASELINES, CROSS_ENTROPY, curve, cut, draw, draw_ranked, table, test, write_results
from knobs import names_under, wrong
from machine import RANK, from_rank_0, say
from moving_mnist import FreshMovingMNIST, MovingMNIST, shape_of

NOT_THE_EXPERIMENT = {"out", "eval_only", "save_minutes"}  # may change when a run goes on
DRAWN = "train_loss", "val_loss", "val_mse_per_frame", *(f"val_mse_{who}" for who in BASELINES)  # of a row of log.csv
# What a checkpoint has to hold, by example: in a list, each entry is as the first (see checkpoint.like).
# begin_or_go_on starts with the numbers that it does not set itself
RUN = {"knobs": {}, "code": {}, "step": 0, "steps": 0, "steps_per_epoch": 0, "best": 0.0,
       "history": [{"sequences": 0, **dict.fromkeys(DRAWN, 0.0)}],
       "timing": [{"minutes": 0.0}], "baselines": {"black": [0.0], "copy_last": [0.0]},
       "loss_sum": 0.0, "loss_count": 0, "seconds": 0.0}  # fmt: skip


class Setup(NamedTuple):
    """What stays the same during a run."""

    knobs: Any  # main.Knobs
    folder: Path
    data: str  # its name, for every output
    training: MovingMNIST | FreshMovingMNIST
    validation: MovingMNIST | FreshMovingMNIST
    test_split: MovingMNIST
    device: torch.device
    autocast: Callable
    forecast: Callable

    @property
    def span(self):
        return self.knobs.frames_in, self.knobs.frames_out

    @property
    def validated(self):
        """What the validation split is of, for pictures."""
        array = self.data.partition(", trained on")[0]
        return (
            "fresh sequences of held-out digits" if self.knobs.data == "fresh" else f"validation split of the {array}"
        )


def starting_weights(knobs):
    """(knobs, those of the network from the file of weights; its content; its path). Without a file two Nones."""
    if not knobs.weights and not knobs.eval_only:
        return knobs, None, None
    path = Path(knobs.weights or Path(knobs.out) / knobs.model / "best.pt")
    if RANK == 0 and not knobs.eval_only and not os.path.exists(path):
        for last in Path(knobs.out).glob("*/last.pt"):  # a run that goes on without the file it began with
            with suppress(checkpoint.CheckpointError):
                path = last if str(checkpoint.load(last)["knobs"].get("weights")) == knobs.weights else path
    given = from_rank_0(checkpoint.load(path) if RANK == 0 else None)
    names = names_under("model", knobs)
    if silent := [name for name in names if name not in given["knobs"]]:
        raise checkpoint.CheckpointError(
            f"{path} is of an earlier version of this script, without {', '.join(silent)}; "
            "add what it trained with to its knobs, or give another --out or --weights"
        )
    network = {name: given["knobs"][name] for name in names}
    for f in dataclasses.fields(knobs):
        if f.name in network and (problem := wrong(f, network[f.name])):
            raise checkpoint.CheckpointError(f"{path} is of no network of this script: {problem}")
    return dataclasses.replace(knobs, **network), given, path


def load_weights(model, weights, path):
    try:
        model.load_state_dict(weights)
    except Exception as error:  # whoever made the file chose what its reading meets
        raise checkpoint.CheckpointError(
            f"{path} holds other weights than the model has: the data has other channels, or my_model.py or "
            "convlstm.py has changed since; undo the change, or give another --out or --weights"
        ) from error


def data_identity(knobs, training, validation, test_split, data):
    """The data's name and size, and a digest of the first and the last sequence of what is scored."""
    shape, sha = "×".join(str(n) for n in shape_of(training)), hashlib.sha256()
    for split in (validation, test_split):
        sha.update(split[np.array([0, len(split) - 1])].numpy())
    return f"{knobs.data} ({data}, {len(training):,} sequences of {shape}, sha256 of four {sha.hexdigest()[:16]})"


def refuse_other_data(knobs, identity, given, path):
    """A training's own results are of its own data: refuse others in their place."""
    then = given["knobs"]
    now = {name: getattr(knobs, name) for name in ("frames_in", "frames_out", "video_stride")}
    now["data"] = identity
    what = lambda value: re.sub(r"[\d,]+ sequences of ", "", str(value))  # no score depends on how many
    if other := [f"{k} was {then.get(k)} and is now {now[k]}" for k in now if what(then.get(k)) != what(now[k])]:
        raise checkpoint.CheckpointError(
            f"{path} has scores of its training's data, which these would replace: {'; '.join(other)}. "
            f"--weights {path} scores it into a folder of its own"
        )


def begin_or_go_on(setup, model, optimisers):
    """run, as it begins or as the last checkpoint has it, and model and optimisers with it."""
    knobs, path, steps_per_epoch = setup.knobs, setup.folder / "last.pt", len(setup.training) // setup.knobs.batch_size
    identity = data_identity(knobs, setup.training, setup.validation, setup.test_split, setup.data)
    asked = {**dataclasses.asdict(knobs), "data": identity}
    state = from_rank_0(checkpoint.resume(path, asked, NOT_THE_EXPERIMENT) if RANK == 0 else None)
    steps = 0 if knobs.max_minutes else knobs.epochs * steps_per_epoch  # 0: not settled yet
    code = checkpoint.code()
    run = {**RUN, "knobs": asked, "code": code, "steps": steps, "steps_per_epoch": steps_per_epoch,
           "best": math.inf, "history": [], "timing": [], "baselines": {}}  # fmt: skip
    if state:
        load_weights(model, state.pop("model"), path)
        try:
            for optimiser, saved in zip(optimisers, state.pop("optimisers"), strict=True):
                load_optimiser(optimiser, saved)
            if odd := [part for part in run if not checkpoint.like(state[part], RUN[part])]:
                raise ValueError(f"{', '.join(odd)} cannot be")
            now = {"knobs": asked, "steps": state["steps"] or steps, "steps_per_epoch": steps_per_epoch}
            run = {part: state[part] for part in run} | now
        except Exception as error:  # whoever made the file chose what its reading meets
            raise checkpoint.CheckpointError(
                f"{path} is no checkpoint of this version of main.py ({error}); give another --out"
            ) from error
        if edited := [name for name, mark in code.items() if run["code"].get(name) != mark]:
            say(f"edited    since this run began: {', '.join(edited)}; a new --out runs the edited code from the start")
        return run
    run["baselines"] = {who: baseline(setup, who) for who in ("black", "copy_last")}
    return run


MOMENTS = {torch.optim.Muon: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}


def load_optimiser(optimiser, saved):
    """Raises for moments of other weights, and for other options, which would silently replace those of the code."""
    options = lambda: [{k: repr(v) for k, v in g.items() if k not in ("params", "lr")} for g in optimiser.param_groups]
    before = options()
    optimiser.load_state_dict(saved)
    if options() != before:
        raise ValueError("its optimiser has other options")
    needed = next((names for kind, names in MOMENTS.items() if isinstance(optimiser, kind)), None)
    for weight, moments in optimiser.state.items() if needed else ():  # optimisers of other kinds keep what they like
        fit = all(moment.shape in ((), weight.shape) for moment in moments.values())
        if not (fit and moments.keys() >= needed):  # and amsgrad's
            raise ValueError("its optimiser has other moments")


def baseline(setup, who):
    return curve(BASELINES[who], setup.validation, *setup.span, setup.device)


def write_config(setup, begins, facts):
    """config.json, and when a run begins the files that say what is run, as they are."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        facts["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        facts["commit"] = None  # a copy without its history
    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    versions["machine"] = f"{platform.system()} {platform.machine()}"
    facts = {**dataclasses.asdict(setup.knobs), **facts, **versions}
    checkpoint.publish(setup.folder / "config.json", json.dumps(facts, indent=1).encode())
    for source in ("main.py", "my_model.py", "symmetry.py", "advection.py", "convlstm.py") if begins else ():
        checkpoint.publish(setup.folder / source, Path(__file__).with_name(source).read_bytes())


def note(setup, run, scores, rate, speed, model):
    """Log the evaluation, keep the weights if they are the best so far, and redraw the pictures of validation."""
    knobs, folder, history = setup.knobs, setup.folder, run["history"]
    mse, baselines = scores["mse_per_frame"], {who: float(np.mean(c)) for who, c in run["baselines"].items()}
    pixels = knobs.frames_out * math.prod(shape_of(setup.validation)[1:])
    seen = run["step"] * knobs.batch_size
    row = {
        "data": setup.data,
        "epoch": round(run["step"] / run["steps_per_epoch"], 3),
        "step": run["step"],
        "sequences": seen,
        "learning_rate": rate,
        "train_loss": run["loss_sum"] / run["loss_count"],
        "val_loss": float(scores[CROSS_ENTROPY]) / pixels,
        "val_mse_per_frame": float(mse.mean()),
        **{f"val_mse_{who}": value for who, value in baselines.items()},
    }
    history.append(row)
    minutes = round(run["seconds"] / 60, 3)  # apart from the log, which is the same whenever the run is repeated
    run["timing"].append({"step": run["step"], "minutes": minutes, "sequences_per_second": round(speed, 1)})
    tqdm.write(f"epoch {row['epoch']:<5g} train loss {row['train_loss']:.4f}, validation loss {row['val_loss']:.4f}, "
               f"MSE {row['val_mse_per_frame']:6.1f} (black {baselines['black']:.1f}, last frame copied "
               f"{baselines['copy_last']:.1f})  {speed:.0f} sequences/s")  # fmt: skip
    if row["val_mse_per_frame"] < run["best"]:
        run["best"] = row["val_mse_per_frame"]
        best = {"knobs": run["knobs"], "step": run["step"], "val_mse_per_frame": run["best"]}
        checkpoint.save(folder / "best.pt", {**best, "model": model.state_dict()})
    log(setup, run)
    curves = {knobs.model: mse.tolist(), **run["baselines"]}
    figures.per_frame(folder / "per_frame.png", {setup.validated: curves})
    show(setup, f"after {seen:,} training sequences")


def log(setup, run):
    write_csv(setup.folder / "log.csv", run["history"])
    write_csv(setup.folder / "timing.csv", run["timing"])
    draw_loss(setup, run["history"])


def draw_loss(setup, history):
    """history: the rows of log.csv."""
    baselines = {who: float(history[-1][f"val_mse_{who}"]) for who in BASELINES}
    rows = [{key: float(row[key]) for key in ("sequences", *DRAWN)} for row in history]
    figures.loss(setup.folder / "loss.png", rows, baselines, f"{setup.knobs.model}, {setup.data}")


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[-1].keys(), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.publish(path, text.getvalue().encode())


def show(setup, when):
    draw(setup.folder, setup.forecast, setup.validation, *setup.span, setup.device, f"{setup.validated}, {when}")


def conclude(setup, model, step):
    """Score the weights on the test split and draw what they forecast; metrics.json comes after them."""
    knobs, folder, forecast, data, test_split = setup.knobs, setup.folder, setup.forecast, setup.data, setup.test_split
    scores, order = test(knobs.model, forecast, test_split, *setup.span, setup.device)
    first = test_split[np.arange(1)]
    results = {"data": data, "split": test_split.split, "sequences": len(test_split),
               "first_sequence": hashlib.sha256(first.numpy()).hexdigest()[:16],
               "frames_in": knobs.frames_in, "frames_out": knobs.frames_out, "validation": setup.validated,
               "model": knobs.model, "step": step, "weights": checkpoint.digest(model),
               "parameters": sum(p.numel() for p in model.parameters()), "scores": scores}  # fmt: skip
    if is_moving_mnist(knobs, test_split):
        results["beyond"] = beyond.beyond(folder, knobs.model, forecast, *setup.span, setup.device, knobs.patch)
    if RANK == 0:
        if knobs.eval_only:
            with suppress(OSError, LookupError, TypeError, ValueError, csv.Error):  # no log, or a damaged one
                draw_loss(setup, list(csv.DictReader((folder / "log.csv").read_text("utf-8").splitlines())))
        show(setup, "best weights")
        which = data if test_split.split == "all" else f"{data}, {test_split.split} split"
        draw_ranked(folder, forecast, test_split, order, *setup.span, setup.device, which)
        write_results(folder, results, forecast(cut(first, *setup.span, setup.device)[0], knobs.frames_out)[0][0])
        compare(Path(knobs.out), results, first[0].numpy())
    say(f"\n{report(results)}\npictures  {folder}{os.sep}")


def report(results):
    """metrics.json, for people."""
    others = f"\n\n{beyond.table(results['beyond'])}" if results.get("beyond") else ""
    return f"{table(results)}{others}\n\nweights   {results['weights']}"


def scores_of(folder):
    """The report of its metrics.json, or None where there is none that can be read: then it is made again."""
    try:
        return report(json.loads((folder / "metrics.json").read_bytes()))
    except Exception:  # whatever damaged the file chose what its reading meets
        return None
