"""The pictures: curves and frames (T, C, H, W) in [0, 1] → PNG or GIF, as bytes. 0 is black, 1 is white."""

import io
import itertools
from textwrap import fill

import cv2
import matplotlib.style
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure  # not pyplot, whose state belongs to the user
from matplotlib.ticker import LogLocator
from PIL import Image

LABELS = {"black": "black frame", "copy_last": "last frame copied", "optical_flow": "optical flow"}
COLORS = {"black": "#222222", "copy_last": "#c8553d", "optical_flow": "#8a6fb0"}
MODEL_COLORS = "#0b6e99", "#e08e0b", "#4f8a3c", "#b3446c", "#857048", "#5b5f97"
MODEL_STYLES = [{"color": color, "marker": marker, "ms": 4} for marker in "os^D" for color in MODEL_COLORS]
MSE_LABEL = "MSE (sum over the pixels of a frame)"
CROSS_ENTROPY_LABEL = "cross-entropy (nats per pixel)"
ERROR = "|error|"
DPI = 150
STYLE = {
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a $ in a file's name is a dollar
}
styled = matplotlib.style.context(STYLE, after_reset=True)  # the user's style and ours do not mix


def to_png(figure, title=""):
    """PNG with a title. A legend of at most five columns is added below: the figure grows by its height."""
    figure.suptitle(fill(title, 110), fontsize=11)
    pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    handles = {fill(label, 70): handle for handle, label in itertools.chain(*pairs)}
    for columns in range(min(len(handles), 5), 0, -1):
        legend = figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
        box = legend.get_window_extent()
        if box.width < figure.bbox.width or columns == 1:
            figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
            break
        legend.remove()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


@styled
def loss(history, baselines, title):
    """Loss, validation MSE, and other numbers. history: rows of log.csv, some with a validation loss.

    baselines: name → MSE.
    """
    names = list(dict.fromkeys(name for row in history for name in row))
    names = "learning_rate", *names[names.index("val_sequences") + 1 :]
    figure = Figure(figsize=(14, max(4.4, len(names))))
    places = figure.add_gridspec(len(names), 5)
    left, right = (figure.add_subplot(places[:, columns]) for columns in (slice(0, 2), slice(2, 4)))
    points = [row for row in history if row["val_loss"] is not None]
    column = lambda name, rows: [row.get(name, np.nan) for row in rows]
    epochs, training = column("epoch", history), column("train_loss", history)
    has_overlays = any(number > 0 for number in column("overlays", history))
    words = "training (harder: with overlays)" if has_overlays else "training"
    left.plot(epochs, training, color="#9aa5b1", marker="." if len(history) < 30 else "", label=words)
    words = f"validation, {points[-1]['val_sequences']:,} sequences"
    for axes, name in (left, "val_loss"), (right, "val_mse_per_frame"):
        axes.plot(column("epoch", points), column(name, points), **MODEL_STYLES[0], label=words)
    left.set(ylabel=CROSS_ENTROPY_LABEL)
    left.set_title(f"cross-entropy: training {training[-1]:.4f}, validation {points[-1]['val_loss']:.4f}")
    for name, value in baselines.items():
        right.axhline(value, ls="--", lw=1, color=COLORS[name], label=f"{LABELS[name]}: MSE {value:.3g}")
    right.set(ylabel=MSE_LABEL, ylim=(0, None))
    right.set_title(f"validation MSE: {points[-1]['val_mse_per_frame']:.3g}")
    for k, name in enumerate(names):
        axes = figure.add_subplot(places[k, 4])
        axes.step(epochs, column(name, history), color=MODEL_COLORS[1])
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.tick_params(labelsize=8, labelbottom=k == len(names) - 1)
    for axes in figure.axes:
        axes.set(xlim=(0, 1.03 * epochs[-1]))
    for axes in (left, right, figure.axes[-1]):
        axes.set(xlabel="epoch")
    return to_png(figure, title)


@styled
def per_frame(title, curves):
    """curves: name → one MSE per forecast frame."""
    figure = Figure(figsize=(6.8, 3.8))
    axes = figure.subplots()
    draw_curves(axes, curves, fill(title, 80))
    axes.set(ylabel=MSE_LABEL, ylim=(0, None))
    return to_png(figure)


@styled
def compare(histories, curves, title):
    """Runs side by side. histories: run → its evaluations. curves: run or baseline → MSE of each frame."""
    figure = Figure(figsize=(12, 4))
    by_time, by_sequences, by_frame = figure.subplots(1, 3)
    for (name, rows), style in zip(histories.items(), itertools.cycle(MODEL_STYLES), strict=False):
        errors = [row["val_mse_per_frame"] for row in rows]
        by_time.plot([row["minutes"] for row in rows], errors, **style, label=name)
        by_sequences.plot([row["sequences"] / 1000 for row in rows], errors, **style, label=name)
    by_time.set(title="validation MSE over time", xlabel="minutes of training")
    by_sequences.set(title="validation MSE over training sequences", xlabel="sequences (thousands)")
    for axes in (by_time, by_sequences):
        axes.set(ylabel=MSE_LABEL, yscale="log", xlim=(0, None))
        ticks = LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
        axes.yaxis.set(major_locator=ticks, major_formatter="{x:g}", minor_formatter="")
    draw_curves(by_frame, curves, "test MSE of each forecast frame")
    by_frame.set(ylabel=MSE_LABEL, ylim=(0, None))
    return to_png(figure, title)


def draw_curves(axes, curves, title):
    styles = itertools.cycle(MODEL_STYLES)
    for name, curve in curves.items():
        dashed = {"color": COLORS.get(name), "ls": "--", "marker": "_" if len(curve) == 1 else ""}
        style = dashed if name in LABELS else next(styles)
        axes.plot(range(1, len(curve) + 1), curve, **style, label=LABELS.get(name, name))
    ticks = range(1, len(curve) + 1, -(-len(curve) // 10))
    axes.set(title=title, xlabel="forecast frame", xticks=ticks)


def shrink(frames):
    """Every n-th pixel of large frames, so that at most 256 stand side by side."""
    frames = np.asarray(frames)
    step = -(-frames.shape[-1] // 256)
    return frames[..., ::step, ::step]


def color_scale(values):
    """The colors of a field whose 0 and 1 mean `values`. Where both signs are frequent, zero is white."""
    low, high = values
    most = max(-low, high)
    is_signed = min(-low, high) > most / 4
    norm = Normalize(-most, most) if is_signed else Normalize(low, high)
    colors = matplotlib.colormaps["RdBu_r" if is_signed else "viridis"]
    return ScalarMappable(norm, colors.with_extremes(bad="grey"))


def paint(frames, values):
    """(T, C, H, W) in [0, 1] → uint8 (T, H, W[, 3]): colors, or the channels' mean in grey, or a field."""
    frames = np.asarray(frames, np.float32)
    if values is None:
        frames = np.nan_to_num(frames, nan=0.5)  # missing pixels are grey
        frames = np.moveaxis(frames, 1, -1) if frames.shape[1] == 3 else frames.mean(1)
        return np.rint(frames.clip(0, 1) * 255).astype(np.uint8)
    colors, (low, high) = color_scale(values), values
    return colors.cmap(colors.norm(low + (high - low) * frames[:, 0]), bytes=True)[..., :3]


def prediction(past, truth, forecast, title, values=None):
    """Rows: input, truth, forecast, error. The truth may be shorter, or None. values: as for `grid`."""
    n = len(past) + 1
    if truth is None:
        return grid({"input": (1, past), "forecast": (n, forecast)}, title, values=values)
    error = np.abs(np.asarray(forecast, np.float32)[: len(truth)] - np.asarray(truth, np.float32))
    rows = {"input": (1, past), "truth": (n, truth), "forecast": (n, forecast), ERROR: (n, error)}
    return grid(rows, title, values=values)


@styled
def grid(rows, title, most=10, values=None):
    """rows: name → (labels, frames). labels: the number of the first frame, or words for each.

    values: what 0 and 1 mean, if the frames are a field; then missing pixels (NaN) are grey.
    At most `most` frames of a row are drawn, evenly chosen. All are pasted into one image, as large as
    the PNG. One Axes per frame would take ten times as long.
    """
    rows = {name: (labels, shrink(frames)) for name, (labels, frames) in rows.items()}
    height, width = next(iter(rows.values()))[1].shape[-2:]
    scale = max(1, min(-(-128 // width), 1024 // height))
    height, width = height * scale, width * scale
    labels = [fill(name, 24 if len(name) > 24 else 12, max_lines=6, placeholder=" …") for name in rows]
    left = 20 + 13 * max(len(line) for label in labels for line in label.split("\n"))  # 13 pixels a character
    wide = left + min(max(len(frames) for _, frames in rows.values()), most) * (width + 8)
    wide = max(wide, left + 800) if values else wide  # room for two color bars
    title = fill(title, max(20, wide // 13))
    top = 57 + 25 * len(title.split("\n"))
    bottom = top + len(rows) * (height + 34) - 26
    picture = np.full((bottom + (120 if values else 0), wide, 3), 255, np.uint8)
    figure = Figure(figsize=(wide / DPI, len(picture) / DPI), dpi=DPI, layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    bars = {}
    for y, (name, (first, frames)), label in zip(itertools.count(top, height + 34), rows.items(), labels):
        axes.text(left - 14, y + height / 2, label, ha="right", va="center", fontsize=9)
        meaning = values
        if values and name == ERROR:  # most errors are far smaller than the values
            meaning, frames = (0, (values[1] - values[0]) / 4), 4 * frames
        bars[name if name == ERROR else ""] = meaning
        for k, t in enumerate(np.linspace(0, len(frames) - 1, min(len(frames), most)).astype(int)):
            x = left + k * (width + 8)
            image = paint(frames[t : t + 1], meaning)[0].repeat(scale, 0).repeat(scale, 1)
            picture[y : y + height, x : x + width] = image if image.ndim == 3 else image[..., None]
            words = first + t if isinstance(first, int) else first[t]
            axes.text(x + width / 2, y - 4, words, ha="center", va="bottom", fontsize=7.5)
    for k, (name, meaning) in enumerate(bars.items() if values else ()):
        place = (left + 456 * k) / wide, 62 / len(picture), 256 / wide, 18 / len(picture)
        options = {"orientation": "horizontal", "extend": "max" if name else "neither"}
        bar = figure.colorbar(color_scale(meaning), figure.add_axes(place), **options)
        bar.ax.tick_params(labelsize=7.5)
        bar.ax.xaxis.get_offset_text().set_fontsize(7.5)  # a power of ten, or what is added to all
        bar.ax.set_title(name, fontsize=7.5)
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.text(wide / 2, 14, title, ha="center", va="top", fontsize=10)
    return to_png(figure)


def animation(past, truth, forecast, title, values=None):
    """A looping GIF, exact greys. Left: the truth, unless it is None. Right: input, then forecast.

    values: as for `grid`.
    """
    futures = [future for future in (truth, forecast) if future is not None]
    videos = [paint(shrink(np.concatenate([past, future])), values) for future in futures]
    if values:
        low, high = color_scale(values).get_clim()
        colors = ("blue", "red") if low == -high else ("purple", "yellow")
        title += f": {low:.4g} {colors[0]}, {high:.4g} {colors[1]}"
    scale = max(1, min(4, 256 // videos[0].shape[2]))  # large videos are not enlarged
    videos = [video.repeat(scale, 1).repeat(scale, 2) for video in videos]
    n_frames, height, width, *channels = videos[0].shape

    def write(canvas, text, x, y, wide, grey=255):
        font = cv2.FONT_HERSHEY_SIMPLEX
        size = 0.45 * min(1, (wide - 8) / max(1, cv2.getTextSize(text, font, 0.45, 1)[0][0]))
        cv2.putText(canvas, text, (x + 6, y), font, size, (grey,) * 3, 1, cv2.LINE_AA)

    images = []
    for t in range(n_frames):
        canvas = np.full((height + 44, len(videos) * (width + 8) - 8, *channels), 40, np.uint8)
        names = "truth", "input" if t < len(past) else "forecast"
        for x, name, video in zip(itertools.count(0, width + 8), names[-len(videos) :], videos):
            canvas[22:-22, x : x + width] = video[t]
            grey = 255
            if name == "forecast":  # black on white: the forecast has begun
                canvas[:22, x : x + width], grey = 255, 0
            write(canvas, f"{name} {t + 1}", x, 16, width, grey)
        write(canvas, title, 0, height + 38, canvas.shape[1])
        images.append(Image.fromarray(canvas))
    buffer = io.BytesIO()
    milliseconds = [150] * n_frames
    milliseconds[len(past) - 1] = milliseconds[-1] = 600  # a pause before the forecast, and at its end
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return buffer.getvalue()
