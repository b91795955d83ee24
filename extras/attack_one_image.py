"""Attack one picture upward on the entropy of a model's own responses to it (EgAS on the tokens that TsEC keeps).

    python extras/attack_one_image.py
    python extras/attack_one_image.py --model Qwen/Qwen2.5-VL-3B-Instruct --image cat.jpg --question
    "What is this?"

Prints each response with its tokens' entropies (nats; * marks the tokens whose entropy was
attacked), that entropy on the clean picture, the attacked one and one with random signs of the same
size, and responses to the attacked picture. Saves clean, attacked and difference side by side: grey
is no difference, black is -eps, white is +eps.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import egas
import tsec
from demo.task import make_row
from vlm.policy import Policy, Responses


def show(policy: Policy, title: str, responses: Responses, keep: Tensor | None = None) -> float:
    """Print responses token by token; return the mean over responses of their tokens' mean entropy."""
    mean = tsec.selective_entropy(responses.entropy, responses.mask).mean().item()
    print(f"\n{title}: mean entropy {mean:.4f} nats")
    for i, (text, mask) in enumerate(zip(policy.decode(responses), responses.mask, strict=True)):
        print(f"  {i + 1}. {text!r}")
        tokens, values = responses.tokens[i, mask], responses.entropy[i, mask].tolist()
        marks = (
            ["*" if k else "" for k in keep[i, mask]] if keep is not None else [""] * len(values)
        )
        words = policy.processor.tokenizer.convert_ids_to_tokens(tokens.tolist())
        print(
            "     "
            + "  ".join(f"{w} {h:.2f}{m}" for w, h, m in zip(words, values, marks, strict=True))
        )
    return mean


def side_by_side(clean: Tensor, attacked: Tensor, eps: float) -> Image.Image:
    """clean | attacked | 1/2 + (attacked - clean) / (2 eps).   (3, H, W) each"""
    difference = 0.5 + (attacked - clean) / (2 * eps)
    row = torch.cat([clean, attacked, difference.clamp(0, 1)], dim=2).mul(255).round().byte()
    return Image.fromarray(row.permute(1, 2, 0).cpu().numpy())


def main(arguments: list[str] | None = None) -> tuple[Tensor, Tensor, float, float]:
    """-> the clean image, the attacked one, the mean entropy of the responses to each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=str(Path(__file__).resolve().parent.parent / "demo" / "confident")
    )
    parser.add_argument(
        "--image", help="a picture's file; unset: a dice picture of the demo, with its question"
    )
    parser.add_argument("--question")
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--eps", type=float, default=2 / 255, help="in [0, 1] pixel units")
    parser.add_argument("--pgd_steps", type=int, default=3)
    parser.add_argument("--tsec_low", type=float, default=0.2)
    parser.add_argument("--tsec_high", type=float, default=0.8)
    parser.add_argument("--output", default="attack.png")
    args = parser.parse_args(arguments)
    if (args.image is None) != (args.question is None):
        parser.error("--image and --question go together: give both, or neither for the demo's")
    if not 0 < args.eps <= 1:
        parser.error(f"--eps must be in 0 < eps <= 1 (8/255 = 0.0314, not 8), got {args.eps}")
    row = make_row("shifted/test", 0)
    picture, question = (
        (Image.open(args.image), args.question)
        if args.image
        else (row["images"][0], row["problem"])
    )

    policy = Policy.from_pretrained(args.model).requires_grad_(False)
    policy = policy.to("cuda" if torch.cuda.is_available() else "cpu")
    prompts = policy.encode([question], [[picture]])
    clean = policy.sample(prompts, args.rollouts, [0], max_new_tokens=64)
    keep = tsec.select_tokens(clean.entropy, clean.mask, args.tsec_low, args.tsec_high)
    before = show(policy, "clean image", clean, keep)

    def objective(images: list[Tensor]) -> Tensor:
        _, entropy = policy.score(prompts.with_images(images), clean.tokens, clean.mask)
        return tsec.selective_entropy(entropy, keep).mean()

    attacked = egas.pgd_ascent(objective, prompts.images, args.eps, steps=args.pgd_steps)
    signs = egas.random_signs(prompts.images, args.eps, torch.Generator().manual_seed(0))
    pictures = {"clean": prompts.images, "attacked": attacked, "random signs of that size": signs}
    print(
        "\nentropy of the kept tokens, nats:",
        ", ".join(f"{k} {objective(x):.4f}" for k, x in pictures.items()),
    )
    after = show(
        policy,
        "attacked image, fresh responses",
        policy.sample(prompts.with_images(attacked), args.rollouts, [1], 64),
    )
    side_by_side(prompts.images[0], attacked[0], args.eps).save(args.output)
    print(
        f"\n{args.output}: clean, attacked, difference amplified {0.5 / args.eps:.0f} times around grey"
    )
    return prompts.images[0], attacked[0], before, after


if __name__ == "__main__":
    main()
