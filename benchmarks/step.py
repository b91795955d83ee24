"""What does a step cost? Our plain GRPO, our SaEI, and TRL's GRPOTrainer, on the same work.

    python -m benchmarks.step --quick     # 256 image tokens, G = 8, T = 48
    python -m benchmarks.step             # the grid: Ctrl-C stops it, the same command goes on

The same tiny Qwen2.5-VL (real patch, merge and window sizes; tower, language model and head share the arithmetic about
as in the 3B one), the same weights, pictures, questions, group size, response length, AdamW, clipping and float32. In
one process, arms alternating, one step each in turn, so that other load on the machine meets all of them; the first
turn is warm-up. Ratios are medians over turns of (TRL's seconds / ours) of the same turn; CPU
seconds of all threads are beside them, for a machine that does much else.

A step is all that a step of training does: picture and question to tensors, sampling, rewards, (attack, second
sampling,) our metrics, forward, backward, clipping, AdamW. Neither side writes files. No response ends early: the end
token and all that stands for images are suppressed on both sides, and both count their tokens. TRL: no KL, one
iteration, one micro-batch, no checkpointing, no serving engine, no logging; its training_step is called directly.

Peak memory: each arm in a process of its own, two steps; the highest resident memory less that before the first step.
Outside: seconds of a step that are neither the model's forward, its backward (head included) nor AdamW.
Attack: seconds over pgd_steps times its arithmetic: the plain model, parameters frozen, forward and backward to the
pixels of one row a prompt, its tokens and then its clean responses one after another.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

THREADS = os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText  # noqa: E402

import grpo  # noqa: E402
import train_saei  # noqa: E402
import tsec  # noqa: E402
from runtime import run as runs  # noqa: E402
from vlm.policy import Policy  # noqa: E402

ARMS = ["TRL GRPO", "GRPO", "SaEI, 1 PGD step", f"SaEI, {train_saei.Config.pgd_steps} PGD steps"]
QUESTION = "how many dots of the two pictures shows red"
VOCABULARY, LR = 1024, 1e-6


def build_model():
    """Qwen2.5-VL of 4 + 4 layers from a seed.   -> (model, processor)"""
    config, processor = tiny.qwen("qwen2_5_vl")
    processor.tokenizer.add_tokens(
        [f"filler{i}" for i in range(VOCABULARY - len(processor.tokenizer))]
    )
    ip = processor.image_processor
    ip.patch_size, ip.size = 14, type(ip.size)(shortest_edge=56 * 56, longest_edge=1792 * 1792)
    text = dict(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, max_position_embeddings=4096
    )
    text |= dict(
        vocab_size=VOCABULARY,
        rope_parameters=config["text_config"]["rope_parameters"] | {"mrope_section": [8, 12, 12]},
    )
    tower = dict(
        hidden_size=128, intermediate_size=344, depth=4, num_heads=4, patch_size=14, window_size=112
    )
    tower |= dict(out_hidden_size=256, fullatt_block_indexes=[3])
    config |= dict(text_config=config["text_config"] | text, vision_config=tower)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("qwen2_5_vl", **config))
    model.generation_config.eos_token_id = 2
    return model, processor


def pictures(P: int, tokens: int) -> list[Image.Image]:
    side, rng = 28 * int(tokens**0.5), np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(P)
    ]


def parity(completions, completion_ids, **columns) -> list[float]:
    """A reward that costs nothing and differs within a group."""
    return [float(ids[0] % 2) for ids in completion_ids]


class Ours:
    """One of our arms; step() -> {phase: seconds}, and `tokens` of the last one."""

    def __init__(self, P: int, image_tokens: int, G: int, T: int, pgd_steps: int):
        kind = (
            dict(intervention="egas", adversarial_rollouts=G // 2, pgd_steps=pgd_steps)
            if pgd_steps
            else {}
        )
        kind = kind or dict(intervention="none")
        sizes = dict(
            prompts_per_step=P, micro_prompts=P, rollouts=G, max_new_tokens=T, length_buffer=1
        )
        self.cfg = train_saei.Config(lr=LR, **sizes, **kind)
        self.accelerator = Accelerator(cpu=True)
        self.policy = Policy(*build_model())
        self.policy.banned[self.policy.eos_ids] = True  # no response ends early
        optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=LR, weight_decay=self.cfg.weight_decay
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(self.policy, optimizer)
        self.batch = [
            {"problem": QUESTION, "images": [x], "answer": "0"} for x in pictures(P, image_tokens)
        ]
        self.n = 0

    def spots(self) -> list[tuple[object, str]]:
        """Where the model's own time is spent: forward, head, backward, AdamW."""
        model = self.policy.model
        forward = [(model.model, "forward"), (model.lm_head, "forward")]
        return [
            *forward,
            (torch.autograd, "grad"),
            (self.accelerator, "backward"),
            (self.optimizer.optimizer, "step"),
        ]

    def step(self) -> dict[str, float]:
        """The body of train_saei.main's loop without its files."""
        cfg, policy, rows, step = self.cfg, self.policy, list(range(len(self.batch))), self.n
        clock = runs.Clock(self.accelerator.device)
        prompts = policy.encode(
            [r["problem"] for r in self.batch], [r["images"] for r in self.batch]
        )
        clock.lap("encode")
        clean = train_saei.sample(
            cfg,
            policy,
            prompts,
            cfg.clean_rollouts,
            train_saei.seeds_of(cfg, step, rows, train_saei.CLEAN),
        )
        clock.lap("sample")
        keep = tsec.select_tokens(
            clean.entropy, clean.mask, cfg.tsec_low, cfg.tsec_high, cfg.tsec_scope
        )
        seeds = train_saei.seeds_of(cfg, step, rows, train_saei.ATTACK)
        attacked = train_saei.intervene(cfg, policy, prompts, clean, keep, step, seeds, len(rows))
        clock.lap("attack")
        fresh = None
        if cfg.adversarial_rollouts:
            seeds = train_saei.seeds_of(cfg, step, rows, train_saei.FRESH)
            fresh = train_saei.sample(cfg, policy, attacked, cfg.adversarial_rollouts, seeds)
        clock.lap("sample")
        functions = {"accuracy": (parity, 1.0)}
        texts, scores = train_saei.reward(functions, policy, self.batch, clean, fresh)
        advantages = grpo.group_advantages(scores["reward"], scale=cfg.advantage_scale)
        rollouts = train_saei.Rollouts(
            self.batch, prompts, attacked, clean, fresh, keep, texts, scores, advantages
        )
        train_saei.sampling_metrics(cfg, policy, rollouts, len(rows))
        clock.lap("measure")
        train_saei.update(
            cfg, self.accelerator, self.wrapped, None, self.optimizer, rollouts, len(rows), step
        )
        clock.lap("update")
        self.last, self.n = (prompts, clean), step + 1
        self.tokens = sum(int(r.mask.sum()) for r in (clean, fresh) if r is not None)
        return clock.phases


class Trl:
    """TRL's GRPOTrainer, driven a step at a time."""

    def __init__(self, P: int, image_tokens: int, G: int, T: int):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        model, processor = build_model()
        banned = Policy(model, processor).banned.nonzero().flatten().tolist()
        model.train()
        args = GRPOConfig(
            output_dir="unused",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=P * G,
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            num_generations=G,
            num_iterations=1,
            max_completion_length=T,
            temperature=1.0,
            beta=0.0,
            learning_rate=LR,
            weight_decay=0.01,
            gradient_checkpointing=False,
            use_vllm=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            generation_kwargs={"min_new_tokens": T, "suppress_tokens": [*banned, 2]},
        )
        self.rows = [
            {"prompt": [{"role": "user", "content": QUESTION}], "image": x}
            for x in pictures(P, image_tokens)
        ]
        question = Dataset.from_list([{"prompt": self.rows[0]["prompt"]}] * P)
        self.trainer = GRPOTrainer(
            model, self.reward, args, train_dataset=question, processing_class=processor
        )
        self.trainer.current_gradient_accumulation_steps, self.G = 1, G
        self.model = self.trainer.accelerator.prepare(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)

    def reward(self, completions, completion_ids, **columns) -> list[float]:
        self.tokens = sum(map(len, completion_ids))
        return parity(completions, completion_ids)

    def spots(self) -> list:
        return []

    def step(self) -> dict[str, float]:
        start, trainer = time.perf_counter(), self.trainer
        generate, spent = trainer._generate, []

        def timed(*arguments, **options):
            begin = time.perf_counter()
            result = generate(*arguments, **options)
            spent.append(time.perf_counter() - begin)
            return result

        trainer._generate = timed
        # copies: the trainer rewrites its rows
        trainer.training_step(
            self.model, [dict(row) for row in self.rows for _ in range(self.G)], None
        )
        trainer._generate = generate
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"sample": sum(spent), "update": time.perf_counter() - start - sum(spent)}


def make(arm: str, cell: dict):
    if arm == ARMS[0]:
        return Trl(**cell)
    return Ours(**cell, pgd_steps=0 if arm == "GRPO" else int(arm.split()[1]))


# ------------------------------------------------------------------------------------------------------------ measures


def measure(cell: dict, arms: list[str], turns: int) -> dict:
    """arm -> seconds, phases, share outside the model of every turn's step; of SaEI, attack over its arithmetic."""
    made, found = {arm: make(arm, cell) for arm in arms}, {arm: [] for arm in arms}
    for _ in range(turns + 1):
        for arm, runner in made.items():
            with counted(runner.spots()) as inside:
                start, cpu = time.perf_counter(), time.process_time()
                x = {"phases": runner.step()}
                x |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
            print(
                f"{arm}: {x['seconds']:.2f} s, {x['cpu']:.2f} of the CPU",
                file=sys.stderr,
                flush=True,
            )
            if runner.tokens != cell["P"] * cell["G"] * cell["T"]:
                raise RuntimeError(
                    f"{arm} made {runner.tokens} tokens in {cell}: a response ended early"
                )
            if arm != ARMS[0]:
                x["outside"] = 1 - inside[0] / x["seconds"]
            if arm.startswith("SaEI"):
                alone = median(arithmetic(runner) for _ in range(2))
                x["attack/arithmetic"] = x["phases"]["attack"] / (runner.cfg.pgd_steps * alone)
            found[arm].append(x)
    result = {}
    for arm, steps in found.items():
        steps = steps[1:]  # the first is warm-up
        result[arm] = {name: [x[name] for x in steps] for name in steps[0] if name != "phases"}
        result[arm]["phases"] = {
            name: median(x["phases"][name] for x in steps) for name in steps[0]["phases"]
        }
        if ARMS[0] in arms:  # TRL's step of the same turn
            for name, of in (("ratio", "seconds"), ("cpu ratio", "cpu")):
                result[arm][name] = [
                    a[of] / b[of] for a, b in zip(found[ARMS[0]][1:], steps, strict=True)
                ]
        result[arm]["tokens/s"] = made[arm].tokens / median(result[arm]["seconds"])
    return result


@contextlib.contextmanager
def counted(spots: list[tuple[object, str]]):
    """Seconds inside the named functions; a call within a call counts once.   -> a list that holds them"""
    total, depth, before = (
        [0.0],
        [0],
        [(owner, name, getattr(owner, name)) for owner, name in spots],
    )

    def wrap(function):
        def inner(*arguments, **options):
            depth[0] += 1
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                depth[0] -= 1
                total[0] += 0.0 if depth[0] else time.perf_counter() - start

        return inner

    for owner, name, function in before:
        setattr(owner, name, wrap(function))
    try:
        yield total
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def arithmetic(arm: Ours) -> float:
    """Seconds of the plain model's forward and backward to the pixels: prompt and clean responses, each once."""
    (prompts, clean), policy = arm.last, arm.policy
    responses = clean.tokens.view(len(prompts), -1)  # (P, n * T)
    further = prompts.next_position[:, None] + torch.arange(responses.shape[1])
    positions = torch.cat([prompts.positions, further.expand(3, -1, -1)], dim=-1)
    ids = torch.cat([prompts.ids, responses], dim=1)
    images: list[Tensor] = [x.clone().requires_grad_() for x in prompts.images]
    with train_saei.frozen(policy):
        start = time.perf_counter()
        vision = policy.to_pixel_values(images)
        hidden = policy.model.model(
            input_ids=ids, position_ids=positions, use_cache=False, **vision
        ).last_hidden_state
        logits = policy.model.lm_head(hidden[:, -responses.shape[1] :])
        torch.autograd.grad(logits.logsumexp(-1).sum(), images)
        return time.perf_counter() - start


def resident(name: str) -> float:
    """VmRSS or VmHWM in MiB (ru_maxrss would begin at the parent's peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def peak(arm: str, cell: dict) -> float:
    runner = make(arm, cell)
    before = resident("VmRSS")
    for _ in range(2):
        runner.step()
    return resident("VmHWM") - before


def peak_apart(arm: str, cell: dict) -> float:
    """MiB, in a process of its own."""
    command = [sys.executable, __file__, "--peak", json.dumps([arm, cell])]
    return float(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[
            -1
        ]
    )


def linear(cell: dict, turns: int) -> dict:
    """Seconds of twice the prompts, and of twice the responses, over those of the cell; alternating; SaEI and GRPO."""
    found = {}
    for arm in (ARMS[1], ARMS[-1]):
        sizes = {"one": cell, "P": cell | {"P": 2 * cell["P"]}, "G": cell | {"G": 2 * cell["G"]}}
        made, seconds = (
            {name: make(arm, size) for name, size in sizes.items()},
            {name: [] for name in sizes},
        )
        for turn in range(turns + 1):
            for name, runner in made.items():
                start = time.perf_counter()
                runner.step()
                seconds[name] += [time.perf_counter() - start] if turn else []
        found[arm] = {
            k: [a / b for a, b in zip(seconds[k], seconds["one"], strict=True)] for k in ("P", "G")
        }
    return found


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def show(entry: dict) -> None:
    print("\n{image_tokens} image tokens, P = {P}, G = {G}, T = {T}".format(**entry["cell"]))
    for arm, x in entry["arms"].items():
        line = f"  {arm:18} {spread(x['seconds'])} s  {x['tokens/s']:6.0f} tokens/s"
        line += f"  TRL/ours {spread(x['ratio'])}" if "ratio" in x and arm != ARMS[0] else ""
        line += f", of CPU time {spread(x['cpu ratio'])}" if "ratio" in x and arm != ARMS[0] else ""
        line += f"  peak {x['peak']:.0f} MiB" if "peak" in x else ""
        line += f"  outside {median(x['outside']):.1%}" if "outside" in x else ""
        line += (
            f"  attack/arithmetic {spread(x['attack/arithmetic'])}"
            if "attack/arithmetic" in x
            else ""
        )
        print(
            line + "\n" + " " * 21 + ", ".join(f"{k} {v:.2f}" for k, v in x["phases"].items()),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="one cell: 256 image tokens, G = 8, T = 48"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 256, 1024], help="image tokens, squares"
    )
    parser.add_argument("--rollouts", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[48, 256])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="turns, after the warm-up")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, help="in this order")
    parser.add_argument("--no_memory", action="store_true", help="no peak memory")
    parser.add_argument("--no_linear", action="store_true", help="no runs of twice P and twice G")
    parser.add_argument(
        "--output", default=str(ROOT / "benchmarks/step.json"), help="cells that it has are not run"
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(int(THREADS))
    if args.peak:
        print(peak(*json.loads(args.peak)))
        return
    sizes = [(t, g, n) for t in args.tokens for n in args.lengths for g in args.rollouts]
    sizes = [(256, 8, 48)] if args.quick else sizes
    result = {
        "command": " ".join(["benchmarks/step.py", *sys.argv[1:]]),
        "threads": int(THREADS),
        "torch": torch.__version__,
        "steps": args.steps,
        "cells": [],
    }
    output = Path(args.output)
    if output.exists():
        result["cells"] = json.loads(output.read_text())["cells"]
    for tokens, G, T in sizes:
        cell = dict(P=args.prompts, image_tokens=tokens, G=G, T=T)
        if any(entry["cell"] == cell for entry in result["cells"]):
            continue
        entry = {"cell": cell, "arms": measure(cell, args.arms, args.steps)}
        for arm, x in entry["arms"].items():
            if not args.no_memory:
                x["peak"] = peak_apart(arm, cell)
        show(entry)
        result["cells"].append(entry)
        output.write_text(json.dumps(result, indent=1) + "\n")
    if not args.no_linear:
        result["linear"] = linear(dict(P=args.prompts, image_tokens=256, G=8, T=48), args.steps)
        for arm, x in result["linear"].items():
            print(
                f"{arm}: twice P costs {spread(x['P'])}, twice G costs {spread(x['G'])} times as much"
            )
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
