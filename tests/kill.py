"""Kill a run with kill -9 at random moments, resume it each time, and compare it with one that was not killed.

    python -m benchmarks.kill                    # 50 kills of one process, writes benchmarks/kill.json
    python -m benchmarks.kill --processes 2 --kills 6 --steps 16 --output benchmarks/kill-2.json

The moments: a phase is drawn (start, sample, attack, measure, update, save), how often it must have come round, and a
delay within it; where the kill fell is read afterwards. After the kills the run is resumed to its end. Compared, bit
for bit: the last checkpoint's parameters and optimiser state, and metrics.jsonl but for seconds and memory.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OPTIONS = "--model demo/mixed --split plain/train --prompts_per_step 2 --rollouts 4 --adversarial_rollouts 2 --lr 1e-4"
OPTIONS += " --pgd_steps 2 --max_new_tokens 16 --keep_last 2 --self_check false"
PHASES = ["start", "sample", "attack", "measure", "update", "save"]


def child(folder: Path, argv: list[str]) -> None:
    """train_saei.main, which says in a file of `folder` what it is at: the number of a phase and of times it came."""
    import train_saei
    from runtime import run as runs

    counts = Counter()
    board = os.open(folder / f"pid-{os.getpid()}", os.O_CREAT | os.O_RDWR)

    def says(phase: str, function):
        def inner(*args, **kwargs):
            counts[phase] += 1
            os.pwrite(board, bytes([PHASES.index(phase), min(counts[phase], 255)]), 0)
            return function(*args, **kwargs)

        return inner

    os.pwrite(board, bytes([0, 1]), 0)
    train_saei.sample = says("sample", train_saei.sample)
    train_saei.intervene = says("attack", train_saei.intervene)
    train_saei.reward = says("measure", train_saei.reward)
    train_saei.update = says("update", train_saei.update)
    runs.save_checkpoint = says("save", runs.save_checkpoint)
    train_saei.main(train_saei.load_config(argv))


def start(out: Path, processes: int, steps: int, save_every: int) -> subprocess.Popen:
    """A run in `out` that resumes; its processes' boards lie in `out`.boards. Their output is added to `out`.log."""
    boards = out.with_suffix(".boards")
    boards.mkdir(parents=True, exist_ok=True)
    for old in boards.iterdir():
        old.unlink()
    command = [sys.executable]
    if processes > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
    options = [
        *OPTIONS.split(),
        "--steps",
        str(steps),
        "--save_every",
        str(save_every),
        "--output",
        str(out),
    ]
    command += [__file__, "--child", str(boards), *options, "--resume", "true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def where(out: Path) -> tuple[int, int]:
    """-> the phase of the process that came first, how often that phase has come"""
    boards = sorted(out.with_suffix(".boards").iterdir())
    said = boards[0].read_bytes() if boards else b""
    return (said[0], said[1]) if len(said) == 2 else (0, 0)


def kill(run: subprocess.Popen, out: Path) -> None:
    """kill -9 of the launcher and all its processes: torchrun's are in sessions of their own."""
    pids = [int(board.name.removeprefix("pid-")) for board in out.with_suffix(".boards").iterdir()]
    run.kill()
    for pid in set(pids) - {run.pid}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait()
    while any(
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text()
        for pid in pids
    ):
        time.sleep(0.01)


def one_life(
    rng: random.Random, out: Path, processes: int, steps: int, save_every: int
) -> dict | None:
    """Start, wait for a random moment, kill -9.   -> where it fell; None: the run was at its end before"""
    phase, times = rng.randrange(len(PHASES)), rng.randint(1, 3)
    delay = (
        rng.uniform(0, 6)
        if phase == 0
        else rng.uniform(0, 0.3)
        if PHASES[phase] != "save"
        else rng.uniform(0, 0.1)
    )
    begun, run = time.perf_counter(), start(out, processes, steps, save_every)
    while phase and run.poll() is None and not (where(out)[0] == phase and where(out)[1] >= times):
        time.sleep(0.0005)
    time.sleep(delay)
    if run.poll() is not None:
        if run.returncode:
            raise RuntimeError(
                f"the run ended by itself with exit code {run.returncode}: see {out.with_suffix('.log')}"
            )
        return None
    kill(run, out)
    fell = PHASES[where(out)[0]]
    kept = (
        sorted(path.name for path in (out / "checkpoints").glob("step-*")) if out.exists() else []
    )
    left = len(list((out / "checkpoints").glob(".step-*")))
    return {
        "aimed": PHASES[phase],
        "fell": fell,
        "newest": kept[-1] if kept else None,
        "unfinished": left,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def to_the_end(out: Path, processes: int, steps: int, save_every: int) -> None:
    run = start(out, processes, steps, save_every)
    if run.wait():
        raise RuntimeError(f"exit code {run.returncode}: see {out.with_suffix('.log')}")


def tensors(x) -> list[torch.Tensor]:
    """All tensors of a nested state, in order."""
    if isinstance(x, torch.Tensor):
        return [x]
    items = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else []
    return [tensor for item in items for tensor in tensors(item)]


def differences(a: Path, b: Path) -> dict[str, int]:
    """What two runs differ in: tensors of the last checkpoint, lines of metrics.jsonl."""
    count, last = {}, sorted(a.glob("checkpoints/step-*"))[-1].name
    for name, load in (("model.safetensors", load_file), ("state/optimizer.bin", torch.load)):
        x, y = (tensors(load(run / "checkpoints" / last / name)) for run in (a, b))
        if len(x) != len(y) or not x:
            raise ValueError(f"{name}: {len(x)} and {len(y)} tensors")
        count[name] = sum(not torch.equal(u, v) for u, v in zip(x, y, strict=True))
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (a, b)
    ]
    lines = [
        [{k: v for k, v in m.items() if not k.startswith(("seconds", "memory"))} for m in run]
        for run in lines
    ]
    count["metrics.jsonl"] = abs(len(lines[0]) - len(lines[1])) + sum(
        x != y for x, y in zip(*lines, strict=False)
    )
    return count


def main(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, help="of the run; unset: 2 a kill, and 10")
    parser.add_argument("--save_every", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "out/kill", help="the two runs; must not be there"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args(argv)
    if args.folder.exists():
        raise FileExistsError(f"{args.folder} is there: remove it, or name another --folder")
    steps, rng = args.steps or 2 * args.kills + 10, random.Random(args.seed)
    job, kills = (args.processes, steps, args.save_every), []
    while len(kills) < args.kills:
        fell = one_life(rng, args.folder / "killed", *job)
        if fell is None:
            raise RuntimeError(f"the run reached its end after {len(kills)} kills: more --steps")
        kills.append(fell)
        print(f"kill {len(kills):2}: {json.dumps(fell)}", flush=True)
    to_the_end(args.folder / "killed", *job)
    to_the_end(args.folder / "whole", *job)
    result = {"kills": len(kills), "fell": Counter(k["fell"] for k in kills), "steps": steps}
    result |= {"processes": args.processes, "save_every": args.save_every, "seed": args.seed}
    result |= {
        "different": differences(args.folder / "whole", args.folder / "killed"),
        "log": kills,
    }
    log = ",\n".join(json.dumps(fell) for fell in result.pop("log"))  # a line a kill
    args.output.write_text(f'{json.dumps(result)[:-1]}, "log": [\n{log}\n]}}\n')
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(any(main(sys.argv[1:])["different"].values()))
