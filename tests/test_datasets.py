"""The cuts: what goes into train, meta and test, and what must never meet."""

import hashlib
import pickle

import numpy as np
import pytest
from PIL import Image

from training.data.cifar import CIFAR, cut, load_cifar, long_tail_counts
from training.data.tables import list_class_folders
from training.errors import DataError


def write_class_folders(root, per_class: dict[str, int], size=(32, 32), seed=0):
    rng = np.random.default_rng(seed)
    for name, n in per_class.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / name / f"{i:04d}.png")


def write_cifar_batches(root, rows_per_file=40, seed=0):
    """The layout of the original CIFAR-10, small: five training files, a test file, names."""
    rng = np.random.default_rng(seed)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, _ in (*CIFAR["cifar10-lt"].train_files, *CIFAR["cifar10-lt"].test_files):
        batch = {"data": rng.integers(0, 256, (rows_per_file, 3072), dtype=np.uint8),
                 "labels": [i % 10 for i in range(rows_per_file)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    return folder


def content(split) -> set[bytes]:
    return {hashlib.sha256(picture.tobytes()).digest() for picture in split.pictures}


def test_long_tail_has_the_published_sizes():
    """CIFAR-10-LT at imbalance 100: 4990 down to 49; CIFAR-100-LT: 490 down to 4."""
    # Given the sizes of the authors' get_img_num_per_cls,
    # then ours are the same, end to end, and imbalance 1 cuts nothing.
    assert long_tail_counts(4990, 10, 100) == [4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49]
    hundred = long_tail_counts(490, 100, 100)
    assert hundred == [int(490 * 0.01 ** (c / 99.0)) for c in range(100)]
    assert (hundred[0], hundred[-1], sum(hundred)) == (490, 4, 10626)
    assert long_tail_counts(490, 100, 1) == [490] * 100


@pytest.mark.parametrize("imbalance", [0, 0.5, float("nan")])
def test_an_imbalance_below_one_is_refused(imbalance):
    with pytest.raises(DataError, match="--imbalance"):
        long_tail_counts(490, 100, imbalance)


def test_a_tail_without_pictures_is_refused():
    with pytest.raises(DataError, match="without a picture"):
        long_tail_counts(490, 100, 1000)


def test_no_picture_stands_in_two_splits_even_when_files_are_copies():
    # Given pictures of which some are copies of each other, across classes too, and some stand in the test set,
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 60)
    keys = [bytes([k]) for k in rng.integers(0, 250, 300)]
    banned = {bytes([k]) for k in range(0, 250, 10)}
    # when train and meta are cut,
    train, meta = cut(keys, labels, banned, 5, meta_per_class=3, imbalance=10, seed=1)
    # then no content is in both, none twice, none is a test picture's,
    used = [keys[i] for i in (*train, *meta)]
    assert len(set(used)) == len(used)
    assert not banned & set(used)
    # the meta set is balanced and the training set long-tailed.
    assert np.bincount(labels[meta]).tolist() == [3] * 5
    assert np.all(np.diff(np.bincount(labels[train])) <= 0)


def test_the_cut_depends_on_the_seed_alone():
    labels = np.repeat(np.arange(4), 50)
    keys = [i.to_bytes(2, "big") for i in range(200)]
    first, again, other = (cut(keys, labels, set(), 4, 5, 10, seed) for seed in (0, 0, 1))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_train_meta_and_test_of_the_real_pictures_are_disjoint_by_content(cifar10):
    # Given CIFAR-10, when it is cut at imbalance 100,
    data = load_cifar("cifar10-lt", cifar10, 100, 10, 0)
    # then sizes and names are the benchmark's, and no decoded picture stands in two splits.
    assert data.label_names[0] == "airplane"
    assert data.class_counts == (4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49)
    assert (len(data.meta), len(data.test)) == (100, 10_000)
    train, meta, test = content(data.train), content(data.meta), content(data.test)
    assert not (train & meta or train & test or meta & test)
    assert len(train) == len(data.train)


def test_the_original_files_are_read_and_named_honestly(tmp_path):
    # Given files in the original's layout that are not the published ones,
    folder = write_cifar_batches(tmp_path, rows_per_file=100)
    # when read from the folder above or from the folder itself,
    above, itself = (load_cifar("cifar10-lt", root, 5, 5, 0) for root in (tmp_path, folder))
    # then both give the same pictures, and the name says that they differ from the published ones.
    assert np.array_equal(above.train.pictures, itself.train.pictures)
    assert above.train.pictures.shape[1:] == (32, 32, 3)
    assert above.class_counts[0] == 45
    assert "differ" in above.source
    # And rows are channel-planar, as the original stores them.
    batch = pickle.loads((folder / "test_batch").read_bytes())
    assert np.array_equal(above.test.pictures[0][:, :, 0].ravel(), batch["data"][0][:1024])


@pytest.mark.promise("no code")
def test_a_pickle_that_runs_code_is_refused(tmp_path):
    # Given a batch file that would run a command when unpickled,
    folder = write_cifar_batches(tmp_path)
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": Evil()}))
    # when read, then it is refused by name, and nothing ran.
    with pytest.raises(DataError, match="data_batch_3"):
        load_cifar("cifar10-lt", tmp_path, 5, 2, 0)
    assert not canary.exists()


@pytest.mark.parametrize("broken", ["missing", "cut off", "no labels", "wrong size", "label out of range"])
def test_a_broken_original_file_is_one_clear_error(tmp_path, broken):
    folder = write_cifar_batches(tmp_path)
    path = folder / "data_batch_2"
    whole = path.read_bytes()
    batch = pickle.loads(whole)
    if broken == "missing":
        path.unlink()
    elif broken == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        if broken == "no labels":
            del batch["labels"]
        elif broken == "wrong size":
            batch["data"] = batch["data"][:, :100]
        else:
            batch["labels"][0] = 10
        path.write_bytes(pickle.dumps(batch))
    with pytest.raises(DataError, match="data_batch_2"):
        load_cifar("cifar10-lt", tmp_path, 5, 2, 0)


def test_missing_data_names_the_layouts_and_the_flag(tmp_path):
    with pytest.raises(DataError) as caught:
        load_cifar("cifar10-lt", tmp_path / "nowhere", 100, 10, 0)
    for word in ("--data", "cifar-10-batches-py", "train/CLASS", "--download", "does not exist"):
        assert word in str(caught.value)


def test_class_folders_that_contradict_are_named(tmp_path):
    ten = {f"c{i}": 12 for i in range(10)}
    write_class_folders(tmp_path / "a" / "train", ten)
    write_class_folders(tmp_path / "a" / "test", {**ten, "c9": 1, "extra": 1})
    with pytest.raises(DataError, match="extra"):
        load_cifar("cifar10-lt", tmp_path / "a", 2, 2, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        list_class_folders(tmp_path / "empty")
    (tmp_path / "empty" / "cat").mkdir()
    with pytest.raises(DataError, match="cat holds no pictures"):
        list_class_folders(tmp_path / "empty")
    write_class_folders(tmp_path / "case", {"Cat": 1, "cat": 1})
    with pytest.raises(DataError, match="Cat and cat"):
        list_class_folders(tmp_path / "case")


def test_unreadable_pictures_are_all_named_at_once(tmp_path):
    # Given class folders with one broken picture and one of another size,
    ten = {f"c{i}": 12 for i in range(10)}
    write_class_folders(tmp_path / "train", ten)
    write_class_folders(tmp_path / "test", dict.fromkeys(ten, 2), seed=9)
    (tmp_path / "test" / "c3" / "0000.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 32)).save(tmp_path / "test" / "c4" / "0001.png")
    # when loaded, then one error names both.
    with pytest.raises(DataError) as caught:
        load_cifar("cifar10-lt", tmp_path, 2, 2, 0)
    assert "c3/0000.png" in str(caught.value).replace("\\", "/")
    assert "40 x 32" in str(caught.value)
