"""policy.py against the processor's pixel_values, the model's plain forward (reference.py) and the traps of its peers.

The policies are tiny, random, sharpened (so that a wrong position or a wrong image moves a log-prob by more than one
nat) and in float64, where a test compares to rounding; only the last softmax is float32, as everywhere in the project.
"""

import copy
import math

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.image_utils import SizeDict

from demo.make_demo import build_model
from vlm import policy as policy_module
from vlm.policy import Policy


def build_qwen2_vl(tokenizer) -> Qwen2VLForConditionalGeneration:
    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2
    )
    text |= dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=token("<|im_end|>"),
        bos_token_id=None,
    )
    text |= dict(
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=text,
            vision_config=dict(
                depth=2, embed_dim=64, hidden_size=64, num_heads=4, mlp_ratio=2, patch_size=16
            ),
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
        )
    )
    model.generation_config.eos_token_id = token("<|im_end|>")
    return model


BUILD = {"qwen2_5_vl": build_model, "qwen2_vl": build_qwen2_vl}


@pytest.fixture(scope="module", params=BUILD)
def family(request, processor):
    """A float64 policy of each family. Not to be changed by a test."""
    return make_policy(processor, BUILD[request.param])


@pytest.fixture(scope="module")
def sharp(processor):
    """A float64 Qwen2.5-VL. Not to be changed by a test."""
    return make_policy(processor)


@pytest.fixture
def fresh(processor):
    """A float64 Qwen2.5-VL of a test's own."""
    return make_policy(processor)


def make_policy(processor, build=build_model) -> Policy:
    policy = Policy(
        reference.double(reference.sharpen(build(processor.tokenizer))), copy.deepcopy(processor)
    )
    policy.eos_ids += list(range(40))  # end tokens are frequent, so that responses differ in length
    return policy


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Waves and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 9
    waves = 110 + 60 * np.stack([np.sin(x + seed), np.cos(y), np.sin(x + y)], -1)
    pixels = np.clip(waves + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


PROBLEMS = [
    "How many pips?",
    "Which of the two pictures shows the red die? Look, then say 1 or 2.",
    "3+4",
    "red",
]
PICTURES = [[picture(96, 64)], [picture(64, 64, 1), picture(32, 96, 2)], [], [picture(64, 64, 3)]]


def responses(
    policy: Policy, P: int, n: int, T: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random allowed tokens of random lengths, the last rows the longest and the shortest.   -> (P n, T), (P n, T)"""
    g = torch.Generator().manual_seed(seed)
    allowed = torch.tensor(reference.allowed_tokens(policy.processor))
    tokens = allowed[torch.randint(len(allowed), (P * n, T), generator=g)]
    lengths = torch.randint(1, T + 1, (P * n,), generator=g)
    lengths[0], lengths[-1] = T, 1
    mask = torch.arange(T) < lengths[:, None]
    return tokens.masked_fill(~mask, policy.pad_id), mask


def reference_score(policy, problems, pictures, tokens, mask, temperature=1.0, images=None):
    """(logprobs, entropy) lists of (length,), row by row; images: a list of [0, 1] tensors for each prompt."""
    n = len(tokens) // len(problems)
    rows = []
    for i, (row, keep) in enumerate(zip(tokens, mask, strict=True)):
        p = i // n
        own = images[p] if images else None
        rows.append(
            reference.score(
                policy.model,
                policy.processor,
                problems[p],
                pictures[p],
                row[keep].tolist(),
                temperature,
                own,
            )
        )
    return [list(x) for x in zip(*rows, strict=True)]


def assert_rows_equal(ours, mask, theirs, atol):
    for row, keep, want in zip(ours, mask, theirs, strict=True):
        torch.testing.assert_close(row[keep], want, atol=atol, rtol=0)


# ------------------------------------------------------------------------------------------------------------- images

SIZES = [
    (96, 96),
    (64, 128),
    (97, 61),
    (20, 20),
    (33, 500),
    (700, 300),
    (15, 900),
]  # as is, rounded, enlarged, reduced


@pytest.mark.parametrize("size", SIZES)
def test_pixel_values_equal_the_processors(sharp, size):
    image = picture(*size)
    ours = sharp.to_pixel_values([sharp.to_unit_image(image)])
    theirs = sharp.processor.image_processor(images=[image], return_tensors="pt")
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=1e-6, rtol=0)


def test_pixel_values_of_several_images_are_in_order_and_equal_the_loops(sharp):
    images = [sharp.to_unit_image(picture(64, 96, s)) for s in range(2)] + [
        sharp.to_unit_image(picture(32, 64))
    ]
    ours = sharp.to_pixel_values(images)
    loops = torch.cat([reference.pixel_values(x, sharp.processor) for x in images])
    torch.testing.assert_close(ours["pixel_values"], loops, atol=1e-6, rtol=0)
    assert ours["image_grid_thw"].tolist() == [[1, 6, 4], [1, 6, 4], [1, 4, 2]]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_modes(sharp, mode):
    image = picture(64, 64, mode=mode)
    theirs = sharp.processor.image_processor(images=[image.convert("RGB")], return_tensors="pt")[
        "pixel_values"
    ]
    ours = sharp.to_pixel_values([sharp.to_unit_image(image)])["pixel_values"]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_unit_image_is_the_picture(sharp):
    image = picture(96, 64)
    x = sharp.to_unit_image(image)
    assert x.dtype == torch.float32 and x.shape == (3, 64, 96)
    assert torch.equal(x, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)


def test_every_pixel_gets_its_gradient(sharp):
    """Each pixel appears once in each of the two frames: d sum(pixel_values) / d pixel = 2 / std of its channel."""
    x = sharp.to_unit_image(picture(96, 64)).requires_grad_()
    (grad,) = torch.autograd.grad(sharp.to_pixel_values([x])["pixel_values"].sum(), x)
    want = 2 / torch.tensor(list(sharp.processor.image_processor.image_std))
    torch.testing.assert_close(grad, want.view(3, 1, 1).expand_as(grad))


def test_trap_08_frames_of_an_attacked_picture_stay_equal(sharp):
    """A sign step on pixel_values would push the two temporal copies apart: no picture would look like that."""
    import egas  # the attack as training runs it

    prompts = sharp.encode(PROBLEMS[:1], PICTURES[:1])
    tokens, mask = responses(sharp, 1, 2, 5)
    objective = lambda images: sharp.score(prompts.with_images(images), tokens, mask)[1][
        mask
    ].mean()  # noqa: E731
    (attacked,) = egas.pgd_ascent(objective, prompts.images, eps=8 / 255, steps=2)
    ip = sharp.processor.image_processor
    patches = sharp.to_pixel_values([attacked])["pixel_values"].unflatten(
        1, (3, 2, -1)
    )  # (patches, c, t, p * p)
    assert torch.equal(patches[:, :, 0], patches[:, :, 1])
    assert (
        0 <= attacked.min()
        and attacked.max() <= 1
        and (attacked - prompts.images[0]).abs().max() > 7 / 255
    )
    # As an 8-bit picture it goes through the processor to what the model saw, up to half a grey level.
    saved = Image.fromarray((attacked * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    theirs = ip(images=[saved], return_tensors="pt")["pixel_values"].unflatten(1, (3, 2, -1))
    assert (theirs - patches).abs().max() <= 0.5 / 255 / min(ip.image_std) + 1e-5


def test_trap_09_statistics_are_the_processors(fresh):
    ip = fresh.processor.image_processor
    before = fresh.to_pixel_values([fresh.to_unit_image(picture(64, 64))])["pixel_values"]
    ip.image_mean, ip.image_std = [0.1, 0.5, 0.7], [0.3, 0.2, 0.9]
    ours = fresh.to_pixel_values([fresh.to_unit_image(picture(64, 64))])["pixel_values"]
    theirs = ip(images=[picture(64, 64)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    assert (ours - before).abs().max() > 0.5


def test_trap_09_patch_sizes_are_the_processors(fresh):
    ip = fresh.processor.image_processor
    ip.patch_size, ip.merge_size, ip.temporal_patch_size = 8, 3, 4
    ours = fresh.to_pixel_values([fresh.to_unit_image(picture(70, 100))])
    theirs = ip(images=[picture(70, 100)], return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=1e-6, rtol=0)
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])


# -------------------------------------------------------------------------------------------------------------- encode


def test_encode_equals_the_processors_chat_call(family):
    """Left padded; each row's ids are those of its own chat call, its positions those of the model's own rule."""
    prompts = family.encode(PROBLEMS, PICTURES)
    assert len(prompts) == 4 and prompts.counts == [1, 2, 0, 1] and prompts.mask.dtype == torch.bool
    for p, (problem, pictures) in enumerate(zip(PROBLEMS, PICTURES, strict=True)):
        want = reference.prompt_inputs(family.processor, problem, pictures)
        length = want["input_ids"].shape[1]
        assert (
            prompts.mask[p].tolist() == [False] * (prompts.ids.shape[1] - length) + [True] * length
        )
        assert torch.equal(prompts.ids[p, -length:], want["input_ids"][0])
        family.model.model.rope_deltas = None
        grid = {"image_grid_thw": want["image_grid_thw"]} if pictures else {}
        positions, _ = family.model.model.get_rope_index(
            want["input_ids"], want["mm_token_type_ids"], **grid
        )
        assert torch.equal(prompts.positions[:, p, -length:], positions[:, 0])
        assert prompts.next_position[p] == positions.max() + 1


@pytest.mark.parametrize("size", [(60, 250), (200, 200)])
def test_image_tokens_fit_the_image_within_narrow_limits(fresh, size):
    """The processor's resize need not be the identity on its own result; an image is resized once."""
    fresh.processor.image_processor.size = SizeDict(shortest_edge=11 * 1024, longest_edge=12 * 1024)
    prompts = fresh.encode(["red"], [[picture(*size)]])
    want = reference.prompt_inputs(fresh.processor, "red", [picture(*size)])["input_ids"]
    assert torch.equal(prompts.ids, want)
    assert fresh.prompt_tokens({"problem": "red", "images": [picture(*size)]}) == want.shape[1]
    tokens = torch.tensor([[50, 60]])
    fresh.score(prompts, tokens, torch.ones_like(tokens, dtype=torch.bool))


def test_prompt_tokens_counts_image_tokens(sharp):
    for problem, pictures in zip(PROBLEMS, PICTURES, strict=True):
        want = reference.prompt_inputs(sharp.processor, problem, pictures)["input_ids"].shape[1]
        assert sharp.prompt_tokens({"problem": problem, "images": pictures}) == want


def test_prompts_slice_and_take_new_images(sharp):
    prompts = sharp.encode(PROBLEMS, PICTURES)
    part = prompts[1:4]
    assert [x.shape for x in part.images] == [
        x.shape for x in prompts.images[1:]
    ] and part.counts == [2, 0, 1]
    assert torch.equal(part.ids, prompts.ids[1:4]) and torch.equal(
        part.positions, prompts.positions[:, 1:4]
    )
    assert prompts[2:3].images == []
    black = prompts.with_images([torch.zeros_like(x) for x in prompts.images])
    assert black[3:].images[0].max() == 0 and prompts.images[0].max() > 0
    with pytest.raises(ValueError, match="shapes"):
        prompts.with_images(prompts.images[::-1])


@pytest.mark.parametrize("problem", ["", " \n"])
def test_an_empty_problem_is_refused(sharp, problem):
    with pytest.raises(ValueError, match="empty"):
        sharp.encode([problem], [[picture(32, 32)]])


def test_trap_04_a_long_prompt_is_refused_and_never_cut(fresh):
    problem = "red " * 1200
    fresh.processor.tokenizer.model_max_length = 50
    assert fresh.encode([problem], [[picture(64, 64)]]).ids.shape[1] > 1200
    with pytest.raises(ValueError, match=r"\d{4} tokens, more than max_prompt_tokens=1000"):
        fresh.encode(["short", problem], [[picture(64, 64)]] * 2, max_tokens=1000)
    length = fresh.encode(["short"], [[picture(64, 64)]]).ids.shape[1]
    assert fresh.encode(["short"], [[picture(64, 64)]], max_tokens=length).ids.shape[1] == length
    with pytest.raises(ValueError, match=f"{length} tokens"):
        fresh.encode(["short"], [[picture(64, 64)]], max_tokens=length - 1)


def test_trap_05_the_tokenizers_padding_side_changes_nothing(fresh):
    tokens, mask = responses(fresh, 4, 1, 4)
    want = fresh.score(fresh.encode(PROBLEMS, PICTURES), tokens, mask)
    fresh.processor.tokenizer.padding_side = "right"
    prompts = fresh.encode(PROBLEMS, PICTURES)
    assert prompts.mask[:, -1].all() and not prompts.mask.all()
    for ours, before in zip(fresh.score(prompts, tokens, mask), want, strict=True):
        assert torch.equal(ours, before)


def test_trap_05_type_ids_padded_on_the_other_side_are_refused(fresh):
    call = type(fresh.processor).__call__

    def crooked(self, *args, **kwargs):
        batch = call(self, *args, **kwargs)
        batch["mm_token_type_ids"] = batch["mm_token_type_ids"].flip(1)
        return batch

    fresh.processor.__class__ = type("Crooked", (type(fresh.processor),), {"__call__": crooked})
    with pytest.raises(RuntimeError, match="mm_token_type_ids"):
        fresh.encode(PROBLEMS, PICTURES)


# --------------------------------------------------------------------------------------------------------------- score


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_score_equals_the_plain_forward(family, temperature):
    """Left-padded prompts with one, two and no images, three responses each: within 3e-5 nats of the row-by-row way."""
    tokens, mask = responses(family, 4, 3, 6)
    with torch.no_grad():
        logprobs, entropy = family.score(
            family.encode(PROBLEMS, PICTURES), tokens, mask, temperature
        )
        want = reference_score(family, PROBLEMS, PICTURES, tokens, mask, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert_rows_equal(logprobs, mask, want[0], 3e-5)
    assert_rows_equal(entropy, mask, want[1], 3e-5)
    assert logprobs.isfinite().all() and entropy.isfinite().all()


def test_gradients_equal_the_plain_forward(family):
    """Of weights and pixels, of a weighted sum of log-probs and entropies: within 1e-5 of the largest of a tensor."""
    tokens, mask = responses(family, 4, 2, 5)
    prompts = family.encode(PROBLEMS, PICTURES)
    images = [x.clone().requires_grad_() for x in prompts.images]
    weights = torch.randn(2, *tokens.shape, generator=torch.Generator().manual_seed(1))
    leaves = [*images, *family.parameters()]

    logprobs, entropy = family.score(prompts.with_images(images), tokens, mask)
    ours = torch.autograd.grad((weights * torch.stack([logprobs, entropy]))[:, mask].sum(), leaves)

    own = [images[:1], images[1:3], [], images[3:]]
    want = reference_score(family, PROBLEMS, PICTURES, tokens, mask, images=own)
    total = 0.0
    for kind in range(2):
        for weight, keep, row in zip(weights[kind], mask, want[kind], strict=True):
            total = total + (weight[keep] * row).sum()
    theirs = torch.autograd.grad(total, leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item(), rtol=0)


def test_float32_is_close_to_float64(policy, rows):
    """What training uses: float32 within 1e-4 nats of one row at a time in the same precision."""
    reference.sharpen(policy.model)
    problems, pictures = [r["problem"] for r in rows], [r["images"] for r in rows]
    tokens, mask = responses(policy, 4, 2, 8)
    with torch.no_grad():
        logprobs, entropy = policy.score(policy.encode(problems, pictures), tokens, mask)
        want = reference_score(policy, problems, pictures, tokens, mask)
    assert_rows_equal(logprobs, mask, want[0], 1e-4)
    assert_rows_equal(entropy, mask, want[1], 1e-4)


def test_one_token_responses(sharp):
    tokens, _ = responses(sharp, 2, 2, 1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        ours = sharp.score(sharp.encode(PROBLEMS[:2], PICTURES[:2]), tokens, mask)[0]
        assert_rows_equal(
            ours, mask, reference_score(sharp, PROBLEMS[:2], PICTURES[:2], tokens, mask)[0], 3e-5
        )


def test_text_alone(sharp):
    tokens, mask = responses(sharp, 2, 2, 4)
    with torch.no_grad():
        prompts = sharp.encode(["3+4", "Which is larger, 3 or 4?"], [[], []])
        ours = sharp.score(prompts, tokens, mask)[0]
        want = reference_score(sharp, ["3+4", "Which is larger, 3 or 4?"], [[], []], tokens, mask)[
            0
        ]
    assert_rows_equal(ours, mask, want, 3e-5)


def test_padding_of_responses_has_no_influence(sharp):
    """Whatever token stands behind the mask, values and gradients in front of it stay."""
    prompts = sharp.encode(PROBLEMS, PICTURES)
    tokens, mask = responses(sharp, 4, 2, 6)
    other = torch.where(mask, tokens, 77)
    for a, b in zip(
        sharp.score(prompts, tokens, mask), sharp.score(prompts, other, mask), strict=True
    ):
        assert torch.equal(a[mask], b[mask])


def test_trap_06_rows_belong_to_their_own_prompt(sharp):
    """P = 3 prompts that differ in the picture alone, n = 2: rows 2p and 2p + 1 see picture p, in score and sample."""
    pictures = [[picture(64, 64, s)] for s in range(3)]
    prompts = sharp.encode(["How many?"] * 3, pictures)
    tokens, mask = (
        torch.tensor([[50, 60, 70, 80]]).expand(6, -1),
        torch.ones(6, 4, dtype=torch.bool),
    )
    with torch.no_grad():
        together = sharp.score(prompts, tokens, mask)[0]
        alone = [sharp.score(prompts[p : p + 1], tokens[:1], mask[:1])[0][0] for p in range(3)]
    assert (alone[0] - alone[1]).abs().max() > 0.1  # the picture matters
    for i in range(6):
        torch.testing.assert_close(together[i], alone[i // 2], atol=1e-5, rtol=0)
    sampled = sharp.sample(prompts, 2, [1, 2, 3], 4)
    with torch.no_grad():
        scored = sharp.score(prompts, sampled.tokens, sampled.mask)[0]
    torch.testing.assert_close(
        sampled.logprobs[sampled.mask], scored[sampled.mask], atol=1e-5, rtol=0
    )


def test_trap_02_stale_rope_deltas_change_nothing(fresh):
    """A plain forward and a generate of other batches leave their offset in the model; ours takes no notice."""
    prompts = fresh.encode(PROBLEMS, PICTURES)
    tokens, mask = responses(fresh, 4, 2, 4)

    def everything():
        with torch.no_grad():
            rollouts = fresh.sample(prompts, 2, [1, 2, 3, 4], 4)
            return rollouts.tokens, rollouts.logprobs, *fresh.score(prompts, tokens, mask)

    want = everything()
    other = reference.prompt_inputs(fresh.processor, "other", [picture(256, 32)])
    with torch.no_grad():
        fresh.model(**other)
    assert fresh.model.model.rope_deltas.shape == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))
    fresh.model.generate(**other, max_new_tokens=2)
    assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))
    fresh.model.model.rope_deltas = torch.full((8, 1), 1000)
    assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))
    fresh.model.model.rope_deltas = torch.full((3, 1), -7)
    assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))


def test_trap_03_banned_tokens_have_no_probability(fresh):
    """Special tokens and ids beyond the tokenizer: -inf when scored, nothing left for them of the sum of one."""
    tokenizer = fresh.processor.tokenizer
    known = len(tokenizer)
    fresh.model.resize_token_embeddings(known + 9)
    with torch.no_grad():
        fresh.model.lm_head.weight[known:] = (
            fresh.model.lm_head.weight[:9] * 3
        )  # ids of nothing, but likely ones
        fresh.model.lm_head.weight[tokenizer.convert_tokens_to_ids("<|image_pad|>")] *= 4
    policy = Policy(fresh.model, fresh.processor)
    allowed = reference.allowed_tokens(policy.processor)
    assert set(range(known + 9)) - set(policy.banned.nonzero().flatten().tolist()) == set(allowed)
    assert policy.eos_ids[0] in allowed

    prompts = policy.encode(PROBLEMS[:1], PICTURES[:1])
    every = torch.arange(known + 9)[:, None]
    with torch.no_grad():
        logprobs, entropy = policy.score(prompts, every, torch.ones_like(every, dtype=torch.bool))
        (want,) = reference.distributions(
            policy.model, policy.processor, PROBLEMS[0], PICTURES[0], [allowed[0]]
        )
    banned = policy.banned
    assert (logprobs[banned] == -math.inf).all() and logprobs[~banned].isfinite().all()
    torch.testing.assert_close(logprobs[~banned].squeeze(1), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(logprobs[~banned].exp().sum(), torch.tensor(1.0), atol=1e-5, rtol=0)
    assert entropy.isfinite().all()
    sampled = policy.sample(prompts, 200, [0], 3)
    assert not policy.banned[sampled.tokens[sampled.mask]].any()
    greedy = policy.sample(prompts, 1, [0], 3, temperature=0)
    assert not policy.banned[greedy.tokens[greedy.mask]].any()


def test_trap_03_gradients_stay_finite_beside_banned_tokens(sharp):
    prompts = sharp.encode(PROBLEMS[:1], PICTURES[:1])
    x = prompts.images[0].clone().requires_grad_()
    tokens, mask = responses(sharp, 1, 2, 4)
    _, entropy = sharp.score(prompts.with_images([x]), tokens, mask)
    (grad,) = torch.autograd.grad(entropy[mask].sum(), x)
    assert grad.isfinite().all() and (grad != 0).float().mean() > 0.99


def test_trap_10_checkpointing_is_exact_or_refused(fresh):
    """In eval mode, the policy's only one, it changes nothing; in train mode it would empty the cache: refused."""
    prompts = fresh.encode(PROBLEMS, PICTURES)
    tokens, mask = responses(fresh, 4, 2, 4)
    with torch.no_grad():
        want = fresh.score(prompts, tokens, mask)
    fresh.model.gradient_checkpointing_enable()
    images = [x.clone().requires_grad_() for x in prompts.images]
    ours = fresh.score(prompts.with_images(images), tokens, mask)
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(ours[1][mask].sum(), images))
    fresh.train()
    for call in (
        lambda: fresh.score(prompts, tokens, mask),
        lambda: fresh.sample(prompts, 2, [0] * 4, 3),
    ):
        with pytest.raises(RuntimeError, match="activation checkpointing"):
            call()


def test_no_dropout_although_the_model_came_in_train_mode(processor):
    model = build_model(processor.tokenizer)
    model.config.text_config.attention_dropout = 0.5
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy = Policy(model.train(), processor)
    prompts = policy.encode(PROBLEMS[:1], PICTURES[:1])
    tokens, mask = responses(policy, 1, 2, 4)
    assert not any(module.training for module in policy.modules())
    assert torch.equal(
        policy.score(prompts, tokens, mask)[0], policy.score(prompts, tokens, mask)[0]
    )


# ---------------------------------------------------------------------------------------------------------------- head


class Largest(TorchDispatchMode):
    """Remembers the most rows of V numbers that any operation returned."""

    def __init__(self, V: int):
        super().__init__()
        self.V, self.rows = V, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.ndim and x.shape[-1] == self.V:
                self.rows = max(self.rows, x.numel() // self.V)
        return out


def test_the_head_in_chunks_is_exact_and_never_holds_all_logits(sharp, monkeypatch):
    """N T = 384 rows of logits in chunks of 7, forward and backward; 128 rows: the transposed weight of the head."""
    prompts = sharp.encode(PROBLEMS, PICTURES)
    tokens, mask = responses(sharp, 4, 12, 8)
    leaves = [x.clone().requires_grad_() for x in prompts.images]
    prompts, V = prompts.with_images(leaves), len(sharp.banned)
    leaves += list(sharp.parameters())

    def run():
        with Largest(V) as largest:
            logprobs, entropy = sharp.score(prompts, tokens, mask, 0.8)
            grads = torch.autograd.grad((logprobs + entropy.square())[mask].sum(), leaves)
        return logprobs, entropy, grads, largest.rows

    monkeypatch.setattr("vlm.policy.RESPONSES_PER_CHUNK", 48)
    whole = run()
    assert whole[3] == 4 * 12 * 8
    monkeypatch.setattr("vlm.policy.LOGITS_PER_CHUNK", 7 * V)
    chunked = run()
    assert chunked[3] <= 128
    for a, b in zip(chunked[:2], whole[:2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    for a, b in zip(chunked[2], whole[2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6 * b.abs().max().item(), rtol=0)


def test_the_head_keeps_no_logits_for_the_backward(sharp):
    """They are computed again: nothing of V numbers a token is saved."""
    prompts = sharp.encode(PROBLEMS, PICTURES)
    tokens, mask = responses(sharp, 4, 12, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        sharp.score(prompts, tokens, mask)
    assert len(saved) > 100 and not [shape for shape in saved if shape[-1:] == (len(sharp.banned),)]


def test_a_chunk_of_a_large_vocabulary_is_bounded(sharp, monkeypatch):
    """At Qwen's 151,936 ids, 441 tokens a time: 2^26 numbers, 256 MiB."""
    hidden, tokens = torch.zeros(2, 500, 4), torch.zeros(2, 500, dtype=torch.long)
    seen = []

    def logits(h):
        seen.append(len(h))
        return h

    stand_in = copy.copy(sharp)
    stand_in._buffers = {"banned": torch.zeros(151_936, dtype=torch.bool)}
    monkeypatch.setattr(Policy, "logits", lambda self, h: logits(h))
    stand_in._head_in_chunks(hidden, tokens, 1.0)
    assert sum(seen) == 1000 and max(seen) * 151_936 <= 2**26


# -------------------------------------------------------------------------------------------------------------- sample


def test_sampled_values_equal_scored_ones(family):
    """Recorded log-probs and entropies are those of score, at the sampling temperature, on mixed prompts."""
    prompts = family.encode(PROBLEMS, PICTURES)
    for temperature in (1.0, 0.7):
        sampled = family.sample(prompts, 3, [5, 6, 7, 8], 8, temperature)
        assert (
            sampled.tokens.shape
            == sampled.mask.shape
            == sampled.logprobs.shape
            == sampled.entropy.shape
        )
        assert len(set(sampled.mask.sum(1).tolist())) > 2  # of various lengths
        with torch.no_grad():
            logprobs, entropy = family.score(prompts, sampled.tokens, sampled.mask, temperature)
            want = reference_score(
                family, PROBLEMS, PICTURES, sampled.tokens, sampled.mask, temperature
            )
        assert_rows_equal(sampled.logprobs, sampled.mask, want[0], 3e-5)
        assert_rows_equal(sampled.entropy, sampled.mask, want[1], 3e-5)
        torch.testing.assert_close(
            sampled.logprobs[sampled.mask], logprobs[sampled.mask], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            sampled.entropy[sampled.mask], entropy[sampled.mask], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_follow_the_softmax(sharp, temperature):
    """12,000 first tokens against the reference's probabilities: chi-square over the cells that expect 10 or more."""
    prompts = sharp.encode(["red"], [[]])
    drawn = [sharp.sample(prompts, 3000, [seed], 1, temperature).tokens[:, 0] for seed in range(4)]
    counts = torch.cat(drawn).bincount(minlength=len(sharp.banned)).double()
    allowed = reference.allowed_tokens(sharp.processor)
    with torch.no_grad():
        (logp,) = reference.distributions(
            sharp.model, sharp.processor, "red", [], [allowed[0]], temperature
        )
    expected, seen = logp.double().exp() * counts.sum(), counts[allowed]
    assert seen.sum() == counts.sum() == 12_000
    large = expected >= 10
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    seen = torch.cat([seen[large], seen[~large].sum()[None]])
    cells = len(expected)
    assert cells > 20
    chi2 = ((seen - expected) ** 2 / expected).sum()
    assert abs(chi2 - (cells - 1)) < 4 * math.sqrt(2 * (cells - 1))


def test_later_tokens_follow_the_softmax(sharp):
    """sum_t (log p(y_t) + H_t) is a martingale: over 400 rows, within 4 of its standard deviations of 0."""
    prompts = sharp.encode(PROBLEMS, PICTURES)
    sampled = sharp.sample(prompts, 100, [1, 2, 3, 4], 6, 0.8)
    with torch.no_grad():
        some = sharp.sample(prompts[:1], 5, [1], 6, 0.8)
        variances = []
        for tokens, mask in zip(some.tokens, some.mask, strict=True):
            for logp in reference.distributions(
                sharp.model, sharp.processor, PROBLEMS[0], PICTURES[0], tokens[mask].tolist(), 0.8
            ):
                variances.append(
                    ((logp.exp() * logp**2).sum() - (logp.exp() * logp).sum() ** 2).item()
                )
    surprise = (sampled.logprobs + sampled.entropy)[sampled.mask]
    assert abs(surprise.sum()) < 4 * math.sqrt(np.mean(variances) * len(surprise))
    assert 0.7 < surprise.var() / np.mean(variances) < 1.4


def test_draws_of_a_row_are_independent(sharp):
    """A token's id grows with its uniform number: ids of neighbouring tokens would correlate if they shared it."""
    sampled = sharp.sample(sharp.encode(PROBLEMS, PICTURES), 100, [1, 2, 3, 4], 3)
    first, second, third = sampled.tokens[sampled.mask.all(1)].double().T
    assert len(first) > 200
    for a, b in ((first, second), (second, third), (first[:-1], first[1:])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.3


def test_temperature_zero_is_greedy(sharp):
    """Each token is the most likely one; log-probs and entropy are those at temperature 1; n rows are the same."""
    prompts = sharp.encode(PROBLEMS, PICTURES)
    greedy = sharp.sample(prompts, 2, [0] * 4, 5, temperature=0)
    assert torch.equal(greedy.tokens[::2], greedy.tokens[1::2])
    allowed = reference.allowed_tokens(sharp.processor)
    for p in range(4):
        response = greedy.tokens[2 * p][greedy.mask[2 * p]].tolist()
        with torch.no_grad():
            logps = reference.distributions(
                sharp.model, sharp.processor, PROBLEMS[p], PICTURES[p], response
            )
        assert response == [allowed[int(logp.argmax())] for logp in logps]
        want = torch.stack([logp.max() for logp in logps])
        torch.testing.assert_close(
            greedy.logprobs[2 * p][greedy.mask[2 * p]], want, atol=1e-5, rtol=0
        )


def test_rows_stop_at_their_end_token(sharp):
    """The mask runs up to and with the first end token; what follows is padding; truncated() names the others."""
    prompts = sharp.encode(PROBLEMS, PICTURES)
    sampled = sharp.sample(prompts, 8, [1, 2, 3, 4], 10)
    truncated = sampled.truncated(sharp.eos_ids)
    assert 0 < truncated.sum() < 32
    for tokens, mask, cut in zip(
        sampled.tokens.tolist(), sampled.mask.tolist(), truncated.tolist(), strict=True
    ):
        ends = [t for t, token in enumerate(tokens) if token in sharp.eos_ids]
        length = 10 if cut else ends[0] + 1
        assert bool(ends) != cut
        assert mask == [True] * length + [False] * (10 - length)
        assert tokens[length:] == [sharp.pad_id] * (10 - length)


def test_sampling_ends_with_the_last_row(sharp):
    prompts = sharp.encode(PROBLEMS[:1], PICTURES[:1])
    sampled = sharp.sample(prompts, 3, [1], 200)
    assert sampled.tokens.shape[1] == sampled.mask.sum(1).max() < 200
    one = sharp.sample(prompts, 3, [1], 1)
    assert one.tokens.shape == (3, 2) and one.mask.tolist() == [[True, False]] * 3


def test_rows_that_have_ended_leave_the_batch(sharp, monkeypatch):
    """The rows computed for each token: never fewer than those still alive, at most 4/3 of them."""
    respond, computed = Policy.respond, []
    monkeypatch.setattr(
        Policy, "respond", lambda self, ids, *a: computed.append(len(ids)) or respond(self, ids, *a)
    )
    sampled = sharp.sample(sharp.encode(PROBLEMS, PICTURES), 8, [1, 2, 3, 4], 60)
    alive = sampled.mask.sum(dim=0).tolist()[1:]
    assert len(computed) == len(alive) and computed[0] > 4 * computed[-1]
    for rows, n in zip(computed, alive, strict=True):
        assert n <= rows < n / 0.75 + 1


def test_scoring_computes_lots_of_like_length(sharp, monkeypatch):
    """Less than all rows padded to the longest, the same values."""
    prompts = sharp.encode(PROBLEMS, PICTURES)
    tokens, mask = responses(sharp, 4, 6, 40)
    respond, computed = Policy.respond, []
    monkeypatch.setattr(
        Policy,
        "respond",
        lambda self, ids, *a: computed.append(ids.numel()) or respond(self, ids, *a),
    )
    results = []
    for rows in (24, 4):
        monkeypatch.setattr("vlm.policy.RESPONSES_PER_CHUNK", rows)
        results.append([x[mask] for x in sharp.score(prompts, tokens, mask)])
    assert computed[0] == 24 * 39 and sum(computed[1:]) < 0.7 * computed[0]
    for whole, lots in zip(*results, strict=True):
        torch.testing.assert_close(lots, whole, atol=1e-5, rtol=0)


def test_a_list_of_end_tokens_from_the_generation_config(processor):
    model = build_model(processor.tokenizer)
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, 70]
    policy = Policy(model, processor)
    assert policy.eos_ids == [processor.tokenizer.eos_token_id, 70]
    model.generation_config.eos_token_id = None
    assert Policy(model, processor).eos_ids == [processor.tokenizer.eos_token_id]


def test_trap_11_the_end_token_counts_although_it_is_the_padding_token(fresh):
    """pad = eos: the mask goes by position, so the final end token is in it, and has a gradient."""
    prompts = fresh.encode(PROBLEMS, PICTURES)
    often = fresh.sample(prompts, 8, [1, 2, 3, 4], 10)
    fresh.pad_id = int(
        often.tokens[often.mask].mode().values
    )  # a token frequent enough to be the end token
    fresh.eos_ids = [fresh.pad_id]
    sampled = fresh.sample(prompts, 8, [1, 2, 3, 4], 10)
    ended = ~sampled.truncated(fresh.eos_ids)
    assert ended.sum() > 3
    lengths = sampled.mask.sum(1)
    last = sampled.tokens[torch.arange(32), lengths - 1]
    assert (last[ended] == fresh.pad_id).all()
    logprobs, _ = fresh.score(prompts, sampled.tokens, sampled.mask)
    row = int(ended.nonzero()[0])
    value = logprobs[row, lengths[row] - 1]
    torch.testing.assert_close(value, sampled.logprobs[row, lengths[row] - 1], atol=1e-5, rtol=0)
    (grad,) = torch.autograd.grad(value, fresh.model.lm_head.weight)
    assert grad[fresh.pad_id].abs().max() > 0


def test_rollouts_depend_on_their_own_seed_alone(sharp):
    """Not on the batch around them, on its padding, nor on how many responses are drawn with them."""
    prompts = sharp.encode(PROBLEMS, PICTURES)
    whole = sharp.sample(prompts, 4, [11, 12, 13, 14], 6)
    rows = lambda r: [tokens[mask].tolist() for tokens, mask in zip(r.tokens, r.mask, strict=True)]  # noqa: E731
    assert rows(sharp.sample(prompts[1:3], 4, [12, 13], 6)) == rows(whole)[4:12]
    alone = sharp.encode(PROBLEMS[3:], PICTURES[3:])
    assert rows(sharp.sample(alone, 4, [14], 6)) == rows(whole)[12:]
    assert rows(sharp.sample(prompts, 2, [11, 12, 13, 14], 6)) == [
        r for i, r in enumerate(rows(whole)) if i % 4 < 2
    ]
    assert rows(sharp.sample(prompts, 4, [11, 12, 13, 14], 6)) == rows(whole)
    assert rows(sharp.sample(prompts, 4, [21, 22, 23, 24], 6)) != rows(whole)
    assert len({tuple(r) for r in rows(whole)}) > 12  # the four of a prompt differ


def test_trap_01_generation_config_cannot_make_rollouts_greedy(processor, tmp_path):
    """A checkpoint with Qwen2.5-VL's near-greedy settings, and worse, samples as one without."""
    plain = make_policy(processor)
    prompts = plain.encode(PROBLEMS, PICTURES)
    want = plain.sample(prompts, 4, [1, 2, 3, 4], 6)
    greedy = dict(
        do_sample=True,
        top_k=1,
        top_p=0.001,
        temperature=1e-6,
        repetition_penalty=1.5,
        min_new_tokens=6,
    )
    plain.model.generation_config.update(**greedy, suppress_tokens=[int(want.tokens[0, 0])])
    plain.save_pretrained(tmp_path)
    loaded = Policy.from_pretrained(tmp_path)
    assert loaded.model.generation_config.top_k == 1
    loaded = Policy(reference.double(loaded.model), loaded.processor)
    loaded.eos_ids = plain.eos_ids
    for policy in (plain, loaded):
        sampled = policy.sample(prompts, 4, [1, 2, 3, 4], 6)
        assert torch.equal(sampled.tokens, want.tokens)
    assert len({tuple(row) for row in want.tokens.tolist()}) > 12


def test_decode_leaves_out_padding_and_the_end_token(sharp):
    tokenizer = sharp.processor.tokenizer
    texts = ["<think>3 + 4 = 7.</think> \\boxed{7}", " a , b . 's", "é 中"]
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    T = max(map(len, ids)) + 2
    tokens = torch.tensor(
        [row + [50] * (T - len(row)) for row in ids]
    )  # by the mask, not by the padding's value
    mask = torch.arange(T) < torch.tensor([[len(row)] for row in ids])
    zeros = torch.zeros(tokens.shape)
    assert sharp.decode(policy_module.Responses(tokens, mask, zeros, zeros)) == texts


# --------------------------------------------------------------------------------------------- loading, saving, dtypes


def test_bfloat16_runs_and_is_near_float32(tiny):
    low, full = Policy.from_pretrained(tiny, dtype="bfloat16"), Policy.from_pretrained(tiny)
    assert next(low.parameters()).dtype == torch.bfloat16
    assert low.logits(torch.ones(1, 128, dtype=torch.bfloat16)).dtype == torch.float32
    prompts = low.encode(PROBLEMS, PICTURES)
    sampled = low.sample(prompts, 2, [1, 2, 3, 4], 6)
    assert sampled.logprobs.dtype == sampled.entropy.dtype == torch.float32
    images = [x.clone().requires_grad_() for x in prompts.images]
    logprobs, entropy = low.score(prompts.with_images(images), sampled.tokens, sampled.mask)
    grads = torch.autograd.grad(entropy[sampled.mask].sum(), images)
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.abs().max() > 0 for g in grads)
    want = full.score(prompts, sampled.tokens, sampled.mask)
    torch.testing.assert_close(logprobs, want[0], atol=0.05, rtol=0)
    torch.testing.assert_close(entropy, want[1], atol=0.05, rtol=0)
    torch.testing.assert_close(sampled.logprobs, logprobs, atol=0.05, rtol=0)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_policy_loads_bit_for_bit(tiny, tmp_path, dtype, gathered):
    """Its own parameters, or those of a gathered state dict, which are others."""
    policy = Policy.from_pretrained(tiny, dtype=dtype)
    state = {k: v + 1 for k, v in policy.state_dict().items()}
    policy.save_pretrained(tmp_path, state if gathered else None)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    want, found = policy.model.state_dict(), model.state_dict()
    want = {k: v + 1 if gathered else v for k, v in want.items()}
    assert want.keys() == found.keys()
    assert all(torch.equal(want[k], found[k]) and want[k].dtype == found[k].dtype for k in want)
    before = reference.prompt_inputs(policy.processor, PROBLEMS[1], PICTURES[1])
    after = reference.prompt_inputs(processor, PROBLEMS[1], PICTURES[1])
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_text_model_is_refused_by_name(tmp_path):
    config = Qwen2Config(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 2
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'qwen2' model.*vision-language.*qwen2_vl, qwen2_5_vl"):
        Policy.from_pretrained(tmp_path)


def test_an_unknown_family_is_refused_by_name(processor, tmp_path):
    model = build_model(processor.tokenizer)
    model.config.model_type = "paligemma"
    with pytest.raises(ValueError, match="'paligemma' is not supported.*qwen2_vl, qwen2_5_vl"):
        Policy(model, processor)
    (tmp_path / "config.json").write_text('{"model_type": "paligemma"}')
    with pytest.raises(ValueError, match="'paligemma' model"):
        Policy.from_pretrained(tmp_path)


def test_forward_is_score(sharp):
    """What DDP and FSDP wrap."""
    prompts = sharp.encode(PROBLEMS[:2], PICTURES[:2])
    tokens, mask = responses(sharp, 2, 2, 3)
    with torch.no_grad():
        assert torch.equal(sharp(prompts, tokens, mask)[0], sharp.score(prompts, tokens, mask)[0])
