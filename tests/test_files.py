"""One walk over files: training, data check, evaluate and predict see the same pictures in a messy folder."""

import csv
import json
import os
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from metasaug import main
from tests.messy import messy, odd_pictures, touch
from tests.test_own_pictures import names_of, paint, paint_classes
from training.data.own_pictures import load_folder, load_table
from training.errors import DataError
from zoo.files import walk
from zoo.pixels import LOCAL

pytestmark = pytest.mark.promise("folder")


@pytest.fixture
def locked(monkeypatch):
    """Folders called "locked" that cannot be listed, also where the tests run as root."""
    real = os.scandir

    def scandir(path="."):
        if Path(os.fsdecode(path)).name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_links_are_followed_without_circles(tmp_path):
    # Given a folder with a linked folder, a linked file, links that lead back, and links to nothing,
    touch(tmp_path / "disk", "camera/1.png", "camera/2.png", "one.jpg")
    root = tmp_path / "root"
    touch(root, "a/0.png")
    for name, to in (("b", "disk/camera"), ("a/linked.jpg", "disk/one.jpg"), ("a/up", "root"), ("me", "root"),
                     ("gone.png", "nowhere"), ("unmounted", "nowhere"), ("itself", "root/itself")):
        (root / name).symlink_to(tmp_path / to)
    # then each picture comes once for each way to it, and a link to nothing with its reason, unless a picture's name
    # says what is missing.
    found = list(walk(root))
    assert [name for name, _ in found] == ["a/0.png", "a/linked.jpg", "b/1.png", "b/2.png", "gone.png", "itself",
                                           "unmounted"]
    assert [name for name, reason in found if reason] == ["itself", "unmounted"]
    # Two folders that link to each other end, too.
    (tmp_path / "disk/camera/back").symlink_to(root)
    assert len(list(walk(root))) == len(found)


def test_a_folder_that_cannot_be_listed_comes_with_its_reason(tmp_path, locked):
    touch(tmp_path, "a/1.png", "locked/2.png", "z/3.png")
    assert [name for name, _ in walk(tmp_path)] == ["a/1.png", "locked", "z/3.png"]
    assert "Permission denied" in dict(walk(tmp_path))["locked"]
    assert "cannot be listed" in dict(walk(tmp_path / "locked"))["."]
    assert "cannot be listed" in dict(walk(tmp_path / "nowhere"))["."]


def test_what_is_no_picture_is_counted_by_kind(tmp_path):
    touch(tmp_path, "1.JPG", "a/Thumbs.db", "b/thumbs.db", "a/desktop.ini", "a/@eaDir/1.jpg/SYNO.jpg", "__MACOSX/x.png",
          "._1.JPG", ".git/x.png", "a/1.xmp", "b/labels.csv", "IMG_2.MP4", "noending", "2.heic", "3.NEF")
    passed_over = Counter()
    assert [name for name, _ in walk(tmp_path, passed_over)] == ["1.JPG", "2.heic", "3.NEF"]
    assert passed_over == {"Thumbs.db": 1, "thumbs.db": 1, "desktop.ini": 1, "@eaDir": 1, "__MACOSX": 1, "hidden": 2,
                           ".xmp": 1, ".csv": 1, ".mp4": 1, "without ending": 1}


def test_training_check_evaluate_and_predict_take_the_same_pictures(tiny_model_folder, tmp_path, locked, capsys):
    # Given one messy folder, which holds all that people meet (tests/messy.py),
    root, rows, table = messy(tmp_path / "messy", tmp_path / "disk"), tmp_path / "rows.csv", tmp_path / "table.csv"
    odd = {f"bee/{name}": not is_read for name, (_, is_read) in odd_pictures().items()}
    expected = {name: odd.get(name, name.endswith((".HEIC", ".NEF", "broken.jpg", "gone.png")))
                for name, reason in walk(root) if reason is None}
    readable = sum(not bad for bad in expected.values())
    assert (len(expected), readable) == (30 + len(odd), 26 + 12)

    def of(path: Path) -> dict[str, bool]:
        return {row["path"].removeprefix(f"{root}/"): bool(row["error"])
                for row in csv.DictReader(path.open(encoding="utf-8"))}

    # when it is predicted, then there is a row for each picture and for the folder that cannot be listed,
    assert main(["predict", str(tiny_model_folder), str(root), "--out", str(rows)]) == 1
    assert of(rows) == expected | {"ant/locked": True}
    notes = {row["path"].rpartition("/")[2]: row["note"] for row in csv.DictReader(rows.open(encoding="utf-8"))}
    assert notes["pages.tif"] == "page 1 of 3" and "missing" in notes["no end.jpg"] and not notes["000.png"]
    said = capsys.readouterr().err
    assert all(kind in said for kind in ("1 Thumbs.db", "1 .mp4", "1 @eaDir", "1 __MACOSX", "Passed over"))
    assert "1 TIFFs that have several pages" in said and "2 JPEGs lack their end" in said
    # when it is measured on, then it stops at the same ones, and with --skip-bad measures the rest;
    evaluate = ["evaluate", str(tiny_model_folder), "--data", str(root), "--predictions", str(rows)]
    assert main(evaluate) == 2
    assert "ant/locked" in capsys.readouterr().err
    assert main([*evaluate, "--skip-bad"]) == 0
    assert of(rows) == expected
    said = capsys.readouterr().out
    assert f"on {readable} test pictures" in said and "ant/locked" in said and "1 Thumbs.db" in said and "cat" in said
    # when a table names the pictures (accents as people type them, some without ending), then both take it too;
    lines = [f"{unicodedata.normalize('NFC', name).removesuffix('011.png') + '011' * name.endswith('011.png')},"
             f"{name.partition('/')[0]}" for name in expected]
    table.write_text("\n".join(["image,kind", *lines]) + "\n", encoding="utf-8")
    with_table = ["--table", str(table), "--label-column", "kind"]
    assert main([*evaluate, *with_table, "--skip-bad"]) == 0
    assert of(rows) == expected
    assert main(["predict", str(tiny_model_folder), str(root), *with_table, "--out", str(rows), "--overwrite"]) == 1
    assert of(rows) == expected
    capsys.readouterr()
    # when it is checked or trained on, then they are used, or left out and named, cut-off JPEGs too.
    assert main(["data", "check", "folder", "--data", str(root), "--quick", "--json"]) == 1
    checked = json.loads(capsys.readouterr().out)["left_out"]
    with pytest.raises(DataError, match="ant/locked"):
        load_folder(root)
    data = load_folder(root, skip_bad=True, reading=LOCAL)
    assert set().union(*names_of(data).values()) == {name for name, bad in expected.items() if not bad}
    assert len(load_folder(root, skip_bad=True).left_out) == len(data.left_out) + 2
    bad = [f"{root}/ant/locked", *(name for name, bad in expected.items() if bad), "cat"]
    unseen = ("broken.jpg", *(name.rpartition("/")[2] for name, bad in odd.items() if bad))
    for left_out, known in ((data.left_out, bad), (checked, [name for name in bad if not name.endswith(unseen)])):
        assert len(left_out) == len(known)
        assert all(any(reason.startswith(name) for reason in left_out) for name in known)


def test_accents_are_one_text_in_either_spelling(tmp_path):
    # Given class and file names as macOS stores them, and as others do,
    nfc, nfd = (unicodedata.normalize(form, "Möwe é") for form in ("NFC", "NFD"))
    assert nfc != nfd
    for at, name in ((tmp_path / "mac", nfd), (tmp_path / "other", nfc)):
        for c in (name, "b"):
            for i in range(12):
                paint(at / c / f"{name} {i}.png", [len(c), i])
    mac, other = load_folder(tmp_path / "mac"), load_folder(tmp_path / "other")
    # then classes and cut are the same text, the run may go on elsewhere, and the files open.
    assert mac.label_names == other.label_names == (nfc, "b")
    for part in ("train", "meta", "test"):
        assert [unicodedata.normalize("NFC", n) for n in getattr(mac, part).names] == list(getattr(other, part).names)
        assert all(path.is_file() for path in getattr(mac, part).paths)
    assert mac.identity() == other.identity()


def test_leaf_folders_are_classes_on_request(tmp_path, capsys):
    # Given a tree of orders and species, one name there twice, and one species that is split further,
    sizes = {"Aves/Pica": 9, "Aves/Parus": 8, "Aves/unknown": 7, "Mammalia/Sus": 6, "Mammalia/unknown": 5,
             "Mammalia/Sus/young": 4}
    paint_classes(tmp_path / "tree", sizes)
    # when loaded as usual, then orders are classes, and it is said that the folders go deeper;
    data = load_folder(tmp_path / "tree")
    assert data.label_names == ("Aves", "Mammalia")
    assert any("--leaf-folders" in note and "Aves/Parus" in note for note in data.notes)
    # on request each folder that holds pictures is one, by its own name where that is enough.
    data = load_folder(tmp_path / "tree", leaf_folders=True)
    assert data.label_names == ("Aves/unknown", "Mammalia/unknown", "Parus", "Pica", "Sus", "young")
    assert not any("--leaf-folders" in note for note in data.notes)
    counts = Counter(name.rpartition("/")[0] for name in set().union(*names_of(data).values()))
    assert counts == sizes
    assert main(["data", "check", "folder", "--data", str(tmp_path / "tree"), "--leaf-folders", "--quick"]) == 0
    assert "6 classes" in capsys.readouterr().out
    # Below train/ and test/ the same names are the same classes, and one order alone says what it holds.
    paint_classes(tmp_path / "split/train", sizes)
    paint_classes(tmp_path / "split/test", {"Aves/Pica": 2, "Aves/unknown": 2}, seed=3)
    data = load_folder(tmp_path / "split", leaf_folders=True)
    assert len(data.label_names) == 6 and len(data.untested_classes) == 4
    with pytest.raises(DataError, match=r"one class only.*Pica.*--leaf-folders"):
        paint_classes(tmp_path / "one", {"Aves/Pica": 9, "Aves/Parus": 8})
        load_folder(tmp_path / "one")


def test_where_nothing_is_left_it_is_said_why(tmp_path, capsys):
    # Given data of which nothing, or one class only, can be used, when checked or trained on, however it is asked for,
    touch(tmp_path, *(f"heic/{c}/{i}.heic" for c in "ab" for i in range(3)), *(f"one/b/{i}.heic" for i in range(3)),
          "empty/a/x.txt", "empty/b/x.txt")
    paint_classes(tmp_path / "one", {"a": 6})
    (tmp_path / "t.csv").write_text("path,label\na1,cat\na2,cat\nb1,dog\nb2,dog\n")
    for arguments, words in ((["folder", "--data", "heic"], "a/0.heic"), (["table", "--data", "t.csv"], "does not e"),
                             (["folder", "--data", "one"], "one class only, a"),
                             (["folder", "--data", "empty"], "holds no pictures")):
        arguments[-1] = str(tmp_path / arguments[-1])
        for command in (["data", "check"], ["train"]):
            # then it is one message that says what is wrong.
            assert main([*command, *arguments, "--skip-bad"]) == 2
            said = capsys.readouterr().err
            assert words in said and "Traceback" not in said


def test_a_class_that_is_only_tested_is_named_and_left_out_on_request(tmp_path):
    paint_classes(tmp_path / "train", {"a": 9, "b": 9})
    paint_classes(tmp_path / "test", {"a": 2, "b": 2, "fox": 4}, seed=4)
    with pytest.raises(DataError, match="fox has no usable pictures to train on, and 4 to test on"):
        load_folder(tmp_path)
    data = load_folder(tmp_path, skip_bad=True)
    assert data.label_names == ("a", "b") and len(data.test) == 4
    parts = (("train", {"a": 9, "b": 9}), ("test", {"a": 2, "fox": 4}))
    (tmp_path / "t.csv").write_text("path,label,split\n" + "".join(
        f"{split}/{c}/{i:03d}.png,{c},{split}\n" for split, sizes in parts for c, n in sizes.items() for i in range(n)))
    with pytest.raises(DataError, match="fox"):
        load_table(tmp_path / "t.csv")
    assert load_table(tmp_path / "t.csv", skip_bad=True).label_names == ("a", "b")


def test_evaluate_names_classes_that_the_model_does_not_know(tiny_model_folder, tmp_path, capsys):
    # Given pictures of a class that the model knows, of two that it does not, and an empty folder,
    paint_classes(tmp_path, {"ant": 3, "otter": 2, "yeti": 1})
    (tmp_path / "bee").mkdir()
    evaluate = ["evaluate", str(tiny_model_folder), "--data", str(tmp_path)]
    # then both are named and counted; with --skip-bad the rest is measured; where nothing is left, that is an error.
    assert main(evaluate) == 2
    said = capsys.readouterr().err
    assert "2 classes" in said and "otter: 2" in said and "yeti: 1" in said and "--skip-bad" in said
    assert main([*evaluate, "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert "on 3 test pictures" in said and "otter" in said and "bee" in said
    for picture in (tmp_path / "ant").iterdir():
        picture.unlink()
    assert main([*evaluate, "--skip-bad"]) == 2
    Image.new("RGB", (5, 5)).save(tmp_path / "ant/x.png")
    (tmp_path / "ant/x.png").write_bytes(b"")
    for name in ("otter", "yeti"):
        for picture in (tmp_path / name).iterdir():
            picture.unlink()
    assert main([*evaluate, "--skip-bad"]) == 2
