"""Training on a pretended CUDA device (fake_cuda.py): no mixed devices, and how often it waits.

Each case runs in a process of its own, as pretending changes PyTorch for good.
"""

import contextlib
import os
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import FORK, reward_half, short

import egas
import rewards
import train_saei
import tsec
from runtime.run import Run
from tests import families, short_run
from tests.fake_cuda import Pretend, compile_hooks, compiler
from vlm.decode import BLOCK_TOKENS, Decoder
from vlm.policy import Policy

TOKENS, PGD_STEPS = 20, 2  # two blocks of sampling
COUNTED = {
    "read": (Policy, "read"),
    "step": (Decoder, "step"),
    "buffers": (Decoder, "__init__"),
    "run": (Decoder, "run"),
    "score": (Policy, "score"),
    "attack": (egas, "pgd_ascent"),
}
Waits = dict[str, list[list[str]]]  # of each call of what is counted

BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
CASES = {  # options, environment
    "grpo": (dict(intervention="none"), {}),
    "random": (dict(intervention="random"), {}),
    "noise": (dict(intervention="noise", steps=2), {}),
    "clean": (dict(condition="clean", self_check=True), {}),
    "sampled": (dict(condition="sampled", micro_prompts=1), {}),
    "control": (dict(update_control="clip_cov", updates_per_step=2), {}),
    "autocast": (dict(kl_coef=0.1), BF16),
    "LoRA": (dict(dtype="bfloat16", lora_rank=4), {}),
}
FAMILIES = ["qwen2_5_vl", "gemma3", "qwen3_5", "internvl", "smolvlm"]
# For each call. A prompt pass: what transformers' towers read back and make of host numbers.
READ, BUFFERS, SCORE, PGD_STEP = 30, 3, 3, 1


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: tests/test_device.py runs on it")
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("fake_cuda_hooks.cpp is written for Linux on x86-64: run it there")
    if compiler() is None:
        pytest.skip("needs a C++ compiler: apt-get install g++")
    return compile_hooks(tmp_path_factory.mktemp("hooks"))


def in_process(function: Callable, *arguments, **environment):
    """function(*arguments) in a process of its own. An error's traceback fails the test."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_answer, args=(theirs, environment, function, *arguments))
    process.start()
    theirs.close()
    result, error = ours.recv()
    process.join(60)
    assert error is None, error
    return result


def _answer(pipe, environment: dict[str, str], function: Callable, *arguments) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    try:
        pipe.send((function(*arguments), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def train(library: Path, config: train_saei.Config) -> Waits:
    """Train on the pretended device, without CUDA graphs and checkpoints."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (Decoder, "use_graphs", False),
            (Run, "_save", lambda *arguments: None),
            (rewards, "accuracy_reward", reward_half),
            (rewards, "format_reward", short_run.by_length),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        pretend, waits = stack.enter_context(Pretend(library)), {}
        for name, (owner, function) in COUNTED.items():
            waits[name] = stack.enter_context(pretend.counting(owner, function))
        train_saei.main(config)
    return waits


def train_demo(library: Path, model: str, out: Path, options: dict, plant=None) -> Waits:
    lengths = dict(steps=1, max_new_tokens=TOKENS, pgd_steps=PGD_STEPS)
    with plant() if plant else contextlib.nullcontext():
        return train(library, short(model, out, **lengths | options))


def train_family(library: Path, kind: str, out: Path) -> Waits:
    """Three prompts with one picture, with two, with none."""
    rows = short_run.write_rows(out, list(zip(families.PROBLEMS, families.PICTURES, strict=True)))
    changes = dict(max_new_tokens=TOKENS, pgd_steps=PGD_STEPS, self_check=False)
    argv = short_run.arguments(families.checkpoint(kind), rows, out / "run", **changes)
    return train(library, train_saei.load_config(argv))


def check(waits: Waits) -> None:
    """No wait in a step of sampling. One per block, and few for each scored batch and PGD step."""
    assert waits["step"] and not any(waits["step"]), max(waits["step"], key=len)
    most = {name: max((len(call) for call in calls), default=0) for name, calls in waits.items()}
    assert most["read"] <= READ, max(waits["read"], key=len)
    assert most["buffers"] <= BUFFERS, max(waits["buffers"], key=len)
    blocks = -(-(TOKENS - 1) // BLOCK_TOKENS)
    assert most["run"] <= blocks + 1, max(waits["run"], key=len)
    assert most["score"] <= most["read"] + SCORE, max(waits["score"], key=len)
    step = most["read"] + SCORE + PGD_STEP
    assert most["attack"] <= PGD_STEPS * step + 1, max(waits["attack"], key=len)


@pytest.mark.parametrize("case", CASES)
def test_every_arm_and_precision_trains_on_a_device(library, tiny, tmp_path, case):
    options, environment = CASES[case]
    check(in_process(train_demo, library, tiny, tmp_path, options, **environment))


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_train_on_a_device(library, tmp_path, kind):
    check(in_process(train_family, library, kind, tmp_path))


# ------------------------------------------------------------------------------- planted faults


def tokens_on_the_cpu():
    select = tsec.select_tokens
    return mock.patch.object(tsec, "select_tokens", lambda *a, **k: select(*a, **k).cpu())


def a_look_at_every_token():
    draw = Decoder.draw

    def looking(self, hidden):
        draw(self, hidden)
        self.token[0].item()

    return mock.patch.object(Decoder, "draw", looking)


def test_a_tensor_left_on_the_cpu_is_refused(library, tiny, tmp_path):
    with pytest.raises(AssertionError, match="fake_cuda.Mixed: aten.* cuda:0 and cpu"):
        in_process(train_demo, library, tiny, tmp_path, {}, tokens_on_the_cpu)


def test_a_wait_in_the_decode_step_is_found(library, tiny, tmp_path):
    waits = in_process(train_demo, library, tiny, tmp_path, {}, a_look_at_every_token)
    with pytest.raises(AssertionError, match="_local_scalar_dense.*test_fake_cuda.py"):
        check(waits)
