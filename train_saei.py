"""SaEI: GRPO training of a vision-language model with selective adversarial entropy intervention.

    accelerate launch train_saei.py --config recipes/demo.yaml
    accelerate launch train_saei.py --config recipes/demo.yaml --intervention none --output out/grpo

One step, for P prompts (image I, question Q, answer):
    1. sample G_clean responses per prompt from pi_old(. | I, Q)
    2. TsEC: choose their tokens of moderate entropy
    3. EgAS: PGD on I, upward on the entropy of the chosen tokens
    4. sample G_adv responses from pi_old(. | I_adv, Q)
    5. reward all; advantages within the group of one prompt
    6. GRPO update, conditioned on the clean image or on the one a response was sampled on

Every option is labelled with its source (see README.md). Rollouts, data order and random images
follow from (seed, step, row), so a run is the same on any number of processes and after any resume,
apart from rounding.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import egas
import grpo
import tsec
from extras import apply_control
from runtime import args, distributed, plan, rollouts
from runtime.args import option
from runtime.objective import EntropyObjective
from runtime.rollouts import Passes, Rollouts, TrainingBatch, micro_batches
from runtime.run import Clock, Run, load_reference, load_rows, runs_closed
from vlm.policy import Policy, Prompts

CLEAN, ATTACK, ADVERSARIAL = range(3)  # each part of a step has its own random numbers


@dataclass
class SaEIArgs(args.Options):
    _argument_group_name = "the algorithm"
    prompts_per_step: int = option(16, "ours", "P, over all processes", low=1)
    rollouts: int = option(8, "ours", "G responses per prompt, clean and adversarial", low=2)
    adversarial_rollouts: int = option(4, "ours", "G_adv, sampled on the changed image", low=0)
    max_new_tokens: int = option(64, "ours", "longest response", low=1)
    temperature: float = option(1.0, "ours", "of sampling, log-probs and entropy", above=0)
    intervention: Literal["none", "random", "noise", "egas"] = option(
        "egas", "paper", "none: plain GRPO; random: signs; noise: NoisyRollout's; egas: SaEI"
    )
    condition: Literal["clean", "sampled"] = option(
        "clean", "ours, by the study", "image that conditions the update of adversarial responses"
    )
    tsec_low: float = option(0.2, "ours", "TsEC's low quantile (a cut: inferred); 0: none", low=0)
    tsec_high: float = option(0.8, "ours", "TsEC's high quantile (inferred too); 1: none", high=1)
    tsec_keep: Literal["moderate", "extreme"] = option("moderate", "second-hand", "tokens chosen")
    eps: float = option(2 / 255, "ours, by the study", "L-inf radius, such as 2/255", low=0, high=1)
    pgd_steps: int = option(1, "ours", "PGD steps of min(2.5 * eps / pgd_steps, eps)", low=1)
    reward: list[str] = option(
        ["accuracy:0.9", "format:0.1"], "ours", "NAME:WEIGHT or file.py:function:WEIGHT, several"
    )
    advantage_scale: Literal["std", "none"] = option("std", "ours", "what divides A = r - mean")
    zero_variance: Literal["keep", "drop"] = option("keep", "ours", "equal-accuracy groups")
    clip_low: float = option(0.2, "ours", "ratios are clipped below 1 - clip_low", low=0, high=1)
    clip_high: float = option(0.28, "ours", "ratios are clipped above 1 + clip_high (DAPO)", low=0)
    kl_coef: float = option(0.0, "ours", "weight of k3 to the initial policy; 0: none", low=0)
    updates_per_step: int = option(1, "ours", "optimiser steps per batch of rollouts", low=1)
    lr: float = option(1e-6, "ours", "AdamW's learning rate", above=0)
    warmup_steps: int = option(0, "ours", "steps over which lr grows to its value", low=0)
    weight_decay: float = option(0.01, "ours", "AdamW's weight decay", low=0)
    max_grad_norm: float = option(1.0, "ours", "gradients are scaled down to this norm", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.intervention == "none":
            self.adversarial_rollouts = 0
        self.clean_rollouts = self.rollouts - self.adversarial_rollouts
        args.require(self.tsec_low < self.tsec_high, "tsec_low < tsec_high")
        args.require(self.clean_rollouts >= 1, "adversarial_rollouts < rollouts")
        has_both = self.adversarial_rollouts >= 1 or self.intervention == "none"
        args.require(has_both, "adversarial_rollouts >= 1 with an intervention")


class Config(NamedTuple):
    saei: SaEIArgs
    control: args.ControlArgs
    model: args.ModelArgs
    memory: args.MemoryArgs
    data: args.TrainDataArgs
    run: args.RunArgs
    engine: args.EngineArgs


def load_config(argv: list[str] = (), **options) -> Config:
    """The defaults, then the recipe of --config, then argv, then `options`. Raises ValueError."""
    config = args.parse(Config, argv, __doc__.split("\n")[0], **options)
    apply_control.check(config.control, config.saei.updates_per_step, config.saei.intervention)
    return config


@runs_closed()
def main(config: Config) -> None:
    """Train. Raises ValueError for options, data or a folder that cannot be used."""
    cfg, memory = config.saei, config.memory
    if config.run.dry_run:  # before the accelerator, so that no GPU is needed
        return plan.print_plan(config)
    accelerator = distributed.make_accelerator(config.run, cfg.max_grad_norm)
    micro, accelerator.gradient_accumulation_steps = distributed.micro_batch_size(
        cfg.prompts_per_step, cfg.updates_per_step, memory.micro_prompts, accelerator.num_processes
    )
    run = Run(config.run, args.flat(config), accelerator)
    batches = load_rows(config.data, run, config.model.load(weights=False), cfg.prompts_per_step)
    reward_functions = rollouts.load_rewards(cfg.reward, cfg.max_new_tokens, batches.rows[0])
    policy = config.model.load(None if memory.lora_rank else run.checkpoint)
    memory.apply(policy, config.run.seed, run.checkpoint)
    reference = load_reference(config.model, run) if cfg.kl_coef else None
    state = apply_control.initial_state(config.control)
    wrapped, optimizer = distributed.prepare(  # `wrapped` is what is differentiated
        accelerator, policy, cfg.lr, cfg.weight_decay, state, run.checkpoint
    )
    if config.run.self_check:
        with accelerator.autocast(), distributed.gathered(policy):
            differences = policy.self_check()
        accelerator.print(f"self-check: differences to transformers: {json.dumps(differences)}")
    sampler = config.engine.sampler(policy, config.model.model, accelerator.mixed_precision)

    for step in run.steps():
        batch = batches.of_step(step)
        prompts = policy.encode(batch.problems, batch.images, config.data.max_prompt_tokens)
        settings = (cfg.max_new_tokens, cfg.temperature, memory.sample_prompts)
        cuts, clock = (cfg.tsec_low, cfg.tsec_high), Clock(accelerator.device)
        noise_t = egas.annealed_time(step, config.run.steps)

        with accelerator.autocast(), distributed.gathered(policy):
            sampler.load_weights()  # an engine's, which the last update has changed
            parts, passes, rolled = sampler.parts(len(prompts), micro), Passes(), []
            n, seeds = cfg.clean_rollouts, batch.seeds(CLEAN)
            asked = [sampler.ask(prompts[part], n, seeds[part], *settings) for part in parts]
            for part, wait in zip(parts, asked, strict=True):  # an engine goes on with the others
                # One pass over the prompts serves sampling, attack and update, where that can be
                if distributed.one_prompt_pass(accelerator):
                    passes.read(policy, prompts, part, micro, cfg.intervention == "egas")
                clock.lap("read")

                # 1  y ~ pi_old(. | I, Q); entropies and log-probs are recorded while sampling
                clean = wait(partial(passes.values, part))
                clock.lap("sample")

                # 2  TsEC: tokens of moderate entropy
                chosen = tsec.select_tokens(clean.entropy, clean.mask, *cuts, which=cfg.tsec_keep)

                # 3  EgAS: the image that raises their entropy (or what the other arms do to it)
                tensors, seeds = (prompts[part], clean, chosen), batch.seeds(ATTACK)[part]
                objective_of = partial(EntropyObjective, policy, *tensors, cfg.temperature)
                rest = (passes, objective_of, micro, seeds, noise_t, part.start)
                attacked = intervene(cfg, policy, prompts[part], *rest)
                clock.lap("attack")

                # 4  y ~ pi_old(. | I_adv, Q)
                n, seeds, adversarial = cfg.adversarial_rollouts, batch.seeds(ADVERSARIAL), None
                if n:
                    adversarial = sampler.ask(attacked, n, seeds[part], *settings)
                rolled.append((clean, chosen, attacked, adversarial))
            responses, tsec_mask, attacked = rollouts.collect(prompts, rolled, policy.pad_id)
            sampler.check(prompts, responses[0], cfg.temperature)
            sampler.rest()
            clock.lap("sample")

        # 5  rewards of all G responses, advantages within a prompt's group: (P, G) each
        texts, scores = rollouts.grade(reward_functions, policy, batch.rows, responses)
        advantages = grpo.group_advantages(scores["reward"], scale=cfg.advantage_scale)
        sampled = Rollouts(
            batch.rows, prompts, attacked, responses, tsec_mask, texts, scores, advantages
        )
        tensors = (prompts, sampled.clean, tsec_mask)
        objective_of = partial(EntropyObjective, policy, *tensors, cfg.temperature)
        with accelerator.autocast(), distributed.gathered(policy):  # before the update: of pi_old
            metrics = rollouts.metrics(sampled, policy, cuts, objective_of, micro, step)
        clock.lap("measure")

        # 6  GRPO update, each response on the image that `condition` names
        losses = update(config, run, wrapped, reference, optimizer, sampled, passes, micro, step)
        clock.lap("update")

        run.log(step, metrics | clock.seconds(), losses)
        plan.compare(config, run, sampled, step)
        run.log_samples(step, sampled, policy)
        run.save_if_due(step, wrapped)
    run.finish()
    sampler.close()


# ------------------------------------------------------------------------------ steps in detail


def intervene(
    cfg: SaEIArgs,
    policy: Policy,
    prompts: Prompts,
    passes: Passes,
    objective_of: Callable[[slice], EntropyObjective],
    micro: int,
    seeds: list[int],
    noise_t: float,
    first: int = 0,
) -> Prompts:
    """Step 3: the prompts with the images that adversarial responses are sampled on.

    egas attacks `micro` prompts at a time, upward on objective_of(these), with frozen parameters.
    With a prompt pass in `passes` the first gradient goes through it. The clean responses' scores
    are kept there for the update, by the number of their first prompt in the step: here is `first`.
    random: signs of the same eps. noise: NoisyRollout's, at diffusion time noise_t.
    """
    images = []
    for part in micro_batches(len(prompts), micro if cfg.intervention == "egas" else 1):
        clean = prompts[part].images
        generator = torch.Generator().manual_seed(seeds[part][0])
        if cfg.intervention == "egas" and clean:  # else text alone: nothing to attack
            objective, grads = objective_of(part), None
            if read := passes.reads.get(first + part.start):
                passes.scores[first + part.start] = scores = objective.score(clean, read)
                value = objective.of(scores[1]).sum()
                grads = egas.image_gradients(value, read.images, retain_graph=True)
            with distributed.frozen(policy):
                pgd = partial(egas.pgd_ascent, eps=cfg.eps, steps=cfg.pgd_steps)
                images += pgd(objective, clean, first_grads=grads)
        elif cfg.intervention == "random":
            images += egas.random_signs(clean, cfg.eps, generator)
        elif cfg.intervention == "noise":
            images += egas.diffusion_noise(clean, noise_t, generator)
        else:
            images += clean
    return prompts.with_images(images)


def update(
    config: Config,
    run: Run,
    wrapped: nn.Module,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    sampled: Rollouts,
    passes: Passes,
    micro: int,
    step: int,
) -> dict[str, float]:
    """Step 6: updates_per_step optimiser steps, each normalised by all its response tokens.

    Log-probs that the updates compare with are computed before them: pi_old's of the prompts that
    are not in the first one, the reference's for the KL, and, where an engine sampled, pi_old's of
    the adversarial responses on their own images.
    passes: what was kept of the policy before the first optimiser step, which empties it.
    -> global metrics
    """
    cfg, control, accelerator = config.saei, config.control, run.accelerator
    P, counts = len(sampled.prompts), sampled.prompts.counts
    distributed.refuse_text_alone(accelerator, config.memory, counts, micro, step)
    lr = distributed.warm_up(optimizer, cfg.lr, step, cfg.warmup_steps)
    batch = rollouts.all_responses(sampled, cfg.zero_variance)
    if control.update_control != "none":
        batch = apply_control.treat(control, run, wrapped, optimizer, sampled, batch, micro, step)
    batches = rollouts.by_condition(batch, sampled, cfg.condition)
    first, *further = micro_batches(P, P // cfg.updates_per_step)  # one optimiser step each
    asked = [("old", wrapped, batches, chunk, passes) for chunk in further]
    if reference is not None:
        asked.append(("reference", reference, batches, slice(0, P), Passes()))
    if config.engine.is_used and cfg.condition == "clean" and sampled.adversarial is not None:
        _, attacked = rollouts.by_condition(batch, sampled, "sampled")
        asked.append(("on_attacked", wrapped, [attacked], slice(0, P), Passes()))
    with accelerator.autocast():  # as accelerate does for `wrapped`
        fixed = rollouts.fixed_logprobs(asked, cfg.temperature, micro)
    found, norms = [], []
    for chunk in (first, *further):
        tokens = sum(batch.mask[chunk].sum() for batch in batches)
        tokens = accelerator.reduce(tokens, "sum").clamp(min=1)  # the normaliser of all processes
        for part in micro_batches(chunk.stop, micro, chunk.start):
            with accelerator.accumulate(wrapped):
                losses = []
                for k, batch in enumerate(batches):
                    kept = passes if k == 0 else Passes()  # the clean images come first
                    scores = kept.score(wrapped, batch, part, cfg.temperature)
                    compared = fixed.get((part.start, k), {})
                    loss, metrics = batch_loss(config, batch.take(part), scores, compared, tokens)
                    losses.append(loss)
                    found.append(metrics)
                # DDP and accelerate divide by these two. `tokens` has done it already.
                scale = accelerator.num_processes * accelerator.gradient_accumulation_steps
                accelerator.backward(sum(losses) * scale)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(wrapped.parameters(), cfg.max_grad_norm)
                    norms.append(float(norm))
                    run.stop_unless_finite(norms[-1], sampled, step)
                optimizer.step()
                optimizer.zero_grad()
                passes.clear()
    means = distributed.reduced(accelerator, found, cfg.updates_per_step)
    return means | {"grad_norm": sum(norms) / len(norms), "lr": lr}


def batch_loss(
    config: Config,
    batch: TrainingBatch,
    scores: tuple[Tensor, Tensor],
    fixed: dict[str, Tensor],
    tokens: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's clipped policy loss, control term and KL, each divided by `tokens`.

    scores: log-probs and entropies, (P * n, T) each. fixed: what `update` computed before. Without
    "old", the old log-probs are the scored ones, detached: the ratio is 1.
    """
    cfg, control = config.saei, config.control.update_control
    logprobs, entropy = scores
    old = fixed.get("old", logprobs.detach())
    clip = (1.0, math.inf) if control in apply_control.UNCLIPPED else (cfg.clip_low, cfg.clip_high)
    advantages, loss_mask = batch.advantages.flatten(), batch.loss_mask.flatten(0, 1)
    weights, engine_metrics = None, {}
    if config.engine.is_used:
        compared = (old, fixed.get("on_attacked"), config.engine.engine_cap, tokens)
        weights, engine_metrics = rollouts.engine_weights(batch, *compared)
    loss, metrics = grpo.policy_loss(logprobs, old, advantages, loss_mask, *clip, tokens, weights)
    metrics |= engine_metrics
    if control != "none":
        metrics |= apply_control.terms(batch, logprobs, old, entropy, tokens)
        loss = loss + metrics["control/loss"]
    if "reference" in fixed:
        padding = ~batch.mask.flatten(0, 1)  # there k3(0, 0) = 0
        pair = [x.masked_fill(padding, 0.0) for x in (logprobs, fixed["reference"])]
        metrics["kl"] = grpo.kl_k3(*pair).sum() / tokens
        loss = loss + cfg.kl_coef * metrics["kl"]
    metrics["loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    args.command_line(load_config, main)
