"""3×3 and 5×5 convolutions on the CPU with 4 and 6 times fewer multiplications: Winograd's method.

Polynomials u and v with TILE and k coefficients have a product with SIDE = TILE + k - 1 coefficients. Its
values at SIDE points determine it: uv = E⁻¹ (E u ∘ E v), where E evaluates. (One point is ∞: the highest
coefficient.) It is linear in u. The transpose of this map convolves SIDE inputs x with a kernel v to TILE
outputs: y = Eᵀ (E v ∘ E⁻ᵀ x). The kernel's gradient is dv = Eᵀ (E dy ∘ E⁻ᵀ x). In two dimensions each map is
applied along both. Over channels, every ∘ is a matrix product. These are most of the work.

`winograd.c` transforms images, one tile of TILE×TILE outputs at a time. This file transforms kernels.
N images, H height, W width, C channels, k kernel size; P = SIDE² points.
"""

import functools
import math

import torch

from support.fast import build

TILE, WIDTH, BLOCK = 4, 32, 64  # outputs a side of a tile; output channels, and tiles, at a time
GAP = 16  # numbers between points in memory, so that they do not compete for the same cache lines
POINTS = 0, 1, -1, 2, -2, 1 / 2, -1 / 2  # and ∞; near 1, so that rounding errors stay small

# Pixels from which it is faster than torch. The kernel is transformed once, for however many pixels.
# All is computed in fp32. With 5×5 kernels that beats torch's bf16, too, but not on a CPU with AMX.
PAYS_FROM = {(torch.float32, 3): 1024, (torch.float32, 5): 1024, (torch.bfloat16, 5): 2048}


@functools.cache
def library(k):
    sizes = {"KERNEL": k, "TILE": TILE, "WIDTH": WIDTH, "BLOCK": BLOCK, "GAP": GAP}
    return build.build("winograd.c", *(f"-D{name}={n}" for name, n in sizes.items()))


def is_supported(weight, pixels):
    """Whether to use it for a convolution with weight (C_out, C_in, k, k) of so many pixels, N·H·W."""
    n_out, n_in, k, _ = weight.shape
    amx = weight.dtype == torch.bfloat16 and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
    pays = pixels >= PAYS_FROM.get((weight.dtype, k), math.inf) and not amx
    fits = weight.device.type == "cpu" and n_in % 16 == 0 and n_out % WIDTH == 0
    return pays and fits and library(k) is not None


@functools.cache
def maps(k):
    """Matrices that map inputs (SIDE, SIDE), outputs (SIDE, TILE) and 2-D kernels (P, k²) to points."""
    points = torch.tensor(POINTS[: TILE + k - 2], dtype=torch.float64)
    # the last row is the point at infinity
    evaluate = lambda n: torch.cat((points[:, None] ** torch.arange(n), torch.eye(n).double()[-1:]))
    kernel = evaluate(k)
    found = torch.linalg.inv(evaluate(TILE + k - 1)).T, evaluate(TILE), torch.kron(kernel, kernel)
    return [m.float().contiguous() for m in found]


def to_points(weight):
    """(C_out, C_in, k, k) → (C_out / WIDTH, P, C_in, WIDTH), the layout of winograd.c."""
    n_in, k = weight.shape[1:3]
    parts = weight.float().flatten(2).unflatten(0, (-1, WIDTH)).permute(0, 3, 2, 1)
    return (maps(k)[2] @ parts.flatten(2)).unflatten(2, (n_in, WIDTH))


def convolve(points, k, dilation, bias, x, y=None):
    """x (N, H, W, C_in) → (N, H, W, C_out), "same" padding, added to y if given. points: the kernel's."""
    n_in, n_out = x.shape[3], len(points) * WIDTH
    threads, (of_input, of_output, _) = torch.get_num_threads(), maps(k)
    found = x.new_empty(*x.shape[:3], n_out, dtype=torch.float32) if y is None else y.float()
    memory = points.new_empty(threads, points.shape[1], BLOCK * (n_in + WIDTH) + 2 * GAP)
    tensors = of_input, of_output.T.contiguous(), x.float(), points, bias.float(), found, memory
    library(k).convolve(*build.arguments(*x.shape, dilation, n_out, threads, y is not None, *tensors))
    return found.to(x.dtype) if y is None else y.copy_(found)


def weight_gradient(dy, x, k, dilation):
    """dy (N, H, W, C_out), x (N, H, W, C_in) → (C_out, C_in, k, k)."""
    n_in, n_out = x.shape[3], dy.shape[3]
    of_input, of_output, of_kernel = maps(k)
    points = of_input.new_empty(n_out // WIDTH, len(of_kernel), n_in, WIDTH)
    memory = points.new_empty(len(of_kernel), BLOCK * (n_in + n_out) + (1 + n_out // WIDTH) * GAP)
    tensors = of_input, of_output, x.float(), dy.float(), points, memory
    sizes = *x.shape, dilation, n_out, torch.get_num_threads()
    library(k).kernel_gradient(*build.arguments(*sizes, *tensors))
    parts = (of_kernel.T @ points.flatten(2)).unflatten(2, (n_in, WIDTH))
    return parts.permute(0, 3, 2, 1).reshape(n_out, n_in, k, k).to(x.dtype)
