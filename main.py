"""Train a ConvLSTM encoder-forecaster on Moving MNIST, plot its forecasts, and score them.

    python main.py                                        train or resume, then evaluate and plot
    python main.py --epochs 20 --hidden_channels 64 64    every knob below is also a flag
    python main.py --model paper                          the network of Shi et al. (2015), with our training
    python main.py --model plain                          the same network, trained plainly with Adam
    torchrun --nproc_per_node=2 main.py                   several processes

Each run has a folder in results/. Frames are (B, T, C, H, W): batch, time, channels, height, width.
"""

if __name__ == "__main__":
    from support import sources

    sources.begin()  # keeps a copy of the code, for the run's source/

import math
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import convlstm
import metrics
from moving_mnist import DROPOUT, ORDER, OVERLAYS
from my_model import EncoderForecaster
from support import UserError, flags, report
from support.devices import RANK, WORLD_SIZE, all_reduce, on_rank_0, run_script, to_device
from support.folders import run_folder
from support.muon import Muon
from support.prepare import load_model, prepare
from support.progress import Progress, load_best, resume, save
from support.scale import fill


@dataclass(frozen=True)
class Knobs:  # its docstring and comments are the text of --help; RECIPES below changes some values
    """Train a ConvLSTM encoder-forecaster on Moving MNIST or on your own data, and score its forecasts."""

    # Data
    data: str = "array"  # Moving MNIST: array, stand_in or fresh (new each epoch); or the path of your data
    train_sequences: int = 0  # training sequences; 0 = all (fresh: 10000 per epoch). Tried: 8 to 175000
    frames_in: int = 10  # input frames. Tried: 2 to 10
    frames_out: int = 10  # forecast frames. Tried: 2 to 40
    video: tuple[int, int, int, int] = (64, 64, 1, 1)  # videos, images: height, width, frame step, channels
    value_range: tuple[float, float] = (0, 0)  # lowest and highest value of your own data; 0 0 = automatic
    overlay: int = 2  # other sequences merged into each (pixelwise maximum) until forecasts have full length
    # Model
    model: Literal["my_model", "paper", "plain", "convlstm", "seq2seq"] = "my_model"  # plain: paper with Adam
    hidden_channels: tuple[int, ...] = (96, 96)  # of each ConvLSTM layer. Tried: 1 to 3 layers of 4 to 128
    kernel_size: int = 3  # of both convolutions of a cell, odd. Tried: 1 to 5
    patch_size: int = 4  # side of a patch in pixels; hidden states have one pixel per patch. Tried: 2 to 8
    head_channels: tuple[int, ...] = (128, 128)  # of the head's hidden layers. Tried: up to 512
    max_motion: int = 4  # largest motion of a patch, in pixels per frame; 0 = no block matching or advection
    equivariant: bool = True  # kernels that respect flips and transposition. Use multiples of 8 channels
    # Training
    epochs: int = 2  # passes over the training sequences. Tried: 1 to 28
    max_minutes: float = 0.0  # training time by the clock, instead of epochs; 0 = off. Tried: up to 150
    batch_size: int = 8  # sequences in a step, over all processes. Tried: 2 to 16
    learning_rate: float = 0.06  # of Muon; AdamW uses 1/20. Tried: 0.02 to 0.09. In plain: of Adam
    weight_decay: float = 0.03  # of Muon; long runs used 0.01. Tried: 0 to 0.3
    grow_horizon: tuple[float, float] = (0.4, 0.9)  # the forecast grows between these fractions of training
    ssim_from: float = 0.9  # 1 - SSIM joins the loss after this fraction of training; 1 = never
    # Output
    out: str = "results"  # folder of all runs
    name: str = ""  # this run's folder inside --out; empty = the name of the model or the weights
    eval_only: bool = False  # train nothing: score --weights, and plot their forecasts
    weights: str = ""  # a best.pt or last.pt to start from; it sets the knobs of the network
    # System
    seed: int = 0  # of weights, order, overlays, dropout and fresh sequences
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = a GPU if there is one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto = bf16 if the hardware has it
    fast: bool = True  # use fast code; --no_fast runs everything in plain PyTorch


# Other defaults for your own data and for `--model NAME`. A flag wins over both.
# Own data: overlays suit digits only, and few sequences need more weight decay.
RECIPES = {
    "own data": {"overlay": 0, "batch_size": 4, "weight_decay": 0.1},
    "paper": {
        "hidden_channels": (128, 64, 64),
        "kernel_size": 5,
        "head_channels": (),
        "max_motion": 0,
        "equivariant": False,
        "learning_rate": 0.04,
        "epochs": 3,
    },
    "convlstm": {"hidden_channels": (64, 64), "learning_rate": 0.04, "epochs": 5},  # of convlstm.py
    "seq2seq": {"learning_rate": 0.04, "epochs": 1},  # EncoderDecoderConvLSTM of convlstm.py
}
# the paper's network, trained plainly: with Adam, on all forecast frames from the start
RECIPES["plain"] = RECIPES["paper"] | {
    "learning_rate": 0.001,
    "grow_horizon": (0, 0),
    "overlay": 0,
    "ssim_from": 1,
}
WARMUP = 0.05  # part of training in which the learning rate rises
MAX_NORM = 1.0  # of the gradient
ADAMW_RATE = 1 / 20  # of Muon's


def build(knobs, channels):
    """A model: model(past, n), with past (B, T, C, H, W) in [0, 1], gives logits of the next n frames.

    Return a network of your own here, in place of my_model's. Choose its learning rate. If it has an
    `output_layer`, AdamW trains that. Dense targets (see `train`) are for EncoderForecaster only.
    """
    if knobs.model == "convlstm":
        options = knobs.hidden_channels, knobs.kernel_size, knobs.patch_size
        return convlstm.ConvLSTMForecaster(channels, *options)
    if knobs.model == "seq2seq":
        if channels != 1:
            raise UserError(f"seq2seq forecasts grey frames only; the data have {channels} channels")
        return convlstm.Seq2SeqForecaster(channels)
    additions = {} if knobs.model in ("paper", "plain") else {"dilation": 2, "feedback": True}
    return EncoderForecaster(
        channels,
        knobs.hidden_channels,
        knobs.kernel_size,
        patch_size=knobs.patch_size,
        head_channels=knobs.head_channels,
        max_motion=knobs.max_motion,
        equivariant=knobs.equivariant,
        **additions,
    )


def make_optimizers(model, knobs, dtype):
    """Muon for the kernels (four axes or more); AdamW for biases, peepholes and the output layer.

    For "plain", Adam for all. The learning rates given here are the highest. In training they follow
    `learning_rate_at`. dtype: of Muon's matrix products.
    """
    if knobs.model == "plain":
        return [torch.optim.Adam(model.parameters(), knobs.learning_rate)]
    output = id(model.output_layer.weight) if hasattr(model, "output_layer") else None
    kernels = [p for p in model.parameters() if p.ndim >= 4 and id(p) != output and p.requires_grad]
    rest = [p for p in model.parameters() if p.ndim < 4 or id(p) == output]
    adamw = torch.optim.AdamW(rest, ADAMW_RATE * knobs.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(kernels, dtype, knobs.learning_rate, knobs.weight_decay), adamw] if kernels else [adamw]


def learning_rate_at(knobs, fraction):
    """The learning rate after a fraction of training, in [0, 1): linear warm-up, then linear to zero."""
    if fraction < WARMUP:
        return knobs.learning_rate * fraction / WARMUP
    return knobs.learning_rate * (1 - fraction) / (1 - WARMUP)


def horizon_at(knobs, fraction, reads_more=False):
    """(input frames, forecast frames) of a training step: the horizon grows from 1 to frames_out.

    A short horizon teaches motion first. reads_more: while it is short, read more of the true frames (teacher
    forcing).
    """
    start, end = knobs.grow_horizon
    grown = 1 if fraction >= end else 0 if fraction < start else (fraction - start) / (end - start)
    n_future = 1 + int(grown * (knobs.frames_out - 1))
    longer = knobs.frames_out - n_future if reads_more else 0
    return knobs.frames_in + longer, n_future


def overlays_at(knobs, n_future):
    """How many other sequences are merged into each: fewer as the horizon grows, none when it is full."""
    fraction_left = (knobs.frames_out - n_future) / max(1, knobs.frames_out - 1)
    return math.ceil(knobs.overlay * fraction_left)


def load_batch(setup, step, n_past, n_future, n_overlays):
    """(past, future) in [0, 1], this process's share of a batch. NaN: a missing pixel, which `fill` replaces.

    ORDER and OVERLAYS keep the random streams apart.
    """
    knobs, training = setup.knobs, setup.data.training
    epoch, k = divmod(step, setup.steps_per_epoch)
    training.start_epoch(epoch)
    order = np.random.default_rng((knobs.seed, epoch, ORDER)).permutation(len(training))
    index = order[k * knobs.batch_size :][: knobs.batch_size]
    my_share = slice(RANK, None, WORLD_SIZE)
    frames = training[index[my_share]]
    # random numbers for the whole batch, so that the number of processes changes nothing
    rng = np.random.default_rng((knobs.seed, step, OVERLAYS))
    for others in rng.integers(len(training), size=(n_overlays, len(index))):
        frames = torch.maximum(frames, training[others[my_share]])
    frames = setup.data.scale.to_unit(to_device(frames[:, : n_past + n_future], setup.device))
    return frames[:, :n_past], frames[:, n_past:]


def without_missing(logits, truth):
    """Where a pixel of the truth is missing (NaN), a logit of −100 and a truth of 0: no loss, no gradient."""
    missing = truth.isnan()
    return logits.masked_fill(missing, -100), truth.masked_fill(missing, 0)


def ssim_loss(logits, truth):
    """1 - SSIM, as Zhao et al. (2017), https://arxiv.org/abs/1511.08861, use it.

    Where a digit may be in several places, the cross-entropy asks for grey in all, SSIM for white in one.
    """
    return 1 - metrics.similarity(torch.sigmoid(logits), truth).mean()


def train(setup, folder, progress, optimizers):
    """Train until the last step. Log, evaluate and save on the way.

    setup: knobs, data, model, device (support/prepare.py). progress: the step and the log.
    """
    knobs, model = setup.knobs, setup.model
    net = torch.nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    reads_more = knobs.model == "my_model" and isinstance(model, EncoderForecaster)
    bar = tqdm(total=progress.steps or None, initial=progress.step, disable=RANK > 0 or None, leave=False)
    while not progress.has_ended:
        began = time.perf_counter()
        rate = schedule(optimizers, knobs, progress.fraction)
        n_past, n_future = horizon_at(knobs, progress.fraction, reads_more)
        n_overlays = overlays_at(knobs, n_future)
        past, future = load_batch(setup, progress.step, n_past, n_future, n_overlays)
        # dense targets: while the input is longer, my_model forecasts its frames, too, once it has seen a few
        dense = {"predict_from": (knobs.frames_in - 1) // 2} if n_past > knobs.frames_in else {}

        seed_dropout(knobs.seed, progress.step)
        net.train()
        with setup.autocast():
            logits = net(fill(past), n_future, **dense).float()
        truth = torch.cat((past, future), 1)[:, -logits.shape[1] :]
        logits, truth = without_missing(logits, truth)
        n_values = truth[0].numel() * knobs.batch_size  # of the whole batch
        # this loss is smallest where the forecast equals the truth, also for values between 0 and 1
        cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / n_values
        loss = cross_entropy
        with_ssim = progress.fraction >= knobs.ssim_from
        if with_ssim:
            # with torchrun, each process adds the mean of its part, weighted by the size of the part
            loss = loss + ssim_loss(logits, truth) * len(truth) / knobs.batch_size
        (loss * WORLD_SIZE).backward()  # DistributedDataParallel averages gradients over the processes
        unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused, f"no gradient reaches {', '.join(unused)}; each step needs all parameters"
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        # the only GPU synchronization in a step, except for the clock of --max_minutes with torchrun
        value, norm = torch.stack((all_reduce(cross_entropy.detach(), setup.device), norm)).tolist()
        if not math.isfinite(value + norm):
            raise progress.diverged(f"loss {value} and gradient norm {norm}", rate, progress.step)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

        # of this step, for log.csv and loss.png; add your own
        numbers = {"forecast_frames": n_future, "overlays": n_overlays, "SSIM_in_loss": with_ssim}
        progress.count_step(value, rate, numbers, time.perf_counter() - began)
        bar.update()
        if progress.evaluation_due():
            report.evaluate(setup, folder, progress)
        if progress.save_due():
            save(folder, setup, progress, optimizers)
    bar.close()


def schedule(optimizers, knobs, fraction):
    """Set the learning rates. Returns that of the first group of parameters, for the log."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        highest = group.setdefault("initial_lr", float(group["lr"]))  # checkpoints keep it
        # each keeps its ratio to Muon's; an edited schedule may return a tensor
        group["lr"] = highest / knobs.learning_rate * float(learning_rate_at(knobs, fraction))
    return groups[0]["lr"]


def seed_dropout(seed, step):
    """Seed dropout, or any other noise that you add, by seed, step and process."""
    (state,) = np.random.SeedSequence((seed, step, RANK, DROPOUT)).generate_state(1, np.uint64)
    torch.manual_seed(int(state))


def load(path):
    """The model of a checkpoint. Its forecast(past, n) and other attributes: see support/prepare.py."""
    return load_model(path, Knobs(), build)


def main(knobs):
    setup = prepare(knobs, build)
    with run_folder(setup) as folder:
        if knobs.eval_only:
            report.finish(setup, folder, setup.scored_step)
            return
        results, is_outdated = on_rank_0(report.read_results, folder)
        if results is None:  # not scored yet
            optimizers = make_optimizers(setup.model, knobs, setup.dtype)
            progress = resume(folder, setup, Progress.start(setup), optimizers)
            train(setup, folder, progress, optimizers)
        if results is None or is_outdated:
            best_step = load_best(folder, setup.model)
            report.finish(setup, folder, best_step)
        else:
            report.show(setup, folder, results)


def parse(arguments):
    """The knobs of a command line."""
    return flags.parse(arguments, Knobs, RECIPES)


if __name__ == "__main__":
    if_no_memory = "lower batch_size, hidden_channels, frames_out, train_sequences or the size in --video"
    run_script(lambda: main(parse(sys.argv[1:])), if_no_memory)
