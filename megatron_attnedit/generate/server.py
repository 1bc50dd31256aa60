"""Completions by a running server with OpenAI's chat interface."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_attnedit.data.bad_rows import BadRow
from megatron_attnedit.errors import UserError
from megatron_attnedit.generate.completions import Completion, Task
from megatron_attnedit.generate.settings import Sampling
from megatron_attnedit.servers import Refused, call, find_model

TIMEOUT_S = 3600
# Seconds between attempts, where a server is busy or is started again.
WAITS_S = (1, 2, 4, 8, 16, 30)
BUSY = (408, 429, 500, 502, 503, 504)


@dataclass
class ChatServer:
    """A model behind ``/v1/chat/completions``; the chat template is the server's.

    Attributes:
        url: Up to and with ``/v1``.
        name: The server's name of the model.
        sampling: How it draws.
        concurrency: Requests at a time.
        waits_s: Seconds between attempts.
    """

    url: str
    name: str
    sampling: Sampling
    concurrency: int
    waits_s: tuple[float, ...] = WAITS_S

    def describe(self) -> dict[str, Any]:
        """The name that the server has for the model."""
        return {"through": "server", "model": self.name}

    def complete(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Completion | BadRow]]:
        """See ``completions.Model``.

        Raises:
            UserError: the server does not answer any more.
        """
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            # In the order of the tasks; so many are under way that a long answer stops nobody.
            pending: deque[tuple[Task, Future[Completion | BadRow]]] = deque()
            for task in tasks:
                pending.append((task, pool.submit(self._ask, task)))
                if len(pending) >= 4 * self.concurrency:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, task: Task) -> Completion | BadRow:
        for wait_s in (*self.waits_s, None):
            try:
                answer = call(f"{self.url}/chat/completions", TIMEOUT_S, self._body(task))
                return _completion(answer)
            except Refused as error:
                if error.code not in BUSY:  # this prompt's fault: too long, an unknown variable
                    where = task.prompt.where
                    return BadRow(f"{where}: {error}", "refused by the server")
                if wait_s is None:
                    raise
            except (KeyError, IndexError, TypeError, AttributeError):
                raise UserError(
                    f"--server {self.url}: its answer is not that of OpenAI's chat interface"
                ) from None
            except UserError:
                if wait_s is None:
                    raise
            time.sleep(wait_s)
        raise AssertionError

    def _body(self, task: Task) -> dict[str, Any]:
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": self.name,
            "messages": task.prompt.messages,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": task.seed,
        }
        # Of vLLM and SGLang, not of OpenAI: only sent if asked for.
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if variables := sampling.variables():
            body["chat_template_kwargs"] = variables
        if task.prompt.tools:
            body["tools"] = task.prompt.tools
        return body


def _completion(answer: Any) -> Completion:
    choice = answer["choices"][0]
    given = choice["message"]
    message: dict[str, Any] = {"role": "assistant", "content": given.get("content") or ""}
    if thinking := given.get("reasoning_content") or given.get("reasoning"):
        message["reasoning_content"] = thinking
    if given.get("tool_calls"):
        message["tool_calls"] = given["tool_calls"]
    return Completion(message, str(choice.get("finish_reason") or "stop"))


def reach(url: str, name: str | None, sampling: Sampling, concurrency: int) -> ChatServer:
    """A running server.

    Args:
        url: With or without ``/v1``.
        name: Of the model; None: the first that it has.
        sampling: How it draws.
        concurrency: Requests at a time.

    Raises:
        UserError: nobody answers, or it is no such server.
    """
    base, model = find_model(url)
    return ChatServer(base, name or model["id"], sampling, concurrency)
