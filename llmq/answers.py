"""Answers of tasks, kept from run to run: the same question to the same model is asked once.

An answer is filed under the hash of everything that decides it: every byte of the model, the task's settings and data,
llmq's own code, the libraries, the processor, threads and seed. These facts are written beside the answer and compared
at the next look-up, so that no answer to another question is taken.
"""

import base64
import json
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import llmq
from llmq import environment, files, plugin, together, trust
from llmq.artifact import Artifact
from llmq.files import sha256
from llmq.terminal import say
from llmq.types import Answer, Attachment, Data, Exhibit, JsonObject, Loaded, Measurement, Task


class AnswerCache:
    """Answers about one stage, alone or beside the base: kept ones, or new ones of models opened on demand."""

    def __init__(self, artifact: Artifact, base: Artifact, device: str, keep: bool = True):
        self.artifact, self.base, self.device, self.keep = artifact, base, device, keep
        self.reused: list[str] = []
        """The tasks whose answers were kept from an earlier run."""
        self.unopened: Exception | None = None
        """The error that kept a model from opening; no task is at fault for it."""
        self._opened = ExitStack()

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._opened.close()

    @cached_property
    def _loaded(self) -> Loaded:
        return self._open(self.artifact)

    @cached_property
    def _other(self) -> Loaded:
        return self._open(self.base)

    def _open(self, artifact: Artifact) -> Loaded:
        try:
            return self._opened.enter_context(together.opened(artifact, self.device))
        except Exception as error:
            self.unopened = error
            raise

    @cached_property
    def _model(self) -> JsonObject:
        return describe(self.artifact)

    @cached_property
    def _base_model(self) -> JsonObject:
        return describe(self.base)

    def score(self, name: str, task: Task) -> Iterator[Answer]:
        """The answers of a task about the stage alone."""
        if type(task).score is not Task.score:
            yield from self._once(name, task, lambda: self._told(task.score(self._loaded)), lambda: (self._model,))

    def against(self, name: str, task: Task) -> Iterator[Answer]:
        """The answers of a task about the stage beside the base."""
        yield from self._once(
            name,
            task,
            lambda: self._told(task.against(self._loaded, self._other)),
            lambda: (self._model, self._base_model),
        )

    def _told(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """The answers, with the runtime of the stage in each convention that does not say it."""
        runs_in = self.artifact.model.runs_in(self._loaded)
        for answer in answers:
            if isinstance(answer, Measurement) and not answer.exact and runs_in not in answer.convention:
                answer = replace(answer, convention=f"{answer.convention}; {runs_in}")
            yield answer

    def _once(
        self, name: str, task: Task, answer: Callable[[], Any], models: Callable[[], tuple[Any, ...]]
    ) -> Iterator[Answer]:
        depends = task.depends() if self.keep else None
        if depends is None:
            yield from answer()
            return
        read_by = {".".join(map(str, at)): d.read().sha256 for at, d in task.parts() if isinstance(d, Data)}
        facts = {
            "task": settings(task),
            "depends": {**read_by, **depends},
            "models": models(),
            "machine": machine(self.device),
        }
        kept = read(facts)
        if kept is not None:
            self.reused.append(name)
            yield from kept
            return
        answers: list[Answer] = []
        for each in answer():  # one by one: answers before a failure reach the report, but not the cache
            answers.append(each)
            yield each
        if task.depends() == depends:  # else the hash lacks a helper or file that was first used while answering
            write(facts, answers)


def settings(part: Any) -> JsonObject:
    """A word with all settings, words within the settings included."""
    return {part.word: {"set": plugin.to_plain(part), "all": part.model_dump(mode="json")}}


def describe(artifact: Artifact) -> JsonObject:
    """The facts that identify a model: the hash of every file, and the settings that open the model."""
    # Notes are left out: they hold times, and no task reads them.
    return {
        "model": settings(artifact.model),
        "runtime": artifact.runtime,
        "packed": artifact.packed,
        "history": artifact.history,
        "weights": contents(artifact.weights),
        "adapter": contents(artifact.adapter) if artifact.adapter else {},
    }


def contents(place: Path) -> dict[str, str]:
    """The hash of every file in a folder, without those that llmq wrote about the folder; or of a single file."""
    if place.is_file():
        return {place.name: sha256(place)}
    found = sorted(f for f in place.rglob("*") if f.is_file() and f.relative_to(place).parts[0] not in files.BESIDE)
    return {str(f.relative_to(place)): sha256(f) for f in found}


def machine(device: str) -> JsonObject:
    """The facts besides the model and the task that decide a figure: machine, libraries, seed, code, trust."""
    import torch

    return {
        "device": device,
        "accelerator": environment.accelerator(device),
        "processor": environment.processor(device),
        "threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
        "python": platform.python_version(),
        "libraries": {name: environment.library_version(name) for name in environment.LIBRARIES},
        "llmq": own_code(),
        "trusted": trust.told(),  # a folder may bring code beside a class of the same network
    }


@cache
def own_code() -> str:
    """One hash over all Python files of llmq."""
    root = Path(llmq.__file__).parent
    return files.sha256_text(*(f"{f.relative_to(root)} {sha256(f)}" for f in sorted(root.rglob("*.py"))))


def place(facts: JsonObject) -> Path:
    """The file in the cache for an answer with these facts."""
    return files.cache("answers", f"{files.sha256_text(_text(facts))}.json")


def _text(facts: JsonObject) -> str:
    return json.dumps(facts, sort_keys=True, default=str)


def read(facts: JsonObject) -> list[Answer] | None:
    """The answers that are kept for these facts, or None."""
    file = place(facts)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["facts"] != json.loads(_text(facts)):
            return None
        return [_answer(entry) for entry in data["answers"]]
    except (OSError, ValueError, KeyError, TypeError):  # missing, damaged or of an older format: asked again
        return None


def write(facts: JsonObject, answers: list[Answer]) -> None:
    """Write answers to the cache under their facts; a cache that cannot be written is reported once."""
    file = place(facts)
    entries = [{"is": type(a).__name__, **_plain(a)} for a in answers]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(file, {"facts": json.loads(_text(facts)), "answers": entries})
    except OSError as error:
        _say_unkept(file.parent, str(error.strerror))


@cache
def _say_unkept(folder: Path, why: str) -> None:
    say(f"  answers are not kept for other runs: {folder}: {why}")


def _plain(answer: Answer) -> JsonObject:
    data = asdict(answer)
    if isinstance(answer, Exhibit):
        data["picture"] = base64.b64encode(answer.picture).decode()
    return data


def _answer(entry: JsonObject) -> Answer:
    data = {k: v for k, v in entry.items() if k != "is"}
    if entry["is"] == Exhibit.__name__:
        return Exhibit(**{**data, "picture": base64.b64decode(data["picture"])})
    return Attachment(**data) if entry["is"] == Attachment.__name__ else Measurement.of(data)
