"""lm-eval's own command line, which finds pruned folders by its model "hf".

    python -m armorfact_hf.evaluation.lm_eval run --model hf --model_args pretrained=pruned --tasks piqa

lm-eval has no place where another package could register itself, and its model "hf" needs nothing but the format that
importing `armorfact_hf` registers with transformers. Everything after the module's name is lm-eval's.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Hand over to lm-eval, once armorfact is imported."""
    if find_spec("lm_eval") is None:
        sys.exit("this needs lm-eval: pip install 'armorfact[tasks]'")
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
