"""Draw docs/loop.png, the README's picture: the six steps of the algorithm on one prompt.

    pip install -r requirements-dev.txt    # matplotlib
    python -m study.loop_picture

It trains 300 steps of recipes/demo.yaml with one prompt each, and draws the first step whose
clean responses are neither all right nor all wrong. Everything shown is in the run's folder.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BLUE, RED, ORANGE, GREY = "#215e98", "#b24a2e", "#f29e4c", "#68707a"
GAIN, DARKEST = 32, 1.2  # of the difference picture; nats of the darkest token
LEFT, MIDDLE, RIGHT, WIDTH = 20, 222, 722, 900  # in pixels of the shown picture
LINE, CHARACTER = 19, 6.1  # height of a line of tokens, width of a character


def real_step(folder: Path) -> dict:
    """The first step that fits.   Raises StopIteration where there is none."""
    size = ["--steps", "300", "--save_every", "300", "--prompts_per_step", "1"]
    command = [sys.executable, "train_saei.py", "--config", "recipes/demo.yaml", *size]
    subprocess.run([*command, "--output", str(folder)], cwd=ROOT, check=True)
    lines = {}
    for name in ("samples", "metrics"):
        text = (folder / f"{name}.jsonl").read_text()
        lines[name] = [json.loads(line) for line in text.splitlines()]
    step = next(
        metrics
        for metrics in lines["metrics"]
        if 0 < metrics["accuracy/clean"] < 1 and "entropy/attacked" in metrics
    )
    step["samples"] = [line for line in lines["samples"] if line["step"] == step["step"]]
    for image, name in (("clean", "clean_picture"), ("attacked", "picture")):
        file = Image.open(folder / step["samples"][-1][name])
        step[image] = np.asarray(file.convert("RGB"), np.float64) / 255
    return step


def picture(axes: Axes, pixels: np.ndarray, x: float, y: float, side: float, label: str) -> None:
    axes.imshow(pixels, extent=(x, x + side, y + side, y), interpolation="nearest")
    axes.text(x, y - 6, label, color=GREY, fontsize=8)


def title(axes: Axes, x: float, y: float, text: str, rest: str) -> None:
    """Bold text, and grey text after it."""
    bold = axes.text(x, y, text, weight="bold", fontsize=9)
    place = {"xycoords": bold, "xytext": (6, 0), "textcoords": "offset points"}
    axes.annotate(rest, (1, 0), **place, va="bottom", color=GREY, fontsize=9)


def heading(axes: Axes, number: int, x: float, y: float, text: str, rest: str = "") -> None:
    disc = {"boxstyle": "circle,pad=0.25", "color": BLUE}
    axes.text(x + 8, y, str(number), color="white", weight="bold", bbox=disc, ha="center")
    title(axes, x + 26, y, text, rest)


def response(axes: Axes, sample: dict, y: float) -> float:
    """Tokens shaded by entropy, TsEC's framed; reward and advantage.   -> y of the last line"""
    x, top = MIDDLE, y
    kept = sample["kept"] or [False] * len(sample["tokens"])
    for token, entropy, keep in zip(sample["tokens"], sample["entropy"], kept, strict=True):
        token = "(end)" if token == "<|im_end|>" else token.replace("\n", " ")
        width = CHARACTER * len(token)
        if x + width > RIGHT - 20:
            x, y = MIDDLE, y + LINE
        shade = to_rgba(ORANGE, min(1.0, entropy / DARKEST))
        box = {"facecolor": shade, "edgecolor": BLUE if keep else "none", "linewidth": 0.9}
        axes.add_patch(Rectangle((x, y - 12), width, 16, **box))
        axes.text(x, y, token, family="monospace", fontsize=7.3)
        x += width + 1.5
    middle, advantage = (top + y) / 2, sample["advantage"]
    colour = BLUE if advantage > 0 else RED
    axes.text(RIGHT + 46, middle, f"{sample['reward']:.1f}", ha="right", fontsize=9)
    axes.text(RIGHT + 96, middle, f"{advantage:+.2f}", ha="right", color=colour, fontsize=9)
    axes.add_patch(Rectangle((RIGHT + 138, middle - 9), 12 * advantage, 10, color=colour))
    return y


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 1.8})


def half(axes: Axes, step: dict, number: int, kind: str, label: str, top: float) -> float:
    """An image and the responses to it.   -> where they end"""
    picture(axes, step[label], LEFT, top, 170, f"{label} image")
    arrow(axes, (LEFT + 174, top + 85), (MIDDLE - 4, top + 85))
    samples, y = [sample for sample in step["samples"] if sample["image"] == kind], top
    heading(axes, number, MIDDLE, top - 6, "Sample", f"{len(samples)} responses, {label} image")
    for sample in samples:
        y = response(axes, sample, y + LINE + 7)
    return max(y, top + 170)


def draw(step: dict) -> Figure:
    figure = Figure(figsize=(WIDTH / 100, 1), dpi=200, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    question, answer = step["samples"][0]["problem"], step["samples"][0]["answer"]
    title(axes, LEFT, 28, question.split("?")[0] + "?", f"(answer: {answer})")
    heading(axes, 5, RIGHT, 64, "Reward, advantage")
    y = half(axes, step, 1, "clean", "clean", 70) + 34
    heading(axes, 2, MIDDLE, y, "TsEC", "frames tokens of moderate entropy (orange: entropy)")
    change = f"{step['entropy/selected']:.3f} to {step['entropy/attacked']:.3f} nats"
    rest = f"changes the pixels so that their entropy rises: {change}"
    heading(axes, 3, MIDDLE, y + 34, "EgAS", rest)
    difference = np.clip(0.5 + GAIN * (step["attacked"] - step["clean"]), 0, 1)
    picture(axes, difference, LEFT + 40, y + 2, 90, f"difference, times {GAIN}")
    bottom = y + 130
    arrow(axes, (LEFT + 85, 242), (LEFT + 85, y - 14))
    arrow(axes, (LEFT + 85, y + 94), (LEFT + 85, bottom - 18))
    end = half(axes, step, 4, "adversarial", "attacked", bottom) + 36
    heading(axes, 6, MIDDLE, end, "GRPO update", "with all responses, then the next batch")
    axes.set(xlim=(0, WIDTH), ylim=(end + 24, 0), aspect="equal")
    axes.axis("off")
    figure.set_figheight((end + 24) / 100)
    return figure


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        draw(real_step(Path(folder))).savefig(ROOT / "docs/loop.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
