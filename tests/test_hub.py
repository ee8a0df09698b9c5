"""Uploads to a hub of our own on this machine: what is there in the end."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from safetensors.torch import load_file

import expunge
from expunge import Concept, Problem
from expunge.cli.main import main


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload needs; large files go to a store by their hash."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        if self.headers["Authorization"] != "Bearer hf_ours":
            return self.score({"error": "Invalid username or password."}, 401)
        server, address = self.server, f"http://{self.headers['Host']}"
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            server.created.append(json.loads(text))
            return self.score({"url": f"{address}/o/n"})
        if self.path == "/api/validate-yaml":
            return self.score({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            modes = [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(text)["files"]
            ]  # fmt: skip
            return self.score({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(text)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{address}/store/{one['oid']}"}}
            return self.score({"transfer": "basic", "objects": objects})
        assert "/commit/" in self.path
        for line in map(json.loads, text.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                server.files[value["path"]] = server.store[value["oid"]]
        oid = 40 * "a"
        return self.score(
            {"success": True, "commitOid": oid, "commitUrl": f"{address}/o/n/commit/{oid}"}
        )

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.store[hashlib.sha256(data).hexdigest()] = data
        self.score({})

    def score(self, data, code=200):
        text = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.files, server.store = [], {}, {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("to", "out"), [("diffusers", "out"), ("kohya", "no-airplane.safetensors")])
def test_an_export_is_uploaded_whole(hub, folder, tmp_path, monkeypatch, capsys, to, out):
    monkeypatch.chdir(tmp_path)
    expunge.erase(expunge.load(folder), Problem((Concept("airplane", "sky"),))).save("e.safetensors")
    command = ["export", "e.safetensors", "--model", str(folder), "--to", to, "-o", out]
    assert main([*command, "--push-to-hub", "o/n", "--private"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f":{hub.server_port}/o/n")
    (created,) = hub.created
    assert (created["organization"], created["name"], created["visibility"]) == ("o", "n", "private")
    path = tmp_path / out
    if path.is_dir():
        written = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    else:
        written = {out: path.read_bytes(), "README.md": path.with_suffix(".md").read_bytes()}
        assert load_file(path)
    assert hub.files == written
    assert b"airplane" in hub.files["README.md"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        {"e.safetensors", out, *(["no-airplane.md"] if to == "kohya" else [])}
    )


def test_what_the_hub_refuses_is_one_sentence(hub, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    expunge.erase(expunge.load(folder), Problem((Concept("airplane", "sky"),))).save("e.safetensors")
    command = ["export", "e.safetensors", "--model", str(folder), "--to", "kohya", "-o", "l.safetensors"]
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert main([*command, "--push-to-hub", "o/n"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("expunge: cannot upload to o/n: ")
    assert len(error.splitlines()) == 1
    assert not hub.files
