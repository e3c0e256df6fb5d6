"""report.html and its sentences, `metasaug evaluate`, and the log as TensorBoard has it."""

import csv
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import metasaug
import zoo
from tests.test_layout import WITHOUT_TORCH
from training.report.metrics import Tally
from training.report.page import page, read_log
from training.report.sentences import Classes, advice, summary
from training.run.log import TensorBoardLog, scalars
from zoo.labels import assign_groups

ROOT = Path(__file__).resolve().parent.parent
ODD_NAMES = ["<script>alert(1)</script>", 'rust & "spot"', "it's </title>", "bell \x07 and \x85", "\u202eright to left",
             "`back` `ticks", "naïve ü 名前 🐟", "]]>", "-->", "&amp;", "x" * 300, "plain"]


def measured(confusion, counts, names=None, sureness=3.0, prior="train", **ours) -> tuple[dict, dict]:
    """A model's config and its results on made-up pictures: confusion[t][p] of class t are answered p."""
    C = len(confusion)
    names = names or [f"class {c}" for c in range(C)]
    groups, groups_by = assign_groups(counts, C)
    true, predicted = np.nonzero(confusion)
    times = np.asarray(confusion)[true, predicted]
    true, predicted = np.repeat(true, times), np.repeat(predicted, times)
    tally = Tally(names, counts, groups, prior)
    tally.add(np.eye(C)[predicted] * sureness, true)
    config = {"architecture": "resnet32", "num_classes": C, "pretrained_cfg": {"input_size": [3, 32, 48]},
              "metasaug": {"name": "made-up", "dataset": "Leaves & <needles>", "class_counts": counts, "groups": groups,
                           "groups_by": groups_by, "prior": prior, **ours}}
    return config, {"split": "test", **tally.results()}


def three_classes(**changes):
    """A head class nearly always right, a medium one half the time, a tail one that is mostly taken for the head."""
    return measured([[980, 15, 5], [30, 60, 10], [14, 1, 5]], [900, 60, 9], ["oak", "elm", "yew"], **changes)


def parsed(text: str) -> ElementTree.Element:
    """The page as XML, which knows no unclosed tag and no bare ampersand."""
    return ElementTree.fromstring(text)


def texts(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


# ---- sentences ----


def test_the_summary_has_the_figures_overall_by_group_and_of_weak_classes():
    overall, by_group, weak = summary(*three_classes())
    assert re.findall(r"[\d.,]+%|1,120", overall) == ["93.3%", "1,120", "95%", "91.7%", "94.6%", "61.0%"]
    for figures in ("98.0% correct (980 of 1,000; 96.9% to 98.7%)", "60% correct (60 of 100; 50% to 69%)",
                    "25% correct (5 of 20; 11% to 47%)"):
        assert figures in by_group
    assert re.findall(r"(\w+) \((\d+%) correct, often mistaken for (\w+)\)", weak) == [
        ("yew", "25%", "oak"), ("elm", "60%", "oak")]


def test_advice_follows_from_the_figures():
    # Given the three classes, trained plainly and far too sure of themselves,
    config, results = three_classes(sureness=30, loss="ce", augment="none")
    said = "\n".join(advice(Classes(config, results)))
    # then each weakness has a sentence, with its figures.
    for fact in ("yew (9 so far) and elm (60 so far)", "yew mistaken for oak (14 of 20)", "elm mistaken for oak (30 of",
                 "tail classes rests on 20 test pictures", "as low as 11% or as high as 47%", "off by 7 points",
                 "--augment metasaug"):
        assert fact in said
    # Given a class with many pictures that is weak, more pictures are not what is advised.
    config, results = measured([[500, 500], [10, 990]], [900, 800], ["oak", "elm"])
    said = "\n".join(advice(Classes(config, results)))
    assert "oak: weak despite over 100 training pictures" in said and "48 × 32 pixels" in said
    assert "Collect" not in said and "--augment" not in said


def test_a_good_model_gets_no_advice():
    config, results = measured([[1000, 0, 0], [0, 1000, 0], [0, 0, 1000]], [900, 60, 9], sureness=30)
    (said,) = advice(Classes(config, results))
    assert said.startswith("Nothing") and summary(config, results)[2].startswith("No class")


def test_classes_without_a_correct_answer_are_never_passed_over():
    """No class lies below an average of nearly nothing."""
    config, results = measured([[1, 9, 9], [9, 0, 9], [9, 9, 0]], [900, 60, 9])
    assert "2 have no correct answer" in summary(config, results)[2]


# ---- the page ----


def many_classes(C: int, names=None):
    rng = np.random.default_rng(0)
    counts = [max(1, int(1500 * 0.95**c)) for c in range(C)]
    confusion = np.diag(rng.integers(0, 9, C)) + (rng.random((C, C)) < 2 / C).astype(int)
    return measured(confusion, counts, names, command="metasaug train folder")


PAGES = {
    "two": lambda: measured([[90, 0], [6, 0]], [900, 12]), "three": three_classes,
    "odd names": lambda: many_classes(len(ODD_NAMES), ODD_NAMES), "many": lambda: many_classes(150),
    "counts not known": lambda: measured([[5, 1], [2, 9]], None, prior=None),
    "never in training": lambda: measured([[5, 1, 0], [2, 9, 0], [1, 0, 3]], [40, 8, 0]),
    "one class tested": lambda: measured([[5, 1, 0], [0, 0, 0], [0, 0, 0]], [40, 8, 2]),
}
LOG = [{"epoch": e + 1, "stage": 1 + (e >= 8), "loss": 2 / (e + 1), "train_error": 0.9 - e / 20,
        **({"test": {"error": 0.5, "groups": {"tail": {"accuracy": 0.2}, "head": {"accuracy": None}}}} if e % 5 == 4
           else {}),
        **({"meta_loss": 1.0} if e >= 8 else {})} for e in range(10)]


@pytest.mark.parametrize("which", PAGES)
def test_the_page_is_whole_and_asks_nobody_for_anything(which):
    text = page(*PAGES[which](), LOG)
    root = parsed(text)
    assert {e.tag for e in root.iter()} & {"script", "iframe", "object", "embed", "img", "form"} == set()
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on") and name not in ("src", "action", "srcset"), (element.tag, name)
            assert name != "href" or value == "data:,", value
    style = texts(root.find("head/style"))
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert not re.search(r"(nan|inf)\b", " ".join(" ".join(e.attrib.values()) for e in root.iter("polyline")))


def test_names_of_any_characters_stay_text():
    root = parsed(page(*PAGES["odd names"]()))
    shown = {texts(e) for e in root.iter("bdi")}
    assert shown >= {"<script>alert(1)</script>", "it's </title>", "&amp;", "]]>", "`back` `ticks",
                     "bell \ufffd and \ufffd"}


def test_every_class_is_there_with_its_own_figures_the_largest_first():
    config, results = many_classes(150)
    root = parsed(page(config, results))
    table = root.findall(".//section")[-1]
    rows = [[texts(cell) for cell in row] for row in table.iter("tr")][1:]
    assert [int(row[1].replace(",", "")) for row in rows] == config["metasaug"]["class_counts"]
    for row, kept in zip(rows, results["per_class"], strict=True):
        assert row[0].startswith(kept["label"]) and row[2] == f"{kept['correct']} of {kept['test_images']}"
    assert table.find("details") is not None, "150 rows are folded away"


def test_what_an_older_folder_lacks_is_left_out():
    """The first bundled models were measured before calibration, confusion and shifted frequencies."""
    config, results = three_classes()
    old = {key: results[key] for key in ("images", "error", "top5_error", "macro_error", "worst_class_error", "groups",
                                         "per_class")}
    old["per_class"] = [{k: row[k] for k in ("label", "train_images", "test_images", "correct")}
                        for row in old["per_class"]]
    old["groups"] = {g: {k: v for k, v in f.items() if k not in ("ece", "confidence", "top5_accuracy")}
                     for g, f in old["groups"].items()}
    text = page(config, old)
    titles = [texts(e) for e in parsed(text).iter("h2")]
    assert "Every class, largest first" in titles
    assert "Is its confidence reliable?" not in titles
    assert summary(config, old)[:2] == summary(config, results)[:2]


def test_training_curves_need_two_epochs_and_bear_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LOG) + '{"epoch": 11, "lo')
    assert read_log(path) == LOG and read_log(tmp_path / "absent.jsonl") == []
    assert "Training error is on augmented pictures" in page(*three_classes(), read_log(path))
    assert "Training error is on augmented pictures" not in page(*three_classes(), LOG[:1])


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_it_opens_in_a_browser_and_fits(chromium, tmp_path, width, scheme):
    # Given pages of few and of many classes, when a browser opens them,
    tab = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    heard: list[str] = []
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on("request", lambda asked: heard.extend([] if asked.url.startswith(("file:", "data:")) else [asked.url]))
    for i, make in enumerate(PAGES.values()):
        file = tmp_path / f"{i}.html"
        file.write_text(page(*make(), LOG), encoding="utf-8")
        tab.goto(file.as_uri())
        # then nothing sticks out to the side, the colours are the scheme's,
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        light, dark = "rgb(251, 250, 248)", "rgb(23, 21, 19)"
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == (dark if scheme == "dark" else light)
    # and no page had anything to complain of, or to ask from anybody.
    assert heard == []
    tab.close()


# ---- metasaug evaluate ----


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Pictures of three of the tiny model's ten classes, five, four and three of them."""
    root = tmp_path_factory.mktemp("labelled") / "test"
    rng = np.random.default_rng(0)
    for name, pictures in [("ant", 5), ("cat", 4), ("jay", 3)]:
        (root / name).mkdir(parents=True)
        for i in range(pictures):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def evaluate(capsys, *arguments: object) -> tuple[int, str]:
    try:
        code = metasaug.main(["evaluate", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out + err


def test_evaluate_writes_results_page_and_predictions(capsys, tiny_model_folder, labelled, tmp_path):
    # Given a model and labelled pictures, when measured with everything written,
    out, report, rows = tmp_path / "r.json", tmp_path / "new" / "r.html", tmp_path / "rows.csv"
    code, said = evaluate(capsys, tiny_model_folder, "--data", labelled, "--out", out, "--report", report,
                          "--predictions", rows, "--per-class")
    assert code == 0 and "on 12 test pictures" in said and "of 12 test pictures are correct" in said
    # then the results are those of the library's own answers,
    results = json.loads(out.read_text())
    model = zoo.load(tiny_model_folder)
    answers = {str(p): model.predict(p) for p in sorted(labelled.rglob("*.png"))}
    right = sum(p.top[0].label == Path(source).parent.name for source, p in answers.items())
    assert results["images"] == 12 and results["error"] == pytest.approx(1 - right / 12)
    assert results["classes_tested"] == 3
    # a row says each, and the page is whole.
    for row in csv.DictReader(rows.open(encoding="utf-8")):
        p = answers.pop(row["path"])
        assert (row["answer"], row["label"]) == (p.top[0].label, Path(row["path"]).parent.name)
        assert float(row["probability"]) == pytest.approx(p.top[0].probability, abs=2e-6)
    assert not answers
    parsed(report.read_text(encoding="utf-8"))


def test_a_table_says_the_same_as_class_folders(capsys, tiny_model_folder, labelled, tmp_path):
    table = labelled.parent / "table.csv"
    lines = [f"test/{p.parent.name}/{p.name},{p.parent.name}" for p in sorted(labelled.rglob("*.png"))]
    table.write_text("\n".join(["file,species", *lines]) + "\n")
    results = []
    for data in (labelled, table):
        assert evaluate(capsys, tiny_model_folder, "--data", data, "--out", tmp_path / "r.json")[0] == 0
        results.append(json.loads((tmp_path / "r.json").read_text()))
        results[-1].pop("split")
    assert results[0] == results[1]
    # Of a table that was also trained on, only the test rows count.
    table.write_text("\n".join(["file,species,split", *(f"{line},{'train' if i % 2 else 'test'}"
                                                        for i, line in enumerate(lines))]))
    code, said = evaluate(capsys, tiny_model_folder, "--data", table)
    assert code == 0 and "on 6 test pictures" in said and "the 6 pictures whose split is test, of 12" in said
    # Pictures of one class are no training set, but can be measured on.
    first = lines[0].rsplit(",", 1)[1]
    table.write_text("\n".join(["file,species", *(line for line in lines if line.endswith(f",{first}"))]))
    code, said = evaluate(capsys, tiny_model_folder, "--data", table)
    assert code == 0 and f"on {sum(line.endswith(f',{first}') for line in lines)} test pictures" in said


def test_a_prior_moves_the_answers(capsys, labelled, tmp_path):
    """CIFAR's pictures would take a minute; noise in two of its classes is answered otherwise as well."""
    for name in ("airplane", "truck"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, picture in enumerate(sorted(labelled.rglob("*.png"))):
            (tmp_path / "data" / name / f"{i}.png").write_bytes(picture.read_bytes())
    model, rows = zoo.load("metasaug-cifar10-lt"), tmp_path / "rows.csv"
    code, said = evaluate(capsys, "metasaug-cifar10-lt", "--data", tmp_path / "data", "--prior", "train",
                          "--predictions", rows, "--out", tmp_path / "r.json")
    assert code == 0, said
    for row in list(csv.DictReader(rows.open(encoding="utf-8")))[:6]:
        p = model.predict(row["path"], prior="train")
        assert row["answer"] == p.top[0].label
        assert float(row["probability"]) == pytest.approx(p.top[0].probability, abs=2e-6)
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["prior"] == "train" and results["images"] == 24
    answered = {row["label"]: row["answered"] for row in results["per_class"]}
    said_so = [row["answer"] for row in csv.DictReader(rows.open(encoding="utf-8"))]
    assert answered == {label: said_so.count(label) for label in model.labels}


def test_mistakes_are_one_message(capsys, tiny_model_folder, labelled, tmp_path):
    bad = labelled.parent / "bad"
    (bad / "ant").mkdir(parents=True)
    (bad / "ant" / "torn.png").write_bytes(b"\x89PNG\r\n")
    for arguments, reasons in [
        ([labelled.parent / "absent"], ["is not a folder"]),
        ([labelled.parent], ["2 classes", "unknown to", "test", f"Did you mean --data {labelled}?"]),
        ([bad], ["1 of 1 pictures cannot be read", "torn.png"]),
        ([bad, "--skip-bad"], ["1 of 1 pictures cannot be read"]),
        ([labelled, "--prior", "train"], ["does not say which prior"]),
        ([labelled, "--out", tmp_path], ["is a folder"]),
        ([labelled, "--report", "/dev/null/r.html"], ["/dev/null/r.html cannot be written"])]:
        code, said = evaluate(capsys, tiny_model_folder, "--data", *arguments)
        assert code == 2 and all(reason in said for reason in reasons), said


def test_evaluate_and_its_page_need_no_torch_and_no_matplotlib(tiny_model_folder, labelled, tmp_path):
    arguments = ["evaluate", str(tiny_model_folder), "--data", str(labelled), "--report", str(tmp_path / "r.html")]
    script = WITHOUT_TORCH + f"import metasaug; sys.exit(metasaug.main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").is_file()


# ---- TensorBoard ----


def test_every_number_of_a_line_is_a_scalar():
    line = {"epoch": 3, "stage": 2, "loss": 0.5, "note": "text",
            "test": {"error": 0.2, "top5_error": None, "accuracy_interval": [0.7, 0.9],
                     "groups": {"tail": {"ece": 0.1}}}}
    assert dict(scalars(line)) == {"stage": 2, "loss": 0.5, "test/error": 0.2, "test/groups/tail/ece": 0.1}


def test_a_resumed_runs_events_hold_each_epoch_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                      reason="pip install 'metasaug[tensorboard]'")
    # Given a log of which one epoch was lost, when the run goes on and trains it again,
    for first, last in [(0, 4), (3, 6)]:
        board = TensorBoardLog(tmp_path, LOG[:first])
        for line in LOG[first:last]:
            board.write(line)
        board.close()
    # then TensorBoard reads every epoch once, with the log's numbers.
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [
        (line["epoch"], line["loss"]) for line in LOG[:6]]


def test_without_tensorboard_the_flag_says_what_to_install(tmp_path, monkeypatch, capsys):
    from tests.test_datasets import write_class_folders

    for split, pictures in [("train", 12), ("test", 2)]:
        write_class_folders(tmp_path / split, {f"c{i}": pictures for i in range(10)}, seed=len(split))
    arguments = ["train", "cifar10-lt", "--imbalance", "2", "--epochs", "1", "--meta-per-class", "2", "--data",
                 str(tmp_path), "--out", str(tmp_path / "run"), "--tensorboard"]
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert metasaug.main(arguments) == 2
    assert "pip install 'metasaug[tensorboard]'" in capsys.readouterr().err
