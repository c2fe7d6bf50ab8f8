"""An ordinary dense folder out of a pruned one."""

from __future__ import annotations

from pathlib import Path

from armorfact_hf.checkpoint.dense import to_dense_
from armorfact_hf.checkpoint.folder import describe_folder
from armorfact_hf.data.load_model import load_model
from armorfact_hf.files import check_room, flush, room_for, workshop
from armorfact_hf.observer import Log
from armorfact_hf.pruning.resume.journal import only_writer
from armorfact_hf.runs.finish import journal_of


def export_dense(folder: Path | str, out: Path | str, log: Log = print) -> None:
    """Write the model of a pruned folder with dense weights A C B, as an ordinary folder for any other tool.

    Raises:
        NotPruned: the folder holds no pruned model.
        FileExistsError: ``out`` exists. OSError: too little room on disk. InUse: another process writes ``out``.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already: name a new folder")
    describe_folder(folder)
    check_room(out, 0)
    with only_writer(journal_of(out)) as place:
        loaded = load_model(str(folder), device="cpu", log=log)
        model = to_dense_(loaded.model)
        needed = sum(parameter.nbytes for parameter in model.parameters())
        check_room(out, needed)
        with workshop(place, out.name) as draft:
            with room_for(out, needed):
                model.save_pretrained(draft)
                loaded.tokenizer.save_pretrained(draft)
                flush(draft)
            if out.exists():
                raise FileExistsError(f"{out} was made by somebody else meanwhile: name a new folder")
            draft.rename(out)
