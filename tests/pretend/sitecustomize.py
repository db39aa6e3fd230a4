"""TEST_BFLOAT16=present or absent: in this process the CPU has bfloat16 units, or has none, whatever it really has.

Python imports a module of this name whenever it starts with this folder on PYTHONPATH, where tests/surroundings.py puts
it: so the children of a test pretend as it does. The kernels stay those of the real CPU.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DTYPE = {"present": "bfloat16", "absent": "float32"}[os.environ["TEST_BFLOAT16"]]


class Pretence:
    """Changes optim.polar, where it is decided, as soon as that is imported and before anybody can import from it."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "optim.polar":
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            genuine, chosen = module.fast_half_dtype, getattr(module.torch, DTYPE)
            module.fast_half_dtype = lambda device_type: genuine(device_type) if device_type == "cuda" else chosen  # type: ignore[attr-defined]

        spec.loader.exec_module = execute_and_change
        return spec


sys.meta_path.insert(0, Pretence())
