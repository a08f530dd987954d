"""What came of a job, to be read, tabled, and seen in a notebook."""

import base64
import io
from collections.abc import Iterator
from html import escape
from itertools import islice
from typing import TYPE_CHECKING

import grpc

from .errors import Error
from .v1.job_pb2 import Job, JobAccepted, JobDone, JobEvent
from .v1.result_pb2 import UnitResult, UnitState

if TYPE_CHECKING:
    import pandas

SHOWN_UNITS = 10
"""Units that a notebook shows."""
SHOWN_PICTURES = 4
"""Pictures of each, of those that excite it and of those drawn."""


class Dissection:
    """The labelled units of a job, in the order that was asked for. A notebook shows the first of them with their pictures.

    Attributes:
        job_id: The job's id: with it `Client.follow` finds all this again.
        accepted: What the job worked on, and what its results depend on.
        done: How it ended.
        skipped: Pictures that could not be used, and why, by path.
        pictures: Those that a notebook shows, by digest; `Client.pictures` has all others.
    """

    def __init__(self, job: Job) -> None:
        self.job_id = job.job_id
        self.accepted = JobAccepted()
        self.done = JobDone()
        self.skipped: dict[str, str] = {}
        self.pictures: dict[str, bytes] = {}
        self._units: dict[tuple[str, int], UnitResult] = {}
        self._last_event = job.last_event

    def take(self, event: JobEvent) -> bool:
        """Takes what happened in the job; gives whether it has ended. Raises an Error if it waits for someone to resume it."""
        # What came before the job was resumed last is its past.
        is_past = event.number < self._last_event
        match event.WhichOneof("event"):
            case "accepted":
                self.accepted = event.accepted
            case "skipped":
                self.skipped[event.skipped.path] = event.skipped.reason
            case "unit":
                self._units[event.unit.layer, event.unit.unit] = event.unit
            case "paused" if not event.paused.by_itself and not is_past:
                raise Error(grpc.StatusCode.FAILED_PRECONDITION, event.paused.message, reason=event.paused.reason)
            case "done" if not is_past:
                self.done = event.done
                return True
        return False

    def __iter__(self) -> Iterator[UnitResult]:
        asked = ((layer.layer, unit) for layer in self.accepted.layers for unit in layer.units)
        return (self._units[at] for at in asked if at in self._units)

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, at: tuple[str, int]) -> UnitResult:
        """The unit of a layer and a number."""
        return self._units[at]

    def __repr__(self) -> str:
        return f"<Dissection {self.job_id}: {self.done.labelled} labelled, {self.done.dead} dead, {self.done.failed} failed>"

    def to_dataframe(self) -> "pandas.DataFrame":
        """A row a unit, with the columns of `dnd`'s results.csv. Needs pandas."""
        import pandas

        columns = ["layer", "unit", "label", "score", "second", "third", "state", "reason"]
        return pandas.DataFrame([_row(unit) for unit in self], columns=columns)

    def shown(self) -> list[str]:
        """Digests of the pictures that a notebook shows."""
        return [digest for unit in islice(self, SHOWN_UNITS) for pictures in _pictures(unit) for digest, _ in pictures]

    def _repr_html_(self) -> str:
        rows = "".join(self._html_row(unit) for unit in islice(self, SHOWN_UNITS))
        more = f"<p>and {len(self) - SHOWN_UNITS} more units</p>" if len(self) > SHOWN_UNITS else ""
        head = "".join(f"<th>{title}</th>" for title in ("layer", "unit", "label", "score", "what excites it", "what was drawn of the label"))
        return f"<p>{escape(repr(self))}</p><table><tr>{head}</tr>{rows}</table>{more}"

    def _html_row(self, unit: UnitResult) -> str:
        _, _, label, score, *_ = _row(unit)
        label = label or f"{UnitState.Name(unit.state).removeprefix('UNIT_STATE_').lower()} {unit.message}"
        cells = [unit.layer, str(unit.unit), label, "" if score is None else f"{score:.3g}"]
        pictures = ("".join(self._html_picture(*picture) for picture in some) for some in _pictures(unit))
        return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "".join(f"<td>{some}</td>" for some in pictures) + "</tr>"

    def _html_picture(self, digest: str, title: str) -> str:
        if digest not in self.pictures:
            return ""
        # Browsers see for themselves which kind of picture it is.
        data = base64.b64encode(_thumbnail(self.pictures[digest])).decode()
        return f'<img src="data:image/png;base64,{data}" title="{escape(title)}" style="height:64px;display:inline;margin:1px">'


def _thumbnail(picture: bytes) -> bytes:
    """A small copy, for a notebook is saved with what it shows; the picture itself where there is no Pillow, or it can't read it."""
    out = io.BytesIO()
    try:
        from PIL import Image, ImageOps

        with Image.open(io.BytesIO(picture)) as opened:
            small = ImageOps.exif_transpose(opened).convert("RGB")
        small.thumbnail((512, 128))
        small.save(out, "PNG")
    except (ImportError, OSError):
        return picture
    return out.getvalue()


def _row(unit: UnitResult) -> tuple[str, int, str, float | None, str, str, str, str]:
    score = unit.concepts[0].score if unit.concepts and unit.concepts[0].HasField("score") else None
    second, third = [*(concept.concept for concept in unit.concepts[1:3]), "", ""][:2]
    return unit.layer, unit.unit, unit.label, score, second, third, UnitState.Name(unit.state).removeprefix("UNIT_STATE_").lower(), unit.reason


def _pictures(unit: UnitResult) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Digests and captions of the pictures that excite the unit most, and of those drawn of its label that do."""
    exciting = [(image.digest, image.caption) for image in unit.images[:SHOWN_PICTURES]]
    drawn = sorted((picture for picture in unit.concepts[0].pictures if picture.rank), key=lambda picture: picture.rank) if unit.concepts else []
    return exciting, [(picture.digest, f"rank {picture.rank}") for picture in drawn[:SHOWN_PICTURES]]
