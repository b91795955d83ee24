"""Is training on several processes training on one? python -m benchmarks.parallel

5 steps of each case of tests/parallel_cases.py on 1, 2 and 4 CPU processes joined by gloo, about 6
minutes on 2 cores. Writes parallel.json: for each way, the distance of its parameters from those of
one process, as a share of how far training moved them (L2 norms). ZeRO-2 runs where DeepSpeed is
installed (pip install deepspeed --no-build-isolation).
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
FSDP2 = ["mixed", "drop/3", "drop/resume", "lots", "adapters", "pictures"]
RUNS = [  # processes, what they run one after another: way/case
    (1, ["ddp/mixed", "ddp/drop", "ddp/adapters", "ddp/pictures", "ddp/one-pass-sampled"]),
    (2, ["ddp/mixed", "ddp/drop", "ddp/lots", "ddp/adapters", "ddp/pictures"]),
    (2, ["ddp/one-pass", "ddp/one-pass-sampled"]),
    (2, [f"fsdp2/{case}" for case in FSDP2]),
    (4, ["ddp/mixed", "ddp/drop", "ddp/one-pass", "ddp/one-pass-sampled"]),
    (4, ["fsdp2/mixed", "fsdp2/drop", "fsdp2/lots"]),
]
SAME = ("lots", "one-pass")  # what `mixed` computes, in other passes
DEEPSPEED_RUNS = [  # each in a launch of its own
    (2, ["zero2/adapters"]),
    (2, ["zero2/pictures/3"]),
    (2, ["zero2/pictures/resume"]),
    (4, ["zero2/pictures"]),
]


def launch(processes: int, folder: Path, runs: list[str]) -> None:
    """Start tests/parallel_cases.py; raises CalledProcessError when a process fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes)]
    command += ["tests/parallel_cases.py", str(folder / str(processes)), *runs]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """L2 norm of the difference of two models' parameters."""
    return float(torch.cat([(a[name] - b[name]).flatten() for name in a]).norm())


def main() -> None:
    all_runs = RUNS + (DEEPSPEED_RUNS if importlib.util.find_spec("deepspeed") else [])
    start, rows = load_file(ROOT / "demo/mixed/model.safetensors"), []
    with tempfile.TemporaryDirectory() as folder:

        def trained(processes: int, way: str, case: str) -> dict[str, torch.Tensor]:
            name = f"{processes}/{way}/{case}/checkpoints/step-000005/model.safetensors"
            return load_file(Path(folder) / name)

        for processes, runs in all_runs:
            launch(processes, Path(folder), runs)
            for run in runs:
                way, case, *part = run.split("/")
                if part == ["3"]:  # the first steps of a run that is resumed
                    continue
                one = trained(1, "ddp", "mixed" if case in SAME else case)
                apart = distance(trained(processes, way, case), one) / distance(one, start)
                rows.append({"processes": processes, "way": way, "case": case, "apart": apart})
                print(rows[-1])
    result = {"steps": 5, "torch": torch.__version__, "rows": rows}
    (ROOT / "benchmarks/parallel.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
