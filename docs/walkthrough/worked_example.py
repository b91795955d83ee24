"""The numbers of docs/walkthrough/README.md: one step of SaEI, small enough to read, and what each part costs when done otherwise.

    python docs/walkthrough/worked_example.py            # prints the blocks of the page
    python docs/walkthrough/worked_example.py --write    # and writes them into it

The worked example: the first two rows of the demo's shifted/train, G = 4 (two clean, two adversarial), with the demo's
policy, eps and PGD steps. "Done otherwise": its first sixteen rows, G = 8, the same policy; nothing is trained.
Every function below returns the text of one block; tests/test_walkthrough.py compares it with the page.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import egas  # noqa: E402
import grpo  # noqa: E402
import rewards  # noqa: E402
import train_saei  # noqa: E402
import tsec  # noqa: E402
from demo.task import make_row  # noqa: E402
from eval import pass_at_k  # noqa: E402
from train_saei import by_prompt, entropy_objective, frozen, seeds_of  # noqa: E402
from vlm.policy import Policy, Prompts, Responses  # noqa: E402

PAGE = ROOT / "docs/walkthrough/README.md"
CFG = train_saei.load_config(["--config", str(ROOT / "recipes/demo.yaml")])
CLIP = (1 - CFG.clip_low, 1 + CFG.clip_high)
STEP = min(2.5 * CFG.eps / CFG.pgd_steps, CFG.eps)  # pgd_ascent's own choice


def attack(policy: Policy, x: SimpleNamespace, keep: Tensor, sign: int = 1) -> list[Tensor]:
    """PGD on the images of x, upward (or downward) on the entropy of the tokens that `keep` names."""
    objective = entropy_objective(policy, x.prompts, x.clean, keep, CFG.temperature)
    with frozen(policy):
        return egas.pgd_ascent(
            lambda images: sign * objective(images), x.prompts.images, CFG.eps, steps=CFG.pgd_steps
        )


def draw(
    policy: Policy, prompts: Prompts, n: int, branch: int, temperature: float = CFG.temperature
) -> Responses:
    seeds = seeds_of(CFG, 0, list(range(len(prompts))), branch)
    return policy.sample(prompts, n, seeds, CFG.max_new_tokens, temperature)


def roll_out(policy: Policy, P: int, n: int) -> SimpleNamespace:
    """Steps 1 to 5 for the first P rows, n clean and n adversarial responses each."""
    rows = [make_row(CFG.split, i) for i in range(P)]
    x = SimpleNamespace(P=P, n=n, rows=rows)
    x.prompts = policy.encode([row["problem"] for row in rows], [row["images"] for row in rows])
    x.clean = draw(policy, x.prompts, n, 0)
    x.keep = tsec.select_tokens(x.clean.entropy, x.clean.mask, CFG.tsec_low, CFG.tsec_high)
    x.attacked = x.prompts.with_images(attack(policy, x, x.keep))
    x.fresh = draw(policy, x.attacked, n, 2)
    halves, answers = (
        [policy.decode(r) for r in (x.clean, x.fresh)],
        [row["answer"] for row in rows for _ in range(n)],
    )
    by_group = lambda of: torch.cat(
        [by_prompt(torch.tensor(of(half)), P) for half in halves], dim=1
    )  # noqa: E731
    x.accuracy = by_group(
        lambda texts: rewards.accuracy_reward(texts, answers)
    )  # (P, G), the clean ones first
    x.format = by_group(rewards.format_reward)
    x.reward = CFG.accuracy_weight * x.accuracy + CFG.format_weight * x.format
    x.advantages = grpo.group_advantages(x.reward)
    return x


def scored(policy: Policy, x: SimpleNamespace) -> SimpleNamespace:
    """Log-probs with their graph: the clean half on the clean image, the adversarial half on either image."""
    score = lambda prompts, r: policy.score(prompts, r.tokens, r.mask, CFG.temperature)[0]  # noqa: E731
    return SimpleNamespace(
        clean=score(x.prompts, x.clean),
        fresh_on_clean=score(x.prompts, x.fresh),
        fresh_on_attacked=score(x.attacked, x.fresh),
    )


def loss_of(
    x: SimpleNamespace,
    clean: Tensor,
    fresh: Tensor,
    old_fresh: Tensor,
    weights: Tensor | None = None,
):
    """The loss of a whole step, one normaliser; weights (P, G): what multiplies a response's share in it."""
    advantages = x.advantages if weights is None else x.advantages * weights
    tokens = x.clean.mask.sum() + x.fresh.mask.sum()
    halves = advantages.split(x.n, dim=1)
    loss = grpo.policy_loss(
        clean, clean.detach(), halves[0].flatten(), x.clean.mask, normalizer=tokens
    )[0]
    return (
        loss
        + grpo.policy_loss(fresh, old_fresh, halves[1].flatten(), x.fresh.mask, normalizer=tokens)[
            0
        ]
    )


def gradient(policy: Policy, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def lengths(x: SimpleNamespace) -> Tensor:
    """Response tokens.   -> (P, G)"""
    return torch.cat([by_prompt(r.mask.sum(1), x.P) for r in (x.clean, x.fresh)], dim=1)


# -------------------------------------------------------------------------------------------------- the worked example


def numbers(values: Tensor, digits: int = 2) -> str:
    """0.00, never -0.00."""
    return " ".join(f"{round(v, digits) + 0.0:.{digits}f}" for v in values.flatten().tolist())


def shape(x: Tensor) -> str:
    return "(" + ", ".join(map(str, x.shape)) + ")"


def lines_of(policy: Policy, r: Responses, i: int, keep: Tensor) -> list[str]:
    """Every token of a response with its entropy, eight a line; * where it is kept."""
    words = policy.processor.tokenizer.convert_ids_to_tokens(r.tokens[i, r.mask[i]].tolist())
    columns = words, r.entropy[i, r.mask[i]].tolist(), keep[i, r.mask[i]].tolist()
    cells = [f"{w} {h:.2f}{'*' * k}" for w, h, k in zip(*columns, strict=True)]
    return ["  " + "   ".join(cells[k : k + 8]) for k in range(0, len(cells), 8)]


def worked_1(policy: Policy, x: SimpleNamespace) -> list[str]:
    out = [
        f"prompt {p}: {row['problem'].split('? ')[0]}?  answer {row['answer']}"
        for p, row in enumerate(x.rows)
    ]
    places = int((x.prompts.ids[0] == policy.model.config.image_token_id).sum())
    out += [f"ids {shape(x.prompts.ids)} = (P, L), prompt lengths {x.prompts.mask.sum(1).tolist()}"]
    out += [f"image {shape(x.prompts.images[0])} in [0, 1], {places} tokens of the prompt"]
    out += [
        f"tokens, mask, logprobs, entropy: {shape(x.clean.tokens)} = (P * G_clean, T), V = {len(policy.banned)}"
    ]
    out += [f"lengths {x.clean.mask.sum(1).tolist()}"]
    for i, text in enumerate(policy.decode(x.clean)):
        h, logp = x.clean.entropy[i, x.clean.mask[i]], x.clean.logprobs[i, x.clean.mask[i]]
        out.append(f"prompt {i // x.n}: {text}")
        out.append(f"          mean entropy {h.mean():.3f}, log-prob of the whole {logp.sum():.2f}")
    return out


def worked_2(policy: Policy, x: SimpleNamespace) -> list[str]:
    i = x.n  # the first response of the second prompt
    low, high = (
        tsec.entropy_quantile(x.clean.entropy, x.clean.mask, q)[i].item() for q in (0.2, 0.8)
    )
    kept, all_tokens = (
        tsec.selective_entropy(x.clean.entropy, m)[i].item() for m in (x.keep, x.clean.mask)
    )
    out = [
        f"entropy, mask {shape(x.clean.entropy)} -> keep {shape(x.keep)}; here response {i}, * is kept"
    ]
    out += [f"its 20% and 80% quantiles: {low:.3f} and {high:.3f} nats"]
    out += lines_of(policy, x.clean, i, x.keep)
    out += [
        f"{int(x.keep[i].sum())} of {int(x.clean.mask[i].sum())} tokens kept; their mean {kept:.3f}, "
    ]
    out[-1] += f"that of all tokens {all_tokens:.3f}"
    return out


def worked_3(policy: Policy, x: SimpleNamespace) -> list[str]:
    objective = entropy_objective(policy, x.prompts, x.clean, x.keep, CFG.temperature)
    pairs = list(zip(x.attacked.images, x.prompts.images, strict=True))
    with torch.no_grad():
        before, after = objective(x.prompts.images), objective(x.attacked.images)
    out = [f"images: {x.P} of {shape(pairs[0][0])}, H(images) {shape(before)} = (P,)"]
    out += [f"eps {255 * CFG.eps:.1f}/255, {CFG.pgd_steps} steps of {255 * STEP:.2f}/255"]
    for p, (a, b) in enumerate(pairs):
        moved = (a - b).abs().max().item() * 255
        out.append(f"prompt {p}: H {before[p]:.3f} -> {after[p]:.3f}; ")
        out[-1] += f"largest change {moved:.2f}/255, PSNR {egas.psnr(a, b):.1f} dB"
    return out


def worked_4(policy: Policy, x: SimpleNamespace) -> list[str]:
    out = [f"tokens {shape(x.fresh.tokens)} = (P * G_adv, T), drawn on the attacked images"]
    entropy = tsec.selective_entropy(x.fresh.entropy, x.fresh.mask)
    for i, text in enumerate(policy.decode(x.fresh)):
        out += [f"prompt {i // x.n}: {text}", f"          mean entropy {entropy[i]:.3f}"]
    return out


def worked_5(policy: Policy, x: SimpleNamespace) -> list[str]:
    out = ["rewards (P, G) -> advantages (P, G); the clean ones first"]
    for p in range(x.P):
        out.append(
            f"prompt {p}: accuracy {numbers(x.accuracy[p], 0)}   format {numbers(x.format[p], 0)}"
        )
        out.append(
            f"          reward   {numbers(x.reward[p], 1)}   mean {x.reward[p].mean():.3f}, "
        )
        out[-1] += f"std {x.reward[p].std():.3f}"
        out.append(f"          A        {numbers(x.advantages[p])}")
    same = grpo.equal_groups(x.accuracy).tolist()
    out.append(f"equal_groups(accuracy): {same}")
    return out


def worked_6(policy: Policy, x: SimpleNamespace) -> list[str]:
    s, tokens, norm = x.scored, lengths(x), x.gradient.norm().item()
    loss = x.loss.item()
    error = (s.clean.detach() - x.clean.logprobs)[x.clean.mask].abs().max().item()
    out = [
        f"logprobs {shape(s.clean)} clean half, {shape(s.fresh_on_clean)} adversarial half, both on the clean image"
    ]
    out += [
        f"tokens of each response {tokens.tolist()}, in all {int(tokens.sum())}: the one normaliser"
    ]
    out += [
        f"scored against sampled log-probs, clean half: {'equal to rounding' if error < 1e-3 else error}"
    ]
    out += [
        f"loss {loss:.3f} = - sum A_i |y_i| / {int(tokens.sum())}; norm of its gradient {norm:.2f}"
    ]
    out += [
        "where an adversarial response's log-probs differ most between the two images, ratios around that token:"
    ]
    recorded = (s.fresh_on_clean - x.fresh.logprobs).detach().masked_fill(~x.fresh.mask, 0.0).exp()
    i, t = divmod(int((recorded.log().abs()).argmax()), recorded.shape[1])
    for name, old in (("clean", s.fresh_on_clean), ("attacked", x.fresh.logprobs)):
        ratio = (s.fresh_on_clean - old).exp().detach()[i, max(t - 2, 0) : t + 3]
        out.append(f"  old log-probs of the {name + ' image:':<15} {numbers(ratio)}")
    return out


# ------------------------------------------------------------------------------------------------------ done otherwise


def outside(new: Tensor, old: Tensor, mask: Tensor) -> float:
    """Share of tokens whose ratio the clip range leaves out."""
    ratio = (new - old).exp()[mask]
    return ((ratio < CLIP[0]) | (ratio > CLIP[1])).float().mean().item()


def otherwise_1(policy: Policy, b: SimpleNamespace) -> list[tuple[str, str]]:
    """Sampling: temperature, greedy decoding, positions."""
    with torch.no_grad():
        cool = draw(policy, b.prompts, b.n, 0, temperature=0.7)
        at_one = policy.score(b.prompts, cool.tokens, cool.mask, 1.0)[0]
        right = policy.score(b.prompts, b.clean.tokens, b.clean.mask)[0]
        counted = replace(b.prompts, next_position=b.prompts.mask.sum(1))
        wrong = policy.score(counted, b.clean.tokens, b.clean.mask)[0]
    greedy = policy.decode(draw(policy, b.prompts, b.n, 0, temperature=0.0))
    kinds = sum(len(set(greedy[i : i + b.n])) for i in range(0, len(greedy), b.n))
    shift = int((counted.next_position - b.prompts.next_position)[0])
    off = (wrong - right)[b.clean.mask].abs().mean().item()
    off_clip = outside(at_one, cool.logprobs, cool.mask)
    return [
        (
            "sampled at temperature 0.7, scored at 1",
            f"{off_clip:.0%} of the ratios are outside the clip range before any update",
        ),
        (
            "a checkpoint's `generation_config` obeyed, with top_k = 1",
            f"{kinds} distinct responses in the {b.P} clean halves of {b.n}: within one, nothing is left to compare",
        ),
        (
            f"response positions counted in tokens: {shift} too high, since the image's 9 tokens take 3",
            f"log-probs are off by {off:.2f} nats a token on average, without an error",
        ),
    ]


def otherwise_2(policy: Policy, b: SimpleNamespace) -> list[tuple[str, str]]:
    """TsEC: padding in the quantiles, quantiles over the batch."""
    padded = tsec.select_tokens(b.clean.entropy, torch.ones_like(b.clean.mask)) & b.clean.mask
    pooled = tsec.select_tokens(b.clean.entropy, b.clean.mask, scope="batch")
    share = lambda keep: keep.sum(1) / b.clean.mask.sum(1)  # noqa: E731
    span = lambda keep: f"{share(keep).min():.0%} to {share(keep).max():.0%}"  # noqa: E731
    return [
        (
            "as it is: each response's own quantiles",
            f"{span(b.keep)} of a response's tokens are kept",
        ),
        (
            "padding (entropy 0) counted in the quantiles",
            f"{span(padded)}: the shorter a response, the lower its cuts, and its certain tokens stay",
        ),
        (
            "one pair of cuts for the batch (`--tsec_scope batch`)",
            f"{span(pooled)}: what a response gives depends on the others",
        ),
    ]


def otherwise_3(policy: Policy, b: SimpleNamespace) -> list[tuple[str, str]]:
    """EgAS: the objective, the direction, the budget, the range, the weights' gradients, the copies of a frame."""
    H = entropy_objective(policy, b.prompts, b.clean, b.keep, CFG.temperature)
    x, generator = b.prompts.images, torch.Generator().manual_seed(0)
    images = {
        "as it is: PGD on TsEC's tokens": b.attacked.images,
        "PGD on all tokens": attack(policy, b, b.clean.mask),
        "PGD on the extreme tokens alone": attack(policy, b, b.clean.mask & ~b.keep),
        "descent: the sign of the objective turned": attack(policy, b, b.keep, sign=-1),
        "random signs of the same size": egas.random_signs(x, CFG.eps, generator),
    }
    with torch.no_grad():
        clean = H(x).mean()
        gains = {
            name: round(float(H(y).mean() / clean - 1), 2) + 0.0 for name, y in images.items()
        }  # + 0.0: no -0%
        rows = [(name, f"entropy of TsEC's tokens {gain:+.0%}") for name, gain in gains.items()]
    free = [y.clone() for y in x]  # the same PGD without [0, 1]
    with frozen(policy):
        for _ in range(CFG.pgd_steps):
            grads = egas.image_gradients(H([y.requires_grad_() for y in free]).sum(), free)
            moved = [
                (y.detach() + STEP * g.sign(), x0) for y, g, x0 in zip(free, grads, x, strict=True)
            ]
            free = [torch.minimum(torch.maximum(y, x0 - CFG.eps), x0 + CFG.eps) for y, x0 in moved]
    out = torch.cat([((y < 0) | (y > 1)).flatten() for y in free]).float().mean().item()
    rows.append(
        (
            "no projection onto [0, 1]",
            f"{out:.0%} of the values are no pixels any more: no file can hold them",
        )
    )
    return rows + [weights_touched(policy, b, H), copies_apart(policy, b)]


def weights_touched(policy: Policy, b: SimpleNamespace, H) -> tuple[str, str]:
    """What one `H(images).backward()` with trainable parameters leaves for the optimiser."""
    images = [y.clone().requires_grad_() for y in b.prompts.images]
    left = gradient(policy, H(images).sum())
    cosine = torch.cosine_similarity(b.gradient + left, b.gradient, dim=0).item()
    times = left.norm() / b.gradient.norm()
    return (
        "`backward()` with trainable weights, in place of `autograd.grad` with frozen ones",
        f"one `backward()` leaves {times:.0f} times the policy gradient's norm in the weights' `.grad`; "
        f"cosine of the sum to the policy gradient {cosine:.2f}",
    )


def copies_apart(policy: Policy, b: SimpleNamespace) -> tuple[str, str]:
    """Sign steps on Qwen's pixel_values, where a still image fills two frames."""
    vision = policy.to_pixel_values(b.prompts.images)
    patches = vision["pixel_values"].detach().requires_grad_()
    policy.to_pixel_values = lambda images: vision | {"pixel_values": patches}
    with frozen(policy):
        value = entropy_objective(policy, b.prompts, b.clean, b.keep, CFG.temperature)(
            b.prompts.images
        ).sum()
        signs = torch.autograd.grad(value, patches)[0].sign()
    del policy.to_pixel_values  # the class's own again
    ip = policy.processor.image_processor
    first, second = signs.view(len(signs), 3, ip.temporal_patch_size, -1).unbind(2)
    return (
        "sign steps on `pixel_values` in place of the image",
        f"the two frames of the still image part at {(first != second).float().mean():.0%} of the values",
    )


def otherwise_4(policy: Policy, b: SimpleNamespace) -> list[tuple[str, str]]:
    """The second round of sampling: seeds, what the group gains, and pass@k of what came out."""
    again = policy.decode(draw(policy, b.attacked, b.n, 0))
    clean, fresh = policy.decode(b.clean), policy.decode(b.fresh)
    twins = lambda texts: sum(a == c for a, c in zip(texts, clean, strict=True)) / len(clean)  # noqa: E731
    more = policy.decode(draw(policy, b.prompts, b.n, 4))  # a further half on the clean images
    more = rewards.accuracy_reward(more, [row["answer"] for row in b.rows for _ in range(b.n)])
    plain = torch.cat([b.accuracy[:, : b.n], by_prompt(torch.tensor(more), b.P)], dim=1)
    differ = [b.P - int(grpo.equal_groups(accuracy).sum()) for accuracy in (plain, b.accuracy)]
    right, n, k = b.accuracy[:, : b.n].sum(1).int().tolist(), b.n, 2
    unbiased = sum(pass_at_k(n, c, k) for c in right) / b.P
    plug_in = sum(1 - (1 - c / n) ** k for c in right) / b.P
    return [
        (
            "the clean half's seeds used again",
            f"{twins(again):.0%} of the adversarial responses repeat their clean twin word for word; "
            f"with seeds of their own {twins(fresh):.0%}",
        ),
        (
            "all G on the clean image: plain GRPO",
            f"{differ[0]} of {b.P} groups hold right and wrong responses; half of G on the attacked image: {differ[1]}",
        ),
        (
            f"pass@{k} from the {n} clean responses as 1 - (1 - c/n)^{k}",
            f"{plug_in:.3f}, too low: without bias {unbiased:.3f}",
        ),
    ]


def otherwise_5(policy: Policy, b: SimpleNamespace) -> list[tuple[str, str]]:
    """Advantages: equal rewards, the divisor of the variance, the group."""
    worst = 0.0
    for G in range(2, 17):
        equal = torch.full((G,), 0.9)
        centred = float(equal[0] - sum(equal) / G)  # one by one: the same rounding on every machine
        worst = max(worst, abs(centred) / (abs(centred) * math.sqrt(G / (G - 1)) + 1e-6))
    one = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    biased = ((one - one.mean()) / one.std(correction=0))[0, 0].item()
    pooled = (b.reward - b.reward.mean()) / b.reward.std()
    told = ~grpo.equal_groups(b.reward)[:, None].expand_as(pooled)
    turned = ((pooled * b.advantages < 0) & told).sum().item() / told.sum().item()
    wrong = b.accuracy.sum(1) == 0
    noisy = (wrong & ~grpo.equal_groups(b.reward)).sum().item()
    same = grpo.equal_groups(b.accuracy).sum().item()
    return [
        (
            "no rule for equal rewards, in float32",
            f"groups of 2 to 16 rewards, all 0.9: \\|A\\| up to {worst:.2f}, which is the rounding of their mean",
        ),
        (
            "std divided by G in place of G - 1",
            f"one right of four: A = {biased:.2f} in place of {grpo.group_advantages(one)[0, 0]:.2f}",
        ),
        (
            "mean and std of the batch in place of the group",
            f"{turned:.0%} of the advantages (of groups that differ) change sign: a right answer to a hard question "
            "and a wrong one to an easy one are compared",
        ),
        (
            "equal groups looked for in the reward, not in the accuracy",
            f"{noisy} of the {int(wrong.sum())} groups without a right answer teach format alone, at full size "
            f"(std divides it out); `--zero_variance drop` leaves {b.P - same} of {b.P} groups",
        ),
    ]


def otherwise_6(policy: Policy, b: SimpleNamespace) -> list[tuple[str, str]]:
    """The update: normaliser, old log-probs, conditioning image; all gradients against the right one."""
    s, size, right = b.scored, lengths(b).float(), b.gradient
    own = s.fresh_on_clean.detach()

    def apart(other: Tensor) -> str:
        cosine = torch.cosine_similarity(other, right, dim=0)
        return f"relative difference of the gradient {(other - right).norm() / right.norm():.0%}, cosine {cosine:.2f}"

    weigh = lambda w: gradient(policy, loss_of(b, s.clean, s.fresh_on_clean, own, w))  # noqa: E731
    responses = size.sum() / (size.numel() * size)  # every response 1 / N, its tokens 1 / |y|
    prompts = size.sum() / (b.P * size.sum(1, keepdim=True))  # every micro-batch of a prompt 1 / P
    recorded = gradient(policy, loss_of(b, s.clean, s.fresh_on_clean, b.fresh.logprobs))
    sampled = gradient(
        policy, loss_of(b, s.clean, s.fresh_on_attacked, s.fresh_on_attacked.detach())
    )
    clipped = outside(own, b.fresh.logprobs, b.fresh.mask)
    return [
        (
            f"mean over each response, then over responses (of {int(size.min())} to {int(size.max())} tokens)",
            f"{apart(weigh(responses))}: the longer an answer, the less a token of it counts",
        ),
        (
            "each prompt a micro-batch with its own normaliser",
            f"{apart(weigh(prompts))}: by the memory knob alone",
        ),
        (
            "old log-probs of the attacked image, new ones of the clean image",
            f"{clipped:.0%} of the ratios are outside the clip range before any update; {apart(recorded)}",
        ),
        ("not wrong, the other choice: `--condition sampled`", apart(sampled)),
    ]


def otherwise_7(policy: Policy, b: SimpleNamespace) -> list[tuple[str, str]]:
    """Two processes, the even and the odd rows: each its own mean, then DDP's average."""
    s, size, right = b.scored, lengths(b).float(), b.gradient
    own = s.fresh_on_clean.detach()
    share = torch.stack([size[p::2].sum() for p in (0, 1)])
    weights = (size.sum() / (2 * share))[torch.arange(b.P) % 2][:, None].expand_as(size)
    other = gradient(policy, loss_of(b, s.clean, s.fresh_on_clean, own, weights))
    return [
        (
            "two processes, each with the mean over its own tokens",
            f"{int(share[0])} and {int(share[1])} tokens; relative difference of the gradient "
            f"{(other - right).norm() / right.norm():.1%}: by the number of processes alone",
        )
    ]


def blocks() -> dict[str, str]:
    """name -> text: the worked example's blocks and the tables of what goes wrong"""
    torch.set_num_threads(1)  # sums in one order
    policy = Policy.from_pretrained(str(ROOT / CFG.model))
    small, large = roll_out(policy, P=2, n=2), roll_out(policy, P=16, n=4)
    for x in (small, large):
        x.scored = scored(policy, x)
        x.loss = loss_of(
            x, x.scored.clean, x.scored.fresh_on_clean, x.scored.fresh_on_clean.detach()
        )
        x.gradient = gradient(policy, x.loss)  # step 6 as it is
    texts = {}
    for number, work in enumerate((worked_1, worked_2, worked_3, worked_4, worked_5, worked_6), 1):
        texts[f"worked {number}"] = (
            "```text\n" + "\n".join(line.rstrip() for line in work(policy, small)) + "\n```"
        )
    others = (
        otherwise_1,
        otherwise_2,
        otherwise_3,
        otherwise_4,
        otherwise_5,
        otherwise_6,
        otherwise_7,
    )
    for number, other in enumerate(others, 1):
        rows = [f"| {name} | {found} |" for name, found in other(policy, large)]
        texts[f"otherwise {number}"] = "\n".join(
            ["| done otherwise | measured |", "|---|---|", *rows]
        )
    return texts


def fill(page: str, texts: dict[str, str]) -> str:
    """The page with each text between <!-- name --> and <!-- /name -->."""
    for name, text in texts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = page.split(begin)
        page = head + begin + text + "\n" + end + rest.split(end)[1]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the blocks into docs/walkthrough/README.md as well",
    )
    args = parser.parse_args()
    texts = blocks()
    for name, text in texts.items():
        print(f"{name}\n{text}\n")
    if args.write:
        PAGE.write_text(fill(PAGE.read_text(), texts))


if __name__ == "__main__":
    main()
