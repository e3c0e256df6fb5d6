"""Use a GPU that you have for minutes: one command runs tests, step benchmarks, then a protocol's missing cells.

    python -m benchmarks.on_gpu --pack DIR --cifar10 DIR --cifar100 DIR   # here: the pictures to carry there
    python -m benchmarks.on_gpu --minutes 12 --out DIR --data PACK...     # there; run it again to continue
    python -m benchmarks.on_gpu --merge DIR                               # here: rows and models from DIR

It runs from a copied source tree: neither metasaug nor tyro has to be installed there. Every result is written at once.
If the machine goes away, only running work is lost.
"""

import argparse
import functools
import importlib
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import ledger
from benchmarks.picture_pack import find_packs, read_pack, write_pack
from training.data.cifar import cut_pool, find_pool
from training.data.datasets import LongTailed
from training.errors import DataError, Interrupted
from training.recipes import Cifar10LT, Recipe
from training.run.cells import Task, train
from zoo.files import write_atomically
from zoo.machine import cores

HERE = Path(__file__).resolve().parent
PACKING = 30  # seconds of --minutes reserved for the end
MOST_FILES, MOST_BYTES = 8, 16_000_000  # limits of what comes back
# Cells whose model folders come back first: the zoo bundles them (seed 0, imbalance 100).
BUNDLED = [f"{name}/0/{method}" for name in ("cifar10-lt-100", "cifar100-lt-100")
           for method in ("ce", "metasaug", "heldout")]
PARTS = ("tests", "steps", "cells")
ROW, FAILED, RESULTS, STEPS, LOGS = "row.json", "failed.json", "results.json", "steps.jsonl", "logs"
TRIES = 2  # the second one without CUDA graphs


# ---- a worker: one task after the other ----


class Held:
    """The missing cells whose pictures the packs hold, and these pictures."""

    def __init__(self, protocol: ledger.Protocol, data: list[Path]):
        self.pools = {dataset: read_pack(parts) for dataset, parts in find_packs(data).items()}
        self.cells = {cell.folder: cell for cell in protocol.missing() if self.holds(protocol.recipe(cell))}

    def holds(self, recipe: Recipe) -> bool:
        if not (isinstance(recipe, Cifar10LT) and recipe.dataset in self.pools):
            return False
        try:
            self.of(recipe)
        except DataError:
            return False
        return True

    def of(self, recipe: Cifar10LT) -> LongTailed:
        return self._cut(recipe.dataset, recipe.imbalance, recipe.meta_per_class, recipe.subset_seed, recipe.subset)

    @functools.cache  # noqa: B019 -- one for the life of the process
    def _cut(self, dataset: str, *how: Any) -> LongTailed:
        return cut_pool(self.pools[dataset], *how)


def work(protocol: ledger.Protocol, data: list[Path], runs: Path) -> int:
    """Take tasks until none is left.

    If a task fails, the process writes that down and exits: after a CUDA error nothing works in it any more. The next
    process tries the task again, without CUDA graphs.
    """
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    device, held = ledger.choose_device(), Held(protocol, data)
    queue = protocol.queue(held.cells.values(), runs, lambda: map(ledger.cell_of, _rows(held.cells, runs)),
                           may_take=lambda name: len(_failures(runs / name)) < TRIES)
    for task in queue.tasks():
        recipe, failures = task.cell.recipe, _failures(task.folder)
        assert isinstance(recipe, Cifar10LT)
        options = {"graphs": False} if failures else {}
        print(f"== {task.name}", flush=True)
        try:
            trained = train(task, held.of(recipe), device, **protocol.how(recipe), **options)
            if trained is not None:
                _write_model(task, trained)
                row = ledger.row_of(protocol, held.cells[task.cell.name], trained, device)
                write_atomically(task.folder / ROW, json.dumps(row).encode())
        except Interrupted:
            return 0
        except Exception:
            said = traceback.format_exc().splitlines()[-15:]
            failures.append({"task": task.name, "graphs": not failures, "error": said})
            write_atomically(task.folder / FAILED, json.dumps(failures).encode())
            print("\n".join(said), flush=True)
            return 1
    return 0


def _leave_with(parent: int) -> None:
    """If the command was killed, make this worker save and leave the GPU."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def _write_model(task: Task, trained: Any) -> None:
    from training.run.run_folder import write_model
    from training.run.stages import data_of_stage

    recipe, method = task.cell.recipe, task.name.rpartition("/")[2]
    write_model(task.folder / "model", f"{method}-{recipe.dataset}", recipe,
                data_of_stage(recipe, trained.data, 2), trained.state, trained.results,
                command=command_of(recipe))


def command_of(recipe: Recipe) -> str:
    """The `metasaug train` command that trains the same in one run."""
    flags, usual = recipe.to_dict(), type(recipe)().to_dict()
    said = [f"--{name.replace('_', '-')} {value}" for name, value in flags.items() if value != usual[name]]
    return " ".join(["metasaug train", recipe.dataset, "--data DIR", *said])


def _rows(cells: Iterable[str], runs: Path) -> list[dict[str, Any]]:
    return [json.loads((runs / name / ROW).read_text()) for name in cells if (runs / name / ROW).exists()]


def _failures(folder: Path) -> list[dict[str, Any]]:
    file = folder / FAILED
    return json.loads(file.read_text()) if file.exists() else []


# ---- all of it ----


class Session:
    """One session on the GPU: the time that is left, and the results so far."""

    def __init__(self, minutes: float, out: Path, runs: Path, data: list[Path], protocol: Path, workers: int):
        self.began, self.ends = time.monotonic(), time.monotonic() + 60 * minutes - PACKING
        self.out, self.runs, self.data, self.path, self.workers = out, runs, data, protocol, workers
        self.protocol = ledger.Protocol(protocol)
        self.stopped = False
        for folder in (out, runs / LOGS):
            folder.mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_: Any) -> None:
        self.stopped = True

    @property
    def left(self) -> float:
        return 0.0 if self.stopped else self.ends - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)

    def bounded(self, name: str, seconds: float, words: list[str]) -> None:
        """Run Python with these arguments for at most `seconds`. Its output goes to a log, whose end is shown."""
        log = self.runs / LOGS / f"{name}.log"
        with open(log, "wb") as file:
            child = subprocess.Popen([sys.executable, *words], cwd=HERE.parent, stdout=file, stderr=subprocess.STDOUT,
                                     env=_environment(), start_new_session=True)
            ends = time.monotonic() + min(seconds, self.left)
            while child.poll() is None and time.monotonic() < ends and not self.stopped:
                time.sleep(0.2)
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                file.write(f"\nstopped: {name} did not end within {seconds:.0f} s\n".encode())
            child.wait()
        self.say(f"{name}: exit code {child.returncode}; " + " | ".join(_end_of(log, 3)))
        self.pack()

    def train_cells(self) -> None:
        """Run workers on the queue until nothing is left or the time is over; then they save and exit."""
        children: dict[int, subprocess.Popen] = {}
        told: set[str] = set()
        try:
            self._watch(children, told)
        finally:
            _stop(children.values())
        for name, row in sorted(_rows_by_name(self.protocol, self.runs).items()):
            if name not in told:
                self.say(in_words(row))

    def _watch(self, children: dict[int, subprocess.Popen], told: set[str]) -> None:
        """Replace workers that fail, and report each cell when it ends."""
        told.update(_rows_by_name(self.protocol, self.runs))
        to_start, started, looked = self.workers, 0, time.monotonic()
        while self.left > 0 and (children or to_start):
            for _ in range(to_start):
                children[started] = self._worker(started)
                started += 1
            to_start = 0
            time.sleep(0.5)
            for number, child in [*children.items()]:
                if child.poll() is None:
                    continue
                del children[number]
                if child.returncode:  # otherwise no task was left for it
                    self.say(f"worker {number} ended with {child.returncode}: "
                             + " | ".join(_end_of(self.runs / LOGS / f"worker-{number}.log", 2)))
                    to_start += started < 5 * self.workers
            rows = _rows_by_name(self.protocol, self.runs)
            for name in sorted(rows.keys() - told):
                told.add(name)
                self.say(in_words(rows[name]))
                self.pack()
            if time.monotonic() - looked > 60:
                looked = time.monotonic()
                self.say(f"{len(told)} cells done; running: " + ", ".join(self._running()))

    def _worker(self, number: int) -> subprocess.Popen:
        words = ["-m", "benchmarks.on_gpu", "--worker", "--protocol", str(self.path), "--runs", str(self.runs),
                 "--data", *map(str, self.data)]
        with open(self.runs / LOGS / f"worker-{number}.log", "wb") as file:
            return subprocess.Popen([sys.executable, *words], cwd=HERE.parent, stdout=file, stderr=subprocess.STDOUT,
                                    env=_environment(self.workers))

    def _running(self) -> list[str]:
        """Runs whose log grew in the last minute, with their epoch."""
        found = []
        for log in sorted(self.runs.glob("*/*/*/log.jsonl")):
            if time.time() - log.stat().st_mtime < 60 and not (log.parent / ROW).exists():
                epochs = re.findall(rb'^{"epoch": (\d+)', log.read_bytes(), re.MULTILINE)
                found.append(f"{log.parent.relative_to(self.runs)} epoch {len(epochs) and int(epochs[-1])}")
        return found

    # ---- what comes back ----

    def pack(self) -> None:
        """Pack everything so far into at most 8 files of at most 16 MB: figures, logs, models, first stages."""
        rows = _rows_by_name(self.protocol, self.runs)
        failures = [failure for file in sorted(self.runs.glob(f"*/*/*/{FAILED}")) for failure in _failures(file.parent)]
        steps = self.runs / STEPS
        write_atomically(self.out / RESULTS, json.dumps({
            "protocol": self.path.stem, "rows": [*rows.values()], "failures": failures,
            "steps": steps.read_text().splitlines() if steps.exists() else []}, indent=1).encode())
        logs = [*sorted((self.runs / LOGS).iterdir()), *sorted(self.runs.glob("*/*/*/log.jsonl"))]
        _tar(self.out / "logs.tar.gz", logs, self.runs, "gz")
        bundled = [folder for name in BUNDLED if (folder := self.runs / name / "model").is_dir() and name in rows]
        others = [folder for name in rows if name not in BUNDLED and (folder := self.runs / name / "model").is_dir()]
        begun = {cell.folder.rpartition("/")[0] for cell in self.protocol.missing() if cell.folder not in rows}
        first = [folder for group in sorted(begun) if (folder := self.runs / group / "stage1" / "stage1").is_dir()]
        for old in self.out.glob("runs-*.tar"):
            old.unlink()
        # The most valuable come first.
        for number, members in enumerate(_filled([*bundled, *first, *others], MOST_FILES - 2), 1):
            _tar(self.out / f"runs-{number}.tar", members, self.runs)


def _stop(children: Iterable[subprocess.Popen]) -> None:
    """Send SIGTERM, at which workers save. Kill those that do not end in time."""
    children = list(children)
    for child in children:
        child.terminate()
    deadline = time.monotonic() + PACKING / 2
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _environment(processes: int = 1) -> dict[str, str]:
    threads = max(1, cores() // processes)
    return {**os.environ, "PYTHONPATH": str(HERE.parent), "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "30",
            "OMP_NUM_THREADS": str(threads)}


def _rows_by_name(protocol: ledger.Protocol, runs: Path) -> dict[str, dict[str, Any]]:
    return {ledger.cell_of(row).folder: row for row in _rows([cell.folder for cell in protocol.cells], runs)}


def _end_of(file: Path, lines: int) -> list[str]:
    text = file.read_bytes()[-4000:].decode(errors="replace").replace("\r", "\n") if file.exists() else ""
    return [line[:300] for line in text.splitlines() if line.strip()][-lines:]


def in_words(row: dict[str, Any]) -> str:
    """A finished cell on one line."""
    said = f"{ledger.cell_of(row).key}: last {row['error']:.2%}"
    if "best" in row:
        said += (f", best {row['best']['error']:.2%} (epoch {row['best']['epoch']}), "
                 f"mean of last ten {row['mean_of_last_10']:.2%}")
    return f"{said}, {row['seconds']} s"


def _size(path: Path) -> int:
    return sum(file.stat().st_size + 1024 for file in path.rglob("*")) + 10_240


def _filled(folders: list[Path], most: int) -> list[list[Path]]:
    """Fit as many folders as possible into `most` archives, in order."""
    archives: list[list[Path]] = [[]]
    for folder in folders:
        if _size(folder) > MOST_BYTES:
            continue
        if sum(map(_size, [*archives[-1], folder])) > MOST_BYTES:
            if len(archives) == most:
                break
            archives.append([])
        archives[-1].append(folder)
    return [archive for archive in archives if archive]


def _tar(path: Path, members: list[Path], root: Path, compression: str = "") -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as file:  # type: ignore[call-overload]
        for member in members:
            file.add(member, member.relative_to(root))
    if len(buffer.getvalue()) <= MOST_BYTES:
        write_atomically(path, buffer.getvalue())


def session(args: argparse.Namespace) -> None:
    here = Session(args.minutes, args.out, args.runs, args.data, args.protocol, args.workers)
    if "tests" in args.parts:
        here.bounded("tests", 60, ["-m", "pytest", "-m", "gpu", "-k", "cuda", "-v", "-rfs", "--tb=short",
                                   "-p", "no:cacheprovider", "tests/test_devices.py"])
    if "steps" in args.parts:
        here.bounded("steps", 75, ["-m", "benchmarks.on_gpu", "--steps", "--runs", str(args.runs)])
    if "cells" in args.parts:
        with _shared_gpu(args.mps and ledger.choose_device().type == "cuda", here.say):
            here.train_cells()
    here.pack()
    sizes = ", ".join(f"{file.name} {file.stat().st_size / 1e6:.1f} MB" for file in sorted(here.out.iterdir()))
    here.say(f"packed: {sizes}")


@contextmanager
def _shared_gpu(wanted: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Run NVIDIA's multi-process service around the workers, so their kernels run side by side.

    If it does not start, the workers take turns. It changes no setting of the GPU and ends with this command.
    """
    if not wanted:
        yield
        return
    folder = tempfile.mkdtemp(prefix="mps-")
    os.environ |= {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
    try:
        subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, timeout=20, capture_output=True)
        probe = "import torch; print(torch.ones(2, device='cuda').sum().item())"
        subprocess.run([sys.executable, "-c", probe], check=True, timeout=60, capture_output=True)
        say("multi-process service: on")
    except (OSError, subprocess.SubprocessError) as error:
        say(f"multi-process service: off ({error})")
        _end_shared_gpu()
    try:
        yield
    finally:
        _end_shared_gpu()


def _end_shared_gpu() -> None:
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", timeout=20, capture_output=True)
        del os.environ["CUDA_MPS_PIPE_DIRECTORY"], os.environ["CUDA_MPS_LOG_DIRECTORY"]


def step_benchmarks(runs: Path) -> int:
    """Run benchmarks.step_gpu; print one line per row and write the rows."""
    try:
        step_gpu: Any = importlib.import_module("benchmarks.step_gpu")
    except ModuleNotFoundError as error:
        print(f"no step benchmarks: {error}")
        return 1
    import torch

    device = ledger.choose_device()
    if device.type == "cuda":
        torch.set_default_device(device)
    measured = step_gpu.side_by_side

    def told(steps: Any, rounds: int) -> Any:
        """Print each time at once: the session may end before the last row."""
        times = measured(steps, rounds)
        print(", ".join(f"{name} {1e3 * statistics.median(times[name]):.1f} ms" for name in times), flush=True)
        return times

    step_gpu.side_by_side = told
    rows = step_gpu.measure(3)
    write_atomically(runs / STEPS, "\n".join(json.dumps(asdict(row)) for row in rows).encode())
    for row in rows:
        print(f"{row.name}: {row.ratio:g} {row.unit} ({row.low:g} to {row.high:g}; to reach {row.target}); {row.note}")
    return 0


# ---- before and after, here ----


def pack(
    folder: Path, protocol: ledger.Protocol, roots: dict[str, Path], imbalance: float, part_megabytes: float
) -> None:
    """Write a pack for each data set: the pictures of its missing cells at this imbalance."""
    folder.mkdir(parents=True, exist_ok=True)
    for dataset, root in roots.items():
        recipes = {recipe for cell in protocol.missing() if isinstance(recipe := protocol.recipe(cell), Cifar10LT)
                   and (recipe.dataset, recipe.imbalance) == (dataset, imbalance)}
        if recipes:
            for path in write_pack(folder, dataset, find_pool(dataset, root), recipes, round(part_megabytes * 1e6)):
                print(f"{path}  {path.stat().st_size:,} bytes")


def merge(came_back: Path, runs: Path, protocol: ledger.Protocol, results: Path | None = None) -> None:
    """Add the rows to the protocol's results, and the models and first stages to `runs`."""
    found = json.loads((came_back / RESULTS).read_text(encoding="utf-8"))
    ledger.add_rows(results or protocol.results, protocol, found["rows"])
    runs.mkdir(parents=True, exist_ok=True)
    for archive in sorted(came_back.glob("*.tar*")):
        with tarfile.open(archive) as file:
            file.extractall(runs, filter="data")
    for row in found["rows"]:
        print(in_words(row))
    for failure in found["failures"]:
        print(f"FAILED {failure['task']}: {failure['error'][-1]}")
    print(f"{len(found['rows'])} cells in {results or protocol.results}, "
          f"{len(protocol.missing(results))} missing; runs in {runs}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.on_gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12, help="time limit in minutes; it ends before that")
    parser.add_argument("--out", type=Path, help="folder for what comes back")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="parts of packs, or folders of them")
    parser.add_argument("--protocol", type=Path, default=HERE / "paper.toml", help="the list of cells")
    parser.add_argument("--runs", type=Path, help="folder of the runs; by default runs/NAME for NAME.toml")
    parser.add_argument("--workers", type=int, default=6, help="training processes that share the GPU")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to do, in this order")
    parser.add_argument("--mps", action="store_true", help="start NVIDIA's multi-process service for the workers")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="write packs of pictures into DIR, and exit")
    parser.add_argument("--cifar10", type=Path, metavar="DIR", help="with --pack: the pictures")
    parser.add_argument("--cifar100", type=Path, metavar="DIR", help="with --pack: the pictures")
    parser.add_argument("--imbalance", type=float, default=100, help="with --pack: imbalance of the cells to pack for")
    parser.add_argument("--part-megabytes", type=float, default=13, help="with --pack: size of a part in MB")
    parser.add_argument("--merge", type=Path, metavar="DIR", help="take rows and runs from DIR, and exit")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.runs = args.runs or Path("runs") / args.protocol.stem
    if args.worker:
        return work(ledger.Protocol(args.protocol), args.data, args.runs)
    if args.steps:
        return step_benchmarks(args.runs)
    if args.pack:
        roots = {"cifar10-lt": args.cifar10, "cifar100-lt": args.cifar100}
        pack(args.pack, ledger.Protocol(args.protocol), {name: root for name, root in roots.items() if root},
             args.imbalance, args.part_megabytes)
    elif args.merge:
        merge(args.merge, args.runs, ledger.Protocol(args.protocol))
    elif args.out:
        session(args)
    else:
        parser.error("give --out DIR, --pack DIR or --merge DIR")
    return 0


if __name__ == "__main__":
    sys.exit(main())
