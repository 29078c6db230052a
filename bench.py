"""How fast: my model against the reference on the same work, in one run, so that the ratios hold on any machine.

    python bench.py              prints the table and writes bench.json
    python bench.py --scaling    time and memory against batch, frames, size and hidden channels: scaling.json and .png

The work is the paper's network, 128-64-64 hidden, 5×5, patches of 4, on 10 + 10 frames of 64×64. Contenders take
turns, and the median of each is shown; compare ratios of one run, never seconds of two. The reference carries no
peepholes, and convolves zeros: its encoder's first hidden states and, in its forecaster's first layer, an input (144
channels for 128). All is done on an NVIDIA GPU where torch finds one (fp32 convolutions in TF32, torch's default
there), else on the CPU.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F

import figures
from convlstm import ConvLSTMForecaster
from machine import choose_device
from my_model import EncoderForecaster, twin_agrees

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAPER = {"hidden": (128, 64, 64), "kernel_size": 5, "patch": 4}


def bf16():
    return torch.autocast(DEVICE, torch.bfloat16)


def my_model(channels, **network):
    """As main.py builds it: without its fast twin where ConvLSTMCell was edited."""
    return EncoderForecaster(channels, **network, fast=twin_agrees())


CONTENDERS = {
    "reference, fp32": (ConvLSTMForecaster, nullcontext),
    "reference, bf16": (ConvLSTMForecaster, bf16),
    "my_model, fp32": (my_model, nullcontext),
    "my_model, bf16": (my_model, bf16),
}


def here():
    """Of the contenders, those of a precision that this machine multiplies."""
    native = choose_device(DEVICE, "auto")[1] == torch.bfloat16
    return [name for name in CONTENDERS if native or "bf16" not in name]


def step_of(name, batch, frames=10, size=64, training=True, **network):
    """A function that does one training step, or one forecast, of the named contender."""
    torch.manual_seed(0)
    build, autocast = CONTENDERS[name]
    model = build(1, **{**PAPER, **network}).to(DEVICE)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    past, future = torch.rand(2, batch, frames, 1, size, size, device=DEVICE)

    def forecast():
        with torch.inference_mode(), autocast():
            model(past, frames)

    def train():
        with autocast():
            logits = model(past, frames)
        F.binary_cross_entropy_with_logits(logits.float(), future).backward()
        optimiser.step()
        optimiser.zero_grad()

    return train if training else forecast


def take_turns(functions, rounds):
    """name → median seconds of a call; every round calls each once."""
    seconds = {name: [] for name in functions}
    for r in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if DEVICE == "cuda":  # which has only been told what to do
                torch.cuda.synchronize()
            if r > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bare_convolutions(batch, frames=10, size=16, hidden=(128, 64, 64), pixels=16, k=5, dtype=torch.bfloat16):
    """A function that does the convolutions of one training step's layers and nothing else: forward and both gradients,
    channels last, over all frames at once but for what has to go frame by frame, the state-to-state ones and the
    gradients of their data. Those of the encoder's zeros are left out, as my_model does on a CPU."""
    n_all, work = batch * frames, []

    def add(n_in, n, images, at_once, needs_dx=True):
        shape = ((images, n_in, size, size), (images, 4 * n, size, size), (4 * n, n_in, k, k))
        x, dz, w = (torch.randn(s).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last) for s in shape)
        work.append((x, dz, w, at_once, needs_dx))

    for first in (pixels, 0):  # encoder, forecaster
        for n_in, n in zip((first, *hidden[:-1]), hidden, strict=True):
            add(n, n, n_all - batch if first else n_all, batch)  # the encoder's first hidden state is zeros
            if n_in:
                add(n_in, n, n_all, n_all, needs_dx=n_in != pixels)

    def backward(dz, x, w, wanted):
        options = None, [1, 1], [k // 2] * 2, [1, 1], False, [0, 0], 1, wanted
        torch.ops.aten.convolution_backward(dz, x, w, *options)

    def step():
        for x, dz, w, at_once, needs_dx in work:
            for x_part, dz_part in zip(x.split(at_once), dz.split(at_once), strict=True):
                F.conv2d(x_part, w, padding=k // 2)
                if needs_dx:
                    backward(dz_part, x_part, w, (True, False, False))
            backward(dz, x, w, (False, True, False))

    return step


def peak_so_far():
    """Bytes of this process, or of its tensors on the GPU. Not Linux's ru_maxrss, which a child has from its parent."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(name, batch, **work):
    """Bytes that a training step of the contender needs at its peak, with weights, their gradients and Adam's moments:
    what a process of its own comes to hold beyond torch and the step of a tiny network."""
    tiny = {"frames": 1, "hidden": (1,)}
    code = (
        f"import bench; bench.step_of({name!r}, 1, **{work | tiny!r})(); a = bench.peak_so_far();"
        f"s = bench.step_of({name!r}, {batch}, **{work!r}); s(); s(); print(bench.peak_so_far() - a)"
    )
    run = {"check": True, "capture_output": True, "text": True, "cwd": Path(__file__).parent}
    return int(subprocess.run([sys.executable, "-c", code], **run).stdout)


def compare(rounds):
    batch, rows = 16, []
    memory = {name: peak_memory(name, batch) for name in here()}
    functions = {name: step_of(name, batch) for name in here()}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        if f"my_model, {name}" in functions:
            functions[f"bare convolutions, {name}"] = bare_convolutions(batch, dtype=dtype)
    for name, seconds in take_turns(functions, rounds).items():
        rows.append(
            {"work": "training step", "batch": batch, "name": name, "seconds": seconds, "bytes": memory.get(name)}
        )
    for batch in (1, 64):
        functions = {name: step_of(name, batch, training=False) for name in here()}
        for name, seconds in take_turns(functions, rounds).items():
            rows.append({"work": "forecast", "batch": batch, "name": name, "seconds": seconds, "bytes": None})
    return rows


def scaling(rounds):
    name = here()[-1]  # my_model, in bf16 where that is multiplied
    base = {"batch": 4, "frames": 10, "size": 64, "hidden": (64, 64, 64)}
    sweeps = {
        "batch": (2, 4, 8, 16),
        "frames": (5, 10, 20, 40),
        "size": (32, 64, 128, 256),
        "hidden": ((32,) * 3, (64,) * 3, (128,) * 3),
    }
    works = [
        {**base, knob: value, "grows": knob, "work": f"{knob} {value}"}
        for knob, values in sweeps.items()
        for value in values
    ]
    sizes = [{knob: work[knob] for knob in base} for work in works]
    memory = [peak_memory(name, **size) for size in sizes]
    seconds = [take_turns({name: step_of(name, **size)}, rounds)[name] for size in sizes]
    measured = zip(works, seconds, memory, strict=True)
    return [{**work, "name": name, "seconds": s, "bytes": m} for work, s, m in measured]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each contender (default 5)")
    parser.add_argument("--scaling", action="store_true", help="growth of my_model's training step instead")
    arguments = parser.parse_args()
    rows = scaling(arguments.rounds) if arguments.scaling else compare(arguments.rounds)
    if not twin_agrees():
        print("ConvLSTMCell and fast_convlstm.py differ: my_model is timed as the cell stands, without its fast twin")
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    versus = "" if arguments.scaling else f"{'of the first':>14}"
    print(f"{'work':18}{'batch':>6}  {'':26}{'ms':>9}{'sequences/s':>13}{'peak MiB':>10}{versus}")
    first = {}
    for row in rows:
        reference = first.setdefault((row["work"], row["batch"]), row["seconds"])
        memory = f"{row['bytes'] / 2**20:.0f}" if row["bytes"] else ""
        ratio = "" if arguments.scaling else f"{reference / row['seconds']:13.2f}x"
        print(f"{row['work']:18}{row['batch']:6}  {row['name']:26}{row['seconds'] * 1e3:9.1f}"
              f"{row['batch'] / row['seconds']:13.1f}{memory:>10}{ratio}")  # fmt: skip
    facts = {"machine": f"{platform.system()} {machine}", "threads": torch.get_num_threads(),
             "torch": torch.__version__, "rounds": arguments.rounds, "rows": rows}  # fmt: skip
    Path("scaling.json" if arguments.scaling else "bench.json").write_text(json.dumps(facts, indent=1))
    if arguments.scaling:
        figures.scaling(Path("scaling.png"), rows)


if __name__ == "__main__":
    main()
