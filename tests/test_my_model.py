"""The network as it stands in my_model.py: the paper's counts, and its equations by hand."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import main
from convlstm import ConvLSTMForecaster
from motion import advect, block_match
from my_model import ConvLSTMCell, EncoderForecaster

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py hides GPUs without --gpu


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomized(module):
    """With all parameters random: peepholes and biases start constant, which would hide mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5 if p.ndim < 3 else (p.numel() / p.shape[0]) ** -0.5)
    return module


def small(**options):
    options = {"hidden_channels": (3, 2), "kernel_size": 3, "patch_size": 2} | options
    return randomized(EncoderForecaster(**options))


def relative_error(found, expected):
    """The largest difference, in units of the largest value."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("options", "count"),  # of Table 1
    [
        ({"hidden_channels": (256,)}, 13_524_496),
        ({"hidden_channels": (128, 128)}, 10_042_896),
        ({}, 7_585_296),
        ({"hidden_channels": (128, 128), "kernel_size": 9, "state_kernel_size": 1}, 11_550_224),
        ({"kernel_size": 9, "state_kernel_size": 1}, 8_830_480),
    ],
)
def test_parameter_counts_of_the_paper(options, count):
    assert sum(p.numel() for p in EncoderForecaster(**options).parameters()) == count


def gates_by_hand(i, f, o, g, wi, wf, wo, c):
    """One pixel of one channel: sums before the gates, peepholes and cell state → the next (h, c)."""
    sigmoid = lambda z: 1 / (1 + math.exp(-z))
    c_next = sigmoid(f + wf * c) * c + sigmoid(i + wi * c) * math.tanh(g)
    return sigmoid(o + wo * c_next) * math.tanh(c_next), c_next


def convolve_by_hand(x, weight, dilation=1):
    """A same-size convolution as a product of matrices, with zeros beyond the edge."""
    size = weight.shape[2:]
    columns = F.unfold(x, size, dilation, [dilation * (k // 2) for k in size])
    return (weight.flatten(1) @ columns).unflatten(2, x.shape[2:])


@torch.no_grad()
@pytest.mark.parametrize(("n_in", "peephole"), list(product([2, 0], [True, False])))
@pytest.mark.parametrize(("sizes", "dilation"), [((3, 1), 1), ((1, 3), 2)])
def test_cell_is_the_equations(sizes, dilation, n_in, peephole):
    cell = randomized(ConvLSTMCell(n_in, 3, *sizes, peephole, dilation)).double()
    x, h, c = (torch.randn(1, n, 4, 5, dtype=torch.float64) for n in (2, 3, 3))
    z = convolve_by_hand(h, cell.state_to_state, dilation)
    z = z + convolve_by_hand(x, cell.input_to_state) if n_in else z
    found = torch.stack(cell(x if n_in else None, (h, c)))[:, 0]
    for k, row, column in product(range(3), range(4), range(5)):  # channel and pixel
        gates = z[0, k::3, row, column] + cell.bias[k::3]  # four gates of three channels
        # one number a channel, wherever the pixel is
        peepholes = cell.peephole[:, k].tolist() if peephole else [0.0] * 3
        expected = gates_by_hand(*gates.tolist(), *peepholes, c[0, k, row, column].item())
        assert found[:, k, row, column].tolist() == pytest.approx(expected, abs=1e-13)


def shifted(frames, down, right):
    """At each pixel the one that lies so far away; black beyond the border."""
    (H, W), M = frames.shape[-2:], max(abs(down), abs(right))
    return F.pad(frames, [M] * 4)[..., M + down : M + down + H, M + right : M + right + W]


def moves(M):
    return list(product(range(-M, M + 1), repeat=2))


def advect_by_hand(drawn, shown, P, M):
    """drawn: the head's (B, 2·C·P² + K², H/P, W/P), shown: the last frame's patches → patches of logits."""
    n, frame = shown.shape[1], F.pixel_shuffle(shown, P)
    weights = drawn[:, 2 * n :].softmax(1).repeat_interleave(P, 2).repeat_interleave(P, 3)  # of each pixel
    moved = sum(weights[:, [k]] * shifted(frame, *move) for k, move in enumerate(moves(M)))
    moved = F.pixel_unshuffle(moved, P).clamp(0.002, 0.998)
    return drawn[:, :n] + drawn[:, n : 2 * n] * torch.log(moved / (1 - moved))


def match_by_hand(frames, before, P, M):
    """(B, C, H, W) and the frame before → how likely each move is, (B, K², H/P, W/P)."""
    costs = torch.stack([(frames - shifted(before, *move)).square().sum(1) for move in moves(M)], 1)
    costs = sum(costs[..., y::P, x::P] for y, x in product(range(P), repeat=2))
    costs = sum(shifted(costs, *move) for move in moves(1)) / 9
    return (-16 * costs / (costs.mean(1, keepdim=True) + 1e-6)).softmax(1)


def forecast_by_hand(model, past, n_future, predict_from):
    """Patches, one cell call a layer and frame, the head frame by frame, and patches joined again."""
    P, M, T = model.patch_size, model.max_motion, past.shape[1]
    x = F.pixel_unshuffle(past, P)
    zeros = lambda layer: x.new_zeros(len(x), layer.cell.hidden_channels, *x.shape[-2:])
    states, drawn = [(zeros(layer), zeros(layer)) for layer in model.encoder], []

    def step(stack, below, before):
        shown = below
        if M:
            likely = match_by_hand(F.pixel_shuffle(below, P), F.pixel_shuffle(before, P), P, M)
            motion = torch.einsum("mk,bkyx->bmyx", model.motion.weight[:, :, 0, 0], likely)
            below = torch.cat((below, motion + model.motion.bias[:, None, None]), 1)
        for k, layer in enumerate(stack):
            states[k] = layer.cell(below, states[k])
            below = states[k][0]
        patches = model.head(torch.cat([h for h, _ in states], 1))
        return advect_by_hand(patches, shown, P, M) if M else patches

    last = torch.zeros_like(x[:, 0])
    for t in range(T):
        patches, last = step(model.encoder, x[:, t], last), x[:, t]
        if predict_from is not None and predict_from <= t < T - 1:
            drawn.append(patches)
    for t in range(n_future):
        if model.forecaster is not None:
            patches = step(model.forecaster, None, None)
        elif t > 0:  # the last input frame has drawn the first
            shown = torch.sigmoid(drawn[-1])
            patches, last = step(model.encoder, shown, last), shown
        drawn.append(patches)
    return F.pixel_shuffle(torch.stack(drawn, 1), P)


def test_motion_is_never_in_bf16():
    frames, before = torch.rand(2, 1, 1, 32, 32).bfloat16()
    weights = torch.rand(1, 8, 8, 9)
    with torch.autocast("cpu", torch.bfloat16):
        likely = block_match(frames, before.float(), 4, 2)
        moved = advect(before.float(), weights, 4)
    assert likely.dtype == moved.dtype == torch.float32 and not likely.requires_grad
    assert torch.equal(likely, block_match(frames.float(), before.float(), 4, 2))
    assert torch.equal(moved, advect(before.float(), weights, 4))


MOTION = {"feedback": True, "max_motion": 1}
OPTIONS = [
    pytest.param({}, id="plain_head"),
    pytest.param({"peephole": False, "hidden_channels": (4,)}, id="one_layer_no_peephole"),
    pytest.param({"head_channels": (5,), "state_kernel_size": 1}, id="deep_head_1x1_state"),
    pytest.param({"hidden_channels": (2, 4, 3), "kernel_size": 5}, id="three_layers"),
    pytest.param({"channels": 3, "head_channels": (4, 6), "patch_size": 4}, id="color_deep_head"),
    pytest.param({"feedback": True, "dilation": 2, "hidden_channels": (3, 4, 2)}, id="feedback_dilation"),
    pytest.param(MOTION | {"max_motion": 2, "channels": 2}, id="two_pixels_two_channels"),
    # one training step shows that an equivariant kernel's gradient is projected, not only changed
    pytest.param(MOTION | {"head_channels": (9,), "equivariant": True}, id="equivariant"),
]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_forecast_by_hand(options):
    model = small(**options).double()
    for B, T, H, W, n_future in ((2, 4, 8, 12, 3), (1, 1, 4, 4, 1), (3, 3, 12, 8, 7)):
        past = torch.rand(B, T, model.channels, H, W, dtype=torch.float64)
        past[..., :3], past[..., -3:] = 0, 1  # so that what moves is clamped
        for predict_from in {None, 0, (T - 1) // 2, T - 1}:
            expected = forecast_by_hand(model, past, n_future, predict_from)
            found = model(past, n_future, predict_from)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_one_training_step(options):
    T, n_future = 4, 3
    for predict_from, autocast in ((None, False), (1, False), (1, True)):
        model = EncoderForecaster(**{"hidden_channels": (8, 6), "kernel_size": 3, "patch_size": 2} | options)
        sequences = (torch.rand(4, T + n_future, model.channels, 8, 8) > 0.7).float()
        past, truth = sequences[:, :T], sequences[:, T if predict_from is None else predict_from + 1 :]

        def loss(model=model, past=past, truth=truth, predict_from=predict_from, autocast=autocast):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(past, n_future, predict_from)
            return F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="sum") / len(truth)

        before = loss()
        before.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
        step, expected = 1e-4, sum(p.grad.square().sum() for p in model.parameters())
        if not autocast:  # with small steps, the loss falls by the squared length of its gradient
            torch.optim.SGD(model.parameters(), lr=step).step()
            assert (before - loss()).item() / step == pytest.approx(expected.item(), rel=0.1)
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
        assert loss() < before


RECIPE = MOTION | {"max_motion": 2, "head_channels": (16, 9), "dilation": 2}
POSITIONS = [  # of a frame: the square's eight symmetries
    lambda x, flips=flips, transposed=transposed: (x.mT if transposed else x).flip(flips)
    for flips, transposed in product([(), (-1,), (-2,), (-1, -2)], [False, True])
]


@pytest.mark.parametrize(
    ("options", "equivariant"),
    [
        pytest.param({"peephole": False, "head_channels": (8,), "channels": 3}, True, id="forecaster"),
        pytest.param(RECIPE | {"channels": 2, "patch_size": 4}, True, id="two_channels"),
        pytest.param(RECIPE, False, id="free"),
    ],
)
def test_equivariant_kernels_make_forecasts_equivariant(options, equivariant):
    """Forecasts of a frame in all its positions are one forecast in all positions, also after training."""
    options = {"hidden_channels": (8, 19), "kernel_size": 3, "patch_size": 2} | options
    model = EncoderForecaster(**options, equivariant=equivariant).double()
    kernels = [p for p in model.parameters() if p.ndim == 4]
    norms = [p.detach().norm() for p in EncoderForecaster(**options).parameters() if p.ndim == 4]
    for kernel, norm in zip(kernels, norms, strict=True):
        assert kernel.detach().norm() == pytest.approx(norm.item(), rel=0.3)
        assert len(kernel[0, 0]) == 1 or not torch.equal(kernel, kernel.flip(-1))  # each knows directions
    for p in {*model.parameters()} - {*kernels}:
        torch.nn.init.constant_(p, 0.3)  # biases may know directions, so let all be the same
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
    assert max(before + after) < 1e-12 if equivariant else min(before[1:] + after[1:]) > 1e-6


@torch.no_grad()
@pytest.mark.parametrize(("hidden_channels", "place", "n"), [((8, 19), 2, 16), ((8,), 0, 8)])
def test_an_edited_head_is_equivariant_too(hidden_channels, place, n):
    """With a depthwise convolution, whose kernels have one input channel."""
    model = small(hidden_channels=hidden_channels, **RECIPE)
    model.head.insert(place, torch.nn.Conv2d(n, n, 3, padding=1, groups=n))
    model.double().make_kernels_equivariant()
    for p in (p for p in model.parameters() if p.ndim < 4):
        torch.nn.init.constant_(p, 0.3)
    past = torch.rand(2, 4, 1, 16, 24, dtype=torch.float64)
    forecast = model(past, 3)
    assert max(relative_error(model(image(past), 3), image(forecast)) for image in POSITIONS) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_optimizers_keep_kernels_equivariant(dtype):
    """Also after .to(device). Up to rounding: Muon sums in another order for each direction."""
    model = EncoderForecaster(hidden_channels=(16, 16), kernel_size=3, equivariant=True, **RECIPE)
    model.double().to(DEVICE, torch.float32)  # so that each weight is a new tensor even on the CPU
    optimizers = main.make_optimizers(model, main.Knobs(), dtype)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        model(torch.rand(2, 3, 1, 16, 16, device=DEVICE), 2).square().mean().backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02
            optimizer.step()
        model.zero_grad()
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for old, kernel in zip(before, model.parameters(), strict=True):
        if kernel.ndim == 4:
            (hook,) = kernel._backward_hooks.values()
            kernel = kernel.detach()
            moved = (kernel - old).norm()
            assert moved > 0 and (kernel - hook(kernel)).norm() < limit * moved


@pytest.mark.parametrize("build", [EncoderForecaster, ConvLSTMForecaster])
def test_odd_sizes_are_padded_and_cropped(build):
    """The last rows and columns are repeated until whole patches of 4 cover the frame."""
    model, frames = build(1, (8, 6), 3), torch.rand(2, 3, 1, 9, 14)
    whole = torch.cat([frames, *[frames[..., -1:]] * 2], -1)
    whole = torch.cat([whole, *[whole[..., -1:, :]] * 3], -2)
    with torch.no_grad():
        assert torch.equal(model(frames, 2), model(whole, 2)[..., :9, :14])


GRAY = (1, 2, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "shape", "value", "message"),
    [
        ({"kernel_size": 3, "state_kernel_size": 2}, GRAY, 0, "kernel size 2 is even; use an odd one"),
        ({}, (1, 2, 3, 8, 8), 0, r"shape \(1, 2, 3, 8, 8\); expected \(B, T, 1, H, W\)"),
        ({}, GRAY, 255, "values from 0.5 to 255; expected 0 to 1"),
        ({}, GRAY, math.nan, "values from nan to nan; expected 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(options, shape, value, message):
    past = torch.full(shape, 0.5)
    past.view(-1)[-5] = value
    with pytest.raises(ValueError, match=message):
        EncoderForecaster(hidden_channels=(2,), **options)(past, 2)
