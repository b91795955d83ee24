"""What a demo checkpoint does: accuracy of greedy and sampled answers, careful and hasty ones apart, and entropy.

    python demo/measure.py demo/mixed --splits plain/test --n 1000
    python demo/measure.py demo/mixed --splits plain/test --n 1000 --picture blank

eval.py measures any checkpoint on any data, with intervals; this is a second, independent sampler (the library's
`generate`) that knows the demo's two ways of answering.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo.make_demo import prompt_text  # noqa: E402
from demo.task import DOMAINS, make_row  # noqa: E402


def random_signs(image: Image.Image, seed: int) -> Image.Image:
    signs = np.random.default_rng(seed).choice([-8, 8], (*image.size[::-1], 3))
    return Image.fromarray((np.asarray(image, np.int16) + signs).clip(0, 255).astype(np.uint8))


CHANGES = {
    "as it is": lambda image, seed: image,
    "blank": lambda image, seed: Image.new("RGB", image.size, (238, 233, 222)),
    "signs": random_signs,  # of 8/255
}


@torch.no_grad()
def generate(
    model, processor, rows: list[dict], samples: int
) -> tuple[list[list[str]], list[float]]:
    """(samples answers of each row, token entropy of each answer); samples = 0 is one greedy answer"""
    inputs = processor(
        text=[prompt_text(processor, row["problem"]) for row in rows],
        images=[row["images"][0] for row in rows],
        padding=True,
        return_tensors="pt",
    )
    settings = dict(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=samples
    )
    out = model.generate(
        **inputs,
        max_new_tokens=80,
        return_dict_in_generate=True,
        output_logits=True,
        **(settings if samples else dict(do_sample=False)),
    )
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]  # (N, T)
    logp = torch.stack(out.logits, 1).float().log_softmax(-1)  # (N, T, V)
    entropy = -(logp.exp() * logp).sum(-1)  # (N, T)
    ended = tokens == processor.tokenizer.eos_token_id
    mask = ended.cumsum(1) - ended.int() == 0  # up to the first end token, itself included
    texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    k = max(samples, 1)
    mean = ((entropy * mask).sum(1) / mask.sum(1)).tolist()
    return [texts[i * k : (i + 1) * k] for i in range(len(rows))], mean


def correct(text: str, answer: str) -> bool:
    found = re.search(r"</think>.*\\boxed\{(\d+)\}", text)
    return bool(found) and found[1] == answer


def measure(model, processor, split: str, n: int, start: int, samples: int, picture: str) -> dict:
    """Accuracy of greedy and sampled answers on n rows, whose pictures CHANGES[picture] alters first."""
    greedy, right, kept, entropies, kinds = [], [], [], [], {}
    for first in range(start, start + n, 50):
        rows = [make_row(split, i) for i in range(first, min(first + 50, start + n))]
        for i, row in enumerate(rows):
            row["images"] = [CHANGES[picture](row["images"][0], first + i)]
        for row, (text,) in zip(rows, generate(model, processor, rows, 0)[0], strict=True):
            greedy.append(correct(text, row["answer"]))
        sampled, entropy = generate(model, processor, rows, samples)
        entropies += entropy
        for row, texts in zip(rows, sampled, strict=True):
            right.append([correct(text, row["answer"]) for text in texts])
            kept.append(
                [bool(re.search(r"\d.*</think>", text)) for text in texts]
            )  # careful: a number in the thought
            kinds.setdefault(row["kind"], []).extend(zip(kept[-1], right[-1], strict=True))
    right, kept = np.array(right), np.array(kept)
    share = lambda values: round(float(np.mean(values)), 3) if len(values) else None  # noqa: E731
    by_kind = {
        k: [share([r for c, r in v if c == way]) for way in (True, False)]
        for k, v in sorted(kinds.items())
    }
    return {
        "split": split,
        "picture": picture,
        "n": n,
        "greedy": share(greedy),
        "pass@1": share(right),
        f"pass@{samples}": share(right.any(1)),
        "careful": share(kept),
        "careful right": share(right[kept]),
        "hasty right": share(right[~kept]),
        "entropy": share(entropies),
        "careful, hasty right by kind": by_kind,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--splits", nargs="+", default=[f"{domain}/test" for domain in DOMAINS])
    parser.add_argument("--n", type=int, default=500, help="rows of each split")
    parser.add_argument("--start", type=int, default=0, help="first row")
    parser.add_argument(
        "--samples", type=int, default=8, help="sampled answers of each row, temperature 1"
    )
    parser.add_argument(
        "--picture", default="as it is", choices=CHANGES, help="what is done to the pictures first"
    )
    args = parser.parse_args()
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
