"""The data of the task of this name, for lm-eval."""

from typing import Any

from datasets import load_dataset

from llmq.data import continuations


def load(**_: Any) -> Any:
    """A data set with one split, `test`. lm-eval passes the task's metadata, which is not needed."""
    return load_dataset("json", data_files={"test": str(continuations.file())})
