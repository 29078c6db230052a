"""The fast kernels of support/fast against plain PyTorch."""

import functools
import math
import subprocess
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, skip_without_compiler
from test_my_model import DEVICE, MOTION, randomized, relative_error, seeded, small  # noqa: F401

import equivariant
import motion
from my_model import ConvLSTM, ConvLSTMCell, new_kernel
from support import sources

fast = pytest.importorskip("support.fast")
symmetric = fast.symmetric

CPU = torch.device("cpu")
SYMMETRIC = MOTION | {"equivariant": True, "hidden_channels": (32, 32), "head_channels": (32,), "dilation": 2}
DTYPES = [torch.float32, torch.bfloat16]  # those that have compiled gates
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def assert_close(found, expected, limit):
    """Tensors by name, up to so much of the largest value."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        assert relative_error(found[name], expected[name]) < limit, name


LAYERS = {  # in_channels, hidden, two kernel sizes, (B, T, H, W); dilation, scale of the first h
    "3x3": (3, 4, 3, 3, (2, 4, 5, 7)),
    "5x5_3x3_batch_of_1": (2, 5, 5, 3, (1, 4, 4, 9)),
    "1x1_5x5": (3, 20, 1, 5, (3, 2, 5, 3)),
    "no_input": (0, 4, 3, 5, (2, 4, 3, 6)),
    "one_pixel": (2, 3, 3, 3, (2, 3, 1, 1)),
    "enough_for_winograd": (32, 32, 3, 5, (2, 9, 15, 16)),
    "dilation": (4, 8, 5, 3, (2, 3, 6, 5), 3),
    "dilation_of_many_pixels": (32, 32, 3, 3, (2, 9, 15, 16), 2),
    "hidden_state_of_zeros": (4, 8, 3, 3, (2, 3, 6, 5), 1, 0),
    "hidden_state_of_zeros_no_input": (0, 8, 3, 3, (2, 3, 6, 5), 1, 0),
}


def run_layer(layer, x, state, n_frames, dtype):
    """Outputs and all gradients by name. bfloat16 means autocast."""
    leaves = {"x": x, "h0": state[0], "c0": state[1], **dict(layer.cell.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden_states, (h, c) = layer(x, state, n_frames)
        outputs = {"hidden states": hidden_states, "h": h, "c": c}
        found = gradients(outputs.values(), list(leaves.values()))
    for name, leaf in leaves.items():
        assert torch.equal(leaf, before[name]), f"{name} was overwritten"
    return outputs | dict(zip(leaves, found, strict=True))


def assert_layer_is_plain(dtype, peephole, n_in, hidden, k, state_k, shape, dilation=1, h=1):
    B, T, H, W = shape
    layer = randomized(ConvLSTM(n_in, hidden, k, state_k, peephole, dilation)).to(DEVICE)
    x = torch.rand(T, B, n_in, H, W).to(DEVICE)
    x = x.transpose(0, 1)  # time before batch in memory, as the layer below leaves it
    x = x.requires_grad_() if n_in else None
    state = [(scale * torch.randn(B, hidden, H, W).to(DEVICE)).requires_grad_() for scale in (h, 1)]
    plain = run_layer(layer, x, state, T, dtype)
    layer.fast = fast.layer.fast_layer
    found = run_layer(layer, x, state, T, dtype)
    assert_close(found, plain, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)  # float64: test_fast_network_is_plain
@pytest.mark.parametrize("name", LAYERS)
def test_fast_layer_is_plain(name, dtype):
    peephole = (list(LAYERS).index(name) + DTYPES.index(dtype)) % 2 == 0
    assert_layer_is_plain(dtype, peephole, *LAYERS[name])


@pytest.mark.parametrize("compiler", ["no_such_compiler", "false"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fast_layer_without_compiled_gates(monkeypatch, compiler, dtype):
    layer, run = fast.layer, subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda words, **options: run([compiler, *words[1:]], **options))
    monkeypatch.setattr(layer, "gate_functions", functools.cache(layer.gate_functions.__wrapped__))
    assert layer.gate_functions("cpu", dtype) == (layer.gates_forward, layer.gates_backward)
    for n_in in (3, 0):
        assert_layer_is_plain(dtype, True, n_in, 4, 5, 3, (2, 3, 5, 7))


def gate_arguments(dtype, N, C, scale=1.0):
    """Random z, peephole, c of gates_forward, and dh, dh_next, dc of gates_backward."""
    z, (dh, dh_next) = scale * torch.randn(N, 4 * C), torch.randn(2, N, C).to(dtype)
    given = z.to(dtype), torch.randn(3, C), torch.randn(N, C), dh, dh_next, torch.randn(N, C)
    return [t.to(DEVICE) for t in given]


def by_both(gates, z, peephole, c, dh, dh_next, dc):
    """All results of the compiled gates, and of the plain ones, by name."""
    results = []
    for forward, backward in (gates, (fast.layer.gates_forward, fast.layer.gates_backward)):
        c_before, h = torch.empty(2, *c.shape, dtype=z.dtype, device=DEVICE)
        sums = c.new_zeros(torch.get_num_threads(), 7, c.shape[1])
        new_z, new_c, new_dc = z.clone(), c.clone(), dc.clone()
        forward(new_z, peephole, new_c, c_before, h)
        assert torch.equal(new_z.nan_to_num(), z.nan_to_num())  # is left for backward
        backward(new_z, peephole, c_before, dh, dh_next, new_dc, sums)
        names = ("c", "c_before", "h", "dz", "dc", "sums")
        results.append(dict(zip(names, (new_c, c_before, h, new_z, new_dc, sums.sum(0)), strict=True)))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_gates_are_the_python_ones(dtype, threads):
    skip_without_compiler()
    gates = fast.layer.gate_functions(DEVICE, dtype)
    assert gates[0] is not fast.layer.gates_forward, "there is a compiler, but the gates were not built"
    for N, C, scale in ((1, 1, 1), (2, 5, 1), (35, 16, 1), (50, 37, 1), (9000, 3, 9)):
        arguments = gate_arguments(dtype, N, C, scale)
        if scale > 1:  # saturated gates, and all that lies between
            arguments[0][0], arguments[0][1] = math.inf, -math.inf
        found, expected = by_both(gates, *arguments)
        assert torch.equal(found["c_before"], expected["c_before"])  # rounded to nearest even
        rounded = 2**-7 if dtype == torch.bfloat16 else 2e-6
        limits = {"c": 1e-6, "h": rounded, "dz": max(rounded, 2e-5), "dc": 2e-5, "sums": 2e-5}
        for name, limit in limits.items():
            assert relative_error(found[name], expected[name]) < limit, (N, C, name)
    for bits, place in product((0x7FC00000, -1), range(6)):  # the usual NaN, and all ones
        arguments = gate_arguments(dtype, 6, 20)
        nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        arguments[place][0, 1] = arguments[place][1, 17] = nan
        found, expected = by_both(gates, *arguments)
        assert any(y.isnan().any() for y in expected.values())
        for name in expected:
            assert torch.equal(found[name].isnan(), expected[name].isnan()), (bits, place, name)


SHAPES = [((3, 1, 64, 64), 4, 4), ((5, 3, 16, 24), 4, 2), ((2, 2, 12, 18), 6, 1), ((1, 1, 5, 7), 1, 3)]


@pytest.mark.parametrize(("shape", "patch_size", "max_motion"), SHAPES)
def test_compiled_motion_is_plain(shape, patch_size, max_motion, threads):
    skip_without_compiler()
    assert fast.motion.compiled(patch_size, 2 * max_motion + 1) is not None
    (frames, d_moved), (N, _, H, W) = torch.rand(2, *shape).to(DEVICE), shape
    moves = torch.randn(N, H // patch_size, W // patch_size, (2 * max_motion + 1) ** 2)
    weights = moves.to(DEVICE).softmax(-1)
    for leaves in ((weights.requires_grad_(),), (weights, frames.requires_grad_())):  # frames: data, drawn
        results = []
        for module in (motion, fast.motion):
            moved = module.advect(frames, weights, patch_size)
            costs = module.matching_costs(frames.detach(), d_moved, patch_size, max_motion)
            results.append((moved, costs, *torch.autograd.grad(moved, leaves, d_moved)))
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.fixture
def winograd(monkeypatch):
    skip_without_compiler()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(fast.winograd, "PAYS_FROM", dict.fromkeys(fast.winograd.PAYS_FROM, 1))
    return fast.winograd


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize(("k", "dtype"), [(3, torch.float32), (5, torch.float32), (5, torch.bfloat16)])
@pytest.mark.parametrize(
    ("N", "H", "W", "n_in", "n_out", "threads"),
    [
        pytest.param(2, 16, 16, 64, 256, 3, id="a_layer"),
        pytest.param(3, 5, 7, 16, 96, 1, id="no_whole_tiles_few_channels"),
        pytest.param(2, 1, 2, 96, 32, 3, id="smaller_than_a_kernel"),
        pytest.param(45, 6, 9, 32, 64, 3, id="many_blocks"),  # 270 tiles: 4 blocks of 64, and some
    ],
    indirect=["threads"],
)
def test_it_is_the_convolution_and_its_gradients(winograd, threads, N, H, W, n_in, n_out, k, dtype, dilation):
    x, dy = torch.randn(N, H, W, n_in).to(dtype), torch.randn(N, H, W, n_out).to(dtype)
    weight = (torch.randn(n_out, n_in, k, k) / k / n_in**0.5).to(dtype)
    bias, (convolution, flipped) = torch.randn(n_out).to(dtype), (fast.layer.convolution, fast.layer.flipped)
    assert winograd.is_supported(weight, 1)
    assert not winograd.is_supported(weight[1:], 1) and not winograd.is_supported(weight[:, 1:], 1)
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    options = {"padding": k // 2 * dilation, "dilation": dilation}
    exact = F.conv2d(exact_x.permute(0, 3, 1, 2), exact_weight, bias.double(), **options)
    exact = exact.permute(0, 2, 3, 1)
    exact.backward(dy.double())
    found = {
        "y": convolution(weight, 1, bias, dilation)(x),
        "added": convolution(weight, 1, None, dilation)(x, dy.clone()),
        "dx": convolution(flipped(weight), 1, None, dilation)(dy),
        "d_weight": fast.layer.weight_gradient(dy, x, weight, dilation),
    }
    expected = exact, exact - bias.double() + dy.double(), exact_x.grad, exact_weight.grad
    assert {y.dtype for y in found.values()} == {dtype}
    assert_close(found, dict(zip(found, expected, strict=True)), 8e-3 if dtype == torch.bfloat16 else 2e-5)
    for bad in (torch.nan, torch.inf):  # reaches its neighbors
        x[-1, H // 2, W // 2, 7] = bad
        rows, columns = (slice(size // 2 % dilation, size // 2 + dilation + 1, dilation) for size in (H, W))
        assert not convolution(weight, 1, None, dilation)(x)[-1, rows, columns][-3:, -3:].isfinite().any()


def random_kernel(n_in, n_out, groups=1):
    """A random equivariant kernel, and its gradients, as the network would have them."""
    skip_without_compiler()  # then no kernel is symmetric
    kernel = new_kernel(n_in, groups * n_out, 3)
    grids = groups * equivariant.hidden_grids(n_out), equivariant.hidden_grids(n_in)
    equivariant.make_equivariant(kernel, *grids)
    return kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "H", "W", "n_in", "n_out", "groups", "dilation", "threads"),
    [
        pytest.param(2, 16, 16, 96, 96, 4, 2, 3, id="a_layer"),
        pytest.param(1, 5, 7, 32, 64, 1, 1, 1, id="odd_sizes"),
        pytest.param(11, 3, 2, 64, 32, 4, 2, 3, id="smaller_than_a_kernel"),
        pytest.param(9, 1, 1, 128, 128, 1, 1, 1, id="one_pixel"),
    ],
    indirect=["threads"],
)
def test_symmetric_convolution_and_its_gradients(threads, N, H, W, n_in, n_out, groups, dilation, dtype):
    weight = random_kernel(n_in, n_out, groups)
    x, dy = torch.randn(N, H, W, n_in).to(dtype), torch.randn(N, H, W, groups * n_out).to(dtype)
    bias = torch.randn(groups * n_out)
    exact_x, exact_weight = x.double().requires_grad_(), weight.detach().double().requires_grad_()
    options = {"padding": dilation, "dilation": dilation}
    exact = F.conv2d(exact_x.permute(0, 3, 1, 2), exact_weight, bias.double(), **options)
    exact.permute(0, 2, 3, 1).backward(dy.double())
    kernel = symmetric.find(weight, dtype, groups)
    parities = kernel.multiply(x, dilation)
    both = kernel.multiply(x, dilation, parities.clone())
    y, twice, dx = torch.empty_like(dy), torch.empty_like(dy), torch.empty_like(x)
    symmetric.to_members(parities, groups, bias, y)
    symmetric.to_members(both, groups, 0 * bias, twice)
    dz = symmetric.to_parities(dy, groups)
    kernel.input_gradient(dz, dilation, dx)
    kernel.add_block_gradient(d_blocks := torch.zeros_like(kernel.blocks), dz, x, dilation)
    (d_weight,) = torch.autograd.grad(kernel.blocks, weight, d_blocks)
    found = {"y": y, "twice": twice, "dx": dx, "d_weight": d_weight}
    # the part of the gradient that keeps the kernel equivariant
    grids = groups * equivariant.hidden_grids(n_out), equivariant.hidden_grids(n_in)
    pairs = [[equivariant.permutation(flip, grid) for grid in grids] for flip in equivariant.SYMMETRIES]
    y = exact.permute(0, 2, 3, 1)
    expected = y, 2 * (y - bias.double()), exact_x.grad, equivariant.symmetric_mean(exact_weight.grad, pairs)
    assert_close(found, dict(zip(found, expected, strict=True)), 1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_what_is_not_symmetric_is_convolved_as_it_is():
    """A kernel; a head of another form."""
    weight = random_kernel(32, 32, 4)
    assert symmetric.find(weight, torch.float32, 4)
    with torch.no_grad():
        weight[0, 0, 0, 0] += weight.norm() / 50  # one number
    assert symmetric.find(weight, torch.float32, 4) is None
    too_few, no_grids = (random_kernel(8, 32), random_kernel(32, 24)), torch.randn(32, 32, 3, 3)
    for other in *too_few, no_grids:
        assert symmetric.find(other, torch.float32, 1) is None
    assert symmetric.find(random_kernel(32, 32), torch.float64, 1) is None
    for change in {}, {"stride": 2}, {"padding_mode": "circular"}, {"bias": False}, {"groups": 2}:
        module = torch.nn.Conv2d(32, 32, **{"kernel_size": 3, "padding": 1} | change)
        assert symmetric.is_supported(module, torch.float32) == (not change)


def test_what_inference_caches_serves_training():
    skip_without_compiler()
    weight = random_kernel(32, 32)
    symmetric.block_map.cache_clear()
    with torch.inference_mode():
        assert symmetric.find(weight, torch.float32, 1)
    symmetric.find(weight.requires_grad_(), torch.float32, 1).blocks.sum().backward()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("options", [{}, MOTION | {"max_motion": 4}, SYMMETRIC])
def test_fast_network_is_plain(dtype, options):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = {"hidden_channels": (16, 8), "head_channels": (8,), "patch_size": 4}
    model = small(**sizes | options).to(exact)
    if options is SYMMETRIC:
        equivariant.make_kernels_equivariant(model)  # small() has drawn other weights
        kernels = [p for p in model.parameters() if p.shape[-1] == 3]
        found = [fast.symmetric.find(p, dtype, 4 if len(p) == 128 else 1) for p in kernels]
        assert all(found) == (dtype != torch.float64)
    past = torch.rand(symmetric.IMAGES + 1, 5, 1, 32, 24, dtype=exact)  # a part of one image, too
    device = torch.device(DEVICE)

    def results(device):
        with torch.autocast(str(device), torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model.to(device)(past.to(device), 4, 2)
            gradients = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
        return dict(zip(("logits", *dict(model.named_parameters())), (logits, *gradients), strict=True))

    plain = results("cpu")
    before = torch.get_rng_state()
    used = fast.attach(model, device, dtype)
    assert torch.equal(torch.get_rng_state(), before)
    assert "fast layer" in used
    assert ("compiled motion" in used) == (model.advect is not motion.advect)
    found = results(device)
    assert_close(found, plain, TOLERANCE[dtype])


EDITS = {  # old text → new text in my_model.py; whether the layer is still the one that the kernels stand for
    "a docstring": ("One time step; * convolves", "One step; * convolves", True),
    "another class": ("class EncoderForecaster(nn.Module):\n", "class Mine(nn.Module):\n", True),
    "a factor": ("* torch.tanh(g)", "* 1.01 * torch.tanh(g)", False),
    "dropout": ("return hidden_states, state\n", "return F.dropout(hidden_states), state\n", False),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_layer_is_what_runs(name, monkeypatch):
    """Whatever the edit does, and when: the text decides."""
    old, new, is_original = EDITS[name]
    text = sources.read("my_model.py")
    assert old in text
    monkeypatch.setattr(sources, "read", lambda _: text.replace(old, new, 1))
    model = small(hidden_channels=(8, 8), dilation=2)
    with torch.inference_mode():  # wherever it is called
        used = fast.attach(model, CPU, torch.float32)
    assert ("the edited ConvLSTM layer as it stands" in used) == (not is_original)
    assert all((layer.fast is not None) == is_original for layer in (*model.encoder, *model.forecaster))


CHANGES = {
    "a hook": lambda layer: layer.cell.register_forward_hook(lambda *_: None),
    "a forward": lambda layer: setattr(layer.cell, "forward", lambda x, state: state),
    "a class": lambda layer: setattr(layer.cell, "__class__", type("Mine", (ConvLSTMCell,), {})),
    "a hook of the layer": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_layer_is_what_runs(name):
    model = small(hidden_channels=(8, 8), dilation=2)
    CHANGES[name](model.encoder[1])
    assert "the edited ConvLSTM layer as it stands" in fast.attach(model, CPU, torch.float32)
    assert {layer.fast for layer in (*model.encoder, *model.forecaster)} == {None}


def test_what_the_fast_layer_refuses():
    """Other channels: winograd.c would read beyond the input. A second backward pass: z is overwritten."""
    layer = randomized(ConvLSTM(3, 4, 3, 3))
    layer.fast = fast.layer.fast_layer
    with pytest.raises(ValueError, match="do not fit"):
        layer(torch.rand(1, 2, 4, 5, 5), None, 2)
    loss = layer(torch.rand(1, 2, 3, 5, 5), None, 2)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated only once; for a second .* --no_fast"):
        loss.backward()


def test_edited_gates_are_noticed(monkeypatch):
    """By gates.c, in fp32 and in bf16. An edit doubles one of the results."""
    skip_without_compiler()
    layer = fast.layer
    monkeypatch.setattr(layer.build, "build", functools.cache(layer.build.build))
    monkeypatch.setattr(layer, "gate_functions", functools.cache(layer.gate_functions.__wrapped__))

    def agreeing():
        layer.gate_functions.cache_clear()
        return [layer.gate_functions("cpu", dtype)[0] is not layer.gates_forward for dtype in DTYPES]

    assert agreeing() == [True] * 2
    double, clamp = lambda t: t.mul_(2), lambda t: t.clamp_(-9, 9)  # beyond what c soon reaches
    edits = [("gates_forward", place, double) for place in (0, 2, 3, 4)]  # z, c, c_before, h
    edits += [("gates_backward", place, double) for place in (0, 5, 6)]  # z, dc, sums
    for name, place, change in [*edits, ("gates_forward", 2, clamp)]:
        right = getattr(layer, name)
        edited = lambda *tensors, right=right, at=place, change=change: (right(*tensors), change(tensors[at]))
        monkeypatch.setattr(layer, name, edited)
        assert agreeing() == [False] * 2, (name, place)
        monkeypatch.setattr(layer, name, right)


def test_edited_motion_is_what_runs(monkeypatch):
    skip_without_compiler()
    assert "compiled motion" in fast.attach(small(**MOTION), CPU, torch.float32)
    text = sources.read("motion.py")
    assert "square_()" in text
    monkeypatch.setattr(sources, "read", lambda _: text.replace("square_()", "abs_()"))
    assert "compiled motion" not in fast.attach(model := small(**MOTION), CPU, torch.float32)
    assert model.advect is motion.advect and model.matching_costs is motion.matching_costs
