"""Recipes that were changed by accident or on purpose, and words on the command line: `llmq check`."""

import functools
import json
import random
from pathlib import Path

import yaml

from torture import mutate
from torture.child import command, judge, warm_words

warm = warm_words

PIECES = [
    "&a ", "*a", "!!bool ", "!!python/object:os.system ", "!!float ", "!!binary ", "!!set ", "!!omap ", "<<: *a\n",
    "? ", "- ", ": ", "{", "}", "[", "]", "|\n", ">\n", "'", '"', "#", "---\n", "...\n", "%YAML 1.2\n", "\t",
    "\x1b[31m",
    "~", "null", ".inf", ".nan", "1_0:59:59.9", "0o17", "0x" + "f" * 400, "9" * 5000, "2001-13-01", "2001-01-01",
    "é", "\u2028", "\ufeff", "=", "@x", "`x", "[" * 5000, "{a: " * 200, "- - " * 200, "\0",
]  # fmt: skip
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@functools.cache
def _bundled() -> list[str]:
    from llmq.files import bundled

    return [f.read_text(encoding="utf-8") for f in sorted(bundled("recipes").glob("*/*.yaml"))]


def once(seed: int, folder: Path) -> str:
    """One recipe, checked as the command does."""
    dice = random.Random(f"recipes {seed}")
    text = dice.choice(_bundled())
    kind = dice.randrange(10)
    if kind < 4:
        text = yaml.safe_dump(mutate.of_data(yaml.safe_load(text), dice), allow_unicode=True, sort_keys=False)
    elif kind < 8:
        for _ in range(dice.randint(1, 3)):
            place = dice.randrange(len(text))
            cut = dice.choice([0, 0, 1, 5, 40])
            text = text[:place] + dice.choice(PIECES) + text[place + cut :]
    elif kind == 8:
        text = _large(text, dice)
    (folder / "r.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    if kind == 9:
        (folder / "r.yaml").write_bytes(mutate.of_bytes(text.encode(), dice))
    if dice.random() < 0.05:
        mutate.of_file(folder / "r.yaml", dice)
    words = [_override(dice) for _ in range(dice.choice([0, 0, 0, 1, 2]))]
    return judge(command(["check", "r.yaml", *words, *dice.choice([[], [], ["--json"]])], folder), seed)


def _large(text: str, dice: random.Random) -> str:
    kind = dice.randrange(5)
    if kind == 0:
        return BOMB + text
    if kind == 1:
        return text + "steps:\n" + dice.choice(["- quantize.bnb\n", "- x\n", "- {a: b}\n"]) * dice.choice([300, 30_000])
    if kind == 2:
        return "model: " + dice.choice("[{") * dice.choice([40, 5000]) + "\n" + text
    if kind == 3:
        return text + "\nevaluate: [" + ", ".join(["size"] * 3000) + "]\n"
    return "x: &x [*x]\n" + text


def _override(dice: random.Random) -> str:
    keys = [
        "seed",
        "adapt.lora.r",
        "adapt.lora.data",
        "model.weights",
        "steps",
        "evaluate",
        "model",
        "x.y",
        "",
        "a.b.c",
    ]
    values = [json.dumps(dice.choice(mutate.VALUES)), dice.choice(PIECES).replace("\0", ""), str(dice.randrange(99))]
    word = f"{dice.choice(keys)}{dice.choice(['=', '=', '=', '', '=='])}{dice.choice(values)[:6000]}"
    return "x" + word if word.startswith("-") else word
