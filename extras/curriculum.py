"""The order in which SENT would show the data: from low to high semantic entropy of the answers to a prompt.

    python eval.py --splits shifted/train --problems 2000 --output out/train        # samples answers to the train split
    python extras/curriculum.py out/train.jsonl out/order.json
    accelerate launch train_saei.py --config recipes/demo.yaml --order out/order.json

Answers of a problem are clustered by the reward's grader; the entropy of the clusters' shares is
the problem's. SENT trains in stages on ever more uncertain problems (two in its public code);
--shuffle_stages mixes each stage.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import rewards
from extras.entropy_controls import curriculum, semantic_entropy


def same(a: str, b: str) -> bool:
    """Whether two answers are equal, as the reward would judge; what it cannot read is equal only to itself."""
    try:
        return a == b or rewards.grade(a, b)
    except ValueError:
        return False


def main(argv: list[str] | None = None) -> list[float]:
    """Write the order and return the entropies in the order of the file's rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "records", type=Path, help="what eval.py wrote beside its summary: <output>.jsonl"
    )
    parser.add_argument("order", type=Path, help="the row numbers, for train_saei.py --order")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument(
        "--shuffle_stages", action="store_true", help="each stage in a random order (of seed 0)"
    )
    args = parser.parse_args(argv)
    records = [json.loads(line) for line in args.records.read_text().splitlines()]
    if len({record["split"] for record in records}) != 1:
        parser.error(f"{args.records} must be of one split, which is the one to train on")
    answers = [[rewards.extract_answer(text) for text in record["responses"]] for record in records]
    entropies = [semantic_entropy(group, same) for group in answers]
    stages, rng = curriculum(entropies, args.stages), random.Random(0)
    for number, stage in enumerate(stages, 1):
        print(
            f"stage {number}: {len(stage)} rows, {entropies[stage[0]]:.2f} to {entropies[stage[-1]]:.2f} nats"
        )
        if args.shuffle_stages:
            rng.shuffle(stage)
    args.order.write_text(json.dumps([records[i]["row"] for stage in stages for i in stage]) + "\n")
    return entropies


if __name__ == "__main__":
    main()
