"""Equivariant 3×3 convolutions with a quarter of the multiplications, on the CPU. It is exact.

Flips in x and in y form a group of four. They permute the channels in orbits of four members.
1. The sums and differences of the members have a parity: a flip in x, or in y, keeps or changes their sign.
2. Three taps in a row have two even combinations, the middle and the sum of the outer two, and an odd one,
   their difference. So nine taps become nine features, each with a parity.
3. An equivariant convolution keeps parities. So it is four products of matrices, one for each parity, with
   (9 · n_in / 4, n_out / 4) numbers each, in place of one with (9 · n_in, n_out).

`symmetric.c` computes features, their gradient, and the change between channels and parities.
N images, H height, W width, C channels, Q = C/4 orbits; G groups of output channels, such as the four gates.
"""

import functools
import threading

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from support.fast import build

LANES = 8  # channels that symmetric.c computes at once
IMAGES = 8  # of 16×16 pixels; their features stay in the cache
WASTE = 1e-5  # of a kernel's squares that may lie outside the blocks: rounding in bf16 makes kernels drift


@functools.cache
def library(dtype):
    return build.build("symmetric.c", *(["-DBF16"] if dtype == torch.bfloat16 else []))


@functools.cache
@torch.inference_mode(False)  # training cannot use a tensor that was made in inference mode
def block_map():
    """(36, 144): from members of outputs and inputs, and 9 taps, to the 9 features of 4 parities."""
    half = 0.5**0.5
    pairs = torch.tensor([[half, half], [half, -half]], dtype=torch.float64)
    taps = torch.tensor([[0, 1, 0], [half, 0, half], [-half, 0, half]], dtype=torch.float64)
    members = torch.kron(pairs, pairs)
    every = torch.einsum("am,bn,ry,sx->abrsmnyx", members, members, taps, taps).flatten(4)
    parity = lambda r, s: (r == 2) << 1 | (s == 2)
    rows = [every[a, a ^ parity(r, s), r, s] for a in range(4) for r in range(3) for s in range(3)]
    return torch.stack(rows).float()


def to_blocks(kernel, order, groups):
    """kernel (G·4·P, 4·Q, 3, 3) → blocks (4, 9·Q, G·P); order: of the input channels, member by member."""
    n_out, n_in = kernel.shape[:2]
    parts = kernel.index_select(1, order).reshape(groups, 4, n_out // groups // 4, 4, n_in // 4, 9)
    parts = parts.permute(1, 3, 5, 0, 2, 4).flatten(0, 2).flatten(1)  # (144, G·P·Q)
    blocks = (block_map() @ parts).view(4, 9, n_out // 4, n_in // 4)
    return blocks.transpose(2, 3).reshape(4, 9 * n_in // 4, n_out // 4)


class Kernel:
    """An equivariant kernel as blocks. Raises ValueError for one that symmetric.c cannot convolve."""

    def __init__(self, kernel, dtype, groups):
        n_out, n_in = kernel.shape[:2]
        if n_in % (4 * LANES) or n_out % (4 * LANES * groups):
            raise ValueError("it has too few channels")
        (out_x, in_x), (out_y, in_y) = kernel.flips
        outputs, order = orbits(out_x, out_y), orbits(in_x, in_y)
        if not torch.equal(outputs, torch.arange(n_out).view(groups, 4, -1).transpose(0, 1).flatten()):
            raise ValueError("its outputs are in another order")
        self.groups = groups
        starts = order[::LANES]
        in_runs = torch.equal(order, (starts[:, None] + torch.arange(LANES)).flatten())
        self.order = None if in_runs else order  # the input has to be put into this order
        self.at = (starts if in_runs else torch.arange(0, n_in, LANES)).int()
        self.blocks = to_blocks(kernel, order, self.groups)
        energy = kernel.detach().square().sum()
        if energy - self.blocks.detach().square().sum() > WASTE * energy:
            raise ValueError("it is not equivariant")
        self.matrices = self.blocks.detach().to(dtype)

    def multiply(self, x, dilation, total=None):
        """The convolution of x (N, H, W, C) as parities (4, N·H·W, G·P), or this added to the total."""
        features = self.features(x, dilation)
        return features @ self.matrices if total is None else total.baddbmm_(features, self.matrices)

    def features(self, x, dilation):
        """x (N, H, W, C) → (4, N·H·W, 9·Q)."""
        N, H, W, C = x.shape
        features = x.new_empty(4, N * H * W, 9 * C // 4)
        call("features", N, H, W, C // 4, dilation, x, self.at, scratch(H, W, C, dilation), features)
        return features

    def input_gradient(self, dz, dilation, dx):
        """Write the gradient of multiply for x to dx (N, H, W, C). dz: that of the parities."""
        N, H, W, C = dx.shape
        d_features = dz @ self.matrices.transpose(1, 2)
        memory = scratch(H, W, C, dilation)
        call("features_backward", N, H, W, C // 4, dilation, d_features, self.at, memory, dx)

    def add_block_gradient(self, total, dz, x, dilation):
        """Add the gradient of multiply for the blocks to the total, in fp32."""
        total += self.features(x, dilation).transpose(1, 2) @ dz


def scratch(H, W, C, dilation):
    """Zeros, with room for an image in a border, for each thread."""
    size = torch.get_num_threads(), H + 2 * dilation, W + 2 * dilation, C
    return torch.zeros(size, dtype=torch.float32)


def orbits(x, y):
    """From the channels that replace each in a flip in x, and in y: the order member by member."""
    members = torch.stack((torch.arange(len(x)), x, y, x[y]))
    order = members[:, members[0] == members.min(0).values].flatten()
    if not torch.equal(order.sort().values, members[0]):
        raise ValueError("some channels have no orbit of four")
    return order


class Call(threading.local):
    """The kernels of the network's forward call that is running in this thread; None: no call is."""

    kernels = None


call_now = Call()
kept = WeakTensorKeyDictionary()  # parameter without gradients → (its content, modes, its Kernel or None)


def begin_call(*_):
    call_now.kernels = {}


def end_call(*_):
    call_now.kernels = None


def find(kernel, dtype, groups):
    """The Kernel of a parameter, made once per call of the network; None where it is convolved as it is."""
    fits = dtype in (torch.float32, torch.bfloat16) and kernel.dtype == torch.float32
    if not (fits and hasattr(kernel, "flips") and kernel.shape[-1] == 3 and kernel.device.type == "cpu"):
        return None
    if library(dtype) is None:
        return None
    key, kernels = (id(kernel), dtype), {} if call_now.kernels is None else call_now.kernels
    if key not in kernels:
        kernels[key] = make(kernel, dtype, groups)
    return kernels[key]


def make(kernel, dtype, groups):
    """A new Kernel, or None. Without gradients it is kept until the content of the parameter changes."""
    modes = dtype, torch.is_inference_mode_enabled()
    has_gradient = torch.is_grad_enabled() and kernel.requires_grad
    content, modes_then, found = (None, None, None) if has_gradient else kept.get(kernel, (None, None, None))
    if modes == modes_then and torch.equal(content, kernel):
        return found
    try:
        with torch.autocast("cpu", enabled=False):
            found = Kernel(kernel, dtype, groups)
    except ValueError:
        found = None
    if not has_gradient:
        kept[kernel] = kernel.detach().clone(), modes, found
    return found


class Symmetric:
    """The two convolutions of a layer, by blocks. Used as `layer.Plain` is; a frame stays in the cache."""

    def __init__(self, dilation, input_kernel, state_kernel, input_blocks, state_blocks):
        self.of_input, self.of_state, self.dilation = input_kernel, state_kernel, dilation

    def start(self, x, bias, shape):
        self.x, self.bias = x, bias
        return self.of_state.matrices.new_empty(shape)

    def step(self, t, h, z):
        for few in parts(z):
            total = None if self.x is None else self.of_input.multiply(self.x[t, few], 1)
            if h is not None:
                total = self.of_state.multiply(h[few], self.dilation, total)
            if total is None:
                z[few] = self.bias.to(z.dtype)
            else:
                to_members(total, 4, self.bias, z[few])

    def start_backward(self, x, z, hiddens, first, needs_dx):
        self.x, self.sequences = x, (z, hiddens, first)
        self.dx = torch.empty_like(x) if needs_dx else None
        self.d_state = torch.zeros_like(self.of_state.blocks)
        self.d_input = None if x is None else torch.zeros_like(self.of_input.blocks)

    def step_backward(self, t, needs_dh):
        z, hiddens, first = self.sequences
        dh = torch.empty_like(hiddens[t]) if needs_dh else None
        for few in parts(z[t]):
            dz = to_parities(z[t, few], 4)
            if t >= first:
                self.of_state.add_block_gradient(self.d_state, dz, hiddens[t, few], self.dilation)
            if self.x is not None:
                self.of_input.add_block_gradient(self.d_input, dz, self.x[t, few], 1)
            if self.dx is not None:
                self.of_input.input_gradient(dz, 1, self.dx[t, few])
            if needs_dh:
                self.of_state.input_gradient(dz, self.dilation, dh[few])
        return dh

    def gradients(self):
        return self.dx, self.d_input, self.d_state


def parts(images):
    """Slices of a few images."""
    return [slice(k, k + IMAGES) for k in range(0, len(images), IMAGES)]


def to_members(parities, groups, bias, z):
    """Write parities (4, N·H·W, G·P) as channels to z (N, H, W, 4·G·P), with the bias added."""
    call("exchange", parities.shape[1], groups, parities.shape[2] // groups, bias, parities, z)


def to_parities(z, groups):
    """The other way, without a bias."""
    parities = z.new_empty(4, z[..., 0].numel(), z.shape[-1] // 4)
    call("exchange", parities.shape[1], groups, parities.shape[2] // groups, None, parities, z)
    return parities


def call(name, *arguments):
    """Call a function of symmetric.c: first the sizes, then the tensors."""
    sizes = [value for value in arguments if isinstance(value, int)]
    tensors = arguments[len(sizes) :]
    function = getattr(library(tensors[-1].dtype), name)
    function(*build.arguments(*sizes, torch.get_num_threads(), *tensors))


class Convolution(torch.autograd.Function):
    """x (N, H, W, C) → (N, H, W, n_out), "same" padding, as the first layer of the head has it."""

    @staticmethod
    def forward(ctx, x, blocks, bias, kernel):
        ctx.save_for_backward(x)
        ctx.kernel = kernel
        y = x.new_empty(*x.shape[:3], len(bias))
        for few in parts(x):
            to_members(kernel.multiply(x[few], 1), kernel.groups, bias, y[few])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, dy):
        (x,), kernel = ctx.saved_tensors, ctx.kernel
        dy, dx, d_blocks = dy.contiguous(), torch.empty_like(x), torch.zeros_like(kernel.blocks)
        for few in parts(x):
            dz = to_parities(dy[few], kernel.groups)
            kernel.add_block_gradient(d_blocks, dz, x[few], 1)
            kernel.input_gradient(dz, 1, dx[few])
        return dx, d_blocks, dy.sum((0, 1, 2), dtype=torch.float32), None


def is_supported(module, dtype):
    """Whether it is a Conv2d of 3×3 with a bias, "same" padding and nothing else, as head_layer computes."""
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return False  # AMX multiplies so fast that here the features cost more than they save
    if type(module) is not torch.nn.Conv2d or module.bias is None or "forward" in vars(module):
        return False
    with torch.device("meta"):  # draws no random numbers
        return repr(module) == repr(torch.nn.Conv2d(module.in_channels, module.out_channels, 3, padding=1))


def head_layer(module, images):
    """The forward of a Conv2d with an equivariant 3×3 kernel."""
    device = images.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
    kernel = find(module.weight, dtype, 1)
    if kernel is None or kernel.order is not None or images.shape[1] != module.in_channels:
        return torch.nn.Conv2d.forward(module, images)
    with torch.autocast(device, enabled=False):
        x = images.permute(0, 2, 3, 1).to(dtype).contiguous()
        return Convolution.apply(x, kernel.blocks, module.bias.float(), kernel).permute(0, 3, 1, 2)
