"""Is training on several processes training on one? `python -m benchmarks.parallel` (about 6 minutes on 2 cores)

5 steps of each case of tests/parallel_cases.py on 1, 2 and 4 CPU processes joined by gloo; writes parallel.json: for
each way, how far its parameters end from those of one process, as a share of how far training moved them (L2 norms).
ZeRO-2 runs where DeepSpeed is installed (pip install deepspeed --no-build-isolation).
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
RUNS = [  # processes, what they run one after another
    (1, ["ddp/mixed", "ddp/drop", "ddp/adapters", "ddp/pictures"]),
    (2, ["ddp/mixed", "ddp/drop", "ddp/lots", "ddp/adapters", "ddp/pictures"]),
    (
        2,
        [
            "fsdp2/mixed",
            "fsdp2/drop/3",
            "fsdp2/drop/resume",
            "fsdp2/lots",
            "fsdp2/adapters",
            "fsdp2/pictures",
        ],
    ),
    (4, ["ddp/mixed", "ddp/drop", "fsdp2/mixed", "fsdp2/drop", "fsdp2/lots"]),
]
if importlib.util.find_spec("deepspeed"):  # each in a launch of its own
    RUNS += [
        (2, ["zero2/adapters"]),
        (2, ["zero2/pictures/3"]),
        (2, ["zero2/pictures/resume"]),
        (4, ["zero2/pictures"]),
    ]


def run(processes: int, folder: Path, runs: list[str]) -> None:
    """Start tests/parallel_cases.py; raises CalledProcessError when a process fails."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += ["tests/parallel_cases.py", str(folder / str(processes)), *runs]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def apart(one: Path, other: Path) -> float:
    """|other - one| / |one - start|"""
    a, b, start = (
        load_file(path / "model.safetensors") for path in (one, other, ROOT / "demo/mixed")
    )
    norm = lambda x, y: torch.cat([(x[name] - y[name]).flatten() for name in x]).norm()  # noqa: E731
    return float(norm(b, a) / norm(a, start))


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        at = lambda n, way, case: Path(folder) / str(n) / way / case / "checkpoints/step-000005"  # noqa: E731
        for processes, runs in RUNS:
            run(processes, Path(folder), runs)
            for way, case in dict.fromkeys(
                tuple(x.split("/")[:2]) for x in runs if not x[-1].isdigit()
            ):
                reference = at(1, "ddp", "mixed" if case == "lots" else case)
                row = {"processes": processes, "way": way, "case": case}
                rows.append(row | {"apart": apart(reference, at(processes, way, case))})
                print(rows[-1])
    result = {"steps": 5, "torch": torch.__version__, "rows": rows}
    (ROOT / "benchmarks/parallel.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
