"""The ledger: its cells differ by the method alone, none is run twice, and the docs state what was run."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from benchmarks import ledger

ROOT = Path(__file__).resolve().parent.parent


def test_within_a_set_and_seed_all_cells_share_one_stage_1():
    for protocol in map(ledger.Protocol, sorted(ledger.HERE.glob("*.toml"))):
        for name, seed in {(cell.set, cell.seed) for cell in protocol.cells}:
            group = [cell for cell in protocol.cells if (cell.set, cell.seed) == (name, seed)]
            assert len({protocol.recipe(cell).stage1_key() for cell in group}) == 1
        assert len(set(protocol.cells)) == len(protocol.cells)


def test_the_pages_state_what_was_run():
    # Given the committed results, when the pages are made anew, then they are the committed pages.
    for path, text in ledger.pages().items():
        assert path.read_text(encoding="utf-8") == text, path.name
    # And every cell is one of its protocol's.
    for protocol in map(ledger.Protocol, sorted(ledger.HERE.glob("*.toml"))):
        assert set(map(ledger.cell_of, ledger.rows_in(protocol.results))) <= set(protocol.cells)


def test_the_figure_has_a_line_for_each_set_and_method():
    cells = json.loads(ledger.RESULTS.read_text())["cells"]
    fewer = [cell for cell in cells if cell["set"] != "plankton"]
    drawn, without, committed = (np.asarray(Image.open(io.BytesIO(content)).convert("L"), np.float64) for content in (
        ledger.shift_figure(cells), ledger.shift_figure(fewer), ledger.PAGE.with_name("shift.png").read_bytes()))
    # The committed picture is what the results draw, to the smoothing of letters; with a line less it is another one.
    assert drawn.shape == committed.shape
    assert np.abs(drawn - committed).mean() < np.abs(drawn - without).mean() / 10


def made_up(method: str, seed: int, error: float) -> dict:
    return {"set": "x", "method": method, "seed": seed, "data": "stripes", "imbalance": 7, "epochs": 4,
            "macro_error": error, "worst_class_error": error, "groups": {"head": 0.9, "medium": 0.5, "tail": 0.1}}


def test_differences_are_paired_by_seed():
    # Given two methods whose error varies far more by the seed than by the method,
    cells = [made_up("isda", 0, 0.10), made_up("isda", 1, 0.30), made_up("metasaug", 0, 0.09),
             made_up("metasaug", 1, 0.28)]
    # when they are set side by side, then the spread of the difference is not that of the errors.
    line = next(line for line in ledger.tables(cells, "macro_error").splitlines() if line.startswith("| `metasaug`"))
    assert line.startswith("| `metasaug` | 2 | 18.50 ± 9.50 | -1.50 ± 0.50 | – |")
    # A seed that the other does not have counts for neither.
    line = ledger.tables([*cells, made_up("isda", 2, 0.5)], "macro_error").splitlines()[4]
    assert line.startswith("| `isda` | 3 | 30.00 ± 11.55 | – | +1.50 ± 0.50 |")
    # The report on one method has the same pairs, and where in the tail they differ.
    cells[2]["groups"]["tail"], cells[3]["groups"]["tail"] = 0.13, 0.15
    (line,) = ledger.comparison(cells, "macro_error", "metasaug").splitlines()[2:]
    assert line == ("| stripes, imbalance 7, 4 epochs | 2 | -1.50 ± 0.50 | +0.00 ± 0.00 | – | +0.00 ± 0.00 | "
                    "+0.00 ± 0.00 | +4.00 ± 1.00 |")


def test_a_cell_is_run_once_from_the_shared_stage_1(tmp_path, monkeypatch):
    # Given a protocol of two tiny cells on ten class folders of stripes,
    from tests.test_datasets import write_class_folders

    for part, count, seed in (("train", 12, 0), ("test", 2, 1)):
        write_class_folders(tmp_path / part, {f"c{i}": count for i in range(10)}, seed=seed)
    listed = tmp_path / "ledger.toml"
    listed.write_text("""metric = "macro_error"
[methods]
ce = { augment = "none", class_weights = "none" }
metasaug = { augment = "metasaug" }
[sets.tiny]
train_pictures = 80
[sets.tiny.recipe]
dataset = "cifar10-lt"
architecture = "resnet8"
imbalance = 2
epochs = 2
meta_per_class = 2
batch_size = 20
[[cells]]
set = "tiny"
seeds = [3]
methods = ["ce", "metasaug"]
""")
    results = tmp_path / "ledger.json"
    # when the first is run, and then the rest, and then all again,
    ledger.run(tmp_path, runs=tmp_path / "runs", results=results, limit=1, protocol=listed)
    first = json.loads(results.read_text())["cells"]
    ledger.run(tmp_path, runs=tmp_path / "runs", results=results, protocol=listed)
    both = json.loads(results.read_text())["cells"]
    ledger.run(tmp_path, runs=tmp_path / "runs", results=results, protocol=listed)
    # then each ran once, the second began after stage 1, and its log says how far S moved.
    assert [row["method"] for row in both] == ["ce", "metasaug"]
    assert both[0] == first[0]
    assert json.loads(results.read_text())["cells"] == both
    assert [line["epoch"] for line in both[1]["stage2_log"]] == [2]
    assert both[1]["stage2_log"][0]["shift"] > 0
    log = (tmp_path / "runs" / "tiny" / "3" / "metasaug" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [2]


def test_the_page_on_data_states_how_good_the_automatic_choice_was():
    # Given what `metasaug train folder --data DIR` wrote, and the ledger's cells on the same cut,
    config = json.loads((ledger.RESULTS.parent / "plankton-automatic.json").read_text())["metasaug"]
    assert config["command"] == "metasaug train folder --data DIR"
    cells = {row["method"]: row for row in json.loads(ledger.RESULTS.read_text())["cells"]
             if row["set"] == "plankton" and row["seed"] == 0}
    assert sum(config["class_counts"]) == ledger.Protocol().set_of(ledger.Cell("plankton", "ce", 0))["train_pictures"]
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    # then the page has those figures, and the choice lies within 2 points of the best that was set by hand.
    automatic = config["results"]["macro_error"], config["group_accuracy"]
    for error, groups in (automatic, *((cells[m]["macro_error"], cells[m]["groups"]) for m in ("metasaug", "isda"))):
        assert f"| {error:.2%} | ".replace("%", " %") + " | ".join(
            f"{groups[group]:.1%}".replace("%", " %") for group in ("head", "medium", "tail")) in page
    assert automatic[0] <= min(row["macro_error"] for row in cells.values()) + 0.02
