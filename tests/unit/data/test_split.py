from types import SimpleNamespace

import pytest

from luthier.data.split import assign, split_column
from luthier.data.table import Table
from luthier.errors import DataError


def config(type="auto", probabilities=(0.8, 0.1, 0.1), column=None, group=None, seed=None):
    return SimpleNamespace(type=type, probabilities=probabilities, column=column, group=group, seed=seed)


def table(**columns):
    return Table.from_columns(columns, "t.csv")


def numbered(rows, **more):
    return table(q=[f"question {i}" for i in range(rows)], a=[f"answer {i}" for i in range(rows)], **more)


def test_a_split_column_is_honoured_unless_another_type_is_said():
    given = numbered(6, split=["train", "0", 0, "val", "dev", "TEST"])
    result = assign(given, config(), seed=1)
    assert result.rows == [0, 0, 0, 1, 1, 2] and result.type == "fixed"
    drawn = assign(given, config("random"), seed=1)
    assert drawn.type == "random" and "not used" in drawn.notes[0]
    assert split_column(numbered(2)) is None


def test_random_has_the_shares_and_follows_the_seed():
    big = numbered(100)
    result = assign(big, config(), seed=1)
    assert result.counts == {"train": 80, "validation": 10, "test": 10}
    assert result.rows == assign(big, config(), seed=1).rows != assign(big, config(), seed=2).rows
    assert result.rows == assign(big, config(seed=1), seed=9).rows


def test_stratify_puts_every_class_in_every_split():
    labels = ["a"] * 90 + ["b"] * 7 + ["c"] * 3
    result = assign(table(q=[f"q {i}" for i in range(100)], y=labels), config(), seed=3, target="y")
    assert result.type == "stratify"
    for side in range(3):
        assert {y for y, s in zip(labels, result.rows, strict=True) if s == side} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("sets", "rows", "shares"),
    [
        (4, 10, (0.7, 0.1, 0.2)),
        (5, 2, (0.7, 0.1, 0.2)),
        (3, 20, (0.8, 0.1, 0.1)),
        (3, 4, (0.9, 0.05, 0.05)),
        (3, 1, (0.7, 0.1, 0.2)),
    ],
)
def test_every_split_gets_rows_of_every_class_that_has_a_set_for_each(sets, rows, shares):
    """Customers of ten rows, the same text twenty times: whole sets go to the splits, the smallest ones last."""
    named = [(y, f"{y}{one}") for y in "abc" for one in range(sets) for _ in range(rows)]
    labels, people = [y for y, _ in named], [who for _, who in named]
    told = table(q=[f"q {i}" for i in range(len(named))], y=labels, who=people)
    for seed in range(20):
        result = assign(told, config("stratify", probabilities=shares, group="who"), seed=seed, target="y")
        assert list(result.notes) == []
        assert len(set(zip(people, result.rows, strict=True))) == 3 * sets
        for side in range(3):
            assert {y for y, s in zip(labels, result.rows, strict=True) if s == side} == {"a", "b", "c"}
        assert max(result.counts, key=result.counts.get) == "train" or sets == 3
        drawn = assign(told, config("random", probabilities=shares, group="who"), seed=seed)
        assert all(drawn.counts.values()) or len(named) < 10


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_rows_without_an_answer_are_no_class(empty):
    """They are dropped: the others are divided as if they were not there, and nothing is said of them."""
    labels = ["a"] * 50 + ["b"] * 45
    asked = [f"q {i}" for i in range(95)]
    whole = assign(table(q=asked, y=labels), config(), seed=3, target="y")
    result = assign(table(q=[*asked, "q new", "q 0"], y=[*labels, empty, empty]), config(), seed=3, target="y")
    assert (result.type, list(result.notes)) == ("stratify", [])
    assert result.rows == [*whole.rows, 0, whole.rows[0]]
    other = assign(table(q=asked, y=labels, w=[empty, *labels[1:]]), config("stratify", column="w"), seed=3, target="y")
    assert any("no value in 'w' has 1 separate rows" in note for note in other.notes)


def test_too_few_sets_for_every_split_are_told():
    result = assign(numbered(40, who=[i % 2 for i in range(40)]), config("random", group="who"), seed=1)
    assert any("2 sets, too few for every split" in note for note in result.notes)


def test_groups_and_duplicates_stay_on_one_side():
    people = [f"p{i % 20}" for i in range(100)]
    result = assign(numbered(100, who=people), config(group="who"), seed=1)
    assert len({(who, side) for who, side in zip(people, result.rows, strict=True)}) == 20
    twice = table(q=[f"What is {i // 2}?" if i % 2 else f"what  IS {i // 2}?" for i in range(100)], a=["x"] * 100)
    result = assign(twice, config(), seed=1, target="a", columns=["q"])
    assert result.rows[0::2] == result.rows[1::2] and result.duplicates == 50
    assert result.counts["test"] == 10


@pytest.mark.parametrize("kind", ["random", "hash"])
def test_rows_without_a_group_are_told_and_do_not_belong_together(kind):
    people = [None if i % 4 == 0 else "" if i % 4 == 1 else f"p{i % 20}" for i in range(200)]
    result = assign(numbered(200, who=people), config(kind, column="who", group="who"), seed=1)
    told = "100 rows have no value in 'who' (preprocessing.split.group): each counts as a group of its own"
    assert told in result.notes
    alone = [side for who, side in zip(people, result.rows, strict=True) if not who]
    assert 40 < alone.count(0) < 100 and set(alone) == {0, 1, 2}
    assert not any(
        "no value" in note for note in assign(numbered(20, who=["a", "b"] * 10), config(group="who"), seed=1).notes
    )


def test_near_duplicates_stay_on_one_side(before=""):
    import random

    draw = random.Random(0)
    texts = [" ".join(draw.choice("abcdefgh") * 3 + str(draw.randrange(999)) for _ in range(40)) for _ in range(50)]
    pairs = [before + t for text in texts for t in (text, text + " indeed")]
    result = assign(table(q=pairs), config(), seed=1)
    assert result.rows[0::2] == result.rows[1::2]
    apart = assign(table(q=pairs), config(), seed=1, near_duplicates=False)
    assert apart.rows[0::2] != apart.rows[1::2]


def distinct_texts(count):
    import random

    draw = random.Random(0)
    return [" ".join(draw.choice("abcdefgh") * 3 + str(draw.randrange(999)) for _ in range(40)) for _ in range(count)]


def test_hash_keeps_duplicates_and_equal_values_on_one_side_as_the_table_grows():
    texts = distinct_texts(60)
    asked = [*texts, *(text + " indeed" for text in texts[:30]), *texts[30:]]
    people = [f"p{i % 20}" for i in range(60)] + [f"q{i}" for i in range(60)]
    told = table(q=asked, who=people)
    result = assign(told, config("hash", (0.5, 0.25, 0.25), column="who"), seed=1)
    assert result.rows[:60] == result.rows[60:] and set(result.rows) == {0, 1, 2} and result.leaked == 0
    assert len(set(zip(people, result.rows, strict=True))) == len(set(people))
    first = assign(table(q=asked[:60], who=people[:60]), config("hash", (0.5, 0.25, 0.25), column="who"), seed=1)
    assert first.rows == result.rows[:60]
    apart = assign(told, config("hash", (0.5, 0.25, 0.25), column="who"), seed=1, near_duplicates=False)
    assert apart.rows[:30] != apart.rows[60:90] and apart.rows[30:60] == apart.rows[90:]


def test_datetime_tells_near_duplicates_across_the_cut_and_moves_none():
    texts = distinct_texts(30)
    days = [f"2024-01-{i + 1:02d}" for i in range(30)]
    asked = [*texts[:29], texts[0] + " indeed"]
    result = assign(table(q=asked, day=days), config("datetime", column="day"), seed=1)
    assert result.rows == [0] * 24 + [1] * 3 + [2] * 3
    assert "1 rows outside train nearly repeat a row in train; scores on them flatter the model" in result.notes
    assert not assign(table(q=asked, day=days), config("datetime", column="day"), seed=1, near_duplicates=False).notes


def test_datetime_tells_held_out_rows_that_are_older_than_train():
    days = [f"2024-01-{i + 1:02d}" for i in range(30)]
    people = ["p"] + [f"q{i}" for i in range(28)] + ["p"]
    result = assign(numbered(30, day=days, who=people), config("datetime", column="day", group="who"), seed=1)
    assert result.rows[0] == result.rows[29] != 0
    assert any("1 rows outside train are older than the newest row in train" in note for note in result.notes)
    assert not assign(numbered(30, day=days), config("datetime", column="day"), seed=1).notes


def test_rows_of_one_common_form_are_still_split():
    forms = [f"Please normalise the following date into the ISO form and say nothing else: day {i}" for i in range(200)]
    result = assign(table(q=forms), config(), seed=1)
    assert result.counts["test"] == 20 and "common form" in result.notes[0]


def test_datetime_puts_the_latest_rows_last():
    days = [f"2024-01-{31 - i:02d}" for i in range(30)]
    result = assign(numbered(30, day=days), config("datetime", column="day"), seed=1)
    assert max(d for d, s in zip(days, result.rows, strict=True) if s == 0) < min(
        d for d, s in zip(days, result.rows, strict=True) if s == 1
    )
    assert result.rows[0] == 2 and result.counts["train"] == 24


@pytest.mark.parametrize(
    "times",
    [
        [str(1701011512345 - 9_000_000 * i) for i in reversed(range(30))],  # the last is ISO 8601 too, of the year 1701
        [f"{1701011512345 - 9_000_000 * i}.5" for i in reversed(range(30))],
        [f"202405{i + 1:02d}" for i in range(30)],
        [f"2024/5/{i + 1}" for i in range(30)],
        [f"2024年05月{i + 1:02d}日" for i in range(30)],
        [f"2024年5月{i + 1}日 9時30分" for i in range(30)],
        [f"{i + 1:02d}/05/2024" for i in range(30)],
        [f"5/{i + 1}/2024 1:05 PM" for i in range(30)],
        [f"{i + 1}.5.2024" if i < 25 else f"2024-05-{i + 1}" for i in range(30)],
        [f"5/1/2024 {(i // 2 + 11) % 12 + 1}:{i % 2 * 30:02d} {'AM' if i < 24 else 'PM'}" for i in range(29)]
        + ["5/13/2024"],
    ],
)
def test_datetime_reads_dates_that_have_one_reading(times):
    result = assign(numbered(30, day=times), config("datetime", column="day"), seed=1)
    assert result.rows == [0] * 24 + [1] * 3 + [2] * 3


def test_datetime_tells_the_order_that_the_column_decides():
    result = assign(
        numbered(3, day=["01/02/2024", "13/02/2024", "03/02/2024"]), config("datetime", column="day"), seed=1
    )
    assert (
        "the dates of t.csv column day are read as day/month/year, the one order that fits all of them" in result.notes
    )


@pytest.mark.parametrize(
    ("days", "row", "said"),
    [
        (["05/05/2024", "01/02/2024"], 1, ["2024-02-01 (day/month/year)", "2024-01-02 (month/day/year)", "2024-05-31"]),
        (["05/05/2024"] * 2, 0, ["2024-05-05 (day/month/year)", "two ways"]),
        (["13/01/2024", "01/13/2024"], 1, ["13/01/2024 (row 0) is no month/day/year", "no one order"]),
        (["13/01/2024", "14/01/2024 25:00"], 1, ["is not a date"]),
        (["2024年2月30日", "2024-01-01"], 0, ["is not a date"]),
    ],
)
def test_dates_of_more_than_one_reading_are_refused(days, row, said):
    with pytest.raises(DataError) as caught:
        assign(numbered(2, day=days), config("datetime", column="day"), seed=1)
    assert f"row {row}" in caught.value.faults[0].where
    assert all(part in str(caught.value) for part in said), str(caught.value)


def test_hash_keeps_rows_when_the_table_grows():
    small, large = numbered(50), numbered(80)
    assert assign(large, config("hash"), seed=1).rows[:50] == assign(small, config("hash"), seed=1).rows


def test_given_sides_that_leak_are_counted():
    result = assign(table(q=["a", "A ", "b"], split=[0, 2, 0]), config(), seed=1)
    assert result.leaked == 1 and "repeat" in result.notes[-1]


@pytest.mark.parametrize(
    "code, columns, options",
    [
        ("data-split", {"split": [1, 2]}, {}),
        ("data-split", {"split": ["train", "tset"]}, {}),
        ("data-split", {"split": [0, None]}, {}),
        ("data-missing-column", {}, {"type": "fixed"}),
        ("data-missing-column", {}, {"type": "random", "group": "who"}),
        ("data-split", {}, {"type": "stratify"}),
        ("data-split", {}, {"type": "datetime"}),
        ("data-split", {"day": ["2024-01-01", "soon"]}, {"type": "datetime", "column": "day"}),
        ("data-split", {}, {"type": "random", "probabilities": (0.5, 0.1, 0.1)}),
        ("data-split", {}, {"type": "random", "probabilities": (0.0, 0.5, 0.5)}),
    ],
)
def test_faults(code, columns, options):
    with pytest.raises(DataError) as caught:
        assign(numbered(2, **columns), config(**options), seed=1)
    assert caught.value.code == code


SHARED = "You are a careful assistant who answers every question about the shop politely and briefly."


@pytest.mark.parametrize("rows", [10, 15, 19])
@pytest.mark.parametrize("place", ["a turn", "a column", "the text"])
def test_what_all_rows_share_makes_no_two_of_them_near_duplicates(rows, place):
    """A table of ten rows under one system prompt was put in training as a whole."""
    asked = [f"{SHARED} Question {i}" for i in range(rows)]
    if place == "a turn":
        asked = [[{"role": "system", "content": SHARED}, {"role": "user", "content": f"q{i}"}] for i in range(rows)]
    more = {"given": [f"ticket {i}" for i in range(rows)]} if place == "a column" else {}
    asked = [SHARED] * rows if place == "a column" else asked
    result = assign(table(q=asked, **more), config(), seed=1)
    assert result.counts["validation"] >= 1 and result.counts["test"] >= 1 and not result.why_none


def test_near_duplicates_under_one_beginning_stay_on_one_side():
    test_near_duplicates_stay_on_one_side(SHARED)


def test_why_no_row_validates_is_told():
    ended = [f"{i} {SHARED}" for i in range(10)]
    for given, settings, told in (
        (
            table(q=ended),
            config(),
            "of 10 rows 9 are nearly like another (preprocessing.near_duplicates: false parts these)",
        ),
        (table(q=["same"] * 10), config(), "9 repeat another, and what belongs together stays so: that is 1 set"),
        (numbered(4, split=[0, 0, 0, 2]), config(), "the column 'split' puts none there"),
        (numbered(10), config(probabilities=(0.9, 0.0, 0.1)), "preprocessing.split.probabilities leaves none for it"),
        (numbered(10, who=["a"] * 10), config(group="who"), "of 10 rows 'who' groups them"),
        (numbered(2), config(), "2 rows are too few to set one aside"),
    ):
        result = assign(given, settings, seed=1)
        assert not result.counts["validation"] and told in result.why_none
