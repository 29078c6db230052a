"""The generator against the official law, frame by frame and digit by digit; the splits and refusals."""

import io
import math
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import moving_squares
from hypothesis import example, given, settings
from hypothesis import strategies as st

import moving_mnist
from moving_mnist import FreshMovingMNIST, MovingMNIST, generate, open_array
from support import UserError


def draw_by_law(frames, digits, starts, angles, step):
    """Into black frames (T, 1, size, size), as https://arxiv.org/abs/1502.04681 moves 28×28 digits."""
    position = [list(start) for start in starts]
    velocity = [[step * math.sin(angle), step * math.cos(angle)] for angle in angles]
    for frame in frames[:, 0]:
        for k, digit in enumerate(digits):
            for axis in (0, 1):
                position[k][axis] += velocity[k][axis]
                if not 0 <= position[k][axis] <= 1:
                    position[k][axis] = 0 if position[k][axis] < 0 else 1
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


OPTIONS = [{}, {"n_digits": 1}, {"n_digits": 3, "n_frames": 11}, {"size": 28, "n_frames": 2}]
OPTIONS += [{"size": 29, "n_frames": 5, "step": 0.7}, {"size": 96, "n_frames": 1, "step": 0.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_generate_is_the_law(noise_digits, options):
    for n in (1, 37):
        found = generate(noise_digits, n, seed=5, **options)
        assert found.dtype == np.uint8 and found.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(found, generate_by_law(noise_digits, n, 5, **options))


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
        # an eighth of a turn: 0.125·sin(π/4) = 0.088388 each way; a wall turns only its own component
        ((0.95, 0.5), 0.125, [(1.0, 0.588388), (0.911612, 0.676777), (0.823223, 0.765165)]),
        ((0.95, 0.95), 0.125, [(1.0, 1.0), (0.911612, 0.911612), (0.823223, 0.823223)]),
    ],
)
def test_walls_by_hand(start, turn, expected):
    rng = Drawn([[start]], [[turn]])
    positions = moving_mnist.trajectories(rng, 1, n_frames=len(expected), n_digits=1, step=0.125)
    np.testing.assert_allclose(positions[0, :, 0], expected, rtol=0, atol=1e-6)


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
    for other in fresh, FreshMovingMNIST(noise_digits, 40, seed=2):
        assert not (other[np.arange(40)] == whole).flatten(1).all(1).any()
    fresh.start_epoch(0)  # the epochs before leave no trace
    assert torch.equal(fresh[np.arange(40)], whole)


def save(path, *shape):
    array = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    np.save(path, array)
    return array


@pytest.mark.parametrize(
    ("n", "sizes", "colors"), [(100, (81, 9, 10), ()), (12, (9, 1, 2), (1,)), (37, (29, 4, 4), (3,))]
)
def test_splits_are_disjoint_and_complete(tmp_path, n, sizes, colors):
    array = save(tmp_path / "a.npy", 3, n, 4, 5, *colors)
    sequences = (array if colors else array[..., None]).transpose(1, 0, 4, 2, 3)  # (N, T, C, H, W)
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


def test_sequences_limit_takes_the_first(tmp_path):
    array = save(tmp_path / "a.npy", 2, 100, 4, 4)
    for limit, expected in ((3, 3), (0, 9), (1000, 9)):
        dataset = MovingMNIST(tmp_path / "a.npy", "validation", sequences=limit)
        assert len(dataset) == expected
        np.testing.assert_array_equal(dataset[np.array([2])][0, :, 0], array[:, 83])


def test_too_few_sequences_are_refused(tmp_path):
    save(tmp_path / "a.npy", 2, 5, 4, 4)
    with pytest.raises(UserError, match=r"^a has 5 sequences, too few for a validation split; .* 6"):
        MovingMNIST(tmp_path / "a.npy", "validation", name="a")


def test_sequences_are_in_memory(tmp_path):
    """A memory map would show the new bytes, and kill the process where the file shrinks."""
    array = save(tmp_path / "a.npy", 2, 20, 4, 4)
    train = MovingMNIST(tmp_path / "a.npy", "train")
    with open(tmp_path / "a.npy", "r+b") as file:
        file.write(bytes(array.nbytes + 128))
    np.testing.assert_array_equal(train[np.arange(16)][:, :, 0], array[:, :16].swapaxes(0, 1))


def refused(path, *parts):
    """In one sentence, with all these parts in it."""
    with pytest.raises(UserError) as error:
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
    array = save(tmp_path / "a.npy", 3, 2, 4, 5, 3)
    for version in ((1, 0), (2, 0), (3, 0)):
        with open(tmp_path / "a.npy", "wb") as file:
            np.lib.format.write_array(file, array, version)
        np.testing.assert_array_equal(open_array(str(tmp_path / "a.npy")), array.transpose(0, 1, 4, 2, 3))


def test_no_file_and_a_folder(tmp_path):
    refused(tmp_path / "a.npy", "cannot read", "No such file")
    (tmp_path / "b.npy").mkdir()
    refused(tmp_path / "b.npy", "is not a file")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3, 4, 4)), "holds float64; expected uint8"),
        (np.zeros((2, 3, 4, 4), [("grey", "u1")]), "holds [('grey', 'u1')]; expected uint8"),
        (np.asfortranarray(np.zeros((2, 3, 4, 5), np.uint8)), "Fortran order; expected C order"),
        (np.uint8(0), "shape (); expected (T, N, H, W)"),
        (np.zeros((3, 4, 4), np.uint8), "shape (3, 4, 4); expected (T, N, H, W) or (T, N, H, W, C)"),
        (np.zeros((2, 0, 4, 4), np.uint8), "shape (2, 0, 4, 4); expected (T, N, H, W)"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_other_arrays(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    refused(tmp_path / "a.npy", words)


def test_truncated_and_trailing_junk(tmp_path):
    save(tmp_path / "a.npy", 10, 100, 10, 10)
    content = (tmp_path / "a.npy").read_bytes()
    for some, words in (content[:-1], "greater than file size"), (content + b"x", "says 100,128"):
        (tmp_path / "a.npy").write_bytes(some)
        refused(tmp_path / "a.npy", words)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUM",
        b"\x93NUMPY\x09\x09" + bytes(200),
        b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n" * 20,
        b"\x1f\x8b\x08\x00" + bytes(100),
        header_only(array_header("(2, 2.5, 4, 4)")),
        header_only("{'descr': '|u99', 'fortran_order': False, 'shape': (2, 2, 4, 4)}\n"),
        header_only("__import__('os').abort()\n"),
        header_only(array_header("(2, 3, 4, 4)") + " " * 200_000, (2, 0)),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{'descr': '|u1'",  # a header of 4 GiB, it says
        header_only("-" * 9000 + "1"),  # too deep for the parser, which has no words for it
        header_only(array_header("(10**9, 1, 1, 1)")),
        header_only(array_header("(4294967296, 4294967296, 1, 1)")),
        header_only(array_header("(-1, -1, 1, 1)")),
    ],
    ids=lambda content: repr(content[:24]),
)
def test_files_that_are_no_array(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    refused(tmp_path / "a.npy", "is not a whole .npy array (")


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_objects_are_not_run(tmp_path):
    path, sprung = tmp_path / "a.npy", tmp_path / "sprung"
    array = np.empty((1, 1, 1, 1), object)
    array[...] = Trap(sprung)
    np.save(path, array, allow_pickle=True)
    bare = tmp_path / "b.npy"
    bare.write_bytes(pickle.dumps(Trap(sprung)))
    for file in (path, bare):
        refused(file, "is not a whole .npy array")
    assert not sprung.exists()
    np.load(path, allow_pickle=True)  # the trap does work
    assert sprung.exists()


VALID = io.BytesIO()
np.save(VALID, np.arange(48, dtype=np.uint8).reshape(2, 3, 2, 4))
VALID = VALID.getvalue()
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


def test_an_array_that_is_probably_wrong_is_warned_of(tmp_path, capsys):
    array = moving_squares(200)
    for wrong, warning in (
        (array, ""),
        (array.swapaxes(0, 1).copy(), "warning   read as 200 frames of 20 sequences: is N first?"),
        (array // 255, "warning   no value is above 1"),
        (array[:1].repeat(20, axis=0), "warning   hardly anything moves"),
    ):
        np.save(tmp_path / "own.npy", wrong)
        data = moving_mnist.load_data(str(tmp_path / "own.npy"), 0, 0, 20, (64, 1, 1))
        assert data.name == "own.npy" and not data.is_moving_mnist
        printed = capsys.readouterr().out
        assert printed.startswith(warning) and (warning or not printed)


def test_a_name_that_cannot_be_printed(tmp_path):
    save(tmp_path / "a\n.npy", 2, 20, 4, 4)
    with pytest.raises(UserError, match="cannot be printed; rename it"):
        moving_mnist.load_data(str(tmp_path / "a\n.npy"), 0, 0, 2, (64, 1, 1))
