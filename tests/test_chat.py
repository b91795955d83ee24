"""vlm/chat.py on chat templates of the kinds that models have: prefilled parts and ends of turns.

And what follows from it: the decoded text of a response, its rewards, the end tokens, the tokens of
answers and the texts that a question must not hold.
"""

import copy
import json
import re

import pytest
import torch
from conftest import lines_of, short
from transformers import AutoConfig, AutoModelForImageTextToText

import eval
import rewards
import train_saei
from demo.make_demo import build_model
from runtime import data, rollouts
from tests import tiny
from tests.families import KINDS, PICTURES, need_package, shared_policy
from vlm import chat
from vlm.families import FAMILIES
from vlm.policy import Policy, Responses

TEXT = "{{ m.content[0].text }}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nPREFILL{% endif %}"
)
THINKS_LAST = (  # Qwen3's: an empty thought in the last turn alone
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    f"{TEXT}<|im_end|>\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nPREFILL{% endif %}"
)
THINKS_ALWAYS = (  # Kimi's and GLM's: an empty thought in each turn
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.role == 'assistant' %}\n<think></think>{% endif %}"
    f"{TEXT}{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistantPREFILL{% endif %}"
)
VICUNA = (  # LLaVA's
    "{% for m in messages %}{% if m.role == 'user' %}USER: "
    f"{TEXT} {{% else %}}ASSISTANT: {TEXT}<|endoftext|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:PREFILL{% endif %}"
)
MISTRAL = (  # no header: an answer follows the question's last token
    f"{{% for m in messages %}}{{% if m.role == 'user' %}}[INST]{TEXT}[/INST]"
    f"{{% else %}}{TEXT}<|endoftext|>{{% endif %}}{{% endfor %}}"
    "{% if add_generation_prompt %}PREFILL{% endif %}"
)
USER_ALONE = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('user') }}{% endif %}"
    f"Q: {TEXT}\n{{% endfor %}}{{% if add_generation_prompt %}}A:PREFILL{{% endif %}}"
)
HARMONY = (  # GPT-OSS: a turn within the chat ends otherwise than the last one
    f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{TEXT}"
    "{% if m.role == 'assistant' and loop.last %}<|endoftext|>{% else %}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nPREFILL{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "thinks last": (THINKS_LAST, "<|im_end|>"),
    "thinks always": (THINKS_ALWAYS, None),
    "vicuna": (VICUNA, "<|endoftext|>"),
    "mistral": (MISTRAL, "<|endoftext|>"),
    "user alone": (USER_ALONE, None),
    "harmony": (HARMONY, "<|endoftext|>"),
}


@pytest.fixture
def processor_with(processor):
    """The demo's processor with another chat template."""

    def make(template: str, prefill: str = ""):
        changed = copy.deepcopy(processor)
        changed.chat_template = template.replace("PREFILL", prefill)
        return changed

    return make


@pytest.fixture
def policy_with(processor_with):
    """A random policy, end tokens included, that writes chats with this template."""

    def make(prefill: str) -> Policy:
        processor = processor_with(CHATML, prefill)
        return Policy(build_model(processor.tokenizer), processor)

    return make


def as_responses(policy: Policy, texts: list[str], end: str = "<|im_end|>") -> Responses:
    """What the sampler would return for these texts."""
    ids = [policy.processor.tokenizer(text + end)["input_ids"] for text in texts]
    width = max(map(len, ids))
    tokens = torch.tensor([row + [policy.pad_id] * (width - len(row)) for row in ids])
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in ids])
    zeros = torch.zeros(tokens.shape)
    return Responses(tokens, mask, zeros, zeros)


# --------------------------------------------------------------------------------- prefilled parts


@pytest.mark.parametrize("prefill", ["<think>", "<think>\n", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_thought_that_the_template_begins_is_prefilled(processor_with, name, prefill):
    assert chat.prefilled(processor_with(TEMPLATES[name][0], prefill)) == prefill


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_header_is_not_prefilled(processor_with, name):
    for space in ("", " ", "\n"):
        assert chat.prefilled(processor_with(TEMPLATES[name][0], space)) == ""


@pytest.mark.parametrize("prefill", ["Let me look at it.\n", "<|channel>thought\n<channel|>", "q"])
@pytest.mark.parametrize("name", ["chatml", "thinks last", "vicuna", "harmony"])
def test_any_other_text_of_the_answer_is_prefilled(processor_with, name, prefill):
    """Where finished turns show what the header is."""
    assert chat.prefilled(processor_with(TEMPLATES[name][0], prefill)) == prefill


@pytest.mark.parametrize("kind", KINDS)
def test_no_family_is_prefilled_by_its_plain_template(kind):
    assert shared_policy(kind).prefilled == ""


def test_the_prefilled_part_begins_every_decoded_text(policy_with):
    texts = ["It is 3 + 4.</think> \\boxed{7}", ""]
    policy = policy_with("<think>\n")
    assert policy.decode(as_responses(policy, texts)) == ["<think>\n" + text for text in texts]
    assert policy_with("").decode(as_responses(policy, texts)) == texts


def test_the_prefilled_part_counts_for_rewards(policy_with):
    """Format and accuracy of an answer whose <think> the template wrote; none without it."""
    functions = rewards.load_rewards(["accuracy:0.9", "format:0.1"], 64)
    row = {"problem": "3 + 4", "answer": "7", "images": [], "row": 0}
    found = {}
    for prefill in ("<think>\n", ""):
        policy = policy_with(prefill)
        sampled = as_responses(policy, ["It is 3 + 4.</think> \\boxed{7}"] * 2)
        texts, scores = rollouts.grade(functions, policy, [row], [sampled])
        found[prefill] = (texts[0][0][:8], scores["format"].tolist(), scores["accuracy"].tolist())
    assert found["<think>\n"] == ("<think>\n", [[1, 1]], [[1, 1]])
    assert found[""][0] == "It is 3 " and found[""][1] == [[0, 0]]


def test_samples_show_the_prefilled_part(policy_with, tmp_path):
    policy = policy_with("<think>\n")
    policy.save_pretrained(tmp_path / "model")
    train_saei.main(short(str(tmp_path / "model"), tmp_path / "out", steps=1, save_every=1))
    lines = lines_of(tmp_path / "out" / "samples.jsonl")
    assert len(lines) > 1
    for line in lines:
        assert line["prefilled"] == "<think>\n" and line["response"].startswith("<think>\n")
        assert not line["tokens"][0].startswith("<think>")


# -------------------------------------------------------------------------------------- end tokens


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_a_turn(processor_with, name):
    template, end = TEMPLATES[name]
    assert chat.turn_end(processor_with(template)) == end


def test_end_tokens_are_those_of_config_tokenizer_and_template(processor_with):
    """Any of them ends a response, and none is banned."""
    processor = processor_with(CHATML)
    tokenizer = processor.tokenizer
    end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model, silent = build_model(tokenizer), processor_with(USER_ALONE)
    model.generation_config.eos_token_id = text_end  # and the tokenizer's own is <|im_end|>
    assert Policy(model, silent).eos_ids == [text_end, end]
    for config, of_tokenizer, want in [
        ([end, 70], "<|im_end|>", [end, 70]),
        (70, "<|im_end|>", [70, end]),
        (None, "<|im_end|>", [end]),
        (text_end, "<|im_end|>", [text_end, end]),  # an SFT's checkpoint
        (text_end, "<|endoftext|>", [text_end, end]),  # a base model with a chat template
        (None, None, [end]),
    ]:
        model.generation_config.eos_token_id, tokenizer.eos_token = config, of_tokenizer
        policy = Policy(model, processor)
        assert policy.eos_ids == want and not policy.banned[want].any()
    assert as_responses(policy, ["7"]).truncated(policy.eos_ids).tolist() == [False]


def test_a_model_without_an_end_token_is_refused(processor_with):
    processor = processor_with(USER_ALONE)
    model = build_model(processor.tokenizer)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token: generation_config.json and the tokenizer"):
        Policy(model, processor)


# ------------------------------------------------------------------------------- tokens of answers

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
BOX = ["<|begin_of_box|>", "<|end_of_box|>"]
OTHERS = ["<tool>", "<thinker>", "<think >"]


@pytest.fixture(params=KINDS)
def tagged(request, monkeypatch) -> Policy:
    """A family's tiny model whose tokenizer has TAGS, BOX and OTHERS as special tokens.

    Its answers use BOX.
    """
    kind = request.param
    need_package(kind)
    family = FAMILIES[kind]._replace(answer_tokens=r"<\|(begin|end)_of_box\|>")
    monkeypatch.setitem(FAMILIES, kind, family)
    config, processor = tiny.BUILD[kind](kind)
    processor.tokenizer.add_tokens(TAGS + BOX + OTHERS, special_tokens=True)
    config["text_config"]["vocab_size"] = len(processor.tokenizer)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **config))
    model.generation_config.eos_token_id = 2
    return Policy(model, processor)


GROUNDING = [f"<|{x}_{end}|>" for x in ("object_ref", "box", "quad") for end in ("start", "end")]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "qwen3_5", "exaone4_5", "glm4v"])
def test_the_tokens_of_qwens_boxes_are_allowed_and_decoded_in_its_families_alone(kind):
    config, processor = tiny.BUILD[kind](kind)
    processor.tokenizer.add_tokens([*GROUNDING, "<|vision_pad|>"], special_tokens=True)
    config["text_config"]["vocab_size"] = len(processor.tokenizer)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **config))
    model.generation_config.eos_token_id = 2
    policy, qwen = Policy(model, processor), kind.startswith("qwen")
    ids = processor.tokenizer.convert_tokens_to_ids(GROUNDING)
    assert policy.banned[ids].any().item() == policy.banned[ids].all().item() == (not qwen)
    assert policy.banned[processor.tokenizer.convert_tokens_to_ids("<|vision_pad|>")]
    text = "".join(GROUNDING)
    (found,) = policy.decode(as_responses(policy, [text], processor.tokenizer.eos_token))
    assert found.replace(" ", "") == (text if qwen else "")


def test_special_tokens_of_answers_are_allowed_and_decoded(tagged):
    """Tags that a prompt asks for, and what the family names. No other special token."""
    tokenizer = tagged.processor.tokenizer
    assert not tagged.banned[tokenizer.convert_tokens_to_ids(TAGS + BOX)].any()
    assert tagged.banned[tokenizer.convert_tokens_to_ids(OTHERS)].all()
    text = "<think>look</think><answer><|begin_of_box|>7<|end_of_box|></answer>"
    (found,) = tagged.decode(as_responses(tagged, [text + "<tool><bos>"], tokenizer.eos_token))
    assert found.replace(" ", "") == text


def test_a_tag_may_stand_in_a_question(tagged):
    """The built-in templates ask for it."""
    problem = data.TEMPLATES["boxed"]["user"].replace("{problem}", "how many dots ?")
    prompts = tagged.encode([problem], [[]])
    assert tagged.processor.tokenizer.convert_tokens_to_ids("<think>") in prompts.ids[0]


def test_decode_leaves_the_text_as_the_library_does(processor):
    """Without special tokens of answers: the same as skip_special_tokens, with any of them."""
    tokenizer = processor.tokenizer
    policy = Policy(build_model(tokenizer), processor)
    drawn = torch.randint(len(tokenizer), (50, 30), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(drawn.shape)
    found = policy.decode(Responses(drawn, torch.ones_like(drawn, dtype=torch.bool), zeros, zeros))
    assert found == tokenizer.batch_decode(drawn, skip_special_tokens=True)
    assert sum("<|" in text for text in tokenizer.batch_decode(drawn)) > 10


# ---------------------------------------------------------------------------------- reserved texts


def reserved_of(kind: str) -> set[str]:
    """What the processor writes for a picture, and all that the tokenizer calls special."""
    policy = shared_policy(kind)
    tokenizer = policy.processor.tokenizer
    with_picture = policy.tokenize("how many dots ?", PICTURES[0]).inputs["input_ids"][0].tolist()
    without = policy.tokenize("how many dots ?", []).inputs["input_ids"][0].tolist()
    texts = set(tokenizer.convert_ids_to_tokens(sorted(set(with_picture) - set(without))))
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and not re.fullmatch(policy.family.answer_tokens, token.content):
            texts.add(token.content)
    return texts - {"<image>", *tiny.WORDS}  # MiniCPM-V numbers its pictures


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_with_a_placeholder_or_a_special_token_is_refused(kind):
    """Of pictures and of text alone, anywhere in the chat, whatever the mark in the template is."""
    policy = shared_policy(kind)
    assert len(reserved_of(kind)) > 3
    for token in reserved_of(kind):
        for pictures in (PICTURES[0], []):
            for problem in (
                f"how many{token}dots ?",
                [
                    {"role": "system", "content": f"look {token}"},
                    {"role": "user", "content": "how many dots ?"},
                ],
            ):
                with pytest.raises(ValueError, match="special token of the model") as caught:
                    policy.tokenize(problem, pictures)
                assert repr(token) in str(caught.value)


def test_what_the_processor_replaces_is_refused_though_it_is_no_token(processor_with):
    processor = processor_with(CHATML)
    processor.picture_token = "(<picture>)"
    policy = Policy(build_model(processor.tokenizer), processor)
    with pytest.raises(ValueError, match=r"holds '\(<picture>\)', a special token"):
        policy.tokenize("How many (<picture>)?", [])


@pytest.mark.parametrize("kind", KINDS)
def test_what_only_resembles_a_special_token_is_text(kind):
    policy = shared_policy(kind)
    image_token = policy.model.config.image_token_id
    counts = set()
    for text in ("how many", "1 < 2 > 0", "<b>dots</b>", "| im_end |", "what is <end ?", "image"):
        ids = policy.tokenize(text, PICTURES[0]).inputs["input_ids"]
        counts.add((ids == image_token).sum().item())
    assert len(counts) == 1


def test_the_row_of_a_literal_placeholder_is_named_or_left_out(policy_with, tmp_path, capsys):
    """Before the first step, and for text alone as for pictures."""
    policy, path = policy_with(""), tmp_path / "rows.jsonl"
    problems = ["3 + 4", "What does <|image_pad|> mean?", "red", "Say <|im_end|>."]
    lines = [json.dumps({"problem": problem, "answer": "7"}) for problem in problems]
    path.write_text("\n".join(lines))
    options = dict(columns={"image": "none"}, max_prompt_tokens=99)
    options["prompt_tokens"] = policy.prompt_tokens
    with pytest.raises(ValueError, match=r"1\b.*<\|image_pad\|>.*a special token of the model"):
        data.load_rows(str(path), **options)
    rows = data.load_rows(str(path), bad_rows="skip", **options)
    assert [rows[i]["problem"] for i in range(len(rows))] == ["3 + 4", "red"]
    assert "<|im_end|>" in capsys.readouterr().out


def test_an_evaluation_refuses_the_row_before_it_begins(tiny, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    lines = [{"problem": text, "answer": "7"} for text in ("3 + 4", "Say <|im_end|>.")]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    monkeypatch.setattr(Policy, "sample", lambda *args, **options: 1 / 0)
    options = dict(model=tiny, dataset=str(path), columns=["image=none"], splits=["train"])
    with pytest.raises(ValueError, match=r"1\b.*<\|im_end\|>.*a special token of the model"):
        eval.main(eval.load_config(**options, output=str(tmp_path / "out")))
