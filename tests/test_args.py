"""runtime/args.py: where a value comes from, what is refused and how, --help, recipes."""

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import ROOT

import eval
import train_saei
from runtime import args
from train_saei import load_config

SOURCES = {"paper", "second-hand", "inferred", "ours", "ours, by the study", "known"}
CONFIGS = [train_saei.Config, eval.Config]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    """write(text) -> the words --config FILE"""

    def write(text: str) -> list[str]:
        (tmp_path / "r.yaml").write_text(text)
        return ["--config", str(tmp_path / "r.yaml")]

    return write


# ------------------------------------------------------------------------------- where from


def test_defaults_then_recipe_then_argv_then_python(recipe):
    words = recipe("eps: 0.01\nlr: 1e-4\nseed: 1\n")
    config = load_config([*words, "--lr", "0.02", "--seed", "2"], seed=3)
    assert (config.saei.eps, config.saei.lr, config.run.seed) == (0.01, 0.02, 3)
    assert config.run.steps == load_config().run.steps == 100
    assert load_config([*recipe("# all defaults\n")]) == load_config()


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("eps: 4/255", "eps", 4 / 255),
        ("lr: 1e-4", "lr", 1e-4),  # a string in YAML
        ("split: 5", "split", "5"),
        ("order: null", "order", None),
        ("resume: yes", "resume", True),
        ("reward: accuracy:1", "reward", ["accuracy:1"]),
        ("reward: [accuracy:1, my.py:f:2]", "reward", ["accuracy:1", "my.py:f:2"]),
        ("columns: {image: picture}", "columns", ["image=picture"]),
        ("output: --resume", "output", "--resume"),
    ],
)
def test_a_value_in_a_recipe(recipe, text, name, value):
    assert args.flat(load_config(recipe(text)))[name] == value


def test_a_fraction_on_the_command_line():
    assert load_config(["--eps", "2/255"]).saei.eps == 2 / 255


def test_a_runs_config_read_as_a_recipe_gives_the_same_config(tmp_path, recipe):
    options = dict(eps=0.1 + 0.2, intervention="none", reward=["accuracy:1"], lora_rank=3)
    options |= dict(columns=["image=none", "answer=gold"], split="train", self_check=False)
    config = load_config(**options)
    text = yaml.safe_dump(args.flat(config), sort_keys=False)
    assert load_config(recipe(text)) == config != load_config()


def test_a_recipes_values_are_taken_as_they_are_written(recipe):
    """YAML would make False, 1 and 0.00784 of them."""
    config = load_config(recipe("report_to: no\nsplit: 01\neps: 2/255\nlr: 1e-6"))
    assert (config.run.report_to, config.data.split) == ("no", "01")
    assert (config.saei.eps, config.saei.lr) == (2 / 255, 1e-6)
    assert load_config(max_grad_norm="inf").saei.max_grad_norm == float("inf")


# ------------------------------------------------------------------------------------- paths


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def test_what_a_recipe_reads_is_beside_it_or_in_the_project(elsewhere, recipe):
    for name in ("rows.jsonl", "my.py", "recipes"):
        (elsewhere / name).write_text("")  # the project has recipes too: the recipe's folder first
    text = "dataset: rows.jsonl\nreward: [accuracy:1, my.py:f:2]\norder: recipes\n"
    config = load_config(recipe(text + "model: docs/loop.png\ntemplate: nowhere.yaml\noutput: o"))
    assert config.data.dataset == str(elsewhere / "rows.jsonl")
    assert config.saei.reward == ["accuracy:1", f"{elsewhere / 'my.py'}:f:2"]
    assert config.data.order == str(elsewhere / "recipes")
    assert config.model.model == str(ROOT / "docs/loop.png")
    assert (config.data.template, config.run.output) == ("nowhere.yaml", "o")


def test_what_names_no_file_stays(elsewhere, recipe):
    for name in ("boxed", "accuracy", "demo"):
        (elsewhere / name).mkdir()
    text = "dataset: demo\ntemplate: boxed\nreward: [accuracy:1]\nmodel: demo/mixed\nsplit: demo\n"
    config = load_config(recipe(text))
    assert (config.data.dataset, config.data.template) == ("demo", "boxed")
    assert (config.saei.reward, config.model.model) == (["accuracy:1"], "demo/mixed")
    assert config.data.split == "demo"


def test_a_path_of_the_working_directory_stays_as_it_is_written(elsewhere, recipe, monkeypatch):
    """So that a run goes on after its folder and its data were moved together."""
    (elsewhere / "rows.jsonl").write_text("")
    monkeypatch.chdir(elsewhere)
    assert load_config(recipe("dataset: rows.jsonl")).data.dataset == "rows.jsonl"


def test_the_command_lines_paths_are_the_working_directorys(elsewhere):
    words = ["--dataset", "tests", "--model", "demo", "--order", "LICENSE"]
    config = load_config(words)
    assert [config.data.dataset, config.model.model, config.data.order] == words[1::2]


def test_the_demos_models_are_found_from_everywhere(elsewhere):
    policy = load_config(model="demo/mixed").model.load(weights=False)
    assert policy.model.config.model_type == "qwen2_5_vl"
    os.mkdir("demo")
    os.mkdir("demo/mixed")  # one's own
    with pytest.raises((ValueError, OSError)):
        load_config(model="demo/mixed").model.load(weights=False)


# ------------------------------------------------------------------------------- what is refused


OPTIONS = [
    (["--stepz", "3"], "unknown --stepz: did you mean steps?"),
    (["--step", "3"], "unknown --step: did you mean steps?"),  # no prefix is taken
    (["--lora-alpha", "3"], "unknown --lora-alpha: removed: it is 2 * lora_rank"),
    (["--step_size=3"], "unknown --step_size: removed: it is min("),
    (["--qqqqqq", "3"], "unknown --qqqqqq: --help lists the options"),
    (["steps"], "unknown steps: no option takes it"),
    (["--steps", "1", "2"], "unknown 2: no option takes it"),
    (["--steps"], "argument --steps: expected one argument"),
    (["--steps", "3.5"], "argument --steps: invalid int value: '3.5'"),
    (["--eps", "2/0"], "argument --eps: '2/0' is not a number"),
    (["--eps", "nan"], "argument --eps: 'nan' is not a number"),
    (["--resume", "perhaps"], "argument --resume: Truthy value expected"),
    (["--intervention", "fgsm"], "argument --intervention: invalid choice: 'fgsm' (choose from "),
    (["--learning_rate", "3"], "unknown --learning_rate: here called lr"),
    (["--config", "nowhere.yaml"], f"the recipe {Path.cwd() / 'nowhere.yaml'} cannot be read: No "),
    (["--config", "a.yaml", "--config=b.yaml"], "--config is given twice"),
]


@pytest.mark.parametrize("words, said", OPTIONS, ids=lambda x: x[0] if isinstance(x, list) else "")
def test_a_wrong_command_line_is_refused(words, said):
    with pytest.raises(ValueError) as error:
        load_config(words)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("seed: 1\nepsilon: 0.1", "line 2: unknown epsilon: did you mean eps?"),
        ("image_column: x", "line 1: unknown image_column: write --columns image=NAME"),
        ("config: x.yaml", "line 1: unknown config"),
        ("1: 2", "line 1: unknown 1: --help lists the options"),
        ("seed: 1\n\nseed: 1", "line 3: seed is given twice"),
        ("seed: 1\nsteps: many", "line 2: argument --steps: invalid int value: 'many'"),
        ("steps: 10.5", "line 1: argument --steps: invalid int value: '10.5'"),
        ("steps: [1, 2]", "line 1: steps takes one value"),
        ("seed: 1\nsteps:", "line 2: steps has no value"),
        ("eps: null", "line 1: eps has no value"),
        ("intervention: fgsm", "line 1: argument --intervention: invalid choice: 'fgsm'"),
        ("seed: 1\na: [1", "line 3: not valid YAML"),
        ("hello", " must map options to values"),
        ("- 1", " must map options to values"),
        ("seed: 1\neps: 8", "line 2: eps=8.0: it must be at most 1 (L-inf radius, such as 2/255)"),
        ("reward: []", "line 1: reward is empty"),
        ("split: {a: b}", "line 1: split takes one value"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_line(recipe, text, said):
    words = recipe(text + "\n")
    with pytest.raises(ValueError) as error:
        load_config(words)
    assert str(error.value).startswith((f"{words[1]}, {said}", f"{words[1]}{said}"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"eps": 8}, "eps=8.0: it must be at most 1"),
        ({"temperature": 0.0}, "temperature=0.0: it must be above 0"),
        ({"steps": 0}, "steps=0: it must be at least 1"),
        ({"rollouts": 1, "intervention": "none"}, "rollouts=1: it must be at least 2"),
        ({"max_grad_norm": 0}, "max_grad_norm=0.0: it must be above 0"),
        ({"clip_low": 2.0}, "clip_low=2.0: it must be at most 1"),
        ({"kl_coef": -0.1}, "kl_coef=-0.1: it must be at least 0"),
        ({"tsec_low": 0.8, "tsec_high": 0.2}, "must satisfy tsec_low < tsec_high"),
        ({"adversarial_rollouts": 8}, "must satisfy adversarial_rollouts < rollouts"),
        ({"adversarial_rollouts": 0}, "must satisfy adversarial_rollouts >= 1"),
        ({"order": "x.json", "streaming": True}, "must satisfy order only without streaming"),
        ({"update_control": "kl_cov"}, "must satisfy updates_per_step >= 2 with kl_cov"),
        ({"step": 3}, "unknown step: did you mean steps?"),
        ({"random_start": True}, "unknown random_start: removed: PGD starts at"),
        ({"steps": 10.5}, "argument --steps: invalid int value"),
        ({"condition": "both"}, "argument --condition: invalid choice: 'both'"),
    ],
    ids=str,
)
def test_a_value_out_of_bounds_is_refused(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        load_config(**options)


LONG = "x y" * 3000


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", LONG],
        ["--eps", LONG],
        ["--intervention", LONG],
        [f"--{LONG}", "1"],
        [LONG],
        ["--resume", LONG],
    ],
    ids=lambda words: words[0][:12],
)
def test_a_long_input_is_shown_in_part(words, recipe):
    with pytest.raises(ValueError) as error:
        load_config(words)
    assert len(str(error.value)) < 300
    for text in (f"{LONG}: 1", f"steps: {LONG}"):
        with pytest.raises(ValueError) as error:
            load_config(recipe(text))
        assert len(str(error.value)) < 300 + len(recipe("")[1])


def test_old_names_lead_to_options_that_exist():
    known = parser_of(train_saei.Config).known
    assert not set(args.RENAMED) & set(known)
    for text in args.RENAMED.values():
        assert set(re.findall(r"--([a-z_]+)", text)) <= set(known)


# --------------------------------------------------------------------------- the options, --help


def parser_of(config: type[NamedTuple]) -> args.Parser:
    return args.Parser(list(config.__annotations__.values()), "what it does")


@pytest.mark.parametrize("config", CONFIGS)
def test_help_is_grouped_and_spells_each_option_once(config):
    parser = parser_of(config)
    text = parser.format_help()
    for group in config.__annotations__.values():
        titled = f"\n{group._argument_group_name}:\n"
        assert text.count(titled) == 1
        section = text.split(titled)[1].split("\n\n")[0]
        spelt = re.findall(r"^  --([a-z_]+) ", section, re.MULTILINE)
        assert spelt == [item.name for item in fields(group)]
    spelt = re.findall(r"^  --(\S+)", text, re.MULTILINE)
    assert sorted(spelt) == parser.known
    assert "--no_" not in text


@pytest.mark.parametrize("config", CONFIGS)
def test_each_option_is_in_one_group_with_its_source(config):
    names = []
    for group in config.__annotations__.values():
        for item in fields(group):
            names.append(item.name)
            assert re.match(r"\[(.+?)\]", item.metadata["help"])[1] in SOURCES, item.name
    assert len(names) == len(set(names))


def test_the_algorithm_has_at_most_30_options():
    assert len(fields(train_saei.SaEIArgs)) <= 30


def test_training_and_evaluation_share_options():
    train, evaluate = (config.__annotations__ for config in CONFIGS)
    assert train["model"] is evaluate["model"] is args.ModelArgs
    assert evaluate["data"] is args.DataArgs and issubclass(train["data"], args.DataArgs)
    shared = fields(args.DataArgs)
    assert [item.name for item in fields(train["data"])][: len(shared)] == [x.name for x in shared]
    assert not set(args.DataArgs.__annotations__) & set(args.TrainDataArgs.__annotations__)


# --------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_restates_no_default(path):
    config, defaults = args.flat(load_config(["--config", str(path)])), args.flat(load_config())
    given = yaml.safe_load(path.read_text())
    assert given and [name for name in given if config[name] == defaults[name]] == []


def test_restated_defaults_would_be_found(tmp_path):
    (tmp_path / "r.yaml").write_text("seed: 0\nsteps: 3\n")
    with pytest.raises(AssertionError, match="seed"):
        test_a_shipped_recipe_is_valid_and_restates_no_default(tmp_path / "r.yaml")
