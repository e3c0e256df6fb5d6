"""Does a prior that is estimated from the pictures help? Errors of bundled models on test sets of other frequencies.

    python -m benchmarks.prior metasaug-cifar10-lt --data cifar10/test      # writes benchmarks/results/prior.json

Shape suffixes: N pictures, C classes.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import zoo
from zoo.files import write_atomically
from zoo.predictor import Predictor

RESULTS = Path(__file__).resolve().parent / "results" / "prior.json"


@dataclass(frozen=True)
class Row:
    """Errors with the model's own prior, the estimated one, and the true one; means over `draws` of the pictures."""

    model: str
    frequencies: str
    draws: int
    pictures: int
    own: float
    estimated: float
    true: float


def frequencies(C: int, imbalance: float = 100) -> dict[str, np.ndarray]:
    """Class frequencies of a test set, by name, from the largest training class to the smallest."""
    falling_C = imbalance ** -(np.arange(C) / (C - 1))
    three_C = np.isin(np.arange(C), (0, C // 2, C - 1)).astype(float)
    return {"equal": np.ones(C), "as in training": falling_C, "the reverse of training": falling_C[::-1],
            "three classes only": three_C}


def drawn(labels_N: np.ndarray, p_C: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Places of as many pictures as there are with these class frequencies, each at most once."""
    have_C = np.bincount(labels_N, minlength=len(p_C))
    number_C = np.round(p_C * (have_C[p_C > 0] / p_C[p_C > 0]).min()).astype(int)
    return np.concatenate([rng.permutation(np.flatnonzero(labels_N == c))[:n] for c, n in enumerate(number_C)])


def measured(model: Predictor, logits_NC: np.ndarray, labels_N: np.ndarray, draws: int) -> list[Row]:
    assert model.class_counts is not None
    by_size = np.argsort(-np.array(model.class_counts), kind="stable")
    rows = []
    for name, falling_C in frequencies(len(model.labels)).items():
        p_C = np.empty(len(falling_C))
        p_C[by_size] = falling_C / falling_C.sum()
        errors, sizes = [], []
        for seed in range(draws):
            at = drawn(labels_N, p_C, np.random.default_rng(seed))
            logits, labels = logits_NC[at], labels_N[at]
            estimated_C = model.estimate_prior(zoo.Prediction("", logits=each) for each in logits)
            shifts = [model.prior_shift(prior) for prior in (None, estimated_C, p_C)]
            errors.append([(model.scores(logits, shift).argmax(1) != labels).mean() for shift in shifts])
            sizes.append(len(at))
        own, estimated, true = np.mean(errors, 0)
        rows.append(Row(model.name, name, draws, int(np.mean(sizes)), float(own), float(estimated), float(true)))
    return rows


def main(names: tyro.conf.Positional[tuple[str, ...]], data: Path, draws: int = 5, out: Path = RESULTS) -> None:
    """Measure each model.

    Args:
        names: Models of the zoo, all with the same classes.
        data: Folder with the test pictures: DATA/CLASS/picture.
        draws: Test sets drawn for each class frequencies.
        out: File of the results.
    """
    rows: list[Row] = []
    for name in names:
        model = zoo.load(name)
        paths = [path for label in model.labels for path in sorted((data / label).iterdir())]
        labels_N = np.array([model.labels.index(path.parent.name) for path in paths])
        logits = [answer.logits for answer in model.predict_each(paths, top_k=1) if answer.logits is not None]
        rows += measured(model, np.stack(logits), labels_N, draws)
    write_atomically(out, (json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n").encode())
    print("| model | class frequencies | pictures | own prior | estimated | true |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| `{row.model}` | {row.frequencies} | {row.pictures:,} | {row.own:.1%} | {row.estimated:.1%} | "
              f"{row.true:.1%} |")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.prior")
