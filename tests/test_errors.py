"""runtime/faults.py, launch.py: a fault is one line, the last one, by one process, exit code 2."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, short
from PIL import Image

import train_saei
from runtime import args, faults
from train_saei import load_config


def ends(capsys, main, load=lambda argv: None) -> str:
    """What command_line says on stderr when it ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        args.command_line(load, main)
    assert end.value.code == 2
    return capsys.readouterr().err


def raises(error: BaseException):
    def main(config):
        raise error

    return main


# --------------------------------------------------------------------------------------- one line


@pytest.mark.parametrize(
    "error",
    [
        ValueError("row 3: bad"),
        OSError("row 3: bad"),
        ImportError("row 3: bad"),
        ModuleNotFoundError("row 3: bad"),
        json.JSONDecodeError("row 3: bad", "{", 0),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_fault_is_one_line(capsys, error):
    said = ends(capsys, raises(error))
    assert said.startswith("error: row 3: bad") and said.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyError("x"), FloatingPointError("x")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        args.command_line(lambda argv: None, raises(error))


def test_the_traceback_can_be_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("SAEI_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad"):
        args.command_line(lambda argv: None, raises(ValueError("bad")))
    monkeypatch.setenv("SAEI_TRACEBACK", "0")
    assert ends(capsys, raises(ValueError("bad"))) == "error: bad\n"


def test_what_was_printed_before_comes_before(capfd, monkeypatch):
    """A redirected stdout is written when it is full, or at the end."""
    monkeypatch.setattr(sys, "stdout", os.fdopen(os.dup(1), "w", buffering=10_000))
    monkeypatch.setattr(sys, "stderr", os.fdopen(os.dup(1), "w"))

    def main(config):
        print("skipped row 2")
        raise ValueError("bad")

    with pytest.raises(SystemExit):
        args.command_line(lambda argv: None, main)
    sys.stdout.close()
    assert capfd.readouterr().out == "skipped row 2\nerror: bad\n"


def noted(error: BaseException, note: str) -> BaseException:
    error.add_note(note)
    return error


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("one\n\n  two\r\nthree\tfour"), "one two three four"),
        (ValueError("a\x1b[31mred\x00\u202e"), "a?[31mred??"),
        (ValueError(), "ValueError"),
        (OSError(errno.ENOSPC, "No space left", "out/x"), "out/x: No space left"),
        (OSError("made\nby hand"), "made by hand"),
        (noted(OSError(errno.EIO, "I/O error", "x"), "resume\nit"), "x: I/O error. resume it"),
    ],
)
def test_a_message_is_folded_into_one_line(error, said):
    assert faults.one_line(error) == said


def test_a_long_message_keeps_its_head_and_its_mend():
    text = "file x, row 3: " + "input " * 1000 + "; --bad_rows skip leaves such rows out"
    said = faults.one_line(ValueError(text))
    assert said.startswith("file x, row 3: input") and " ... " in said and len(said) < 650
    assert said.endswith("; --bad_rows skip leaves such rows out")


def test_a_librarys_error_says_how_to_see_where():
    for call, hint in ((lambda: json.loads("{"), True), (lambda: args.number("x"), False)):
        try:
            call()
        except Exception as error:
            assert ("SAEI_TRACEBACK=1 shows where" in faults.explain(error)) == hint


def test_code_without_a_name_is_no_reward_file():
    """jinja runs templates so."""
    try:
        exec("raise ValueError('wrong')", {})
    except ValueError as error:
        assert faults.is_fault(error)


@pytest.mark.parametrize("source", ["import no_such_package", "raise ValueError('my own')"])
def test_an_error_in_ones_own_reward_file_keeps_its_traceback(tiny, tmp_path, source):
    """The traceback names file and line."""
    (tmp_path / "mine.py").write_text(f"{source}\ndef f(completions, **columns): ...\n")
    config = short(tiny, tmp_path / "run", reward=[f"{tmp_path}/mine.py:f:1"])
    with pytest.raises((ImportError, ValueError)) as error:
        args.command_line(lambda argv: config, train_saei.main)
    assert error.traceback[-1].path == tmp_path / "mine.py"


def test_a_missing_reward_file_is_a_fault(tiny, tmp_path, capsys):
    config = short(tiny, tmp_path / "run", reward=["accuracy:1", "nowhere.py:f:1"])
    said = ends(capsys, train_saei.main, lambda argv: config)
    assert "there is no file nowhere.py" in said.splitlines()[-1]


# ------------------------------------------------------------------------------ several processes


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """become(rank): this process is from now on that one of torchrun's."""

    def become(rank: int) -> Path:
        path = tmp_path / "attempt_0" / str(rank) / "error.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        return path

    return become


def test_one_process_says_it_and_the_others_end_with_it(processes, capsys):
    """Whichever is first. All leave the line for the launcher's table."""
    paths = [processes(1)]
    assert ends(capsys, raises(ValueError("row 7"))) == "\nerror: row 7\n"
    for error in (ValueError("row 8"), RuntimeError("Connection closed by peer")):
        paths.append(processes(len(paths) + 1))
        assert ends(capsys, raises(error)) == ""
    for path in paths:
        message = json.loads(path.read_text())["message"]
        assert message["message"] == "error: row 7" and int(message["extraInfo"]["timestamp"])


def test_an_error_of_the_code_is_not_kept_back(processes):
    processes(1)
    with pytest.raises(RuntimeError, match="of the code"):
        args.command_line(lambda argv: None, raises(RuntimeError("of the code")))
    processes(0)
    with pytest.raises(RuntimeError, match="peer"):
        args.command_line(lambda argv: None, raises(RuntimeError("Connection closed by peer")))


def test_a_full_disk_does_not_hide_the_line(processes, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left")

    processes(0)
    monkeypatch.setattr(Path, "write_text", full)
    assert ends(capsys, raises(OSError(errno.ENOSPC, "No space left", "out/x"))) == (
        "\nerror: out/x: No space left\n"
    )


def test_under_our_launcher_the_processes_leave_it_to_the_launcher(processes, monkeypatch, capsys):
    monkeypatch.setenv(faults.LAUNCHER, "1")
    assert ends(capsys, raises(ValueError("bad"))) == "error: bad\n"  # one process: no torchrun
    path = processes(0)
    assert ends(capsys, raises(ValueError("bad"))) == ""
    assert json.loads(path.read_text())["message"]["message"] == "error: bad"


# ------------------------------------------------------------------------------- real command lines


def shell(cwd: Path, *command: object) -> subprocess.CompletedProcess:
    """stdout and stderr together, as on a screen."""
    path = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


ACCELERATE = "accelerate.commands.launch"
PLAIN = ("--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no")
TINY = ("--steps", 2, "--prompts_per_step", 2, "--rollouts", 2, "--adversarial_rollouts", 1)
TINY += ("--max_new_tokens", 3, "--pgd_steps", 1, "--self_check", "false")

# Vanishes at the first step, for the process that has the second row.
VANISHING = """
import os
calls = []

def vanish(completions, **_):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        os.remove(os.environ["PICTURE"])
    return [0.0] * len(completions)
"""


def test_a_fault_of_one_process_of_two_ends_both_with_its_line(tmp_path, monkeypatch):
    """runtime/launch.py: the last line, exit code 2, nothing of the launcher."""
    (tmp_path / "mine.py").write_text(VANISHING)
    monkeypatch.setenv("PICTURE", str(tmp_path / "1.png"))
    rows = ""
    for i in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{i}.png")
        rows += json.dumps({"image": f"{i}.png", "problem": "How many?", "answer": "2"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "order.json").write_text("[0, 1]")
    launch = ("-m", "runtime.launch", "--multi_gpu", "--num_processes", 2, *PLAIN)
    options = ("--dataset", "rows.jsonl", "--order", "order.json", "--output", "out", *TINY)
    options += ("--reward", "accuracy:1", "mine.py:vanish:1")
    done = shell(tmp_path, *launch, ROOT / "train_saei.py", *options)
    assert done.returncode == 2, done.stdout[-3000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("error: ") and "1.png" in last and "row 1" in last
    assert done.stdout.count("error: ") == 1 and "Traceback" not in done.stdout


ABORTING = """
import os
from runtime import faults

faults.say("error: the picture is gone")
os.abort()
"""


def test_a_fault_is_told_by_its_line_also_where_the_process_aborts_at_its_end(tmp_path):
    """As seen: a thread of torch's, the other process gone. The exit code is -6 then, not 2."""
    (tmp_path / "aborts.py").write_text(ABORTING)
    launch = ("-m", "runtime.launch", "--multi_gpu", "--num_processes", 2, *PLAIN)
    done = shell(tmp_path, *launch, "aborts.py")
    assert done.returncode == 2, done.stdout[-3000:]
    assert done.stdout.splitlines()[-1] == "error: the picture is gone"
    assert "Traceback" not in done.stdout


def test_a_script_that_does_not_exist_is_told_by_the_launcher(tmp_path):
    """Python's own exit code is 2 as well, and leaves no line."""
    launch = ("-m", "runtime.launch", "--multi_gpu", "--num_processes", 2, *PLAIN)
    done = shell(tmp_path, *launch, "nowhere.py")
    assert done.returncode == 1 and "nowhere.py FAILED" in done.stdout, done.stdout[-3000:]
    assert "No such file" in done.stdout and "TypeError" not in done.stdout


def test_under_accelerate_two_processes_say_one_line_and_the_table_repeats_it(tmp_path):
    launch = ("-m", ACCELERATE, "--multi_gpu", "--num_processes", 2, *PLAIN)
    done = shell(tmp_path, *launch, ROOT / "train_saei.py", "--eps", 8)
    lines = done.stdout.splitlines()
    assert sum(line.startswith("error: eps=8.0") for line in lines) == 1
    assert lines[-2].startswith("  traceback : error: eps=8.0")
    assert done.returncode == 1  # the launcher's own


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "train_saei"],
        ["-m", ACCELERATE, "--num_processes", 1, *PLAIN, ROOT / "train_saei.py"],
    ],
    ids=["python", "accelerate"],
)
def test_the_demo_starts_from_an_empty_folder(tmp_path, command):
    recipe = ("--config", ROOT / "recipes/elicit.yaml")
    done = shell(tmp_path, *command, *recipe, "--dry_run", "true")
    assert done.returncode == 0 and "120, epochs" in done.stdout, done.stdout[-3000:]
    assert done.stdout.endswith("dry run: nothing was trained or written\n")


def test_evaluation_starts_from_an_empty_folder(tmp_path):
    options = ("--model", "demo/mixed", "--problems", 2, "--samples", 2, "--max_new_tokens", 2)
    done = shell(tmp_path, ROOT / "eval.py", *options, "--output", "out/x")
    assert done.returncode == 0 and (tmp_path / "out/x.json").exists(), done.stdout[-3000:]


# ---------------------------------------------------------------------------- a newcomer's mistakes

ROW = {"image": "0.png", "problem": "How many?", "answer": "2"}
MISTAKES = {
    "misspelt": (["--stepz", "3"], "unknown --stepz: did you mean steps?"),
    "another trainer's": (["--learning_rate", "1e-6"], "here called lr"),
    "an earlier version's": (["--lora_alpha", "16"], "removed: it is 2 * lora_rank"),
    "wrong type": (["--config", "wrong.yaml"], "wrong.yaml, line 2: argument --steps: invalid int"),
    "no recipe": (["--config", "nowhere.yaml"], "/nowhere.yaml cannot be read: No such file"),
    "a recipe elsewhere": (["--config", "recipes/demo.yaml"], f"did you mean {ROOT}/recipes/demo"),
    "eps in levels": (["--eps", "8"], "eps=8.0: it must be at most 1 (L-inf radius, such as 2/255"),
    "no data": (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    "no split": (["--split", "validation"], "unknown split 'validation'"),
    "no columns": (["--dataset", "rows.jsonl", "--columns", "image=photo"], "photo"),
    "a run for a model": (["--model", "held"], "held"),
    "indivisible": (["--prompts_per_step", "7", "--updates_per_step", "2"], "prompts_per_step=7"),
    "no template": (["--template", "boxd", "--dataset", "rows.jsonl"], "template 'boxd'"),
    "no tracker": (["--report_to", "comet_ml"], "comet_ml is not installed: pip install comet_ml"),
    "a run is there": (["--output", "held"], "held already holds a run: --resume continues it"),
    "a file for a folder": (["--output", "rows.jsonl"], "cannot write to --output rows.jsonl"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_newcomers_mistake_is_one_clear_line(tmp_path, monkeypatch, capsys, mistake):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("0.png")
    Path("rows.jsonl").write_text(json.dumps(ROW) + "\n")
    Path("wrong.yaml").write_text("seed: 1\nsteps: many\n")
    Path("held").mkdir()
    Path("held/metrics.jsonl").write_text('{"step": 0}\n')
    words, cause = MISTAKES[mistake]
    monkeypatch.setattr(sys, "argv", ["train_saei.py", *words])
    said = ends(capsys, train_saei.main, load_config).splitlines()
    assert said[-1].startswith("error: ") and cause in said[-1], said[-1]


def test_adapters_without_peft_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(sys, "argv", ["train_saei.py", "--lora_rank", "8"])
    said = ends(capsys, train_saei.main, load_config).splitlines()
    assert said[-1] == "error: lora_rank needs peft: pip install peft"
