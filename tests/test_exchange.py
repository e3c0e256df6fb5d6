"""What ecologists do next: classes that cannot be, sorted copies, Timelapse and Camtrap DP."""

import csv
import io
import json
import re
import shutil
import zipfile
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import zoo
from tests.test_command_line import run
from tests.test_predict_runs import paint
from tests.test_predictor import noise, with_config
from zoo.errors import ZooError
from zoo.review import file_name

# ---- classes that cannot be ----


def test_a_class_that_cannot_be_is_never_answered(tiny_model_folder):
    # Given pictures, and a model told that two classes cannot be,
    model, pictures = zoo.load(tiny_model_folder), noise(20)
    before = model.predict_batch(pictures, top_k=10)
    gone = {before[0].top[0].label, before[10].top[0].label}
    narrowed = model.without(gone)
    for old, new in zip(before, narrowed.predict_batch(pictures, top_k=10), strict=True):
        # then they have probability 0 and are in no list; the others keep their proportions.
        kept = [label not in gone for label in model.labels]
        by_hand = np.where(kept, np.exp(old.logits.astype(float) - old.logits[kept].max()), 0)
        assert new.probabilities == pytest.approx(by_hand / by_hand.sum(), abs=1e-6)
        assert len(new.top) == 10 - len(gone) and not gone & {each.label for each in new.top}
        assert sum(new.groups.values()) == pytest.approx(1)
        assert narrowed.reweigh(old, top_k=10).top == new.top
    # The model itself is as it was; leaving out and leaving in are two words for one thing.
    assert [p.top for p in model.predict_batch(pictures, top_k=10)] == [p.top for p in before]
    inside = model.only(label for label in model.labels if label not in gone)
    assert inside.predict(pictures[0]).top == narrowed.predict(pictures[0]).top
    alone = model.only(["gnu"]).predict(pictures[0])
    assert [each.label for each in alone.top] == ["gnu"] and alone.probabilities.max() == 1 and alone.margin == 1


def test_a_prior_of_0_does_the_same(tiny_model_folder, tmp_path):
    model, picture = zoo.load(with_config(tiny_model_folder, tmp_path / "m", prior="uniform")), noise(3)[1]
    best = model.predict(picture).top[0]
    prior = [0.0 if label == best.label else 1.0 for label in model.labels]
    for tau in (0, 1):
        got = model.predict(picture, prior=prior, tau=tau)
        assert got.probabilities == pytest.approx(model.without([best.label]).predict(picture).probabilities, abs=1e-6)
    with pytest.raises(ZooError, match="0 for every class"):
        model.only([best.label]).predict(picture, prior=prior)


def test_names_that_are_no_class_are_told_with_near_misses(tiny_model_folder):
    model = zoo.load(tiny_model_folder)
    with pytest.raises(ZooError, match=r"no class 'bees'.*bee"):
        model.only(["bees", "cat"])
    with pytest.raises(ZooError, match="no class 'walrus'"):
        model.without(["walrus"])
    with pytest.raises(ZooError, match="left"):
        model.only(["ant"]).without(["ant"])
    assert model.without("ant").classes.allowed_C.sum() == 9  # one name is no list of letters


def test_the_command_leaves_classes_out(capsys, tiny_model_folder, tmp_path):
    pictures = paint(tmp_path / "in", 12)

    def labels(*flags: object) -> set[str]:
        code, out, _ = run(capsys, "predict", tiny_model_folder, pictures, "--out", "-", "--top-k", "10", *flags)
        assert code == 0
        return {row[name] for row in csv.DictReader(io.StringIO(out, newline="")) for name in row
                if name.startswith("label") and row[name]}

    assert len(labels()) == 10
    assert labels("--exclude", "ant", "--exclude", "bee") == set(zoo.load(tiny_model_folder).labels) - {"ant", "bee"}
    (tmp_path / "classes.txt").write_text("\ufeffcat\n\neel \r\n", encoding="utf-8")
    assert labels("--classes", tmp_path / "classes.txt") == {"cat", "eel"}
    assert labels("--classes", tmp_path / "classes.txt", "--exclude", "eel") == {"cat"}
    for flags, why in ((["--exclude", "aunt"], "Did you mean ant"), (["--classes", tmp_path / "x"], "cannot be read"),
                       (["--classes", pictures / "00000.png"], "cannot be read")):
        code, _, said = run(capsys, "predict", tiny_model_folder, pictures, *flags)
        assert code == 2 and why in said
    # A run is not continued with other classes.
    out = tmp_path / "rows.csv"
    assert run(capsys, "predict", tiny_model_folder, pictures, "--out", out)[0] == 0
    code, _, said = run(capsys, "predict", tiny_model_folder, pictures, "--out", out, "--resume", "--exclude", "ant")
    assert code == 2 and "excluded classes" in said


# ---- sorted copies ----


@pytest.mark.parametrize("flag", ["--copy-to", "--link-to"])
def test_pictures_are_sorted_by_answer_the_least_sure_first(capsys, tiny_model_folder, tmp_path, flag):
    # Given pictures, some bad, some of the same name in two folders,
    paint(tmp_path / "in/a", 12, bad=2)
    paint(tmp_path / "in/b", 12)
    out, review = tmp_path / "rows.csv", tmp_path / "review"
    arguments = ["predict", tiny_model_folder, tmp_path / "in", "--out", out, flag, review]
    assert run(capsys, *arguments)[0] == 1
    rows = [row for row in csv.DictReader(out.open(newline="", encoding="utf-8")) if not row["error"]]
    # then each folder holds the pictures of its class, the least sure first, each with its own bytes.
    for label in {row["label"] for row in rows}:
        found = sorted((review / label).iterdir())
        expected = sorted((row for row in rows if row["label"] == label), key=lambda row: float(row["probability"]))
        assert [path.name[:6] for path in found] == [f"{float(row['probability']):.4f}" for row in expected]
        assert {path.read_bytes() for path in found} == {Path(row["path"]).read_bytes() for row in expected}
        assert all(path.is_symlink() == (flag == "--link-to") for path in found)
    assert sum(len(list(folder.iterdir())) for folder in review.iterdir()) == len(rows) == 24
    # An older folder is not mixed with; a resumed run puts its part beside the other.
    assert run(capsys, *arguments, "--overwrite")[0] == 2
    assert run(capsys, *arguments, "--resume")[0] == 1


def test_pictures_of_a_zip_are_copied_and_not_linked(capsys, tiny_model_folder, tmp_path):
    paint(tmp_path / "in", 2)
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for name in ("00000.png", "00001.png"):
            archive.write(tmp_path / "in" / name, name)
    arguments = ["predict", tiny_model_folder, tmp_path / "c.zip"]
    assert run(capsys, *arguments, "--copy-to", tmp_path / "copies")[0] == 0
    assert {path.read_bytes() for path in (tmp_path / "copies").glob("*/*")} == {
        path.read_bytes() for path in (tmp_path / "in").iterdir()}
    code, _, said = run(capsys, *arguments, "--link-to", tmp_path / "links")
    assert code == 2 and "--copy-to" in said


@pytest.mark.parametrize("label", ["../../x", "/etc/passwd", "..", ".", "", "a\0b", "con:1", "é" * 400, "~", "a/"])
def test_no_label_and_no_path_leads_out_of_the_folder(label, tmp_path):
    """Labels come with a model, from anybody."""
    name = file_name(label)
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / name).write_text("x")
    assert len(list((tmp_path / "top").iterdir())) == 1 and not set(name) & set('/\\:\0*?"<>|')


# ---- Timelapse and Camtrap DP ----


def photograph(path: Path, taken: str | None = "2024:05:01 06:07:08", zone: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(noise(1, seed=sum(map(ord, path.name)))[0])
    exif = Image.Exif()
    if taken:
        exif.get_ifd(0x8769)[0x9003] = taken
    if zone:
        exif.get_ifd(0x8769)[0x9011] = zone
    picture.save(path, exif=exif)


@pytest.fixture
def camera_rows(capsys, tiny_model_folder, tmp_path) -> Path:
    """Rows of two cameras: a good picture each, one with a zone, one without a date, one that is none."""
    photograph(tmp_path / "site/cam1/a.jpg")
    photograph(tmp_path / "site/cam1/ü b.jpg", zone="-05:30")
    photograph(tmp_path / "site/cam2/a.jpg", taken="2024:12:31 23:59:59")
    photograph(tmp_path / "site/cam2/undated.jpg", taken=None)
    (tmp_path / "site/cam2/broken.jpg").write_bytes(b"x")
    assert run(capsys, "predict", tiny_model_folder, tmp_path / "site", "--out", tmp_path / "rows.csv")[0] == 1
    return tmp_path / "rows.csv"


def check_megadetector_format(found: dict) -> None:
    """What its published validator (validate_batch_results.py) checks, and its page says."""
    assert float(found["info"]["format_version"]) >= 1.3 and isinstance(found["info"]["format_version"], str)
    assert set(found) <= {"info", "images", "detection_categories", "classification_categories",
                          "classification_category_descriptions"}
    for categories in (found["detection_categories"], found["classification_categories"]):
        assert all(int(number) >= 0 and isinstance(name, str) and name for number, name in categories.items())
    for image in found["images"]:
        if image.get("failure") is not None:
            assert isinstance(image["failure"], str) and image["detections"] is None
            continue
        for detection in image["detections"]:
            assert detection["category"] in found["detection_categories"]
            assert isinstance(detection["conf"], float) and 0 <= detection["conf"] <= 1
            x, y, width, height = detection["bbox"]
            assert 0 <= x <= x + width <= 1 and 0 <= y <= y + height <= 1
            scores = [score for _, score in detection["classifications"]]
            assert scores == sorted(scores, reverse=True)
            assert all(number in found["classification_categories"] for number, _ in detection["classifications"])


def test_timelapse_reads_what_convert_writes(capsys, tiny_model_folder, camera_rows, tmp_path):
    out = tmp_path / "timelapse.json"
    assert run(capsys, "convert", camera_rows, out, "--to", "timelapse")[0] == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    check_megadetector_format(found)
    # Paths are relative to what the pictures share, the root folder that Timelapse opens; the answers are the rows'.
    by_file = {image["file"]: image for image in found["images"]}
    assert set(by_file) == {"cam1/a.jpg", "cam1/ü b.jpg", "cam2/a.jpg", "cam2/undated.jpg", "cam2/broken.jpg"}
    assert "broken.jpg" in by_file["cam2/broken.jpg"]["failure"]
    for row in csv.DictReader(camera_rows.open(newline="", encoding="utf-8")):
        if not row["error"]:
            (detection,) = by_file[Path(row["path"]).relative_to(tmp_path / "site").as_posix()]["detections"]
            best, score = detection["classifications"][0]
            assert found["classification_categories"][best] == row["label"] and len(detection["classifications"]) == 5
            assert score == detection["conf"] == pytest.approx(float(row["probability"]))
    # It is not overwritten; another root changes the paths.
    assert run(capsys, "convert", camera_rows, out, "--to", "timelapse")[0] == 2
    assert run(capsys, "convert", camera_rows, out, "--to", "timelapse", "--root", tmp_path, "--overwrite")[0] == 0
    assert json.loads(out.read_text(encoding="utf-8"))["images"][0]["file"] == "site/cam1/a.jpg"


# Camtrap DP 1.0.2, as published: observations-table-schema.json and media-table-schema.json of tdwg/camtrap-dp. Name,
# type, and constraints: ! is required, then the allowed values, the least and the largest number, or a pattern.
OBSERVATIONS = """
    observationID string ! | deploymentID string ! | mediaID string | eventID string | eventStart datetime !
    eventEnd datetime ! | observationLevel string ! media,event
    observationType string ! animal,human,vehicle,blank,unknown,unclassified | cameraSetupType string setup,calibration
    scientificName string | count integer 1.. | lifeStage string adult,subadult,juvenile | sex string female,male
    behavior string | individualID string | individualPositionRadius number 0.. | individualPositionAngle number -90..90
    individualSpeed number 0.. | bboxX number 0..1 | bboxY number 0..1 | bboxWidth number 1e-15..1
    bboxHeight number 1e-15..1 | classificationMethod string human,machine | classifiedBy string
    classificationTimestamp datetime | classificationProbability number 0..1 | observationTags string
    observationComments string"""
MEDIA = r"""
    mediaID string ! | deploymentID string ! | captureMethod string activityDetection,timeLapse | timestamp datetime !
    filePath string ! ~^(?=^[^./~])(^((?!\.{2}).)*$).*$ | filePublic boolean ! | fileName string
    fileMediatype string ! ~^(image|video|audio)/.*$ | exifData any | favorite boolean | mediaComments string"""


def check_table(path: Path, schema: str, key: str) -> list[dict[str, str]]:
    """The rows of a CSV file that a Table Schema allows."""
    fields = [field.split(" ") for line in schema.strip().splitlines() for field in line.strip().split(" | ")]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == [name for name, *_ in fields]
    assert len({row[key] for row in rows}) == len(rows)
    for row in rows:
        for name, kind, *constraints in fields:
            cell = row[name]
            assert cell or "!" not in constraints, name
            if not cell:
                continue
            number = float(cell) if kind in ("number", "integer") else None
            if kind == "datetime":
                assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:?\d\d)", cell)
                assert datetime.strptime(cell, "%Y-%m-%dT%H:%M:%S%z").tzinfo is not None
            assert kind != "boolean" or cell in ("true", "false")
            for rule in constraints:
                if ".." in rule and number is not None:
                    least, largest = rule.split("..")
                    assert float(least) <= number <= float(largest or "inf")
                elif rule.startswith("~"):
                    assert re.search(rule[1:], cell)
                elif rule != "!":
                    assert cell in rule.split(","), (name, cell)
    return rows


def test_camtrap_dp_takes_what_convert_writes(capsys, camera_rows, tmp_path):
    out = tmp_path / "dp"
    # Given rows of which one has no date and one no picture, when converted, then the rest is as the standard has it,
    code, said, _ = run(capsys, "convert", camera_rows, out, "--to", "camtrap-dp", "--utc-offset", "+02:00")
    assert code == 1 and "not readable: 1" in said and "no date" in said
    observations = check_table(out / "observations.csv", OBSERVATIONS, "observationID")
    media = check_table(out / "media.csv", MEDIA, "mediaID")
    assert [row["mediaID"] for row in observations] == [row["mediaID"] for row in media]
    times = {row["filePath"]: datetime.fromisoformat(row["timestamp"]) for row in media}
    # the hour is that of the camera's clock, in the zone that EXIF or the flag names, and cameras are deployments.
    assert times == {"cam1/a.jpg": datetime.fromisoformat("2024-05-01T06:07:08+02:00"),
                     "cam1/ü b.jpg": datetime.fromisoformat("2024-05-01T06:07:08-05:30"),
                     "cam2/a.jpg": datetime.fromisoformat("2024-12-31T23:59:59+02:00")}
    assert [row["deploymentID"] for row in media] == ["cam1", "cam1", "cam2"]
    rows = {Path(row["path"]): row for row in csv.DictReader(camera_rows.open(newline="", encoding="utf-8"))}
    for seen in observations:
        row = rows[tmp_path / "site" / seen["mediaID"]]
        assert (seen["scientificName"], seen["observationType"]) == (row["label"], "animal")
        assert float(seen["classificationProbability"]) == pytest.approx(float(row["probability"]), abs=1e-6)
        assert seen["classificationMethod"] == "machine" and seen["classifiedBy"] == "metasaug tiny"


def test_camtrap_dp_takes_names_and_says_what_it_needs(capsys, camera_rows, tmp_path):
    labels = [row["label"] for row in csv.DictReader(camera_rows.open(newline="", encoding="utf-8")) if row["label"]]
    names = tmp_path / "names.csv"
    names.write_text("label,scientificName,observationType\n" + "".join(
        f"{label},Genus {label},\n" for label in set(labels[1:])) + f"{labels[0]},,human\n", encoding="utf-8")
    convert = ["convert", camera_rows, tmp_path / "dp", "--to", "camtrap-dp", "--utc-offset", "Z", "--names", names,
               "--deployment", "d1", "--overwrite"]
    assert run(capsys, *convert)[0] == 1
    for seen in check_table(tmp_path / "dp/observations.csv", OBSERVATIONS, "observationID"):
        assert seen["deploymentID"] == "d1"
        assert (seen["observationType"], seen["scientificName"].split(" ")[0]) in (("animal", "Genus"), ("human", ""))
    # Without a zone only the picture whose EXIF has one is left; mistakes are named.
    code, said, _ = run(capsys, "convert", camera_rows, tmp_path / "other", "--to", "camtrap-dp")
    assert code == 1 and "--utc-offset" in said
    assert len(check_table(tmp_path / "other/media.csv", MEDIA, "mediaID")) == 1
    names.write_text("a,b\n1,2\n")
    shutil.copy(camera_rows, tmp_path / "moved.csv")
    for arguments, why in ((convert, "label"), ([*convert[:5], "--utc-offset", "CET", "--overwrite"], "+02:00"),
                           (["convert", tmp_path / "moved.csv", tmp_path / "x", "--to", "timelapse"], "run.json")):
        code, _, said = run(capsys, *arguments)
        assert code == 2 and why in said
