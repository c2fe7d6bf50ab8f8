"""`python -m armorfact_hf`, and the command `armorfact`."""

import sys

from armorfact_hf.cli.signals import ended_by_signals

INTERRUPTED = "Interrupted."
CONTINUES = {
    "prune": "Interrupted; the same command continues from the last finished layer.",
    "teach": "Interrupted; the same command continues from the last finished window.",
    "recover": "Interrupted; the same command continues from the last step that was kept.",
}


def main() -> None:
    """Run the command line; without the packages or the memory that it needs, say so."""
    command = "" if "--dry-run" in sys.argv else "".join(sys.argv[1:2])
    with ended_by_signals(CONTINUES.get(command, INTERRUPTED)):
        try:
            _run()
        except MemoryError as error:
            what = str(error) or "none is left"
            sys.exit(f"Error: this takes more memory than there is ({what}): end other programs")


def _run() -> None:
    try:
        from armorfact_hf.cli.commands import app
    except ImportError as error:
        sys.exit(f"the command line needs more packages ({error}): pip install 'armorfact[hf]'")
    app(prog_name="armorfact")


if __name__ == "__main__":
    main()
