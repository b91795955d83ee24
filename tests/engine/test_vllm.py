"""vLLM as the sampler: what it gives against Policy.sample and Policy.score, weights, failures."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.conftest import MODEL, differences, encode, perturb
from vlm import adapt, engine
from vlm.engine import Engine, EngineError
from vlm.policy import Policy


def share_of_equal_rows(a, b) -> float:
    width = max(a.tokens.shape[1], b.tokens.shape[1])
    pair = [torch.nn.functional.pad(x.tokens, (0, width - x.tokens.shape[1])) for x in (a, b)]
    return (pair[0] == pair[1]).all(dim=1).float().mean().item()


# ------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0, 0.0])
@pytest.mark.parametrize("n", [1, 8])
def test_tokens_log_probs_and_entropies_are_those_of_policy_sample(
    policy, vllm, prompts, seeds, temperature, n
):
    found = vllm.sample(prompts, n, seeds, 64, temperature)
    own = policy.sample(prompts, n, seeds, 64, temperature)
    assert share_of_equal_rows(found, own) >= 0.98  # one number may lie between two roundings
    logprobs, entropy = differences(policy, prompts, found, temperature)
    assert logprobs < 5e-5 and entropy < (1e-5 if temperature == 1 else 2e-5)
    if temperature == 1:
        assert len(found.tokens.unique(dim=0)) > 0.5 * len(found.tokens)


def test_an_attack_below_one_grey_level_acts(policy, vllm, prompts, seeds):
    generator = torch.Generator().manual_seed(0)
    images = []
    for x in prompts.images:
        signs = torch.randint(2, x.shape, generator=generator) * 2 - 1
        images.append((x + 0.2 / 255 * signs).clamp(0, 1))
        assert torch.equal((images[-1] * 255).round(), (x * 255).round())  # lost in 8 bits
    attacked = prompts.with_images(images)
    found = vllm.sample(attacked, 4, seeds, 64)
    assert differences(policy, attacked, found)[0] < 5e-5
    assert differences(policy, prompts, found)[0] > 1e-2
    assert share_of_equal_rows(found, policy.sample(attacked, 4, seeds, 64)) >= 0.98


def test_responses_depend_on_their_own_seed_alone(vllm, prompts, seeds):
    together = vllm.sample(prompts, 4, seeds, 64)
    again = vllm.sample(prompts, 4, seeds, 64)
    assert torch.equal(together.tokens, again.tokens)
    alone = vllm.sample(prompts[3:4], 4, seeds[3:4], 64)
    width = alone.tokens.shape[1]
    assert torch.equal(alone.tokens, together.tokens[12:16, :width])
    waits = [vllm.ask(prompts[i : i + 4], 4, seeds[i : i + 4], 64) for i in (0, 4, 8, 12)]
    for i in (3, 0, 2, 1):  # asked at once, waited for in another order
        part = waits[i]()
        width = part.tokens.shape[1]
        assert torch.equal(part.tokens, together.tokens[16 * i : 16 * i + 16, :width])


def test_end_tokens_masks_and_padding(policy, vllm, prompts, seeds):
    for T in (2, 20, 64):
        found = vllm.sample(prompts, 4, seeds, T)
        for tokens, mask in zip(found.tokens, found.mask, strict=True):
            length = int(mask.sum())
            assert mask[:length].all() and (tokens[length:] == policy.pad_id).all()
            ends = [t for t in range(length) if int(tokens[t]) in policy.eos_ids]
            assert ends == [length - 1] or (not ends and length == T)
    assert found.truncated(policy.eos_ids).sum() < len(found.tokens)


def test_banned_tokens_are_not_sampled_and_have_no_probability(policy, vllm, prompts, seeds):
    usual = vllm.sample(prompts, 4, seeds, 64)
    frequent = usual.tokens[usual.mask].bincount().argsort(descending=True)[:5].tolist()
    banned = [i for i in frequent if i not in policy.eos_ids]
    before = policy.banned.clone()
    try:
        policy.banned[banned] = True
        vllm.load_weights()
        for temperature in (1.0, 2.0):
            found = vllm.sample(prompts, 8, seeds, 64, temperature)
            assert not policy.banned[found.tokens[found.mask]].any()
            logprobs, entropy = differences(policy, prompts, found, temperature)
            assert logprobs < 5e-5 and entropy < 2e-5
    finally:
        policy.banned.copy_(before)


def test_no_picture_one_and_three(policy, vllm, prompts):
    picture = encode_pictures()
    problems = ["How many pips?", "Is <image> like <image> or <image>?", "How many pips?"]
    mixed = policy.encode(problems, [[], picture, picture[:1]])
    found = vllm.sample(mixed, 4, [1, 2, 3], 32)
    assert differences(policy, mixed, found)[0] < 5e-5
    assert share_of_equal_rows(found, policy.sample(mixed, 4, [1, 2, 3], 32)) >= 0.9


def encode_pictures():
    from demo.task import make_row

    first = make_row("shifted/train", 0)["images"][0]
    return [first, first.resize((128, 64)), first.resize((64, 128))]


# -------------------------------------------------------------------------------------- weights


def test_new_weights_are_seen_and_old_ones_found(policy, vllm, prompts, seeds):
    vllm.compare(prompts, vllm.sample(prompts, 4, seeds, 64), 1.0)
    perturb(policy)
    old = vllm.sample(prompts, 4, seeds, 64)
    with pytest.raises(EngineError, match="disagree: mean difference of log-probs 0.0"):
        vllm.compare(prompts, old, 1.0)
    vllm.load_weights()
    new = vllm.sample(prompts, 4, seeds, 64)
    assert vllm.compare(prompts, new, 1.0)["logprobs"] < 5e-6
    assert differences(policy, prompts, new)[0] < 1e-4
    assert share_of_equal_rows(new, old) < 0.5


def test_frozen_parts_are_sent_once(policy, prompts, seeds, monkeypatch):
    policy = Policy.from_pretrained(MODEL)
    for name, p in policy.model.named_parameters():
        p.requires_grad_(".layers.3." in name)
    with Engine(policy, MODEL, "float32", ["vllm"]) as vllm:
        vllm.load_weights()
        assert len(vllm._weights(whole=True)) > 40
        sent = vllm._weights(whole=False)
        assert sent and all(".layers.3." in name for name in sent)
        perturb(policy, 0.5, lambda name: ".layers.3." in name)
        vllm.load_weights()
        assert vllm.compare(prompts, vllm.sample(prompts, 4, seeds, 64), 1.0)["logprobs"] < 5e-6


def test_lora_is_merged(prompts, seeds):
    policy = Policy.from_pretrained(MODEL)
    adapt.add_lora(policy, 4, seed=0)
    with Engine(policy, MODEL, "float32", ["vllm"]) as vllm:
        vllm.load_weights()
        perturb(policy, 1.0, lambda name: ".lora_" in name)
        with torch.no_grad():
            for name, p in policy.model.named_parameters():
                if ".lora_B" in name:
                    p += 0.02
        old = vllm.sample(prompts, 4, seeds, 64)
        with pytest.raises(EngineError, match="disagree"):
            vllm.compare(prompts, old, 1.0)
        vllm.load_weights()
        names = vllm._weights(whole=False)
        assert names and not any("lora" in name or "embed" in name for name in names)
        assert vllm.compare(prompts, vllm.sample(prompts, 4, seeds, 64), 1.0)["logprobs"] < 5e-6


@pytest.mark.parametrize(
    "part, said",
    [
        ("nothing", None),
        ("prefix cache", "disagree"),
        ("encoder cache", "Encoder cache miss"),
        ("head", "disagree"),
    ],
)
def test_what_a_partial_synchronisation_leaves_is_found(prompts, seeds, monkeypatch, part, said):
    """The parts of it, each left out on purpose, with a frozen tower: the same features again."""
    monkeypatch.setattr(engine, "CHILD", "tests.engine.broken_child")
    monkeypatch.setenv("BROKEN", part)
    policy = Policy.from_pretrained(MODEL)
    with Engine(policy, MODEL, "float32", ["vllm"]) as vllm:
        expected = pytest.raises(EngineError, match=said) if said else contextlib.nullcontext()
        with expected:
            vllm.load_weights()
            vllm.compare(prompts, vllm.sample(prompts, 4, seeds, 64), 1.0)
            perturb(policy, 0.3, lambda name: "visual" not in name)
            vllm.load_weights()
            vllm.compare(prompts, vllm.sample(prompts, 4, seeds, 64), 1.0)


def test_in_bfloat16_weights_of_one_step_before_are_found_and_good_ones_pass(seeds):
    """Steps of the demo's learning rate. The limit is 2e-3."""
    policy = Policy.from_pretrained(MODEL)
    prompts = encode(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-4)

    def precision():  # a new one each time: it keeps rounded weights
        return torch.autocast("cpu", torch.bfloat16)

    with Engine(policy, MODEL, "bfloat16", ["vllm"]) as vllm:
        vllm.load_weights()
        with precision():
            found = vllm.sample(prompts, 4, seeds, 64)
            assert 0 < vllm.compare(prompts, found, 1.0)["shift"] < 1e-3
        for _ in range(2):
            with precision():
                _, entropy = policy.score(prompts[:4], found.tokens[:16], found.mask[:16])
                (-entropy[found.mask[:16]].mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            with precision():
                old = vllm.sample(prompts, 4, seeds, 64)
                with pytest.raises(EngineError, match="disagree: .* median shift") as error:
                    vllm.compare(prompts, old, 1.0)
            print(error.value)
            vllm.load_weights()
            with precision():
                found = vllm.sample(prompts, 4, seeds, 64)
                assert vllm.compare(prompts, found, 1.0)["shift"] < 1e-3


# ------------------------------------------------------------------------------------- failures


def test_a_child_that_dies_is_started_filled_and_asked_again(policy, vllm, prompts, seeds, capfd):
    expected = vllm.sample(prompts, 4, seeds, 64)
    os.kill(vllm.connections[0].process.pid, signal.SIGKILL)
    assert torch.equal(vllm.sample(prompts, 4, seeds, 64).tokens, expected.tokens)
    waits = [vllm.ask(prompts[i : i + 8], 4, seeds[i : i + 8], 64) for i in (0, 8)]
    os.kill(vllm.connections[0].process.pid, signal.SIGKILL)  # in mid-generation
    parts = [wait() for wait in waits]
    assert torch.equal(parts[1].tokens, expected.tokens[32:, : parts[1].tokens.shape[1]])
    os.kill(vllm.connections[0].process.pid, signal.SIGKILL)
    vllm.load_weights()
    assert torch.equal(vllm.sample(prompts, 4, seeds, 64).tokens, expected.tokens)
    assert "died (code -9); starting it again" in capfd.readouterr().err


def test_a_child_that_dies_again_and_again_ends_the_run(policy, prompts, seeds, monkeypatch):
    monkeypatch.setattr(engine, "RESTARTS", 1)
    with Engine(policy, MODEL, "float32", ["vllm"]) as vllm:
        vllm.load_weights()
        child = vllm.connections[0]
        start = child._start

        def start_and_kill():
            start()
            child.process.kill()

        child._start = start_and_kill
        child.process.kill()
        with pytest.raises(EngineError, match="died 2 times .*or use --engine own"):
            vllm.sample(prompts, 4, seeds, 64)


def test_another_model_is_refused(policy):
    with pytest.raises(ValueError, match="has model 'mixed', the trainer 'confident'"):
        Engine(policy, MODEL, "float32", ["vllm"])._compare(
            type("C", (), {"name": "x", "info": {"model": "demo/mixed"}})(), MODEL
        )


def test_an_unsupported_version_is_refused(policy, monkeypatch):
    monkeypatch.setattr(engine, "CHILD", "tests.engine.broken_child")
    monkeypatch.setenv("BROKEN", "version")
    with pytest.raises(EngineError, match=r"vLLM 0\.\d+\.\d+ is not supported.*run.sh engine"):
        Engine(policy, MODEL, "float32", ["vllm"])


def test_a_killed_trainer_leaves_nothing(tmp_path):
    """Its child ends by itself, and the next engine removes its folder in memory."""
    code = (
        "import os, sys; from vlm.engine import Engine; from vlm.policy import Policy\n"
        f"e = Engine(Policy.from_pretrained('{MODEL}'), '{MODEL}', 'float32', ['vllm'])\n"
        "print(e.connections[0].process.pid, e.folder, flush=True); sys.stdin.read()"
    )
    root = Path(engine.PROJECT)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": root}
    trainer = subprocess.Popen([sys.executable, "-c", code], **pipes)
    child, folder = trainer.stdout.readline().split()
    assert Path(folder).exists()
    trainer.kill()
    trainer.wait()
    end = time.time() + 20
    with contextlib.suppress(ProcessLookupError):
        while time.time() < end:
            os.kill(int(child), 0)
            time.sleep(0.2)
        pytest.fail("the child lives on")
    mine, lock = engine.own_folder()
    assert not Path(folder).exists() and mine.exists()
    os.close(lock)
    mine.rmdir()


def test_a_prompt_that_is_too_long_ends_in_one_line(policy, seeds):
    long = policy.encode(["0 " * 40_000], [[]])
    with Engine(policy, MODEL, "float32", ["vllm"]) as vllm:
        vllm.load_weights()
        with pytest.raises(EngineError, match="vLLM .*: .*(length|longer|context|maximum)"):
            vllm.sample(long, 1, seeds[:1], 4)
