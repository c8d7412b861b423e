"""Models are fetched from a local server that answers as the Hugging Face Hub does."""

import hashlib
import http.server
import json
import re
import shutil
import threading
import types
from pathlib import Path

import pytest

from rwkv import checkpoint
from rwkv.config import FetchConfig
from rwkv.errors import UserError
from rwkv.hub.fetch import fetch
from rwkv.weights import manifest

G1 = "BlinkDL/rwkv7-g1"
NEWEST = "rwkv7-g1d-0.1b-20260129-ctx8192.pth"
OLDER = "rwkv7-g1a-0.1b-20250728-ctx4096.pth"


class Hub(http.server.ThreadingHTTPServer):
    """The routes of the hub that are used, and its content server, which has another host name.

    Attributes:
        repos: content by path, by repository.
        asked: method, path and headers of every request.
        cut: bytes after which the next download breaks off, followed by errors; 0: none.
        status: of all answers, instead of the usual ones.
        states_lfs: whether listings contain sizes and hashes, as not on all mirrors.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.asked, self.broken = {}, [], False
        self.cut, self.status, self.headers, self.body, self.states_lfs = 0, 0, {}, b"", True

    def downloads(self):
        return [headers for method, path, headers in self.asked if method == "GET" and path.startswith("/cdn/")]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append((self.command, path, {name.title(): value for name, value in self.headers.items()}))
        if hub.status:
            return self.answer(hub.status, hub.body, **hub.headers)
        if found := re.fullmatch("/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
            return self.listing(found[1], found[2])
        if found := re.fullmatch("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            data = hub.repos[found[1]][found[3]]
            digest = hashlib.sha256(data).hexdigest()
            location = f"http://localhost:{hub.server_port}/cdn/{found[1]}/{found[3]}"
            headers = {"Location": location, "X_Linked_Etag": f'"{digest}"', "X_Linked_Size": len(data)}
            return self.answer(302, ETag='"x"', X_Repo_Commit=found[2], **headers)
        owner, name, file = path.removeprefix("/cdn/").split("/", 2)
        return self.content(hub.repos[f"{owner}/{name}"][file])

    do_HEAD = do_GET

    def listing(self, repo, revision):
        if repo not in self.server.repos:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if revision not in (None, "main", "c" * 40):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = []
        for name, data in self.server.repos[repo].items():
            lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            files.append({"rfilename": name, **({"size": len(data), "lfs": lfs} if self.server.states_lfs else {})})
        self.answer(200, json.dumps({"id": repo, "modelId": repo, "sha": "c" * 40, "siblings": files}).encode())

    def content(self, data):
        hub = self.server
        if hub.broken:
            return self.answer(500)
        first = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        self.wfile.write(data[first : hub.cut or None])
        hub.broken = bool(hub.cut)


@pytest.fixture(scope="module")
def checkpoints(make_model, tmp_path_factory):
    """The bytes of two models."""
    folder, found = tmp_path_factory.mktemp("models"), []
    for seed in (1, 2):
        checkpoint.save_model(folder / "m.pth", make_model(seed, "7"), {})
        found.append((folder / "m.pth").read_bytes())
    return found


@pytest.fixture
def hub(checkpoints, monkeypatch, tmp_path):
    from huggingface_hub import constants

    server = Hub()
    server.repos[G1] = {
        OLDER: checkpoints[0],
        "rwkv7-g1-0.1b-20250307-ctx4096.pth": b"older",
        "rwkv7a-g1d-0.1b-20260212-ctx8192.pth": b"another architecture",
        "rwkv7-g1j-1.5b-20260831-ctx16384.pth": b"another size",
        "rwkv7-g1h-0.1b-20260831-ctx16384.gguf": b"another format",
        NEWEST: checkpoints[1],
        "README.md": b"text",
    }
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def immediate_retries(monkeypatch):
    """huggingface_hub retries without pauses, and writes chunks of 1000 bytes instead of 10 MB."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    for module in (file_download, _http):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=lambda _: None, time=module.time.time))


def get(words, **options):
    return fetch(FetchConfig(model=words, **options))


def test_newest_file_verified_and_recorded(hub, checkpoints, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    path = get("rwkv7-g1-0.1b")
    assert (str(path), path.resolve().name) == ("models/rwkv7-g1-0.1b.pth", NEWEST)
    assert path.read_bytes() == checkpoints[1]
    files = {p.name for p in (tmp_path / "models").iterdir() if not p.is_symlink()}
    assert files == {NEWEST, f"{NEWEST}.json"}  # the model is stored once
    found = manifest.read(path)
    assert (found["kind"], found["version"], found["sizes"]["n_layer"]) == ("model", "7", 2)
    digest = hashlib.sha256(checkpoints[1]).hexdigest()
    expected = {"repo": G1, "file": NEWEST, "revision": "c" * 40, "asked_revision": ""}
    assert found["source"] == {**expected, "sha256": digest, "size": len(checkpoints[1])}
    assert checkpoint.load_model(path).sizes.n_embd == 16
    assert NEWEST in capsys.readouterr().out
    # the token goes to the hub, not to the server of the content
    assert hub.asked[0][2]["Authorization"] == "Bearer hf_secret"
    assert ["Authorization" in headers for headers in hub.downloads()] == [False]


def test_no_network_once_fetched(hub, capsys):
    path = get("rwkv7-g1-0.1b")
    hub.asked.clear()
    for words in (
        "rwkv7-g1-0.1b",
        NEWEST,
        "rwkv7-g1d-0.1b",
        f"{G1}/{NEWEST}",
        f"https://huggingface.co/{G1}/blob/main/{NEWEST}",
    ):
        assert get(words).resolve() == path.resolve(), words
    assert hub.asked == []
    assert "not verified" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (OLDER, OLDER),
        (f"{G1}/{OLDER}", OLDER),
        (f"https://hf-mirror.com/{G1}/resolve/main/{OLDER}?download=true", OLDER),
        ("rwkv7-g1a-0.1b", OLDER),
        ("RWKV7-G1-0.1B.pth", NEWEST),
    ],
)
def test_names(hub, words, file):
    assert get(words).resolve().name == file


def test_newer_file_on_request(hub, checkpoints):
    newer = hub.repos[G1].pop(NEWEST)
    link = get("rwkv7-g1-0.1b")
    hub.repos[G1][NEWEST] = newer
    assert get("rwkv7-g1-0.1b").resolve().name == OLDER
    assert get("rwkv7-g1-0.1b", newest=True) == link
    assert (link.resolve().name, link.with_name(OLDER).exists()) == (NEWEST, True)
    assert manifest.read(link)["source"]["file"] == NEWEST
    downloads = len(hub.downloads())
    get("rwkv7-g1-0.1b", newest=True)
    assert len(hub.downloads()) == downloads


def test_interrupted_download_resumes(hub, checkpoints, immediate_retries, tmp_path):
    hub.cut = 10_000
    with pytest.raises(UserError, match="run the same command again to continue the download") as error:
        get("rwkv7-g1-0.1b")
    assert len(str(error.value).splitlines()) == 1
    (partial,) = (tmp_path / "models").iterdir()
    begun = partial.stat().st_size
    assert partial.suffix == ".part"
    assert 9000 <= begun <= 10_000  # a chunk that did not arrive completely is lost
    hub.cut, hub.broken = 0, False
    hub.asked.clear()
    assert get("rwkv7-g1-0.1b").read_bytes() == checkpoints[1]
    assert [headers["Range"] for headers in hub.downloads()] == [f"bytes={begun}-"]
    assert not partial.exists()


def test_corrupt_download_deleted(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(Handler, "content", lambda self, data: self.answer(200, b"x" * len(data)))
    with pytest.raises(UserError, match=r"is corrupt and was deleted: its SHA-256 is .*, expected [0-9a-f]{64}"):
        get("rwkv7-g1-0.1b")
    assert not (tmp_path / "models").exists()


def test_disk_space_checked_first(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"models: 0.\d\d GB are needed and 0.00 GB are free; .*--output"):
        get("rwkv7-g1-0.1b")
    assert hub.downloads() == []


def test_disk_full_keeps_the_beginning(hub, monkeypatch, tmp_path):
    from huggingface_hub import file_download

    def full(url, out, **_):
        out.write(b"x" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(UserError, match="no space left .* What was downloaded is kept"):
        get("rwkv7-g1-0.1b")
    assert [p.stat().st_size for p in (tmp_path / "models").iterdir()] == [100]


def test_ctrl_c_reports_how_to_resume(hub, monkeypatch, capsys):
    from huggingface_hub import file_download

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(file_download, "http_get", stopped)
    with pytest.raises(KeyboardInterrupt):
        get("rwkv7-g1-0.1b")
    assert "stopped; run the same command again to continue, or delete models/.rwkv7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("rwkv7-g1-0.2b", "unknown model; did you mean rwkv7-g1-.*rwkv4-world-7b"),
        ("gpt2", "unknown model; known are rwkv7-g1-0.1b, "),
        ("out/demo/base/rwkv-0.pth", "no such repository"),
        ("../x/y", "expected owner/repo"),
        ("nobody/nothing", "nobody/nothing: no such repository, or a private one"),
        (f"{G1}/none.pth", f"no such file in .*; it has .*{NEWEST}"),
        (G1, "has 5 models; name the file: .*20260831"),
        ("rwkv6-world-3b", "no such repository"),
    ],
)
def test_unknown(hub, words, expected):
    with pytest.raises(UserError, match=expected) as error:
        get(words)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "headers", "body", "expected"),
    [
        (403, {"X_Error_Code": "GatedRepo"}, b"", "is gated: accept its conditions at https://.*HF_TOKEN"),
        (403, {}, b"", "answered 403: access is denied; check the access token"),
        (500, {}, b"", "answered 500: the server has a problem; .*HF_ENDPOINT=https://hf-mirror.com"),
        (429, {}, b"", "too many requests"),
        (200, {}, b"<html>log in</html>", "did not answer as a Hugging Face hub does .*HF_ENDPOINT"),
        (200, {}, b"[]", "did not answer as a Hugging Face hub does"),
    ],
)
def test_errors_of_the_hub(hub, status, headers, body, expected):
    hub.status, hub.headers, hub.body = status, headers, body
    with pytest.raises(UserError, match=expected) as error:
        get("rwkv7-g1-0.1b")
    assert len(str(error.value).splitlines()) == 1


def test_no_network(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        UserError, match=r"127.0.0.1:1 cannot be reached \(.*refused.*HF_ENDPOINT=https://hf-mirror.com"
    ):
        get("rwkv7-g1-0.1b")
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    with pytest.raises(UserError, match="HF_ENDPOINT=hf-mirror.com: not a URL"):
        get("rwkv7-g1-0.1b")


def test_revision(hub):
    with pytest.raises(UserError, match="no such revision: v9"):
        get("rwkv7-g1-0.1b", revision="v9")
    assert manifest.read(get("rwkv7-g1-0.1b", revision="main"))["source"]["revision"] == "c" * 40
    hub.asked.clear()
    for revision in ("main", "c" * 40, ""):
        get("rwkv7-g1-0.1b", revision=revision)
    assert hub.asked == []


def test_file_downloaded_by_hand(hub, checkpoints, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / NEWEST
    path.write_bytes(checkpoints[1])
    assert get("rwkv7-g1-0.1b").resolve() == path
    assert "not verified" in capsys.readouterr().out
    assert hub.asked == []
    get("rwkv7-g1-0.1b", newest=True)
    assert manifest.read(path)["source"]["repo"] == G1
    assert hub.downloads() == []
    path.write_bytes(checkpoints[1][:-1])
    with pytest.raises(UserError, match="exists and differs from .*--force true"):
        get("rwkv7-g1-0.1b")
    get("rwkv7-g1-0.1b", force=True)
    assert path.read_bytes() == checkpoints[1]


def test_single_file_of_other_repository(hub, checkpoints, tmp_path, capsys):
    hub.repos["someone/tuned"] = {"sub/mine.pth": checkpoints[0], "README.md": b""}
    (tmp_path / "models").mkdir()
    (tmp_path / "models/other.pth").write_bytes(b"x")  # not of that repository
    assert get("someone/tuned").read_bytes() == checkpoints[0]
    hub.asked.clear()
    assert get("someone/tuned").name == "mine.pth"
    assert hub.asked == []
    hub.repos["someone/broken"] = {"text.pth": b"text"}
    assert get("someone/broken").read_bytes() == b"text"
    assert "warning: it cannot be trained here: models/text.pth: text, not a model" in capsys.readouterr().out


def test_mirror_without_hashes_in_its_listing(hub, checkpoints, monkeypatch):
    hub.states_lfs = False
    assert get("rwkv7-g1-0.1b").read_bytes() == checkpoints[1]
    assert manifest.read("models/" + NEWEST)["source"]["size"] == len(checkpoints[1])


def test_stored_token_not_sent_to_mirror(hub, tmp_path):
    (tmp_path / "token").write_text("hf_stored")
    get("rwkv7-g1-0.1b")
    assert not any("Authorization" in headers for _, _, headers in hub.asked)


def test_file_system_without_links(hub, monkeypatch):
    def fails(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", fails)
    assert get("rwkv7-g1-0.1b").name == NEWEST


def test_script(hub, script, tmp_path):
    result = script("fetch.py", "--model", "rwkv7-g1-0.1b")
    assert f"rwkv7-g1-0.1b: {NEWEST}, 0.00 GB, of {G1} at {hub.url}" in result.stdout
    assert "verified: SHA-256" in result.stdout
    assert "done: models/rwkv7-g1-0.1b.pth; to try it: " in result.stdout
