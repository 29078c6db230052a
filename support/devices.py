"""Where a run computes: device, precision, processes. And how a script ends: by signals, or by faults."""

import contextlib
import ctypes
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from support import UserError

# torchrun sets all three
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0)) if WORLD_SIZE > 1 else 0

OUT_OF_MEMORY = "out of memory", "can't allocate memory", "not enough memory"
OUT_OF_MEMORY += "ALLOC_FAILED", "ALLOCATION_FAILED", "valid cuDNN algorithm"  # cuBLAS, cuDNN
LOST_CONNECTION = "closed by peer", "reset by peer", "Broken pipe"  # gloo's words; nccl has its own error


def choose_device(wanted, precision):
    """(device, dtype of the convolutions, the dtype and its reason in words). "auto": the best there is."""
    mps = torch.backends.mps.is_available() and WORLD_SIZE == 1  # gloo has no mps
    best = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    kind = best if wanted == "auto" else wanted
    if kind not in ("cpu", best):
        raise UserError(f"device is {kind}, which was not found; set device to auto or {best}")
    device = torch.device(kind, LOCAL_RANK) if kind == "cuda" else torch.device(kind)
    has_bf16, reason = {"cuda": check_gpu, "cpu": check_cpu}.get(kind, lambda _: (False, kind))(device)
    if precision != "auto":
        has_bf16, reason = precision == "bf16", "set by the knob precision"
    # TF32 rounds factors to 10 bits: too few for fp32, and for SSIM
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    name = "bf16" if has_bf16 else "fp32"
    return device, torch.bfloat16 if has_bf16 else torch.float32, f"{name} ({reason})"


def check_gpu(device):
    """Whether the GPU multiplies bf16, and why. Raises UserError if this process has none."""
    if (gpus := torch.cuda.device_count()) <= LOCAL_RANK:
        advice = f"start one process per GPU: --nproc_per_node={gpus}"
        raise UserError(f"process {LOCAL_RANK + 1} finds {gpus} GPUs; {advice}")
    torch.cuda.set_device(device)
    major, minor = torch.cuda.get_device_capability()
    return (major, minor) >= (8, 0), f"compute capability {major}.{minor}"


def check_cpu(device):
    """Whether the CPU multiplies bf16, and why."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    units = [name.upper().replace("_", "-") for name in ("amx_bf16", "avx512_bf16") if has.get(name)]
    return bool(units), units[0] if units else "no bf16 unit found"


def keep_freed_memory():
    """Let glibc keep large freed buffers. Otherwise page faults take a fifth of a training step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # there is no glibc
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of mallopt(3); glibc before 2.35 takes at most 2**25
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**31 - 1)


def connect(device):
    """Connect to the other processes, if there are any."""
    if WORLD_SIZE == 1:
        return
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))  # another may download the array


def to_device(tensor, device):
    """The tensor on the device. From pinned memory, the copy does not wait for the GPU's queued work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def all_reduce(value, device):
    """The sum over all processes."""
    if WORLD_SIZE == 1:
        return value
    value = value.to(device)  # nccl reduces on the GPU only
    dist.all_reduce(value)
    return value


def broadcast(value):
    """The value that the first process has."""
    box = [value]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(box)
    return box[0]


def on_rank_0(function, *arguments):
    """Call a function in the first process only; every process gets its result."""
    return broadcast(function(*arguments) if RANK == 0 else None)


def print0(text):
    """Print in the first process only, above a progress bar."""
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()


def exit_process(code):
    """sys.exit, also for one of several processes. code: a number, None, or a text for stderr."""
    if WORLD_SIZE == 1:
        sys.exit(code)
    if isinstance(code, str):
        print(code, file=sys.stderr, flush=True)
        code = 1
    sys.stdout.flush()
    os._exit(code or 0)  # at Python's own shutdown, a thread of gloo may abort the process


def stop(signum, frame):
    """Handle Ctrl-C and SIGTERM: say how to continue, and unwind."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    if RANK == 0:
        with contextlib.suppress(OSError):  # a closed pipe
            # os.write, as print may be interrupted in its middle
            os.write(2, b"\nstopped; run the same command again to continue\n")
    raise SystemExit(128 + signum)


def run_script(function, out_of_memory_advice=""):
    """Call a function. A signal or a user's fault ends it with a sentence, a bug with a traceback."""
    name = f"main.py, rank {RANK}" if WORLD_SIZE > 1 else os.path.basename(sys.argv[0])
    if not hasattr(sys.stdout, "reconfigure"):  # %run would not notice edits
        exit_process(f"in a notebook, type !python {name}")
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        function()
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
            exit_process(0)
    except SystemExit as stopped:
        exit_process(stopped.code)
    except UserError as error:
        exit_process(f"{name}: {error}")
    except (MemoryError, RuntimeError) as error:  # on a CPU, torch raises RuntimeError
        text = " ".join(str(error).partition("Exception raised from")[0].split())  # no C++ stack
        if isinstance(error, MemoryError) or any(part in text for part in OUT_OF_MEMORY):
            exit_process(f"{name}: out of memory; {out_of_memory_advice}")
        if isinstance(error, dist.DistError) or any(part in text for part in LOST_CONNECTION):
            reason = text or type(error).__name__
            exit_process(f"{name}: lost the other processes ({reason}); another process may say why")
        raise
