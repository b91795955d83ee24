"""Several processes: the Accelerator, the wrapped policy (DDP, FSDP2, ZeRO-2), whole parameters.

Launch with accelerate and a recipe of recipes/accelerate. docs/scaling.md says what was run where.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from packaging import version
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from runtime.args import MemoryArgs, RunArgs
from vlm.policy import Policy
from vlm.precision import cast_once

# Processes wait for one another while one samples longer, or writes a checkpoint, or finishes its
# rows of a split. By default they give up after 10 minutes.
LONG_WAIT = InitProcessGroupKwargs(timeout=timedelta(hours=6))


NO_FSDP_1 = "FSDP version 1 is not supported: set fsdp_version: 2, as recipes/accelerate/fsdp2.yaml"
NO_ZERO_3 = "ZeRO-3 is not supported: use recipes/accelerate/fsdp2.yaml"


def make_accelerator(args: RunArgs, max_grad_norm: float) -> Accelerator:
    """The Accelerator as the launcher's recipe says. Raises ValueError for what is not supported.

    max_grad_norm is for DeepSpeed, whose engine clips itself.
    """
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    accelerator = Accelerator(
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output,
        # Text alone reaches no vision parameter. LLaVA's towers have some that nothing reaches.
        # Its forward may run more often on one process than on another, so it must not communicate.
        kwargs_handlers=[
            LONG_WAIT,
            DistributedDataParallelKwargs(
                find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True
            ),
        ],
        # Sharded gradients are reduced after every micro-batch. Else each device holds them whole.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1, sync_each_batch=sharded
        ),
    )
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if accelerator.num_processes != started:  # torchrun without a GPU
        raise ValueError(
            f"the launcher started {started} processes, and accelerate would train each one alone: "
            "without a GPU set ACCELERATE_USE_CPU=true in the environment"
        )
    if args.report_to != "none" and not accelerator.log_with:  # accelerate drops it silently
        name = args.report_to
        raise ValueError(f"the tracker {name} is not installed: pip install {name}")
    if sharded and accelerator.distributed_type == DistributedType.MULTI_CPU:
        use_fsdp_on_cpus(accelerator)
    if accelerator.mixed_precision == "fp16":  # its loss scale grows until a gradient overflows
        raise ValueError("fp16 is not supported: use --mixed_precision bf16 or no")
    if sharded and accelerator.num_processes > 1 and not accelerator.is_fsdp2:
        raise ValueError(NO_FSDP_1)
    if accelerator.is_fsdp2:
        keep_float32_outputs(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        refuse_old_deepspeed()
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3:  # it gathers at every token, and would wait for ever
            raise ValueError(NO_ZERO_3)
        plugin.deepspeed_config["gradient_clipping"] = max_grad_norm
    return accelerator


def refuse_old_deepspeed() -> None:
    """Older versions round rotary frequencies to bfloat16, and with them all positions."""
    found = metadata.version("deepspeed")
    if version.parse(found) < version.parse("0.19.2"):
        raise ValueError(
            f"deepspeed {found} rounds buffers, positions among them, to bfloat16: "
            "pip install 'deepspeed>=0.19.2'"
        )


def use_fsdp_on_cpus(accelerator: Accelerator) -> None:
    """accelerate takes DDP on CPUs, whatever it is told."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        accelerator.state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState().distributed_type = DistributedType.FSDP


def keep_float32_outputs(accelerator: Accelerator) -> None:
    """accelerate's policy rounds pixels, log-probs, entropies and gradient sums to bfloat16."""
    # FSDP warns of views written to in place. Log-probs and entropy are views, and only read.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy,
            reduce_dtype=torch.float32,
            output_dtype=None,
            cast_forward_inputs=False,
        )


def prepare(
    accelerator: Accelerator,
    policy: Policy,
    lr: float,
    weight_decay: float,
    optimizer_state: dict[str, float],
    checkpoint: str | None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The policy as the launcher wraps it, and AdamW, with the checkpoint's state if there is one.

    optimizer_state: numbers that live in the optimiser's parameter group, saved and loaded with it.
    """
    if accelerator.native_amp and not accelerator.is_fsdp2:  # FSDP2 and DeepSpeed cast themselves
        policy.keep_frozen_in_bfloat16()
    trained = [p for p in policy.parameters() if p.requires_grad]
    if any(p.dtype == torch.bfloat16 for p in trained):
        warnings.warn(
            "bfloat16 parameters lose most updates of a small lr: use --dtype float32 with "
            "--mixed_precision bf16, or --lora_rank, whose adapters are float32",
            stacklevel=2,
        )
    optimizer = make_optimizer(trained, lr, weight_decay, accelerator.device)
    optimizer.param_groups[0] |= optimizer_state  # before loading: FSDP loads only keys that exist
    wrapped, optimizer = accelerator.prepare(policy, optimizer)
    if isinstance(wrapped, FSDPModule):  # a process with text alone has no gradient of the tower
        wrapped.set_reduce_scatter_unused_params(True)
    keep_weights_out_of_state(accelerator)
    if checkpoint is not None:
        accelerator.load_state(str(Path(checkpoint) / "state"))
        accelerator.step = 0  # micro-batches so far; another micro_prompts counts otherwise
    return wrapped, optimizer


def make_optimizer(
    trained: list[nn.Parameter], lr: float, weight_decay: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW, fused on a GPU: the default there holds a copy of the parameters while it steps.

    A checkpoint says which kernel wrote it. Which one reads it is this device's matter.
    """
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=fused)

    def as_on_this_device(optimizer: torch.optim.Optimizer, state: dict) -> dict:
        groups = [group | {"fused": fused} for group in state["param_groups"]]
        return state | {"param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(as_on_this_device)
    return optimizer


def keep_weights_out_of_state(accelerator: Accelerator) -> None:
    """save_pretrained writes the parameters, so save_state need not write them again.

    Under FSDP2 and ZeRO-2 accelerate writes and reads a second copy before it asks these hooks.
    """
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def micro_batch_size(
    prompts_per_step: int, updates_per_step: int, micro_prompts: int, processes: int
) -> tuple[int, int]:
    """-> prompts of a micro-batch, micro-batches of an optimiser step, both of one process."""
    per_update, rest = divmod(prompts_per_step, processes * updates_per_step)
    if rest:
        raise ValueError(
            f"prompts_per_step={prompts_per_step} must be a multiple of processes ({processes}) "
            f"times updates_per_step ({updates_per_step})"
        )
    micro = min(micro_prompts, per_update)
    if per_update % micro:
        raise ValueError(
            f"micro_prompts={micro_prompts} must divide {per_update}, the prompts per update"
        )
    return micro, per_update // micro


def one_prompt_pass(accelerator: Accelerator) -> bool:
    """May one pass over the prompts, kept with its graph, serve sampling, attack and update?

    Where a device updates all its prompts at once: smaller micro-batches say that memory is short.
    And where parameters are whole: FSDP2 and ZeRO-2 want their own passes.
    """
    whole = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    return accelerator.gradient_accumulation_steps == 1 and accelerator.distributed_type in whole


def refuse_text_alone(
    accelerator: Accelerator, memory: MemoryArgs, counts: list[int], micro: int, step: int
) -> None:
    """ZeRO-2 sums gradients in the order they come, so each micro-batch must reach all parameters.

    counts: images of each prompt. Raises ValueError for a micro-batch of text alone.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    if memory.freeze == "vision+projector" or memory.lora_rank:  # only images reach the rest
        return
    for start in range(0, len(counts), micro):
        if not any(counts[start : start + micro]):
            raise ValueError(
                f"step {step}: a micro-batch has no image, which ZeRO-2 cannot train: use "
                "recipes/accelerate/fsdp2.yaml, --freeze vision+projector, or more --micro_prompts"
            )


def warm_up(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> float:
    """Set the learning rate of a step, which grows to lr over the first steps.   -> it"""
    lr = lr * min(1.0, (step + 1) / max(1, steps))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def reduced(
    accelerator: Accelerator, found: list[dict[str, Tensor]], updates: int
) -> dict[str, float]:
    """Metrics of micro-batches, summed over these and the processes, divided by the updates.

    Of a name that ends in _max, the largest value.
    """
    values = {}
    for metrics in found:
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    sums, largest = {}, {}
    for name in sorted(values):
        stacked = torch.stack(values[name])
        if name.endswith("_max"):
            largest[name] = accelerator.gather(stacked.max()).max().item()
        else:
            sums[name] = stacked.sum() / updates
    means = accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist()
    return dict(zip(sums, means, strict=True)) | largest


def place_reference(accelerator: Accelerator, reference: Policy) -> None:
    """To this device and the computation's dtype. The reference is not trained and never saved.

    DeepSpeed computes in bfloat16 without autocast: all parameters are cast, as it casts the
    policy's. Rotary frequencies are buffers, and stay.
    """
    reference.to(accelerator.device)
    reference.requires_grad_(False)
    if accelerator.mixed_precision != "bf16":
        return
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        for p in reference.parameters():
            p.data = p.data.bfloat16()
    else:
        reference.keep_frozen_in_bfloat16()


@contextlib.contextmanager
def frozen(policy: Policy) -> Iterator[None]:
    """No parameter asks for a gradient inside, and autocast casts none of them."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        with cast_once(policy.model, policy.device.type):
            yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@contextlib.contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Under FSDP2, all parameters are whole inside, and nothing that runs inside communicates.

    So processes whose responses differ in number and length need not wait for one another: sampling
    and attack are those of one device. The price is one copy of the parameters in the computation's
    dtype.
    """
    units = [m for m in policy.modules() if isinstance(m, FSDPModule)]  # the root comes first

    def stay_whole(whole: bool) -> None:
        for unit in units:
            unit.set_requires_gradient_sync(not whole, recurse=False)
            unit.set_reshard_after_backward(not whole, recurse=False)
            if unit is not policy:  # the root stays whole until its backward is done
                unit.set_reshard_after_forward(not whole, recurse=False)

    stay_whole(True)
    if units:
        policy._get_fsdp_state()._lazy_init()  # else a layer takes itself for the root
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        stay_whole(False)
        for unit in units:
            unit.reshard()


def gather_rows(accelerator: Accelerator, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of all processes in the step's order. Process r of n has its rows r, r + n, ...

    {name: (P, ...)} -> {name: (n * P, ...)}; a third dimension is padded to the longest.
    """
    if accelerator.num_processes == 1:
        return tensors
    rows = len(next(iter(tensors.values())))
    padded = {}
    for name, x in tensors.items():
        padded[name] = accelerator.pad_across_processes(x, dim=2).to(x.dtype).contiguous()
    gathered_rows = {}
    for name, x in accelerator.gather(padded).items():
        by_process = x.unflatten(0, (-1, rows))  # (n, P, ...)
        gathered_rows[name] = by_process.transpose(0, 1).flatten(0, 1)
    return gathered_rows


def own_rows(accelerator: Accelerator, x: Tensor) -> Tensor:
    """This process's rows of what gather_rows gave.   (n * P, ...) -> (P, ...)"""
    return x[accelerator.process_index :: accelerator.num_processes]
