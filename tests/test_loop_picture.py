"""study/loop_picture.py draws the responses, numbers and pictures of a run's folder."""

import subprocess

import numpy as np
import pytest
from PIL import Image
from test_report import write_run

pytest.importorskip("matplotlib")
from study import loop_picture


@pytest.fixture
def step(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: write_run(folder, steps=3))
    return loop_picture.real_step(folder)


def test_the_step_is_the_first_whose_clean_responses_differ(step, tmp_path):
    assert step["step"] == 0 and len(step["samples"]) == 8
    assert all(sample["step"] == 0 for sample in step["samples"])
    for name, file in (("clean", "0-clean.png"), ("attacked", "0-adversarial.png")):
        pixels = np.asarray(Image.open(tmp_path / "run/pictures" / file)) / 255
        assert np.array_equal(step[name], pixels)


def test_tokens_frames_rewards_and_pictures_are_the_steps(step):
    (axes,) = loop_picture.draw(step).axes
    texts = [text.get_text() for text in axes.texts]
    tokens = [token for sample in step["samples"] for token in sample["tokens"]]
    shown = ["(end)" if token == "<|im_end|>" else token.replace("\n", " ") for token in tokens]
    drawn = [text.get_text() for text in axes.texts if text.get_fontfamily() == ["monospace"]]
    assert drawn == shown
    for number in range(1, 7):
        assert str(number) in texts
    for sample in step["samples"]:
        assert f"{sample['advantage']:+.2f}" in texts and f"{sample['reward']:.1f}" in texts
    assert any("0.400 to 0.470 nats" in text for text in texts)
    framed = [box for box in axes.patches if box.get_edgecolor()[3] and box.get_height() == 16]
    assert len(framed) == sum(sum(sample["kept"] or []) for sample in step["samples"]) > 0
    difference = np.clip(0.5 + loop_picture.GAIN * (step["attacked"] - step["clean"]), 0, 1)
    images = [image.get_array() for image in axes.images]
    for pixels, expected in zip(images, (step["clean"], difference, step["attacked"]), strict=True):
        assert np.array_equal(pixels, expected)


def test_the_picture_in_docs_is_opaque_and_small():
    file = loop_picture.ROOT / "docs/loop.png"
    pixels = np.asarray(Image.open(file).convert("RGBA"))
    assert (pixels[..., 3] == 255).all() and (pixels[0] == 255).all()
    assert pixels.shape[1] == 1800 and file.stat().st_size < 500_000
