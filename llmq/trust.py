"""Code of a folder or a model runs only if a flag of this very command allows it.

A folder may be hostile: no recipe and no `artifact.json` in a folder can allow code to run.
"""

from llmq.errors import UserError

REMOTE, WRITTEN = "--trust-remote-code", "--allow-code"
TOLD = {
    REMOTE: "Python that folders brought was allowed to run",
    WRITTEN: "code that a model wrote was allowed to run",
}
_open: set[str] = set()


def given(remote_code: bool = False, written_code: bool = False) -> None:
    """Set the trust of this command in code of folders, and in code that a model writes."""
    _open.clear()
    _open.update(flag for flag, said in ((REMOTE, remote_code), (WRITTEN, written_code)) if said)


def remote_code() -> bool:
    """True where Python that lies in a folder, or on the hub, may run."""
    return REMOTE in _open


def written_code() -> bool:
    """True where code that a model writes may run; trusted code of a folder may do as much."""
    return bool(_open)


def need_remote_code(what: str) -> None:
    """Raise `UserError` unless Python that a folder brings may run; `what` names that code."""
    if not remote_code():
        raise UserError(f"{what}; where you trust it, say so on this command: {REMOTE}")


def need_written_code(what: str) -> None:
    """Raise `UserError` unless code that a model writes may run; `what` names that code."""
    if not written_code():
        raise UserError(f"{what}; where you trust it, say so on this command: {WRITTEN}")


def told() -> list[str]:
    """A line for each flag that is given."""
    return [f"{flag}: {TOLD[flag]}" for flag in sorted(_open)]
