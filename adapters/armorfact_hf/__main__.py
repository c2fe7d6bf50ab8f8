"""`python -m armorfact_hf`, and the command `armorfact`."""

import sys


def main() -> None:
    """Run the command line; without the packages or the memory that it needs, say so."""
    try:
        _run()
    except MemoryError as error:
        sys.exit(f"Error: this takes more memory than there is ({str(error) or 'none is left'}): end other programs")


def _run() -> None:
    try:
        from armorfact_hf.cli.commands import app
    except ImportError as error:
        sys.exit(f"the command line needs more packages ({error}): pip install 'armorfact[hf]'")
    app(prog_name="armorfact")


if __name__ == "__main__":
    main()
