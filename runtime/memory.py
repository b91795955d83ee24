"""Bytes of one device by part: what `estimate` says before a run, from the model's config alone.

Parameters, gradients and AdamW's state are counted on the model, built on the meta device. The rest
is an estimate (tests/test_memory.py says how near).

    launch = read_launch()  # what accelerate's launcher told this process
    parts = estimate(config, policy, Work(prompts=16, micro=1, L=2048, patches=5100, T=512), launch)
    peak(parts)

Symbols: P prompts at a time, L prompt tokens, N responses at a time, T response tokens.
"""

import copy
import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from runtime import distributed
from vlm.decode import BLOCK_TOKENS, round_up
from vlm.patches import PatchProduct
from vlm.policy import LOGITS_PER_CHUNK, Policy

# Of a chunk of float32 logits, measured: its log-softmax, its gradients, what the entropy keeps.
LOGITS_COPIES = 5.3
GIB = 2**30
ZERO_BUCKET = 5 * 10**8  # numbers of DeepSpeed's default reduce_bucket_size


class Launch(NamedTuple):
    """In which way the launcher spreads a run over devices."""

    processes: int = 1
    way: str = "one process"  # or DDP, FSDP2, ZeRO-2 (or another stage)
    bfloat16: bool = False  # float32 parameters are trained, bfloat16 ones computed with

    def __str__(self) -> str:
        spread = self.way if self.processes == 1 else f"one of {self.processes}, {self.way}"
        return spread + (", bfloat16 mixed precision" if self.bfloat16 else "")


def read_launch() -> Launch:
    """From what accelerate's launcher sets in the environment of a process.

    Raises ValueError for what training refuses: FSDP version 1, ZeRO-3.
    """
    found = os.environ.get
    processes, bfloat16 = int(found("WORLD_SIZE", 1)), found("ACCELERATE_MIXED_PRECISION") == "bf16"
    if found("ACCELERATE_USE_FSDP") == "true":
        if processes > 1 and found("FSDP_VERSION") != "2":
            raise ValueError(distributed.NO_FSDP_1)
        return Launch(processes, "FSDP2", bfloat16)
    if found("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = int(found("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
        path = found("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if path != "none":
            settings = json.loads(Path(path).read_text())
            stage = settings.get("zero_optimization", {}).get("stage", 0)
            bfloat16 = bfloat16 or settings.get("bf16", {}).get("enabled", False)
        if stage == 3:
            raise ValueError(distributed.NO_ZERO_3)
        return Launch(processes, f"ZeRO-{stage}", bfloat16)
    return Launch(processes, "DDP" if processes > 1 else "one process", bfloat16)


def number_bytes(config: Any, launch: Launch) -> int:
    """Bytes of a number in the computation."""
    return 2 if launch.bfloat16 or config.model.dtype == "bfloat16" else 4


# ----------------------------------------------------------------- kept for the backward: layers


class Layers(NamedTuple):
    """The layers of the language model or the vision tower."""

    layers: list[nn.Module]
    width: int
    query_width: int  # heads * head size
    key_width: int  # the same of keys, or of values
    experts_width: int = 0  # of the experts that compute one token, together
    experts: int = 0  # how many do
    state: int = 0  # numbers in the recurrent state of linear attention
    streams: int = 1  # hidden states of a token that go from layer to layer (Gemma 3n: 4)

    def kept(self, tokens: int, keys: int, trained: bool, recomputed: bool, half: bool) -> int:
        """Numbers kept for the backward of `tokens` tokens that attend to `keys` keys.

        trained: the weights have gradients. recomputed: only each layer's input is kept. half:
        numbers of two bytes; norms stay float32, and so do adapters, each with a copy of its input.
        """
        # embedding, last norm, what follows it
        total = (4 if trained else 2) * tokens * self.width
        for layer in self.layers:
            if recomputed:
                total += tokens * self.streams * self.width
            else:
                total += self.kept_by(layer, tokens, keys, trained, half)
        return total

    def kept_by(self, layer: nn.Module, tokens: int, keys: int, trained: bool, half: bool) -> int:
        """As `kept`, of one layer."""
        norms, mlp_width, projected, gated = [], 0, 0, False
        adapter_inputs = 0
        for name, module in layer.named_modules():
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                norms.append(module)
            if isinstance(module, nn.Linear) and not re.search(r"attn|attention|conv", name):
                mlp_width = max(mlp_width, module.in_features)
            if isinstance(module, nn.Linear) and re.search(r"linear_attn\.in_proj", name):
                projected += module.out_features
            if half and trained and name.endswith("lora_A.default"):
                adapter_inputs += 2 * module.in_features
            gated = gated or bool(re.search(r"gate_(up_)?proj$|w3$", name))
        per_norm = 1
        if trained:
            per_norm = 3 if "RMS" in type(norms[0]).__name__ else 2
        normed = sum(module.weight.numel() for module in norms)
        per_token = (2 if half else 1) * normed * per_norm + adapter_inputs
        per_token += mlp_width * ((3 if gated else 1) + (1 if trained else 0))
        if self.streams > 1:  # as they come in, and before they are corrected
            per_token += 2 * self.streams * self.width
        if has_experts(layer):  # their inputs and outputs are copies, one per expert
            per_token += 2 * self.experts * self.width
            per_token += self.experts_width * (4 if trained else 3)
        if projected:  # linear attention: before and after the convolution, gate, output
            return tokens * (per_token + 4 * projected)
        return tokens * (per_token + 2 * self.query_width) + keys * 2 * self.key_width

    def cache(self, rows: int, tokens: int) -> int:
        """Numbers that `rows` rows of `tokens` tokens leave in the cache."""
        total = 0
        for layer in self.layers:
            children = dict(layer.named_children())
            if "linear_attn" in children:
                total += rows * self.state
            elif getattr(children.get("self_attn"), "is_kv_shared_layer", False):
                continue  # it reads another layer's
            elif "conv" not in children:
                total += rows * tokens * 2 * self.key_width
        return total

    def largest(self, tokens: int, keys: int, half: bool) -> int:
        """What the layer that keeps most keeps."""
        return max(self.kept_by(layer, tokens, keys, True, half) for layer in self.layers)


def has_experts(layer: nn.Module) -> bool:
    return any(name.endswith("experts") for name, _ in layer.named_modules())


def layers_of(policy: Policy) -> tuple[Layers, Layers]:
    """-> the language model's, the vision tower's"""
    text, vision = policy.model.config.get_text_config(), policy.model.config.vision_config
    in_tower = []
    for name, module in policy.model.model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and policy.family.in_tower(name):
            in_tower.append(module)
    query, key = mean_widths(text)
    if getattr(text, "kv_lora_rank", None):  # keys and values of all heads, of two sizes
        query = key = text.num_attention_heads * (text.qk_head_dim + text.v_head_dim) // 2
    experts = getattr(text, "num_experts_per_tok", None) or 0
    experts = experts or getattr(text, "top_k_experts", None) or 0  # Gemma 4's name for it
    inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    layers = policy.language_layers()
    state = 0
    if value_heads := getattr(text, "linear_num_value_heads", None):
        state = value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    width = text.hidden_size
    experts_width = experts * inner if experts else 0
    streams = getattr(text, "altup_num_inputs", 1)
    language = Layers(layers, width, query, key, experts_width, experts, state, streams)
    width = getattr(vision, "embed_dim", None) or getattr(vision, "hidden_size", 0)  # 0: no tower
    return language, Layers(in_tower, width, width, width)


def mean_widths(text: Any) -> tuple[int, int]:
    """Mean over the layers of heads * head size, of queries and of keys."""
    query = key = 0
    for config in text.per_layer_config:  # Gemma 4: they differ
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        query += config.num_attention_heads * head
        key += config.num_key_value_heads * head
    layers = len(text.per_layer_config)
    return query // layers, key // layers


# ------------------------------------------------------------------- kept for the backward: a pass


class Work(NamedTuple):
    """What one device computes at a time."""

    prompts: int  # its share of a step
    micro: int  # prompts of a micro-batch
    L: int  # tokens of the longest prompt
    patches: int  # of one prompt's images
    T: int = 0  # tokens of the longest response; 0: max_new_tokens
    one_pass: bool = False  # one pass over the prompts is kept from sampling to the update


def activations(
    config: Any, policy: Policy, work: Work, responses: int, attack: bool, half: bool
) -> int:
    """Numbers kept for the backward of a micro-batch's prompts and of `responses` at a time.

    attack: the gradient goes to the pixels and no parameter has one. Else it goes to the
    parameters, and a tower that is not trained keeps nothing. half: numbers of two bytes.
    """
    total = prompts_kept(config, policy, work, work.micro, half, not attack, attack)
    return total + responses_kept(config, policy, work, responses, half, not attack)


def prompts_kept(
    config: Any, policy: Policy, work: Work, P: int, half: bool, trains: bool, to_pixels: bool
) -> int:
    """Numbers kept for the backward of P prompts.

    trains: the gradient goes to the parameters that are trained. to_pixels: to the images.
    """
    language, vision = layers_of(policy)
    tokens, patches, recomputed = P * work.L, P * work.patches, config.memory.gradient_checkpointing
    trained, tower = trains and is_trained(language), trains and is_trained(vision)
    total = as_kept(language, config).kept(tokens, tokens, trained, recomputed, half)
    total += embeddings_kept(policy, tokens, trains)
    if not hasattr(policy.model.config.vision_config, "patch_size") and policy.family.tower:
        return total + convolutions_kept(policy, patches, trains, to_pixels)
    if to_pixels or tower:
        total += vision.kept(patches, patches, tower, recomputed, half)
    if tower:  # the input of the patch embedding
        total += patches * numbers_per_patch(policy)
    return total


def responses_kept(
    config: Any, policy: Policy, work: Work, N: int, half: bool, trains: bool
) -> int:
    """Numbers kept for the backward of N responses."""
    language, _ = layers_of(policy)
    tokens, recomputed = N * work.T, config.memory.gradient_checkpointing
    trained, keys = trains and is_trained(language), tokens + N * work.L
    total = as_kept(language, config).kept(tokens, keys, trained, recomputed, half)
    return total + embeddings_kept(policy, tokens, trains)


def is_trained(layers: Layers) -> bool:
    return any(p.requires_grad for layer in layers.layers for p in layer.parameters())


def as_kept(language: Layers, config: Any) -> Layers:
    """Without flash attention, keys and values are repeated for the heads."""
    if config.model.attention == "flash_attention_2":
        return language
    return language._replace(key_width=language.query_width)


def embeddings_kept(policy: Policy, tokens: int, trains: bool) -> int:
    """Gemma 3n computes, for each token, the embedding of an image token too, and its norm."""
    embedder = getattr(policy.model.model, "embed_vision", None)
    table = getattr(embedder, "embedding", None)
    if table is None or not trains or not table.weight.requires_grad:
        return 0
    return 3 * tokens * table.embedding_dim


def convolutions_kept(policy: Policy, images: int, trains: bool, to_pixels: bool) -> int:
    """Numbers that a tower of convolutions keeps of so many images.

    Counted, not estimated: on the meta device autograd keeps tensors, and nothing is computed.
    """
    if not images:
        return 0
    tower = copy.deepcopy(policy.model.model.get_submodule(policy.family.tower)).float().to("meta")
    if not trains:
        tower.requires_grad_(False)
    given, kept = {x.untyped_storage()._cdata for x in tower.parameters()}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return x

    x = torch.empty(images, *image_shape(policy), device="meta", requires_grad=to_pixels)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _ = tower(pixel_values=x, do_pooling=False)  # its graph lives until all is counted
    return sum(storage.nbytes() for storage in kept.values()) // x.element_size()


def image_shape(policy: Policy) -> tuple[int, int, int]:
    """Of the one size that the image processor makes of every picture."""
    size = policy.processor.image_processor.size
    return 3, size["height"], size["width"]


def numbers_per_patch(policy: Policy) -> int:
    """Numbers of one patch of pixel_values, channels and temporal slots included.

    A tower of convolutions has no patches: there it is the whole image.
    """
    vision = policy.model.config.vision_config
    if not hasattr(vision, "patch_size"):
        return math.prod(image_shape(policy))
    size = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    return 3 * size * size * getattr(vision, "temporal_patch_size", 1)


def recomputation(config: Any, policy: Policy, work: Work, responses: int, half: bool) -> int:
    """Numbers that recomputing adds: the cache, its copies, one layer's activations."""
    language, _ = layers_of(policy)
    P, L, T = work.micro, work.L, work.T
    cache = language.cache(P + responses, L)
    wide = language._replace(key_width=language.query_width)
    tokens, keys = max(P * L, responses * T), responses * (L + T)
    return cache + 4 * tokens * wide.width + wide.largest(tokens, keys, half)


# ------------------------------------------------------------------ parameters and what they need


def numbers(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def parameter_bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def weights(config: Any, policy: Policy, launch: Launch) -> dict[str, int]:
    """Bytes of parameters, gradients and AdamW's state, and of what computing needs of them."""
    if launch.way.startswith("ZeRO"):
        return zero_weights(config, policy, launch)
    every = list(policy.parameters())
    trained = [p for p in every if p.requires_grad]
    shards = launch.processes if launch.way == "FSDP2" else 1
    state, casts = parameter_bytes(trained) // shards, cast_weights(policy, launch)
    parts = {"parameters": parameter_bytes(every) // shards}
    parts |= {"gradients": state, "AdamW's state": 2 * state}
    if config.saei.kl_coef:
        parts["reference"] = parameter_bytes(every) - 2 * numbers(casts)
    if launch.way == "FSDP2":
        return parts | fsdp_units(policy, number_bytes(config, launch))
    # Frozen ones are kept in bfloat16 (vlm/precision.py). autocast remembers copies of the others.
    parts["parameters"] -= 2 * numbers([p for p in casts if not p.requires_grad])
    if launch.bfloat16:
        copies = 2 * numbers([p for p in casts if p.requires_grad])
        parts["autocast's copies of weights"] = copies
    return parts


def cast_weights(policy: Policy, launch: Launch) -> list[nn.Parameter]:
    """The float32 parameters that bfloat16 autocast casts: all matrices but embeddings."""
    products, embeddings = set(), set()
    for module in policy.modules():
        if isinstance(module, nn.Linear | PatchProduct):
            products.add(id(module.weight))
        elif isinstance(module, nn.Embedding):
            embeddings.add(id(module.weight))
    found = []
    for p in policy.parameters():
        product = id(p) in products or (p.ndim > 1 and id(p) not in embeddings)
        if launch.bfloat16 and product and p.dtype == torch.float32:
            found.append(p)
    return found


def fsdp_units(policy: Policy, c: int) -> dict[str, int]:
    """What FSDP2 gathers, in the computation's c bytes: all parameters while a device samples and
    attacks, in the update the root (all but the language model's layers) and two layers. Gradients
    are float32 where they are reduced.
    """
    layers = [list(layer.parameters()) for layer in policy.language_layers()]
    inside = {id(p) for layer in layers for p in layer}
    root = [p for p in policy.parameters() if id(p) not in inside]
    largest, trained = max(layers, key=numbers), [p for p in root if p.requires_grad]
    of_layer = numbers([p for p in largest if p.requires_grad])
    return {
        "attack, sampling: whole parameters": c * numbers(list(policy.parameters())),
        "update: root, parameters and gradients": c * (numbers(root) + numbers(trained)),
        "update: two layers, the same": 2 * c * numbers(largest) + (c + 8) * of_layer,
        "reduction: gradients of the root": (c + 4) * numbers(trained),
    }


def zero_weights(config: Any, policy: Policy, launch: Launch) -> dict[str, int]:
    """DeepSpeed's, of stage 1 or 2: AdamW steps on float32 copies of the parameters, sharded."""
    every = list(policy.parameters())
    trained = numbers([p for p in every if p.requires_grad])
    c, n = number_bytes(config, launch), launch.processes
    copy_too = 4 if c == 2 else 0
    parts = {"parameters": c * numbers(every)}
    parts["gradients"] = c * trained // (n if launch.way == "ZeRO-2" else 1)
    parts["AdamW's state"] = (8 + copy_too) * trained // n
    if config.saei.kl_coef:
        parts["reference"] = c * numbers(every)
    parts["update: DeepSpeed's bucket"] = c * min(ZERO_BUCKET, trained)
    parts["reduction: float32 gradients"] = (c + 4) * trained // n
    return parts


# ----------------------------------------------------------------------------------------- in all


def estimate(
    config: Any, policy: Policy, work: Work, launch: Launch | None = None
) -> dict[str, int]:
    """Bytes by part on one device. A part named "phase: ..." is there in that phase alone.

    launch: None: what the environment says. What an engine takes is not among them.
    """
    launch = read_launch() if launch is None else launch
    cfg, memory, c = config.saei, config.memory, number_bytes(config, launch)
    parts, half, to_pixels = weights(config, policy, launch), c == 2, cfg.intervention == "egas"
    work = work._replace(T=work.T or cfg.max_new_tokens)
    phases = {"update": cfg.rollouts, "attack": cfg.clean_rollouts}
    if work.one_pass:
        kept = prompts_kept(config, policy, work, work.prompts, half, True, to_pixels)
        parts["one pass over the prompts, kept"] = c * kept
        if to_pixels and not memory.micro_responses:  # the first gradient's pass serves the update
            N = work.prompts * cfg.clean_rollouts
            kept = responses_kept(config, policy, work, N, half, True)
            parts["the clean responses' pass, kept"] = c * kept
            phases["update"] -= cfg.clean_rollouts
    for phase, n in phases.items():
        attack = phase == "attack"
        if attack and (not to_pixels or (work.one_pass and cfg.pgd_steps == 1)):
            continue
        N = at_a_time(work.micro * n, memory.micro_responses)
        if work.one_pass and not attack:
            kept = responses_kept(config, policy, work, N, half, True)
        else:
            kept = activations(config, policy, work, N, attack, half)
        parts[f"{phase}: activations"] = c * kept
        if memory.gradient_checkpointing:
            parts[f"{phase}: recomputation"] = c * recomputation(config, policy, work, N, half)
    language, _ = layers_of(policy)
    vocabulary = len(policy.banned)
    tokens = at_a_time(work.micro * cfg.rollouts, memory.micro_responses) * work.T
    chunk = min(max(1, LOGITS_PER_CHUNK // vocabulary), tokens)
    parts["update, attack: a chunk of logits"] = int(LOGITS_COPIES * 4 * chunk * vocabulary)
    if config.engine.is_used:
        return parts
    sampled = at_a_time(work.prompts, memory.sample_prompts)
    rows = sampled * max(cfg.clean_rollouts, cfg.adversarial_rollouts)
    parts["sampling: keys and values"] = c * language.cache(
        rows, round_up(work.L + work.T, BLOCK_TOKENS)
    )
    parts["sampling: logits"] = 24 * rows * vocabulary  # float32, float64 and cumulative sums
    return parts


def at_a_time(total: int, limit: int) -> int:
    """limit 0: all."""
    return min(total, limit or total)


def peak(parts: dict[str, int]) -> int:
    """What always stays, and the largest of the phases."""
    phases, stays = Counter(), 0
    for name, size in parts.items():
        of, colon, _ = name.partition(":")
        if not colon:
            stays += size
            continue
        for phase in of.split(", "):
            phases[phase] += size
    return stays + max(phases.values(), default=0)
