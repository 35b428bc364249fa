"""Greedy answers to held-out prompts, to be read side by side, and the share of answers that come to an end."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from llmq import together
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.plugin import DataWord
from llmq.types import Exhibit, Loaded, Measurement, Needs, Samples, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmq.sketch import Sketch, Work
    from llmq.text.rows import Row


class Generate(Task):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    in_every_process: ClassVar[bool] = True

    data: DataWord = Field(
        "docstrings",
        validate_default=True,
        description="the run's training data, else its calibration data, if unset; without either, this",
    )
    examples: PositiveInt = 3
    max_new_tokens: PositiveInt = Field(48, description="an answer is cut here")
    prompt_tokens: PositiveInt = Field(256, description="longer prompts are passed over")

    def needs(self) -> Needs:
        return Needs("prompt_tokens + max_new_tokens", self.prompt_tokens + self.max_new_tokens, end_mark=True)

    def check_base(self, base: Artifact) -> None:
        from llmq.text.tokenizer import load_tokenizer

        self._rows(load_tokenizer(base.weights), base.weights)

    def foresee(self, stage: "Sketch") -> "Work":
        """A prompt and an answer for each example."""
        from llmq.sketch import times

        return times(stage.timed(self.prompt_tokens, self.max_new_tokens, 1), self.examples)

    def score(self, loaded: Loaded) -> Iterable[Measurement | Exhibit]:
        """The answers to the first held-out prompts that are short enough, and the share that ended."""
        from llmq.text.tokens import shown_prompt

        rows, ended = self._rows(loaded.processor, loaded.artifact.weights), list[float]()
        answers = together.answers_of(partial(_share_of_answers, self, [prompt for _, prompt, _ in rows]), [loaded])
        for (row, _, reference), (answer, is_ended) in zip(rows, answers, strict=True):
            ended.append(float(is_ended))
            yield Exhibit(self.name, f"example {len(ended)}", shown_prompt(row), answer, reference.strip())
        convention = f"share of answers with an end-of-text mark within {self.max_new_tokens} tokens, greedy"
        share, samples = sum(ended) / len(ended), Samples(tuple(ended))
        # So few answers, the first ones and not drawn, have no known spread.
        yield Measurement(self.name, "answers_ended", share, "share", "higher", len(ended), None, convention, samples)

    def _rows(self, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> "list[tuple[Row, tuple[int, ...], str]]":
        """The rows with prompts short enough, each with the tokens of the prompt and the right answer."""
        from llmq.text.tokenizer import end_marks
        from llmq.text.tokens import prompt_and_reference

        fitting = []
        ends = end_marks(folder)
        for row in self.data.read().held_out:
            prompt, reference = prompt_and_reference(row, tokenizer, ends)
            if 0 < len(prompt) <= self.prompt_tokens:
                fitting.append((row, prompt, reference))
            if len(fitting) == self.examples:
                break
        if not fitting:
            raise UserError(f"{self.data.word} has no held-out prompt of at most {self.prompt_tokens} tokens")
        return fitting

    def _answer(self, loaded: Loaded, prompt: tuple[int, ...]) -> tuple[str, bool]:
        import torch

        from llmq.text.decoding import STEERING, end_marks

        ends = end_marks(loaded.module, loaded.processor)
        ids = torch.tensor([prompt], device=loaded.device)  # (1, tokens)
        with torch.inference_mode():
            written = loaded.module.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                **STEERING,  # greedy, whatever penalties and beams the model's own settings have
                pad_token_id=loaded.processor.pad_token_id,
                eos_token_id=sorted(ends) or None,
            )
        new = written[0, len(prompt) :]  # `generate` returns the prompt, too
        text = loaded.processor.decode(new, skip_special_tokens=True).strip()
        return text, not ends.isdisjoint(new.tolist())


def _share_of_answers(
    task: Generate, prompts: Sequence[tuple[int, ...]], models: Sequence[Loaded], share: together.Share
) -> dict[int, tuple[str, bool]]:
    return {i: task._answer(models[0], prompts[i]) for i in share.of(range(len(prompts)))}
