"""study/loop_picture.py draws what the policy said, and the pictures that it saw, pixel for pixel."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import egas
import rewards

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """-> what the script found, the file that it wrote, all texts in it"""
    path, texts, real = (
        tmp_path_factory.mktemp("picture") / "loop.png",
        [],
        ImageDraw.ImageDraw.text,
    )
    with pytest.MonkeyPatch.context() as patch:
        from study import loop_picture

        def text(self, xy, words, *args, **kwargs):
            texts.append(words)
            real(self, xy, words, *args, **kwargs)

        patch.setattr(ImageDraw.ImageDraw, "text", text)
        found = loop_picture.main(["--output", str(path)])
    return found, path, texts


def test_the_responses_in_it_are_real(drawn):
    found, _, texts = drawn
    cfg, row = found["cfg"], found["row"]
    responses = [
        "".join(token for token, *_ in line).removesuffix("(end)") for line in found["lines"]
    ]
    assert len(responses) == cfg.rollouts and len(set(responses)) > 2
    scores = rewards.total_reward(responses, answer=[row["answer"]] * len(responses))
    assert scores["reward"] == pytest.approx(found["rewards"])
    assert 0 < sum(scores["accuracy"]) < len(responses)
    written = "".join(texts)
    assert all(response in written for response in responses)
    assert all(f"{a:+.2f}" in texts for a in found["advantages"]) and sum(
        found["advantages"]
    ) == pytest.approx(0, abs=1e-4)
    before, after = found["entropy"]
    assert after > before and {f"{before:.3f} nats", f"{after:.3f} nats"} <= set(texts)
    assert all(str(number) in texts for number in range(1, 7))  # the six steps
    framed = [[kept for *_, kept in line] for line in found["lines"]]
    assert all(map(any, framed[: cfg.clean_rollouts])) and not any(
        map(any, framed[cfg.clean_rollouts :])
    )


def test_the_pictures_in_it_are_the_clean_and_the_attacked_one(drawn):
    found, path, _ = drawn
    assert 50_000 < path.stat().st_size < 350_000
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[2] == 3 and (sheet[0] == 255).all()  # opaque and white, on a dark page too
    for top, name in ((140, "clean"), (860, "attacked")):
        pixels = sheet[top : top + 384 : 4, 92 : 92 + 384 : 4].transpose(2, 0, 1) / 255
        assert np.abs(pixels - found[name].numpy()).max() < 1 / 255, name
    assert egas.psnr(found["attacked"], found["clean"]) < 50


def test_the_readmes_picture_is_what_the_script_draws(drawn):
    old, new = (
        np.asarray(Image.open(path).convert("RGB"), np.float64)
        for path in (ROOT / "docs/loop.png", drawn[1])
    )
    assert old.shape == new.shape and np.abs(old - new).mean() < 1, (
        "run python -m study.loop_picture"
    )
