import numpy as np
import pytest

from bdlm_jax.serving.answers import as_table
from bdlm_jax.serving.catalogue import Catalogue, find_items, find_user
from bdlm_jax.types import InputError

TITLES = ["The Good, the Bad and the Ugly", "Alien", "Aliens", "Heat; and Dust", "Shoe", "shoe", "12 Monkeys", "Bad"]
CATALOGUE = Catalogue(
    ["ann", "bob"], [str(100 + i) for i in range(len(TITLES))], TITLES, np.array([0, 1, 1]), np.array([0])
)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ("100", [0]),
        ("102, 101;100", [2, 1, 0]),
        ("alien", [1]),  # exact before part: also in Aliens
        ("the good, the bad and the ugly, Aliens", [0, 2]),  # the longest title, not "Bad" and its pieces
        ("Good, the Bad; 101", [0, 1]),  # part of one title, across a comma
        ("Heat; and Dust;Bad", [3, 7]),
        ("monkeys", [6]),
        (" ,; 101 ;, ", [1]),
        ("101, Alien, 101", [1]),
        (["Heat; and Dust", "103", "102"], [3, 2]),
        ("Shoe", r"'Shoe' names 2 items, such as 104 \(Shoe\), 105 \(shoe\): give the id of one"),
        ("lie", r"'lie' names 2 items, such as 101 \(Alien\), 102 \(Aliens\)"),
        ("Alein", r"'Alein' is no item id and no part of a title: did you mean Alien \(101\); Aliens \(102\)"),
        ("101; qqqqqq", r"'qqqqqq' is no item id and no part of a title: give an id"),
        ("", "the history is empty"),
        (" ; ", "the history is empty"),
        ([], "the history is empty"),
        ([""], "'' is no item id"),
    ],
)
def test_histories_are_read_by_id_and_title_or_refused_with_suggestions(history, expected):
    if isinstance(expected, list):
        assert find_items(CATALOGUE, history).tolist() == expected
    else:
        with pytest.raises(InputError, match=expected):
            find_items(CATALOGUE, history)


def test_an_unknown_user_is_said_with_ids_that_look_alike():
    assert find_user(CATALOGUE, " bob ") == 1
    with pytest.raises(InputError, match=r"user 'anne' is none of the 2 of this run \(known are ann"):
        find_user(CATALOGUE, "anne")


def test_a_title_cannot_drive_the_terminal():
    row = {"rank": 1, "item": "7", "title": "\x1b[31mred\nline\u202e", "score": 0.5}
    assert as_table([row]).splitlines()[1:] == ["   1  7        0.5000  [31mred line"]
