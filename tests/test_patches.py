"""vlm/patches.py: the product equals the convolution, in value and in every gradient."""

import pytest
import torch
from torch import nn

from tests import families, tiny
from vlm.patches import PatchProduct, is_patch_embedding

CONVOLUTIONS = {
    "flat patches": (nn.Conv3d(3, 5, (2, 4, 4), stride=(2, 4, 4), bias=False), (7, 3, 2, 4, 4)),
    "pictures": (nn.Conv2d(3, 5, 4, stride=4, padding="valid"), (2, 3, 8, 12)),
    "a rest": (nn.Conv2d(3, 5, 4, stride=4), (2, 3, 11, 9)),
    "oblong kernel": (nn.Conv2d(2, 5, (2, 3), stride=(2, 3)), (1, 2, 6, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_equals_the_convolution(name):
    convolution, shape = CONVOLUTIONS[name]
    product = PatchProduct(convolution)
    x = torch.randn(shape, requires_grad=True)
    ours, theirs = product(x), convolution(x)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(theirs)
    leaves = [x, *convolution.parameters()]
    our_grads = torch.autograd.grad((weights * ours).sum(), leaves)
    their_grads = torch.autograd.grad((weights * theirs).sum(), leaves)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 4, 4, stride=2),
        nn.Conv2d(3, 4, 4, stride=4, padding=1),
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 4, 4, stride=4, groups=2),
        nn.Conv2d(3, 4, 4, stride=4, dilation=2),
        nn.Linear(3, 4),
    ],
    ids=["overlap", "padding", "kernel of one", "groups", "dilation", "no convolution"],
)
def test_other_layers_stay(module):
    assert not is_patch_embedding(module)


@pytest.mark.parametrize("kind", tiny.BUILD)
def test_no_family_keeps_a_patch_convolution(kind):
    """And the names of the parameters are those of the checkpoint."""
    policy = families.shared_policy(kind)
    assert not any(is_patch_embedding(module) for module in policy.model.modules())
    model, _ = tiny.build(kind)
    assert list(policy.model.state_dict()) == list(model.state_dict())
