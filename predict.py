"""Forecast what follows frames of your data: a .npy, a video, or a folder of images.

python predict.py my_frames.npy
python predict.py clip.mp4 --weights results/mine/best.pt --start -10 --frames 20 --out forecast
"""

from pathlib import Path

import numpy as np
import torch
import tyro

import figures
import main
from own_data import describe, read, report_scale, restore_axes
from support import UserError
from support.checkpoint import make_folder, open_atomic, write_atomic
from support.devices import run_script


def predict(
    source: tyro.conf.Positional[Path],
    weights: Path = Path(__file__).parent / "records" / "long.pt",
    frames: int = 0,
    start: int = 0,
    out: Path = Path("forecast"),
):
    """Forecast what follows some frames of your data. Later frames are compared with the forecast.

    Args:
        source: any data that main.py reads. Videos and images get the size of those in training.
        weights: a best.pt of main.py. It also has the number of input frames, and the scale of values.
        frames: how many frames to forecast. 0 = as many as in training.
        start: the first input frame. 0 is the first of the data, -10 the tenth from the end.
        out: folder for forecast.npy (in the units and axes of the data), forecast.gif and forecast.png.
    """
    if frames < 0:
        raise UserError(f"frames is {frames}; expected at least 0")
    model = main.load(weights)
    n, frames = model.frames_in, frames or model.frames_out
    data = read(source, model.video, most=start + n + frames if start >= 0 else None)
    n_channels = data.series[0].shape[1]
    if n_channels != model.channels:
        raise UserError(f"the data have {n_channels} channels; {weights} is for {model.channels}")
    # a start before the first frame leaves nothing
    windows = [one[start:][: n + frames] if len(one) >= -start else one[:0] for one in data.series]
    chosen = [one for one in windows if len(one) >= n]
    if not chosen:
        longest = max(map(len, windows))
        raise UserError(f"the data have {longest} frames from --start {start} on; the weights need {n}")
    if len(chosen) < len(windows):
        print(f"left out  series with fewer than {n} frames: {len(windows) - len(chosen)}")
    shortest = min(map(len, chosen))
    if shortest < max(map(len, chosen)):
        print(f"cut       all series to the {shortest} frames of the shortest")
    data = data._replace(series=[one[:shortest] for one in chosen])
    low, high = describe(data)
    report_scale(model.scale, data.series, low, high)
    sequences = torch.stack([torch.from_numpy(one.astype(np.float32)) for one in data.series])
    past, truth = model.scale.to_unit(sequences[:, :n]), model.scale.to_unit(sequences[:, n:], clip=False)
    forecast = torch.cat([model.forecast(part, frames) for part in past.split(8)])
    words = f"{data.name}: {n} frames in, {frames} forecast"
    if truth.shape[1]:
        error = model.scale.describe_error(forecast[:, : truth.shape[1]].flatten(0, 1), truth.flatten(0, 1))
        words += f", {error} over the {truth.shape[1]} frames that followed"
        words += f" (mean of {len(sequences)} series; pictures show the first)" * (len(sequences) > 1)
    print(words)
    make_folder(out)
    numbers = model.scale.to_data(forecast, as_bytes=data.series[0].dtype == np.uint8)
    with open_atomic(out / "forecast.npy") as file:
        np.save(file, restore_axes(numbers, data.axes))
    for suffix, channels, values in model.scale.pictures():  # a picture for each channel of a field
        before, after, drawn = (x[0][:, channels] for x in (past, truth, forecast))
        picture = figures.prediction(before, after if len(after) else None, drawn, words, values)
        write_atomic(out / f"forecast{suffix}.png", picture)
        known = after if len(after) == frames else None
        gif = figures.animation(before, known, drawn, data.name, values)
        write_atomic(out / f"forecast{suffix}.gif", gif)
    print(f"output    {out}")


if __name__ == "__main__":
    run_script(lambda: tyro.cli(predict, use_underscores=True), "give fewer or smaller frames")
