"""`advect` and `matching_costs` of motion.py, compiled for the CPU, in fp32."""

import functools

import torch

import motion as plain
from support.fast import build


def advect(frames, weights, patch_size):
    """`motion.advect`, many times as fast on a CPU."""
    if frames.device.type == "cpu" and frames.dtype == weights.dtype == torch.float32:
        return Advect.apply(frames, weights, patch_size)
    return plain.advect(frames, weights, patch_size)


def matching_costs(frames, before, patch_size, max_motion):
    """`motion.matching_costs`, many times as fast on a CPU."""
    if frames.device.type != "cpu" or frames.dtype != torch.float32:
        return plain.matching_costs(frames, before, patch_size, max_motion)
    N, _, H, W = frames.shape
    costs = frames.new_empty(N, H // patch_size, W // patch_size, (2 * max_motion + 1) ** 2)
    call("match", patch_size, before, costs, frames)
    return costs


class Advect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, frames, weights, patch_size):
        frames, weights = frames.contiguous(), weights.contiguous()
        ctx.save_for_backward(frames, weights)
        ctx.patch_size = patch_size
        moved = torch.empty_like(frames)
        call("advect_forward", patch_size, frames, weights, moved)
        return moved

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_moved):
        frames, weights = ctx.saved_tensors
        d_weights = torch.empty_like(weights)
        d_frames = torch.empty_like(frames) if ctx.needs_input_grad[0] else None
        call("advect_backward", ctx.patch_size, frames, weights, d_moved.contiguous(), d_weights, d_frames)
        return d_frames, d_weights, None


def call(name, patch_size, frames, of_moves, *others):
    """Call a function of advect.c. of_moves: the weights or the costs, (N, H/P, W/P, K²)."""
    H, W = frames.shape[-2:]
    K, threads = round(of_moves.shape[-1] ** 0.5), torch.get_num_threads()
    scratch = frames.new_empty(threads, 2, H + K, W + 2 * K + patch_size + 16)  # a bit more than needed
    function = getattr(compiled(patch_size, K), name)
    function(*build.arguments(*frames.shape, threads, frames, of_moves, *others, scratch))


@functools.cache
def compiled(patch_size, K):
    """advect.c for these sizes; None where it cannot be built."""
    return build.build("advect.c", f"-DP={patch_size}", f"-DK={K}")
