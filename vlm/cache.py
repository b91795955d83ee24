"""The prompt's cache, computed once and shared by the group of its responses.

`Policy.read` fills one PromptLayer per layer of the language model. In scoring, `read[owner]`
repeats each prompt for its responses, and gradients flow back through it. In sampling,
`read.decode_cache(n, room)` copies it once, with room for the tokens to come. Another kind of layer
(linear attention) needs a class with PromptLayer's methods, and a line in `prompt_layers`.

Symbols: P prompts, n responses per prompt, L prompt tokens, D hidden size, d size of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


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

    def decode_layer(self, n: int, room: int) -> "DecodeLayer":
        """Each prompt n times, with room for further tokens."""
        return DecodeLayer(with_room(self.keys, n, room), with_room(self.values, n, room), room)


class DecodeLayer(DynamicLayer):
    """One layer's keys and values of rows that grow by a token at a time. The room is made once.

    Appending by concatenation, as DynamicLayer does, would copy the whole prompt for every token.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int):
        super().__init__()
        self.keys, self.values = keys, values  # (P * n, heads, L + room, d), the last `room` empty
        self.length = keys.shape[2] - room
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.length

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start, end = self.length, self.length + keys.shape[2]
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop the other rows. rows: a mask or indices."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def prompt_layers(config) -> list[PromptLayer]:
    """An empty layer for each of the language model's. Here other kinds of layers are chosen."""
    return [PromptLayer() for _ in range(config.get_text_config().num_hidden_layers)]


def with_room(x: Tensor, n: int, room: int) -> Tensor:
    """(P, heads, L, d) -> (P * n, heads, L + room, d), the room not initialised"""
    P, heads, L, d = x.shape
    grown = x.new_empty(P, n, heads, L + room, d)
    grown[..., :L, :] = x[:, None]
    return grown.flatten(0, 1)


@dataclass
class ReadPrompts:
    """What one pass over the prompts leaves for their responses.

    `read[i:j]` and `read[owner]` choose prompts. With gradients on, it carries the graph.
    """

    layers: list[PromptLayer]
    hidden: Tensor  # (P, D) of the last prompt token: predicts the first response token

    def __getitem__(self, prompts: Tensor | slice) -> "ReadPrompts":
        layers = [layer.select(prompts) for layer in self.layers]
        return ReadPrompts(layers, self.hidden[prompts])

    def cache(self) -> Cache:
        return Cache(layers=self.layers)

    def decode_cache(self, n: int, room: int) -> Cache:
        return Cache(layers=[layer.decode_layer(n, room) for layer in self.layers])
