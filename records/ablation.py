"""The ablation, from the logs in ablation/ and ladder/:  python -m records.ablation

It prints both tables of README.md, and draws photos/ladder.png.
"""

import csv
import json
from pathlib import Path
from statistics import fmean as mean

import matplotlib.pyplot as plt

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
LADDER = {  # folder → (what it adds to the row above, what that does)
    "usual": ("starting point", "the paper's structure, two layers of 96 channels; untuned AdamW"),
    "muon": ("+ Muon", "an optimizer that makes each kernel's update orthogonal"),
    "feedback": ("+ feedback", "one stack reads the input, then its own forecasts; advection needs it"),
    "grow": ("+ growing horizon", "training begins with forecasts of one frame, and ends with ten"),
    "equivariant": (
        "+ equivariant kernels",
        "each feature is found in eight orientations, with the same weights",
    ),
    "dense": ("+ dense targets", "early in training, each of frames 6 to 20 is forecast from those before"),
    "motion": (
        "+ advection, block matching",
        "the head can move patches; the first layer reads how they moved",
    ),
    "head": ("+ hidden layers of the head", "two, before its output layer"),
    "overlay": (
        "+ overlays, dilation, weight decay",
        "other sequences are merged into each; kernels see farther",
    ),
    "default": ("+ SSIM in the loss (nearly the default)", "MSE rises, MAE falls, forecasts get sharper"),
    "paper": ("the paper's network", "with Muon and a growing horizon"),
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
    lines = ["Without | Test MSE | Rise | MAE", "---|---:|---:|---:"]
    rises = {name: rise(name) for name in LABELS}
    for name in ("default", *sorted(rises, key=rises.get, reverse=True)):
        mse, mae, _ = cells_of(read(name))
        words = f"{rises[name]:+.1f}".replace("-", "−") if name in rises else "–"
        lines.append(" | ".join((LABELS.get(name, "– (the older default)"), mse, words, mae)))
    return "\n".join(lines)


def ladder():
    lines = ["| Variant | Test MSE | MAE | SSIM | Minutes", "|---|---:|---:|---:|---:"]
    for name, (label, _) in LADDER.items():
        runs = read(name, "ladder")
        cells = " | ".join((label, *cells_of(runs), f"{float(runs[0]['minutes']):.1f}"))
        lines.append(f"| {cells}")  # a line that begins with + would be an item of a list
    return "\n".join(lines)


def picture():
    """The steps of the ladder as bars of test MSE."""
    names = [name for name in LADDER if name != "paper"]
    errors = [read(name, "ladder")[0]["mse_per_frame"] for name in names]
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    bars = axes.barh(range(len(names)), errors, height=0.62, color="#0b6e99")
    axes.bar_label(bars, [f"{error:.1f}" for error in errors], padding=4, fontsize=10)
    for y, name in enumerate(names):
        label, words = LADDER[name]
        axes.text(-2, y - 0.2, label, ha="right", va="center", fontsize=10.5, weight="bold")
        axes.text(-2, y + 0.24, words, ha="right", va="center", fontsize=9, color="#555555")
    axes.set_title("test MSE after one epoch; each row keeps all that is above it", fontsize=11)
    axes.set(xticks=[], yticks=[], ylim=(len(names) - 0.5, -0.5), xlim=(0, 1.08 * max(errors)))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


if __name__ == "__main__":
    print(f"{table()}\n\n{ladder()}")
    picture().savefig(HERE.parent / "photos" / "ladder.png", dpi=110)
