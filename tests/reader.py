"""Reads hostile files in a process of its own, which may crash or hang, with a GiB of memory to spare.

python tests/reader.py    on stdin "videos FOLDER"; on stdout a line each: how it ended
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support import UserError, videos

READ = {"videos": lambda path: videos.read_videos(path, 4, 32, 32).shape}


def spare(n):
    """No more than n bytes of memory from here on, where the system tells what is in use."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + n, used + n))
    except (ImportError, OSError):
        pass


if __name__ == "__main__":
    spare(2**30)
    for line in sys.stdin:
        kind, path = line.rstrip("\n").split(" ", 1)
        try:
            ended = f"read {READ[kind](path)}"
        except UserError as error:
            ended = f"refused {error}"
        except Exception as error:
            ended = f"failed {error!r}"
        print(ended.replace("\n", " "), flush=True)
