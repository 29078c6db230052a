import pytest
import torch
import torch.nn.functional as F

import my_model
from convlstm import ConvLSTM, ConvLSTMCell, ConvLSTMForecaster, EncoderDecoderConvLSTM


@pytest.fixture(autouse=True)
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sigmoid_by_hand(z):
    return 1 / (1 + torch.exp(-z))


def conv_by_hand(x, weight, bias):
    """A same-size convolution as a product of matrices."""
    kh, kw = weight.shape[2:]
    columns = F.unfold(x, (kh, kw), padding=(kh // 2, kw // 2))
    return (weight.flatten(1) @ columns + bias[:, None]).unflatten(2, x.shape[2:])


def step_by_hand(x, h, c, weight, bias):
    n = h.shape[1]
    z = conv_by_hand(torch.cat((x, h), 1), weight, bias)
    i, f, o = (sigmoid_by_hand(z[:, k * n : (k + 1) * n]) for k in range(3))
    c = f * c + i * torch.tanh(z[:, 3 * n :])
    return o * torch.tanh(c), c


def gradients(outputs, inputs):
    """Of a random weighted sum of the outputs, the same weights at every call."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator)).sum() for y in outputs)
    return torch.autograd.grad(loss, inputs)


def copy_cell(source: my_model.ConvLSTMCell, target: ConvLSTMCell):
    """Into the state part of the weight, and into the input part where the source has an input."""
    n = source.hidden
    with torch.no_grad():
        target.conv.weight[:, -n:] = source.state_to_state
        if source.input_to_state is not None:
            target.conv.weight[:, :-n] = source.input_to_state
        target.conv.bias.copy_(source.bias)


@pytest.mark.parametrize("kernel_size", [3, 1, (3, 5)])
def test_cell_is_the_step_by_hand(kernel_size):
    cell = ConvLSTMCell(2, 3, kernel_size)
    x, h, c = torch.randn(2, 2, 4, 6), torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(cell(x, (h, c)), step_by_hand(x, h, c, cell.conv.weight, cell.conv.bias))
    zeros = torch.zeros_like(h)
    torch.testing.assert_close(cell(x), step_by_hand(x, zeros, zeros, cell.conv.weight, cell.conv.bias))


def test_cell_is_my_models_without_peepholes():
    mine = my_model.ConvLSTMCell(2, 3, 5, 5, peephole=False)
    reference = ConvLSTMCell(2, 3, 5)
    copy_cell(mine, reference)
    inputs = [torch.randn(2, n, 6, 7, requires_grad=True) for n in (2, 3, 3)]
    y_mine, y = (cell(inputs[0], (inputs[1], inputs[2])) for cell in (mine, reference))
    torch.testing.assert_close(y, y_mine)
    *d_mine, d_input, d_state, d_bias = gradients(
        y_mine, [*inputs, mine.input_to_state, mine.state_to_state, mine.bias]
    )
    *d, d_weight, d_bias_reference = gradients(y, [*inputs, reference.conv.weight, reference.conv.bias])
    torch.testing.assert_close(d, d_mine)
    torch.testing.assert_close(d_weight, torch.cat((d_input, d_state), 1))
    torch.testing.assert_close(d_bias_reference, d_bias)


@pytest.mark.parametrize("all_layers", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_third_party_package(bias, all_layers):
    third_party = pytest.importorskip("conv_lstm")
    arguments = (2, [4, 3], [3, 5], 2, True, bias, all_layers)
    theirs, ours = third_party.ConvLSTM(*arguments), ConvLSTM(*arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 4, 2, 6, 5, requires_grad=True)
    results = []
    for model in (theirs, ours):
        layers, states = model(x)
        assert len(layers) == len(states) == (2 if all_layers else 1)
        outputs = [*layers, *(s for state in states for s in state)]
        results.append((outputs, gradients(outputs, [x, *model.parameters()])))
    (y_theirs, d_theirs), (y, d) = results
    torch.testing.assert_close(y, y_theirs)
    torch.testing.assert_close(d, d_theirs)


OFFICIAL = {
    "ConvLSTM": (
        lambda: ConvLSTM(3, [8, 6], [(3, 3), (5, 3)], 2),
        {
            "cell_list.0.conv.weight": (32, 11, 3, 3),
            "cell_list.0.conv.bias": (32,),
            "cell_list.1.conv.weight": (24, 14, 5, 3),
            "cell_list.1.conv.bias": (24,),
        },
    ),
    "EncoderDecoderConvLSTM": (
        lambda: EncoderDecoderConvLSTM(nf=4, in_chan=2),
        {
            "encoder_1_convlstm.conv.weight": (16, 6, 3, 3),
            "encoder_1_convlstm.conv.bias": (16,),
            "encoder_2_convlstm.conv.weight": (16, 8, 3, 3),
            "encoder_2_convlstm.conv.bias": (16,),
            "decoder_1_convlstm.conv.weight": (16, 8, 3, 3),
            "decoder_1_convlstm.conv.bias": (16,),
            "decoder_2_convlstm.conv.weight": (16, 8, 3, 3),
            "decoder_2_convlstm.conv.bias": (16,),
            "decoder_CNN.weight": (1, 4, 1, 3, 3),
            "decoder_CNN.bias": (1,),
        },
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_checkpoints_load(name):
    build, shapes = OFFICIAL[name]
    model, checkpoint = build(), {key: torch.randn(shape) for key, shape in shapes.items()}
    model.load_state_dict(checkpoint, strict=True)
    # the order too: an optimiser's state is stored by position
    assert [key for key, _ in model.named_parameters()] == list(shapes)


@pytest.mark.parametrize("with_state", [False, True])
def test_batch_first_changes_the_layout_only(with_state):
    time_first = ConvLSTM(2, [4, 3], 3, 2, return_all_layers=True)  # batch_first=False is the default
    batch_first = ConvLSTM(2, [4, 3], 3, 2, batch_first=True, return_all_layers=True)
    batch_first.load_state_dict(time_first.state_dict())
    x = torch.randn(3, 4, 2, 5, 6)  # (B, T, C, H, W)
    state = [(torch.randn(3, n, 5, 6), torch.randn(3, n, 5, 6)) for n in (4, 3)] if with_state else None
    expected, expected_states = batch_first(x, state)
    layers, states = time_first(x.transpose(0, 1), state)
    assert [tuple(y.shape) for y in layers] == [(4, 3, 4, 5, 6), (4, 3, 3, 5, 6)]
    torch.testing.assert_close([y.transpose(0, 1) for y in layers], expected)
    torch.testing.assert_close(states, expected_states)


def test_passing_the_state_continues_the_sequence():
    model = ConvLSTM(2, [4, 3], 3, 2, batch_first=True, return_all_layers=True)
    x = torch.randn(2, 5, 2, 6, 6)
    whole, last = model(x)
    first, state = model(x[:, :2])
    rest, last_of_rest = model(x[:, 2:], state)
    for y, a, b in zip(whole, first, rest, strict=True):
        assert torch.equal(y, torch.cat((a, b), 1))
    torch.testing.assert_close(last_of_rest, last, rtol=0, atol=0)
    assert not torch.equal(model(x[:, 2:])[0][-1], rest[-1])


def test_last_layer_only_unless_all_are_asked_for():
    every, last = (ConvLSTM(2, [4, 3], 3, 2, return_all_layers=b) for b in (True, False))
    last.load_state_dict(every.state_dict())
    x = torch.randn(3, 2, 2, 5, 5)
    layers, states = every(x)
    torch.testing.assert_close(last(x), (layers[-1:], states[-1:]))


def test_int_kernel_is_the_square_one():
    a, b, c = ConvLSTM(2, 4, 5, 2), ConvLSTM(2, 4, (5, 5), 2), ConvLSTM(2, (4, 4), [5, (5, 5)], 2)
    x = torch.randn(3, 1, 2, 6, 6)
    for other in (b, c):
        other.load_state_dict(a.state_dict(), strict=True)
        torch.testing.assert_close(other(x), a(x))


@pytest.mark.parametrize("kernel_size", [2, 0, -1, (3, 4), (4, 3), (3, 3, 3), ((3, 3), (5, 5))])
def test_refuses_kernels_that_change_the_size(kernel_size):
    for build in (lambda: ConvLSTMCell(2, 3, kernel_size), lambda: ConvLSTM(2, 3, kernel_size, 2)):
        with pytest.raises(ValueError, match="odd"):
            build()


def test_refuses_lists_of_the_wrong_length():
    with pytest.raises(ValueError, match="hidden_dim lists 3 values for num_layers=2"):
        ConvLSTM(2, [4, 4, 4], 3, 2)
    with pytest.raises(ValueError, match="kernel_size lists 1 values for num_layers=2"):
        ConvLSTM(2, 4, [3], 2)
    model = ConvLSTM(2, 4, 3, 2)
    x = torch.randn(2, 1, 2, 5, 5)
    with pytest.raises(ValueError, match="hidden_state has 1 states for 2 layers"):
        model(x, model(x)[1])


def test_seq2seq_is_the_published_recurrence():
    model = EncoderDecoderConvLSTM(nf=3, in_chan=2)
    x = torch.randn(2, 4, 2, 5, 6)
    p = dict(model.named_parameters())
    step = {
        name: lambda x, h, c, name=name: step_by_hand(
            x, h, c, p[f"{name}_convlstm.conv.weight"], p[f"{name}_convlstm.conv.bias"]
        )
        for name in ("encoder_1", "encoder_2", "decoder_1", "decoder_2")
    }
    h1 = c1 = h2 = c2 = h3 = c3 = h4 = c4 = torch.zeros(2, 3, 5, 6)
    for t in range(4):
        h1, c1 = step["encoder_1"](x[:, t], h1, c1)
        h2, c2 = step["encoder_2"](h1, h2, c2)
    fed, expected = h2, []
    for _ in range(3):
        h3, c3 = step["decoder_1"](fed, h3, c3)
        h4, c4 = step["decoder_2"](h3, h4, c4)
        fed = h4
        frame = conv_by_hand(h4, p["decoder_CNN.weight"][:, :, 0], p["decoder_CNN.bias"])
        expected.append(sigmoid_by_hand(frame))
    torch.testing.assert_close(model(x, 3), torch.stack(expected, 2))


def test_seq2seq_shape_range_and_dependence_on_x_alone():
    model = EncoderDecoderConvLSTM(nf=4, in_chan=1)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    x = torch.rand(2, 3, 1, 8, 6)
    x_before = x.clone()
    y = model(x, 5)
    assert y.shape == (2, 1, 5, 8, 6)
    assert 0 <= y.min() < 0.2 and 0.8 < y.max() <= 1  # spread over the range, never out of it
    torch.testing.assert_close(model(x, 2), y[:, :, :2])  # later frames change nothing in earlier ones
    torch.testing.assert_close(model(x[1:], 5), y[1:])  # nor do the other sequences of the batch
    model(torch.rand(2, 3, 1, 8, 6), 5)
    assert torch.equal(model(x, 5), y)  # nor earlier calls
    assert torch.equal(x, x_before)
    for t in range(3):
        changed = x.clone()
        changed[:, t] = 1 - changed[:, t]
        assert not torch.allclose(model(changed, 5), y)


def test_forecaster_shape_and_gradients():
    model = ConvLSTMForecaster(channels=2, hidden=(3, 4), kernel_size=5, patch=2)
    y = model(torch.rand(2, 3, 2, 8, 6), 4)
    assert y.shape == (2, 4, 2, 8, 6)
    (y * torch.randn_like(y)).sum().backward()
    for name, p in model.named_parameters():
        grad = p.grad
        if name == "forecaster.cell_list.0.conv.weight":  # these weights meet the zeros alone
            assert not grad[:, : 2 * 2 * 2].any()
            grad = grad[:, 2 * 2 * 2 :]
        assert grad.ne(0).all(), name


def test_forecaster_is_my_model_without_peepholes():
    mine = my_model.EncoderForecaster(2, (3, 4), 3, patch=2, peephole=False, fast=False)
    reference = ConvLSTMForecaster(2, (3, 4), 3, patch=2)
    for part in ("encoder", "forecaster"):
        for layer, cell in zip(getattr(mine, part), getattr(reference, part).cell_list, strict=True):
            copy_cell(layer.cell, cell)
    reference.head.load_state_dict(mine.head[0].state_dict())
    past = torch.rand(2, 3, 2, 8, 6, requires_grad=True)
    y_mine, y = mine(past, 4), reference(past, 4)
    torch.testing.assert_close(y, y_mine)
    torch.testing.assert_close(gradients([y], [past]), gradients([y_mine], [past]))


def test_forecaster_has_the_papers_size():
    with torch.device("meta"):
        n = sum(p.numel() for p in ConvLSTMForecaster().parameters())
    peepholes = 2 * 3 * (128 + 64 + 64)
    weights_for_zeros = 4 * 128 * 16 * 5 * 5
    assert n == 7_585_296 - peepholes + weights_for_zeros == 7_788_560
