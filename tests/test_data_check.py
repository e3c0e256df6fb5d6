"""`metasaug data check`: all that is known of a data set before training."""

import json
import shutil

import pytest

from metasaug import main
from tests.test_datasets import write_class_folders
from tests.test_list_files import make_imagenet_lt, make_inat
from tests.test_own_pictures import SIZES, names_of, paint_classes
from training.data.check import duration_in_words
from training.data.datasets import size_in_words
from training.data.own_pictures import load_folder, load_table
from training.data.splits import SMALL_FOR_A_WHILE


@pytest.fixture
def sea(tmp_path):
    return paint_classes(tmp_path / "sea", SIZES)


def checked(capsys, *arguments: str) -> dict:
    assert main(["data", "check", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_folder_is_described_before_training(sea, capsys):
    # Given four classes of 120 to 4 pictures, when they are checked with no other flag than the folder,
    assert main(["data", "check", "folder", "--data", str(sea), "--start", "none", "--per-class"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    # then the counts are those that training will have, the tail is told in plain words, and so is the cost.
    data = load_folder(sea, small_class=SMALL_FOR_A_WHILE)
    for words in (f"{len(data.train)} training, {len(data.meta)} meta and {len(data.test)} test pictures in 4 classes",
                  "every picture 9 x 6", "2 classes have under 20 training pictures", "known to ±", "squid (2)",
                  "share their meta pictures", "Estimates, from two steps measured here: resnet32", "memory", "disk",
                  "--input-size 32:"):
        assert words in said, said


def test_the_check_counts_what_training_will_use(sea, capsys):
    found = checked(capsys, "folder", "--data", str(sea), "--start", "none")
    data = load_folder(sea, small_class=SMALL_FOR_A_WHILE)
    assert [row["training"] for row in found["per_class"]] == list(data.class_counts)
    assert sum(row["test"] for row in found["per_class"]) == len(data.test)
    assert [row["label"] for row in found["per_class"] if row["meta_is_shared"]] == ["squid"]
    assert found["expected"]["seconds"] > 0
    assert found["expected"]["disk_of_the_pictures"] == pytest.approx(
        sum(path.stat().st_size for path in sea.rglob("*.png")), rel=0.05)


def test_everything_bad_is_named_at_once_and_training_is_said_to_stop(sea, capsys):
    # Given two damaged pictures and an empty class,
    (sea / "fish" / "000.png").write_bytes(b"no picture")
    (sea / "diatom" / "heavy.jpg").touch()
    (sea / "empty").mkdir()
    # when checked, then all three are named and the exit code is 1; with --skip-bad it is 0, and training may begin.
    assert main(["data", "check", "folder", "--data", str(sea)]) == 1
    said = capsys.readouterr().out
    for words in ("3 cannot be used", "fish/000.png", "diatom/heavy.jpg is empty", "empty holds no pictures",
                  "--skip-bad"):
        assert words in said
    assert main(["data", "check", "folder", "--data", str(sea), "--skip-bad", "--quick"]) == 0


def test_a_quick_check_decodes_nothing(sea, capsys):
    (sea / "fish" / "000.png").write_bytes(b"no picture")
    found = checked(capsys, "folder", "--data", str(sea), "--quick")
    assert not found["left_out"]
    assert found["sizes"] is None
    assert found["expected"] is None


def test_copies_across_given_splits_are_named(tmp_path, capsys):
    paint_classes(tmp_path / "train", {"a": 9, "b": 9})
    paint_classes(tmp_path / "test", {"a": 2, "b": 2}, seed=4)
    shutil.copy(tmp_path / "test/b/000.png", tmp_path / "train/b/x.png")
    found = checked(capsys, "folder", "--data", str(tmp_path), "--start", "none")
    assert any("train/b/x.png = test/b/000.png" in note for note in found["notes"])


def test_the_cut_can_be_written_down_for_good(sea, tmp_path, capsys):
    # Given a folder whose cut is written as a table, when the table is loaded, from wherever it is,
    table = tmp_path / "cut.csv"
    assert main(["data", "check", "folder", "--data", str(sea), "--quick", "--write-table", str(table)]) == 0
    # then training, meta and test set are the same, the lent meta pictures included.
    assert names_of(load_table(table, sea)) == names_of(load_folder(sea, small_class=SMALL_FOR_A_WHILE))
    capsys.readouterr()
    assert checked(capsys, "table", "--table", str(table), "--data", str(sea), "--quick")["test"]
    assert main(["data", "check", "folder", "--data", str(sea), "--quick", "--write-table", "/no/such/x.csv"]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["imagenet-lt", "inat17", "inat18"])
def test_the_large_sets_are_checked_in_their_own_formats(tmp_path, capsys, name):
    # Given one of them made small, and one test picture that is a training picture,
    root = make_imagenet_lt(tmp_path) if name == "imagenet-lt" else make_inat(tmp_path, 2000 + int(name[4:]))
    found = checked(capsys, name, "--data", str(root), "--quick")
    # then counts are right, and what is not quick finds the copies (the pictures are drawn by their number).
    assert sum(row["training"] for row in found["per_class"]) == found["training"]
    assert any("Not the whole" in note for note in found["notes"])
    assert main(["data", "check", name, "--data", str(root), "--input-size", "32", "--architecture", "resnet32"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "test pictures are copies of training pictures" in said
    assert "every picture 16 x 12" in said


def test_what_is_no_data_set_is_one_error(tmp_path, capsys):
    assert main(["data"]) == 2
    assert "data check" in capsys.readouterr().err
    for arguments in (["folder", "--data", str(tmp_path)], ["cifar10-lt", "--data", str(tmp_path)],
                      ["table", "--table", str(tmp_path / "x.csv")], ["inat18", "--data", str(tmp_path)]):
        assert main(["data", "check", *arguments]) == 2
        told = capsys.readouterr().err
        assert told.startswith("metasaug data check: ")
        assert "Traceback" not in told


def test_cifar_is_checked_by_content(tmp_path, capsys):
    # Given CIFAR-10 made small, with a test picture among the training pictures, when checked,
    for split, seed in (("train", 0), ("test", 1)):
        write_class_folders(tmp_path / split, {f"c{i}": 30 for i in range(10)}, seed=seed)
    shutil.copy(tmp_path / "test/c1/0000.png", tmp_path / "train/c1/x.png")
    found = checked(capsys, "cifar10-lt", "--data", str(tmp_path), "--imbalance", "4", "--quick")
    # then no picture stands on two sides.
    assert found["copies"] == 0
    assert (found["largest"], found["test"], found["meta"]) == (20, 300, 100)


def test_figures_are_told_in_fitting_units():
    assert [duration_in_words(s) for s in (0.2, 90, 150, 9000, 500_000)] == [
        "a second", "90 seconds", "2.5 minutes", "2.5 hours", "5.8 days"]
    assert [size_in_words(n) for n in (900, 2.5e6, 186e9, 1.2e12)] == ["1 kB", "2.5 MB", "186 GB", "1.2 TB"]
