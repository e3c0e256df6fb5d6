"""`metasaug convert`: rows of `metasaug predict` for other programs, Timelapse and the Camtrap DP standard.

Timelapse reads the JSON of camera-trap classifiers: the MegaDetector output format, version 1.5. Each picture becomes
one detection that covers the whole picture.

Camtrap DP 1.0 is the exchange standard of camera-trap data. Its observations.csv and media.csv come from the rows;
deployments.csv and datapackage.json describe the cameras and the project, and are yours to write.
"""

import csv
import json
import mimetypes
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal, TextIO

import tyro
from PIL import Image

from zoo.errors import ZooError
from zoo.rows_file import about_rows, read_rows

# Columns of Camtrap DP 1.0.2, in its order (observations-table-schema.json, media-table-schema.json).
OBSERVATIONS = (
    "observationID", "deploymentID", "mediaID", "eventID", "eventStart", "eventEnd", "observationLevel",
    "observationType", "cameraSetupType", "scientificName", "count", "lifeStage", "sex", "behavior", "individualID",
    "individualPositionRadius", "individualPositionAngle", "individualSpeed", "bboxX", "bboxY", "bboxWidth",
    "bboxHeight", "classificationMethod", "classifiedBy", "classificationTimestamp", "classificationProbability",
    "observationTags", "observationComments")
MEDIA = ("mediaID", "deploymentID", "captureMethod", "timestamp", "filePath", "filePublic", "fileName", "fileMediatype",
         "exifData", "favorite", "mediaComments")
# Classes whose name says that no animal is shown; every other one is an animal.
TYPES = {"human": "human", "person": "human", "people": "human", "vehicle": "vehicle", "car": "vehicle",
         "blank": "blank", "empty": "blank", "nothing": "blank"}
_EXIF, _TAKEN, _ZONE = 0x8769, 0x9003, 0x9011  # EXIF's own directory, DateTimeOriginal and OffsetTimeOriginal
_DATE = "%Y-%m-%dT%H:%M:%S%z"


def convert(
    rows: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    to: Literal["timelapse", "camtrap-dp"],
    root: Path | None = None,
    deployment: str | None = None,
    utc_offset: str | None = None,
    names: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Convert rows of `metasaug predict --out` for Timelapse or Camtrap DP. Exit code 1: some rows were left out.

    Args:
        rows: A .csv, .jsonl or .parquet file of `metasaug predict`.
        out: timelapse: the JSON file to write; camtrap-dp: a folder for observations.csv and media.csv.
        to: The format.
        root: The folder that paths are relative to: that of Timelapse or of the data package. By default the folder
            that all pictures share.
        deployment: camtrap-dp: the deploymentID of every picture; by default its first folder below --root.
        utc_offset: camtrap-dp: the time zone of the cameras' clocks, such as +02:00, if EXIF does not say it.
        names: camtrap-dp: a CSV file with the columns label, scientificName and, optionally, observationType.
        overwrite: Replace older files.
    """
    about = about_rows(rows)
    if to == "timelapse":
        _refuse_older(overwrite, out)
        with _writing(out) as file:
            total, left_out = write_timelapse(file, rows, root, about), Counter[str]()
    else:
        files = [out / "observations.csv", out / "media.csv"]
        _refuse_older(overwrite, *files)
        out.mkdir(parents=True, exist_ok=True)
        with _writing(files[0]) as observations, _writing(files[1]) as media:
            total, left_out = write_camtrap_dp(observations, media, rows, root, about, deployment, utc_offset, names)
    print(f"{out}: {total:,} pictures")
    for reason, number in left_out.items():
        print(f"left out, {reason}: {number:,}")
    return 1 if left_out else 0


# ---- Timelapse ----


def write_timelapse(file: TextIO, rows: Path, root: Path | None, about: dict[str, Any]) -> int:
    """The JSON that Timelapse's "Import recognition data" reads. Returns the number of pictures."""
    top = _root(rows, root)
    labels = sorted({label for row in read_rows(rows) for label, _ in _ranked(row)})
    numbers = {label: str(i) for i, label in enumerate(labels)}
    head = {"info": {"format_version": "1.5", "detector": "whole picture", "classifier": about["model"],
                     "classification_completion_time": _modified(rows).strftime("%Y-%m-%d %H:%M:%S")},
            "detection_categories": {"1": "animal"},
            "classification_categories": {number: label for label, number in numbers.items()}}
    file.write(json.dumps(head, ensure_ascii=False, indent=1)[:-2] + ',\n "images": [')
    total = 0
    for row in read_rows(rows):
        found: dict[str, Any] = {"file": _relative(row["path"], top)}
        if "error" in row:
            found |= {"failure": row["error"], "detections": None}
        else:
            classified = [[numbers[label], probability] for label, probability in _ranked(row)]
            found["detections"] = [{"category": "1", "conf": row["probability"], "bbox": [0.0, 0.0, 1.0, 1.0],
                                    "classifications": classified}]
        file.write(("," if total else "") + "\n  " + json.dumps(found, ensure_ascii=False))
        total += 1
    file.write("\n ]\n}\n")
    return total


# ---- Camtrap DP ----


def write_camtrap_dp(
    observations: TextIO, media: TextIO, rows: Path, root: Path | None, about: dict[str, Any],
    deployment: str | None = None, utc_offset: str | None = None, names: Path | None = None,
) -> tuple[int, Counter[str]]:
    """Write one line per picture to each file; return their number, and the number of rows left out, by reason.

    A row is left out if its picture could not be read, lies in a zip or outside `root`, has a path that the standard
    does not allow, or does not say when it was taken.
    """
    zone, known, top = _zone(utc_offset), _names(names), _root(rows, root)
    tables = [csv.DictWriter(file, columns) for file, columns in ((media, MEDIA), (observations, OBSERVATIONS))]
    for table in tables:
        table.writeheader()
    classified_at = _modified(rows).strftime(_DATE)
    total, left_out, seen = 0, Counter[str](), set[str]()
    for row in read_rows(rows):
        path, taken, reason = _relative(row["path"], top), None, None
        place = deployment or (path.split("/")[0] if "/" in path else "")
        if "error" in row:
            reason = "not readable"
        elif re.match(r"[./~]", path) or ".." in path or os.path.isabs(path):
            reason = "outside --root, or with a path that Camtrap DP does not allow"
        elif path in seen:
            reason = "listed twice"
        elif (taken := date_taken(row["path"], zone)) is None:
            reason = "no date with a time zone in EXIF (--utc-offset gives the zone)"
        elif not place:
            reason = "in no folder that names the deployment (--deployment gives it)"
        if reason is not None or taken is None:
            left_out[str(reason)] += 1
            continue
        seen.add(path)
        total += 1
        unsure = bool(row.get("unsure"))
        name, kind = known.get(row["label"], (row["label"], TYPES.get(row["label"].casefold(), "animal")))
        when = taken.strftime(_DATE)
        tables[0].writerow({"mediaID": path, "deploymentID": place, "timestamp": when, "filePath": path,
                            "filePublic": "false", "fileName": path.split("/")[-1],
                            "fileMediatype": mimetypes.guess_type(path)[0] or "image/unknown"})
        tables[1].writerow({
            "observationID": f"{path}#1", "deploymentID": place, "mediaID": path, "eventStart": when, "eventEnd": when,
            "observationLevel": "media", "observationType": "unknown" if unsure else kind,
            "scientificName": name if kind == "animal" and not unsure else "", "classificationMethod": "machine",
            "classifiedBy": f"metasaug {about['model']}", "classificationTimestamp": classified_at,
            "classificationProbability": f"{row['probability']:.6f}",
            "observationComments": f"answer: {row['label']}" if unsure else ""})
    return total, left_out


def date_taken(path: str, zone: timezone | None) -> datetime | None:
    """When a picture was taken, by its EXIF; in `zone` if EXIF has no time zone. None if date or zone is missing."""
    try:
        with Image.open(path) as picture:
            exif = picture.getexif().get_ifd(_EXIF)
        taken = datetime.strptime(str(exif[_TAKEN]).strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except (OSError, ValueError, KeyError, SyntaxError, Image.DecompressionBombError):
        return None
    with suppress(ZooError, KeyError):
        zone = _zone(str(exif[_ZONE]).strip("\0 ")) or zone
    return None if zone is None else taken.replace(tzinfo=zone)


def _zone(text: str | None) -> timezone | None:
    if text is None:
        return None
    found = re.fullmatch(r"(Z)|([+-])(\d\d):?(\d\d)", text)
    if not found or int(found[3] or 0) > 14 or int(found[4] or 0) > 59:
        raise ZooError(f"--utc-offset {text!r}: hours and minutes such as +02:00 or -05:30, or Z.")
    minutes = 60 * int(found[3] or 0) + int(found[4] or 0)
    return timezone(timedelta(minutes=-minutes if found[2] == "-" else minutes))


def _names(path: Path | None) -> dict[str, tuple[str, str]]:
    """The scientific name and the type of observation of each label."""
    if path is None:
        return {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return {row["label"]: (row["scientificName"], row.get("observationType") or
                                   TYPES.get(row["label"].casefold(), "animal")) for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ZooError(f"--names {path} cannot be read: {error}.") from error
    except KeyError as error:
        raise ZooError(f"--names {path} has no column {error}: it needs label and scientificName.") from error


# ---- both ----


def _ranked(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The classes of a row and their probabilities, likeliest first."""
    if "label" in row:
        yield row["label"], row["probability"]
    rank = 2
    while f"label_{rank}" in row:
        yield row[f"label_{rank}"], row[f"probability_{rank}"]
        rank += 1


def _root(rows: Path, root: Path | None) -> str:
    """The folder that paths are relative to: `root`, or the folder that all pictures share."""
    if root is not None:
        return os.path.abspath(root)
    shared: str | None = None
    for row in read_rows(rows):
        folder = os.path.dirname(os.path.abspath(row["path"]))
        shared = folder if shared is None else os.path.commonpath([shared, folder])
    return shared or os.getcwd()


def _relative(path: str, root: str) -> str:
    return os.path.relpath(os.path.abspath(path), root).replace(os.sep, "/")


def _modified(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).replace(microsecond=0)


def _refuse_older(overwrite: bool, *paths: Path) -> None:
    if not overwrite and (older := [str(path) for path in paths if path.exists()]):
        raise ZooError(f"{older[0]} exists. --overwrite replaces it.")


def _writing(path: Path) -> TextIO:
    try:
        return open(path, "w", newline="", encoding="utf-8")
    except OSError as error:
        raise ZooError(f"{path} cannot be written: {error.strerror or error}.") from error
