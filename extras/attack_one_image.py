"""Attack one picture: EgAS on the tokens that TsEC chooses in a model's own responses to it.

    python -m extras.attack_one_image
    python -m extras.attack_one_image --model Qwen/Qwen2.5-VL-3B-Instruct \\
        --image cat.jpg --question "What is this?"

Prints each response with its tokens' entropies in nats (* marks attacked tokens). Prints the
attacked tokens' entropy on the clean picture, on the attacked one and on one with random signs of
the same size, then responses to the attacked picture. Saves clean, attacked and difference side by
side: grey is no difference, black is -eps, white is +eps.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import egas
import tsec
from demo.task import make_row
from vlm.policy import Policy, Responses

CONFIDENT = str(Path(__file__).resolve().parent.parent / "demo" / "confident")


def show(
    policy: Policy, title: str, responses: Responses, tsec_mask: Tensor | None = None
) -> float:
    """Print responses token by token. Returns the mean of their mean entropies."""
    mean = tsec.selective_entropy(responses.entropy, responses.mask).mean().item()
    print(f"\n{title}: mean entropy {mean:.4f} nats")
    marked = torch.zeros_like(responses.mask) if tsec_mask is None else tsec_mask
    for i, text in enumerate(policy.decode(responses)):
        print(f"  {i + 1}. {text!r}")
        mask, words = responses.mask[i], []
        tokens = responses.tokens[i, mask].tolist()
        names = policy.processor.tokenizer.convert_ids_to_tokens(tokens)
        values = zip(names, responses.entropy[i, mask], marked[i, mask], strict=True)
        for name, entropy, mark in values:
            words.append(f"{name} {entropy:.2f}{'*' if mark else ''}")
        print("     " + "  ".join(words))
    return mean


def side_by_side(clean: Tensor, attacked: Tensor, eps: float) -> Image.Image:
    """clean | attacked | 1/2 + (attacked - clean) / (2 eps).   (3, H, W) each"""
    difference = 0.5 + (attacked - clean) / (2 * eps)
    row = torch.cat([clean, attacked, difference.clamp(0, 1)], dim=2).mul(255).round().byte()
    return Image.fromarray(row.permute(1, 2, 0).cpu().numpy())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=CONFIDENT)
    parser.add_argument("--image", help="a picture's file; unset: a dice picture of the demo")
    parser.add_argument("--question", help="about --image")
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
    return args


def main(arguments: list[str] | None = None) -> tuple[Tensor, Tensor, float, float]:
    """-> the clean image, the attacked one, the mean entropy of the responses to each."""
    args = parse(arguments)
    if args.image:
        picture, question = Image.open(args.image), args.question
    else:
        row = make_row("shifted/test", 0)
        picture, question = row["images"][0], row["problem"]

    policy = Policy.from_pretrained(args.model).requires_grad_(False)
    policy = policy.to("cuda" if torch.cuda.is_available() else "cpu")
    prompts = policy.encode([question], [[picture]])
    clean = policy.sample(prompts, args.rollouts, [0], max_new_tokens=64)
    tsec_mask = tsec.select_tokens(clean.entropy, clean.mask, args.tsec_low, args.tsec_high)
    before = show(policy, "clean image", clean, tsec_mask)

    def objective(images: list[Tensor]) -> Tensor:
        _, entropy = policy.score(prompts.with_images(images), clean.tokens, clean.mask)
        return tsec.selective_entropy(entropy, tsec_mask).mean()

    attacked = egas.pgd_ascent(objective, prompts.images, args.eps, steps=args.pgd_steps)
    signs = egas.random_signs(prompts.images, args.eps, torch.Generator().manual_seed(0))
    pictures = {"clean": prompts.images, "attacked": attacked, "random signs": signs}
    values = [f"{name} {objective(images):.4f}" for name, images in pictures.items()]
    print("\nentropy of the attacked tokens, nats:", ", ".join(values))
    adversarial = policy.sample(prompts.with_images(attacked), args.rollouts, [1], 64)
    after = show(policy, "attacked image, adversarial responses", adversarial)
    side_by_side(prompts.images[0], attacked[0], args.eps).save(args.output)
    gain = 0.5 / args.eps
    print(f"\n{args.output}: clean, attacked, difference amplified {gain:.0f} times around grey")
    return prompts.images[0], attacked[0], before, after


if __name__ == "__main__":
    main()
