"""Models from the Hub: only what is needed, of one commit, the right bytes or one error, in time.

Against a real HTTP server on 127.0.0.1 (tests/hub_server.py), through huggingface_hub's own client.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest

import zoo
import zoo.hub
import zoo.registry
from tests.hub_server import READER, Hub
from zoo.errors import HubError, ModelFolderError, UnpublishedModelError, ZooError
from zoo.hub import HubFolder, parse
from zoo.loading import open_folder
from zoo.model_folder import CARD, CONFIG, COVARIANCE, FILES, MANIFEST, ONNX, WEIGHTS, ModelFolder, manifest_of
from zoo.registry import OnHub, find

ROOT = Path(__file__).resolve().parent.parent


def renamed(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """The same model by another name, with a manifest that vouches for it."""
    config = json.loads(files[CONFIG])
    config["metasaug"]["name"] = name
    changed = {**files, CONFIG: json.dumps(config).encode()}
    del changed[MANIFEST]
    return {**changed, MANIFEST: manifest_of(changed)}


@contextlib.contextmanager
def no_sockets(monkeypatch):
    """Opening any socket is an error."""
    def refuse(*_args, **_kwargs):
        raise AssertionError("a socket was opened")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "socket", refuse)
        patched.setattr(socket, "create_connection", refuse)
        yield


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """What another process needs to see this Hub, as a user would set it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "METASAUG_HUB"))}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", **more}


# ---- only what is needed ----


def test_a_name_on_the_hub_loads_and_predicts_as_the_folder_does(hub, tiny_model_folder, pictures):
    on_hub, here = zoo.load("hf:owner/tiny"), zoo.load(tiny_model_folder)
    assert on_hub.predict(pictures / "a.png") == here.predict(pictures / "a.png")
    assert on_hub.name == "tiny" and on_hub.folder.card == here.folder.card


@pytest.mark.parametrize(("backend", "weights"), [("onnx", ONNX), ("torch", WEIGHTS)])
def test_only_the_files_that_the_backend_reads_are_fetched(hub, backend, weights):
    model = zoo.load("hf:owner/tiny", backend=backend, device="cpu")
    assert hub.fetched() == [MANIFEST, CONFIG, weights]
    # The rest comes when somebody asks for it, and once.
    for _ in range(2):
        model.folder.covariance()
        assert hub.fetched()[3:] == [COVARIANCE]


def test_the_torch_module_of_an_onnx_model_is_fetched_when_it_is_asked_for(hub):
    model = zoo.load("hf:owner/tiny")
    assert sum(p.numel() for p in model.module.parameters()) > 0
    assert hub.fetched() == [MANIFEST, CONFIG, ONNX, WEIGHTS]


def test_info_fetches_the_card_alone(hub, files, capsys):
    import metasaug

    assert metasaug.main(["info", "hf:owner/tiny"]) == 0
    assert hub.fetched() == [MANIFEST, CARD]
    assert capsys.readouterr().out.strip() == files[CARD].decode().strip()


def test_each_file_is_read_once(hub, tiny_model_folder, monkeypatch):
    """The bytes that are hashed are the bytes that are used; on disk as on the Hub."""
    read, honest = [], ModelFolder._bytes

    def counted(self, name, size):
        read.append(name)
        return honest(self, name, size)

    monkeypatch.setattr(ModelFolder, "_bytes", counted)
    zoo.load(tiny_model_folder)
    assert sorted(read) == sorted(name for name in (MANIFEST, *FILES) if (tiny_model_folder / name).exists())
    read.clear()
    zoo.load("hf:owner/tiny")
    assert sorted(read) == sorted([MANIFEST, CONFIG, ONNX])


# ---- which commit ----


def test_main_moves_and_a_commit_stays(hub, files):
    # Given a model that was loaded, and then published anew under another name,
    old = hub.repos["owner/tiny"].refs["main"]
    first = zoo.load("hf:owner/tiny")
    new = hub.add("owner/tiny", renamed(files, "newer"))
    # when it is loaded again, then main is the new one, the old commit the old one, by either spelling,
    assert zoo.load("hf:owner/tiny").name == "newer"
    assert zoo.load(f"hf:owner/tiny@{old}").name == zoo.load("hf:owner/tiny", revision=old).name == "tiny"
    hub.repos["owner/tiny"].refs["v1"] = old
    assert zoo.load("hf:owner/tiny@v1").folder.revision == old != new
    # and the model that was open stays with its commit, whatever it still fetches.
    assert first.folder.read(WEIGHTS) == files[WEIGHTS]
    assert any(f"/resolve/{old}/{WEIGHTS}" in path for _, path, _ in hub.log)


def test_a_cached_commit_makes_no_request_and_main_one(hub):
    commit = hub.repos["owner/tiny"].refs["main"]
    zoo.load("hf:owner/tiny")
    hub.log.clear()
    zoo.load(f"hf:owner/tiny@{commit}")
    assert hub.log == []
    zoo.load("hf:owner/tiny")
    assert [method for method, _, _ in hub.log] == ["HEAD"]


def test_two_revisions_are_one_too_many(hub, tiny_model_folder):
    with pytest.raises(ZooError, match="two revisions"):
        zoo.load("hf:owner/tiny@v1", revision="v2")
    for name, why in ((tiny_model_folder, "is a folder"), ("ce-cifar10-lt", "is bundled")):
        with pytest.raises(ZooError, match=why):
            zoo.load(name, revision="v1")


def test_the_log_says_in_one_line_what_was_loaded(hub, caplog):
    commit = hub.repos["owner/tiny"].refs["main"]
    with caplog.at_level(logging.INFO, "zoo"):
        zoo.load("hf:owner/tiny")
    lines = [record.getMessage() for record in caplog.records if record.name == "zoo"]
    assert len(lines) == 1
    for told in ("tiny", "Made-up animals", "random weights for tests", f"hf:owner/tiny@{commit}"):
        assert told in lines[0]


# ---- offline ----


def test_what_is_cached_loads_without_a_socket(hub, monkeypatch, pictures):
    from huggingface_hub import constants

    commit = hub.repos["owner/tiny"].refs["main"]
    answer = zoo.load("hf:owner/tiny").predict(pictures / "a.png")
    with no_sockets(monkeypatch):
        assert zoo.load("hf:owner/tiny", local_files_only=True).predict(pictures / "a.png") == answer
        assert zoo.load(f"hf:owner/tiny@{commit}").predict(pictures / "a.png") == answer
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert zoo.load("hf:owner/tiny").predict(pictures / "a.png") == answer
        # What is not there says so, and that being offline is the reason.
        for name in ("hf:owner/tiny@v2", "hf:owner/other"):
            with pytest.raises(HubError, match=r"not in the cache .* load it once with a connection"):
                zoo.load(name)
        with pytest.raises(HubError, match=r"model\.safetensors is missing"):
            zoo.load("hf:owner/tiny", backend="torch")


def test_a_hub_that_is_away_leaves_what_is_cached(hub, impatient, pictures):
    impatient(20)
    answer = zoo.load("hf:owner/tiny").predict(pictures / "a.png")
    hub.fail("503", method="HEAD")
    assert zoo.load("hf:owner/tiny").predict(pictures / "a.png") == answer


# ---- what goes wrong, and what to do ----


@pytest.mark.parametrize(("name", "told"), [
    ("hf:owner/absent", "no repository owner/absent, or it is private"),
    ("hf:owner/private", "no repository owner/private, or it is private"),
    ("hf:owner/gated", "owner/gated is gated: ask for access"),
    ("hf:owner/tiny@v9", "no revision 'v9'"),
    ("hf:owner/other", "holds no model of the zoo"),
    ("hf:owner/half", r"lacks onnx/model\.onnx, though its manifest\.json names it"),
    ("hf:owner/wrong", r"manifest\.json came with wrong bytes twice"),
])
def test_each_refusal_of_the_hub_is_one_error_that_says_what_to_do(hub, files, name, told):
    hub.add("owner/private", files, private=True)
    hub.add("owner/gated", files, gated=True)
    hub.add("owner/other", {"pytorch_model.bin": b"x", "config.json": b"{}"})
    hub.add("owner/half", {name: content for name, content in files.items() if name != ONNX})
    hub.add("owner/wrong", {MANIFEST: b'{"name": "a web page"}'})
    with pytest.raises(HubError, match=told) as caught:
        zoo.load(name)
    assert len(str(caught.value)) < 700 and "Traceback" not in str(caught.value)


@pytest.mark.parametrize(("status", "told"), [
    ("401", "refuses the token .*hf auth login"), ("403", "refuses access .*hf auth login"),
    ("429", "HTTP 429 .* in some minutes"), ("500", "HTTP 500 .* local_files_only"), ("503", "HTTP 503")])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_each_status_is_one_error(hub, impatient, status, told, method):
    impatient(20)
    hub.fail(status, method=method)
    with pytest.raises(HubError, match=told):
        zoo.load("hf:owner/tiny")


def test_nobody_listening_is_one_error(hub, impatient, monkeypatch):
    from huggingface_hub import constants

    impatient(20)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(HubError, match=r"did not come through .*Check the connection"):
        zoo.load("hf:owner/tiny")


@pytest.mark.parametrize("name", ["hf:", "hf:tiny", "hf:a/b/c", "hf:owner/", "hf:/tiny", "hf:owner/tiny@", "hf:../x",
                                  "hf:owner/ti ny", "hf:owner/tiny@ ", "hf:./..", "hf:owner/..\0"])
def test_names_that_are_none_say_how_one_looks(hub, name):
    with pytest.raises(HubError, match="hf:owner/repo"):
        zoo.load(name)
    assert hub.log == []


def test_names_are_taken_apart():
    assert parse("hf:owner/repo") == ("owner/repo", None)
    assert parse("hf:a-b/c.d_e@refs/pr/3") == ("a-b/c.d_e", "refs/pr/3")


def test_a_repository_without_its_prefix_is_told_so():
    with pytest.raises(zoo.UnknownModelError, match="If it is a repository on the Hub: hf:owner/tiny"):
        zoo.load("owner/tiny")


# ---- tokens ----


@pytest.mark.parametrize("way", ["argument", "environment", "login"])
@pytest.mark.parametrize("kind", ["private", "gated"])
def test_a_token_opens_private_and_gated_repositories(hub, files, tmp_path, monkeypatch, way, kind):
    hub.add("owner/locked", files, **{kind: True})
    if way == "environment":
        monkeypatch.setenv("HF_TOKEN", READER)
    elif way == "login":
        (tmp_path / "token").write_text(READER)
    model = zoo.load("hf:owner/locked", token=READER if way == "argument" else None)
    assert model.name == "tiny"
    # The token goes to the Hub, and not to the other host that it redirects to.
    assert {token for _, path, token in hub.log if "/resolve/" in path} == {READER}
    assert {token for _, path, token in hub.log if "/cdn/" in path} == {None}


# ---- wrong bytes ----


@pytest.mark.parametrize("kind", ["503", "drop", "reset", "short", "long", "flip", "stall"])
@pytest.mark.parametrize("name", [MANIFEST, ONNX])
def test_a_line_that_fails_once_still_gives_the_right_bytes(hub, impatient, files, kind, name):
    impatient(30)
    hub.fail(kind, name.replace(".", r"\."), times=1)
    folder = open_folder("hf:owner/tiny", [ONNX])
    assert folder.read(ONNX) == files[ONNX]


@pytest.mark.parametrize("kind", ["503", "drop", "reset", "short", "long", "flip", "silent", "stall", "drip"])
@pytest.mark.parametrize("name", [MANIFEST, ONNX])
def test_a_line_that_keeps_failing_is_one_error_in_time_and_nothing_wrong_stays(hub, impatient, files, kind, name):
    impatient(2)
    hub.fail(kind, name.replace(".", r"\."))
    began = time.monotonic()
    with pytest.raises(HubError):
        zoo.load("hf:owner/tiny")
    assert time.monotonic() - began < 10
    # Then nothing in the cache can be taken for the model,
    with pytest.raises(HubError):
        zoo.load("hf:owner/tiny", local_files_only=True)
    # and once the line is good, the next process gets the right bytes. (In this one, the old request may go on.)
    hub.faults.clear()
    if kind not in ("silent", "stall", "drip"):
        assert open_folder("hf:owner/tiny").read(ONNX) == files[ONNX]


@pytest.mark.parametrize("name", [MANIFEST, CONFIG, ONNX])
def test_bytes_that_rot_in_the_cache_are_fetched_anew_or_refused(hub, files, name):
    model = zoo.load("hf:owner/tiny")
    blob = Path(os.path.realpath(model.folder.path / name))
    wrong = bytes([files[name][0] ^ 1]) + files[name][1:]
    blob.write_bytes(wrong)
    with pytest.raises(HubError, match="is damaged in the cache, and being offline"):
        zoo.load("hf:owner/tiny", local_files_only=True)
    assert zoo.load("hf:owner/tiny").name == "tiny"
    assert (model.folder.path / name).read_bytes() == files[name]


def test_a_repository_whose_bytes_do_not_match_its_manifest_never_loads(hub, files):
    """Even where size, etag and transport are all in order."""
    wrong = files[ONNX][:-1] + bytes([files[ONNX][-1] ^ 1])
    commit = hub.add("owner/forged", {**files, ONNX: wrong})
    with pytest.raises(HubError, match=r"onnx/model\.onnx came with wrong bytes twice"):
        zoo.load("hf:owner/forged")
    with pytest.raises(HubError):
        zoo.load(f"hf:owner/forged@{commit}", local_files_only=True)


def test_a_full_disk_is_one_error_and_leaves_nothing_broken(hub, files, tmp_path):
    # Given a process that may write files of 100 kB at most, when it loads a larger model,
    script = ("import resource, sys, metasaug; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
              f"sys.exit(metasaug.main(['predict', 'hf:owner/tiny', {str(ROOT / 'zoo/examples/cat.jpg')!r}]))")
    home = tmp_path / "home"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(hub, home))
    # then that is one message with what to do, and no part of the file stays,
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be written to the cache" in done.stderr and "HF_HOME" in done.stderr
    assert not list(home.rglob("*.incomplete"))
    # and with room it works.
    folder = HubFolder("owner/tiny", cache=home / "hub")
    assert folder.read(ONNX) == files[ONNX]


def test_a_cache_that_may_not_be_written_serves_what_it_has(hub, files, monkeypatch):
    # Given a model in the cache, a newer commit on the Hub, and a cache that became read-only,
    model, fetch = zoo.load("hf:owner/tiny"), huggingface_hub.hf_hub_download
    hub.add("owner/tiny", {**files, CARD: files[CARD] + b"new"})

    def read_only(*names, **how):
        if not how.get("local_files_only"):
            raise PermissionError(13, "Permission denied")
        return fetch(*names, **how)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", read_only)
    # when it is loaded again, then the commit of before serves, and it is said; what is not there is an error.
    with pytest.warns(UserWarning, match=rf"(?s)cannot be written.*commit {model.folder.revision}"):
        again = zoo.load("hf:owner/tiny")
    assert again.folder.revision == model.folder.revision
    with pytest.raises(HubError, match="cannot be written"):
        zoo.load("hf:owner/other")


def test_a_cache_that_may_not_be_written_is_one_error(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(HubError, match="cannot be written to the cache"):
        zoo.load("hf:owner/tiny")


# ---- other processes ----

LOAD = """
import hashlib, sys, zoo
from zoo.model_folder import ONNX, WEIGHTS
model = zoo.load(sys.argv[1])
print(hashlib.sha256(model.folder.read(ONNX) + model.folder.read(WEIGHTS)).hexdigest(), model.predict(sys.argv[2]))
"""


def processes(hub: Hub, home: Path, count: int) -> list[subprocess.CompletedProcess]:
    """`count` processes load owner/tiny at once from an empty cache."""
    arguments = [sys.executable, "-c", LOAD, "hf:owner/tiny", str(ROOT / "zoo/examples/cat.jpg")]
    done: list[subprocess.CompletedProcess] = []
    threads = [threading.Thread(target=lambda: done.append(
        subprocess.run(arguments, capture_output=True, text=True, env=environment(hub, home)))) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


@pytest.mark.promise("cache")
def test_eight_processes_on_one_cold_cache_get_the_same_bytes(hub, files, tmp_path):
    done = processes(hub, tmp_path / "home", 8)
    right = hashlib.sha256(files[ONNX] + files[WEIGHTS]).hexdigest()
    assert [p.returncode for p in done] == [0] * 8, done[0].stderr
    assert {p.stdout.split()[0] for p in done} == {right} and len({p.stdout for p in done}) == 1


def test_a_terminal_shows_how_far_it_is(hub, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    script = f"from zoo.loading import open_folder; open_folder('hf:owner/tiny', [{ONNX!r}])"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=theirs, env=environment(hub, tmp_path / "home"))
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's end of a terminal
        while part := os.read(ours, 10_000):
            shown += part
    os.close(ours)
    assert process.wait() == 0
    assert b"model.onnx" in shown and b"100%" in shown and b"MB" in shown


@pytest.mark.promise("cache")
@pytest.mark.long
@pytest.mark.parametrize("kind", ["503", "drop", "reset", "short", "long", "flip", "stall"])
def test_eight_processes_on_a_failing_hub_get_the_right_bytes_or_an_error(hub, files, tmp_path, kind, figure):
    hub.fail(kind, r"cdn|manifest\.json", times=6)
    began = time.monotonic()
    done = processes(hub, tmp_path / "home", 8)
    assert time.monotonic() - began < 120  # 60 s, and eight Pythons on two cores
    right = hashlib.sha256(files[ONNX] + files[WEIGHTS]).hexdigest()
    for p in done:
        assert (p.returncode == 0 and p.stdout.split()[0] == right) or "HubError" in p.stderr, p.stderr
    figure(f"{kind}: {sum(p.returncode == 0 for p in done)} of 8 the right bytes, the others an error")


@pytest.mark.promise("cache")
@pytest.mark.long
@pytest.mark.parametrize("kind", ["503", "silent", "stall", "drip", "drop"])
def test_with_nothing_made_short_it_ends_within_60_seconds(files, tmp_path, kind, figure):
    """Four at a time, each with a Hub of its own: they wait most of the time."""

    def one(name: str, method: str) -> tuple[float, subprocess.CompletedProcess]:
        with Hub() as hub:
            hub.add("owner/tiny", files)
            hub.fail(kind, name.replace(".", r"\."), method)
            began = time.monotonic()
            done = subprocess.run([sys.executable, "-m", "metasaug", "predict", "hf:owner/tiny",
                                   str(ROOT / "zoo/examples/cat.jpg")], capture_output=True, text=True,
                                  env=environment(hub, tmp_path / f"{name} {method}"))
            return time.monotonic() - began, done

    cases = [(name, method) for name in ("manifest.json", "model.onnx") for method in ("HEAD", "GET")]
    with ThreadPoolExecutor(len(cases)) as pool:
        outcomes = dict(zip(cases, pool.map(lambda case: one(*case), cases), strict=True))
    figure(f"{kind}: ends within {max(seconds for seconds, _ in outcomes.values()):.0f} s")
    for (_, method), (seconds, done) in outcomes.items():
        assert seconds < 60 + 10  # and the start of four Pythons
        assert done.returncode == (0 if method == "HEAD" and kind in ("stall", "drip", "drop") else 2), done.stderr


# ---- names of the registry ----


@pytest.fixture
def published(hub, files, monkeypatch) -> OnHub:
    """metasaug-inat18 as if its weights were out."""
    mine = renamed(files, "metasaug-inat18")
    commit = hub.add("somebody/inat18", mine)
    here = OnHub("somebody/inat18", commit, hashlib.sha256(mine[MANIFEST]).hexdigest(), 0.37, "trained on X, 3 epochs")
    monkeypatch.setitem(zoo.registry.ON_HUB, "metasaug-inat18", here)
    return here


def test_a_published_name_loads_its_pinned_commit(hub, published, files):
    hub.add("somebody/inat18", renamed(files, "moved on"))
    for name in ("metasaug-inat18", "metasaug-inaturalist2018"):
        model = zoo.load(name)
        assert model.name == "metasaug-inat18" and model.folder.revision == published.revision
    hub.log.clear()
    zoo.load("metasaug-inat18")
    assert hub.log == []
    # Another commit, where that is asked for in so many words.
    assert zoo.load("metasaug-inat18", revision="main").folder.config["metasaug"]["name"] == "moved on"


def test_a_published_name_whose_repository_holds_other_bytes_never_loads(hub, published, files, monkeypatch):
    """Whole, of this format, vouched for by its own manifest: the registry's sha256 tells."""
    other = hub.add("somebody/inat18", renamed(files, "other"))
    from dataclasses import replace

    monkeypatch.setitem(zoo.registry.ON_HUB, "metasaug-inat18", replace(published, revision=other))
    with pytest.raises(HubError, match="not the one that the registry names"):
        zoo.load("metasaug-inat18")


def test_a_published_name_is_listed_without_a_request(hub, published, monkeypatch, capsys):
    import metasaug

    with no_sockets(monkeypatch):
        entry = find("metasaug-inat18")
        assert (entry.weights, entry.measured_error, entry.summary) == ("hub", 0.37, "trained on X, 3 epochs")
        assert metasaug.main(["list"]) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("metasaug-inat18 "))
    assert " hub " in row and "37.00%" in row and "30.50%" in row
    assert "metasaug-inat18: trained on X, 3 epochs" in shown


def test_own_copies_stand_in_for_what_is_not_bundled(hub, files, monkeypatch, capsys):
    import metasaug

    monkeypatch.setenv("METASAUG_HUB_OWNER", "me")
    # Given one's own copy of an unpublished model, under its name, when it is loaded, then it is that copy,
    hub.add("me/metasaug-cifar100-lt", renamed(files, "metasaug-cifar100-lt"))
    for name in ("metasaug-cifar100-lt", "metasaug-cifar100-lt-100"):
        assert zoo.load(name).folder.source.startswith("hf:me/metasaug-cifar100-lt@")
    # while a repository of that name with something else in it does not pass for it,
    hub.add("me/metasaug-imagenet-lt", files)
    with pytest.raises(ModelFolderError, match=r"holds the model 'tiny', not 'metasaug-imagenet-lt'"):
        zoo.load("metasaug-imagenet-lt")
    # one that is not there is an error of the Hub's, a bundled model stays the bundled one,
    with pytest.raises(HubError, match="no repository me/metasaug-inat17"):
        zoo.load("metasaug-inat17")
    assert zoo.load("ce-cifar10-lt").folder.path == find("ce-cifar10-lt").folder
    # and the list says so.
    metasaug.main(["list"])
    assert "loads from hf:me/NAME" in capsys.readouterr().out
    monkeypatch.setenv("METASAUG_HUB_OWNER", "me/too")
    with pytest.raises(HubError, match="METASAUG_HUB_OWNER"):
        zoo.load("metasaug-cifar100-lt")


def test_own_copies_of_published_weights_are_held_to_the_registrys_sha256(hub, published, files, monkeypatch):
    monkeypatch.setenv("METASAUG_HUB_OWNER", "me")
    mine = renamed(files, "metasaug-inat18")
    hub.add("me/metasaug-inat18", mine)
    assert zoo.load("metasaug-inat18").folder.source.startswith("hf:me/")
    other = renamed(files, "metasaug-inat18") | {CARD: b"# another\n"}
    del other[MANIFEST]
    hub.add("me/metasaug-inat18", {**other, MANIFEST: manifest_of(other)})
    with pytest.raises(HubError, match="not the one that the registry names"):
        zoo.load("metasaug-inat18")


def test_without_own_copies_an_unpublished_name_asks_nobody(hub):
    with pytest.raises(UnpublishedModelError):
        zoo.load("metasaug-cifar100-lt")
    assert hub.log == []
