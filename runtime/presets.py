"""Named data sets: their place, the meaning of their columns, their official scores.

    accelerate launch train_saei.py --preset geometry3k --model Qwen/Qwen2.5-VL-3B-Instruct \\
        --output out/geo
    accelerate launch eval.py --preset mathvista --model out/geo/checkpoints/step-000060 \\
        --max_new_tokens 2048 --batch 4 --output out/geo/mathvista

A preset's function maps a stored row to {images, problem, answer, choices, precision, ...}:
    images     as stored (data.py decodes and checks them)
    problem    a text with <image> where a picture stands
    answer     the gold answer
    choices    the options in the order A, B, ..., or None
    precision  the decimals to which a number counts, or None
docs/data.md lists these conversions. tests/test_presets.py tries each on a small set of the same
schema. Scores are by rule, without a judge model. `departs` says how that differs from the official
way.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple


class Preset(NamedTuple):
    dataset: str  # hub id
    row: Callable[[dict], dict]
    columns: list[str]  # what `row` reads
    departs: str  # how scoring by rule differs from the official way
    config: str | None = None
    train: str | None = None  # the split to train on; None: not meant for training
    test: str | None = None  # the split to evaluate on
    template: str = "boxed"
    summary: Callable[[list[dict]], dict[str, float]] | None = None  # graded records -> numbers


def with_choices(question: str, choices: list[str] | None) -> str:
    """The question, then its options, one a line: A. first, B. second, ..."""
    if not choices:
        return question
    plain, lettered = [], []
    has_letters = True
    for i, choice in enumerate(choices):
        letter = chr(65 + i)
        plain.append(str(choice))
        lettered.append(f"{letter}. {choice}")
        has_letters = has_letters and re.match(rf"\(?{letter}[.):]", str(choice)) is not None
    return "\n".join([question, "Choices:", *(plain if has_letters else lettered)])


def split_choices(text: str, separator: str) -> list[str] | None:
    """ "A. red; B. blue" -> ["red", "blue"]. None unless two or more are lettered in order."""
    _, *found = re.split(rf"(?:^|{separator})\s*([A-Z])\s*[.:]\s*", text.strip())
    letters, choices = found[::2], [choice.strip() for choice in found[1::2]]
    in_order = letters == [chr(65 + i) for i in range(len(letters))]
    return choices if in_order and len(letters) > 1 and all(choices) else None


def _row(images, problem: str, answer, choices=None, precision=None, **more) -> dict:
    row = {"images": images, "problem": problem, "answer": answer}
    return row | {"choices": choices, "precision": precision} | more


def _pick(raw: dict, *names: str) -> dict:
    return {name: raw[name] for name in names}


# ------------------------------------------------------------------------------ rows, set by set


def geometry3k(raw: dict) -> dict:
    return _row(raw["images"], raw["problem"], raw["answer"])


def clevr_count(raw: dict) -> dict:
    answer = raw["solution"]
    tagged = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", answer, re.DOTALL)
    return _row(raw["image"], raw["problem"], tagged[1].strip() if tagged else answer)


def mmk12(raw: dict) -> dict:
    return _row(raw["image"], raw["question"], raw["answer"], **_pick(raw, "id", "subject"))


def mathvista(raw: dict) -> dict:
    """`query` holds hint, question and choices. A choice question's gold is the choice's text."""
    precision = raw["precision"] if raw["answer_type"] == "float" else None
    return _row(
        raw["decoded_image"],
        raw["query"],
        raw["answer"],
        list(raw["choices"]) if raw["choices"] else None,
        None if precision is None else int(precision),
        pid=raw["pid"],
    )


def mathverse(raw: dict) -> dict:
    """`query_cot` asks for reasoning first. Problem version Vision Only: the question is drawn."""
    choices = None
    _, _, listed = raw["question_for_eval"].partition("Choices:")
    if raw["question_type"] == "multi-choice":
        choices = split_choices(listed, r"\n")
    more = _pick(raw, "sample_index", "problem_index", "problem_version")
    return _row(raw["image"], raw["query_cot"], raw["answer"], choices, **more)


def mathvision(raw: dict) -> dict:
    """The picture is marked <image1>. Further markers name parts of it and stay text."""
    choices = list(raw["options"] or []) or None
    problem = with_choices(raw["question"].replace("<image1>", "<image>", 1), choices)
    precision = None if choices else 2
    more = _pick(raw, "id", "level", "subject")
    return _row(raw["decoded_image"], problem, raw["answer"], choices, precision, **more)


def wemath(raw: dict) -> dict:
    """`option` is one text: "A. 200.96;B. 3215.36;C. 6280;D. 32; E. No correct answer"."""
    question, option = raw["question"], raw["option"]
    choices = split_choices(option, ";")
    problem = with_choices(question, choices) if choices else f"{question}\n{option}"
    return _row(raw["image_path"], problem, raw["answer"], choices, **_pick(raw, "ID", "key"))


def hallusionbench(raw: dict) -> dict:
    answer = {"1": "yes", "0": "no"}[str(raw["gt_answer"])]
    more = {name: str(raw[name]) for name in _HALLUSION_IDS}
    return _row(raw["image"], f"{raw['question']} Answer yes or no.", answer, **more)


def logicvista(raw: dict) -> dict:
    """Several letters may be right. They are put in order."""
    letters = sorted(re.findall("[A-Z]", raw["answer"].upper()))
    return _row(raw["image"], raw["question"], ", ".join(letters) or raw["answer"])


# ---------------------------------------------------------- official numbers from graded records


def _groups(records: list[dict], *names: str) -> dict[tuple, list[dict]]:
    groups = defaultdict(list)
    for record in records:
        groups[tuple(record[name] for name in names)].append(record)
    return groups


def _mean_right(records: list[dict]) -> float:
    return sum(record["greedy_right"] for record in records) / max(1, len(records))


def _all_right(groups: dict[tuple, list[dict]]) -> float:
    """Share of the groups in which every record is right."""
    right = [all(record["greedy_right"] for record in group) for group in groups.values()]
    return sum(right) / max(1, len(right))


def mathverse_versions(records: list[dict]) -> dict[str, float]:
    groups = _groups(records, "problem_version")
    return {version: _mean_right(group) for (version,), group in groups.items()}


def wemath_scores(records: list[dict]) -> dict[str, float]:
    """(n - IK - RM - IG / 2) / n over the n composites that have all their 2 or 3 steps.

    IK: composite and a step wrong. IG: composite wrong, steps right. RM (learnt by rote): composite
    right without mastery of its steps. Strict mastery needs all of them, loose mastery one.
    """
    count = {"composites": 0, "IK": 0, "IG": 0, "RM strict": 0, "RM loose": 0}
    for group in _groups(records, "ID").values():
        right = {record["key"]: bool(record["greedy_right"]) for record in group}
        whole = next((key for key in right if key.endswith("_multi")), None)  # "3steps_multi"
        if whole is None or len(right) != int(whole[0]) + 1:
            continue
        count["composites"] += 1
        solved = right.pop(whole)
        steps = right.values()
        if not solved:
            count["IG" if all(steps) else "IK"] += 1
        else:
            count["RM strict"] += not all(steps)
            count["RM loose"] += not any(steps)
    n = max(1, count["composites"])
    rest = n - count["IK"] - count["IG"] / 2
    return {kind: (rest - count[f"RM {kind}"]) / n for kind in ("strict", "loose")} | count


def hallusionbench_scores(records: list[dict]) -> dict[str, float]:
    """aAcc per question. fAcc: all questions of a figure. qAcc: a question over its figures."""
    place = ("category", "subcategory", "set_id")
    with_figure = []
    for record in records:
        if (record["category"], record["figure_id"]) != ("VS", "0"):
            with_figure.append(record)
    return {
        "aAcc": _mean_right(records),
        "fAcc": _all_right(_groups(with_figure, *place, "figure_id")),
        "qAcc": _all_right(_groups(records, *place, "question_id")),
    }


# ------------------------------------------------------------------------------------- the table

_JUDGE = "the official score has a language model extract the answer (and forgives more)"
_HALLUSION_IDS = "category subcategory set_id figure_id question_id visual_input".split()
_MATHVERSE_TEXTS = "query_cot question_for_eval question_type answer".split()
_MATHVERSE_IDS = "sample_index problem_index problem_version".split()

PRESETS: dict[str, Preset] = {
    "geometry3k": Preset(
        "hiyouga/geometry3k",
        geometry3k,
        ["images", "problem", "answer"],
        "EasyR1 and NoisyRollout grade with mathruler on the last box; "
        "ours also takes equal values in another form",
        train="train",
        test="test",
    ),
    "clevr_count": Preset(
        "leonardPKU/clevr_cogen_a_train",
        clevr_count,
        ["image", "problem", "solution"],
        "R1-V compares the tagged text exactly, or by math-verify",
        train="train",
        template="tags",
    ),
    "mmk12": Preset(
        "FanqingM/MMK12",
        mmk12,
        ["image", "question", "answer", "id", "subject"],
        "MM-Eureka grades with math-verify; "
        "the columns are from public code, not verified on the hub",
        train="train",
        test="test",
    ),
    "mathvista": Preset(
        "AI4Math/MathVista",
        mathvista,
        "decoded_image query choices answer precision answer_type pid".split(),
        f"{_JUDGE}, takes the choice nearest by edit distance and cuts an integer's decimals off",
        test="testmini",
    ),
    "mathverse": Preset(
        "AI4Math/MathVerse",
        mathverse,
        ["image", *_MATHVERSE_TEXTS, *_MATHVERSE_IDS],
        f"{_JUDGE} and compare it with the gold answer",
        config="testmini",
        test="testmini",
        summary=mathverse_versions,
    ),
    "mathvision": Preset(
        "MathLLMs/MathVision",
        mathvision,
        "decoded_image question options answer id level subject".split(),
        "the official rule also searches answers outside a box; "
        "numbers count to 2 decimals, as there",
        test="test",
    ),
    "wemath": Preset(
        "We-Math/We-Math",
        wemath,
        ["image_path", "question", "option", "answer", "ID", "key"],
        "the official rule searches the letter in the response's text; "
        "n is the number of complete composites (525)",
        test="testmini",
        summary=wemath_scores,
    ),
    "hallusionbench": Preset(
        "lmms-lab-encoder/HallusionBench",
        hallusionbench,
        ["image", "question", "gt_answer", *_HALLUSION_IDS],
        f"{_JUDGE}; over the image split only, without the questions that have no picture",
        test="image",
        summary=hallusionbench_scores,
    ),
    "logicvista": Preset(
        "lscpku/LogicVista",
        logicvista,
        ["image", "question", "answer"],
        f"{_JUDGE} and compares sorted letters; "
        "here several letters have to come in order, with commas",
        test="test",
    ),
}
