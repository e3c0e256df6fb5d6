"""The processes of a release: one after the other, their output in a log, how far each is, and how it is stopped."""

import ctypes
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.errors import ExportError
from export.release_plan import Work
from training.errors import Interrupted

FIRST_MINUTES, THEN_EVERY = 180, 3600  # seconds after which the time left is told, and between tellings
WINDOW = 600  # seconds of training that the time left is reckoned from


def launched(words: list[str], processes: int) -> list[str]:
    """What Python is given to run `metasaug` with these words, in one process or many."""
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [*many, "-m", "metasaug", *words]


class Children:
    """Runs one command after the other, its output into a log; hands SIGINT, SIGTERM and SIGHUP on, and then stops
    too. What is ignored, as SIGHUP under nohup, stays ignored."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.child: subprocess.Popen | None = None
        self.busy = False  # with a child, or starting one

    def __enter__(self) -> "Children":
        self.usual = {number: signal.signal(number, self._receive)
                      for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                      if signal.getsignal(number) is not signal.SIG_IGN}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: Any) -> None:
        self.received.append(number)
        if self.child is not None:
            self.child.send_signal(number)
        elif not self.busy:
            self._stop_where_asked()

    def run(self, words: list[str], log: Path, says: str, look: Callable[[str], None] = lambda _: None) -> None:
        """Runs Python with these words to its end. ExportError with its own reason, or Interrupted.

        log    what it prints is added to this file      says   with what it begins its error
        look   called every second with the last of its output
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            file.write(f"\n== {time.strftime('%Y-%m-%d %H:%M:%S')}  python {shlex.join(words)}\n".encode())
            file.flush()
            start = file.tell()
            self.busy = True
            # In a session of its own, so that Ctrl-C comes to it once, from us.
            self.child = subprocess.Popen(
                [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=_end_with_us if sys.platform == "linux" else None,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1",
                     "TQDM_MININTERVAL": "5"})
            for number in self.received:  # while it was being started
                self.child.send_signal(number)
            while self.child.poll() is None:
                try:
                    self.child.wait(1)
                except subprocess.TimeoutExpired:
                    look(_end_of(log, start))
        code, self.child, self.busy = self.child.returncode, None, False
        self._stop_where_asked()
        if code:
            raise ExportError(f"{reason(_end_of(log, start, 100_000), code, says)} (all of it: {log})")

    def _stop_where_asked(self) -> None:
        if self.received:
            raise Interrupted("stopped; nothing is lost: the same command goes on.", 128 + self.received[0])


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


def _end_with_us() -> None:
    """In the child: where this process is killed, it gets SIGTERM, saves and leaves the GPU to the next."""
    assert LIBC is not None
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_of(log: Path, start: int, most: int = 4000) -> str:
    with open(log, "rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - most))
        return file.read().decode(errors="replace")


# What torchrun writes after the message of a process that failed and where it names the first; the end of a traceback;
# what a process says that only lost another.
TORCHRUNS = re.compile(r"[IWEF]\d{4} \d\d:|Traceback |={9}|\[rank\d")
ROOT_CAUSE = re.compile(r"Root Cause.*?exitcode +: (-\d+) ", re.DOTALL)
ERROR = re.compile(r"(\[rank\d+\]: )?(?!torch\.distributed\.elastic)[\w.]+(Error|Exception)\b")
LOST = "Another process of this training"


def reason(output: str, code: int, says: str) -> str:
    """Why a command failed, in its own words; of many processes the first to fail."""
    if cause := ROOT_CAUSE.search(output):
        code = int(cause[1])
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (", as the system does where memory runs out" if name == "SIGKILL" else "")
    lines = output.replace("\r", "\n").splitlines()
    told = []
    for number, line in enumerate(lines):
        if line.startswith(f"{says}: "):
            rest = itertools.takewhile(lambda line: not TORCHRUNS.match(line), lines[number + 1 : number + 12])
            told.append("\n".join([line.removeprefix(f"{says}: "), *rest]).strip())
    own = [message for message in told if not message.startswith(LOST)]
    errors = [line for line in lines if ERROR.match(line)] or told or [line for line in lines if line.strip()]
    return own[0] if own else errors[-1].strip() if errors else f"exit code {code}"


# ---- progress ----


class Line:
    """What is told of one cell: a line that changes, on a terminal, and lines that stay."""

    def __init__(self, title: str):
        self.title = title
        self.bar = tqdm(bar_format="{desc}", leave=False, disable=None, dynamic_ncols=True, file=sys.stdout)

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    @property
    def on_terminal(self) -> bool:
        return not self.bar.disable

    def show(self, text: str, always: bool = False) -> None:
        """In the line that changes; where there is no terminal to change it on, only if it is `always` shown."""
        if always and not self.on_terminal:
            self.say(text)
        self.bar.set_description_str(f"{self.title}: {text}")

    def say(self, text: str) -> None:
        self.bar.clear()
        print(f"{self.title}: {text}", flush=True)


STEPS = re.compile(r"(\d+)/(\d+) \[[^\]]*step")


class Gauge:
    """How far a training is, from the progress bar in its log, and how long it will take at the speed measured."""

    def __init__(self, work: Work, tell: Callable[[float, float], str], line: Line, reckoned: str):
        self.work, self.tell, self.line, self.reckoned = work, tell, line, reckoned
        self.seen: deque[tuple[float, float]] = deque()  # when, and seconds' worth of work done then
        self.until: float | None = None  # the next lasting line

    def look(self, output: str) -> None:
        found = STEPS.findall(output)
        if not found:
            return
        step, total = map(int, found[-1])
        now, done = time.monotonic(), self.work.done(step / max(total, 1))
        if not self.seen or done > self.seen[-1][1]:
            self.seen.append((now, done))
        while len(self.seen) > 2 and now - self.seen[1][0] > WINDOW:
            self.seen.popleft()
        self.until = self.until or now + FIRST_MINUTES
        text = f"step {step:,} of {total:,}"
        if step == total:
            return self.line.show(f"{text}, test and export")
        (began, before), (then, after) = self.seen[0], self.seen[-1]
        if after > before:
            pace = (then - began) / (after - before)
            text += f", {self.tell((self.work.total - done) * pace, pace)}"
            if now >= self.until:
                self.until = now + THEN_EVERY if not self.line.on_terminal else math.inf
                self.line.say(f"{text}; at its start {self.reckoned} were reckoned")
        return self.line.show(text)
