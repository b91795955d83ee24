"""What ends a run from outside, and what is left of it (docs/faults.md): signals, kill -9, full disks, lost ranks."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill
import pytest
import torch
import yaml
from accelerate import Accelerator
from test_train import comparable, half_right, metrics_of, parameters, short  # noqa: F401

import rewards
import train_saei
from runtime import run as runs
from runtime.data import load_rows
from train_saei import Config, given_order, main

ROOT = Path(__file__).resolve().parent.parent
FAULTS = """
import os, signal

def at_the_third_call(action):
    calls = []  # the first is the trial before step 0
    def reward(completions, **_):
        calls.append(1)
        if len(calls) == 3 and os.environ.get("RANK", "1") == "1":
            action()
        return [i % 2.0 for i in range(len(completions))]
    return reward

calls = []

def raises(completions, **_):
    calls.append(1)
    if len(calls) >= 3 and os.environ.get("RANK", "1") == "1":
        raise KeyError("the service is gone")
    return [0.0] * len(completions)

terminated = at_the_third_call(lambda: os.kill(os.getpid(), signal.SIGTERM))
killed = at_the_third_call(lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def in_two(tmp_path: Path, fault: str, *more: str) -> subprocess.CompletedProcess:
    """Four steps on two processes; `fault` befalls the second one in step 1."""
    (tmp_path / "faults.py").write_text(FAULTS)
    options = "--model demo/mixed --split plain/train --steps 4 --prompts_per_step 2 --rollouts 4 --pgd_steps 1"
    options += (
        " --adversarial_rollouts 2 --max_new_tokens 6 --lr 1e-4 --save_every 1 --self_check false"
    )
    options += f" --output {tmp_path}/run --reward {tmp_path}/faults.py:{fault}"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += ["train_saei.py", *options.split(), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def names(out: Path) -> list[str]:
    return [path.name for path in runs.checkpoints(out)]


def reward_that(action, at_call: int):
    calls = []

    def reward(completions, **_):
        calls.append(1)
        if len(calls) == at_call:
            action()
        return [i % 2.0 for i in range(len(completions))]

    return reward


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_at_a_step_boundary_and_it_goes_on_exactly(
    tiny, tmp_path, monkeypatch, number, code
):
    before = signal.getsignal(number)
    action = reward_that(
        lambda: os.kill(os.getpid(), number), at_call=3
    )  # the trial, step 0, step 1
    monkeypatch.setattr(rewards, "accuracy_reward", action)
    with pytest.raises(SystemExit) as end:
        main(short(tiny, tmp_path / "parts", steps=4, save_every=4))
    assert end.value.code == code and signal.getsignal(number) is before
    assert names(tmp_path / "parts") == ["step-000002"] and len(metrics_of(tmp_path / "parts")) == 2
    monkeypatch.setattr(rewards, "accuracy_reward", reward_that(None, at_call=0))
    main(short(tiny, tmp_path / "parts", steps=4, save_every=4, resume=True))
    main(short(tiny, tmp_path / "whole", steps=4, save_every=4))
    whole, parts = (
        parameters(tmp_path / name / "checkpoints/step-000004") for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = [[comparable(m) for m in metrics_of(tmp_path / name)] for name in ("whole", "parts")]
    assert lines[0] == lines[1] and lines[0][3]["grad_norm"] > 0


def test_a_second_signal_ends_at_once_but_its_echo_does_not(monkeypatch):
    exits, now = [], [100.0]
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with runs.signals_given_back():
        stop = runs.Stop(None)
    stop.ask(signal.SIGINT, None)
    now[0] += 0.5  # a launcher passes on what the terminal sent to all
    stop.ask(signal.SIGTERM, None)
    assert exits == [] and stop.received == signal.SIGINT
    now[0] += 1.0
    stop.ask(signal.SIGTERM, None)
    assert exits == [143]


def test_a_run_that_fails_gives_the_signals_back(tiny, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train_saei, "sample", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(short(tiny, tmp_path, steps=1))
    assert signal.getsignal(signal.SIGINT) is before and before is not None


def test_a_signal_to_one_rank_stops_all_and_one_process_goes_on(tmp_path):
    done = in_two(tmp_path, "terminated", "--save_every", "4")
    assert done.returncode != 0 and "SIGTERM: finishing the step, saving" in done.stderr, (
        done.stderr[-2000:]
    )
    assert names(tmp_path / "run") == ["step-000002"]
    (tmp_path / "faults.py").write_text(FAULTS.replace("== 3", "== 0"))
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    main(Config(**config | {"resume": True}))
    shutil.copytree(tmp_path / "run", tmp_path / "parts")
    main(Config(**config | {"overwrite": True}))
    for a, b in zip(metrics_of(tmp_path / "run"), metrics_of(tmp_path / "parts"), strict=True):
        assert comparable(a) == pytest.approx(comparable(b), rel=1e-3, abs=1e-4)


# --------------------------------------------------------------------------------------------------------- lost ranks


@pytest.mark.parametrize(
    "fault, said", [("raises", "the reward 'raises' failed on row"), ("killed", "SIGKILL")]
)
def test_a_lost_rank_ends_all(tmp_path, fault, said):
    begun = time.monotonic()
    done = in_two(tmp_path, fault)
    assert done.returncode != 0 and said in done.stderr, done.stderr[-2000:]
    assert (
        time.monotonic() - begun < 90
    )  # the start, and at most 30 s that torchrun leaves to the others
    assert names(tmp_path / "run") == ["step-000001"]


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_keep_last_keeps_the_newest(tiny, tmp_path):
    main(short(tiny, tmp_path, steps=4, save_every=1, keep_last=2))
    assert names(tmp_path) == ["step-000003", "step-000004"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    main(short(tiny, tmp_path, steps=5, save_every=1, keep_last=1, resume=True))
    assert names(tmp_path) == ["step-000005"]


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """Killed while it deletes, keep_last leaves no half of a checkpoint under a good name."""
    checkpoint = tmp_path / "checkpoints/step-000001"
    checkpoint.mkdir(parents=True)
    seen = []
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **_: seen.append((Path(path).name, names(tmp_path)))
    )
    runs.discard(checkpoint)
    assert seen[-1] == (".step-000001", [])


def test_everything_is_synced_before_the_rename_and_the_folder_after(tiny, tmp_path, monkeypatch):
    events, sync, rename = [], os.fsync, Path.rename
    path_of = lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda d: events.append(path_of(d)) or sync(d))
    monkeypatch.setattr(
        Path, "rename", lambda self, to: events.append("rename") or rename(self, to)
    )
    main(short(tiny, tmp_path, steps=1))
    at, folder = events.index("rename"), tmp_path / "checkpoints"
    written = {
        folder / ".step-000001" / p.relative_to(folder / "step-000001")
        for p in folder.glob("step-*/**/*")
    }
    assert written | {tmp_path / "metrics.jsonl", folder / ".step-000001"} <= set(events[:at])
    assert events[at + 1 :] == [folder] and len(written) > 5


def test_a_file_that_cannot_be_written_leaves_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    """A real failure of write(2): no file may grow beyond 1 MB from step 1 on."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = reward_that(
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1])), at_call=3
    )
    monkeypatch.setattr(rewards, "accuracy_reward", full)
    try:
        with pytest.raises((OSError, RuntimeError, runs.SafetensorError)) as error:
            main(short(tiny, tmp_path, save_every=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (note,) = error.value.__notes__
    assert "step 2 could not be written" in note and "step-000001; --resume true" in note
    assert names(tmp_path) == ["step-000001"]
    main(short(tiny, tmp_path, save_every=1, resume=True))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-000001",
        "step-000002",
    ]


def test_a_line_cut_anywhere_is_forgotten(tiny, tmp_path):
    main(short(tiny, tmp_path, steps=1))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write('{"step": 1, "response": "\\\\boxed{5}')  # ends with a brace, is no line
    main(short(tiny, tmp_path, steps=2, resume=True))
    assert [line["step"] for line in metrics_of(tmp_path)] == [0, 1]
    assert all(json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines())


# -------------------------------------------------------------------------------------------------------------- resume


def test_resume_with_other_micro_batches_takes_the_same_steps(tiny, tmp_path, half_right):  # noqa: F811
    """accelerate counts micro-batches: an odd count would end the first update after half of its batch."""
    main(short(tiny, tmp_path / "whole", steps=3))
    main(short(tiny, tmp_path / "parts", steps=1))
    main(short(tiny, tmp_path / "parts", steps=3, resume=True, micro_prompts=1))
    for a, b in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts"), strict=True):
        assert comparable(a) == pytest.approx(comparable(b), rel=1e-3, abs=1e-4)


def test_another_number_of_processes_is_refused_where_it_matters(tmp_path):
    (tmp_path / "state").mkdir()
    for i in range(2):
        (tmp_path / f"state/random_states_{i}.pkl").touch()
    runs.same_processes(Config(), tmp_path, 1)
    runs.same_processes(Config(tsec_scope="batch"), tmp_path, 2)
    with pytest.raises(ValueError, match="had 2 processes, now 1: tsec_scope=batch"):
        runs.same_processes(Config(tsec_scope="batch"), tmp_path, 1)


def test_another_reference_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    out, model = tmp_path / "out", str(tmp_path / "model")
    main(short(model, out, steps=1, kl_coef=0.1))
    main(short(model, out, steps=2, kl_coef=0.1, resume=True))
    shutil.copy(out / "checkpoints/step-000002/model.safetensors", model)
    with pytest.raises(
        ValueError, match="holds other weights than when the run .* began, and kl_coef=0.1"
    ):
        main(short(model, out, steps=3, kl_coef=0.1, resume=True))


def test_other_rows_are_refused(tiny, tmp_path):
    """Exact resume: the order of the data follows from the rows that are there, and from --order."""
    rows, order = tmp_path / "rows.jsonl", tmp_path / "order.json"
    line = json.dumps({"problem": "1 + 1? Answer in \\boxed{}.", "answer": "2"}) + "\n"
    rows.write_text(line * 4)
    order.write_text("[0, 1, 2, 3]")
    data = dict(dataset=str(rows), split="train", image_column="none", intervention="none")

    def run(name, steps, **changes):
        given_order.cache_clear()
        main(short(tiny, tmp_path / name, steps=steps, save_every=1, **data, **changes))

    run("shuffled", 1)
    run("ordered", 1, order=str(order))
    run("shuffled", 2, resume=True)
    order.write_text("[3, 2, 1, 0]")
    with pytest.raises(
        ValueError, match="order.json has other rows than when the run .* put the first ones back"
    ):
        run("ordered", 2, order=str(order), resume=True)
    rows.write_text(line * 5)
    with pytest.raises(
        ValueError, match="rows.jsonl has other rows than when the run .* began: the order would"
    ):
        run("shuffled", 3, resume=True)
    rows.write_text(line * 4)
    run("shuffled", 3, resume=True)


def test_fingerprint_is_exact():
    a, b = (torch.nn.Linear(3, 2).to(torch.bfloat16) for _ in range(2))
    b.load_state_dict(a.state_dict())
    assert runs.fingerprint(a) == runs.fingerprint(b)
    with torch.no_grad():
        b.weight[1, 2] = torch.nextafter(b.weight[1, 2], torch.tensor(9.0, dtype=torch.bfloat16))
    assert runs.fingerprint(a) != runs.fingerprint(b)


# ------------------------------------------------------------------------------------------------------- other faults


def test_a_tracker_that_goes_down_has_not_lost_the_step(tiny, tmp_path, monkeypatch):
    def down(*_, step, **__):
        if step == 1:
            raise ConnectionError("the tracker is down")

    monkeypatch.setattr(Accelerator, "log", down)
    with pytest.raises(ConnectionError, match="the tracker is down"):
        main(short(tiny, tmp_path, save_every=1))
    assert [line["step"] for line in metrics_of(tmp_path)] == [0, 1] and names(tmp_path) == [
        "step-000001"
    ]


def test_an_output_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match="cannot write to --output .*file/run: .*choose another folder"
    ):
        main(short(tiny, tmp_path / "file/run"))


def test_a_row_that_vanishes_is_named(tmp_path, rows):
    for i, row in enumerate(rows):
        row["images"][0].save(tmp_path / f"{i}.png")
    lines = [
        {"images": [f"{i}.png"], "problem": "how many?", "answer": "1"} for i in range(len(rows))
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = load_rows(str(tmp_path / "data.jsonl"))
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match="unreadable image: .*2.png") as error:
        loaded[2]
    assert "row 2" in error.value.__notes__[0]


@pytest.mark.parametrize("processes, kills", [(1, 2), (2, 1)])
def test_killed_runs_end_as_one_that_was_not(tmp_path, processes, kills):
    arguments = [
        "--kills",
        str(kills),
        "--steps",
        "12",
        "--processes",
        str(processes),
        "--seed",
        "5",
    ]
    result = kill.main(
        [*arguments, "--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "kill.json")]
    )
    assert result["kills"] == kills and set(result["different"].values()) == {0}
    states = (tmp_path / "runs/killed/checkpoints/step-000012/state").glob("random_states_*")
    assert len(list(states)) == processes
