"""vLLM against the policy's own sampling, with the demo's model: python -m benchmarks.engine

Needs `bash run.sh engine`. About 2 minutes on 2 free cores. Writes engine.json:
    seconds      of the start, the weights, 16 prompts' responses (both samplers), and of the
                 answer after the child was killed
    differences  the engine's log-probs and entropies to Policy.score, by both sides' dtype
    steps        of vLLM, for plain GRPO's responses and for SaEI's two dependent phases: where all
                 responses run at once, and where some wait
"""

import json
import os
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from demo.task import make_row
from vlm.engine import Engine
from vlm.policy import Policy, Prompts, Responses

ROOT = Path(__file__).resolve().parent.parent
MODEL, TOKENS, REPEATS = "demo/confident", 64, 3
FEW_AND_MANY = (16, 64)  # prompts
DTYPES = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median(work: Callable[[], object]) -> float:
    """Of REPEATS calls, after one that is not counted."""
    work()
    return statistics.median(seconds(work) for _ in range(REPEATS))


def encode(policy: Policy, count: int) -> Prompts:
    rows = [make_row("shifted/train", i) for i in range(count)]
    return policy.encode([row["problem"] for row in rows], [row["images"] for row in rows])


@torch.no_grad()
def difference(policy: Policy, prompts: Prompts, responses: Responses) -> dict[str, float]:
    mask = responses.mask
    logprobs, entropy = policy.score(prompts, responses.tokens, mask)
    log_ratio = (logprobs - responses.logprobs)[mask]
    return {
        "log-prob": log_ratio.abs().max().item(),
        "mean": log_ratio.abs().mean().item(),
        "entropy": (entropy - responses.entropy)[mask].abs().max().item(),
        "lowest ratio": log_ratio.exp().min().item(),
        "highest ratio": log_ratio.exp().max().item(),
    }


def two_phases(vllm: Engine, prompts: Prompts, size: int) -> None:
    """4 clean responses of each prompt, then 4 more, which may be asked when the first are there.

    size: prompts that are waited for together.
    """
    P, waits = len(prompts), []
    parts = vllm.parts(P, size)
    clean = [vllm.ask(prompts[p], 4, list(range(P))[p], TOKENS) for p in parts]
    for part, wait in zip(parts, clean, strict=True):
        wait()
        waits.append(vllm.ask(prompts[part], 4, list(range(P, 2 * P))[part], TOKENS))
    for wait in waits:
        wait()


def steps(vllm: Engine, work: Callable[[], object]) -> int:
    """vLLM's steps of it. They do not depend on what else the machine does."""

    def so_far() -> int:
        return vllm.connections[0].call({"kind": "info"})()["steps"]

    before = so_far()
    work()
    return so_far() - before


def phases(vllm: Engine, policy: Policy, count: int) -> list[dict]:
    """Of `count` prompts: two phases, waited for in parts of several sizes."""
    prompts, seeds = encode(policy, count), list(range(count))
    plain = steps(vllm, lambda: vllm.sample(prompts, 8, seeds, TOKENS))
    rows = []
    for size in (count, count // 4, count // 8):
        of_two = steps(vllm, lambda size=size: two_phases(vllm, prompts, size))
        rows.append({"prompts": count, "together": size, "plain": plain, "two phases": of_two})
    return rows


def main() -> None:
    found = {"model": MODEL, "seconds": {}, "differences": [], "steps": []}
    for of_engine, of_trainer in DTYPES:
        policy = Policy.from_pretrained(MODEL, of_trainer)
        prompts = encode(policy, 16)
        with Engine(policy, MODEL, of_engine, ["vllm"]) as vllm:
            vllm.load_weights()
            row = {"engine": of_engine, "trainer": of_trainer}
            row |= difference(policy, prompts, vllm.sample(prompts, 8, list(range(16)), TOKENS))
            found["differences"].append(row)
    policy = Policy.from_pretrained(MODEL)
    prompts = encode(policy, 16)
    arguments = (prompts, 8, list(range(16)), TOKENS)
    start = time.perf_counter()
    with Engine(policy, MODEL, "float32", ["vllm"]) as vllm:
        times = found["seconds"]
        times["start"] = time.perf_counter() - start
        times["weights"] = median(vllm.load_weights)
        times["sample, vLLM"] = median(lambda: vllm.sample(*arguments))
        times["sample, own"] = median(lambda: policy.sample(*arguments))
        for count in FEW_AND_MANY:
            found["steps"] += phases(vllm, policy, count)
        os.kill(vllm.connections[0].process.pid, signal.SIGKILL)
        times["sample after kill -9"] = seconds(lambda: vllm.sample(*arguments))
    print(json.dumps(found, indent=1))
    (ROOT / "benchmarks/engine.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
