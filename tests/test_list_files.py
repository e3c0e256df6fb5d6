"""ImageNet-LT and iNaturalist, made small in their own formats."""

import json

import numpy as np
import pytest
from PIL import Image

from training.data.imagenet_inat import load_imagenet_lt, load_inat, read_inat_json, read_list
from training.errors import DataError
from zoo.label_names import imagenet, imagenet_lt_counts, imagenet_wnids, inat18


def draw(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)


def make_imagenet_lt(root, counts=(9, 5, 3), val=4, test=2):
    """ImageNet's folders and ImageNet-LT's three lists, for the first WordNet ids."""
    wnids = imagenet_wnids()[: len(counts)]
    lines = {"train": [], "val": [], "test": []}
    for c, (wnid, n) in enumerate(zip(wnids, counts, strict=True)):
        for i in range(n + val):
            name = f"train/{wnid}/{wnid}_{i}.JPEG"
            draw(root / name, i)
            lines["train" if i < n else "val"].append(f"{name} {c}")
        for i in range(test):
            name = f"val/{wnid}/ILSVRC2012_val_{c:04d}{i:04d}.JPEG"
            draw(root / name, i)
            lines["test"].append(f"{name} {c}")
    for part, each in lines.items():
        (root / f"ImageNet_LT_{part}.txt").write_text("\n".join(each) + "\n")
    return root


def make_inat(root, year=2018, counts=(6, 4, 2), names=("Danaus plexippus", "Apis mellifera", "Bombus terrestris")):
    """iNaturalist's folders and its two JSON files; annotations stand in another order than the images."""
    rng = np.random.default_rng(0)
    top = "train_val2018" if year == 2018 else "train_val_images"
    ids = iter(range(1000, 2000))
    for part, numbers in (("train", counts), ("val", (1,) * len(counts))):
        images, annotations = [], []
        for c, n in enumerate(numbers):
            for i in range(n):
                file = f"{top}/Insecta/{names[c]}/{part}{i}.jpg"
                draw(root / file, i)
                images.append({"id": next(ids), "file_name": file})
                annotations.append({"id": i, "image_id": images[-1]["id"], "category_id": c})
        rng.shuffle(images)
        rng.shuffle(annotations)
        categories = [{"id": c, "name": name, "supercategory": "Insecta"} for c, name in enumerate(names)]
        (root / f"{part}{year}.json").write_text(json.dumps(
            {"images": images, "annotations": annotations, "categories": categories[::-1]}))
    return root


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# ---- ImageNet-LT ----


def test_imagenet_lt_takes_its_meta_set_from_the_val_list(tmp_path):
    # Given ImageNet-LT's lists over ImageNet's folders, when loaded,
    data = load_imagenet_lt(make_imagenet_lt(tmp_path), meta_per_class=3)
    # then sizes and names are right, the meta set is balanced and of the val list,
    assert data.class_counts == (9, 5, 3)
    assert data.label_names == imagenet()[:3]
    assert np.bincount(data.meta.labels).tolist() == [3, 3, 3]
    val = set((tmp_path / "ImageNet_LT_val.txt").read_text().split())
    assert set(data.meta.names) <= val
    assert not data.shared_meta_classes
    # every picture is under the label of its folder, and it is said that this is not the whole.
    for part in (data.train, data.meta, data.test):
        assert all(path.is_file() for path in part.paths)
        assert all(imagenet_wnids()[c] in name or "val_" in name
                   for name, c in zip(part.names, part.labels, strict=True))
    assert any("Not the whole of ImageNet-LT" in note for note in data.notes)


def test_the_meta_set_is_fixed_by_its_seed(tmp_path):
    root = make_imagenet_lt(tmp_path, val=9)
    first, again, other, theirs = (
        load_imagenet_lt(root, meta_per_class=4, **how).meta.names
        for how in ({}, {}, {"subset_seed": 1}, {"subset": "authors"}))
    assert first == again
    assert len({first, other, theirs}) == 3


def test_validation_pictures_may_lie_in_one_folder(tmp_path):
    # Given val/ as ImageNet's own archive unpacks it,
    root = make_imagenet_lt(tmp_path)
    for folder in list((root / "val").iterdir()):
        for file in folder.iterdir():
            file.rename(root / "val" / file.name)
        folder.rmdir()
    # when loaded, then the lists' class folders are not asked for.
    assert all(path.is_file() for path in load_imagenet_lt(root).test.paths)


def test_the_published_counts_are_whole():
    assert sum(imagenet_lt_counts()) == 115_846
    assert (max(imagenet_lt_counts()), min(imagenet_lt_counts())) == (1280, 5)
    assert len(set(imagenet())) == len(set(imagenet_wnids())) == 1000
    assert len(set(inat18())) == 8142


# ---- iNaturalist ----


@pytest.mark.parametrize(("name", "year", "meta"), [("inat17", 2017, 5), ("inat18", 2018, 2)])
def test_annotations_are_joined_by_image_id(tmp_path, name, year, meta):
    # Given the official JSON with images and annotations in different orders, when loaded,
    data = load_inat(name, make_inat(tmp_path, year))
    # then each picture has the class of its folder; the paper's few meta pictures are training pictures as well.
    assert data.class_counts == (6, 4, 2)
    for part in (data.train, data.meta, data.test):
        assert [data.label_names[c] for c in part.labels] == [file.split("/")[-2] for file in part.names]
    assert np.bincount(data.meta.labels).tolist() == [min(meta, n) for n in (6, 4, 2)]
    assert set(data.meta.names) <= set(data.train.names)
    assert data.shared_meta_classes == (0, 1, 2)
    assert data.mean == (0.466, 0.471, 0.380)


def test_list_files_give_the_same_as_the_json(tmp_path):
    root = make_inat(tmp_path, 2017)
    by_json = load_inat("inat17", root)
    for part, split in (("train", by_json.train), ("val", by_json.test)):
        lines = [f"{name} {c}" for name, c in zip(split.names, split.labels, strict=True)]
        (root / f"iNaturalist17_{part}.txt").write_text("\n".join(lines))
        (root / f"{part}2017.json").unlink()
    by_list = load_inat("inat17", root)
    assert by_list.train.names == by_json.train.names  # with the spaces in their folders' names
    assert np.array_equal(by_list.train.labels, by_json.train.labels)
    assert by_list.label_names == by_json.label_names


def test_hidden_names_of_2018_are_looked_up(tmp_path):
    # Given all 8,142 categories under numbers, as the competition had them, and a list of one picture each,
    lines = [f"train_val2018/Plantae/{c}/a.jpg {c}" for c in range(8142)]
    for c in range(8142):
        (tmp_path / f"train_val2018/Plantae/{c}").mkdir(parents=True)
        (tmp_path / f"train_val2018/Plantae/{c}/a.jpg").touch()
    for part in ("train", "val"):
        (tmp_path / f"iNaturalist18_{part}.txt").write_text("\n".join(lines))
    # then classes have the names of species.
    assert load_inat("inat18", tmp_path).label_names[:2] == ("Hermodice carunculata", "Phragmatopoma californica")


# ---- what can be wrong ----


@pytest.mark.parametrize(("edit", "words"), [
    (lambda j: j["annotations"][0].update(category_id=77), "category id 77"),
    (lambda j: j["annotations"][0].update(image_id=5), "image id 5"),
    (lambda j: j["images"].append(j["images"][0]), "share an id"),
    (lambda j: j["annotations"].extend({**j["annotations"][0], "category_id": c} for c in (0, 1)), "two categories"),
    (lambda j: j["annotations"].pop(), "no annotation"),
    (lambda j: j.pop("annotations"), "without labels"),
    (lambda j: j.pop("categories"), "categories"),
    (lambda j: j.update(images=[1]), "form"),
])
def test_a_json_that_contradicts_itself_is_one_clear_error(tmp_path, edit, words):
    root = make_inat(tmp_path)
    change(root / "train2018.json", edit)
    with pytest.raises(DataError, match=words) as caught:
        load_inat("inat18", root)
    assert "train2018.json" in str(caught.value)


@pytest.mark.parametrize(("content", "words"), [
    (b'{"images": [{"id": 1, "file_na', "cut off"), (b"", "cut off"), (b"[1, 2]", "form"), (b"\xff\xfe{", "JSON"),
    (b"[" * 100_000, "JSON"),
])
def test_a_json_cut_off_is_told(tmp_path, content, words):
    root = make_inat(tmp_path)
    (root / "val2018.json").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load_inat("inat18", root)
    assert "val2018.json" in str(caught.value)


@pytest.mark.parametrize(("lines", "words"), [
    ("train/a.jpg 0\ntrain/b.jpg\n", "line 2"), ("train/a.jpg 0\n\ntrain/b.jpg -1\n", "line 3"),
    ("train/a.jpg x\n", "line 1"), ("a.jpg 0\na.jpg 1\n", "before as 0"), ("\n", "no pictures"),
])
def test_malformed_lines_are_named_by_number(tmp_path, lines, words):
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(DataError, match=words):
        read_list(tmp_path / "list.txt")


def test_paths_with_spaces_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeffa b/c d.jpg 3\r\nx.jpg\t12\r\nx.jpg\t12\r\n".encode())
    listing = read_list(tmp_path / "list.txt")
    assert listing.names == ["a b/c d.jpg", "x.jpg"]
    assert listing.labels.tolist() == [3, 12]


def test_missing_pictures_are_counted_and_left_out_only_on_request(tmp_path):
    # Given ImageNet-LT of which one picture is missing and one is damaged,
    root = make_imagenet_lt(tmp_path)
    lines = (root / "ImageNet_LT_train.txt").read_text().split("\n")
    gone, broken = (line.split()[0] for line in lines[:2])
    (root / gone).unlink()
    (root / broken).write_bytes(b"no picture")
    # when loaded, then the missing one is named;
    with pytest.raises(DataError, match=f"1 of 35 .*\n.*{gone}"):
        load_imagenet_lt(root)
    # with skip_bad both are left out, by name.
    data = load_imagenet_lt(root, skip_bad=True)
    assert data.class_counts == (7, 5, 3)
    assert any(gone in note and broken in note for note in data.notes)


@pytest.mark.parametrize("name", ["imagenet-lt", "inat17", "inat18"])
def test_absent_data_says_what_to_download_and_where_it_goes(tmp_path, name):
    load = load_imagenet_lt if name == "imagenet-lt" else lambda root: load_inat(name, root)
    with pytest.raises(DataError) as caught:
        load(tmp_path / "nowhere")
    for word in ("does not exist", "--data", "GB", "--lists"):
        assert word in str(caught.value)
    # Lists without a single one of their pictures are told alike, with the first path that was looked for.
    here = tmp_path / "a"
    root = make_imagenet_lt(here) if name == "imagenet-lt" else make_inat(here, 2000 + int(name[4:]))
    for file in list(root.rglob("*.[jJ]*")):
        if file.suffix != ".json":
            file.unlink()
    with pytest.raises(DataError, match=r"none of the .* pictures") as caught:
        load(root)
    assert "GB" in str(caught.value)


def test_lists_of_different_sets_are_refused(tmp_path):
    root = make_imagenet_lt(tmp_path)
    with open(root / "ImageNet_LT_test.txt", "a") as file:
        file.write("val/x.JPEG 3\n")
    with pytest.raises(DataError, match="label 3"):
        load_imagenet_lt(root)
    (root / "ImageNet_LT_val.txt").unlink()
    with pytest.raises(DataError, match=r"ImageNet_LT_val\.txt"):
        load_imagenet_lt(root)


def test_classes_are_the_categories_by_id(tmp_path):
    listing, names = read_inat_json(make_inat(tmp_path) / "train2018.json")
    assert names == ("Danaus plexippus", "Apis mellifera", "Bombus terrestris")
    assert len(listing.names) == 12


def test_tiny_imagenet_becomes_imagenet_lt_of_its_classes(tmp_path):
    # Given Tiny ImageNet's folders, of three classes,
    from benchmarks import tiny_imagenet

    published = dict(zip(imagenet_wnids(), imagenet_lt_counts(), strict=True))
    wnids = sorted(published, key=lambda wnid: published[wnid])
    wnids = sorted([wnids[0], wnids[300], wnids[-1]])
    for wnid in wnids:
        (tmp_path / "train" / wnid / "images").mkdir(parents=True)
        for i in range(500):
            (tmp_path / "train" / wnid / "images" / f"{wnid}_{i}.JPEG").touch()
    (tmp_path / "val" / "images").mkdir(parents=True)
    for i in range(6):
        (tmp_path / "val" / "images" / f"val_{i}.JPEG").touch()
    rows = (f"val_{i}.JPEG\t{wnids[i % 3]}\t0\t0\t9\t9" for i in range(6))
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(rows))
    # when the lists are written and read, then each class has its published count, as far as there are pictures,
    counts = tiny_imagenet.write_lists(tmp_path)
    data = load_imagenet_lt(tmp_path, look=False)
    assert data.class_counts == tuple(min(published[wnid], 480) for wnid in wnids)
    assert counts == {"train": sum(data.class_counts), "val": 60, "test": 6}
    # the classes have their names, and no picture is in two parts.
    words = dict(zip(imagenet_wnids(), imagenet(), strict=True))
    assert data.label_names == tuple(words[wnid] for wnid in wnids)
    assert not {*data.train.names} & {*data.meta.names} and len(data.meta) == 30
    # Written again, they are the same.
    before = (tmp_path / "ImageNet_LT_train.txt").read_bytes()
    tiny_imagenet.write_lists(tmp_path)
    assert (tmp_path / "ImageNet_LT_train.txt").read_bytes() == before
