"""Any task of EleutherAI's lm-evaluation-harness."""

import io
import logging
import sys
from collections.abc import Iterable
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from llmq.errors import LlmqError, UserError, did_you_mean
from llmq.tasks.harness import OURS, check_names
from llmq.tasks.harness_results import measurements
from llmq.types import Loaded, Measurement, Task


class LmEval(Task):
    """Tasks of lm-eval by name, on the opened model; metrics keep lm-eval's names and standard errors.

    llmq's own offline tasks (`pydoc_continuation`) are found without lm-eval's index, which takes 20 seconds to build.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    tasks: tuple[str, ...] = Field(min_length=1)
    num_fewshot: int | None = Field(None, ge=0, description="the task's own if unset")
    limit: PositiveInt | None = Field(None, description="questions a task at most")
    include_path: Path | None = Field(None, description="a folder with more task files")
    batch_size: PositiveInt = 16

    def check(self) -> None:
        """Raise `UserError` for a task or a folder of tasks that is not there."""
        if self.include_path and not self.include_path.is_dir():
            raise UserError(f"include_path {str(self.include_path)!r} is no folder")
        check_names(self.tasks, self.include_path)

    def score(self, loaded: Loaded) -> Iterable[Measurement]:
        """What `lm_eval.simple_evaluate` says of the opened module."""
        # The harness sets its loggers up when imported, and speaks of each override it was asked for.
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        evaluator.get_git_commit_hash = lambda: None  # it asks git about the working folder, and git complains
        manager = self._manager()
        model = HFLM(pretrained=loaded.module, tokenizer=loaded.processor, batch_size=self.batch_size)
        try:
            with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):  # its bars know no other way
                results = evaluator.simple_evaluate(
                    model=model,
                    tasks=list(self.tasks),
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    task_manager=manager,
                    log_samples=True,
                )
        except OSError as error:  # the hub's errors, a missing data set's and a refused connection's among them
            raise LlmqError(
                f"lm_eval {', '.join(self.tasks)}: the data is not on this machine and the hub does not "
                f"give it: {str(error).strip().splitlines()[0]}"
            ) from error
        return list(measurements(results, self.limit))

    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        paths = [str(p) for p in (OURS, self.include_path) if p]
        manager = TaskManager(include_path=paths, include_defaults=False)
        if set(self.tasks) <= set(manager.all_tasks):
            return manager
        manager = TaskManager(include_path=paths)
        for name in self.tasks:
            if name not in manager.all_tasks:
                raise UserError(f"lm_eval has no task {name!r}{did_you_mean(name, manager.all_tasks)}")
        return manager
