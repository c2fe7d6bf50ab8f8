"""When the default solver has halved SparseGPT's loss, on real layers, in multiples of SparseGPT's time, its own first.

python -m benchmarks.first_sweep
"""

from __future__ import annotations

from functools import partial
from statistics import median

from armorfact import factorize, sparsegpt
from benchmarks import layers
from benchmarks.sweep import seconds

LAYERS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"]


def main() -> None:
    print("| layer 8 | shape | SparseGPT s | its loss | sweep that halves it | ends, SparseGPTs | 30 sweeps: loss |")
    print("|---|---|---|---|---|---|---|")
    for name in LAYERS:
        weight, gram = layers.load(f"model.layers.8.{name}")
        factorize(weight, gram, block=128, max_sweeps=1)  # compiles, and warms the caches
        alone = median(seconds(partial(sparsegpt, weight, gram)) for _ in range(5))
        result = factorize(weight, gram, block=128, max_sweeps=30, rtol=0)
        half = next(s for s in result.history if s.loss < result.initial_loss / 2)
        relative = result.initial_loss / result.weight_loss
        print(
            f"| {name} | {weight.shape[0]}x{weight.shape[1]} | {alone:.3f} | {relative:.4f} "
            f"| {half.number} | {1 + half.seconds / alone:.1f} | {result.relative_loss:.4f} |"
        )


if __name__ == "__main__":
    main()
