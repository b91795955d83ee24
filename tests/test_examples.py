"""extras/: the attack on one picture stays in its budget, raises the kept entropy, and draws what it says."""

import json
import re

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import train_saei
from extras import attack_one_image, curriculum
from runtime import data


def test_attack_one_image(tmp_path, capsys):
    eps, path = 0.001, tmp_path / "attack.png"
    clean, attacked, before, after = attack_one_image.main(
        ["--eps", str(eps), "--output", str(path)]
    )
    difference = attacked - clean
    assert 0.5 * eps < difference.abs().max() <= eps + 1e-6
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert before > 0 and after > 0  # of one picture's few fresh responses, too noisy to compare
    drawn = np.asarray(Image.open(path)).transpose(2, 0, 1) / 255
    thirds = np.split(drawn, 3, axis=2)
    expected = clean, attacked, 0.5 + difference / (2 * eps)
    for third, image in zip(thirds, expected, strict=True):
        assert np.abs(third - image.numpy()).max() <= 0.5 / 255 + 1e-5
    printed = capsys.readouterr().out
    found = re.search(
        r"kept tokens, nats: clean (\S+), attacked (\S+), random signs of that size (\S+)", printed
    )
    start, end, signs = map(float, found.groups())
    assert end > start and end > signs
    clean_part, attacked_part = printed.split("attacked image, fresh responses")
    assert "*" in clean_part and "*" not in attacked_part


def test_a_users_picture_comes_with_its_question(tmp_path, capsys):
    path = tmp_path / "grey.png"
    Image.new("RGB", (56, 84), (128, 128, 128)).save(path)
    with pytest.raises(SystemExit):
        attack_one_image.main(["--image", str(path)])
    assert "give both" in capsys.readouterr().err
    out = tmp_path / "attack.png"
    clean, _, _, _ = attack_one_image.main(
        ["--image", str(path), "--question", "How many?", "--rollouts", "2", "--output", str(out)]
    )
    assert (clean == 128 / 255).all() and Image.open(out).width == 3 * clean.shape[2]


def test_eps_in_levels_is_refused(capsys):
    with pytest.raises(SystemExit):
        attack_one_image.main(["--eps", "8"])
    assert "0.0314, not 8" in capsys.readouterr().err


def test_a_curriculum_from_sampled_answers_to_training(tmp_path, monkeypatch):
    model, rows = "demo/confident", 6
    common = dict(
        model=model,
        output=str(tmp_path / "train"),
        splits=["shifted/train"],
        problems=rows,
        samples=4,
        k=[1],
    )
    evaluation.main(evaluation.EvalConfig(**common, max_new_tokens=40))
    entropies = curriculum.main(
        [str(tmp_path / "train.jsonl"), str(tmp_path / "order.json"), "--stages", "3"]
    )
    order = json.loads((tmp_path / "order.json").read_text())
    assert sorted(order) == list(range(rows)) and len(set(entropies)) > 1
    assert [entropies[i] for i in order] == sorted(entropies)
    cfg = dict(
        model=model,
        split="shifted/train",
        order=str(tmp_path / "order.json"),
        output=str(tmp_path / "run"),
    )
    cfg |= dict(
        steps=2,
        prompts_per_step=4,
        rollouts=2,
        adversarial_rollouts=1,
        max_new_tokens=4,
        self_check=False,
    )
    train_saei.main(train_saei.Config(**cfg, pgd_steps=1, log_prompts=4))
    lines = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    seen = {(line["step"], line["prompt"]): line["row"] for line in lines}
    assert [seen[key] for key in sorted(seen)] == [*order, *order][:8]  # round again after the last
    (tmp_path / "order.json").write_text("[0, 2000000]")
    train_saei.given_order.cache_clear()
    with pytest.raises(ValueError, match="row numbers from 0 to"):
        train_saei.main(train_saei.Config(**cfg | {"output": str(tmp_path / "other")}))


def test_answers_are_the_same_as_the_reward_judges():
    assert (
        curriculum.same("1/2", "0.5")
        and not curriculum.same("1/2", "2")
        and curriculum.same("\\oops{", "\\oops{")
    )
    assert not curriculum.same("1", "")  # an empty gold answer cannot be graded


def test_an_order_that_counts_rows_left_out_is_refused(tmp_path):
    """eval.py counts every row, training leaves out long prompts: the numbers would name other rows."""
    rows = data.Rows(lambda i: {"row": i}, [0, 2, 3])
    path = tmp_path / "order.json"
    path.write_text("[2, 0]")
    with pytest.raises(ValueError, match="of which 1 are left out here"):
        train_saei.check_order(str(path), rows)
    train_saei.given_order.cache_clear()
    train_saei.check_order(str(path), data.Rows(rows.make, [0, 1, 2]))
