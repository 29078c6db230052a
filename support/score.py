"""A forecast and data → numbers. Each process scores a part. Frames are (B, T, C, H, W)."""

import math

import numpy as np
import torch

import metrics
from support import UserError
from support.devices import RANK, WORLD_SIZE, all_reduce
from support.scale import fill

CROSS_ENTROPY = "cross_entropy_per_sequence"
MEAN_SQUARES = "mean_squares"  # one value for each channel
CURVES = tuple(name for name in metrics.METRICS if name != CROSS_ENTROPY)  # one value for each frame
BASELINES = "black", "copy_last", "optical_flow"  # black: of grey levels only


def split_frames(frames, setup, device="cpu", clip=True):
    """Sequences of a dataset → (past in [0, 1], truth), or NaN. Where the last input is, so is the truth.

    Without clip, values of the past that lie outside stay there, as those of the truth do.
    """
    n, scale = setup.knobs.frames_in, setup.data.scale
    frames = frames[:, : n + setup.knobs.frames_out].to(device)
    past, truth = scale.to_unit(frames[:, :n], clip), scale.to_unit(frames[:, n:], clip=False)
    return past, truth.masked_fill(past[:, -1:].isnan(), torch.nan)


@torch.inference_mode()
def forecast(setup, past, n):
    """The model's next n frames, as (prediction in [0, 1], logits). Missing pixels of the past may be NaN."""
    setup.model.eval()
    with setup.autocast():
        logits = setup.model(fill(past.to(setup.device)), n).float()
    return torch.sigmoid(logits), logits


def predict(setup, past):
    """The forecast in [0, 1]. Pixels that are missing in the last input frame are NaN, too."""
    prediction, _ = forecast(setup, past, setup.knobs.frames_out)
    return prediction.cpu().masked_fill(past[:, -1:].isnan().cpu(), torch.nan)


def score(setup, dataset, names, who="", index=None):
    """name → metrics.<name> of each sequence of the dataset, or of those in index: (N, T).

    The cross-entropy has one value per sequence, (N, 1). Mean squares have one per channel, (N, C).
    who: a baseline; "": the model. Raises UserError for a metric of another shape.
    """
    index = np.arange(len(dataset)) if index is None else index
    n_future = setup.knobs.frames_out
    others = {CROSS_ENTROPY: 1, MEAN_SQUARES: dataset.shape[1]}
    widths = {name: others.get(name, n_future) for name in names}
    scores = {name: torch.zeros(len(index), width).double() for name, width in widths.items()}
    mine = np.arange(len(index))[RANK::WORLD_SIZE]
    at_once = max(1, min(20, 20 * 64 * 64 // math.prod(dataset.shape[1:])))  # fewer of large frames
    for start in range(0, len(mine), at_once):
        batch = mine[start : start + at_once]
        past, truth = split_frames(dataset[index[batch]], setup, setup.device, clip=not who)
        if who:
            prediction, logits = getattr(metrics, who)(fill(past), n_future), None
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


def summary(scores, scale=None):
    """metric → unit, mean and curve, as metrics.json has them. JSON cannot hold an infinite PSNR: None.

    With a scale, also the RMSE of each channel, in units of the data.
    """
    found = {}
    for name, (_, unit) in metrics.METRICS.items():
        if name in scores:
            curve = scores[name].nanmean(0)
            values = [curve.nanmean().item(), *curve.tolist()]
            mean, *curve = [value if math.isfinite(value) else None for value in values]
            found[name] = {"unit": unit, "mean": mean, "per_frame": curve}
    if MEAN_SQUARES in scores:
        widths = np.subtract(scale.high, scale.low)
        roots = widths * scores[MEAN_SQUARES].nanmean(0).sqrt().numpy()
        found["rmse"] = [root if math.isfinite(root) else None for root in roots.tolist()]
    return found
