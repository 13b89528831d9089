"""``offload video eval``: run a benchmark on its own files, and write its own result file."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from offload.cli_options import positive_int
from offload.errors import ConfigError
from offload.video.answer_files import AnswerFile, answers_by_id, read_answers
from offload.video.answer_records import Record
from offload.video.answerer import Answerer
from offload.video.cli_common import (
    add_model_options,
    add_retrieval_options,
    open_adapter,
    plan_of,
    stream_options,
)
from offload.video.datasets import DATASETS, Dataset, Item, dataset, part_of, require_videos
from offload.video.encoder import StreamEncoder
from offload.video.playing import in_pieces, play
from offload.video.results import write_result
from offload.video.score_table import latency_table, score_table
from offload.video.sources import open_source
from offload.video.stream import VideoStream


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    """Register the command."""
    text = "Encode each video of a benchmark once, and ask its questions at their times."
    parser = kinds.add_parser(name, help="run a benchmark", description=text)
    parser.add_argument(
        "dataset", choices=list(DATASETS), metavar="DATASET", help=", ".join(DATASETS)
    )
    parser.add_argument("annotations", type=Path, help="the benchmark's own JSON")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="where the videos are")
    text = "answers as JSONL; a run that was interrupted goes on from there"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=text)
    parser.add_argument("--results", type=Path, metavar="FILE", help="the benchmark's result file")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="videos, at most")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="every N-th")
    text = "frames to take per second (default: %(default)s)"
    parser.add_argument("--fps", type=float, default=0.5, metavar="F", help=text)
    text = "tokens before each frame that it sees (default: %(default)s)"
    parser.add_argument("--window", type=positive_int, default=15000, metavar="N", help=text)
    add_retrieval_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Answer, score, and convert.

    Raises
    ------
    ConfigError
        A file cannot be read, or videos are missing.
    """
    benchmark = dataset(args.dataset)
    items = benchmark.read(args.annotations, args.data_root)
    items = part_of(items, limit=args.limit, shard=args.shard)
    require_videos(items)
    adapter = open_adapter(args)
    with AnswerFile(args.out) as answers, tqdm(items, unit="video") as bar:
        for item in bar:
            left = [each for each in item.questions if each.id not in answers.done]
            if not left:
                continue
            bar.set_description(item.video_id)
            stream = VideoStream(adapter, **stream_options(args))
            try:
                _ask(args, benchmark, item, stream, answers)
            finally:
                stream.close()
    records = read_answers(args.out)
    _print(records)
    if args.results is not None:
        if benchmark.convert is None:
            raise ConfigError(f"{benchmark.name} has no result file but the answers")
        result = benchmark.convert(args.annotations, answers_by_id(records), adapter.name)
        write_result(result, args.results)
        print(f"{args.results}: {result.num_answered} answers, {len(result.missing)} missing")


def _ask(
    args: argparse.Namespace,
    benchmark: Dataset,
    item: Item,
    stream: VideoStream,
    answers: AnswerFile,
) -> None:
    left = [each for each in item.questions if each.id not in answers.done]
    answerer = Answerer(stream, plan_of(args, stream.adapter), max_tokens=args.max_tokens)
    encoder = StreamEncoder(stream, args.window)
    with open_source(item.video_path, fps=args.fps) as source:
        pieces = in_pieces(source)
        for answer in play(pieces, encoder, answerer, left, follow_up=benchmark.follow_up):
            task = item.tasks.get(answer.question.id)
            answers.append(answer, video_id=item.video_id, task=task)


def _print(records: list[Record]) -> None:
    table = Table("task", "answers", "accuracy", "token F1", "evidence recall", "precision")
    for row in score_table(records):
        found = row.evidence
        table.add_row(
            row.task,
            str(row.num_answers),
            _share(row.accuracy),
            _share(row.token_f1),
            _share(None if found is None else found.recall),
            _share(None if found is None else found.precision),
        )
    times = Table("milliseconds", "median", "90 %", "99 %")
    for part, values in latency_table(records).items():
        times.add_row(part, *(f"{value:.0f}" for value in values.values()))
    Console().print(table, times, sep="\n")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 0/8")
    return int(number), int(count)
