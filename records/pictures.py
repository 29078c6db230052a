"""Four pictures of the README, drawn into photos/: python -m records.pictures

compare.png: three records, from their logs. strip.png: a test sequence, as each forecasts it.
predict.gif: a test sequence, as forecast by long.pt.
moves.png: how its head moves the last input frame. An arrow is the mean of a patch's moves, by their weights,
for each bright patch that moves by more than a pixel.
"""

import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import figures
import main
from moving_mnist import moving_mnist_data

RECORDS = Path(__file__).parent
PHOTOS = RECORDS.parent / "photos"
RUNS = {"plain": "plain", "paper": "paper", "default": "default"}
MEDIAN = 355  # of the test split, for strip.png: the median of the default's forecasts, by MSE
SEQUENCE = 3  # for predict.gif and moves.png
FIRST = 10  # the forecast frame that is drawn, counted from 0: frame 11

histories, curves = {}, {}
for name, label in RUNS.items():
    rows = list(csv.DictReader((RECORDS / name / "log.csv").read_text("utf-8").splitlines()))
    rows = [row for row in rows if row["val_loss"]]
    histories[label] = [
        {k: float(row[k]) for k in ("sequences", "minutes", "val_mse_per_frame")} for row in rows
    ]
    results = json.loads((RECORDS / name / "metrics.json").read_text("utf-8"))
    curves[label] = results["scores"][results["model"]]["mse_per_frame"]["per_frame"]
for who in figures.LABELS:
    curves[who] = results["scores"][who]["mse_per_frame"]["per_frame"]
title = "stand-in array, two cores of AMD EPYC Zen 5"
(PHOTOS / "compare.png").write_bytes(figures.compare(histories, curves, title))

model = main.load(RECORDS / "long.pt")
data = moving_mnist_data("stand_in", 0, 0)
to_unit = data.scale.to_unit

frames = to_unit(data.test[np.arange(MEDIAN, MEDIAN + 1)])  # forecast.npy is of this sequence
past, truth = frames[:, :FIRST], frames[0, FIRST:]
rows = {"input": (1, past[0]), "truth": (FIRST + 1, truth)}
forecasts = {"last frame copied": past[0, -1:].expand_as(truth)}
for name in ("plain", "default"):
    forecasts[RUNS[name]] = to_unit(torch.from_numpy(np.load(RECORDS / name / "forecast.npy")))
forecasts["long run"] = model.forecast(past, 10)[0]
for label, forecast in forecasts.items():
    mse = (forecast - truth).square().sum((1, 2, 3)).mean()
    rows[f"{label}, here\u00a0MSE\u00a0{mse:.0f}"] = FIRST + 1, forecast
title = f"test sequence {MEDIAN + 1}, where the default has its median MSE"
(PHOTOS / "strip.png").write_bytes(figures.grid(rows, title))

frames = to_unit(data.test[np.arange(SEQUENCE, SEQUENCE + 1)])
calls, plain = [], model.advect


def watch(frames, weights, patch_size):
    moved = plain(frames, weights, patch_size)
    calls.append((weights[-1], moved[-1, 0]))
    return moved


model.advect = watch
forecasts = model.forecast(frames[:, :FIRST], 10)[0]
mse = (forecasts - frames[0, FIRST:]).square().sum((1, 2, 3)).mean()
title = f"long run, test sequence {SEQUENCE + 1}, MSE {mse:.0f}"
animation = figures.animation(frames[0, :FIRST], frames[0, FIRST:], forecasts, title)
(PHOTOS / "predict.gif").write_bytes(animation)

weights, moved = calls[0]
side = round(weights.shape[-1] ** 0.5)
places = torch.arange(side) - side // 2.0
weights = weights.unflatten(-1, (side, side))
# a patch is taken from `places` away, so it moves the other way
dx = -(weights.sum(-2) * places).sum(-1)
dy = -(weights.sum(-1) * places).sum(-1)

last, truth = frames[0, FIRST - 1, 0], frames[0, FIRST, 0]
P = model.patch_size
is_bright = torch.nn.functional.max_pool2d(moved[None], P)[0] > 0.4
y, x = torch.nonzero(is_bright & (dx.hypot(dy) > 1), as_tuple=True)
rows, columns = torch.nonzero(moved > 0.2, as_tuple=True)
window = {"xlim": (columns.min() - 5, columns.max() + 5), "ylim": (rows.max() + 5, rows.min() - 5)}

titles = (
    "frame 10; moves: old → new place",
    "moved by the head",
    "frame 11: forecast",
    "frame 11: truth",
)
figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
for ax, title, image in zip(axes, titles, (last, moved, forecasts[0, 0], truth), strict=True):
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    ax.set(title=title, xticks=[], yticks=[], **window)
ends = x * P + (P - 1) / 2, y * P + (P - 1) / 2
arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "color": "#e08e0b", "width": 0.008}
axes[0].quiver(ends[0] - dx[y, x], ends[1] - dy[y, x], dx[y, x], dy[y, x], **arrows)
figure.savefig(PHOTOS / "moves.png", dpi=110)
