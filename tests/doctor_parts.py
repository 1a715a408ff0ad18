"""What tests of the doctor ask of its findings."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.doctor.finding import Finding


def require(findings: Iterable[Finding], check: str, said: str, remedy: str, state: str = "fault") -> None:
    """A finding of that state that says so and names that remedy."""
    fitting = [each for each in findings if each.check == check and each.state == state]
    assert [each for each in fitting if said in each.message and remedy in (each.remedy or "")], list(findings)


def states(findings: Iterable[Finding]) -> set[str]:
    return {each.state for each in findings}
