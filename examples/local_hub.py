"""A small Hugging Face Hub on this machine: real HTTP, everything in memory, models only.

    with LocalHub(users={"TOKEN": "anna"}) as hub:
        ...  # a client with HF_ENDPOINT=hub.url

or `python examples/local_hub.py --token TOKEN --user anna`, which prints its address and serves until it is stopped.
The client needs HF_HUB_DISABLE_XET=1 where the hub takes weights over LFS (`lfs=True`).
"""

import argparse
import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"  # the first commit of every repository
ANNA, READER, BERT = "hf_annasSecret", "hf_readersSecret", "hf_bertsSecret"  # tokens of the tests' users
ID = r"(?P<id>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Blob:
    """A file's content, and whether it was sent over LFS."""

    content: bytes
    lfs: bool = False

    @property
    def oid(self) -> str:
        """What git calls a regular file, what LFS calls a large one."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A whole state of a repository's files."""

    parent: str | None
    title: str
    files: dict[str, Blob]
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @property
    def oid(self) -> str:
        """A hash of the state and its history."""
        state = [self.parent, self.title, self.date, sorted((path, blob.oid) for path, blob in self.files.items())]
        return hashlib.sha1(json.dumps(state).encode()).hexdigest()


class Repository:
    """Commits, and the branches and tags that name them."""

    def __init__(self, private: bool):
        self.private, self.gated = private, False
        self.branches, self.tags, self.commits = {}, {}, {}
        self.add("main", Commit(None, "initial commit", {".gitattributes": Blob(GIT_ATTRIBUTES)}))

    def add(self, branch: str, commit: Commit) -> str:
        """Puts `commit` on top of `branch`; one assignment makes it visible."""
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit.oid

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a commit's id names."""
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        if found not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    @property
    def card(self) -> dict:
        """The metadata of main's README.md."""
        readme = self.commits[self.branches["main"]].files.get("README.md", Blob(b""))
        return metadata(readme.content.decode()) or {}

    @property
    def tags_of_card(self) -> list[str]:
        """What `list_models(filter=...)` looks at."""
        card = self.card
        tags, base, library = list(card.get("tags") or []), card.get("base_model"), card.get("library_name")
        for name in [base] if isinstance(base, str) else base or []:
            tags += [f"base_model:{name}"] + [f"base_model:adapter:{name}"] * (library == "peft")
        return list(dict.fromkeys([*tags, *([library] if library else [])]))


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        self.status, self.body = status, {"error": message}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class BreakOff(Exception):
    """The connection closes without an answer."""


class LocalHub:
    """The server. Everything it knows is in its attributes, for tests to look at and to change.

    users: {token: user name}; a user writes to the repositories below his name, unless the token is one of `readers`.
    lfs: weights come over LFS instead of inside the commit.
    """

    def __init__(self, users: dict[str, str], readers: tuple[str, ...] = (), lfs: bool = False, port: int = 0):
        self.users, self.readers, self.lfs = users, readers, lfs
        self.repositories: dict[str, Repository] = {}
        self.collections: dict[str, dict] = {}  # by the last part of their address
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self._broken: set[str] = set()
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def break_off_at(self, *stages: str):
        """Until called again, connections close at these: "lfs", "commit", "answer" (the commit made, not told),
        "collection"."""
        self._broken = set(stages)

    def reach(self, stage: str):
        """Raises BreakOff where `break_off_at` named `stage`."""
        if stage in self._broken:
            raise BreakOff

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(methods: str, path: str):
    """Registers a method of Handler for requests whose path matches; the groups are its arguments."""

    def register(function):
        ROUTES.extend((method, re.compile(path), function) for method in methods.split())
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Silent: tests look at `hub.requests`."""

    def _serve(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {url.path}")
        self.close_connection = True  # else a stopped hub would go on answering on connections kept alive
        try:
            self.body = self._read()
            answer = self._answer(url.path)
        except Refusal as refusal:
            answer = refusal.status, refusal.headers, refusal.body
        except BreakOff:
            return
        status, headers, content = answer if isinstance(answer, tuple) else (200, {}, answer)
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read(self) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length // 2)
        if self.command == "PUT":
            self.hub.reach("lfs")
        return body + self.rfile.read(length - len(body))

    def _answer(self, path: str):
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if match and method == self.command:
                with self.hub.lock:
                    return function(self, **{key: unquote(value) for key, value in match.groupdict().items() if value})
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def _json(self) -> dict:
        return json.loads(self.body)

    def _user(self) -> str | None:
        """Who asks, None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        self.may_write = token not in self.hub.readers
        return self.hub.users.get(token)

    def _repository(self, id: str, write: bool = False) -> Repository:
        """The repository, if whoever asks may see it (or write to it)."""
        user, repository = self._user(), self.hub.repositories.get(id)
        owner = id.split("/")[0]
        if repository is None or (repository.private and user != owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._check_right(user, owner)
        return repository

    def _check_right(self, user: str | None, owner: str):
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user != owner or not self.may_write:
            raise Refusal(403, f"You don't have the required permissions to write below {owner}.")

    @route("GET", "/api/whoami-v2")
    def _whoami(self):
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if self.may_write else "read"
        return {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"displayName": "t", "role": role}}}

    @route("POST", "/api/repos/create")
    def _create(self):
        asked, user = self._json(), self._user()
        owner = asked.get("organization") or user
        self._check_right(user, owner)
        id = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{id}", "name": id}
        if id in self.hub.repositories:
            return 409, {}, {**answer, "error": "You already created this model repo"}
        self.hub.repositories[id] = Repository(asked.get("visibility") == "private")
        return answer

    @route("DELETE", "/api/repos/delete")
    def _delete(self):
        asked = self._json()
        id = f"{asked.get('organization') or self._user()}/{asked['name']}"
        self._repository(id, write=True)
        del self.hub.repositories[id]
        return {}

    @route("POST", "/api/validate-yaml")
    def _validate(self):
        try:
            metadata(self._json()["content"])
        except yaml.YAMLError as error:
            return 400, {}, {"errors": [{"message": str(error)}], "warnings": []}
        return {"errors": [], "warnings": []}

    @route("POST", "/api/collections")
    def _create_collection(self):
        asked = self._json()
        title, owner = asked["title"], asked["namespace"]
        self._check_right(self._user(), owner)
        slug = f"{owner}/{re.sub(r'[^a-z0-9]+', '-', title.lower())}-{hashlib.sha1(title.encode()).hexdigest()[:24]}"
        if slug in self.hub.collections:
            return 409, {}, {"error": "You already have a collection of this title", "slug": slug}
        self.hub.collections[slug] = {
            "slug": slug, "title": title, "owner": owner, "private": asked["private"], "items": [], "position": 0,
            "theme": "green", "upvotes": 0, "lastUpdated": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        }  # fmt: skip
        return self.hub.collections[slug]

    @route("GET", rf"/api/collections/{ID}")
    def _collection(self, id):
        found, user = self.hub.collections.get(id), self._user()
        if found is None or (found["private"] and user != found["owner"]):
            raise Refusal(404, "Collection not found")
        return found

    @route("POST", rf"/api/collections/{ID}/items")
    def _add_item(self, id):
        self.hub.reach("collection")
        found, item = self._collection(id), self._json()["item"]
        self._check_right(self._user(), found["owner"])
        self._repository(item["id"])
        if item["id"] in [each["id"] for each in found["items"]]:
            raise Refusal(409, "The item is in the collection already")
        found["items"].append({**item, "_id": item["id"], "position": len(found["items"])})
        return found

    @route("POST", rf"/api/models/{ID}/preupload/(?P<revision>[^/]+)")
    def _preupload(self, id, revision):
        repository = self._repository(id, write=True)
        present = repository.commits[repository.resolve(revision)].files
        files = []
        for file in self._json()["files"]:
            mode = "lfs" if self.hub.lfs and file["path"].endswith(".safetensors") else "regular"
            oid = present[file["path"]].oid if file["path"] in present else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    @route("POST", rf"/{ID}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, id):
        self._repository(id, write=True)
        objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in self._json()["objects"]]
        for item in objects:
            if item["oid"] not in self.hub.large_files:
                url = f"{self.hub.url}/lfs/{item['oid']}"
                item["actions"] = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", r"/lfs/(?P<oid>\w+)")
    def _lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content does not match the oid")
        self.hub.large_files[oid] = self.body
        return {}

    @route("POST", r"/lfs/(?P<oid>\w+)/verify")
    def _lfs_verify(self, oid):
        if len(self.hub.large_files.get(oid, b"")) != self._json()["size"]:
            raise Refusal(404, "No such object")
        return {}

    @route("POST", rf"/api/models/{ID}/commit/(?P<revision>[^/]+)")
    def _commit(self, id, revision):
        self.hub.reach("commit")
        repository = self._repository(id, write=True)
        parent = repository.resolve(revision)
        if revision not in repository.branches:
            raise Refusal(400, f"{revision} is not a branch")
        header, *changes = (json.loads(line) for line in self.body.splitlines())
        if not parent.startswith(header["value"].get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[parent].files)
        for change in changes:  # of a copy, so that a change that is refused leaves nothing behind
            self._apply(files, change["key"], change["value"])
        oid = repository.add(revision, Commit(parent, header["value"]["summary"], files))
        self.hub.reach("answer")
        return {"commitUrl": f"{self.hub.url}/{id}/commit/{oid}", "commitOid": oid, "success": True}

    def _apply(self, files: dict[str, Blob], key: str, value: dict):
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"], validate=True))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large_files:
                raise Refusal(400, f"{path}: no LFS object {value['oid']}")
            files[path] = Blob(self.hub.large_files[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
            if not gone:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refusal(400, f"Unknown operation {key}")

    @route("GET", "/api/models")
    def _list(self):
        user, asked = self._user(), {name: values[0] for name, values in self.query.items()}
        found = []
        for id, repository in self.hub.repositories.items():
            owner = id.split("/")[0]
            if (
                (not repository.private or user == owner)
                and asked.get("author") in (None, owner)
                and asked.get("search", "").lower() in id.lower()
                and set(self.query.get("filter", ())) <= set(repository.tags_of_card)
            ):
                found.append(self._describe(id, repository, repository.branches["main"]))
        return found[: int(asked.get("limit", len(found)))]

    @route("GET", rf"/api/models/{ID}(/revision/(?P<revision>[^/]+))?")
    def _info(self, id, revision="main"):
        repository = self._repository(id)
        return self._describe(id, repository, repository.resolve(revision))

    def _describe(self, id: str, repository: Repository, oid: str) -> dict:
        files = repository.commits[oid].files
        return {
            "_id": id,
            "id": id,
            "modelId": id,
            "author": id.split("/")[0],
            "sha": oid,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "downloads": 0,
            "likes": 0,
            "tags": repository.tags_of_card,
            "library_name": repository.card.get("library_name"),
            "cardData": repository.card,
            "lastModified": repository.commits[oid].date,
            "siblings": [
                {"rfilename": path, "size": len(blob.content), "blobId": blob.oid} for path, blob in files.items()
            ],
        }

    @route("GET", rf"/api/models/{ID}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?")
    def _tree(self, id, revision, path=""):
        repository = self._repository(id)
        oid = repository.resolve(revision)
        start = f"{path}/" if path else ""
        found = {name: blob for name, blob in repository.commits[oid].files.items() if name.startswith(start)}
        if not found:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound", **{"X-Repo-Commit": oid})
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            found = {name: blob for name, blob in found.items() if "/" not in name.removeprefix(start)}
        rows = []
        for name, blob in found.items():
            rows.append({"type": "file", "path": name, "size": len(blob.content), "oid": blob.oid})
            if blob.lfs:
                rows[-1]["lfs"] = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 130}
        return rows

    @route("GET", rf"/api/models/{ID}/refs")
    def _refs(self, id):
        repository = self._repository(id)
        return {"converts": []} | {
            kind: [{"name": name, "ref": f"refs/{git}/{name}", "targetCommit": oid} for name, oid in names.items()]
            for kind, git, names in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
        }

    @route("POST DELETE", rf"/api/models/{ID}/branch/(?P<name>[^/]+)")
    def _branch(self, id, name):
        repository = self._repository(id, write=True)
        if self.command == "DELETE":
            return self._forget(repository.branches, name)
        start = self._json().get("startingPoint", "main") if self.body else "main"
        return self._remember(repository.branches, name, repository.resolve(start))

    @route("POST DELETE", rf"/api/models/{ID}/tag/(?P<revision>[^/]+)")
    def _tag(self, id, revision):
        repository = self._repository(id, write=True)
        if self.command == "DELETE":
            return self._forget(repository.tags, revision)
        return self._remember(repository.tags, self._json()["tag"], repository.resolve(revision))

    def _remember(self, names: dict[str, str], name: str, oid: str) -> dict:
        if name in names:
            raise Refusal(409, f"Reference {name} already exists")
        names[name] = oid
        return {}

    def _forget(self, names: dict[str, str], name: str) -> dict:
        if names.pop(name, None) is None:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return {}

    @route("GET HEAD", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, id, revision, path):
        repository = self._repository(id)
        if repository.gated and self._user() != id.split("/")[0]:
            raise Refusal(403, f"Access to model {id} is restricted.", "GatedRepo")
        oid = repository.resolve(revision)
        blob = repository.commits[oid].files.get(path)
        headers = {"X-Repo-Commit": oid}
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        headers |= {"ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, headers, blob.content
        start, size = int(asked[1]), len(blob.content)
        end = min(int(asked[2] or size - 1), size - 1)
        if start > end:
            raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
        return 206, headers | {"Content-Range": f"bytes {start}-{end}/{size}"}, blob.content[start : end + 1]


def metadata(readme: str) -> dict | None:
    """The YAML between the two `---` of a card."""
    match = re.match(r"\s*---[ ]*\r?\n(.*?)\r?\n---[ ]*(\r?\n|$)", readme, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def main():
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(description="A Hub for one user on this machine.")
    parser.add_argument("--port", type=int, default=0, help="0: any free one [0]")
    parser.add_argument("--token", required=True)
    parser.add_argument("--user", required=True)
    arguments = parser.parse_args()
    with LocalHub({arguments.token: arguments.user}, port=arguments.port) as hub:
        print(hub.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            sys.exit(0)


if __name__ == "__main__":
    main()
