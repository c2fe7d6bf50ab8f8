"""Running one block at a time gives what the whole model computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from armorfact_hf.model.stream import BlockStream
from armorfact_hf.model.structure import decoder_blocks
from tests.hf.models import BLOCKS, FAMILIES, random_tokens, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_blocks_one_at_a_time_are_the_whole_model(family):
    model = tiny_model(family)
    _, blocks = decoder_blocks(model)
    stream = BlockStream(model, blocks)
    seen = []
    handles = [
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    head_inputs = []
    head = model.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda _, args: head_inputs.append(args[0])))
    tokens = random_tokens(windows=1)
    logits = model(input_ids=tokens).logits
    expected, expected_head = list(seen), head_inputs[0]
    for handle in handles:
        handle.remove()
    hidden = None
    for index in range(BLOCKS):
        hidden = stream.run(index, tokens, hidden)
        torch.testing.assert_close(hidden, expected[index], rtol=0, atol=0)
    assert torch.equal(stream.head_input(head, tokens, hidden), expected_head)
    assert torch.equal(stream.head_input(head, tokens), expected_head)
    torch.testing.assert_close(stream.logits(head, tokens[:, 5:9], expected_head[:, 5:9]), logits[:, 5:9])


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama")
    _, blocks = decoder_blocks(model)
    BlockStream(model, blocks).run(1, random_tokens(1), torch.zeros(1, 24, 32))
    assert not any("forward" in block.__dict__ for block in blocks)


def test_blocks_that_return_tuples_keep_doing_so():
    class Block(nn.Module):
        def forward(self, hidden):
            return hidden + 1, "extra"

    class Model(nn.Module):
        device = "cpu"

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, input_ids, use_cache):
            hidden = input_ids.float()
            for block in self.blocks:
                hidden, _ = block(hidden)
            return hidden

    model, tokens = Model(), torch.zeros(1, 3)
    stream = BlockStream(model, list(model.blocks))
    after = stream.run(0, tokens, None)
    assert torch.equal(stream.run(1, tokens, after), torch.full((1, 3), 2.0))


def test_a_block_that_is_never_called_is_told():
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="does not call its Linear"):
        BlockStream(model, decoder_blocks(model)[1]).head_input(
            nn.Linear(2, 2), random_tokens(1), torch.zeros(1, 24, 32)
        )
