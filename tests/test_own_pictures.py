"""Your own pictures: how they are read, how they are cut, and what is told where something is wrong."""

import os
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import zoo
from tests.test_images import as_bytes
from tests.test_pixels import stack
from tests.test_predictor import with_config
from training.data import splits as cuts
from training.data.datasets import LongTailed
from training.data.own_pictures import load_folder, load_table
from training.errors import DataError
from training.recipes import Cifar10LT
from zoo.errors import ModelFolderError
from zoo.images import decode
from zoo.pixels import Reading
from zoo.tables import Columns


def paint(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)).save(path)


def paint_classes(root, per_class: dict[str, int], seed=0):
    for c, (name, n) in enumerate(per_class.items()):
        for i in range(n):
            paint(root / name / f"{i:03d}.png", [seed, c, i])
    return root


SIZES = {"copepod": 120, "diatom": 40, "fish": 12, "squid": 4}


@pytest.fixture(scope="module")
def sea(tmp_path_factory):
    """Four classes, 120 pictures down to 4."""
    return paint_classes(tmp_path_factory.mktemp("data") / "sea", SIZES)


def names_of(data: LongTailed) -> dict[str, set[str]]:
    return {part: set(getattr(data, part).names) for part in ("train", "meta", "test")}


def counts_of(split, classes) -> list[int]:
    return np.bincount(split.labels, minlength=classes).tolist()


# ---- the cut ----


def test_class_folders_are_cut_by_the_written_rule(sea):
    # Given class folders, when loaded with no other word,
    data = load_folder(sea)
    parts = names_of(data)
    # then every picture is used once,
    assert data.label_names == tuple(SIZES)
    assert sum(SIZES.values()) == len(parts["train"] | parts["meta"] | parts["test"])
    assert not parts["test"] & (parts["train"] | parts["meta"])
    # the test set has at least 2 and at most a third of each class,
    for tested, n in zip(counts_of(data.test, 4), SIZES.values(), strict=True):
        assert 2 <= tested <= max(2, n // 3)
    # the meta set has a hundred in all, at most a quarter of what is left, and small classes lend theirs.
    left = [n - tested for n, tested in zip(SIZES.values(), counts_of(data.test, 4), strict=True)]
    assert counts_of(data.meta, 4) == [25, min(25, left[1] // 4), min(25, left[2]), min(25, left[3])]
    assert data.shared_meta_classes == (2, 3)
    shared = {name for name in parts["meta"] if name.startswith(("fish", "squid"))}
    assert parts["meta"] & parts["train"] == shared
    assert any("fish, squid" in note for note in data.notes)
    assert data.class_counts == (left[0] - 25, left[1] - left[1] // 4, *left[2:])


def test_the_cut_hangs_on_names_and_seed_alone(sea, tmp_path):
    # Given the same pictures elsewhere, named train/ there, when loaded from above it, from it, and again,
    shutil.copytree(sea, tmp_path / "moved" / "train")
    here, above, inside = (names_of(load_folder(root)) for root in (sea, tmp_path / "moved", tmp_path / "moved/train"))
    # then the cut is the same; another seed cuts elsewhere.
    assert here == above == inside
    assert names_of(load_folder(sea, subset_seed=1)) != here


def test_new_pictures_do_not_move_old_ones_between_training_and_test(tmp_path):
    # Given a set that was cut once, when next year's pictures are added to it,
    root = paint_classes(tmp_path, {"a": 200, "b": 90})
    before = names_of(load_folder(root))
    paint_classes(root, {"a": 330, "b": 120}, seed=0)
    after = names_of(load_folder(root))
    # then what was test is test, and what was not is not.
    old = before["train"] | before["meta"] | before["test"]
    assert after["test"] & old == before["test"]
    assert len(after["test"]) > len(before["test"])


def test_copies_of_a_picture_are_on_one_side(tmp_path):
    # Given pictures of which each is there three times, once in another format,
    for c in "ab":
        for i in range(30):
            paint(tmp_path / c / f"{i}.png", [ord(c), i])
            shutil.copy(tmp_path / c / f"{i}.png", tmp_path / c / f"copy of {i}.png")
            Image.open(tmp_path / c / f"{i}.png").save(tmp_path / c / f"{i}.bmp")
    parts = names_of(load_folder(tmp_path))
    # when cut, then no copy of a test picture is trained on.
    side = {name: part for part, names in parts.items() for name in names}
    for c in "ab":
        for i in range(30):
            assert len({side[f"{c}/{name}"] for name in (f"{i}.png", f"copy of {i}.png", f"{i}.bmp")}) == 1


def test_one_picture_in_two_classes_is_named(tmp_path):
    paint_classes(tmp_path, {"a": 9, "b": 9})
    shutil.copy(tmp_path / "a" / "003.png", tmp_path / "b" / "sure.png")
    assert any("a/003.png = b/sure.png" in note for note in load_folder(tmp_path).notes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_unit_is_ever_parted(data):
    # Given any classes, any groups across them and any share,
    n = data.draw(st.integers(1, 120))
    classes = data.draw(st.integers(1, 5))
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    groups = data.draw(st.lists(st.one_of(st.none(), st.sampled_from("uvwxyz")), min_size=n, max_size=n))
    share = data.draw(st.floats(0.01, 0.9))
    names = [f"{i}.jpg" for i in range(n)]
    # when test and meta set are cut,
    units = cuts.tie(names, groups)
    test = cuts.cut_test(units, labels, classes, share, seed=0)
    meta, removed, shared = cuts.cut_meta(units, names, labels, ~test, classes, 10, seed=0)
    train = ~test & ~removed
    # then no group stands in two of training, meta and test, but for the meta pictures of classes that lend them;
    sides = {g: {s for i in range(n) if groups[i] == g
                 for s, part in (("train", train), ("meta", removed), ("test", test)) if part[i]}
             for g in set(groups) - {None}}
    assert all(len(side) == 1 for side in sides.values())
    assert not (meta & test).any()
    assert set(labels[meta & train].tolist()) <= set(shared)
    # no class loses all its training pictures, and each has meta pictures.
    present = set(labels.tolist())
    assert set(labels[train].tolist()) == present
    assert set(labels[meta].tolist()) == present


# ---- layouts ----


def test_ready_made_splits_are_taken_as_they_are(tmp_path):
    # Given train/, valid/ and test/ as many sets come,
    for split, sizes, seed in (("train", {"a": 30, "b": 8}, 0), ("valid", {"a": 12, "b": 3}, 1), ("Test", {"a": 5}, 2)):
        paint_classes(tmp_path / split, sizes, seed)
    data = load_folder(tmp_path)
    # then training and test set are whole, the meta set is of valid, and a class without test pictures is known.
    assert data.class_counts == (30, 8)
    assert counts_of(data.test, 2) == [5, 0]
    assert data.untested_classes == (1,)
    assert all(name.startswith("valid/") for name in data.meta.names)
    assert counts_of(data.meta, 2) == [12, 3]
    # Without test/, valid is tested on and the meta set is cut from train.
    shutil.rmtree(tmp_path / "Test")
    data = load_folder(tmp_path)
    assert counts_of(data.test, 2) == [12, 3]
    assert all(name.startswith("train/") for name in data.meta.names)


def test_test_and_meta_folders_may_be_elsewhere(sea, tmp_path):
    paint_classes(tmp_path / "t", dict.fromkeys(SIZES, 3), seed=7)
    paint_classes(tmp_path / "m", dict.fromkeys(SIZES, 2), seed=8)
    data = load_folder(sea, test=tmp_path / "t", meta=tmp_path / "m")
    assert data.class_counts == tuple(SIZES.values())
    assert counts_of(data.test, 4) == [3] * 4
    assert counts_of(data.meta, 4) == [2] * 4
    assert all(path.is_file() for path in data.test.paths + data.meta.paths)


def test_a_meta_set_alone_leaves_the_test_set_to_be_cut(sea, tmp_path):
    paint_classes(tmp_path / "m", dict.fromkeys(SIZES, 2), seed=8)
    data = load_folder(sea, meta=tmp_path / "m")
    assert set(data.test.names) == set(load_folder(sea).test.names)
    assert counts_of(data.meta, 4) == [2] * 4
    assert len(data.train) + len(data.test) == sum(SIZES.values())


def test_copies_across_given_splits_leave_training(tmp_path):
    paint_classes(tmp_path / "train", {"a": 9, "b": 9})
    paint_classes(tmp_path / "test", {"a": 2, "b": 2}, seed=5)
    shutil.copy(tmp_path / "test/a/001.png", tmp_path / "train/a/again.png")
    data = load_folder(tmp_path)
    assert "train/a/again.png" not in data.train.names
    assert "test/a/001.png" in data.test.names
    assert any("train/a/again.png = test/a/001.png" in note for note in data.notes)


def test_classes_called_train_and_test_are_classes(tmp_path):
    paint_classes(tmp_path, {"train": 9, "test": 9})
    assert load_folder(tmp_path).label_names == ("test", "train")


def test_leftovers_of_operating_systems_are_passed_over(tmp_path):
    # Given folders as they come from a Mac, from Windows and from a zip, and a link that leads in a circle,
    paint_classes(tmp_path, {"a": 9, "b": 9})
    for name in (".DS_Store", "a/.DS_Store", "a/Thumbs.db", "__MACOSX/a/._000.png", ".git/x.png", "a/._000.png",
                 "b/notes.txt", "b/@eaDir/000.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    # when loaded, then only pictures count, linked folders too, and other files are counted in a note.
    data = load_folder(tmp_path)
    assert data.label_names == ("a", "b", "linked")
    assert len(data.train) + len(data.test) + len(set(data.meta.names) - set(data.train.names)) == 27
    assert any("2 .txt" in note for note in data.notes)


def test_links_to_nothing_are_missing_pictures(tmp_path):
    paint_classes(tmp_path, {"a": 9, "b": 9})
    (tmp_path / "a" / "gone.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (tmp_path / "a" / "itself.jpg").symlink_to(tmp_path / "a" / "itself.jpg")
    with pytest.raises(DataError, match="2 of 20") as caught:
        load_folder(tmp_path)
    assert "a/gone.jpg does not exist" in str(caught.value)


def test_file_names_that_are_no_text_are_read(tmp_path):
    paint_classes(tmp_path, {"a": 9, "b": 9})
    os.rename(tmp_path / "a/000.png", os.fsencode(tmp_path) + b"/a/\xff\xfe.png")
    data = load_folder(tmp_path)
    assert len(data.train.names) + len(data.test.names) == 18
    with open(os.fsencode(tmp_path) + b"/a/\xff.jpg", "wb") as file:
        file.write(b"no picture")
    with pytest.raises(DataError, match=r"udcff\.jpg is not a picture") as caught:
        load_folder(tmp_path)
    str(caught.value).encode()


def test_mean_and_spread_are_those_of_the_training_pictures(tmp_path):
    for c, value in (("dark", 51), ("light", 102)):
        for i in range(8):
            (tmp_path / c).mkdir(exist_ok=True)
            Image.new("RGB", (100, 70), (value, 0, value + i)).save(tmp_path / c / f"{i}.png")
    data = load_folder(tmp_path)
    pixels = np.array([np.asarray(Image.open(path)) for path in data.train.paths]) / 255
    assert np.allclose(data.mean, pixels.mean((0, 1, 2)), atol=1e-3)
    assert np.allclose(data.std[0], pixels[..., 0].std(), atol=1e-3)
    assert data.train.sizes.tolist() == [[100, 70]] * len(data.train)


# ---- what files leave open ----


def test_the_range_of_a_12_bit_camera_is_found_over_the_data_set_and_kept_with_the_model(tiny_model_folder, tmp_path):
    # Given the same pictures with 8 bits, and from a camera of 12 bits in 16, of which some are dark,
    rng = np.random.default_rng(0)
    for c in "ab":
        for i in range(12):
            grey = rng.integers(0, 256 // (1 + i % 3), (9, 6), dtype=np.uint16)
            for bits, values in ((8, grey.astype(np.uint8)), (12, grey * 16 + grey // 16)):
                path = tmp_path / str(bits) / c / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
    # when both are loaded, then the range is found and said, and mean, spread and pixels are those of the 8 bits;
    eight, twelve = (load_folder(tmp_path / bits) for bits in ("8", "12"))
    assert (eight.reading.white, twelve.reading.white) == (None, 4095)
    assert any("White is 4,095" in note for note in twelve.notes)
    assert twelve.mean == eight.mean and twelve.std == eight.std
    stages = pytest.importorskip("training.run.stages")
    view = stages.view_of(Cifar10LT(input_size=6), twelve)
    shown = [view.fit(decode(tmp_path / file, reading=reading)) for file, reading in
             (("12/a/0.png", view.reading), ("8/a/0.png", eight.reading))]
    assert np.array_equal(*shown)
    # a flag decides instead, and another one is another data set;
    flagged = load_folder(tmp_path / "12", reading=Reading(white=1000))
    assert flagged.reading.white == 1000 and flagged.identity() != twelve.identity()
    # and a model that was trained so reads them so.
    model = zoo.load(with_config(tiny_model_folder, tmp_path / "model", reading=twelve.reading.to_dict()))
    plain = zoo.load(tiny_model_folder)
    logits = [by.predict(tmp_path / file).logits for by, file in ((model, "12/b/0.png"), (plain, "8/b/0.png"))]
    assert np.array_equal(*logits)
    for wrong in ({"white": 0}, {"page": "all"}, {"gamma": 2}):
        with pytest.raises(ModelFolderError, match=r"metasaug\.reading"):
            zoo.load(with_config(tiny_model_folder, tmp_path / f"wrong {wrong}", reading=wrong))


def test_stacks_and_cut_off_pictures_are_counted_and_read_as_asked(tmp_path):
    # Given TIFFs of three pages that differ only on the second, and two JPEGs without their end,
    for c, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for i in range(8):
            pages = [np.full((8, 8), 100, np.uint8), np.random.default_rng([c, i]).integers(0, 90, (8, 8), np.uint8),
                     np.full((8, 8), 100, np.uint8)]
            (tmp_path / name / f"{i}.tif").write_bytes(stack(*pages))
    # when loaded, then all are copies of one picture by their first page, and the reason is said;
    with pytest.raises(DataError, match=r"Page 1 is read of 16 TIFFs that have several pages"):
        load_folder(tmp_path)
    # with the page named, they are not.
    data = load_folder(tmp_path, reading=Reading(page=2))
    assert len(data.train) and data.reading.to_dict() == {"page": 2}
    # A JPEG without its end stops training, unless it is asked for.
    content = as_bytes(Image.effect_noise((64, 64), 50), "JPEG")
    (tmp_path / "a" / "cut.jpg").write_bytes(content[:-9])
    with pytest.raises(DataError, match=r"a/cut.jpg is cut off: .*--most-missing"):
        load_folder(tmp_path, reading=Reading(page=2, most_missing=0))
    data = load_folder(tmp_path, reading=Reading(page=2, most_missing=0.5))
    assert any("1 JPEGs lack their end" in note for note in data.notes)


# ---- tables ----


def write_table(root, rows, header="path,label", name="table.csv"):
    (root / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return root / name


def rows_of(root, per_class: dict[str, int], extra=lambda name, i: "") -> list[str]:
    return [f"{c}/{i:03d}.png,{c}{extra(c, i)}" for c, n in per_class.items() for i in range(n)]


def test_a_table_is_cut_as_the_same_folders_are(sea):
    table = write_table(sea.parent, [f"sea/{row}" for row in rows_of(sea, SIZES)])
    by_table, by_root = load_table(table), load_table(write_table(sea.parent, rows_of(sea, SIZES), name="t2.csv"), sea)
    assert names_of(by_root) == names_of(load_folder(sea))
    assert by_table.label_names == tuple(SIZES)
    assert by_table.source == "table (table)"


@pytest.mark.parametrize("encode", [
    lambda text: b"\xef\xbb\xbf" + text.replace(",", ";").encode(),
    lambda text: text.replace(",", "\t").encode("utf-16"),
    lambda text: text.replace("\n", "\r\n").replace("/", "\\").encode(),
    lambda text: text.replace("path,label", "Image,Species").encode() + b"\n\n , \n",
    lambda text: "\n".join('"' + line.replace(",", '","') + '"' for line in text.split("\n")).encode(),
], ids=["semicolon and BOM", "tab and UTF-16", "Windows", "other names and blank lines", "quoted"])
def test_tables_of_other_programs_are_read(sea, encode):
    plain = load_table(write_table(sea, rows_of(sea, SIZES)))
    (sea / "other.csv").write_bytes(encode((sea / "table.csv").read_text().strip()))
    assert names_of(load_table(sea / "other.csv")) == names_of(plain)


def test_accents_of_an_old_spreadsheet_are_read(sea):
    text = "\n".join(["path,label", *rows_of(sea, SIZES)]).replace(",squid", ",Größe")
    (sea / "ansi.csv").write_bytes(text.encode("cp1252"))
    data = load_table(sea / "ansi.csv")
    assert "Größe" in data.label_names
    assert any("1252" in note for note in data.notes)


def test_no_animal_stands_on_two_sides(sea):
    # Given eight pictures of each animal, in the column of that name,
    table = write_table(sea, rows_of(sea, SIZES, lambda c, i: f",{c}{i // 8 if c != 'squid' else i}"),
                        "path,label,animal")
    data = load_table(table)
    # when cut, then no animal stands in two sets, and the shares are about those asked for.
    animal = {row.split(",")[0]: row.split(",")[2] for row in table.read_text().split()[1:]}
    sides = {part: {animal[name] for name in names} for part, names in names_of(data).items()}
    assert not sides["test"] & (sides["train"] | sides["meta"])
    both = sides["train"] & sides["meta"]
    assert all(name.startswith(tuple(data.label_names[c] for c in data.shared_meta_classes)) for name in both)
    assert 0.1 < len(data.test) / sum(SIZES.values()) < 1 / 3
    assert any("Groups, by the column animal" in note for note in data.notes)


def test_splits_of_a_table_are_taken_and_torn_groups_refused(sea):
    # Given a table with a split column, when loaded, then it decides,
    def split(c, i):
        return f",{('Train', 'Train', 'test')[i % 3]},{c}{i}"

    data = load_table(write_table(sea, rows_of(sea, SIZES, split), "path,label,split,group"))
    assert all(int(name[-7:-4]) % 3 == 2 for name in data.test.names)
    # a group in two splits is an error that names it,
    with pytest.raises(DataError, match=r"copepod0 \(test, train\)"):
        load_table(write_table(sea, rows_of(sea, SIZES, lambda c, i: f"{split(c, i).rsplit(',', 1)[0]},{c}{i // 8}"),
                               "path,label,split,group"))
    # and so is a split that is none.
    with pytest.raises(DataError, match=r"line 2.*'holdout'"):
        load_table(write_table(sea, rows_of(sea, SIZES, lambda c, i: ",holdout"), "path,label,split"))


@pytest.mark.parametrize(("rows", "header", "words"), [
    (["a.png,x"], "path,kind", "label column is missing"), (["a.png,x"], "bild,label", "path column is missing"),
    ([], "path,label", "no rows"), (["a.png,x", "a.png,y"], "path,label", "line 2 as x and in line 3 as y"),
    (["a.png"], "path,label", "line 2: 1 field"), (["a.png,"], "path,label", "line 2: no label"),
    ([",x"], "path,label", "line 2: no path"), (["a.png,x", "b.png,X"], "path,label", "differ only in case"),
    (["a.png,x", "b.png,x"], "path,label", "one class only, x"),
    (['a.png,"x', "b.png,y"], "path,label", "quotation mark"),
    (["a.png,x,y"], "path,class,species", "class and species could each be the label"),
    (["000.png,x", "111.png,y"], "path,label", "2 of 2 pictures"),
])
def test_a_bad_table_is_one_clear_error(tmp_path, rows, header, words):
    with pytest.raises(DataError, match=words):
        load_table(write_table(tmp_path, rows, header))


def test_files_that_are_no_table_are_told(tmp_path):
    for content, words in ((b"PK\x03\x04xx", "spreadsheet"), (b"", "no rows"), (b"a\0b,c\n", "not text")):
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(DataError, match=words):
            load_table(tmp_path / "t.csv")
    with pytest.raises(DataError, match="cannot be read"):
        load_table(tmp_path / "none.csv")


def test_columns_may_be_named(sea):
    table = write_table(sea, rows_of(sea, SIZES), "bild,art")
    assert load_table(table, columns=Columns("bild", "art")).label_names == tuple(SIZES)
    with pytest.raises(DataError, match="--label-column"):
        load_table(table, columns=Columns("bild", "kind"))


def test_numbers_as_labels_stay_in_their_order(tmp_path):
    names = {str(n): 4 for n in (10, 9, 100)}
    paint_classes(tmp_path, names)
    assert load_table(write_table(tmp_path, rows_of(tmp_path, names))).label_names == ("9", "10", "100")


# ---- what can be wrong ----


def test_bad_pictures_are_all_named_and_left_out_only_on_request(tmp_path):
    # Given a damaged picture, an empty one and a HEIC,
    paint_classes(tmp_path, {"a": 20, "b": 10})
    (tmp_path / "a/cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (tmp_path / "a/empty.png").touch()
    (tmp_path / "b/phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    # when loaded, then one error names all three and the flag;
    with pytest.raises(DataError, match="3 of 33") as caught:
        load_folder(tmp_path)
    for word in ("a/cut.jpg", "a/empty.png", "b/phone.HEIC is a HEIC", "--skip-bad"):
        assert word in str(caught.value)
    # with the flag they are left out and named.
    data = load_folder(tmp_path, skip_bad=True)
    assert len(data.left_out) == 3
    assert any("Left out, 3" in note for note in data.notes)
    assert not {name for part in names_of(data).values() for name in part} & {"a/cut.jpg", "a/empty.png"}


@pytest.mark.parametrize(("make", "words"), [
    (lambda root: (root / "empty").mkdir(), "empty"),
    (lambda root: [(root / "broken").mkdir(), (root / "broken/1.png").touch(), (root / "broken/2.png").touch()],
     "broken"),
])
def test_a_class_without_pictures_is_named_and_left_out_only_on_request(tmp_path, make, words):
    paint_classes(tmp_path, {"a": 9, "b": 9})
    make(tmp_path)
    with pytest.raises(DataError, match=words) as caught:
        load_folder(tmp_path)
    assert "--skip-bad" in str(caught.value)
    data = load_folder(tmp_path, skip_bad=True)
    assert data.label_names == ("a", "b")
    assert any(words.split()[0] in reason for reason in data.left_out)


def test_classes_of_a_few_pictures_are_trained_on(tmp_path):
    # Given classes of one to four pictures, then none is refused; the one of one picture has no test.
    paint_classes(tmp_path, {"a": 30, "b": 9, "one": 1, "two": 2, "three": 3, "four": 4})
    data = load_folder(tmp_path)
    assert dict(zip(data.label_names, data.class_counts, strict=True)) == {
        "a": 18, "b": 6, "four": 2, "one": 1, "three": 2, "two": 1}
    assert [data.label_names[c] for c in data.untested_classes] == ["one"]
    assert any("not tested" in note and "one" in note for note in data.notes)


def test_a_single_picture_trains_where_a_test_set_is_given(tmp_path):
    paint_classes(tmp_path / "train", {"a": 9, "b": 1})
    paint_classes(tmp_path / "test", {"a": 2, "b": 1}, seed=3)
    assert load_folder(tmp_path).class_counts[1] == 1


@pytest.mark.parametrize(("make", "words"), [
    (lambda root: None, "no class folders"),
    (lambda root: paint_classes(root, {"only": 9}), "one class only"),
    (lambda root: [paint_classes(root / "set", {"a": 9, "b": 9})], r"set/a, set/b.*--leaf-folders"),
    (lambda root: paint_classes(root, {"Cat": 9, "cat": 9}), "Cat and cat"),
    (lambda root: paint_classes(root, {"e\u0301": 9, "\u00e9": 9}), "case or accents"),
    (lambda root: [paint_classes(root / "train", {"a": 9, "b": 9}), paint_classes(root / "test", {"a": 2, "c": 2})],
     "class c has no usable pictures to train on"),
    (lambda root: [paint_classes(root / "train", {"a": 9, "b": 9}), paint_classes(root / "val", {"a": 2}),
                   paint_classes(root / "valid", {"a": 2})], "merge them"),
    (lambda root: [paint_classes(root, {"a": 9}), os.mkdir(os.fsencode(root) + b"/\xff")], "not UTF-8"),
])
def test_folders_that_make_no_data_set_are_one_clear_error(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(DataError, match=words):
        load_folder(tmp_path)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        load_folder(tmp_path / "nowhere")


def test_the_real_plankton_is_cut_alike_every_time(plankton):
    # Given 121 classes of 1,979 to 9 pictures, when loaded,
    data = load_folder(plankton, look=False)
    # then nothing is lost, each class has test, meta and training pictures,
    assert (len(data.label_names), data.source) == (121, "plankton (class folders)")
    assert len(set(data.train.names) | set(data.meta.names) | set(data.test.names)) == 30_336
    assert not data.untested_classes
    assert min(Counter(data.test.labels.tolist()).values()) >= 2
    assert len(set(data.meta.labels.tolist())) == 121
    # and the cut is the one that the bundled models were made with.
    assert (len(data.train), len(data.meta), len(data.test)) == (23_270, 1_140, 6_075)
