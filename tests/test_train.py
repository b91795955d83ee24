"""train_saei.py: every arm, rewards, warnings, errors of a step, what is logged and saved."""

import contextlib
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import assert_same_run, comparable, lines_of, metrics_of, parameters, short
from transformers import AutoModelForImageTextToText, AutoProcessor

import egas
import grpo
import rewards
import train_saei
from runtime import args, distributed
from runtime import run as runs
from train_saei import main
from vlm.policy import Policy

# --------------------------------------------------------------------------- processes, trackers


def test_the_prompts_of_a_step_are_divided():
    assert distributed.micro_batch_size(16, 2, 2, 2) == (2, 2)
    assert distributed.micro_batch_size(16, 1, 99, 1) == (16, 1)
    with pytest.raises(ValueError, match="prompts_per_step=6 must be a multiple of processes"):
        distributed.micro_batch_size(6, 1, 16, 4)
    with pytest.raises(ValueError, match="micro_prompts=3 must divide 8"):
        distributed.micro_batch_size(8, 1, 3, 1)


def test_what_the_launcher_cannot_do_is_refused(tiny, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tracker comet_ml is not installed: pip install comet_ml"):
        main(short(tiny, tmp_path, report_to="comet_ml"))
    with monkeypatch.context() as environment:
        environment.setenv("LOCAL_RANK", "0")
        environment.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="started 2 processes, .* set ACCELERATE_USE_CPU=true"):
            main(short(tiny, tmp_path))
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    with pytest.raises(ValueError, match="fp16 is not supported: use --mixed_precision bf16 or no"):
        main(short(tiny, tmp_path))


def test_bfloat16_parameters_are_warned_of(tiny, tmp_path):
    with pytest.warns(UserWarning, match="bfloat16 parameters lose most updates of a small lr"):
        main(short(tiny, tmp_path, steps=1, dtype="bfloat16"))


def test_a_tracker_gets_plain_values(tiny, tmp_path, monkeypatch):
    """tensorboard takes no lists."""
    seen = {}
    start = lambda self, name, config: seen.update(config)  # noqa: E731
    monkeypatch.setattr(Accelerator, "init_trackers", start)
    config = short(tiny, tmp_path, report_to="any")
    next(runs.Run(config.run, args.flat(config), Accelerator()).steps())
    assert seen["reward"] == "['accuracy:0.9', 'format:0.1']" and "order" not in seen
    assert all(isinstance(value, (int, float, str)) for value in seen.values())


def test_processes_share_the_rows_of_a_step():
    batches = []
    for process in range(2):
        accelerator = SimpleNamespace(process_index=process, num_processes=2)
        run = SimpleNamespace(args=args.RunArgs(seed=3), accelerator=accelerator)
        rows = [{"problem": str(i), "images": [i]} for i in range(12)]
        batches.append(runs.Batches(rows, None, 4, run))
    epoch = []
    for step in range(3):
        for batch in (part.of_step(step) for part in batches):
            epoch += batch.problems
            assert [[int(problem)] for problem in batch.problems] == batch.images
    assert sorted(map(int, epoch)) == list(range(12)) != list(map(int, epoch))
    batch = batches[0]._replace(rows=rows[:1]).of_step(0)  # one row, twice
    assert batch.problems == ["0", "0"]
    seeds = [seed for branch in range(3) for seed in batch.seeds(branch)]
    assert len(set(seeds)) == 6 and seeds == [s for b in range(3) for s in batch.seeds(b)]


# ------------------------------------------------------------------------------------------ arms


ARMS = [("none", "clean"), ("random", "clean"), ("noise", "sampled"), ("egas", "clean")]


@pytest.mark.parametrize("intervention, condition", [*ARMS, ("egas", "sampled")])
def test_every_arm_trains_at_one_budget(tiny, tmp_path, half_right, intervention, condition):
    arm = dict(intervention=intervention, condition=condition)
    main(short(tiny, tmp_path, steps=1, kl_coef=0.1, **arm))
    (metrics,) = metrics_of(tmp_path)
    samples = lines_of(tmp_path / "samples.jsonl")
    assert len(samples) == 4  # G, whatever the arm
    adversarial = [line["image"] == "adversarial" for line in samples]
    assert sum(adversarial) == (0 if intervention == "none" else 2)
    assert metrics["grad_norm"] > 0 and all(math.isfinite(v) for v in metrics.values())
    assert metrics["kl"] == pytest.approx(0, abs=1e-5)
    assert ("attack/psnr" in metrics) == (intervention != "none")
    if intervention in ("random", "egas"):
        assert metrics["attack/linf"] == pytest.approx(2 / 255, abs=1e-6)
    if intervention == "egas":
        assert metrics["entropy/attacked"] > metrics["entropy/selected"]
    for line in samples:
        assert len(line["tokens"]) == len(line["entropy"])
        assert (tmp_path / line["picture"]).exists() and (tmp_path / line["clean_picture"]).exists()


def test_noise_fades_as_noisyrollouts():
    """Its numbers: from 500, lambda 30, mid 40, T 60."""
    want = {0: 500, 40: 250, 45: 500 * (1 - 1 / (1 + math.exp(-30 * 5 / 60))), 60: 0}
    for step, value in want.items():
        assert egas.annealed_time(step, 60) == pytest.approx(value, abs=0.05)


def test_sampling_a_few_prompts_at_a_time_gives_the_same_responses(policy, rows, monkeypatch):
    prompts = policy.encode([r["problem"] for r in rows], [r["images"] for r in rows])
    policy.eos_ids = list(range(0, 400, 8))  # lengths differ
    seeds, sizes, together = [5, 6, 7, 8], [], Policy._sample_together
    want = policy.sample(prompts, 2, seeds, 12)

    def listen(self, part, *rest):
        sizes.append(len(part))
        return together(self, part, *rest)

    monkeypatch.setattr(Policy, "_sample_together", listen)
    ours = policy.sample(prompts, 2, seeds, 12, prompts_at_a_time=3)
    assert sizes == [3, 1] and len(set(ours.mask.sum(dim=1).tolist())) > 2
    assert torch.equal(ours.mask, want.mask) and torch.equal(ours.tokens, want.tokens)
    for name in ("logprobs", "entropy"):
        a, b = (getattr(responses, name)[ours.mask] for responses in (ours, want))
        assert torch.allclose(a, b, atol=1e-5)


def test_zero_variance_groups_can_be_dropped(tiny, tmp_path, monkeypatch):
    """All-wrong groups of differing format: dropped, they leave no gradient (trap 12)."""
    half_formatted = lambda completions, **_: [i % 2.0 for i in range(len(completions))]  # noqa: E731
    monkeypatch.setattr(rewards, "format_reward", half_formatted)
    norms = {}
    for rule in ("keep", "drop"):
        main(short(tiny, tmp_path / rule, steps=1, zero_variance=rule))
        (metrics,) = metrics_of(tmp_path / rule)
        assert metrics["zero_variance"] == 1
        norms[rule] = metrics["grad_norm"]
    assert norms["keep"] > 0 == norms["drop"]


# --------------------------------------------------------------------------------------- rewards


OWN_REWARDS = """
def words(completions, problem, row, completion_ids, **columns):
    assert len(completions) == len(problem) == len(row) == len(completion_ids)
    assert all(isinstance(token, int) for ids in completion_ids for token in ids)
    return [len(text.split()) / 100 for text in completions]

def late_error(completions, row, **columns):
    if len(completions) > 1 or row[0] == 3:
        raise KeyError("no such thing")
    return [0.0]

def short(completions, **columns):
    return []
"""


@pytest.fixture
def own(tmp_path):
    """The file's path, as the start of --reward's value."""
    (tmp_path / "mine.py").write_text(OWN_REWARDS)
    return f"{tmp_path}/mine.py"


def test_own_rewards_are_added_weighed_and_logged_apart(tiny, tmp_path, half_right, own):
    weights = {"accuracy": 0.9, "format": 0.1, "words": 0.5, "length_penalty": 0.25}
    specs = []
    for name, weight in weights.items():
        specs.append(f"{own}:{name}:{weight}" if name == "words" else f"{name}:{weight}")
    main(short(tiny, tmp_path, reward=specs))
    for line in metrics_of(tmp_path) + lines_of(tmp_path / "samples.jsonl"):
        total = sum(weight * line[name] for name, weight in weights.items())
        assert line["reward"] == pytest.approx(total, abs=1e-6)
        assert -1 <= line["length_penalty"] <= 0 < line["words"]


def test_accuracy_is_measured_where_the_reward_does_not_name_it(tiny, tmp_path, half_right, own):
    main(short(tiny, tmp_path, steps=1, reward=[f"{own}:words:1"]))
    (metrics,) = metrics_of(tmp_path)
    assert metrics["accuracy"] == 0.5 and metrics["reward"] == metrics["words"] > 0


@pytest.mark.parametrize(
    "name, said", [("short", "failed on row 0.*0 values"), ("nothing", "no f")]
)
def test_a_reward_that_cannot_work_is_refused_before_the_first_step(
    tiny, tmp_path, own, name, said
):
    with pytest.raises((ValueError, RuntimeError), match=said):
        main(short(tiny, tmp_path, reward=[f"{own}:{name}:1"]))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_reward_that_is_not_finite_stops(tiny, tmp_path, monkeypatch):
    nan = lambda completions, **_: [math.nan] * len(completions)  # noqa: E731
    monkeypatch.setattr(rewards, "accuracy_reward", nan)
    with pytest.raises(RuntimeError, match="'accuracy' failed on row 0.*nan.* no finite number"):
        main(short(tiny, tmp_path))


def test_an_error_in_a_reward_names_the_row_of_the_set(tiny, tmp_path, own, monkeypatch):
    """Row 2 is left out: the third usable row is number 3 of the set."""
    rows = train_saei.args.data.load_rows("demo", "plain/train", limit=9)
    rows.keep = [0, 1, 3, 4, 5, 6, 7, 8]
    monkeypatch.setattr(args.data, "load_rows", lambda *_, **__: rows)
    monkeypatch.setattr(args.data, "step_rows", lambda *_: [7, 2])
    with pytest.raises(RuntimeError, match="'late_error' failed on row 3, completion .*KeyError"):
        main(short(tiny, tmp_path, reward=[f"{own}:late_error:1"]))


# -------------------------------------------------------------------------- warnings and failures


def test_trap_17_no_reward_is_said(tiny, tmp_path, capfd):
    changes = dict(steps=5, save_every=4, intervention="none")
    main(short(tiny, tmp_path, **changes))
    said = "".join(capfd.readouterr())
    assert "no correct answer in 5 steps. Does the problem ask for \\boxed{}" in said
    shutil.rmtree(tmp_path / "checkpoints/step-000005")
    main(short(tiny, tmp_path, **changes, resume=True))
    assert "no correct answer" not in "".join(capfd.readouterr())  # one step tells nothing


@pytest.mark.parametrize("rollouts", [3, 4])  # in float32, 1 / 3 is above 1 / 3
def test_trap_01_identical_rollouts_are_said(tiny, tmp_path, capfd, rollouts):
    main(short(tiny, tmp_path, intervention="none", temperature=1e-6, rollouts=rollouts))
    said = "".join(capfd.readouterr())
    assert said.count("all rollouts of every prompt are identical") == 1  # in two steps


def test_a_gradient_that_is_not_finite_stops_with_the_batch_saved(
    tiny, tmp_path, half_right, monkeypatch
):
    loss, calls = grpo.policy_loss, []

    def breaks_at_step_1(*arguments):
        calls.append(1)
        value, metrics = loss(*arguments)
        return value * (math.nan if len(calls) == 2 else 1), metrics

    monkeypatch.setattr(grpo, "policy_loss", breaks_at_step_1)
    with pytest.raises(FloatingPointError, match="step 1: the gradient is not finite"):
        main(short(tiny, tmp_path, save_every=1))
    (saved,) = tmp_path.glob("failed-step-000001-process-0.pt")
    assert len(torch.load(saved, weights_only=False)["responses"][0]["tokens"]) == 4
    (good,) = runs.checkpoints(tmp_path)
    assert all(p.isfinite().all() for p in parameters(good).values())


def test_frozen_gives_the_gradients_back(policy):
    policy.model.lm_head.weight.requires_grad_(False)
    before = [p.requires_grad for p in policy.parameters()]
    with pytest.raises(RuntimeError), distributed.frozen(policy):
        assert not any(p.requires_grad for p in policy.parameters())
        raise RuntimeError
    assert [p.requires_grad for p in policy.parameters()] == before


# ------------------------------------------------------------------------------ what a run leaves


def test_a_checkpoint_loads_with_the_auto_classes(whole, tiny):
    (folder,) = runs.checkpoints(whole)
    trained = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    AutoProcessor.from_pretrained(folder)
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"] == tiny
    start = parameters(tiny)
    assert any(not torch.equal(trained[name], start[name]) for name in trained)


def test_a_row_that_comes_twice_in_a_step_is_sampled_anew(tiny, tmp_path, monkeypatch):
    row = json.dumps({"problem": "1 + 1? Answer in \\boxed{}.", "answer": "2"})
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    seen, grade = [], train_saei.rollouts.grade

    def listen(*arguments):
        texts, scores = grade(*arguments)
        seen.extend(texts)
        return texts, scores

    monkeypatch.setattr(train_saei.rollouts, "grade", listen)
    rows = dict(dataset=str(tmp_path / "rows.jsonl"), split="train", intervention="none")
    main(short(tiny, tmp_path / "run", steps=1, columns=["image=none"], **rows))
    assert len(seen) == 2 and seen[0] != seen[1]


def test_the_second_step_is_traced_and_nothing_changes(
    tiny, tmp_path, whole, half_right, capsys, monkeypatch
):
    update = train_saei.update

    def marked(*arguments):
        with torch.profiler.record_function(f"update of step {arguments[-1]}"):
            return update(*arguments)

    monkeypatch.setattr(train_saei, "update", marked)
    main(short(tiny, tmp_path, steps=4, save_every=4, profile=True))
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in trace if "name" in event}
    assert {name for name in names if name.startswith("update of step")} == {"update of step 1"}
    assert "aten::addmm" in names and any("Backward" in name for name in names)
    printed = capsys.readouterr().out
    assert "Self CPU" in printed and "aten::" in printed
    assert_same_run(tmp_path, whole)
    assert comparable(metrics_of(whole)[3])["grad_norm"] > 0
    assert not (whole / "trace.json").exists()


def test_a_run_of_one_step_is_traced_too(tiny, tmp_path, monkeypatch):
    traced = []
    trace = lambda folder: traced.append(folder) or contextlib.nullcontext()  # noqa: E731
    monkeypatch.setattr(runs, "profile", trace)
    main(short(tiny, tmp_path, steps=1, profile=True))
    assert traced == [tmp_path]
