"""Frames are lent to one at a time; whoever finds none waits, and not for ever."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from offload.errors import ClosedError, TransferTimeout
from offload.tiers.near.frames import Frames

WAIT_S = 30.0


def make_frames(count: int = 3) -> Frames:
    return Frames(torch.zeros(count * 8 + 7, dtype=torch.uint8), 8)


def test_frames_do_not_overlap_and_a_rest_that_is_no_frame_is_left_out() -> None:
    memory = torch.zeros(3 * 8 + 7, dtype=torch.uint8)
    frames = Frames(memory, 8)
    assert frames.count == 3
    for number in frames.take(3, 0, "write"):
        frames[number].fill_(number + 1)
    assert memory.tolist() == [1] * 8 + [2] * 8 + [3] * 8 + [0] * 7


def test_taking_more_than_are_free_times_out_and_takes_nothing() -> None:
    frames = make_frames()
    held = frames.take(2, 0, "write of 2 chunks")
    with pytest.raises(
        TransferTimeout, match=r"read of 2 chunks: no 2 of 3 shared frames free for 0\.01 s"
    ):
        frames.take(2, 0.01, "read of 2 chunks")
    assert len(frames.take(1, 0, "read of 1 chunk")) == 1
    frames.give(held)
    assert sorted(frames.take(2, 0, "read of 2 chunks")) == sorted(held)


def test_whoever_waits_gets_frames_when_they_are_given_back() -> None:
    frames = make_frames()
    held = frames.take(3, 0, "write")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(frames.take, 2, WAIT_S, "read")
        frames.give(held[:1])
        assert not waiting.done()
        frames.give(held[1:])
        assert len(waiting.result(WAIT_S)) == 2


def test_closing_lets_go_of_the_memory_and_of_all_who_wait() -> None:
    frames = make_frames()
    frames.take(3, 0, "write")
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(frames.take, 1, WAIT_S, "disk attend") for _ in range(2)]
        frames.close()
        for each in waiting:
            with pytest.raises(ClosedError, match="disk attend: the disk tier is closed"):
                each.result(WAIT_S)
    frames.give([0])
    frames.close()
    with pytest.raises(ClosedError):
        frames.take(1, 0, "read")
    with pytest.raises(ClosedError):
        frames[0]
