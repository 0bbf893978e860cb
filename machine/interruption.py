"""Stopping a run from outside without losing a step: SIGTERM and Ctrl-C are noted, and obeyed between two steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

EXIT_INTERRUPTED = 75  # of a training that saved and can be resumed: EX_TEMPFAIL of sysexits.h, "try again later"
EXIT_CTRL_C = 130  # of everything else: 128 + SIGINT, as in shells


@contextmanager
def refusals_in_one_line(if_interrupted: str = "nothing was written") -> Iterator[None]:
    """Within, a ValueError, OSError or ImportError (a package that is missing) ends the process with its message in one line and status 1;
    Ctrl-C with status 130."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print(f"interrupted: {if_interrupted}", file=sys.stderr)
        sys.exit(EXIT_CTRL_C)


class RunInterrupted(Exception):
    """A run stopped as asked, after a whole step, and saved it; the message says where."""


class StopRequest:
    """Within `with`, the first SIGTERM or Ctrl-C is noted in `reason` and, unless is_silent, printed; a later Ctrl-C kills the process, a
    later SIGTERM is ignored, as launchers repeat theirs. Does nothing outside the main thread, where Python gets no signals."""

    def __init__(self, is_silent: bool = False) -> None:
        self.reason: str | None = None
        self._is_silent = is_silent
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by other code than Python's

    def _note(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the kernel's: at once, whatever this process is busy with
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.reason = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if not self._is_silent:
            words = f"\n{self.reason}: finishes this step, saves and stops; Ctrl-C leaves at once, without saving\n"
            with suppress(OSError):  # the terminal may be gone
                os.write(2, words.encode())  # not print: this may have interrupted one
