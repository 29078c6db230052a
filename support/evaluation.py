"""Score a forecast on a split and on harder cases, and compare runs. Each process scores a part.

A forecast is a function (past, n) → (prediction in [0, 1], logits or None). Frames are (B, T, C, H, W).
"""

import csv
import json
import math
from typing import NamedTuple

import numpy as np
import torch

import figures
import metrics
import moving_mnist
from support import UserError
from support.checkpoint import lock_folder, write_atomic
from support.distributed import RANK, WORLD_SIZE, all_reduce, print0
from support.folders import describe_changes, read_configs

CROSS_ENTROPY = "cross_entropy_per_sequence"
CURVES = tuple(name for name in metrics.METRICS if name != CROSS_ENTROPY)
BASELINES = {who: lambda past, n, who=who: (getattr(metrics, who)(past, n), None) for who in figures.LABELS}
N_BEYOND = 100  # sequences of each case beyond training


class Task(NamedTuple):
    """What is scored: a forecast, and how many frames it reads and forecasts."""

    forecast: object
    frames_in: int
    frames_out: int
    device: torch.device


def split_frames(frames, frames_in, frames_out, device="cpu"):
    """uint8 sequences → (past, truth) in [0, 1]."""
    frames = frames[:, : frames_in + frames_out].to(device).float() / 255
    return frames[:, :frames_in], frames[:, frames_in:]


def evaluate(task, dataset, names, index=None):
    """name → metrics.<name> of each sequence of the dataset, or of those in index: (N, T).

    The cross-entropy has one value per sequence: (N, 1). Raises UserError for a metric of another shape.
    """
    index = np.arange(len(dataset)) if index is None else index
    widths = {name: 1 if name == CROSS_ENTROPY else task.frames_out for name in names}
    found = {name: torch.zeros(len(index), width).double() for name, width in widths.items()}
    mine = np.arange(len(index))[RANK::WORLD_SIZE]
    at_once = max(1, min(20, 20 * 64 * 64 // math.prod(dataset.shape[1:])))  # fewer of large frames
    for start in range(0, len(mine), at_once):
        some = mine[start : start + at_once]
        past, truth = split_frames(dataset[index[some]], *task[1:])
        prediction, logits = task.forecast(past, task.frames_out)
        for name, width in widths.items():
            value = getattr(metrics, name)(logits if name == CROSS_ENTROPY else prediction, truth)
            value = torch.as_tensor(value).cpu().double()
            if value.shape != (len(some), width):
                words = f"metrics.{name} gives values of shape {tuple(value.shape)}"
                raise UserError(f"{words}; expected {len(some), width}")
            found[name][some] = value
    return {name: all_reduce(values, task.device).cpu() for name, values in found.items()}


def mse_curve(task, dataset, index=None):
    return evaluate(task, dataset, ["mse_per_frame"], index)["mse_per_frame"].mean(0).tolist()


def score(name, task, dataset):
    """Returns (scores, ranking).

    scores: model or baseline → metric → unit, mean and curve, as in metrics.json. ranking: the numbers of the
    sequences, the best forecast first.
    """
    finite = lambda value: float(value) if value.isfinite() else None  # JSON cannot hold an infinite PSNR
    scores = {}
    for who, forecast in {name: task.forecast, **BASELINES}.items():
        names = CURVES if who in BASELINES else (*CURVES, CROSS_ENTROPY)
        found = evaluate(task._replace(forecast=forecast), dataset, names)
        if who == name:
            ranking = found["mse_per_frame"].mean(1).argsort(stable=True)
        means = {key: values.mean(0) for key, values in found.items()}
        scores[who] = {
            key: {"unit": unit, "mean": finite(means[key].mean()), "per_frame": list(map(finite, means[key]))}
            for key, (_, unit) in metrics.METRICS.items()
            if key in means
        }
    return scores, ranking


def describe_split(results):
    split = "all" if results["split"] == "all" else f"{results['split']} split,"
    return f"{results['data']}, {split} {results['sequences']:,} sequences"


def table_cells(scores, missing):
    """The mean of each metric, in the order of metrics.METRICS, as text."""
    means = (scores[name]["mean"] if name in scores else None for name in metrics.METRICS)
    to_text = lambda mean: f"{mean:.0f}" if mean >= 1000 else f"{mean:#.4g}"
    return [missing if mean is None else to_text(mean) for mean in means]


def report(results):
    """metrics.json as lines for people."""
    title = f"{describe_split(results)}, mean over {results['frames_out']} forecast frames"
    title += " (cross-entropy: sum; SSIM*: OpenSTL's)"
    width = 1 + max(map(len, metrics.HEADINGS))
    lines = [title, " " * 18 + "".join(f"{name:>{width}}" for name in metrics.HEADINGS)]
    for who, scores in results["scores"].items():
        cells = table_cells(scores, "-")
        lines.append(f"{figures.LABELS.get(who, who):18}" + "".join(f"{cell:>{width}}" for cell in cells))
    mse = {who: scores["mse_per_frame"]["mean"] for who, scores in results["scores"].items()}
    better = [who for who in BASELINES if mse[who] < mse[results["model"]]]
    better = [f"{figures.LABELS[who]} ({mse[who]:.1f})" for who in better]
    if better:
        lines.append(f"No good forecast yet: the MSE is above that of {', '.join(better)}.")
    if beyond := results.get("beyond"):
        names = list(next(iter(beyond.values())))
        lines += ["", f"beyond training, MSE of {N_BEYOND} generated sequences with test digits"]
        lines.append(" " * 18 + "".join(f"{figures.LABELS.get(name, name):>20}" for name in names))
        for case, curves in beyond.items():
            lines.append(f"{case:18}" + "".join(f"{np.mean(curves[name]):>20.1f}" for name in names))
    lines += ["", "weights   of training step {step:,}, hash {weights}".format(**results)]
    if mse := results.get("validation_mse"):
        lines[-1] += f", validation MSE {mse:.2f} (to choose between runs)"
    return "\n".join(lines)


def draw_samples(folder, task, dataset, title):
    """predict_1.png … predict_4.png and predict.gif, of the same four sequences every time."""
    index = np.linspace(0, len(dataset) - 1, 4).astype(int)
    named = {f"predict_{k}": (i, f"sequence {i + 1} of {len(dataset):,}") for k, i in enumerate(index, 1)}
    past, truth, prediction = draw_named(folder, task, dataset, named, title)
    write_atomic(folder / "predict.gif", figures.animation(past[0], truth[0], prediction[0], title))


def draw_ranked(folder, task, dataset, ranking, title):
    """predict_best.png, predict_median.png, predict_worst.png, so that nobody has to trust a lucky sample.

    And predict_last_frame.png: the last frame, the hardest, of ten forecasts from the best to the worst.
    """
    n, named = len(ranking), {}
    for name, k in {"best": 0, "median": n // 2, "worst": n - 1}.items():
        named[f"predict_{name}"] = int(ranking[k]), f"the {name} of {n:,} sequences"
    draw_named(folder, task, dataset, named, title)
    index = ranking[np.linspace(0, n - 1, min(n, 10)).astype(int)].numpy()
    past, truth = split_frames(dataset[index], task.frames_in, task.frames_out)
    # one at a time, so that large ones fit in memory
    all_frames = [task.forecast(one[None].to(task.device), task.frames_out)[0][0].cpu() for one in past]
    errors = [describe_error(f, t) for f, t in zip(all_frames, truth, strict=True)]
    last = torch.stack([frames[-1] for frames in all_frames])
    rows = {"truth": ([f"sequence {i + 1:,}" for i in index], truth[:, -1]), "forecast": (errors, last)}
    title += f": last frames, from the best forecast to the worst (MSE: all {task.frames_out} frames)"
    write_atomic(folder / "predict_last_frame.png", figures.grid(rows, title))


def draw_named(folder, task, dataset, named, title):
    """<name>.png of each; named: name → (index in the dataset, words for the title)."""
    index = np.array([i for i, _ in named.values()])
    past, truth = split_frames(dataset[index], task.frames_in, task.frames_out)
    prediction = task.forecast(past.to(task.device), task.frames_out)[0].cpu()
    for (name, (_, words)), p, t, f in zip(named.items(), past, truth, prediction, strict=True):
        picture = figures.prediction(p, t, f, f"{title}: {words}, {describe_error(f, t)}")
        write_atomic(folder / f"{name}.png", picture)
    return past, truth, prediction


def describe_error(forecast, truth):
    """The MSE of one sequence, (T, C, H, W), in words."""
    return f"MSE {(forecast - truth).square().sum() / len(truth):.0f}"


def score_beyond_training(folder, name, task, patch_size):
    """Score and draw cases unlike the training data. Returns case → model or baseline → MSE of each frame.

    Three digits, more frames, a larger canvas; the sequences are generated from MNIST's test digits.
    """
    try:
        digits = moving_mnist.read_digits(moving_mnist.RAW / "digits_test.png")
    except UserError as error:  # no reason to lose the scores of the test split
        print0(f"cannot score the cases beyond training: {error}")
        return {}
    n, large = task.frames_out, max(96, 64 + patch_size)  # it can be cut into patches where 64 can
    cases = {
        f"{3 * n} frames": (3 * n, {}),
        "three digits": (n, {"n_digits": 3}),
        # on the larger canvas, a digit moves as many pixels per frame as on 64×64
        f"{large}×{large} pixels": (n, {"size": large, "step": 0.1 * (64 - 28) / (large - 28)}),
    }
    forecasts, results = {name: task.forecast, **BASELINES}, {}
    for case, (length, options) in cases.items():
        longer = task._replace(frames_out=length)
        try:
            frames = moving_mnist.generate(digits, N_BEYOND, 0, task.frames_in + length, **options)
            dataset = moving_mnist.MovingMNIST(frames.swapaxes(0, 1))
            curves = {who: mse_curve(longer._replace(forecast=f), dataset) for who, f in forecasts.items()}
        except Exception as error:  # an edited network, or no memory
            if WORLD_SIZE > 1:
                raise  # the other processes wait for this one
            print0(f"cannot score the case {case}: {error!r:.200}")
            continue
        shorter = {"as in training": n, f"{2 * n} frames": 2 * n} if length > n else {}
        for part, end in {**shorter, case: length}.items():  # a long forecast begins with the short ones
            results[part] = {who: values[:end] for who, values in curves.items()}
        if RANK == 0:  # the first sequence, as good or bad as it happens to be
            named = {f"beyond_{case.replace(' ', '_').replace('×', 'x')}": (0, "never trained on")}
            draw_named(folder, longer, dataset, named, f"{name}, {case}")
    if RANK == 0 and results:
        panels = {case: results[case] for case in cases if case in results}
        write_atomic(folder / "beyond.png", figures.per_frame(panels))
    return results


SAME_TASK = ("data_tested", "split", "sequences", "first_sequence", "frames_in", "frames_out")


def read_run(folder, config, latest, shape):
    """What a comparison needs of a run: config, metrics, first forecast, label, history.

    Raises an error if it was tested on something else than the latest run, or cannot stand in a table.
    """
    reserved = "input", "truth", *figures.LABELS, *figures.LABELS.values()
    is_hidden = folder.name[0] == "_"  # by matplotlib
    label = f"run {folder.name}" if is_hidden or folder.name in reserved else folder.name
    run = {**config, "folder": folder, "label": label}
    run |= json.loads((folder / "metrics.json").read_text("utf-8"))
    run["first_forecast"] = np.load(folder / "forecast.npy", allow_pickle=False) / 255
    run["is_trained"] = not config["asked"]["knobs"]["eval_only"]
    run["curve"] = np.array(run["scores"][run["model"]]["mse_per_frame"]["per_frame"], float)
    lines = (folder / "log.csv").read_text("utf-8").splitlines() if run["is_trained"] else []
    rows = (row for row in csv.DictReader(lines) if row["val_loss"])
    run["history"] = [{k: float(row[k]) for k in ("sequences", "minutes", "val_loss")} for row in rows]
    fits = all(run[key] == latest[key] for key in SAME_TASK)
    if not (fits and run["first_forecast"].shape == shape and len(run["curve"]) == shape[0]):
        raise ValueError("tested on something else")
    comparison_table([run], {}, [])  # raises for what cannot stand in the table
    return run


def compare_runs(out, latest, first_sequence):
    """compare.png, compare_strip.png and compare.md in `out`, of all its runs tested on the same data.

    latest: the metrics.json of one of them. first_sequence: of the test split, (T, C, H, W) uint8.
    A single run is not compared. Weights that were only scored are left out if training gave the same scores.
    """
    with lock_folder(out, wait=True):  # of two runs that end at once, the second sees both
        runs, left_out, configs = [], [], read_configs(out)
        shape = latest["frames_out"], *first_sequence.shape[1:]
        for path in sorted(out.glob("*/metrics.json")):
            try:
                runs.append(read_run(path.parent, configs[path.parent.name], latest, shape))
            except Exception:  # half there, of another version, or damaged: reading may raise anything
                left_out.append(path.parent.name)
        found = lambda run: (run["weights"], table_cells(run["scores"][run["model"]], "–"))
        trained = [found(run) for run in runs if run["is_trained"]]
        runs = [run for run in runs if run["is_trained"] or found(run) not in trained]
        if len(runs) < 2:
            return
        runs.sort(key=lambda run: run["started"])
        label_runs(runs)
        baselines = {who: latest["scores"][who] for who in figures.LABELS}
        ranked = sorted(runs, key=lambda run: (run.get("validation_mse") or np.inf, run["curve"].mean()))
        write_atomic(out / "compare.md", comparison_table(ranked, baselines, left_out).encode())
        title = describe_split({**latest, "data": latest["data_tested"]})
        histories = {run["label"]: run["history"] for run in runs}
        curves = {run["label"]: run["curve"] for run in runs}
        curves |= {who: scores["mse_per_frame"]["per_frame"] for who, scores in baselines.items()}
        write_atomic(out / "compare.png", figures.compare(histories, curves, title))
        n = latest["frames_in"]
        rows = {"input": (1, first_sequence[:n] / 255)}
        rows["truth"] = n + 1, first_sequence[n:][: latest["frames_out"]] / 255
        rows |= {run["label"]: (n + 1, run["first_forecast"]) for run in runs}
        write_atomic(out / "compare_strip.png", figures.grid(rows, f"{title}: the first sequence"))


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


def comparison_table(runs, baselines, left_out):
    columns = "parameters", "sequences", "minutes", "validation MSE", *metrics.HEADINGS
    lines = [f"# {describe_split({**runs[0], 'data': runs[0]['data_tested']})}", ""]
    lines += ["Mean over the forecast frames; cross-entropy: sum. Units: `metrics.json`. SSIM*: OpenSTL's."]
    lines += ["After a name: what differs from the earliest run of its model."]
    lines += ["Sorted by validation MSE: choose by it, between runs trained on the same data."]
    lines += ["All other scores are of test data.", ""]
    lines += [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for run in runs:
        seen, minutes = "–", "–"
        if run["history"]:
            seen, minutes = f"{run['history'][-1]['sequences']:,.0f}", f"{run['history'][-1]['minutes']:.1f}"
        mse = run.get("validation_mse")  # None: the weights were only scored
        cells = [f"{run['parameters']:,}", seen, minutes, f"{mse:.2f}" if mse else "–"]
        cells += table_cells(run["scores"][run["model"]], "–")
        label = run["label"].replace("|", "\\|")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    for who, scores in baselines.items():
        lines.append(f"| {figures.LABELS[who]} | – | – | – | – | {' | '.join(table_cells(scores, '–'))} |")
    if left_out:
        words = "Left out, as tested on something else, damaged, or of another version"
        lines += ["", f"{words}: {', '.join(left_out)}."]
    return "\n".join([*lines, ""])
