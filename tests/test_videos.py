"""A folder of videos: frames, colours and order as written, a whole run on them, and files that are none."""

import os
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import here
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import videos
from moving_mnist import DataError

SIZE = 32


def write(path, n_frames, colour=(40, 80, 200), fourcc="MJPG"):
    """A bright square on a dark ground, colour in blue, green, red, moves right by a pixel a frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), 10, (SIZE, SIZE))
    assert writer.isOpened()
    for t in range(n_frames):
        frame = np.zeros((SIZE, SIZE, 3), np.uint8)
        frame[8:24, t % 16 : t % 16 + 16] = colour
        writer.write(frame)
    writer.release()


def test_frames_are_those_of_the_files(tmp_path):
    write(tmp_path / "b.avi", 25, colour=(0, 0, 255))
    write(tmp_path / "a.avi", 12, colour=(0, 255, 0))
    (tmp_path / "notes.txt").write_text("no video")
    frames = videos.read_folder(tmp_path, 10, SIZE, colour=True)
    assert frames.shape == (10, 1 + 2, 3, SIZE, SIZE) and frames.dtype == np.uint8  # what is left over is dropped
    middle = frames[:, :, :, 10:22]
    assert [middle[0, n].max((1, 2)).argmax() for n in range(3)] == [1, 0, 0]  # a.avi first; red, green, blue
    for t in range(10):
        columns = np.flatnonzero(middle[t, 0, 1].mean(0) > 128)
        assert abs(columns[0] - t) <= 1 and abs(columns[-1] - (t + 15)) <= 1
    grey = videos.read_folder(tmp_path, 6, 16, stride=2)
    assert grey.shape == (6, 1 + 2, 1, 16, 16)
    assert [np.flatnonzero(grey[t, 0, 0, 8] > 75)[0] for t in range(1, 6)] == [1, 2, 3, 4, 5]  # half of 2 pixels


def test_a_colour_video_trains(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for k in range(3):
        write(folder / f"{k}.mp4", 61, fourcc="mp4v")
    run = here(folder, tmp_path, pictures=True, video_colour=True, video_size=16, frames_in=3, frames_out=2, epochs=1)
    assert (run / "metrics.json").exists() and (run / "predict_1.png").exists()


def test_a_colour_array_trains(tmp_path):
    np.save(tmp_path / "colour.npy", np.random.default_rng(0).integers(0, 256, (5, 20, 16, 16, 3), dtype=np.uint8))
    run = here(tmp_path / "colour.npy", tmp_path, pictures=True, frames_in=3, frames_out=2, epochs=1)
    assert (run / "metrics.json").exists() and (run / "predict_1.png").exists()


def test_what_is_no_video_is_named(tmp_path, capfd):
    with pytest.raises(DataError, match=r"holds no video; expected files that end in \.avi"):
        videos.read_folder(tmp_path, 10, SIZE)
    write(tmp_path / "a.avi", 9)
    with pytest.raises(DataError, match=r"a\.avi gives 9 frames.*a sequence needs 10"):
        videos.read_folder(tmp_path, 10, SIZE)
    write(tmp_path / "a.avi", 10)
    (tmp_path / "b.mp4").write_text("<html>")
    with pytest.raises(DataError, match=r"b\.mp4 gives 0 frames"):
        videos.read_folder(tmp_path, 10, SIZE)
    assert not capfd.readouterr().err  # OpenCV and FFmpeg add nothing


def test_a_frame_that_memory_cannot_hold_is_refused(tmp_path, monkeypatch):
    huge = lambda: (True, cv2.repeat(np.zeros((SIZE, SIZE, 3), np.uint8), 2**20, 2**25))
    video = SimpleNamespace(grab=lambda: True, retrieve=huge, release=lambda: None)
    monkeypatch.setattr(cv2, "VideoCapture", lambda *arguments: video)
    (tmp_path / "a.avi").touch()
    with pytest.raises(DataError, match=r"a\.avi cannot be read as a video \(Failed to allocate \d+ bytes\)"):
        videos.read_folder(tmp_path, 10, SIZE)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_no_video(reader, tmp_path):
    os.mkfifo(tmp_path / "a.avi")
    assert "holds no video" in reader("videos", tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such a name")
def test_a_name_that_is_no_text(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.avi")).touch()
    with pytest.raises(DataError, match=r"udcff\.avi' is a name that OpenCV cannot open; rename"):
        videos.read_folder(tmp_path, 10, SIZE)


def test_a_name_with_a_narrow_space(tmp_path):
    write(tmp_path / "a.avi", 10)
    (tmp_path / "a.avi").rename(tmp_path / "Screen Recording 3.41\u202fPM.avi")  # as macOS calls them
    assert videos.read_folder(tmp_path, 10, SIZE).shape[1] == 1


def test_too_much_for_the_memory_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.avi", 30)
    monkeypatch.setattr(videos, "LARGEST", 20 * SIZE * SIZE)
    with pytest.raises(DataError, match=r"takes more than .* larger video_stride or a smaller video_size"):
        videos.read_folder(tmp_path, 10, SIZE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Suffix → a good file of 12 frames."""
    folder = tmp_path_factory.mktemp("good")
    write(folder / "a.avi", 12)
    for name in ("a.mp4", "a.mkv"):
        write(folder / name, 12, fourcc="mp4v")
    first, *rest = (Image.new("L", (SIZE, SIZE), 20 * t) for t in range(12))
    first.save(folder / "a.gif", save_all=True, append_images=rest)
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


# more at both ends, where the headers are
PLACES = st.one_of(st.integers(0, 400), st.integers(-800, -1), st.integers(0, 2**16))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    suffix=st.sampled_from([".avi", ".mp4", ".mkv", ".gif"]),
    changes=st.lists(st.tuples(PLACES, st.integers(0, 255)), max_size=8),
    cut=st.one_of(st.none(), PLACES),
)
def test_a_damaged_video_is_read_or_refused(whole, reader, tmp_path_factory, suffix, changes, cut):
    """Cut short or with bytes changed: frames of the right shape, or a DataError, and nothing else."""
    content = bytearray(whole[suffix])
    for place, byte in changes:
        content[place % len(content)] = byte
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / f"a{suffix}"
    path.write_bytes(content if cut is None else content[: cut % len(content)])
    ended = reader("videos", folder)
    assert (ended.startswith("read (4, ") and ended.endswith(f", 1, {SIZE}, {SIZE})\n")) or path.name in ended
    path.unlink()
