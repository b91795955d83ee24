"""A vision-language model and its processor as pi(y | images, question): encode, sample, score, image -> pixel_values.

The prompt is computed once per group. Frameworks repeat a prompt and its image for each of the G responses, in sampling
and again in scoring. Here the P prompts go through vision tower and language model once (prefill), their key/value
cache is repeated, and only response tokens are computed per response. In scoring, gradients flow through the cache into
the prompt, the parameters and the pixels: values and gradients equal those of the repeated way (tests/test_policy.py;
for every family: tests/test_families.py). `self_check` compares again at the start of a run.

Images live in [0, 1] at the size the vision tower sees (resized once, by the processor's own rule), so that an attack
perturbs a picture; `to_pixel_values` maps them on, differentiably, to what the processor would have produced.

Symbols: P prompts, n responses per prompt, N = P * n rows (a prompt's rows are neighbours), L prompt tokens (left
padded), T response tokens (right padded), V vocabulary, D hidden size.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.image_utils import SizeDict
from transformers.modeling_layers import GradientCheckpointingLayer

import grpo
import tsec
from vlm import adapt as memory

HEAD_NUMBERS = 2**26  # logits at a time, in scoring: 256 MiB in float32
ROWS = 16  # responses of like length that scoring computes together

# ---------------------------------------------------------------------------------------------------- model families
# What differs between families, one entry each in FAMILIES. A picture is resized once, by the processor's own rule and
# with its tiling off: one [0, 1] image is attacked, and no tile or thumbnail can drift apart from another.


class Family(NamedTuple):
    resize: Callable  # (uint8 (3, H, W), image processor, untiled) -> uint8 (3, h, w), what the vision tower sees
    pixel_values: (
        Callable  # ([0, 1] images of that size, image processor) -> the model's vision inputs
    )
    tower: str  # of model.model: the vision tower,
    projector: tuple[str, ...]  # and what leads from it into the language model
    untiled: dict = {}  # arguments of the processor that switch its tiling off
    one_tile: bool = False  # it always tiles: its grid becomes the single one of one square tile
    token_types: str | None = (
        None  # an input that only the prompt has: which tokens are of an image
    )
    counts: str | None = None  # an input: how many images each prompt has, of those that have any
    banned: str = r"$^"  # names of further tokens that stand for images


def normalise(x: Tensor, ip) -> Tensor:
    """(x - mean) / std by channel.   (3, H, W) in [0, 1]"""
    mean, std = (
        torch.tensor(list(s), dtype=x.dtype, device=x.device).view(3, 1, 1)
        for s in (ip.image_mean, ip.image_std)
    )
    return (x - mean) / std


def qwen_resize(picture: Tensor, ip, untiled: dict) -> Tensor:
    """Sides to multiples of patch * merge, area within the processor's limits."""
    factor = ip.patch_size * ip.merge_size
    return ip.resize(picture, size=SizeDict(**dict(ip.size)), resample=ip.resample, factor=factor)


def qwen_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """Normalised patches of all images, in the order of merged 2 x 2 blocks, each repeated for the temporal slots.

    (3, H, W) images -> pixel_values (sum of patches, 3 * t * p * p), image_grid_thw (B, 3)
    The repeat is inside the map: an attack on the patches themselves would push the copies of a still image apart.
    """
    p, m, t = ip.patch_size, ip.merge_size, ip.temporal_patch_size
    patches, grids = [], []
    for x in images:
        c, h, w = x.shape
        z = normalise(x, ip).reshape(c, h // (p * m), m, p, w // (p * m), m, p)
        z = z.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)  # (h/pm, w/pm, m, m, c, 1, p, p)
        patches.append(z.expand(*z.shape[:5], t, p, p).reshape(-1, c * t * p * p))
        grids.append([1, h // p, w // p])
    return {
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor(grids, device=images[0].device),
    }


def fixed_resize(picture: Tensor, ip, untiled: dict) -> Tensor:
    """The processor's whole way (resize, crop, pad) to its one size, before it rescales and normalises."""
    tiles = ip([picture], do_rescale=False, do_normalize=False, return_tensors="pt", **untiled)[
        "pixel_values"
    ]
    tiles = tiles.flatten(0, -4)  # (tiles, 3, S, S)
    if len(tiles) > (
        2 if hasattr(ip, "image_grid_pinpoints") else 1
    ):  # thumbnail and one tile are one image
        raise ValueError(
            f"{type(ip).__name__} cuts a picture into {len(tiles)} tiles, and only one can be attacked"
        )
    return tiles[0]


def fixed_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """-> (B, 3, S, S)"""
    return {"pixel_values": torch.stack([normalise(x, ip) for x in images])}


def smolvlm_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """-> (B, 1 tile, 3, S, S), and that none of it is padding"""
    z = fixed_pixel_values(images, ip)["pixel_values"][:, None]
    return {
        "pixel_values": z,
        "pixel_attention_mask": torch.ones_like(z[:, :, 0], dtype=torch.long),
    }


def llava_next_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """-> (B, 2, 3, S, S): the thumbnail and the only tile are the same image"""
    z = fixed_pixel_values(images, ip)["pixel_values"]
    sizes = torch.tensor([x.shape[1:] for x in images], device=z.device)
    return {"pixel_values": torch.stack([z, z], dim=1), "image_sizes": sizes}


QWEN = Family(
    qwen_resize, qwen_pixel_values, "visual", ("visual.merger", "visual.deepstack_merger_list")
)
LLAVA = Family(
    fixed_resize, fixed_pixel_values, "vision_tower", ("multi_modal_projector", "image_newline")
)
SMOLVLM = Family(
    fixed_resize,
    smolvlm_pixel_values,
    "vision_model",
    ("connector",),
    untiled={"do_image_splitting": False},
    banned=r"<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>",
)
FAMILIES: dict[str, Family] = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "smolvlm": SMOLVLM,
    "idefics3": SMOLVLM,
    "llava": LLAVA,
    "llava_next": LLAVA._replace(pixel_values=llava_next_pixel_values, one_tile=True),
    "llava_onevision": LLAVA._replace(
        pixel_values=llava_next_pixel_values, one_tile=True, counts="batch_num_images"
    ),
    "internvl": LLAVA._replace(untiled={"crop_to_patches": False}),
    "gemma3": LLAVA._replace(untiled={"do_pan_and_scan": False}, token_types="token_type_ids"),
}


class PromptLayer(DynamicLayer):
    """One layer's keys and values of the prompts. Responses read them and store nothing.

    So both passes, the prompt's and the responses', can be computed again in the backward (memory.py), where a cache
    that appends would hold their tokens twice.
    """

    read_only = False

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> "PromptLayer":
        layer = cls()
        layer.update(keys, values)
        layer.read_only = True
        return layer

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.read_only:
            return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values, self.is_initialized = (
            keys,
            values,
            True,
        )  # computed again, they are the same
        return keys, values


class DecodeLayer(DynamicLayer):
    """One layer's keys and values of rows that grow by a token at a time, written into room made once.

    Appending by concatenation, as DynamicLayer does, copies all of the prompt for every token.
    """

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, n: int, room: int) -> "DecodeLayer":
        """Each prompt's keys and values n times, with room for further tokens.   (P, heads, L, d)"""
        layer, layer.is_initialized, layer.length = cls(), True, keys.shape[2]
        for name, x in (("keys", keys), ("values", values)):
            P, heads, L, d = x.shape
            grown = x.new_empty(P, n, heads, L + room, d)
            grown[..., :L, :] = x[:, None]
            setattr(layer, name, grown.flatten(0, 1))  # (P * n, heads, L + room, d)
        return layer

    def get_seq_length(self) -> int:
        return self.length

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


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
    token_types: Tensor | None = None  # (P, L), for the families whose prompt needs it

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "Prompts":
        start, stop, _ = rows.indices(len(self))
        rows = slice(start, stop)
        images = self.images[sum(self.counts[:start]) : sum(self.counts[:stop])]
        positions = self.positions[..., start:stop, :]
        tokens = (self.ids[rows], self.mask[rows], positions, self.next_position[rows])
        types = None if self.token_types is None else self.token_types[rows]
        return Prompts(*tokens, images, self.counts[rows], types)

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
        return ~torch.isin(
            self.tokens.gather(1, last), torch.tensor(eos_ids, device=last.device)
        ).squeeze(1)


# ----------------------------------------------------------------------------------------------------------- the policy


class Policy(nn.Module):
    """pi(y | images, question). forward is `score`: a DDP or FSDP wrapper sees the pass that is differentiated."""

    def __init__(self, model: nn.Module, processor):
        super().__init__()
        kind = model.config.model_type
        if kind not in FAMILIES:
            raise ValueError(
                f"model_type {kind!r} is not supported; supported families: {', '.join(FAMILIES)}"
            )
        self.model, self.processor, self.family = model, processor, FAMILIES[kind]
        if self.family.one_tile:  # model and processor count tokens by it
            side = model.config.vision_config.image_size
            model.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = [
                [side, side]
            ]
        layers = [
            n for n, m in model.model.named_modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        layers = [n for n in layers if not memory.inside(n, (self.family.tower,))]
        # what FSDP shards apart: the language model's layers; the tower, not run for text alone, goes with the root
        self._no_split_modules = [type(model.model.get_submodule(layers[0])).__name__]
        self.micro_responses = 0  # how many the backward holds at a time; 0: all
        self.lora_scale = 0.0  # memory.add_lora's
        tokenizer = processor.tokenizer
        eos = (
            model.generation_config.eos_token_id
        )  # the only thing ever taken from generation_config
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos_ids = eos if isinstance(eos, list) else [eos]
        self.pad_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]
        )
        self.register_buffer("banned", self._banned_tokens(), persistent=False)  # (V,) bool
        # Dropout would make the scored distribution another one than the sampled one: eval mode throughout.
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        dtype: str = "float32",
        attention: str = "sdpa",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        weights: bool = True,
    ) -> "Policy":
        """Load model and processor from a hub id or a folder. Raises ValueError when they are not a supported VLM.

        min_pixels, max_pixels: limits of a picture's area, where the family has such; None: the processor's own.
        weights False: parameters without values, on the meta device, from the configuration alone.
        """
        config = AutoConfig.from_pretrained(name_or_path)
        if (kind := config.model_type) not in FAMILIES:
            raise ValueError(
                f"{name_or_path} is a {kind!r} model; train_saei needs a vision-language model of one of the families "
                f"{', '.join(FAMILIES)}"
            )
        options = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
        if weights:
            model = AutoModelForImageTextToText.from_pretrained(name_or_path, **options)
        else:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(config, **options)
        policy = cls(model, AutoProcessor.from_pretrained(name_or_path))
        if min_pixels is not None or max_pixels is not None:
            policy._limit_pixels(min_pixels, max_pixels)
        return policy

    def _limit_pixels(self, least: int | None, most: int | None) -> None:
        kind, ip = self.model.config.model_type, self.processor.image_processor
        if self.family.resize is not qwen_resize:
            flexible = ", ".join(
                name for name, family in FAMILIES.items() if family.resize is qwen_resize
            )
            raise ValueError(
                f"{kind} sees every picture at one size; min_pixels and max_pixels are for {flexible}"
            )
        least, most = (
            least or ip.size["shortest_edge"],
            most or ip.size["longest_edge"],
        )  # areas, whatever the names
        if not 0 < least <= most:
            raise ValueError(f"0 < min_pixels <= max_pixels, got {least} and {most}")
        ip.size = SizeDict(shortest_edge=least, longest_edge=most)

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write a folder that AutoModelForImageTextToText and AutoProcessor load. state_dict: a gathered one.

        LoRA adapters are merged into it and also written beside it, for a run to go on from them exactly.
        """
        if state_dict is not None:
            state_dict = {
                k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith("model.")
            }
            for name in (
                self.model.all_tied_weights_keys
            ):  # gathered, it is a copy that would be written twice
                state_dict.pop(name, None)
        if self.lora_scale:
            state_dict = memory.save_adapters(
                state_dict or self.model.state_dict(), self.lora_scale, folder
            )
        self.model.save_pretrained(folder, state_dict=state_dict)
        self.processor.save_pretrained(folder)

    def _banned_tokens(self) -> Tensor:
        """Never sampled, never in the distribution: what `decode` leaves out (the end tokens apart), every token that
        stands for an image, ids beyond the tokenizer.

        A sampled image token would make the number of image tokens and features differ (or pass silently here).
        """
        config, tokenizer = self.model.config, self.processor.tokenizer
        banned = torch.zeros(config.get_text_config().vocab_size, dtype=torch.bool)
        banned[len(tokenizer) :] = True
        ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids |= {
            i
            for name, i in tokenizer.get_added_vocab().items()
            if re.fullmatch(self.family.banned, name)
        }
        names = ("image", "video", "vision_start", "vision_end", "boi", "eoi")
        ids |= {getattr(config, f"{name}_token_id", None) for name in names} - {None}
        banned[sorted(i for i in ids - set(self.eos_ids) if i < len(banned))] = True
        return banned

    # ------------------------------------------------------------------------------------------------------- encode

    def to_unit_image(self, image: Image.Image) -> Tensor:
        """Picture -> float32 (3, H, W) in [0, 1] at the processor's final size, tiling off: what is attacked."""
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return (
            self.family.resize(pixels, self.processor.image_processor, self.family.untiled).float()
            / 255
        )

    def to_pixel_values(self, images: list[Tensor]) -> dict[str, Tensor]:
        """[0, 1] images at the final size -> the model's vision inputs, differentiably, equal to the processor's."""
        return self.family.pixel_values(images, self.processor.image_processor)

    def encode(
        self,
        problems: list[str | list[dict]],
        images: list[list[Image.Image]],
        max_tokens: int | None = None,
    ) -> Prompts:
        """Questions and their pictures -> Prompts on the model's device: chat template, image tokens, positions.

        Raises ValueError for an empty problem or a prompt longer than max_tokens: a prompt is never truncated, as that
        would cut image tokens.
        """
        units = [[self.to_unit_image(image) for image in row] for row in images]
        texts = [
            self.chat_text(problem, len(row)) for problem, row in zip(problems, images, strict=True)
        ]
        rows = [self._tokenize(text, row) for text, row in zip(texts, units, strict=True)]
        longest = max(row["input_ids"].shape[1] for row in rows)
        if max_tokens is not None and longest > max_tokens:
            raise ValueError(
                f"a prompt has {longest} tokens, more than max_prompt_tokens={max_tokens}"
            )

        def left_padded(name: str, value: int = 0) -> Tensor:
            lines = [
                nn.functional.pad(row[name], (longest - row[name].shape[1], 0), value=value)
                for row in rows
            ]
            return torch.cat(lines).to(self.device)  # (P, L)

        ids, mask = left_padded("input_ids", self.pad_id), left_padded("attention_mask").bool()
        positions, next_position = self._positions(ids, mask, rows, left_padded)
        types = left_padded(self.family.token_types) if self.family.token_types else None
        flat = [x.to(self.device) for row in units for x in row]
        return Prompts(
            ids, mask, positions, next_position, flat, [len(row) for row in units], types
        )

    def _tokenize(self, text: str, images: list[Tensor]):
        """The processor's inputs of one prompt: each family nests and pads a batch in another way.   (1, L) each"""
        bos = self.processor.tokenizer.bos_token
        pixels = [(x * 255).round().to(torch.uint8) for x in images]  # exact: from 8-bit pictures
        return self.processor(
            text=[text],
            images=[pixels] if pixels else None,
            do_resize=False,  # done; a second time is not always the identity (extreme shapes, narrow limits)
            add_special_tokens=bos is None
            or not text.startswith(bos),  # the template's own, not a second one
            return_tensors="pt",
            **self.family.untiled,
        )

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
            chat.append(
                {
                    "role": message["role"],
                    "content": [part for part in parts if part.get("text") != ""],
                }
            )
        return self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def _positions(
        self, ids: Tensor, mask: Tensor, rows: list, left_padded: Callable
    ) -> tuple[Tensor, Tensor]:
        """Explicit position ids: no offset that the model remembers from another batch (rope_deltas) is ever used."""
        if not hasattr(self.model.model, "get_rope_index"):
            return (mask.cumsum(-1) - 1).clamp(min=0), mask.sum(-1)
        types, grids = (
            left_padded("mm_token_type_ids"),
            [r["image_grid_thw"] for r in rows if "image_grid_thw" in r],
        )
        if not torch.equal(types == 1, ids == self.model.config.image_token_id):
            raise RuntimeError(
                "mm_token_type_ids and input_ids disagree about which tokens are an image's"
            )
        grids = torch.cat(grids).to(self.device) if grids else None
        positions, delta = self.model.model.get_rope_index(
            ids, mm_token_type_ids=types, image_grid_thw=grids, attention_mask=mask
        )
        return positions, mask.sum(-1) + delta[:, 0]

    def prompt_tokens(self, row: dict) -> int:
        """The length of a row's prompt, image tokens included."""
        return self.prompt_ids(row).shape[1]

    def prompt_ids(self, row: dict) -> Tensor:
        """A row's prompt, image tokens included.   -> (1, L)"""
        units = [self.to_unit_image(image) for image in row["images"]]
        return self._tokenize(self.chat_text(row["problem"], len(units)), units)["input_ids"]

    @property
    def device(self) -> torch.device:
        return self.banned.device

    # ------------------------------------------------------------------------------------------- prefill, sample, score

    def prefill(self, prompts: Prompts) -> tuple[list[Tensor], Tensor]:
        """Compute each prompt once.   -> keys, values of each layer in turn (P, heads, L, d); last hidden (P, D)"""
        vision = self.to_pixel_values(prompts.images) if prompts.images else {}
        if self.family.counts and prompts.images:
            vision[self.family.counts] = torch.tensor(
                [n for n in prompts.counts if n], device=self.device
            )
        types = {self.family.token_types: prompts.token_types} if self.family.token_types else {}
        cache = Cache(
            layers=[
                PromptLayer() for _ in range(self.model.config.get_text_config().num_hidden_layers)
            ]
        )
        hidden = self.model.model(
            input_ids=prompts.ids,
            attention_mask=prompts.mask.long(),
            position_ids=prompts.positions,
            past_key_values=cache,
            use_cache=False,  # makes none of its own; the one given is used, and checkpointed layers do not complain
            **vision,
            **types,
        ).last_hidden_state[:, -1]
        if not all(layer.is_initialized for layer in cache.layers):
            raise RuntimeError(
                "the prompt's cache is empty: is activation checkpointing on for the language model?"
            )
        return [x for layer in cache.layers for x in (layer.keys, layer.values)], hidden

    def respond(self, tokens: Tensor, cache: Cache, mask: Tensor, position: Tensor) -> Tensor:
        """Hidden states of further tokens after the cached ones.   (N, t), mask (N, L + t), (N,) -> (N, t, D)"""
        positions = position[:, None] + torch.arange(
            tokens.shape[1], device=tokens.device
        )  # (N, t)
        if hasattr(self.model.model, "get_rope_index"):
            positions = positions.expand(3, -1, -1)
        return self.model.model(
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """The output head in float32, banned tokens at -inf.   (..., D) -> (..., V)"""
        return self.model.lm_head(hidden).float().masked_fill(self.banned, -torch.inf)

    @torch.no_grad()
    def sample(
        self,
        prompts: Prompts,
        n: int,
        seeds: list[int],
        max_new_tokens: int,
        temperature: float = 1.0,
    ) -> Responses:
        """n responses per prompt from softmax(logits / temperature); temperature 0 is greedy.

        Explicit, without `generate`: no top-k, top-p or penalty from a generation_config can enter. seeds: one an
        entry of `prompts`; a prompt's responses depend on its own seed and on nothing else of the batch, so that the
        rollouts are the same on any number of processes and in any micro-batch.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"one seed an entry of prompts: got {len(seeds)} for {len(prompts)}")
        N, T = len(prompts) * n, max_new_tokens
        kv, hidden = self.prefill(prompts)
        prompt = (hidden, prompts.mask, prompts.next_position)
        hidden, seen, position = (
            x.repeat_interleave(n, dim=0) for x in prompt
        )  # (N, D), (N, L), (N,)
        cache = Cache(
            layers=[DecodeLayer.of(k, v, n, T) for k, v in zip(kv[::2], kv[1::2], strict=True)]
        )
        del kv
        uniforms = (
            torch.stack([_uniforms(seed, n, T) for seed in seeds]).view(N, -1).to(self.device)
        )
        eos_ids, scale = torch.tensor(self.eos_ids, device=self.device), temperature or 1.0
        tokens, mask = (
            hidden.new_full((N, T), self.pad_id, dtype=torch.long),
            hidden.new_zeros(N, T, dtype=torch.bool),
        )
        logprobs, entropy = (hidden.new_zeros(N, T, dtype=torch.float32) for _ in range(2))
        rows = torch.arange(
            N, device=self.device
        )  # those that are still computed; some may have ended
        alive = torch.ones_like(rows, dtype=torch.bool)
        for t in range(T):
            logits = self.logits(hidden)  # (rows, V)
            token = (
                logits.argmax(-1)
                if temperature == 0
                else _inverse_cdf(logits / scale, uniforms[rows, t])
            )
            tokens[rows, t], mask[rows, t] = torch.where(alive, token, self.pad_id), alive
            logprobs[rows, t] = grpo.token_logprobs(logits, token, scale)
            entropy[rows, t] = tsec.token_entropy(logits, scale)
            alive = alive & ~torch.isin(token, eos_ids)
            left = int(alive.sum())
            if left == 0 or t + 1 == T:
                break
            if left <= 0.75 * len(
                rows
            ):  # those that have ended leave the batch, some at a time: moving the rest costs
                rows, token, seen, position = (x[alive] for x in (rows, token, seen, position))
                for layer in cache.layers:
                    layer.keep(alive)
                alive = alive[alive]
            # An ended row that is still here goes on; nobody reads the row. A mask of ones is the fast one.
            seen = torch.cat([seen, torch.ones_like(alive)[:, None]], dim=1)
            hidden = self.respond(token[:, None], cache, seen, position)[:, -1]
            position = position + 1
        return Responses(*(x[:, : t + 1] for x in (tokens, mask, logprobs, entropy)))

    def score(
        self, prompts: Prompts, tokens: Tensor, mask: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced log-probs and entropies of given responses.   (N, T), (N, T) bool -> (N, T), (N, T) float32

        Differentiable in the parameters and in prompts.images. Values at padding are meaningless and finite.
        """
        kv, last = self.prefill(prompts)
        owner = torch.arange(len(prompts), device=self.device).repeat_interleave(
            len(tokens) // len(prompts)
        )  # (N,)

        def rows(
            tokens: Tensor, mask: Tensor, owner: Tensor, last: Tensor, *kv: Tensor
        ) -> tuple[Tensor, Tensor]:
            hidden = self._response_hidden(prompts, tokens, mask, owner, last, kv)
            return self._head_in_chunks(
                hidden, torch.where(mask, tokens, self.eos_ids[0]), temperature
            )

        # In lots of like length, so that little padding is computed. micro_responses: each lot is computed again in the
        # backward, for activations of one lot and of P prompts.
        lengths, parts = mask.sum(dim=1), []
        order = lengths.argsort(stable=True)
        for lot in order.split(self.micro_responses or ROWS):
            # two at least: with one token the layers would not run, and FSDP gathers them as often on every process
            end = min(max(2, int(lengths[lot[-1]])), tokens.shape[1])
            inputs = tokens[lot, :end], mask[lot, :end], owner[lot], last, *kv
            part = (
                checkpoint(rows, *inputs, use_reentrant=False)
                if self.micro_responses
                else rows(*inputs)
            )
            parts.append(
                [nn.functional.pad(x, (0, tokens.shape[1] - end)) for x in part]
            )  # back to (lot, T)
        logprobs, entropy = (
            torch.cat(column)[order.argsort()] for column in zip(*parts, strict=True)
        )
        return logprobs, entropy

    forward = score

    def _response_hidden(self, prompts: Prompts, tokens, mask, owner, last, kv) -> Tensor:
        """What predicts each token of rows whose prompts are owner (rows,).   -> (rows, T, D)"""
        hidden = last[owner, None]  # (rows, 1, D) predicts the first token
        if tokens.shape[1] == 1:
            return hidden
        cache = Cache(
            layers=[
                PromptLayer.of(k[owner], v[owner]) for k, v in zip(kv[::2], kv[1::2], strict=True)
            ]
        )
        seen = torch.cat([prompts.mask[owner], mask[:, :-1]], dim=1)
        return torch.cat(
            [hidden, self.respond(tokens[:, :-1], cache, seen, prompts.next_position[owner])], dim=1
        )

    def _head_in_chunks(
        self, hidden: Tensor, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies without a (N, T, V) tensor: chunks of tokens, recomputed in the backward.

        (N, T, D), (N, T) -> (N, T), (N, T). Exact in value and gradient; unlike fused heads, the entropy has one too.
        """

        def chunk_stats(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.logits(h)  # (chunk, V)
            return grpo.token_logprobs(logits, y, temperature), tsec.token_entropy(
                logits, temperature
            )

        size = max(1, HEAD_NUMBERS // len(self.banned))
        parts = [
            checkpoint(chunk_stats, h, y, use_reentrant=False)
            for h, y in zip(
                hidden.flatten(0, 1).split(size), tokens.flatten().split(size), strict=True
            )
        ]
        logprobs, entropy = (
            torch.cat(column).view(tokens.shape) for column in zip(*parts, strict=True)
        )
        return logprobs, entropy

    # ----------------------------------------------------------------------------------------------------- self-check

    @torch.no_grad()
    def self_check(self) -> dict[str, float]:
        """Are our pixel_values the processor's, and the logits after the shared prompt those of the plain forward?

        Two prompts of different lengths with a small picture each, two responses each. The plain way: one row at a
        time, the processor's own inputs, the model's own positions, nothing padded or cached.
        Returns {"pixels": largest difference, "logits": largest difference / std(logits)}; raises RuntimeError when one
        is more than rounding: the library has changed, or the checkpoint is unlike its family.
        """
        kind, wide = (
            self.model.config.model_type,
            56 if self.family.one_tile else 84,
        )  # else the two tiles would differ
        rng, problems = (
            np.random.default_rng(0),
            ["How many?", "What does the picture show? Look, and answer."],
        )
        pictures = [
            Image.fromarray(rng.integers(0, 256, (56, w, 3), dtype=np.uint8)) for w in (56, wide)
        ]
        prompts = self.encode(problems, [[x] for x in pictures])
        ours = self.to_pixel_values(prompts.images)["pixel_values"].flatten().cpu()
        raw = [
            self.processor.image_processor([x], return_tensors="pt", **self.family.untiled)
            for x in pictures
        ]
        theirs = torch.cat([x["pixel_values"].flatten() for x in raw])
        pixels = (ours - theirs).abs().max().item() if len(ours) == len(theirs) else float("inf")
        if not pixels <= 1e-5:
            raise RuntimeError(
                f"self-check of {kind}: pixel_values differ from the image processor's by {pixels:.2g}, rounding is "
                "below 1e-5; has the library changed? --self_check false trains on a model that sees other pictures"
            )
        allowed = (~self.banned).nonzero().flatten()
        drawn = torch.randint(len(allowed), (4, 4), generator=torch.Generator().manual_seed(0)).to(
            self.device
        )
        tokens, owner = allowed[drawn], torch.tensor([0, 0, 1, 1], device=self.device)
        kv, last = self.prefill(prompts)
        hidden = self._response_hidden(
            prompts, tokens, torch.ones_like(tokens, dtype=torch.bool), owner, last, kv
        )
        texts = [self.chat_text(problem, 1) for problem in problems]
        plain = torch.stack(
            [
                self._plain_logits(texts[p], prompts[p : p + 1].images, y)
                for p, y in zip(owner, tokens, strict=True)
            ]
        )
        shared, plain = self.logits(hidden)[..., allowed], plain[..., allowed]
        logits = ((shared - plain).abs().max() / plain.std()).item()
        half = (
            torch.is_autocast_enabled(self.device.type)
            or next(self.parameters()).dtype == torch.bfloat16
        )
        # bfloat16 rounding: up to 0.37 in 24 layers of a peaked random model, where a position off by one is 1.2 to 3.2
        limit = 0.5 if half else 1e-3
        if not logits <= limit:
            raise RuntimeError(
                f"self-check of {kind}: logits after the shared prompt differ from the plain forward's by {logits:.2g} "
                f"of their standard deviation, rounding is below {limit:g}; has the library changed? --self_check "
                "false trains with wrong log-probs"
            )
        return {"pixels": pixels, "logits": logits}

    def _plain_logits(self, text: str, images: list[Tensor], response: Tensor) -> Tensor:
        """The model's own forward over one prompt, as the processor gives it, and one response.   (T,) -> (T, V)"""
        inputs, T = self._tokenize(text, images).to(self.device), len(response)
        more = {"input_ids": response, "attention_mask": torch.ones_like(response)}
        for name in [name for name, x in inputs.items() if x.shape == inputs["input_ids"].shape]:
            end = more.get(name, torch.zeros_like(response))  # token types: text
            more[name] = torch.cat([inputs[name], end[None]], dim=1)
        return self.model(**dict(inputs) | more, use_cache=False).logits[0, -T - 1 : -1].float()

    def decode(self, responses: Responses) -> list[str]:
        """The responses' text without padding and end token."""
        return [
            self.processor.tokenizer.decode(
                row[keep], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
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
