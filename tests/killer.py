"""Runs main.py in this process's children, kills them with SIGKILL, and lets the last one end.

    python tests/killer.py KILLS array|fresh [flags of main.py]     at random moments, after a run left alone
    python tests/killer.py PLACES array|fresh [flags of main.py]    a child for each place, and it dies there

Places, with commas between: the name of a file, of which half is written; "evaluation". Prints how many children
were still at work when they were killed. Forking saves importing torch each time.
"""

import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import beyond
import checkpoint
import main
import metrics
from knobs import parse
from moving_mnist import FreshMovingMNIST, MovingMNIST


def small_fresh_data(knobs):
    """As download.load_data for data="fresh", with few digits and sequences."""
    digits = np.zeros((6, 28, 28), np.uint8)
    for k, digit in enumerate(digits):
        digit[4 : 24 - k, 4 + 2 * k : 24] = 255 - 20 * k
    training, validation = FreshMovingMNIST(digits, 46, knobs.seed), FreshMovingMNIST(digits, 5, 2**40)
    test = MovingMNIST(validation[np.arange(5)].numpy().swapaxes(0, 1), "all")
    return training, validation, test, "fresh squares"


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(place):
    """From now on, for this process: in the validation's cross-entropy, or when half of the named file is written."""
    if place == "evaluation":
        metrics.cross_entropy_per_sequence = die
    whole = checkpoint.replacing

    @contextmanager
    def half(path):
        def write(content):
            out.write(content[: len(content) // 2])
            out.flush()
            die()

        with whole(path) as out:
            yield SimpleNamespace(write=write, flush=out.flush, fileno=out.fileno) if path.name == place else out

    checkpoint.replacing = half


def child(knobs, place=None):
    """The process number of a run of its own."""
    number = os.fork()
    if number == 0:
        die_in(place)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        main.main(knobs)
        os._exit(0)
    return number


def killed(number, seconds):
    """Whether it was at work until SIGKILL came, after so many seconds of the processor, whatever else runs."""
    while time.clock_gettime(~number << 3 | 2) < seconds:  # Linux's clock of another process
        if os.waitpid(number, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(number, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(number, 0)[1])


if __name__ == "__main__":
    kills, data, *arguments = sys.argv[1:]
    if data == "fresh":
        main.load_data = small_fresh_data
        beyond.beyond, beyond.table = lambda *args: {}, str  # it does not depend on the data
    knobs, rng, at_work = parse(main.Knobs, arguments), random.Random(0), 0
    # this builds what is compiled once, for all children
    list(main.not_compiled(knobs, torch.bfloat16 if knobs.precision == "bf16" else torch.float32))
    if kills.isdigit():
        alone = child(parse(main.Knobs, [*arguments, "--out", f"{knobs.out}/alone"]))
        _, status, used = os.wait4(alone, 0)
        assert status == 0, "the run fails even when it is left alone"
        for _ in range(int(kills)):
            at_work += killed(child(knobs), rng.random() * (used.ru_utime + used.ru_stime) / 3)
    else:
        for place in kills.split(","):
            at_work += os.WIFSIGNALED(os.waitpid(child(knobs, place), 0)[1])
    assert os.waitpid(child(knobs), 0)[1] == 0, "the run cannot go on"
    print(at_work)
