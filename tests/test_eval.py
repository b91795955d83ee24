"""eval.py: the estimators against enumeration, intervals against theory, the split of the work, the files."""

import itertools
import json

import numpy as np
import pytest
from conftest import launch

from eval import EvalConfig, bootstrap_interval, main, pass_at_k


@pytest.mark.parametrize(
    "n, c, k", [(5, 0, 2), (5, 2, 1), (5, 2, 3), (6, 3, 4), (8, 8, 8), (8, 1, 8), (7, 6, 2)]
)
def test_pass_at_k_counts_the_subsets(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_unbiased():
    """The mean over draws of n = 8 equals 1 - (1 - p)^k."""
    right = np.random.default_rng(0).binomial(8, 0.3, 20_000)
    estimate = np.mean([pass_at_k(8, int(c), 4) for c in right])
    assert estimate == pytest.approx(1 - 0.7**4, abs=0.01)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_nonsense(n, c, k):
    with pytest.raises(ValueError, match=f"got n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_bootstrap_interval_matches_the_normal_one():
    values = (np.random.default_rng(1).random(1000) < 0.3).astype(float)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(1000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.004)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(np.ones(10)) == (1.0, 1.0)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="every k must be between 1 and samples=4, got \\[1, 8\\]"):
        EvalConfig(model="m", output="o", samples=4)
    with pytest.raises(ValueError, match="greedy decoding is measured anyway"):
        EvalConfig(model="m", output="o", temperature=0.0)
    for name, value in (
        ("problems", 0),
        ("problems", -3),
        ("batch", 0),
        ("max_new_tokens", 0),
        ("seed", -1),
    ):
        with pytest.raises(
            ValueError,
            match="batch, max_new_tokens and problems must be at least 1, seed 0 or more",
        ):
            EvalConfig(model="m", output="o", **{name: value})


def test_unknown_split_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match="unknown split 'nowhere/test'"):
        main(EvalConfig(model=tiny, output=str(tmp_path / "x"), splits=["nowhere/test"]))


def test_a_column_called_split_does_not_hide_the_split(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "1 + 1?", "answer": "2", "split": "x"}) + "\n")
    options = dict(
        dataset=str(rows), splits=["train"], image_column="none", samples=2, k=[1], max_new_tokens=4
    )
    main(EvalConfig(model=tiny, output=str(tmp_path / "one"), **options))
    assert json.loads((tmp_path / "one.jsonl").read_text())["split"] == "train"


def test_files_and_split_of_the_work(tiny, tmp_path):
    """7 problems on 2 processes: each once, in order, the same numbers as on one."""
    options = [
        "--model",
        tiny,
        "--splits",
        "plain/test",
        "--problems",
        "7",
        "--samples",
        "4",
        "--k",
        "1",
        "4",
    ]
    options += ["--max_new_tokens", "8", "--batch", "3"]
    launch(2, "eval.py", *options, "--output", str(tmp_path / "two"))
    cfg = EvalConfig(
        model=tiny,
        output=str(tmp_path / "one"),
        problems=7,
        samples=4,
        k=[1, 4],
        max_new_tokens=8,
        batch=3,
    )
    result = main(cfg)

    records = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    for record, other in zip(
        records, map(json.loads, (tmp_path / "two.jsonl").read_text().splitlines()), strict=True
    ):
        assert record.pop("entropy") == pytest.approx(
            other.pop("entropy"), rel=1e-5
        )  # other batches, other rounding
        assert record == other
    records = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert [record["row"] for record in records] == list(range(7))
    assert all(len(record["responses"]) == len(record["right"]) == 4 for record in records)
    written = json.loads((tmp_path / "one.json").read_text())
    assert written == result and written["splits"]["plain/test"]["n"] == 7
    mean, low, high = written["splits"]["plain/test"]["entropy"]
    assert low <= mean <= high and mean == pytest.approx(
        np.mean([record["entropy"] for record in records])
    )


def test_cut_responses_are_counted_and_said(tiny, tmp_path, capsys):
    common = {"model": tiny, "output": str(tmp_path / "e"), "problems": 4, "samples": 2, "k": [1]}
    result = main(EvalConfig(**common, max_new_tokens=1))
    assert result["splits"]["plain/test"]["truncated"][0] > 0.9
    assert "ran into --max_new_tokens 1: raise it" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert all(0 <= record["truncated"] <= 1 for record in records)
