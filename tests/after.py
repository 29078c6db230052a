"""after.py CODE main.py [flags]: runs a line of Python, then main.py in the same process."""

import runpy
import sys
from pathlib import Path

exec(sys.argv[1])
sys.argv[:2] = []
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
