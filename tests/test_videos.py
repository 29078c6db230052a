"""Your own videos: frames, colors and order as written, a whole run on them, and files that are none."""

import os
import sys
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import here
from hypothesis import given, settings
from hypothesis import strategies as st

from support import UserError, videos

SIZE = 32


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
    """In the order of names, cropped at the center, without hidden files; what is left over is dropped."""
    write(tmp_path / "b.avi", 25, color=(0, 0, 255), width=2 * SIZE)
    write(tmp_path / "a.avi", 12, color=(0, 255, 0))
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / "._clip.mov").write_bytes(b"of macOS")
    (tmp_path / "folder.avi").mkdir()
    frames = videos.read_videos(tmp_path, 10, SIZE, SIZE, channels=3)
    assert frames.shape == (10, 1 + 2, 3, SIZE, SIZE) and frames.dtype == np.uint8
    middle = frames[:, :, :, 10:22]
    assert [middle[0, n].max((1, 2)).argmax() for n in range(3)] == [1, 0, 0]  # a.avi first; red, green, blue
    whole, cropped = (videos.read_videos(tmp_path / "b.avi", 20, SIZE, wide) for wide in (2 * SIZE, SIZE))
    np.testing.assert_array_equal(cropped, whole[..., 16:48])
    for t in range(10):
        for n, channel in (0, 1), (1, 0):
            columns = np.flatnonzero(middle[t, n, channel].mean(0) > 128)
            assert abs(columns[0] - t) <= 1 and abs(columns[-1] - (t + 15)) <= 1
    grey = videos.read_videos(tmp_path / "a.avi", 6, 16, 16, stride=2)  # a single file
    assert grey.shape == (6, 1, 1, 16, 16)
    for t in range(1, 6):
        assert np.flatnonzero(grey[t, 0, 0, 8] > 75)[0] == t  # half of 2 pixels


def test_a_color_video_trains(tmp_path):
    write(tmp_path / "clip.mp4", 61, fourcc="mp4v")
    changes = {"video": (16, 32, 1, 3), "frames_in": 3, "frames_out": 2, "epochs": 1}
    run = here(tmp_path / "clip.mp4", tmp_path, pictures=True, **changes)
    assert (run / "metrics.json").exists() and (run / "predict_1.png").exists()


def test_what_is_no_video_is_named(tmp_path, monkeypatch, capfd):
    def refused(sentence, path=tmp_path):
        with pytest.raises(UserError, match=sentence):
            videos.read_videos(path, 10, SIZE, SIZE)

    refused(r"holds no video: \.avi, ")
    refused(r"cannot read .*missing: No such file", tmp_path / "missing")
    write(tmp_path / "Screen Recording 3.41\u202fPM.avi", 9)  # as macOS calls them
    refused(r"PM\.avi gives 9 frames.*a sequence needs 10")
    write(tmp_path / "Screen Recording 3.41\u202fPM.avi", 20)
    (tmp_path / "b.mp4").write_text("<html>")
    refused(r"b\.mp4 gives 0 frames")
    assert not capfd.readouterr().err  # OpenCV and FFmpeg add nothing
    huge = lambda: (True, cv2.repeat(np.zeros((SIZE, SIZE, 3), np.uint8), 2**20, 2**25))
    video = SimpleNamespace(read=huge)
    monkeypatch.setattr(cv2, "VideoCapture", lambda *arguments: video)
    refused(r"PM\.avi cannot be read as a video \(Failed to allocate \d+ bytes\)")


def spare(n):
    """No more than n bytes of memory from here on, where the system tells what is in use."""
    if sys.platform == "linux":
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + n, used + n))


def read(folder):
    """How the reading of a folder ended, in words."""
    try:
        return f"read {videos.read_videos(folder, 4, SIZE, SIZE).shape}"
    except UserError as error:
        return f"refused {error}"


@pytest.fixture(scope="module")
def reader():
    """`read` in a process with a GiB of memory to spare, which a hostile file may crash or hang."""
    with get_context("spawn").Pool(1, spare, [2**30]) as pool:
        yield lambda folder: pool.apply_async(read, [folder]).get(30)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names and pipes")
def test_a_pipe_and_a_name_that_is_no_text(reader, tmp_path):
    os.mkfifo(tmp_path / "a.avi")
    assert "holds no video" in reader(tmp_path)
    (tmp_path / os.fsdecode(b"\xff.avi")).touch()
    with pytest.raises(UserError, match=r"udcff\.avi' is a name that OpenCV cannot open; rename"):
        videos.read_videos(tmp_path, 10, SIZE, SIZE)


PLACES = st.one_of(st.integers(0, 400), st.integers(-800, -1), st.integers(0, 2**16))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([("avi", "MJPG"), ("mp4", "mp4v"), ("mkv", "mp4v")]),
    changes=st.lists(st.tuples(PLACES, st.integers(0, 255)), max_size=8),
    cut=st.one_of(st.none(), PLACES),
)
def test_a_damaged_video_is_read_or_refused(reader, tmp_path_factory, kind, changes, cut):
    """Cut short or with bytes changed: frames of the right shape, or a UserError, and nothing else."""
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / f"a.{kind[0]}"
    write(path, 12, fourcc=kind[1])
    content = bytearray(path.read_bytes())
    for place, byte in changes:
        content[place % len(content)] = byte
    path.write_bytes(content if cut is None else content[: cut % len(content)])
    ended = reader(folder)
    assert (ended.startswith("read (4, ") and ended.endswith(f", 1, {SIZE}, {SIZE})")) or path.name in ended
