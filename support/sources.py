"""The code that runs, as it was when the script began. What is edited on the disk later is not what runs."""

import ast
import functools
import hashlib
import os
import re
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUON = "support/muon.py"
NO_RESULTS = {"predict.py", "figures.py"}  # they cannot change weights or scores
LIBRARIES = [path for path in map(Path, (sys.prefix, sys.base_prefix)) if ROOT in path.parents]
NOT_MINE = "support/", "records/", "tests/", "."
kept = {}  # name → text, once a script has begun


def begin():
    """What a script does before its slow imports: it keeps the code, and sets up threads and Ctrl-C."""
    for path in (*ROOT.glob("[!.]*.py"), ROOT / MUON):
        kept[path.relative_to(ROOT).as_posix()] = path.read_text("utf-8-sig", errors="replace")
    # Idle threads of GNU's OpenMP sleep soon. By default they keep the cores busy, so that two runs side by
    # side each take several times as long.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while imports load: no traceback


def read(name):
    """The text of a source file; in a script, as it was when it was first read."""
    if name in kept:
        return kept[name]
    text = (ROOT / name).read_text("utf-8-sig", errors="replace")  # some editors begin a file with a mark
    if kept:
        kept[name] = text
    return text


def script():
    """The name of the experiment, which may be a copy of main.py. A script that imports main.py is not it."""
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
    return path.name if path.parent == ROOT and "main" not in sys.modules else "main.py"


def used():
    """Names of the files that can change a result: the script, Muon, and what they import from here."""
    names = {MUON, script()}
    for name, module in list(sys.modules.items()):
        path = resolve(getattr(module, "__file__", None) or "")
        is_mine = ROOT in path.parents and not any(folder in path.parents for folder in LIBRARIES)
        if is_mine and path.suffix == ".py" and name != "__main__":
            names.add(path.relative_to(ROOT).as_posix())
    return sorted(name for name in names - NO_RESULTS if name == MUON or not name.startswith(NOT_MINE))


@functools.cache
def resolve(file):
    """The whole path; of torch's modules, some have a relative one, which stays."""
    return Path(file).resolve() if os.path.isabs(file) else Path(file)


def fingerprints():
    """name → fingerprint of each of these files; of metrics.py, only of what training uses."""
    names = used()
    wanted = of_training("\n".join(read(name) for name in names if name != "metrics.py"), read("metrics.py"))
    return {name: fingerprint(name, wanted if name == "metrics.py" else ()) for name in names}


@functools.cache
def of_training(texts, of_metrics):
    """Names in metrics.py: what these texts use, what chooses the best weights, and what both need."""
    body = ast.parse(of_metrics).body
    # metrics.name, from metrics import name, other
    mentioned = re.findall(r"\bmetrics(?:\.| +import +)([\w, ]+|\([^)]*\))", texts)
    if re.search(r"\bmetrics (?:as|import \*)", texts):
        mentioned = [texts]  # any word may be a name
    names = {"mse_per_frame", *re.findall(r"\w+", " ".join(mentioned))}
    reached, before = names & set().union(*map(defined, body)), set()
    while reached != before:
        before = set(reached)
        for node in (node for node in body if defined(node) & before):
            reached |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return tuple(sorted(reached, key=str))


def network():
    """Fingerprints of what a network may be made of: files of layers, and `build` of the script."""
    others = {MUON, script(), "moving_mnist.py", "own_data.py", "metrics.py"}
    found = {name: fingerprint(name) for name in used() if name not in others}
    return found | {"build": fingerprint(script(), ("build",))}


def fingerprint(name, wanted=()):
    """A hash of a source file, or of its definitions with these names, without comments and docstrings.

    Defaults of Knobs do not count: the values of a run do.
    """
    return fingerprint_of(read(name), wanted)


@functools.cache
def fingerprint_of(text, wanted):
    body = ast.parse(text).body
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == "Knobs":
            node.body = [part for part in node.body if not isinstance(part, ast.AnnAssign)]
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
