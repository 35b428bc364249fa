"""Rows of a hub data set, or of one in the local hub cache, through `datasets`."""

from pathlib import PurePath
from typing import ClassVar

from pydantic import Field

from llmq.errors import UserError, first_line
from llmq.text import rows
from llmq.types import Data, Split


class Hub(Data):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    path: str
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    columns: dict[str, str] = Field({}, description="our column names -> the data set's")
    held_out: float = Field(0.1, ge=0, lt=1, description="share of the rows set aside")
    limit: int | None = Field(None, ge=1, description="use the first rows only")

    @classmethod
    def takes(cls, path: str) -> bool:
        return not PurePath(path).suffix

    def read(self) -> Split:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            data = load_dataset(self.path, self.name, split=self.split, revision=self.revision)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise UserError(
                f"data set {self.path!r} is neither a local file, nor in the hub's cache, nor reachable: "
                f"{first_line(error)}"
            ) from None
        named = ((f"{self.path}[{self.split}]: row {i}", rows.without_absent_keys(row)) for i, row in enumerate(data))
        return rows.split_of(named, self.columns, self.path, self.held_out, self.limit)
