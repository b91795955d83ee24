"""Several processes train as one: DDP and FSDP2 on CPU processes joined by gloo.

benchmarks/parallel.py has more.
"""

import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import parallel_cases
import pytest
import torch
from accelerate import DistributedType
from conftest import ROOT, comparable, finish, metrics_of, start
from safetensors.torch import load_file

from runtime import distributed
from runtime.args import MemoryArgs

ONE_PASS = ["ddp/one-pass", "ddp/one-pass-sampled"]
RUNS = ["ddp/mixed", "fsdp2/mixed", "fsdp2/drop/3", "fsdp2/drop/resume", "fsdp2/half/2", *ONE_PASS]
CASES = [("ddp", "mixed"), ("fsdp2", "mixed"), ("fsdp2", "drop")]
CASES += [tuple(run.split("/")) for run in ONE_PASS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of all tests here. `half` checks itself."""
    out = tmp_path_factory.mktemp("parallel")
    finish(start(1, parallel_cases.main, str(out / "1"), "ddp/mixed", "ddp/drop", *ONE_PASS))
    finish(start(2, parallel_cases.main, str(out / "2"), *RUNS))
    return out


@pytest.mark.parametrize("way, case", CASES)
def test_two_processes_equal_one(folder, way, case):
    """Half of the prompts each, one process without images and with shorter responses.

    Rollouts are equal because each prompt draws from its own seed. Tolerance: two float32 sums in
    another order differ by 1e-7. AdamW divides by the gradient's size, so an entry whose gradient
    is near 0 can differ by more. fsdp2/drop is also resumed.
    """
    one, two = folder / "1/ddp" / case, folder / "2" / way / case
    last = "checkpoints/step-000005"
    checkpoints = (one / last, two / last, ROOT / "demo/mixed")
    a, b, initial = (load_file(path / "model.safetensors") for path in checkpoints)
    assert a.keys() == b.keys() == initial.keys()
    moved = torch.cat([(a[name] - initial[name]).flatten() for name in a])
    apart = torch.cat([(a[name] - b[name]).flatten() for name in a])
    assert moved.abs().max() > 1e-4 and apart.norm() < 1e-3 * moved.norm()
    for x, y in zip(metrics_of(one), metrics_of(two), strict=True):
        assert comparable(x) == pytest.approx(comparable(y), rel=1e-3, abs=1e-4)
    state = two / last / "state"
    assert len(list(state.glob("random_states_*"))) == 2
    # accelerate takes DDP on CPUs, whatever it is told
    sharded = list(state.glob("optimizer_0/*.distcp"))
    assert len(sharded) == (2 if way == "fsdp2" else 0)


def test_zero_2_refuses_what_it_would_sum_up_wrongly():
    """DeepSpeed sums gradients in the order they come. A process without images has fewer."""
    deepspeed = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    ddp = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)
    adapters, head = MemoryArgs(lora_rank=4), MemoryArgs(freeze="vision+projector")
    counts = [1, 0, 0, 2]
    for accelerator, memory, micro in (
        (deepspeed, MemoryArgs(), 2),
        (deepspeed, MemoryArgs(), 4),
        (deepspeed, adapters, 1),
        (deepspeed, head, 1),
        (ddp, MemoryArgs(), 1),
    ):
        distributed.refuse_text_alone(accelerator, memory, counts, micro, 7)
    for memory in (MemoryArgs(), MemoryArgs(freeze="vision")):
        with pytest.raises(ValueError, match="step 7: .* has no image, which ZeRO-2 cannot train"):
            distributed.refuse_text_alone(deepspeed, memory, counts, 1, 7)


def test_gathered_is_nothing_without_fsdp(policy):
    before = [p.requires_grad for p in policy.parameters()]
    with distributed.gathered(policy):
        assert [p.requires_grad for p in policy.parameters()] == before


def test_fsdp_shards_the_language_models_layers(policy):
    """And not the tower's, which text alone does not run."""
    names = {type(layer).__name__ for layer in policy.model.model.language_model.layers}
    assert set(policy._no_split_modules) == names
    assert not names & {type(block).__name__ for block in policy.model.model.visual.blocks}


LEAVES = """
import multiprocessing.util, subprocess, sys, tempfile

def test_leaves_folders(tmp_path):
    tempfile.mkdtemp()
    multiprocessing.util.get_temp_dir()
    subprocess.run([sys.executable, "-c", "import tempfile; tempfile.mkdtemp()"], check=True)
"""


def test_the_tests_leave_no_temporary_folder(tmp_path):
    """torchrun, for one, leaves a folder for each launch."""
    (tmp_path / "test_leaves.py").write_text(LEAVES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", str(tmp_path)]
    temporary = tempfile.mkdtemp()
    environment = os.environ | {"TMPDIR": temporary, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
    assert os.listdir(temporary) == []
