"""Named data sets: where they are, what their columns mean, how their official score is computed from graded rows.

    accelerate launch train_saei.py --preset geometry3k --model Qwen/Qwen2.5-VL-3B-Instruct --output out/geo
    accelerate launch eval.py --preset mathvista --model out/geo/checkpoints/step-000060 --max_new_tokens 2048 \\
        --batch 4 --output out/geo/mathvista

A preset's row function maps a stored row to {images, problem, answer, choices, precision, ...}: images as stored
(data.py decodes and checks), problem a text with <image> where a picture stands, answer the gold answer, choices the
options in the order A, B, ... or None, precision the decimals to which a number counts or None. docs/data.md is the
table of these conversions and tests/test_presets.py makes a small set of each schema. Scores are by rule, without a
judge model: `departs` says where that leaves the official way.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple


class Preset(NamedTuple):
    dataset: str  # hub id
    config: str | None
    train: str | None  # the split to train on, if it is meant for that
    test: str | None  # the split to evaluate on
    columns: tuple[str, ...]  # what `row` reads
    row: Callable[[dict], dict]
    departs: str  # where scoring by rule leaves the official way
    template: str = "boxed"
    summary: Callable[[list[dict]], dict[str, float]] | None = (
        None  # graded records -> further official numbers
    )


def with_choices(question: str, choices: list[str] | None) -> str:
    """The question, then the options, one a line: A. first, B. second, ..."""
    letters = [chr(65 + i) for i in range(len(choices or []))]
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices or [], strict=True)]
    if all(
        re.match(rf"\(?{letter}[.):]", str(choice))
        for letter, choice in zip(letters, choices or [], strict=True)
    ):
        lines = [str(choice) for choice in choices or []]  # they have their letters already
    return "\n".join([question, "Choices:", *lines]) if lines else question


def split_choices(text: str, separator: str) -> list[str] | None:
    """ "A. red; B. blue" -> ["red", "blue"]; None unless the letters are A, B, ... in this order, at least two."""
    found = re.split(rf"(?:^|{separator})\s*([A-Z])\s*[.:]\s*", text.strip())[
        1:
    ]  # letter, text, letter, text, ...
    letters, texts = found[::2], [x.strip() for x in found[1::2]]
    in_order = len(letters) > 1 and letters == [chr(65 + i) for i in range(len(letters))]
    return texts if in_order and all(texts) else None


def _row(
    images,
    problem: str,
    answer,
    choices: list[str] | None = None,
    precision: int | None = None,
    **more,
) -> dict:
    columns = {
        "images": images,
        "problem": problem,
        "answer": answer,
        "choices": choices,
        "precision": precision,
    }
    return columns | more


# ------------------------------------------------------------------------------------------------- rows, set by set


def geometry3k(raw: dict) -> dict:
    return _row(raw["images"], raw["problem"], raw["answer"])


def clevr_count(raw: dict) -> dict:
    tagged = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", raw["solution"], re.DOTALL)
    return _row(raw["image"], raw["problem"], tagged[1].strip() if tagged else raw["solution"])


def mmk12(raw: dict) -> dict:
    return _row(raw["image"], raw["question"], raw["answer"], id=raw["id"], subject=raw["subject"])


def mathvista(raw: dict) -> dict:
    """`query` holds hint, question and choices; the gold of a choice question is the choice's text."""
    precision = (
        int(raw["precision"])
        if raw["answer_type"] == "float" and raw["precision"] is not None
        else None
    )
    choices = list(raw["choices"]) if raw["choices"] else None
    return _row(
        raw["decoded_image"], raw["query"], raw["answer"], choices, precision, pid=raw["pid"]
    )


def mathverse(raw: dict) -> dict:
    """`query_cot` asks for reasoning first; with problem_version Vision Only the question stands in the picture."""
    _, found, listed = raw["question_for_eval"].partition("Choices:")
    choices = (
        split_choices(listed, r"\n") if found and raw["question_type"] == "multi-choice" else None
    )
    names = ("sample_index", "problem_index", "problem_version")
    return _row(
        raw["image"],
        raw["query_cot"],
        raw["answer"],
        choices,
        **{name: raw[name] for name in names},
    )


def mathvision(raw: dict) -> dict:
    """One picture, marked <image1> in the question; further markers point into the same picture and stay text."""
    question, choices = (
        raw["question"].replace("<image1>", "<image>", 1),
        list(raw["options"] or []) or None,
    )
    precision, more = (
        None if choices else 2,
        {name: raw[name] for name in ("id", "level", "subject")},
    )
    return _row(
        raw["decoded_image"],
        with_choices(question, choices),
        raw["answer"],
        choices,
        precision,
        **more,
    )


def wemath(raw: dict) -> dict:
    """`option` is one string: "A. 200.96;B. 3215.36;C. 6280;D. 32; E. No correct answer"."""
    choices = split_choices(raw["option"], ";")
    problem = (
        with_choices(raw["question"], choices) if choices else f"{raw['question']}\n{raw['option']}"
    )
    return _row(raw["image_path"], problem, raw["answer"], choices, ID=raw["ID"], key=raw["key"])


def hallusionbench(raw: dict) -> dict:
    names = ("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input")
    answer = {"1": "yes", "0": "no"}[str(raw["gt_answer"])]
    places = {name: str(raw[name]) for name in names}
    return _row(raw["image"], f"{raw['question']} Answer yes or no.", answer, **places)


def logicvista(raw: dict) -> dict:
    """Several letters may be right; they are put in order."""
    answer = ", ".join(sorted(re.findall("[A-Z]", raw["answer"].upper()))) or raw["answer"]
    return _row(raw["image"], raw["question"], answer)


# --------------------------------------------------------------------------- official numbers from graded records


def _groups(records: list[dict], *names: str) -> dict[tuple, list[dict]]:
    groups = defaultdict(list)
    for record in records:
        groups[tuple(record[name] for name in names)].append(record)
    return groups


def _all_right(groups: dict[tuple, list[dict]]) -> float:
    return sum(all(r["greedy_right"] for r in group) for group in groups.values()) / max(
        1, len(groups)
    )


def mathverse_versions(records: list[dict]) -> dict[str, float]:
    groups = _groups(records, "problem_version").items()
    return {
        version: sum(r["greedy_right"] for r in group) / len(group) for (version,), group in groups
    }


def wemath_scores(records: list[dict]) -> dict[str, float]:
    """Over composites with all their 2 or 3 steps: (n - IK - RM - IG / 2) / n, strict and loose.

    Composite wrong: IK (a step wrong too) or IG (all steps right). Right: strict mastery needs all steps, loose one;
    else it is RM, learnt by rote.
    """
    count = {"composites": 0, "IK": 0, "IG": 0, "RM strict": 0, "RM loose": 0}
    for group in _groups(records, "ID").values():
        right = {record["key"]: bool(record["greedy_right"]) for record in group}
        whole = next((key for key in right if key.endswith("_multi")), None)
        if whole is None or len(right) != int(whole[0]) + 1:
            continue
        steps = [ok for key, ok in right.items() if key != whole]
        count["composites"] += 1
        if not right[whole]:
            count["IG" if all(steps) else "IK"] += 1
        else:
            count["RM strict"] += not all(steps)
            count["RM loose"] += not any(steps)
    n, lost = max(1, count["composites"]), count["IK"] + count["IG"] / 2
    return {kind: (n - lost - count[f"RM {kind}"]) / n for kind in ("strict", "loose")} | count


def hallusionbench_scores(records: list[dict]) -> dict[str, float]:
    """aAcc per question; fAcc: all questions of a figure; qAcc: a question over all its figures."""
    place = ("category", "subcategory", "set_id")
    shown = [
        r for r in records if not (r["category"] == "VS" and r["figure_id"] == "0")
    ]  # those have no figure
    return {
        "aAcc": sum(r["greedy_right"] for r in records) / max(1, len(records)),
        "fAcc": _all_right(_groups(shown, *place, "figure_id")),
        "qAcc": _all_right(_groups(records, *place, "question_id")),
    }


_JUDGE = "the official score has a language model extract the answer (and forgives more)"
_HALLUSION = (
    "image",
    "question",
    "gt_answer",
    "category",
    "subcategory",
    "set_id",
    "figure_id",
    "question_id",
)

PRESETS: dict[str, Preset] = {
    "geometry3k": Preset(
        "hiyouga/geometry3k", None, "train", "test", ("images", "problem", "answer"), geometry3k,
        "EasyR1 and NoisyRollout grade with mathruler on the last box; ours also takes equal values in another form",
    ),
    "clevr_count": Preset(
        "leonardPKU/clevr_cogen_a_train", None, "train", None, ("image", "problem", "solution"), clevr_count,
        "R1-V compares the tagged text exactly, or by math-verify", template="tags",
    ),
    "mmk12": Preset(
        "FanqingM/MMK12", None, "train", "test", ("image", "question", "answer", "id", "subject"), mmk12,
        "MM-Eureka grades with math-verify; the columns are from public code, not verified on the hub",
    ),
    "mathvista": Preset(
        "AI4Math/MathVista", None, None, "testmini",
        ("decoded_image", "query", "choices", "answer", "precision", "answer_type", "pid"), mathvista,
        f"{_JUDGE}, takes the choice nearest by edit distance and cuts an integer's decimals off",
    ),
    "mathverse": Preset(
        "AI4Math/MathVerse", "testmini", None, "testmini",
        ("image", "query_cot", "question_for_eval", "question_type", "answer", "sample_index", "problem_index",
         "problem_version"), mathverse, f"{_JUDGE} and compare it with the gold answer", summary=mathverse_versions,
    ),
    "mathvision": Preset(
        "MathLLMs/MathVision", None, None, "test",
        ("decoded_image", "question", "options", "answer", "id", "level", "subject"), mathvision,
        "the official rule also searches answers outside a box; numbers count to 2 decimals, as there",
    ),
    "wemath": Preset(
        "We-Math/We-Math", None, None, "testmini", ("image_path", "question", "option", "answer", "ID", "key"), wemath,
        "the official rule searches the letter in the response's text; n is the number of complete composites (525)",
        summary=wemath_scores,
    ),
    "hallusionbench": Preset(
        "lmms-lab-encoder/HallusionBench", None, None, "image", (*_HALLUSION, "visual_input"), hallusionbench,
        f"{_JUDGE}; over the image split only, without the questions that have no picture",
        summary=hallusionbench_scores,
    ),
    "logicvista": Preset(
        "lscpku/LogicVista", None, None, "test", ("image", "question", "answer"), logicvista,
        f"{_JUDGE} and compares sorted letters; here several letters have to come in order, with commas",
    ),
}  # fmt: skip
