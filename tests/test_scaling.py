"""benchmarks/scaling.py: its FLOPs are those that a tiny model is seen to compute."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scaling import MODELS, Shape, score_flops
from vlm.policy import Policy


def shape_of(model) -> Shape:
    text, vision = model.config.get_text_config(), model.config.vision_config
    head = text.hidden_size // text.num_attention_heads
    return Shape(
        width=text.hidden_size,
        inner=text.intermediate_size,
        layers=text.num_hidden_layers,
        q=text.hidden_size,
        kv=text.num_key_value_heads * head,
        vocabulary=text.vocab_size,
        tied=True,
        v_width=vision.hidden_size,
        v_inner=vision.intermediate_size,
        v_layers=vision.depth,
        v_full=len(vision.fullatt_block_indexes),
        v_window=(vision.window_size // vision.patch_size) ** 2,
        patch=vision.temporal_patch_size * 3 * vision.patch_size**2,
        merge=vision.spatial_merge_size**2,
    )


@pytest.mark.parametrize("backward", ["none", "pixels", "all"])
def test_flops_are_those_of_a_tiny_model(tiny, rows, backward):
    # the counter does not see the CPU's fused attention
    policy = Policy.from_pretrained(tiny, attention="eager")
    prompts = policy.encode([rows[0]["problem"]] * 2, [rows[0]["images"]] * 2)
    patches = prompts.images[0][0].numel() // policy.model.config.vision_config.patch_size**2
    tokens = torch.full((6, 5), 20)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if backward == "pixels":
        policy.requires_grad_(False)
        prompts = prompts.with_images([image.requires_grad_() for image in prompts.images])
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward != "none"):
        logprobs, entropy = policy.score(prompts, tokens, mask)
        if backward == "pixels":
            torch.autograd.grad(entropy.sum(), prompts.images)
        elif backward == "all":
            logprobs.sum().backward()
    L = prompts.ids.shape[1]
    expected = score_flops(shape_of(policy.model), 2, 6, L, 5, patches, backward)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("model, parameters", [("3B", 3.75e9), ("7B", 8.29e9)])
def test_parameters_are_the_published_ones(model, parameters):
    """By the checkpoints' cards; biases and norms are left out."""
    assert MODELS[model].parameters == pytest.approx(parameters, rel=0.01)
