r"""rewards.py: what is found in a completion, what equals what, what the format is, and that nothing can hurt.

Of the tables, at least a third are wrong answers that look right. Tests named test_trap_NN guard against a failure
seen in other projects.
"""

import inspect
import random
import re
import shutil
import string
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import accuracy_reward, extract_answer, format_reward, grade, total_reward

SECONDS = 1.0  # the most that one call may take on any input
relaxed = settings(deadline=None)  # hypothesis would count wall time; see seconds()

# kind: [(gold, predictions that equal it, predictions that look like it)]
GRADES = {
    "integer": [
        ("11", ["11", " 11 ", "$11$", r"\(11\)", r"\[ 11 \]", "11.", "11.0", "+11", "011", r"\text{11}", "**11**",
                "$11$.", "1.1e1"],
         ["12", "1", "111", "1 1", "1,1", "-11", "11 12", "11 or 12", "11, 12", "(11, 12)", "11!", "11_2", "1$1",
          "11..", r"1\text{1}", "1\u200b1", "\u0661\u0661", "11^2", "x11", "eleven", "0x0B", "11/2", "11e1", "11e",
          "1.1"]),
        ("-5", ["-5", "- 5", "\u22125", "-5.0", r"-\frac{10}{2}", "$-5$"], ["5", "--5", "+5", "\u20135 to 5", "(5)"]),
        ("0", ["0", "-0", "0.0", "0/7", "0%"], ["", "O", "o", "0/0", "none", "00 1"]),
        (11, ["11", "11.00", r"\frac{22}{2}"], ["12", "11.01", "eleven"]),
    ],
    "separators": [
        ("4321", ["4,321", "4{,}321", r"4,\!321", r"4\,321", "4,321.", "4,321.0", "$4,321"],
         ["4,3210", "43,21", "4, 321", "4 321", "(4,321)", "4.321", "4,32", "4\uff0c321", "4,3,2,1"]),
        ("4,321", ["4321", "4{,}321"], ["4, 321", "(4,321)", "4,322"]),
        ("1234567.5", ["1,234,567.5", r"1\,234\,567.5"], ["1,234567.5", "1234,567.5", "1,234,567,5"]),
        ("4, 321", ["4, 321", "4 ,  321"], ["4,321", "4321", "321, 4"]),
        ("123", ["123"], ["0,123", "1,23", ",123"]),
        ("0.123", [".123", "123/1000"], ["0,123", "123"]),
    ],
    "decimal": [
        ("0.5", ["0.5", ".5", "0.50", "1/2", "2 / 4", r"\frac{1}{2}", "0.5."],
         ["0.05", "5", "0,5", "0.51", "1/3", ". 5", "0. 5", "0.5.5"]),
        ("0.3", ["0.30", "3/10"], ["0.3000000000000000001", "0.29999999999999999", "1/3", "0.33"]),
        (0.1, ["0.1", "1/10"], ["0.10000000000000000555", "0.11"]),
        (1e-7, ["0.0000001", "1e-07", "1E-7"], ["0", "0.000000", "1e7"]),
        ("1e-07", ["0.0000001", "1e-7"], ["0", "1e7", "1e-8"]),
        ("3.14", ["3.14", "157/50"], ["3.1416", r"\pi", "3", "3.1", "22/7"]),
    ],
    "fraction": [
        ("1/2", [r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac12", r"\frac12", r"\frac 1 2", r"\frac1{2}", r"\frac {2} {4}",
                 r"\frac{1}2", "0.5"],
         ["2/1", "1/-2", "-1/2", "1 2", "12", r"\frac{2}{1}", r"\frac{1}{2}x", r"\frac123", "1/2/1", "1//2",
          r"\frac{1}{20}"]),
        (r"-\frac{3}{4}", [r"\frac{-3}{4}", r"\frac{3}{-4}", "-0.75", "-3/4"],
         [r"\frac{3}{4}", r"\frac{-3}{-4}", "-4/3", r"-\frac{-3}{4}"]),
        ("1/3", [r"\frac{2}{6}", r"\cfrac{1}{3}"], ["0.33", "0.333333", "0.3333333333333333", "33%"]),
        ("31/4", ["7.75"], ["3 1/4", r"3\frac{1}{4}", "3.25"]),
        (Fraction(2, 5), ["4/10", "0.4"], ["5/2", "2", "0.04"]),
        ("3", ["3/1", r"\frac{9}{3}", "6/2"], ["1/3", "3/0", "9/0", r"\frac{3}{0}", r"\frac{9}{}"]),
    ],
    "percent": [
        ("35%", ["35%", r"35\%", "35 %", "35", r"$35\%$", "35.0%"], ["0.35", "3.5%", "35%%", "%35", "35% or 40%"]),
        ("0.35", [".35", "0.35%"], ["35%", "35", "3.5"]),
    ],
    "choice": [
        ("B", ["B", "b", "(B)", "B.", "B)", "B:", "(B).", r"\text{B}", r"\text{(B)}", r"\textbf{B}", r"\mathrm{B}.",
               "**B**", "**B.**", "( B )", "$B$", r"\textbf{(B) }", r"\text{\textbf{B}}"],
         ["A", "(A)", "A, B", "AB", "BB", "B, C", "A or B", "B or C", "(A) (B)", "(B", "not B", "8", "\u0412", "", "()",
          r"\text{any of A, B, C, D}", "A B C D", "ABCD", "Bob", "(B) or (C)", r"\beta", "B?"]),
        ("(C)", ["C", "c.", "(C)"], ["(D)", "D", "(CC)", "\u00a9"]),
        ("A.", ["a", "(A)"], ["an", "an A", "the"]),
    ],
    "yes/no": [
        ("yes", ["Yes", "YES.", r"\text{yes}", " yes ", "**Yes**"],
         ["no", "yes and no", "not yes", "yes or no", "y", "1", "true"]),
        ("No", ["no", "No.", "NO"], ["yes", "none", "no yes", "know", "0", "n"]),
    ],
    "text": [
        ("red", ["Red", "RED.", r"\text{red}", r"\textbf{ Red }"],
         ["dark red", "redd", "re d", "green", "red, green", "not red"]),
        ("light blue", ["Light  Blue", "light\nblue", "light~blue"],
         ["lightblue", "blue", "light", "blue light", "dark blue"]),
        ("None", ["none"], ["", "nothing", None]),
        ("red, green", ["Red,green", "red , green"], ["green, red", "red green", "red", "red, green, blue"]),
    ],
    "expression": [
        (r"2\sqrt{7}", [r"2 \sqrt{7}", r"$2\sqrt{7}$", r"2\sqrt{ 7 }."],
         [r"\sqrt{7}", "2", r"2\sqrt{6}", r"2\sqrt{17}", "2sqrt7"]),
        (r"\Delta", [r"$\Delta$"], [r"\delta", "Delta", "D"]),
        ("x + 1", ["x+1", "$x +1$"], ["x-1", "x + 11", "x", "1 + 1"]),
        ("(2, 9)", ["(2,9)", r"\left(2, 9\right)", "( 2 , 9 )"],
         ["(9, 2)", "2", "[2, 9]", "[2,9)", "(2, 9, 1)", "(29)", "11"]),
        (r"\{1, 2\}", [r"\left\{1,2\right\}"], [r"\{2, 3\}", r"\{1\}", "1", r"\{12\}"]),
        (r"a \leftarrow b", [r"$a\leftarrow b$", r"a \leftarrow  b"], ["a arrow b", "a b"]),
    ],
    "gold in a wrapper": [
        (r"The sum is $\boxed{7}$.", ["7", r"\boxed{7}", "<answer>7</answer>"], ["8", "The sum is 7", ""]),
        ("<answer> 3 </answer>", ["3", "3.0"], ["4", "<answer>"]),
    ],
}  # fmt: skip
CASES = [
    pytest.param(prediction, gold, verdict, id=f"{kind}: {prediction!r:.60} {'==' if verdict else '!='} {gold!r}")
    for kind, rows in GRADES.items()
    for gold, right, wrong in rows
    for verdict, predictions in ((True, right), (False, wrong))
    for prediction in predictions
]

EXTRACTIONS = [
    (r"so \boxed{11}", "11"),
    (r"\boxed{ \frac{1}{2} } done", r"\frac{1}{2}"),
    (r"\fbox{B}", "B"),
    (r"\boxed {7}", "7"),
    (r"\\boxed{7}", "7"),  # the model escaped its backslash
    ("line\\\\\\boxed{7}", "7"),  # a LaTeX line break before the box
    (r"\boxed{1}, no, \boxed{2}", "2"),
    (r"\boxed{3} and then \boxed{4", "3"),  # the last one is cut off
    (r"\boxed{a \boxed{3}", "3"),
    (r"\boxed{\boxed{3}}", "3"),
    (r"\boxed{\text{is } \boxed{3}}", "3"),
    (r"{ \boxed{3 }} }", "3"),
    (r"} } \boxed{3}", "3"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
    ("\\boxed{1\n+ 2}", "1\n+ 2"),
    (r"\boxed{3} then \boxed{}", ""),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    (r"<think>\boxed{1}</think> <answer>2</answer>", "2"),  # a box in the thinking does not beat a tag after it
    (r"<think>\boxed{1}</think> so two", "1"),  # nothing after the thinking: the thinking is read
    (r"<think>a</think>\boxed{1}</think> \boxed{2", "1"),
    (r"a</think> \boxed{1} </think> <answer>2</answer>", "2"),
    (r"\boxed{1</think>2}", None),  # a box does not reach across
    (r"<answer>2</answer>", "2"),
    ("<answer>\n 2 \n</answer>", "2"),
    (r"<answer>1</answer><answer>2</answer>", "2"),
    (r"<answer>1<answer>2</answer>", "2"),
    (r"<answer>2</answer> </answer>", "2"),
    (r"<answer>1</answer> <answer>2", "1"),
    (r"<answer>so \boxed{5}</answer>", "5"),
    (r"\boxed{5} <answer>6</answer>", "5"),  # a box before a tag
    (r"\boxed{5 <answer>6</answer>", "6"),
    ("<answer></answer>", ""),
    ("The answer is 11.", None),  # bare prose is not read
    ("11", None),
    (r"\boxed 11", None),
    (r"boxed{11}", None),
    (r"\boxed\{11\}", None),
    (r"\unboxed{11}", None),
    ("<answer>11", None),
    ("</answer>11<answer>", None),
    ("<Answer>11</Answer>", None),
    ("", None),
]

FORMATS = [
    (r"<think>3 + 8</think> \boxed{11}", 1),
    ("<think>\n3 + 8\n</think>\n\nThe answer is \\boxed{11}.\n", 1),
    (r"<think></think>\boxed{11}", 1),
    (r"<think>not \boxed{12}</think> \boxed{\frac{1}{2}}", 1),
    ("<think>3 + 8</think> <answer>11</answer>", 1),
    ("\n<think>3 + 8</think>\n<answer>\n11\n</answer>\n", 1),
    (r"\boxed{11}", 0),
    (r"3 + 8 \boxed{11}", 0),
    (r"<think>3 + 8 \boxed{11}", 0),
    (r"3 + 8</think> \boxed{11}", 0),
    (r"<think>3 + 8 \boxed{11}</think>", 0),
    (r"<think>3 + 8 \boxed{11}</think> 11", 0),
    (r"So <think>3 + 8</think> \boxed{11}", 0),
    (r"</think>3 + 8<think> \boxed{11}", 0),
    (r"<think>3</think><think>8</think> \boxed{11}", 0),
    (r"<think>3<think>8</think></think> \boxed{11}", 0),
    (r"<think>3</think> \boxed{11} </think>", 0),
    (r"<think>3</think> \boxed{11} <think>8</think>", 0),
    (r"<think>3</think> \boxed{10} \boxed{11}", 0),
    (r"<think>3</think> \boxed{\boxed{11}}", 0),
    (r"<think>3</think> \boxed{11} \boxed{1", 0),
    (r"<think>3</think> \boxed{11", 0),
    (r"<think>\boxed{11}</think> \boxed{11", 0),
    (r"<think>3</think> \boxed{ }", 0),
    ("<think>3</think> <answer> </answer>", 0),
    ("<think>3</think> <answer>11", 0),
    ("<think>3</think> so <answer>11</answer>", 0),
    ("<think>3</think> <answer>11</answer> so", 0),
    ("<think>3</think> <answer>10</answer><answer>11</answer>", 0),
    ("<think>3</think> <answer><answer>11</answer></answer>", 0),
    ("<think>3 <answer>11</answer></think>", 0),
    (r"<think>3 <answer>11</answer></think> \boxed{11}", 0),
    (r"<think>3</think> <answer>\boxed{11}</answer>", 0),
    (r"<think>3</think> \boxed{11} <answer>11</answer>", 0),
    ("<answer>11</answer><think>3</think>", 0),
    (r"<Think>3</Think> \boxed{11}", 0),
    ("<think>3</think>", 0),
    ("", 0),
]

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
    "full width": "\\boxed{\uff11\uff11}",
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
    verdicts = [case.values[2] for case in CASES]
    assert len(verdicts) >= 250 and sum(not v for v in verdicts) >= len(verdicts) / 3
    assert sum(not v for _, v in FORMATS) >= len(FORMATS) / 3
    assert sum(v is None for _, v in EXTRACTIONS) >= 10


@pytest.mark.parametrize("prediction, gold, verdict", CASES)
def test_grade(prediction, gold, verdict):
    assert grade(prediction, gold) is verdict


@pytest.mark.parametrize("text, expected", EXTRACTIONS)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize("text, expected", FORMATS)
def test_format_reward(text, expected):
    assert format_reward([text]) == [float(expected)]


def second_last_box(text: str) -> str | None:
    """The obvious quadratic way: from the last macro back, count braces until they balance."""
    for macro in reversed(list(re.finditer(r"\\(?:boxed|fbox)\{", text))):
        depth = 1
        for i in range(macro.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[macro.end() : i].strip()
    return None


@relaxed
@given(
    st.lists(st.sampled_from([r"\boxed{", r"\fbox{", "{", "}", "}", "1", " ", "x", r"\frac"]), max_size=30).map("".join)
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
        ways += [f"{sign}{top:,}", f"${sign}{top}$", f"{sign}{top}.0", f"{sign}{top}.", rf"\text{{{sign}{top}}}"]
    return ways + [f" {way} " for way in ways]


@relaxed
@given(numbers, st.data())
def test_numbers_equal_themselves_in_any_spelling(x, data):
    one, other = data.draw(st.sampled_from(spellings(x))), data.draw(st.sampled_from(spellings(x)))
    assert grade(one, other) and grade(other, one) and grade(one, x)


@relaxed
@given(numbers, numbers.filter(bool), st.data())
def test_a_changed_number_is_never_right(x, change, data):
    one, other = data.draw(st.sampled_from(spellings(x))), data.draw(st.sampled_from(spellings(x + change)))
    assert not grade(one, other) and not grade(other, one)


@relaxed
@given(st.tuples(st.integers(-(10**9), 10**9), st.integers(1, 10**6)).map("{0[0]}.{0[1]}".format), st.data())
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


PIECES = [r"\boxed{", r"\fbox", "{", "}", "<answer>", "</answer>", "<think>", "</think>", r"\text{", r"\frac", "1", ",",
          "\\", "$", "9" * 50]  # fmt: skip


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


@pytest.mark.parametrize(
    "text", ["{", r"\boxed{", "}", "<answer>", "</think>", "\\", r"\boxed{}", r"\boxed ", r"\boxed{1,"]
)
def test_time_is_linear_in_length(text):
    def run(n):
        return min(
            seconds(lambda: (extract_answer(text * n), format_reward([text * n]), grade(text * n, "11")))
            for _ in range(5)
        )

    assert run(32_000) < 24 * run(4_000) + 0.01  # 8 for linear, 64 for quadratic


@pytest.mark.parametrize(
    "text", ["9", "\\text{", "1/", " ", "$", "\\,", "\\frac", ",", "(", "**", "{,}", ",111", "\\frac{1}"]
)
def test_the_longest_answer_is_compared_in_a_moment(text):
    text = "1" + text * (rewards.MAX_CHARS // len(text))
    assert seconds(grade, text[: rewards.MAX_CHARS], "11") < 0.1 and not grade(text[: rewards.MAX_CHARS], "11")


def test_easy_answers_per_second():
    rng = random.Random(0)
    gold = [str(rng.randrange(1000)) for _ in range(2000)]
    completions = [f"<think>{'so it goes ' * 20}</think> The answer is $\\boxed{{{g}}}$." for g in gold]
    assert accuracy_reward(completions, gold) == [1.0] * 2000
    assert seconds(accuracy_reward, completions, gold) < 1  # a ninth of the measured speed: other machines are slower


def test_grading_needs_no_main_thread():
    verdicts = []
    thread = threading.Thread(
        target=lambda: verdicts.append(accuracy_reward([r"\boxed{1/2}", r"\boxed{2}"], ["0.5", "3"]))
    )
    thread.start()
    thread.join(10)
    assert verdicts == [[1.0, 0.0]]


# --- gold answers ---


UNPARSEABLE = [
    ("", "empty"), ("   ", "empty"), ("$$", "empty"), (".", "empty"), (r"\text{}", "empty"), (r"\boxed{}", "empty"),
    ("<answer> </answer>", "empty"), ("1/0", "1/0"), (r"\frac{3}{0}", "1/0"), ("x" * 600, "512"), ("9" * 9000, "512"),
    (r"\frac{1}{2", "balanced"), ("a}{b", "balanced"), (r"\boxed{3", "balanced"), ("a\\", "balanced"),
    ("x</think>3", "balanced"), (None, "NoneType"), (["11"], "list"), ({"answer": 11}, "dict"), (True, "bool"),
    (b"11", "bytes"), (1j, "complex"), (float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "inf"),
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
    assert "except Exception" not in inspect.getsource(rewards) and "except:" not in inspect.getsource(rewards)

    def broken(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(rewards, "_canonical", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        accuracy_reward([r"\boxed{a case of its own}"], ["a case of its own"])


@pytest.mark.parametrize("gold", [g for rows in GRADES.values() for g, _, _ in rows], ids=repr)
def test_trap_17_every_gold_can_be_earned_in_both_families(gold):
    answer = extract_answer(gold) or gold if isinstance(gold, str) else str(Fraction(str(gold)))
    boxed, tagged = rf"<think>so</think> \boxed{{{answer}}}", f"<think>so</think> <answer>{answer}</answer>"
    assert total_reward([boxed, tagged], [gold, gold]) == {
        "reward": [1.0] * 2,
        "accuracy": [1.0] * 2,
        "format": [1.0] * 2,
    }


def test_trap_17_right_answers_outside_of_box_and_tags_earn_nothing():
    """The reward alone cannot see the prompt: this zero is what the trainer's check of its first steps reports."""
    completions = ["11", "The answer is 11.", "<think>3 + 8</think> 11", "**11**", "$11$"]
    assert total_reward(completions, ["11"] * 5)["reward"] == [0.0] * 5


# --- calls ---


def test_numpy_golds():
    assert grade("3", np.int64(3)) and grade("0.1", np.float32(0.1)) and grade("1/10", np.float64(0.1))
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
    texts = [r"<think>a</think>\boxed{11}", r"\boxed{11}", r"<think>a</think>\boxed{2}", r"\boxed{\frac12}"]
    prompts = [row["prompt"] for row in inputs]
    if conversational:
        prompts = [[{"role": "user", "content": p}] for p in prompts]
        texts = [[{"role": "assistant", "content": t}] for t in texts]
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True), reward_funcs=[accuracy_reward, format_reward],
        reward_processing_classes=[None, None], reward_func_names=["accuracy_reward", "format_reward"],
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


def test_total_reward_weighs_and_keeps_each_apart():
    completions = [r"<think>a</think>\boxed{11}", r"\boxed{11}", r"<think>a</think>\boxed{2}", "11"]
    result = total_reward(completions, ["11"] * 4, prompts=["?"] * 4)
    assert result == {"reward": [1.0, 0.9, 0.1, 0.0], "accuracy": [1.0, 1.0, 0.0, 0.0], "format": [1.0, 0.0, 1.0, 0.0]}

    def length(completions, answer, kind, **columns):
        return [len(c) + len(kind) for c in completions]

    own = rewards.REWARDS | {"length": (length, -0.5)}
    result = total_reward([r"\boxed{11}", ""], ["11", "11"], own, kind="sum")
    assert result == {"reward": [0.9 - 6.5, -1.5], "accuracy": [1.0, 0.0], "format": [0.0, 0.0], "length": [13, 3]}
    with pytest.raises(ValueError):  # a reward of another length is no reward
        total_reward(completions, ["11"] * 4, {**rewards.REWARDS, "short": (lambda completions, **_: [1.0], 1.0)})


def test_copied_alone_it_runs_its_usage_example(tmp_path):
    copy = shutil.copy(Path(rewards.__file__), tmp_path)
    command = [
        sys.executable,
        "-E",
        "-s",
        "-S",
        "-m",
        "doctest",
        "-v",
        Path(copy).name,
    ]  # -S: no installed packages at all
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"3 passed", run.stdout) and "accuracy_reward(completions" in run.stdout


def test_command_line(tmp_path):
    copy = shutil.copy(Path(rewards.__file__), tmp_path)
    for completion, gold, verdict in (
        (r"so \boxed{\frac12}", "0.5", "right"),
        (r"so \boxed{3}", "0.5", "wrong"),
        ("so 0.5", "0.5", "wrong"),
    ):
        run = subprocess.run(
            [sys.executable, "-S", copy, completion, gold], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert run.stdout == f"extracted {extract_answer(completion)!r}, gold {gold!r}: {verdict}\n"
