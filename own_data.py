"""Your own data, for main.py and predict.py: arrays of numbers, videos or images → series of frames.

A .npy holds one series, (T, H, W) or (T, H, W, C), or N series, (N, T, H, W) or (N, T, H, W, C): T frames,
H height, W width, C channels. Numbers may be integers or floats. NaN is a missing pixel. uint8 of shape
(20, N, 64, 64) has time first, as Moving MNIST. Each video is a series; all images of a folder are one.
Folders may hold folders. Files or folders named train, val and test, or train_1 and so on, are the splits.
"""

import hashlib
import itertools
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moving_mnist import Data, Sequences, open_npy
from support import UserError
from support.devices import print0
from support.scale import choose_scale, is_constant, limits, report_scale
from support.video import IMAGES, VIDEOS, decode, read_images, read_pictures

KINDS = {".npy"}, VIDEOS, IMAGES
AXES = {"N": "series", "T": "time", "H": "height", "W": "width", "C": "channel"}
LEAST = 16  # pixels of a side; a shorter last axis has the channels
NAMES = {
    "train": {"train", "training"},
    "validation": {"val", "valid", "validation"},
    "test": {"test", "testing"},
}
PARTS = list(NAMES)
HELD_OUT = 0.15  # of each series, for validation and again for the test, where there are few series


class Source(NamedTuple):
    series: list  # of arrays (T, C, H, W), all of one number type
    axes: str  # those of an array with all of it, such as "NTHW"
    name: str
    files: list  # of each series, its file, or folder of images, as seen from the path


def is_own(data):
    """Whether the knob is the path of your own data; else it names a kind of Moving MNIST."""
    return data not in ("array", "stand_in", "fresh")


def is_array(data):
    """Whether the knob names an array; else it names a folder, or videos or images."""
    return not is_own(data) or data.lower().endswith(".npy")


def own_data(path, n_frames, video, train_sequences, value_range, scale=None):
    """The three splits of the data at a path. Raises UserError.

    scale: of weights that are only scored, instead of the range of the training split.
    """
    source = read(path, video)
    low, high = describe(source)
    if is_constant(low, high).all():
        raise UserError(f"all values of {source.name} are {low[0]:g}; there is nothing to forecast")
    if scale and len(scale.low) not in (1, len(low)):
        raise UserError(f"the data have {len(low)} channels; the weights are of {len(scale.low)}")
    # in memory: a file that shrinks under a memory map kills the process
    series = [np.array(one, order="C") for one in source.series if len(one) >= n_frames]
    files = [file for file, one in zip(source.files, source.series, strict=True) if len(one) >= n_frames]
    if len(series) < len(source.series):
        print0(f"left out  series shorter than {n_frames} frames: {len(source.series) - len(series)}")
    lengths = [len(one) for one in series]
    is_split = path.is_dir() and any(splits_of(source.files))
    training, *others = by_file(lengths, n_frames, files) if is_split else cut(lengths, n_frames)
    starts = [(k, t) for k, first, end in training for t in range(first, end - n_frames + 1)]
    if 0 < train_sequences < len(starts):
        starts = np.array(starts)[np.linspace(0, len(starts) - 1, train_sequences).astype(int)]
    digest = hashlib.sha256(str(series[0].dtype).encode())
    for one in series:
        digest.update(one)
    splits = [Sequences(series, starts, n_frames, PARTS[0], digest.digest())]
    pick = lambda parts: [series[k][first:end] for k, first, end in parts]
    for name, parts in zip(PARTS[1:], others, strict=True):  # their sequences share no frame
        limits(pick(parts), f"the {name} split")
        starts = [(k, t) for k, first, end in parts for t in range(first, end - n_frames + 1, n_frames)]
        splits.append(Sequences(series, starts, n_frames, name, digest.digest()))
    if (fewest := min(len(split) for split in splits[1:])) < 5:
        print0(f"note      only {fewest} to validate or test: scores are rough; longer series give more")
    scale = scale or choose_scale(pick(training), value_range)
    report_scale(scale, series, low, high)
    return Data(*splits, source.name, scale)


def read(path, video, most=None):
    """The series at a path. video: the knob. most: of videos and images, only the first frames."""
    if not path.exists():
        raise UserError(f"{path} is not there")
    *size, stride, channels = video
    if (any(size) and min(size) < LEAST) or stride < 1 or channels not in (1, 3):
        expected = f"height and width from {LEAST}, frame step, 1 or 3 channels"
        raise UserError(f"video is {' '.join(map(str, video))}; expected {expected}")
    files = list_files(path)
    arrays, videos, images = ([p for p in files if p.suffix.lower() in kind] for kind in KINDS)
    if sum(map(bool, (arrays, videos, images))) > 1:
        raise UserError(f"{path} holds arrays, videos or images together; give a folder of one kind")
    pictures = [(file, decode(file, stride)) for file in videos]
    for folder, group in itertools.groupby(images, lambda p: p.parent):
        pictures.append((folder, read_images(list(group)[::stride])))
    paths = [*arrays, *(place for place, _ in pictures)]
    found = [read_array(file) for file in arrays]
    found += [read_pictures(*pair, size, channels, most) for pair in pictures]
    if not found:
        raise UserError(f"{path} is no .npy, video or image that can be read, and no folder of such files")
    series = [one for part, _ in found for one in part]
    shapes = sorted({f"{one.dtype} of {one.shape[1:]}" for one in series})
    if len(shapes) > 1:
        raise UserError(f"the files of {path} differ (channels, height, width): {', '.join(shapes)}")
    H, W = series[0].shape[2:]
    if min(H, W) < LEAST:
        raise UserError(f"{path} has frames of {H}×{W}; expected at least {LEAST}×{LEAST} pixels")
    names = [os.path.relpath(place, path) for place in paths]
    names = [name for name, (part, _) in zip(names, found, strict=True) for _ in part]
    axes = found[0][1]
    axes = axes if len(found) == 1 or "N" in axes else f"N{axes}"
    return Source(series, axes, path.name or path.resolve().name, names)


def list_files(path):
    """The file, or those in the folder and its folders, in the order of the numbers in the names."""
    found, seen = [path], set()
    for folder, folders, names in os.walk(path, followlinks=True):  # nothing, if the path is a file
        if (place := os.path.realpath(folder)) in seen:  # a link, perhaps to a folder above
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    files = [file for file in found if file.is_file()]  # no pipes, for which we would wait
    by_number = lambda name: re.sub(r"\d+", lambda digits: digits[0].zfill(20), str(name))  # 2 < 10
    return sorted(files, key=lambda p: (by_number(p.parent), p.parent, by_number(p.name)))


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


def describe(source):
    """Print what was read, and what is probably wrong → the lowest and the highest value of each channel."""
    series, lengths = source.series, [len(one) for one in source.series]
    low, high = limits(series, source.name)
    axes = ", ".join(AXES[axis] for axis in source.axes)
    frames = " to ".join(str(n) for n in sorted({min(lengths), max(lengths)}))
    _, C, H, W = series[0].shape
    is_float = series[0].dtype.kind == "f"  # others have no NaN
    missing = sum(np.isnan(one).sum() for one in series) / sum(one.size for one in series) if is_float else 0
    many = f"{len(series):,} series of " if len(series) > 1 else ""
    size = f"{many}{frames} frames of {H}×{W}, channels: {C}"
    numbers = f"{series[0].dtype} from {low.min():.6g} to {high.max():.6g}"
    numbers += f", missing (NaN): {missing:.1%}" if missing else ""
    print0(f"read      {source.name} ({axes}): {size}, {numbers}")
    for text in find_oddities(source, low, high):
        print0(f"warning   {text}")
    return low, high


def find_oddities(source, low, high):
    """Sentences on what is probably wrong, from a part of the data."""
    n, step = min(20, *map(len, source.series)), max(1, min(source.series[0].shape[2:]) // 64)
    chosen = np.linspace(0, len(source.series) - 1, min(len(source.series), 20)).astype(int)
    sample = np.stack([source.series[k][:n, :, ::step, ::step] for k in chosen]).astype(np.float64)
    codes = {code for channel in range(len(low)) for code in find_codes(sample[:, :, channel])}
    for code in sorted(codes):
        yield f"the value {code:g} is far from all others; if it means a missing pixel, write NaN"
    most = max(map(len, source.series))
    if source.axes == "NTHW" and most <= 4:
        yield f"series have {most} frames: if these are channels, put them at the end"
    T, _, H, W = source.series[0].shape
    if T == H != W:
        yield f"there are {T} frames of {T} rows: if the file has height, width, time, put time first"
    width = np.where(high > low, high - low, 1)[:, None, None]
    along_time, across = (mean_of_known(np.abs(np.diff(sample / width, axis=axis))) for axis in (1, 0))
    if along_time < 2e-4:
        yield f"hardly anything moves: from frame to frame, a pixel changes by {along_time:.2g} of the range"
    # as a rule, neighboring frames are more alike than two sequences
    if along_time > across:
        yield "frames of a sequence differ more than sequences do: are time and sequence swapped?"


def find_codes(sample):
    """Values that seem to mean a missing pixel: frequent, and far from all others."""
    values, counts = np.unique(sample[~np.isnan(sample)], return_counts=True)
    for k in (0, -1) if len(values) > 3 else ():
        others = np.delete(values, k)
        if counts[k] > 9 and np.abs(others - values[k]).min() > 2 * np.ptp(others):
            yield values[k]


def mean_of_known(values):
    """NaN where there is none."""
    known = values[~np.isnan(values)]
    return known.mean() if len(known) else np.nan


def splits_of(files):
    """For each file, the split that its name or a folder's begins with, or None; at one level of folders."""
    split_of = lambda word: next((name for name in PARTS if word in NAMES[name]), None)
    paths = [[re.match("[a-z]*", part.lower())[0] for part in Path(file).parts] for file in files]
    levels = [list(map(split_of, words)) for words in itertools.zip_longest(*paths, fillvalue="")]
    return max(levels, key=lambda found: len({*found} - {None}), default=[])


def by_file(lengths, n_frames, files):
    """As `cut`, by the names of the files. Raises UserError where a split has no series."""
    found = splits_of(files)
    if None in found:
        advice = "begin all names with train, val or test, or none"
        raise UserError(f"some files are named after a split, but not {files[found.index(None)]}; {advice}")
    if missing := [name for name in PARTS if name not in found]:
        raise UserError(f"no file or folder named {missing[0]} has {n_frames} frames in a row")
    counts = [found.count(name) for name in PARTS]
    print0("split     by names of files, series: {} training, {} validation, {} test".format(*counts))
    return [[(k, 0, n) for k, n in enumerate(lengths) if found[k] == name] for name in PARTS]


def cut(lengths, n_frames):
    """The parts of training, validation and test: for each, a list of (series, first frame, end).

    Ten or more series are divided whole, in their order; so are three or more that are all too short to cut.
    Else each long one is cut in time: training, then 15 % for validation and as much for the test, each at
    least one sequence. Short ones are for training. Prints the cut. lengths: of the series. Raises UserError
    where there are too few frames.
    """
    n, least = len(lengths), 3 * n_frames
    long_ones = [k for k, length in enumerate(lengths) if length >= least]
    if n >= 10 or (n >= 3 and not long_ones):
        whole = [(k, 0, length) for k, length in enumerate(lengths)]
        a, b = (n * 81 // 100, n * 90 // 100) if n >= 10 else (n - 2, n - 1)
        print0(f"split     by series, in their order: {a:,} training, {b - a:,} validation, {n - b:,} test")
        return whole[:a], whole[a:b], whole[b:]
    if not long_ones:
        wanted = f"at least one series of {least} frames, or three of {n_frames} (frames_in + frames_out)"
        found = lengths or "none so long"
        raise UserError(f"too few frames: expected {wanted}, and more for a full batch; found {found}")
    training, validation, test = [], [], []
    for k, end in enumerate(lengths):
        held_out = max(n_frames, round(HELD_OUT * end)) if k in long_ones else 0
        a, b = end - 2 * held_out, end - held_out
        training.append((k, 0, a))
        words = f"frames 1 to {a} training"
        if held_out:
            validation.append((k, a, b))
            test.append((k, b, end))
            words += f", {a + 1} to {b} validation, {b + 1} to {end} test"
        print0(f"split     along time; series {k + 1}: {words}")
    return training, validation, test
