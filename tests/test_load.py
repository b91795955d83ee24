"""Wrong model folders: one line that names the folder, the fault and the mend (vlm/load.py)."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature

from tests.families import KINDS, PICTURES, PROBLEMS, checkpoint, make_policy, shared_policy
from vlm.policy import Policy

CUT, LONG = 6, 180  # tokens: what the files below cut a prompt to, and pad it to


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole checkpoint, to be broken."""
    return Path(shutil.copytree(checkpoint("qwen2_5_vl"), tmp_path / "model"))


def update(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_refused(folder: Path | str, kind: type[Exception], message: str) -> None:
    """One line of the kind that matches."""
    with pytest.raises(kind, match=message) as caught:
        Policy.from_pretrained(str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


# ---------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["out/nothing", "./nothing", "a/b/c", "~/model", "a name"])
def test_a_folder_that_is_not_there(monkeypatch, tmp_path, name):
    """With the absolute place that was looked at. The hub is not asked in a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = re.escape(str(tmp_path / name))
    assert_refused(name, OSError, f"no model '{name}': no folder {place} and no hub id")


def test_the_folder_of_a_run_names_its_last_checkpoint(folder, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("steps: 2")
    assert_refused(run, ValueError, f"{run} is a run that has no checkpoint yet")
    for step in ("step-000080", "step-999999", "step-1000000", ".step-1000001"):
        shutil.copytree(folder, run / "checkpoints" / step)
    for place in (run, run / "checkpoints"):
        message = f"{place} holds no model.*use {run}/checkpoints/step-1000000$"
        assert_refused(place, ValueError, message)


def test_an_adapter_alone_names_its_base_model(folder):
    update_adapter = {"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}
    (folder / "adapter_config.json").write_text(json.dumps(update_adapter))
    message = f"{folder} holds a LoRA adapter of Qwen/Qwen2.5-VL-3B-Instruct; merge"
    assert_refused(folder, ValueError, message)
    (folder / "config.json").unlink()
    assert_refused(folder, ValueError, message)
    for content in ('{"base_model_name_or_path": null}', "{ cut"):
        (folder / "adapter_config.json").write_text(content)
        assert_refused(folder, ValueError, "holds a LoRA adapter of another model; merge")


def test_a_folder_without_a_config(folder, tmp_path):
    (folder / "config.json").unlink()
    assert_refused(folder, ValueError, "has no config.json.*it holds chat_template.jinja, gen")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", ValueError, "empty has no config.json.*it holds nothing")
    assert_refused(folder / "model.safetensors", ValueError, "is a file; give the folder")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "has a broken config.json"),
        ("{}", "names no model_type"),
        ('{"model_type": "qwen9_vl"}', "is a 'qwen9_vl' model.*families qwen2_vl, qwen2_5_vl"),
        ('{"model_type": "internvl_chat"}', "'internvl_chat' model, which is refused: .*-HF"),
        ('{"model_type": "llama"}', "is a 'llama' model.*needs a vision-language model"),
        (
            '{"model_type": "my_vlm", "auto_map": {"AutoConfig": "c.C"}}',
            "'my_vlm' model that needs the code of its own repository.*-hf.*qwen2_vl",
        ),
    ],
)
def test_a_config_of_another_kind(folder, text, message):
    (folder / "config.json").write_text(text)
    assert_refused(folder, ValueError, message)


def test_code_of_a_repository_is_not_run_or_asked_about(folder, monkeypatch):
    """A family that transformers knows is loaded with its own code."""
    update(folder / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    (folder / "evil.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda *_: 1 / 0)
    assert Policy.from_pretrained(str(folder)).model.config.model_type == "qwen2_5_vl"


# ------------------------------------------------------------------------------- processor, weights


@pytest.mark.parametrize(
    "missing, message",
    [
        (["processor_config.json"], "the processor of .*model cannot be loaded"),
        (["tokenizer.json"], "the processor of .*cannot be loaded: Couldn't instantiate"),
        # An empty tokenizer of the family's class, without a word.
        (["tokenizer.json", "tokenizer_config.json"], r"has 1 tokens and lacks .* image token \d+"),
        (["chat_template.jinja"], "has no chat template"),
    ],
)
def test_a_missing_part_of_the_processor(folder, missing, message, monkeypatch):
    """Said before the weights are loaded."""
    monkeypatch.setattr("vlm.policy.load_model", lambda *args, **options: 1 / 0)
    for name in missing:
        (folder / name).unlink()
    assert_refused(folder, ValueError, message + ".*copy the missing files from the model")


def test_no_processor_at_all(folder):
    """AutoProcessor then gives the tokenizer."""
    llm = json.loads((folder / "tokenizer_config.json").read_text())
    del llm["processor_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(llm))
    (folder / "processor_config.json").unlink()
    assert_refused(folder, ValueError, "processor of .*model")


def test_a_broken_tokenizer_and_a_broken_template(folder):
    template = folder / "chat_template.jinja"
    template.write_text("{% for x in %}")
    assert_refused(folder, ValueError, "chat template cannot write a question: TemplateSyntaxError")
    template.write_text("{% for m in messages %}{{ m.role + m.content }}{% endfor %}")
    assert_refused(folder, ValueError, "chat template cannot write a question: TypeError")
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert_refused(folder, ValueError, "chat template is one for text alone")
    (folder / "tokenizer.json").write_text("{")
    assert_refused(folder, ValueError, "the processor of .*cannot be loaded")


def test_weights_that_are_missing_cut_or_of_another_model(folder):
    weights = folder / "model.safetensors"
    whole = load_file(weights)
    some = {name: w for name, w in whole.items() if "visual.blocks.1" not in name}
    save_file(some, weights, metadata={"format": "pt"})
    assert_refused(folder, ValueError, r"lack \d+ parameters.*such as model.visual.blocks.1.attn")
    other = whole | {"model.language_model.norm.weight": torch.zeros(7)}
    save_file(other, weights, metadata={"format": "pt"})
    assert_refused(folder, OSError, "the model of .*cannot be loaded")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    assert_refused(folder, OSError, "cut or a Git LFS pointer.*download it again")
    weights.unlink()
    assert_refused(folder, OSError, "no file named model.safetensors")


# ------------------------------------------------------------------------------- what files set


def files_that_set(kind: str, tmp_path: Path, length: int) -> Path:
    """A family's checkpoint whose files ask for prompts of this length, in every way they can."""
    folder = Path(shutil.copytree(checkpoint(kind), tmp_path / kind))
    cut = {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": length}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}
    update(folder / "tokenizer.json", truncation=cut, padding=pad)
    options = {"truncation": True, "max_length": length, "padding": "max_length"}
    update(folder / "tokenizer_config.json", **options, model_max_length=length)
    update(folder / "processor_config.json", **options, text_kwargs=options)
    return folder


@pytest.mark.parametrize("length", [CUT, LONG])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_never_cut_or_padded(kind, length, tmp_path):
    """Whatever tokenizer.json, tokenizer_config.json and processor_config.json say."""
    folder = files_that_set(kind, tmp_path, length)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"truncation": True, "padding": "max_length"}
    assert len(tokenizer("how many dots ? " * 50, **options).input_ids) == length  # it is read
    policy, whole = Policy.from_pretrained(str(folder)), shared_policy(kind)
    for problem, pictures in zip(PROBLEMS, PICTURES, strict=True):
        ours = policy.tokenize(problem, pictures).inputs["input_ids"]
        assert torch.equal(ours, whole.tokenize(problem, pictures).inputs["input_ids"])
        assert CUT < ours.shape[1] < LONG
    if length == CUT:
        policy.self_check()
    policy.save_pretrained(tmp_path / "saved")
    again = Policy.from_pretrained(str(tmp_path / "saved"))
    assert torch.equal(again.tokenize(problem, pictures).inputs["input_ids"], ours)


def test_the_self_check_refuses_a_processor_that_cuts(monkeypatch):
    """As one of another library might, whatever it is told. None of its own prompts is so long."""
    policy = make_policy("smolvlm")
    call = type(policy.processor).__call__

    def cutting(self, *args, **options):
        inputs = call(self, *args, **options)
        return BatchFeature({name: x[..., :4096] for name, x in inputs.items()})

    monkeypatch.setattr(type(policy.processor), "__call__", cutting)
    with pytest.raises(RuntimeError, match="self-check: prompts are cut to 4096 tokens"):
        policy.self_check()


def test_a_processor_that_pads_is_refused(monkeypatch):
    policy = make_policy("smolvlm")
    call = type(policy.processor).__call__

    def padding(self, *args, **options):
        return call(self, *args, **options | {"padding": "max_length", "max_length": 99})

    monkeypatch.setattr(type(policy.processor), "__call__", padding)
    with pytest.raises(RuntimeError, match="the processor pads a prompt, although"):
        policy.tokenize("how many", [])
