"""
A small Hugging Face Hub on the loopback address, for the real, unchanged `huggingface_hub` client.

It is: model repositories in memory, each with commits, branches, tags, visibility and gate; the endpoints that the client
calls to create, push, list, resolve and download, with the headers and error codes that it reads; files of weights behind
a redirect to signed addresses on another host name, as the real one keeps them. It records every request, and breaks
connections off in the middle of a file when told to.

It is not: datasets, Spaces, pull requests, Xet (clients set `HF_HUB_DISABLE_XET=1`), multi-part uploads, rate limits, or
users beyond two: one that may read and write everything, and one that may do so only where anybody may. Its endpoints are
in `hub_endpoints.py`, what it keeps is in `hub_repository.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import os
import pathlib
import re
import secrets
import sys
import threading
from collections.abc import Iterator
from typing import Any

from hub_endpoints import Handler, Request
from hub_repository import File, Repository, is_lfs


@dataclasses.dataclass
class Interruption:
    """How the next `times` transfers whose method and path (a regular expression) match are broken off half way."""

    method: str
    path: str
    times: int
    silent: bool
    reached: threading.Event = dataclasses.field(default_factory=threading.Event)


class HubServer(http.server.ThreadingHTTPServer):
    """The Hub. `repositories` by their names, `requests` in their order; `page_size` entries of a tree at a time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage_url = f"http://localhost:{self.server_port}"  # another host: the client takes its token off
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.interruptions: list[Interruption] = []
        self.page_size = 1000
        self.lock = threading.RLock()
        self.secret = secrets.token_hex(8)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless it is that a client went away or was cut off."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def environment(self, home: pathlib.Path, token: str | None = None, **settings: str) -> dict[str, str]:
        """The environment of a client process that knows this Hub only, with `home` for its cache and settings."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        client = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return kept | client | ({"HF_TOKEN": token} if token else {}) | settings

    @contextlib.contextmanager
    def record(self) -> Iterator[list[Request]]:
        """The requests that arrive inside of the block, complete at its end."""
        recorded: list[Request] = []
        start = len(self.requests)
        yield recorded
        recorded += self.requests[start:]

    def interrupt(self, method: str, path: str = "", times: int = 1, silent: bool = False) -> Interruption:
        """
        Break the connection off in the middle of the next `times` files that are sent ("PUT") or fetched ("GET").

        With `silent`, the server stops there without a word, and waits for the client to go away. `reached` of what is
        returned is set when it has come to that.
        """
        interruption = Interruption(method, path, times, silent)
        self.interruptions.append(interruption)
        return interruption

    def take_interruption(self, method: str, path: str) -> Interruption | None:
        with self.lock:
            for interruption in self.interruptions:
                if interruption.times and interruption.method == method and re.search(interruption.path, path):
                    interruption.times -= 1
                    return interruption
        return None

    def create(self, name: str, private: bool = False, gated: bool = False) -> Repository:
        """A new repository, without a client."""
        self.repositories[name] = Repository(name, private=private, gated=gated)
        return self.repositories[name]

    def add_files(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files without a client, into a repository that is created where there is none; the commit's id."""
        repository = self.repositories.get(name) or self.create(name)
        new = {path: File(content, is_lfs(path, len(content))) for path, content in files.items()}
        head = repository.resolve(branch)
        repository.objects |= {file.sha256: file.content for file in new.values() if file.is_lfs}
        return repository.add_commit(branch, head.id, "Add files", head.files | new).id

    def add_folder(self, name: str, folder: pathlib.Path, branch: str = "main") -> str:
        """The same with all files of a folder."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return self.add_files(name, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}, branch)

    def squash(self, name: str, branch: str = "main") -> str:
        """One commit in the place of a branch's history, whose commits are gone unless another branch or tag has them."""
        repository = self.repositories[name]
        commit = repository.add_commit(branch, None, "Squash", repository.resolve(branch).files)
        repository.forget_unreachable()
        return commit.id

    def sign(self, method: str, path: str) -> str:
        return hashlib.sha256(f"{self.secret} {method} {path}".encode()).hexdigest()[:16]
