"""The README does what it says: its commands run, what it names exists, its numbers are those of records/."""

import ast
import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT
from test_records import TABLES, means, read

import main
import moving_mnist
from records import ablation

README = (ROOT / "README.md").read_text("utf-8")
SHORT = "--epochs 1 --train_sequences 4 --batch_size 4 --frames_in 3 --frames_out 2 --device cpu"
SHORT += " --max_minutes 0"  # one step


def shell(line, folder):
    """Type a line in the folder, in a real shell whose python is this one."""
    environment = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"}
    ran = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"{line}\n{ran.stdout}{ran.stderr}"


def test_commands_do_their_job(tmp_path):
    """In what git would clone, with a small stand-in array, so that nothing is fetched."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("no git repository here")
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    digits = np.random.default_rng(0).integers(256, size=(9, 28, 28), dtype=np.uint8)
    sequences = moving_mnist.generate(digits, 60, 0)[:, :, 0]
    np.save(tmp_path / "raw" / "moving_mnist_standin.npy", np.ascontiguousarray(sequences.swapaxes(0, 1)))
    np.save(tmp_path / "my.npy", np.random.default_rng(0).normal(273, 9, (40, 16, 17)))
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    commands = [line.rpartition(" && ")[2] for line in lines]
    trainings = [line for line in commands if line.startswith("python main.py")]
    assert len(trainings) >= 4
    for line in trainings:
        is_small = "convlstm" in line or "--hidden_channels" in line
        shell(f"{line} {SHORT} {'' if is_small else '--hidden_channels 8'}", tmp_path)
    assert len(list(tmp_path.glob("results/*/metrics.json"))) == len(trainings)  # none was run before
    assert torch.load(tmp_path / "results" / "my_model" / "last.pt")["knobs"]["overlay"] == 2
    (generate,) = [line for line in commands if line.startswith("python -c")]
    shell(generate, tmp_path)
    assert np.load(tmp_path / "my_frames.npy").shape == (20, 64, 64)
    predictions = [line for line in commands if line.startswith("python predict.py")]
    assert len(predictions) == 2
    for line in predictions:
        shell(f"{line} --out forecast{'_own' if 'mine' in line else ''}", tmp_path)
    assert np.load(tmp_path / "forecast_own" / "forecast.npy").shape == (2, 16, 17)  # as many as in training
    folders = (tmp_path / name for name in ("results", "results/my_model", "forecast"))
    made = {path.name for folder in folders for path in folder.iterdir()}
    named = set(re.findall(r"`([\w*]+\.(?:png|gif|csv|json|pt|npy|md))`", README))
    for name in named - {"my.npy", "my_frames.npy", "convlstm.png"}:  # the last: test_convlstm.py
        assert any(re.fullmatch(name.replace("*", ".*"), other) for other in made), name


def test_what_is_named_exists():
    """Files, links, knobs; and in the table of changes: `name`, `file.py`."""
    of_a_run = {"best.pt", "last.pt", "source/", "results/"}
    named = set(re.findall(r"`([\w/]+(?:\.py|/|\.pt))`", README)) - of_a_run
    linked = set(re.findall(r"\]\(((?!http)[^)#]+)", README))
    assert len(named) >= 8 and len(linked) > 8
    assert not [name for name in named | linked if not (ROOT / name).exists()]
    knobs = {field.name for field in dataclasses.fields(main.Knobs)}
    named = {name.removeprefix("no_") for name in re.findall(r"--([a-z_]+)", README)}
    assert len(named) > 10 and named - {"help", "start", "nproc_per_node"} <= knobs
    table = README.split("To change | Edit\n")[1].split("\n\n")[0]
    pairs = re.findall(r"((?:`[\w.]+`(?:,? and |, )?)+)(?:, |in )`(\w+\.py)`", table)
    assert len(pairs) >= 5
    for names, file in pairs:
        nodes = list(ast.walk(ast.parse((ROOT / file).read_text("utf-8"))))
        defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for name in re.findall(r"`([\w.]+)`", names):
            assert name.endswith(".py") or set(name.split(".")) <= defined, (name, file)


def test_results_are_those_of_the_records():
    rows = re.findall(r"^\[.*?\]\(records/(\w+)/\).*? \| (.*)$", README, re.M)
    assert len(rows) == 5
    for name, cells in rows:
        results = read(f"{name}/metrics.json")
        log = read(f"{name}/log.csv")
        sequences, minutes, mse, mae, ssim = cells.split(" | ")
        assert sequences == f"{int(log['sequences']):,}" and minutes == f"{float(log['minutes']):.1f}", name
        assert [mse, mae, ssim] == means(results["scores"][results["model"]]), name
    assert f"{int(read('long/log.csv')['sequences']):,} fresh sequences" in README
    black, *_, seeds = TABLES["Reference value", "MSE"]
    assert black["MSE"] in README and seeds["MSE"] in README


def test_what_each_part_adds():
    """Each bar of ladder.png is as long as its run's MSE, and is labeled with it."""
    runs = [read(f"ladder/{name}/metrics.json") for name in ablation.LADDER]
    scores = [run["scores"][run["model"]] for run in runs]
    (axes,) = ablation.picture().axes
    shown = [bar.get_width() for bar in axes.patches]
    assert shown == [score["mse_per_frame"]["mean"] for score in scores[:-1]]  # the last: the paper's network
    texts = [text.get_text() for text in axes.texts]
    labels, words = zip(*ablation.LADDER.values(), strict=True)
    assert texts[: len(shown)] == [f"{error:.1f}" for error in shown]
    assert (*texts[len(shown) :: 2], *texts[len(shown) + 1 :: 2]) == labels[:-1] + words[:-1]
    *_, before, default, _ = (score["mae_per_frame"]["mean"] for score in scores)
    assert shown[-1] > shown[-2] and default < before and "MSE rises, MAE falls" in texts[-1]


def test_the_python_example_forecasts():
    (example,) = re.findall(r"^```python\n(import main.*?)^```$", README, re.S | re.M)
    digits = moving_mnist.read_digits(ROOT / "raw" / "digits_test.png")
    frames = torch.from_numpy(moving_mnist.generate(digits, 4, 0)) / 255
    past, future = frames[:, :10], frames[:, 10:]
    names = {"frames": 255 * past}
    exec(example.replace("records/", f"{ROOT}/records/"), names)
    errors = [((frame - future) ** 2).sum((2, 3, 4)).mean() for frame in (names["forecast"], past[:, -1:], 0)]
    assert names["forecast"].shape == future.shape and errors[0] < 0.5 * min(errors[1:])


def test_the_equations_are_lines_of_the_code():
    table = README.split("`ConvLSTMCell.forward` in `my_model.py`\n")[1].split("![")[0]
    code = (ROOT / "my_model.py").read_text("utf-8")
    lines = re.findall(r"`([^`]+)`", table)
    assert len(lines) == 5 and all(line in code for line in lines)
