"""A server of the OpenAI protocol that answers well, badly, late, and not at all."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from scripted import bred, opened, operators_of, small_space
from served import Reply, Server, fails, good, half, hangs_up, late, says, sends

from flap_export.errors import InputError, MissingRequirementError
from flap_export.searching.language.openai_server import KEY_VARIABLE, OpenAIServer
from flap_export.searching.language.opening import open_proposer
from flap_export.searching.language.proposers import Message, ProposerUnavailableError

pytest.importorskip("openai", reason="pip install 'flap-export[search]'")

HELLO: list[Message] = [{"role": "user", "content": "hello"}]
KEY = "sk-secret-of-this-test"


def asked(server: Server, *script: Reply, **options: Any) -> OpenAIServer:
    server.script = list(script)
    return OpenAIServer(server.url, "m", **{"timeout_s": 5.0, "max_retries": 2, "backoff_s": 0.01, **options})


def test_a_good_answer_is_told_with_its_tokens(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f"{KEY}\n")
    answer = asked(server, says("rates")).answer(HELLO, temperature=0.8, seed=5)
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens, answer.attempts) == ("rates", 11, 7, 1)
    assert 0 < answer.seconds < 5
    assert server.requests == [{"model": "m", "messages": HELLO, "temperature": 0.8, "seed": 5}]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert server.paths == ["/v1/chat/completions"]


def test_without_a_key_a_local_server_is_asked_all_the_same(server: Server) -> None:
    asked(server, says("rates"), max_tokens=9).answer(HELLO, temperature=0.0, seed=0)
    assert server.headers[0]["authorization"] == "Bearer none"
    assert server.requests[0]["max_tokens"] == 9


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(says(""), id="empty"),
        pytest.param(says(None), id="no content"),
        pytest.param(says("", choices=[]), id="no choices"),
        pytest.param(says("", choices=[{"index": 0, "finish_reason": "stop"}]), id="no message"),
    ],
)
def test_an_answer_without_text_is_an_empty_answer(server: Server, reply: Reply) -> None:
    answer = asked(server, reply).answer(HELLO, temperature=0.7, seed=0)
    assert (answer.text, answer.attempts, answer.prompt_tokens) == ("", 1, 11)


def test_a_server_that_counts_no_tokens_is_fine(server: Server) -> None:
    answer = asked(server, says("rates", usage=None)).answer(HELLO, temperature=0.7, seed=0)
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("rates", 0, 0)


PASSING = {
    "busy": fails(429),
    "broken": fails(500),
    "away": fails(503),
    "no json": sends("{'choices': oops"),
    "page": sends("<html><body>Welcome</body></html>", "text/html"),
    "list": sends("[1, 2]"),
    "other protocol": sends('{"response": "hello"}'),
    "null": sends("null"),
    "choices of another kind": sends('{"choices": {"text": "hello"}}'),
    "hangs up": hangs_up,
    "half": half,
}


@pytest.mark.parametrize("kind", PASSING)
def test_what_goes_by_is_asked_again(server: Server, kind: str) -> None:
    answer = asked(server, PASSING[kind], PASSING[kind], says("rates")).answer(HELLO, temperature=0.7, seed=0)
    assert (answer.text, answer.attempts) == ("rates", 3)
    assert len(server.requests) == 3


@pytest.mark.parametrize("kind", PASSING)
def test_what_stays_pauses_the_search(server: Server, kind: str) -> None:
    with pytest.raises(ProposerUnavailableError, match=r"'m' at .* after 3 requests: .*nothing of it is lost") as error:
        asked(server, PASSING[kind]).answer(HELLO, temperature=0.7, seed=0)
    assert server.url in str(error.value)
    assert "give the same command again" in error.value.remedy
    assert error.value.exit_code == 3
    assert len(server.requests) == 3


def test_a_late_server_is_not_waited_for(server: Server) -> None:
    proposer = asked(server, late, says("rates"), timeout_s=0.2)
    started = time.monotonic()
    assert proposer.answer(HELLO, temperature=0.7, seed=0).attempts == 2
    assert time.monotonic() - started < 4
    with pytest.raises(ProposerUnavailableError, match=r"no answer within 0\.2 s"):
        asked(server, late, timeout_s=0.2, max_retries=0).answer(HELLO, temperature=0.7, seed=0)


def test_nobody_at_the_address_pauses_the_search() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        proposer = OpenAIServer(url, "m", max_retries=1, backoff_s=0.01)
        with pytest.raises(ProposerUnavailableError, match="after 2 requests: no connection"):
            proposer.answer(HELLO, temperature=0.7, seed=0)


def test_waits_double_and_follow_what_the_server_asks_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("flap_export.searching.language.openai_server.time.sleep", waits.append)
    script = (fails(500), fails(429, retry_after="7"), fails(429, retry_after="9999"), fails(503, retry_after="soon"))
    asked(server, *script, fails(500), says("rates"), max_retries=5, backoff_s=1.0).answer(
        HELLO, temperature=0.7, seed=0
    )
    one, stated, capped, fourth, fifth = waits
    assert 0.5 <= one <= 1
    assert (stated, capped) == (7, 60)
    assert 4 <= fourth <= 8
    assert 8 <= fifth <= 16


@pytest.mark.parametrize(
    ("status", "mend"),
    [
        (400, "choose another model or server"),
        (401, f"set {KEY_VARIABLE} in the environment"),
        (403, f"set {KEY_VARIABLE} in the environment"),
        (404, "check the model's name, and that the address ends"),
        (422, "choose another model or server"),
    ],
)
def test_a_refusal_says_how_to_mend_it_and_never_tells_the_key(
    server: Server, status: int, mend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    caplog.set_level("DEBUG", logger="flap_export")
    proposer = asked(server, fails(500, f"what is {KEY}?"), fails(status, f"no {KEY} here"))
    with pytest.raises(InputError, match=f"'m' .status {status}: .*{mend}") as error:
        proposer.answer(HELLO, temperature=0.7, seed=0)
    assert len(server.requests) == 2
    assert "no *** here" in str(error.value)
    assert "what is ***?" in caplog.text
    assert KEY not in str(error.value) + caplog.text


def test_a_model_without_temperature_or_seed_is_asked_without(server: Server) -> None:
    proposer = asked(server, fails(400, param="temperature"), fails(400, param="seed"), says("one"), says("two"))
    assert proposer.answer(HELLO, temperature=0.7, seed=0).text == "one"
    assert proposer.answer(HELLO, temperature=0.7, seed=0).text == "two"
    assert [sorted(request) for request in server.requests[1:]] == [
        ["messages", "model", "seed"],
        ["messages", "model"],
        ["messages", "model"],
    ]
    with pytest.raises(InputError, match="status 400"):
        asked(server, fails(400, param="seed")).answer(HELLO, temperature=0.7, seed=0)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "ftp://host/v1", "http://", "http:///v1", "http://[::1", "http://host:x/v1"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="a server's address reads http://host:port/v1"):
        OpenAIServer(url, "m")


def test_a_key_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match=f"set {KEY_VARIABLE} in the environment") as error:
        OpenAIServer(f"https://user:{KEY}@host/v1", "m")
    assert KEY not in str(error.value)


def test_the_client_is_asked_for_by_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(MissingRequirementError, match=r'pip install "flap-export\[search\]"'):
        OpenAIServer("http://localhost/v1", "m")


def test_a_search_survives_whatever_a_server_answers(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good, nonsense, empty, busy and half answers, then none at all; the search goes on where it stopped."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)

    space = small_space()
    script = [good, fails(429), says("no idea"), says("[[0.1]]"), sends("<p>", "text/html"), half, says(None), good]
    with opened(tmp_path) as journal:
        operators = operators_of(space, asked(server, *script, fails(503)), journal)
        with pytest.raises(ProposerUnavailableError):
            bred(operators)
    assert operators.usage.valid > 3
    lost = len(server.requests)
    with opened(tmp_path) as journal:
        resumed = operators_of(space, asked(server, good), journal)
        found = bred(resumed)
    assert all(space.contains(one) for one in found)
    assert len(set(found)) == len(found) == 17
    assert resumed.usage.requests > resumed.usage.questions
    # Nothing was asked twice: what the first search had answers to came from the journal.
    assert len(server.requests) - lost == resumed.usage.questions - operators.usage.questions + 1
    assert KEY not in (tmp_path / "journal.jsonl").read_text()


def test_a_server_is_opened_by_its_address(server: Server) -> None:
    server.script = [says("rates")]
    proposer = open_proposer(f"openai:{server.url}/", "m", pruned_model="unused", timeout_s=5, max_retries=0)
    assert proposer.answer(HELLO, temperature=0.7, seed=0).text == "rates"
    with pytest.raises(InputError, match="needs the name of a model at the server; add --model NAME"):
        open_proposer(f"openai:{server.url}", None, pruned_model="unused")


@pytest.mark.parametrize("text", ["", "openai", "openai:", "local", "local:", "self:x", "gpt-4o", "http://host/v1"])
def test_other_forms_of_a_proposer_are_listed(text: str) -> None:
    with pytest.raises(InputError, match=r"a proposer reads openai:URL .*, local:PATH or self, got "):
        open_proposer(text, None, pruned_model="unused")
