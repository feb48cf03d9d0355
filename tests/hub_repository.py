"""Model repositories in memory: what `hub_server.py` keeps."""

from __future__ import annotations

import base64
import dataclasses
import fnmatch
import functools
import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

LFS_PATTERNS = ("*.arrow", "*.bin", "*.ckpt", "*.gz", "*.h5", "*.model", "*.msgpack", "*.npz", "*.onnx", "*.parquet")
LFS_PATTERNS += ("*.pickle", "*.pkl", "*.pt", "*.pth", "*.safetensors", "*.tar", "*.zip", "*tfevents*")
LFS_THRESHOLD = 10 * 1024**2  # bytes, from which a file of any name is stored by LFS


def is_lfs(path: str, size: int) -> bool:
    named = any(fnmatch.fnmatch(path.rsplit("/")[-1], pattern) for pattern in LFS_PATTERNS)
    return size > 0 and (named or size >= LFS_THRESHOLD)


class HubError(Exception):
    """What the server answers instead: a status, the error code that the client reads, a message, and details."""

    def __init__(self, status: int, code: str | None, message: str, **details: str):
        super().__init__(message)
        self.status, self.code, self.details = status, code, details


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a commit: a blob of git, or an object of LFS behind a pointer."""

    content: bytes
    is_lfs: bool

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @functools.cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @functools.cached_property
    def blob_id(self) -> str:
        blob = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id


@dataclasses.dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    date: str
    files: dict[str, File]


class Repository:
    """Commits, and the branches and tags that keep them: a commit that none of them leads to is gone."""

    def __init__(self, name: str, private: bool = False, gated: bool = False):
        self.name, self.private, self.gated = name, private, gated
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        self.add_commit("main", None, "initial commit", {".gitattributes": File(attributes.encode(), False)})

    def add_commit(self, branch: str, parent: str | None, title: str, files: dict[str, File]) -> Commit:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        content = repr([parent, title, date, [(path, files[path].blob_id) for path in sorted(files)]])
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, title, date, files)
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag or a commit's id."""
        commit = self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)
        if commit is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def history(self, commit: Commit) -> Iterator[Commit]:
        yield commit
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            yield commit

    def forget_unreachable(self) -> None:
        heads = {*self.branches.values(), *self.tags.values()}
        self.commits = {commit.id: commit for head in heads for commit in self.history(self.commits[head])}


def apply_operation(files: dict[str, File], objects: dict[str, bytes], operation: str, value: dict[str, Any]) -> None:
    """Change the files of a commit by one operation of the client's."""
    path = value.get("path", "")
    if operation == "file":
        files[path] = File(base64.b64decode(value["content"]), False)
    elif operation == "lfsFile":
        if value["oid"] not in objects:
            raise HubError(400, None, f"Your push was rejected: {path} was not uploaded")
        files[path] = File(objects[value["oid"]], True)
    elif operation == "deletedFile":
        if files.pop(path, None) is None:
            raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
    elif operation == "deletedFolder":
        for inside in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
            del files[inside]
