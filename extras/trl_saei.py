"""SaEI inside TRL's GRPOTrainer, by a subclass: part of each group answers a picture that EgAS attacked.

    cp egas.py tsec.py extras/trl_saei.py FOLDER; cd FOLDER   # all that it needs beside torch, transformers, trl
    python trl_saei.py --model Qwen/Qwen2.5-VL-3B-Instruct --dataset hiyouga/geometry3k
    --learning_rate 1e-6
    python extras/trl_saei.py                                 # in the repository: the demo's model and rows

Options are the five of Options below and all of GRPOConfig's; the defaults are recipes/demo.yaml's.
A real model wants a longer max_completion_length, and P * G rows as per_device_train_batch_size
times gradient_accumulation_steps. Or SaEITrainer in a script of your own: GRPOTrainer's arguments,
and adversarial, eps, pgd_steps, tsec_low, tsec_high. What does not touch generation (rewards,
losses, LoRA, loggers, evaluation) stays TRL's.

Of a prompt's G rows, the first G - adversarial are sampled on the picture; PGD raises the entropy
of the tokens that TsEC chooses in them; the others are sampled on the attacked picture. TRL encodes
the pictures anew for the update, which so sees the clean ones (train_saei.py's `condition: clean`):
every step checks that it does.

Written for trl 1.16.0; refuses a trl that generates otherwise. Lost against train_saei.py:
    the shared prompt    the picture goes through the model again for every response: in sampling, in the update and in
                         each of the attack's pgd_steps + 3 passes (one forward for TsEC, two for
                         what is logged), one prompt at a time
    the rest             condition sampled, random signs and noise, FSDP, families other than Qwen-VL, text-only rows
                         among pictures (trl itself fails on them), entropy without a (N, T, V)
                         tensor, rollouts that do not depend on the batch. And vLLM cannot be used,
                         nor tools
"""

import contextlib
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import trl
from datasets import Dataset, load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

sys.path.append(
    str(Path(__file__).resolve().parent.parent)
)  # where egas.py, tsec.py are, unless copied beside this
import egas
import tsec

GENERATION = [
    "self",
    "prompt_ids",
    "images",
    "multimodal_fields",
    "num_generations",
    "has_tool_images",
]
READ = ("temperature", "_metrics", "_tokenizer")
REFUSED = ("use_vllm", "tools", "is_fsdp_enabled", "is_deepspeed_enabled")


class SaEITrainer(trl.GRPOTrainer):
    """GRPOTrainer's arguments; adversarial: a group's rows on the attacked picture; eps: in [0, 1] pixel units."""

    def __init__(
        self, *args, adversarial=4, eps=2 / 255, pgd_steps=3, tsec_low=0.2, tsec_high=0.8, **kwargs
    ):
        method = getattr(trl.GRPOTrainer, "_generate_single_turn", lambda: None)
        found = list(inspect.signature(method).parameters)
        expect(
            found == GENERATION, f"_generate_single_turn's arguments are {found}, not {GENERATION}"
        )
        super().__init__(*args, **kwargs)
        for name in READ + REFUSED:
            expect(hasattr(self, name), f"GRPOTrainer has no {name}")
        if refused := [name for name in REFUSED if getattr(self, name)]:
            raise ValueError(
                f"SaEITrainer samples and attacks with the whole model, by generate: no {refused}"
            )
        if not hasattr(
            getattr(self.processing_class, "image_processor", None), "temporal_patch_size"
        ):
            raise ValueError("SaEITrainer needs a Qwen-VL, whose pixel_values are patches")
        if not 1 <= adversarial < self.num_generations:
            raise ValueError(
                f"needs 1 <= adversarial < num_generations = {self.num_generations}, got {adversarial}"
            )
        self.adversarial, self.eps, self.pgd_steps, self.cuts = (
            adversarial,
            eps,
            pgd_steps,
            (tsec_low, tsec_high),
        )

    def _generate_single_turn(
        self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False
    ):
        """Clean rows, attack, adversarial rows.   N rows, a prompt's G are neighbours -> N lists of tokens, None"""
        self.clean = None
        if not self.model.training or not images:  # evaluation, a batch of text alone
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations
            )
        N, G, n = len(prompt_ids), num_generations, num_generations - self.adversarial
        if N % G or any(prompt_ids[i] != prompt_ids[i - i % G] for i in range(N)):
            raise ValueError(
                "a group is split: a device's rows a generation must be a multiple of num_generations"
            )
        fields = dict(multimodal_fields)
        self.clean, types = fields.pop("pixel_values"), fields["mm_token_type_ids"]
        grids = fields.pop("image_grid_thw").split([len(x) for x in images])
        pixels = list(
            self.clean.split([int(grid.prod(1).sum()) for grid in grids])
        )  # N times (patches, 3 * t * p * p)
        responses = [None] * N

        def sample(rows: list[int]) -> None:
            own = {name: [values[i] for i in rows] for name, values in fields.items()}
            own["pixel_values"], own["image_grid_thw"] = (
                torch.cat([x[i] for i in rows]) for x in (pixels, grids)
            )
            row_ids, row_images = [prompt_ids[i] for i in rows], [images[i] for i in rows]
            tokens, _ = super(SaEITrainer, self)._generate_single_turn(row_ids, row_images, own, G)
            for i, row in zip(rows, tokens, strict=True):
                responses[i] = row

        sample([i for i in range(N) if i % G < n])
        prompts = {i: (prompt_ids[i], types[i], grids[i]) for i in range(0, N, G)}
        for i, prompt in prompts.items():
            pixels[i + n : i + G] = [self.attack(prompt, pixels[i], responses[i : i + n])] * (G - n)
        sample([i for i in range(N) if i % G >= n])
        for i, prompt in prompts.items():
            with torch.no_grad():
                fresh = self.entropies(prompt, pixels[i + n], responses[i + n : i + G])
            self.note("entropy/fresh", tsec.selective_entropy(*fresh).mean())
        return responses, None

    def attack(self, prompt: tuple, pixels: Tensor, responses: list[list[int]]) -> Tensor:
        """TsEC and EgAS for one prompt.   the pixel_values of its pictures -> of the attacked ones"""
        ip = self.processing_class.image_processor
        mean, std = (
            torch.tensor(x, device=pixels.device).view(3, 1, 1)
            for x in (ip.image_mean, ip.image_std)
        )
        shape = (len(pixels), 3, ip.temporal_patch_size, ip.patch_size, ip.patch_size)
        clean = (pixels.view(shape)[:, :, 0] * std + mean).clamp(
            0, 1
        )  # (patches, 3, p, p); frames are equal

        def to_pixels(
            x: Tensor,
        ) -> Tensor:  # all frames alike; x = clean gives the processor's values to the bit
            return pixels + ((x - clean) / std).unsqueeze(2).expand(shape).flatten(1)

        def objective(x: Tensor) -> Tensor:
            return tsec.selective_entropy(
                self.entropies(prompt, to_pixels(x), responses)[0], keep
            ).mean()

        with frozen(self.model):
            entropy, mask = self.entropies(prompt, pixels, responses)
            keep = tsec.select_tokens(entropy, mask, *self.cuts)
            attacked = egas.pgd_ascent(objective, clean, self.eps, steps=self.pgd_steps)
            self.note("entropy/attacked", objective(attacked))
        self.note("entropy/selected", tsec.selective_entropy(entropy, keep).mean())
        self.note("entropy/clean", tsec.selective_entropy(entropy, mask).mean())
        self.note("attack/linf", (attacked - clean).abs().max())
        return to_pixels(attacked)

    def entropies(
        self, prompt: tuple, pixels: Tensor, responses: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced entropies of one prompt's responses.   -> (n, T) differentiable in pixels, mask (n, T)"""
        n, device = len(responses), self.accelerator.device
        ids, types = (torch.tensor(x, device=device).expand(n, -1) for x in prompt[:2])  # (n, L)
        rows = [torch.tensor(row, device=device) for row in responses]
        tokens = pad_sequence(
            rows, batch_first=True, padding_value=self._tokenizer.pad_token_id
        )  # (n, T)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        with self.accelerator.autocast():
            logits = self.model(  # not TRL's fused head, whose entropy has no gradient
                input_ids=torch.cat(
                    [ids, tokens], dim=1
                ),  # no attention mask: nothing looks right, where padding is
                mm_token_type_ids=torch.cat([types, torch.zeros_like(tokens)], dim=1),
                pixel_values=pixels.to(device).repeat(n, 1),
                image_grid_thw=prompt[2].to(device).repeat(n, 1),
                logits_to_keep=tokens.shape[1] + 1,
                use_cache=False,
            ).logits[:, :-1]  # (n, T, V)
        return tsec.token_entropy(logits, self.temperature), mask.bool()

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        clean = self.clean is None or torch.equal(batch["pixel_values"].cpu(), self.clean.cpu())
        expect(clean, "the update does not see the clean pictures")
        return batch

    def note(self, name: str, value: Tensor) -> None:
        self._metrics["train"][name].append(value.item())  # TRL logs the mean; the first process's


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(
            f"{otherwise}: trl_saei.py was written for trl 1.16.0, this is {trl.__version__}"
        )


@contextlib.contextmanager
def frozen(model: torch.nn.Module):
    """No parameter asks for a gradient inside."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@dataclass
class Options:
    """Further options: all of GRPOConfig's."""

    model: str = str(Path(__file__).resolve().parent.parent / "demo" / "confident")
    dataset: str | None = (
        None  # a hub id or a folder, with image or images, problem, answer; None: the demo's rows
    )
    adversarial: int = 4
    eps: float = 2 / 255
    pgd_steps: int = 3


def boxed(completions: list, answer: list[str], **columns) -> list[float]:
    """1 where the last \\boxed{} holds the answer, else 0. rewards.py has the same signature and grades with care."""
    found = [
        re.findall(r"\\boxed{([^{}]*)}", completion[0]["content"]) for completion in completions
    ]
    return [float(x[-1:] == [str(y)]) for x, y in zip(found, answer, strict=True)]


def load(name: str | None) -> Dataset:
    """The rows, with a prompt as TRL reads it."""
    if name:
        rows, ask = (
            load_dataset(name, split="train"),
            "\nReason first, then put the final answer in \\boxed{}.",
        )
    else:
        from demo.task import make_row

        rows = (make_row("shifted/train", i) for i in range(2000))
        rows = Dataset.from_list([{k: r[k] for k in ("images", "problem", "answer")} for r in rows])
        ask = ""  # its problems say so themselves
    return rows.map(
        lambda r: {
            "prompt": [{"role": "user", "content": r["problem"].replace("<image>", "") + ask}]
        }
    )


def main(arguments: list[str] | None = None) -> SaEITrainer:
    parser, cpu = trl.TrlParser((Options, trl.GRPOConfig)), not torch.cuda.is_available()
    parser.set_defaults(
        output_dir="out/trl", save_strategy="no", logging_steps=1, use_cpu=cpu, bf16=not cpu
    )
    # recipes/demo.yaml's
    parser.set_defaults(
        max_steps=20,
        per_device_train_batch_size=16 * 8,
        num_generations=8,
        max_completion_length=64,
    )
    parser.set_defaults(
        learning_rate=2e-4, lr_scheduler_type="constant", weight_decay=0.01, epsilon_high=0.28
    )
    options, config = parser.parse_args_and_config(arguments)
    saei = dict(adversarial=options.adversarial, eps=options.eps, pgd_steps=options.pgd_steps)
    trainer = SaEITrainer(options.model, boxed, config, load(options.dataset), **saei)
    images = [trainer.model.config.image_token_id, trainer.model.config.video_token_id]
    trainer.generation_config.suppress_tokens = (
        images  # in a response they would stand for pictures that are not there
    )
    trainer.train()
    names = [
        "entropy/selected",
        "entropy/attacked",
        "entropy/clean",
        "entropy/fresh",
        "attack/linf",
        "reward",
    ]
    print("step", *(f"{name:>16}" for name in names))
    for entry in trainer.state.log_history[:-1]:
        print(f"{entry['step']:4}", *(f"{entry[name]:16.4f}" for name in names))
    return trainer


if __name__ == "__main__":
    main()
