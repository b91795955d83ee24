"""One writer per folder: the lock that a run holds from before its first write until it ends.

It is a flock on folder/.lock, which the kernel drops when its process ends, however it ends. The
file says who holds it. Some file systems keep flocks to one node or have none. There a second run
cannot be refused. It writes its name into the file, and the first one ends before its next write,
because the file names another run (`check`). So the lines of two runs never mix.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds: a process that was killed, or has just got a signal, needs a moment
PATIENCE = 600.0  # seconds that a process which was told to stop has to finish its step and save
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


class FolderLock:
    """Call `attempt` until it is True. Then the folder is this process's until `release`."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / ".lock"
        self.begun, self.waiting = time.monotonic(), False
        self.descriptor, self.held = None, False
        self.mutex = threading.Lock()  # a thread marks the file while the main one checks it
        self.name = {"pid": os.getpid(), "host": socket.gethostname()}
        self.name["since"] = time.strftime("%Y-%m-%d %H:%M:%S")

    def attempt(self) -> bool:
        """Whether the folder is locked now, which makes it if need be.

        False: its holder was told to stop, and saves. Raises ValueError if the holder goes on, or
        has not ended in PATIENCE; OSError if the file cannot be written.
        """
        if self.descriptor is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse(self.read())
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._warn(f"the file system has no locks ({error.strerror})")
        else:
            if self.read().get("host", self.name["host"]) != self.name["host"]:
                self._warn("its last run, on another host, did not say that it ended")
        self._write(self.name)
        self.held = True
        return True

    def _refuse(self, holder: dict[str, Any]) -> None:
        stopping, seconds = holder.get("stopping", False), time.monotonic() - self.begun
        process = f"process {holder.get('pid', '(unknown)')} on {holder.get('host', 'some host')}"
        pid = holder.get("pid", "it")
        if stopping and seconds > PATIENCE:
            raise ValueError(
                f"{self.folder} is in use: {process} was told to stop and has not ended in "
                f"{PATIENCE / 60:.0f} minutes. Wait for it, or end it with kill -9 {pid}"
            )
        if stopping and not self.waiting:
            self.waiting = True
            print(
                f"{self.folder}: {process} finishes its step and saves. Waiting for it, at most "
                f"{PATIENCE / 60:.0f} minutes",
                file=sys.stderr,
                flush=True,
            )
        if not stopping and seconds > GRACE:
            raise ValueError(
                f"{self.folder} is in use: {process} has been writing to it since "
                f"{holder.get('since', '(unknown)')}. Take another --output, wait for it, or stop "
                f"it with kill {pid}, which saves a checkpoint first"
            )

    def _warn(self, why: str) -> None:
        line, before = f"warning: {self.folder}: {why}", self.read()
        if before:
            process = f"process {before['pid']} on {before['host']}"
            line += f". If {process} still runs, it ends before its next write"
        print(line, file=sys.stderr, flush=True)

    def read(self) -> dict[str, Any]:
        """What the file says: pid, host, since, stopping; nothing after an orderly end.

        By its name, not by the descriptor, so that a network file system looks again.
        """
        with contextlib.suppress(ValueError), self.mutex:
            found = json.loads(self.path.read_text())
            return found if isinstance(found, dict) and {"pid", "host"} <= found.keys() else {}
        return {}

    def _write(self, content: dict[str, Any] | None) -> None:
        text = json.dumps(content).encode() if content else b""
        with self.mutex:
            os.pwrite(self.descriptor, text, 0)
            os.ftruncate(self.descriptor, len(text))

    def mark_stopping(self) -> None:
        """Tell a process that waits for the folder that this one will end soon."""
        if self.held:
            self._write(self.name | {"stopping": True})

    def check(self) -> None:
        """Raise OSError if another run has taken the folder, or the folder is gone."""
        try:
            found = self.read()
        except FileNotFoundError as error:
            raise OSError(
                f"{self.path} is gone: was the folder deleted? This run ends, and writes nothing"
            ) from error
        if any(found.get(key) != value for key, value in self.name.items()):
            other = f"process {found.get('pid', '(unknown)')} on {found.get('host', 'some host')}"
            raise OSError(
                f"{self.folder} was taken by {other}. This run ends, and writes nothing more"
            )

    def release(self) -> None:
        """Leave the folder to others. The file stays: a deleted one could be held unseen."""
        if self.descriptor is not None:
            with contextlib.suppress(OSError):  # taken, or deleted
                if self.held:
                    self.check()
                    self._write(None)
            self.close()

    def close(self) -> None:
        """Without a word to others: for a forked child, which must not keep the parent's lock."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor, self.held = None, False
