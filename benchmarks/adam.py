"""Time to reach the loss at which the paper's Adam run ends, on a real 256 x 640 layer with block 32.

    python -m benchmarks.adam

Both solvers start from the same NoWag-P mask on the paper's objective (diagonal Gram matrix,
normalized weight). Adam runs to its own stopping rule (learning rate 1e-4, at most 20,000
iterations, patience 100 at rtol 1e-6). The first lines warm the compiled kernels.
"""

from __future__ import annotations

from armorfact import Exact, factorize
from benchmarks import layers

LAYER = "model.layers.8.self_attn.k_proj"


def main() -> None:
    weight, gram = layers.load(LAYER)
    problem = {"block": 32, "normalize": "nowag", "init": "nowag"}
    diagonal = gram.diagonal().copy()
    factorize(weight, diagonal, max_sweeps=2, **problem)
    adam = factorize(weight, diagonal, solver="adam", **problem)
    exact = factorize(weight, diagonal, solver=Exact(max_sweeps=400, rtol=1e-4), **problem)
    target = adam.history[-1].loss
    passed = next(sweep for sweep in exact.history if sweep.loss <= target)
    adam_seconds = adam.history[-1].seconds
    print(f"layer {LAYER} {weight.shape}, block 32, diagonal objective, NoWag-normalized")
    print(f"initial   relative loss {adam.initial_loss / adam.weight_loss:.6f}")
    print(f"adam      relative loss {adam.relative_loss:.6f} in {adam_seconds:.1f} s; {adam.status}")
    print(f"exact     relative loss {exact.relative_loss:.6f} in {exact.history[-1].seconds:.2f} s; {exact.status}")
    print(f"exact passes adam's end at sweep {passed.number}, after {passed.seconds:.3f} s")
    print(f"ratio of times to adam's end: {adam_seconds / passed.seconds:.0f}")
    print(f"exact's final loss over adam's: {exact.relative_loss / adam.relative_loss:.3f}")


if __name__ == "__main__":
    main()
