"""study/run.py and its tables: the statistics in closed form, the plan of the runs, what is stored and read."""

import argparse
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

import train_saei  # noqa: E402
from runtime import report  # noqa: E402
from study import run as study  # noqa: E402
from study import tables  # noqa: E402


def arguments(tmp_path: Path, **changes) -> argparse.Namespace:
    chosen = {
        "settings": ["shifted", "elicit"],
        "arms": None,
        "seeds": [2],
        "ablation_seeds": 1,
        "tried": {},
    }
    chosen |= {
        "smoke": True,
        "results": tmp_path / "results",
        "out": tmp_path / "runs",
        "sizes": study.SMOKE,
        "jobs": 2,
    }
    return argparse.Namespace(**chosen | changes)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_interval_of_seeds_alone_is_students():
    """Differences that hang on the seed alone: mean +- t sd / sqrt(S), t(2) = 4.303."""
    by_seed = np.array([0.1, -0.2, 0.4])
    mean, low, high = tables.interval(np.repeat(by_seed[:, None], 50, axis=1))
    half = 4.303 * by_seed.std(ddof=1) / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((0.1, 0.1 - half, 0.1 + half))
    assert (
        np.isnan(tables.interval(np.ones((2, 9)))[1:]).all()
        and tables.change(np.ones((2, 9))) == "+1.000 2/2"
    )
    with pytest.raises(ValueError, match=r"values must be \(seeds, problems\), got \(3,\)"):
        tables.interval(np.zeros(3))


@pytest.mark.parametrize("seeds, sd", [(3, 0.0), (3, 0.05), (5, 0.01), (5, 0.05)])
def test_interval_leaves_out_a_difference_of_0_in_a_twentieth_of_cases_at_most(seeds, sd):
    """pass@1 of 8 samples on 400 problems, both arms alike but for what a seed does. (A bootstrap fails this.)"""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(400):
        difficulty = rng.random(400)
        chance = [(difficulty + rng.normal(0, sd, (seeds, 1))).clip(0, 1) for _ in range(2)]
        _, low, high = tables.interval(
            rng.binomial(8, chance[0]) / 8 - rng.binomial(8, chance[1]) / 8
        )
        missed += not low <= 0 <= high
    assert missed <= 0.07 * 400  # 0.05 and two standard errors
    assert seeds == 3 or missed > 0


def part(right: list[int], samples: int = 8) -> dict:
    return {
        "samples": samples,
        "greedy": study.pack([c > 3 for c in right]),
        "right": study.pack(right),
    }


def test_pass_at_k_of_stored_counts():
    counts = [0, 1, 8, 4, 32, 20]
    assert tables.unpack(study.pack(counts)).tolist() == counts
    found = tables.per_problem(part([0, 1, 8, 4]), "pass@2")
    assert found == pytest.approx(
        [0, 1 - math.comb(7, 2) / math.comb(8, 2), 1, 1 - math.comb(4, 2) / math.comb(8, 2)]
    )
    assert tables.per_problem(part([0, 2, 8]), "pass@1") == pytest.approx([0, 0.25, 1])
    assert tables.per_problem(part([0, 3, 4]), "greedy").tolist() == [0, 0, 1]


def test_differences_are_paired_by_seed_and_problem():
    runs = lambda right: {seed: {"evaluation": {"a/test": part(x)}} for seed, x in right.items()}  # noqa: E731
    a, b = runs({0: [8, 0, 4], 2: [8, 8, 8], 7: [8, 8, 8]}), runs({2: [0, 8], 0: [0, 0]})
    assert tables.paired(a, b, "a/test", "pass@1").tolist() == [[1, 0], [1, 0]]
    assert (
        tables.paired(a, b, "b/test", "pass@1") is None
        and tables.paired(a, {}, "a/test", "pass@1") is None
    )


def test_the_short_table_pools_the_untrained_domains_and_leaves_failed_runs_out():
    done = lambda a, b, c: {
        "evaluation": {"x": part(a), "y": part(b), "z": part(c)},
        "seconds/cpu": 60.0,
    }  # noqa: E731
    plain = {seed: done([2, 2], [4, 4], [8, 0]) for seed in range(3)} | {
        3: {"error": "out of memory"}
    }
    saei = {seed: done([4, 8], [4, 8], [8, 8]) for seed in range(3)}
    text = tables.short_table(
        "dice", {"before": {0: done([0, 0], [0, 0], [0, 0])}, "plain": plain, "saei": saei}
    )
    before, plain_row, saei_row = text.splitlines()[2:]
    assert before == "| before |  | 0.000 | 0.000 |  |  |  | 1.0 |"
    assert plain_row.startswith(
        "| plain GRPO | 3 (1 failed) | 0.250 (0.250 to 0.250) | 1.000 (1.000 to 1.000) | "
    )
    change, eight, pooled = plain_row.split(" | ")[4:7]
    assert (
        change.startswith("+0.500 [")
        and eight.startswith("+0.000 [")
        and pooled.startswith("+0.375 [")
    )
    assert (
        pooled.endswith("] 3/3")
        and "2 untrained domains" in text
        and saei_row.count("|  |  |  |") == 1
    )
    assert "–" in tables.short_table("dice", {"plain": plain})  # SaEI is still to come


# ---------------------------------------------------------------------------------------------------- what is to be run


def test_order_of_the_runs_is_balanced(tmp_path):
    listed = study.jobs(arguments(tmp_path))
    assert listed[0] == ("shifted", "before", 0) and len(listed) == len(set(listed))
    seeds = [seed for _, arm, seed in listed if arm in study.MAIN]
    assert seeds == sorted(seeds) and seeds.count(0) == seeds.count(1) == len(study.MAIN) + 3
    assert listed[-len(study.FURTHER) :] == [("shifted", arm, 0) for arm in study.FURTHER]
    assert not set(study.MAIN) & set(study.FURTHER) and not set(study.ABLATIONS) & set(
        study.CONTROLS
    )
    assert {"before"} | set(study.MAIN) | set(study.FURTHER) == set(tables.ARMS)
    assert set(study.MAIN) == set(tables.MAIN) and set(study.CONTROLS) == set(tables.CONTROLS)


def test_tuning_has_seeds_and_problems_of_its_own(tmp_path):
    args = arguments(
        tmp_path, seeds=[100, 101], tried={"bold": {"eps": "0.03"}}, settings=["shifted"]
    )
    assert study.jobs(args) == [
        ("shifted", "before", 100),
        ("shifted", "bold", 100),
        ("shifted", "bold", 101),
    ]
    assert (
        study.result_path(args, "shifted", "bold", 100)
        == tmp_path / "results/tuning/shifted/bold-100.json"
    )
    cfg = train_saei.load_config(study.train_arguments(args, "shifted", "bold", 100))
    assert (cfg.eps, cfg.intervention, cfg.seed, cfg.split) == (0.03, "egas", 100, "shifted/train")
    problems = [
        {row["problem"] + str(row["pips"]) for row in study.study_rows("plain/test", 40, s)}
        for s in (0, 49, 50, 100)
    ]
    assert problems[0] == problems[1]
    assert max(len(problems[i] & problems[j]) for i, j in ((0, 2), (0, 3), (2, 3))) < 3
    with pytest.raises(ValueError, match="not both at once, got \\[0, 100\\]"):
        study.jobs(arguments(tmp_path, seeds=[0, 100]))
    with pytest.raises(ValueError, match="--try is for tuning"):
        study.jobs(arguments(tmp_path, tried={"bold": {}}))
    with pytest.raises(ValueError, match="unknown arms bolt"):
        study.jobs(arguments(tmp_path, arms=["bolt"]))


def test_confirm_has_seeds_of_its_own_and_the_same_changes_in_every_arm(tmp_path):
    args = arguments(tmp_path, settings=["confirm"])
    listed = study.jobs(args)
    assert listed[0] == ("confirm", "before", 50) and {seed for *_, seed in listed} == {50, 51}
    assert len(listed) == 1 + 2 * len(study.MAIN)
    for setting, arm, seed in listed[1:]:
        cfg = train_saei.load_config(study.train_arguments(args, setting, arm, seed))
        assert study.CONFIRM.items() <= vars(cfg).items()


def test_every_arm_is_a_valid_configuration_of_equal_rollouts(tmp_path):
    args = arguments(tmp_path)
    for setting, arm, seed in study.jobs(args):
        if arm != "before":
            cfg = train_saei.load_config(study.train_arguments(args, setting, arm, seed))
            assert (cfg.rollouts, cfg.seed) == (8, seed)
            without = {"plain", "temperature", "mixed-plain"} | set(study.CONTROLS) - {"vogue"}
            without -= {"saei-kl_cov", "saei-two-updates"}
            assert (cfg.intervention == "none") == (arm in without)


def test_the_matched_temperature_must_have_been_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="--temperature measures it first"):
        study.run_options("shifted", "temperature", 0, smoke=False, tried={})
    (tmp_path / "results").mkdir()
    (tmp_path / "results/temperature.json").write_text('{"shifted": {"temperature": 1.3}}')
    assert (
        study.run_options("shifted", "temperature", 0, smoke=False, tried={})["temperature"] == 1.3
    )


# ----------------------------------------------------------------------------------------------------- results, tables


def test_kinds_of_tokens():
    tokens = [
        "<think",
        ">",
        "red",
        " ",
        "3",
        ",",
        " so",
        " 3",
        "+4",
        ".</",
        "think",
        ">",
        " \\",
        "boxed",
        "{",
        "7",
        "}",
    ]
    kinds = study.kinds_of([*tokens, "<|im_end|>"])
    assert dict(zip(tokens, kinds, strict=False))["7"] == "answer"
    expected = "frame frame colour frame digit sign words digit sign frame frame frame frame frame frame answer frame"
    assert kinds == [*expected.split(), "frame"]


def test_curves_are_means_of_neighbouring_steps(tmp_path):
    steps = [{"step": i, "accuracy": i / 100, "seconds/step": 2.0, "lr": 1.0} for i in range(100)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    found = study.training(tmp_path)
    assert len(found["curves"]["accuracy"]) == study.POINTS and "lr" not in found["curves"]
    assert found["curves"]["accuracy"][:2] == pytest.approx([0.015, 0.055])
    assert found["seconds/train"] == 200 and found["seconds"] == {"seconds/step": 2.0}
    assert tables.curve_mean(found, "accuracy", 0.8, 1.0) == pytest.approx(0.895, abs=0.001)


def test_a_failed_run_is_recorded_and_shown(tmp_path, monkeypatch):
    """Training that cannot start: the result holds the error, the tables name it, and the run counts as done."""
    monkeypatch.setitem(
        study.MAIN, "plain", {"intervention": "none", "model": str(tmp_path / "nowhere")}
    )
    args = arguments(tmp_path, settings=["shifted"])
    study.one_run(args, "shifted", "plain", 0)
    result = json.loads((tmp_path / "results/shifted/plain-0.json").read_text())
    assert result["error"].startswith("RuntimeError: train_saei.py ended with 1")
    text = tables.everything(tmp_path / "results")
    assert "- shifted, plain, seed 0: " in text and tables.NONE_YET in text


def test_a_run_from_training_to_table(tmp_path):
    args = arguments(tmp_path, sizes={"problems": 4, "samples": 8, "deep": 2, "deep_samples": 32})
    for arm in ("plain", "extremes"):
        study.one_run(args, "shifted", arm, 0)
    assert not (tmp_path / "runs/shifted/plain-0/checkpoints").exists()
    plain, extremes = (
        tables.load(tmp_path / "results")["shifted"][arm][0] for arm in ("plain", "extremes")
    )
    assert list(plain["evaluation"])[0] == "shifted/test" and len(plain["evaluation"]) == 5
    assert len(plain["evaluation"]["sums/test"]["right"]) == 4 and len(plain["deep"]["right"]) == 2
    assert (
        list(extremes["evaluation"]) == ["shifted/test"]
        and extremes["config"]["tsec_keep"] == "extreme"
    )
    assert extremes["diagnostics"]["judge"]["pictures"] == 4 and "judge" not in plain["diagnostics"]
    counts = [sum(numbers[:3]) for numbers in plain["diagnostics"]["tokens"]["kinds"].values()]
    assert sum(counts) > 100
    text = tables.everything(tmp_path / "results")
    assert (
        "| plain GRPO | 1 | " in text
        and "| TsEC reversed: the extremes | 1 | " in text
        and "nan" not in text
    )
    source = report.build_study(tmp_path / "results").read_text()
    page = ElementTree.fromstring(source.removeprefix("<!DOCTYPE html>"))
    titles = [f.findtext("figcaption") for f in page.iter("figure")]
    assert titles == [
        title for title, *_ in report.BANDS[:3]
    ]  # no arm here has rescued prompts but an ablation
    assert len(list(page.iter("table"))) == text.count("\n|---|")
    assert not re.search(r"\*\*|`", "".join(page.itertext()))
