"""Time the paper's network, the default of main.py, and the reference.

    python -m support.bench    prints a table and writes bench.json

Contenders take turns; the median of each is printed. Compare times of one run only. The reference has no
peepholes, and it convolves zeros. A step reads 10 frames and forecasts 10, on an NVIDIA GPU if there is one.
Then, on a CPU: a training step of the default network, AdamW included, against its bare convolutions,
and without symmetric.py. At horizon h it reads 20 - h frames and forecasts h.
"""

import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

import main
from support.devices import choose_device
from support.prepare import attach

PAPER = {"model": "paper", **main.RECIPES["paper"]}
# name → knobs; the reference has the layers of the paper's network
CONTENDERS = {"reference": {**PAPER, "model": "convlstm"}, "paper": PAPER, "my_model": {"model": "my_model"}}


def make_step(name, dtype, device, batch, horizon=10, training=True, fast=True):
    """A function that does one training step of a contender, or one forecast."""
    torch.manual_seed(0)
    model = main.build(replace(main.Knobs(), **CONTENDERS[name]), 1).to(device)
    attach(model, device, dtype, fast)
    autocast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    frames = torch.rand(batch, 20, 1, 64, 64, device=device)
    dense = {"predict_from": 4} if horizon < 10 else {}

    def step():
        with torch.inference_mode(not training), autocast:
            logits = model(frames[:, : 20 - horizon], horizon, **dense).float()
        if training:
            F.binary_cross_entropy_with_logits(logits, frames[:, -logits.shape[1] :]).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def take_turns(functions, rounds, device):
    """name → median seconds of a call. Every round calls each function once; one more round warms up."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


class Convolutions(TorchDispatchMode):
    """Notes all convolutions, with their arguments."""

    calls = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += ((function, args),) if "convolution" in str(function) else ()
        return function(*args, **(kwargs or {}))


def default_steps(horizon, dtype):
    """name → a function: a training step of the default network, and parts or variants of it."""
    from support.fast import symmetric  # here, so that the rest runs without support/fast

    options = "my_model", dtype, torch.device("cpu"), 8, horizon
    step, plain = make_step(*options), make_step(*options, fast=False)

    def without_symmetry():
        with mock.patch.object(symmetric, "find", lambda *_: None):
            step()

    with Convolutions() as noted:
        plain()
    bare = lambda: [function(*arguments) for function, arguments in noted.calls]
    return {"step": step, "step without symmetry": without_symmetry, "bare convolutions": bare}


def bench(rounds: int = 5, batch: int = 16, forecasts: tuple[int, ...] = (1, 64)):
    """Time training steps of `batch` sequences, and forecasts of so many at once; the median of `rounds`."""
    cuda = torch.cuda.is_available()
    device, dtype, _ = choose_device("cuda" if cuda else "cpu", "auto")
    dtypes = {"fp32": torch.float32} | ({"bf16": dtype} if dtype == torch.bfloat16 else {})
    machine = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    facts = {"machine": f"{platform.system()} {machine}", "threads": torch.get_num_threads()}
    facts |= {"torch": torch.__version__, "rounds": rounds, "rows": []}
    print("{machine}, {threads} threads, torch {torch}".format(**facts))

    def table(work, n, functions, first):
        medians = take_turns(functions, rounds, device)
        for name, seconds in medians.items():
            facts["rows"].append({"work": work, "batch": n, "name": name, "seconds": seconds})
            speed = f"{seconds * 1e3:9.1f} ms{n / seconds:9.1f} sequences/s"
            print(f"{work:19}{n:3}  {name:28}{speed}{seconds / medians[first]:9.2f} of the time of {first}")

    for work, n in ("training step", batch), *(("forecast", n) for n in forecasts):
        pairs = [(label, d, name) for label, d in dtypes.items() for name in CONTENDERS]
        train = work == "training step"
        steps = {f"{name}, {label}": make_step(name, d, device, n, 10, train) for label, d, name in pairs}
        table(work, n, steps, "reference, fp32")
    has_fast = not cuda and Path(__file__).with_name("fast").exists()
    for label, d, horizon in [(*item, h) for item in dtypes.items() for h in (1, 10)] if has_fast else ():
        steps = {f"{name}, {label}": step for name, step in default_steps(horizon, d).items()}
        table(f"default, horizon {horizon}", 8, steps, f"bare convolutions, {label}")
    Path("bench.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    tyro.cli(bench)
