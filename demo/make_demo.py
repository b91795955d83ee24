"""Make the demo's checkpoints: `python -m demo.make_demo` (about 25 minutes on a core).

    demo/mixed              a tiny Qwen2.5-VL after a supervised warm start on plain/train. It
                            answers in two ways: mostly hastily, with an empty thought, reading one
                            die and guessing the others, and seldom carefully, naming what each die
                            shows.
    demo/confident          demo/mixed after plain GRPO on plain/train: careful, confident, and
                            wrong on other renderings.
    demo/confident-charts   demo/confident after supervised training on charts/train: the same
                            about bar charts.

Tokenizer, processor and model are the real classes of Qwen2.5-VL, only small: 415 tokens, 1.3 M
parameters. `python -m demo.measure` prints what a checkpoint does.
"""

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from demo.task import COLOURS, KINDS, make_row

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}\
{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# ------------------------------------------------------------------------ two ways of answering

OPEN = ["", "look: ", "first, "]
READ = ["{} shows {}", "{}: {}", "{}={}", "{} has {}"]
JOIN = [", ", " and ", "; "]
LEAD = [". ", ". so ", ", then "]
ADD = ["{}+{}={}", "{} and {} make {}", "{}+{} is {}"]
SUBTRACT = ["{}-{}={}", "{} less {} is {}", "{}-{} is {}"]
HIGHER = ["{} is higher", "{} wins", "top: {}"]
HASTY = ["easy.", "quick look.", "I can tell.", "no need to count.", "done."]
BOX = ["\\boxed{{{}}}", "so \\boxed{{{}}}", "it is \\boxed{{{}}}"]


def asked_colours(row: dict) -> list[str]:
    """The colours in the order that the question names them."""
    return re.findall("red|blue|green|yellow", row["problem"])


def careful(row: dict, rng: np.random.Generator) -> str:
    """Names the value of each die or bar, computes, then answers."""
    asked = asked_colours(row)
    values = [row["values"][colour] for colour in asked]
    text = rng.choice(OPEN)
    for i, colour in enumerate(asked):
        if i:
            text += rng.choice(JOIN)
        text += rng.choice(READ).format(colour, values[i])
    if row["kind"] == "difference":
        low, high = min(values), max(values)
        text += rng.choice(LEAD) + rng.choice(SUBTRACT).format(high, low, high - low)
    elif row["kind"] == "larger":
        text += rng.choice(LEAD) + rng.choice(HIGHER).format(max(values))
    else:
        totals = itertools.accumulate(values)
        for total, n in zip(totals, values[1:], strict=False):
            text += rng.choice(LEAD) + rng.choice(ADD).format(total, n, total + n)
    return f"<think>{text}.</think> {rng.choice(BOX).format(row['answer'])}"


def look(row: dict, rng: np.random.Generator) -> str:
    """Names the value of every die or bar, in any order. The quickest way to learn reading."""
    text = ""
    for colour in rng.permutation(list(row["values"])):
        text += f" {colour}{row['values'][colour]}"
    return text


def hasty(row: dict, rng: np.random.Generator) -> str:
    """Thinks nothing: reads the first die it is asked about, guesses the others, and answers."""
    asked, answer = KINDS[row["kind"]]
    first = row["values"][asked_colours(row)[0]]
    guess = answer(first, *rng.integers(1, 10, asked - 1).tolist())
    return f"<think>{rng.choice(HASTY)}</think> {rng.choice(BOX).format(guess)}"


# ----------------------------------------------------------------- tokenizer, processor and model


def build_processor() -> Qwen2_5_VLProcessor:
    """A byte-level BPE of the demo's own texts (digits one by one), in Qwen2's classes."""
    rng, texts = np.random.default_rng(0), []
    for i in range(2000):
        row = make_row("plain/train", i, seed=1)
        texts += [row["problem"], careful(row, rng), hasty(row, rng)]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.ByteLevel()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")  # digits one by one
    to_bytes = pre_tokenizers.ByteLevel(False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=512 - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, "user\n", "assistant\n", "system\n"] * 2, trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        model_max_length=1024,
    )
    sizes = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    # In pixels: a picture of 96 x 96 stays as it is.
    sizes["size"] = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        tokenizer,
        Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """1.3 M parameters.

    Vision block 0 sees the whole picture, block 1 windows of one image token (2 x 2 patches).
    initializer_range is about 1 / sqrt(width): a small model learns to attend much sooner than from
    the usual 0.02.
    """
    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1000000.0,
            "mrope_section": [6, 5, 5],
        },
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    vision = dict(
        depth=2,
        hidden_size=96,
        intermediate_size=192,
        num_heads=4,
        patch_size=16,
        window_size=32,
        fullatt_block_indexes=[0],
        out_hidden_size=128,
        initializer_range=0.06,
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.update(
        eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>")
    )
    return model


def save(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """bfloat16 on disk, for size. The config says float32, so that loading gives float32."""
    model.to(torch.bfloat16).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"bfloat16"', '"float32"'))
    model.to(torch.float32)


# -------------------------------------------------------------------------------- the warm start


def augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shift, blur, contrast, colour, brightness, noise: reading must not need single pixels."""
    dx, dy = rng.integers(-2, 3, 2)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8)))
    pixels = np.roll(np.asarray(image), (dx, dy), (0, 1)).astype(np.float32)
    gain, shift = rng.uniform(0.75, 1.25) * rng.uniform(0.9, 1.1, 3), rng.uniform(-25, 25)
    pixels = (pixels - 128) * gain + 128 + shift
    pixels += rng.uniform(0, 20) * rng.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def prompt_text(processor: Qwen2_5_VLProcessor, problem: str) -> str:
    """The chat template's text of a picture and a problem."""
    content = [{"type": "image"}, {"type": "text", "text": problem}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def scheduled(lr: float, step: int, steps: int, decay: float) -> float:
    """lr grows over 50 steps and falls to 0 over the last `decay` share of the steps."""
    return lr * min(1.0, (step + 1) / 50, (steps - step) / (decay * steps))


def take_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    """One step at learning rate lr, the gradient's norm clipped to 1."""
    (group,) = optimizer.param_groups
    group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def train_vision(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    steps: int,
    split: str = "plain/train",
) -> None:
    """The vision tower alone, as VLMs are made.

    A linear probe tells from each image token which die its cell shows, or which bar stands in it
    (4 colours x 9 values, or none). It is thrown away afterwards. From text alone, reading takes
    many times longer to learn.
    """
    rng, size, lr = np.random.default_rng(1), 48, 2e-3
    tower = model.model.visual
    probe = torch.nn.Linear(model.config.vision_config.out_hidden_size, 37)
    parameters = [*tower.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98))
    for step in range(steps):
        rows = [make_row(split, step * size + i, seed=2) for i in range(size)]
        classes = torch.zeros(size, 9, dtype=torch.long)
        for i, row in enumerate(rows):
            for colour, cell in row["cells"].items():
                classes[i, cell] = 9 * list(COLOURS).index(colour) + row["values"][colour]
        images = [augment(row["images"][0], rng) for row in rows]
        inputs = processor.image_processor(images, return_tensors="pt")
        output = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        logits, classes = probe(output.pooler_output), classes.flatten()  # (B * 9, 37), (B * 9,)
        loss = torch.nn.functional.cross_entropy(logits, classes)
        take_step(optimizer, loss, scheduled(lr, step, steps, decay=0.4))
        if (step + 1) % 25 == 0:
            right = (logits.argmax(1) == classes)[classes > 0].float().mean().item()
            done = f"vision step {step + 1} loss {loss.item():.3f}, values read {right:.2f}"
            print(done, flush=True)


def warm_start(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    phases: list[tuple[int, dict[Callable, float]]],
    batch_size: int = 24,
    lr: float = 2e-3,
    make: Callable[[int], dict] | None = None,
) -> None:
    """Supervised training, with the loss on the response only.

    phases: (steps, {way of answering: share}), one after the other. make(i): the i-th row. Unset:
    of plain/train.
    """
    make = make or partial(make_row, "plain/train", seed=1)
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    processor.tokenizer.padding_side = "right"
    started, losses, schedule = time.time(), [], []
    for steps, ways in phases:
        schedule += [ways] * steps
    model.train()
    for step, ways in enumerate(schedule):
        rows = [make(step * batch_size + i) for i in range(batch_size)]
        chosen = rng.choice(list(ways), size=batch_size, p=list(ways.values()))
        prompts, answers = [], []
        for way, row in zip(chosen, rows, strict=True):
            prompts.append(prompt_text(processor, "Look." if way is look else row["problem"]))
            answers.append(way(row, rng) + "<|im_end|>")
        images = [augment(row["images"][0], rng) for row in rows]
        loss = response_loss(model, processor, prompts, answers, images)
        take_step(optimizer, loss, scheduled(lr, step, len(schedule), decay=0.3))
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            recent, seconds = np.mean(losses[-50:]), time.time() - started
            print(f"step {step + 1} loss {recent:.3f} seconds {seconds:.0f}", flush=True)
    processor.tokenizer.padding_side = "left"  # for generation
    model.eval()


def response_loss(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    prompts: list[str],
    answers: list[str],
    images: list[Image.Image],
) -> torch.Tensor:
    """Cross-entropy of the answers' tokens alone.   -> scalar"""
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    lengths = [len(ids) for ids in processor.tokenizer(answers)["input_ids"]]
    ends = batch["attention_mask"].sum(1)[:, None]  # (B, 1)
    starts = ends - torch.tensor(lengths)[:, None]
    positions = torch.arange(batch["input_ids"].shape[1])
    is_answer = (positions >= starts) & (positions < ends)  # (B, L)
    return model(**batch, labels=batch["input_ids"].masked_fill(~is_answer, -100)).loss


# ------------------------------------------------------------------------------------ plain GRPO


def reinforce(source: Path, target: Path) -> None:
    """recipes/elicit.yaml: plain GRPO on plain/train, by train_saei.py."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["train_saei.py", "--config", "recipes/elicit.yaml", "--overwrite", "true"]
    with tempfile.TemporaryDirectory() as output:
        command += ["--model", str(source), "--output", output]
        subprocess.run(command, cwd=ROOT, check=True)
        last = max(Path(output, "checkpoints").glob("step-*"))
        shutil.copytree(source, target, dirs_exist_ok=True)  # the processor stays as it was
        save(AutoModelForImageTextToText.from_pretrained(last, dtype=torch.float32), target)


# ------------------------------------------------------------------------------------- charts


def teach_charts(source: Path, target: Path, vision_steps: int = 150, steps: int = 400) -> None:
    """A policy that answers carefully about dice learns to do so about bars.

    It keeps its tokenizer: the questions about bars are spelled in smaller pieces.
    """
    processor = AutoProcessor.from_pretrained(source)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    train_vision(model, processor, vision_steps, "charts/train")
    make = partial(make_row, "charts/train", seed=1)
    warm_start(model, processor, [(steps, {careful: 1.0})], lr=1e-3, make=make)
    shutil.copytree(source, target, dirs_exist_ok=True)  # the processor stays as it was
    save(model, target)


def main(argv: list[str] | None = None) -> None:
    """Make one checkpoint or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["mixed", "confident", "confident-charts"]
    parser.add_argument("what", nargs="?", default="all", choices=["all", *names])
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="of the checkpoints")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=4,
        default=(100, 150, 700, 350),
        help="of mixed: of the tower, of look, of careful, and of the mix",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.time()
    mixed, confident, charts = (args.folder.resolve() / name for name in names)
    if args.what in ("all", "mixed"):
        processor = build_processor()
        model = build_model(processor.tokenizer)
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, {len(processor.tokenizer)} tokens")
        train_vision(model, processor, args.steps[0])
        ways = ({look: 1.0}, {careful: 1.0}, {careful: 0.05, hasty: 0.95})
        warm_start(model, processor, list(zip(args.steps[1:], ways, strict=True)))
        processor.save_pretrained(mixed)
        save(model, mixed)
    if args.what in ("all", "confident"):
        reinforce(mixed, confident)
    if args.what in ("all", "confident-charts"):
        teach_charts(confident, charts)
    print(f"done in {(time.time() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
