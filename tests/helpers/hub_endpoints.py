"""What the loopback Hub answers, endpoint by endpoint."""

import base64
import fnmatch
import hashlib
import json
import re
import shutil
import uuid
from urllib.parse import parse_qs

import hub_card_rules
from hub_store import Repository, now, sizes
from hub_wire import BLOCK, Handler, Refused, route

REPO = "(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)"
PLACE = "(?:(?P<kind>dataset|space)s/)?(?P<name>[^/]+/[^/]+)"


class Endpoints(Handler):
    def may_write(self, namespace: str) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if self.user["role"] != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        if not self.owns(namespace):
            raise Refused(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    def repository(self, kind: str | None, name: str, write: bool = False, content: bool = False) -> Repository:
        repository, owned = self.hub.repository(name, kind or "model"), self.owns(name.split("/")[0])
        if not repository.folder.is_dir() or (repository.state["private"] and not owned):
            if self.user is None:
                raise Refused(401, "Invalid username or password.", "RepoNotFound")  # so a client takes it on https
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(name.split("/")[0])
        if content and repository.state["gated"] and not owned:
            words = f"Access to {kind or 'model'} {name} is restricted"
            raise Refused(403 if self.user else 401, f"{words} and you are not in the authorized list.", "GatedRepo")
        return repository

    # Accounts, repositories, their description

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": org, "roleInOrg": "admin"} for org in self.user["orgs"]]
        token = {"displayName": "test", "role": self.user["role"], "createdAt": now()}
        auth = {"type": "access_token", "accessToken": token}
        self.answer({"type": "user", "name": self.user["name"], "fullname": "A. User", "orgs": orgs, "auth": auth})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        asked = self.json()
        errors, warnings = hub_card_rules.check(asked["content"], asked.get("repoType") or "model")
        status = 400 if errors else 200
        if "text/plain" in self.headers.get("Accept", ""):
            lines = [*(f"- Error: {error}" for error in errors), *(f"- Warning: {warning}" for warning in warnings)]
            return self.answer("\n".join(lines).encode(), status, **{"Content-Type": "text/plain"})
        said = {"errors": [{"message": error} for error in errors]}
        self.answer({**said, "warnings": [{"message": warning} for warning in warnings]}, status)

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        asked = self.json()
        namespace = asked.get("organization") or (self.user or {}).get("name")
        self.may_write(namespace)
        kind, name = asked.get("type") or "model", f"{namespace}/{asked['name']}"
        place = {"url": self.hub.url + self.hub.web(name, kind), "name": name, "id": name}
        with self.hub.lock:
            if self.hub.repository(name, kind).folder.is_dir():
                words = f"You already created this {kind} repo: {name}"
                return self.answer({"error": words, **place}, 409, **{"X-Error-Message": words})
            self.hub.create(name, kind, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.answer(place)

    @route("DELETE", "/api/repos/delete")
    def delete(self) -> None:
        asked = self.json()
        name = f"{asked.get('organization') or (self.user or {}).get('name')}/{asked['name']}"
        shutil.rmtree(self.repository(asked.get("type"), name, write=True).folder)
        self.answer({})

    @route("PUT", f"/api/{REPO}/settings")
    def settings(self, kind: str, name: str) -> None:
        repository, asked = self.repository(kind, name, write=True), self.json()
        with self.hub.lock:
            state = repository.state
            state["gated"] = asked.get("gated", state["gated"])
            state["private"] = asked.get("visibility", "private" if state["private"] else "public") == "private"
            repository.save(state)
        self.answer({"private": state["private"], "gated": state["gated"]})

    @route("GET", f"/api/{REPO}/auth-check(?P<write>/write)?")
    def auth_check(self, kind: str, name: str, write: str | None) -> None:
        self.repository(kind, name, write=bool(write), content=True)
        self.answer({})

    @route("GET", f"/api/{REPO}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, kind: str, name: str, revision: str | None) -> None:
        repository = self.repository(kind, name)
        sha, state = repository.resolve(revision or "main"), repository.state
        commit, siblings, card = repository.commit(sha), [], {}
        for path, entry in sorted(commit["files"].items()):
            siblings.append({"rfilename": path})
            if "blobs" in self.query:
                siblings[-1].update(size=entry["size"], blobId=entry["oid"])
                if entry["lfs"]:
                    siblings[-1]["lfs"] = {"sha256": entry["lfs"], **sizes(entry)}
        if "README.md" in commit["files"]:
            card = hub_card_rules.metadata(repository.object(commit["files"]["README.md"]["oid"]).read_text()) or {}
        bases = card.get("base_model") or []
        bases = bases if isinstance(bases, list) else [bases]
        tags = [*filter(None, [card.get("library_name")]), *(card.get("tags") or [])]
        tags += [f"base_model:{base}" for base in bases]
        tags += [f"base_model:{card['base_model_relation']}:{b}" for b in bases if "base_model_relation" in card]
        tags += [f"license:{card['license']}"] if "license" in card else []
        about = {
            "_id": hashlib.sha1(name.encode()).hexdigest()[:24],
            **{"id": name, "modelId": name, "author": name.split("/")[0], "sha": sha},
            **{"private": state["private"], "gated": state["gated"], "disabled": False, "downloads": 0, "likes": 0},
            **{"lastModified": commit["date"], "createdAt": state["created"], "tags": tags, "cardData": card},
            **{key: card[key] for key in ("pipeline_tag", "library_name", "model-index") if key in card},
            **{"siblings": siblings, "usedStorage": sum(p.stat().st_size for p in repository.folder.glob("objects/*"))},
        }
        expand = self.query.get("expand")
        self.answer({key: about.get(key) for key in ("_id", "id", *expand)} if expand else about)

    @route("GET", f"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<under>.+))?")
    def tree(self, kind: str, name: str, revision: str, under: str | None) -> None:
        repository = self.repository(kind, name)
        sha = repository.resolve(revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        listing = repository.listing(sha, under or "", recursive)
        if under and not listing:
            raise Refused(404, f"{under} does not exist on {revision!r}", "EntryNotFound")
        self.page(listing, self.hub.page_size)

    @route("POST", f"/api/{REPO}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind: str, name: str, revision: str) -> None:
        repository, asked = self.repository(kind, name), self.body().decode()
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(asked)["paths"]
        else:
            paths = parse_qs(asked).get("paths", [])
        self.answer([entry for entry in repository.listing(repository.resolve(revision)) if entry["path"] in paths])

    # References

    @route("GET", f"/api/{REPO}/refs")
    def refs(self, kind: str, name: str) -> None:
        state, answer = self.repository(kind, name).state, {"converts": [], "pullRequests": []}
        for refs, place in (("branches", "heads"), ("tags", "tags")):
            answer[refs] = [
                {"name": ref, "ref": f"refs/{place}/{ref}", "targetCommit": sha} for ref, sha in state[refs].items()
            ]
        self.answer(answer)

    @route("POST", f"/api/{REPO}/(?P<refs>tag|branch)/(?P<ref>[^/]+)")
    def add_ref(self, kind: str, name: str, refs: str, ref: str) -> None:
        """`tag/REVISION` has the tag's name in the body, `branch/NAME` the revision."""
        repository, asked = self.repository(kind, name, write=True), self.json()
        new, revision = (asked["tag"], ref) if refs == "tag" else (ref, asked.get("startingPoint") or "main")
        sha, kept = repository.resolve(revision), "tags" if refs == "tag" else "branches"
        with self.hub.lock:
            state = repository.state
            if new in state[kept]:
                raise Refused(409, f"Tag reference exists already: {new}" if refs == "tag" else f"{new} exists already")
            state[kept][new] = sha
            repository.save(state)
        self.answer({"name": new, "ref": new, "targetCommit": sha})

    @route("DELETE", f"/api/{REPO}/(?P<refs>tag|branch)/(?P<ref>[^/]+)")
    def delete_ref(self, kind: str, name: str, refs: str, ref: str) -> None:
        repository = self.repository(kind, name, write=True)
        with self.hub.lock:
            state = repository.state
            if state["tags" if refs == "tag" else "branches"].pop(ref, None) is None or ref == "main":
                raise Refused(404, f"Invalid rev id: {ref}", "RevisionNotFound")
            repository.save(state)
        self.answer({})

    @route("GET", f"/api/{REPO}/commits/(?P<revision>[^/]+)")
    def commits(self, kind: str, name: str, revision: str) -> None:
        repository, commits = self.repository(kind, name), []
        sha = repository.resolve(revision)
        while sha:
            commit = repository.commit(sha)
            what = {key: commit[key] for key in ("title", "message", "date")}
            commits.append({"id": sha, "authors": [{"user": commit["author"]}], **what})
            sha = commit["parent"]
        self.page(commits, self.hub.page_size)

    # Upload

    @route("POST", f"/api/{REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind: str, name: str, revision: str) -> None:
        repository, asked = self.repository(kind, name, write=True), self.json()
        files = repository.commit(repository.resolve(revision))["files"]
        ignored = asked.get("gitIgnore")
        if ignored is None and ".gitignore" in files:
            ignored = repository.object(files[".gitignore"]["oid"]).read_text()
        rules = [line.strip().strip("/") for line in (ignored or "").splitlines() if line.strip(" \n#")]
        answer = []
        for file in asked["files"]:
            path, there = file["path"], files.get(file["path"])
            mode = "lfs" if self.hub.is_lfs(path, file["size"], base64.b64decode(file["sample"])) else "regular"
            skip = any(fnmatch.fnmatch(part, rule) for rule in rules for part in (path, *path.split("/")))
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": skip})
            if there:
                answer[-1]["oid"] = there["lfs"] or there["oid"]
        self.answer({"files": answer, "commitOid": repository.resolve(revision)})

    @route("POST", rf"/{PLACE}\.git/info/lfs/objects/batch")
    def batch(self, kind: str | None, name: str) -> None:
        repository, asked, objects = self.repository(kind, name, write=True), self.json(), []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            objects.append({"oid": oid, "size": size, "authenticated": True})
            if repository.object(oid).is_file():
                continue
            place = f"/storage/{kind or 'model'}s/{name}/{oid}"
            header, href = {}, f"{self.hub.storage_url}{place}"
            if size > self.hub.part_size and "multipart" in asked["transfers"]:
                count = -(-size // self.hub.part_size)
                header = {f"{part}": f"{self.hub.storage_url}{place}/{part}" for part in range(1, count + 1)}
                header["chunk_size"] = str(self.hub.part_size)
                href = f"{self.hub.url}/api/complete-multipart{place}"
            verify = {"href": f"{self.hub.url}{self.hub.web(name, kind or 'model')}.git/info/lfs/verify"}
            objects[-1]["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
        self.answer({"transfer": "multipart", "objects": objects}, **{"Content-Type": "application/vnd.git-lfs+json"})

    @route("PUT", f"/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})(?:/(?P<part>[0-9]+))?")
    def upload(self, kind: str, name: str, oid: str, part: str | None) -> None:
        """A whole object, or a part of one: kept if all of it arrives."""
        repository = self.hub.repository(name, kind)
        if not repository.folder.is_dir():
            raise Refused(403, "AccessDenied")
        if part:
            etag = repository.receive(repository.folder / "parts" / oid / part, self.blocks())
        else:
            etag = repository.receive(repository.object(oid), self.blocks(), oid)
        self.answer(ETag=f'"{etag}"')

    @route("POST", f"/api/complete-multipart/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})")
    def complete(self, kind: str, name: str, oid: str) -> None:
        repository, parts = self.hub.repository(name, kind), self.json()["parts"]
        folder = repository.folder / "parts" / oid

        def whole():
            for number, part in enumerate(parts, start=1):
                with open(folder / str(number), "rb") as file:
                    if part != {"partNumber": number, "etag": f'"{hashlib.file_digest(file, "sha256").hexdigest()}"'}:
                        raise Refused(400, f"InvalidPart: {part}")
                    file.seek(0)
                    while block := file.read(BLOCK):
                        yield block

        repository.receive(repository.object(oid), whole(), oid)
        shutil.rmtree(folder)
        self.answer({"success": True})

    @route("POST", rf"/{PLACE}\.git/info/lfs/verify")
    def verify(self, kind: str | None, name: str) -> None:
        repository, asked = self.repository(kind, name, write=True), self.json()
        if repository.stored(asked["oid"])["size"] != asked["size"]:
            raise Refused(422, f"{asked['oid']} has not {asked['size']} bytes")
        self.answer({})

    @route("POST", f"/api/{REPO}/commit/(?P<revision>[^/]+)")
    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name, write=True)
        lines = [json.loads(line) for line in self.body().splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            if revision not in repository.state["branches"] or "create_pr" in self.query:
                raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = repository.resolve(revision)
            if header.get("parentCommit") and not head.startswith(header["parentCommit"]):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repository.commit(head)["files"])
            for line in lines:
                self.apply(line["key"], line["value"], files, repository)
            sha = repository.add_commit(revision, files, header["summary"], header["description"], self.user["name"])
        url = f"{self.hub.url}{self.hub.web(name, kind)}/commit/{sha}"
        self.answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def apply(self, key: str, value: dict, files: dict, repository: Repository) -> None:
        """One line of a commit."""
        path = value.get("path", "").rstrip("/")
        if key == "file":
            content = base64.b64decode(value["content"])
            if len(content) > self.hub.lfs_from:
                raise Refused(400, f"{path} has {len(content)} bytes: files larger than that are for LFS")
            if path == "README.md" and (errors := hub_card_rules.check(content.decode(errors="replace"))[0]):
                raise Refused(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
            files[path] = repository.store(content)
        elif key == "lfsFile":
            files[path] = repository.stored(value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            gone = [file for file in files if file == path or (key[7:] == "Folder" and file.startswith(f"{path}/"))]
            if not gone:
                raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for file in gone:
                del files[file]

    # Download

    @route("GET", f"/{PLACE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        repository = self.repository(kind, name, content=True)
        sha = repository.resolve(revision)
        entry, headers = repository.commit(sha)["files"].get(path), {"X-Repo-Commit": sha}
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **headers)
        if entry["lfs"] is None:
            headers |= {"ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
            return self.answer(repository.object(entry["oid"]), **headers)
        headers |= {"X-Linked-Size": str(entry["size"]), "X-Linked-ETag": f'"{entry["lfs"]}"'}
        headers["Location"] = f"{self.hub.storage_url}/storage/{kind or 'model'}s/{name}/{entry['lfs']}"
        self.answer(b"", 302, **headers)

    @route("GET", f"/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})")
    def stored(self, kind: str, name: str, oid: str) -> None:
        file = self.hub.repository(name, kind).object(oid)
        if not file.is_file():
            raise Refused(403, "AccessDenied")
        self.answer(file, **{"ETag": f'"{oid[:32]}"', "Accept-Ranges": "bytes"})

    # Collections

    def collection(self, slug: str, write: bool = False) -> dict:
        found = self.hub.collections.get(slug)
        if found is None or (found["private"] and not self.owns(found["owner"]["name"])):
            raise Refused(404 if self.user else 401, "Collection not found")
        if write:
            self.may_write(found["owner"]["name"])
        return found

    @route("GET", "/api/collections")
    def list_collections(self) -> None:
        owners = self.query.get("owner")
        found = [c for c in self.hub.collections.values() if not owners or c["owner"]["name"] in owners]
        found = [c for c in found if not c["private"] or self.owns(c["owner"]["name"])]
        left_out = ("items", "position")  # a list has the first four items of a collection
        shown = [{**{k: v for k, v in c.items() if k not in left_out}, "items": c["items"][:4]} for c in found]
        self.page(shown, self.hub.page_size)

    @route("POST", "/api/collections")
    def create_collection(self) -> None:
        asked = self.json()
        self.may_write(asked["namespace"])
        for key, most in (("title", 60), ("description", 150)):
            if len(asked.get(key, "")) > most:
                raise Refused(400, f"Too big: expected string to have <{most} characters at {key}")
        words = re.sub("[^a-z0-9]+", "-", asked["title"].lower()).strip("-")
        with self.hub.lock:
            for slug, other in self.hub.collections.items():
                if (other["owner"]["name"], other["title"]) == (asked["namespace"], asked["title"]):
                    return self.answer({"error": f"This collection already exists: {slug}", "slug": slug}, 409)
            slug = f"{asked['namespace']}/{words}-{uuid.uuid4().hex[:24]}"
            made = {"slug": slug, "title": asked["title"], "description": asked.get("description")}
            made |= {"owner": {"type": "user", "name": asked["namespace"]}, "private": bool(asked.get("private"))}
            made |= {"items": [], "position": 0, "theme": "orange", "upvotes": 0, "lastUpdated": now()}
            self.hub.save_collections({**self.hub.collections, slug: made})
        self.answer(made)

    @route("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def get_collection(self, slug: str) -> None:
        self.answer(self.collection(slug))

    @route("PATCH", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def update_collection(self, slug: str) -> None:
        changed = {**self.collection(slug, write=True), **self.json(), "lastUpdated": now()}
        with self.hub.lock:
            self.hub.save_collections({**self.hub.collections, slug: changed})
        self.answer({"success": True, "data": changed})

    @route("DELETE", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def delete_collection(self, slug: str) -> None:
        self.collection(slug, write=True)
        with self.hub.lock:
            self.hub.save_collections({key: value for key, value in self.hub.collections.items() if key != slug})
        self.answer({})

    @route("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items")
    def add_item(self, slug: str) -> None:
        asked = self.json()
        item, note = asked["item"], asked.get("note")
        if item["type"] in ("model", "dataset", "space"):
            self.repository(item["type"], item["id"])
        with self.hub.lock:
            changed = self.collection(slug, write=True)
            if any((old["id"], old["type"]) == (item["id"], item["type"]) for old in changed["items"]):
                raise Refused(409, f"{item['id']} is already in the collection")
            new = {"_id": uuid.uuid4().hex[:24], **item, "position": len(changed["items"])}
            changed["items"].append(new | ({"note": {"text": note, "html": note}} if note else {}))
            changed["lastUpdated"] = now()
            self.hub.save_collections({**self.hub.collections, slug: changed})
        self.answer(changed)

    @route("PATCH", "/api/collections/(?P<slug>[^/]+/[^/]+)/items/(?P<item>[^/]+)")
    @route("DELETE", "/api/collections/(?P<slug>[^/]+/[^/]+)/items/(?P<item>[^/]+)")
    def change_item(self, slug: str, item: str) -> None:
        asked = self.json()
        with self.hub.lock:
            changed = self.collection(slug, write=True)
            there = {old["_id"]: old for old in changed["items"]}
            if item not in there:
                raise Refused(404, f"{item} is not in the collection")
            if self.command == "DELETE":
                changed["items"].remove(there[item])
            elif "note" in asked:
                there[item]["note"] = {"text": asked["note"], "html": asked["note"]}
            if "position" in asked:
                changed["items"].remove(there[item])
                changed["items"].insert(asked["position"], there[item])
            for position, other in enumerate(changed["items"]):
                other["position"] = position
            self.hub.save_collections({**self.hub.collections, slug: changed})
        self.answer({"success": True})
