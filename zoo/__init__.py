"""A model zoo for long-tailed image recognition.

    import zoo
    model = zoo.load("metasaug-cifar10-lt")
    print(model.predict("photo.jpg"))

`import zoo` loads neither torch nor ONNX Runtime. `load` imports ONNX Runtime; `load(..., backend="torch")`, torch.
"""

from typing import TYPE_CHECKING, Any

from zoo.errors import (
    BackendError,
    HubError,
    ModelFolderError,
    PictureError,
    UnknownModelError,
    UnpublishedModelError,
    ZooError,
)
from zoo.registry import Entry, list_models

if TYPE_CHECKING:
    from zoo.loading import load, predict
    from zoo.model_folder import ModelFolder
    from zoo.predictor import Prediction, Predictor, TopClass

__all__ = ["BackendError", "Entry", "HubError", "ModelFolder", "ModelFolderError", "PictureError", "Prediction",
           "Predictor", "TopClass", "UnknownModelError", "UnpublishedModelError", "ZooError", "list_models", "load",
           "predict"]

_LAZY = {"load": "zoo.loading", "predict": "zoo.loading", "ModelFolder": "zoo.model_folder",
         "Prediction": "zoo.predictor", "Predictor": "zoo.predictor", "TopClass": "zoo.predictor"}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
