"""Stands in for the Hugging Face Hub on loopback: repositories, small files, large files."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What was uploaded, by repository and file; ``refuse`` answers 403 to what is created."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str | None] = set()
        self.large: dict[str, bytes] = {}
        self.refuse = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.get(self)

            def do_POST(self) -> None:
                hub.post(self, self.body())

            def do_PUT(self) -> None:
                hub.large[self.path.rpartition("/")[2]] = self.body()
                answer(self, {})

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def get(self, request: BaseHTTPRequestHandler) -> None:
        repo = "/".join(request.path.removeprefix("/api/models/").split("/")[:2])
        if repo not in self.files:
            return answer(request, {"error": "not found"}, 404)
        answer(request, {"id": repo, "siblings": [], "sha": "0" * 40, "tags": []})

    def post(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        self.tokens.add(request.headers.get("Authorization"))
        path = request.path
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if self.refuse:
                return answer(request, {"error": "you may not"}, 403)
            # By version of huggingface_hub.
            self.private[repo] = asked.get("private") or asked.get("visibility") == "private"
            self.files[repo] = {}
            answer(request, {"url": f"{self.url}/{repo}"})
        elif "/preupload/" in path:
            asked = json.loads(body)["files"]
            answer(request, {"files": [
                {
                    "path": f["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                }
                for f in asked
            ]})  # fmt: skip
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"], "size": o["size"],
                    "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}", "header": {}}},
                }
                for o in json.loads(body)["objects"]
            ]  # fmt: skip
            answer(request, {"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[repo][value["path"]] = self.large[value["oid"]]
            answer(request, {
                "success": True, "commitOid": "1" * 40, "commitUrl": f"{self.url}/{repo}/commit/1",
                "hookOutput": "",
            })  # fmt: skip
        else:
            answer(request, {"valid": True, "message": "", "warnings": [], "errors": []})


def answer(request: BaseHTTPRequestHandler, body: object, status: int = 200) -> None:
    text = json.dumps(body).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(text)))
    request.end_headers()
    request.wfile.write(text)
