"""The models that the demo offers. Each is opened once, at first use."""

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

import zoo
from zoo.directions import last_layer
from zoo.hub import own_copies
from zoo.loading import how_to_get, open_folder
from zoo.model_folder import CARD, CONFIG, COVARIANCE, ONNX, ModelFolder
from zoo.registry import find as zoo_find

TITLES = {"metasaug": "MetaSAug", "isda": "ISDA", "heldout": "Held-out augmentation", "ce": "Plain cross entropy",
          "ldam": "LDAM", "focal": "Focal loss", "drw": "Re-weighted late", "logit-adjustment": "Logit adjustment",
          "balanced-softmax": "Balanced softmax"}
HOW_TRAINED = {"metasaug": "Rare classes count more and vary more", "isda": "Features vary, by class",
               "heldout": "Rare classes count more, and vary like held-out pictures",
               "ce": "Training as usual", **dict.fromkeys(("logit-adjustment", "balanced-softmax"),
                                                          "Rare classes are not outweighed")}
AT_ONCE = 4  # models side by side
FILES = (CONFIG, ONNX, CARD)  # of a model on the Hub, fetched together


class Model:
    """What the page says about a model, from its folder; the network is loaded when it is first needed."""

    def __init__(self, name: str, folder: ModelFolder, source: str):
        self.name, self.folder, self._source = name, folder, source
        self.config = folder.config
        self.ours: dict[str, Any] = self.config["metasaug"]
        self.labels: list[str] = self.config["label_names"]
        self.class_counts: list[int] | None = self.ours.get("class_counts")
        self.groups: list[str] = self.ours["groups"]
        self.groups_by: str = self.ours["groups_by"]
        self.results: dict[str, Any] = folder.results or {}
        self.method: str = self.ours["method"]
        self.title = TITLES.get(self.method, self.method)
        self._lock = threading.Lock()
        self._predictor: zoo.Predictor | None = None

    @property
    def loaded(self) -> bool:
        return self._predictor is not None

    @property
    def predictor(self) -> zoo.Predictor:
        with self._lock:  # two visitors at the same time wait for one load
            if self._predictor is None:
                self._predictor = zoo.load(self._source)
            return self._predictor

    @cached_property
    def weight_CA(self) -> np.ndarray | None:
        """The weight of the last layer, if it is in the folder."""
        try:
            return last_layer(self.folder)
        except zoo.ZooError:  # missing, or cannot be fetched now: no activation map
            return None

    @cached_property
    def by_size(self) -> list[int]:
        """The classes, largest first."""
        counts = self.class_counts or [0] * len(self.labels)
        return sorted(range(len(counts)), key=lambda c: -counts[c])

    @property
    def has_directions(self) -> bool:
        return COVARIANCE in self.folder

    def prior_of_world(self, world: float) -> np.ndarray | None:
        """How common the classes are: 1 as in training, 0 all equal, -1 inverted; None if not known."""
        if not self.class_counts or self.ours.get("prior") is None:
            return None
        return np.maximum(np.asarray(self.class_counts, np.float64), 1) ** world


@dataclass(frozen=True)
class Offer:
    """A name on the page. `weights`: bundled, hub, unpublished, or "yours" for a folder named at the start."""

    name: str
    source: str
    weights: str
    trained_on: str
    method: str
    entry: zoo.Entry | None = None

    @property
    def ready(self) -> bool:
        return self.weights != "unpublished"

    @property
    def caption(self) -> str:
        """Its text in a list of choices."""
        where = {"bundled": "", "yours": " (yours)", "hub": " (to be fetched)"}
        return self.name + where.get(self.weights, " (not published yet)")

    @property
    def what_to_do(self) -> str:
        return how_to_get(self.entry) if self.entry else ""


_offers: dict[str, Offer] = {}
_models: dict[str, Model] = {}
_lock = threading.Lock()


def offer(own: Iterable[str] = ()) -> list[str]:
    """Set the models on offer: `own` (folders, or any name for zoo.load), then the zoo's models.

    Returns the names to begin with: `own`, else the first bundled set. Raises ZooError if one of `own` cannot be
    opened.
    """
    own = list(own)
    with _lock:
        _offers.clear()
        _models.clear()
        registered = {entry.name: entry for entry in zoo.list_models()}
        begin = []
        for source in own:
            if (entry := zoo_find(source)) is not None:
                if entry.weights == "unpublished":
                    open_folder(source)  # raises, and says what to do, unless METASAUG_HUB_OWNER has it
                begin.append(entry.name)
                continue
            model = _open(source)
            while model.name in registered or model.name in _offers:
                model.name += " (yours)" if model.name in registered else "'"
            _models[model.name] = model
            _offers[model.name] = Offer(model.name, source, "yours", _trained_on(model), model.method)
            begin.append(model.name)
        for entry in sorted(registered.values(), key=lambda entry: entry.weights == "unpublished"):
            weights = "hub" if entry.weights == "unpublished" and own_copies() else entry.weights
            trained_on = entry.dataset + ("" if entry.imbalance is None else f", imbalance {entry.imbalance:g}")
            _offers[entry.name] = Offer(entry.name, entry.name, weights, trained_on, entry.method, entry)
    return list(dict.fromkeys(begin))[:AT_ONCE] or first_set()


def _open(source: str) -> Model:
    if os.path.isdir(source):
        source = os.path.abspath(source)  # the demo changes the working directory
    folder = open_folder(source, FILES)
    return Model(folder.config["metasaug"]["name"] or os.path.basename(source), folder, source)


def _trained_on(model: Model) -> str:
    return model.ours["dataset"]


def offers() -> list[Offer]:
    if not _offers:
        offer()
    return list(_offers.values())


def ready_names() -> list[str]:
    return [o.name for o in offers() if o.ready]


def find(name: Any) -> Offer | None:
    offers()
    return _offers.get(name) if isinstance(name, str) else None


def model(name: str) -> Model:
    """A model on offer, opened once. Raises ZooError if it cannot be opened or fetched, or is not published."""
    found = find(name)
    if found is None:
        raise zoo.UnknownModelError(f"Unknown model: one of {', '.join(ready_names())}.")
    if name not in _models:
        fresh = Model(name, open_folder(found.source, FILES), found.source)
        with _lock:  # a second thread takes the first one's model
            _models.setdefault(name, fresh)
    return _models[name]


def sets() -> dict[str, list[str]]:
    """Sets of models to compare, by the data that they were trained on, MetaSAug first.

    A set has your own models and three of the bundled ones: MetaSAug, cross entropy and logit adjustment. Visitors can
    choose the others.
    """
    found: dict[str, list[str]] = {}
    for o in sorted(offers(), key=lambda o: o.method != "metasaug"):
        if o.weights == "yours" or (o.weights == "bundled" and o.method in ("metasaug", "ce", "logit-adjustment")):
            found.setdefault(o.trained_on, []).append(o.name)
    order = [o.trained_on for o in offers()]
    return dict(sorted(((key, names[:AT_ONCE]) for key, names in found.items()), key=lambda item: order.index(item[0])))


def first_set() -> list[str]:
    found = [names for key, names in sets().items() if any(_offers[n].weights == "bundled" for n in names)]
    if not found:
        raise zoo.ZooError("No bundled models are here: install the package again, or train one (metasaug train).")
    return found[0]


def opened(names: Iterable[str]) -> list[Model]:
    """The models that can be opened; the cards of the others say why they cannot."""
    return list(filter(None, (quietly(model, name) for name in names)))


def quietly(function: Callable, *arguments):
    try:
        return function(*arguments)
    except zoo.ZooError:
        return None
