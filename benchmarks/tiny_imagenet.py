"""Write the list files of ImageNet-LT restricted to Tiny ImageNet's 200 classes, in ImageNet-LT's own format.

    python -m benchmarks.tiny_imagenet DIR     # DIR holds train/WNID/images/ and val/; the lists are written into it
    metasaug train imagenet-lt --data DIR --input-size 64 --crops shift --color-jitter 0 --architecture resnet18-small

Tiny ImageNet has 500 pictures of 64 x 64 per class. Of each class, 20 are the val list, from which the meta set is
drawn. The training list has as many pictures of a class as ImageNet-LT, at most 480. The 50 validation pictures per
class are the test set. This tests the large-scale setting of the paper (frozen backbone, diagonal covariances,
look-ahead through the last layer) on real pictures. It is not an ImageNet-LT result.
"""

import sys
from pathlib import Path

import numpy as np

from training.errors import DataError
from zoo import label_names
from zoo.files import write_atomically

MOST, VAL = 480, 20  # pictures a class


def write_lists(root: Path) -> dict[str, int]:
    """Write ImageNet_LT_train.txt, _val.txt and _test.txt into `root`. Returns how many pictures each names."""
    published = dict(zip(label_names.imagenet_wnids(), label_names.imagenet_lt_counts(), strict=True))
    wnids = sorted(path.name for path in (root / "train").glob("n*") if path.is_dir())
    if not wnids:
        raise DataError(f"{root} holds no train/WNID/images: give the unpacked folder tiny-imagenet-200.")
    label = {wnid: number for number, wnid in enumerate(wnids)}
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for wnid in wnids:
        files = sorted(path.name for path in (root / "train" / wnid / "images").glob("*.JPEG"))
        drawn = [files[i] for i in np.random.default_rng(label[wnid]).permutation(len(files))]
        parts = {"val": drawn[:VAL], "train": drawn[VAL:][: min(published[wnid], MOST)]}
        for part, names in parts.items():
            lines[part] += [f"train/{wnid}/images/{name} {label[wnid]}" for name in sorted(names)]
    for line in (root / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines():
        name, wnid, *_ = line.split("\t")
        lines["test"].append(f"val/images/{name} {label[wnid]}")
    for part, rows in lines.items():
        write_atomically(root / f"ImageNet_LT_{part}.txt", ("\n".join(rows) + "\n").encode())
    return {part: len(rows) for part, rows in lines.items()}


if __name__ == "__main__":
    print(", ".join(f"{count:,} {part}" for part, count in write_lists(Path(sys.argv[1])).items()))
