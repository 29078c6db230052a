"""The pictures. Grey scale fixed to 0–1, axes with units.

Every function with a path writes that file, whole or not at all, and raises CheckpointError where it cannot.
"""

import io
import itertools

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure  # not pyplot, whose backend, of a notebook say, is the user's
from matplotlib.ticker import LogLocator
from PIL import Image

from checkpoint import publish

COLOURS = {
    "train": "#9aa5b1",
    "validation": "#0b6e99",
    "black": "#222222",
    "copy_last": "#c8553d",
    "optical_flow": "#8a6fb0",
}
MODEL_COLOURS = ["#0b6e99", "#e08e0b", "#4f8a3c", "#b3446c", "#857048", "#5b5f97"]  # in order, then again
LABELS = {"black": "black frame", "copy_last": "last frame copied", "optical_flow": "optical flow"}

DPI = 150
styled = matplotlib.rc_context({  # for our pictures only: those of a notebook keep their own
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "legend.frameon": False, "savefig.dpi": DPI, "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a $ in the name of a file is a dollar
})  # fmt: skip


def write(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    publish(path, buffer.getvalue())


def fit(text, width):
    """Shrink the text until it is no wider, in pixels of its figure."""
    while (wide := text.get_window_extent().width) > width and text.get_fontsize() > 3:
        text.set_fontsize(text.get_fontsize() * min(0.98, width / wide))  # not quite in proportion


@styled
def loss(path, history, baselines, title):
    """history: rows with sequences, train_loss, val_loss, val_mse_per_frame; baselines: name → mse_per_frame."""
    figure = Figure(figsize=(9, 4))
    left, right = figure.subplots(1, 2)
    seen = [row["sequences"] / 1000 for row in history]
    kinds = ("train_loss", "train", "train (mean since the last point)"), ("val_loss", "validation", "validation")
    for key, split, label in kinds:
        left.plot(seen, [row[key] for row in history], "o-", ms=3, color=COLOURS[split], label=label)
    left.set(xlabel="training sequences seen (thousands)", ylabel="cross-entropy (nats per pixel)", title=title)
    left.set(xlim=(0, None), ylim=(0, 1.05 * max(row[key] for row in history for key in ("train_loss", "val_loss"))))
    errors = [row["val_mse_per_frame"] for row in history]
    right.plot(seen, errors, "o-", ms=3, color=COLOURS["validation"], label="validation")
    for name, value in baselines.items():
        right.axhline(value, ls="--", lw=1, color=COLOURS[name], label=f"{LABELS[name]}: {value:.0f}")
    right.set(xlabel="training sequences seen (thousands)", ylabel="MSE per frame (sum over pixels)")
    right.set(xlim=(0, None), ylim=(0, None), title=f"validation MSE: last {errors[-1]:.1f}, best {min(errors):.1f}")
    figure.legend(handles=[*left.lines, *right.lines[1:]], loc="outside lower center", ncols=3)
    fit(left.title, 0.45 * figure.bbox.width)
    write(figure, path)


@styled
def per_frame(path, panels):
    """panels: title → name → one value a forecast frame."""
    n = len(panels)
    figure = Figure(figsize=(3.4 * max(n, 2), 4))
    (row,) = figure.subplots(1, n, sharey=True, squeeze=False)
    for axes, (title, curves) in zip(row, panels.items(), strict=True):
        draw_curves(axes, curves)
        axes.set_title(title)
        fit(axes.title, 0.9 * figure.bbox.width / n)
    row[0].set(ylabel="MSE per frame (sum over pixels)", ylim=(0, None))
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    write(figure, path)


@styled
def compare(path, histories, curves, validation, test):
    """histories: model → rows with minutes, sequences, val_loss; curves: model or baseline → MSE of each frame.

    validation, test: what the histories and the curves are of, in words.
    """
    figure = Figure(figsize=(12, 4))
    by_time, by_sequences, by_frame = figure.subplots(1, 3)
    for (name, history), colour in zip(histories.items(), itertools.cycle(MODEL_COLOURS), strict=False):
        losses = [row["val_loss"] for row in history]
        for axes, x in (
            (by_time, [row["minutes"] for row in history]),
            (by_sequences, [row["sequences"] / 1000 for row in history]),
        ):
            axes.plot(x, losses, "o-", ms=4, color=colour, label=name)
    for axes, xlabel in (by_time, "minutes of training"), (by_sequences, "training sequences seen (thousands)"):
        axes.set(xlabel=xlabel, ylabel="cross-entropy (nats per pixel)", yscale="log", title=validation)
        axes.set(xlim=(0, None))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    words = {name: f"{name} (no log)" for name, history in histories.items() if not history}  # only scored
    draw_curves(by_frame, {words.get(name, name): curve for name, curve in curves.items()})
    by_frame.set(ylabel="MSE per frame (sum over pixels)", ylim=(0, None), title=test.replace(", ", ",\n"))
    for axes in figure.axes:
        fit(axes.title, 0.28 * figure.bbox.width)
    figure.legend(*by_frame.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    write(figure, path)


@styled
def scaling(path, rows):
    """rows of bench.py: what grows, seconds and bytes of a training step. Logarithmic axes."""
    units = {"batch": "sequences a batch", "frames": "frames in, and as many out", "size": "pixels a side",
             "hidden": "hidden channels of each of 3 layers"}  # fmt: skip
    figure = Figure(figsize=(12, 5))
    all_axes = figure.subplots(2, 4, sharex="col", sharey="row")
    for (knob, unit), (time, memory) in zip(units.items(), all_axes.T, strict=True):
        some = [row for row in rows if row["grows"] == knob]
        x = [row[knob][0] if knob == "hidden" else row[knob] for row in some]
        for axes, key, scale in (time, "seconds", 1e3), (memory, "bytes", 2**-20):
            # of channels, weights and work grow as the square, states in proportion
            power, name = (2, "as the square") if knob in ("size", "hidden") else (1, "in proportion")
            y = [row[key] * scale for row in some]
            axes.loglog(x, y, "o-", ms=4, color=COLOURS["validation"], label="measured")
            axes.loglog(x, [y[-1] * (v / x[-1]) ** power for v in x], ":", color=COLOURS["black"], label=name)
            axes.set_xticks(x, [str(v) for v in x])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.legend(fontsize=8)
        memory.set_xlabel(unit)
    all_axes[0, 0].set_ylabel("training step (ms)")
    all_axes[1, 0].set_ylabel("its peak memory (MiB)")
    write(figure, path)


def draw_curves(axes, curves):
    """name → one value a forecast frame."""
    models = itertools.cycle(MODEL_COLOURS)
    for name, curve in curves.items():
        frames = range(1, len(curve) + 1)
        colour = COLOURS[name] if name in LABELS else next(models)
        axes.plot(frames, curve, "--" if name in LABELS else "o-", ms=4, color=colour, label=LABELS.get(name, name))
    axes.set(xlabel="forecast frame", xticks=list(range(1, len(curve) + 1, -(-len(curve) // 10))))


def to_grey(frames):
    """(T, C, H, W) in [0, 1] → uint8 (T, H, W), or (T, H, W, 3) of three channels; others show their mean."""
    frames = np.asarray(frames, np.float32)
    frames = np.moveaxis(frames, 1, -1) if frames.shape[1] == 3 else frames.mean(1)
    return np.rint(frames.clip(0, 1) * 255).astype(np.uint8)


def prediction(path, past, truth, forecast, title):
    """Rows input, truth, forecast, error; all (T, C, H, W) in [0, 1]."""
    error = np.abs(np.asarray(forecast, np.float32) - np.asarray(truth, np.float32))
    future = {"truth": truth, "forecast": forecast, "|error|": error}
    rows = {"input": (1, past), **{name: (len(past) + 1, frames) for name, frames in future.items()}}
    grid(path, rows, title)


@styled
def grid(path, rows, title, most=10):
    """rows: name → (number of its first frame or words for each, (T, C, H, W) in [0, 1]); of more than `most`, some.

    One picture with a few words, every pixel of a frame a square of whole pixels: 40 axes would take ten times as long.
    """
    height, width = np.shape(next(iter(rows.values()))[1])[-2:]
    scale = max(1, round(144 / width))
    high, wide = height * scale + 34, width * scale + 8  # with the number above and a gap
    columns = min(max(len(frames) for _, frames in rows.values()), most)
    picture = np.full((56 + len(rows) * high, 110 + columns * wide, 3), 255, np.uint8)
    size = picture.shape[1] / DPI, picture.shape[0] / DPI
    figure = Figure(figsize=size, dpi=DPI, layout="none")  # as it is saved, so that pixels are pixels
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for r, (name, (first, frames)) in enumerate(rows.items()):
        top, some = 56 + r * high, np.linspace(0, len(frames) - 1, min(len(frames), most)).astype(int)
        label = name.replace(" ", "\n")
        fit(axes.text(96, top + height * scale / 2 + 24, label, ha="right", va="center", fontsize=9), 90)
        for k, t in enumerate(some):
            left, image = 110 + k * wide, to_grey(frames[t : t + 1])[0]
            image = image[..., None] if image.ndim == 2 else image
            enlarged = image.repeat(scale, 0).repeat(scale, 1)
            picture[top + 26 :, left:][: height * scale, : width * scale] = enlarged
            above = first + t if isinstance(first, int) else first[t]
            axes.text(left + width * scale / 2, top + 22, above, ha="center", va="bottom", fontsize=8)
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    fit(axes.text(picture.shape[1] / 2, 14, title, ha="center", va="top", fontsize=10), 0.97 * figure.bbox.width)
    write(figure, path)


def animation(path, past, truth, forecast, title):
    """A looping GIF, exact greys: truth on the left; on the right the input, then the forecast in its place."""
    left, right = np.concatenate([past, truth]), np.concatenate([past, forecast])
    scale = max(1, min(4, 256 // left.shape[-1]))  # of large videos no larger pictures

    def bar(text, width, colours):
        image = np.full((22, width, *colours), 40, np.uint8)
        (wide, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)
        size = 0.45 * min(1, (width - 8) / wide)  # so that it fits
        return cv2.putText(image, text, (6, 16), cv2.FONT_HERSHEY_SIMPLEX, size, (255,) * 3, 1, cv2.LINE_AA)

    images = []
    for t, pair in enumerate(zip(to_grey(left), to_grey(right), strict=True), 1):
        a, b = (cv2.resize(x, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST) for x in pair)
        width, colours = a.shape[1], a.shape[2:]
        names = f"truth {t}", f"{'input' if t <= len(past) else 'forecast'} {t}"
        gap = np.full((a.shape[0] + 22, 8, *colours), 40, np.uint8)
        panels = [np.vstack([bar(name, width, colours), x]) for name, x in zip(names, (a, b), strict=True)]
        images.append(np.vstack([np.hstack([panels[0], gap, panels[1]]), bar(title, 2 * width + 8, colours)]))
    first, *rest = (Image.fromarray(image) for image in images)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=150, loop=0)
    publish(path, buffer.getvalue())
