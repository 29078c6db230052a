"""The generator against the official law, frame by frame and digit by digit; the splits and refusals."""

import io
import math
import pickle
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Malice
from hypothesis import example, given, settings
from hypothesis import strategies as st

import moving_mnist
from moving_mnist import FreshMovingMNIST, MovingMNIST, generate, open_array
from support import UserError


def generate_by_law(digits, n, seed, n_frames=20, size=64, n_digits=2, step=0.1):
    """As https://arxiv.org/abs/1502.04681 moves 28×28 digits.

    The same draws in the same order: digits, starts, then directions, each for all sequences at once.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(digits), size=(n, n_digits))
    starts = rng.random((n, n_digits, 2)).tolist()
    angles = (rng.random((n, n_digits)) * 2 * math.pi).tolist()
    sequences = np.zeros((n, n_frames, 1, size, size), np.uint8)
    for b, k in np.ndindex(n, n_digits):
        position, angle = starts[b][k], angles[b][k]
        velocity = [step * math.sin(angle), step * math.cos(angle)]
        for frame in sequences[b, :, 0]:
            for axis in (0, 1):
                position[axis] += velocity[axis]
                if not 0 <= position[axis] <= 1:
                    position[axis] = 0 if position[axis] < 0 else 1
                    velocity[axis] *= -1
            row, column = (math.floor((size - 28) * p) for p in position)
            window = frame[row : row + 28, column : column + 28]
            window[:] = np.maximum(window, digits[chosen[b, k]])
    return sequences


DIGITS = np.random.default_rng(0).integers(256, size=(50, 28, 28), dtype=np.uint8)  # grey up to the edges


@pytest.mark.parametrize("options", [{}, {"size": 28, "n_frames": 5}, {"n_digits": 3, "step": 0.7}])
def test_generate_is_the_law(options):
    for n in (1, 37):
        found = generate(DIGITS, n, seed=5, **options)
        assert found.dtype == np.uint8 and found.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(found, generate_by_law(DIGITS, n, 5, **options))


def test_on_the_wall_is_not_beyond_it():
    """1 is reached, 1.125 is put back to 1, and only then it turns. The sine, here 1, is the row's."""
    drawn = iter([np.array([[(0.875, 0.5)]]), np.array([[0.25]])])
    rng = SimpleNamespace(random=lambda shape: next(drawn))
    positions = moving_mnist.trajectories(rng, 1, n_frames=4, n_digits=1, step=0.125)
    expected = [(1.0, 0.5), (1.0, 0.5), (0.875, 0.5), (0.75, 0.5)]
    np.testing.assert_allclose(positions[0, :, 0], expected, rtol=0, atol=1e-6)


def test_fresh_sequences_are_the_law_and_do_not_depend_on_the_batching():
    fresh, again = (FreshMovingMNIST(DIGITS, 40, seed=1) for _ in range(2))
    whole = fresh[np.arange(40)]
    assert len(fresh) == 40 and whole.dtype == torch.uint8
    order = np.random.default_rng(0).permutation(40)
    for batch in np.split(order, [1, 8, 30]):
        assert torch.equal(again[batch], whole[batch])
    fresh.start_epoch(2)
    by_law = generate_by_law(DIGITS, 40, (1, 2, 3))  # seed, epoch, stream
    np.testing.assert_array_equal(fresh[np.arange(40)], by_law)
    for other in fresh, FreshMovingMNIST(DIGITS, 40, seed=2):
        assert not (other[np.arange(40)] == whole).flatten(1).all(1).any()
    fresh.start_epoch(0)  # the epochs before leave no trace
    assert torch.equal(fresh[np.arange(40)], whole)


@pytest.mark.parametrize(("n", "sizes"), [(37, (29, 4, 4)), (10_000, (8100, 900, 1000))])
def test_splits_are_disjoint_and_complete(tmp_path, n, sizes):
    array = np.random.default_rng(0).integers(256, size=(3, n, 4, 5), dtype=np.uint8)
    np.save(path := tmp_path / "a.npy", array)
    splits = [MovingMNIST(path, name) for name in ("train", "validation", "test")]
    everything, few = MovingMNIST(path, "all"), MovingMNIST(path, "validation", sequences=3)
    np.load(path, mmap_mode="r+").fill(0)  # a dataset that is a memory map would show it
    assert (*map(len, splits), len(few)) == (*sizes, 3)
    found = torch.cat([split[np.arange(len(split))] for split in splits])
    assert found.dtype == torch.uint8 and torch.equal(few[np.arange(3)], splits[1][np.arange(3)])
    sequences = array.swapaxes(0, 1)[:, :, None]  # (N, T, C, H, W)
    np.testing.assert_array_equal(found, sequences)
    np.testing.assert_array_equal(everything[np.arange(n)], sequences)


def refused(path, words):
    """In one sentence."""
    with pytest.raises(UserError) as error:
        open_array(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400 + len(str(path)) and path.name in message
    assert words in message, message


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header_only(header):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin1")


VALID = npy(np.arange(48, dtype=np.uint8).reshape(2, 3, 2, 4))
HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (4294967296, 4294967296, 1, 1)}\n"
NO_ARRAY = "is not a whole .npy array ("
REFUSED = [
    (npy(np.zeros((2, 3, 4, 4))), "holds float64 of shape (2, 3, 4, 4); expected uint8 (T, N, H, W)"),
    (npy(np.zeros((3, 4, 4), np.uint8)), "holds uint8 of shape (3, 4, 4); expected uint8 (T, N, H, W)"),
    (npy(np.zeros((2, 0, 4, 4), np.uint8)), "holds uint8 of shape (2, 0, 4, 4); expected uint8"),
    (VALID + b"x", "has 177 bytes; its header says 176"),
    (b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n" * 20, NO_ARRAY),
    (header_only(HUGE), NO_ARRAY),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("content", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_array_is_refused(tmp_path, content, words):
    """Nor is a folder."""
    (tmp_path / "a.npy").write_bytes(content)
    refused(tmp_path / "a.npy", words)
    refused(tmp_path, NO_ARRAY)


def test_pickled_objects_are_not_run(tmp_path):
    path, bare, sprung = (tmp_path / name for name in ("a.npy", "b.npy", "sprung"))
    np.save(path, np.array([[[[Malice(sprung)]]]], object), allow_pickle=True)
    bare.write_bytes(pickle.dumps(Malice(sprung)))
    for file in (path, bare):
        refused(file, NO_ARRAY)
    assert not sprung.exists()
    np.load(path, allow_pickle=True)  # the trap does work
    assert sprung.exists()


HEADER = VALID.index(b"\n") + 1
# half of them from what headers are made of, or nearly all would be refused at the first strange byte
BYTES = st.one_of(st.integers(0, 255), st.sampled_from(b"0123456789(){}[],:'|<>=uifbOUSTrueFals -+*Lje."))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    changes=st.lists(st.tuples(st.integers(0, HEADER - 1), BYTES), min_size=1, max_size=6),
    length=st.one_of(st.just(len(VALID)), st.integers(0, len(VALID) + 8)),
)
@example(changes=[(0, VALID[0])], length=len(VALID))
@pytest.mark.filterwarnings("ignore")
def test_mutated_headers_are_arrays_or_refused(tmp_path_factory, changes, length):
    path = tmp_path_factory.getbasetemp() / "mutated.npy"
    content = bytearray(VALID.ljust(length, b"\0")[:length])
    for place, byte in changes:
        if place < length:
            content[place] = byte
    path.write_bytes(content)
    try:
        array = open_array(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:  # the bytes that stand there, all of them, in order
        assert array.dtype == np.uint8 and array.ndim == 5
        whole = array[:, :, 0] if array.shape[2] == 1 else np.moveaxis(array, 2, -1)
        assert whole.tobytes() == bytes(content)[-array.size :]
