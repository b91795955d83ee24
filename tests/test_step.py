"""One whole training step of train_saei.main against the slow, obvious one of reference.py.

main runs as it is, on a tiny sharp float64 policy; the test only listens: to what was encoded, what was sampled and to
the gradients that reach the optimiser (SGD in AdamW's place). The reference gets the sampled tokens and finds TsEC's
choice, the attacked images, log-probs, advantages, loss and gradients again, a response at a time.
"""

import copy
import json
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from PIL import Image

import rewards
import train_saei
from demo.make_demo import build_model
from runtime import data
from vlm.policy import Policy


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(
        0, 256, (height // 8, width // 8, 3), dtype=np.uint8
    )
    return Image.fromarray(pixels).resize((width, height))


ROWS = [
    {"images": [picture(96, 64, 0)], "problem": "How many pips?", "answer": "1"},
    {
        "images": [picture(64, 64, 1), picture(32, 96, 2)],
        "problem": "Which picture shows the red die?",
        "answer": "2",
    },
    {"images": [picture(64, 64, 3)], "problem": "red", "answer": "3"},
    {
        "images": [picture(64, 32, 4)],
        "problem": "How many pips do the blue and red dice show?",
        "answer": "4",
    },
]
TEXT_ONLY = {"images": [], "problem": "What is 3 + 4?", "answer": "7"}
EPS, STEP_SIZE, LOW, HIGH, CLIP = 4 / 255, 3 / 255, 0.25, 0.75, (0.2, 0.28)


def mark(text: str) -> float:
    """A stand-in for accuracy that a random policy can earn: 0, 0.5 or 1 by the text."""
    return zlib.crc32(text.encode()) % 3 / 2


def new_policy(processor) -> Policy:
    policy = Policy(
        reference.double(reference.sharpen(build_model(processor.tokenizer))),
        copy.deepcopy(processor),
    )
    policy.eos_ids += list(range(40))  # end tokens are frequent, so that responses differ in length
    return policy


def train(processor, out, monkeypatch, rows=ROWS, lr=1e-3, **changes) -> SimpleNamespace:
    """Run one step of main. -> rows in the order used, clean and attacked images, responses, gradients, metrics"""
    seen = SimpleNamespace(grads=[], sampled=[], clean=[], attacked=[])

    class Listener(torch.optim.SGD):
        def __init__(self, params, lr, weight_decay):
            super().__init__(params, lr=lr)

        def step(self, closure=None):
            seen.grads.append([p.grad.clone() for p in self.param_groups[0]["params"]])
            super().step()

    def encode(self, problems, images, max_tokens=None):
        order = [
            next(i for i, row in enumerate(rows) if row["problem"] == problem)
            for problem in problems
        ]
        seen.rows = [rows[i] for i in order]
        return original["encode"](self, problems, images, max_tokens)

    def sample(self, prompts, n, *args, **kwargs):
        responses = original["sample"](self, prompts, n, *args, **kwargs)
        tokens = [
            row[keep].tolist() for row, keep in zip(responses.tokens, responses.mask, strict=True)
        ]
        seen.sampled.append([tokens[i : i + n] for i in range(0, len(tokens), n)])
        seen.attacked = [
            prompts[p : p + 1].images for p in range(len(prompts))
        ]  # the second call's stay
        seen.clean = seen.clean or seen.attacked
        return responses

    original = {"encode": Policy.encode, "sample": Policy.sample}
    with monkeypatch.context() as m:
        m.setattr(torch.optim, "AdamW", Listener)
        m.setattr(Policy, "encode", encode)
        m.setattr(Policy, "sample", sample)
        m.setattr(Policy, "from_pretrained", lambda *args: new_policy(processor))
        m.setattr(
            data,
            "load_rows",
            lambda *args, **kwargs: [row | {"row": i} for i, row in enumerate(rows)],
        )
        m.setattr(
            rewards,
            "accuracy_reward",
            lambda completions, **_: [mark(text) for text in completions],
        )
        settings = dict(
            model="tiny", output=str(out), steps=1, prompts_per_step=len(rows), rollouts=5, lr=lr
        )
        settings |= dict(
            adversarial_rollouts=2, max_new_tokens=7, temperature=0.8, max_grad_norm=1e9, seed=3
        )
        settings |= dict(
            eps=EPS, step_size=STEP_SIZE, pgd_steps=2, tsec_low=LOW, tsec_high=HIGH, log_prompts=0
        )
        settings |= dict(self_check=False)  # it encodes as well, and the test listens
        train_saei.main(train_saei.Config(**settings | changes))
    seen.metrics = json.loads((out / "metrics.jsonl").read_text())
    return seen


def expected_advantages(processor, seen) -> list[list[float]]:
    groups = []
    for group in zip(*seen.sampled, strict=True):  # (clean, fresh) of a prompt
        texts = [
            processor.tokenizer.decode(tokens, skip_special_tokens=True)
            for tokens in sum(group, [])
        ]
        groups.append(reference.advantages([0.9 * mark(text) for text in texts]))
    return groups


def score_prompt(model, processor, seen, p: int, condition: str) -> list[torch.Tensor]:
    """Log-probs of all responses of prompt p, the clean ones first, each (length,)."""
    row, rows = seen.rows[p], []
    for responses, images in zip(
        (g[p] for g in seen.sampled), (None, seen.attacked[p]), strict=True
    ):
        images = (
            images if condition == "sampled" else None
        )  # None: the processor's own pixel_values
        for tokens in responses:
            rows.append(
                reference.score(
                    model, processor, row["problem"], row["images"], tokens, 0.8, images
                )[0]
            )
    return rows


def assert_gradients_equal(
    ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float
) -> None:
    """|a - b| <= tolerance * the largest entry, tensor by tensor; every tensor has a gradient at all."""
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=tolerance * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("condition", ["clean", "sampled"])
def test_a_step_equals_the_slow_one(processor, tmp_path, monkeypatch, condition):
    """Attacked images to 1e-6 where the gradient is above 1e-4 of its mean (over 99.9% of the pixels); the loss to
    1e-5, the gradient of each weight to 1e-4 of its largest entry."""
    rows = [*ROWS[:3], TEXT_ONLY]
    seen = train(processor, tmp_path, monkeypatch, rows, condition=condition)
    model = new_policy(processor).model
    (clean, fresh), advantages = seen.sampled, expected_advantages(processor, seen)
    assert len({len(tokens) for group in clean + fresh for tokens in group}) > 3

    # steps 2 and 3: TsEC and the attack
    sure = total = 0
    selected, attacked_entropy = [], []
    for p, row in enumerate(seen.rows):
        prompt = (model, processor, row["problem"], row["images"])
        with torch.no_grad():
            entropies = [reference.score(*prompt, tokens, 0.8)[1] for tokens in clean[p]]
        keeps = [reference.moderate(h, LOW, HIGH) for h in entropies]
        selected += [reference.mean_kept(h, keep) for h, keep in zip(entropies, keeps, strict=True)]
        with torch.no_grad():
            value = reference.image_entropy(*prompt, seen.attacked[p], clean[p], keeps, 0.8)
        attacked_entropy.append(float(value))
        if not row["images"]:
            continue
        images, certainty = reference.attack(
            *prompt, seen.clean[p], clean[p], keeps, EPS, STEP_SIZE, 2, 0.8
        )
        for ours, theirs, x0, c in zip(
            seen.attacked[p], images, seen.clean[p], certainty, strict=True
        ):
            assert (ours - theirs)[c > 1e-4].abs().max() <= 1e-6
            assert (ours - x0).abs().max() <= EPS + 1e-6 and ours.min() >= 0 and ours.max() <= 1
            assert (ours - x0).abs().mean() > EPS / 3  # it did something
            sure, total = sure + int((c > 1e-4).sum()), total + c.numel()
    assert sure / total > 0.999
    assert seen.metrics["entropy/selected"] == pytest.approx(float(np.mean(selected)), abs=1e-5)
    assert seen.metrics["entropy/attacked"] == pytest.approx(np.mean(attacked_entropy), abs=1e-5)
    assert seen.metrics["entropy/attacked"] > seen.metrics["entropy/selected"]
    with_images = [len(images) > 0 for images in seen.attacked]  # text alone counts 0
    assert seen.metrics["attack/linf"] == pytest.approx(EPS * np.mean(with_images), abs=1e-6)

    # steps 5 and 6: advantages, loss, gradients
    new = [
        row for p in range(len(rows)) for row in score_prompt(model, processor, seen, p, condition)
    ]
    flat = sum(advantages, [])
    assert any(flat)
    loss = reference.clipped_loss(new, new, flat, *CLIP)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert seen.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert len(seen.grads) == 1
    assert_gradients_equal(seen.grads[0], grads, 1e-4)
    norm = sum(float(g.square().sum()) for g in grads) ** 0.5
    assert norm > 0.1 and seen.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_the_two_conditions_differ(processor, tmp_path, monkeypatch):
    """The same rollouts, another image in the update: not the same gradient."""
    clean = train(processor, tmp_path / "c", monkeypatch, condition="clean")
    sampled = train(processor, tmp_path / "s", monkeypatch, condition="sampled")
    assert clean.sampled == sampled.sampled
    a, b = (torch.cat([g.flatten() for g in seen.grads[0]]) for seen in (clean, sampled))
    assert (a - b).norm() > 1e-2 * a.norm()


@pytest.mark.parametrize("condition, micro", [("clean", 1), ("sampled", 1), ("sampled", 2)])
def test_trap_15_micro_batches_give_the_same_gradient(
    processor, tmp_path, monkeypatch, condition, micro
):
    """1, 2 or all 4 prompts at a time, of very different numbers of tokens: the gradient agrees to 1e-5."""
    runs = [
        train(
            processor,
            tmp_path / str(m),
            monkeypatch,
            condition=condition,
            micro_prompts=m,
            kl_coef=0.1,
        )
        for m in (4, micro)
    ]
    assert len({sum(map(len, group)) for group in runs[0].sampled[0]}) > 1
    for other in runs[1:]:
        assert other.sampled == runs[0].sampled and len(other.grads) == 1
        assert_gradients_equal(other.grads[0], runs[0].grads[0], 1e-5)
        for name in ("loss", "grad_norm", "entropy/attacked", "clip/high"):
            assert other.metrics[name] == pytest.approx(runs[0].metrics[name], abs=1e-5)


def test_two_updates_of_a_step_equal_the_slow_ones(processor, tmp_path, monkeypatch):
    """The second half of the prompts is updated off-policy: old log-probs from before the step, clipping at work, k3 to
    the initial policy. Gradients to 1e-4 of the largest entry, metrics to 1e-5."""
    lr, kl = 0.001, 0.3
    changes = dict(updates_per_step=2, micro_prompts=1, kl_coef=kl, condition="sampled")
    seen = train(processor, tmp_path, monkeypatch, lr=lr, **changes)
    model = new_policy(processor).model
    advantages = expected_advantages(processor, seen)
    with torch.no_grad():
        old = [score_prompt(model, processor, seen, p, "sampled") for p in range(4)]
    losses, kls, norms, clipped = [], [], [], []
    assert len(seen.grads) == 2
    for half, ours in zip([(0, 1), (2, 3)], seen.grads, strict=True):
        new = [row for p in half for row in score_prompt(model, processor, seen, p, "sampled")]
        before, adv = sum((old[p] for p in half), []), sum((advantages[p] for p in half), [])
        k3 = reference.k3_mean(new, before)
        loss = reference.clipped_loss(new, before, adv, *CLIP) + kl * k3
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert_gradients_equal(ours, grads, 1e-4)
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= lr * g
        ratios = [(n - o).exp() for n, o in zip(new, before, strict=True)]
        high = sum(int((r > 1.28).sum()) for r, a in zip(ratios, adv, strict=True) if a > 0)
        low = sum(int((r < 0.8).sum()) for r, a in zip(ratios, adv, strict=True) if a < 0)
        tokens = sum(map(len, ratios))
        (
            losses.append(loss.item()),
            kls.append(k3.item()),
            clipped.append((low / tokens, high / tokens)),
        )
        norms.append(sum(float(g.square().sum()) for g in grads) ** 0.5)
    low, high = np.mean(clipped, axis=0)
    assert low > 0 and high > 0 and kls[1] > 1e-3
    assert seen.metrics["clip/low"] == pytest.approx(low, abs=1e-6)
    assert seen.metrics["clip/high"] == pytest.approx(high, abs=1e-6)
    assert seen.metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert seen.metrics["kl"] == pytest.approx(np.mean(kls), abs=1e-5)
    assert seen.metrics["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-4)


def test_the_gradient_is_clipped_once_a_step(processor, tmp_path, monkeypatch):
    """max_grad_norm scales the whole step's gradient, not a micro-batch's."""
    free = train(processor, tmp_path / "free", monkeypatch)
    tight = train(processor, tmp_path / "tight", monkeypatch, max_grad_norm=0.01, micro_prompts=1)
    norm = free.metrics["grad_norm"]
    assert norm > 0.1 and tight.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert_gradients_equal(tight.grads[0], [g * 0.01 / norm for g in free.grads[0]], 1e-4)


def test_micro_batches_give_the_same_random_start(processor, tmp_path, monkeypatch):
    """The noise a picture starts from follows from (seed, step, row), not from the prompts attacked along with it."""
    runs = [
        train(
            processor,
            tmp_path / str(m),
            monkeypatch,
            random_start=True,
            micro_prompts=m,
            step_size=0.0,
        )
        for m in (4, 1)
    ]
    for a, b in zip(sum(runs[0].attacked, []), sum(runs[1].attacked, []), strict=True):
        assert torch.equal(a, b)


def test_a_prompt_without_pictures_alone_in_its_micro_batch(processor, tmp_path, monkeypatch):
    """Nothing to attack: its adversarial responses are further clean ones."""
    rows = [TEXT_ONLY, ROWS[0]]
    alone = train(processor, tmp_path / "1", monkeypatch, rows, micro_prompts=1)
    together = train(processor, tmp_path / "2", monkeypatch, rows, micro_prompts=2)
    assert_gradients_equal(alone.grads[0], together.grads[0], 1e-5)


def test_pictures_of_any_number_and_size_are_logged(processor, tmp_path, monkeypatch):
    train(processor, tmp_path, monkeypatch, [*ROWS[:2], TEXT_ONLY], log_prompts=3)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 5


def test_rescued_and_lost_prompts_are_counted(processor, tmp_path, monkeypatch):
    """Rescued: something right on the attacked image and nothing on the clean one; lost: the other way round."""
    seen = train(processor, tmp_path, monkeypatch, rollouts=2, adversarial_rollouts=1, seed=5)
    decode = lambda group: any(
        mark(processor.tokenizer.decode(x, skip_special_tokens=True)) for x in group
    )  # noqa: E731
    found = [(decode(clean), decode(fresh)) for clean, fresh in zip(*seen.sampled, strict=True)]
    assert {(True, False), (False, True)} < set(found)  # the seed is one that shows both
    assert seen.metrics["rescued"] == found.count((False, True)) / len(found)
    assert seen.metrics["lost"] == found.count((True, False)) / len(found)


def test_the_two_rounds_draw_numbers_of_their_own(processor, tmp_path, monkeypatch):
    """With an attack of size 0 both rounds look at the same image, and still no group holds everything twice."""
    seen = train(
        processor, tmp_path, monkeypatch, eps=0.0, step_size=0.0, rollouts=4, adversarial_rollouts=2
    )
    for clean, fresh in zip(*seen.sampled, strict=True):
        assert clean != fresh
