"""Predict on a Ray cluster: `metasaug predict … --ray`. The cluster computes, this process lists and writes.

The workers read the pictures and the model by the paths that are named here: both must be on storage that every machine
has. Pictures in a zip are sent to them.
"""

import itertools
import logging
import os
import pickle
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import zoo
from zoo.errors import ModelFolderError, ZooError
from zoo.model_folder import CONFIG, WEIGHTS
from zoo.pixels import Reading
from zoo.predictor import Backend, Classes, Device, Precision, Prediction, Predictor
from zoo.rows import Layout

BATCHES = 16  # a worker is given so many at once: it decodes one while it computes another
PICTURES, BYTES = 200_000, 2**28  # listed at once, so that memory does not grow with the number of pictures
RETRIES = 3  # of the pictures on which a worker died

Rows = Generator[tuple[Prediction, dict[str, Any]], None, None]


@dataclass(frozen=True)
class Job:
    """What makes the rows, the same on every machine: mostly the arguments of `zoo.load` and `predict_each`.

    folder   that relative paths start from     files   sha256 of the model's files
    reading, reduced, classes   of the predictor, as the flags changed them
    """

    folder: str
    model: str
    backend: Backend
    device: Device
    precision: Precision
    reading: Reading
    reduced: bool
    classes: Classes
    files: dict[str, str]
    layout: Layout
    prior: Any
    batch: int


def model_files(predictor: Predictor) -> dict[str, str]:
    """The sha256 of the files that decide the answers."""
    return {name: predictor.folder.files[name][1] for name in (CONFIG, WEIGHTS) if name in predictor.folder.files}


@contextmanager
def cluster() -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine. Raises ZooError."""
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_BACKEND_LOG_LEVEL", "fatal")):
        os.environ.setdefault(name, value)
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ZooError(f"--ray: no cluster at {os.environ.get('RAY_ADDRESS', 'this machine')}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def predict_each(job: Job, pictures: Iterable[Any], workers: int | None = None) -> Rows:
    """Each picture's prediction, without its arrays, and its row (`Layout.values`), in the order of the pictures.

    workers   processes, each with the model; by default one per GPU of the cluster, or one per core if it has none
    Needs `cluster`. If a worker or a machine dies, others compute its pictures again. Raises ZooError if its successors
    die too, or if a worker cannot open the model.
    """
    import pyarrow
    import ray

    has = ray.cluster_resources()
    cpus = int(has.get("CPU", 1))
    gpus = 0 if job.device == "cpu" or job.precision == "int8" else int(has.get("GPU", 0))
    number = max(1, workers or gpus or cpus)
    cores = max(1, cpus // number)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    for tables in _listed(pictures, BATCHES * job.batch, pyarrow):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # max_task_retries will have another place from Ray 2.64 on
            rows = ray.data.from_arrow(tables).map_batches(
                _Worker, fn_constructor_args=(job, cores), batch_size=BATCHES * job.batch, batch_format="pyarrow",
                num_cpus=cores, num_gpus=min(1, gpus / number) or None,
                compute=ray.data.ActorPoolStrategy(size=min(number, len(tables))), max_task_retries=RETRIES)
        try:
            computed: Any = iter(rows.iter_batches(batch_size=None, batch_format="pyarrow"))
            with closing(computed):  # before the cluster is, if the caller stops early
                for table in computed:
                    yield from (pickle.loads(row.as_py()) for row in table["row"])
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            raise ZooError(f"--ray: {cause or str(error).splitlines()[0]}") from error


def _listed(pictures: Iterable[Any], rows: int, pyarrow) -> Iterator[list]:
    """Lists of tables, each table of so many pictures."""
    tables, size, number = [], 0, 0
    each = iter(pictures)
    while some := list(itertools.islice(each, rows)):
        tables.append(pyarrow.table({"picture": pyarrow.array(map(pickle.dumps, some), pyarrow.large_binary())}))
        size, number = size + tables[-1].nbytes, number + len(some)
        if size >= BYTES or number >= PICTURES:
            yield tables
            tables, size, number = [], 0, 0
    if tables:
        yield tables


class _Worker:
    """A process of the cluster, with the model."""

    def __init__(self, job: Job, cores: int):
        self.job, self.cores = job, cores
        try:
            os.chdir(job.folder)
        except OSError as error:
            raise ZooError(f"{os.uname().nodename} has no folder {job.folder}, where the run started: {error.strerror}."
                           ) from error
        self.predictor = zoo.load(job.model, job.backend, job.device, job.precision, threads=cores)
        if model_files(self.predictor) != job.files:
            raise ModelFolderError(f"{job.model} is another model on {os.uname().nodename} than where the run started.")
        self.predictor.reading, self.predictor.reduced = job.reading, job.reduced
        self.predictor.classes = job.classes

    def __call__(self, table):
        import pyarrow

        job = self.job
        pictures = [pickle.loads(picture.as_py()) for picture in table["picture"]]
        rows = self.predictor.predict_each(pictures, job.layout.top_k, job.prior, batch_size=job.batch,
                                           workers=0 if self.cores == 1 else self.cores)
        pickled = [pickle.dumps((slim(row), job.layout.values(row))) for row in rows]
        return pyarrow.table({"row": pyarrow.array(pickled, pyarrow.large_binary())})


def slim(row: Prediction) -> Prediction:
    """The prediction without its arrays."""
    return replace(row, probabilities=None, logits=None, features=None, feature_map=None, classes=None)
