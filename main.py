"""Train a ConvLSTM encoder-forecaster on Moving MNIST, draw its forecasts, and score them on the test split.

    python main.py                                   train (or go on where it stopped), evaluate, draw
    python main.py --epochs 20 --hidden 128,64,64    any knob below is a flag
    torchrun --standalone --nproc_per_node=2 main.py several processes, the same result up to rounding

Everything lands in results/<model>/. Frames are (B, T, C, H, W): batch, time, channels, height, width.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import convlstm
import download
import figures
from evaluate import (
    BASELINES,
    CROSS_ENTROPY,
    RANK,
    WORLD,
    cut,
    draw,
    evaluate,
    forecaster,
    sum_over_processes,
    table,
    test,
    write_results,
)
from fast_convlstm import compiled
from moving_mnist import DataError, FreshMovingMNIST, MovingMNIST, augment
from my_model import EncoderForecaster


def knob(default, text, at_least=None, at_most=None, choices=None):
    """A field of Knobs with what its flag has to say of it."""
    return field(default=default, metadata={"text": text, "least": at_least, "most": at_most, "choices": choices})


@dataclass(frozen=True)
class Knobs:
    """The experiment. Edit a default here, or set it for one run by a flag: python main.py --epochs 20"""

    # data
    data: str = knob("array", "array (the official npy), fresh (new sequences all the time), or your own .npy's path")
    train_sequences: int = knob(0, "use only so many training sequences; 0 = all", 0)
    frames_in: int = knob(10, "frames the model sees", 2)
    frames_out: int = knob(10, "frames it forecasts and is scored on", 1)
    augment: bool = knob(True, "flip, transpose and reverse training sequences; the motion law stays the same")
    # model
    model: str = knob("my_model", "the network; convlstm and seq2seq are the references",
                      choices=("my_model", "convlstm", "seq2seq"))  # fmt: skip
    hidden: tuple[int, ...] = knob((64, 64, 64), "hidden channels of each layer, bottom to top; the paper's: 128,64,64")
    kernel_size: int = knob(3, "input-to-state kernel, odd; the paper's: 5", 1)
    state_kernel_size: int = knob(0, "state-to-state kernel, odd; 0 = the same", 0)
    patch: int = knob(4, "pixels a side of a patch, one position of the states", 1)
    peephole: bool = knob(True, "let the gates see the cell state")
    head: int = knob(128, "channels of a hidden layer before the frames; 0 = none, as in the paper", 0)
    dense: bool = knob(True, "while the horizon is short, score the frame after each input frame as well")
    # optimisation
    epochs: int = knob(4, "passes over the training sequences", 1)
    max_minutes: float = knob(0.0, "train for so many minutes instead of epochs; 0 = off", 0, 1e6)
    batch_size: int = knob(8, "sequences a step, over all processes together", 1)
    learning_rate: float = knob(0.02, "Muon's, for the convolution kernels; AdamW takes 1/20 of it for the rest", 1e-9)
    warmup: float = knob(
        0.05, "part of training in which the learning rate rises; then it falls, a cosine to zero", 0, 1
    )
    short_horizon: int = knob(3, "forecast frames trained on at first, as near frames teach motion; 0 = always all", 0)
    short_until: float = knob(0.45, "part of training with the short horizon", 0, 1)
    clip: float = knob(1.0, "largest gradient norm", 1e-9)
    # evaluation and output
    out: str = knob("results", "folder; each model has its own in it")
    eval_only: bool = knob(False, "evaluate the best weights and draw, train nothing")
    save_minutes: float = knob(2.0, "minutes between checkpoints inside an epoch", 0, 1e6)
    # system
    seed: int = knob(0, "of weights, order and augmentation", 0, 2**63 - 1)
    device: str = knob("auto", "what to compute on", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = knob("auto", "auto: bf16 where the hardware multiplies it", choices=("auto", "bf16", "fp32"))


FIRST_LOOK = 50  # steps to the first evaluation and pictures: seconds, on most machines
ADAM_PART = 1 / 20  # AdamW's learning rate, as a part of Muon's
NOT_THE_EXPERIMENT = {"out", "eval_only", "save_minutes"}  # may change when a run goes on


def parse(arguments):
    """The Knobs that the command line asks for; a sentence and exit status 2 for what it cannot mean."""

    def boolean(text):
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"

    def integers(text):
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    for f in dataclasses.fields(Knobs):
        kind = {bool: boolean, tuple[int, ...]: integers}.get(f.type, f.type)
        metavar = {bool: "true|false", tuple[int, ...]: "N,N,…"}.get(f.type, f.type.__name__.upper())
        metavar = None if f.metadata["choices"] else metavar
        parser.add_argument(f"--{f.name}", type=kind, default=f.default, metavar=metavar, help=f.metadata["text"],
                            choices=f.metadata["choices"])  # fmt: skip
    knobs = Knobs(**vars(parser.parse_args(arguments)))
    for f in dataclasses.fields(Knobs):
        value, least, most = getattr(knobs, f.name), f.metadata["least"], f.metadata["most"]
        if (least is not None and not value >= least) or (most is not None and not value <= most) or value == math.inf:
            limits = f"at least {least}" if most is None else f"from {least} to {most}"
            parser.error(f"{f.name} is {value}; it must be {limits}")
    if min(knobs.hidden) < 1:
        parser.error(f"hidden is {knobs.hidden}; give each layer at least one channel")
    return knobs


def choose_device(knobs):
    """(device, autocast context factory, a few words on the precision and why)."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = found if knobs.device == "auto" else knobs.device
    if kind not in ("cpu", found):
        raise DataError(f"device is {kind!r}, but this torch finds only {found}; set device to auto or {found}")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        capability = torch.cuda.get_device_capability()
        native, why = capability >= (8, 0), f"compute capability {capability[0]}.{capability[1]}"
    elif kind == "mps":
        native, why = False, "mps"
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()  # where this torch tells
        masked = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ("AVX2", "AVX512_CORE", "SSE41", "AVX")
        units = [name.upper().replace("_", "-") for name in ("amx_bf16", "avx512_bf16") if has.get(name)]
        native, why = bool(units) and not masked, units[0] if units and not masked else "no bf16 unit"
    bf16 = native if knobs.precision == "auto" else knobs.precision == "bf16"
    autocast = (lambda: torch.autocast(device.type, torch.bfloat16)) if bf16 else nullcontext
    why = why if knobs.precision == "auto" else "chosen by knob"
    return device, autocast, f"{'bf16' if bf16 else 'fp32'} ({why})"


def load_data(knobs):
    """(training, validation, test, name of the data for every output)."""
    if knobs.data not in ("array", "fresh"):
        path, name = Path(knobs.data), Path(knobs.data).name
    elif (path := Path("raw/mnist_test_seq.npy")).exists():
        name = "Moving MNIST array"
    else:
        path, name = Path("raw/moving_mnist_standin.npy"), "stand-in array"
        if path.exists() and not Path("raw/mnist_test_seq.npy.gz").exists():
            say("raw/mnist_test_seq.npy is not there: using the stand-in (python download.py fetches the real one)")
        else:
            try:
                path, name = download.moving_mnist_array(), "Moving MNIST array"
            except download.DownloadError as error:
                say(f"{error}\ngoing on with a stand-in array: the same law, the digits of raw/digits_*.png")
                download.stand_in()
    if knobs.data != "fresh":
        training = MovingMNIST(path, "train", knobs.train_sequences)
        return training, MovingMNIST(path, "validation"), MovingMNIST(path, "test"), name
    try:
        digits = download.mnist_digits()
    except download.DownloadError as error:
        say(f"{error}\ngoing on with the 10,000 training digits of raw/digits_train.png")
        digits = download.digit_sheet("raw/digits_train.png")
    held_out = len(digits) // 12  # for validation: digits that no training sequence shows
    training = FreshMovingMNIST(digits[held_out:], knobs.train_sequences or 10_000, knobs.seed)
    validation = FreshMovingMNIST(digits[:held_out], 900, 2**40)  # a seed of its own
    # of the official array, all sequences: training has seen none. The stand-in has its training digits in the rest
    test_split = MovingMNIST(path, "test" if name == "stand-in array" else "all")
    return training, validation, test_split, f"{name}, trained on fresh sequences of {len(digits):,} digits"


def from_rank_0(value):
    """The value that the first process has."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def say(*words):
    if RANK == 0:
        print(*words, flush=True)


def build(knobs, channels):
    """The model that the knobs ask for: past frames in [0, 1] and a number → logits of that many future frames."""
    if knobs.model == "my_model":
        kernels = knobs.kernel_size, knobs.state_kernel_size or None
        return EncoderForecaster(channels, knobs.hidden, *kernels, knobs.patch, knobs.peephole, knobs.head, knobs.dense)
    if knobs.model == "convlstm":
        return convlstm.ConvLSTMForecaster(channels, knobs.hidden, knobs.kernel_size, knobs.patch)
    return convlstm.Seq2SeqForecaster(channels, 64)


class Muon(torch.optim.Muon):
    """torch's Muon on convolution kernels: each is one matrix, (output channels, everything else)."""

    def __init__(self, kernels, **options):
        self.kernels = list(kernels)
        matrices = [torch.nn.Parameter(k.detach().flatten(1)) for k in self.kernels]
        assert all(
            m.data_ptr() == k.data_ptr() for m, k in zip(matrices, self.kernels, strict=True)
        )  # views, no copies
        super().__init__(matrices, **options)

    @torch.no_grad()
    def step(self):
        for matrix, kernel in zip(self.param_groups[0]["params"], self.kernels, strict=True):
            matrix.grad = kernel.grad.flatten(1)
        super().step()


def make_optimisers(model, knobs):
    """Muon for the kernels; AdamW for the rest: biases, peepholes and the layer that draws the pixels."""
    *kernels, output = [p for p in model.parameters() if p.ndim >= 4]
    rest = [p for p in model.parameters() if p.ndim < 4] + [output]
    assert sum(p.numel() for p in (*kernels, *rest)) == sum(p.numel() for p in model.parameters())
    return [
        Muon(kernels, lr=1.0, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=0.05, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(knobs, progress):
    """At a progress in [0, 1): linear warm-up, then a cosine to zero."""
    if progress < knobs.warmup:
        return knobs.learning_rate * progress / knobs.warmup
    return knobs.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - knobs.warmup) / (1 - knobs.warmup)))


def horizon(knobs, progress):
    """Forecast frames trained on at this progress."""
    short = knobs.short_horizon and progress < knobs.short_until
    return min(knobs.short_horizon, knobs.frames_out) if short else knobs.frames_out


class Setup(NamedTuple):
    """What stays the same during a run."""

    knobs: Knobs
    folder: Path
    data: str  # its name, for every output
    training: MovingMNIST | FreshMovingMNIST
    validation: MovingMNIST | FreshMovingMNIST
    device: torch.device
    autocast: Callable
    forecast: Callable


def describe(setup, facts):
    """config.json, and the two files that say what was run, as they were."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        facts["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        facts["commit"] = None  # a copy without its history
    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    facts = {
        **dataclasses.asdict(setup.knobs),
        **facts,
        **versions,
        "machine": f"{platform.system()} {platform.machine()}",
    }
    checkpoint.publish(setup.folder / "config.json", json.dumps(facts, indent=1).encode())
    for source in ("main.py", "my_model.py"):
        checkpoint.publish(setup.folder / source, Path(__file__).with_name(source).read_bytes())


def mean_frames(knobs, start):
    """Frames that a step unrolls, and so what it costs: the mean from this progress to the end of training."""
    return knobs.frames_in + np.mean([horizon(knobs, progress) for progress in np.linspace(start, 1, 1000)])


def announce_pace(run, seconds_a_step, knobs, bar):
    """After a few steps: settle how many steps max_minutes buys, and say how long the rest will take here."""
    progress = run["step"] / run["steps"] if run["steps"] else 0.0
    seconds_a_frame = seconds_a_step / (knobs.frames_in + horizon(knobs, progress))
    if not run["steps"]:
        steps = int(knobs.max_minutes * 60 / (seconds_a_frame * mean_frames(knobs, 0.0)))
        run["steps"] = bar.total = from_rank_0(max(run["step"], steps))
    minutes = (run["steps"] - run["step"]) * seconds_a_frame * mean_frames(knobs, progress) / 60
    if RANK == 0:
        bar.write(f"pace      {knobs.batch_size / seconds_a_step:.0f} sequences/s: {run['steps']:,} steps of "
                  f"{knobs.batch_size} will take about {minutes:.0f} min, plus evaluations\n"
                  f"step {run['step']:<5} train loss {run['loss_sum'] / run['loss_count']:.4f}")  # fmt: skip


def conclude(setup, run, scores, rate, speed, model):
    """Log the evaluation, keep the weights if they are the best so far, and redraw every picture."""
    knobs, folder, history = setup.knobs, setup.folder, run["history"]
    mse, baselines = scores["mse_per_frame"], {who: float(np.mean(c)) for who, c in run["baselines"].items()}
    pixels = setup.validation[np.arange(1)][0, : knobs.frames_out].numel()
    seen = run["step"] * knobs.batch_size
    row = {
        "data": setup.data,
        "epoch": round(run["step"] / run["steps_per_epoch"], 3),
        "step": run["step"],
        "sequences": seen,
        "learning_rate": rate,
        "train_loss": run["loss_sum"] / run["loss_count"],
        "val_loss": float(scores[CROSS_ENTROPY]) / pixels,
        "val_mse_per_frame": float(mse.mean()),
        **{f"val_mse_{who}": value for who, value in baselines.items()},
    }
    history.append(row)
    minutes = round(run["seconds"] / 60, 3)  # apart from the log, which is the same whenever the run is repeated
    run["timing"].append({"step": run["step"], "minutes": minutes, "sequences_per_second": round(speed, 1)})
    tqdm.write(f"epoch {row['epoch']:<5g} train loss {row['train_loss']:.4f}, validation loss {row['val_loss']:.4f}, "
               f"MSE {row['val_mse_per_frame']:6.1f} (black {baselines['black']:.1f}, last frame copied "
               f"{baselines['copy_last']:.1f})  {speed:.0f} sequences/s")  # fmt: skip
    if row["val_mse_per_frame"] < run["best"]:
        run["best"] = row["val_mse_per_frame"]
        best = {"knobs": run["knobs"], "step": run["step"], "val_mse_per_frame": run["best"]}
        checkpoint.save(folder / "best.pt", {**best, "model": model.state_dict()})
    write_csv(folder / "log.csv", history)
    write_csv(folder / "timing.csv", run["timing"])
    figures.loss(folder / "loss.png", history, baselines, f"{knobs.model}, {setup.data}")
    curves = {knobs.model: mse.tolist(), **run["baselines"]}
    figures.per_frame(folder / "per_frame.png", curves, f"validation split of the {setup.data}")
    show(setup, f"{setup.data}, after {seen:,} training sequences")


def show(setup, title):
    knobs = setup.knobs
    draw(setup.folder, setup.forecast, setup.validation, knobs.frames_in, knobs.frames_out, setup.device, title)


def load_weights(model, weights, path):
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        sentence = f"{path} holds other weights than the model has: my_model.py or convlstm.py has changed since. "
        raise checkpoint.CheckpointError(sentence + "Undo the change, or set out to another folder") from error


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.publish(path, text.getvalue().encode())


def train(setup, run, model, optimisers):
    """From run["step"] to run["steps"]; run is what a checkpoint holds beside the weights and the optimisers."""
    knobs, device, steps_per_epoch = setup.knobs, setup.device, run["steps_per_epoch"]
    net = torch.nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    order, first_step, saved, pace = None, run["step"], time.perf_counter(), 0.0
    timed_from, seconds_before = run["step"], run["seconds"]
    bar = tqdm(total=run["steps"] or None, initial=first_step, unit="step", disable=RANK != 0, leave=False)
    while run["step"] < run["steps"] or not run["steps"]:
        step, tick = run["step"], time.perf_counter()
        epoch, k = divmod(step, steps_per_epoch)
        if k == 0 or order is None:
            order = np.random.default_rng((knobs.seed, epoch, 1)).permutation(len(setup.training))
            setup.training.start_epoch(epoch)
        progress = (step + 0.5) / run["steps"] if run["steps"] else knobs.warmup / 10  # until the steps are settled
        rate = learning_rate(knobs, progress)
        for optimiser, part in zip(optimisers, (1, ADAM_PART), strict=True):
            optimiser.param_groups[0]["lr"] = part * rate

        index = order[k * knobs.batch_size :][: knobs.batch_size]
        frames = setup.training[index[RANK::WORLD]]
        if knobs.augment:
            draws = np.random.default_rng((knobs.seed, step, 2)).integers(2, size=(len(index), 4))
            frames = augment(frames, draws[RANK::WORLD].astype(bool))
        n_future = horizon(knobs, progress)
        model.dense = knobs.dense and n_future < knobs.frames_out
        past, future = cut(frames, knobs.frames_in, n_future, device)

        net.train()
        with setup.autocast():
            logits = net(past, n_future).float()
        truth = torch.cat((past, future), 1)[:, -logits.shape[1] :]  # as many of the last frames as were drawn
        # the mean over the whole batch, though each process has a part of it
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / (truth[0].numel() * len(index))
        (loss * WORLD).backward()  # as DistributedDataParallel averages the gradients over the processes
        assert all(p.grad is not None for p in model.parameters())
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), knobs.clip))
        loss = float(sum_over_processes(loss.detach(), device))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"loss {loss} and gradient norm {norm} in epoch {epoch + 1}, step {step + 1}, at learning rate "
                f"{rate:.4g}; the last checkpoint is intact: go on from it with a lower learning_rate"
            )
        for optimiser in optimisers:
            optimiser.step()
        model.zero_grad()

        run["step"] += 1
        run["loss_sum"] += loss
        run["loss_count"] += 1
        bar.update()
        bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        seconds = time.perf_counter() - tick
        run["seconds"] += seconds
        if 3 <= step - first_step < 13:  # the first are slower
            pace += seconds / 10
        if step - first_step == 12:
            announce_pace(run, pace, knobs, bar)
        if run["step"] % steps_per_epoch == 0 or run["step"] in (FIRST_LOOK, run["steps"]):
            speed = (run["step"] - timed_from) * knobs.batch_size / (run["seconds"] - seconds_before)
            names = ("mse_per_frame", CROSS_ENTROPY)
            try:
                scores = evaluate(setup.forecast, setup.validation, knobs.frames_in, knobs.frames_out, names, device)
            except ValueError as error:  # the loss was finite, the weights after it are not
                raise FloatingPointError(
                    f"after step {run['step']}, at learning rate {rate:.4g}: {error}; the last checkpoint is intact: "
                    "go on from it with a lower learning_rate"
                ) from error
            if RANK == 0:
                conclude(setup, run, scores, rate, speed, model)
            run["loss_sum"], run["loss_count"], saved = 0.0, 0, -math.inf
            timed_from, seconds_before = run["step"], run["seconds"]
        if RANK == 0 and time.perf_counter() - saved > 60 * knobs.save_minutes:
            state = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers]}
            checkpoint.save(setup.folder / "last.pt", {**run, **state})
            saved = time.perf_counter()
    bar.close()


def main(knobs):
    device, autocast, precision = choose_device(knobs)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    folder = Path(knobs.out) / knobs.model
    if RANK == 0:
        folder, _held = checkpoint.claim(knobs.out, knobs.model)
    training, validation, test_split, data = load_data(knobs)
    if from_rank_0(data) != data:
        raise DataError(
            f"this process has the {data}, the first another; put the same array into raw/ on every machine"
        )
    n_frames, channels, height, width = training[np.arange(1)].shape[1:]
    if n_frames < knobs.frames_in + knobs.frames_out:
        raise DataError(f"{data} has {n_frames} frames a sequence, too few for frames_in {knobs.frames_in} "
                        f"and frames_out {knobs.frames_out}")  # fmt: skip
    if min(height, width) < 12:
        raise DataError(f"frames are {height}×{width}; SSIM, with its 11×11 window, and optical flow need 12×12")
    if not WORLD <= knobs.batch_size <= len(training):
        raise DataError(f"batch_size is {knobs.batch_size}; it must be from {WORLD} (processes) to "
                        f"{len(training)} (training sequences)")  # fmt: skip

    torch.manual_seed(knobs.seed)
    try:  # a dry run on one sequence: a knob that does not fit the model or the data is refused here
        model = build(knobs, channels)
        with torch.no_grad():
            model(cut(training[np.arange(1)], knobs.frames_in, 0)[0], 1)
    except ValueError as error:
        raise DataError(str(error)) from error
    model.to(device)
    optimisers = make_optimisers(model, knobs)
    described = {**dataclasses.asdict(knobs), "data": f"{knobs.data} ({data})"}
    state = from_rank_0(checkpoint.resume(folder / "last.pt", described, NOT_THE_EXPERIMENT) if RANK == 0 else None)
    steps_per_epoch = len(training) // knobs.batch_size
    steps = 0 if knobs.max_minutes else knobs.epochs * steps_per_epoch  # 0: not settled yet
    run = {"knobs": described, "step": 0, "steps": steps, "steps_per_epoch": steps_per_epoch, "best": math.inf,
           "history": [], "timing": [], "baselines": {}, "loss_sum": 0.0, "loss_count": 0, "seconds": 0.0}  # fmt: skip
    if state:
        load_weights(model, state.pop("model"), folder / "last.pt")
        for optimiser, saved in zip(optimisers, state.pop("optimisers"), strict=True):
            optimiser.load_state_dict(saved)
        run = {**state, "knobs": described, "steps": state["steps"] or steps}
    finished = run["step"] >= run["steps"] > 0
    parameters = sum(p.numel() for p in model.parameters())
    threads, processes = torch.get_num_threads(), "1 process" if WORLD == 1 else f"{WORLD} processes"
    say(f"model     {knobs.model}, {parameters:,} parameters")
    say(f"device    {device}, {processes}, {threads} threads, {precision}, torch {torch.__version__}")
    if device.type == "cpu" and knobs.model == "my_model" and not compiled("bf16" in precision):
        say("          no working C compiler: the gates take several times as long (gcc or clang will do)")
    say(f"data      {data}: {len(training):,} training, {len(validation):,} validation, {len(test_split):,} test")
    say(f"          sequences of {n_frames} frames, {channels}×{height}×{width}")
    if finished and (folder / "metrics.json").exists() and not knobs.eval_only:
        results = json.loads((folder / "metrics.json").read_text())
        say(f"this run has ended; nothing was changed\n\n{table(results)}\n\nweights   {results['weights']}")
        return

    span = knobs.frames_in, knobs.frames_out
    setup = Setup(knobs, folder, data, training, validation, device, autocast, forecaster(model, autocast))
    if not finished and not knobs.eval_only:
        for who in ("black", "copy_last"):
            if who not in run["baselines"]:
                curve = evaluate(BASELINES[who], validation, *span, ["mse_per_frame"], device)["mse_per_frame"]
                run["baselines"][who] = curve.tolist()
        levels = (f"{figures.LABELS[who]} {np.mean(curve):.1f}" for who, curve in run["baselines"].items())
        say(f"baselines {', '.join(levels)} (validation; squared error of a frame, summed over its pixels)")
        say(f"output    {folder}{os.sep}" + (f", going on at step {run['step']:,}" if run["step"] else ""))
        if RANK == 0:
            describe(setup, {"data_used": data, "device_used": str(device), "precision_used": precision,
                             "threads": threads, "processes": WORLD, "parameters": parameters})  # fmt: skip
        if RANK == 0:
            (folder / "metrics.json").unlink(missing_ok=True)  # scores of an earlier end are not this run's
        train(setup, run, model, optimisers)

    best = from_rank_0(checkpoint.load(folder / "best.pt") if RANK == 0 else None)
    load_weights(model, best["model"], folder / "best.pt")
    scores = test({knobs.model: setup.forecast}, test_split, *span, device)
    results = {"data": data, "split": "test", "sequences": len(test_split), "frames_out": knobs.frames_out,
               "step": best["step"], "weights": checkpoint.digest(model), "scores": scores}  # fmt: skip
    if RANK == 0:
        show(setup, f"{data}, best weights")
        write_results(folder, results)  # metrics.json comes last: where it is, everything is
    say(f"\n{table(results)}\n\nweights   {results['weights']}\npictures  {folder}{os.sep}")


def stop(signum, frame):
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    knobs = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        main(knobs)
        if WORLD > 1:
            dist.destroy_process_group()
    except (DataError, download.DownloadError, checkpoint.CheckpointError, FloatingPointError) as error:
        sys.exit(f"main.py{f', rank {RANK}' if WORLD > 1 else ''}: {error}")
    except (MemoryError, RuntimeError) as error:  # of which torch.OutOfMemoryError is one, but not on a CPU
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory")):
            raise
        sys.exit(f"main.py: out of memory at batch_size {knobs.batch_size}; lower it, hidden or frames_out. "
                 "The last checkpoint is intact")  # fmt: skip
    except SystemExit as status:
        if RANK == 0 and status.code in (130, 143):
            print(
                f"\nstopped; this goes on: {'python' if WORLD == 1 else 'torchrun …'} {' '.join(sys.argv)}",
                file=sys.stderr,
            )
        raise
