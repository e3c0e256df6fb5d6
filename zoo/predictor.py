"""A loaded model: pictures in, predictions with head, medium and tail groups out. Runs in ONNX Runtime or torch.

Shape suffixes: N pictures, C classes, A features.
"""

import copy
import difflib
import itertools
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from zoo.calibration import UNFAMILIAR, Calibration, estimate_prior, probabilities
from zoo.errors import BackendError, ModelFolderError, PictureError, ZooError
from zoo.files import same_text
from zoo.images import NamedPicture, Picture, preprocess, read
from zoo.labels import GROUPS, UNKNOWN
from zoo.listing import pictures_inside, pictures_under
from zoo.machine import cores
from zoo.model_folder import ONNX, ONNX_INT8, ModelFolder
from zoo.onnx_file import refuse_unsafe
from zoo.pixels import Facts, Reading
from zoo.trial import check_outputs, require_harmless

Backend = Literal["onnx", "torch"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "int8"]
Prior = Literal["uniform", "train"] | Sequence[float] | np.ndarray
_Shown = tuple[np.ndarray, Facts]  # the network's input, and the facts about the file


@dataclass(frozen=True)
class TopClass:
    """One of a picture's likeliest classes."""

    label: str
    probability: float
    group: str  # head, medium, tail; unknown if the training counts are
    train_images: int | None  # pictures of this class in training; None if not known
    index: int


@dataclass(frozen=True)
class Classes:
    """What a model knows about its classes, in the order of its outputs.

    allowed_C    which of them are possible answers (`Predictor.only`)
    prior_C      the class frequencies that its probabilities assume; None if not known
    calibration  None if the model has none
    """

    labels: tuple[str, ...]
    groups: tuple[str, ...]
    counts: tuple[int, ...] | None
    allowed_C: np.ndarray
    prior_C: np.ndarray | None
    calibration: Calibration | None

    def named(self, c: int, probability: float) -> TopClass:
        return TopClass(self.labels[c], float(probability), self.groups[c],
                        None if self.counts is None else self.counts[c], int(c))

    def fair(self, logits_NC: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Scores whose softmax assumes equally frequent classes, if the model's prior is known."""
        return logits_NC / temperature - (0 if self.prior_C is None else np.log(self.prior_C))

    def inside(self, logits_NC: np.ndarray, coverage: float) -> np.ndarray:
        """bool (N, C): whether a class is in the prediction set. The likeliest class always is."""
        if self.calibration is None:
            raise ZooError("This model has no calibration, which prediction sets need: `metasaug calibrate FOLDER "
                           "--data DIR` adds one.")
        p_NC = probabilities(self.fair(logits_NC, self.calibration.temperature))
        inside_NC = (1 - p_NC <= self.calibration.thresholds(coverage)) & self.allowed_C
        inside_NC[np.arange(len(p_NC)), np.where(self.allowed_C, p_NC, -1).argmax(1)] = True
        return inside_NC


@dataclass(frozen=True)
class Prediction:
    """A model's answer for one picture; or, in a batch, why there is none (`error`, all else empty).

    top            the likeliest classes, likeliest first
    groups         probability mass of head, medium and tail, in that order
    probabilities  (C,) float32, in the order of the model's labels; softmax of logits and prior
    logits         (C,) the network's output, before any prior
    features       (A,) the last layer's input              feature_map   (A, H, W), whose mean they are, or None
    facts, note    facts about the file, and in words what was not read of it: other pages, a missing end
    familiarity    the share of calibration pictures that look stranger to the model; under zoo.calibration.UNFAMILIAR
                   the picture is unlike anything in training. None if the model has no calibration
    classes        of the model
    """

    source: str
    top: tuple[TopClass, ...] = ()
    groups: Mapping[str, float] = field(default_factory=dict)
    probabilities: np.ndarray | None = field(default=None, repr=False, compare=False)
    logits: np.ndarray | None = field(default=None, repr=False, compare=False)
    features: np.ndarray | None = field(default=None, repr=False, compare=False)
    feature_map: np.ndarray | None = field(default=None, repr=False, compare=False)
    error: str | None = None
    facts: Facts = field(default=Facts(), compare=False)
    note: str = ""
    familiarity: float | None = None
    classes: Classes | None = field(default=None, repr=False, compare=False)

    def set(self, coverage: float = 0.9) -> tuple[TopClass, ...]:
        """The classes that the picture may show, likeliest first: one class if the model is sure, more if it is not.

        For each class, the set holds the true class of at least this share of its pictures (label-conditional
        conformal prediction), whatever the class frequencies. Raises ZooError if the model has no calibration. Empty
        if the prediction has an error.
        """
        if self.error is not None:
            return ()
        if self.classes is None or self.logits is None or self.probabilities is None:
            raise ZooError("This prediction no longer has its logits: ask for the set before they are dropped.")
        (inside_C,) = self.classes.inside(self.logits[None], coverage)
        order = np.argsort(-self.probabilities, kind="stable")
        inside_C[order[0]] = True  # the first answer, which a prior may have changed
        return tuple(self.classes.named(c, self.probabilities[c]) for c in order if inside_C[c])

    @property
    def unfamiliar(self) -> bool:
        """Whether the picture is unlike anything in training, as far as the model can tell."""
        return self.familiarity is not None and self.familiarity < UNFAMILIAR

    @property
    def margin(self) -> float:
        """The probability of the likeliest class minus that of the next one; nan if there is an error."""
        if self.probabilities is not None and len(self.probabilities) > 1:
            second, first = np.sort(np.partition(self.probabilities, -2)[-2:])
            return float(first) - float(second)
        first, second = (*(each.probability for each in self.top[:2]), *[0.0, 0.0][: 2 - len(self.top[:2])])
        return first - second if self.top else float("nan")

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.source}\n  {self.error}"
        width = max(len(c.label) for c in self.top)
        lines = [self.source + (f" ({self.note})" if self.note else "")] + [
            f"  {c.label:<{width}}  {c.probability:7.2%}  {c.group:<7}"
            + ("" if c.train_images is None else f" seen {c.train_images:,} times in training")
            for c in self.top
        ]
        lines.append("  " + "   ".join(f"{g} {p:.1%}" for g, p in self.groups.items()))
        return "\n".join([*lines, *["  unlike anything in training: perhaps none of the classes"] * self.unfamiliar])


class Predictor:
    """A model of the zoo; `zoo.load` makes one.

    name, labels, class_counts, groups, groups_by    of its classes, in the order of its outputs
    folder      the ModelFolder, with its config, results and card
    device      "cpu" or "cuda", where it runs in fact
    precision   "fp32", or "int8": the quantised ONNX file, on the CPU
    threads     of ONNX Runtime on the CPU; 0: one per core
    reading     how picture files are read, as in training; replace it to read them differently, or larger ones
    reduced     decode JPEGs at a half, quarter or eighth of their size if that is at least twice the network's: faster
                for photographs, with slightly other probabilities
    """

    def __init__(
        self, folder: ModelFolder, backend: Backend = "onnx", device: Device = "auto", name: str | None = None,
        precision: Precision = "fp32", threads: int = 0,
    ):
        if backend not in ("onnx", "torch"):
            raise BackendError(f"Unknown backend {backend!r}: onnx or torch.")
        if device not in ("auto", "cpu", "cuda"):
            raise BackendError(f"Unknown device {device!r}: auto, cpu or cuda.")
        if precision not in ("fp32", "int8"):
            raise BackendError(f"Unknown precision {precision!r}: fp32 or int8.")
        if precision == "int8" and (backend != "onnx" or device == "cuda"):
            raise BackendError("int8 runs in ONNX Runtime on the CPU: leave out backend= and device=, or precision=.")
        self.folder, self.backend, self.precision, self.threads = folder, backend, precision, threads
        config = folder.config
        self.name: str = name or config["metasaug"]["name"]
        self.labels: tuple[str, ...] = tuple(config["label_names"])
        counts = config["metasaug"].get("class_counts")
        self.class_counts: tuple[int, ...] | None = None if counts is None else tuple(counts)
        self.groups: tuple[str, ...] = tuple(config["metasaug"]["groups"])
        self.groups_by: str = config["metasaug"]["groups_by"]
        self.reading = Reading().over(config["metasaug"].get("reading") or {})
        self.calibration = Calibration.of(config)
        prior = config["metasaug"].get("prior")
        self.classes = Classes(self.labels, self.groups, self.class_counts, np.ones(len(self.labels), bool),
                               None if prior is None else self._known_prior(prior), self.calibration)
        self.reduced = False
        self._module = None
        self._network: _Network = (_TorchNetwork(self.module, device) if backend == "torch"
                                   else self._onnx(ONNX_INT8, "cpu") if precision == "int8"
                                   else self._onnx(ONNX, device))
        self.device = self._network.device

    def __repr__(self) -> str:
        precision = f" {self.precision}" if self.precision != "fp32" else ""
        return f"<{self.name}: {len(self.labels)} classes, {self.backend}{precision} on {self.device}>"

    def _onnx(self, file: str, device: Device) -> "OnnxNetwork":
        content, name = self.folder.read(file), str(self.folder.path / file)
        if not self.folder.known:
            refuse_unsafe(content, name)
            require_harmless(content, self.folder.config, name)
        return OnnxNetwork(content, self.folder.config, name, device, self.threads)

    def only(self, labels: Iterable[str]) -> "Predictor":
        """This model restricted to these classes: those that can occur in your pictures.

        The probabilities are conditional on one of these classes. Raises ZooError for an unknown label, with similar
        names.
        """
        return self._narrowed(self._are(labels))

    def without(self, labels: Iterable[str]) -> "Predictor":
        """This model without these classes. Raises as `only`."""
        return self._narrowed(~self._are(labels))

    def _are(self, labels: Iterable[str]) -> np.ndarray:
        """(C,) whether a class is one of these."""
        named = {same_text(label) for label in ([labels] if isinstance(labels, str) else labels)}
        known = {same_text(label) for label in self.labels}
        if unknown := sorted(named - known):
            near = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.5)
            more = f" ({len(unknown)} such names)" if len(unknown) > 1 else ""
            hint = f". Did you mean {' or '.join(near)}?" if near else f"; `metasaug info {self.name}` lists them."
            raise ZooError(f"{self.name} has no class {unknown[0]!r}{more}{hint}")
        return np.array([same_text(label) in named for label in self.labels])

    def _narrowed(self, which_C: np.ndarray) -> "Predictor":
        allowed_C = self.classes.allowed_C & which_C
        if not allowed_C.any():
            raise ZooError(f"No class of {self.name} is left: at least one must be possible.")
        narrowed = copy.copy(self)
        narrowed.classes = replace(self.classes, allowed_C=allowed_C)
        return narrowed

    @property
    def module(self):
        """The torch module with these weights, in eval mode. Its input is what `preprocess` returns."""
        if self._module is None:
            self._module = torch_module(self.folder)
        return self._module

    def preprocess(self, picture: Picture, name: str | None = None) -> np.ndarray:
        """The network's input: float32 (3, H, W). Raises PictureError."""
        return self._shown(picture, name)[0]

    def _shown(self, picture: Picture, name: str | None = None) -> tuple[np.ndarray, Facts]:
        decoded, facts = read(picture, name, self._shrink if self.reduced else None, self.reading)
        return preprocess(decoded, self.folder.config["pretrained_cfg"]), facts

    def _shrink(self, width: int, height: int) -> int | None:
        """How many times smaller a JPEG is decoded (zoo.images.Shrink), so that it stays twice the network's size."""
        shown = self.folder.config["pretrained_cfg"]
        spare = min(width / shown["input_size"][2], height / shown["input_size"][1]) * shown["crop_pct"] / 2
        return next((times for times in (8, 4, 2) if spare >= times), None)

    def predict(self, picture: Picture, top_k: int = 5, prior: Prior | None = None, tau: float = 1.0) -> Prediction:
        """The likeliest classes of one picture. Raises PictureError if it cannot be read.

        picture  a path, the bytes of a file, a PIL image, or an array (zoo.images.decode)
        top_k    how many classes `top` holds, at most all
        prior    class frequencies where the picture is from: "uniform", "train" (as in training), or C numbers, 0 for
                 classes that cannot occur; None keeps the network's answer. Logits move by
                 tau (log prior - log own prior); the own prior is the one that training made the network assume
                 (Menon et al. 2021)
        """
        _at_least_one(top_k=top_k)
        shift_C = self.prior_shift(prior, tau)
        shown, facts = self._shown(picture)
        answer = self._answers([shown], [_name_of(picture, 0)], [facts], top_k, shift_C, feature_maps=True)[0]
        if answer.error is not None:
            raise ModelFolderError(f"{self.name}: {answer.error}")
        return answer

    def predict_batch(
        self, pictures: Iterable[Picture | NamedPicture], top_k: int = 5, prior: Prior | None = None, tau: float = 1.0,
        batch_size: int = 64, feature_maps: bool = False,
    ) -> list[Prediction]:
        """One prediction per picture, in order. A bad picture gets one with `error` and never ends the batch.

        feature_maps   keep them: 0.4 MB per picture for a ResNet-50
        """
        return list(self.predict_each(pictures, top_k, prior, tau, batch_size, feature_maps))

    def predict_folder(
        self, folder: str | os.PathLike, top_k: int = 5, prior: Prior | None = None, tau: float = 1.0,
        batch_size: int = 64,
    ) -> Iterator[Prediction]:
        """Predict every picture under `folder`, as zoo.files.walk finds them; `source` is the path.

        A subfolder that cannot be listed gives a prediction with the reason. Raises PictureError if there are no
        pictures.
        """
        return self.predict_each(pictures_under(folder), top_k, prior, tau, batch_size)

    def predict_archive(
        self, archive: str | os.PathLike, top_k: int = 5, prior: Prior | None = None, tau: float = 1.0,
        batch_size: int = 64,
    ) -> Iterator[Prediction]:
        """Predict every picture of a zip, which is never unpacked; `source` is its path and the name inside.

        Raises PictureError if the archive is refused (zoo.archives says why).
        """
        return self.predict_each(pictures_inside(archive), top_k, prior, tau, batch_size)

    def reweigh(
        self, answer: Prediction, prior: Prior | None = None, tau: float = 1.0, top_k: int = 5
    ) -> Prediction:
        """The same answer for another prior, from its logits: what `predict` would return, without the network."""
        _at_least_one(top_k=top_k)
        if answer.logits is None:
            return answer
        shift_C = self.prior_shift(prior, tau)
        p_C = self._probabilities(answer.logits[None], shift_C)[0]
        return replace(answer, top=self._top(p_C, top_k, shift_C), groups=self._group_mass(p_C),
                       probabilities=p_C.astype(np.float32))

    def predict_each(
        self, pictures: Iterable[Picture | NamedPicture], top_k: int = 5, prior: Prior | None = None, tau: float = 1.0,
        batch_size: int = 64, feature_maps: bool = False, workers: int | None = None,
    ) -> Iterator[Prediction]:
        """Like `predict_batch`, but one after another: the input may be endless, memory stays constant.

        feature_maps  as in `predict_batch`
        workers       threads that read and decode the next batch while the network computes; by default one per core.
                      0: no threads, and each picture is read only when its turn comes. Results do not depend on it
        """
        _at_least_one(top_k=top_k, batch_size=batch_size)
        workers = cores() if workers is None else workers
        if not isinstance(workers, int) or workers < 0:
            raise ZooError(f"workers {workers!r}: an integer, at least 0.")
        _refuse_single(pictures)
        shift_C = self.prior_shift(prior, tau)
        rows: list[str | Prediction] = []  # the name of a good picture, or the row of a bad one
        ready: list[np.ndarray] = []
        seen: list[Facts] = []  # of each picture in `ready`

        def flush() -> Iterator[Prediction]:
            names = [row for row in rows if isinstance(row, str)]
            answers = iter(self._answers(ready, names, seen, top_k, shift_C, feature_maps) if ready else ())
            yield from [next(answers) if isinstance(row, str) else row for row in rows]
            for each in (rows, ready, seen):
                each.clear()

        # A batch is full when it has batch_size good pictures: bad ones never change which pictures are computed
        # together, and so never a digit of their scores.
        for name, shown in self._prepared(pictures, batch_size, workers):
            if isinstance(shown, PictureError):
                rows.append(Prediction(name, error=str(shown)))
            else:
                rows.append(name)
                ready.append(shown[0])
                seen.append(shown[1])
            if len(ready) in (0, batch_size):
                yield from flush()
        yield from flush()

    def _prepared(
        self, pictures: Iterable[Picture | NamedPicture], ahead: int, workers: int
    ) -> Iterator[tuple[str, "_Shown | PictureError"]]:
        """The name of each picture with the network's input or an error, in order.

        ahead  how many pictures the threads may decode in advance
        """
        def prepare(picture: Picture | PictureError, name: str | None) -> _Shown | PictureError:
            try:
                return picture if isinstance(picture, PictureError) else self._shown(picture, name)
            except PictureError as error:
                return error

        if workers == 0:
            for i, each in enumerate(pictures):
                name, picture = each if isinstance(each, NamedPicture) else (None, each)
                yield name or _name_of(picture, i), prepare(picture, name)
            return
        waiting: deque[tuple[str, Future[_Shown | PictureError]]] = deque()
        pool = ThreadPoolExecutor(workers, "decode")
        try:
            for i, each in enumerate(pictures):
                name, picture = each if isinstance(each, NamedPicture) else (None, each)
                waiting.append((name or _name_of(picture, i), pool.submit(prepare, picture, name)))
                if len(waiting) > ahead:
                    name, shown = waiting.popleft()
                    yield name, shown.result()
            while waiting:
                name, shown = waiting.popleft()
                yield name, shown.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _answers(
        self, ready: list[np.ndarray], names: list[str], seen: list[Facts], top_k: int, shift_C: np.ndarray | None,
        feature_maps: bool,
    ) -> list[Prediction]:
        logits_NC, features_NA, made = self._network(np.stack(ready))
        maps = itertools.repeat(None, len(ready)) if made is None or not feature_maps else made
        p_NC = self._probabilities(logits_NC, shift_C)
        known = ([None] * len(ready) if self.calibration is None else
                 self.calibration.familiarity(self.classes.fair(logits_NC)).tolist())
        return [
            Prediction(name, self._top(p_C, top_k, shift_C), self._group_mass(p_C), p_C.astype(np.float32), logits_C,
                       features_A, feature_map, facts=facts, note=facts.note(self.reading), familiarity=familiarity,
                       classes=self.classes)
            if np.isfinite(p_C).all() else Prediction(name, error=NOT_FINITE)
            for name, facts, p_C, logits_C, features_A, feature_map, familiarity
            in zip(names, seen, p_NC, logits_NC, features_NA, maps, known, strict=True)
        ]

    def scores(self, logits_NC: np.ndarray, shift_C: np.ndarray | None = None) -> np.ndarray:
        """The input of softmax: logits / temperature + shift, in float64."""
        scores_NC = logits_NC.astype(np.float64)
        scores_NC = scores_NC if self.calibration is None else scores_NC / self.calibration.temperature
        return scores_NC if shift_C is None else scores_NC + shift_C

    def _probabilities(self, logits_NC: np.ndarray, shift_C: np.ndarray | None) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # infinity minus infinity: nan, which `_answers` reports
            return probabilities(self.scores(logits_NC, shift_C))

    def _known_prior(self, prior: Prior) -> np.ndarray | None:
        """The prior as numbers; None if it is "train" and the counts are not known or contain a 0."""
        if isinstance(prior, str) and prior == "train" and self.class_counts is None:
            return None
        prior_C = np.exp(self._log_prior(prior))
        return prior_C if prior_C.all() else None

    def _top(self, p_C: np.ndarray, top_k: int, shift_C: np.ndarray | None) -> tuple[TopClass, ...]:
        """The likeliest classes, without impossible ones."""
        best = np.argsort(-p_C, kind="stable")
        best = (best if shift_C is None else best[shift_C[best] > -np.inf])[:top_k]
        return tuple(self.classes.named(c, p_C[c]) for c in best)

    def _group_mass(self, p_C: np.ndarray) -> dict[str, float]:
        members = np.array(self.groups)
        return {g: float(p_C[members == g].sum()) for g in (*GROUPS, UNKNOWN) if g in self.groups}

    def estimate_prior(self, answers: Iterable[Prediction]) -> np.ndarray:
        """(C,) class frequencies of the pictures behind these answers, for `prior=`: zoo.calibration.estimate_prior.

        Trust it only if the pictures show these classes, as they look in training, and the model is calibrated. An
        impossible class has 0. Raises ZooError if the model's own prior is not known, or no picture was read.
        """
        if self.classes.prior_C is None:
            raise ZooError(f"{self.name} does not say which prior its training assumed: none can be estimated.")
        logits = [answer.logits for answer in answers if answer.logits is not None]
        if not logits:
            raise ZooError("No picture could be read: there is nothing to estimate a prior from.")
        allowed_C = self.classes.allowed_C
        p_NC = self._probabilities(np.stack(logits)[:, allowed_C], None)
        prior_C = np.zeros(len(self.labels))
        own_C = self.classes.prior_C[allowed_C]
        prior_C[allowed_C] = estimate_prior(p_NC, own_C / own_C.sum())
        return prior_C

    def prior_shift(self, prior: Prior | None, tau: float = 1.0) -> np.ndarray | None:
        """The shift (C,) that `predict` adds to the logits for this prior: -inf for impossible classes; None: no shift.

        Raises ZooError.
        """
        shift_C = None if prior is None else self._shift(prior, tau)
        if self.classes.allowed_C.all():
            return shift_C
        shift_C = np.where(self.classes.allowed_C, 0 if shift_C is None else shift_C, -np.inf)
        if not np.isfinite(shift_C).any():
            raise ZooError("The prior is 0 for every class that is left.")
        return shift_C

    def _shift(self, prior: Prior, tau: float) -> np.ndarray:
        own = self.folder.config["metasaug"].get("prior")
        if own is None:
            raise ZooError(f"{self.name} does not say which prior its training assumed: prior= cannot be used.")
        if not np.isfinite(tau):
            raise ZooError(f"tau {tau}: a finite number.")
        log_C = self._log_prior(prior)
        possible_C = np.isfinite(log_C)
        with np.errstate(over="ignore", invalid="ignore"):
            shift_C = tau * (np.where(possible_C, log_C, 0) - self._log_prior(own))
        if not np.isfinite(shift_C).all():
            raise ZooError(f"tau {tau} is too large for this prior.")
        return np.where(possible_C, shift_C, -np.inf)

    def _log_prior(self, prior: Prior) -> np.ndarray:
        """The logarithm of the normalised prior (C,); -inf where it is 0."""
        num_classes = len(self.labels)
        if isinstance(prior, str):
            if prior == "uniform":
                return np.full(num_classes, -np.log(num_classes))
            if prior != "train":
                raise ZooError(f"Unknown prior {prior!r}: uniform, train, or {num_classes} numbers.")
            if self.class_counts is None:
                raise ZooError(f"The training counts of {self.name} are not known: prior 'train' cannot be used.")
            prior = self.class_counts
        what = f"A prior is {num_classes} numbers, one a class, none below 0 and some above 0"
        try:
            p_C = np.asarray(prior, np.float64)
        except (TypeError, ValueError):
            raise ZooError(f"{what}, or uniform, or train.") from None
        if p_C.shape != (num_classes,):
            raise ZooError(f"{what}; got shape {p_C.shape}.")
        if not np.isfinite(p_C).all() or (p_C < 0).any() or not p_C.any():
            raise ZooError(f"{what}; got other numbers.")
        with np.errstate(divide="ignore"):
            log_C = np.log(p_C)
        return log_C - np.logaddexp.reduce(log_C)


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, (int, np.integer)) or number < 1:
            raise ZooError(f"{name} {number!r}: an integer, at least 1.")


def _refuse_single(pictures: Any) -> None:
    """Raises PictureError for one picture: iterating it would give its letters, or its rows of pixels."""
    if isinstance(pictures, np.ndarray):
        single = pictures.ndim < 3 or (pictures.ndim == 3 and pictures.shape[2] <= 4)
    else:
        single = isinstance(pictures, (str, bytes, os.PathLike, Image.Image, NamedPicture))
    if single:
        raise PictureError("One picture where several are expected: use predict, or give a list.")


def _name_of(picture: Any, position: int) -> str:
    return str(picture) if isinstance(picture, (str, os.PathLike)) else f"picture {position + 1}"


# ---- the two backends: float32 (N, 3, H, W) -> logits (N, C), features (N, A), feature maps (N, A, H, W) or None ----


class _Network(Protocol):
    device: str

    def __call__(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]: ...


NOT_FINITE = "The network gave numbers that are not finite for this picture: its weights are damaged, or too large."
OUTPUTS = ("logits", "features", "feature_map")  # the last one only where the features are its mean


class OnnxNetwork:
    """An ONNX file in ONNX Runtime.

    content  bytes that zoo.onnx_file has checked    name   for messages
    config   of the model folder                     threads  of the CPU; 0: all cores
    """

    def __init__(self, content: bytes, config: Mapping[str, Any], name: str, device: Device, threads: int = 0):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions
        # Idle threads sleep; by default they spin, and take the cores from the threads that decode.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # ONNX Runtime's default is a thread for each core of the machine, even if this job may use fewer.
        options.intra_op_num_threads = threads or (cores() if cores() < (os.cpu_count() or 1) else 0)
        providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
        if device == "cuda" or (device == "auto" and _has_nvidia_driver()):
            if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                onnxruntime.preload_dlls()  # CUDA's libraries from pip packages, if installed
                # No TF32, which changes the third digit. Kernels by heuristic, not by a search for each batch size.
                options_of_cuda = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
                providers.insert(0, ("CUDAExecutionProvider", options_of_cuda))
            elif device == "cuda":
                raise BackendError("This ONNX Runtime has no CUDA: pip install onnxruntime-gpu, or use device='cpu'.")
        self.config, self.name = config, name
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=providers)
        except Exception as error:  # ONNX Runtime has no common base class of its own
            raise ModelFolderError(f"{name} does not run in ONNX Runtime: {_reason(error)}") from error
        # Without CUDA's libraries the runtime silently falls back to the CPU.
        self.device = "cuda" if self.session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        if device == "cuda" and self.device != "cuda":
            raise BackendError("ONNX Runtime could not start CUDA here (a driver or CUDA libraries are missing): "
                               "use device='cpu'.")
        inputs, outputs = self.session.get_inputs(), {o.name: o.shape for o in self.session.get_outputs()}
        expected = list(config["pretrained_cfg"]["input_size"])
        if (len(inputs) != 1 or inputs[0].type != "tensor(float)" or list(inputs[0].shape[1:]) != expected
                or isinstance(inputs[0].shape[0], int) or not set(outputs) >= set(OUTPUTS[:2])):
            raise ModelFolderError(f"{name} has other inputs or outputs than config.json says, or takes a fixed "
                                   "number of pictures.")
        self.input = inputs[0].name
        self.outputs = [name for name in OUTPUTS if name in outputs]

    def __call__(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        try:
            logits, features, *feature_map = self.session.run(self.outputs, {self.input: pictures})
        except Exception as error:
            raise ModelFolderError(f"{self.name} failed on a batch of {len(pictures)}: {_reason(error)}") from error
        outputs = logits, features, *(feature_map or [None])
        check_outputs(outputs, len(pictures), self.config, finite=False)
        return outputs


def _reason(error: Exception) -> str:
    """What ONNX Runtime says, without its own file names."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    if found := re.search(r"allocate memory for requested buffer of size (\d+)", text):
        return f"it asked for {int(found[1]) / 1e9:,.1f} GB of memory, more than there is."
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src\S+ ", "", text)[:500]


def _has_nvidia_driver() -> bool:
    import ctypes

    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


class _TorchNetwork:
    def __init__(self, module, device: Device):
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError(f"torch {torch.__version__} finds no CUDA device here: use device='cpu'.")
        self.device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        self.module = module.to(self.device)
        self._process = os.getpid()

    def __call__(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        import torch

        if self._process != os.getpid():  # forked: torch's threads are not here, and it would wait for them forever
            if self.device == "cuda":
                raise BackendError("A forked process cannot use a model that its parent put on CUDA: load it in the "
                                   "new process, or start that one with multiprocessing's spawn.")
            torch.set_num_threads(1)
            self._process = os.getpid()
        with torch.inference_mode():
            outputs = all_outputs(self.module, torch.from_numpy(pictures).to(self.device))
        logits, features, *feature_map = (tensor.cpu().numpy() for tensor in outputs)
        return logits, features, *(feature_map or [None])


def all_outputs(module, pictures):
    """Logits, features and, where it has one, the feature map of a network of zoo.architectures, from one pass."""
    feature_map = module.forward_features(pictures)
    features = module.forward_head(feature_map, pre_logits=True)
    logits = module.get_classifier()(features)
    return (logits, features, feature_map) if module.has_feature_map else (logits, features)


def torch_module(folder: ModelFolder):
    """The torch module of a model folder, in eval mode. Raises BackendError without torch."""
    try:
        import torch
    except ModuleNotFoundError:
        raise BackendError("The torch backend needs torch: pip install 'metasaug[train]', or use backend='onnx'."
                           ) from None
    from zoo.architectures import create

    config = folder.config
    module = create(config["architecture"], config["num_classes"], config["metasaug"].get("cosine_scale"))
    weights = {name: torch.from_numpy(np.array(array)) for name, array in folder.weights().items()}
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelFolderError(f"{folder.path}: {broken[0]} holds numbers that are not finite (nan or infinity). "
                               "Get the folder again, or train the model again.")
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelFolderError(f"{folder.path}: the weights do not fit {config['architecture']}: {error}") from error
    return module.eval()
