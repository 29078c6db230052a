"""How far a run is: what a checkpoint keeps beside weights and optimizers, and arithmetic on it."""

import math
from dataclasses import asdict, dataclass, field

from support import UserError, checkpoint, sources
from support.devices import RANK, broadcast, on_rank_0, print0

FIRST_LOOK = 50  # steps before an early evaluation, which shows that the network learns
EVALUATIONS = 10  # evenly spaced over training
LOSSES = 200  # points of the training loss's curve
SAVE_EVERY = 120  # seconds of training between checkpoints


@dataclass
class Progress:
    """What changes in every step. Seconds are of training only."""

    steps_per_epoch: int
    batch_size: int
    steps: int  # of the whole training; 0: max_seconds decides
    max_seconds: float
    step: int = 0
    seconds: float = 0.0
    duration: float = 0.0  # seconds of the last step
    saved_at: float = 0.0  # seconds
    best_mse: float = math.inf  # of the watched validation sequences
    best_step: int = 0  # the step after which best.pt was saved
    baselines: dict = field(default_factory=dict)  # name → MSE of the same sequences
    history: list = field(default_factory=list)  # the rows of log.csv
    loss_sum: float = 0.0  # of the steps since the last row
    loss_count: int = 0

    @classmethod
    def start(cls, setup):
        """Of a run that begins."""
        knobs, n = setup.knobs, setup.steps_per_epoch
        steps = 0 if knobs.max_minutes else knobs.epochs * n
        return cls(n, knobs.batch_size, steps, 60 * knobs.max_minutes)

    @property
    def has_ended(self):
        return self.step >= self.steps if self.steps else self.seconds >= self.max_seconds

    @property
    def fraction(self):
        """The fraction of training done at the middle of the next step, in [0, 1). Of time: at its start."""
        if self.steps:
            return (self.step + 0.5) / self.steps
        return max(0.001, self.seconds / self.max_seconds)  # at 0, the first step would learn nothing

    def passes(self, n):
        """Whether the last step reached one of n evenly spaced points of training."""
        if self.steps:
            return (self.step - 1) * n // self.steps < self.step * n // self.steps
        before = self.seconds - self.duration
        return before * n // self.max_seconds < self.seconds * n // self.max_seconds

    def evaluation_due(self):
        return self.step == FIRST_LOOK or self.passes(EVALUATIONS)

    def save_due(self):
        return self.evaluation_due() or self.seconds - self.saved_at > SAVE_EVERY

    def count_step(self, loss, rate, numbers, seconds):
        """Count a training step and its cross-entropy. Now and then, add a row for log.csv.

        A row's loss is the mean of the steps since the row before. numbers: others of this step, by name.
        """
        self.step += 1
        self.duration = seconds if self.steps else broadcast(seconds)  # all processes end together
        self.seconds += self.duration
        self.loss_sum += loss
        self.loss_count += 1
        if not (self.passes(LOSSES) or self.evaluation_due()):
            return
        row = {"epoch": self.step / self.steps_per_epoch, "step": self.step}
        row |= {"sequences": self.step * self.batch_size, "minutes": round(self.seconds / 60, 3)}
        row |= {"learning_rate": rate, "train_loss": self.loss_sum / self.loss_count}
        row |= dict.fromkeys(("val_loss", "val_mse_per_frame", "val_sequences"))
        for name, value in numbers.items():
            assert name not in row, f"log.csv has a column {name} of its own; give your number another name"
            row[name] = float(value)
        self.history.append(row)
        self.loss_sum, self.loss_count = 0.0, 0

    def diverged(self, what, rate, step):
        """The error that stops a run whose numbers are not finite, before they reach a checkpoint."""
        last = f"{self.history[-1]['train_loss']:.4g}" if self.history else "none yet"
        where = f"epoch {step // self.steps_per_epoch + 1}, step {step + 1}"
        where += f", learning rate {rate:.4g} (last logged loss: {last})"
        return UserError(f"{what} in {where}. The step was not saved; use a lower --learning_rate")


def save(folder, setup, progress, optimizers):
    """Save last.pt; then best.pt, if these weights are the best so far.

    In this order, best.pt is never of steps that a kill has undone. Raises UserError.
    """
    progress.saved_at = progress.seconds
    if RANK != 0:
        return
    model = setup.model
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError("weights are not finite, and were not saved; use a lower --learning_rate")
    network = {"knobs": setup.asked["knobs"], "channels": setup.data.training.shape[1]}
    network |= {"scale": asdict(setup.data.scale)}
    network |= {"model": model.state_dict(), "step": progress.step, "network": sources.network()}
    states = [optimizer.state_dict() for optimizer in optimizers]
    state = network | {"progress": asdict(progress), "optimizers": states, "environment": setup.environment}
    checkpoint.save(folder / "last.pt", state)
    if progress.best_step == progress.step:
        checkpoint.save(folder / "best.pt", network)


def resume(folder, setup, progress, optimizers):
    """Continue from last.pt, if it is there → the progress. Raises UserError if it cannot be used."""
    path = folder / "last.pt"
    advice = "delete it" if (folder / "metrics.json").exists() else "delete it to start over"
    state = on_rank_0(lambda: checkpoint.load(path, advice) if path.exists() else None)
    print0(f"output    {folder}")
    if state is None:
        return progress
    checkpoint.load_weights(setup.model, state, path)
    progress = Progress(**state["progress"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    then, now = state["environment"], setup.environment
    changed = [f"{k} {now[k]} (was {then.get(k)})" for k in now if then.get(k) != now[k]]
    if not progress.has_ended:
        if changed:
            print0(f"resuming with {', '.join(changed)}: no longer bit-exact")
        print0(f"resuming at step {progress.step:,}")
    if RANK == 0 and progress.best_step == progress.step:
        best, advice = folder / "best.pt", "delete it; last.pt restores it"
        saved = best.exists() and checkpoint.load(best, advice)["step"]
        if saved != progress.step:  # it was killed before best.pt
            save(folder, setup, progress, optimizers)
    return progress


def load_best(folder, model):
    """Load the weights with the lowest MSE of the watched validation sequences → their training step."""
    path = folder / "best.pt"
    best = on_rank_0(checkpoint.load, path, f"delete it and {folder / 'last.pt'} to start over")
    checkpoint.load_weights(model, best, path)
    return best["step"]
