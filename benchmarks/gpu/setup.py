"""What is measured, at which sizes: those of Llama-7B, and small ones for a dry run."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int]

BLOCKS = 32  # decoder blocks of Llama-7B
SWEEPS = 20  # over a layer, as by default


@dataclass(frozen=True)
class Setup:
    """The sizes of every figure.

    Args:
        device: "cuda" or "cpu".
        seconds: spent on each timed form of a layer, about.
        weights_bytes: of float32 weights that one pass over the copies of a layer goes through, so that weights come
            from memory and not from a cache.
        shapes, tokens, dtypes: of the layers whose execution is timed.
        sweeps, large: (d_out, d_in) of the weights that the solver sweeps over: first those, and late these.
        greedy: sizes of the square weights that SparseGPT prunes.
        wrapper: size of the blocks of A and B.
        hidden, inner, heads, vocabulary: of the decoder block.
        windows, length: of random tokens that stand for a calibration text.
    """

    device: str = "cuda"
    seconds: float = 0.25
    weights_bytes: int = 1 << 30
    shapes: tuple[Shape, ...] = ((4096, 4096), (11008, 4096), (14336, 4096))
    tokens: tuple[int, ...] = (1, 8, 64, 512, 4096)
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    sweeps: tuple[Shape, ...] = ((1024, 1024), (2048, 2048), (4096, 4096))
    large: tuple[Shape, ...] = ((11008, 4096), (4096, 11008), (8192, 8192))
    greedy: tuple[int, ...] = (1024, 2048, 4096, 8192)
    wrapper: int = 128
    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    windows: int = 16
    length: int = 2048

    @property
    def linear_layers(self) -> dict[Shape, int]:
        """How many linear layers of each shape (d_out, d_in) the decoder block has."""
        return {(self.hidden, self.hidden): 4, (self.inner, self.hidden): 2, (self.hidden, self.inner): 1}


def shape_name(shape: Shape) -> str:
    """As it stands in labels: "11008x4096"."""
    return f"{shape[0]}x{shape[1]}"


def small(device: str) -> Setup:
    """Sizes of a dry run, in seconds on one thread."""
    return Setup(
        device=device,
        seconds=0.001,
        weights_bytes=1,
        shapes=((64, 64),),
        tokens=(1, 8),
        sweeps=((64, 64),),
        large=((128, 64), (64, 128)),
        greedy=(64,),
        wrapper=16,
        hidden=64,
        inner=128,
        heads=4,
        vocabulary=96,
        windows=4,
        length=16,
    )
