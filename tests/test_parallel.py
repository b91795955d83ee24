"""Several processes train as one: DDP and FSDP2 on CPU processes joined by gloo. benchmarks/parallel.py has more."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import launch
from safetensors.torch import load_file
from test_train import comparable, metrics_of

import train_saei

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of all tests here, in two launches: most of their time is the start."""
    out = tmp_path_factory.mktemp("parallel")
    launch(1, "tests/parallel_cases.py", str(out / "1"), "ddp/mixed", "ddp/drop")
    runs = [
        "ddp/mixed",
        "fsdp2/mixed",
        "fsdp2/drop/3",
        "fsdp2/drop/resume",
        "fsdp2/half/2",
    ]  # half: raises itself
    launch(2, "tests/parallel_cases.py", str(out / "2"), *runs)
    return out


@pytest.mark.parametrize("way, case", [("ddp", "mixed"), ("fsdp2", "mixed"), ("fsdp2", "drop")])
def test_two_processes_equal_one(folder, way, case):
    """Half of the prompts each, one process without images and with shorter responses; fsdp2/drop is also resumed.

    Rollouts are equal because each prompt draws from its own seed. Tolerance: two float32 sums in another order differ
    by 1e-7; AdamW divides by the gradient's size, so that an entry whose gradient is near 0 can differ by more.
    """
    one, two = folder / "1/ddp" / case, folder / "2" / way / case
    last = "checkpoints/step-000005"
    a, b, start = (
        load_file(x / "model.safetensors") for x in (one / last, two / last, ROOT / "demo/mixed")
    )
    assert a.keys() == b.keys() == start.keys()
    moved = torch.cat([(a[name] - start[name]).flatten() for name in a])
    apart = torch.cat([(a[name] - b[name]).flatten() for name in a])
    assert moved.abs().max() > 1e-4 and apart.norm() < 1e-3 * moved.norm()
    for x, y in zip(metrics_of(one), metrics_of(two), strict=True):
        assert comparable(x) == pytest.approx(comparable(y), rel=1e-3, abs=1e-4)
    # each process leaves its own: a launcher may start fewer, without a word
    assert len(list((two / last / "state").glob("random_states_*"))) == 2
    sharded = list((two / last / "state").glob("optimizer_0/*.distcp"))
    assert len(sharded) == (
        2 if way == "fsdp2" else 0
    )  # accelerate takes DDP on CPUs, whatever it is told


def test_zero_2_refuses_what_it_would_sum_up_wrongly():
    """DeepSpeed sums gradients in the order in which they come; a process without pictures would have fewer."""
    prompts, cfg = (
        type("Four", (), {"counts": [1, 0, 0, 2], "__len__": lambda self: 4})(),
        train_saei.Config(),
    )
    for changes, micro in (
        ({}, 2),
        ({}, 4),
        ({"lora_rank": 4}, 1),
        ({"freeze": "vision+projector"}, 1),
    ):
        train_saei.refuse_text_alone(dataclasses.replace(cfg, **changes), prompts, micro, 7)
    for changes in ({}, {"freeze": "vision"}):
        with pytest.raises(
            ValueError, match="step 7: a micro-batch of text alone, which ZeRO-2 cannot train: take"
        ):
            train_saei.refuse_text_alone(dataclasses.replace(cfg, **changes), prompts, 1, 7)


def test_gathered_is_nothing_without_fsdp(policy):
    before = [p.requires_grad for p in policy.parameters()]
    with train_saei.gathered(policy):
        assert [p.requires_grad for p in policy.parameters()] == before


def test_fsdp_shards_the_language_models_layers(policy):
    """And not the tower's, which text alone does not run."""
    names = {type(layer).__name__ for layer in policy.model.model.language_model.layers}
    assert set(policy._no_split_modules) == names
    assert not names & {type(block).__name__ for block in policy.model.model.visual.blocks}
