"""The pictures, read back: grey scale fixed, greys exact, and a file that is whole or as it was."""

import errno
import os

import matplotlib
import numpy as np
import pytest
from PIL import Image

import figures

T_IN, T_OUT, SIZE = 3, 2, 16


def flat(value, frames, channels=1):
    return np.full((frames, channels, SIZE, SIZE), value, np.float32)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_the_grey_scale_is_fixed(tmp_path):
    path = tmp_path / "grid.png"
    figures.prediction(path, flat(0.5, T_IN), flat(0.25, T_OUT), flat(0.75, T_OUT), "title")
    picture = pixels(path)
    grey = picture[..., 0]
    assert (picture == grey[..., None]).all()
    rows = {value: np.argwhere(grey == value)[:, 0] for value in (128, 64, 191)}  # of 0.5, 0.25, 0.75
    a_frame = len(rows[64]) / T_OUT
    assert a_frame > 80 * 80  # printed pixels: large enough to see
    assert len(rows[191]) / T_OUT == pytest.approx(a_frame, rel=0.1)
    assert len(rows[128]) / (T_IN + T_OUT) == pytest.approx(a_frame, rel=0.1)  # the input, and |0.75 - 0.25|
    (truth, forecast), both = (np.median(rows[value]) for value in (64, 191)), np.percentile(rows[128], (10, 90))
    assert both[0] < truth < forecast < both[1]  # input, truth, forecast, error


def test_a_dark_frame_is_not_brightened(tmp_path):
    frames = flat(0, T_IN)
    frames[:, :, 4:8] = 0.1
    figures.prediction(tmp_path / "grid.png", frames, frames[:2], frames[:2], "title")
    grey = pixels(tmp_path / "grid.png")[..., 0]
    assert (grey == 26).sum() > 1000 and (grey == 0).sum() > 1000


def panels(path):
    """The two panels of each frame of an animation, one number a pixel of the video."""
    with Image.open(path) as gif:
        for t in range(gif.n_frames):
            gif.seek(t)
            image = np.asarray(gif.convert("RGB"))[22 + 2 : 22 + 4 * SIZE : 4, 2::4]  # between the bars
            yield image[:, :SIZE], image[:, -SIZE:]


def test_the_animation_keeps_every_grey(tmp_path):
    rng = np.random.default_rng(0)
    past, truth, forecast = (rng.random((t, 1, SIZE, SIZE)) for t in (T_IN, T_OUT, T_OUT))
    figures.animation(tmp_path / "a.gif", past, truth, forecast, "title")
    expected = zip(np.concatenate([past, truth]), np.concatenate([past, forecast]), strict=True)
    for found, video in zip(panels(tmp_path / "a.gif"), expected, strict=True):
        for panel, frame in zip(found, video, strict=True):
            np.testing.assert_array_equal(panel, np.rint(frame[0] * 255).astype(np.uint8)[..., None].repeat(3, -1))
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0 and gif.info["duration"] == 150


def test_a_still_video_keeps_its_frames(tmp_path):
    figures.animation(tmp_path / "a.gif", flat(0, T_IN), flat(0, T_OUT), flat(0, T_OUT), "title")
    assert len(list(panels(tmp_path / "a.gif"))) == T_IN + T_OUT


def test_large_videos_are_not_enlarged(tmp_path):
    large = np.zeros((2, 1, 300, 300))
    figures.animation(tmp_path / "a.gif", large, large, large, "title")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.width == 2 * 300 + 8


def test_colours_are_drawn(tmp_path):
    red = flat(0, T_IN, 3)
    red[:, 0] = 1
    figures.prediction(tmp_path / "grid.png", red, red[:2], red[:2], "title")
    assert (pixels(tmp_path / "grid.png") == (255, 0, 0)).all(-1).sum() > 7 * 80 * 80
    figures.animation(tmp_path / "a.gif", red, red[:2], red[:2], "title")
    for panel in (panel for both in panels(tmp_path / "a.gif") for panel in both):
        assert (np.abs(panel.astype(int) - (255, 0, 0)) <= 8).all()  # one palette a frame


def test_of_many_frames_some_are_shown(tmp_path):
    frames = flat(0, 30)
    frames[29], frames[0], frames[14] = 1, 0.5, 0.25
    figures.grid(tmp_path / "grid.png", {"truth": (11, frames)}, "title", most=3)
    grey = pixels(tmp_path / "grid.png")[..., 0]
    columns = [np.median(np.argwhere(grey[len(grey) // 2] == value)) for value in (128, 64)]
    assert columns[0] < columns[1] and not np.isnan(columns).any()  # the first, the middle one, and the last


def test_two_channels_show_their_mean():
    frames = flat(0, T_IN, 2)
    frames[:, 1] = 1
    assert figures.to_grey(frames).shape == (T_IN, SIZE, SIZE) and (figures.to_grey(frames) == 128).all()


def test_a_name_is_no_formula(tmp_path):
    name = "cost$1_$2.npy"
    figures.compare(tmp_path / "a.png", {name: HISTORY}, {name: [1, 2]}, name, name)
    figures.grid(tmp_path / "b.png", {name: (1, flat(0, 2))}, name)


HISTORY = [{"sequences": 1000, "train_loss": 0.5, "val_loss": 0.4, "minutes": 0.5, "val_mse_per_frame": 90.0}]
DRAW = {
    "loss": lambda path: figures.loss(path, HISTORY, {"black": 175.0}, "title"),
    "per_frame": lambda path: figures.per_frame(path, {"title": {"my_model": [1, 2], "copy_last": [2, 3]}}),
    "compare": lambda path: figures.compare(path, {"a": HISTORY}, {"a": [1, 2], "black": [2, 3]}, "of a", "of b"),
    "prediction": lambda path: figures.prediction(path, flat(0, 3), flat(0, 2), flat(0, 2), "title"),
    "animation": lambda path: figures.animation(path, flat(0, 3), flat(0, 2), flat(0, 2), "title"),
}


def drawn(monkeypatch, function, *arguments):
    """The figure that would have been written."""
    kept = []
    monkeypatch.setattr(figures, "write", lambda figure, path: kept.append(figure))
    function("", *arguments)
    return kept[0]


def lines(axes):
    """label → (x, y) of each curve."""
    return {line.get_label(): [list(map(float, xy)) for xy in line.get_data()] for line in axes.lines}


LONGER = [*HISTORY, {"sequences": 3000, "train_loss": 0.3, "val_loss": 0.2, "minutes": 2, "val_mse_per_frame": 60.0}]


def test_losses_are_those_of_the_history(monkeypatch):
    left, right = drawn(monkeypatch, figures.loss, LONGER, {"black": 175.0, "optical_flow": 180.0}, "title").axes
    train, validation = [[1, 3], [0.5, 0.3]], [[1, 3], [0.4, 0.2]]
    assert lines(left) == {"train (mean since the last point)": train, "validation": validation}
    of_all = lines(right)
    assert of_all.pop("validation") == [[1, 3], [90, 60]]
    assert {label: set(y) for label, (_, y) in of_all.items()} == {
        "black frame: 175": {175},
        "optical flow: 180": {180},
    }
    assert left.get_title() == "title" and right.get_title() == "validation MSE: last 60.0, best 60.0"
    assert "thousands" in left.get_xlabel() and "nats per pixel" in left.get_ylabel() and "MSE" in right.get_ylabel()
    assert left.get_ylim()[0] == right.get_ylim()[0] == left.get_xlim()[0] == 0


def test_the_legend_of_losses_lies_inside(monkeypatch):
    errors_of_large_frames = dict.fromkeys(("black", "copy_last", "optical_flow"), 123_456.0)
    figure = drawn(monkeypatch, figures.loss, LONGER, errors_of_large_frames, "title")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width and 0 <= box.y0 < box.y1
    assert [text.get_text() for text in legend.get_texts()][:2] == ["train (mean since the last point)", "validation"]
    assert len(legend.get_texts()) == 5


def test_curves_of_forecasts_are_those_given(monkeypatch):
    (axes,) = drawn(monkeypatch, figures.per_frame, {"of b": {"my_model": [1, 2], "copy_last": [2, 5]}}).axes
    assert lines(axes) == {"my_model": [[1, 2], [1, 2]], "last frame copied": [[1, 2], [2, 5]]}
    assert axes.get_title() == "of b" and axes.get_xlabel() == "forecast frame" and axes.get_ylim()[0] == 0


def test_models_are_compared_over_time_sequences_and_frames(monkeypatch):
    histories, curves = {"a": LONGER, "b": HISTORY}, {"a": [1, 2], "b": [3, 4], "black": [2, 3]}
    figure = drawn(monkeypatch, figures.compare, histories, curves, "of a", "of b, c")
    by_time, by_sequences, by_frame = figure.axes
    assert lines(by_time) == {"a": [[0.5, 2], [0.4, 0.2]], "b": [[0.5], [0.4]]}
    assert lines(by_sequences) == {"a": [[1, 3], [0.4, 0.2]], "b": [[1], [0.4]]}
    assert lines(by_frame) == {"a": [[1, 2], [1, 2]], "b": [[1, 2], [3, 4]], "black frame": [[1, 2], [2, 3]]}
    assert [axes.get_title() for axes in figure.axes] == ["of a", "of a", "of b,\nc"]
    assert "minutes" in by_time.get_xlabel() and "thousands" in by_sequences.get_xlabel()
    colours = [[line.get_color() for line in axes.lines[:2]] for axes in figure.axes]
    assert colours[0] == colours[1] == colours[2]  # a model's is the same in each panel


def test_weights_that_were_only_scored_are_named_so(monkeypatch):
    histories, curves = {"a": HISTORY, "weights_b": []}, {"a": [1, 2], "weights_b": [3, 4]}
    *_, by_frame = drawn(monkeypatch, figures.compare, histories, curves, "of a", "of b").axes
    assert lines(by_frame) == {"a": [[1, 2], [1, 2]], "weights_b (no log)": [[1, 2], [3, 4]]}


def test_a_long_name_of_a_row_fits(monkeypatch):
    figure = drawn(monkeypatch, figures.grid, {"weights_of_a_long_name": (1, flat(0, 5))}, "title")
    name = figure.axes[0].texts[0]
    figure.set_dpi(figures.DPI)  # at which it is saved
    assert name.get_text() == "weights_of_a_long_name"
    assert name.get_window_extent().x0 >= 0
    assert figure.bbox.size.round().tolist() == list(figure.axes[0].images[0].get_size()[::-1])


def test_a_long_title_fits(monkeypatch):
    title = "a name that is long, trained on fresh sequences: " * 3
    grid = drawn(monkeypatch, figures.grid, {"truth": (1, flat(0, 5))}, title)
    panels = drawn(monkeypatch, figures.per_frame, {title: {"a": [1, 2]}, "b": {"a": [1, 2]}})
    for figure, text, width in ((grid, grid.axes[0].texts[-1], 1), (panels, panels.axes[0].title, 1 / 2)):
        assert text.get_text() == title
        assert text.get_window_extent().width < width * figure.bbox.width


@pytest.mark.parametrize("name", DRAW)
def test_a_notebook_and_a_picture_keep_their_own_style(name, tmp_path):
    DRAW[name](tmp_path / "before")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": False}):
        style = dict(matplotlib.rcParams)
        DRAW[name](tmp_path / "after")
        assert dict(matplotlib.rcParams) == style
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


@pytest.mark.parametrize("name", DRAW)
def test_a_picture_is_written_whole_or_not_at_all(name, tmp_path, monkeypatch):
    path = tmp_path / ("a.gif" if name == "animation" else "a.png")
    DRAW[name](path)
    before = path.read_bytes()
    DRAW[name](path)
    assert path.read_bytes() == before  # the same picture, byte for byte

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Exception, match=f"{path.name}.*No space left"):
        DRAW[name](path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(Exception, match="No such file"):
        DRAW[name](tmp_path / "nowhere" / path.name)
