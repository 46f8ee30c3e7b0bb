"""`transformers serve` with the demo model: a real server of the OpenAI protocol, whose answers are mostly nonsense."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted import bred, opened, operators_of, small_space

from flap_export.errors import InputError
from flap_export.searching.language.openai_server import KEY_VARIABLE, OpenAIServer
from flap_export.searching.language.proposers import Recorded

for package in ("openai", "fastapi", "uvicorn", "accelerate", "transformers.cli.serve"):
    pytest.importorskip(package, reason="pip install 'transformers[serving]'")
pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[2] / "pipelines" / "demo" / "model"
START = "import sys; from transformers.cli.transformers import main; sys.exit(main())"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The server's address and its model's name."""
    folder = tmp_path_factory.mktemp("serve")
    model = Path(shutil.copytree(DEMO, folder / "model"))
    # The server asks for a template; the demo model has none.
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", START, "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w+b") as log:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=log, env=dict(os.environ))
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
            yield f"http://127.0.0.1:{port}/v1", str(model)
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.2)


def test_a_search_with_the_served_demo_model_is_survived_and_replayed(
    served: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    url, model = served
    space, proposer = small_space(), OpenAIServer(url, model, timeout_s=60, max_retries=0, max_tokens=24)
    with opened(tmp_path) as journal:
        operators = operators_of(space, proposer, journal, max_attempts=1)
        found = bred(operators, generations=1)
    assert len(set(found)) == 11
    assert all(space.contains(one) for one in found)
    usage = operators.usage
    assert usage.questions == 4
    assert usage.valid + usage.filled == 14
    assert usage.prompt_tokens > 100
    assert 0 < usage.completion_tokens <= 4 * 24
    with opened(tmp_path) as journal:
        assert bred(operators_of(space, Recorded(), journal, max_attempts=1), generations=1) == found


def test_a_model_that_the_server_does_not_serve_is_refused(served: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="refuses to answer with the model 'gpt-0'"):
        OpenAIServer(served[0], "gpt-0", max_retries=0).answer(
            [{"role": "user", "content": "hello"}], temperature=0.7, seed=0
        )
