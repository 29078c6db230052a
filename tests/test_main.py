"""The experiment of main.py, piece by piece: knobs, schedules, batches, loss, optimizers."""

import ast
import csv
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, flags, here, moving_squares, results
from torch.nn import functional as F

import main
import metrics
from main import Knobs, Muon, parse
from moving_mnist import MovingMNIST
from support import checkpoint
from support.progress import Progress
from support.scale import Scale

FEW = {"epochs": 1, "train_sequences": 10}
EVENLY = [0, 11, 22, 33, 45]  # of 46 training sequences


def test_knobs_are_few_and_plain():
    """What a user reads first: at most 29, each a literal with a comment, in the first 80 lines."""
    lines = (ROOT / "main.py").read_text("utf-8").splitlines()[:80]
    knobs = [re.fullmatch(r"    (\w+): .+ = (.+)  # .+", line) for line in lines]
    found = {knob[1]: ast.literal_eval(knob[2]) for knob in knobs if knob}
    assert found == asdict(Knobs()) and len(found) <= 29


def test_imports_go_one_way():
    for name in ("my_model", "motion", "convlstm", "metrics", "figures"):
        text = (ROOT / f"{name}.py").read_text("utf-8")
        assert not re.search(r"^\s*(import|from) (support|main)\b", text, re.M), name


def test_knobs_reach_the_network():
    model = main.build(Knobs(hidden_channels=(8, 16, 8), kernel_size=5, max_motion=2, head_channels=(24,)), 1)
    assert [layer.cell.dilation for layer in model.encoder] == [1, 2, 2]
    assert [layer.cell.hidden_channels for layer in model.encoder] == [8, 16, 8]
    assert {layer.cell.input_to_state.shape[-1] for layer in model.encoder} == {5}
    assert (model.max_motion, model.forecaster) == (2, None)
    assert (model.head[0].out_channels, model.outputs) == (24, [16, 16, 25])
    assert main.build(Knobs(patch_size=2, max_motion=0), 3).outputs == [12]
    kernels = [main.build(Knobs(equivariant=tied), 1).motion.weight for tied in (True, False)]
    assert [bool(kernel._backward_hooks) for kernel in kernels] == [True, False]


def test_a_recipe_replaces_defaults(tmp_path):
    """Of a model, and of data of your own. It gives way to flags and to weights."""
    paper = parse(["--model", "paper"])
    assert sum(p.numel() for p in main.build(paper, 1).parameters()) == 7_585_296
    assert parse(["--learning_rate", "0.5", "--model", "paper"]).learning_rate == 0.5
    weights = {"knobs": {**asdict(paper), "hidden_channels": [32, 32]}, "model": {}}
    checkpoint.save(tmp_path / "a.pt", weights)
    brought = parse(["--weights", str(tmp_path / "a.pt")])  # with the recipe of their model
    assert (brought.model, brought.hidden_channels, brought.epochs) == ("paper", (32, 32), 3)
    plain = parse(["--model", "plain"])
    assert (plain.hidden_channels, plain.overlay, plain.ssim_from) == ((128, 64, 64), 0, 1)
    (adam,) = main.make_optimizers(network := main.build(plain, 1), plain, torch.float32)
    assert type(adam) is torch.optim.Adam and adam.defaults["lr"] == 0.001
    assert main.horizon_at(plain, 0) == (10, 10) and network.forecaster is not None
    assert parse(["--data", "my.npy", "--model", "plain"]).weight_decay == Knobs().weight_decay  # unused
    own = parse(["--data", "my.npy", "--model", "convlstm", "--epochs", "4"])
    assert (own.overlay, own.batch_size, own.learning_rate, own.epochs) == (0, 4, 0.04, 4)


def test_schedules():
    knobs = Knobs(learning_rate=0.02, grow_horizon=(0.2, 0.7), frames_in=10, frames_out=11)
    rates = [main.learning_rate_at(knobs, p) for p in (0, 0.025, 0.05, 0.2875, 0.525, 1)]
    assert rates == pytest.approx([0, 0.01, 0.02, 0.015, 0.01, 0], abs=1e-12)
    growing = [main.horizon_at(knobs, p, True) for p in (0, 0.2, 0.24, 0.26, 0.46, 0.69, 0.7, 1)]
    assert growing == [(20, 1), (20, 1), (20, 1), (19, 2), (15, 6), (11, 10), (10, 11), (10, 11)]
    assert main.horizon_at(replace(knobs, grow_horizon=(0.5, 0)), 0, True) == (10, 11)  # the whole at once
    assert main.horizon_at(replace(knobs, frames_out=1), 0.5, True) == (10, 1)
    assert [main.horizon_at(replace(knobs, grow_horizon=(0.2, 0.2)), p)[1] for p in (0.1, 0.2)] == [1, 11]
    assert main.horizon_at(knobs, 0) == (10, 1)


def test_evaluations_are_neither_too_few_nor_too_many():
    def due(step, steps):
        progress = Progress(10, 1, steps, max_seconds=0, step=step)
        assert step == 50 or not progress.evaluation_due() or progress.passes(200)  # a point of the loss
        return progress.evaluation_due()

    assert [step for step in range(1, 91) if due(step, 90)] == [9, 18, 27, 36, 45, 50, 54, 63, 72, 81, 90]
    assert all(due(step, 3) for step in (1, 2, 3))


class Noting(MovingMNIST):
    def __getitem__(self, index):
        self.fetched.append(index)
        return super().__getitem__(index)


def batches(overlay, knobs=(), horizons=((9, 1), (9, 1), (7, 3), (6, 4))):
    """(what was fetched, past and future) of each step of an epoch of 20 sequences."""
    training = Noting(moving_squares(20)[:, :, None])
    knobs = Knobs(frames_in=6, frames_out=4, batch_size=5, overlay=overlay, **dict(knobs))
    data, device = SimpleNamespace(training=training, scale=Scale()), torch.device("cpu")
    setup = SimpleNamespace(knobs=knobs, data=data, steps_per_epoch=4, device=device)
    for step, (n_past, n_future) in enumerate(horizons):
        training.fetched = []
        frames = main.load_batch(setup, step, n_past, n_future, main.overlays_at(knobs, n_future))
        assert [part.shape[1] for part in frames] == [n_past, n_future]
        yield training.fetched, torch.cat(frames, 1)


@pytest.mark.parametrize(("overlay", "expected"), [(0, [0, 0, 0, 0]), (1, [1, 1, 1, 0]), (2, [2, 2, 1, 0])])
def test_overlaid_until_all_frames_are_trained_on(overlay, expected):
    """Each sequence is the larger value of itself and of so many others, drawn anew."""
    known, partners, themselves = torch.from_numpy(moving_squares(20)[:, :, None]).swapaxes(0, 1), [], []
    for (fetched, frames), n in zip(batches(overlay), expected, strict=True):
        assert len(fetched) == 1 + n
        merged = torch.stack([known[index] for index in fetched]).amax(0)[:, : frames.shape[1]]
        assert torch.equal(frames, merged.float() / 255)
        themselves.extend(fetched[0])
        partners += map(tuple, fetched[1:])
    assert sorted(themselves) == list(range(20))  # each once
    assert len(set(partners)) == len(partners) and all(len(set(row)) > 1 for row in partners)


def test_the_order_is_another_in_each_epoch_and_of_each_seed():
    order = lambda **knobs: [tuple(fetched[0]) for fetched, _ in batches(0, knobs, [(6, 4)] * 8)]
    assert order() == order() != order(seed=1)
    assert order()[:4] != order()[4:]


@pytest.mark.parametrize(
    ("changes", "scored"),
    [
        ({"grow_horizon": (1, 1)}, [(t, 1) for t in range(3, 10)]),
        ({"grow_horizon": (1, 1), "model": "paper"}, [(6, 1)]),
        ({"grow_horizon": (0, 1)}, [*((t, 1) for t in range(3, 9)), (8, 2)]),
        ({"grow_horizon": (0, 1), "model": "paper"}, [(6, 1), (6, 2)]),
        ({"grow_horizon": (0, 0)}, [(6, 1), (6, 2), (6, 3), (6, 4)]),
        ({"grow_horizon": (0, 0), "ssim_from": 0}, [(6, 1), (6, 2), (6, 3), (6, 4)]),  # whatever is minimized
    ],
)
def test_what_a_step_is_scored_on(changes, scored, array, tmp_path):
    """Of each frame: how many input frames it is drawn from, and how far behind the last of them it lies."""
    changes = {"max_motion": 0, "overlay": 0, "train_sequences": 5, "epochs": 1, **changes}
    folder = here(array, tmp_path, **changes)
    torch.manual_seed(0)
    model = main.build(parse(flags(array, tmp_path, **changes)), 1)
    frames = torch.from_numpy(np.load(array)[EVENLY, :, None] / np.float32(255))
    with torch.no_grad():
        pairs = [(model(frames[:, :t], lead)[:, -1], frames[:, t + lead - 1]) for t, lead in scored]
        losses = [F.binary_cross_entropy_with_logits(*pair) for pair in pairs]
    *_, row = csv.DictReader((folder / "log.csv").read_text("utf-8").splitlines())
    assert float(row["train_loss"]) == pytest.approx(np.mean(losses), rel=1e-4)


def test_ssim_joins_the_loss(array, tmp_path, monkeypatch):
    steps, ssim_loss, ends = [], main.ssim_loss, set()

    def noted(logits, truth):
        expected = 1 - metrics.ssim(torch.sigmoid(logits), truth).mean()
        assert ssim_loss(logits, truth).item() == pytest.approx(expected.item(), rel=1e-4)
        steps.append(len(truth))
        return ssim_loss(logits, truth)

    monkeypatch.setattr(main, "ssim_loss", noted)
    for ssim_from, expected in (0.9, []), (0.7, [5]), (0, [5, 5]):  # progress 1/4, 3/4
        steps.clear()
        folder = here(array, tmp_path / str(ssim_from), ssim_from=ssim_from, **FEW)
        assert steps == expected
        ends.add(results(folder)["weights"])
    assert len(ends) == 3


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (40, 2, 3, 3), (6, 6, 1, 1)])  # wide, tall, square
def test_muon_is_torchs(shape):
    """Bit by bit in bf16; in fp32, which torch has not, up to bf16's rounding. `zero_grad` works, too."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    torchs = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.2)
    for gradient in gradients:
        matrix.grad = gradient.flatten(1)
        torchs.step()
    expected = matrix.detach().view(shape)
    for dtype in (torch.bfloat16, torch.float32):
        kernel = torch.nn.Parameter(start.clone())
        muon = Muon([kernel], dtype, 0.1, 0.2)
        for kernel.grad in gradients:
            muon.step()
        assert dtype == torch.float32 or torch.equal(kernel, expected)
        assert (kernel - expected).norm() < 0.03 * (expected - start).norm()
    muon.zero_grad()
    assert kernel.grad is None


def test_each_parameter_has_its_optimizer_and_its_rate(array, tmp_path, monkeypatch):
    """A frozen layer stays, and all the others learn."""
    start, build = {}, main.build
    model = build(Knobs(hidden_channels=(8,), head_channels=(8,)), 1)
    muon, adamw = main.make_optimizers(model, Knobs(), torch.bfloat16)
    assert muon.dtype == torch.bfloat16
    assert len(main.make_optimizers(torch.nn.Linear(2, 2), Knobs(), torch.bfloat16)) == 1
    (rest,) = adamw.param_groups
    kernels = muon.param_groups[0]["params"]
    assert {id(p) for p in [*kernels, *rest["params"]]} == {id(p) for p in model.parameters()}
    assert any(p is model.head[-1].weight for p in rest["params"]) and all(p.ndim == 4 for p in kernels)
    model.after_the_head = torch.nn.Conv2d(2, 2, 3)  # an edit; its place changes nothing
    muon, adamw = main.make_optimizers(model, Knobs(), torch.bfloat16)
    assert muon.param_groups[0]["params"][-1] is model.after_the_head.weight
    assert any(p is model.head[-1].weight for p in adamw.param_groups[0]["params"])

    def frozen(*arguments):
        model = build(*arguments)
        model.encoder[0].requires_grad_(False)
        start.update({name: value.clone() for name, value in model.state_dict().items()})
        return model

    monkeypatch.setattr(main, "build", frozen)
    folder = here(array, tmp_path, weight_decay=0.07, **FEW)  # two steps, the last at a progress of 0.75
    last = torch.load(folder / "last.pt")
    (kernels,), (rest,) = (optimizer["param_groups"] for optimizer in last["optimizers"])
    assert (kernels["weight_decay"], rest["weight_decay"]) == (0.07, 0)
    assert [kernels["lr"], 20 * rest["lr"]] == pytest.approx([0.06 * 0.25 / 0.95] * 2)
    same = {name for name, value in start.items() if torch.equal(last["model"][name], value)}
    assert same == {name for name in start if name.startswith("encoder.0.")} and len(same) == 4


def test_a_network_of_ones_own_in_place_of_my_model(array, tmp_path, monkeypatch):
    """It sees frames_in frames at each step, and needs no argument but these and n."""

    class Pointwise(torch.nn.Conv2d):
        def forward(self, past, n):
            assert past.shape[1:] == (6, 1, 16, 16)
            return super().forward(past[:, :, 0])[:, :n, None]

    monkeypatch.setattr(main, "build", lambda *_: Pointwise(6, 4, 1))
    folder = here(array, tmp_path, **FEW)
    assert results(folder)["parameters"] == 28


def test_the_seed_decides(array, tmp_path):
    few = {"epochs": 1, "train_sequences": 5, "precision": "auto", "frames_out": 2}
    ends = [results(here(array, tmp_path / str(k), seed=seed, **few)) for k, seed in enumerate((1, 1, 2))]
    assert ends[0]["weights"] == ends[1]["weights"] != ends[2]["weights"]
