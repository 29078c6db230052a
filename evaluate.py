"""How a forecast is scored and shown: over a whole split, shared among the processes, with the baselines beside.

A forecast is a function (past frames, n) → (prediction in [0, 1], logits or None); frames are (B, T, C, H, W).
"""

import json
import os

import numpy as np
import torch
import torch.distributed as dist

import figures
import metrics
from checkpoint import publish

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # set by torchrun
CROSS_ENTROPY = "cross_entropy_per_sequence"
CURVES = ("mse_per_frame", "mae_per_frame", "ssim", "ssim_openstl", "psnr")
BASELINES = {
    "black": lambda past, n: (metrics.black(past, n), None),
    "copy_last": lambda past, n: (metrics.copy_last(past, n), None),
    "optical_flow": lambda past, n: (metrics.optical_flow(past, n), None),
}


def sum_over_processes(value, device):
    if WORLD == 1:
        return value
    value = value.to(device)  # nccl reduces on the GPU only
    dist.all_reduce(value)
    return value.cpu()


def forecaster(model, autocast):
    """The model as a forecast."""

    def forecast(past, n_future):
        model.eval()
        with autocast():
            logits = model(past, n_future).float()
        return torch.sigmoid(logits), logits

    return forecast


def cut(frames, frames_in, frames_out, device="cpu"):
    """uint8 sequences → (past, truth) in [0, 1]."""
    frames = frames.to(device).float() / 255
    return frames[:, :frames_in], frames[:, frames_in : frames_in + frames_out]


@torch.inference_mode()
def evaluate(forecast, dataset, frames_in, frames_out, names, device):
    """name → mean of metrics.<name> over the dataset: a curve over forecast frames, or one cross-entropy."""
    sums = {name: torch.zeros(1 if name == CROSS_ENTROPY else frames_out).double() for name in names}
    mine = np.arange(len(dataset))[RANK::WORLD]  # each process has a part, whatever the sizes
    for index in np.split(mine, range(50, len(mine), 50)) if len(mine) else []:
        past, truth = cut(dataset[index], frames_in, frames_out, device)
        prediction, logits = forecast(past, frames_out)
        for name in names:
            value = getattr(metrics, name)(logits if name == CROSS_ENTROPY else prediction, truth)
            sums[name] += value.cpu() * len(index)
    return {name: sum_over_processes(value, device) / len(dataset) for name, value in sums.items()}


def test(forecasts, dataset, frames_in, frames_out, device):
    """The scores of metrics.json: name of each forecast and baseline → metric → unit, mean and curve."""
    scores = {}
    for who, forecast in {**forecasts, **BASELINES}.items():
        names = CURVES if who in BASELINES else (*CURVES, CROSS_ENTROPY)
        scores[who] = {
            name: {"unit": metrics.UNITS[name], "mean": finite(value.mean()), "per_frame": [finite(v) for v in value]}
            for name, value in evaluate(forecast, dataset, frames_in, frames_out, names, device).items()
        }
    return scores


def finite(value):
    """For JSON, which has no infinity: the PSNR of a frame without any error."""
    return float(value) if value.isfinite() else None


def table(results):
    """metrics.json as lines for people."""
    columns = dict(zip((*CURVES, CROSS_ENTROPY), ("MSE", "MAE", "SSIM", "SSIM*", "PSNR", "cross-entropy"), strict=True))
    lines = [
        f"{results['split']} split of the {results['data']}, {results['sequences']:,} sequences, "
        f"mean over {results['frames_out']} forecast frames (SSIM*: as in OpenSTL's tables)",
        " " * 18 + "".join(f"{name:>14}" for name in columns.values()),
    ]
    for who, scores in results["scores"].items():
        means = (scores[name]["mean"] if name in scores else None for name in columns)
        cells = ("-" if mean is None else f"{mean:.4g}" for mean in means)
        lines.append(f"{figures.LABELS.get(who, who):18}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


@torch.inference_mode()
def draw(folder, forecast, dataset, frames_in, frames_out, device, title):
    """predict_1.png … predict_4.png and predict.gif, of the same four sequences every time."""
    index = np.linspace(0, len(dataset) - 1, 4).astype(int)
    past, truth = cut(dataset[index], frames_in, frames_out)
    prediction = forecast(past.to(device), frames_out)[0].cpu()
    for k, (p, t, f) in enumerate(zip(past, truth, prediction, strict=True), 1):
        mse = float((f - t).square().sum() / frames_out)
        figures.prediction(folder / f"predict_{k}.png", p, t, f, f"{title}: sequence {k} of 4, MSE {mse:.0f}")
    figures.animation(folder / "predict.gif", past[0], truth[0], prediction[0], title)


def write_results(folder, results):
    """metrics.json and per_frame.png."""
    curves = {who: scores["mse_per_frame"]["per_frame"] for who, scores in results["scores"].items()}
    title = f"{results['split']} split of the {results['data']}, {results['sequences']:,} sequences"
    figures.per_frame(folder / "per_frame.png", curves, title)
    publish(folder / "metrics.json", json.dumps(results, indent=1).encode())
