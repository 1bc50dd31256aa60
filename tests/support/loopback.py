"""A server of JSON in a thread of this process."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def serving_json(get, post):
    """Its URL.

    Args:
        get: Answers a GET: HTTP's code and an object.
        post: The same from a POST's path and its object; None closes the connection.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.say(*get())

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = post(self.path, asked)
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
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
