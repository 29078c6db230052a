"""Advection and block matching: against frames moved by hand, and their twins against each other."""

import pytest
import torch
from conftest import skip_without_compiler

import advection

TWINS = advection.plain_advect, advection.advect
SHAPES = [((3, 1, 64, 64), 4, 9), ((5, 3, 16, 24), 4, 5), ((2, 2, 12, 18), 6, 3), ((1, 1, 5, 7), 1, 7)]


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
@pytest.mark.parametrize(("shape", "patch", "K"), SHAPES)
def test_compiled_is_plain(shape, patch, K, still, threads):
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


@pytest.mark.parametrize("advect", TWINS)
def test_autocast_leaves_it_in_fp32(advect):
    frames, weights = torch.rand(1, 1, 8, 8), torch.rand(1, 2, 2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        moved = advect(frames, weights, 4)
    assert moved.dtype == torch.float32
    assert torch.equal(moved, advect(frames, weights, 4))


@pytest.mark.parametrize("kind", ["no_compiler", "large_patch", "float64", "mixed"])
def test_where_the_compiled_twin_cannot_serve_it_is_plain(kind, monkeypatch):
    monkeypatch.setattr(advection, "Advect", None)
    monkeypatch.setattr(advection, "call", None)
    patch, exact = (64 if kind == "large_patch" else 4), (torch.float64 if kind == "float64" else torch.float32)
    frames, weights = torch.rand(1, 1, 64, 64, dtype=exact), torch.rand(1, 64 // patch, 64 // patch, 9, dtype=exact)
    if kind == "no_compiler":
        monkeypatch.setattr(advection, "library", lambda patch, K: None)
    if kind == "mixed":
        with pytest.raises(RuntimeError, match="type"):  # of torch's convolution
            advection.advect(frames, weights.double(), patch)
    else:
        assert torch.equal(advection.advect(frames, weights, patch), advection.plain_advect(frames, weights, patch))
        assert (advection.block_match(frames, frames, patch, 3).argmax(1) == 4).all()  # at rest


@pytest.mark.parametrize("exact", [torch.float32, torch.float64], ids=["compiled", "plain"])
def test_block_matching_finds_a_move(exact):
    before = torch.rand(2, 3, 32, 32, dtype=exact)
    frames = torch.rand_like(before)
    frames[0, :, 2:, :-3] = before[0, :, :-2, 3:]  # of the first, what is two above and three to the right came here
    likely = advection.block_match(frames, before, 4, 9)
    assert likely.shape == (2, 81, 8, 8) and likely.dtype == exact
    torch.testing.assert_close(likely.sum(1), torch.ones(2, 8, 8, dtype=exact))
    move = (4 - 2) * 9 + 4 + 3
    assert (likely[0, move, 2:, :-2] > 0.99).all()  # at the border, frames[0] is noise
    assert (likely[1, move] < 0.5).all()


@pytest.mark.parametrize("kinds", [(torch.bfloat16, torch.float32), (torch.bfloat16,) * 2], ids=["mixed", "bf16"])
def test_block_matching_is_never_in_bf16(kinds):
    frames, before = (torch.rand(1, 1, 32, 32).to(kind) for kind in kinds)
    with torch.autocast("cpu", torch.bfloat16):
        likely = advection.block_match(frames, before, 4, 5)
    assert likely.dtype == torch.float32
    assert torch.equal(likely, advection.block_match(frames.float(), before.float(), 4, 5))


def test_block_matching_of_a_black_past_knows_nothing():
    likely = advection.block_match(torch.rand(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), 4, 5)
    torch.testing.assert_close(likely, torch.full_like(likely, 1 / 25))


@pytest.mark.parametrize(("shape", "patch", "K"), SHAPES)
def test_compiled_matching_is_plain(shape, patch, K, threads, monkeypatch):
    skip_without_compiler()
    frames, before = torch.rand(shape), torch.rand(shape)
    compiled = advection.block_match(frames, before, patch, K)
    monkeypatch.setattr(advection, "library", lambda patch, K: None)
    torch.testing.assert_close(compiled, advection.block_match(frames, before, patch, K), rtol=0, atol=1e-5)


def test_block_matching_passes_no_gradient():
    frames = torch.rand(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)  # the compiled twin could pass none
    assert not advection.block_match(frames, frames.roll(1, -1), 4, 5).requires_grad


def test_an_edited_plain_match_is_heeded(monkeypatch):
    plain, pair = advection.plain_match, torch.rand(2, 1, 1, 12, 12)
    monkeypatch.setattr(advection, "plain_match", lambda *args: 0 * plain(*args))
    advection.library.cache_clear()
    found = advection.block_match(*pair, 4, 5)
    advection.library.cache_clear()  # of what was built from the edit
    torch.testing.assert_close(found, torch.full_like(found, 1 / 25))


def test_an_edited_plain_advect_is_heeded(monkeypatch):
    plain, frames, weights = advection.plain_advect, torch.rand(1, 1, 12, 12), torch.rand(1, 3, 3, 25)
    monkeypatch.setattr(advection, "plain_advect", lambda *args: plain(*args) * 0.99)
    advection.library.cache_clear()
    found = advection.advect(frames, weights, 4)
    advection.library.cache_clear()  # of what was built from the edit
    torch.testing.assert_close(found, 0.99 * plain(frames, weights, 4))


def test_building_draws_no_random_numbers():
    before = torch.get_rng_state()
    advection.library.cache_clear()
    advection.advect(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 1, 9), 4)
    assert torch.equal(torch.get_rng_state(), before)
