"""A stand-in for the Hugging Face Hub on this machine: what its client asks for when a model is pushed and loaded."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Listens on a free port; ``files`` holds what has been committed, by ``owner/repository`` and path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(
        self, content: bytes | dict[str, Any] | list[Any], headers: dict[str, str] | None = None, status: int = 200
    ) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        repository, action, name = "", "", ""
        if match := re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/\w+(?:/(.+))?", path):
            repository, action, name = match.groups()
        files = self.server.files.get(repository, {})
        if action == "revision":
            self.answer({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif action == "tree":
            self.answer([{"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT} for name in files])
        elif name in files:
            etag = hashlib.sha1(files[name]).hexdigest()
            self.answer(files[name], {"ETag": f'"{etag}"'})
        else:
            self.answer({"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            request = json.loads(body)
            repo_id = f"{request['organization']}/{request['name']}"
            self.server.files.setdefault(repo_id, {".gitattributes": b""})
            self.answer({"url": f"{self.server.url}/{repo_id}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif match := re.fullmatch(r"/api/models/(.+?/.+?)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.messages.append(line["value"]["summary"])
                if line["key"] == "file":
                    self.server.files[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({"error": f"{path} is not here"}, status=404)
