"""--dry_run: what a run would do and what memory it would take, before it starts and without a GPU.

It is for one of the launcher's processes (runtime/memory.py). The first step on a GPU prints its
peak beside the plan (`compare`).
"""

import os
from typing import Any, NamedTuple

import torch
import yaml

from runtime import args, distributed, rollouts
from runtime.memory import (
    GIB,
    Launch,
    Work,
    at_a_time,
    estimate,
    numbers,
    numbers_per_patch,
    parameter_bytes,
    peak,
    read_launch,
)
from runtime.rollouts import Rollouts
from runtime.run import Run, peak_memory
from vlm.policy import Policy

MEASURED_ROWS = 64  # rows whose prompts are measured


def print_plan(config: Any) -> None:
    """Print the plan of one of the launcher's processes, by the first process alone."""
    launch = read_launch()
    if os.environ.get("RANK", "0") == "0":
        print(describe(config, launch))


def load_policy(config: Any) -> Policy:
    """The policy that a run would train, without weights."""
    model = config.model
    if model.attention == "flash_attention_2":  # it may not be installed where the plan is made
        model = args.ModelArgs(**(vars(model) | {"attention": "sdpa"}))
    policy = model.load(weights=False)
    config.memory.apply(policy, config.run.seed)
    return policy


def work_of(config: Any, launch: Launch, L: int, patches: int, T: int) -> Work:
    """What one process computes at a time. Raises ValueError for a step that cannot be split."""
    cfg = config.saei
    micro, accumulated = distributed.micro_batch_size(
        cfg.prompts_per_step, cfg.updates_per_step, config.memory.micro_prompts, launch.processes
    )
    one_pass = accumulated == 1 and launch.way in ("one process", "DDP")
    return Work(cfg.prompts_per_step // launch.processes, micro, L, patches, T, one_pass)


def describe(config: Any, launch: Launch) -> str:
    """The plan as text. It reads the data as training would, and refuses what that refuses."""
    cfg, memory, run = config.saei, config.memory, config.run
    work_of(config, launch, 0, 0, 0)  # refuses before anything is read
    policy = load_policy(config)
    rows = config.data.load(
        config.data.split,
        seed=run.seed,
        prompt_tokens=policy.prompt_tokens,
        max_prompt_tokens=config.data.max_prompt_tokens,
    )
    streaming = config.data.streaming
    count = MEASURED_ROWS if streaming else min(MEASURED_ROWS, len(rows))
    rollouts.load_rewards(cfg.reward, cfg.max_new_tokens, rows[0])
    measured = measure([rows[i] for i in range(count)], policy)
    work = work_of(config, launch, measured.L, measured.patches, cfg.max_new_tokens)
    parameters = list(policy.parameters())
    trained = [p for p in parameters if p.requires_grad]
    responses = at_a_time(work.micro * cfg.rollouts, memory.micro_responses)
    sampled = at_a_time(work.prompts, memory.sample_prompts)
    epochs = "unknown" if streaming else f"{run.steps * cfg.prompts_per_step / len(rows):.2f}"
    kind = policy.model.config.model_type
    sizes = ", ".join(measured.sizes[:3]) + (" ..." if len(measured.sizes) > 3 else "")
    seen = f"(first {count} rows)"
    lines = {
        "model": f"{kind}, {numbers(parameters):,} parameters, {numbers(trained):,} trained",
        "images": f"{sizes or 'none'} {seen}",
        "image tokens": f"at most {measured.image_tokens} per prompt {seen}",
        "prompts": f"at most {work.L} tokens {seen}, limit {config.data.max_prompt_tokens}",
        "data": "streamed" if streaming else f"{len(rows):,} rows",
        "steps": f"{run.steps}, epochs {epochs}, updates {run.steps * cfg.updates_per_step}",
        "checkpoints": disk(checkpoint_bytes(policy, launch), run),
        "per step": f"{cfg.prompts_per_step} prompts x {cfg.rollouts} responses, "
        f"{cfg.adversarial_rollouts} of {cfg.rollouts} adversarial",
        "per device": f"{launch}: {work.prompts} prompts; samples {sampled} at a time, "
        f"updates {work.micro} prompts and {responses} responses at a time",
    }
    text = "".join(f"{name + ':':14}{value}\n" for name, value in lines.items())
    text += (
        "\nMemory of a device in GiB. Parameters, gradients and AdamW's state are counted, the\n"
    )
    text += "rest is estimated, for the longest prompt above and responses of "
    text += (
        f"{cfg.max_new_tokens} tokens.\nThe waste of the allocator and CUDA itself come on top.\n"
    )
    text += in_gib(estimate(config, policy, work, launch))
    if config.engine.engine == ["vllm"]:
        text += (
            f"vLLM takes {config.engine.engine_memory:.0%} of the device on top, and gives most "
        )
        text += "of it back in the update.\n"
    text += "\nSettings that differ from the defaults:\n"
    text += yaml.safe_dump(args.changed(config), sort_keys=False)
    return text + "\ndry run: nothing was trained or written"


def in_gib(parts: dict[str, int]) -> str:
    """A line for each part, and their peak."""
    lines = {name: size / GIB for name, size in parts.items()}
    lines["in all, with the largest phase"] = peak(parts) / GIB
    return "".join(f"  {name:42}{size:9.2f}\n" for name, size in lines.items())


def checkpoint_bytes(policy: Policy, launch: Launch) -> int:
    """Of parameters and AdamW's state. DeepSpeed's has float32 parameters beside bfloat16 ones."""
    parameters = list(policy.parameters())
    trained = [p for p in parameters if p.requires_grad]
    if launch.way.startswith("ZeRO") and launch.bfloat16:
        return 2 * numbers(parameters) + 12 * numbers(trained)
    return parameter_bytes(parameters) + 2 * parameter_bytes(trained)


def compare(config: Any, run: Run, sampled: Rollouts, step: int) -> None:
    """After a run's first step on a GPU: its peak beside the plan for its own sizes."""
    if step != run.first_step or not run.is_main or run.accelerator.device.type != "cuda":
        return
    launch, policy, prompts = read_launch(), load_policy(config), sampled.prompts
    patches = []
    for i in range(len(prompts)):
        patches.append(patches_of(policy, prompts[i : i + 1].images))
    L, T = prompts.ids.shape[1], max(part.tokens.shape[1] for part in sampled.responses)
    work = work_of(config, launch, L, max(patches), T)
    planned = peak(estimate(config, policy, work, launch)) / GIB
    run.bar.write(
        f"step {step + 1}: peak memory {peak_memory() / GIB:.1f} GiB, planned {planned:.1f} GiB "
        f"for its prompts of {L} and responses of {T} tokens"
    )


def disk(size: int, run: args.RunArgs) -> str:
    """What checkpoints of `size` bytes take. A new one is whole before an old one goes."""
    written = -(-run.steps // run.save_every)
    kept = min(written, run.keep_last or written)
    most = min(written, kept + 1)
    text = f"{size / 1e9:.2f} GB each, {written} written, {'all' if kept == written else kept} kept"
    return f"{text}: at most {most * size / 1e9:.2f} GB on the disk"


class Measured(NamedTuple):
    """Of some rows: the longest prompt, its images."""

    L: int
    image_tokens: int
    patches: int
    sizes: list[str]


def measure(rows: list[dict], policy: Policy) -> Measured:
    """The largest prompts of the rows, and the sizes of their images."""
    L = image_tokens = patches = 0
    sizes = set()
    for row in rows:
        prompt = policy.tokenize(row["problem"], row["images"])
        is_image = prompt.inputs["input_ids"] == policy.model.config.image_token_id
        L, image_tokens = max(L, prompt.length), max(image_tokens, int(is_image.sum()))
        patches = max(patches, patches_of(policy, prompt.images))
        sizes |= {f"{x.shape[2]} x {x.shape[1]}" for x in prompt.images}
    return Measured(L, image_tokens, patches, sorted(sizes))


def patches_of(policy: Policy, images: list[torch.Tensor]) -> int:
    """Patches that the vision tower computes of one prompt's images."""
    if not images:
        return 0
    return policy.to_pixel_values(images)["pixel_values"].numel() // numbers_per_patch(policy)
