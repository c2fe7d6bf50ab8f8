"""How long after SparseGPT the default solver halves its loss, on real layers, in multiples of SparseGPT's time.

python -m benchmarks.first_sweep
"""

from __future__ import annotations

import time

from armorfact import factorize, sparsegpt
from benchmarks import layers

LAYERS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"]


def main() -> None:
    print("| layer 8 | shape | SparseGPT s | its loss | sweep that halves it | at, SparseGPTs | 30 sweeps: loss |")
    print("|---|---|---|---|---|---|---|")
    for name in LAYERS:
        weight, gram = layers.load(f"model.layers.8.{name}")
        factorize(weight, gram, block=128, max_sweeps=1)  # compiles, and warms the caches
        start = time.perf_counter()
        sparsegpt(weight, gram)
        seconds = time.perf_counter() - start
        result = factorize(weight, gram, block=128, max_sweeps=30, rtol=0)
        half = next(s for s in result.history if s.loss < result.initial_loss / 2)
        relative = result.initial_loss / result.weight_loss
        print(
            f"| {name} | {weight.shape[0]}x{weight.shape[1]} | {seconds:.3f} | {relative:.4f} "
            f"| {half.number} | {half.seconds / seconds:.1f} | {result.relative_loss:.4f} |"
        )


if __name__ == "__main__":
    main()
