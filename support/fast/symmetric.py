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

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from support.fast import build

LANES = 8  # channels that symmetric.c computes at once
IMAGES = 8  # of 16×16 pixels; their features stay in the cache
WASTE = 1e-4  # of a kernel's squares that may lie outside the blocks: rounding in bf16 makes kernels drift


@functools.cache
def library(dtype):
    return build.build("symmetric.c", *(["-DBF16"] if dtype == torch.bfloat16 else []))


@functools.cache
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


class ToBlocks(torch.autograd.Function):
    """kernel (G·4·P, 4·Q, 3, 3) → blocks (4, 9·Q, G·P); order: of the input channels, member by member."""

    @staticmethod
    def forward(ctx, kernel, order, groups):
        ctx.kernel, ctx.order, ctx.groups = kernel, order, groups
        n_out, n_in = kernel.shape[:2]
        parts = kernel[:, order].reshape(groups, 4, n_out // groups // 4, 4, n_in // 4, 9)
        parts = parts.permute(1, 3, 5, 0, 2, 4).flatten(0, 2).flatten(1)  # (144, G·P·Q)
        blocks = (block_map() @ parts).view(4, 9, n_out // 4, n_in // 4)
        return blocks.transpose(2, 3).reshape(4, 9 * n_in // 4, n_out // 4)

    @staticmethod
    def backward(ctx, d_blocks):
        cache.pop(ctx.kernel, None)  # it would keep the graph, and so the model
        n_out, n_in = ctx.kernel.shape[:2]
        parts = d_blocks.view(4, 9, n_in // 4, n_out // 4).transpose(2, 3).reshape(36, -1)
        parts = (block_map().T @ parts).view(4, 4, 9, ctx.groups, n_out // ctx.groups // 4, n_in // 4)
        d_kernel = d_blocks.new_empty(n_out, n_in, 9)
        d_kernel[:, ctx.order] = parts.permute(3, 0, 4, 1, 5, 2).reshape(n_out, n_in, 9)
        return d_kernel.view(ctx.kernel.shape), None, None


class Kernel:
    """An equivariant kernel as blocks. Raises ValueError for one that symmetric.c cannot convolve."""

    def __init__(self, kernel, dtype):
        (out_x, in_x), (out_y, in_y) = kernel.flips
        n_out, n_in = kernel.shape[:2]
        outputs, order = orbits(out_x, out_y), orbits(in_x, in_y)
        self.groups = 4 if torch.equal(outputs, member_by_member(n_out, 4)) else 1
        if not torch.equal(outputs, member_by_member(n_out, self.groups)):
            raise ValueError("its outputs are in another order")
        if n_in % (4 * LANES) or n_out % (4 * LANES * self.groups):
            raise ValueError("it has too few channels")
        starts = order[::LANES]
        in_runs = torch.equal(order, (starts[:, None] + torch.arange(LANES)).flatten())
        self.order = None if in_runs else order  # the input has to be put into this order
        self.at = (starts if in_runs else torch.arange(0, n_in, LANES)).int()
        self.blocks = ToBlocks.apply(kernel, order, self.groups)
        energy = kernel.detach().square().sum()
        if energy - self.blocks.detach().square().sum() > WASTE * energy:
            raise ValueError("it is not equivariant")
        self.matrices = self.blocks.detach().to(dtype)

    def multiply(self, x, dilation, z, add=False):
        """The convolution of x (N, H, W, C) as parities: written to z (N, H, W, 4·G·P), or added to it."""
        for images, result in zip(x.split(IMAGES), z.split(IMAGES), strict=True):
            features, product = self.features(images, dilation), by_parity(result)
            if add:
                product.baddbmm_(features, self.matrices)
            else:
                torch.bmm(features, self.matrices, out=product)

    def features(self, x, dilation):
        """x (N, H, W, C) → (4, N·H·W, 9·Q)."""
        N, H, W, C = x.shape
        features = x.new_empty(4, N * H * W, 9 * C // 4)
        call("features", N, H, W, C // 4, dilation, x, self.at, scratch(H, W, C, dilation), features)
        return features

    def input_gradient(self, dz, dilation):
        """The gradient of multiply for x, from that for z as parities."""
        H, W, Q = *dz.shape[1:3], self.matrices.shape[1] // 9
        dx = dz.new_empty(*dz.shape[:3], 4 * Q)
        for part, result in zip(dz.split(IMAGES), dx.split(IMAGES), strict=True):
            d_features = torch.bmm(by_parity(part), self.matrices.transpose(1, 2))
            memory = scratch(H, W, 4 * Q, dilation)
            call("features_backward", len(part), H, W, Q, dilation, d_features, self.at, memory, result)
        return dx

    def block_gradient(self, dz, x, dilation):
        """The gradient of multiply for the blocks, in fp32."""
        total = torch.zeros(self.matrices.shape)
        for part, images in zip(dz.split(IMAGES), x.split(IMAGES), strict=True):
            total += torch.bmm(self.features(images, dilation).transpose(1, 2), by_parity(part))
        return total


def scratch(H, W, C, dilation):
    """Zeros, with room for an image in a border, for each thread."""
    return torch.zeros(torch.get_num_threads(), H + 2 * dilation, W + 2 * dilation, C)


def by_parity(z):
    """(N, H, W, 4·n) → (4, N·H·W, n), a view."""
    return z.view(z[..., 0].numel(), 4, -1).transpose(0, 1)


def member_by_member(n, groups):
    """The order of n channels (groups, 4 members, n / 4 / groups) that has all first members first."""
    return torch.arange(n - n % (4 * groups)).view(groups, 4, -1).transpose(0, 1).flatten()


def orbits(x, y):
    """From the channels that replace each in a flip in x, and in y: the order member by member."""
    members = torch.stack((torch.arange(len(x)), x, y, x[y]))
    order = members[:, members[0] == members.min(0).values].flatten()
    if not torch.equal(order.sort().values, members[0]):
        raise ValueError("some channels have no orbit of four")
    return order


cache = WeakTensorKeyDictionary()  # parameter → (what it depends on, its Kernel or None)


def find(kernel, dtype):
    """The Kernel of a parameter, made once per training step; None where it has to be convolved as it is."""
    fits = dtype in (torch.float32, torch.bfloat16) and kernel.dtype == torch.float32
    if not (fits and hasattr(kernel, "flips") and kernel.shape[-1] == 3 and kernel.device.type == "cpu"):
        return None
    if library(dtype) is None:
        return None
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    state = kernel.data_ptr(), kernel._version, dtype, modes
    if cache.get(kernel, (None,))[0] != state:
        try:
            with torch.autocast("cpu", enabled=False):
                cache[kernel] = state, Kernel(kernel, dtype)
        except ValueError:
            cache[kernel] = state, None
    return cache[kernel][1]


class Symmetric:
    """The two convolutions of a layer, by blocks. Used as `layer.Plain` is."""

    def __init__(self, dilation, input_kernel, state_kernel, input_blocks, state_blocks, pixels):
        self.kernels, self.dilations = (input_kernel, state_kernel), (1, dilation)

    def of_inputs(self, x, bias, shape):
        if x is None:
            return torch.zeros(shape, dtype=self.kernels[1].matrices.dtype)
        z, kernel = x.new_empty(shape), self.kernels[0]
        x = x if kernel.order is None else x[..., kernel.order]
        kernel.multiply(x.flatten(0, 1), 1, z.flatten(0, 1))
        return z

    def add_state(self, h, z):
        self.kernels[1].multiply(h, self.dilations[1], z, add=True)

    def finish(self, z, bias):
        exchange(z, 4, bias)

    def begin_backward(self, dz):
        exchange(dz, 4)

    def state_gradient(self, dz):
        return self.kernels[1].input_gradient(dz, self.dilations[1])

    def input_gradient(self, dz):
        kernel = self.kernels[0]
        dx = kernel.input_gradient(dz, 1)
        if kernel.order is None:
            return dx
        unordered = torch.empty_like(dx)
        unordered[..., kernel.order] = dx
        return unordered

    def weight_gradient(self, k, dz, x):
        order = self.kernels[k].order
        return self.kernels[k].block_gradient(dz, x if order is None else x[..., order], self.dilations[k])


def exchange(z, groups, bias=None):
    """Parities (…, 4·G·P) become channels, in place, with the bias added; without a bias, back."""
    call("exchange", z[..., 0].numel(), groups, z.shape[-1] // (4 * groups), bias, z)


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
        kernel.multiply(x, 1, y)
        exchange(y, kernel.groups, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, dy):
        (x,), kernel = ctx.saved_tensors, ctx.kernel
        dy = dy.clone(memory_format=torch.contiguous_format)
        d_bias = dy.sum((0, 1, 2), dtype=torch.float32)
        exchange(dy, kernel.groups)
        return kernel.input_gradient(dy, 1), kernel.block_gradient(dy, x, 1), d_bias, None


def head_layer(module, images):
    """The forward of a Conv2d with an equivariant 3×3 kernel."""
    device = images.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
    kernel = find(module.weight, dtype)
    if kernel is None or kernel.order is not None:
        return torch.nn.Conv2d.forward(module, images)
    with torch.autocast(device, enabled=False):
        x = images.permute(0, 2, 3, 1).to(dtype).contiguous()
        return Convolution.apply(x, kernel.blocks, module.bias.float(), kernel).permute(0, 3, 1, 2)
