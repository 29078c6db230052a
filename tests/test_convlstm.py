import pytest
import torch
from conftest import ROOT, gradients
from PIL import Image
from test_my_model import convolve_by_hand

import convlstm
import figures
import moving_mnist
import my_model
from convlstm import ConvLSTM, ConvLSTMForecaster, EncoderDecoderConvLSTM, Seq2SeqForecaster

DIGITS = moving_mnist.read_digits(ROOT / "raw" / "digits_train.png")


@pytest.fixture(autouse=True)
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def step_by_hand(cell, x, h, c):
    n = h.shape[1]
    z = convolve_by_hand(torch.cat((x, h), 1), cell.conv.weight) + cell.conv.bias[:, None, None]
    i, f, o = (torch.sigmoid(z[:, k * n : (k + 1) * n]) for k in range(3))
    c = f * c + i * torch.tanh(z[:, 3 * n :])
    return o * torch.tanh(c), c


@pytest.mark.parametrize("all_layers", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_third_party_package(bias, all_layers):
    third_party = pytest.importorskip("conv_lstm")
    theirs = third_party.ConvLSTM(2, [4, 3], [3, 5], 2, True, bias, all_layers)
    ours = ConvLSTM(2, [4, 3], [3, (5, 5)], 2, True, bias, all_layers)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())  # an optimizer's state goes by position
    x = torch.randn(2, 4, 2, 6, 5, requires_grad=True)
    results = []
    for model in (theirs, ours):
        layers, states = model(x)
        assert len(layers) == len(states) == (2 if all_layers else 1)
        outputs = [*layers, *(s for state in states for s in state)]
        results.append((outputs, gradients(outputs, [x, *model.parameters()])))
    torch.testing.assert_close(results[1], results[0])
    time_first = ConvLSTM(2, [4, 3], [3, (5, 5)], 2, False, bias, all_layers)
    time_first.load_state_dict(theirs.state_dict(), strict=True)
    (*_, last), _ = time_first(x.transpose(0, 1))
    torch.testing.assert_close(last.transpose(0, 1), layers[-1])


def test_official_checkpoints_load():
    """Those of the seq2seq. Those of ConvLSTM: see above."""
    shapes = {}
    for name, n_in in ("encoder_1", 6), ("encoder_2", 8), ("decoder_1", 8), ("decoder_2", 8):
        shapes |= {f"{name}_convlstm.conv.weight": (16, n_in, 3, 3), f"{name}_convlstm.conv.bias": (16,)}
    shapes |= {"decoder_CNN.weight": (1, 4, 1, 3, 3), "decoder_CNN.bias": (1,)}
    model = EncoderDecoderConvLSTM(nf=4, in_chan=2)
    model.load_state_dict({key: torch.randn(shape) for key, shape in shapes.items()}, strict=True)
    # the order too: an optimizer's state is stored by position
    assert [key for key, _ in model.named_parameters()] == list(shapes)


def test_seq2seq_is_the_published_recurrence():
    model = EncoderDecoderConvLSTM(nf=3, in_chan=2)
    x = torch.randn(2, 4, 2, 5, 6)
    zeros = torch.zeros(2, 3, 5, 6)
    encoder_1 = encoder_2 = decoder_1 = decoder_2 = zeros, zeros
    for t in range(4):
        encoder_1 = step_by_hand(model.encoder_1_convlstm, x[:, t], *encoder_1)
        encoder_2 = step_by_hand(model.encoder_2_convlstm, encoder_1[0], *encoder_2)
    fed, expected = encoder_2[0], []
    for _ in range(3):
        decoder_1 = step_by_hand(model.decoder_1_convlstm, fed, *decoder_1)
        decoder_2 = step_by_hand(model.decoder_2_convlstm, decoder_1[0], *decoder_2)
        fed = decoder_2[0]
        frame = convolve_by_hand(fed, model.decoder_CNN.weight[:, :, 0]) + model.decoder_CNN.bias
        expected.append(torch.sigmoid(frame))
    torch.testing.assert_close(model(x, 3), torch.stack(expected, 2))


def test_seq2seq_forecasts_logits_and_trains_in_bf16():
    model, past = Seq2SeqForecaster(nf=4).float(), torch.rand(2, 3, 1, 8, 6, dtype=torch.float32)
    torch.testing.assert_close(torch.sigmoid(model(past, 5)), model.seq2seq(past, 5).transpose(1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(past, 5)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_forecaster_is_my_model_without_peepholes():
    mine = my_model.EncoderForecaster(2, (3, 4), 3, patch_size=2, peephole=False)
    reference = ConvLSTMForecaster(2, (3, 4), 3, patch=2)  # with weights for an input of zeros
    cells = [*reference.encoder.cell_list, *reference.forecaster.cell_list]
    with torch.no_grad():
        for layer, cell in zip([*mine.encoder, *mine.forecaster], cells, strict=True):
            n = layer.cell.hidden_channels
            cell.conv.weight[:, -n:] = layer.cell.state_to_state.normal_(std=0.3)
            if layer.cell.input_to_state is not None:
                cell.conv.weight[:, :-n] = layer.cell.input_to_state.normal_(std=0.3)
            cell.conv.bias.copy_(layer.cell.bias)
    reference.head.load_state_dict(mine.head[0].state_dict())
    past = torch.rand(2, 3, 2, 8, 6, requires_grad=True)
    y, expected = reference(past, 4), mine(past, 4)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients([y], [past]), gradients([expected], [past]))


def test_the_simplest_training_learns(tmp_path, monkeypatch):
    """With a single sequence, it soon beats the best constant. It draws a forecast of test digits."""
    torch.set_default_dtype(torch.float32)
    asked, drawn, generate, prediction = [], [], moving_mnist.generate, figures.prediction
    monkeypatch.chdir(tmp_path)
    given = lambda digits, *sizes: asked.append((len(digits), *sizes)) or generate(DIGITS, 1, 0)
    monkeypatch.setattr(moving_mnist, "generate", given)
    monkeypatch.setattr(figures, "prediction", lambda *given: drawn.append(given) or prediction(*given))
    convlstm.train(160, 2, (16,), 1e-2)
    n_test = len(moving_mnist.read_digits(ROOT / "raw" / "digits_test.png"))
    assert asked == [*((len(DIGITS), 2, step) for step in range(1, 161)), (n_test, 1, 0)]
    assert n_test != len(DIGITS)
    ((_, future, forecast, _),) = drawn
    assert (forecast - future).square().mean() < 0.95 * future.var()
    with Image.open("convlstm.png") as image:
        image.load()
