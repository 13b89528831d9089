"""Ask about a video while it plays: encode once, answer from the few frames that matter.

    pip install 'kv-offload[video]'
    python examples/streaming_video_qa.py [VIDEO] [--question "/at 12:30 what is on the table"]

Without a video it makes one of BadgeWorld, and asks the small model that comes with the package.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path

from offload.video.answerer import Answerer
from offload.video.badge_adapter import badge_adapter
from offload.video.badge_world import make_stream, write_mp4
from offload.video.encoder import StreamEncoder
from offload.video.evidence import clock, contact_sheet, timeline
from offload.video.question_files import typed_question
from offload.video.retrieval import RetrievalPlan
from offload.video.sources import open_source
from offload.video.stream import VideoStream
from offload.video.types import Question

FRAMES = 600


def main() -> None:
    """Encode the video piece by piece, and ask when each question's time has come."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("video", nargs="?", help="a file, a webcam:0, an rtsp:// address")
    parser.add_argument("--question", action="append", help="any number of them")
    parser.add_argument("--pictures", type=Path, default=Path("evidence"), help="a folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        video: str | None = options.video
        questions = list[Question]()
        if video is None:
            frames, questions = make_stream(FRAMES, seed=0)
            video = str(Path(folder) / "badges.mp4")
            write_mp4(Path(video), frames)
            questions = questions[:: max(1, len(questions) // 6)]
        typed = enumerate(options.question or [], 1)
        questions += [typed_question(text, f"q{number}") for number, text in typed]
        waiting = sorted(questions, key=lambda each: each.time_s or float("inf"))

        stream = VideoStream(
            badge_adapter(),
            capacity={"gpu": "1MiB", "cpu": "1MiB", "disk": "1GiB"},
            disk_path=folder,
        )
        encoder = StreamEncoder(stream, window_tokens=96)
        answerer = Answerer(stream, RetrievalPlan("tokmax", num_units=4, num_recent=1))
        options.pictures.mkdir(exist_ok=True)
        with open_source(video, fps=1) as source:
            while True:
                piece = list(islice(source, 16))
                encoder.add(piece)
                now = piece[-1].time_s if piece else float("inf")
                while waiting and (waiting[0].time_s or float("inf")) <= now:
                    answer = answerer.ask(waiting.pop(0))
                    asked = answer.question
                    print(f"[{clock(asked.time_s or 0)}] {asked.text}: {answer.text}", end="")
                    print(f"  (right: {asked.answer})" if asked.answer else "")
                    for frame in answer.evidence[:2]:
                        print(f"    from {clock(frame.time_s)}, {frame.score:.0%} of attention")
                    contact_sheet(answer, stream.thumbnails, options.pictures / f"{asked.id}.png")
                    timeline(answer, options.pictures / f"{asked.id}-timeline.png", FRAMES)
                if not piece:
                    break
        read = ", ".join(f"{n >> 10} KiB {tier}" for tier, n in stream.store.bytes_from.items())
        print(f"{stream.units.num_frames} frames; answers read {read}")
        stream.close()


if __name__ == "__main__":
    main()
