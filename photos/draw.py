"""Draws cell.png and encoder_forecaster.png:  python photos/draw.py"""

from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
INK, STATE, INPUT, GATE, DRAWN = "#222222", "#d7e8f0", "#f4ead5", "#e3e3ef", "#dfeedd"
CONV, EDGE = "#0b6e99", "#666666"


def canvas(width, height):
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.set_axis_off()
    return axes


def box(axes, x, y, text, color, width=1.1, height=0.5, size=11, **style):
    """A box around (x, y)."""
    style = {
        "boxstyle": "round,pad=0,rounding_size=0.08",
        "facecolor": color,
        "edgecolor": INK,
        "lw": 1,
    } | style
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=size)


def dot(axes, x, y, text):
    axes.add_patch(plt.Circle((x, y), 0.17, facecolor="white", edgecolor=INK, lw=1, zorder=3))
    axes.text(x, y - 0.01, text, ha="center", va="center", fontsize=12, zorder=4)


def arrow(axes, *points, label="", color=INK, at=0.5, above=0.13, style="-|>", dashed=False, size=9):
    """A line through the points with a head at the last; the label stands beside its middle."""
    for (x0, y0), (x1, y1) in pairwise(points[:-1]):
        axes.plot((x0, x1), (y0, y1), color=color, lw=1.2, ls="--" if dashed else "-", solid_capstyle="round")
    axes.annotate(
        "",
        points[-1],
        points[-2],
        arrowprops={
            "arrowstyle": style,
            "color": color,
            "lw": 1.2,
            "ls": "--" if dashed else "-",
            "shrinkA": 0,
            "shrinkB": 0,
        },
    )
    if label:
        (x0, y0), (x1, y1) = points[-2:]
        axes.text(
            x0 + at * (x1 - x0),
            y0 + at * (y1 - y0) + above,
            label,
            ha="center",
            va="center",
            fontsize=size,
            color=color,
        )


def cell(path):
    """One time step: what is convolved, what is multiplied, and where the peepholes look."""
    axes = canvas(11, 5.6)
    axes.text(0.3, 5.3, "ConvLSTMCell: one time step of one layer", fontsize=14, weight="bold", va="center")
    shapes = "Tensors are (B, Ch, H/P, W/P), P: patch size. x has its own channels; z has 4 Ch."
    axes.text(0.3, 4.97, shapes, fontsize=10, color=EDGE, va="center")
    gates = {
        "f": (3.1, "σ", "forget"),
        "i": (4.7, "σ", "input"),
        "g": (6.0, "tanh", "candidate"),
        "o": (8.1, "σ", "output"),
    }
    rail, gate, sums = 4.0, 2.75, 1.35
    box(axes, 0.85, rail, "$c_{t-1}$", STATE, 0.9)
    box(axes, 0.85, sums, "$h_{t-1}$", STATE, 0.9)
    box(axes, 0.85, 0.45, "$x_t$", INPUT, 0.9)
    box(axes, 10.3, rail, "$c_t$", STATE, 0.9)
    box(axes, 10.3, sums, "$h_t$", STATE, 0.9)
    # the sum of the two convolutions, a quarter of its channels to each gate
    dot(axes, 2.2, sums, "+")
    arrow(axes, (1.3, sums), (2.03, sums), label="$W_h *$", color=CONV, above=0.17, size=11)
    arrow(axes, (1.3, 0.45), (2.2, 0.45), (2.2, sums - 0.17), color=CONV)
    axes.text(1.7, 0.62, "$W_x *$", ha="center", va="center", fontsize=11, color=CONV)
    cut = "z, with the bias: (B, 4 Ch, H/P, W/P), split into four in the order i, f, o, g"
    axes.text(2.45, sums - 0.2, cut, fontsize=9, color=EDGE, va="center")
    axes.plot((2.37, 8.1), (sums, sums), color=INK, lw=1.2)
    for name, (x, function, words) in gates.items():
        box(axes, x, gate, function, GATE, 0.75, 0.45)
        arrow(axes, (x, sums), (x, gate - 0.225))
        axes.text(x + 0.08, sums + 0.2, f"${name}$: {words}", fontsize=9, color=EDGE, va="center")
    # the cell state
    dot(axes, 3.1, rail, "∘")
    dot(axes, 6.0, rail, "+")
    dot(axes, 6.0, 3.4, "∘")
    arrow(axes, (1.3, rail), (2.93, rail))
    arrow(axes, (3.1, gate + 0.225), (3.1, rail - 0.17))
    arrow(axes, (3.27, rail), (5.83, rail), label="what is kept")
    arrow(axes, (4.7, gate + 0.225), (4.7, 3.4), (5.83, 3.4))
    arrow(axes, (6.0, gate + 0.225), (6.0, 3.23))
    arrow(axes, (6.0, 3.57), (6.0, rail - 0.17))
    axes.text(6.1, 3.7, "what is new", fontsize=9, va="center")
    arrow(axes, (6.17, rail), (9.85, rail))
    # the output
    box(axes, 9.2, 3.2, "tanh", GATE, 0.75, 0.45)
    dot(axes, 9.2, gate - 0.35, "∘")
    arrow(axes, (9.2, rail), (9.2, 3.425))
    arrow(axes, (9.2, 2.975), (9.2, gate - 0.18))
    arrow(axes, (8.475, gate), (8.75, gate), (8.75, gate - 0.35), (9.03, gate - 0.35))
    arrow(axes, (9.2, gate - 0.52), (9.2, sums), (9.85, sums))
    # peepholes
    peep = "#c8553d"
    arrow(axes, (1.9, rail), (1.9, gate), (2.725, gate), color=peep, dashed=True)
    axes.text(2.3, gate + 0.17, "$W_{cf}$ ∘", ha="center", va="center", fontsize=10, color=peep)
    arrow(axes, (1.9, gate), (1.9, 2.25), (4.0, 2.25), (4.0, gate), (4.325, gate), color=peep, dashed=True)
    axes.text(3.62, 2.1, "$W_{ci}$ ∘", ha="center", va="center", fontsize=10, color=peep)
    arrow(axes, (7.3, rail), (7.3, gate), (7.725, gate), color=peep, dashed=True)
    axes.text(7.62, gate + 0.5, "$W_{co}$ ∘", ha="center", va="center", fontsize=10, color=peep)
    key = "blue: convolution     red, dashed: peephole, one number per channel"
    axes.text(10.75, 5.3, key, ha="right", va="center", fontsize=10, color=EDGE)
    axes.text(10.75, 4.97, "∘: element by element", ha="right", va="center", fontsize=10, color=EDGE)
    plt.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
    plt.close()


def stack(axes, x, y, color, layers):
    """A stack of ConvLSTM layers, the first at the bottom."""
    for k in range(layers):
        box(axes, x, y + 0.8 * k, f"ConvLSTM {k + 1}", color, 1.5, 0.48)
        if k:
            arrow(axes, (x, y + 0.8 * k - 0.56), (x, y + 0.8 * k - 0.24))


def draw_head(axes, x, y, frame):
    """The head above a stack, and the frame that it draws."""
    box(axes, x, y, f"head $\\rightarrow$ {frame}", DRAWN, 1.5, 0.42)
    arrow(axes, (x, y - 0.66), (x, y - 0.21))
    axes.text(x + 0.08, y - 0.44, "all $h$", fontsize=10, va="center", color=EDGE)


def encoder_forecaster(path):
    """The paper's network above, what main.py trains below; one column a time step."""
    axes = canvas(13, 9.5)
    axes.set_ylim(-0.4, 9.1)
    ours = "The default of main.py: feedback, motion, and more"
    for top, title in ((8.8, "The paper's network: EncoderForecaster()"), (4.15, ours)):
        axes.text(0.3, top, title, fontsize=14, weight="bold", va="center")
    key = "in a diagram, boxes with the same color and name have the same weights"
    axes.text(12.7, 8.8, key, fontsize=11, color=EDGE, ha="right", va="center")
    columns = {"$x_1$": 1.5, "$x_2$": 3.6, "$x_{10}$": 5.9}
    for y, forecaster, layers in ((5.6, True, 3), (1.85, False, 2)):
        head = y + 0.8 * layers + 0.1
        for k, (name, x) in enumerate(columns.items()):
            stack(axes, x, y, STATE, layers)
            box(axes, x, y - 0.85, name, INPUT, 0.9, 0.4)
            arrow(axes, (x, y - 0.65), (x, y - 0.24))
            for layer in range(layers):
                level = y + 0.8 * layer
                if k == 0:
                    label = "$h, c$" if layer == layers - 1 else ""
                    arrow(axes, (x + 0.75, level), (3.6 - 0.75, level), label=label, size=11)
                elif k == 1:
                    arrow(axes, (x + 0.75, level), (5.9 - 0.75, level), dashed=True)
        first = 11 if forecaster else 12
        ahead = {f"$\\hat{{x}}_{{{first + k}}}$": x for k, x in enumerate((8.2, 10.3))}
        for k, (name, x) in enumerate(ahead.items()):
            stack(axes, x, y, "#f0dede" if forecaster else STATE, layers)
            for layer in range(layers):
                level = y + 0.8 * layer
                label = "copied" if forecaster and (k, layer) == (0, layers - 1) else ""
                arrow(axes, ((6.65 if k == 0 else 8.95), level), (x - 0.75, level), label=label, size=10)
                if k == 1:
                    arrow(axes, (x + 0.75, level), (x + 1.5, level), dashed=True)
            draw_head(axes, x, head, name)
        if forecaster:
            axes.text(9.25, y - 0.5, "no input", ha="center", fontsize=11, color=EDGE)
        else:
            draw_head(axes, 5.9, head, "$\\hat{x}_{11}$")
            red = "#c8553d"
            for x0, x1 in ((5.9, 8.2), (8.2, 10.3)):
                middle = (x0 + x1) / 2 - 0.1
                arrow(
                    axes,
                    (x0 + 0.75, head),
                    (middle, head),
                    (middle, y - 0.85),
                    (x1, y - 0.85),
                    (x1, y - 0.24),
                    color=red,
                )
            axes.text(
                8.2, y - 1.08, "feedback: the frame that it drew last", ha="center", fontsize=11, color=red
            )
            green = "#3d7a3d"
            for x in (5.9, 8.2, 10.3):
                start = x - 0.45 if x == 5.9 else x - 0.9
                arrow(
                    axes,
                    (start, y - 0.85),
                    (x - 0.9, y - 0.85),
                    (x - 0.9, head),
                    (x - 0.75, head),
                    color=green,
                )
            axes.text(4.9, head, "advection", ha="right", va="center", fontsize=11, color=green)
            violet = "#6a4c93"
            arrow(axes, (1.95, y - 0.85), (3.0, y - 0.85), (3.0, y - 0.24), color=violet)
            axes.text(
                0.95,
                y - 1.2,
                "block matching (at every step): motion since the frame before",
                fontsize=11,
                color=violet,
            )
        axes.text(11.95, head, "…  $\\hat{x}_{20}$", fontsize=11, va="center")
    shapes = (
        "frame (B, 1, 64, 64)  →  4×4-pixel patches (B, 16, 64/4, 64/4)  →  each $h$, $c$ (B, Ch, 16, 16)\n"
        "→  all $h$ concatenated (B, sum of Ch, 16, 16)  →  head (B, 4·4, 16, 16)  →  logits (B, 1, 64, 64)\n"
        "In the default, layer 1 also reads 16 channels of motion. The head has 16 + 81 more outputs:\n"
        "for each pixel, a factor on the moved frame's logit; for each patch, weights of 9×9 moves"
    )
    axes.text(6.5, -0.35, shapes, ha="center", va="bottom", fontsize=11, color=EDGE)
    plt.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
    plt.close()


if __name__ == "__main__":
    cell(HERE / "cell.png")
    encoder_forecaster(HERE / "encoder_forecaster.png")
