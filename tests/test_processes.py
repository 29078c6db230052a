"""Several processes and machines share a run: it ends as that of one process, or with a sentence."""

import os
import re
import signal
import socket
from pathlib import Path

import pytest
import torch
from conftest import finish, flags, here, start, wait_until
from test_runs import evaluations, linux, mean, same

import metrics
from support import checkpoint

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SHORT = {"epochs": 1, "train_sequences": 20}
FEW = {"epochs": 1, "train_sequences": 10, "fast": False}
# at Python's shutdown a thread of gloo's may abort the process: after this code it always would
ABORTS_AT_SHUTDOWN = "import atexit, os; atexit.register(os.abort)"
# prints the precision of each forecast
NAMES_PRECISION = """
import torch
autocast = torch.autocast
torch.autocast = lambda device, dtype=None, **options: print(dtype) or autocast(device, dtype, **options)
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two(words):
    """Two processes of one run, without torchrun, which would stop the one where the other fails."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(*words, code=ABORTS_AT_SHUTDOWN, **world, RANK=k, LOCAL_RANK=k) for k in "01"]


@pytest.fixture(scope="module")
def of_two_processes(array, tmp_path_factory):
    """(folder, stdout) of the uninterrupted run, shared by two. Read only."""
    out = tmp_path_factory.mktemp("two")
    options = {"launcher": TORCHRUN, "code": ABORTS_AT_SHUTDOWN, "pictures": False}
    printed, _ = finish(start(*flags(array, out, **SHORT), **options))
    return out / "my_model", printed


def test_processes_share_the_batch(array, tmp_path, of_two_processes):
    """Parts of 3 and 2, with the same sequences merged into them."""
    (folder, printed), alone = of_two_processes, here(array, tmp_path, **SHORT)
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
    """One of them alone: the other may not wait for it."""
    command, last = flags(array, tmp_path, **SHORT), tmp_path / "my_model" / "last.pt"
    process = start(*command, launcher=TORCHRUN)
    wait_until(last.exists, process)
    files = Path(f"/proc/{process.pid}/task").glob("*/children")
    workers = [int(number) for file in files for number in file.read_text().split()]
    os.kill(workers[1], signal.SIGKILL)
    process.communicate(timeout=20)
    assert process.returncode > 0 and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    finish(start(*command, launcher=TORCHRUN))
    same(tmp_path / "my_model", of_two_processes[0])


@linux
def test_two_machines(array, tmp_path):
    """A machine on each of two addresses, of which only one has a bf16 unit.

    Both compute as the first does, which alone has files.
    """
    rendezvous = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    rendezvous += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    machines = []
    for k, precision in ("1", "bf16"), ("2", "fp32"):
        (tmp_path / k).mkdir()
        options = {"code": NAMES_PRECISION, "pictures": False, "cwd": tmp_path / k}
        launcher = (*rendezvous, f"--local_addr=127.0.0.{k}")
        words = flags(array, "out", precision=precision, **FEW)
        machines.append(start(*words, launcher=launcher, **options))
    printed = [finish(machine)[0] for machine in machines]
    speaks = ["processes: 2" in text for text in printed]
    assert sorted(speaks) == [False, True]
    precision, dtype = ("bf16", "torch.bfloat16") if speaks[0] else ("fp32", "torch.float32")
    assert f"device    cpu, {precision} (set by the knob precision)" in "".join(printed)
    assert [set(re.findall(r"^torch\.\w+$", text, re.M)) for text in printed] == [{dtype}] * 2
    assert [any((tmp_path / k).iterdir()) for k in "12"] == speaks  # the other writes nothing
    assert [(tmp_path / k / "out" / "my_model" / "metrics.json").exists() for k in "12"] == speaks


@pytest.mark.parametrize(("victim", "number", "status"), [(0, signal.SIGTERM, 143), (1, signal.SIGKILL, -9)])
def test_one_of_two_processes_ends(victim, number, status, array, tmp_path):
    command = flags(array, tmp_path, train_sequences=20, fast=False)
    both, last = two(command), tmp_path / "my_model" / "last.pt"
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
