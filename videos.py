"""Your own videos: a folder of files that OpenCV reads → sequences (T, N, C, H, W), as of an array.

Each file is resized, thinned to every `stride`-th frame, and cut into sequences that do not overlap; what is left
over at its end is dropped. Files are taken in the order of their names, so of the splits, which are taken in order
too, neighbours share at most one file.
"""

import os
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: a bad file is named below

import cv2
import numpy as np

from moving_mnist import DataError

getattr(cv2.utils, "logging", cv2).setLogLevel(2)  # errors only; up to OpenCV 4.12, the function is cv2's own
VIDEOS = {".avi", ".mp4", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif"}
LARGEST = 2**31  # bytes of frames; while they are put together, memory holds them up to three times


def read_folder(folder, n_frames, size, stride=1, colour=False):
    """uint8 (n_frames, N, C, size, size) of all video files in the folder; C is 1, or 3 (red, green, blue).

    Raises DataError: no video there, one that cannot be read or is too short, or more than memory should hold.
    """
    try:  # files only: a pipe would be waited for
        paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in VIDEOS and p.is_file())
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error
    if not paths:
        raise DataError(f"{folder} holds no video; expected files that end in {', '.join(sorted(VIDEOS))}")
    sequences, taken = [], 0
    for path in paths:
        if os.fsencode(path) != str(path).encode(errors="ignore"):  # OpenCV dies of a name that is not UTF-8
            raise DataError(f"{str(path)!a} is a name that OpenCV cannot open; rename the file")
        frames = []
        for frame in decode(path, stride):
            frame = cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)
            frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB if colour else cv2.COLOR_BGR2GRAY)
            frames.append(frame.reshape(size, size, -1).transpose(2, 0, 1))
            taken += frame.nbytes
            if taken > LARGEST:
                raise DataError(f"{folder} takes more than {LARGEST / 2**30:.0f} GiB at {size}×{size}; use fewer "
                                "files, a larger video_stride or a smaller video_size")  # fmt: skip
        n = len(frames) // n_frames
        if n == 0:
            raise DataError(f"{path} gives {len(frames)} frames at video_stride {stride}; a sequence needs {n_frames}: "
                            "remove it, or lower video_stride, frames_in or frames_out")  # fmt: skip
        sequences.append(np.stack(frames[: n * n_frames]).reshape(n, n_frames, *frames[0].shape))
    return np.concatenate(sequences).swapaxes(0, 1)


def decode(path, stride):
    """Every stride-th frame, (H, W, 3) in OpenCV's order blue, green, red, until the file ends or breaks."""
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        k = 0
        while video.grab():
            if k % stride == 0:
                ok, frame = video.retrieve()
                if not ok:
                    return
                yield frame
            k += 1
    except cv2.error as error:
        raise DataError(f"{path} cannot be read as a video ({error.err})") from error
    finally:
        video.release()
