"""What a SaEI step costs on N GPUs, worked out from the model's shape: `python -m benchmarks.scaling`

It writes the tables of docs/scaling.md. Nothing here was timed on a GPU: FLOPs are checked on a tiny model
(tests/test_scaling.py), seconds follow from the peaks and efficiencies below, which are arguments (--help).

Symbols: P prompts a step, N GPUs, L prompt tokens (of the image too), T response tokens, rows = prompts * responses.
A product of (m, k) and (k, n) is 2 m k n FLOPs.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parent.parent / "docs/scaling.md"
GB = 1e9


class Shape(NamedTuple):
    """Sizes in the config of a Qwen2.5-VL."""

    width: int
    inner: int
    layers: int
    q: int  # heads * size of a head
    kv: int
    vocabulary: int
    tied: bool
    v_width: int = 1280
    v_inner: int = 3420
    v_layers: int = 32
    v_full: int = 4  # of them attend to the whole image, the others in windows of
    v_window: int = 64  # patches
    patch: int = 2 * 3 * 14 * 14  # numbers
    merge: int = 4  # patches of an image token

    @property
    def layer(self) -> int:
        """Weights of a language model's layer, biases and norms left out."""
        return self.width * (2 * self.q + 2 * self.kv + 3 * self.inner)

    @property
    def block(self) -> int:
        return self.v_width * (4 * self.v_width + 3 * self.v_inner)

    @property
    def head(self) -> int:
        return self.width * self.vocabulary

    @property
    def merger(self) -> int:
        wide = self.merge * self.v_width
        return wide * (wide + self.width)

    @property
    def parameters(self) -> int:
        tower = self.v_layers * self.block + self.merger + self.patch * self.v_width
        return self.layers * self.layer + (1 if self.tied else 2) * self.head + tower


MODELS = {
    "3B": Shape(2048, 11008, 36, 2048, 256, 151936, True),
    "7B": Shape(3584, 18944, 28, 3584, 512, 152064, False),
}


def prompt_flops(s: Shape, prompts: int, L: int, patches: int) -> tuple[int, int]:
    """Forward of `prompts` prompts of one image each.   -> the language model's, the vision tower's"""
    text = s.layers * (2 * prompts * L * s.layer + 4 * prompts * L * L * s.q)
    linear = s.v_layers * s.block + s.patch * s.v_width + s.merger // s.merge  # a patch
    keys = s.v_full * patches + (s.v_layers - s.v_full) * min(s.v_window, patches)
    return text, prompts * patches * (2 * linear + 4 * keys * s.v_width)


def response_flops(s: Shape, rows: int, L: int, T: int) -> int:
    """Forward of rows of T tokens after their prompts: the first is predicted by the prompt's pass."""
    return s.layers * rows * (T - 1) * (2 * s.layer + 4 * (L + T - 1) * s.q)


def score_flops(
    s: Shape, prompts: int, rows: int, L: int, T: int, patches: int, backward: str
) -> int:
    """Policy.score. backward: none | pixels (the inputs' gradients) | all. The head is computed again in a backward."""
    body = sum(prompt_flops(s, prompts, L, patches)) + response_flops(s, rows, L, T)
    head = 2 * rows * T * s.head
    return {"none": body + head, "pixels": 2 * body + 3 * head, "all": 3 * body + 4 * head}[
        backward
    ]


def step(s: Shape, a: argparse.Namespace, N: int) -> dict[str, float]:
    """Numbers of one of N GPUs in a step of SaEI, half of the responses adversarial. FLOPs, bytes, seconds."""
    prompts, T, patches, n = a.prompts / N, a.new_tokens, s.merge * a.image_tokens, a.rollouts // 2
    L, weights, c = a.image_tokens + a.text_tokens, s.parameters, 2  # bfloat16
    common = (L, T, patches)
    out = {"tokens": prompts * (L + 2 * n * T)}
    rows = prompts * n
    prefill = sum(prompt_flops(s, prompts, L, patches))
    out["sample FLOPs"] = 2 * (prefill + response_flops(s, rows, L, T) + 2 * rows * T * s.head)
    out["attack FLOPs"] = a.pgd_steps * score_flops(s, prompts, rows, *common, "pixels")
    out["attack FLOPs"] += score_flops(
        s, prompts, rows, *common, "none"
    )  # entropy/attacked, measured
    out["update FLOPs"] = score_flops(s, prompts, 2 * rows, *common, "all")
    cache = rows * 2 * s.kv * s.layers * c  # a token of all rows
    read = c * (s.layers * s.layer + s.head)
    out["decode bytes"] = 2 * (T * read + cache * T * (L + T / 2))
    ring, micro = (N - 1) / N, max(1.0, prompts / a.micro_prompts)
    out["DDP bytes"] = 2 * ring * weights * 4  # float32 gradients, all-reduced
    # FSDP2: gathered twice for the rollouts; a micro-batch gathers for prompt and responses, forward and backward, and
    # reduces twice, in float32
    out["FSDP2 bytes"] = ring * weights * (c * (2 + 4 * micro) + 4 * 2 * micro)
    out["DDP memory"], out["FSDP2 memory"] = 16 * weights, (16 / N + c) * weights
    out["cache memory"] = cache * (L + T)
    compute = a.tflops * 1e12 * a.mfu
    floor = out["decode bytes"] / (a.bandwidth * GB)
    host = 2 * T * s.layers * a.layer_us * 1e-6
    out["engine seconds"] = floor + 2 * prefill / compute
    out["sample seconds"] = max(floor, host) + 2 * prefill / compute
    out["attack seconds"], out["update seconds"] = (
        out["attack FLOPs"] / compute,
        out["update FLOPs"] / compute,
    )
    out["DDP seconds"], out["FSDP2 seconds"] = (
        out[f"{x} bytes"] / (a.link * GB) for x in ("DDP", "FSDP2")
    )
    return out


def tables(a: argparse.Namespace) -> str:
    """Markdown."""
    columns = {"tokens, k": ("tokens", 1e3)}
    columns |= {f"{x}, PFLOP": (f"{x} FLOPs", 1e15) for x in ("sample", "attack", "update")}
    columns |= {"decode reads, TB": ("decode bytes", 1e12)}
    columns |= {f"{x} moves, GB": (f"{x} bytes", GB) for x in ("DDP", "FSDP2")}
    memory = {f"{x}, GB": (f"{x} memory", GB) for x in ("DDP", "FSDP2", "cache")}
    times = {f"{x}, s": (f"{x} seconds", 1) for x in ("sample", "attack", "update", "DDP", "FSDP2")}
    times |= {"sample by an engine, s": ("engine seconds", 1)}
    text = ""
    for names in (columns, memory, times):
        text += "| model | GPUs | " + " | ".join(names) + " |\n" + "|---" * (2 + len(names)) + "|\n"
        for model, s in MODELS.items():
            for N in (1, 4, 8, 32):
                x = step(s, a, N)
                cells = [f"{x[key] / unit:.3g}" for key, unit in names.values()]
                text += f"| {model} | {N} | " + " | ".join(cells) + " |\n"
        text += "\n"
    return text + (
        f"A step of {a.prompts} prompts ({a.image_tokens} image and {a.text_tokens} text tokens) with {a.rollouts} "
        f"responses of {a.new_tokens} tokens, {a.pgd_steps} PGD steps, {a.micro_prompts} prompts a micro-batch; of one "
        f"GPU of {a.tflops:g} TFLOP/s, used to {a.mfu:.0%}, {a.bandwidth:g} GB/s of memory, {a.link:g} GB/s of link; "
        f"the sampler issues a layer in {a.layer_us:g} microseconds."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--image_tokens", type=int, default=1024)
    parser.add_argument("--text_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=512)
    parser.add_argument("--pgd_steps", type=int, default=3)
    parser.add_argument("--micro_prompts", type=int, default=2)
    parser.add_argument("--tflops", type=float, default=312, help="peak in bfloat16: A100")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that is reached: assumed"
    )
    parser.add_argument("--bandwidth", type=float, default=2000, help="GB/s of memory: A100 80 GB")
    parser.add_argument(
        "--link", type=float, default=200, help="GB/s between GPUs: assumed; a network is slower"
    )
    parser.add_argument(
        "--layer_us", type=float, default=300, help="host's time for a layer of one token: assumed"
    )
    text = tables(parser.parse_args())
    before, rest = PAGE.read_text().split("<!-- tables -->\n")
    after = rest.split("<!-- /tables -->")[1]
    PAGE.write_text(f"{before}<!-- tables -->\n{text}\n<!-- /tables -->{after}")


if __name__ == "__main__":
    main()
