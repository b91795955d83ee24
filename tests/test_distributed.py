"""runtime/distributed.py: what one process can tell of it. Several processes: test_parallel.py."""

import contextlib
from datetime import timedelta
from importlib import metadata
from unittest import mock

import pytest
import torch
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
