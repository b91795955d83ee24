"""What a GPU has to say, in ten minutes: python benchmarks/gpu.py --output DIR

    python benchmarks/gpu.py --output out/gpu                  # parts a to d, 10 minutes
    python benchmarks/gpu.py --output out/gpu --parts a d      # some, in the whole time
    python benchmarks/gpu.py --output out/gpu --toy            # a rehearsal on a CPU

    a  tests/test_device.py; one step's numbers against float64 and the CPU; the demo trained
    b  seconds and memory of a step: 3B, and 7B with LoRA; decoding and attention
    c  the same work by TRL or by transformers' own functions
    d  kill -9 and resume, bit for bit; two processes on one device

Each part runs in a process of its own (benchmarks/gpu_jobs.py) for its share of the time, and
writes DIR/PART.json after every entry. A part that fails or is killed leaves what it has and does
not stop the others. Then DIR/results.json (all parts, device, versions, commit) and DIR/table.md
are written. Models have random weights: nothing is downloaded. What is not installed is left out,
and table.md says so.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for python benchmarks/gpu.py
from benchmarks import gpu_table  # noqa: E402

SHARES = {"a": 0.3, "b": 0.46, "c": 0.12, "d": 0.12}  # of the time
RESERVE = 0.03  # of the time: for starting processes


def run_part(command: list[str], report: Path, log: Path, seconds: float) -> dict:
    """Run a part's process, for so long at most.   -> its report, with "error" if it failed"""
    report.unlink(missing_ok=True)
    start, error = time.monotonic(), None
    with log.open("a") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code, error = None, f"stopped at its limit of {seconds:.0f} s"
        finally:  # with all processes that it started
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        error = f"exit code {code}: {lines[-1] if lines else ''}"[:300]
    found = json.loads(report.read_text()) if report.exists() else {}
    found["seconds"] = round(time.monotonic() - start, 1)
    if error:
        found["error"] = error
    report.write_text(json.dumps(found, indent=1) + "\n")
    return found


def source_state() -> dict[str, str]:
    """The commit, and a checksum of the Python files for copies without git."""
    git = ["git", "-C", str(ROOT)]
    state = {"commit": "unknown"}
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
        if head.returncode == 0:
            state["commit"] = head.stdout.strip() + (" (changed)" if changed.stdout else "")
    except OSError:  # no git
        pass
    checksum = 0
    for path in sorted(ROOT.glob("**/*.py")):
        if not {part for part in path.relative_to(ROOT).parts if part.startswith(".")}:
            checksum = zlib.crc32(path.read_bytes(), checksum)
    return state | {"checksum of sources": f"{checksum:08x}"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the results")
    add("--parts", nargs="+", choices=list(SHARES), default=list(SHARES))
    add("--minutes", type=float, default=10, help="for all parts together")
    add("--toy", action="store_true", help="tiny models, few steps: a rehearsal on a CPU")
    add("--work", type=Path, help="folder for models and runs, deleted afterwards")
    args = parser.parse_args(argv)
    output = args.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="saei-gpu-", dir=args.work))
    log = output / "log.txt"
    log.unlink(missing_ok=True)
    end = time.monotonic() + 60 * args.minutes * (1 - RESERVE)
    results = source_state() | {"minutes": args.minutes, "toy": args.toy, "parts": {}}
    for i, part in enumerate(args.parts):
        shares = [SHARES[name] for name in args.parts[i:]]
        seconds = (end - time.monotonic()) * shares[0] / sum(shares)  # what others left, too
        report = output / f"{part}.json"
        print(f"part {part}: at most {seconds:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu_jobs", part, "--report", str(report)]
        command += ["--folder", str(work / part), "--seconds", str(seconds - 5)]
        found = run_part(command + ["--toy"] * args.toy, report, log, seconds)
        print(f"part {part}: {found.get('error', 'done')}, {found['seconds']} s", flush=True)
        results["parts"][part] = found
        shutil.rmtree(work / part, ignore_errors=True)
        (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (output / "table.md").write_text(gpu_table.table_of(results))
    shutil.rmtree(work, ignore_errors=True)
    print((output / "table.md").read_text())


if __name__ == "__main__":
    main()
