"""Evaluate a checkpoint: greedy accuracy, pass@1, pass@k and token entropy, with 95% intervals.

    python eval.py --model demo/mixed --splits plain/test shifted/test --output out/mixed
    python eval.py --model Qwen/Qwen2.5-VL-3B-Instruct --preset mathvista --output out/mathvista

Writes OUTPUT.json (the numbers) and OUTPUT.jsonl (what was answered, a line per problem). The
numbers do not depend on how many processes share the problems (accelerate launch eval.py ...).

    greedy     share of problems that the most likely answer (temperature 0) solves
    pass@k     chance that one of k sampled answers is right, unbiased, from n samples (pass_at_k)
    truncated  share of sampled responses that ran into max_new_tokens (a cut answer is wrong)
    entropy    mean over sampled responses of their mean token entropy, in nats
Intervals are over problems (runtime/estimates.py). They do not cover other seeds.
"""

import json
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

import rewards
import tsec
from runtime import args, data, distributed
from runtime.args import option
from runtime.estimates import bootstrap_interval, pass_at_k, share_interval
from runtime.rollouts import micro_batches


@dataclass
class EvalArgs(args.Options):
    _argument_group_name = "evaluation"
    output: str | None = option(None, "ours", "where to write: OUTPUT.json and OUTPUT.jsonl")
    overwrite: bool = option(False, "ours", "replace the result that is there")
    splits: list[str] = option([], "ours", "unset: the preset's, test, or the demo's plain/test")
    problems: int | None = option(None, "ours", "how many; unset: all, of the demo 1000", low=1)
    samples: int = option(8, "ours", "n, sampled responses per problem", low=1)
    k: list[int] = option([], "ours", "the k of pass@k, each at most n; unset: 1 and n")
    temperature: float = option(1.0, "ours", "of the sampled responses", above=0)
    max_new_tokens: int = option(64, "ours", "longest response", low=1)
    batch: int = option(50, "ours", "problems a device computes at a time", low=1)
    seed: int = option(0, "ours", "of the samples", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.k = self.k or sorted({1, self.samples})
        for k in self.k:
            args.require(1 <= k <= self.samples, f"1 <= k <= samples={self.samples}, got k={k}")


class Config(NamedTuple):
    eval: EvalArgs
    model: args.ModelArgs
    data: args.DataArgs
    engine: args.EngineArgs


def load_config(argv: list[str] = (), **options) -> Config:
    """The defaults, then the recipe of --config, then argv, then `options`. Raises ValueError."""
    config = args.parse(
        Config, argv, __doc__.split("\n")[0], required=("model", "output"), **options
    )
    cfg = config.eval
    cfg.output = cfg.output.rstrip("/")  # else x/ would be the hidden file x/.json
    preset, source = data.find_preset(config.data.preset, config.data.dataset)
    if source == "demo":
        cfg.splits = cfg.splits or ["plain/test"]
        cfg.problems = cfg.problems or 1000
    cfg.splits = cfg.splits or [data.default_split(preset, "test")]
    args.require(not config.data.streaming or cfg.problems is not None, "--problems N if streaming")
    return config


def evaluate_rows(
    sampler: args.Sampler, rows: list[dict], seeds: list[int], cfg: EvalArgs
) -> list[dict]:
    """Greedy and sampled answers of some problems, graded.   -> one record per problem"""
    policy = sampler.policy
    prompts = policy.encode([row["problem"] for row in rows], [row["images"] for row in rows])
    T, read = cfg.max_new_tokens, cache(partial(policy.read, prompts))  # one prompt pass for both
    wait = sampler.ask(prompts, 1, seeds, T, temperature=0.0)
    wait_sampled = sampler.ask(prompts, cfg.samples, seeds, T, cfg.temperature)
    greedy, sampled = wait(read), wait_sampled(read)
    greedy_texts, texts = policy.decode(greedy), policy.decode(sampled)
    entropy = tsec.selective_entropy(sampled.entropy, sampled.mask).view(len(rows), -1)
    cut = [x.truncated(policy.eos_ids).view(len(rows), -1) for x in (greedy, sampled)]
    truncated = torch.cat(cut, dim=1).tolist()  # (P, 1 + n)
    records = []
    for i, row in enumerate(rows):
        responses = texts[i * cfg.samples : (i + 1) * cfg.samples]
        record = {name: value for name, value in row.items() if name != "images"}
        columns = {name: [value] * (1 + cfg.samples) for name, value in record.items()}
        columns["truncated"] = truncated[i]
        right = rewards.accuracy_reward([greedy_texts[i], *responses], **columns)
        record |= {"greedy": greedy_texts[i], "greedy_right": right[0], "responses": responses}
        record |= {"right": right[1:], "entropy": entropy[i].mean().item()}
        record["truncated"] = float(np.mean(truncated[i][1:]))
        records.append(record)
    return records


def evaluate_split(
    sampler: args.Sampler, split: str, rows: data.Rows, cfg: EvalArgs, accelerator: Accelerator
) -> list[dict]:
    """All processes' records, each row once, in the split's order, on every process."""
    records = []
    mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
    bar = tqdm(micro_batches(len(mine), cfg.batch), split, disable=not accelerator.is_main_process)
    for numbers in (mine[part] for part in bar):
        seeds = [int(np.random.SeedSequence((cfg.seed, i)).generate_state(1)[0]) for i in numbers]
        for record in evaluate_rows(sampler, [rows[i] for i in numbers], seeds, cfg):
            records.append(record | {"split": split})
    return sorted(gather_object(records), key=lambda record: record["row"])


def summarise(records: list[dict], cfg: EvalArgs) -> dict[str, int | list[float]]:
    """{"n": problems, name: [mean, low, high]}"""
    columns = {"greedy": [record["greedy_right"] for record in records]}
    for k in cfg.k:
        columns[f"pass@{k}"] = [pass_at_k(cfg.samples, int(sum(r["right"])), k) for r in records]
    for name in ("entropy", "truncated"):
        columns[name] = [record[name] for record in records]
    summary = {"n": len(records)}
    for name, values in columns.items():
        values = np.array(values, dtype=np.float64)
        interval = bootstrap_interval if name == "entropy" else share_interval
        summary[name] = [float(values.mean()), *interval(values)]
    return summary


def report(result: dict, cfg: EvalArgs) -> None:
    """Print the numbers."""
    names = ["greedy", *(f"pass@{k}" for k in cfg.k), "entropy"]
    print(f"{'split':16}" + "".join(f"{name:>22}" for name in names))
    for split, numbers in result["splits"].items():
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*numbers[name]) for name in names]
        print(f"{split:16}" + "".join(f"{cell:>22}" for cell in cells))
        if (cut := numbers["truncated"][0]) > 0.5:
            print(f"warning: {cut:.0%} ran into --max_new_tokens {cfg.max_new_tokens}: raise it")
    for split, numbers in result.get("official", {}).items():
        print(f"{split:16}" + "  ".join(f"{name} {value:.3g}" for name, value in numbers.items()))
    if "by_rule" in result:
        print(f"scored by rule, greedy answers; {result['by_rule']}")


def main(config: Config) -> dict:
    """Evaluate, write and print. Returns what OUTPUT.json holds. Raises ValueError if it exists."""
    cfg, start = config.eval, time.time()
    accelerator = Accelerator(kwargs_handlers=[distributed.LONG_WAIT])
    if Path(f"{cfg.output}.json").exists() and not cfg.overwrite:
        raise ValueError(f"{cfg.output}.json is there already: --overwrite replaces it")
    Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
    preset, source = data.find_preset(config.data.preset, config.data.dataset)
    check = {"prompt_tokens": config.model.load(weights=False).prompt_tokens}
    check["max_prompt_tokens"] = 10**9  # only problems that cannot be asked are refused
    rows = {s: config.data.load(s, limit=cfg.problems, **check) for s in cfg.splits}
    policy, records = config.model.load().to(accelerator.device), {}
    precision = accelerator.mixed_precision
    with torch.no_grad(), accelerator.autocast():
        with config.engine.sampler(policy, config.model.model, precision) as sampler:
            sampler.load_weights()
            for split in cfg.splits:
                records[split] = evaluate_split(sampler, split, rows[split], cfg, accelerator)
    result = {"model": config.model.model, "dataset": source, "n_samples": cfg.samples}
    result |= {"temperature": cfg.temperature, "seed": cfg.seed}
    result["seconds"] = round(time.time() - start, 1)
    result["splits"] = {split: summarise(found, cfg) for split, found in records.items()}
    if preset:
        result |= {"preset": preset.dataset, "by_rule": preset.departs}
        if preset.summary:
            result["official"] = {split: preset.summary(found) for split, found in records.items()}
    if accelerator.is_main_process:
        Path(f"{cfg.output}.json").write_text(json.dumps(result, indent=1) + "\n")
        with open(f"{cfg.output}.jsonl", "w") as file:
            for found in records.values():
                file.writelines(json.dumps(record, default=str) + "\n" for record in found)
        report(result, cfg)
    return result


if __name__ == "__main__":
    args.command_line(load_config, main)
