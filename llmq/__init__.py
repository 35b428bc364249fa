"""llmq makes models small and proves what it cost.

`llmq.run`, `finetune`, `quantize`, `search`, `evaluate`, `compare`, `gate`, `export`, `plan`, `predict`, `push`,
`sweep` and `open` do what the commands of the same names do, and return the `Report`, the verdict, the files or the
model. Nothing heavy is imported until one is called.
"""

from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmq.api import (
        compare,
        evaluate,
        export,
        finetune,
        gate,
        open,
        plan,
        predict,
        push,
        quantize,
        run,
        search,
        sweep,
    )  # fmt: skip
    from llmq.errors import LlmqError, UserError
    from llmq.report import Report

__version__ = "0.1.0"
__all__ = [
    "LlmqError", "Report", "UserError", "compare", "evaluate", "export", "finetune", "gate", "open", "plan", "predict",
    "push", "quantize", "run", "search", "sweep",
]  # fmt: skip


class Verb(ModuleType):
    """A folder of words that is called as well: `llmq.quantize(…)` beside `llmq.quantize.gptq`."""

    def __call__(self, *arguments: object, **settings: object) -> object:
        from llmq import api

        return getattr(api, self.__name__.removeprefix("llmq."))(*arguments, **settings)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'llmq' has no attribute {name!r}")
    if name in ("LlmqError", "UserError"):
        from llmq import errors

        return getattr(errors, name)
    if name == "Report":
        from llmq.report import Report

        return Report
    if name in ("quantize", "export"):
        import importlib

        return importlib.import_module(f"llmq.{name}")
    from llmq import api

    return getattr(api, name)
