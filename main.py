"""Train a ConvLSTM encoder-forecaster on Moving MNIST, draw its forecasts, and score them on the test split.

    python main.py                                   train (or go on where it stopped), evaluate, draw
    python main.py --epochs 20 --hidden 128,64,64    any knob below is a flag
    torchrun --standalone --nproc_per_node=2 main.py several processes, the same result up to rounding

Everything lands in results/<model>/ (of --eval_only --weights, results/weights_…/), comparisons in results/.
Frames are (B, T, C, H, W): batch, time, channels, height, width.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds: no traceback

import dataclasses
import errno
import math
import os
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import advection
import checkpoint
import convlstm
import fast_convlstm
import figures
import metrics
from download import DownloadError, is_moving_mnist, load_data
from evaluate import BASELINES, CROSS_ENTROPY, cut, evaluate, forecaster
from journal import (
    Setup,
    baseline,
    begin_or_go_on,
    conclude,
    data_identity,
    load_weights,
    log,
    note,
    refuse_other_data,
    scores_of,
    starting_weights,
    write_config,
)
from knobs import knob, parse
from machine import (
    RANK,
    WORLD,
    DeviceError,
    choose_device,
    end,
    from_rank_0,
    idle_gpu,
    join,
    say,
    stop_on_signals,
    sum_over_processes,
)
from moving_mnist import ORDER, OVERLAYS, DataError, shape_of
from my_model import EncoderForecaster, twin_agrees


@dataclass(frozen=True)
class Knobs:
    """The experiment. Edit a default here, or set it for one run by a flag: python main.py --epochs 20

    Each is knob(default, what --help says, the least that is accepted, the most).
    """

    data: str = knob("array", "array (the official npy, or a stand-in where it cannot be had), fresh (new sequences "
                              "all the time), recut (the same, of digits cut out of the array's training split), or "
                              "your own: a .npy of shape (T, N, H, W) or (T, N, H, W, C), or a folder of videos",
                     group="data")  # fmt: skip
    train_sequences: int = knob(0, "use only the first N training sequences; 0 = all (fresh, recut: N an epoch; 0 = "
                                "10,000)", 0, 10**6, tried="8 to 10000")  # fmt: skip
    frames_in: int = knob(10, "input frames of a forecast", 2, tried="2 to 10")
    frames_out: int = knob(10, "frames it forecasts and is scored on", 1, tried="2 to 40")
    video_size: int = knob(64, "of a folder: pixels a side to which videos are resized", 12, 4096, tried="16 to 64")
    video_stride: int = knob(1, "of a folder: take every Nth frame", 1, 10**6, tried="1, 2")
    video_colour: bool = knob(False, "of a folder: red, green and blue; else the grey")
    overlay: int = knob(-1, "lay so many other training sequences over each, the larger value on top: fewer as the "
                            "horizon grows, none once all forecast frames are trained on (with --grow_until 0 never). "
                            "For bright things on black; -1: 2 of Moving MNIST, 0 of your own data", -1, 16,
                        tried="0 to 3")  # fmt: skip

    # --weights brings all of this group along
    model: str = knob("my_model", "the network; convlstm and seq2seq are the references",
                      choices=("my_model", "convlstm", "seq2seq"), group="model")  # fmt: skip
    hidden: tuple[int, ...] = knob((96, 96), "hidden channels of each layer, bottom to top (not seq2seq); the "
                                   "paper's: 128,64,64", 1, 10**6, tried="1 to 3 layers of 4 to 128")  # fmt: skip
    kernel_size: int = knob(3, "input-to-state kernel, odd (not seq2seq); the paper's: 5", 1, 255, tried="1 to 5")
    state_kernel_size: int = knob(0, "state-to-state kernel, odd; 0 = the same (my_model only)", 0, 255, tried="3, 5")
    dilation: int = knob(2, "of the state-to-state kernels above the first layer: from tap to tap; the paper's: 1 "
                         "(my_model only)", 1, 255, tried="1 to 3")  # fmt: skip
    patch: int = knob(4, "pixels a side of a patch, one position of the states (not seq2seq)", 1, 4096, tried="2 to 8")
    peephole: bool = knob(True, "let the gates see the cell state (my_model only, as the next six)")
    head: tuple[int, ...] = knob((128, 128), "channels of hidden layers before the frames, the first 3×3, the others "
                                 "1×1; 0 = none, as in the paper", 0, 10**6, tried="0 to 512")  # fmt: skip
    feedback: bool = knob(True, "forecast with the encoder, fed with its own last frame; false: a second stack, as in "
                                "the paper, which needs --reach 0")  # fmt: skip
    search: int = knob(4, "pixels up to which each patch is looked for in the frame before, to show the encoder how it "
                          "moved; the paper's: 0, it is not", 0, 64, tried="0, 4")  # fmt: skip
    reach: int = knob(4, "pixels up to which the head can move the frame before, patch by patch; the paper's: 0, it "
                         "cannot (with feedback only)", 0, 64, tried="0, 4")  # fmt: skip
    sheets: int = knob(2, "the head takes the frame before apart into so many, each moved by weights of its own, so "
                          "that digits that overlap can part; 1: it stays whole (with a reach only)", 1, 16,
                       tried="1, 2")  # fmt: skip
    symmetric: bool = knob(True, "tie the kernels, so that whoever flips or transposes the input, flips or transposes "
                                 "the forecast, but for biases and peepholes, which stay free. Layers then want "
                                 "multiples of 8 channels: others know no direction (my_model only)")  # fmt: skip

    epochs: int = knob(2, "passes over the training sequences", 1, 10**6, group="optimisation", tried="1 to 6")
    max_minutes: float = knob(0.0, "train for X minutes instead of epochs; 0 = off", 0, 1e6, tried="0.001 to 150")
    batch_size: int = knob(8, "sequences a step, over all processes together", 1, tried="2 to 16")
    learning_rate: float = knob(0.06, "Muon's, for the convolution kernels; AdamW takes 1/20 of it for the rest. "
                                "Free kernels (--symmetric false) and the references had 0.04",
                                1e-9, 1e37, tried="0.02 to 0.08")  # fmt: skip
    weight_decay: float = knob(0.03, "Muon's; our longer runs had 0.01. Without it, kernels grew tenfold in 14,000 "
                               "steps, and short runs ended higher", 0, 1, tried="0 to 0.1")  # fmt: skip
    warmup: float = knob(0.05, "fraction of training in which the learning rate rises; then it falls, linearly to zero",
                         0, 1)  # fmt: skip
    grow_from: float = knob(0.4, "fraction of training after which the horizon grows from one forecast frame",
                            0, 1, tried="0.1 to 1")  # fmt: skip
    grow_until: float = knob(0.9, "fraction of training after which all forecast frames are trained on. 0 = always all",
                             0, 1, tried="0.25 to 1")  # fmt: skip
    dense: bool = knob(True, "until all forecast frames are trained on, those that are not yet are input, and each "
                             "input frame after the middle of frames_in is a target too (my_model only)")  # fmt: skip
    sharpen_from: float = knob(0.9, "fraction of training after which 1 - SSIM is added to the cross-entropy, for "
                               "sharper forecasts, on Moving MNIST of a few %% higher MSE. 1 = never",
                               0, 1, tried="0.8 to 1")  # fmt: skip
    clip: float = knob(1.0, "largest gradient norm", 1e-9, 1e37)

    out: str = knob("results", "folder; each model has its own in it", group="evaluation and output")
    eval_only: bool = knob(False, "train nothing: score and draw best.pt, or --weights in a folder of their own")
    weights: str = knob("", "start from these weights: a best.pt; they bring the knobs of their network along")
    save_minutes: float = knob(2.0, "minutes between checkpoints; each evaluation makes one, too", 0, 1e6)

    seed: int = knob(0, "of weights, order, overlays and new sequences", 0, 2**63 - 1, group="system",
                     tried="0 to 2")  # fmt: skip
    device: str = knob("auto", "what to compute on", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = knob("auto", "auto: bf16 where the hardware multiplies it", choices=("auto", "bf16", "fp32"))


FIRST_LOOK = 50  # steps to an early evaluation and pictures: seconds, on most machines
TIMED = range(3, 13)  # steps from a start that tell the pace; those before are slower
ADAM_PART = 1 / 20  # AdamW's learning rate, as a fraction of Muon's


def build(knobs, channels):
    """The model that the knobs ask for: past frames in [0, 1] and a number → logits of that many future frames."""
    if knobs.model == "my_model":
        kernels = knobs.kernel_size, knobs.state_kernel_size
        names = "dilation", "patch", "peephole", "feedback", "search", "reach", "sheets", "symmetric"
        options = {name: getattr(knobs, name) for name in names}
        options["head"] = () if knobs.head == (0,) else knobs.head
        fast = twin_agrees()
        if not fast:
            say("cell      ConvLSTMCell and fast_convlstm.py differ: running the cell as it stands, which is slower")
        return EncoderForecaster(channels, knobs.hidden, *kernels, **options, fast=fast)
    if knobs.model == "convlstm":
        return convlstm.ConvLSTMForecaster(channels, knobs.hidden, knobs.kernel_size, knobs.patch)
    return convlstm.Seq2SeqForecaster(channels)


def not_compiled(knobs, dtype):
    """Of my_model on this CPU: gates.c and advect.c, where they are not in use, each with its plain twins."""
    if fast_convlstm.gate_functions("cpu", dtype)[0] is fast_convlstm.gates_forward:
        yield "gates.c", "gates_forward and gates_backward in fast_convlstm.py"
    moves = {2 * pixels + 1 for pixels in (knobs.search, knobs.reach) if pixels}
    if not all(advection.library(knobs.patch, k) for k in moves):
        yield "advect.c", "plain_advect and plain_match in advection.py (patches of at most 32 pixels)"


class Muon(torch.optim.Muon):
    """torch's Muon on convolution kernels: each is one matrix, (output channels, everything else).

    torch computes its steps in bf16, which a CPU without a bf16 unit emulates; that takes most of a training step.
    Here they are in the dtype of training; those in bf16 are torch's, with its default options, bit for bit.
    """

    def __init__(self, kernels, dtype, weight_decay):
        self.kernels, self.dtype = [k for k in kernels if k.requires_grad], dtype  # others are frozen
        matrices = [torch.nn.Parameter(k.detach().view(len(k), -1)) for k in self.kernels]  # views, no copies
        super().__init__(matrices, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        rate, beta = group["lr"], group["momentum"]
        for matrix, kernel in zip(group["params"], self.kernels, strict=True):
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
            gradient, momentum = kernel.grad.flatten(1), self.state[matrix]["momentum_buffer"]
            momentum.lerp_(gradient, 1 - beta)
            update = self.orthogonal(gradient.lerp(momentum, beta).to(self.dtype), group)
            n_out, n_in = matrix.shape
            matrix.mul_(1 - rate * group["weight_decay"]).sub_(update, alpha=rate * math.sqrt(max(1, n_out / n_in)))

    @staticmethod
    def orthogonal(x, group):
        """x with all singular values near 1: each becomes a·s + b·s³ + c·s⁵, five times over (Newton–Schulz)."""
        if len(x) > x.shape[1]:
            return Muon.orthogonal(x.T, group).T  # so that x @ x.T is the smaller of the two
        a, b, c = group["ns_coefficients"]
        x = x / x.norm().clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a·x + (b·gram + c·gram²) x
        return x


def make_optimisers(model, weight_decay, dtype):
    """Muon for the kernels; AdamW for the rest: biases, peepholes and the layer that draws the pixels.

    An lr given here is not heeded: `train` sets the schedule's in each group at each step, times the group's "part".
    """
    *kernels, output = [p for p in model.parameters() if p.ndim >= 4]  # what draws comes last, as registered
    rest = {"params": [p for p in model.parameters() if p.ndim < 4] + [output], "part": ADAM_PART}
    return [Muon(kernels, dtype, weight_decay), torch.optim.AdamW([rest], betas=(0.9, 0.95), weight_decay=0.0)]


def learning_rate(knobs, progress):
    """At a progress in [0, 1): linear warm-up, then linear to zero."""
    if progress < knobs.warmup:
        return knobs.learning_rate * progress / knobs.warmup
    return knobs.learning_rate * (1 - progress) / (1 - knobs.warmup)


def horizon(knobs, progress):
    """Forecast frames trained on at this progress: near ones first, which teach motion and cost less (see `cost`)."""
    if progress >= knobs.grow_until:
        return knobs.frames_out
    grown = (progress - knobs.grow_from) / max(1e-9, knobs.grow_until - knobs.grow_from)
    return 1 + int(max(0.0, grown) * (knobs.frames_out - 1))


def inputs(knobs, n_future):
    """Input frames of a training step: with dense targets, all that it does not forecast."""
    dense = knobs.dense and knobs.model == "my_model"
    return knobs.frames_in + (knobs.frames_out - n_future if dense else 0)


def overlays(knobs, n_future):
    """Training sequences laid over each: fewer as the horizon grows, and none when all frames are trained on."""
    return math.ceil(knobs.overlay * (knobs.frames_out - n_future) / max(1, knobs.frames_out - 1))


def batch_of(setup, step, index, n_future):
    """Training sequences (n, T, C, H, W), overlaid: those of index that are this process's part."""
    mine, rng = slice(RANK, None, WORLD), np.random.default_rng((setup.knobs.seed, step, OVERLAYS))
    frames = setup.training[index[mine]]
    # drawn for the whole batch, so that they do not depend on how many processes share it
    for others in rng.integers(len(setup.training), size=(overlays(setup.knobs, n_future), len(index))):
        frames = torch.maximum(frames, setup.training[others[mine]])
    return frames


def progress_at(step, run, knobs):
    """The part of training that lies behind; until max_minutes is turned into steps, as if warm-up had just begun."""
    return step / run["steps"] if run["steps"] else knobs.warmup / 10


def cost(knobs, progress):
    """What a step costs at this progress, in input frames. A forecast frame that waits for the one before costs more:
    of 64 channels on two CPU cores 1.6 times with batches of 4, 1.3 with 8, 1.0 to 1.2 with 16."""
    waits = knobs.model == "seq2seq" or (knobs.model == "my_model" and knobs.feedback)
    n_future = horizon(knobs, progress)
    return inputs(knobs, n_future) + (1 + 2.4 / max(4, knobs.batch_size / WORLD) if waits else 1.0) * n_future


def dissimilarity(logits, truth):
    """1 − SSIM, the mean over all windows (as a loss: Zhao et al., 2017, https://arxiv.org/abs/1511.08861).

    Where a digit may be in several places, the cross-entropy asks for the grey of all of them; SSIM, which compares the
    contrast and shape of windows, rather for one of them, in white.
    """
    return 1 - metrics.similarity(torch.sigmoid(logits), truth).mean()


def announce_pace(run, seconds_a_step, knobs, bar):
    """After a few steps: settle how many steps max_minutes buys, and say how long the rest will take here."""
    progress = progress_at(run["step"], run, knobs)
    seconds = seconds_a_step / cost(knobs, progress)  # an input frame's

    def later(start):
        """Seconds of a step, on average from there on."""
        return seconds * np.mean([cost(knobs, p) for p in np.linspace(start, 1, 1000)])

    if not run["steps"]:
        run["steps"] = bar.total = from_rank_0(max(run["step"], int(knobs.max_minutes * 60 / later(0.0))))
    minutes = (run["steps"] - run["step"]) * later(progress) / 60
    if RANK == 0:
        bar.write(f"pace      {knobs.batch_size / seconds_a_step:.0f} sequences/s: {run['steps'] - run['step']:,} more "
                  f"steps of {knobs.batch_size} will take about {minutes:.0f} min, plus evaluations\n"
                  f"step {run['step']:<5} train loss {run['loss_sum'] / run['loss_count']:.4f}")  # fmt: skip


def evaluation_due(step, steps, steps_per_epoch):
    """Whether to evaluate: early, at the end, and after each epoch or quarter of the run, whichever is shorter; where
    an epoch ends before the early look, after each epoch or hundredth, whichever is longer."""
    quarter, hundredth = math.ceil(steps / 4), math.ceil(steps / 100)
    every = min(steps_per_epoch, quarter) if steps_per_epoch >= FIRST_LOOK else max(steps_per_epoch, hundredth)
    return step in (FIRST_LOOK, steps) or (steps > 0 and step % every == 0)


def diverged(what, rate, last_loss, folder):
    last, advice = folder / "last.pt", "start over with a lower --learning_rate"
    if last.exists():
        advice = f"--weights {last}, another --out and a lower --learning_rate start from the last checkpoint"
    return FloatingPointError(
        f"{what}, at learning rate {rate:.4g} (last finite loss: {last_loss}). That step was not saved; {advice}"
    )


def train(setup, run, model, optimisers):
    """From run["step"] to run["steps"]; run is what a checkpoint holds beside the weights and the optimisers."""
    knobs, device, steps_per_epoch = setup.knobs, setup.device, run["steps_per_epoch"]
    net = torch.nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    first_step, saved, seconds_a_step, last_loss = run["step"], time.perf_counter(), 0.0, "none since the start"
    timed_from, seconds_before = run["step"], run["seconds"]
    disable = bool(RANK) or None  # None: shown in a terminal, but not in a file
    bar = tqdm(total=run["steps"] or None, initial=first_step, unit="step", disable=disable, leave=False)
    while run["step"] < run["steps"] or not run["steps"]:  # 0: max_minutes has not been turned into steps yet
        step, tick = run["step"], time.perf_counter()
        epoch, k = divmod(step, steps_per_epoch)
        if k == 0 or step == first_step:
            order = np.random.default_rng((knobs.seed, epoch, ORDER)).permutation(len(setup.training))
            setup.training.start_epoch(epoch)
        progress = progress_at(step + 0.5, run, knobs)  # no step has a learning rate of zero
        torch.manual_seed(knobs.seed + step * WORLD + RANK)  # so that an edited network with dropout goes on exactly
        rate = learning_rate(knobs, progress)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group.get("part", 1) * rate

        index = order[k * knobs.batch_size :][: knobs.batch_size]
        n_future = horizon(knobs, progress)
        n_past = inputs(knobs, n_future)
        past, future = cut(batch_of(setup, step, index, n_future), n_past, n_future, device)
        # dense targets: the frames after these are drawn as well. A tuple, as the references take no such argument
        draw_from = ((knobs.frames_in - 1) // 2,) if n_past > knobs.frames_in else ()

        net.train()
        with setup.autocast():
            logits = net(past, n_future, *draw_from).float()
        truth = torch.cat((past, future), 1)[:, -logits.shape[1] :]
        # the mean over the whole batch, though each process has a part of it. Logged whatever the loss is
        cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
        cross_entropy = cross_entropy / (truth[0].numel() * len(index))
        sharpening = dissimilarity(logits, truth) if progress >= knobs.sharpen_from else 0.0
        loss = cross_entropy + sharpening * len(truth) / len(index)
        (loss * WORLD).backward()  # as DistributedDataParallel averages the gradients over the processes
        unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused, f"no gradient reaches {', '.join(unused)}; every parameter has to take part"
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), knobs.clip))
        mean_loss = float(sum_over_processes(cross_entropy.detach(), device))
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            what = f"loss {mean_loss} and gradient norm {norm} in epoch {epoch + 1}, step {step + 1}"
            raise diverged(what, rate, last_loss, setup.folder)
        for optimiser in optimisers:
            optimiser.step()
        model.zero_grad()

        last_loss = f"{mean_loss:.4g}"
        run["step"] += 1
        run["loss_sum"] += mean_loss
        run["loss_count"] += 1
        bar.update()
        bar.set_postfix_str(f"loss {mean_loss:.4f}", refresh=False)
        seconds = time.perf_counter() - tick
        run["seconds"] += seconds
        if step - first_step in TIMED:
            seconds_a_step += seconds / len(TIMED)
        if step - first_step == TIMED[-1]:
            announce_pace(run, seconds_a_step, knobs, bar)
        if evaluation_due(run["step"], run["steps"], steps_per_epoch):
            speed = (run["step"] - timed_from) * knobs.batch_size / (run["seconds"] - seconds_before)
            names = ("mse_per_frame", CROSS_ENTROPY)
            try:
                missing = [who for who in BASELINES if who not in run["baselines"]]  # optical flow, as it takes seconds
                run["baselines"] |= {who: baseline(setup, who) for who in missing}
                scores = evaluate(setup.forecast, setup.validation, *setup.span, names, device)
            except FloatingPointError as error:  # the loss was finite, the weights after it are not
                raise diverged(f"{error} after step {run['step']}", rate, last_loss, setup.folder) from error
            if RANK == 0:
                note(setup, run, scores, rate, speed, model)
            run["loss_sum"], run["loss_count"], saved = 0.0, 0, -math.inf  # a checkpoint is due
            timed_from, seconds_before = run["step"], run["seconds"]
        if RANK == 0 and time.perf_counter() - saved > 60 * knobs.save_minutes:
            state = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers]}
            checkpoint.save(setup.folder / "last.pt", {**run, **state})
            saved = time.perf_counter()
    bar.close()


def follow_data(knobs, training):
    """The knobs: overlay as the data wants it; of sequences too short for the default frames_in and frames_out, each
    gets half of them."""
    n, default = shape_of(training)[0], (Knobs.frames_in, Knobs.frames_out)
    if knobs.overlay < 0:
        knobs = dataclasses.replace(knobs, overlay=2 if is_moving_mnist(knobs, training) else 0)
    if (knobs.frames_in, knobs.frames_out) != default or n >= sum(default) or n < 3:
        return knobs
    say(f"frames    the data has {n} a sequence: frames_in {n - n // 2}, frames_out {n // 2}")
    return dataclasses.replace(knobs, frames_in=n - n // 2, frames_out=n // 2)


def model_for(knobs, training, data, device, autocast):
    """The model, once the knobs fit the data and the model fits both; else a DataError says what does not."""
    n_frames, channels, height, width = shape_of(training)
    if n_frames < knobs.frames_in + knobs.frames_out:
        raise DataError(f"{data} has {n_frames} frames a sequence, too few for frames_in {knobs.frames_in} "
                        f"and frames_out {knobs.frames_out}")  # fmt: skip
    if min(height, width) < 12:
        raise DataError(f"frames are {height}×{width}; SSIM, with its 11×11 window, and optical flow need 12×12")
    if not (WORLD <= knobs.batch_size <= len(training) or knobs.eval_only):
        raise DataError(f"batch_size is {knobs.batch_size}; it must be from {WORLD} (processes) to "
                        f"{len(training)} (training sequences)")  # fmt: skip
    torch.manual_seed(knobs.seed)
    try:
        model = build(knobs, channels).to(device)
        with torch.no_grad(), autocast():  # a dry run on one sequence
            model(cut(training[np.arange(1)], knobs.frames_in, 0, device)[0], 1)
    except ValueError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        if Path(where.filename).parent != Path(figures.__file__).parent or not (where.line or "").startswith("raise"):
            raise  # Python's or torch's, not the network's: a bug in an edited one
        raise DataError(str(error)) from error
    return model


def main(knobs):
    device, dtype, precision = choose_device(knobs.device, knobs.precision)
    autocast = nullcontext if dtype == torch.float32 else partial(torch.autocast, device.type, dtype)
    join(device)
    if (first := from_rank_0((dtype, precision)))[0] != dtype:
        raise DeviceError(f"this process computes in {precision}, the first in {first[1]}; set precision to fp32")
    knobs, given, origin = starting_weights(knobs)
    folder = Path(knobs.out) / knobs.model
    if knobs.eval_only and knobs.weights:  # a folder of their own, so that they replace no training's results
        _, *folders = origin.resolve().parent.parts
        whose = folders[-2:] if origin.stem in ("best", "last") else ()  # names that every run has
        folder = Path(knobs.out) / "_".join(("weights", *whose, origin.stem))
    if RANK == 0:
        _held = checkpoint.claim(folder)  # as long as this name lives
    training, validation, test_split, data = load_data(knobs)
    knobs = follow_data(knobs, training)
    if knobs.eval_only and not knobs.weights:
        refuse_other_data(knobs, data_identity(knobs, training, validation, test_split, data), given, origin)
    if from_rank_0(data) != data:
        raise DataError(
            f"this process has the {data}, the first another; put the same array into raw/ on every machine"
        )
    model = model_for(knobs, training, data, device, autocast)
    if given:
        load_weights(model, given["model"], origin)
    forecast = forecaster(model, autocast)
    setup = Setup(knobs, folder, data, training, validation, test_split, device, autocast, forecast)

    parameters = sum(p.numel() for p in model.parameters())
    threads, processes = torch.get_num_threads(), "1 process" if WORLD == 1 else f"{WORLD} processes"
    start = f", from {origin}, step {given['step']:,}" if given else ""
    say(f"model     {knobs.model}, {parameters:,} parameters{start}")
    say(f"device    {device}, {processes}, {threads} threads, {precision}, torch {torch.__version__}")
    if idle_gpu(device):
        say("          an NVIDIA GPU is here, but this torch was built without CUDA: see pytorch.org")
    for source, twins in not_compiled(knobs, dtype) if device.type == "cpu" and knobs.model == "my_model" else ():
        say(f"          {source} is not in use, and its part several times as slow: it needs gcc on Linux and x86,")
        say(f"          and to agree with {twins}")
    say(f"data      {data}: {len(training):,} training, {len(validation):,} validation, {len(test_split):,} test")
    say("          sequences of {} frames, {}×{}×{}".format(*shape_of(training)))

    if not knobs.eval_only:
        optimisers = make_optimisers(model, knobs.weight_decay, dtype)
        run = begin_or_go_on(setup, model, optimisers)
        ended = run["step"] >= run["steps"] > 0
        if ended and (scores := from_rank_0(scores_of(folder) if RANK == 0 else None)):
            say(f"this run has ended; nothing was changed\n\n{scores}")
            return
        levels = (f"{figures.LABELS[who]} {np.mean(run['baselines'][who]):.1f}" for who in ("black", "copy_last"))
        say(f"baselines {', '.join(levels)} (validation; squared error of a frame, summed over its pixels)")
        say(f"output    {folder}{os.sep}" + (f", going on at step {run['step']:,}" if run["step"] else ""))
        if RANK == 0:
            facts = {"data_used": data, "device_used": str(device), "precision_used": precision}
            facts |= {"threads": threads, "processes": WORLD, "parameters": parameters}
            write_config(setup, run["step"] == 0, facts)
            (folder / "metrics.json").unlink(missing_ok=True)  # scores of an earlier end are not this run's
            if run["history"] and run["timing"]:
                log(setup, run)  # the files may be lost
        train(setup, run, model, optimisers)
        advice = f"without it and {folder / 'last.pt'}, a run starts over"
        given = from_rank_0(checkpoint.load(folder / "best.pt", advice) if RANK == 0 else None)
        load_weights(model, given["model"], folder / "best.pt")
    conclude(setup, model, given["step"])


if __name__ == "__main__":
    # in a file too, a line is there when it is printed; and no character that the terminal lacks ends a run
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    knobs = parse(Knobs, sys.argv[1:], __doc__.splitlines()[0])
    stop_on_signals()
    try:
        main(knobs)
        if WORLD > 1:
            dist.destroy_process_group()
            end(0)
    except SystemExit as stopped:  # by a signal
        end(stopped.code)
    except (DataError, DeviceError, DownloadError, checkpoint.CheckpointError, FloatingPointError) as error:
        end(1, f"main.py{f', rank {RANK}' if WORLD > 1 else ''}: {error}")
    except (MemoryError, RuntimeError) as error:  # of which torch.OutOfMemoryError is one, but not on a CPU
        words = "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "ALLOCATION_FAILED"
        if isinstance(error, MemoryError) or any(w in str(error) for w in words):
            end(
                1,
                f"main.py: out of memory at batch_size {knobs.batch_size}; lower it, hidden or frames_out. The last.pt "
                f"under {knobs.out}, if there is one, is intact: --weights that file, and another --out, start from it",
            )
        lost = "closed by peer", "reset by peer", "Broken pipe"  # gloo's words; nccl has an error of its own
        if not (isinstance(error, dist.DistError) or any(words in str(error) for words in lost)):
            raise
        why = " ".join(str(error).partition("Exception raised from")[0].split()) or type(error).__name__  # no C++ stack
        end(1, f"main.py, rank {RANK}: lost the other processes ({why}); if one has ended, its message says why")
    except OSError as error:  # of print, as files have a sentence of their own
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        words = f"main.py: cannot print: {error.strerror}. The last checkpoint, if there is one, is intact"
        print(words, file=sys.stderr, flush=True)
        os._exit(1)  # at its end Python would print again
