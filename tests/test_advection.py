"""Advection: against frames moved by hand, and its twins against each other, forward and backward."""

import pytest
import torch
from conftest import skip_without_compiler

import advection

TWINS = advection.plain_advect, advection.advect


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def only(K, row, column, patches):
    """Weights (*patches, K²) of one move alone."""
    weights = torch.zeros(*patches, K, K)
    weights[..., row, column] = 1
    return weights.flatten(-2)


@pytest.mark.parametrize("advect", TWINS)
def test_one_weight_moves_the_frame(advect):
    frames = torch.rand(2, 3, 8, 12)
    moved = advect(frames, only(5, 2 - 1, 2 + 2, (2, 2, 3)), 4)  # what is one above and two to the right comes here
    expected = torch.zeros_like(frames)
    expected[:, :, 1:, :-2] = frames[:, :, :-1, 2:]
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("advect", TWINS)
def test_each_patch_moves_by_its_own_weights(advect):
    frames = torch.rand(2, 1, 4, 4)
    weights = only(3, 1, 1, (2, 2, 2))  # at rest
    weights[1, 0, 1] = only(3, 1, 0, ()) * 0.25 + only(3, 2, 1, ()) * 0.75  # the second image's upper right patch
    moved, expected = advect(frames, weights, 2), frames.clone()
    expected[1, 0, :2, 2:] = 0.25 * frames[1, 0, :2, 1:3] + 0.75 * frames[1, 0, 1:3, 2:]
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("still", [True, False], ids=["frames_of_the_data", "frames_with_gradient"])
@pytest.mark.parametrize(
    ("shape", "patch", "K"),
    [((3, 1, 64, 64), 4, 9), ((2, 3, 16, 24), 4, 5), ((2, 2, 12, 18), 6, 3), ((1, 1, 5, 7), 1, 7)],
)
def test_compiled_is_plain(shape, patch, K, still):
    skip_without_compiler()
    assert advection.library(patch, K) is not None
    frames = torch.rand(shape, requires_grad=not still)
    weights = torch.randn(shape[0], shape[2] // patch, shape[3] // patch, K * K).softmax(-1).requires_grad_()
    d_moved = torch.randn(shape)
    results = []
    for advect in TWINS:
        moved = advect(frames, weights, patch)
        results.append((moved, *torch.autograd.grad(moved, (weights,) if still else (weights, frames), d_moved)))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


def test_gradients():
    frames = torch.rand(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 2, 3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(advection.advect, (frames, weights, 2))


@pytest.mark.parametrize("advect", TWINS)
def test_autocast_leaves_it_in_fp32(advect):
    frames, weights = torch.rand(1, 1, 8, 8), torch.rand(1, 2, 2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(advect(frames, weights, 4), advect(frames.clone(), weights, 4)) is True
        found = advect(frames, weights, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, advect(frames, weights, 4), rtol=0, atol=0)


def test_without_a_compiler_or_for_large_patches_it_is_plain(monkeypatch):
    frames, weights = torch.rand(1, 1, 64, 64), torch.rand(1, 1, 1, 9)
    torch.testing.assert_close(advection.advect(frames, weights, 64), advection.plain_advect(frames, weights, 64))
    monkeypatch.setattr(advection, "library", lambda patch, K: None)
    monkeypatch.setattr(advection, "run", None)
    assert advection.advect(frames, torch.rand(1, 16, 16, 81), 4).shape == frames.shape
