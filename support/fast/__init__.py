"""Fast kernels: `attach` hands them to a model. Without this folder everything still runs, only slower.

They stand for the code that WRITTEN_FOR names. If that was edited, it runs as it stands. Compiled gates are
compared with plain ones at each start, all else in tests/test_fast.py.
"""

import functools

import my_model
from support import sources
from support.fast import layer, motion, symmetric

# file → definitions, and their fingerprint without comments and docstrings
WRITTEN_FOR = {
    "my_model.py": (("ConvLSTMCell", "ConvLSTM"), "048d259a4197879c"),
    "motion.py": (("advect", "matching_costs"), "02f5fe12b8351e9c"),
}


def is_original(name):
    """Whether the definitions in this file are those that the fast kernels were written for."""
    definitions, expected = WRITTEN_FOR[name]
    return sources.fingerprint(name, definitions) == expected


def attach(model, device, dtype):
    """Give an EncoderForecaster the fast functions that work here → what is in use, in words."""
    if not isinstance(model, my_model.EncoderForecaster) or device.type not in ("cpu", "cuda"):
        return "plain PyTorch"  # so on MPS, where channels-last convolutions are slow
    used, on_cpu, moves = [], device.type == "cpu", (model.patch_size, 2 * model.max_motion + 1)
    compiling = on_cpu or model.training  # evaluation on a GPU is too short to compile for
    if on_cpu and model.max_motion and is_original("motion.py") and motion.compiled(*moves) is not None:
        model.advect, model.matching_costs = motion.advect, motion.matching_costs
        used.append("compiled motion")
    layers = [module for module in model.modules() if isinstance(module, my_model.ConvLSTM)]
    if not is_original("my_model.py") or any(map(has_changed, layers)):
        return ", ".join([*used, "the edited ConvLSTM layer as it stands, which is slower"])
    for module in layers:
        module.fast = layer.fast_layer
    if on_cpu and symmetric.is_supported(model.head[0], dtype):
        model.head[0].forward = functools.partial(symmetric.head_layer, model.head[0])
    if on_cpu:
        model.register_forward_pre_hook(symmetric.begin_call)
        model.register_forward_hook(symmetric.end_call, always_call=True)
    compiled = compiling and layer.gate_functions(device.type, dtype)[0] is not layer.gates_forward
    used.append("fast layer with compiled gates" if compiled else "fast layer")
    if on_cpu and not compiled:
        used.append("slower, as gates.c could not be built (it needs gcc on x86 Linux)")
    return ", ".join(used)


def has_changed(layer):
    """Whether a ConvLSTM or its cell has hooks, a class or a forward of its own."""
    for part, original in (layer, my_model.ConvLSTM), (layer.cell, my_model.ConvLSTMCell):
        hooks = [key for key, value in vars(part).items() if key.endswith("_hooks") and value]
        if hooks or type(part) is not original or "forward" in vars(part):
            return True
    return False
