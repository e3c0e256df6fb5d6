"""Tables as people share them: COCO JSON, lists of benchmarks, ids without ending, R's NA, odd encodings."""

import json
import unicodedata

import pytest

from tests.test_own_pictures import SIZES, paint_classes, rows_of, write_table
from training.data.own_pictures import load_table
from training.data.tables import list_table
from training.errors import DataError
from zoo.listing import pictures_of
from zoo.tables import Columns, pictures_in_table, read_table


@pytest.fixture(scope="module")
def sea(tmp_path_factory):
    return paint_classes(tmp_path_factory.mktemp("data") / "sea", SIZES)


def coco(folder, images, annotations, categories):
    path = folder / "coco.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories}))
    return path


def test_coco_as_camera_traps_are_shared(sea):
    # Given images with places and sequences, annotations (some twice, for two animals in a picture), and categories,
    files = [(f"{c}/{i:03d}.png", k) for k, (c, n) in enumerate(SIZES.items()) for i in range(n)]
    images = [{"id": f"im{i}", "file_name": file, "location": i // 10, "seq_id": f"s{i // 3}"}
              for i, (file, _) in enumerate(files)]
    annotations = [{"id": 2 * i + twice, "image_id": f"im{i}", "category_id": k, "bbox": [0, 0, 1, 1]}
                   for i, (_, k) in enumerate(files) for twice in range(2)]
    table = coco(sea, images, annotations, [{"id": k, "name": c} for k, c in enumerate(SIZES)])
    # when listed, then each picture stands once, under its class, grouped by place, or by sequence where that is asked.
    listing = list_table(table)
    assert listing.names == [file for file, _ in files] and listing.labels.tolist() == [k for _, k in files]
    assert listing.groups[:11] == ["0"] * 10 + ["1"] and any("grouped by location" in note for note in listing.notes)
    assert list_table(table, columns=Columns(group_column="seq_id")).groups[:4] == ["s0"] * 3 + ["s1"]
    # It trains, no place is on two sides, and `predict` finds the same pictures.
    data = load_table(table)
    sides = [{files_of // 10 for files_of in range(len(files)) if files[files_of][0] in set(part.names)}
             for part in (data.train, data.test)]
    assert not sides[0] & sides[1] and len(data.test)
    assert list(pictures_in_table(table)) == [sea / file for file, _ in files]


def test_coco_pictures_without_or_with_two_labels_are_named(sea):
    images = [{"id": i, "file_name": f"copepod/{i:03d}.png"} for i in range(6)]
    annotations = [{"image_id": i, "category_id": k}
                   for i, k in ((0, 0), (1, 0), (2, 1), (3, 1), (4, 0), (4, 1), (9, 0))]
    table = coco(sea, images, annotations, [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}])
    listing = list_table(table)
    assert len(listing.names) == 4 and any("1 annotations" in note for note in listing.notes)
    problems = "\n".join(sentence for problem in listing.problems for sentence in problem.each)
    assert "image 5: no label" in problems and "copepod/004.png stands in image 4 as a and in image 4 as b" in problems


@pytest.mark.parametrize(("text", "words"), [
    ('{"train": [1]}', "JSON, but not in the COCO form"), ("[1, 2]", "JSON, but not in the COCO form"),
    ('{"images": [', "JSON"), ('{"images": [], "annotations": [], "categories": []}', "no images"),
    ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "file_name")])
def test_other_json_is_named(tmp_path, text, words):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DataError, match=words):
        read_table(tmp_path / "t.json")


def test_lists_of_benchmarks_are_tables(sea):
    # Given Places-LT's form, path and number, separated by a space, without a header,
    places = {c: k for k, c in enumerate(SIZES)}
    rows = [f"{c}/{i:03d}.png {places[c]}" for c, n in SIZES.items() for i in range(n)]
    for name, lines in (("list.txt", rows), ("list.csv", [row.replace(" ", ",") for row in rows])):
        (sea / name).write_text("\n".join(lines) + "\n")
        listing = list_table(sea / name)
        assert listing.label_names == ("0", "1", "2", "3") and len(listing.names) == sum(SIZES.values())
        assert any("no header" in note for note in listing.notes)


def test_ids_find_their_files_and_so_do_other_spellings_of_accents(tmp_path):
    # Given files whose names have accents as macOS stores them, and a table of ids with the accents that people type,
    nfd, nfc = (unicodedata.normalize(form, "Käfer") for form in ("NFD", "NFC"))
    paint_classes(tmp_path, {nfd: 6, "ant": 6})
    table = write_table(tmp_path, [f"{c}/{i:03d},{c}" for c in (nfc, "ant") for i in range(6)])
    listing = list_table(table)
    # then the files are found as the disk spells them, the class is the text, and it is said.
    assert set(listing.names) == {f"{c}/{i:03d}.png" for c in (nfd, "ant") for i in range(6)}
    assert listing.label_names == (nfc, "ant") or listing.label_names == ("ant", nfc)
    assert any("12 paths lack their ending" in note for note in listing.notes)
    # Where two files have the id, none is guessed.
    (tmp_path / "ant" / "000.jpg").write_bytes(b"")
    assert "ant/000" in list_table(table).names


def test_what_r_writes_for_nothing_is_no_label(sea):
    rows = [f'"{i}","{row.split(",")[0]}",{"NA" if i % 10 == 0 else row.split(",")[1]}'
            for i, row in enumerate(rows_of(sea, SIZES), 1)]
    listing = list_table(write_table(sea, rows, '"","path","label"', "r.csv"))
    assert listing.label_names == tuple(SIZES)
    (bad, _) = listing.problems
    assert len(bad.each) == sum(SIZES.values()) // 10 and "no label (NA)" in bad.each[0]
    assert len(list(pictures_in_table(sea / "r.csv"))) == sum(SIZES.values())


def test_all_problems_of_a_table_are_told_at_once_and_skipped(sea):
    # Given rows without a label, of no split, that disagree, and groups in two splits,
    rows = [f"{row},{'test' if i % 5 == 0 else 'train'},g{i}" for i, row in enumerate(rows_of(sea, SIZES))]
    rows[3] = rows[3].replace(",train", ",unused")
    rows[6] = rows[6].replace("copepod,", ",")
    rows += [rows[12].replace(",copepod,", ",fish,")]
    rows[21] = rows[21].replace("g21", "g20")
    table = write_table(sea, rows, "path,label,split,group", "all.csv")
    # when loaded, then one error has all of them;
    with pytest.raises(DataError, match=r"(?s)split 'unused'.*no label.*stands in line 14 .* and in line"):
        load_table(table)
    with pytest.raises(DataError, match=r"g20 \(test, train\)"):
        load_table(write_table(sea, [rows[20], rows[21], *rows[30:]], "path,label,split,group", "torn.csv"))
    # and with skip_bad the rest is used, the torn group where it is tested.
    data = load_table(table, skip_bad=True)
    assert len(data.left_out) == 4
    assert "copepod/020.png" in data.test.names and "copepod/021.png" not in (*data.train.names, *data.meta.names)
    assert not {"copepod/003.png", "copepod/006.png", "copepod/012.png"} & {*data.train.names, *data.test.names}


def test_an_encoding_may_be_named(tmp_path):
    (tmp_path / "t.csv").write_bytes("path,label\na.png,Größe\nb.png,žába\n".encode("cp1250"))
    rows = read_table(tmp_path / "t.csv", Columns(encoding="cp1250")).rows
    assert [row[1] for _, row in rows] == ["Größe", "žába"]
    assert any("--encoding" in note for note in read_table(tmp_path / "t.csv").notes)
    for encoding, words in (("utf-8", "is not in"), ("klingon", "no such encoding")):
        with pytest.raises(DataError, match=words):
            read_table(tmp_path / "t.csv", Columns(encoding=encoding))


def test_predict_takes_tables_among_its_paths(sea):
    table = write_table(sea, ["copepod/000.png,x", "copepod/000.png,y", ",z", "squid/001,x"], "image,kind", "p.csv")
    first, lacking, last = pictures_of([table])
    assert (first, last) == (sea / "copepod/000.png", sea / "squid/001.png")
    assert "line 4: no path" in str(lacking.picture)
