"""Rows of one source to prompts: those that are wanted, in the format that the first row of a file tells."""

from dataclasses import dataclass
from typing import Any

from megatron_troll.config import Origin
from megatron_troll.data.columns import NoColumn, Record, shown, value_of
from megatron_troll.data.rows import Malformed, Row
from megatron_troll.data.schemas import NoFormat, RowFormat, format_of, to_prompt
from megatron_troll.types import Prompt

ABILITY = "ability"


class LeftOut(Exception):
    """A row is not wanted; the message says which of its values is another."""


@dataclass
class Conversion:
    """Conversion of the rows of one source, whose place in the configuration is `key`."""

    origin: Origin
    key: str
    _ability: str | None = None
    _format: RowFormat | None = None
    _first: str = ""

    def begin(self) -> None:
        """Go on with another file, which may have another format."""
        self._format, self._first = None, ""

    def __call__(self, row: Row) -> Prompt:
        """The prompt of a row. Raises LeftOut if `where` does not want it, and Malformed, which shows the
        first row of the file where a column is not there or no schema fits."""
        record = row.value
        self._first = self._first or shown(record)
        try:
            self._check_wanted(record)
            row_format = self._format_of(record)
            self._check_ability(record)
            return to_prompt(row_format, record)
        except (NoColumn, NoFormat) as error:
            named = self._named(error.path) if isinstance(error, NoColumn) else ""
            raise Malformed(f"{error}{named}; the first row: {self._first}") from error

    def _named(self, path: str) -> str:
        """The place in the configuration that names a column; "" if the schema does."""
        named = {name: f"columns.{role}" for role, name in self.origin.columns.model_dump().items()}
        key = (named | dict.fromkeys(self.origin.where, "where")).get(path)
        return f" ({key} of {self.key})" if key else ""

    def _format_of(self, record: Record) -> RowFormat:
        if self._format is None:
            self._format = format_of(record, self.origin, self.key)
        return self._format

    def _check_wanted(self, record: Record) -> None:
        for path, wanted in self.origin.where.items():
            value = value_of(record, path)
            if not any(_same(value, one) for one in (wanted if isinstance(wanted, tuple) else (wanted,))):
                raise LeftOut(f"{path} is {value!r:.40}")

    def _check_ability(self, record: Record) -> None:
        """Raise Malformed for a row of another ability than the first, as verl's rows name it: one reward
        judges the answers of a source."""
        ability = record.get(ABILITY)
        if not isinstance(ability, str) or ABILITY in self.origin.where:
            return
        self._ability = self._ability or ability
        if ability.casefold() != self._ability.casefold():
            raise Malformed(
                f"the ability is {ability!r}, of earlier rows {self._ability!r}, and one reward judges a "
                f"source: {self.key}.where={{ability: {self._ability}}} takes only those, "
                f"{self.key}.where={{ability: [{self._ability}, {ability}]}} both"
            )


def _same(value: Any, wanted: Any) -> bool:
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)
