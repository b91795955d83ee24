"""vlm/engine.py without vLLM: what it refuses, what it says. tests/engine has what needs vLLM."""

import contextlib
import fcntl
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from runtime import rollouts
from runtime.args import EngineArgs
from runtime.rollouts import TrainingBatch
from vlm import engine
from vlm.engine import Engine, EngineError, OwnSampler, failed, shift
from vlm.policy import Responses


@pytest.mark.parametrize(
    "where", [["vlm"], ["own", "vllm"], ["vllm", "http://a:1"], ["localhost:8700"], ["ftp://a"]]
)
def test_engine_takes_own_vllm_or_urls(where):
    with pytest.raises(ValueError, match="--engine own, vllm, or URLs such as http://host:8700"):
        EngineArgs(engine=where)


def test_own_sampling_is_policy_sample(policy, prompts):
    sampler = EngineArgs().sampler(policy, "m")
    assert isinstance(sampler, OwnSampler) and not EngineArgs().is_used
    (part,) = sampler.parts(len(prompts), 1)
    reads = []

    def read():
        reads.append(policy.read(prompts))
        return reads[0]

    wait = sampler.ask(prompts[part], 2, [1, 2, 3], 6, 1.0)
    assert not reads
    found = wait(read)
    assert len(reads) == 1
    assert torch.equal(found.tokens, policy.sample(prompts, 2, [1, 2, 3], 6).tokens)
    assert torch.equal(found.tokens, wait().tokens)


@pytest.fixture
def prompts(policy):
    from demo.task import make_row

    rows = [make_row("shifted/train", i) for i in range(3)]
    return policy.encode([row["problem"] for row in rows], [row["images"] for row in rows])


def test_a_missing_environment_names_its_command(policy, tmp_path):
    with pytest.raises(ValueError, match="no-python is not there: `bash run.sh engine` makes it"):
        Engine(policy, "demo/confident", "float32", ["vllm"], str(tmp_path / "no-python"))


def test_an_environment_without_vllm_names_the_mend(policy, tmp_path):
    python = tmp_path / "python"  # the tests' own environment could have vLLM
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -c "import vllm"\n')
    python.chmod(0o755)
    with pytest.raises(EngineError, match=r"No module named 'vllm': `bash run.sh engine` makes"):
        Engine(policy, "demo/confident", "float32", ["vllm"], str(python))


def test_an_unreachable_server_is_named(policy):
    with pytest.raises(EngineError, match=r"the server http://127.0.0.1:9 cannot be reached .*"):
        Engine(policy, "demo/confident", "float32", ["http://127.0.0.1:9"])


def test_another_family_is_refused(policy, monkeypatch):
    monkeypatch.setattr(policy.model.config, "model_type", "gemma3", raising=False)
    with pytest.raises(ValueError, match="vLLM gives gemma3 other log-probs .*use --engine own"):
        Engine(policy, "m", "float32", ["vllm"])


@pytest.mark.parametrize(
    "said",
    [
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "ValueError: No available memory for the cache blocks.",
        "ValueError: Free memory on device cuda:0 (3.1/79 GiB) on startup is less than desired",
    ],
)
def test_out_of_memory_names_the_option(said):
    assert str(failed("vLLM", said + " x" * 999)).endswith("memory (--engine_memory)")
    assert len(str(failed("vLLM", said + " x" * 999))) < 400


def test_shift_is_by_how_much_the_logits_of_open_tokens_differ():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 50, generator=generator)
    tokens = torch.distributions.Categorical(logits=logits).sample()[:, None]
    old = logits.log_softmax(-1).gather(1, tokens).squeeze(1)
    for size in (0.01, 0.1):
        noise = size * torch.randn(400, 50, generator=generator)
        new = (logits + noise).log_softmax(-1).gather(1, tokens).squeeze(1)
        assert shift(new, old) == pytest.approx(size, rel=0.5)
    few = old.clone()
    few[:100] += 1.0  # rounding in some contexts
    assert shift(few, old) == 0
    assert shift(torch.zeros(3), torch.ones(3)) == 0  # no token is open


@pytest.mark.parametrize(
    "first, later, passes",
    [(0.0, 0.001, True), (0.0, 0.004, False), (0.01, 0.03, True), (0.01, 0.05, False)],
)
def test_later_checks_are_compared_with_the_first(monkeypatch, first, later, passes):
    """In bfloat16: 2e-3, or four times the first."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    responses = Responses(mask.long(), mask, torch.full((2, 3), -0.7), torch.ones(2, 3))
    checker = Engine.__new__(Engine)
    checker.dtype, checker.first, checker.policy = "bfloat16", None, SimpleNamespace()
    p = torch.tensor(-0.7).exp()
    for x, passes_now in ((first, True), (later, passes)):
        pair = (responses.logprobs + x * (1 - p), responses.entropy)
        checker.policy.score = lambda *args, pair=pair: pair
        expected = contextlib.nullcontext() if passes_now else pytest.raises(EngineError)
        with expected:
            checker.compare(["a prompt", "another"], responses, 1.0)


def test_folders_of_dead_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "MEMORY", tmp_path)
    (tmp_path / "saei-engine-dead").mkdir()
    (tmp_path / "other").mkdir()
    alive = tmp_path / "saei-engine-alive"
    alive.mkdir()
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder, own_lock = engine.own_folder()
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "other", alive, folder])
    again, other_lock = engine.own_folder()
    assert folder.exists() and alive.exists() and again.exists()
    for descriptor in (lock, own_lock, other_lock):
        os.close(descriptor)


def test_a_child_knows_nothing_of_the_other_processes(monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_FSDP")
    for name in (*names, "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    found = engine.child_environment(1)
    assert not {*names, "TORCHELASTIC_RUN_ID"} & found.keys()
    assert found["CUDA_VISIBLE_DEVICES"] == "6" and found["PATH"] == os.environ["PATH"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert engine.child_environment(3)["CUDA_VISIBLE_DEVICES"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in engine.child_environment(None)


def test_weights_of_adversarial_responses_are_of_their_own_images():
    """Two prompts, a clean and an adversarial response each, of 2 and 3 tokens."""
    mask = torch.tensor([[[1, 1, 0], [1, 1, 1]]] * 2, dtype=torch.bool)
    sampler, old = torch.zeros(2, 2, 3), torch.full((4, 3), 0.1)
    on_attacked = torch.full((2, 3), 2.0)
    fields = dict.fromkeys(TrainingBatch._fields)
    batch = TrainingBatch(**fields | {"mask": mask, "sampler_logprobs": sampler})
    weights, metrics = rollouts.engine_weights(batch, old, on_attacked, 3.0, mask.sum())
    e = torch.tensor(0.1).exp().item()
    want = torch.tensor([[e, e, 1.0], [3.0, 3.0, 3.0]] * 2)
    torch.testing.assert_close(weights, want)
    large = torch.tensor(2.0).exp().item()
    assert metrics["engine/ratio"].item() == pytest.approx((2 * e + 3 * large) / 5)
    assert metrics["engine/cut"].item() == pytest.approx(3 / 5)
    assert metrics["engine/ratio_max"].item() == pytest.approx(large)
    weights, _ = rollouts.engine_weights(batch, old, None, 3.0, mask.sum())
    torch.testing.assert_close(weights, torch.where(mask, e, 1.0).flatten(0, 1))
