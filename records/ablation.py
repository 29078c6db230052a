"""The tables of the ablation, from the logs in ablation/ and ladder/:  python -m records.ablation"""

import csv
import json
from pathlib import Path
from statistics import fmean as mean

HERE = Path(__file__).parent
LABELS = {  # folder, with _s1 and _s2 of other seeds → what is left out of the default
    "adamw": "Muon",  # AdamW with learning rate 0.001 instead, without weight decay
    "no_feedback": "feedback + advection + block matching",
    "no_grow": "growing horizon + dense targets + overlays",  # all ten frames from the start
    "free": "equivariant kernels",  # and learning rate 0.04, which suits the others
    "no_dense": "dense targets",
    "no_reach": "advection",
    "no_search": "block matching",
    "no_overlay": "overlays",
    "head_0": "hidden layers of the head",
    "dilation_1": "dilation of the second layer",
    "head_1": "second hidden layer of the head",
    "no_decay": "weight decay",
    "sheets_1": "second moved copy",
    "no_peephole": "peepholes",
    "forget_0": "forget biases of 1",
    "no_ssim": "SSIM in the loss",
}
LADDER = {  # folder → what it adds to the row above
    "usual": "starting point",  # AdamW with learning rate 0.001, all ten frames from the start
    "muon": "+ Muon",
    "feedback": "+ feedback",
    "grow": "+ growing horizon",
    "equivariant": "+ equivariant kernels",
    "dense": "+ dense targets",
    "motion": "+ advection, block matching",
    "head": "+ hidden layers of the head",
    "overlay": "+ overlays, dilation, weight decay",
    "default": "+ SSIM in the loss (an earlier default)",
    "paper": "the paper's network",  # --model paper: Muon, growing horizon
}
METRICS = {"mse_per_frame": 1, "mae_per_frame": 1, "ssim": 3}  # digits in the table


def read(name, group="ablation"):
    """The scores of a run with each seed that there is: seed → metric → mean."""
    folders = {seed: HERE / group / f"{name}{f'_s{seed}' * (seed > 0)}" for seed in range(3)}
    found = {}
    for seed, folder in folders.items():
        if folder.exists():
            results = json.loads((folder / "metrics.json").read_text("utf-8"))
            scores = results["scores"][results["model"]]
            found[seed] = {metric: scores[metric]["mean"] for metric in METRICS}
            *_, last = csv.DictReader((folder / "log.csv").read_text("utf-8").splitlines())
            found[seed]["minutes"] = last.get("minutes")  # not in older logs
    return found


def rise(name):
    """Test MSE minus the default's of the same seed, mean over seeds."""
    default = read("default")
    return mean(run["mse_per_frame"] - default[seed]["mse_per_frame"] for seed, run in read(name).items())


def cells_of(runs):
    """A cell for each metric, with the values of all seeds."""
    return [", ".join(f"{run[metric]:.{n}f}" for run in runs.values()) for metric, n in METRICS.items()]


def table():
    lines = ["Without | Test MSE | Rise | MAE | SSIM", "---|---:|---:|---:|---:"]
    rises = {name: rise(name) for name in LABELS}
    for name in ("default", *sorted(rises, key=rises.get, reverse=True)):
        mse, *others = cells_of(read(name))
        words = f"{rises[name]:+.1f}".replace("-", "−") if name in rises else "–"
        lines.append(" | ".join((LABELS.get(name, "– (the older default)"), mse, words, *others)))
    return "\n".join(lines)


def ladder():
    lines = ["| Variant | Test MSE | MAE | SSIM | Minutes", "|---|---:|---:|---:|---:"]
    for name, label in LADDER.items():
        runs = read(name, "ladder")
        cells = " | ".join((label, *cells_of(runs), f"{float(runs[0]['minutes']):.1f}"))
        lines.append(f"| {cells}")  # a line that begins with + would be an item of a list
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"{table()}\n\n{ladder()}")
