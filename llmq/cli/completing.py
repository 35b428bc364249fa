"""The names that a shell completes: recipes, words, suites, runs, stages. Nothing is imported but what lists them."""

from collections.abc import Callable, Iterable
from pathlib import Path


def _begun(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """The bundled recipes that begin so."""
    from llmq.source import names

    return _begun(names("recipes"), incomplete)


def sweeps(incomplete: str) -> list[str]:
    """The bundled sweeps that begin so."""
    from llmq.source import names

    return _begun(names("sweeps"), incomplete)


def suites(incomplete: str) -> list[str]:
    """The bundled suites that begin so."""
    from llmq.source import names

    return _begun(names("evals"), incomplete)


def words_of(package: str) -> Callable[[str], list[str]]:
    """The words of a folder that begin so, without its name: `gptq` of `quantize`."""

    def found(incomplete: str) -> list[str]:
        from llmq.words import words

        return _begun((w.partition(".")[2] for w in words() if w.startswith(f"{package}.")), incomplete)

    return found


def kinds(incomplete: str) -> list[str]:
    """The kinds of words that begin so."""
    from llmq.source import KINDS
    from llmq.words import PACKAGES

    return _begun([*PACKAGES, *KINDS], incomplete)


def shown(incomplete: str) -> list[str]:
    """The words, recipes, suites and runs that begin so."""
    from llmq import listing

    return [*_begun((n for names in listing.everything().values() for n in names), incomplete), *runs(incomplete)]


def runs(incomplete: str) -> list[str]:
    """The folders under runs/ that begin so."""
    return _begun((str(folder) for folder in sorted(Path("runs").glob("*/"))), incomplete)


def stages(incomplete: str) -> list[str]:
    """The runs that begin so, and the stages of a run that is named."""
    of_runs = (str(file.parent) for file in sorted(Path("runs").glob("*/[0-9]*-*/artifact.json")))
    return [*runs(incomplete), *(_begun(of_runs, incomplete) if incomplete.count("/") > 1 else ())]
