"""What is trained, and what is computed again: frozen vision, LoRA, activation checkpointing.

Each function is called once, after loading and before the optimiser is made. Each leaves the
gradients of what is still trained as they were (tests/test_adapt.py). Another saving, of responses
held at a time, is `Policy.micro_responses`.
"""

import re
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

ADAPTER = "adapter.safetensors"  # the adapters alone, to resume from
LORA_SCALE = 2  # alpha / rank
AUDIO = ("audio_tower.", "embed_audio.")  # modules of model.model that no picture or text reaches
PEFT_NAME = ".default"  # in the names of the adapters' parameters, but not in the file


def freeze_audio(model: nn.Module) -> None:
    """No prompt has sound. Gemma 3n computes its embeddings of sounds always, times zero."""
    for name, parameter in model.model.named_parameters():
        if name.startswith(AUDIO):
            parameter.requires_grad_(False)


def freeze(policy: nn.Module, what: str) -> None:
    """what: none | vision (the tower) | vision+projector. Pixels still get their gradients."""
    family = policy.family
    for name, parameter in policy.model.model.named_parameters():
        if family.in_projector(name):  # asked first: Qwen's projector is inside the tower
            frozen = what == "vision+projector"
        else:
            frozen = what != "none" and family.in_tower(name)
        if frozen:
            parameter.requires_grad_(False)


def checkpoint_layers(policy: nn.Module) -> None:
    """Activation checkpointing: keep only each layer's input, compute the rest in the backward.

    For the layers of the language model and of the vision tower. transformers does so in training
    mode only, and takes the cache away from the layers. Here only the layer itself is in training
    mode. Its dropouts stay off: they are modules of their own or ask the attention's mode. The
    layer keeps the cache: a PromptLayer is written once, so computing a layer again does not change
    it. The attributes are set one by one: the library's own call was renamed between versions.
    """
    for layer in policy.model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            layer._can_checkpoint_with_cache = True
            layer.training = True
        elif hasattr(layer, "set_grad_checkpointing"):  # timm's towers: whatever the mode
            layer.set_grad_checkpointing()


def lora_targets(policy: nn.Module) -> list[str]:
    """Names of the linear layers inside the language model's layers, whatever they are called.

    Attention, linear attention, convolutions' projections, MLPs, shared experts. Not what has one
    output: it weighs an expert.
    """
    wanted = set()
    for layer in policy.language_layers():
        for module in layer.modules():
            if isinstance(module, nn.Linear) and module.out_features > 1:
                wanted.add(module)
    return [name for name, module in policy.named_modules() if module in wanted]


def without_adapters(policy: nn.Module) -> list[str]:
    """Names of the weights in the language model's layers that LoRA leaves as they are: fused
    experts. One tensor holds the matrices of all experts of a layer, and is no linear layer.
    """
    names = set()
    for layer in policy.language_layers():
        for name, w in layer.named_parameters():
            if w.ndim == 3 and "expert" in name:
                names.add(name)
    return sorted(names)


def add_lora(policy: nn.Module, rank: int, seed: int, folder: str | Path | None = None) -> None:
    """Low-rank adapters on the language model's linear layers. Only they are trained then.

    W x + (alpha / rank) B A x with alpha = 2 * rank, B = 0 at the start, A and B in float32.
    folder: a checkpoint whose adapters to load. Raises ValueError for adapters of other layers,
    RuntimeError for another rank.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("lora_rank needs peft: pip install peft") from error
    torch.manual_seed(seed)  # for the values of A
    targets = "|".join(re.escape(name) for name in lora_targets(policy))
    config = LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=targets)
    # Into the policy, which freezes all other parameters. Given the model, peft would go by its
    # config: in some families it would adapt the fused experts, and no shared expert.
    inject_adapter_in_model(config, policy)
    policy.lora_rank = rank
    for name, parameter in policy.model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    if folder is not None:
        adapters = {}
        for name, w in load_file(Path(folder) / ADAPTER).items():
            adapters[name.replace(".weight", f"{PEFT_NAME}.weight")] = w
        if adapters.keys() != {name for name in policy.model.state_dict() if ".lora_" in name}:
            raise ValueError(f"{folder}/{ADAPTER} does not hold the adapters of this model")
        policy.model.load_state_dict(adapters, strict=False)


def save_adapters(state: dict[str, Tensor], folder: str | Path) -> dict[str, Tensor]:
    """Write the adapters of a state dict to the folder.   -> the state dict of the plain model

    peft's own merge works on the model's parameters, which are sharded under FSDP. Here the
    gathered state dict is merged.
    """
    adapters = {}
    for name, w in state.items():
        if ".lora_" in name:
            adapters[name.replace(PEFT_NAME, "")] = w.contiguous()
    save_file(adapters, Path(folder) / ADAPTER)
    return merged(state)


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain model's state dict: adapters merged into their weights, in float32."""
    found = {}
    for name, w in state.items():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix("base_layer.weight")
            a = state[f"{stem}lora_A{PEFT_NAME}.weight"].float()
            b = state[f"{stem}lora_B{PEFT_NAME}.weight"].float()
            w = (w.float() + LORA_SCALE * (b @ a)).to(w.dtype)
        found[name.replace(".base_layer.", ".")] = w
    return found
