"""Tiny random models of every family in vlm.families, of the real model and processor classes.

Nothing is downloaded: configurations of two small layers, a word-level tokenizer that knows the
family's image tokens, and a chat template. `build(kind)` -> (model, processor). The newest
families' classes are named transformers.X, so that earlier versions build the others.
"""

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Cohere2VisionImageProcessor,
    Cohere2VisionProcessor,
    Exaone4_5_Processor,
    Gemma3ImageProcessor,
    Gemma3nAudioFeatureExtractor,
    Gemma3nProcessor,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4UnifiedAudioFeatureExtractor,
    Gemma4UnifiedImageProcessor,
    Gemma4UnifiedProcessor,
    Gemma4UnifiedVideoProcessor,
    Gemma4VideoProcessor,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    Kimi_K25ImageProcessor,
    Kimi_K25Processor,
    Kimi_K25VideoProcessor,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    MiniCPMV4_6ImageProcessor,
    MiniCPMV4_6Processor,
    MiniCPMV4_6VideoProcessor,
    Ovis2ImageProcessor,
    Ovis2Processor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Tokenizer,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

SIDE, PATCH = 32, 8  # of the towers that see every picture at one size: 4 x 4 patches
WORDS = (
    "how many dots which of the two pictures shows red die ? , . what is + = look then say answer "
    ": boxed think 0 1 2 3 4 5 6 7 8 9"
).split() + [f"word{i}" for i in range(40)]
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
TOWER = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=PATCH,
)
SIGLIP = TOWER | dict(model_type="siglip_vision_model", vision_use_head=False)
FIXED = dict(size={"height": SIDE, "width": SIDE})
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


def build_tokenizer(named: dict[str, str], special: list[str], bos: bool = False):
    """named: tokens that a processor reads as attributes of its tokenizer; special: others."""
    vocabulary = ["<unk>", "<pad>", "<end>", "<bos>", *WORDS]
    ids = {word: i for i, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        words.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 3)]
        )
    names = dict(unk_token="<unk>", pad_token="<pad>", eos_token="<end>", bos_token="<bos>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=named, **names)
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


def byte_tokenizer():
    """For qwen3_5: whatever was saved, its tokenizer splits by its own rule and merges bytes."""
    names = dict(unk_token="<unk>", pad_token="<pad>", eos_token="<end>", bos_token="<bos>")
    vocabulary = [*names.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return Qwen3_5Tokenizer({token: i for i, token in enumerate(vocabulary)}, [], **names)


def chat_template(image: str, start: str = "") -> str:
    return (
        f"{{% for message in messages %}}{start}{{% for part in message['content'] %}}"
        f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %} answer :{% endif %}"
    )


def qwen(kind: str):
    tokenizer = byte_tokenizer() if kind.startswith("qwen3_5") else build_tokenizer({}, [])
    tokens = {
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    }
    tokenizer.add_tokens(list(tokens.values()))  # known from the configuration alone
    sizes = dict(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    limits = dict(size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64})
    image_processor = Qwen2VLImageProcessor(**sizes, **limits)
    template = chat_template("<|vision_start|><|image_pad|><|vision_end|>")
    text = TEXT | dict(
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
        }
    )
    tower = dict(depth=2, num_heads=4, patch_size=PATCH, hidden_size=32)
    video = Qwen2VLVideoProcessor
    if kind == "qwen2_vl":
        processor_class = Qwen2VLProcessor
        tower |= dict(embed_dim=32, mlp_ratio=2)
    elif kind == "qwen2_5_vl":
        processor_class = Qwen2_5_VLProcessor
        tower |= dict(intermediate_size=48, out_hidden_size=32, window_size=32)
        tower |= dict(fullatt_block_indexes=[1])
    else:
        processor_class, video = Qwen3VLProcessor, Qwen3VLVideoProcessor
        text["head_dim"] = 8
        text["rope_parameters"]["mrope_interleaved"] = True
        tower |= dict(intermediate_size=48, out_hidden_size=32, num_position_embeddings=64)
        if kind.startswith("qwen3_vl"):
            tower |= dict(deepstack_visual_indexes=[0])
        else:  # three layers of linear attention and one of full attention
            text |= dict(num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4)
            text |= dict(linear_key_head_dim=16, linear_value_head_dim=32)
            text["rope_parameters"]["partial_rotary_factor"] = 1.0
        if kind.endswith("moe"):
            text |= EXPERTS | dict(shared_expert_intermediate_size=24, norm_topk_prob=True)
    processor = processor_class(image_processor, tokenizer, video(**sizes), chat_template=template)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    return dict(text_config=text, vision_config=tower, **ids), processor


def smolvlm(kind: str):
    tokenizer = build_tokenizer({}, ["<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    tokenizer.add_tokens(["<global-img>", *tiles])  # not special, as in some checkpoints
    sizes = dict(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    options = dict(image_seq_len=SIDE**2 // PATCH**2 // 4, chat_template=chat_template("<image>"))
    if kind == "smolvlm":
        sampling = {"fps": 1, "max_frames": 2, "video_size": sizes["size"]}
        videos = SmolVLMVideoProcessor(**sizes, video_sampling=sampling)
        processor = SmolVLMProcessor(SmolVLMImageProcessor(**sizes), tokenizer, videos, **options)
    else:
        processor = Idefics3Processor(Idefics3ImageProcessor(**sizes), tokenizer, **options)
    config = dict(
        text_config=TEXT | dict(model_type="llama"),
        vision_config=TOWER,
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=1,
    )
    return config, processor


def llava(kind: str):
    tokenizer = build_tokenizer({}, ["<image>", "<video>"], bos=kind != "llava_onevision")
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    template = chat_template("<image>")
    crop = dict(size={"shortest_edge": SIDE}, crop_size=FIXED["size"])
    tiles = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    cls_token = dict(
        patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = dict(
        text_config=TEXT | dict(model_type="llama"),
        vision_config=TOWER | dict(model_type="clip_vision_model"),
        image_token_index=image,
    )
    if kind == "llava":
        processor = LlavaProcessor(
            CLIPImageProcessor(**crop), tokenizer, chat_template=template, **cls_token
        )
    elif kind == "llava_next":
        image_processor = LlavaNextImageProcessor(**crop, image_grid_pinpoints=tiles)
        processor = LlavaNextProcessor(
            image_processor, tokenizer, chat_template=template, **cls_token
        )
        config["image_grid_pinpoints"] = tiles
    else:
        tiles = [[SIDE, SIDE], *tiles]
        processor = LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(**FIXED, image_grid_pinpoints=tiles),
            tokenizer,
            LlavaOnevisionVideoProcessor(**FIXED),
            chat_template=template,
            num_image_tokens=(SIDE // PATCH) ** 2,
            vision_feature_select_strategy="full",
        )
        config |= dict(
            text_config=TEXT | dict(model_type="qwen2"),
            vision_config=SIGLIP,
            video_token_index=video,
            image_grid_pinpoints=tiles,
        )
    return config, processor


def internvl(kind: str):
    named = dict(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    tokenizer = build_tokenizer(named, [])
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(**FIXED),
        tokenizer,
        InternVLVideoProcessor(**FIXED),
        image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )
    config = dict(
        text_config=TEXT | dict(model_type="qwen2", tie_word_embeddings=False),
        vision_config=TOWER | dict(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    return config, processor


def gemma3(kind: str):
    named = dict(
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    tokenizer = build_tokenizer(named, [], bos=True)
    processor = Gemma3Processor(
        Gemma3ImageProcessor(**FIXED),
        tokenizer,
        chat_template=chat_template("<start_of_image>", start="{{ bos_token }}"),
        image_seq_length=4,
    )
    layers = ["sliding_attention", "full_attention"]
    ids = {}
    for name, token in named.items():
        ids[f"{name}_index"] = tokenizer.convert_tokens_to_ids(token)
    config = dict(
        text_config=TEXT | dict(head_dim=8, sliding_window=8, layer_types=layers),
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        **ids,
    )
    return config, processor


def gemma3n(kind: str):
    # Above the text's vocabulary stand the pictures' tokens, then the sounds'.
    named = dict(
        boi_token="<start_of_image>",
        boa_token="<start_of_audio>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
        eoa_token="<end_of_audio>",
        audio_token="<audio_soft_token>",
    )
    tokenizer = build_tokenizer(named, [], bos=True)
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(),
        SiglipImageProcessor(**FIXED, do_normalize=False, image_mean=[0] * 3, image_std=[1] * 3),
        tokenizer,
        chat_template=chat_template("<image_soft_token>", start="{{ bos_token }}"),
        image_seq_length=4,
    )
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
    text = TEXT | dict(
        num_hidden_layers=4,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=ids["eoi_token_id"],
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        final_logit_softcapping=30.0,
    )
    audio = dict(hidden_size=8, conf_num_hidden_layers=1, conf_num_attention_heads=2)
    audio |= dict(sscp_conv_channel_size=[4, 4], vocab_size=2, vocab_offset=ids["eoa_token_id"])
    # timm's MobileNetV5, its 84 blocks narrow: 32 x 32 pixels -> 2 x 2 tokens of 2,048 numbers
    tower = dict(model_args=dict(channel_multiplier=0.05, msfa_output_resolution=2))
    config = dict(
        text_config=text,
        vision_config=dict(vocab_size=2, vocab_offset=ids["eoi_token_id"], **tower),
        audio_config=audio,
        vision_soft_tokens_per_image=4,
        **ids,
    )
    return config, processor


def gemma4(kind: str):
    named = dict(
        boi_token="<|image>",
        eoi_token="<image|>",
        image_token="<|image|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
        audio_token="<|audio|>",
    )
    tokenizer = build_tokenizer(named, ["<|channel>", "<channel|>"], bos=True)
    sizes = dict(patch_size=PATCH // 2, max_soft_tokens=70, pooling_kernel_size=2)
    options = dict(
        chat_template=chat_template("<|image|>", start="{{ bos_token }}"), image_seq_length=70
    )
    full = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}
    text = TEXT | dict(
        num_hidden_layers=4,
        head_dim=8,
        global_head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        final_logit_softcapping=3.0,
        use_bidirectional_attention="vision",
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": full,
        },
    )
    if kind == "gemma4":
        processor = Gemma4Processor(
            Gemma4AudioFeatureExtractor(),
            Gemma4ImageProcessor(**sizes),
            tokenizer,
            Gemma4VideoProcessor(),
            **options,
        )
        text |= dict(num_kv_shared_layers=2, hidden_size_per_layer_input=16)
        text["vocab_size_per_layer_input"] = len(tokenizer)
        tower = TOWER | dict(num_key_value_heads=4, head_dim=8, position_embedding_size=128)
        tower |= dict(patch_size=PATCH // 2, pooling_kernel_size=2, num_hidden_layers=1)
    else:
        processor = Gemma4UnifiedProcessor(
            Gemma4UnifiedAudioFeatureExtractor(),
            Gemma4UnifiedImageProcessor(**sizes),
            tokenizer,
            Gemma4UnifiedVideoProcessor(),
            **options,
        )
        text["num_kv_shared_layers"] = 0
        tower = dict(patch_size=PATCH // 2, pooling_kernel_size=2)
        tower |= dict(mm_embed_dim=32, mm_posemb_size=80, output_proj_dims=32)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
    ids["eoa_token_index"] = ids.pop("eoa_token_id")
    return dict(text_config=text, vision_config=tower, audio_config=None, **ids), processor


def glm(kind: str):
    names = "image_start image_end image video video_start video_end".split()
    tokens = "begin_of_image end_of_image image video begin_of_video end_of_video".split()
    tokens = [f"<|{token}|>" for token in tokens]
    tokenizer = build_tokenizer({}, [*tokens, "<|begin_of_box|>", "<|end_of_box|>"])
    sizes = dict(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    limits = dict(size={"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 64 * 64})
    template = chat_template("<|begin_of_image|><|image|><|end_of_image|>")
    if kind == "glm46v":
        images, videos = Glm46VImageProcessor(**sizes, **limits), Glm46VVideoProcessor(**sizes)
        processor = Glm46VProcessor(images, tokenizer, videos, chat_template=template)
    else:
        images, videos = Glm4vImageProcessor(**sizes, **limits), Glm4vVideoProcessor(**sizes)
        processor = Glm4vProcessor(images, tokenizer, videos, chat_template=template)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = TEXT | dict(rope_parameters=rope | {"partial_rotary_factor": 1.0})
    tower = dict(depth=2, num_heads=4, patch_size=PATCH, hidden_size=32, image_size=64)
    tower |= dict(intermediate_size=48, out_hidden_size=32)
    if kind == "glm46v":
        text["model_type"], tower["model_type"] = "glm4v_text", "glm4v_vision"
    if kind == "glm4v_moe":
        text |= dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
        text |= dict(n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1)
        text["head_dim"] = 8
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(tokens), strict=True))
    ids = {f"{name}_token_id": i for name, i in ids.items()}
    return dict(text_config=text, vision_config=tower, **ids), processor


def mistral3(kind: str):
    tokenizer = build_tokenizer({}, ["[IMG]", "[IMG_BREAK]", "[IMG_END]"], bos=True)
    patch = {"height": PATCH, "width": PATCH}
    processor = PixtralProcessor(
        PixtralImageProcessor(patch_size=patch, size={"longest_edge": 64}),
        tokenizer,
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=chat_template("[IMG]", start="{{ bos_token }}"),
    )
    config = dict(
        text_config=TEXT | dict(model_type="mistral", head_dim=8, sliding_window=None),
        vision_config=TOWER | dict(model_type="pixtral", image_size=64, head_dim=8),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return config, processor


def ovis2(kind: str):
    marks = [f"<IMG_{name}>" for name in ("START", "GRID", "COL", "ROW", "END")]
    tokenizer = build_tokenizer({}, ["<IMG_ATOM>", "<image>", *marks])
    processor = Ovis2Processor(
        Ovis2ImageProcessor(**FIXED),
        tokenizer,
        chat_template=chat_template("<image>"),
        image_seq_length=4,
    )
    config = dict(
        text_config=TEXT | dict(model_type="qwen2", tie_word_embeddings=False),
        vision_config=TOWER | dict(vocab_size=40, hidden_stride=2, num_visual_indicator_tokens=5),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(marks),
        hidden_size=32,
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
    )
    return config, processor


def exaone(kind: str):
    config, other = qwen("qwen2_5_vl")
    processor = Exaone4_5_Processor(
        other.image_processor,
        other.tokenizer,
        other.video_processor,
        chat_template=other.chat_template,
    )
    layers = ["sliding_attention", "full_attention"]
    text = TEXT | dict(model_type="exaone4", head_dim=8, sliding_window=8, layer_types=layers)
    tower = config["vision_config"] | dict(num_key_value_heads=2)
    ids = {name: config[name] for name in ("image_token_id", "video_token_id")}
    return dict(text_config=text, vision_config=tower, **ids), processor


def molmo2(kind: str):
    tokens = {
        "image_start_token_id": "<im_start>",
        "image_end_token_id": "<im_end>",
        "image_patch_id": "<im_patch>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }
    more = ["<im_col>", "<im_low>", "<|image|>", "<|video|>"]
    tokenizer = build_tokenizer({}, [*tokens.values(), *more], bos=True)
    image_processor = transformers.Molmo2ImageProcessor(
        **FIXED, patch_size=PATCH, pooling_size=[2, 2], overlap_margins=[1, 1], max_crops=4
    )
    template = chat_template("<|image|>", start="{{ bos_token }}")
    processor = transformers.Molmo2Processor(
        image_processor, transformers.Molmo2VideoProcessor(), tokenizer, chat_template=template
    )
    heads = dict(num_attention_heads=4, num_key_value_heads=4, head_dim=8, hidden_size=32)
    config = dict(
        text_config=TEXT | dict(head_dim=8, additional_vocab_size=4),
        vision_config=TOWER | heads | dict(image_size=[SIDE, SIDE]),
        adapter_config=dict(
            vision_feature_layer=[1, 0], intermediate_size=48, text_hidden_size=32, **heads
        ),
    )
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    return config | ids, processor


def kimi(kind: str):
    tokens = {
        "vision_start_token_id": "<|media_begin|>",
        "vision_end_token_id": "<|media_end|>",
        "image_token_id": "<|media_pad|>",
        "video_token_id": "<|kimi_k25_video_placeholder|>",
    }
    tokenizer = build_tokenizer({}, [])
    tokenizer.add_tokens(["<|media_content|>", *tokens.values()])
    sizes = dict(patch_size=PATCH, merge_size=2, size={"max_height": 8, "max_width": 8})
    before, after = "<|media_begin|>image<|media_content|>", "<|media_end|>"
    processor = Kimi_K25Processor(
        Kimi_K25ImageProcessor(**sizes, max_patches=64),
        tokenizer,
        Kimi_K25VideoProcessor(patch_size=PATCH),
        chat_template=chat_template(f"{before}<|media_pad|>{after}"),
    )
    ranks = dict(q_lora_rank=16, kv_lora_rank=16)
    heads = dict(num_key_value_heads=4, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    experts |= dict(n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    config = dict(
        text_config=TEXT | dict(model_type="deepseek_v3") | ranks | heads | experts,
        vision_config=TOWER | dict(pos_emb_height=8, pos_emb_width=8),
        projection_hidden_size=32,
        tie_word_embeddings=False,
        **ids,
    )
    return config, processor


def minicpm(kind: str):
    named = dict(image_token="<|image_pad|>", video_token="<|video_pad|>")
    for name in ("image", "slice", "image_id"):
        named |= {f"{name}_start_token": f"<{name}>", f"{name}_end_token": f"</{name}>"}
    tokenizer = build_tokenizer(named, [])
    sizes = dict(patch_size=PATCH // 2, scale_resolution=48)
    processor_class = (
        MiniCPMV4_6Processor if kind == "minicpmv4_6" else transformers.MiniCPMV4_7Processor
    )
    processor = processor_class(
        MiniCPMV4_6ImageProcessor(**sizes, max_slice_nums=4),
        MiniCPMV4_6VideoProcessor(**sizes),
        tokenizer,
        chat_template=chat_template("<|image_pad|>"),
    )
    layers = ["linear_attention", "full_attention"]
    text = dict(model_type="qwen3_5_text", num_hidden_layers=2, layer_types=layers)
    qwen_config, _ = qwen("qwen3_5")
    ids = {f"{x}_token_id": f"<|{x}_pad|>" for x in ("image", "video")}
    if kind == "minicpmv4_7":
        ids |= dict(image_start_id="<image>", image_end_id="</image>")
        ids |= dict(slice_start_id="<slice>", slice_end_id="</slice>")
    config = dict(
        text_config=qwen_config["text_config"] | text,
        vision_config=TOWER | dict(patch_size=PATCH // 2, image_size=48),
        insert_layer_id=0,
    )
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()}
    return config | ids, processor


def lfm2(kind: str):
    grid = [f"<|img_row_{i}_col_{j}|>" for i in range(1, 4) for j in range(1, 4)]
    marks = ["<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
    tokenizer = build_tokenizer({}, ["<image>", *marks, *grid])
    limits = dict(min_image_tokens=2, max_image_tokens=56, tile_size=64, max_tiles=4)
    image_processor = Lfm2VlImageProcessor(encoder_patch_size=PATCH, downsample_factor=2, **limits)
    processor = Lfm2VlProcessor(image_processor, tokenizer, chat_template=chat_template("<image>"))
    text = TEXT | dict(model_type="lfm2", num_hidden_layers=4, conv_L_cache=3)
    text |= dict(layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False)
    tower = TOWER | dict(model_type="siglip2_vision_model", num_patches=64, vision_use_head=False)
    tower |= dict(
        num_hidden_layers=1, intermediate_size=16
    )  # each picture is padded to 224 patches
    del tower["image_size"]
    config = dict(
        text_config=text,
        vision_config=tower,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=48,
    )
    return config, processor


def lfm3(kind: str):
    config, other = qwen("qwen3_vl")
    processor = transformers.Lfm3VlProcessor(
        other.image_processor,
        other.tokenizer,
        other.video_processor,
        chat_template=other.chat_template,
    )
    layers = ["conv", "sliding_attention", "conv", "full_attention"]
    text = TEXT | dict(model_type="lfm3", num_hidden_layers=4, layer_types=layers)
    text |= dict(conv_L_cache=3, head_dim=8, sliding_window=8)
    config |= dict(
        text_config=text,
        vision_config=TOWER | dict(num_hidden_layers=3, num_key_value_heads=2),
        projector_hidden_size=48,
    )
    del config["vision_config"]["image_size"]
    return config, processor


def cohere2(kind: str):
    named = dict(
        image_token="<|IMG_PATCH|>",
        boi_token="<|START_OF_IMG|>",
        eoi_token="<|END_OF_IMG|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )
    tokenizer = build_tokenizer(named, [])
    processor = Cohere2VisionProcessor(
        Cohere2VisionImageProcessor(**FIXED, patch_size=2),  # 2 x 2 tokens of a picture
        tokenizer,
        chat_template=chat_template("<|IMG_PATCH|>"),
    )
    layers = ["sliding_attention", "full_attention"]
    config = dict(
        text_config=TEXT | dict(model_type="cohere2", sliding_window=8, layer_types=layers),
        vision_config=SIGLIP,
        image_token_id=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        alignment_intermediate_size=48,
    )
    return config, processor


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
    "qwen3_5": qwen,
    "qwen3_5_moe": qwen,
    "qwen3_vl_moe": qwen,
    "gemma3n": gemma3n,
    "gemma4": gemma4,
    "gemma4_unified": gemma4,
    "glm4v": glm,
    "glm46v": glm,
    "glm4v_moe": glm,
    "mistral3": mistral3,
    "ovis2": ovis2,
    "exaone4_5": exaone,
    "molmo2": molmo2,
    "kimi_k25": kimi,
    "minicpmv4_6": minicpm,
    "minicpmv4_7": minicpm,
    "lfm2_vl": lfm2,
    "lfm3_vl": lfm3,
    "cohere2_vision": cohere2,
}


# The same families with other language models: "family text", what differs in text_config.
OTHER_TEXT = {
    "internvl qwen3": dict(head_dim=8),
    "internvl qwen3_moe": dict(head_dim=8, **EXPERTS),
    "internvl gpt_oss": dict(
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral3 ministral3": {},
}


def widened(config: dict) -> dict:
    """The same with heads of 32: the smallest that vLLM's attention takes on a CPU."""
    wide = dict.fromkeys(("hidden_size", "out_hidden_size", "embed_dim"), 128)
    wide |= {"head_dim": 32, "mrope_section": [8, 4, 4]}
    wide |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    found = {}
    for name, x in config.items():
        found[name] = widened(x) if isinstance(x, dict) else wide.get(name, x)
    return found


def build(kind: str, wide: bool = False):
    """A tiny random model of a family and its processor. kind: of BUILD or of OTHER_TEXT"""
    family, _, text = kind.partition(" ")
    config, processor = BUILD[family](family)
    config = widened(config) if wide else config
    if text:
        config["text_config"] |= dict(model_type=text, **OTHER_TEXT[kind])
    config["text_config"]["vocab_size"] = len(processor.tokenizer)
    options = {"attn_implementation": "eager"} if text == "gpt_oss" else {}
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(family, **config), **options
    )
    model.generation_config.eos_token_id = 2
    return model, processor
