"""The ConvLSTM encoder-forecaster of Shi et al. (2015), https://arxiv.org/abs/1506.04214, by hand.

Frames enter as patches. A stack of ConvLSTM layers (the encoder) reads the input frames. In the paper, its
last states are copied to a second stack (the forecaster), which unrolls the future. One convolution turns
states into frames. `EncoderForecaster()` is that network with the first two changes below.

Changes from the paper, and why. The default of main.py has them all.
- The model returns logits: the cross-entropy stays exact where a probability is nearly 0 or 1.
- Initial output biases: untrained, a model forecasts nearly black frames or, with motion, the last frame.
- `head_channels`: hidden layers in the head. Without them, it is one convolution.
- `feedback`: the encoder is also the forecaster, and reads its own last forecast. Half as many weights.
- `dilation`: the upper layers see farther. All of a digit must know when its edge hits a wall.
- `max_motion`: the encoder sees how each patch moved, and the head can move the last frame (motion.py).
- `equivariant`: kernels that respect flips and transposition. Training needs less data
  (equivariant.py).

B batch, T frames, C channels of a frame, H height, W width, P patch size.
Of a layer: Cx channels of its input, Ch hidden channels. It works on patches: H/P, W/P.
"""

import torch
import torch.nn.functional as F
from torch import nn

from equivariant import make_kernels_equivariant
from motion import advect, block_match, matching_costs

MOTION_CHANNELS = 16  # channels of measured motion that the encoder reads


def new_kernel(n_in, n_out, size):
    """A convolution's weight (n_out, n_in, size, size), initialized as torch does."""
    bound = (n_in * size * size) ** -0.5
    return nn.Parameter(torch.empty(n_out, n_in, size, size).uniform_(-bound, bound))


class ConvLSTMCell(nn.Module):
    """One time step; * convolves, ∘ multiplies element by element.

    i, f, o, g = the quarters of Wx * x + Wh * h + b
    c' = σ(f + Wcf ∘ c) ∘ c + σ(i + Wci ∘ c) ∘ tanh(g)
    h' = σ(o + Wco ∘ c') ∘ tanh(c')

    A peephole Wc has one number per channel, as the paper's parameter counts imply. So any H, W work.
    Without an input (in_channels=0) the Wx terms are absent.
    """

    def __init__(
        self, in_channels, hidden_channels, kernel_size, state_kernel_size, peephole=True, dilation=1
    ):
        super().__init__()
        for k in (kernel_size, state_kernel_size):
            if k % 2 == 0:
                raise ValueError(f"kernel size {k} is even; use an odd one, so that frames keep their size")
        self.hidden_channels = hidden_channels
        self.dilation = dilation  # of the state-to-state kernel
        n_gates = 4 * hidden_channels
        self.input_to_state = new_kernel(in_channels, n_gates, kernel_size) if in_channels else None
        self.state_to_state = new_kernel(hidden_channels, n_gates, state_kernel_size)
        self.bias = nn.Parameter(torch.zeros(n_gates))
        self.peephole = nn.Parameter(torch.zeros(3, hidden_channels)) if peephole else None

    def forward(self, x, state):
        """x (B, Cx, H/P, W/P) or None, state (h, c) of (B, Ch, H/P, W/P) each → the next (h, c)."""
        h, c = state
        z = F.conv2d(h, self.state_to_state, self.bias, padding="same", dilation=self.dilation)
        if x is not None:
            z = z + F.conv2d(x, self.input_to_state, padding="same")
        i, f, o, g = z.chunk(4, 1)
        wi, wf, wo = self.peephole[:, :, None, None] if self.peephole is not None else (0, 0, 0)
        c_next = torch.sigmoid(f + wf * c) * c + torch.sigmoid(i + wi * c) * torch.tanh(g)
        h_next = torch.sigmoid(o + wo * c_next) * torch.tanh(c_next)
        return h_next, c_next

    def zero_state(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)  # under autocast x may be bf16; c must not be
        zeros = x.new_zeros(x.shape[0], self.hidden_channels, *x.shape[-2:], dtype=wide)
        return zeros, zeros


class ConvLSTM(nn.Module):
    """One layer over time: the cell, once per frame, or a fast function that gives the same numbers.

    `fast` is None until `support.fast.attach` sets it. With `--no_fast`, every frame goes through the cell.
    """

    def __init__(self, *arguments):
        """The arguments are those of ConvLSTMCell."""
        super().__init__()
        self.cell = ConvLSTMCell(*arguments)
        self.fast = None

    def forward(self, x, state, n_frames):
        """x (B, T, Cx, H/P, W/P) or None, state or None → hidden states (B, T, Ch, H/P, W/P), last (h, c)."""
        state = self.cell.zero_state(x) if state is None else state
        if self.fast is not None:
            hidden_states, state = self.fast(self.cell, x, state, n_frames)
        else:
            hidden_states = []
            for t in range(n_frames):
                state = self.cell(None if x is None else x[:, t], state)
                hidden_states.append(state[0])
            hidden_states = torch.stack(hidden_states, 1)
        return hidden_states, state


def unroll(layers, x, states, n_frames):
    """Run a stack over n_frames: x (B, T, Cx, H/P, W/P) or None → of each, hidden states and last state."""
    hidden_states, last_states = [], []
    for layer, state in zip(layers, states, strict=True):
        x, state = layer(x, state, n_frames)
        hidden_states.append(x)
        last_states.append(state)
    return hidden_states, last_states


class EncoderForecaster(nn.Module):
    """past (B, T, C, H, W) in [0, 1] → logits of the next n_future frames (B, n_future, C, H, W).

    Without arguments, it is the paper's best network, with 7,585,296 parameters. Raises ValueError for
    arguments that do not fit together and, on the CPU, for frames outside [0, 1].
    """

    def __init__(
        self,
        channels=1,
        hidden_channels=(128, 64, 64),  # of each layer, bottom to top
        kernel_size=5,  # input-to-state
        state_kernel_size=None,  # state-to-state; None: the same
        dilation=1,  # of the state-to-state kernels above the first layer
        patch_size=4,
        peephole=True,
        head_channels=(),  # hidden layers of the head: the first 3×3, the others 1×1
        feedback=False,  # True: no second stack
        max_motion=0,  # of a patch, in pixels per frame; 0: no block matching or advection
        equivariant=False,
    ):
        super().__init__()
        if max_motion and not feedback:
            raise ValueError(f"max_motion is {max_motion}; without feedback, as in the paper, it has to be 0")
        self.channels, self.patch_size, self.max_motion = channels, patch_size, max_motion
        self.advect, self.matching_costs = advect, matching_costs  # support.fast replaces both, unless edited
        n_pixels, n_moves = channels * patch_size**2, (2 * max_motion + 1) ** 2
        self.motion = nn.Conv2d(n_moves, MOTION_CHANNELS, 1) if max_motion else None

        def stack(in_channels):
            layers, sizes = nn.ModuleList(), (kernel_size, state_kernel_size or kernel_size)
            for n in hidden_channels:
                layers.append(ConvLSTM(in_channels, n, *sizes, peephole, dilation if len(layers) else 1))
                in_channels = n
            return layers

        self.encoder = stack(n_pixels + (MOTION_CHANNELS if max_motion else 0))
        self.forecaster = None if feedback else stack(0)  # its first layer has no input
        head, n_in = [], sum(hidden_channels)
        for n in head_channels:
            size = 1 if head else 3
            head += nn.Conv2d(n_in, n, size, padding=size // 2), nn.GELU()
            n_in = n
        # logits; with motion, also a gain for each pixel of the moved frame, and weights of the moves
        self.outputs = [n_pixels, n_pixels, n_moves] if max_motion else [n_pixels]
        last = nn.Conv2d(n_in, sum(self.outputs), 1)
        with torch.no_grad():
            if max_motion:  # untrained, it nearly copies the last frame
                last.bias.zero_()
                last.bias[n_pixels : 2 * n_pixels] = 1.0
                last.bias[2 * n_pixels + n_moves // 2] = 8.0  # the zero move
            else:
                last.bias.fill_(-3.0)  # frames start nearly black
        self.head = nn.Sequential(*head, last)
        if equivariant:
            make_kernels_equivariant(self)  # does not know kernels that you add outside the head

    @property
    def output_layer(self):
        return self.head[-1]

    def forward(self, past, n_future, predict_from=None):
        """With predict_from, each input frame after that index is predicted, too, from the frames before it.

        Then logits are (B, T - 1 - predict_from + n_future, C, H, W).
        """
        self.check(past, n_future)
        H, W = past.shape[-2:]
        # whole patches: the last rows and columns are repeated, and cropped below
        past = F.pad(past, (0, -W % self.patch_size, 0, -H % self.patch_size, 0, 0), "replicate")
        # a black frame comes before the first
        encoded, states = self.encode(past, torch.zeros_like(past[:, :1]), [None] * len(self.encoder))
        if self.forecaster is not None:
            hidden_states, _ = unroll(self.forecaster, None, states, n_future)
            if predict_from is not None:  # only if you build my_model without feedback
                pairs = zip(encoded, hidden_states, strict=True)
                hidden_states = [torch.cat((x[:, predict_from:-1], y), 1) for x, y in pairs]
            return self.to_logits(hidden_states)[..., :H, :W]
        start = past.shape[1] - 1 if predict_from is None else predict_from
        logits = [self.to_logits([h[:, start:] for h in encoded], past[:, start:])]
        frame = past[:, -1:]
        for _ in range(n_future - 1):  # the first forecast frame is already there
            # gradients pass through this frame, but not through block matching
            previous, frame = frame, torch.sigmoid(logits[-1][:, -1:])
            hidden_states, states = self.encode(frame, previous, states)
            logits.append(self.to_logits(hidden_states, frame))
        return torch.cat(logits, 1)[..., :H, :W]

    def encode(self, frames, previous, states):
        """Run the encoder over frames (B, T, C, H, W); previous is the frame before them."""
        x = F.pixel_unshuffle(frames, self.patch_size)  # (B, T, C·P², H/P, W/P)
        if self.max_motion:
            before = torch.cat((previous, frames[:, :-1]), 1).flatten(0, 1)
            options = self.patch_size, self.max_motion, self.matching_costs
            move_probabilities = block_match(frames.flatten(0, 1), before, *options)
            x = torch.cat((x, self.motion(move_probabilities).unflatten(0, frames.shape[:2])), 2)
        return unroll(self.encoder, x, states, frames.shape[1])

    def to_logits(self, hidden_states, frames=None):
        """Logits of the next frame, for each of T frames. Hidden states of a layer: (B, T, Ch, H/P, W/P)."""
        B, T = hidden_states[0].shape[:2]
        # (T·B, sum of Ch, H/P, W/P): time first, as the fast kernels have it in memory
        images = torch.cat([h.transpose(0, 1).flatten(0, 1) for h in hidden_states], 1)
        parts = self.head(images).split(self.outputs, 1)
        logits = F.pixel_shuffle(parts[0], self.patch_size)
        if self.max_motion:
            gain = F.pixel_shuffle(parts[1], self.patch_size)
            weights = parts[2].permute(0, 2, 3, 1)
            weights = weights.to(frames.dtype, memory_format=torch.contiguous_format).softmax(-1)
            moved = self.advect(frames.transpose(0, 1).flatten(0, 1), weights, self.patch_size)
            logits = logits + gain * torch.logit(moved.clamp(0.002, 0.998))  # the logit: within ±6.2
        return logits.unflatten(0, (T, B)).transpose(0, 1)

    def check(self, past, n_future):
        if n_future < 1:
            raise ValueError(f"n_future is {n_future}; expected at least 1")
        if past.ndim != 5 or past.shape[2] != self.channels:
            raise ValueError(f"frames have shape {tuple(past.shape)}; expected (B, T, {self.channels}, H, W)")
        if past.device.type == "cpu" and past.numel():  # on a GPU, the CPU would have to wait for it
            low, high = past.aminmax()
            if not (low >= 0 and high <= 1):
                raise ValueError(f"frames have values from {low:.4g} to {high:.4g}; expected 0 to 1")
