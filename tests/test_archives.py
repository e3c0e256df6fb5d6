"""Zips of pictures: every one gives results or one clear refusal, and nothing is ever written."""

import csv
import io
import stat
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import zoo
from metasaug import main
from zoo.archives import MAX_ENTRIES, is_zip, open_zip

pytestmark = pytest.mark.promise("archives")


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((64, 48)).save(buffer, "PNG")
    return buffer.getvalue()


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return zoo.load(tiny_model_folder)


def test_a_zip_is_read_as_the_folder_it_was_made_from(model, pictures, tmp_path):
    # Given a folder of pictures, and a zip of it with what a Mac adds,
    members = {f"mine/{file.name}": file.read_bytes() for file in sorted(pictures.iterdir())}
    mac = {"mine/": b"", "__MACOSX/mine/._a.png": b"x", "mine/.DS_Store": b"x"}
    archive = zipped(tmp_path / "mine.zip", members | mac)
    # when both are predicted,
    from_folder, from_zip = list(model.predict_folder(pictures)), list(model.predict_archive(archive))
    # then the answers are the same, each under its name in the archive, and nothing was unpacked.
    assert [row.top for row in from_zip] == [row.top for row in from_folder]
    assert [row.source for row in from_zip] == [f"{archive}/{name}" for name in members]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.zip", "pictures"]


def test_the_command_line_takes_a_zip(tiny_model_folder, tmp_path, capsys):
    archive = zipped(tmp_path / "two.zip", {"a.png": png(1), "b.jpg": b"no picture", "notes.txt": b"x"})
    out = tmp_path / "rows.csv"
    assert main(["predict", str(tiny_model_folder), str(archive), "--out", str(out)]) == 1
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [row["path"] for row in rows] == [f"{archive}/a.png", f"{archive}/b.jpg"]
    assert rows[0]["label"] and "not a picture" in rows[1]["error"]
    said = capsys.readouterr().err
    assert "1 .txt" in said and "1 of 2" in said


def with_flag(path: Path) -> Path:
    """Marks every entry as encrypted, in both of its headers."""
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(signature)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(signature, at + 4)
    path.write_bytes(content)
    return path


def link(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        entry = zipfile.ZipInfo("cat.png")
        entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    return path


def overlapping(path: Path) -> Path:
    """Two entries of the list that share one file: how a small zip unpacks to petabytes."""
    zipped(path, {"a.png": png(), "b.png": png()})
    content = bytearray(path.read_bytes())
    second = content.find(b"PK\x01\x02", content.find(b"PK\x01\x02") + 4)
    struct.pack_into("<I", content, second + 42, 0)
    path.write_bytes(content)
    return path


DANGERS = {
    "bomb": (lambda p: zipped(p, {"a.png": png(), "b.png": bytes(15_000_000)}), "zip bomb"),
    "many small bombs": (lambda p: zipped(p, {f"{i}.png": bytes(1_100_000) for i in range(50)}), "zip bomb"),
    "parent": (lambda p: zipped(p, {"../../evil.png": png()}), "would leave"),
    "parent, Windows": (lambda p: zipped(p, {"a\\..\\..\\evil.png": png()}), "would leave"),
    "absolute": (lambda p: zipped(p, {"/tmp/evil.png": png()}), "would leave"),
    "drive": (lambda p: zipped(p, {"C:\\evil.png": png()}), "would leave"),
    "link": (link, "is a link"),
    "encrypted": (lambda p: with_flag(zipped(p, {"a.png": png()})), "encrypted"),
    "nested": (lambda p: zipped(p, {"a.png": png(), "inner.ZIP": b"PK"}), "archive inside"),
    "nested tar": (lambda p: zipped(p, {"inner.tar.gz": b"x"}), "archive inside"),
    "10,000 entries": (lambda p: zipped(p, {f"{i}.png": b"x" for i in range(10_000)}), "10,000 entries"),
    "70,000 entries": (lambda p: zipped(p, {f"{i}": b"" for i in range(70_000)}), "zip64"),
    "long names": (lambda p: zipped(p, {f"{i:04}{'x' * 60_000}": b"" for i in range(80)}), "entries"),
    "overlapping": (overlapping, "overlap"),
    "bzip2": (lambda p: zipped(p, {"a.png": png()}, zipfile.ZIP_BZIP2), "unusual method"),
    "empty": (lambda p: zipped(p, {}), "no pictures"),
    "only hidden": (lambda p: zipped(p, {".DS_Store": b"x"}), "no pictures"),
    "no zip": (lambda p: p.write_bytes(png()) and p, "not a zip archive"),
    "cut off": (lambda p: p.write_bytes(zipped(p, {"a.png": png()}).read_bytes()[:-30]) and p, "not a zip archive"),
    "nothing": (lambda p: p.write_bytes(b"") or p, "not a zip archive"),
}


@pytest.mark.parametrize("danger", DANGERS)
def test_a_dangerous_archive_is_refused_with_its_reason_and_writes_nothing(danger, model, tmp_path, capsys):
    make, reason = DANGERS[danger]
    archive = make(tmp_path / "pictures.zip")
    before = sorted(tmp_path.parent.rglob("*"))
    tracemalloc.start()
    with pytest.raises(zoo.PictureError, match=reason) as caught:
        list(model.predict_archive(archive))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "pictures.zip" in str(caught.value) and len(str(caught.value)) < 500
    assert peak < 60_000_000
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_one_bad_member_ends_nothing(model, tmp_path):
    # Given good pictures around one whose bytes were damaged, one that is too large, and a zip in disguise,
    good = png(3)
    archive = zipped(tmp_path / "mixed.zip", {"a.png": good, "hurt.png": png(4), "large.tif":
                     np.random.default_rng(0).bytes(21_000_000), "zip.png": b"PK\x03\x04 and so on", "z.png": good},
                     zipfile.ZIP_STORED)
    content = bytearray(archive.read_bytes())
    content[content.find(png(4)) + 200] ^= 0xFF
    archive.write_bytes(content)
    rows = list(model.predict_archive(archive))
    # then each of those is a row with its reason, and the others are as if alone.
    assert [row.source.rpartition("/")[2] for row in rows] == ["a.png", "hurt.png", "large.tif", "zip.png", "z.png"]
    assert [bool(row.error) for row in rows] == [False, True, True, True, False]
    assert "damaged" in rows[1].error and "21 MB" in rows[2].error and "zip archive" in rows[3].error
    assert rows[0].top == rows[4].top == model.predict(good).top


def test_the_most_entries_allowed_are_read(tmp_path):
    names, pictures = open_zip(zipped(tmp_path / "full.zip", {f"{i}.png": b"x" for i in range(MAX_ENTRIES)}))
    assert len(names) == len(list(pictures)) == MAX_ENTRIES


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
       cut=st.one_of(st.none(), st.integers(0, 10_000)))
def test_any_mutated_zip_gives_rows_or_one_error(flips, cut, tmp_path):
    content = bytearray(zipped(tmp_path / "whole.zip", {"a.png": png(1), "b/c.png": png(2)}).read_bytes())
    for at, value in flips:
        content[at % len(content)] = value
    path = tmp_path / "mutated.zip"
    path.write_bytes(content if cut is None else content[: cut % len(content)])
    assert is_zip(path)
    try:
        names, pictures = open_zip(path)
        assert len(names) == len(list(pictures))
    except zoo.PictureError:
        pass
