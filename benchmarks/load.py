"""Many clients use the demo at once, with different pictures; count what they get back."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zoo

EXAMPLES = Path(zoo.__file__).parent / "examples"
MODEL = "metasaug-cifar10-lt"


@dataclass
class Outcome:
    """What all clients got.

    right   answers that belong to the picture sent      busy    503s because the queue is full
    wrong   answers that do not                          broken  all other outcomes, by name
    """

    right: int = 0
    wrong: int = 0
    busy: int = 0
    broken: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each right or wrong answer, waiting included


def fifty_clients(address: str, seconds: float, clients: int = 50) -> Outcome:
    """Ask /predict about example pictures from `clients` threads for `seconds`.

    Every request has its own time limit, so the run ends soon after.
    """
    names = sorted(EXAMPLES.glob("*.jpg"))
    model = zoo.load(MODEL)
    expected = [model.predict(path).top[0] for path in names]
    uploads = [upload(address, path) for path in names]
    outcome, lock, ends = Outcome(), threading.Lock(), time.monotonic() + seconds

    def one(number: int) -> None:
        turn = number
        while time.monotonic() < ends:
            turn += 1
            began = time.monotonic()
            told, answer = ask(address, uploads[turn % len(names)])
            with lock:
                if told == "busy":
                    outcome.busy += 1
                elif answer is None:
                    outcome.broken.append(told)
                else:
                    best, truth = answer["top"][0], expected[turn % len(names)]
                    same = best["label"] == truth.label and abs(best["probability"] - truth.probability) < 1e-5
                    outcome.right += same
                    outcome.wrong += not same
                    outcome.seconds.append(time.monotonic() - began)
            if told == "busy":
                time.sleep(0.2)

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 120)
    return outcome


def ask(address: str, uploaded: str, timeout: float = 100, model: str = MODEL) -> tuple[str, dict | None]:
    """("", the answer), ("busy", None) if the queue is full, or (what went wrong, None)."""
    data = [{"path": uploaded, "meta": {"_type": "gradio.FileData"}}, model, "own"]
    try:
        told = reply(address, {"data": data}, timeout)
    except urllib.error.HTTPError as error:
        return ("busy" if error.code == 503 else f"HTTP {error.code}"), None
    except OSError as error:
        return type(error).__name__, None
    if "event: complete" in told:
        return "", json.loads(told.split("event: complete\ndata: ", 1)[1].splitlines()[0])[0]
    return ("busy" if "queue is full" in told.lower() else told[:200]), None


def reply(address: str, body: dict, timeout: float) -> str:
    """The answer of /predict, as the text of the server's events."""
    event = json.load(post(f"{address}/gradio_api/call/predict", body, timeout))["event_id"]
    return urllib.request.urlopen(f"{address}/gradio_api/call/predict/{event}", timeout=timeout).read().decode()


def post(url: str, body: dict, timeout: float):
    return urllib.request.urlopen(
        urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}), timeout=timeout)


def upload(address: str, path: Path) -> str:
    """Upload this file. Returns its path on the server."""
    boundary = "metasaug-upload"
    body = (f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n'
            "Content-Type: image/jpeg\r\n\r\n").encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    request = urllib.request.Request(f"{address}/gradio_api/upload", body,
                                     {"Content-Type": f"multipart/form-data; boundary={boundary}"})
    paths: Sequence[str] = json.load(urllib.request.urlopen(request, timeout=60))
    return paths[0]
