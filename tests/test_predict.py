"""predict.py: frames of one's own, in every documented form."""

import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import FRAMES_IN, FRAMES_OUT, here
from PIL import Image

import main
from predict import predict
from support import UserError

T = FRAMES_IN + FRAMES_OUT


@pytest.fixture
def trained(short_run):
    return short_run / "best.pt"


@pytest.fixture
def frames(array):
    """The first test sequence, (T, 16, 16) uint8."""
    return np.load(array)[51]


def forecast(source, weights, out, n=FRAMES_OUT, start=0):
    """forecast.npy of predict.py. A source that is an array is saved first."""
    if isinstance(source, np.ndarray):
        np.save(out / "mine.npy", source)
        source = out / "mine.npy"
    predict(source, weights, n, start, out / "forecast")
    for name in ("forecast.gif", "forecast.png"):
        with Image.open(out / "forecast" / name) as image:
            image.load()
    return np.load(out / "forecast" / "forecast.npy")


def drawn(weights, frames, n=FRAMES_OUT):
    """What `main.load(path).forecast` draws, in grey levels; of a copy, which has weights of its own."""
    model = main.load(weights)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(model.head[-1].weight)
    past = torch.from_numpy(frames[:FRAMES_IN] / np.float32(255))[None, :, None]
    return twin.forecast(past, n)[0, :, 0].double().numpy() * 255


def close(found, expected, levels=1):
    assert found.dtype == np.uint8 and np.abs(found.astype(int) - expected).max() <= levels


def test_the_forecast_is_that_of_training_and_is_scored(trained, frames, tmp_path, capsys):
    close(forecast(frames, trained, tmp_path), np.load(trained.with_name("forecast.npy"))[:, 0].astype(int))
    mse = np.square((drawn(trained, frames) - frames[FRAMES_IN:]) / 255).sum((1, 2)).mean()
    words = f"{FRAMES_IN} frames in, {FRAMES_OUT} forecast, MSE {mse:.0f} over the 4 frames that followed"
    assert words in capsys.readouterr().out


def test_axes_are_those_of_the_input(frames, trained, tmp_path, capsys):
    expected = drawn(trained, frames, 6)
    close(forecast(frames[..., None], trained, tmp_path, n=6), expected[..., None])
    assert "MSE" in capsys.readouterr().out
    close(forecast(frames[:FRAMES_IN], trained, tmp_path, n=6), expected)
    assert "MSE" not in capsys.readouterr().out
    close(forecast(np.stack([frames] * 9), trained, tmp_path, n=6), np.stack([expected] * 9))
    printed = capsys.readouterr().out
    # nine equal sequences look as if time were first
    assert "are time and sequence swapped?" in printed
    assert "(mean of 9 series; pictures show the first)" in printed
    (tmp_path / "series").mkdir()
    np.save(tmp_path / "series" / "a.npy", frames)
    np.save(tmp_path / "series" / "b.npy", frames[: FRAMES_IN + 1])
    close(forecast(tmp_path / "series", trained, tmp_path), np.stack([drawn(trained, frames)] * 2))
    assert f"cut       all series to the {FRAMES_IN + 1} frames of the shortest" in capsys.readouterr().out


def test_start_counts_from_both_ends(frames, trained, tmp_path):
    longer = np.concatenate((frames[::-1], frames))
    for first in T, -T:
        close(forecast(longer, trained, tmp_path, start=first), drawn(trained, frames))
    for first, found in (2 * T - 3, 3), (-2 * T - 1, 0):
        sentence = f"have {found} frames from --start {first} on; the weights need 6"
        with pytest.raises(UserError, match=sentence):
            forecast(longer, trained, tmp_path, start=first)


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """(a field that stands still, with land, in its units; weights trained on it)."""
    folder = tmp_path_factory.mktemp("field")
    still = 270 + 30 * np.sin(np.arange(18)[:, None] / 5 + np.arange(21) / 4)
    still[2:5, 3:7] = np.nan
    array = np.repeat(still[None], 80, 0)
    np.save(folder / "field.npy", array)
    return array, here(folder / "field.npy", folder, frames_in=3, frames_out=2, epochs=2) / "best.pt"


def test_a_field_comes_back_in_its_units(field, tmp_path):
    """What stands still stays where it is; what is missing is missing."""
    array, weights = field
    found = forecast(array, weights, tmp_path, n=2, start=-3)
    assert found.dtype == np.float32 and found.shape == (2, 18, 21)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(array[:2]))
    assert np.nanmax(np.abs(found - array[:2])) < 6  # of a range of 60
    gone = array[:3].copy()
    gone[-1, 10, 10] = gone[0, 12, 12] = np.nan  # in the last input frame; in the first
    found = forecast(gone, weights, tmp_path, n=2)
    assert np.isnan(found[:, 10, 10]).all() and np.isfinite(found[:, 12, 12]).all()


def test_weights_and_data_that_do_not_fit(field, trained, frames, tmp_path, capsys):
    array, weights = field
    with pytest.raises(UserError, match=r"the data have 2 channels; .*best\.pt is for 1"):
        forecast(np.stack([array] * 2, -1), weights, tmp_path)
    capsys.readouterr()
    forecast(array - 273.15, weights, tmp_path)
    assert "warning   the scale hardly fits these values: they go from " in capsys.readouterr().out
    forecast(frames / 255, trained, tmp_path)
    assert "the scale hardly fits these values: they go from 0 to 1" in capsys.readouterr().out
    forecast(frames, trained, tmp_path)
    assert forecast(frames.astype(float), trained, tmp_path).dtype == np.float32
    assert "warning" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="frames go from 0 to 255; expected 0 to 1"):
        main.load(trained).forecast(torch.tensor([0, 255]).expand(1, 3, 1, 16, 2), 1)


def test_a_video_and_a_folder_of_images(frames, trained, tmp_path, monkeypatch):
    """Lossless, so that both are the array again."""
    images = tmp_path / "images"
    images.mkdir()
    monkeypatch.chdir(tmp_path)  # FFmpeg would take "12:" for a protocol
    video = cv2.VideoWriter(str(tmp_path / "12:30.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 10, (16, 16))
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(images / f"{k:03}.png")
        video.write(frame[..., None].repeat(3, -1))
    video.release()
    (images / "notes.txt").write_text("no image")
    for name in ("images", "12:30.avi"):
        close(forecast(Path(name), trained, tmp_path), drawn(trained, frames), levels=2)
