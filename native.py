"""C files built at start-up, where the machine has a C compiler, and compared with their plain twins."""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch


def build(source, *flags):
    """The library that this C file beside me compiles to; None where that fails."""
    for compiler in filter(None, map(shutil.which, ("gcc", "cc", "clang"))):  # clang, if torch has its OpenMP
        with contextlib.suppress(OSError, StopIteration, subprocess.SubprocessError):
            # link the OpenMP that torch has loaded: a second one beside it would fight for the cores
            lines = os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines()
            maps = [line.split(maxsplit=5)[-1] for line in lines]
            openmp = next(path for path in maps if "libgomp" in path or "libiomp" in path or "libomp" in path)
            fast = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math"]
            with tempfile.TemporaryDirectory() as folder:
                run = functools.partial(subprocess.run, check=True, capture_output=True, cwd=folder, timeout=60)
                run([compiler, *fast, *flags, "-fopenmp", "-fPIC", "-c", Path(__file__).with_name(source), "-o", "a.o"])
                run([compiler, "-shared", "a.o", openmp, "-o", "a.so"])
                return ctypes.CDLL(f"{folder}/a.so")
    return None


def agree(found, expected, dtype):
    """Whether tensors are those of the plain twin, up to the rounding of what computes in dtype."""
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-4  # of the largest value
    return all((a - b).abs().max() <= limit * b.abs().max() for a, b in zip(found, expected, strict=True))


def arguments(*values):
    """Numbers as long, tensors as pointers, None as the null pointer."""
    of = lambda v: ctypes.c_long(v) if isinstance(v, int) else ctypes.c_void_p(None if v is None else v.data_ptr())
    return map(of, values)
