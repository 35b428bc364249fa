"""Task files of lm-eval that tests write: multiple choice, LAMBADA's and WikiText's kinds, and scorers of their own."""

import json
from pathlib import Path
from typing import Any

import yaml

WORDS = ["statement", "class", "name", "block", "while", "value", "object", "function", "return", "import", "module"]
WORDS += ["string", "list"]


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Questions of three choices, with a text to go with each."""
    return [
        {
            "question": f"The {WORDS[i % 13]} of a {WORDS[(i * 5 + 2) % 13]} is",
            "choices": [f"{WORDS[(i + k * 4) % 13]}" for k in range(3)],
            "answer": i % 3,
            "text": " ".join(WORDS[(i * 7 + k) % 13] for k in range(6 + i)),
        }
        for i in range(count)
    ]


def write(folder: Path, name: str, says: dict[str, Any], data: list[dict[str, Any]] | None = None) -> str:
    """A task file with its data beside it; `!function` where a value says so. Returns the task's name."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data or rows()))
    base = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    text = yaml.safe_dump({**base, **says}, sort_keys=False)
    lines = [
        line.replace("'!function ", "!function ").rstrip("'") if "!function" in line else line
        for line in text.splitlines()
    ]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    return name


def metrics(*names: str, **more: Any) -> list[dict[str, Any]]:
    """A metric list, aggregation and direction left to lm-eval unless `more` says so."""
    return [{"metric": name, **more} for name in names]


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": metrics("acc", "acc_norm"),
}
LAMBADA = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": " {{choices[0]}}",
    "metric_list": metrics("perplexity", "acc"),
}
WIKITEXT = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": metrics("word_perplexity", "byte_perplexity", "bits_per_byte"),
}
