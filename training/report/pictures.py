"""Sections of report.html with pictures: what to photograph next, confused pictures, doubtful labels, near copies."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from training.report.sentences import percent
from zoo.errors import ZooError
from zoo.images import decode
from zoo.markup import breakable, escaped
from zoo.pixels import Reading

REVIEW = "review.json"
SIDE = 104  # pixels

Show = Callable[..., str]


def sections_of(run: Path, reading: Reading) -> list[str]:
    """HTML sections of RUN/review.json, which training.run.review wrote; none without that file.

    reading   how the model reads picture files
    """
    path = run / REVIEW
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    show = partial(_picture, reading)
    return list(filter(None, (_more(found.get("more", [])), _confused(found.get("confused", []), show),
                              _doubtful(found.get("doubtful", []), show), _copies(found.get("copies", []), show))))


def _more(rows: list[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    cells = "".join(f'<tr><th scope="row">{_named(row["label"])}</th><td>{row["pictures"]:,}</td>'
                    f'<td>{percent(row["error"], row["pictures"])}</td>'
                    f'<td>{percent(row["then"], row["pictures"])}</td></tr>' for row in rows)
    return ("<section><h2>What to photograph next</h2><p>Ten more pictures would help these classes most. Errors are "
            "those of a last layer on the pretrained network, cross-validated on your training pictures. The last "
            "column assumes that more pictures help each class as much as they help the average class.</p>"
            '<div class="wide"><table><thead><tr><th scope="col">class</th><th scope="col">training pictures</th>'
            '<th scope="col">error now</th><th scope="col">with ten more</th></tr></thead>'
            f"<tbody>{cells}</tbody></table></div></section>")


def _confused(rows: list[Mapping[str, Any]], show: Show) -> str:
    blocks = "".join(
        f'<p>{_named(row["label"])} mistaken for {_named(row["answer"])}: {row["count"]:,} of {row["of"]:,} test '
        f'pictures</p><div class="pictures">{"".join(map(show, row["paths"]))}</div>' for row in rows)
    return f"<section><h2>Confused pictures</h2>{blocks}</section>" if rows else ""


def _doubtful(rows: list[Mapping[str, Any]], show: Show) -> str:
    if not rows:
        return ""
    return (f"<section><h2>Labels to check</h2><p>The {len(rows)} training pictures with the most doubtful labels: "
            "a model that was not trained on the picture is confident of another class. Check each one; many labels "
            "will be correct.</p>"
            + '<div class="pictures">'
            + "".join(show(row["path"], f'{_named(row["label"])}<br/>or {_named(row["likely"])}?') for row in rows)
            + "</div></section>")


def _copies(rows: list[Mapping[str, Any]], show: Show) -> str:
    blocks = "".join(
        '<div class="pictures">' + "".join(show(path, _named(label)) for path, label in
                                           zip(row["paths"], row["labels"], strict=True)) + "</div>" for row in rows)
    return ("<section><h2>Near copies in two classes</h2><p>To the pretrained network these training pictures look "
            f"nearly the same, but their labels differ.</p>{blocks}</section>") if rows else ""


def _named(label: str) -> str:
    return f"<b><bdi>{breakable(label)}</bdi></b>"


def _picture(reading: Reading, path: str, below: str = "") -> str:
    """A small copy of the picture inside the page; only its name if it can no longer be read."""
    shown = "/".join(Path(path).parts[-2:])
    try:
        small = decode(Path(path), reading=reading)
        small.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82)
        image = (f'<img alt="" width="{max(1, small.width // 2)}" height="{max(1, small.height // 2)}" '
                 f'src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"/>')
    except (OSError, ZooError):
        image = "<span>cannot be read</span>"
    return f'<span class="picture" title="{escaped(shown)}">{image}<small>{below or breakable(shown)}</small></span>'
