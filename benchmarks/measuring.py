"""Side-by-side timing, memory as torch counts it, and the rows that every benchmark prints and writes."""

import itertools
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from training.errors import TrainingError


@dataclass(frozen=True)
class Row:
    """One claim: `ratio` (a plain figure if `unit` is not "x") beside its target."""

    name: str
    ratio: float  # median over the rounds
    low: float  # smallest and largest round
    high: float
    target: float | None
    holds: bool | None
    unit: str
    note: str
    machine: str


def machine(device: torch.device | None = None) -> str:
    """Processor, threads and torch version in words. By default for torch's default device."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    # Another instruction set sums in another order, so a training ends with other bits.
    instructions = torch.backends.cpu.get_cpu_capability()
    on_gpu = (device or torch.get_default_device()).type == "cuda"
    gpu = f"{torch.cuda.get_device_name()}, " if on_gpu else ""
    return f"{gpu}{model} ({instructions}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def side_by_side(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, taken in turn `rounds` times after one round that does not count.

    So a disturbance of the machine affects all steps alike.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            _wait_for_gpu()
            if turn:
                times[name].append(time.perf_counter() - began)
    return times


def _wait_for_gpu() -> None:
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def ratio_row(
    name: str, times: list[float], reference: list[float], target: float | None = None, note: str = ""
) -> Row:
    """The ratio of two steps, round by round."""
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    middle = statistics.median(ratios)
    said = f"{statistics.median(times) * 1e3:.0f} ms against {statistics.median(reference) * 1e3:.0f} ms"
    return Row(name, round(middle, 3), round(min(ratios), 3), round(max(ratios), 3), target,
               None if target is None else middle <= target, "x", f"{said}; {note}" if note else said, machine())


def figure_row(name: str, figure: float, unit: str, target: float | None = None, note: str = "") -> Row:
    return Row(name, round(figure, 3), round(figure, 3), round(figure, 3), target,
               None if target is None else figure <= target, unit, note, machine())


def added_memory(step: Callable[[], object]) -> float:
    """Peak MB that torch allocates within a step, above what it held before. The second step counts.

    torch's own count of its allocations is the same on every machine. It leaves out memory that other libraries take,
    such as the buffers of MKL and cuDNN.
    """
    step()
    if torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0)) / 1e6


def process_memory(what: Literal["peak", "own"], prepare: Callable[..., Callable[[], object]], *arguments) -> float:
    """MB of a process that prepares and takes two steps, as Linux counts them.

    what   peak: VmHWM, mapped files included; own: RssAnon, without them

    prepare(*arguments) makes the data and returns the step. It must be a module's function: the process imports it
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_watched, args=(sender, prepare, arguments, torch.get_num_threads(), what))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _watched(sender, prepare, arguments, threads: int, what: str) -> None:
    torch.set_num_threads(threads)
    step = prepare(*arguments)
    step()
    step()
    field = "RssAnon" if what == "own" else "VmHWM"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    sender.send(int(line.split()[1]) * 1024 / 1e6)


def command(prog: str, measure: Callable[[int], list[Row]]) -> None:
    """The command line of a benchmark: `measure(rounds)` gives its rows."""

    import tyro  # benchmarks.on_gpu imports this module on machines without tyro

    def main(json: bool = False, out: Path | None = None, rounds: int = 7, threads: int | None = None,
             device: Literal["cpu", "cuda"] = "cpu") -> None:
        """Measure side by side, and print each ratio with its spread.

        Args:
            json: One JSON object a line instead of the table.
            out: Write those lines here too.
            rounds: Rounds that count. Each round takes every step once.
            threads: CPU threads. By default torch chooses.
            device: Device to measure.
        """
        if device != "cpu":  # a default device, once set, intercepts every call, even if it is the CPU
            torch.set_default_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        report(measure(rounds), json, out)


    tyro.cli(main, prog=prog)


def report(rows: list[Row], as_json: bool, out: Path | None) -> None:
    """One JSON object a line, or a table; the lines also into `out`."""
    lines = [json.dumps(asdict(row)) for row in rows]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(lines) + "\n")
    if as_json:
        print("\n".join(lines))
        return
    width = max(len(row.name) for row in rows)
    print(rows[0].machine)
    for row in rows:
        reach = "" if row.target is None else f"  to reach {row.target:g} {row.unit}: {'yes' if row.holds else 'NO'}"
        spread = f"({row.low:.2f} to {row.high:.2f})"
        print(f"{row.name:<{width}}  {row.ratio:8.2f} {row.unit:<2} {spread}{reach}   {row.note}")


def filled(page: str, begin: str, end: str, content: str) -> str:
    """The page with `content` between two markers, replacing what was there. Raises TrainingError without markers."""
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise TrainingError(f"the page has no {begin} … {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"
