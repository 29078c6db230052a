"""Moving MNIST: the array and its splits, the generator, and a stand-in for the array.

A batch of sequences is uint8 (B, T, C, H, W): B batch, T frames, C channels, H height, W width.
raw/digits_train.png and raw/digits_test.png hold MNIST's first 10,000 training digits and every fifth test
digit (Y. LeCun, C. Cortes, CC BY-SA 3.0), 100 a row. Without internet, they make a stand-in for the array.
"""

import os
from typing import NamedTuple

import cv2
import numpy as np
import torch
from tqdm import tqdm

from support import UserError
from support.checkpoint import lock_folder, open_atomic
from support.devices import print0
from support.download import ARRAY, DIGITS, RAW, fetch, is_there
from support.scale import Scale

ORDER, DROPOUT, FRESH, OVERLAYS = 1, 2, 3, 4  # with one seed, each gives other random numbers
SPLITS = {"train": (0, 81), "validation": (81, 90), "test": (90, 100), "all": (0, 100)}  # percent, in order
N_SEQUENCES = 10_000  # of the official array
OFFICIAL, STAND_IN, STAND_IN_FILE = "Moving MNIST array", "stand-in array", "moving_mnist_standin.npy"


def open_npy(path):
    """A memory map of a .npy file; nothing pickled is loaded. Raises UserError for what is no whole array."""
    try:
        array = np.lib.format.open_memmap(path, "r")
    except Exception as error:  # untrusted file: numpy evaluates the header, which may raise anything
        raise UserError(f"{path} is not a whole .npy array ({error!r:.100})") from error
    expected, found = array.offset + array.nbytes, os.path.getsize(path)
    if found != expected:
        raise UserError(f"{path} has {found:,} bytes; its header says {expected:,}: it is damaged")
    return array


def open_array(path):
    """A memory map (T, N, 1, H, W) of uint8 (T, N, H, W), as the official array has it."""
    array = open_npy(path)
    if array.dtype != np.uint8 or array.ndim != 4 or array.size == 0:
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}; expected uint8 (T, N, H, W)")
    return array[:, :, None]


class Sequences:
    """Sequences cut from series (T, C, H, W): `dataset[index array]` → a batch (B, T, C, H, W)."""

    def __init__(self, series, starts, n_frames, split, content):
        """starts: the series and the first frame of each sequence. content: the series, or a hash of them."""
        self.series, self.starts, self.split = series, np.array(starts), split
        self.parts = content, self.starts  # of which a hash is made
        self.shape = (n_frames, *series[0].shape[1:])

    def start_epoch(self, epoch):
        """Nothing to do: every epoch has the same sequences."""

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        batch = np.stack([self.series[k][t : t + self.shape[0]] for k, t in self.starts[index]])
        return torch.from_numpy(batch if batch.dtype == np.uint8 else batch.astype(np.float32))


class MovingMNIST(Sequences):
    """One split of an array (T, N, C, H, W), or of the array at a path.

    The official array's splits have 8,100, 900 and 1,000 sequences, as in Earthformer's protocol.
    """

    def __init__(self, array, split="all", sequences=0):
        array = array if isinstance(array, np.ndarray) else open_array(array)
        n = array.shape[1]
        first, last = (n * percent // 100 for percent in SPLITS[split])
        last = min(last, first + sequences) if sequences else last
        # in memory: a file that shrinks under a memory map kills the process
        content = np.array(array[:, first:last], order="C")
        starts = [(k, 0) for k in range(last - first)]
        super().__init__(content.swapaxes(0, 1), starts, len(content), split, content)


class FreshMovingMNIST:
    """n new sequences per epoch, generated from `digits` as by `generate`; used like MovingMNIST."""

    shape = (20, 1, 64, 64)

    def __init__(self, digits, n, seed):
        self.content, self.n, self.seed, self.epoch = digits, n, seed, None
        self.parts = [digits]
        self.start_epoch(0)

    def start_epoch(self, epoch):
        if epoch == self.epoch:
            return
        self.epoch = epoch
        rng = np.random.default_rng((self.seed, epoch, FRESH))
        self.chosen = rng.integers(len(self.content), size=(self.n, 2))
        self.positions = trajectories(rng, self.n)

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.from_numpy(render(self.content[self.chosen[index]], self.positions[index]))


def trajectories(rng, n, n_frames=20, n_digits=2, step=0.1):
    """Positions (n, n_frames, n_digits, 2) in [0, 1]², as Srivastava et al. (2015) generate them.

    Uniform start and direction, constant step. In each frame, a digit steps first. If it leaves, it is put
    back on the wall, its overshoot is dropped, and its velocity is reflected. Then its position is recorded.
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
    """digits (n, n_digits, d, d), uint8, at positions (n, T, n_digits, 2) → (n, T, 1, size, size)."""
    n, n_frames, n_digits, _ = positions.shape
    d = digits.shape[-1]
    corners = (positions * (size - d)).astype(np.int64)  # the floor, as none is negative
    frames = np.zeros((n, n_frames, 1, size, size), np.uint8)
    for b, t, k in np.ndindex(n, n_frames, n_digits):
        y, x = corners[b, t, k]
        patch = frames[b, t, 0, y : y + d, x : x + d]
        np.maximum(patch, digits[b, k], out=patch)
    return frames


def generate(digits, n, seed, n_frames=20, size=64, n_digits=2, step=0.1):
    """n sequences (n, n_frames, 1, size, size), uint8, of digits drawn from `digits` (m, 28, 28), uint8.

    By the rules of the official array, https://arxiv.org/abs/1502.04681. Same arguments, same sequences.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(digits), size=(n, n_digits))
    return render(digits[chosen], trajectories(rng, n, n_frames, n_digits, step), size)


class Data(NamedTuple):
    training: Sequences | FreshMovingMNIST
    validation: Sequences | FreshMovingMNIST
    test: Sequences
    name: str
    scale: Scale = Scale()


def moving_mnist_data(kind, train_sequences, seed):
    """The three splits of kind "array", "stand_in" or "fresh". Raises UserError."""
    array, name = (open_array(make_stand_in()), STAND_IN) if kind == "stand_in" else moving_mnist_array()
    if kind != "fresh":
        training = MovingMNIST(array, "train", train_sequences)
        return Data(training, MovingMNIST(array, "validation"), MovingMNIST(array, "test"), name)
    held_out, digits = training_digits()
    training = FreshMovingMNIST(digits, train_sequences or N_SEQUENCES, seed)
    validation = FreshMovingMNIST(held_out, 900, 2**40)  # a seed of its own
    # no sequence of the official array is in training; the stand-in has new digits in its test split only
    test = MovingMNIST(array, "test" if name == STAND_IN else "all")
    return Data(training, validation, test, f"{name}, trained on fresh sequences of {len(digits):,} digits")


def moving_mnist_array():
    """(array, name): the official array, or the stand-in."""
    stand_in, has_official = RAW / STAND_IN_FILE, is_there(RAW / ARRAY.name, ARRAY)
    if os.path.exists(stand_in) and not has_official:
        print0("using the stand-in for the official array (python -m support.download fetches that)")
        return open_array(stand_in), STAND_IN
    try:
        return open_array(fetch(ARRAY)), OFFICIAL
    except UserError as error:
        print0(f"{error}\ncontinuing with a stand-in array: the same rules, with the digits in raw/")
        return open_array(make_stand_in()), STAND_IN


def make_stand_in():
    """Generate an array like the official one; test digits are in its last tenth only. Returns the path."""
    path = RAW / STAND_IN_FILE
    with lock_folder(RAW, wait=True):
        if os.path.exists(path):
            return path
        train, test = (read_digits(RAW / f"digits_{name}.png") for name in ("train", "test"))
        array, tenth = np.empty((20, N_SEQUENCES, 64, 64), np.uint8), N_SEQUENCES // 10
        for k in tqdm(range(10), "generating", disable=None):
            sequences = generate(test if k == 9 else train, tenth, seed=(150204681, k))  # (B, T, 1, H, W)
            array[:, k * tenth : (k + 1) * tenth] = sequences[:, :, 0].swapaxes(0, 1)
        with open_atomic(path) as out:
            np.save(out, array)
    return path


def training_digits():
    """MNIST's training digits, or those in raw/: (a twelfth, held out for validation; the rest)."""
    try:
        digits = np.fromfile(fetch(DIGITS), np.uint8, offset=16).reshape(-1, 28, 28)
    except UserError as error:
        print0(f"{error}\ncontinuing with the 10,000 training digits in raw/")
        digits = read_digits(RAW / "digits_train.png")
    return np.split(digits, [len(digits) // 12])


def read_digits(path):
    """The digits (n, 28, 28), uint8, of a picture with 100 a row."""
    content = np.fromfile(path, np.uint8)  # cv2.imread fails at some paths on Windows
    sheet = cv2.imdecode(content, cv2.IMREAD_GRAYSCALE)
    return sheet.reshape(-1, 28, 100, 28).swapaxes(1, 2).reshape(-1, 28, 28)
