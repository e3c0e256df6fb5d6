"""Measure the demo: start time, answer time, memory, and answers to 50 clients at once.

    python -m benchmarks.app --out benchmarks/results/app.jsonl
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tyro

from benchmarks import load
from benchmarks.measuring import Row, figure_row, machine, report

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ("metasaug-cifar10-lt", "ce-cifar10-lt")


@contextmanager
def demo(*flags: str) -> Iterator[tuple[subprocess.Popen, str, float]]:
    """Start a demo. Yields the process, its address, and the seconds from start to first whole page."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "app.py", "--port", "0", *flags], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert process.stdout is not None
        address = next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        urllib.request.urlopen(address, timeout=60).read()
        yield process, address, time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def main(out: Path | None = None, rounds: int = 5, seconds: float = 120) -> None:
    """Measure the demo on this machine.

    Args:
        out: Write one JSON object a line here.
        rounds: Number of starts, and tens of answers. Their medians are reported.
        seconds: How long 50 clients send requests, in seconds.
    """
    starts, worked = [], []
    for _ in range(rounds):
        with demo() as (process, _, waited):
            starts.append(waited)
            worked.append(cpu_seconds(process))
    rows = [spread("start to first page", starts, "s", 3.0, "process, imports and page; median of starts"),
            spread("the same in CPU time", worked, "s", 3.0, "what it would be with a core to itself")]
    copies = [str(ROOT / "zoo" / "weights" / name) for name in BUNDLED]
    with demo(*copies) as (process, address, _):
        uploaded = load.upload(address, load.EXAMPLES / "ship.jpg")
        four = [*BUNDLED, *(f"{name} (yours)" for name in BUNDLED)]
        for name in four:
            load.ask(address, uploaded, model=name)
        rows.append(figure_row("memory, four models loaded", memory(process, "VmRSS"), "MB", 600, "resident"))
        answers = [timed(address, uploaded) for _ in range(10 * rounds)]
        rows.append(spread("/predict, 32 pixels", [1000 * s for s in answers], "ms", 100,
                           "as a client on the same machine sees it, queue and HTTP included"))
        outcome = load.fifty_clients(address, seconds)
        rows.append(figure_row(f"50 clients, {seconds:g} s: broken or wrong", len(outcome.broken) + outcome.wrong, "",
                               0, f"{outcome.right:,} correct, {outcome.busy:,} refused as busy, median answer "
                                  f"{statistics.median(outcome.seconds or [0]):.2f} s"))
        rows.append(figure_row("memory after them, at its peak", memory(process, "VmHWM"), "MB", 600, "resident"))
    report(rows, False, out)


def spread(name: str, figures: list[float], unit: str, target: float, note: str) -> Row:
    middle = statistics.median(figures)
    return Row(name, round(middle, 2), round(min(figures), 2), round(max(figures), 2), target, middle <= target, unit,
               note, machine())


def timed(address: str, uploaded: str) -> float:
    began = time.perf_counter()
    told, answer = load.ask(address, uploaded)
    assert answer is not None, told
    return time.perf_counter() - began


def cpu_seconds(process: subprocess.Popen) -> float:
    user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def memory(process: subprocess.Popen, field: str) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.app")
