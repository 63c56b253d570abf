"""A local server that implements the parts of the Hub's HTTP protocol that a push and a download use."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPOSITORY = r"([\w.-]+/[\w.-]+)"


class FakeHub(ThreadingHTTPServer):
    """Repositories by id; of each, its files by path.

    Attributes:
        repositories: the files of each repository's main branch.
        branches: the files of the other branches, by repository and name.
        private: the repositories that were asked to be private when they were made.
        commits: the repository and the first line of each commit.
        proposals: the repositories that a pull request was opened in; its files are not merged.
        refuses: paths that are not served to anyone.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[tuple[str, str]] = []
        self.proposals: list[str] = []
        self.refuses: set[str] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        main = self.repositories.get(repository)
        return main if revision == "main" else self.branches.get((repository, revision))


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run the server during the block; clients find it through the environment variable HF_ENDPOINT."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(name)
            return self._answer(200, {"url": f"{self.server.endpoint}/{name}"})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        found = re.fullmatch(rf"/api/models/{REPOSITORY}/(preupload|commit|branch)/(.+)", path)
        if found is None or found[1] not in self.server.repositories:
            return self._answer(404, {"error": f"not found: {path}"}, {"X-Error-Code": "RepoNotFound"})
        if found[2] == "branch":
            files = dict(self.server.repositories[found[1]])
            self.server.branches.setdefault((found[1], found[3]), files)
            return self._answer(200, {})
        if found[2] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            regular = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self._answer(200, {"files": regular})
        home = self.server.files(found[1], found[3])
        if home is None:
            return self._answer(404, {"error": f"no branch {found[3]}"}, {"X-Error-Code": "RevisionNotFound"})
        proposed = "create_pr=1" in query
        if proposed:
            self.server.proposals.append(found[1])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.server.commits.append((found[1], line["value"]["summary"]))
            if line["key"] == "file" and not proposed:
                home[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "deletedFile" and not proposed:
                del home[line["value"]["path"]]
        commit = {"commitUrl": f"{self.server.endpoint}/{found[1]}/commit/{'0' * 40}", "commitOid": "0" * 40}
        if proposed:
            commit["pullRequestUrl"] = f"{self.server.endpoint}/{found[1]}/discussions/1"
        return self._answer(200, commit)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path in self.server.refuses:
            return self._answer(403, {"error": "forbidden"})
        if path == "/api/whoami-v2":
            return self._answer(200, {"name": "me", "type": "user"})
        found = re.fullmatch(rf"/{REPOSITORY}/resolve/(.+?)/([^/]+)", path)
        if found is None:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        if found[1] not in self.server.repositories:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        files = self.server.files(found[1], found[2])
        if files is None:
            return self._answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        if found[3] not in files:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        etag = hashlib.sha1(files[found[3]]).hexdigest()
        return self._send(200, files[found[3]], {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    do_HEAD = do_GET

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Do not log requests."""
