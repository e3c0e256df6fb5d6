"""`metasaug …` as a person types it."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import metasaug
import zoo
from metasaug import COMMANDS
from tests.test_layout import WITHOUT_TORCH
from zoo.model_folder import ModelFolder

ROOT = Path(__file__).resolve().parent.parent


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `metasaug …`, in this process."""
    try:
        code = metasaug.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # the flag parser's way to end
        code = stop.code if isinstance(stop.code, int) else 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


def plain(text: str) -> str:
    """Without the frames and line breaks of the flag parser's messages."""
    return " ".join("".join(" " if letter in "│╭╮╰╯─" else letter for letter in text).split())


# ---- help ----


def test_without_arguments_it_lists_every_command(capsys):
    for arguments in ((), ("--help",), ("-h",)):
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        for name, command in COMMANDS.items():
            assert name in out and command.summary in out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_commands_help_ends_well(capsys, name):
    for module in {"demo": ["gradio"], "train": ["torch"], "evaluate": [], "export": []}.get(name, []):
        pytest.importorskip(module)
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert f"metasaug {name}" in out


def test_help_names_the_allowed_values(capsys):
    text = plain(run(capsys, "predict", "--help")[1])
    for flag in ("--out", "--top-k", "--prior", "{onnx,torch}", "{auto,cpu,cuda}", "uniform", "train"):
        assert flag in text
    assert "Exit code 0: every picture was read; 1: some could not be" in text


def test_the_version_is_the_distributions(capsys):
    from importlib.metadata import version

    assert run(capsys, "--version")[:2] == (0, f"metasaug {version('metasaug')}\n")


# ---- list and info ----


def test_list_shows_the_models_that_load_and_counts_the_others(capsys):
    code, out, _ = run(capsys, "list")
    ready = [entry for entry in zoo.list_models() if entry.weights != "unpublished"]
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:1 + len(ready)]] == [entry.name for entry in ready]
    assert f"{len(zoo.list_models()) - len(ready)} more models" in out and "metasaug-inat18" not in out


def test_list_all_shows_every_model_and_where_its_weights_are(capsys):
    code, out, _ = run(capsys, "list", "--all")
    assert code == 0
    lines = out.splitlines()
    for entry, line in zip(zoo.list_models(), lines[1:], strict=False):
        assert line.split()[0] == entry.name and entry.weights in line
    for entry in zoo.list_models():
        if entry.weights == "bundled":
            ours = zoo.ModelFolder(entry.folder).config["metasaug"]
            assert f"{entry.name}: trained on {ours['dataset']}, {ours['recipe']['epochs']} epochs" in out
            assert f"{entry.measured_error:.2%}" in out
    assert max(len(line) for line in lines[: 1 + len(zoo.list_models())]) <= 100


def test_list_as_json_is_one_array(capsys):
    code, out, _ = run(capsys, "list", "--json")
    assert code == 0
    rows = json.loads(out)
    assert [row["name"] for row in rows] == [entry.name for entry in zoo.list_models()]
    assert all((row["error"] is None) == (row["weights"] != "bundled") for row in rows)


def test_a_closed_pipe_is_no_traceback():
    """`metasaug list | head -1`."""
    command = f"{sys.executable} -m metasaug list | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("name")
    assert done.stderr == ""
    # Given a reader that is gone before the first line,
    process = subprocess.Popen([sys.executable, "-m", "metasaug", "list"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read() and process.wait() in (0, 120)
    process.stderr.close()


def test_info_is_the_card(capsys, tiny_model_folder):
    code, out, _ = run(capsys, "info", tiny_model_folder)
    assert code == 0
    assert out.strip() == ModelFolder(tiny_model_folder).card.strip()


# ---- predict ----


def test_predict_prints_a_table_for_each_picture(capsys, tiny_model_folder, pictures):
    code, out, err = run(capsys, "predict", tiny_model_folder, pictures / "a.png", pictures / "b.jpg", "--top-k", "2")
    assert (code, err) == (0, "")
    model = zoo.load(tiny_model_folder)
    assert out == "".join(f"{p}\n" for p in model.predict_batch([pictures / "a.png", pictures / "b.jpg"], top_k=2))


def test_predict_takes_folders_among_files(capsys, tiny_model_folder, pictures, tmp_path):
    single = tmp_path / "single.png"
    Image.new("RGB", (9, 9)).save(single)
    code, out, _ = run(capsys, "predict", tiny_model_folder, single, pictures, single)
    assert code == 0
    named = [line for line in out.splitlines() if not line.startswith(" ")]
    assert named == [str(single), *(str(path) for path in sorted(pictures.iterdir())), str(single)]


@pytest.fixture
def with_bad(pictures) -> Path:
    """The pictures, and one file among them that is none."""
    (pictures / "bad.jpg").write_bytes((pictures / "d.jpg").read_bytes()[:400])
    return pictures


def rows_of(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


def test_out_writes_a_row_for_each_and_the_exit_code_tells_of_bad_ones(capsys, tiny_model_folder, with_bad, tmp_path):
    # Given a folder with a bad picture, when rows are asked for,
    out = tmp_path / "rows.csv"
    code, printed, err = run(capsys, "predict", tiny_model_folder, with_bad, "--out", out, "--top-k", "3")
    # then the exit code is 1 and the bad one is a row with its reason among the others,
    assert code == 1 and printed == ""
    assert "1 of 6 could not be read" in err
    rows = rows_of(out.read_text(encoding="utf-8"))
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.jpg", "bad.jpg", "c.png", "d.jpg", "e.gif"]
    bad = rows.pop(2)
    assert "bad.jpg" in bad["error"] and not any(value for key, value in bad.items() if key not in ("path", "error"))
    # and the numbers of the others are those of the library.
    model = zoo.load(tiny_model_folder)
    for row in rows:
        p = model.predict(row["path"], top_k=3)
        assert row["error"] == "" and (row["label"], row["group"]) == (p.top[0].label, p.top[0].group)
        assert int(row["train_images"]) == p.top[0].train_images and row["label_3"] == p.top[2].label
        assert float(row["probability_2"]) == pytest.approx(p.top[1].probability, abs=2e-6)
        assert sum(float(row[g]) for g in ("head", "medium", "tail")) == pytest.approx(1, abs=1e-5)


def test_out_of_a_dash_is_standard_output(capsys, tiny_model_folder, with_bad):
    code, out, err = run(capsys, "predict", tiny_model_folder, with_bad / "a.png", with_bad / "bad.jpg", "--out", "-")
    assert code == 1 and "1 of 2" in err
    assert [bool(row["error"]) for row in rows_of(out)] == [False, True]


def test_a_missing_path_among_good_ones_is_a_row(capsys, tiny_model_folder, pictures):
    code, out, _ = run(capsys, "predict", tiny_model_folder, pictures / "absent.png", pictures / "a.png", "--out", "-")
    assert code == 1
    assert "does not exist" in rows_of(out)[0]["error"] and rows_of(out)[1]["label"]


def test_an_empty_folder_does_not_end_the_run(capsys, tiny_model_folder, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    code, out, _ = run(capsys, "predict", tiny_model_folder, tmp_path / "empty", pictures / "a.png", "--out", "-")
    assert code == 1
    empty, good = rows_of(out)
    assert "holds no pictures" in empty["error"] and not empty["label"]
    assert not good["error"] and good["label"]


def test_file_names_that_are_no_text_are_rows_too(capsys, tiny_model_folder, pictures, tmp_path):
    """Linux takes any bytes for a name; such a file once ended the run."""
    try:
        shutil.copy(os.fsencode(pictures / "a.png"), os.fsencode(pictures) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes text only")
    out = tmp_path / "rows.csv"
    assert run(capsys, "predict", tiny_model_folder, pictures, "--out", out)[0] == 0
    assert "caf\\udce9.png" in [Path(row["path"]).name for row in rows_of(out.read_text(encoding="utf-8"))]
    code, printed, _ = run(capsys, "predict", tiny_model_folder, pictures)
    assert code == 0 and "caf\\udce9.png" in printed


@pytest.mark.parametrize(("arguments", "reason"), [
    (["absent.png"], "no such file"), (["x" * 5000], "no such file"),
    (["a.png", "--top-k", "0"], "top_k 0: an integer, at least 1"),
    (["a.png", "--prior", "uniform"], "does not say which prior"), (["a.png", "--device", "cuda"], "device='cpu'"),
    (["a.png", "--out", "absent/rows.csv"], "cannot be written"), (["a.png", "--out", "."], "cannot be written")])
def test_what_cannot_be_done_is_one_line_and_exit_code_2(capsys, tiny_model_folder, pictures, monkeypatch, arguments,
                                                         reason):
    if "cuda" in arguments and os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a CUDA device here")
    monkeypatch.chdir(pictures)
    code, out, err = run(capsys, "predict", tiny_model_folder, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("metasaug predict: ") and reason in err


def test_a_wrong_flag_leaves_an_older_out_file_alone(capsys, tiny_model_folder, pictures, tmp_path):
    out = tmp_path / "rows.csv"
    out.write_text("precious")
    for wrong in (["--top-k", "0"], ["--prior", "train"]):
        assert run(capsys, "predict", tiny_model_folder, pictures / "a.png", "--out", out, *wrong)[0] == 2
    assert out.read_text() == "precious"


# ---- mistakes ----


def test_an_unknown_command_lists_the_commands(capsys):
    code, out, err = run(capsys, "classify", "a.png")
    assert (code, out) == (2, "")
    assert "Unknown command 'classify'" in err and all(name in err for name in COMMANDS)


def test_a_wrong_choice_lists_the_allowed_ones(capsys):
    code, _, err = run(capsys, "predict", "m", "a.png", "--backend", "tensorrt")
    assert code == 2 and "onnx" in plain(err) and "torch" in plain(err)
    code, _, err = run(capsys, "predict", "m", "a.png", "--precision", "int7")
    assert code == 2 and "fp32" in plain(err) and "int8" in plain(err)


def test_a_wrong_flag_is_named_and_a_near_one_suggested(capsys):
    code, _, err = run(capsys, "predict", "m", "a.png", "--topk", "3")
    assert code == 2 and "--topk" in plain(err) and "--top-k" in plain(err)
    code, _, err = run(capsys, "predict", "m", "a.png", "--top-k", "many")
    assert code == 2 and "many" in plain(err)
    assert run(capsys, "predict")[0] == 2


def test_an_unknown_dataset_lists_the_known(capsys):
    pytest.importorskip("torch")
    code, _, err = run(capsys, "train", "cifar11-lt")
    assert code == 2 and "cifar10-lt" in plain(err) and "cifar100-lt" in plain(err)


@pytest.mark.parametrize("command", [["predict", "NAME", "a.png"], ["info", "NAME"]])
def test_an_unknown_model_is_answered_with_near_misses(capsys, pictures, monkeypatch, command):
    monkeypatch.chdir(pictures)
    code, _, err = run(capsys, *("metasaug-cifar10-l" if word == "NAME" else word for word in command))
    assert code == 2 and "Did you mean metasaug-cifar10-lt" in err
    code, _, err = run(capsys, *("metasaug-cifar100-lt" if word == "NAME" else word for word in command))
    assert code == 2 and "metasaug train cifar100-lt" in err


# ---- export ----


def test_export_on_a_run_folder_finds_its_model(capsys, tiny_model_folder, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from export import to_onnx

    # Given a run whose model has neither ONNX nor card yet,
    opened = ModelFolder(tiny_model_folder)
    from zoo.model_folder import ONNX, write_model_folder

    model = write_model_folder(tmp_path / "run" / "model", opened.config, opened.weights()).path
    made = (tiny_model_folder / ONNX).read_bytes()  # made once for all tests; six seconds each time
    monkeypatch.setattr(to_onnx, "onnx_bytes", lambda module, config: made)
    # when the run is exported, then its model is whole, and says how near ONNX is to torch.
    code, out, _ = run(capsys, "export", tmp_path / "run")
    assert code == 0 and "of torch" in out and str(model) in out
    ModelFolder(model).check()
    assert {ONNX, "README.md"} <= set(ModelFolder(model).files)


def test_export_of_what_is_no_model_folder_says_so(capsys, tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        code, _, err = run(capsys, "export", path)
        assert code == 2 and err.startswith("metasaug export: ") and "metasaug train" in err


# ---- extras that are not installed ----

WITHOUT_GRADIO = WITHOUT_TORCH.replace('"torch", "torchvision", "onnx", "onnxscript", "matplotlib"', '"gradio"')


@pytest.mark.parametrize(("absent", "arguments", "install"), [
    (WITHOUT_GRADIO, ["demo"], "metasaug[demo]"),
    (WITHOUT_TORCH, ["export", "FOLDER"], "metasaug[export]"),
    (WITHOUT_TORCH, ["predict", "FOLDER", "PICTURE", "--backend", "torch"], "metasaug[train]")],
    ids=["demo", "export", "predict"])
def test_a_missing_extra_is_named_with_its_install_line(tiny_model_folder, pictures, absent, arguments, install):
    words = {"FOLDER": str(tiny_model_folder), "PICTURE": str(pictures / "a.png")}
    arguments = [words.get(word, word) for word in arguments]
    script = absent + f"import metasaug; sys.exit(metasaug.main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and f"pip install '{install}'" in done.stderr


def test_list_info_and_predict_need_no_torch(tiny_model_folder, pictures):
    script = WITHOUT_TORCH + (
        f"import metasaug; folder = {str(tiny_model_folder)!r}; sys.exit(metasaug.main(['list']) or "
        f"metasaug.main(['info', folder]) or metasaug.main(['predict', folder, {str(pictures)!r}]))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_python_m_export_is_the_same_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "export", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("metasaug export: ")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_data_sets_flags_and_models(shell, capsys, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    code, script, _ = run(capsys, "completion", shell)
    assert code == 0
    as_bash = "autoload -Uz compinit && compinit -u -D; setopt kshglob ksharrays; " if shell == "zsh" else ""
    (tmp_path / "metasaug").write_text(script)
    for words, found in ((["pre"], "predict"), (["train", "fo"], "folder"),
                         (["train", "folder", "--minu"], "--minutes"),
                         (["data", ""], "check"), (["data", "check", "ta"], "table"),
                         (["predict", "heldout-cifar10-lt"], "heldout-cifar10-lt"),
                         (["predict", "x", "--resu"], "--resume")):
        ask = (as_bash + 'source "$1"; shift; COMP_WORDS=(metasaug "$@"); COMP_CWORD=$#; _metasaug; '
               'printf "%s\\n" "${COMPREPLY[@]}"')
        done = subprocess.run([shell, "-c", ask, "-", tmp_path / "metasaug", *words], capture_output=True, text=True)
        assert found in done.stdout.split(), (words, done)
