"""examples/: the attack on one picture stays in its budget, raises the kept entropy, and draws what it says."""

import re

import numpy as np
import pytest
from PIL import Image

from examples import attack_one_image


def test_attack_one_image(tmp_path, capsys):
    eps, path = 0.001, tmp_path / "attack.png"
    clean, attacked, before, after = attack_one_image.main(["--eps", str(eps), "--output", str(path)])
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
    found = re.search(r"kept tokens, nats: clean (\S+), attacked (\S+), random signs of that size (\S+)", printed)
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
