"""One writer per folder, and what ends a run: real processes, real signals (docs/faults.md)."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, assert_same_run, metrics_of, short, start

import train_saei
from runtime import lock as locks
from runtime import run as runs
from runtime.lock import FolderLock
from train_saei import main

# A reward that waits in step 1 until the file `go` is there (its first call is the trial). Before,
# it starts the grader's worker and forks two children: none may keep the folder's lock.
WAITS = """
import os, time
from pathlib import Path
import rewards

here, calls = Path(__file__).parent, []

def waits(completions, **_):
    calls.append(1)
    if len(calls) == 3 and not (here / "go").exists():
        if os.environ.get("RANK", "0") == "0":
            same = rewards.accuracy_reward([r"\\\\boxed{x^2 - 1}"], [r"(x - 1)(x + 1)"])
            pids = [os.getpid(), rewards._worker.process.pid]
            for _ in range(2):
                if (child := os.fork()) == 0:
                    time.sleep(120)
                    os._exit(0)
                pids.append(child)
            (here / "aside").write_text(" ".join(map(str, pids)))
            (here / "aside").rename(here / "waiting")
        while not (here / "go").exists():
            time.sleep(0.05)
    return [i % 2.0 for i in range(len(completions))]
"""


def waiting_config(tiny: str, folder: Path, **changes) -> train_saei.Config:
    """A run in folder/run that waits in its second step."""
    (folder / "mine.py").write_text(WAITS)
    settings = dict(steps=4, save_every=9, reward=[f"{folder}/mine.py:waits:1"])
    return short(tiny, folder / "run", **settings | changes)


def begin(
    config: train_saei.Config, folder: Path, launcher: tuple[str, ...] = (), screen: int = -1
) -> subprocess.Popen:
    """train_saei.py in a process group of its own, as a terminal starts it.

    screen: a file number. -1: of folder/log0, the next one of folder/log1
    """
    options = {k: v for k, v in train_saei.args.flat(config).items() if v not in (None, [])}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(options))
    with open(folder / f"log{len(list(folder.glob('log*')))}", "w") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, "train_saei.py", "--config", str(folder / "recipe.yaml")],
            cwd=ROOT,
            env=os.environ | {"ACCELERATE_USE_CPU": "true"},
            stdout=log if screen < 0 else screen,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


ONE = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
ONE += ("--mixed_precision", "no", "--dynamo_backend", "no")
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def wait_until(condition, seconds: float = 150):
    begun = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - begun < seconds
        time.sleep(0.02)
    return found


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def waiting(folder: Path) -> list[int]:
    """The pids of the training process, its grading worker and two children, once it waits."""
    return [int(pid) for pid in wait_until(lambda: read(folder / "waiting")).split()]


def alive(pid: int) -> bool:
    stat = read(Path(f"/proc/{pid}/stat"))
    return bool(stat) and stat.rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(autouse=True)
def nothing_left(tmp_path):
    yield
    for pid in read(tmp_path / "waiting").split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def whole_waiting(tiny, tmp_path_factory):
    """The folder of the same run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "go").touch()
    main(waiting_config(tiny, folder))
    return folder / "run"


# ------------------------------------------------------------------------------- real processes


def test_ctrl_c_under_the_launcher_and_resume_at_once(tiny, tmp_path, whole_waiting, monkeypatch):
    """The launcher ends at once. The training process saves unseen, and the resume waits for it."""
    launcher = begin(waiting_config(tiny, tmp_path), tmp_path, ONE)
    pid, _, child, _ = waiting(tmp_path)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(60) != 0 and alive(pid) and not alive(child)
    resumed = begin(waiting_config(tiny, tmp_path, resume=True), tmp_path)
    said = f"process {pid} on {os.uname().nodename} finishes its step and saves. Waiting for it"
    wait_until(lambda: said in read(tmp_path / "log1"))
    assert alive(pid) and resumed.poll() is None and len(metrics_of(tmp_path / "run")) == 1
    (tmp_path / "go").touch()
    assert resumed.wait(60) == 0
    wait_until(lambda: not alive(pid))
    first = read(tmp_path / "log0")
    line = f"SIGINT: finishing step 2, saving; Ctrl-C again to stop at once (or kill {pid})"
    assert line in first and first.count("stopped after step 2; --resume true continues") == 1
    last = first.partition("KeyboardInterrupt")[2]  # the launcher's traceback
    assert f"the launcher has ended, process {pid} has not: finishing step 2" in last
    assert "checkpoints/step-000002. For the page: python -m runtime.report" in last
    assert_same_run(whole_waiting, tmp_path / "run")


def test_two_processes_under_the_launcher_save_at_ctrl_c(tiny, tmp_path):
    launcher = begin(waiting_config(tiny, tmp_path), tmp_path, TWO)
    pid, *_ = waiting(tmp_path)
    os.killpg(launcher.pid, signal.SIGINT)
    wait_until(lambda: json.loads(read(tmp_path / "run/.lock")).get("stopping"))
    (tmp_path / "go").touch()
    assert launcher.wait(60) != 0 and not alive(pid)
    said = read(tmp_path / "log0")
    assert said.count("finishing step 2, saving; Ctrl-C again to stop at once") == 1
    assert "The launcher waits 30 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT), then kills." in said
    assert [path.name for path in runs.checkpoints(tmp_path / "run")] == ["step-000002"]
    assert read(tmp_path / "run/.lock") == ""


def test_a_run_whose_screen_is_gone_still_saves(tiny, tmp_path):
    """`... 2>&1 | tee log`: Ctrl-C ends tee first."""
    config = waiting_config(tiny, tmp_path)
    read_end, write_end = os.pipe()
    process = begin(config, tmp_path, screen=write_end)
    os.close(write_end)
    waiting(tmp_path)
    os.close(read_end)
    process.send_signal(signal.SIGINT)
    (tmp_path / "go").touch()
    assert process.wait(60) == 130
    assert [path.name for path in runs.checkpoints(tmp_path / "run")] == ["step-000002"]


def test_a_second_command_is_refused_and_a_dead_process_is_not_in_the_way(
    tiny, tmp_path, monkeypatch
):
    """Its pid is named, nothing of its folder is changed, and kill -9 frees the folder."""
    monkeypatch.setattr(locks, "GRACE", 0.1)
    config = waiting_config(tiny, tmp_path)
    (process,) = start(1, main, config)
    pid, worker, child, other = waiting(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert pid == process.pid and len(before) > 4
    for changes in ({}, {"resume": True}, {"overwrite": True}):
        said = f"run is in use: process {pid} on .* has been writing to it since 20.* kill {pid}, "
        with pytest.raises(ValueError, match=said) as error:
            main(waiting_config(tiny, tmp_path, **changes))
        assert "\n" not in str(error.value)
    for path, content in before.items():
        assert path.read_bytes() == content
    os.kill(child, signal.SIGTERM)  # as a pool of processes ends its workers
    wait_until(lambda: not alive(child), 5)
    assert "stopping" not in read(tmp_path / "run/.lock")  # that was not for the run
    assert alive(worker)
    process.kill()
    process.join()
    assert alive(other)
    begun, lock = time.monotonic(), FolderLock(tmp_path / "run")
    wait_until(lock.attempt, 3)
    assert time.monotonic() - begun < 1
    lock.release()
    (tmp_path / "go").touch()
    main(waiting_config(tiny, tmp_path, resume=True))
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_run_without_its_launcher_keeps_the_folder(tiny, tmp_path, monkeypatch):
    """kill -9 of the launcher. `kill` of the process that the message names ends it with a save."""
    launcher = begin(waiting_config(tiny, tmp_path), tmp_path, ONE)
    pid, *_ = waiting(tmp_path)
    launcher.kill()
    launcher.wait()
    monkeypatch.setattr(locks, "GRACE", 0.1)
    with pytest.raises(ValueError, match=f"is in use: process {pid} "):
        main(waiting_config(tiny, tmp_path, overwrite=True))
    os.kill(pid, signal.SIGTERM)
    (tmp_path / "go").touch()
    main(waiting_config(tiny, tmp_path, resume=True))  # waits for it
    wait_until(lambda: not alive(pid))
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3]
    assert [path.name for path in runs.checkpoints(tmp_path / "run")] == [
        "step-000002",
        "step-000004",
    ]


HANGS = """
import torch
from runtime.signals import Signals
signals = Signals(None, lambda number: print("told", number, flush=True))
print("ready", flush=True)
torch.linalg.matrix_power(torch.eye(2000), 2**60 - 1)  # minutes in one call
"""


def test_a_second_signal_ends_a_process_that_hangs_in_a_kernel():
    """Python runs no handler there, so the first one is said and the second one acts elsewhere."""
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "told 2\n"
    time.sleep(1.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130  # it would end with 0 by itself


# --------------------------------------------------------------------------------- the lock alone


def held(folder: Path) -> FolderLock:
    lock = FolderLock(folder)
    assert lock.attempt()
    return lock


def test_a_lock_says_who_holds_it_and_is_free_after_release(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "GRACE", 0.0)
    first, second = held(tmp_path), FolderLock(tmp_path)
    assert first.read() == first.name and first.name["pid"] == os.getpid()
    first.check()
    time.sleep(0.01)
    with pytest.raises(ValueError, match=f"in use: process {os.getpid()} on .*, which saves a ch"):
        second.attempt()
    second.release()  # it does not hold the lock: the first one's name stays
    assert first.read() == first.name
    first.release()
    assert (tmp_path / ".lock").read_text() == "" and FolderLock(tmp_path).attempt()


def test_one_that_stops_is_waited_for_with_a_bound(tmp_path, monkeypatch, capfd):
    first, second = held(tmp_path), FolderLock(tmp_path)
    first.mark_stopping()
    first.check()
    monkeypatch.setattr(locks, "GRACE", 0.0)
    assert [second.attempt() for _ in range(3)] == [False] * 3
    assert capfd.readouterr().err.count("finishes its step and saves. Waiting for it") == 1
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    said = f"was told to stop and has not ended in 0 minutes.* kill -9 {os.getpid()}"
    with pytest.raises(ValueError, match=said):
        second.attempt()
    first.release()
    assert second.attempt()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 3}', "\0\0\0", "é\n"])
def test_an_unreadable_lock_file_is_no_reason_to_write(tmp_path, monkeypatch, content):
    first = held(tmp_path)
    (tmp_path / ".lock").write_text(content)
    monkeypatch.setattr(locks, "GRACE", -1.0)
    with pytest.raises(ValueError, match="is in use: process .unknown. on some host"):
        FolderLock(tmp_path).attempt()
    with pytest.raises(OSError, match="was taken by process .unknown. on some host"):
        first.check()


def test_a_name_that_a_dead_process_left_is_no_obstacle(tmp_path, capfd):
    name = FolderLock(tmp_path).name | {"pid": 1, "stopping": True}
    (tmp_path / ".lock").write_text(json.dumps(name))
    assert held(tmp_path).read()["pid"] == os.getpid() and capfd.readouterr().err == ""


def test_two_hosts_on_a_file_system_whose_locks_are_each_host_s_own(tmp_path, monkeypatch, capfd):
    """The second one cannot be refused. The first one ends before it writes another line."""
    first = FolderLock(tmp_path)
    first.name |= {"host": "node1", "pid": 77}
    assert first.attempt()
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    second = held(tmp_path)
    said = capfd.readouterr().err
    assert "its last run, on another host, did not say that it ended. If process 77 on nod" in said
    with pytest.raises(OSError, match=f"was taken by process {os.getpid()} on .*nothing more"):
        first.check()
    first.release()  # not its folder any more
    second.check()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capfd):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first, second = held(tmp_path), held(tmp_path)
    assert capfd.readouterr().err.count("warning: ") == 2
    second.check()
    first.name["pid"] += 1  # as of another process
    with pytest.raises(OSError, match="was taken by"):
        first.check()

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"):
        FolderLock(tmp_path).attempt()


def test_a_run_whose_folder_was_taken_or_deleted_writes_nothing(tiny, tmp_path, monkeypatch):
    """It is checked before a step is logged, and before a checkpoint is saved."""
    taken = {"pid": 1, "host": "node2", "since": "now"}

    def take(*_, **__):
        (tmp_path / ".lock").write_text(json.dumps(taken))

    log, sample = runs.Run.log, runs.Run.log_samples
    monkeypatch.setattr(runs.Run, "log", lambda *inputs: (take(), log(*inputs)))
    with pytest.raises(OSError, match="was taken by process 1 on node2"):
        main(short(tiny, tmp_path, steps=1))
    assert metrics_of(tmp_path) == []
    assert json.loads((tmp_path / ".lock").read_text()) == taken
    monkeypatch.setattr(runs.Run, "log", log)
    monkeypatch.setattr(runs.Run, "log_samples", lambda *inputs: (sample(*inputs), take()))
    with pytest.raises(OSError, match="was taken by process 1 on node2"):
        main(short(tiny, tmp_path, steps=1, resume=True))
    assert len(metrics_of(tmp_path)) == 1 and not (tmp_path / "checkpoints").exists()
    gone = lambda *inputs: (sample(*inputs), (tmp_path / ".lock").unlink())  # noqa: E731
    monkeypatch.setattr(runs.Run, "log_samples", gone)
    with pytest.raises(OSError, match="lock is gone: was the folder deleted"):
        main(short(tiny, tmp_path, steps=1, overwrite=True))


def test_a_run_that_ends_or_fails_leaves_the_folder_to_others(tiny, tmp_path, monkeypatch):
    signal.set_wakeup_fd(-1)
    main(short(tiny, tmp_path, steps=1))
    assert FolderLock(tmp_path).attempt() and (tmp_path / ".lock").stat().st_size > 0
    monkeypatch.setattr(train_saei.rollouts, "grade", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        main(short(tiny, tmp_path / "failed", steps=1))
    assert held(tmp_path / "failed") and error.value.__traceback__  # which keeps the run alive
    assert runs.open_runs == [] and signal.set_wakeup_fd(-1) == -1
    names = lambda: [thread.name for thread in threading.enumerate()]  # noqa: E731
    wait_until(lambda: "signals" not in names(), 5)


def test_all_processes_raise_what_the_main_one_found(tmp_path, monkeypatch):
    said = ValueError("found by the main process")
    monkeypatch.setattr(runs, "broadcast_object_list", lambda result: [said])
    run = SimpleNamespace(is_main=False, folder=tmp_path)
    with pytest.raises(ValueError, match="found by the main process"):
        runs.Run._on_main(run, lambda: 1 / 0)
