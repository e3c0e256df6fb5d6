"""ImageNet-LT and iNaturalist: published list files and JSON over folders of pictures.

By default pictures are not decoded; every listed file must exist. Layouts and where to get them: MISSING.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.data.authors_subsets import authors_meta
from training.data.datasets import LongTailed, PictureFiles, listed
from training.data.scan import look_at
from training.data.splits import rank_in_class
from training.data.tables import Problem, left_out_in_words, refuse
from training.errors import DataError
from zoo import label_names as known
from zoo.files import printable


@dataclass(frozen=True)
class _Benchmark:
    title: str
    classes: int
    train_pictures: int
    test_pictures: int
    meta_per_class: int  # the paper's
    json_files: tuple[tuple[str, str], ...]  # pairs of train and val, under their usual names
    list_files: tuple[tuple[str, str], ...]
    # As in the paper's code, 2018's for both years.
    mean: tuple[float, float, float] = (0.466, 0.471, 0.380)
    std: tuple[float, float, float] = (0.195, 0.194, 0.192)


INAT = {
    "inat17": _Benchmark("iNaturalist 2017", 5089, 579_184, 95_986, 5,
                         (("train2017.json", "val2017.json"), ("iNaturalist17_train.json", "iNaturalist17_val.json")),
                         (("iNaturalist17_train.txt", "iNaturalist17_val.txt"),)),
    "inat18": _Benchmark("iNaturalist 2018", 8142, 437_513, 24_426, 2,
                         (("train2018.json", "val2018.json"), ("iNaturalist18_train.json", "iNaturalist18_val.json")),
                         (("iNaturalist18_train.txt", "iNaturalist18_val.txt"),)),
}
IMAGENET_LT = _Benchmark("ImageNet-LT", 1000, 115_846, 50_000, 10, (),
                         (("ImageNet_LT_train.txt", "ImageNet_LT_test.txt"),),
                         mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
IMAGENET_LT_META = "ImageNet_LT_val.txt"

MISSING = {
    "imagenet-lt": """Name its folder with --data DIR. It holds
  train/n01440764/*.JPEG …   ILSVRC 2012 training pictures, a folder a class
  val/n01440764/*.JPEG …     ILSVRC 2012 validation pictures, in class folders (or all in val/)
  ImageNet_LT_train.txt, ImageNet_LT_val.txt, ImageNet_LT_test.txt
The pictures are from image-net.org (ILSVRC 2012, an account is needed): about 145 GB, of which the lists name some
20 GB. The lists are those of Liu et al. 2019 (OpenLongTailRecognition, the ImageNet_LT folder); they may lie elsewhere:
--lists DIR.""",
    "inat17": """Name its folder with --data DIR. It holds
  train_val_images/Aves/…/*.jpg      the pictures, as unpacked
  train2017.json, val2017.json       (or iNaturalist17_train.txt and iNaturalist17_val.txt)
Both are from the iNaturalist competition of 2017 (visipedia/inat_comp, folder 2017): train_val_images, about 186 GB,
and the annotations, "train_val2017". Unpacking needs the space twice. The JSON files may lie elsewhere:
--lists DIR.""",
    "inat18": """Name its folder with --data DIR. It holds
  train_val2018/Aves/…/*.jpg         the pictures, as unpacked
  train2018.json, val2018.json       (or iNaturalist18_train.txt and iNaturalist18_val.txt)
Both are from the iNaturalist competition of 2018 (visipedia/inat_comp, folder 2018): train_val2018, about 120 GB, and
the annotations train2018.json, val2018.json. Unpacking needs the space twice. The JSON files may lie elsewhere:
--lists DIR.""",
}


def load_imagenet_lt(
    root: Path | None, *, lists: Path | None = None, meta_per_class: int = IMAGENET_LT.meta_per_class,
    subset_seed: int = 0, subset: str = "seeded", skip_bad: bool = False, look: bool = False,
) -> LongTailed:
    """ImageNet-LT: the published lists over an ImageNet folder; the meta set is drawn from the val list.

    root      holds train/ and val/           lists   holds the three list files; by default root
    subset    "authors": the meta pictures that the paper's code draws; "seeded": by `subset_seed`
    skip_bad  decode every picture; leave out missing and unreadable ones
    look      decode every picture, to know sizes and to name copies across splits
    Raises DataError.
    """
    root = Path("data") if root is None else root.expanduser()
    found = _find_files(IMAGENET_LT.list_files, root, lists)
    if found is None:
        raise DataError(_missing("imagenet-lt", IMAGENET_LT.title, root))
    train, test = (read_list(path) for path in found)
    pool = read_list(_beside(found[0], IMAGENET_LT_META))
    root = _imagenet_root(root)
    if not any(entry.is_dir() for entry in _entries(root / "val")):  # validation pictures all in one folder
        test = _Listed([f"val/{name.rsplit('/', 1)[-1]}" if name.startswith("val/") else name for name in test.names],
                       test.labels)
    classes = int(train.labels.max()) + 1
    names, notes = _imagenet_names(train, classes)
    pool, test = _within(pool, classes, "val"), _within(test, classes, "test")
    meta = pool.at(_choose(pool.labels, classes, meta_per_class, subset, subset_seed))
    return _data_set(IMAGENET_LT, root, "imagenet-lt", train, meta, test, names, (),
                     [*notes, *_published_counts(train, classes)], skip_bad, look)


def load_inat(
    name: str, root: Path | None, *, lists: Path | None = None, meta_per_class: int | None = None,
    subset_seed: int = 0, subset: str = "seeded", skip_bad: bool = False, look: bool = False,
) -> LongTailed:
    """iNaturalist 2017 or 2018: the official JSON, or list files; val is the test set.

    name            "inat17" or "inat18"
    meta_per_class  by default the paper's 5 and 2; the meta pictures are training pictures and stay in training
    Otherwise as load_imagenet_lt.
    """
    about = INAT[name]
    root = Path("data") if root is None else root.expanduser()
    files = _find_files(about.json_files, root, lists)
    if files is not None:
        train, train_names = read_inat_json(files[0])
        test, test_names = read_inat_json(files[1])
        if train_names != test_names:
            raise DataError(f"{files[0]} and {files[1]} have different categories: they belong to different sets.")
        classes = len(train_names)
        names = train_names
    else:
        files = _find_files(about.list_files, root, lists)
        if files is None:
            raise DataError(_missing(name, about.title, root))
        train, test = (read_list(path) for path in files)
        classes = int(train.labels.max()) + 1
        names = _names_of_folders(train, classes) if name == "inat17" else tuple(map(str, range(classes)))
    hidden = not any(" " in each for each in names)  # numbers, where a species has two words
    if name == "inat18" and classes == len(known.inat18()) and hidden:
        names = known.inat18()
    test = _within(test, classes, "val")
    meta = train.at(_choose(train.labels, classes, meta_per_class or about.meta_per_class, subset, subset_seed))
    return _data_set(about, root, name, train, meta, test, names, tuple(range(classes)),
                     ["The meta pictures are training pictures and stay in training, as in the paper's code."],
                     skip_bad, look)


# ---- reading ----


@dataclass(frozen=True)
class _Listed:
    names: list[str]
    labels: np.ndarray

    def at(self, places: np.ndarray) -> "_Listed":
        return _Listed([self.names[i] for i in places], self.labels[places])


def read_list(path: Path) -> _Listed:
    """Read lines "path label"; the label follows the last space.

    Blank lines are skipped, and a repeated line counts once. Raises DataError with the numbers of malformed lines.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    labels: dict[str, int] = {}
    bad = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ") if "\t" not in line else line.strip().rpartition("\t")
        if not name.strip() or not (label.isascii() and label.isdecimal()):
            bad.append(f"line {number}: {printable(line[:80])}")
        elif labels.setdefault(name.strip(), int(label)) != int(label):
            bad.append(f"line {number}: {printable(name)} as {label}, and before as {labels[name.strip()]}")
    if bad:
        raise DataError(f"{path}: {len(bad):,} lines are not of the form `path label`:\n  " + listed(bad, "\n  ")
                        + "\nIs the file cut off, or in another format?")
    if not labels:
        raise DataError(f"{path} lists no pictures.")
    return _Listed(list(labels), np.fromiter(labels.values(), np.int64, len(labels)))


def read_inat_json(path: Path) -> tuple[_Listed, tuple[str, ...]]:
    """Pictures and class names of a file in iNaturalist's (COCO's) form, annotations joined by image id.

    Classes are the categories in the order of their ids. Raises DataError: cut off, a part missing, an id twice, an
    annotation of an unknown image or category, an image with two categories or none.
    """
    content = _read_json(path)
    try:
        categories = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        files = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
        pairs = [(entry["image_id"], entry["category_id"]) for entry in content["annotations"]]
    except KeyError as error:
        what = "annotations, so it is a test set without labels" if error.args == ("annotations",) else f"{error}"
        raise DataError(f"{path} has no {what}; expected images, annotations and categories.") from error
    except TypeError as error:
        raise DataError(f"{path} is not of iNaturalist's form: {error}.") from error
    for part, kept in (("categories", categories), ("images", files)):
        if len(kept) != len(content[part]):
            twice = [str(i) for i, n in Counter(entry["id"] for entry in content[part]).items() if n > 1]
            raise DataError(f"{path}: {part} share an id: {listed(twice, ', ')}.")
    category_of: dict[Any, Any] = {}
    for image, category in pairs:
        if image not in files:
            raise DataError(f"{path}: an annotation has image id {image}, which is not among the images.")
        if category not in categories:
            raise DataError(f"{path}: image {files[image]} has category id {category}, which is not among the "
                            f"{len(categories):,} categories.")
        if category_of.setdefault(image, category) != category:
            raise DataError(f"{path}: image {files[image]} has two categories, {category_of[image]} and {category}.")
    bare = [files[image] for image in files if image not in category_of]
    if bare:
        raise DataError(f"{path}: {len(bare):,} images have no annotation: {listed(bare, ', ')}.")
    ids = sorted(categories)
    place = {each: c for c, each in enumerate(ids)}
    return (_Listed(list(files.values()), np.array([place[category_of[i]] for i in files], np.int64)),
            _different([categories[i] for i in ids]))


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except json.JSONDecodeError as error:
        size = path.stat().st_size
        raise DataError(f"{path} is cut off or damaged ({error.msg} at character {error.pos:,} of {size:,} bytes): "
                        "download or unpack it again.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not of iNaturalist's form: expected images, annotations and categories.")
    return content


def _different(names: Sequence[str]) -> tuple[str, ...]:
    """Unique names: species that share a name get their class index."""
    count = Counter(names)
    return tuple(name if count[name] == 1 else f"{name} ({c})" for c, name in enumerate(names))


def _find_files(pairs: Sequence[tuple[str, str]], root: Path, lists: Path | None) -> tuple[Path, Path] | None:
    """The first pair whose first file exists; the second must exist too."""
    folders = [lists.expanduser()] if lists is not None else [root, root / "annotations", root / "lists",
                                                              root / "ImageNet_LT"]
    for folder in folders:
        for first, second in pairs:
            if (folder / first).is_file():
                return folder / first, _beside(folder / first, second)
    return None


def _beside(first: Path, name: str) -> Path:
    second = first.with_name(name)
    if not second.is_file():
        raise DataError(f"{first} is there, but {second.name} beside it is missing.")
    return second


def _missing(name: str, title: str, root: Path) -> str:
    state = "does not exist" if not root.exists() else "holds none of its list files"
    return f"{title} not found: {root} {state}. {MISSING[name]}"


# ---- classes and their names ----


def _within(part: _Listed, classes: int, what: str) -> _Listed:
    if int(part.labels.max()) >= classes:
        raise DataError(f"The {what} list has label {part.labels.max()}, but the training list has none above "
                        f"{classes - 1}: they belong to different sets.")
    return part


def _names_of_folders(train: _Listed, classes: int) -> tuple[str, ...]:
    """Class names from the pictures' folders, if each class has its own folder; else numbers."""
    folders: dict[int, set[str]] = defaultdict(set)
    for name, label in zip(train.names, train.labels.tolist(), strict=True):
        *above, folder = ["", *name.split("/")[:-1]]
        folders[label].add(above[-1] if folder == "images" and above[1:] else folder)  # Tiny ImageNet: WNID/images/
    if any(len(found) != 1 for found in folders.values()) or len(folders) != classes:
        return tuple(map(str, range(classes)))
    names = tuple(folders[c].pop() for c in range(classes))
    return names if len(set(names)) == classes and "" not in names else tuple(map(str, range(classes)))


def _imagenet_names(train: _Listed, classes: int) -> tuple[tuple[str, ...], list[str]]:
    """Common names of the classes, from the WordNet ids in the paths; a note if their order is not as published."""
    wnids = _names_of_folders(train, classes)
    words = dict(zip(known.imagenet_wnids(), known.imagenet(), strict=True))
    notes = []
    if classes == len(words) and wnids != known.imagenet_wnids():
        notes.append("The labels are not in the order of the WordNet ids, as they are in the published lists.")
    return _different([words.get(wnid, wnid) for wnid in wnids]), notes


def _published_counts(train: _Listed, classes: int) -> list[str]:
    if classes != IMAGENET_LT.classes:
        return []
    counts = np.bincount(train.labels, minlength=classes)
    differing = int((counts != np.array(known.imagenet_lt_counts())).sum())
    return [f"The training list differs from the published ImageNet-LT in the size of {differing} classes."] * (
        differing > 0)


# ---- pictures ----


def _choose(labels: np.ndarray, classes: int, per_class: int, subset: str, seed: int) -> np.ndarray:
    """Places of `per_class` pictures of each class (all of a smaller one), in ascending order."""
    if subset == "authors":
        return authors_meta(labels, classes, per_class)[0]
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.sort(order[rank_in_class(labels[order]) < per_class])


def _imagenet_root(root: Path) -> Path:
    """`root`, or the folder in it where ImageNet's own archive puts the pictures."""
    deep = root / "ILSVRC" / "Data" / "CLS-LOC"
    return deep if (deep / "train").is_dir() and not (root / "train").is_dir() else root


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _absent(root: Path, names: Sequence[str]) -> set[str]:
    """Names that are no file under `root`; reads each folder once, many at a time."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folder, _, file = name.rpartition("/")
        by_folder[folder].append(file)

    def absent(folder: str) -> list[str]:
        there = {path.name for path in _entries(root / folder)}
        return [f"{folder}/{file}" if folder else file for file in by_folder[folder] if file not in there]

    with ThreadPoolExecutor(16) as pool:
        return {name for found in pool.map(absent, by_folder) for name in found}


def _data_set(
    about: _Benchmark, root: Path, name: str, train: _Listed, meta: _Listed, test: _Listed, names: tuple[str, ...],
    shared: tuple[int, ...], notes: list[str], skip_bad: bool, look: bool,
) -> LongTailed:
    parts = [train, meta, test]
    everything = list(dict.fromkeys(file for part in parts for file in part.names))
    left_out = _missing_pictures(about, root, name, everything, skip_bad)
    sizes: dict[str, np.ndarray] = {}
    if skip_bad or look:
        there = [file for file in everything if file not in left_out]
        looked = look_at([root / file for file in there], [printable(file) for file in there])
        bad = {there[i]: reason for i, reason in looked.errors.items()}
        refuse([Problem(f"of {len(there):,} pictures of {about.title} cannot be decoded",
                        tuple(bad[file] for file in sorted(bad)), "Unpack them again")], skip_bad)
        left_out |= bad
        sizes = dict(zip(there, looked.sizes, strict=True))
        key_of = dict(zip(there, looked.keys, strict=True))
        for what, part in (("training", train), *([] if shared else [("meta", meta)])):
            notes = [*notes, *_copies(key_of, part, test, what)]
    parts = [part.at(np.flatnonzero([file not in left_out for file in part.names])) for part in parts]
    _check_whole(parts, names)
    found = (len(names), len(parts[0].names), len(parts[2].names))
    if found != (about.classes, about.train_pictures, about.test_pictures):
        notes = [*notes, f"Not the whole of {about.title}: {found[0]:,} of {about.classes:,} classes, {found[1]:,} of "
                 f"{about.train_pictures:,} training and {found[2]:,} of {about.test_pictures:,} test pictures."]
    files = [PictureFiles(root, tuple(part.names), part.labels,
                          np.array([sizes[file] for file in part.names]) if sizes else None) for part in parts]
    reasons = tuple(left_out[file] for file in sorted(left_out))
    return LongTailed(files[0], files[1], files[2], names, about.title, about.mean, about.std, shared,
                      (*notes, *left_out_in_words(reasons)), reasons)


def _check_whole(parts: Sequence[_Listed], names: Sequence[str]) -> None:
    for what, part in (("training", parts[0]), ("meta", parts[1])):
        gone = [names[c] for c in np.setdiff1d(np.arange(len(names)), part.labels)]
        if gone:
            raise DataError(f"{len(gone)} classes have no {what} picture: {listed(gone, ', ')}.")
    if not len(parts[2].names):
        raise DataError("No test picture is left.")


def _copies(key_of: dict[str, bytes | None], part: _Listed, test: _Listed, what: str) -> list[str]:
    """A note on test pictures that are exact copies of others; a published set keeps them."""
    first = {key_of[file]: file for file in part.names if key_of.get(file) is not None}
    pairs = [f"{printable(file)} = {printable(first[key])}" for file in test.names
             if (key := key_of.get(file)) in first]
    return [f"{len(pairs):,} test pictures are copies of {what} pictures: {listed(pairs, '; ')}."] if pairs else []


def _missing_pictures(
    about: _Benchmark, root: Path, name: str, everything: list[str], skip_bad: bool
) -> dict[str, str]:
    """Missing pictures: name -> reason. Raises DataError if all are missing, or some without `skip_bad`."""
    absent = _absent(root, everything)
    if len(absent) == len(everything):
        raise DataError(f"none of the {len(everything):,} pictures of {about.title} is there, beginning with "
                        f"{printable(str(root / everything[0]))}. {MISSING[name]}")
    refuse([Problem(f"of {len(everything):,} pictures of {about.title} are missing under {root}",
                    tuple(printable(file) for file in sorted(absent)), "Unpack the archives again")], skip_bad)
    return {file: f"{printable(file)} is missing." for file in absent}
