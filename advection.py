"""The motion of each patch: measured by block matching for the encoder, and applied, as learned, by the head.

`advect` moves a frame, after the dynamic neural advection of Finn et al. (2016), arXiv 1605.07157: each patch of the
next frame is a weighted mean of the K×K patches of the last frame around it, a pixel apart, with weights that the
network gives (there, each pixel has its own). `block_match` says how well each of these moves explains a frame.
N images, C channels, H height, W width, P patch.
"""

import functools

import torch
import torch.nn.functional as F

import native

LARGEST_PATCH = 32  # of the compiled twins: one keeps a whole patch on its stack


def advect(frames, weights, patch):
    """frames (N, C, H, W), weights (N, H/P, W/P, K²), K odd → (N, C, H, W); beyond the border all is black."""
    on_cpu = frames.device.type == "cpu" and frames.dtype == weights.dtype == torch.float32
    if on_cpu and library(patch, kernel_size(weights)):
        return Advect.apply(frames, weights, patch)
    return plain_advect(frames, weights, patch)


def plain_advect(frames, weights, patch):
    N, C, H, W = frames.shape
    patches, K = weights[..., 0].numel(), kernel_size(weights)
    size = patch + K - 1
    around = F.unfold(frames, size, padding=K // 2, stride=patch)  # of each patch, what may move there
    around = around.view(N, C, size * size, -1).permute(1, 0, 3, 2).reshape(C, patches, size, size)
    with torch.autocast(frames.device.type, enabled=False):
        moved = F.conv2d(around, weights.reshape(patches, 1, K, K), groups=patches)  # each patch has its own kernel
    moved = moved.view(C, N, H // patch, W // patch, patch, patch)
    return moved.permute(1, 0, 2, 4, 3, 5).reshape(N, C, H, W)


@torch.no_grad()
def block_match(frames, before, patch, K):
    """frames and those before them (N, C, H, W), K odd → how likely each move is, (N, K², H/P, W/P), of sum 1.

    A softmax over moves of minus the squared difference between the frame and the one before, moved, over the patch and
    its eight neighbours: a patch alone is often a straight edge, which looks the same wherever it moves along itself.
    """
    wide = torch.promote_types(frames.dtype, torch.float32)  # drawn frames may be bf16, too coarse for an exponent
    frames, before = frames.to(wide).contiguous(), before.to(wide).contiguous()
    if frames.device.type == "cpu" and wide == torch.float32 and library(patch, K):
        costs = frames.new_empty(len(frames), frames.shape[2] // patch, frames.shape[3] // patch, K * K)
        call(library(patch, K).match, patch, before, costs, frames)
    else:
        costs = plain_match(frames, before, patch, K)
    costs = F.avg_pool2d(costs.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    return (-9 * costs).softmax(-1).permute(0, 3, 1, 2).contiguous()  # softmax is fast over the last axis


def plain_match(frames, before, patch, K):
    """The squared difference of each patch to each of K² in the frame before, (N, H/P, W/P, K²); beyond it is black."""
    H, W = frames.shape[-2:]
    before = F.pad(before, [K // 2] * 4)
    costs = []
    for row in range(K):  # and all columns at once, as a GPU wants few large steps
        moved = before[..., row : row + H, :].unfold(3, W, 1)  # (N, C, H, K, W), a view
        squares = (frames[..., None, :] - moved).square_().sum(1)
        costs.append(patch**2 * F.avg_pool2d(squares.transpose(1, 2), patch))  # (N, K, H/P, W/P)
    return torch.cat(costs, 1).permute(0, 2, 3, 1)


def kernel_size(weights):
    return round(weights.shape[-1] ** 0.5)


@functools.cache
def library(patch, K):
    """advect.c, built; None where that fails, or where its plain twins have been edited and say something else.

    (An edit that changes no more than the gradient of plain_advect is not noticed.)
    """
    built = native.build("advect.c", f"-DP={patch}", f"-DK={K}") if patch <= LARGEST_PATCH else None
    if built is not None:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            frames, weights = torch.rand(1, 2, 2 * patch, 2 * patch), torch.rand(1, 2, 2, K * K)
            moved, costs = torch.empty_like(frames), torch.empty_like(weights)
            call(built.advect_forward, patch, frames, weights, moved)
            call(built.match, patch, moved, costs, frames)
            expected = plain_advect(frames, weights, patch), plain_match(frames, moved, patch, K)
            if not all(torch.allclose(*pair, rtol=1e-4) for pair in zip((moved, costs), expected, strict=True)):
                return None
    return built


class Advect(torch.autograd.Function):
    """The same in C, many times as fast as the grouped convolution above is on a CPU."""

    @staticmethod
    def forward(ctx, frames, weights, patch):
        frames, weights = frames.contiguous(), weights.contiguous()
        ctx.save_for_backward(frames, weights)
        ctx.patch = patch
        moved = torch.empty_like(frames)
        call(library(patch, kernel_size(weights)).advect_forward, patch, frames, weights, moved)
        return moved

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_moved):
        frames, weights = ctx.saved_tensors
        d_weights = torch.empty_like(weights)
        d_frames = torch.empty_like(frames) if ctx.needs_input_grad[0] else None
        function = library(ctx.patch, kernel_size(weights)).advect_backward
        call(function, ctx.patch, frames, weights, d_moved.contiguous(), d_weights, d_frames)
        return d_frames, d_weights, None


def call(function, patch, frames, of_moves, *others):
    """A function of advect.c; of_moves (N, H/P, W/P, K²), the weights or the costs."""
    H, W = frames.shape[-2:]
    K, threads = kernel_size(of_moves), torch.get_num_threads()
    scratch = frames.new_empty(threads, (H + K) * (W + 2 * K + patch + 16) * max(2, patch))  # more than any needs
    function(*native.arguments(*frames.shape, threads, frames, of_moves, *others, scratch))
