"""What a SaEI step costs on N GPUs, computed from the model's shape: python -m benchmarks.scaling

Writes the tables of docs/scaling.md. Nothing here was timed on a GPU. FLOPs are checked on a tiny
model (tests/test_scaling.py). Seconds follow from peaks and efficiencies, which are options.

Symbols: P prompts per step, N GPUs, L prompt tokens (image included), T response tokens,
rows = prompts * responses. A product of (m, k) and (k, n) has 2 m k n FLOPs.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from benchmarks.tables import fill
from runtime import rollouts
from study.tables import table

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
    v_full: int = 4  # layers that attend to the whole image; the others attend in windows
    v_window: int = 64  # patches of a window
    patch: int = 2 * 3 * 14 * 14  # numbers of a patch
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
    """Forward of prompts of one image each.   -> the language model's, the vision tower's"""
    text = s.layers * (2 * prompts * L * s.layer + 4 * prompts * L * L * s.q)
    linear = s.v_layers * s.block + s.patch * s.v_width + s.merger // s.merge  # a patch
    keys = s.v_full * patches + (s.v_layers - s.v_full) * min(s.v_window, patches)
    return text, prompts * patches * (2 * linear + 4 * keys * s.v_width)


def response_flops(s: Shape, rows: int, L: int, T: int) -> int:
    """Forward of rows of T tokens after their prompts, whose pass predicts the first token."""
    return s.layers * rows * (T - 1) * (2 * s.layer + 4 * (L + T - 1) * s.q)


def score_flops(
    s: Shape, prompts: int, rows: int, L: int, T: int, patches: int, backward: str
) -> int:
    """Policy.score. backward: none | pixels (the inputs' gradients) | all.

    The head is computed again in a backward.
    """
    body = sum(prompt_flops(s, prompts, L, patches)) + response_flops(s, rows, L, T)
    head = 2 * rows * T * s.head
    return {"none": body + head, "pixels": 2 * body + 3 * head, "all": 3 * body + 4 * head}[
        backward
    ]


def step(s: Shape, options: argparse.Namespace, N: int) -> dict[str, float]:
    """One of N GPUs in a step of SaEI, half of the responses adversarial: FLOPs, bytes, seconds."""
    prompts, T = options.prompts / N, options.new_tokens
    L, patches = options.image_tokens + options.text_tokens, s.merge * options.image_tokens
    half, weights, bfloat16 = options.rollouts // 2, s.parameters, 2
    rows = prompts * half
    found = {"tokens": prompts * (L + 2 * half * T)}

    prefill = sum(prompt_flops(s, prompts, L, patches))
    decode = response_flops(s, rows, L, T) + 2 * rows * T * s.head
    found["sample FLOPs"] = 2 * (prefill + decode)
    attack = score_flops(s, prompts, rows, L, T, patches, "pixels")
    measure = score_flops(s, prompts, rows, L, T, patches, "none")  # entropy/attacked
    found["attack FLOPs"] = options.pgd_steps * attack + measure / rollouts.ATTACKED_EVERY
    found["update FLOPs"] = score_flops(s, prompts, 2 * rows, L, T, patches, "all")

    cache = rows * 2 * s.kv * s.layers * bfloat16  # one token of all rows
    read = bfloat16 * (s.layers * s.layer + s.head)
    found["decode bytes"] = 2 * (T * read + cache * T * (L + T / 2))
    ring = (N - 1) / N
    micro_batches = max(1.0, prompts / options.micro_prompts)
    found["DDP bytes"] = 2 * ring * weights * 4  # float32 gradients, all-reduced
    # FSDP2 gathers twice for the rollouts. A micro-batch gathers for prompt and responses, forward
    # and backward, and reduces twice, in float32.
    gathered, reduced = bfloat16 * (2 + 4 * micro_batches), 4 * 2 * micro_batches
    found["FSDP2 bytes"] = ring * weights * (gathered + reduced)

    found["DDP memory"] = 16 * weights
    found["FSDP2 memory"] = (16 / N + bfloat16) * weights
    found["cache memory"] = cache * (L + T)

    compute = options.tflops * 1e12 * options.mfu
    floor = found["decode bytes"] / (options.bandwidth * GB)
    host = 2 * T * s.layers * options.layer_us * 1e-6
    found["engine seconds"] = floor + 2 * prefill / compute
    found["sample seconds"] = max(floor, host) + 2 * prefill / compute
    for phase in ("attack", "update"):
        found[f"{phase} seconds"] = found[f"{phase} FLOPs"] / compute
    for way in ("DDP", "FSDP2"):
        found[f"{way} seconds"] = found[f"{way} bytes"] / (options.link * GB)
    return found


TABLES = [  # column -> (number of `step`, unit)
    {
        "tokens, k": ("tokens", 1e3),
        "sample, PFLOP": ("sample FLOPs", 1e15),
        "attack, PFLOP": ("attack FLOPs", 1e15),
        "update, PFLOP": ("update FLOPs", 1e15),
        "decode reads, TB": ("decode bytes", 1e12),
        "DDP moves, GB": ("DDP bytes", GB),
        "FSDP2 moves, GB": ("FSDP2 bytes", GB),
    },
    {
        "DDP, GB": ("DDP memory", GB),
        "FSDP2, GB": ("FSDP2 memory", GB),
        "cache, GB": ("cache memory", GB),
    },
    {
        "sample, s": ("sample seconds", 1),
        "attack, s": ("attack seconds", 1),
        "update, s": ("update seconds", 1),
        "DDP, s": ("DDP seconds", 1),
        "FSDP2, s": ("FSDP2 seconds", 1),
        "sample by an engine, s": ("engine seconds", 1),
    },
]


def tables(options: argparse.Namespace) -> str:
    """The tables of docs/scaling.md."""
    parts = []
    for columns in TABLES:
        rows = []
        for model, shape in MODELS.items():
            for N in (1, 4, 8, 32):
                found = step(shape, options, N)
                cells = [f"{found[name] / unit:.3g}" for name, unit in columns.values()]
                rows.append([model, str(N), *cells])
        parts.append(table(["model", "GPUs", *columns], rows))
    note = (
        f"A step of {options.prompts} prompts ({options.image_tokens} image and "
        f"{options.text_tokens} text tokens) with {options.rollouts} responses of "
        f"{options.new_tokens} tokens, PGD steps: {options.pgd_steps}, {options.micro_prompts} "
        f"prompts a micro-batch; of one GPU of {options.tflops:g} TFLOP/s, used to "
        f"{options.mfu:.0%}, {options.bandwidth:g} GB/s of memory, {options.link:g} GB/s of link; "
        f"the sampler issues a layer in {options.layer_us:g} microseconds."
    )
    return "\n\n".join([*parts, note])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--prompts", type=int, default=128)
    add("--rollouts", type=int, default=8)
    add("--image_tokens", type=int, default=1024)
    add("--text_tokens", type=int, default=128)
    add("--new_tokens", type=int, default=512)
    add("--pgd_steps", type=int, default=1)
    add("--micro_prompts", type=int, default=2)
    add("--tflops", type=float, default=312, help="peak in bfloat16: A100")
    add("--mfu", type=float, default=0.4, help="share of the peak that is reached: assumed")
    add("--bandwidth", type=float, default=2000, help="GB/s of memory: A100 80 GB")
    add("--link", type=float, default=200, help="GB/s between GPUs: assumed")
    add("--layer_us", type=float, default=300, help="host's time per layer and token: assumed")
    made = tables(parser.parse_args())
    PAGE.write_text(fill(PAGE.read_text(), {"tables": lambda: made}))


if __name__ == "__main__":
    main()
