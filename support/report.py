"""Scores → metrics.json, tables, pictures, and the comparison of runs. Only the first process writes."""

import csv
import hashlib
import io
import json
import shlex
from pathlib import Path

import cv2
import numpy as np
import torch

import figures
from own_data import is_own
from support import checkpoint, sources
from support.checkpoint import make_folder, open_atomic, write_atomic
from support.compare import compare_runs, describe_split, explain, headings, score_cells, skill, table
from support.devices import RANK, on_rank_0, print0
from support.folders import read_json
from support.score import (
    BASELINES,
    CROSS_ENTROPY,
    CURVES,
    MEAN_SQUARES,
    predict,
    score,
    split_frames,
    summary,
)

WATCHED = 100  # validation sequences, evenly chosen, that every evaluation scores


def evaluate(setup, folder, progress):
    """Validate, log and redraw the pictures. Notes in progress whether these weights are the best so far."""
    data, knobs = setup.data, setup.knobs
    watched = np.linspace(0, len(data.validation) - 1, min(len(data.validation), WATCHED)).astype(int)
    if not progress.baselines:
        found = baselines(setup, folder, data.validation, ["mse_per_frame"], watched)
        progress.baselines = {who: scores["mse_per_frame"]["mean"] for who, scores in found.items()}
        levels = [f"{figures.LABELS[who]} {mse:#.4g}" for who, mse in progress.baselines.items()]
        print0(f"baselines {', '.join(levels)} (validation MSE, to compare with those below)")
    row = progress.history[-1]
    try:
        scores = score(setup, data.validation, ("mse_per_frame", CROSS_ENTROPY), index=watched)
    except FloatingPointError as error:  # the loss was finite, but not the weights after it
        fault, step = f"forecasts that are not finite ({error})", progress.step - 1
        raise progress.diverged(fault, row["learning_rate"], step) from error
    n_pixels = knobs.frames_out * np.prod(data.validation.shape[1:])
    row["val_loss"] = float(scores[CROSS_ENTROPY].mean() / n_pixels)
    row["val_mse_per_frame"] = float(scores["mse_per_frame"].nanmean())
    row["val_sequences"] = len(watched)
    losses = f"{row['train_loss']:.4f} (training) {row['val_loss']:.4f} (validation)"
    error = f"MSE {row['val_mse_per_frame']:#.4g} of {len(watched)} sequences, {row['minutes']:.1f} min"
    print0(f"epoch {row['epoch']:.3f} cross-entropy {losses}, {error}")
    if row["val_mse_per_frame"] < progress.best_mse:
        progress.best_mse, progress.best_step = row["val_mse_per_frame"], progress.step
    if RANK == 0:
        write_log(setup, folder, progress)
        title = f"{validated(setup)}, after {row['sequences']:,} training sequences"
        draw_samples(setup, folder, title)


def validated(setup):
    """The validation data, in titles."""
    is_fresh = setup.knobs.data == "fresh"
    return "fresh sequences of held-out digits" if is_fresh else f"validation split of {setup.data.name}"


def write_log(setup, folder, progress):
    """log.csv and loss.png."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in progress.history for name in row)  # some rows may have more
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(progress.history)
    write_atomic(folder / "log.csv", text.getvalue().encode())
    picture = figures.loss(progress.history, progress.baselines, f"{folder.name}, {setup.data.name}")
    write_atomic(folder / "loss.png", picture)


def baselines(setup, folder, dataset, names, index=None):
    """baseline → summary of these metrics. Computed once for the same data, and kept beside the runs."""

    def find():
        chosen = None if index is None else index.tolist()
        part = dataset.shape, len(dataset), getattr(dataset, "seed", None), chosen
        code = sources.fingerprint("metrics.py"), sources.fingerprint("moving_mnist.py"), cv2.__version__
        sha = hashlib.sha256()
        for content in dataset.parts:
            sha.update(content)
        options = setup.data.scale, setup.knobs.frames_in, setup.knobs.frames_out, names
        sha.update(repr((part, options, code)).encode())
        path = folder.parent / ".baselines" / f"{sha.hexdigest()[:16]}.json"
        return path, read_json(path)

    path, found = on_rank_0(find)
    if found is None:
        scale = setup.data.scale
        chosen = BASELINES if scale.is_grey else BASELINES[1:]
        found = {who: summary(score(setup, dataset, names, who, index), scale) for who in chosen}
        if RANK == 0:
            make_folder(path.parent)
            write_atomic(path, json.dumps(found).encode())
    return found


def read_results(folder):
    """(metrics.json of a run that has ended, or None; whether it is to be scored by another metrics.py)."""
    results = read_json(folder / "metrics.json")
    try:
        describe(results)
    except Exception:  # damaged: it may hold anything
        return None, False
    is_of_now = results.get("metrics") == sources.fingerprint("metrics.py")
    return results, not is_of_now and (folder / "best.pt").exists()


def show(setup, folder, results):
    """Print the results of a run that has ended."""
    print0(f"this run has ended; nothing was changed\n\n{describe(results)}\noutput    {folder}")
    if RANK == 0 and not (folder.parent / "compare.md").exists():
        compare_runs(folder.parent, results, first_sequence(setup))


def finish(setup, folder, step):
    """Score the weights of a step on all of validation and test, draw forecasts, compare with other runs."""
    knobs, data = setup.knobs, setup.data
    test, validation_mse = data.test, None
    torch.manual_seed(knobs.seed)  # for a network that draws random numbers
    if not knobs.eval_only:
        print0(f"scoring   {len(data.validation):,} validation sequences")
        errors = score(setup, data.validation, ["mse_per_frame"])
        validation_mse = summary(errors)["mse_per_frame"]["mean"]
    print0(f"scoring   {len(test):,} test sequences")
    names = (*CURVES, MEAN_SQUARES) if is_own(knobs.data) else CURVES
    found = score(setup, test, (*names, CROSS_ENTROPY))
    # of fields, the mean over the known pixels: a sequence with gaps is no better for its gaps
    errors = found.get(MEAN_SQUARES, found["mse_per_frame"]).nanmean(1)
    ranking = errors.argsort(stable=True)[: errors.isfinite().sum()]  # without sequences that are missing
    scale = data.scale
    scores = {knobs.model: summary(found, scale), **baselines(setup, folder, test, names)}
    if is_own(knobs.data):
        for values in scores.values():
            values["skill"] = skill(values, scores["copy_last"])
    results = {
        "data": data.name,
        "data_tested": data.name.partition(", trained on")[0],
        "scale": {"low": list(scale.low), "high": list(scale.high), "is_grey": scale.is_grey},
        "split": test.split,
        "sequences": len(test),
        "first_sequence": hashlib.sha256(test[np.arange(1)].numpy()).hexdigest()[:16],
        "frames_in": knobs.frames_in,
        "frames_out": knobs.frames_out,
        "model": knobs.model,
        "step": step,
        "weights": checkpoint.weights_hash(setup.model),
        "parameters": sum(p.numel() for p in setup.model.parameters()),
        "metrics": sources.fingerprint("metrics.py"),
        "validation_mse": validation_mse,
        "scores": scores,
    }
    if RANK == 0:
        draw_samples(setup, folder, f"{validated(setup)}, weights of step {step:,}")
        title = results["data_tested"] + ("" if test.split == "all" else f", {test.split} split")
        draw_ranked(setup, folder, ranking, title)
        first = first_sequence(setup)
        with open_atomic(folder / "forecast.npy") as file:
            np.save(file, scale.to_data(predict(setup, first[None, : knobs.frames_in])[0]))
        curves = {who: values["mse_per_frame"]["per_frame"] for who, values in results["scores"].items()}
        write_atomic(folder / "per_frame.png", figures.per_frame(describe_split(results), curves))
        write_atomic(folder / "metrics.json", json.dumps(results, indent=1).encode())
        compare_runs(folder.parent, results, first.numpy())
    print0(f"\n{describe(results)}\noutput    {folder}")
    if is_own(knobs.data) and not knobs.eval_only:
        data, weights = (shlex.quote(Path(path).as_posix()) for path in (knobs.data, folder / "best.pt"))
        print0(f"predict   python predict.py {data} --weights {weights} --start -{knobs.frames_in}")


def draw_samples(setup, folder, title):
    """predict_1.png … predict_4.png and predict.gif, of the same validation sequences every time."""
    dataset = setup.data.validation
    index = np.unique(np.linspace(0, len(dataset) - 1, 4).astype(int))
    named = {f"predict_{k}": (i, f"sequence {i + 1} of {len(dataset):,}") for k, i in enumerate(index, 1)}
    frames = draw_named(setup, folder, dataset, named, title)
    for end, channels, values in setup.data.scale.pictures():
        shown = (part[0][:, channels] for part in frames)
        write_atomic(folder / f"predict{end}.gif", figures.animation(*shown, title, values))


def draw_ranked(setup, folder, ranking, title):
    """predict_best.png, predict_median.png, predict_worst.png, so that nobody has to trust a lucky sample.

    And predict_last_frame.png: the last frame, the hardest, of ten forecasts from the best to the worst.
    ranking: the numbers of the test sequences, the best forecast first.
    """
    dataset, scale, knobs, n = setup.data.test, setup.data.scale, setup.knobs, len(ranking)
    places = {"best": 0, "median": n // 2, "worst": n - 1}
    named = {f"predict_{name}": (int(ranking[k]), f"{name} of {n:,} forecasts") for name, k in places.items()}
    draw_named(setup, folder, dataset, named, title)
    index = ranking[np.linspace(0, n - 1, min(n, 10)).astype(int)].numpy()
    past, truth = split_frames(dataset[index], setup)
    # one at a time, so that large ones fit in memory
    predictions = [predict(setup, one[None])[0] for one in past]
    errors = [scale.describe_error(*pair) for pair in zip(predictions, truth, strict=True)]
    last = torch.stack([frames[-1] for frames in predictions])
    title += f": last frames, from the best forecast to the worst (errors: all {knobs.frames_out} frames)"
    for end, channels, values in scale.pictures():
        rows = {"truth": ([f"sequence {i + 1:,}" for i in index], truth[:, -1, channels])}
        rows["forecast"] = errors, last[:, channels]
        picture = figures.grid(rows, title, values=values)
        write_atomic(folder / f"predict_last_frame{end}.png", picture)


def draw_named(setup, folder, dataset, named, title):
    """<name>.png of each; named: name → (index in the dataset, words for the title)."""
    index = np.array([i for i, _ in named.values()])
    past, truth = split_frames(dataset[index], setup)
    prediction = predict(setup, past)
    for (name, (_, what)), *frames in zip(named.items(), past, truth, prediction, strict=True):
        words = f"{title}: {what}, {setup.data.scale.describe_error(*frames[:0:-1])}"
        for end, channels, values in setup.data.scale.pictures():
            shown = (part[:, channels] for part in frames)
            write_atomic(folder / f"{name}{end}.png", figures.prediction(*shown, words, values))
    return past, truth, prediction


def first_sequence(setup):
    """The first of the test split, (T, C, H, W), scaled."""
    return torch.cat(split_frames(setup.data.test[np.arange(1)], setup), 1)[0]


def describe(results):
    """metrics.json as text for people."""
    title = f"{describe_split(results)}, mean over {results['frames_out']} forecast frames"
    title += f" ({explain(results)})"
    scores = results["scores"]
    rows = [[figures.LABELS.get(who, who), *score_cells(results, who)] for who in scores]
    lines = [title, table(["", *headings(results)], rows)]
    mse = {who: values["mse_per_frame"]["mean"] for who, values in scores.items()}
    model = results["model"]
    better = [f"{figures.LABELS[who]} ({mse[who]:#.4g})" for who in mse if mse[who] < mse[model]]
    if better:
        lines.append(f"No good forecast yet: the MSE is above that of {', '.join(better)}.")
        lines.append("Train longer, or on more data.")
    else:
        shares = {who: skill(scores[model], scores[who]) or 0 for who in BASELINES[1:]}  # black is too easy
        texts = [f"{share:.0%} below that of {figures.LABELS[who]}" for who, share in shares.items()]
        lines.append(f"The MSE is {' and '.join(texts)}.")
    lines += ["", "weights   of training step {step:,}, hash {weights}".format(**results)]
    if mse := results.get("validation_mse"):
        lines[-1] += f", validation MSE {mse:#.4g} (to choose between runs)"
    return "\n".join(lines)
