"""Kernels that are the same in all directions: those of a network that, where its input is flipped, flips its output.

After Cohen & Welling (2016), arXiv 1602.07576. Each channel stands for a place in a small square: a pixel for its place
in the patch, a move for where it leads, a hidden channel for one of eight directions. A flip of the frame flips these
squares as well, and so exchanges their channels. A kernel is symmetric if it stays as it is where it is flipped and its
channels are exchanged, those that come in and those that go out.
"""

from functools import partial

import torch

# Each undoes itself; together they make the eight symmetries of the square.
FLIPS = lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.transpose(-2, -1)
# Eight places, each of which a flip exchanges with another, so that all eight symmetries tell them apart.
EIGHT = torch.tensor([[-1, 0, 1, -1], [2, -1, -1, 3], [4, -1, -1, 5], [-1, 6, 7, -1]])


def square(side):
    return torch.arange(side**2).view(side, side)


def directions(n):
    """Of n hidden channels: eights, and what is left over, which is not exchanged."""
    return [EIGHT] * (n // 8) + [square(1)] * (n % 8)


def exchanged(flip, squares):
    """Of all channels that stand in these squares, which one comes in the place of each."""
    channels, first = [], 0
    for places in squares:
        channels.append(first + flip(places)[places >= 0])
        first += len(channels[-1])
    return torch.cat(channels)


def symmetric(kernel, swaps):
    """The mean of a kernel (n_out, n_in, k, k) in all its eight positions."""
    for flip, (outputs, inputs) in zip(FLIPS, swaps, strict=True):
        kernel = (kernel + flip(kernel)[outputs][:, inputs]) / 2
    return kernel


@torch.no_grad()
def tie(kernel, outputs, inputs):
    """Make a kernel symmetric, no smaller, and each of its gradients: so it stays symmetric, up to rounding.

    outputs, inputs: the squares in which its channels stand.
    """
    swaps = [(exchanged(flip, outputs), exchanged(flip, inputs)) for flip in FLIPS]
    mean = symmetric(kernel, swaps)
    kernel.copy_(mean * (kernel.norm() / mean.norm()))
    kernel.register_hook(partial(symmetric, swaps=swaps))
