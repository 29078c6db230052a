"""Where the data comes from: fetched, verified and unzipped, made from the digits committed in raw/, or your own.

    python download.py    leaves raw/mnist_test_seq.npy (819,200,080 bytes), or says why not

A transfer fills a .part file, which the next attempt continues, today or tomorrow. The final name appears
only when the checksum has matched, so a start looks at the length only; the command above also at a file that was
put there by hand.

raw/digits_train.png and raw/digits_test.png are the first 10,000 training digits and every fifth test digit
(2,000) of MNIST (Y. LeCun, C. Cortes, CC BY-SA 3.0), 100 a row: both have the mean ink of the whole, which the
first 2,000 test digits have not. This remakes them where MNIST's own two files are:

    import gzip, cv2, numpy as np
    for name, source, part in ("train", "train", slice(10_000)), ("test", "t10k", slice(None, None, 5)):
        idx = gzip.open(f"{source}-images-idx3-ubyte.gz").read()
        digits = np.frombuffer(idx, np.uint8, offset=16).reshape(-1, 28, 28)[part]
        sheet = digits.reshape(-1, 100, 28, 28).swapaxes(1, 2).reshape(-1, 100 * 28)
        assert cv2.imwrite(f"raw/digits_{name}.png", sheet, [cv2.IMWRITE_PNG_COMPRESSION, 9])
"""

import argparse
import gzip
import hashlib
import os
import sys
import time
import zlib
from contextlib import suppress
from http.client import HTTPException
from itertools import count
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import cv2
import numpy as np
from tqdm import tqdm

import checkpoint
import videos
from machine import say
from moving_mnist import DataError, FreshMovingMNIST, MovingMNIST, digits_of, generate, shape_of


class File(NamedTuple):
    """A file as it must be once unzipped, and the addresses that offer it, plain or as .gz."""

    name: str
    size: int  # bytes
    md5: str
    urls: tuple[str, ...]


OFFICIAL = "http://www.cs.toronto.edu/~nitish/unsupervised_video/mnist_test_seq.npy"
MIRROR = "https://github.com/tychovdo/MovingMNIST/raw/master/mnist_test_seq.npy.gz"
ARRAY = File("mnist_test_seq.npy", 819_200_080, "be083ec986bfe91a449d63653c411eb2", (OFFICIAL, MIRROR))

# of the images, not of the .gz around them: the same images packed by another gzip are as good
DIGITS = File("train-images-idx3-ubyte", 47_040_016, "6bbc9ace898e44ae57da46a324031adb", (
    "https://ossci-datasets.s3.amazonaws.com/mnist/train-images-idx3-ubyte.gz",
    "https://storage.googleapis.com/cvdf-datasets/mnist/train-images-idx3-ubyte.gz",
))  # fmt: skip

MOVING_MNIST = "array", "fresh", "recut"  # as --data has it; all else is your own
RAW = Path(__file__).with_name("raw")
SEQUENCES = 10_000  # of the stand-in, as in the official array
TIMEOUT = 10  # seconds without an answer or a byte
CHUNK = 1 << 18  # bytes


class DownloadError(Exception):
    """Data that cannot be had, in one sentence."""


def load_data(knobs):
    """(training, validation, test, name of the data for every output)."""
    path, name = find_array(knobs)
    if knobs.data not in ("fresh", "recut"):
        training = MovingMNIST(path, "train", knobs.train_sequences)
        return training, MovingMNIST(path, "validation"), MovingMNIST(path, "test"), name
    if knobs.data == "recut":
        digits = cut_digits(path, name)
        validation, test_split = MovingMNIST(path, "validation"), MovingMNIST(path, "test")
        words = f"new sequences of {len(digits):,} digits cut out of it"
    else:
        held_out, digits = training_digits()
        validation = FreshMovingMNIST(held_out, 900, 2**40)  # a seed of its own
        # of the official array, all sequences: training has seen none. The stand-in has its training digits in the rest
        test_split = MovingMNIST(path, "test" if name == "stand-in array" else "all")
        words = f"fresh sequences of {len(digits):,} digits"
    training = FreshMovingMNIST(digits, knobs.train_sequences or 10_000, knobs.seed)
    ours, theirs = map(shape_of, (training, test_split))
    if ours != theirs:
        raise DataError(f"{path} has sequences of shape {theirs}, but fresh ones are {ours}; leave out --data fresh "
                        "to train on it as well, or move it away")  # fmt: skip
    if not (knobs.eval_only and knobs.weights):
        name += f", trained on {words}"
    return training, validation, test_split, name


def is_moving_mnist(knobs, split):
    """Whether the knobs ask for it and the split has its frames: someone's own file may lie there instead."""
    return knobs.data in MOVING_MNIST and shape_of(split)[1:] == (1, 64, 64)


def find_array(knobs):
    """The array's path, or the array itself where a folder of videos is read, and its name."""
    if knobs.data not in MOVING_MNIST:
        path = Path(knobs.data)
        name = path.name or path.resolve().name
        if not name.isprintable():  # or no UTF-8, and log.csv could not hold it
            raise DataError(f"{name!a} is a name with characters that cannot be printed; rename it")
        if os.path.isdir(path):  # Path.is_dir raises in a closed folder, and so does exists
            span = knobs.frames_in + knobs.frames_out
            path = videos.read_folder(path, span, knobs.video_size, knobs.video_stride, knobs.video_colour)
        return path, name
    path = Path("raw/mnist_test_seq.npy")
    if os.path.exists(path):
        return path, "Moving MNIST array" if length(path) == ARRAY.size else path.name  # or someone's own
    path = Path("raw/moving_mnist_standin.npy")
    if os.path.exists(path) and not os.path.exists("raw/mnist_test_seq.npy.gz"):
        say("raw/mnist_test_seq.npy is not there: using the stand-in (python download.py fetches the real one)")
    else:
        try:
            return moving_mnist_array(), "Moving MNIST array"
        except DownloadError as error:
            say(f"no official array: going on with a stand-in, made of raw/digits_*.png by the same law, as\n{error}")
            stand_in()
    return path, "stand-in array"


def cut_digits(path, name):
    """The digits that the array's training split shows. DataError."""
    training = MovingMNIST(path, "train")
    digits = digits_of(training.frames) if shape_of(training) == (20, 1, 64, 64) else ()
    if len(digits) < 2:
        raise DataError(f"{name} has no sequences of 20 frames of 64×64 from which two digits could be cut; "
                        "train on it by --data array")  # fmt: skip
    return digits


def training_digits():
    """Of MNIST's, or of those that are here: (a twelfth, for validation, that no training sequence shows; the rest).

    Once MNIST's could not be had, they are not asked for again, as a run has to go on with the digits it began with,
    until raw/train-images-idx3-ubyte.missing is removed or MNIST's file is put beside it.
    """
    file = Path("raw") / DIGITS.name
    missing = file.with_suffix(".missing")
    try:
        if os.path.exists(missing) and not (os.path.exists(file) or os.path.exists(file.with_suffix(".gz"))):
            raise DownloadError(f"MNIST's could not be had before; remove {missing} to try again")
        digits = mnist_digits()
        with suppress(OSError):
            missing.unlink()
    except DownloadError as error:
        say(f"not all of MNIST: going on with the 10,000 training digits of raw/digits_train.png, as\n{error}")
        digits = digit_sheet(RAW / "digits_train.png")
        with suppress(OSError):
            missing.touch()
    return np.split(digits, [len(digits) // 12])


def moving_mnist_array(folder="raw"):
    """Path of the official array (20, 10000, 64, 64), uint8, fetched first if missing. DownloadError."""
    return fetch(ARRAY, folder)


def mnist_digits(folder="raw"):
    """MNIST's training digits (60000, 28, 28), uint8, fetched first if missing. DownloadError."""
    return np.fromfile(fetch(DIGITS, folder), np.uint8, offset=16).reshape(-1, 28, 28)


def digit_sheet(path):
    """The digits (n, 28, 28), uint8, of a contact sheet with 100 a row. DownloadError."""
    content = Path(path).read_bytes() if Path(path).is_file() else b""
    # not cv2.imread, which on Windows cannot open every path
    sheet = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE) if content else None
    if sheet is None or sheet.shape[0] % 28 or sheet.shape[1] != 100 * 28:
        raise DownloadError(f"{path} is missing or damaged; `git checkout {path}` brings it back")
    return sheet.reshape(-1, 28, 100, 28).swapaxes(1, 2).reshape(-1, 28, 28)


def stand_in(folder="raw"):
    """Path of an array like the official one, generated by its law from the committed digits. DownloadError.

    Test digits are in its last tenth only, the test split. If the file is there, it is left as it is.
    """
    path = Path(folder) / "moving_mnist_standin.npy"
    with alone_for(path):
        if path.exists():
            return path
        train, test = (digit_sheet(RAW / f"digits_{name}.png") for name in ("train", "test"))
        array, tenth = np.empty((20, SEQUENCES, 64, 64), np.uint8), SEQUENCES // 10
        for k in tqdm(range(10), "generating", disable=None):
            sequences = generate(test if k == 9 else train, tenth, seed=(150204681, k))  # (B, T, 1, H, W)
            array[:, k * tenth : (k + 1) * tenth] = sequences[:, :, 0].swapaxes(0, 1)
        try:
            with checkpoint.replacing(path) as out:
                np.save(out, array)
        except OSError as error:
            raise DownloadError(f"cannot write {path}: {error}") from error
    return path


def fetch(file, folder):
    """Path of the file in the folder: there already, unzipped from a .gz put there by hand, or downloaded."""
    folder = Path(folder)
    path, by_hand = folder / file.name, folder / f"{file.name}.gz"
    if length(path) == file.size:
        return path
    parts = {url: folder / f"{url.rpartition('/')[2]}.part" for url in file.urls}
    failures = []
    with alone_for(path):
        if length(path) == file.size:  # by now
            return path
        for source, local in (({by_hand: by_hand} if by_hand.exists() else {}) | parts).items():
            try:
                if local is not by_hand:
                    download(source, local, file.size)
                unpack(local, path, file)
                for part in parts.values():
                    part.unlink(missing_ok=True)
                return path
            except (OSError, HTTPException, ValueError, DownloadError) as error:  # ValueError: a redirect to no URL
                failures.append(f"{source} ({error.reason if type(error) is URLError else error})")
                if isinstance(error, DownloadError) and local is not by_hand:
                    local.unlink()  # other bytes: nothing to continue
    raise DownloadError(
        f"{file.name} ({file.size:,} bytes) cannot be had from {' or '.join(failures)}; "
        f"you can put it by hand at {path.absolute()}, or its .gz beside that"
    )


def alone_for(path):
    """For `with`: one process at a time makes files in the path's folder. The others wait, then find the work done."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for attempt in count():
            try:
                return checkpoint.lock(folder, path.name)
            except checkpoint.CheckpointError:
                if attempt == 0:
                    print(f"waiting for another process that fetches into {folder}", file=sys.stderr)
                time.sleep(0.5)
    except OSError as error:
        raise DownloadError(f"cannot write in {folder}: {error.strerror}") from error


def length(path):
    return path.stat().st_size if os.path.exists(path) else 0  # Path.exists raises in a closed folder


def download(url, part, size):
    """Complete the .part file. Raises OSError or HTTPException, and leaves in it what came."""
    before = length(part)
    if before >= size:
        return  # only the checksum was left to do
    try:
        transfer(url, part, size)
    except (OSError, HTTPException):
        if length(part) <= before:
            raise
        transfer(url, part, size)  # data came, then the connection broke: once more, from there


def transfer(url, part, size):
    """Ask once for what the .part file lacks, and append it."""
    have = length(part)
    try:
        response = urlopen(Request(url, headers={"Range": f"bytes={have}-"} if have else {}), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers["Content-Range"] != f"bytes */{have}":  # that would say: you have it all
            part.unlink()
            transfer(url, part, size)
        return
    with response:
        if response.headers.get_content_type() == "text/html":
            raise OSError("answers with a web page")
        if response.status != 206:
            have = 0  # all of it comes, whatever was asked
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise OSError("answers with another range")
        total = None if response.length is None else have + response.length
        if total is not None and (total > size or (total < size and not url.endswith(".gz"))):
            raise OSError(f"offers {total:,} bytes instead of {size:,}")
        end = size + 1 if total is None else total
        bar = tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab") as out:
            out.truncate(have)
            while have < end and (chunk := response.read1(min(CHUNK, end - have))):
                out.write(chunk)
                bar.update(len(chunk))
                have += len(chunk)
        if total is not None and have < total:
            raise OSError(f"breaks off after {have:,} of {total:,} bytes")


def unpack(source, path, file):
    """Copy source, unzipped if it is a .gz, to its final name if it is the file; DownloadError if not."""
    md5, size = hashlib.md5(usedforsecurity=False), 0
    with checkpoint.replacing(path) as out, (gzip.open if ".gz" in source.suffixes else open)(source, "rb") as packed:
        try:  # one byte too many is enough to know, however much a .gz may unzip to
            while chunk := packed.read(min(CHUNK, file.size + 1 - size)):
                md5.update(chunk)
                size += len(chunk)
                out.write(chunk)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DownloadError(f"is no whole gzip file: {error}") from error
        if md5.hexdigest() != file.md5:
            raise DownloadError(f"has other content: md5 {md5.hexdigest()} of {size:,} bytes, not {file.md5}")


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("folder", nargs="?", default="raw", help="where to leave the array (default: raw)")
    folder = parser.parse_args().folder
    try:
        path = Path(folder) / ARRAY.name
        if length(path) not in (0, ARRAY.size):  # main.py would train on it
            raise DownloadError(f"{path} has {length(path):,} bytes, not {ARRAY.size:,}; move it away and start again")
        path = moving_mnist_array(folder)
        found = hashlib.md5(np.memmap(path, np.uint8, "r"), usedforsecurity=False).hexdigest()
        if found != ARRAY.md5:  # put there by hand
            raise DownloadError(f"{path} has other content: md5 {found}, not {ARRAY.md5}; remove it and start again")
        print(f"{path} is whole")
    except (DownloadError, OSError) as error:
        sys.exit(str(error))  # on stderr, with status 1
    except KeyboardInterrupt:
        print("stopped; run it again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
