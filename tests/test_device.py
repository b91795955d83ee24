"""The policy and a training step on the GPU, and on the CPU where there is none.

The device computes in float32. It is compared with float64 on the CPU.
"""

import json

import pytest
import torch
from conftest import comparable, metrics_of, parameters, short

import train_saei
from tests import device_cases as cases
from tests import families
from vlm.policy import Policy

DEVICE = cases.device()
TOLERANCE = {  # of float32; attacked images: the share of pixels that may differ
    "log-probs": 1e-4,
    "entropies": 1e-4,
    "attacked images": 0.02,
    "attacked entropy": 1e-3,
    "gradients": 1e-3,
}
FAMILIES = ["qwen3_vl", "smolvlm", "gemma3", "qwen3_5"]
if DEVICE.type == "cuda":
    FAMILIES += ["qwen2_vl", "llava", "llava_onevision", "internvl", "gemma3n", "gemma4", "glm4v"]
    FAMILIES += ["mistral3", "lfm2_vl", "cohere2_vision"]


@pytest.fixture(scope="module")
def policy():
    return cases.demo_policy(DEVICE)


@pytest.fixture(scope="module")
def exact():
    return cases.demo_policy("cpu", "float64")


@pytest.fixture(scope="module")
def responses(exact):
    return cases.sample(exact)


def test_prompts_are_on_the_device_and_the_same(policy, exact):
    ours, theirs = cases.encode(policy), cases.encode(exact)
    for name in ("ids", "mask", "positions", "next_position"):
        found = getattr(ours, name)
        assert found.device.type == DEVICE.type, name
        assert torch.equal(found.cpu(), getattr(theirs, name)), name
    for a, b in zip(ours.images, theirs.images, strict=True):
        assert a.device.type == DEVICE.type and torch.equal(a.cpu(), b)


def test_samples_are_those_of_float64(policy, responses):
    """All tokens: no uniform number falls between the two cumulative distributions here."""
    found = cases.sample(policy)
    assert found.tokens.device.type == DEVICE.type
    assert torch.equal(found.tokens.cpu(), responses.tokens)
    for name in ("logprobs", "entropy"):
        a, b = getattr(found, name).cpu(), getattr(responses, name)
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), atol=1e-4, rtol=0)


def test_a_step_is_that_of_float64(policy, exact, responses):
    apart = cases.differences(cases.numbers(policy, responses), cases.numbers(exact, responses))
    for name, limit in TOLERANCE.items():
        assert apart[name] <= limit, (name, apart[name])
    assert apart["log-probs"] > 0  # float32 and float64 were compared


def test_the_attack_raises_the_entropy(policy, responses):
    def objective(eps: float) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cases, "EPS", eps)
            return cases.numbers(policy, responses)["attacked entropy"][0]

    assert (objective(4 / 255) > objective(0.0)).all()


@pytest.mark.parametrize("way, limit", [("float32", 1e-4), ("autocast", 0.2), ("bfloat16", 0.2)])
def test_sampling_and_scoring_agree(way, limit):
    """The ratio of the first update is 1, up to the rounding of the precision."""
    policy = cases.demo_policy(DEVICE, "float32" if way == "autocast" else way)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=way == "autocast"):
        found = cases.ratios(policy)
    assert found["largest"] <= limit and found["mean"] <= limit / 20


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_scores_on_the_device_as_in_float64(kind):
    policy, found = families.make_policy(kind), []
    tokens, mask = families.responses(policy, P=3, n=2, T=6)
    for device in (DEVICE, "cpu"):
        if device == "cpu":
            policy.model.double()
        policy.to(device)
        prompts = policy.encode(families.PROBLEMS, families.PICTURES)
        with torch.no_grad():
            scores = policy.score(prompts, tokens.to(device), mask.to(device))
        found.append([x.double().cpu()[mask] for x in scores])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        assert not torch.equal(a, b)


def test_self_check_on_the_device(policy):
    found = policy.self_check()
    assert found["pixels"] <= 1e-5 and found["logits"] <= 1e-3


def test_a_run_saves_and_resumes_on_the_device(tiny, tmp_path, half_right):
    """It ends where a run without a break ends. Bit for bit: benchmarks/gpu.py, which takes
    deterministic operators."""
    train_saei.main(short(tiny, tmp_path / "whole", steps=4, save_every=4))
    train_saei.main(short(tiny, tmp_path / "cut", steps=2, save_every=2))
    train_saei.main(short(tiny, tmp_path / "cut", steps=4, save_every=2, resume=True))
    a, b = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "cut")
    assert [line["step"] for line in b] == [0, 1, 2, 3]
    for one, other in zip(a, b, strict=True):
        assert comparable(one) == pytest.approx(comparable(other), rel=0.05, abs=0.05)
    last = tmp_path / "cut/checkpoints/step-000004"
    moved = parameters(last)
    for name, value in parameters(tmp_path / "whole/checkpoints/step-000004").items():
        # AdamW turns rounding of a gradient near 0 into a whole step, of few numbers.
        assert (moved[name] - value).abs().mean() <= 1e-4, name
    policy = Policy.from_pretrained(str(last)).to(DEVICE)
    assert cases.sample(policy).mask.any(dim=1).all()
    assert json.dumps(a[-1])  # plain numbers
