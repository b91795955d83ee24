"""Every family of policy.FAMILIES, on tiny random models with the real model and processor classes (tiny.py).

    python tests/test_families.py    # writes benchmarks/families.json: the largest differences found, family by family

The plain way that the shared prompt is compared with: the processor's own chat call and the model's own forward, one
response at a time, nothing padded or cached. All in float32, on sharpened models (reference.py).
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import reference  # noqa: E402
import tiny  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

import egas  # noqa: E402
import train_saei  # noqa: E402
import tsec  # noqa: E402
from vlm import policy as policy_module
from vlm import families as families_module  # noqa: E402
from vlm.families import FAMILIES
from vlm.policy import Policy  # noqa: E402

KINDS = list(tiny.BUILD)
FIXED = [kind for kind in KINDS if not kind.startswith("qwen")]
TOLERANCE = (
    2e-5  # nats, or shares of a tensor's largest gradient: rounding of a sharpened model in float32
)
PROBLEMS = [
    "how many dots ?",
    "which of the two pictures shows red ? look , then say 1 or 2 .",
    "what is 1 + 2 ?",
]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [
    [picture(32, 32)],
    [picture(48, 32, 1), picture(32, 48, 2)],
    [],
]  # two sizes, two in a prompt, none


def make_policy(kind: str) -> Policy:
    torch.manual_seed(0)
    model, processor = tiny.build(kind)
    return Policy(reference.sharpen(model), processor)


@pytest.fixture(scope="module", params=KINDS)
def family(request):
    """Not to be changed by a test."""
    return make_policy(request.param)


def final(policy: Policy, image: Image.Image) -> Image.Image:
    """The picture as the vision tower sees it: what any resize leaves as it is."""
    return Image.fromarray(
        (policy.to_unit_image(image) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    )


def plain_inputs(
    policy: Policy, problem: str, pictures: list[Image.Image]
) -> dict[str, torch.Tensor]:
    """The processor's own chat call on pictures at their final size."""
    content = [{"type": "image", "image": final(policy, x)} for x in pictures] + [
        {"type": "text", "text": problem}
    ]
    return policy.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=dict(
            FAMILIES[policy.model.config.model_type].untiled
        ),  # a copy: the call writes into it
    )


def plain_score(
    policy: Policy, problem, pictures, images, response: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies (T,) of one response; `images`, in [0, 1], stand for the pictures' pixels."""
    inputs = dict(plain_inputs(policy, problem, pictures))
    L, T = inputs["input_ids"].shape[1], len(response)
    for name in [name for name, x in inputs.items() if x.shape == (1, L)]:
        more = {"input_ids": response, "attention_mask": [1] * T}.get(name, [0] * T)
        inputs[name] = torch.cat([inputs[name], torch.tensor([more])], dim=1)
    if images:
        inputs |= policy.to_pixel_values(images)
    if hasattr(policy.model.model, "rope_deltas"):
        policy.model.model.rope_deltas = None
    logits = (
        policy.model(**inputs, use_cache=False)
        .logits[0, L - 1 : -1]
        .masked_fill(policy.banned, -torch.inf)
    )
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(policy.banned, 0.0)).sum(-1)
    return logp.gather(1, torch.tensor(response)[:, None]).squeeze(1), entropy


def responses(policy: Policy, P: int, n: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random allowed tokens of random lengths.   -> (P n, T), (P n, T)"""
    g = torch.Generator().manual_seed(0)
    allowed = (~policy.banned).nonzero().flatten()
    lengths = torch.randint(1, T + 1, (P * n,), generator=g)
    lengths[0], lengths[-1] = T, 1
    mask = torch.arange(T) < lengths[:, None]
    return allowed[torch.randint(len(allowed), (P * n, T), generator=g)].masked_fill(
        ~mask, policy.pad_id
    ), mask


def relative(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest |a - b| of any tensor over its largest entry, or over a hundredth of all tensors' largest: some
    weights have no influence (keys' biases), and gradients of pure rounding."""
    largest = max(b.abs().max().item() for b in theirs)
    scales = [max(b.abs().max().item(), 1e-2 * largest) for b in theirs]
    return max(
        (a - b).abs().max().item() / scale for a, b, scale in zip(ours, theirs, scales, strict=True)
    )


def compare(policy: Policy) -> dict[str, float]:
    """The shared prompt against the plain way, on three prompts at once, two responses each."""
    tokens, mask = responses(policy, 3, 2, 5)
    prompts = policy.encode(PROBLEMS, PICTURES)
    images = [x.clone().requires_grad_() for x in prompts.images]
    parameters = list(policy.parameters())
    weights = torch.randn(2, *tokens.shape, generator=torch.Generator().manual_seed(1))[:, mask]
    grads = lambda stats: torch.autograd.grad(
        (weights * stats).sum(), [*images, *parameters], allow_unused=True
    )  # noqa: E731

    ours = torch.stack(policy.score(prompts.with_images(images), tokens, mask))[
        :, mask
    ]  # (2, tokens)
    own, rows = [images[:1], images[1:], []], []
    for i, (row, keep) in enumerate(zip(tokens, mask, strict=True)):
        rows.append(
            torch.stack(
                plain_score(
                    policy, PROBLEMS[i // 2], PICTURES[i // 2], own[i // 2], row[keep].tolist()
                )
            )
        )
    plain = torch.cat(rows, dim=1)
    pairs = list(zip(grads(ours), grads(plain), strict=True))
    assert all((a is None or not a.any()) == (b is None or not b.any()) for a, b in pairs)
    ours_g, plain_g = zip(
        *[(a, b) for a, b in pairs if a is not None and b is not None], strict=True
    )
    return {
        "log-probs": (ours - plain).abs().max().item(),
        "pixel gradient": relative(ours_g[:3], plain_g[:3]),
        "weight gradient": relative(ours_g[3:], plain_g[3:]),
    }


def attack(policy: Policy) -> tuple[float, float]:
    """Entropy of TsEC's tokens on the clean and on the attacked images: two steps of PGD at 1/255."""
    prompts = policy.encode(PROBLEMS[:2], PICTURES[:2])
    sampled = policy.sample(prompts, 3, [1, 2], 6)
    keep = tsec.select_tokens(sampled.entropy, sampled.mask)

    def objective(images):
        entropy = policy.score(prompts.with_images(images), sampled.tokens, sampled.mask)[1]
        return tsec.selective_entropy(entropy, keep)

    attacked = egas.pgd_ascent(objective, prompts.images, eps=1 / 255, steps=2)
    with torch.no_grad():
        return objective(prompts.images).mean().item(), objective(attacked).mean().item()


# -------------------------------------------------------------------------------------------------------------- images

SIZES = [(32, 32), (48, 32), (30, 61), (100, 40), (7, 5), (64, 64)]


def pixel_error(policy: Policy) -> float:
    """Ours against the processor's, over pictures of all SIZES, each alone and all together."""
    ip, untiled, worst = policy.processor.image_processor, policy.family.untiled, 0.0
    square = policy.family.one_tile  # of an oblong picture its second tile would be another
    pictures = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    pictures = [final(policy, x) if square else x for x in pictures]
    for group in [[x] for x in pictures] + [pictures]:
        ours = policy.to_pixel_values([policy.to_unit_image(x) for x in group])
        theirs = ip(images=group, return_tensors="pt", **untiled)
        a, b = ours["pixel_values"], theirs["pixel_values"]
        b = b if b.ndim < 5 else b.view(a.shape)  # a row a prompt, not a row an image
        assert a.shape == b.shape
        worst = max(worst, (a - b).abs().max().item())
        for name in ours.keys() - {"pixel_values"}:
            x, y = ours[name].flatten().float(), torch.as_tensor(theirs[name]).flatten().float()
            assert torch.equal(x, y), name
    return worst


def test_pixel_values_equal_the_processors(family):
    assert pixel_error(family) <= 1e-6


@pytest.mark.parametrize("kind", FIXED)
def test_an_image_has_the_size_of_the_tower(kind):
    policy = make_policy(kind)
    for size in SIZES:
        assert policy.to_unit_image(picture(*size)).shape == (3, tiny.SIDE, tiny.SIDE)


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_a_family_that_always_tiles_gets_the_thumbnail_as_its_only_tile(kind):
    """Thumbnail and tile are one image, so no attack drives them apart; the thumbnail is the processor's own."""
    policy = make_policy(kind)
    x = policy.to_unit_image(picture(60, 30))
    ours = policy.to_pixel_values([x])["pixel_values"]
    assert ours.shape[1] == 2 and torch.equal(ours[:, 0], ours[:, 1])
    _, processor = tiny.build(kind)  # its grid as it was
    theirs = processor.image_processor([picture(60, 30)], return_tensors="pt")["pixel_values"]
    assert theirs.shape[1] > 2
    torch.testing.assert_close(ours[0, 0], theirs[0, 0], atol=1e-6, rtol=0)
    assert policy.model.model.config.image_grid_pinpoints == [[tiny.SIDE, tiny.SIDE]]


@pytest.mark.parametrize("kind", ["smolvlm", "idefics3", "internvl", "gemma3"])
def test_tiling_that_a_checkpoint_switches_on_stays_off(kind):
    """An oblong picture that the image processor, as it is set, would cut up: one image, one lot of image tokens."""
    policy, oblong = make_policy(kind), picture(128, 40)
    ip, tokens = (
        policy.processor.image_processor,
        policy.encode(PROBLEMS[:1], PICTURES[:1]).ids.shape,
    )
    whole = ip([oblong], return_tensors="pt", **policy.family.untiled)["pixel_values"]
    ip.do_image_splitting = ip.crop_to_patches = ip.do_pan_and_scan = True
    (
        ip.pan_and_scan_min_crop_size,
        ip.pan_and_scan_max_num_crops,
        ip.pan_and_scan_min_ratio_to_activate,
    ) = 4, 4, 1.2
    assert len(ip([oblong], return_tensors="pt")["pixel_values"].flatten(0, -4)) > 2
    ours = policy.to_pixel_values([policy.to_unit_image(oblong)])["pixel_values"]
    torch.testing.assert_close(ours, whole.view(ours.shape), atol=1e-6, rtol=0)
    assert policy.encode(PROBLEMS[:1], [[oblong]]).ids.shape == tokens
    assert policy.self_check()["pixels"] <= 1e-6


@pytest.mark.parametrize("kind", ["smolvlm", "llava_next"])
def test_a_picture_cut_into_tiles_is_refused(kind):
    policy = make_policy(kind)
    policy.family = policy.family._replace(untiled={})
    policy.processor.image_processor.image_grid_pinpoints = [[tiny.SIDE, 2 * tiny.SIDE]]
    with pytest.raises(ValueError, match="ImageProcessor cuts a picture into [35] tiles"):
        policy.encode(PROBLEMS[:1], [[picture(96, 40)]])


def test_every_pixel_has_a_gradient(family):
    x = family.to_unit_image(picture(48, 32)).requires_grad_()
    (grad,) = torch.autograd.grad(family.to_pixel_values([x])["pixel_values"].sum(), x)
    times = {"qwen": 2, "llava_next": 2, "llava_onevision": 2}  # temporal slots; thumbnail and tile
    kind = family.model.config.model_type
    want = times.get(kind, times.get(kind[:4], 1)) / torch.tensor(
        list(family.processor.image_processor.image_std)
    )
    torch.testing.assert_close(grad, want.view(3, 1, 1).expand_as(grad))


def test_pixel_limits_are_honoured_or_refused_by_name(family, tmp_path):
    family.save_pretrained(tmp_path)
    kind = family.model.config.model_type
    if kind in FIXED:
        with pytest.raises(
            ValueError,
            match=f"{kind} sees every picture at one size.*for qwen2_vl, qwen2_5_vl, qwen3",
        ):
            Policy.from_pretrained(tmp_path, max_pixels=1024)
        return
    small = Policy.from_pretrained(tmp_path, max_pixels=32 * 32)
    assert small.to_unit_image(picture(64, 64)).shape == (3, 32, 32)
    assert Policy.from_pretrained(tmp_path, min_pixels=48 * 48).to_unit_image(
        picture(16, 16)
    ).shape == (3, 48, 48)
    assert (
        small.encode(PROBLEMS[:1], [[picture(64, 64)]]).ids.shape
        < family.encode(PROBLEMS[:1], [[picture(64, 64)]]).ids.shape
    )
    small.save_pretrained(tmp_path)
    assert Policy.from_pretrained(tmp_path).to_unit_image(picture(64, 64)).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="min_pixels <= max_pixels, got 4000 and 1024"):
        Policy.from_pretrained(tmp_path, min_pixels=4000)


# ------------------------------------------------------------------------------------------------------ shared = plain


def test_encode_equals_the_processors_chat_call(family):
    """Prompts of two sizes of pictures, two pictures and none, left padded in one batch: ids as each alone."""
    prompts = family.encode(PROBLEMS, PICTURES)
    assert prompts.counts == [1, 2, 0]
    for p, (problem, pictures) in enumerate(zip(PROBLEMS, PICTURES, strict=True)):
        want = plain_inputs(family, problem, pictures)["input_ids"][0]
        assert torch.equal(prompts.ids[p][prompts.mask[p]], want)
        assert prompts.mask[p].tolist() == [False] * (prompts.ids.shape[1] - len(want)) + [
            True
        ] * len(want)
        assert family.prompt_tokens({"problem": problem, "images": pictures}) == len(want)


def test_shared_prompt_equals_the_plain_forward(family):
    """One, two and no pictures in a batch; log-probs, entropies, gradients. A wrong position would be above 0.1."""
    errors = compare(family)
    assert max(errors.values()) <= TOLERANCE


def test_a_slice_of_prompts_scores_as_in_the_whole(family):
    prompts, (tokens, mask) = family.encode(PROBLEMS, PICTURES), responses(family, 3, 2, 4)
    with torch.no_grad():
        whole = family.score(prompts, tokens, mask)
        for p in range(3):
            rows = slice(2 * p, 2 * p + 2)
            part = family.score(prompts[p : p + 1], tokens[rows], mask[rows])
            for a, b in zip(part, whole, strict=True):
                torch.testing.assert_close(
                    a[mask[rows]], b[rows][mask[rows]], atol=TOLERANCE, rtol=0
                )


def test_sampled_values_equal_scored_ones(family):
    prompts = family.encode(PROBLEMS, PICTURES)
    sampled = family.sample(prompts, 3, [1, 2, 3], 6, temperature=0.9)
    with torch.no_grad():
        logprobs, entropy = family.score(prompts, sampled.tokens, sampled.mask, 0.9)
    torch.testing.assert_close(
        sampled.logprobs[sampled.mask], logprobs[sampled.mask], atol=TOLERANCE, rtol=0
    )
    torch.testing.assert_close(
        sampled.entropy[sampled.mask], entropy[sampled.mask], atol=TOLERANCE, rtol=0
    )


def test_the_attack_raises_the_entropy(family):
    clean, attacked = attack(family)
    assert attacked > clean + 0.01


def test_no_token_of_an_image_can_be_sampled(family):
    """Whatever the processor writes around and for a picture, and special tokens, the end token apart."""
    tokenizer = family.processor.tokenizer
    with_picture = set(plain_inputs(family, PROBLEMS[0], PICTURES[0])["input_ids"][0].tolist())
    without = set(plain_inputs(family, PROBLEMS[0], [])["input_ids"][0].tolist())
    of_images = with_picture - without
    names = [
        "<row_1_col_1>",
        "<row_6_col_6>",
        "<global-img>",
        "<video>",
        "<|video_pad|>",
        "</img>",
        "<end_of_image>",
    ]
    of_images |= {
        tokenizer.get_added_vocab()[name] for name in names if name in tokenizer.get_added_vocab()
    }
    assert of_images and all(family.banned[i] for i in of_images)
    assert not family.banned[family.eos_ids].any() and family.banned.sum() < len(
        family.banned
    ) - len(tiny.WORDS)


def test_a_saved_policy_loads_with_the_auto_classes(family, tmp_path):
    """Weights bit for bit; the processor's grid of tiles as it was trained with; the same log-probs."""
    family.save_pretrained(tmp_path)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    want, found = family.model.state_dict(), model.state_dict()
    assert type(model) is type(family.model) and want.keys() == found.keys()
    assert all(torch.equal(want[name], found[name]) for name in want)
    prompts = family.encode(PROBLEMS, PICTURES)
    tokens, mask = responses(family, 3, 2, 4)
    again = Policy(model, processor)
    with torch.no_grad():
        for a, b in zip(
            family.score(prompts, tokens, mask),
            again.score(again.encode(PROBLEMS, PICTURES), tokens, mask),
            strict=True,
        ):
            assert torch.equal(a[mask], b[mask])
    assert torch.equal(family.banned, again.banned)


# ------------------------------------------------------------------------------------------------------------ training


def write_rows(folder: Path, rows: list[tuple[str, list[Image.Image]]]) -> str:
    lines = []
    for i, (problem, pictures) in enumerate(rows):
        names = [f"{i}-{k}.png" for k in range(len(pictures))]
        for name, x in zip(names, pictures, strict=True):
            x.save(folder / name)
        lines.append(json.dumps({"images": names, "problem": problem, "answer": str(i)}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return str(folder / "rows.jsonl")


def settings(model: Path | str, dataset: str, out: Path, **changes) -> list[str]:
    """The command line of a short run."""
    options = dict(
        model=model,
        dataset=dataset,
        split="train",
        output=out,
        steps=1,
        save_every=1,
        prompts_per_step=3,
    )
    options |= dict(
        rollouts=4, adversarial_rollouts=2, max_new_tokens=5, micro_prompts=3, pgd_steps=2, lr=1e-3
    )
    options |= dict(eps=1 / 255, condition="sampled", format_weight=0.5, accuracy_weight=0.5)
    return [
        word for name, value in (options | changes).items() for word in (f"--{name}", str(value))
    ]


@pytest.fixture
def some_reward(monkeypatch):
    """Random policies earn nothing: a reward that depends on the text alone."""
    monkeypatch.setattr(
        train_saei.rewards,
        "format_reward",
        lambda completions, **_: [len(text) % 7 / 7 for text in completions],
    )


def test_a_whole_training_step(family, tmp_path, some_reward, capsys):
    """train_saei.main on one, two and no pictures: it checks itself, attacks, updates; the checkpoint loads."""
    family.save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path, list(zip(PROBLEMS, PICTURES, strict=True)))
    train_saei.main(train_saei.load_config(settings(tmp_path / "model", rows, tmp_path / "out")))
    assert "self-check" in capsys.readouterr().out
    (metrics,) = [
        json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    ]
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["grad_norm"] > 0
    assert metrics["attack/linf"] == pytest.approx(
        2 / 3 / 255, abs=1e-6
    )  # eps, eps, and 0 of the text alone
    assert metrics["entropy/attacked"] > metrics["entropy/selected"]
    trained = Policy.from_pretrained(tmp_path / "out/checkpoints/step-000001").model.state_dict()
    moved = {
        name for name, w in family.model.state_dict().items() if not torch.equal(w, trained[name])
    }
    assert any("lm_head" in name for name in moved) and any(
        name.startswith(f"model.{family.family.tower}") for name in moved
    )


# ---------------------------------------------------------------------------------------------------------- self-check


def test_the_self_check_passes_and_names_its_figures(family):
    errors = family.self_check()
    assert (
        errors.keys() == {"pixels", "logits"}
        and errors["pixels"] <= 1e-6
        and errors["logits"] <= 1e-4
    )


def test_the_self_check_refuses_another_normalisation(family, monkeypatch):
    """As if the library subtracted another mean: 0.01 of it."""
    before = families_module.normalise
    monkeypatch.setattr(families_module, "normalise", lambda x, ip: before(x, ip) + 0.01)
    with pytest.raises(
        RuntimeError, match="pixel_values differ from the image processor's by 0.01"
    ):
        family.self_check()


def test_the_self_check_refuses_another_number_of_patches(family, monkeypatch):
    before = family.family.pixel_values
    half = lambda images, ip: {
        k: v[..., ::2] for k, v in before(images, ip).items() if k == "pixel_values"
    }  # noqa: E731
    monkeypatch.setattr(family, "family", family.family._replace(pixel_values=half))
    with pytest.raises(RuntimeError, match="pixel_values differ from the image processor's by inf"):
        family.self_check()


def test_the_self_check_refuses_a_wrong_position(family, monkeypatch):
    """Responses that begin one position late; the figure is far above rounding."""
    before = Policy._positions
    late = lambda self, *args: (lambda positions, following: (positions, following + 1))(
        *before(self, *args)
    )  # noqa: E731
    monkeypatch.setattr(Policy, "_positions", late)
    with pytest.raises(
        RuntimeError, match=r"logits after the shared prompt differ.*by (0\.[1-9]|[1-9])"
    ):
        family.self_check()


def test_the_self_check_refuses_a_prompt_without_its_token_types():
    policy = make_policy("gemma3")
    policy.family = policy.family._replace(token_types=None)
    with pytest.raises(
        RuntimeError, match="self-check of gemma3: logits after the shared prompt differ"
    ):
        policy.self_check()


def test_the_self_check_refuses_a_model_in_bfloat16_too(family, monkeypatch):
    """Its limit there is 0.5, above rounding; a wrong position is beyond it on a model with opinions."""
    policy = make_policy(family.model.config.model_type)
    policy.model.to(torch.bfloat16)
    assert policy.self_check()["logits"] < 0.3
    before = Policy._positions
    late = lambda self, *args: (lambda positions, following: (positions, following + 1))(
        *before(self, *args)
    )  # noqa: E731
    monkeypatch.setattr(Policy, "_positions", late)
    with pytest.raises(RuntimeError, match="below 0.5"):
        policy.self_check()


def test_the_self_check_can_be_switched_off(tmp_path, some_reward, monkeypatch):
    make_policy("smolvlm").save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path, list(zip(PROBLEMS, PICTURES, strict=True)))
    monkeypatch.setattr(Policy, "self_check", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_saei.main(
            train_saei.load_config(settings(tmp_path / "model", rows, tmp_path / "out"))
        )
    off = settings(tmp_path / "model", rows, tmp_path / "out", self_check=False)
    train_saei.main(train_saei.load_config(off))


def notes(policy: Policy) -> str:
    """What FAMILIES says, in words."""
    family = policy.family
    size = (
        "one size"
        if family.resize is families_module.fixed_resize
        else "any size, min_pixels, max_pixels"
    )
    words = [size, *(f"{name}={value}" for name, value in family.untiled.items())]
    words += ["thumbnail and one tile, the same image"] * family.one_tile
    words += [f"{family.token_types} in the prompt"] if family.token_types else []
    return ", ".join(words)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for kind in KINDS:
        policy = make_policy(kind)
        clean, attacked = attack(policy)
        found = {"pixel_values": pixel_error(policy), **compare(policy)}
        found |= {
            "shared prompt": max(found.values()) <= TOLERANCE,
            "self-check": policy.self_check()["logits"],
        }
        rows.append(
            {
                "family": kind,
                **found,
                "entropy": clean,
                "attacked": attacked,
                "notes": notes(policy),
            }
        )
        print(rows[-1])
    (ROOT / "benchmarks/families.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
