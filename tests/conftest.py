"""What the tests share: a small array, and main.py in this process or in its own."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

if "--gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the variable
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # on a GPU, whose sums have no fixed order, little is equal

import numpy as np
import pytest
import torch

import figures
import main
import moving_mnist
from support import folders
from support.flags import UNUSED

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # the last bit of a sum depends on the number of threads
FRAMES_IN, FRAMES_OUT = 6, 4
STEPS = 17 // 5  # an epoch of a small run; two sequences are left over
DRAWN = "loss", "per_frame", "prediction", "animation", "grid", "compare"  # the pictures of figures.py
NO_PICTURES = f"import figures; vars(figures).update(dict.fromkeys({DRAWN}, lambda *_, **__: b''))\n"


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the numerical tests on the GPU, too")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # with --gpu; as main.py sets it in fp32


@pytest.fixture(params=[1, 3], ids=["1_thread", "3_threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def skip_without_compiler():
    if not any(map(shutil.which, ("cc", "gcc", "clang"))) or not Path("/proc/self/maps").exists():
        pytest.skip("needs a C compiler and Linux")


def moving_squares(n, seed=0):
    """uint8 (20, n, 16, 16), time first as in the official array."""
    squares = np.zeros((3, 8, 8), np.uint8)
    squares[0, 1:6, 1:6], squares[1, 2:7, 0:4], squares[2, 3:6, 3:8] = 255, 180, 120
    return np.ascontiguousarray(moving_mnist.generate(squares, n, seed, size=16)[:, :, 0].swapaxes(0, 1))


@pytest.fixture(scope="session")
def array(tmp_path_factory):
    """Path of 57 sequences of 10 frames, uint8 (57, 10, 16, 16)."""
    path = tmp_path_factory.mktemp("data") / "squares.npy"
    np.save(path, moving_squares(57)[: FRAMES_IN + FRAMES_OUT].swapaxes(0, 1))
    return path


SMALL = {"frames_in": FRAMES_IN, "frames_out": FRAMES_OUT, "train_sequences": 17, "batch_size": 5}
SMALL |= {"epochs": 2, "overlay": 1, "hidden_channels": 8, "head_channels": 8}
SMALL |= {"precision": "fp32", "device": "cpu"}


def flags(data, out, **changes):
    """The command line of a small run. A list is several values, True and False a bare flag."""
    words, unused = [], UNUSED.get(changes.get("model"), ())
    if "weights" in changes:  # they bring their network along
        unused = "hidden_channels", "head_channels"
    small = {name: value for name, value in SMALL.items() if name not in unused}
    for name, value in {"data": data, "out": out, **small, **changes}.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


@contextmanager
def without_pictures():
    """Each picture is an empty file."""
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWN:
            patch.setattr(figures, name, lambda *_, **__: b"")
        yield


def here(data, out, pictures=False, **changes):
    """Run main.main in this process, which saves the imports; the run's folder."""
    chosen, choose = [], folders.choose_folder
    noting = lambda *given: chosen.append(choose(*given)) or chosen[-1]
    with pytest.MonkeyPatch.context() as patch, nullcontext() if pictures else without_pictures():
        patch.setattr(folders, "choose_folder", noting)
        main.main(main.parse(flags(data, out, **changes)))
    return chosen[-1]


@contextmanager
def stopped_after_a_checkpoint():
    """What runs inside is interrupted as soon as it has saved last.pt."""
    save = main.save

    def stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(main, "save", stop)
        yield


def start(*arguments, launcher=(), code="", pictures=True, script=ROOT / "main.py", cwd=None, **environment):
    """Run main.py in a process of its own, perhaps after some code; stdout and stderr are text."""
    code = code if pictures else NO_PICTURES + code
    after = [str(ROOT / "tests" / "after.py"), code] if code else []
    command = [sys.executable, *launcher, *after, str(script), *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    return subprocess.Popen(command, env=ENVIRONMENT | environment, cwd=cwd, **streams)


def finish(process, status=0, timeout=120):
    """(stdout, stderr) once it has ended, with this status and without a traceback."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == status, f"{out}{err}"
    assert "Traceback" not in f"{out}{err}", err
    return out, err


def content(path):
    """What a file holds; without the minutes of a log, which differ each time."""
    if path.name != "log.csv":
        return path.read_bytes()
    with open(path) as file:
        return [{k: v for k, v in row.items() if k != "minutes"} for row in csv.DictReader(file)]


def results(folder):
    return json.loads((folder / "metrics.json").read_text("utf-8"))


def state(folder):
    """Content and time of each file."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def gradients(outputs, inputs):
    """Of a random weighted sum of the outputs, the same weights at every call."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(y.device)).sum() for y in outputs)
    return torch.autograd.grad(loss, inputs)


class Malice(str):
    """Unpickling it makes a file of this name."""

    def __reduce__(self):
        return open, (str(self), "w")


def wait_until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def reference(array, tmp_path_factory):
    """(folder, stdout) of one uninterrupted run, read only. A RANK from elsewhere is ignored."""
    out = tmp_path_factory.mktemp("reference")
    printed, _ = finish(start(*flags(array, out), RANK="1"))
    return out / "my_model", printed


@pytest.fixture(scope="session")
def short_run(array, tmp_path_factory):
    """The folder of a short run, without pictures. Read only."""
    return here(array, tmp_path_factory.mktemp("short_run"), epochs=1, train_sequences=10)


@contextmanager
def largest_file(size):
    """A full disk, as good as: no file grows beyond size bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def clone(folder, **edits):
    """A copy of the code in the folder, raw/ linked; edits: module name → list of (old text, new text)."""
    shutil.copytree(ROOT / "support", folder / "support", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("raw", "records"):
        (folder / name).symlink_to(ROOT / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    edit(folder, **edits)
    return folder


def edit(folder, **edits):
    """Replace text in files of a clone; each old text has to be there once."""
    for module, changes in edits.items():
        path = folder / f"{module.replace('.', '/')}.py"
        text = path.read_text("utf-8")
        for old, new in changes:
            assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path.name}"
            text = text.replace(old, new)
        path.write_text(text, "utf-8")
