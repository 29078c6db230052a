"""From knobs to a run that is ready: device, data, model, weights, folder. Prints what will run."""

import contextlib
import os
import traceback
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from moving_mnist import load_data
from support import UserError, checkpoint, evaluation, folders, sources
from support.distributed import (
    WORLD_SIZE,
    broadcast,
    choose_device,
    init_distributed,
    on_rank_0,
    print0,
)
from support.run import Run, load_weights

# Knobs that a checkpoint brings along
NETWORK = (
    "model",
    "hidden_channels",
    "kernel_size",
    "patch_size",
    "head_channels",
    "max_motion",
    "equivariant",
)
# and these, too, where the last run is scored again
DATA = "data", "video", "train_sequences", "seed", "frames_in", "frames_out"
LIMITS = {
    "train_sequences": (0, 10**9),
    "frames_in": (2, 10**6),
    "frames_out": (1, 10**6),
    "overlay": (-1, 100),
    "kernel_size": (1, 31),
    "patch_size": (1, 4096),
    "max_motion": (0, 64),
    "epochs": (1, 10**9),
    "max_minutes": (0, 10**9),
    "batch_size": (1, 10**9),
    "learning_rate": (1e-9, 1e9),
    "weight_decay": (0, 1),
    "ssim_from": (0, 1),
    "seed": (0, 2**63 - 1),
}


def check(knobs):
    """Refuse what is out of range. Raises UserError."""
    values = {field.name: getattr(knobs, field.name) for field in fields(knobs)}
    for name, (low, high) in LIMITS.items():
        if not low <= values[name] <= high:
            raise UserError(f"{name} is {values[name]}; it must be from {low} to {high}")
    start, end = knobs.grow_horizon
    if not (0 <= start <= end <= 1 or end == 0):
        raise UserError(f"grow_horizon is {start:g} {end:g}; expected two fractions of training, in order")
    size, stride, channels = knobs.video
    if not (12 <= size <= 4096 and stride >= 1 and channels in (1, 3)):
        words = "expected 12 to 4096 pixels, every Nth frame, 1 or 3 channels"
        raise UserError(f"video is {size} {stride} {channels}; {words}")
    if Path(knobs.name).name != knobs.name or knobs.name == "..":
        raise UserError(f"name is {knobs.name}; it must be one folder name, without slashes")
    layers = knobs.hidden_channels + knobs.head_channels
    if not knobs.hidden_channels or min(layers) < 1 or max(layers) > 10**6:
        raise UserError("hidden_channels and head_channels need 1 to 1,000,000 channels in each layer")


class Weights(NamedTuple):
    """Weights to start from."""

    path: Path
    state: dict  # what the file holds


@contextlib.contextmanager
def start(knobs, build, horizon, recipe):
    """`with start(…) as run`: everything a run needs, its folder held until the block ends.

    recipe: what the model changes in the default knobs.
    """
    check(knobs)
    differing = folders.describe_knobs(knobs, replace(type(knobs)(), model=knobs.model, **recipe))
    device, dtype, precision = choose_device(knobs.device, knobs.precision)
    init_distributed(device)
    if (first := broadcast((dtype, precision)))[0] != dtype:
        words = f"this process computes in {precision}, the first in {first[1]}"
        raise UserError(f"{words}; set precision to fp32")
    knobs, weights = find_weights(knobs)
    n_frames = knobs.frames_in + knobs.frames_out
    data = load_data(knobs.data, knobs.train_sequences, knobs.seed, n_frames, knobs.video)
    if (first := broadcast(data.name)) != data.name:
        raise UserError(f"this process has the {data.name}, the first the {first}; give all the same data")
    knobs = fit_to_data(knobs, data)
    model = build_checked(knobs, build, data, device)
    if weights:
        load_weights(model, weights.state["model"], weights.path)
    environment = {
        "device": str(device),
        "processes": WORLD_SIZE,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "torch": str(torch.__version__),
        "kernels": attach(knobs, model.train(not knobs.eval_only), device, dtype),
    }
    if not knobs.eval_only:
        data.training.fit_on_gpu(device)
    describe(knobs, data, model, weights, environment)
    # in the first process, as other machines may not have the file of weights
    kept = (*NETWORK, *DATA, "eval_only", "precision") if knobs.eval_only else None
    asked = on_rank_0(folders.describe_identity, knobs, data, weights and weights.path, kept)
    with choose_folder(knobs, asked, weights) as folder:
        on_rank_0(folders.write_facts, folder, {"not_default": differing, **environment}, model)
        yield Run(
            knobs=knobs,
            folder=folder,
            asked=asked,
            environment=environment,
            data=data,
            model=model,
            device=device,
            dtype=dtype,
            horizon=horizon,
            scored_step=weights.state["step"] if weights else 0,
        )


def describe(knobs, data, model, weights, environment):
    """Print what will run."""
    parameters = sum(p.numel() for p in model.parameters())
    words = f", weights of {weights.path}" if weights else ""
    print0(f"model     {knobs.model}, {parameters:,} parameters{words}")
    words = "{device}, {precision}, threads: {threads}, processes: {processes}, torch {torch}"
    print0(f"device    {words.format(**environment)}\nkernels   {environment['kernels']}")
    on_gpu = " on the GPU" if isinstance(getattr(data.training, "frames", None), torch.Tensor) else ""
    splits = (f"training{on_gpu}", data.training), ("validation", data.validation), ("test", data.test)
    print0(f"data      {data.name}: {', '.join(f'{len(split):,} {name}' for name, split in splits)}")
    T, C, H, W = data.training.shape
    some = data.training[np.arange(min(len(data.training), 50))]
    color = {1: "grey", 3: "color"}.get(C, f"{C} channels")
    print0(f"          sequences of {T} frames of {H}×{W}, {color}, values {some.min()} to {some.max()}")


def choose_folder(knobs, asked, weights):
    """The folder of the run, held. Evaluation alone has one of its own, beside that of the weights' run."""
    if not knobs.eval_only:
        return folders.open_folder(knobs.out, knobs.name or knobs.model, asked)
    path = weights.path.resolve()
    base = f"{path.parent.name if path.stem in ('best', 'last') else path.stem}-eval"
    return folders.open_folder(knobs.out, knobs.name if knobs.weights and knobs.name else base, asked)


def find_weights(knobs):
    """(the knobs, with those of the weights' network; the weights, or None).

    Without --weights, evaluation alone takes the last run, and its data as well.
    """
    if not (knobs.weights or knobs.eval_only):
        return knobs, None
    out, path = Path(knobs.out), Path(knobs.weights)
    if not knobs.weights:
        configs = on_rank_0(folders.read_configs, out)
        usable = lambda name: (out / name / "best.pt").exists() and knobs.name in ("", name)
        names = on_rank_0(lambda: list(filter(usable, configs)))
        if not names:
            where = f"no run {knobs.name} in {out}" if knobs.name else f"no run in {out}"
            raise UserError(f"{where} has weights to evaluate; train a run, or give --weights")
        path = out / names[-1] / "best.pt"
        print0(f"weights   {path}, with the data and the frames of its run")
    state = on_rank_0(checkpoint.load, path)
    print_edited(state)
    brought = NETWORK if knobs.weights else NETWORK + DATA
    return with_knobs_of(knobs, state, path, brought), Weights(path, state)


def print_edited(state):
    if edited := sources.edited_since(state.get("sources", {})):
        print0(f"edited    since these weights were trained: {', '.join(edited)}")


def with_knobs_of(knobs, state, path, names=NETWORK):
    """The knobs, with these names taken from a checkpoint. Refuses flags that say something else."""
    found = {}
    for name in names:
        if name not in state["knobs"]:
            raise UserError(f"{path} is of an earlier version of this script, without {name}")
        then, now, default = state["knobs"][name], getattr(knobs, name), getattr(type(knobs), name)
        found[name] = then = tuple(then) if isinstance(then, list) else then
        if now not in (then, default):
            raise UserError(f"{path} has {name} {then}, not {now}; leave out --{name}")
    return replace(knobs, **found)


def fit_to_data(knobs, data):
    """Choose overlay if it is -1. Of sequences shorter than 20 frames, the first half is the input."""
    n = data.training.shape[0]
    if knobs.overlay < 0:
        knobs = replace(knobs, overlay=2 if data.is_moving_mnist else 0)
    default = type(knobs)
    if (knobs.frames_in, knobs.frames_out) == (default.frames_in, default.frames_out) and 3 <= n < 20:
        knobs = replace(knobs, frames_in=n - n // 2, frames_out=n // 2)
        print0(f"frames    the data has {n} a sequence: {knobs.frames_in} in, {knobs.frames_out} out")
    return knobs


def build_checked(knobs, build, data, device):
    """The model. Raises UserError where knobs, data and model do not fit together."""
    n_frames, channels, height, width = data.training.shape
    if n_frames < knobs.frames_in + knobs.frames_out:
        wanted = f"frames_in {knobs.frames_in} and frames_out {knobs.frames_out}"
        raise UserError(f"{data.name} has {n_frames} frames a sequence, too few for {wanted}")
    if min(height, width) < 12:
        raise UserError(f"frames are {height}×{width}; SSIM and optical flow need at least 12×12")
    if not (WORLD_SIZE <= knobs.batch_size <= len(data.training) or knobs.eval_only):
        limits = f"{WORLD_SIZE} (processes) to {len(data.training)} (training sequences)"
        raise UserError(f"batch_size is {knobs.batch_size}; it must be from {limits}")
    if knobs.model != "seq2seq" and (height % knobs.patch_size or width % knobs.patch_size):
        raise UserError(f"frames of {height}×{width} cannot be cut into patches of {knobs.patch_size}")
    torch.manual_seed(knobs.seed)
    try:
        model = build(knobs, channels).to(device)
        with torch.no_grad():  # a dry run on one sequence
            past, _ = evaluation.split_frames(data.training[np.arange(1)], knobs.frames_in, 0, device)
            model(past, 1)
    except ValueError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        if Path(where.filename).parent != sources.ROOT or not (where.line or "").startswith("raise"):
            raise  # Python's or torch's own: a bug in an edited network
        raise UserError(str(error)) from error
    return model


def attach(knobs, model, device, dtype):
    """Open the door to the fast kernels, if there is one → what is in use, in words."""
    if not knobs.fast:
        return "plain PyTorch, as --no_fast asks for"
    if not os.path.exists(Path(__file__).with_name("fast")):
        return "plain PyTorch, as support/fast was deleted"
    from support import fast

    return fast.attach(model, device, dtype)


def load_model(path, knobs, build):
    """The network of a checkpoint, with its weights and the fast kernels, on the CPU or the GPU."""
    given = checkpoint.load(path, "give another file")
    knobs = with_knobs_of(knobs, given, path)
    device, _, _ = choose_device(knobs.device, "fp32")
    model = build(knobs, given["channels"]).to(device).eval()
    load_weights(model, given["model"], path)
    print_edited(given)
    attach(knobs, model, device, torch.float32)
    model.frames_in, model.channels = given["knobs"]["frames_in"], given["channels"]
    forecast = evaluation.make_forecast(model, contextlib.nullcontext)

    def forecast_frames(past, n):
        past = torch.as_tensor(past, dtype=torch.float32)
        return forecast(past.to(device), n)[0].to(past.device)

    model.forecast = forecast_frames
    return model
