"""Multiple-choice questions out of real text: which of four real pieces goes on from here?"""

import hashlib
import json
import platform
from pathlib import Path

from datasets import DatasetDict, load_dataset

from llmq.data.pydoc import Pydoc
from llmq.files import cache, write_text

CONTEXT_WORDS, ANSWER_WORDS, CHOICES = 24, 10, 4
VERSION = 1


def load(**_: object) -> DatasetDict:
    """A data set with one split, `test`. lm-eval passes the task's metadata, which is not needed."""
    return load_dataset("json", data_files={"test": str(file())})


def file() -> Path:
    """The questions as JSONL in the cache, written if they are not there yet."""
    path = cache("data", f"pydoc-continuation-{VERSION}-python-{platform.python_version()}.jsonl")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(q) + "\n" for q in questions()))
    return path


def questions() -> list[dict[str, object]]:
    """One question for every 34 words of the held-out reference text; wrong answers are right ones of other topics."""
    pieces: list[tuple[int, str, str]] = []
    for topic, row in enumerate(Pydoc().read().held_out):
        words = [w for w in row["text"].split() if any(c.isalnum() for c in w)]
        size = CONTEXT_WORDS + ANSWER_WORDS
        for start in range(0, len(words) - size + 1, size):
            context, answer = words[start : start + CONTEXT_WORDS], words[start + CONTEXT_WORDS : start + size]
            pieces.append((topic, " ".join(context), " ".join(answer)))
    return [_question(i, pieces) for i in _shuffled(len(pieces), "order")]


def _question(i: int, pieces: list[tuple[int, str, str]]) -> dict[str, object]:
    topic, context, answer = pieces[i]
    others = [pieces[j][2] for j in _shuffled(len(pieces), f"choices {i}") if pieces[j][0] != topic]
    choices = [answer, *others[: CHOICES - 1]]
    order = _shuffled(CHOICES, f"label {i}")
    return {"context": context, "choices": [choices[j] for j in order], "label": order.index(0)}


def _shuffled(n: int, key: str) -> list[int]:
    """A permutation that depends on nothing but its key: `random` may change between Python versions."""
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{key}/{i}".encode()).digest())
