"""Options: small dataclasses, one flat command line, recipes in YAML.

    class Config(NamedTuple):                    # what one program takes: a dataclass per group
        model: ModelArgs
        data: DataArgs
    config = parse(Config, ["--config", "recipe.yaml", "--model", "demo/mixed"], "what it does")
    config.model.model, flat(config)["model"]    # as attribute of a group, in one mapping

An option is a field of exactly one dataclass. A recipe (--config FILE) is a YAML mapping of options
to values. Its values pass through the command line's parser, so both are checked alike. The command
line overrides the recipe, and the recipe the defaults. A float may be a fraction (2/255).

Relative paths: the command line's, and `output` everywhere, start from the working directory. What
a recipe reads is looked for in the recipe's folder, then in the project's, then in the working
directory. The demo's models are found from everywhere.
"""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from runtime import data, faults
from runtime.faults import PROJECT
from vlm import adapt
from vlm.engine import Engine, OwnSampler
from vlm.policy import Policy

CONTROLS = ("none", "bonus", "skywork", "aer", "ecvgpo", "vogue", "top_entropy")
CONTROLS += ("clip_cov", "kl_cov", "sent")

READ = ("model", "dataset", "template", "order", "reward")  # options that may name files or folders

# What an option of an earlier version is called now: the message for old recipes and checkpoints.
# The first ones are other trainers' names.
RENAMED = {
    "learning_rate": "here called lr",
    "batch_size": "here called prompts_per_step",
    "num_generations": "here called rollouts",
    "max_completion_length": "here called max_new_tokens",
    "epochs": "here the length is given in steps",
    "num_train_epochs": "here the length is given in steps",
    "max_steps": "here called steps",
    "beta": "here called kl_coef",
    "output_dir": "here called output",
    "bf16": "write --dtype bfloat16, or give accelerate a mixed_precision",
    "accuracy_weight": "write --reward accuracy:WEIGHT format:WEIGHT",
    "format_weight": "write --reward accuracy:WEIGHT format:WEIGHT",
    "length_weight": "write --reward ... length_penalty:WEIGHT",
    "length_buffer": "removed: the penalty grows over the last quarter of max_new_tokens",
    "image_column": "write --columns image=NAME",
    "problem_column": "write --columns problem=NAME",
    "answer_column": "write --columns answer=NAME",
    "choices_column": "write --columns choices=NAME",
    "dataset_config": "removed: a preset names its own configuration",
    "checkpointing": "now called gradient_checkpointing",
    "lora_alpha": "removed: it is 2 * lora_rank",
    "log_prompts": "removed: one prompt per step goes to samples.jsonl",
    "tsec_scope": "removed: the quantiles are those of each response",
    "step_size": "removed: it is min(2.5 * eps / pgd_steps, eps)",
    "random_start": "removed: PGD starts at the clean image",
    "anneal": "removed: eps stays constant",
    "noise_t": "removed: it is 500, NoisyRollout's value",
    "skywork_step": "removed: it is entropy_coef / 10",
    "skywork_max": "removed: it is 5 * entropy_coef",
    "aer_rate": "removed: it is 0.01",
    "aer_threshold": "removed: it is 1",
    "ecvgpo_power": "removed: it is 1",
    "vogue_visual": "removed: it is VOGUE's value, 1",
    "vogue_entropy": "removed: it is VOGUE's value, 0.4",
    "vogue_cap": "removed: it is VOGUE's value, 2",
}


def option(default: Any, source: str, text: str, **bounds: float) -> Any:
    """A field of Options: its default, where the choice comes from, what it does, its bounds.

    bounds: low (value >= low), high (value <= high), above (value > above).
    """
    metadata = {"help": f"[{source}] {text}"} | bounds
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def require(holds: bool, rule: str) -> None:
    """Raise ValueError that states the rule unless it holds."""
    if not holds:
        raise ValueError(f"the options must satisfy {rule}")


def check_bounds(name: str, value: Any, bounds: Mapping[str, float]) -> None:
    """Raise ValueError for a number outside its option's bounds."""
    if value is None:
        return
    _, _, meaning = bounds["help"].partition("] ")
    said, what = f"{name}={value}: it must be", f" ({meaning})"
    if "low" in bounds and value < bounds["low"]:
        raise ValueError(f"{said} at least {bounds['low']}{what}")
    if "high" in bounds and value > bounds["high"]:
        raise ValueError(f"{said} at most {bounds['high']}{what}")
    if "above" in bounds and value <= bounds["above"]:
        raise ValueError(f"{said} above {bounds['above']}{what}")


class Options:
    """What the groups of options share: numbers are checked against their bounds."""

    def __post_init__(self) -> None:
        for item in fields(self):
            check_bounds(item.name, getattr(self, item.name), item.metadata)


@dataclass
class ModelArgs(Options):
    _argument_group_name = "model"
    model: str = option("demo/confident", "ours", "hub id or folder of a vision-language model")
    dtype: Literal["float32", "bfloat16"] = option("float32", "ours", "dtype of the parameters")
    attention: str = option("sdpa", "ours", "sdpa | eager | flash_attention_2")
    min_pixels: int | None = option(None, "ours", "smallest image area (Qwen); unset: processor's")
    max_pixels: int | None = option(None, "ours", "largest image area (Qwen); unset: processor's")

    def load(self, folder: str | None = None, weights: bool = True) -> Policy:
        """The policy, from the checkpoint `folder` if one is given.

        weights False: parameters without values, on the meta device.
        """
        source = folder or self.model
        if source.startswith("demo/") and not Path(source).exists():
            source = str(PROJECT / source)
        sizes = (self.min_pixels, self.max_pixels)
        return Policy.from_pretrained(source, self.dtype, self.attention, *sizes, weights)


@dataclass
class MemoryArgs(Options):
    _argument_group_name = "memory"
    freeze: Literal["none", "vision", "vision+projector"] = option(
        "none", "ours", "parts that are not trained"
    )
    lora_rank: int = option(0, "ours", "train LoRA adapters of this rank alone; 0: none", low=0)
    gradient_checkpointing: bool = option(False, "ours", "recompute each layer in the backward")
    micro_prompts: int = option(16, "ours", "prompts a device attacks, updates at a time", low=1)
    micro_responses: int = option(0, "ours", "responses per backward chunk; 0: all", low=0)
    sample_prompts: int = option(0, "ours", "prompts a device samples at a time; 0: all", low=0)

    def apply(self, policy: Policy, seed: int, checkpoint: str | None = None) -> None:
        """Freeze parts, add LoRA (its adapters from the checkpoint folder), recompute layers."""
        adapt.freeze(policy, self.freeze)
        if self.lora_rank:
            adapt.add_lora(policy, self.lora_rank, seed, checkpoint)
            left_out = ", ".join(adapt.without_adapters(policy))
            if left_out and os.environ.get("RANK", "0") == "0":
                print(f"LoRA: no adapters on the fused experts, which stay frozen: {left_out}")
        if self.gradient_checkpointing:
            adapt.checkpoint_layers(policy)
        policy.micro_responses = self.micro_responses


@dataclass
class DataArgs(Options):
    _argument_group_name = "data"
    dataset: str = option("demo", "ours", "demo, a preset, a data file, a folder or a hub id")
    preset: str | None = option(None, "ours", "read the data as this entry of runtime/presets.py")
    template: str | None = option(None, "ours", "added to the prompt: boxed | tags | none | a YAML")
    columns: list[str] = option([], "ours", "image=NAME problem=NAME answer=NAME choices=NAME")
    streaming: bool = option(False, "ours", "read rows as they come, without storing the data set")
    bad_rows: Literal["refuse", "skip"] = option("refuse", "ours", "what to do with unusable rows")

    def __post_init__(self) -> None:
        super().__post_init__()
        data.parse_columns(self.columns)  # a wrong key ends here, before a model is loaded

    def load(self, split: str | None, **settings: Any) -> data.Rows | data.Stream:
        """The checked rows of a split. settings: limit, seed, prompt_tokens, max_prompt_tokens."""
        return data.load_rows(
            self.dataset,
            split,
            self.bad_rows,
            preset=self.preset,
            template=self.template,
            columns=data.parse_columns(self.columns),
            streaming=self.streaming,
            **settings,
        )


@dataclass
class TrainDataArgs(DataArgs):
    split: str | None = option(None, "ours", "unset: the preset's, train, the demo's shifted/train")
    order: str | None = option(
        None, "ours", "JSON list of row numbers to train in; unset: shuffled"
    )
    max_prompt_tokens: int = option(2048, "ours", "longer prompts are left out, counted", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.order and self.streaming), "order only without streaming")


@dataclass
class ControlArgs(Options):
    _argument_group_name = "entropy control in the update, by other methods"
    update_control: Literal[CONTROLS] = option("none", "ours", "see extras/entropy_controls.py")
    entropy_coef: float = option(1e-3, "ours", "entropy bonus; skywork, aer: its start", low=0)
    skywork_target: float = option(0.2, "known", "skywork: the bonus acts up to this many nats")
    aer_target: float = option(0.4, "second-hand", "aer: target, a share of the initial entropy")
    top_entropy: float = option(0.2, "known", "top_entropy: share of tokens kept", low=0, high=1)
    cov_share: float = option(2e-4, "known", "*_cov, sent: share of tokens", above=0, high=1)
    penalty_coef: float | None = option(
        None, "known", "weight of |log-ratio|; unset: 1 in kl_cov, 0.1 in sent", above=0
    )


@dataclass
class EngineArgs(Options):
    _argument_group_name = "sampling engine"
    engine: list[str] = option(["own"], "ours", "who samples: own | vllm | URLs of servers")
    engine_python: str | None = option(None, "ours", "its Python; unset: run.sh engine's")
    engine_memory: float = option(0.3, "ours", "vllm: share of the GPU's memory", above=0, high=1)
    engine_cap: float = option(3.0, "known", "cap of pi_trainer / pi_engine in the loss", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for where in self.engine:
            alone = where in ("own", "vllm") and len(self.engine) == 1
            rule = f"--engine own, vllm, or URLs such as http://host:8700, got {where!r:.80}"
            require(alone or where.startswith(("http://", "https://")), rule)

    @property
    def is_used(self) -> bool:
        """Does an engine sample, and not the policy itself?"""
        return self.engine != ["own"]

    def sampler(self, policy: Policy, model: str, mixed_precision: str = "no") -> "Sampler":
        """Who samples. Its weights are in the precision that the trainer computes in."""
        if not self.is_used:
            return OwnSampler(policy)
        low = mixed_precision == "bf16" or next(policy.parameters()).dtype == torch.bfloat16
        options = (self.engine, self.engine_python, self.engine_memory)
        return Engine(policy, model, "bfloat16" if low else "float32", *options)


Sampler = OwnSampler | Engine


@dataclass
class RunArgs(Options):
    _argument_group_name = "run"
    output: str = option("out/demo", "ours", "the run's folder")
    overwrite: bool = option(False, "ours", "replace the run that the folder holds")
    resume: bool = option(False, "ours", "continue exactly from the newest checkpoint")
    dry_run: bool = option(False, "ours", "print plan and memory, then stop; reads no weights")
    seed: int = option(0, "ours", "of data order, rollouts and random images", low=0)
    steps: int = option(100, "ours", "batches of rollouts", low=1)
    save_every: int = option(50, "ours", "steps between checkpoints; the last has one", low=1)
    keep_last: int = option(2, "ours", "how many checkpoints are kept; 0: all", low=0)
    report_to: str = option("none", "ours", "tracker: none | tensorboard | wandb | trackio ...")
    self_check: bool = option(True, "ours", "compare pixels and logits with transformers' first")
    profile: bool = option(False, "ours", "trace the second step into trace.json")


# -------------------------------------------------------------------------------------- the parser


def number(text: str) -> float:
    """ "0.5", "1e-6", "inf" or a fraction such as "2/255"."""
    top, slash, bottom = text.partition("/")
    try:
        value = float(top) / float(bottom) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a number")
    return value


REQUIRED = " (required)"  # the end of a help text


class HelpFormatter(argparse.HelpFormatter):
    """One spelling per option, its choices or type, its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        if action.choices:
            values = " | ".join(action.choices)
        else:
            values = {int: "N", float: "X", string_to_bool: "true | false"}.get(action.type, "NAME")
            values = f"{values} ..." if action.nargs == "+" else values
        return f"{action.option_strings[0]} {values}"

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, argparse.SUPPRESS, []) or action.help.endswith(REQUIRED):
            return action.help
        default = action.default
        default = str(default).lower() if isinstance(default, bool) else default
        default = " ".join(map(str, default)) if isinstance(default, list) else default
        default = f"{default:.4g}" if isinstance(default, float) else default
        return f"{action.help} (default: {default})".replace("%", "%%")


class Parser(HfArgumentParser):
    """HfArgumentParser for groups of Options. It raises ValueError where argparse would exit."""

    def __init__(self, groups: Sequence[type], description: str, required: Sequence[str] = ()):
        needed = "".join(f" --{name} {name.upper()}" for name in required)
        usage = f"%(prog)s{needed} [--config RECIPE.yaml] [--option value ...]"
        super().__init__(
            groups,
            usage=usage,
            description=description,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self.register("type", float, number)
        self.add_argument("--config", help="a recipe: a YAML mapping of options to values")
        for action in self._actions:
            if action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS  # the twin of an option that is on by default
        self.actions = {action.dest: action for action in self._actions if action.nargs != 0}
        for name in required:
            self.actions[name].help += REQUIRED
        self.known = sorted(self.actions)
        self.bounds = {}
        for group in groups:
            self.bounds |= {item.name: item.metadata for item in fields(group)}

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, item: Field) -> None:
        plain = copy(item)  # every entry of its metadata would go to add_argument
        plain.metadata = {"help": item.metadata["help"]}
        HfArgumentParser._parse_dataclass_field(parser, plain)

    def error(self, message: str) -> None:
        raise ValueError(message if len(message) < 400 else f"{message[:200]} ...")

    def values(self, argv: list[str]) -> argparse.Namespace:
        """The options' values. Raises ValueError for an unknown option or a wrong value."""
        namespace, rest = self.parse_known_args(argv)
        if rest:
            name = rest[0].split("=")[0]
            found = self.explain(name.lstrip("-")) if name.startswith("-") else "no option takes it"
            raise ValueError(f"unknown {name:.80}: {found}")
        return namespace

    def explain(self, name: str) -> str:
        """What an unknown option may have been meant to be."""
        name = name.replace("-", "_")
        if name in RENAMED:
            return RENAMED[name]
        near = difflib.get_close_matches(name, self.known, n=1)
        return f"did you mean {near[0]}?" if near else "--help lists the options"

    def words(self, name: str, value: Any) -> list[str]:
        """An option and its value as words of the command line. None and [] leave it unset."""
        if value is None or value == []:
            if value == [] and self.get_default(name):
                raise ValueError(f"{name} is empty: leave it out for the default")
            return []
        if isinstance(value, dict):
            value = [f"{key}={entry}" for key, entry in value.items()]
        if isinstance(value, list | tuple):
            return [f"--{name}", *map(str, value)]
        return [f"--{name}={value}"]


def read_recipe(path: str, parser: Parser) -> list[str]:
    """A recipe's options as words of the command line. Its ValueErrors name file and line."""
    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise ValueError(f"{path}, line {line}: not valid YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = getattr(error, "strerror", None) or error
        ours = PROJECT / "recipes" / Path(path).name
        hint = f"; did you mean {ours}?" if ours.is_file() and not Path(path).exists() else ""
        said = f"the recipe {Path(path).absolute()} cannot be read: {cause}{hint}"
        raise ValueError(said) from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{path} must map options to values")
    words, seen = [], set()
    for key, value in node.value:
        name = str(key.value)
        try:
            if name in seen:
                raise ValueError(f"{name:.80} is given twice")
            if name not in parser.known or name == "config":
                raise ValueError(f"unknown {name:.80}: {parser.explain(name)}")
            seen.add(name)
            words += recipe_words(name, value, parser, Path(path).parent)
        except ValueError as error:
            raise ValueError(f"{path}, line {key.start_mark.line + 1}: {error}") from error
    return words


def recipe_words(name: str, node: yaml.Node, parser: Parser, folder: Path) -> list[str]:
    """One option of a recipe, checked. Values are taken as they are written: `no` stays no.

    folder: the recipe's, from which relative paths may start.
    """
    if node.tag == "tag:yaml.org,2002:null":
        if parser.get_default(name) is not None:
            raise ValueError(f"{name} has no value")
        return []
    takes_several = parser.actions[name].nargs == "+"
    if not isinstance(node, yaml.ScalarNode) and not takes_several:
        raise ValueError(f"{name} takes one value")
    if isinstance(node, yaml.MappingNode):
        values = {key.value: value.value for key, value in node.value}
    elif isinstance(node, yaml.SequenceNode):
        values = [locate(name, entry.value, folder) for entry in node.value]
    else:
        values = locate(name, node.value, folder)
        values = [values] if takes_several else values
    words = parser.words(name, values)
    value = getattr(parser.values(words), name)
    if not takes_several:
        check_bounds(name, value, parser.bounds[name])
    return words


def locate(name: str, value: str, folder: Path) -> str:
    """A relative path of a recipe in that folder or the project's. Unchanged if neither has it."""
    path, colon, rest = value.partition(":")  # file.py:function:weight
    keyword = value == "demo" or value in data.TEMPLATES or (colon and not path.endswith(".py"))
    of_the_demo = name == "model" and path.startswith("demo/")  # found from everywhere
    if name not in READ or not path or keyword or of_the_demo:
        return value
    for start in (folder, PROJECT):
        found = start / path
        if found.exists():
            same = Path(path).exists() and found.samefile(path)
            return value if same else f"{found.absolute()}{colon}{rest}"
    return value


def parse(
    kind: type[NamedTuple],
    argv: Sequence[str],
    description: str = "",
    required: Sequence[str] = (),
    **options: Any,
) -> Any:
    """A Config of that kind from argv, its --config recipe, and `options` given in Python.

    `options` override argv, argv overrides the recipe, the recipe the defaults. An option that is
    None counts as not given. Raises ValueError, one line, for whatever is wrong.
    """
    parser = Parser(list(kind.__annotations__.values()), description, required)
    words = list(argv)
    for name, value in options.items():
        if name not in parser.known:
            raise ValueError(f"unknown {name:.80}: {parser.explain(name)}")
        words += parser.words(name, value)
    recipe = parser.values(words).config
    if recipe:
        if len([word for word in words if word.split("=")[0] == "--config"]) > 1:
            raise ValueError("--config is given twice")
        words = read_recipe(recipe, parser) + words
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in words}
    for name in required:
        if name not in given:
            raise ValueError(f"--{name} is required")
    *groups, _ = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    return kind(*groups)


def flat(config: NamedTuple) -> dict[str, Any]:
    """{option: value} of all groups."""
    return {name: value for group in config for name, value in asdict(group).items()}


def changed(config: NamedTuple) -> dict[str, Any]:
    """{option: value} of what differs from the defaults."""
    defaults = flat(type(config)(*[type(group)() for group in config]))
    return {name: value for name, value in flat(config).items() if value != defaults[name]}


def command_line(load_config: Callable, main: Callable) -> None:
    """Run main on the configuration of sys.argv.

    A fault of options, data, files or packages ends with one line and exit code 2 (faults.py). Of
    several processes one says it. The others end with it, and so do those that fail because it is
    gone.
    """
    try:
        main(load_config(sys.argv[1:]))
        return
    except Exception as error:
        said = faults.said_by_another()
        if not said and not faults.is_fault(error):
            raise
        line = said or f"error: {faults.explain(error)}"
    # The error is gone here, and with it the progress bar, which prints when it is deleted.
    faults.say(line)
    sys.exit(faults.EXIT_CODE)
