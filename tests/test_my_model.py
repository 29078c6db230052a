"""The network against the paper's counts, equations worked out by hand, loops, and finite differences."""

import ctypes
import functools
import math
import shutil
import subprocess
import types
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import skip_without_compiler

import advection
import fast_convlstm
import main
import native
import winograd
from fast_convlstm import FastConvLSTM
from my_model import ConvLSTM, ConvLSTMCell, EncoderForecaster
from symmetry import FLIPS, directions, exchanged, square

DTYPES = [torch.float32, torch.bfloat16]  # those that have compiled gates


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomised(module):
    """With all parameters random: peepholes and biases start constant, which would hide mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5 if p.ndim < 3 else (p.numel() / p.shape[0]) ** -0.5)
    return module


def small(**options):
    return randomised(EncoderForecaster(**{"hidden": (3, 2), "kernel_size": 3, "patch": 2} | options))


def relative_error(found, expected):
    """The largest difference, in units of the largest value."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).abs().max() / expected.abs().max()).item()


# Parameters of the paper's Table 1 ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel_size", "state_kernel_size", "hidden", "count"),
    [
        (5, 5, (256,), 13_524_496),
        (5, 5, (128, 128), 10_042_896),
        (5, 5, (128, 64, 64), 7_585_296),
        (9, 1, (128, 128), 11_550_224),
        (9, 1, (128, 64, 64), 8_830_480),
    ],
)
def test_parameter_counts_of_the_paper(kernel_size, state_kernel_size, hidden, count):
    sizes = {"kernel_size": kernel_size, "state_kernel_size": state_kernel_size}
    assert sum(p.numel() for p in EncoderForecaster(hidden=hidden, **sizes).parameters()) == count


def test_default_is_the_best_network_of_the_paper():
    assert sum(p.numel() for p in EncoderForecaster().parameters()) == 7_585_296


# The cell ----------------------------------------------------------------------------------------------


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize(("with_input", "peephole"), list(product([True, False], repeat=2)))
def test_cell_is_the_equations_on_one_pixel(with_input, peephole):
    cell = ConvLSTMCell(1 if with_input else 0, 1, 1, 1, peephole).double()
    x, h, c = 0.7, -0.4, 1.3
    wx = {"i": 0.9, "f": -1.1, "o": 0.6, "g": 1.7} if with_input else dict.fromkeys("ifog", 0.0)
    wh = {"i": -0.3, "f": 0.8, "o": 1.2, "g": -0.5}
    b = {"i": 0.05, "f": 1.0, "o": -0.2, "g": 0.3}
    wc = {"i": 0.45, "f": -0.65, "o": 0.85} if peephole else dict.fromkeys("ifo", 0.0)

    i = sigmoid(wx["i"] * x + wh["i"] * h + wc["i"] * c + b["i"])
    f = sigmoid(wx["f"] * x + wh["f"] * h + wc["f"] * c + b["f"])
    g = math.tanh(wx["g"] * x + wh["g"] * h + b["g"])
    c_next = f * c + i * g
    o = sigmoid(wx["o"] * x + wh["o"] * h + wc["o"] * c_next + b["o"])
    h_next = o * math.tanh(c_next)

    pixel = lambda *values: torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)
    with torch.no_grad():
        if with_input:
            cell.input_to_state.copy_(pixel(*wx.values()))
        cell.state_to_state.copy_(pixel(*wh.values()))
        cell.bias.copy_(pixel(*b.values()).flatten())
        if peephole:
            cell.peephole.copy_(pixel(*wc.values()).view(3, 1))
        found = cell(pixel(x) if with_input else None, (pixel(h), pixel(c)))
    assert [y.item() for y in found] == pytest.approx([h_next, c_next], abs=1e-14)


def convolve_by_loops(x, weight):
    """x (C_in, H, W) → (C_out, H, W): each kernel laid over each pixel, zeros beyond the edge."""
    (n_out, n_in, k, _), (_, H, W) = weight.shape, x.shape
    y = torch.zeros(n_out, H, W, dtype=x.dtype)
    for a, b, row, column, down, right in product(*map(range, (n_out, n_in, H, W, k, k))):
        r, c = row + down - k // 2, column + right - k // 2
        if 0 <= r < H and 0 <= c < W:
            y[a, row, column] += weight[a, b, down, right] * x[b, r, c]
    return y


@torch.no_grad()
def test_cell_over_space_and_channels():
    cell = randomised(ConvLSTMCell(2, 3, 3, 1)).double()
    x, h, c = (torch.randn(1, n, 3, 4, dtype=torch.float64) for n in (2, 3, 3))
    z = convolve_by_loops(x[0], cell.input_to_state) + convolve_by_loops(h[0], cell.state_to_state)
    h_next, c_next = cell(x, (h, c))
    for k, row, column in product(range(3), range(3), range(4)):  # channel and pixel
        i, f, o, g = (z[k::3, row, column] + cell.bias[k::3]).tolist()  # four gates of three channels
        wi, wf, wo = cell.peephole[:, k].tolist()  # one number a channel, wherever the pixel is
        before = c[0, k, row, column].item()
        after = sigmoid(f + wf * before) * before + sigmoid(i + wi * before) * math.tanh(g)
        assert c_next[0, k, row, column].item() == pytest.approx(after, abs=1e-13)
        hidden = sigmoid(o + wo * after) * math.tanh(after)
        assert h_next[0, k, row, column].item() == pytest.approx(hidden, abs=1e-13)


# The fast layer against its plain twin -----------------------------------------------------------------

LAYERS = [  # in_channels, hidden, input-to-state kernel, state-to-state kernel, (B, T, H, W)
    pytest.param(3, 4, 3, 3, (2, 4, 5, 7), id="3x3"),
    pytest.param(16, 8, 5, 5, (2, 3, 6, 4), id="5x5"),
    pytest.param(2, 5, 5, 3, (1, 4, 4, 9), id="5x5_3x3_batch_of_1"),
    pytest.param(3, 20, 1, 5, (3, 2, 5, 3), id="1x1_5x5"),
    pytest.param(0, 4, 3, 5, (2, 4, 3, 6), id="no_input"),
    pytest.param(0, 3, 3, 3, (1, 1, 1, 1), id="no_input_one_pixel"),
    pytest.param(2, 3, 3, 3, (2, 3, 1, 1), id="one_pixel"),
    pytest.param(1, 1, 3, 3, (1, 1, 1, 1), id="one_of_everything"),
    pytest.param(1, 1, 5, 3, (2, 3, 4, 5), id="one_channel"),
    pytest.param(1, 4, 1, 3, (1, 3, 4, 5), id="one_channel_1x1_batch_of_1"),
    pytest.param(1, 4, 1, 1, (2, 3, 4, 5), id="one_channel_1x1"),
    pytest.param(2, 3, 3, 3, (4, 3, 1, 6), id="one_row"),
    pytest.param(32, 32, 3, 5, (2, 9, 15, 16), id="enough_for_winograd"),
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def run_layer(layer, x, state, n_frames, dtype, fast):
    """Outputs and all gradients by name; dtype bfloat16 means autocast. What is given must stay as it is."""
    layer.fast = fast
    leaves = {"x": x, "h0": state[0], "c0": state[1], **dict(layer.cell.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden_states, (h, c) = layer(x, state, n_frames)
    outputs = {"hidden states": hidden_states, "h": h, "c": c}
    generator = torch.Generator().manual_seed(1)  # the same weighted sum at every call
    loss = sum((y * torch.randn(y.shape, generator=generator)).sum() for y in outputs.values())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for name, leaf in leaves.items():
        assert torch.equal(leaf, before[name]), f"{name} was overwritten"
    return outputs | {f"gradient of {name}": d for name, d in zip(leaves, gradients, strict=True)}


def assert_fast_is_plain(n_in, hidden, kernel_size, state_kernel_size, shape, dtype, peephole, dilation=1, h=1):
    B, T, H, W = shape
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    layer = randomised(ConvLSTM(n_in, hidden, kernel_size, state_kernel_size, peephole, dilation)).to(exact)
    # time before batch in memory, as the layer below leaves it
    x = torch.rand(T, B, n_in, H, W, dtype=exact).transpose(0, 1).requires_grad_() if n_in else None
    state = [s * torch.randn(B, hidden, H, W, dtype=exact) for s in (h, 1)]
    state = [s.requires_grad_() for s in state]
    plain, fast = (run_layer(layer, x, state, T, dtype, fast) for fast in (False, True))
    assert plain.keys() == fast.keys()
    for name, expected in plain.items():
        assert fast[name].shape == expected.shape, name
        assert relative_error(fast[name], expected) < TOLERANCE[dtype], name


@pytest.mark.parametrize("peephole", [True, False], ids=["peephole", "no_peephole"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("n_in", "hidden", "kernel_size", "state_kernel_size", "shape"), LAYERS)
def test_fast_layer_is_its_plain_twin(n_in, hidden, kernel_size, state_kernel_size, shape, dtype, peephole):
    assert_fast_is_plain(n_in, hidden, kernel_size, state_kernel_size, shape, dtype, peephole)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("n_in", [4, 0])
def test_fast_layer_is_its_plain_twin_from_a_hidden_state_of_zeros(n_in, dtype):
    """The cell state is not zero, and both want gradients."""
    assert_fast_is_plain(n_in, 8, 3, 3, (2, 3, 6, 5), dtype, True, h=0)


def test_a_hidden_state_of_zeros_is_not_convolved(monkeypatch):
    layer, calls = ConvLSTM(4, 8, 3, 3), []
    plain = fast_convlstm.convolution

    def counted(*args, **options):
        convolve = plain(*args, **options)
        return lambda x, y=None: calls.append(y is not None) or convolve(x, y)

    monkeypatch.setattr(fast_convlstm, "convolution", counted)
    x, c = torch.rand(2, 5, 4, 6, 6), torch.rand(2, 8, 6, 6)
    for h, convolved in ((torch.zeros_like(c), 4), (c, 5)):
        calls.clear()
        layer(x, (h, c), 5)
        assert sum(calls) == convolved  # these add to what the input left in z


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("dilation", [2, 3])
def test_fast_layer_is_its_plain_twin_with_dilation(dilation, dtype):
    assert_fast_is_plain(4, 8, 5, 3, (2, 3, 6, 5), dtype, True, dilation)
    assert_fast_is_plain(32, 32, 3, 3, (2, 9, 15, 16), dtype, True, dilation)  # enough for winograd


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_a_dilated_kernel_is_a_larger_one_with_zeros(fast):
    dilated, larger = (ConvLSTM(2, 3, 3, *sizes, fast=fast).double() for sizes in ((3, True, 2), (5, True)))
    randomised(dilated)
    with torch.no_grad():
        for p, q in zip(dilated.parameters(), larger.parameters(), strict=True):
            if p.shape == q.shape:
                q.copy_(p)
            else:
                q.zero_()[..., ::2, ::2] = p
    x = torch.rand(2, 4, 2, 6, 7).double()
    torch.testing.assert_close(dilated(x, None, 4), larger(x, None, 4))


@pytest.mark.parametrize("compiler", [None, "false"], ids=["no_compiler", "broken_compiler"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fast_layer_without_compiled_gates(monkeypatch, compiler, dtype):
    found = compiler and shutil.which(compiler)  # `false` is there, and always fails
    monkeypatch.setattr(shutil, "which", lambda name: found)
    not_yet_built = functools.cache(fast_convlstm.gate_functions.__wrapped__)
    monkeypatch.setattr(fast_convlstm, "gate_functions", not_yet_built)
    assert not_yet_built("cpu", dtype) == (fast_convlstm.gates_forward, fast_convlstm.gates_backward)
    for n_in in (3, 0):
        assert_fast_is_plain(n_in, 4, 5, 3, (2, 3, 5, 7), dtype, peephole=True)


def skip_without_packing(dtype):
    """Where oneDNN can convolve in that dtype, packed convolutions must be in use."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bf16 convolutions here")
    assert fast_convlstm.packs("cpu", dtype)


CONVOLUTIONS = [fast_convlstm.packed_convolution, fast_convlstm.plain_convolution]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize(("n_in", "n_out", "k", "dilation"), [(3, 8, 3, 2), (16, 32, 5, 1), (1, 5, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_convolution_can_be_added(kind, n_in, n_out, k, dtype, dilation):
    if kind is fast_convlstm.packed_convolution:
        skip_without_packing(dtype)
    x, y, bias = (torch.randn(s).to(dtype) for s in ((2, 4, 6, n_in), (2, 4, 6, n_out), (n_out,)))
    weight = torch.randn(n_out, n_in, k, k).to(dtype).contiguous(memory_format=torch.channels_last)
    padding = dilation * (k // 2)
    found = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), padding=padding, dilation=dilation)
    found = found.permute(0, 2, 3, 1)
    limit = 2**-8 if dtype == torch.bfloat16 else 1e-6
    convolve = kind(weight, bias, padding, dilation)
    for _ in range(2):  # the weight is packed in the first call
        assert relative_error(convolve(x), found + bias.double()) < limit
        z = torch.stack((y, y))
        assert convolve(x, z[1]).data_ptr() == z[1].data_ptr()  # in place, also where that is a part
        assert relative_error(z[1], found + y.double()) < 2 * limit and torch.equal(z[0], y)


@pytest.mark.parametrize("fault", [AttributeError, RuntimeError, None])
def test_without_packed_convolutions_the_layer_is_the_same(fault, monkeypatch):
    """Another torch may have no such calls, or others by their names."""

    def changed(*args):
        if fault:
            raise fault
        convolve = fast_convlstm.plain_convolution(*args)
        return lambda x, y=None: convolve(x) * 1.001 if y is None else convolve(x, y.clone())  # not in place

    skip_without_packing(torch.float32)
    monkeypatch.setattr(fast_convlstm, "packs", functools.cache(fast_convlstm.packs.__wrapped__))
    monkeypatch.setattr(fast_convlstm, "packed_convolution", changed)
    assert not fast_convlstm.packs("cpu", torch.float32)
    assert_fast_is_plain(3, 4, 5, 3, (2, 3, 5, 7), torch.float32, peephole=True)


@pytest.fixture(scope="module")
def amx():
    skip_without_compiler()
    knows = "gcc", "-mamx-bf16", "-fsyntax-only", "-x", "c", "/dev/null"
    if not winograd.has_amx() or not shutil.which("gcc") or subprocess.run(knows, capture_output=True).returncode:
        pytest.skip("needs AMX, and a gcc that knows it")
    library = native.build("amx.c")
    assert library
    if library.request() != 0:
        pytest.skip("the system lends no AMX")
    assert fast_convlstm.amx_library()
    return library


@pytest.mark.parametrize(
    ("B", "H", "W", "n_in", "n_out", "k", "dilation"),
    [
        pytest.param(8, 16, 16, 64, 256, 3, 2, id="a_layer"),
        pytest.param(3, 7, 6, 32, 96, 5, 2, id="an_image_of_no_whole_tiles"),
        pytest.param(2, 37, 14, 64, 64, 3, 1, id="an_image_of_several_bands"),
        pytest.param(2, 2, 300, 32, 128, 5, 1, id="rows_longer_than_a_band"),
        pytest.param(1, 1, 2, 96, 64, 3, 3, id="smaller_than_a_kernel"),
        pytest.param(2, 50, 10, 64, 64, 1, 1, id="one_tap"),
    ],
)
def test_the_weight_gradient_by_amx(amx, threads, B, H, W, n_in, n_out, k, dilation):
    x, dy = torch.randn(B, H, W, n_in).bfloat16(), torch.randn(B, H, W, n_out).bfloat16()
    weight = torch.zeros(n_out, n_in, k, k, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x.double().permute(0, 3, 1, 2), weight, padding=dilation * (k // 2), dilation=dilation)
    (expected,) = torch.autograd.grad(y, weight, dy.double().permute(0, 3, 1, 2))
    found = fast_convlstm.amx_weight_gradient(amx, dy, x, k, dilation)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-3)  # only the result is rounded to bf16


@pytest.mark.parametrize(
    ("W", "n_in", "n_out", "dtype", "served"),
    [
        (4, 32, 128, torch.bfloat16, True),
        (5, 32, 128, torch.bfloat16, False),
        (4, 16, 128, torch.bfloat16, False),
        (4, 32, 144, torch.bfloat16, False),
        (4, 32, 96, torch.bfloat16, False),  # fewer channels than two threads want
        (300, 32, 128, torch.bfloat16, False),  # more rows reached above and below than in a band, of one row
        (4, 32, 128, torch.float32, False),
    ],
)
def test_where_amx_serves(amx, monkeypatch, W, n_in, n_out, dtype, served):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    calls = []
    counted = lambda *arguments: calls.append(amx.weight_gradient(*arguments))
    monkeypatch.setattr(fast_convlstm, "amx_library", lambda: types.SimpleNamespace(weight_gradient=counted))
    x, dy, weight = (torch.randn(s).to(dtype) for s in ((2, 3, W, n_in), (2, 3, W, n_out), (n_out, n_in, 3, 3)))
    found = fast_convlstm.weight_gradient(dy, x, weight, 2)
    assert len(calls) == served and found.dtype == dtype
    assert relative_error(found, fast_convlstm.plain_weight_gradient(dy, x, weight, 2)) < 2**-7


@pytest.mark.parametrize("fault", ["refused", "wrong"])
def test_without_amx_oneDNN_computes_the_weight_gradient(amx, fault, monkeypatch):
    def wrong(*arguments):
        amx.weight_gradient(*arguments)
        found = ctypes.cast(arguments[-2], ctypes.POINTER(ctypes.c_float))
        found[100] += 10

    broken = types.SimpleNamespace(request=lambda: 0, weight_gradient=wrong)
    if fault == "refused":
        broken = types.SimpleNamespace(request=lambda: -1, weight_gradient=amx.weight_gradient)
    monkeypatch.setattr(native, "build", lambda *_: broken)
    monkeypatch.setattr(fast_convlstm, "amx_library", fast_convlstm.amx_library.__wrapped__)
    assert fast_convlstm.amx_library() is None
    x, dy, weight = (torch.randn(s).bfloat16() for s in ((2, 3, 4, 32), (2, 3, 4, 64), (64, 32, 3, 3)))
    assert fast_convlstm.amx_serves(dy, x, 3, 1)
    found = fast_convlstm.weight_gradient(dy, x, weight)
    assert torch.equal(found, fast_convlstm.plain_weight_gradient(dy, x, weight, 1))


class Repeated(torch.autograd.Function):
    """FastConvLSTM may go backward once only, and gradcheck goes often: forward again each time."""

    @staticmethod
    def forward(ctx, *args):
        ctx.args = args
        return FastConvLSTM.apply(*args)

    @staticmethod
    def backward(ctx, *gradients):
        args = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in ctx.args]
        with torch.enable_grad():
            outputs = FastConvLSTM.apply(*args)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        found = iter(torch.autograd.grad(outputs, tensors, gradients))
        return tuple(next(found) if isinstance(a, torch.Tensor) else None for a in args)


@pytest.mark.parametrize("with_input", [True, False], ids=["input", "no_input"])
def test_fast_gradients_are_finite_differences(with_input):
    T, B, H, W, n_in, C = 2, 1, 3, 3, 2, 2
    leaf = lambda *shape: torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x, input_weight = (leaf(T, B, H, W, n_in), leaf(4 * C, n_in, 3, 3)) if with_input else (None, None)
    args = (
        x,
        leaf(B, H, W, C),
        leaf(B, H, W, C),
        T,
        input_weight,
        leaf(4 * C, C, 3, 3),
        leaf(4 * C),
        leaf(3, C),
        2,
    )
    assert torch.autograd.gradcheck(Repeated.apply, args)


def test_state_goes_on_where_it_stopped():
    layer = randomised(ConvLSTM(2, 3, 3, 3)).double()
    x, state = torch.rand(2, 5, 2, 4, 6).double(), [torch.randn(2, 3, 4, 6).double() for _ in range(2)]
    whole, last = layer(x, state, 5)
    first, between = layer(x[:, :2], state, 2)
    second, end = layer(x[:, 2:], between, 3)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(end, last)


# The compiled gates ------------------------------------------------------------------------------------


@pytest.fixture(params=DTYPES, ids=str)
def compiled(request):
    """dtype and its compiled (gates_forward, gates_backward)."""
    skip_without_compiler()
    forward, backward = fast_convlstm.gate_functions("cpu", request.param)
    assert forward is not fast_convlstm.gates_forward, "there is a compiler, but the gates were not built"
    return request.param, forward, backward


def one_step(forward, dtype, i, f, o, g, c):
    """The gates on pixels (N,) of one channel, without peepholes: the next c and h."""
    z = torch.stack([torch.as_tensor(gate).expand(len(c)) for gate in (i, f, o, g)], 1).to(dtype).contiguous()
    c, h = c[:, None].clone(), torch.empty(len(c), 1, dtype=dtype)
    forward(z, torch.zeros(3, 1), c, torch.empty_like(h), h)
    return c[:, 0], h[:, 0]


def test_compiled_tanh_and_sigmoid(compiled):
    dtype, forward, _ = compiled
    x = torch.linspace(-30, 30, 300_001).to(dtype)  # steps of 0.0002
    x = torch.cat((x, torch.tensor([-math.inf, math.inf], dtype=dtype)))
    nothing, open_gate, shut = torch.zeros(len(x)), torch.tensor(30.0), torch.tensor(-30.0)
    c, h = one_step(forward, dtype, open_gate, shut, open_gate, x, nothing)  # c = tanh(x)
    assert (c.double() - x.double().tanh()).abs().max() < 2e-6
    rounding = 2**-8 if dtype == torch.bfloat16 else 2e-6
    assert (h.double() - x.double().tanh().tanh()).abs().max() < rounding
    c, _ = one_step(forward, dtype, shut, x, open_gate, torch.tensor(0.0), nothing + 1)  # c = σ(x)
    assert (c.double() - x.double().sigmoid()).abs().max() < 2e-6


def gate_arguments(dtype, N, C):
    """Random z, peephole, c of gates_forward, and dh, dh_next, dc of gates_backward."""
    dh, dh_next = torch.randn(2, N, C).to(dtype)
    return torch.randn(N, 4 * C).to(dtype), torch.randn(3, C), torch.randn(N, C), dh, dh_next, torch.randn(N, C)


def forward_and_backward(forward, backward, z, peephole, c, dh, dh_next, dc):
    z, c, dc = z.clone(), c.clone(), dc.clone()
    c_before, h = torch.empty(2, *c.shape, dtype=z.dtype)
    forward(z, peephole, c, c_before, h)
    left = z.clone()
    sums = torch.zeros(torch.get_num_threads(), 7, c.shape[1])
    backward(z, peephole, c_before, dh, dh_next, dc, sums)
    return {"z": left, "c": c, "c_before": c_before, "h": h, "dz": z, "dc": dc, "sums": sums.sum(0)}


@pytest.mark.parametrize(("N", "C"), [(1, 1), (2, 5), (35, 16), (50, 37)])
def test_compiled_gates_are_the_python_ones(compiled, threads, N, C):
    dtype, *gates = compiled
    args = gate_arguments(dtype, N, C)
    found = forward_and_backward(*gates, *args)
    expected = forward_and_backward(fast_convlstm.gates_forward, fast_convlstm.gates_backward, *args)
    assert torch.equal(found["z"], expected["z"]) and torch.equal(found["z"], args[0])  # as they were, for backward
    assert torch.equal(found["c_before"], expected["c_before"])  # rounded to nearest even
    for name in expected:
        rounded = dtype == torch.bfloat16 and name in ("h", "dz")
        assert relative_error(found[name], expected[name]) < (2**-7 if rounded else 2e-5), name


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1], ids=["usual", "all_ones", "all_ones_negative"])
@pytest.mark.parametrize("place", range(6), ids=["z", "peephole", "c", "dh", "dh_next", "dc"])
def test_nan_passes_through_compiled_gates(compiled, place, bits):
    dtype, *gates = compiled
    args = list(gate_arguments(dtype, 6, 20))
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for row, column in ((0, 1), (1, 17), (2, 19)):
        args[place][row, column] = nan
    found = forward_and_backward(*gates, *args)
    expected = forward_and_backward(fast_convlstm.gates_forward, fast_convlstm.gates_backward, *args)
    assert any(y.isnan().any() for y in expected.values())
    for name in expected:
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_nan_passes_through_the_fast_layer(dtype):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    layer = randomised(ConvLSTM(1, 4, 3, 3)).to(exact)
    x, zeros = torch.rand(2, 3, 1, 5, 5, dtype=exact), torch.zeros(2, 4, 5, 5, dtype=exact)
    x[0, 1, 0, 2, 2] = math.nan
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden_states, (_, c) = layer(x, (zeros, zeros), 3)
    assert not hidden_states[0, 0].isnan().any() and not hidden_states[1].isnan().any()
    assert hidden_states[0, 1, :, 1:4, 1:4].isnan().all() and hidden_states[0, 2].isnan().all()
    assert c[0].isnan().all() and not c[1].isnan().any()


# The encoder-forecaster --------------------------------------------------------------------------------


def cut_by_hand(frames, P):
    """(B, T, C, H, W) → (B, T, C·P², H/P, W/P): channel by channel, a patch's pixels row by row."""
    return torch.stack(
        [frames[:, :, c, y::P, x::P] for c in range(frames.shape[2]) for y in range(P) for x in range(P)], 2
    )


def join_by_hand(patches, P):
    """The way back."""
    *some, n, H, W = patches.shape
    frames = patches.new_empty(*some, n // P**2, H * P, W * P)
    for c, y, x in product(range(n // P**2), range(P), range(P)):
        frames[..., c, y::P, x::P] = patches[..., (c * P + y) * P + x, :, :]
    return frames


def advected_by_hand(drawn, shown, expected, P, reach):
    """The head's (B, 2·C·P² + S·K², H/P, W/P), the patches that were shown (B, C·P², H/P, W/P), and S sheets
    (B, C, H, W) that had been expected → patches of logits, and the sheets that are expected next."""
    n, K = shown.shape[1], 2 * reach + 1
    frame = join_by_hand(shown, P)
    B, _, H, W = frame.shape
    sure = torch.stack(expected).max(0).values
    moved = [torch.zeros_like(frame) for _ in expected]
    for s, b, y, x in product(range(len(expected)), range(B), range(H), range(W)):
        weights = torch.exp(drawn[b, 2 * n + s * K * K :, y // P, x // P][: K * K])
        sheet = frame[b] * (expected[s][b] + 0.05) / (sure[b] + 0.05)
        for k, weight in enumerate(weights / weights.sum()):
            row, column = y + k // K - reach, x + k % K - reach
            if 0 <= row < H and 0 <= column < W:
                moved[s][b, :, y, x] += weight * sheet[:, row, column]
    most = cut_by_hand(torch.stack(moved).max(0).values[:, None], P)[:, 0].clamp(0.02, 0.98)
    return drawn[:, :n] + drawn[:, n : 2 * n] * torch.log(most / (1 - most)), moved


def motion_by_hand(frames, before, P, search):
    """(B, C, H, W) and what was before → how likely each move is, (B, K², H/P, W/P)."""
    B, C, H, W = frames.shape
    K, rows, columns = 2 * search + 1, H // P, W // P
    costs = frames.new_zeros(B, K * K, rows, columns)
    for b, k, c, y, x in product(range(B), range(K * K), range(C), range(H), range(W)):
        row, column = y + k // K - search, x + k % K - search
        was = before[b, c, row, column] if 0 <= row < H and 0 <= column < W else 0
        costs[b, k, y // P, x // P] += (frames[b, c, y, x] - was) ** 2
    around = torch.zeros_like(costs)
    for y, x, dy, dx in product(range(rows), range(columns), (-1, 0, 1), (-1, 0, 1)):
        if 0 <= y + dy < rows and 0 <= x + dx < columns:
            around[:, :, y, x] += costs[:, :, y + dy, x + dx]
    likely = torch.exp(-around)
    return likely / likely.sum(1, keepdim=True)


def forecast_by_hand(model, past, n_future, first):
    """Patches, one cell call a layer and frame, the head frame by frame, and patches put together again."""
    P, B, T = model.patch, len(past), past.shape[1]
    x = cut_by_hand(past, P)
    zeros = lambda layer: x.new_zeros(B, layer.cell.hidden, *x.shape[-2:])
    states, drawn = [(zeros(layer), zeros(layer)) for layer in model.encoder], []
    blank = [torch.zeros_like(past[:, 0])] * model.sheets
    sheets = blank[:]

    def step(stack, below, before):
        shown = below
        if model.search and below is not None:
            frames = join_by_hand(below, P), join_by_hand(before, P)
            likely = motion_by_hand(*frames, P, model.search)
            motion = torch.einsum("mk,bkyx->bmyx", model.motion.weight[:, :, 0, 0], likely)
            below = torch.cat((below, motion + model.motion.bias[:, None, None]), 1)
        for k, layer in enumerate(stack):
            states[k] = layer.cell(below, states[k])
            below = states[k][0]
        patches = model.head(torch.cat([h for h, _ in states], 1))
        if model.reach:
            patches, sheets[:] = advected_by_hand(patches, shown, sheets, P, model.reach)
        return patches

    last = torch.zeros_like(x[:, 0])
    for t in range(T):
        if t == ((T - 1) // 2 if first is None else first):
            sheets[:] = blank  # what was before is forgotten
        patches, last = step(model.encoder, x[:, t], last), x[:, t]
        if first is not None and first <= t < T - 1:
            drawn.append(patches)
    for t in range(n_future):
        if model.forecaster is not None:
            patches = step(model.forecaster, None, None)
        elif t > 0:  # the last input frame has drawn the first
            shown = 1 / (1 + torch.exp(-drawn[-1]))
            patches, last = step(model.encoder, shown, last), shown
        drawn.append(patches)
    return join_by_hand(torch.stack(drawn, 1), P)


OPTIONS = [
    pytest.param({}, id="plain_head"),
    pytest.param({"peephole": False, "hidden": (4,)}, id="one_layer_no_peephole"),
    pytest.param({"head": (5,), "state_kernel_size": 1}, id="deep_head_1x1_state"),
    pytest.param({"hidden": (2, 4, 3), "kernel_size": 5}, id="three_layers"),
    pytest.param({"channels": 3, "head": (4, 6), "patch": 4}, id="colour_deep_head"),
    pytest.param({"feedback": True, "head": (4,), "hidden": (3, 4)}, id="feedback"),
    pytest.param({"feedback": True, "channels": 2}, id="feedback_two_channels"),
    pytest.param({"feedback": True, "dilation": 2, "hidden": (3, 4, 2)}, id="feedback_dilation"),
    pytest.param({"feedback": True, "reach": 1, "head": (4,)}, id="reach"),
    pytest.param({"feedback": True, "reach": 2, "channels": 2}, id="reach_two_channels"),
    pytest.param({"feedback": True, "reach": 1, "sheets": 2, "channels": 2}, id="sheets"),
    pytest.param({"feedback": True, "reach": 1, "sheets": 3, "search": 1}, id="three_sheets_search"),
    pytest.param({"feedback": True, "reach": 0, "sheets": 2}, id="sheets_without_reach"),
    pytest.param({"search": 1, "hidden": (3, 4)}, id="search"),
    pytest.param({"feedback": True, "search": 2, "reach": 1, "channels": 2}, id="search_reach"),
    # of a tied kernel, one training step shows that its gradient is projected, not only changed
    pytest.param({"feedback": True, "search": 1, "reach": 1, "sheets": 2, "head": (9,), "symmetric": True}, id="tied"),
]


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("options", OPTIONS)
def test_forecast_by_hand(options, fast):
    model = small(fast=fast, **options).double()
    for T in (4, 1, 3) if model.sheets > 1 else (4,):
        past = torch.rand(2, T, model.channels, 8, 12, dtype=torch.float64)
        for first in {None, 0, (T - 1) // 2, T - 1}:
            expected = forecast_by_hand(model, past, 3, first)
            for train in (True, False):
                model.train(train)
                torch.testing.assert_close(model(past, 3, first), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"search": 4},
        {"reach": 4},
        {"search": 4, "reach": 4},
        {"reach": 4, "sheets": 2},
        {"search": 4, "reach": 4, "sheets": 2},
    ],
    ids=["forecaster", "search", "reach", "search_reach", "sheets", "search_sheets"],
)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_fast_network_is_its_plain_twin(dtype, options, monkeypatch):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    model = EncoderForecaster(hidden=(16, 8), head=(8,), feedback=bool(options), **options).to(exact)
    past = torch.rand(2, 5, 1, 32, 24, dtype=exact)
    results, library = [], advection.library
    for fast in (False, True):
        for layer in (*model.encoder, *(model.forecaster or ())):
            layer.fast = fast
        monkeypatch.setattr(advection, "library", library if fast else lambda patch, K: None)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(past, 4, 2)
            gradients = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
        names = [name for name, _ in model.named_parameters()]
        results.append({"logits": logits} | dict(zip(names, gradients, strict=True)))
    plain, fast = results
    for name, expected in plain.items():
        assert relative_error(fast[name], expected) < TOLERANCE[dtype], name


def test_layers_above_the_first_are_dilated():
    model = EncoderForecaster(hidden=(3, 2, 4), dilation=2)
    for stack in (model.encoder, model.forecaster):
        assert [layer.cell.dilation for layer in stack] == [1, 2, 2]


def test_first_forecaster_layer_has_no_input():
    model = small(hidden=(3, 2, 4))
    with_input = [layer.cell.input_to_state is not None for layer in model.forecaster]
    assert with_input == [False, True, True]
    assert not any(name.startswith("forecaster.0.cell.input") for name in model.state_dict())


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_every_state_is_copied_from_encoder_to_forecaster(fast):
    model = small(hidden=(3, 2, 4), fast=fast)
    left, received = [], []
    for layer in model.encoder:
        layer.register_forward_hook(lambda layer, args, output: left.append(output[1]))
    for layer in model.forecaster:
        layer.register_forward_pre_hook(lambda layer, args: received.append(args[:2]))
    past = torch.rand(2, 3, 1, 8, 8)
    model(past, 2)
    assert received[0][0] is None and received[1][0].shape[2] == 3 and received[2][0].shape[2] == 2
    for k, ((h, c), (_, state)) in enumerate(zip(left, received, strict=True)):
        assert h.shape == c.shape == (2, model.encoder[k].cell.hidden, 4, 4)
        assert not torch.equal(h, c) and torch.equal(h, state[0]) and torch.equal(c, state[1])


@pytest.mark.parametrize(("search", "reach", "sheets"), [(0, 0, 1), (0, 2, 1), (2, 2, 1), (0, 2, 2)])
def test_feedback_has_no_second_stack(search, reach, sheets):
    model = small(hidden=(3, 4), feedback=True, search=search, reach=reach, sheets=sheets)
    assert not any(name.startswith("forecaster") for name in model.state_dict())
    past = torch.rand(1, 3, 1, 8, 8)  # of 3 and of 4, the middle is the second: there sheets begin
    forecast = model(past, 4)
    drawn = torch.sigmoid(forecast[:, :1])  # is what the model goes on with, as if it had been seen
    torch.testing.assert_close(model(torch.cat((past, drawn), 1), 3), forecast[:, 1:])


def test_sheets_part_what_moves_apart():
    """Two bars cross. Told how each moves, either sheet ends with one bar, and is moved on with it alone."""
    model = EncoderForecaster(hidden=(4,), feedback=True, reach=2, sheets=2)
    down, right = torch.zeros(2, 6, 1, 1, 16, 16)
    for t in range(6):
        down[t, ..., 2 * t : 2 * t + 2, 4:12], right[t, ..., 4:12, t + 5] = 1, 1
    weights = torch.zeros(1, 2, 4, 4, 25)
    weights[:, 0, ..., 0 * 5 + 2] = 1  # from two rows above
    weights[:, 1, ..., 2 * 5 + 1] = 1  # from one column to the left
    expected = torch.zeros(1, 2, 1, 16, 16)
    for t in range(5):
        expected = model.move(torch.maximum(down[t], right[t]), expected.requires_grad_(), weights)
        assert not expected.requires_grad  # a pixel's owner is found, not learned
    torch.testing.assert_close(expected[0], torch.stack((down[5, 0], right[5, 0])), rtol=0, atol=0.05)


RECIPE = {"feedback": True, "search": 2, "reach": 1, "sheets": 2, "head": (16, 9), "dilation": 2}
POSITIONS = [  # of a frame: the square's eight symmetries
    lambda x, flips=flips, turned=turned: (x.mT if turned else x).flip(flips)
    for flips, turned in product([(), (-1,), (-2,), (-1, -2)], [False, True])
]


@pytest.mark.parametrize(
    "options",
    [
        {"search": 1},
        {"peephole": False, "head": (8,), "channels": 3},
        {"feedback": True, "reach": 1},
        RECIPE,
        RECIPE | {"channels": 2, "patch": 4},
    ],
    ids=["forecaster", "colour", "reach", "recipe", "recipe_two_channels"],
)
@pytest.mark.parametrize("symmetric", [True, False], ids=["tied", "free"])
def test_tied_kernels_are_equivariant(options, symmetric):
    """Forecasts of a frame in all its positions are one forecast in all positions, also after training."""
    options = {"hidden": (8, 19), "kernel_size": 3, "patch": 2} | options
    model = EncoderForecaster(**options, symmetric=symmetric).double()
    kernels = [p for p in model.parameters() if p.ndim == 4]
    drawn = [p.detach().norm() for p in EncoderForecaster(**options).parameters() if p.ndim == 4]
    for kernel, norm in zip(kernels, drawn, strict=True):
        assert kernel.detach().norm() == pytest.approx(norm.item(), rel=0.3)
        assert len(kernel[0, 0]) == 1 or not torch.equal(kernel, kernel.flip(-1))  # still, each knows directions
    for p in {*model.parameters()} - {*kernels}:
        torch.nn.init.constant_(p, 0.3)  # biases are free to know directions, so let them be the same for all
    past, future = torch.rand(2, 2, 4, model.channels, 16, 24, dtype=torch.float64)

    def deviations():
        with torch.no_grad():
            forecast = model(past, 3, 1)
            return [relative_error(model(image(past), 3, 1), image(forecast)) for image in POSITIONS]

    before = deviations()
    F.mse_loss(model(past, 3, 1)[:, -4:], future).backward()
    assert all(p.grad.norm() > 0 for p in kernels)
    torch.optim.SGD(kernels, 0.1).step()
    after = deviations()
    assert before[0] == after[0] == 0
    assert max(before + after) < 1e-12 if symmetric else min(before[1:] + after[1:]) > 1e-6


def test_directions_change_places_by_hand():
    """Eight: north-north-west and -east; west-north-west and east-north-east; and the same four in the south."""
    left_right, up_down, transposed = (exchanged(flip, [*directions(9), square(2)]).tolist() for flip in FLIPS)
    assert left_right == [1, 0, 3, 2, 5, 4, 7, 6, 8, 10, 9, 12, 11]
    assert up_down == [6, 7, 4, 5, 2, 3, 0, 1, 8, 11, 12, 9, 10]
    assert transposed == [2, 4, 0, 6, 1, 7, 3, 5, 8, 9, 11, 10, 12]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_optimisers_keep_kernels_tied(dtype):
    """Muon's steps are sums in another order for each direction: of the size of rounding, and no more."""
    model = EncoderForecaster(hidden=(16, 16), kernel_size=3, symmetric=True, **RECIPE)
    optimisers = main.make_optimisers(model, 0.03, dtype)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        model(torch.rand(2, 3, 1, 16, 16), 2).square().mean().backward()
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = 0.02 * group.get("part", 1)
            optimiser.step()
        model.zero_grad()
    for old, kernel in zip(before, model.parameters(), strict=True):
        if kernel.ndim == 4:
            (hook,) = kernel._backward_hooks.values()
            kernel = kernel.detach()
            moved = (kernel - old).norm()
            assert moved > 0 and (kernel - hook(kernel)).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * moved


def test_a_reach_without_feedback_or_sheets_is_refused():
    with pytest.raises(ValueError, match=r"reach 4 .* feedback"):
        EncoderForecaster(reach=4)
    with pytest.raises(ValueError, match=r"sheets is 0"):
        EncoderForecaster(feedback=True, reach=4, sheets=0)


def test_every_encoder_layer_matters():
    model, past = small(hidden=(3, 2, 4)), torch.rand(1, 3, 1, 8, 8)
    before = model(past, 2)
    for layer in model.encoder:
        with torch.no_grad():
            layer.cell.bias += 0.1
        assert relative_error(model(past, 2), before) > 1e-4
        with torch.no_grad():
            layer.cell.bias -= 0.1


@pytest.mark.parametrize("feedback", [False, True], ids=["forecaster", "feedback"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_dense_frames_look_at_the_past_only(fast, feedback):
    T, n_future = 4, 2
    model = small(head=(4,), feedback=feedback, fast=fast)
    past = torch.rand(1, T, 1, 8, 8, requires_grad=True)
    for k in range(2 + n_future):  # drawn from frames 0 to 1 + k
        drawn = model(past, n_future, 1)[:, k]
        (gradient,) = torch.autograd.grad(drawn.square().sum(), past)
        seen = gradient.abs().amax((0, 2, 3, 4)) > 0
        assert seen.tolist() == [frame <= 1 + k for frame in range(T)]


@pytest.mark.parametrize("feedback", [False, True], ids=["forecaster", "feedback"])
def test_from_the_first_on_the_input_is_drawn_too(feedback):
    model, past = small(feedback=feedback), torch.rand(2, 5, 1, 8, 8)
    dense = model(past, 3, 2)
    assert dense.shape == (2, 2 + 3, 1, 8, 8)
    torch.testing.assert_close(dense[:, -3:], model(past, 3))
    torch.testing.assert_close(model(past, 3, 0)[:, 2:], dense)
    other = torch.cat((past[:, :4], torch.rand(2, 1, 1, 8, 8)), 1)
    torch.testing.assert_close(dense[:, :2], model(other, 3, 2)[:, :2])  # later frames change nothing
    assert model(past[:, :1], 3, 0).shape == (2, 3, 1, 8, 8)
    assert torch.equal(model.eval()(past, 3), model(past, 3)) and model(past, 3).shape == (2, 3, 1, 8, 8)
    torch.testing.assert_close(model(past, 3), dense[:, -3:])


@pytest.mark.parametrize(
    ("shape", "n_future"),
    [((1, 1, 1, 4, 4), 1), ((3, 2, 1, 8, 20), 7), ((1, 12, 1, 36, 4), 2), ((1, 3, 1, 4, 4), 25)],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"feedback": True}, {"feedback": True, "reach": 1, "sheets": 2}],
    ids=["forecaster", "feedback", "sheets"],
)
@torch.no_grad()
def test_sizes_are_free(shape, n_future, options):
    model, past = small(patch=4, **options), torch.rand(shape)
    parameters = [p.clone() for p in model.parameters()]
    logits = model(past, n_future)
    assert logits.shape == (shape[0], n_future, *shape[2:]) and logits.isfinite().all()
    torch.testing.assert_close(model(past, n_future), logits)
    torch.testing.assert_close(model(past, n_future + 1)[:, :-1], logits)  # whatever the horizon
    assert all(map(torch.equal, model.parameters(), parameters)), "forward changed the parameters"


@torch.no_grad()
def test_sequences_of_a_batch_do_not_touch():
    model, past = small(channels=3), torch.rand(3, 4, 3, 8, 6)
    one_by_one = torch.cat([model(past[k : k + 1], 2) for k in range(3)])
    torch.testing.assert_close(model(past, 2), one_by_one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("first", [None, 1])
def test_one_training_step(options, autocast, first):
    model = EncoderForecaster(**{"hidden": (8, 6), "kernel_size": 3, "patch": 2} | options)
    T, n_future = 4, 3
    sequences = (torch.rand(4, T + n_future, model.channels, 8, 8) > 0.7).float()
    past, truth = sequences[:, :T], sequences[:, T if first is None else first + 1 :]

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(past, n_future, first)
        return F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="sum") / len(truth)

    before = loss()
    before.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    step, expected = 1e-4, sum(p.grad.square().sum() for p in model.parameters())
    if not autocast:  # with small steps, the loss falls by the squared length of its gradient
        torch.optim.SGD(model.parameters(), lr=step).step()
        assert (before - loss()).item() / step == pytest.approx(expected.item(), rel=0.1)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert loss() < 0.99 * before


# Refusals: what was found, and what is wanted instead --------------------------------------------------


@pytest.mark.parametrize(
    ("options", "found"), [({"kernel_size": 4}, 4), ({"kernel_size": 3, "state_kernel_size": 2}, 2)]
)
def test_even_kernels_are_refused(options, found):
    with pytest.raises(ValueError, match=rf"kernel size {found} is even; use an odd one"):
        EncoderForecaster(hidden=(2,), **options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 1, 6, 8), r"frames of 6×8 cannot be cut into patches of 4"),
        ((1, 2, 1, 8, 30), r"frames of 8×30 cannot be cut into patches of 4"),
        ((1, 2, 3, 8, 8), r"shape \(1, 2, 3, 8, 8\); expected \(B, T, 1, H, W\)"),
        ((1, 2, 8, 8), r"shape \(1, 2, 8, 8\); expected \(B, T, 1, H, W\)"),
        ((2, 8, 8, 1, 1, 1), r"shape \(2, 8, 8, 1, 1, 1\); expected \(B, T, 1, H, W\)"),
    ],
)
def test_wrong_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        small(patch=4)(torch.zeros(shape), 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-0.25, r"from -0.25 to 0.5; expected 0 to 1"),
        (1.5, r"from 0.5 to 1.5; expected 0 to 1"),
        (255.0, r"from 0.5 to 255; expected 0 to 1"),
        (math.inf, r"from 0.5 to inf; expected 0 to 1"),
        (math.nan, r"from nan to nan; expected 0 to 1"),
    ],
)
def test_values_outside_0_to_1_are_refused(value, message):
    past = torch.full((2, 3, 1, 8, 8), 0.5)
    past[1, 2, 0, 3, 4] = value
    with pytest.raises(ValueError, match=message):
        small()(past, 2)


def test_a_layer_refuses_other_channels():
    with pytest.raises(ValueError, match="the input has 4 channels; expected 3"):
        ConvLSTM(3, 4, 3, 3)(torch.rand(1, 2, 4, 5, 5), None, 2)


def test_black_and_white_are_not_refused():
    past = torch.zeros(1, 2, 1, 8, 8)
    past[:, 1] = 1
    assert small()(past, 2).isfinite().all()
