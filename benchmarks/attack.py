"""Does the attack work? Entropy and accuracy of a policy on clean, randomly changed and attacked images.

    python -m benchmarks.attack                                   # the demo's policy, data and eps
    python -m benchmarks.attack --model demo/mixed --split plain/test --sweep 0.5 1 2 4 8 16

For each image: the teacher-forced entropy of the clean responses' tokens (those that TsEC chose; all of them), then
entropy and accuracy of fresh responses; all of it again after the image went through an 8-bit PNG. Intervals are 95%
bootstraps over prompts of the difference to the clean image. Writes benchmarks/attack.json and prints tables.
"""

import argparse
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image, to_tensor

import egas  # noqa: E402
import rewards  # noqa: E402
import train_saei  # noqa: E402
import tsec  # noqa: E402
from eval import bootstrap_interval  # noqa: E402
from runtime import data  # noqa: E402
from vlm.policy import Policy, Prompts, Responses  # noqa: E402

SAMPLES = 4  # responses per prompt, clean ones and fresh ones


def png_round_trip(image: Tensor) -> Tensor:
    """What an attacked image is after it was saved and opened again."""
    file = io.BytesIO()
    to_pil_image(image).save(file, "PNG")
    return to_tensor(Image.open(file))


def attacks(
    policy: Policy, prompts: Prompts, clean: Responses, keep: Tensor, eps: float, seed: int
) -> dict:
    """name -> a function that makes the changed images"""
    x = prompts.images
    chosen = train_saei.entropy_objective(policy, prompts, clean, keep, 1.0)
    everything = train_saei.entropy_objective(policy, prompts, clean, clean.mask, 1.0)
    generator = torch.Generator().manual_seed(seed)
    normal = lambda i: torch.randn(i.shape, generator=generator)  # noqa: E731
    return {
        "clean": lambda: x,
        "random signs": lambda: egas.random_signs(x, eps, generator),
        "Gaussian noise, std eps": lambda: [(i + eps * normal(i)).clamp(0, 1) for i in x],
        "EgAS + TsEC, 1 step": lambda: egas.pgd_ascent(chosen, x, eps, steps=1),
        "EgAS + TsEC, 5 steps": lambda: egas.pgd_ascent(chosen, x, eps, steps=5),
        "EgAS, all tokens, 1 step": lambda: egas.pgd_ascent(everything, x, eps, steps=1),
        "EgAS, all tokens, 5 steps": lambda: egas.pgd_ascent(everything, x, eps, steps=5),
        "descent + TsEC, 5 steps": lambda: egas.pgd_ascent(lambda i: -chosen(i), x, eps, steps=5),
    }


@torch.no_grad()
def look(
    policy: Policy,
    prompts: Prompts,
    clean: Responses,
    keep: Tensor,
    rows: list[dict],
    seeds: list[int],
) -> dict:
    """What the policy does on the prompts' images, one value a prompt."""
    P, answers = len(rows), [row["answer"] for row in rows for _ in range(SAMPLES)]
    _, entropy = policy.score(prompts, clean.tokens, clean.mask)  # teacher-forced, (P * n, T)
    tokens = {"chosen": keep, "all": clean.mask}
    table = {
        name: tsec.selective_entropy(entropy, chosen).view(P, -1).mean(1)
        for name, chosen in tokens.items()
    }
    fresh = policy.sample(prompts, SAMPLES, seeds, max_new_tokens=64)
    right = torch.tensor(rewards.accuracy_reward(policy.decode(fresh), answers))
    table |= {"fresh": tsec.selective_entropy(fresh.entropy, fresh.mask).view(P, -1).mean(1)}
    table |= {"accuracy": right.view(P, -1).mean(1)}
    return table


def measure(
    policy: Policy, rows: list[dict], eps: float, names: list[str] | None, batch: int = 32
) -> dict:
    """name of the image -> column -> one value a prompt"""
    found = {}
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        prompts = policy.encode([row["problem"] for row in part], [row["images"] for row in part])
        seeds = range(start, start + len(part))
        clean = policy.sample(prompts, SAMPLES, [10_000_000 + s for s in seeds], max_new_tokens=64)
        keep = tsec.select_tokens(clean.entropy, clean.mask)
        for name, attack in attacks(policy, prompts, clean, keep, eps, start).items():
            if names and name not in names:
                continue
            with train_saei.frozen(policy):
                images = attack()
            table = look(policy, prompts.with_images(images), clean, keep, part, list(seeds))
            if names is None:
                saved = prompts.with_images([png_round_trip(i) for i in images])
                table |= {
                    f"{k} (PNG)": v
                    for k, v in look(policy, saved, clean, keep, part, list(seeds)).items()
                }
            pairs = list(zip(images, prompts.images, strict=True))
            table["psnr"] = torch.tensor([min(egas.psnr(a, b), 99.0) for a, b in pairs])
            for column, values in table.items():
                found.setdefault(name, {}).setdefault(column, []).extend(values.tolist())
        print(
            f"eps {255 * eps:.2g}/255: {start + len(part)} of {len(rows)} prompts", file=sys.stderr
        )
    return found


def summarise(found: dict) -> dict:
    """Means, and the change against the clean image with its interval, as a share of the clean mean."""
    rows = {}
    for name, columns in found.items():
        rows[name] = {column: float(np.mean(values)) for column, values in columns.items()}
        for column in ("chosen", "fresh", "accuracy"):
            base = np.array(found["clean"][column])
            low, high = bootstrap_interval(np.array(columns[column]) - base)
            mean = float(base.mean())
            rows[name][f"change of {column}"] = [
                (rows[name][column] - mean) / mean,
                low / mean,
                high / mean,
            ]
    return rows


def print_table(eps: float, rows: dict) -> None:
    percent = lambda change: "{:+.0%} [{:+.0%}, {:+.0%}]".format(*change)  # noqa: E731
    print(f"\neps = {255 * eps:.2g}/255\n")
    print(
        "| image | H chosen | change | H all | H fresh | change | accuracy | PSNR dB | after PNG: H chosen | accuracy |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, x in rows.items():
        cells = [
            name,
            f"{x['chosen']:.4f}",
            percent(x["change of chosen"]),
            f"{x['all']:.4f}",
            f"{x['fresh']:.4f}",
        ]
        cells += [
            percent(x["change of fresh"]),
            f"{x['accuracy']:.3f}",
            f"{x['psnr']:.1f}" if x["psnr"] < 99 else "-",
        ]
        cells += (
            [f"{x['chosen (PNG)']:.4f}", f"{x['accuracy (PNG)']:.3f}"]
            if "chosen (PNG)" in x
            else ["", ""]
        )
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    recipe = train_saei.load_config(
        ["--config", str(Path(train_saei.__file__).parent / "recipes" / "demo.yaml")]
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=recipe.model)
    parser.add_argument("--split", default=recipe.split.replace("/train", "/test"))
    parser.add_argument("--eps", type=float, default=255 * recipe.eps, help="in 1/255")
    parser.add_argument(
        "--sweep", type=float, nargs="*", default=[0.5, 1, 4, 8], help="further eps, in 1/255"
    )
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument(
        "--sweep_problems", type=int, default=128, help="so many of them for each further eps"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    policy, start = Policy.from_pretrained(args.model), time.time()
    problems = data.load_rows("demo", args.split, limit=args.problems)
    rows = [problems[i] for i in range(len(problems))]
    result = {
        "model": args.model,
        "split": args.split,
        "problems": len(rows),
        "eps": args.eps,
        "sweep": {},
    }
    result["sweep_problems"] = args.sweep_problems
    result["table"] = summarise(measure(policy, rows, args.eps / 255, None))
    print_table(args.eps / 255, result["table"])
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for eps in args.sweep:
        names = ["clean", "random signs", "EgAS + TsEC, 5 steps"]
        result["sweep"][str(eps)] = summarise(
            measure(policy, rows[: args.sweep_problems], eps / 255, names)
        )
        print_table(eps / 255, result["sweep"][str(eps)])
    result["seconds"] = round(time.time() - start, 1)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
