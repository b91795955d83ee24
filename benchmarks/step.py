"""What does a step cost? Our plain GRPO, our SaEI, and TRL's GRPOTrainer, on the same work.

    python -m benchmarks.step --quick     # 256 image tokens, G = 8, T = 48
    python -m benchmarks.step             # the grid; Ctrl-C stops it, the same command continues

Work: the same tiny Qwen2.5-VL (real patch, merge and window sizes; vision tower, language model and
head share the arithmetic about as in the 3B model), weights, pictures, questions, group size,
response length, AdamW, clipping, float32. Arms alternate in one process, one step each per turn, so
that other load on the machine meets all of them. The first turn is warm-up. Ratios are medians over
turns of TRL's seconds / ours in the same turn. CPU seconds of all threads are beside them.

Step: picture and question to tensors, sampling, rewards, (attack, second sampling,) our metrics,
forward, backward, clipping, AdamW. Neither side writes files. No response ends early: the end token
and all image tokens are suppressed on both sides, and both count their tokens. TRL: no KL, one
iteration, one micro-batch, no checkpointing, no serving engine, no logging; its training_step is
called directly.

Peak memory: each arm in a process of its own, two steps; the highest resident memory minus that
before the first step. Outside: seconds of a step that are neither the model's forward, its backward
(head included) nor AdamW. Attack: seconds over pgd_steps times its arithmetic, which is the plain
model's forward and backward to the pixels, parameters frozen, of one row per prompt: its tokens,
then its clean responses one after another.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

THREADS = os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText  # noqa: E402

import grpo  # noqa: E402
import train_saei  # noqa: E402
import tsec  # noqa: E402
from runtime import distributed, rollouts  # noqa: E402
from runtime.args import flat  # noqa: E402
from runtime.run import Batch, Clock, Run  # noqa: E402
from vlm.policy import Policy  # noqa: E402

ARMS = ["TRL GRPO", "GRPO", "SaEI, 1 PGD step", "SaEI, 3 PGD steps"]
QUESTION = "how many dots of the two pictures shows red"
VOCABULARY, LR = 1024, 1e-6


def build_model():
    """Qwen2.5-VL of 4 + 4 layers from a seed.   -> (model, processor)"""
    from tests import tiny  # here: it needs the families of a recent transformers

    config, processor = tiny.qwen("qwen2_5_vl")
    fillers = VOCABULARY - len(processor.tokenizer)
    processor.tokenizer.add_tokens([f"filler{i}" for i in range(fillers)])
    image_processor = processor.image_processor
    image_processor.patch_size = 14
    sizes = {"shortest_edge": 56 * 56, "longest_edge": 1792 * 1792}
    image_processor.size = type(image_processor.size)(**sizes)
    rope = config["text_config"]["rope_parameters"] | {"mrope_section": [8, 12, 12]}
    text = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    text |= {"max_position_embeddings": 4096, "vocab_size": VOCABULARY, "rope_parameters": rope}
    tower = {"hidden_size": 128, "intermediate_size": 344, "depth": 4, "num_heads": 4}
    tower |= {"patch_size": 14, "window_size": 112}
    tower |= {"out_hidden_size": 256, "fullatt_block_indexes": [3]}
    config |= {"text_config": config["text_config"] | text, "vision_config": tower}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("qwen2_5_vl", **config))
    model.generation_config.eos_token_id = 2
    return model, processor


def pictures(P: int, tokens: int) -> list[Image.Image]:
    side, rng, images = 28 * int(tokens**0.5), np.random.default_rng(0), []
    for _ in range(P):
        images.append(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)))
    return images


def parity(completions, completion_ids, **columns) -> list[float]:
    """A reward that costs nothing and differs within a group."""
    return [float(ids[0] % 2) for ids in completion_ids]


class Ours:
    """One of our arms; step() -> {phase: seconds}, and `tokens` of the last one."""

    def __init__(self, P: int, image_tokens: int, G: int, T: int, pgd_steps: int):
        options = {"prompts_per_step": P, "micro_prompts": P, "rollouts": G, "max_new_tokens": T}
        if pgd_steps:
            options |= {"adversarial_rollouts": G // 2, "pgd_steps": pgd_steps}
        else:
            options["intervention"] = "none"
        output = tempfile.mkdtemp()
        self.config = train_saei.load_config(lr=LR, output=output, **options)
        self.run = Run(self.config.run, flat(self.config), Accelerator(cpu=True))
        self.policy = Policy(*build_model())
        self.policy.banned[self.policy.eos_ids] = True  # no response ends early
        self.wrapped, self.optimizer = distributed.prepare(
            self.run.accelerator, self.policy, LR, self.config.saei.weight_decay, {}, None
        )
        rows = []
        for x in pictures(P, image_tokens):
            rows.append({"problem": QUESTION, "images": [x], "answer": "0", "row": len(rows)})
        self.rows, self.n = rows, 0
        shutil.rmtree(output)

    def spots(self) -> list[tuple[object, str]]:
        """Where the model's own time is spent: forward, head, backward, AdamW."""
        model, accelerator = self.policy.model, self.run.accelerator
        spots = [(model.model, "forward"), (model.lm_head, "forward"), (torch.autograd, "grad")]
        return [*spots, (accelerator, "backward"), (self.optimizer.optimizer, "step")]

    def step(self) -> dict[str, float]:
        """The body of train_saei.main's loop without its files."""
        cfg, policy, P, step = self.config.saei, self.policy, len(self.rows), self.n
        clock, batch = Clock(policy.device), Batch(self.rows, list(range(P)), 0, step)
        prompts = policy.encode(batch.problems, batch.images)
        clock.lap("encode")
        settings = (cfg.max_new_tokens, cfg.temperature, 0)
        passes = rollouts.Passes()
        passes.reads[0] = policy.read(prompts, to_pixels=cfg.intervention == "egas")
        clock.lap("read")
        n, seeds = cfg.clean_rollouts, batch.seeds(train_saei.CLEAN)
        clean = policy.sample(prompts, n, seeds, *settings, passes.values())
        clock.lap("sample")
        cuts = (cfg.tsec_low, cfg.tsec_high)
        tsec_mask = tsec.select_tokens(clean.entropy, clean.mask, *cuts)
        objective = partial(
            train_saei.EntropyObjective, policy, prompts, clean, tsec_mask, cfg.temperature
        )
        seeds = batch.seeds(train_saei.ATTACK)
        attacked = train_saei.intervene(cfg, policy, prompts, passes, objective, P, seeds, 0.0)
        clock.lap("attack")
        responses, n = [clean], cfg.adversarial_rollouts
        if n:
            seeds = batch.seeds(train_saei.ADVERSARIAL)
            responses.append(policy.sample(attacked, n, seeds, *settings))
        clock.lap("sample")
        texts, scores = rollouts.grade({"accuracy": (parity, 1.0)}, policy, self.rows, responses)
        advantages = grpo.group_advantages(scores["reward"], scale=cfg.advantage_scale)
        sampled = rollouts.Rollouts(
            self.rows, prompts, attacked, responses, tsec_mask, texts, scores, advantages
        )
        rollouts.metrics(sampled, policy, cuts, objective, P, step)
        clock.lap("measure")
        train_saei.update(
            self.config, self.run, self.wrapped, None, self.optimizer, sampled, passes, P, step
        )
        clock.lap("update")
        self.last, self.n = (prompts, clean), step + 1
        self.tokens = sum(int(part.mask.sum()) for part in responses)
        return clock.phases


class Trl:
    """TRL's GRPOTrainer, driven a step at a time, on some pictures.

    policy: whose model and processor it trains. micro_batches: of a step; 1: all rows at a time.
    options: of GRPOConfig.
    """

    def __init__(
        self,
        policy: Policy,
        images: list[Image.Image],
        G: int,
        T: int,
        micro_batches: int = 1,
        **options,
    ):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        P, model = len(images), policy.model
        banned = policy.banned[: len(policy.processor.tokenizer)].nonzero().flatten().tolist()
        model.train()
        common = dict(
            output_dir="unused",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=P * G // micro_batches,
            gradient_accumulation_steps=micro_batches,
            steps_per_generation=micro_batches,
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
            generation_kwargs={
                "min_new_tokens": T,
                "suppress_tokens": sorted({*banned, *policy.eos_ids}),
            },
        )
        args = GRPOConfig(**common | options)
        self.rows = [
            {"prompt": [{"role": "user", "content": QUESTION}], "image": x} for x in images
        ]
        question = Dataset.from_list([{"prompt": self.rows[0]["prompt"]}] * P)
        self.trainer = GRPOTrainer(
            model, self.reward, args, train_dataset=question, processing_class=policy.processor
        )
        self.trainer.current_gradient_accumulation_steps = self.micro_batches = micro_batches
        self.G = G
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
        for _ in range(self.micro_batches):  # the first generates for all
            # copies: the trainer rewrites its rows
            rows = [dict(row) for row in self.rows for _ in range(self.G)]
            trainer.training_step(self.model, rows, None)
        trainer._generate = generate
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"sample": sum(spent), "update": time.perf_counter() - start - sum(spent)}


def make(arm: str, cell: dict):
    if arm == ARMS[0]:
        images = pictures(cell["P"], cell["image_tokens"])
        return Trl(Policy(*build_model()), images, cell["G"], cell["T"])
    return Ours(**cell, pgd_steps=0 if arm == "GRPO" else int(arm.split()[1]))


# -------------------------------------------------------------------------------- measures


def one_step(arm: str, runner, cell: dict) -> dict:
    """Seconds, CPU seconds and phases of a step; of ours the share outside the model too."""
    with counted(runner.spots()) as inside:
        start, cpu = time.perf_counter(), time.process_time()
        found = {"phases": runner.step()}
        found["seconds"] = time.perf_counter() - start
        found["cpu"] = time.process_time() - cpu
    seconds = f"{found['seconds']:.2f} s, {found['cpu']:.2f} of the CPU"
    print(f"{arm}: {seconds}", file=sys.stderr, flush=True)
    if runner.tokens != cell["P"] * cell["G"] * cell["T"]:
        raise RuntimeError(f"{arm} made {runner.tokens} tokens in {cell}: a response ended early")
    if arm != ARMS[0]:
        found["outside"] = 1 - inside[0] / found["seconds"]
    if arm.startswith("SaEI"):
        alone = median(arithmetic(runner) for _ in range(2))
        found["attack/arithmetic"] = found["phases"]["attack"] / (
            runner.config.saei.pgd_steps * alone
        )
    return found


def measure(cell: dict, arms: list[str], turns: int) -> dict:
    """arm -> a value per turn of each number of one_step, ratios to TRL, median phases."""
    runners = {arm: make(arm, cell) for arm in arms}
    found = {arm: [] for arm in arms}
    for _ in range(turns + 1):
        for arm, runner in runners.items():
            found[arm].append(one_step(arm, runner, cell))
    result = {}
    for arm in arms:
        steps = found[arm][1:]  # the first is warm-up
        result[arm] = {name: [x[name] for x in steps] for name in steps[0] if name != "phases"}
        result[arm]["phases"] = {}
        for name in steps[0]["phases"]:
            result[arm]["phases"][name] = median(x["phases"][name] for x in steps)
        if ARMS[0] in arms:
            turns_of_both = list(zip(found[ARMS[0]][1:], steps, strict=True))
            for name, key in (("ratio", "seconds"), ("cpu ratio", "cpu")):
                result[arm][name] = [trl[key] / ours[key] for trl, ours in turns_of_both]
        result[arm]["tokens/s"] = runners[arm].tokens / median(result[arm]["seconds"])
    return result


@contextlib.contextmanager
def counted(spots: list[tuple[object, str]]):
    """Seconds inside the named functions; a call within a call counts once.   -> [seconds]"""
    total, depth = [0.0], [0]
    before = [(owner, name, getattr(owner, name)) for owner, name in spots]

    def wrap(function):
        def inner(*arguments, **options):
            depth[0] += 1
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    total[0] += time.perf_counter() - start

        return inner

    for owner, name, function in before:
        setattr(owner, name, wrap(function))
    try:
        yield total
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def arithmetic(arm: Ours) -> float:
    """Seconds of the plain model's forward and backward to the pixels: prompts, clean responses."""
    (prompts, clean), policy = arm.last, arm.policy
    responses = clean.tokens.view(len(prompts), -1)  # (P, n * T)
    further = prompts.next_position[:, None] + torch.arange(responses.shape[1])
    positions = torch.cat([prompts.positions, further.expand(3, -1, -1)], dim=-1)
    ids = torch.cat([prompts.ids, responses], dim=1)
    images: list[Tensor] = [x.clone().requires_grad_() for x in prompts.images]
    with distributed.frozen(policy):
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
    """Peak memory in MiB, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", "--peak", json.dumps([arm, cell])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return float(done.stdout.splitlines()[-1])


def linear(cell: dict, turns: int) -> dict:
    """Seconds of twice the prompts, and of twice the responses, over those of the cell."""
    sizes = {"one": cell, "P": cell | {"P": 2 * cell["P"]}, "G": cell | {"G": 2 * cell["G"]}}
    found = {}
    for arm in (ARMS[1], ARMS[-1]):
        runners = {name: make(arm, size) for name, size in sizes.items()}
        seconds = {name: [] for name in sizes}
        for turn in range(turns + 1):
            for name, runner in runners.items():
                start = time.perf_counter()
                runner.step()
                if turn:  # the first is warm-up
                    seconds[name].append(time.perf_counter() - start)
        found[arm] = {}
        for name in ("P", "G"):
            pairs = zip(seconds[name], seconds["one"], strict=True)
            found[arm][name] = [twice / once for twice, once in pairs]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one size: 256 image tokens, G = 8, T = 48")
    add("--tokens", type=int, nargs="+", default=[64, 256, 1024], help="image tokens, squares")
    add("--rollouts", type=int, nargs="+", default=[8])
    add("--lengths", type=int, nargs="+", default=[48, 256])
    add("--prompts", type=int, default=2)
    add("--steps", type=int, default=5, help="turns after the warm-up")
    add("--arms", nargs="+", default=ARMS, choices=ARMS, help="in this order")
    add("--no_memory", action="store_true", help="no peak memory")
    add("--no_linear", action="store_true", help="no runs of twice P and twice G")
    add("--output", type=Path, default=ROOT / "benchmarks/step.json", help="its sizes are skipped")
    add("--peak", help=argparse.SUPPRESS)  # set by peak_apart
    args = parser.parse_args()
    torch.set_num_threads(int(THREADS))
    if args.peak:
        print(peak(*json.loads(args.peak)))
        return
    sizes = [(t, g, n) for t in args.tokens for n in args.lengths for g in args.rollouts]
    if args.quick:
        sizes = [(256, 8, 48)]
    result = {"threads": int(THREADS), "torch": torch.__version__, "steps": args.steps}
    result["cells"] = json.loads(args.output.read_text())["cells"] if args.output.exists() else []
    for tokens, G, T in sizes:
        cell = {"P": args.prompts, "image_tokens": tokens, "G": G, "T": T}
        if any(entry["cell"] == cell for entry in result["cells"]):
            continue
        found = measure(cell, args.arms, args.steps)
        for arm in args.arms:
            if not args.no_memory:
                found[arm]["peak"] = peak_apart(arm, cell)
            print(cell, arm, found[arm], flush=True)
        result["cells"].append({"cell": cell, "arms": found})
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if not args.no_linear:
        cell = {"P": args.prompts, "image_tokens": 256, "G": 8, "T": 48}
        result["linear"] = linear(cell, args.steps)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
