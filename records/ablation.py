"""The tables of the ablation, from the logs in ablation/ and ladder/, and two pictures in photos/.

python -m records.ablation
"""

import csv
import functools
import json
from pathlib import Path
from statistics import fmean as mean

from matplotlib.figure import Figure

import figures

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
    "usual": "the usual script",  # AdamW with learning rate 0.001, all ten frames from the start
    "muon": "+ Muon",
    "feedback": "+ feedback",
    "grow": "+ growing horizon",
    "equivariant": "+ equivariant kernels",
    "dense": "+ dense targets",
    "motion": "+ advection, block matching",
    "head": "+ hidden layers of the head",
    "overlay": "+ overlays, dilation, weight decay",
    "default": "+ SSIM in the loss (the default)",
    "paper": "the paper's network",  # --model paper: Muon, growing horizon
}
METRICS = {"mse_per_frame": 1, "mae_per_frame": 1, "ssim": 3}  # digits in the table


@functools.cache
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


def differences(name):
    """Test MSE minus the default's of the same seed, for each seed."""
    default = read("default")
    return [run["mse_per_frame"] - default[seed]["mse_per_frame"] for seed, run in read(name).items()]


def signed(rise):
    return f"{rise:+.1f}".replace("-", "−")


def ranking():
    return sorted(LABELS, key=lambda name: -mean(differences(name)))


def cells_of(runs):
    """A cell for each metric, with the values of all seeds."""
    return [", ".join(f"{run[metric]:.{n}f}" for run in runs.values()) for metric, n in METRICS.items()]


def table():
    lines = ["Without | Test MSE | Rise | MAE | SSIM", "---|---:|---:|---:|---:"]
    for name, label in {"default": "– (the default)", **{name: LABELS[name] for name in ranking()}}.items():
        mse, *others = cells_of(read(name))
        rise = "–" if name == "default" else signed(mean(differences(name)))
        lines.append(" | ".join((label, mse, rise, *others)))
    return "\n".join(lines)


def ladder():
    lines = ["| Variant | Test MSE | MAE | SSIM | Minutes |", "|---|---:|---:|---:|---:|"]
    for name, label in LADDER.items():
        runs = read(name, "ladder")
        cells = " | ".join((label, *cells_of(runs), f"{float(runs[0]['minutes']):.1f}"))
        lines.append(f"| {cells} |")  # a line that begins with + would be an item of a list
    return "\n".join(lines)


def draw(path, widest=15):
    """Left: the ladder. Right: the rise without each part, a dot for each seed, bars cut at `widest`."""
    names = ranking()[::-1]
    figure = Figure(figsize=(15, 0.9 + 0.32 * len(names)), layout="constrained")
    steps, axes = figure.subplots(1, 2)
    worths = [read(name, "ladder")[0]["mse_per_frame"] for name in LADDER]
    bars = steps.barh(list(LADDER.values())[::-1], worths[::-1], color="#0b6e99")
    steps.bar_label(bars, fmt="{:.1f}", padding=3, fontsize=9)
    steps.margins(x=0.1)
    steps.set_title("from the usual script to the default; the paper's network")
    steps.set_xlabel("test MSE after one epoch")
    rises = [mean(differences(name)) for name in names]
    axes.barh([LABELS[name] for name in names], [min(rise, widest) for rise in rises], color="#0b6e99")
    for y, (name, rise) in enumerate(zip(names, rises, strict=True)):
        seeds = [difference for difference in differences(name) if difference < widest]
        axes.plot(seeds, [y] * len(seeds), "o", color="#e08e0b", ms=4)
        if rise < widest:
            axes.text(max(0, *seeds) + 0.2, y, signed(rise), va="center", fontsize=9)
        else:
            words = f"{signed(rise)} →"
            axes.text(widest - 0.2, y, words, ha="right", va="center", fontsize=9, color="white")
    axes.axvline(0, color="black", lw=1)
    axes.set(xlim=(None, widest), title="an earlier default without one or more parts")
    axes.set_xlabel("rise of the test MSE (a dot: one seed)")
    for some in (steps, axes):
        some.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_comparison(path, names=("usual", "muon", "dense", "head", "default")):
    """Some rungs of the ladder side by side, as main.py draws several runs."""
    histories, curves, added = {}, {}, []
    for name, words in LADDER.items():
        added.append(words.removeprefix("+ "))
        if name not in names:
            continue
        folder, label = HERE / "ladder" / name, "+ " * bool(histories) + ", ".join(added)
        added = []
        rows = csv.DictReader((folder / "log.csv").read_text("utf-8").splitlines())
        keys = "sequences", "minutes", "val_loss"
        histories[label] = [{key: float(row[key]) for key in keys} for row in rows if row["val_loss"]]
        results = json.loads((folder / "metrics.json").read_text("utf-8"))
        curves[label] = results["scores"]["my_model"]["mse_per_frame"]["per_frame"]
    for name in figures.LABELS:
        curves[name] = results["scores"][name]["mse_per_frame"]["per_frame"]
    path.write_bytes(figures.compare(histories, curves, "stand-in array, test split, 1,000 sequences"))


if __name__ == "__main__":
    print(f"{table()}\n\n{ladder()}")
    draw(HERE.parent / "photos" / "ablation.png")
    draw_comparison(HERE.parent / "photos" / "compare.png")
