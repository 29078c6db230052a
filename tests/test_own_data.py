"""Your own data: each layout and number type, splits, units, gaps, videos as written, and what is refused."""

import csv
import os

import cv2
import numpy as np
import pytest
import torch
from conftest import flags, here, moving_squares, results, stopped_after_a_checkpoint

import main
import own_data
from own_data import cut, read, restore_axes
from support import UserError, checkpoint
from support.scale import Scale, fill

SIZE = 32
SIZES = (SIZE, 2 * SIZE), (SIZE, SIZE), (0, 0)
VIDEO = 64, 64, 1, 1
FEW = {"frames_in": 3, "frames_out": 2, "epochs": 1, "train_sequences": 5}
FIELD = np.random.default_rng(0).normal(size=(40, 18, 21)).cumsum(0) * 3 - 100  # values about -100, (T, H, W)


def saved(array, folder, name="own.npy"):
    np.save(folder / name, array)
    return folder / name


def load(path, n_frames=5, video=VIDEO, train_sequences=0, value_range=(0, 0), scale=None):
    return own_data.own_data(path, n_frames, video, train_sequences, value_range, scale)


LAYOUTS = {
    "THW": (40, 18, 21),
    "THWC": (40, 18, 21, 2),
    "NTHW": (7, 40, 18, 21),
    "NTHWC": (7, 40, 18, 21, 15),
    "TNHW": (20, 3, 64, 64),  # as Moving MNIST
}


@pytest.mark.parametrize("axes", LAYOUTS)
@pytest.mark.parametrize("order", "CF")
def test_each_layout_is_read_and_restored(axes, order, tmp_path):
    array = np.arange(np.prod(LAYOUTS[axes])).reshape(LAYOUTS[axes]) % 251
    path = saved(np.asarray(array, np.uint8 if axes == "TNHW" else np.int16, order=order), tmp_path)
    source = read(path, VIDEO)
    assert source.axes == axes and len(source.series) == (array.shape[axes.index("N")] if "N" in axes else 1)
    names = dict(zip(axes, array.shape, strict=True))
    assert source.series[0].shape == (names["T"], names.get("C", 1), names["H"], names["W"])
    frames = np.stack(source.series)  # (N, T, C, H, W)
    np.testing.assert_array_equal(restore_axes(frames, axes), array)
    at = {"N": 0, "T": 3, "C": 0, "H": 5, "W": 7}
    assert frames[0, 3, 0, 5, 7] == array[tuple(at[axis] for axis in axes)]


def test_what_cannot_be_told_apart_is_read_as_documented(tmp_path):
    """16 channels at the end are the width of a frame; a few sequences of 64×64 floats have no time first."""
    assert read(saved(np.zeros((30, 20, 20, 16)), tmp_path), VIDEO).axes == "NTHW"
    assert read(saved(np.zeros((20, 3, 64, 64), np.float32), tmp_path), VIDEO).axes == "NTHW"
    assert read(saved(np.zeros((20, 3, 32, 32), np.uint8), tmp_path), VIDEO).axes == "NTHW"


@pytest.mark.parametrize("kind", ["bool", "int8", "uint16", "int64", "float16", "float32", "float64", ">f4"])
def test_each_number_type_goes_there_and_back(kind, tmp_path):
    field = (FIELD > -100 if kind == "bool" else FIELD).astype(kind)
    data = load(saved(field, tmp_path))
    batch = data.training[np.array([3])]
    assert batch.dtype == torch.float32 and not data.scale.is_grey
    unit = data.scale.to_unit(batch)
    assert 0 <= unit.min() < unit.max() <= 1
    low, high = field[:28].min().astype(float), field[:28].max().astype(float)
    assert data.scale == Scale((low,), (high,), is_grey=False)  # of the training split
    np.testing.assert_allclose(unit[0, :, 0], (field[3:8].astype(float) - low) / (high - low), atol=1e-6)
    back = data.scale.to_data(unit)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back[0, :, 0], field[3:8].astype(float), rtol=1e-5)


def test_sequences_share_no_frame_across_splits(tmp_path, capsys):
    """Frames are numbered. A few series are cut along time, ten or more are not cut."""
    numbered = np.arange(3 * 100).reshape(3, 100, 1, 1) + np.zeros((16, 16))
    for array, expected in (
        (numbered[0], (66, 3, 3)),  # 70, 15 and 15 frames: 70 - 5 + 1 sequences
        (numbered, (198, 9, 9)),
        (numbered.reshape(12, 25, 16, 16), (9 * 21, 5, 10)),  # series by series: 9, 1, 2
        (numbered[:, :14], (10, 2, 2)),  # three, too short to be cut along time
    ):
        data = load(saved(array, tmp_path))
        splits = data.training, data.validation, data.test
        assert tuple(map(len, splits)) == expected
        frames = [split[np.arange(len(split))][:, :, 0, 0, 0] for split in splits]
        assert all((np.diff(part) == 1).all() for part in frames)  # in order, of one series
        found = [set(part.flatten().tolist()) for part in frames]
        assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
        for part, values in zip(frames[1:], found[1:], strict=True):
            assert len(values) == part.numel()  # no frame twice
    assert len(load(saved(numbered[0], tmp_path), train_sequences=4).training) == 4
    words = "along time; series 1: frames 1 to 70 training, 71 to 85 validation, 86 to 100 test"
    assert words in capsys.readouterr().out
    assert [len(part) for part in cut([20] * 10, 20)] == [8, 1, 1]
    short, long = (0, 0, 25), (1, 0, 60)  # too short to be cut: all of it is for training
    assert cut([25, 100], 20) == ([short, long], [(1, 60, 80)], [(1, 80, 100)])


def test_units_channels_and_the_knob(tmp_path, capsys):
    two = np.stack((FIELD, 1e6 + FIELD**2), -1)
    scale = load(saved(two, tmp_path)).scale
    training = two[:28].reshape(-1, 2)
    assert scale.low == tuple(training.min(0)) and scale.high == tuple(training.max(0))
    assert [end for end, *_ in scale.pictures()] == ["", "_channel_2"]
    two[..., 1] = 7  # never changes
    scale = load(saved(two, tmp_path)).scale
    assert (scale.low[1], scale.high[1]) == (7, 8)
    capsys.readouterr()
    data = load(saved(two[..., 0], tmp_path), value_range=(-110, -90))
    outside = ((FIELD < -110) | (FIELD > -90)).mean()
    assert data.scale == Scale((-110.0,), (-90.0,), is_grey=False)
    words = f"-110 to -90; outside, and clipped: {outside:.2%}"
    assert words in capsys.readouterr().out
    assert data.scale.to_unit(data.training[np.arange(9)]).max() == 1


def test_a_missing_pixel_keeps_its_last_value():
    nan = torch.nan
    pixels = [[nan, 0.25, nan, nan, 0.5], [nan, nan, nan, nan, nan], [nan, 0.75, 0.5, nan, 1]]  # over time
    filled = [[0.5, 0.25, 0.25, 0.25, 0.5], [0.5, 0.5, 0.375, 0.375, 0.75], [0.5, 0.75, 0.5, 0.5, 1]]
    # (B, T, C, H, W): as above, and in other channels and sequences other values
    frames, expected = (torch.tensor(x).T[None, :, None, None] for x in (pixels, filled))
    frames, expected = (torch.cat((x, torch.ones_like(x)), 2) for x in (frames, expected))
    frames, expected = (torch.cat((x, torch.zeros_like(x))) for x in (frames, expected))
    assert torch.equal(fill(frames), expected) and fill(expected) is expected


def test_a_run_on_a_field_with_gaps(tmp_path, capsys):
    """Two channels, odd sizes, land, lost pixels. What is missing is in no score and in no forecast."""
    field = np.stack((FIELD, FIELD[:, ::-1] * 2 + 7), -1).astype(np.float32)
    field[:, :5, :6] = np.nan  # land
    field[::7, 10:12] = np.nan
    path = saved(field, tmp_path)
    run = here(path, tmp_path / "out", pictures=True, **FEW)
    printed = capsys.readouterr().out
    assert "40 frames of 18×21, channels: 2, float32 from" in printed and "missing (NaN): " in printed
    for name in ("predict_1", "predict_worst", "predict_last_frame", "predict"):
        suffix = ".gif" if name == "predict" else ".png"
        assert all((run / f"{name}{end}{suffix}").exists() for end in ("", "_channel_2"))
    forecast = np.load(run / "forecast.npy")
    assert forecast.dtype == np.float32 and forecast.shape == (2, 2, 18, 21)
    scale = Scale.of(checkpoint.load(run / "best.pt")["scale"])
    low, high = (np.reshape(values, (-1, 1, 1)) for values in (scale.low, scale.high))
    test = field[34:].transpose(0, 3, 1, 2)  # 28 training, 6 validation, 6 test frames
    past, truth = test[:3], test[3:5]
    # scores know true values of input and future, though the network reads and forecasts no such value
    assert np.nanmin(truth) < low.min() and np.nanmin(past[-1]) < low.min()
    np.testing.assert_array_equal(np.isnan(forecast), np.isnan(past[-1:]) | np.zeros_like(truth, bool))
    known = np.isnan(past[-1:]) | np.isnan(truth)
    copy, scores = np.where(known, np.nan, past[-1:] - truth), results(run)["scores"]
    assert scores["copy_last"]["rmse"] == pytest.approx(np.sqrt(np.nanmean(copy**2, (0, 2, 3))), rel=1e-4)
    mine = np.where(known, np.nan, forecast - truth)
    assert scores["my_model"]["rmse"] == pytest.approx(np.sqrt(np.nanmean(mine**2, (0, 2, 3))), rel=1e-4)
    mse = np.nansum((mine / (high - low)) ** 2, (1, 2, 3)).mean()
    assert scores["my_model"]["mse_per_frame"]["mean"] == pytest.approx(mse, rel=1e-4)
    assert "RMSE 1" in printed and "skill" in printed and "black frame" not in printed
    assert np.isfinite([row["mean"] for row in scores["my_model"].values() if isinstance(row, dict)]).all()
    again = here(path, tmp_path / "out", **FEW, weights=run / "best.pt", eval_only=True)
    assert results(again)["scores"] == results(run)["scores"]


def test_a_frame_of_which_all_is_missing(tmp_path):
    """It has no score; the mean is that of the others."""
    field = FIELD.copy()
    field[[31, 37]] = np.nan  # the first that is forecast in validation, and in the test
    scores = results(here(saved(field, tmp_path), tmp_path / "out", pictures=True, **FEW))["scores"]
    mine, copy = (scores[who]["mse_per_frame"] for who in ("my_model", "copy_last"))
    for mse in mine, copy:
        assert mse["per_frame"] == [None, mse["mean"]]
    assert scores["my_model"]["skill"] == 1 - mine["mean"] / copy["mean"]


@pytest.mark.parametrize(("split", "last_input"), [("validation", 30), ("test", 36)])
def test_a_split_without_anything_to_score_is_refused_before_training(split, last_input, tmp_path):
    field = FIELD.copy()
    field[last_input] = np.nan  # of the only sequence of the split
    with pytest.raises(UserError, match=rf"in the {split} split of own\.npy, no pixel is known both"):
        here(saved(field, tmp_path), tmp_path / "out", **FEW)
    assert not list(tmp_path.glob("out/*/*"))


def test_the_loss_leaves_missing_pixels_out(tmp_path):
    """That of the first step, against its definition."""
    field = FIELD.astype(np.float32)
    field[::3, 4:9] = np.nan
    changes = {**FEW, "max_motion": 0, "grow_horizon": (0, 0)}
    path = saved(field, tmp_path)
    run = here(path, tmp_path / "out", **changes)
    (row,) = csv.DictReader((run / "log.csv").read_text("utf-8").splitlines())
    torch.manual_seed(0)
    model = main.build(main.parse(flags(path, tmp_path, **changes)), 1)
    low, high = np.nanmin(field[:28]), np.nanmax(field[:28])
    starts = np.linspace(0, 23, 5).astype(int)
    frames = torch.from_numpy(np.stack([(field[t : t + 5] - low) / (high - low) for t in starts]))[:, :, None]
    with torch.no_grad():
        probability = torch.sigmoid(model(fill(frames[:, :3]), 2)).double()
    truth = frames[:, 3:].double()
    losses = -(truth * probability.log() + (1 - truth) * (1 - probability).log())
    assert 0 < truth.isnan().double().mean() < 1
    assert float(row["train_loss"]) == pytest.approx(losses.nansum().item() / truth.numel(), rel=1e-4)


MODELS = "my_model", "paper", "convlstm", "seq2seq"


@pytest.mark.parametrize(
    ("model", "size"), [("my_model", (35, 19)), *((model, (17, 30)) for model in MODELS)]
)
def test_any_size_trains(model, size, tmp_path):
    field = np.random.default_rng(0).random((20, *size), np.float32)
    run = here(saved(field, tmp_path), tmp_path / "out", model=model, **FEW)
    assert np.load(run / "forecast.npy").shape == (2, 1, *size)


def test_a_resumed_run_has_its_scale(tmp_path, capsys):
    path, changes = saved(FIELD, tmp_path), {**FEW, "train_sequences": 10, "value_range": (-120, -80)}
    alone = here(path, tmp_path / "alone", **changes)
    with stopped_after_a_checkpoint():
        here(path, tmp_path / "out", **changes)
    again = here(path, tmp_path / "out", **changes)
    assert results(again) == results(alone) and results(again)["scale"]["low"] == [-120]
    assert main.load(again / "last.pt").scale == Scale((-120.0,), (-80.0,), is_grey=False)
    capsys.readouterr()
    here(saved(FIELD, tmp_path), tmp_path / "out", **FEW, weights=again / "last.pt")
    assert "; the weights were trained with -120 to -80\n" in capsys.readouterr().out


with_one = lambda value: np.where(np.arange(FIELD.size).reshape(FIELD.shape) == 7, value, FIELD)
REFUSED = [
    (FIELD * np.nan, r"all values of own\.npy, or .*, are missing \(NaN\)"),
    (FIELD * 0 + 3, r"all values of own\.npy are 3; there is nothing to forecast"),
    (with_one(np.inf), r"own\.npy has infinite values; write NaN where"),
    (with_one(1e300), "has infinite values"),  # in float32
    (FIELD / 1000 + 1e9, r"all values of own\.npy are 1e\+09;"),
    (np.where(np.arange(40)[:, None, None] < 34, FIELD, np.nan), "all values of the test split"),
    (np.where(np.arange(40)[:, None, None] == 39, 1e9, FIELD), r"to 1e\+09, far beyond the scale, .* NaN"),
    (FIELD * 1j, "holds complex128; expected integers or floats"),
    (np.full(FIELD.shape, "a"), "holds <U1; expected integers or floats"),
    (FIELD[:14], r"too few frames: expected at least one series of 15 .*, or three of 5 .*; found \[14\]"),
    (FIELD[:4], "too few frames: .*; found none so long"),
    (FIELD[:, :8, :10], "has frames of 18×10|has frames of 8×10; expected at least 16×16"),
    (FIELD[0], r"has shape \(18, 21\); expected \(T, H, W\)"),
]


@pytest.mark.parametrize(("array", "sentence"), REFUSED)
def test_what_cannot_be_learned_is_refused(array, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        load(saved(array, tmp_path))


def test_what_is_probably_wrong_is_warned_of(tmp_path, capsys):
    squares = moving_squares(30).swapaxes(0, 1)
    for wrong, warning in (
        (squares, ""),
        (squares.swapaxes(0, 1).copy(), "frames of a sequence differ more than sequences"),
        (squares // 255, "the scale hardly fits these values: they go from 0 to 1"),
        (squares[:, :1].repeat(20, axis=1), "hardly anything moves"),
        (np.where(FIELD > -95, -1e34, FIELD), "the value -1e+34 is far from all others"),
        (np.where(FIELD > -95, -9999, FIELD).astype(np.int16), "the value -9999 is far from all others"),
        (FIELD[:32, :16, :16].transpose(1, 2, 0), "16 frames of 16 rows: if the file has height"),
        (np.where(np.arange(40)[:, None, None] < 20, np.nan, FIELD), ""),
        (np.stack((FIELD[[0] * 40] * 99, FIELD), -1), ""),  # one of two channels stands still
        (np.stack((FIELD * 99, np.where(FIELD > -95, -999, FIELD)), -1), "the value -999 is far from"),
    ):
        load(saved(wrong, tmp_path))
        warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
        assert len(warnings) == bool(warning) and (not warning or warning in warnings[0]), warnings
    with pytest.raises(UserError, match="too few frames"):
        load(saved(np.stack([FIELD] * 3, 1), tmp_path))
    assert "series have 3 frames: if these are channels, put them at the end" in capsys.readouterr().out


def test_files_of_a_folder_are_series(tmp_path, capsys):
    folder = tmp_path / "many"
    folder.mkdir()
    for k, length in (2, 30), (10, 20), (9, 4):
        saved(np.full((length, 16, 16), k) + np.arange(length)[:, None, None], folder, f"part{k}.npy")
    data = load(folder)
    assert data.name == "many"
    first = [one[0, 0, 0, 0] for one in data.training.series]
    assert first == [2, 10]  # in the order of numbers; one is too short
    assert "left out  series shorter than 5 frames: 1" in capsys.readouterr().out
    saved(np.zeros((9, 16, 17)), folder, "other.npy")
    with pytest.raises(UserError, match=r"many differ .*: float64 of \(1, 16, 17\), int64 of \(1, 16, 16\)"):
        load(folder)


def test_files_named_after_the_splits_are_them(tmp_path, capsys):
    folder = tmp_path / "split"
    folder.mkdir()
    for k, (name, length) in enumerate({"Train 1": 9, "train2": 5, "validation": 6, "test": 12}.items()):
        saved(np.full((length, 16, 16), 100 * k) + np.arange(length)[:, None, None], folder, f"{name}.npy")
    data = load(folder)
    first = [split[np.arange(len(split))][:, 0, 0, 0, 0].tolist() for split in data[:3]]
    assert first == [[0, 1, 2, 3, 4, 100], [200], [300, 305]]
    assert (data.scale.low, data.scale.high) == ((0,), (104,))
    assert "split     by names of files, series: 2 training, 1 validation, 1 test" in capsys.readouterr().out
    saved(np.arange(4)[:, None, None] + np.zeros((16, 16), int), folder, "validation.npy")  # too short
    with pytest.raises(UserError, match="no file or folder named validation has 5 frames in a row"):
        load(folder)
    saved(np.arange(9)[:, None, None] + np.zeros((16, 16), int), folder, "2020.npy")
    with pytest.raises(UserError, match=r"some files are named after a split, but not 2020\.npy; begin all"):
        load(folder)
    assert len(load(folder / "Train 1.npy", n_frames=3).training) == 1  # a file is cut


def test_so_are_files_of_folders_named_after_the_splits(tmp_path, capsys):
    for k, name in enumerate(("test/train/a/2", "test/training/b/1", "test/values/9", "test/testing/test")):
        place = tmp_path / name
        place.parent.mkdir(parents=True)
        saved(np.full((5, 16, 16), 10 * k) + np.arange(5)[:, None, None], place.parent, f"{place.name}.npy")
    with pytest.raises(UserError, match=r"named after a split, but not test.values.9\.npy; begin all"):
        load(tmp_path)
    (tmp_path / "test" / "values").rename(tmp_path / "test" / "val")
    data = load(tmp_path)
    first = [split[np.arange(len(split))][:, 0, 0, 0, 0].tolist() for split in data[:3]]
    assert first == [[0, 10], [20], [30]]


def test_a_link_adds_no_series(tmp_path):
    for name in ("cam1", "cam01"):
        (tmp_path / name).mkdir()
        for k in (1, 2):
            cv2.imwrite(str(tmp_path / name / f"{k}.png"), np.full((20, 30, 3), 10 * k, np.uint8))
    (tmp_path / "today").symlink_to("cam1")
    (tmp_path / "cam1" / "here").symlink_to("..")
    (tmp_path / "cam01" / "3.png").symlink_to("2.png")  # but a frame may be repeated
    (tmp_path / "cam01" / "loop").symlink_to("loop")
    source = read(tmp_path, VIDEO)
    assert source.files == ["cam01", "cam1"] and [len(one) for one in source.series] == [3, 2]


os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"  # as own_data.decode sets it; a writer reads it, too


def write(path, n_frames, color=(40, 80, 200), fourcc="MJPG", width=SIZE):
    """A bright square on a dark ground, color in blue, green, red, moves right by a pixel a frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), 10, (width, SIZE))
    assert writer.isOpened()
    left = (width - SIZE) // 2
    for t in range(n_frames):
        frame = np.zeros((SIZE, width, 3), np.uint8)
        frame[8:24, left + t % 16 : left + t % 16 + 16] = color
        writer.write(frame)
    writer.release()


def test_frames_are_those_of_the_files(tmp_path):
    """In the order of names, cropped at the center, without hidden files."""
    write(tmp_path / "b.avi", 25, color=(0, 0, 255), width=2 * SIZE)
    write(tmp_path / "a.avi", 12, color=(0, 255, 0))
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / "._clip.mov").write_bytes(b"of macOS")
    (tmp_path / "folder.avi").mkdir()
    source = read(tmp_path, (SIZE, SIZE, 1, 3))
    a, b = source.series
    assert (a.shape, b.shape) == ((12, 3, SIZE, SIZE), (25, 3, SIZE, SIZE))
    assert a.dtype == np.uint8 and source.axes == "NTHWC"
    # a.avi first; red, green, blue
    assert [one[0, :, 10:22].max((1, 2)).argmax() for one in (a, b)] == [1, 0]
    whole, cropped, native = (read(tmp_path / "b.avi", (*size, 1, 1)).series[0] for size in SIZES)
    np.testing.assert_array_equal(cropped, whole[..., 16:48])
    np.testing.assert_array_equal(native, whole)
    for t in range(10):
        for one, channel in (a, 1), (b, 0):
            columns = np.flatnonzero(one[t, channel, 10:22].mean(0) > 128)
            assert abs(columns[0] - t) <= 1 and abs(columns[-1] - (t + 15)) <= 1
    grey = read(tmp_path / "a.avi", (16, 16, 2, 1)).series[0]  # a single file, every second frame
    assert grey.shape == (6, 1, 16, 16) and len(read(tmp_path / "a.avi", VIDEO, most=4).series[0]) == 4
    for t in range(1, 6):
        assert np.flatnonzero(grey[t, 0, 8] > 75)[0] == t  # half of 2 pixels


def test_images_of_a_folder_are_a_series(tmp_path):
    """And so is each folder of images in a folder."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for k in (1, 2, 10):  # in the order of numbers
            image = np.full((20, 30, 3), 10 * k, np.uint8)
            cv2.imwrite(str(tmp_path / name / f"{k}.png"), image)
    one, two = read(tmp_path / "a", (0, 0, 1, 1)), read(tmp_path, (16, 16, 2, 3))
    assert one.axes == "THW" and one.series[0][:, 0, 3, 3].tolist() == [10, 20, 100]
    assert two.axes == "NTHWC" and [part[:, 0, 3, 3].tolist() for part in two.series] == [[10, 100]] * 2
    deep = cv2.imencode(".png", np.full((20, 30), 700, np.uint16))[1].tobytes()
    for content in deep, b"":
        (tmp_path / "a" / "2.png").write_bytes(content)
        with pytest.raises(UserError, match=r"2\.png is not an image of 8 bits for each color"):
            read(tmp_path / "a", VIDEO)
    saved(FIELD, tmp_path / "a")
    sentence = "a holds arrays, videos or images together; give a folder of one kind"
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / "a", VIDEO)


def test_a_color_video_trains(tmp_path):
    write(tmp_path / "clip.mp4", 61, fourcc="mp4v")
    run = here(tmp_path / "clip.mp4", tmp_path, pictures=True, **FEW, video=(16, 32, 1, 3))
    assert (run / "metrics.json").exists() and (run / "predict_1.png").exists()


def test_what_is_no_video_is_named(tmp_path, capfd):
    def refused(sentence, path=tmp_path):
        with pytest.raises(UserError, match=sentence):
            read(path, (SIZE, SIZE, 1, 1))

    refused(r"is no \.npy, video or image that can be read, and no folder of such files")
    refused("missing is not there", tmp_path / "missing")
    write(tmp_path / "Screen Recording 3.41\u202fPM.avi", 20)
    (tmp_path / "b.mp4").write_text("<html>")
    refused(r"b\.mp4 gives no frames: it is damaged")
    assert not capfd.readouterr().err  # OpenCV and FFmpeg add nothing
