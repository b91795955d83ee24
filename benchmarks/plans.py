"""The memory that each GPU recipe is planned to take: python -m benchmarks.plans

Writes the tables of docs/scaling.md and recipes/README.md and the figures in the recipes' comments,
for the longest prompt that a recipe allows and pictures of the largest size. The plan is that of
--dry_run (runtime/memory.py). Beside it stands `by_hand`: a few products of published sizes, which
share no code with the plan. Nothing is downloaded (benchmarks/models.py), and no GPU is needed.
"""

import re
import shlex
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

from accelerate.commands.launch import launch_command_parser

import train_saei
from benchmarks import models
from benchmarks.tables import fill
from runtime import launch, plan
from runtime.memory import GIB, Launch, Work, estimate, peak, read_launch
from study.tables import table
from vlm.policy import LOGITS_PER_CHUNK, Policy

ROOT = Path(__file__).resolve().parent.parent
ZERO_2 = "recipes/accelerate/zero2.yaml"
DEFAULTS = ["--num_machines", "1", "--dynamo_backend", "no"]  # else accelerate says them
ROOM = 0.87  # the share of a card that a plan may take: the allocator wastes some, CUDA takes some
CARDS = {  # recipe -> what it is written for
    "geometry3k_saei": "8 x 80 GB",
    "geometry3k_noisyrollout": "8 x 80 GB",
    "geometry3k_grpo": "8 x 80 GB",
    "geometry3k_3b": "8 x 80 GB",
    "qwen3_vl_4b": "8 x 80 GB",
    "qwen3_5_4b": "8 x 80 GB",
    "clevr_count": "4 x 80 GB",
    "geometry3k_3b_80gb": "80 GB",
    "geometry3k_lora": "24 GB",
    "geometry3k_lora_16gb": "16 GB",
    "smolvlm_small_gpu": "12 GB",
}


def command(recipe: str) -> list[str]:
    """The words behind `accelerate launch` or python in a recipe's comment."""
    text = (ROOT / f"recipes/{recipe}.yaml").read_text().replace("\\\n#", " ")
    return shlex.split(re.search(r"# accelerate launch (.*)", text)[1])


def launch_of(words: list[str]) -> Launch:
    """What accelerate would tell each process of this command."""
    args = launch_command_parser().parse_args([*DEFAULTS, *words])
    with mock.patch.dict("os.environ", {"OMP_NUM_THREADS": "1"}, clear=True):
        found = launch.environment(args)
    with mock.patch.dict("os.environ", found, clear=True):
        return read_launch()


@cache
def load(recipe: str) -> tuple[train_saei.Config, Policy]:
    """A recipe's options, and its model without weights."""
    config = train_saei.load_config(["--config", str(ROOT / f"recipes/{recipe}.yaml")])
    hub_id = config.model.model
    with tempfile.TemporaryDirectory() as folder:
        models.write(models.BY_HUB_ID[hub_id], folder)
        config.model.model = folder
        policy = plan.load_policy(config)
    config.model.model = hub_id
    return config, policy


def longest(config: train_saei.Config, launched: Launch) -> Work:
    """A device's work for the longest prompt and response that a recipe allows."""
    vision = models.MODELS[models.BY_HUB_ID[config.model.model]].vision
    L, patch = config.data.max_prompt_tokens, vision.get("patch_size", 14)
    if side := vision.get("image_size"):
        patches = (side // patch) ** 2
    elif config.model.max_pixels:
        patches = config.model.max_pixels // patch**2
    else:
        patches = 4 * L  # the whole prompt is one picture
    return plan.work_of(config, launched, L, patches, config.saei.max_new_tokens)


def planned(recipe: str, words: list[str]) -> dict[str, int]:
    """Bytes by part."""
    (config, policy), launched = load(recipe), launch_of(words)
    return estimate(config, policy, longest(config, launched), launched)


def by_hand(recipe: str, words: list[str]) -> dict[str, float]:
    """GiB of a device by a few products, in the computation's 2 bytes where nothing else is said.

    Float32 parameters, gradients and AdamW's state take 16 bytes of a trained parameter. Of
    activations only each layer's inputs are counted, and 5 copies of a chunk of float32 logits.
    DeepSpeed copies its share of the gradients, once more and in float32.
    """
    (config, policy), launched = load(recipe), launch_of(words)
    model, n = models.MODELS[models.BY_HUB_ID[config.model.model]], launched.processes
    text, N = model.text, model.parameters
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    layers, width = text["num_hidden_layers"], text["hidden_size"]
    if config.memory.lora_rank:
        state, whole = 2 * N + 16 * trained, 0
    elif launched.way == "FSDP2":
        state, whole = (16 * trained + 4 * (N - trained)) / n, 2 * N
    elif launched.way == "ZeRO-2":
        state, whole = 2 * N + 14 * trained / n, 0
    else:
        state, whole = 16 * trained + 2 * trained + 2 * (N - trained), 0
    work, memory = longest(config, launched), config.memory
    head = text.get("head_dim") or width // text["num_attention_heads"]
    full = layers // 4 if model.kind == "qwen3_5" else layers  # the others' states are small
    token = 2 * 2 * full * head * text["num_key_value_heads"]
    cfg, prompts = config.saei, min(work.prompts, memory.sample_prompts or work.prompts)
    rows = prompts * max(cfg.clean_rollouts, cfg.adversarial_rollouts)
    responses = min(work.micro * cfg.rollouts, memory.micro_responses or 10**9)
    inputs = 2 * layers * width * (work.micro * work.L + responses * work.T)
    return {
        "state": state / GIB,
        "sampling": (whole + rows * (work.L + work.T) * token) / GIB,
        "update": (inputs + 5 * 4 * LOGITS_PER_CHUNK) / GIB,
        "reduction": 6 * trained / n / GIB if launched.way == "ZeRO-2" else 0,
    }


def lines() -> Iterator[tuple[str, list[str]]]:
    """(recipe, launcher's words): as its comment says, on several GPUs with ZeRO-2 too."""
    for recipe in CARDS:
        words = command(recipe)
        yield recipe, words
        if "--config_file" in words:
            file = words.index("--config_file") + 1
            yield recipe, [*words[:file], ZERO_2, *words[file + 1 :]]


def plans_table() -> str:
    """The table of docs/scaling.md."""
    rows = []
    for recipe, words in lines():
        parts, hand = planned(recipe, words), by_hand(recipe, words)
        config, _ = load(recipe)
        model = models.BY_HUB_ID[config.model.model]
        model += ", LoRA" if config.memory.lora_rank else ""
        state = sum(size for name, size in parts.items() if ":" not in name)
        row = [f"`{recipe}`", model, CARDS[recipe], launch_of(words).way]
        by_hand_state = hand.pop("state")
        largest = max(hand.values())
        row += [f"{state / GIB:.1f}", f"{peak(parts) / GIB:.1f}"]
        row += [f"{by_hand_state:.1f} + {largest:.1f} = {by_hand_state + largest:.1f}"]
        rows.append(row)
    head = ["recipe", "model", "for", "spread by", "stays", "**peak**", "by hand"]
    return table(head, rows)


def cards_table() -> str:
    """The table of recipes/README.md: a row for each recipe."""
    rows = []
    for recipe, card in CARDS.items():
        config, _ = load(recipe)
        what = config.model.model.split("/")[1].removesuffix("-Instruct")
        if config.memory.lora_rank:
            what = f"LoRA adapters of {what}"
        elif config.memory.freeze == "vision":
            what += ", vision tower frozen"
        figure = peak(planned(recipe, command(recipe))) / GIB
        row = [card, f"[{recipe}]({recipe}.yaml)", what, f"{figure:.1f}"]
        rows.append([*row, with_vllm(recipe)])
    return table(["GPUs", "recipe", "trains", "planned", "with `--engine vllm`"], rows)


def with_vllm(recipe: str) -> str:
    """GiB with a vLLM in each GPU, or nothing where both do not fit, or its cache does not."""
    (config, policy), launched = load(recipe), launch_of(command(recipe))
    words = ["--config", str(ROOT / f"recipes/{recipe}.yaml"), "--engine", "vllm"]
    config, card = train_saei.load_config(words), card_bytes(recipe)
    share = config.engine.engine_memory * card
    weights = 2 * models.MODELS[models.BY_HUB_ID[config.model.model]].parameters
    parts = estimate(config, policy, longest(config, launched), launched)
    together = peak(parts | {"attack, sampling: vLLM": int(share)})
    fits = together < ROOM * card and share > 1.2 * weights
    return f"{together / GIB:.1f}" if fits else ""


def card_bytes(recipe: str) -> float:
    """Of the memory of the GPU that a recipe is written for."""
    return int(CARDS[recipe].split()[-2]) * 1e9


PAGES = {
    "docs/scaling.md": {"plans": plans_table},
    "recipes/README.md": {"cards": cards_table},
}


def with_figure(recipe: str) -> str:
    """The recipe's text with the planned peak in its comment."""
    text = (ROOT / f"recipes/{recipe}.yaml").read_text()
    figure = f"Planned: {peak(planned(recipe, command(recipe))) / GIB:.1f} GiB"
    return re.sub(r"Planned: [\d.]+ GiB", figure, text)


def main() -> None:
    for recipe in CARDS:
        (ROOT / f"recipes/{recipe}.yaml").write_text(with_figure(recipe))
    for name, tables in PAGES.items():
        (ROOT / name).write_text(fill((ROOT / name).read_text(), tables))


if __name__ == "__main__":
    main()
