"""Long runs of `metasaug predict`: whatever ends one, the next goes on, and the file is that of one whole run."""

import csv
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import zoo
from tests.test_command_line import run
from zoo.errors import ZooError
from zoo.listing import number_of_pictures, pictures_of
from zoo.rows import Layout
from zoo.rows_file import RowsFile

ROOT = Path(__file__).resolve().parent.parent


def paint(folder: Path, count: int, bad: int = 0, size: int = 16) -> Path:
    """So many small pictures, no two alike, and among them files that are none; with names that need care."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    for i in range(count):
        name = f'=1+{i},"a"\n.png' if i == 3 else f"{i:05}.png"
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / name, "PNG")
    for i in range(bad):
        (folder / f"{i * count // max(bad, 1):05}-bad.png").write_bytes(b"no picture")
    return folder


def content(path: Path) -> bytes:
    """What the file says; a Parquet file's rows as JSON."""
    if path.suffix != ".parquet":
        return path.read_bytes()
    from pyarrow import parquet

    return json.dumps(parquet.read_table(path).to_pylist()).encode()


@pytest.fixture(params=["csv", "jsonl", "parquet"])
def ending(request) -> str:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return request.param


def predict(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "metasaug", "predict", *map(str, arguments)], cwd=ROOT, text=True,
                            stderr=subprocess.PIPE, stdin=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on(capsys, tiny_model_folder, tmp_path, number):
    # Given a run over 1,500 pictures that is stopped on its way, twice,
    pictures, out, whole = paint(tmp_path / "in", 1500, bad=7), tmp_path / "rows.csv", tmp_path / "whole.csv"
    arguments = [tiny_model_folder, pictures, "--batch", "16"]
    assert run(capsys, "predict", *arguments, "--out", whole)[0] == 1
    for target in (40_000, 80_000):
        process = predict(*arguments, "--out", out, "--resume")
        while process.poll() is None and (not out.exists() or out.stat().st_size < target):
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate()[1]
        # then it leaves with the documented code, says how to go on, and has written a part;
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
        assert number == signal.SIGKILL or ("--resume" in said and "Traceback" not in said)
        assert target / 2 < out.stat().st_size < whole.stat().st_size
    # and the last one ends with the file that one whole run writes, to the byte.
    code, _, said = run(capsys, "predict", *arguments, "--out", out, "--resume")
    assert code == 1 and "7 of 1,507 could not be read" in said
    assert out.read_bytes() == whole.read_bytes()
    rows = list(csv.DictReader(io.StringIO(out.read_text(encoding="utf-8"), newline="")))
    assert len({row["path"] for row in rows}) == len(rows) == 1507


def test_cut_anywhere_it_becomes_whole_again(tiny_model_folder, tmp_path, ending, capsys):
    # Given a run of 40 pictures in batches of 8, of which some are bad,
    pictures, out = paint(tmp_path / "in", 40, bad=5), tmp_path / f"rows.{ending}"
    arguments = [tiny_model_folder, pictures, "--batch", "8", "--out", out]
    assert run(capsys, "predict", *arguments)[0] == 1
    expected = content(out)
    part = tmp_path / "rows.parquet.part" if ending == "parquet" else out
    whole = _json_lines(expected) if ending == "parquet" else expected
    about = tmp_path / f"rows.{ending}.run.json"
    unfinished = json.dumps({**json.loads(about.read_text()), "finished": False})
    # when its rows end anywhere, in whole rows or within one, or in bytes that are none, and it is resumed,
    for size in [0, 1, *np.random.default_rng(0).integers(0, len(whole), 12), len(whole)]:
        for junk in (b"", b"\0" * 50):
            if ending == "parquet":
                out.unlink(missing_ok=True)
            part.write_bytes(whole[:size] + junk)
            about.write_text(unfinished)
            assert run(capsys, "predict", *arguments, "--resume")[0] == 1
            # then it is the same file.
            assert content(out) == expected, size
    assert not (tmp_path / "rows.parquet.part").exists()


def _json_lines(rows: bytes) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in json.loads(rows))


def test_a_finished_file_takes_up_new_pictures_only(capsys, tiny_model_folder, tmp_path, ending):
    # Given a finished file, when pictures come, one goes, and the run is repeated,
    pictures, out = paint(tmp_path / "in", 10), tmp_path / f"rows.{ending}"
    assert run(capsys, "predict", tiny_model_folder, pictures, "--out", out)[0] == 0
    before = json.loads(content(out)) if ending == "parquet" else content(out)
    (pictures / "00005.png").unlink()
    paint(tmp_path / "in/new", 2)
    assert run(capsys, "predict", tiny_model_folder, pictures, "--out", out, "--resume")[0] == 0
    # then the old rows are as they were, and the new ones follow.
    after = json.loads(content(out)) if ending == "parquet" else content(out)
    assert after[: len(before)] == before
    assert len(after) == 12 if ending == "parquet" else after.count(b"new") == 2
    assert run(capsys, "predict", tiny_model_folder, pictures, "--out", out, "--resume")[0] == 0
    assert (json.loads(content(out)) if ending == "parquet" else content(out)) == after


def test_a_picture_named_twice_has_two_rows_however_often_it_is_resumed(capsys, tiny_model_folder, tmp_path):
    pictures, out = paint(tmp_path / "in", 2), tmp_path / "rows.jsonl"
    one = pictures / "00000.png"
    for _ in range(3):
        assert run(capsys, "predict", tiny_model_folder, one, pictures, one, "--out", out, "--resume")[0] == 0
        assert [Path(json.loads(line)["path"]).name for line in out.read_text().splitlines()] == [
            "00000.png", "00000.png", "00001.png", "00000.png"]


@pytest.mark.parametrize("change", [["--top-k", "2"], ["--precision", "int8"]])
def test_rows_that_mean_something_else_are_not_mixed(capsys, tiny_model_folder, tmp_path, change):
    pictures, out = paint(tmp_path / "in", 3), tmp_path / "rows.csv"
    assert run(capsys, "predict", tiny_model_folder, pictures, "--out", out)[0] == 0
    before = out.read_bytes()
    code, _, said = run(capsys, "predict", tiny_model_folder, pictures, "--out", out, "--resume", *change)
    assert code == 2 and out.read_bytes() == before
    assert "--precision" in change or ("top_k" in said and "--overwrite" in said)
    (tmp_path / "rows.csv.run.json").write_text("{")
    assert run(capsys, "predict", tiny_model_folder, pictures, "--out", out, "--resume")[0] == 2
    assert out.read_bytes() == before


def test_a_file_that_exists_is_overwritten_only_on_request(capsys, tiny_model_folder, tmp_path):
    pictures, out = paint(tmp_path / "in", 3), tmp_path / "rows.csv"
    out.write_text("precious")
    for flags, why in (([], "--overwrite"), (["--resume"], "run.json"), (["--resume", "--overwrite"], "choose one")):
        code, _, said = run(capsys, "predict", tiny_model_folder, pictures, "--out", out, *flags)
        assert code == 2 and why in said and out.read_text() == "precious"
    assert run(capsys, "predict", tiny_model_folder, pictures, "--out", out, "--overwrite")[0] == 0
    assert out.read_text(encoding="utf-8").startswith("path,label,probability")
    assert run(capsys, "predict", tiny_model_folder, pictures, "--resume")[0] == 2
    for name, why in (("rows.txt", ".csv, .jsonl or .parquet"), ("in", "folder")):
        code, _, said = run(capsys, "predict", tiny_model_folder, pictures, "--out", tmp_path / name)
        assert code == 2 and why in said


def test_two_runs_do_not_write_one_file(tiny_model_folder, tmp_path):
    pytest.importorskip("fcntl")
    with RowsFile(tmp_path / "rows.csv", Layout(), {}), pytest.raises(ZooError, match="another run"):
        RowsFile(tmp_path / "rows.csv", Layout(), {}, resume=True)


def test_a_full_disk_keeps_whole_rows_and_the_run_goes_on(capsys, tiny_model_folder, tmp_path, ending):
    # Given a disk with room for a part of the rows (a limit on the size of files stands for it),
    pictures, out, whole = paint(tmp_path / "in", 60), tmp_path / f"rows.{ending}", tmp_path / f"whole.{ending}"
    arguments = [str(tiny_model_folder), str(pictures), "--batch", "8", "--resume", "--out"]
    script = ("import resource, signal, sys, metasaug; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
              "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY)); "
              f"sys.exit(metasaug.main(['predict', *{[*arguments, str(out)]}]))")
    # when it fills up,
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    # then one message says so, and how to go on; what is there are whole rows;
    assert done.returncode == 2 and "cannot be written" in done.stderr and "--resume" in done.stderr
    part = tmp_path / "rows.parquet.part" if ending == "parquet" else out
    assert part.read_bytes().endswith(b"\n") and 4000 < part.stat().st_size <= 5000
    # and once there is room again, the run goes on.
    for path in (out, whole):
        assert run(capsys, "predict", *arguments, path)[0] == 0
    assert content(out) == content(whole)


def test_parquet_holds_the_rows_of_the_csv(capsys, tiny_model_folder, tmp_path):
    pytest.importorskip("pyarrow")
    pictures = paint(tmp_path / "in", 9, bad=2)
    for kind in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"r.{kind}"
        assert run(capsys, "predict", tiny_model_folder, pictures, "--out", out, "--top-k", "3")[0] == 1
    rows = json.loads(content(tmp_path / "r.parquet"))
    assert rows == [json.loads(line) for line in (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()]
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        for row, text in zip(rows, csv.DictReader(file), strict=True):
            assert list(row) == list(text) and len(row) == 15
            assert text["path"] == row["path"] and (text["label"] or None) == row["label"]
            assert row["error"] or float(text["margin"]) == pytest.approx(row["margin"], abs=1e-6)
    assert sum(row["error"] is not None for row in rows) == 2
    model = zoo.load(tiny_model_folder)
    for row in rows:
        if row["error"] is None:
            first, second = model.predict(row["path"]).top[:2]
            assert row["margin"] == pytest.approx(first.probability - second.probability, abs=2e-6)


# ---- what is predicted ----


def test_paths_come_from_patterns_lists_zips_and_links(capsys, tiny_model_folder, tmp_path, monkeypatch):
    # Given cameras on two disks, one behind a link, a zip, and what systems leave behind,
    paint(tmp_path / "disk/b", 2)
    paint(tmp_path / "in/a", 2)
    (tmp_path / "in/b").symlink_to(tmp_path / "disk/b")
    (tmp_path / "in/a/Thumbs.db").write_bytes(b"x")
    with zipfile.ZipFile(tmp_path / "in/c.zip", "w") as archive:
        archive.write(tmp_path / "in/a/00001.png", "x/1.png")
    (tmp_path / "in/[1].png").write_bytes((tmp_path / "in/a/00001.png").read_bytes())
    monkeypatch.chdir(tmp_path / "in")

    def named(*arguments: object) -> list[str]:
        code, out, _ = run(capsys, "predict", tiny_model_folder, *arguments, "--out", "-", "--top-k", "1")
        assert code == 0
        return [row["path"] for row in csv.DictReader(io.StringIO(out))]

    a, b = ["a/00000.png", "a/00001.png"], ["b/00000.png", "b/00001.png"]
    # then each way to name them finds them, in order;
    assert named("*") == ["[1].png", *a, *b, "c.zip/x/1.png"]
    assert named("*/*0.png", "[ab]/*1.png") == [a[0], b[0], a[1], b[1]]
    assert named("**/*") == ["[1].png", *a, *b, "c.zip/x/1.png"]
    assert named("[1].png") == ["[1].png"]  # a name that exists is no pattern
    Path("list.txt").write_bytes(b"\xef\xbb\xbfb\r\n\r\na/00001.png\r\nc.zip\n")
    assert named("--list", "list.txt") == [*b, a[1], "c.zip/x/1.png"]
    assert named("a", "--list", "list.txt") == [*a, *b, a[1], "c.zip/x/1.png"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a/00001.png\nb\n")))
    assert named("-") == [a[1], *b]
    # and what is counted for the bar is what comes.
    for paths in (["*"], ["**/*"], ["a", "b", "c.zip"], ["absent.png"], ["*/*1.png", "a"]):
        assert number_of_pictures(paths) == len(list(pictures_of(paths))), paths
    for arguments, why in ((["absent*.png"], "no such file"), (["--list", "absent.txt"], "--list absent.txt"),
                           ([], "at least one")):
        code, _, said = run(capsys, "predict", tiny_model_folder, *arguments)
        assert code == 2 and why in said


def test_a_list_is_read_as_the_run_goes(tiny_model_folder, tmp_path):
    """`find … | metasaug predict -`: endless lists do not fill the memory."""
    picture = str(paint(tmp_path / "in", 1) / "00000.png")
    taken: list[int] = []
    names = (taken.append(i) or picture for i in itertools.count())
    rows = zoo.load(tiny_model_folder).predict_each(pictures_of(names), batch_size=4)
    assert [next(rows).source for _ in range(20)] == [picture] * 20
    assert len(taken) < 40


def test_memory_stays_flat_over_many_rows(tmp_path):
    """A file of 100,000 rows is resumed in less than 64 bytes a row."""
    with RowsFile(tmp_path / "rows.jsonl", Layout(1), {}) as file:
        for i in range(100_000):
            file._append(file._encoded({"path": f"/station/camera/{i:08}.jpg", "error": "x"}))
        file._describe(finished=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with RowsFile(tmp_path / "rows.jsonl", Layout(1), {}, resume=True) as file:
        assert file.rows == file.bad == 100_000
        names = (f"/station/camera/{i:08}.jpg" for i in range(100_002))
        assert list(file.new(names)) == ["/station/camera/00100000.jpg", "/station/camera/00100001.jpg"]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 64 * 100_000


# ---- the bar ----


def test_the_bar_is_for_terminals_or_on_request(capsys, tiny_model_folder, tmp_path):
    pictures = paint(tmp_path / "in", 30)
    code, _, said = run(capsys, "predict", tiny_model_folder, pictures, "--out", tmp_path / "a.csv")
    assert code == 0 and said == f"{tmp_path / 'a.csv'}: 30 rows\n"
    on = ["--out", tmp_path / "b.csv", "--progress", "on"]
    code, _, said = run(capsys, "predict", tiny_model_folder, pictures, *on)
    assert code == 0 and "30/30" in said and "pictures/s" in said
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 100))
    done = subprocess.run([sys.executable, "-m", "metasaug", "predict", tiny_model_folder, pictures, "--out",
                           tmp_path / "c.csv"], cwd=ROOT, stderr=there)
    os.close(there)
    said = b""
    while chunk := _read(here):
        said += chunk
    os.close(here)
    assert done.returncode == 0 and b"30/30" in said and b"<00:00" in said


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # how the end of a terminal reads
        return b""
