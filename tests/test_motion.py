"""Block matching, advection and motion layers. test_forecast_by_hand has their arithmetic."""

import torch
from test_my_model import seeded  # noqa: F401

from motion import advect, block_match, move_layers


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


def test_motion_layers_part_what_moves_apart():
    """Two bars cross. Given how each moves, either layer ends with one bar, and moves that alone."""
    down, right = torch.zeros(2, 6, 1, 1, 16, 16)
    for t in range(6):
        down[t, ..., 2 * t : 2 * t + 2, 4:12], right[t, ..., 4:12, t + 5] = 1, 1
    weights = torch.zeros(1, 2, 4, 4, 25)
    weights[:, 0, ..., 0 * 5 + 2] = 1  # from two rows above
    weights[:, 1, ..., 2 * 5 + 1] = 1  # from one column to the left
    expected = torch.zeros(1, 2, 1, 16, 16)
    for t in range(5):
        expected = move_layers(torch.maximum(down[t], right[t]), expected.requires_grad_(), weights, 4)
        assert not expected.requires_grad  # a pixel's owner is found, not learned
    torch.testing.assert_close(expected[0], torch.stack((down[5, 0], right[5, 0])), rtol=0, atol=0.05)
