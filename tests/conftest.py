"""A tiny random Qwen2.5-VL of the demo's architecture, in double precision where a test compares to rounding."""

import pytest
import torch

from demo.make_demo import build_model, build_processor
from demo.task import make_row
from policy import Policy

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processor():
    return build_processor()


@pytest.fixture(scope="session")
def tiny(processor, tmp_path_factory):
    """Its folder, as `--model` takes it."""
    folder = tmp_path_factory.mktemp("tiny")
    model = build_model(processor.tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def policy(tiny):
    return Policy.from_pretrained(tiny)


@pytest.fixture(scope="session")
def rows():
    return [make_row("plain/train", i) for i in range(4)]
