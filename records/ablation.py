"""The table of the ablation, from the logs in ablation/, and its picture:  python records/ablation.py"""

import csv
import functools
import json
from pathlib import Path
from statistics import fmean as mean

from matplotlib.figure import Figure

HERE = Path(__file__).parent
LABELS = {  # folder, with _s1 and _s2 of other seeds → what is left out of the default
    "adamw": "Muon",  # AdamW with learning rate 0.001 instead
    "no_feedback": "feedback + motion",
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
    "sheets_1": "second motion layer",
    "no_peephole": "peepholes",
    "forget_0": "forget gates that start open",
    "no_ssim": "SSIM in the loss",
}
METRICS = {"mse_per_frame": 1, "mae_per_frame": 1, "ssim": 3, "validation MSE": 1}  # digits in the table


@functools.cache
def read(name):
    """The scores of a run with each seed that there is: seed → metric → mean."""
    folders = {seed: HERE / "ablation" / f"{name}{f'_s{seed}' * (seed > 0)}" for seed in range(3)}
    found = {}
    for seed, folder in folders.items():
        if folder.exists():
            scores = json.loads((folder / "metrics.json").read_text("utf-8"))["scores"]["my_model"]
            found[seed] = {metric: scores[metric]["mean"] for metric in METRICS if metric in scores}
            *_, last = csv.DictReader((folder / "log.csv").read_text("utf-8").splitlines())
            found[seed]["validation MSE"] = float(last["val_mse_per_frame"])
    return found


def differences(name):
    """Test MSE minus the default's of the same seed, for each seed."""
    default = read("default")
    return [run["mse_per_frame"] - default[seed]["mse_per_frame"] for seed, run in read(name).items()]


def ranking():
    return sorted(LABELS, key=lambda name: -mean(differences(name)))


def table():
    lines = ["Without | Seeds | Test MSE | adds | MAE | SSIM | Validation MSE"]
    lines.append("---|---|---:|---:|---:|---:|---:")
    for name, label in {"default": "– (the default)", **{name: LABELS[name] for name in ranking()}}.items():
        runs = read(name)
        cells = [", ".join(map(str, runs))]
        for metric, digits in METRICS.items():
            cells.append(", ".join(f"{run[metric]:.{digits}f}" for run in runs.values()))
        cells.insert(2, "–" if name == "default" else f"{mean(differences(name)):+.1f}")
        lines.append(f"{label} | {' | '.join(cells)}")
    return "\n".join(lines)


def draw(path, widest=15):
    """A bar for each row: the mean over the seeds, a dot for each seed. Bars are cut at `widest`."""
    names = ranking()[::-1]
    figure = Figure(figsize=(9.5, 0.9 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    for y, name in enumerate(names):
        worth = mean(differences(name))
        axes.barh(y, min(worth, widest), color="#0b6e99")
        seeds = [difference for difference in differences(name) if difference < widest]
        axes.plot(seeds, [y] * len(seeds), "o", color="#e08e0b", ms=4)
        if worth < widest:
            axes.text(max(0, *differences(name)) + 0.15, y, f"{worth:+.1f}", va="center", fontsize=9)
        else:
            look = {"va": "center", "ha": "right", "fontsize": 9, "color": "white"}
            axes.text(widest - 0.15, y, f"{worth:+.1f} →", **look)
    axes.axvline(0, color="black", lw=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes.set(xlim=(None, widest), xlabel="what leaving a part out adds to the test MSE (dots: seeds)")
    figure.savefig(path, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    print(table())
    draw(HERE.parent / "photos" / "ablation.png")
