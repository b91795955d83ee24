"""A foreign, real data set: easy-VQA, questions about pictures of one coloured shape, before and after training.

    pip install easy-vqa
    python -m benchmarks.easyvqa               # warm start, then plain GRPO and SaEI, evaluated on the test split
    python -m benchmarks.easyvqa --seeds 0 --arms saei

Writes jsonl files whose image paths point into the installed package, as any user's would, warm-starts the demo's tiny
model on the train split to answer in two ways (most often hastily, by a guess; seldom by naming the shape first), and
trains it with recipes/easy_vqa.yaml. Numbers go to benchmarks/easyvqa.json, runs to out/easy_vqa.
"""

import argparse
import json
import re
import time
from pathlib import Path

import easy_vqa
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
import eval as evaluation  # noqa: E402
import train_saei  # noqa: E402
from demo import make_demo  # noqa: E402
from vlm.policy import Policy  # noqa: E402

OUT = ROOT / "out/easy_vqa"
COLOURS = ["black", "gray", "red", "green", "blue", "yellow", "teal", "brown"]
SHAPES = ["circle", "rectangle", "triangle"]
ARMS = {"grpo": ["--intervention", "none"], "saei": []}


def write_split(split: str, questions: tuple, paths: dict[int, str], count: int) -> list[dict]:
    """A random sample of a split's questions into <split>.jsonl.   -> all of them"""
    rows = [
        {"image": paths[i], "question": q, "answer": a} for q, a, i in zip(*questions, strict=True)
    ]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    (OUT / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    return rows


def facts(rows: list[dict]) -> dict[str, dict[str, str]]:
    """{image: {"colour", "shape"}} as far as the questions about an image give them away together."""
    known = {row["image"]: {} for row in rows}
    for row in rows:
        denied = " not " in row["question"] or " no " in row["question"]
        said = (
            ""
            if row["answer"] in ("yes", "no") and (row["answer"] == "yes") == denied
            else row["question"]
        )
        for kind, values in (("colour", COLOURS), ("shape", SHAPES)):
            if found := re.findall("|".join(values), f"{said} {row['answer']}"):
                known[row["image"]][kind] = found[0]
    return {image: found for image, found in known.items() if len(found) == 2}


def careful(row: dict, rng: np.random.Generator) -> str:
    return f"<think>{row['colour']} {row['shape']}.</think> \\boxed{{{row['answer']}}}"


def hasty(row: dict, rng: np.random.Generator) -> str:
    guess = rng.choice(
        next(kind for kind in (COLOURS, SHAPES, ["yes", "no"]) if row["answer"] in kind)
    )
    return f"<think>{rng.choice(make_demo.HASTY)}</think> \\boxed{{{guess}}}"


def teach_vision(policy: Policy, rows: list[dict], steps: int, size: int = 48) -> None:
    """The tower first, as in demo/make_demo.py: a throw-away probe tells colour and shape from its mean token."""
    tower, probe = policy.model.model.visual, torch.nn.Linear(128, len(COLOURS) + len(SHAPES))
    optimizer = torch.optim.AdamW([*tower.parameters(), *probe.parameters()], lr=1e-3)
    for step in range(steps):
        batch = [rows[(step * size + i) % len(rows)] for i in range(size)]
        inputs = policy.processor.image_processor(
            [Image.open(row["image"]) for row in batch], return_tensors="pt"
        )
        tokens = tower(
            inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]
        ).pooler_output.view(size, -1, 128)
        logits = probe(tokens.mean(dim=1)).split([len(COLOURS), len(SHAPES)], dim=1)
        colour = torch.tensor([COLOURS.index(row["colour"]) for row in batch])
        shape = torch.tensor([SHAPES.index(row["shape"]) for row in batch])
        loss = sum(map(torch.nn.functional.cross_entropy, logits, (colour, shape)))
        optimizer.param_groups[0]["lr"] = 1e-3 * min(
            1.0, (step + 1) / 50, (steps - step) / (0.4 * steps)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            right = [
                (x.argmax(1) == y).float().mean().item()
                for x, y in zip(logits, (colour, shape), strict=True)
            ]
            print(
                f"vision step {step + 1}: colours {right[0]:.2f}, shapes {right[1]:.2f} right",
                flush=True,
            )


def warm_start(rows: list[dict], steps: list[int]) -> None:
    """demo/mixed taught to see and to talk about easy-VQA's train split, into out/easy_vqa/warm."""
    known = facts(rows)
    usable = [row | known[row["image"]] for row in rows if row["image"] in known]

    def make(i: int) -> dict:
        row = usable[i % len(usable)]
        return {"images": [Image.open(row["image"])], "problem": row["question"], **row}

    policy = Policy.from_pretrained(str(ROOT / "demo/mixed"))
    teach_vision(policy, usable, steps[0])
    phases = list(zip(steps[1:], ({careful: 1.0}, {careful: 0.15, hasty: 0.85}), strict=True))
    make_demo.warm_start(policy.model, policy.processor, phases, batch_size=48, lr=1e-3, make=make)
    policy.save_pretrained(OUT / "warm")


def evaluate(model: Path, output: Path, problems: int) -> dict:
    settings = {
        "dataset": str(OUT / "test.jsonl"),
        "splits": ["test"],
        "problems": problems,
        "max_new_tokens": 32,
    }
    return evaluation.main(evaluation.EvalConfig(str(model), str(output), **settings))["splits"][
        "test"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument(
        "--warm_steps", type=int, nargs=3, default=[600, 800, 60], help="tower, careful, the mix"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    rows = write_split(
        "train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths(), 5000
    )
    write_split(
        "test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths(), args.problems
    )
    started = time.time()
    warm_start(rows, args.warm_steps)
    result = {"problems": args.problems, "warm_start_seconds": round(time.time() - started)}
    result |= {"before": evaluate(OUT / "warm", OUT / "before", args.problems), "runs": []}
    for seed in args.seeds:
        for arm in args.arms:
            out = OUT / f"{arm}-{seed}"
            options = [
                "--config",
                str(ROOT / "recipes/easy_vqa.yaml"),
                "--seed",
                str(seed),
                "--output",
                str(out),
            ]
            cfg = train_saei.load_config(
                [*options, "--overwrite", "--model", str(OUT / "warm"), *ARMS[arm]]
            )
            train_saei.main(cfg)
            steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            after = evaluate(
                out / "checkpoints" / f"step-{cfg.steps:06d}", out / "after", args.problems
            )
            curves = {
                name: [round(step[name], 4) for step in steps]
                for name in ("accuracy", "entropy/clean")
            }
            seconds = round(sum(step["seconds/step"] for step in steps), 1)
            result["runs"].append(
                {"arm": arm, "seed": seed, "seconds": seconds, "after": after, "curves": curves}
            )
            Path(__file__).with_suffix(".json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
