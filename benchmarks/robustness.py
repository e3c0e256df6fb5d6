"""Write docs/robustness.md, which shows which promises hold, from a run of their tests.

    make test-long                                            # runs them, then
    python -m benchmarks.robustness build/robustness.xml      # writes benchmarks/results/robustness.json and the page

Tests name their promise by `pytest.mark.promise(key)`, and what they measured by the fixture `figure`.
"""

import json
import platform
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import tyro

from zoo.files import write_atomically
from zoo.machine import cores

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "robustness.json", ROOT / "docs" / "robustness.md"

# Each promise with its target.
PROMISES = {
    "no code": ("No code runs from a weight file", "no pickle path in zoo.load; training state opens with "
                "weights_only=True; pickles named like weights are refused"),
    "wrong bytes": ("Wrong bytes never load", "10,000 changed model folders: none loads, each is one error"),
    "onnx": ("An untrusted ONNX file stays within its file and its limits", "only listed operators, no external data, "
             "a trial run with limits of time and memory"),
    "parity": ("ONNX equals torch", "all test pictures, batches of 1, 3 and 7: logits within 1e-4, the same class"),
    "pictures": ("Any picture gives a result or one clear error",
                 "10,000 changed pictures: no crash, each under 3 s and 512 MB"),
    "pixels": ("The correct pixels", "orientation, colours, transparency, 16 bits, pages follow written rules; "
               "anything that is not read is named"),
    "folder": ("One bad file never ends a folder run", "1,000 good and 200 bad pictures: 1,200 rows, the good ones "
               "exact to the digit; all commands list the same pictures"),
    "resume": ("A killed run continues to bit-identical results", "50 kills at random moments"),
    "checkpoint": ("A checkpoint is never half written", "cut or flipped anywhere, disk full: falls back with a "
                   "message, nothing left over"),
    "divergence": ("Divergence stops a run", "NaN or infinity stops it before the update"),
    "processes": ("Several processes train the same as one", "within 1e-10; a dead one ends the others in 60 s"),
    "cache": ("Many processes share one cache", "8 processes, a failing server: correct bytes or an error in 60 s"),
    "demo": ("The demo is safe and bounded", "each attack is answered plainly; memory grows by less than 50 MB"),
    "load": ("The demo under load", "50 clients for 2 minutes on 2 cores: no error except busy"),
    "archives": ("Archives are safe", "zip bombs, names that leave the folder, links, encryption: refused, nothing "
                 "written"),
}


def main(junit: tyro.conf.Positional[Path]) -> None:
    """Write the results and the page from pytest's report.

    Args:
        junit: The file of pytest's --junitxml.
    """
    found = collected(junit)
    write_atomically(RESULTS, (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(PAGE, page(found).encode())
    print(f"{PAGE.relative_to(ROOT)} and {RESULTS.relative_to(ROOT)} written")


def collected(junit: Path) -> dict[str, Any]:
    """The tests of each promise: how they ended, how long they took and what they measured."""
    promises: dict[str, list[dict[str, Any]]] = {key: [] for key in PROMISES}
    for case in ET.parse(junit).iter("testcase"):
        said = [(p.get("name"), p.get("value", "")) for p in case.iter("property")]
        outcome = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        for key in (value for name, value in said if name == "promise"):
            promises[key].append({
                "test": f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}", "outcome": outcome,
                "seconds": round(float(case.get("time", 0)), 1),
                "figures": [value for name, value in said if name == "figure"],
                "memory_mb": [json.loads(value) for name, value in said if name == "memory_mb"]})
    return {"cores": cores(), "python": platform.python_version(), "machine": platform.machine(),
            "promises": promises}


def page(found: dict[str, Any]) -> str:
    """The text of docs/robustness.md."""
    lines = [
        "# Robustness", "",
        "Each promise has tests: a short form in `make test`, the full form in `make test-long`, which writes this "
        "page", "(benchmarks/robustness.py). "
        f"Last run: {found['cores']} cores, {found['machine']}, Python {found['python']}.", "",
        "| promise | target | reached | tests | minutes |", "|---|---|---|---|---|"]
    attacks = []
    for key, (promise, asked) in PROMISES.items():
        tests = found["promises"][key]
        figures = [figure for test in tests for figure in test["figures"]]
        passed = sum(test["outcome"] == "passed" for test in tests)
        failed = [test["test"] for test in tests if test["outcome"] in ("failure", "error")]
        skipped = sum(test["outcome"] == "skipped" for test in tests)
        reached = "**not reached**: " + ", ".join(failed) if failed else "yes" if passed else "not run"
        counts = f"{passed} passed" + f", {len(failed)} failed" * bool(failed) + f", {skipped} skipped" * bool(skipped)
        lines.append(f"| {promise} | {asked} | {'; '.join([reached, *figures])} | {counts} | "
                     f"{sum(test['seconds'] for test in tests) / 60:.1f} |")
        attacks += [(name, memory) for test in tests for each in test["memory_mb"] for name, memory in each.items()]
    if attacks:
        lines += ["", "## Memory of the demo under each attack", "",
                  "Resident memory in MB: at the start, after a quarter, half and three quarters of the attack, at its "
                  "end, and the", "peak (sampled every half second).", "",
                  "| attack | start | 25 % | 50 % | 75 % | end | peak |", "|---|---|---|---|---|---|---|"]
        for name, memory in attacks:
            at = [memory[round(part * (len(memory) - 1) / 4)] for part in range(5)]
            lines.append(f"| {name} | {' | '.join(map(str, at))} | {max(memory)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.robustness")
