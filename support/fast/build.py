"""Build fast functions at start-up: from the C files with a C compiler, or by torch.compile."""

import contextlib
import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import torch

FLAGS = "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math"


def build(source, *flags):
    """The library of a C file in this folder; None where it cannot be built."""
    with contextlib.suppress(OSError, StopIteration, subprocess.SubprocessError):
        # link the OpenMP that torch has loaded: a second one would compete for the cores
        lines = os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines()
        maps = [line.split(maxsplit=5)[-1] for line in lines]
        openmp = next(path for path in maps if "libgomp" in path or "libiomp" in path or "libomp" in path)
        path = Path(__file__).with_name(source)
        with tempfile.TemporaryDirectory() as folder:
            compile_it = ["gcc", *FLAGS, *flags, "-fopenmp", "-fPIC", "-c", path, "-o", "a.o"]
            for command in (compile_it, ["gcc", "-shared", "a.o", openmp, "-o", "a.so"]):
                subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
            return ctypes.CDLL(f"{folder}/a.so")


def by_torch(functions):
    """The functions by torch.compile, for a GPU."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # few kernels need no pool of processes
    torch._dynamo.config.recompile_limit = 64  # one for each batch, width and dtype
    return tuple(torch.compile(f, dynamic=False) for f in functions)


def agree(found, expected, dtype):
    """Whether tensors equal those of the plain function, up to the rounding of dtype."""
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-4  # of the largest value
    return all((a - b).abs().max() <= limit * b.abs().max() for a, b in zip(found, expected, strict=True))


def arguments(*values):
    """Numbers as long, tensors as pointers, None as the null pointer."""
    address = lambda v: None if v is None else v.data_ptr()
    return (ctypes.c_long(v) if isinstance(v, int) else ctypes.c_void_p(address(v)) for v in values)
