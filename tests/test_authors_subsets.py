"""The authors' own CIFAR-LT pictures."""

import random

import numpy as np
import pytest

from tests.conftest import DATA
from training.data.authors_subsets import authors_long_tail, authors_meta
from training.data.cifar import CIFAR_MEAN, CIFAR_STD, cut_as_the_authors, find_pool, load_cifar, long_tail_counts


def as_in_their_scripts(targets: list[int], num_classes: int, imb_factor: float, num_meta: int = 10):
    """data_utils.py and MetaSAug_LDAM_train.py from end to end, global seeds and deletions as there."""
    data = np.arange(len(targets))
    np.random.seed(6)  # at import of data_utils
    meta, rest = [], []
    for j in range(num_classes):
        img_id_list = [i for i, label in enumerate(targets) if label == j]
        np.random.shuffle(img_id_list)
        meta.extend(img_id_list[:num_meta])
        rest.extend(img_id_list[num_meta:])
    meta_data = np.delete(data, rest, axis=0)
    train_data, train_targets = np.delete(data, meta, axis=0), np.delete(targets, meta, axis=0)
    np.random.seed(42)
    random.seed(42)
    img_max = (len(targets) - num_meta * num_classes) / num_classes
    img_num_list = [int(img_max * imb_factor ** (c / (num_classes - 1.0))) for c in range(num_classes)]
    delete = []
    for j in range(num_classes):
        img_id_list = [i for i, label in enumerate(train_targets) if label == j]
        random.shuffle(img_id_list)
        delete.extend(img_id_list[img_num_list[j]:])
    return np.delete(train_data, delete, axis=0), meta_data


@pytest.mark.parametrize(("num_classes", "imbalance"), [(10, 10), (10, 100), (10, 200), (100, 50)])
def test_the_flag_draws_what_the_authors_scripts_draw(num_classes, imbalance):
    # Given labels in a mixed order, as in the original files, of the benchmark's size,
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(num_classes), 50_000 // num_classes))
    # when both draw, then training and meta set are the same, picture by picture.
    train, meta = cut_as_the_authors(labels, num_classes, 10, imbalance)
    their_train, their_meta = as_in_their_scripts(labels.tolist(), num_classes, 1 / imbalance)
    assert np.array_equal(train, their_train)
    assert np.array_equal(meta, their_meta)
    assert not set(train.tolist()) & set(meta.tolist())


def test_the_authors_released_model_knows_these_pictures(cifar10):
    """A network is surer of pictures it was trained on. In the tail, of 49 to 138 pictures, that tells them apart."""
    torch = pytest.importorskip("torch")
    from zoo.architectures import create

    # Given the authors' CIFAR-10-LT model, and the pictures that the flag says it was trained on,
    file = DATA.parent / "reference" / "MetaSAug_cifar10_CE_imb0.01_ckpt.pth.tar"
    if not file.exists():
        pytest.skip(f"the authors' checkpoint is not here: {file.name} in ../shared/reference")
    theirs = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    model = create("resnet32", 10)
    ours = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    model.load_state_dict(dict(zip(ours, [v for k, v in theirs.items() if "num_batches" not in k], strict=True)),
                          strict=False)
    model.eval()
    pool = find_pool("cifar10-lt", cifar10)
    labels, names = pool.labels, pool.label_names
    _, rest = authors_meta(labels, 10, 10)
    trained_on = rest[authors_long_tail(labels[rest], long_tail_counts(4990, 10, 100))]
    others = np.setdiff1d(rest, trained_on)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))

    def accuracy(c: int, places: np.ndarray) -> float:
        pictures = pool.pick(places[labels[places] == c][:200]).pictures
        with torch.no_grad():
            scores = model((torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std)
        return (scores.argmax(1) == c).float().mean().item()

    # when it is asked about them and about others of the same classes,
    # then it knows nearly all of these, and misses a quarter or more of the others.
    for name in ("horse", "ship", "truck"):
        c = names.index(name)
        assert accuracy(c, trained_on) > 0.9
        assert accuracy(c, others) < 0.8


def test_the_flag_reaches_the_data(cifar10):
    data = load_cifar("cifar10-lt", cifar10, 100, 10, 0, subset="authors")
    assert data.class_counts == tuple(long_tail_counts(4990, 10, 100))
    assert np.bincount(data.meta.labels).tolist() == [10] * 10
    assert "authors" in data.notes[0]
