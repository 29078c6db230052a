"""Runs main.py in this process's children, which die, and lets the last one end.

    python tests/killer.py random|PLACES array|fresh [flags of main.py]

random: at random moments, until one ends. Of the pictures, only the animation is drawn. PLACES, with commas
between, a child for each: the name of a file, of which half is written; "evaluation". A first run, in
OUT/alone, is not killed. Prints how many died in a place, or at random after the first checkpoint.
"""

import os
import random
import signal
import sys
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


def child(knobs, place=None, moment=("main", 0)):
    """A run that is left alone, or dies in a place or at a moment.

    moment: a function of main.py, and how many seconds of the processor after its beginning. 0: never.
    """
    if (number := os.fork()) == 0:
        die_in(place)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(2)
        name, seconds = moment
        function = getattr(main, name)
        # the timer's signal ends a process as SIGKILL does
        timed = lambda *given: (signal.setitimer(signal.ITIMER_PROF, seconds), function(*given))
        setattr(main, name, timed)
        main.main(knobs)
        os._exit(0)
    return number


def warm_up(knobs):
    """Build C, and import what torch imports late, once for all children."""
    dtype = torch.bfloat16 if knobs.precision == "bf16" else torch.float32
    torch.set_num_threads(1)  # a child may not inherit threads
    model = main.build(knobs, 1)
    prepare.attach(model, torch.device("cpu"), dtype)
    main.make_optimizers(model, knobs, dtype)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        model(torch.rand(20, knobs.frames_in, 1, 32, 32), 2).float().mean().backward()


if __name__ == "__main__":
    places, data, *arguments = sys.argv[1:]
    knobs, rng, at_work = main.parse(arguments), random.Random(0), 0
    last = Path(knobs.out, knobs.model, "last.pt")
    if data == "fresh":
        prepare.moving_mnist_data = small_fresh_data
    progress.SAVE_EVERY = -1  # a checkpoint after each step
    figures.DPI = 30
    for name in ("loss", "per_frame", "prediction", "grid", "compare") if places == "random" else ():
        setattr(figures, name, lambda *_, **__: b"")
    warm_up(knobs)
    _, status, used = os.wait4(child(replace(knobs, out=f"{knobs.out}/alone")), 0)
    assert status == 0, "the run fails even when it is left alone"
    if places == "random":
        often = 8 / (used.ru_utime + used.ru_stime)
        moment = lambda: (rng.choice(("main", "train", "train")), rng.expovariate(often))
        while os.WIFSIGNALED(status := os.waitpid(child(knobs, moment=moment()), 0)[1]):
            at_work += last.exists()
    else:
        for place in places.split(","):
            at_work += os.WIFSIGNALED(os.waitpid(child(knobs, place), 0)[1])
        status = os.waitpid(child(knobs), 0)[1]
    assert status == 0, "the run cannot go on"
    print(at_work)
