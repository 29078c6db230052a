"""Downloads from a faulty server on 127.0.0.1, killed, and two at once; the stand-in array."""

import gzip
import hashlib
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT, clone, finish, largest_file, start, wait_until
from test_moving_mnist import generate_by_law

import moving_mnist
from support import UserError, download

NPY = np.random.default_rng(0).integers(0, 16, 300_000, np.uint8).tobytes()  # its .gz has half the size
GZ = gzip.compress(NPY)
HALF = len(NPY) // 2
WRONG = bytes(len(NPY))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.answers[self.path](self)


def offer(content=b"", *cuts, code=200, hold=False, promise=True, **headers):
    """An answer with this content; promise: with its length.

    cuts: bytes sent before the connection breaks, one for each request; hold: it does not break, it waits.
    """
    cuts = list(cuts)
    headers |= {"Content_Length": str(len(content))} if promise else {}

    def answer(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        cut = cuts.pop(0) if cuts else len(content)
        handler.wfile.write(content[:cut])
        if hold and cut < len(content):
            handler.server.go_on.wait(15)
            handler.wfile.write(content[cut:])

    return answer


@pytest.fixture
def server(monkeypatch):
    """The small array at two addresses, both 404 until a test says otherwise; the first is asked twice."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # clients that hang up are what is tested
    server.asked, server.go_on = [], threading.Event()
    server.answers = dict.fromkeys(("/a.npy.gz", "/b.npy"), offer(code=404))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    a, b = server.urls = [f"http://127.0.0.1:{server.server_port}{path}" for path in server.answers]
    file = download.File("seq.npy", len(NPY), hashlib.md5(NPY).hexdigest(), (a, a, b))
    monkeypatch.setattr(download, "ARRAY", file)
    monkeypatch.setattr(download, "TIMEOUT", 5)
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RAW", tmp_path / "raw")
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def assert_fetched(folder):
    """Whole, under its name, and nothing half written beside it."""
    path = download.fetch(download.ARRAY)
    assert path == folder / "seq.npy" and path.read_bytes() == NPY
    assert names(folder) == ["seq.npy"]


def assert_refused(folder):
    """A line with addresses, size and target, and no file. → the line"""
    with pytest.raises(UserError) as error:
        download.fetch(download.ARRAY)
    line = str(error.value)
    assert "\n" not in line and ". " not in line
    for part in (*download.ARRAY.urls, "300,000 bytes", str(folder / "seq.npy")):
        assert part in line
    assert names(folder) == []
    return line


def run_main(folder):
    """`python -m support.download` with this test's addresses and folder."""
    code = "import pathlib; from support import download; from support.devices import run_script; "
    code += f"download.RAW = pathlib.Path({str(folder)!r}); "
    code += f"download.ARRAY = download.File(*{tuple(download.ARRAY)!r}); run_script(download.main)"
    return start(launcher=("-c", code), script="", cwd=ROOT)


def test_the_small_mirror_is_asked_first_and_only_once(server, tmp_path, monkeypatch):
    """What lies in the folder is harmless, and removed if nobody needs it."""
    folder = tmp_path / "some" / "raw"  # not there yet
    monkeypatch.setattr(download, "RAW", folder)
    for headers in {}, {"promise": False}, {"Content_Encoding": "gzip"}:
        server.answers["/a.npy.gz"] = offer(GZ, **headers)
        assert_fetched(folder)
        assert_fetched(folder)
        (folder / "seq.npy").unlink()
        for stray in ("seq.npy.part", "seq.npy.12345.half", "moving_mnist_standin.npy.12.half"):
            (folder / stray).write_bytes(b"x" * 2 * len(NPY))
    assert server.asked == ["/a.npy.gz"] * 3


FAULTS = {
    "html": (offer(b"<html>log in</html>", Content_Type="text/html; charset=utf-8"), "19 bytes with md5"),
    "stalled": (offer(GZ, 9_999, 9_999, hold=True), "timed out"),
    "truncated": (offer(GZ, 100_000, 100_000), "100000 bytes read"),
    "wrong bytes": (offer(WRONG), "300,000 bytes with md5"),
    "short gz": (offer(GZ[:-20]), "ended before"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_and_the_other_address_helps(server, folder, monkeypatch, fault):
    server.answers["/a.npy.gz"], why = FAULTS[fault]
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    began = time.monotonic()
    reason = assert_refused(folder).split(server.urls[0])[1].split(", from http")[0]
    assert time.monotonic() - began < 8  # the server would wait for 15
    assert why in reason, reason
    assert server.asked == ["/a.npy.gz", "/a.npy.gz", "/b.npy"]
    if fault in ("stalled", "truncated"):
        server.answers["/a.npy.gz"] = offer(code=503)
    server.answers["/b.npy"] = offer(NPY)
    assert_fetched(folder)


@pytest.mark.parametrize("fatal", ["SIGKILL", "SIGINT"])
def test_killed_and_continued(server, folder, fatal):
    server.answers["/a.npy.gz"] = offer(GZ, 100_000, hold=True)
    process = run_main(folder)
    wait_until(lambda: (folder / "seq.npy.part").exists(), process)
    process.send_signal(getattr(signal, fatal))
    out, err = process.communicate(timeout=15)
    assert out == "" and not (folder / "seq.npy").exists()
    if fatal == "SIGINT":
        assert process.returncode == 130 and err.startswith("\nstopped; run the same command again")
    assert_fetched(folder)


def test_two_at_once(server, folder):
    server.answers["/a.npy.gz"] = offer(GZ, HALF // 2, hold=True)
    other = run_main(folder)
    wait_until(lambda: server.asked, other)
    threading.Timer(0.7, server.go_on.set).start()
    assert_fetched(folder)
    assert finish(other) == (f"{folder / 'seq.npy'} is complete\n", "")
    assert server.asked == ["/a.npy.gz"]


def test_training_digits(server, folder, monkeypatch):
    """A twelfth is held out."""
    digits = np.random.default_rng(1).integers(0, 16, (33, 28, 28), np.uint8)
    content = bytes(16) + digits.tobytes()
    file = download.File("images", len(content), hashlib.md5(content).hexdigest(), (server.urls[1],))
    monkeypatch.setattr(moving_mnist, "DIGITS", file)
    server.answers["/b.npy"] = offer(gzip.compress(content))
    held_out, rest = moving_mnist.training_digits()
    assert np.array_equal(held_out, digits[:2]) and np.array_equal(rest, digits[2:])


def test_stand_in_is_the_law_with_the_committed_digits(monkeypatch, folder):
    """Test digits in its last tenth only, which is the test split. On a full disk there is none."""
    monkeypatch.setattr(moving_mnist, "N_SEQUENCES", 20)
    monkeypatch.setattr(moving_mnist, "RAW", folder)
    for name in ("digits_test.png", "digits_train.png"):
        (folder / name).symlink_to(ROOT / "raw" / name)
    array = np.load(moving_mnist.make_stand_in())
    for k in range(10):
        digits = moving_mnist.read_digits(ROOT / "raw" / f"digits_{'test' if k == 9 else 'train'}.png")
        by_law = generate_by_law(digits, 2, (150204681, k))[:, :, 0].swapaxes(0, 1)
        np.testing.assert_array_equal(array[:, 2 * k :][:, :2], by_law)
    monkeypatch.setattr(moving_mnist, "STAND_IN_FILE", "b.npy")
    with largest_file(HALF), pytest.raises(UserError, match=r"cannot write .*b\.npy: .*is the disk full"):
        moving_mnist.make_stand_in()
    assert names(folder) == ["digits_test.png", "digits_train.png", "moving_mnist_standin.npy"]


def test_two_first_starts_in_a_fresh_clone_without_internet(tmp_path):
    """They make the stand-in once, beside the code, whatever the working directory."""
    folder = tmp_path / "clone"
    folder.mkdir()
    hosts = "https://github.com/", "http://www.cs.toronto.edu/"
    nowhere = [(host, "http://127.0.0.1:1/") for host in hosts]
    fewer = [("N_SEQUENCES = 10_000", "N_SEQUENCES = 400")]
    clone(folder, **{"support.download": nowhere, "moving_mnist": fewer})
    (folder / "raw").unlink()  # a link
    (folder / "raw").mkdir()
    for name in ("digits_train.png", "digits_test.png"):
        (folder / "raw" / name).symlink_to(ROOT / "raw" / name)
    command = {"launcher": ("-m",), "script": "support.download", "PYTHONPATH": str(folder)}
    _, err = finish(start(**command, cwd=tmp_path), status=1)
    assert err.startswith("download.py: cannot fetch") and err.count("\n") == 1
    code = "import sys; sys.path.insert(0, sys.argv[1]); import moving_mnist as m; generate = m.generate; "
    code += "m.generate = lambda *a, **k: print('made') or generate(*a, **k); "
    code += "print(m.moving_mnist_array()[1])"
    processes = [start(launcher=("-c", code), script=folder, cwd=tmp_path) for _ in "ab"]
    printed = [finish(process)[0] for process in processes]
    assert all(out.endswith("stand-in array\n") for out in printed)
    assert "".join(printed).count("made") == 10
    assert names(folder / "raw") == ["digits_test.png", "digits_train.png", "moving_mnist_standin.npy"]
    assert names(tmp_path) == ["clone"]


def test_only_an_array_of_its_size_is_official(folder, monkeypatch):
    path = folder / "mnist_test_seq.npy"
    np.save(path, np.zeros((20, 12, 4, 4), np.uint8))
    monkeypatch.setattr(moving_mnist, "RAW", folder)
    with pytest.raises(UserError, match="is not the official file; move it away"):
        moving_mnist.moving_mnist_array()
    monkeypatch.setattr(moving_mnist, "ARRAY", download.ARRAY._replace(size=path.stat().st_size))
    assert moving_mnist.moving_mnist_array()[1] == "Moving MNIST array"
