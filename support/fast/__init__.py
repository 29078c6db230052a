"""Fast kernels: `attach` hands them to a model. Without this folder everything still runs, only slower.

At each start, a fast function that disagrees with the plain one, beyond rounding, is not used.
"""

import contextlib
import copy
import ctypes
import io

import torch

import my_model
from support.fast import layer, motion


@torch.inference_mode(False)
@torch.enable_grad()  # to compare gradients, wherever it is called
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
        model.matching_costs = motion.matching_costs_on_gpu
        used.append("compiled matching")
    layers = [module for module in model.modules() if isinstance(module, my_model.ConvLSTM)]
    if layers and all(map(agrees, layers)):
        for module in layers:
            module.fast = layer.fast_layer
        compiled = compiling and layer.gate_functions(device.type, dtype)[0] is not layer.gates_forward
        used.append("fast layer with compiled gates" if compiled else "fast layer")
        if on_cpu and not compiled:
            used.append("slower, as gates.c could not be built (it needs gcc on x86 Linux)")
    else:
        used.append("the edited ConvLSTM layer as it stands, which is slower")
    return ", ".join(used)


def keep_freed_memory():
    """Let glibc keep large freed buffers. Otherwise page faults take a fifth of a training step."""
    with contextlib.suppress(OSError, AttributeError):  # there is no glibc
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of mallopt(3); glibc before 2.35 takes at most 2**25
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**31 - 1)


def agrees(module):
    """Whether a ConvLSTM computes the same with the fast layer, forward and backward, in float64."""
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):  # an edited cell may raise
        torch.default_generator.manual_seed(0)
        plain = copy.deepcopy(module).to("cpu", torch.float64).requires_grad_()
        for p in (*plain.parameters(), *plain.cell.buffers()):
            torch.nn.init.uniform_(p, -1, 1).data /= p.shape[1:].numel() ** 0.5
        for part, name, value in [(m, *item) for m in plain.cell.modules() for item in vars(m).items()]:
            if isinstance(value, float):  # an edit may change it in training
                setattr(part, name, value / 3 + 0.1)
        kernel, state = plain.cell.input_to_state, torch.randn(2, 1, plain.cell.hidden_channels, 5, 5) * 20
        x = None if kernel is None else torch.randn(1, 6, kernel.shape[1], 5, 5)
        x, *state = (t if t is None else t.double().requires_grad_() for t in (x, *state))
        leaves = [t for t in (x, *state, *plain.parameters()) if t is not None]

        def stored():  # an edited cell may store something, for use elsewhere
            torch.save(vars(plain.eval().cell), content := io.BytesIO())
            return content.getvalue()

        before, stored_before = torch.get_rng_state(), stored()
        for training in (True, False):
            found = []
            for plain.train(training).fast in (layer.fast_layer, None):
                torch.set_rng_state(before)
                hidden_states, last = plain(x, state, 6)
                after = torch.get_rng_state()
                # dropout after the cell changes hidden states at random; dropout in the cell changes `after`
                outputs = (hidden_states, *last) if torch.equal(before, after) else last
                total = sum(output.sum() for output in outputs)
                gradients = torch.autograd.grad(total, leaves, materialize_grads=True) if training else ()
                found.append((after, *outputs, *gradients))
            if not all(torch.allclose(*pair) for pair in zip(*found, strict=True)):
                return False
        return stored() == stored_before
    return False
