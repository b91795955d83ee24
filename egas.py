"""EgAS: entropy-guided adversarial sampling. PGD on the image raises the policy's entropy.

What it computes
    x_0 = I,   x_{k+1} = Proj(x_k + a * sign(grad_x H(x_k)))
    Proj clamps to {|x - I| <= eps} and to [0, 1]. H is any objective of the images. In SaEI it is
    the entropy of the tokens that TsEC chose (tsec.py), teacher-forced on the responses that the
    policy gave to the clean image, mean over a prompt's responses.

Where the rules come from
    paper        The entropy of the sampled responses is the adversarial objective. Its gradient
                 goes back to the visual input, which is attacked to raise it. The policy then also
                 samples from the attacked image.
    second-hand  The trained policy attacks itself. Random noise is no substitute.
    inferred     There is one attacked image per prompt.
    ours         PGD, L-infinity, eps, number and size of the steps: how it attacks is not known.
    random_signs and diffusion_noise are controls: the same budget without a gradient, and the
    noise of NoisyRollout.

Images are float tensors in [0, 1] at the size that the vision tower sees, never normalised
pixel_values. So eps is in units of the pixel range (8/255 = 0.031), and the objective normalises.

    x = torch.rand(2, 3, 8, 8)
    attacked = pgd_ascent(lambda x: (x - 0.5).pow(2).flatten(1).sum(1), x, eps=8 / 255, steps=5)
    print(psnr(attacked, x), (attacked - x).abs().max())
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def linf_step(x: Tensor, x0: Tensor, grad: Tensor, step_size: float, eps: float) -> Tensor:
    """x <- Proj(x + step_size * sign(grad)) onto {|x - x0| <= eps} and [0, 1].   all (...)

    Both sets are boxes, so clamping to one and then to the other is the exact projection.
    """
    x = x + step_size * grad.sign()
    x = torch.minimum(torch.maximum(x, x0 - eps), x0 + eps)
    return x.clamp(0.0, 1.0)


def pgd_ascent(
    objective: Callable[[Tensor | list[Tensor]], Tensor],
    images: Tensor | list[Tensor],
    eps: float = 8 / 255,
    step_size: float | None = None,
    steps: int = 1,
    random_start: bool = False,
    generator: torch.Generator | None = None,
    first_grads: list[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Raise objective(images) by projected sign-gradient ascent.   Tensor or list -> same, detached

    objective: takes what `images` is, a Tensor or a list of Tensors of any sizes. It returns a
        scalar, or a value per image or prompt. Values are summed, so they stay independent if each
        depends on its own images alone.
    eps, step_size: in [0, 1] pixel units. step_size None: min(2.5 * eps / steps, eps) (ours).
    random_start: begin at a uniform point of the eps ball, drawn from `generator`.
    first_grads: image_gradients at `images`, if known: for a first step that is not random.

    Raises ValueError for images outside [0, 1] or not float32 or float64, eps outside [0, 1],
    steps < 1, first_grads that do not fit; RuntimeError in inference mode or if an image has no
    gradient; FloatingPointError if one is not finite. Warns if all gradients are exactly zero. No
    parameter's .grad is touched.
    """
    clean = [images] if isinstance(images, Tensor) else list(images)
    check_images(clean)
    if not 0 <= eps <= 1 or steps < 1 or (step_size or 0) < 0:
        raise ValueError(
            "needs eps in [0, 1] (8/255, not 8), steps >= 1, step_size >= 0: got "
            f"{eps=}, {steps=}, {step_size=}"
        )
    if torch.is_inference_mode_enabled():  # enable_grad() does not end it
        raise RuntimeError("torch.inference_mode allows no gradient: use torch.no_grad instead")
    if first_grads is not None and (
        random_start or [g.shape for g in first_grads] != [x.shape for x in clean]
    ):
        raise ValueError("first_grads: one of each image's shape, and no random_start")
    step_size = min(2.5 * eps / steps, eps) if step_size is None else step_size

    clean = [x.detach() for x in clean]
    attacked = [x.clone() for x in clean]
    if random_start:
        attacked = [(x + eps * (2 * uniform_like(x, generator) - 1)).clamp(0.0, 1.0) for x in clean]
    grads = first_grads
    for _ in range(steps):
        if grads is None:
            attacked = [x.requires_grad_() for x in attacked]
            with torch.enable_grad():
                value = objective(attacked[0] if isinstance(images, Tensor) else attacked)
                grads = image_gradients(value.sum(), attacked)
        for i, x in enumerate(attacked):
            attacked[i] = linf_step(x.detach(), clean[i], grads[i], step_size, eps)
        grads = None
    return attacked[0] if isinstance(images, Tensor) else attacked


def image_gradients(
    value: Tensor, images: list[Tensor], retain_graph: bool = False
) -> list[Tensor]:
    """d value / d image of each image, checked.   scalar, B images -> B gradients

    retain_graph: keep the graph for a further use.
    """
    if not value.requires_grad:
        cause = "something before it detaches (detach, torch.no_grad, torch.inference_mode)"
        raise RuntimeError(f"the objective does not depend on the images: {cause}")
    # autograd.grad, not backward(): the policy's .grad stays clean, no weight gradient is computed
    grads = torch.autograd.grad(value, images, retain_graph=retain_graph, allow_unused=True)
    for i, grad in enumerate(grads):
        if grad is None:
            raise RuntimeError(f"the objective does not depend on image {i}")
    largest = torch.stack([grad.abs().max() for grad in grads]).tolist()  # a GPU waits only here
    if bad := [i for i, value in enumerate(largest) if not math.isfinite(value)]:
        raise FloatingPointError(
            f"the gradient of image {bad[0]} is not finite; is the entropy computed in float32?"
        )
    if not any(largest):
        warnings.warn(
            "the image gradient is exactly zero, so the attack does nothing: no token was kept, "
            "the policy is certain of every token, or an operation between image and entropy (a "
            "fused head, a detach) drops the gradient",
            RuntimeWarning,
            stacklevel=3,
        )
    return list(grads)


def random_signs(
    images: list[Tensor], eps: float, generator: torch.Generator | None = None
) -> list[Tensor]:
    """x + eps * s, s = +1 or -1 at random, clamped to [0, 1]: the budget without a gradient."""
    check_images(images)
    changed = []
    for x in images:
        negative = uniform_like(x, generator) < 0.5  # not sign(u - 1/2), which may be 0
        changed.append((x + eps * (1 - 2 * negative.to(x.dtype))).clamp(0.0, 1.0))
    return changed


def diffusion_noise(
    images: list[Tensor], t: float, generator: torch.Generator | None = None
) -> list[Tensor]:
    """NoisyRollout's noise: sqrt(abar_t) x + sqrt(1 - abar_t) n, n ~ N(0, I), clamped to [0, 1].

    abar_t = prod_{k = 0..t} (1 - beta_k), beta_k = sigmoid(linspace(-6, 6, 1000))_k * (5e-3 - 1e-5)
    + 1e-5, 0 <= t < 1000 (arXiv 2504.13055 and its code, which counts from 0 and cuts t down to an
    integer; t = 500 there, a sigma of 0.505).
    """
    check_images(images)
    if not 0 <= t < 1000:
        raise ValueError(f"t must be in 0 <= t < 1000, got {t}")
    beta = torch.linspace(-6, 6, 1000, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    abar = float((1 - beta[: int(t) + 1]).prod())
    noised = []
    for x in images:
        normal = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        noised.append((math.sqrt(abar) * x + math.sqrt(1 - abar) * normal).clamp(0.0, 1.0))
    return noised


def annealed_time(step: int, steps: int, start: float = 500.0) -> float:
    """NoisyRollout's schedule: start * (1 - 1 / (1 + exp(-30 (step / steps - 2/3))))."""
    return start * (1 - 1 / (1 + math.exp(-30 * (step - steps * 2 / 3) / steps)))


def psnr(x: Tensor, x0: Tensor) -> float:
    """10 log10(1 / mean((x - x0)^2)) in dB, of images in [0, 1]; infinite if they are equal."""
    mse = (x.double() - x0.double()).pow(2).mean().item()
    return math.inf if mse == 0 else -10 * math.log10(mse)


def uniform_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """U[0, 1) of x's shape, drawn on the CPU, so a seed gives the same values on every device."""
    return torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)


def check_images(images: list[Tensor]) -> None:
    """Raise ValueError unless every image is a float32 or float64 tensor within [0, 1]."""
    for i, x in enumerate(images):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        if kind not in (torch.float32, torch.float64):  # bfloat16 rounds by up to eps / 4
            raise ValueError(
                f"image {i} is {kind}: pass floats in [0, 1], torch.float32 (divide 8-bit images "
                "by 255; cast to half precision inside the objective, which would leave the ball)"
            )
    inside = [((x >= 0) & (x <= 1)).all() & (x.numel() > 0) for x in images]
    if images and False in (flags := torch.stack(inside).tolist()):
        i = flags.index(False)
        raise ValueError(
            f"image {i} of shape {tuple(images[i].shape)} is empty, not finite or outside [0, 1]: "
            "attack pixels, not normalised pixel_values"
        )
