"""Your own data, for main.py and predict.py: arrays of numbers, videos or images → series of frames.

A .npy holds one series, (T, H, W) or (T, H, W, C), or N series, (N, T, H, W) or (N, T, H, W, C): T frames,
H height, W width, C channels. Numbers may be integers or floats. NaN is a missing pixel. Each file of a
folder is a series; all images of a folder are one.
"""

import hashlib
import itertools
import os
import re
from typing import NamedTuple

import cv2
import numpy as np
import torch

from moving_mnist import Data, open_npy
from support import UserError
from support.devices import print0
from support.scale import Scale

VIDEOS = {".avi", ".mp4", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif"}
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
KINDS = {".npy"}, VIDEOS, IMAGES
AXES = {"N": "sequence", "T": "time", "H": "height", "W": "width", "C": "channel"}
LEAST = 16  # pixels of a side; a shorter last axis has the channels
HELD_OUT = 0.15  # of each series, for validation and again for the test, where there are few series


class Source(NamedTuple):
    """What was read. axes: those of an array with all of it, such as "NTHW"."""

    series: list  # of arrays (T, C, H, W), all of one number type
    axes: str
    name: str


class Windows:
    """Sequences cut from series: `dataset[index array]` → a batch (B, T, C, H, W), uint8 or float32."""

    def __init__(self, series, digest, starts, n_frames, split):
        """digest: a hash of the series. starts: the series and the first frame of each sequence."""
        self.series, self.digest, self.starts, self.split = series, digest, np.array(starts), split
        self.shape = (n_frames, *series[0].shape[1:])

    def start_epoch(self, epoch):
        """Nothing to do: every epoch has the same sequences."""

    def fit_on_gpu(self, device):
        """Nothing to do: the series stay in main memory."""

    def parts(self):
        """What the split is made of, to compute its hash."""
        return self.digest, self.starts

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        batch = np.stack([self.series[k][t : t + self.shape[0]] for k, t in self.starts[index]])
        return torch.from_numpy(batch if batch.dtype == np.uint8 else batch.astype(np.float32))


def is_array(data):
    """Whether the knob names an array; else it names a folder, or videos or images."""
    return data in ("array", "fresh") or data.endswith(".npy")


def own_data(path, n_frames, video, train_sequences, value_range, scale=None):
    """The three splits of the data at a path. Raises UserError.

    scale: of weights that are only scored, instead of the range of the training split.
    """
    source = read(path, video)
    low, high = describe(source)
    if (low == high).all():
        raise UserError(f"all values of {source.name} are {low[0]:g}; there is nothing to forecast")
    if scale and len(scale.low) not in (1, len(low)):
        raise UserError(f"the data have {len(low)} channels; the weights are of {len(scale.low)}")
    for text in find_oddities(source, low, high):
        print0(f"warning   {text}")
    # in memory: a file that shrinks under a memory map kills the process
    series = [np.array(one, order="C") for one in source.series if len(one) >= n_frames]
    if len(series) < len(source.series):
        print0(f"left out  series shorter than {n_frames} frames: {len(source.series) - len(series)}")
    training, *others = cut([len(one) for one in series], n_frames)
    starts = [(k, t) for k, first, end in training for t in range(first, end - n_frames + 1)]
    if 0 < train_sequences < len(starts):
        starts = np.array(starts)[np.linspace(0, len(starts) - 1, train_sequences).astype(int)]
    digest = hashlib.sha256(str(series[0].dtype).encode())
    for one in series:
        digest.update(one)
    splits = [Windows(series, digest.digest(), starts, n_frames, "train")]
    for name, parts in zip(("validation", "test"), others, strict=True):  # their sequences share no frame
        starts = [(k, t) for k, first, end in parts for t in range(first, end - n_frames + 1, n_frames)]
        splits.append(Windows(series, digest.digest(), starts, n_frames, name))
    whose = "of the weights" if scale else "--value_range" if any(value_range) else "of training"
    pick = lambda parts: [series[k][first:end] for k, first, end in parts]
    scale = scale or choose_scale(pick(training), value_range)
    whose = "of uint8" if scale == Scale() else whose
    report_scale(scale, pick(others[0]) + pick(others[1]), f"{whose}; of validation and test", low, high)
    return Data(*splits, source.name, scale)


def read(path, video, most=None):
    """The series at a path. video: the knob. most: of videos and images, only the first frames."""
    if not path.exists():
        raise UserError(f"{path} is not there")
    *size, stride, channels = video
    if (min(size) < LEAST and any(size)) or stride < 1 or channels not in (1, 3):
        expected = f"height and width from {LEAST}, frame step, 1 or 3 channels"
        raise UserError(f"video is {' '.join(map(str, video))}; expected {expected}")
    files = list_files(path)
    arrays, videos, images = (
        [p for p in files if p.suffix.lower() in kind and p.is_file()] for kind in KINDS
    )
    if sum(map(bool, (arrays, videos, images))) > 1:
        raise UserError(f"{path} holds arrays, videos or images together; give a folder of one kind")
    folders = [path] if images else [p for p in files if p.is_dir()] if not (arrays or videos) else []
    pictures = [(file, decode(file, stride)) for file in videos]
    for folder in folders:
        images = [p for p in list_files(folder) if p.suffix.lower() in IMAGES]
        pictures += [(folder, read_images(images[::stride]))] if images else []
    found = [read_array(file) for file in arrays]
    found += [read_pictures(*pair, size, channels, most) for pair in pictures]
    if not found:
        kinds = ", ".join(sorted(set().union(*KINDS)))
        raise UserError(f"{path} is no file that can be read, and no folder of such: {kinds}")
    series = [one for part, _ in found for one in part]
    shapes = sorted({f"{one.dtype} of {one.shape[1:]}" for one in series})
    if len(shapes) > 1:
        raise UserError(f"the files of {path} differ (channels, height, width): {', '.join(shapes)}")
    H, W = series[0].shape[2:]
    if min(H, W) < LEAST:
        raise UserError(f"{path} has frames of {H}×{W}; expected at least {LEAST}×{LEAST} pixels")
    axes = found[0][1]
    name = path.name or path.resolve().name
    return Source(series, axes if len(found) == 1 or "N" in axes else f"N{axes}", name)


def list_files(path):
    """The file, or what is in the folder, in the order of the numbers in the names."""
    files = path.iterdir() if path.is_dir() else [path]
    # no hidden ones, and no pipes, for which we would wait
    files = [p for p in files if p.name[0] != "." and (p.is_file() or p.is_dir())]
    return sorted(files, key=lambda p: re.sub(r"\d+", lambda digits: digits[0].zfill(20), p.name))  # 2 < 10


def read_array(path):
    """(series, axes) of a .npy."""
    array = open_npy(path)
    if array.dtype.kind not in "buif":
        raise UserError(f"{path} holds {array.dtype}; expected integers or floats")
    shape, has_channels = array.shape, array.ndim > 3 and array.shape[-1] < LEAST
    if array.dtype == np.uint8 and array.ndim == 4 and shape[0] == 20 and shape[2:] == (64, 64):
        axes = "TNHW"  # as Moving MNIST has it
    else:
        axes = {3: "THW", 4: "THWC" if has_channels else "NTHW", 5: "NTHWC"}.get(array.ndim)
    if axes is None or array.size == 0 or (array.ndim == 5 and not has_channels):
        expected = f"(T, H, W) or (N, T, H, W), and perhaps C, below {LEAST}, at the end"
        raise UserError(f"{path} has shape {shape}; expected {expected}")
    missing = [axis for axis in "NTCHW" if axis not in axes]
    order = [(axes + "".join(missing)).index(axis) for axis in "NTCHW"]
    return list(array.reshape(*shape, *[1] * len(missing)).transpose(order)), axes


def restore_axes(frames, axes):
    """(N, T, C, H, W) → an array with these axes."""
    kept = [axis for axis in "NTCHW" if axis in axes]
    frames = frames[tuple(slice(None) if axis in axes else 0 for axis in "NTCHW")]
    return frames.transpose([kept.index(axis) for axis in axes])


def read_pictures(path, frames, size, channels, most):
    """(one series, axes) of decoded frames."""
    frames = [crop_and_resize(frame, *size, channels) for frame in itertools.islice(frames, most)]
    if not frames:
        raise UserError(f"{path} gives no frames: it is damaged, or nothing that OpenCV can read")
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"{path} has frames of several sizes")
    return [np.stack(frames)], "THW" if channels == 1 else "THWC"


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


def read_images(files):
    """The frames of image files, as `decode` gives them."""
    for file in files:
        content = np.fromfile(file, np.uint8)  # cv2.imread fails at some paths on Windows
        image = cv2.imdecode(content, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH) if content.size else None
        if image is None or image.dtype != np.uint8:
            fault = "is not an image that OpenCV can read" if image is None else f"holds {image.dtype}"
            raise UserError(f"{file} {fault}; expected 8 bits for each color. Save other numbers as .npy")
        yield image


def crop_and_resize(frame, height, width, channels):
    """(H, W, 3) → (channels, height, width): the center of the frame, grey or red, green, blue.

    Where height and width are 0, the frame keeps its size.
    """
    H, W = frame.shape[:2]
    if height and width:
        tall, wide = max(1, min(H, W * height // width)), max(1, min(W, H * width // height))
        top, left = (H - tall) // 2, (W - wide) // 2
        frame = frame[top : top + tall, left : left + wide]
        frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
    frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGR2GRAY)
    return frame.reshape(*frame.shape[:2], -1).transpose(2, 0, 1)


def describe(source):
    """Print what was read → the lowest and the highest value of each channel."""
    series, axes = source.series, ", ".join(AXES[axis] for axis in source.axes)
    low, high = limits(series, source.name)
    lengths = sorted({len(one) for one in series})
    frames = f"{lengths[0]:,} frames" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,} frames"
    many = f"{len(series):,} series of {frames}" if len(series) > 1 else frames
    _, C, H, W = series[0].shape
    channels = f", {C} channels" if C > 1 else ""
    is_float = series[0].dtype.kind == "f"
    share = sum(np.isnan(one).sum() for one in series) / sum(one.size for one in series) if is_float else 0
    missing = f", missing (NaN): {share:.1%}" if share else ""
    numbers = f"{series[0].dtype} from {low.min():.6g} to {high.max():.6g}"
    print0(f"read      {source.name} ({axes}): {many} of {H}×{W}{channels}, {numbers}{missing}")
    return low, high


def limits(series, name):
    """The lowest and the highest value of each channel, (C,). Raises UserError where there is none."""
    low = np.fmin.reduce([np.fmin.reduce(one, (0, 2, 3)) for one in series]).astype(float)
    high = np.fmax.reduce([np.fmax.reduce(one, (0, 2, 3)) for one in series]).astype(float)
    for channel, (a, b) in enumerate(zip(low, high, strict=True), 1):
        which = f" in channel {channel}" if len(low) > 1 else ""
        if np.isnan(a):
            raise UserError(f"all values of {name} are missing (NaN){which}")
        if np.isinf([a, b]).any():
            raise UserError(f"{name} has infinite values{which}; write NaN where a pixel is missing")
    return low, high


def find_oddities(source, low, high):
    """Sentences on what is probably wrong."""
    chosen = np.linspace(0, len(source.series) - 1, min(len(source.series), 20)).astype(int)
    step = max(1, min(source.series[0].shape[2:]) // 64)  # a part of large frames is enough
    sample = [source.series[k][:20, :, ::step, ::step].astype(np.float64) for k in chosen]
    values, counts = np.unique(np.concatenate([one[~np.isnan(one)] for one in sample]), return_counts=True)
    if not len(values):  # a part with gaps only
        return
    for k, others in ((0, values[1:]), (-1, values[:-1])) if len(values) > 3 else ():
        # a code for missing pixels is frequent, and far from all other values
        if counts[k] > 9 and np.abs(others - values[k]).min() > 2 * np.ptp(others):
            yield f"the value {values[k]:g} is far from all others; if it means a missing pixel, write NaN"
    if source.axes == "NTHW" and len(sample[0]) <= 4:
        yield f"series have {len(sample[0])} frames: if these are channels, put them at the end"
    shortest = min(map(len, sample))
    sample = np.stack([one[:shortest] for one in sample])
    along_time = np.nanmean(np.abs(np.diff(sample, axis=1)))
    if along_time < 2e-4 * (high - low).max():
        yield f"hardly anything moves: from frame to frame, a pixel changes by {along_time:.3g}"
    # as a rule, neighboring frames are more alike than two sequences
    if len(sample) > 1 and along_time > np.nanmean(np.abs(np.diff(sample, axis=0))):
        yield "frames of a sequence differ more than sequences do: are time and sequence swapped?"


def cut(lengths, n_frames):
    """The parts of training, validation and test: for each, a list of (series, first frame, end).

    lengths: of the series. Prints the rule. Raises UserError where there are too few frames.
    """
    n, least = len(lengths), 3 * n_frames
    long_ones = [k for k, length in enumerate(lengths) if length >= least]
    if n >= 10 or (n >= 3 and not long_ones):
        whole = [(k, 0, length) for k, length in enumerate(lengths)]
        a, b = (n * 81 // 100, n * 90 // 100) if n >= 10 else (n - 2, n - 1)
        print0(f"split     by series, in their order: {a:,} training, {b - a:,} validation, {n - b:,} test")
        return whole[:a], whole[a:b], whole[b:]
    if not long_ones:
        wanted = f"one series of {least} frames, or three of {n_frames} (frames_in + frames_out)"
        raise UserError(f"too few frames: expected at least {wanted}; found {lengths or 'none so long'}")
    parts = training, validation, test = [(k, 0, lengths[k]) for k in range(n) if k not in long_ones], [], []
    for k in long_ones:
        length = lengths[k]
        held_out = max(n_frames, round(HELD_OUT * length))
        training.append((k, 0, length - 2 * held_out))
        validation.append((k, length - 2 * held_out, length - held_out))
        test.append((k, length - held_out, length))
    texts = (f"{a + 1} to {b}" for _, a, b in (part[-1] for part in parts))
    which = "" if n == 1 else f" (series {long_ones[-1] + 1})"
    print0("split     along time{}: frames {} training, {} validation, {} test".format(which, *texts))
    return parts


def choose_scale(training, value_range):
    """That of the knob; 0 to 255 for uint8; else the range of the training split."""
    C, low, high = training[0].shape[1], *value_range
    if low < high:
        return Scale((float(low),) * C, (float(high),) * C, is_grey=False)
    if training[0].dtype == np.uint8:
        return Scale()
    low, high = limits(training, "the training split")
    high = np.where(low == high, low + 1, high)  # of a channel that never changes
    return Scale(tuple(low.tolist()), tuple(high.tolist()), is_grey=False)


def report_scale(scale, series, whose, low, high):
    """Print which values become 0 and 1, how many lie outside, and whether values from low to high fit."""
    ranges = "; ".join(f"{a:.6g} to {b:.6g}" for a, b in zip(scale.low, scale.high, strict=True))
    bottom, top = (np.reshape(values, (-1, 1, 1)) for values in (scale.low, scale.high))
    outside = sum(((frame < bottom) | (frame > top)).sum() for one in series for frame in one)
    outside /= sum(one.size for one in series)
    print0(f"scale     {ranges} ({whose}, {outside:.2%} lie outside and are clipped)")
    if outside > 0.2 or (high - low).max() < 0.02 * (top - bottom).max():
        texts = (f"{a:.6g} to {b:.6g}" for a, b in zip(low, high, strict=True))
        print0(f"warning   the scale hardly fits these values: they go from {'; '.join(texts)}")
