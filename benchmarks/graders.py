r"""rewards.py beside two public graders, math-verify and mathruler, on tests/grading_cases.py.

    pip install math-verify==0.9.0 mathruler==0.1.0 pylatexenc tqdm
    python -m benchmarks.graders      # prints the table, writes graders.json; minutes on one core
    python -m benchmarks.tables       # then writes docs/grading.md anew

Each grader gets a gold and a prediction as its users give them: math-verify both in \boxed{}, with
its own extraction and time limits; mathruler (`grade_answer`) the bare strings. The public graders
run in a process of their own. It is ended after 10 s on one case, which counts as hung. A process
that ends itself has crashed. Both count as wrong. The public graders know no choices list and no
precision, so these two tables are counted apart. Only rewards.py gets the hostile completions:
math-verify with its own alarms did not finish them in 6 minutes.
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
    """A child process: a verdict for each pair that comes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # math-verify logs its timeouts with all the text
    compare("1", "1")  # imports
    pipe.send(None)
    while True:
        pipe.send(bool(compare(*pipe.recv())))


def start_child(compare) -> tuple:
    context = multiprocessing.get_context("spawn")
    pipe, its_pipe = context.Pipe()
    child = context.Process(target=serve, args=(compare, its_pipe), daemon=True)
    child.start()
    its_pipe.close()
    pipe.recv()
    return child, pipe


def judge(compare, pairs: list[tuple[str, str]]) -> list[tuple[bool | str, float]]:
    """Verdicts ("hung" or "crashed" where there is none) and seconds of a public grader."""
    child, verdicts = None, []
    for pair in pairs:
        if child is None:
            child, pipe = start_child(compare)
        start = time.monotonic()
        try:
            pipe.send(pair)
            verdict = pipe.recv() if pipe.poll(LIMIT) else "hung"
        except (EOFError, BrokenPipeError):
            verdict = "crashed"
        verdicts.append((verdict, time.monotonic() - start))
        if not isinstance(verdict, bool):
            child.kill()
            child.join()
            child = None
    return verdicts


def cases() -> list[tuple]:
    """(kind, gold, prediction, choices, precision, verdict of the table) of every case."""
    rows = []
    for kind, table in GRADES.items():
        rows += [(kind, gold, None, None, *answers) for gold, *answers in table]
    for gold, choices, *answers in CHOICES:
        rows.append(("with a choices list", gold, choices, None, *answers))
    for gold, precision, *answers in PRECISION:
        rows.append(("with a precision", gold, None, precision, *answers))
    found = []
    for kind, gold, choices, precision, right, wrong in rows:
        found += [(kind, gold, prediction, choices, precision, True) for prediction in right]
        found += [(kind, gold, prediction, choices, precision, False) for prediction in wrong]
    return found


def timed(function, *arguments) -> tuple[bool, float]:
    """(verdict, seconds). A gold that is too long is an error in the data: no reward."""
    start = time.monotonic()
    try:
        verdict = function(*arguments)
    except ValueError:
        verdict = False
    return verdict, time.monotonic() - start


def ours(table: list[tuple]) -> list[tuple[bool, float]]:
    rewards.grade(r"2\sqrt{3}", r"\sqrt{12}")  # the worker has started
    verdicts = []
    for _, gold, prediction, choices, precision, _ in table:
        verdicts.append(timed(rewards.grade, prediction, gold, choices, precision))
    return verdicts


def hostile() -> dict:
    """rewards.py on the hostile completions, none of which may be rewarded."""
    verdicts = []
    for completion, gold in HOSTILE.values():
        verdicts.append(timed(rewards.grade, rewards.extract_answer(completion), gold))
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


# Why a public grader and ours disagree; the first row that fits: name, kinds of case ("": any),
# pattern of the prediction (None: any), our verdict (None: either).
_ALGEBRA = "latex roots, latex powers, latex trig and logs, latex pi and e, latex polynomial"
_ALGEBRA += ", latex other"
REASONS = [
    ("decimals for an exact value", "", r"-?[0-9]*\.[0-9]{5,}", False),
    ("characters instead of commands", "", r".*[−×÷·√π∞≤≥≠½²³⁰-⁻₀-₉∪∠△θαβ∈∅].*", True),
    ("programmers' spelling", "",
     r".*([0-9][eE][-+]?[0-9]|[^*]\*[^*]|(?<!\\)\b(pi|sqrt|exp|sin|cos|ln|arctan)\b).*", True),
    ("final dot", "number, separators, decimal, fraction, wrappers", r".*\.", True),
    ("decoration", "wrappers", None, True),
    ("not the number that is shown", "wrappers", None, False),
    ("another unit", "percent, currency, degree, unit, angle names",
     r".*[0-9})] ?(?:[a-z\\^$€£%].*)", False),
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
    rows_of = {"all": [i for i, case in enumerate(table) if case[0] in GRADES]}
    for i, case in enumerate(table):
        rows_of.setdefault(case[0], []).append(i)
    kinds, reasons, disagreements = {}, {}, []
    for kind, rows in rows_of.items():
        expected = [table[i][-1] for i in rows]
        figures = {name: count(expected, [verdicts[name][i] for i in rows]) for name in NAMES}
        kinds[kind] = {"n": len(rows), "wrong": expected.count(False), "graders": figures}
    for i, (kind, gold, prediction, _, _, expected) in enumerate(table):
        we, *public = (verdicts[name][i][0] for name in NAMES)
        if we != expected or expected not in public:
            disagreements.append([kind, gold, prediction, expected, we, *public])
        if kind in GRADES and set(public) != {we}:
            empty = {"example": [gold, prediction], "accepts": [0, 0], "refuses": [0, 0]}
            row = reasons.setdefault(reason(kind, prediction, we), empty)
            for j, theirs in enumerate(public):
                row["refuses" if we else "accepts"][j] += theirs is not we
    return {
        "versions": {name: importlib.metadata.version(name) for name in NAMES[1:]},
        "limit": LIMIT,
        "kinds": kinds,
        "reasons": reasons,
        "hostile": of_hostile,
        "disagreements": disagreements,
    }


def show(result: dict) -> None:
    print(f"{'kind':24}{'n':>5}" + "".join(f"{name:>13} +   -    s" for name in NAMES))
    for kind, row in {**result["kinds"], "hostile": result["hostile"]}.items():
        cells = [f"{kind:24}{row['n']:5}"]
        for figures in row["graders"].values():
            errors = f"{figures['false positives']:4}{figures['false negatives']:4}"
            cells.append(f"{figures['right'] / row['n']:13.1%}{errors}{figures['slowest']:5.1f}")
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
