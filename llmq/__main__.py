"""`llmq` and `python -m llmq`."""

from llmq import stopping


def main() -> None:
    """The entry point. A signal is answered in one line even while the command line is imported."""
    with stopping.handled(until_exit=True):
        from llmq import cli

        cli.main()


if __name__ == "__main__":
    main()
