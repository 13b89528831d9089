from pathlib import Path

import pytest

from offload.errors import ConfigError
from offload.video.dataset_items import Item, find_video, in_order, part_of, require_videos
from offload.video.datasets import DATASETS, dataset
from offload.video.types import Question

NAMES = ["a", "b", "c", "d", "e", "f", "g"]


def items(*names: str, folder: Path = Path()) -> list[Item]:
    return [Item(name, folder / f"{name}.mp4", None, ()) for name in names]


@pytest.mark.parametrize(
    "where",
    ["data/rvs/ego/videos/x.mp4", "rvs/ego/videos/x.mp4", "videos/x.mp4", "x.mp4", "x.npy"],
)
@pytest.mark.parametrize("prefix", ["", "/", "./", "../"])
def test_video_is_found_under_any_end_of_its_path(tmp_path: Path, where: str, prefix: str) -> None:
    there = tmp_path / where
    there.parent.mkdir(parents=True, exist_ok=True)
    there.touch()
    assert find_video(f"{prefix}data/rvs/ego/videos/x.mp4", tmp_path) == there


def test_video_with_the_longest_matching_path_is_taken(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.mp4").touch()
    (tmp_path / "x.mp4").touch()
    assert find_video("data/two/x.mp4", tmp_path) == tmp_path / "two" / "x.mp4"


def test_video_path_that_is_right_is_taken_without_a_root(tmp_path: Path) -> None:
    video = tmp_path / "x.mp4"
    video.touch()
    assert find_video(str(video), None) == video


def test_video_that_is_nowhere_keeps_its_path_in_the_root(tmp_path: Path) -> None:
    assert find_video("./videos/x.mp4", tmp_path) == tmp_path / "videos" / "x.mp4"


def test_missing_videos_are_refused_with_their_number_and_the_first(tmp_path: Path) -> None:
    found = items("a", "b", "c", folder=tmp_path)
    found[1].video_path.touch()
    with pytest.raises(ConfigError, match=r"2 of 3 videos are missing, the first is .*a\.mp4"):
        require_videos(found)


def test_videos_that_are_all_there_are_accepted(tmp_path: Path) -> None:
    found = items("a", folder=tmp_path)
    found[0].video_path.touch()
    require_videos(found)


def test_questions_of_one_time_keep_their_order_and_those_at_the_end_come_last() -> None:
    asked = [("end", None), ("late", 9.0), ("one", 5.0), ("two", 5.0), ("start", 0.0)]
    questions = in_order(Question(name, "?", time_s=time_s) for name, time_s in asked)
    assert [question.id for question in questions] == ["start", "one", "two", "late", "end"]


def test_shards_are_disjoint_and_together_everything() -> None:
    shards = [part_of(items(*NAMES), shard=(number, 3)) for number in range(3)]
    names = [item.video_id for shard in shards for item in shard]
    assert sorted(names) == NAMES
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_limit_takes_the_first_of_the_shard() -> None:
    some = part_of(items(*NAMES), limit=2, shard=(1, 2))
    assert [item.video_id for item in some] == ["b", "d"]


@pytest.mark.parametrize("shard", [(3, 3), (-1, 3), (0, 0)])
def test_shard_that_does_not_exist_is_refused(shard: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"shard {shard[0]}/{shard[1]}"):
        part_of(items(*NAMES), shard=shard)


def test_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="limit 0"):
        part_of(items(*NAMES), limit=0)


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_is_found_by_its_name(name: str) -> None:
    assert dataset(name).name == name


def test_dataset_of_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no dataset 'msvd'; there are rvs_ego, .*ovobench"):
        dataset("msvd")


@pytest.mark.parametrize("name", [name for name in DATASETS if "proactive" not in name])
def test_dataset_without_polls_has_nothing_follow_an_answer(name: str) -> None:
    assert dataset(name).follow_up(Question("v/0@21", "Is it time?"), "Yes") is None
