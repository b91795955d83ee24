"""benchmarks/models.py: as many parameters as the released weights have, and their image tokens."""

import pytest
from PIL import Image

from benchmarks import models
from vlm.policy import Policy


@pytest.mark.parametrize("name", models.MODELS)
def test_a_released_models_parameters_and_image_tokens(name, tmp_path):
    side = models.write(name, tmp_path)
    policy = Policy.from_pretrained(str(tmp_path), weights=False)
    assert sum(p.numel() for p in policy.parameters()) == models.MODELS[name].parameters
    picture = Image.new("RGB", (8 * side, 8 * side))
    prompt = policy.tokenize("How many?", [picture])
    assert prompt.images[0].shape == (3, 8 * side, 8 * side)
    assert int((prompt.inputs["input_ids"] == policy.model.config.image_token_id).sum()) == 64
