"""Frames moved by a learned motion: the dynamic neural advection of Finn et al. (2016), https://arxiv.org/abs/1605.07157.

Each patch of the next frame is a weighted mean of the K×K patches of the last frame around it, a pixel apart, with
weights that the network gives. N images, C channels, H height, W width, P patch.
"""

import functools

import torch
import torch.nn.functional as F

import native

LARGEST_PATCH = 32  # of the compiled twin, which has one on its stack


def advect(frames, weights, patch):
    """frames (N, C, H, W), weights (N, H/P, W/P, K²), K odd → (N, C, H, W); beyond the border all is black."""
    K = round(weights.shape[-1] ** 0.5)
    plain = frames.device.type != "cpu" or frames.dtype != torch.float32 or patch > LARGEST_PATCH
    plain = plain or library(patch, K) is None
    return plain_advect(frames, weights, patch) if plain else Advect.apply(frames, weights, patch)


def plain_advect(frames, weights, patch):
    N, C, H, W = frames.shape
    patches, K = weights[..., 0].numel(), round(weights.shape[-1] ** 0.5)
    size = patch + K - 1
    around = F.unfold(frames, size, padding=K // 2, stride=patch)  # of each patch, what may move there
    around = around.view(N, C, size * size, -1).permute(1, 0, 3, 2).reshape(C, patches, size, size)
    with torch.autocast(frames.device.type, enabled=False):
        moved = F.conv2d(around, weights.reshape(patches, 1, K, K), groups=patches)  # each patch has its own kernel
    moved = moved.view(C, N, H // patch, W // patch, patch, patch)
    return moved.permute(1, 0, 2, 4, 3, 5).reshape(N, C, H, W)


@functools.cache
def library(patch, K):
    return native.build("advect.c", f"-DP={patch}", f"-DK={K}")


class Advect(torch.autograd.Function):
    """The same in C: on a CPU the grouped convolution above takes as long as the ConvLSTM."""

    @staticmethod
    def forward(ctx, frames, weights, patch):
        frames, weights = frames.contiguous(), weights.contiguous()
        ctx.save_for_backward(frames, weights)
        ctx.patch, moved = patch, torch.empty_like(frames)
        run("forward", patch, frames, weights, moved)
        return moved

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_moved):
        frames, weights = ctx.saved_tensors
        d_weights = torch.empty_like(weights)
        d_frames = torch.empty_like(frames) if ctx.needs_input_grad[0] else frames.new_empty(0)  # a null pointer
        run("backward", ctx.patch, frames, weights, d_moved.contiguous(), d_weights, d_frames)
        return d_frames if ctx.needs_input_grad[0] else None, d_weights, None


def run(name, patch, frames, weights, *others):
    H, W = frames.shape[-2:]
    K, threads = round(weights.shape[-1] ** 0.5), torch.get_num_threads()
    scratch = frames.new_empty(threads, (H + K) * (W + 2 * K + patch + 16) * max(2, patch))
    function = getattr(library(patch, K), f"advect_{name}")
    function(*native.arguments(*frames.shape, threads, frames, weights, *others, scratch))
