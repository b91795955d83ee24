"""Load a checkpoint: config, processor, model. What cannot be used is refused in one line.

    config = load_config("Qwen/Qwen2.5-VL-3B-Instruct")  # or a folder
    processor = load_processor("Qwen/Qwen2.5-VL-3B-Instruct", config)
    model = load_model("Qwen/Qwen2.5-VL-3B-Instruct", config, dtype=torch.bfloat16)

The code of a model's repository is never run. A ValueError or OSError names the model, what is
wrong with it and the mend.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig
from transformers.processing_utils import ProcessorMixin

from vlm.families import FAMILIES, REFUSED

FROM_BASE = "copy the missing files from the model that it was trained from"


def load_config(name_or_path: str) -> PreTrainedConfig:
    """The config of a vision-language model of a supported family.

    Raises OSError if there is no such model, ValueError for a folder or a model of another kind,
    ImportError where a package that its vision tower needs is missing.
    """
    folder = Path(name_or_path)
    if folder.exists():
        refuse_folder(folder)
    try:
        stored, _ = PreTrainedConfig.get_config_dict(name_or_path)
    except (OSError, ValueError) as error:
        if folder.exists():
            raise ValueError(f"{folder} has a broken config.json: {one_line(error)}") from error
        raise OSError(
            f"there is no model {name_or_path!r:.200}: no folder {str(folder.absolute()):.200} "
            f"and no hub id that can be read ({one_line(error)})"
        ) from error
    kind = stored.get("model_type")
    if kind is None:
        raise ValueError(f"the config.json of {name_or_path} names no model_type")
    if kind in FAMILIES:
        package = FAMILIES[kind].package
        if package and importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{name_or_path} is a {kind!r} model, whose vision tower needs {package}: "
                f"pip install {package}"
            )
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    if kind in REFUSED:
        raise ValueError(f"{name_or_path} is a {kind!r} model, which is refused: {REFUSED[kind]}")
    if "auto_map" in stored:
        raise ValueError(
            f"{name_or_path} is a {kind!r} model that needs the code of its own repository, which "
            "is not run; use a checkpoint in the format of transformers (its name often ends in "
            f"-hf) of one of the families {', '.join(FAMILIES)}"
        )
    raise ValueError(
        f"{name_or_path} is a {kind!r} model; train_saei needs a vision-language model "
        f"of one of the families {', '.join(FAMILIES)}"
    )


def refuse_folder(folder: Path) -> None:
    """Raises ValueError for a file, an adapter and a folder without a config.json."""
    if folder.is_file():
        raise ValueError(f"model {folder} is a file; give the folder that holds config.json")
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        name = r'"base_model_name_or_path":\s*"([^"]*)"'
        found = re.search(name, adapter.read_text(errors="replace"))
        base = found[1] if found else "another model"
        raise ValueError(
            f"{folder} holds a LoRA adapter of {base:.200}; merge the two (peft's "
            "merge_and_unload), save the result and its processor, and give that folder"
        )
    if (folder / "config.json").exists():
        return
    below = [path.parent for path in folder.glob("*/config.json")]
    below += [path.parent for path in folder.glob("*/*/config.json")]
    models = [path for path in below if not path.name.startswith(".")]  # else not yet whole
    if models:
        last = max(models, key=by_numbers)
        raise ValueError(
            f"{folder} holds no model itself but {len(models)} in folders below; use {last}"
        )
    if (folder / "config.yaml").exists():
        raise ValueError(f"{folder} is a run that has no checkpoint yet; give a model's folder")
    found = sorted(path.name for path in folder.iterdir())
    held = ", ".join(found[:5]) or "nothing"
    raise ValueError(f"{folder} has no config.json, so it is no model; it holds {held:.200}")


def by_numbers(path: Path) -> list[str | int]:
    """A key that sorts step-9 before step-10."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if part.isdigit() else part for part in parts]


def load_processor(name_or_path: str, config: PreTrainedConfig) -> ProcessorMixin:
    """Its processor. Raises ValueError if a part is missing or is another model's."""
    try:
        processor = AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False)
    except ImportError as error:
        raise ImportError(f"the processor of {name_or_path}: {one_line(error)}") from error
    except Exception as error:  # also tokenizers' plain Exception; all mean broken or missing files
        raise ValueError(
            f"the processor of {name_or_path} cannot be loaded: {one_line(error)}; {FROM_BASE}"
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ValueError(
            f"{name_or_path} has no processor for pictures and text, only a "
            f"{type(processor).__name__}; {FROM_BASE}"
        )
    known, image_id = len(processor.tokenizer), config.image_token_id
    if image_id >= known:
        raise ValueError(
            f"the tokenizer of {name_or_path} has {known} tokens and lacks the model's image token "
            f"{image_id}: its files are missing or of another model; {FROM_BASE}"
        )
    if processor.chat_template is None:
        raise ValueError(f"{name_or_path} has no chat template (chat_template.jinja); {FROM_BASE}")
    return processor


def load_model(
    name_or_path: str, config: PreTrainedConfig, weights: bool = True, **options: Any
) -> nn.Module:
    """The model with its weights. weights False: without values, on the meta device.

    Raises OSError for missing or unreadable files, ValueError for an attention that the model has
    not or computes wrongly, and for weights that lack parameters: the library would set these at
    random.
    """
    # Its image tokens see those behind them. Flash attention reads no mask that says so.
    two_ways = FAMILIES[config.model_type].token_types
    if two_ways and "flash" in options.get("attn_implementation", ""):
        raise ValueError(
            f"{name_or_path} is a {config.model_type!r} model, whose image tokens see one another, "
            "which flash attention does not compute; set --attention sdpa"
        )
    try:
        if not weights:
            with torch.device("meta"):
                return AutoModelForImageTextToText.from_config(config, **options)
        model, report = AutoModelForImageTextToText.from_pretrained(
            name_or_path, trust_remote_code=False, output_loading_info=True, **options
        )
    except ImportError as error:
        raise ImportError(f"{name_or_path}: {one_line(error)}") from error
    except SafetensorError as error:
        raise OSError(
            f"a weights file of {name_or_path} is cut or a Git LFS pointer ({one_line(error)}); "
            "download it again"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: shapes that differ
        if "does not support an attention implementation" in str(error):
            text = config.get_text_config().model_type
            raise ValueError(
                f"{name_or_path} has a {text} language model, which transformers computes with "
                "neither sdpa nor flash_attention_2; set --attention eager"
            ) from error
        raise OSError(f"the model of {name_or_path} cannot be loaded: {one_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"the weights of {name_or_path} lack {len(missing)} parameters of its config.json, "
            f"such as {', '.join(missing[:2]):.200}; are all their files there?"
        )
    return model


def one_line(error: Exception) -> str:
    """The first sentence of its message, 200 characters at most."""
    text = " ".join(str(error).split())
    return f"{text.split('. ')[0]:.200}"
