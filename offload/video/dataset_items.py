"""What every benchmark becomes: videos, each with its questions in the order they are asked."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from offload.errors import ConfigError
from offload.video.types import Question

_SUFFIXES = (".mp4", ".mkv", ".webm", ".npy")
"""Under which the same video is found elsewhere: RVS has frames as arrays, YouTube has no mp4."""


@dataclass(frozen=True, slots=True)
class Item:
    """A video, to be encoded once, and everything that is asked about it.

    Attributes
    ----------
    video_id : str
    video_path : Path
        Where the video is, or, if it was found nowhere, where it should be.
    duration_s : float or None
        As the annotations have it.
    questions : tuple of Question
        By the time they are asked, those at the end of the video last; else as in the file. Their
        ids are unique in the whole benchmark.
    tasks : mapping of str to str
        From the id of a question to the name of its task, where the benchmark has tasks.
    """

    video_id: str
    video_path: Path
    duration_s: float | None
    questions: tuple[Question, ...]
    tasks: Mapping[str, str] = field(default_factory=dict)


class ItemList:
    """Collects questions in the order of a file and gives them back by video.

    Parameters
    ----------
    data_root : Path or None
        Folder of the videos; None: the paths of the annotations are right.
    """

    def __init__(self, data_root: Path | None) -> None:
        self._data_root = data_root
        self._items: dict[str, Item] = {}
        self._questions: dict[str, list[Question]] = {}
        self._tasks: dict[str, dict[str, str]] = {}
        self._seen: set[str] = set()

    def add(
        self,
        video_id: str,
        video: str,
        question: Question,
        *,
        task: str | None = None,
        duration_s: float | None = None,
        where: str,
    ) -> None:
        """Add a question; the first one about a video says where the video is.

        Raises
        ------
        ConfigError
            There is a question of that id; ``where`` names the second one.
        """
        if question.id in self._seen:
            raise ConfigError(f"{where}: the id {question.id!r} is that of an earlier question")
        self._seen.add(question.id)
        if video_id not in self._items:
            path = find_video(video, self._data_root)
            self._items[video_id] = Item(video_id, path, duration_s, ())
        self._questions.setdefault(video_id, []).append(question)
        if task is not None:
            self._tasks.setdefault(video_id, {})[question.id] = task

    def by_video(self) -> list[Item]:
        """Return the items, in the order in which their videos appeared."""
        return [
            replace(
                item, questions=in_order(self._questions[name]), tasks=self._tasks.get(name, {})
            )
            for name, item in self._items.items()
        ]


def in_order(questions: Iterable[Question]) -> tuple[Question, ...]:
    """Return questions by the time they are asked, otherwise in their order."""
    return tuple(sorted(questions, key=_ask_time_s))


def find_video(video: str, data_root: Path | None) -> Path:
    """Return where a video is that annotations name by a path of somebody else's.

    Tried in the folder ``data_root``: the path, the path without its first folder, without its
    first two, …, the bare file name; then the path as it is. Each is tried with the suffixes of
    other forms of the same video, too.

    Parameters
    ----------
    video : str
        Relative or absolute, with slashes.
    data_root : Path or None

    Returns
    -------
    Path
        The first that exists; if none does, the path in ``data_root``.
    """
    parts = [part for part in PurePosixPath(video).parts if part not in ("/", ".", "..")]
    tried = [Path(video)]
    if data_root is not None:
        tried = [data_root.joinpath(*parts[start:]) for start in range(len(parts))] + tried
    for path in tried:
        forms = [path.with_suffix(suffix) for suffix in _SUFFIXES if path.name]
        for candidate in (path, *forms):
            if candidate.is_file():
                return candidate
    return tried[0]


def require_videos(items: Sequence[Item]) -> None:
    """Raise ConfigError if the video of any item is missing; it says how many, and the first."""
    missing = [item.video_path for item in items if not item.video_path.is_file()]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(items)} videos are missing, the first is {missing[0]}; "
            f"--data-root names the folder that has them"
        )


def part_of(
    items: Sequence[Item], *, limit: int | None = None, shard: tuple[int, int] = (0, 1)
) -> list[Item]:
    """Return some of the items: every ``n``-th from the ``i``-th, and of these the first ones.

    Parameters
    ----------
    items : sequence of Item
    limit : int or None
        How many at most.
    shard : (int, int)
        ``(i, n)`` with ``0 <= i < n``; the n shards are disjoint and together everything.

    Raises
    ------
    ConfigError
    """
    number, count = shard
    if not 0 <= number < count:
        raise ConfigError(f"shard {number}/{count}: the first number runs from 0 to {count - 1}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit}: at least one video is needed")
    return list(items[number::count])[:limit]


def _ask_time_s(question: Question) -> float:
    return math.inf if question.time_s is None else question.time_s
