"""What a GPU would do, without one: on tensors without numbers, and by torch.compile for the CPU."""

import functools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import skip_without_compiler
from test_fast import assert_layer_is_plain
from test_my_model import seeded  # noqa: F401

import main
from moving_mnist import Data, MovingMNIST
from support import score
from support.prepare import Setup
from support.progress import Progress

fast = pytest.importorskip("support.fast")
KNOBS = replace(main.Knobs(), overlay=2, batch_size=32, epochs=1, ssim_from=0)


@pytest.mark.parametrize("horizon", [1, 10])
def test_a_training_step_reads_once(monkeypatch, tmp_path, horizon):
    """All is on the meta device, where whatever reads a value raises, but for the read of main.train."""
    model, reads = main.build(KNOBS, 1), []
    hooks = [hook for p in model.parameters() for hook in (p._backward_hooks or {}).values()]
    assert "fast layer" in fast.attach(model, torch.device("cuda"), torch.float32)
    model.to("meta")  # loses the hooks
    for kernel, hook in zip([p for p in model.parameters() if p.ndim == 4], hooks, strict=True):
        kernel.register_hook(hook)
    frames = torch.zeros(20, 64, 1, 64, 64, dtype=torch.uint8)
    sequences = MovingMNIST(frames.numpy())
    data = Data(sequences, sequences, None, "")
    setup = Setup(KNOBS, data, model, torch.device("meta"), torch.float32, {}, {}, 0)
    optimizers = main.make_optimizers(model, KNOBS, torch.float32)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t) or [0.5] * t.numel())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # they know no meta device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(Progress, "evaluation_due", lambda progress: False)
    monkeypatch.setattr(main, "horizon_at", lambda *_: (20 - horizon, horizon))
    main.train(setup, tmp_path, Progress.start(setup), optimizers)  # the first time, it fills caches
    reads.clear()
    main.train(setup, tmp_path, Progress.start(setup), optimizers)
    assert len(reads) == 2  # one in each step
    monkeypatch.setattr(fast.layer, "gate_functions", None)  # a forecast compiles nothing
    score.forecast(setup, torch.zeros(1, 10, 1, 64, 64, device="meta"), 2)


@pytest.mark.parametrize(("backend", "dtype"), [("aot_eager", torch.bfloat16), ("inductor", torch.float32)])
def test_compiled_gates_are_plain(backend, dtype, monkeypatch):
    """Also in a layer, with its gradients."""
    skip_without_compiler()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    compiled = fast.build.by_torch((fast.layer.gates_forward, fast.layer.gates_backward))
    monkeypatch.setattr(fast.layer, "gate_functions", lambda *_: compiled)
    assert_layer_is_plain(dtype, True, 3, 4, 3, 3, (2, 3, 5, 7))
