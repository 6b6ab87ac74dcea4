"""Who may ask: requests and sockets whose Host and Origin are names of this machine.

A page on a foreign name that was made to point here (DNS rebinding) sends that name in both headers, and gets neither past the gate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine that nobody else can own."""


@dataclass(frozen=True)
class Gate:
    """An ASGI application behind the check, for HTTP and websockets alike."""

    app: ASGIApp
    names: frozenset[str] = LOCAL
    """Host names and addresses that may be asked for; the address that a connection reached always may."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands on what passes; answers the rest with 403 and the reason."""
        if scope["type"] in ("http", "websocket") and (reason := self._reason(scope)):
            await PlainTextResponse(reason, status_code=403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _reason(self, scope: Scope) -> str:
        names = self.names | {plain(str(scope["server"][0]))} if scope.get("server") else self.names
        hosts = [name_of(f"//{value}") for value in _header(scope, b"host")]
        origins = [name_of(value) for value in _header(scope, b"origin")]
        foreign = [name for name in (hosts if len(hosts) == 1 else ["", *hosts]) + origins if name not in names]
        if not foreign:
            return ""
        return (
            f"{foreign[0] or 'a request without one plain host name'!r} is not a name of this dashboard: open it as "
            "http://localhost, or start it with: bathyscope app --host NAME\n"
        )


def name_of(url: str) -> str:
    """The host name or address of a URL; empty where there is none."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # refuses a port that is no number
    except ValueError:
        return ""
    odd = parts.username is not None or parts.path.strip("/") or parts.query or parts.fragment
    return "" if odd or not parts.hostname else plain(parts.hostname)


def plain(name: str) -> str:
    """A name or address as it is compared: lower case, no closing dot, addresses in their one short form."""
    bare = name.strip().strip("[]").lower().rstrip(".")
    try:
        return ip_address(bare).compressed
    except ValueError:
        return bare


def known(extra: Iterable[str]) -> frozenset[str]:
    """Names that may be asked for: those of this machine, and those given."""
    return LOCAL | {plain(name) for name in extra if name.strip()}


def _header(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]
