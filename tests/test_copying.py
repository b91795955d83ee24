"""A core file works when copied alone: its usage example runs where nothing of ours is near."""

import ast
import doctest
import importlib
import json
import shutil
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from demo.task import make_row

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {  # what a file may import beside the standard library
    "egas.py": {"torch"},
    "tsec.py": {"torch"},
    "grpo.py": {"torch"},
    "extras/entropy_controls.py": {"torch"},
    "rewards.py": {"math_verify", "sympy", "latex2sympy2_extended"},
}
CHECKS = {  # what must hold after the example, with the example's own names
    "egas.py": """
        assert attacked.shape == x.shape and 0 < (attacked - x).abs().max() <= 8 / 255 + 1e-6
    """,
    "tsec.py": """
        assert objective.requires_grad and objective.ndim == 0 and objective > 0
        assert objective != entropy[mask].mean()  # of chosen tokens alone
    """,
    "grpo.py": """
        assert abs(advantages[0, 0] - 1.5) < 1e-4 and abs(loss) < 1e-6
        assert logprobs.grad[0, 0] < 0 < logprobs.grad[1, 0]
        assert set(metrics) == {"clip/low", "clip/high"}
    """,
    "extras/entropy_controls.py": """
        assert loss_mask.sum() == 8 and coefficient == 0.001 and abs(following - 0.0011) < 1e-9
        assert (entropy.grad + 0.001 / 36).abs().max() < 1e-8
    """,
}


def is_ours(file: str) -> bool:
    path = Path(file).resolve() if "site-packages" not in file else Path("/")
    return path == ROOT or ROOT in path.parents


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder to import from, while nothing of ours can be imported from elsewhere."""
    path = [entry for entry in sys.path if not is_ours(entry or ".")]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *path])
    monkeypatch.chdir(tmp_path)
    modules = {}
    for name, module in list(sys.modules.items()):
        if is_ours(getattr(module, "__file__", None) or "/"):
            modules[name] = sys.modules.pop(name)
    importlib.invalidate_caches()
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)
    sys.modules.update(modules)


def usage_example(docstring: str) -> str:
    """A docstring's code: its doctests, or the last paragraph that is indented as a whole."""
    lines = []
    for example in doctest.DocTestParser().get_examples(docstring):
        source = example.source.strip()
        lines.append(
            f"assert repr(({source})) == {example.want.strip()!r}" if example.want else source
        )
    if lines:
        return "\n".join(lines)
    for paragraph in docstring.split("\n\n"):
        lines = paragraph.strip("\n").split("\n")
        if all(line.startswith("    ") for line in lines):
            example = textwrap.dedent("\n".join(lines))
    return example


@pytest.mark.parametrize("path", ALLOWED)
def test_a_copied_file_runs_its_usage_example(path, alone, capsys):
    copy = Path(shutil.copy(ROOT / path, alone))
    example = usage_example(ast.get_docstring(ast.parse(copy.read_text())))
    assert 3 <= len(example.splitlines()) <= 6, f"not an example of a few lines:\n{example}"
    script = f"from {copy.stem} import *\n\n{example}\n{textwrap.dedent(CHECKS.get(path, ''))}"
    with warnings.catch_warnings(action="error"):
        exec(compile(script, "usage.py", "exec"), {})
    assert Path(sys.modules[copy.stem].__file__) == copy
    assert not capsys.readouterr().err


def test_saei_in_trl_trains_when_copied_with_egas_and_tsec(alone, capsys, monkeypatch):
    """On pictures in a folder, as its docstring says."""
    for name in ("egas.py", "tsec.py", "extras/trl_saei.py"):
        shutil.copy(ROOT / name, alone)
    rows = alone / "rows" / "train"
    rows.mkdir(parents=True)
    with open(rows / "metadata.jsonl", "w") as file:
        for i in range(2):
            row = make_row("shifted/train", i)
            row["images"][0].save(rows / f"{i}.png")
            line = {"file_name": f"{i}.png", "problem": row["problem"], "answer": row["answer"]}
            file.write(json.dumps(line) + "\n")
    import trl_saei

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", alone / "cache")
    options = dict(model=ROOT / "demo" / "confident", dataset=rows.parent, output_dir="out")
    options |= dict(max_steps=2, per_device_train_batch_size=4, num_generations=2, adversarial=1)
    options |= dict(max_completion_length=16)
    trl_saei.main([f"--{name}={value}" for name, value in options.items()])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = lines[lines.index(["step", *trl_saei.LOGGED]) + 1 :]
    assert [line[0] for line in table] == ["1", "2"]
    for _, *values in table:
        logged = dict(zip(trl_saei.LOGGED, map(float, values), strict=True))
        assert logged["entropy/attacked"] > logged["entropy/selected"] > 0
        assert logged["entropy/clean"] > 0 and logged["entropy/adversarial"] > 0
        assert logged["attack/linf"] == pytest.approx(2 / 255, abs=1e-4)


@pytest.mark.parametrize("path", ALLOWED)
def test_a_core_file_imports_nothing_of_ours_and_little_else(path):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import does not travel"
            imported.add(node.module.split(".")[0])
    assert imported <= ALLOWED[path] | sys.stdlib_module_names


@pytest.mark.parametrize(
    "docstring, example",
    [
        ("Head.\n\nWhat\n    prose\n\n    x = 1\n    y = 2\n\nmore\n", "x = 1\ny = 2"),
        ("Head.\n\n>>> x = 1\n>>> x + 1\n2\n", "x = 1\nassert repr((x + 1)) == '2'"),
    ],
)
def test_usage_example_is_found_in_a_docstring(docstring, example):
    assert usage_example(docstring) == example
