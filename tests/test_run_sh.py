"""run.sh: its commands, what it says at its start and end. Its Python only notes the commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STUB = """#!/bin/sh
echo "$*" >>commands.txt
case "$1" in train_saei.py) mkdir -p "$5/checkpoints/step-000080" "$5/eval" ;; esac
case "$*" in *eval/before*) touch out/demo/eval/before.json ;; esac
"""


@pytest.fixture
def project(tmp_path):
    """run.sh in a folder of its own, whose name has a space, with everything installed."""
    folder = tmp_path / "my project"
    (folder / ".venv/bin").mkdir(parents=True)
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    for name in ("run.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder)
    for file in ("requirements.txt", "requirements-dev.txt"):
        names = ("requirements.txt", file, ".ci/constraints.txt")
        wanted = "".join((folder / name).read_text() for name in names)
        (folder / f".venv/installed-{file}").write_text(wanted)
    (folder / ".venv/bin/python").write_text(STUB)
    (folder / ".venv/bin/python").chmod(0o755)
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """From another working directory."""
    return subprocess.run(
        ["bash", str(folder / "run.sh"), *words],
        cwd="/",
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


def test_the_demo_says_its_minutes_and_ends_with_the_page(project):
    done = run(project)
    assert done.returncode == 0, done.stderr
    first, *_ = done.stdout.splitlines()
    minutes = int(re.search(r"about (\d+) minutes", first)[1])
    parts = [int(part) for part in re.findall(r" (\d)[,.]", first)]
    assert sum(parts) == minutes and f"about {minutes} minutes" in (ROOT / "README.md").read_text()
    assert f"is {project}/out/demo/report/index.html" in done.stdout
    assert f"file://{project}/out/demo/report/index.html".replace(" ", "%20") in done.stdout
    commands = (project / "commands.txt").read_text().splitlines()
    scripts = [command.split()[0] for command in commands]
    assert scripts == ["train_saei.py"] * 2 + ["eval.py"] * 3 + ["-m"]
    assert commands[-1] == "-m runtime.report out/demo out/demo-grpo"
    assert (project / "out/demo-grpo/eval/before.json").exists()


def test_the_engine_has_an_environment_of_its_own(project, monkeypatch):
    """It is made once: where its list is that of its installed packages."""
    (project / ".venv-engine").mkdir()
    shutil.copy(project / ".ci/engine-cpu.txt", project / ".venv-engine/installed")
    no_gpu = project / "bin"
    no_gpu.mkdir()
    (no_gpu / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (no_gpu / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(no_gpu), prepend=":")
    done = run(project, "engine")
    assert done.returncode == 0 and "Installing" not in done.stdout, done.stderr
    assert (project / "commands.txt").read_text() == "-m pytest -q tests/engine\n"


def test_other_words(project):
    assert run(project, "demon").returncode == 2
    assert run(project, "test").returncode == 0
    assert "-m pytest" in (project / "commands.txt").read_text()
