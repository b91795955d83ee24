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
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.image_utils import SizeDict
from transformers.models.molmo2.image_processing_molmo2 import arange_for_pooling


@contextlib.contextmanager
def do_not_resize(ip) -> Iterator[dict[str, Any]]:
    """In this context, and with these options, a processor leaves an image's size as it is."""
    yield {"do_resize": False}


class Family(NamedTuple):
    # (uint8 (3, H, W), image processor, untiled) -> uint8 (3, h, w): what the vision tower sees
    resize: Callable
    # ([0, 1] images of that size, image processor) -> the model's vision inputs
    pixel_values: Callable
    # Module names within model.model: the vision tower ("": there is none), and what leads from it
    # into the language model.
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
    # processor -> None: settings that its image processor needs, made once after loading.
    prepare: Callable | None = None
    # The tower does not cast pixel_values to its weights' precision, so this is done here.
    cast: bool = False
    # For a processor that resizes with do_resize=False, too.
    without_resize: Callable = do_not_resize
    # Names (a regular expression) of further tokens that stand for images.
    banned: str = r"$^"
    # Names (a regular expression) of special tokens that answers use: sampled and decoded.
    answer_tokens: str = r"$^"

    def in_tower(self, name: str) -> bool:
        """Is this parameter or module of model.model inside the vision tower?"""
        return bool(self.tower) and f"{name}.".startswith(f"{self.tower}.")

    def in_projector(self, name: str) -> bool:
        """Is it inside the projector? Qwen's projector is inside the tower, too."""
        return any(f"{name}.".startswith(f"{module}.") for module in self.projector)


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
    return processed(picture, ip, untiled)["pixel_values"][0]


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


def molmo2_pixel_values(images: list[Tensor], ip) -> dict[str, Tensor]:
    """-> (2 B, patches, p * p * 3): the thumbnail and the only crop are the same image

    image_token_pooling: the patches that each token is pooled of, numbered over all views; -1 where
    the window reaches over the edge.
    """
    n, device = ip.size["height"] // ip.patch_size, images[0].device
    numbers = torch.arange(n * n, device=device).view(n, n)
    windows, rows, columns = arange_for_pooling(numbers, *ip.pooling_size)
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
def minicpm_keeps_size(ip) -> Iterator[dict[str, Any]]:
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
GEMMA4 = Family(
    gemma4_resize,
    gemma4_pixel_values,
    tower="vision_tower",
    projector=("embed_vision",),
    token_types="mm_token_type_ids",
    answer_tokens=r"<\|channel>|<channel\|>",
)
GLM = QWEN._replace(
    resize=glm_resize,
    projector=("visual.merger", "visual.downsample"),
    limits_per_pixel=lambda ip: ip.temporal_patch_size,
    answer_tokens=r"<\|(begin|end)_of_box\|>",
)
MISTRAL3 = Family(
    mistral3_resize,
    mistral3_pixel_values,
    tower="vision_tower",
    projector=("multi_modal_projector",),
    prepare=mistral3_prepare,
    banned=r"\[IMG(_BREAK|_END)?\]",
    answer_tokens=r"\[/?THINK\]",
)
OVIS2 = LLAVA._replace(
    projector=("visual_embeddings_table",),
    untiled={"crop_to_patches": False},
    banned=r"<IMG_(START|GRID|COL|ROW|END|ATOM)>|<image>",
)
MOLMO2 = Family(
    molmo2_resize,
    molmo2_pixel_values,
    tower="vision_tower",
    projector=("multi_modal_projector",),
    untiled={"max_crops": 1},
    token_types="mm_token_type_ids",
    banned=r"<(im_patch|im_col|(low_res_)?im_start|im_end|im_low|frame_(start|end))>"
    r"|<\|(image|video)\|>",
)
KIMI = Family(
    kimi_resize,
    kimi_pixel_values,
    tower="vision_tower",
    projector=("mm_projector",),
    cast=True,
    banned=r"<\|media_(pad|begin|content|end)\|>|<\|kimi_k25_video_placeholder\|>",
)
MINICPM = Family(
    minicpm_resize,
    minicpm_pixel_values,
    tower="vision_tower",
    projector=("merger",),
    untiled={"slice_mode": False},
    without_resize=minicpm_keeps_size,
    banned=r"</?(image|slice|image_id)>|<\|(image|video)_pad\|>",
)
LFM2 = Family(
    lfm2_resize,
    lfm2_pixel_values,
    tower="vision_tower",
    projector=("multi_modal_projector",),
    untiled={"do_image_splitting": False},
    banned=r"<\|img_(row_\d+_col_\d+|thumbnail)\|>|<\|image_(start|end)\|>",
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
    "gemma4": GEMMA4,
    "gemma4_unified": GEMMA4._replace(  # no tower: embed_vision projects pixels
        resize=partial(gemma4_resize, merged=True),
        pixel_values=partial(gemma4_pixel_values, merged=True),
        tower="",
    ),
    "gemma3n": LLAVA._replace(projector=("embed_vision",)),
    "glm4v": GLM,
    "glm46v": GLM,
    "glm4v_moe": GLM,
    "mistral3": MISTRAL3,
    "ovis2": OVIS2,
    "exaone4_5": QWEN._replace(banned=r"<\|vision_(start|end)\|>"),
    "molmo2": MOLMO2,
    "kimi_k25": KIMI,
    "minicpmv4_6": MINICPM,
    "minicpmv4_7": MINICPM._replace(grid="target_sizes"),
    "lfm2_vl": LFM2,
    "lfm3_vl": QWEN._replace(tower="vision_tower", projector=("multi_modal_projector",), cast=True),
}

# Families that cannot be had, and why.
OWN_CODE = "transformers has no class for it, and the code of its repository is not run"
INDEXED = "its layers keep a third tensor (indexed_attention), which vlm/cache.py cannot share yet"
NO_ENTRY = "it has no entry in vlm/families.py yet; docs/families.md says how to add one"
REFUSED: dict[str, str] = {
    "internvl_chat": f"{OWN_CODE}; use the repository whose name ends in -HF",
    "minicpmv": f"{OWN_CODE}; use MiniCPM-V 4.6 or 4.7",
    "minicpmo": f"{OWN_CODE}; use MiniCPM-V 4.6 or 4.7",
    "kimi_vl": f"{OWN_CODE}; use Kimi K2.5",
    "ovis2_5": f"{OWN_CODE}; use Ovis 2 (its name ends in -hf)",
    "phi4mm": OWN_CODE,
    "phi4_multimodal": "transformers does not map it to AutoModelForImageTextToText",
    "qwen4_exp": INDEXED,
    "glm5_next": INDEXED,
    "mistral_large4": INDEXED,
    "mllama": "its layers read the picture by cross-attention, outside the shared cache",
    "llama4": NO_ENTRY,
    "deepseek_ocr2": NO_ENTRY,
    "nemotron_h_omni": NO_ENTRY,
}
