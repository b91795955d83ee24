"""--dry_run: what a run would do and what memory it would take, from the model's config alone.

Parameters, gradients and AdamW's state are counted on the model, built on the meta device. The rest
is an estimate (tests/test_plan.py says how near). It is for one process of WORLD_SIZE.

Symbols: P prompts at a time, L prompt tokens, N responses at a time, T response tokens.
"""

import copy
import math
import os
import re
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from runtime import args, distributed, rollouts
from vlm.decode import BLOCK_TOKENS, round_up
from vlm.policy import LOGITS_PER_CHUNK, Policy

MEASURED_ROWS = 64  # rows whose prompts are measured
GIB = 2**30


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


class Work(NamedTuple):
    """What one device computes at a time."""

    prompts: int  # its share of a step
    micro: int  # prompts of a micro-batch
    L: int  # tokens of the longest prompt
    patches: int  # of one prompt's images
    processes: int = 1


def activations(config: Any, policy: Policy, work: Work, responses: int, attack: bool) -> int:
    """Numbers kept for the backward of a micro-batch's prompts and of `responses` at a time.

    attack: the gradient goes to the pixels and no parameter has one. Else it goes to the
    parameters, and a tower that is not trained keeps nothing.
    """
    language, vision = layers_of(policy)
    trained = any(p.requires_grad for p in language.layers[0].parameters()) and not attack
    tower = any(p.requires_grad for x in vision.layers for p in x.parameters()) and not attack
    if config.model.attention != "flash_attention_2":  # keys and values are repeated for the heads
        language = language._replace(key_width=language.query_width)
    recomputed, half = config.memory.gradient_checkpointing, number_bytes(config) == 2
    P, L, T = work.micro, work.L, config.saei.max_new_tokens
    total = language.kept(P * L, P * L, trained, recomputed, half)
    total += language.kept(responses * T, responses * (L + T), trained, recomputed, half)
    total += embeddings_kept(policy, P * L + responses * T, attack)
    if not hasattr(policy.model.config.vision_config, "patch_size") and policy.family.tower:
        return total + convolutions_kept(policy, P * work.patches, attack)
    if attack or tower:
        total += vision.kept(P * work.patches, P * work.patches, tower, recomputed, half)
    if tower:  # the input of the patch embedding
        total += P * work.patches * numbers_per_patch(policy)
    return total


def embeddings_kept(policy: Policy, tokens: int, attack: bool) -> int:
    """Gemma 3n computes, for each token, the embedding of an image token too, and its norm."""
    embedder = getattr(policy.model.model, "embed_vision", None)
    table = getattr(embedder, "embedding", None)
    if table is None or attack or not table.weight.requires_grad:
        return 0
    return 3 * tokens * table.embedding_dim


def convolutions_kept(policy: Policy, images: int, attack: bool) -> int:
    """Numbers that a tower of convolutions keeps of so many images.

    Counted, not estimated: on the meta device autograd keeps tensors, and nothing is computed.
    """
    if not images:
        return 0
    tower = copy.deepcopy(policy.model.model.get_submodule(policy.family.tower)).float().to("meta")
    if attack:
        tower.requires_grad_(False)
    given, kept = {x.untyped_storage()._cdata for x in tower.parameters()}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return x

    x = torch.empty(images, *image_shape(policy), device="meta", requires_grad=attack)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _ = tower(pixel_values=x, do_pooling=False)  # its graph lives until all is counted
    return sum(storage.nbytes() for storage in kept.values()) // x.element_size()


def image_shape(policy: Policy) -> tuple[int, int, int]:
    """Of the one size that the image processor makes of every picture."""
    size = policy.processor.image_processor.size
    return 3, size["height"], size["width"]


def recomputation(config: Any, policy: Policy, work: Work, responses: int) -> int:
    """Numbers that recomputing adds: the cache, its copies, one layer's activations."""
    language, _ = layers_of(policy)
    P, L, T, half = work.micro, work.L, config.saei.max_new_tokens, number_bytes(config) == 2
    cache = language.cache(P + responses, L)
    wide = language._replace(key_width=language.query_width)
    tokens, keys = max(P * L, responses * T), responses * (L + T)
    return cache + 4 * tokens * wide.width + wide.largest(tokens, keys, half)


def number_bytes(config: Any) -> int:
    """Bytes of a number in the computation."""
    autocast = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    return 2 if autocast or config.model.dtype == "bfloat16" else 4


def parameter_bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def estimate(config: Any, policy: Policy, work: Work) -> dict[str, int]:
    """Bytes by part on one device. A part named "phase: ..." is there in that phase alone."""
    cfg, memory, c = config.saei, config.memory, number_bytes(config)
    parameters = list(policy.parameters())
    trained = parameter_bytes([p for p in parameters if p.requires_grad])
    parts = {"parameters": parameter_bytes(parameters), "gradients": trained}
    parts["AdamW's state"] = 2 * trained
    if cfg.kl_coef:
        parts["reference"] = parameter_bytes(parameters)
    if work.processes > 1:
        parts["DDP's buckets"] = trained
    if c == 2 and config.model.dtype == "float32":
        matrices = sum(p.numel() for p in parameters if p.ndim == 2)
        parts["autocast's copies of weights"] = 2 * matrices
    for phase, n in (("update", cfg.rollouts), ("attack", cfg.clean_rollouts)):
        if phase == "update" or cfg.intervention == "egas":
            N = at_a_time(work.micro * n, memory.micro_responses)
            kept = activations(config, policy, work, N, attack=phase == "attack")
            parts[f"{phase}: activations"] = c * kept
            if memory.gradient_checkpointing:
                parts[f"{phase}: recomputation"] = c * recomputation(config, policy, work, N)
    language, _ = layers_of(policy)
    vocabulary, T = len(policy.banned), cfg.max_new_tokens
    tokens = at_a_time(work.micro * cfg.rollouts, memory.micro_responses) * T
    chunk = min(max(1, LOGITS_PER_CHUNK // vocabulary), tokens)
    parts["update, attack: a chunk of logits"] = 6 * 4 * chunk * vocabulary
    sampled = at_a_time(work.prompts, memory.sample_prompts)
    sampled *= max(cfg.clean_rollouts, cfg.adversarial_rollouts)
    cache = language.cache(sampled, round_up(work.L + T, BLOCK_TOKENS))
    parts["sampling: keys and values"] = c * cache
    parts["sampling: logits"] = 24 * sampled * vocabulary  # float32, float64 and cumulative sums
    return parts


def at_a_time(total: int, limit: int) -> int:
    """limit 0: all."""
    return min(total, limit or total)


def peak(parts: dict[str, int]) -> int:
    """What always stays, and the largest phase of attack, update and sampling."""
    phases, stays = {"update": 0, "attack": 0, "sampling": 0}, 0
    for name, size in parts.items():
        of, colon, _ = name.partition(":")
        if not colon:
            stays += size
            continue
        for phase in of.split(", "):
            phases[phase] += size
    return stays + max(phases.values())


def print_plan(config: Any) -> None:
    """Print the plan of one process of WORLD_SIZE, by the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(describe(config, int(os.environ.get("WORLD_SIZE", 1))))


def describe(config: Any, processes: int = 1) -> str:
    """The plan as text. It reads the data as training would, and refuses what that refuses."""
    cfg, memory, run = config.saei, config.memory, config.run
    micro, _ = distributed.micro_batch_size(
        cfg.prompts_per_step, cfg.updates_per_step, memory.micro_prompts, processes
    )
    model = config.model
    if model.attention == "flash_attention_2":  # it may not be installed where the plan is made
        model = args.ModelArgs(**(vars(model) | {"attention": "sdpa"}))
    policy = model.load(weights=False)
    memory.apply(policy, run.seed)
    rows = config.data.load(
        config.data.split,
        seed=run.seed,
        prompt_tokens=policy.prompt_tokens,
        max_prompt_tokens=config.data.max_prompt_tokens,
    )
    streaming = config.data.streaming
    count = MEASURED_ROWS if streaming else min(MEASURED_ROWS, len(rows))
    rollouts.load_rewards(cfg.reward, cfg.max_new_tokens, rows[0])
    measured = measure([rows[i] for i in range(count)], policy)
    work = Work(cfg.prompts_per_step // processes, micro, measured.L, measured.patches, processes)
    parts = estimate(config, policy, work)
    parameters = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    responses = at_a_time(micro * cfg.rollouts, memory.micro_responses)
    sampled = at_a_time(work.prompts, memory.sample_prompts)
    checkpoint = parts["parameters"] + parts["AdamW's state"]
    epochs = "unknown" if streaming else f"{run.steps * cfg.prompts_per_step / len(rows):.2f}"
    kind = policy.model.config.model_type
    sizes = ", ".join(measured.sizes[:3]) + (" ..." if len(measured.sizes) > 3 else "")
    seen = f"(first {count} rows)"
    lines = {
        "model": f"{kind}, {parameters:,} parameters, {trained:,} trained",
        "images": f"{sizes or 'none'} {seen}",
        "image tokens": f"at most {measured.image_tokens} per prompt {seen}",
        "prompts": f"at most {work.L} tokens {seen}, limit {config.data.max_prompt_tokens}",
        "data": "streamed" if streaming else f"{len(rows):,} rows",
        "steps": f"{run.steps}, epochs {epochs}, updates {run.steps * cfg.updates_per_step}",
        "checkpoints": disk(checkpoint, run),
        "per step": f"{cfg.prompts_per_step} prompts x {cfg.rollouts} responses, "
        f"{cfg.adversarial_rollouts} of {cfg.rollouts} adversarial",
        "per device": f"one of {processes}: {work.prompts} prompts; samples {sampled} at a time, "
        f"updates {micro} prompts and {responses} responses at a time",
    }
    text = "".join(f"{name + ':':14}{value}\n" for name, value in lines.items())
    text += "\nMemory of a device in GiB. The first three are counted, the rest is estimated, for\n"
    text += f"the longest prompt above and responses of {cfg.max_new_tokens} tokens. The waste of\n"
    text += "the allocator and CUDA itself come on top.\n"
    for name, size in parts.items():
        text += f"  {name:38}{size / GIB:9.2f}\n"
    text += f"  {'in all, with the largest phase':38}{peak(parts) / GIB:9.2f}\n"
    if processes > 1:
        state = sum(parts[name] for name in ("parameters", "gradients", "AdamW's state"))
        shard, whole = state / processes, number_bytes(config) * parameters
        rest = peak(parts) - state - parts["DDP's buckets"]
        rest -= parts.get("autocast's copies of weights", 0)
        text += f"  {'FSDP2: the first three, sharded':38}{shard / GIB:9.2f}\n"
        text += f"  {'FSDP2: whole parameters, in sampling':38}{whole / GIB:9.2f}\n"
        text += f"  {'FSDP2: in all':38}{(shard + whole + rest) / GIB:9.2f}\n"
    text += "\nSettings that differ from the defaults:\n"
    text += yaml.safe_dump(args.changed(config), sort_keys=False)
    return text + "\ndry run: nothing was trained or written"


def disk(size: int, run: args.RunArgs) -> str:
    """What checkpoints of `size` bytes take. A new one is whole before an old one goes."""
    written = -(-run.steps // run.save_every)
    kept = min(written, run.keep_last or written)
    most = min(written, kept + 1)
    text = f"{size / 1e9:.2f} GB each, {written} written, {'all' if kept == written else kept} kept"
    return f"{text}: at most {most * size / 1e9:.2f} GB on the disk"


class Measured(NamedTuple):
    """Of some rows: the longest prompt, its images."""

    L: int
    image_tokens: int
    patches: int
    sizes: list[str]


def measure(rows: list[dict], policy: Policy) -> Measured:
    """The largest prompts of the rows, and the sizes of their images."""
    L = image_tokens = patches = 0
    sizes = set()
    for row in rows:
        prompt = policy.tokenize(row["problem"], row["images"])
        is_image = prompt.inputs["input_ids"] == policy.model.config.image_token_id
        L, image_tokens = max(L, prompt.length), max(image_tokens, int(is_image.sum()))
        patches = max(patches, patches_of(policy, prompt.images))
        sizes |= {f"{x.shape[2]} x {x.shape[1]}" for x in prompt.images}
    return Measured(L, image_tokens, patches, sorted(sizes))


def patches_of(policy: Policy, images: list[torch.Tensor]) -> int:
    """Patches that the vision tower computes of one prompt's images."""
    if not images:
        return 0
    return policy.to_pixel_values(images)["pixel_values"].numel() // numbers_per_patch(policy)


def numbers_per_patch(policy: Policy) -> int:
    """Numbers of one patch of pixel_values, channels and temporal slots included.

    A tower of convolutions has no patches: there it is the whole image.
    """
    vision = policy.model.config.vision_config
    if not hasattr(vision, "patch_size"):
        return math.prod(image_shape(policy))
    size = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    return 3 * size * size * getattr(vision, "temporal_patch_size", 1)
