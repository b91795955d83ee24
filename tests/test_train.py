"""train_saei.py and runs.py: configuration, arms, resume, faults, two processes."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

import grpo
import rewards
import train_saei
from runtime import run as runs
from train_saei import Config, load_config, main
from vlm.policy import Policy

ROOT = Path(__file__).resolve().parent.parent


def short(tiny: str, out: Path, **changes) -> Config:
    settings = dict(
        model=tiny, split="plain/train", output=str(out), steps=2, prompts_per_step=2, rollouts=4
    )
    settings |= dict(adversarial_rollouts=2, max_new_tokens=6, pgd_steps=1, lr=1e-3, save_every=2)
    return Config(**settings | changes)


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def comparable(metrics: dict) -> dict:
    return {k: v for k, v in metrics.items() if not k.startswith(("seconds", "memory"))}


def parameters(checkpoint: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()


@pytest.fixture
def half_right(monkeypatch):
    """A random model never answers right: reward every other response, so that there is a gradient."""
    monkeypatch.setattr(
        rewards,
        "accuracy_reward",
        lambda completions, **_: [i % 2.0 for i in range(len(completions))],
    )


# ------------------------------------------------------------------------------------------------------ configuration


def test_every_field_carries_its_mark():
    for field in fields(Config):
        mark = field.metadata["help"].split("]")[0].removeprefix("[")
        assert mark in (
            "paper",
            "second-hand",
            "inferred",
            "ours",
            "ours, by the study",
            "known",
        ), field.name


def test_recipe_then_command_line(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("eps: 0.01\nlr: 1e-4\nintervention: random\n")
    cfg = load_config(["--config", str(recipe), "--eps", "0.02"])
    assert (cfg.eps, cfg.lr, cfg.intervention, cfg.steps) == (0.02, 1e-4, "random", Config().steps)


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_recipes_are_valid(recipe):
    load_config(["--config", str(recipe)])


def test_unknown_recipe_key_is_named(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("epsilon: 0.01\n")
    with pytest.raises(ValueError, match="unknown epsilon; known are .*eps"):
        load_config(["--config", str(recipe)])
    recipe.write_text("# all defaults\n")
    assert load_config(["--config", str(recipe)]) == Config()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"intervention": "fgsm"},
            "intervention must be one of none, random, noise, egas, got 'fgsm'",
        ),
        ({"condition": "both"}, "condition must be one of clean, sampled"),
        ({"zero_variance": "resample"}, "zero_variance must be one of keep, drop"),
        ({"eps": 8}, "0 <= eps <= 1"),
        ({"tsec_low": 0.8, "tsec_high": 0.2}, "tsec_low < tsec_high"),
        ({"adversarial_rollouts": 8}, "adversarial_rollouts < rollouts"),
        ({"adversarial_rollouts": 0}, "adversarial_rollouts >= 1 with an intervention"),
        ({"rollouts": 1, "adversarial_rollouts": 0, "intervention": "none"}, "rollouts >= 2"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"steps": 0}, "steps >= 1"),
        ({"max_grad_norm": 0}, "max_grad_norm > 0"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha > 0"),
        ({"clip_low": 2.0, "clip_high": -5.0}, "0 <= clip_low <= 1; .*clip_high >= 0"),
        ({"noise_t": 5000}, "0 <= noise_t <= 1000"),
        ({"step_size": -1.0}, "step_size >= 0"),
        ({"kl_coef": -0.1, "seed": -1}, "seed >= 0; kl_coef >= 0"),
        ({"steps": 10.5}, "steps must be int, got 10.5"),
        ({"eps": None}, "eps must be float . int, got None"),
        ({"reward": "my.py:f"}, "reward must be list, got 'my.py:f'"),
    ],
)
def test_bad_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("intervention: fgsm", "intervention must be one of"),
        ("a: [1", "line 1"),
        ("hello", "r.yaml must map options to values, got 'hello'"),
    ],
)
def test_command_line_says_one_line_and_no_traceback(tmp_path, recipe, message):
    (tmp_path / "r.yaml").write_text(recipe)
    command = [sys.executable, str(ROOT / "train_saei.py"), "--config", str(tmp_path / "r.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "train_saei.py: " in done.stderr and message in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_tracker_is_named(tiny, tmp_path):
    with pytest.raises(
        ValueError, match="the tracker comet_ml is not installed: pip install comet_ml"
    ):
        main(short(tiny, tmp_path, report_to="comet_ml"))


def test_fp16_is_refused_and_bfloat16_parameters_are_warned_of(tiny, tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="bfloat16 parameters lose most updates of a small lr"):
        main(short(tiny, tmp_path / "half", steps=1, dtype="bfloat16", self_check=False))
    monkeypatch.setattr(train_saei.Accelerator, "mixed_precision", "fp16")
    with pytest.raises(
        ValueError, match="fp16 is not supported: take --mixed_precision bf16 or no"
    ):
        main(short(tiny, tmp_path / "run"))


def test_a_tracker_gets_plain_values(tiny, tmp_path, monkeypatch):
    """tensorboard takes no lists."""
    seen = {}
    monkeypatch.setattr(
        train_saei.Accelerator, "init_trackers", lambda self, name, config: seen.update(config)
    )
    runs.Log(short(tiny, tmp_path, report_to="any"), train_saei.Accelerator(), 0)
    assert seen["reward"] == "[]" and all(
        isinstance(value, (int, float, str, bool)) for value in seen.values()
    )


def test_work_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="prompts_per_step=6 must be a multiple of processes"):
        train_saei.split_work(Config(prompts_per_step=6), 4)
    with pytest.raises(ValueError, match="micro_prompts=3 must divide the 8 prompts"):
        train_saei.split_work(Config(prompts_per_step=8, micro_prompts=3), 1)
    assert train_saei.split_work(
        Config(prompts_per_step=16, micro_prompts=2, updates_per_step=2), 2
    ) == (2, 2)


# --------------------------------------------------------------------------------------------------------------- arms


@pytest.mark.parametrize("intervention", ["none", "random", "noise", "egas"])
@pytest.mark.parametrize("condition", ["clean", "sampled"])
def test_every_arm_trains_at_one_budget(tiny, tmp_path, half_right, intervention, condition):
    main(
        short(tiny, tmp_path, intervention=intervention, condition=condition, steps=1, kl_coef=0.1)
    )
    (metrics,) = metrics_of(tmp_path)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4  # G, whatever the arm
    assert sum(s["image"] == "adversarial" for s in samples) == (0 if intervention == "none" else 2)
    assert metrics["grad_norm"] > 0 and all(math.isfinite(v) for v in metrics.values())
    assert metrics["kl"] == pytest.approx(0, abs=1e-5)
    assert ("attack/psnr" in metrics) == (intervention != "none")
    if intervention in ("random", "egas"):
        assert metrics["attack/linf"] == pytest.approx(Config().eps, abs=1e-6)
    if intervention == "egas":
        assert metrics["entropy/attacked"] > metrics["entropy/selected"]
    for sample in samples:
        assert len(sample["tokens"]) == len(sample["entropy"])
        assert (tmp_path / sample["picture"]).exists() and (
            tmp_path / sample["clean_picture"]
        ).exists()


def test_sampling_a_few_prompts_at_a_time_gives_the_same_responses(policy, rows, monkeypatch):
    cfg = short("", Path(), max_new_tokens=12)
    prompts = policy.encode([r["problem"] for r in rows], [r["images"] for r in rows])
    policy.eos_ids = list(range(0, 400, 8))  # lengths differ
    want, seen, before = train_saei.sample(cfg, policy, prompts, 2, [5, 6, 7, 8]), [], Policy.sample
    monkeypatch.setattr(
        Policy, "sample", lambda self, x, *rest: seen.append(len(x)) or before(self, x, *rest)
    )
    cfg.sample_prompts = 3
    ours = train_saei.sample(cfg, policy, prompts, 2, [5, 6, 7, 8])
    assert (
        seen == [3, 1]
        and torch.equal(ours.mask, want.mask)
        and torch.equal(ours.tokens, want.tokens)
    )
    assert len(set(ours.mask.sum(dim=1).tolist())) > 2
    for name in ("logprobs", "entropy"):
        assert torch.allclose(
            getattr(ours, name)[ours.mask], getattr(want, name)[want.mask], atol=1e-5
        )


def test_noise_fades_and_eps_can(tiny):
    assert train_saei.annealing(0, 60) == pytest.approx(1, abs=1e-6)
    assert train_saei.annealing(40, 60) == pytest.approx(0.5)
    assert train_saei.annealing(60, 60) < 1e-4
    # NoisyRollout's own numbers: lambda 30, mid 40, T 60
    assert train_saei.annealing(45, 60) == pytest.approx(1 - 1 / (1 + math.exp(-30 * 5 / 60)))


def test_zero_variance_groups_can_be_dropped(tiny, tmp_path, monkeypatch):
    """All-wrong groups of differing format: dropped, they leave no gradient (trap 12)."""
    monkeypatch.setattr(
        rewards,
        "format_reward",
        lambda completions, **_: [float(i % 2) for i in range(len(completions))],
    )
    main(short(tiny, tmp_path / "keep", steps=1))
    main(short(tiny, tmp_path / "drop", steps=1, zero_variance="drop"))
    assert metrics_of(tmp_path / "keep")[0]["grad_norm"] > 0
    assert metrics_of(tmp_path / "drop")[0]["grad_norm"] == 0
    assert metrics_of(tmp_path / "drop")[0]["zero_variance"] == 1


def test_rows_are_shuffled_each_epoch_and_shared_without_loss():
    cfg = Config(prompts_per_step=4)

    class Process:
        num_processes = 2

        def __init__(self, index):
            self.process_index = index

    epoch = [
        i
        for step in range(3)
        for r in (0, 1)
        for i in train_saei.my_rows(cfg, step, 12, Process(r))
    ]
    again = [
        i
        for step in range(3, 6)
        for r in (0, 1)
        for i in train_saei.my_rows(cfg, step, 12, Process(r))
    ]
    assert sorted(epoch) == sorted(again) == list(range(12)) and epoch != again
    rows = [
        i for r in (0, 1) for i in train_saei.my_rows(cfg, 0, 3, Process(r))
    ]  # one comes twice in the step
    assert (
        sorted(i % 3 for i in rows) in ([0, 0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2]) and max(rows) >= 3
    )
    assert len(set(train_saei.seeds_of(cfg, 0, rows, train_saei.CLEAN))) == 4


def test_a_row_that_comes_twice_in_a_step_is_sampled_anew(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "1 + 1? Answer in \\boxed{}.", "answer": "2"}) + "\n")
    data = dict(
        dataset=str(rows), split="train", image_column="none", intervention="none", log_prompts=4
    )
    main(short(tiny, tmp_path / "run", steps=1, **data))
    lines = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert len(lines) > len({line["prompt"] for line in lines}) > 1 and {
        line["row"] for line in lines
    } == {0}
    groups = {
        p: [line["tokens"] for line in lines if line["prompt"] == p]
        for p in {x["prompt"] for x in lines}
    }
    assert groups[0] != groups[1]


# ----------------------------------------------------------------------------------------------------- resume, folder


def test_resume_is_exact(tiny, tmp_path, half_right):
    main(short(tiny, tmp_path / "whole", steps=4))
    main(short(tiny, tmp_path / "parts", steps=2))
    with open(
        tmp_path / "parts" / "metrics.jsonl", "a"
    ) as file:  # a step after the checkpoint, half written
        file.write('{"step": 2, "reward": 0.5}\n{"step": 3, "rew')
    main(short(tiny, tmp_path / "parts", steps=4, resume=True))
    whole, parts = (
        parameters(tmp_path / "whole/checkpoints/step-000004"),
        parameters(tmp_path / "parts/checkpoints/step-000004"),
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [comparable(m) for m in metrics_of(tmp_path / "whole")] == [
        comparable(m) for m in metrics_of(tmp_path / "parts")
    ]
    assert any(
        not torch.equal(whole[name], start) for name, start in parameters(Path(tiny)).items()
    )


def test_a_folder_that_holds_a_run_is_safe(tiny, tmp_path):
    main(short(tiny, tmp_path, steps=1))
    with pytest.raises(
        ValueError, match="already holds a run: --resume goes on with it, --overwrite replaces it"
    ):
        main(short(tiny, tmp_path, steps=1))
    main(short(tiny, tmp_path, steps=1, overwrite=True))
    assert len(metrics_of(tmp_path)) == 1


def test_resume_refuses_another_configuration(tiny, tmp_path):
    main(short(tiny, tmp_path, steps=1))
    with pytest.raises(ValueError, match="another configuration .*eps: .* -> 0.5"):
        main(short(tiny, tmp_path, steps=2, resume=True, eps=0.5))


def test_checkpoint_loads_with_the_auto_classes(tiny, tmp_path):
    main(short(tiny, tmp_path, steps=1))
    (folder,) = runs.checkpoints(tmp_path)
    AutoModelForImageTextToText.from_pretrained(folder)
    AutoProcessor.from_pretrained(folder)
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"] == tiny


def test_disk_full_while_saving_leaves_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    save = train_saei.Policy.save_pretrained

    def fails_later(self, folder, weights=None):
        save(self, folder, weights)
        if "000002" in str(folder):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_saei.Policy, "save_pretrained", fails_later)
    with pytest.raises(OSError, match="No space left"):
        main(short(tiny, tmp_path, steps=2, save_every=1))
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["step-000001"]
    monkeypatch.undo()
    main(short(tiny, tmp_path, steps=2, save_every=1, resume=True))
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["step-000001", "step-000002"]


# ------------------------------------------------------------------------------------------------- faults and warnings


def test_non_finite_gradient_stops_with_the_batch_saved(tiny, tmp_path, half_right, monkeypatch):
    loss = grpo.policy_loss
    calls = []

    def breaks_at_step_1(*args):
        calls.append(1)
        value, metrics = loss(*args)
        return value * (math.nan if len(calls) == 2 else 1), metrics

    monkeypatch.setattr(grpo, "policy_loss", breaks_at_step_1)
    with pytest.raises(FloatingPointError, match="step 1: the gradient is not finite"):
        main(short(tiny, tmp_path, save_every=1))
    (saved,) = tmp_path.glob("failed-step-000001-process-0.pt")
    assert torch.load(saved, weights_only=False)["clean"]["tokens"].shape[0] == 4
    (good,) = runs.checkpoints(tmp_path)
    assert all(p.isfinite().all() for p in parameters(good).values())


def test_non_finite_reward_stops(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        rewards, "accuracy_reward", lambda completions, **_: [math.nan] * len(completions)
    )
    with pytest.raises(
        RuntimeError, match="the reward 'accuracy' failed on row 0.*nan, which is no finite number"
    ):
        main(short(tiny, tmp_path))


OWN_REWARDS = """
calls = []

def words(completions, problem, row, completion_ids, **columns):
    calls.append([len(completions), len(problem), len(row), len(completion_ids)])
    assert all(isinstance(token, int) for ids in completion_ids for token in ids)
    return [len(text.split()) / 100 for text in completions]

def late_error(completions, row, **columns):
    if len(completions) > 1 or row[0] == 3:
        raise KeyError("no such thing")
    return [0.0]
"""


def test_own_rewards_are_added_weighed_and_logged_apart(tiny, tmp_path, half_right):
    (tmp_path / "mine.py").write_text(OWN_REWARDS)
    cfg = short(
        tiny,
        tmp_path,
        reward=[f"{tmp_path}/mine.py:words:0.5"],
        length_weight=0.25,
        length_buffer=6,
    )
    main(cfg)
    for line in metrics_of(tmp_path):
        parts = (
            0.9 * line["accuracy"]
            + 0.1 * line["format"]
            + 0.5 * line["words"]
            + 0.25 * line["length_penalty"]
        )
        assert line["reward"] == pytest.approx(parts, abs=1e-6)
        assert -1 <= line["length_penalty"] < 0  # responses of up to 6 tokens in a buffer of 6
    assert cfg.reward == load_config(["--reward", *cfg.reward]).reward
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert all({"words", "length_penalty"} <= set(sample) for sample in samples)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("mine.py:nothing", "has no function nothing"),
        ("other.py:words", "no file .*other.py"),
        ("mine.py", "no file|write file.py:function"),
        ("mine.py:words:much", "the weight 'much' is no number"),
        ("mine.py:accuracy", "a reward called accuracy already"),
        ("mine.py:short", "failed on row 0.*it returned 0 values for 1 completions"),
        ("mine.py:raises", "failed on row 0.*ZeroDivisionError: division by zero"),
    ],
)
def test_a_reward_that_cannot_work_is_refused_before_the_first_step(tiny, tmp_path, spec, message):
    (tmp_path / "mine.py").write_text(
        OWN_REWARDS
        + "def accuracy(completions, **_): return [0.0]\ndef short(completions, **_): return []\n"
        + "def raises(completions, **_): return [1 / 0]\n"
    )
    with pytest.raises((ValueError, RuntimeError), match=message):
        main(short(tiny, tmp_path, reward=[f"{tmp_path}/{spec}"]))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_error_in_a_reward_names_the_row(tiny, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN_REWARDS)
    monkeypatch.setattr(train_saei, "my_rows", lambda *_: [7, 3])
    with pytest.raises(
        RuntimeError, match="the reward 'late_error' failed on row 3, completion .*KeyError"
    ):
        main(short(tiny, tmp_path, reward=[f"{tmp_path}/mine.py:late_error"]))
    rows = train_saei.data.load_rows("demo", "plain/train", limit=9)
    rows.keep = [
        0,
        1,
        3,
        4,
        5,
        6,
        7,
        8,
    ]  # row 2 is left out: a row is named by its number in the set
    monkeypatch.setattr(train_saei.data, "load_rows", lambda *_, **__: rows)
    monkeypatch.setattr(train_saei, "my_rows", lambda *_: [7, 2])
    with pytest.raises(
        RuntimeError, match="the reward 'late_error' failed on row 3, completion .*KeyError"
    ):
        main(short(tiny, tmp_path, reward=[f"{tmp_path}/mine.py:late_error"], overwrite=True))


def test_trap_17_no_reward_is_said(tiny, tmp_path, capfd):
    main(short(tiny, tmp_path, steps=5, save_every=4, intervention="none"))
    assert "no correct answer in 5 steps. Does the problem ask for \\boxed{}" in "".join(
        capfd.readouterr()
    )
    shutil.rmtree(tmp_path / "checkpoints/step-000005")
    main(short(tiny, tmp_path, steps=5, save_every=4, intervention="none", resume=True))
    assert "no correct answer" not in "".join(capfd.readouterr())  # one step tells nothing


@pytest.mark.parametrize("rollouts", [3, 4])  # in float32, 1 / 3 is above 1 / 3
def test_trap_01_identical_rollouts_are_said(tiny, tmp_path, capfd, rollouts):
    main(short(tiny, tmp_path, steps=1, intervention="none", temperature=1e-6, rollouts=rollouts))
    assert "all rollouts of every prompt are identical" in "".join(capfd.readouterr())


def test_frozen_gives_the_gradients_back(policy):
    policy.model.lm_head.weight.requires_grad_(False)
    before = [p.requires_grad for p in policy.parameters()]
    with pytest.raises(RuntimeError), train_saei.frozen(policy):
        assert not any(p.requires_grad for p in policy.parameters())
        raise RuntimeError
    assert [p.requires_grad for p in policy.parameters()] == before
