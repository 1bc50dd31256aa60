"""OpenAI's chat interface in a thread of this process: answers that prompt and seed decide."""

import contextlib
import threading

from tests.support.loopback import serving_json


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

    def post(path, asked):
        assert path == "/v1/chat/completions"
        return stand_in.respond(asked)

    models = {"data": [{"id": "teacher", "max_model_len": 2048}]}
    with serving_json(lambda: (200, models), post) as stand_in.url:
        yield stand_in
