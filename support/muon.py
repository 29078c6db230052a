"""Muon, the optimizer of the convolution kernels: https://kellerjordan.github.io/posts/muon/"""

import math

import torch


class Muon(torch.optim.Optimizer):
    """Momentum, whose update of a kernel has all singular values near 1. The decay is decoupled.

    A kernel counts as a matrix (output channels, everything else). In bf16, results equal torch.optim.Muon's
    bit for bit. `dtype`, that of training, is for CPUs without a bf16 unit, where bf16 is very slow.
    """

    def __init__(self, kernels, dtype, learning_rate, weight_decay, momentum=0.95):
        super().__init__(kernels, {"lr": learning_rate, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rate, beta = group["lr"], group["momentum"]
            for kernel in group["params"]:
                gradient = kernel.grad.flatten(1)
                state = self.state[kernel]
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                momentum = state["momentum"]
                momentum.lerp_(gradient, 1 - beta)
                update = orthogonal(gradient.lerp(momentum, beta).to(self.dtype))
                n_out, n_in = update.shape
                scale = rate * math.sqrt(max(1, n_out / n_in))
                kernel.mul_(1 - rate * group["weight_decay"])
                kernel.sub_(update.reshape(kernel.shape), alpha=scale)


def orthogonal(x):
    """A matrix with all singular values near 1, by five Newton–Schulz steps s → a·s + b·s³ + c·s⁵."""
    if len(x) > x.shape[1]:
        return orthogonal(x.T).T  # so that x @ x.T is the smaller product
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
