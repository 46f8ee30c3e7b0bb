"""A real server on this machine, for as long as a test."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from served import Server

from flap_export.searching.language.openai_server import KEY_VARIABLE


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()
