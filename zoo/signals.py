"""Let signals end a run after its current step, not in the middle of it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives the first SIGINT, SIGTERM or SIGHUP; a second signal has its usual effect at once.

    A signal that is ignored stays ignored: SIGHUP under nohup, SIGINT in a background job of a script.
    """
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def note(number, _frame):
        received.append(number)
        for each, usual in previous.items():
            signal.signal(each, usual)

    try:
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, note)
    except ValueError:  # only the main thread can set handlers
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
