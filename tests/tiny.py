"""Tiny random models of every family in policy.FAMILIES, with the real model, processor and image processor classes.

Nothing is downloaded: configurations of two small layers, a word-level tokenizer that knows the family's image tokens,
and a chat template. `build(kind)` -> (model, processor).
"""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

SIDE, PATCH = 32, 8  # of the vision towers that see every picture at one size: 4 x 4 patches
WORDS = "how many dots which of the two pictures shows red die ? , . what is + = look then say answer : boxed think"
WORDS = [*WORDS.split(), *"0123456789", *(f"word{i}" for i in range(40))]
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=3,
    eos_token_id=2,
    pad_token_id=1,
)
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TOWER |= dict(image_size=SIDE, patch_size=PATCH)
FIXED = dict(size={"height": SIDE, "width": SIDE})


def build_tokenizer(
    named: dict[str, str], special: list[str], bos: bool = False
) -> PreTrainedTokenizerFast:
    """named: tokens that a processor reads as attributes of its tokenizer; special: further ones."""
    vocabulary = ["<unk>", "<pad>", "<end>", "<bos>", *WORDS]
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        words.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 3)]
        )
    names = dict(unk_token="<unk>", pad_token="<pad>", eos_token="<end>", bos_token="<bos>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=named, **names)
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


def chat_template(image: str, start: str = "") -> str:
    return (
        "{% for message in messages %}" + start + "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}"
        + image
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        " answer :"
    )


def qwen(kind: str):
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = build_tokenizer({}, [])
    tokenizer.add_tokens(special)  # known from the configuration alone
    sizes = dict(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    limits = dict(size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64})
    classes = {
        "qwen2_vl": Qwen2VLProcessor,
        "qwen2_5_vl": Qwen2_5_VLProcessor,
        "qwen3_vl": Qwen3VLProcessor,
    }
    video = Qwen3VLVideoProcessor if kind == "qwen3_vl" else Qwen2VLVideoProcessor
    template = chat_template("<|vision_start|><|image_pad|><|vision_end|>")
    image_processor = Qwen2VLImageProcessor(**sizes, **limits)
    processor = classes[kind](image_processor, tokenizer, video(**sizes), chat_template=template)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    tower = dict(depth=2, num_heads=4, patch_size=PATCH)
    if kind == "qwen2_vl":
        tower |= dict(embed_dim=32, hidden_size=32, mlp_ratio=2)
    elif kind == "qwen2_5_vl":
        tower |= dict(hidden_size=32, intermediate_size=48, out_hidden_size=32, window_size=32)
        tower |= dict(fullatt_block_indexes=[1])
    else:
        rope["mrope_interleaved"] = True
        tower |= dict(
            hidden_size=32, intermediate_size=48, out_hidden_size=32, num_position_embeddings=64
        )
        tower |= dict(deepstack_visual_indexes=[0])
    text = TEXT | dict(rope_parameters=rope) | (dict(head_dim=8) if kind == "qwen3_vl" else {})
    names = ("vision_start", "vision_end", "image", "video")
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(t)
        for name, t in zip(names, special, strict=True)
    }
    return dict(text_config=text, vision_config=tower, **ids), processor


def smolvlm(kind: str):
    grid = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    tokenizer = build_tokenizer({}, ["<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    tokenizer.add_tokens(["<global-img>", *grid])  # not special, as in some checkpoints
    sizes = dict(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    tokens, template = SIDE**2 // PATCH**2 // 4, chat_template("<image>")
    if kind == "smolvlm":
        videos = SmolVLMVideoProcessor(
            **sizes, video_sampling={"fps": 1, "max_frames": 2, "video_size": sizes["size"]}
        )
        parts = (SmolVLMImageProcessor(**sizes), tokenizer, videos)
        processor = SmolVLMProcessor(*parts, image_seq_len=tokens, chat_template=template)
    else:
        parts = (Idefics3ImageProcessor(**sizes), tokenizer)
        processor = Idefics3Processor(*parts, image_seq_len=tokens, chat_template=template)
    text = TEXT | dict(model_type="llama")
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = dict(
        text_config=text, vision_config=TOWER, scale_factor=2, image_token_id=image, pad_token_id=1
    )
    return config, processor


def llava(kind: str):
    tokenizer = build_tokenizer({}, ["<image>", "<video>"], bos=kind != "llava_onevision")
    template, clip = chat_template("<image>"), TOWER | dict(model_type="clip_vision_model")
    crop = dict(size={"shortest_edge": SIDE}, crop_size=FIXED["size"])
    cls = dict(
        patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    config = dict(
        text_config=TEXT | dict(model_type="llama"), vision_config=clip, image_token_index=image
    )
    if kind == "llava":
        processor = LlavaProcessor(
            CLIPImageProcessor(**crop), tokenizer, chat_template=template, **cls
        )
    elif kind == "llava_next":
        tiles = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
        image_processor = LlavaNextImageProcessor(**crop, image_grid_pinpoints=tiles)
        processor = LlavaNextProcessor(image_processor, tokenizer, chat_template=template, **cls)
        config["image_grid_pinpoints"] = tiles
    else:
        tiles = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
        image_processor = LlavaOnevisionImageProcessor(**FIXED, image_grid_pinpoints=tiles)
        parts = (image_processor, tokenizer, LlavaOnevisionVideoProcessor(**FIXED))
        tokens = dict(num_image_tokens=(SIDE // PATCH) ** 2, vision_feature_select_strategy="full")
        processor = LlavaOnevisionProcessor(*parts, chat_template=template, **tokens)
        siglip = TOWER | dict(model_type="siglip_vision_model", vision_use_head=False)
        config |= dict(
            text_config=TEXT | dict(model_type="qwen2"),
            vision_config=siglip,
            video_token_index=video,
        )
        config |= dict(image_grid_pinpoints=tiles)
    return config, processor


def internvl(kind: str):
    named = dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>"
    )
    tokenizer = build_tokenizer(named | dict(video_token="<video>"), [])
    parts = (GotOcr2ImageProcessor(**FIXED), tokenizer, InternVLVideoProcessor(**FIXED))
    processor = InternVLProcessor(
        *parts, image_seq_length=4, chat_template=chat_template("<IMG_CONTEXT>")
    )
    tower = TOWER | dict(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH])
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    text = TEXT | dict(model_type="qwen2", tie_word_embeddings=False)
    return dict(
        text_config=text, vision_config=tower, image_token_id=image, image_seq_length=4
    ), processor


def gemma3(kind: str):
    named = dict(
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    tokenizer = build_tokenizer(named, [], bos=True)
    template = chat_template("<start_of_image>", start="{{ bos_token }}")
    parts = (Gemma3ImageProcessor(**FIXED), tokenizer)
    processor = Gemma3Processor(*parts, chat_template=template, image_seq_length=4)
    text = TEXT | dict(
        head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    tower, ids = TOWER | dict(model_type="siglip_vision_model", vision_use_head=False), {}
    for name, token in named.items():
        ids[{"image_token": "image_token_id"}.get(name, f"{name[:3]}_token_index")] = (
            tokenizer.convert_tokens_to_ids(token)
        )
    ids = {"image_token_index": ids.pop("image_token_id"), **ids}
    return dict(text_config=text, vision_config=tower, mm_tokens_per_image=4, **ids), processor


BUILD = {
    "qwen2_vl": qwen,
    "qwen2_5_vl": qwen,
    "qwen3_vl": qwen,
    "smolvlm": smolvlm,
    "idefics3": smolvlm,
    "llava": llava,
    "llava_next": llava,
    "llava_onevision": llava,
    "internvl": internvl,
    "gemma3": gemma3,
}


def build(kind: str):
    """A tiny random model of a family and its processor."""
    config, processor = BUILD[kind](kind)
    config["text_config"] = config["text_config"] | {"vocab_size": len(processor.tokenizer)}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **config))
    model.generation_config.eos_token_id = 2
    return model, processor
