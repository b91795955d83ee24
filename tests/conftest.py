"""Shared fixtures and helpers: a tiny random Qwen2.5-VL, short runs of it, launches of processes.

The policy has the demo's architecture. Tests that compare to rounding make it double precision.
"""

import json
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import hypothesis
import pytest
import torch
from transformers import AutoModelForImageTextToText

import rewards
import train_saei
from demo.make_demo import build_model, build_processor
from demo.task import make_row
from vlm.policy import Policy

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of subprocesses
ROOT = Path(__file__).resolve().parent.parent
FORK = multiprocessing.get_context("forkserver")  # a new process costs no imports
FORK.set_forkserver_preload(["train_saei", "eval"])

# The same examples in every run. New ones: pytest --hypothesis-profile default
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


def pytest_configure(config):
    """Temporary files of the tests and of their subprocesses go to one folder, deleted at the end.

    torchrun leaves a folder behind for each launch. pytest-xdist's workers inherit the folder.
    """
    if not hasattr(config, "workerinput"):
        multiprocessing.util.get_temp_dir()  # deletes itself, later than pytest_unconfigure
        config.temporary_files = tempfile.mkdtemp(prefix="saei-tests-")
        os.environ["TMPDIR"] = config.temporary_files
        tempfile.tempdir = None  # ask TMPDIR again


def pytest_unconfigure(config):
    if hasattr(config, "temporary_files"):
        shutil.rmtree(config.temporary_files, ignore_errors=True)


def launch(processes: int, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script of ours on CPU processes joined by gloo. check: it must succeed.

    torchrun, because `accelerate launch --cpu --num_processes 2` of accelerate 1.15 starts one
    process and does not say so.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


def start(processes: int, function: Callable, *arguments) -> list[BaseProcess]:
    """function(*arguments) on CPU processes joined by gloo, without a launcher. Started only."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    started = []
    for rank in range(processes):
        environment = {"ACCELERATE_USE_CPU": "true"}
        if processes > 1:
            environment |= common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(FORK.Process(target=_in_process, args=(environment, function, *arguments)))
        started[-1].start()
    return started


def finish(processes: list[BaseProcess], exit_code: int = 0) -> None:
    """Wait until they end, all with that code."""
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [exit_code] * len(processes)


def _in_process(environment: dict[str, str], function: Callable, *arguments) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    function(*arguments)


# --------------------------------------------------------------------------------- short runs


def short(model: str, out: Path, **changes) -> train_saei.Config:
    """The configuration of a run of two steps, each of two prompts with four responses."""
    settings = dict(model=model, split="plain/train", output=str(out), steps=2, save_every=2)
    settings |= dict(prompts_per_step=2, rollouts=4, adversarial_rollouts=2, max_new_tokens=6)
    settings |= dict(pgd_steps=1, lr=1e-3, self_check=False)
    return train_saei.load_config(**settings | changes)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(out: Path) -> list[dict]:
    return lines_of(out / "metrics.jsonl")


def comparable(metrics: dict) -> dict:
    """Without what differs between equal runs."""
    return {k: v for k, v in metrics.items() if not k.startswith(("seconds", "memory"))}


def parameters(checkpoint: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()


def assert_same_run(one: Path, two: Path) -> None:
    """Equal bit for bit: metrics.jsonl, and the last checkpoint's parameters."""
    lines = [[comparable(line) for line in metrics_of(out)] for out in (one, two)]
    assert lines[0] == lines[1]
    last = sorted(one.glob("checkpoints/step-*"))[-1].name
    a, b = (parameters(out / "checkpoints" / last) for out in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)


def reward_half(completions: list[str], **_) -> list[float]:
    """A random policy never answers right. Every other response does here: there is a gradient."""
    return [i % 2.0 for i in range(len(completions))]


@pytest.fixture
def half_right(monkeypatch):
    monkeypatch.setattr(rewards, "accuracy_reward", reward_half)


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """The folder of a run of four steps that nothing interrupts. For reading only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "accuracy_reward", reward_half)
        train_saei.main(short(tiny, out, steps=4, save_every=4, self_check=True))
    return out


# ----------------------------------------------------------------------------------- the policy


@pytest.fixture(autouse=True)
def signals():
    """A test may leave its signal handlers. Later tests, and Ctrl-C, need the old ones."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def processor():
    return build_processor()


@pytest.fixture(scope="session")
def tiny(processor, tmp_path_factory):
    """Its folder, as `--model` takes it."""
    folder = tmp_path_factory.mktemp("tiny")
    model = build_model(processor.tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def policy(tiny):
    return Policy.from_pretrained(tiny)


@pytest.fixture(scope="session")
def rows():
    return [make_row("plain/train", i) for i in range(4)]
