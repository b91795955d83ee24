"""A foreign, real data set: easy-VQA, questions about pictures of one coloured shape.

    pip install easy-vqa
    python -m benchmarks.easyvqa               # warm start, then plain GRPO and SaEI, evaluated
    python -m benchmarks.easyvqa --seeds 0 --arms saei

1. Writes jsonl files whose image paths point into the installed package.
2. Warm-starts the demo's tiny model on the train split, to answer in two ways: mostly hasty (a
   guess), seldom careful (naming the shape and its colour first).
3. Trains it with recipes/easy_vqa.yaml and evaluates it on the test split.
Numbers go to benchmarks/easyvqa.json, runs to out/easy_vqa.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import easy_vqa
import numpy as np
import torch
from PIL import Image

from demo import make_demo
from vlm.policy import Policy

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out/easy_vqa"
COLOURS = ["black", "gray", "red", "green", "blue", "yellow", "teal", "brown"]
SHAPES = ["circle", "rectangle", "triangle"]
ARMS = {"grpo": ["--intervention", "none"], "saei": []}


def write_split(split: str, questions: tuple, paths: dict[int, str], count: int) -> list[dict]:
    """A random sample of a split's questions into <split>.jsonl.   -> all of them"""
    rows = []
    for question, answer, image in zip(*questions, strict=True):
        rows.append({"image": paths[image], "question": question, "answer": answer})
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    lines = [json.dumps(row) + "\n" for row in rows[:count]]
    (OUT / f"{split}.jsonl").write_text("".join(lines))
    return rows


def facts(rows: list[dict]) -> dict[str, dict[str, str]]:
    """{image: {"colour", "shape"}} of the images whose questions together give both away."""
    known = {row["image"]: {} for row in rows}
    for row in rows:
        negated = " not " in row["question"] or " no " in row["question"]
        said = row["question"]
        if row["answer"] in ("yes", "no") and (row["answer"] == "yes") == negated:
            said = ""  # what the question names is not in the picture
        for kind, values in (("colour", COLOURS), ("shape", SHAPES)):
            found = re.findall("|".join(values), f"{said} {row['answer']}")
            if found:
                known[row["image"]][kind] = found[0]
    return {image: found for image, found in known.items() if len(found) == 2}


def careful(row: dict, rng: np.random.Generator) -> str:
    return f"<think>{row['colour']} {row['shape']}.</think> \\boxed{{{row['answer']}}}"


def hasty(row: dict, rng: np.random.Generator) -> str:
    kind = next(kind for kind in (COLOURS, SHAPES, ["yes", "no"]) if row["answer"] in kind)
    guess = rng.choice(kind)
    return f"<think>{rng.choice(make_demo.HASTY)}</think> \\boxed{{{guess}}}"


def teach_vision(policy: Policy, rows: list[dict], steps: int, size: int = 48) -> None:
    """Train the vision tower, as in demo/make_demo.py.

    A throw-away linear probe reads colour and shape from the mean image token.
    """
    tower = policy.model.model.visual
    sizes = [len(COLOURS), len(SHAPES)]
    probe = torch.nn.Linear(128, sum(sizes))
    optimizer = torch.optim.AdamW([*tower.parameters(), *probe.parameters()], lr=1e-3)
    for step in range(steps):
        batch = [rows[(step * size + i) % len(rows)] for i in range(size)]
        images = [Image.open(row["image"]) for row in batch]
        inputs = policy.processor.image_processor(images, return_tensors="pt")
        output = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        tokens = output.pooler_output.view(size, -1, 128)
        logits = probe(tokens.mean(dim=1)).split(sizes, dim=1)
        colour = torch.tensor([COLOURS.index(row["colour"]) for row in batch])
        shape = torch.tensor([SHAPES.index(row["shape"]) for row in batch])
        loss = torch.nn.functional.cross_entropy(logits[0], colour)
        loss = loss + torch.nn.functional.cross_entropy(logits[1], shape)
        schedule = min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))
        optimizer.param_groups[0]["lr"] = 1e-3 * schedule
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            colours = (logits[0].argmax(1) == colour).float().mean()
            shapes = (logits[1].argmax(1) == shape).float().mean()
            print(f"vision step {step + 1}: colours {colours:.2f}, shapes {shapes:.2f} right")


def warm_start(rows: list[dict], steps: list[int]) -> None:
    """demo/mixed, taught to see and to answer easy-VQA's train split, into out/easy_vqa/warm."""
    known = facts(rows)
    usable = [row | known[row["image"]] for row in rows if row["image"] in known]

    def make(i: int) -> dict:
        row = usable[i % len(usable)]
        return {"images": [Image.open(row["image"])], "problem": row["question"], **row}

    policy = Policy.from_pretrained(str(ROOT / "demo/mixed"))
    teach_vision(policy, usable, steps[0])
    phases = [(steps[1], {careful: 1.0}), (steps[2], {careful: 0.15, hasty: 0.85})]
    make_demo.warm_start(policy.model, policy.processor, phases, batch_size=48, lr=1e-3, make=make)
    policy.save_pretrained(OUT / "warm")


def run(script: str, *options: object) -> None:
    subprocess.run([sys.executable, script, *map(str, options)], cwd=ROOT, check=True)


def evaluate(model: Path, output: Path, problems: int) -> dict:
    """eval.py on the test split.   -> its numbers"""
    options = ["--model", model, "--output", output, "--dataset", OUT / "test.jsonl"]
    options += ["--splits", "test", "--problems", problems, "--max_new_tokens", 32, "--overwrite"]
    run("eval.py", *options)
    return json.loads(output.with_suffix(".json").read_text())["splits"]["test"]


def train(arm: str, seed: int, problems: int) -> dict:
    """A run and its evaluation."""
    out = OUT / f"{arm}-{seed}"
    options = ["--config", "recipes/easy_vqa.yaml", "--model", OUT / "warm", "--seed", seed]
    run("train_saei.py", *options, "--output", out, "--overwrite", "true", *ARMS[arm])
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curves = {}
    for name in ("accuracy", "entropy/clean"):
        curves[name] = [round(step[name], 4) for step in steps]
    seconds = round(sum(step["seconds/step"] for step in steps), 1)
    checkpoint = sorted((out / "checkpoints").glob("step-*"))[-1]
    after = evaluate(checkpoint, out / "after", problems)
    return {"arm": arm, "seed": seed, "seconds": seconds, "after": after, "curves": curves}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, warm_steps = parser.add_argument, [600, 800, 60]
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    add("--problems", type=int, default=1000)
    add("--warm_steps", type=int, nargs=3, default=warm_steps, help="vision, careful, mixed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    questions, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    rows = write_split("train", questions, paths, 5000)
    questions, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    write_split("test", questions, paths, args.problems)
    started = time.time()
    warm_start(rows, args.warm_steps)
    result = {"problems": args.problems, "warm_start_seconds": round(time.time() - started)}
    result |= {"before": evaluate(OUT / "warm", OUT / "before", args.problems), "runs": []}
    for seed in args.seeds:
        for arm in args.arms:
            result["runs"].append(train(arm, seed, args.problems))
            Path(__file__).with_suffix(".json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
