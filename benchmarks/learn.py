"""Does GRPO learn, and what does SaEI add? The demo's recipes over seeds, evaluated on fresh problems before and after.

    python benchmarks/learn.py          # seeds 0, 1, 2; two runs at a time, one thread each; finished runs are kept
    python benchmarks/learn.py --seeds 0 --problems 200

Runs train_saei.py and eval.py as a user would, into out/learn, and writes benchmarks/learn.json.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
ARMS = {  # name -> recipe, further options
    "elicit, plain GRPO": ("elicit", []),
    "demo, plain GRPO": ("demo", ["--intervention", "none"]),
    "demo, SaEI": ("demo", []),
}
SPLITS = {"elicit": ["plain/test"], "demo": ["shifted/test"]}


def launch(*arguments: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")


def evaluate(model: str, recipe: str, output: Path, problems: int) -> dict:
    if not output.with_suffix(".json").exists():
        options = ["--splits", *SPLITS[recipe], "--problems", str(problems), "--output", str(output)]
        launch("eval.py", "--model", model, *options)
    return json.loads(output.with_suffix(".json").read_text())


def one_run(arm: str, seed: int, problems: int) -> dict:
    """Train an arm with a seed, unless that is done, and evaluate it. -> what learn.json keeps of it"""
    recipe, options = ARMS[arm]
    settings = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())
    out = ROOT / "out/learn" / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    last = out / "checkpoints" / f"step-{settings['steps']:06d}"
    if not last.exists():
        config = ["--config", f"recipes/{recipe}.yaml", "--seed", str(seed), "--output", str(out), "--overwrite"]
        launch("train_saei.py", *config, *options)
    before = evaluate(settings["model"], recipe, ROOT / "out/learn" / f"before-{recipe}", problems)
    after = evaluate(str(last), recipe, out / "after", problems)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("accuracy", "entropy/clean", "zero_variance")
    return {
        "arm": arm,
        "seed": seed,
        "seconds": sum(step["seconds/step"] for step in steps),
        "memory_gib": max(step["memory_gib"] for step in steps),
        "before": before["splits"],
        "after": after["splits"],
        "curves": {name: [round(step[name], 4) for step in steps] for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    for recipe, splits in SPLITS.items():  # first, as all runs share them
        model = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())["model"]
        evaluate(model, recipe, ROOT / "out/learn" / f"before-{recipe}", args.problems)
        print(f"{recipe}: {model} evaluated on {', '.join(splits)}", flush=True)
    jobs = [(arm, seed, args.problems) for arm in args.arms for seed in args.seeds]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda job: one_run(*job), jobs))
    args.output.write_text(json.dumps({"problems": args.problems, "runs": runs}) + "\n")
    for arm in args.arms:
        for split in SPLITS[ARMS[arm][0]]:
            gains = [r["after"][split]["greedy"][0] - r["before"][split]["greedy"][0] for r in runs if r["arm"] == arm]
            print(f"{arm:20} {split:14} greedy {np.mean(gains):+.3f} (seeds: {', '.join(f'{g:+.3f}' for g in gains)})")


if __name__ == "__main__":
    main()
