"""What the training pictures tell about themselves: doubtful labels, near copies, where more pictures would help."""

import json

import numpy as np
import torch
from PIL import Image

from training.data.datasets import LongTailed, PictureFiles
from training.report.pictures import sections_of
from training.run.first_answer import fit_last_layer
from training.run.review import confused, doubtful, folds, more_pictures, near_copies, review, write_review
from zoo.pixels import LOCAL

NAMES = ("ant", "bee <&>", "cat")


def clusters(counts, seed=0, width=8):
    """Features of well-parted classes, and their labels."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    noise = torch.randn(len(labels), width, generator=torch.Generator().manual_seed(seed))
    return torch.eye(len(counts), width)[labels] * 8 + noise, labels


def fit(features, labels, steps):
    return fit_last_layer(features, labels, len(NAMES), 0.01, True, steps)


def test_wrong_labels_and_near_copies_are_found_and_shown(tmp_path):
    # Given pictures of three classes, two of them with a wrong label, and one that stands in two classes,
    features, labels = clusters((60, 40, 20))
    labels[[3, 70]] = torch.tensor([1, 2])
    features[110] = features[30] + 1e-3
    paths = []
    for i in range(len(labels)):
        Image.new("RGB", (40, 30), (i, 0, 99)).save(tmp_path / f"{i}.png")
        paths.append(f"{i}.png")
    pictures = PictureFiles(tmp_path, tuple(paths), labels.numpy())
    nothing = PictureFiles(tmp_path, (), np.zeros(0, np.int64))
    data = LongTailed(pictures, nothing, nothing, NAMES, "x", (0.5,) * 3, (0.5,) * 3)
    # when reviewed,
    found = review(features, data, fit)
    # then the wrong labels and the copy lead the list, each with its likely class, and the pair is found.
    likely = {row["path"]: row["likely"] for row in found["doubtful"]}
    assert likely[str(tmp_path / "3.png")] == "ant" and likely[str(tmp_path / "70.png")] == "bee <&>"
    assert likely[str(tmp_path / "110.png")] == "ant" and len(likely) <= 5
    assert [set(pair["paths"]) for pair in found["copies"]] == [{str(tmp_path / "30.png"), str(tmp_path / "110.png")}]
    # The report shows them; a picture that is gone is named.
    write_review(tmp_path, found)
    write_review(tmp_path, {"confused": confused(pictures, (labels.numpy() + 1) % 3, NAMES)})
    (tmp_path / "3.png").unlink()
    html = "".join(sections_of(tmp_path, LOCAL))
    assert html.count("data:image/jpeg") >= 6 and "cannot be read" in html
    assert "bee &lt;&amp;&gt;" in html and "<&>" not in html
    assert set(json.loads((tmp_path / "review.json").read_text())) == {"doubtful", "copies", "more", "confused"}


def test_doubt_is_by_the_mean_confidence_of_each_class():
    # Given class 0, whose pictures have 0.9 and 0.5 for it on average 0.7, and class 1 at 0.6,
    probabilities = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.72, 0.28], [0.2, 0.8], [0.4, 0.6]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    # then of the pictures that lean elsewhere only the one with at least 0.7 for class 0 is in doubt.
    assert doubtful(probabilities, labels) == [(2, 0)]


def test_every_class_is_in_every_fold_and_no_pair_uses_a_picture_twice():
    labels = torch.tensor([0] * 7 + [1] * 3 + [2])
    fold = folds(labels)
    assert [sorted(fold[labels == c].tolist()) for c in range(3)] == [[0, 0, 0, 1, 1, 2, 2], [0, 1, 2], [0]]
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    features[3], features[4] = features[0], features[0]
    assert near_copies(features, torch.tensor([0, 1, 2, 1, 2, 0])) in ([(0, 3)], [(0, 4)], [(3, 4)])


def test_more_pictures_help_most_where_few_leave_a_large_error():
    # Given a large class without errors, and two that are half wrong, of 10 and 100 pictures; with half of the pictures
    # all of the two are wrong, so that the error halves as pictures double: b = 1,
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 100)
    whole, half = torch.eye(3)[labels], torch.eye(3)[labels]
    whole[100:105], whole[110:160] = torch.eye(3)[0], torch.eye(3)[0]
    half[100:] = torch.eye(3)[0]
    rows = more_pictures(whole, half, labels, np.array([100, 10, 100]), NAMES)
    # then ten more help the small one most: by half of its error.
    assert [row["label"] for row in rows] == ["bee <&>", "cat", "ant"]
    mean = 1 / 3
    assert rows[0]["error"] == (0.5 * 10 + 2 * mean) / 12
    assert rows[0]["then"] == rows[0]["error"] / 2
