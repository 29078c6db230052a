"""Where a run computes: device, precision, processes. And how it ends: signals and faults in one sentence."""

import errno
import os
import signal
import sys
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

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
    found = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    kind = found if wanted == "auto" else wanted
    if kind not in ("cpu", found):
        raise UserError(f"device is {kind}, which was not found; set device to auto or {found}")
    device = torch.device(kind, LOCAL_RANK) if kind == "cuda" else torch.device(kind)
    native, reason = {"cuda": check_gpu, "mps": lambda _: (False, "mps")}.get(kind, check_cpu)(device)
    bf16 = native if precision == "auto" else precision == "bf16"
    # TF32 rounds factors to 10 bits: too few for fp32, and for SSIM
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    reason = reason if precision == "auto" else "set by the knob precision"
    return device, torch.bfloat16 if bf16 else torch.float32, f"{'bf16' if bf16 else 'fp32'} ({reason})"


def check_gpu(device):
    """Whether the GPU multiplies bf16, and why. Raises UserError if it cannot be used."""
    if (gpus := torch.cuda.device_count()) <= LOCAL_RANK:
        words = f"process {LOCAL_RANK + 1} finds {gpus} GPUs; start one process per GPU"
        raise UserError(f"{words}: --nproc_per_node={gpus}")
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except RuntimeError as error:  # a driver that fails, or a GPU for which this torch has no kernels
        if "out of memory" in str(error):
            raise
        words = f"torch cannot use the GPU: {str(error).partition(chr(10))[0]}"
        advice = "install a torch for it (pytorch.org), or set device to cpu"
        raise UserError(f"{words}; {advice}") from error
    major, minor = torch.cuda.get_device_capability()
    return (major, minor) >= (8, 0), f"compute capability {major}.{minor}"


def check_cpu(device):
    """Whether the CPU multiplies bf16, and why."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    units = [name.upper().replace("_", "-") for name in ("amx_bf16", "avx512_bf16") if has.get(name)]
    return bool(units), units[0] if units else "no bf16 unit found"


def init_distributed(device):
    """Connect to the other processes, if there are any. Raises UserError."""
    if WORLD_SIZE == 1:
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is {WORLD_SIZE}, but {', '.join(missing)} are not set; use torchrun")
    try:
        backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))  # another may download the array
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the processes did not find each other: {reason}") from error


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


def print0(words):
    if RANK == 0:
        print(words, flush=True)


def exit_process(code):
    """sys.exit, also for one of several processes. code: a number, None, or words for stderr."""
    if WORLD_SIZE == 1:
        sys.exit(code)
    is_number = code is None or isinstance(code, int)
    if not is_number:
        print(code, file=sys.stderr, flush=True)
    with suppress(OSError):
        sys.stdout.flush()
    # at Python's own shutdown, a thread of gloo may abort the process
    os._exit(code or 0 if is_number else 1)


def stop(signum, frame):
    """Handle Ctrl-C and SIGTERM: say how to continue, and unwind."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    if RANK == 0:
        with suppress(OSError):  # a closed pipe
            # os.write, as print may be interrupted in its middle
            os.write(2, b"\nstopped; run the same command again to continue\n")
    raise SystemExit(128 + signum)


def run_script(function, out_of_memory_advice=""):
    """Call a function. A signal or a foreseeable fault ends it with one sentence, a bug with a traceback."""
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
    except (UserError, FloatingPointError) as error:
        exit_process(f"{name}: {error}")
    except (MemoryError, RuntimeError) as error:  # on a CPU, torch raises RuntimeError
        text = " ".join(str(error).partition("Exception raised from")[0].split())  # no C++ stack
        if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
            exit_process(f"{name}: out of memory; {out_of_memory_advice}")
        if isinstance(error, dist.DistError) or any(words in text for words in LOST_CONNECTION):
            reason = text or type(error).__name__
            exit_process(f"{name}: lost the other processes ({reason}); another process may say why")
        raise
    except OSError as error:
        if error.filename:
            exit_process(f"{name}: {error.filename}: {error.strerror or error}")
        # from print
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        print(f"{name}: cannot print: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(1)  # at its end Python would print again
