"""Muon, the optimizer of the convolution kernels: https://kellerjordan.github.io/posts/muon/"""

import math

import torch


class Muon(torch.optim.Muon):
    """torch's Muon on convolution kernels, each as a matrix (output channels, everything else).

    torch iterates (see `orthogonal`) in bf16, which is very slow on a CPU without a bf16 unit. Here it is in
    `dtype`, that of training. In bf16, results equal torch's bit for bit.
    """

    def __init__(self, kernels, dtype, learning_rate, weight_decay):
        self.kernels, self.dtype = kernels, dtype
        matrices = [torch.nn.Parameter(k.detach().view(len(k), -1)) for k in kernels]  # views, no copies
        super().__init__(matrices, learning_rate, weight_decay)
        self.state.update((matrix, {"momentum_buffer": torch.zeros_like(matrix)}) for matrix in matrices)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        rate, beta = group["lr"], group["momentum"]
        for matrix, kernel in zip(group["params"], self.kernels, strict=True):
            gradient, momentum = kernel.grad.flatten(1), self.state[matrix]["momentum_buffer"]
            momentum.lerp_(gradient, 1 - beta)
            update = self.orthogonal(gradient.lerp(momentum, beta).to(self.dtype), group)
            n_out, n_in = matrix.shape
            scale = rate * math.sqrt(max(1, n_out / n_in))
            matrix.mul_(1 - rate * group["weight_decay"]).sub_(update, alpha=scale)

    @staticmethod
    def orthogonal(x, group):
        """x with all singular values near 1, by five Newton–Schulz steps s → a·s + b·s³ + c·s⁵."""
        if len(x) > x.shape[1]:
            return Muon.orthogonal(x.T, group).T  # so that x @ x.T is the smaller product
        a, b, c = group["ns_coefficients"]
        x = x / x.norm().clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
