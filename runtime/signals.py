"""SIGTERM and SIGINT (Ctrl-C) end a run after its step. A second one ends it at once.

Python runs a signal's handler between two instructions of the main thread, so not while that one is
inside of a long kernel or waits for a process that is gone. Therefore the signal's number also goes
through a pipe to a thread, which says what happens now and ends the process at the second signal.
"""

import os
import signal
import threading
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """received: this process's first signal or 0.   agreed: one that any process got, or 0

    A signal within a second of the first counts as the same: a launcher passes on what its
    processes got as well.
    """

    def __init__(
        self, accelerator: Accelerator, on_first: Callable[[int], None] = lambda number: None
    ):
        """on_first: called with the number of the first signal, in a thread."""
        self.accelerator, self.on_first = accelerator, on_first
        self.received, self.agreed, self.when = 0, 0, None
        self.before = {number: signal.signal(number, self._note) for number in NUMBERS}
        read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.wakeup_before = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        watch = {"target": self._watch, "args": (read_end,), "name": "signals", "daemon": True}
        self.watcher = threading.Thread(**watch)
        self.watcher.start()

    def _note(self, number: int, _frame: object = None) -> None:
        self.received = self.received or number

    def _watch(self, read_end: int) -> None:
        with open(read_end, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):  # of any signal that has a handler, not of ours alone
                if byte[0] in NUMBERS:
                    self.receive(byte[0])

    def receive(self, number: int) -> None:
        """What a signal does: the first one calls on_first, a second one ends the process."""
        self._note(number)
        if self.when is None:
            self.when = time.monotonic()
            self.on_first(number)
        elif time.monotonic() - self.when > 1:
            os._exit(128 + number)

    def asked(self) -> bool:
        """Whether any process got a signal. All must call it, and all get the same answer."""
        mine = torch.tensor([self.received], device=self.accelerator.device)
        self.agreed = int(self.accelerator.gather(mine).max())
        return self.agreed > 0

    def restore(self) -> None:
        """From now on the signals do what they did before.

        The thread holds the accelerator, and so the model. If it ended later than the main thread,
        it would free tensors while the interpreter ends, which aborts the process.
        """
        if self.write_end is not None:
            signal.set_wakeup_fd(self.wakeup_before)
            for number, handler in self.before.items():
                signal.signal(number, handler)
            os.close(self.write_end)  # ends the thread
            self.write_end = None
            self.watcher.join(timeout=1)  # not for ever: it may be writing to a lost terminal

    def leave_to_parent(self) -> None:
        """In a forked child: a signal ends it as ever, and does not count as the parent's."""
        signal.set_wakeup_fd(-1)
        for number in NUMBERS:
            signal.signal(number, signal.SIG_DFL)
