"""Evaluate a checkpoint: greedy accuracy, pass@1, pass@k and token entropy on named splits, with 95% intervals.

    accelerate launch eval.py --model demo/mixed --splits plain/test shifted/test --output out/mixed
    accelerate launch eval.py --model Qwen/Qwen2.5-VL-3B-Instruct --preset mathvista --max_new_tokens 2048 --batch 4 \\
        --output out/mathvista

Any folder or hub id of a supported vision-language model, trained here or not. Writes <output>.json (the numbers) and
<output>.jsonl (one line a problem: what was answered). Processes share the problems; the numbers do not depend on how.

    greedy   share of problems that the most likely answer (temperature 0) solves
    pass@k   chance that at least one of k sampled answers is right, estimated without bias from n samples:
             1 - C(n - c, k) / C(n, k), c of the n right
    truncated  share of sampled responses that ran into max_new_tokens (a cut answer is a wrong one)
    entropy  mean over sampled responses of their mean token entropy, nats, at the sampling temperature
Intervals are percentile bootstraps over problems: how much the number would move with other problems, not other seeds.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import HfArgumentParser

import rewards
import tsec
from runtime import data
from vlm.policy import Policy


@dataclass
class EvalConfig:
    model: str = field(metadata={"help": "checkpoint folder or hub id"})
    output: str = field(
        metadata={"help": "where to write, without ending: <output>.json and <output>.jsonl"}
    )
    dataset: str = field(
        default="demo", metadata={"help": "this and the next seven as train_saei.py's"}
    )
    preset: str | None = field(default=None, metadata={"help": "an entry of presets.py"})
    dataset_config: str | None = field(
        default=None, metadata={"help": "the hub set's configuration"}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "unset: images, image; none: no such column"}
    )
    problem_column: str | None = field(
        default=None, metadata={"help": "unset: problem, question, prompt"}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "unset: answer, solution, ground_truth"}
    )
    choices_column: str | None = field(default=None, metadata={"help": "unset: choices, options"})
    template: str | None = field(
        default=None, metadata={"help": "boxed | tags | none | a YAML file"}
    )
    streaming: bool = field(
        default=False, metadata={"help": "read only the first --problems rows of a hub set"}
    )
    bad_rows: str = field(
        default="refuse", metadata={"help": "refuse | skip: left out, counted and named"}
    )
    splits: list[str] = field(
        default_factory=list,
        metadata={"help": "one or several; unset: the preset's, test, or the demo's plain/test"},
    )
    problems: int | None = field(
        default=None,
        metadata={
            "help": "at most so many of each split, from its start; unset: all, of the demo 1000"
        },
    )
    samples: int = field(default=8, metadata={"help": "n, sampled responses per problem"})
    k: list[int] = field(
        default_factory=lambda: [1, 8], metadata={"help": "the k of pass@k, each at most n"}
    )
    temperature: float = field(default=1.0, metadata={"help": "of the sampled responses"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest response"})
    batch: int = field(default=50, metadata={"help": "problems a device computes at a time"})
    seed: int = field(default=0, metadata={"help": "decides the samples"})
    dtype: str = field(
        default="float32", metadata={"help": "parameters' dtype: float32 | bfloat16"}
    )
    attention: str = field(default="sdpa", metadata={"help": "sdpa | eager | flash_attention_2"})
    min_pixels: int | None = field(
        default=None, metadata={"help": "smallest area of a picture, Qwen families"}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "largest area of a picture, Qwen families"}
    )

    def __post_init__(self):
        self.preset_found, self.source = data.find_preset(self.preset, self.dataset)
        if self.source == "demo":
            self.splits = self.splits or ["plain/test"]
            self.problems = 1000 if self.problems is None else self.problems
        self.splits = self.splits or [data.default_split(self.preset_found, "test")]
        if (
            min(self.batch, self.max_new_tokens, 1 if self.problems is None else self.problems) < 1
            or self.seed < 0
        ):
            raise ValueError(
                "batch, max_new_tokens and problems must be at least 1, seed 0 or more"
            )
        if self.bad_rows not in ("refuse", "skip"):
            raise ValueError(f"bad_rows must be refuse or skip, got {self.bad_rows!r}")
        if self.streaming and self.problems is None:
            raise ValueError("with streaming say how many problems to read: --problems")
        if not self.k or not all(1 <= k <= self.samples for k in self.k):
            raise ValueError(f"every k must be between 1 and samples={self.samples}, got {self.k}")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature must be > 0, got {self.temperature}; greedy decoding is measured anyway"
            )


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): chance that k of n samples drawn without replacement hold one of the c right ones."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - float(np.prod([(n - c - i) / (n - i) for i in range(k)]))


def bootstrap_interval(
    values: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """2.5% and 97.5% percentile of the mean of `values` drawn anew with replacement.   (n,) -> (low, high)"""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def evaluate_rows(
    policy: Policy, rows: list[dict], seeds: list[int], cfg: EvalConfig
) -> list[dict]:
    """Greedy and sampled answers of some problems, graded.   -> one record a problem"""
    prompts = policy.encode([row["problem"] for row in rows], [row["images"] for row in rows])
    greedy = policy.decode(policy.sample(prompts, 1, seeds, cfg.max_new_tokens, temperature=0.0))
    sampled = policy.sample(prompts, cfg.samples, seeds, cfg.max_new_tokens, cfg.temperature)
    texts = np.array(policy.decode(sampled), dtype=object).reshape(len(rows), cfg.samples).tolist()
    entropy = (
        tsec.selective_entropy(sampled.entropy, sampled.mask)
        .view(len(rows), -1)
        .mean(dim=1)
        .tolist()
    )
    cut = sampled.truncated(policy.eos_ids).float().view(len(rows), -1).mean(dim=1).tolist()
    records = []
    for row, best, responses, h, c in zip(rows, greedy, texts, entropy, cut, strict=True):
        kept = {name: value for name, value in row.items() if name != "images"}
        right = rewards.accuracy_reward(
            [best, *responses], **{k: [v] * (1 + cfg.samples) for k, v in kept.items()}
        )
        found = {
            "greedy": best,
            "greedy_right": right[0],
            "responses": responses,
            "right": right[1:],
        }
        records.append(kept | found | {"entropy": h, "truncated": c})
    return records


def evaluate_split(
    policy: Policy, split: str, cfg: EvalConfig, accelerator: Accelerator
) -> list[dict]:
    """All processes' records of a split, in its order, on every process; each row exactly once."""
    options = {name: getattr(cfg, name) for name in data.OPTIONS}
    rows = data.load_rows(cfg.dataset, split, cfg.bad_rows, cfg.problems, **options)
    mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
    records = []
    for start in tqdm(
        range(0, len(mine), cfg.batch),
        desc=split,
        disable=not accelerator.is_main_process,
        unit="batch",
    ):
        part = mine[start : start + cfg.batch]
        seeds = [int(np.random.SeedSequence((cfg.seed, i)).generate_state(1)[0]) for i in part]
        found = evaluate_rows(policy, [rows[i] for i in part], seeds, cfg)
        records += [record | {"split": split} for record in found]
    return sorted(gather_object(records), key=lambda record: record["row"])


def summarise(records: list[dict], cfg: EvalConfig) -> dict[str, int | list[float]]:
    """{"n": problems, name: [mean, low, high]}"""
    columns = {"greedy": [record["greedy_right"] for record in records]}
    for k in cfg.k:
        columns[f"pass@{k}"] = [
            pass_at_k(cfg.samples, int(sum(record["right"])), k) for record in records
        ]
    for name in ("entropy", "truncated"):
        columns[name] = [record[name] for record in records]
    arrays = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
    return {"n": len(records)} | {
        name: [float(x.mean()), *bootstrap_interval(x)] for name, x in arrays.items()
    }


def main(cfg: EvalConfig) -> dict:
    """Evaluate, write and print. Returns what <output>.json holds."""
    accelerator, start = Accelerator(), time.time()
    policy = Policy.from_pretrained(
        cfg.model, cfg.dtype, cfg.attention, cfg.min_pixels, cfg.max_pixels
    )
    policy = policy.to(accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        records = {split: evaluate_split(policy, split, cfg, accelerator) for split in cfg.splits}
    result = {
        "model": cfg.model,
        "dataset": cfg.source,
        "n_samples": cfg.samples,
        "temperature": cfg.temperature,
    }
    result |= {"seed": cfg.seed, "seconds": round(time.time() - start, 1)}
    result["splits"] = {split: summarise(found, cfg) for split, found in records.items()}
    if preset := cfg.preset_found:
        result |= {"preset": preset.dataset, "by_rule": preset.departs}
        if preset.summary:
            result["official"] = {split: preset.summary(found) for split, found in records.items()}
    if accelerator.is_main_process:
        out = Path(cfg.output)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(out.name + ".json").write_text(json.dumps(result, indent=1) + "\n")
        lines = [
            json.dumps(record, default=str) + "\n" for found in records.values() for record in found
        ]
        out.with_name(out.name + ".jsonl").write_text("".join(lines))
        names = ["greedy", *(f"pass@{k}" for k in cfg.k), "entropy"]
        print(f"{'split':16}" + "".join(f"{name:>22}" for name in names))
        for split, numbers in result["splits"].items():
            cells = [
                f"{numbers[x][0]:.3f} [{numbers[x][1]:.3f}, {numbers[x][2]:.3f}]" for x in names
            ]
            print(f"{split:16}" + "".join(f"{cell:>22}" for cell in cells))
            if (cut := numbers["truncated"][0]) > 0.5:
                print(
                    f"warning: {cut:.0%} of these responses ran into --max_new_tokens {cfg.max_new_tokens}: raise it"
                )
        for split, numbers in result.get("official", {}).items():
            print(
                f"{split:16}" + "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
            )
        if cfg.preset_found:
            print(f"scored by rule, greedy answers; {cfg.preset_found.departs}")
    return result


if __name__ == "__main__":
    try:
        config = HfArgumentParser(
            EvalConfig, description=__doc__.split("\n")[0]
        ).parse_args_into_dataclasses()[0]
    except ValueError as error:
        sys.exit(f"eval.py: {error}")
    main(config)
