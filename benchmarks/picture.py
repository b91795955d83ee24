"""Draw the README's picture, docs/demo.jpg: clean image, attacked image and their difference, with the entropies.

python benchmarks/picture.py
"""

import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import egas  # noqa: E402
import train_saei  # noqa: E402
import tsec  # noqa: E402
from policy import Policy  # noqa: E402

COUNT, SIDE, LEFT, GAP = 5, 168, 104, 10  # pictures in a row, their side, the labels' width
INK, GREY = (28, 31, 36), (105, 110, 118)


def main() -> None:
    cfg = train_saei.load_config(["--config", str(ROOT / "recipes/demo.yaml")])
    policy = Policy.from_pretrained(str(ROOT / cfg.model))
    problems = data.load_rows(cfg.dataset, cfg.split.replace("/train", "/test"), limit=COUNT)
    rows = [problems[i] for i in range(COUNT)]
    prompts = policy.encode([row["problem"] for row in rows], [row["images"] for row in rows])
    clean = policy.sample(prompts, 8, list(range(COUNT)), cfg.max_new_tokens)
    keep = tsec.select_tokens(clean.entropy, clean.mask, cfg.tsec_low, cfg.tsec_high)
    objective = train_saei.entropy_objective(policy, prompts, clean, keep, cfg.temperature)
    attacked = egas.pgd_ascent(objective, prompts.images, cfg.eps, cfg.step_size, cfg.pgd_steps)
    with torch.no_grad():
        before, after = objective(prompts.images).tolist(), objective(attacked).tolist()

    height = 3 * (SIDE + GAP) + 84
    sheet = Image.new("RGB", (LEFT + COUNT * (SIDE + GAP), height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    psnr = sum(map(egas.psnr, attacked, prompts.images)) / COUNT
    labels = ["clean", f"attacked\neps {255 * cfg.eps:.2g}/255\n{psnr:.0f} dB", "difference\nx 16"]
    for i, label in enumerate(labels):
        draw.multiline_text((8, i * (SIDE + GAP) + SIDE // 2 - 24), label, INK, font, spacing=6)
    for j, (x, y) in enumerate(zip(prompts.images, attacked, strict=True)):
        left = LEFT + j * (SIDE + GAP)
        for i, image in enumerate((x, y, (0.5 + 16 * (y - x)).clamp(0, 1))):
            picture = to_pil_image(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, GAP // 2 + i * (SIDE + GAP)))
        top = 3 * (SIDE + GAP) + 4
        draw.text((left, top), f"H {before[j]:.3f} to {after[j]:.3f}", INK, font)
        question = textwrap.fill(rows[j]["problem"].split("?")[0] + f"? {rows[j]['answer']}", 27)
        draw.multiline_text((left, top + 24), question, GREY, ImageFont.load_default(12), spacing=4)
    draw.text((8, 3 * (SIDE + GAP) + 4), "entropy, nats", GREY, ImageFont.load_default(13))
    (ROOT / "docs").mkdir(exist_ok=True)
    sheet.save(ROOT / "docs/demo.jpg", quality=88)


if __name__ == "__main__":
    main()
