"""benchmarks/models.py: as many parameters as the released weights have, and their image tokens."""

import pytest
from PIL import Image

from benchmarks import models
from vlm.policy import Policy

PARAMETERS = {  # of the released weights
    "3B": 3_754_622_976,
    "7B": 8_292_166_656,
    "Qwen3-VL-4B": 4_437_815_808,
    "Qwen3.5-4B": 4_539_265_536,
    "SmolVLM-256M": 256_484_928,
}


@pytest.mark.parametrize("name", models.MODELS)
def test_a_released_models_parameters_and_image_tokens(name, tmp_path):
    side = models.write(name, tmp_path)
    policy = Policy.from_pretrained(str(tmp_path), weights=False)
    assert sum(p.numel() for p in policy.parameters()) == PARAMETERS[name]
    picture = Image.new("RGB", (8 * side, 8 * side))
    prompt = policy.tokenize("How many?", [picture])
    assert prompt.images[0].shape == (3, 8 * side, 8 * side)
    assert int((prompt.inputs["input_ids"] == policy.model.config.image_token_id).sum()) == 64
