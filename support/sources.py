"""The code that runs, as it was when the script began. What is edited on the disk later is not what runs."""

import ast
import functools
import hashlib
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MUON = "support/muon.py"
NO_RESULTS = {"predict.py", "download.py", "figures.py"}  # they cannot change weights or scores
NOT_MINE = "support/", "records/", "tests/", "."
# What training uses of metrics.py. Other metrics can be added to a run that has ended.
OF_TRAINING = "GAUSSIAN", "similarity", "sliding", "mse_per_frame", "_per_sequence", "_check"


def begin():
    """What a script does before its slow imports: it keeps the code, and sets up threads and Ctrl-C."""
    for path in (*ROOT.glob("[!.]*.py"), ROOT / MUON):
        read(path.relative_to(ROOT).as_posix())
    # Idle threads of GNU's OpenMP sleep soon. By default they keep the cores busy, so that two runs side by
    # side each take several times as long.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while imports load: no traceback


@functools.cache
def read(name):
    """The text of a source file, as it was when it was first read."""
    return (ROOT / name).read_text("utf-8", errors="replace")


def used():
    """Names of the files that can change a result: the script, Muon, and what they import from here."""
    names = {MUON}
    environments = [path for path in map(Path, (sys.prefix, sys.base_prefix)) if ROOT in path.parents]
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "")
        is_mine = path.suffix == ".py" and ROOT in path.parents
        is_mine &= not any(folder in path.parents for folder in environments)
        # a script that imports main.py is not the experiment
        if is_mine and not (name == "__main__" and "main" in sys.modules):
            names.add(path.relative_to(ROOT).as_posix())
    return sorted(name for name in names - NO_RESULTS if name == MUON or not name.startswith(NOT_MINE))


def fingerprints():
    """name → fingerprint of each of these files; of metrics.py, only of what training uses."""
    return {name: fingerprint(name, OF_TRAINING if name == "metrics.py" else ()) for name in used()}


@functools.cache
def fingerprint(name, wanted=()):
    """A hash of a source file, or of its definitions with these names, without comments and docstrings."""
    body = ast.parse(read(name)).body
    found = shape([node for node in body if not wanted or defined(node) & set(wanted)])
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def defined(node):
    """The names that a statement defines."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)}


def shape(node):
    """A syntax tree as lists, without docstrings. All versions of Python give the same lists."""
    if isinstance(node, ast.AST):
        fields = [[field, shape(value)] for field, value in ast.iter_fields(node) if value not in (None, [])]
        return [type(node).__name__, *fields]
    if isinstance(node, list):
        is_text = lambda part: isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
        return [shape(part) for part in node if not is_text(part)]
    return repr(node)
