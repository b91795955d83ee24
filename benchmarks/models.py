"""Released models by their published sizes, without weights and without a download.

    side = write("3B", folder)  # a folder that --model takes, for --dry_run and random weights
    Policy.from_pretrained(folder, weights=False)

Sizes and settings of the image processor are the published ones (tests/test_models.py counts
parameters and image tokens). The tokenizer is the demo's: its few tokens are the first of the
model's vocabulary, the others are never sampled.
"""

from pathlib import Path
from typing import NamedTuple

from transformers import (
    AutoConfig,
    AutoTokenizer,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.processing_utils import ProcessorMixin

DEMO = Path(__file__).resolve().parent.parent / "demo/mixed"
SMOLVLM_TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
SMOLVLM_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class Model(NamedTuple):
    """A released model: its hub id, its kind of config, what its config says, its picture sizes."""

    hub: str
    kind: str
    text: dict
    vision: dict
    tied: bool
    parameters: int  # of the released weights
    least_pixels: int = 0  # limits of a picture's area
    most_pixels: int = 0
    options: dict = {}


def sizes(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict:
    """A language model's sizes by their names in its config."""
    return dict(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
    )


def rope(theta: float, sections: list[int], **more) -> dict:
    parameters = dict(rope_type="default", rope_theta=theta, mrope_section=sections, **more)
    return dict(rope_parameters=parameters, max_position_embeddings=128_000)


ROPE_2_5 = rope(1e6, [16, 24, 24])
ROPE_3 = rope(5e6, [24, 20, 20], mrope_interleaved=True)
ROPE_3_5 = rope(1e7, [11, 11, 10], mrope_interleaved=True, partial_rotary_factor=0.25)
TOWER_2_5 = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, window_size=112)
TOWER_3 = dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, patch_size=16)
SIGLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
LIMITS_2_5, LIMITS_3 = (56 * 56, 28 * 28 * 16384), (256 * 256, 4096 * 4096)

MODELS = {
    "3B": Model(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "qwen2_5_vl",
        sizes(2048, 11008, 36, 16, 2, 151_936) | ROPE_2_5,
        TOWER_2_5 | dict(out_hidden_size=2048),
        True,
        3_754_622_976,
        *LIMITS_2_5,
    ),
    "7B": Model(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "qwen2_5_vl",
        sizes(3584, 18944, 28, 28, 4, 152_064) | ROPE_2_5,
        TOWER_2_5 | dict(out_hidden_size=3584),
        False,
        8_292_166_656,
        *LIMITS_2_5,
    ),
    "Qwen3-VL-4B": Model(
        "Qwen/Qwen3-VL-4B-Instruct",
        "qwen3_vl",
        sizes(2560, 9728, 36, 32, 8, 151_936) | ROPE_3 | dict(head_dim=128),
        TOWER_3 | dict(out_hidden_size=2560, deepstack_visual_indexes=[5, 11, 17]),
        True,
        4_437_815_808,
        *LIMITS_3,
    ),
    "Qwen3.5-4B": Model(
        "Qwen/Qwen3.5-4B",
        "qwen3_5",
        sizes(2560, 9216, 32, 16, 4, 248_320) | ROPE_3_5 | dict(head_dim=256),
        TOWER_3 | dict(out_hidden_size=2560),
        True,
        4_539_265_536,
        *LIMITS_3,
    ),
    "SmolVLM-256M": Model(
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        "idefics3",
        sizes(576, 1536, 30, 9, 3, 49_280) | dict(model_type="llama", rms_norm_eps=1e-5),
        SIGLIP | dict(image_size=512, patch_size=16),
        False,
        256_484_928,
        options=dict(scale_factor=4),
    ),
}
BY_HUB_ID = {model.hub: name for name, model in MODELS.items()}


def processor(name: str) -> ProcessorMixin:
    """The model's processor with the demo's tokens."""
    model, tokenizer = MODELS[name], AutoTokenizer.from_pretrained(DEMO)
    template = (DEMO / "chat_template.jinja").read_text()
    if model.kind == "idefics3":
        tokenizer.add_tokens(SMOLVLM_TOKENS, special_tokens=True)
        areas = dict(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
        options = dict(image_seq_len=64, chat_template=SMOLVLM_TEMPLATE)
        return Idefics3Processor(Idefics3ImageProcessor(**areas), tokenizer, **options)
    patch = model.vision.get("patch_size", 14)
    options = dict(patch_size=patch, merge_size=2, temporal_patch_size=2)
    options["size"] = dict(shortest_edge=model.least_pixels, longest_edge=model.most_pixels)
    of_images = Qwen2VLImageProcessor(**options)
    if model.kind == "qwen2_5_vl":
        videos = Qwen2VLVideoProcessor(**options)
        return Qwen2_5_VLProcessor(of_images, tokenizer, videos, chat_template=template)
    videos = Qwen3VLVideoProcessor(**options)
    return Qwen3VLProcessor(of_images, tokenizer, videos, chat_template=template)


def config(name: str, tokenizer) -> PreTrainedConfig:
    """The model's config, with the ids that this tokenizer gives to special tokens."""
    model, ids = MODELS[name], {}
    tokens = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    tokens |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    if model.kind == "idefics3":
        tokens = {"image": "<image>"}
    for what, token in tokens.items():
        ids[f"{what}_token_id"] = tokenizer.convert_tokens_to_ids(token)
    return AutoConfig.for_model(
        model.kind,
        text_config=model.text | dict(tie_word_embeddings=model.tied),
        vision_config=model.vision,
        tie_word_embeddings=model.tied,
        **ids,
        **model.options,
    )


def write(name: str, folder: str | Path) -> int:
    """Config and processor of MODELS[name].   -> pixels of the side of an image token"""
    made = processor(name)
    config(name, made.tokenizer).save_pretrained(folder)
    made.save_pretrained(folder)
    model = MODELS[name]
    return model.vision.get("patch_size", 14) * model.options.get("scale_factor", 2)
