"""Train a model on your own pictures and use it: python examples/train_own_pictures.py PICTURES

PICTURES holds one folder per class. Needs `pip install '.[train]'`. It does the same as
`metasaug train folder --data PICTURES`, from Python.
"""

import sys
from pathlib import Path

import metasaug
import zoo


def main(pictures: Path, run: Path = Path("runs/mine"), *flags: str) -> None:
    """flags   of `metasaug train folder`, for example --minutes 10"""
    code = metasaug.main(["train", "folder", "--data", str(pictures), "--out", str(run), *flags])
    if code:
        sys.exit(code)
    model = zoo.load(run / "model")
    results = model.folder.results
    print(f"{model.name}: {1 - results['macro_error']:.1%} correct, as the mean over {len(model.labels)} classes")
    some = next(path for path in sorted(pictures.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    print(model.predict(some))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(Path(run) for run in sys.argv[2:3]), *sys.argv[3:])
