"""What `hub_server.py` answers: the endpoints that `huggingface_hub` calls, a method each."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import socket
import urllib.parse
from typing import TYPE_CHECKING, Any

from hub_metadata import card_metadata, metadata_errors
from hub_repository import Commit, File, HubError, Repository, apply_operation, is_lfs

if TYPE_CHECKING:
    from hub_server import HubServer, Interruption

OWNER_TOKEN, STRANGER_TOKEN = "hf_owner", "hf_stranger"
USERS = {OWNER_TOKEN: "owner", STRANGER_TOKEN: "stranger"}
MODEL = r"/api/models/(?P<name>[^/]+?(?:/[^/]+)??)"
ROUTES: list[tuple[str, re.Pattern[str], str]] = [
    (method, re.compile(path), endpoint)
    for method, path, endpoint in [
        ("GET", "/api/whoami-v2", "whoami"),
        ("GET", "/api/agent-harnesses", "list_harnesses"),
        ("POST", "/api/validate-yaml", "validate_metadata"),
        ("POST", "/api/repos/create", "create_repository"),
        ("DELETE", "/api/repos/delete", "delete_repository"),
        ("GET", f"{MODEL}/refs", "list_refs"),
        ("GET", f"{MODEL}/commits/(?P<revision>[^/]+)", "list_commits"),
        ("GET", f"{MODEL}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "list_tree"),
        ("POST", f"{MODEL}/paths-info/(?P<revision>[^/]+)", "list_paths"),
        ("POST", f"{MODEL}/preupload/(?P<revision>[^/]+)", "choose_upload_modes"),
        ("POST", f"{MODEL}/commit/(?P<revision>[^/]+)", "add_commit"),
        ("POST", f"{MODEL}/branch/(?P<branch>[^/]+)", "create_branch"),
        ("DELETE", f"{MODEL}/branch/(?P<branch>[^/]+)", "delete_branch"),
        ("POST", f"{MODEL}/tag/(?P<revision>[^/]+)", "create_tag"),
        ("DELETE", f"{MODEL}/tag/(?P<tag>[^/]+)", "delete_tag"),
        ("POST", f"{MODEL}/super-squash/(?P<branch>[^/]+)", "squash"),
        ("GET", f"{MODEL}(?:/revision/(?P<revision>[^/]+))?", "show_model"),
        ("POST", r"/(?P<name>.+)\.git/info/lfs/objects/batch", "plan_upload"),
        ("POST", r"/(?P<name>.+)\.git/info/lfs/verify", "verify_upload"),
        ("PUT", r"/storage/(?P<name>.+)/(?P<oid>[^/]+)", "store"),
        ("GET", r"/storage/(?P<name>.+)/(?P<oid>[^/]+)", "fetch"),
        ("GET", r"/(?P<name>[^/]+?(?:/[^/]+)??)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]
]


@dataclasses.dataclass
class Request:
    """One request: `path` with its query, `received` the bytes of its body, `token` the one it carried."""

    method: str
    path: str
    token: str | None
    received: int = 0
    status: int | None = None


class Handler(http.server.BaseHTTPRequestHandler):
    """
    Answers requests. A method that `ROUTES` names takes the parts of the path, and returns what is sent as JSON.

    Those that send files or text answer themselves, and return `None`.
    """

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer_request(self) -> None:
        authorization = self.headers.get("Authorization", "")
        self.request_record = Request(self.command, self.path, authorization.removeprefix("Bearer ") or None)
        self.server.requests.append(self.request_record)
        address = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(address.query))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            self.body = self.read_body()
            if self.request_record.token and self.request_record.token not in USERS:
                raise HubError(401, None, "Invalid credentials in Authorization header")
            for route_method, pattern, endpoint in ROUTES:
                match = pattern.fullmatch(address.path)
                if match and method == route_method:
                    parts = {name: value and urllib.parse.unquote(value) for name, value in match.groupdict().items()}
                    answer = getattr(self, endpoint)(**parts)
                    break
            else:
                raise HubError(404, None, f"{self.command} {address.path} is not part of this Hub")
            if answer is not None:
                self.send_json(200, answer)
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self.send_json(error.status, {"error": str(error)} | error.details, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer_request

    # What goes over the wire --------------------------------------------------------------------------------------------

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            raise HubError(411, None, "Content-Length is needed")
        size = int(self.headers.get("Content-Length", 0))
        interruption = self.server.take_interruption(self.command, self.path) if self.command == "PUT" else None
        body = self.rfile.read(size // 2 if interruption else size)
        self.request_record.received = len(body)
        if interruption:
            self.break_off(interruption)
        return body

    def break_off(self, interruption: Interruption) -> None:
        interruption.reached.set()
        if interruption.silent:
            with contextlib.suppress(OSError):
                self.connection.recv(1)
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        """`content` as a whole or, where the client asks so, from a byte on."""
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and requested:
            start, end = int(requested[1]), min(int(requested[2] or len(content)) + 1, len(content))
            if start >= len(content):
                raise HubError(416, None, "The requested range is not in the file")
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
            content = content[start:end]
        self.request_record.status = status
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        interruption = self.server.take_interruption("GET", self.path) if self.command == "GET" and content else None
        self.wfile.write(content[: len(content) // 2] if interruption else content)
        if interruption:
            self.wfile.flush()
            self.break_off(interruption)

    def send_json(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"} | (headers or {}))

    # Who may do what ----------------------------------------------------------------------------------------------------

    def repository(self, name: str, write: bool = False, files: bool = False) -> Repository:
        """The repository, for a client that may know of it, and `write` to it or read its `files`."""
        token = self.request_record.token
        found = self.server.repositories.get(name)
        if found is None or (found.private and token != OWNER_TOKEN):
            # Who is not logged in is not told whether there is such a repository.
            raise HubError(404 if token else 401, "RepoNotFound", "Repository not found")
        if write and token != OWNER_TOKEN:
            raise HubError(403 if token else 401, None, f"You don't have the rights to write to {name}")
        if files and found.gated and token != OWNER_TOKEN:
            raise HubError(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted")
        return found

    def whoami(self) -> Any:
        token = self.request_record.token
        if token is None:
            raise HubError(401, None, "Invalid username or password.")
        role = {"accessToken": {"displayName": token, "role": "write"}}
        return {"type": "user", "name": USERS[token], "orgs": [], "isPro": False, "auth": role}

    def list_harnesses(self) -> Any:
        """What the client asks once a day for its user agent."""
        return {"standardEnvVars": [], "harnesses": {}}

    # Repositories, branches, tags ---------------------------------------------------------------------------------------

    def create_repository(self) -> Any:
        asked = json.loads(self.body)
        if self.request_record.token is None:
            raise HubError(401, None, "Invalid username or password.")
        name = f"{asked.get('organization') or USERS[self.request_record.token]}/{asked['name']}"
        if self.request_record.token != OWNER_TOKEN and not name.startswith("stranger/"):
            raise HubError(403, None, "You don't have the rights to create a model under this namespace")
        url = f"{self.server.url}/{name}"
        with self.server.lock:
            if name in self.server.repositories:
                raise HubError(409, None, "You already created this model repo", url=url)
            self.server.create(name, private=asked.get("private", False) or asked.get("visibility") == "private")
        return {"name": name, "id": name, "url": url}

    def delete_repository(self) -> Any:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USERS.get(self.request_record.token or '')}/{asked['name']}"
        return {"deleted": self.server.repositories.pop(self.repository(name, write=True).name).name}

    def list_refs(self, name: str) -> Any:
        repository = self.repository(name)
        refs = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        listed = {
            kind: [{"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": id} for ref, id in found.items()]
            for kind, (folder, found) in refs.items()
        }
        return listed | {"converts": []}

    def create_ref(self, refs: dict[str, str], ref: str, commit: Commit) -> Any:
        if ref in refs:
            raise HubError(409, None, f"Reference already exists: {ref}")
        refs[ref] = commit.id
        return {}

    def delete_ref(self, repository: Repository, refs: dict[str, str], ref: str) -> Any:
        if refs.pop(ref, None) is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {ref}")
        repository.forget_unreachable()
        return {}

    def create_branch(self, name: str, branch: str) -> Any:
        repository = self.repository(name, write=True)
        start = repository.resolve(json.loads(self.body or b"{}").get("startingPoint", "main"))
        return self.create_ref(repository.branches, branch, start)

    def create_tag(self, name: str, revision: str) -> Any:
        repository = self.repository(name, write=True)
        return self.create_ref(repository.tags, json.loads(self.body)["tag"], repository.resolve(revision))

    def delete_branch(self, name: str, branch: str) -> Any:
        repository = self.repository(name, write=True)
        return self.delete_ref(repository, repository.branches, branch)

    def delete_tag(self, name: str, tag: str) -> Any:
        repository = self.repository(name, write=True)
        return self.delete_ref(repository, repository.tags, tag)

    def squash(self, name: str, branch: str) -> Any:
        return {"commitOid": self.server.squash(self.repository(name, write=True).name, branch)}

    # What is in them ----------------------------------------------------------------------------------------------------

    def show_model(self, name: str, revision: str | None) -> Any:
        repository = self.repository(name)
        commit = repository.resolve(revision or "main")
        with_sizes = self.query.get("blobs", "false").lower() == "true"
        siblings = []
        for path, file in sorted(commit.files.items()):
            sizes = {"size": len(file.content), "blobId": file.blob_id}
            lfs = {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
            sizes |= {"lfs": lfs} if file.is_lfs else {}
            siblings.append({"rfilename": path} | (sizes if with_sizes else {}))
        card = commit.files.get("README.md", File(b"", False)).content.decode()
        metadata = card_metadata(card) or {}
        named = {field: metadata[field] for field in ("library_name", "pipeline_tag") if field in metadata}
        return named | {
            "id": name,
            "modelId": name,
            "author": name.split("/")[0],
            "sha": commit.id,
            "lastModified": commit.date,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "tags": metadata.get("tags", []),
            "cardData": metadata,
            "siblings": siblings,
        }

    def list_commits(self, name: str, revision: str) -> Any:
        repository = self.repository(name)
        commits = repository.history(repository.resolve(revision))
        return [
            {"id": one.id, "title": one.title, "message": "", "date": one.date, "authors": [{"user": "owner"}]}
            for one in commits
        ]

    def entry(self, commit: Commit, path: str) -> dict[str, Any] | None:
        """A file or folder, as lists of them show it."""
        file = commit.files.get(path)
        if file is None:
            inside = any(other.startswith(f"{path}/") for other in commit.files)
            oid = hashlib.sha1(f"{commit.id}/{path}".encode()).hexdigest()
            return {"type": "directory", "path": path, "size": 0, "oid": oid} if inside else None
        entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
        if self.query.get("expand", "false").lower() == "true":
            entry["lastCommit"] = {"id": commit.id, "title": commit.title, "date": commit.date}
        return entry

    def list_tree(self, name: str, revision: str, path: str | None) -> None:
        commit = self.repository(name).resolve(revision)
        prefix = f"{path}/" if path else ""
        found = set()
        for file in commit.files:
            if file.startswith(prefix):
                parts = file.removeprefix(prefix).split("/")
                depth = len(parts) if self.query.get("recursive", "false").lower() == "true" else 1
                found |= {prefix + "/".join(parts[: end + 1]) for end in range(depth)}
        commit_header = {"X-Repo-Commit": commit.id}
        if path and not found:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision!r}")
        start = int(self.query.get("cursor", 0))
        end = start + self.server.page_size
        if end < len(found):
            query = urllib.parse.urlencode(self.query | {"cursor": end})
            commit_header["Link"] = f'<{self.server.url}{self.path.split("?")[0]}?{query}>; rel="next"'
        self.send_json(200, [self.entry(commit, one) for one in sorted(found)[start:end]], commit_header)

    def list_paths(self, name: str, revision: str) -> Any:
        commit = self.repository(name).resolve(revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = urllib.parse.parse_qs(self.body.decode())["paths"]
        return [entry for path in paths if (entry := self.entry(commit, path))]

    # Upload -------------------------------------------------------------------------------------------------------------

    def choose_upload_modes(self, name: str, revision: str) -> Any:
        commit = self.repository(name, write=True).resolve(revision)
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            known = commit.files.get(file["path"])
            chosen = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            files.append(chosen | ({"oid": known.etag} if known else {}))
        return {"files": files, "commitOid": commit.id}

    def plan_upload(self, name: str) -> Any:
        repository = self.repository(name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            path = f"/storage/{name}/{wanted['oid']}"
            upload = {"href": f"{self.server.storage_url}{path}?signature={self.server.sign('PUT', path)}"}
            verify = {"href": f"{self.server.url}/{name}.git/info/lfs/verify"}
            is_new = wanted["oid"] not in repository.objects
            objects.append(wanted | ({"actions": {"upload": upload, "verify": verify}} if is_new else {}))
        return {"transfer": "basic", "objects": objects}

    def check_signature(self) -> None:
        path = self.path.split("?")[0]
        method = "GET" if self.command == "HEAD" else self.command
        if self.query.get("signature") != self.server.sign(method, path):
            raise HubError(403, None, "The address is not signed")

    def store(self, name: str, oid: str) -> Any:
        self.check_signature()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, None, f"The content is not that of {oid}")
        self.server.repositories[name].objects[oid] = self.body
        return {}

    def verify_upload(self, name: str) -> Any:
        repository, wanted = self.repository(name, write=True), json.loads(self.body)
        if len(repository.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, None, f"Object {wanted['oid']} was not uploaded")
        return {}

    def add_commit(self, name: str, revision: str) -> Any:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        repository = self.repository(name, write=True)
        with self.server.lock:
            head = repository.resolve(revision)
            if revision not in repository.branches:
                raise HubError(400, None, f"{revision} is not a branch")
            if header.get("parentCommit") not in (None, head.id):
                raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for line in lines:
                apply_operation(files, repository.objects, line["key"], line["value"])
            commit = repository.add_commit(revision, head.id, header["summary"], files)
        return {"success": True, "commitOid": commit.id, "commitUrl": f"{self.server.url}/{name}/commit/{commit.id}"}

    # Download -----------------------------------------------------------------------------------------------------------

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.repository(name, files=True).resolve(revision)
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.send(404, b"Entry not found", headers)
        if not file.is_lfs:
            return self.send(200, file.content, headers | {"ETag": f'"{file.etag}"'})
        storage_path = f"/storage/{name}/{file.sha256}"
        query = urllib.parse.urlencode({"filename": path, "signature": self.server.sign("GET", storage_path)})
        headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        return self.send(302, b"", headers | {"Location": f"{self.server.storage_url}{storage_path}?{query}"})

    def fetch(self, name: str, oid: str) -> None:
        self.check_signature()
        self.send(200, self.server.repositories[name].objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    # Cards --------------------------------------------------------------------------------------------------------------

    def validate_metadata(self) -> None:
        errors = metadata_errors(json.loads(self.body)["content"])
        answer = "\n".join(errors).encode() if errors else b'{"errors": [], "warnings": []}'
        self.send(400 if errors else 200, answer, {"Content-Type": "text/plain"})
