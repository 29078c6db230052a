"""Your own videos: frames, colors and order as written, a whole run on them, and files that are none."""

import os
import random
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import here

import own_data
from support import UserError

SIZE = 32


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
    """In the order of names, cropped at the center, without hidden files; what is left over is dropped."""
    write(tmp_path / "b.avi", 25, color=(0, 0, 255), width=2 * SIZE)
    write(tmp_path / "a.avi", 12, color=(0, 255, 0))
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / "._clip.mov").write_bytes(b"of macOS")
    (tmp_path / "folder.avi").mkdir()
    frames = own_data.read_videos(tmp_path, 10, SIZE, SIZE, channels=3)
    assert frames.shape == (10, 1 + 2, 3, SIZE, SIZE) and frames.dtype == np.uint8
    middle = frames[:, :, :, 10:22]
    assert [middle[0, n].max((1, 2)).argmax() for n in range(3)] == [1, 0, 0]  # a.avi first; red, green, blue
    whole, cropped = (own_data.read_videos(tmp_path / "b.avi", 20, SIZE, wide) for wide in (2 * SIZE, SIZE))
    np.testing.assert_array_equal(cropped, whole[..., 16:48])
    for t in range(10):
        for n, channel in (0, 1), (1, 0):
            columns = np.flatnonzero(middle[t, n, channel].mean(0) > 128)
            assert abs(columns[0] - t) <= 1 and abs(columns[-1] - (t + 15)) <= 1
    grey = own_data.read_videos(tmp_path / "a.avi", 6, 16, 16, stride=2)  # a single file
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
            own_data.read_videos(path, 10, SIZE, SIZE)

    refused(r"holds no video: \.avi, ")
    refused("missing is not there", tmp_path / "missing")
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


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names and pipes")
def test_a_pipe_and_a_name_that_is_no_text(tmp_path):
    os.mkfifo(tmp_path / "a.avi")
    with pytest.raises(UserError, match="holds no video"):  # nor waits for one
        own_data.read_videos(tmp_path, 10, SIZE, SIZE)
    (tmp_path / os.fsdecode(b"\xff.avi")).touch()
    with pytest.raises(UserError, match=r"udcff\.avi' is a name that OpenCV cannot open; rename"):
        own_data.read_videos(tmp_path, 10, SIZE, SIZE)


@pytest.mark.parametrize(("suffix", "fourcc"), [("avi", "MJPG"), ("mp4", "mp4v"), ("mkv", "mp4v")])
def test_a_damaged_video_is_read_or_refused(suffix, fourcc, tmp_path):
    """Cut short or with bytes changed: frames of the right shape, or a UserError, and nothing else."""
    path, rng = tmp_path / f"a.{suffix}", random.Random(0)
    write(path, 12, fourcc=fourcc)
    whole = path.read_bytes()
    for _ in range(20):
        content = bytearray(whole)
        for _ in range(rng.randrange(9)):  # most of them in the header or in the index
            content[rng.choice((rng.randrange(400), -1 - rng.randrange(800)))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        try:
            frames = own_data.read_videos(tmp_path, 4, SIZE, SIZE)
            assert (frames.shape[0], *frames.shape[2:]) == (4, 1, SIZE, SIZE)
        except UserError as error:
            assert path.name in str(error)
