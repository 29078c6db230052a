"""From knobs to a run that is ready: device, data, model, weights, folder. Prints what will run."""

import contextlib
import os
import traceback
import types
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import torch
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from moving_mnist import is_array, load_data
from support import UserError, checkpoint, evaluation, folders, sources
from support.checkpoint import load_weights, report_edits
from support.distributed import WORLD_SIZE, broadcast, choose_device, init_distributed, on_rank_0, print0
from support.run import Run

# Knobs that a checkpoint brings along
NETWORK = "model", "hidden_channels", "kernel_size", "patch_size", "head_channels", "max_motion"
NETWORK += ("equivariant",)
# the smallest and the largest value
LIMITS = {
    (0, 1): ("weight_decay", "ssim_from"),
    (1, 10**6): ("frames_out", "kernel_size", "patch_size", "batch_size", "epochs"),
    (2, 10**6): ("frames_in",),
    (-1, 100): ("overlay",),
    (0, 64): ("max_motion",),
    (0, 10**9): ("train_sequences", "max_minutes"),
    (0, 2**62): ("seed",),
    (1e-9, 1e9): ("learning_rate",),
}


def check(knobs):
    """Refuse what is out of range or, by an edit of main.py, of another type. Raises UserError."""
    for name, hint in get_type_hints(type(knobs)).items():  # tyro checks flags only
        value = getattr(knobs, name)
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{name} is {value!r}: {reason}; see its type in Knobs, main.py") from error
    for (low, high), names in LIMITS.items():
        for name in names:
            if not low <= getattr(knobs, name) <= high:
                raise UserError(f"{name} is {getattr(knobs, name)}; it must be from {low} to {high}")
    if knobs.eval_only and not knobs.weights:
        raise UserError("eval_only needs weights: add --weights FILE, such as results/my_model/best.pt")
    start, end = knobs.grow_horizon
    if not (0 <= start <= end <= 1 or end == 0):
        raise UserError(f"grow_horizon is {start:g} {end:g}; expected two fractions of training, in order")
    *size, stride, channels = knobs.video
    if not (16 <= min(size) <= max(size) <= 4096 and stride >= 1 and channels in (1, 3)):
        words = "expected height and width (16 to 4096), frame step, 1 or 3 channels"
        raise UserError(f"video is {' '.join(map(str, knobs.video))}; {words}")
    if knobs.video != type(knobs).video and is_array(knobs.data):
        raise UserError(f"video is for data that are videos, and data is {knobs.data}; leave out --video")
    if Path(knobs.name).name != knobs.name or knobs.name == ".." or not knobs.name.isprintable():
        raise UserError(f"name is {knobs.name!a}; it must be one folder name, without slashes")
    layers = knobs.hidden_channels + knobs.head_channels
    if not knobs.hidden_channels or min(layers) < 1 or max(layers) > 10**6:
        raise UserError("hidden_channels and head_channels need 1 to 1,000,000 channels in each layer")


@contextlib.contextmanager
def start(knobs, build, horizon, recipe):
    """`with start(…) as run`: everything a run needs, its folder held until the block ends.

    recipe: what the model changes in the default knobs.
    """
    sources.used()  # reads files in folders of yours, before an edit can change them
    check(knobs)
    device, dtype, precision = choose_device(knobs.device, knobs.precision)
    init_distributed(device)
    if (first := broadcast((dtype, precision)))[0] != dtype:
        words = f"this process computes in {precision}, the first in {first[1]}"
        raise UserError(f"{words}; set precision to fp32")
    weights = on_rank_0(checkpoint.load, knobs.weights) if knobs.weights else None
    if weights:
        model, knobs = knobs.model, with_knobs_of(knobs, weights, recipe)
        if knobs.model != model and not knobs.eval_only:
            raise UserError(f"{knobs.weights} is of {knobs.model}: add --model {knobs.model}, for its recipe")
    if knobs.eval_only:
        words = f"{knobs.frames_in} frames in, {knobs.frames_out} out"
        print0(f"weights   {knobs.weights}: {words}; trained on {weights['knobs'].get('data')}")
    n_frames = knobs.frames_in + knobs.frames_out
    data = load_data(knobs.data, knobs.train_sequences, knobs.seed, n_frames, knobs.video)
    if (first := broadcast(data.name)) != data.name:
        raise UserError(f"this process has {data.name}, the first has {first}; give all the same data")
    if knobs.overlay < 0:
        knobs = replace(knobs, overlay=2 if data.is_moving_mnist else 0)
    model = build_checked(knobs, build, data, device)
    if weights:
        load_weights(model, weights, knobs.weights)
        report_edits(model, weights, knobs.weights)
    environment = {"device": str(device), "processes": WORLD_SIZE, "threads": torch.get_num_threads()}
    environment |= {"precision": precision, "torch": str(torch.__version__)}
    environment["kernels"] = attach(knobs, model.train(not knobs.eval_only), device, dtype)
    asked = on_rank_0(folders.describe_identity, knobs, data)
    if not knobs.eval_only and knobs.data != "fresh":  # fresh sequences are made on the CPU
        data.training.fit_on_gpu(device)
    describe(knobs, data, model, environment, recipe)
    with contextlib.ExitStack() as stack:
        folder = on_rank_0(folders.choose_folder, knobs, asked, environment, stack)
        step = weights["step"] if weights else 0
        yield Run(knobs, folder, asked, environment, data, model, device, dtype, horizon, step)


def describe(knobs, data, model, environment, recipe):
    parameters = sum(p.numel() for p in model.parameters())
    words = f", weights of {knobs.weights}" if knobs.weights else ""
    print0(f"model     {knobs.model}, {parameters:,} parameters{words}")
    used = [f"{k} {folders.to_text(v)}" for k, v in recipe.items() if getattr(knobs, k) == v]
    if used and not knobs.eval_only:
        print0(f"recipe    {', '.join(used)} (RECIPES of main.py)")
    words = "{device}, {precision}, threads: {threads}, processes: {processes}, torch {torch}"
    print0(f"device    {words.format(**environment)}\nkernels   {environment['kernels']}")
    on_gpu = " (stored on the GPU)" if isinstance(data.training.content, torch.Tensor) else ""
    splits = (f"training{on_gpu}", data.training), ("validation", data.validation), ("test", data.test)
    print0(f"data      {data.name}: {', '.join(f'{len(split):,} {name}' for name, split in splits)}")
    T, C, H, W = data.training.shape
    some = data.training[np.arange(min(len(data.training), 50))]
    color = {1: "grey", 3: "color"}.get(C, f"{C} channels")
    print0(f"          sequences of {T} frames of {H}×{W}, {color}, values {some.min()} to {some.max()}")


def with_knobs_of(knobs, weights, recipe):
    """The knobs, with those of the network from a checkpoint.

    Raises UserError for a value that differs, unless it is the default or the recipe's. Weights that are only
    scored also bring their number of frames, unless a flag differs from its default.
    """
    found, frames = {}, ("frames_in", "frames_out") if knobs.eval_only else ()
    for name in (name for name in (*NETWORK, *frames) if hasattr(knobs, name)):
        if name not in weights["knobs"]:
            raise UserError(f"{knobs.weights} is of an earlier version of this script, without {name}")
        then, now, default = weights["knobs"][name], getattr(knobs, name), getattr(type(knobs), name)
        if now in (then, default, recipe.get(name)):
            found[name] = then
        elif name in NETWORK:
            raise UserError(f"{knobs.weights} has {name} {then}, not {now}; leave out --{name}")
    return replace(knobs, **found)


def build_checked(knobs, build, data, device):
    """The model. Raises UserError where knobs, data and model do not fit together."""
    n_frames, channels, height, width = data.training.shape
    if n_frames < knobs.frames_in + knobs.frames_out:
        wanted = f"frames_in {knobs.frames_in} and frames_out {knobs.frames_out}"
        raise UserError(f"{data.name} has {n_frames} frames per sequence, too few for {wanted}")
    if min(height, width) < 16:  # flat, wide frames would end the process
        raise UserError(f"frames are {height}×{width}; OpenCV's optical flow needs at least 16×16")
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
        task = evaluation.Task(evaluation.BASELINES["copy_last"], knobs.frames_in, knobs.frames_out, device)
        some = np.zeros(WORLD_SIZE * (knobs.frames_out + 1), int)  # one more than frames: finds swapped axes
        evaluation.evaluate(task, data.validation, evaluation.CURVES, some)  # tries the metrics
    except ValueError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        if Path(where.filename).parent != sources.ROOT or not (where.line or "").startswith("raise"):
            raise  # Python's or torch's own: a bug in an edited network
        raise UserError(str(error)) from error
    return model


def attach(knobs, model, device, dtype):
    """Attach the fast kernels to a model, if there are any → what is in use, in words."""
    if not knobs.fast:
        return "plain PyTorch, as --no_fast asks for"
    if not os.path.exists(Path(__file__).with_name("fast")):
        return "plain PyTorch, as support/fast was deleted"
    from support import fast

    return fast.attach(model, device, dtype)


def load_model(path, knobs, build):
    """The network of a checkpoint, with its weights and the fast kernels, on the CPU or the GPU."""
    weights = checkpoint.load(path, "give another file")
    saved = {k: v for k, v in weights["knobs"].items() if k in vars(knobs)} | {"weights": str(path)}
    knobs = with_knobs_of(replace(knobs, **saved), weights, {})
    device, _, _ = choose_device(knobs.device, "fp32")
    model = build(knobs, weights["channels"]).to(device).eval()
    load_weights(model, weights, path)
    report_edits(model, weights, path)
    attach(knobs, model, device, torch.float32)
    model.frames_in, model.channels = weights["knobs"]["frames_in"], weights["channels"]
    model.forecast = types.MethodType(forecast, model)
    return model


@torch.no_grad()
def forecast(model, past, n):
    """The n frames after past, both (B, T, C, H, W) in [0, 1], on the device of past."""
    past = torch.as_tensor(past, dtype=torch.float32)
    if not (past.min() >= 0 and past.max() <= 1):
        raise ValueError(f"frames go from {past.min():.4g} to {past.max():.4g}; expected 0 to 1")
    logits = model.eval()(past.to(next(model.parameters()).device), n)
    return torch.sigmoid(logits).to(past.device)
