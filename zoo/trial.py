"""Run an ONNX file from an unknown source for trial, in a separate process with limits on memory and time.

A check of the bytes (zoo.onnx_file) cannot tell how much memory a graph takes, how long it runs or what it returns.
The trial finds out without harm: a graph that takes too much ends that process, not this one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import ModelFolderError

SECONDS = 30.0  # for start, session and four pictures
MEMORY = 1_500_000_000  # bytes, plus SHARE_OF_FILE times the file and SHARE_OF_PICTURES times the network's input
SHARE_OF_FILE, SHARE_OF_PICTURES = 5, 300
_TOO_MUCH = 3  # exit code
_PASSED: set[str] = set()  # files that passed in this process; a file in the user's cache marks those of earlier ones


def require_harmless(content: bytes, config: Mapping[str, Any], name: str) -> None:
    """Run an ONNX file on made-up pictures in another process. Raises ModelFolderError if it does not pass.

    content  bytes that zoo.onnx_file has checked        config  the model folder's        name  for messages
    It passes if it stays within the limits of memory (on Linux) and time, and every output is finite and has the
    config's shape. A file that has passed is not tried out again, until onnxruntime has another version.
    """
    import hashlib

    import onnxruntime

    wanted = json.dumps({key: config[key] for key in ("num_classes", "num_features", "pretrained_cfg")})
    key = hashlib.sha256(f"{onnxruntime.__version__} {wanted} ".encode() + content).hexdigest()
    mark = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "metasaug" / "passed" / key
    if key in _PASSED or os.path.exists(mark):
        return
    root = str(Path(__file__).resolve().parent.parent)
    code = f"import sys; sys.path.insert(0, {root!r}); from zoo.trial import main; sys.exit(main())"
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    try:
        done = subprocess.run([sys.executable, "-c", code], input=wanted.encode() + b"\n" + content,
                              capture_output=True, timeout=SECONDS, env={**os.environ, **single})
    except subprocess.TimeoutExpired:
        raise ModelFolderError(f"{name} gave no answer for a test picture in {SECONDS:.0f} seconds: it was not loaded."
                               ) from None
    except OSError as error:
        raise ModelFolderError(f"{name} could not be tried out in a separate process: {error}.") from error
    if done.returncode == 0:
        _PASSED.add(key)
        with suppress(OSError):  # where it cannot be written, the next process tries the file out again
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        return
    why = done.stdout.decode(errors="replace").strip()
    if done.returncode < 0:
        why = f"it ended the trial process with signal {-done.returncode}"
    elif done.returncode != _TOO_MUCH or not why:
        why = (done.stderr.decode(errors="replace").strip().splitlines() or ["the trial process failed"])[-1]
    raise ModelFolderError(f"{name} did not pass its trial run and was not loaded: {why[:500]}")


def try_out(network, config: Mapping[str, Any]) -> None:
    """Run pictures of noise and of one colour through a network. Raises ModelFolderError for invalid outputs."""
    from PIL import Image

    from zoo.images import preprocess

    cfg = config["pretrained_cfg"]
    height, width = cfg["input_size"][1:]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pictures = np.stack([preprocess(Image.fromarray(np.ascontiguousarray(pixels)), cfg) for pixels in
                         (noise, np.zeros_like(noise), np.full_like(noise, 255))])
    for part in (pictures[:1], pictures):
        check_outputs(network(part), len(part), config)


def check_outputs(outputs: tuple[np.ndarray, np.ndarray, np.ndarray | None], pictures: int, config: Mapping[str, Any],
                  finite: bool = True) -> None:
    """Raises ModelFolderError unless a network's outputs have the config's shape and, if asked, finite numbers."""
    expected = {"logits": (pictures, config["num_classes"]), "features": (pictures, config["num_features"]),
                "feature_map": (pictures, config["num_features"])}
    for (name, shape), array in zip(expected.items(), outputs, strict=True):
        if array is None:
            continue
        if array.shape[: len(shape)] != shape or array.ndim != len(shape) + 2 * (name == "feature_map"):
            raise ModelFolderError(f"Its {name} have shape {array.shape}; config.json says {shape}.")
        if finite and not np.isfinite(array).all():
            raise ModelFolderError(f"Its {name} hold numbers that are not finite (nan or infinity).")


def main() -> int:
    """The other process: reads config and ONNX file from standard input, prints why the file did not pass."""
    from zoo.predictor import OnnxNetwork

    config = json.loads(sys.stdin.buffer.readline())
    content = sys.stdin.buffer.read()
    try:
        _limit_memory(MEMORY + SHARE_OF_FILE * len(content)
                      + SHARE_OF_PICTURES * 12 * int(np.prod(config["pretrained_cfg"]["input_size"][1:])))
        try_out(OnnxNetwork(content, config, "it", "cpu", threads=1), config)
    except ModelFolderError as error:
        print(error)
    except MemoryError:
        print("It takes too much memory.")
    else:
        return 0
    return _TOO_MUCH


def _limit_memory(limit: int) -> None:
    """Limit the further memory of this process, in bytes. Only works on Linux."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            limit += int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass
