import pytest

from offload.video.choices import (
    letter_of,
    parse_choice,
    parse_count,
    parse_yes_no,
    place_of,
    plain_choices,
)

COLOURS = ("The blue one", "A green one", "The red one", "Red and blue")
NUMBERS = ("5", "4", "1", "2")
LETTERS = ("B", "A", "D", "C")
ACTIONS = ("A man is running", "A man is walking", "I am not sure", "Nothing")


@pytest.mark.parametrize(
    ("reply", "place"),
    [
        ("C", 2),
        ("c", 2),
        ("C.", 2),
        (" (C)\n", 2),
        ("(C", 2),
        ("[C]", 2),
        ("**C**", 2),
        ("**C.** The red one", 2),
        ("C) The red one", 2),
        ("c) the red one", 2),
        ("C: because it is so", 2),
        ("C because the man holds it", 2),
        ("C The red one", 2),
        ("C.The red one", 2),
        ("Best option: (C", 2),
        ("Best option: (C) The red one", 2),
        ("Best option: (C) because (A) is not there", 2),
        ("The best option is: C", 2),
        ("The correct answer is C.", 2),
        ("the answer is c.", 2),
        ("Answer: c", 2),
        ("Answer: A because it is blue", 0),
        ("Option B", 1),
        ("I would say (B) fits best", 1),
        ("C。", 2),
        ("\uff08C\uff09", 2),
        ("<think>(A) or (B)?</think>\nC", 2),
        (r"\boxed{C}", 2),
        ("the red one", 2),
        ("The red one.", 2),
        ("It is the red one, I think", 2),
        ("Answer: a green one", 1),
        ("The answer is A green one", 1),
        ("Red and", 3),
    ],
)
def test_choice_of_a_reply_is_found_however_it_is_said(reply: str, place: int) -> None:
    assert parse_choice(reply, COLOURS) == place


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "  \n",
        "?",
        "E",
        "(F) something else",
        "I cannot tell",
        "A yellow one",
        "the answer is a yellow one",
        "The blue one or a green one",
        "either (A) or (B) would do",
        "<think>It could be (A), or",
    ],
)
def test_choice_of_a_reply_that_names_none_or_two_is_none(reply: str) -> None:
    assert parse_choice(reply, COLOURS) is None


@pytest.mark.parametrize(
    ("reply", "choices", "place"),
    [
        ("2", NUMBERS, 3),
        ("B", NUMBERS, 1),
        ("(B) 4", NUMBERS, 1),
        ("There are 4 of them", NUMBERS, 1),
        ("54", NUMBERS, None),
        ("A", LETTERS, 0),
        ("A man is walking", ACTIONS, 1),
        ("A man is", ACTIONS, None),
        ("A man is sleeping", ACTIONS, None),
        ("I am not sure", ACTIONS, 2),
        ("-5", ("5", "-5"), 1),
        ("a red car", ("car", "red car", "bus"), 1),
        ("red", ("blue", "red", "red"), 1),
        ("D. Carter", ("A. Wade", "B. Tyler", "D. Carter", "C. Jensen"), 2),
        ("Yes, they are", ("Yes", "No"), 0),
        ("2->4->3->1", ("1->2->3->4", "2->4->3->1"), 1),
        ("anything", (), None),
    ],
)
def test_choice_whose_text_looks_like_something_else_is_still_the_right_one(
    reply: str, choices: tuple[str, ...], place: int | None
) -> None:
    assert parse_choice(reply, choices) == place


@pytest.mark.parametrize(
    ("answer", "place"),
    [("The red one", 2), (" The red one ", 2), ("C", 2), ("c", 2), ("(C)", 2), ("C.", 2), (2, 2)],
)
def test_place_of_an_answer_is_that_of_its_text_letter_or_number(
    answer: str | int, place: int
) -> None:
    assert place_of(answer, COLOURS) == place


@pytest.mark.parametrize("answer", ["yellow", "E", "", 4, -1])
def test_place_of_an_answer_that_is_no_choice_is_none(answer: str | int) -> None:
    assert place_of(answer, COLOURS) is None


def test_place_of_an_answer_is_by_text_where_choices_are_letters() -> None:
    assert [place_of(letter_of(place), LETTERS) for place in range(4)] == [1, 0, 3, 2]


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        (["A. red", "B. blue"], ("red", "blue")),
        (["A.red", "B) blue", "(C) green"], ("red", "blue", "green")),
        (["red", "blue"], ("red", "blue")),
        (["A. Wade", "B. Tyler", "D. Carter"], ("A. Wade", "B. Tyler", "D. Carter")),
        (["A. Lebrun", "Fan Z.D."], ("A. Lebrun", "Fan Z.D.")),
    ],
)
def test_plain_choices_lose_letters_only_where_all_are_in_order(
    options: list[str], plain: tuple[str, ...]
) -> None:
    assert plain_choices(options) == plain


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("Yes", True),
        ("yes.", True),
        ("No, not yet", False),
        ("No. Yes would be wrong.", False),
        ("I think yes", True),
        ("yesterday", None),
        ("It may be yes or no", None),
        ("", None),
        ("<think>no</think>Yes", True),
    ],
)
def test_yes_or_no_of_a_reply_is_its_first_word_or_its_only_one(
    reply: str, said: bool | None
) -> None:
    assert parse_yes_no(reply) is said


@pytest.mark.parametrize(
    ("reply", "count"),
    [
        ("3", 3),
        ("They did it 12 times.", 12),
        ("Three times", 3),
        ("3 (three)", 3),
        ("2 or 3", None),
        ("2.5", None),
        ("many", None),
        ("9" * 5000, None),
    ],
)
def test_count_of_a_reply_is_its_only_whole_number(reply: str, count: int | None) -> None:
    assert parse_count(reply) == count
