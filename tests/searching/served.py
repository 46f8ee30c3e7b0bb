"""A server of the OpenAI protocol that replies by a script."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from scripted import prompt_of, well

Reply = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            place = len(self.server.requests)
            self.server.requests.append(body)
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.server.paths.append(self.path)
        script = self.server.script
        script[min(place, len(script) - 1)](self, body)

    def send(self, status: int, body: str, kind: str = "application/json", **headers: str) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


class Server(ThreadingHTTPServer):
    """Replies by a script, the last of which stands for all that follow."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Reply] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.lock, self.ended = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the script."""


def completion(text: str | None, **extra: Any) -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    values = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return json.dumps({**values, **extra})


def says(text: str | None, **extra: Any) -> Reply:
    return lambda handler, body: handler.send(200, completion(text, **extra))


def fails(status: int, message: str = "out of order", *, param: str | None = None, **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "type": "t", "param": param, "code": None}})
    return lambda handler, request: handler.send(status, body, **headers)


def sends(body: str, kind: str = "application/json") -> Reply:
    return lambda handler, request: handler.send(200, body, kind)


def late(handler: Handler, body: dict[str, Any]) -> None:
    handler.server.ended.wait(5)


def hangs_up(handler: Handler, body: dict[str, Any]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def half(handler: Handler, body: dict[str, Any]) -> None:
    """Promise more than comes."""
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def good(handler: Handler, body: dict[str, Any]) -> None:
    """An answer as it should be, whatever is asked."""
    handler.send(200, completion(well(prompt_of(body["messages"]), body["seed"])))
