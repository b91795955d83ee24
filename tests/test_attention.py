"""vlm/attention.py, and flash_attention_2 in every family, with reference kernels."""

import pytest
import torch

from tests import fake_flash, families
from vlm.attention import without_flash
from vlm.families import FAMILIES
from vlm.policy import Policy

NEEDS_MASK = [kind for kind, family in FAMILIES.items() if family.token_types]


def implementations(policy) -> set[str]:
    return {x.config._attn_implementation for x in policy.model.modules() if hasattr(x, "config")}


@pytest.fixture
def flash_policy():
    policy = families.make_policy("qwen2_5_vl")
    fake_flash.use(policy.model)
    return policy


def test_sampling_runs_with_sdpa_and_the_prompt_pass_with_flash(flash_policy):
    """Prompts of unequal length: no flash call per token. Tokens are those of sdpa."""
    inputs = (families.PROBLEMS, families.PICTURES)
    want = families.shared_policy("qwen2_5_vl")
    want = want.sample(want.encode(*inputs), 2, [1, 2, 3], 6)
    with fake_flash.installed() as calls:
        prompts = flash_policy.encode(*inputs)
        read = flash_policy.read(prompts)
        assert calls["varlen"] > 0
        calls.clear()
        sampled = flash_policy.sample(prompts, 2, [1, 2, 3], 6, read=read)
        assert not calls
        flash_policy.sample(prompts, 2, [1, 2, 3], 6)
        assert calls["varlen"] > 0  # it reads the prompts itself
    assert torch.equal(sampled.tokens, want.tokens)
    torch.testing.assert_close(sampled.logprobs, want.logprobs, atol=2e-5, rtol=0)


def test_flash_is_back_after_sampling_and_after_an_error(flash_policy):
    decoder = flash_policy.model.get_decoder()
    with without_flash(decoder):
        assert implementations(flash_policy) == {"sdpa", "flash_attention_2"}  # of the tower
    with pytest.raises(KeyError), without_flash(decoder):
        raise KeyError
    assert implementations(flash_policy) == {"flash_attention_2"}


@pytest.mark.parametrize("kind", families.KINDS)
def test_flash_equals_sdpa_or_is_refused(kind):
    """Log-probs of responses to prompts of unequal length, with one, two and no pictures."""
    policy = families.make_policy(kind)
    tokens, mask = families.responses(policy, 3, 2, 5)
    prompts = policy.encode(families.PROBLEMS, families.PICTURES)
    with torch.no_grad(), fake_flash.installed() as calls:
        want = policy.score(prompts, tokens, mask)[0][mask]
        fake_flash.use(policy.model)
        ours = policy.score(prompts, tokens, mask)[0][mask]
    assert calls["varlen"] > 0
    difference = (ours - want).abs().max()
    if kind not in NEEDS_MASK:
        assert difference < 2e-5
        return
    assert difference > 0.1  # else it need not be refused
    with pytest.raises(ValueError, match=f"'{kind}' model, .* set --attention sdpa$"):
        Policy.from_pretrained(families.checkpoint(kind), attention="flash_attention_2")
