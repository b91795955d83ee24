"""policy.py against the plain forward (reference.py), and traps that other projects fell into.

The policies are the demo's tiny Qwen2.5-VL, random, sharpened and in float64, where a test compares
to rounding. A wrong position or image then moves a log-prob by more than one nat. Only the last
softmax is float32, as everywhere in the project. Other families: test_families.py.
"""

import copy
import math
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.image_utils import SizeDict

import egas
import grpo
import tsec
from demo.make_demo import build_model
from tests import reference
from tests.families import responses
from vlm import adapt
from vlm.policy import Policy, Responses, logprobs_and_entropy


def make_policy(processor) -> Policy:
    model = reference.double(reference.sharpen(build_model(processor.tokenizer)))
    policy = Policy(model, copy.deepcopy(processor))
    policy.eos_ids += list(range(40))  # end tokens are frequent, so that responses differ in length
    return policy


@pytest.fixture(scope="module")
def sharp(processor):
    """Not to be changed by a test."""
    return make_policy(processor)


@pytest.fixture
def fresh(sharp):
    """A policy of a test's own."""
    return copy.deepcopy(sharp)


@pytest.fixture(scope="module")
def prompts(sharp):
    return sharp.encode(PROBLEMS, PICTURES)


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


def reference_score(policy, problems, pictures, tokens, mask, temperature=1.0, images=None):
    """Log-probs and entropies (2, numbers of the mask), row by row, as stats[:, mask].

    images: a list of [0, 1] tensors for each prompt.
    """
    n = len(tokens) // len(problems)
    rows = []
    for i, response in enumerate(tokens):
        p = i // n
        prompt = (policy.model, policy.processor, problems[p], pictures[p])
        row = (response[mask[i]].tolist(), temperature, images[p] if images else None)
        rows.append(torch.stack(reference.score(*prompt, *row)))
    return torch.cat(rows, dim=1)


def assert_near(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def lists(sampled: Responses) -> list[list[int]]:
    """The responses' tokens without padding."""
    return [row[mask].tolist() for row, mask in zip(sampled.tokens, sampled.mask, strict=True)]


# ------------------------------------------------------------------------------------------ images


def test_pixel_values_of_several_images_are_in_order_and_equal_the_loops(sharp):
    sizes = [(64, 96), (64, 96), (32, 64)]
    images = [sharp.to_unit_image(picture(*size, seed)) for seed, size in enumerate(sizes)]
    ours = sharp.to_pixel_values(images)
    loops = torch.cat([reference.pixel_values(x, sharp.processor) for x in images])
    assert_near(ours["pixel_values"], loops, 1e-6)
    assert ours["image_grid_thw"].tolist() == [[1, 6, 4], [1, 6, 4], [1, 4, 2]]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_unit_image_is_the_picture_in_rgb(sharp, mode):
    image = picture(96, 64, mode=mode)
    x = sharp.to_unit_image(image)
    assert x.dtype == torch.float32 and x.shape == (3, 64, 96)
    pixels = np.array(image.convert("RGB"))
    assert torch.equal(x, torch.from_numpy(pixels).permute(2, 0, 1) / 255)


def test_trap_08_frames_of_an_attacked_picture_stay_equal(sharp):
    """A sign step on pixel_values would push the two temporal copies of a still picture apart."""
    prompts = sharp.encode(PROBLEMS[:1], PICTURES[:1])
    tokens, mask = responses(sharp, 1, 2, 5)

    def objective(images):
        return sharp.score(prompts.with_images(images), tokens, mask)[1][mask].mean()

    (attacked,) = egas.pgd_ascent(objective, prompts.images, eps=8 / 255, steps=2)
    patches = sharp.to_pixel_values([attacked])["pixel_values"].unflatten(1, (3, 2, -1))
    assert torch.equal(patches[:, :, 0], patches[:, :, 1])  # (patches, channel, frame, p * p)
    assert 0 <= attacked.min() and attacked.max() <= 1
    assert (attacked - prompts.images[0]).abs().max() > 7 / 255
    # As an 8-bit picture it reaches the model as attacked, up to half a grey level.
    ip = sharp.processor.image_processor
    saved = Image.fromarray((attacked * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    theirs = ip(images=[saved], return_tensors="pt")["pixel_values"].unflatten(1, (3, 2, -1))
    assert (theirs - patches).abs().max() <= 0.5 / 255 / min(ip.image_std) + 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        dict(image_mean=[0.1, 0.5, 0.7], image_std=[0.3, 0.2, 0.9]),
        dict(patch_size=8, merge_size=3, temporal_patch_size=4),
    ],
)
def test_trap_09_statistics_and_patch_sizes_are_the_processors(fresh, changes):
    ip, image = fresh.processor.image_processor, picture(70, 100)
    before = fresh.to_pixel_values([fresh.to_unit_image(image)])["pixel_values"]
    for name, value in changes.items():
        setattr(ip, name, value)
    ours = fresh.to_pixel_values([fresh.to_unit_image(image)])
    theirs = ip(images=[image], return_tensors="pt")
    assert_near(ours["pixel_values"], theirs["pixel_values"], 2e-6)
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert not torch.equal(ours["pixel_values"], before)


# ------------------------------------------------------------------------------------------ encode


def test_encode_equals_the_processors_chat_call(sharp, prompts):
    """Left padded. Each row's ids are those of its own chat call, its positions the model's own."""
    assert len(prompts) == 4 and prompts.counts == [1, 2, 0, 1] and prompts.mask.dtype == torch.bool
    model = sharp.model.model
    for p, (problem, pictures) in enumerate(zip(PROBLEMS, PICTURES, strict=True)):
        want = reference.prompt_inputs(sharp.processor, problem, pictures)
        ids, types = want["input_ids"], want["mm_token_type_ids"]
        assert torch.equal(prompts.ids[p][prompts.mask[p]], ids[0])
        grid = {"image_grid_thw": want["image_grid_thw"]} if pictures else {}
        positions, _ = model.get_rope_index(ids, types, **grid)
        assert torch.equal(prompts.positions[:, p, -ids.shape[1] :], positions[:, 0])
        assert prompts.next_position[p] == positions.max() + 1


@pytest.mark.parametrize("size", [(60, 250), (200, 200)])
def test_image_tokens_fit_the_image_within_narrow_limits(fresh, size):
    """The processor's resize may change its own result. An image is resized once."""
    fresh.processor.image_processor.size = SizeDict(shortest_edge=11 * 1024, longest_edge=12 * 1024)
    prompts = fresh.encode(["red"], [[picture(*size)]])
    want = reference.prompt_inputs(fresh.processor, "red", [picture(*size)])["input_ids"]
    assert torch.equal(prompts.ids, want)
    tokens = torch.tensor([[50, 60]])
    fresh.score(prompts, tokens, torch.ones_like(tokens, dtype=torch.bool))


def test_tokenised_prompts_are_batched_later(sharp, prompts):
    """In another order, and some of them: each as in encode."""
    rows = [sharp.tokenize(*pair) for pair in zip(PROBLEMS, PICTURES, strict=True)]
    assert [row.length for row in rows] == prompts.mask.sum(1).tolist()
    part = sharp.collate(rows[2:][::-1])
    assert part.counts == [1, 0] and torch.equal(part.images[0], prompts.images[3])
    for ours, p in ((0, 3), (1, 2)):
        assert torch.equal(part.ids[ours][part.mask[ours]], prompts.ids[p][prompts.mask[p]])
        assert part.next_position[ours] == prompts.next_position[p]


def test_prompts_slice_and_take_new_images(prompts):
    part = prompts[1:4]
    assert part.counts == [2, 0, 1] and torch.equal(part.ids, prompts.ids[1:4])
    assert torch.equal(part.positions, prompts.positions[:, 1:4])
    assert all(a is b for a, b in zip(part.images, prompts.images[1:], strict=True))
    assert prompts[2:3].images == []
    black = prompts.with_images([torch.zeros_like(x) for x in prompts.images])
    assert black[3:].images[0].max() == 0 and prompts.images[0].max() > 0
    with pytest.raises(ValueError, match="shapes"):
        prompts.with_images(prompts.images[::-1])


def test_pictures_stand_before_the_first_user_text(sharp):
    """And nowhere else in a conversation, if it has no <image>."""
    chat = [{"role": "system", "content": "Be brief."}]
    for role, content in (("user", "first"), ("assistant", "yes"), ("user", "second")):
        chat.append({"role": role, "content": content})
    text = sharp.chat_text(chat, 2)
    before, after = text.split("first")
    assert before.split("Be brief.")[1].count("<|image_pad|>") == 2
    assert text.count("<|image_pad|>") == 2 and "second" in after


@pytest.mark.parametrize("problem", ["", " \n"])
def test_an_empty_problem_is_refused(sharp, problem):
    with pytest.raises(ValueError, match="empty"):
        sharp.encode([problem], [[picture(32, 32)]])


def test_trap_04_a_long_prompt_is_refused_and_never_cut(fresh):
    fresh.processor.tokenizer.model_max_length = 50
    assert fresh.tokenize("red " * 1200, []).length > 1200
    length = fresh.tokenize("short", PICTURES[0]).length
    prompt = (["short"], PICTURES[:1])
    assert fresh.encode(*prompt, max_tokens=length).ids.shape[1] == length
    with pytest.raises(
        ValueError, match=f"{length} tokens, more than max_prompt_tokens={length - 1}"
    ):
        fresh.encode(*prompt, max_tokens=length - 1)


def test_trap_05_the_tokenizers_padding_side_changes_nothing(fresh, prompts):
    fresh.processor.tokenizer.padding_side = "right"
    again = fresh.encode(PROBLEMS, PICTURES)
    assert torch.equal(again.ids, prompts.ids) and torch.equal(again.mask, prompts.mask)
    assert torch.equal(again.positions, prompts.positions)
    assert again.mask[:, -1].all() and not again.mask.all()


def test_trap_05_type_ids_padded_on_the_other_side_are_refused(fresh):
    call = type(fresh.processor).__call__

    def crooked(self, *args, **kwargs):
        batch = call(self, *args, **kwargs)
        batch["mm_token_type_ids"] = batch["mm_token_type_ids"].flip(1)
        return batch

    fresh.processor.__class__ = type("Crooked", (type(fresh.processor),), {"__call__": crooked})
    with pytest.raises(RuntimeError, match="mm_token_type_ids"):
        fresh.encode(PROBLEMS, PICTURES)


# ------------------------------------------------------------------------------------------- score

SCORED = {
    "one, two and no pictures": (PROBLEMS, PICTURES, 3, 6, 1.0),
    "cooler": (PROBLEMS, PICTURES, 3, 6, 0.6),
    "one token": (PROBLEMS[:2], PICTURES[:2], 2, 1, 1.0),
    "text alone": (["3+4", "Which is larger, 3 or 4?"], [[], []], 2, 4, 1.0),
    "trap 06: pictures alone differ": (
        ["How many?"] * 3,
        PICTURES[:1] + PICTURES[3:] * 2,
        2,
        4,
        1.0,
    ),
}


@pytest.mark.parametrize("problems, pictures, n, T, temperature", SCORED.values(), ids=SCORED)
def test_score_equals_the_plain_forward(sharp, problems, pictures, n, T, temperature):
    """Left-padded prompts, several responses each: within 3e-5 nats of the row-by-row way."""
    tokens, mask = responses(sharp, len(problems), n, T)
    with torch.no_grad():
        ours = sharp.score(sharp.encode(problems, pictures), tokens, mask, temperature)
        want = reference_score(sharp, problems, pictures, tokens, mask, temperature)
    ours = torch.stack(ours)
    assert ours.dtype == torch.float32 and ours.isfinite().all()
    assert_near(ours[:, mask], want, 3e-5)


def test_gradients_equal_the_plain_forward(sharp, prompts):
    """Of weights and pixels, of a weighted sum: within 1e-5 of the largest of a tensor."""
    tokens, mask = responses(sharp, 4, 2, 5)
    images = [x.clone().requires_grad_() for x in prompts.images]
    images_of = [images[:1], images[1:3], [], images[3:]]
    leaves = [*images, *sharp.parameters()]
    weights = torch.randn(2, *tokens.shape, generator=torch.Generator().manual_seed(1))[:, mask]

    ours = torch.stack(sharp.score(prompts.with_images(images), tokens, mask))[:, mask]
    want = reference_score(sharp, PROBLEMS, PICTURES, tokens, mask, images=images_of)
    our_grads = torch.autograd.grad((weights * ours).sum(), leaves)
    want_grads = torch.autograd.grad((weights * want).sum(), leaves)
    for a, b in zip(our_grads, want_grads, strict=True):
        assert b.abs().max() > 0
        assert_near(a, b, 1e-5 * b.abs().max().item())


def test_padding_of_responses_has_no_influence(sharp, prompts):
    """Whatever token stands behind the mask, the values in front of it stay."""
    tokens, mask = responses(sharp, 4, 2, 6)
    other = torch.where(mask, tokens, 77)
    with torch.no_grad():
        before, after = (torch.stack(sharp.score(prompts, x, mask)) for x in (tokens, other))
    assert torch.equal(before[:, mask], after[:, mask])


def test_trap_02_stale_rope_deltas_change_nothing(fresh, prompts):
    """Other batches leave their offset in the model. Ours takes no notice."""
    tokens, mask = responses(fresh, 4, 2, 4)

    @torch.no_grad()
    def everything():
        rollouts = fresh.sample(prompts, 2, [1, 2, 3, 4], 4)
        return rollouts.tokens, rollouts.logprobs, *fresh.score(prompts, tokens, mask)

    def stale(deltas):
        fresh.model.model.rope_deltas = deltas

    want = everything()
    other = reference.prompt_inputs(fresh.processor, "other", [picture(256, 32)])
    disturb = [
        lambda: fresh.model(**other),
        lambda: fresh.model.generate(**other, max_new_tokens=2),
        lambda: stale(torch.full((8, 1), 1000)),
        lambda: stale(torch.full((3, 1), -7)),
    ]
    for call in disturb:
        call()
        assert fresh.model.model.rope_deltas is not None
        assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))


def test_trap_03_banned_tokens_have_no_probability(fresh):
    """Special tokens and ids beyond the tokenizer: -inf when scored, and the others sum to one."""
    tokenizer = fresh.processor.tokenizer
    known = len(tokenizer)
    fresh.model.resize_token_embeddings(known + 9)
    head = fresh.model.lm_head.weight.data
    head[known:] = head[:9] * 3  # ids of nothing, but likely ones
    head[tokenizer.convert_tokens_to_ids("<|image_pad|>")] *= 4
    policy = Policy(fresh.model, fresh.processor)
    banned, allowed = policy.banned, reference.allowed_tokens(policy.processor)
    assert (~banned).nonzero().flatten().tolist() == allowed and policy.eos_ids[0] in allowed

    prompts = policy.encode(PROBLEMS[:1], PICTURES[:1])
    every = torch.arange(known + 9)[:, None]
    with torch.no_grad():
        logprobs, entropy = policy.score(prompts, every, torch.ones_like(every, dtype=torch.bool))
        prompt = (policy.model, policy.processor, PROBLEMS[0], PICTURES[0])
        (want,) = reference.distributions(*prompt, [allowed[0]])
    assert (logprobs[banned] == -math.inf).all() and entropy.isfinite().all()
    assert_near(logprobs[~banned].squeeze(1), want)
    assert_near(logprobs[~banned].exp().sum(), torch.tensor(1.0))
    for n, temperature in ((200, 1.0), (1, 0.0)):
        sampled = policy.sample(prompts, n, [0], 3, temperature)
        assert not banned[sampled.tokens[sampled.mask]].any()


def test_trap_03_gradients_stay_finite_beside_banned_tokens(sharp):
    prompts = sharp.encode(PROBLEMS[:1], PICTURES[:1])
    x = prompts.images[0].clone().requires_grad_()
    tokens, mask = responses(sharp, 1, 2, 4)
    _, entropy = sharp.score(prompts.with_images([x]), tokens, mask)
    (grad,) = torch.autograd.grad(entropy[mask].sum(), x)
    assert grad.isfinite().all() and (grad != 0).float().mean() > 0.99


def test_trap_10_checkpointing_that_empties_the_cache_is_refused(fresh, prompts):
    """As the library's does in training mode. Ours, which keeps it: test_adapt.py."""
    adapt.checkpoint_layers(fresh)
    for layer in fresh.model.modules():
        layer._can_checkpoint_with_cache = False
    tokens, mask = responses(fresh, 4, 2, 4)
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        fresh.score(prompts, tokens, mask)
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        fresh.sample(prompts, 2, [0] * 4, 3)


def test_no_dropout_although_the_model_came_in_train_mode(processor):
    model = build_model(processor.tokenizer)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy = Policy(model.train(), processor)
    assert not any(module.training for module in policy.modules())
    prompts = policy.encode(PROBLEMS[:1], PICTURES[:1])
    tokens, mask = responses(policy, 1, 2, 4)
    first, second = (policy.score(prompts, tokens, mask)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_forward_is_score():
    """What DDP and FSDP wrap."""
    assert Policy.forward is Policy.score


# ---------------------------------------------------------------------------------- head, chunks


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


def test_the_head_in_chunks_is_exact_and_never_holds_all_logits(sharp, prompts, monkeypatch):
    """N T = 384 rows of logits in chunks of 7; 128 rows are the transposed weight of the head."""
    tokens, mask = responses(sharp, 4, 12, 8)
    images = [x.clone().requires_grad_() for x in prompts.images]
    leaves, V = [*images, *sharp.parameters()], len(sharp.banned)

    def run():
        with Largest(V) as largest:
            stats = torch.stack(sharp.score(prompts.with_images(images), tokens, mask, 0.8))
            grads = torch.autograd.grad(stats[:, mask].square().sum(), leaves)
        return largest.rows, [stats, *grads]

    monkeypatch.setattr("vlm.policy.RESPONSES_PER_CHUNK", 48)
    rows, whole = run()
    assert rows == 4 * 12 * 8
    monkeypatch.setattr("vlm.policy.LOGITS_PER_CHUNK", 7 * V)
    rows, chunked = run()
    assert rows <= 128
    for a, b in zip(chunked, whole, strict=True):
        assert_near(a, b, 1e-6 * b.abs().max().item())


class Memory(TorchDispatchMode):
    """The largest number of bytes that tensors made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            storage = x.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, storage: int, size: int) -> None:
        self.known.remove(storage)
        self.now -= size


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_share_a_log_softmax(temperature):
    """Those of grpo and tsec, bit for bit. A backward holds one tensor of the logits' size less."""

    def apart(z, y):
        return grpo.token_logprobs(z, y, temperature), tsec.token_entropy(z, temperature)

    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(50, 400, generator=generator)
    z[:, 390:] = -torch.inf
    y = torch.randint(390, (50,), generator=generator)
    weights = torch.randn(2, 50, generator=generator)
    leaf, results, peaks = z.requires_grad_(), [], []
    for function in (partial(logprobs_and_entropy, temperature=temperature), apart):
        with Memory() as memory:
            stats = torch.stack(function(leaf, y))
            (grad,) = torch.autograd.grad((weights * stats).sum(), leaf)
        results.append((stats, grad))
        peaks.append(memory.peak)
    (ours, our_grad), (theirs, their_grad) = results
    assert torch.equal(ours, theirs)
    assert_near(our_grad, their_grad, 1e-6)
    assert peaks[0] < peaks[1] - 0.9 * 50 * 400 * 4


def test_the_head_keeps_no_logits_for_the_backward(sharp, prompts):
    """They are computed again: nothing of V numbers per token is saved."""
    tokens, mask = responses(sharp, 4, 12, 8)
    saved = []

    def pack(x):
        saved.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sharp.score(prompts, tokens, mask)
    V = len(sharp.banned)
    assert len(saved) > 100 and not [shape for shape in saved if shape[-1:] == (V,)]


def test_a_chunk_of_a_large_vocabulary_is_bounded(sharp, monkeypatch):
    """At Qwen's 151,936 ids, 441 tokens at a time: 2^26 numbers, 256 MiB."""
    stand_in, seen = copy.copy(sharp), []
    stand_in._buffers = {"banned": torch.zeros(151_936, dtype=torch.bool)}
    monkeypatch.setattr(Policy, "logits", lambda self, h: seen.append(len(h)) or h)
    stand_in._head_in_chunks(torch.zeros(2, 500, 4), torch.zeros(2, 500, dtype=torch.long), 1.0)
    assert sum(seen) == 1000 and max(seen) * 151_936 <= 2**26


def count_responses(monkeypatch) -> list[torch.Size]:
    """The shapes of tokens that respond gets from now on."""
    respond, shapes = Policy.respond, []

    def counted(self, tokens, *args):
        shapes.append(tokens.shape)
        return respond(self, tokens, *args)

    monkeypatch.setattr(Policy, "respond", counted)
    return shapes


def test_scoring_computes_chunks_of_like_length(sharp, prompts, monkeypatch):
    """Less than all rows padded to the longest, the same values."""
    tokens, mask = responses(sharp, 4, 6, 40)
    shapes, results = count_responses(monkeypatch), []
    for rows in (24, 4):
        monkeypatch.setattr("vlm.policy.RESPONSES_PER_CHUNK", rows)
        with torch.no_grad():
            results.append(torch.stack(sharp.score(prompts, tokens, mask))[:, mask])
    assert_near(*results)
    numbers = [shape.numel() for shape in shapes]
    assert numbers[0] == 24 * 39 and sum(numbers[1:]) < 0.7 * numbers[0]


# ------------------------------------------------------------------------------------------ sample


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_follow_the_softmax(sharp, temperature):
    """12,000 tokens against the reference: chi-square of the cells that expect 10 or more."""
    prompts, allowed = sharp.encode(["red"], [[]]), reference.allowed_tokens(sharp.processor)
    drawn = sharp.sample(prompts, 12_000, [0], 1, temperature).tokens[:, 0]
    counts = drawn.bincount(minlength=len(sharp.banned)).double()
    with torch.no_grad():
        prompt = (sharp.model, sharp.processor, "red", [])
        (logp,) = reference.distributions(*prompt, [allowed[0]], temperature)
    expected, seen = logp.double().exp() * 12_000, counts[allowed]
    assert seen.sum() == 12_000
    large = expected >= 10
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    seen = torch.cat([seen[large], seen[~large].sum()[None]])
    cells = len(expected)
    assert cells > 20
    chi2 = ((seen - expected) ** 2 / expected).sum()
    assert abs(chi2 - (cells - 1)) < 4 * math.sqrt(2 * (cells - 1))


def test_later_tokens_follow_the_softmax(sharp, prompts):
    """sum_t (log p(y_t) + H_t) is a martingale: over 400 rows, within 4 deviations of 0."""
    sampled = sharp.sample(prompts, 100, [1, 2, 3, 4], 6, 0.8)
    prompt = (sharp.model, sharp.processor, PROBLEMS[0], PICTURES[0])
    variances = []
    for response in lists(sampled)[:5]:
        with torch.no_grad():
            distributions = reference.distributions(*prompt, response, 0.8)
        for logp in distributions:
            p = logp.exp()
            variances.append(((p * logp**2).sum() - (p * logp).sum() ** 2).item())
    surprise = (sampled.logprobs + sampled.entropy)[sampled.mask]
    assert abs(surprise.sum()) < 4 * math.sqrt(np.mean(variances) * len(surprise))
    assert 0.7 < surprise.var() / np.mean(variances) < 1.4


def test_draws_of_a_row_are_independent(sharp, prompts):
    """A token's id grows with its uniform number: shared numbers would correlate the ids."""
    sampled = sharp.sample(prompts, 100, [1, 2, 3, 4], 3)
    first, second, third = sampled.tokens[sampled.mask.all(1)].double().T
    assert len(first) > 200
    for a, b in ((first, second), (second, third), (first[:-1], first[1:])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.3


def test_temperature_zero_is_greedy(sharp, prompts):
    """The most likely tokens. Log-probs are those at temperature 1. All n rows are the same."""
    greedy = sharp.sample(prompts, 2, [0] * 4, 5, temperature=0)
    assert torch.equal(greedy.tokens[::2], greedy.tokens[1::2])
    allowed = reference.allowed_tokens(sharp.processor)
    for p in range(4):
        response = lists(greedy)[2 * p]
        prompt = (sharp.model, sharp.processor, PROBLEMS[p], PICTURES[p])
        with torch.no_grad():
            logps = torch.stack(reference.distributions(*prompt, response))
        best = logps.max(dim=1)
        assert response == [allowed[i] for i in best.indices.tolist()]
        assert_near(greedy.logprobs[2 * p, greedy.mask[2 * p]], best.values)


def test_rows_stop_at_their_end_token(sharp, prompts):
    """The mask runs up to and with the first end token. truncated() names rows without one."""
    sampled = sharp.sample(prompts, 8, [1, 2, 3, 4], 10)
    truncated = sampled.truncated(sharp.eos_ids)
    assert 0 < truncated.sum() < 32
    for tokens, mask, cut in zip(sampled.tokens.tolist(), sampled.mask, truncated, strict=True):
        ends = [t for t, token in enumerate(tokens) if token in sharp.eos_ids]
        length = 10 if cut else ends[0] + 1
        assert bool(ends) != cut
        assert mask.tolist() == [True] * length + [False] * (10 - length)
        assert tokens[length:] == [sharp.pad_id] * (10 - length)


def test_sampling_ends_with_the_last_row_but_is_three_tokens_wide(sharp, prompts):
    sampled = sharp.sample(prompts[:1], 3, [1], 200)
    assert sampled.tokens.shape[1] == sampled.mask.sum(1).max() < 200
    one = sharp.sample(prompts[:1], 3, [1], 1)
    assert one.tokens.shape == (3, 3) and one.mask.tolist() == [[True, False, False]] * 3
    assert (one.tokens[:, 1:] == sharp.pad_id).all()


def test_rows_that_have_ended_leave_the_batch(sharp, prompts, monkeypatch):
    """Those that are computed in a block: of the rows alive at its start all, and at most 4/3."""
    monkeypatch.setattr("vlm.decode.BLOCK_TOKENS", 4)
    shapes = count_responses(monkeypatch)
    sampled = sharp.sample(prompts, 8, [1, 2, 3, 4], 60)
    alive = sampled.mask.sum(dim=0).tolist()[1:]
    computed = [shape[0] for shape in shapes]
    assert 0 <= len(computed) - len(alive) < 4 and computed[0] > 4 * computed[-1]
    for start in range(0, len(alive), 4):
        block = computed[start : start + 4]
        assert len(set(block)) == 1
        assert alive[start] <= block[0] < alive[start] / 0.75 + 1


def test_trap_11_the_end_token_counts_although_it_is_the_padding_token(fresh, prompts):
    """pad = eos: the mask goes by position. The final end token is in it and has a gradient."""
    often = fresh.sample(prompts, 8, [1, 2, 3, 4], 10)
    fresh.pad_id = int(often.tokens[often.mask].mode().values)  # frequent enough to end responses
    fresh.eos_ids = [fresh.pad_id]
    sampled = fresh.sample(prompts, 8, [1, 2, 3, 4], 10)
    ended = ~sampled.truncated(fresh.eos_ids)
    assert ended.sum() > 3
    last = sampled.mask.sum(1) - 1
    assert (sampled.tokens[torch.arange(32), last][ended] == fresh.pad_id).all()
    logprobs, _ = fresh.score(prompts, sampled.tokens, sampled.mask)
    row = int(ended.nonzero()[0])
    assert_near(logprobs[row, last[row]], sampled.logprobs[row, last[row]])
    (grad,) = torch.autograd.grad(logprobs[row, last[row]], fresh.model.lm_head.weight)
    assert grad[fresh.pad_id].abs().max() > 0


def test_rollouts_depend_on_their_own_seed_alone(sharp, prompts):
    """Not on the batch around them, its padding, nor how many responses are drawn with them."""
    seeds = [11, 12, 13, 14]
    whole = lists(sharp.sample(prompts, 4, seeds, 6))
    assert lists(sharp.sample(prompts[1:3], 4, [12, 13], 6)) == whole[4:12]
    alone = sharp.encode(PROBLEMS[3:], PICTURES[3:])
    assert lists(sharp.sample(alone, 4, [14], 6)) == whole[12:]
    halves = [row for i, row in enumerate(whole) if i % 4 < 2]
    assert lists(sharp.sample(prompts, 2, seeds, 6)) == halves
    assert lists(sharp.sample(prompts, 4, seeds, 6)) == whole
    assert lists(sharp.sample(prompts, 4, [21, 22, 23, 24], 6)) != whole
    assert len({tuple(row) for row in whole}) > 12  # the four of a prompt differ
    with pytest.raises(ValueError, match="one seed per prompt: got 3 for 4"):
        sharp.sample(prompts, 4, seeds[:3], 6)


@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_prompts_at_a_time_and_a_given_read_change_nothing(sharp, prompts, monkeypatch, size):
    """Pieces are padded to the longest. With `read` no prompt is computed again."""
    read, sizes = sharp.read(prompts), []
    options = (3, [1, 2, 3, 4], 12, 0.9)
    want = sharp.sample(prompts, *options)
    before = Policy.read
    monkeypatch.setattr(Policy, "read", lambda self, p: sizes.append(len(p)) or before(self, p))
    pieces = sharp.sample(prompts, *options, prompts_at_a_time=size)
    assert sizes == {1: [1] * 4, 3: [3, 1]}.get(size, [4])
    given = sharp.sample(prompts, *options, prompts_at_a_time=size, read=read)
    again = sharp.sample(prompts, *options, read=read)
    assert sum(sizes) == 4 and len({len(row) for row in lists(want)}) > 2
    for ours in (pieces, given, again):
        assert torch.equal(ours.tokens, want.tokens) and torch.equal(ours.mask, want.mask)
        assert_near(ours.logprobs[ours.mask], want.logprobs[want.mask])
        assert_near(ours.entropy[ours.mask], want.entropy[want.mask])


def test_trap_01_generation_config_cannot_make_rollouts_greedy(fresh, prompts):
    """A checkpoint with Qwen2.5-VL's near-greedy settings, and worse, samples as one without."""
    want = fresh.sample(prompts, 4, [1, 2, 3, 4], 6)
    assert len({tuple(row) for row in lists(want)}) > 12
    fresh.model.generation_config.update(
        do_sample=True,
        top_k=1,
        top_p=0.001,
        temperature=1e-6,
        repetition_penalty=1.5,
        min_new_tokens=6,
        suppress_tokens=[int(want.tokens[0, 0])],
    )
    again = Policy(fresh.model, fresh.processor)
    again.eos_ids = fresh.eos_ids
    assert again.model.generation_config.top_k == 1
    assert torch.equal(again.sample(prompts, 4, [1, 2, 3, 4], 6).tokens, want.tokens)


def test_decode_leaves_out_padding_and_the_end_token(sharp):
    tokenizer = sharp.processor.tokenizer
    texts = ["<think>3 + 4 = 7.</think> \\boxed{7}", " a , b . 's", "é 中"]
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    T = max(map(len, ids)) + 2
    tokens = torch.tensor([row + [50] * (T - len(row)) for row in ids])  # the mask tells, not 50
    mask = torch.arange(T) < torch.tensor([[len(row)] for row in ids])
    zeros = torch.zeros(tokens.shape)
    assert sharp.decode(Responses(tokens, mask, zeros, zeros)) == texts


# ------------------------------------------------------------------------- loading, saving, dtypes


def test_bfloat16_runs_and_is_near_float32(tiny):
    low, full = Policy.from_pretrained(tiny, dtype="bfloat16"), Policy.from_pretrained(tiny)
    assert next(low.parameters()).dtype == torch.bfloat16
    prompts = low.encode(PROBLEMS, PICTURES)
    sampled = low.sample(prompts, 2, [1, 2, 3, 4], 6)
    images = [x.clone().requires_grad_() for x in prompts.images]
    ours = torch.stack(low.score(prompts.with_images(images), sampled.tokens, sampled.mask))
    want = torch.stack(full.score(prompts, sampled.tokens, sampled.mask))
    assert ours.dtype == sampled.logprobs.dtype == sampled.entropy.dtype == torch.float32
    for grad in torch.autograd.grad(ours[1, sampled.mask].sum(), images):
        assert grad.dtype == torch.float32 and grad.isfinite().all() and grad.any()
    assert_near(ours, want, 0.05)
    assert_near(sampled.logprobs[sampled.mask], ours[0, sampled.mask], 0.05)


@pytest.mark.parametrize("dtype, gathered", [("float32", 0), ("bfloat16", 1)])
def test_a_saved_policy_loads_bit_for_bit(tiny, tmp_path, dtype, gathered):
    """Its own parameters, or those of a gathered state dict, which are others."""
    policy = Policy.from_pretrained(tiny, dtype=dtype)
    state = {name: w + 1 for name, w in policy.state_dict().items()}
    policy.save_pretrained(tmp_path, state if gathered else None)
    found = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    want = {name: w + gathered for name, w in policy.model.state_dict().items()}
    assert want.keys() == found.keys()
    for name, w in want.items():
        assert torch.equal(w, found[name]) and w.dtype == found[name].dtype
    processors = policy.processor, AutoProcessor.from_pretrained(tmp_path)
    a, b = (reference.prompt_inputs(x, PROBLEMS[1], PICTURES[1]) for x in processors)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_other_models_are_refused_by_name(sharp, tmp_path):
    config = Qwen2Config(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 2
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'qwen2' model.*vision-language.*qwen2_vl, qwen2_5_vl"):
        Policy.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "paligemma"}')
    with pytest.raises(ValueError, match="'paligemma' model"):
        Policy.from_pretrained(tmp_path)
    model = copy.copy(sharp.model)
    model.config = copy.copy(model.config)
    model.config.model_type = "paligemma"
    with pytest.raises(ValueError, match="'paligemma' is not supported.*qwen2_vl, qwen2_5_vl"):
        Policy(model, sharp.processor)
