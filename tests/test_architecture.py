"""What imports what, read from the sources, and how large the top level is.

Arrows point one way: train_saei, eval -> runtime -> vlm -> the core modules, which travel alone.
"""

import ast
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

CORE = {"egas", "tsec", "grpo", "rewards"}
FREE = {"study", "benchmarks", "docs"}  # they import everything, only each other and tests them
EVERYTHING = CORE | FREE | {"vlm", "runtime", "extras", "demo", "train_saei", "eval"}
# What a module or package may import of ours. runtime reads demo's rows as a data set.
ALLOWED = dict.fromkeys(CORE, set()) | {
    "vlm": {"vlm", "tsec", "grpo"},
    "runtime": {"runtime", "vlm", "demo"} | CORE,
    "demo": {"demo"},
    "train_saei": {"runtime", "vlm", "extras"} | CORE,
    "eval": {"runtime", "vlm"} | CORE,
    "extras": EVERYTHING - FREE,
    "tests": EVERYTHING | {"tests"},
}
ALLOWED |= dict.fromkeys(FREE, EVERYTHING | {"tests"})
Sources = dict[str, str]  # {module: its text}


def read_sources(root: Path, files: list[str]) -> Sources:
    """{"vlm.policy": text, "vlm": text of its __init__.py, ...}"""
    sources = {}
    for file in files:
        if file.endswith(".py"):
            name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            sources[name] = (root / file).read_text()
    return sources


def imported(name: str, text: str, sources: Sources) -> set[str]:
    """The modules of `sources` that a module imports, at the top or inside of a function."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= {base} | names
    return {module for module in found if module in sources or is_ours(module, sources)}


def is_ours(module: str, sources: Sources) -> bool:
    """A folder of ours, or a name in one of our files."""
    parts = module.split(".")
    return any(other.split(".")[: len(parts)] == parts for other in sources)


def wrong_imports(sources: Sources) -> list[str]:
    found = []
    for name, text in sources.items():
        allowed = ALLOWED.get(name.split(".")[0], set())
        for module in sorted(imported(name, text, sources)):
            if module.split(".")[0] not in allowed:
                found.append(f"{name} imports {module}")
    return found


def circle(sources: Sources) -> list[str]:
    """The modules of one circle of imports, or an empty list."""
    arrows = {}
    for name, text in sources.items():
        arrows[name] = sorted(imported(name, text, sources) & sources.keys())
    done = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in arrows[name]:
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in sources)), [])


def root_entries(files: list[str]) -> set[str]:
    return {file.split("/")[0] for file in files if not file.startswith(".")}


def top_level_lines(sources: Sources) -> int:
    packages = {name.split(".")[0] for name in sources if "." in name}
    total = 0
    for name, text in sources.items():
        if name.split(".")[0] not in packages:
            total += len(text.splitlines())
    return total


# ----------------------------------------------------------------------------------- our sources


@pytest.fixture(scope="module")
def files():
    """Of the repository; of a folder without git, all but what the tests and run.sh leave."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    listed = done.stdout.split("\n")
    if done.returncode:
        listed = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
    kept = []
    for file in listed:
        generated = file.startswith((".", "out/")) or "__pycache__" in file
        if file and not generated and (ROOT / file).is_file():
            kept.append(file)
    return kept


@pytest.fixture(scope="module")
def sources(files):
    return read_sources(ROOT, files)


def test_arrows_point_one_way(sources):
    assert wrong_imports(sources) == []


def test_no_circle_of_imports(sources):
    assert circle(sources) == []


def test_the_root_has_at_most_22_entries(files):
    assert len(root_entries(files)) <= 22


def test_the_top_level_is_short(sources):
    assert top_level_lines(sources) <= 1965
    assert len(sources["train_saei"].splitlines()) <= 345


# ---------------------------------------------------------------------------- the checks can fail


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("egas", "import tsec", "egas imports tsec"),
        ("rewards", "def f():\n    from vlm.policy import Policy", "rewards imports vlm.policy"),
        ("vlm.policy", "import egas", "vlm.policy imports egas"),
        ("vlm.policy", "from runtime import data", "vlm.policy imports runtime"),
        ("runtime.report", "import study.tables as t", "runtime.report imports study.tables"),
        ("runtime.run", "from train_saei import main", "runtime.run imports train_saei"),
        ("runtime.run", "from extras import x", "runtime.run imports extras"),
        ("eval", "from extras.x import y", "eval imports extras.x"),
        ("train_saei", "from benchmarks import step", "train_saei imports benchmarks"),
        ("extras.x", "import study.tables", "extras.x imports study.tables"),
        ("demo.task", "import grpo", "demo.task imports grpo"),
    ],
)
def test_a_wrong_import_is_found(name, text, said):
    others = ["tsec", "egas", "grpo", "train_saei", "vlm.policy", "runtime.data", "study.tables"]
    sources = dict.fromkeys([*others, "extras.x", "benchmarks.step"], "import torch, numpy.tests")
    assert wrong_imports(sources) == []
    found = wrong_imports(sources | {name: text})
    assert said in found and all(line.startswith(f"{name} imports ") for line in found)


@pytest.mark.parametrize("text", ["import b", "from b import x", "def f():\n    from b import x"])
def test_a_circle_is_found(text):
    sources = {"a": text, "b": "import runtime.c", "runtime.c": "from . import d", "d": ""}
    sources |= {"runtime.d": "from d import x"}
    assert circle(sources) == []
    assert sorted(set(circle(sources | {"d": "import a"}))) == [
        "a",
        "b",
        "d",
        "runtime.c",
        "runtime.d",
    ]
    assert circle({"a": "import a"}) == ["a", "a"]


def test_sources_entries_and_lines_are_counted(tmp_path):
    files = [
        "a.py",
        "eval.py",
        "vlm/__init__.py",
        "vlm/policy.py",
        ".ci/run",
        "run.sh",
        "docs/a/b.md",
    ]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1\n2\n")
    sources = read_sources(tmp_path, files)
    assert set(sources) == {"a", "eval", "vlm", "vlm.policy"} and top_level_lines(sources) == 4
    assert root_entries(files) == {"a.py", "eval.py", "vlm", "run.sh", "docs"}
