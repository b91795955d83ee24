"""SENT's order of the data: from low to high semantic entropy of the answers to a problem.

    python eval.py --splits shifted/train --problems 2000 --output out/train
    python -m extras.curriculum out/train.jsonl out/order.json
    accelerate launch train_saei.py --config recipes/demo.yaml --order out/order.json

eval.py samples answers to the rows to train on. The reward's grader clusters the answers of a
problem. The entropy of the clusters' shares is the problem's semantic entropy.

Where the rules come from
    known  SENT (arXiv 2512.04359) trains in stages on ever more uncertain problems. Its public code
           has two stages
    ours   shares by count (alternative: by the responses' probability)
"""

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import rewards


def semantic_entropy(
    answers: list[str | None], same: Callable[[str, str], bool] = str.__eq__
) -> float:
    """-sum_c p_c log p_c over clusters of equal answers, p_c a cluster's share.   nats

    same(a, b): whether two answers are equal. An answer joins the first cluster whose first member
    it equals. Responses without an answer (None) are one cluster. Raises ValueError without
    answers.
    """
    if not answers:
        raise ValueError("no answers to cluster")
    firsts, sizes = [], []  # of each cluster
    for answer in answers:
        for i, first in enumerate(firsts):
            absent = answer is None or first is None
            if answer is first if absent else same(answer, first):
                sizes[i] += 1
                break
        else:
            firsts.append(answer)
            sizes.append(1)
    entropy = 0.0
    for size in sizes:
        share = size / len(answers)
        entropy -= share * math.log(share)
    return entropy


def curriculum(entropies: list[float], stages: int = 2) -> list[list[int]]:
    """The row numbers from low to high entropy, in stages of equal size.

    The first stages get the remainder. Rows of equal entropy keep their order. Raises ValueError
    unless 1 <= stages <= number of rows.
    """
    if not 1 <= stages <= len(entropies):
        raise ValueError(
            f"stages must be from 1 to the number of rows ({len(entropies)}), got {stages}"
        )
    order = sorted(range(len(entropies)), key=entropies.__getitem__)
    size, remainder = divmod(len(order), stages)
    found, start = [], 0
    for i in range(stages):
        end = start + size + (i < remainder)
        found.append(order[start:end])
        start = end
    return found


def same(a: str, b: str) -> bool:
    """Whether the reward judges two answers equal. One that it cannot read equals only itself."""
    try:
        return a == b or rewards.grade(a, b)
    except ValueError:
        return False


def main(argv: list[str] | None = None) -> list[float]:
    """Write the order. Returns the entropies in the order of the file's rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("records", type=Path, help="what eval.py wrote: OUTPUT.jsonl")
    parser.add_argument("order", type=Path, help="row numbers, for train_saei.py --order")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--shuffle_stages", action="store_true", help="shuffle each stage (seed 0)")
    args = parser.parse_args(argv)
    records = [json.loads(line) for line in args.records.read_text().splitlines()]
    if len({record["split"] for record in records}) != 1:
        parser.error(f"{args.records} must be of one split, which is the one to train on")
    entropies = []
    for record in records:
        answers = [rewards.extract_answer(text) for text in record["responses"]]
        entropies.append(semantic_entropy(answers, same))
    order, rng = [], random.Random(0)
    for number, stage in enumerate(curriculum(entropies, args.stages), 1):
        low, high = entropies[stage[0]], entropies[stage[-1]]
        print(f"stage {number}: {len(stage)} rows, {low:.2f} to {high:.2f} nats")
        if args.shuffle_stages:
            rng.shuffle(stage)
        order += [records[i]["row"] for i in stage]
    args.order.write_text(json.dumps(order) + "\n")
    return entropies


if __name__ == "__main__":
    main()
