"""The code that runs, as it was when it was imported. What is edited on the disk later is not what runs.

main.py imports this first, before the imports that take seconds.
"""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
IS_RUNNING = SCRIPT.is_file() and SCRIPT.parent == ROOT.resolve() and "main" not in sys.modules
MAIN = SCRIPT.name if IS_RUNNING else "main.py"  # the experiment may be a copy under another name
NO_RESULTS = MAIN, "predict.py", "download.py", "figures.py"  # MAIN does affect results, and is in NAMES
NOT_MINE = "support/", "records/", "tests/", "."
FILES = (path for path in sorted(ROOT.glob("[!.]*.py")) if path.is_file())
NAMES = MAIN, *(path.name for path in FILES if path.name not in NO_RESULTS), "support/muon.py"
TEXTS = {name: (ROOT / name).read_text("utf-8", errors="replace") for name in NAMES}


def used():
    """name → text of the files that affect results: MAIN, Muon, and imported files, your own included."""
    found = {MAIN, "support/muon.py"}
    environment = {path for path in map(Path, (sys.prefix, sys.base_prefix)) if ROOT in path.parents}
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "")
        is_here = path.suffix == ".py" and ROOT in path.parents and not environment & set(path.parents)
        if is_here and module is not sys.modules["__main__"]:  # which may be a script that calls main.py
            found.add(path.relative_to(ROOT).as_posix())
    for name in sorted(found.difference(NO_RESULTS)):
        if not name.startswith(NOT_MINE) and name not in TEXTS:  # in a folder of yours
            TEXTS[name] = (ROOT / name).read_text("utf-8", errors="replace")
    return {name: text for name, text in TEXTS.items() if name in found}


if IS_RUNNING:
    # Idle threads of GNU's OpenMP sleep soon. By default they keep the cores busy, so that two runs side by
    # side each take several times as long.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while imports load: no traceback
