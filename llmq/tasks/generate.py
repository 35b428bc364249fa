"""What a model writes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.data.rows import Row
from llmq.needs import Needs
from llmq.plugin import DataWord
from llmq.types import Exhibit, Loaded, Measurement, Samples, Task


class Generate(Task):
    """Greedy answers to held-out prompts, to be read side by side, and how many of them come to an end."""

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    data: DataWord = Field(
        "docstrings",
        validate_default=True,
        description="what the run trains on, else calibrates on, if unset; where it does neither, this",
    )
    examples: PositiveInt = 3
    max_new_tokens: PositiveInt = Field(48, description="an answer is cut here")
    prompt_tokens: PositiveInt = Field(256, description="longer prompts are passed over")

    def needs(self) -> Needs:
        """Positions for the longest prompt and its answer, and an end of answers."""
        return Needs("prompt_tokens + max_new_tokens", self.prompt_tokens + self.max_new_tokens, end_mark=True)

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for data without a prompt that is short enough."""
        from llmq.models.hugging_face import load_tokenizer

        self._rows(load_tokenizer(base.weights), base.weights)

    def score(self, loaded: Loaded) -> Iterable[Measurement | Exhibit]:
        """The first held-out prompts that are short enough, answered."""
        from llmq.data.tokens import shown_prompt

        ended = []
        for row, prompt, reference in self._rows(loaded.processor, loaded.artifact.weights):
            answer, is_ended = self._answer(loaded, prompt)
            ended.append(float(is_ended))
            yield Exhibit(self.name, f"example {len(ended)}", shown_prompt(row), answer, reference.strip())
        share = sum(ended) / len(ended)
        convention = f"share of answers with an end-of-text mark within {self.max_new_tokens} tokens, greedy"
        yield Measurement(
            self.name, "answers_ended", share, "share", "higher", len(ended), None, convention, Samples(tuple(ended))
        )

    def _rows(self, tokenizer: Any, folder: Path) -> list[tuple[Row, tuple[int, ...], str]]:
        """Rows whose prompts are short enough, each with its prompt and the right answer."""
        from llmq.data.tokens import prompt_and_reference
        from llmq.errors import UserError
        from llmq.models.hugging_face import end_marks

        fitting: list[tuple[Row, tuple[int, ...], str]] = []
        ends = end_marks(folder)
        for row in self.data.read().held_out:
            prompt, reference = prompt_and_reference(row, tokenizer, ends)
            if 0 < len(prompt) <= self.prompt_tokens:
                fitting.append((row, prompt, reference))
            if len(fitting) == self.examples:
                return fitting
        if not fitting:
            raise UserError(f"{self.data.word} has no held-out prompt of at most {self.prompt_tokens} tokens")
        return fitting

    def _answer(self, loaded: Loaded, prompt: tuple[int, ...]) -> tuple[str, bool]:
        import torch

        ends = {loaded.processor.eos_token_id, *_as_list(loaded.module.generation_config.eos_token_id)} - {None}
        ids = torch.tensor([prompt], device=loaded.device)
        with torch.inference_mode():
            made = loaded.module.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=loaded.processor.pad_token_id,
                eos_token_id=sorted(ends) or None,
            )
        new = made[0, len(prompt) :]
        text = loaded.processor.decode(new, skip_special_tokens=True).strip()
        return text, not ends.isdisjoint(new.tolist())


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
