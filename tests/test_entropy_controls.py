"""entropy_controls.py: closed forms, TRL's own code, plain loops; each control in training."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from trl.trainer.grpo_trainer import GRPOTrainer

import grpo
import rewards
import train_saei
from demo.make_demo import build_model
from demo.task import make_row
from extras import apply_control
from extras import entropy_controls as controls
from runtime import args
from runtime.rollouts import TrainingBatch
from vlm.policy import Policy

TIGHT = {"atol": 1e-6, "rtol": 1e-5}
METHODS = args.CONTROLS[1:]  # without "none"


def batch(seed: int = 0, rows: int = 6, length: int = 40, dtype=torch.float32) -> SimpleNamespace:
    """Responses of different lengths, one of them empty, with off-policy log-probs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    lengths[-1] = 0
    old = -3 * torch.rand(rows, length, generator=generator, dtype=dtype)
    logprobs = old + 0.4 * torch.randn(rows, length, generator=generator, dtype=dtype)
    entropy = 2 * torch.rand(rows, length, generator=generator, dtype=dtype)
    return SimpleNamespace(
        mask=torch.arange(length) < lengths,
        old=old,
        logprobs=logprobs.requires_grad_(),
        entropy=entropy.requires_grad_(),
        advantages=torch.randn(rows, generator=generator, dtype=dtype),
    )


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True, materialize_grads=True)[0]


def assert_same_loss(ours: Tensor, theirs: Tensor, x: SimpleNamespace) -> None:
    torch.testing.assert_close(ours, theirs, **TIGHT)
    for leaf in (x.logprobs, x.entropy):
        torch.testing.assert_close(gradient(ours, leaf), gradient(theirs, leaf), **TIGHT)


# ------------------------------------------------------------------------------------------ TRL


def trl_trainer(limits: dict | None = None, **changes) -> SimpleNamespace:
    """A stand-in with what GRPOTrainer._compute_loss reads."""
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )
    options = dict(entropy_target=0.2, entropy_coef_delta=0.005)
    options |= dict(entropy_coef_min=0.0, entropy_coef_max=1.0) | (limits or {})
    trainer = SimpleNamespace(
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, **options),
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        loss_type="bnpo",
        epsilon_low=0.2,
        epsilon_high=0.28,
        beta=0.0,
        importance_sampling_level="token",
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        entropy_coef=0.0,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=False,
        _last_world_entropy=math.inf,
        _entropy_window_stats=None,
        _metrics={"train": defaultdict(list)},
    )
    vars(trainer).update(changes)
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    return trainer


def trl_loss(trainer: SimpleNamespace, x: SimpleNamespace) -> Tensor:
    scored = (x.logprobs, x.entropy, None)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: scored
    ids = torch.zeros(x.mask.shape, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids[:, :1],
        prompt_mask=torch.ones_like(ids[:, :1]),
        completion_ids=ids,
        completion_mask=x.mask.long(),
        advantages=x.advantages,
        old_per_token_logps=x.old,
        ref_per_token_logps=None,
        num_items_in_batch=None,
    )
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_80_20_equals_trl(share, seed):
    x = batch(seed)
    loss_mask = controls.top_entropy_tokens(x.entropy, x.mask, share)
    theirs = trl_trainer().get_high_entropy_mask(x.entropy, x.mask, 1 - share)
    assert torch.equal(loss_mask, theirs)
    ours, _ = grpo.policy_loss(x.logprobs, x.old, x.advantages, loss_mask, normalizer=x.mask.sum())
    assert_same_loss(ours, trl_loss(trl_trainer(top_entropy_quantile=share), x), x)


@pytest.mark.parametrize("seed", range(3))
def test_fixed_bonus_equals_trl(seed):
    x = batch(seed)
    ours = grpo.policy_loss(x.logprobs, x.old, x.advantages, x.mask)[0]
    ours = ours + controls.entropy_bonus(x.entropy, x.mask, 0.03)
    trainer = trl_trainer(_entropy_bonus_enabled=True, entropy_coef=0.03)
    assert_same_loss(ours, trl_loss(trainer, x), x)


def test_skywork_coefficients_equal_trl_over_a_run():
    """TRL applies the coefficient by the entropy of the step before. Its values are the same."""
    limits = dict(entropy_target=0.9, entropy_coef_delta=0.02)
    limits |= dict(entropy_coef_min=0.01, entropy_coef_max=0.05)
    settings = dict(_entropy_bonus_enabled=True, use_adaptive_entropy=True, entropy_coef=0.02)
    trainer, coef, seen = trl_trainer(limits, **settings), 0.02, set()
    for i, scale in enumerate([1.0, 0.5, 0.5, 0.5, 1.2, 1.2, 1.2, 0.3]):
        x = batch(i)
        x.entropy = (x.entropy * scale).detach()
        mean = x.entropy[x.mask].mean().item()
        now, following = controls.skywork_coefficient(coef, mean, 0.9, 0.02, 0.01, 0.05)
        assert now == (coef if mean <= 0.9 else 0.0)
        trl_loss(trainer, x)
        assert trainer.entropy_coef == pytest.approx(following)
        coef = following
        seen.add(round(coef, 4))
    assert min(seen) == 0.01 and max(seen) == 0.05 and len(seen) > 2


@pytest.mark.parametrize(
    "entropy, now, following",
    [(0.1, 0.002, 0.0021), (0.2, 0.002, 0.0021), (0.21, 0.0, 0.0019)],  # at the target: below
)
def test_skywork_by_hand(entropy, now, following):
    found = controls.skywork_coefficient(0.002, entropy, target=0.2)
    assert found == (now, pytest.approx(following))


# ------------------------------------------------------------------------------ choice of tokens


def test_top_entropy_by_hand():
    entropy = torch.tensor([[0.1, 0.9, 0.5, 99.0], [0.8, 0.2, 99.0, 99.0]])
    mask = entropy < 99
    chosen = controls.top_entropy_tokens(entropy, mask, 0.5)  # median of 0.1 0.2 0.5 0.8 0.9
    assert chosen.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert not controls.top_entropy_tokens(entropy, torch.zeros_like(mask)).any()


def test_extreme_tokens_by_hand():
    values = torch.tensor([[5.0, 1.0, 9.0], [3.0, 2.0, 8.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    largest = controls.extreme_tokens(values, mask, 0.5)
    assert largest.nonzero().tolist() == [[0, 0], [1, 0]]
    smallest = controls.extreme_tokens(values, mask, 0.49, largest=False)
    assert smallest.nonzero().tolist() == [[0, 1]]
    assert controls.extreme_tokens(values, mask, 1e-9).sum() == 1  # at least one
    assert not controls.extreme_tokens(values, torch.zeros_like(mask), 0.5).any()


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
    candidates, ever = (cov > 1) & (cov < 5) & mask, torch.zeros_like(mask)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        removed = mask & ~controls.clip_cov_tokens(cov, mask, share=0.3, generator=generator)
        assert removed.sum() == 3  # floor(0.3 * 11)
        ever |= removed
    assert torch.equal(ever, candidates)  # all of them are drawn in time, and no other
    everything = controls.clip_cov_tokens(cov, mask, share=1.0)
    assert torch.equal(mask & ~everything, candidates)  # fewer qualify than the share
    assert torch.equal(controls.clip_cov_tokens(cov, mask, low=10, high=20), mask)


def test_clip_cov_silences_its_tokens_and_no_other():
    x = batch()
    cov = controls.covariance(x.logprobs, x.advantages, x.mask)
    generator = torch.Generator().manual_seed(0)
    loss_mask = controls.clip_cov_tokens(cov, x.mask, share=0.1, low=0.1, generator=generator)
    tensors, tokens = (x.logprobs, x.old, x.advantages), x.mask.sum()
    plain = gradient(grpo.policy_loss(*tensors, x.mask)[0], x.logprobs)
    treated = gradient(grpo.policy_loss(*tensors, loss_mask, normalizer=tokens)[0], x.logprobs)
    assert (plain != treated).any() and torch.equal(treated, plain * loss_mask)


def extremes_by_loop(values: list[float], tokens: list, share: float, largest: bool) -> list:
    count = max(1, int(share * len(values)))
    ordered = sorted(zip(values, tokens, strict=True), reverse=largest)
    return [token for _, token in ordered[:count]]


def covariances_by_loop(x: SimpleNamespace, tokens: list[tuple[int, int]]) -> list[float]:
    A = [x.advantages[i].item() for i, _ in tokens]
    logp = [x.logprobs[token].item() for token in tokens]
    mean_a, mean_p = sum(A) / len(A), sum(logp) / len(logp)
    return [(a - mean_a) * (p - mean_p) for a, p in zip(A, logp, strict=True)]


@pytest.mark.parametrize("share", [2e-4, 0.03, 0.4])
@pytest.mark.parametrize("name", ["kl_cov", "sent"])
def test_kl_cov_and_sent_equal_a_loop_in_value_and_gradient(name, share):
    """sum over tokens of -A ratio + c |log-ratio|, divided by the number of tokens."""
    x = batch(1, dtype=torch.float64)
    tokens = [tuple(token) for token in x.mask.nonzero().tolist()]
    if name == "kl_cov":
        cov = controls.covariance(x.logprobs, x.advantages, x.mask)
        weights = controls.kl_cov_weights(cov, x.mask, 0.7, share)
        chosen = extremes_by_loop(covariances_by_loop(x, tokens), tokens, share, largest=True)
        coef = dict.fromkeys(chosen, 0.7)
    else:
        weights = controls.sent_weights(x.logprobs, x.advantages, x.entropy, x.mask, 0.3, share)
        entropies = [x.entropy[token].item() for token in tokens]
        low = extremes_by_loop(entropies, tokens, 0.8, largest=False)
        cov = covariances_by_loop(x, low)
        coef = dict.fromkeys(extremes_by_loop(cov, low, share, largest=True), 0.6)
        coef |= dict.fromkeys(extremes_by_loop(cov, low, share, largest=False), 0.15)
    assert not weights.requires_grad and (weights > 0).sum() == len(coef)
    terms = []
    for i, t in tokens:
        d = x.logprobs[i, t] - x.old[i, t]
        terms.append(-x.advantages[i] * d.exp() + coef.get((i, t), 0.0) * d.abs())
    unclipped = dict(clip_low=1.0, clip_high=math.inf)
    ours = grpo.policy_loss(x.logprobs, x.old, x.advantages, x.mask, **unclipped)[0]
    ours = ours + controls.log_ratio_penalty(x.logprobs, x.old, weights, x.mask)
    assert_same_loss(ours, torch.stack(terms).mean(), x)


# ----------------------------------------------------------------------------- terms of the loss


@pytest.mark.parametrize("normalizer", [None, 17.0])
def test_gradients_of_the_terms_equal_finite_differences(normalizer):
    x = batch(2, rows=3, length=5, dtype=torch.float64)
    weights, coef = torch.rand(3, 5, dtype=torch.float64), torch.rand(3, dtype=torch.float64)

    def penalty(logprobs: Tensor) -> Tensor:
        return controls.log_ratio_penalty(logprobs, x.old, weights, x.mask, normalizer)

    def bonus(entropy: Tensor) -> Tensor:
        return controls.entropy_bonus(entropy, x.mask, coef, normalizer)

    assert torch.autograd.gradcheck(penalty, x.logprobs)
    assert torch.autograd.gradcheck(bonus, x.entropy)


def test_the_terms_by_hand_with_garbage_at_padding():
    mask = torch.tensor([[True, True], [True, False]])
    entropy = torch.tensor([[1.0, 3.0], [5.0, torch.nan]], requires_grad=True)
    loss = controls.entropy_bonus(entropy, mask, torch.tensor([0.1, 0.2]))
    assert loss.item() == pytest.approx(-(0.1 * 4 + 0.2 * 5) / 3)
    expected = torch.tensor([[-0.1, -0.1], [-0.2, 0.0]]) / 3
    torch.testing.assert_close(gradient(loss, entropy), expected)
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, torch.inf]], requires_grad=True)
    old, weights = torch.tensor([[-1.5, -1.0], [-3.0, 0.0]]), torch.tensor([[2.0, 0.5], [9.0, 9.0]])
    loss = controls.log_ratio_penalty(logprobs, old, weights, mask, 10)
    assert loss.item() == pytest.approx((2 * 0.5 + 0.5 * 1) / 10)
    expected = torch.tensor([[0.2, -0.05], [0.0, 0.0]])
    torch.testing.assert_close(gradient(loss, logprobs), expected)


def test_micro_batches_add_up_to_the_whole():
    x, coef = batch(), torch.arange(6.0)
    weights, tokens = torch.rand_like(x.old), x.mask.sum()

    def terms(rows: slice, normalizer: Tensor | None = None) -> Tensor:
        mask = x.mask[rows]
        bonus = controls.entropy_bonus(x.entropy[rows], mask, coef[rows], normalizer)
        pair = x.logprobs[rows], x.old[rows]
        return bonus + controls.log_ratio_penalty(*pair, weights[rows], mask, normalizer)

    chunks = (slice(1), slice(1, 4), slice(4, 6))  # the last one has a row without tokens
    parts = sum(terms(chunk, tokens) for chunk in chunks)
    assert_same_loss(parts, terms(slice(None)), x)


def test_on_policy_the_log_ratio_penalty_has_no_gradient():
    """Why one update per batch is refused for KL-Cov and SENT."""
    x = batch()
    weights = torch.ones_like(x.old)
    loss = controls.log_ratio_penalty(x.logprobs, x.logprobs.detach(), weights, x.mask)
    assert loss == 0 and (gradient(loss, x.logprobs) == 0).all()


# ------------------------------------------------------------------------------------------ AER


def test_aer_gives_more_to_the_harder():
    accuracy = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    assert controls.aer_weights(accuracy).tolist() == [0.0, 0.75, 1.0, 0.5]
    assert controls.aer_weights(accuracy, 0.5).tolist() == [0.0, 0.5, 1.0, 0.0]


def test_aer_coefficient_by_hand_and_at_rest():
    assert controls.aer_coefficient(0.1, entropy=0.3, target=0.8, rate=0.02) == pytest.approx(0.11)
    assert controls.aer_coefficient(0.1, entropy=9.0, target=0.8, rate=0.02) == 0.0
    assert controls.aer_coefficient(0.99, entropy=0.0, target=0.8, rate=0.5) == 1.0
    coef = 0.0
    for _ in range(500):  # a policy whose entropy is 0.2 + 3 coef
        coef = controls.aer_coefficient(coef, 0.2 + 3 * coef, target=0.8, rate=0.02)
    assert 0.2 + 3 * coef == pytest.approx(0.8, abs=1e-6)


# ----------------------------------------------------------------------------------- advantages


def test_ecvgpo_by_hand():
    """The positive responses have 1 and 3 nats per token, mean 2: weights 1/2 and 3/2."""
    advantages = torch.tensor([[1.0, 2.0, -1.0, -2.0]])
    logprobs = torch.tensor([[[-1.0, -1.0], [-5.0, -1.0], [-7.0, -7.0], [-0.1, -0.1]]])
    shaped = partial(controls.ecvgpo_advantages, advantages, logprobs, logprobs < 0)
    torch.testing.assert_close(shaped(), torch.tensor([[0.5, 3.0, -1.0, -2.0]]), **TIGHT)
    assert torch.equal(shaped(power=0.0), advantages)


def test_ecvgpo_does_not_depend_on_length_padding_or_other_groups():
    x = batch(3)
    advantages = x.advantages.unflatten(0, (2, 3))
    logprobs, mask = x.logprobs.detach().unflatten(0, (2, 3)), x.mask.unflatten(0, (2, 3))
    shaped = controls.ecvgpo_advantages(advantages, logprobs, mask)
    assert (shaped != advantages).any() and shaped.isfinite().all()  # one response is empty
    garbage = logprobs.masked_fill(~mask, torch.nan)
    alone = controls.ecvgpo_advantages(advantages[:1], garbage[:1], mask[:1])
    torch.testing.assert_close(alone, shaped[:1])
    twice = [torch.cat([y, y], dim=2) for y in (logprobs, mask)]
    torch.testing.assert_close(controls.ecvgpo_advantages(advantages, *twice), shaped)
    negative = -advantages.abs()
    assert torch.equal(controls.ecvgpo_advantages(negative, logprobs, mask), negative)


def test_symmetric_kl_is_unbiased_and_never_negative():
    """Its expectation under q, over the whole vocabulary, is (KL(q || p) + KL(p || q)) / 2."""
    q, p = (2 * torch.randn(2, 5, 30, dtype=torch.float64)).log_softmax(dim=-1)
    estimate = controls.symmetric_kl(q, p)
    assert (estimate >= 0).all() and (controls.symmetric_kl(q, q) == 0).all()
    Q, P = Categorical(logits=q), Categorical(logits=p)
    expected = (kl_divergence(Q, P) + kl_divergence(P, Q)) / 2
    torch.testing.assert_close((q.exp() * estimate).sum(dim=-1), expected)
    torch.testing.assert_close(estimate, (q - p) * (1 - (p - q).exp()) / 2)
    assert controls.symmetric_kl(torch.tensor(-200.0), torch.tensor(0.0)).isfinite()


def test_vogue_by_hand():
    """min(0.1 * mean, |A| / 2): the cap binds for the last two."""
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    divergence = torch.tensor([[1.0, 3.0], [1.0, 3.0], [100.0, 100.0], [50.0, torch.nan]])
    bonus = controls.shaped_advantages(advantages, divergence, ~divergence.isnan(), scale=0.1)
    torch.testing.assert_close(bonus, torch.tensor([0.2, 0.2, 0.25, 0.25]))


def test_vogue_does_not_mix_an_engine_s_log_probs_with_the_trainer_s(policy):
    """Both images are scored by the trainer, where an engine sampled."""
    row = make_row("shifted/train", 0)
    prompts = policy.encode([row["problem"]] * 2, [row["images"]] * 2)
    attacked = prompts.with_images([(x + 0.05).clamp(0, 1) for x in prompts.images])
    sampled = policy.sample(attacked, 2, [1, 2], 6)
    tensors = dict.fromkeys(TrainingBatch._fields, torch.zeros(2, 2, 6))
    whole = TrainingBatch(**tensors)
    found = []
    for engine, shift in (("own", 0.0), ("vllm", 0.5)):
        adversarial = replace(sampled, logprobs=sampled.logprobs + shift)
        rollouts = SimpleNamespace(prompts=prompts, attacked=attacked, adversarial=adversarial)
        options = {"temperature": 1.0, "engine": [engine]}
        found.append(apply_control.branch_divergence(rollouts, whole, policy, options, micro=1))
    mask = sampled.mask.unflatten(0, (2, 2))
    assert found[0][mask].abs().max() > 1e-6
    torch.testing.assert_close(found[0][mask], found[1][mask], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "function, value, message",
    [
        (controls.top_entropy_tokens, 20, r"share must be in \[0, 1\], got 20"),
        (controls.extreme_tokens, 0, r"share must be in \(0, 1\], got 0"),
        (controls.ecvgpo_advantages, -1.0, "power must not be negative, got -1.0"),
        (controls.aer_weights, 0, "threshold must be positive, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(function, value, message):
    x = torch.ones(1, 2, 3)
    tensors = {controls.ecvgpo_advantages: (x[..., 0], x, x > 0), controls.aer_weights: (x[0],)}
    with pytest.raises(ValueError, match=message):
        function(*tensors.get(function, (x, x > 0)), value)


# ------------------------------------------------------------------------------------- training

CHOOSE = ("top_entropy", "clip_cov", "kl_cov", "sent")
BONUS = ("bonus", "skywork", "aer")


def train(folder, **options) -> list[dict[str, float]]:
    """The comparable metrics of each step of a short run."""
    short = dict(split="plain/train", steps=2, prompts_per_step=2, rollouts=4, self_check=False)
    short |= dict(adversarial_rollouts=2, max_new_tokens=6, pgd_steps=1, lr=1e-3, save_every=9)
    train_saei.main(train_saei.load_config(output=str(folder), **short | options))
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line).items()
        found.append({k: v for k, v in metrics if not k.startswith(("seconds", "memory"))})
    return found


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """run(folder, **options) -> metrics of a random model with two updates per step.

    It never answers right, so its responses are marked 0, 1/2, 1. It is never sure either, so
    Clip-Cov's range begins lower and Skywork's target is high.
    """

    def marks(completions, **_):
        return [i % 3 / 2 for i in range(len(completions))]

    monkeypatch.setattr(rewards, "accuracy_reward", marks)
    monkeypatch.setattr(controls, "clip_cov_tokens", partial(controls.clip_cov_tokens, low=0.0))

    def train_tiny(folder: str, **options) -> list[dict[str, float]]:
        chosen = dict(updates_per_step=2, cov_share=0.2, entropy_coef=0.1, skywork_target=99.0)
        return train(tmp_path / folder, model=tiny, **chosen | options)

    return train_tiny


@pytest.fixture(scope="module")
def plain():
    """Metrics of a plain run, filled by the first test that needs them."""
    return {}


@pytest.mark.parametrize("control", METHODS)
def test_each_control_trains_changes_the_update_and_micro_batches_do_not(run, plain, control):
    options = dict(prompts_per_step=4, micro_prompts=2, steps=1)
    if not plain:
        plain.update(*run("plain", **options))
        assert "control/loss" not in plain
    options["update_control"] = control
    (clean,) = run("clean", **options)
    assert clean["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-5)
    options |= dict(condition="sampled", intervention="random")
    (sampled,) = run("sampled", **options)
    (micro,) = run("micro", **options | dict(micro_prompts=1))
    assert sampled == pytest.approx(micro, rel=1e-3, abs=1e-5)
    for metrics in (clean, sampled):
        assert all(map(math.isfinite, metrics.values())) and metrics["grad_norm"] > 0
        assert (metrics["control/tokens"] > 0) == (control in CHOOSE)
        assert (metrics["control/bonus"] > 0) == (control in BONUS)
        assert (metrics["control/loss"] > 0) == (control in ("kl_cov", "sent"))
        assert (metrics["control/loss"] < 0) == (control in BONUS)
        if control == "bonus":  # nearly log(vocabulary) nats on either image
            near = pytest.approx(-0.1 * metrics["entropy/clean"], rel=0.02)
            assert metrics["control/loss"] == near
        if control == "top_entropy":
            assert metrics["control/tokens"] == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("control", ["skywork", "aer"])
def test_an_adaptive_coefficient_moves_and_is_resumed(run, control):
    options = dict(update_control=control, save_every=1, aer_target=2.0, intervention="none")
    straight = run("straight", steps=3, **options)
    bonus = [metrics["control/bonus"] for metrics in straight]
    assert bonus[0] < bonus[1] < bonus[2]
    if control == "skywork":  # steps of entropy_coef / 10
        assert bonus == pytest.approx([0.1, 0.11, 0.12])
    run("resumed", steps=2, **options)
    resumed = run("resumed", steps=3, resume=True, **options)
    assert resumed[-1] == pytest.approx(straight[-1], rel=1e-5)


def test_skyworks_coefficient_is_limited_to_five_times_its_start():
    control = args.ControlArgs(update_control="skywork", entropy_coef=0.1, skywork_target=1.0)
    x, state, seen = torch.zeros(1, 2, 3), {}, []
    for _ in range(50):
        treated = controls.treat(control, x > -1, x, x, x[..., 0], x[..., 0], 0.5, state)
        seen.append(treated.entropy_coef.mean().item())
    assert max(seen) == seen[-1] == pytest.approx(0.5) and seen[0] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(update_control="clip"), "update_control.*clip"),
        (dict(update_control="sent"), "updates_per_step >= 2 with sent"),
        (dict(update_control="kl_cov"), "updates_per_step >= 2 with kl_cov"),
        (dict(update_control="vogue", intervention="none"), "an intervention with vogue"),
        (dict(top_entropy=20), "top_entropy=20.*at most 1"),
        (dict(cov_share=0), "cov_share=0.*above 0"),
        (dict(penalty_coef=0), "penalty_coef=0.*above 0"),
    ],
)
def test_a_control_that_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train_saei.load_config(**options)


# --------------------------------------------------------------- a step against its slow formula


def controlled_loss(control: str, policy: Policy, sampled, temperature: float) -> Tensor:
    """The loss of one on-policy update by its formula, scored a response at a time.

    Its own plain statements of bonus, AER, ECVGPO, VOGUE and 80/20, without entropy_controls.py.
    """
    P, loss, tokens = len(sampled.prompts), 0.0, 0
    n_clean, n_adversarial = (len(part.tokens) // P for part in sampled.responses)
    sampling = torch.cat([part.entropy[part.mask] for part in sampled.responses])
    cut = np.quantile(sampling.double().numpy(), 0.8)
    for p in range(P):
        A = sampled.advantages[p].tolist()
        numbers = [(0, p * n_clean + i) for i in range(n_clean)]
        numbers += [(1, p * n_adversarial + i) for i in range(n_adversarial)]
        responses = []  # (log-probs, entropies) on the clean image, the same as sampled
        for part, i in numbers:
            source = sampled.responses[part]
            mask = source.mask[i]
            ids = source.tokens[i, mask][None]
            prompt = sampled.prompts[p : p + 1]
            logp, H = policy.score(prompt, ids, torch.ones_like(ids).bool(), temperature)
            responses.append((logp[0], H[0], source.logprobs[i, mask], source.entropy[i, mask]))
        surprises = [-sampled_logp.mean() for _, _, sampled_logp, _ in responses]
        good = [s for s, a in zip(surprises, A, strict=True) if a > 0]
        accuracy = sampled.scores["accuracy"][p].double().mean().item()
        for i, (logp, H, sampled_logp, sampled_H) in enumerate(responses):
            chosen, coef, a = torch.ones_like(logp), 0.0, A[i]
            if control == "bonus":
                coef = 0.3
            elif control == "aer":
                coef = 0.3 * (1 - accuracy)
            elif control == "top_entropy":
                chosen = (sampled_H.double() >= cut).float()
            elif control == "ecvgpo" and a > 0:
                a = a * surprises[i] / (sum(good) / len(good))
            elif control == "vogue":
                bonus = min(0.4 * sampled_H.mean(), abs(a) / 2)
                if i >= n_clean:
                    d = sampled_logp - logp.detach()
                    bonus += min((d * (1 - (-d).exp()) / 2).mean(), abs(a) / 2)
                a = a + bonus
            ratio = (logp - logp.detach()).exp()
            loss = loss - (chosen * a * ratio).sum() - coef * H.sum()
            tokens += len(logp)
    return loss / tokens


@pytest.mark.parametrize("control", ["bonus", "aer", "ecvgpo", "vogue", "top_entropy"])
def test_a_step_under_control_has_the_gradient_of_its_formula(
    control, processor, tmp_path, monkeypatch
):
    policy = Policy(reference.sharpen(build_model(processor.tokenizer)), processor)
    policy.eos_ids += list(range(40))  # so that responses differ in length
    seen = SimpleNamespace()
    original = train_saei.update

    def update(config, run, wrapped, reference_policy, optimizer, sampled, passes, micro, step):
        loss = controlled_loss(control, policy, sampled, config.saei.temperature)
        seen.expected = torch.autograd.grad(loss, list(policy.parameters()))
        take_step = optimizer.step

        def step_and_keep():
            seen.gradients = [p.grad.clone() for p in policy.parameters()]
            take_step()

        monkeypatch.setattr(optimizer, "step", step_and_keep)
        return original(
            config, run, wrapped, reference_policy, optimizer, sampled, passes, micro, step
        )

    def marks(completions, **_):
        return [(i % 3) / 2 for i in range(len(completions))]

    monkeypatch.setattr(train_saei, "update", update)
    monkeypatch.setattr(args.ModelArgs, "load", lambda self, *rest, **settings: policy)
    monkeypatch.setattr(rewards, "accuracy_reward", marks)
    options = dict(update_control=control, entropy_coef=0.3, max_grad_norm=1e9, steps=1)
    train(tmp_path, **options, rollouts=5, temperature=0.3, eps=0.01, micro_prompts=2)
    ours = torch.cat([g.flatten() for g in seen.gradients])
    expected = torch.cat([g.flatten() for g in seen.expected])
    assert expected.norm() > 0.1
    assert (ours - expected).norm() < 1e-3 * expected.norm()
