"""Pieces that all parts of the page share: uploads, and HTML in which text from models and files is escaped."""

import base64
import io
import os
from typing import Any

import numpy as np
from gradio import utils as gradio_utils
from PIL import Image, ImageOps

import zoo
from zoo.demo.models import Model
from zoo.demo.uploads import used
from zoo.labels import GROUPS, UNKNOWN, meaning_of
from zoo.markup import badge, breakable
from zoo.markup import escaped as escape

SUCH = {"head": "classes this common", "medium": "mid-sized classes", "tail": "classes this rare"}


def uploaded(file: Any) -> str:
    """The path of an upload (Gradio's file data). Raises PictureError, in words that name no path.

    Gradio checks only the paths of files that are marked as such; a request without the mark could name any file of
    this computer. So only files in the folder of uploads are opened.
    """
    path = file.get("path") if isinstance(file, dict) else None
    if not isinstance(path, str) or not path:
        raise zoo.PictureError("No picture came with the request.")
    uploads = os.path.realpath(gradio_utils.get_upload_folder())
    if "\0" in path or not os.path.realpath(path).startswith(uploads + os.sep):
        raise zoo.PictureError("No picture came with the request: upload it first.")
    used(path)
    return path


def percent(p: float) -> str:
    return "&lt;0.1%" if 0 < p < 0.0005 else f"{p:.1%}"


def name_of(label: str) -> str:
    return breakable(label)


def times(count: int | None) -> str:
    return "?" if count is None else f"{count:,} seen"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def alert(title: str, text: str) -> str:
    return f'<div class="notice" role="alert"><h3>{escape(title)}</h3><p>{escape(text)}</p></div>'


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def png(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return data_uri(buffer.getvalue(), "png")


def thumbnail(picture: Image.Image, side: int = 72) -> str:
    """The central square of the picture, as a small JPEG."""
    buffer = io.BytesIO()
    ImageOps.fit(picture.convert("RGB"), (side, side)).save(buffer, "JPEG", quality=75)
    return data_uri(buffer.getvalue(), "jpeg")


def groups_of(model: Model) -> list[str]:
    return [group for group in (*GROUPS, UNKNOWN) if group in model.groups]


def measured(model: Model, group: str) -> tuple[int, int, float, float] | None:
    """A group's correct test pictures, all its test pictures, and the interval of its accuracy."""
    try:
        figures = model.results["groups"][group]
        low, high = figures["interval"]
        return (int(figures["correct"]), int(figures["images"]), low, high) if figures["images"] else None
    except (KeyError, TypeError, ValueError):
        return None


def meaning(model: Model, group: str) -> str:
    return meaning_of(group, model.groups_by)


def legend(model: Model) -> str:
    items = "".join(f"<li>{badge(group)} {meaning(model, group)}</li>" for group in groups_of(model))
    return f'<ul class="legend" aria-label="Groups of classes by training pictures">{items}</ul>'


def mass_bar(shares: dict[str, float]) -> str:
    """A bar of parts, and the same in words."""
    parts = "".join(f'<i class="{group}" style="width:{share:.2%}"></i>' for group, share in shares.items())
    words = "".join(f"<li>{badge(group)} <b>{percent(share)}</b></li>" for group, share in shares.items())
    return f'<div class="mass" aria-hidden="true">{parts}</div><ul class="mass-words">{words}</ul>'


def ways(text: str) -> str:
    """The lines of a text as HTML; indented lines are "what: command", as zoo.loading.how_to_get writes them."""
    lines = ""
    for line in text.splitlines():
        what, colon, command = line.strip().partition(": ")
        if line.startswith(" ") and colon:
            lines += f"<p>{escape(what)}:<code class=command>{escape(command)}</code></p>"
        else:
            lines += f"<p>{escape(line)}</p>"
    return lines


def closed(name: str, error: zoo.ZooError) -> tuple[str, str]:
    """Why a model cannot be shown: a title and a sentence, without any path of this computer."""
    from zoo.demo.models import find

    offer = find(name)
    if offer is not None and not offer.ready:
        return "Not published yet", offer.what_to_do
    if isinstance(error, zoo.HubError):
        print(f"{name}: {error}", flush=True)
        return "This model could not be fetched", "The Hub cannot be reached, or has no such model: try again later."
    if offer is None:
        return "Unknown model", str(error)
    print(f"{name}: {error}", flush=True)
    return "This model cannot be opened", "The demo's output in the terminal says why. The other models work."
