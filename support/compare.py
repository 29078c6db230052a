"""Runs side by side: compare.md and compare*.png, of all runs tested on the same data."""

import contextlib
import csv

import numpy as np
import torch

import figures
import metrics
from support.checkpoint import lock_folder, write_atomic
from support.folders import describe_changes, read_configs, read_json
from support.scale import Scale
from support.score import BASELINES

SAME_TASK = "data_tested", "scale", "split", "sequences", "first_sequence", "frames_in", "frames_out"


def table(heads, rows):
    """Lines of Markdown, whose columns stand one below the other in a terminal, too. Cells are texts."""
    columns = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    dashes = ["-" * columns[0], *("-" * (width - 1) + ":" for width in columns[1:])]
    lines = []
    for first, *others in (heads, dashes, *rows):
        cells = [text.rjust(width) for text, width in zip(others, columns[1:], strict=True)]
        lines.append("| " + " | ".join([first.ljust(columns[0]), *cells]) + " |")
    return "\n".join(lines)


def headings(results):
    """Of the columns of score_cells."""
    n = len(results["scores"][results["model"]].get("rmse", ()))  # of your own data only
    channels = ["RMSE"] if n == 1 else [f"RMSE {k + 1}" for k in range(n)]
    return [*(heading for heading, _ in metrics.METRICS.values()), *channels, *["skill"] * (n > 0)]


def explain(results):
    """What the columns of score_cells mean."""
    text = "cross-entropy: sum; SSIM*: OpenSTL's"
    if "rmse" in results["scores"][results["model"]]:
        text += "; RMSE: in units of the data; skill: 1 - MSE / MSE of the last frame copied"
    return text


def skill(scores, reference):
    """1 - MSE / MSE of the reference; None where that is 0."""
    mse, other = (values["mse_per_frame"]["mean"] for values in (scores, reference))
    return 1 - mse / other if other else None


def score_cells(results, who):
    """The mean of each metric, in the order of metrics.METRICS, as text.

    Of your own data, also the RMSE of each channel, in units of the data, and the skill: 1 - MSE / MSE of the
    last frame copied.
    """
    scores, cells = results["scores"][who], []
    for name in metrics.METRICS:
        mean = scores[name]["mean"] if name in scores else None
        cells.append("–" if mean is None else f"{mean:.0f}" if mean >= 1000 else f"{mean:#.4g}")
    if "rmse" in scores:
        cells += ["–" if error is None else f"{error:.4g}" for error in scores["rmse"]]
        cells += ["–" if scores["skill"] is None else f"{scores['skill']:.3f}"]
    return cells


def describe_split(results):
    split = "all" if results["split"] == "all" else f"{results['split']} split,"
    return f"{results['data_tested']}, {split} {results['sequences']:,} sequences"


def compare_runs(out, latest, first_sequence):
    """Write the comparison into `out`. A single run is not compared.

    latest: the metrics.json of one of the runs. first_sequence: of the test split, (T, C, H, W), scaled.
    """
    with lock_folder(out, wait=True):  # of two runs that end at once, the second sees both
        runs = []
        for name, config in read_configs(out).items():
            # one that has not ended, is damaged, or of another version: reading may raise anything
            with contextlib.suppress(Exception):
                runs.append(read_run(out / name, config, latest, first_sequence.shape))
        scored = {path.parent.name for path in out.glob("*/metrics.json")}
        left_out = sorted(scored - {run["folder"].name for run in runs})
        trained = [(run["weights"], run["cells"][4:]) for run in runs if run["is_trained"]]
        is_twin = lambda run: not run["is_trained"] and (run["weights"], run["cells"][4:]) in trained
        runs = [run for run in runs if not is_twin(run)]
        if len(runs) < 2:
            return
        label_runs(runs)
        for run in runs:
            run["label"] += "" if run["metrics"] == latest["metrics"] else " (scored by another metrics.py)"
        title = describe_split(latest)
        baselines = {who: latest["scores"][who] for who in BASELINES if who in latest["scores"]}
        write_atomic(out / "compare.md", comparison(title, runs, latest, baselines, left_out).encode())
        histories = {run["label"]: run["history"] for run in runs}
        curves = {run["label"]: run["curve"] for run in runs}
        curves |= {who: scores["mse_per_frame"]["per_frame"] for who, scores in baselines.items()}
        picture = figures.compare(histories, curves, latest["data_tested"])
        write_atomic(out / "compare.png", picture)
        n = latest["frames_in"]
        for end, channels, values in Scale.of(latest["scale"]).pictures():
            rows = {"input": (1, first_sequence[:n, channels])}
            rows["truth"] = n + 1, first_sequence[n:][: latest["frames_out"], channels]
            rows |= {run["label"]: (n + 1, run["first_forecast"][:, channels]) for run in runs}
            picture = figures.grid(rows, f"{title}: the first sequence", values=values)
            write_atomic(out / f"compare_strip{end}.png", picture)


def read_run(folder, config, latest, shape):
    """What a comparison needs of a run. Raises ValueError if it was tested on something else."""
    run = {**config, "folder": folder, "label": folder.name, **read_json(folder / "metrics.json")}
    forecast = torch.from_numpy(np.load(folder / "forecast.npy", allow_pickle=False))
    run["first_forecast"] = Scale.of(run["scale"]).to_unit(forecast).numpy()
    run["is_trained"] = not config["asked"]["knobs"]["eval_only"]
    run["curve"] = np.array(run["scores"][run["model"]]["mse_per_frame"]["per_frame"], float)  # None is NaN
    run["cells"] = [f"{run['parameters']:,}", "–", "–", "–", *score_cells(run, run["model"])]
    run["history"] = []
    if run["is_trained"]:
        lines = (folder / "log.csv").read_text("utf-8").splitlines()
        rows = [row for row in csv.DictReader(lines) if row["val_loss"]]
        run["history"] = [
            {k: float(row[k]) for k in ("sequences", "minutes", "val_mse_per_frame")} for row in rows
        ]
        seen, minutes = run["history"][-1]["sequences"], run["history"][-1]["minutes"]
        run["cells"][1:4] = f"{seen:,.0f}", f"{minutes:.1f}", f"{run['validation_mse']:#.4g}"
    same = all(run[key] == latest[key] for key in SAME_TASK) and len(run["curve"]) == latest["frames_out"]
    if not same or run["first_forecast"].shape != (latest["frames_out"], *shape[1:]):
        raise ValueError("tested on something else")
    return run


def label_runs(runs):
    """Extend labels by what differs from the first run of the model. runs: in the order of their start."""
    first = {}
    for run in (run for run in runs if run["is_trained"]):
        before = first.setdefault(run["model"], run)
        changes = describe_changes(run["asked"], before["asked"], before["folder"], run["folder"])
        if not run["label"].startswith(run["model"]):
            changes.append(f"model {run['model']}")
        if changes:
            run["label"] += f": {', '.join(changes)}"


def comparison(title, runs, latest, baselines, left_out):
    """compare.md."""
    lines = [f"# {title}", ""]
    lines += [f"Mean over the forecast frames ({explain(latest)}). Other units: `metrics.json`."]
    lines += ["After a name: what differs from the earliest run of its model."]
    lines += ["Sorted by validation MSE: choose by it, between runs trained on the same data."]
    lines += ["All other scores are of test data.", ""]
    ranked = sorted(runs, key=lambda run: (run["validation_mse"] or np.inf, np.nanmean(run["curve"])))
    rows = [[run["label"].replace("|", "\\|"), *run["cells"]] for run in ranked]
    rows += [[figures.LABELS[who], *["–"] * 4, *score_cells(latest, who)] for who in baselines]
    lines += [table(["", "parameters", "sequences", "minutes", "validation MSE", *headings(latest)], rows)]
    if left_out:
        lines += [
            "",
            f"Left out, as tested on something else, damaged, or of another version: {', '.join(left_out)}.",
        ]
    return "\n".join([*lines, ""])
