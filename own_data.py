"""Your own data, for main.py and predict.py: a .npy, a video, or a folder of videos or images.

Videos become sequences of equal length. Each frame is cropped at its center to the shape of height:width, and
resized. Each file is thinned to every `stride`-th frame. Files are taken in the order of their names.
"""

import itertools
import os
import re
from pathlib import Path

import cv2
import numpy as np

from moving_mnist import Data, MovingMNIST, open_array
from support import UserError
from support.devices import print0

VIDEOS = {".avi", ".mp4", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif"}
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


def is_array(data):
    """Whether the knob names an array; else it names videos."""
    return data in ("array", "fresh") or Path(data).suffix == ".npy"


def own_data(path, train_sequences, n_frames, height, width, stride, channels):
    """The three splits of a uint8 array (T, N, H, W[, C]), or of videos. Raises UserError."""
    if is_array(path):
        array = open_array(path)
    else:
        array = read_videos(path, n_frames, height, width, stride, channels)
    for text in find_oddities(array):
        print0(f"warning   {text}")
    name = path.name or path.resolve().name
    splits = [MovingMNIST(array, split, 0, name) for split in ("validation", "test")]
    return Data(MovingMNIST(array, "train", train_sequences, name), *splits, name)


def find_oddities(array, white=255):
    """Sentences on what is probably wrong with an array (T, N, C, H, W), whose values go from 0 to white."""
    N = array.shape[1]
    array = array[:20, np.linspace(0, N - 1, min(N, 20)).astype(int)].astype(np.float32) * (255 / white)
    steps = [np.abs(np.diff(array, axis=axis)) for axis in (0, 1)]
    along_time, along_sequences = (step.mean() if step.size else np.inf for step in steps)
    if along_time > along_sequences:  # as a rule, neighboring frames are more alike than two sequences
        yield "frames of a sequence differ more than sequences do: are time and sequence swapped?"
    if array.max() <= 1:
        yield f"no value is above {array.max():.3g}, on a scale from 0 to 255: frames are almost black"
    elif along_time < 0.05:
        yield f"hardly anything moves: from frame to frame, a pixel changes by {along_time:.3f} grey levels"


def read_videos(path, n_frames, height, width, stride=1, channels=1):
    """uint8 (n_frames, N, channels, height, width) of all videos at the path. Channels: 1 (grey), 3 (RGB)."""
    if min(height, width) < 16 or stride < 1 or channels not in (1, 3):
        expected = "height and width from 16, frame step, 1 or 3 channels"
        raise UserError(f"video is {height} {width} {stride} {channels}; expected {expected}")
    sequences = []
    for file in find_videos(path):
        frames = [crop_and_resize(frame, height, width, channels) for frame in decode(file, stride)]
        n = len(frames) // n_frames
        if n == 0:
            fault = f"gives {len(frames)} frames at a stride of {stride}, and a sequence needs {n_frames}"
            raise UserError(f"{file} {fault}: remove it, or change --video, frames_in or frames_out")
        sequences.append(np.stack(frames[: n * n_frames]).reshape(n, n_frames, *frames[0].shape))
    return np.concatenate(sequences).swapaxes(0, 1)


def find_videos(path):
    """The video files of a folder, or the one file, in the order of their names. Hidden files are skipped."""
    if not path.exists():
        raise UserError(f"{path} is not there")
    paths = sorted(path.iterdir()) if path.is_dir() else [path]
    # files only: a pipe would be waited for
    files = [p for p in paths if p.suffix.lower() in VIDEOS and p.name[0] != "." and p.is_file()]
    if not files:
        raise UserError(f"{path} is no .npy and holds no video: {', '.join(sorted(VIDEOS))}")
    return files


def decode(path, stride=1):
    """Every stride-th frame, (H, W, 3) in OpenCV's order blue, green, red, until the file ends or breaks."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: a bad file is named below
    getattr(cv2.utils, "logging", cv2).setLogLevel(2)  # errors only; up to OpenCV 4.12, the function is cv2's
    name = os.path.abspath(path)  # FFmpeg takes a name that begins with "12:" for a protocol
    if os.fsencode(name) != name.encode(errors="ignore"):  # OpenCV dies of a name that is not UTF-8
        raise UserError(f"{name!a} is a name that OpenCV cannot open; rename it")
    video = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
    try:
        while (answer := video.read())[0]:
            yield answer[1]
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


def read_frames(path, most):
    """The first frames, at most `most`, (N, T, H, W, C), float32 in [0, 1]; C is 1 or 3. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path} is not there")
    if path.is_dir():
        frames = read_images(path, most)
    elif path.suffix.lower() in VIDEOS:
        decoded = [frame[..., ::-1] for frame in itertools.islice(decode(path), most)]
        if not decoded:
            raise UserError(f"{path} gives no frames: it is damaged, or no video that OpenCV can read")
        frames = np.stack(decoded)
    else:
        try:
            frames = np.load(path, "r", allow_pickle=False)
            if frames.dtype.kind not in "buif":
                raise ValueError(f"it holds {frames.dtype}")
        except Exception as error:  # untrusted file: loading may raise anything
            raise UserError(f"{path} is no .npy of numbers, no video and no folder of images") from error
    shape = frames.shape
    if frames.ndim == 3 or (frames.ndim == 4 and frames.shape[-1] not in (1, 3)):
        frames = frames[..., None]  # (T, H, W) or (N, T, H, W)
    frames = frames[None] if frames.ndim == 4 else frames
    if frames.ndim != 5 or frames.shape[1] < 2 or frames.shape[-1] not in (1, 3) or frames.size == 0:
        expected = "(T, H, W) or (N, T, H, W), perhaps with C at the end; at least 2 frames, 1 or 3 channels"
        raise UserError(f"frames have shape {shape}; expected {expected}")
    white = 255 if np.issubdtype(frames.dtype, np.integer) else 1
    frames = frames[:, :most].astype(np.float32) / white
    if not (frames.min() >= 0 and frames.max() <= 1):
        values = f"values go from {frames.min() * white:g} to {frames.max() * white:g}"
        raise UserError(f"{values}; expected integers from 0 to 255, or floats from 0 to 1")
    return frames


def read_images(path, most):
    """The first images of a folder, (T, H, W, 3), in the order of the numbers in their names."""
    files = [p for p in path.iterdir() if p.suffix.lower() in IMAGES and p.name[0] != "."]
    files.sort(key=lambda p: re.sub(r"\d+", lambda digits: digits[0].zfill(20), p.name))  # 2 < 10
    contents = [np.fromfile(file, np.uint8) for file in files[:most]]
    images = [cv2.imdecode(c, cv2.IMREAD_COLOR) if c.size else None for c in contents]
    if not images or any(image is None or image.shape != images[0].shape for image in images):
        raise UserError(f"{path} needs readable images of one size; it has {len(files)} image files")
    return np.stack(images)[..., ::-1]  # OpenCV's order is blue, green, red
