"""Runs on a Ray cluster, whose machines see the folders of the runs under the same paths and have the same llmq."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq import answers, processes
from llmq.errors import LlmqError, UserError, one_line
from llmq.terminal import say

if TYPE_CHECKING:
    from llmq.recipe import Recipe

LOCAL = "local"
"""The address of a cluster that is started on this machine for as long as it is needed."""
LOST = -9
"""The exit code of a run whose worker or machine ended, as of a process that was killed."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process has joined."""

    ray: Any

    @property
    def at_once(self) -> int:
        """The processors of all machines: the most runs that make sense at once."""
        return max(1, int(self.ray.cluster_resources().get("CPU", 1)))

    def run(self, words: Sequence[str], log: Path, recipe: Recipe) -> int:
        """The exit code of `llmq` with `words` on a machine that has room; `LOST` where machine or worker ends.

        Raises `UserError` for a run that no machine has room for, and `LlmqError` where the run cannot be started.
        """
        task = self.ray.remote(max_retries=0, **self._needs(recipe))(_run_here)
        try:
            return int(self.ray.get(task.remote(words, str(log), os.getcwd(), answers.own_code())))
        except self.ray.exceptions.RayTaskError as error:
            raise LlmqError(f"a run did not start on the cluster: {one_line(error.cause or error)}") from None
        except self.ray.exceptions.RayError as error:
            say(f"{log.stem}: its worker is lost ({type(error).__name__}); the cluster has others")
            return LOST

    def _needs(self, recipe: Recipe) -> dict[str, float]:
        """The processors and cards of a run, and the memory that `llmq plan` foretells where it can."""
        machines: list[Mapping[str, float]] = [n["Resources"] for n in self.ray.nodes() if n["Alive"]]
        card = recipe.device.startswith("cuda") or (recipe.device == "auto" and any("GPU" in m for m in machines))
        needs = {"CPU": float(recipe.threads or 1), **({"GPU": 1.0} if card else {})}
        if not any(all(m.get(kind, 0) >= count for kind, count in needs.items()) for m in machines):
            told = " and ".join(f"{count:g} {kind}" for kind, count in needs.items())
            raise UserError(f"no machine of the cluster has {told}, which a run needs; set threads or device")
        memory = min(foretold_memory(recipe), max(m.get("memory", 0) for m in machines))  # a run refuses what is small
        return {"num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0), "memory": memory}


@contextmanager
def joined(address: str) -> Iterator[Cluster]:
    """Join the cluster of an address (`auto`, `host:port`, `ray://…`), or start one here (`local`), until the end.

    Raises `UserError` without Ray, or where no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError("a cluster needs Ray: pip install ray; without --ray runs follow one another here") from None
    here = address == LOCAL
    try:
        ray.init(
            address="local" if here else address,
            log_to_driver=False,
            logging_level="ERROR",
            **({"include_dashboard": False} if here else {}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: no cluster answers: {one_line(error)}") from None
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


def _run_here(words: Sequence[str], log: str, folder: str, code: str) -> int:
    """Run `llmq` in a process of its own on the machine of a worker; returns the exit code."""
    if answers.own_code() != code:
        raise LlmqError("this machine has another llmq than the one that asks; install the same")
    with Path(log).open("a", encoding="utf-8") as told:
        return subprocess.run(
            [sys.executable, "-m", "llmq", *words], stdout=told, stderr=subprocess.STDOUT, cwd=folder, check=False,
            preexec_fn=processes.end_with_parent,
        ).returncode  # fmt: skip


def foretold_memory(recipe: Recipe) -> int:
    """The bytes of memory that a run takes at its peak, as far as its configuration tells; 0 if not at all."""
    from llmq import planning

    try:
        peak = planning.plan(recipe, rates=defaultdict(lambda: 1.0)).peak_memory
    except Exception as error:  # noqa: BLE001 - a network that runs may be one that cannot be foretold
        say(f"{recipe.name}: not foretold: {one_line(error)}")
        return 0
    return 0 if peak is None else int(peak + planning.LIBRARIES)
