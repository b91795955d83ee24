"""What differs between model families: one entry each in FAMILIES, by the config's model_type.

A picture is resized once, by the processor's own rule and with its tiling off. The result is one
image in [0, 1]. That image is attacked, so no tile or thumbnail can drift apart from another.
`pixel_values` maps it, differentiably, to what the image processor would have produced.

    family = FAMILIES["qwen2_5_vl"]
    image = family.resize(picture, image_processor, family.untiled) / 255  # (3, h, w) in [0, 1]
    inputs = family.pixel_values([image], image_processor)  # {"pixel_values": ..., ...}
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from vlm import pixels


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
    without_resize: Callable = pixels.keep_size
    # A package that the vision tower needs and requirements.txt does not name.
    package: str | None = None
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


QWEN = Family(
    pixels.qwen_resize,
    pixels.qwen_pixel_values,
    tower="visual",
    projector=("visual.merger", "visual.deepstack_merger_list"),
    limits_per_pixel=lambda ip: 1,
    answer_tokens=r"<\|(object_ref|box|quad)_(start|end)\|>",  # grounding
)
LLAVA = Family(
    pixels.fixed_resize,
    pixels.fixed_pixel_values,
    tower="vision_tower",
    projector=("multi_modal_projector", "image_newline"),
)
LLAVA_NEXT = LLAVA._replace(pixel_values=pixels.llava_next_pixel_values, one_tile=True)
SMOLVLM = Family(
    pixels.fixed_resize,
    pixels.smolvlm_pixel_values,
    tower="vision_model",
    projector=("connector",),
    untiled={"do_image_splitting": False},
    banned=r"<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>",
)
GEMMA3N = LLAVA._replace(
    projector=("embed_vision",),
    package="timm",
    banned=r"<(start|end)_of_(image|audio)>|<(image|audio)_soft_token>",
)
GEMMA4 = Family(
    pixels.gemma4_resize,
    pixels.gemma4_pixel_values,
    tower="vision_tower",
    projector=("embed_vision",),
    token_types="mm_token_type_ids",
    answer_tokens=r"<\|channel>|<channel\|>",
)
GLM = QWEN._replace(
    resize=pixels.glm_resize,
    projector=("visual.merger", "visual.downsample"),
    limits_per_pixel=lambda ip: ip.temporal_patch_size,
    answer_tokens=r"<\|(begin|end)_of_box\|>",
)
MISTRAL3 = Family(
    pixels.mistral3_resize,
    pixels.mistral3_pixel_values,
    tower="vision_tower",
    projector=("multi_modal_projector",),
    prepare=pixels.mistral3_prepare,
    banned=r"\[IMG(_BREAK|_END)?\]",
    answer_tokens=r"\[/?THINK\]",
)
OVIS2 = LLAVA._replace(
    projector=("visual_embeddings_table",),
    untiled={"crop_to_patches": False},
    banned=r"<IMG_(START|GRID|COL|ROW|END|ATOM)>|<image>",
)
MOLMO2 = Family(
    pixels.molmo2_resize,
    pixels.molmo2_pixel_values,
    tower="vision_tower",
    projector=("multi_modal_projector",),
    untiled={"max_crops": 1},
    token_types="mm_token_type_ids",
    banned=r"<(im_patch|im_col|(low_res_)?im_start|im_end|im_low|frame_(start|end))>"
    r"|<\|(image|video)\|>",
)
KIMI = Family(
    pixels.kimi_resize,
    pixels.kimi_pixel_values,
    tower="vision_tower",
    projector=("mm_projector",),
    cast=True,
    banned=r"<\|media_(pad|begin|content|end)\|>|<\|kimi_k25_video_placeholder\|>",
)
MINICPM = Family(
    pixels.minicpm_resize,
    pixels.minicpm_pixel_values,
    tower="vision_tower",
    projector=("merger",),
    untiled={"slice_mode": False},
    without_resize=pixels.minicpm_keep_size,
    banned=r"</?(image|slice|image_id)>|<\|(image|video)_pad\|>",
)
LFM2 = Family(
    pixels.lfm2_resize,
    pixels.lfm2_pixel_values,
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
    "gemma3n": GEMMA3N,
    "gemma4": GEMMA4,
    "gemma4_unified": GEMMA4._replace(  # no tower: embed_vision projects pixels
        resize=partial(pixels.gemma4_resize, merged=True),
        pixel_values=partial(pixels.gemma4_pixel_values, merged=True),
        tower="",
    ),
    "glm4v": GLM,
    "glm46v": GLM,
    "glm4v_moe": GLM,
    "mistral3": MISTRAL3,
    "ovis2": OVIS2,
    "exaone4_5": QWEN._replace(banned=r"<\|vision_(start|end)\|>", answer_tokens=r"$^"),
    "molmo2": MOLMO2,
    "kimi_k25": KIMI,
    "minicpmv4_6": MINICPM,
    "minicpmv4_7": MINICPM._replace(grid="target_sizes"),
    "lfm2_vl": LFM2,
    "lfm3_vl": QWEN._replace(
        tower="vision_tower",
        projector=("multi_modal_projector",),
        cast=True,
        answer_tokens=r"$^",
    ),
    "cohere2_vision": LLAVA._replace(untiled={"crop_to_patches": False}),
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
