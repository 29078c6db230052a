"""Models side by side: every folder under `out` that has results on the same data."""

import csv
import json

import numpy as np

import figures
import metrics
from checkpoint import publish, sweep
from evaluate import cells, what

COST = ("parameters", "sequences seen", "minutes", "sequences/s")
SAME = ("data", "split", "sequences", "first_sequence", "frames_in", "frames_out")  # or nothing can be compared


def read(folder):
    """metrics.json of a folder, and what its training cost."""
    run = json.loads((folder / "metrics.json").read_text("utf-8"))
    run["forecast"] = np.load(folder / "forecast.npy", allow_pickle=False) / 255
    run["history"] = []
    if (folder / "log.csv").exists():  # weights that were only evaluated have none
        texts = ((folder / name).read_text("utf-8") for name in ("log.csv", "timing.csv"))
        logs = (csv.DictReader(text.splitlines()) for text in texts)
        for row, timing in zip(*logs, strict=True):
            run["history"].append({key: float((row | timing)[key]) for key in ("sequences", "minutes", "val_loss")})
    return run


def cost(run):
    if not run["history"]:
        return [f"{run['parameters']:,}", *"–––"]
    seen, minutes = run["history"][-1]["sequences"], run["history"][-1]["minutes"]
    speed = f"{seen / minutes / 60:.1f}" if minutes else "–"
    return [f"{run['parameters']:,}", f"{seen:,.0f}", f"{minutes:.1f}", speed]


def compare(out, latest, first_sequence):
    """compare.png, compare_strip.png and compare.md in `out`, of its folders whose results are of latest's kind.

    first_sequence: of the test split, (T, C, H, W) uint8. Nothing is written where there is only one folder.
    """
    runs, rows, curves, others = {}, {}, {}, []
    shape = latest["frames_out"], *first_sequence.shape[1:]
    first = lambda folder: (folder.name != "my_model", folder.name)  # the same colour as in its own pictures
    for folder in sorted((path.parent for path in out.glob("*/metrics.json")), key=first):
        if not folder.name.isprintable():  # it may be no UTF-8, and compare.md could not hold it
            others.append(ascii(folder.name))
            continue
        try:
            run = read(folder)
            score = run["scores"][run["model"]]
            row, curve = [*cost(run), *cells(score, "–")], np.array(score["mse_per_frame"]["per_frame"], float)
            same = all(run[key] == latest[key] for key in SAME)
            same = same and (run["forecast"].shape, curve.shape) == (shape, shape[:1])
        except Exception:  # half there, of another version of this script, or damaged, which may raise anything
            same = False
        if same:
            runs[folder.name], rows[folder.name], curves[folder.name] = run, row, curve
        else:
            others.append(folder.name)
    sweep(out, "compare*", 60)  # another run that writes now needs no minute
    if len(runs) < 2:
        return
    title = what(latest)
    for who in figures.LABELS:
        score = latest["scores"][who]
        rows[who], curves[who] = [*"––––", *cells(score, "–")], score["mse_per_frame"]["per_frame"]
    words = "Mean over the forecast frames; `metrics.json` has the units, and SSIM* is OpenSTL's."
    columns = *COST, *metrics.HEADINGS
    lines = [f"# {title}", "", words, "", f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {figures.LABELS.get(name, name)} | {' | '.join(row)} |" for name, row in rows.items()]
    if others:
        lines += ["", f"Left out, as they do not fit together with these: {', '.join(others)}."]
    publish(out / "compare.md", "\n".join([*lines, ""]).encode())

    histories = {name: run["history"] for name, run in runs.items()}
    figures.compare(out / "compare.png", histories, curves, latest["validation"], title)
    cut = latest["frames_in"]
    past, truth = first_sequence[:cut] / 255, first_sequence[cut:][: latest["frames_out"]] / 255
    strips = {"input": (1, past), "truth": (cut + 1, truth)}
    strips |= {name: (cut + 1, run["forecast"]) for name, run in runs.items()}
    figures.grid(out / "compare_strip.png", strips, f"{title}: the first")
