"""Write the model card of a saved model and upload both to the Hub."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from hf_compress.api import check_finite
from hf_compress.card_sections import REPORT_FILE, entry_of, read_report
from hf_compress.core.errors import BROKEN_FILE, one_line
from hf_compress.core.loaded import require_complete
from hf_compress.core.saving import complete_or_absent
from hf_compress.folder_card import FILE as CARD
from hf_compress.folder_card import card_text, may_be_replaced
from hf_compress.hub.contents import contents_of
from hf_compress.hub.evaluation import reported_result
from hf_compress.hub.upload import check_repo_id, connect, upload
from hf_compress.stages.arguments import StageArguments


# Files of a report that go with the model, so that the card's numbers can be checked.
_REPORT_FILES = (REPORT_FILE, "report.html")
# A section that recipes add to the card.
_HISTORY = "\n## How it was made"


@dataclass
class PushArguments:
    """What is uploaded, and where to.

    Args:
        model_name_or_path: Folder of the saved model.
        repo_id: Repository on the Hub, as owner/name; a name alone is one of your own.
        dry_run: Write everything that would be uploaded into output_dir; needs no network and no token.
        private: Make a new repository private; one that exists stays as it is.
        report: The report.json that measured this model, or its folder. Left out: the one in the model's folder.
        eval_dataset: Hub name of the data set that the report measured on, if it is a benchmark there: the result is
            then listed with the model.
        eval_task: Name of the task within that benchmark.
        include_teacher: Also upload the teacher that was trained beside the model.
        commit_message: What the commit says.
        output_dir: Folder for what is written here: with dry_run all that would be uploaded, otherwise the card. Left
            out: with dry_run the model's folder with -hub behind its name, otherwise nothing is written.
    """

    model_name_or_path: str
    repo_id: str
    dry_run: bool = False
    private: bool = False
    report: str | None = None
    eval_dataset: str | None = None
    eval_task: str = "default"
    include_teacher: bool = False
    commit_message: str = "Upload a model of hf_compress"
    output_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class Push(StageArguments):
    """What `push` takes.

    Args:
        hub: What is uploaded, and where to.

    Raises:
        ValueError: If the name of the repository is impossible, or options do not go together.
    """

    hub: PushArguments

    def __post_init__(self) -> None:
        super().__post_init__()
        check_repo_id(self.hub.repo_id)
        if "eval_task" in self.chosen() and self.hub.eval_dataset is None:
            raise ValueError("eval_task must be left out without eval_dataset, the benchmark that it belongs to.")
        inside = Path(self.hub.model_name_or_path).resolve()
        if self.output_dir and inside in Path(self.output_dir).resolve().parents:
            raise ValueError(
                f"output_dir must lie outside of model_name_or_path, got {self.output_dir!r}: the next push would "
                "upload what this one writes."
            )
        if self.hub.eval_dataset is not None:
            with one_line("eval_dataset must be the Hub's name of a data set", ValueError):
                check_repo_id(self.hub.eval_dataset)

    @property
    def output_dir(self) -> str:
        """The folder that is written here; empty where there is none."""
        if self.hub.output_dir is None and self.hub.dry_run:
            return f"{Path(self.hub.model_name_or_path).absolute()}-hub"
        return self.hub.output_dir or ""

    def folders_written(self) -> list[str]:
        return [self.output_dir] if self.output_dir else []


def push(arguments: Push) -> dict[str, Any]:
    """Write the card from the model's record and report, and upload the folder in one commit.

    Returns:
        `repo_id`, `files` (their names), `left_out` (name -> why), and `url` and `commit`, or a dry run's `folder`.

    Raises:
        ValueError: Before anything is uploaded, if the folder holds no model, the report measured another one, there
            is no token, or the Hub cannot be reached; or if it refuses the upload.
    """
    wanted = arguments.hub
    found = contents_of(wanted.model_name_or_path, wanted.include_teacher)
    report = _report_of(wanted)
    files: dict[str, Path | bytes] = {**found.files}
    if report is not None:
        own = entry_of(report, wanted.model_name_or_path)
        if wanted.eval_dataset is not None:
            name, content = reported_result(report, own, wanted.eval_dataset, wanted.eval_task)
            files[name] = content
    model = _opened(wanted.model_name_or_path)
    api, repo_id = None, wanted.repo_id
    if not wanted.dry_run:
        api, user = connect()
        repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    files |= _beside(wanted)
    card = Path(wanted.model_name_or_path, CARD)
    if may_be_replaced(card):
        history = card.read_text(encoding="utf-8").partition(_HISTORY) if card.is_file() else ("", "", "")
        text = card_text(model, wanted.model_name_or_path, repo_id, report)
        files[CARD] = (text + "".join(history[1:])).encode()
    results: dict[str, Any] = {"repo_id": repo_id, "files": sorted(files), "left_out": found.left_out}
    if api is None:
        _write(arguments.output_dir, files)
        return results | {"folder": arguments.output_dir}
    results |= upload(api, repo_id, files, wanted.private, wanted.commit_message)
    if arguments.output_dir:
        _write(arguments.output_dir, {name: content for name, content in files.items() if isinstance(content, bytes)})
    return results


def _report_of(wanted: PushArguments) -> dict[str, Any] | None:
    if wanted.report is not None:
        return read_report(wanted.report)
    if Path(wanted.model_name_or_path, REPORT_FILE).is_file():
        return read_report(wanted.model_name_or_path)
    if wanted.eval_dataset is not None:
        raise ValueError("eval_dataset must come with a report that measured the model there: name one (report).")
    return None


def _beside(wanted: PushArguments) -> dict[str, Path]:
    """The files of a report that does not lie in the model's folder, under their names in the repository."""
    if wanted.report is None:
        return {}
    place = Path(wanted.report)
    folder = place if place.is_dir() else place.parent
    files = {f"report/{name}": folder / name for name in _REPORT_FILES if (folder / name).is_file()}
    return files if place.is_dir() or place.name == REPORT_FILE else {f"report/{REPORT_FILE}": place}


def _opened(folder: str) -> PreTrainedModel:
    """The model of a folder, by the class that it was saved from."""
    with one_line(f"No model can be opened at {folder!r}", *BROKEN_FILE):
        config = AutoConfig.from_pretrained(folder)
        # Classes of ours are in the mapping of the automatic ones.
        saved = getattr(transformers, (config.architectures or [""])[0], AutoModelForSequenceClassification)
        kind: Any = saved
        model, loaded = kind.from_pretrained(folder, output_loading_info=True)
        require_complete(loaded)
    opened: PreTrainedModel = model
    with one_line(f"{folder!r} must not be uploaded", ValueError):
        check_finite(opened)
    return opened


def _write(folder: str, files: dict[str, Path | bytes]) -> None:
    with complete_or_absent(folder) as staged:
        for name, content in files.items():
            place = staged / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                place.write_bytes(content)
            else:
                shutil.copyfile(content, place)
