"""What differs between model families: one entry each in FAMILIES, by the config's model_type.

A picture is resized once, by the processor's own rule and with its tiling off. The result is one
image in [0, 1]. That image is attacked, so no tile or thumbnail can drift apart from another.
`pixel_values` maps it, differentiably, to what the image processor would have produced.

    family = FAMILIES["qwen2_5_vl"]
    image = family.resize(picture, image_processor, family.untiled) / 255  # (3, h, w) in [0, 1]
    inputs = family.pixel_values([image], image_processor)  # {"pixel_values": ..., ...}
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.image_utils import SizeDict


@contextlib.contextmanager
def do_not_resize(ip) -> Iterator[dict[str, Any]]:
    """In this context, and with these options, a processor leaves an image's size as it is."""
    yield {"do_resize": False}


class Family(NamedTuple):
    # (uint8 (3, H, W), image processor, untiled) -> uint8 (3, h, w): what the vision tower sees
    resize: Callable
    # ([0, 1] images of that size, image processor) -> the model's vision inputs
    pixel_values: Callable
    # Module names within model.model: the vision tower, and what leads from it into the language
    # model.
    tower: str
    projector: tuple[str, ...]
    # Arguments of the processor that switch its tiling off.
    untiled: dict = {}
    # The processor always tiles. Its grid is then set to one square tile.
    one_tile: bool = False
    # Name of an input that only the prompt has: which tokens belong to an image.
    token_types: str | None = None
    # Name of an input: the number of images of each prompt that has any.
    counts: str | None = None
    # Name of the processor's output that get_rope_index takes the pictures' sizes from.
    grid: str = "image_grid_thw"
    # image processor -> its two size limits are a picture's area times this. None: it has no such
    # limits, and min_pixels and max_pixels are refused.
    limits_per_pixel: Callable | None = None
    # For a processor that resizes with do_resize=False, too.
    without_resize: Callable = do_not_resize
    # Names (a regular expression) of further tokens that stand for images.
    banned: str = r"$^"
    # Names (a regular expression) of special tokens that answers use: sampled and decoded.
    answer_tokens: str = r"$^"

    def in_tower(self, name: str) -> bool:
        """Is this parameter or module of model.model inside the vision tower?"""
        return f"{name}.".startswith(f"{self.tower}.")

    def in_projector(self, name: str) -> bool:
        """Is it inside the projector? Qwen's projector is inside the tower, too."""
        return any(f"{name}.".startswith(f"{module}.") for module in self.projector)


def normalise(x: Tensor, ip) -> Tensor:
    """(x - mean) / std by channel.   (3, H, W) in [0, 1]"""
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


QWEN = Family(
    qwen_resize,
    qwen_pixel_values,
    tower="visual",
    projector=("visual.merger", "visual.deepstack_merger_list"),
    limits_per_pixel=lambda ip: 1,
)
LLAVA = Family(
    fixed_resize,
    fixed_pixel_values,
    tower="vision_tower",
    projector=("multi_modal_projector", "image_newline"),
)
LLAVA_NEXT = LLAVA._replace(pixel_values=llava_next_pixel_values, one_tile=True)
SMOLVLM = Family(
    fixed_resize,
    smolvlm_pixel_values,
    tower="vision_model",
    projector=("connector",),
    untiled={"do_image_splitting": False},
    banned=r"<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>",
)
FAMILIES: dict[str, Family] = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "smolvlm": SMOLVLM,
    "idefics3": SMOLVLM,
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_NEXT._replace(counts="batch_num_images"),
    "internvl": LLAVA._replace(untiled={"crop_to_patches": False}),
    "gemma3": LLAVA._replace(untiled={"do_pan_and_scan": False}, token_types="token_type_ids"),
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
    "qwen3_vl_moe": QWEN,
}
