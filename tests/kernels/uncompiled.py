"""Device functions of the CuTe DSL run as plain Python: compiler decorators and instructions replaced by numpy."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import atom.kernels


def uncompiled(name: str, **instructions: Any) -> Any:
    """A copy of module atom.kernels.`name` whose functions run without the DSL.

    instructions  stand in for the instructions that the module calls, by their names there
    """
    path = Path(atom.kernels.__file__).with_name(f"{name}.py")
    # a copy of its own: the DSL rewrites a function when it first compiles it
    spec = importlib.util.spec_from_file_location(f"atom.kernels.{name}_uncompiled", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for owner in (module, *(value for value in vars(module).values() if isinstance(value, type))):
        for attribute, value in list(vars(owner).items()):
            if getattr(value, "__module__", "") == module.__name__ and hasattr(value, "__wrapped__"):
                setattr(owner, attribute, value.__wrapped__)
    arch = SimpleNamespace(fmin=np.minimum, fmax=np.maximum)
    stubs = {
        "cutlass": SimpleNamespace(range_constexpr=range, const_expr=bool, min=min, max=max),
        "cute": SimpleNamespace(recast_tensor=lambda tensor, dtype: tensor, arch=arch),
        "Float32": np.float32,
        "Uint32": np.uint32,
        "Int32": np.int32,
    }
    vars(module).update({**stubs, **instructions})
    return module
