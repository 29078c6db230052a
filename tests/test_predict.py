"""predict.py: frames of one's own, in every documented form."""

import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import FRAMES_IN, FRAMES_OUT, ROOT, finish, here, start
from PIL import Image

import main
from predict import predict
from support import UserError

T = FRAMES_IN + FRAMES_OUT


@pytest.fixture
def trained(reference):
    return reference[0] / "best.pt"


@pytest.fixture
def frames(array):
    """The first test sequence, (T, 16, 16) uint8."""
    return np.load(array)[:T, 51]


def forecast(source, weights, out, n=FRAMES_OUT):
    """forecast.npy of predict.py. A source that is an array is saved first."""
    if isinstance(source, np.ndarray):
        np.save(out / "mine.npy", source)
        source = out / "mine.npy"
    predict(source, weights, n, out / "forecast")
    for name in ("forecast.gif", "forecast.png"):
        with Image.open(out / "forecast" / name) as image:
            image.load()
    return np.load(out / "forecast" / "forecast.npy").astype(int)


def drawn(weights, frames, n=FRAMES_OUT):
    """What `main.load(path).forecast` draws, in grey levels; of a copy, which has weights of its own."""
    model = main.load(weights)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(model.head[-1].weight)
    past = torch.from_numpy(frames[:FRAMES_IN] / np.float32(255))[None, :, None]
    return twin.forecast(past, n)[0, :, 0].double().numpy() * 255


def test_the_forecast_is_that_of_training_and_is_scored(reference, trained, frames, tmp_path, capsys):
    expected = np.load(reference[0] / "forecast.npy")[:, 0].astype(int)
    assert np.abs(forecast(frames, trained, tmp_path) - expected).max() <= 1
    mse = np.square((drawn(trained, frames) - frames[FRAMES_IN:]) / 255).sum((1, 2)).mean()
    words = f"{FRAMES_IN} frames in, {FRAMES_OUT} forecast, MSE {mse:.1f} over the 4 frames that followed"
    assert words in capsys.readouterr().out
    words = "--weights", trained, "--frames", "3", "--out", tmp_path / "again"
    printed, _ = finish(start(tmp_path / "mine.npy", *words, script=ROOT / "predict.py", cwd=tmp_path))
    assert "MSE" in printed and np.load(tmp_path / "again" / "forecast.npy").shape == (1, 3, 16, 16)


ARRAYS = {
    "T H W 1": lambda frames: frames[..., None],
    "T H W 3": lambda frames: frames[..., None].repeat(3, -1),  # colors for weights that know grey
    "N T H W": lambda frames: np.stack([frames] * 9),
    "float": lambda frames: frames / 255,
    "input only": lambda frames: frames[:FRAMES_IN],
}


@pytest.mark.parametrize("shape", ARRAYS)
def test_arrays(shape, frames, trained, tmp_path, capsys):
    found = forecast(ARRAYS[shape](frames), trained, tmp_path, n=6)
    printed = capsys.readouterr().out
    assert found.shape == (9 if shape[0] == "N" else 1, 6, 16, 16)
    assert np.abs(found - drawn(trained, frames, 6)).max() <= 1
    # nine equal sequences look as if time were first
    for words in "are time and sequence swapped?", "(mean of 9 sequences; pictures show the first)":
        assert (words in printed) == (shape[0] == "N")


def test_frames_of_another_range_are_refused(trained):
    with pytest.raises(ValueError, match="frames go from 0 to 255; expected 0 to 1"):
        main.load(trained).forecast(torch.tensor([0, 255]).expand(1, 3, 1, 16, 2), 1)


def test_odd_sizes_are_resized(trained, tmp_path, capsys):
    assert forecast(np.full((T, 17, 30), True), trained, tmp_path).shape == (1, 4, 16, 32)
    assert "resized   from 17×30 to 16×32" in capsys.readouterr().out


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
        assert np.abs(forecast(Path(name), trained, tmp_path) - drawn(trained, frames)).max() <= 2
    for content in (images / "000.png").read_bytes()[:50], b"":
        (images / "001.png").write_bytes(content)
        with pytest.raises(UserError, match="needs readable images of one size; it has 10 image files"):
            predict(images, trained)
    (tmp_path / "clip.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"clip\.mp4 gives no frames"):
        predict(tmp_path / "clip.mp4", trained)


NO_FRAMES = [
    (np.zeros((1, 16, 16)), r"shape \(1, 16, 16\); expected .* at least 2 frames"),
    (np.zeros((2, 8, 1, 16, 16)), "1 or 3 channels"),
    (np.full((T, 16, 16), 300.0), "values go from 300 to 300"),
    (np.full((T, 16, 16), 300), "values go from 300 to 300"),
    (np.full((T, 16, 16), np.nan), "values go from nan"),
    (np.full((T, 16, 16), "a"), "is no .npy of numbers, no video"),
    (Path("missing.mp4"), "is not there"),
]


@pytest.mark.parametrize(("source", "sentence"), NO_FRAMES)
def test_what_is_no_frames(source, sentence, trained, tmp_path):
    with pytest.raises(UserError, match=sentence):
        forecast(source, trained, tmp_path)
    assert not (tmp_path / "forecast").exists()


def test_a_file_where_the_folder_should_be(trained, tmp_path):
    np.save(tmp_path / "mine.npy", np.zeros((T, 16, 16)))
    words = tmp_path / "mine.npy", "--weights", trained, "--out", tmp_path / "mine.npy"
    _, err = finish(start(*words, script=ROOT / "predict.py"), 1)
    assert err == f"predict.py: cannot write to {tmp_path / 'mine.npy'}: File exists\n"


@pytest.mark.parametrize("model", ["paper", "convlstm", "seq2seq"])
def test_weights_of_the_others(model, array, frames, tmp_path):
    """And a last.pt, as a best.pt."""
    folder = here(array, tmp_path, model=model, epochs=1, max_minutes=0, train_sequences=5)
    best, last = (forecast(frames, folder / name, tmp_path) for name in ("best.pt", "last.pt"))
    assert best.shape == (1, FRAMES_OUT, 16, 16) and np.array_equal(best, last)
