"""extras/attack_one_image.py and extras/curriculum.py."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import rewards
import train_saei
from extras import attack_one_image
from extras.curriculum import curriculum, main, same, semantic_entropy
from runtime import data

# ------------------------------------------------------------------------------ attack_one_image


def test_attack_stays_in_its_ball_raises_the_entropy_and_is_drawn(tmp_path, capsys):
    eps, path = 0.001, tmp_path / "attack.png"
    options = ["--eps", str(eps), "--output", str(path), "--rollouts", "2"]
    clean, attacked, before, after = attack_one_image.main(options)
    difference = attacked - clean
    assert 0.5 * eps < difference.abs().max() <= eps + 1e-6
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert before > 0 and after > 0  # of a few responses each, too noisy to compare
    drawn = np.asarray(Image.open(path)).transpose(2, 0, 1) / 255
    expected = np.concatenate([clean, attacked, 0.5 + difference / (2 * eps)], axis=2)
    assert np.abs(drawn - expected).max() <= 0.5 / 255 + 1e-5
    printed = capsys.readouterr().out
    line = r"attacked tokens, nats: clean (\S+), attacked (\S+), random signs (\S+)"
    start, end, signs = map(float, re.search(line, printed).groups())
    assert end > start and end > signs
    on_clean, on_attacked = printed.split("attacked image, adversarial responses")
    assert "*" in on_clean and "*" not in on_attacked


def test_a_users_picture_keeps_its_size(tmp_path):
    path, output = tmp_path / "grey.png", tmp_path / "attack.png"
    Image.new("RGB", (56, 84), (128, 128, 128)).save(path)
    options = ["--image", str(path), "--question", "How many?", "--output", str(output)]
    clean, *_ = attack_one_image.main([*options, "--rollouts", "1", "--pgd_steps", "1"])
    assert (clean == 128 / 255).all() and Image.open(output).width == 3 * clean.shape[2]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image", "grey.png"], "give both"),
        (["--question", "How many?"], "give both"),
        (["--eps", "8"], "0.0314, not 8"),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        attack_one_image.main(options)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------ curriculum


def entropy_of(*shares: float) -> float:
    return -sum(share * math.log(share) for share in shares)


@pytest.mark.parametrize(
    "answers, expected",
    [
        (["4"] * 8, 0.0),
        (list("abcd"), math.log(4)),
        (["a", "b", "a", "a"], entropy_of(0.75, 0.25)),
        ([None, "a", None, "a"], math.log(2)),  # no answer: one cluster
    ],
)
def test_semantic_entropy_by_hand(answers, expected):
    assert semantic_entropy(answers) == pytest.approx(expected)
    assert str(semantic_entropy(["4"] * 8)) == "0.0"  # not -0.0


def test_semantic_entropy_needs_answers():
    with pytest.raises(ValueError, match="no answers"):
        semantic_entropy([])


def test_semantic_entropy_with_the_rewards_grader():
    answers = ["0.5", "1/2", r"\frac{1}{2}", None, "3"]
    assert semantic_entropy(answers, rewards.grade) == pytest.approx(entropy_of(0.6, 0.2, 0.2))
    assert semantic_entropy(answers) == pytest.approx(math.log(5))


@pytest.mark.parametrize(
    "a, b, equal",
    [
        ("1/2", "0.5", True),
        ("1/2", "2", False),
        ("\\oops{", "\\oops{", True),
        ("1", "", False),  # an empty gold answer cannot be graded
    ],
)
def test_answers_are_the_same_as_the_reward_judges(a, b, equal):
    assert same(a, b) == equal


def test_curriculum_goes_from_low_to_high_in_equal_stages():
    entropies = [0.7, 0.0, 1.4, 0.7, 0.2]
    assert curriculum(entropies) == [[1, 4, 0], [3, 2]]
    assert curriculum(entropies, 1) == [[1, 4, 0, 3, 2]]
    assert curriculum(entropies, 5) == [[1], [4], [0], [3], [2]]
    with pytest.raises(ValueError, match=r"from 1 to the number of rows \(5\), got 6"):
        curriculum(entropies, 6)


def test_from_sampled_answers_to_an_order_to_training(tmp_path, tiny):
    """eval.py, curriculum.py, train_saei.py --order: each step takes the next rows, round again."""
    output, order_file, run = tmp_path / "train", tmp_path / "order.json", tmp_path / "run"
    options = dict(splits=["shifted/train"], problems=6, samples=4, k=[1], max_new_tokens=40)
    evaluation.main(evaluation.load_config(model="demo/confident", output=str(output), **options))
    entropies = main([f"{output}.jsonl", str(order_file), "--stages", "3"])
    order = json.loads(order_file.read_text())
    assert sorted(order) == list(range(6)) and len(set(entropies)) > 1
    assert [entropies[i] for i in order] == sorted(entropies)
    main([f"{output}.jsonl", str(tmp_path / "shuffled.json"), "--stages", "1", "--shuffle_stages"])
    shuffled = json.loads((tmp_path / "shuffled.json").read_text())
    assert shuffled != order and sorted(shuffled) == sorted(order)

    options = dict(model=tiny, split="shifted/train", order=str(order_file), output=str(run))
    options |= dict(steps=8, prompts_per_step=1, rollouts=2, adversarial_rollouts=1, pgd_steps=1)
    options |= dict(max_new_tokens=4, self_check=False)
    train_saei.main(train_saei.load_config(**options))
    samples = map(json.loads, (run / "samples.jsonl").read_text().splitlines())
    row_of_step = {sample["step"]: sample["row"] for sample in samples}
    assert list(row_of_step.values()) == [*order, *order][:8]
    order_file.write_text("[0, 2000000]")
    with pytest.raises(ValueError, match="row numbers from 0 to"):
        train_saei.main(train_saei.load_config(**options | {"output": str(tmp_path / "other")}))


def test_records_of_two_splits_are_refused(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    path.write_text('{"split": "plain/test"}\n{"split": "plain/train"}\n')
    with pytest.raises(SystemExit):
        main([str(path), str(tmp_path / "order.json")])
    assert "must be of one split" in capsys.readouterr().err


def test_an_order_that_counts_rows_left_out_is_refused(tmp_path):
    """eval.py counts every row. Training leaves out long prompts, so numbers would shift."""
    rows = data.Rows(lambda i: {"row": i}, [0, 2, 3])
    path = tmp_path / "order.json"
    path.write_text("[2, 0]")
    with pytest.raises(ValueError, match="of which 1 are left out here"):
        data.load_order(str(path), rows)
    assert data.load_order(str(path), data.Rows(rows.make, [0, 1, 2])) == [2, 0]
