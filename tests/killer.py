"""Runs main.py in this process's children, kills them with SIGKILL, and lets the last one end.

    python tests/killer.py KILLS|PLACES array|fresh [flags of main.py]

KILLS: how many, at random moments. PLACES, with commas between, a child for each: the name of a file, of
which half is written; "evaluation". Of pictures, KILLS draws only the animation; PLACES draws all, in a low
resolution. A first run, in OUT/alone, is not killed. Prints how many died at work.
"""

import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import figures
import main
import metrics
from moving_mnist import Data, FreshMovingMNIST, MovingMNIST
from support import checkpoint, prepare, progress


def small_fresh_data(kind, train_sequences, seed):
    """As moving_mnist_data for "fresh", with few digits and sequences."""
    digits = np.zeros((2, 28, 28), np.uint8)
    digits[0, 4:24, 4:24], digits[1, 9:20, 2:26] = 255, 150
    training, validation = FreshMovingMNIST(digits, train_sequences, seed), FreshMovingMNIST(digits, 5, 2**40)
    test = MovingMNIST(validation[np.arange(5)].numpy().swapaxes(0, 1), "all")
    return Data(training, validation, test, "fresh squares")


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(place):
    """This process will die in the validation's cross-entropy, or when half of that file is written."""
    if place == "evaluation":
        metrics.cross_entropy_per_sequence = die
    whole = checkpoint.open_atomic

    @contextmanager
    def half(path):
        with whole(path) as out:
            write = lambda content: (out.write(content[: len(content) // 2]), out.flush(), die())
            yield SimpleNamespace(write=write) if path.name == place else out

    checkpoint.open_atomic = half


def child(knobs, place=None):
    if (number := os.fork()) == 0:
        die_in(place)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(2)
        main.main(knobs)
        os._exit(0)
    return number


def killed(number, seconds):
    """Whether it was at work until SIGKILL came, after so many seconds of the processor."""
    while time.clock_gettime(~number << 3 | 2) < seconds:  # Linux's clock of another process
        if os.waitpid(number, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(number, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(number, 0)[1])


if __name__ == "__main__":
    kills, data, *arguments = sys.argv[1:]
    knobs, rng, at_work = main.parse(arguments), random.Random(0), 0
    if data == "fresh":
        prepare.moving_mnist_data = small_fresh_data
    progress.SAVE_EVERY = -1  # a checkpoint after each step
    figures.DPI = 30
    for name in ("loss", "per_frame", "prediction", "grid", "compare") if kills.isdigit() else ():
        setattr(figures, name, lambda *_, **__: b"")
    torch.set_num_threads(1)  # a child may not inherit threads
    dtype = torch.bfloat16 if knobs.precision == "bf16" else torch.float32
    prepare.attach(main.build(knobs, 1), torch.device("cpu"), dtype)  # builds C once, for all children
    _, status, used = os.wait4(child(replace(knobs, out=f"{knobs.out}/alone")), 0)
    assert status == 0, "the run fails even when it is left alone"
    for _ in range(int(kills) if kills.isdigit() else 0):
        at_work += killed(child(knobs), rng.random() * (used.ru_utime + used.ru_stime) / 3)
    for place in [] if kills.isdigit() else kills.split(","):
        at_work += os.WIFSIGNALED(os.waitpid(child(knobs, place), 0)[1])
    assert os.waitpid(child(knobs), 0)[1] == 0, "the run cannot go on"
    print(at_work)
