"""`block_match` measures how patches moved, for the encoder. `advect` moves patches, as the head decides.

Neither is in the ConvLSTM paper.
N images, C channels, H height, W width, P patch size. A patch comes from one of K² places, with
K = 2·max_motion + 1. Place (row, column) is row − max_motion pixels below the patch, and column − max_motion
to its right.
"""

import torch
import torch.nn.functional as F

SHARPNESS = 16  # of block matching: a move at half the mean cost is e⁸ times as probable as one at the mean


def advect(frames, weights, patch_size):
    """Replace each patch by a weighted mean of the K² patches at most max_motion pixels away, in x and in y.

    frames (N, C, H, W), weights (N, H/P, W/P, K²) → (N, C, H, W). Beyond the border all is 0.
    After the dynamic neural advection of Finn et al. (2016), https://arxiv.org/abs/1605.07157.
    """
    N, C, H, W = frames.shape
    K = round(weights.shape[-1] ** 0.5)
    size = patch_size + K - 1
    padded = F.pad(frames, [K // 2] * 4)
    around = padded.unfold(2, size, patch_size).unfold(3, size, patch_size)  # (N, C, H/P, W/P, size, size)
    moves = around.unfold(4, patch_size, 1).unfold(5, patch_size, 1)  # (N, C, H/P, W/P, K, K, P, P)
    with torch.autocast(frames.device.type, enabled=False):
        moved = torch.einsum("nchwklij,nhwkl->nchiwj", moves, weights.unflatten(-1, (K, K)))
    return moved.reshape(N, C, H, W)


def matching_costs(frames, before, patch_size, max_motion):
    """For each move, squared differences to `before`, summed over a patch → (N, H/P, W/P, K²)."""
    H, W = frames.shape[-2:]
    K = 2 * max_motion + 1
    before = F.pad(before, [max_motion] * 4)
    costs = []
    for row in range(K):  # all horizontal moves at once: a GPU wants few large steps
        moved = before[..., row : row + H, :].unfold(3, W, 1)  # (N, C, H, K, W), a view
        squares = (frames[..., None, :] - moved).square_().sum(1)
        costs.append(patch_size**2 * F.avg_pool2d(squares.transpose(1, 2), patch_size))  # (N, K, H/P, W/P)
    return torch.cat(costs, 1).permute(0, 2, 3, 1)


@torch.no_grad()
def block_match(frames, before, patch_size, max_motion, match=matching_costs):
    """Probability of each move of each patch: frames and before (N, C, H, W) → (N, K², H/P, W/P).

    before: for each frame, the one that precedes it. The cost of a move is the mean of `matching_costs` over
    the patch and its eight neighbors. One patch alone often has the aperture problem: motion along a straight
    edge cannot be seen. Costs are divided by their mean over the moves, so that contrast hardly matters. A
    softmax turns them into probabilities.
    """
    wide = torch.promote_types(frames.dtype, torch.float32)  # bf16 is too coarse for costs
    frames, before = frames.to(wide).contiguous(), before.to(wide).contiguous()
    cost = match(frames, before, patch_size, max_motion)
    cost = F.avg_pool2d(cost.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    relative = cost / (cost.mean(-1, keepdim=True) + 1e-6)
    # softmax is fast over the last axis
    return (-SHARPNESS * relative).softmax(-1).permute(0, 3, 1, 2).contiguous()
