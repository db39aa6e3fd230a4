"""train_gpt.py in a process that begins with torch loaded (tests/warm.py)."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from tests import warm

    sys.exit(warm.run([str(Path(sys.path[0], "train_gpt.py")), *sys.argv[1:]]))
