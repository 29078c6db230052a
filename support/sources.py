"""The code that runs, as it was when it was imported. What is edited on the disk later is not what runs.

main.py imports this first, before the imports that take seconds.
"""

import hashlib
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
IS_RUNNING = SCRIPT.is_file() and SCRIPT.parent == ROOT.resolve() and "main" not in sys.modules
MAIN = SCRIPT.name if IS_RUNNING else "main.py"  # the experiment may be a copy under another name
NAMES = MAIN, "my_model.py", "motion.py", "convlstm.py", "moving_mnist.py", "metrics.py", "support/muon.py"
TEXTS = {name: (ROOT / name).read_text("utf-8") for name in NAMES}
HASHES = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in TEXTS.items()}


if IS_RUNNING:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while imports load: no traceback
