"""benchmarks/scaling.py: its FLOPs are those that a tiny model is seen to compute."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scaling import MODELS, Shape, score_flops
from vlm.policy import Policy


@pytest.mark.parametrize("backward", ["none", "pixels", "all"])
def test_flops_are_those_of_a_tiny_model(tiny, rows, backward):
    policy = Policy.from_pretrained(
        tiny, attention="eager"
    )  # the counter does not see the CPU's fused attention
    text, vision = policy.model.config.get_text_config(), policy.model.config.vision_config
    head = text.hidden_size // text.num_attention_heads
    prompts = policy.encode([rows[0]["problem"]] * 2, [rows[0]["images"]] * 2)
    patches = (prompts.images[0][0].numel() // vision.patch_size**2, prompts.ids.shape[1])
    shape = Shape(
        *(text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.hidden_size),
        *(
            text.num_key_value_heads * head,
            text.vocab_size,
            True,
            vision.hidden_size,
            vision.intermediate_size,
        ),
        *(
            vision.depth,
            len(vision.fullatt_block_indexes),
            (vision.window_size // vision.patch_size) ** 2,
        ),
        *(vision.temporal_patch_size * 3 * vision.patch_size**2, vision.spatial_merge_size**2),
    )
    tokens = torch.full((6, 5), 20)
    images = [x.requires_grad_(backward == "pixels") for x in prompts.images]
    prompts = prompts.with_images(images)
    if backward == "pixels":
        policy.requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward != "none"):
        logprobs, entropy = policy.score(prompts, tokens, torch.ones_like(tokens, dtype=torch.bool))
        if backward == "pixels":
            torch.autograd.grad(entropy.sum(), images)
        elif backward == "all":
            logprobs.sum().backward()
    ours = score_flops(shape, 2, 6, patches[1], 5, patches[0], backward)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05), (
        ours / counter.get_total_flops()
    )


def test_parameters_are_the_published_ones():
    """3.75 and 8.29 billion weights, by the checkpoints' cards; biases and norms are left out."""
    assert MODELS["3B"].parameters == pytest.approx(3.75e9, rel=0.01)
    assert MODELS["7B"].parameters == pytest.approx(8.29e9, rel=0.01)
