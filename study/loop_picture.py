"""Draw the README's picture, docs/loop.png: the six steps of the algorithm on one prompt, with what they really made.

    python -m study.loop_picture

The prompt is the first one in the first batch of recipes/demo.yaml whose responses are not all right and not all wrong.
Images, responses, entropies, TsEC's choice, rewards and advantages are those of the functions that train.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).resolve().parent.parent
import egas  # noqa: E402
import grpo  # noqa: E402
import train_saei  # noqa: E402
import tsec  # noqa: E402
from runtime import data  # noqa: E402
from vlm.policy import Policy, Responses  # noqa: E402

GAIN = 32  # of the difference picture
DEEPEST, SHADES = 1.2, 8  # nats: the darkest shade of a token; how many there are
END = "(end)"  # how the end token is written
SIDE, LEFT, MIDDLE, RIGHT = (
    384,
    92,
    540,
    1392,
)  # of a large picture; where images, responses and rewards begin
TOPS, LINE, ZERO = (
    (140, 860),
    94,
    1684,
)  # of the two halves; from response to response; the bars' zero
INK, GREY, FRAME = (31, 36, 42), (104, 111, 120), (196, 202, 209)
BLUE, RUST, SHADE = (33, 94, 152), (178, 74, 46), (242, 158, 76)

# ----------------------------------------------------------------------------------------- what one prompt went through


def one_prompt() -> dict:
    """Steps 1 to 5 of recipes/demo.yaml's first batch, prompt by prompt, up to the first whose accuracies differ."""
    cfg = train_saei.load_config(["--config", str(ROOT / "recipes/demo.yaml")])
    policy = Policy.from_pretrained(str(ROOT / cfg.model))
    rows = data.load_rows(cfg.dataset, cfg.split)
    functions = train_saei.load_rewards(cfg, rows[0])
    for index in train_saei.epoch_order(cfg.seed, 0, len(rows))[: cfg.prompts_per_step]:
        row, index = rows[int(index)], [int(index)]
        seeds = [train_saei.seeds_of(cfg, 0, index, branch) for branch in range(3)]
        prompts = policy.encode([row["problem"]], [row["images"]])
        clean = train_saei.sample(cfg, policy, prompts, cfg.clean_rollouts, seeds[0])
        keep = tsec.select_tokens(
            clean.entropy, clean.mask, cfg.tsec_low, cfg.tsec_high, cfg.tsec_scope, cfg.tsec_keep
        )
        attacked = train_saei.intervene(cfg, policy, prompts, clean, keep, 0, seeds[1], 1)
        fresh = train_saei.sample(cfg, policy, attacked, cfg.adversarial_rollouts, seeds[2])
        _, scores = train_saei.reward(functions, policy, [row], clean, fresh)
        if not grpo.equal_groups(scores["accuracy"]):
            break
    else:
        raise RuntimeError(
            "every group of the first batch is all right or all wrong: another model or recipe?"
        )
    objective = train_saei.entropy_objective(policy, prompts, clean, keep, cfg.temperature)
    with torch.no_grad():
        entropy = [objective(x.images).item() for x in (prompts, attacked)]
    advantages = grpo.group_advantages(scores["reward"], scale=cfg.advantage_scale)
    lines = [tokens_of(policy, half, i) for half in (clean, fresh) for i in range(len(half.tokens))]
    for i, line in enumerate(lines[: cfg.clean_rollouts]):
        lines[i] = [
            (*token[:2], kept)
            for token, kept in zip(line, keep[i][clean.mask[i]].tolist(), strict=True)
        ]
    found = {"cfg": cfg, "row": row, "clean": prompts.images[0], "attacked": attacked.images[0]}
    return (
        found
        | {
            "entropy": entropy,
            "lines": lines,  # of the responses, the clean ones first: (token, its entropy, whether TsEC kept it)
            "rewards": scores["reward"][0].tolist(),
            "advantages": advantages[0].tolist(),
        }
    )


def tokens_of(policy: Policy, responses: Responses, i: int) -> list[tuple[str, float, bool]]:
    mask, decode = responses.mask[i], policy.processor.tokenizer.decode
    names = [
        END if t in policy.eos_ids else decode([t]) for t in responses.tokens[i][mask].tolist()
    ]
    return [
        (name, h, False) for name, h in zip(names, responses.entropy[i][mask].tolist(), strict=True)
    ]


# --------------------------------------------------------------------------------------------------- drawing, in pixels


class Sheet:
    """A white picture, drawn at twice the size at which it is shown."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width, height), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.pictures = []

    def finished(self) -> Image.Image:
        """Few colours but in the pictures, which stay exact: a small file."""
        image = self.image.quantize(36, dither=Image.Dither.NONE).convert("RGB")
        for picture, place in self.pictures:
            image.paste(picture, place)
        return image

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int = 27,
        fill=INK,
        bold: bool = False,
        anchor: str = "lm",
    ):
        """-> where the text ends"""
        font = ImageFont.load_default(size)
        self.draw.text(
            (x, y), text, fill, font, anchor=anchor, stroke_width=0.6 * bold, stroke_fill=fill
        )
        return x + self.draw.textlength(text, font)

    def step(self, number: int, x: float, y: float, title: str, rest: str = "") -> float:
        """A numbered disc, a bold title, and what follows.   -> where it ends"""
        self.draw.ellipse((x, y - 21, x + 42, y + 21), BLUE)
        self.text(x + 21, y + 1, str(number), 27, "white", True, "mm")
        end = self.text(x + 56, y, title, 29, INK, True)
        return self.text(end + 14, y, rest, 27, GREY)

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, along the axes, with a head at its end."""
        (x0, y0), (x1, y1) = points[-2:]
        dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        back = (x1 - 16 * dx, y1 - 16 * dy)
        sides = [(back[0] + k * dy, back[1] + k * dx) for k in (-11, 11)]
        self.draw.line([*points[:-1], back], BLUE, 5, joint="curve")
        self.draw.polygon([points[-1], *sides], BLUE)

    def picture(self, x: int, y: int, side: int, pixels: Tensor, label: str) -> None:
        """Enlarged by whole pixels, framed, its label above."""
        picture = to_pil_image(pixels).resize((side, side), Image.Resampling.NEAREST)
        self.draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), FRAME)
        self.pictures.append((picture, (x, y)))
        self.text(x, y - 24, label, 27, INK, True)

    def response(
        self, x: float, y: float, right: float, tokens: list[tuple[str, float, bool]]
    ) -> None:
        """Tokens shaded by entropy, TsEC's framed, on one or two lines around y."""
        font, lines, at = ImageFont.load_default(25), [[]], x
        for name, entropy, kept in tokens:
            width = max(15, self.draw.textlength(name, font) + 5)
            if at + width > right:
                lines.append([])
                at = x
            lines[-1].append((name, at, width, shade(entropy), kept))
            at += width + 3
        for i, line in enumerate(lines):
            middle = y + 39 * (i - (len(lines) - 1) / 2)
            for name, at, width, colour, kept in line:
                box = (at, middle - 17, at + width, middle + 17)
                self.draw.rectangle(box, colour, BLUE if kept else None, 2)
                self.text(
                    at + width / 2, middle, name, 25, GREY if name == END else INK, anchor="mm"
                )


def shade(entropy: float) -> tuple[int, int, int]:
    """White at 0 to SHADE at DEEPEST nats, in SHADES steps."""
    share = round(SHADES * min(1.0, entropy / DEEPEST)) / SHADES
    return tuple(round(255 + share * (c - 255)) for c in SHADE)


def paint(x: dict) -> Image.Image:
    """Left to right: images, responses, rewards; downwards: the clean half, the attack, the other half, the update."""
    n, s = x["cfg"].clean_rollouts, Sheet(1800, 1424)
    end = s.text(LEFT, 40, x["row"]["problem"].split("?")[0] + "?", 32, INK, True)
    s.text(end + 24, 40, f"(answer: {x['row']['answer']})", 29, GREY)
    halves = [("clean", x["lines"][:n]), ("attacked", x["lines"][n:])]
    for top, (kind, lines) in zip(TOPS, halves, strict=True):
        s.picture(LEFT, top, SIDE, x[kind], f"{kind} image")
        s.arrow((LEFT + SIDE + 12, top + SIDE / 2), (MIDDLE - 12, top + SIDE / 2))
        for i, line in enumerate(lines):
            s.response(MIDDLE, top + 50 + LINE * i, RIGHT - 20, line)
    s.step(1, MIDDLE, TOPS[0] - 24, "Sample", f"{n} responses to the clean image")
    s.step(4, MIDDLE, TOPS[1] - 24, "Sample", f"{len(x['lines']) - n} more to the attacked image")
    attack(s, x)
    outcome(s, x)

    bottom, rail = TOPS[1] + SIDE + 78, 40  # the way back to the top
    image = "the clean image" if x["cfg"].condition == "clean" else "the image it was sampled on"
    end = s.step(
        6, MIDDLE, bottom, "GRPO update", f"each response scored on {image}; then the next batch"
    )
    s.draw.line([(ZERO, bottom - 76), (ZERO, bottom), (end + 16, bottom)], BLUE, 5, joint="curve")
    clean = (LEFT - 12, TOPS[0] + SIDE / 2)
    s.arrow((MIDDLE - 12, bottom), (rail, bottom), (rail, clean[1]), clean)
    caption = f"Drawn from a real step of recipes/demo.yaml ({x['cfg'].model}): the first prompt of its first batch"
    s.text(
        LEFT,
        bottom + 64,
        caption + " whose responses are not all right and not all wrong.",
        24,
        GREY,
    )
    return s.finished()


def attack(s: Sheet, x: dict) -> None:
    """Steps 2 and 3, between the halves: the chosen tokens, the change of the pixels, what it does to the entropy."""
    cfg, top, side = x["cfg"], TOPS[0] + SIDE, 192
    cuts = f"quantiles {cfg.tsec_low:g} to {cfg.tsec_high:g}"
    s.step(2, MIDDLE, top + 52, "TsEC", f"frames the tokens of moderate entropy, {cuts}")
    x0, y0 = MIDDLE + 56, top + 88
    for i in range(SHADES + 1):
        s.draw.rectangle((x0 + 32 * i, y0, x0 + 32 * i + 32, y0 + 26), shade(DEEPEST * i / SHADES))
    s.draw.rectangle((x0, y0, x0 + 32 * (SHADES + 1), y0 + 26), None, FRAME, 2)
    s.text(
        x0 + 32 * (SHADES + 1) + 14, y0 + 14, f"a token's entropy, 0 to {DEEPEST} nats", 25, GREY
    )

    s.arrow((MIDDLE + 21, top - 24), (MIDDLE + 21, top + 25))
    s.arrow((MIDDLE + 21, top + 79), (MIDDLE + 21, top + 141))
    s.step(
        3,
        MIDDLE,
        top + 168,
        "EgAS",
        f"{cfg.pgd_steps} steps up the gradient of the framed tokens' entropy",
    )
    for i, (name, value) in enumerate(zip(("clean", "attacked"), x["entropy"], strict=True)):
        y, length = top + 214 + 40 * i, 300 * value / max(x["entropy"])
        s.text(MIDDLE + 56, y, name, 25, GREY)
        s.draw.rectangle((MIDDLE + 170, y - 13, MIDDLE + 170 + length, y + 13), SHADE)
        s.text(MIDDLE + 182 + length, y, f"{value:.3f} nats", 25)

    x0, y0, centre = LEFT + SIDE - side, top + 70, LEFT + SIDE - side // 2
    psnr = egas.psnr(x["attacked"], x["clean"])
    difference = (0.5 + GAIN * (x["attacked"] - x["clean"])).clamp(0, 1)
    s.picture(x0, y0, side, difference, "")
    lines = (
        "difference",
        f"times {GAIN}",
        f"at most {255 * cfg.eps:.2g}/255,",
        f"PSNR {psnr:.0f} dB",
    )
    for i, text in enumerate(lines):
        s.text(LEFT, y0 + 42 + 38 * i, text, 25, GREY if i else INK, not i)
    s.arrow((centre, top + 8), (centre, y0 - 8))
    s.arrow((centre, y0 + side + 6), (centre, TOPS[1] - 8))
    s.arrow((MIDDLE - 12, top + 168), (x0 + side + 12, top + 168))


def outcome(s: Sheet, x: dict) -> None:
    """Step 5: each response's reward, and its advantage as a number and a bar."""
    n, unit = x["cfg"].clean_rollouts, 90 / max(map(abs, x["advantages"]))
    s.step(5, RIGHT, TOPS[0] - 24, "Reward, advantage")
    for i, (r, a) in enumerate(zip(x["rewards"], x["advantages"], strict=True)):
        y, colour, ends = (
            TOPS[i >= n] + 50 + LINE * (i - n * (i >= n)),
            BLUE if a > 0 else RUST,
            sorted((0, a * unit)),
        )
        s.text(RIGHT + 56, y, f"{r:.1f}", 29, INK, r == max(x["rewards"]))
        s.text(RIGHT + 196, y, f"{a:+.2f}", 27, colour, anchor="rm")
        s.draw.rectangle((ZERO + ends[0], y - 14, ZERO + ends[1], y + 14), colour)
        s.draw.line((ZERO, y - 30, ZERO, y + 30), GREY, 3)
    for top in TOPS:
        s.arrow((RIGHT - 14, top + SIDE / 2), (RIGHT + 36, top + SIDE / 2))
    cfg, rewards = x["cfg"], torch.tensor(x["rewards"])
    lines = [
        f"{cfg.accuracy_weight:g} accuracy + {cfg.format_weight:g} format",
        "(reward - mean) / std,",
    ]
    lines += [
        f"mean {rewards.mean():.2f} and std {rewards.std():.2f}",
        f"of all {len(rewards)} responses",
    ]
    for i, text in enumerate(lines):
        s.text(RIGHT + 56, TOPS[0] + SIDE + 66 + 38 * i + 22 * (i > 0), text, 25, GREY)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs/loop.png")
    output = parser.parse_args(arguments).output
    found = one_prompt()
    paint(found).save(output, optimize=True)
    return found


if __name__ == "__main__":
    main()
