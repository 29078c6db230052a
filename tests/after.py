"""after.py CODE main.py [flags]: runs lines of Python, then main.py in the same process."""

import runpy
import sys
from pathlib import Path

code = sys.argv[1]
sys.argv[:2] = []
sys.path[0] = str(Path(sys.argv[0]).parent)  # the code imports what main.py imports
exec(code)
runpy.run_path(sys.argv[0], run_name="__main__")
