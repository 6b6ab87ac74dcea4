"""The gate of the dashboard: names of this machine pass, foreign ones get neither a page nor a socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from app_server import Server, serve

from analyses.cli import main
from app.gate import known, name_of, plain

OWN = ("localhost:{port}", "LOCALHOST:{port}", "127.0.0.1:{port}", "[::1]:{port}", "127.0.0.1", "lab.example.org")
FOREIGN = (
    "evil.example:{port}", "evil.example", "localhost.evil.example:{port}", "127.0.0.1.evil.example", "10.0.0.9:{port}",
    "localhost@evil.example", "localhost/evil.example", "localhost:{port}:1", "", "sub.lab.example.org",
)  # fmt: skip
SOCKET = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("gate")
    with serve(folder / "runs", folder / "store", folder / "log.txt", "--host", "lab.example.org") as running:
        yield running


def code(server: Server, path: str, *headers: str, more: str = "Connection: close\r\n") -> int:
    """The status that a raw request with exactly these headers is answered with; `{port}` stands for the server's."""
    port = urlsplit(server.url).port
    lines = "".join(f"{header.format(port=port)}\r\n" for header in headers)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        line.sendall(f"GET {path} HTTP/1.1\r\n{lines}{more}\r\n".encode())
        return int(line.recv(64).split()[1])


@pytest.mark.parametrize("name", OWN)
def test_names_of_this_machine_pass(server: Server, name: str) -> None:
    headers = (f"Host: {name}", f"Origin: http://{name}")
    assert code(server, "/", headers[0]) == 200
    assert code(server, "/_stcore/health", *headers) == 200
    assert code(server, "/_stcore/stream", *headers, more=SOCKET) == 101


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_names_pass_nowhere(server: Server, name: str) -> None:
    """What a page sends whose name was pointed at this machine: its own name, as Host and as Origin."""
    headers = (f"Host: {name}", f"Origin: http://{name}")
    for path in ("/", "/_stcore/health", "/_stcore/host-config", "/_stcore/upload_file/a/b", "/static/index.html"):
        assert code(server, path, headers[0]) in (400, 403), path
    assert code(server, "/_stcore/stream", *headers, more=SOCKET) in (400, 403)
    assert code(server, "/_stcore/stream", headers[0], more=SOCKET) in (400, 403)


@pytest.mark.parametrize("origin", ["http://evil.example", "https://evil.example:{port}", "null", "http://", "file://"])
def test_a_foreign_origin_opens_no_socket_under_our_own_name(server: Server, origin: str) -> None:
    assert code(server, "/_stcore/stream", "Host: localhost:{port}", f"Origin: {origin}", more=SOCKET) == 403


def test_one_host_is_named_or_none_passes(server: Server) -> None:
    assert code(server, "/_stcore/health") in (400, 403)
    assert code(server, "/_stcore/health", "Host: localhost:{port}", "Host: evil.example") in (400, 403)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("//[0:0::1]:80", "::1"), ("//Localhost.:8501", "localhost"), ("http://127.0.0.1", "127.0.0.1"),
        ("//a@localhost", ""), ("//localhost:x", ""), ("null", ""), ("//localhost?x", ""), ("//[::1", ""),
    ],
)  # fmt: skip
def test_a_name_is_read_off_a_url(url: str, name: str) -> None:
    assert name_of(url) == name


def test_given_names_are_known_in_every_spelling() -> None:
    assert {plain("[fe80:0::2]"), "lab", "localhost"} <= known(["fe80::2", "LAB.", ""])


@pytest.mark.parametrize("name", ["http://lab", "lab:80", "*", "", "a,b", "a@b"])
def test_a_host_that_is_no_name_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["app", "--host", name, "--runs", str(tmp_path)]) == 2
    assert f"--host {name!r}" in capsys.readouterr().err
