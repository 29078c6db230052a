"""Fetch the official data into raw/, and verify it.

    python -m support.download    leaves raw/mnist_test_seq.npy (819,200,080 bytes), or says why not

A file gets its final name only when its checksum has matched.
"""

import gzip
import hashlib
import sys
import zlib
from typing import NamedTuple

import tyro

from support import UserError
from support.checkpoint import lock_folder, write_atomic
from support.devices import run_script
from support.sources import ROOT

RAW = ROOT / "raw"
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
    """Path of the file in raw/, which is downloaded if it is not there. Raises UserError."""
    path = RAW / file.name
    if not is_there(path, file):
        with lock_folder(RAW, wait=True):
            if not is_there(path, file):  # another process may have been faster
                download(path, file)
    return path


def is_there(path, file):
    """Whether the file has been downloaded. Raises UserError for another file of its name."""
    if path.exists() and path.stat().st_size != file.size:
        raise UserError(f"{path} is not the official file; move it away. Your own data: use --data")
    return path.exists()


def download(path, file):
    """Try one address after the other. Raises UserError."""
    import pooch  # here, as few runs download

    get = pooch.HTTPDownloader(sys.stderr.isatty(), chunk_size=2**16, timeout=TIMEOUT)
    part, failures = path.with_name(f"{path.name}.part"), []
    for url in file.urls:
        try:
            get(url, part, None)
            write_atomic(path, read_verified(part, file))
            return
        except FAULTS as error:
            while error.__context__:  # requests wraps the first error in several others
                error = error.__context__
            failures.append(f"from {url} ({error})")
        finally:
            part.unlink(missing_ok=True)
    words = f"cannot fetch {file.name} ({file.size:,} bytes) {', '.join(dict.fromkeys(failures))}"
    raise UserError(f"{words}; you can put it at {path.absolute()} yourself")


def read_verified(path, file):
    """The content, unzipped if it is gzip. Raises UserError if its md5 is another."""
    with open(path, "rb") as packed:
        zipped = packed.read(2) == b"\x1f\x8b"
    with (gzip.open if zipped else open)(path, "rb") as unpacked:
        content = unpacked.read(file.size + 1)  # one byte too many is enough to know
    if (md5 := hashlib.md5(content, usedforsecurity=False).hexdigest()) != file.md5:
        raise UserError(f"{path.name} has {len(content):,} bytes with md5 {md5}, expected {file.md5}")
    return content


def main():
    path = RAW / ARRAY.name
    if is_there(path, ARRAY):  # it may have been put there by hand
        read_verified(path, ARRAY)
    print(f"{fetch(ARRAY)} is complete")


if __name__ == "__main__":
    run_script(lambda: tyro.cli(main, description=__doc__))
