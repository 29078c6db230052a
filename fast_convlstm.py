"""The ConvLSTM layer again, near what its convolutions cost. Read `my_model.py` first.

`my_model.ConvLSTM` says what a layer computes, one cell call a frame. This file computes the same in one
`autograd.Function` over all frames; `tests/test_my_model.py` holds the two equal, forward and backward.
What makes it fast:

1. On the CPU the gates are one pass over memory in each direction (`gates.c`, built at start-up if the machine
   has a C compiler), with a rational tanh: exp and tanh from the library cost several times the convolution.
2. The input-to-state convolution of all frames of a call is one call too: nothing in a layer feeds back to its
   input. (A network that is fed with its own frames makes a call of one frame for each.)
3. Memory lies as (T, B, H, W, C), so every frame is a channels-last image and only the first layer's input is
   transposed: the gates write h and c straight into the sequence, and backward turns the pre-activations into
   their gradient.
4. Backward keeps only x, z, h and c, computes the gates again (in bf16, from c as rounded), and collects the
   state-to-state weight gradient of a call's frames into one convolution. (`amx.c` computes weight gradients where
   there is AMX.)
5. Convolutions on the CPU need fewer multiplications where that pays (`winograd.py`, compiled too; none dilated), or
   find their weight laid out once a call; the state-to-state one adds to what the input left in z.

T frames, B batch, H height, W width, C hidden channels, N = B·H·W; z the pre-activations of i, f, o, g.
"""

import contextlib
import ctypes
import functools
import math
import sys

import torch
import torch.nn.functional as F

import native
import winograd

if sys.platform == "linux":
    # glibc hands large buffers back to the system at every free and faults them in again, page by page, at the
    # next use: a fifth of a training step. Keep them: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of mallopt(3)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):  # glibc before 2.35 takes no more than that
            libc.mallopt(-1, 2**31 - 1)


def gates_forward(z, peephole, c, c_before, h):
    """One time step, z (N, 4C). Renews c (N, C) in place; fills c_before and h (N, C), both in the dtype of z."""
    i, f, o, g = z.to(c.dtype).chunk(4, 1)
    c_before.copy_(c)
    c.copy_(torch.sigmoid(f + peephole[1] * c) * c + torch.sigmoid(i + peephole[0] * c) * torch.tanh(g))
    h.copy_(torch.sigmoid(o + peephole[2] * c) * torch.tanh(c))


def gates_backward(z, peephole, c, dh, dh_next, dc, sums):
    """Its gradient. dh comes from above, dh_next and dc from the next step. z is overwritten by its own gradient, dc by
    that of the step before.

    sums (threads, 7, C) collects the gradients of the four biases and the three peepholes.
    """
    i, f, o, g = z.to(dc.dtype).chunk(4, 1)
    c = c.to(dc.dtype)
    i, f, g = torch.sigmoid(i + peephole[0] * c), torch.sigmoid(f + peephole[1] * c), torch.tanh(g)
    c_next = f * c + i * g
    o, tanh_c = torch.sigmoid(o + peephole[2] * c_next), torch.tanh(c_next)
    dh = dh.to(dc.dtype) + dh_next.to(dc.dtype)
    do = dh * tanh_c * o * (1 - o)
    dc_next = dc + dh * o * (1 - tanh_c * tanh_c) + peephole[2] * do
    di, df, dg = dc_next * g * i * (1 - i), dc_next * c * f * (1 - f), dc_next * i * (1 - g * g)
    z.copy_(torch.cat((di, df, do, dg), 1))
    dc.copy_(dc_next * f + peephole[0] * di + peephole[1] * df)
    sums[0] += torch.stack((di, df, do, dg, di * c, df * c, do * c_next)).sum(1)


def one_step(forward, backward, dtype, scale):
    """What a pair of gate functions computes from numbers that are always the same; scale: that of the cell state."""
    N, C, generator = 6, 20, torch.Generator().manual_seed(0)
    draw = lambda n: 2 * torch.randn(N, n * C, generator=generator)
    z, dh, dh_next = (draw(n).to(dtype) for n in (4, 1, 1))
    c, dc, peephole = scale * draw(1), draw(1), draw(1)[:3]
    c_before, h, sums = torch.empty_like(dh), torch.empty_like(dh), c.new_zeros(torch.get_num_threads(), 7, C)
    forward(z, peephole, c, c_before, h)
    backward(z, peephole, c_before, dh, dh_next, dc, sums)
    return c, c_before, h, z, dc, sums.sum(0)


@functools.cache
def gate_functions(device_type, dtype):
    """(gates_forward, gates_backward), compiled for the CPU where that works, else as they stand above.

    As they stand above also where gates.c disagrees with them, as after an edit of one of the two.
    """
    plain = gates_forward, gates_backward
    supported = device_type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    library = native.build("gates.c", *(["-DBF16"] if dtype == torch.bfloat16 else [])) if supported else None
    if library is None:
        return plain

    def call(function, z, *tensors):
        N, C = z.shape[0], z.shape[1] // 4
        function(*native.arguments(N, C, torch.get_num_threads(), z, *tensors))

    built = tuple(functools.partial(call, f) for f in (library.gates_forward, library.gates_backward))
    steps = ([one_step(*functions, dtype, scale) for functions in (built, plain)] for scale in (1, 20))
    return built if all(native.agree(*pair, dtype) for pair in steps) else plain


class FastConvLSTM(torch.autograd.Function):
    """x (T, B, H, W, C_in) or None, h and c (B, H, W, C), weights → h of all frames (T, B, H, W, C), last h and c.

    Backward can run once only, as it overwrites z.
    """

    @staticmethod
    def forward(ctx, x, h, c, n_frames, input_weight, state_weight, bias, peephole, dilation):
        B, H, W, C = c.shape
        pixels = n_frames * B * H * W
        c = c.clone(memory_format=torch.contiguous_format)
        cells = h.new_empty(n_frames, B, H, W, C)  # before each step
        hiddens = h.new_empty(n_frames + 1, B, H, W, C)
        hiddens[0] = h
        # the first hidden state to convolve: an encoder begins with zeros. (On a GPU, a look at them would stall it; of
        # a lone frame they are convolved, so that there is something to take a weight gradient of)
        first = int(n_frames > 1 and h.device.type == "cpu" and not h.any())
        if x is None:
            z = h.new_empty(n_frames, B, H, W, 4 * C)
        else:
            z = convolution(input_weight, pixels, bias)(x.flatten(0, 1)).view(n_frames, B, H, W, 4 * C)
        gates, _ = gate_functions(z.device.type, z.dtype)
        state_to_state = convolution(state_weight, pixels, dilation=dilation)
        for t in range(n_frames):
            if x is None:
                z[t] = bias  # now, so that what adds to it finds it in the cache
            if t >= first:
                state_to_state(hiddens[t], z[t])
            gates(rows(z[t]), peephole, rows(c), rows(cells[t]), rows(hiddens[t + 1]))
        ctx.save_for_backward(x, input_weight, state_weight, peephole)
        ctx.sequences, ctx.first, ctx.dilation = (z, cells, hiddens), first, dilation
        return hiddens[1:], hiddens[-1], c

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh, dh_next, dc):
        x, input_weight, state_weight, peephole = ctx.saved_tensors
        z, cells, hiddens = ctx.sequences
        pixels = z[..., 0].numel()
        del ctx.sequences  # z is about to be overwritten
        _, gates = gate_functions(z.device.type, z.dtype)
        dc = dc.clone(memory_format=torch.contiguous_format)
        dh, dh_next = dh.contiguous(), dh_next.contiguous()
        sums = dc.new_zeros(torch.get_num_threads(), 7, dc.shape[-1])
        to_dh = convolution(turned(state_weight), pixels, dilation=ctx.dilation)
        for t in reversed(range(len(z))):
            gates(rows(z[t]), peephole, rows(cells[t]), rows(dh[t]), rows(dh_next), rows(dc), sums)
            if t or ctx.needs_input_grad[1]:
                dh_next = to_dh(z[t])
        del cells, dh, to_dh  # what follows needs room of its own
        dz = z.flatten(0, 1)
        convolved = z[ctx.first :].flatten(0, 1), hiddens[ctx.first : -1].flatten(0, 1)
        d_state = weight_gradient(*convolved, state_weight, ctx.dilation)
        dx = d_input = None
        if x is not None:
            d_input = weight_gradient(dz, x.flatten(0, 1), input_weight)
            dx = convolution(turned(input_weight), pixels)(dz).view(x.shape) if ctx.needs_input_grad[0] else None
        sums = sums.sum(0)
        return dx, dh_next, dc, None, d_input, d_state, sums[:4].flatten().to(z.dtype), sums[4:], None


def rows(x):
    """(B, H, W, C) as (N, C), without a copy."""
    return x.view(-1, x.shape[-1])


def convolution(weight, pixels, bias=None, dilation=1):
    """A function (N, H, W, C_in) → (N, H, W, C_out), "same" padding, channels last.

    Given a second argument, it adds to that instead, without the bias. pixels: N·H·W of all its calls.
    """
    k = weight.shape[-1]
    if winograd.serves(weight, pixels, dilation):
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        return functools.partial(winograd.convolve, winograd.to_points(weight), k, bias)
    weight = weight.contiguous(memory_format=torch.channels_last)
    packed = torch.backends.mkldnn.enabled and packs(weight.device.type, weight.dtype)
    return (packed_convolution if packed else plain_convolution)(weight, bias, dilation * (k // 2), dilation)


def plain_convolution(weight, bias, padding, dilation):
    def convolve(x, y=None):
        found = F.conv2d(as_images(x), weight, bias if y is None else None, padding=padding, dilation=dilation)
        found = found.permute(0, 2, 3, 1).contiguous()
        return found if y is None else y.add_(found)

    return convolve


def packed_convolution(weight, bias, padding, dilation):
    """The same by what torch.compile makes of it: oneDNN, told once how its weight lies, adds to y as it goes."""
    onednn, options, packed = torch.ops.mkldnn, ([padding] * 2, [1, 1], [dilation] * 2, 1), []

    def convolve(x, y=None):
        x = as_images(x)
        if not packed:
            packed.append(onednn._reorder_convolution_weight(weight, *options, x.shape))
        if y is None:
            found = onednn._convolution_pointwise(x, *packed, bias, *options, "none", [], "")
            return found.permute(0, 2, 3, 1).contiguous()
        onednn._convolution_pointwise_(as_images(y), x, *packed, None, *options, "add", 1.0, None, [], None)
        return y

    return convolve


@functools.cache
def packs(device_type, dtype):
    """Whether packed_convolution, whose calls torch does not document, works and agrees with its plain twin."""
    if device_type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    x, y, weight, bias = draw(2, 5, 4, 16), draw(2, 5, 4, 32), draw(32, 16, 3, 3) / 12, draw(32)
    results = []
    try:
        for kind in (packed_convolution, plain_convolution):
            convolve, added = kind(weight.contiguous(memory_format=torch.channels_last), bias, 2, 2), y.clone()
            convolve(x, added)
            results.append((convolve(x), added))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return native.agree(*results, dtype)


def as_images(x):
    """(N, H, W, C) → (N, C, H, W), without a copy."""
    return x.permute(0, 3, 1, 2)


def turned(weight):
    """The weight of the convolution that takes dy to dx: turned by 180°, input and output channels swapped."""
    n_out, n_in, k, _ = weight.shape
    # as a matrix first: torch transposes two axes several times as fast as four
    swapped = weight.permute(0, 2, 3, 1).reshape(n_out, -1).t().contiguous()
    swapped = swapped.view(k, k, n_in, n_out).flip(0, 1).permute(2, 3, 0, 1)
    return swapped.contiguous(memory_format=torch.channels_last)


def weight_gradient(dy, x, weight, dilation=1):
    """From x (N, H, W, C_in) and the gradient dy (N, H, W, C_out) of its convolution with weight."""
    k = weight.shape[-1]
    if winograd.serves(weight, x[..., 0].numel(), dilation):
        return winograd.weight_gradient(dy, x, k)
    amx = amx_serves(dy, x, k, dilation) and amx_library()
    return amx_weight_gradient(amx, dy, x, k, dilation) if amx else plain_weight_gradient(dy, x, weight, dilation)


def plain_weight_gradient(dy, x, weight, dilation):
    dy, x = as_images(dy), as_images(x)
    options = None, [1, 1], [dilation * (weight.shape[-1] // 2)] * 2, [dilation] * 2, False, [0, 0], 1
    return torch.ops.aten.convolution_backward(dy, x, weight, *options, (False, True, False))[1]


def amx_bands(x, k, dilation):
    """rows, steps and pairs, as amx.c means them: bands of about 256 pixels, each about as high."""
    H, W = x.shape[1:3]
    rows = math.ceil(H / math.ceil(H * W / 256))
    steps = math.ceil(rows * W / 32)
    return rows, steps, 16 * steps + dilation * (k // 2) * W


def amx_serves(dy, x, k, dilation):
    """Whether amx.c can, and pays: each thread copies all of x for its part of the output channels, a band of x with
    the rows that the kernel reaches above and below it."""
    n_in, n_out = x.shape[3], dy.shape[3]
    _, steps, pairs = amx_bands(x, k, dilation)
    fits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and n_in % 32 == n_out % 32 == x.shape[2] % 2 == 0
    return fits and n_out >= 64 * torch.get_num_threads() and pairs <= 32 * steps


def amx_weight_gradient(library, dy, x, k, dilation):
    B, H, W, n_in = x.shape
    n_out, threads = dy.shape[3], torch.get_num_threads()
    rows, steps, pairs = amx_bands(x, k, dilation)
    words = k * n_in * pairs + 512 * steps * math.ceil(n_out / 32 / threads)
    sizes = B, H, W, n_in, n_out, k, dilation, rows, steps, pairs, threads, words
    gradient = x.new_zeros(n_out, k, k, n_in, dtype=torch.float32)
    memory = torch.empty(threads, words, dtype=torch.int32)
    library.weight_gradient(*native.arguments(*sizes, x, dy, gradient, memory))
    return as_images(gradient).to(x.dtype)


@functools.cache
def amx_library():
    """amx.c, built; None where there is no AMX, or no gcc that knows it, and where it disagrees with its plain twin."""
    library = native.build("amx.c") if winograd.has_amx() else None
    if library is None or library.request() != 0:
        return None
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).bfloat16()
    x, dy, weight = draw(2, 19, 14, 64), draw(2, 19, 14, 96), draw(96, 64, 3, 3)
    expected = plain_weight_gradient(dy, x, weight, 2)
    found = amx_weight_gradient(library, dy, x, 3, 2)
    return library if native.agree([found], [expected], torch.bfloat16) else None
