"""The benchmarks count what they say, and the docs state what they wrote."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks import large, measuring, prior, robustness  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def docs_row(row: dict, on_gpu: bool = False) -> str:
    """A line of the table in docs/method.md; nothing was asked of a GPU."""
    reach = "none" if row["target"] is None else f"≤ {row['target']:g} {row['unit']}".replace(" x", " ×")
    figure = f"{row['ratio']:.2f} ×" if row["unit"] == "x" else f"{row['ratio']:.0f} {row['unit']}"
    spread = "" if row["low"] == row["high"] else f"{row['low']:.2f} to {row['high']:.2f}"
    return f"| {row['name']} | {figure} | {spread} |" + ("" if on_gpu else f" {reach} |")


@pytest.mark.parametrize("name", ["meta_step", "head"])
def test_the_docs_state_what_the_benchmarks_wrote(name):
    docs = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for line in (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert docs_row(row) in docs
        assert row["holds"] in (True, None), row


def test_the_docs_state_what_another_machine_took():
    docs = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    lines = (ROOT / "benchmarks/results/meta_step_other.jsonl").read_text().splitlines()
    assert lines and all(docs_row(json.loads(line), on_gpu=True) in docs for line in lines)


def test_the_docs_state_what_an_estimated_prior_gains():
    docs = (ROOT / "docs" / "predict.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "benchmarks/results/prior.json").read_text())
    for row in rows:
        assert (f"| `{row['model']}` | {row['frequencies']} | {row['pictures']:,} | {row['own']:.1%} | "
                f"{row['estimated']:.1%} | {row['true']:.1%} |") in docs
    # The page's advice: it helps wherever the frequencies are not what the model assumes.
    gains = {(row["model"], row["frequencies"]): row["own"] - row["estimated"] for row in rows}
    assert all(gain > 0.01 for (_, name), gain in gains.items() if name in ("the reverse of training",
                                                                            "three classes only"))


def test_prior_draws_test_sets_of_the_stated_frequencies():
    labels = np.repeat(np.arange(4), [50, 40, 30, 20])
    for p in prior.frequencies(4).values():
        at = prior.drawn(labels, p / p.sum(), np.random.default_rng(0))
        have = np.bincount(labels[at], minlength=4)
        assert len(set(at.tolist())) == len(at) and np.allclose(have / have.sum(), p / p.sum(), atol=0.02)


def test_the_docs_state_what_a_gpu_took():
    docs = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/meta_step_gpu.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and all("H100" in row["machine"] and docs_row(row, on_gpu=True) in docs for row in rows)


def test_the_page_on_large_sets_states_what_its_benchmark_wrote():
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "large.jsonl").read_text().splitlines()]
    docs = (ROOT / "docs" / "large_sets.md").read_text(encoding="utf-8")
    assert large.with_table(docs, rows) == docs


def test_the_benchmark_of_large_sets_takes_real_steps(tmp_path, monkeypatch):
    # Given a set of the same kind, but small,
    small = dataclasses.replace(large.SET, classes=30, train_pictures=900, test_pictures=60)
    monkeypatch.setattr(large, "SET", small)
    monkeypatch.setattr(large, "FEATURES", 16)
    counts = large.class_counts()
    assert counts.sum() == 900 and counts[-1] == 2 and (np.diff(counts[1:]) <= 0).all()
    large.write_features(tmp_path)
    # when each method's step is taken, then the last layer moves, and the features are read from the disk.
    for name in ("plain", "ISDA", "MetaSAug"):
        with monkeypatch.context() as patch:
            grads: list = []
            patch.setattr(torch.optim.SGD, "step", lambda self, grads=grads: grads.extend(
                p.grad for p in self.param_groups[0]["params"]))
            large.step_of(name, tmp_path, 32)()
        assert grads[0].norm() > 0 and grads[1].norm() > 0, name
    # What it projects is arithmetic: 437,513 x 200 epochs / 938 a second are 26 hours.
    (row,) = (row for row in large.stage_1_rows(10) if row.name == "stage 1 of inat18, A100 TF32")
    assert row.ratio == pytest.approx(437_513 * 200 / 938 / 3600, abs=1e-3)


def test_steps_are_taken_in_turn_and_the_first_round_does_not_count():
    # Given two steps that leave their names, when timed over three rounds,
    taken = []
    times = measuring.side_by_side({"a": lambda: taken.append("a"), "b": lambda: taken.append("b")}, 3)
    # then they took turns, four times, of which three count.
    assert taken == ["a", "b"] * 4
    assert [len(t) for t in times.values()] == [3, 3]


def test_a_ratio_is_taken_round_by_round():
    # Given a machine that was twice as slow in the second of three rounds,
    row = measuring.ratio_row("x", [2.0, 4.0, 3.0], [1.0, 2.0, 1.0], target=2.5)
    # then the ratio does not see it.
    assert (row.ratio, row.low, row.high, row.holds) == (2.0, 2.0, 3.0, True)


def test_added_memory_sees_what_a_step_takes():
    # Given a step that holds 4 MB, then 8 beside them, then 4 again, on top of data that were there before,
    data = torch.ones(1000, 1000)

    def step():
        other = data + 1
        return (torch.cat([other, data]).sum() + other.sum() + torch.ones(1000, 1000).sum()).item()

    # then it takes 12 MB: whatever the machine, the allocator or the data.
    assert measuring.added_memory(step) == pytest.approx(12, abs=0.1)


def test_the_page_on_robustness_tells_what_the_tests_measured_and_what_failed(tmp_path):
    # Given what pytest writes of two promises, one of them broken, and of tests that show none,
    def case(name: str, inside: str, *said: tuple[str, str]) -> str:
        properties = "".join(f"<property name='{key}' value='{value}'/>" for key, value in said)
        return (f"<testcase classname='tests.test_x' name='{name}' time='30'><properties>{properties}</properties>"
                f"{inside}</testcase>")

    (tmp_path / "junit.xml").write_text("<testsuites><testsuite>" + "".join([
        case("a[1]", "", ("promise", "archives"), ("figure", "9 bombs refused")),
        case("b", "<skipped/>", ("promise", "archives")),
        case("c", "<failure/>", ("promise", "demo"), ("memory_mb", '{"bodies": [100, 140, 160, 150, 120]}')),
        case("d", "")]) + "</testsuite></testsuites>")
    # when the page is made, then it says what was reached, by which figures, what failed and what did not run.
    found = robustness.collected(tmp_path / "junit.xml")
    page = robustness.page(found)
    assert "| yes; 9 bombs refused | 1 passed, 1 skipped | 1.0 |" in page
    assert "| **not reached**: test_x::c | 0 passed, 1 failed | 0.5 |" in page
    assert page.count("| not run | 0 passed | 0.0 |") == len(robustness.PROMISES) - 2
    assert "| bodies | 100 | 140 | 160 | 150 | 120 | 160 |" in page
    # Every promise has a test that carries its name.
    marked = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert all(f'promise("{key}")' in marked for key in robustness.PROMISES)


def test_the_page_on_robustness_is_that_of_its_results():
    if not robustness.RESULTS.exists():
        pytest.skip("make test-long was not run yet")
    assert robustness.PAGE.read_text(encoding="utf-8") == robustness.page(json.loads(robustness.RESULTS.read_text()))
