"""ConvLSTM as most people run it in PyTorch, in plain code. To learn, begin here.

    python convlstm.py    trains a small `ConvLSTMForecaster` on the CPU, and draws a forecast

`--model convlstm` of main.py trains the same network longer, with Muon and more. Its design is that of the
paper's network in my_model.py, without peepholes. With the same weights, both give the same numbers.

Checkpoints of two widely used models load by name, and give the same outputs:

- `ConvLSTM`, the interface of https://github.com/ndrplz/ConvLSTM_pytorch
- `EncoderDecoderConvLSTM`, the seq2seq of https://github.com/holmdk/Video-Prediction-using-PyTorch

B batch, T frames, C channels, H height, W width; Ch hidden channels, P patch. A state is (h, c), each
(B, Ch, H, W).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class ConvLSTMCell(nn.Module):
    """One time step, without peepholes; * convolves, [ , ] joins channels, ∘ multiplies element by element.

    i, f, o, g = the quarters of W * [x, h] + b
    c' = σ(f) ∘ c + σ(i) ∘ tanh(g)
    h' = σ(o) ∘ tanh(c')
    """

    def __init__(self, input_dim, hidden_dim, kernel_size, bias=True):
        super().__init__()
        self.hidden_dim = hidden_dim
        n_in, n_out = input_dim + hidden_dim, 4 * hidden_dim
        self.conv = nn.Conv2d(n_in, n_out, kernel_size, padding="same", bias=bias)

    def forward(self, x, state=None):
        """x (B, C, H, W) and (h, c), None for zeros → the next (h, c)."""
        if state is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_dim, *x.shape[2:])
            state = zeros, zeros
        h, c = state
        i, f, o, g = self.conv(torch.cat((x, h), 1)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, c


class ConvLSTM(nn.Module):
    """A stack of cells over time.

    `hidden_dim`: a number, or a list or tuple with one for each layer. `kernel_size`: a number or a pair
    (kh, kw), or a list with one of these for each layer. Three things differ from the original: an int kernel
    works, a state can be passed, and with `batch_first=False` the outputs, too, are (T, B, Ch, H, W).
    """

    def __init__(
        self,
        input_dim,
        hidden_dim,
        kernel_size,
        num_layers,
        batch_first=False,
        bias=True,
        return_all_layers=False,
    ):
        super().__init__()
        hidden_dims = [hidden_dim] * num_layers if isinstance(hidden_dim, int) else list(hidden_dim)
        # a tuple is one kernel's height and width; only a list has one kernel for each layer
        kernel_sizes = kernel_size if isinstance(kernel_size, list) else [kernel_size] * num_layers
        self.time_dim = 1 if batch_first else 0
        self.return_all_layers = return_all_layers
        inputs = [input_dim, *hidden_dims[:-1]]
        sizes = zip(range(num_layers), inputs, hidden_dims, kernel_sizes, strict=True)
        self.cell_list = nn.ModuleList(ConvLSTMCell(n_in, n, k, bias) for _, n_in, n, k in sizes)

    def forward(self, input_tensor, hidden_state=None):
        """input_tensor (T, B, C, H, W), or (B, T, C, H, W) with batch_first → (outputs, last states).

        `hidden_state`: a list with one (h, c) for each layer, or None for zeros. The results are lists, too:
        of all layers with return_all_layers, else of the last. An output has the layout of the input.
        """
        if hidden_state is None:
            hidden_state = [None] * len(self.cell_list)
        x, layer_outputs, last_states = input_tensor, [], []
        for cell, state in zip(self.cell_list, hidden_state, strict=True):
            outputs = []
            for frame in x.unbind(self.time_dim):
                state = cell(frame, state)
                outputs.append(state[0])
            x = torch.stack(outputs, self.time_dim)
            layer_outputs.append(x)
            last_states.append(state)
        if not self.return_all_layers:
            return layer_outputs[-1:], last_states[-1:]
        return layer_outputs, last_states


class ConvLSTMForecaster(nn.Module):
    """past (B, T, C, H, W) in [0, 1] → logits of the n_future frames that follow (B, n_future, C, H, W).

    The forecaster's input is always zeros, so its first layer has weights that do nothing: 204,800 of
    7,788,560 with the arguments below.
    """

    def __init__(self, channels=1, hidden=(128, 64, 64), kernel_size=5, patch=4):
        super().__init__()
        self.patch_size = patch
        pixels = channels * patch * patch
        options = {"num_layers": len(hidden), "batch_first": True, "return_all_layers": True}
        self.encoder = ConvLSTM(pixels, hidden, kernel_size, **options)
        self.forecaster = ConvLSTM(pixels, hidden, kernel_size, **options)
        self.head = nn.Conv2d(sum(hidden), pixels, 1)

    @property
    def output_layer(self):
        return self.head

    def forward(self, past, n_future):
        H, W = past.shape[-2:]
        whole = F.pad(past, (0, -W % self.patch_size, 0, -H % self.patch_size, 0, 0), "replicate")
        x = F.pixel_unshuffle(whole, self.patch_size)  # (B, T, C·P², H/P, W/P)
        _, states = self.encoder(x)
        zeros = x.new_zeros(x.shape[0], n_future, *x.shape[2:])
        layer_outputs, _ = self.forecaster(zeros, states)
        h = torch.cat(layer_outputs, 2)  # (B, n_future, sum of Ch, H/P, W/P)
        logits = self.head(h.flatten(0, 1)).unflatten(0, h.shape[:2])
        return F.pixel_shuffle(logits, self.patch_size)[..., :H, :W]


def train(steps=1000, batch=8, hidden=(64, 64), rate=1e-3):
    """The simplest training, on fresh Moving MNIST. Prints losses, and writes convlstm.png.

    1,000 steps take 8 minutes on two cores (Zen 5), and end near a cross-entropy of 0.145. Forecasts are
    blurred spots, which follow the digits for some frames. README.md shows what longer training reaches.
    """
    # here, so that the networks need PyTorch only
    import figures
    import moving_mnist

    def sequences(digits, n, seed):
        frames = torch.from_numpy(moving_mnist.generate(digits, n, seed)) / 255  # (B, T, C, H, W)
        return frames[:, :10], frames[:, 10:]

    torch.manual_seed(0)
    digits = moving_mnist.read_digits(moving_mnist.RAW / "digits_train.png")
    model = ConvLSTMForecaster(1, hidden, kernel_size=3)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for step in range(1, steps + 1):
        past, future = sequences(digits, batch, seed=step)
        logits = model(past, n_future=10)
        loss = F.binary_cross_entropy_with_logits(logits, future)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 50 == 0:
            print(f"step {step} of {steps}: cross-entropy {loss.item():.4f}")
    digits = moving_mnist.read_digits(moving_mnist.RAW / "digits_test.png")  # not seen in training
    past, future = sequences(digits, 1, seed=0)
    with torch.no_grad():
        forecast = torch.sigmoid(model(past, n_future=10))
    title = f"convlstm.py after {steps:,} steps: a sequence of test digits"
    Path("convlstm.png").write_bytes(figures.prediction(past[0], future[0], forecast[0], title))
    print("forecast: convlstm.png")


class EncoderDecoderConvLSTM(nn.Module):
    """x (B, T, in_chan, H, W) → frames after the sigmoid (B, 1, future_seq, H, W), channel before time.

    The decoder's first input is the last h of encoder_2. Its later inputs are the h of decoder_2 one step
    before. As in the original, the h and c of the decoder start from zeros.
    """

    def __init__(self, nf, in_chan):
        super().__init__()
        self.encoder_1_convlstm = ConvLSTMCell(in_chan, nf, 3)
        self.encoder_2_convlstm = ConvLSTMCell(nf, nf, 3)
        self.decoder_1_convlstm = ConvLSTMCell(nf, nf, 3)
        self.decoder_2_convlstm = ConvLSTMCell(nf, nf, 3)
        self.decoder_CNN = nn.Conv3d(nf, 1, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x, future_seq):
        state_1 = state_2 = None
        for frame in x.unbind(1):
            state_1 = self.encoder_1_convlstm(frame, state_1)
            state_2 = self.encoder_2_convlstm(state_1[0], state_2)
        h, outputs = state_2[0], []
        state_1 = state_2 = None
        for _ in range(future_seq):
            state_1 = self.decoder_1_convlstm(h, state_1)
            state_2 = self.decoder_2_convlstm(state_1[0], state_2)
            h = state_2[0]
            outputs.append(h)
        # Not in bf16, which rounds a probability near 1 to 1. Also, on a CPU with AMX and one thread, torch's
        # bf16 weight gradient of a Conv3d to one channel is NaN.
        with torch.autocast(x.device.type, enabled=False):
            return torch.sigmoid(self.decoder_CNN(torch.stack(outputs, 2).to(x.dtype)))


class Seq2SeqForecaster(nn.Module):
    """`EncoderDecoderConvLSTM` as a forecaster: past (B, T, C, H, W) → logits of n_future frames."""

    def __init__(self, channels=1, nf=64):
        super().__init__()
        self.seq2seq = EncoderDecoderConvLSTM(nf, channels)

    @property
    def output_layer(self):
        return self.seq2seq.decoder_CNN

    def forward(self, past, n_future):
        frames = self.seq2seq(past, n_future).transpose(1, 2)  # (B, 1, T, H, W) → (B, T, 1, H, W)
        return torch.logit(frames.float(), eps=1e-6)


if __name__ == "__main__":
    train()
