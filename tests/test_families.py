"""Every family of vlm.families, on tiny random models of the real classes (tests/families.py)."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests import families, tiny
from tests.families import (
    KINDS,
    PICTURES,
    PROBLEMS,
    SIZES,
    TOLERANCE,
    checkpoint,
    make_policy,
    picture,
    plain_inputs,
    responses,
    shared_policy,
)
from tests.short_run import train, write_rows
from vlm import pixels
from vlm.families import FAMILIES, REFUSED
from vlm.policy import Policy

FIXED = [kind for kind in KINDS if FAMILIES[kind].resize is pixels.fixed_resize]
LIMITED = [kind for kind in KINDS if FAMILIES[kind].limits_per_pixel]


@pytest.fixture(params=KINDS)
def policy(request):
    """Not to be changed by a test."""
    return shared_policy(request.param)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    pairs = list(zip(PROBLEMS, PICTURES, strict=True))
    return write_rows(tmp_path_factory.mktemp("rows"), pairs)


def test_every_family_has_its_tiny_model():
    assert KINDS == list(FAMILIES)


# ------------------------------------------------------------------------------------------ images


def test_pixel_values_equal_the_processors(policy):
    assert families.pixel_error(policy) <= 1e-6


@pytest.mark.parametrize("kind", FIXED)
def test_an_image_has_the_size_of_the_tower(kind):
    for size in SIZES:
        image = shared_policy(kind).to_unit_image(picture(*size))
        assert image.shape == (3, tiny.SIDE, tiny.SIDE)


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_a_family_that_always_tiles_gets_the_thumbnail_as_its_only_tile(kind):
    """Thumbnail and tile are one image: no attack drives them apart. It is the processor's own."""
    policy, oblong = shared_policy(kind), picture(60, 30)
    ours = policy.to_pixel_values([policy.to_unit_image(oblong)])["pixel_values"]
    assert ours.shape[1] == 2 and torch.equal(ours[:, 0], ours[:, 1])
    _, processor = tiny.build(kind)  # its grid as it was
    theirs = processor.image_processor([oblong], return_tensors="pt")["pixel_values"]
    assert theirs.shape[1] > 2
    torch.testing.assert_close(ours[0, 0], theirs[0, 0], atol=1e-6, rtol=0)
    assert policy.model.model.config.image_grid_pinpoints == [[tiny.SIDE, tiny.SIDE]]


@pytest.mark.parametrize("kind", ["smolvlm", "idefics3", "internvl", "gemma3"])
def test_tiling_that_a_checkpoint_switches_on_stays_off(kind):
    """A picture that the image processor, as it is set, would cut up: one image, as many tokens."""
    policy, oblong = make_policy(kind), picture(128, 40)
    ip, untiled = policy.processor.image_processor, policy.family.untiled
    shape = policy.encode(PROBLEMS[:1], PICTURES[:1]).ids.shape
    whole = ip([oblong], return_tensors="pt", **untiled)["pixel_values"]
    ip.do_image_splitting = ip.crop_to_patches = ip.do_pan_and_scan = True
    ip.pan_and_scan_min_crop_size = ip.pan_and_scan_max_num_crops = 4
    ip.pan_and_scan_min_ratio_to_activate = 1.2
    assert len(ip([oblong], return_tensors="pt")["pixel_values"].flatten(0, -4)) > 2
    ours = policy.to_pixel_values([policy.to_unit_image(oblong)])["pixel_values"]
    torch.testing.assert_close(ours, whole.view(ours.shape), atol=1e-6, rtol=0)
    assert policy.encode(PROBLEMS[:1], [[oblong]]).ids.shape == shape
    assert policy.self_check()["pixels"] <= 1e-6


@pytest.mark.parametrize("kind", ["smolvlm", "llava_next"])
def test_a_picture_cut_into_tiles_is_refused(kind):
    policy = make_policy(kind)
    policy.family = policy.family._replace(untiled={})
    policy.processor.image_processor.image_grid_pinpoints = [[tiny.SIDE, 2 * tiny.SIDE]]
    with pytest.raises(ValueError, match=r"ImageProcessor\w* cuts a picture into [35] tiles"):
        policy.encode(PROBLEMS[:1], [[picture(96, 40)]])


def test_every_pixel_has_a_gradient(policy):
    """Each pixel appears once per temporal slot, or in thumbnail and tile."""
    image = policy.to_unit_image(picture(48, 32)).requires_grad_()
    pixel_values = policy.to_pixel_values([image])["pixel_values"]
    (grad,) = torch.autograd.grad(pixel_values.sum(), image)
    names = "qwen_pixel_values llava_next_pixel_values molmo2_pixel_values"
    twice = [getattr(pixels, name) for name in names.split()]
    times = 2 if policy.family.pixel_values in twice else 1
    want = times / torch.tensor(list(policy.processor.image_processor.image_std))
    torch.testing.assert_close(grad, want.view(3, 1, 1).expand_as(grad))


@pytest.mark.parametrize("kind", LIMITED)
def test_pixel_limits(kind, tmp_path):
    def size(policy: Policy, side: int) -> int:
        return policy.to_unit_image(picture(side, side)).shape[1]

    folder = checkpoint(kind)
    small = Policy.from_pretrained(folder, max_pixels=32 * 32)
    assert size(small, 64) == 32 and size(shared_policy(kind), 64) == 64
    assert size(Policy.from_pretrained(folder, min_pixels=48 * 48), 16) == 48
    few = small.encode(PROBLEMS[:1], [[picture(64, 64)]]).ids
    assert few.shape < shared_policy(kind).encode(PROBLEMS[:1], [[picture(64, 64)]]).ids.shape
    small.save_pretrained(tmp_path)
    assert size(Policy.from_pretrained(tmp_path), 64) == 32
    with pytest.raises(ValueError, match="min_pixels <= max_pixels, got 4000 and 1024"):
        small._limit_pixels(4000, None)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(LIMITED)))
def test_pixel_limits_are_refused_where_there_are_none(kind):
    message = f"{kind} has no limits of a picture's area.*for qwen2_vl, qwen2_5_vl, qwen3_vl, "
    with pytest.raises(ValueError, match=message):
        Policy.from_pretrained(checkpoint(kind), max_pixels=1024)


# ---------------------------------------------------------------------------------- shared = plain


def test_encode_equals_the_processors_chat_call(policy):
    """Pictures of two sizes, two pictures and none, left padded in one batch: ids as each alone."""
    prompts = policy.encode(PROBLEMS, PICTURES)
    assert prompts.counts == [1, 2, 0]
    longest = prompts.ids.shape[1]
    for p, (problem, pictures) in enumerate(zip(PROBLEMS, PICTURES, strict=True)):
        want = plain_inputs(policy, problem, pictures)["input_ids"][0]
        assert torch.equal(prompts.ids[p, -len(want) :], want)
        assert prompts.mask[p].tolist() == [False] * (longest - len(want)) + [True] * len(want)
        assert policy.prompt_tokens({"problem": problem, "images": pictures}) == len(want)


def test_shared_prompt_equals_the_plain_forward(policy):
    """Log-probs, entropies, gradients. A wrong position would be above 0.1."""
    assert max(families.compare(policy).values()) <= TOLERANCE


def test_a_slice_of_prompts_scores_as_in_the_whole(policy):
    prompts = policy.encode(PROBLEMS, PICTURES)
    tokens, mask = responses(policy, 3, 2, 4)
    with torch.no_grad():
        whole = policy.score(prompts, tokens, mask)
        for p in range(3):
            rows = slice(2 * p, 2 * p + 2)
            part = policy.score(prompts[p : p + 1], tokens[rows], mask[rows])
            for a, b in zip(part, whole, strict=True):
                a, b = a[mask[rows]], b[rows][mask[rows]]
                torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


def test_sampled_values_equal_scored_ones(policy):
    prompts = policy.encode(PROBLEMS, PICTURES)
    sampled = policy.sample(prompts, 3, [1, 2, 3], 6, temperature=0.9)
    with torch.no_grad():
        scored = policy.score(prompts, sampled.tokens, sampled.mask, 0.9)
    for a, b in zip((sampled.logprobs, sampled.entropy), scored, strict=True):
        torch.testing.assert_close(a[sampled.mask], b[sampled.mask], atol=TOLERANCE, rtol=0)


def test_greedy_responses_equal_those_of_generate(policy):
    """One prompt at a time there, all padded together here. Pictures of two sizes, and none."""
    prompts = policy.encode(PROBLEMS, PICTURES)
    ours = policy.sample(prompts, 1, [0, 0, 0], 8, temperature=0)
    banned = [[i] for i in policy.banned.nonzero().flatten().tolist()]
    options = dict(do_sample=False, max_new_tokens=8, bad_words_ids=banned)
    options |= dict(pad_token_id=policy.pad_id, eos_token_id=policy.eos_ids)
    for p in range(3):
        inputs = dict(plain_inputs(policy, PROBLEMS[p], PICTURES[p]))
        if images := prompts[p : p + 1].images:  # SmolVLM would resize them once more
            inputs |= policy.to_pixel_values(images)
        found = policy.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert ours.tokens[p, ours.mask[p]].tolist() == found.tolist()


def test_fsdp_shards_the_language_models_layers(policy):
    """And not the tower's, which text alone does not run."""
    layers = {type(layer).__name__ for layer in policy.language_layers()}
    assert set(policy._no_split_modules) == layers and len(layers) == 1
    modules = policy.model.model.named_modules()
    tower = {type(module).__name__ for name, module in modules if policy.family.in_tower(name)}
    assert not layers & tower
    count = policy.model.config.get_text_config().num_hidden_layers
    assert len(policy.language_layers()) == count


@pytest.mark.parametrize("kind", tiny.OTHER_TEXT)
def test_a_family_with_another_language_model(kind):
    policy = shared_policy(kind)
    assert policy.model.config.get_text_config().model_type == kind.split()[1]
    assert max(families.compare(policy).values()) <= TOLERANCE
    assert policy.self_check()["logits"] <= 1e-4
    prompts = policy.encode(PROBLEMS, PICTURES)
    sampled = policy.sample(prompts, 2, [1, 2, 3], 6)
    with torch.no_grad():
        scored = policy.score(prompts, sampled.tokens, sampled.mask)
    error = (sampled.logprobs - scored[0])[sampled.mask].abs().max()
    assert error <= TOLERANCE


def test_an_attention_that_a_language_model_lacks_is_refused_with_the_mend():
    for weights in (True, False):
        with pytest.raises(ValueError, match="has a gpt_oss language model.*set --attention eager"):
            Policy.from_pretrained(checkpoint("internvl gpt_oss"), weights=weights)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_cannot_be_had_is_refused_with_the_reason(kind, tmp_path):
    assert kind not in FAMILIES
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": {}}))
    with pytest.raises(ValueError, match=f"is a '{kind}' model, which is refused: ") as refused:
        Policy.from_pretrained(str(tmp_path))
    assert REFUSED[kind] in str(refused.value)


def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="vision tower needs timm: pip install timm$"):
        Policy.from_pretrained(str(tmp_path))


def test_what_reads_sounds_is_not_trained():
    named = dict(shared_policy("gemma3n").model.model.named_parameters())
    frozen = {name.split(".")[0] for name, w in named.items() if not w.requires_grad}
    assert frozen == {"audio_tower", "embed_audio"}
    assert not any(w.requires_grad for name, w in named.items() if name.split(".")[0] in frozen)


def test_a_picture_of_a_single_token_is_refused_for_mistral3():
    with pytest.raises(ValueError, match="picture of 9 x 9 pixels is a single image token"):
        shared_policy("mistral3").to_unit_image(picture(9, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_any_size_and_shape_can_be_read(kind):
    """As many image tokens as the tower makes features: the model's code compares them."""
    policy = shared_policy(kind)
    for seed, size in enumerate([(3, 40), (90, 20), (21, 60), (67, 131), (400, 30)]):
        prompts = policy.encode(PROBLEMS[:1], [[picture(*size, seed)]])
        with torch.no_grad():
            assert policy.read(prompts).hidden.isfinite().all()


def test_a_picture_that_lfm2_cannot_hold_is_refused():
    with pytest.raises(
        ValueError, match="picture of 3000 x 10 pixels is too oblong: .* allows 224"
    ):
        shared_policy("lfm2_vl").to_unit_image(picture(3000, 10))


def test_the_attack_raises_the_entropy(policy):
    clean, attacked = families.attack(policy)
    assert attacked > clean + 0.01


def test_no_token_of_an_image_can_be_sampled(policy):
    """Whatever the processor writes around and for a picture, and special tokens but the end."""
    with_picture = plain_inputs(policy, PROBLEMS[0], PICTURES[0])["input_ids"][0].tolist()
    without = plain_inputs(policy, PROBLEMS[0], [])["input_ids"][0].tolist()
    words = policy.processor.tokenizer.convert_tokens_to_ids(tiny.WORDS)
    of_images = set(with_picture) - set(without) - set(words)  # such as the picture's number
    names = "<row_1_col_1> <row_6_col_6> <global-img> <video> <|video_pad|> </img> <end_of_image>"
    names += " <|video|> <|begin_of_video|> [IMG_BREAK] <IMG_GRID> <im_low> <slice> <|media_end|>"
    names += " <|kimi_k25_video_placeholder|> <|img_row_1_col_1|> <|img_thumbnail|>"
    vocabulary = policy.processor.tokenizer.get_added_vocab()
    of_images |= {vocabulary[name] for name in names.split() if name in vocabulary}
    assert of_images and all(policy.banned[i] for i in of_images)
    assert not policy.banned[policy.eos_ids].any()
    assert (~policy.banned).sum() > len(tiny.WORDS)


def test_a_saved_policy_loads_with_the_auto_classes(policy, tmp_path):
    """Weights bit for bit, the processor's grid of tiles as it was trained with, the log-probs.

    From a gathered state dict: a head that is tied to the embedding is a copy there.
    """
    policy.save_pretrained(tmp_path, {name: w.clone() for name, w in policy.state_dict().items()})
    tied = policy.model.all_tied_weights_keys
    assert tied.keys().isdisjoint(load_file(tmp_path / "model.safetensors"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    want, found = policy.model.state_dict(), model.state_dict()
    assert type(model) is type(policy.model) and want.keys() == found.keys()
    assert all(torch.equal(want[name], found[name]) for name in want)
    again = Policy(model, AutoProcessor.from_pretrained(tmp_path))
    assert torch.equal(policy.banned, again.banned)
    tokens, mask = responses(policy, 3, 2, 4)
    with torch.no_grad():
        before = policy.score(policy.encode(PROBLEMS, PICTURES), tokens, mask)
        after = again.score(again.encode(PROBLEMS, PICTURES), tokens, mask)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[mask], b[mask])


def test_a_whole_training_step(policy, rows, tmp_path, capsys):
    """Self-check, attack, update on one, two and no pictures. The checkpoint loads."""
    kind = policy.model.config.model_type
    (metrics,), trained = train(checkpoint(kind), rows, tmp_path)
    assert "self-check" in capsys.readouterr().out
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["grad_norm"] > 0
    # eps, eps, and 0 of the text alone
    assert metrics["attack/linf"] == pytest.approx(2 / 3 / 255, abs=1e-6)
    assert metrics["entropy/attacked"] > metrics["entropy/selected"]
    before = policy.model.state_dict()
    moved = [name for name, w in before.items() if not torch.equal(w, trained[name])]
    assert any("lm_head" in name for name in moved)
    vision = policy.family.in_tower if policy.family.tower else policy.family.in_projector
    assert any(vision(name.removeprefix("model.")) for name in moved)


# -------------------------------------------------------------------------------------- self-check


def late_positions(self, *args):
    """Responses that begin one position late."""
    positions, next_position = POSITIONS(self, *args)
    return positions, next_position + 1


POSITIONS = Policy._positions


def test_the_self_check_passes_and_names_its_figures(policy):
    errors = policy.self_check()
    assert errors.keys() == {"pixels", "logits"}
    assert errors["pixels"] <= 1e-6 and errors["logits"] <= 1e-4


def test_the_self_check_refuses_other_pixels(policy, monkeypatch):
    """As if the library subtracted another mean, then as if it made twice as many patches."""
    before, pixel_values = pixels.normalise, policy.family.pixel_values
    monkeypatch.setattr(pixels, "normalise", lambda x, ip: before(x, ip) + 0.01)
    with pytest.raises(RuntimeError, match="pixel_values differ from the image processor's by 0.0"):
        policy.self_check()

    def half(images, ip):
        return {"pixel_values": pixel_values(images, ip)["pixel_values"][..., ::2]}

    monkeypatch.setattr(policy, "family", policy.family._replace(pixel_values=half))
    with pytest.raises(RuntimeError, match="pixel_values differ from the image processor's by inf"):
        policy.self_check()


def test_the_self_check_refuses_a_wrong_position(policy, monkeypatch):
    """The figure is far above rounding, 1e-4."""
    monkeypatch.setattr(Policy, "_positions", late_positions)
    with pytest.raises(RuntimeError, match=r"shared prompt differ.*by (0\.[1-9]|[1-9])"):
        policy.self_check()


def test_the_self_check_refuses_a_wrong_position_in_bfloat16_too(policy, monkeypatch):
    """Beyond the limit, 0.5, which is above rounding. Or below it (qwen3_5: 0.14), and then because
    positions moved back by one fit better."""
    low = Policy.from_pretrained(checkpoint(policy.model.config.model_type), dtype="bfloat16")
    assert low.self_check()["logits"] < 0.3
    monkeypatch.setattr(Policy, "_positions", late_positions)
    small = policy.model.config.model_type in ("qwen3_5", "qwen3_5_moe")
    message = "with positions moved by -1 by 0" if small else "below 0.5|with positions moved"
    with pytest.raises(RuntimeError, match=message):
        low.self_check()


def test_the_self_check_refuses_a_prompt_without_its_token_types():
    policy = make_policy("gemma3")
    policy.family = policy.family._replace(token_types=None)
    message = "self-check of gemma3: logits after the shared prompt differ"
    with pytest.raises(RuntimeError, match=message):
        policy.self_check()


class OnDevice(torch.Tensor):
    """Stands for a tensor of a GPU, which every operation but `cpu` leaves there."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("kind", ["smolvlm", "qwen2_5_vl"])
def test_the_processor_gets_pictures_on_the_cpu(kind, monkeypatch):
    """The self-check hands it those of the model's device. On a GPU it would resample otherwise."""
    policy, given = make_policy(kind), []
    prompts = policy.encode(PROBLEMS[:1], PICTURES[:1])
    call = type(policy.processor).__call__

    def recorded(self, *args, images, **kwargs):
        given.extend(images[0])
        return call(self, *args, images=images, **kwargs)

    monkeypatch.setattr(type(policy.processor), "__call__", recorded)
    images = [x.as_subclass(OnDevice) for x in prompts.images]
    policy._processed(policy.chat_text(PROBLEMS[0], 1), images)
    assert [type(x) for x in given] == [torch.Tensor]


def rotations(policy) -> list[torch.Tensor]:
    buffers = dict(policy.named_buffers())
    return [x for name, x in buffers.items() if name.endswith("inv_freq")]


@pytest.mark.parametrize(
    "spoil",
    [lambda x: x.zero_(), lambda x: x.copy_(x.bfloat16()), lambda x: x.mul_(torch.nan)],
    ids=["empty", "rounded", "not finite"],
)
def test_the_self_check_refuses_wrong_rotations(policy, spoil):
    """Of any rotary module, of the tower, too. Both ways of the check would rotate wrongly."""
    assert rotations(policy)
    for i, x in enumerate(rotations(policy)):
        spoilt = copy.deepcopy(policy)
        spoil(rotations(spoilt)[i])
        if x.equal(rotations(spoilt)[i]):
            continue  # bfloat16 holds them
        with pytest.raises(RuntimeError, match="rotary frequencies of .*torch.float32.* not those"):
            spoilt.self_check()


def test_the_self_check_refuses_a_model_cast_with_its_rotations(policy):
    with pytest.raises(RuntimeError, match="rotary frequencies of .*torch.bfloat16.* not those"):
        copy.deepcopy(policy).to(torch.bfloat16).self_check()


def test_the_self_check_can_be_switched_off(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(Policy, "self_check", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(checkpoint("smolvlm"), rows, tmp_path)
    train(checkpoint("smolvlm"), rows, tmp_path, self_check=False)
