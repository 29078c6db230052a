"""One run: its folder, how it starts or resumes, what it counts and logs, and how it ends.

`Run` never calls the model for training, `backward` or an optimizer: that is main.py's.
"""

import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import figures
from support import UserError, checkpoint, evaluation
from support.checkpoint import load_weights, open_atomic, write_atomic
from support.distributed import RANK, broadcast, on_rank_0, print0
from support.evaluation import BASELINES, CROSS_ENTROPY, Task

WATCHED = 100  # validation sequences, evenly chosen, that every evaluation scores
FIRST_LOOK = 50  # steps before an early evaluation, which shows that the network learns
EVALUATIONS = 10  # evenly spaced over training
LOSSES = 200  # points of the training loss's curve
TIMED = range(3, 13)  # steps after a start or resume that measure the speed; earlier ones are slower
SAVE_EVERY = 120  # seconds between checkpoints
# How far a run is: what a checkpoint keeps, beside weights and optimizers
KEPT = "steps", "step", "seconds", "best", "history", "baselines", "loss_sum", "loss_count"


@dataclass
class Run:
    """What a run was asked for, where it computes, and how far it is."""

    knobs: Any
    folder: Path
    asked: dict  # what makes this run the same run: knobs, data, sources
    environment: dict  # what makes it bit-exact: device, precision, kernels, threads, processes, torch
    data: Any  # moving_mnist.Data
    model: Any
    device: Any
    dtype: Any  # of the convolutions
    horizon: Callable  # knobs, part of training → (input frames, forecast frames) of a training step
    scored_step: int = 0  # the training step at which the scored weights were saved

    def __post_init__(self):
        knobs = self.knobs
        self.order, self.epoch = None, -1  # the order of the training sequences, and the epoch that has it
        self.steps_per_epoch = max(1, len(self.data.training) // knobs.batch_size)
        # 0: max_minutes has not been turned into steps yet
        self.steps = 0 if knobs.max_minutes else knobs.epochs * self.steps_per_epoch
        self.step, self.seconds = 0, 0.0
        self.best = math.inf  # MSE of the watched validation sequences
        self.history = []  # the rows of log.csv
        self.baselines = {}  # name → MSE of each frame, of the same sequences
        self.loss_sum, self.loss_count = 0.0, 0  # of the steps since the last row
        n = len(self.data.validation)
        self.watched = np.linspace(0, n - 1, min(n, WATCHED)).astype(int)
        self.task = Task(self.forecast, knobs.frames_in, knobs.frames_out, self.device)
        self.validated = f"validation split of the {self.data.name}"  # in titles
        if knobs.data == "fresh":
            self.validated = "fresh sequences of held-out digits"

    def autocast(self):
        """The context in which the model computes in its dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.inference_mode()
    def forecast(self, past, n_future):
        """A forecast, as evaluation.py defines it: (prediction, logits)."""
        self.model.eval()
        with self.autocast():
            logits = self.model(past, n_future).float()
        return torch.sigmoid(logits), logits

    @property
    def has_ended(self):
        return self.step >= self.steps > 0

    @property
    def progress(self):
        """The fraction of training done at the middle of the next step, in [0, 1)."""
        return (self.step + 0.5) / self.steps if self.steps else 0.005  # until the pace is known

    def resume(self, optimizers):
        """Continue from last.pt, if it is there. Raises UserError if it cannot be used."""
        path = self.folder / "last.pt"
        advice = "delete it" if (self.folder / "metrics.json").exists() else "delete it to start over"
        state = on_rank_0(lambda: checkpoint.load(path, advice) if path.exists() else None)
        if state:
            load_weights(self.model, state, path)
            try:
                for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                    load_optimizer(optimizer, saved)
                for name in KEPT:
                    setattr(self, name, state[name])
            except Exception as error:  # untrusted file: anything may be in it
                reason = f"it does not fit this code ({error})"
                raise UserError(f"cannot resume from {path}: {reason}; {advice}") from error
            then, now = state["environment"], self.environment
            changed = [f"{k} {now[k]} (was {then.get(k)})" for k in now if then.get(k) != now[k]]
            if changed and not self.has_ended:
                print0(f"resuming with {', '.join(changed)}: no longer bit-exact")

    def show_results(self):
        """Whether the run has ended and its results can be read: then print them."""
        files = self.folder / "log.csv", self.folder / "loss.png"
        if self.has_ended and RANK == 0 and not all(file.exists() for file in files):
            self.write_log()
        if found := on_rank_0(self.read_results) if self.has_ended or not self.step else None:
            results, words = found
            print0(f"this run has ended; nothing was changed\n\n{words}\noutput    {self.folder}")
            if RANK == 0 and not (self.folder.parent / "compare.md").exists():
                evaluation.compare_runs(self.folder.parent, results, self.data.test[np.arange(1)][0].numpy())
            return True
        words = f", resuming at step {self.step:,}" if self.step and not self.has_ended else ""
        print0(f"output    {self.folder}{words}")
        return False

    def read_results(self):
        with suppress(Exception):  # lost or damaged: it is made again
            results = json.loads((self.folder / "metrics.json").read_bytes())
            return results, evaluation.report(results)  # raises for what cannot be shown

    def start_clock(self):
        self.started_at, self.saved_at = self.step, time.perf_counter()
        self.tick, self.step_seconds = time.perf_counter(), 0.0
        hidden = bool(RANK) or None  # None: shown in a terminal, but not in a file
        self.bar = tqdm(total=self.steps or None, initial=self.step, unit="step", disable=hidden, leave=False)

    def count_step(self, loss, rate, numbers):
        """Count a training step and its cross-entropy. After a few steps, print how long the rest takes.

        numbers: name → another number of this step, for log.csv and loss.png.
        """
        seconds = time.perf_counter() - self.tick
        self.seconds += seconds
        since_start = self.step - self.started_at
        self.step += 1
        self.loss_sum += loss
        self.loss_count += 1
        self.bar.update()
        self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        if since_start in TIMED:
            self.step_seconds += seconds / len(TIMED)
        if since_start == TIMED[-1]:
            self.estimate_time()
        if self.passes(LOSSES) or self.evaluation_due():
            self.add_row(rate, numbers)
        self.tick = time.perf_counter()

    def estimate_time(self):
        """Turn max_minutes into a number of steps, once, and print how long the rest takes."""
        frames = lambda progress: sum(self.horizon(self.knobs, progress))
        per_frame = self.step_seconds / frames(self.progress)
        seconds_a_step = lambda start: per_frame * np.mean([frames(p) for p in np.linspace(start, 1, 1000)])
        if not self.steps:
            steps = max(self.step, int(self.knobs.max_minutes * 60 / seconds_a_step(0)))
            self.steps = self.bar.total = broadcast(steps)
        left = self.steps - self.step
        minutes, speed = left * seconds_a_step(self.progress) / 60, self.knobs.batch_size / self.step_seconds
        words = f"pace      {speed:.0f} sequences/s: {left:,} more steps take about {minutes:.0f} min"
        if RANK == 0:
            self.bar.write(words)

    def passes(self, n):
        """Whether the last step reached one of n evenly spaced points of training. True: length unknown."""
        return not self.steps or (self.step - 1) * n // self.steps < self.step * n // self.steps

    def evaluation_due(self):
        return self.steps > 0 and (self.step == FIRST_LOOK or self.passes(EVALUATIONS))

    def diverged(self, what, rate, step):
        """The error that stops a run whose numbers are not finite, before they reach a checkpoint."""
        last = f"{self.history[-1]['train_loss']:.4g}" if self.history else "none yet"
        where = f"epoch {step // self.steps_per_epoch + 1}, step {step + 1}"
        advice, best = "use a lower --learning_rate", self.folder / "best.pt"
        advice += f", perhaps with --weights {best}" if best.exists() else ""
        words = f"{what} in {where}, learning rate {rate:.4g} (last logged loss: {last})"
        return FloatingPointError(f"{words}. The step was not saved; {advice}")

    def save_due(self):
        return time.perf_counter() - self.saved_at > SAVE_EVERY

    def add_row(self, rate, numbers):
        """A row of log.csv. Its loss is the mean of the steps since the row before."""
        row = {"epoch": self.step / self.steps_per_epoch, "step": self.step}
        row |= {"sequences": self.step * self.knobs.batch_size, "minutes": round(self.seconds / 60, 3)}
        row |= {"learning_rate": rate, "train_loss": self.loss_sum / self.loss_count}
        row |= dict.fromkeys(("val_loss", "val_mse_per_frame", "val_sequences"))
        for name, value in numbers.items():
            assert name not in row, f"log.csv has a column {name} of its own; give your number another name"
            row[name] = float(value.item() if isinstance(value, torch.Tensor) else value)
        self.history.append(row)
        self.loss_sum, self.loss_count = 0.0, 0

    def score_baselines(self):
        for who, forecast in BASELINES.items():
            task = self.task._replace(forecast=forecast)
            self.baselines[who] = evaluation.mse_curve(task, self.data.validation, self.watched)
        if RANK == 0:
            levels = (f"{figures.LABELS[who]} {np.mean(mse):.1f}" for who, mse in self.baselines.items())
            self.bar.write(f"baselines {', '.join(levels)} (validation MSE, to compare with those below)")

    def evaluate(self):
        """Validate, log, keep the weights if they are the best so far, and redraw the pictures."""
        if not self.baselines:
            self.score_baselines()
        row, names = self.history[-1], ("mse_per_frame", CROSS_ENTROPY)
        try:
            scores = evaluation.evaluate(self.task, self.data.validation, names, self.watched)
        except FloatingPointError as error:  # the loss was finite, but not the weights after it
            what = f"forecasts that are not finite ({error})"
            raise self.diverged(what, row["learning_rate"], self.step - 1) from error
        pixels = self.task.frames_out * math.prod(self.data.validation.shape[1:])
        row["val_loss"] = float(scores[CROSS_ENTROPY].mean()) / pixels
        row["val_mse_per_frame"] = float(scores["mse_per_frame"].mean())
        row["val_sequences"] = len(self.watched)
        if RANK == 0:
            losses = f"{row['train_loss']:.4f} (training) {row['val_loss']:.4f} (validation)"
            words = f"epoch {row['epoch']:.3f} cross-entropy {losses}, MSE {row['val_mse_per_frame']:.1f}"
            self.bar.write(f"{words} of {len(self.watched)} sequences, {row['minutes']:.1f} min")
            if row["val_mse_per_frame"] < self.best:
                self.best = row["val_mse_per_frame"]
                checkpoint.save(self.folder / "best.pt", self.network())
            self.write_log()
            curves = {self.knobs.model: scores["mse_per_frame"].mean(0).tolist(), **self.baselines}
            write_atomic(self.folder / "per_frame.png", figures.per_frame({self.validated: curves}))
            title = f"{self.validated}, after {row['sequences']:,} training sequences"
            evaluation.draw_samples(self.folder, self.task, self.data.validation, title)
        self.saved_at = -math.inf  # a checkpoint is due
        self.tick = time.perf_counter()

    def network(self):
        """What a checkpoint needs for `main.load`. Raises FloatingPointError if weights are not finite."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise FloatingPointError("weights are not finite, and were not saved; lower learning_rate")
        channels = self.data.training.shape[1]
        state = {"knobs": self.asked["knobs"], "channels": channels, "model": self.model.state_dict()}
        return state | {"step": self.step, "fixed_forecast": checkpoint.fixed_forecast(self.model, channels)}

    def save(self, optimizers):
        if RANK == 0:
            state = self.network() | {name: getattr(self, name) for name in KEPT}
            state |= {"environment": self.environment, "optimizers": [o.state_dict() for o in optimizers]}
            checkpoint.save(self.folder / "last.pt", state)
        self.saved_at = self.tick = time.perf_counter()

    def write_log(self):
        """log.csv and loss.png."""
        text = io.StringIO()
        names = dict.fromkeys(name for row in self.history for name in row)  # some rows may have more
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_atomic(self.folder / "log.csv", text.getvalue().encode())
        means = {who: float(np.mean(curve)) for who, curve in self.baselines.items()}
        title = f"{self.folder.name}, {self.data.name}"
        write_atomic(self.folder / "loss.png", figures.loss(self.history, means, title))

    def load_best(self):
        """Load the weights with the lowest MSE of the watched validation sequences."""
        path, last = self.folder / "best.pt", self.folder / "last.pt"
        best = on_rank_0(checkpoint.load, path, f"delete it and {last} to start over")
        load_weights(self.model, best, path)
        self.scored_step = best["step"]

    def finish(self):
        """Score the weights on all of validation and test, draw their forecasts, compare with other runs."""
        knobs, folder, test, name = self.knobs, self.folder, self.data.test, self.data.name
        validation, validation_mse = self.data.validation, None
        torch.manual_seed(knobs.seed)  # for a network that draws random numbers
        if not knobs.eval_only:
            print0(f"scoring   {len(validation):,} validation sequences")
            validation_mse = float(np.mean(evaluation.mse_curve(self.task, validation)))
        print0(f"scoring   {len(test):,} test sequences")
        scores, ranking = evaluation.score(knobs.model, self.task, test)
        first = test[np.arange(1)]
        results = {
            "data": name,
            "data_tested": name.partition(", trained on")[0],
            "split": test.split,
            "sequences": len(test),
            "first_sequence": hashlib.sha256(first.numpy()).hexdigest()[:16],
            "frames_in": knobs.frames_in,
            "frames_out": knobs.frames_out,
            "model": knobs.model,
            "step": self.scored_step,
            "weights": checkpoint.weights_hash(self.model),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "validation_mse": validation_mse,
            "scores": scores,
        }
        if self.data.is_moving_mnist:
            beyond = evaluation.score_beyond_training(folder, knobs.model, self.task, knobs.patch_size)
            results["beyond"] = beyond
        if RANK == 0:
            title = f"{self.validated}, weights of step {self.scored_step:,}"
            evaluation.draw_samples(folder, self.task, validation, title)
            title = results["data_tested"] + ("" if test.split == "all" else f", {test.split} split")
            evaluation.draw_ranked(folder, self.task, test, ranking, title)
            past, _ = evaluation.split_frames(first, *self.task[1:])
            forecast = self.task.forecast(past, knobs.frames_out)[0][0].cpu()
            with open_atomic(folder / "forecast.npy") as file:
                np.save(file, (forecast * 255).round().byte().numpy())
            curves = {who: values["mse_per_frame"]["per_frame"] for who, values in scores.items()}
            picture = figures.per_frame({evaluation.describe_split(results): curves})
            write_atomic(folder / "per_frame.png", picture)
            write_atomic(folder / "metrics.json", json.dumps(results, indent=1).encode())
            evaluation.compare_runs(folder.parent, results, first[0].numpy())
        print0(f"\n{evaluation.report(results)}\noutput    {folder}")


def load_optimizer(optimizer, saved):
    """Raises ValueError for other options, which would silently replace those in the code."""

    def options():
        for group in checkpoint.without_numpy(optimizer.param_groups):
            group["lr"] = group.pop("initial_lr", group["lr"])  # before it was scheduled
            yield {name: repr(value) for name, value in group.items() if name != "params"}

    before = list(options())
    optimizer.load_state_dict(saved)
    if list(options()) != before:
        raise ValueError("its optimizer has other options")
