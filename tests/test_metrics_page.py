"""docs/metrics.md: every logged number is on it, everything on it is logged, and means what it says."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

import eval as evaluation
import train_saei

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/metrics.md").read_text()
TRAINING, EVALUATION = PAGE.split("## Evaluation")
OWN = "def your_reward(completions, **columns):\n    return [len(text) / 100 for text in completions]\n"


def rows_of(part: str) -> dict[str, str]:
    """name -> its row"""
    return {found[1]: found[0] for found in re.finditer(r"^\| `([^`]+)`.*$", part, re.MULTILINE)}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """One step of the demo's policy with every option that logs something, and one of plain GRPO.

    -> {arm: metrics, samples by prompt, tracked, cfg, folder}
    """
    folder, found = tmp_path_factory.mktemp("metrics"), {}
    (folder / "my.py").write_text(OWN)
    common = dict(
        model=str(ROOT / "demo/confident"),
        split="offset/train",
        steps=1,
        prompts_per_step=8,
        lr=1e-4,
    )
    common |= dict(
        rollouts=6,
        adversarial_rollouts=3,
        max_new_tokens=32,
        log_prompts=8,
        pgd_steps=1,
        self_check=False,
    )
    extras = dict(
        kl_coef=0.1,
        length_weight=0.25,
        updates_per_step=2,
        reward=[f"{folder}/my.py:your_reward:0.5"],
    )
    extras |= dict(update_control="bonus")
    for arm, changes in {"egas": extras, "none": {"intervention": "none"}}.items():
        cfg, tracked = train_saei.Config(**common | changes, output=str(folder / arm)), {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Accelerator,
                "log",
                lambda self, values, step=None, to=tracked, **_: to.update(values),
            )
            train_saei.main(cfg)
        (metrics,) = lines_of(folder / arm / "metrics.jsonl")
        groups = [[] for _ in range(cfg.prompts_per_step)]
        for sample in lines_of(folder / arm / "samples.jsonl"):
            groups[sample["prompt"]].append(sample)
        found[arm] = SimpleNamespace(
            metrics=metrics, groups=groups, tracked=tracked, cfg=cfg, folder=folder / arm
        )
    return found


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """-> a split's summary, its records"""
    output = tmp_path_factory.mktemp("evaluation") / "e"
    model, split = str(ROOT / "demo/confident"), "shifted/test"
    result = evaluation.main(
        evaluation.EvalConfig(
            model=model, output=str(output), splits=[split], problems=6, max_new_tokens=28
        )
    )
    return result["splits"][split], lines_of(output.with_suffix(".jsonl"))


def test_the_page_and_the_runs_have_the_same_names(logged, evaluated):
    assert set(rows_of(TRAINING)) == set(logged["egas"].metrics)
    assert set(rows_of(EVALUATION)) == set(evaluated[0])
    only_attacked = {
        name for name, row in rows_of(TRAINING).items() if row.startswith(f"| `{name}` † |")
    }
    optional = {
        "kl",
        "length_penalty",
        "your_reward",
        "control/loss",
        "control/tokens",
        "control/bonus",
    }
    assert set(logged["egas"].metrics) - set(logged["none"].metrics) == only_attacked | optional
    for run in logged.values():
        assert set(run.tracked) == set(run.metrics) - {"step"}
    names = re.findall(r"^\| `.*`", PAGE, re.MULTILINE)
    assert len(names) == len(rows_of(TRAINING)) + len(rows_of(EVALUATION))  # none is defined twice


@pytest.mark.parametrize("arm", ["egas", "none"])
def test_rewards_and_responses_are_what_the_page_says(logged, arm):
    run, m = logged[arm], logged[arm].metrics
    samples = [sample for group in run.groups for sample in group]
    of = lambda name, part: np.mean([sample[name] for sample in part])  # noqa: E731
    for name in ("reward", "accuracy", "format") + ("length_penalty", "your_reward") * (
        arm == "egas"
    ):
        assert m[name] == pytest.approx(of(name, samples), abs=1e-6), name
    right = [[sample["accuracy"] == 1 for sample in group] for group in run.groups]
    assert m["zero_variance"] == pytest.approx(np.mean([len(set(group)) == 1 for group in right]))
    assert m["distinct"] == pytest.approx(
        np.mean([len({s["response"] for s in g}) / 6 for g in run.groups])
    )
    assert m["length"] == pytest.approx(np.mean([len(sample["tokens"]) for sample in samples]))
    cut = [sample["tokens"][-1] != "<|im_end|>" for sample in samples]
    assert m["truncated"] == pytest.approx(np.mean(cut)) and 0 < np.mean(cut) < 1
    if arm == "egas":
        for half in ("clean", "adversarial"):
            part = [sample for sample in samples if sample["image"] == half]
            assert len(part) == 24
            for name in ("reward", "accuracy"):
                assert m[f"{name}/{half}"] == pytest.approx(of(name, part), abs=1e-6)
        halves = [(any(group[:3]), any(group[3:])) for group in right]
        assert m["rescued"] == pytest.approx(np.mean([new and not old for old, new in halves]))
        assert m["lost"] == pytest.approx(np.mean([old and not new for old, new in halves]))
        assert len(set(halves)) == 4  # or a wrong rule would pass
        parts = (
            0.9 * m["accuracy"]
            + 0.1 * m["format"]
            + 0.25 * m["length_penalty"]
            + 0.5 * m["your_reward"]
        )
        assert m["reward"] == pytest.approx(parts, abs=1e-6)


@pytest.mark.parametrize("arm", ["egas", "none"])
def test_entropies_and_tsec_are_what_the_page_says(logged, arm):
    run, m = logged[arm], logged[arm].metrics
    clean = [s for group in run.groups for s in group if s["image"] == "clean"]
    fresh = [s for group in run.groups for s in group if s["image"] == "adversarial"]
    near = lambda values: pytest.approx(np.mean(values), abs=1e-4)  # noqa: E731  samples have four decimals
    assert m["entropy/clean"] == near([np.mean(s["entropy"]) for s in clean])
    kept = [np.array(s["entropy"])[s["kept"]] for s in clean]
    assert m["entropy/selected"] == near([x.mean() if len(x) else 0.0 for x in kept])
    assert m["tsec/kept"] == near([np.mean(s["kept"]) for s in clean])
    for name, q in (("low", 0.2), ("high", 0.8)):
        assert m[f"tsec/{name}"] == near([np.quantile(s["entropy"], q) for s in clean])
    if arm == "egas":
        assert m["entropy/fresh"] == near([np.mean(s["entropy"]) for s in fresh])
        assert m["entropy/attacked"] > m["entropy/selected"]


def test_the_attacks_size_is_what_the_page_says(logged):
    run, changes, decibels = logged["egas"], [], []
    for group in run.groups:
        clean, attacked = (
            np.asarray(Image.open(run.folder / group[-1][name]), np.float64) / 255
            for name in ("clean_picture", "picture")
        )
        changes.append(np.abs(attacked - clean).max())  # exact: one step of 4/255 from 8-bit pixels
        decibels.append(10 * np.log10(1 / np.mean((attacked - clean) ** 2)))
    assert run.metrics["attack/linf"] == pytest.approx(np.mean(changes), abs=1e-6)
    assert run.metrics["attack/psnr"] == pytest.approx(np.mean(decibels), abs=1e-3)


def test_the_updates_numbers_are_what_the_page_says(logged):
    plain, m = logged["none"], logged["none"].metrics
    samples = [sample for group in plain.groups for sample in group]
    weighed = [sample["advantage"] * len(sample["tokens"]) for sample in samples]
    assert m["loss"] == pytest.approx(
        -sum(weighed) / sum(len(s["tokens"]) for s in samples), abs=1e-5
    )
    assert abs(m["loss"]) > 1e-3 and m["clip/low"] == m["clip/high"] == 0
    for group in plain.groups:
        r = np.array([sample["reward"] for sample in group])
        expected = (r - r.mean()) / (r.std(ddof=1) + 1e-6)
        assert [sample["advantage"] for sample in group] == pytest.approx(expected, abs=1e-4)
    for run in logged.values():
        assert run.metrics["lr"] == run.cfg.lr and run.metrics["step"] == 0
        phases = [
            v for k, v in run.metrics.items() if k.startswith("seconds/") and k != "seconds/step"
        ]
        assert run.metrics["seconds/step"] == pytest.approx(sum(phases), abs=1e-4)
    assert (
        logged["egas"].metrics["kl"] > 0
    )  # the second of its two updates: the first one has moved the policy


def test_the_evaluations_numbers_are_what_the_page_says(evaluated):
    summary, records = evaluated
    right = np.array([record["right"] for record in records])  # (problems, samples)
    assert summary["n"] == len(records) == 6
    expected = {
        "greedy": np.mean([record["greedy_right"] for record in records]),
        "pass@1": right.mean(),
    }
    expected |= {"pass@8": right.any(axis=1).mean()}  # n = k = 8
    expected |= {
        name: np.mean([record[name] for record in records]) for name in ("entropy", "truncated")
    }
    for name, value in expected.items():
        assert summary[name][0] == pytest.approx(value), name
        assert summary[name][1] <= value <= summary[name][2]
    assert 0 < expected["truncated"] < 1


# --------------------------------------------------------------------------------------------------------- the ranges


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from benchmarks import tables

    return tables


def test_ranges_are_those_of_the_results(tables):
    assert tables.with_ranges(PAGE, ROOT / "study/results") == PAGE, (
        "run python -m benchmarks.tables"
    )


def study_file(folder: Path, arm: str, seed: int, curves: dict, right: str, **more) -> None:
    part = {"samples": 8, "greedy": "10", "right": right, "entropy": 0.25, "truncated": 0.0}
    run = {
        "arm": arm,
        "seed": seed,
        "steps": 10,
        "curves": curves,
        "seconds": {"seconds/step": 2.0 + seed},
    }
    run |= {"evaluation": {"shifted/test": part}} | more
    (folder / "shifted").mkdir(exist_ok=True)
    (folder / "shifted" / f"{arm}-{seed}.json").write_text(json.dumps(run))


def test_ranges_from_files_made_by_hand(tables, tmp_path):
    rising, steady = [i / 10 for i in range(10)], [0.5, 0.52] * 5
    for seed in (1, 0):
        curves = {"reward": rising, "accuracy": steady, "rescued": [0.1] * 10}
        study_file(tmp_path, "saei", seed, curves, right="80" if seed else "84")
    study_file(tmp_path, "plain", 0, {"reward": rising[::-1], "accuracy": steady}, right="22")
    study_file(tmp_path, "plain", 1, {}, right="22", error="it broke")
    study_file(tmp_path, "before", 0, {}, right="00")
    page = tables.with_ranges(PAGE, tmp_path)
    cell = lambda part, name: rows_of(part)[name].split("|")[4].strip()  # noqa: E731
    training, evaluation = page.split("## Evaluation")
    assert (
        cell(training, "reward")
        == "SaEI 0.05 → 0.85 (0 to 0.9)<br>plain GRPO 0.85 → 0.05 (0.045 to 0.855)"
    )
    assert cell(training, "accuracy") == "SaEI 0.51 (0.5 to 0.52)<br>plain GRPO 0.51 (0.5 to 0.52)"
    assert cell(training, "rescued") == "SaEI 0.1"
    assert cell(training, "seconds/step") == "SaEI 2.5 (2.05 to 2.95)<br>plain GRPO 2"
    assert cell(training, "kl") == "-"
    assert (
        cell(evaluation, "pass@1")
        == "SaEI 0 → 0.625 (0.5 to 0.75)<br>plain GRPO 0 → 0.25 (0.25 to 0.25)"
    )
    assert cell(evaluation, "n") == "-"
    assert "SaEI, seeds 0, 1: 10 steps, kept as 10 means; plain GRPO, seeds 0: 10 steps" in page
    strip = lambda text: [
        [c for i, c in enumerate(line.split("|")) if i != 4] for line in text.split("\n")
    ]  # noqa: E731
    note = tables.metric_note(tmp_path), tables.metric_note(ROOT / "study/results")
    assert strip(page.replace(*note)) == strip(PAGE)  # nothing else moves
