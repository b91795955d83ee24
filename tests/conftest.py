"""A tiny random Qwen2.5-VL of the demo's architecture, in double precision where a test compares to rounding."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demo.make_demo import build_model, build_processor
from demo.task import make_row
from vlm.policy import Policy

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


def launch(processes: int, *arguments: str) -> None:
    """Run a script of ours on CPU processes joined by gloo.

    torchrun, because `accelerate launch --cpu --num_processes 2` of accelerate 1.15 starts one process, without a word.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(autouse=True)
def signals():
    """A run that ends by an error leaves its handlers: later tests, and Ctrl-C, need the old ones."""
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
