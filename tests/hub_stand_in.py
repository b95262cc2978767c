"""A stand-in for the Hugging Face Hub's API on 127.0.0.1: what an upload of a model uses.

Large files go through git-lfs's batch API to a storage URL, small ones into the commit.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_of_the_test"


@dataclass
class Hub:
    """What was created and committed."""

    url: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # by sha256
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """Return the JSON answer to a request; None: not found."""
        path = path.partition("?")[0]
        if method == "PUT" and path.startswith("/storage/"):
            self.stored[hashlib.sha256(body).hexdigest()] = body
            return {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories[name] = asked
            return {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":  # of the model card
            _, front, _ = json.loads(body)["content"].split("---\n", 2)
            known = yaml.safe_load(front).keys() <= {"library_name", "tags", "base_model"}
            return {"errors": [] if known else [{"message": f"unknown: {front}"}], "warnings": []}
        if path.endswith("/preupload/main"):
            return {"files": [self._mode(each) for each in json.loads(body)["files"]]}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {"transfer": "basic", "objects": [self._upload(each) for each in objects]}
        if path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
            name, commit = path.removeprefix("/api/models/").removesuffix("/commit/main"), "0" * 40
            return {"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit}
        if method == "GET" and path.startswith("/api/models/"):
            name = path.split("/revision/")[0].removeprefix("/api/models/")
            return {"id": name, "modelId": name, "sha": "0" * 40, "siblings": [], "private": True}
        return None

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _upload(self, file: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.url}/storage/{file['oid']}"
        return {**file, "actions": {"upload": {"href": href}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]


@contextmanager
def hub() -> Iterator[Hub]:
    """Serve a hub, and yield it."""
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            storage = self.path.startswith("/storage/")  # takes no token, as a signed URL
            if storage or self.headers.get("Authorization") == f"Bearer {TOKEN}":
                answer, code = found.answer(self.command, self.path, body), 200
            else:
                answer, code = {"error": "Invalid username or password."}, 401
            if answer is None:
                answer, code = {"error": f"no {self.path} here"}, 404
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _handle

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
