"""The pictures, read back: exact greys, the numbers that were given, and texts that can be read."""

import io
import itertools
import warnings

import numpy as np
import pytest
from matplotlib.axis import Tick
from matplotlib.text import Text
from PIL import Image

import figures

BASELINES = {"black": 175.0, "copy_last": 123_456.0, "optical_flow": 180.0}
RUN = "my_model-2: hidden_channels 64 64 (was 96 96), my_model.py edited"
TITLE = "cost$1_$2.npy: validation split of an array of a long name, best weights; " * 3


def flat(value, frames, channels=1):
    return np.full((frames, channels, 16, 16), value, np.float32)


def history(n):
    """n rows of log.csv, with an evaluation in the first, in every tenth after it, and in the last."""
    names = "epoch", "sequences", "minutes", "learning_rate", "train_loss"
    names += "val_loss", "val_mse_per_frame", "val_sequences", "forecast_frames", "none", "my_own"
    rows = []
    for k in range(1, n + 1):
        found = (0.4 / k, 90 / k, 200) if k % 10 == 1 or k == n else (None,) * 3
        row = 2 * k / n, 2000 * k / n, k, 0.06, 0.5 / k, *found, k, 0, 0.002 / k
        rows.append(dict(zip(names, row, strict=True)))
    return rows


EVALUATIONS = [row for row in history(20) if row["val_loss"]]
RUNS = {f"{k} {RUN}": EVALUATIONS if k != 1 else [] for k in range(24)}  # run 1 was only scored
CURVES = {name: [1, 2] for name in (*RUNS, *BASELINES)}
WORDS = [f"sequence {k:,}" for k in range(1000, 1010)]
ROWS = {RUN: (1, flat(0, 12)), RUN * 5: (1, flat(0, 2)), "last frame copied": (WORDS, flat(0, 10))}
DRAW = {
    **{f"loss {n}": lambda n=n: figures.loss(history(n), BASELINES, TITLE) for n in (1, 2, 200)},
    "compare": lambda: figures.compare(RUNS, CURVES, TITLE),
    "per_frame": lambda: figures.per_frame(TITLE, {RUN * 3: [1], "black": [2]}),
    "many frames": lambda: figures.per_frame(TITLE, {RUN: [1, 2] * 15, "black": [1, 9] * 15}),
    "grid": lambda: figures.grid(ROWS, TITLE),
}


@pytest.fixture
def drawn(monkeypatch):
    """A function that returns the figure of a picture, laid out without a warning."""
    kept = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: kept.append(figure))

    def draw(name):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as "constrained_layout not applied"
            DRAW[name]()
            kept[-1].draw_without_rendering()
        return kept[-1]

    return draw


@pytest.mark.parametrize("name", DRAW)
def test_texts_lie_inside_and_apart(name, drawn):
    figure = drawn(name)
    numbers = {text for tick in figure.findobj(Tick) for text in (tick.label1, tick.label2)}
    texts = [text for text in figure.findobj(Text) if text.get_text() and text not in numbers]
    boxes = {text: text.get_window_extent() for text in texts}
    for text, box in boxes.items():
        assert min(*box.min, *(figure.bbox.size - box.max)) > -1 and text.get_fontsize() >= 7.5, text
    for a, b in itertools.combinations(texts, 2):
        overlap = np.minimum(boxes[a].max, boxes[b].max) - np.maximum(boxes[a].min, boxes[b].min)
        assert overlap.min() < 2, (a, b)


def lines(axes):
    """(x, y) of each curve."""
    return [[list(map(float, xy)) for xy in line.get_data()] for line in axes.lines]


def test_losses_are_those_of_the_history(drawn):
    left, right, *others = drawn("loss 2").axes
    assert lines(left) == [[[1, 2], [0.5, 0.25]], [[1, 2], [0.4, 0.2]]]
    assert [lines(axes)[0][1] for axes in others] == [[0.06, 0.06], [1, 2], [0, 0], [0.002, 0.001]]
    assert [axes.get_title() for axes in others] == ["learning rate", "forecast frames", "none", "my own"]
    assert lines(right)[0] == [[1, 2], [90, 45]]
    assert [y[0] for _, y in lines(right)[1:]] == [*BASELINES.values()]
    assert left.get_xlim() == (0, 2.06)  # epochs


def test_runs_are_compared_over_time_sequences_and_frames(drawn):
    by_time, by_sequences, by_frame = drawn("compare").axes
    errors = [90, 90 / 11, 4.5]
    assert lines(by_time)[0] == [[1, 11, 20], errors] and lines(by_sequences)[0] == [[0.1, 1.1, 2], errors]
    assert lines(by_frame) == [[[1, 2], [1, 2]]] * len(CURVES)
    for three in zip(by_time.lines, by_sequences.lines, by_frame.lines[: len(RUNS)], strict=True):
        assert len({(line.get_label(), line.get_color(), line.get_marker()) for line in three}) == 1


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def test_the_grey_scale_is_fixed():
    past, truth, forecast = flat(0.1, 30), flat(0.25, 2), flat(0.75, 2)
    grey = pixels(figures.prediction(past, truth, forecast, "title"))[..., 0]
    rows = [np.argwhere(grey == value)[:, 0] for value in (26, 64, 191, 128)]  # the last: |0.75 - 0.25|
    assert [round(len(row) / 128**2) for row in rows] == [10, 2, 2, 2]  # some of 30
    assert list(map(np.median, rows)) == sorted(map(np.median, rows))  # input, truth, forecast, error
    red = flat(0, 2, 3)
    red[:, 0] = 1
    for picture in (figures.prediction(red, red, red, ""), figures.animation(red, red, red, "")):
        assert (np.abs(pixels(picture).astype(int) - (255, 0, 0)).max(-1) < 8).sum() >= 2 * 64**2


def test_the_animation_keeps_every_grey():
    past, truth, forecast = np.random.default_rng(0).random((3, 2, 2, 16, 16))
    truth[:] = past[:1]  # a still video
    gif = Image.open(io.BytesIO(figures.animation(past, truth, forecast, "title")))
    assert gif.n_frames == 4 and gif.info["loop"] == 0
    for t, frames in enumerate(zip([*past, *truth], [*past, *forecast], strict=True)):
        gif.seek(t)
        pause = t in (1, 3)  # before the forecast, and at the end
        assert gif.info["duration"] == (600 if pause else 150)
        image = np.asarray(gif.convert("L"))[22 + 2 : -22 : 4, 2::4]  # one number a pixel of the video
        expected = np.rint(np.concatenate(frames, -1).mean(0) * 255)  # the mean of two channels
        np.testing.assert_array_equal(np.delete(image, slice(16, 18), 1), expected)
