"""A base fetched from a hub: a server of this test on 127.0.0.1, each client in a fresh process with its environment.

The hub's client reads HF_ENDPOINT, HF_HUB_OFFLINE and the proxy when it is imported, hence the processes.
"""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

COMMIT = "a" * 40
CLIENT = """
import json, sys
from luthier import events
from luthier.assets import resolve
from luthier.errors import AssetError
seen = []
try:
    base = resolve(sys.argv[1], sink=seen.append)
    result = {"source": base.source, "layers": base.spec.layers}
except AssetError as error:
    result = {"code": error.code, "text": str(error)}
result["progress"] = [[e.completed, e.total] for e in seen if isinstance(e, events.Progress) and e.stage == "fetch"]
result["notes"] = [e.text for e in seen if isinstance(e, events.Note)]
print(json.dumps(result))
"""


@dataclass
class Hub:
    """Serves one folder as the repository owner/model; the files of owner/gated are gated, else nothing is there."""

    folder: Path
    info: dict[str, object] = field(default_factory=dict)  # what else the hub knows of it
    url: str = ""
    breaks: bool = False  # the connection goes away in the middle of the weights
    asked: list[str] = field(default_factory=list)
    entered: list[str | None] = field(default_factory=list)  # the Authorization of each request
    elsewhere: tuple[str, str] | None = None  # what asks for this is sent on to that server

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def reply(self, code: int, body: bytes, **headers: str) -> None:
                self.send_response(code)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_GET(self) -> None:
                hub.asked.append(self.path)
                hub.entered.append(self.headers.get("Authorization"))
                path = urlsplit(self.path).path
                names = sorted(file.name for file in hub.folder.iterdir())
                asked_of_it = path.startswith("/api/") and "/tree/" not in path
                if hub.elsewhere is not None and hub.elsewhere[0] in path:
                    name = path.rsplit("/", 1)[1]
                    size = str((hub.folder / name).stat().st_size) if name in names else "0"
                    known = {"X_Linked_Etag": f'"{name}"', "X_Linked_Size": size, "X_Repo_Commit": COMMIT}
                    self.reply(302, b"", Location=hub.elsewhere[1] + self.path, **known)
                elif "meta-llama" in path or ("owner/gated" in path and not asked_of_it):
                    self.reply(403, b"gated", X_Error_Code="GatedRepo")
                elif "owner/model" not in path and "owner/gated" not in path:
                    self.reply(404, b"none", X_Error_Code="RepoNotFound")
                elif "/tree/" in path:
                    sizes = {name: (hub.folder / name).stat().st_size for name in names}
                    tree = [{"type": "file", "path": n, "size": sizes[n], "oid": "b" * 40} for n in names]
                    self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
                elif asked_of_it:
                    files = [{"rfilename": name} for name in names]
                    info = {"id": "owner/model", "sha": COMMIT, "siblings": files, **hub.info}
                    self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
                else:
                    name = path.rsplit("/", 1)[1]
                    content = (hub.folder / name).read_bytes()
                    if hub.breaks and name == "model.safetensors" and self.command == "GET":
                        self.send_response(200)
                        self.send_header("Content-Length", str(len(content)))
                        self.end_headers()
                        self.wfile.write(content[: len(content) // 2])
                        self.close_connection = True
                        return
                    self.reply(200, content, ETag=f'"{name}"', X_Repo_Commit=COMMIT)

            do_HEAD = do_GET

        return Handler


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    made = Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), made.handler())
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(tiny_llama: Path) -> Iterator[Hub]:
    with serving(tiny_llama) as made:
        yield made


def fetch(name: str, home: Path, **variables: str) -> dict[str, object]:
    """What a fresh process gets for a base's name."""
    gone = ("HF_", "HTTP", "http", "NO_PROXY", "no_proxy", "ALL_PROXY", "SSL_", "REQUESTS_", "CURL_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(gone)}
    env = {**kept, "HF_HOME": str(home / "hf"), "LUTHIER_CACHE": str(home / "luthier"), **variables}
    done = subprocess.run([sys.executable, "-c", CLIENT, name], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_mirror_is_asked_and_its_files_are_kept(hub: Hub, tmp_path: Path) -> None:
    got = fetch("owner/model", tmp_path, HF_ENDPOINT=hub.url)
    assert got["source"] == f"hub owner/model@{COMMIT[:12]}" and got["layers"] == 2
    completed, total = got["progress"][-1]  # type: ignore[index]
    assert 0 < completed <= total
    assert not any("pytorch_model.bin" in path for path in hub.asked)
    hub.asked.clear()
    again = fetch("owner/model", tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert again["layers"] == 2 and hub.asked == []


def test_the_makers_second_copy_of_the_weights_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.folder = Path(shutil.copytree(hub.folder, tmp_path / "repository"))
    (hub.folder / "consolidated.safetensors").write_bytes(b"the same weights in another format")
    assert fetch("owner/model", tmp_path, HF_ENDPOINT=hub.url)["layers"] == 2
    assert any("model.safetensors" in path for path in hub.asked)
    assert not any("consolidated" in path for path in hub.asked)


def test_offline_is_obeyed_and_said(hub: Hub, tmp_path: Path) -> None:
    got = fetch("owner/model", tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert got["code"] == "asset-not-found" and "HF_HUB_OFFLINE" in str(got["text"]) and hub.asked == []


def test_a_proxy_is_asked(hub: Hub, tmp_path: Path) -> None:
    got = fetch("owner/model", tmp_path, HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=hub.url)
    assert got["layers"] == 2 and all(path.startswith("http://hub.invalid/") for path in hub.asked)


@pytest.mark.parametrize("what", ["/model.safetensors", "/api/models/"])
def test_another_host_that_a_hub_sends_on_to_is_given_no_token(
    what: str, hub: Hub, tiny_llama: Path, tmp_path: Path
) -> None:
    """A hub keeps its large files elsewhere, so its client follows it there; the token stays with the hub."""
    with serving(tiny_llama) as other:
        hub.elsewhere = (what, other.url.replace("127.0.0.1", "localhost"))
        got = fetch("owner/model", tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN="hf_canary0123456789")
        assert got["layers"] == 2
        assert any(what in path for path in other.asked) and set(other.entered) == {None}
        assert "Bearer hf_canary0123456789" in hub.entered


def test_gated_and_missing_are_explained(hub: Hub, tmp_path: Path) -> None:
    got = fetch("owner/gated", tmp_path, HF_ENDPOINT=hub.url)
    assert got["code"] == "asset-gated" and "hf auth login" in str(got["text"])
    got = fetch("owner/other", tmp_path, HF_ENDPOINT=hub.url)
    assert got["code"] == "asset-not-found" and "does not have it" in str(got["text"])


def test_a_gated_model_of_the_catalogue_is_said_before_it_is_fetched(hub: Hub, tmp_path: Path) -> None:
    got = fetch("meta-llama/Llama-3.1-8B-Instruct", tmp_path, HF_ENDPOINT=hub.url)
    assert got["code"] == "asset-gated" and "GATED" in got["notes"][0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({}, None),
        ({"cardData": {"license": "mit"}, "gated": False}, None),
        ({"cardData": {"license": ["mit", "apache-2.0"]}, "gated": False}, None),
        ({"cardData": {"license": "llama3.1"}}, "LICENCE-BOUND (llama3.1): read its terms at PAGE"),
        (
            {"cardData": {"license": "other", "license_name": "mine", "license_link": "https://a.b/terms"}},
            "LICENCE-BOUND (mine): read its terms at https://a.b/terms",
        ),
    ],
)
def test_the_hubs_word_on_a_licence_is_passed_on(
    info: dict[str, object], said: str | None, hub: Hub, tmp_path: Path
) -> None:
    hub.info = info
    got = fetch("owner/model", tmp_path, HF_ENDPOINT=hub.url)
    page = "https://huggingface.co/owner/model"
    assert got["layers"] == 2
    assert got["notes"] == ([] if said is None else [f"owner/model: {said.replace('PAGE', page)}"])


def test_a_gated_model_of_nobodys_list_is_said_before_it_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.info = {"cardData": {"license": "gemma"}, "gated": "manual"}
    got = fetch("owner/gated", tmp_path, HF_ENDPOINT=hub.url)
    page = "https://huggingface.co/owner/gated"
    assert got["notes"] == [f"owner/gated: GATED: accept the licence (gemma) at {page} and run `hf auth login` first"]
    assert got["code"] == "asset-gated"


def test_a_licence_is_said_offline_too_by_the_card_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    hub.folder = Path(shutil.copytree(hub.folder, tmp_path / "repository"))
    (hub.folder / "README.md").write_text("---\nlicense: llama2\n---\n# A model\n", encoding="utf-8")
    hub.info = {"cardData": {"license": "llama2"}}
    first = fetch("owner/model", tmp_path, HF_ENDPOINT=hub.url)
    hub.asked.clear()
    again = fetch("owner/model", tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert hub.asked == [] and again["layers"] == 2
    for got in (first, again):
        (note,) = got["notes"]  # type: ignore[misc]
        assert note.startswith("owner/model: LICENCE-BOUND (llama2): read its terms at ")
    fetch("owner/model", tmp_path, HF_ENDPOINT=hub.url)
    asked = [path for path in hub.asked if path.startswith("/api/models/") and "/tree/" not in path]
    assert len(asked) == 1, "the hub's own client asks; we do not where the card is here"


def test_a_mirror_that_is_down_is_no_traceback(tmp_path: Path) -> None:
    got = fetch("owner/model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert got["code"] == "asset-not-found" and "check the connection" in str(got["text"])


def test_a_network_that_breaks_in_the_middle_of_a_file(hub: Hub, tmp_path: Path) -> None:
    """`luthier train` says so, with a code and what to do; nothing half is kept, and the same command then works."""
    (tmp_path / "rows.csv").write_text("question,answer\n" + "".join(f"say {i},yes {i}\n" for i in range(20)))
    trainer = {"train_steps": 2, "batch_size": 4, "precision": "fp32", "eval_generation_rows": 0}
    settings = {"base_model": "owner/model", "dataset": "rows.csv", "trainer": trainer, "execution": {"device": "cpu"}}
    (tmp_path / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HTTP", "http"))}
    env = {**kept, "HF_HOME": str(tmp_path / "hf"), "LUTHIER_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url}
    command = [sys.executable, "-c", "from luthier.cli import main; main()", "train", "config.yaml", "--output", "run"]

    def train() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    hub.breaks = True
    broken = train()
    assert broken.returncode == 4 and "Traceback" not in broken.stderr
    assert all(word in broken.stderr for word in ("[asset-not-found]", "owner/model", "check the connection", "fix:"))
    hub.breaks = False
    assert train().returncode == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_a_ca_bundle_is_trusted(variable: str, hub: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "ca.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub(tiny_llama).handler())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"https://127.0.0.1:{server.server_address[1]}"
        refused = fetch("owner/model", tmp_path / "without", HF_ENDPOINT=url)
        assert refused["code"] == "asset-not-found"
        assert fetch("owner/model", tmp_path / "with", HF_ENDPOINT=url, **{variable: str(certificate)})["layers"] == 2
    finally:
        server.shutdown()
        server.server_close()
