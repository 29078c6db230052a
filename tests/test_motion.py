"""Block matching and advection. test_forecast_by_hand has their arithmetic."""

import torch
from test_my_model import seeded  # noqa: F401

from motion import advect, block_match


def test_block_matching_finds_a_move():
    before = torch.rand(2, 3, 32, 32)
    frames = torch.rand_like(before)
    frames[0, :, 2:, :-3] = before[0, :, :-2, 3:]  # the first came from two above and three to the right
    likely = block_match(frames.requires_grad_(), before, 4, 4)
    assert likely.shape == (2, 81, 8, 8) and not likely.requires_grad
    torch.testing.assert_close(likely.sum(1), torch.ones(2, 8, 8))
    move = (4 - 2) * 9 + 4 + 3
    assert (likely[0, move, 2:, :-2] > 0.99).all()  # at the border, frames[0] is noise
    assert (likely[1, move] < 0.5).all()


def test_motion_is_never_in_bf16():
    frames, before = torch.rand(2, 1, 1, 32, 32).bfloat16()
    weights = torch.rand(1, 8, 8, 9)
    with torch.autocast("cpu", torch.bfloat16):
        likely = block_match(frames, before.float(), 4, 2)
        moved = advect(before.float(), weights, 4)
    assert likely.dtype == moved.dtype == torch.float32
    assert torch.equal(likely, block_match(frames.float(), before.float(), 4, 2))
    assert torch.equal(moved, advect(before.float(), weights, 4))
