"""Videos and image files → frames (C, H, W), uint8."""

import itertools
import os

import cv2
import numpy as np

from support import UserError

VIDEOS = {".avi", ".mp4", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif"}
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


def read_pictures(path, frames, size, channels, most):
    """(one series, axes) of decoded frames."""
    frames = [crop_and_resize(frame, *size, channels) for frame in itertools.islice(frames, most)]
    if not frames:
        raise UserError(f"{path} gives no frames: it is damaged, or nothing that OpenCV can read")
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"{path} has frames of several sizes; set --video")
    return [np.stack(frames)], "THW" if channels == 1 else "THWC"


def decode(path, stride):
    """Every stride-th frame, (H, W, 3) in OpenCV's order blue, green, red, until the file ends or breaks."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: a bad file is named below
    getattr(cv2.utils, "logging", cv2).setLogLevel(2)  # errors only; up to OpenCV 4.12, the function is cv2's
    # FFmpeg takes a name that begins with "12:" for a protocol
    video = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
    while (answer := video.read())[0]:
        yield answer[1]
        for _ in range(stride - 1):
            video.grab()


def read_images(files):
    """The frames of image files, as `decode` gives them."""
    for file in files:
        content = np.fromfile(file, np.uint8)  # cv2.imread fails at some paths on Windows
        image = cv2.imdecode(content, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH) if content.size else None
        if image is None or image.dtype != np.uint8:
            raise UserError(f"{file} is not an image of 8 bits for each color; save other numbers as .npy")
        yield image


def crop_and_resize(frame, height, width, channels):
    """(H, W, 3) → (channels, height, width), the center of the frame. 0, 0: the frame keeps its size."""
    H, W = frame.shape[:2]
    if height and width:
        tall, wide = max(1, min(H, W * height // width)), max(1, min(W, H * width // height))
        top, left = (H - tall) // 2, (W - wide) // 2
        frame = frame[top : top + tall, left : left + wide]
        frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
    frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGR2GRAY)
    return frame.reshape(*frame.shape[:2], -1).transpose(2, 0, 1)
