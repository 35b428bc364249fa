"""lm-eval's questions, put to an opened model."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.environment import library_version
from llmq.errors import LlmqError, one_line
from llmq.harness.data import at_work, built, manager, patched

if TYPE_CHECKING:
    from llmq.harness.names import Asked
    from llmq.harness.results import Results
    from llmq.types import Loaded


@dataclass(frozen=True)
class Evaluated:
    """lm-eval's results on an opened model, and the tasks and groups that failed, by the names they were asked by."""

    results: Results
    cut: Mapping[str, int]
    """For each task the number of questions that lost their beginning, as the model's window is shorter."""
    failures: Mapping[str, Exception]

    def end(self) -> None:
        """Raise the failures, if there are some, as one error."""
        if self.failures:
            told = "; ".join(f"{name}: {one_line(error)}" for name, error in self.failures.items())
            raise LlmqError(told) from next(iter(self.failures.values()))


def evaluated(
    loaded: Loaded, asked: Asked, batch_size: int | None, allow_code: bool = False, **settings: object
) -> Evaluated:
    """lm-eval's results on an opened model, each task or group by itself, so that no failure costs another answer."""
    from lm_eval import evaluator

    from llmq.harness.model import HarnessModel

    asked.check_code()
    model = HarnessModel(loaded.module, loaded.processor, loaded.device, batch_size)
    failures: dict[str, Exception] = {}
    results: Results = {}
    # Recording the environment would ask git about the working folder and pip about every package.
    brief = patched(evaluator, get_git_commit_hash=lambda: None, add_env_info=_add_versions)
    with at_work(asked), brief, _surroundings_kept(allow_code):
        for task in built(asked):
            try:
                said = evaluator.simple_evaluate(
                    model=model,
                    tasks=[task],
                    num_fewshot=asked.num_fewshot,
                    log_samples=True,
                    task_manager=manager(asked),
                    confirm_run_unsafe_code=allow_code,
                    **settings,
                )
            except Exception as error:  # noqa: BLE001 - a task's own code raises what it likes; `end` raises it
                failures[str(task.name if hasattr(task, "get_all_tasks") else task.config.task)] = error
            else:
                for key, value in said.items():  # tables by task are merged; all else is the same for all tasks
                    if isinstance(value, dict) and key != "config":
                        results.setdefault(key, {}).update(value)
                    else:
                        results.setdefault(key, value)
    return Evaluated(results, {name: len(questions) for name, questions in model.cut.items()}, failures)


def _add_versions(results: Results) -> None:
    results |= {f"{n}_version": library_version(d) for n, d in (("lm_eval", "lm-eval"), ("transformers",) * 2)}


@contextmanager
def _surroundings_kept(allow_code: bool) -> Iterator[None]:
    """Restore the random generators, which lm-eval seeds, and HF_ALLOW_CODE_EVAL, which `code_eval` needs."""
    import numpy as np
    import torch

    name = "HF_ALLOW_CODE_EVAL"
    before = random.getstate(), np.random.get_state(), torch.get_rng_state(), os.environ.get(name)
    if allow_code:
        os.environ[name] = "1"
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if before[3] is None:
            os.environ.pop(name, None)
