"""egas.py: PGD against closed forms and torchattacks. Every output is verified.

Tests named test_trap_NN guard against a failure seen in other projects.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st

import egas
from egas import diffusion_noise, linf_step, psnr, random_signs
from tsec import select_tokens, selective_entropy, token_entropy

EPS = 8 / 255
ROUNDING = 1e-6  # float32 next to 1; an 8-bit level is 4e-3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform in [0, 1], with a tenth of the pixels at 0 or 1, as drawings have."""
    x = torch.rand(shape, generator=seeded(seed))
    extreme = torch.rand(shape, generator=seeded(seed + 1)) < 0.1
    return torch.where(extreme, x.round(), x)


def verify(attacked, clean, eps: float) -> None:
    """Accept an attack's output only if it is one: type, shape, dtype, range, ball, no graph."""
    assert type(attacked) is type(clean)
    if isinstance(clean, list):
        for pair in zip(attacked, clean, strict=True):
            verify(*pair, eps)
        return
    assert attacked.shape == clean.shape, f"shape {tuple(attacked.shape)}, not {tuple(clean.shape)}"
    assert attacked.dtype == clean.dtype, f"dtype {attacked.dtype}, not {clean.dtype}"
    assert not attacked.requires_grad, "still attached"
    assert attacked.data_ptr() != clean.data_ptr(), "the clean image itself"
    x, x0 = attacked.double(), clean.detach().double()
    assert x.isfinite().all(), "not finite"
    assert x.min() >= 0.0 and x.max() <= 1.0, f"range [{x.min()}, {x.max()}]"
    distance = (x - x0).abs().max()
    assert distance <= eps + ROUNDING, f"{distance} away, more than eps = {eps}"


def pgd_ascent(objective, images, eps=EPS, **settings):
    """egas.pgd_ascent, its output verified and its arguments seen to be left alone."""
    given = [images] if isinstance(images, torch.Tensor) else images
    before = [x.clone() for x in given]
    attacked = egas.pgd_ascent(objective, images, eps, **settings)
    verify(attacked, images, eps)
    for x, x_before in zip(given, before, strict=True):
        assert torch.equal(x, x_before) and not (x.is_leaf and x.grad is not None)
    return attacked


def assert_reaches(attacked: torch.Tensor, optimum: torch.Tensor) -> None:
    torch.testing.assert_close(attacked, optimum.clamp(0, 1), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:, :1], "shape"),
        (lambda x: x.double(), "dtype"),
        (lambda x: x + EPS, "range"),
        (lambda x: x - 2 * x.min() - 1e-3, "range"),
        (lambda x: (x + 1.1 * EPS).clamp(0, 1), "away"),
        (lambda x: x * torch.nan, "finite"),
        (lambda x: x.clone().requires_grad_(), "attached"),
        (lambda x: x, "itself"),
    ],
)
def test_the_verifier_refuses(spoil, message):
    x = pictures(1, 3, 8, 8)
    verify(x.clone(), x, EPS)
    with pytest.raises(AssertionError, match=message):
        verify(spoil(x), x, EPS)


# ---------------------------------------------------------------------------------------- linf_step


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 1e-3, EPS, 0.3, 1.0]),
    st.sampled_from([0.0, 1e-3, EPS, 0.7]),
)
def test_linf_step_is_the_projection_onto_the_intersection(seed, eps, step_size):
    """The nearest point of [max(0, x0 - eps), min(1, x0 + eps)], pixel by pixel."""
    x0, x = pictures(3, 4, seed=seed), pictures(3, 4, seed=seed + 7)
    grad = torch.randn(3, 4, generator=seeded(seed)).masked_fill(x0 < 0.1, 0.0)
    step = linf_step(x, x0, grad, step_size, eps)
    for i in range(step.numel()):
        found, pixel, clean, g = (float(y.flatten()[i]) for y in (step, x, x0, grad))
        low, high = max(0.0, clean - eps), min(1.0, clean + eps)
        moved = pixel + step_size * ((g > 0) - (g < 0))
        assert found == pytest.approx(min(max(moved, low), high), abs=ROUNDING)


# ------------------------------------------------------------------------- pgd_ascent: closed forms


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("eps", [0.5 / 255, EPS, 0.3])
def test_linear_objective_reaches_its_optimum(steps, random_start, eps):
    """max g.x over the ball and [0, 1] is x0 + eps sign(g), clamped: the default step reaches it.

    From a random start in one step it may not: the ball is 2 eps wide.
    """
    x0, g = pictures(2, 3, 8, 8), torch.randn(2, 3, 8, 8, generator=seeded())
    options = dict(steps=steps, random_start=random_start, generator=seeded())
    attacked = pgd_ascent(lambda x: (g * x).flatten(1).sum(1), x0, eps, **options)
    if steps > 1 or not random_start:
        assert_reaches(attacked, x0 + eps * g.sign())
    assert (x0 == 0).any() and (x0 == 1).any() and (attacked != x0).any()


def test_one_step_is_fgsm():
    """The default settings, on an objective whose gradient changes sign from pixel to pixel."""
    x0 = pictures(2, 3, 8, 8)
    attacked = egas.pgd_ascent(lambda x: (x - 0.5).pow(2).sum(), x0)
    verify(attacked, x0, EPS)
    assert_reaches(attacked, x0 + EPS * (x0 - 0.5).sign())


def test_concave_objective_stops_at_its_optimum():
    """The gradient is that of the current image: an optimum inside the ball is not overshot."""
    x0 = pictures(1, 3, 8, 8) * 0.8 + 0.1
    optimum = x0 + 0.6 * EPS * torch.randn(x0.shape, generator=seeded()).clamp(-1, 1)
    step_size = EPS / 10
    attacked = pgd_ascent(lambda x: -(x - optimum).pow(2).sum(), x0, step_size=step_size, steps=20)
    assert (attacked - optimum).abs().max() <= step_size + ROUNDING


@pytest.mark.parametrize(
    ("steps", "step"), [(1, 1.0), (2, 1.0), (3, 2.5 / 3), (5, 0.5), (10, 0.25)]
)
def test_default_step_size(steps, step):
    """2.5 eps / steps, at most eps: seen by the objective after the first step from x0."""
    seen, x0 = [], torch.full((1, 4), 0.5)

    def objective(x):
        seen.append(x.detach())
        return x.sum()

    pgd_ascent(objective, x0, steps=steps)
    assert len(seen) == steps and torch.equal(seen[0], x0)
    if steps > 1:
        torch.testing.assert_close(seen[1], x0 + step * EPS)


def test_step_sizes_up_and_down_again():
    """Default steps longer than eps would be cut by the ball on the way up only."""
    signs, x0 = iter((1, -1)), torch.full((1, 4), 0.5)
    torch.testing.assert_close(pgd_ascent(lambda x: next(signs) * x.sum(), x0, steps=2), x0)
    given = pgd_ascent(torch.sum, x0, step_size=1e-3, steps=4)
    torch.testing.assert_close(given, x0 + 4e-3)


@pytest.mark.parametrize("random_start", [False, True])
def test_eps_zero_changes_nothing(random_start):
    x0 = pictures(2, 3, 4, 4)
    attacked = pgd_ascent(torch.sum, x0, eps=0.0, steps=3, random_start=random_start)
    assert torch.equal(attacked, x0)


def test_random_start_is_uniform_in_the_ball_and_drawn_from_the_generator():
    """Seen where the objective leaves it: the gradient is zero on half of the pixels."""
    x0, weight = torch.full((2, 5000), 0.5), torch.tensor([[1.0], [0.0]])

    def attack(seed):
        options = dict(random_start=True, generator=seeded(seed))
        return pgd_ascent(lambda x: (weight * x).sum(), x0, **options)

    start, uniform = attack(3)[1], torch.rand(2, 5000, generator=seeded(3))
    torch.testing.assert_close(start, (x0 + EPS * (2 * uniform - 1))[1])
    assert start.min() < 0.5 - 0.99 * EPS and start.max() > 0.5 + 0.99 * EPS
    assert torch.equal(attack(3), attack(3)) and not torch.equal(attack(3), attack(4))


def test_random_start_stays_in_range_before_the_first_step():
    def objective(x):
        assert x.min() >= 0 and x.max() <= 1
        return x.sum()

    pgd_ascent(objective, pictures(1, 3, 8, 8), eps=0.3, random_start=True, generator=seeded())


# -------------------------------------------------------------- pgd_ascent: a second implementation


def classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    head = torch.nn.Linear(6 * 36, 5)
    convolution = torch.nn.Conv2d(3, 6, 3)
    return torch.nn.Sequential(convolution, torch.nn.Tanh(), torch.nn.Flatten(), head).eval()


@pytest.mark.parametrize(("steps", "alpha"), [(1, EPS), (5, EPS / 2), (10, 2 / 255), (7, 3 * EPS)])
@pytest.mark.parametrize("eps", [EPS, 0.2])
def test_equals_torchattacks(steps, alpha, eps):
    model, x0, labels = classifier(), pictures(4, 3, 8, 8), torch.tensor([0, 1, 4, 2])
    options = dict(eps=eps, alpha=alpha, steps=steps, random_start=False)
    theirs = torchattacks.PGD(model, **options)(x0, labels)

    def objective(x):
        return torch.nn.functional.cross_entropy(model(x), labels, reduction="none")

    ours = pgd_ascent(objective, x0, eps, step_size=alpha, steps=steps)
    assert_reaches(ours, theirs)
    assert (ours - x0).abs().max() > 0.9 * min(eps, alpha)


# --------------------------------------------------------------------------- pgd_ascent: what holds


def entropy_of(model):
    return lambda x: token_entropy(8 * model(x))  # far from log 5, where it could not rise


def test_ascent_raises_descent_lowers_and_random_signs_do_neither():
    """The entropy of a classifier. Without the gradient the budget does less than a tenth."""
    x0, entropy, noisy = pictures(8, 3, 8, 8), entropy_of(classifier()), []
    for seed in range(16):
        (signs,) = random_signs([x0], EPS, seeded(seed))
        verify(signs, x0, EPS)
        noisy.append(entropy(signs).mean().item())
    clean, random = entropy(x0).mean().item(), sum(noisy) / len(noisy)
    up = entropy(pgd_ascent(entropy, x0, steps=5)).mean().item()
    down = entropy(pgd_ascent(lambda x: -entropy(x), x0, steps=5)).mean().item()
    assert down < clean < up and abs(random - clean) < 0.1 * min(up - clean, clean - down)


def test_saei_objective():
    """TsEC's choice in the objective: the kept tokens' entropy rises."""
    torch.manual_seed(0)
    head, x0 = torch.nn.Linear(27, 6 * 20), pictures(2, 3, 3, 3)

    def entropies(x):
        return token_entropy(4 * head(x.flatten(1)).view(-1, 6, 20))

    chosen = select_tokens(entropies(x0).detach(), torch.ones(2, 6, dtype=torch.bool))

    def objective(x):
        return selective_entropy(entropies(x), chosen)

    assert (objective(pgd_ascent(objective, x0, steps=3)) > objective(x0)).all()


def test_images_of_different_sizes_are_attacked_each_on_its_own():
    x0 = [pictures(3, 4, 6), pictures(3, 8, 2, seed=5), pictures(1, 1, 1, seed=9)]

    def single(x):
        return (x * x.roll(1, -1)).sum() - x.std(correction=0)

    def together(images):
        assert isinstance(images, list) and [x.shape for x in images] == [x.shape for x in x0]
        return torch.stack([single(x) for x in images])

    attacked = pgd_ascent(together, x0, steps=4)
    for x, clean in zip(attacked, x0, strict=True):
        assert torch.equal(x, pgd_ascent(single, clean, steps=4))


def test_a_tuple_of_images_gives_a_list_and_one_tensor_reaches_the_objective_as_it_is():
    x0 = pictures(3, 4, 4)

    def objective(x):
        assert x.shape == x0.shape
        return x.sum()

    assert isinstance(egas.pgd_ascent(lambda images: images[0].sum(), (x0,)), list)
    pgd_ascent(objective, x0)


@pytest.mark.parametrize("left_over", [None, 7.0])
@pytest.mark.parametrize("trained", [True, False])
def test_parameters_are_left_alone(left_over, trained):
    """Their .grad, also one left over from before. The attack needs no requires_grad of them."""
    model, x0 = classifier(), pictures(2, 3, 8, 8)
    expected = pgd_ascent(entropy_of(model), x0, steps=3)
    for p in model.parameters():
        p.grad = None if left_over is None else torch.full_like(p, left_over)
        p.requires_grad_(trained)
    assert torch.equal(pgd_ascent(entropy_of(model), x0, steps=3), expected)
    for p in model.parameters():
        assert p.requires_grad == trained
        assert p.grad is None if left_over is None else (p.grad == left_over).all()


def test_works_without_and_inside_a_graph():
    """Under no_grad, and on images of someone's graph: nothing flows back to them."""
    model, x0 = classifier(), pictures(2, 3, 8, 8)
    attacked = pgd_ascent(entropy_of(model), x0)
    with torch.no_grad():
        assert torch.equal(pgd_ascent(entropy_of(model), x0), attacked)
    leaf = x0.clone().requires_grad_()
    assert torch.equal(pgd_ascent(entropy_of(model), leaf), attacked)
    assert not pgd_ascent(entropy_of(model), leaf.clone()).requires_grad and leaf.grad is None


def test_dtype_is_kept():
    x0 = torch.full((1, 4), 0.5, dtype=torch.float64)
    attacked = egas.pgd_ascent(torch.sum, x0, eps=1 / 16, steps=2)
    assert attacked.dtype == torch.float64 and torch.equal(attacked, x0 + 1 / 16)


def test_half_precision_belongs_inside_the_objective():
    """bfloat16 images would leave the ball: next to 1 their spacing is 1/256, half of 2/255."""
    x0, eps = pictures(1, 3, 8, 8), 2 / 255
    model = classifier().bfloat16()
    attacked = pgd_ascent(lambda x: entropy_of(model)(x.bfloat16()), x0, eps)
    assert (attacked.bfloat16().float() - x0).abs().max() > eps + 1e-3  # what would come out


def test_inference_mode_is_named(recwarn):
    x0 = torch.rand(1, 2)
    with torch.inference_mode():
        made_there = x0.clone()
        with pytest.raises(RuntimeError, match="torch.inference_mode allows no gradient"):
            egas.pgd_ascent(torch.sum, x0)

    @torch.inference_mode()
    def objective(x):
        return x.sum()

    with pytest.raises(RuntimeError, match="something before it detaches .*torch.inference_mode"):
        egas.pgd_ascent(objective, x0)
    pgd_ascent(torch.sum, made_there)  # an image made there is an image


# ----------------------------------------------------------------------------- pgd_ascent: refusals


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.tensor([[2.64, -1.79]]), "not normalised pixel_values"),
        (torch.tensor([[-0.01, 0.5]]), r"image 0 of shape \(1, 2\).*outside \[0, 1\]"),
        (torch.tensor([[0.5, 1.01]]), "outside"),
        (torch.tensor([[0.5, torch.nan]]), "not finite"),
        (torch.tensor([[0.5, torch.inf]]), "not finite"),
        (torch.zeros(3, 0, 4), "empty"),
        (torch.zeros(1, 2, dtype=torch.uint8), "torch.uint8: pass floats"),
        (torch.zeros(1, 2, dtype=torch.long), "divide 8-bit images by 255"),
        (torch.zeros(1, 2, dtype=torch.bool), "is torch.bool"),
        (torch.zeros(1, 2, dtype=torch.bfloat16), "torch.bfloat16.*half precision inside the obj"),
        (torch.zeros(1, 2, dtype=torch.float16), "torch.float16: .*torch.float32"),
        ([[0.0, 0.5]], "image 0 is list|image 1 is list"),
        (np.zeros((1, 2)), "is ndarray"),
    ],
)
def test_bad_images_are_refused(image, message):
    good = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        egas.pgd_ascent(torch.sum, image if isinstance(image, torch.Tensor) else [image])
    with pytest.raises(ValueError, match=message):
        random_signs([image], EPS)
    with pytest.raises(ValueError, match=message):
        diffusion_noise([image], 500)
    with pytest.raises(ValueError, match="image 1 "):
        egas.pgd_ascent(lambda images: images[0].sum(), [good, image])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -0.1}, "eps=-0.1"),
        ({"eps": 8}, "8/255, not 8"),
        ({"eps": math.nan}, "eps=nan"),
        ({"steps": 0}, "steps=0"),
        ({"step_size": -0.1}, "step_size=-0.1"),
        ({"first_grads": [torch.ones(2)]}, "first_grads: one of each image's shape"),
        ({"first_grads": torch.ones(1, 2)}, "first_grads: one of each image's shape"),
        ({"first_grads": [torch.ones(1, 2)], "random_start": True}, "no random_start"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        egas.pgd_ascent(torch.sum, torch.zeros(1, 2), **settings)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda images, weight: images[0].detach().sum(), "does not depend on the images"),
        (lambda images, weight: weight.sum(), "does not depend on image 0"),
        (lambda images, weight: (images[0] * weight).sum(), "does not depend on image 1"),
    ],
)
def test_an_unrelated_objective_is_refused(objective, message):
    weight, x0 = torch.ones(4, requires_grad=True), [torch.zeros(4), torch.zeros(4)]
    with pytest.raises(RuntimeError, match=message):
        egas.pgd_ascent(lambda images: objective(images, weight), x0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_gradient_is_refused(bad):
    """One bad pixel of the second image is enough."""
    slope, x0 = torch.tensor([1.0, 1.0, bad, 1.0]), [torch.zeros(4), torch.ones(4)]
    with pytest.raises(FloatingPointError, match="gradient of image 1 is not finite"):
        egas.pgd_ascent(lambda images: (images[0] + slope * images[1]).sum(), x0)


@pytest.mark.parametrize("images", [1, 5])
def test_a_gpu_waits_once_per_step_and_once_at_the_start(images, monkeypatch):
    """However many images: what reads a value of a tensor waits for all work before it."""
    reads = Counter()

    def counted(name: str):
        real = getattr(torch.Tensor, name)
        return lambda x: reads.update([name]) or real(x)

    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    x0 = [torch.full((3, 4, 4), 0.5)] * images
    egas.pgd_ascent(lambda images: sum(x.square().sum() for x in images), x0, steps=3)
    assert reads == {"tolist": 4}


def test_zero_gradient_warns_and_one_that_is_not_does_not(recwarn):
    x0 = [pictures(3, 4), pictures(3, 5)]
    pgd_ascent(lambda images: images[0].sum() + 0 * images[1].sum(), x0)
    assert not recwarn
    message = "exactly zero.*no token was kept.*drops the gradient"
    with pytest.warns(RuntimeWarning, match=message) as warned:
        attacked = pgd_ascent(lambda images: sum(0 * x.sum() for x in images), x0)
    assert torch.equal(attacked[0], x0[0])
    assert warned[0].filename == __file__  # it points at the caller


class FusedHead(torch.autograd.Function):
    """A head as seen in a peer: one pass, and the backward ignores the entropy's gradient."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return torch.log_softmax(logits, -1), token_entropy(logits)

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        (logits,) = ctx.saved_tensors
        return grad_logprobs - logits.softmax(-1) * grad_logprobs.sum(-1, keepdim=True)


def test_trap_07_fused_head_without_an_entropy_gradient():
    """It returns the right entropy, and an attack on it does nothing, but not silently."""
    model, x0 = classifier(), pictures(2, 3, 8, 8)
    with pytest.warns(RuntimeWarning, match="exactly zero.*fused head"):
        pgd_ascent(lambda x: FusedHead.apply(model(x))[1], x0)
    with pytest.raises(RuntimeError, match="detaches"):
        egas.pgd_ascent(lambda x: FusedHead.apply(model(x))[1].detach(), x0)
    pgd_ascent(lambda x: FusedHead.apply(model(x))[0].sum(), x0)  # its log-probs are fine


def test_trap_07_non_finite_image_gradient():
    """0 log 0 computed without care: the value is finite after nansum, the gradient is not."""

    def careless(x):
        p = torch.softmax(2000 * x, -1)
        return -(p * p.log()).nansum(-1)

    with pytest.raises(FloatingPointError, match="not finite"):
        egas.pgd_ascent(careless, torch.tensor([[0.0, 1.0]]))


# -------------------------------------------------------------- random_signs, diffusion_noise, psnr


def test_random_signs_spend_the_whole_budget_on_every_pixel():
    x0 = [torch.full((100, 100), 0.5), torch.full((7, 3), 0.5, dtype=torch.float64)]
    noisy = random_signs(x0, EPS, seeded(2))
    verify(noisy, x0, EPS)
    for x, clean in zip(noisy, x0, strict=True):
        torch.testing.assert_close((x - clean).abs(), torch.full_like(x, EPS), atol=1e-7, rtol=0)
    assert abs((noisy[0] > 0.5).double().mean() - 0.5) < 0.02
    assert torch.equal(noisy[0], random_signs(x0, EPS, seeded(2))[0])
    assert not torch.equal(noisy[0], random_signs(x0, EPS, seeded(3))[0])


def test_random_signs_stay_in_range():
    x0 = [pictures(3, 20, 20)]
    verify(random_signs(x0, 0.3, seeded()), x0, 0.3)


def sigma_by_loop(t: int) -> float:
    """sqrt(1 - abar_t), over 1,000 betas, one at a time."""
    abar = 1.0
    for k in range(1000):
        beta = (5e-3 - 1e-5) / (1 + math.exp(-(-6 + 12 * k / 999))) + 1e-5
        if k <= t:
            abar *= 1 - beta
    return math.sqrt(1 - abar)


@pytest.mark.parametrize("t", [0, 1, 250, 499.9, 500, 999])
def test_diffusion_noise_equals_a_loop_over_the_betas(t):
    x0 = [pictures(3, 8, 8), pictures(3, 4, 4).double()]
    generator, sigma = seeded(1), sigma_by_loop(int(t))
    for noisy, x in zip(diffusion_noise(x0, t, seeded(1)), x0, strict=True):
        normal = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        expected = (math.sqrt(1 - sigma**2) * x + sigma * normal).clamp(0, 1)
        assert noisy.dtype == x.dtype and noisy.min() >= 0 and noisy.max() <= 1
        torch.testing.assert_close(noisy, expected, atol=1e-6, rtol=1e-5)


def test_diffusion_noise_at_500_is_noisy_rollouts():
    """sigma about 0.505, 16 times 8/255. Measured on pixels too: half a sigma above the mean."""
    assert sigma_by_loop(500) == pytest.approx(0.505, abs=5e-4)
    noisy = diffusion_noise([torch.full((300, 300), 0.5)], 500, seeded())[0].double()
    above = noisy > 0.5 * math.sqrt(1 - 0.505**2) + 0.505 / 2
    expected = 0.5 * math.erfc(0.5 / math.sqrt(2))
    assert above.double().mean().item() == pytest.approx(expected, abs=0.005)


def test_annealed_time_is_noisy_rollouts_schedule():
    """500 at first, half of it at two thirds of the steps, 0 at the end."""
    times = [egas.annealed_time(step, 60) for step in range(61)]
    assert times[0] == pytest.approx(500, abs=1e-3) and times[40] == pytest.approx(250)
    assert times[60] == pytest.approx(0, abs=0.05) and times == sorted(times, reverse=True)
    assert egas.annealed_time(40, 60, start=100) == pytest.approx(50)


@pytest.mark.parametrize("t", [-1, 1000, math.nan])
def test_diffusion_noise_refuses_other_steps(t):
    with pytest.raises(ValueError, match=f"0 <= t < 1000, got {t}"):
        diffusion_noise([torch.zeros(1, 2)], t)


def test_psnr():
    """A constant difference d gives -20 log10 d, equal images infinity. It is symmetric."""
    x0 = torch.full((3, 8, 8), 0.5)
    for d in (1 / 255, EPS, 0.1):
        expected = pytest.approx(-20 * math.log10(d), abs=1e-4)
        assert psnr(x0 + d, x0) == psnr(x0, x0 + d) == expected
    assert psnr(x0, x0) == math.inf
    assert psnr(torch.ones(2, 2), torch.zeros(2, 2)) == 0
    half = torch.tensor([0.0, 0.2])  # the mean of the squares, not the square of the mean
    assert psnr(half, torch.zeros(2)) == pytest.approx(-10 * math.log10(0.02), abs=1e-4)
