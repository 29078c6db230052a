"""Several processes and machines share a run: it ends as that of one process, or with a sentence."""

import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from conftest import ABORTS_AT_SHUTDOWN, finish, flags, here, start, wait_until
from test_runs import evaluations, linux, mean, same

import metrics
from support import checkpoint

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SHORT = {"epochs": 1, "train_sequences": 20}
FEW = {"epochs": 1, "train_sequences": 10, "fast": False}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two(first, second):
    """Two processes of one run, without torchrun, which would stop the one where the other fails."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    options = {"launcher": ABORTS_AT_SHUTDOWN, **world}
    ranked = zip("01", (first, second), strict=True)
    return [start(*words, **options, RANK=rank, LOCAL_RANK=rank) for rank, words in ranked]


@pytest.fixture(scope="module")
def of_two_processes(array, tmp_path_factory):
    """(folder, stdout) of the uninterrupted run, shared by two. Read only."""
    out = tmp_path_factory.mktemp("two")
    printed, _ = finish(start(*flags(array, out, **SHORT), launcher=(*TORCHRUN, *ABORTS_AT_SHUTDOWN)))
    return out / "my_model", printed


def test_processes_share_the_batch(array, tmp_path, of_two_processes):
    """Parts of 3 and 2, with the same sequences merged into them."""
    (folder, printed), alone = of_two_processes, here(array, tmp_path, pictures=True, **SHORT)
    assert printed.count("processes: 2") == 1
    assert {p.name for p in folder.iterdir()} == {p.name for p in alone.iterdir()}
    ours, theirs = (torch.load(f / "last.pt") for f in (folder, alone))
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=2e-6)  # the rounding of sums
    for mine, other in zip(evaluations(folder), evaluations(alone), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    for name in metrics.METRICS:
        assert mean(folder, name) == pytest.approx(mean(alone, name), rel=1e-3)


@linux
def test_killed_with_two_processes(of_two_processes, array, tmp_path):
    command, last = flags(array, tmp_path, **SHORT), tmp_path / "my_model" / "last.pt"
    for wanted in (1, 2):
        process = start(*command, launcher=TORCHRUN)
        wait_until(lambda n=wanted: last.exists() and checkpoint.load(last)["step"] >= n, process)
        files = Path(f"/proc/{process.pid}/task").glob("*/children")
        workers = [int(number) for file in files for number in file.read_text().split()]
        if wanted == 1:  # one of them alone: the other may not wait for it
            os.kill(workers[1], signal.SIGKILL)
            process.communicate(timeout=20)
            assert process.returncode > 0 and not any(Path(f"/proc/{worker}").exists() for worker in workers)
        else:
            for number in (*workers, process.pid):
                os.kill(number, signal.SIGKILL)
            process.communicate()
    finish(start(*command, launcher=TORCHRUN))
    same(tmp_path / "my_model", of_two_processes[0])


@linux
def test_two_machines(array, tmp_path):
    """A machine on each of two addresses. Only the first has the file of weights."""
    rendezvous = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    rendezvous += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    launcher = lambda k: (*rendezvous, f"--local_addr=127.0.0.{k}")
    machines = [start(*flags(array, tmp_path / k, **FEW), launcher=launcher(k)) for k in "12"]
    speaks = ["processes: 2" in finish(machine)[0] for machine in machines]
    assert sorted(speaks) == [False, True]
    assert [(tmp_path / k).exists() for k in "12"] == speaks  # the other writes nothing
    assert [(tmp_path / k / "my_model" / "metrics.json").exists() for k in "12"] == speaks
    places = [tmp_path / k for k in ("12" if speaks[0] else "21")]
    given = {"eval_only": True, "weights": places[0] / "my_model" / "best.pt"}
    for more, words in ({}, "this run has ended"), (given, "weights of "):
        again = two(*(flags(array, place, **FEW, **more) for place in places))
        assert words in "".join([finish(machine)[0] for machine in again])  # the second has to be told


def test_two_processes_of_two_precisions(array, tmp_path):
    """As on two machines, one of them without a bf16 unit: both compute as the first does."""
    both = two(*(flags(array, tmp_path, precision=precision, **FEW) for precision in ("bf16", "fp32")))
    printed = [finish(process)[0] for process in both]
    assert "device    cpu, bf16 (set by the knob precision)" in printed[0] and not printed[1]


@pytest.mark.parametrize(("victim", "number", "status"), [(0, signal.SIGTERM, 143), (1, signal.SIGKILL, -9)])
def test_one_of_two_processes_ends(victim, number, status, array, tmp_path):
    command = flags(array, tmp_path, train_sequences=20, fast=False)
    both, last = two(command, command), tmp_path / "my_model" / "last.pt"
    try:
        wait_until(last.exists, both[0])
        both[victim].send_signal(number)
        _, err = finish(both[victim], status)
        assert victim or "stopped; run the same command again" in err
        _, err = finish(both[1 - victim], 1, timeout=10)
        assert f"main.py, rank {1 - victim}: lost the other processes (" in err
        with checkpoint.lock_folder(last.parent):  # the next run may have it
            assert checkpoint.load(last)["step"] >= 1
    finally:
        for process in both:
            process.kill()
            process.communicate()
