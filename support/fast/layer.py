"""`my_model.ConvLSTM` again, at nearly the cost of its convolutions. Read `my_model.py` first.

One `autograd.Function` covers all frames of a call. What makes it fast:

1. The gates are one pass over memory in each direction (`gates.c`), with a rational tanh. The library's exp
   and tanh cost several times the convolution.
2. The input-to-state convolution of all frames is one call (not by blocks, where a frame fits the cache).
3. Memory lies as (T, B, H, W, C), so every frame is a channels-last image. The gates write h and c straight
   into the sequence, and backward turns the pre-activations into their gradient.
4. Only x, z, h and c are kept for backward, which computes the gates again.
5. Equivariant kernels need a quarter of the multiplications (`symmetric.py`). Others use Winograd's method
   where that pays (`winograd.py`), else torch.

T frames, B batch, H height, W width, C hidden channels; z the pre-activations of i, f, o, g.
"""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F

from support.fast import build, symmetric, winograd


def fast_layer(cell, x, state, n_frames):
    """The loop of `my_model.ConvLSTM`: x (B, T, C, H, W) or None, state → hidden states, last state."""
    device = state[0].device.type
    B, _, H, W = state[0].shape
    fits = all(s.shape == (B, cell.hidden_channels, H, W) for s in state)
    if not fits or (x is not None and x.shape != (B, n_frames, cell.input_to_state.shape[1], H, W)):
        sizes = [tuple(t.shape) for t in (x, *state) if t is not None]
        raise ValueError(f"input and state do not fit the kernels or each other: {sizes}")
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else state[0].dtype  # of all but c and its peepholes
    c_dtype = torch.promote_types(dtype, torch.float32)
    weights, bias = (None if x is None else cell.input_to_state, cell.state_to_state), cell.bias
    kernels = [w if w is None else symmetric.find(w, dtype, 4) for w in weights]
    x = None if x is None else x.permute(1, 0, 3, 4, 2).to(dtype).contiguous()  # (T, B, H, W, C)
    if kernels[1] and kernels[1].order is None and (x is None or kernels[0]):
        make, bias = functools.partial(symmetric.Symmetric, cell.dilation, *kernels), bias.float()
        weights = [kernel and kernel.blocks for kernel in kernels]
        if x is not None and kernels[0].order is not None:
            x = x.index_select(-1, kernels[0].order)
    else:
        make, bias = functools.partial(Plain, cell.dilation), bias.to(dtype)
        weights = [w if w is None else w.to(dtype) for w in weights]
    peephole = state[0].new_zeros(3, cell.hidden_channels) if cell.peephole is None else cell.peephole
    h, c = (s.permute(0, 2, 3, 1) for s in state)
    gates = gates_forward, gates_backward
    if device == "cpu" or torch.is_grad_enabled():  # evaluation on a GPU is too short to compile for
        gates = gate_functions(device, dtype)
    with torch.autocast(device, enabled=False):
        options = n_frames, gates, make, *weights, bias, peephole.to(c_dtype)
        hs, h, c = FastConvLSTM.apply(x, h.to(dtype), c.to(c_dtype), *options)
    return hs.permute(1, 0, 4, 2, 3), (h.permute(0, 3, 1, 2), c.permute(0, 3, 1, 2))


def gates_forward(z, peephole, c, c_before, h):
    """One time step. z (…, 4C); c (…, C) is updated in place; c_before and h (…, C) are filled."""
    c_before.copy_(c)  # the first line, or torch.compile would copy the new c: pytorch issue 198131
    i, f, o, g = z.to(c.dtype).chunk(4, -1)
    c.copy_(torch.sigmoid(f + peephole[1] * c) * c + torch.sigmoid(i + peephole[0] * c) * torch.tanh(g))
    h.copy_(torch.sigmoid(o + peephole[2] * c) * torch.tanh(c))


def gates_backward(z, peephole, c, dh, dh_next, dc, sums):
    """The gradient of gates_forward. dh comes from above, dh_next and dc from the next step.

    Overwrites z with its gradient, and dc with that of the step before. sums (threads, 7, C) collects the
    gradients of the four biases and the three peepholes.
    """
    i, f, o, g = z.to(dc.dtype).chunk(4, -1)
    c = c.to(dc.dtype)
    i, f, g = torch.sigmoid(i + peephole[0] * c), torch.sigmoid(f + peephole[1] * c), torch.tanh(g)
    c_next = f * c + i * g
    o, tanh_c = torch.sigmoid(o + peephole[2] * c_next), torch.tanh(c_next)
    dh = dh.to(dc.dtype) + dh_next.to(dc.dtype)
    do = dh * tanh_c * o * (1 - o)
    dc_next = dc + dh * o * (1 - tanh_c * tanh_c) + peephole[2] * do
    di, df, dg = dc_next * g * i * (1 - i), dc_next * c * f * (1 - f), dc_next * i * (1 - g * g)
    z.copy_(torch.cat((di, df, do, dg), -1))
    dc.copy_(dc_next * f + peephole[0] * di + peephole[1] * df)
    sums[0] += torch.stack((di, df, do, dg, di * c, df * c, do * c_next)).flatten(1, -2).sum(1)


def one_step(forward, backward, dtype, scale, device="cpu"):
    """What a pair of gate functions computes from fixed numbers; scale: that of the cell state."""
    # on a GPU the sizes of main.py's defaults, for which torch.compile then need not compile again
    *shape, C = (6, 20) if device == "cpu" else (8, 16, 16, 96)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: 2 * torch.randn(*shape, n * C, generator=generator).to(device)
    z, dh, dh_next = (draw(n).to(dtype) for n in (4, 1, 1))
    c, dc, peephole = scale * draw(1), draw(1), draw(1).flatten(0, -2)[:3]
    c_before, h, sums = torch.empty_like(dh), torch.empty_like(dh), c.new_zeros(torch.get_num_threads(), 7, C)
    forward(z, peephole, c, c_before, h)
    backward(z, peephole, c_before, dh, dh_next, dc, sums)
    return c, c_before, h, z, dc, sums.sum(0)


@functools.cache
@torch.no_grad()
def gate_functions(device_type, dtype):
    """(gates_forward, gates_backward): compiled, where that works and agrees with those above."""
    plain = gates_forward, gates_backward
    with contextlib.suppress(Exception):  # there is no compiler, or no Triton; an edit may raise anything
        compiled = build.by_torch(plain) if device_type == "cuda" else by_c(device_type, dtype)
        results = lambda pair, scale: one_step(*pair, dtype, scale, device_type)
        if all(build.agree(results(compiled, k), results(plain, k), dtype) for k in (1, 20)):
            return compiled
    return plain


def by_c(device_type, dtype):
    """The two functions of gates.c. KeyError: it is not for this device or dtype."""
    flags = {("cpu", torch.float32): [], ("cpu", torch.bfloat16): ["-DBF16"]}[device_type, dtype]
    library = build.build("gates.c", *flags)

    def call(function, z, *tensors):
        N, C = z[..., 0].numel(), z.shape[-1] // 4
        function(*build.arguments(N, C, torch.get_num_threads(), z, *tensors))

    return tuple(functools.partial(call, f) for f in (library.gates_forward, library.gates_backward))


class FastConvLSTM(torch.autograd.Function):
    """x (T, B, H, W, C_in) or None, h and c (B, H, W, C), weights → all h (T, B, H, W, C), last h and c.

    make: weights → the two convolutions, a Plain or a Symmetric. Backward runs only once, as it overwrites z.
    """

    @staticmethod
    def forward(ctx, x, h, c, n_frames, gates, make, input_weight, state_weight, bias, peephole):
        B, H, W, C = c.shape
        c = c.clone(memory_format=torch.contiguous_format)
        cells = h.new_empty(n_frames, B, H, W, C)  # before each step
        hiddens = h.new_empty(n_frames + 1, B, H, W, C)
        hiddens[0] = h
        # Skip the convolution of the first hidden state if it is zeros, as an encoder's is. Only on a CPU: on
        # a GPU this check would wait for all queued work. Not for a single frame: its weight gradient would
        # have no input.
        first = int(n_frames > 1 and h.device.type == "cpu" and not h.any())
        convolutions = make(input_weight, state_weight)
        z = convolutions.start(x, bias, (n_frames, B, H, W, 4 * C))
        peephole = peephole.detach()  # torch.compile compiles anew for what needs a gradient
        for t in range(n_frames):
            convolutions.step(t, hiddens[t] if t >= first else None, z[t])
            gates[0](z[t], peephole, c, cells[t], hiddens[t + 1])
        ctx.save_for_backward(x, input_weight, state_weight, peephole)
        ctx.sequences, ctx.first, ctx.make, ctx.gates = (z, cells, hiddens), first, make, gates
        return hiddens[1:], hiddens[-1], c

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.autocast("cpu", enabled=False)  # a caller may have enabled it
    def backward(ctx, dh, dh_next, dc):
        if ctx.sequences is None:
            advice = "for a second backward pass, use --no_fast"
            raise RuntimeError(f"the fast ConvLSTM layer can be differentiated only once; {advice}")
        x, input_weight, state_weight, peephole = ctx.saved_tensors
        z, cells, hiddens = ctx.sequences
        ctx.sequences = None  # z is about to be overwritten
        dc = dc.clone(memory_format=torch.contiguous_format)
        dh, dh_next = dh.contiguous(), dh_next.contiguous()
        sums = dc.new_zeros(torch.get_num_threads(), 7, dc.shape[-1])
        convolutions = ctx.make(input_weight, state_weight)
        convolutions.start_backward(x, z, hiddens, ctx.first, ctx.needs_input_grad[0])
        for t in reversed(range(len(z))):
            ctx.gates[1](z[t], peephole, cells[t], dh[t], dh_next, dc, sums)
            dh_next = convolutions.step_backward(t, t > 0 or ctx.needs_input_grad[1])
        del cells, dh  # what follows needs room of its own
        dx, d_input, d_state = convolutions.gradients()
        sums = sums.sum(0)
        return dx, dh_next, dc, None, None, None, d_input, d_state, sums[:4].flatten(), sums[4:]


class Plain:
    """The two convolutions of a layer, by torch or Winograd's method. The other way: `symmetric.Symmetric`.

    Forward: start, then step for each frame. Backward: start_backward, step_backward, and last gradients.
    """

    def __init__(self, dilation, input_weight, state_weight):
        self.weights, self.dilation = (input_weight, state_weight), dilation

    def start(self, x, bias, shape):
        """Memory for the pre-activations of all frames (T, B, H, W, 4C)."""
        pixels = math.prod(shape[:-1])
        self.of_state = convolution(self.weights[1], pixels, dilation=self.dilation)
        if x is None:
            return bias.expand(shape).contiguous()
        return convolution(self.weights[0], pixels, bias)(x.flatten(0, 1)).view(shape)

    def step(self, t, h, z):
        """Complete the pre-activations z of frame t. h: the hidden state before it; None: zeros."""
        if h is not None:
            self.of_state(h, z)

    def start_backward(self, x, z, hiddens, first, needs_dx):
        self.sequences, self.needs_dx = (x, z, hiddens, first), needs_dx
        self.to_state = convolution(flipped(self.weights[1]), z[..., 0].numel(), dilation=self.dilation)

    def step_backward(self, t, needs_dh):
        """z[t] now is its gradient → that of the hidden state before it."""
        return self.to_state(self.sequences[1][t]) if needs_dh else None

    def gradients(self):
        """Of x, the input weight and the state weight."""
        x, dz, hiddens, first = self.sequences
        del self.to_state  # what follows needs room of its own
        pair = dz[first:].flatten(0, 1), hiddens[first:-1].flatten(0, 1)
        d_state, dz, dx = weight_gradient(*pair, self.weights[1], self.dilation), dz.flatten(0, 1), None
        if x is None:
            return None, None, d_state
        if self.needs_dx:
            dx = convolution(flipped(self.weights[0]), dz[..., 0].numel())(dz).view(x.shape)
        return dx, weight_gradient(dz, x.flatten(0, 1), self.weights[0]), d_state


def convolution(weight, pixels, bias=None, dilation=1):
    """A function (N, H, W, C_in) → (N, H, W, C_out), "same" padding, channels last.

    With a second argument, it adds to that instead, without the bias. pixels: N·H·W of all its calls.
    """
    k = weight.shape[-1]
    if winograd.is_supported(weight, pixels):
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        return functools.partial(winograd.convolve, winograd.to_points(weight), k, dilation, bias)
    weight = weight.contiguous(memory_format=torch.channels_last)

    def convolve(x, y=None):
        options = {"padding": dilation * (k // 2), "dilation": dilation}
        z = F.conv2d(x.permute(0, 3, 1, 2), weight, bias if y is None else None, **options)
        z = z.permute(0, 2, 3, 1).contiguous()
        return z if y is None else y.add_(z)

    return convolve


def flipped(weight):
    """The weight of the convolution from dy to dx: rotated by 180°, its input and output channels swapped."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def weight_gradient(dy, x, weight, dilation=1):
    """From x (N, H, W, C_in) and the gradient dy (N, H, W, C_out) of its convolution with weight."""
    k = weight.shape[-1]
    if winograd.is_supported(weight, x[..., 0].numel()):
        return winograd.weight_gradient(dy, x, k, dilation)
    options = {"padding": dilation * (k // 2), "dilation": dilation}
    x, dy = (t.permute(0, 3, 1, 2) for t in (x, dy))
    return torch.nn.grad.conv2d_weight(x, weight.shape, dy, **options)
