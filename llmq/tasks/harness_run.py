"""Asking an opened model the questions of lm-eval."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llmq.errors import LlmqError, one_line
from llmq.tasks.harness import Asked
from llmq.tasks.harness_data import built, code_of_folders, manager, name_of, quiet, silent
from llmq.types import Loaded


@dataclass(frozen=True)
class Evaluated:
    """lm-eval's results on an opened model, and the tasks and groups that failed, by the names they were asked by."""

    results: Mapping[str, Any]
    cut: Mapping[str, int]
    """For each task the number of questions that lost their beginning, as the model's window is shorter."""
    failures: Mapping[str, Exception]

    def end(self) -> None:
        """Raise the failures, if there are some, as one error."""
        if self.failures:
            told = "; ".join(f"{name}: {one_line(error)}" for name, error in self.failures.items())
            raise LlmqError(told) from next(iter(self.failures.values()))


def evaluated(loaded: Loaded, asked: Asked, batch_size: int | None, **settings: Any) -> Evaluated:
    """What lm-eval says of an opened model, each task or group asked by itself, so that none costs another's answer."""
    from lm_eval import evaluator

    from llmq.tasks.harness_model import HarnessModel

    quiet()
    model = HarnessModel(loaded.module, loaded.processor, loaded.device, batch_size)
    failures: dict[str, Exception] = {}
    merged: dict[str, Any] = {}
    with (
        silent(),
        _briefly(evaluator),
        _dice(),
        _code(bool(settings.get("confirm_run_unsafe_code"))),
        code_of_folders(asked),
    ):
        for task in built(asked):
            try:
                found = evaluator.simple_evaluate(
                    model=model,
                    tasks=[task],
                    num_fewshot=asked.num_fewshot,
                    log_samples=True,
                    task_manager=manager(asked),
                    **settings,
                )
            except Exception as error:  # noqa: BLE001 - a task's own code raises what it likes; `end` raises it
                failures[name_of(task)] = error
            else:
                _merge(merged, found)
    return Evaluated(merged, {name: len(questions) for name, questions in model.cut.items()}, failures)


def _merge(merged: dict[str, Any], found: Mapping[str, Any]) -> None:
    """What is told by task is joined; the rest is the same for all."""
    for key, value in found.items():
        if isinstance(value, dict) and key != "config":
            merged.setdefault(key, {}).update(value)
        else:
            merged.setdefault(key, value)


@contextmanager
def _briefly(evaluator: Any) -> Iterator[None]:
    """Let it record the environment without asking git about the working folder and pip about every package."""
    stock = evaluator.get_git_commit_hash, evaluator.add_env_info
    evaluator.get_git_commit_hash = lambda: None
    evaluator.add_env_info = _add_versions
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, evaluator.add_env_info = stock


def _add_versions(results: dict[str, Any]) -> None:
    from llmq.environment import library_version

    results |= {f"{n}_version": library_version(d) for n, d in (("lm_eval", "lm-eval"), ("transformers",) * 2)}


@contextmanager
def _code(allowed: bool) -> Iterator[None]:
    """The library that runs such code wants the word twice."""
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    if allowed:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            del os.environ["HF_ALLOW_CODE_EVAL"]


@contextmanager
def _dice() -> Iterator[None]:
    """lm-eval seeds every generator there is; afterwards they go on as before."""
    import random

    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
