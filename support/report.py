"""Scores → metrics.json, tables, pictures, and the comparison of runs. Only the first process writes."""

import csv
import hashlib
import io
import json

import cv2
import numpy as np
import torch

import figures
import metrics
import moving_mnist
from support import UserError, checkpoint, sources
from support.checkpoint import open_atomic, write_atomic
from support.compare import compare_runs, describe_split, means, table
from support.devices import RANK, on_rank_0, print0
from support.folders import read_json
from support.score import BASELINES, CROSS_ENTROPY, CURVES, forecast, score, split_frames, summary

WATCHED = 100  # validation sequences, evenly chosen, that every evaluation scores
N_BEYOND = 100  # sequences of each case beyond training


def evaluate(setup, folder, progress):
    """Validate, log and redraw the pictures. Notes in progress whether these weights are the best so far."""
    data, knobs = setup.data, setup.knobs
    watched = np.linspace(0, len(data.validation) - 1, min(len(data.validation), WATCHED)).astype(int)
    if not progress.baselines:
        found = baselines(setup, folder, data.validation, ["mse_per_frame"], watched)
        progress.baselines = {who: scores["mse_per_frame"]["per_frame"] for who, scores in found.items()}
        levels = [f"{figures.LABELS[who]} {np.mean(mse):.1f}" for who, mse in progress.baselines.items()]
        print0(f"baselines {', '.join(levels)} (validation MSE, to compare with those below)")
    row = progress.history[-1]
    try:
        scores = score(setup, data.validation, ("mse_per_frame", CROSS_ENTROPY), index=watched)
    except FloatingPointError as error:  # the loss was finite, but not the weights after it
        fault, step = f"forecasts that are not finite ({error})", progress.step - 1
        raise progress.diverged(fault, row["learning_rate"], step) from error
    n_pixels = knobs.frames_out * np.prod(data.validation.shape[1:])
    row["val_loss"] = float(scores[CROSS_ENTROPY].mean() / n_pixels)
    row["val_mse_per_frame"] = float(scores["mse_per_frame"].mean())
    row["val_sequences"] = len(watched)
    losses = f"{row['train_loss']:.4f} (training) {row['val_loss']:.4f} (validation)"
    error = f"MSE {row['val_mse_per_frame']:.1f} of {len(watched)} sequences, {row['minutes']:.1f} min"
    print0(f"epoch {row['epoch']:.3f} cross-entropy {losses}, {error}")
    if row["val_mse_per_frame"] < progress.best_mse:
        progress.best_mse, progress.best_step = row["val_mse_per_frame"], progress.step
    if RANK == 0:
        write_log(setup, folder, progress)
        curves = {knobs.model: scores["mse_per_frame"].mean(0).tolist(), **progress.baselines}
        write_atomic(folder / "per_frame.png", figures.per_frame({validated(setup): curves}))
        title = f"{validated(setup)}, after {row['sequences']:,} training sequences"
        draw_samples(setup, folder, title)


def validated(setup):
    """The validation data, in titles."""
    is_fresh = setup.knobs.data == "fresh"
    return "fresh sequences of held-out digits" if is_fresh else f"validation split of the {setup.data.name}"


def write_log(setup, folder, progress):
    """log.csv and loss.png."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in progress.history for name in row)  # some rows may have more
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(progress.history)
    write_atomic(folder / "log.csv", text.getvalue().encode())
    levels = {who: float(np.mean(curve)) for who, curve in progress.baselines.items()}
    picture = figures.loss(progress.history, levels, f"{folder.name}, {setup.data.name}")
    write_atomic(folder / "loss.png", picture)


def restore_log(setup, folder, progress):
    """Files that were lost come back from the checkpoint."""
    lost = not ((folder / "log.csv").exists() and (folder / "loss.png").exists())
    if RANK == 0 and lost and progress.history:
        write_log(setup, folder, progress)


def baselines(setup, folder, dataset, names, index=None, frames_out=0):
    """baseline → summary of these metrics. Computed once for the same data, and kept beside the runs."""
    part = len(dataset), None if index is None else index.tolist(), getattr(dataset, "seed", None)
    task = setup.knobs.frames_in, frames_out or setup.knobs.frames_out, tuple(names)
    sha = hashlib.sha256(dataset.content)
    sha.update(repr((part, task, sources.fingerprint("metrics.py"), cv2.__version__)).encode())
    key, path = sha.hexdigest(), folder.parent / ".baselines.json"
    kept = on_rank_0(read_json, path) or {}
    if key not in kept:
        kept[key] = {who: summary(score(setup, dataset, names, who, index, frames_out)) for who in BASELINES}
        if RANK == 0:
            write_atomic(path, json.dumps(kept).encode())
    return kept[key]


def read_results(folder):
    """The metrics.json of a run that has ended, if it can be shown; else None."""
    results = read_json(folder / "metrics.json")
    try:
        describe(results)
    except (KeyError, TypeError, AttributeError):
        return None
    return results


def are_of_today(results):
    """Whether metrics.py still computes these scores."""
    return results["metrics"] == sources.fingerprint("metrics.py")


def show(setup, folder, results):
    """Print the results of a run that has ended."""
    print0(f"this run has ended; nothing was changed\n\n{describe(results)}\noutput    {folder}")
    if RANK == 0 and not (folder.parent / "compare.md").exists():
        compare_runs(folder.parent, results, setup.data.test[np.arange(1)][0].numpy())


def finish(setup, folder, step):
    """Score the weights of a step on all of validation and test, draw forecasts, compare with other runs."""
    knobs, data = setup.knobs, setup.data
    test, validation_mse = data.test, None
    torch.manual_seed(knobs.seed)  # for a network that draws random numbers
    if not knobs.eval_only:
        print0(f"scoring   {len(data.validation):,} validation sequences")
        validation_mse = float(np.mean(mse_curve(setup, data.validation)))
    print0(f"scoring   {len(test):,} test sequences")
    scores = score(setup, test, (*CURVES, CROSS_ENTROPY))
    ranking = scores["mse_per_frame"].mean(1).argsort(stable=True)
    first = test[np.arange(1)]
    results = {
        "data": data.name,
        "data_tested": data.name.partition(", trained on")[0],
        "split": test.split,
        "sequences": len(test),
        "first_sequence": hashlib.sha256(first.numpy()).hexdigest()[:16],
        "frames_in": knobs.frames_in,
        "frames_out": knobs.frames_out,
        "model": knobs.model,
        "step": step,
        "weights": checkpoint.weights_hash(setup.model),
        "parameters": sum(p.numel() for p in setup.model.parameters()),
        "metrics": sources.fingerprint("metrics.py"),
        "validation_mse": validation_mse,
        "scores": {knobs.model: summary(scores), **baselines(setup, folder, test, CURVES)},
    }
    if data.is_moving_mnist:
        results["beyond"] = score_beyond_training(setup, folder)
    if RANK == 0:
        draw_samples(setup, folder, f"{validated(setup)}, weights of step {step:,}")
        title = results["data_tested"] + ("" if test.split == "all" else f", {test.split} split")
        draw_ranked(setup, folder, ranking, title)
        past, _ = split_frames(first, knobs)
        prediction = forecast(setup, past, knobs.frames_out)[0][0].cpu()
        with open_atomic(folder / "forecast.npy") as file:
            np.save(file, (prediction * 255).round().byte().numpy())
        curves = {who: values["mse_per_frame"]["per_frame"] for who, values in results["scores"].items()}
        write_atomic(folder / "per_frame.png", figures.per_frame({describe_split(results): curves}))
        write_atomic(folder / "metrics.json", json.dumps(results, indent=1).encode())
        compare_runs(folder.parent, results, first[0].numpy())
    print0(f"\n{describe(results)}\noutput    {folder}")


def score_beyond_training(setup, folder):
    """Score and draw cases unlike the training data. Returns case → model or baseline → MSE of each frame.

    Three digits, more frames, a larger canvas; the sequences are generated from MNIST's test digits.
    """
    digits = on_rank_0(read_test_digits)
    if digits is None:
        return {}
    knobs, n = setup.knobs, setup.knobs.frames_out
    large = max(96, 64 + knobs.patch_size)  # it can be cut into patches where 64 can
    cases = {
        f"{3 * n} frames": (3 * n, {}),
        "three digits": (n, {"n_digits": 3}),
        # on the larger canvas, a digit moves as many pixels per frame as on 64×64
        f"{large}×{large} pixels": (n, {"size": large, "step": 0.1 * (64 - 28) / (large - 28)}),
    }
    results = {}
    for case, (length, options) in cases.items():
        frames = moving_mnist.generate(digits, N_BEYOND, 0, knobs.frames_in + length, **options)
        dataset = moving_mnist.MovingMNIST(frames.swapaxes(0, 1))
        curves = {knobs.model: mse_curve(setup, dataset, length)}
        found = baselines(setup, folder, dataset, ["mse_per_frame"], frames_out=length)
        curves |= {who: scores["mse_per_frame"]["per_frame"] for who, scores in found.items()}
        shorter = {"as in training": n, f"{2 * n} frames": 2 * n} if length > n else {}
        for part, end in {**shorter, case: length}.items():  # a long forecast begins with the short ones
            results[part] = {who: values[:end] for who, values in curves.items()}
        if RANK == 0:  # the first sequence, as good or bad as it happens to be
            named = {f"beyond_{case.replace(' ', '_').replace('×', 'x')}": (0, "never trained on")}
            draw_named(setup, folder, dataset, named, f"{knobs.model}, {case}", length)
    if RANK == 0:
        write_atomic(folder / "beyond.png", figures.per_frame({case: results[case] for case in cases}))
    return results


def read_test_digits():
    try:
        return moving_mnist.read_digits(moving_mnist.RAW / "digits_test.png")
    except UserError as error:  # no reason to lose the scores of the test split
        print0(f"cannot score the cases beyond training: {error}")


def mse_curve(setup, dataset, frames_out=0):
    """The model's MSE of each forecast frame, mean over sequences."""
    return score(setup, dataset, ["mse_per_frame"], frames_out=frames_out)["mse_per_frame"].mean(0).tolist()


def draw_samples(setup, folder, title):
    """predict_1.png … predict_4.png and predict.gif, of the same four validation sequences every time."""
    dataset = setup.data.validation
    index = np.linspace(0, len(dataset) - 1, 4).astype(int)
    named = {f"predict_{k}": (i, f"sequence {i + 1} of {len(dataset):,}") for k, i in enumerate(index, 1)}
    past, truth, prediction = draw_named(setup, folder, dataset, named, title)
    write_atomic(folder / "predict.gif", figures.animation(past[0], truth[0], prediction[0], title))


def draw_ranked(setup, folder, ranking, title):
    """predict_best.png, predict_median.png, predict_worst.png, so that nobody has to trust a lucky sample.

    And predict_last_frame.png: the last frame, the hardest, of ten forecasts from the best to the worst.
    ranking: the numbers of the test sequences, the best forecast first.
    """
    dataset, knobs, n = setup.data.test, setup.knobs, len(ranking)
    places = {"best": 0, "median": n // 2, "worst": n - 1}
    named = {
        f"predict_{name}": (int(ranking[k]), f"the {name} of {n:,} sequences") for name, k in places.items()
    }
    draw_named(setup, folder, dataset, named, title)
    index = ranking[np.linspace(0, n - 1, min(n, 10)).astype(int)].numpy()
    past, truth = split_frames(dataset[index], knobs)
    # one at a time, so that large ones fit in memory
    predictions = [forecast(setup, one[None], knobs.frames_out)[0][0].cpu() for one in past]
    errors = [describe_error(*pair) for pair in zip(predictions, truth, strict=True)]
    last = torch.stack([frames[-1] for frames in predictions])
    rows = {"truth": ([f"sequence {i + 1:,}" for i in index], truth[:, -1]), "forecast": (errors, last)}
    title += f": last frames, from the best forecast to the worst (MSE: all {knobs.frames_out} frames)"
    write_atomic(folder / "predict_last_frame.png", figures.grid(rows, title))


def draw_named(setup, folder, dataset, named, title, frames_out=0):
    """<name>.png of each; named: name → (index in the dataset, words for the title)."""
    index = np.array([i for i, _ in named.values()])
    past, truth = split_frames(dataset[index], setup.knobs, frames_out)
    prediction = forecast(setup, past, truth.shape[1])[0].cpu()
    for (name, (_, what)), p, t, f in zip(named.items(), past, truth, prediction, strict=True):
        picture = figures.prediction(p, t, f, f"{title}: {what}, {describe_error(f, t)}")
        write_atomic(folder / f"{name}.png", picture)
    return past, truth, prediction


def describe_error(prediction, truth):
    """The MSE of one sequence, (T, C, H, W), in words."""
    return f"MSE {(prediction - truth).square().sum() / len(truth):.0f}"


def describe(results):
    """metrics.json as text for people."""
    title = f"{describe_split(results)}, mean over {results['frames_out']} forecast frames"
    title += " (cross-entropy: sum; SSIM*: OpenSTL's)"
    scores = results["scores"]
    rows = [[figures.LABELS.get(who, who), *means(values)] for who, values in scores.items()]
    lines = [title, table(["", *metrics.HEADINGS], rows)]
    mse = {who: values["mse_per_frame"]["mean"] for who, values in scores.items()}
    better = [
        f"{figures.LABELS[who]} ({mse[who]:.1f})" for who in BASELINES if mse[who] < mse[results["model"]]
    ]
    if better:
        lines.append(f"No good forecast yet: the MSE is above that of {', '.join(better)}.")
    if beyond := results.get("beyond"):
        names = list(next(iter(beyond.values())))
        rows = [
            [case, *(f"{np.mean(curves[name]):.1f}" for name in names)] for case, curves in beyond.items()
        ]
        lines += ["", f"beyond training, MSE of {N_BEYOND} generated sequences with test digits"]
        lines.append(table(["", *(figures.LABELS.get(name, name) for name in names)], rows))
    lines += ["", "weights   of training step {step:,}, hash {weights}".format(**results)]
    if mse := results.get("validation_mse"):
        lines[-1] += f", validation MSE {mse:.2f} (to choose between runs)"
    return "\n".join(lines)
