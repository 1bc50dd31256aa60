"""Calls to a running server with OpenAI's interface, such as vLLM's."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

from megatron_attnedit.errors import UserError, one_line

REACHED_S = 10


class Refused(UserError):
    """A server's answer that is an error.

    Args:
        message: One line.
        code: Of HTTP.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def find_model(url: str) -> tuple[str, dict[str, Any]]:
    """The first model of a running server.

    Args:
        url: Of the server, with or without ``/v1``.

    Returns:
        The address up to and with ``/v1``, and what the server tells of the model; it has ``id``.

    Raises:
        UserError: it is no address, nobody answers, or it is no such server.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--server {url}: expected http://HOST:PORT")
    base = f"{url.rstrip('/').removesuffix('/v1')}/v1"
    try:
        model = dict(call(f"{base}/models", REACHED_S)["data"][0])
        return base, {**model, "id": str(model["id"])}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise UserError(f"--server {url}: lists no models; expected OpenAI's interface") from None


def call(url: str, timeout_s: float, body: dict[str, Any] | None = None) -> Any:
    """What a server answers to a GET, or to a POST of a JSON body.

    Args:
        url: Whole address.
        timeout_s: Of connecting and of each read, seconds.
        body: Posted as JSON; None: a GET.

    Raises:
        Refused: with an error.
        UserError: nothing, or what is no JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:  # with a reason in its body
        reason = one_line(ValueError(error.read().decode(errors="replace")))
        raise Refused(f"--server {url}: answers {error.code}: {reason}", error.code) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        raise UserError(f"--server {url}: no answer: {one_line(ValueError(cause))}") from error
