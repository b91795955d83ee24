"""Does a long run leak? Steps of a very small configuration: memory, file handles, threads, and finite metrics.

    python benchmarks/soak.py                # 500 steps, writes benchmarks/soak.json
    nice -n 19 python benchmarks/soak.py --steps 2000

Memory is the resident set after each step, not its peak. Its slope is fitted to the second half (the first warms up);
the interval is of 20 block means, as neighbouring steps are not independent.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import runs  # noqa: E402
import train_saei  # noqa: E402

SETTINGS = dict(model=str(ROOT / "demo/mixed"), split="plain/train", prompts_per_step=1, rollouts=2, lr=1e-5)
SETTINGS |= dict(adversarial_rollouts=1, max_new_tokens=8, pgd_steps=1, keep_last=2, self_check=False)
T_95 = 2.101  # Student's t, 18 degrees of freedom: 20 blocks, a line of two parameters


def held() -> dict[str, float]:
    """What this process holds now: MiB, file handles, threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return {
        "memory_mib": memory,
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def slope(values: list[float], blocks: int = 20) -> tuple[float, float]:
    """-> change per 1,000 steps of the second half, half the width of its 95% interval"""
    size = len(values) // 2 // blocks
    means = np.array(values[len(values) - blocks * size :]).reshape(blocks, size).mean(axis=1)
    x = (np.arange(blocks) - (blocks - 1) / 2) * size
    b = (x @ means) / (x @ x)
    rest = means - means.mean() - b * x
    return 1000 * b, 1000 * T_95 * math.sqrt(rest @ rest / (blocks - 2) / (x @ x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="at least 40")
    parser.add_argument("--save_every", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    if args.steps < 40:
        parser.error("--steps must be at least 40: 20 blocks in the second half")
    torch.set_num_threads(1)
    folder, series, step = Path(tempfile.mkdtemp()), [], runs.Log.step
    runs.Log.step = lambda *a: (step(*a), series.append(held()))
    train_saei.main(
        train_saei.Config(**SETTINGS, steps=args.steps, save_every=args.save_every, output=str(folder / "run"))
    )
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    per_1000, interval = slope([s["memory_mib"] for s in series])
    half = series[len(series) // 2 :]
    result = {"steps": len(lines), "all_finite": all(math.isfinite(v) for line in lines for v in line.values())}
    result |= {"memory_mib_per_1000_steps": round(per_1000, 2), "95%_interval": round(interval, 2)}
    result |= {name: [min(s[name] for s in half), max(s[name] for s in half)] for name in ("handles", "threads")}
    result["memory_mib"] = [round(s["memory_mib"], 1) for s in series[:: max(1, len(series) // 50)]]
    args.output.write_text(json.dumps(result) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "memory_mib"}))


if __name__ == "__main__":
    main()
