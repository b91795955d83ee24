"""The rollouts of a step: responses, rewards, metrics, and what the update trains on.

Symbols: P prompts of this process, G responses per prompt (the clean ones first), T tokens
(padded).
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor, nn

import egas
import grpo
import rewards
import tsec
from vlm.cache import ReadPrompts
from vlm.policy import Policy, Prompts, Responses, right_padded

ATTACKED_EVERY = 10  # steps between two measurements of entropy/attacked


@dataclass
class Rollouts:
    """What sampling, attack and grading made of P prompts."""

    rows: list[dict]
    prompts: Prompts
    attacked: Prompts  # the same questions about the changed images
    responses: list[Responses]  # P * G_clean on the clean images, P * G_adv on the attacked ones
    tsec_mask: Tensor  # the tokens of `clean` that TsEC chose
    texts: list[list[str]]  # (P, G)
    scores: dict[str, Tensor]  # reward, accuracy, format, ...: (P, G)
    advantages: Tensor  # (P, G)

    @property
    def clean(self) -> Responses:
        return self.responses[0]

    @property
    def adversarial(self) -> Responses | None:
        return self.responses[1] if len(self.responses) > 1 else None


def collect(
    prompts: Prompts, parts: list[tuple], pad_id: int
) -> tuple[list[Responses], Tensor, Prompts]:
    """Wait for the adversarial responses, and join what was made of some prompts after others.

    parts: (clean responses, TsEC's mask, attacked prompts, wait or None), in the prompts' order.
    -> responses (clean, and adversarial if there are any), TsEC's mask, the attacked prompts
    """
    clean, masks, attacked, waits = zip(*parts, strict=True)
    responses = [Responses.concatenate(list(clean), pad_id)]
    if waits[0] is not None:
        responses.append(Responses.concatenate([wait() for wait in waits], pad_id))
    T = responses[0].tokens.shape[1]
    tsec_mask = torch.cat([right_padded(mask, T, False) for mask in masks])
    images = [x for part in attacked for x in part.images]
    return responses, tsec_mask, prompts.with_images(images)


def by_prompt(x: Tensor, prompts: int) -> Tensor:
    """(P * n, ...) -> (P, n, ...)"""
    return x.unflatten(0, (prompts, -1))


def micro_batches(stop: int, size: int, start: int = 0) -> list[slice]:
    """The prompts from start to stop in slices of `size`, the last one shorter if it must be."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def load_rewards(specs: list[str], max_new_tokens: int, row: dict) -> rewards.Rewards:
    """rewards.load_rewards, each function called once on `row`, so that a broken one fails here.

    The metrics need the accuracy: where no spec names it, its weight is 0. Raises ValueError for a
    function that cannot be called with these arguments.
    """
    functions = rewards.load_rewards(specs, max_new_tokens)
    functions.setdefault("accuracy", (rewards.accuracy_reward, 0.0))
    columns = reward_columns([row], 1) | {"completion_ids": [[0]], "truncated": [False]}
    text = "<think>a synthetic call</think> \\boxed{0}"
    for name, (function, _) in functions.items():
        try:
            signature(function).bind(completions=[text], **columns)
        except TypeError as error:
            raise ValueError(
                f"the reward {name!r} cannot be called: {error}. It is called with keywords: "
                f"completions, {', '.join(columns):.200}. Name what it needs of these, and add **_ "
                "for the others"
            ) from error
    rewards.total_reward([text], rewards=functions, **columns)
    return functions


def reward_columns(rows: list[dict], n: int) -> dict[str, list]:
    """What a reward function reads of the rows, each value n times, for n responses per row.

    As in TRL: prompts, and the data's columns by their own names. Then problem, answer, choices and
    the others that every row has. Of two of one name, the latter is given.
    """
    columns = {}
    for name in rows[0].get("columns") or {}:
        columns[name] = [row["columns"].get(name) for row in rows for _ in range(n)]
    for name in rows[0]:
        if name not in ("images", "columns"):
            columns[name] = [row[name] for row in rows for _ in range(n)]
    return columns | {"prompts": columns["problem"]}


def grade(
    functions: rewards.Rewards, policy: Policy, rows: list[dict], responses: list[Responses]
) -> tuple[list[list[str]], dict[str, Tensor]]:
    """The responses' texts and {"reward", "accuracy", ...}, all (P, G), the clean ones first.

    A reward function gets TRL's arguments, all by keyword: completions (texts), prompts,
    completion_ids, the rows' columns. Also truncated: which completions have no end token.
    """
    texts, ids, truncated = [[] for _ in rows], [[] for _ in rows], [[] for _ in rows]
    for part in responses:
        per_prompt = len(part.tokens) // len(rows)
        cut = part.truncated(policy.eos_ids).tolist()
        for i, text in enumerate(policy.decode(part)):
            texts[i // per_prompt].append(text)
            ids[i // per_prompt].append(part.tokens[i][part.mask[i]].tolist())
            truncated[i // per_prompt].append(cut[i])
    columns = reward_columns(rows, len(texts[0]))
    columns |= {"completion_ids": sum(ids, []), "truncated": sum(truncated, [])}
    found = rewards.total_reward(sum(texts, []), rewards=functions, **columns)
    scores = {}
    for name, values in found.items():
        scores[name] = by_prompt(torch.tensor(values, device=policy.device), len(rows))
    return texts, scores


# ------------------------------------------------------------------------------- what is measured


@torch.no_grad()
def metrics(
    rollouts: Rollouts,
    policy: Policy,
    cuts: tuple[float, float],
    objective_of: Callable[[slice], Callable],
    micro: int,
    step: int,
) -> dict[str, float]:
    """Means over this process's prompts. docs/metrics.md defines each name.

    cuts: TsEC's quantiles. objective_of(part): the attack's, a function of the images of
    prompts[part]. It costs a forward, so entropy/attacked is measured in every 10th step alone.
    """
    clean, scores, parts = rollouts.clean, rollouts.scores, rollouts.responses
    distinct = [len(set(group)) / len(group) for group in rollouts.texts]
    values = scores | {
        "zero_variance": grpo.equal_groups(scores["accuracy"]),
        "entropy/clean": tsec.selective_entropy(clean.entropy, clean.mask),
        "entropy/selected": tsec.selective_entropy(clean.entropy, rollouts.tsec_mask),
        "tsec/kept": rollouts.tsec_mask.sum(dim=1) / clean.mask.sum(dim=1),
        "tsec/low": tsec.entropy_quantile(clean.entropy, clean.mask, cuts[0]),
        "tsec/high": tsec.entropy_quantile(clean.entropy, clean.mask, cuts[1]),
        "distinct": torch.tensor(distinct),
        "length": torch.cat([part.mask.sum(dim=1) for part in parts]),
        "truncated": torch.cat([part.truncated(policy.eos_ids) for part in parts]),
    }
    if rollouts.adversarial is not None:
        values |= adversarial_metrics(rollouts)
    if rollouts.adversarial is not None and step % ATTACKED_EVERY == 0:
        reached = []
        for part in micro_batches(len(rollouts.prompts), micro):
            reached.append(objective_of(part)(rollouts.attacked[part].images))
        values["entropy/attacked"] = torch.cat(reached)
    return {name: value.float().mean().item() for name, value in values.items()}


def adversarial_metrics(rollouts: Rollouts) -> dict[str, Tensor]:
    """Metrics of responses sampled on changed images. A value per prompt or response.

    A prompt of text alone counts as a change of 0 and a PSNR of 99, so that means over processes
    agree.
    """
    P, n = len(rollouts.prompts), len(rollouts.clean.tokens) // len(rollouts.prompts)
    largest_changes, psnrs = [], []
    for i in range(P):
        largest, psnr = 0.0, 99.0
        pairs = zip(
            rollouts.attacked[i : i + 1].images, rollouts.prompts[i : i + 1].images, strict=True
        )
        for attacked, clean in pairs:
            largest = max(largest, (attacked - clean).abs().max().item())
            psnr = min(psnr, egas.psnr(attacked, clean))
        largest_changes.append(largest)
        psnrs.append(psnr)
    adversarial = rollouts.adversarial
    values = {
        "entropy/adversarial": tsec.selective_entropy(adversarial.entropy, adversarial.mask),
        "attack/linf": torch.tensor(largest_changes),
        "attack/psnr": torch.tensor(psnrs),
    }
    for name in ("reward", "accuracy"):
        values[f"{name}/clean"] = rollouts.scores[name][:, :n]
        values[f"{name}/adversarial"] = rollouts.scores[name][:, n:]
    clean_right = values["accuracy/clean"].any(dim=1)  # (P,)
    adversarial_right = values["accuracy/adversarial"].any(dim=1)
    values["rescued"] = adversarial_right & ~clean_right
    values["lost"] = clean_right & ~adversarial_right
    return values


def sample_lines(rollouts: Rollouts, policy: Policy) -> tuple[list[dict], dict[str, list[Tensor]]]:
    """The first prompt's responses with tokens, entropies and TsEC's choice; its images."""
    row, lines, texts = rollouts.rows[0], [], rollouts.texts[0]
    for kind, part in zip(("clean", "adversarial"), rollouts.responses, strict=False):
        for i in range(len(part.tokens) // len(rollouts.rows)):
            mask, g = part.mask[i], len(lines)
            tokens = part.tokens[i][mask].tolist()
            line = {"prompt": 0, "row": row["row"], "image": kind, "response": texts[g]}
            line |= {"problem": row["problem"], "answer": row["answer"]}
            for name, values in (rollouts.scores | {"advantage": rollouts.advantages}).items():
                line[name] = values[0, g].item()
            line["prefilled"] = policy.prefilled  # of the response; the tokens come after it
            line["truncated"] = tokens[-1] not in policy.eos_ids
            line["entropy"] = [round(entropy, 4) for entropy in part.entropy[i][mask].tolist()]
            line["tokens"] = [policy.processor.tokenizer.decode([token]) for token in tokens]
            line["kept"] = rollouts.tsec_mask[i][mask].tolist() if kind == "clean" else None
            lines.append(line)
    pictures = {}
    if rollouts.prompts.counts[0]:
        pictures["clean"] = rollouts.prompts[:1].images
        if rollouts.adversarial is not None:
            pictures["adversarial"] = rollouts.attacked[:1].images
    return lines, pictures


# ---------------------------------------------------------------------- what the update trains on


class TrainingBatch(NamedTuple):
    """Responses that are updated on the same prompts and images."""

    prompts: Prompts
    tokens: Tensor  # (P, n, T)
    mask: Tensor  # (P, n, T) bool: the tokens that the loss is normalised by
    loss_mask: Tensor  # (P, n, T) bool: the tokens whose policy gradient counts
    penalty_weights: Tensor  # (P, n, T) of |log pi - log pi_old|
    advantages: Tensor  # (P, n)
    entropy_coef: Tensor  # (P, n) of the entropy bonus
    sampler_logprobs: Tensor  # (P, n, T), of who sampled, on the image of the sampling

    def take(self, prompts: slice) -> "TrainingBatch":
        """The part of some prompts."""
        return TrainingBatch(*[field[prompts] for field in self])

    def of_responses(self, which: slice, width: int) -> "TrainingBatch":
        """Some responses of every prompt, cut to `width` tokens."""
        parts = [x[:, which, :width] if x.ndim == 3 else x[:, which] for x in self[1:]]
        return TrainingBatch(self.prompts, *parts)

    def score(
        self, policy: nn.Module, temperature: float, read: ReadPrompts | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of all responses.   -> (P * n, T) each"""
        tokens, mask = self.tokens.flatten(0, 1), self.mask.flatten(0, 1)
        return policy(self.prompts, tokens, mask, temperature, read)


def joined(rollouts: Rollouts, name: str) -> Tensor:
    """A field of all responses, the clean ones first, padded with 0.   -> (P, G, T)"""
    parts = [getattr(responses, name) for responses in rollouts.responses]
    longest = max(x.shape[1] for x in parts)
    padded = []
    for x in parts:
        x = nn.functional.pad(x, (0, longest - x.shape[1]))
        padded.append(by_prompt(x, len(rollouts.prompts)))
    return torch.cat(padded, dim=1)


def all_responses(rollouts: Rollouts, zero_variance: str) -> TrainingBatch:
    """All G responses on the clean image. zero_variance "drop": no groups of equal accuracy."""
    mask = joined(rollouts, "mask")
    if zero_variance == "drop":
        mask = mask & ~grpo.equal_groups(rollouts.scores["accuracy"])[:, None, None]
    return TrainingBatch(
        rollouts.prompts,
        joined(rollouts, "tokens"),
        mask,
        loss_mask=mask,
        penalty_weights=torch.zeros(mask.shape, device=mask.device),
        advantages=rollouts.advantages,
        entropy_coef=torch.zeros_like(rollouts.advantages),
        sampler_logprobs=joined(rollouts, "logprobs"),
    )


def by_condition(batch: TrainingBatch, rollouts: Rollouts, condition: str) -> list[TrainingBatch]:
    """clean: all responses on the clean image. sampled: each on the image it was sampled on."""
    if condition == "clean" or rollouts.adversarial is None:
        return [batch]
    clean, adversarial = rollouts.clean, rollouts.adversarial
    n = len(clean.tokens) // len(rollouts.prompts)
    on_clean = batch.of_responses(slice(None, n), clean.tokens.shape[1])
    on_attacked = batch.of_responses(slice(n, None), adversarial.tokens.shape[1])
    return [on_clean, on_attacked._replace(prompts=rollouts.attacked)]


class Passes:
    """What was computed with a graph on a step's clean prompts, for attack and update together.

    reads: the passes over the prompts. scores: the clean responses' log-probs and entropies,
    (P * n, T) each. Both by the first prompt of a micro-batch. The update computes what is missing.
    """

    def __init__(self):
        self.reads: dict[int, ReadPrompts] = {}
        self.scores: dict[int, tuple[Tensor, Tensor]] = {}

    def read(
        self, policy: Policy, prompts: Prompts, part: slice, micro: int, to_pixels: bool
    ) -> None:
        """Read the prompts of `part`, `micro` at a time."""
        for some in micro_batches(part.stop, micro, part.start):
            self.reads[some.start] = policy.read(prompts[some], to_pixels)

    def values(self, part: slice) -> ReadPrompts | None:
        """The pass over the prompts of `part` without its graph, to sample from."""
        reads = [read for i, read in self.reads.items() if part.start <= i < part.stop]
        return ReadPrompts.join(reads) if reads else None

    def score(
        self, policy: nn.Module, batch: TrainingBatch, part: slice, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the responses to some prompts, the clean responses first."""
        batch, read = batch.take(part), self.reads.get(part.start)
        if part.start not in self.scores:
            return batch.score(policy, temperature, read)
        P, _, T = batch.tokens.shape
        clean = [by_prompt(right_padded(x, T), P) for x in self.scores[part.start]]
        n = clean[0].shape[1]
        if n == batch.tokens.shape[1]:
            return clean[0].flatten(0, 1), clean[1].flatten(0, 1)
        others = batch.of_responses(slice(n, None), T).score(policy, temperature, read)
        found = []
        for x, y in zip(clean, others, strict=True):
            found.append(torch.cat([x, by_prompt(y, P)], dim=1).flatten(0, 1))
        return found[0], found[1]

    def clear(self) -> None:
        self.reads.clear()
        self.scores.clear()


@torch.no_grad()
def fixed_logprobs(
    asked: list[tuple[str, nn.Module, list[TrainingBatch], slice, Passes]],
    temperature: float,
    micro: int,
) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Log-probs before the updates: {(micro-batch's first prompt, batch): {name: (P * n, T)}}

    asked: (name, policy, batches, which prompts, what was kept of this policy's passes)
    """
    found = defaultdict(dict)
    for name, policy, batches, prompts, passes in asked:
        for part in micro_batches(prompts.stop, micro, prompts.start):
            for k, batch in enumerate(batches):
                kept = passes if k == 0 else Passes()  # the clean images come first
                logprobs, _ = kept.score(policy, batch, part, temperature)
                found[part.start, k][name] = logprobs.detach()
    return found


def engine_weights(
    batch: TrainingBatch, old: Tensor, on_attacked: Tensor | None, cap: float, tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss's weights where an engine sampled, and the metrics of the ratio to the trainer.

    old: the trainer's log-probs in the update; on_attacked: those of the adversarial responses, the
    last of each prompt, where they were sampled on other images than `old` is of.
    -> (P * n, T), sums over tokens divided by `tokens`
    """
    P, n, T = batch.mask.shape
    trainer = by_prompt(old.detach(), P)
    if on_attacked is not None:
        on_attacked = by_prompt(right_padded(on_attacked, T), P)
        trainer = torch.cat([trainer[:, : n - on_attacked.shape[1]], on_attacked], dim=1)
    weights, ratio = grpo.importance_weights(trainer, batch.sampler_logprobs, batch.mask, cap)
    metrics = {
        "engine/ratio": ratio.masked_fill(~batch.mask, 0.0).sum() / tokens,
        "engine/cut": (ratio > cap).sum() / tokens,
        "engine/ratio_max": ratio.max(),
    }
    return weights.flatten(0, 1), metrics
