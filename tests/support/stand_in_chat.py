"""OpenAI's chat interface in a thread of this process: answers that prompt and seed decide."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def echo(asked):
    """An answer that names its prompt and its seed."""
    return f"{asked['messages'][-1]['content']} {asked['seed'] % 1000}"


class StandIn:
    """What the server does; tests change it while it runs.

    Attributes:
        asked: Bodies of all requests.
        answer: From a body to a text, to a choice, or to a number: HTTP's code of an error.
        until: Requests after which it closes every connection without an answer.
    """

    def __init__(self, answer=echo, until=None):
        self.asked, self.answer, self.until, self.url = [], answer, until, ""
        self._lock = threading.Lock()

    def respond(self, asked):
        with self._lock:
            self.asked.append(asked)
            if self.until is not None and len(self.asked) > self.until:
                return None
        found = self.answer(asked)
        if isinstance(found, int):
            return found, {"error": {"message": f"the {found} of a test"}}
        if isinstance(found, str):
            found = {"message": {"role": "assistant", "content": found}, "finish_reason": "stop"}
        return 200, {"choices": [{"index": 0, **found}]}


@contextlib.contextmanager
def chatting(stand_in):
    """Serve; ``stand_in.url`` is its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.say(200, {"data": [{"id": "teacher", "max_model_len": 2048}]})

        def do_POST(self):
            assert self.path == "/v1/chat/completions"
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = stand_in.respond(asked)
            if found:
                self.say(*found)

        def say(self, code, answer):
            body = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stand_in
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
