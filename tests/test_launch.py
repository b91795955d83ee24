"""Two steps of SaEI on every family, as a user starts them: accelerate launch train_saei.py."""

import json
import os
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT, finish, start
from transformers import AutoModelForImageTextToText

from tests.families import KINDS, PICTURES, PROBLEMS, checkpoint
from tests.short_run import arguments, write_rows

LAUNCHED = ["qwen3_5_moe"]  # in a process of its own; the others need not import everything again


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    pairs = list(zip(PROBLEMS, PICTURES, strict=True))
    return write_rows(tmp_path_factory.mktemp("rows"), pairs)


def run_script(words: list[str]) -> None:
    sys.argv = ["train_saei.py", *words]
    runpy.run_path(str(ROOT / "train_saei.py"), run_name="__main__")


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_from_the_command_line(kind, rows, tmp_path):
    """One, two and no pictures; self-check, attack, update. The checkpoint loads and has moved."""
    out, reward = tmp_path / "out", f"{ROOT}/tests/short_run.py:by_length"
    words = arguments(checkpoint(kind), rows, out, steps=2, save_every=2, reward=reward)
    if kind in LAUNCHED:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        command = [*launcher, "--cpu", "train_saei.py", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        finish(start(1, run_script, words))
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and all(line["grad_norm"] > 0 for line in metrics)
    assert all(line["attack/linf"] > 0 for line in metrics)
    trained = AutoModelForImageTextToText.from_pretrained(out / "checkpoints/step-000002")
    before = AutoModelForImageTextToText.from_pretrained(checkpoint(kind)).state_dict()
    moved = [name for name, w in trained.state_dict().items() if not w.equal(before[name])]
    assert any("language_model" in name or "text_model" in name for name in moved)
