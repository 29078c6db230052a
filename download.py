"""Fetch the official data into raw/, and verify it.

    python download.py    leaves raw/mnist_test_seq.npy (819,200,080 bytes), or says why not

A file gets its final name only when its checksum has matched. A .gz that you put into raw/ is used first.
"""

import gzip
import hashlib
import os
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import tyro

from support import UserError
from support.checkpoint import lock_folder, write_atomic
from support.devices import run_script

RAW = Path(__file__).with_name("raw")
TIMEOUT = 10  # seconds without an answer or a byte
FAULTS = OSError, ValueError, EOFError, zlib.error, UserError  # of a download, or of a file that is there


class File(NamedTuple):
    name: str
    size: int  # bytes, once unzipped
    md5: str  # of these bytes
    urls: tuple[str, ...]  # that offer it, plain or as .gz, in the order of the attempts


MIRROR = "https://github.com/tychovdo/MovingMNIST/raw/master/mnist_test_seq.npy.gz"  # a tenth of the size
AUTHORS = "http://www.cs.toronto.edu/~nitish/unsupervised_video/mnist_test_seq.npy"
ARRAY = File("mnist_test_seq.npy", 819_200_080, "be083ec986bfe91a449d63653c411eb2", (MIRROR, MIRROR, AUTHORS))
HOSTS = "https://ossci-datasets.s3.amazonaws.com/mnist", "https://storage.googleapis.com/cvdf-datasets/mnist"
URLS = tuple(f"{host}/train-images-idx3-ubyte.gz" for host in HOSTS)
DIGITS = File("train-images-idx3-ubyte", 47_040_016, "6bbc9ace898e44ae57da46a324031adb", URLS)


def fetch(file):
    """Path of the file in raw/: already there, unzipped, or downloaded. Raises UserError."""
    path, by_hand, part = (RAW / f"{file.name}{suffix}" for suffix in ("", ".gz", ".part"))
    if has_size(path, file.size):
        return path
    import pooch  # here, as few runs download

    download, failures = pooch.HTTPDownloader(sys.stderr.isatty(), chunk_size=2**16, timeout=TIMEOUT), []
    with lock_folder(RAW, wait=True):
        sources = [by_hand] * os.path.exists(by_hand) + list(file.urls)
        while sources and not has_size(path, file.size):  # another process may have been faster
            source = sources.pop(0)
            try:
                if source is not by_hand:
                    download(source, part, None)
                write_atomic(path, read_verified(by_hand if source is by_hand else part, file))
            except FAULTS as error:
                failures.append(f"from {source} ({describe(error)})")
        part.unlink(missing_ok=True)
    if has_size(path, file.size):
        return path
    words = f"cannot fetch {file.name} ({file.size:,} bytes) {', '.join(dict.fromkeys(failures))}"
    raise UserError(f"{words}; you can put it at {path.absolute()} yourself, or its .gz beside that")


def has_size(path, size):
    return os.path.exists(path) and os.path.getsize(path) == size


def describe(error):
    """The reason, in one line. requests wraps the first error in several others."""
    while error.__context__:
        error = error.__context__
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_verified(path, file):
    """The content, unzipped if it is gzip. Raises UserError if its md5 is another."""
    with open(path, "rb") as packed:
        zipped = packed.read(2) == b"\x1f\x8b"
    with (gzip.open if zipped else open)(path, "rb") as unpacked:
        content = unpacked.read(file.size + 1)  # one byte too many is enough to know
    if (md5 := hashlib.md5(content, usedforsecurity=False).hexdigest()) != file.md5:
        raise UserError(f"{len(content):,} bytes with md5 {md5}, expected {file.md5}")
    return content


def main():
    path = RAW / ARRAY.name
    try:
        if os.path.exists(path):  # put there by hand, or your own
            read_verified(path, ARRAY)
    except FAULTS as error:
        raise UserError(f"{path} cannot be used ({describe(error)}); move it away") from error
    print(f"{fetch(ARRAY)} is complete")


if __name__ == "__main__":
    run_script(lambda: tyro.cli(main, description=__doc__))
