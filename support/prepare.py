"""From knobs to a run that is ready: device, data, model, weights, kernels. Prints what will run."""

import math
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moving_mnist import Data, moving_mnist_data
from own_data import is_array, is_own, own_data
from support import UserError, checkpoint, devices, sources
from support.devices import WORLD_SIZE, broadcast, on_rank_0, print0
from support.folders import describe_identity, to_text
from support.scale import Scale, fill
from support.score import CURVES, score, split_frames

LEAST = {"train_sequences": 0, "frames_in": 2, "frames_out": 1, "overlay": 0, "patch_size": 1}
LEAST |= {"max_motion": 0, "epochs": 1, "max_minutes": 0, "batch_size": WORLD_SIZE, "seed": 0}
LEAST |= {"kernel_size": 1, "learning_rate": 1e-9, "weight_decay": 0, "ssim_from": 0}


@dataclass(frozen=True)
class Setup:
    """What a run is made of. Only the weights of its model change."""

    knobs: Any
    data: Data
    model: torch.nn.Module
    device: torch.device
    dtype: torch.dtype  # of the convolutions
    asked: dict  # what makes a run the same run: knobs, data, sources
    environment: dict  # what makes it bit-exact: device, precision, kernels, threads, processes, torch
    scored_step: int  # the training step of the given weights

    @property
    def steps_per_epoch(self):
        return max(1, len(self.data.training) // self.knobs.batch_size)  # whole batches only

    def autocast(self):
        """The context in which the model computes in its dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def prepare(knobs, build):
    """Everything that a run needs. Raises UserError."""
    sources.fingerprints()  # keeps files in folders of yours before an edit can change them
    check(knobs)
    device, dtype, precision = devices.choose_device(knobs.device, knobs.precision)
    devices.connect(device)
    dtype, precision = broadcast((dtype, precision))  # one for all, also where machines differ
    weights = on_rank_0(checkpoint.load, knobs.weights) if knobs.weights else None
    data = load_data(knobs, weights)
    if (first := broadcast(data.name)) != data.name:
        raise UserError(f"this process has {data.name}, the first has {first}; give all the same data")
    model = build_checked(knobs, build, data, device)
    if weights:
        checkpoint.load_weights(model, weights, knobs.weights)
    environment = {"device": str(device), "processes": WORLD_SIZE, "threads": torch.get_num_threads()}
    environment |= {"precision": precision, "torch": str(torch.__version__)}
    environment["kernels"] = attach(model.train(not knobs.eval_only), device, dtype, knobs.fast)
    asked = on_rank_0(describe_identity, knobs, data)
    setup = Setup(knobs, data, model, device, dtype, asked, environment, weights["step"] if weights else 0)
    for split in [data.test] if knobs.eval_only else [data.validation, data.test]:
        check_truth(split, setup)
    # Try the metrics before anything is written. More sequences than frames: swapped axes are noticed.
    score(setup, data.validation, CURVES, "copy_last", np.zeros(WORLD_SIZE * (knobs.frames_out + 1), int))
    describe(setup)
    if weights and (then := Scale.of(weights.get("scale"))) != data.scale:
        print0(f"note      the scale is {data.scale}; the weights were trained with {then}")
    return setup


def check(knobs):
    """Refuse values whose fault would show late. Raises UserError."""
    for name, least in LEAST.items():
        if not least <= getattr(knobs, name) < math.inf:
            raise UserError(f"{name} is {getattr(knobs, name)}; it must be at least {least}")
    for name in ("hidden_channels", "head_channels"):
        channels = getattr(knobs, name)
        if not isinstance(channels, tuple) or min(channels, default=1) < 1:
            raise UserError(f"{name} is {channels}; expected numbers of channels from 1, as in (96, 96)")
    if not knobs.hidden_channels:
        raise UserError("hidden_channels is empty; a network needs at least one ConvLSTM layer")
    if knobs.kernel_size % 2 == 0:
        raise UserError(f"kernel_size is {knobs.kernel_size}; use an odd one, so that frames keep their size")
    start, end = knobs.grow_horizon
    if not (0 <= start <= end <= 1 or end == 0):
        raise UserError(f"grow_horizon is {start:g} {end:g}; expected two fractions of training, in order")
    low, high = knobs.value_range
    if not (-math.inf < low < high < math.inf or low == high == 0):
        raise UserError(f"value_range is {low:g} {high:g}; expected the lower value first")
    if knobs.eval_only and not knobs.weights:
        raise UserError("eval_only needs weights: add --weights FILE, such as results/my_model/best.pt")
    if Path(knobs.name).name != knobs.name or knobs.name == "..":
        raise UserError(f"name is {knobs.name}; it must be one folder name, without slashes")


def check_truth(split, setup):
    """Refuse a split without anything to score. Raises UserError. Reads up to the first known frame."""
    truths = (split_frames(split[np.array([k])], setup)[1] for k in range(len(split)))
    if all(truth.isnan().all() for truth in truths):
        found = "no pixel is known both in the last input frame and in a frame to be forecast"
        raise UserError(f"in the {split.split} split of {setup.data.name}, {found}; give longer series")


def load_data(knobs, weights):
    """The three splits that the knobs ask for. Weights that are only scored bring the scale of their data."""
    if not is_own(knobs.data):
        return moving_mnist_data(knobs.data, knobs.train_sequences, knobs.seed)
    n_frames = knobs.frames_in + knobs.frames_out
    scale = Scale.of(weights.get("scale")) if knobs.eval_only else None
    return own_data(Path(knobs.data), n_frames, knobs.video, knobs.train_sequences, knobs.value_range, scale)


def build_checked(knobs, build, data, device):
    """The model. Raises UserError where knobs, data and model do not fit together."""
    n_frames, channels, *_ = data.training.shape
    if n_frames < knobs.frames_in + knobs.frames_out:
        wanted = f"frames_in {knobs.frames_in} and frames_out {knobs.frames_out}"
        raise UserError(f"{data.name} has {n_frames} frames per sequence, too few for {wanted}")
    if knobs.batch_size > len(data.training) and not knobs.eval_only:
        found = f"for {len(data.training)} training sequences"
        raise UserError(f"batch_size is {knobs.batch_size}, {found}; lower it, or train on more sequences")
    torch.manual_seed(knobs.seed)
    model = build(knobs, channels).to(device)
    with torch.no_grad():  # a try on one sequence, before anything is written
        past = data.training[np.arange(1)][:, : knobs.frames_in]
        model(fill(data.scale.to_unit(past.to(device))), 1)
    return model


def attach(model, device, dtype, fast=True):
    """Attach the fast kernels to a model, if they are there → what is in use, in words."""
    if device.type == "cpu":
        devices.keep_freed_memory()
    if not fast:
        return "plain PyTorch, as --no_fast asks for"
    if not Path(__file__).with_name("fast").exists():
        return "plain PyTorch, as support/fast was deleted"
    from support import fast

    return fast.attach(model, device, dtype)


def describe(setup):
    """Print the model, the knobs that were changed, the device and the data."""
    knobs, training = setup.knobs, setup.data.training
    parameters = sum(p.numel() for p in setup.model.parameters())
    weights = f", weights of {knobs.weights}" if knobs.weights else ""
    print0(f"model     {knobs.model}, {parameters:,} parameters{weights}")
    default = type(knobs)()
    changed = [f"{k} {to_text(v)}" for k, v in vars(knobs).items() if v != getattr(default, k)]
    print0(f"knobs     as in main.py{', but ' if changed else ''}{', '.join(changed)}")
    text = "{device}, {precision}, threads: {threads}, processes: {processes}, torch {torch}"
    print0(f"device    {text.format(**setup.environment)}\nkernels   {setup.environment['kernels']}")
    splits = f"{len(training):,} training, {len(setup.data.validation):,} validation"
    print0(f"data      {setup.data.name}: {splits}, {len(setup.data.test):,} test sequences")


def load_model(path, knobs, build):
    """The network of a checkpoint, with its weights and the fast kernels, on the CPU or the GPU."""
    weights = checkpoint.load(path, "give another file")
    knobs = replace(knobs, **{k: v for k, v in weights["knobs"].items() if k in vars(knobs)})
    device, _, _ = devices.choose_device(knobs.device, "fp32")
    model = build(knobs, weights["channels"]).to(device).eval()
    checkpoint.load_weights(model, weights, path)
    attach(model, device, torch.float32)
    model.frames_in, model.frames_out = knobs.frames_in, knobs.frames_out
    model.channels = weights["channels"]
    model.scale = Scale.of(weights.get("scale"))
    # videos are as large as in training; if that was on arrays, as they are
    model.video = (0, 0, 1, 3 if model.channels == 3 else 1) if is_array(knobs.data) else knobs.video
    model.forecast = types.MethodType(forecast, model)
    return model


@torch.no_grad()
def forecast(model, past, n):
    """The n frames after past, both (B, T, C, H, W) in [0, 1], on the device of past.

    Pixels that are missing (NaN) in the last input frame are missing in the forecast.
    """
    past = torch.as_tensor(past, dtype=torch.float32)
    known = fill(past)
    if not (known.min() >= 0 and known.max() <= 1):
        raise ValueError(f"frames go from {known.min():.4g} to {known.max():.4g}; expected 0 to 1")
    logits = model.eval()(known.to(next(model.parameters()).device), n)
    return torch.sigmoid(logits).to(past.device).masked_fill(past[:, -1:].isnan(), torch.nan)
