"""A forecast and data → numbers. Each process scores a part. Frames are (B, T, C, H, W)."""

import math

import numpy as np
import torch

import metrics
from support import UserError
from support.devices import RANK, WORLD_SIZE, all_reduce

CROSS_ENTROPY = "cross_entropy_per_sequence"
CURVES = tuple(name for name in metrics.METRICS if name != CROSS_ENTROPY)  # one value for each frame
BASELINES = "black", "copy_last", "optical_flow"


def split_frames(frames, knobs, device="cpu"):
    """uint8 sequences → (past, truth) in [0, 1]."""
    frames = frames[:, : knobs.frames_in + knobs.frames_out].to(device).float() / 255
    return frames[:, : knobs.frames_in], frames[:, knobs.frames_in :]


@torch.inference_mode()
def forecast(setup, past, n):
    """The model's next n frames, as (prediction in [0, 1], logits)."""
    setup.model.eval()
    with setup.autocast():
        logits = setup.model(past.to(setup.device), n).float()
    return torch.sigmoid(logits), logits


def score(setup, dataset, names, who="", index=None):
    """name → metrics.<name> of each sequence of the dataset, or of those in index: (N, T).

    The cross-entropy has one value per sequence: (N, 1). who: a baseline; "": the model. Raises UserError for
    a metric of another shape.
    """
    index = np.arange(len(dataset)) if index is None else index
    n_future = setup.knobs.frames_out
    widths = {name: 1 if name == CROSS_ENTROPY else n_future for name in names}
    scores = {name: torch.zeros(len(index), width).double() for name, width in widths.items()}
    mine = np.arange(len(index))[RANK::WORLD_SIZE]
    at_once = max(1, min(20, 20 * 64 * 64 // math.prod(dataset.shape[1:])))  # fewer of large frames
    for start in range(0, len(mine), at_once):
        batch = mine[start : start + at_once]
        past, truth = split_frames(dataset[index[batch]], setup.knobs, setup.device)
        if who:
            prediction, logits = getattr(metrics, who)(past, n_future), None
        else:
            prediction, logits = forecast(setup, past, n_future)
        for name, width in widths.items():
            value = getattr(metrics, name)(logits if name == CROSS_ENTROPY else prediction, truth)
            value = torch.as_tensor(value).cpu().double()
            if value.shape != (len(batch), width):
                shape, expected = tuple(value.shape), (len(batch), width)
                raise UserError(f"metrics.{name} gives values of shape {shape}; expected {expected}")
            scores[name][batch] = value
    return {name: all_reduce(values, setup.device).cpu() for name, values in scores.items()}


def summary(scores):
    """metric → unit, mean and curve, as metrics.json has them. JSON cannot hold an infinite PSNR: None."""
    found = {}
    for name, (_, unit) in metrics.METRICS.items():
        if name in scores:
            curve = scores[name].mean(0)
            values = [curve.mean().item(), *curve.tolist()]
            mean, *curve = [value if math.isfinite(value) else None for value in values]
            found[name] = {"unit": unit, "mean": mean, "per_frame": curve}
    return found
