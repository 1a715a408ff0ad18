"""One line of a report: what was looked at, how it is, and what to do where it is not well."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

State = Literal["ok", "warning", "fault", "skipped"]


class Finding(BaseModel):
    """`check` is `system.subject`, the same from release to release."""

    model_config = ConfigDict(frozen=True)

    check: str
    state: State
    message: str
    remedy: str | None = None

    def line(self) -> str:
        return f"{self.state:8} {self.check:22} {self.message}" + (f"\n{'':32}-> {self.remedy}" if self.remedy else "")


def well(check: str, message: str) -> Finding:
    return Finding(check=check, state="ok", message=message)


def fault(check: str, message: str, remedy: str | None) -> Finding:
    return Finding(check=check, state="fault", message=message, remedy=remedy)


def warn(check: str, message: str, remedy: str | None) -> Finding:
    return Finding(check=check, state="warning", message=message, remedy=remedy)


def skip(check: str, why: str) -> Finding:
    return Finding(check=check, state="skipped", message=why)
