"""From a picture to what a vision tower reads, in two steps that every family needs.

`*_resize`: (uint8 (3, H, W), image processor, untiled) -> uint8 (3, h, w), the picture at the size
that the tower sees, by the image processor itself.
`*_pixel_values`: ([0, 1] images of that size, image processor) -> the model's vision inputs, as the
processor would have made them, and differentiable.
`*_keep_size`: a context in which the processor does not resize an image a second time.

    image = qwen_resize(picture, image_processor, {}) / 255  # (3, h, w) in [0, 1]
    inputs = qwen_pixel_values([image], image_processor)  # {"pixel_values": ..., ...}
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.image_utils import SizeDict


@contextlib.contextmanager
def keep_size(ip) -> Iterator[dict[str, Any]]:
    """In this context, and with these options, a processor leaves an image's size as it is."""
    yield {"do_resize": False}


def normalise(x: Tensor, ip) -> Tensor:
    """(x - mean) / std by channel, where the processor does so.   (3, H, W) in [0, 1]"""
    if not ip.do_normalize:
        return x
    mean = torch.tensor(list(ip.image_mean), dtype=x.dtype, device=x.device).view(3, 1, 1)
    std = torch.tensor(list(ip.image_std), dtype=x.dtype, device=x.device).view(3, 1, 1)
    return (x - mean) / std


def qwen_resize(picture: Tensor, ip, untiled: dict) -> Tensor:
    """Sides to multiples of patch * merge, area within the processor's limits."""
    factor = ip.patch_size * ip.merge_size
    return ip.resize(picture, size=SizeDict(**dict(ip.size)), resample=ip.resample, factor=factor)


def qwen_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """Normalised patches of all images in the order of merged 2 x 2 blocks.

    (3, H, W) images -> pixel_values (sum of patches, 3 * t * p * p), image_grid_thw (B, 3)
    Each patch is repeated for the temporal slots. The repeat is inside the map: an attack on the
    patches would push the copies of a still image apart.
    """
    p, m, t = ip.patch_size, ip.merge_size, ip.temporal_patch_size
    patches, grids = [], []
    for x in images:
        c, h, w = x.shape
        z = normalise(x, ip).reshape(c, h // (p * m), m, p, w // (p * m), m, p)
        z = z.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)  # (h/pm, w/pm, m, m, c, 1, p, p)
        patches.append(z.expand(*z.shape[:5], t, p, p).reshape(-1, c * t * p * p))
        grids.append([1, h // p, w // p])
    grid = torch.tensor(grids, device=images[0].device)
    return {"pixel_values": torch.cat(patches), "image_grid_thw": grid}


def fixed_resize(picture: Tensor, ip, untiled: dict) -> Tensor:
    """The processor's whole way (resize, crop, pad) to its one size, before it normalises."""
    inputs = ip([picture], do_rescale=False, do_normalize=False, return_tensors="pt", **untiled)
    tiles = inputs["pixel_values"].flatten(0, -4)  # (tiles, 3, S, S)
    most = 2 if hasattr(ip, "image_grid_pinpoints") else 1  # thumbnail and one tile are one image
    if len(tiles) > most:
        raise ValueError(
            f"{type(ip).__name__} cuts a picture into {len(tiles)} tiles, "
            "and only one can be attacked"
        )
    return tiles[0]


def fixed_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """-> (B, 3, S, S)"""
    return {"pixel_values": torch.stack([normalise(x, ip) for x in images])}


def smolvlm_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """-> (B, 1 tile, 3, S, S), and a mask that says that none of it is padding"""
    z = fixed_pixel_values(images, ip)["pixel_values"][:, None]
    mask = torch.ones_like(z[:, :, 0], dtype=torch.long)
    return {"pixel_values": z, "pixel_attention_mask": mask}


def llava_next_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """-> (B, 2, 3, S, S): the thumbnail and the only tile are the same image"""
    z = fixed_pixel_values(images, ip)["pixel_values"]
    sizes = torch.tensor([x.shape[1:] for x in images], device=z.device)
    return {"pixel_values": torch.stack([z, z], dim=1), "image_sizes": sizes}


def glm_resize(picture: Tensor, ip, untiled: dict) -> Tensor:
    """As Qwen's. A still picture counts as temporal_patch_size frames in the limits."""
    return ip.resize(
        picture,
        size=SizeDict(**dict(ip.size)),
        resample=ip.resample,
        factor=ip.patch_size * ip.merge_size,
        temporal_factor=ip.temporal_patch_size,
    )


def processed(picture: Tensor, ip, untiled: dict) -> dict[str, Tensor]:
    """The image processor's outputs for one picture, its pixels still 0 to 255."""
    return ip([picture], do_rescale=False, do_normalize=False, return_tensors="pt", **untiled)


def to_patches(x: Tensor, side: int) -> Tensor:
    """(3, H, W) -> (patches, side * side * 3), row by row, channels last"""
    c, h, w = x.shape
    x = x.reshape(c, h // side, side, w // side, side)
    return x.permute(1, 3, 2, 4, 0).reshape(-1, side * side * c)


def from_patches(patches: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """The reverse of to_patches. Patches after the first rows * columns are padding."""
    x = patches[: rows * columns].view(rows, columns, side, side, 3)
    return x.permute(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side)


def gemma4_resize(picture: Tensor, ip, untiled: dict, merged: bool = False) -> Tensor:
    """The largest of the picture's shape within max_soft_tokens; from the processor's patches."""
    inputs = processed(picture, ip, untiled)
    columns, rows = (inputs["image_position_ids"][0].max(dim=0).values + 1).tolist()
    side = ip.patch_size * (ip.pooling_kernel_size if merged else 1)
    return from_patches(inputs["pixel_values"][0], rows, columns, side)


def gemma4_pixel_values(images: list[Tensor], ip, merged: bool = False) -> dict[str, Tensor]:
    """-> (B, most, side * side * 3), padded with 0; each patch's column and row, padded with -1

    A token of the language model is pooled of several patches, or is one larger patch (merged).
    """
    pool = ip.pooling_kernel_size
    side = ip.patch_size * (pool if merged else 1)
    most = ip.max_soft_tokens * (1 if merged else pool**2)
    patches, places = [], []
    for x in images:
        z = to_patches(normalise(x, ip), side)
        i, columns = torch.arange(len(z), device=x.device), x.shape[2] // side
        place = torch.stack([i % columns, i // columns], dim=1)
        padding = (0, 0, 0, most - len(z))
        patches.append(nn.functional.pad(z, padding))
        places.append(nn.functional.pad(place, padding, value=-1))
    return {"pixel_values": torch.stack(patches), "image_position_ids": torch.stack(places)}


def mistral3_resize(picture: Tensor, ip, untiled: dict) -> Tensor:
    """The longest side within its limit, both to multiples of ip.patch_size."""
    image = processed(picture, ip, untiled)["pixel_values"][0]
    if image.shape[1:] == (ip.patch_size["height"], ip.patch_size["width"]):
        height, width = picture.shape[1:]
        raise ValueError(
            f"a picture of {width} x {height} pixels is a single image token, which the model's "
            "code does not take; enlarge it"
        )
    return image


def mistral3_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """-> (B, 3, H, W), each padded with 0 to the largest; the sizes without the padding"""
    sizes = torch.tensor([x.shape[1:] for x in images], device=images[0].device)
    height, width = sizes.max(dim=0).values.tolist()
    padded = []
    for x in images:
        right, below = width - x.shape[2], height - x.shape[1]
        padded.append(nn.functional.pad(normalise(x, ip), (0, right, 0, below)))
    return {"pixel_values": torch.stack(padded), "image_sizes": sizes}


def mistral3_prepare(processor) -> None:
    """Sides are multiples of a merged patch. Else its processor says so in each call alone."""
    side = processor.patch_size * processor.spatial_merge_size
    processor.image_processor.patch_size = {"height": side, "width": side}


def molmo2_resize(picture: Tensor, ip, untiled: dict) -> Tensor:
    inputs = processed(picture, ip, untiled)
    n = ip.size["height"] // ip.patch_size
    return from_patches(inputs["pixel_values"][0], n, n, ip.patch_size)


def pooling_windows(n: int, height: int, width: int, device) -> tuple[Tensor, int, int]:
    """The patches of an n x n grid by windows of height x width, centred; -1 outside of the grid.

    -> (rows * columns, height * width), rows, columns
    """
    rows, columns = -(-n // height), -(-n // width)
    below, right = rows * height - n, columns * width - n
    numbers = torch.arange(n * n, device=device).view(n, n)
    padding = (right // 2, right - right // 2, below // 2, below - below // 2)
    numbers = nn.functional.pad(numbers, padding, value=-1)
    windows = numbers.view(rows, height, columns, width).transpose(1, 2)
    return windows.reshape(rows * columns, -1), rows, columns


def molmo2_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """-> (2 B, patches, p * p * 3): the thumbnail and the only crop are the same image

    image_token_pooling: the patches that each token is pooled of, numbered over all views; -1 where
    the window reaches over the edge.
    """
    n, device = ip.size["height"] // ip.patch_size, images[0].device
    windows, rows, columns = pooling_windows(n, *ip.pooling_size, device)
    views, pooling = [], []
    for x in images:
        patches = to_patches(normalise(x, ip), ip.patch_size)
        for _ in range(2):
            pooling.append(torch.where(windows < 0, windows, windows + n * n * len(views)))
            views.append(patches)
    return {
        "pixel_values": torch.stack(views),
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor([[rows, columns] * 2] * len(images), device=device),
        "image_num_crops": torch.tensor([2] * len(images), device=device),
    }


def kimi_resize(picture: Tensor, ip, untiled: dict) -> Tensor:
    """Scaled down to its limits, then padded to whole merged patches."""
    inputs = processed(picture, ip, untiled)
    (_, rows, columns), p = inputs["image_grid_thw"][0].tolist(), ip.patch_size
    patches = inputs["pixel_values"].view(rows, columns, 3, p, p)
    return patches.permute(2, 0, 3, 1, 4).reshape(3, rows * p, columns * p)


def kimi_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """-> (sum of patches, 3, p, p) row by row, image_grid_thw (B, 3)"""
    p, patches, grids = ip.patch_size, [], []
    for x in images:
        c, h, w = x.shape
        z = normalise(x, ip).view(c, h // p, p, w // p, p)
        patches.append(z.permute(1, 3, 0, 2, 4).reshape(-1, c, p, p))
        grids.append([1, h // p, w // p])
    grid = torch.tensor(grids, device=images[0].device)
    return {"pixel_values": torch.cat(patches), "image_grid_thw": grid}


def minicpm_resize(picture: Tensor, ip, untiled: dict) -> Tensor:
    """To scale_resolution squared in area, sides to multiples of a merged patch."""
    inputs = processed(picture, ip, untiled)
    (rows, columns), p = inputs["target_sizes"][0].tolist(), ip.patch_size
    patches = inputs["pixel_values"][0].view(3, p, rows, columns, p)
    return patches.permute(0, 2, 1, 3, 4).reshape(3, rows * p, columns * p)


def minicpm_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """-> (1, 3, p, all images' pixels / p): patches side by side; rows and columns of each image"""
    p, strips, sizes = ip.patch_size, [], []
    for x in images:
        c, h, w = x.shape
        z = normalise(x, ip).view(c, h // p, p, w // p, p)
        strips.append(z.permute(0, 2, 1, 3, 4).reshape(c, p, -1))
        sizes.append([h // p, w // p])
    sizes = torch.tensor(sizes, dtype=torch.int32, device=images[0].device)
    return {"pixel_values": torch.cat(strips, dim=-1)[None], "target_sizes": sizes}


@contextlib.contextmanager
def minicpm_keep_size(ip) -> Iterator[dict[str, Any]]:
    """do_resize=False fails in its code. A second resize is another one for many sizes."""
    ip.find_best_resize = lambda image_size, *args, **kwargs: tuple(image_size)
    try:
        yield {}
    finally:
        del ip.find_best_resize


def lfm2_resize(picture: Tensor, ip, untiled: dict) -> Tensor:
    """Area within min_image_tokens and max_image_tokens. A second resize changes nothing."""
    inputs = processed(picture, ip, untiled)
    rows, columns = inputs["spatial_shapes"][0].tolist()
    most = ip.max_image_tokens * ip.downsample_factor**2
    if rows * columns > most:
        height, width = picture.shape[1:]
        raise ValueError(
            f"a picture of {width} x {height} pixels is too oblong: {rows * columns} patches, and "
            f"{type(ip).__name__} allows {most}; crop or pad it"
        )
    return from_patches(inputs["pixel_values"][0], rows, columns, ip.encoder_patch_size)


def lfm2_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """-> (B, most patches, p * p * 3), padded with 0, and a mask; rows and columns of each image"""
    p, most = ip.encoder_patch_size, ip.max_image_tokens * ip.downsample_factor**2
    patches, masks, shapes = [], [], []
    for x in images:
        z = to_patches(normalise(x, ip), p)
        patches.append(nn.functional.pad(z, (0, 0, 0, most - len(z))))
        masks.append((torch.arange(most, device=x.device) < len(z)).int())
        shapes.append([x.shape[1] // p, x.shape[2] // p])
    return {
        "pixel_values": torch.stack(patches),
        "pixel_attention_mask": torch.stack(masks),
        "spatial_shapes": torch.tensor(shapes, device=images[0].device),
    }
