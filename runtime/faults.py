"""What is said when options, data, files or packages are wrong: one line, by one process.

    train_saei.py: error: ...     is the last line of the screen, the exit code is 2

Such a fault is a ValueError, OSError or ImportError. Its message says what was found where and what
to do, so a traceback adds nothing: SAEI_TRACEBACK=1 in the environment shows it. Every other error
is one of the code or of a reward function, and keeps its traceback.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

FAULTS = (ValueError, OSError, ImportError)
EXIT_CODE = 2
LAUNCHER = "SAEI_LAUNCHER"  # set by runtime/launch.py, which prints the line itself
HEAD, TAIL = 400, 200  # characters that are kept of a longer message: the mend is at its end
PROJECT = Path(__file__).resolve().parent.parent


def one_line(error: BaseException) -> str:
    """The error's message and notes in printable characters, shortened in the middle."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    text = ". ".join([text or type(error).__name__, *getattr(error, "__notes__", [])])
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    if len(text) > HEAD + TAIL:
        text = f"{text[:HEAD]} ... {text[-TAIL:]}"
    return text


def is_fault(error: BaseException) -> bool:
    """Whether one line says it all.

    False for errors of other kinds, and for those of a --reward file: they are in the user's own
    code, whose line the traceback names.
    """
    if os.environ.get("SAEI_TRACEBACK", "0") not in ("", "0"):
        return False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        # the __name__ of a file that rewards.py loads by runpy.run_path
        if frame.f_globals.get("__name__") == "<run_path>":
            return False
    return isinstance(error, FAULTS)


def explain(error: BaseException) -> str:
    """one_line, and for an error that a library raised how to see where."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = last.startswith(str(PROJECT)) and "site-packages" not in last
    return one_line(error) + ("" if ours else " (SAEI_TRACEBACK=1 shows where)")


# --------------------------------------------------------------------------- several processes


def say(line: str) -> None:
    """Print the line, unless another process of this machine has said one.

    torchrun and accelerate give each process a file for its last message. Their table of failures
    shows it, and runtime/launch.py prints it instead of the table.
    """
    launched = shared_file() is not None
    with contextlib.suppress(OSError):  # a full disk: then each process says it
        if launched and not is_first(line):
            return
    if launched and LAUNCHER in os.environ:
        return
    sys.stdout.flush()
    before = "\n" if launched else ""  # another process's progress bar has not ended its line
    print(f"{before}{line}", file=sys.stderr, flush=True)


def is_first(line: str) -> bool:
    """Leave the line for the launcher and for the other processes, unless one is there."""
    path, error_file = shared_file(), os.environ["TORCHELASTIC_ERROR_FILE"]
    aside = path.with_name(f"said-{os.getpid()}.txt")
    aside.write_text(line)
    first = True
    try:
        os.link(aside, path)  # at once and whole
    except FileExistsError:
        first = False
    content = {"message": path.read_text(), "extraInfo": {"timestamp": str(int(time.time()))}}
    Path(error_file).write_text(json.dumps({"message": content}))
    return first


def said_by_another() -> str | None:
    """The line that a process of this machine has said, if one has."""
    path = shared_file()
    return path.read_text() if path and path.exists() else None


def shared_file() -> Path | None:
    """Where the processes that torchrun or accelerate started on this machine leave a line."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent / "said.txt" if error_file else None
