"""Are the exercises solved?

    python -m pytest docs/walkthrough                  # all of them
    python -m pytest docs/walkthrough -k exercise_3    # one

Each file beside this one states a task and has a function to fill. Its `check` is called here with
what you wrote.
"""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
EXERCISES = sorted(path.stem for path in HERE.glob("exercise_*.py"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stub(module: ModuleType) -> Callable:
    """The function that an exercise asks for: the parameter of its check has its name."""
    (name,) = inspect.signature(module.check).parameters
    return getattr(module, name)


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name):
    module = load(HERE / f"{name}.py")
    module.check(stub(module))
