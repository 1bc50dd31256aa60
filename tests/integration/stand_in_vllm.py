"""Stands in for vLLM's server: one of two paths, or a failure, by the model's config.json."""

import json
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REFUSAL = "ValueError: Head dimension 204 is not supported by MLA."

KIND: list[str] = []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer({} if self.path == "/health" else None)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if KIND == ["dies"]:
            print(f"ERROR {REFUSAL}\r\nEngineDeadError: EngineCore died.", flush=True)
            os._exit(1)
        assert asked["model"] == "student" and asked["temperature"] == 0
        choice = {"text": f" answers {asked['prompt']!r}"}
        usage = {"completion_tokens": asked["max_tokens"]}
        self.answer({"choices": [choice], "usage": usage})

    def answer(self, body: object) -> None:
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    assert sys.argv[1:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    folder, flags = Path(sys.argv[4]), sys.argv[5:]
    kind = json.loads((folder / "config.json").read_text())["stand_in"]
    KIND.append(kind)
    # A process of its own, as the engine has one; both are to be gone in the end.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    seen = {"pids": [os.getpid(), child.pid], "flags": flags}
    (folder / "seen.json").write_text(json.dumps(seen))
    if kind == "stays":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if kind == "refuses":
        print(f"(EngineCore pid=1) ERROR {REFUSAL}\nTraceback (most recent call last):")
        print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
        sys.exit(1)
    print("INFO GPU KV cache size: 43,690 tokens, Maximum concurrency 10.67x", flush=True)
    if kind == "waits":
        child.wait()
    address = flags[flags.index("--host") + 1], int(flags[flags.index("--port") + 1])
    ThreadingHTTPServer(address, Handler).serve_forever()


if __name__ == "__main__":
    main()
