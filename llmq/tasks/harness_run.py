"""Asking an opened model the questions of lm-eval."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmq.tasks.harness_data import Asked, built, manager, quiet, silent
from llmq.types import Loaded


def evaluated(loaded: Loaded, asked: Asked, batch_size: int | None, **settings: Any) -> dict[str, Any]:
    """lm-eval's results on an opened model."""
    from lm_eval import evaluator

    from llmq.tasks.harness_model import HarnessModel

    quiet()
    model = HarnessModel(loaded.module, loaded.processor, loaded.device, batch_size)
    with silent(), _briefly(evaluator), _dice(), _code(bool(settings.get("confirm_run_unsafe_code"))):
        results: dict[str, Any] = evaluator.simple_evaluate(
            model=model,
            tasks=list(built(asked)),
            num_fewshot=asked.num_fewshot,
            log_samples=True,
            task_manager=manager(asked),
            **settings,
        )
    return results


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
