"""Tasks of lm-eval by name, on the opened model; metrics keep lm-eval's names and standard errors.

Questions, prompts and metrics are lm-eval's. A scorer of llmq's own asks the model: a shared beginning of prompts is
computed once, and no score depends on the batch size. lm-eval's own files are left in the stage's folder.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq import trust
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.harness.names import Asked, defined
from llmq.types import Answer, Loaded, Needs, Task

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work


class LmEval(Task):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    in_every_process: ClassVar[bool] = True

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

    def _asked(self) -> Asked:
        return Asked(self.tasks, self.include_path, self.data_dir, self.num_fewshot)

    @property
    def figures_of(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.name, *self.tasks, *(d.name for d in self._asked().definitions()))))

    def check(self) -> None:
        self._check_trust()
        for name in ("include_path", "data_dir"):
            if getattr(self, name) and not getattr(self, name).is_dir():
                raise UserError(f"{name} {str(getattr(self, name))!r} is no folder")
        self._asked().check()
        for name, pinned in self.versions.items():
            if name not in self.tasks:
                raise UserError(f"versions: {name!r} is none of the tasks: {', '.join(self.tasks)}")
            installed = defined(name, self.include_path)[0].version
            # Versions are numbers or texts: 1 and "1.0" are one version.
            if str(installed) != str(pinned) and not _equal(installed, pinned):
                raise UserError(
                    f"task {name!r} is pinned at version {pinned}, and the installed lm-eval has {installed}"
                )
        # Groups are resolved: a task within one may run code, too.
        for task in () if self.allow_code else self._asked().leaves():
            if task.says.get("unsafe_code"):
                raise UserError(
                    f"task {task.name!r} runs code that the model writes; "
                    f"allow it with allow_code: true and {trust.WRITTEN}"
                )

    def _check_trust(self) -> None:
        if self.allow_code:
            trust.need_written_code(f"allow_code: true lets {', '.join(self.tasks)} run code that the model writes")

    def check_base(self, base: Artifact) -> None:
        from llmq.text.conversation import rendered
        from llmq.text.tokenizer import load_tokenizer

        if self.apply_chat_template:
            tokenizer = load_tokenizer(base.weights)
            if not tokenizer.chat_template:
                raise UserError(f"apply_chat_template: the tokenizer of {str(base.weights)!r} has none; leave it out")
            rendered(tokenizer, [{"role": "user", "content": "Hello!"}], add_generation_prompt=True)

    def depends(self) -> Mapping[str, str]:
        from llmq.harness.data import depends

        return depends(self._asked(), self.limit)

    def needs(self) -> Needs:
        """A token that ends answers, and no positions: a text that is too long loses the beginning."""
        return Needs(end_mark=True)

    def foresee(self, stage: "Sketch") -> "Work":
        """Questions in rows of at most 2,048 tokens, of which every fourth has logits; their lengths are assumed."""
        from llmq.sketch import Work, times
        from llmq.text.sizing.network import as_text
        from llmq.text.sizing.work import LM_EVAL_ROW, QUESTION, forward

        model = as_text(stage)
        questions = (self.limit or 0) * len(self.tasks)
        tokens = min(LM_EVAL_ROW, max(1, questions) * QUESTION) if self.limit else LM_EVAL_ROW
        once = forward(model, 1, tokens, tokens // 4)
        unknown = "" if self.limit else "lm_eval counts its questions when it reads them; set limit"
        return times(once, questions * QUESTION / tokens).plus(Work(0, {}, 2.0, unknown=unknown))

    def score(self, loaded: Loaded) -> Iterable[Answer]:
        self._check_trust()
        from llmq.harness.results import files, measurements
        from llmq.harness.run import evaluated

        size = None if self.batch_size == "auto" else self.batch_size
        chat = self.apply_chat_template
        run = evaluated(loaded, self._asked(), size, self.allow_code, limit=self.limit, apply_chat_template=chat)
        if run.results:
            yield from files(run.results, self.name, str(loaded.artifact.weights))
            yield from measurements(run.results, self.limit, run.cut)
        run.end()


def _equal(one: object, other: object) -> bool:
    try:
        return float(str(one)) == float(str(other))
    except ValueError:
        return False
