"""What ends a run, and what is left of it (docs/faults.md): signals, kill -9, full disks."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import (
    ROOT,
    assert_same_run,
    comparable,
    finish,
    launch,
    lines_of,
    metrics_of,
    reward_half,
    short,
    start,
)
from safetensors import SafetensorError

import rewards
import train_saei
from runtime import data
from runtime import run as runs
from train_saei import main


def names(out: Path) -> list[str]:
    return [path.name for path in runs.checkpoints(out)]


def reward_that(action, at_call: int):
    """Half right, with an action at a call. Call 1 is the trial, call 2 step 0, call 3 step 1."""
    calls = []

    def reward(completions, **_):
        calls.append(1)
        if len(calls) == at_call:
            action()
        return reward_half(completions)

    return reward


def train(config: train_saei.Config, number: int = 0, rank: int = 0) -> None:
    """In a process of its own: half right, and in step 1 a signal to the process of that rank."""

    def action() -> None:
        if number and os.environ.get("RANK", "0") == str(rank):
            os.kill(os.getpid(), number)

    rewards.accuracy_reward = reward_that(action, at_call=3)
    main(config)


# --------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_step_and_it_continues_exactly(
    tiny, tmp_path, monkeypatch, whole, number, code
):
    before = signal.getsignal(number)
    send = reward_that(lambda: os.kill(os.getpid(), number), at_call=3)
    monkeypatch.setattr(rewards, "accuracy_reward", send)
    with pytest.raises(SystemExit) as end:
        main(short(tiny, tmp_path, steps=4, save_every=4))
    assert end.value.code == code and signal.getsignal(number) is before
    assert names(tmp_path) == ["step-000002"] and len(metrics_of(tmp_path)) == 2
    monkeypatch.setattr(rewards, "accuracy_reward", reward_half)
    main(short(tiny, tmp_path, steps=4, save_every=4, resume=True))
    assert_same_run(whole, tmp_path)


def test_a_second_signal_ends_at_once_but_its_echo_does_not(monkeypatch):
    exits, now = [], [100.0]
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    signals = runs.Signals(None)
    signals.receive(signal.SIGINT)
    now[0] += 0.5  # a launcher passes on what the terminal sent to all
    signals.receive(signal.SIGTERM)
    assert exits == [] and signals.received == signal.SIGINT
    now[0] += 1.0
    signals.receive(signal.SIGTERM)
    assert exits == [143]
    signals.restore()


def test_the_thread_of_the_signals_ends_with_the_run(monkeypatch):
    """It holds the model. Freed while the interpreter ends, tensors abort the process."""
    watch = runs.Signals._watch

    def slow(self, read_end: int) -> None:
        watch(self, read_end)
        time.sleep(0.3)

    monkeypatch.setattr(runs.Signals, "_watch", slow)
    signals = runs.Signals(None)
    signals.restore()
    assert not signals.watcher.is_alive()


def test_a_run_that_fails_gives_the_signals_back(tiny, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train_saei.rollouts, "grade", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(short(tiny, tmp_path, steps=1))
    assert signal.getsignal(signal.SIGINT) is before and before is not None


def test_a_signal_to_one_process_stops_all_and_one_process_continues(
    tiny, tmp_path, half_right, whole
):
    config = short(tiny, tmp_path, steps=4, save_every=4)
    finish(start(2, train, config, signal.SIGTERM, 1), exit_code=143)
    assert names(tmp_path) == ["step-000002"]
    main(short(tiny, tmp_path, steps=4, save_every=4, resume=True))
    for a, b in zip(metrics_of(tmp_path), metrics_of(whole), strict=True):
        assert comparable(a) == pytest.approx(comparable(b), rel=1e-3, abs=1e-4)


LOST = """
import os, signal
calls = []

def lost(completions, **_):
    calls.append(1)
    if len(calls) >= 3 and os.environ["RANK"] == "1":
        FAULT
    return [0.0] * len(completions)
"""


@pytest.mark.parametrize(
    "fault, said",
    [
        ("raise KeyError('the service is gone')", "the reward 'lost' failed on row"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
    ids=["raises", "killed"],
)
def test_a_lost_process_ends_all(tiny, tmp_path, fault, said):
    (tmp_path / "mine.py").write_text(LOST.replace("FAULT", fault))
    config = short(tiny, tmp_path / "run", save_every=1, reward=[f"{tmp_path}/mine.py:lost:1"])
    options = {k: v for k, v in train_saei.args.flat(config).items() if v is not None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))
    begun = time.monotonic()
    done = launch(2, "train_saei.py", "--config", str(tmp_path / "recipe.yaml"), check=False)
    assert done.returncode != 0 and said in done.stderr, done.stderr[-2000:]
    assert time.monotonic() - begun < 90  # torchrun leaves at most 30 s to the others
    assert names(tmp_path / "run") == ["step-000001"]


def test_a_signal_before_the_first_step_ends_as_ever(tiny, tmp_path, monkeypatch):
    """While the model and the rows are loaded there is nothing to save."""
    before, seen, load = signal.getsignal(signal.SIGTERM), [], train_saei.load_rows

    def listen(*arguments):
        seen.append(signal.getsignal(signal.SIGTERM))
        return load(*arguments)

    monkeypatch.setattr(train_saei, "load_rows", listen)
    main(short(tiny, tmp_path, steps=1))
    assert seen == [before] and signal.getsignal(signal.SIGTERM) == before


# --------------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("processes, kills", [(1, 8), (2, 2)])
def test_killed_runs_end_as_one_that_was_not(tiny, tmp_path, processes, kills):
    """Killed at random moments of steps 0 to 10, every other time while it saves."""
    rng, unfinished, lives = random.Random(5), 0, []
    configs, folder = {}, tmp_path / "killed"
    for name in ("killed", "whole"):
        configs[name] = short(tiny, tmp_path / name, steps=12, save_every=1, keep_last=2)

    def reached(step: int, saving: bool) -> bool:
        assert all(process.is_alive() for process in lives[-1])
        done = 0
        with contextlib.suppress(FileNotFoundError):  # a run that starts again deletes it
            done = (folder / "metrics.jsonl").read_text().count("\n")
        return done >= step and (not saving or bool(list(folder.glob("checkpoints/.step-*"))))

    for i in range(kills):
        configs["killed"].run.resume = (folder / "config.yaml").exists()
        lives.append(start(processes, train, configs["killed"]))
        while not reached(i * 11 // kills, saving=i % 2 == 1):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03 if i % 2 else 0.3))
        for process in lives[-1]:
            process.kill()
            process.join()
        unfinished += len(list(tmp_path.glob("killed/checkpoints/.step-*")))
    assert unfinished or kills < 4
    configs["killed"].run.resume = True
    for config in configs.values():
        finish(start(processes, train, config))
    assert any(life[0].exitcode == -signal.SIGKILL for life in lives)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    states = []
    for name in configs:
        folder = tmp_path / name / "checkpoints/step-000012/state"
        states.append(torch.load(folder / "optimizer.bin")["state"])
        assert len(list(folder.glob("random_states_*"))) == processes
    assert states[0].keys() == states[1].keys() and len(states[0]) > 50
    for k, state in states[0].items():
        assert all(torch.equal(x, states[1][k][name]) for name, x in state.items())


# ----------------------------------------------------------------------------------- checkpoints


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
    remove = lambda path, **_: seen.append((Path(path).name, names(tmp_path)))  # noqa: E731
    monkeypatch.setattr(shutil, "rmtree", remove)
    runs.delete_checkpoint(checkpoint)
    assert seen[-1] == (".step-000001", [])


def test_everything_is_synced_before_the_rename_and_the_folder_after(tiny, tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename

    def listen_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def listen_rename(self, to):
        events.append("rename")
        return rename(self, to)

    monkeypatch.setattr(os, "fsync", listen_fsync)
    monkeypatch.setattr(Path, "rename", listen_rename)
    main(short(tiny, tmp_path, steps=1))
    at, folder = events.index("rename"), tmp_path / "checkpoints"
    written = {folder / ".step-000001", tmp_path / "metrics.jsonl"}
    for path in folder.glob("step-*/**/*"):
        written.add(folder / ".step-000001" / path.relative_to(folder / "step-000001"))
    assert written <= set(events[:at]) and len(written) > 7
    assert events[at + 1 :] == [folder]


def test_a_file_that_cannot_be_written_leaves_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    """A real failure of write(2): no file may grow beyond 1 MB from step 1 on."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))  # noqa: E731
    monkeypatch.setattr(rewards, "accuracy_reward", reward_that(limit, at_call=3))
    try:
        with pytest.raises((OSError, RuntimeError, SafetensorError)) as error:
            main(short(tiny, tmp_path, save_every=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (note,) = error.value.__notes__
    assert "checkpoints/step-000002 could not be written (disk full?): " in str(error.value)
    assert "last good checkpoint" in note and "step-000001. --resume true continues" in note
    assert names(tmp_path) == ["step-000001"]
    main(short(tiny, tmp_path, save_every=1, resume=True))
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000001", "step-000002"]


@pytest.mark.parametrize("content", [None, "", "eps: [", "a\n", "\0"])
def test_a_checkpoint_whose_options_cannot_be_read_is_refused(tiny, tmp_path, content):
    folder = tmp_path / "checkpoints/step-000001"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "config.yaml").write_text(content)
    said = "config.yaml cannot be read, so nothing says with which options the run began"
    with pytest.raises(ValueError, match=said) as error:
        main(short(tiny, tmp_path, resume=True))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_log_that_cannot_be_written_is_named(tiny, tmp_path, monkeypatch, name):
    """/dev/full: a real failure of write(2). No checkpoint yet: there is none to resume from."""
    fill = lambda: ((tmp_path / name).unlink(), (tmp_path / name).symlink_to("/dev/full"))  # noqa: E731
    monkeypatch.setattr(rewards, "accuracy_reward", reward_that(fill, at_call=3))
    said = f"{name} could not be written .disk full.*No space left"
    with pytest.raises(OSError, match=said) as error:
        main(short(tiny, tmp_path))
    assert "There is no checkpoint to resume from" in error.value.__notes__[0]


def test_a_lost_process_is_no_full_disk(tmp_path):
    run = SimpleNamespace(folder=tmp_path)
    with pytest.raises(RuntimeError, match="Connection closed by peer") as error:
        with runs.Run._writing(run, "checkpoints"):
            raise RuntimeError("Connection closed by peer")
    assert not hasattr(error.value, "__notes__")
    with pytest.raises(OSError, match="disk full"), runs.Run._writing(run, "checkpoints"):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    """Also beyond the six digits of a name. What somebody else named is none of the run's."""
    for name in ("999998", "1000000", "999999", "999999-copy", "000003.bak", "best", "12"):
        (tmp_path / f"checkpoints/step-{name}").mkdir(parents=True)
    assert names(tmp_path) == ["step-999998", "step-999999", "step-1000000"]


# ---------------------------------------------------------------------------------------- resume


def test_nothing_to_resume(tiny, tmp_path):
    """An empty folder is refused, as a wrong --output would be. It stays as it was."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    for name in ("empty", "missing", "mine"):
        said = f"nothing to resume in .*{name}: no run has begun there. Start without --resume"
        with pytest.raises(ValueError, match=said):
            main(short(tiny, tmp_path / name, resume=True))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "empty",
        "mine",
        "mine/notes.txt",
    ]


def test_a_run_without_a_checkpoint_starts_again_and_says_so(
    tiny, tmp_path, monkeypatch, capsys, whole
):
    """The same command with --resume true, after a kill before the first checkpoint."""
    stop = reward_that(lambda: 1 / 0, at_call=4)
    monkeypatch.setattr(rewards, "accuracy_reward", stop)
    with pytest.raises(RuntimeError):
        main(short(tiny, tmp_path, steps=4, save_every=4))
    assert len(metrics_of(tmp_path)) == 2 and names(tmp_path) == []
    with pytest.raises(ValueError, match="started with other options .lr: 0.001 -> 0.1"):
        main(short(tiny, tmp_path, steps=4, lr=0.1, resume=True))
    monkeypatch.setattr(rewards, "accuracy_reward", reward_half)
    main(short(tiny, tmp_path, steps=4, save_every=4, resume=True))
    assert f"{tmp_path} has no checkpoint yet: the run starts again at step 0" in (
        capsys.readouterr().out
    )
    assert_same_run(whole, tmp_path)
    failed = tmp_path / "failed"  # in its first step
    monkeypatch.setattr(rewards, "accuracy_reward", reward_that(lambda: 1 / 0, at_call=2))
    with pytest.raises(RuntimeError):
        main(short(tiny, failed, steps=1))
    monkeypatch.setattr(rewards, "accuracy_reward", reward_half)
    main(short(tiny, failed, steps=1, lr=0.1))
    begun = tmp_path / "begun"  # killed even before: there is a lock, and no more
    begun.mkdir()
    (begun / ".lock").touch()
    main(short(tiny, begun, steps=1, resume=True))
    assert names(begun) == ["step-000001"]


def test_a_finished_run_says_so(tiny, tmp_path, capsys):
    main(short(tiny, tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    main(short(tiny, tmp_path, resume=True))  # returns: the exit code is 0
    main(short(tiny, tmp_path, resume=True, steps=1))
    said = capsys.readouterr().out
    assert said.count(f"{tmp_path}: already finished at step 2") == 2
    del before[tmp_path / ".lock"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    with pytest.raises(ValueError, match="started with other options .lr: 0.001 -> 0.1"):
        main(short(tiny, tmp_path, lr=0.1, resume=True))


def test_a_run_ends_with_where_everything_is(tiny, tmp_path, monkeypatch, capsys):
    """The page's command works in the folder in which the run was started."""
    folder = tmp_path / "a run"
    main(short(tiny, folder, steps=1))
    holds = f"{folder} holds metrics.jsonl, samples.jsonl, checkpoints/step-000001. "
    command = f"python -m runtime.report '{folder}'"
    assert capsys.readouterr().out == f"{holds}For the page: {command}\n"
    monkeypatch.chdir(tmp_path)
    main(short(tiny, "a run", steps=1, resume=True))
    command = capsys.readouterr().out.splitlines()[-1].partition("For the page: ")[2]
    assert command == f"PYTHONPATH={ROOT} python -m runtime.report 'a run'"
    command = command.replace("python -m", f"{sys.executable} -m")
    subprocess.run(command, shell=True, check=True)
    assert (folder / "report/index.html").exists()


def test_lines_after_the_checkpoint_may_be_anything(tiny, tmp_path, half_right, whole):
    """A power cut leaves zeros where a file grew."""
    main(short(tiny, tmp_path))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\0\0\0\xff\n{}\n[3]\n{'step': 1}\n")
    main(short(tiny, tmp_path, steps=4, save_every=4, resume=True))
    assert_same_run(whole, tmp_path)


def test_the_default_keep_last_deletes_and_resumes(tiny, tmp_path, half_right, whole):
    settings = dict(save_every=1, keep_last=2)
    main(short(tiny, tmp_path, steps=3, **settings))
    assert names(tmp_path) == ["step-000002", "step-000003"]
    shutil.rmtree(tmp_path / "checkpoints/step-000003")  # as if killed before it was saved
    main(short(tiny, tmp_path, steps=4, resume=True, **settings))
    assert names(tmp_path) == ["step-000003", "step-000004"]
    assert [comparable(x) for x in metrics_of(tmp_path)] == [
        comparable(x) for x in metrics_of(whole)
    ]


def test_overwrite_deletes_what_the_run_wrote_and_nothing_else(tiny, tmp_path):
    main(short(tiny, tmp_path, steps=1))
    written = ["saei/events.out.tfevents.1.host.1.0", "saei/1.5/events.out.tfevents.2.host.1.1"]
    written += ["saei/1.5/hparams.yml", "failed-step-000001-process-1.pt", "eval/after.json"]
    written += ["pictures/step-000777-0-clean.png", ".aim/meta/runs", "trace.json"]
    others = ["notes.txt", "saei/mine.txt", "logs/events.out.tfevents.7", "eval/before.json"]
    others += ["eval/figures/plot.png", "eval/notes.md", "out.log", "model.pt"]
    for name in written + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    main(short(tiny, tmp_path, steps=1, overwrite=True))
    assert [name for name in written + others if (tmp_path / name).exists()] == others
    assert not (tmp_path / "saei/1.5").exists()
    (tmp_path / "saei/mine.txt").unlink()
    main(short(tiny, tmp_path, steps=1, overwrite=True))
    assert not (tmp_path / "saei").exists() and len(metrics_of(tmp_path)) == 1


def test_overwrite_deletes_nothing_if_the_new_run_cannot_begin(tiny, tmp_path, monkeypatch):
    """Data, rewards, model and self-check come first."""
    main(short(tiny, tmp_path / "run", steps=1))
    files = lambda: {  # noqa: E731
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    before, lock = files(), tmp_path / "run/.lock"
    (tmp_path / "empty.jsonl").touch()
    faulty = [(tiny, dict(dataset=str(tmp_path / "empty.jsonl"))), (tmp_path / "none", {})]
    faulty.append((tiny, dict(reward=["accuracy:1", "nowhere.py:f:1"])))
    for model, changes in faulty:
        with pytest.raises((ValueError, OSError)):
            main(short(str(model), tmp_path / "run", overwrite=True, **changes))
        assert files() == before | {lock: lock.read_bytes()}
    monkeypatch.setattr(runs.Policy, "self_check", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(short(tiny, tmp_path / "run", overwrite=True, self_check=True))
    assert files() == before | {lock: lock.read_bytes()}


def test_a_run_leaves_evaluations_that_were_there_before(tiny, tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/baseline.json").touch()
    main(short(tiny, tmp_path, steps=1))
    assert (tmp_path / "eval/baseline.json").exists()


def test_resume_is_exact_and_forgets_lines_after_the_checkpoint(tiny, tmp_path, half_right, whole):
    main(short(tiny, tmp_path))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / name, "a") as file:  # a whole line, and one cut after a brace
            file.write('{"step": 2, "reward": 0.5}\n{"step": 3, "response": "\\\\boxed{5}')
    main(short(tiny, tmp_path, steps=4, save_every=4, resume=True))
    assert_same_run(whole, tmp_path)
    assert lines_of(tmp_path / "samples.jsonl") == lines_of(whole / "samples.jsonl")


def test_resume_with_other_micro_batches_takes_the_same_steps(tiny, tmp_path, half_right, whole):
    """accelerate counts micro-batches: an odd count would end the first update too early."""
    main(short(tiny, tmp_path, steps=1))
    main(short(tiny, tmp_path, steps=4, resume=True, micro_prompts=1))
    for a, b in zip(metrics_of(whole), metrics_of(tmp_path), strict=True):
        assert comparable(a) == pytest.approx(comparable(b), rel=1e-3, abs=1e-4)


def test_a_folder_that_holds_a_run_is_safe(tiny, tmp_path):
    main(short(tiny, tmp_path, steps=1))
    said = "already holds a run: --resume continues it, --overwrite replaces it"
    with pytest.raises(ValueError, match=said):
        main(short(tiny, tmp_path, steps=1))
    with pytest.raises(ValueError, match="started with other options .eps: .* -> 0.5"):
        main(short(tiny, tmp_path, resume=True, eps=0.5))
    saved = tmp_path / "checkpoints/step-000001/config.yaml"
    text = saved.read_text()
    saved.write_text(text + "lora_alpha: 8\nimage_column: picture\nforgotten: 1\n")
    with pytest.raises(ValueError, match="earlier version and cannot be resumed") as error:
        main(short(tiny, tmp_path, resume=True))
    for said in (
        "lora_alpha (removed: it is 2 *",
        "(write --columns image=NAME)",
        "forgotten (rem",
    ):
        assert said in str(error.value)
    saved.write_text(text)
    free = dict(micro_prompts=1, keep_last=3, profile=False, gradient_checkpointing=True)
    main(short(tiny, tmp_path, resume=True, **free))
    (tmp_path / "eval").mkdir()
    for name in ("before.json", "before.jsonl", "after.json"):
        (tmp_path / "eval" / name).touch()
    main(short(tiny, tmp_path, steps=1, overwrite=True))
    assert len(metrics_of(tmp_path)) == 1 and names(tmp_path) == ["step-000001"]
    left = sorted(path.name for path in tmp_path.glob("eval/*"))
    assert left == ["before.json", "before.jsonl"]  # of the model to start from, not of the run


def test_the_steps_of_an_annealed_run_are_not_free(tiny, tmp_path):
    main(short(tiny, tmp_path, steps=1, intervention="noise"))
    with pytest.raises(ValueError, match="steps: 1 -> 2"):
        main(short(tiny, tmp_path, steps=2, intervention="noise", resume=True))


def test_another_reference_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    out, model = tmp_path / "out", str(tmp_path / "model")
    main(short(model, out, steps=1, kl_coef=0.1))
    main(short(model, out, steps=2, kl_coef=0.1, resume=True))
    shutil.copy(out / "checkpoints/step-000002/model.safetensors", model)
    said = "holds other weights than when the run .* began, and kl_coef pulls to them"
    with pytest.raises(ValueError, match=said):
        main(short(model, out, steps=3, kl_coef=0.1, resume=True))


def test_other_rows_are_refused(tiny, tmp_path):
    """What an exact resume needs: the same rows, and the same --order."""
    rows, order = tmp_path / "rows.jsonl", tmp_path / "order.json"
    lines = [json.dumps({"problem": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(4)]
    text = "".join(lines)
    rows.write_text(text)
    order.write_text("[0, 1, 2, 3]")
    settings = dict(dataset=str(rows), split="train", columns=["image=none"], save_every=1)

    def resumed(name, steps, **changes):
        config = short(tiny, tmp_path / name, intervention="none", **settings | changes)
        config.run.steps, config.run.resume = steps, (tmp_path / name).exists()
        main(config)

    resumed("shuffled", 1)
    resumed("ordered", 1, order=str(order))
    said = "{} holds other rows than when the run .* began; put the first ones back"
    edited = text.replace('"answer": "4"', '"answer": "5"')
    for changed in (edited, text + lines[0], "".join(reversed(lines))):
        assert changed != text
        rows.write_text(changed)
        with pytest.raises(ValueError, match=said.format("rows.jsonl")):
            resumed("shuffled", 2)
    rows.write_text(text)
    resumed("shuffled", 2)
    order.write_text("[3, 2, 1, 0]")
    with pytest.raises(ValueError, match=said.format("order.json")):
        resumed("ordered", 2, order=str(order))
    assert [len(metrics_of(tmp_path / name)) for name in ("shuffled", "ordered")] == [2, 1]


def test_fingerprint_is_exact():
    a, b = (torch.nn.Linear(3, 2).to(torch.bfloat16) for _ in range(2))
    b.load_state_dict(a.state_dict())
    assert runs.fingerprint(a) == runs.fingerprint(b)
    with torch.no_grad():
        b.weight[1, 2] = torch.nextafter(b.weight[1, 2], torch.tensor(9.0, dtype=torch.bfloat16))
    assert runs.fingerprint(a) != runs.fingerprint(b)


# ---------------------------------------------------------------------------------- other faults


def test_a_tracker_that_goes_down_has_not_lost_the_step(tiny, tmp_path, monkeypatch):
    def down(*_, step, **__):
        if step == 1:
            raise ConnectionError("the tracker is down")

    monkeypatch.setattr(Accelerator, "log", down)
    with pytest.raises(ConnectionError, match="the tracker is down"):
        main(short(tiny, tmp_path, save_every=1))
    assert [line["step"] for line in metrics_of(tmp_path)] == [0, 1]
    assert names(tmp_path) == ["step-000001"]


def test_an_output_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    said = "cannot write to --output .*file/run: .*choose another folder"
    with pytest.raises(ValueError, match=said):
        main(short(tiny, tmp_path / "file/run"))


def test_a_row_that_vanishes_is_named(tmp_path, rows):
    lines = []
    for i, row in enumerate(rows):
        row["images"][0].save(tmp_path / f"{i}.png")
        lines.append({"images": [f"{i}.png"], "problem": "how many?", "answer": "1"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = data.load_rows(str(tmp_path / "data.jsonl"))
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match="row 2 was usable at the start.*image: .* no 2.png"):
        loaded[2]
