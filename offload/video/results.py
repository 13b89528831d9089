"""From answers to the result file of each benchmark, so that its own scorer runs unchanged.

Official scorers look for a letter in whatever was said ("Cannot tell" has a C in it). So where a
reply names a choice, its letter is written, and where it names none, something that no scorer takes
for a letter; the reply itself stays in the file of answers.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from offload.errors import ConfigError
from offload.video.choices import letter_of, parse_choice
from offload.video.types import Answer

NO_LETTER = "?"
"""In place of a letter, where an empty text would make the scorer of StreamingBench fail."""


class Result(NamedTuple):
    """The content of a result file.

    Attributes
    ----------
    text : str
    num_answered : int
        Questions that are in it with an answer.
    missing : tuple of str
        Ids of questions that have no answer; they are not in the file, or without a response.
    """

    text: str
    num_answered: int
    missing: tuple[str, ...]


Converter = Callable[[Path, Mapping[str, Answer], str], Result]
"""Annotations, answers by question, and name of the model, to the content of a result file."""


def write_result(result: Result, path: Path) -> None:
    """Write a result file, replacing what is there; it is there whole or not at all.

    Raises
    ------
    ConfigError
        It cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(result.text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise ConfigError(f"result to {path}: {error.strerror}") from error


def chosen_letter(reply: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that a reply means, or None."""
    place = parse_choice(reply, choices)
    return None if place is None else letter_of(place)
