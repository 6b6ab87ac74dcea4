"""A stand-in for the dashboard's queue of jobs."""

from __future__ import annotations

from app.jobs.protocol import Request, Status


class Line:
    """A queue without a worker: it remembers what it was asked, and says what it is told to, of a job or of all."""

    def __init__(self) -> None:
        self.submitted: list[Request] = []
        self.says = Status()
        self.says_of: dict[str, Status] = {}
        self.cancelled: list[str] = []

    def submit(self, request: Request) -> str:
        self.submitted.append(request)
        return str(len(self.submitted) - 1)

    def knows(self, name: str | None) -> bool:
        return name is not None

    def request(self, name: str) -> Request:
        return self.submitted[int(name)]

    def status(self, name: str) -> Status:
        return self.says_of.get(name, self.says)

    def active(self) -> list[str]:
        return [name for name in map(str, range(len(self.submitted))) if not self.status(name).ended]

    def cancel(self, name: str) -> None:
        self.cancelled.append(name)

    def cancelling(self, name: str) -> bool:
        return name in self.cancelled
