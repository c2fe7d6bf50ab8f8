"""LoRA on a pruned folder, trained by TRL's SFTTrainer: perplexity before and after.

python -m benchmarks.finetune pruned --out adapter --steps 100
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from armorfact_hf.data.calibration import Calibration
from armorfact_hf.data.load_model import Loaded, load_model
from armorfact_hf.data.texts import evaluation_source
from armorfact_hf.evaluation.measure import Evaluation, MeasuredPerplexity, perplexity_of

try:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise SystemExit(f"this needs PEFT and TRL ({error}): pip install 'armorfact[peft]' trl datasets") from error


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.finetune", description=__doc__)
    parser.add_argument("folder", type=Path, help="a pruned folder")
    parser.add_argument("--out", type=Path, required=True, help="where the adapter goes")
    parser.add_argument("--calibration", default="demo:gensim-enwiki", help="the text to train on")
    parser.add_argument("--text", action="append", help="held-out texts; both demo texts by default")
    parser.add_argument("--windows", type=int, default=6, help="windows of held-out text")
    parser.add_argument("--eval-length", type=int, default=2048, help="tokens of each of those")
    parser.add_argument("--length", type=int, default=512, help="tokens of a training window")
    parser.add_argument("--steps", type=int, default=100, help="windows to train on, one a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-4)
    return parser.parse_args(given)


def perplexities(loaded: Loaded, texts: Sequence[Evaluation]) -> list[MeasuredPerplexity]:
    return [perplexity_of(loaded, text) for text in texts]


def train(loaded: Loaded, chosen: argparse.Namespace) -> SFTTrainer:
    """A trainer that has trained; its model holds the adapter."""
    windows = Calibration(chosen.calibration, None, chosen.length).tokens(loaded, print)
    settings = SFTConfig(
        str(chosen.out), max_steps=chosen.steps, learning_rate=chosen.rate, lr_scheduler_type="cosine", warmup_steps=10,
        per_device_train_batch_size=1, max_length=chosen.length, gradient_checkpointing=False, bf16=False,
        logging_steps=max(1, chosen.steps // 10), save_strategy="no", report_to="none",
        dataloader_pin_memory=loaded.model.device.type == "cuda", use_cpu=loaded.model.device.type == "cpu",
    )  # fmt: skip
    trainer = SFTTrainer(
        loaded.model,
        settings,
        train_dataset=Dataset.from_dict({"input_ids": windows.tolist()}),
        processing_class=loaded.tokenizer,
        peft_config=LoraConfig(r=chosen.rank, lora_alpha=2 * chosen.rank, target_modules="all-linear"),
    )
    trainer.train()
    return trainer


def main(given: Sequence[str] | None = None) -> None:
    chosen = arguments(given)
    names = chosen.text or ["demo:gensim-enwiki", "demo:qasper"]
    texts = [Evaluation(name, chosen.windows, chosen.eval_length) for name in names]
    for name in names:
        evaluation_source(name, print)  # raises before the work if there is none
    loaded = load_model(str(chosen.folder))
    before, start = perplexities(loaded, texts), time.perf_counter()
    trainer = train(loaded, chosen)
    seconds = time.perf_counter() - start
    trainer.save_model(str(chosen.out))
    model = trainer.model.get_base_model().eval()
    after = perplexities(replace(loaded, model=model, _hashed={}), texts)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(
        f"LoRA of rank {chosen.rank} ({trained:,} numbers), {chosen.steps} windows of {chosen.length} tokens, "
        f"{seconds:.0f} s"
    )
    for old, new in zip(before, after, strict=True):
        print(f"perplexity on {old.text}: {old.perplexity:.2f} before, {new.perplexity:.2f} after")


if __name__ == "__main__":
    main()
