"""Draw how the head of records/long.pt moves one validation frame: python -m records.moves

Writes moves.png. The arrow of a patch is the mean of its moves, by their weights.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import main
from moving_mnist import moving_mnist_data

SEQUENCE = 0  # of the validation split
FIRST = 10  # the forecast frame that is drawn, counted from 0: frame 11

model = main.load("records/long.pt")
data = moving_mnist_data("array", 0, 0)
frames = data.scale.to_unit(data.validation[np.arange(SEQUENCE, SEQUENCE + 1)])
calls, plain = [], model.advect


def watch(frames, weights, patch_size):
    moved = plain(frames, weights, patch_size)
    calls.append((weights[-1], moved[-1, 0]))
    return moved


model.advect = watch
forecast = model.forecast(frames[:, :FIRST], 1)[0, 0, 0]
weights, moved = calls[0]
side = round(weights.shape[-1] ** 0.5)
places = torch.arange(side) - side // 2.0
weights = weights.unflatten(-1, (side, side))
# a patch is taken from `places` away, so it moves the other way
dx = -(weights.sum(-2) * places).sum(-1)
dy = -(weights.sum(-1) * places).sum(-1)

last, truth = frames[0, FIRST - 1, 0], frames[0, FIRST, 0]
P = model.patch_size
is_bright = torch.nn.functional.max_pool2d(moved[None], P)[0] > 0.2
y, x = torch.nonzero(is_bright, as_tuple=True)

titles = "last input frame", "arrows: moves of its patches", "the moved frame", "forecast", "truth"
figure, axes = plt.subplots(1, 5, figsize=(14, 3.3), layout="constrained")
for ax, title, image in zip(axes, titles, (last, last, moved, forecast, truth), strict=True):
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    ax.set(title=title, xticks=[], yticks=[])
ends = x * P + (P - 1) / 2, y * P + (P - 1) / 2
arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "color": "#e08e0b", "width": 0.008}
axes[1].quiver(ends[0] - dx[y, x], ends[1] - dy[y, x], dx[y, x], dy[y, x], **arrows)
figure.savefig("moves.png", dpi=110)
