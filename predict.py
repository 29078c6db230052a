"""Forecast what follows the first frames of your data: a .npy, a video, or a folder of images.

python predict.py my_frames.npy
python predict.py clip.mp4 --weights results/my_model/best.pt --frames 20 --out forecast
"""

import itertools
import re
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro

import figures
import main
from moving_mnist import find_oddities
from support import UserError
from support.checkpoint import open_atomic, write_atomic
from support.distributed import run_script
from support.videos import VIDEOS, decode

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


def read_frames(path, most):
    """The first frames, at most `most`, (N, T, H, W, C), float32 in [0, 1]; C is 1 or 3. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path} is not there")
    if path.is_dir():
        files = [p for p in path.iterdir() if p.suffix.lower() in IMAGES and p.name[0] != "."]
        files.sort(key=lambda p: re.sub(r"\d+", lambda digits: digits[0].zfill(20), p.name))  # 2 < 10
        contents = [np.fromfile(file, np.uint8) for file in files[:most]]
        images = [cv2.imdecode(c, cv2.IMREAD_COLOR) if c.size else None for c in contents]
        if not images or any(image is None or image.shape != images[0].shape for image in images):
            raise UserError(f"{path} needs readable images of one size; it has {len(files)} image files")
        frames = np.stack(images)[..., ::-1]  # OpenCV's order is blue, green, red
    elif path.suffix.lower() in VIDEOS:
        some = [frame[..., ::-1] for frame in itertools.islice(decode(path), most)]
        if not some:
            raise UserError(f"{path} gives no frames: it is damaged, or no video that OpenCV can read")
        frames = np.stack(some)
    else:
        try:
            frames = np.load(path, "r", allow_pickle=False)
            if frames.dtype.kind not in "buif":
                raise ValueError(f"it holds {frames.dtype}")
        except Exception as error:  # untrusted file: loading may raise anything
            raise UserError(f"{path} is no .npy of numbers, no video and no folder of images") from error
    shape = frames.shape
    if frames.ndim == 3 or (frames.ndim == 4 and frames.shape[-1] not in (1, 3)):
        frames = frames[..., None]  # (T, H, W) or (N, T, H, W)
    frames = frames[None] if frames.ndim == 4 else frames
    if frames.ndim != 5 or frames.shape[1] < 2 or frames.shape[-1] not in (1, 3) or frames.size == 0:
        expected = "(T, H, W) or (N, T, H, W), perhaps with C at the end; at least 2 frames, 1 or 3 channels"
        raise UserError(f"frames have shape {shape}; expected {expected}")
    white = 255 if np.issubdtype(frames.dtype, np.integer) else 1
    frames = frames[:, :most].astype(np.float32) / white
    if not (frames.min() >= 0 and frames.max() <= 1):
        found = f"values go from {frames.min() * white:g} to {frames.max() * white:g}"
        raise UserError(f"{found}; expected integers from 0 to 255, or floats from 0 to 1")
    return frames


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
    some = given[:: -(-len(given) // 20)]  # evenly chosen, as all may be gigabytes
    for words in find_oddities(some.swapaxes(0, 1) * 255):
        print(f"warning   {words}")
    given = fit_to_model(given, model)
    past, truth = given[:, : model.frames_in], given[:, model.frames_in :][:, :frames]
    forecast = torch.cat([model.forecast(some, frames) for some in past.split(8)])
    n, n_frames, _, height, width = given.shape
    print(f"used      sequences: {n}, of {n_frames} frames of {height}×{width}")
    name = source.absolute().name.encode(errors="replace").decode()
    words = f"{name}: {past.shape[1]} frames in, {frames} forecast"
    if truth.shape[1]:
        mse = (forecast[:, : truth.shape[1]] - truth).square().sum((2, 3, 4)).mean()
        words += f", MSE {mse:.1f} over the {truth.shape[1]} frames that followed"
        words += f" (mean of {n} sequences; pictures show the first)" * (n > 1)
    print(words)
    out.mkdir(parents=True, exist_ok=True)
    array = (forecast.movedim(2, -1) * 255).round().byte().numpy()
    with open_atomic(out / "forecast.npy") as file:
        np.save(file, array[..., 0] if model.channels == 1 else array)
    shrink = -(-past.shape[-1] // 256)  # large frames, in the pictures only
    past, truth, shown = (some[0, ..., ::shrink, ::shrink] for some in (past, truth, forecast))
    write_atomic(out / "forecast.png", figures.prediction(past, truth if len(truth) else None, shown, words))
    known = truth if len(truth) == frames else None
    write_atomic(out / "forecast.gif", figures.animation(past, known, shown, name))
    print(f"output    {out}")


if __name__ == "__main__":
    run_script(lambda: tyro.cli(predict, use_underscores=True), "give fewer or smaller frames")
