"""A vision-language model and its processor as pi(y | images, question): encode, sample, score, image -> pixel_values.

The prompt is computed once per group. Frameworks repeat a prompt and its image for each of the G responses, in sampling
and again in scoring. Here the P prompts go through vision tower and language model once (prefill), their key/value
cache is repeated, and only response tokens are computed per response. In scoring, gradients flow through the cache into
the prompt, the parameters and the pixels: values and gradients equal those of the repeated way (tests/test_policy.py).

Images live in [0, 1] at the size the vision tower sees (resized once, by the processor's own rule), so that an attack
perturbs a picture; `to_pixel_values` maps them on, differentiably, to what the processor would have produced.

Symbols: P prompts, n responses per prompt, N = P * n rows (a prompt's rows are neighbours), L prompt tokens (left
padded), T response tokens (right padded), V vocabulary, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.image_utils import SizeDict

import grpo
import tsec

# ---------------------------------------------------------------------------------------------------- model families
# What differs between families, one entry each: how the processor resizes, and how a [0, 1] image becomes pixel_values.


def qwen_resize(image: Tensor, ip) -> Tensor:
    """The processor's own resize: sides to multiples of patch * merge, area within its limits.   uint8 (3, H, W)"""
    factor = ip.patch_size * ip.merge_size
    return ip.resize(image, size=SizeDict(**dict(ip.size)), resample=ip.resample, factor=factor)


def qwen_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """Normalised patches of all images, in the order of merged 2 x 2 blocks, each repeated for the temporal slots.

    (3, H, W) images -> pixel_values (sum of patches, 3 * t * p * p), image_grid_thw (B, 3)
    The repeat is inside the map: an attack on the patches themselves would push the copies of a still image apart.
    """
    p, m, t = ip.patch_size, ip.merge_size, ip.temporal_patch_size
    patches, grids = [], []
    for x in images:
        c, h, w = x.shape
        mean, std = (
            torch.tensor(list(s), dtype=x.dtype, device=x.device).view(3, 1, 1) for s in (ip.image_mean, ip.image_std)
        )
        z = ((x - mean) / std).reshape(c, h // (p * m), m, p, w // (p * m), m, p)
        z = z.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)  # (h/pm, w/pm, m, m, c, 1, p, p)
        patches.append(z.expand(*z.shape[:5], t, p, p).reshape(-1, c * t * p * p))
        grids.append([1, h // p, w // p])
    return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids, device=images[0].device)}


FAMILIES: dict[str, tuple[Callable, Callable]] = {
    "qwen2_vl": (qwen_resize, qwen_pixel_values),
    "qwen2_5_vl": (qwen_resize, qwen_pixel_values),
}

# ------------------------------------------------------------------------------------------------- prompts, responses


@dataclass
class Prompts:
    """P encoded prompts with their images; `prompts[i:j]` and `prompts.with_images(...)` make new ones."""

    ids: Tensor  # (P, L) left padded
    mask: Tensor  # (P, L) bool
    positions: Tensor  # (..., P, L); Qwen-VL: (3, P, L)
    next_position: Tensor  # (P,) the position of the first response token
    images: list[Tensor]  # all prompts' images in order, float32 (3, H, W) in [0, 1]
    counts: list[int]  # images per prompt

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "Prompts":
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError("prompts are sliced in steps of 1")
        images = self.images[sum(self.counts[:start]) : sum(self.counts[:stop])]
        positions = self.positions[..., start:stop, :]
        return Prompts(self.ids[rows], self.mask[rows], positions, self.next_position[rows], images, self.counts[rows])

    def with_images(self, images: list[Tensor]) -> "Prompts":
        """The same questions about other images of the same sizes."""
        if [x.shape for x in images] != [x.shape for x in self.images]:
            raise ValueError("the new images must have the number and the shapes of the old ones")
        return replace(self, images=list(images))


@dataclass
class Responses:
    """N = P * n responses, what the sampler knew when it drew each token. All (N, T)."""

    tokens: Tensor
    mask: Tensor  # True up to and with the end token, by position, never by token value
    logprobs: Tensor  # float32, at the sampling temperature
    entropy: Tensor  # float32, nats, full vocabulary (banned tokens left out), at the sampling temperature

    def truncated(self, eos_ids: list[int]) -> Tensor:
        """True where a response ran into max_new_tokens.   (N,)"""
        last = self.mask.sum(dim=1, keepdim=True) - 1
        return ~torch.isin(self.tokens.gather(1, last), torch.tensor(eos_ids, device=last.device)).squeeze(1)


# ----------------------------------------------------------------------------------------------------------- the policy


class Policy(nn.Module):
    """pi(y | images, question). forward is `score`: a DDP or FSDP wrapper sees the pass that is differentiated."""

    def __init__(self, model: nn.Module, processor):
        super().__init__()
        kind = model.config.model_type
        if kind not in FAMILIES:
            raise ValueError(f"model_type {kind!r} is not supported; supported families: {', '.join(FAMILIES)}")
        self.model, self.processor = model, processor
        self.resize, self.pixel_map = FAMILIES[kind]
        tokenizer = processor.tokenizer
        eos = model.generation_config.eos_token_id  # the only thing ever taken from generation_config
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos_ids = eos if isinstance(eos, list) else [eos]
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]
        self.register_buffer("banned", self._banned_tokens(), persistent=False)  # (V,) bool
        # Dropout would make the scored distribution another one than the sampled one: eval mode throughout.
        self.eval()

    @classmethod
    def from_pretrained(cls, name_or_path: str, dtype: str = "float32", attention: str = "sdpa") -> "Policy":
        """Load model and processor from a hub id or a folder. Raises ValueError when they are not a supported VLM."""
        kind = AutoConfig.from_pretrained(name_or_path).model_type
        if kind not in FAMILIES:
            raise ValueError(
                f"{name_or_path} is a {kind!r} model; train_saei needs a vision-language model of one of the families "
                f"{', '.join(FAMILIES)}"
            )
        model = AutoModelForImageTextToText.from_pretrained(
            name_or_path, dtype=getattr(torch, dtype), attn_implementation=attention
        )
        return cls(model, AutoProcessor.from_pretrained(name_or_path))

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a folder that AutoModelForImageTextToText and AutoProcessor load. state_dict: a gathered one."""
        if state_dict is not None:
            state_dict = {k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith("model.")}
        self.model.save_pretrained(folder, state_dict=state_dict)
        self.processor.save_pretrained(folder)

    def _banned_tokens(self) -> Tensor:
        """Special tokens, the end tokens apart, and ids beyond the tokenizer: never sampled, never in the distribution.

        A sampled image token would make the number of image tokens and features differ (or pass silently here).
        """
        config, tokenizer = self.model.config, self.processor.tokenizer
        banned = torch.zeros(config.get_text_config().vocab_size, dtype=torch.bool)
        banned[len(tokenizer) :] = True
        vision = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = set(tokenizer.all_special_ids) | {getattr(config, name) for name in vision if hasattr(config, name)}
        banned[sorted(ids - set(self.eos_ids))] = True
        return banned

    # ------------------------------------------------------------------------------------------------------- encode

    def to_unit_image(self, image: Image.Image) -> Tensor:
        """Picture -> float32 (3, H, W) in [0, 1] at the processor's final size, tiling off: what is attacked."""
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return self.resize(pixels, self.processor.image_processor).float() / 255

    def to_pixel_values(self, images: list[Tensor]) -> dict[str, Tensor]:
        """[0, 1] images at the final size -> the model's vision inputs, differentiably, equal to the processor's."""
        return self.pixel_map(images, self.processor.image_processor)

    def encode(
        self, problems: list[str | list[dict]], images: list[list[Image.Image]], max_tokens: int | None = None
    ) -> Prompts:
        """Questions and their pictures -> Prompts on the model's device: chat template, image tokens, positions.

        Raises ValueError for an empty problem or a prompt longer than max_tokens: a prompt is never truncated, as that
        would cut image tokens.
        """
        units = [[self.to_unit_image(image) for image in row] for row in images]
        texts = [self.chat_text(problem, len(row)) for problem, row in zip(problems, images, strict=True)]
        flat = [x for row in units for x in row]
        eight_bit = [(x * 255).round().to(torch.uint8) for x in flat]  # exact: they come from 8-bit pictures
        batch = self.processor(
            text=texts,
            images=eight_bit or None,
            do_resize=False,  # done; a second time is not always the identity (extreme shapes, narrow limits)
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.device)
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        if max_tokens is not None and (longest := int(mask.sum(1).max())) > max_tokens:
            raise ValueError(f"a prompt has {longest} tokens, more than max_prompt_tokens={max_tokens}")
        positions, next_position = self._positions(ids, mask, batch)
        flat = [x.to(self.device) for x in flat]
        return Prompts(ids, mask, positions, next_position, flat, [len(row) for row in units])

    def chat_text(self, problem: str | list[dict], images: int) -> str:
        """The chat template over a user's text or over messages, ending where the assistant begins.

        A picture stands where the text says <image>; if it nowhere does, all stand before the first user's text.
        """
        messages = [{"role": "user", "content": problem}] if isinstance(problem, str) else problem
        if not messages[-1]["content"].strip():
            raise ValueError("the problem is empty")
        marks = sum(message["content"].count("<image>") for message in messages)
        if marks not in (0, images):
            raise ValueError(f"the problem has {marks} <image> marks for {images} images")
        chat, unmarked = [], images - marks
        for message in messages:
            first, *texts = message["content"].split("<image>")
            parts = [{"type": "text", "text": first}]
            for text in texts:
                parts += [{"type": "image"}, {"type": "text", "text": text}]
            if message["role"] == "user":
                parts, unmarked = [{"type": "image"}] * unmarked + parts, 0
            chat.append({"role": message["role"], "content": [part for part in parts if part.get("text") != ""]})
        return self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def _positions(self, ids: Tensor, mask: Tensor, batch) -> tuple[Tensor, Tensor]:
        """Explicit position ids: no offset that the model remembers from another batch (rope_deltas) is ever used."""
        if not hasattr(self.model.model, "get_rope_index"):
            return (mask.cumsum(-1) - 1).clamp(min=0), mask.sum(-1)
        types = batch["mm_token_type_ids"]
        if not torch.equal(types == 1, ids == self.model.config.image_token_id):
            raise RuntimeError("mm_token_type_ids and input_ids disagree: they were padded on different sides")
        positions, delta = self.model.model.get_rope_index(
            ids, mm_token_type_ids=types, image_grid_thw=batch.get("image_grid_thw"), attention_mask=mask
        )
        return positions, mask.sum(-1) + delta[:, 0]

    def prompt_tokens(self, row: dict) -> int:
        """The length of a row's prompt, image tokens included."""
        text, images = self.chat_text(row["problem"], len(row["images"])), row["images"]
        return len(self.processor(text=[text], images=images or None)["input_ids"][0])

    @property
    def device(self) -> torch.device:
        return self.banned.device

    # ------------------------------------------------------------------------------------------- prefill, sample, score

    def prefill(self, prompts: Prompts, n: int) -> tuple[DynamicCache, Tensor, Tensor, Tensor]:
        """Compute each prompt once, for n rows.   -> cache, last hidden (N, D), mask (N, L), next position (N,)"""
        cache = DynamicCache()
        vision = self.to_pixel_values(prompts.images) if prompts.images else {}
        hidden = self.model.model(
            input_ids=prompts.ids,
            attention_mask=prompts.mask.long(),
            position_ids=prompts.positions,
            past_key_values=cache,
            use_cache=True,
            **vision,
        ).last_hidden_state[:, -1]
        if cache.get_seq_length() != prompts.ids.shape[1]:
            raise RuntimeError("the prompt's cache is empty: is activation checkpointing on for the language model?")
        cache.batch_repeat_interleave(n)
        return cache, *(x.repeat_interleave(n, dim=0) for x in (hidden, prompts.mask, prompts.next_position))

    def respond(self, tokens: Tensor, cache: DynamicCache, mask: Tensor, position: Tensor) -> Tensor:
        """Hidden states of further tokens after the cached ones.   (N, t), mask (N, L + t), (N,) -> (N, t, D)"""
        positions = position[:, None] + torch.arange(tokens.shape[1], device=tokens.device)  # (N, t)
        if hasattr(self.model.model, "get_rope_index"):
            positions = positions.expand(3, -1, -1)
        return self.model.model(
            input_ids=tokens, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """The output head in float32, banned tokens at -inf.   (..., D) -> (..., V)"""
        return self.model.lm_head(hidden).float().masked_fill(self.banned, -torch.inf)

    @torch.no_grad()
    def sample(
        self, prompts: Prompts, n: int, seeds: list[int], max_new_tokens: int, temperature: float = 1.0
    ) -> Responses:
        """n responses per prompt from softmax(logits / temperature); temperature 0 is greedy.

        Explicit, without `generate`: no top-k, top-p or penalty from a generation_config can enter. seeds: one an
        entry of `prompts`; a prompt's responses depend on its own seed and on nothing else of the batch, so that the
        rollouts are the same on any number of processes and in any micro-batch.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"one seed an entry of prompts: got {len(seeds)} for {len(prompts)}")
        N, L = len(prompts) * n, prompts.ids.shape[1]
        cache, hidden, mask, position = self.prefill(prompts, n)
        uniforms = torch.stack([_uniforms(seed, n, max_new_tokens) for seed in seeds]).view(N, -1).to(self.device)
        alive = torch.ones(N, dtype=torch.bool, device=self.device)
        eos_ids = torch.tensor(self.eos_ids, device=self.device)
        columns = []
        for t in range(max_new_tokens):
            logits = self.logits(hidden)  # (N, V)
            scale = temperature or 1.0
            token = logits.argmax(-1) if temperature == 0 else _inverse_cdf(logits / scale, uniforms[:, t])
            token = torch.where(alive, token, self.pad_id)
            logprob = grpo.token_logprobs(logits, torch.where(alive, token, logits.argmax(-1)), scale)
            columns.append((token, alive, logprob, tsec.token_entropy(logits, scale)))
            mask = torch.cat([mask, alive[:, None]], dim=1)
            alive = alive & ~torch.isin(token, eos_ids)
            if not alive.any() or t + 1 == max_new_tokens:
                break
            hidden = self.respond(token[:, None], cache, mask, position)[:, -1]
            position = position + 1
        tokens, _, logprobs, entropy = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
        return Responses(tokens, mask[:, L:], logprobs, entropy)

    def score(self, prompts: Prompts, tokens: Tensor, mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Teacher-forced log-probs and entropies of given responses.   (N, T), (N, T) bool -> (N, T), (N, T) float32

        Differentiable in the parameters and in prompts.images. Values at padding are meaningless and finite.
        """
        n = len(tokens) // len(prompts)
        cache, last, prompt_mask, position = self.prefill(prompts, n)
        hidden = last[:, None]  # (N, 1, D) predicts the first token
        if tokens.shape[1] > 1:
            inputs, seen = tokens[:, :-1], torch.cat([prompt_mask, mask[:, :-1]], dim=1)
            hidden = torch.cat([hidden, self.respond(inputs, cache, seen, position)], dim=1)  # (N, T, D)
        return self._head_in_chunks(hidden, torch.where(mask, tokens, self.eos_ids[0]), temperature)

    forward = score

    def _head_in_chunks(self, hidden: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies without a (N, T, V) tensor: chunks of tokens, recomputed in the backward.

        (N, T, D), (N, T) -> (N, T), (N, T). Exact in value and gradient; unlike fused heads, the entropy has one too.
        """

        def chunk_stats(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.logits(h)  # (chunk, V)
            return grpo.token_logprobs(logits, y, temperature), tsec.token_entropy(logits, temperature)

        size = max(1, 2**26 // len(self.banned))  # about 256 MiB of float32 logits at a time
        parts = [
            checkpoint(chunk_stats, h, y, use_reentrant=False)
            for h, y in zip(hidden.flatten(0, 1).split(size), tokens.flatten().split(size), strict=True)
        ]
        logprobs, entropy = (torch.cat(column).view(tokens.shape) for column in zip(*parts, strict=True))
        return logprobs, entropy

    def decode(self, responses: Responses) -> list[str]:
        """The responses' text without padding and end token."""
        return [
            self.processor.tokenizer.decode(row[keep], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row, keep in zip(responses.tokens, responses.mask, strict=True)
        ]


def _uniforms(seed: int, n: int, length: int) -> Tensor:
    """U[0, 1) of one prompt, drawn on the CPU so that every device gets the same.   -> (n, length) float64"""
    return torch.rand(n, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inverse_cdf(logits: Tensor, u: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds u.   (N, V), (N,) -> (N,)

    In float64: in float32, over a large vocabulary, u could reach past the last token's cumulative sum.
    """
    cdf = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True).squeeze(1)
