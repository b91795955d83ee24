"""vLLM in the environment that `bash run.sh engine` makes, the demo's model, nothing mocked."""

import os
from pathlib import Path

import pytest
import torch

from demo.task import make_row
from vlm import engine
from vlm.engine import Engine
from vlm.policy import Policy, Prompts

MODEL = "demo/confident"
P = 16


def pytest_collection_modifyitems(items):
    if os.environ.get("SAEI_ENGINE_TESTS") != "1" or not engine.PYTHON.exists():
        skip = pytest.mark.skip(reason="needs vLLM: `bash run.sh engine` runs these tests")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def seeds() -> list[int]:
    return [11 * i for i in range(P)]


def encode(policy: Policy, split: str = "shifted/train") -> Prompts:
    rows = [make_row(split, i) for i in range(P)]
    return policy.encode([row["problem"] for row in rows], [row["images"] for row in rows])


@pytest.fixture(scope="session")
def policy() -> Policy:
    return Policy.from_pretrained(MODEL)


@pytest.fixture(scope="session")
def prompts(policy) -> Prompts:
    return encode(policy)


@pytest.fixture(scope="session")
def shared_engine(policy):
    with Engine(policy, MODEL, "float32", ["vllm"]) as found:
        found.load_weights()
        yield found


@pytest.fixture
def vllm(policy, shared_engine):
    """The engine with the policy's weights, which a test may change."""
    before = {name: w.clone() for name, w in policy.state_dict().items()}
    yield shared_engine
    policy.load_state_dict(before, strict=False)
    shared_engine.load_weights()


@torch.no_grad()
def differences(policy, prompts, responses, temperature: float = 1.0) -> tuple[float, float]:
    """The largest of log-probs and of entropies, to those that the policy gives."""
    mask = responses.mask
    logprobs, entropy = policy.score(prompts, responses.tokens, mask, temperature or 1.0)
    pairs = ((logprobs, responses.logprobs), (entropy, responses.entropy))
    return tuple((x - y)[mask].abs().max().item() for x, y in pairs)


@torch.no_grad()
def perturb(policy, scale: float = 0.1, what=lambda name: True) -> None:
    """Change the weights whose names `what` accepts."""
    generator = torch.Generator().manual_seed(1)
    for name, p in policy.model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if what(name) and p.numel() > 1:
            p += scale * p.std() * noise
