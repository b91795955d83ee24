"""One whole training step of train_saei.main against the slow, obvious one of reference.py.

main runs as it is, on a tiny sharp float64 policy. The test only listens: to what was encoded, what
was sampled and to the gradients that reach the optimiser (SGD in AdamW's place). The reference gets
the sampled tokens. It finds TsEC's choice, the attacked images, log-probs, advantages, loss and
gradients again, one response at a time.
"""

import copy
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from conftest import lines_of
from PIL import Image

import rewards
import train_saei
from demo.make_demo import build_model
from runtime import data, distributed
from vlm.engine import OwnSampler
from vlm.policy import Policy


def picture(width: int, height: int, seed: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def row(problem: str, answer: str, *images: Image.Image) -> dict:
    return {"problem": problem, "answer": answer, "images": list(images)}


ROWS = [
    row("How many pips?", "1", picture(96, 64, 0)),
    row("Which picture shows the red die?", "2", picture(64, 64, 1), picture(32, 96, 2)),
    row("red", "3", picture(64, 64, 3)),
    row("How many pips do the blue and red dice show?", "4", picture(64, 32, 4)),
]
TEXT_ONLY = row("What is 3 + 4?", "7")
EPS, PGD_STEPS, LOW, HIGH, CLIP = 4 / 255, 3, 0.25, 0.75, (0.2, 0.28)
STEP_SIZE = 2.5 * EPS / PGD_STEPS


def mark(text: str) -> float:
    """A stand-in for accuracy that a random policy can earn: 0, 0.5 or 1 by the text."""
    return zlib.crc32(text.encode()) % 3 / 2


def marks(completions: list[str], **_) -> list[float]:
    return [mark(text) for text in completions]


def new_policy(processor) -> Policy:
    model = reference.double(reference.sharpen(build_model(processor.tokenizer)))
    policy = Policy(model, copy.deepcopy(processor))
    policy.eos_ids += list(range(40))  # end tokens are frequent, so that responses differ in length
    return policy


class Listener(torch.optim.SGD):
    """In AdamW's place. grads: of each step, each parameter's."""

    grads: list[list[torch.Tensor]]

    def __init__(self, params, lr, weight_decay, **options):
        super().__init__(params, lr=lr)

    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        self.grads.append([p.grad.clone() for p in parameters if p.grad is not None])
        super().step()


def train(processor, out, monkeypatch, rows=ROWS, **changes) -> SimpleNamespace:
    """Run one step of main.

    -> rows in the order used, clean and attacked images, sampled tokens (of the clean ones, of the
    adversarial ones), gradients, metrics
    """
    seen = SimpleNamespace(grads=[], sampled=[], images=[])
    encode, sample = Policy.encode, Policy.sample

    def listen_encode(self, problems, images, max_tokens=None):
        by_problem = {row["problem"]: row for row in rows}
        seen.rows = [by_problem[problem] for problem in problems]
        return encode(self, problems, images, max_tokens)

    def listen_sample(self, prompts, n, *rest, **options):
        responses = sample(self, prompts, n, *rest, **options)
        tokens = []
        for row, mask in zip(responses.tokens, responses.mask, strict=True):
            tokens.append(row[mask].tolist())
        seen.sampled.append([tokens[i : i + n] for i in range(0, len(tokens), n)])
        seen.images.append([prompts[p : p + 1].images for p in range(len(prompts))])
        return responses

    settings = dict(model="tiny", output=str(out), steps=1, prompts_per_step=len(rows), seed=3)
    settings |= dict(rollouts=5, adversarial_rollouts=2, max_new_tokens=7, temperature=0.8)
    settings |= dict(eps=EPS, pgd_steps=PGD_STEPS, tsec_low=LOW, tsec_high=HIGH, lr=1e-3)
    settings |= dict(max_grad_norm=1e9, self_check=False)  # the check would be listened to as well
    with monkeypatch.context() as patch:
        patch.setattr(Listener, "grads", seen.grads, raising=False)
        patch.setattr(torch.optim, "AdamW", Listener)
        patch.setattr(Policy, "encode", listen_encode)
        patch.setattr(Policy, "sample", listen_sample)
        patch.setattr(Policy, "from_pretrained", lambda *args: new_policy(processor))
        found = data.Rows(rows.__getitem__, range(len(rows)))
        patch.setattr(data, "load_rows", lambda *args, **kwargs: found)
        patch.setattr(rewards, "accuracy_reward", marks)
        train_saei.main(train_saei.load_config(**settings | changes))
    (seen.metrics,) = lines_of(out / "metrics.jsonl")
    seen.clean, seen.attacked = seen.images[0], seen.images[-1]
    return seen


def expected_advantages(processor, seen) -> list[list[float]]:
    groups = []
    for clean, adversarial in zip(*seen.sampled, strict=True):
        scores = []
        for tokens in clean + adversarial:
            scores.append(0.9 * mark(processor.tokenizer.decode(tokens, skip_special_tokens=True)))
        groups.append(reference.advantages(scores))
    return groups


def score_prompt(model, processor, seen, p: int, condition: str) -> list[torch.Tensor]:
    """Log-probs of all responses of prompt p, the clean ones first, each (length,)."""
    row, found = seen.rows[p], []
    prompt = (model, processor, row["problem"], row["images"])
    for kind, responses in enumerate(seen.sampled):
        on_attacked = kind == 1 and condition == "sampled"
        images = seen.attacked[p] if on_attacked else None  # None: the processor's pixel_values
        for tokens in responses[p]:
            found.append(reference.score(*prompt, tokens, 0.8, images)[0])
    return found


def assert_gradients_equal(
    ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float
) -> None:
    """|a - b| <= tolerance * the largest entry, tensor by tensor. Every tensor has a gradient."""
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=tolerance * b.abs().max().item(), rtol=0)


def tsec_and_attack(model, processor, seen) -> dict[str, float]:
    """Steps 2 and 3 again, one prompt at a time: the images are compared, the metrics returned."""
    sure = total = 0
    selected, attacked_entropy, with_images = [], [], []
    for p, row in enumerate(seen.rows):
        prompt, clean = (model, processor, row["problem"], row["images"]), seen.sampled[0][p]
        chosen = []
        with torch.no_grad():
            for tokens in clean:
                entropy = reference.score(*prompt, tokens, 0.8)[1]
                chosen.append(reference.moderate(entropy, LOW, HIGH))
                selected.append(float(reference.mean_kept(entropy, chosen[-1])))
            value = reference.image_entropy(*prompt, seen.attacked[p], clean, chosen, 0.8)
        attacked_entropy.append(float(value))
        with_images.append(len(row["images"]) > 0)
        settings = (EPS, STEP_SIZE, PGD_STEPS, 0.8)
        if not row["images"]:
            continue
        images, certainty = reference.attack(*prompt, seen.clean[p], clean, chosen, *settings)
        compared = zip(seen.attacked[p], images, seen.clean[p], certainty, strict=True)
        for ours, theirs, x0, c in compared:
            assert (ours - theirs)[c > 1e-4].abs().max() <= 1e-6
            assert (ours - x0).abs().max() <= EPS + 1e-6 and ours.min() >= 0 and ours.max() <= 1
            assert (ours - x0).abs().mean() > EPS / 3  # it did something
            sure, total = sure + int((c > 1e-4).sum()), total + c.numel()
    assert sure / total > 0.999
    found = {"entropy/selected": selected, "entropy/attacked": attacked_entropy}
    found["attack/linf"] = EPS * np.array(with_images)  # text alone counts 0
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("condition", ["clean", "sampled"])
def test_a_step_equals_the_slow_one(processor, tmp_path, monkeypatch, condition):
    """Images to 1e-6 where the gradient is above 1e-4 of its mean (over 99.9% of the pixels).

    The loss to 1e-5, the gradient of each weight to 1e-4 of its largest entry.
    """
    rows = [*ROWS[:3], TEXT_ONLY]
    seen = train(processor, tmp_path, monkeypatch, rows, condition=condition)
    model = new_policy(processor).model
    assert len({len(tokens) for kind in seen.sampled for group in kind for tokens in group}) > 3
    for name, value in tsec_and_attack(model, processor, seen).items():
        assert seen.metrics[name] == pytest.approx(value, abs=1e-5), name
    assert seen.metrics["entropy/attacked"] > seen.metrics["entropy/selected"]

    # steps 5 and 6: advantages, loss, gradients
    new = []
    for p in range(len(rows)):
        new += score_prompt(model, processor, seen, p, condition)
    advantages = sum(expected_advantages(processor, seen), [])
    assert any(advantages)
    loss = reference.clipped_loss(new, new, advantages, *CLIP)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert seen.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert len(seen.grads) == 1
    assert_gradients_equal(seen.grads[0], grads, 1e-4)
    norm = sum(float(g.square().sum()) for g in grads) ** 0.5
    assert norm > 0.1 and seen.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.fixture(scope="module", params=["clean", "sampled"])
def together(request, processor, tmp_path_factory):
    """A step with all 4 prompts in one micro-batch."""
    with pytest.MonkeyPatch.context() as patch:
        out = tmp_path_factory.mktemp("together") / request.param
        seen = train(processor, out, patch, condition=request.param, kl_coef=0.1)
    seen.condition = request.param
    return seen


@pytest.mark.parametrize("micro", [1, 2])
def test_trap_15_micro_batches_give_the_same_gradient(
    together, processor, tmp_path, monkeypatch, micro
):
    """1, 2 or all 4 prompts at a time, of very different numbers of tokens."""
    changes = dict(condition=together.condition, micro_prompts=micro, kl_coef=0.1)
    seen = train(processor, tmp_path, monkeypatch, **changes)
    assert len({sum(map(len, group)) for group in seen.sampled[0]}) > 1
    assert seen.sampled == together.sampled and len(seen.grads) == 1
    assert_gradients_equal(seen.grads[0], together.grads[0], 1e-5)
    for name in ("loss", "grad_norm", "entropy/attacked", "clip/high"):
        assert seen.metrics[name] == pytest.approx(together.metrics[name], abs=1e-5)


@pytest.mark.parametrize(
    "changes, passes",
    [
        # of prompts: clean, attacked, attacked for entropy/attacked; apart also attack and update
        (dict(pgd_steps=1), (3, 5)),
        (dict(pgd_steps=1, condition="sampled"), (4, 6)),
        (dict(pgd_steps=1, updates_per_step=2, micro_prompts=2), (6, 9)),
        (dict(intervention="none"), (1, 2)),
        (dict(pgd_steps=2, gradient_checkpointing=True, micro_responses=2), (4, 6)),
        (dict(pgd_steps=1, kl_coef=0.1, rows=[*ROWS[:2], TEXT_ONLY, ROWS[2]]), (4, 6)),
    ],
)
def test_one_prompt_pass_equals_separate_ones(processor, tmp_path, monkeypatch, changes, passes):
    """One pass serves sampling, attack and update: the same gradients, fewer passes."""
    read, count, steps = Policy.read, [], []

    def listen(self, prompts, *rest, **options):
        count.append(len(prompts))
        return read(self, prompts, *rest, **options)

    monkeypatch.setattr(Policy, "read", listen)
    for name in ("one", "apart"):
        steps.append(train(processor, tmp_path / name, monkeypatch, **changes))
        steps[-1].passes = len(count)
        count.clear()
        monkeypatch.setattr(distributed, "one_prompt_pass", lambda accelerator: False)
    one, apart = steps
    assert one.sampled == apart.sampled and len(one.grads) == len(apart.grads)
    for ours, theirs in zip(one.grads, apart.grads, strict=True):
        assert_gradients_equal(ours, theirs, 1e-5)
    assert (one.passes, apart.passes) == passes


@pytest.mark.parametrize("condition", ["clean", "sampled"])
def test_a_step_in_parts_equals_a_whole_one(processor, tmp_path, monkeypatch, condition):
    """As an engine samples. The longest responses of the parts differ in length."""
    changes = dict(condition=condition, pgd_steps=1, updates_per_step=2, max_new_tokens=30, seed=4)
    whole = train(processor, tmp_path / "whole", monkeypatch, **changes)
    halves = [slice(0, 2), slice(2, 4)]
    monkeypatch.setattr(OwnSampler, "parts", lambda *_: halves)
    parts = train(processor, tmp_path / "parts", monkeypatch, **changes)
    longest = [max(len(y) for group in clean for y in group) for clean in parts.sampled[:2]]
    assert longest[0] != longest[1] and sum(parts.sampled, []) == sum(whole.sampled, [])
    for ours, theirs in zip(parts.grads, whole.grads, strict=True):
        assert_gradients_equal(ours, theirs, 1e-5)


def test_the_two_conditions_differ(processor, tmp_path, monkeypatch):
    """The same rollouts, another image in the update: not the same gradient."""
    clean = train(processor, tmp_path / "c", monkeypatch, condition="clean")
    sampled = train(processor, tmp_path / "s", monkeypatch, condition="sampled")
    assert clean.sampled == sampled.sampled
    a, b = (torch.cat([g.flatten() for g in seen.grads[0]]) for seen in (clean, sampled))
    assert (a - b).norm() > 1e-2 * a.norm()


def test_two_updates_of_a_step_equal_the_slow_ones(processor, tmp_path, monkeypatch):
    """The second half of the prompts is updated off-policy.

    Old log-probs are from before the step, clipping is at work, k3 is to the initial policy.
    Gradients to 1e-4 of the largest entry, metrics to 1e-5.
    """
    kl = 0.3
    changes = dict(updates_per_step=2, micro_prompts=1, kl_coef=kl, condition="sampled")
    seen = train(processor, tmp_path, monkeypatch, **changes)
    model = new_policy(processor).model
    advantages = expected_advantages(processor, seen)
    with torch.no_grad():
        old = [score_prompt(model, processor, seen, p, "sampled") for p in range(4)]
    found = []
    assert len(seen.grads) == 2
    for prompts, ours in zip([(0, 1), (2, 3)], seen.grads, strict=True):
        new, before, adv = [], [], []
        for p in prompts:
            new += score_prompt(model, processor, seen, p, "sampled")
            before += old[p]
            adv += advantages[p]
        k3 = reference.k3_mean(new, before)
        loss = reference.clipped_loss(new, before, adv, *CLIP) + kl * k3
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert_gradients_equal(ours, grads, 1e-4)
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 1e-3 * g
        low = high = tokens = 0
        for x, y, a in zip(new, before, adv, strict=True):
            ratio = (x - y).exp()
            low += int((ratio < 0.8).sum()) if a < 0 else 0
            high += int((ratio > 1.28).sum()) if a > 0 else 0
            tokens += len(ratio)
        norm = sum(float(g.square().sum()) for g in grads) ** 0.5
        found.append([loss.item(), k3.item(), low / tokens, high / tokens, norm])
    assert found[1][1] > 1e-3  # k3
    names = ("loss", "kl", "clip/low", "clip/high", "grad_norm")
    for name, value in zip(names, np.mean(found, axis=0), strict=True):
        assert value != 0 and seen.metrics[name] == pytest.approx(value, abs=1e-5, rel=1e-4), name


def test_the_gradient_is_clipped_once_a_step(processor, tmp_path, monkeypatch):
    """max_grad_norm scales the whole step's gradient, not a micro-batch's."""
    free = train(processor, tmp_path / "free", monkeypatch)
    tight = train(processor, tmp_path / "tight", monkeypatch, max_grad_norm=0.01, micro_prompts=1)
    norm = free.metrics["grad_norm"]
    assert norm > 0.1 and tight.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert_gradients_equal(tight.grads[0], [g * 0.01 / norm for g in free.grads[0]], 1e-4)


@pytest.mark.parametrize("intervention", ["random", "noise"])
def test_micro_batches_give_the_same_random_images(processor, tmp_path, monkeypatch, intervention):
    """The noise follows from (seed, step, row), not from the prompts changed along with it."""
    found = []
    for micro in (4, 1):
        changes = dict(intervention=intervention, micro_prompts=micro)
        seen = train(processor, tmp_path / str(micro), monkeypatch, **changes)
        found.append(sum(seen.attacked, []))
    for a, b, x in zip(*found, sum(seen.clean, []), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, x)


def test_a_prompt_without_images_alone_in_its_micro_batch(processor, tmp_path, monkeypatch):
    """Nothing to attack: its adversarial responses are further clean ones."""
    rows = [TEXT_ONLY, ROWS[0]]
    alone = train(processor, tmp_path / "1", monkeypatch, rows, micro_prompts=1)
    together = train(processor, tmp_path / "2", monkeypatch, rows, micro_prompts=2)
    assert_gradients_equal(alone.grads[0], together.grads[0], 1e-5)


@pytest.mark.parametrize("row", [ROWS[1], TEXT_ONLY], ids=["two sizes", "text alone"])
def test_images_of_any_number_and_size_are_logged(processor, tmp_path, monkeypatch, row):
    train(processor, tmp_path, monkeypatch, [row])
    lines = lines_of(tmp_path / "samples.jsonl")
    assert len(lines) == 5
    for line in lines:
        if row["images"]:
            assert Image.open(tmp_path / line["picture"]).size == (96, 96)  # 64 + 32 wide
        else:
            assert line["picture"] is None


def test_rescued_and_lost_prompts_are_counted(processor, tmp_path, monkeypatch):
    """Rescued: right on the attacked image alone. Lost: right on the clean image alone."""
    seen = train(processor, tmp_path, monkeypatch, rollouts=2, adversarial_rollouts=1, seed=6)
    found = []
    for groups in zip(*seen.sampled, strict=True):  # one response on each image
        texts = [processor.tokenizer.decode(x, skip_special_tokens=True) for (x,) in groups]
        found.append(tuple(mark(text) > 0 for text in texts))
    assert {(True, False), (False, True)} <= set(found)  # the seed is one that shows both
    assert seen.metrics["rescued"] == found.count((False, True)) / len(found)
    assert seen.metrics["lost"] == found.count((True, False)) / len(found)


def test_the_two_rounds_draw_numbers_of_their_own(processor, tmp_path, monkeypatch):
    """With eps 0 both rounds look at the same image, and still no group holds everything twice."""
    seen = train(processor, tmp_path, monkeypatch, eps=0.0, rollouts=4)
    for clean, adversarial in zip(*seen.sampled, strict=True):
        assert clean != adversarial
