"""A conversation with an open language model: its turns, the answers as they grow, and room for the next."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.terminal import say
from llmq.text.decoding import end_marks
from llmq.text.messages import Message
from llmq.text.prompting import Prompting
from llmq.text.streaming import Reader, pieces, stream
from llmq.text.tokenizer import positions
from llmq.types import Loaded

if TYPE_CHECKING:
    from llmq.text.answering import Answering


class Dialogue:
    """One model's side of a conversation. Without a chat template the turns and answers are one growing text."""

    def __init__(self, name: str, loaded: Loaded, how: "Answering"):
        self.name, self.loaded, self.how = name, loaded, how
        self.prompting = Prompting(loaded.processor, how.raw, how.system)
        self.limit = positions(loaded.module)
        self.ends = end_marks(loaded.module, loaded.processor)
        self.reader = Reader(loaded.module, loaded.device)
        self.turns: list[Message] = []

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = []

    @property
    def last(self) -> str:
        """The last answer."""
        return str(self.turns[-1]["content"]) if self.turns else ""

    def answer(self, turn: str) -> Iterator[str]:
        """The answer to a turn, piece by piece; what was written by the time that the caller stops is remembered.

        Raises `UserError` for a turn that the model cannot take; the turn is forgotten then.
        """
        before, answer = self.turns, ""
        self.turns = [*before, {"role": "user", "content": turn}]
        try:
            ids = self._fitting()
        except UserError:
            self.turns = before
            raise
        most = min(self.how.max_new_tokens, self.limit - len(ids)) if self.limit else self.how.max_new_tokens
        pick = self.how.sampling.picker(ids)
        tokens = stream(self.reader, ids, most, pick, self.ends)
        try:
            for piece in pieces(tokens, lambda ids: str(self.loaded.processor.decode(ids, skip_special_tokens=True))):
                answer += piece
                yield piece
        finally:
            self.turns.append({"role": "assistant", "content": answer})

    def _fitting(self) -> tuple[int, ...]:
        """The tokens of the conversation, without the oldest turns where there is no room to answer; it says so."""
        dropped = 0
        while True:
            ids = self._ids()
            room = min(self.how.max_new_tokens, self.limit // 2) if self.limit else 0
            if not self.limit or len(ids) + room <= self.limit:
                break
            if len(self.turns) == 1:
                raise UserError(f"the turn has {len(ids)} tokens, and {self.limit - room} at most leave room to answer")
            self.turns, dropped = self.turns[2:], dropped + 1  # a turn and its answer
        if dropped:
            say(f"{self.name}: the oldest {'turn is' if dropped == 1 else f'{dropped} turns are'} forgotten: no room")
        return ids

    def _ids(self) -> tuple[int, ...]:
        if self.prompting.templated:
            return self.prompting.conversation(self.turns)
        ids = self.prompting.plain("\n".join(str(turn["content"]) for turn in self.turns))
        if not ids:
            raise UserError("the text has no tokens")
        return ids
