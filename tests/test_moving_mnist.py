"""The generator against the official law, frame by frame and digit by digit; the splits and refusals."""

import io
import math
import pickle
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

import moving_mnist
from download import digit_sheet
from moving_mnist import DataError, FreshMovingMNIST, MovingMNIST, digits_of, generate, open_array, render

# The law -----------------------------------------------------------------------------------------------


def draw_by_law(frames, digits, starts, angles, step):
    """Into black frames (T, 1, size, size), as https://arxiv.org/abs/1502.04681 moves 28×28 digits."""
    position = [list(start) for start in starts]
    velocity = [[step * math.sin(angle), step * math.cos(angle)] for angle in angles]
    for frame in frames[:, 0]:
        for k, digit in enumerate(digits):
            for axis in (0, 1):
                position[k][axis] += velocity[k][axis]
                if position[k][axis] < 0:
                    position[k][axis] = 0
                    velocity[k][axis] *= -1
                elif position[k][axis] > 1:
                    position[k][axis] = 1
                    velocity[k][axis] *= -1
            row, column = (math.floor((len(frame) - 28) * p) for p in position[k])
            window = frame[row : row + 28, column : column + 28]
            window[:] = np.maximum(window, digit)


def generate_by_law(digits, n, seed, n_frames=20, size=64, n_digits=2, step=0.1):
    """The same draws in the same order: digits, starts, then directions, each for all sequences at once."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(digits), size=(n, n_digits))
    starts = rng.random((n, n_digits, 2)).tolist()
    angles = (rng.random((n, n_digits)) * 2 * math.pi).tolist()
    sequences = np.zeros((n, n_frames, 1, size, size), np.uint8)
    for k in range(n):
        draw_by_law(sequences[k], digits[chosen[k]], starts[k], angles[k], step)
    return sequences


@pytest.fixture(scope="module")
def noise_digits():
    """Grey up to the edges of the 28×28, where MNIST is black."""
    return np.random.default_rng(0).integers(256, size=(50, 28, 28), dtype=np.uint8)


@pytest.fixture(scope="module")
def mnist_digits():
    path = Path(moving_mnist.__file__).with_name("raw") / "digits_train.png"
    sheet = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    return sheet.reshape(-1, 28, 100, 28).swapaxes(1, 2).reshape(-1, 28, 28)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_digits": 1},
        {"n_digits": 3, "n_frames": 11},
        {"size": 96, "step": 0.25},
        {"size": 29, "n_frames": 5, "step": 0.7},
        {"size": 28, "n_frames": 2},
        {"n_frames": 1, "step": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 37])
def test_generate_is_the_law(noise_digits, n, options):
    found = generate(noise_digits, n, seed=5, **options)
    assert found.dtype == np.uint8 and found.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(found, generate_by_law(noise_digits, n, 5, **options))


def test_generate_is_the_law_with_mnist_digits(mnist_digits):
    np.testing.assert_array_equal(generate(mnist_digits, 200, 0), generate_by_law(mnist_digits, 200, 0))


class Drawn:
    """In the place of a random generator: starts and directions (parts of a full turn) as given."""

    def __init__(self, *values):
        self.values = [np.array(v, float) for v in values]

    def random(self, shape):
        value = self.values.pop(0)
        assert value.shape == shape
        return value


@pytest.mark.parametrize(
    ("start", "turn", "expected"),
    [
        # a quarter turn: the sine, 1, goes to the row. Step first: the start itself is never recorded
        ((0.25, 0.5), 0.25, [(0.375, 0.5), (0.5, 0.5), (0.625, 0.5), (0.75, 0.5)]),
        # 0.9375 + 0.125 is beyond the wall: put back on it, not mirrored to 0.9375; then back by whole steps
        ((0.9375, 0.5), 0.25, [(1.0, 0.5), (0.875, 0.5), (0.75, 0.5), (0.625, 0.5)]),
        ((0.0625, 0.5), 0.75, [(0.0, 0.5), (0.125, 0.5), (0.25, 0.5), (0.375, 0.5)]),
        # on the wall is not beyond it: 1 is reached, 1.125 is put back to 1 and only then it turns
        ((0.875, 0.5), 0.25, [(1.0, 0.5), (1.0, 0.5), (0.875, 0.5), (0.75, 0.5)]),
        ((0.5, 0.9375), 0.0, [(0.5, 1.0), (0.5, 0.875), (0.5, 0.75), (0.5, 0.625)]),
        ((0.5, 0.0625), 0.5, [(0.5, 0.0), (0.5, 0.125), (0.5, 0.25), (0.5, 0.375)]),
        # an eighth of a turn: 0.125·sin(π/4) = 0.088388 each way; a wall turns only its own component
        (
            (0.95, 0.5),
            0.125,
            [(1.0, 0.588388), (0.911612, 0.676777), (0.823223, 0.765165), (0.734835, 0.853553)],
        ),
        ((0.95, 0.95), 0.125, [(1.0, 1.0), (0.911612, 0.911612), (0.823223, 0.823223), (0.734835, 0.734835)]),
    ],
)
def test_walls_by_hand(start, turn, expected):
    rng = Drawn([[start]], [[turn]])
    positions = moving_mnist.trajectories(rng, 1, n_frames=4, n_digits=1, step=0.125)
    np.testing.assert_allclose(positions[0, :, 0], expected, rtol=0, atol=1e-6)


def test_the_law_is_the_same_in_all_directions():
    """So kernels may be tied: transposed, a square moves as the law moves it elsewhere, turns at walls included;
    flipped, within a pixel."""

    def moved(row, column, turn):
        positions = moving_mnist.trajectories(Drawn([[(row, column)]], [[turn]]), 1, n_frames=20, n_digits=1)
        return torch.from_numpy(render(np.full((1, 1, 28, 28), 255, np.uint8), positions))

    row, column, turn = 0.3, 0.53, 0.07
    sequence = moved(row, column, turn)
    assert torch.equal(sequence.mT, moved(column, row, 0.25 - turn))
    mirrored, expected = sequence.flip(-1), moved(row, 1 - column, 0.5 - turn)
    first = lambda frames: (frames[0, :, 0].amax(-2) > 0).int().argmax(-1)  # the square's first column
    assert (first(mirrored) - first(expected)).abs().max() <= 1 and not torch.equal(mirrored, sequence)


def test_defaults_are_the_official_numbers():
    positions = moving_mnist.trajectories(np.random.default_rng(0), 500)
    assert positions.shape == (500, 20, 2, 2) and positions.min() == 0 and positions.max() == 1
    steps = np.linalg.norm(np.diff(positions, axis=1), axis=-1)
    inside = ((positions > 0) & (positions < 1)).all(-1)
    np.testing.assert_allclose(steps[inside[:, 1:] & inside[:, :-1]], 0.1, atol=1e-12)


def test_frames_by_hand():
    """Digits of 2×2 on a canvas of 4, so that position 0.5 is pixel 1 and the floor of 2·0.9 is 1 too."""
    digits = np.array([[[[1, 5], [7, 9]], [[6, 2], [8, 3]]]], np.uint8)
    positions = np.array([[[[0, 0], [1, 1]], [[0.5, 0.9], [0.5, 0.4]], [[0.9, 0.5], [0.9, 0.5]]]])
    expected = [
        [[1, 5, 0, 0], [7, 9, 0, 0], [0, 0, 6, 2], [0, 0, 8, 3]],
        [
            [0, 0, 0, 0],
            [6, 2, 5, 0],
            [8, 7, 9, 0],
            [0, 0, 0, 0],
        ],  # the larger where they overlap: 2 and 1, 3 and 7
        [[0, 0, 0, 0], [0, 6, 5, 0], [0, 8, 9, 0], [0, 0, 0, 0]],
    ]
    np.testing.assert_array_equal(render(digits, positions, 4)[0, :, 0], expected)


def test_same_seed_same_sequences(noise_digits):
    first, again, other = (generate(noise_digits, 20, seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert len(np.unique(first.reshape(20, -1), axis=0)) == 20


def test_digit_start_and_direction_do_not_correlate():
    n, digits = 4000, np.broadcast_to(np.arange(1, 201, dtype=np.uint8)[:, None, None], (200, 28, 28))
    frames = generate(digits, n, seed=0, n_frames=2, n_digits=1)[:, :, 0]
    digit = frames[:, 0].max((1, 2)).astype(float)
    row, column = ((frames.max(axis) > 0).argmax(-1).astype(float) for axis in (3, 2))  # (n, 2 frames)
    others = row[:, 0], column[:, 0], np.diff(row)[:, 0], np.diff(column)[:, 0]
    for other in others:
        assert abs(np.corrcoef(digit, other)[0, 1]) < 4 / n**0.5
    assert abs(np.corrcoef(row[:, 0], column[:, 0])[0, 1]) < 4 / n**0.5
    assert len(np.unique(digit)) == 200 and {*row[:, 0]} == {*column[:, 0]} == set(range(37))
    # two digits of a sequence start independently of each other
    starts = moving_mnist.trajectories(np.random.default_rng(0), n)[:, 0]
    assert np.abs(np.corrcoef(starts[:, 0].T, starts[:, 1].T)[:2, 2:]).max() < 4 / n**0.5


# Sequences on the fly ----------------------------------------------------------------------------------


def test_fresh_sequences_are_the_law(noise_digits):
    fresh = FreshMovingMNIST(noise_digits, 12, seed=7)
    fresh.start_epoch(3)
    found = fresh[np.arange(12)]
    assert len(fresh) == 12 and found.shape == (12, 20, 1, 64, 64) and found.dtype == torch.uint8
    np.testing.assert_array_equal(found, generate_by_law(noise_digits, 12, (7, 3, 3)))  # seed, epoch, stream


def test_fresh_sequences_do_not_depend_on_the_batching(noise_digits):
    fresh, again = (FreshMovingMNIST(noise_digits, 40, seed=1) for _ in range(2))
    whole = fresh[np.arange(40)]
    order = np.random.default_rng(0).permutation(40)
    for batch in np.split(order, [1, 8, 30]):
        assert torch.equal(again[batch], whole[batch])
    fresh.start_epoch(1)
    other_epoch = fresh[np.arange(40)]
    other_seed = FreshMovingMNIST(noise_digits, 40, seed=2)[np.arange(40)]
    for other in (other_epoch, other_seed):
        assert not (other == whole).flatten(1).all(1).any()
    fresh.start_epoch(0)  # the epochs before leave no trace
    assert torch.equal(fresh[np.arange(40)], whole)


# The array and its splits ------------------------------------------------------------------------------


def save(path, *shape):
    array = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    np.save(path, array)
    return array


@pytest.mark.parametrize(("n", "sizes"), [(100, (81, 9, 10)), (12, (9, 1, 2)), (37, (29, 4, 4))])
@pytest.mark.parametrize("colours", [(), (1,), (3,)], ids=["grey", "one_channel", "colour"])
def test_splits_are_disjoint_and_complete(tmp_path, n, sizes, colours):
    array = save(tmp_path / "a.npy", 3, n, 4, 5, *colours)
    sequences = (array if colours else array[..., None]).transpose(1, 0, 4, 2, 3)  # (N, T, C, H, W)
    splits = [MovingMNIST(tmp_path / "a.npy", name) for name in ("train", "validation", "test")]
    assert tuple(map(len, splits)) == sizes
    found = torch.cat([split[np.arange(len(split))] for split in splits])
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found, sequences)
    everything = MovingMNIST(tmp_path / "a.npy", "all")
    np.testing.assert_array_equal(everything[np.arange(len(everything))], sequences)


def test_the_official_array_is_cut_at_8100_and_9000(tmp_path):
    array = save(tmp_path / "a.npy", 1, 10_000, 1, 1).reshape(-1)
    for split, part in (("train", (0, 8100)), ("validation", (8100, 9000)), ("test", (9000, 10_000))):
        dataset = MovingMNIST(tmp_path / "a.npy", split)
        np.testing.assert_array_equal(dataset[np.arange(len(dataset))].flatten(), array[slice(*part)])


def test_indexing_by_an_array(tmp_path):
    array = save(tmp_path / "a.npy", 6, 20, 4, 7)
    train = MovingMNIST(tmp_path / "a.npy", "train")
    batch = train[np.array([5, 0, 5])]
    assert batch.shape == (3, 6, 1, 4, 7) and batch.dtype == torch.uint8
    for found, k in zip(batch, (5, 0, 5), strict=True):
        np.testing.assert_array_equal(found[:, 0], array[:, k])
    batch.zero_()  # a copy
    np.testing.assert_array_equal(train[np.array([5])][0, :, 0], array[:, 5])


def test_sequences_limit_takes_the_first(tmp_path):
    array = save(tmp_path / "a.npy", 2, 100, 4, 4)
    for split, first, size in (("train", 0, 81), ("validation", 81, 9), ("test", 90, 10)):
        for limit, expected in ((3, 3), (0, size), (1000, size)):
            dataset = MovingMNIST(tmp_path / "a.npy", split, sequences=limit)
            assert len(dataset) == expected
            np.testing.assert_array_equal(dataset[np.array([2])][0, :, 0], array[:, first + 2])


@pytest.mark.parametrize(("n", "split"), [(1, "train"), (5, "validation"), (1, "validation")])
def test_too_few_sequences_are_refused(tmp_path, n, split):
    save(tmp_path / "a.npy", 2, n, 4, 4)
    with pytest.raises(DataError, match=rf"a.npy has {n} sequences, too few for a {split} split; .* 6"):
        MovingMNIST(tmp_path / "a.npy", split)


def test_sequences_are_in_memory(tmp_path):
    """A memory map would show the new bytes, and kill the process where the file shrinks."""
    array = save(tmp_path / "a.npy", 2, 20, 4, 4)
    train = MovingMNIST(tmp_path / "a.npy", "train")
    with open(tmp_path / "a.npy", "r+b") as file:
        file.write(bytes(array.nbytes + 128))
    np.testing.assert_array_equal(train[np.arange(16)][:, :, 0], array[:, :16].swapaxes(0, 1))


def test_more_than_memory_holds_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "a.npy", 2, 20, 4, 4)

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(np, "array", full)
    with pytest.raises(DataError, match=r"the train split of .*a\.npy takes 0\.0 GiB.*; lower train_sequences"):
        MovingMNIST(tmp_path / "a.npy", "train")


# Refusals: what was found, and what is wanted instead --------------------------------------------------


def refused(path, *parts):
    """In one sentence, with all these parts in it."""
    with pytest.raises(DataError) as error:
        open_array(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400 + len(str(path)) and path.name in message
    for part in parts:
        assert part in message, message


def header_only(header, version=(1, 0)):
    header = header.encode("latin1")
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header


def array_header(shape):
    return f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n"


def test_arrays_that_are_fine(tmp_path):
    path = tmp_path / "a.npy"
    array = save(path, 3, 2, 4, 5)
    np.testing.assert_array_equal(open_array(path)[:, :, 0], array)
    np.testing.assert_array_equal(open_array(str(path))[:, :, 0], array)
    array = save(path, 3, 2, 4, 5, 3)
    np.testing.assert_array_equal(open_array(path), array.transpose(0, 1, 4, 2, 3))
    for version in ((2, 0), (3, 0)):
        with open(path, "wb") as file:
            np.lib.format.write_array(file, array, version)
        np.testing.assert_array_equal(open_array(path), array.transpose(0, 1, 4, 2, 3))


def test_no_file_and_a_folder(tmp_path):
    refused(tmp_path / "a.npy", "cannot read", "No such file")
    (tmp_path / "b.npy").mkdir()
    refused(tmp_path / "b.npy", "is not a file")


@pytest.mark.parametrize("dtype", ["float64", "float32", "int8", "bool", ">u2", [("grey", "u1")]], ids=str)
def test_other_dtypes(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4, 4), dtype))
    refused(tmp_path / "a.npy", f"holds {np.dtype(dtype)}", "expected uint8")


def test_fortran_order(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(np.zeros((2, 3, 4, 5), np.uint8)))
    refused(tmp_path / "a.npy", "Fortran order", "expected C order")


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 4), (2, 2, 2, 4, 4, 1), (2, 0, 4, 4)], ids=str)
def test_other_shapes(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    refused(tmp_path / "a.npy", f"shape {shape}", "expected (T, N, H, W) or (T, N, H, W, C)")


@pytest.mark.parametrize("change", [-1, 1, -50_000, 1000])
def test_truncated_and_trailing_junk(tmp_path, change):
    path = tmp_path / "a.npy"
    save(path, 10, 100, 10, 10)
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    refused(path, f"{100_128 + change:,} bytes", "says 100,128")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUM",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x09\x09" + bytes(200),
        b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n" * 20,
        b"just some text\n",
        bytes(1000),
        b"\x1f\x8b\x08\x00" + bytes(100),
        b"PK\x03\x04" + bytes(100),
        header_only("{'descr': '|u1', 'fortran_order': False}\n"),
        header_only(array_header("(2, 2.5, 4, 4)")),
        header_only("{'descr': '|u99', 'fortran_order': False, 'shape': (2, 2, 4, 4)}\n"),
        header_only("__import__('os').abort()\n"),
    ],
    ids=lambda content: repr(content[:24]),
)
def test_files_that_are_no_array(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    refused(tmp_path / "a.npy", "is not a .npy array (")


@pytest.mark.parametrize(
    "content",
    [
        header_only(array_header("(2, 3, 4, 4)") + " " * 200_000, (2, 0)),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{'descr': '|u1'",  # a header of 4 GiB, it says
        header_only("-" * 9000 + "1"),  # too deep for the parser, which has no words for it
        header_only("[" * 9000),
        header_only("1" + "+1" * 4900),
    ],
    ids=["200_000_bytes", "4_GiB", "too_deep", "brackets", "too_long"],
)
def test_huge_headers(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    refused(tmp_path / "a.npy", "is not a .npy array (")


@pytest.mark.parametrize(
    "shape",
    [
        "(10**9, 1, 1, 1)",
        "(999999999999, 999999999999, 1, 1)",
        "(-1, -1, 1, 1)",
        "(True, 1, 1, 1)",  # numpy lets it pass as a header, and refuses it as a shape
    ],
)
def test_shapes_that_cannot_be(tmp_path, shape):
    path = tmp_path / "a.npy"
    path.write_bytes(header_only(array_header(shape)) + b"!")
    refused(path)


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("shape", [(1,), (1, 1, 1, 1)], ids=str)
def test_pickled_objects_are_not_run(tmp_path, shape):
    path, sprung = tmp_path / "a.npy", tmp_path / "sprung"
    array = np.empty(shape, object)
    array[...] = Trap(sprung)
    np.save(path, array, allow_pickle=True)
    refused(path, "pickled objects", "expected uint8")
    assert not sprung.exists()
    np.load(path, allow_pickle=True)  # the trap does work
    assert sprung.exists()


def test_bare_pickles_are_not_run(tmp_path):
    path, sprung = tmp_path / "a.npy", tmp_path / "sprung"
    path.write_bytes(pickle.dumps(Trap(sprung)))
    refused(path, "is not a .npy array")
    with pytest.raises(DataError):
        MovingMNIST(path, "train")
    assert not sprung.exists()


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    save(tmp_path / "a.npy", 2, 3, 4, 4)

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    refused(tmp_path / "a.npy", "cannot read", "Permission denied")


def valid_file():
    file = io.BytesIO()
    np.save(file, np.arange(48, dtype=np.uint8).reshape(2, 3, 2, 4))
    return file.getvalue()


VALID = valid_file()
HEADER = VALID.index(b"\n") + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mutated")


# half of them from what headers are made of, or nearly all would be refused at the first strange byte
BYTES = st.one_of(st.integers(0, 255), st.sampled_from(b"0123456789(){}[],:'|<>=uifbOUSTrueFals -+*Lje."))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    changes=st.lists(st.tuples(st.integers(0, HEADER - 1), BYTES), min_size=1, max_size=6),
    length=st.one_of(st.just(len(VALID)), st.integers(0, len(VALID) + 8)),
)
@example(changes=[(0, VALID[0])], length=len(VALID))
@pytest.mark.filterwarnings("ignore")
def test_mutated_headers_are_arrays_or_refused(folder, changes, length):
    content = bytearray(VALID.ljust(length, b"\0")[:length])
    for place, byte in changes:
        if place < length:
            content[place] = byte
    (folder / "a.npy").write_bytes(content)
    try:
        array = open_array(folder / "a.npy")
    except DataError as error:
        assert str(folder / "a.npy") in str(error) and "\n" not in str(error)
    else:  # the bytes that stand there, all of them, in order
        assert array.dtype == np.uint8 and array.ndim == 5
        whole = array[:, :, 0] if array.shape[2] == 1 else np.moveaxis(array, 2, -1)
        assert whole.tobytes() == bytes(content)[-array.size :]


# Digits cut out of an array ----------------------------------------------------------------------------


def canvas(*placed):
    """One frame (1, 64, 64) of digits (28, 28), row and column."""
    frame = np.zeros((1, 64, 64), np.uint8)
    for digit, row, column in placed:
        part = frame[0, row : row + 28, column : column + 28]
        np.maximum(part, digit, out=part)
    return frame


def test_digits_are_cut_out_where_they_are_farthest_apart():
    bar, cross = np.zeros((2, 28, 28), np.uint8)
    bar[5:24, 13:16] = 200  # both have their centre of mass at (14, 14)
    cross[13:16, 9:20] = 90
    cross[7:22, 14] = 120
    near = canvas((bar, 0, 0), (cross, 3, 5))  # columns 13 to 15 and 14 to 24, rows 5 to 23 and 10 to 24
    below = canvas((bar, 1, 2), (cross, 36, 0))  # rows 6 to 24 and 43 to 57
    beside = canvas((bar, 9, 36), (cross, 4, 4))  # columns 13 to 23 and 49 to 51: farthest
    for frames in ([near, below, beside], [below, near], [beside]):
        found = digits_of(np.stack(frames)[:, None])
        assert found.dtype == np.uint8
        assert {digit.tobytes() for digit in found} == {bar.tobytes(), cross.tobytes()}
    assert digits_of(np.stack([near, near])[:, None]).shape == (0, 28, 28)
    twice = digits_of(np.stack([near, beside])[:, None].repeat(3, 1))
    assert len(twice) == 2  # each different digit once


def test_what_mnist_would_not_have_is_none():
    frames = np.zeros((1, 3, 1, 64, 64), np.uint8)
    frames[0, :2, 0, 20:30, :21] = 255  # 21 wide
    frames[0, ::2, 0, 20:30, 40:50] = 100
    frames[0, 2, 0, 20:40, 0] = 255  # 20 wide, but with its centre of mass at an end
    frames[0, 2, 0, 30, :20] = 1
    (digit,) = digits_of(frames)
    assert (digit == 100).sum() == 100 and digit.sum() == 100 * 100


def test_digits_of_generated_sequences_are_the_digits():
    digits = digit_sheet(ROOT / "raw" / "digits_test.png")
    found = digits_of(generate(digits, 500, 0).swapaxes(0, 1))
    known = {digit.tobytes() for digit in digits}
    same = sum(digit.tobytes() in known for digit in found)
    shown = len(np.unique(np.random.default_rng(0).integers(len(digits), size=(500, 2))))  # as generate draws them
    assert same > 0.99 * len(found) and same > 0.8 * shown
