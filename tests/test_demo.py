"""demo/: the task is deterministic, its splits are disjoint, its answers right; the checkpoints load and are small."""

import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
)

from demo import make_demo, measure
from demo.task import DOMAINS, KINDS, SIZE, make_row

DEMO = Path(make_demo.__file__).parent
CHECKPOINTS = [DEMO / name for name in ("mixed", "confident")]
SPLITS = [f"{domain}/{part}" for domain in DOMAINS for part in ("train", "test")]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINTS[0])


@cache
def first_rows(split: str) -> list[dict]:
    return [make_row(split, i) for i in range(200)]


def pixels(row: dict) -> np.ndarray:
    return np.asarray(row["images"][0])


@pytest.mark.parametrize("split", SPLITS)
def test_a_row_depends_on_split_and_index_alone(split):
    later = [make_row(split, i) for i in (7, 3)][1]
    row = make_row(split, 3)
    assert (pixels(row) == pixels(later)).all() and pixels(row).shape == (SIZE, SIZE, 3)
    assert {k: v for k, v in row.items() if k != "images"} == {
        k: v for k, v in later.items() if k != "images"
    }
    assert (pixels(make_row(split, 3, seed=1)) != pixels(row)).any()


@pytest.mark.parametrize("domain", DOMAINS)
def test_train_and_test_share_no_picture(domain):
    train, test = (
        [pixels(make_row(f"{domain}/{part}", i)).tobytes() for i in range(100)]
        for part in ("train", "test")
    )
    assert len(set(train)) == len(set(test)) == 100 and not set(train) & set(test)


@pytest.mark.parametrize("split", ["plain", "plain/dev", "dotted/train"])
def test_an_unknown_split_is_refused(split):
    with pytest.raises(ValueError, match="plain.*shifted.*styles.*/train or /test"):
        make_row(split, 0)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_agree_with_the_question_and_the_pips(split):
    for row in first_rows(split):
        asked = sorted(
            row["pips"][word] for word in re.findall(r"\w+", row["problem"]) if word in row["pips"]
        )
        if "total" in row["problem"]:
            right = sum(asked)
        elif "apart" in row["problem"]:
            right = asked[1] - asked[0]
        else:
            right = asked[-1]
        assert row["answer"] == str(right) and len(asked) == KINDS[row["kind"]][0]
        assert set(row["pips"]) == {"red", "blue", "green", "yellow"} and set(
            row["pips"].values()
        ) <= set(range(1, 10))


def test_the_picture_shows_the_pips():
    """White pixels inside a die of plain/ are its pips: more pips, more white, for every colour."""
    white = defaultdict(list)
    for row in first_rows("plain/train"):
        light = pixels(row).astype(int)
        on_die = light.max(2) - light.min(2) > 60  # saturated: a die's body
        for colour, rgb in {"red": 0, "green": 1, "blue": 2}.items():
            body = on_die & (light.argmax(2) == rgb) & ((light[..., 1] < 120) if rgb != 1 else True)
            white[row["pips"][colour]].append(body.sum())
    means = [np.mean(white[n]) for n in range(1, 10)]
    assert all(a > b for a, b in zip(means, means[1:], strict=False)), (
        means
    )  # a body shrinks by each pip


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_policy_that_does_not_look_is_at_chance(domain):
    """The best answer to each kind of question, chosen with hindsight, is right about once in nine times."""
    rows = first_rows(f"{domain}/train") + first_rows(f"{domain}/test")
    counts = defaultdict(Counter)
    for row in rows:
        counts[row["kind"]][row["answer"]] += 1
    by_kind = sum(max(counter.values()) for counter in counts.values()) / len(rows)
    constant = max(sum(counts.values(), Counter()).values()) / len(rows)
    assert by_kind < 0.18 and constant < 0.15  # 400 rows: hindsight alone adds up to 0.05


def test_pictures_pass_the_processor_unchanged(processor):
    image = make_row("shifted/test", 0)["images"][0]
    out = processor.image_processor(images=[image], return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, 6, 6]] and out["pixel_values"].shape == (
        36,
        3 * 2 * 16 * 16,
    )
    mean, std = (
        torch.tensor(getattr(processor.image_processor, name))
        for name in ("image_mean", "image_std")
    )
    patches = out["pixel_values"].view(
        3, 3, 2, 2, 3, 2, 16, 16
    )  # cells, patches in a cell, channel, time, pixels
    picture = patches[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, SIZE, SIZE)
    restored = (picture * std[:, None, None] + mean[:, None, None]) * 255
    assert (restored - torch.tensor(np.asarray(image)).permute(2, 0, 1)).abs().max() < 1e-3
    assert (patches[..., 0, :, :] == patches[..., 1, :, :]).all()


def test_the_tokenizer_returns_every_text_exactly(processor):
    rng = np.random.default_rng(0)
    tokenizer = processor.tokenizer
    for row in [row for split in SPLITS for row in first_rows(split)[:20]]:
        for text in (
            row["problem"],
            make_demo.careful(row, rng),
            make_demo.hasty(row, rng),
            "Grüße, 12 × 34 → ∎\n",
        ):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text and max(ids) < len(tokenizer) <= 512
    assert [tokenizer.decode([i]) for i in tokenizer("907")["input_ids"]] == [
        "9",
        "0",
        "7",
    ]  # digits one by one
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for token in make_demo.SPECIAL:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]


def test_both_ways_of_answering_are_well_formed_and_the_careful_one_is_right():
    rng = np.random.default_rng(0)
    lucky = []
    for row in first_rows("plain/train"):
        answers = [make_demo.careful(row, rng), make_demo.hasty(row, rng)]
        assert all(
            re.fullmatch(r"<think>.+</think> .*\\boxed\{\d+\}", answer) for answer in answers
        )
        assert measure.correct(answers[0], row["answer"]) and not measure.correct(answers[0], "77")
        thought, guess = (answer.split("</think>")[0] for answer in answers)
        assert all(str(row["pips"][c]) in thought for c in row["pips"] if c in row["problem"])
        assert not re.search(r"\d", guess)
        lucky.append(measure.correct(answers[1], row["answer"]))
    assert 0.15 < np.mean(lucky) < 0.45


def test_a_prompt_is_chatml_with_nine_image_tokens(processor):
    row = make_row("plain/test", 0)
    text = make_demo.prompt_text(processor, row["problem"])
    user = (
        f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{row['problem']}<|im_end|>\n"
    )
    assert text == user + "<|im_start|>assistant\n"
    ids = processor(text=[text], images=row["images"], return_tensors="pt")["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == 9 and len(ids) < 64


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_a_checkpoint_loads_and_answers(folder, processor):
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 6e6
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    processor.tokenizer.padding_side = "left"
    rows = first_rows("plain/train")[:16]
    texts = [text for (text,) in measure.generate(model, processor, rows, samples=0)[0]]
    assert (
        sum(bool(re.fullmatch(r"<think>.+</think>.*\\boxed\{\d+\}", text)) for text in texts) >= 14
    )


def test_weights_fit_in_twelve_megabytes():
    weights = [path for folder in CHECKPOINTS for path in folder.glob("*.safetensors")]
    assert weights and sum(path.stat().st_size for path in weights) <= 12e6
