r"""How rewards.py reads and compares answers, from the command line.

python -m extras.grade "so \boxed{\frac{1}{2}}" 0.5    what is extracted, how it is compared
python -m extras.grade --file predictions.jsonl        grade the answers of a file again
"""

import json
import sys

from rewards import (
    MAX_CHARS,
    Comparison,
    NeedsAlgebra,
    Parsed,
    accuracy_reward,
    extract_answer,
    gold_answer,
    grade,
    parse,
)


def explain(completion: str, gold: str) -> str:
    """What is extracted, how both answers are read, how they are compared, the verdict."""
    found, wanted = extract_answer(completion, prose=True), gold_answer(gold)
    how, verdict, note = "by rule", False, ""
    if found is not None and extract_answer(completion) is None:
        note = " (from prose: a reward reads it only with prose=True)"
    if found is not None and len(found) <= MAX_CHARS:
        try:
            verdict = Comparison().right(found, wanted, ())
        except NeedsAlgebra:
            how, verdict = "by algebra (math-verify)", grade(found, gold)
    return "\n".join(
        [
            f"extracted  {found!r}{note}",
            f"read as    {describe(parse(found)) if found else None}",
            f"gold       {describe(parse(wanted))}",
            f"{how}: {'right' if verdict else 'wrong'}",
        ]
    )


def describe(parsed: Parsed | None) -> str:
    """The kind of an answer, its value and its unit, brackets or name: "number 5 (cm)"."""
    if parsed is None:
        return "None"
    value = parsed.value if parsed.kind in ("number", "text", "choice") else parsed.raw
    return f"{parsed.kind} {value}" + (f" ({parsed.note})" if parsed.note else "")


def regrade(path: str) -> str:
    """The verdicts of a .jsonl file that change, and the share that is right.

    The lines are those of eval.py (answer, responses, right), or have an answer and a completion or
    prediction; choices and precision are used where they are given.
    """
    n, right, changed = 0, 0.0, []
    with open(path) as file:
        for number, line in enumerate(file, 1):
            record = json.loads(line)
            one = [record[name] for name in ("completion", "prediction") if name in record]
            texts = record.get("responses") or one
            if not texts or "answer" not in record:
                needed = "needs answer and one of responses, completion, prediction"
                raise ValueError(f"{path}, line {number}: {needed}")
            columns = ("answer", "choices", "precision")
            scores = accuracy_reward(
                texts, **{name: [record.get(name)] * len(texts) for name in columns}
            )
            for text, score, old in zip(texts, scores, record.get("right", scores), strict=True):
                if score != old:
                    changed.append(f"line {number}: {text!r:.80} was {old}, is {score}")
            n, right = n + len(texts), right + sum(scores)
    total = f"{n} answers, {right / max(1, n):.4f} right, {len(changed)} verdicts changed"
    return "\n".join([*changed, total])


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        sys.exit('usage: python -m extras.grade "completion" "gold" | --file predictions.jsonl')
    try:
        print(regrade(arguments[1]) if arguments[0] == "--file" else explain(*arguments))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"extras.grade: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
