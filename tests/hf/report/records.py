"""A report of eight layers, made by hand."""

from __future__ import annotations

from armorfact_hf.model.structure import DenseLayer
from armorfact_hf.pruning.config import PruneConfig
from armorfact_hf.pruning.layer import LayerReport
from armorfact_hf.report.record import (
    CalibrationFacts,
    MethodPerplexity,
    ModelFacts,
    PerplexityRecord,
    Report,
    TaskRecord,
    Totals,
)

HOSTILE = "<script>alert('x')</script> & \"q\" {{ 7 * 7 }} \ud800 \u202e"


def layer(block: int, kind: str, scale: float = 1.0) -> LayerReport:
    loss = scale * 0.01 * (1 + block) / 3
    return LayerReport(
        name=f"model.layers.{block}.{kind}",
        decoder_block=block,
        shape=(192, 576),
        block=(32, 64),
        losses={"armorfact": loss, "wanda": 5.0123 * loss},
        objective_loss=loss,
        objective_initial_loss=2 * loss,
        sweeps=7,
        seconds=1.25,
        dense_bytes=442368,
        bytes=300000,
        tokens=32768,
        status="sweep limit of 7 reached",
    )


def evaluation(**perplexities: float) -> PerplexityRecord:
    return PerplexityRecord(
        dense=20.0,
        text="gensim-enwiki",
        split="every fifth article (held out)",
        sha256="5a" * 32,
        window=2048,
        stride=1024,
        bos=None,
        windows=6,
        chosen="evenly over the text",
        tokens=12282,
        methods=tuple(MethodPerplexity(name, 0.02 * value / 40, value) for name, value in perplexities.items()),
    )


def record() -> Report:
    kinds = ("up_proj", "down_proj")
    return Report(
        armorfact_version="0.1.0",
        model=ModelFacts("demo:tiny", "LlamaForCausalLM", "float32", 134515008, 538060032, "fe" * 32),
        calibration=CalibrationFacts("gensim-enwiki", 16, 2048, "ca" * 32),
        config=PruneConfig(),
        manifest={"config.include": ["re:.*"], "armorfact": "0.1.0"},
        layers=tuple(layer(block, f"mlp.{kind}", 1 + len(kind)) for block in range(4) for kind in kinds),
        dense_layers=(DenseLayer("lm_head", "the head was not asked for"),),
        totals=Totals(3538944, 2400000, 0.11, 310.0, 2345678901),
        evaluations=(evaluation(armorfact=40.0, wanda=160.5),),
        tasks=(TaskRecord("piqa", 100, 0.67, 0.6, 0.048),),
    )
