"""What benchmarks/gpu.py measures: python -m benchmarks.gpu_jobs PART, a process for each part.

A part is a list of jobs (JOBS). A job gets its section of the Report, which is written after every
entry, and a folder for its files. `toy` makes it small enough for a CPU in the tests. Training goes
through train_saei.main, so it follows every change of the loop, and the seconds are those of
metrics.jsonl.
"""

import argparse
import contextlib
import copy
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, median
from unittest import mock

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

import egas
import grpo
import rewards
import train_saei
from benchmarks import models
from demo.task import make_row
from runtime import memory, plan
from runtime import run as runs
from runtime.run import Clock
from tests.short_run import write_rows
from vlm import policy as policies
from vlm.decode import Decoder
from vlm.policy import Policy, Responses

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "benchmarks/gpu_demo.json"  # the demo's curves on a CPU
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GIB = 2**30
BLOCK = 40  # steps of the demo's curve that are averaged
NOT_METRICS = ("seconds", "memory")  # what differs between equal runs


class Report:
    """What was found, written to a file after every entry, and how long a job may go on."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.end = path, time.monotonic() + seconds
        self.whole = self.found = {}

    def section(self, name: str, share: float) -> "Report":
        """A part of this report, with a share of the time that is left."""
        section = copy.copy(self)
        section.found = self.found[name] = {}
        section.end = time.monotonic() + share * self.left()
        return section

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def __setitem__(self, name: str, value: object) -> None:
        self.found[name] = value
        aside = self.path.with_suffix(".new")
        aside.write_text(json.dumps(self.whole, indent=1))
        aside.replace(self.path)
        print(f"{name}: {json.dumps(value):.300}", flush=True)

    def try_to(self, name: str, function: Callable, *args, needs: float = 0, **options) -> bool:
        """Enter function(*args, **options), its error, or that too little time is left.

        needs: seconds that it is expected to take.   -> whether it was done
        """
        if self.left() < needs:
            self[name] = {"skipped": "time"}
            return False
        start = time.monotonic()
        try:
            found = function(*args, **options)
        except Exception as error:
            traceback.print_exc()
            self[name] = {"error": said(error), "took": time.monotonic() - start}
            return False
        finally:
            free_memory()
        if isinstance(found, dict):
            found["took"] = time.monotonic() - start
        self[name] = found
        return True


def said(error: BaseException) -> str:
    """Its kind and the first line of its message, 300 characters at most."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def free_memory() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


# ------------------------------------------------------------------------- runs of train_saei.main


def last_number(completions: list[str], answer: list[str], **_) -> list[float]:
    """Accuracy without math-verify, which a bare machine lacks: the last number in a box."""
    scores = []
    for text, gold in zip(completions, answer, strict=True):
        boxes = re.findall(r"\\boxed\{\s*(-?\d+)\s*\}", text)
        scores.append(float(bool(boxes) and int(boxes[-1]) == int(gold)))
    return scores


def every_other(completions: list[str], **_) -> list[float]:
    """What random weights earn: there is a gradient in every group."""
    return [i % 2.0 for i in range(len(completions))]


def reset_accelerator() -> None:
    """accelerate keeps the first run's device and precision for all later ones of a process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(accuracy: Callable, precision: str = "no", **options) -> list[dict]:
    """A run of train_saei.main, on the GPU if there is one.   -> its lines of metrics.jsonl"""
    reset_accelerator()
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    with mock.patch.object(rewards, "accuracy_reward", accuracy):
        config = train_saei.load_config(**options)
        train_saei.main(config)
    return metrics_of(Path(config.run.output))


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values_of(lines: list[dict]) -> list[dict]:
    """Without what differs between equal runs."""
    kept = []
    for line in lines:
        kept.append({k: value for k, value in line.items() if not k.startswith(NOT_METRICS)})
    return kept


# ------------------------------------------------------------------------------ (a) demo


CURVES = ("accuracy", "reward", "entropy/clean", "grad_norm")  # of every step


def train_demo(folder: Path, steps: int, micro_prompts: int = 8) -> dict[str, list[float]]:
    """recipes/demo.yaml on this device.   -> {metric: a value per step}

    Where a SIGTERM stops it, of the steps until then.
    """
    options = {"config": str(ROOT / "recipes/demo.yaml"), "output": str(folder)}
    options |= {"overwrite": True, "steps": steps, "micro_prompts": micro_prompts}
    with contextlib.suppress(SystemExit):
        train(last_number, **options)
    lines = metrics_of(folder)
    return {name: [line[name] for line in lines] for name in (*CURVES, "seconds/step")}


def demo(report: Report, folder: Path, toy: bool) -> None:
    """160 steps of the demo on this device, fewer if time ends, beside the same steps on a CPU."""
    if report.left() < 30:
        report["skipped"] = "time"
        return
    stop = threading.Timer(report.left() - 10, os.kill, (os.getpid(), signal.SIGTERM))
    stop.start()
    try:
        curves = train_demo(folder / "demo", 1 if toy else 160)
    finally:
        stop.cancel()
    report["seconds per step"] = median(curves["seconds/step"])
    report["curves"] = curves
    reference = json.loads(REFERENCE.read_text())
    report["against the CPU"] = compare_curves(curves, reference["runs"])


def write_reference(folder: Path) -> None:
    """Make REFERENCE on this CPU: the demo three times, in micro-batches of other sizes."""
    found = []
    for micro_prompts in (8, 4, 2):
        curves = train_demo(folder / f"micro-{micro_prompts}", 160, micro_prompts)
        found.append({"micro_prompts": micro_prompts} | {name: curves[name] for name in CURVES})
    reference = {"command": "python -m benchmarks.gpu_jobs reference"}
    reference |= {"torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps(reference | {"runs": found}, indent=1)
    REFERENCE.write_text(re.sub(r"\n {4,}|(?<=\d)\n   (?=\])", " ", text) + "\n")


def compare_curves(curves: dict[str, list], on_cpus: list[dict]) -> dict[str, object]:
    """Is the accuracy of this device's training that of the CPU's, up to rounding's noise?

    on_cpus: CPU runs of the same seed that differ in micro-batches, so in rounding alone. Means
    over blocks of BLOCK steps are compared with the means of theirs. The limit is three times the
    widest range of the CPU runs in any block, and at least 0.03.
    """
    runs = [run["accuracy"] for run in on_cpus]
    steps = len(curves["accuracy"])
    blocks = [slice(start, min(start + BLOCK, steps)) for start in range(0, steps, BLOCK)]
    on_cpu = [[mean(run[block]) for run in runs] for block in blocks]
    limit = max(0.03, 3 * max(max(values) - min(values) for values in on_cpu))
    here = [mean(curves["accuracy"][block]) for block in blocks]
    apart = [abs(x - mean(values)) for x, values in zip(here, on_cpu, strict=True)]
    return {
        "accuracy, blocks": here,
        "accuracy on CPUs, blocks": on_cpu,
        "largest difference": max(apart),
        "limit": limit,
        "first step's difference": abs(curves["accuracy"][0] - runs[0][0]),
        "the same learning": max(apart) <= limit,
    }


# ------------------------------------------------------------------------------ (a) numbers, tests


def tests(report: Report, folder: Path, toy: bool) -> None:
    """tests/test_device.py in this process. toy: two of its tests."""
    import pytest

    outcomes = {}

    class Collector:
        def pytest_runtest_logreport(self, report):
            name = report.nodeid.split("::")[-1]
            if report.when == "call" or report.outcome != "passed":
                outcomes[name] = report.outcome
                if report.failed:
                    failures[name] = str(report.longrepr)[-1500:]

    failures = {}
    arguments = ["-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'tests'}"]
    arguments += ["-k", "prompts or samples"] if toy else []
    code = pytest.main([*arguments, str(ROOT / "tests/test_device.py")], [Collector()])
    report["exit code"] = int(code)
    report["outcomes"] = outcomes
    report["failures"] = failures


def numbers(report: Report, folder: Path, toy: bool) -> None:
    """One step's numbers: CPU and device in float32 against float64, and bfloat16's ratios."""
    from tests import device_cases as cases

    device = cases.device()
    exact = cases.demo_policy("cpu", "float64")
    responses = cases.sample(exact)
    expected = cases.numbers(exact, responses)
    found = {}
    for name in ("cpu", device.type):
        policy = cases.demo_policy(name)
        found[name] = cases.numbers(policy, responses)
        report[f"{name} against float64"] = cases.differences(found[name], expected)
        same = cases.sample(policy).tokens.cpu() == responses.tokens
        report[f"{name}: share of equal tokens"] = same.float().mean().item()
        if name == device.type:
            report.try_to(f"{name}: self-check", policy.self_check)
    report[f"{device.type} against cpu"] = cases.differences(found[device.type], found["cpu"])
    for name in ("float32", "autocast bfloat16", "bfloat16"):
        policy = cases.demo_policy(device, name if name == "bfloat16" else "float32")
        with torch.autocast(device.type, torch.bfloat16, enabled=name.startswith("autocast")):
            report[f"|ratio - 1|, {name}"] = cases.ratios(policy)


# ------------------------------------------------------------------------------ (b) steps


class Work:
    """A model with random weights, rows of one picture each, and the sizes of a step.

    model: a name of benchmarks/models.py, of real widths. toy: the demo's model instead.
    """

    def __init__(self, model: str, folder: Path, toy: bool):
        self.name, self.folder, self.toy = model, folder / model, toy
        self.P, self.G, self.T = (2, 4, 6) if toy else (4, 8, 512)
        self.image_tokens = (4,) if toy else (256, 1024)  # squares
        if toy:
            self.side = 32  # pixels of an image token
            shutil.copytree(ROOT / "demo/mixed", self.folder, dirs_exist_ok=True)
        else:
            self.side = models.write(model, self.folder)

    def pictures(self, image_tokens: int) -> list[Image.Image]:
        """P pictures of so many image tokens, a square number."""
        side = self.side * int(image_tokens**0.5)
        rows = [make_row("plain/train", i) for i in range(self.P)]
        return [row["images"][0].resize((side, side)) for row in rows]

    def rows(self, image_tokens: int) -> str:
        """A file of P rows with a picture each."""
        folder = self.folder / f"rows-{image_tokens}"
        folder.mkdir(exist_ok=True)
        rows = []
        for i, picture in enumerate(self.pictures(image_tokens)):
            rows.append((make_row("plain/train", i)["problem"], [picture]))
        return write_rows(folder, rows)

    def options(self, image_tokens: int, arm: str) -> dict:
        """Of a run of train_saei.py."""
        options = {"model": str(self.folder), "dataset": self.rows(image_tokens)}
        options |= {"split": "train", "output": str(self.folder / "run"), "overwrite": True}
        options |= {"prompts_per_step": self.P, "rollouts": self.G, "max_new_tokens": self.T}
        options |= {"self_check": False, "reward": ["accuracy:1"]} | ARMS[arm]
        return options | {"adversarial_rollouts": self.G // 2}


ARMS = {
    "GRPO": {"intervention": "none"},
    "SaEI, 1 PGD step": {"pgd_steps": 1},
    "SaEI, 3 PGD steps": {"pgd_steps": 3},
}
# From the quickest to the one that takes least memory. The first that the plan finds room for is
# taken, and the next one if memory does not suffice.
SETTINGS = {
    "all prompts": {"micro_prompts": 4},
    "1 prompt, 8 responses": {"micro_prompts": 1},
    "1 prompt, 4 responses": {"micro_prompts": 1, "micro_responses": 4},
    "all prompts, 8 responses, layers recomputed": {
        "micro_prompts": 4,
        "micro_responses": 8,
        "gradient_checkpointing": True,
    },
    "1 prompt, 4 responses, layers recomputed": {
        "micro_prompts": 1,
        "micro_responses": 4,
        "gradient_checkpointing": True,
    },
}
MODELS = {  # precision of the run, options
    "3B": ("bf16", {"dtype": "float32"}),
    "7B": ("no", {"dtype": "bfloat16", "lora_rank": 64}),
    "Qwen3-VL-4B": ("no", {"dtype": "bfloat16", "lora_rank": 64}),
}


@contextlib.contextmanager
def random_weights() -> Iterator[None]:
    """Inside, folders without weights load, with weights drawn on the device, and no response ends
    early. Checkpoints are not written: one would take as long as many steps.
    """
    load, from_pretrained = policies.load_model, Policy.from_pretrained

    def draw(folder: str, config, weights: bool = True, **options):
        if not weights:
            return load(folder, config, weights, **options)
        torch.manual_seed(0)
        with torch.device(DEVICE):
            return AutoModelForImageTextToText.from_config(config, **options)

    def endless(*args, **options) -> Policy:
        policy = from_pretrained(*args, **options)
        policy.banned[policy.eos_ids] = True
        return policy

    with (
        mock.patch.object(policies, "load_model", draw),
        mock.patch.object(Policy, "from_pretrained", endless),
        mock.patch.object(runs.Run, "_save", lambda *_: None),
    ):
        yield


@functools.cache
def without_weights(folder: str, options: tuple) -> Policy:
    """What a plan is made of. options: (name, value) pairs of train_saei.py"""
    return plan.load_policy(train_saei.load_config(model=folder, **dict(options)))


def planned(options: dict, setting: dict, precision: str) -> float:
    """Bytes at the peak of a step, as --dry_run says."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    config, launch = train_saei.load_config(**options, **setting), memory.read_launch()
    of_model = {name: options[name] for name in ("dtype", "lora_rank") if name in options}
    policy = without_weights(options["model"], tuple(of_model.items()))
    measured = plan.measure([config.data.load(config.data.split)[0]], policy)
    T = config.saei.max_new_tokens
    work = plan.work_of(config, launch, measured.L, measured.patches, T)
    return memory.peak(memory.estimate(config, policy, work, launch))


def steps(report: Report, folder: Path, toy: bool, model: str) -> None:
    """Seconds per phase and peak memory of a step: GRPO, SaEI with 1 and 3 PGD steps."""
    precision, options = MODELS[model]
    if "lora_rank" in options and importlib.util.find_spec("peft") is None:
        report["left out"] = "peft is not installed: no LoRA"
        return
    work, two_steps = Work(model, folder, toy), 0.0  # seconds of the last arm
    report["work"] = {"P": work.P, "G": work.G, "T": work.T, "precision": precision} | options
    cells = []
    for arms in (("GRPO", "SaEI, 3 PGD steps"), ("SaEI, 1 PGD step",)):
        for image_tokens in reversed(work.image_tokens):
            cells += [(image_tokens, arm) for arm in arms]
    with random_weights():
        for image_tokens, arm in cells:
            common = work.options(image_tokens, arm) | options
            steps = 2 if report.left() > two_steps else 1  # else the first has to do
            start = time.monotonic()
            name = f"{image_tokens} image tokens, {arm}"
            needs, common = 0.5 * two_steps, common | {"steps": steps}
            if report.try_to(name, measured_steps, common, precision, needs=needs):
                two_steps = (time.monotonic() - start) * 2 / steps


def measured_steps(options: dict, precision: str) -> dict:
    """Of a run's last step: seconds per phase, peak memory, the plan's.

    SETTINGS are tried one after the other.
    """
    room = torch.cuda.get_device_properties(0).total_memory if CUDA else float("inf")
    plans, errors = {}, {}
    for name, setting in SETTINGS.items():
        plans[name] = planned(options, setting, precision)
        if plans[name] > 0.95 * room:
            continue
        try:
            free_memory()
            held = torch.cuda.memory_allocated() if CUDA else 0
            lines = train(every_other, precision, **options, **setting)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "ALLOC" not in str(error):
                raise
            errors[name] = said(error)
            continue
        seconds = {k: value for k, value in lines[-1].items() if k.startswith("seconds/")}
        found = {"setting": name, "planned GiB": plans[name] / GIB}
        found |= {"peak GiB": lines[-1]["memory_gib"], "first step": lines[0]["seconds/step"]}
        found["steps"] = len(lines)
        found |= {"tokens": lines[-1]["length"] * options["prompts_per_step"] * options["rollouts"]}
        return found | seconds | {"GiB held before": held / GIB, "out of memory": errors}
    raise MemoryError(f"no setting fits: {plans}, {errors}")


# ------------------------------------------------------------------------------ (b) decoding


def seconds_of(function: Callable, times: int = 3) -> float:
    """Median over calls after one that warms up."""
    found = []
    for _ in range(times + 1):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        found.append(time.perf_counter() - start)
    return median(found[1:])


def decode(report: Report, folder: Path, toy: bool) -> None:
    """Prompt pass, decoding, scoring and a PGD step of the 3B model, by attention."""
    work = Work("3B", folder, toy)
    report["work"] = {"P": work.P, "n": work.G, "image tokens": work.image_tokens[-1]}
    names = ["sdpa", "eager"]
    if importlib.util.find_spec("flash_attn"):
        names.insert(0, "flash_attention_2")
    else:
        report["flash_attention_2"] = {"left out": "flash_attn is not installed"}
    for name in names:
        report.try_to(name, attention_seconds, work, name, needs=20 * (not toy))


def attention_seconds(work: Work, attention: str) -> dict:
    """Seconds. `token`: of one decode step of all P * n rows, by each way."""
    image_tokens = work.image_tokens[-1]
    with random_weights():
        policy = Policy.from_pretrained(str(work.folder), "bfloat16", attention).to(DEVICE)
    policy.requires_grad_(False)
    rows = [make_row("plain/train", i) for i in range(work.P)]
    pictures = [[picture] for picture in work.pictures(image_tokens)]
    prompts = policy.encode([row["problem"] for row in rows], pictures)
    with torch.no_grad():
        found = {"prompt pass": seconds_of(lambda: policy.read(prompts))}
        read = policy.read(prompts)
        seeds = list(range(work.P))

        def sample(T: int) -> Responses:
            return policy.sample(prompts, work.G, seeds, T, read=read)

        ways = {"static": False, "graph": True} if CUDA else {"static": False}
        for way, graphs in ways.items():
            with mock.patch.object(Decoder, "use_graphs", graphs):
                found[f"token, {way}"] = seconds_per_token(sample, work.toy)
                if graphs and not Decoder.use_graphs:
                    found["graph"] = {"error": "the capture failed, see log.txt"}
        inputs = plain_inputs(policy, work, image_tokens)
        by_generate = partial(generate, policy, inputs)
        found["token, transformers' generate"] = seconds_per_token(by_generate, work.toy)
        responses = sample(8 if work.toy else 128)
        score = partial(policy.score, prompts, responses.tokens, responses.mask)
        found["score"] = seconds_of(score, times=1)
    one = prompts[:1]  # one prompt at a time, which fits without recomputation
    tokens, mask = responses.tokens[: work.G], responses.mask[: work.G]

    def objective(images: list[Tensor]) -> Tensor:
        return policy.score(one.with_images(images), tokens, mask)[1].mean()

    pgd = partial(egas.pgd_ascent, objective, one.images, 2 / 255, steps=1)
    found["PGD step of one prompt"] = seconds_of(pgd, times=1)
    return found | {"peak GiB": runs.peak_memory() / GIB}


def seconds_per_token(sample: Callable, toy: bool) -> float:
    """From two lengths, so that the prompt and a capture do not count. sample(T)"""
    short, long = (2, 12) if toy else (32, 160)
    seconds = [seconds_of(partial(sample, T), times=1) for T in (short, long)]
    return (seconds[1] - seconds[0]) / (long - short)


# ------------------------------------------------------------------------------ (c) other trainers


def baseline(report: Report, folder: Path, toy: bool) -> None:
    """The same work by the usual way: TRL if it is there, and transformers' own functions."""
    precision, options = MODELS["3B"]
    work = Work("3B", folder, toy)
    report["work"] = {"P": work.P, "G": work.G, "T": work.T, "precision": precision} | options
    for image_tokens in reversed(work.image_tokens):
        name = f"{image_tokens} image tokens, generate and repeated prompts"
        report.try_to(name, repeated_prompts, work, image_tokens, needs=30 * (not toy))
        if importlib.util.find_spec("trl") is None:
            report["TRL"] = {"left out": "trl is not installed"}
        else:
            name = f"{image_tokens} image tokens, TRL's GRPOTrainer"
            report.try_to(name, trl, work, image_tokens, needs=60 * (not toy))


def plain_inputs(policy: Policy, work: Work, image_tokens: int) -> dict[str, Tensor]:
    """The processor's inputs of P prompts, each G times. All have one question: one length."""
    rows, columns = [], {}
    for picture in work.pictures(image_tokens):
        inputs = policy.tokenize("How many pips does the red die show?", [picture]).inputs
        rows += [inputs] * work.G
    for name in rows[0]:
        columns[name] = torch.cat([row[name] for row in rows]).to(policy.device)
    return columns


@torch.no_grad()
def generate(policy: Policy, inputs: dict[str, Tensor], T: int) -> Tensor:
    """transformers' own sampling, T tokens whatever they are.   -> (N, T)"""
    banned = policy.banned[: len(policy.processor.tokenizer)].nonzero().flatten().tolist()
    options = {"max_new_tokens": T, "min_new_tokens": T, "suppress_tokens": banned}
    options |= {"do_sample": True, "top_k": 0, "top_p": 1.0, "use_cache": True}
    return policy.model.eval().generate(**inputs, **options)[:, -T:]


def repeated_prompts(work: Work, image_tokens: int) -> dict[str, float]:
    """A GRPO step as trainers take it: generate, then forward and backward of prompt and response.

    Prompt and picture are computed once per response. Recomputed layers, micro-batches of 4 rows,
    float32 weights, autocast to bfloat16, AdamW.
    """
    with random_weights():
        policy = Policy.from_pretrained(str(work.folder), "float32", "sdpa").to(DEVICE)
    model, N = policy.model, work.P * work.G
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, fused=CUDA)
    inputs = plain_inputs(policy, work, image_tokens)
    advantages = torch.tensor([-1.0, 1.0], device=DEVICE).repeat(N // 2)

    def update(tokens: Tensor) -> None:
        model.train()
        T = tokens.shape[1]
        pictures = len(inputs["pixel_values"]) // N  # patches of a row
        for rows in torch.arange(N).split(4):
            batch = {}
            for name, x in inputs.items():
                if name == "pixel_values":
                    batch[name] = x[rows[0] * pictures : (rows[-1] + 1) * pictures]
                elif name == "image_grid_thw":
                    batch[name] = x[rows]
                else:
                    end = torch.ones_like(tokens[rows]) if name == "attention_mask" else 0
                    end = tokens[rows] if name == "input_ids" else end
                    batch[name] = torch.cat([x[rows], end + torch.zeros_like(tokens[rows])], dim=1)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                logits = model(**batch, use_cache=False, logits_to_keep=T + 1).logits[:, :-1]
            logprobs = grpo.token_logprobs(logits, tokens[rows])
            (-(advantages[rows, None] * logprobs).sum() / (N * T)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def sample(T: int) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return generate(policy, inputs, T)

    update(sample(8))  # warms up
    laps = Clock(DEVICE)
    tokens = sample(work.T)
    laps.lap("sample")
    update(tokens)
    laps.lap("update")
    return laps.seconds() | {"peak GiB": runs.peak_memory() / GIB, "tokens": tokens.numel()}


def trl(work: Work, image_tokens: int) -> dict[str, float]:
    """A step of TRL's GRPOTrainer, as in benchmarks/step.py, in the same precision."""
    from benchmarks import step

    with random_weights():
        policy = Policy.from_pretrained(str(work.folder), "float32", "sdpa")
    on_gpu = {"use_cpu": False, "bf16": True, "gradient_checkpointing": True} if CUDA else {}
    micro_batches = work.P * work.G // 4
    runner = step.Trl(policy, work.pictures(image_tokens), work.G, work.T, micro_batches, **on_gpu)
    runner.step()
    synchronize()
    start = time.perf_counter()
    laps = runner.step()
    synchronize()
    found = {f"seconds/{name}": seconds for name, seconds in laps.items()}
    found |= {"seconds/step": time.perf_counter() - start, "tokens": runner.tokens}
    return found | {"peak GiB": runs.peak_memory() / GIB}


# ------------------------------------------------------------------------------ (d) faults


def run_options(folder: Path, toy: bool, resume: bool = False, steps: int = 4) -> dict:
    """Four steps of the demo's model with a checkpoint after the second."""
    options = {"model": "demo/mixed", "split": "plain/train", "output": str(folder)}
    options |= {"steps": steps, "save_every": 2, "prompts_per_step": 4, "micro_prompts": 2}
    options |= {"rollouts": 4, "adversarial_rollouts": 2, "lr": 1e-3}
    options |= {"max_new_tokens": 6 if toy else 24, "pgd_steps": 2}
    return options | {"self_check": False, "resume": resume, "overwrite": not resume}


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Of a run's last checkpoint."""
    return load_file(max((folder / "checkpoints").glob("step-*")) / "model.safetensors")


def equal_runs(one: Path, other: Path) -> dict[str, object]:
    """Metrics and last parameters, bit for bit; how far they are apart."""
    a, b = values_of(metrics_of(one)), values_of(metrics_of(other))
    lines = [x == y for x, y in zip(a, b, strict=True)]
    ours, theirs = weights_of(one), weights_of(other)
    apart = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    return {
        "equal metrics of steps": lines,
        "equal parameters": all(torch.equal(ours[name], theirs[name]) for name in ours),
        "parameters apart": apart,
    }


def child(order: dict, environment: dict | None = None) -> subprocess.Popen:
    """A run of its own process: see `obey`."""
    command = [sys.executable, "-m", "benchmarks.gpu_jobs", "--obey", json.dumps(order)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | (environment or {}), **pipes)


def obey(order: dict) -> None:
    """Train. deterministic: such operators. kill_at: kill -9 when rewards are asked that often.

    backend: of several processes, instead of accelerate's choice. collective: only try it.
    """
    if order.get("deterministic"):
        torch.use_deterministic_algorithms(True, warn_only=True)
    if backend := order.get("backend"):
        torch.distributed.init_process_group(backend)
    if order.get("collective"):
        x = torch.ones(1, device=DEVICE)
        torch.distributed.all_reduce(x)
        print(f"sum {x.item():g}")
        return
    calls = []

    def rewarded(completions: list[str], **_) -> list[float]:
        calls.append(1)
        if len(calls) == order.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        return every_other(completions)

    train(rewarded, **order["options"])


def resume(report: Report, folder: Path, toy: bool) -> None:
    """kill -9 after a checkpoint, then resume: bit for bit the run that nothing interrupts.

    Are two equal runs equal on this device? With its usual operators, and with deterministic ones.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic with this alone
    for kind in ("usual", "deterministic"):
        torch.use_deterministic_algorithms(kind == "deterministic", warn_only=True)
        folders = [folder / f"{kind}-{i}" for i in range(2)]
        for path in folders:
            train(every_other, **run_options(path, toy))
        report[f"two runs, {kind} operators"] = equal_runs(*folders)
    cut = folder / "cut"
    killed = child({"options": run_options(cut, toy), "deterministic": True, "kill_at": 4})
    killed.communicate(timeout=max(1, report.left()))
    report["killed with"] = killed.returncode
    report["checkpoints left"] = sorted(x.name for x in (cut / "checkpoints").glob("step-*"))
    train(every_other, **run_options(cut, toy, resume=True))
    report["resumed, deterministic operators"] = equal_runs(folder / "deterministic-0", cut)
    torch.use_deterministic_algorithms(False)


def pair(order: dict, seconds: float) -> list[str]:
    """The last lines of two processes. Raises RuntimeError if one fails or they do not end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started, outputs = [], []
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for rank in range(2):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": "0"}  # one device for both
        environment |= {} if CUDA else {"ACCELERATE_USE_CPU": "true"}
        started.append(child(order, environment))
    try:
        for process in started:
            outputs.append(process.communicate(timeout=max(1, seconds))[0])
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"they did not end in {seconds:.0f} s") from error
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        if process.returncode:
            lines = [line for line in output.splitlines() if "Error" in line] or [""]
            raise RuntimeError(f"exit code {process.returncode}: {lines[-1]:.250}")
    return [output.strip().splitlines()[-1][-200:] for output in outputs]


def processes(report: Report, folder: Path, toy: bool) -> None:
    """Two processes on one device, joined by gloo, against one: the same up to rounding."""
    if CUDA:
        report.try_to("NCCL", pair, {"backend": "nccl", "collective": True}, 25)
    options = run_options(folder / "two", toy, steps=2)
    pair({"options": options, "backend": "gloo" if CUDA else None}, report.left())
    train(every_other, **run_options(folder / "one", toy, steps=2))
    start = load_file(ROOT / "demo/mixed/model.safetensors")
    one, two = weights_of(folder / "one"), weights_of(folder / "two")
    moved = torch.cat([(one[name] - start[name].float()).flatten() for name in one])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
    report["apart, share of the distance moved"] = (apart.norm() / moved.norm()).item()


# ------------------------------------------------------------------------------ the machine


def machine() -> dict[str, object]:
    """The device and the versions of what matters."""
    packages = ("torch", "transformers", "accelerate", "numpy", "peft", "trl", "flash_attn")
    versions, missing = {}, []
    for name in packages:
        if importlib.util.find_spec(name):
            versions[name] = importlib.metadata.version(name)
        else:
            missing.append(name)
    versions |= {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    found = {"device": "CPU", "versions": versions, "not installed": missing}
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory GiB": properties.total_memory / GIB}
        found["TF32 in products"] = torch.backends.cuda.matmul.allow_tf32
        found["TF32 in convolutions"] = torch.backends.cudnn.allow_tf32
    return found


# ------------------------------------------------------------------------------ the command

JOBS = {  # part -> name: (job, its share of the time that is left)
    "a": {"numbers": (numbers, 0.2), "tests": (tests, 0.4), "demo": (demo, 1.0)},
    "b": {
        "3B": (partial(steps, model="3B"), 0.5),
        "decode": (decode, 0.4),
        "7B": (partial(steps, model="7B"), 0.8),
        "Qwen3-VL-4B": (partial(steps, model="Qwen3-VL-4B"), 1.0),
    },
    "c": {"baseline": (baseline, 1.0)},
    "d": {"resume": (resume, 0.6), "processes": (processes, 1.0)},
}


def run_jobs(part: str, report: Report, folder: Path, toy: bool) -> None:
    """All jobs of a part. One that fails leaves its error and what it has found."""
    report["machine"] = machine()
    for name, (job, share) in JOBS[part].items():
        section = report.section(name, share)
        print(f"-- {name}", flush=True)
        try:
            job(section, folder, toy)
        except Exception as error:
            traceback.print_exc()
            section["error"] = said(error)
        free_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("part", nargs="?", choices=[*JOBS, "reference"])
    add("--report", type=Path, help="the file to write")
    add("--folder", type=Path, help="for models and runs")
    add("--seconds", type=float, default=600)
    add("--toy", action="store_true")
    add("--obey", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not CUDA:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if args.obey:
        return obey(json.loads(args.obey))
    if args.part == "reference":
        return write_reference(Path(tempfile.mkdtemp()))
    args.folder.mkdir(parents=True, exist_ok=True)
    run_jobs(args.part, Report(args.report, args.seconds), args.folder, args.toy)


if __name__ == "__main__":
    main()
