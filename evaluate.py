"""How a forecast is scored and shown: over a whole split, shared among the processes, with the baselines beside.

A forecast is a function (past frames, n) → (prediction in [0, 1], logits or None); frames are (B, T, C, H, W).
"""

import io
import json
import math

import numpy as np
import torch

import figures
import metrics
from checkpoint import publish
from machine import RANK, WORLD, sum_over_processes
from moving_mnist import shape_of

CROSS_ENTROPY, EACH = "cross_entropy_per_sequence", "mse_per_sequence"
CURVES = tuple(name for name in metrics.METRICS if name != CROSS_ENTROPY)
BASELINES = {who: lambda past, n, who=who: (getattr(metrics, who)(past, n), None) for who in figures.LABELS}


def forecaster(model, autocast):
    """The model as a forecast."""

    @torch.inference_mode()
    def forecast(past, n_future):
        model.eval()
        with autocast():
            logits = model(past, n_future).float()
        return torch.sigmoid(logits), logits

    return forecast


def cut(frames, frames_in, frames_out, device="cpu"):
    """uint8 sequences → (past, truth) in [0, 1]."""
    frames = frames[:, : frames_in + frames_out].to(device).float() / 255
    return frames[:, :frames_in], frames[:, frames_in:]


def evaluate(forecast, dataset, frames_in, frames_out, names, device):
    """name → mean of metrics.<name> over the dataset: a curve over forecast frames, or one cross-entropy.

    "mse_per_sequence" is no mean: one value a sequence.
    """
    sizes = {CROSS_ENTROPY: 1, EACH: len(dataset)}
    sums = {name: torch.zeros(sizes.get(name, frames_out)).double() for name in names}
    mine = np.arange(len(dataset))[RANK::WORLD]  # each process has a part, whatever the sizes
    pixels = math.prod(shape_of(dataset)[1:])  # of a frame, times its channels
    at_once = max(1, min(20, 20 * 64 * 64 // pixels))  # large frames need no more memory
    for start in range(0, len(mine), at_once):
        index = mine[start : start + at_once]
        past, truth = cut(dataset[index], frames_in, frames_out, device)
        prediction, logits = forecast(past, frames_out)
        for name in names:
            value = getattr(metrics, name)(logits if name == CROSS_ENTROPY else prediction, truth)
            where = index if name == EACH else slice(None)
            sums[name][where] += value.cpu() * (len(dataset) if name == EACH else len(index))
    return {name: sum_over_processes(value, device) / len(dataset) for name, value in sums.items()}


def curve(forecast, dataset, frames_in, frames_out, device):
    """Its MSE of each forecast frame, a list."""
    return evaluate(forecast, dataset, frames_in, frames_out, ["mse_per_frame"], device)["mse_per_frame"].tolist()


def test(name, forecast, dataset, frames_in, frames_out, device):
    """The scores of metrics.json: the named forecast and each baseline → metric → unit, mean and curve.

    Beside them the order of the sequences, the best forecast first.
    """
    scores = {}
    for who, function in {name: forecast, **BASELINES}.items():
        names = CURVES if who in BASELINES else (*CURVES, CROSS_ENTROPY, EACH)
        found = evaluate(function, dataset, frames_in, frames_out, names, device)
        if who == name:
            order = found.pop(EACH).argsort(stable=True)
        scores[who] = {
            key: {"unit": unit, "mean": finite(found[key].mean()), "per_frame": [finite(v) for v in found[key]]}
            for key, (_, unit) in metrics.METRICS.items()
            if key in found
        }
    return scores, order


def finite(value):
    """For JSON, which has no infinity: the PSNR of a frame without any error."""
    return float(value) if value.isfinite() else None


def what(results):
    """What was scored."""
    split = "all" if results["split"] == "all" else f"{results['split']} split"
    return f"{split} of the {results['data']}, {results['sequences']:,} sequences"


def cells(scores, missing):
    """The mean of each metric, in the order of metrics.METRICS, as text."""
    means = (scores[name]["mean"] if name in scores else None for name in metrics.METRICS)
    text = lambda mean: f"{mean:.0f}" if mean >= 1000 else f"{mean:#.4g}"
    return [missing if mean is None else text(mean) for mean in means]


def table(results):
    """metrics.json as lines for people."""
    lines = [
        f"{what(results)}, mean over {results['frames_out']} forecast frames (SSIM*: as in OpenSTL's tables)",
        " " * 18 + "".join(f"{name:>14}" for name in metrics.HEADINGS),
    ]
    for who, scores in results["scores"].items():
        lines.append(f"{figures.LABELS.get(who, who):18}" + "".join(f"{cell:>14}" for cell in cells(scores, "-")))
    return "\n".join(lines)


def draw(folder, forecast, dataset, frames_in, frames_out, device, title):
    """predict_1.png … predict_4.png and predict.gif, of the same four sequences every time."""
    index = np.linspace(0, len(dataset) - 1, 4).astype(int)
    named = {str(k): (i, f"sequence {i + 1} of {len(dataset):,}") for k, i in enumerate(index, 1)}
    past, truth, prediction = draw_named(folder, forecast, dataset, frames_in, frames_out, device, named, title)
    figures.animation(folder / "predict.gif", past[0], truth[0], prediction[0], title)


def draw_ranked(folder, forecast, dataset, order, frames_in, frames_out, device, title):
    """predict_best.png, predict_median.png and predict_worst.png, so that nobody has to trust a lucky sample.

    And predict_last_frame.png: of ten forecasts, from the best to the worst, the frame that is hardest.
    """
    n = len(order)
    ranks = {"best": 0, "median": n // 2, "worst": n - 1}
    named = {name: (int(order[rank]), f"the {name} of {n:,} sequences") for name, rank in ranks.items()}
    draw_named(folder, forecast, dataset, frames_in, frames_out, device, named, title)

    index = order[np.linspace(0, n - 1, min(n, 10)).astype(int)].numpy()
    past, truth = cut(dataset[index], frames_in, frames_out)
    every = [forecast(one[None].to(device), frames_out)[0][0].cpu() for one in past]  # large ones fit in memory
    errors = [error(f, t) for f, t in zip(every, truth, strict=True)]
    numbers = [f"sequence {i + 1:,}" for i in index]
    rows = {"truth": (numbers, truth[:, -1]), "forecast": (errors, torch.stack([frames[-1] for frames in every]))}
    words = f"{title}: frame {frames_in + frames_out} of {len(index)} sequences, from the best forecast to the worst"
    words += f" (MSE of all {frames_out} frames)"
    figures.grid(folder / "predict_last_frame.png", rows, words)


def draw_named(folder, forecast, dataset, frames_in, frames_out, device, named, title):
    """predict_<name>.png for name → (index in the dataset, words for the title); (past, truth, prediction)."""
    past, truth = cut(dataset[np.array([i for i, _ in named.values()])], frames_in, frames_out)
    prediction = forecast(past.to(device), frames_out)[0].cpu()
    for (name, (_, words)), p, t, f in zip(named.items(), past, truth, prediction, strict=True):
        figures.prediction(folder / f"predict_{name}.png", p, t, f, f"{title}: {words}, {error(f, t)}")
    return past, truth, prediction


def error(forecast, truth):
    """Of one sequence, in words; both (T, C, H, W)."""
    return f"MSE {(forecast - truth).square().sum() / len(truth):.0f}"


def write_results(folder, results, first_forecast):
    """metrics.json, per_frame.png, and forecast.npy: of the first test sequence, for comparisons."""
    buffer = io.BytesIO()
    np.save(buffer, (first_forecast * 255).round().byte().cpu().numpy())
    publish(folder / "forecast.npy", buffer.getvalue())
    curves = {who: scores["mse_per_frame"]["per_frame"] for who, scores in results["scores"].items()}
    figures.per_frame(folder / "per_frame.png", {what(results): curves})
    publish(folder / "metrics.json", json.dumps(results, indent=1).encode())
