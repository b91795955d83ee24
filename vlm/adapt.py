"""Knobs that trade time or trained parameters for memory: frozen vision, LoRA, activation checkpointing.

Apart from policy.py so that the policy reads without them. Each is called once, after loading and before the optimiser
is made, and leaves the gradients of what is still trained as they were (tests/test_memory.py). The fourth knob,
responses a few at a time, is `Policy.micro_responses`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

ADAPTER = "adapter.safetensors"
LANGUAGE_PART = (
    r".*\.(language_model|text_model)\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
)


def freeze(policy: nn.Module, what: str) -> None:
    """what: none | vision (the tower) | vision+projector. The gradient still passes through, to the pixels."""
    family, tower = policy.family, (policy.family.tower,)
    for name, p in policy.model.model.named_parameters():
        is_projector = inside(name, family.projector)  # Qwen's is within the tower
        if what == "vision+projector" if is_projector else what != "none" and inside(name, tower):
            p.requires_grad_(False)


def inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def checkpoint_layers(policy: nn.Module) -> None:
    """Keep only the input of each layer of language model and vision tower; the rest is computed again in the backward.

    transformers does so in training mode only, and takes the cache away from the layers. Here the layer alone is in
    training mode (its dropouts, being modules of their own or asking the attention's mode, stay off), and keeps the
    cache: PromptLayer is written once, so computing a layer again does not change it.
    """
    policy.model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in policy.model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = layer._can_checkpoint_with_cache = True


def add_lora(
    policy: nn.Module, rank: int, alpha: float, seed: int, folder: str | Path | None = None
) -> None:
    """Low-rank adapters on the language model's projections, the only parameters that are trained then.

    W x + (alpha / rank) B A x, B = 0 at the start, A and B in float32. folder: a checkpoint whose adapters to load.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("lora_rank needs peft: pip install peft") from error
    torch.manual_seed(seed)  # A's values
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=LANGUAGE_PART), policy.model
    )
    policy.lora_scale = alpha / rank
    adapters = {name: p for name, p in policy.model.named_parameters() if ".lora_" in name}
    for p in policy.parameters():
        p.requires_grad_(False)
    for p in adapters.values():
        p.data = p.data.float()
        p.requires_grad_(True)
    if folder is not None:
        saved = load_file(Path(folder) / ADAPTER)
        if saved.keys() != adapters.keys():
            raise ValueError(f"{folder}/{ADAPTER} does not hold the adapters of this model")
        with torch.no_grad():
            for name, p in adapters.items():
                p.copy_(saved[name])


def save_adapters(state: dict[str, Tensor], scale: float, folder: str | Path) -> dict[str, Tensor]:
    """Write the adapters of a state dict to the folder.   -> the state dict of the plain model, adapters merged in"""
    adapters = {name: w.contiguous() for name, w in state.items() if ".lora_" in name}
    save_file(adapters, Path(folder) / ADAPTER)
    merged = {}
    for name, w in state.items():
        if name in adapters:
            continue
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix("base_layer.weight")
            a, b = (
                adapters[f"{stem}lora_A.default.weight"],
                adapters[f"{stem}lora_B.default.weight"],
            )
            w = (w.float() + scale * (b.float() @ a.float())).to(w.dtype)
        merged[name.replace(".base_layer.", ".")] = w
    return merged
