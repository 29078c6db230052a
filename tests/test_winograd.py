"""Winograd's convolution against torch's in float64: outputs, both gradients, sizes that no tile divides."""

import ctypes
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import skip_without_compiler

import fast_convlstm
import winograd

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3}  # of the largest value
KINDS = [(3, torch.float32), (5, torch.float32), (5, torch.bfloat16)]  # those that it serves


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    skip_without_compiler()
    monkeypatch.setattr(winograd, "has_amx", lambda: False)
    monkeypatch.setattr(winograd, "PAYS_FROM", dict.fromkeys(winograd.PAYS_FROM, 1))
    torch.manual_seed(0)


def relative_error(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("k, dtype", KINDS)
@pytest.mark.parametrize(
    "N, H, W, n_in, n_out",
    [
        pytest.param(2, 16, 16, 64, 256, id="a_layer"),
        pytest.param(1, 1, 1, 32, 32, id="one_pixel"),
        pytest.param(3, 5, 7, 32, 96, id="no_whole_tiles"),
        pytest.param(2, 9, 2, 96, 32, id="narrower_than_a_kernel"),
        pytest.param(45, 6, 9, 32, 64, id="many_blocks"),  # 270 tiles: 4 blocks of 64, and some
    ],
)
def test_it_is_the_convolution_and_its_gradients(threads, N, H, W, n_in, n_out, k, dtype):
    x, dy = torch.randn(N, H, W, n_in).to(dtype), torch.randn(N, H, W, n_out).to(dtype)
    weight, bias = (torch.randn(n_out, n_in, k, k) / k / n_in**0.5).to(dtype), torch.randn(n_out).to(dtype)
    assert winograd.serves(weight, 1)
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = F.conv2d(exact_x.permute(0, 3, 1, 2), exact_weight, bias.double(), padding=k // 2).permute(0, 2, 3, 1)
    exact.backward(dy.double())
    pairs = {
        "y": (fast_convlstm.convolution(weight, 1, bias)(x), exact.detach()),
        "added": (fast_convlstm.convolution(weight, 1)(x, dy.clone()), exact.detach() - bias.double() + dy.double()),
        "dx": (fast_convlstm.convolution(fast_convlstm.turned(weight), 1)(dy), exact_x.grad),
        "d_weight": (fast_convlstm.weight_gradient(dy, x, weight), exact_weight.grad),
    }
    for name, (found, expected) in pairs.items():
        assert found.dtype == dtype and found.shape == expected.shape, name
        assert relative_error(found, expected) < TOLERANCE[dtype], name


def test_autocast_changes_nothing():
    x, dy, weight = torch.randn(2, 6, 5, 32), torch.randn(2, 6, 5, 32), torch.randn(32, 32, 3, 3)
    results = lambda: (fast_convlstm.convolution(weight, 1)(x), fast_convlstm.weight_gradient(dy, x, weight))
    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("k, dtype", KINDS)
@pytest.mark.parametrize("function", ["convolve", "kernel_gradient"])
def test_a_wrong_one_is_noticed(function, k, dtype, monkeypatch):
    library = winograd.library(dtype, k)
    functions = {name: getattr(library, name) for name in ("convolve", "kernel_gradient")}

    def wrong(*arguments):
        getattr(library, function)(*arguments)
        ctypes.memset(arguments[-2], 0, 64)  # some of the result

    broken = types.SimpleNamespace(**functions | {function: wrong})
    monkeypatch.setattr(winograd, "works", winograd.works.__wrapped__)
    assert winograd.works(dtype, k)
    monkeypatch.setattr(winograd, "library", lambda *_: broken)
    assert not winograd.works(dtype, k) and not winograd.serves(torch.zeros(32, 32, k, k, dtype=dtype), 1)


@pytest.mark.parametrize("k", [3, 5])
def test_few_channels_in(k):
    x, dy, weight = torch.randn(2, 6, 5, 16), torch.randn(2, 6, 5, 32), torch.randn(32, 16, k, k).requires_grad_()
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=k // 2).permute(0, 2, 3, 1)
    expected.backward(dy)
    assert relative_error(fast_convlstm.convolution(weight.detach(), 1)(x), expected.detach().double()) < 2e-5
    assert relative_error(fast_convlstm.weight_gradient(dy, x, weight.detach()), weight.grad.double()) < 2e-5


@pytest.mark.parametrize("k, dtype", KINDS)
def test_nan_and_infinity_are_seen(k, dtype):
    x, weight = torch.randn(1, 8, 8, 32), torch.randn(32, 32, k, k).to(dtype)
    for bad in (torch.nan, torch.inf):
        x[0, 2, 5, 7] = bad
        y = fast_convlstm.convolution(weight, 1)(x.to(dtype))
        assert not y[0, 1:4, 4:7].isfinite().any()


@pytest.mark.parametrize(
    "shape, dtype",
    [
        pytest.param((32, 15, 3, 3), torch.float32, id="odd_channels_in"),
        pytest.param((36, 16, 3, 3), torch.float32, id="odd_channels_out"),
        pytest.param((32, 16, 1, 1), torch.float32, id="1x1"),
        pytest.param((32, 16, 7, 7), torch.float32, id="7x7"),
        pytest.param((32, 16, 3, 3), torch.float64, id="double"),
        pytest.param((32, 16, 3, 3), torch.bfloat16, id="3x3_bf16"),
    ],
)
def test_the_others_are_left_to_torch(shape, dtype):
    assert not winograd.serves(torch.zeros(shape, dtype=dtype), 10**9)


def test_bf16_is_left_to_amx(monkeypatch):
    weight = torch.zeros(32, 16, 5, 5)
    assert winograd.serves(weight, 1) and winograd.serves(weight.bfloat16(), 1)
    monkeypatch.setattr(winograd, "has_amx", lambda: True)
    assert winograd.serves(weight, 1) and not winograd.serves(weight.bfloat16(), 1)


def test_all_is_left_to_torch_without_a_library(monkeypatch):
    monkeypatch.setattr(winograd, "works", winograd.works.__wrapped__)
    monkeypatch.setattr(winograd, "library", lambda dtype, k: None)
    assert not winograd.serves(torch.zeros(32, 16, 3, 3), 1)
