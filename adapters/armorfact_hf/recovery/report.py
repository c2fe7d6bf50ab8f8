"""What a recovery did, as the report of the finished folder keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from armorfact_hf.recovery.settings import RecoverySettings


@dataclass(frozen=True)
class Recovery:
    """What `recover_` did.

    Args:
        settings: how.
        windows, kept_aside: how many windows trained, and how many measured.
        steps, tokens: done, and seen in training.
        before, after: mean divergence (nats a token) from the dense model on the windows kept aside, of the model as it
            was and as it is now, both as stored.
        best_step: after how many steps the result was had; 0 if none was better than the start.
        history: pairs of steps done and the divergence then.
        seconds: wall time, that of earlier processes of a resumed run included.
        notes: what went wrong on the way.
        likeliest: how many of the teacher's words at each position all these divergences are of, the others taken as
            one; None is all of them.
        teacher: the name of the model, or of what was kept of it, that all divergences are from; None is the dense one.
    """

    settings: RecoverySettings
    windows: int
    kept_aside: int
    steps: int
    tokens: int
    before: float
    after: float
    best_step: int
    history: tuple[tuple[int, float], ...]
    seconds: float
    notes: tuple[str, ...] = ()
    likeliest: int | None = None
    teacher: str | None = None
