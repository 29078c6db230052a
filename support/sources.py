"""The code that runs, as it was when it was imported. What is edited on the disk later is not what runs.

main.py imports this first, before the imports that take seconds.
"""

import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
IS_RUNNING = SCRIPT.is_file() and SCRIPT.parent == ROOT.resolve() and "main" not in sys.modules
MAIN = SCRIPT.name if IS_RUNNING else "main.py"  # the experiment may be a copy under another name
NO_RESULTS = MAIN, "predict.py", "download.py", "figures.py"  # these do not affect results, but for MAIN
FILES = (path for path in (*ROOT.glob("[!.]*.py"), *ROOT.glob("[!.]*/[!.]*.py")) if path.is_file())
FOUND = sorted(path.relative_to(ROOT).as_posix() for path in FILES)
NOT_HERE = "support/", "records/", "tests/"
MINE = (name for name in FOUND if name not in NO_RESULTS and not name.startswith(NOT_HERE))
NAMES = MAIN, *MINE, "support/muon.py"
TEXTS = {name: (ROOT / name).read_text("utf-8", errors="replace") for name in NAMES}


def used():
    """name → text of the sources of this run: MAIN and what has been imported, files of your own among it."""
    module = lambda name: name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return {name: text for name, text in TEXTS.items() if name == MAIN or module(name) in sys.modules}


if IS_RUNNING:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while imports load: no traceback
