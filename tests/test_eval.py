"""eval.py: the estimators against enumeration, intervals against theory, processes, files."""

import itertools
import json

import numpy as np
import pytest
from conftest import finish, lines_of, start

import rewards
from eval import bootstrap_interval, evaluate_rows, load_config, main, pass_at_k
from vlm.engine import OwnSampler
from vlm.policy import Policy


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


@pytest.mark.parametrize(
    "options, said",
    [
        ({"output": None}, "--output is required"),
        ({"model": None}, "--model is required"),
        ({"samples": 4, "k": [8]}, "1 <= k <= samples=4, got k=8"),
        ({"k": [0]}, "1 <= k <= samples=8, got k=0"),
        ({"temperature": 0.0}, "temperature=0.0: it must be above 0"),
        ({"problems": 0}, "problems=0: it must be at least 1"),
        ({"seed": -1}, "seed=-1: it must be at least 0"),
        ({"dataset": "rows.jsonl", "streaming": True}, "must satisfy --problems N if streaming"),
    ],
)
def test_bad_settings_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        load_config(**{"model": "m", "output": "o"} | options)


def test_k_follows_the_samples():
    for samples, k in ((8, [1, 8]), (4, [1, 4]), (1, [1])):
        assert load_config(model="m", output="o", samples=samples).eval.k == k


def test_an_output_that_ends_with_a_slash_is_named_after_its_folder():
    """The result is x.json: not x/.json, whose folder is missing when all answers are there."""
    assert load_config(model="m", output="out/x/").eval.output == "out/x"


def test_a_result_is_replaced_only_if_asked(tiny, tmp_path, monkeypatch):
    """Refused before the model is loaded. The folder is made then, too."""
    output = tmp_path / "new/one"
    options = dict(model=tiny, output=str(output), problems=2, samples=1, max_new_tokens=2)
    main(load_config(**options))
    before = output.with_suffix(".json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "from_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ValueError, match="one.json is there already: --overwrite replaces it"):
            main(load_config(**options))
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            main(load_config(**options | {"output": f"{tmp_path}/file/x"}))
    assert output.with_suffix(".json").read_text() == before
    main(load_config(**options, seed=1, overwrite=True))
    assert json.loads(output.with_suffix(".json").read_text())["seed"] == 1


def test_a_truncated_answer_is_told_to_the_grader(policy, rows, monkeypatch):
    seen = []

    def listen(completions, truncated, **_):
        seen.append(truncated)
        return [0.0] * len(completions)

    monkeypatch.setattr(rewards, "accuracy_reward", listen)
    cfg = load_config(model="m", output="o", samples=2, max_new_tokens=3).eval
    records = evaluate_rows(OwnSampler(policy), rows[:2], [5, 6], cfg)
    policy.eos_ids = list(range(400))  # every token ends a response
    evaluate_rows(OwnSampler(policy), rows[:2], [5, 6], cfg)
    assert seen == [[True] * 3] * 2 + [[False] * 3] * 2
    assert [record["truncated"] for record in records] == [1.0, 1.0]


def test_splits_and_problems_depend_on_the_data():
    demo = load_config(model="m", output="o").eval
    other = load_config(model="m", output="o", dataset="rows.jsonl").eval
    assert (demo.splits, demo.problems) == (["plain/test"], 1000)
    assert (other.splits, other.problems) == (["test"], None)


def test_unknown_split_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match="unknown split 'nowhere/test'"):
        main(load_config(model=tiny, output=str(tmp_path / "x"), splits=["nowhere/test"]))


def test_a_column_called_split_does_not_hide_the_split(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "1 + 1?", "answer": "2", "split": "x"}) + "\n")
    options = dict(dataset=str(rows), splits=["train"], columns=["image=none"])
    options |= dict(samples=2, k=[1], max_new_tokens=4, model=tiny, output=str(tmp_path / "one"))
    main(load_config(**options))
    assert lines_of(tmp_path / "one.jsonl")[0]["split"] == "train"


def test_files_and_the_share_of_each_process(tiny, tmp_path):
    """7 problems on 2 processes: each once, in order, the same numbers as on one."""
    options = ["--model", tiny, "--problems", "7", "--samples", "4", "--k", "1", "4"]
    options += ["--max_new_tokens", "8", "--batch", "3"]
    finish(start(2, main, load_config([*options, "--output", str(tmp_path / "two")])))
    result = main(load_config([*options, "--output", str(tmp_path / "one")]))
    one, two = (lines_of(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    entropies = [record["entropy"] for record in one]
    for record, other in zip(one, two, strict=True):  # other batches, other rounding
        assert record.pop("entropy") == pytest.approx(other.pop("entropy"), rel=1e-5)
        assert record == other
    assert [record["row"] for record in one] == list(range(7))
    assert all(len(record["responses"]) == len(record["right"]) == 4 for record in one)
    written = json.loads((tmp_path / "one.json").read_text())
    assert written == result and written["splits"]["plain/test"]["n"] == 7
    mean, low, high = written["splits"]["plain/test"]["entropy"]
    assert low <= mean <= high and mean == pytest.approx(np.mean(entropies))


def test_a_prompt_is_read_once(policy, rows, monkeypatch):
    """Greedy and sampled answers share the prompt pass, and are those of two passes."""
    cfg = load_config(model="m", output="o", samples=2, k=[1], max_new_tokens=6).eval
    seeds, calls, read = [5, 6, 7, 8], [], Policy.read

    def listen(self, prompts):
        calls.append(len(prompts))
        return read(self, prompts)

    monkeypatch.setattr(Policy, "read", listen)
    records = evaluate_rows(OwnSampler(policy), rows, seeds, cfg)
    assert calls == [4]
    prompts = policy.encode([row["problem"] for row in rows], [row["images"] for row in rows])
    greedy = policy.decode(policy.sample(prompts, 1, seeds, 6, temperature=0.0))
    sampled = policy.decode(policy.sample(prompts, 2, seeds, 6))
    assert [record["greedy"] for record in records] == greedy
    assert sum((record["responses"] for record in records), []) == sampled


def test_cut_responses_are_counted_and_said(tiny, tmp_path, capsys):
    options = dict(model=tiny, output=str(tmp_path / "e"), problems=4, samples=2, k=[1])
    result = main(load_config(**options, max_new_tokens=1))
    assert result["splits"]["plain/test"]["truncated"][0] > 0.9
    assert "100% ran into --max_new_tokens 1: raise it" in capsys.readouterr().out
    assert all(0 <= record["truncated"] <= 1 for record in lines_of(tmp_path / "e.jsonl"))
