"""Short runs of train_saei.py on tiny models of any family.

torchrun --nproc_per_node 2 -m tests.short_run --model ...   # as train_saei.py, another reward
"""

import json
import sys
from pathlib import Path
from unittest import mock

from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

import rewards
import train_saei


def write_rows(folder: Path, rows: list[tuple[str, list[Image.Image]]]) -> str:
    """Problems and their pictures as a data set.   -> its file"""
    lines = []
    for i, (problem, pictures) in enumerate(rows):
        names = []
        for k, image in enumerate(pictures):
            names.append(f"{i}-{k}.png")
            image.save(folder / names[-1])
        lines.append(json.dumps({"images": names, "problem": problem, "answer": str(i)}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return str(folder / "rows.jsonl")


def arguments(model: str, rows: str, out: Path, **changes) -> list[str]:
    options = dict(
        model=model,
        dataset=rows,
        split="train",
        output=out,
        steps=1,
        save_every=1,
        prompts_per_step=3,
        rollouts=4,
        adversarial_rollouts=2,
        max_new_tokens=5,
        micro_prompts=3,
        pgd_steps=2,
        lr=1e-3,
        eps=1 / 255,
        condition="sampled",
    )
    words = []
    for name, value in (options | changes).items():
        words += [f"--{name}", str(value)]
    return words


def by_length(completions: list[str], **columns) -> list[float]:
    """Random policies earn nothing. This reward depends on the text alone."""
    return [len(text) % 7 / 7 for text in completions]


def main(argv: list[str]) -> None:
    with mock.patch.object(rewards, "format_reward", by_length):
        train_saei.main(train_saei.load_config(argv))


def train(model: str, rows: str, out: Path, **changes) -> tuple[list[dict], dict[str, Tensor]]:
    """-> metrics of each step but for seconds and memory; the last checkpoint's parameters"""
    main(arguments(model, rows, out, **changes))
    metrics = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        numbers = json.loads(line)
        metrics.append(
            {k: x for k, x in numbers.items() if not k.startswith(("seconds", "memory"))}
        )
    return metrics, last_weights(out)


def last_weights(out: Path) -> dict[str, Tensor]:
    last = max((out / "checkpoints").glob("step-*"))
    return AutoModelForImageTextToText.from_pretrained(last).state_dict()


if __name__ == "__main__":
    main(sys.argv[1:])
