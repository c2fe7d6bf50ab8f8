"""`python -m armorfact_hf`, and the command `armorfact`."""

import sys


def main() -> None:
    """Run the command line; without the packages that it needs, say how to get them."""
    try:
        from armorfact_hf.cli.commands import app
    except ImportError as error:
        sys.exit(f"the command line needs more packages ({error}): pip install 'armorfact[hf]'")
    app(prog_name="armorfact")


if __name__ == "__main__":
    main()
