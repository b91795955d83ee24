r"""rewards.py beside two public graders, math-verify and mathruler, on the tables of tests/grading_cases.py.

    pip install math-verify==0.9.0 mathruler==0.1.0 pylatexenc tqdm
    python -m benchmarks.graders          # prints the table, writes benchmarks/graders.json; minutes on one core
    python -m benchmarks.tables           # then writes docs/grading.md anew

Each grader gets a gold and a prediction as its users give them: math-verify both in \boxed{}, with its own extraction
and time limits; mathruler (`grade_answer`) the bare strings. The public ones run in a process of their own, which is
ended and counted as hung after 10 s on one case, and as crashed when it ends itself: such a case counts as wrong. They
know no choices list and no precision: those two tables are counted apart. The hostile completions are for ours alone:
with math-verify's own alarms they did not end in 6 minutes.
"""

import importlib.metadata
import json
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from grading_cases import CHOICES, GRADES, PRECISION  # noqa: E402
from hostile_cases import HOSTILE  # noqa: E402

import rewards  # noqa: E402

LIMIT = 10.0  # seconds for one case
NAMES = ["rewards.py", "math-verify", "mathruler"]


def math_verify_boxed(gold: str, prediction: str) -> bool:
    from math_verify import parse, verify

    return verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{prediction}}}"))


def mathruler_bare(gold: str, prediction: str) -> bool:
    from mathruler.grader import grade_answer

    return grade_answer(prediction, gold)


def serve(compare, pipe) -> None:
    """A child: a verdict for each pair that comes."""
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 2
    )  # math-verify logs each of its own timeouts, with the whole text
    compare("1", "1")  # imports
    pipe.send(None)
    while True:
        pipe.send(bool(compare(*pipe.recv())))


def judge(compare, pairs: list[tuple[str, str]]) -> list[tuple[bool | str, float]]:
    """Verdicts ("hung" or "crashed" where there is none) and seconds of a public grader, in a child."""
    context, child, out = multiprocessing.get_context("spawn"), None, []
    for pair in pairs:
        if child is None:
            pipe, theirs = context.Pipe()
            child = context.Process(target=serve, args=(compare, theirs), daemon=True)
            child.start()
            theirs.close()
            pipe.recv()
        start = time.monotonic()
        try:
            pipe.send(pair)
            verdict = pipe.recv() if pipe.poll(LIMIT) else "hung"
        except (EOFError, BrokenPipeError):
            verdict = "crashed"
        out.append((verdict, time.monotonic() - start))
        if not isinstance(verdict, bool):
            child.kill()
            child.join()
            child = None
    return out


def cases() -> list[tuple]:
    """(kind, gold, prediction, choices, precision, verdict of the table) of every case."""
    rows = [
        (kind, gold, None, None, *answers)
        for kind, table in GRADES.items()
        for gold, *answers in table
    ]
    rows += [
        ("with a choices list", gold, choices, None, *answers)
        for gold, choices, *answers in CHOICES
    ]
    rows += [
        ("with a precision", gold, None, precision, *answers)
        for gold, precision, *answers in PRECISION
    ]
    return [
        (kind, gold, prediction, choices, precision, verdict)
        for kind, gold, choices, precision, right, wrong in rows
        for verdict, predictions in ((True, right), (False, wrong))
        for prediction in predictions
    ]


def ours(table: list[tuple]) -> list[tuple[bool, float]]:
    rewards.grade(r"2\sqrt{3}", r"\sqrt{12}")  # the worker has started
    out = []
    for _, gold, prediction, choices, precision, _ in table:
        start = time.monotonic()
        out.append((rewards.grade(prediction, gold, choices, precision), time.monotonic() - start))
    return out


def hostile() -> dict:
    """Ours on the hostile completions, none of which may be rewarded. (math-verify alone would need many minutes.)"""
    verdicts = []
    for completion, gold in HOSTILE.values():
        start = time.monotonic()
        try:
            verdict = rewards.grade(rewards.extract_answer(completion), gold)
        except (
            ValueError
        ):  # a gold longer than any answer may be is an error in the data, whatever the prediction
            verdict = False
        verdicts.append((verdict, time.monotonic() - start))
    return {"n": len(HOSTILE), "graders": {"rewards.py": count([False] * len(HOSTILE), verdicts)}}


def count(table: list[bool], verdicts: list[tuple[bool | str, float]]) -> dict:
    """Figures of one grader on some cases."""
    pairs = [(expected, verdict) for expected, (verdict, _) in zip(table, verdicts, strict=True)]
    return {
        "right": sum(expected is verdict for expected, verdict in pairs),
        "false positives": pairs.count((False, True)),
        "false negatives": pairs.count((True, False)),
        "hung": sum(verdict == "hung" for _, verdict in pairs),
        "crashed": sum(verdict == "crashed" for _, verdict in pairs),
        "slowest": round(max(seconds for _, seconds in verdicts), 2),
        "over 1 s": sum(seconds > 1 for _, seconds in verdicts),
    }


# Why a public grader and ours disagree, the first that fits: name, kinds of case ("": any), pattern of the prediction
# (None: any), and our verdict (None: either).
_ALGEBRA = (
    "latex roots, latex powers, latex trig and logs, latex pi and e, latex polynomial, latex other"
)
REASONS = [
    ("decimals for an exact value", "", r"-?[0-9]*\.[0-9]{5,}", False),
    ("characters instead of commands", "", r".*[−×÷·√π∞≤≥≠½²³⁰-⁻₀-₉∪∠△θαβ∈∅].*", True),
    ("programmers' spelling", "",
     r".*([0-9][eE][-+]?[0-9]|[^*]\*[^*]|(?<!\\)\b(pi|sqrt|exp|sin|cos|ln|arctan)\b).*", True),
    ("final dot", "number, separators, decimal, fraction, wrappers", r".*\.", True),
    ("decoration", "wrappers", None, True),
    ("not the number that is shown", "wrappers", None, False),
    ("another unit", "percent, currency, degree, unit, angle names", r".*[0-9})] ?(?:[a-z\\^$€£%].*)", False),
    ("the same unit, or none", "percent, currency, degree, unit", None, True),
    ("digits and commas", "number, separators, currency", None, None),
    ("unreduced and mixed numbers", "number, decimal, fraction, mixed number, percent", None, None),
    ("powers of ten", "scientific", None, None),
    ("ratios", "ratio", None, None),
    ("product of letters", "latex other", r"yx|x ?y|x ?(?:\*|\\cdot|\\times) ?y", False),
    ("grouping lost", _ALGEBRA + ", fraction", None, False),
    ("algebra not tried or not read", _ALGEBRA, None, True),
    ("names and equations", "equation", None, None),
    ("inequality and interval", "inequality, interval", None, None),
    ("brackets and order", "tuple, list, set", None, False),
    ("the same collection", "tuple, list, set, matrix", None, True),
    ("words taken for letters", "text, yes/no", None, False),
    ("look of a text", "text, yes/no", None, True),
    ("words around the letter", "choice", None, None),
    ("base and chemical subscripts", "base notation", None, None),
    ("names in geometry", "angle names", None, None),
    ("dates and times", "clock, date", None, None),
    ("signs of logic", "logic", None, None),
]  # fmt: skip


def reason(kind: str, prediction: str, verdict: bool) -> str:
    for name, kinds, pattern, wanted in REASONS:
        if wanted in (None, verdict) and (not kinds or kind in kinds.split(", ")):
            if pattern is None or re.fullmatch(pattern, prediction, re.DOTALL):
                return name
    return "the rest"


def report(table: list[tuple], verdicts: dict[str, list], of_hostile: dict) -> dict:
    """What goes into the json."""
    versions = {name: importlib.metadata.version(name) for name in NAMES[1:]}
    out = {
        "versions": versions,
        "limit": LIMIT,
        "kinds": {},
        "reasons": {},
        "hostile": of_hostile,
        "disagreements": [],
    }
    plain = [i for i, case in enumerate(table) if case[0] in GRADES]
    groups = {
        kind: [i for i, case in enumerate(table) if case[0] == kind]
        for kind in dict.fromkeys(c[0] for c in table)
    }
    for kind, rows in ({"all": plain} | groups).items():
        expected = [table[i][-1] for i in rows]
        figures = {name: count(expected, [verdicts[name][i] for i in rows]) for name in NAMES}
        out["kinds"][kind] = {"n": len(rows), "wrong": expected.count(False), "graders": figures}
    for i, (kind, gold, prediction, _, _, expected) in enumerate(table):
        we, *public = (verdicts[name][i][0] for name in NAMES)
        if we != expected or expected not in public:
            out["disagreements"].append([kind, gold, prediction, expected, we, *public])
        if kind in GRADES and set(public) != {we}:
            empty = {"example": [gold, prediction], "accepts": [0, 0], "refuses": [0, 0]}
            row = out["reasons"].setdefault(reason(kind, prediction, we), empty)
            for j, theirs in enumerate(public):
                row["refuses" if we else "accepts"][j] += theirs is not we
    return out


def show(result: dict) -> None:
    print(f"{'kind':24}{'n':>5}" + "".join(f"{name:>13} +   -    s" for name in NAMES))
    for kind, row in {**result["kinds"], "hostile": result["hostile"]}.items():
        cells = [f"{kind:24}{row['n']:5}"]
        for name in NAMES:
            if x := row["graders"].get(name):
                cells.append(
                    f"{x['right'] / row['n']:13.1%}{x['false positives']:4}{x['false negatives']:4}{x['slowest']:5.1f}"
                )
        print(" ".join(cells))


def main() -> None:
    start, table = time.monotonic(), cases()
    pairs = [(gold, prediction) for _, gold, prediction, *_ in table]
    verdicts = {
        "rewards.py": ours(table),
        "math-verify": judge(math_verify_boxed, pairs),
        "mathruler": judge(mathruler_bare, pairs),
    }
    result = report(table, verdicts, hostile())
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in result.pop("disagreements"))
    text = json.dumps(result, indent=1, ensure_ascii=False)[:-2]
    (ROOT / "benchmarks/graders.json").write_text(
        f'{text},\n "disagreements": [\n{lines}\n ]\n}}\n'
    )
    show(result)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
