"""The README does what it says: its commands run, what it names exists, its numbers are those of records/."""

import ast
import csv
import dataclasses
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT

import main
from download import DIGITS, digit_sheet
from figures import LABELS
from knobs import parse
from moving_mnist import Sequences, generate
from my_model import EncoderForecaster

README = (ROOT / "README.md").read_text()
SHORT = "--epochs 1 --train_sequences 8 --hidden 4 --head 4,4 --batch_size 4"
# 13 steps, at which the clock is read first, are then one epoch
BY_CLOCK = f"{SHORT} --max_minutes 0.001 --train_sequences 40 --batch_size 3 --frames_in 2 --frames_out 2"
ARRAY = f"{BY_CLOCK} --data raw/mnist_test_seq.npy --overlay 2"
# by command
SHORTER = {2: SHORT, 4: "--frames_in 5 --frames_out 3", 5: SHORT, 6: ARRAY, 7: ARRAY, 8: ARRAY, 9: BY_CLOCK}
METRICS = ("mse_per_frame", "mae_per_frame", "ssim", "ssim_openstl", "psnr", "cross_entropy_per_sequence")


def fenced():
    """Commands: the lines of code blocks without a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [line for language, block in blocks if not language for line in block.splitlines()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What git would clone, and a small array and noise where the official ones would be, so that none is fetched."""
    folder = tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("no git repository here")
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    digits = np.random.default_rng(0).integers(256, size=(9, 28, 28), dtype=np.uint8)
    np.save(
        folder / "raw" / "mnist_test_seq.npy", np.ascontiguousarray(generate(digits, 60, 0)[:, :, 0].swapaxes(0, 1))
    )
    (folder / "raw" / DIGITS.name).write_bytes(np.random.default_rng(0).bytes(DIGITS.size))
    return folder


def test_the_commands_are_these():
    """So that a new one is not forgotten below."""
    assert fenced() == [
        "python3 -m venv .venv && . .venv/bin/activate",
        "pip install torch --index-url https://download.pytorch.org/whl/cpu",
        "pip install -r requirements.txt && python main.py",
        "pip install -r requirements-dev.txt && python -m pytest",
        "python main.py --eval_only --weights records/long.pt",
        "python main.py --sharpen_from 1 --out results_unsharpened",
        "python main.py --model convlstm --hidden 64,64 --learning_rate 0.04 --max_minutes 15",
        "python main.py --model seq2seq --learning_rate 0.04 --max_minutes 15",
        "python main.py --batch_size 16 --weight_decay 0.01 --max_minutes 120 --out results_array",
        "python main.py --data fresh --batch_size 16 --weight_decay 0.01 --max_minutes 120 --out results_long",
        "torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 main.py --batch_size 32",
    ]


@pytest.fixture(scope="module")
def typed(copy):
    """Types the command of that number, shortened, in the copy, if no test before has."""

    @functools.cache
    def once(number):
        words = f"{fenced()[number].split(' && ')[-1]} {SHORTER[number]} --device cpu".split()
        ran = subprocess.run([sys.executable, *words[1:]], cwd=copy, env=ENVIRONMENT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr

    return once


@pytest.mark.parametrize(
    ("number", "leaves"),
    [
        (2, "results/my_model/beyond.png"),
        (4, "results/weights_long/predict_median.png"),
        (5, "results_unsharpened/my_model/metrics.json"),
        (6, "results/convlstm/metrics.json"),
        (7, "results/seq2seq/metrics.json"),
        (8, "results_array/my_model/metrics.json"),
        (9, "results_long/my_model/metrics.json"),
    ],
)
def test_a_command_does_its_job(number, leaves, typed, copy):
    typed(number)
    assert (copy / leaves).exists()


def test_files_exist(typed, copy):
    for number in (2, 6, 7):  # the last two are compared
        typed(number)
    made_by_a_run = {"metrics.json", "log.csv", "timing.csv", "config.json", "last.pt", "best.pt", "forecast.npy",
                     "compare.md", "mnist_test_seq.npy", "raw/mnist_test_seq.npy", "my_videos.npy"}  # fmt: skip
    named = set(re.findall(r"`([\w/.]+\.(?:py|c|npy|json|csv|pt|md|txt))`", README))
    assert len(named) > 20
    for name in named - made_by_a_run:
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(((?!http)[^)#]+)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(\w+\.(?:png|gif|md|npy))`", README):
        places = [copy / folder / name for folder in ("results/my_model", "results", "raw")]
        assert any(place.exists() for place in places) or name in made_by_a_run, name


def test_knobs_exist():
    knobs = {f.name for f in dataclasses.fields(main.Knobs)}
    named = set(re.findall(r"`?--([a-z_]+)", "\n".join(re.findall(r"`[^`]*main\.py[^`]*`|`--[^`]*`", README))))
    not_ours = {"help", "standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
    assert len(named) > 12 and named - not_ours <= knobs


def test_the_papers_network_has_a_command():
    (flags,) = re.findall(r"`python main.py (--hidden 128[^`]*)`", README)
    model = main.build(parse(main.Knobs, flags.split()), channels=1)
    shapes = lambda model: {name: p.shape for name, p in model.named_parameters()}
    assert shapes(model) == shapes(EncoderForecaster())
    assert not any(p._backward_hooks for p in model.parameters())  # kernels are free
    assert sum(p.numel() for p in model.parameters()) == 7_585_296  # Shi et al., table 1


def test_functions_exist():
    """In the table of changes: `name`, `file.py`."""
    table = README.split("## To change X, edit Y")[1].split("##")[0]
    pairs = re.findall(r"((?:`[\w.]+`(?:,? and |, )?)+)(?:, |in )`(\w+\.py)`", table)
    assert len(pairs) >= 6
    for names, file in pairs:
        tree = ast.parse((ROOT / file).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        defined |= {
            t.id for n in ast.walk(tree) if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
        }
        for name in re.findall(r"`([\w.]+)`", names):
            if not name.endswith(".py"):
                assert set(name.split(".")) <= defined, (name, file)
    assert "    loss = " in (ROOT / "main.py").read_text()


def record(name):
    return json.loads((ROOT / "records" / name / "metrics.json").read_text())


def cells(line):
    return [cell.strip().strip("*") for cell in line.strip("| ").split(" | ")]


def result_cells(scores):
    formats = ("{:.1f}", "{:.1f}", "{:.3f}", "{:.3f}", "{:.2f}", "{:.0f}")
    return [f.format(scores[m]["mean"]) if m in scores else "–" for m, f in zip(METRICS, formats, strict=True)]


def test_results_are_those_of_the_records():
    tables = README.split("## Results")[1].split("### Beyond training")[0]
    lines = [cells(line) for line in tables.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    found = 0
    for first, seen, minutes, *numbers in lines:
        link = re.search(r"\(records/(\w+)/\)", first)
        if link:
            results = record(link[1])
            log, timing = (
                (ROOT / "records" / link[1] / name).read_text().split() for name in ("log.csv", "timing.csv")
            )
            steps = log[-1].split(",")
            assert seen == f"{int(dict(zip(log[0].split(','), steps, strict=False))['sequences']):,}"
            assert minutes == f"{float(timing[-1].split(',')[1]):.1f}"
            assert numbers == result_cells(results["scores"][results["model"]]), first
            found += 1
        else:
            who = next(key for key, label in LABELS.items() if label == first)
            assert numbers == result_cells(record("default")["scores"][who]), first
    assert found == 7


def test_cases_beyond_training_are_those_of_the_records():
    table = README.split("### Beyond training")[1].split("###")[0]
    lines = {row[0]: row[1:] for row in map(cells, re.findall(r"^\| .*$", table, re.M)) if "---" not in row[0]}
    longer, default = (record(name)["beyond"] for name in ("long", "default"))
    for case, curves in default.items():
        means = [np.mean(curve) for curve in (longer[case]["my_model"], *curves.values())]
        assert lines[case] == [f"{mean:.1f}" for mean in means], case


def test_the_first_number_is_that_of_the_record():
    first = README.split("## What you will see")[0]
    for run, who in (("default", "my_model"), ("default", "black"), ("default", "copy_last"), ("long", "my_model")):
        assert f"{record(run)['scores'][who]['mse_per_frame']['mean']:.1f}" in first


def test_what_a_run_prints_is_that_of_the_record():
    printed = re.findall(r"^epoch (\S+) +train loss (\S+), validation loss (\S+), MSE +(\S+) ", README, re.M)
    rows = list(csv.DictReader((ROOT / "records" / "default" / "log.csv").read_text().splitlines()))
    keys = ("epoch", "{:.5g}"), ("train_loss", "{:.4f}"), ("val_loss", "{:.4f}"), ("val_mse_per_frame", "{:.1f}")
    assert printed == [tuple(f.format(float(row[key])) for key, f in keys) for row in rows]


def test_the_spread_is_that_of_the_records():
    runs = "default", "seed_1", "seed_2"
    ends = [record(name)["scores"]["my_model"]["mse_per_frame"]["mean"] for name in runs]
    assert README.count(f"{np.mean(ends):.1f} ± {np.std(ends, ddof=1):.1f}") == 2
    configs = [json.loads((ROOT / "records" / name / "config.json").read_text()) for name in runs]
    knobs = {f.name for f in dataclasses.fields(main.Knobs)} - {"seed", "out"}
    moving_mnist = Sequences(np.zeros((20, 1, 1, 64, 64), np.uint8))  # by which a run settles its overlays
    shipped = json.loads(json.dumps(dataclasses.asdict(main.follow_data(main.Knobs(), moving_mnist))))
    assert all(config[name] == shipped[name] for config in configs for name in knobs)


def test_speed_is_that_of_the_records():
    speeds, ratios = README.split("### Speed")[1].split("##")[0].split("Step time divided by ours")
    lines = {row[0]: row[1:] for row in map(cells, re.findall(r"^\| .*$", speeds, re.M))}
    for row in json.loads((ROOT / "records" / "bench.json").read_text())["rows"]:
        column = {("training step", 16): 0, ("forecast", 1): 2, ("forecast", 64): 3}[row["work"], row["batch"]]
        assert float(lines[row["name"]][column]) == pytest.approx(row["batch"] / row["seconds"], abs=0.051)
        if row["bytes"]:
            assert float(lines[row["name"]][1]) == round(row["bytes"] / 2**20)
    lines = {row[0]: row[1:] for row in map(cells, re.findall(r"^\| .*$", ratios, re.M))}
    names = re.findall(r"\(records/(bench\w*\.json)\)", ratios)
    assert len(names) == 5
    for column, name in enumerate(names):
        rows = json.loads((ROOT / "records" / name).read_text())["rows"]
        seconds = {row["name"]: row["seconds"] for row in rows if row["work"] == "training step"}
        ours = seconds.get("my_model, bf16") or seconds["my_model, fp32"]
        bare = seconds.get("bare convolutions, bf16") or seconds["bare convolutions, fp32"]
        assert lines["bare convolutions"][column] == f"{bare / ours:.2f}"
        for who in ("reference, fp32", "reference, bf16"):
            assert lines[who][column] == (f"{seconds[who] / ours:.1f}" if who in seconds else "–")


def test_the_weights_are_those_of_the_record():
    content = (ROOT / "records" / "long.pt").read_bytes()
    assert len(content) <= 5e6
    assert hashlib.sha256(content).hexdigest() in (ROOT / "records" / "README.md").read_text()


def test_the_python_example_forecasts():
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, re.S | re.M)
    frames = torch.from_numpy(generate(digit_sheet(ROOT / "raw" / "digits_test.png"), 20, 0)) / 255
    past, future = frames[:, :10], frames[:, 10:]
    told = {"past": past}
    exec(example, told)
    errors = [((frame - future) ** 2).sum((2, 3, 4)).mean() for frame in (told["forecast"], past[:, -1:], 0)]
    assert told["forecast"].shape == future.shape and errors[0] < 0.5 * min(errors[1:])


def test_the_equations_are_lines_of_the_code():
    table = README.split("`ConvLSTMCell.forward`, `my_model.py` |")[1].split("![")[0]
    code = (ROOT / "my_model.py").read_text()
    lines = re.findall(r"`([^`]+)`", table)
    assert len(lines) == 5 and all(line in code for line in lines)
