"""Fast kernels: `attach` hands them to a model. Without this folder everything still runs, only slower.

At each start, a fast function that disagrees with the plain one, beyond rounding, is not used.
"""

import contextlib
import ctypes

import torch

import my_model
from support.fast import layer, motion


def attach(model, device, dtype):
    """Give an EncoderForecaster the fast functions that work here → what is in use, in words."""
    if not isinstance(model, my_model.EncoderForecaster) or device.type not in ("cpu", "cuda"):
        return "plain PyTorch"  # so on MPS, where channels-last convolutions are slow
    used, on_cpu, moves = [], device.type == "cpu", (model.patch_size, model.max_motion)
    compiling = on_cpu or model.training  # evaluation on a GPU is too short to compile for
    if on_cpu:
        keep_freed_memory()
        if model.max_motion and motion.is_supported(*moves):
            model.advect, model.matching_costs = motion.advect, motion.matching_costs
            used.append("compiled motion")
    elif compiling and model.max_motion and motion.costs_on_gpu(*moves) is not my_model.matching_costs:
        model.matching_costs = motion.matching_costs
        used.append("compiled matching")
    if agrees():
        for module in model.modules():
            if isinstance(module, my_model.ConvLSTM):
                module.fast = layer.fast_layer
        compiled = compiling and layer.gate_functions(device.type, dtype)[0] is not layer.gates_forward
        used.append("fast layer with compiled gates" if compiled else "fast layer")
        if on_cpu and not compiled:
            used.append("slower, as gates.c could not be built (it needs gcc on x86 Linux)")
    else:
        used.append("the edited ConvLSTMCell as it stands, which is slower")
    return ", ".join(used)


def keep_freed_memory():
    """Let glibc keep large freed buffers. Otherwise page faults take a fifth of a training step."""
    with contextlib.suppress(OSError, AttributeError):  # there is no glibc
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of mallopt(3); glibc before 2.35 takes at most 2**25
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**31 - 1)


def agrees():
    """Whether the fast layer computes what ConvLSTM and its cell say, forward and backward, in float64."""
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):  # an edited cell may raise
        torch.default_generator.manual_seed(0)
        for in_channels, peephole, dilation in ((4, True, 1), (4, False, 2), (0, True, 1)):
            x, state = torch.randn(1, 3, 4, 5, 5).double(), torch.randn(2, 1, 4, 5, 5).double().mul(20)
            x.requires_grad_(), state.requires_grad_()
            plain = my_model.ConvLSTM(in_channels, 4, 3, 3, peephole, dilation).double()
            plain.eval().cell.train()  # dropout after the cell is not what is compared
            for parameter in plain.parameters():
                torch.nn.init.uniform_(parameter, -1, 1)
            leaves = [*plain.parameters(), state, *([x] if in_channels else [])]
            found = []
            for plain.fast in (layer.fast_layer, None):
                hidden_states, (_, c) = plain(x if in_channels else None, state.unbind(), 3)
                total = hidden_states.sum() + c.sum()
                gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
                found.append((hidden_states, c, *gradients))
            if not all(torch.allclose(*pair) for pair in zip(*found, strict=True)):
                return False
        return True
    return False
