"""The same surroundings for all tests, whatever shell they are started from; imported before torch is.

Variables that other programs leave in a shell are removed, for child processes too, and git has a configuration of its
own. Two variables, of the tests alone, change what they run on; tests/portable.py sets them:

TEST_THREADS=N                  torch has N threads in each process instead of one
TEST_BFLOAT16=present|absent    the CPU has bfloat16 units, or has none, whatever it really has; in child processes too
"""

import os
import re
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
THREADS = int(os.environ.get("TEST_THREADS", "1"))
OF_THE_SHELL = re.compile(
    r"(?i:\w+_proxy)|HF_\w+|TIKTOKEN_CACHE_DIR|DATA_GYM_CACHE_DIR"  # where downloads come from
    r"|(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)|MASTER_\w+|PET_\w+|TORCHELASTIC_\w+"  # launchers, ours too
    r"|NNODES|NPROC_PER_NODE|RDZV_\w+|MAX_RESTARTS|MKL_NUM_THREADS"
    r"|GIT_\w+|BENCHMARK_RESULTS|COLUMNS|LINES|(NO|FORCE)_COLOR|CLICOLOR\w*|PYTHON(WARNINGS|SAFEPATH)"
)

for name in filter(OF_THE_SHELL.fullmatch, list(os.environ)):
    del os.environ[name]
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # for which the Hub's client would keep a file in the home folder
os.environ["GIT_CONFIG_NOSYSTEM"] = "1"
os.environ["GIT_CONFIG_GLOBAL"] = str(HERE / "gitconfig")

PRETEND = str(HERE / "pretend")
if "TEST_BFLOAT16" in os.environ and PRETEND not in sys.path:  # where it is, Python has run it as it started
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [PRETEND, os.environ.get("PYTHONPATH")]))
    runpy.run_path(f"{PRETEND}/sitecustomize.py")
