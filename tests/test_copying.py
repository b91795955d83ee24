"""Each core file works when copied alone: its usage example runs where nothing else of ours can be imported."""

import ast
import doctest
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "egas": {"torch"},
    "tsec": {"torch"},
    "grpo": {"torch"},
    "entropy_controls": {"torch"},
    "rewards": {"math_verify", "sympy", "latex2sympy2_extended"},
}

# What must hold after the example, with the example's own names.
CHECKS = {
    "egas": """
        assert attacked.shape == x.shape and 0 < (attacked - x).abs().max() <= 8 / 255 + 1e-6
    """,
    "tsec": """
        assert 0 < keep.sum() < mask.sum() and objective.requires_grad and objective.ndim == 0 and objective > 0
    """,
    "grpo": """
        assert abs(advantages[0, 0] - 1.5) < 1e-4 and abs(loss) < 1e-6 and logprobs.grad[0, 0] < 0 < logprobs.grad[1, 0]
        assert set(metrics) == {"clip/low", "clip/high"}
    """,
    "entropy_controls": """
        assert keep.sum() == 8 and coefficient == 0.001 and abs(following - 0.0011) < 1e-9
        assert (entropy.grad + 0.001 / 36).abs().max() < 1e-8
    """,
}


def usage_example(docstring: str) -> str:
    """The code in a module's docstring: its doctests, or the last paragraph that is indented as a whole."""
    if examples := doctest.DocTestParser().get_examples(docstring):
        return "\n".join(
            f"assert repr(({e.source.strip()})) == {e.want.strip()!r}"
            if e.want
            else e.source.strip()
            for e in examples
        )
    paragraphs = [
        p
        for p in docstring.split("\n\n")
        if all(line.startswith("    ") for line in p.strip("\n").split("\n"))
    ]
    return textwrap.dedent(paragraphs[-1].strip("\n"))


@pytest.mark.parametrize("module", ALLOWED)
def test_a_copied_file_runs_its_usage_example(module, tmp_path):
    source = (ROOT / f"{module}.py").read_text()
    (tmp_path / f"{module}.py").write_text(source)
    example = usage_example(ast.get_docstring(ast.parse(source)))
    assert 3 <= len(example.splitlines()) <= 6, (
        f"an example of three lines or so, found:\n{example}"
    )
    script = f"from {module} import *\n\n{example}\n{textwrap.dedent(CHECKS.get(module, ''))}"
    script += f"\nimport sys, {module}\nfor m in list(sys.modules.values()):\n    print(getattr(m, '__file__', None))\n"
    (tmp_path / "usage.py").write_text(script)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, "usage.py"]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, f"{script}\n{run.stderr}"
    assert not run.stderr, run.stderr
    loaded = {Path(line) for line in run.stdout.splitlines()}
    assert tmp_path / f"{module}.py" in loaded
    ours = {path.resolve() for path in ROOT.glob("*.py")} | set((ROOT / "demo").glob("*.py"))
    assert not ours & loaded


@pytest.mark.parametrize("module", ALLOWED)
def test_a_core_file_imports_nothing_of_ours_and_little_else(module):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import does not travel"
            imported.add(node.module.split(".")[0])
    assert imported <= ALLOWED[module] | sys.stdlib_module_names, imported


def test_usage_example_is_found_in_a_docstring():
    docstring = "Head.\n\nWhat\n    prose, indented\n\n    x = 1\n    y = 2\n\nmore\n"
    assert usage_example(docstring) == "x = 1\ny = 2"
    assert (
        usage_example("Head.\n\n>>> x = 1\n>>> x + 1\n2\n") == "x = 1\nassert repr((x + 1)) == '2'"
    )
