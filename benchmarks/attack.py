"""Does the attack work? Entropy and accuracy on clean, randomly changed and attacked images.

    python -m benchmarks.attack                          # the demo's model, data and eps
    python -m benchmarks.attack --model demo/mixed --split plain/test --sweep 0.5 1 2 4 8 16

For each image it measures the teacher-forced entropy of the clean responses' tokens (those that
TsEC chose, and all), then entropy and accuracy of responses sampled on it. It measures all of it
again after the image was saved as an 8-bit PNG. Changes are to the clean image, with 95% bootstrap
intervals over prompts. Writes benchmarks/attack.json; python -m benchmarks.tables shows it.
"""

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image, to_tensor

import egas
import rewards
import tsec
from eval import bootstrap_interval
from runtime import data
from vlm.policy import Policy, Prompts, Responses

SAMPLES = 4  # clean responses per prompt, and responses per changed image
MAX_NEW_TOKENS = 64
PROMPTS_PER_BATCH = 32
SWEPT = ("clean", "random signs", "EgAS + TsEC, 5 steps")  # over eps


def mean_per_prompt(values: Tensor) -> Tensor:
    """(P * SAMPLES,) -> (P,)"""
    return values.view(-1, SAMPLES).mean(dim=1)


def entropy_of(policy: Policy, prompts: Prompts, responses: Responses, chosen: Tensor) -> Callable:
    """The attack's objective: images -> entropy of the chosen tokens, (P,)."""

    def objective(images: list[Tensor]) -> Tensor:
        changed = prompts.with_images(images)
        _, entropy = policy.score(changed, responses.tokens, responses.mask)
        return mean_per_prompt(tsec.selective_entropy(entropy, chosen))

    return objective


def attacks(
    policy: Policy, prompts: Prompts, clean: Responses, chosen: Tensor, eps: float, seed: int
) -> dict[str, Callable[[], list[Tensor]]]:
    """name -> a function that makes the changed images"""
    images = prompts.images
    selected = entropy_of(policy, prompts, clean, chosen)
    everything = entropy_of(policy, prompts, clean, clean.mask)
    generator = torch.Generator().manual_seed(seed)

    def gaussian() -> list[Tensor]:
        noisy = []
        for image in images:
            noise = torch.randn(image.shape, generator=generator)
            noisy.append((image + eps * noise).clamp(0, 1))
        return noisy

    def ascent(objective: Callable, steps: int) -> Callable[[], list[Tensor]]:
        return lambda: egas.pgd_ascent(objective, images, eps, steps=steps)

    return {
        "clean": lambda: images,
        "random signs": lambda: egas.random_signs(images, eps, generator),
        "Gaussian noise, std eps": gaussian,
        "EgAS + TsEC, 1 step": ascent(selected, 1),
        "EgAS + TsEC, 5 steps": ascent(selected, 5),
        "EgAS, all tokens, 1 step": ascent(everything, 1),
        "EgAS, all tokens, 5 steps": ascent(everything, 5),
        "descent + TsEC, 5 steps": ascent(lambda changed: -selected(changed), 5),
    }


@torch.no_grad()
def measure_images(
    policy: Policy,
    prompts: Prompts,
    clean: Responses,
    chosen: Tensor,
    rows: list[dict],
    seeds: list[int],
) -> dict[str, Tensor]:
    """What the policy does on the prompts' images. A value per prompt."""
    answers = [row["answer"] for row in rows for _ in range(SAMPLES)]
    _, entropy = policy.score(prompts, clean.tokens, clean.mask)  # teacher-forced
    fresh = policy.sample(prompts, SAMPLES, seeds, max_new_tokens=MAX_NEW_TOKENS)
    right = torch.tensor(rewards.accuracy_reward(policy.decode(fresh), answers))
    return {
        "chosen": mean_per_prompt(tsec.selective_entropy(entropy, chosen)),
        "all": mean_per_prompt(tsec.selective_entropy(entropy, clean.mask)),
        "fresh": mean_per_prompt(tsec.selective_entropy(fresh.entropy, fresh.mask)),
        "accuracy": mean_per_prompt(right),
    }


def png_round_trip(image: Tensor) -> Tensor:
    """The image after it was saved and opened again."""
    file = io.BytesIO()
    to_pil_image(image).save(file, "PNG")
    return to_tensor(Image.open(file))


def measure(policy: Policy, rows: list[dict], eps: float, names: tuple[str, ...] | None) -> dict:
    """name of the attack -> column -> a value per prompt. names: None for all, with PNGs."""
    found = {}
    for start in range(0, len(rows), PROMPTS_PER_BATCH):
        batch = rows[start : start + PROMPTS_PER_BATCH]
        seeds = list(range(start, start + len(batch)))
        prompts = policy.encode([row["problem"] for row in batch], [row["images"] for row in batch])
        clean_seeds = [10_000_000 + seed for seed in seeds]
        clean = policy.sample(prompts, SAMPLES, clean_seeds, max_new_tokens=MAX_NEW_TOKENS)
        chosen = tsec.select_tokens(clean.entropy, clean.mask)
        for name, attack in attacks(policy, prompts, clean, chosen, eps, start).items():
            if names and name not in names:
                continue
            images = attack()
            about = (clean, chosen, batch, seeds)
            columns = measure_images(policy, prompts.with_images(images), *about)
            if names is None:
                saved = prompts.with_images([png_round_trip(image) for image in images])
                for column, values in measure_images(policy, saved, *about).items():
                    columns[f"{column} (PNG)"] = values
            pairs = zip(images, prompts.images, strict=True)
            columns["psnr"] = torch.tensor([min(egas.psnr(a, b), 99.0) for a, b in pairs])
            for column, values in columns.items():
                found.setdefault(name, {}).setdefault(column, []).extend(values.tolist())
        print(f"eps {255 * eps:.2g}/255: {start + len(batch)} of {len(rows)} prompts", flush=True)
    return found


def summarise(found: dict) -> dict:
    """Means; and changes to the clean image with intervals, as shares of the clean mean."""
    rows = {}
    for name, columns in found.items():
        rows[name] = {column: float(np.mean(values)) for column, values in columns.items()}
        for column in ("chosen", "fresh", "accuracy"):
            base = np.array(found["clean"][column])
            change = np.array(columns[column]) - base
            low, high = bootstrap_interval(change)
            shares = np.array([rows[name][column] - base.mean(), low, high]) / base.mean()
            rows[name][f"change of {column}"] = shares.tolist()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo/confident")
    add("--split", default="shifted/test")
    add("--eps", type=float, default=1.9992, help="in 1/255; default: that of the stored table")
    add("--sweep", type=float, nargs="*", default=[0.5, 1, 4, 8], help="further eps, in 1/255")
    add("--problems", type=int, default=256)
    add("--sweep_problems", type=int, default=128, help="for each further eps")
    add("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    start = time.time()
    policy = Policy.from_pretrained(args.model)
    policy.requires_grad_(False)  # only the images are differentiated
    problems = data.load_rows("demo", args.split, limit=args.problems)
    rows = [problems[i] for i in range(len(problems))]
    result = {"model": args.model, "split": args.split, "problems": len(rows), "eps": args.eps}
    result |= {"sweep": {}, "sweep_problems": args.sweep_problems}
    result["table"] = summarise(measure(policy, rows, args.eps / 255, None))
    for eps in args.sweep:
        found = measure(policy, rows[: args.sweep_problems], eps / 255, SWEPT)
        result["sweep"][str(eps)] = summarise(found)
    result["seconds"] = round(time.time() - start, 1)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
