"""float32 weights under bfloat16 autocast: each is cast once, not in every forward.

A linear layer under autocast computes with copies of its weights in bfloat16. autocast remembers
the copies of weights that ask for a gradient. It makes those of others anew in each call of the
layer: for every token that is sampled, every chunk of responses and every recomputation. Values are
the same here, bit for bit.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def product_weights(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(linear layer, name) of the float32 weights and biases of all layers and of the output head.

    Not of the few around the layers, whose dtype the library also takes for the activations.
    """
    linear = {model.lm_head}
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            linear |= {module for module in layer.modules() if isinstance(module, nn.Linear)}
    weights = []
    for module in linear:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype == torch.float32:
                weights.append((module, name))
    return weights


@contextlib.contextmanager
def cast_once(model: nn.Module, device: str) -> Iterator[None]:
    """Under autocast: inside, linear layers hold their weights in its dtype, without gradients.

    The parameters themselves stay as they are, and are back at the end.
    """
    parameters = []
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        for layer, name in product_weights(model):
            parameters.append((layer, name, getattr(layer, name)))
        for layer, name, parameter in parameters:
            layer._parameters[name] = nn.Parameter(parameter.detach().to(dtype), False)
    try:
        yield
    finally:
        for layer, name, parameter in parameters:
            layer._parameters[name] = parameter


def keep_frozen_in_bfloat16(model: nn.Module) -> list[str]:
    """For computing in bfloat16: keep weights of linear layers that are not trained in it.

    Only those that it holds exactly, as most published models' do. A checkpoint can then be written
    in float32 as it was loaded. A head that is the embedding, too, stays.   -> their names
    """
    kept, embedding = set(), model.get_input_embeddings().weight
    for layer, name in product_weights(model):
        parameter = getattr(layer, name)
        if parameter.requires_grad or parameter is embedding:
            continue
        short = parameter.bfloat16()
        if torch.equal(short.float(), parameter):
            parameter.data = short
            kept.add(parameter)
    return [name for name, parameter in model.named_parameters() if parameter in kept]
