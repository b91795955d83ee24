"""What a demo checkpoint does: accuracy, careful and hasty answers apart, and entropy.

"equal" is the share of problems whose sampled answers are all right or all wrong.

    python -m demo.measure demo/mixed --splits plain/test --n 1000
    python -m demo.measure demo/mixed --splits plain/test --n 1000 --picture blank

eval.py measures any checkpoint on any data, with intervals. This is a second, independent sampler
(the library's `generate`) that knows the demo's two ways of answering.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from demo.make_demo import prompt_text
from demo.task import DOMAINS, make_row

PICTURES = ("as it is", "blank", "signs")


def change(image: Image.Image, picture: str, seed: int) -> Image.Image:
    """The picture as it is, a blank one, or one with random signs of 8/255."""
    if picture == "blank":
        return Image.new("RGB", image.size, (238, 233, 222))
    if picture == "signs":
        signs = np.random.default_rng(seed).choice([-8, 8], (*image.size[::-1], 3))
        return Image.fromarray((np.asarray(image, np.int16) + signs).clip(0, 255).astype(np.uint8))
    return image


@torch.no_grad()
def generate(
    model, processor, rows: list[dict], samples: int
) -> tuple[list[list[str]], list[float]]:
    """Answers of each row, mean token entropy of each answer. samples = 0: one greedy answer."""
    prompts = [prompt_text(processor, row["problem"]) for row in rows]
    images = [row["images"][0] for row in rows]
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    settings = dict(do_sample=False)
    if samples:
        settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        settings["num_return_sequences"] = samples
    settings |= dict(return_dict_in_generate=True, output_logits=True)
    output = model.generate(**inputs, max_new_tokens=80, **settings)
    tokens = output.sequences[:, inputs["input_ids"].shape[1] :]  # (N, T)
    logp = torch.stack(output.logits, 1).float().log_softmax(-1)  # (N, T, V)
    entropy = -(logp.exp() * logp).sum(-1)  # (N, T)
    ended = tokens == processor.tokenizer.eos_token_id
    mask = ended.cumsum(1) - ended.int() == 0  # up to the first end token, itself included
    means = (entropy * mask).sum(1) / mask.sum(1)
    texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    n = max(samples, 1)
    return [texts[i : i + n] for i in range(0, len(texts), n)], means.tolist()


def correct(text: str, answer: str) -> bool:
    """Whether the box after the thought holds the answer."""
    found = re.search(r"</think>.*\\boxed\{(\d+)\}", text)
    return bool(found) and found[1] == answer


def mean(values) -> float | None:
    """Rounded; None of nothing."""
    return round(float(np.mean(values)), 3) if len(values) else None


def measure(model, processor, split: str, n: int, start: int, samples: int, picture: str) -> dict:
    """Accuracy of greedy and sampled answers on n rows with changed pictures (see `change`)."""
    greedy, right, careful, entropies, kinds = [], [], [], [], []
    for first in range(start, start + n, 50):
        rows = []
        for i in range(first, min(first + 50, start + n)):
            row = make_row(split, i)
            rows.append(row | {"images": [change(row["images"][0], picture, i)]})
        likely, _ = generate(model, processor, rows, 0)
        sampled, entropy = generate(model, processor, rows, samples)
        entropies += entropy
        for row, (text,), texts in zip(rows, likely, sampled, strict=True):
            greedy.append(correct(text, row["answer"]))
            right.append([correct(text, row["answer"]) for text in texts])
            careful.append([bool(re.search(r"\d.*</think>", text)) for text in texts])
            kinds.append(row["kind"])
    right, careful, kinds = np.array(right), np.array(careful), np.array(kinds)
    by_kind = {}
    for kind in sorted(set(kinds.tolist())):
        of_kind = (kinds == kind)[:, None]
        by_kind[kind] = [mean(right[of_kind & careful]), mean(right[of_kind & ~careful])]
    return {
        "split": split,
        "picture": picture,
        "n": n,
        "greedy": mean(greedy),
        "pass@1": mean(right),
        f"pass@{samples}": mean(right.any(1)),
        "equal": mean(right.all(1) | ~right.any(1)),
        "careful": mean(careful),
        "careful right": mean(right[careful]),
        "hasty right": mean(right[~careful]),
        "entropy": mean(entropies),
        "careful, hasty right by kind": by_kind,
    }


def main(argv: list[str] | None = None) -> None:
    """Print a line of JSON per split."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--splits", nargs="+", default=[f"{domain}/test" for domain in DOMAINS])
    parser.add_argument("--n", type=int, default=500, help="rows of each split")
    parser.add_argument("--start", type=int, default=0, help="first row")
    parser.add_argument("--samples", type=int, default=8, help="answers per row, temperature 1")
    parser.add_argument("--picture", default="as it is", choices=PICTURES, help="what is shown")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    processor.tokenizer.padding_side = "left"
    for split in args.splits:
        result = measure(model, processor, split, args.n, args.start, args.samples, args.picture)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
