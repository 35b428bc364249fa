"""Code that a folder or a model brings: it runs only where a flag of this very command says so.

What lies in a folder may be hostile: that its recipe or its `artifact.json` asks for its code to run opens nothing.
"""

from llmq.errors import UserError

REMOTE, WRITTEN = "--trust-remote-code", "--allow-code"
TOLD = {
    REMOTE: "Python that folders brought was allowed to run",
    WRITTEN: "code that a model wrote was allowed to run",
}
_open: set[str] = set()


def given(remote_code: bool = False, written_code: bool = False) -> None:
    """What this command was told to trust, from here on: code of folders, and code that a model writes."""
    _open.clear()
    _open.update(flag for flag, said in ((REMOTE, remote_code), (WRITTEN, written_code)) if said)


def remote_code() -> bool:
    """Whether Python that lies in a folder, or on the hub, may run."""
    return REMOTE in _open


def written_code() -> bool:
    """Whether code that a model writes may run; that of its folder may do all that this may."""
    return bool(_open)


def need_remote_code(what: str) -> None:
    """Raise `UserError` unless Python that a folder brings may run; `what` says which would."""
    if not remote_code():
        raise UserError(f"{what}; where you trust it, say so on this command: {REMOTE}")


def need_written_code(what: str) -> None:
    """Raise `UserError` unless code that a model writes may run; `what` says which would."""
    if not written_code():
        raise UserError(f"{what}; where you trust it, say so on this command: {WRITTEN}")


def told() -> list[str]:
    """A line for each flag that is given."""
    return [f"{flag}: {TOLD[flag]}" for flag in sorted(_open)]
