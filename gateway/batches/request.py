"""A batch as a caller writes it: a list of requests, or one request with a sweep over some of its parameters. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from gateway.edge.bodies import Metadata, ShallowBody
from gateway.jobs.model import Priority
from gateway.webhooks import WebhookField

MAX_ITEMS = 10_000
# Decimals of a value in a range: 0.1 three times is 0.3 and not a little more.
DECIMALS = 10


class Range(BaseModel):
    """Numbers from `from` to `to`, both included where the step meets them."""

    model_config = ConfigDict(extra="forbid")

    first: int | float = Field(alias="from", allow_inf_nan=False)
    to: int | float = Field(allow_inf_nan=False)
    step: int | float = Field(1, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _end_somewhere(self) -> Self:
        if self.to < self.first:
            raise ValueError("`to` is less than `from`")
        if (self.to - self.first) / self.step >= MAX_ITEMS:
            raise ValueError(f"the range has more than {MAX_ITEMS} values")
        return self

    @property
    def count(self) -> int:
        return math.floor(round((self.to - self.first) / self.step, DECIMALS)) + 1

    def values(self) -> list[int | float]:
        numbers = [self.first + place * self.step for place in range(self.count)]
        return [number if isinstance(number, int) else round(number, DECIMALS) for number in numbers]


def _tell_kind(value: Any) -> str:
    return "list" if isinstance(value, list) else "range"


Values = Annotated[Annotated[list[Any], Tag("list")] | Annotated[Range, Tag("range")], Discriminator(_tell_kind)]


class BatchItem(ShallowBody):
    """One picture to make. The workflow's parameters stand beside these fields; pictures among them are ids of uploads."""

    model_config = ConfigDict(extra="allow")

    workflow: str | None = None
    metadata: Metadata = Field(default_factory=dict)


class Entry(NamedTuple):
    """An item before it is checked. `varied` is what tells it from the others of a sweep."""

    workflow: str | None
    parameters: dict[str, Any]
    metadata: dict[str, Any]
    varied: dict[str, Any]


class BatchRequest(ShallowBody):
    """Give `items`, or `parameters` with a `sweep`."""

    model_config = ConfigDict(extra="forbid")

    workflow: str | None = Field(None, description="Of every item that names none; the deployment's default when absent.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Parameters of every item; an item's own go before.")
    items: list[BatchItem] | None = Field(None, min_length=1, max_length=MAX_ITEMS, description="One picture each.")
    sweep: dict[str, Values] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description='Every combination is an item, the last varying fastest: `{"seed": {"from": 1, "to": 100}, "steps": [4, 8]}`.',
    )
    metadata: Metadata = Field(default_factory=dict)
    priority: Priority = Field("normal", description="Order of the items among your own and others' waiting jobs.")
    cache: Literal["use", "refresh", "off"] = Field("use", description="Whether identical earlier jobs may answer.")
    webhook: WebhookField = None
    timeout_s: float | None = Field(None, gt=0, allow_inf_nan=False, description="Seconds an item may take once an instance has it.")

    @model_validator(mode="after")
    def _be_one_or_the_other(self) -> Self:
        if (self.items is None) == (self.sweep is None):
            raise ValueError("give either `items` or `sweep`")
        for name, values in (self.sweep or {}).items():
            if values == []:
                raise ValueError(f"sweep.{name[:64]} has no values")
        if self.total > MAX_ITEMS:
            raise ValueError(f"the sweep makes {self.total} items; at most {MAX_ITEMS} are allowed")
        return self

    @property
    def total(self) -> int:
        if self.items is not None:
            return len(self.items)
        return math.prod(values.count if isinstance(values, Range) else len(values) for values in (self.sweep or {}).values())

    def entries(self) -> Iterator[Entry]:
        """Every item, in order."""
        for item in self.items or ():
            parameters = {**self.parameters, **(item.model_extra or {})}
            yield Entry(item.workflow or self.workflow, parameters, item.metadata, {})
        if self.sweep is not None:
            lists = [values.values() if isinstance(values, Range) else values for values in self.sweep.values()]
            for combination in itertools.product(*lists):
                varied = dict(zip(self.sweep, combination, strict=True))
                yield Entry(self.workflow, {**self.parameters, **varied}, {}, varied)
