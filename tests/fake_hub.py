"""An endpoint that speaks as much of the Hub's HTTP interface as its client needs to make, fill and read a model.

It keeps what it is sent in memory. What it refuses, it refuses with the Hub's own codes.
"""

import base64
import hashlib
import json
import socket
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_right"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    @property
    def hub(self):
        return self.server.hub

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, content=b"", code=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refused(self):
        """Whether the request was answered already: no token, or one that may not do that."""
        self.hub.requests.append((self.command, urlsplit(self.path).path))
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        self.answer({"error": "Invalid credentials"}, 401)
        return True

    def do_POST(self):
        content, parts = self.body(), urlsplit(self.path).path.strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            self.validate(json.loads(content)["content"])
        elif self.refused():
            return
        elif parts == ["api", "repos", "create"]:
            self.create(json.loads(content))
        elif parts[0] == "api" and parts[4:5] == ["preupload"]:
            asked = json.loads(content)["files"]
            modes = [{"path": f["path"], "uploadMode": self.mode(f["path"]), "shouldIgnore": False} for f in asked]
            self.answer({"files": modes})
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            self.answer({"transfer": "basic", "objects": [self.action(one) for one in json.loads(content)["objects"]]})
        elif parts[0] == "api" and parts[4:5] == ["commit"]:
            self.commit("/".join(parts[2:4]), [json.loads(line) for line in content.splitlines()])
        else:
            self.answer({"error": "no such call"}, 404)

    def validate(self, card):
        """What the Hub says of a card: metadata that do not read, or values that it does not have."""
        data = yaml.safe_load(card.split("---")[1])
        known = data.get("base_model_relation") in (None, "finetune", "adapter", "merge", "quantized")
        errors = [] if known else [{"message": "base_model_relation is unknown"}]
        self.answer({"errors": errors, "warnings": []}, 200 if known else 400)

    def mode(self, path):
        return "lfs" if path.endswith((".safetensors", ".png")) else "regular"

    def action(self, wanted):
        place = {"href": f"{self.hub.url}/objects/{wanted['oid']}", "header": {}}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": place}}

    def create(self, wanted):
        repo = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        if wanted.get("organization") not in (None, self.hub.user):
            self.answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
        elif repo in self.hub.private:
            self.answer({"url": f"{self.hub.url}/{repo}", "error": "exists"}, 409)
        else:
            self.hub.private[repo] = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.answer({"url": f"{self.hub.url}/{repo}"})

    def commit(self, repo, lines):
        if self.hub.refuses is not None:
            code, why = self.hub.refuses
            if code is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self.answer({"error": why}, code)
            return
        assert lines[0]["key"] == "header"
        found = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.files[repo].update(found)
        self.hub.commits[repo].append(lines[0]["value"]["summary"])
        self.answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{self.hub.sha}", "commitOid": self.hub.sha})

    def do_PUT(self):
        content = self.body()
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer()

    def do_GET(self):
        if self.refused():
            return
        parts = urlsplit(self.path).path.strip("/").split("/")
        repo = "/".join(parts[:2]) if parts[0] != "api" else "/".join(parts[2:4])
        if parts[:2] == ["api", "whoami-v2"]:
            self.answer({"name": self.hub.user, "type": "user", "auth": {"accessToken": {"role": "write"}}})
        elif repo not in self.hub.files:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif parts[0] == "api" and parts[4:5] == ["tree"]:
            self.answer([self.entry(name, file) for name, file in self.hub.files[repo].items()])
        elif parts[0] == "api":
            siblings = [{"rfilename": name} for name in self.hub.files[repo]]
            self.answer({"id": repo, "sha": self.hub.sha, "private": self.hub.private[repo], "siblings": siblings})
        elif parts[2] == "resolve":
            self.resolve(repo, unquote("/".join(parts[4:])))
        else:
            self.answer({"error": "no such call"}, 404)

    do_HEAD = do_GET

    def entry(self, name, content):
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def resolve(self, repo, name):
        content = self.hub.files[repo].get(name)
        if content is None:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.hub.sha)
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(content, ETag=etag, X_Repo_Commit=self.hub.sha, Content_Type="application/octet-stream")


class FakeHub:
    """A running endpoint; what it was sent stands in `files`, `private`, `commits` and `requests`."""

    def __init__(self, user="me"):
        self.user, self.sha = user, "0123456789abcdef0123456789abcdef01234567"
        self.files, self.commits = defaultdict(dict), defaultdict(list)
        self.private, self.objects, self.requests = {}, {}, []
        # A code and a reason with which commits are refused; with None as the code, the connection ends.
        self.refuses = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
