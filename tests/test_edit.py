"""The user's loop, in a copy of the repository: run, edit a file on the disk, run again."""

import os
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import FRAMES_IN, FRAMES_OUT, clone, edit, finish, flags, results, start, state, wait_until

from support import sources

KNOB = {"main": [("learning_rate: float = 0.06", "learning_rate: float = 0.05")]}
LOSS = {"main": [("loss = cross_entropy\n", "loss = cross_entropy + logits.square().mean()\n")]}
CELL = {"my_model": [("* torch.tanh(g)", "* torch.sin(g)")]}
HEAD = {"my_model": [("nn.GELU()", "nn.ReLU()")]}
PRINT = {"my_model": [("h, c = state\n", "h, c = state; print('the cell sees a frame')\n")]}
METRIC = {
    "metrics": [
        ('    "psnr": (', '    "bias": ("mean", "grey level (0-1)"),\n    "psnr": ('),
        ("def psnr(", "def bias(x, y):\n    return (x - y).mean((2, 3, 4)).abs()\n\n\ndef psnr("),
    ]
}
RULER = {"metrics": [("_sum((x - y).square())", "2 * _sum((x - y).square())")]}


def run(code, script="main.py", out="results", pictures=False, **changes):
    changes = {"epochs": 1, "train_sequences": 10, "fast": False, **changes}
    words = flags("squares.npy", out, **changes)
    return start(*words, pictures=pictures, script=code / script, cwd=code)


@pytest.fixture
def code(ended, tmp_path):
    return shutil.copytree(ended, tmp_path / "code", symlinks=True)


@pytest.fixture(scope="module")
def ended(array, tmp_path_factory):
    """A clone in which a run has ended. Read only."""
    code = clone(tmp_path_factory.mktemp("clone"))
    shutil.copy(array, code / "squares.npy")
    finish(run(code))
    return code


def weights(code, name="my_model"):
    return results(code / "results" / name)["weights"]


def run_edited(code, edits, name, words):
    """Edit, run, undo: a new folder, a line that says why, other weights, and nothing else has changed."""
    others = {path: state(path) for path in (code / "results").iterdir() if path.is_dir()}
    edit(code, **edits)
    printed, _ = finish(run(code))
    (line,) = (line for line in printed.splitlines() if line.startswith("new run"))
    assert words in line and os.path.join("results", name) in printed
    assert weights(code, name) not in [weights(code, f.name) for f in others if (f / "metrics.json").exists()]
    assert {path: state(path) for path in others} == others
    edit(code, **{module: [pair[::-1] for pair in pairs] for module, pairs in edits.items()})


def test_edited_after_it_has_ended(code):
    what = "learning_rate 0.05"
    first = os.path.join("results", "my_model")
    run_edited(code, KNOB, "my_model-2", f"differs from {first} (which is kept) in: {what} (was 0.06)")
    assert f"| my_model-2: {what} (was 0.06) |" in (code / "results" / "compare.md").read_text("utf-8")


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="holds a process")
@pytest.mark.parametrize("goes_on", [False, True], ids=["interrupted", "goes_on"])
def test_edited_before_it_has_ended(goes_on, code, ended):
    first = code / "results" / "my_model"
    shutil.rmtree(first)
    process = run(code, pictures=True)
    wait_until((first / "last.pt").exists, process)  # half of the training
    process.send_signal(signal.SIGSTOP)
    if goes_on:
        line = "head += nn.Conv2d(n_in, n, size, padding=size // 2), nn.ReLU()"
        run_edited(code, HEAD, "my_model-2", f"(which is kept) in: my_model.py: {line}")
        before = state(first)
        _, refusal = finish(run(code), 1)
        assert "my_model is in use by another run; wait for it, or give this one a --name\n" in refusal
        assert state(first) == before
        process.send_signal(signal.SIGCONT)
        finish(process)
    else:
        process.terminate()
        process.send_signal(signal.SIGCONT)
        assert "stopped; run the same command again" in finish(process, 128 + signal.SIGTERM)[1]
        run_edited(code, CELL, "my_model-2", "(which is kept) in: my_model.py: ")
        printed, _ = finish(run(code))
        assert "resuming at step 1" in printed and "new run" not in printed
    assert weights(code) == weights(ended)


def test_a_network_in_a_folder_of_its_own(code):
    """With a knob of its own, which predict.py reads from the weights."""
    (code / "nets").mkdir()
    (code / "nets" / "mine.py").write_text("from my_model import EncoderForecaster as Mine\nSCALE = 1\n")
    edit(code, main=[("    epochs: int = 2", "    width: int = 8  # mine\n    epochs: int = 2")])
    edit(code, main=[("import convlstm\n", "import convlstm\nfrom nets import mine\n")])
    edit(code, main=[("    return EncoderForecaster(", "    return mine.Mine(")])
    edit(code, main=[("        knobs.hidden_channels,\n", "        (knobs.width,),\n")])
    finish(run(code, width=16))
    edit(code, **{"nets/mine": [("SCALE = 1", "SCALE = 2")]})
    assert "(which is kept) in: nets/mine.py: SCALE = 2" in finish(run(code, width=16))[0]
    assert (code / "results" / "my_model-3" / "source" / "nets" / "mine.py").exists()
    np.save(code / "frames.npy", np.eye(16)[None].repeat(8, 0))
    words = "frames.npy", "--weights", os.path.join("results", "my_model-3", "best.pt")
    finish(start(*words, script=code / "predict.py", cwd=code))


def test_a_module_is_known_by_its_file(monkeypatch):
    """Its folder may be in sys.path, so that the name does not say where it is."""
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(__file__=str(sources.ROOT / "nets" / "mine.py")))
    assert "nets/mine.py" in sources.used()


def test_weights_whose_code_has_changed(code):
    """They are scored by the code of now, in a folder of their own. A print in the cell works."""
    before = state(code / "results")
    best = os.path.join("results", "my_model", "best.pt")
    edit(code, **PRINT)
    printed, _ = finish(run(code, eval_only=True, weights=best, fast=True))
    assert f"edited    my_model.py: no longer the code with which {best} was trained" in printed
    assert "the edited ConvLSTM layer as it stands" in printed
    # a try on one sequence first, then whole forecasts
    frames, each = printed.count("the cell sees a frame\n") - FRAMES_IN, FRAMES_IN + FRAMES_OUT - 1
    assert frames > each and frames % each == 0
    assert state(code / "results").items() >= before.items()


def test_an_edit_is_noticed_whatever_the_path(code):
    (code / "link").symlink_to(code, target_is_directory=True)
    linked, roundabout = os.path.join("link", "main.py"), os.path.join("support", "..", "main.py")
    for script in linked, roundabout:
        assert "nothing was changed" in finish(run(code, script, pictures=True))[0]
    edit(code, **LOSS)
    assert "(which is kept) in: main.py: loss = " in finish(run(code, linked, pictures=True))[0]


def test_a_metric_that_is_added_is_scored_with_the_weights_that_are_there(code):
    """It is no other experiment. A metric that training uses is."""
    first = code / "results" / "my_model"
    trained, scores = state(first), results(first)["scores"]
    edit(code, **METRIC)
    printed, _ = finish(run(code))
    assert "scoring   6 test sequences" in printed and "\nepoch" not in printed and "new run" not in printed
    for name in ("best.pt", "last.pt", "log.csv"):
        assert state(first)[name] == trained[name]
    again = results(first)["scores"]
    assert 0 < again["my_model"].pop("bias")["mean"] < 1
    assert again["my_model"] == scores["my_model"]
    assert "nothing was changed" in finish(run(code))[0]
    edit(code, **RULER)
    assert "(which is kept) in: metrics.py: " in finish(run(code))[0]


def test_a_recipe_that_wins_over_an_edited_knob_says_so(code):
    """Before the run has a folder. It gets none, as a file has that name."""
    edit(code, main=[("epochs: int = 2", "epochs: int = 7")])
    changes = {"model": "paper", "epochs": 3, "hidden_channels": 8, "head_channels": []}
    printed, refusal = finish(run(code, out="squares.npy", **changes), status=1)
    assert refusal == "main.py: cannot write to squares.npy: File exists\n"
    (line,) = (line for line in printed.splitlines() if line.startswith("knobs"))
    assert "epochs 3" in line and "learning_rate 0.04" in line
    assert "hidden_channels 8," in line  # a flag won


def test_without_the_fast_kernels(code, ended):
    """Deleted, the same numbers as with --no_fast."""
    shutil.rmtree(code / "support" / "fast")
    shutil.rmtree(code / "results")
    assert "plain PyTorch, as support/fast was deleted" in finish(run(code, fast=True))[0]
    assert weights(code) == weights(ended)


IMPORT = """
import ctypes, signal, sys, cv2, filelock, matplotlib.figure, numpy, PIL.Image, torch, tqdm, tyro
settings = lambda: (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), torch.initial_seed(),
                    dict(matplotlib.rcParams), torch.backends.cudnn.conv.fp32_precision)
events, before = [], settings()
def note(event, given):
    writes = event == "open" and isinstance(given[1], str) and set(given[1]) & set("wax+")
    if writes or event in ("subprocess.Popen", "ctypes.dlopen", "ctypes.dlsym", "os.system", "os.mkdir"):
        events.append((event, given))
sys.addaudithook(note)
sys.path.insert(0, sys.argv[1])
import main
assert not events and settings() == before, events
model = main.load(sys.argv[2])
print(model.forecast(torch.zeros(1, 6, 1, 16, 16), 3).shape)
"""


def test_python_from_any_folder(code, tmp_path):
    """`import main` needs the folder of the code in sys.path, and nothing else.

    Nothing is compiled or written, no handler or setting changes.
    """
    (empty := tmp_path / "elsewhere").mkdir()
    best = code / "results" / "my_model" / "best.pt"
    printed, _ = finish(start(best, launcher=("-B", "-c", IMPORT), script=code, cwd=empty))
    assert printed == "torch.Size([1, 3, 1, 16, 16])\n"
    assert not list(empty.iterdir())
