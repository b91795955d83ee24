"""SaEI inside TRL's GRPOTrainer: part of each group answers a picture that EgAS attacked.

    cp egas.py tsec.py extras/trl_saei.py FOLDER; cd FOLDER  # beside torch, transformers, trl
    python trl_saei.py --model Qwen/Qwen2.5-VL-3B-Instruct --dataset hiyouga/geometry3k \\
        --learning_rate 1e-6
    python -m extras.trl_saei                       # in the repository: the demo's model and rows

Options: the five of Options below and all of GRPOConfig's. The defaults are those of
recipes/demo.yaml. A real model needs a longer max_completion_length, and P * G rows as
per_device_train_batch_size times gradient_accumulation_steps. In a script of your own use
SaEITrainer: GRPOTrainer's arguments, and adversarial, eps, pgd_steps, tsec_low, tsec_high. What
does not touch generation (rewards, losses, LoRA, loggers, evaluation) stays TRL's.

Of a prompt's G rows, the first G - adversarial are sampled on the picture. PGD raises the entropy
of the tokens that TsEC chooses in them. The other rows are sampled on the attacked picture. For the
update TRL encodes the pictures anew, so it sees the clean ones (train_saei.py's `condition:
clean`). Every step checks that it does.

Written for trl 1.16.0. A trl that generates otherwise is refused. Differences to train_saei.py:
    shared prompt  The picture goes through the model again for every response: in sampling, in the
                   update, and in each of the attack's pgd_steps + 3 passes per prompt (one forward
                   for TsEC, two for what is logged).
    missing        condition sampled, random signs and noise, FSDP, families other than Qwen-VL,
                   text-only rows among pictures (TRL itself fails on them), entropy without a
                   (N, T, V) tensor, rollouts that do not depend on the batch, vLLM, tools.
"""

import contextlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import trl
from datasets import Dataset, load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import egas
import tsec

SIGNATURE = ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"]
SIGNATURE += ["has_tool_images"]  # of GRPOTrainer._generate_single_turn
READ = ("temperature", "_metrics", "_tokenizer")
REFUSED = ("use_vllm", "tools", "is_fsdp_enabled", "is_deepspeed_enabled")


class Prompt(NamedTuple):
    """One prompt as the model reads it, without its pixels."""

    ids: list[int]
    token_types: list[int]  # mm_token_type_ids
    grid: Tensor  # (pictures, 3): image_grid_thw


class SaEITrainer(trl.GRPOTrainer):
    """GRPOTrainer's arguments, and those of SaEI.

    adversarial: rows of a group on the attacked picture. eps: in [0, 1] pixel units.
    """

    def __init__(
        self, *args, adversarial=4, eps=2 / 255, pgd_steps=1, tsec_low=0.2, tsec_high=0.8, **kwargs
    ):
        method = getattr(trl.GRPOTrainer, "_generate_single_turn", lambda: None)
        found = list(inspect.signature(method).parameters)
        expect(found == SIGNATURE, f"_generate_single_turn has {found}, not {SIGNATURE}")
        super().__init__(*args, **kwargs)
        for name in READ + REFUSED:
            expect(hasattr(self, name), f"GRPOTrainer has no {name}")
        refused = [name for name in REFUSED if getattr(self, name)]
        if refused:
            raise ValueError(
                f"SaEITrainer samples and attacks with the whole model, by generate: no {refused}"
            )
        image_processor = getattr(self.processing_class, "image_processor", None)
        if not hasattr(image_processor, "temporal_patch_size"):
            raise ValueError("SaEITrainer needs a Qwen-VL, whose pixel_values are patches")
        if not 1 <= adversarial < self.num_generations:
            raise ValueError(
                f"needs 1 <= adversarial < num_generations = {self.num_generations}, "
                f"got {adversarial}"
            )
        self.adversarial, self.eps, self.pgd_steps = adversarial, eps, pgd_steps
        self.cuts = (tsec_low, tsec_high)

    def _generate_single_turn(
        self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False
    ):
        """Clean rows, attack, adversarial rows.   N rows, groups of G -> N lists of tokens, None"""
        self.clean = None
        generate = super()._generate_single_turn
        if not self.model.training or not images:  # evaluation, a batch of text alone
            return generate(prompt_ids, images, multimodal_fields, num_generations)
        N, G, n = len(prompt_ids), num_generations, num_generations - self.adversarial
        firsts = range(0, N, G)
        if N % G or any(prompt_ids[i] != prompt_ids[i - i % G] for i in range(N)):
            raise ValueError(
                "a group is split: a device's rows per generation must be a multiple of "
                "num_generations"
            )
        fields = dict(multimodal_fields)
        self.clean, types = fields.pop("pixel_values"), fields["mm_token_type_ids"]
        grids = fields.pop("image_grid_thw").split([len(pictures) for pictures in images])
        patches = [int(grid.prod(1).sum()) for grid in grids]
        pixels = list(self.clean.split(patches))  # N times (patches, 3 * t * p * p)
        responses = [None] * N

        def sample(rows: list[int]) -> None:
            kept = {name: [values[i] for i in rows] for name, values in fields.items()}
            kept["pixel_values"] = torch.cat([pixels[i] for i in rows])
            kept["image_grid_thw"] = torch.cat([grids[i] for i in rows])
            row_ids, row_images = [prompt_ids[i] for i in rows], [images[i] for i in rows]
            tokens, _ = generate(row_ids, row_images, kept, G)
            for i, row in zip(rows, tokens, strict=True):
                responses[i] = row

        sample([i for i in range(N) if i % G < n])
        prompts = {i: Prompt(prompt_ids[i], types[i], grids[i]) for i in firsts}
        for i, prompt in prompts.items():
            attacked = self.attack(prompt, pixels[i], responses[i : i + n])
            pixels[i + n : i + G] = [attacked] * (G - n)
        sample([i for i in range(N) if i % G >= n])
        for i, prompt in prompts.items():
            with torch.no_grad():
                entropy = self.entropies(prompt, pixels[i + n], responses[i + n : i + G])
            self.note("entropy/adversarial", tsec.selective_entropy(*entropy).mean())
        return responses, None

    def attack(self, prompt: Prompt, pixels: Tensor, responses: list[list[int]]) -> Tensor:
        """TsEC and EgAS for one prompt.   pixel_values of its pictures -> of the attacked ones"""
        ip, device = self.processing_class.image_processor, pixels.device
        mean = torch.tensor(ip.image_mean, device=device).view(3, 1, 1)
        std = torch.tensor(ip.image_std, device=device).view(3, 1, 1)
        shape = (len(pixels), 3, ip.temporal_patch_size, ip.patch_size, ip.patch_size)
        frame = pixels.view(shape)[:, :, 0]  # all frames of a picture are equal
        clean = (frame * std + mean).clamp(0, 1)  # (patches, 3, p, p)

        def to_pixels(x: Tensor) -> Tensor:
            """The processor's values plus the change, so that x = clean gives them to the bit."""
            return pixels + ((x - clean) / std).unsqueeze(2).expand(shape).flatten(1)

        def objective(x: Tensor) -> Tensor:
            entropy, _ = self.entropies(prompt, to_pixels(x), responses)
            return tsec.selective_entropy(entropy, tsec_mask).mean()

        with frozen(self.model):
            entropy, mask = self.entropies(prompt, pixels, responses)
            tsec_mask = tsec.select_tokens(entropy, mask, *self.cuts)
            attacked = egas.pgd_ascent(objective, clean, self.eps, steps=self.pgd_steps)
            self.note("entropy/attacked", objective(attacked))
        self.note("entropy/selected", tsec.selective_entropy(entropy, tsec_mask).mean())
        self.note("entropy/clean", tsec.selective_entropy(entropy, mask).mean())
        self.note("attack/linf", (attacked - clean).abs().max())
        return to_pixels(attacked)

    def entropies(
        self, prompt: Prompt, pixels: Tensor, responses: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced entropies of one prompt's responses, differentiable in pixels.

        -> entropy (n, T), mask (n, T) bool
        """
        n, device = len(responses), self.accelerator.device
        ids = torch.tensor(prompt.ids, device=device).expand(n, -1)  # (n, L)
        types = torch.tensor(prompt.token_types, device=device).expand(n, -1)
        rows = [torch.tensor(row, device=device) for row in responses]
        pad = self._tokenizer.pad_token_id
        tokens = pad_sequence(rows, batch_first=True, padding_value=pad)  # (n, T)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
        with self.accelerator.autocast():
            output = self.model(  # not TRL's fused head, whose entropy has no gradient
                input_ids=torch.cat([ids, tokens], dim=1),  # no token attends to padding after it
                mm_token_type_ids=torch.cat([types, torch.zeros_like(tokens)], dim=1),
                pixel_values=pixels.to(device).repeat(n, 1),
                image_grid_thw=prompt.grid.to(device).repeat(n, 1),
                logits_to_keep=tokens.shape[1] + 1,
                use_cache=False,
            )
        return tsec.token_entropy(output.logits[:, :-1], self.temperature), mask

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        clean = self.clean is None or torch.equal(batch["pixel_values"].cpu(), self.clean.cpu())
        expect(clean, "the update does not see the clean pictures")
        return batch

    def note(self, name: str, value: Tensor) -> None:
        """Log a value of this prompt. TRL logs the mean, of the first process."""
        self._metrics["train"][name].append(value.item())


def expect(holds: bool, otherwise: str) -> None:
    """Raise RuntimeError unless TRL is as this file assumes."""
    if not holds:
        raise RuntimeError(
            f"{otherwise}: trl_saei.py was written for trl 1.16.0, this is {trl.__version__}"
        )


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


# ------------------------------------------------------------------------------- command line

DEMO = {  # as recipes/demo.yaml
    "max_steps": 20,
    "per_device_train_batch_size": 16 * 8,
    "num_generations": 8,
    "max_completion_length": 64,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.01,
    "epsilon_high": 0.28,
}
LOGGED = ["entropy/selected", "entropy/attacked", "entropy/clean", "entropy/adversarial"]
LOGGED += ["attack/linf", "reward"]


@dataclass
class Options:
    """Further options: all of GRPOConfig's."""

    model: str = str(Path(__file__).resolve().parent.parent / "demo" / "confident")
    # A hub id or a folder with image or images, problem, answer. None: the demo's rows.
    dataset: str | None = None
    adversarial: int = 4
    eps: float = 2 / 255
    pgd_steps: int = 1


def boxed(completions: list, answer: list[str], **columns) -> list[float]:
    """1 where the last \\boxed{} holds the answer, else 0. rewards.py grades with more care."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        found = re.findall(r"\\boxed{([^{}]*)}", completion[0]["content"])
        rewards.append(float(found[-1:] == [str(right)]))
    return rewards


def load(name: str | None) -> Dataset:
    """The rows, with a prompt as TRL reads it."""
    if name:
        rows = load_dataset(name, split="train")
        ask = "\nReason first, then put the final answer in \\boxed{}."
    else:
        from demo.task import make_row

        rows, ask = [make_row("shifted/train", i) for i in range(2000)], ""  # it asks by itself
        columns = ("images", "problem", "answer")
        rows = Dataset.from_list([{name: row[name] for name in columns} for row in rows])

    def add_prompt(row: dict) -> dict:
        content = row["problem"].replace("<image>", "") + ask
        return {"prompt": [{"role": "user", "content": content}]}

    return rows.map(add_prompt)


def main(arguments: list[str] | None = None) -> SaEITrainer:
    """Train and print what was logged."""
    cpu = not torch.cuda.is_available()
    parser = trl.TrlParser((Options, trl.GRPOConfig))
    parser.set_defaults(output_dir="out/trl", save_strategy="no", logging_steps=1)
    parser.set_defaults(use_cpu=cpu, bf16=not cpu, **DEMO)
    options, config = parser.parse_args_and_config(arguments)
    rows = load(options.dataset)
    trainer = SaEITrainer(
        options.model,
        boxed,
        config,
        rows,
        adversarial=options.adversarial,
        eps=options.eps,
        pgd_steps=options.pgd_steps,
    )
    # In a response these tokens would stand for pictures that are not there.
    model_config = trainer.model.config
    media = [model_config.image_token_id, model_config.video_token_id]
    trainer.generation_config.suppress_tokens = media
    trainer.train()
    print("step", *(f"{name:>19}" for name in LOGGED))
    for entry in trainer.state.log_history[:-1]:
        print(f"{entry['step']:4}", *(f"{entry[name]:19.4f}" for name in LOGGED))
    return trainer


if __name__ == "__main__":
    main()
