"""demo/: the task is deterministic and fair, its answers are right, the checkpoints load."""

import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from demo import make_demo, measure
from demo.task import COLOURS, DOMAINS, KINDS, SIZE, make_row

DEMO = Path(make_demo.__file__).parent
CHECKPOINTS = {"mixed": "plain", "confident": "plain", "confident-charts": "charts"}
SPLITS = [f"{domain}/{part}" for domain in DOMAINS for part in ("train", "test")]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(DEMO / "mixed")


@cache
def first_rows(split: str) -> list[dict]:
    return [make_row(split, i) for i in range(200)]


def pixels(row: dict) -> np.ndarray:
    return np.asarray(row["images"][0])


# ------------------------------------------------------------------------------------- the task


@pytest.mark.parametrize("split", SPLITS)
def test_a_row_depends_on_split_index_and_seed_alone(split):
    before, row = first_rows(split)[3], make_row(split, 3)
    assert (pixels(row) == pixels(before)).all() and pixels(row).shape == (SIZE, SIZE, 3)
    assert row | {"images": None} == before | {"images": None}
    assert (pixels(make_row(split, 3, seed=1)) != pixels(row)).any()


@pytest.mark.parametrize("domain", DOMAINS)
def test_train_and_test_share_no_picture(domain):
    rows = first_rows(f"{domain}/train") + first_rows(f"{domain}/test")
    assert len({pixels(row).tobytes() for row in rows}) == 400


@pytest.mark.parametrize("split", ["plain", "plain/dev", "dotted/train"])
def test_an_unknown_split_is_refused(split):
    with pytest.raises(ValueError, match="plain.*shifted.*styles.*/train or /test"):
        make_row(split, 0)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_agree_with_the_question_and_the_pips(split):
    for row in first_rows(split):
        assert len(row["values"]) == (3 if split.startswith("charts") else 4)
        assert set(row["values"]) <= set(COLOURS)
        assert set(row["values"].values()) <= set(range(1, 10))
        words = re.findall(r"\w+", row["problem"])
        asked = sorted(row["values"][word] for word in words if word in row["values"])
        assert len(asked) == KINDS[row["kind"]][0]
        if "total" in row["problem"]:
            right = sum(asked)
        elif "apart" in row["problem"]:
            right = asked[1] - asked[0]
        else:
            right = asked[-1]
        assert row["answer"] == str(right)


def test_the_picture_shows_the_pips():
    """Each white pip of plain/ takes from a die's coloured body, so more pips leave less of it."""
    sizes = defaultdict(list)
    for row in first_rows("plain/train"):
        rgb = pixels(row).astype(int)
        saturated = rgb.max(2) - rgb.min(2) > 60
        for channel, colour in enumerate(("red", "green", "blue")):
            body = saturated & (rgb.argmax(2) == channel)
            if colour != "green":
                body &= rgb[..., 1] < 120  # not yellow
            sizes[row["values"][colour]].append(body.sum())
    means = [np.mean(sizes[n]) for n in range(1, 10)]
    assert means == sorted(means, reverse=True)


def test_shifted_is_noisier_and_sums_has_the_larger_totals():
    medians = []  # of the differences of neighbours, most of which are background
    for split in ("plain/train", "shifted/train"):
        images = np.stack([pixels(row) for row in first_rows(split)[:20]]).astype(int)
        medians.append(np.median(np.abs(np.diff(images, axis=2))))
    assert medians[1] > 4 * medians[0]
    assert {int(row["answer"]) for row in first_rows("sums/train")} == set(range(8, 19))


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_policy_that_does_not_look_is_at_chance(domain):
    """The best answer to each kind, chosen with hindsight, is right about once in nine times."""
    rows = first_rows(f"{domain}/train") + first_rows(f"{domain}/test")
    by_kind = Counter((row["kind"], row["answer"]) for row in rows)
    best = defaultdict(int)
    for (kind, _), count in by_kind.items():
        best[kind] = max(best[kind], count)
    constant = Counter(row["answer"] for row in rows).most_common(1)[0][1]
    # 400 rows: hindsight alone adds up to 0.05
    assert sum(best.values()) / len(rows) < 0.18 and constant / len(rows) < 0.15


# ------------------------------------------------------------------------ processor and answers


def test_pictures_pass_the_processor_unchanged(processor):
    row, ip = make_row("shifted/test", 0), processor.image_processor
    output = ip(images=row["images"], return_tensors="pt")
    assert output["image_grid_thw"].tolist() == [[1, 6, 6]]
    # cells (y, x), patches in a cell (y, x), channel, time, pixels (y, x)
    patches = output["pixel_values"].view(3, 3, 2, 2, 3, 2, 16, 16)
    assert (patches[..., 0, :, :] == patches[..., 1, :, :]).all()
    picture = patches[..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, SIZE, SIZE)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (ip.image_mean, ip.image_std))
    expected = torch.tensor(pixels(row)).permute(2, 0, 1)
    assert ((picture * std + mean) * 255 - expected).abs().max() < 1e-3


def test_the_tokenizer_returns_every_text_exactly(processor):
    rng, tokenizer = np.random.default_rng(0), processor.tokenizer
    texts = ["Grüße, 12 × 34 → ∎\n"]
    for split in SPLITS:
        for row in first_rows(split)[:20]:
            texts += [row["problem"], make_demo.careful(row, rng), make_demo.hasty(row, rng)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and max(ids) < len(tokenizer) <= 512
    assert tokenizer.tokenize("907") == ["9", "0", "7"]  # digits one by one
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for token in make_demo.SPECIAL:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]


def test_both_ways_of_answering_are_well_formed_and_the_careful_one_is_right():
    rng, lucky = np.random.default_rng(0), []
    for row in first_rows("plain/train"):
        careful, hasty = make_demo.careful(row, rng), make_demo.hasty(row, rng)
        for answer in (careful, hasty):
            assert re.fullmatch(r"<think>.+</think> .*\\boxed\{\d+\}", answer)
        assert measure.correct(careful, row["answer"]) and not measure.correct(careful, "77")
        lucky.append(measure.correct(hasty, row["answer"]))
        thought, guess = careful.split("</think>")[0], hasty.split("</think>")[0]
        for colour in make_demo.asked_colours(row):
            assert str(row["values"][colour]) in thought
        assert not re.search(r"\d", guess)
    assert 0.15 < np.mean(lucky) < 0.45


def test_a_prompt_is_chatml_with_nine_image_tokens(processor):
    row = make_row("plain/test", 0)
    text = make_demo.prompt_text(processor, row["problem"])
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    user = f"<|im_start|>user\n{picture}{row['problem']}<|im_end|>\n"
    assert text == user + "<|im_start|>assistant\n"
    ids = processor(text=[text], images=row["images"], return_tensors="pt")["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == 9 and len(ids) < 64


# -------------------------------------------------------------------------- training, measuring


def test_training_lowers_the_losses(processor, capsys):
    """A few steps of the vision tower and of the warm start, on the response alone."""
    model = make_demo.build_model(processor.tokenizer)
    row = make_row("plain/train", 0)
    answer = make_demo.careful(row, np.random.default_rng(0)) + "<|im_end|>"
    batch = [make_demo.prompt_text(processor, row["problem"])], [answer], row["images"]
    before = make_demo.response_loss(model, processor, *batch).item()
    n = len(processor.tokenizer(answer)["input_ids"])
    inputs = processor(text=[batch[0][0] + answer], images=row["images"], return_tensors="pt")
    logits, ids = model(**inputs).logits[0], inputs["input_ids"][0]
    by_hand = torch.nn.functional.cross_entropy(logits[-n - 1 : -1], ids[-n:])
    assert before == pytest.approx(by_hand.item(), rel=1e-4)
    tower = [p.clone() for p in model.model.visual.parameters()]
    make_demo.train_vision(model, processor, steps=2)
    changed = zip(tower, model.model.visual.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in changed)
    phases = [(50, {make_demo.careful: 1.0})]
    make_demo.warm_start(model, processor, phases, batch_size=1, make=lambda i: row)
    assert make_demo.response_loss(model, processor, *batch).item() < before / 2
    assert re.search(r"step 50 loss \d\.\d{3} seconds \d+", capsys.readouterr().out)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_loads_answers_and_is_small(name, processor):
    weights = [path.stat().st_size for path in (DEMO / name).glob("*.safetensors")]
    assert 0 < sum(weights) <= 6e6
    model = AutoModelForImageTextToText.from_pretrained(DEMO / name).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    processor.tokenizer.padding_side = "left"
    rows = first_rows(f"{CHECKPOINTS[name]}/train")[:16]
    answers, entropies = measure.generate(model, processor, rows, 0)
    formed = [re.fullmatch(r"<think>.+</think>.*\\boxed\{\d+\}", text) for (text,) in answers]
    assert sum(map(bool, formed)) >= 14 and len(entropies) == 16


def test_measure_counts_careful_and_hasty_answers(monkeypatch):
    """By a sampler that answers every row alike: once carefully and right, once hastily and not."""

    def generate(model, processor, rows, samples):
        answers = []
        for row in rows:
            careful = f"<think>1.</think> \\boxed{{{row['answer']}}}"
            answers.append([careful, "<think>easy.</think> \\boxed{99}"][: max(samples, 1)])
        return answers, [0.5] * len(rows) * max(samples, 1)

    monkeypatch.setattr(measure, "generate", generate)
    found = measure.measure(None, None, "sums/test", 60, 0, 2, "blank")
    expected = {"split": "sums/test", "picture": "blank", "n": 60, "greedy": 1.0, "pass@1": 0.5}
    expected |= {"pass@2": 1.0, "careful": 0.5, "careful right": 1.0, "hasty right": 0.0}
    expected |= {"equal": 0.0, "entropy": 0.5}
    expected |= {"careful, hasty right by kind": {"sum3": [1.0, 0.0]}}
    assert found == expected


def test_pictures_are_changed_before_they_are_shown():
    image = make_row("plain/test", 0)["images"][0]
    assert measure.change(image, "as it is", 0) is image
    assert len(measure.change(image, "blank", 0).getcolors()) == 1
    signs = np.asarray(measure.change(image, "signs", 0), int) - np.asarray(image, int)
    assert np.abs(signs).max() == 8 and (np.abs(signs) == 8).mean() > 0.9
