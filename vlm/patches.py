"""The vision tower's patch embedding as a matrix product.

A vision tower cuts its image into patches by a convolution whose kernel is its stride. The patches
do not overlap, so the convolution is one matrix product per patch. Every PGD step needs its
backward to the pixels, where a CPU's convolution is slow (docs/speed.md). Weights and their names
stay as they are.
"""

from torch import Tensor, nn


class PatchProduct(nn.Module):
    """A convolution of any dimension with stride = kernel, without padding, as a product.

    (B, C, *sizes) -> (B, D, *(sizes // kernel)); weight (D, C, *kernel), bias (D,) or None
    """

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        B, C, *sizes = x.shape
        kernel = self.weight.shape[2:]
        cut_sizes = []
        for dim, (size, k) in enumerate(zip(sizes, kernel, strict=True), start=2):
            x = x.narrow(dim, 0, size // k * k)  # a rest that fills no kernel is left out
            cut_sizes += [size // k, k]
        x = x.reshape(B, C, *cut_sizes)  # (B, C, n1, k1, n2, k2, ...)
        dims = len(kernel)
        counts, within = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
        x = x.permute(0, *counts, 1, *within).flatten(1 + dims)  # (B, n1, n2, ..., C * k1 * k2 ...)
        return nn.functional.linear(x, self.weight.flatten(1), self.bias).movedim(-1, 1)


def is_patch_embedding(module: nn.Module) -> bool:
    """A convolution whose patches neither overlap nor touch padding."""
    return (
        isinstance(module, nn.Conv2d | nn.Conv3d)
        and module.kernel_size == module.stride
        and max(module.kernel_size) > 1
        and module.padding in ("valid", (0,) * len(module.kernel_size))
        and set(module.dilation) == {1}
        and module.groups == 1
    )


def use_patch_products(tower: nn.Module) -> None:
    """Replace the tower's patch embeddings. The parameters stay the same objects."""
    for parent in list(tower.modules()):
        for name, child in parent.named_children():
            if is_patch_embedding(child):
                setattr(parent, name, PatchProduct(child))
