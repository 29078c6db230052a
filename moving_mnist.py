"""What the model sees: the array and its splits, the law that generates it, and the digits in it.

Sequences are uint8 (B, T, C, H, W) at every boundary: B batch, T frames, C channels, H height, W width.
"""

import os
from pathlib import Path

import numpy as np
import torch

ORDER, FRESH, OVERLAYS = 1, 3, 4  # streams of random numbers, of one seed; others would change every run
SPLITS = {"train": (0, 81), "validation": (81, 90), "test": (90, 100), "all": (0, 100)}  # percent, in order


class DataError(Exception):
    """Data that cannot be used, or not with these knobs, in one sentence."""


def open_array(path):
    """A memory map (T, N, C, H, W) of the uint8 .npy at path, time first as the official array is.

    Refused with a DataError: anything but C-ordered uint8 of shape (T, N, H, W) or (T, N, H, W, C), and a
    file that is longer or shorter than its header says. Nothing pickled is ever loaded.
    """
    path = Path(path)
    if os.path.exists(path) and not path.is_file():
        raise DataError(f"{path} is not a file")
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            start = file.tell()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # the header is a literal that numpy evaluates: any error there is a bad header
        why = next(iter(str(error).splitlines()), type(error).__name__)[:100]
        raise DataError(f"{path} is not a .npy array ({why})") from error
    if dtype != np.uint8:
        kind = "pickled objects" if dtype.hasobject else str(dtype)
        raise DataError(f"{path} holds {kind}; expected uint8 (grey values 0 to 255)")
    if len(shape) not in (4, 5) or min(shape) < 1 or bool in map(type, shape):
        raise DataError(f"{path} has shape {shape}; expected (T, N, H, W) or (T, N, H, W, C), time first")
    if fortran:
        raise DataError(f"{path} is in Fortran order; expected C order: save numpy.ascontiguousarray of it")
    expected, found = start + int(np.prod(shape, dtype=object)), path.stat().st_size
    if found != expected:
        raise DataError(
            f"{path} has {found:,} bytes; its header says {expected:,}: it is damaged or still being written"
        )
    array = np.memmap(path, np.uint8, "r", start, shape)
    return array[:, :, None] if len(shape) == 4 else np.moveaxis(array, -1, 2)


class Sequences:
    """frames (T, N, C, H, W), uint8: `dataset[index array]` → uint8 tensor (B, T, C, H, W)."""

    split = "all"  # which part of the data, for titles

    def __init__(self, frames):
        self.frames = frames

    def start_epoch(self, epoch):
        """Nothing to do: every epoch has the same sequences."""

    def __len__(self):
        return self.frames.shape[1]

    def __getitem__(self, index):
        return torch.from_numpy(self.frames[:, index].swapaxes(0, 1))


def shape_of(dataset):
    """(T, C, H, W) of its sequences."""
    return tuple(dataset[np.arange(1)].shape[1:])


class MovingMNIST(Sequences):
    """One split of an array (T, N, C, H, W), or of the one at a path.

    split: "train", "validation" or "test", the first 81, the next 9 and the last 10 percent of the sequences
    (8,100, 900 and 1,000 of the official array, as in Earthformer's protocol), or "all".
    """

    def __init__(self, path, split, sequences=0):
        array = path if isinstance(path, np.ndarray) else open_array(path)
        name = "this data" if array is path else path
        n = array.shape[1]
        first, last = (n * percent // 100 for percent in SPLITS[split])
        if sequences:
            last = min(last, first + sequences)
        if first == last:
            raise DataError(f"{name} has {n} sequences, too few for a {split} split; it takes at least 6")
        self.split = split
        part = array[:, first:last]
        try:  # in memory: a file that shrinks under a map kills the process
            super().__init__(np.array(part, order="C"))
        except MemoryError as error:
            raise DataError(f"the {split} split of {name} takes {part.nbytes / 2**30:.1f} GiB, more than the memory "
                            "has; lower train_sequences, or save a smaller array") from error  # fmt: skip


class FreshMovingMNIST:
    """n new sequences an epoch, drawn from `digits` by the law of `generate`; the same interface."""

    def __init__(self, digits, n, seed):
        self.digits, self.n, self.seed = digits, n, seed
        self.start_epoch(0)

    def start_epoch(self, epoch):
        rng = np.random.default_rng((self.seed, epoch, FRESH))
        self.chosen = rng.integers(len(self.digits), size=(self.n, 2))
        self.positions = trajectories(rng, self.n)

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.from_numpy(render(self.digits[self.chosen[index]], self.positions[index]))


def trajectories(rng, n, n_frames=20, n_digits=2, step=0.1):
    """Positions (n, n_frames, n_digits, 2) in [0, 1]² by the law of Srivastava et al. (2015).

    Uniform start, uniform direction, constant step. Each frame steps first; a digit that leaves is put back
    on the wall and turns (the overshoot is dropped, it is no mirror); then the frame is recorded.
    """
    position = rng.random((n, n_digits, 2))
    angle = rng.random((n, n_digits)) * 2 * np.pi
    velocity = step * np.stack([np.sin(angle), np.cos(angle)], -1)
    recorded = np.empty((n, n_frames, n_digits, 2))
    for t in range(n_frames):
        position = position + velocity
        velocity = np.where((position < 0) | (position > 1), -velocity, velocity)
        position = position.clip(0, 1)
        recorded[:, t] = position
    return recorded


def render(digits, positions, size=64):
    """digits (n, n_digits, d, d) uint8 and positions (n, T, n_digits, 2) → (n, T, 1, size, size), overlap by maximum.

    A digit padded to the canvas's row length is one run of memory, and moving it on the canvas is moving the
    run: row·size + column bytes on. So each digit of each frame is one wide element, read and written as a whole.
    """
    n, n_frames, n_digits, _ = positions.shape
    d = digits.shape[-1]
    row, column = np.moveaxis((positions * (size - d)).astype(np.int64), -1, 0)  # the floor, as none is negative
    strips = np.zeros((n, n_digits, d, size), np.uint8)
    strips[..., :d] = digits
    run = np.dtype(("V", (d - 1) * size + d))
    strips = np.ndarray((n, n_digits), run, strips, strides=(n_digits * d * size, d * size))
    frames = np.empty((n, n_frames, 1, size, size), np.uint8)
    starts = np.ndarray(frames.size - run.itemsize + 1, run, frames, strides=(1,))
    place = np.arange(n * n_frames).reshape(n, n_frames, 1) * size * size + row * size + column
    as_bytes = lambda runs: runs.view(np.uint8).reshape(*runs.shape, run.itemsize)
    for a in range(0, n, 16):  # few enough to stay in the cache
        b = slice(a, a + 16)
        frames[b] = 0
        for k in range(n_digits):
            here, strip = place[b, :, k], strips[b, k, None]
            if k > 0:
                there = starts[here]
                np.maximum(as_bytes(there), as_bytes(np.ascontiguousarray(strip)), out=as_bytes(there))
                strip = there
            starts[here] = strip
    return frames


def generate(digits, n, seed, n_frames=20, size=64, n_digits=2, step=0.1):
    """n sequences (n, n_frames, 1, size, size), uint8, of digits drawn from `digits` (m, 28, 28), uint8.

    The official law, https://arxiv.org/abs/1502.04681. The same arguments give the same sequences.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(digits), size=(n, n_digits))
    return render(digits[chosen], trajectories(rng, n, n_frames, n_digits, step), size)


def digits_of(frames):
    """The different digits (m, 28, 28) that sequences (T, N, 1, H, W) of two show, cut out where farthest apart.

    Pairs that no two empty rows or columns ever part are left out. Of MNIST's digits, nearly all that are found are the
    original to the bit: there, as here, the centre of mass lies in the middle of 28×28 pixels.
    """
    gaps = np.array([widest_gap(frames[:, :, 0].any(axis)) for axis in (2, 3)])  # of columns, of rows: (2, 2, T, N)
    found = []
    for n, best in enumerate(gaps[:, 0].reshape(-1, frames.shape[1]).argmax(0)):
        kind, t = divmod(best, len(frames))
        width, end = gaps[kind, :, t, n]
        if width >= 2:
            frame = frames[t, n, 0]
            found += map(centred, (frame[:, :end], frame[:, end:]) if kind == 0 else (frame[:end], frame[end:]))
    found = [digit for digit in found if digit is not None]
    return np.unique(found, axis=0) if found else np.empty((0, 28, 28), np.uint8)


def widest_gap(ink):
    """Of booleans (..., L), the most that are False in a row between two that are True, and where they end."""
    gap, seen = np.zeros(ink.shape[:-1], int), np.zeros(ink.shape[:-1], bool)
    widest, end = np.zeros_like(gap), np.zeros_like(gap)
    for place, here in enumerate(np.moveaxis(ink, -1, 0)):
        wider = here & seen & (gap > widest)
        widest, end = np.where(wider, gap, widest), np.where(wider, place, end)
        gap, seen = np.where(here, 0, gap + 1), seen | here
    return widest, end


def centred(part):
    """What is drawn in part (H, W), its centre of mass in the middle of (28, 28); None if no digit is so large."""
    rows, columns = (part.any(axis).nonzero()[0] for axis in (1, 0))
    digit = part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    mass = digit / digit.sum()
    before = [round(14 - along @ np.arange(len(along))) for along in (mass.sum(1), mass.sum(0))]
    after = [28 - first - n for first, n in zip(before, digit.shape, strict=True)]
    if max(digit.shape) > 20 or min(*before, *after) < 0:
        return None
    return np.pad(digit, tuple(zip(before, after, strict=True)))
