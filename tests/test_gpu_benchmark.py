"""benchmarks/gpu.py: its rehearsal on a CPU with a bare machine's packages, and its faults."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_jobs, gpu_table
from vlm.policy import Policy

ROOT = Path(gpu.__file__).resolve().parent.parent
ABSENT = ("datasets", "pyarrow", "math_verify", "trl", "flash_attn")  # of a bare machine


@pytest.fixture(autouse=True)
def precision(monkeypatch):
    """A job sets it for its runs. Other tests must not see it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def rehearse(folder: Path) -> tuple[Path, str]:
    """-> the folder that the command leaves, its standard output. ABSENT cannot be imported."""
    (folder / "absent").mkdir()
    (folder / "absent/sitecustomize.py").write_text(HIDE.format(absent=ABSENT))
    command = [sys.executable, "benchmarks/gpu.py", "--output", str(folder / "out"), "--toy"]
    command += ["--work", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(folder / "absent"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "out", done.stdout


HIDE = """
import importlib.util
import sys

found, absent = importlib.util.find_spec, {absent}


class Hidden:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Hidden)
importlib.util.find_spec = lambda name, *rest: None if name in absent else found(name, *rest)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal for a machine without a GPU")
def test_the_rehearsal(tmp_path):
    """One test, so that the command runs once, however the tests are distributed."""
    folder, output = rehearse(tmp_path)
    every_part_ran(folder, output)
    parts = json.loads((folder / "results.json").read_text())["parts"]
    a_cpu_finds_what_it_can(parts)
    what_is_not_there_is_said(parts, (folder / "table.md").read_text())


def every_part_ran(folder: Path, output: str) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert list(results["parts"]) == list(gpu.SHARES) == list("abcd")
    for name, part in results["parts"].items():
        assert "error" not in part, (name, part["error"])
        assert json.loads((folder / f"{name}.json").read_text()) == part
        for job in gpu_jobs.JOBS[name]:
            assert part[job] and "error" not in part[job], (job, part[job])
    assert results["commit"] and len(results["checksum of sources"]) == 8
    assert (folder / "table.md").read_text() in output
    assert {"log.txt", "table.md", "results.json"} < {path.name for path in folder.iterdir()}
    assert not list(folder.parent.glob("saei-gpu-*"))  # models and runs are gone


def a_cpu_finds_what_it_can(parts: dict) -> None:
    apart = parts["a"]["numbers"]["cpu against float64"]
    assert 0 < apart["log-probs"] < 1e-4 and apart["gradients"] < 1e-3
    assert parts["a"]["numbers"]["|ratio - 1|, float32"]["largest"] < 1e-4
    assert parts["a"]["numbers"]["|ratio - 1|, bfloat16"]["largest"] > 1e-4
    assert set(parts["a"]["tests"]["outcomes"].values()) == {"passed"}
    demo = parts["a"]["demo"]["against the CPU"]
    assert demo["the same learning"] and demo["first step's difference"] < 0.02
    for model in gpu_jobs.MODELS:
        steps = {name: x for name, x in parts["b"][model].items() if "image tokens" in name}
        assert len(steps) == 3
        for name, found in steps.items():
            assert found["tokens"] == 2 * 4 * 6, "a response ended early"
            phases = sum(found.get(f"seconds/{x}", 0) for x in gpu_table.PHASES[:-1])
            assert phases == pytest.approx(found["seconds/step"], rel=0.05)
            assert found["planned GiB"] > 0 and found["peak GiB"] > 0
            assert (found["seconds/attack"] > 0.01) == ("SaEI" in name)
    for name in ("sdpa", "eager"):
        ways = ("token, static", "token, transformers' generate")
        assert all(parts["b"]["decode"][name][way] for way in ways)  # of 10 tokens: any sign
    resumed = parts["d"]["resume"]
    assert resumed["killed with"] == -9 and resumed["checkpoints left"] == ["step-000002"]
    for name, found in resumed.items():
        if "operators" in name:
            assert found["equal parameters"] and all(found["equal metrics of steps"]), name
    assert parts["d"]["processes"]["apart, share of the distance moved"] < 1e-3


def what_is_not_there_is_said(parts: dict, table: str) -> None:
    assert parts["c"]["baseline"]["TRL"] == {"left out": "trl is not installed"}
    assert table.startswith(gpu_table.NOT_RUN)
    for line in ("TRL: left out: trl is not installed", "flash_attn is not installed"):
        assert line in table
    assert "| 3B | 4 | SaEI, 3 PGD steps |" in table and "equal bit for bit" in table


def test_trls_arm_where_it_is_installed(tmp_path):
    pytest.importorskip("trl")
    work = gpu_jobs.Work("3B", tmp_path, toy=True)
    found = gpu_jobs.trl(work, 4)
    assert found["tokens"] == work.P * work.G * work.T
    assert 0 < found["seconds/sample"] < found["seconds/step"]


# ------------------------------------------------------------------------------- models and plans


def test_random_weights_are_drawn_and_no_response_ends(tmp_path):
    work = gpu_jobs.Work("3B", tmp_path, toy=True)
    stored = Policy.from_pretrained(str(work.folder)).model.state_dict()
    with gpu_jobs.random_weights():
        drawn = [Policy.from_pretrained(str(work.folder)) for _ in range(2)]
    assert all(policy.banned[policy.eos_ids].all() for policy in drawn)
    one, other = (policy.model.state_dict() for policy in drawn)
    assert all(torch.equal(one[name], other[name]) for name in one)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], stored[name])
    after = Policy.from_pretrained(str(work.folder))
    assert torch.equal(after.model.state_dict()[name], stored[name])
    assert not after.banned[after.eos_ids].any()


def test_models_of_real_widths_have_a_setting_for_80_gb(tmp_path):
    """Plans alone: nothing of that size is made here."""
    fits = 75  # GiB
    for model, (precision, more) in gpu_jobs.MODELS.items():
        work = gpu_jobs.Work(model, tmp_path, toy=False)
        assert (work.P, work.G, work.T, work.image_tokens) == (4, 8, 512, (256, 1024))
        options = work.options(1024, "SaEI, 3 PGD steps") | more
        policy = gpu_jobs.without_weights(options["model"], tuple(more.items()))
        row = policy.tokenize("How many?", work.pictures(1024)[:1])
        assert (row.inputs["input_ids"] == policy.model.config.image_token_id).sum() == 1024
        plans = []
        for setting in gpu_jobs.SETTINGS.values():
            plans.append(gpu_jobs.planned(options, setting, precision) / gpu_jobs.GIB)
        assert plans == sorted(plans, reverse=True)
        assert plans[0] > 2 * fits and plans[-1] < fits, (model, plans)


# ------------------------------------------------------------------------------------------ faults

FAULTS = {
    "fails": "raise SystemExit('it is broken')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "import subprocess, sys; subprocess.run([sys.executable, '-c', "
    "'import pathlib, time; time.sleep(4); pathlib.Path(\"late\").touch()'])",
}
SAID = {"fails": "exit code 1: it is broken", "killed": "exit code -9", "hangs": "its limit of 2 s"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_part_that_does_not_end_well_leaves_what_it_found(fault, tmp_path):
    code = "import json, pathlib; pathlib.Path('a.json').write_text(json.dumps({'found': 1}));"
    code = f"import os; os.chdir({str(tmp_path)!r}); {code} {FAULTS[fault]}"
    start = time.monotonic()
    command = [sys.executable, "-c", code]
    found = gpu.run_part(command, tmp_path / "a.json", tmp_path / "log.txt", seconds=2)
    assert time.monotonic() - start < 4
    assert found["found"] == 1 and SAID[fault] in found["error"]
    assert json.loads((tmp_path / "a.json").read_text()) == found
    if fault == "hangs":
        time.sleep(4)
        assert not (tmp_path / "late").exists()  # the processes that it started are gone, too


def test_a_broken_part_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """Of the command: part c dies, and the table is there all the same."""

    def run_part(command, report, log, seconds):
        log.touch()
        seen.append((command[3], seconds))
        if command[3] == "c":
            command = [sys.executable, "-c", FAULTS["killed"]]
        else:
            command = [sys.executable, "-c", f"open({str(report)!r}, 'w').write('{{}}')"]
        return real(command, report, log, seconds)

    seen, real = [], gpu.run_part
    monkeypatch.setattr(gpu, "run_part", run_part)
    gpu.main(["--output", str(tmp_path / "out"), "--work", str(tmp_path), "--minutes", "10"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [name for name, _ in seen] == list("abcd")
    assert {name: "error" in part for name, part in results["parts"].items()} == {
        "a": False,
        "b": False,
        "c": True,
        "d": False,
    }
    assert "part c: error: exit code -9" in (tmp_path / "out/table.md").read_text()
    assert seen[0][1] < 0.31 * 600 and seen[-1][1] <= 600  # the last gets what the others left


def test_a_broken_job_does_not_stop_the_others_of_its_part(tmp_path, monkeypatch):
    def fails(report, folder, toy):
        report["entry"] = 1
        raise RuntimeError("it is broken\nin two lines")

    def works(report, folder, toy):
        report.try_to("fails", lambda: 1 / 0)
        report.try_to("no time", lambda: 1, needs=1e6)
        report.try_to("works", lambda: {"value": 2})

    monkeypatch.setitem(gpu_jobs.JOBS, "a", {"one": (fails, 0.5), "two": (works, 1.0)})
    gpu_jobs.run_jobs("a", gpu_jobs.Report(tmp_path / "a.json", 60), tmp_path, toy=True)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["one"] == {"entry": 1, "error": "RuntimeError: it is broken"}
    assert found["two"]["fails"]["error"] == "ZeroDivisionError: division by zero"
    assert found["two"]["no time"] == {"skipped": "time"} and found["two"]["works"]["value"] == 2
    lines = gpu_table.missing({"a": found})
    assert "- part a, two, no time: skipped: time" in lines[1]


def test_arms_take_one_step_or_none_where_time_is_short(tmp_path, monkeypatch):
    """The first takes 60 of 100 seconds for two steps."""
    now, asked = [0.0], []

    def measured(options, precision):
        now[0] += 30.0 * options["steps"]
        asked.append(options["steps"])
        return {}

    monkeypatch.setattr(gpu_jobs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_jobs, "measured_steps", measured)
    report = gpu_jobs.Report(tmp_path / "b.json", 100)
    gpu_jobs.steps(report, tmp_path, toy=True, model="3B")
    assert asked == [2, 1]
    assert list(report.found.values())[-1] == {"skipped": "time"} and len(report.found) == 4


def test_memory_that_does_not_suffice_leads_to_the_next_setting(monkeypatch):
    asked = []

    def train(accuracy, precision, **options):
        asked.append(options)
        if options["micro_prompts"] > 1 or "gradient_checkpointing" not in options:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        line = {"seconds/step": 1.0, "memory_gib": 2.0, "length": 6.0}
        return [line, line]

    monkeypatch.setattr(gpu_jobs, "train", train)
    monkeypatch.setattr(gpu_jobs, "planned", lambda *_: 2**30)
    found = gpu_jobs.measured_steps({"prompts_per_step": 2, "rollouts": 4}, "no")
    assert len(asked) == len(gpu_jobs.SETTINGS) and found["setting"] == list(gpu_jobs.SETTINGS)[-1]
    assert found["steps"] == 2
    assert found["planned GiB"] == 1 and found["tokens"] == 48
    assert set(found["out of memory"].values()) == {"OutOfMemoryError: CUDA out of memory."}


def test_the_reference_is_of_several_runs_that_learn():
    reference = json.loads(gpu_jobs.REFERENCE.read_text())
    curves = [run["accuracy"] for run in reference["runs"]]
    assert len(curves) == 3 and {len(curve) for curve in curves} == {160}
    for i, run in enumerate(reference["runs"]):
        others = reference["runs"][:i] + reference["runs"][i + 1 :]
        found = gpu_jobs.compare_curves(run, others)
        assert found["the same learning"]
        assert found["accuracy, blocks"][-1] > found["accuracy, blocks"][0] + 0.1
    flat = {"accuracy": [curves[0][0]] * 160}  # a device on which nothing is learnt
    assert not gpu_jobs.compare_curves(flat, reference["runs"])["the same learning"]


def test_a_demo_that_is_stopped_has_the_steps_until_then(tmp_path, monkeypatch):
    """The timer's SIGTERM ends a run with SystemExit, after a step."""
    reference = json.loads(gpu_jobs.REFERENCE.read_text())["runs"][1]

    def train(accuracy, output, **options):
        lines = []
        for i in range(50):
            line = {name: reference[name][i] for name in gpu_jobs.CURVES} | {"seconds/step": 2.0}
            lines.append(json.dumps(line) + "\n")
        Path(output).mkdir()
        (Path(output) / "metrics.jsonl").write_text("".join(lines))
        raise SystemExit(143)

    monkeypatch.setattr(gpu_jobs, "train", train)
    report = gpu_jobs.Report(tmp_path / "a.json", 100)
    gpu_jobs.demo(report, tmp_path, toy=False)
    assert len(report.found["curves"]["accuracy"]) == 50
    found = report.found["against the CPU"]
    assert found["the same learning"] and len(found["accuracy, blocks"]) == 2
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)  # no signal comes later


def test_the_answer_is_the_last_number_in_a_box():
    texts = ["\\boxed{3} then \\boxed{ 12 }", "12", "\\boxed{12", "\\boxed{1.2}", "\\boxed{-12}"]
    assert gpu_jobs.last_number(texts, ["12"] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]
