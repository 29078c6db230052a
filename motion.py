"""How patches move: `block_match` measures it for the encoder, `move_layers` applies it in the head.

Neither is in the ConvLSTM paper.
N images, C channels, H height, W width, L motion layers; P patch size. K = 2·max_motion + 1, so each patch
has K² possible moves.
"""

import torch
import torch.nn.functional as F

OWNERSHIP_FLOOR = 0.05  # keeps every motion layer able to claim any pixel


def advect(frames, weights, patch_size):
    """Move each patch: a weighted mean of the K² shifted patches around it, in one-pixel steps.

    frames (N, C, H, W), weights (N, H/P, W/P, K²) → (N, C, H, W). Beyond the border all is black.
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
    """Squared difference of each patch to the frame before, for each move → (N, H/P, W/P, K²)."""
    H, W = frames.shape[-2:]
    K = 2 * max_motion + 1
    before = F.pad(before, [max_motion] * 4)
    costs = []
    for row in range(K):  # all columns at once, as a GPU wants few large steps
        moved = before[..., row : row + H, :].unfold(3, W, 1)  # (N, C, H, K, W), a view
        squares = (frames[..., None, :] - moved).square_().sum(1)
        costs.append(patch_size**2 * F.avg_pool2d(squares.transpose(1, 2), patch_size))  # (N, K, H/P, W/P)
    return torch.cat(costs, 1).permute(0, 2, 3, 1)


@torch.no_grad()
def block_match(frames, before, patch_size, max_motion, costs=matching_costs):
    """Probability of each move of each patch: frames and before (N, C, H, W) → (N, K², H/P, W/P).

    before: the frame that precedes each.

    Squared differences are summed over the patch and its eight neighbors; then a softmax of minus the sums.
    One patch alone often has the aperture problem: motion along a straight edge cannot be seen.
    """
    wide = torch.promote_types(frames.dtype, torch.float32)  # bf16 is too imprecise for the argument of exp
    frames, before = frames.to(wide).contiguous(), before.to(wide).contiguous()
    cost = costs(frames, before, patch_size, max_motion)
    means = F.avg_pool2d(cost.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    return (-9 * means).softmax(-1).permute(0, 3, 1, 2).contiguous()  # softmax is fast over the last axis


def move_layers(frame, expected, weights, patch_size, advect=advect):
    """Split a frame into motion layers, and move each by its own weights → what each should show next.

    frame (N, C, H, W); expected, what each layer should show of it, (N, L, C, H, W); weights
    (N, L, H/P, W/P, K²) → (N, L, C, H, W). A layer claims a pixel by what it expects there. It gets the pixel
    times its claim divided by the largest claim. After the layers of Wang & Adelson (1994).
    """
    claims = expected.detach() + OWNERSHIP_FLOOR  # no gradient: ownership is not learned
    layers = frame[:, None] * (claims / claims.amax(1, keepdim=True))
    moved = advect(layers.flatten(0, 1), weights.flatten(0, 1), patch_size)
    return moved.unflatten(0, layers.shape[:2])
