"""The tables of records/README.md are those of the logs beside it."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT

import main
from records import ablation
from support.checkpoint import weights_hash

RECORDS = ROOT / "records"
SCORES = {"mse_per_frame": "MSE", "mae_per_frame": "MAE", "ssim": "SSIM"}
TRAINING = ["data", "max_minutes", "batch_size", "learning_rate", "weight_decay", "ssim_from", "precision"]
TABLES = {}  # the first two headings of a table → its rows, each a dict from heading to text
ROW = r"(?:.+ \| .+\n)"
for text in re.findall(rf"^{ROW}\|?-+:?\|[-:|]+\n{ROW}+", (RECORDS / "README.md").read_text("utf-8"), re.M):
    heads, _, *rows = (re.sub(r"^\| | \|$", "", line).split(" | ") for line in text.splitlines())
    TABLES[heads[0], heads[1]] = [dict(zip(heads, row, strict=True)) for row in rows]
means = lambda scores, n=1: [f"{scores[m]['mean']:.{k}f}" for m, k in zip(SCORES, (n, 1, 3), strict=True)]


def read(name):
    text = (RECORDS / name).read_text("utf-8")
    return json.loads(text) if name.endswith("json") else list(csv.DictReader(text.splitlines()))[-1]


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in RECORDS.glob("*/log.csv")))
def test_a_row_is_its_run(folder):
    (row,) = [row for row in TABLES["Run", "Command"] if f"({folder}/)" in row["Run"]]
    metrics, config, log = (read(f"{folder}/{name}") for name in ("metrics.json", "config.json", "log.csv"))
    if "asked" in config:  # of today's code
        config |= config["asked"]["knobs"]
    config.setdefault("ssim_from", config.get("sharpen_from"))
    config.setdefault("equivariant", config.get("symmetric", False))  # before it was a knob: False
    assert [row[name] for name in SCORES.values()] == means(metrics["scores"][metrics["model"]], n=2)
    assert row["Sequences"] == f"{int(log['step']) * config['batch_size']:,}" == f"{int(log['sequences']):,}"
    scored = str([r for r in TABLES["Run", "Note"] if f"[{r['Run']}]" in row["Run"]])
    assert metrics["step"] == int(log["step"]) or f"(step {metrics['step']:,})" in scored
    assert row["Minutes"] == f"{float(log['minutes']):.1f}"
    assert row["Parameters"] == f"{metrics['parameters']:,}" and config["commit"].startswith(row["Commit"])
    knobs = main.parse(row["Command"].strip("`").split()[2:])
    for name in TRAINING + ([] if knobs.max_minutes else ["epochs"]):
        assert getattr(knobs, name) == config[name], name
    assert metrics["parameters"] == sum(p.numel() for p in main.build(knobs, 1).parameters())
    if knobs.model in ("my_model", "paper", "plain"):
        assert knobs.equivariant == config["equivariant"]
    assert knobs.seed == config["seed"]


def test_reference_values():
    *baselines, spread = [[row[m] for m in SCORES.values()] for row in TABLES["Reference value", "MSE"]]
    runs = [read(f"{run}/metrics.json")["scores"] for run in ("default", "seed_1", "seed_2")]
    assert baselines == [means(runs[0][who]) for who in ("black", "copy_last", "optical_flow")]
    for text, name, n in zip(spread, SCORES, (1, 1, 3), strict=True):
        values = [run["my_model"][name]["mean"] for run in runs]
        assert text == f"{np.mean(values):.{n}f} ± {np.std(values, ddof=1):.{n}f}"


def test_the_ablation_is_its_runs():
    assert ablation.table() in (RECORDS / "README.md").read_text("utf-8")
    folders = {re.sub(r"_s[12]$", "", path.parent.name) for path in RECORDS.glob("ablation/*/log.csv")}
    assert folders == {"default", *ablation.LABELS}
    assert ablation.ladder() in (RECORDS / "README.md").read_text("utf-8")
    for path in ROOT / "README.md", RECORDS / "README.md":  # no row begins as an item of a list
        assert not re.search(r"^ *[-+*] .* \| ", path.read_text("utf-8"), re.M)
    assert {path.parent.name for path in RECORDS.glob("ladder/*/log.csv")} == {*ablation.LADDER}


def test_own_data():
    """Each row is its run: steps and scores. The front page has the RMSE, too."""
    rows, cells = TABLES["Data", "Forecaster"], {}
    found = {folder.name for folder in (RECORDS / "own_data").iterdir() if folder.is_dir()}
    assert found == {name for row in rows for name in re.findall(r"own_data/(\w+)/", row["Forecaster"])}
    baselines = {"last frame copied": "copy_last", "optical flow": "optical_flow"}
    for row in rows:
        who = row["Forecaster"].strip("[`").partition("`")[0]
        model = "my_model" if who in baselines else who.rpartition(" --")[2]
        folder = f"own_data/{row['Data'].replace(' ', '_')}_{model}"
        results, log = read(f"{folder}/metrics.json"), read(f"{folder}/log.csv")
        scores = results["scores"][baselines.get(who, results["model"])]
        mse = scores["mse_per_frame"]["mean"]
        assert [row["MSE"], row["RMSE"]] == [f"{mse:.2f}", f"{scores['rmse'][0]:.2f}"], folder
        assert who in baselines or row["Steps"] == f"{int(log['step']):,}"
        assert who in baselines or f"({folder}/)" in row["Forecaster"]
        assert results["split"] == "test"
        cells[row["Data"], who] = row["RMSE"]
    front = (ROOT / "README.md").read_text("utf-8").split("Data, unit | `my_model`")[1].split("\n\n")[0]
    heads = "my_model", "convlstm", "paper", "last frame copied", "optical flow"
    for line in front.splitlines()[2:]:
        data, *shown = line.split(" | ")
        assert shown == [cells[data.partition(",")[0], head] for head in heads], data


def test_speed():
    rows = {row["Contender"]: row for row in TABLES["Contender", "Training step, batch 16"]}
    steps = {(row["Machine"], row["Step"]): row for row in TABLES["Machine", "Step"]}
    labels = {"step": "default", "step without symmetry": "without symmetric convolutions"}
    files = {"Zen 5": "bench_zen5.json", "Zen 4": "bench_zen4.json", "AMX": "bench_amx.json"}
    timings = [(machine, row) for machine, file in files.items() for row in read(file)["rows"]]
    for machine, timed in timings:
        if timed["work"].startswith("default, horizon"):
            name, _, dtype = timed["name"].rpartition(", ")
            horizon = timed["work"].split()[-1]
            column = f"{dtype}, {horizon} frame{'s' * (horizon != '1')}"
            assert steps[machine, labels.get(name, name)][column] == f"{1000 * timed['seconds']:.0f}"
        elif machine == "Zen 5":
            work = f"{timed['work'].capitalize()}, batch {timed['batch']}"
            assert rows[timed["name"]][work] == f"{timed['batch'] / timed['seconds']:.1f}"


def test_long_pt_is_the_fresh_run(capsys):
    text = (RECORDS / "README.md").read_text("utf-8")
    ((step, mse, hash),) = re.findall(r"step ([\d,]+), validation MSE ([\d.]+), hash (\w+)", text)
    saved = torch.load(RECORDS / "long.pt", weights_only=True)
    assert hash == weights_hash(main.load(RECORDS / "long.pt"))
    assert "edited" not in capsys.readouterr().out  # its network is today's
    assert step == f"{saved['step']:,}" and saved["step"] == read("long/metrics.json")["step"]
    lines = (RECORDS / "long" / "log.csv").read_text("utf-8").splitlines()
    (scored,) = [line for line in csv.DictReader(lines) if line["step"] == step.replace(",", "")]
    assert mse == f"{float(scored['val_mse_per_frame']):.2f}"
