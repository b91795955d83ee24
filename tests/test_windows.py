"""vlm/windows.py: windows as a batch equal windows one after another."""

import itertools
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests import families
from vlm import windows
from vlm.policy import Policy

KINDS = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4v",
    "glm46v",
    "glm4v_moe",
    "exaone4_5",
    "kimi_k25",
    "minicpmv4_6",
    "minicpmv4_7",
    "lfm3_vl",
]
SIZES = [(100, 72), (48, 32), (48, 32)]  # the first has windows of several lengths
BOUNDARIES = {
    "one window": [0, 6],
    "equal": [0, 4, 8, 12],
    "in order": [0, 4, 8, 10, 12],
    "mixed": [0, 4, 8, 10, 14, 18, 20, 22, 24, 25],
}


def implementations(policy: Policy) -> set[str]:
    return {x.config._attn_implementation for x in policy.model.modules() if hasattr(x, "config")}


def towers_set_back(policy: Policy) -> None:
    """The library's own loop over windows."""
    for module in policy.model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == windows.NAME:
            config._attn_implementation = "sdpa"


def outputs_and_gradients(policy: Policy) -> list[torch.Tensor]:
    """Log-probs and entropies of responses, and the gradients to the pixels."""
    pictures = [families.picture(*size, seed) for seed, size in enumerate(SIZES)]
    prompts = policy.encode(["which of the two", "how many"], [pictures[:2], pictures[2:]])
    images = [x.clone().requires_grad_() for x in prompts.images]
    tokens, mask = families.responses(policy, 2, 2, 5)
    scores = torch.stack(policy.score(prompts.with_images(images), tokens, mask))[:, mask]
    weights = torch.linspace(-1, 1, scores.numel()).view_as(scores)
    return [scores, *torch.autograd.grad((weights * scores).sum(), images)]


def attention_calls(monkeypatch) -> list[tuple]:
    """Shapes of the queries of every attention call over windows, as they come."""
    calls, attend = [], windows.sdpa_attention_forward

    def counted(module, query, *args, **kwargs):
        calls.append((id(module), tuple(query.shape)))
        return attend(module, query, *args, **kwargs)

    monkeypatch.setattr(windows, "sdpa_attention_forward", counted)
    return calls


@pytest.mark.parametrize("kind", families.KINDS)
def test_families_whose_towers_attend_within_windows(kind):
    assert (windows.NAME in implementations(families.shared_policy(kind))) == (kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loop(kind, monkeypatch):
    """Each layer makes one call per length: all windows of a length are in its batch."""
    policy = families.make_policy(kind)
    calls = attention_calls(monkeypatch)
    ours = outputs_and_gradients(policy)
    keys = [(module, shape[2]) for module, shape in calls]  # layer and length
    assert len(set(keys)) == len(keys) > 0
    assert max(shape[0] for _, shape in calls) > 1
    towers_set_back(policy)
    calls.clear()
    theirs = outputs_and_gradients(policy)
    assert not calls
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.parametrize("name", BOUNDARIES)
def test_one_call_per_length(name, monkeypatch):
    """Keys and values have fewer heads here."""
    edges = BOUNDARIES[name]
    lengths = [end - start for start, end in itertools.pairwise(edges)]
    module = SimpleNamespace(num_key_value_groups=2)
    calls = attention_calls(monkeypatch)
    leaves = [torch.randn(1, heads, edges[-1], 8, requires_grad=True) for heads in (4, 2, 2)]
    ours, _ = windows.batched_windows(module, *leaves, cu_seq_lens_q=torch.tensor(edges))
    batches = [(number, 4, length, 8) for length, number in Counter(lengths).items()]
    assert [shape for _, shape in calls] == batches
    attend = partial(sdpa_attention_forward, module, attention_mask=None, is_causal=False)
    rows = zip(*(x.split(lengths, dim=2) for x in leaves), strict=True)
    theirs = torch.cat([attend(*x)[0] for x in rows], dim=1)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(theirs)
    our_grads = torch.autograd.grad((weights * ours).sum(), leaves)
    their_grads = torch.autograd.grad((weights * theirs).sum(), leaves)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_lengths_reach_the_host_once(monkeypatch):
    """Layers share their boundaries, and so the layout."""
    boundaries = torch.tensor(BOUNDARIES["mixed"])
    first = windows.layout(boundaries)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    assert windows.layout(boundaries) is first


def test_saved_configuration_does_not_hold_it(tmp_path):
    policy = families.make_policy("qwen2_5_vl")
    policy.model.save_pretrained(tmp_path / "ours")
    towers_set_back(policy)
    policy.model.save_pretrained(tmp_path / "theirs")
    ours, theirs = [(tmp_path / name / "config.json").read_text() for name in ("ours", "theirs")]
    assert ours == theirs
    assert windows.NAME not in ours


def test_other_attention_stays():
    eager = Policy.from_pretrained(families.checkpoint("qwen2_5_vl"), attention="eager")
    assert implementations(eager) == {"eager"}
    policy = families.make_policy("qwen2_5_vl")
    policy.model.set_attn_implementation("eager")
    assert implementations(policy) == {"eager"}
