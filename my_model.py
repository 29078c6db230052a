"""The ConvLSTM encoder-forecaster of Shi et al. (2015), https://arxiv.org/abs/1506.04214, written by hand.

The paper's network: frames enter cut into patches, pass through a stack of ConvLSTM layers (the encoder), and every
layer's state is copied to a second stack (the forecaster), which is fed nothing and unrolls the future from its states.
All its hidden states together, through one convolution, give the frames. In what main.py trains, the encoder itself
goes on as the forecaster, fed with the frame that it drew last.

B batch, T frames, C channels, H height, W width; Ch hidden channels, k kernel size, P patch.

Changes from the paper, and why. Those from `head` on are off in `EncoderForecaster()`, the paper's network, and on in
main.py. Gains are in validation MSE, that of the head's first layer in test MSE, each measured beside the recipe of its
time, so they do not add up (records/README.md).
- logits are returned, not frames, so that the cross-entropy of a sure pixel stays exact;
- forget gates start open (bias 1) and frames start nearly black (bias -3; with a reach, as the last frame, blurred),
  which saves the first steps;
- `head`: hidden layers before the 1×1 convolution, the first 3×3. Digits move 3.6 pixels a frame, less than a
  patch of 4, and a linear map of the states cannot shift what is inside it (one layer: 94.0 to 87.5, in a prototype,
  at equal time; a second: 91.4 to 87.8, at equal sequences);
- `feedback`: one stack for both, fed with its own last frame while it forecasts. Each weight learns from past and
  future alike, and half as many are to be learned (94.7 to 90.3, at equal sequences);
- `dilation`: above the first layer, the taps of the state-to-state kernel are `dilation` patches apart, 2 in main.py.
  When one end of a digit meets a wall, the other, up to seven patches off, has to turn with it (67.8 to 64.0);
- `reach`: the head draws on the last frame, moved: for each patch it gives the weights of all moves up to so many
  pixels, 4 in main.py (after Finn et al., 2016, see advection.py). Most of the next frame is the last one, moved, and
  states that need not hold every pixel have room for the motion (64.0 to 58.7);
- `search`: the first layer also sees how each patch moved since the frame before, by up to so many pixels, 4 in
  main.py; block matching tells (see advection.py). Digits move by fractions of a pixel, which show only over several
  frames: a network that need not measure motion can keep count of them (58.7 to 53.6, dense targets beginning later);
- `sheets`: the head takes the last frame apart into so many, 2 in main.py, and moves each by weights of its own, so
  that digits that overlap go their ways (as the layers of Wang & Adelson, 1994, do). Each keeps of a frame what it had
  been expected to show, from the fifth input frame on, and the larger value is drawn, as of bright things on black
  (45.8 to 44.0);
- `symmetric`: kernels are tied so that, but for biases and peepholes, the network is equivariant to flips and
  transposition (after Cohen & Welling, 2016, see symmetry.py). Digits move by one law in all directions, and what a
  sequence teaches of a motion counts for its seven flipped and turned versions as well (51.6 to 42.1, in one epoch);
- dense targets, `draw_from`: training starts with 19 input frames and one to forecast, and shifts to 10 and 10; until
  then every input frame from the sixth on is a target too: more to learn from each sequence, and from a longer memory
  (the longer input: 50.4 to 46.3, at equal sequences).
"""

import torch
import torch.nn.functional as F
from torch import nn

from advection import advect, block_match
from fast_convlstm import FastConvLSTM
from symmetry import directions, square, tie

DOUBT = 0.05  # added to what each sheet is expected to show, so that none loses a pixel for good
MOTION = 16  # channels of the motion that block matching finds


def kernel(n_in, n_out, size):
    """A convolution's weight (n_out, n_in, size, size), drawn as torch draws its own."""
    bound = (n_in * size * size) ** -0.5
    return nn.Parameter(torch.empty(n_out, n_in, size, size).uniform_(-bound, bound))


class ConvLSTMCell(nn.Module):
    """One time step. Gates in the order i, f, o, g; * convolves, ∘ multiplies element by element.

    i = σ(Wxi * x + Whi * h + Wci ∘ c + bi)          g = tanh(Wxg * x + Whg * h + bg)
    f = σ(Wxf * x + Whf * h + Wcf ∘ c + bf)          c' = f ∘ c + i ∘ g
    o = σ(Wxo * x + Who * h + Wco ∘ c' + bo)         h' = o ∘ tanh(c')

    A peephole Wc has one number per channel, shared over space, so that H and W stay free.
    Without an input (in_channels=0) the Wx terms are absent.
    """

    def __init__(self, in_channels, hidden, kernel_size, state_kernel_size, peephole=True, dilation=1):
        super().__init__()
        for k in (kernel_size, state_kernel_size):
            if k % 2 == 0:
                raise ValueError(f"kernel size {k} is even; use an odd one, so that frames keep their size")
        self.hidden = hidden
        self.padding = kernel_size // 2, dilation * (state_kernel_size // 2)
        self.dilation = dilation  # of the state-to-state kernel
        self.input_to_state = kernel(in_channels, 4 * hidden, kernel_size) if in_channels else None
        self.state_to_state = kernel(hidden, 4 * hidden, state_kernel_size)
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        self.peephole = nn.Parameter(torch.zeros(3, hidden)) if peephole else None
        with torch.no_grad():
            self.bias[hidden : 2 * hidden] = 1.0  # forget gates start open

    def forward(self, x, state):
        """x (B, C, H, W) or None, state (h, c) of (B, Ch, H, W) each → the next (h, c)."""
        h, c = state
        z = F.conv2d(h, self.state_to_state, self.bias, padding=self.padding[1], dilation=self.dilation)
        if x is not None:
            z = z + F.conv2d(x, self.input_to_state, padding=self.padding[0])
        i, f, o, g = z.chunk(4, 1)
        wi, wf, wo = self.peephole[:, :, None, None] if self.peephole is not None else (0, 0, 0)
        c_next = torch.sigmoid(f + wf * c) * c + torch.sigmoid(i + wi * c) * torch.tanh(g)
        h_next = torch.sigmoid(o + wo * c_next) * torch.tanh(c_next)
        return h_next, c_next

    def zeros(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)  # under autocast x may be bf16; c must not be
        state = x.new_zeros(x.shape[0], self.hidden, *x.shape[-2:], dtype=wide)
        return state, state


class ConvLSTM(nn.Module):
    """One layer over time: the cell, once a frame. `fast=False` runs exactly that; `fast=True` its twin.

    The twin never calls the cell, so main.py and bench.py set fast=False where `twin_agrees` finds that they differ.
    """

    def __init__(self, in_channels, hidden, kernel_size, state_kernel_size, peephole=True, dilation=1, fast=True):
        super().__init__()
        self.cell = ConvLSTMCell(in_channels, hidden, kernel_size, state_kernel_size, peephole, dilation)
        self.fast = fast

    def forward(self, x, state, n_frames):
        """x (B, T, C, H, W) or None, state (None: zeros) → hidden states (B, T, Ch, H, W), and the last h and c."""
        state = self.cell.zeros(x) if state is None else state
        if self.fast:
            return self.forward_fast(x, state, n_frames)
        hidden_states = []
        for t in range(n_frames):
            state = self.cell(None if x is None else x[:, t], state)
            hidden_states.append(state[0])
        return torch.stack(hidden_states, 1), state

    def forward_fast(self, x, state, n_frames):
        cell, device = self.cell, state[0].device.type
        if x is not None and x.shape[2] != cell.input_to_state.shape[1]:
            raise ValueError(f"the input has {x.shape[2]} channels; expected {cell.input_to_state.shape[1]}")
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else state[0].dtype  # of all but c and its peepholes
        c_dtype = torch.promote_types(dtype, torch.float32)
        cast = lambda w: w if w.dtype == dtype else w.to(dtype, memory_format=torch.channels_last)
        input_to_state = None if x is None else cast(cell.input_to_state)
        weights = input_to_state, cast(cell.state_to_state), cell.bias.to(dtype)
        peephole = state[0].new_zeros(3, cell.hidden) if cell.peephole is None else cell.peephole
        h, c = (s.permute(0, 2, 3, 1) for s in state)
        x = None if x is None else x.permute(1, 0, 3, 4, 2).to(dtype).contiguous()  # (T, B, H, W, C)
        with torch.autocast(device, enabled=False):
            args = h.to(dtype), c.to(c_dtype), n_frames, *weights, peephole.to(c_dtype), cell.dilation
            hs, h, c = FastConvLSTM.apply(x, *args)
        return hs.permute(1, 0, 4, 2, 3), (h.permute(0, 3, 1, 2), c.permute(0, 3, 1, 2))


def twin_agrees():
    """Whether the fast layer computes what the cell above says, in float64; what is compiled has its own checks."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for in_channels, peephole, dilation in ((4, True, 1), (4, False, 2), (0, True, 1)):
            x, state = torch.randn(1, 3, 4, 5, 5).double(), torch.randn(2, 1, 4, 5, 5).double().mul(20)
            x.requires_grad_(), state.requires_grad_()
            try:
                layer = ConvLSTM(in_channels, 4, 3, 3, peephole, dilation).double()
                for parameter in layer.parameters():
                    nn.init.uniform_(parameter, -1, 1)
                leaves = [*layer.parameters(), state, *([x] if in_channels else [])]
                found = []
                for layer.fast in (True, False):
                    hidden_states, (_, c) = layer(x if in_channels else None, state.unbind(), 3)
                    gradients = torch.autograd.grad(hidden_states.sum() + c.sum(), leaves, materialize_grads=True)
                    found.append((hidden_states, c, *gradients))
                if not all(torch.allclose(*pair) for pair in zip(*found, strict=True)):
                    return False
            except Exception:  # the edited cell has other parts, which may raise anything
                return False
    return True


def unroll(layers, x, states, n_frames):
    """A stack over n_frames: x (B, T, C, H, W) or None, each layer's state → each layer's hidden states and state."""
    hidden_states, last = [], []
    for layer, state in zip(layers, states, strict=True):
        x, state = layer(x, state, n_frames)
        hidden_states.append(x)
        last.append(state)
    return hidden_states, last


class EncoderForecaster(nn.Module):
    """past (B, T, C, H, W) in [0, 1] → logits of the n_future frames that follow (B, n_future, C, H, W).

    The defaults are the paper's best network, ConvLSTM(5×5)-5×5-128-5×5-64-5×5-64: 7,585,296 parameters.
    head: channels of hidden layers, 3×3 then 1×1, before the 1×1 convolution that draws the patches; the paper: none.
    feedback: no second stack; the encoder goes on as the forecaster, fed with the frame that it drew last.
    search: pixels up to which each patch is looked for in the frame before; the paper: 0, it is not.
    reach: pixels up to which the head can move the last frame, each patch by its own weights; the paper: 0, it cannot.
    sheets: into how many the last frame is taken apart for that, each moved by weights of its own.
    symmetric: tie the kernels, and average their gradients, so that flips of the input flip the forecast.
    Raises ValueError for an even kernel, a layer without channels, a reach without feedback, sheets or n_future below
    1, frames of another shape, frames that it cannot cut into patches and, on the CPU, frames that leave [0, 1].
    """

    def __init__(
        self,
        channels=1,
        hidden=(128, 64, 64),
        kernel_size=5,  # input-to-state
        state_kernel_size=None,  # state-to-state; None: the same
        dilation=1,  # of the state-to-state kernels above the first layer
        patch=4,
        peephole=True,
        head=(),
        feedback=False,
        search=0,
        reach=0,
        sheets=1,
        symmetric=False,
        fast=True,
    ):
        super().__init__()
        if 0 in (*hidden, *head):
            raise ValueError(f"a layer without channels: hidden {hidden}, head {head}")
        if reach and not feedback:
            raise ValueError(f"reach {reach} needs feedback, as it moves the frame drawn before; set reach to 0")
        if sheets < 1:
            raise ValueError(f"sheets is {sheets}; expected at least 1")
        self.channels, self.patch, self.search, self.reach = channels, patch, search, reach
        self.sheets = sheets if reach else 1
        pixels = channels * patch * patch
        self.motion = nn.Conv2d((2 * search + 1) ** 2, MOTION, 1) if search else None
        options = kernel_size, state_kernel_size or kernel_size, peephole
        layers = lambda n_input: nn.ModuleList(
            ConvLSTM(n_in, n, *options, dilation if layer else 1, fast)
            for layer, (n_in, n) in enumerate(zip((n_input, *hidden[:-1]), hidden, strict=True))
        )
        self.encoder = layers(pixels + (MOTION if search else 0))
        self.forecaster = None if feedback else layers(0)  # its first layer has no input
        head_layers, n_in = [], sum(hidden)
        for n in head:
            k = 1 if head_layers else 3
            head_layers += nn.Conv2d(n_in, n, k, padding=k // 2), nn.GELU()
            n_in = n
        # logits; with a reach also the gain on those of the moved frame, and the weights of each sheet's moves
        moves = (2 * reach + 1) ** 2
        self.outputs = [pixels, pixels, sheets * moves] if reach else [pixels]
        draw = nn.Conv2d(n_in, sum(self.outputs), 1)
        with torch.no_grad():
            if reach:  # the first forecast is the last frame, blurred
                draw.bias.zero_()
                draw.bias[pixels : 2 * pixels] = 1.0
                draw.bias[2 * pixels + moves // 2 :: moves] = 2.0  # each sheet's move by nothing
            else:
                draw.bias.fill_(-3.0)  # frames start nearly black, as they are
        self.head = nn.Sequential(*head_layers, draw)
        if symmetric:
            self.tie_kernels()

    def tie_kernels(self):
        """Tie each kernel, by what its channels stand for. Biases and peepholes stay free."""
        pixels, motion = [square(self.patch)] * self.channels, directions(MOTION) if self.search else []
        if self.search:
            tie(self.motion.weight, motion, [square(2 * self.search + 1)])
        for stack in (self.encoder, self.forecaster or ()):
            below = pixels + motion
            for layer in stack:
                hidden = directions(layer.cell.hidden)
                if layer.cell.input_to_state is not None:
                    tie(layer.cell.input_to_state, 4 * hidden, below)
                tie(layer.cell.state_to_state, 4 * hidden, hidden)  # four gates, each in the same squares
                below = hidden
        below = [place for layer in self.encoder for place in directions(layer.cell.hidden)]
        *convolutions, draw = (layer for layer in self.head if isinstance(layer, nn.Conv2d))
        for convolution in convolutions:
            hidden = directions(convolution.out_channels)
            tie(convolution.weight, hidden, below)
            below = hidden
        tie(draw.weight, 2 * pixels + self.sheets * [square(2 * self.reach + 1)] if self.reach else pixels, below)

    def forward(self, past, n_future, draw_from=None):
        """draw_from: also draw the frame after each input frame from that one on (it counts from 0).

        Then logits are (B, T - 1 - draw_from + n_future, C, H, W). The sheets, too, part from there on; without it,
        from the middle of past.
        """
        self.check(past, n_future)
        start, last = draw_from, past.shape[1] - 1
        if draw_from is None:
            start = last // 2 if self.sheets > 1 else last  # sheets need some frames to part
        black = torch.zeros_like(past[:, :1])
        encoded, states = self.encode(past, black, [None] * len(self.encoder))
        if self.forecaster is not None:
            hidden_states, _ = unroll(self.forecaster, None, states, n_future)
            if draw_from is not None:  # the state after each input frame draws the next
                pairs = zip(encoded, hidden_states, strict=True)
                hidden_states = [torch.cat((x[:, draw_from:-1], y), 1) for x, y in pairs]
            return self.draw(hidden_states)[0]
        expected = black.expand(-1, self.sheets, -1, -1, -1)  # of each sheet
        drawn, expected = self.draw([h[:, start:] for h in encoded], past[:, start:], expected)
        logits, frame = [drawn], past[:, -1:]
        for _ in range(n_future - 1):  # the state after the last input frame has drawn the first forecast frame
            # not detached: gradients pass through the frames as well, if not through their block matching
            before, frame = frame, torch.sigmoid(logits[-1][:, -1:])
            hidden_states, states = self.encode(frame, before, states)
            drawn, expected = self.draw(hidden_states, frame, expected)
            logits.append(drawn)
        logits = torch.cat(logits, 1)
        return logits[:, -n_future:] if draw_from is None else logits  # None: earlier ones were for the sheets

    def encode(self, frames, before, states):
        """The encoder over frames (B, T, C, H, W), and the one before them (B, 1, C, H, W): as unroll."""
        x = F.pixel_unshuffle(frames, self.patch)  # (B, T, C·P², H/P, W/P)
        if self.search:
            before = torch.cat((before, frames[:, :-1]), 1)
            likely = block_match(frames.flatten(0, 1), before.flatten(0, 1), self.patch, 2 * self.search + 1)
            x = torch.cat((x, self.motion(likely).unflatten(0, frames.shape[:2])), 2)
        return unroll(self.encoder, x, states, frames.shape[1])

    def draw(self, hidden_states, frames=None, expected=None):
        """Hidden states → logits. With a reach, also from the frames that they saw last and what was expected of those.

        Each layer's (B, T, Ch, H/P, W/P), frames (B, T, C, H, W), what each sheet was expected to show of the first of
        them (B, S, C, H, W) → logits (B, T, C, H, W), what each sheet is expected to show next.
        """
        B, T = hidden_states[0].shape[:2]
        # to the head as images, time before batch, as the layers lay them out in memory: (T·B, sum of Ch, H/P, W/P)
        as_images = torch.cat([h.transpose(0, 1).flatten(0, 1) for h in hidden_states], 1)
        drawn = self.head(as_images).split(self.outputs, 1)
        logits = F.pixel_shuffle(drawn[0], self.patch)
        if self.reach:
            gain = F.pixel_shuffle(drawn[1], self.patch)
            weights = drawn[2].unflatten(1, (self.sheets, -1)).permute(0, 1, 3, 4, 2)
            weights = weights.to(frames.dtype, memory_format=torch.contiguous_format).softmax(-1)
            moved = []
            for frame, w in zip(frames.unbind(1), weights.unflatten(0, (T, B)), strict=True):
                expected = self.move(frame, expected, w)
                moved.append(expected.amax(1))
            logits = logits + gain * torch.logit(torch.cat(moved).clamp(0.02, 0.98))  # ±3.9; of 0 and 1, infinite
        return logits.unflatten(0, (T, B)).transpose(0, 1), expected

    def move(self, frame, expected, weights):
        """A frame (B, C, H, W), taken apart by what each sheet was expected to show, and moved: what each shows next.

        The sheet most expected to show a pixel gets all of it, others in proportion less; if none was, each gets all.
        """
        claims = expected.detach() + DOUBT  # who owns a pixel follows from what was expected, and is not learned
        parts = frame[:, None] * (claims / claims.amax(1, keepdim=True))
        return advect(parts.flatten(0, 1), weights.flatten(0, 1), self.patch).unflatten(0, parts.shape[:2])

    def check(self, past, n_future):
        if n_future < 1:
            raise ValueError(f"n_future is {n_future}; expected at least 1")
        if past.ndim != 5 or past.shape[2] != self.channels:
            raise ValueError(f"frames have shape {tuple(past.shape)}; expected (B, T, {self.channels}, H, W)")
        if past.shape[3] % self.patch or past.shape[4] % self.patch:
            raise ValueError(f"frames of {past.shape[3]}×{past.shape[4]} cannot be cut into patches of {self.patch}")
        if past.device.type == "cpu" and past.numel():  # elsewhere a look at the values would stall the device
            low, high = past.aminmax()
            if not (low >= 0 and high <= 1):
                raise ValueError(f"frames have values from {low:.4g} to {high:.4g}; expected 0 to 1")
