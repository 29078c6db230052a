"""Equivariant kernels, after Cohen & Welling (2016), https://arxiv.org/abs/1602.07576.

If the input of such a convolution is flipped or transposed, so is its output. Training needs less data. On a
CPU, it needs only a quarter of the multiplications (support/fast/symmetric.py). Not in the ConvLSTM paper.

A flip moves pixels, and it swaps channels. Example: the channels of the first convolution are the pixels of a
patch. If a patch of 4 × 4 is flipped, its first pixel becomes its fourth. So each channel has a place in a
square grid. Flipping the grid shows which channels swap. The grids are:
- for the pixels of a patch, the patch;
- for the moves of motion.py, the square of all moves;
- for hidden channels, COMPASS.
"""

import functools

import torch
from torch import nn

SYMMETRIES = lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.transpose(-2, -1)  # they give all eight
# Hidden channels come in eight groups, each for another direction, such as north-northwest. A symmetry of the
# square turns each direction into another one. -1: no group. The two flips exchange 0, 2, 4, 6 among
# themselves, and 1, 3, 5, 7: support/fast/symmetric.py needs this order.
COMPASS = torch.tensor([[-1, 0, 2, -1], [1, -1, -1, 3], [5, -1, -1, 7], [-1, 4, 6, -1]])


def make_kernels_equivariant(model):
    """Make the kernels of an EncoderForecaster equivariant. Biases and peepholes stay free.

    Below, a kernel's input and output channels are lists of grids.
    """
    pixels, moves = [grid(model.patch_size)] * model.channels, [grid(2 * model.max_motion + 1)]
    below = pixels  # input of a layer
    if model.motion is not None:
        measured = hidden_grids(model.motion.out_channels)
        make_equivariant(model.motion.weight, measured, moves)
        below = pixels + measured
    for layer in (*model.encoder, *(model.forecaster or ())):
        cell = layer.cell
        hidden = hidden_grids(cell.hidden_channels)
        gates = hidden + hidden + hidden + hidden  # i, f, o, g
        if cell.input_to_state is not None:
            make_equivariant(cell.input_to_state, gates, below)
        make_equivariant(cell.state_to_state, gates, hidden)
        below = hidden

    kernels = [module.weight for module in model.head.modules() if isinstance(module, nn.Conv2d)]
    inputs = [hidden_grids(kernel.shape[1]) for kernel in kernels]
    hidden_channels = [layer.cell.hidden_channels for layer in model.encoder]
    if kernels[0].shape[1] == sum(hidden_channels):  # an edited head may have groups
        inputs[0] = [places for n in hidden_channels for places in hidden_grids(n)]
    outputs = [hidden_grids(len(kernel)) for kernel in kernels]
    outputs[-1] = pixels if model.motion is None else pixels + pixels + moves  # new pixels, gains, moves
    for kernel, n_out, n_in in zip(kernels, outputs, inputs, strict=True):
        make_equivariant(kernel, n_out, n_in)


def grid(side):
    """A grid (index of each place, channels per place) of side² channels, such as the pixels of a patch."""
    return torch.arange(side**2).view(side, side), 1


def hidden_grids(n):
    """The grids of n hidden channels. The last n % 8 stay where they are."""
    compass = [(COMPASS, n // 8)] if n >= 8 else []
    return compass + [grid(1)] * (n % 8)


@torch.no_grad()
def make_equivariant(kernel, outputs, inputs):
    """Average a kernel over all eight symmetries, keep its norm; a hook averages its gradients likewise.

    outputs, inputs: the grids of its channels. SGD, AdamW and Muon then keep the kernel equivariant, up to
    rounding. (Muon, too: what it makes orthogonal keeps its symmetry.) Deep copies lose the hook: call this
    again for them.
    """
    permutations = [(permutation(f, outputs), permutation(f, inputs)) for f in SYMMETRIES]
    orders_on = functools.cache(lambda device: [(o.to(device), i.to(device)) for o, i in permutations])
    mean = symmetric_mean(kernel, permutations)
    kernel.copy_(mean * (kernel.norm() / mean.norm()))
    kernel.register_hook(lambda gradient: symmetric_mean(gradient, orders_on(gradient.device)))
    kernel.flips = permutations[:2]  # for support/fast/symmetric.py


def permutation(symmetry, grids):
    """For each channel, the index of the channel that takes its place."""
    channels, first = [], 0
    for places, width in grids:
        n, moved = int(places.max()) + 1, symmetry(places)
        for k in range(n):
            channels.append(first + moved[places == k] * width + torch.arange(width))
        first += n * width
    return torch.cat(channels)


def symmetric_mean(kernel, permutations):
    """Average the kernel with its image, for each of SYMMETRIES in turn: a mean of two, four, eight."""
    for symmetry, (outputs, inputs) in zip(SYMMETRIES, permutations, strict=True):
        kernel = (kernel + symmetry(kernel)[outputs][:, inputs]) / 2
    return kernel
