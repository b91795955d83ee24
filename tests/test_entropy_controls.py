"""entropy_controls.py: closed forms, TRL's own code, plain loops; each control in the training loop."""

import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import test_step as step
import torch
from test_train import comparable, metrics_of, short
from torch.distributions import Categorical, kl_divergence
from trl.trainer.grpo_trainer import GRPOTrainer

import grpo
import rewards
from extras import entropy_controls as controls
from train_saei import CONTROLS, Config, main

TIGHT = {"atol": 1e-6, "rtol": 1e-5}
UNCLIPPED = {"clip_low": 1.0, "clip_high": math.inf}


def batch(seed: int = 0, rows: int = 6, length: int = 40, dtype=torch.float32) -> SimpleNamespace:
    """Ragged responses, one of them empty, off-policy log-probs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    lengths[-1] = 0
    old = -3 * torch.rand(rows, length, generator=generator, dtype=dtype)
    return SimpleNamespace(
        mask=torch.arange(length) < lengths,
        old=old,
        logprobs=(
            old + 0.4 * torch.randn(rows, length, generator=generator, dtype=dtype)
        ).requires_grad_(),
        entropy=(2 * torch.rand(rows, length, generator=generator, dtype=dtype)).requires_grad_(),
        advantages=torch.randn(rows, generator=generator, dtype=dtype),
    )


def trl_trainer(**changes) -> SimpleNamespace:
    """A stand-in with what GRPOTrainer._compute_loss reads."""
    accelerator = SimpleNamespace(num_processes=1, sync_gradients=True, gather=lambda x: x)
    accelerator.reduce = lambda x, reduction: x
    accelerator.pad_across_processes = lambda x, dim, pad_index: x
    limits = dict(
        entropy_target=0.2, entropy_coef_delta=0.005, entropy_coef_min=0.0, entropy_coef_max=1.0
    )
    trainer = dict(
        loss_type="bnpo",
        epsilon_low=0.2,
        epsilon_high=0.28,
        beta=0.0,
        importance_sampling_level="token",
    )
    trainer |= dict(
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        accelerator=accelerator,
    )
    trainer |= dict(current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True))
    trainer |= dict(
        _metrics={"train": defaultdict(list)},
        top_entropy_quantile=1.0,
        _entropy_bonus_enabled=False,
    )
    trainer |= dict(entropy_coef=0.0, use_adaptive_entropy=False, _last_world_entropy=math.inf)
    trainer |= dict(_entropy_window_stats=None)
    trainer["args"] = SimpleNamespace(
        delta=None, use_bias_correction_kl=False, **limits | changes.pop("args", {})
    )
    trainer = SimpleNamespace(**trainer | changes)
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    return trainer


def trl_loss(trainer: SimpleNamespace, x: SimpleNamespace) -> torch.Tensor:
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
        x.logprobs,
        x.entropy,
        None,
    )
    ids = torch.zeros(x.mask.shape, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids[:, :1], prompt_mask=torch.ones_like(ids[:, :1]), completion_ids=ids
    )
    inputs |= dict(
        completion_mask=x.mask.long(), advantages=x.advantages, old_per_token_logps=x.old
    )
    return GRPOTrainer._compute_loss(
        trainer, None, inputs | dict(ref_per_token_logps=None, num_items_in_batch=None)
    )


def assert_same_loss(ours: torch.Tensor, theirs: torch.Tensor, x: SimpleNamespace) -> None:
    torch.testing.assert_close(ours, theirs, **TIGHT)
    for leaf in (x.logprobs, x.entropy):
        pair = [
            torch.autograd.grad(y, leaf, retain_graph=True, materialize_grads=True)[0]
            for y in (ours, theirs)
        ]
        torch.testing.assert_close(*pair, **TIGHT)


# ----------------------------------------------------------------------------------------------------------------- TRL


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_80_20_equals_trl(share, seed):
    x = batch(seed)
    keep = controls.top_entropy_tokens(x.entropy, x.mask, share)
    assert torch.equal(keep, trl_trainer().get_high_entropy_mask(x.entropy, x.mask, 1 - share))
    ours, _ = grpo.policy_loss(x.logprobs, x.old, x.advantages, keep, normalizer=x.mask.sum())
    assert_same_loss(ours, trl_loss(trl_trainer(top_entropy_quantile=share), x), x)


@pytest.mark.parametrize("seed", range(3))
def test_fixed_bonus_equals_trl(seed):
    x = batch(seed)
    ours = grpo.policy_loss(x.logprobs, x.old, x.advantages, x.mask)[0]
    ours = ours + controls.entropy_bonus(x.entropy, x.mask, 0.03)
    assert_same_loss(
        ours, trl_loss(trl_trainer(_entropy_bonus_enabled=True, entropy_coef=0.03), x), x
    )


def test_skywork_coefficients_equal_trl_over_a_run():
    """TRL applies the coefficient by the entropy of the step before; the coefficients themselves are the same."""
    limits = dict(
        entropy_target=0.9, entropy_coef_delta=0.02, entropy_coef_min=0.01, entropy_coef_max=0.05
    )
    trainer = trl_trainer(
        _entropy_bonus_enabled=True, use_adaptive_entropy=True, entropy_coef=0.02, args=limits
    )
    coef, seen = 0.02, []
    for i, scale in enumerate([1.0, 0.5, 0.5, 0.5, 1.2, 1.2, 1.2, 0.3]):
        x = batch(i)
        x.entropy = (x.entropy * scale).detach()
        H = x.entropy[x.mask].mean().item()
        now, after = controls.skywork_coefficient(coef, H, 0.9, 0.02, 0.01, 0.05)
        assert now == (coef if H <= 0.9 else 0.0)
        trl_loss(trainer, x)
        assert trainer.entropy_coef == pytest.approx(after)
        coef = after
        seen.append(round(coef, 4))
    assert min(seen) == 0.01 and max(seen) == 0.05 and len(set(seen)) > 2


# -------------------------------------------------------------------------------------------------------- token choice


def test_top_entropy_by_hand():
    entropy = torch.tensor([[0.1, 0.9, 0.5, 99.0], [0.8, 0.2, 99.0, 99.0]])
    mask = entropy < 99
    keep = controls.top_entropy_tokens(entropy, mask, 0.5)  # median of 0.1 0.2 0.5 0.8 0.9
    assert keep.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert not controls.top_entropy_tokens(entropy, torch.zeros_like(mask)).any()
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 20"):
        controls.top_entropy_tokens(entropy, mask, 20)


def test_extreme_tokens_by_hand():
    values = torch.tensor([[5.0, 1.0, 9.0], [3.0, 2.0, 8.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert controls.extreme_tokens(values, mask, 0.5).tolist() == [
        [True, False, False],
        [True, False, False],
    ]
    assert controls.extreme_tokens(values, mask, 0.49, largest=False).tolist() == [
        [False, True, False],
        [False] * 3,
    ]
    assert controls.extreme_tokens(values, mask, 1e-9).sum() == 1  # at least one
    assert not controls.extreme_tokens(values, torch.zeros_like(mask), 0.5).any()
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        controls.extreme_tokens(values, mask, 0)


def test_covariance_is_numpys_token_by_token():
    x = batch()
    cov = controls.covariance(x.logprobs, x.advantages, x.mask)
    A = x.advantages[:, None].expand_as(x.mask)[x.mask].numpy()
    logp = x.logprobs.detach()[x.mask].numpy()
    assert cov[x.mask].mean().item() == pytest.approx(np.cov(A, logp, ddof=0)[0, 1], rel=1e-4)
    np.testing.assert_allclose(cov[x.mask], (A - A.mean()) * (logp - logp.mean()), atol=1e-5)
    assert (cov[~x.mask] == 0).all() and not cov.requires_grad


def test_clip_cov_draws_among_the_range():
    cov = torch.tensor([[0.5, 1.5, 2.0, 4.9, 6.0, 3.0], [1.2, -3.0, 2.2, 2.3, 2.4, 2.5]])
    mask = torch.ones_like(cov, dtype=torch.bool)
    mask[0, 5] = False  # would be in range
    candidates = (cov > 1) & (cov < 5) & mask
    draws = [
        controls.clip_cov_tokens(cov, mask, share=0.3, generator=torch.Generator().manual_seed(s))
        for s in range(40)
    ]
    removed = torch.stack([mask & ~keep for keep in draws])
    assert (removed.flatten(1).sum(dim=1) == 3).all()  # floor(0.3 * 11)
    assert torch.equal(
        removed.any(dim=0), candidates
    )  # all of them, and no other, are drawn in time
    everything = controls.clip_cov_tokens(cov, mask, share=1.0)
    assert torch.equal(mask & ~everything, candidates)  # fewer qualify than the share
    assert torch.equal(controls.clip_cov_tokens(cov, mask, low=10, high=20), mask)


def test_clip_cov_silences_its_tokens_and_no_other():
    x = batch()
    cov = controls.covariance(x.logprobs, x.advantages, x.mask)
    keep = controls.clip_cov_tokens(
        cov, x.mask, share=0.1, low=0.1, generator=torch.Generator().manual_seed(0)
    )
    both = [
        grpo.policy_loss(x.logprobs, x.old, x.advantages, m, normalizer=x.mask.sum())[0]
        for m in (keep, x.mask)
    ]
    clipped, plain = (torch.autograd.grad(loss, x.logprobs)[0] for loss in both)
    assert (plain != clipped).any() and torch.equal(clipped, plain * keep)


def kl_cov_by_loop(x: SimpleNamespace, tokens: list[tuple[int, int]], coef: dict) -> torch.Tensor:
    """sum over tokens of -A ratio, + c |log-ratio| where chosen; divided by the number of tokens."""
    terms = []
    for i, t in x.mask.nonzero().tolist():
        d = x.logprobs[i, t] - x.old[i, t]
        terms.append(-x.advantages[i] * d.exp() + coef.get((i, t), 0.0) * d.abs())
    return torch.stack(terms).sum() / len(terms)


def chosen_by_loop(values: list[tuple[float, tuple]], share: float, largest: bool) -> list[tuple]:
    return [at for _, at in sorted(values, reverse=largest)[: max(1, int(share * len(values)))]]


def covariances_by_loop(x: SimpleNamespace, tokens: list[tuple]) -> list[tuple[float, tuple]]:
    A, logp = [x.advantages[i].item() for i, _ in tokens], [x.logprobs[at].item() for at in tokens]
    a, p = sum(A) / len(A), sum(logp) / len(logp)
    return [((u - a) * (v - p), at) for u, v, at in zip(A, logp, tokens, strict=True)]


@pytest.mark.parametrize("share", [2e-4, 0.03, 0.4])
@pytest.mark.parametrize("name", ["kl_cov", "sent"])
def test_kl_cov_and_sent_equal_a_loop_in_value_and_gradient(name, share):
    x = batch(1, dtype=torch.float64)
    tokens = [tuple(at) for at in x.mask.nonzero().tolist()]
    if name == "kl_cov":
        weights = controls.kl_cov_weights(
            controls.covariance(x.logprobs, x.advantages, x.mask), x.mask, 0.7, share
        )
        coef = dict.fromkeys(chosen_by_loop(covariances_by_loop(x, tokens), share, True), 0.7)
    else:
        weights = controls.sent_weights(x.logprobs, x.advantages, x.entropy, x.mask, 0.3, share)
        low = chosen_by_loop([(x.entropy[at].item(), at) for at in tokens], 0.8, False)
        cov = covariances_by_loop(x, low)
        coef = dict.fromkeys(chosen_by_loop(cov, share, True), 0.6)
        coef |= dict.fromkeys(chosen_by_loop(cov, share, False), 0.15)
    assert not weights.requires_grad and (weights > 0).sum() == len(coef)
    ours = grpo.policy_loss(x.logprobs, x.old, x.advantages, x.mask, **UNCLIPPED)[0]
    ours = ours + controls.log_ratio_penalty(x.logprobs, x.old, weights, x.mask)
    assert_same_loss(ours, kl_cov_by_loop(x, tokens, coef), x)


# ---------------------------------------------------------------------------------------------------- terms of the loss


def test_gradients_of_the_terms_equal_finite_differences():
    x = batch(2, rows=3, length=5, dtype=torch.float64)
    weights, coef = torch.rand(3, 5, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    penalty, bonus = controls.log_ratio_penalty, controls.entropy_bonus
    for n in (None, 17.0):
        assert torch.autograd.gradcheck(
            lambda p, n=n: penalty(p, x.old, weights, x.mask, n), x.logprobs
        )
        assert torch.autograd.gradcheck(lambda h, n=n: bonus(h, x.mask, coef, n), x.entropy)


def test_the_terms_by_hand_with_garbage_at_padding():
    mask = torch.tensor([[True, True], [True, False]])
    entropy = torch.tensor([[1.0, 3.0], [5.0, torch.nan]], requires_grad=True)
    loss = controls.entropy_bonus(entropy, mask, torch.tensor([0.1, 0.2]))
    assert loss.item() == pytest.approx(-(0.1 * 4 + 0.2 * 5) / 3)
    torch.testing.assert_close(
        torch.autograd.grad(loss, entropy)[0], torch.tensor([[-0.1, -0.1], [-0.2, 0.0]]) / 3
    )
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, torch.inf]], requires_grad=True)
    old = torch.tensor([[-1.5, -1.0], [-3.0, 0.0]])
    loss = controls.log_ratio_penalty(
        logprobs, old, torch.tensor([[2.0, 0.5], [9.0, 9.0]]), mask, 10
    )
    assert loss.item() == pytest.approx((2 * 0.5 + 0.5 * 1) / 10)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logprobs)[0], torch.tensor([[0.2, -0.05], [0.0, 0.0]])
    )


def test_micro_batches_add_up_to_the_whole():
    x, coef = batch(), torch.arange(6.0)
    weights, n = torch.rand_like(x.old), x.mask.sum()
    whole = controls.entropy_bonus(x.entropy, x.mask, coef)
    whole = whole + controls.log_ratio_penalty(x.logprobs, x.old, weights, x.mask)
    parts = 0.0
    for s in (slice(1), slice(1, 4), slice(4, 6)):  # the last one has a row without tokens
        parts += controls.entropy_bonus(x.entropy[s], x.mask[s], coef[s], n)
        parts += controls.log_ratio_penalty(x.logprobs[s], x.old[s], weights[s], x.mask[s], n)
    assert_same_loss(parts, whole, x)


# ----------------------------------------------------------------------------------------------------------------- AER


def test_aer_gives_more_to_the_harder():
    accuracy = torch.tensor(
        [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    )
    assert controls.aer_weights(accuracy).tolist() == [0.0, 0.75, 1.0, 0.5]
    assert controls.aer_weights(accuracy, 0.5).tolist() == [0.0, 0.5, 1.0, 0.0]
    with pytest.raises(ValueError, match="threshold must be positive, got 0"):
        controls.aer_weights(accuracy, 0)


def test_aer_coefficient_by_hand_and_at_rest():
    assert controls.aer_coefficient(0.1, entropy=0.3, target=0.8, rate=0.02) == pytest.approx(0.11)
    assert controls.aer_coefficient(0.1, entropy=9.0, target=0.8, rate=0.02) == 0.0
    assert controls.aer_coefficient(0.99, entropy=0.0, target=0.8, rate=0.5) == 1.0
    coef = 0.0
    for _ in range(500):  # a policy whose entropy is 0.2 + 3 coef
        coef = controls.aer_coefficient(coef, 0.2 + 3 * coef, target=0.8, rate=0.02)
    assert 0.2 + 3 * coef == pytest.approx(0.8, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- advantages


def test_ecvgpo_by_hand():
    """Positive ones with 1 and 3 nats a token, mean 2: weights 1/2 and 3/2."""
    advantages = torch.tensor([[1.0, 2.0, -1.0, -2.0]])
    logprobs = torch.tensor([[[-1.0, -1.0], [-5.0, -1.0], [-7.0, -7.0], [-0.1, -0.1]]])
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    shaped = partial(controls.ecvgpo_advantages, advantages, logprobs, mask)
    torch.testing.assert_close(shaped(), torch.tensor([[0.5, 3.0, -1.0, -2.0]]), **TIGHT)
    with pytest.raises(ValueError, match="power must not be negative, got -1.0"):
        shaped(power=-1.0)
    assert torch.equal(shaped(power=0.0), advantages)


def test_ecvgpo_does_not_depend_on_length_padding_or_other_groups():
    x = batch(3)
    advantages, logprobs, mask = (
        y.detach().reshape(2, 3, *y.shape[1:]) for y in (x.advantages, x.logprobs, x.mask)
    )
    shaped = controls.ecvgpo_advantages(advantages, logprobs, mask)
    assert (shaped != advantages).any() and shaped.isfinite().all()  # one of the responses is empty
    torch.testing.assert_close(
        controls.ecvgpo_advantages(
            advantages[:1], logprobs[:1].masked_fill(~mask[:1], torch.nan), mask[:1]
        ),
        shaped[:1],
    )
    twice = [torch.cat([y, y], dim=2) for y in (logprobs, mask)]
    torch.testing.assert_close(controls.ecvgpo_advantages(advantages, *twice), shaped)
    none = controls.ecvgpo_advantages(-advantages.abs(), logprobs, mask)
    assert torch.equal(none, -advantages.abs())


def test_symmetric_kl_is_unbiased_and_never_negative():
    """Its expectation under q, over the whole vocabulary, is (KL(q || p) + KL(p || q)) / 2."""
    q, p = (
        torch.log_softmax(torch.randn(5, 30, dtype=torch.float64) * 2, dim=-1) for _ in range(2)
    )
    estimate = controls.symmetric_kl(q, p)
    assert (estimate >= 0).all() and (controls.symmetric_kl(q, q) == 0).all()
    both = [
        kl_divergence(Categorical(logits=a), Categorical(logits=b)) for a, b in ((q, p), (p, q))
    ]
    torch.testing.assert_close((q.exp() * estimate).sum(dim=-1), sum(both) / 2)
    torch.testing.assert_close(estimate, (q - p) * (1 - (p - q).exp()) / 2)
    assert controls.symmetric_kl(torch.tensor(-200.0), torch.tensor(0.0)).isfinite()


def test_vogue_by_hand():
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    divergence = torch.tensor([[1.0, 3.0], [1.0, 3.0], [100.0, 100.0], [50.0, torch.nan]])
    mask = torch.ones(4, 2, dtype=torch.bool)
    mask[3, 1] = False
    shaped = advantages + controls.shaped_advantages(
        advantages, divergence, mask, scale=0.1, cap=2.0
    )
    torch.testing.assert_close(
        shaped, torch.tensor([1.2, -0.8, 0.75, -0.25])
    )  # the last two: half of |A|
    assert torch.equal(shaped.sign(), advantages.sign())


# ---------------------------------------------------------------------------------------------------- order of the data


def test_semantic_entropy_by_hand():
    assert str(controls.semantic_entropy(["4"] * 8)) == "0.0"
    assert controls.semantic_entropy(list("abcd")) == pytest.approx(math.log(4))
    assert controls.semantic_entropy(["a", "b", "a", "a"]) == pytest.approx(
        -0.75 * math.log(0.75) + 0.25 * math.log(4)
    )
    assert controls.semantic_entropy([None, "a", None, "a"]) == pytest.approx(
        math.log(2)
    )  # None is one cluster
    with pytest.raises(ValueError, match="no answers"):
        controls.semantic_entropy([])


def test_semantic_entropy_with_the_rewards_grader():
    answers = ["0.5", "1/2", r"\frac{1}{2}", None, "3"]
    assert controls.semantic_entropy(answers, rewards.grade) == pytest.approx(
        -0.6 * math.log(0.6) - 0.4 * math.log(0.2)
    )
    assert controls.semantic_entropy(answers) == pytest.approx(math.log(5))


def test_curriculum_goes_from_low_to_high_in_equal_stages():
    entropies = [0.7, 0.0, 1.4, 0.7, 0.2]
    assert controls.curriculum(entropies) == [[1, 4, 0], [3, 2]]
    assert controls.curriculum(entropies, 1) == [[1, 4, 0, 3, 2]]
    assert controls.curriculum(entropies, 5) == [[1], [4], [0], [3], [2]]
    with pytest.raises(
        ValueError, match=r"stages must be from 1 to the number of rows \(5\), got 6"
    ):
        controls.curriculum(entropies, 6)


# ------------------------------------------------------------------------------------------------------------ training


CHOOSE = ("top_entropy", "clip_cov", "kl_cov", "sent")
BONUS = ("bonus", "skywork", "aer")


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """run(name, **changes) -> metrics. A random model never answers right: its responses are marked 0, 1/2, 1; it is
    never sure either, so Clip-Cov's range begins lower and Skywork's target is high."""
    marks = lambda completions, **_: [i % 3 / 2 for i in range(len(completions))]  # noqa: E731
    monkeypatch.setattr(rewards, "accuracy_reward", marks)
    monkeypatch.setattr(controls, "clip_cov_tokens", partial(controls.clip_cov_tokens, low=0.0))

    def train(name: str, **changes) -> list[dict]:
        own = dict(
            updates_per_step=2,
            cov_share=0.2,
            entropy_coef=0.1,
            skywork_target=99.0,
            self_check=False,
        )
        own |= dict(skywork_step=0.005, skywork_max=1.0)
        main(short(tiny, tmp_path / name, **own | changes))
        return [comparable(m) for m in metrics_of(tmp_path / name)]

    return train


@pytest.mark.parametrize("condition", ["clean", "sampled"])
@pytest.mark.parametrize("control", CONTROLS[1:])
def test_each_control_trains_with_egas(run, control, condition):
    first, second = run("run", update_control=control, condition=condition)
    assert all(map(math.isfinite, (first | second).values())) and first["grad_norm"] > 0
    assert (first["control/tokens"] > 0) == (control in CHOOSE)
    assert (first["control/bonus"] > 0) == (control in BONUS)
    assert (first["control/loss"] > 0) == (control in ("kl_cov", "sent"))
    assert (first["control/loss"] < 0) == (control in BONUS)
    if control == "bonus":  # one condition's entropy or the other's, in nats: of log(vocabulary)
        assert first["control/loss"] == pytest.approx(-0.1 * first["entropy/clean"], rel=0.02)
    if control == "top_entropy":
        assert first["control/tokens"] == pytest.approx(0.8, abs=0.05)


def test_each_control_changes_the_update_of_grpo_and_micro_batches_do_not(run):
    plain = {n: run(f"plain-{n}", intervention=n, steps=1)[0] for n in ("none", "random")}
    assert "control/loss" not in plain["none"]
    for control in CONTROLS[1:]:
        changes = dict(
            update_control=control, intervention="random" if control == "vogue" else "none", steps=1
        )
        (whole,), (micro,) = (
            run(f"{control}-{m}", prompts_per_step=4, micro_prompts=m, **changes) for m in (2, 1)
        )
        assert whole == pytest.approx(micro, rel=1e-3, abs=1e-5), control
        (ours,) = run(control, **changes)
        assert ours["grad_norm"] != pytest.approx(
            plain[changes["intervention"]]["grad_norm"], rel=1e-5
        ), control


@pytest.mark.parametrize("control", ["skywork", "aer"])
def test_an_adaptive_coefficient_moves_and_is_resumed(run, control):
    changes = dict(
        update_control=control, save_every=1, aer_rate=0.02, aer_target=2.0, intervention="none"
    )
    straight = run("straight", steps=3, **changes)
    bonus = [m["control/bonus"] for m in straight]
    assert bonus[0] < bonus[1] < bonus[2]
    if control == "skywork":
        assert bonus == pytest.approx([0.1, 0.105, 0.11])
    run("resumed", steps=2, **changes)
    assert run("resumed", steps=3, resume=True, **changes)[-1] == pytest.approx(
        straight[-1], rel=1e-5
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(update_control="clip"),
            "update_control must be one of none, bonus, skywork, .*, got 'clip'",
        ),
        (dict(update_control="sent"), "updates_per_step >= 2 with kl_cov or sent"),
        (dict(update_control="kl_cov"), "updates_per_step >= 2 with kl_cov or sent"),
        (dict(update_control="vogue", intervention="none"), "vogue needs an intervention"),
        (dict(top_entropy=20), "0 <= top_entropy <= 1"),
        (dict(cov_share=0), "0 < cov_share <= 1"),
        (dict(aer_threshold=0), "aer_threshold > 0"),
        (dict(vogue_cap=0), "vogue_cap > 0"),
    ],
)
def test_a_control_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_on_policy_the_log_ratio_penalty_has_no_gradient():
    """Why one update per batch is refused for KL-Cov and SENT."""
    x = batch()
    loss = controls.log_ratio_penalty(
        x.logprobs, x.logprobs.detach(), torch.ones_like(x.old), x.mask
    )
    assert loss == 0 and (torch.autograd.grad(loss, x.logprobs)[0] == 0).all()


@pytest.mark.parametrize("control", ["bonus", "aer", "ecvgpo", "vogue", "top_entropy"])
def test_a_step_under_control_has_the_gradient_of_the_slow_one(
    processor, tmp_path, monkeypatch, control
):
    """The loss by its formula, a response at a time, from the reference's log-probs and entropies in float64."""
    changes = dict(
        update_control=control,
        entropy_coef=0.3,
        vogue_visual=0.05,
        ecvgpo_power=0.5,
        condition="clean",
    )
    changes |= dict(vogue_entropy=0.03)
    seen = step.train(processor, tmp_path, monkeypatch, micro_prompts=2, **changes)
    model, advantages = step.new_policy(processor).model, step.expected_advantages(processor, seen)
    rows, sampling = (
        [],
        [],
    )  # (prompt, A, log-probs, entropies) on the clean image; the same where it was sampled
    for p, row in enumerate(seen.rows):
        for g, tokens in enumerate(seen.sampled[0][p] + seen.sampled[1][p]):
            prompt = (model, processor, row["problem"], row["images"], tokens, 0.8)
            rows.append((p, advantages[p][g], *reference.score(*prompt)))
            with torch.no_grad():
                sampling.append(
                    reference.score(*prompt, seen.attacked[p]) if g >= 3 else rows[-1][2:]
                )
    everything = torch.cat([h.detach() for _, h in sampling])
    cut = np.quantile(everything.numpy(), 0.8)
    surprise = [-logp.mean().item() for logp, _ in sampling]
    loss = 0.0
    for i, (p, A, logp, H) in enumerate(rows):
        keep, c = torch.ones_like(logp), 0.3 if control == "bonus" else 0.0
        if control == "top_entropy":
            keep = (sampling[i][1] >= cut).double()
        if control == "aer":
            texts = [
                processor.tokenizer.decode(t, skip_special_tokens=True)
                for g in seen.sampled
                for t in g[p]
            ]
            c = 0.3 * (1 - np.mean([step.mark(text) for text in texts]))
        if control == "ecvgpo" and A > 0:
            good = [surprise[j] for j, row in enumerate(rows) if row[0] == p and row[1] > 0]
            A = A * (surprise[i] / np.mean(good)) ** 0.5
        if control == "vogue":
            d = (sampling[i][0] - logp.detach()) * (i % 5 >= 3)  # G = 5, of which 2 adversarial
            visual, own = (
                0.05 * (d * (1 - (-d).exp())).mean().item() / 2,
                0.03 * sampling[i][1].mean().item(),
            )
            A = A + min(visual, abs(A) / 2) + min(own, abs(A) / 2)
        loss = loss - (keep * A * (logp - logp.detach()).exp()).sum() - c * H.sum()
    grads = torch.autograd.grad(loss / len(everything), list(model.parameters()))
    step.assert_gradients_equal(seen.grads[0], grads, 1e-4)
