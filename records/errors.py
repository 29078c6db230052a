"""Where a forecast errs:  python -m records.errors records/long.pt

For each file of weights, a row of the error analysis in README.md.
"""

import sys

import numpy as np
import torch

import main
from moving_mnist import RAW, read_digits, render, trajectories

DIGITS = read_digits(RAW / "digits_test.png")


def forecast(model, frames):
    """uint8 frames (B, 20, 1, 64, 64) → the last ten in [0, 1], (B, 10, 64, 64), forecast from the others."""
    past = torch.from_numpy(frames[:, :10]).float() / 255
    return torch.cat([model.forecast(part, 10) for part in past.split(50)])[:, :, 0].numpy()


def situation_row(model):
    """MSE of each situation's frame, of at most 400 sequences; then of all ten frames of the first one."""
    rng = np.random.default_rng(0)
    positions = trajectories(rng, 6000)
    chosen = rng.integers(len(DIGITS), size=(6000, 2))
    corners = (positions * 36).astype(int)
    gap = np.abs(corners[:, :, 0] - corners[:, :, 1]).max(-1)  # in pixels, of each frame
    contacts = ((positions == 0) | (positions == 1)).sum((2, 3))
    walls = contacts[:, 10:13].sum(1)
    situations = {  # which sequences, and the forecast frame to score
        "Frame 11, all": (np.arange(6000) < 400, 1),
        "Frame 13, free": ((gap[:, 6:13] >= 16).all(1) & (walls == 0), 3),
        "Frame 13, one wall": ((gap[:, 6:13] >= 16).all(1) & (walls == 1), 3),
    }
    curves, errors = [], []
    for fits, frame in situations.values():
        index = np.flatnonzero(fits)[:400]
        frames = render(DIGITS[chosen[index]], positions[index])
        squares = (forecast(model, frames) - frames[:, 10:, 0] / 255) ** 2
        curves.append(squares.sum((2, 3)).mean(0))
        errors.append(curves[-1][frame - 1])
    return [f"{error:.1f}" for error in (*errors, curves[0].mean())]


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(" | ".join([path, *situation_row(main.load(path))]))
