"""Runs main.py in this process's children, kills them with SIGKILL at random moments, and lets the last one end.

    python tests/killer.py KILLS array|fresh [flags of main.py]

Prints how many children were still at work when they were killed. Forking saves importing torch each time.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import main
from knobs import parse
from moving_mnist import FreshMovingMNIST, MovingMNIST


def small_fresh_data(knobs):
    """As main.load_data for data="fresh", with few digits and sequences."""
    digits = np.zeros((6, 28, 28), np.uint8)
    for k, digit in enumerate(digits):
        digit[4 : 24 - k, 4 + 2 * k : 24] = 255 - 20 * k
    training, validation = FreshMovingMNIST(digits, 46, knobs.seed), FreshMovingMNIST(digits, 5, 2**40)
    test = MovingMNIST(validation[np.arange(5)].numpy().swapaxes(0, 1), "all")
    return training, validation, test, "fresh squares"


def child(knobs):
    """The process number of a run of its own."""
    number = os.fork()
    if number == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        main.main(knobs)
        os._exit(0)
    return number


def killed(number):
    """Whether it was at work until SIGKILL came."""
    os.kill(number, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(number, 0)[1])


if __name__ == "__main__":
    kills, data, *arguments = sys.argv[1:]
    if data == "fresh":
        main.load_data = small_fresh_data
        main.beyond.beyond, main.beyond.table = lambda *args: {}, str  # it does not depend on the data
    knobs, rng = parse(main.Knobs, arguments), random.Random(0)
    start = time.monotonic()
    alone = child(parse(main.Knobs, [*arguments, "--out", f"{knobs.out}/alone"]))
    assert os.waitpid(alone, 0)[1] == 0, "the run fails even when it is left alone"
    takes, at_work = time.monotonic() - start, 0
    for _ in range(int(kills)):
        victim = child(knobs)
        time.sleep(rng.random() * takes / 2)
        at_work += killed(victim)
    assert os.waitpid(child(knobs), 0)[1] == 0, "the run cannot go on"
    print(at_work)
