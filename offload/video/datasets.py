"""The benchmarks by name: how each is read, and which result file its own scorer wants.

Nothing is downloaded; ``docs/video-benchmarks.md`` says which file goes where.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offload.errors import ConfigError
from offload.video import dataset_streamingbench as streamingbench
from offload.video import results_rekv, results_streaming
from offload.video.dataset_items import Item, find_video, part_of, require_videos
from offload.video.dataset_ovobench import read_ovobench
from offload.video.dataset_rekv import read_rekv
from offload.video.question_files import read_question_items
from offload.video.results import Converter
from offload.video.types import Question

__all__ = ["DATASETS", "Dataset", "Item", "dataset", "find_video", "part_of", "require_videos"]


def _nothing_follows(question: Question, reply: str) -> Question | None:
    return None


@dataclass(frozen=True, slots=True)
class Dataset:
    """A benchmark.

    Attributes
    ----------
    name : str
    read : callable
        Annotation file and folder of the videos (or None) to items. Raises ConfigError, naming
        file, entry and field.
    convert : callable or None
        To the content of the official result file; None where there is none but the answers.
    follow_up : callable
        Question and reply to the question that has to be asked next at the same time, or None.
    """

    name: str
    read: Callable[[Path, Path | None], list[Item]]
    convert: Converter | None
    follow_up: Callable[[Question, str], Question | None] = _nothing_follows


_REKV = ("rvs_ego", "rvs_movie", "qaego4d", "mlvu", "activitynet_qa", "cgbench")

DATASETS: dict[str, Dataset] = {
    entry.name: entry
    for entry in (
        *(Dataset(name, read_rekv, results_rekv.rekv_csv) for name in _REKV),
        Dataset("egoschema", read_rekv, results_rekv.egoschema_csv),
        Dataset(
            "streamingbench_real", streamingbench.read_real, results_streaming.streamingbench_json
        ),
        Dataset(
            "streamingbench_omni", streamingbench.read_real, results_streaming.streamingbench_json
        ),
        Dataset(
            "streamingbench_sqa", streamingbench.read_sqa, results_streaming.streamingbench_json
        ),
        Dataset(
            "streamingbench_proactive",
            streamingbench.read_proactive,
            results_streaming.proactive_json,
            streamingbench.follow_up,
        ),
        Dataset("ovobench", read_ovobench, results_streaming.ovobench_json),
        Dataset("questions", read_question_items, None),
    )
}
"""By name; the names of the first seven are those of ReKV's scripts."""


def dataset(name: str) -> Dataset:
    """Return a benchmark.

    Raises
    ------
    ConfigError
        There is none of that name; the message lists those that there are.
    """
    if name not in DATASETS:
        raise ConfigError(f"there is no dataset {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name]
