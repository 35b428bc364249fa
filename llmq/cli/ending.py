"""The last line and the exit code of a command that failed."""

import os
import sys
from contextlib import suppress

from llmq import errors


def failed(error: BaseException) -> tuple[str, int]:
    """An error that llmq did not raise, as one line that names the file with the traceback; and the exit code."""
    from llmq import terminal
    from llmq.files import cache

    code, line = errors.exit_code(error), errors.line_of(error)
    if code == 4 and not errors.is_stream(error):
        with suppress(OSError, RuntimeError):
            place = cache("log.txt")
            if not terminal.kept_traceback(error):
                place.parent.mkdir(parents=True, exist_ok=True)
                terminal.keep_traceback(error, place)
        kept = terminal.kept_traceback(error)
        line += f" (traceback: {kept})" if kept else ""
    return line, code


def tell(line: str) -> None:
    """Print the last line where it can be printed; streams that are full or closed are not flushed again."""
    with suppress(OSError, ValueError, AttributeError):
        if line:
            print(f"llmq: {errors.brief(line)}", file=sys.stderr, flush=True)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
