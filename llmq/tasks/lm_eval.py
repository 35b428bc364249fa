"""Any task of EleutherAI's lm-evaluation-harness."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq import trust
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.needs import Needs
from llmq.tasks import harness
from llmq.tasks.harness import Asked
from llmq.trust import WRITTEN
from llmq.types import Answer, Loaded, Task


class LmEval(Task):
    """Tasks of lm-eval by name, on the opened model; metrics keep lm-eval's names and standard errors.

    Questions, prompts and metrics are lm-eval's. A scorer of llmq's own asks the model: what prompts share is computed
    once, and no score depends on the batch size. lm-eval's own files are left in the stage's folder.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    tasks: tuple[str, ...] = Field(min_length=1)
    num_fewshot: int | None = Field(None, ge=0, description="the task's own if unset")
    versions: Mapping[str, float | str] = Field(
        default_factory=dict, description="the task versions that are meant; any other is an error"
    )
    limit: PositiveInt | None = Field(None, description="questions a task at most")
    include_path: Path | None = Field(None, description="a folder with more task files")
    data_dir: Path | None = Field(None, description="copies of data sets: data_dir/owner/name/*.parquet, .json, .jsonl")
    batch_size: PositiveInt | Literal["auto"] = Field("auto", description="texts at once; changes no score")
    apply_chat_template: bool = Field(False, description="ask as a conversation, by the tokenizer's template")
    allow_code: bool = Field(
        False, description="let tasks such as humaneval run what the model writes; the command needs --allow-code, too"
    )

    @property
    def figures_of(self) -> tuple[str, ...]:
        """Its name, for what it says itself, and those of the tasks and groups that it asks."""
        return (self.name, *dict.fromkeys(harness.names_within(self.tasks, self.include_path)))

    def check(self) -> None:
        """Raise `UserError` for a task, a version or a folder that is not there, and for code that is not allowed."""
        self._check_trust()
        for name in ("include_path", "data_dir"):
            if getattr(self, name) and not getattr(self, name).is_dir():
                raise UserError(f"{name} {str(getattr(self, name))!r} is no folder")
        harness.check_names(self.tasks, self.include_path)
        self._asked()
        harness.check_leaves(self.tasks, self.include_path, self.num_fewshot)
        for name, pinned in self.versions.items():
            if name not in self.tasks:
                raise UserError(f"versions: {name!r} is none of the tasks: {', '.join(self.tasks)}")
            found = harness.defined(name, self.include_path)[0].version
            if str(found) != str(pinned) and not _equal(found, pinned):
                raise UserError(f"task {name!r} is pinned at version {pinned}, and the installed lm-eval has {found}")
        for task in () if self.allow_code else harness.leaves(self.tasks, self.include_path):
            if task.says.get("unsafe_code"):
                raise UserError(
                    f"task {task.name!r} runs code that the model writes; allow it with allow_code: true and {WRITTEN}"
                )

    def _check_trust(self) -> None:
        if self.allow_code:
            trust.need_written_code(f"allow_code: true lets {', '.join(self.tasks)} run code that the model writes")

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` where the tokenizer has no chat template, or one that refuses a question."""
        from llmq.data.conversation import rendered
        from llmq.models.hugging_face import load_tokenizer

        if self.apply_chat_template:
            tokenizer = load_tokenizer(base.weights)
            if not tokenizer.chat_template:
                raise UserError(f"apply_chat_template: the tokenizer of {str(base.weights)!r} has none; leave it out")
            rendered(tokenizer, [{"role": "user", "content": "Hello!"}], add_generation_prompt=True)

    def depends(self) -> Mapping[str, Any]:
        """Hashes of every task's settings and data, which are read for it."""
        from llmq.tasks.harness_data import depends

        return depends(self._asked(), self.limit)

    def _asked(self) -> Asked:
        if not trust.remote_code():
            harness.check_plain(self.tasks, self.include_path)
        return Asked(self.tasks, self.include_path, self.data_dir, self.num_fewshot)

    def needs(self) -> Needs:
        """An end of answers; of a text that is too long it cuts the beginning."""
        return Needs(end_mark=True)

    def score(self, loaded: Loaded) -> Iterable[Answer]:
        """What `lm_eval.simple_evaluate` says of the opened module."""
        self._check_trust()
        from llmq.tasks.harness_files import files
        from llmq.tasks.harness_results import measurements
        from llmq.tasks.harness_run import evaluated

        found = evaluated(
            loaded,
            self._asked(),
            None if self.batch_size == "auto" else self.batch_size,
            limit=self.limit,
            apply_chat_template=self.apply_chat_template,
            confirm_run_unsafe_code=self.allow_code,
        )
        if found.results:
            yield from files(found.results, self.name, str(loaded.artifact.weights))
            yield from measurements(found.results, self.limit, found.cut)
        found.end()


def _equal(one: Any, other: Any) -> bool:
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return False
