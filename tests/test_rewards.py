r"""rewards.py: what is found in a completion, what equals what, the format, and that nothing hurts.

At least a third of the tables' rows are wrong answers that look right. Tests named test_trap_NN
guard against a failure seen in other projects.
"""

import inspect
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from grading_cases import CHOICES, COMPLETIONS, EXTRACTIONS, FORMATS, GRADES, PRECISION, PROSE
from hostile_cases import HOSTILE as HOSTILE_CASES
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import accuracy_reward, extract_answer, format_reward, grade, total_reward

ROOT = Path(rewards.__file__).resolve().parent
SECONDS = 1.0  # the most that one call may take on any input
relaxed = settings(deadline=None)  # hypothesis would count wall time; see seconds()

# What a teacher would accept and the rules do not: a miss costs less than a false reward.
MISSES = {
    (r"\sqrt[3]{2}", "\u221b2"), (r"\sin^2 x", r"\sin x \cdot \sin x"), (r"\ln 2", r"\log_e 2"),
    ("42", "4{2}"), ("xy", "yx"), ("xy", "x y"),
    ("1<x\\le 2", r"x>1 \text{ and } x\le 2"), ("-1<k<4", r"k>-1\text{ and }k<4"),
}  # fmt: skip


def all_cases() -> list[tuple]:
    """(kind, prediction, gold, choices, precision, verdict) of every row of the tables."""
    rows = [("choices", gold, choices, None, *answers) for gold, choices, *answers in CHOICES]
    rows += [("precision", gold, None, digits, *answers) for gold, digits, *answers in PRECISION]
    for kind, table in GRADES.items():
        rows += [(kind, gold, None, None, *answers) for gold, *answers in table]
    cases = []
    for kind, gold, choices, precision, right, wrong in rows:
        cases += [(kind, prediction, gold, choices, precision, True) for prediction in right]
        cases += [(kind, prediction, gold, choices, precision, False) for prediction in wrong]
    return cases


def by_kind(rows: list[tuple]) -> dict[str, list]:
    """{kind: rows}: the kind is what stands before ":" in a row's first item."""
    kinds = {}
    for row in rows:
        kinds.setdefault(row[0].split(":")[0], []).append(row)
    return kinds


CASES = all_cases()
CASES_BY_KIND = by_kind(CASES)

OWN_EXTRACTIONS = [  # (completion, what is extracted)
    (r"so \boxed{11}", "11"), (r"\boxed{ \frac{1}{2} } done", r"\frac{1}{2}"), (r"\fbox{B}", "B"),
    (r"\boxed {7}", "7"), (r"\\boxed{7}", "7"), ("line\\\\\\boxed{7}", "7"),
    (r"\boxed{1}, no, \boxed{2}", "2"), (r"\boxed{3} and then \boxed{4", None),
    (r"\boxed{a \boxed{3}", "3"), (r"\boxed{\boxed{3}}", "3"),
    (r"\boxed{\text{is } \boxed{3}}", "3"), (r"{ \boxed{3 }} }", "3"), (r"} } \boxed{3}", "3"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
    ("\\boxed{1\n+ 2}", "1\n+ 2"), (r"\boxed{3} then \boxed{}", ""),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    (r"<think>\boxed{1}</think> <answer>2</answer>",         "2"),
    (r"<think>\boxed{1}</think> so two", "1"),
    (r"<think>a</think>\boxed{1}</think> \boxed{2", None),
    (r"a</think> \boxed{1} </think> <answer>2</answer>", "2"), (r"\boxed{1</think>2}", None),
    (r"<answer>2</answer>", "2"), ("<answer>\n 2 \n</answer>", "2"),
    (r"<answer>1</answer><answer>2</answer>", "2"), (r"<answer>1<answer>2</answer>", "2"),
    (r"<answer>2</answer> </answer>", "2"), (r"<answer>1</answer> <answer>2", None),
    (r"<answer>so \boxed{5}</answer>", "5"), (r"\boxed{5} <answer>6</answer>", "6"),
    (r"\boxed{5 <answer>6</answer>", "6"), ("<answer></answer>", ""), ("The answer is 11.", None),
    ("11", None), (r"\boxed 11", None), (r"boxed{11}", None), (r"\boxed\{11\}", None),
    (r"\unboxed{11}", None), ("<answer>11", None), ("</answer>11<answer>", None),
    ("<Answer>11</Answer>", None), ("", None),
]  # fmt: skip

OWN_FORMATS = [  # (completion, format reward)
    (r"<think>3 + 8</think> \boxed{11}", 1),
    ("<think>\n3 + 8\n</think>\n\nThe answer is \\boxed{11}.\n", 1),
    (r"<think></think>\boxed{11}", 1), (r"<think>not \boxed{12}</think> \boxed{\frac{1}{2}}", 1),
    ("<think>3 + 8</think> <answer>11</answer>", 1),
    ("\n<think>3 + 8</think>\n<answer>\n11\n</answer>\n", 1), (r"\boxed{11}", 0),
    (r"3 + 8 \boxed{11}", 0), (r"<think>3 + 8 \boxed{11}", 0), (r"3 + 8</think> \boxed{11}", 0),
    (r"<think>3 + 8 \boxed{11}</think>", 0), (r"<think>3 + 8 \boxed{11}</think> 11", 0),
    (r"So <think>3 + 8</think> \boxed{11}", 0), (r"</think>3 + 8<think> \boxed{11}", 0),
    (r"<think>3</think><think>8</think> \boxed{11}", 0),
    (r"<think>3<think>8</think></think> \boxed{11}", 0),
    (r"<think>3</think> \boxed{11} </think>", 0),
    (r"<think>3</think> \boxed{11} <think>8</think>", 0),
    (r"<think>3</think> \boxed{10} \boxed{11}", 0), (r"<think>3</think> \boxed{\boxed{11}}", 0),
    (r"<think>3</think> \boxed{11} \boxed{1", 0), (r"<think>3</think> \boxed{11", 0),
    (r"<think>\boxed{11}</think> \boxed{11", 0), (r"<think>3</think> \boxed{ }", 0),
    ("<think>3</think> <answer> </answer>", 0), ("<think>3</think> <answer>11", 0),
    ("<think>3</think> so <answer>11</answer>", 0), ("<think>3</think> <answer>11</answer> so", 0),
    ("<think>3</think> <answer>10</answer><answer>11</answer>", 0),
    ("<think>3</think> <answer><answer>11</answer></answer>", 0),
    ("<think>3 <answer>11</answer></think>", 0),
    (r"<think>3 <answer>11</answer></think> \boxed{11}", 0),
    (r"<think>3</think> <answer>\boxed{11}</answer>", 0),
    (r"<think>3</think> \boxed{11} <answer>11</answer>", 0),
    ("<answer>11</answer><think>3</think>", 0), (r"<Think>3</Think> \boxed{11}", 0),
    ("<think>3</think>", 0), ("", 0),
]  # fmt: skip

HOSTILE = {
    "100k open braces": "{" * 100_000,
    "100k closed braces": "}" * 100_000,
    "open boxes": r"\boxed{" * 15_000,
    "open boxes, closed": r"\boxed{" * 12_000 + "}" * 12_000,
    "box macros and spaces": (r"\boxed" + " " * 1000) * 100,
    "box macro and spaces": r"\boxed" + " " * 100_000,
    "backslashes": "\\" * 100_001,
    "deep fractions": r"\boxed{" + r"\frac{1}{" * 10_000 + "1" + "}" * 10_001,
    "deep text": r"\boxed{" + r"\text{" * 62 + "13" + "}" * 63,
    "deep parentheses": r"\boxed{" + "(" * 250 + "11" + ")" * 250 + "}",
    "open answers": "<answer>" * 12_000,
    "closed answers": "</answer>" * 12_000,
    "answers": "<answer></answer>" * 6_000,
    "open thinking": "<think>" * 14_000,
    "closed thinking": "</think>" * 12_000,
    "thinking and blanks": "<think></think>" + " " * 100_000,
    "blank answer": "<think></think>" + " \n" * 25_000 + "<answer>" + " \n" * 25_000 + "</answer>",
    "power tower": r"\boxed{9^{9^{9^{9^{9^{9}}}}}}",
    "huge power": r"\boxed{10**10**10}",
    "huge exponent": r"\boxed{1e999999999}",
    "factorials": r"\boxed{((((9!)!)!)!)!}",
    "100k digits": r"\boxed{" + "9" * 100_000 + "}",
    "500 digits": r"\boxed{" + "9" * 500 + "}",
    "500 decimals": r"\boxed{0." + "9" * 500 + "}",
    "long fraction": r"\boxed{\frac{" + "7" * 240 + "}{" + "3" * 240 + "}}",
    "separators": r"\boxed{1" + ",111" * 125 + "x}",
    "100k separators": r"\boxed{1" + ",111" * 25_000 + "x}",
    "blanks in a box": r"\boxed{11" + " " * 100_000 + "11}",
    "few blanks in a box": r"\boxed{11" + " " * 490 + "11}",
    "slashes": r"\boxed{" + "1/" * 250 + "}",
    "zero denominator": r"\boxed{\frac{11}{0}}",
    "code": r"\boxed{__import__('os').system('touch executed')}",
    "code in tags": "<answer>open('executed', 'w')</answer>",
    "lambda": r"\boxed{(lambda f: f(f))(lambda f: f(f))}",
    "format string": r"\boxed{%s%n {0.__class__} ${11}}",
    "group references": r"\boxed{\1\g<0>}",
    "null bytes": "\\boxed{11\x00}",
    "lone surrogate": "\\boxed{\ud800}",
    "right to left": "\\boxed{\u202e11}",
    "zero width": "\\boxed{1\u200b1}",
    "combining": "\\boxed{1" + "\u0301" * 400 + "1}",
    "superscript": "\\boxed{\u00b9\u00b9}",
    "all at once": r"\boxed{" + ", ".join(map(str, range(120))) + "}",
    "every choice": r"\boxed{\text{any of A, B, C, D, 11}}",
    "empty box": r"\boxed{11} \boxed{}",
    "words": "\\boxed{" + "eleven " * 14_000 + "}",
}


def seconds(function, *args, **kwargs) -> float:
    """CPU seconds, so that a busy machine fails no test."""
    start = time.process_time()
    function(*args, **kwargs)
    return time.process_time() - start


def test_tables_are_hard_enough():
    assert len(CASES) >= 3500 and sum(not case[-1] for case in CASES) >= len(CASES) / 2
    assert len(set(CASES_BY_KIND)) >= 30 and len(HOSTILE_CASES) >= 500
    assert sum(not v for _, v in OWN_FORMATS) >= len(OWN_FORMATS) / 3
    assert sum(v is None for _, v in OWN_EXTRACTIONS) >= 10


@pytest.mark.parametrize("kind", CASES_BY_KIND)
def test_grade(kind):
    """No false reward anywhere; no miss but the listed ones; in both families of wrappers."""
    for _, prediction, gold, choices, precision, verdict in CASES_BY_KIND[kind]:
        expected = verdict and (gold, prediction) not in MISSES
        row = (prediction, gold, choices, precision)
        assert grade(*row) is expected, row


def test_the_misses_are_these():
    known = {(gold, prediction) for _, prediction, gold, *_, verdict in CASES if verdict}
    assert MISSES <= known
    assert not [miss for miss in MISSES if grade(miss[1], miss[0])], (
        "these are graded right now: take them off the list"
    )


@pytest.mark.parametrize("text, expected", OWN_EXTRACTIONS + EXTRACTIONS)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize("text, expected", PROSE)
def test_prose_is_read_where_the_caller_allows_it(text, expected):
    found = extract_answer(text, prose=True)
    assert found is None if expected is None else grade(found, expected)
    if "boxed" not in text and "<answer>" not in text:
        assert extract_answer(text) is None


@pytest.mark.parametrize("completion, gold, verdict", COMPLETIONS)
def test_whole_completions(completion, gold, verdict):
    assert accuracy_reward([completion], [gold]) == [float(verdict)]


@pytest.mark.parametrize("text, expected", OWN_FORMATS + FORMATS)
def test_format_reward(text, expected):
    assert format_reward([text]) == [float(expected)]


def second_last_box(text: str) -> str | None:
    """The obvious way: count braces from the last macro on until they balance."""
    for macro in list(re.finditer(r"\\(?:boxed|fbox)\{", text))[-1:]:
        depth = 1
        for i in range(macro.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[macro.end() : i].strip()
    return None


@relaxed
@given(
    st.lists(
        st.sampled_from([r"\boxed{", r"\fbox{", "{", "}", "}", "1", " ", "x", r"\frac"]),
        max_size=30,
    ).map("".join)
)
def test_boxes_equal_a_second_implementation(text):
    assert extract_answer(text) == second_last_box(text)


# --- properties ---

WORDS = st.text(string.ascii_letters + string.digits + " +-*/=^_.,:;()[]<>%$\\|'", max_size=60)
numbers = st.fractions(max_denominator=10_000).filter(lambda x: abs(x) < 10**12)


def spellings(x: Fraction) -> list[str]:
    """Several ways to write one number."""
    sign, top, bottom = "-" if x < 0 else "", abs(x.numerator), x.denominator
    ways = [
        f"{x.numerator}/{bottom}",
        rf"{sign}\frac{{{top}}}{{{bottom}}}",
        rf"\dfrac{{{3 * x.numerator}}}{{{3 * bottom}}}",
    ]
    if bottom == 1:
        ways += [
            f"{sign}{top:,}",
            f"${sign}{top}$",
            f"{sign}{top}.0",
            f"{sign}{top}.",
            rf"\text{{{sign}{top}}}",
        ]
    return ways + [f" {way} " for way in ways]


@relaxed
@given(numbers, st.data())
def test_numbers_equal_themselves_in_any_spelling(x, data):
    one, other = data.draw(st.sampled_from(spellings(x))), data.draw(st.sampled_from(spellings(x)))
    assert grade(one, other) and grade(other, one) and grade(one, x)


@relaxed
@given(numbers, numbers.filter(bool), st.data())
def test_a_changed_number_is_never_right(x, change, data):
    one, other = (
        data.draw(st.sampled_from(spellings(x))),
        data.draw(st.sampled_from(spellings(x + change))),
    )
    assert not grade(one, other) and not grade(other, one)


@relaxed
@given(
    st.tuples(st.integers(-(10**9), 10**9), st.integers(1, 10**6)).map("{0[0]}.{0[1]}".format),
    st.data(),
)
def test_a_changed_digit_is_never_right(number, data):
    at = data.draw(st.sampled_from([i for i, c in enumerate(number) if c.isdigit()]))
    digit = data.draw(st.sampled_from([d for d in string.digits if d != number[at]]))
    assert grade(number, number) and not grade(number[:at] + digit + number[at + 1 :], number)


@relaxed
@given(st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False) | numbers)
def test_gold_numbers_of_any_type_equal_their_text(x):
    assert grade(str(Fraction(str(x))), x)
    assert not grade(str(Fraction(str(x)) + 1), x)


@relaxed
@given(WORDS)
def test_a_gold_is_refused_or_equals_itself_and_can_be_earned(text):
    try:
        grade(None, text)
    except ValueError as error:
        assert "cannot be parsed" in str(error)
        return
    assert grade(text, text) and grade(f"  {text}\n", text)
    assert accuracy_reward([rf"<think>hm</think> \boxed{{{text}}}"], [text]) == [1.0]


@relaxed
@given(WORDS, WORDS)
def test_grade_is_symmetric(one, other):
    try:
        assert grade(one, other) == grade(other, one)
    except ValueError:
        pass  # one of them is no gold answer


WRAPPERS = [
    "  %s\n", "$%s$", r"\(%s\)", r"\[%s\]", r"\boxed{%s}", "<answer> %s </answer>", "%s.",
    r"$\displaystyle %s$",
]  # fmt: skip
PLAIN = [
    case
    for case in CASES
    if case[1].strip() and not re.search(r"[$*<]|\\[(\[]|boxed|[.\\]\s*$", case[1])
]


@relaxed
@given(st.sampled_from(PLAIN), st.sampled_from(WRAPPERS))
def test_spaces_and_wrappers_change_no_verdict(case, wrapper):
    _, prediction, gold, choices, precision, _ = case
    same = grade(prediction, gold, choices, precision)
    assert grade(wrapper.replace("%s", prediction), gold, choices, precision) is same


PIECES = [r"\boxed{", r"\fbox", "{", "}", "<answer>", "</answer>", "<think>", "</think>"]
PIECES += [r"\text{", r"\frac", "1", ",", "\\", "$", "9" * 50]


@relaxed
@given(st.text(max_size=300), st.lists(st.sampled_from(PIECES), max_size=200).map("".join))
def test_random_text_gets_a_verdict_in_time(noise, pieces):
    for text in (noise, pieces, noise + pieces):
        extracted = extract_answer(text)
        assert extracted is None or extracted == extracted.strip() and extracted in text
        assert grade(text, "a gold") is False and grade(extracted, "a gold") is False
        assert seconds(accuracy_reward, [text], ["a gold"]) < SECONDS
        assert format_reward([text])[0] in (0.0, 1.0)


# --- hostile inputs ---


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_hostile_completions_are_wrong_and_fast(hostile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in (hostile, f"<think>{hostile}</think>{hostile}", f"<answer>{hostile}</answer>"):
        for gold in ("11", "B", "red", r"\frac{1}{3}"):
            start = time.process_time()
            assert accuracy_reward([text], [gold]) == [0.0]
            assert time.process_time() - start < SECONDS
        assert grade(text, "11") is False
        assert seconds(format_reward, [text]) < SECONDS
    assert not list(tmp_path.iterdir())  # nothing was executed


HOSTILE_KINDS = by_kind([(name, *case) for name, case in HOSTILE_CASES.items()])


@pytest.mark.parametrize("kind", HOSTILE_KINDS)
def test_hostile_kinds_are_wrong_and_fast(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOSTILE_FILE", str(tmp_path / "executed"))
    grade(*SAME)  # the worker has started
    for name, completion, gold in HOSTILE_KINDS[kind]:
        try:
            start = time.monotonic()
            assert accuracy_reward([completion], [gold]) == [0.0], name
            assert time.monotonic() - start < rewards.WALL_SECONDS + 2.0, name  # of a busy machine
        except ValueError as error:  # some golds are as long as their predictions
            assert len(gold) > rewards.MAX_CHARS and "cannot be parsed" in str(error)
        assert seconds(format_reward, [completion]) < SECONDS
    assert not list(tmp_path.iterdir())  # nothing was executed


@pytest.mark.parametrize(
    "text",
    ["{", r"\boxed{", "}", "<answer>", "</think>", "\\", r"\boxed{}", r"\boxed ", r"\boxed{1,"],
)
def test_time_is_linear_in_length(text):
    def run(n):
        return min(
            seconds(
                lambda: (extract_answer(text * n), format_reward([text * n]), grade(text * n, "11"))
            )
            for _ in range(5)
        )

    assert run(32_000) < 24 * run(4_000) + 0.01  # 8 for linear, 64 for quadratic


@pytest.mark.parametrize(
    "text",
    ["9", "\\text{", "1/", " ", "$", "\\,", "\\frac", ",", "(", "**", "{,}", ",111", "\\frac{1}"],
)
def test_the_longest_answer_is_compared_in_a_moment(text):
    text = "1" + text * (rewards.MAX_CHARS // len(text))
    assert seconds(grade, text[: rewards.MAX_CHARS], "11") < 0.1 and not grade(
        text[: rewards.MAX_CHARS], "11"
    )


def test_easy_answers_per_second():
    rng = random.Random(0)
    gold = [str(rng.randrange(1000)) for _ in range(2000)]
    completions = [
        f"<think>{'so it goes ' * 20}</think> The answer is $\\boxed{{{g}}}$." for g in gold
    ]
    assert accuracy_reward(completions, gold) == [1.0] * 2000
    assert (
        seconds(accuracy_reward, completions, gold) < 1
    )  # a ninth of the measured speed: other machines are slower


def test_grading_needs_no_main_thread():
    verdicts = []
    thread = threading.Thread(
        target=lambda: verdicts.append(
            accuracy_reward([r"\boxed{1/2}", r"\boxed{2}"], ["0.5", "3"])
        )
    )
    thread.start()
    thread.join(10)
    assert verdicts == [[1.0, 0.0]]


# --- gold answers ---


UNPARSEABLE = [
    ("", "empty"), ("   ", "empty"), ("$$", "empty"), (".", "empty"), (r"\text{}", "empty"),
    (r"\boxed{}", "empty"), ("<answer> </answer>", "empty"), ("1/0", "1/0"),
    (r"\frac{3}{0}", "1/0"), ("x" * 600, "512"), ("9" * 9000, "512"), (r"\frac{1}{2", "balanced"),
    ("a}{b", "balanced"), (r"\boxed{3", "balanced"), ("a\\", "balanced"),
    ("x</think>3", "balanced"), (None, "NoneType"), (["11"], "list"), ([], "list"),
    ({"answer": 11}, "dict"),
    (True, "bool"), (b"11", "bytes"), (1j, "complex"), (float("nan"), "nan"), (float("inf"), "inf"),
    (-float("inf"), "inf"),
]  # fmt: skip


@pytest.mark.parametrize("gold, why", UNPARSEABLE, ids=[f"{gold!r:.20}" for gold, _ in UNPARSEABLE])
@pytest.mark.parametrize("prediction", ["11", "", None])
def test_trap_16_an_unparseable_gold_is_an_error_and_never_a_reward(gold, why, prediction):
    with pytest.raises(ValueError, match=f"gold answer .* cannot be parsed.*{why}") as caught:
        grade(prediction, gold)
    assert len(str(caught.value)) < 250
    with pytest.raises(ValueError, match="gold answer .* cannot be parsed"):
        accuracy_reward(["the answer is 3", r"\boxed{11}"], ["3", gold])


def test_trap_16_a_gold_integer_of_thousands_of_digits():
    with pytest.raises(ValueError, match="gold answer .* cannot be parsed"):
        grade("11", 10**5000)


def test_trap_16_the_error_names_the_gold():
    with pytest.raises(ValueError, match=re.escape(r"gold answer '\\frac{1}{2' cannot be parsed")):
        grade("0.5", r"\frac{1}{2")


def test_trap_16_nothing_is_swallowed(monkeypatch):
    """A bug in the rewards stops the run; it does not become a bad student."""
    source = inspect.getsource(rewards)
    assert (
        source.count("except Exception") == 1 and "except:" not in source
    )  # the one raises again, with the row

    def broken(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(rewards, "_parse", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        accuracy_reward([r"\boxed{a case of its own}"], ["a case of its own"])


@pytest.mark.parametrize("gold", [g for rows in GRADES.values() for g, _, _ in rows], ids=repr)
def test_trap_17_every_gold_can_be_earned_in_both_families(gold):
    answer = extract_answer(gold) or gold if isinstance(gold, str) else str(Fraction(str(gold)))
    boxed, tagged = (
        rf"<think>so</think> \boxed{{{answer}}}",
        f"<think>so</think> <answer>{answer}</answer>",
    )
    assert total_reward([boxed, tagged], [gold, gold]) == {
        "reward": [1.0] * 2,
        "accuracy": [1.0] * 2,
        "format": [1.0] * 2,
    }


def test_trap_17_right_answers_outside_of_box_and_tags_earn_nothing():
    """The reward cannot see the prompt; the check of the first steps reports this zero."""
    completions = ["11", "The answer is 11.", "<think>3 + 8</think> 11", "**11**", "$11$"]
    assert total_reward(completions, ["11"] * 5)["reward"] == [0.0] * 5


# --- calls ---


def test_numpy_golds():
    assert (
        grade("3", np.int64(3)) and grade("0.1", np.float32(0.1)) and grade("1/10", np.float64(0.1))
    )
    with pytest.raises(ValueError, match="cannot be parsed"):
        grade("1", np.bool_(True))


@pytest.mark.parametrize("conversational", [False, True])
def test_trl_calls_the_rewards(conversational):
    """TRL's own GRPOTrainer._calculate_rewards, with just the fields of a trainer that it reads."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    sums, halves = (
        {"prompt": "2 + 9?", "answer": "11", "kind": "sum"},
        {"prompt": "1 / 2?", "answer": 0.5, "kind": "half"},
    )
    inputs = [sums, sums, halves, halves]
    texts = [
        r"<think>a</think>\boxed{11}",
        r"\boxed{11}",
        r"<think>a</think>\boxed{2}",
        r"\boxed{\frac12}",
    ]
    prompts = [row["prompt"] for row in inputs]
    if conversational:
        prompts = [[{"role": "user", "content": p}] for p in prompts]
        texts = [[{"role": "assistant", "content": t}] for t in texts]
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True),
        reward_funcs=[accuracy_reward, format_reward], reward_processing_classes=[None, None],
        reward_func_names=["accuracy_reward", "format_reward"],
        state=SimpleNamespace(global_step=0), args=SimpleNamespace(report_to=[]), environments=None,
        _log_completion_extra=None, _log_metric=None)  # fmt: skip
    result = GRPOTrainer._calculate_rewards(trainer, inputs, prompts, texts, [[1, 2]] * 4)
    assert result.tolist() == [[1, 1], [1, 0], [0, 1], [1, 0]]


def test_conversations_are_read_at_their_last_message():
    talk = [
        {"role": "assistant", "content": r"\boxed{1}"},
        {"role": "tool", "content": "x"},
        {"role": "assistant", "content": r"\boxed{2}"},
    ]
    assert accuracy_reward([talk, talk], ["1", "2"]) == [0.0, 1.0]
    for content in (None, [{"type": "text", "text": r"\boxed{2}"}]):
        with pytest.raises(TypeError, match="a completion must be text"):
            accuracy_reward([[{"role": "assistant", "content": content}]], ["2"])
        with pytest.raises(TypeError, match="a completion must be text"):
            format_reward([[{"role": "assistant", "content": content}]])


@pytest.mark.parametrize("answer", ["11", ["1"], ["1", "1", "1"], []])
def test_one_answer_for_each_completion(answer):
    with pytest.raises(ValueError, match="one for each of 2 completions"):
        accuracy_reward([r"\boxed{1}", r"\boxed{1}"], answer)


def test_a_truncated_completion_earns_no_accuracy():
    completions = [r"<think>a</think>\boxed{11}"] * 2
    result = total_reward(completions, ["11"] * 2, truncated=[True, False])
    assert result["accuracy"] == [0.0, 1.0] and result["format"] == [1.0, 1.0]


def test_any_alternative_of_a_list_earns():
    completions = [r"\boxed{2}", r"\boxed{two}", r"\boxed{3}", r"\boxed{B}"]
    assert accuracy_reward(completions, [["2", "two"]] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert accuracy_reward(completions[3:], [["2", "two"]], choices=[["1", "2"]]) == [1.0]
    with pytest.raises(ValueError, match="gold answer '' cannot be parsed"):
        grade("2", ["2", ""])


@pytest.mark.parametrize("completions, answer", [("text", "1"), (["text"], "1"), ("t", ["1"])])
def test_a_text_for_a_list_is_one_clear_line(completions, answer):
    with pytest.raises(ValueError, match=r"have to be lists, got .*1") as caught:
        total_reward(completions, answer)
    assert "\n" not in str(caught.value)


def test_total_reward_weighs_and_keeps_each_apart():
    completions = [r"<think>a</think>\boxed{11}", r"\boxed{11}", r"<think>a</think>\boxed{2}", "11"]
    result = total_reward(completions, ["11"] * 4, prompts=["?"] * 4)
    assert result == {
        "reward": [1.0, 0.9, 0.1, 0.0],
        "accuracy": [1.0, 1.0, 0.0, 0.0],
        "format": [1.0, 0.0, 1.0, 0.0],
    }

    def length(completions, answer, kind, **columns):
        return [len(c) + len(kind) for c in completions]

    own = rewards.REWARDS | {"length": (length, -0.5)}
    result = total_reward([r"\boxed{11}", ""], ["11", "11"], own, kind="sum")
    assert result == {
        "reward": [0.9 - 6.5, -1.5],
        "accuracy": [1.0, 0.0],
        "format": [0.0, 0.0],
        "length": [13, 3],
    }
    with pytest.raises(
        RuntimeError, match="'short' failed on .*it returned 1 values for 4 completions"
    ):
        total_reward(
            completions,
            ["11"] * 4,
            {**rewards.REWARDS, "short": (lambda completions, **_: [1.0], 1.0)},
        )


@pytest.mark.parametrize("value", [None, "1", float("nan"), float("-inf"), [1.0]])
def test_a_reward_that_is_no_finite_number_is_an_error_that_names_the_row(value):
    def strange(completions, answer, **columns):
        return [value if a == "2" else 1.0 for a in answer]

    own = {"strange": (strange, 1.0)}
    message = "reward 'strange' failed on row 12, completion 'b': ValueError: .* no finite number"
    with pytest.raises(RuntimeError, match=message):
        total_reward(["a", "b"], ["1", "2"], own, row=[11, 12])


def test_an_unparseable_gold_names_its_row():
    with pytest.raises(
        RuntimeError,
        match="the reward 'accuracy' failed on row 8, completion .*gold answer '' cannot",
    ):
        total_reward([r"\boxed{1}"] * 2, ["1", ""], row=[7, 8])


@pytest.mark.parametrize("lengths", [[0, 1, 60, 80], [79, 80, 81, 90], [99, 100, 101, 250]])
def test_length_penalty_equals_trls(lengths):
    from trl.rewards import get_soft_overlong_punishment

    ids = [[5] * n for n in lengths]
    ours = rewards.length_penalty(100, 20)(
        ["x"] * len(ids), completion_ids=ids, answer=["1"] * len(ids)
    )
    assert ours == pytest.approx(get_soft_overlong_punishment(100, 20)(ids))
    for buffer in (0, -1, 101):
        with pytest.raises(ValueError, match="0 < buffer <= max_tokens"):
            rewards.length_penalty(100, buffer)


def test_loading_rewards(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("FACTOR = 3\ndef size(completions, **columns): return [3] * len(completions)\n")
    loaded = rewards.load_rewards(["accuracy:0.9", "format:0.1"], 100)
    assert loaded == rewards.REWARDS and list(loaded) == ["accuracy", "format"]
    specs = [f"{mine}:size:-0.25", "length_penalty:2", "format:0"]
    loaded = rewards.load_rewards(specs, 100)
    assert [(name, weight) for name, (_, weight) in loaded.items()] == [
        ("size", -0.25), ("length_penalty", 2.0), ("format", 0.0)]  # fmt: skip
    assert loaded["size"][0](["a", "b"]) == [3, 3]
    ids = [[5] * n for n in (75, 80, 100)]
    assert loaded["length_penalty"][0](["x"] * 3, completion_ids=ids) == [0.0, -0.2, -1.0]
    assert rewards.load_rewards([f"{mine}:size"], 1)["size"][1] == 1.0
    assert rewards.load_rewards(["length_penalty:1"], 1)  # the buffer is one token


@pytest.mark.parametrize(
    "specs, message",
    [
        ([], "no reward is given; the default is accuracy:0.9 format:0.1"),
        (
            ["acuracy:0.9"],
            "'acuracy:0.9': the nearest name is accuracy, known are accuracy, format,",
        ),
        (["lenght:1"], "the nearest name is length_penalty"),
        (["accuracy"], "the weight '' is no finite number"),
        (["accuracy:x"], "the weight 'x' is no finite number"),
        (["accuracy:nan"], "the weight 'nan' is no finite number"),
        (["MINE:size:inf"], "the weight 'inf' is no finite number"),
        (["MINE:size:1:2"], "the weight '1:2' is no finite number"),
        (
            ["accuracy:1", "format:1", "accuracy:2"],
            "'accuracy:2': there is a reward called accuracy",
        ),
        (["MINE:size", "MINE:size:2"], "there is a reward called size already"),
        (["MINE:reward"], "there is a reward called reward already"),
        (["MINE:accuracy"], "there is a reward called accuracy already"),
        (["no.py:f"], "there is no file no.py"),
        (["MINE"], "mine.py has no function ''"),
        (["MINE:other"], "mine.py has no function 'other'"),
        (["MINE:FACTOR"], "mine.py has no function 'FACTOR'"),
    ],
)
def test_rewards_that_cannot_be_loaded(specs, message, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "FACTOR = 3\ndef size(completions, **_): return [1]\nreward = accuracy = size\n"
    )
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        rewards.load_rewards([spec.replace("MINE", str(mine)) for spec in specs], 100)
    assert "\n" not in str(caught.value)


# --- the process that does the algebra ---

SAME, OTHER = (r"2\sqrt{3}", r"\sqrt{12}"), (r"2\sqrt{3}", r"\sqrt{13}")
HANG = ("9^{9^{9^{9}}}+x", "x+1")


def children() -> set[int]:
    """Processes below this one that have not ended, and zombies."""
    found = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True
    )
    return {
        int(line.split()[0]) for line in found.stdout.splitlines() if "ps" not in line.split()[1:]
    }


def fresh(text: str) -> str:
    """A formula of its own, so that no cache answers."""
    return f"{text}+{next(COUNTER)}y"


COUNTER = iter(range(1, 10**6))


def test_a_question_that_hangs_is_wrong_in_time_and_the_next_is_answered():
    assert grade(*SAME) and not grade(*OTHER)
    worker, before = rewards._worker.process.pid, children()
    start = time.monotonic()
    assert not grade(fresh(HANG[0]), HANG[1])
    assert time.monotonic() - start < rewards.WALL_SECONDS + 1
    assert grade(f"{SAME[0]}+y", f"y+{SAME[1]}") and rewards._worker.process.pid == worker
    assert children() == before  # nothing was left


def sums() -> tuple[str, str]:
    """A new pair that only algebra can show to be equal."""
    n = next(COUNTER)
    return f"2\\sqrt{{3}}+{n}z", f"{n}z+\\sqrt{{12}}"


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_was_killed_or_stopped_is_replaced_and_no_answer_lost(harm):
    assert grade(*sums())
    before = rewards._worker.process
    os.kill(before.pid, harm)
    assert grade(*sums()) and grade(*sums()) and not grade(sums()[0], sums()[1])
    assert rewards._worker.process is not before and before.returncode is not None


def test_what_could_not_be_decided_is_wrong_and_not_remembered(monkeypatch):
    pair = sums()
    with monkeypatch.context() as m:
        m.setattr(
            rewards._Worker, "read", lambda self, seconds: b"ready\n" if seconds > 10 else b""
        )
        assert not grade(*pair)
    assert grade(*pair)


@pytest.mark.parametrize("delay", [0.02, 0.3])
def test_an_interrupted_question_does_not_shift_the_answers(delay):
    """As a caught Ctrl-C would: while the worker starts (0.02 s), or while it thinks."""

    def interrupt(*_):
        raise KeyboardInterrupt

    slow = fresh(HANG[0])
    if delay > 0.1:
        assert grade(*sums())
    else:
        rewards._worker.stop()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        with pytest.raises(KeyboardInterrupt):
            grade(slow, "x+1")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for _ in range(3):
        assert grade(*sums()) and not grade(sums()[0], sums()[1])


def test_a_process_with_many_open_files():
    code = f"""
import resource, rewards
hard = max(3000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (3000, hard))
files = [open("/dev/null") for _ in range(1500)]
print(rewards.grade(*{SAME!r}))
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout
        == "True\n"
    )


def test_threads_and_forked_processes_ask_for_themselves():
    assert grade(*SAME)
    pid = rewards._worker.process.pid
    pairs = [(f"2\\sqrt{{3}}+{n}w", f"{n}w+\\sqrt{{{12 + n % 2}}}") for n in range(24)]
    expected = [n % 2 == 0 for n in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda pair: grade(*pair), pairs)) == expected
    assert rewards._worker.process.pid == pid
    pairs = [(f"2\\sqrt{{3}}+{n}v", f"{n}v+\\sqrt{{{12 + n % 2}}}") for n in range(24)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(grade, pairs) == expected
    assert rewards._worker.process.pid == pid and grade(f"u+{SAME[0]}", f"{SAME[1]}+u")


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_the_worker_ends_with_its_parent(end):
    code = f"import os, rewards; rewards.grade(*{SAME!r}); "
    code += f"print(rewards._worker.process.pid, flush=True); {end}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    pid = int(done.stdout)
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        if " Z " in state:
            return
        time.sleep(0.05)
    raise AssertionError("the worker lives on")


def test_without_math_verify_the_command_is_named(monkeypatch):
    monkeypatch.setattr(rewards, "_worker", rewards._Worker())
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    assert grade("1/2", "0.5")
    with pytest.raises(ImportError, match="pip install math-verify"):
        grade(fresh("x"), "2x")


GAMES = [  # (prediction, gold) that must not earn
    ("2, 1", "x=1, y=2"), ("y=2, x=1", "(2,1)"), ("x=2 or x=1", "(2,1)"),
    ("2 hundred fifty", "200"), ("3 eighths", "3"), ("11 thousandths", "11"), ("5 millions", "5"),
    ("11 pairs", "11"), ("7 twice", "7"), ("3 in four", "3"), ("5 below zero", "5"),
    ("5 negative", "5"), ("11 in binary", "11"), ("11 twelve", "11"), ("11 nope", "11"),
    ("11 versus twelve", "11"), (r"\frac{n^2+n}{2} million", r"\frac{n(n+1)}{2}"), ("12 13", "25"),
    ("1 2", "3"), ("12$13", "12"), ("x+1$x+2", "x+1"), ("12\u224513", "12"), (r"13\equiv 12", "12"),
    ("y=3x<>y=2x+1", "y=2x+1"), ("x-3>0 is wrong", "x>3"),
    (r"x\ne0 is wrong", r"\mathbb{R}\setminus\{0\}"), ("-1<k<4 < 77", "-1<k<4"), ("x'+1", "x+1"),
    ("h+1=9", "9"), ("2h=9", "9"), ("h^2=9", "9"), (r"x+1=2\sqrt3", r"\sqrt{12}"),
    (r"x\not= 3", "3"), ("not = 3", "3"), ("not 5 = 3", "3"), ("x isn't = 3", "3"),
    (r"x \not\in [1,2]", "[1,2]"), ("3 - 1/4", "13/4"), (r"no more than \angle A = 75^\circ", "75"),
    ("f'", "f"), ("12'", "12"), ("B: c", "B"), ("b: a b c d", "B"), ("B because C", "B"),
    ("B (actually C)", "B"), ("A. x B. y C. z", "A"), ("A(2,1)", "A"), ("a(b+c)^{-1}", "A"),
    ("(B)+1", "B"), ("yes, (no)", "yes"), ("yes, I mean no", "yes"), ("Yes, maybe", "yes"),
    ("no, it is yes", "no"), (r"\{x \in \mathbb{Z} : x>3\}", r"(3,\infty)"),
    (r"\pi>3", r"(3,\infty)"), ("1<x<3<2", "1<x<3"),
    (r"(x, y) = \left[5, -1\right)", "(x,y)=(5,-1)"), ("X+1", "x+1"), ("?", "..."),
    ("12<answer>11</answer>13", "11"), ("x.__init__.__globals__", "x"), ("11^", "11"),
    ("11-", "11"), ("11 == 11", "11"), ("1,,2", "1,2"), ("B1", "B"),
]  # fmt: skip
CHOICE_GAMES = [  # (prediction, choices): right for one letter at most
    ("4", ["4 m", "4 cm", "4%"]), ("5", ["5 m", "5 cm", "5 km"]), ("2", ["x=2", "y=2", "2 m"]),
    ("50%", ["50", "0.5"]), ("1, 2", ["(1,2)", r"\{1,2\}"]), (r"\pm 1", ["1, -1", r"\{1,-1\}"]),
    ("A: red B: blue", ["red", "blue"]), ("A. red or blue", ["red", "blue"]),
    ("red or blue", ["red", "blue"]), ("A or B", ["red", "blue"]), ("", ["a", ""]),
]  # fmt: skip


@pytest.mark.parametrize("prediction, gold", GAMES)
def test_games_do_not_pay(prediction, gold):
    assert grade(gold, gold) and not grade(prediction, gold)


@pytest.mark.parametrize("prediction, choices", CHOICE_GAMES)
def test_no_answer_is_right_for_two_choices(prediction, choices):
    letters = "ABC"[: len(choices)]
    assert not any(grade(prediction, letter, choices) for letter in letters)
    assert all(grade(letter, letter, choices) for letter in letters)


@pytest.mark.parametrize(
    "percent, gold, precision", [("30%", "0", 0), ("51%", "1", 0), ("150%", "2", 0)]
)
def test_a_percent_sign_is_no_rounding(percent, gold, precision):
    assert not grade(percent, gold, precision=precision)


def test_columns_as_data_sets_have_them():
    assert (
        grade("3.141", "3.14", precision=2.0)
        and grade("B", "B", [1, 2])
        and grade("2", "B", [1, 2])
    )
    assert grade("B", "B", ["red", "blue", ""]) and grade("B", "B", ["red", "blue", "x" * 600])
    assert grade("0.5", Decimal("0.50")) and grade("B", "Option B") and grade("Yes", "Yes, it is.")


def test_prose_is_linear_in_stars():
    assert seconds(extract_answer, "*" * 100_000, prose=True) < SECONDS


def test_memory_stays_bounded():
    """Distinct long answers: what is remembered of them is limited."""
    assert rewards.parse.cache_info().maxsize <= 4096


def test_verdicts_by_algebra_are_remembered():
    pair = fresh("(a+b)^2"), "a^2+2ab+b^2"
    first, again = (seconds_of_wall(grade, *pair) for _ in range(2))
    assert again < first / 5


def seconds_of_wall(function, *args) -> float:
    start = time.monotonic()
    function(*args)
    return time.monotonic() - start


def test_copied_alone_it_runs_its_usage_example(tmp_path):
    shutil.copy(Path(rewards.__file__), tmp_path)
    command = [sys.executable, *"-E -s -S -m doctest -v rewards.py".split()]  # -S: no packages
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"3 passed", run.stdout) and "accuracy_reward(completions" in run.stdout


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "extras.grade", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "completion, gold, extracted, read, gold_read, verdict",
    [
        (r"so \boxed{\frac12}", "0.5", r"'\\frac12'", "number 1/2", "number 1/2", "by rule: right"),
        (r"so \boxed{3}", "x = 4", "'3'", "number 3", "named x=4 (x)", "by rule: wrong"),
        (r"\boxed{\sqrt{12}}", r"2\sqrt{3}", r"'\\sqrt{12}'", r"formula \sqrt{12}",
         r"formula 2\sqrt{3}", "by algebra (math-verify): right"),
        ("The answer is 5.", "5", "'5' (from prose: a reward reads it only with prose=True)",
         "number 5", "number 5", "by rule: right"),
        ("hm", "5 cm", "None", "None", "number 5 (cm)", "by rule: wrong"),
    ],
)  # fmt: skip
def test_command_line_says_how_it_was_compared(
    completion, gold, extracted, read, gold_read, verdict
):
    lines = [f"extracted  {extracted}", f"read as    {read}", f"gold       {gold_read}", verdict]
    assert run(completion, gold).stdout.splitlines() == lines


def test_command_line_grades_files_again(tmp_path):
    lines = [{"answer": "3", "responses": [r"\boxed{3}", r"\boxed{4}"], "right": [1.0, 1.0]},
             {"answer": "B", "completion": r"\boxed{red}", "choices": ["blue", "red"]},
             {"answer": "3.14", "prediction": r"\boxed{\pi}", "precision": 2}]  # fmt: skip
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = run("--file", path).stdout.splitlines()
    changed = r"line 1: '\\boxed{4}' was 1.0, is 0.0"
    assert out == [changed, "4 answers, 0.7500 right, 1 verdicts changed"]
    path.write_text('{"answer": "3"}\n')
    done = run("--file", path)
    needed = "line 1: needs answer and one of responses, completion, prediction"
    assert done.returncode == 1 and needed in done.stderr
    assert "Traceback" not in done.stderr and "usage" in run("one").stderr
