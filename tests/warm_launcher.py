"""harness/launch.py, whose ranks are processes that begin with torch loaded (tests/warm.py)."""

import argparse
import sys
from pathlib import Path

from harness import launch

genuine = launch.run


def run(arguments: argparse.Namespace) -> None:
    assert Path(arguments.training_script).name == "train_gpt.py"
    arguments.training_script = str(Path(__file__).with_name("warm_trainer.py"))
    genuine(arguments)


if __name__ == "__main__":
    launch.run = run
    sys.exit(launch.main(sys.argv[1:]))
