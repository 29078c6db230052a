"""download.py against a faulty server on 127.0.0.1, interrupted, killed and run twice at once."""

import errno
import functools
import gzip
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import largest_file
from test_moving_mnist import generate_by_law

import download

ROOT = Path(download.__file__).parent
MNIST = ROOT.parent / "shared" / "mnist"
NPY = np.random.default_rng(0).integers(0, 16, 300_000, np.uint8).tobytes()  # its .gz has half the size
GZ = gzip.compress(NPY)
HALF = len(NPY) // 2

needs_mnist = pytest.mark.skipif(not MNIST.is_dir(), reason="needs the MNIST files")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers["Range"]
        self.server.asked.append((self.path, wanted))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.server.answers[self.path](self, start)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.answers, self.go_on = [], {}, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass  # clients that hang up are what is tested


def offer(content, ranges=True, cuts=(), hold=False, kind="application/octet-stream", promise=None, shift=0):
    """An answer with content, from the asked byte on if `ranges`; shift: from another byte than was asked.

    cuts: bytes sent before the connection breaks, one for each request; hold: it does not break, it waits.
    promise: what Content-Length says instead of the truth; 0 leaves it out.
    """
    cuts = list(cuts)

    def answer(handler, start):
        if ranges and start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            return handler.end_headers()
        partial = ranges and start > 0
        rest = content[start + shift :] if partial else content
        handler.send_response(206 if partial else 200)
        if partial:
            handler.send_header("Content-Range", f"bytes {start + shift}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Type", kind)
        if promise != 0:
            handler.send_header("Content-Length", str(promise or len(rest)))
        handler.end_headers()
        cut = cuts.pop(0) if cuts else len(rest)
        handler.wfile.write(rest[:cut])
        if hold and cut < len(rest):
            handler.server.go_on.wait(15)
            handler.wfile.write(rest[cut:])

    return answer


def status(code):
    def answer(handler, _):
        handler.send_response(code)
        handler.end_headers()

    return answer


def redirect(url):
    def answer(handler, _):
        handler.send_response(302)
        handler.send_header("Location", url)
        handler.end_headers()

    return answer


def silence(handler, _):
    handler.server.go_on.wait(15)


@pytest.fixture
def server(monkeypatch):
    """The small array at two addresses, both 404 until a test says otherwise."""
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    server.answers = {"/a.npy": status(404), "/b.npy.gz": status(404)}
    urls = tuple(server.url + path for path in server.answers)
    md5 = hashlib.md5(NPY).hexdigest()
    monkeypatch.setattr(download, "ARRAY", download.File("seq.npy", len(NPY), md5, urls))
    monkeypatch.setattr(download, "TIMEOUT", 5)
    monkeypatch.setattr(download, "CHUNK", 1 << 14)
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def assert_fetched(folder):
    path = download.moving_mnist_array(folder)
    assert path == folder / "seq.npy"
    assert path.read_bytes() == NPY
    assert not [name for name in names(folder) if name.endswith((".part", ".tmp"))]


def assert_refused(folder):
    """DownloadError in one line with addresses, size and target, and no file of the final name. → the line"""
    with pytest.raises(download.DownloadError) as error:
        download.moving_mnist_array(folder)
    line = str(error.value)
    assert "\n" not in line
    for part in (*download.ARRAY.urls, "300,000 bytes", str(folder.absolute() / "seq.npy")):
        assert part in line
    assert not (folder / "seq.npy").exists()
    return line


def wait_for(condition):
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("nothing happened for 20 s")


def run_main(folder):
    """`python download.py folder` with this test's addresses."""
    script = (
        "import signal, download; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"download.ARRAY = download.File(*{tuple(download.ARRAY)!r}); download.main()"
    )
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# what goes well


def test_official_address_first_and_only_once(server, folder):
    server.answers["/a.npy"] = offer(NPY)
    assert_fetched(folder)
    assert_fetched(folder)
    assert server.asked == [("/a.npy", None)]
    assert names(folder) == ["seq.npy"]


def test_folder_is_made(server, tmp_path):
    server.answers["/a.npy"] = offer(NPY)
    assert_fetched(tmp_path / "some" / "raw")


def test_mirror_is_unzipped(server, folder):
    server.answers["/b.npy.gz"] = offer(GZ)
    assert_fetched(folder)
    assert [path for path, _ in server.asked] == ["/a.npy", "/b.npy.gz"]
    assert names(folder) == ["seq.npy"]


@pytest.mark.parametrize("length", [None, 0])
@pytest.mark.parametrize(("path", "content"), [("/a.npy", NPY), ("/b.npy.gz", GZ)])
def test_with_and_without_a_content_length(server, folder, path, content, length):
    server.answers[path] = offer(content, promise=length)
    assert_fetched(folder)


def test_file_of_another_size_is_fetched_again(server, folder):
    (folder / "seq.npy").write_bytes(NPY[:-1])
    server.answers["/a.npy"] = offer(NPY)
    assert_fetched(folder)


# what is continued


@pytest.mark.parametrize(("path", "content"), [("/a.npy", NPY), ("/b.npy.gz", GZ)])
def test_broken_connection_is_continued_once(server, folder, path, content):
    server.answers[path] = offer(content, cuts=[100_000])
    assert_fetched(folder)
    assert [wanted for asked, wanted in server.asked if asked == path] == [None, "bytes=100000-"]


def test_next_start_continues(server, folder):
    server.answers["/a.npy"] = offer(NPY, cuts=[100_000, 50_000])
    assert "breaks off after 150,000 of 300,000 bytes" in assert_refused(folder)
    assert (folder / "a.npy.part").read_bytes() == NPY[:150_000]
    server.asked.clear()
    assert_fetched(folder)
    assert server.asked == [("/a.npy", "bytes=150000-")]


def test_half_file_is_kept_while_the_server_is_down(server, folder):
    (folder / "a.npy.part").write_bytes(NPY[:HALF])
    for answer in (status(503), offer(b"<html>log in</html>", ranges=False, kind="text/html")):
        server.answers["/a.npy"] = answer
        assert_refused(folder)
        assert (folder / "a.npy.part").read_bytes() == NPY[:HALF]


def test_server_without_ranges_sends_all_again(server, folder):
    (folder / "a.npy.part").write_bytes(NPY[:HALF])
    server.answers["/a.npy"] = offer(NPY, ranges=False)
    assert_fetched(folder)
    assert server.asked == [("/a.npy", f"bytes={HALF}-")]


def test_416_for_any_range_starts_over(server, folder):
    (folder / "a.npy.part").write_bytes(NPY[:HALF])
    server.answers["/a.npy"] = lambda handler, start: (status(416) if start else offer(NPY))(handler, start)
    assert_fetched(folder)
    assert server.asked == [("/a.npy", f"bytes={HALF}-"), ("/a.npy", None)]


def test_416_without_a_range_is_a_refusal(server, folder):
    server.answers["/a.npy"] = status(416)
    assert "HTTP Error 416" in assert_refused(folder)


def test_whole_gz_part_is_not_sent_again(server, folder):
    (folder / "b.npy.gz.part").write_bytes(GZ)  # killed between transfer and unzipping
    server.answers["/b.npy.gz"] = offer(GZ)
    assert_fetched(folder)
    assert server.asked[-1] == ("/b.npy.gz", f"bytes={len(GZ)}-")  # answered by 416


def test_whole_part_needs_no_server(server, folder):
    (folder / "a.npy.part").write_bytes(NPY)
    assert_fetched(folder)
    assert server.asked == []


def test_stray_temporary_is_harmless(server, folder):
    (folder / "seq.npy.12345.tmp").write_bytes(b"x" * 2 * len(NPY))
    server.answers["/a.npy"] = offer(NPY)
    assert_fetched(folder)


# what goes wrong


BOMB = gzip.compress(bytes(50_000_000))
WRONG = bytes(len(NPY))
FAULTS = {
    "404": ("/a.npy", status(404), "404"),
    "html": ("/a.npy", offer(b"<html>log in</html>", kind="text/html; charset=utf-8"), "web page"),
    "html as bytes": ("/a.npy", offer(b"<html>log in</html>", promise=0), "md5"),
    "redirect to no URL": ("/a.npy", redirect("http://[::1"), "IPv6"),
    "redirect to no host": ("/a.npy", redirect(f"http://{'x' * 64}.org/"), "label"),
    "silent": ("/a.npy", silence, "timed out"),
    "stalled": ("/a.npy", offer(NPY, cuts=[9_999, 9_999], hold=True), "timed out"),
    "wrong bytes": ("/a.npy", offer(WRONG), "md5"),
    "longer": ("/a.npy", offer(NPY + b"x", promise=0), "md5"),
    "smaller length": ("/a.npy", offer(NPY, promise=len(NPY) - 1), "offers 299,999 bytes"),
    "larger length": ("/a.npy", offer(NPY, promise=len(NPY) + 1), "offers 300,001 bytes"),
    "larger gz": ("/b.npy.gz", offer(GZ, promise=len(NPY) + 1), "offers 300,001 bytes"),
    "endless gz": ("/b.npy.gz", offer(GZ + b"x" * 9_000_000, promise=0), "gzip"),
    "wrong gz": ("/b.npy.gz", offer(gzip.compress(WRONG)), "md5"),
    "short gz": ("/b.npy.gz", offer(GZ[:-20]), "gzip"),
    "no gz": ("/b.npy.gz", offer(NPY), "gzip"),
    "flipped gz": ("/b.npy.gz", offer(GZ[:99] + bytes([GZ[99] ^ 1]) + GZ[100:]), "gzip|md5"),
    "bomb": ("/b.npy.gz", offer(BOMB), "300,001 bytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_and_the_other_address_helps(server, folder, monkeypatch, fault):
    path, answer, why = FAULTS[fault]
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.answers[path] = answer
    began = time.monotonic()
    line = assert_refused(folder)
    assert time.monotonic() - began < 8  # the server would wait for 15
    reason = line.split(server.url + path)[1].split(" or http")[0].split("; you")[0]
    assert any(word in reason for word in why.split("|")), line
    if fault != "stalled":
        assert names(folder) == []  # wrong bytes are not continued
    other, content = {"/a.npy": ("/b.npy.gz", GZ), "/b.npy.gz": ("/a.npy", NPY)}[path]
    server.answers[other] = offer(content)
    assert_fetched(folder)


def test_stalled_transfer_is_continued(server, folder, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.answers["/a.npy"] = offer(NPY, cuts=[10_000], hold=True)
    assert_fetched(folder)
    assert server.asked == [("/a.npy", None), ("/a.npy", "bytes=10000-")]


def test_gz_shorter_than_its_content_length_but_whole(server, folder):
    server.answers["/b.npy.gz"] = offer(GZ, promise=len(GZ) + 7)
    assert_fetched(folder)


def test_another_range_than_asked(server, folder):
    (folder / "a.npy.part").write_bytes(NPY[:HALF])
    server.answers["/a.npy"] = offer(NPY, shift=5)
    assert "another range" in assert_refused(folder)


def test_part_of_another_file_is_dropped(server, folder):
    (folder / "a.npy.part").write_bytes(WRONG[:HALF])
    server.answers["/a.npy"] = offer(NPY)
    assert "md5" in assert_refused(folder)
    assert_fetched(folder)


def test_refused_connection(server, folder, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        urls = (f"http://127.0.0.1:{closed.getsockname()[1]}/a.npy", f"{server.url}/b.npy.gz")
        monkeypatch.setattr(download, "ARRAY", download.ARRAY._replace(urls=urls))
        assert "refused" in assert_refused(folder)
        server.answers["/b.npy.gz"] = offer(GZ)
        assert_fetched(folder)


def test_full_disk(server, folder):
    server.answers["/a.npy"] = offer(NPY)
    with largest_file(HALF):
        assert "File too large" in assert_refused(folder)
    assert_fetched(folder)
    assert server.asked[-1] == ("/a.npy", f"bytes={HALF}-")


def test_folder_that_cannot_be(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(download.DownloadError, match="cannot write in"):
        download.moving_mnist_array(tmp_path / "file" / "raw")


# put there by hand


def test_gz_put_there_by_hand(server, folder):
    (folder / "seq.npy.gz").write_bytes(GZ)
    assert_fetched(folder)
    assert server.asked == []
    assert names(folder) == ["seq.npy", "seq.npy.gz"]


def test_wrong_gz_put_there_by_hand_is_named_and_kept(server, folder):
    (folder / "seq.npy.gz").write_bytes(BOMB)
    assert str(folder / "seq.npy.gz") in assert_refused(folder)
    assert (folder / "seq.npy.gz").read_bytes() == BOMB
    server.answers["/a.npy"] = offer(NPY)
    assert_fetched(folder)


def test_main_does_not_trust_the_length(server, folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["download.py", str(folder)])
    (folder / "seq.npy").write_bytes(WRONG)
    with pytest.raises(SystemExit, match=rf"seq\.npy has other content: md5 .*, not {download.ARRAY.md5}; remove it"):
        download.main()


# killed, stopped, twice at once


@pytest.mark.parametrize("fatal", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_continued(server, folder, fatal):
    server.answers["/a.npy"] = offer(NPY, cuts=[HALF], hold=True)
    process = run_main(folder)
    part = folder / "a.npy.part"
    wait_for(lambda: part.exists() and part.stat().st_size == HALF)
    process.send_signal(fatal)
    out, err = process.communicate(timeout=15)
    if fatal == signal.SIGINT:
        assert process.returncode == 130
        assert err == "stopped; run it again to go on\n"
    assert out == ""
    assert part.read_bytes() == NPY[:HALF]
    assert_fetched(folder)
    assert server.asked == [("/a.npy", None), ("/a.npy", f"bytes={HALF}-")]


def test_two_at_once(server, folder, capsys):
    server.answers["/a.npy"] = offer(NPY, cuts=[HALF], hold=True)
    other = run_main(folder)
    wait_for(lambda: server.asked)
    threading.Timer(0.7, server.go_on.set).start()
    assert_fetched(folder)
    assert "waiting for another process" in capsys.readouterr().err
    out, err = other.communicate(timeout=15)
    assert (other.returncode, out, err) == (0, f"{folder / 'seq.npy'} is whole\n", "")
    assert server.asked == [("/a.npy", None)]


def test_without_locks_it_goes_on(server, folder, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits for nobody"))
    server.answers["/a.npy"] = offer(NPY)
    assert_fetched(folder)


def test_main(server, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["download.py", str(folder)])
    with pytest.raises(SystemExit) as stopped:
        download.main()
    assert str(stopped.value) == assert_refused(folder)  # Python prints it to stderr and exits with status 1
    server.answers["/a.npy"] = offer(NPY)
    download.main()
    assert str(folder / "seq.npy") in capsys.readouterr().out
    (folder / "seq.npy").write_bytes(b"of one's own")
    with pytest.raises(SystemExit, match=r"seq\.npy has 12 bytes, not 300,000; move it away"):
        download.main()
    assert (folder / "seq.npy").read_bytes() == b"of one's own"
    monkeypatch.setattr(sys, "argv", ["download.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        download.main()
    assert "leaves raw/mnist_test_seq.npy" in capsys.readouterr().out


# digits


def test_mnist_digits(server, folder, monkeypatch):
    digits = np.random.default_rng(1).integers(0, 16, (7, 28, 28), np.uint8)
    idx = bytes([0, 0, 8, 3, 0, 0, 0, 7, 0, 0, 0, 28, 0, 0, 0, 28]) + digits.tobytes()
    urls = (f"{server.url}/b.npy.gz",)
    file = download.File("images", len(idx), hashlib.md5(idx).hexdigest(), urls)
    monkeypatch.setattr(download, "DIGITS", file)
    with pytest.raises(download.DownloadError, match="404"):
        download.mnist_digits(folder)
    server.answers["/b.npy.gz"] = offer(gzip.compress(idx))
    np.testing.assert_array_equal(download.mnist_digits(folder), digits)


def test_a_run_that_began_without_mnist_goes_on_without(server, folder, monkeypatch, capsys):
    """Its checkpoint would not fit to other digits, and no knob could bring the first ones back."""
    digits = np.random.default_rng(1).integers(0, 16, (24, 28, 28), np.uint8)
    idx = bytes(16) + digits.tobytes()
    urls = (f"{server.url}/b.npy.gz",)
    monkeypatch.setattr(download, "DIGITS", download.File("images", len(idx), hashlib.md5(idx).hexdigest(), urls))
    monkeypatch.chdir(folder.parent)
    lengths = lambda: [len(part) for part in download.training_digits()]
    assert lengths() == [833, 9167] and "404" in capsys.readouterr().out
    server.answers["/b.npy.gz"] = offer(gzip.compress(idx))
    server.asked.clear()
    assert lengths() == [833, 9167] and not server.asked
    assert f"before; remove {Path('raw/images.missing')} to try again" in capsys.readouterr().out
    (folder / "images.gz").write_bytes(gzip.compress(idx))  # put there by hand
    assert lengths() == [2, 22]
    (folder / "images.gz").unlink()
    (folder / "images").unlink()
    assert lengths() == [2, 22] and not capsys.readouterr().out  # it was found, so it is asked for again


@functools.cache
def idx_images(name):
    with gzip.open(MNIST / f"{name}-images-idx3-ubyte.gz") as file:
        return np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)


@needs_mnist
def test_mnist_digits_put_there_by_hand_are_the_real_ones(folder):
    shutil.copy(MNIST / "train-images-idx3-ubyte.gz", folder)
    np.testing.assert_array_equal(download.mnist_digits(folder), idx_images("train"))


@pytest.mark.parametrize(("name", "n"), [("train", 10_000), ("test", 2_000)])
def test_sheets(name, n):
    digits = download.digit_sheet(ROOT / "raw" / f"digits_{name}.png")
    assert digits.shape == (n, 28, 28) and digits.dtype == np.uint8
    assert digits.max(axis=(1, 2)).min() > 127  # no empty place


@needs_mnist
def test_docstring_remakes_the_sheets(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    for path in MNIST.glob("*.gz"):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    exec("if True:" + download.__doc__[download.__doc__.index("\n    import gzip") :])
    for name, source, part in ("train", "train", slice(10_000)), ("test", "t10k", slice(None, None, 5)):
        committed = download.digit_sheet(ROOT / "raw" / f"digits_{name}.png")
        np.testing.assert_array_equal(committed, idx_images(source)[part])
        np.testing.assert_array_equal(download.digit_sheet(f"raw/digits_{name}.png"), committed)


def test_damaged_sheets(tmp_path):
    good = (ROOT / "raw" / "digits_test.png").read_bytes()
    path = tmp_path / "sheet.png"
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    small = cv2.imencode(".png", np.zeros((56, 2799), np.uint8))[1].tobytes()
    for content in (None, b"", b"<html>", good[: len(good) // 2], bytes(flipped), small):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(download.DownloadError, match=r"sheet\.png is missing or damaged"):
            download.digit_sheet(path)


@pytest.fixture
def small_stand_in(monkeypatch, tmp_path):
    """Sheets of 100 digits: training digits are grey 1 to 100, test digits 101 to 200."""
    for name, greys in ("train", range(1, 101)), ("test", range(101, 201)):
        sheet = np.repeat(np.array([greys], np.uint8), 28, axis=1).repeat(28, axis=0)
        assert cv2.imwrite(str(tmp_path / f"digits_{name}.png"), sheet)
    monkeypatch.setattr(download, "RAW", tmp_path)
    monkeypatch.setattr(download, "SEQUENCES", 40)


def test_stand_in(small_stand_in, folder):
    path = download.stand_in(folder)
    assert names(folder) == [path.name] == ["moving_mnist_standin.npy"]
    array = np.load(path, allow_pickle=False)
    assert array.shape == (20, 40, 64, 64) and array.dtype == np.uint8 and array.flags.c_contiguous
    train, test = array[:, :36], array[:, 36:]
    assert set(np.unique(train)) <= set(range(101))
    assert set(np.unique(test)) <= {0, *range(101, 201)}
    assert len({train[:, s].tobytes() for s in range(36)}) == 36  # no block repeats another


def test_stand_in_is_the_law_with_the_committed_digits(monkeypatch, folder):
    monkeypatch.setattr(download, "SEQUENCES", 20)
    array = np.load(download.stand_in(folder))
    for k in (0, 9):
        digits = download.digit_sheet(ROOT / "raw" / f"digits_{'test' if k == 9 else 'train'}.png")
        by_law = generate_by_law(digits, 2, (150204681, k))[:, :, 0].swapaxes(0, 1)
        np.testing.assert_array_equal(array[:, 2 * k :][:, :2], by_law)


def test_stand_in_is_made_once_and_the_same_everywhere(small_stand_in, tmp_path):
    path = download.stand_in(tmp_path / "one")
    assert path.read_bytes() == download.stand_in(tmp_path / "two").read_bytes()
    before = path.stat()
    assert download.stand_in(tmp_path / "one").stat() == before


def test_stand_in_waits_for_another_process(small_stand_in, folder, monkeypatch):
    other = download.alone_for(folder / "any")

    def end(_):
        (folder / "moving_mnist_standin.npy").write_bytes(b"the other's")
        other.close()

    monkeypatch.setattr(time, "sleep", end)
    assert download.stand_in(folder).read_bytes() == b"the other's"


def test_strays_of_others_are_left_alone(small_stand_in, folder):
    """The folder may be anyone's: python download.py /tmp."""
    ours, others = folder / "moving_mnist_standin.npy.123.tmp", folder / "upload.2024.tmp"
    ours.write_bytes(b"half"), others.write_bytes(b"whole")
    download.stand_in(folder)
    assert not ours.exists() and others.read_bytes() == b"whole"


def test_stand_in_on_a_full_disk(small_stand_in, folder, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(download.DownloadError, match=r"cannot write .*standin\.npy.*No space left"):
        download.stand_in(folder)
    assert names(folder) == []


def test_stand_in_without_sheets(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(download, "RAW", tmp_path)
    with pytest.raises(download.DownloadError, match=r"digits_train\.png is missing or damaged"):
        download.stand_in(folder)
    assert names(folder) == []


@pytest.mark.parametrize(("more", "name"), [(1, "mnist_test_seq.npy"), (0, "Moving MNIST array")])
def test_only_an_array_of_its_size_is_called_official(tmp_path, monkeypatch, more, name):
    (tmp_path / "raw").mkdir()
    path = tmp_path / "raw" / "mnist_test_seq.npy"
    np.save(path, np.zeros((20, 12, 4, 4), np.uint8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "ARRAY", download.ARRAY._replace(size=path.stat().st_size + more))
    assert download.load_data(SimpleNamespace(data="array", train_sequences=0))[-1] == name
