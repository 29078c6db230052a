"""Your own videos: a folder of files, or one file → sequences (T, N, C, H, W), as open_array gives them.

Each frame is cropped at its center to the shape of height:width, and resized. Each file is thinned to every
`stride`-th frame, and cut into sequences that do not overlap. Files are taken in the order of their names.
"""

import os
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: a bad file is named below

import cv2
import numpy as np

from support import UserError

VIDEOS = {".avi", ".mp4", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif"}


def read_videos(path, n_frames, height, width, stride=1, channels=1):
    """uint8 (n_frames, N, channels, height, width) of all videos at the path. Channels: 1 (grey), 3 (RGB)."""
    sequences = []
    for file in find_videos(Path(path)):
        frames = [crop_and_resize(frame, height, width, channels) for frame in decode(file, stride)]
        n = len(frames) // n_frames
        if n == 0:
            words = f"gives {len(frames)} frames at a stride of {stride}, and a sequence needs {n_frames}"
            raise UserError(f"{file} {words}: remove it, or change --video, frames_in or frames_out")
        sequences.append(np.stack(frames[: n * n_frames]).reshape(n, n_frames, *frames[0].shape))
    return np.concatenate(sequences).swapaxes(0, 1)


def find_videos(path):
    """The video files of a folder, or the one file, in the order of their names. Hidden files are skipped."""
    folder = [path] if os.path.isfile(path) else sorted(path.iterdir())
    # files only: a pipe would be waited for
    files = [p for p in folder if p.suffix.lower() in VIDEOS and p.name[0] != "." and p.is_file()]
    if not files:
        raise UserError(f"{path} is no .npy and holds no video: {', '.join(sorted(VIDEOS))}")
    return files


def decode(path, stride=1):
    """Every stride-th frame, (H, W, 3) in OpenCV's order blue, green, red, until the file ends or breaks."""
    getattr(cv2.utils, "logging", cv2).setLogLevel(2)  # errors only; up to OpenCV 4.12, the function is cv2's
    name = os.path.abspath(path)  # FFmpeg takes a name that begins with "12:" for a protocol
    if os.fsencode(name) != name.encode(errors="ignore"):  # OpenCV dies of a name that is not UTF-8
        raise UserError(f"{name!a} is a name that OpenCV cannot open; rename it")
    video = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
    try:
        while (found := video.read())[0]:
            yield found[1]
            for _ in range(stride - 1):
                video.grab()
    except cv2.error as error:
        raise UserError(f"{path} cannot be read as a video ({error.err})") from error


def crop_and_resize(frame, height, width, channels):
    """(H, W, 3) → (channels, height, width): the center of the frame, grey or red, green, blue."""
    H, W = frame.shape[:2]
    tall, wide = max(1, min(H, W * height // width)), max(1, min(W, H * width // height))
    top, left = (H - tall) // 2, (W - wide) // 2
    frame = frame[top : top + tall, left : left + wide]
    frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
    frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGR2GRAY)
    return frame.reshape(height, width, -1).transpose(2, 0, 1)
