"""A teacher on disk: recovery from it is that from the model, and what is wrong with a folder is told."""

from __future__ import annotations

import shutil

import pytest
import torch

from armorfact_hf.checkpoint.fingerprint import tokens_fingerprint
from armorfact_hf.model import token_divergence
from armorfact_hf.pruning.resume.lock import InUse, lock, unlock
from armorfact_hf.pruning.resume.manifest import DifferentRun
from armorfact_hf.pruning.resume.seal import save_sealed
from armorfact_hf.recovery.divergence import Divergence
from armorfact_hf.recovery.recover import recover_
from armorfact_hf.recovery.settings import RecoverySettings
from armorfact_hf.recovery.stored_teacher import StoredTeacher, store_teacher
from tests.hf.models import VOCABULARY, random_tokens
from tests.hf.observers import Silent
from tests.hf.recovery.models import dense_model, pruned_model

TOKENS = random_tokens(8, seed=3)
SETTINGS = RecoverySettings(steps=12, rate=0.004, warm_up=4, measure_every=6)


@pytest.fixture(autouse=True)
def _few_positions(monkeypatch):
    monkeypatch.setattr(token_divergence, "POSITIONS_AT_ONCE", 7)  # does not divide the window
    monkeypatch.setattr(token_divergence, "LOGARITHMS_AT_ONCE", 3 * VOCABULARY)  # which does not divide that


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "words"


def stored(folder, likeliest=VOCABULARY, family="gpt2", tokens=TOKENS) -> StoredTeacher:
    return store_teacher(dense_model(family), tokens, folder, likeliest, Silent())


def recovered(teacher, family="gpt2", **more):
    model = pruned_model(family)
    return model, recover_(model, TOKENS, teacher, SETTINGS, observer=Silent(), **more)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_all_words_recover_as_the_model_does(family, folder):
    _, from_disk = recovered(stored(folder, family=family), family)
    _, from_memory = recovered(dense_model(family), family)
    assert (from_disk.likeliest, from_memory.likeliest) == (VOCABULARY, None)
    assert from_disk.before == pytest.approx(from_memory.before, rel=5e-3)
    assert from_disk.after == pytest.approx(from_memory.after, rel=2e-2) and from_disk.after < 0.9 * from_disk.before


def test_a_few_words_are_a_lower_bound_and_bring_the_whole_divergence_down(folder):
    teacher, dense = stored(folder, 8), dense_model()
    model, report = recovered(teacher)
    start = pruned_model()
    for window in TOKENS:
        few, all_of_them = (Divergence(start, one).of(window) for one in (teacher, dense))
        assert 0.1 * all_of_them < few < all_of_them
    last = TOKENS[-1]  # the one that is kept aside
    assert report.likeliest == 8 and report.after == pytest.approx(Divergence(model, teacher).of(last))
    assert Divergence(model, dense).of(last) < Divergence(start, dense).of(last)


def test_a_run_goes_on_where_it_was_killed_and_adds_other_texts(folder, monkeypatch):
    asked = []
    states = token_divergence.BodyAndHead.states
    monkeypatch.setattr(
        token_divergence.BodyAndHead, "states", lambda self, window: asked.append(1) or states(self, window)
    )
    stored(folder, 4, tokens=TOKENS[:3])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    teacher = stored(folder, 4)
    assert len(asked) == 8
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    teacher.check(TOKENS)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_windows_that_are_not_there_are_counted_before_any_work(folder):
    teacher = stored(folder, 4, tokens=TOKENS[:5])
    with pytest.raises(ValueError, match="lacks 3 of the 8 windows of the text: give `armorfact teach` the same text"):
        recovered(teacher)


@pytest.mark.parametrize("harm", ["flipped", "cut", "of another", "gone"])
def test_a_damaged_file_is_named_and_nothing_is_learned_from_it(harm, folder, tmp_path):
    teacher = stored(folder, 4)
    paths = sorted(folder.glob("*.safetensors"))
    if harm == "flipped":
        content = bytearray(paths[0].read_bytes())
        content[-3] ^= 4
        paths[0].write_bytes(content)
    elif harm == "cut":
        paths[0].write_bytes(paths[0].read_bytes()[:-5])
    elif harm == "of another":
        stored(tmp_path / "other", 3)
        shutil.copy(tmp_path / "other" / paths[0].name, paths[0])
    else:
        paths[0].unlink()
    model, before = pruned_model(), pruned_model().state_dict()
    with pytest.raises(ValueError, match=r"is damaged|lacks 1 of the 8 windows"):
        recover_(model, TOKENS, teacher, SETTINGS, observer=Silent())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda words, logs, rest: (words + VOCABULARY, logs, rest), "not among the 96 of the vocabulary"),
        (lambda words, logs, rest: (words, logs * float("nan"), rest), "NaN or zero"),
        (lambda words, logs, rest: (words[:5], logs[:5], rest[:5]), "expected 4 words at each of"),
        (lambda words, logs, rest: (words[:, :2], logs[:, :2], rest), "expected 4 words at each of"),
    ],
)
def test_contents_that_mean_nothing_are_named(change, message, folder):
    """A seal can be made by anyone."""
    teacher = stored(folder, 4)
    taught = teacher.recall(TOKENS[0]).tensors
    names = ("words", "logs", "rest")
    harmed = dict(zip(names, change(*(taught[name] for name in names)), strict=True))
    path = folder / f"{tokens_fingerprint(TOKENS[0])}.safetensors"
    harmed = {name: tensor.contiguous() for name, tensor in harmed.items()}
    save_sealed(harmed, path, {"teacher": teacher.fingerprint})
    with pytest.raises(ValueError, match=rf"is damaged .*{message}"):
        recovered(StoredTeacher(folder))


def test_a_manifest_that_means_nothing_is_named(folder):
    stored(folder, 4)
    (folder / "manifest.json").write_text('{"likeliest": 4}')
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        StoredTeacher(folder)


def test_a_teacher_that_is_offloaded_is_told(folder):
    teacher = dense_model()
    teacher.transformer.h[1].to("meta")
    for work in (lambda: recovered(teacher), lambda: store_teacher(teacher, TOKENS, folder, 4, Silent())):
        with pytest.raises(ValueError, match="tensors of the teacher are on the meta device"):
            work()


def test_folders_of_other_things_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no words of a teacher"):
        StoredTeacher(folder)
    folder.mkdir()
    mine = {"mine.txt", ".draft.part", "lock"}
    for name in mine:
        (folder / name).write_text("mine")
    with pytest.raises(DifferentRun, match="exists and holds no words of a teacher"):
        stored(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(mine, "mine")
    journal = tmp_path / "journal"
    recovered(dense_model(), state=journal)
    with pytest.raises(ValueError, match="belongs to another run"):
        StoredTeacher(journal)
    assert not StoredTeacher.found_in(journal) and not StoredTeacher.found_in("demo:smollm2")


def test_a_pruned_model_is_no_teacher(folder):
    with pytest.raises(ValueError, match="is pruned already"):
        store_teacher(pruned_model(), TOKENS, folder, 4, Silent())
    assert not folder.exists()


def test_another_teacher_or_other_words_do_not_mix(folder):
    stored(folder, 4)
    with pytest.raises(DifferentRun, match="likeliest: 4 there, 5 now"):
        stored(folder, 5)
    other = dense_model(dtype=torch.bfloat16)
    with pytest.raises(DifferentRun, match="teacher: "):
        store_teacher(other, TOKENS, folder, 4, Silent())


def test_one_process_writes_at_a_time(folder):
    held = lock(folder)
    try:
        with pytest.raises(InUse, match="is being written by"):
            stored_by_another_thread(folder)
    finally:
        unlock(held)


def stored_by_another_thread(folder):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(stored, folder, 4).result()


@pytest.mark.parametrize("likeliest", [0, VOCABULARY + 1])
def test_a_number_of_words_that_there_is_not(likeliest, folder):
    with pytest.raises(ValueError, match=f"expected 1 to {VOCABULARY} likeliest words, got {likeliest}"):
        stored(folder, likeliest)
    assert not folder.exists()


def test_a_teacher_that_says_nothing_is_told(folder):
    model = dense_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        store_teacher(model, TOKENS, folder, 4, Silent())


def test_a_teacher_of_another_vocabulary(folder):
    teacher = stored(folder, 4)
    teacher.vocabulary += 1
    with pytest.raises(ValueError, match=f"expected a teacher with the model's vocabulary of {VOCABULARY}, got"):
        recovered(teacher)
