"""Tied kernels: flip or transpose the input of a network, and its output is flipped or transposed.

After Cohen & Welling (2016), arXiv 1602.07576. Each channel stands for a place in a small square: a pixel for its place
in the patch, a move for where it comes from, a hidden channel for one of eight directions. Where the frame is flipped,
so are these squares, and their channels exchange places. A kernel is symmetric if it stays as it is when it is flipped
and its channels, in and out, exchange theirs. It is stored whole, each weight in all its eight places.
"""

import functools

import torch

# Doing or not doing each gives 2·2·2 = 8: the symmetries of the square, quarter turns included.
FLIPS = lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.transpose(-2, -1)
# A compass: 0 and 1 are NNW and NNE, 2 and 3 WNW and ENE, 4 to 7 the same in the south; -1 is no channel. Each symmetry
# but the identity moves all eight.
EIGHT = torch.tensor([[-1, 0, 1, -1], [2, -1, -1, 3], [4, -1, -1, 5], [-1, 6, 7, -1]])


def square(side):
    return torch.arange(side**2).view(side, side)


def directions(n):
    """Squares of n hidden channels: eights; what is left over stays in its place, and so knows no direction."""
    return [EIGHT] * (n // 8) + [square(1)] * (n % 8)


def exchanged(flip, squares):
    """Of all channels that stand in these squares, which one comes in the place of each: a permutation."""
    channels, first = [], 0
    for places in squares:
        channels.append(first + flip(places)[places >= 0])
        first += len(channels[-1])
    return torch.cat(channels)


def average(kernel, exchanges):
    """The mean of a kernel (n_out, n_in, k, k) and its seven flipped and turned versions."""
    for flip, (outputs, inputs) in zip(FLIPS, exchanges, strict=True):
        kernel = (kernel + flip(kernel)[outputs][:, inputs]) / 2
    return kernel


@torch.no_grad()
def tie(kernel, outputs, inputs):
    """Average a kernel, at its old norm, and by a hook, which a deep copy has not, each of its gradients.

    outputs, inputs: the squares in which its channels stand. SGD, AdamW and Muon do the same to channels that exchange
    their places, and so leave the kernel symmetric, up to rounding.
    """
    exchanges = [(exchanged(flip, outputs), exchanged(flip, inputs)) for flip in FLIPS]
    on = functools.cache(lambda device: [(o.to(device), i.to(device)) for o, i in exchanges])
    mean = average(kernel, exchanges)
    kernel.copy_(mean * (kernel.norm() / mean.norm()))
    kernel.register_hook(lambda gradient: average(gradient, on(gradient.device)))
