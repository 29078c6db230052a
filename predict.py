"""Forecast what follows the first frames of your data: a .npy, a video, or a folder of images.

python predict.py my_frames.npy
python predict.py clip.mp4 --weights results/my_model/best.pt --frames 20 --out forecast
"""

from pathlib import Path

import cv2
import numpy as np
import torch
import tyro

import figures
import main
from own_data import find_oddities, read_frames
from support import UserError
from support.checkpoint import make_folder, open_atomic, write_atomic
from support.devices import run_script


def fit_to_model(frames, model):
    """(N, T, H, W, C) → (N, T, C, H, W) with the model's channels, resized to whole patches."""
    channels, patch = model.channels, getattr(model, "patch_size", 1)
    if frames.shape[-1] != channels:  # the same grey as of training videos
        frames = frames @ np.float32([[0.299], [0.587], [0.114]]) if channels == 1 else frames.repeat(3, -1)
    N, T, H, W = frames.shape[:4]
    size = [max(patch, round(n / patch) * patch) for n in (W, H)]
    if size != [W, H]:
        print(f"resized   from {H}×{W} to {size[1]}×{size[0]}, a multiple of the patch size {patch}")
        frames = frames.reshape(N * T, H, W, -1)
        frames = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
    frames = frames.clip(0, 1).reshape(N, T, size[1], size[0], channels)  # rounding may exceed 1
    return torch.from_numpy(frames).movedim(-1, 2)


def predict(
    source: tyro.conf.Positional[Path],
    weights: Path = Path(__file__).parent / "records" / "long.pt",
    frames: int = 10,
    out: Path = Path("forecast"),
):
    """Forecast what follows the first frames of your data. Later frames are only compared with the forecast.

    Args:
        source: .npy of (T, H, W), (T, H, W, C) or (N, T, H, W); a video; a folder of images in order.
        weights: a best.pt of main.py.
        frames: how many frames to forecast.
        out: folder for forecast.npy (uint8), forecast.gif and forecast.png.
    """
    if frames < 1:
        raise UserError(f"frames is {frames}; expected at least 1")
    model = main.load(weights)
    if model.channels not in (1, 3):
        raise UserError(f"{weights} is for {model.channels} channels; predict.py draws 1 or 3")
    given = read_frames(source, model.frames_in + frames)
    for text in find_oddities(given.swapaxes(0, 1), white=1):
        print(f"warning   {text}")
    given = fit_to_model(given, model)
    past, truth = given[:, : model.frames_in], given[:, model.frames_in :][:, :frames]
    forecast = torch.cat([model.forecast(part, frames) for part in past.split(8)])
    n, n_frames, _, height, width = given.shape
    print(f"used      sequences: {n}, of {n_frames} frames of {height}×{width}")
    name = source.absolute().name.encode(errors="replace").decode()
    words = f"{name}: {past.shape[1]} frames in, {frames} forecast"
    if truth.shape[1]:
        mse = (forecast[:, : truth.shape[1]] - truth).square().sum((2, 3, 4)).mean()
        words += f", MSE {mse:.1f} over the {truth.shape[1]} frames that followed"
        words += f" (mean of {n} sequences; pictures show the first)" * (n > 1)
    print(words)
    make_folder(out)
    array = (forecast.movedim(2, -1) * 255).round().byte().numpy()
    with open_atomic(out / "forecast.npy") as file:
        np.save(file, array[..., 0] if model.channels == 1 else array)
    shrink = -(-past.shape[-1] // 256)  # large frames, in the pictures only
    past, truth, shown = (x[0, ..., ::shrink, ::shrink] for x in (past, truth, forecast))
    write_atomic(out / "forecast.png", figures.prediction(past, truth if len(truth) else None, shown, words))
    known = truth if len(truth) == frames else None
    write_atomic(out / "forecast.gif", figures.animation(past, known, shown, name))
    print(f"output    {out}")


if __name__ == "__main__":
    run_script(lambda: tyro.cli(predict, use_underscores=True), "give fewer or smaller frames")
