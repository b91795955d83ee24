"""Training runs of four rows, made hard for several processes, for tests/test_parallel.py.

    torchrun --nproc_per_node 2 tests/parallel_cases.py FOLDER ddp/mixed fsdp2/mixed ...

Row i goes to process i % n. Rows 1 and 3 have no image, and their responses are of one token. So a
process of 2 (two of 4) reaches no vision parameter, samples less than the others and could skip the
pass over its responses. benchmarks/parallel.py runs more of the cases, on 1, 2 and 4 processes.
"""

import faulthandler
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402
import train_saei  # noqa: E402
from demo.task import make_row  # noqa: E402
from runtime import data  # noqa: E402
from runtime.rollouts import TrainingBatch  # noqa: E402
from vlm.policy import Policy, Prompts, Responses  # noqa: E402

PICTURES = [make_row("plain/train", i) for i in range(4)]
ROWS = [row | ({"images": []} if i % 2 else {}) for i, row in enumerate(PICTURES)]
AER = {"update_control": "aer", "entropy_coef": 0.01}
CASES = {
    # Tokens are chosen among those of all processes.
    "mixed": {"update_control": "top_entropy"},
    # Rows 1 and 3 are dropped: some processes have nothing left. The bonus' coefficient is global,
    # saved and resumed.
    "drop": {"condition": "sampled", "zero_variance": "drop"} | AER,
    # mixed, computed again in the backward
    "lots": {"update_control": "top_entropy", "gradient_checkpointing": True, "micro_responses": 2},
    # One prompt pass for sampling, attack and update. Its graph is older than DDP's forward.
    "one-pass": {"update_control": "top_entropy", "micro_prompts": 4},
    "one-pass-sampled": {"condition": "sampled", "micro_prompts": 4},
    "adapters": {"lora_rank": 4, "lr": 1e-3},
    # bfloat16. Pixels in, log-probs and entropies out are checked to be float32.
    "half": {"updates_per_step": 2},
    # What ZeRO-2 can train: pictures in every row.
    "pictures": AER | {"max_grad_norm": 0.1},
}
sample = Policy._sample_together


def one_token_without_image(self: Policy, prompts: Prompts, read, n: int, *rest) -> Responses:
    found = sample(self, prompts, read, n, *rest)
    short = torch.tensor(prompts.counts).repeat_interleave(n) == 0
    mask = found.mask & ~(short[:, None] & (torch.arange(found.mask.shape[1]) > 0))
    width = int(mask.sum(dim=1).max())
    return Responses(*(x[:, :width] for x in (found.tokens, mask, found.logprobs, found.entropy)))


def half_right(completions: list[str], row: list[int], **_) -> list[float]:
    """A gradient of every row."""
    return [i % 2.0 for i in range(len(completions))]


def half_right_with_images(completions: list[str], row: list[int], **_) -> list[float]:
    """A gradient of rows 0 and 2 alone."""
    return [0.0 if row[i] % 2 else i % 2.0 for i in range(len(completions))]


def float32_alone() -> None:
    """Check that pixels, log-probs and entropies are float32, whatever the policy computes in."""
    policy_score, batch_score = Policy.score, TrainingBatch.score

    def checked_policy_score(self: Policy, prompts: Prompts, *rest):
        assert {x.dtype for x in prompts.images} <= {torch.float32}, "pixels were rounded"
        return policy_score(self, prompts, *rest)

    def checked_batch_score(self, policy, temperature, read=None):
        found = batch_score(self, policy, temperature, read)
        assert {x.dtype for x in found} == {torch.float32}, "log-probs or entropies were rounded"
        return found

    Policy.score, TrainingBatch.score = checked_policy_score, checked_batch_score


def deepspeed_on_cpus() -> None:
    """accelerate leaves CPUs to DDP. The operator that DeepSpeed compiles would only be faster."""
    import deepspeed.comm.torch as communication

    communication.build_shm_op = lambda: None
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
    config = json.loads((ROOT / "recipes/accelerate/zero2.json").read_text())
    del config["bf16"]  # to compare
    path = Path(tempfile.mkdtemp()) / "zero2.json"
    path.write_text(json.dumps(config))
    os.environ |= {"ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


def run(folder: Path, way: str, case: str, **changes) -> None:
    """Train 5 steps. way: ddp | fsdp2 | zero2 (in a launch of its own, with DeepSpeed)."""
    os.environ |= {"ACCELERATE_USE_FSDP": str(way == "fsdp2").lower(), "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if case == "half" else "no"
    if case == "half":
        float32_alone()
    if way == "zero2":
        deepspeed_on_cpus()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    rows = data.Rows((PICTURES if case == "pictures" else ROWS).__getitem__, range(4))
    data.load_rows = lambda *_, **__: rows
    rewards.accuracy_reward = half_right_with_images if case == "drop" else half_right
    settings = dict(model="demo/mixed", output=str(folder / way / case), steps=5, lr=1e-4)
    settings |= dict(prompts_per_step=4, micro_prompts=1, rollouts=4, adversarial_rollouts=2)
    settings |= dict(max_new_tokens=12, pgd_steps=2, self_check=False)
    train_saei.main(train_saei.load_config(**settings | CASES[case] | changes))


def main(folder: str, *runs: str) -> None:
    """runs: WAY/CASE, WAY/CASE/3 (to step 3), WAY/CASE/resume (on from there)."""
    # It ends the process group, and another run follows.
    Accelerator.end_training = lambda self: None
    Policy._sample_together = one_token_without_image
    data.epoch_order = lambda seed, epoch, n: np.arange(n)
    for name in runs:
        way, case, *steps = name.split("/")
        changes = {}
        if steps:
            changes = {"resume": True} if steps == ["resume"] else {"steps": int(steps[0])}
        # Where a process waits for the others, if one does.
        faulthandler.dump_traceback_later(120, exit=True)
        run(Path(folder), way, case, **changes)
        PartialState().wait_for_everyone()  # the last checkpoint has its name
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(*sys.argv[1:])
