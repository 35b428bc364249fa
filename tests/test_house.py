"""The house: every folder means one thing, and imports run one way."""

import ast
from functools import cache
from pathlib import Path

import llmq
from llmq import plugin, words

ROOT = Path(llmq.__file__).parent
ENGINES = ("matrix", "statistics", "text", "vision", "harness")
LAYERS = 11
"""Modules that stand on one another, from the ground up."""


def name_of(file: Path) -> str:
    """A module's name without `llmq.`; that of a folder is its `__init__`'s."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(file): file for file in ROOT.rglob("*.py") if file.parent != ROOT or file.name != "__init__.py"}


def under_type_checking(tree: ast.AST) -> set[int]:
    """The nodes below `if TYPE_CHECKING:`, which import nothing when the code runs."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    return {id(n) for block in blocks for n in ast.walk(block)}


@cache
def imports_of(name: str) -> frozenset[str]:
    """The modules of llmq that a module imports anywhere in its code."""
    tree = ast.parse(FILES[name].read_text())
    unseen = under_type_checking(tree)
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in unseen:
            named |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import) and id(node) not in unseen:
            named |= {alias.name for alias in node.names}
    known = {module.removeprefix("llmq.") for module in named} & FILES.keys()
    # `from llmq.text import names` needs the module, not its folder.
    return frozenset(m for m in known if m != name and not any(other.startswith(f"{m}.") for other in known))


def test_no_circle_of_imports_and_few_layers():
    heights: dict[str, int] = {}

    def height(name: str, above: tuple[str, ...]) -> int:
        assert name not in above, " > ".join((*above[above.index(name) :], name))
        if name not in heights:
            heights[name] = 1 + max((height(other, (*above, name)) for other in imports_of(name)), default=0)
        return heights[name]

    for name in FILES:
        height(name, ())
    highest = max(heights, key=heights.__getitem__)
    assert heights[highest] <= LAYERS, f"{highest} stands in layer {heights[highest]}"


def room_of(name: str) -> str:
    """The folder of a module; that of one at the top is its own name."""
    return name.split(".")[0]


FORBIDDEN = {
    "types": set(words.PACKAGES) | set(ENGINES) | {"judge", "report", "artifact", "plugin"},
    "matrix": {"text", "vision", "harness", "judge", "report", "statistics"},
    "statistics": {"text", "vision", "harness", "judge", "report", "matrix"},
    "text": {"vision", "harness", "judge", "report"},
    "vision": {"text", "harness", "judge", "report"},
    "harness": {"vision", "judge", "report"},
    "judge": {"report", "pipeline", "questions", "cli"},
    "report": {"pipeline", "questions", "cli"},
    "pipeline": {"cli"},
}


def test_arrows_run_one_way():
    known = set(plugin.words())
    against: list[str] = []
    for name in FILES:
        word = next((w for w in known if name == w or name.startswith(f"{w}.")), "")
        for other in imports_of(name):
            of_word = next((w for w in known if other == w or other.startswith(f"{w}.")), "")
            upwards = room_of(other) in FORBIDDEN.get(room_of(name), set())
            if upwards or (of_word and of_word != word):
                against.append(f"{name} -> {other}")
    assert not against, against
