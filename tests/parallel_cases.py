"""Training runs of four rows, made hard for several processes; started by tests/test_parallel.py on 1, 2 and 4 of them.

    torchrun --nproc_per_node 2 tests/parallel_cases.py FOLDER ddp/mixed fsdp2/mixed ...

Row i goes to process i % n. Rows 1 and 3 have no image, and their responses are of one token: a process of 2 (two of 4)
reaches no vision parameter, samples less than the others and could skip the pass over its responses.
"""

import faulthandler
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_saei  # noqa: E402
from demo.task import make_row  # noqa: E402
from vlm.policy import Policy, Prompts, Responses  # noqa: E402

PICTURES = [make_row("plain/train", i) | {"row": i} for i in range(4)]
ROWS = [row | ({"images": []} if i % 2 else {}) for i, row in enumerate(PICTURES)]
CASES = {
    "mixed": {"update_control": "top_entropy"},  # tokens are chosen among those of all processes
    # rows 1 and 3 are dropped: nothing of some processes is. The bonus' coefficient is global, saved and resumed
    "drop": {
        "condition": "sampled",
        "zero_variance": "drop",
        "update_control": "aer",
        "entropy_coef": 0.01,
    },
    "lots": {
        "update_control": "top_entropy",
        "checkpointing": True,
        "micro_responses": 2,
    },  # mixed, computed again in the backward
    "adapters": {"lora_rank": 4, "lr": 1e-3},
    "half": {
        "updates_per_step": 2
    },  # bf16: pixels in, log-probs and entropies out are checked to be float32
    # what ZeRO-2 can train: pictures in every row
    "pictures": {"update_control": "aer", "entropy_coef": 0.01, "max_grad_norm": 0.1},
}
sample = Policy.sample


def one_token_without_image(self: Policy, prompts: Prompts, n: int, *rest) -> Responses:
    found = sample(self, prompts, n, *rest)
    short = torch.tensor(prompts.counts).repeat_interleave(n) == 0
    mask = found.mask & ~(short[:, None] & (torch.arange(found.mask.shape[1]) > 0))
    width = int(mask.sum(dim=1).max())
    return Responses(*(x[:, :width] for x in (found.tokens, mask, found.logprobs, found.entropy)))


def half_right(completions: list[str], row: list[int], dropped: bool, **_) -> list[float]:
    """A gradient of every row; dropped: of rows 0 and 2 alone."""
    return [0.0 if dropped and row[i] % 2 else i % 2.0 for i in range(len(completions))]


def float32_alone() -> None:
    """The policy, wrapped or not, gets pixels and gives log-probs and entropies in float32, whatever it computes in."""
    score, of_part = Policy.score, train_saei.Part.score

    def scored(self: Policy, prompts: Prompts, *rest):
        assert {x.dtype for x in prompts.images} <= {torch.float32}, "pixels were rounded"
        return score(self, prompts, *rest)

    def of_part_scored(self, policy, temperature):
        found = of_part(self, policy, temperature)
        assert {x.dtype for x in found} == {torch.float32}, "log-probs or entropies were rounded"
        return found

    Policy.score, train_saei.Part.score = scored, of_part_scored


def deepspeed_on_cpus() -> None:
    """accelerate leaves CPUs to DDP; and the operator that DeepSpeed compiles for them would only be faster."""
    import deepspeed.comm.torch as communication

    communication.build_shm_op = lambda: None
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
    config = json.loads((ROOT / "recipes/accelerate/zero2.json").read_text())
    del config["bf16"]  # to compare
    path = Path(tempfile.mkdtemp()) / "zero2.json"
    path.write_text(json.dumps(config))
    os.environ |= {
        "ACCELERATE_USE_CPU": "false",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "DS_ACCELERATOR": "cpu",
    }
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)


def run(folder: Path, way: str, case: str, **changes) -> None:
    """Train 5 steps; way: ddp | fsdp2 | zero2 (in a launch of its own, with DeepSpeed installed)."""
    os.environ |= {"ACCELERATE_USE_FSDP": str(way == "fsdp2").lower(), "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if case == "half" else "no"
    if case == "half":
        float32_alone()
    if way == "zero2":
        deepspeed_on_cpus()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    rows = PICTURES if case == "pictures" else ROWS
    train_saei.data.load_rows = lambda *_, **__: rows
    train_saei.rewards.accuracy_reward = lambda *args, **columns: half_right(
        *args, dropped=case == "drop", **columns
    )
    settings = dict(
        model="demo/mixed", output=str(folder / way / case), steps=5, prompts_per_step=4, rollouts=4
    )
    settings |= dict(
        adversarial_rollouts=2,
        max_new_tokens=12,
        pgd_steps=2,
        lr=1e-4,
        micro_prompts=1,
        self_check=False,
    )
    train_saei.main(train_saei.Config(**settings | CASES[case] | changes))


if __name__ == "__main__":
    train_saei.Accelerator.end_training = lambda self: (
        None
    )  # it ends the process group, and another run follows
    Policy.sample = one_token_without_image
    train_saei.epoch_order = lambda seed, epoch, n: np.arange(n)
    for argument in sys.argv[2:]:
        way, case, *steps = argument.split(
            "/"
        )  # fsdp2/mixed/3: to step 3; fsdp2/mixed/resume: on from there
        changes = (
            {"resume": True} if steps == ["resume"] else {"steps": int(steps[0])} if steps else {}
        )
        faulthandler.dump_traceback_later(
            120, exit=True
        )  # where a process waits for the others, if one does
        run(Path(sys.argv[1]), way, case, **changes)
        PartialState().wait_for_everyone()  # the last checkpoint has its name
