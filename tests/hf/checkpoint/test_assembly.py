"""A folder written tensor by tensor: byte for byte what transformers and safetensors write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from armorfact_hf.checkpoint.assembly import assemble
from armorfact_hf.checkpoint.shard_file import write_shard
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.prune import prune_
from tests.hf.models import random_tokens, tiny_model


def test_a_file_is_the_one_that_safetensors_writes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b.weight": torch.randn(3, 5, generator=generator),
        "a.weight": torch.randn(7, generator=generator).to(torch.bfloat16),
        "a.positions": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "c.half": torch.randn(2, 2, generator=generator).half(),
        "c.count": torch.tensor(3),
        "d.double": torch.randn(2, generator=generator).double(),
        "ünïcode": torch.zeros(0, 4),
        "e.transposed": torch.randn(4, 6, generator=generator).T,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a", {"format": "pt"})
    write_shard(tmp_path / "b", {name: tensor.to("meta") for name, tensor in tensors.items()}, tensors.__getitem__)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_tensor_of_another_shape_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"x is torch.float32 \[2\], expected torch.float32 \[3\]"):
        write_shard(tmp_path / "a", {"x": torch.zeros(3)}, lambda _: torch.zeros(2))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon", "phi"])
@pytest.mark.parametrize("size", ["50GB", "25KB"])
def test_a_folder_is_the_one_that_transformers_writes(family, size, tmp_path):
    model = tiny_model(family, dtype=torch.bfloat16)
    prune_(model, random_tokens(), PruneConfig(method="wanda", baselines=(), head=family == "phi"))
    model.save_pretrained(tmp_path / "a", max_shard_size=size)
    held = model.state_dict()
    assemble(model, tmp_path / "b", held.__getitem__, shard=size)
    assert files(tmp_path / "b") == files(tmp_path / "a")
    assert (len(files(tmp_path / "a")) > 3) == (size == "25KB")
