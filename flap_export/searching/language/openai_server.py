"""A language model behind the OpenAI protocol: OpenAI itself, vLLM, llama.cpp, `transformers serve` and others.

The key comes from the environment alone, and no message tells it.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, final
from urllib.parse import urlsplit

from flap_export.errors import InputError, MissingRequirementError
from flap_export.searching.language.proposers import Answer, Message, ProposerUnavailableError

KEY_VARIABLE: Final = "OPENAI_API_KEY"
MAX_WAIT_S: Final = 60.0
"""Between two requests, whatever the server asks for."""
_NO_KEY: Final = "none"
"""Sent where the environment holds no key: local servers take any."""
_PASSING: Final = (408, 409, 429)
"""Statuses that go by, besides all from 500 on."""

_logger = logging.getLogger(__name__)


@final
class OpenAIServer:
    """Asks one server; see `flap_export.searching.language.proposers.Proposer`."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout_s: float = 120.0,
        max_retries: int = 5,
        backoff_s: float = 1.0,
        max_tokens: int | None = None,
    ) -> None:
        """Name a server; it is not asked yet.

        Args:
            url: of the protocol's root, which usually ends in /v1.
            model: as the server calls it.
            timeout_s: for the server to connect and to answer.
            max_retries: requests after the first for one answer, where the reason may go by.
            backoff_s: wait before the first of them; it doubles from one to the next.
            max_tokens: of an answer; None leaves it to the server.

        Raises:
            InputError: the address is not one.
            MissingRequirementError: the client is not installed.
        """
        check_url(url)
        self._url, self._model = url, model
        self._timeout_s, self._max_retries, self._backoff_s = timeout_s, max_retries, backoff_s
        self._options: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
        self._refused: set[str] = set()
        _openai()

    def answer(self, messages: Sequence[Message], *, temperature: float, seed: int) -> Answer:
        """Ask, and again after a while where the server is busy, late or away.

        Raises:
            ProposerUnavailableError: it still is after all retries.
            InputError: the server refuses the request: key, model or URL are wrong.
        """
        started = time.monotonic()
        request = {"messages": list(messages), "temperature": temperature, "seed": seed, **self._options}
        with self._client() as client:
            for attempt, wait_s in enumerate([*self._waits(), None], start=1):
                try:
                    found = self._asked(client, request)
                except _PassingError as error:
                    if wait_s is None:
                        raise self._unavailable(attempt, error) from error
                    wait_s = min(max(wait_s, error.wait_s), MAX_WAIT_S)
                    _logger.info("%s: %s; asking again in %.1f s", self._url, error, wait_s)
                    time.sleep(wait_s)
                else:
                    return _answer(found, time.monotonic() - started, attempt)
        raise AssertionError("the last attempt answers or raises")

    def _client(self) -> Any:
        return _openai().OpenAI(base_url=self._url, api_key=_key() or _NO_KEY, timeout=self._timeout_s, max_retries=0)

    def _waits(self) -> Iterator[float]:
        """Doubling, and up to half of each left out, so that several searches do not come back at once."""
        for retry in range(self._max_retries):
            yield min(self._backoff_s * 2.0**retry, MAX_WAIT_S) * random.uniform(0.5, 1.0)

    def _asked(self, client: Any, request: dict[str, Any]) -> Any:
        """One request; some models take no temperature or seed, and are asked without once they said so."""
        openai = _openai()
        try:
            taken = {name: value for name, value in request.items() if name not in self._refused}
            found = client.chat.completions.create(model=self._model, **taken)
        except openai.BadRequestError as error:
            if error.param not in ("temperature", "seed") or error.param in self._refused:
                raise self._refusal(error) from error
            self._refused.add(error.param)
            return self._asked(client, request)
        except openai.APITimeoutError as error:
            raise _PassingError(f"no answer within {self._timeout_s:g} s") from error
        except openai.APIConnectionError as error:
            raise _PassingError(f"no connection ({_told(error.__cause__ or error)})") from error
        except openai.APIStatusError as error:
            if error.status_code not in _PASSING and error.status_code < 500:
                raise self._refusal(error) from error
            raise _PassingError(f"status {error.status_code} ({_told(error)})", _asked_wait(error)) from error
        # A body that is no JSON, or JSON of something else: a proxy's page, another protocol.
        except (openai.OpenAIError, ValueError) as error:
            raise _PassingError(f"no answer of the OpenAI protocol ({_told(error)})") from error
        if not isinstance(getattr(found, "choices", None), list):
            raise _PassingError(f"no answer of the OpenAI protocol ({str(found)[:80]!r})")
        return found

    def _unavailable(self, attempts: int, error: Exception) -> ProposerUnavailableError:
        return ProposerUnavailableError(
            f"the language model '{self._model}' at {self._url} did not answer after {attempts} requests: {error}. "
            "The search is paused and nothing of it is lost",
            "start the server, or check its address, which usually ends in /v1; then give the same command again",
        )

    def _refusal(self, error: Any) -> InputError:
        mended = {
            401: f"set {KEY_VARIABLE} in the environment to a key that it takes",
            403: f"set {KEY_VARIABLE} in the environment to a key that may use this model",
            404: "check the model's name, and that the address ends in what the server documents, usually /v1",
        }.get(error.status_code, "choose another model or server, or mend what it says")
        return InputError(
            f"{self._url} refuses to answer with the model '{self._model}' (status {error.status_code}: "
            f"{_told(error)}); {mended}"
        )


class _PassingError(Exception):
    """What may go by, and how long the server says that takes."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def check_url(url: str) -> None:
    """Whether a server's address is one.

    Raises:
        InputError: it is no address of a web server, or holds a password.
    """
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if "@" in url:
        raise InputError(f"a server's address holds no key or password; set {KEY_VARIABLE} in the environment")
    if not whole:
        raise InputError(f"a server's address reads http://host:port/v1 or https://host/v1, got '{url}'")


def _key() -> str:
    """Without the line's end that files of keys tend to have."""
    return os.environ.get(KEY_VARIABLE, "").strip()


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise MissingRequirementError(
            "asking a server needs the package openai", 'pip install "flap-export[search]"'
        ) from error
    return openai


def _answer(found: Any, seconds: float, attempts: int) -> Answer:
    """What a completion says; one without text, as filters leave it, is an empty answer."""
    message = found.choices[0].message if found.choices else None
    usage = found.usage
    return Answer(
        text=getattr(message, "content", None) or "",
        prompt_tokens=getattr(usage, "prompt_tokens", None) or 0,
        completion_tokens=getattr(usage, "completion_tokens", None) or 0,
        seconds=round(seconds, 3),
        attempts=attempts,
    )


def _asked_wait(error: Any) -> float:
    """Seconds that a status asks to wait; 0 where it does not say, or gives a date."""
    stated = error.response.headers.get("retry-after", "")
    return float(stated) if stated.isdecimal() else 0.0


def _told(error: Any) -> str:
    """The first line of a message, without the key that some servers repeat in it."""
    message = str(getattr(error, "message", "") or error)
    if key := _key():
        message = message.replace(key, "***")
    return next(iter(message.splitlines()), "no reason given")[:200]
