"""Every family that --engine takes: tiny models of the real classes in vLLM, against the policy."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.conftest import differences, perturb
from tests import reference, tiny
from tests.families import picture
from vlm.engine import FEATURES, PIXELS, Engine
from vlm.policy import Policy

PROBLEMS = ["How many ?", "How many dice ?", "Is <image> like <image> ?"]
PICTURES = [[picture(60, 90)], [], [picture(150, 60, 1), picture(40, 40, 2)]]
# Released checkpoints have these parts of a tower in `vision_model`. transformers has not.
OF_TOWER = r"vision_tower\.(embeddings|encoder|pre_layrnorm|post_layernorm)\."


def checkpoint(kind: str, folder) -> str:
    torch.manual_seed(0)
    model, processor = tiny.build(kind, wide=True)
    reference.sharpen(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    if kind.startswith("llava"):
        path = folder / "model.safetensors"
        weights = load_file(path)
        names = [re.sub(OF_TOWER, r"vision_tower.vision_model.\1.", name) for name in weights]
        save_file(dict(zip(names, weights.values(), strict=True)), path, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("kind", sorted({*FEATURES, *PIXELS} - {"qwen3_5"}))
def test_log_probs_entropies_and_weights_are_the_policy_s(kind, tmp_path):
    model = checkpoint(kind, tmp_path)
    policy = Policy.from_pretrained(model)
    prompts = policy.encode(PROBLEMS, PICTURES)
    generator, images = torch.Generator().manual_seed(0), []
    for x in prompts.images:
        signs = torch.randint(2, x.shape, generator=generator) * 2 - 1
        images.append((x + 0.2 / 255 * signs).clamp(0, 1))  # lost in 8 bits
    attacked = prompts.with_images(images)
    with Engine(policy, model, "float32", ["vllm"]) as vllm:
        vllm.load_weights()
        for asked in (prompts, attacked):
            found = vllm.sample(asked, 4, [1, 2, 3], 12)
            own = policy.sample(asked, 4, [1, 2, 3], 12)
            logprobs, entropy = differences(policy, asked, found)
            assert logprobs < 5e-5 and entropy < 2e-5
            assert torch.equal(found.tokens, own.tokens)
        assert differences(policy, prompts, found)[0] > 1e-3
        perturb(policy)
        vllm.load_weights()
        found = vllm.sample(attacked, 4, [1, 2, 3], 12)
        assert differences(policy, attacked, found)[0] < 5e-5


def test_linear_attention_in_bfloat16(tmp_path):
    """vLLM has no other on a CPU. The policy in bfloat16 is itself 0.16 off the one in float32."""
    model = checkpoint("qwen3_5", tmp_path)
    policy = Policy.from_pretrained(model, "bfloat16")
    prompts = policy.encode(PROBLEMS, PICTURES)
    with Engine(policy, model, "bfloat16", ["vllm"]) as vllm:
        vllm.load_weights()
        old = vllm.sample(prompts, 4, [1, 2, 3], 12)
        assert max(differences(policy, prompts, old)) < 0.3
        vllm.compare(prompts, old, 1.0)
        perturb(policy)
        assert differences(policy, prompts, old)[0] > 0.6
        vllm.load_weights()
        found = vllm.sample(prompts, 4, [1, 2, 3], 12)
        assert max(differences(policy, prompts, found)) < 0.3
        inverted = prompts.with_images([1 - x for x in prompts.images])
        assert differences(policy, inverted, found)[0] > 0.6
