"""Classify pictures with a model of the zoo: python examples/predict_image.py [PICTURE ...]

Needs `pip install .`, but no torch and no connection.
"""

import sys
from pathlib import Path

import zoo

EXAMPLE = Path(__file__).parents[1] / "zoo/examples/ship.jpg"


def main(pictures: list[str]) -> None:
    model = zoo.load("metasaug-cifar10-lt")
    for picture in pictures or [str(EXAMPLE)]:
        prediction = model.predict(picture)
        best = prediction.top[0]
        print(f"{picture}: {best.label} ({best.probability:.1%}), a {best.group} class, seen {best.train_images:,} "
              "times in training")
        for group, probability in prediction.groups.items():
            print(f"  {group:7} {probability:.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
