"""Which text statistics are gathered from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from armorfact_hf.data.load_model import Loaded
from armorfact_hf.data.origin import DEMO
from armorfact_hf.data.own_text import SELF, own_text
from armorfact_hf.data.texts import TO_CALIBRATE, Text, calibration_source, check_name, tokens_of
from armorfact_hf.data.tokens import spread, windows
from armorfact_hf.observer import Count, Log


@dataclass(frozen=True)
class Calibration:
    """Which tokens statistics are gathered from.

    Args:
        text: a file of plain text, "demo:gensim-enwiki", "demo:python", or "self", what the dense model writes when
            nothing is asked of it; or several, which share the windows evenly.
        windows: how many, spread evenly over each text, or None for all of it; length: tokens of each.
    """

    text: str | Sequence[str] = "demo:gensim-enwiki"
    windows: int | None = 16
    length: int = 2048

    @property
    def texts(self) -> list[str]:
        """Those of ``text``."""
        return [self.text] if isinstance(self.text, str) else list(self.text)

    @property
    def names(self) -> str:
        """Of the texts, without their folders."""
        return ", ".join(Path(text.removeprefix(DEMO)).name for text in self.texts)

    def check(self, own: bool = True) -> None:
        """Make sure that the texts are there, without fetching one.

        Args:
            own: whether `SELF` may be among them: not where a pruned model, or no end of it, is asked to write it.

        Raises:
            ValueError: no text, a name of none, or fewer windows than texts; `SELF`, unless it may be.
        """
        texts = self.texts
        if not texts or (self.windows is not None and self.windows < len(texts)):
            raise ValueError(f"expected one text or more, and a window for each, got {len(texts)} and {self.windows}")
        if SELF in texts and not own:
            raise ValueError(
                f"{SELF!r} is for `armorfact prune`: let `armorfact write` write the text, and give that file"
            )
        for name in texts:
            if name != SELF:
                check_name(name, TO_CALIBRATE)

    def tokens(self, loaded: Loaded, log: Log, progress: Count | None = None) -> torch.Tensor:
        """(windows, length) int64; a bos heads every window if the tokenizer puts it before texts.

        Args:
            loaded: the model that they are for. log: is told of what takes time. progress: of the model's own writing.

        Raises:
            ValueError: see `check`; too few tokens in a text; a model that cannot write its own
                (`armorfact_hf.data.own_text`), or no number of windows for it.
        """
        self.check()
        length, found = loaded.window(self.length), []
        for place, name in enumerate(self.texts):
            count = self._share(place)
            own = name == SELF
            text = self._own(loaded, count, length, log, progress) if own else calibration_source(name, log)
            tokens = tokens_of(text, loaded)
            windows(tokens, length, count, bos=loaded.bos)  # raises if there are too few tokens
            found += spread(windows(tokens, length, bos=loaded.bos), count)
        return torch.from_numpy(np.stack(found))

    @staticmethod
    def _own(loaded: Loaded, count: int | None, length: int, log: Log, progress: Count | None) -> Text:
        if count is None:
            raise ValueError(f"the text {SELF!r} has no end: say how many windows (--windows)")
        return Text(SELF, "drawn from the model", own_text(loaded, count * length, log, progress))

    def _share(self, place: int) -> int | None:
        """How many windows the text at a place has."""
        if self.windows is None:
            return None
        first, end = (at * self.windows // len(self.texts) for at in (place, place + 1))
        return end - first


EVERYTHING = Calibration(windows=None)
