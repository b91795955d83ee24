"""Whole runs with vLLM against the same runs with the policy's own sampling."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.test_server import SECRET, Process
from vlm import engine
from vlm.engine import TOKEN

SMALL = ["--config", "recipes/demo.yaml", "--prompts_per_step", "4", "--rollouts", "4"]
SMALL += ["--adversarial_rollouts", "2", "--pgd_steps", "1", "--max_new_tokens", "40"]
SMALL += ["--micro_prompts", "2", "--self_check", "false"]


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FSDP2 |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def run(*words: str, processes: int = 1, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    environment = engine.child_environment(None) | {"ACCELERATE_USE_CPU": "true"} | variables
    return subprocess.run(
        [*command, *words], cwd=engine.PROJECT, env=environment, capture_output=True, text=True
    )


def train(output: Path, *words: str, steps: int = 10, **options) -> list[dict]:
    arguments = ("--steps", str(steps), "--output", str(output))
    done = run("train_saei.py", *SMALL, *arguments, *words, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    """All but times, memory and what only an engine has."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in b:
            if not name.startswith(("seconds", "memory", "engine")):
                assert a[name] == pytest.approx(b[name], abs=2e-3, rel=2e-3), (a["step"], name)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> list[dict]:
    return train(tmp_path_factory.mktemp("own") / "run")


def test_ten_steps_are_those_of_own_sampling(own, tmp_path):
    ours = train(tmp_path / "run", "--engine", "vllm")
    assert_same(ours, own)
    for metrics in ours:
        assert metrics.keys() - own[0].keys() == {"engine/ratio", "engine/ratio_max", "engine/cut"}
        assert metrics["engine/ratio"] == pytest.approx(1, abs=1e-5)
        assert 1 <= metrics["engine/ratio_max"] < 1.001 and metrics["engine/cut"] == 0


@pytest.mark.parametrize("variables", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_have_a_child_each(own, tmp_path, variables):
    options = {"processes": 2, "steps": 3} | variables
    ours = train(tmp_path / "run", "--engine", "vllm", **options)
    assert_same(ours, own[:3])
    assert max(metrics["engine/ratio_max"] for metrics in ours) < 1.001


def test_two_processes_share_a_server(own, tmp_path):
    server = Process(tmp_path / "log").start().ready()
    options = {"processes": 2, "steps": 3, TOKEN: SECRET}
    try:
        ours = train(tmp_path / "run", "--engine", server.url, **options)
    finally:
        server.kill()
    assert_same(ours, own[:3])


def test_a_run_resumes_where_its_engine_is_gone(own, tmp_path):
    """A checkpoint is good whatever happens to the engine, and goes on with another one."""
    output = tmp_path / "run"
    words = ("--engine", "vllm", "--save_every", "2")
    train(output, *words, steps=4)
    arguments = ("--steps", "6", "--output", str(output), "--resume", "true")
    failed = run("train_saei.py", *SMALL, *arguments, "--engine", "http://127.0.0.1:9")
    assert failed.returncode == 2
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the server http://127.0.0.1:9 cannot be reached")
    ours = train(output, *words, "--resume", "true", steps=6)
    assert_same(ours, own[:6])


def test_evaluation_is_that_of_own_sampling(tmp_path):
    found = []
    for who in ("own", "vllm"):
        words = ("--model", "demo/confident", "--splits", "shifted/test", "--problems", "60")
        done = run("eval.py", *words, "--output", str(tmp_path / who), "--engine", who)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / f"{who}.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
    same = 0
    for a, b in zip(*found, strict=True):
        assert a["greedy"] == b["greedy"]
        same += a["responses"] == b["responses"]
        if a["responses"] == b["responses"]:
            assert a["entropy"] == pytest.approx(b["entropy"], abs=1e-4)
    assert same >= 0.95 * len(found[0])
