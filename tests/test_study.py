"""study/: the statistics in closed form, the plan of the runs, what is stored and shown."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest

import train_saei
from study import evaluation, run, tables


def arguments(tmp_path: Path, **changes) -> argparse.Namespace:
    chosen = {"settings": ["shifted", "elicit"], "arms": None, "seeds": [2], "ablation_seeds": 1}
    chosen |= {"tried": {}, "smoke": True, "sizes": run.SMOKE, "jobs": 2}
    chosen |= {"results": tmp_path / "results", "out": tmp_path / "runs"}
    return argparse.Namespace(**chosen | changes)


def part(right: list[int], samples: int = 8) -> dict:
    """A split's stored answers."""
    return {"samples": samples, "right": evaluation.pack(right), "greedy": 0.5}


# ------------------------------------------------------------------------------- statistics


def test_interval_of_seeds_alone_is_students():
    """Differences that depend on the seed alone: mean +- t sd / sqrt(S), t(2) = 4.303."""
    by_seed = np.array([0.1, -0.2, 0.4])
    half = 4.303 * by_seed.std(ddof=1) / math.sqrt(3)
    found = tables.interval(np.repeat(by_seed[:, None], 50, axis=1))
    assert found == pytest.approx((0.1, 0.1 - half, 0.1 + half))
    assert np.isnan(tables.interval(np.ones((2, 9)))[1:]).all()
    assert tables.change(np.ones((2, 9))) == "+1.000 2/2"
    with pytest.raises(ValueError, match=r"values must be \(seeds, problems\), got \(3,\)"):
        tables.interval(np.zeros(3))


@pytest.mark.parametrize("seeds, sd", [(3, 0.0), (3, 0.05), (5, 0.01), (5, 0.05)])
def test_interval_excludes_0_in_at_most_a_twentieth_of_equal_arms(seeds, sd):
    """pass@1 of 8 samples on 400 problems; arms differ by what a seed does. Bootstrap fails."""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(400):
        difficulty = rng.random(400)
        arms = []
        for _ in range(2):
            chance = (difficulty + rng.normal(0, sd, (seeds, 1))).clip(0, 1)
            arms.append(chance)
        difference = rng.binomial(8, arms[0]) / 8 - rng.binomial(8, arms[1]) / 8
        _, low, high = tables.interval(difference)
        missed += not low <= 0 <= high
    assert missed <= 0.07 * 400  # 0.05 and two standard errors
    assert seeds == 3 or missed > 0


def test_pass_at_k_of_stored_counts():
    counts = [0, 1, 8, 4, 32, 20]
    assert evaluation.unpack(evaluation.pack(counts)).tolist() == counts
    four = [1 - math.comb(8 - c, 2) / math.comb(8, 2) for c in (0, 1, 8, 4)]
    assert tables.per_problem(part([0, 1, 8, 4]), "pass@2") == pytest.approx(four)
    assert tables.per_problem(part([0, 2, 8]), "pass@1") == pytest.approx([0, 0.25, 1])


def test_differences_are_paired_by_seed_and_problem():
    a = {0: [8, 0, 4], 2: [8, 8, 8], 7: [8, 8, 8]}
    b = {2: [0, 8], 0: [0, 0]}
    a, b = (
        {seed: {"evaluation": {"a/test": part(right)}} for seed, right in arm.items()}
        for arm in (a, b)
    )
    assert tables.paired(a, b, "a/test", "pass@1").tolist() == [[1, 0], [1, 0]]
    assert tables.paired(a, b, "b/test", "pass@1") is None
    assert tables.paired(a, {}, "a/test", "pass@1") is None


def test_the_short_table_pools_untrained_domains_and_leaves_failed_runs_out():
    def done(x, y, z):
        return {"evaluation": {"x": part(x), "y": part(y), "z": part(z)}, "seconds/cpu": 60.0}

    plain = {seed: done([2, 2], [4, 4], [8, 0]) for seed in range(3)}
    plain[3] = {"error": "out of memory"}
    saei = {seed: done([4, 8], [4, 8], [8, 8]) for seed in range(3)}
    before = {0: done([0, 0], [0, 0], [0, 0])}
    text = tables.short_table("dice", {"before": before, "plain": plain, "saei": saei})
    rows = text.splitlines()[2:]
    assert rows[0] == "| before |  | 0.000 | 0.000 |  |  |  | 1.0 |"
    cells = rows[1].split(" | ")
    assert cells[1:4] == ["3 (1 failed)", "0.250 (0.250 to 0.250)", "1.000 (1.000 to 1.000)"]
    for cell, start in zip(cells[4:7], ("+0.500 [", "+0.000 [", "+0.375 ["), strict=True):
        assert cell.startswith(start)
    assert cells[6].endswith("] 3/3") and "2 untrained domains" in text
    assert "–" in tables.short_table("dice", {"plain": plain})  # SaEI is still to come


# ------------------------------------------------------------------------------ what to run


def test_order_of_the_runs_is_balanced(tmp_path):
    listed = run.jobs(arguments(tmp_path))
    assert listed[0] == ("shifted", "before", 0) and len(listed) == len(set(listed))
    seeds = [seed for _, arm, seed in listed if arm in run.MAIN]
    assert seeds == sorted(seeds) and seeds.count(0) == seeds.count(1) == len(run.MAIN) + 3
    further = [("shifted", arm, 0) for arm in run.FURTHER]
    assert listed[-len(further) :] == further
    arms = {"before", *run.MAIN, *run.PAID_ARMS, *run.ABLATIONS, *run.CONTROLS, *run.REMOVED}
    assert arms == set(tables.ARMS) and set(run.CONTROLS) == set(tables.CONTROLS)
    confirm = run.jobs(arguments(tmp_path, settings=["confirm"]))
    assert confirm[0] == ("confirm", "before", 50) and {seed for *_, seed in confirm} == {50, 51}
    assert len(confirm) == 1 + 2 * len(run.MAIN)
    paid = run.jobs(arguments(tmp_path, settings=["paid"]))
    arms = {"before", *run.MAIN, *run.PAID_ARMS} - set(run.LEFT_OUT["paid"])
    assert {arm for _, arm, _ in paid} == arms
    assert {seed for *_, seed in paid} == {80, 81}


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"seeds": [0, 100]}, r"for tuning, the others not: got \[0, 100\]"),
        ({"tried": {"bold": {}}}, "--try is for tuning"),
        ({"arms": ["bolt"]}, "unknown arm bolt"),
        ({"arms": ["annealed"]}, "option anneal, which was removed since"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, changes, error):
    with pytest.raises(ValueError, match=error):
        run.jobs(arguments(tmp_path, **changes))


def test_tuning_has_seeds_and_problems_of_its_own(tmp_path):
    tried = {"bold": {"eps": "0.03"}}
    args = arguments(tmp_path, seeds=[100, 101], tried=tried, settings=["shifted"])
    arms = [("before", 100), ("bold", 100), ("bold", 101)]
    assert run.jobs(args) == [("shifted", arm, seed) for arm, seed in arms]
    path = run.result_path(args.results, "shifted", "bold", 100)
    assert path == tmp_path / "results/tuning/shifted/bold-100.json"
    words = run.train_arguments(args, "shifted", "bold", 100)
    assert words[words.index("--eps") + 1] == "0.03" and words[words.index("--seed") + 1] == "100"
    problems = []
    for seed in (0, 49, 50, 100, 80):
        rows = evaluation.study_rows("plain/test", 40, seed)
        problems.append({row["problem"] + str(row["values"]) for row in rows})
    assert problems[0] == problems[1]
    for i, j in ((0, 2), (0, 3), (2, 3), (0, 4), (2, 4), (3, 4)):
        assert len(problems[i] & problems[j]) < 3


def test_every_arm_is_a_valid_configuration_of_equal_rollouts(tmp_path):
    plain = {"plain", "plain-time", "plain-rollouts", "temperature", "mixed-plain", *run.CONTROLS}
    plain -= {"vogue", "saei-kl_cov", "saei-two-updates"}
    for setting, arm, seed in run.jobs(arguments(tmp_path, settings=list(run.SETTINGS))):
        if arm == "before":
            continue
        options = run.run_options(setting, arm, seed, smoke=True, tried={})
        rollouts = 13 if arm == "plain-rollouts" else 8
        assert (options["rollouts"], options["seed"]) == (rollouts, seed)
        assert (options["intervention"] == "none") == (arm in plain)
        if setting == "confirm":
            assert run.CONFIRM.items() <= options.items()
        train_saei.load_config(run.train_arguments(arguments(tmp_path), setting, arm, seed))


def test_the_matched_temperature_must_have_been_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "TEMPERATURES", tmp_path / "temperature.json")
    with pytest.raises(ValueError, match="--temperature"):
        run.run_options("shifted", "temperature", 0, smoke=False, tried={})
    (tmp_path / "temperature.json").write_text('{"shifted": {"temperature": 1.3}}')
    found = run.run_options("shifted", "temperature", 0, smoke=False, tried={})
    assert found["temperature"] == 1.3


def test_the_temperature_of_equal_entropy_is_found_by_bisection(tmp_path, monkeypatch):
    """SaEI's entropy 0.6; plain GRPO's half the temperature, so 1.2 has it."""
    monkeypatch.setattr(
        run,
        "rollout_entropy",
        lambda args, setting, arm, temperature: 0.6 if arm == "saei" else temperature / 2,
    )
    found = run.match_temperature(arguments(tmp_path), "shifted")
    assert found["temperature"] == pytest.approx(1.2, abs=0.005)
    assert found["plain entropy at 1"] == 0.5


# ------------------------------------------------------------------------- results, tables


def test_kinds_of_tokens():
    tokens = "<think|>|red| |3|,| so| 3|+4|.</|think|>| \\|boxed|{|7|}|<'im_end'>".split("|")
    tokens[-1] = "<|im_end|>"
    expected = "frame frame colour frame digit sign words digit sign frame frame frame frame "
    expected += "frame frame answer frame frame"
    assert evaluation.kinds_of(tokens) == expected.split()


def test_curves_are_means_of_neighbouring_steps(tmp_path):
    steps = [{"step": i, "accuracy": i / 100, "seconds/step": 2.0, "lr": 1.0} for i in range(100)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    found = run.training(tmp_path)
    assert set(found["curves"]) == {"step", "accuracy"} and found["steps"] == 100
    assert len(found["curves"]["accuracy"]) == run.POINTS
    assert found["curves"]["accuracy"][:2] == pytest.approx([0.015, 0.055])
    assert found["seconds"] == {"seconds/step": 2.0}
    assert tables.curve_mean(found, "accuracy", 0.8, 1.0) == pytest.approx(0.895, abs=0.001)


def test_a_failed_run_is_recorded_and_shown(tmp_path, monkeypatch):
    """The result holds the error, the tables name it, and the run counts as done."""
    broken = {"intervention": "none", "model": str(tmp_path / "nowhere")}
    monkeypatch.setitem(run.MAIN, "plain", broken)
    run.one_run(arguments(tmp_path, settings=["shifted"]), "shifted", "plain", 0)
    result = json.loads((tmp_path / "results/shifted/plain-0.json").read_text())
    assert result["error"].startswith("RuntimeError: train_saei.py ended with 2: error: ")
    text = tables.everything(tmp_path / "results")
    assert "- shifted, plain, seed 0: " in text and tables.NONE_YET in text


def test_a_run_from_training_to_table(tmp_path):
    args = arguments(tmp_path, sizes={"problems": 4, "samples": 8, "deep": 2, "deep_samples": 32})
    run.one_run(args, "shifted", "saei", 0)
    assert (tmp_path / "runs/shifted/judge").exists()
    assert not (tmp_path / "runs/shifted/saei-0/checkpoints").exists()
    saei = tables.load(tmp_path / "results")["shifted"]["saei"][0]
    assert list(saei["evaluation"])[0] == "shifted/test" and len(saei["evaluation"]) == 5
    assert len(evaluation.unpack(saei["evaluation"]["sums/test"]["right"])) == 4
    assert len(evaluation.unpack(saei["deep"]["right"])) == 2 and len(saei["corrupted"]) == 4
    assert saei["config"]["pgd_steps"] == 3 and saei["config"]["output"] is None
    assert saei["diagnostics"]["judge"]["pictures"] >= 2 and saei["seconds/cpu"] > 0
    kinds = saei["diagnostics"]["tokens"]["kinds"].values()
    assert sum(sum(numbers[:3]) for numbers in kinds) > 100
    text = tables.everything(tmp_path / "results")
    assert "| SaEI | 1 | " in text and "tokens, shifted" in text and "nan" not in text


def test_long_runs_are_evaluated_on_the_way(tmp_path):
    sizes = {"problems": 3, "samples": 8, "deep": 2, "deep_samples": 32}
    for arm in ("plain", "saei"):
        run.one_run(arguments(tmp_path, sizes=sizes), "long", arm, 90)
    runs = tables.load(tmp_path / "results")["long"]
    (first,) = runs["saei"][90]["on the way"].values()  # of step 1; the evaluation is of step 2
    assert 0 < first["seconds/cpu"] < runs["saei"][90]["seconds/cpu"]
    rows = tables.long_table(tmp_path / "results").splitlines()
    # The same steps, then SaEI earlier
    assert [row.split(" | ")[:2] for row in rows[2:5]] == [["| 1", "1"], ["| 2", "2"], ["| 2", "1"]]
    assert tables.each(tmp_path / "results", tables.main_table) == tables.NONE_YET
    assert run.run_options("long", "saei", 90, smoke=False, tried={})["keep_last"] == 0  # all


def test_the_picture_has_a_line_per_arm_and_panel():
    pytest.importorskip("matplotlib")
    from study import curves

    results = {}
    for arm in ("plain", "saei"):
        metric = {"entropy/clean": [0.3, 0.2], "zero_variance": [0.5, 0.4], "step": [0, 1]}
        metric["accuracy" if arm == "plain" else "accuracy/clean"] = [0.1, 0.9]
        rest = {"steps": 2, "seconds/cpu": 90.0}
        other = metric | {"zero_variance": [0.1, 0]}
        results[arm] = {0: rest | {"curves": metric}, 1: rest | {"curves": other}}
    panels = curves.draw(results, ("plain", "saei"), "CPU minutes").axes
    assert [panel.get_title() for panel in panels] == list(curves.PANELS.values())
    assert [len(panel.lines) for panel in panels] == [2, 2, 2]
    assert panels[0].lines[0].get_xdata().tolist() == [0.0, 0.75]
    assert panels[2].lines[0].get_ydata().tolist() == pytest.approx([0.3, 0.2])
    assert panels[0].lines[0].get_ydata().tolist() == [0.1, 0.9]
