"""What only a GPU can show, in about 30 minutes: prints a table and writes gpu_check.json. Please send it.

    python tests/gpu_check.py            on an NVIDIA GPU; without one, small sizes show that the script works
    python tests/gpu_check.py steps      only this check

Each check has its own process and time limit, so that one that fails does not stop the others.
"""

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch.utils.benchmark import Timer

import main
import moving_mnist
from support.bench import Convolutions
from support.prepare import prepare
from support.progress import Progress

GPU, ROOT = torch.cuda.is_available(), Path(__file__).parent.parent
DEVICE, CPU = torch.device("cuda" if GPU else "cpu"), torch.device("cpu")
KERNEL = torch.autograd.DeviceType.CUDA if GPU else torch.autograd.DeviceType.CPU
SMALL = () if GPU else ("--hidden_channels", 8, 8, "--head_channels", 8, "--max_motion", 1)
TELLING = "device", "kernels", "data", "resuming", "edited"
TELLING += "my_model", "weights", "output", "main.py", "FAILED"


def python(*words, kill_when=None):
    """Lines that a Python process prints. kill_when: a file; once it is there, the process is killed."""
    start, words = time.perf_counter(), [sys.executable, *map(str, words)]
    process = subprocess.Popen(words, stdout=-1, stderr=-2, text=True, cwd=ROOT)
    while kill_when and process.poll() is None and not kill_when.exists():
        time.sleep(0.01)
    if kill_when:
        process.kill()
    lines = process.communicate()[0].splitlines()
    telling = [line for line in lines if line.startswith(TELLING)]
    return [*telling, *lines[-1:], f"{time.perf_counter() - start:.0f} s"]


def small_array(folder):
    digits = moving_mnist.read_digits(moving_mnist.RAW / "digits_test.png")
    np.save(folder / "small.npy", moving_mnist.generate(digits, 400, 0)[:, :, 0].swapaxes(0, 1))
    return "--data", folder / "small.npy"


def numbers(folder):  # layer, gates, motion and Muon against plain PyTorch
    files = (ROOT / "tests" / f"test_{name}.py" for name in ("fast", "gpu", "my_model"))
    return {"pytest": python("-m", "pytest", "--gpu", "-n", 0, "-q", "--tb=line", *files)}


def scores(folder):  # of records/long.pt, by all metrics
    found, small = {}, small_array(folder)
    cases = [(*small, "--device", device) for device in dict.fromkeys((CPU, DEVICE))] + [()] * GPU
    for precision, case in [(precision, case) for precision in ("fp32", "bf16") for case in cases]:
        flags = "--precision", precision, *case
        words = "--eval_only", "--weights", "records/long.pt", "--out", folder / str(len(found)), *flags
        found[" ".join(map(str, flags))] = python("main.py", *words)
    return found


def steps(folder):  # of training: milliseconds, kernels, waits of the CPU (one, for the loss), convolutions
    found, small, Progress.evaluation_due = {}, small_array(folder), lambda _: False
    milliseconds = lambda function: 1e3 * Timer("f()", globals={"f": function}).timeit(9).mean  # warms up
    note_waits = torch.cuda.set_sync_debug_mode if GPU else lambda mode: None
    cases = [(p, b, h) for p in ("bf16", "fp32") for b in (8, 16, 64) for h in (1, 5, 10)]
    for precision, batch, horizon in cases if GPU else [("fp32", 2, 2)]:
        main.horizon_at = lambda *_, n=horizon: (20 - n, n)
        flags = "--precision", precision, "--batch_size", batch, "--train_sequences", batch, "--epochs", 1
        flags = *SMALL, *small, *flags, "--out", folder / f"{precision}-{batch}-{horizon}"
        setup = prepare(main.parse([*map(str, flags)]), main.build)
        optimizers = main.make_optimizers(setup.model, setup.knobs, setup.dtype)
        train = lambda s=setup, o=optimizers: main.train(s, folder, Progress.start(s), o)
        cell = {"step": milliseconds(train)}
        with torch.profiler.profile() as profiler:
            train()
        with warnings.catch_warnings(record=True) as caught, Convolutions() as mode:
            warnings.simplefilter("always")
            note_waits(1), train(), note_waits(0)
        cell["convolutions"] = milliseconds(lambda calls=mode.calls: [f(*args) for f, args in calls])
        kernels = [e.time_range.elapsed_us() / 1e3 for e in profiler.events() if e.device_type == KERNEL]
        waits = Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchron" in str(w.message))
        cell |= {"kernels": len(kernels), "their time": sum(kernels), "waits": waits}
        found[f"{precision}, batch {batch}, horizon {horizon}"] = cell
    return found


def runs(folder):  # the default, twice: the weights may differ in the last bits; and one that is too large
    flags = () if GPU else (*SMALL, *small_array(folder))
    found = {k: python("main.py", "--out", folder / k, *flags) for k in ("once", "again")}
    return found | ({"too large": python("main.py", "--out", folder, "--batch_size", 8000)} if GPU else {})


def resume(folder):  # on the other device, after a kill at the first evaluation
    found, small = {}, small_array(folder)
    for devices in (DEVICE, CPU), (CPU, DEVICE):
        out = folder / "{} then {}".format(*devices)
        flags = "main.py", *SMALL, *small, "--out", out, "--device"
        python(*flags, devices[0], kill_when=out / "my_model" / "last.pt")
        found[out.name] = python(*flags, devices[1])
    return found


LIMITS = {numbers: 900, scores: 600, steps: 600, runs: 900, resume: 400}  # seconds
if __name__ == "__main__":
    machine = torch.cuda.get_device_name() if GPU else "no GPU", torch.__version__, torch.version.cuda
    results = {"machine": {"GPU, torch, CUDA": machine}}
    for check, limit in LIMITS.items():
        if check.__name__ in (sys.argv[1:] or [check.__name__]):
            with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(1) as pool:
                try:
                    results[check.__name__] = pool.apply_async(check, (Path(folder),)).get(limit)
                except Exception as error:
                    results[check.__name__] = {"failed": f"{type(error).__name__}: {error}"[-2000:]}
            Path("gpu_check.json").write_text(json.dumps(results, indent=1))
    for check, found in results.items():
        print("\n".join(f"| {check} | {name} | {value} |" for name, value in found.items()))
