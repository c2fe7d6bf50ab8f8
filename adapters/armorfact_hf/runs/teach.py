"""From the name of a model and a text to a folder that stands in for the model as a teacher."""

from __future__ import annotations

from pathlib import Path

from armorfact_hf.data.calibration import EVERYTHING, Calibration
from armorfact_hf.data.load_model import load_model
from armorfact_hf.files import check_room
from armorfact_hf.observer import Observer
from armorfact_hf.pruning.checks import refuse_pruned
from armorfact_hf.recovery.stored_teacher import StoredTeacher, missing_windows, store_teacher
from armorfact_hf.recovery.top_tokens import BYTES_A_WORD, BYTES_OF_REST


def teach_to_folder(
    model: Path | str,
    out: Path | str,
    likeliest: int = 128,
    calibration: Calibration = EVERYTHING,
    *,
    device: str | None = None,
    observer: Observer | None = None,
) -> StoredTeacher:
    """Write the words that a model says at every position of a text, for `recover_to_folder` with ``teacher=out``.

    The same call continues one that was killed, and adds to ``out`` what another text has.

    Args:
        model: a name for `load_model`; it computes in bfloat16.
        out: the folder to write. likeliest: how many words of each position.
        calibration: the text, all of the demo's by default. device: see `load_model`. observer: told of every window.

    Raises:
        ValueError, OSError: bad arguments, a pruned model, too little room on disk; before the work starts.
        DifferentRun: ``out`` holds something else. InUse: another process writes to it.
    """
    observer, out = observer or Observer(), Path(out)
    calibration.check(own=False)
    loaded = load_model(str(model), "bfloat16", device, observer.say)
    refuse_pruned(loaded.model)
    tokens = calibration.tokens(loaded, observer.say)
    missing = missing_windows(out, tokens)
    check_room(out, missing * tokens.shape[1] * (likeliest * BYTES_A_WORD + BYTES_OF_REST))
    return store_teacher(loaded.model, tokens, out, likeliest, observer)
