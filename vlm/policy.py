"""A vision-language model and its processor as pi(y | images, question).

The prompt is computed once per group. Frameworks repeat a prompt and its image for each of the G
responses, in sampling and again in scoring. Here the P prompts go through vision tower and language
model once (`read`). Their key/value cache is repeated, and only response tokens are computed per
response. In scoring, gradients flow through the cache into the prompt, the parameters and the
pixels. Values and gradients equal those of the repeated way (tests/test_policy.py, and for every
family tests/test_families.py). `self_check` compares again at the start of a run.

Images live in [0, 1] at the size the vision tower sees, so that an attack perturbs a picture.
`to_pixel_values` maps them, differentiably, to what the processor would have produced.

    prompts = policy.encode(["How many dice?"], [[picture]])
    read = policy.read(prompts)  # the prompt pass; `sample` makes it when it is not given one
    greedy = policy.sample(prompts, 1, [0], 64, temperature=0.0, read=read)
    sampled = policy.sample(prompts, 8, [0], 64, read=read)  # Responses, all (P * 8, T)
    logprobs, entropy = policy.score(prompts, sampled.tokens, sampled.mask)

Symbols: P prompts, n responses per prompt, N = P * n rows (a prompt's rows are neighbours),
L prompt tokens (left padded), T response tokens (right padded), V vocabulary, D hidden size.
"""

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import SizeDict
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm import adapt, chat, precision
from vlm.cache import ReadPrompts, prompt_layers
from vlm.decode import Decoder, logprobs_and_entropy
from vlm.families import FAMILIES
from vlm.load import load_config, load_model, load_processor
from vlm.patches import use_patch_products
from vlm.windows import use_batched_windows

# Tags that a prompt may ask for. Some tokenizers have them as special tokens.
ANSWER_TAGS = r"</?(think|answer)>"
LOGITS_PER_CHUNK = 2**26  # of the output head in scoring: 256 MiB in float32
RESPONSES_PER_CHUNK = 16  # of like length, scored together

# Responses have this width at least: scoring then runs the language model's layers on two tokens or
# more. FSDP gathers parameters as often as layers run: equally often on every process. And of one
# token, linear attention takes its decoding kernel, which has no backward on a GPU (fla).
LEAST_TOKENS = 3
POSITION_TOKENS = 8  # of the self-check's responses


class TokenizedPrompt(NamedTuple):
    """One prompt on the CPU, before it is padded into Prompts."""

    inputs: dict[str, Tensor]  # the processor's: input_ids, attention_mask and more, (1, length)
    images: list[Tensor]  # float32 (3, H, W) in [0, 1]

    @property
    def length(self) -> int:
        """Tokens, those of the images included."""
        return self.inputs["input_ids"].shape[1]


@dataclass
class Prompts:
    """P encoded prompts with their images; `prompts[i:j]` and `with_images` make new ones."""

    ids: Tensor  # (P, L) left padded
    mask: Tensor  # (P, L) bool
    positions: Tensor  # (..., P, L); Qwen-VL: (3, P, L)
    next_position: Tensor  # (P,) the position of the first response token
    images: list[Tensor]  # all prompts' images in order, float32 (3, H, W) in [0, 1]
    counts: list[int]  # images per prompt
    token_types: Tensor | None = None  # (P, L), for the families whose prompt needs it

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, prompts: slice) -> "Prompts":
        start, stop, _ = prompts.indices(len(self))
        rows = slice(start, stop)
        first_image = sum(self.counts[:start])
        last_image = sum(self.counts[:stop])
        return Prompts(
            self.ids[rows],
            self.mask[rows],
            self.positions[..., rows, :],
            self.next_position[rows],
            self.images[first_image:last_image],
            self.counts[rows],
            None if self.token_types is None else self.token_types[rows],
        )

    def with_images(self, images: list[Tensor]) -> "Prompts":
        """The same questions about other images of the same sizes."""
        if [x.shape for x in images] != [x.shape for x in self.images]:
            raise ValueError("the new images must have the number and the shapes of the old ones")
        return replace(self, images=list(images))


@dataclass
class Responses:
    """N = P * n responses, and what the sampler knew when it drew each token. All (N, T)."""

    tokens: Tensor
    mask: Tensor  # True up to and with the end token, by position, never by token value
    logprobs: Tensor  # float32, at the sampling temperature
    entropy: Tensor  # float32, nats, at the sampling temperature, over the tokens not banned

    def truncated(self, eos_ids: list[int]) -> Tensor:
        """True where a response ran into max_new_tokens.   (N,)"""
        last = self.mask.sum(dim=1, keepdim=True) - 1
        last_token = self.tokens.gather(1, last).squeeze(1)
        return ~torch.isin(last_token, torch.tensor(eos_ids, device=last.device))

    @classmethod
    def concatenate(cls, parts: list["Responses"], pad_id: int) -> "Responses":
        """All rows, padded to the longest, and to LEAST_TOKENS at least."""
        longest = max(LEAST_TOKENS, *(part.tokens.shape[1] for part in parts))
        padding = {"tokens": pad_id, "mask": False, "logprobs": 0.0, "entropy": 0.0}
        fields = {}
        for name, value in padding.items():
            rows = [right_padded(getattr(part, name), longest, value) for part in parts]
            fields[name] = torch.cat(rows)
        return cls(**fields)


def right_padded(x: Tensor, width: int, value: float = 0) -> Tensor:
    """(N, T) -> (N, width)"""
    return nn.functional.pad(x, (0, width - x.shape[1]), value=value)


class Policy(nn.Module):
    """pi(y | images, question).

    `forward` is `score`: a DDP or FSDP wrapper sees the pass that is differentiated.
    `micro_responses`: how many responses the backward of `score` holds at a time; 0: all.
    """

    def __init__(self, model: nn.Module, processor):
        super().__init__()
        kind = model.config.model_type
        if kind not in FAMILIES:
            raise ValueError(
                f"model_type {kind!r} is not supported; supported families: {', '.join(FAMILIES)}"
            )
        self.model, self.processor, self.family = model, processor, FAMILIES[kind]
        if self.family.one_tile:  # model and processor both count image tokens by this grid
            side = model.config.vision_config.image_size
            model.config.image_grid_pinpoints = [[side, side]]
            processor.image_processor.image_grid_pinpoints = [[side, side]]
        if self.family.prepare:
            self.family.prepare(processor)
        use_patch_products(model.model)
        use_batched_windows(model.model)
        adapt.freeze_audio(model)
        # What FSDP shards apart. Not the tower's layers: they do not run for text alone.
        self._no_split_modules = sorted({type(layer).__name__ for layer in self.language_layers()})
        self.micro_responses = 0
        self.lora_rank = 0  # set by adapt.add_lora
        self.kept_in_bfloat16 = []  # names of float32 weights, set by keep_frozen_in_bfloat16
        chat.check_template(processor)
        self.prefilled = chat.prefilled(processor)  # begins every answer; part of the decoded text
        self.eos_ids = self._end_tokens()
        pad = processor.tokenizer.pad_token_id
        self.pad_id = self.eos_ids[0] if pad is None else pad
        self.unread_ids = self._unread_tokens()
        self.register_buffer("banned", self._banned_tokens(), persistent=False)  # (V,) bool
        self.reserved_texts = self._reserved_texts()
        # Dropout would make the scored distribution differ from the sampled one.
        self.eval()

    def language_layers(self) -> list[nn.Module]:
        """The layers of the language model, in order."""
        modules = self.model.get_decoder().modules()
        return [x for x in modules if isinstance(x, GradientCheckpointingLayer)]

    @property
    def device(self) -> torch.device:
        return self.banned.device

    # ------------------------------------------------------------------------------ load and save

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
        """Load model and processor from a hub id or a folder.

        min_pixels, max_pixels: limits of a picture's area, where the family has such; None: the
        processor's own. weights False: parameters without values, on the meta device.
        Raises ValueError if it is no vision-language model of a supported family, or is not whole.
        """
        config = load_config(name_or_path)
        processor = load_processor(name_or_path, config)  # first: it costs less than the weights
        options = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
        policy = cls(load_model(name_or_path, config, weights, **options), processor)
        if min_pixels is not None or max_pixels is not None:
            policy._limit_pixels(min_pixels, max_pixels)
        return policy

    def _limit_pixels(self, least: int | None, most: int | None) -> None:
        if self.family.limits_per_pixel is None:
            kind = self.model.config.model_type
            flexible = [name for name, x in FAMILIES.items() if x.limits_per_pixel]
            raise ValueError(
                f"{kind} has no limits of a picture's area; min_pixels and max_pixels are for "
                f"{', '.join(flexible)}"
            )
        ip = self.processor.image_processor
        scale = self.family.limits_per_pixel(ip)
        # areas, whatever their names
        least = ip.size["shortest_edge"] if least is None else scale * least
        most = ip.size["longest_edge"] if most is None else scale * most
        if not 0 < least <= most:
            found = f"{least // scale} and {most // scale}"
            raise ValueError(f"0 < min_pixels <= max_pixels, got {found}")
        ip.size = SizeDict(shortest_edge=least, longest_edge=most)

    def keep_frozen_in_bfloat16(self) -> None:
        """For computing in bfloat16: vlm/precision.py. Checkpoints hold them in float32."""
        self.kept_in_bfloat16 = precision.keep_frozen_in_bfloat16(self.model)

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write a folder that AutoModelForImageTextToText and AutoProcessor load.

        state_dict: the policy's, gathered from all processes; None: its own.
        LoRA adapters are merged into the weights and also written beside them, to resume exactly.
        """
        if state_dict is None:
            weights = self.model.state_dict()
        else:
            weights = {}
            for name, value in state_dict.items():
                if name.startswith("model."):
                    weights[name.removeprefix("model.")] = value
            for name in self.model.all_tied_weights_keys:  # gathered: a copy, written twice
                weights.pop(name, None)
        for name in self.kept_in_bfloat16:
            weights[name] = weights[name].float()
        if self.lora_rank:
            weights = adapt.save_adapters(weights, folder)
        self.model.save_pretrained(folder, state_dict=weights)
        self.processor.save_pretrained(folder)

    def _end_tokens(self) -> list[int]:
        """The end tokens of generation_config, of the tokenizer and of a turn in the chat template.

        Nothing else is taken from generation_config.
        """
        tokenizer = self.processor.tokenizer
        found = self.model.generation_config.eos_token_id
        ids = found if isinstance(found, list) else [found]
        ids = [*ids, tokenizer.eos_token_id]
        if end := chat.turn_end(self.processor):
            ids.append(tokenizer.convert_tokens_to_ids(end))
        ids = [i for i in dict.fromkeys(ids) if i is not None]
        if not ids:
            raise ValueError(
                "no end token: generation_config.json and the tokenizer have no eos_token"
            )
        return ids

    def _unread_tokens(self) -> list[int]:
        """Special tokens that `decode` leaves out: all but those that answers use."""
        answers = f"{ANSWER_TAGS}|{self.family.answer_tokens}"
        ids = []
        for i, token in self.processor.tokenizer.added_tokens_decoder.items():
            if token.special and not re.fullmatch(answers, token.content):
                ids.append(i)
        return ids

    def _banned_tokens(self) -> Tensor:
        """Tokens that are never sampled and have no probability.   -> (V,) bool

        What `decode` leaves out (apart from the end tokens), every token that stands for an image,
        and ids beyond the tokenizer. After a sampled image token the numbers of image tokens and
        image features would differ.
        """
        config, tokenizer = self.model.config, self.processor.tokenizer
        ids = set(self.unread_ids)
        for i, token in tokenizer.added_tokens_decoder.items():
            if re.fullmatch(self.family.banned, token.content):
                ids.add(i)
        for name in ("image", "video", "vision_start", "vision_end", "boi", "eoi"):
            ids.add(getattr(config, f"{name}_token_id", None))
        ids -= {None, *self.eos_ids}
        size = config.get_text_config().vocab_size
        banned = torch.zeros(size, dtype=torch.bool)
        banned[len(tokenizer) :] = True
        banned[[i for i in ids if i < size]] = True
        return banned

    def _reserved_texts(self) -> list[str]:
        """Texts of special tokens and pictures, which a question must not hold."""
        tokenizer = self.processor.tokenizer
        banned = self.banned[: len(tokenizer)].nonzero().flatten().tolist()
        texts = set(tokenizer.convert_ids_to_tokens([*self.unread_ids, *banned]))
        for name, value in vars(self.processor).items():
            # What the processor replaces by a picture's tokens. Gemma 4: audio_ms_per_token = 40.
            if name.endswith("_token") and not isinstance(value, int):
                texts.add(str(value or ""))
        return sorted(texts - {None, ""})

    # ------------------------------------------------------------------------------------- encode

    def to_unit_image(self, image: Image.Image) -> Tensor:
        """Picture -> float32 (3, H, W) in [0, 1] at the processor's final size, tiling off."""
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        final = self.family.resize(pixels, self.processor.image_processor, self.family.untiled)
        return final.float() / 255

    def to_pixel_values(self, images: list[Tensor]) -> dict[str, Tensor]:
        """[0, 1] images at the final size -> the model's vision inputs, differentiably."""
        return self.family.pixel_values(images, self.processor.image_processor)

    def encode(
        self,
        problems: list[str | list[dict]],
        images: list[list[Image.Image]],
        max_tokens: int | None = None,
    ) -> Prompts:
        """Questions and their pictures -> Prompts on the model's device.

        Raises ValueError for an empty problem or a prompt longer than max_tokens. A prompt is never
        truncated, as that would cut image tokens.
        """
        rows = []
        for problem, pictures in zip(problems, images, strict=True):
            rows.append(self.tokenize(problem, pictures))
        return self.collate(rows, max_tokens)

    def tokenize(self, problem: str | list[dict], images: list[Image.Image]) -> TokenizedPrompt:
        """One prompt: resized images, chat template, image tokens. `collate` batches it."""
        units = [self.to_unit_image(image) for image in images]
        prompt = TokenizedPrompt(self._processed(self.chat_text(problem, len(units)), units), units)
        if not prompt.inputs["attention_mask"].all():
            raise RuntimeError("the processor pads a prompt, although it is told not to")
        return prompt

    def collate(self, rows: list[TokenizedPrompt], max_tokens: int | None = None) -> Prompts:
        """Tokenised prompts as one left-padded batch, with their positions. Errors as `encode`."""
        longest = max(row.length for row in rows)
        if max_tokens is not None and longest > max_tokens:
            raise ValueError(
                f"a prompt has {longest} tokens, more than max_prompt_tokens={max_tokens}"
            )
        ids = self._left_padded(rows, "input_ids", self.pad_id)
        mask = self._left_padded(rows, "attention_mask").bool()
        positions, next_position = self._positions(ids, mask, rows)
        images = []
        for row in rows:
            images += [x.to(self.device) for x in row.images]
        types = self.family.token_types
        return Prompts(
            ids,
            mask,
            positions,
            next_position,
            images,
            counts=[len(row.images) for row in rows],
            token_types=self._left_padded(rows, types) if types else None,
        )

    def prompt_tokens(self, row: dict) -> int:
        """The length of a row's prompt, image tokens included."""
        return self.tokenize(row["problem"], row["images"]).length

    def chat_text(self, problem: str | list[dict], images: int) -> str:
        """The chat template over a user's text or over messages, up to where the assistant begins.

        A picture stands where the text says <image>. If it says so nowhere, all pictures stand
        before the first user's text. Raises ValueError for an empty problem, marks that do not fit
        the images, and a text that holds a special token.
        """
        messages = chat.parts(problem, images)
        for message in messages:
            for part in message["content"]:
                self._refuse_reserved(part.get("text", ""))
        options = {"tokenize": False, "add_generation_prompt": True}
        return self.processor.apply_chat_template(messages, **options)

    def _refuse_reserved(self, text: str) -> None:
        """Raises ValueError for a text that would be read as a picture or as the end of a turn."""
        for token in self.reserved_texts:
            if token in text:
                raise ValueError(
                    f"the problem holds {token!r}, a special token of the model: leave it out or "
                    "write it in another way (a picture's place is marked by <image>)"
                )

    def _processed(self, text: str, images: list[Tensor]) -> BatchFeature:
        """The processor's inputs of one prompt. Each family pads a batch in its own way."""
        bos = self.processor.tokenizer.bos_token
        # Exact, as they come from 8-bit pictures. A processor computes on a GPU in another way.
        pixels = [(x.cpu() * 255).round().to(torch.uint8) for x in images]
        # Resized already. A second time is not the identity for extreme shapes or narrow limits.
        with self.family.without_resize(self.processor.image_processor) as options:
            return self.processor(
                text=[text],
                images=[pixels] if pixels else None,
                # The template may have written the BOS token; the tokenizer must not add another.
                add_special_tokens=bos is None or not text.startswith(bos),
                # Said here, because a saved tokenizer or processor may hold other defaults.
                truncation=False,
                padding=False,
                return_tensors="pt",
                **options,
                **self.family.untiled,
            )

    def _left_padded(self, rows: list[TokenizedPrompt], name: str, value: int = 0) -> Tensor:
        """An input of all prompts on the model's device.   -> (P, L)"""
        longest = max(row.length for row in rows)
        padded = []
        for row in rows:
            left = longest - row.length
            padded.append(nn.functional.pad(row.inputs[name], (left, 0), value=value))
        return torch.cat(padded).to(self.device)

    def _positions(
        self, ids: Tensor, mask: Tensor, rows: list[TokenizedPrompt]
    ) -> tuple[Tensor, Tensor]:
        """Position ids, and each row's position of the first response token.

        Explicit: an offset that the model remembers of another batch (rope_deltas) is never used.
        """
        if not hasattr(self.model.model, "get_rope_index"):
            return (mask.cumsum(-1) - 1).clamp(min=0), mask.sum(-1)
        types = self._left_padded(rows, "mm_token_type_ids")
        if not torch.equal(types == 1, ids == self.model.config.image_token_id):
            raise RuntimeError(
                "mm_token_type_ids and input_ids disagree about which tokens are an image's"
            )
        grid = self.family.grid
        grids = [row.inputs[grid] for row in rows if row.images]
        grids = torch.cat(grids).to(self.device) if grids else None
        positions, delta = self.model.model.get_rope_index(
            ids, mm_token_type_ids=types, attention_mask=mask, **{grid: grids}
        )
        return positions, mask.sum(-1) + delta[:, 0]

    # ------------------------------------------------------------------------------- read, respond

    def read(self, prompts: Prompts, to_pixels: bool = False) -> ReadPrompts:
        """The prompt pass: compute each prompt once.

        With gradients on, the result carries the graph to the parameters, and to the images where
        they ask for a gradient. to_pixels: make them ask. `read.images` are the graph's.
        """
        images = (
            [x.detach().requires_grad_() for x in prompts.images] if to_pixels else prompts.images
        )
        vision = {}
        if images:
            vision = self._in_precision(self.to_pixel_values(images))
        if self.family.counts and prompts.images:
            counts = [count for count in prompts.counts if count]
            vision[self.family.counts] = torch.tensor(counts, device=self.device)
        types = {self.family.token_types: prompts.token_types} if self.family.token_types else {}
        layers = prompt_layers(self.model.config)
        hidden = self.model.model(
            input_ids=prompts.ids,
            attention_mask=prompts.mask.long(),
            position_ids=prompts.positions,
            past_key_values=Cache(layers=layers),
            # Make no other cache. The one given is used, and checkpointed layers keep it.
            use_cache=False,
            **vision,
            **types,
        ).last_hidden_state
        if not all(layer.is_initialized for layer in layers):
            raise RuntimeError(
                "the prompt's cache is empty: is activation checkpointing on for the language "
                "model? Use adapt.checkpoint_layers"
            )
        # In layers of their own: a pass that is computed again writes into `layers` again.
        return ReadPrompts([layer.select(slice(None)) for layer in layers], hidden[:, -1], images)

    def _in_precision(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The vision inputs, cast where the family's tower does not do so itself."""
        inputs = dict(inputs)
        if self.family.cast and "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def respond(
        self, tokens: Tensor, cache: Cache, mask: Tensor | dict, position: Tensor
    ) -> Tensor:
        """Hidden states of tokens after the cached ones.

        tokens (N, t), mask (N, L + t) of 0 and 1 or as Decoder.attention_mask gives it, position of
        the first token (N,) -> (N, t, D)
        """
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        positions = position[:, None] + steps  # (N, t)
        if hasattr(self.model.model, "get_rope_index"):
            positions = positions.expand(3, -1, -1)
        return self.model.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """The output head in float32, banned tokens at -inf.   (..., D) -> (..., V)"""
        logits = self.model.lm_head(hidden).float()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return logits.masked_fill(self.banned, -torch.inf)

    # ------------------------------------------------------------------------------------- sample

    @torch.no_grad()
    def sample(
        self,
        prompts: Prompts,
        n: int,
        seeds: list[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        prompts_at_a_time: int = 0,
        read: ReadPrompts | None = None,
    ) -> Responses:
        """n responses per prompt from softmax(logits / temperature); temperature 0 is greedy.

        seeds: one per prompt. A prompt's responses depend on its own seed and on nothing else of
        the batch: rollouts do not depend on the number of processes or the micro-batch size.
        prompts_at_a_time: sample so many prompts together; 0: all.
        read: `self.read(prompts)`, for a second call on the same prompts; None: computed here.
        The loop does not use `generate`: no top-k, top-p or penalty of a generation_config enters.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"one seed per prompt: got {len(seeds)} for {len(prompts)}")
        size = prompts_at_a_time or len(prompts)
        parts = []
        for start in range(0, len(prompts), size):
            rows = slice(start, start + size)
            part_read = None if read is None else read[rows]
            options = (n, seeds[rows], max_new_tokens, temperature)
            parts.append(self._sample_together(prompts[rows], part_read, *options))
        return Responses.concatenate(parts, self.pad_id)

    def _sample_together(
        self,
        prompts: Prompts,
        read: ReadPrompts | None,
        n: int,
        seeds: list[int],
        T: int,
        temperature: float,
    ) -> Responses:
        """All rows together. As wide as the longest response."""
        read = self.read(prompts) if read is None else read
        prompt = (read, prompts.mask, prompts.next_position)
        decoder = Decoder(self, *prompt, n, seeds, T, temperature)
        del read, prompt  # the decoder's cache is a copy of what was read
        return Responses(*decoder.run())

    # -------------------------------------------------------------------------------------- score

    def score(
        self,
        prompts: Prompts,
        tokens: Tensor,
        mask: Tensor,
        temperature: float = 1.0,
        read: ReadPrompts | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced log-probs and entropies of given responses.

        (N, T), (N, T) bool -> (N, T), (N, T) float32. Differentiable in the parameters and in
        prompts.images. Values at padding are meaningless and finite.
        read: `self.read(prompts)` with its graph, for several uses; None: computed here.

        Responses of like length are computed together, so that little padding is computed. With
        micro_responses each chunk is computed again in the backward, which then holds the
        activations of one chunk and of the P prompts.
        """
        read = self.read(prompts) if read is None else read
        n = len(tokens) // len(prompts)
        owner = torch.arange(len(prompts), device=self.device).repeat_interleave(n)  # (N,)
        targets = torch.where(mask, tokens, self.eos_ids[0])

        def score_chunk(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
            hidden = self._response_hidden(
                prompts, read, owner[rows], tokens[rows, :width], mask[rows, :width]
            )
            return self._head_in_chunks(hidden, targets[rows, :width], temperature)

        lengths = mask.sum(dim=1)
        order = lengths.argsort(stable=True)
        logprobs, entropy = [], []
        for rows in order.split(self.micro_responses or RESPONSES_PER_CHUNK):
            longest = int(lengths[rows[-1]])
            width = min(max(LEAST_TOKENS, longest), tokens.shape[1])
            if self.micro_responses:
                chunk = checkpoint(score_chunk, rows, width, use_reentrant=False)
            else:
                chunk = score_chunk(rows, width)
            logprobs.append(right_padded(chunk[0], tokens.shape[1]))
            entropy.append(right_padded(chunk[1], tokens.shape[1]))
        back = order.argsort()
        return torch.cat(logprobs)[back], torch.cat(entropy)[back]

    forward = score

    def _response_hidden(
        self, prompts: Prompts, read: ReadPrompts, owner: Tensor, tokens: Tensor, mask: Tensor
    ) -> Tensor:
        """What predicts each token.   owner: each row's prompt; (rows, T) -> (rows, T, D)"""
        read = read[owner]
        first = read.hidden[:, None]  # (rows, 1, D) predicts the first token
        if tokens.shape[1] == 1:
            return first
        seen = torch.cat([prompts.mask[owner], mask[:, :-1]], dim=1).long()
        position = prompts.next_position[owner]
        further = self.respond(tokens[:, :-1], read.cache(), seen, position)
        return torch.cat([first, further], dim=1)

    def _head_in_chunks(
        self, hidden: Tensor, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies without a (N, T, V) tensor.   (N, T, D), (N, T) -> (N, T), (N, T)

        Chunks of tokens, computed again in the backward. Exact in value and gradient. Unlike fused
        heads, the entropy has a gradient too.
        """

        def head(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return logprobs_and_entropy(self.logits(h), y, temperature)  # of (chunk, V)

        size = max(1, LOGITS_PER_CHUNK // len(self.banned))
        hidden_chunks = hidden.flatten(0, 1).split(size)
        token_chunks = tokens.flatten().split(size)
        logprobs, entropy = [], []
        for h, y in zip(hidden_chunks, token_chunks, strict=True):
            chunk = checkpoint(head, h, y, use_reentrant=False)
            logprobs.append(chunk[0])
            entropy.append(chunk[1])
        return torch.cat(logprobs).view(tokens.shape), torch.cat(entropy).view(tokens.shape)

    def decode(self, responses: Responses) -> list[str]:
        """The responses' text: what the template prefilled, then all but padding and end token.

        Special tokens are left out, but those that answers use (Family.answer_tokens) are kept.
        """
        unread = torch.tensor(self.unread_ids, device=responses.tokens.device)
        kept = responses.mask & ~torch.isin(responses.tokens, unread)
        texts = []
        for tokens, mask in zip(responses.tokens, kept, strict=True):
            text = self.processor.tokenizer.decode(tokens[mask], clean_up_tokenization_spaces=False)
            texts.append(self.prefilled + text)
        return texts

    # --------------------------------------------------------------------------------- self-check

    @torch.no_grad()
    def self_check(self) -> dict[str, float]:
        """Compare pixel_values with the processor's, and the shared prompt with the plain forward.

        Two prompts of different lengths with a small picture each, two responses each. The plain
        way: one row at a time, the processor's own inputs, the model's own positions, nothing
        padded or cached.
        Returns {"pixels": largest difference, "logits": largest difference / std(logits)}. Raises
        RuntimeError when one is more than rounding: the library has changed, or the checkpoint is
        unlike its family.
        """
        self._refuse_wrong_rotations()
        self._refuse_cut_prompts()
        wide = 56 if self.family.one_tile else 84  # oblong, its two tiles would differ
        rng = np.random.default_rng(0)
        pictures = []
        for width in (56, wide):
            pixels = rng.integers(0, 256, (56, width, 3), dtype=np.uint8)
            pictures.append(Image.fromarray(pixels))
        problems = ["How many?", "What does the picture show? Look, and answer."]
        prompts = self.encode(problems, [[picture] for picture in pictures])
        kind = self.model.config.model_type
        pixels = self._pixel_difference(pictures, prompts)
        if not pixels <= 1e-5:
            raise RuntimeError(
                f"self-check of {kind}: pixel_values differ from the image processor's by "
                f"{pixels:.2g}, rounding is below 1e-5; has the library changed? "
                "--self_check false trains on a model that sees other pictures"
            )
        by_shift = self._logit_differences(problems, prompts)
        logits = by_shift[0].abs().max().item()
        low = next(self.parameters()).dtype == torch.bfloat16
        low = low or torch.is_autocast_enabled(self.device.type)
        limit = 0.5 if low else 1e-3  # of bfloat16: up to 0.37 in 24 layers of a peaked model
        wrong = ""
        if not logits <= limit:
            wrong = f"{logits:.2g} of their standard deviation, rounding is below {limit:g}"
        else:
            # A wrong position can stay below bfloat16's limit where few layers have positions.
            # Over all tokens it is still more than rounding: the right position differs least.
            rms = {shift: x.square().mean().sqrt().item() for shift, x in by_shift.items()}
            best = min(rms, key=rms.get)
            if rms[0] > 1.2 * rms[best]:
                wrong = f"{rms[0]:.2g}, with positions moved by {best} by {rms[best]:.2g}"
        if wrong:
            raise RuntimeError(
                f"self-check of {kind}: logits after the shared prompt differ from the plain "
                f"forward's by {wrong}; has the library changed? "
                "--self_check false trains with wrong log-probs"
            )
        return {"pixels": pixels, "logits": logits}

    def _refuse_cut_prompts(self) -> None:
        """A prompt of 20,000 numbers must have as many tokens at least."""
        numbers = " ".join(map(str, range(20_000)))
        warned = self.processor.tokenizer.deprecation_warnings
        warned["sequence-length-is-longer-than-the-specified-maximum"] = True  # as it should be
        tokens = self.tokenize(numbers, []).length
        if tokens < 20_000:
            raise RuntimeError(
                f"self-check: prompts are cut to {tokens} tokens; look for truncation in the "
                "processor's and the tokenizer's files. --self_check false trains on cut prompts"
            )

    def _refuse_wrong_rotations(self) -> None:
        """Rotary frequencies must be those of the config. Both ways of the check rotate by them."""
        for module, model in _models_of_modules(self.model).items():
            for name, found in module.named_buffers(recurse=False):
                if not name.endswith("inv_freq"):
                    continue
                fresh = copy.deepcopy(module)
                setattr(fresh, name, torch.zeros(found.shape))
                model._init_weights(fresh)
                wanted = getattr(fresh, name)
                if not torch.allclose(found.float().cpu(), wanted, rtol=1e-5, atol=0):
                    raise RuntimeError(
                        f"self-check of {self.model.config.model_type}: the rotary frequencies of "
                        f"{type(module).__name__} ({found.dtype}) are not those of its config: "
                        "were they rounded or left empty when the model was loaded or cast?"
                    )

    def _pixel_difference(self, pictures: list[Image.Image], prompts: Prompts) -> float:
        """The largest difference of our pixel_values from the processor's; inf if they are more.

        Picture by picture: some families pad a batch to its largest.
        """
        worst = 0.0
        for picture, image in zip(pictures, prompts.images, strict=True):
            ours = self.to_pixel_values([image])["pixel_values"].flatten().cpu()
            options = {"return_tensors": "pt", **self.family.untiled}
            inputs = self.processor.image_processor([picture], **options)
            theirs = inputs["pixel_values"].flatten()
            if len(ours) != len(theirs):
                return float("inf")
            worst = max(worst, (ours - theirs).abs().max().item())
        return worst

    def _logit_differences(self, problems: list[str], prompts: Prompts) -> dict[int, Tensor]:
        """Shared prompt minus plain forward, of random tokens, as shares of std(logits).

        By how far the responses' positions were moved: 0, and 1 to either side.
        -> (4 responses, POSITION_TOKENS, allowed tokens) each
        """
        allowed = (~self.banned).nonzero().flatten()
        generator = torch.Generator().manual_seed(0)
        shape = (4, POSITION_TOKENS)
        tokens = allowed[torch.randint(len(allowed), shape, generator=generator).to(self.device)]
        owner = torch.tensor([0, 0, 1, 1], device=self.device)
        plain = []
        for p, response in zip(owner, tokens, strict=True):
            text = self.chat_text(problems[p], 1)
            images = prompts[p : p + 1].images
            plain.append(self._plain_logits(text, images, response)[..., allowed])
        plain = torch.stack(plain)
        read, mask = self.read(prompts), torch.ones_like(tokens, dtype=torch.bool)
        differences = {}
        for shift in (0, -1, 1):
            moved = replace(prompts, next_position=prompts.next_position + shift)
            hidden = self._response_hidden(moved, read, owner, tokens, mask)
            shared = self.logits(hidden)[..., allowed]
            differences[shift] = (shared - plain) / plain.std()
        return differences

    def _plain_logits(self, text: str, images: list[Tensor], response: Tensor) -> Tensor:
        """The model's own forward over one prompt, as the processor gives it, and one response.

        (T,) -> (T, V)
        """
        inputs = self._in_precision(self._processed(text, images).to(self.device))
        length, T = inputs["input_ids"].shape[1], len(response)
        for name, x in inputs.items():
            if x.shape != (1, length):
                continue
            end = torch.zeros_like(response)  # token types: text
            if name == "input_ids":
                end = response
            elif name == "attention_mask":
                end = torch.ones_like(response)
            inputs[name] = torch.cat([x, end[None]], dim=1)
        return self.model(**inputs, use_cache=False).logits[0, -T - 1 : -1].float()


def _models_of_modules(model: nn.Module) -> dict[nn.Module, PreTrainedModel]:
    """{module: the innermost transformers model that holds it}"""
    models = {}
    for module in model.modules():  # the outer ones first
        if isinstance(module, PreTrainedModel):
            models |= dict.fromkeys(module.modules(), module)
    return models
