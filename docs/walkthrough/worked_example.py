"""The numbers of docs/walkthrough/README.md: one step of SaEI, and variants of each part of it.

    python docs/walkthrough/worked_example.py            # prints the blocks of the page
    python docs/walkthrough/worked_example.py --write    # writes their numbers into the page

The worked example has P = 2 prompts and G = 4 responses, 2 clean and 2 adversarial. The tables of
variants have P = 16 and G = 8. Policy, rows and settings are those of recipes/demo.yaml, but with 3
PGD steps. Nothing is trained. A function `worked_N` returns the lines of a block of the page. A
function `variants_N` returns the bold numbers of a table, row by row. tests/test_walkthrough.py
compares the page.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import egas
import grpo
import train_saei
import tsec
from eval import pass_at_k
from runtime import rollouts
from runtime.distributed import frozen
from runtime.rollouts import Passes, Rollouts
from runtime.run import Batch
from vlm.policy import Policy, Prompts, Responses

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/walkthrough/README.md"
# Three PGD steps show more of PGD than the recipe's one.
CONFIG = train_saei.load_config(["--config", str(ROOT / "recipes/demo.yaml")], pgd_steps=3)
SAEI = CONFIG.saei
STEP_SIZE = min(2.5 * SAEI.eps / SAEI.pgd_steps, SAEI.eps)  # as egas.pgd_ascent chooses it
FURTHER = 4  # random numbers for more clean responses
Objective = Callable[[list[Tensor]], Tensor]


class Step(Rollouts):
    """Steps 1 to 5 of train_saei.main on the first P rows, n clean and n adversarial responses.

    For step 6, all responses are scored once on the clean image. Several losses share the graph.
    """

    def __init__(self, policy: Policy, P: int, n: int):
        self.policy, self.P, self.n = policy, P, n
        rows = list(CONFIG.data.load(CONFIG.data.split, limit=P))
        self.batch = Batch(rows, list(range(P)), CONFIG.run.seed, step=0)
        self.prompts = policy.encode(self.batch.problems, self.batch.images)

        clean = self.sample(self.prompts, train_saei.CLEAN)  # 1
        cuts = (SAEI.tsec_low, SAEI.tsec_high)
        tsec_mask = tsec.select_tokens(clean.entropy, clean.mask, *cuts)  # 2
        self.objective = self.entropy_of(clean, tsec_mask)
        seeds = self.batch.seeds(train_saei.ATTACK)
        attacked = train_saei.intervene(  # 3
            SAEI, policy, self.prompts, Passes(), lambda _: self.objective, P, seeds, noise_t=0.0
        )
        responses = [clean, self.sample(attacked, train_saei.ADVERSARIAL)]  # 4
        texts, scores = self.grade(responses)  # 5
        self.accuracy, self.reward = scores["accuracy"], scores["reward"]  # (P, G)
        advantages = grpo.group_advantages(self.reward)
        step = (rows, self.prompts, attacked, responses, tsec_mask, texts, scores, advantages)
        super().__init__(*step)

        self.training = rollouts.all_responses(self, SAEI.zero_variance)  # 6
        self.mask = self.training.mask  # (P, G, T)
        self.lengths = self.mask.sum(dim=2)  # (P, G)
        logprobs, _ = self.training.score(policy, SAEI.temperature)
        self.logprobs = logprobs.view(self.mask.shape)  # of the clean image, with graph
        self.recorded = rollouts.joined(self, "logprobs")  # of the image sampled on
        self.loss = self.loss_with(advantages)
        self.gradient = self.gradient_of(self.loss)

    def sample(self, prompts: Prompts, branch: int, temperature=SAEI.temperature) -> Responses:
        """n responses per prompt. `branch` names the part of the step that they are for."""
        seeds = self.batch.seeds(branch)
        return self.policy.sample(prompts, self.n, seeds, SAEI.max_new_tokens, temperature)

    def grade(self, responses: list[Responses]) -> tuple[list[list[str]], dict[str, Tensor]]:
        """Texts and scores of all responses, (P, G) each."""
        rows = self.batch.rows
        functions = rollouts.load_rewards(SAEI.reward, SAEI.max_new_tokens, rows[0])
        return rollouts.grade(functions, self.policy, rows, responses)

    def entropy_of(self, clean: Responses, chosen: Tensor) -> Objective:
        """The entropy of the chosen tokens (P * n, T), as a function of the images."""
        tensors = (self.prompts, clean, chosen)
        return train_saei.EntropyObjective(self.policy, *tensors, SAEI.temperature)

    def ascend(self, objective: Objective) -> list[Tensor]:
        """The images that PGD finds for another objective."""
        with frozen(self.policy):
            return egas.pgd_ascent(objective, self.prompts.images, SAEI.eps, steps=SAEI.pgd_steps)

    def loss_with(self, advantages: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
        """The loss on the clean image. old_logprobs None: those of the clean image."""
        old = self.logprobs.detach() if old_logprobs is None else old_logprobs
        tensors = [x.flatten(0, 1) for x in (self.logprobs, old, advantages, self.mask)]
        return grpo.policy_loss(*tensors, SAEI.clip_low, SAEI.clip_high)[0]

    def gradient_of(self, loss: Tensor) -> Tensor:
        """With respect to all weights, in one vector."""
        grads = torch.autograd.grad(loss, list(self.policy.parameters()), retain_graph=True)
        return torch.cat([grad.flatten() for grad in grads])

    def compared(self, loss: Tensor) -> list[str]:
        """The gradient of another loss beside the step's: relative difference, cosine."""
        gradient = self.gradient_of(loss)
        difference = 100 * (gradient - self.gradient).norm() / self.gradient.norm()
        cosine = torch.cosine_similarity(gradient, self.gradient, dim=0)
        return [f"{difference:.2g}%", f"{cosine:.2f}"]


# ------------------------------------------------------------------------------ the worked example


def numbers(values: Tensor, digits: int = 2) -> str:
    """0.00, never -0.00."""
    return " ".join(f"{round(value, digits) + 0.0:.{digits}f}" for value in values.tolist())


def shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def worked_1(step: Step) -> list[str]:
    prompts, clean = step.prompts, step.clean
    lines = []
    for p, row in enumerate(step.rows):
        question = row["problem"].split("? ")[0]
        lines.append(f"prompt {p}: {question}?  answer {row['answer']}")
    image_tokens = int((prompts.ids[0] == step.policy.model.config.image_token_id).sum())
    vocabulary = len(step.policy.banned)
    lines += [
        f"ids {shape(prompts.ids)} = (P, L), prompt lengths {prompts.mask.sum(1).tolist()}",
        f"image {shape(prompts.images[0])} in [0, 1], {image_tokens} tokens of the prompt",
        f"tokens, mask, logprobs, entropy: {shape(clean.tokens)} = (P * G_clean, T), "
        f"V = {vocabulary}",
        f"lengths {clean.mask.sum(1).tolist()}",
    ]
    entropy = tsec.selective_entropy(clean.entropy, clean.mask)
    for i, text in enumerate(step.policy.decode(clean)):
        logprob = clean.logprobs[i][clean.mask[i]].sum()
        lines.append(f"prompt {i // step.n}: {text}")
        lines.append(
            f"          mean entropy {entropy[i]:.3f}, log-prob of the whole {logprob:.2f}"
        )
    return lines


def worked_2(step: Step) -> list[str]:
    clean, i = step.clean, step.n  # the first response of the second prompt
    low = tsec.entropy_quantile(clean.entropy, clean.mask, SAEI.tsec_low)[i]
    high = tsec.entropy_quantile(clean.entropy, clean.mask, SAEI.tsec_high)[i]
    chosen = tsec.selective_entropy(clean.entropy, step.tsec_mask)[i]
    all_tokens = tsec.selective_entropy(clean.entropy, clean.mask)[i]
    return [
        f"entropy, mask {shape(clean.entropy)} -> tsec_mask {shape(step.tsec_mask)}; "
        f"here response {i}, * is chosen",
        f"its 20% and 80% quantiles: {low:.3f} and {high:.3f} nats",
        *tokens_with_entropy(step, i),
        f"{int(step.tsec_mask[i].sum())} of {int(clean.mask[i].sum())} tokens chosen; "
        f"their mean {chosen:.3f}, that of all tokens {all_tokens:.3f}",
    ]


def tokens_with_entropy(step: Step, i: int) -> list[str]:
    """Every token of clean response i with its entropy, eight per line, * where it is chosen."""
    mask = step.clean.mask[i]
    ids = step.clean.tokens[i][mask].tolist()
    words = step.policy.processor.tokenizer.convert_ids_to_tokens(ids)
    cells = []
    for t, word in enumerate(words):
        star = "*" if step.tsec_mask[i, t] else ""
        cells.append(f"{word} {step.clean.entropy[i, t]:.2f}{star}")
    return ["  " + "   ".join(cells[t : t + 8]) for t in range(0, len(cells), 8)]


def worked_3(step: Step) -> list[str]:
    clean, attacked = step.prompts.images, step.attacked.images
    with torch.no_grad():
        before, after = step.objective(clean), step.objective(attacked)
    lines = [
        f"images: {step.P} of {shape(clean[0])}, H(images) ({step.P}) = (P,)",
        f"eps {255 * SAEI.eps:.1f}/255, {SAEI.pgd_steps} steps of {255 * STEP_SIZE:.2f}/255",
    ]
    for p in range(step.P):
        change = 255 * (attacked[p] - clean[p]).abs().max()
        lines.append(
            f"prompt {p}: H {before[p]:.3f} -> {after[p]:.3f}; largest change {change:.2f}/255, "
            f"PSNR {egas.psnr(attacked[p], clean[p]):.1f} dB"
        )
    return lines


def worked_4(step: Step) -> list[str]:
    adversarial = step.adversarial
    lines = [f"tokens {shape(adversarial.tokens)} = (P * G_adv, T), drawn on the attacked images"]
    entropy = tsec.selective_entropy(adversarial.entropy, adversarial.mask)
    for i, text in enumerate(step.policy.decode(adversarial)):
        lines.append(f"prompt {i // step.n}: {text}")
        lines.append(f"          mean entropy {entropy[i]:.3f}")
    return lines


def worked_5(step: Step) -> list[str]:
    lines = ["rewards (P, G) -> advantages (P, G); the clean ones first"]
    for p, reward in enumerate(step.reward):
        accuracy, format_ = (numbers(step.scores[x][p], 0) for x in ("accuracy", "format"))
        mean, std = reward.mean(), reward.std()
        lines += [
            f"prompt {p}: accuracy {accuracy}   format {format_}",
            f"          reward   {numbers(reward, 1)}   mean {mean:.3f}, std {std:.3f}",
            f"          A        {numbers(step.advantages[p])}",
        ]
    return [*lines, f"equal_groups(accuracy): {grpo.equal_groups(step.accuracy).tolist()}"]


def worked_6(step: Step) -> list[str]:
    n, mask = step.n, step.mask
    log_ratio = (step.logprobs.detach() - step.recorded).masked_fill(~mask, 0.0)  # (P, G, T)
    rounding = log_ratio[:, :n].abs().max()
    tokens = int(step.lengths.sum())
    lines = [
        f"logprobs {shape(mask.flatten(0, 1))} = (P * G, T), all on the clean image",
        f"tokens of each response {step.lengths.tolist()}, in all {tokens}: the one normaliser",
        "scored against sampled log-probs, clean responses: "
        + ("equal to rounding" if rounding < 1e-3 else f"{rounding} apart"),
        f"loss {step.loss:.3f} = - sum A_i |y_i| / {tokens}; "
        f"norm of its gradient {step.gradient.norm():.2f}",
        "ratios around the token whose log-prob differs most between the two images:",
    ]
    of_adversarial = log_ratio[:, n:].flatten(0, 1)  # (P * G_adv, T)
    i, t = divmod(int(of_adversarial.abs().argmax()), of_adversarial.shape[1])
    for name, old in (("clean", step.logprobs), ("attacked", step.recorded)):
        ratio = (step.logprobs - old).exp()[:, n:].flatten(0, 1).detach()
        window = numbers(ratio[i, max(t - 2, 0) : t + 3])
        lines.append(f"  old log-probs of the {name + ' image:':<15} {window}")
    return lines


# ------------------------------------------------------------------------------------ the variants


def share_clipped(new: Tensor, old: Tensor, mask: Tensor) -> str:
    """Share of the tokens whose ratio is outside the clip range."""
    ratio = (new - old).exp()[mask]
    outside = (ratio < 1 - SAEI.clip_low) | (ratio > 1 + SAEI.clip_high)
    return f"{outside.float().mean():.0%}"


def groups_that_differ(values: Tensor) -> int:
    return int((~grpo.equal_groups(values)).sum())


@torch.no_grad()
def variants_1(step: Step) -> list[list[str]]:
    """Temperature; greedy decoding; positions."""
    policy, prompts, clean = step.policy, step.prompts, step.clean
    cool = step.sample(prompts, train_saei.CLEAN, temperature=0.7)
    scored_at_one, _ = policy.score(prompts, cool.tokens, cool.mask, temperature=1.0)
    clipped = share_clipped(scored_at_one, cool.logprobs, cool.mask)

    greedy = policy.decode(step.sample(prompts, train_saei.CLEAN, temperature=0.0))
    distinct = sum(len(set(greedy[i : i + step.n])) for i in range(0, len(greedy), step.n))

    counted = replace(prompts, next_position=prompts.mask.sum(1))
    shift = int((counted.next_position - prompts.next_position)[0])
    wrong, _ = policy.score(counted, clean.tokens, clean.mask)
    right, _ = policy.score(prompts, clean.tokens, clean.mask)
    difference = (wrong - right)[clean.mask].abs().mean()
    return [[clipped], [str(distinct)], [str(shift), f"{difference:.2f}"]]


def variants_2(step: Step) -> list[list[str]]:
    """Share of chosen tokens: as it is; with padding in the quantiles; quantiles of the batch."""
    entropy, mask = step.clean.entropy, step.clean.mask
    with_padding = tsec.select_tokens(entropy, torch.ones_like(mask))
    of_batch = tsec.select_tokens(entropy, mask, scope="batch")
    table = []
    for chosen in (step.tsec_mask, with_padding, of_batch):
        share = (chosen & mask).sum(1) / mask.sum(1)
        table.append([f"{share.min():.0%}", f"{share.max():.0%}"])
    return table


def variants_3(step: Step) -> list[list[str]]:
    """Entropy of TsEC's tokens by attack; no projection; backward(); pixel_values."""
    images, H = step.prompts.images, step.objective
    mask = step.clean.mask
    attacks = (
        step.attacked.images,
        step.ascend(step.entropy_of(step.clean, mask)),
        step.ascend(step.entropy_of(step.clean, mask & ~step.tsec_mask)),
        step.ascend(lambda x: -H(x)),
        egas.random_signs(images, SAEI.eps, torch.Generator().manual_seed(0)),
    )
    table = []
    with torch.no_grad():
        before = H(images).mean()
        for attacked in attacks:
            gain = round(float(H(attacked).mean() / before - 1), 2) + 0.0  # + 0.0: no -0%
            table.append([f"{gain:+.0%}"])
    return [*table, [share_outside(step)], weights_touched(step), [frames_apart(step)]]


def share_outside(step: Step) -> str:
    """PGD without [0, 1]: the share of values that leave it."""
    clean = step.prompts.images
    images = [x.clone() for x in clean]
    with frozen(step.policy):
        for _ in range(SAEI.pgd_steps):
            images = [x.requires_grad_() for x in images]
            grads = egas.image_gradients(step.objective(images).sum(), images)
            for i, x0 in enumerate(clean):
                moved = images[i].detach() + STEP_SIZE * grads[i].sign()
                images[i] = moved.clamp(x0 - SAEI.eps, x0 + SAEI.eps)
    values = torch.stack(images)
    return f"{((values < 0) | (values > 1)).float().mean():.0%}"


def weights_touched(step: Step) -> list[str]:
    """What one backward() of the attack leaves in the weights' .grad: norm, cosine of the sum."""
    images = [x.clone().requires_grad_() for x in step.prompts.images]
    left = step.gradient_of(step.objective(images).sum())
    times = left.norm() / step.gradient.norm()
    cosine = torch.cosine_similarity(step.gradient + left, step.gradient, dim=0)
    return [f"{times:.0f}", f"{cosine:.2f}"]


def frames_apart(step: Step) -> str:
    """Sign steps on Qwen's pixel_values, where a still image fills two frames."""
    policy, images = step.policy, step.prompts.images
    vision = policy.to_pixel_values(images)
    patches = vision["pixel_values"].detach().requires_grad_()
    policy.to_pixel_values = lambda _: vision | {"pixel_values": patches}
    with frozen(policy):
        (grad,) = torch.autograd.grad(step.objective(images).sum(), patches)
    del policy.to_pixel_values  # the class's own again
    frames = policy.processor.image_processor.temporal_patch_size
    first, second = grad.sign().view(len(grad), 3, frames, -1).unbind(2)
    return f"{(first != second).float().mean():.0%}"


def variants_4(step: Step) -> list[list[str]]:
    """Seeds; plain GRPO; pass@2."""
    policy, n, k = step.policy, step.n, 2
    clean, adversarial = policy.decode(step.clean), policy.decode(step.adversarial)
    same_seeds = policy.decode(step.sample(step.attacked, train_saei.CLEAN))
    repeated = []
    for texts in (same_seeds, adversarial):
        equal = sum(a == b for a, b in zip(texts, clean, strict=True))
        repeated.append(f"{equal / len(clean):.0%}")

    _, plain = step.grade([step.clean, step.sample(step.prompts, FURTHER)])
    differ = [str(groups_that_differ(x)) for x in (plain["accuracy"], step.accuracy)]

    plug_in, unbiased = 0.0, 0.0
    for c in step.accuracy[:, :n].sum(dim=1).int().tolist():
        plug_in += (1 - (1 - c / n) ** k) / step.P
        unbiased += pass_at_k(n, c, k) / step.P
    return [repeated, differ, [f"{plug_in:.3f}", f"{unbiased:.3f}"]]


def variants_5(step: Step) -> list[list[str]]:
    """Equal rewards; the divisor of the variance; the group; the rewards compared."""
    one_right = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    by_G = (one_right - one_right.mean()) / one_right.std(correction=0)
    advantages = grpo.group_advantages(one_right)

    of_batch = (step.reward - step.reward.mean()) / step.reward.std()
    differ = ~grpo.equal_groups(step.reward)  # (P,)
    turned = (of_batch * step.advantages < 0)[differ].float().mean()

    all_wrong = step.accuracy.sum(dim=1) == 0  # (P,)
    format_alone = int((all_wrong & differ).sum())
    return [
        [rounding_advantage()],
        [f"{by_G[0, 0]:.2f}", f"{advantages[0, 0]:.2f}"],
        [f"{turned:.0%}"],
        [str(format_alone), str(int(all_wrong.sum())), str(groups_that_differ(step.accuracy))],
    ]


def rounding_advantage() -> str:
    """The largest |A| of equal rewards where nothing sets it to 0."""
    largest = 0.0
    for G in range(2, 17):
        rewards = torch.full((G,), 0.9)
        mean = sum(rewards) / G  # one by one: the same rounding on every machine
        centred = abs(float(rewards[0] - mean))
        std = centred * math.sqrt(G / (G - 1))
        largest = max(largest, centred / (std + 1e-6))
    return f"{largest:.2f}"


def variants_6(step: Step) -> list[list[str]]:
    """Gradients with other normalisers, other old log-probs, the other conditioning image."""
    advantages, lengths = step.advantages, step.lengths.float()
    tokens, tokens_of_prompt = lengths.sum(), lengths.sum(dim=1, keepdim=True)
    per_response = step.loss_with(advantages * tokens / (lengths.numel() * lengths))
    per_prompt = step.loss_with(advantages * tokens / (step.P * tokens_of_prompt))
    recorded = step.loss_with(advantages, step.recorded)
    adversarial = step.mask.clone()
    adversarial[:, : step.n] = False
    sampled = []
    for batch in rollouts.by_condition(step.training, step, "sampled"):
        scores = batch.score(step.policy, SAEI.temperature)
        loss, _ = train_saei.batch_loss(CONFIG, batch, scores, {}, tokens)
        sampled.append(loss)
    return [
        [f"{lengths.min():.0f}", f"{lengths.max():.0f}", *step.compared(per_response)],
        step.compared(per_prompt),
        [share_clipped(step.logprobs, step.recorded, adversarial), *step.compared(recorded)],
        step.compared(sum(sampled)),
    ]


def variants_7(step: Step) -> list[list[str]]:
    """Two processes with the even and the odd rows: each its own mean, then DDP's average."""
    lengths = step.lengths.float()
    weights, table = torch.ones_like(lengths), []
    for process in (0, 1):
        tokens = lengths[process::2].sum()
        weights[process::2] = lengths.sum() / (2 * tokens)
        table.append(f"{tokens:.0f}")
    return [[*table, *step.compared(step.loss_with(step.advantages * weights))]]


# ---------------------------------------------------------------------------------------- the page

WORKED = (worked_1, worked_2, worked_3, worked_4, worked_5, worked_6)
VARIANTS = (variants_1, variants_2, variants_3, variants_4, variants_5, variants_6, variants_7)
BLOCK = re.compile(r"<!-- ((?:worked|variants) \d) -->\n([\s\S]*?)<!-- /\1 -->")
BOLD = re.compile(r"\*\*(.+?)\*\*")


def compute() -> dict[str, list]:
    """{name of a block: its lines, or the bold numbers of its rows}"""
    torch.set_num_threads(1)  # sums in one order
    policy = Policy.from_pretrained(str(ROOT / CONFIG.model.model))
    small, large = Step(policy, P=2, n=2), Step(policy, P=16, n=4)
    results = {}
    for number, worked in enumerate(WORKED, 1):
        results[f"worked {number}"] = [line.rstrip() for line in worked(small)]
    for number, variants in enumerate(VARIANTS, 1):
        results[f"variants {number}"] = variants(large)
    return results


def fill(page: str, results: dict[str, list]) -> str:
    """The page with these lines and numbers between <!-- name --> and <!-- /name -->."""

    def block(match: re.Match) -> str:
        name, text = match.groups()
        if name.startswith("worked"):
            lines = ["```text", *results[name], "```"]
        else:
            head, line, *rows = text.splitlines()
            pairs = zip(rows, results[name], strict=True)
            lines = [head, line, *(with_bold(row, values) for row, values in pairs)]
        return "\n".join([f"<!-- {name} -->", *lines, f"<!-- /{name} -->"])

    return BLOCK.sub(block, page)


def with_bold(row: str, values: list[str]) -> str:
    """The row with these bold numbers. Raises ValueError if it has more or fewer."""
    if len(BOLD.findall(row)) != len(values):
        raise ValueError(f"the row needs {len(values)} bold numbers: {row}")
    remaining = iter(values)
    return BOLD.sub(lambda _: f"**{next(remaining)}**", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the numbers into the page")
    write = parser.parse_args().write
    page = fill(PAGE.read_text(), compute())
    for name, text in BLOCK.findall(page):
        print(f"{name}\n{text}")
    if write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
