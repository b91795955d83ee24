"""docs/metrics.md: every logged number is on it, and means what it says.

Steps have one prompt, so that samples.jsonl holds all responses and each step's metrics are
computed a second time from them.
"""

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
from benchmarks import tables
from study.evaluation import pack

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/metrics.md").read_text()
TRAINING, EVALUATION = PAGE.split("## Evaluation")
REWARD = (
    "def your_reward(completions, **columns):\n    return [len(x) / 100 for x in completions]\n"
)
LR = 1e-4


def rows_of(part: str) -> dict[str, str]:
    """name -> its row"""
    return {found[1]: found[0] for found in re.finditer(r"^\| `([^`]+)`.*$", part, re.MULTILINE)}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def argv_of(options: dict) -> list[str]:
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """{arm: folder, tracked, steps: [(metrics, samples)]} of a run with every option that logs, and
    of plain GRPO.
    """
    folder, found = tmp_path_factory.mktemp("metrics"), {}
    (folder / "my.py").write_text(REWARD)
    common = {"model": ROOT / "demo/confident", "split": "offset/train", "steps": 10, "lr": LR}
    common |= {"prompts_per_step": 1, "rollouts": 6, "adversarial_rollouts": 3, "pgd_steps": 1}
    common |= {"max_new_tokens": 32, "self_check": False}
    reward = ["accuracy:0.9", "format:0.1", "length_penalty:0.25"]
    everything = {"kl_coef": 0.1, "reward": [*reward, f"{folder}/my.py:your_reward:0.5"]}
    everything["update_control"] = "bonus"
    for arm, changes in {"egas": everything, "none": {"intervention": "none"}}.items():
        tracked, output = {}, folder / arm
        argv = argv_of(common | changes | {"output": output})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Accelerator, "log", lambda self, x, to=tracked, **_: to.update(x))
            train_saei.main(train_saei.load_config(argv))
        metrics, samples = lines_of(output / "metrics.jsonl"), lines_of(output / "samples.jsonl")
        steps = []
        for line in metrics:
            steps.append((line, [s for s in samples if s["step"] == line["step"]]))
        found[arm] = SimpleNamespace(folder=output, tracked=tracked, steps=steps)
    return found


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """-> a split's summary, its records"""
    output = tmp_path_factory.mktemp("evaluation") / "e"
    options = {"model": ROOT / "demo/confident", "output": output, "splits": "shifted/test"}
    options |= {"problems": 6, "max_new_tokens": 28}
    result = evaluation.main(evaluation.load_config(argv_of(options)))
    return result["splits"]["shifted/test"], lines_of(output.with_suffix(".jsonl"))


def mean(samples: list[dict], name: str) -> float:
    return np.mean([sample[name] for sample in samples])


def halves_of(samples: list[dict]) -> tuple[list[dict], list[dict]]:
    """Responses to the clean image, and to the attacked one."""
    clean = [sample for sample in samples if sample["image"] == "clean"]
    return clean, [sample for sample in samples if sample["image"] == "adversarial"]


# -------------------------------------------------------------------------- names, definitions


def test_the_page_and_the_runs_have_the_same_names(logged, evaluated):
    names = {arm: set(run.steps[0][0]) for arm, run in logged.items()}
    of_engines = {"engine/ratio", "engine/ratio_max", "engine/cut"}  # tests/engine/test_runs.py
    assert set(rows_of(TRAINING)) == names["egas"] | of_engines
    assert set(rows_of(EVALUATION)) == set(evaluated[0])
    marked = {name for name, row in rows_of(TRAINING).items() if row.startswith(f"| `{name}` † |")}
    optional = {"kl", "length_penalty", "your_reward"}
    optional |= {"control/loss", "control/tokens", "control/bonus"}
    assert names["egas"] - names["none"] == marked | optional
    for arm, run in logged.items():
        assert set(run.tracked) == names[arm] - {"step"}
    # none is defined twice
    rows = re.findall(r"^\| `.*`", PAGE, re.MULTILINE)
    assert len(rows) == len(rows_of(TRAINING)) + len(rows_of(EVALUATION))


@pytest.mark.parametrize("arm", ["egas", "none"])
def test_rewards_and_responses_are_what_the_page_says(logged, arm):
    kinds, truncated = set(), []
    names = ["reward", "accuracy", "format"]
    names += ["length_penalty", "your_reward"] if arm == "egas" else []
    for m, samples in logged[arm].steps:
        clean, adversarial = halves_of(samples)
        assert len(clean) == (3 if arm == "egas" else 6) and len(samples) == 6
        for name in names:
            assert m[name] == pytest.approx(mean(samples, name), abs=1e-6), name
        assert m["zero_variance"] == (len({sample["accuracy"] for sample in samples}) == 1)
        texts = {sample["response"] for sample in samples}
        assert m["distinct"] == pytest.approx(len(texts) / 6)
        assert m["length"] == pytest.approx(np.mean([len(s["tokens"]) for s in samples]))
        truncated.append(np.mean([s["tokens"][-1] != "<|im_end|>" for s in samples]))
        assert m["truncated"] == pytest.approx(truncated[-1])
        if arm == "none":
            continue
        for half, part in (("clean", clean), ("adversarial", adversarial)):
            for name in ("reward", "accuracy"):
                assert m[f"{name}/{half}"] == pytest.approx(mean(part, name), abs=1e-6)
        old, new = (any(s["accuracy"] == 1 for s in part) for part in (clean, adversarial))
        assert (m["rescued"], m["lost"]) == (new and not old, old and not new)
        kinds.add((old, new))
        parts = 0.9 * m["accuracy"] + 0.1 * m["format"] + 0.25 * m["length_penalty"]
        assert m["reward"] == pytest.approx(parts + 0.5 * m["your_reward"], abs=1e-6)
    assert 0 < np.mean(truncated) < 1
    assert len(kinds) == 4 or arm == "none"  # or a wrong rule would pass


@pytest.mark.parametrize("arm", ["egas", "none"])
def test_entropies_and_tsec_are_what_the_page_says(logged, arm):
    for m, samples in logged[arm].steps:
        clean, adversarial = halves_of(samples)
        expected = {"entropy/clean": [np.mean(s["entropy"]) for s in clean]}
        kept = [np.array(s["entropy"])[s["kept"]] for s in clean]
        expected["entropy/selected"] = [x.mean() if len(x) else 0.0 for x in kept]
        expected["tsec/kept"] = [np.mean(s["kept"]) for s in clean]
        expected["tsec/low"] = [np.quantile(s["entropy"], 0.2) for s in clean]
        expected["tsec/high"] = [np.quantile(s["entropy"], 0.8) for s in clean]
        if arm == "egas":
            expected["entropy/adversarial"] = [np.mean(s["entropy"]) for s in adversarial]
        for name, values in expected.items():  # samples have four decimals
            assert m[name] == pytest.approx(np.mean(values), abs=1e-4), name
    if arm == "egas":
        m, _ = logged[arm].steps[0]
        assert m["entropy/attacked"] > m["entropy/selected"] + 0.01
        assert not any("entropy/attacked" in m for m, _ in logged[arm].steps[1:])  # of 10


def test_the_attacks_size_is_what_the_page_says(logged):
    run = logged["egas"]
    for m, samples in run.steps:
        clean, attacked = (
            np.asarray(Image.open(run.folder / samples[-1][name]), np.float64) / 255
            for name in ("clean_picture", "picture")
        )
        # files have 8 bits, as the demo's images and the change of 2/255
        assert m["attack/linf"] == pytest.approx(np.abs(attacked - clean).max(), abs=1e-6)
        decibels = 10 * np.log10(1 / np.mean((attacked - clean) ** 2))
        assert m["attack/psnr"] == pytest.approx(decibels, abs=1e-3)


def test_the_updates_numbers_are_what_the_page_says(logged):
    for m, samples in logged["none"].steps:
        rewards = np.array([sample["reward"] for sample in samples])
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        advantages = [sample["advantage"] for sample in samples]
        assert advantages == pytest.approx(expected, abs=1e-4)
        lengths = np.array([len(sample["tokens"]) for sample in samples])
        assert m["loss"] == pytest.approx(-(expected @ lengths) / lengths.sum(), abs=1e-5)
        assert m["clip/low"] == m["clip/high"] == 0
    assert max(abs(m["loss"]) for m, _ in logged["none"].steps) > 1e-3
    for run in logged.values():
        for i, (m, _) in enumerate(run.steps):
            assert m["lr"] == LR and m["step"] == i
            seconds = {name: value for name, value in m.items() if name.startswith("seconds/")}
            assert seconds.pop("seconds/step") == pytest.approx(sum(seconds.values()), abs=1e-4)
    kl = [m["kl"] for m, _ in logged["egas"].steps]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 0


def test_the_evaluations_numbers_are_what_the_page_says(evaluated):
    summary, records = evaluated
    right = np.array([record["right"] for record in records])  # (problems, samples)
    assert summary["n"] == len(records) == 6
    expected = {"greedy": mean(records, "greedy_right"), "pass@1": right.mean()}
    expected["pass@8"] = right.any(axis=1).mean()  # n = k = 8
    for name in ("entropy", "truncated"):
        expected[name] = mean(records, name)
    for name, value in expected.items():
        assert summary[name][0] == pytest.approx(value), name
        assert summary[name][1] <= value <= summary[name][2]
    assert 0 < expected["truncated"] < 1


# ---------------------------------------------------------------------------------- the ranges


def test_ranges_are_those_of_the_results():
    assert tables.with_ranges(PAGE, ROOT / "study/results") == PAGE, "python -m benchmarks.tables"


def study_file(folder: Path, arm: str, seed: int, curves: dict, right: list[int], **more) -> None:
    part = {"samples": 8, "right": pack(right), "greedy": 0.5, "entropy": 0.25, "truncated": 0.0}
    run = {"arm": arm, "seed": seed, "steps": 10, "curves": curves}
    run |= {"seconds": {"seconds/step": 2.0 + seed}, "evaluation": {"shifted/test": part}}
    (folder / "paid").mkdir(exist_ok=True)
    (folder / "paid" / f"{arm}-{seed}.json").write_text(json.dumps(run | more))


def test_ranges_from_files_made_by_hand(tmp_path):
    rising, steady = [i / 10 for i in range(10)], [0.5, 0.52] * 5
    curves = {"reward": rising, "accuracy": steady, "rescued": [0.1] * 10}
    study_file(tmp_path, "saei", 1, curves, [8, 0])
    study_file(tmp_path, "saei", 0, curves, [8, 4])
    study_file(tmp_path, "plain", 0, {"reward": rising[::-1], "accuracy": steady}, [2, 2])
    study_file(tmp_path, "plain", 1, {}, [2, 2], error="it broke")
    study_file(tmp_path, "before", 80, {}, [0, 0])
    page = tables.with_ranges(PAGE, tmp_path)
    training, evaluation = (rows_of(part) for part in page.split("## Evaluation"))
    saei, plain = "SaEI 0.05 → 0.85 (0 to 0.9)", "plain GRPO 0.85 → 0.05 (0.045 to 0.855)"
    for rows, name, cell in (
        (training, "reward", f"{saei}<br>{plain}"),
        (training, "accuracy", "SaEI 0.51 (0.5 to 0.52)<br>plain GRPO 0.51 (0.5 to 0.52)"),
        (training, "rescued", "SaEI 0.1"),
        (training, "seconds/step", "SaEI 2.5 (2.05 to 2.95)<br>plain GRPO 2"),
        (training, "kl", "-"),
        (
            evaluation,
            "pass@1",
            "SaEI 0 → 0.625 (0.5 to 0.75)<br>plain GRPO 0 → 0.25 (0.25 to 0.25)",
        ),
        (evaluation, "n", "-"),
    ):
        assert rows[name].split("|")[4].strip() == cell, name
    assert "SaEI, seeds 0, 1: 10 steps, kept as 10 means; plain GRPO, seeds 0: 10 steps" in page
    # nothing else changes
    other = page.replace(tables.metric_note(tmp_path), tables.metric_note(ROOT / "study/results"))
    for old, new in zip(PAGE.split("\n"), other.split("\n"), strict=True):
        cells = [line.split("|") for line in (old, new)]
        assert [c[:4] + c[5:] for c in cells[:1]] == [c[:4] + c[5:] for c in cells[1:]]
