"""The prompt's cache, computed once and shared by the group of its responses.

`Policy.read` fills one layer of the cache per layer of the language model: a PromptLayer for
attention, a StateLayer for linear attention and short convolutions, a SharedLayer where a layer
reads an earlier one's keys. In scoring, `read[owner]` repeats each prompt for its responses, and
gradients flow back through it. In sampling, `read.decode_cache(n, room, cursor)` copies it once,
with room for the tokens to come. Another kind of layer needs a class with PromptLayer's methods,
a line in LAYERS, and its mask in vlm/decode.py.

Symbols: P prompts, n responses per prompt, L prompt tokens, D hidden size, d size of a head.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

# Earlier versions (5.17) have no entry in the cache for a layer that reads another's keys.
DummyLayer = getattr(cache_utils, "DummyLayer", object)


class PromptLayer(DynamicLayer):
    """One layer's keys and values of the prompts, (P, heads, L, d). Responses store nothing in it.

    It is written once. So both passes, the prompt's and the responses', can be computed again in
    the backward (activation checkpointing). A cache that appends would then hold tokens twice.
    """

    read_only = False

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.read_only:
            return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values  # computed again, they are the same
        self.is_initialized = True
        return keys, values

    def select(self, prompts: Tensor | slice) -> "PromptLayer":
        """The chosen prompts, read-only. An index may come several times: once per response."""
        layer = PromptLayer()
        layer.update(self.keys[prompts], self.values[prompts])
        layer.read_only = True
        return layer

    @classmethod
    def join(cls, parts: Sequence["PromptLayer"]) -> "PromptLayer":
        """The values of neighbouring prompts."""
        layer = cls()
        layer.update(joined(part.keys for part in parts), joined(part.values for part in parts))
        layer.read_only = True
        return layer

    def decode_layer(self, n: int, room: int, cursor: "Cursor") -> "DecodeLayer":
        """Each prompt n times, with room for further tokens.

        Under autocast the keys are float32 and the values bfloat16. Attention would cast all keys
        at every token, so they are cast here.
        """
        keys = self.keys.to(self.values.dtype)
        return DecodeLayer(with_room(keys, n, room), with_room(self.values, n, room), cursor)


@dataclass
class Cursor:
    """Where the next token's keys and values go. All layers of a decode cache share it."""

    place: Tensor  # (1,): a tensor, so that a decode step is the same at every token
    width: int  # attention runs over so many places; `place` is below it


class DecodeLayer(DynamicLayer):
    """One layer's keys and values of rows that grow by a token at a time, in buffers made once."""

    def __init__(self, keys: Tensor, values: Tensor, cursor: Cursor):
        super().__init__()
        self.keys, self.values, self.cursor = keys, values, cursor  # (P * n, heads, L + room, d)
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """One token's."""
        self.keys.index_copy_(2, self.cursor.place, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.cursor.place, values)
        width = self.cursor.width
        return self.keys[:, :, :width], self.values[:, :, :width]

    def keep(self, rows: Tensor) -> None:
        """Drop the other rows. rows: a mask or indices."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class StateLayer(LinearAttentionLayer):
    """One linear-attention layer's states behind the prompts. Responses store nothing in it.

    window: the last inputs of its short convolution, (P, channels, width). state: its recurrent
    state, (P, heads, k, v); None for a layer that is a convolution alone.

    transformers' own layer writes both in place, which breaks the backward. It also goes on from
    what it holds, so a prompt that is computed again (activation checkpointing) would start from
    its own end. Here the prompt's pass starts from nothing and assigns where it ended.
    """

    def __init__(self):
        super().__init__()
        self.window = self.state = None
        self.record_past = True  # else a pass of one token writes into the window

    @property
    def is_initialized(self) -> bool:
        return self.window is not None

    @property
    def read_only(self) -> bool:
        return self.has_previous_state[0]

    def update_conv_state(
        self, x: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs
    ) -> Tensor:
        """x (P, channels, t) -> what the convolution runs over; the caller drops the window."""
        if self.read_only:
            return torch.cat([self.window, x], dim=-1)
        width = conv_kernel_size or x.shape[-1]
        missing = max(0, width - x.shape[-1])
        self.window = nn.functional.pad(x, (missing, 0))[..., -width:]
        return x

    def update_recurrent_state(self, state: Tensor, state_idx: int = 0, **kwargs) -> Tensor:
        if not self.read_only:
            self.state = state
        return state

    def select(self, prompts: Tensor | slice) -> "StateLayer":
        """As PromptLayer's."""
        state = None if self.state is None else self.state[prompts]
        return self.of(self.window[prompts], state)

    @classmethod
    def of(cls, window: Tensor, state: Tensor | None) -> "StateLayer":
        layer = cls()
        layer.window, layer.state = window, state
        layer.conv_states[0], layer.recurrent_states[0] = window, state
        layer.has_previous_state[0] = True  # a pass starts from conv_states and recurrent_states
        return layer

    @classmethod
    def join(cls, parts: Sequence["StateLayer"]) -> "StateLayer":
        """As PromptLayer's."""
        state = None
        if parts[0].state is not None:
            state = joined(part.state for part in parts)
        return cls.of(joined(part.window for part in parts), state)

    def decode_layer(self, n: int, room: int, cursor: Cursor) -> "DecodeStateLayer":
        """Each prompt n times. The states have one size, whatever the number of tokens."""
        layer = DecodeStateLayer()
        layer.update_conv_state(self.window.repeat_interleave(n, dim=0))
        if self.state is not None:
            layer.update_recurrent_state(self.state.repeat_interleave(n, dim=0))
        return layer


class DecodeStateLayer(LinearAttentionLayer):
    """The same of rows that grow by a token at a time: transformers' own, written in place."""

    def keep(self, rows: Tensor) -> None:
        self.conv_states[0] = self.conv_states[0][rows]
        if self.recurrent_states[0] is not None:
            self.recurrent_states[0] = self.recurrent_states[0][rows]


class SharedLayer(DummyLayer):
    """A layer that reads the keys and values of an earlier one (Gemma 4). It holds nothing."""

    def select(self, prompts: Tensor | slice) -> "SharedLayer":
        return self

    @classmethod
    def join(cls, parts: Sequence["SharedLayer"]) -> "SharedLayer":
        return parts[0]

    def decode_layer(self, n: int, room: int, cursor: Cursor) -> "SharedLayer":
        return self

    def keep(self, rows: Tensor) -> None:
        pass


LAYERS = {
    "full_attention": PromptLayer,
    "sliding_attention": PromptLayer,  # the mask hides what is outside the window
    "linear_attention": StateLayer,
    "conv": StateLayer,
    "dummy": SharedLayer,
}


def prompt_layers(config) -> list[PromptLayer | StateLayer | SharedLayer]:
    """An empty layer for each of the language model's, of the kind that the config names."""
    kinds, _ = get_layer_types_and_kwargs(config.get_text_config())
    unknown = sorted(set(kinds) - LAYERS.keys())
    if unknown:
        raise ValueError(f"layers of the kind {', '.join(unknown)} cannot share their prompt")
    return [LAYERS[kind]() for kind in kinds]


def layer_kinds(config) -> set[str]:
    """The kinds of the language model's layers, of those in LAYERS."""
    return set(get_layer_types_and_kwargs(config.get_text_config())[0])


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """Along the first dimension, without a graph."""
    return torch.cat([x.detach() for x in tensors])


def with_room(x: Tensor, n: int, room: int) -> Tensor:
    """(P, heads, L, d) -> (P * n, heads, L + room, d)

    The room is 0: attention gives a place that it must not see the weight 0, and 0 * nan is nan.
    """
    P, heads, L, d = x.shape
    grown = x.new_zeros(P, n, heads, L + room, d)
    grown[..., :L, :] = x[:, None]
    return grown.flatten(0, 1)


@dataclass
class ReadPrompts:
    """What one pass over the prompts leaves for their responses.

    `read[i:j]` and `read[owner]` choose prompts. With gradients on, it carries the graph.
    """

    layers: list[PromptLayer | StateLayer | SharedLayer]
    hidden: Tensor  # (P, D) of the last prompt token: predicts the first response token
    images: list[Tensor] | None = None  # what was read, where all prompts are here

    def __getitem__(self, prompts: Tensor | slice) -> "ReadPrompts":
        layers = [layer.select(prompts) for layer in self.layers]
        return ReadPrompts(layers, self.hidden[prompts])

    @classmethod
    def join(cls, parts: list["ReadPrompts"]) -> "ReadPrompts":
        """The values of neighbouring prompts of one batch, without their graphs."""
        layers = []
        for same_layer in zip(*(part.layers for part in parts), strict=True):
            layers.append(same_layer[0].join(same_layer))
        return cls(layers, torch.cat([part.hidden for part in parts]).detach())

    def cache(self) -> Cache:
        return Cache(layers=self.layers)

    def decode_cache(self, n: int, room: int, cursor: Cursor) -> Cache:
        """Each prompt n times, with room for `room` further tokens. Without gradients."""
        return Cache(layers=[layer.decode_layer(n, room, cursor) for layer in self.layers])
