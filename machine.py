"""Where this runs: the device and its precision, and this process among the others that torchrun started."""

import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

WORLD = int(os.environ.get("WORLD_SIZE", 1))  # all three are set by torchrun
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0)) if WORLD > 1 else 0


class DeviceError(Exception):
    """A device that cannot be used, or processes that cannot work together, in one sentence."""


def choose_device(wanted, precision):
    """(device, dtype of the convolutions, a few words on it and why). "auto": the best there is."""
    mps = torch.backends.mps.is_available() and WORLD == 1  # gloo, through which processes talk, has no mps
    found = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    kind = found if wanted == "auto" else wanted
    if kind not in ("cpu", found):
        raise DeviceError(f"device is {kind!r}, which this run does not find; set device to auto or {found}")
    if kind == "cuda" and (gpus := torch.cuda.device_count()) <= LOCAL_RANK:
        raise DeviceError(f"process {LOCAL_RANK + 1} of this machine finds {gpus} GPUs; "
                          f"start at most one process a GPU: --nproc_per_node={gpus}")  # fmt: skip
    device = torch.device(kind, LOCAL_RANK) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        try:
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)
        except RuntimeError as error:  # a driver that fails, or a GPU for which this torch has no kernels
            if "out of memory" in str(error):
                raise  # main.py has a sentence of its own for that
            why = str(error).partition("\n")[0]
            raise DeviceError(f"this torch cannot compute on the GPU: {why}; install a torch for it (pytorch.org), or "
                              "set device to cpu") from error  # fmt: skip
        capability = torch.cuda.get_device_capability()
        native, why = capability >= (8, 0), f"compute capability {capability[0]}.{capability[1]}"
    elif kind == "mps":
        native, why = False, "mps"
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()  # where this torch tells
        without = "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"
        masked = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in without
        units = [name.upper().replace("_", "-") for name in ("amx_bf16", "avx512_bf16") if has.get(name)]
        native, why = bool(units) and not masked, units[0] if units and not masked else "no bf16 unit found"
    bf16 = native if precision == "auto" else precision == "bf16"
    torch.backends.cudnn.allow_tf32 = bf16  # or convolutions in fp32 would round their factors to 10 bits
    torch.backends.cuda.matmul.allow_tf32 = False  # nor those of SSIM; some containers turn it on
    why = why if precision == "auto" else "chosen by knob"
    return device, torch.bfloat16 if bf16 else torch.float32, f"{'bf16' if bf16 else 'fp32'} ({why})"


def idle_gpu(device):
    """Whether an NVIDIA driver is installed, but this torch was built without CUDA."""
    traces = "/proc/driver/nvidia/version", os.path.join(os.environ.get("SYSTEMROOT", ""), "System32", "nvcuda.dll")
    return device.type == "cpu" and torch.version.cuda is None and any(map(os.path.exists, traces))


def join(device):
    """Connect to the other processes, if there are any. Raises DeviceError."""
    names = "RANK", "MASTER_ADDR", "MASTER_PORT"
    if WORLD > 1 and (missing := [name for name in names if name not in os.environ]):
        raise DeviceError(f"WORLD_SIZE is {WORLD}, but {', '.join(missing)} are not set; start it with torchrun")
    try:
        if WORLD > 1:
            backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
            # gloo's own patience; nccl's, ten minutes, may be too short for another machine to download the array
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
    except dist.DistError as error:
        raise DeviceError(f"the processes did not find each other: {str(error).splitlines()[0]}") from error


def sum_over_processes(value, device):
    if WORLD == 1:
        return value
    value = value.to(device)  # nccl reduces on the GPU only
    dist.all_reduce(value)
    return value.cpu()


def from_rank_0(value):
    """The value that the first process has."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def say(*words):
    if RANK == 0:
        print(*words, flush=True)


def end(status, message=None):
    """End this process; the message goes to stderr."""
    if message:
        print(message, file=sys.stderr, flush=True)
    if WORLD == 1:
        sys.exit(status)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status)  # a thread of gloo's may still free a tensor, and where Python is shutting down, that aborts it


def stop(signum, frame):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # the second time, at once
    if RANK == 0:
        join_words = subprocess.list2cmdline if os.name == "nt" else shlex.join
        goes_on = join_words(sys.orig_argv) if WORLD == 1 else "the same torchrun command"
        with suppress(OSError):  # a closed pipe
            # not print, which may be at work already and cannot be entered twice
            os.write(2, os.fsencode(f"\nstopped; this goes on: {goes_on}\n"))
    raise SystemExit(128 + signum)


def stop_for_sure(ignored):
    """In a __del__ or a weakref's callback Python would print the SystemExit and go on."""
    if not isinstance(ignored.exc_value, SystemExit):
        return sys.__unraisablehook__(ignored)
    try:
        sys.stdout.flush()
    finally:
        os._exit(ignored.exc_value.code)


def stop_on_signals():
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    sys.unraisablehook = stop_for_sure
