"""What the study measures of a trained policy: answers on test problems, and its training samples.

Every problem gets a greedy answer and n sampled answers at temperature 1. A result keeps the number
of right samples of every problem, so that arms are compared problem by problem, and means of
everything else.
"""

import base64
import json
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

import rewards
import tsec
from demo.task import make_row
from vlm.policy import Policy

FRESH, PAID, LONG, TUNING = 50, 80, 90, 100  # first seeds: confirm, bars; paid, bars-tuned; ...
MAX_NEW_TOKENS = 64


def study_rows(split: str, count: int, seed: int) -> list[dict]:
    """The first problems of a split. Each range of seeds has others; PAID and LONG share theirs."""
    if seed >= TUNING:
        drawn = 1
    elif seed >= PAID:
        drawn = 3
    elif seed >= FRESH:
        drawn = 2
    else:
        drawn = 0
    return [make_row(split, i, seed=drawn) for i in range(count)]


def pack(counts: list[float]) -> str:
    """Counts below 256 as one string. unpack is its inverse."""
    data = bytes(int(count) for count in counts)
    return base64.b85encode(zlib.compress(data, 9)).decode()


def unpack(text: str) -> np.ndarray:
    """-> (N,) counts"""
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype=np.uint8)


# ---------------------------------------------------------------------------------- answers


def noisy(image: Image.Image, i: int, std: float) -> Image.Image:
    """The image with Gaussian noise. std in grey levels, i: the seed."""
    pixels = np.asarray(image, np.float64)
    pixels = pixels + std * np.random.default_rng(i).standard_normal(pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


CORRUPTIONS = {
    "noise": lambda image, i: noisy(image, i, 20.0),
    "blur": lambda image, i: image.filter(ImageFilter.GaussianBlur(1.0)),
    "darker": lambda image, i: ImageEnhance.Brightness(image).enhance(0.6),
    "brighter": lambda image, i: ImageEnhance.Brightness(image).enhance(1.4),
}


@torch.no_grad()
def evaluate(policy: Policy, splits: list[str], seed: int, sizes: dict, extent: str) -> dict:
    """Accuracy on the test splits, the trained domain's first.

    extent: "splits", all splits; "first split", the first alone; "all", all splits, then the first
    split's first problems with more samples ("deep"), and its changed pictures ("corrupted").
    """
    if extent == "first split":
        splits = splits[:1]
    rows = {split: study_rows(split, sizes["problems"], seed) for split in splits}
    found = {"evaluation": {}}
    for split in splits:
        found["evaluation"][split] = graded(policy, rows[split], sizes["samples"], seed=0)
    if extent == "all":
        first = rows[splits[0]]
        found["deep"] = graded(policy, first[: sizes["deep"]], sizes["deep_samples"], seed=1)
        found["corrupted"] = {}
        for name, change in CORRUPTIONS.items():
            changed = []
            for i, row in enumerate(first):
                changed.append(row | {"images": [change(row["images"][0], i)]})
            found["corrupted"][name] = round(float(np.mean(greedy(policy, changed))), 5)
    return found


@torch.no_grad()
def graded(policy: Policy, rows: list[dict], samples: int, seed: int) -> dict:
    """Greedy and sampled answers of the rows: right samples per problem, and means."""
    right, entropy, distinct, truncated = [], [], [], []
    width = max(1, 768 // samples)  # rows per batch: more of them cost little in a decoding step
    for start in range(0, len(rows), width):
        batch = rows[start : start + width]
        seeds = []
        for i in range(start, start + len(batch)):
            seeds.append(int(np.random.SeedSequence((seed, i)).generate_state(1)[0]))
        prompts = policy.encode([row["problem"] for row in batch], [row["images"] for row in batch])
        sampled = policy.sample(prompts, samples, seeds, MAX_NEW_TOKENS, temperature=1.0)
        texts = policy.decode(sampled)
        for i, row in enumerate(batch):
            responses = texts[samples * i : samples * (i + 1)]
            scores = rewards.accuracy_reward(responses, answer=[row["answer"]] * samples)
            right.append(sum(scores))
            distinct.append(len({rewards.extract_answer(text) for text in responses}))
        entropy += tsec.selective_entropy(sampled.entropy, sampled.mask).tolist()
        truncated += sampled.truncated(policy.eos_ids).tolist()
    return {
        "samples": samples,
        "right": pack(right),
        "greedy": round(float(np.mean(greedy(policy, rows))), 5),
        "entropy": round(float(np.mean(entropy)), 5),
        "answers": round(float(np.mean(distinct)), 4),
        "truncated": round(float(np.mean(truncated)), 5),
    }


@torch.no_grad()
def greedy(policy: Policy, rows: list[dict], width: int = 200) -> list[float]:
    """1 where the most likely answer is right, else 0."""
    right = []
    for start in range(0, len(rows), width):
        batch = rows[start : start + width]
        prompts = policy.encode([row["problem"] for row in batch], [row["images"] for row in batch])
        seeds = [0] * len(batch)
        texts = policy.decode(policy.sample(prompts, 1, seeds, MAX_NEW_TOKENS, temperature=0.0))
        right += rewards.accuracy_reward(texts, answer=[row["answer"] for row in batch])
    return right


# ------------------------------------------------------------------------- training samples


def diagnose(folder: Path, judge: Path) -> dict:
    """From a run's samples: what TsEC kept, and whether the changed pictures show the answer.

    The judge is another policy, which answers the pictures before and after they were changed.
    """
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    found = {"tokens": token_kinds([line for line in lines if line["image"] == "clean"])}
    changed = {}
    for line in lines:
        if line["image"] == "adversarial":
            changed[line["step"], line["prompt"]] = line
    if changed:
        policy = Policy.from_pretrained(str(judge))
        found["judge"] = {"model": judge.name, "pictures": len(changed)}
        for name in ("clean_picture", "picture"):
            rows = []
            for line in changed.values():
                rows.append(line | {"images": [Image.open(folder / line[name])]})
            found["judge"][name] = round(float(np.mean(greedy(policy, rows))), 4)
    return found


def kinds_of(tokens: list[str]) -> list[str]:
    """What each token of a response is for.

    frame: tags, box, spaces, the end; the others: answer, digit, colour, sign, words.
    """
    text, end, kinds = "".join(tokens), 0, []
    boxes = [match.span(1) for match in re.finditer(r"\\boxed\{([^}]*)\}", text)]
    frames = [match.span() for match in re.finditer(r"</?think>|\\boxed\{|\}", text)]
    for token in tokens:
        middle, end = end + len(token) / 2, end + len(token)
        word = token.strip()
        if any(low <= middle < high for low, high in boxes):
            kind = "answer"
        elif any(low <= middle < high for low, high in frames) or not word or word[:2] == "<|":
            kind = "frame"
        elif word.isdigit():
            kind = "digit"
        elif word in ("red", "blue", "green", "yellow"):
            kind = "colour"
        elif any(character.isalpha() for character in word):
            kind = "words"
        else:
            kind = "sign"
        kinds.append(kind)
    return kinds


def token_kinds(lines: list[dict]) -> dict:
    """kind -> [kept, dropped for low entropy, dropped for high entropy, sum of the entropies].

    Also the commonest tokens that were kept, dropped as low, and dropped as high.
    """
    counts, sums = Counter(), Counter()
    examples = {"kept": Counter(), "low": Counter(), "high": Counter()}
    for line in lines:
        tokens, entropies, kept = line["tokens"], line["entropy"], line["kept"]
        kept_entropies = [entropy for entropy, keep in zip(entropies, kept, strict=True) if keep]
        middle = float(np.median(kept_entropies or entropies))
        rows = zip(tokens, kinds_of(tokens), entropies, kept, strict=True)
        for token, kind, entropy, keep in rows:
            if keep:
                fate = "kept"
            else:
                fate = "low" if entropy < middle else "high"
            counts[kind, fate] += 1
            sums[kind] += entropy
            examples[fate][token] += 1
    table = {}
    for kind in sorted(sums):
        table[kind] = [counts[kind, fate] for fate in examples] + [round(sums[kind], 3)]
    commonest = {}
    for fate, tokens in examples.items():
        commonest[fate] = [token for token, _ in tokens.most_common(8)]
    return {"kinds": table, "examples": commonest}
