"""How fast a whole model reads a prompt and writes tokens, and how much memory it takes; dense against pruned."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch import nn

from armorfact_hf.data.load_model import load_model
from armorfact_hf.free_memory import peak_memory
from armorfact_hf.model.causal_lm import CausalLM, cache_name
from armorfact_hf.report.record import Report

READINGS = 3  # of the prompt, whose median counts


@dataclass(frozen=True)
class Throughput:
    """What one model does.

    Args:
        name: of the model. read: so many tokens were read at once.
        prompt: tokens a second while reading; decode: while writing one after another.
        weights: bytes of all parameters and buffers, tied ones once.
        memory: by how many bytes the process grew, at its peak, over what it took before the model was loaded (on a
            GPU: the peak of what PyTorch took there).
    """

    name: str
    read: int
    prompt: float
    decode: float
    weights: int
    memory: int


def throughput(
    name: str,
    prompt: int = 512,
    new: int = 64,
    dtype: str = "auto",
    device: str | None = None,
    fingerprint: str | None = None,
) -> Throughput:
    """Load a model and run it: ``prompt`` random tokens at once, then ``new`` tokens one by one, greedily.

    Fewer are read where the model was trained for no more than that.

    Raises:
        ValueError: see `load_model`; it has another ``fingerprint``, or reads no more than ``new`` tokens.
    """
    before = peak_memory()
    loaded = load_model(name, dtype, device, lambda sentence: None)
    model = loaded.model
    vocabulary = model.get_input_embeddings().num_embeddings
    if fingerprint is not None:
        loaded.refuse_other_than(fingerprint)
    if (prompt := loaded.window(prompt + new) - new) < 1:
        raise ValueError(f"{name} reads {prompt + new} tokens at most, {new} of which would be written: write fewer")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, prompt), generator=generator, device="cpu").to(model.device)
    _run(model, tokens, 2)  # compiles kernels
    reading = median([_run(model, tokens, 0)[0] for _ in range(READINGS)])
    _, writing = _run(model, tokens, new)
    memory = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else peak_memory() - before
    return Throughput(name, prompt, prompt / reading, 1 / writing, _weights(model), memory)


@torch.inference_mode()
def _run(model: CausalLM, tokens: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds to read the tokens, and median seconds of a written one; 0 where none is."""
    cache = cache_name(model)
    start = time.perf_counter()
    output = model(tokens, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    token.item()  # waits for the device
    reading = time.perf_counter() - start
    steps = []
    for _ in range(new):
        start = time.perf_counter()
        output = model(token, use_cache=True, **{cache: output[cache]})
        token = output.logits[:, -1:].argmax(-1)
        token.item()
        steps.append(time.perf_counter() - start)
    return reading, median(steps) if steps else 0.0


def _weights(model: nn.Module) -> int:
    held = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in held}.values())


def end_to_end(
    folder: Path | str, prompt: int = 512, new: int = 64, dtype: str = "auto", device: str | None = None
) -> list[Throughput]:
    """`throughput` of the dense model that a folder was pruned from, and of the pruned one, each in its own process.

    Raises:
        ValueError: no token is read, or none written; the folder has no report that names its dense model, this has
            changed, or a model cannot be loaded or reads no so long prompts.
    """
    if min(prompt, new) < 1:
        raise ValueError(f"expected one token or more to read, and to write, got {prompt} and {new}")
    facts = Report.read(Path(folder)).model
    dtype = facts.dtype if dtype == "auto" else dtype
    results = []
    for name, fingerprint in ((facts.name, facts.fingerprint if dtype == facts.dtype else None), (str(folder), None)):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
            results.append(own.submit(throughput, name, prompt, new, dtype, device, fingerprint).result())
    return results
