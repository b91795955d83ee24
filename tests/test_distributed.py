"""runtime/distributed.py: what one process can tell of it. Several processes: test_parallel.py."""

import contextlib
import copy
from datetime import timedelta
from importlib import metadata
from unittest import mock

import pytest
import torch
from accelerate import DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState

import eval
import train_saei
from runtime import distributed


class Joined(Exception):
    """A process would now wait for the others."""


@pytest.fixture
def two_processes(monkeypatch):
    """The environment of the first of two, none of which has joined the other yet."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    own = {"RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"}
    for name, value in (common | own).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    states = (AcceleratorState._shared_state, PartialState._shared_state)
    with mock.patch.dict(states[0], clear=True), mock.patch.dict(states[1], clear=True):
        yield


def test_processes_wait_for_one_another_for_hours(two_processes, monkeypatch, tmp_path):
    """In training and in evaluation. accelerate's own timeout is 10 minutes with NCCL."""
    timeouts = []

    def join(*args, timeout, **kwargs):
        timeouts.append(timeout)
        raise Joined

    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    output = {"output": str(tmp_path / "out")}
    with pytest.raises(Joined):
        distributed.make_accelerator(train_saei.load_config(**output).run, 1.0)
    PartialState._reset_state()
    with pytest.raises(Joined):
        eval.main(eval.load_config(model="demo/mixed", **output))
    assert len(timeouts) == 2 and min(timeouts) >= timedelta(hours=2)


@pytest.mark.parametrize("found, refused", [("0.18.4", True), ("0.19.10", False), ("1.0", False)])
def test_an_old_deepspeed_is_refused(monkeypatch, found, refused):
    """It rounds rotary frequencies to bfloat16."""
    monkeypatch.setattr(metadata, "version", lambda name: found)
    with pytest.raises(ValueError) if refused else contextlib.nullcontext() as error:
        distributed.refuse_old_deepspeed()
    if refused:
        message = str(error.value)
        assert "\n" not in message and f"deepspeed {found} " in message
        assert message.endswith("pip install 'deepspeed>=0.19.2'")


def test_ddp_gradients_are_views_of_its_buckets(two_processes, monkeypatch, tmp_path):
    """Else the buckets are a second copy of all gradients."""
    given = []

    def record(*args, kwargs_handlers, **kwargs):
        given.extend(kwargs_handlers)
        raise Joined

    monkeypatch.setattr(distributed, "Accelerator", record)
    with pytest.raises(Joined):
        distributed.make_accelerator(train_saei.load_config(output=str(tmp_path)).run, 1.0)
    handlers = [x for x in given if isinstance(x, DistributedDataParallelKwargs)]
    (ddp,) = handlers
    assert ddp.gradient_as_bucket_view and ddp.find_unused_parameters


def optimizer_on(kind: str, value: float = 1.0) -> torch.optim.AdamW:
    """Of a parameter on the CPU, where torch has a fused AdamW too."""
    parameter = torch.nn.Parameter(torch.full((5,), value))
    return distributed.make_optimizer([parameter], 0.1, 0.01, torch.device(kind))


def take_steps(optimizer: torch.optim.AdamW, count: int) -> torch.Tensor:
    (parameter,) = optimizer.param_groups[0]["params"]
    for i in range(count):
        parameter.grad = torch.linspace(-1, 1, 5) * (i + 1)
        optimizer.step()
    return parameter


def test_adamw_is_fused_on_a_gpu_alone():
    assert optimizer_on("cuda").param_groups[0]["fused"]
    assert not optimizer_on("cpu").param_groups[0]["fused"]


@pytest.mark.parametrize("wrote", ["cpu", "cuda"])
@pytest.mark.parametrize("reads", ["cpu", "cuda"])
def test_a_checkpoint_of_another_device_resumes(wrote, reads):
    """Each goes on with its own kernel, from the other's state. Of the same device: exactly."""
    whole = take_steps(optimizer_on(wrote), 5)
    first = optimizer_on(wrote)
    value = take_steps(first, 3).detach().clone()
    second = optimizer_on(reads)
    second.param_groups[0]["params"][0].data = value
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert bool(second.param_groups[0]["fused"]) == (reads == "cuda")
    (parameter,) = second.param_groups[0]["params"]
    for i in range(3, 5):
        parameter.grad = torch.linspace(-1, 1, 5) * (i + 1)
        second.step()
    if wrote == reads:
        assert torch.equal(parameter, whole)
    else:
        torch.testing.assert_close(parameter, whole, rtol=1e-6, atol=1e-6)
