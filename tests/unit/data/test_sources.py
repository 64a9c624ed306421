import datetime
import gzip
import json
import pickle
import subprocess
import sys
import warnings
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luthier.data.render.template import parse, plain_text
from luthier.data.sources import Limits, read
from luthier.data.sources import encoding as encodings
from luthier.data.table import Table
from luthier.errors import DataError, DependencyError
from luthier.events import Progress

TEXT = [{"id": "007", "a": "NA", "b": "1e5"}, {"id": "None", "a": "true", "b": "日本"}]


def fails(code, dataset, **options):
    with pytest.raises((DataError, DependencyError)) as caught:
        read(dataset, **options)
    assert caught.value.code == code
    return caught.value


def put(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("separator, suffix", [(",", "csv"), (";", "csv"), ("\t", "csv"), ("|", "csv"), ("\t", "tsv")])
def test_delimited_text_stays_as_written(tmp_path, separator, suffix):
    lines = [["id", "a", "b"], *([row["id"], row["a"], row["b"]] for row in TEXT)]
    table = read(put(tmp_path / f"x.{suffix}", "\r\n".join(separator.join(line) for line in lines)))
    assert list(table) == TEXT


JSON_CELLS = (
    '{"a": 1e5, "b": 1.10, "c": true, "d": {"x": 1.10, "y": [1E3, true, null, "1.5"]}, "e": 1.5, "f": 1e400}',
    '{"a": 2, "b": 1.5, "c": false, "d": null, "e": -0.25, "f": 1.0}',
)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_numbers_and_booleans_of_json_read_as_they_are_written_and_count_as_numbers(tmp_path, suffix):
    text = "\n".join(JSON_CELLS) if suffix == "jsonl" else f"[{','.join(JSON_CELLS)}]"
    table = read(put(tmp_path / f"x.{suffix}", text))
    read_as = [{name: plain_text(value) for name, value in row.items()} for row in table]
    nested = '{"x": 1.10, "y": [1E3, true, null, "1.5"]}'
    assert read_as == [
        {"a": "1e5", "b": "1.10", "c": "true", "d": nested, "e": "1.5", "f": "1e400"},
        {"a": "2", "b": "1.5", "c": "false", "d": "", "e": "-0.25", "f": "1.0"},
    ]
    row = table.row(0)
    assert row["a"] + 1 == 100_001 and row["b"] == 1.1 and row["c"] is True and row["d"]["x"] == 1.1
    assert parse("{a:.0f} {a:d} {b:.3f}", table.columns).render(row).text == "100000 100000 1.100"
    assert table.column("b") == [*table.values("b")] == [1.1, 1.5] and str(table.column("b")[0]) == "1.10"
    assert plain_text(pickle.loads(pickle.dumps(row))["d"]) == nested  # rows go to other processes


def test_what_is_written_otherwise_is_other_data_and_what_is_not_is_held_as_numbers(tmp_path):
    first, second = (read(put(tmp_path / f"{text}.jsonl", f'{{"a": {text}}}')) for text in ("1.10", "1.1"))
    assert first.content_hash != second.content_hash
    assert second.content_hash == Table.from_columns({"a": [1.1]}, "x").content_hash
    assert pa.types.is_float64(second.rows.schema.field("a").type)


def test_csv_quotes_newlines_and_empty_cells(tmp_path):
    table = read(put(tmp_path / "x.csv", 'a,b\n"one\nline, ""two""",\n\n{x},2\n'))
    assert list(table) == [{"a": 'one\nline, "two"', "b": None}, {"a": "{x}", "b": "2"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp932", "euc_jp"])
def test_japanese_encodings_are_told_apart(tmp_path, encoding):
    text = "質問,答え\nこれは何ですか,りんごです\n"
    table = read(put(tmp_path / "x.csv", text, encoding))
    assert list(table) == [{"質問": "これは何ですか", "答え": "りんごです"}]


def test_a_heading_may_hold_an_upright_bar(tmp_path):
    assert list(read(put(tmp_path / "x.csv", "yes|no\nmaybe\n"))) == [{"yes|no": "maybe"}]


@pytest.mark.parametrize(
    "header, rows, columns",
    [
        ("instruction;price, EUR;output", "q1;1,5;o1\nq2;12,5;o2\n", ["instruction", "price, EUR", "output"]),
        ("instruction;price, EUR;output", "q1;15;o, 1\nq2;1,5;o2\n", ["instruction", "price, EUR", "output"]),
        ("q\tprice, EUR\ta;b", "q1\t1,5\tx\n", ["q", "price, EUR", "a;b"]),
        ('q;"price,EUR"', 'a;"1,5"\n"b, c";2\n', ["q", "price,EUR"]),
        ("q;in,de,fr", "".join(f"q{n};1,5\n" for n in range(9)), ["q", "in,de,fr"]),
        ("question,answer", 'a,"b; c; d"\n"e; f",g\n', ["question", "answer"]),
        ("question (a;b;c),answer", "x;y;z,1\nx;y,2\n", ["question (a;b;c)", "answer"]),
        ("question,answer;note", '"one\n; two",b;c\nd,"e;f"\n', ["question", "answer;note"]),
    ],
)
def test_the_separator_is_what_stands_evenly_in_header_and_rows(tmp_path, header, rows, columns):
    table = read(put(tmp_path / "x.csv", f"{header}\n{rows}"))
    assert table.columns == columns


@pytest.mark.parametrize(
    "text",
    [
        "price, EUR;output\n1,5;o1\n",
        "q,choices (a;b;c)\nq1,x;y;z\n",
        "a,b;c\n1\n2\n",
        "a,b,c;d\n1,2,3;4\n1,2;4\n5,6,7;8\n",
    ],
)
def test_a_separator_in_doubt_is_refused_and_may_be_named(tmp_path, text):
    fault = fails("data-unreadable", put(tmp_path / "x.csv", text)).faults[0]
    assert "cannot be told" in fault.message and fault.allowed == ["sep=,", "sep=;"] and fault.fix.endswith("sep=,")
    first = text.splitlines()[0]
    if text.count("\n") == 2:  # the others have ragged rows
        assert read(put(tmp_path / "x.csv", f"sep=;\n{text}")).columns == first.split(";")
        assert read(put(tmp_path / "x.csv", f"sep=,\n{text}")).columns == [c.strip() for c in first.split(",")]


@pytest.mark.parametrize("first", ["sep=;\n", '"sep=;"\r\n', "SEP=;\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_line_that_names_excels_separator_is_no_row(tmp_path, first, encoding):
    table = read(put(tmp_path / "x.csv", f"{first}a;b\n1,5;2\n", encoding))
    assert list(table) == [{"a": "1,5", "b": "2"}]
    assert "separated by ';', as line 1 says for Excel, which is no row" in table.notes
    error = fails("data-ragged", put(tmp_path / "x.csv", f"{first}a;b\n1;2\n3\n", encoding))
    assert error.faults[0].where.endswith("line 4")


def test_lines_of_blanks_at_the_end_are_no_rows(tmp_path):
    assert list(read(put(tmp_path / "x.csv", "a,b\n1,2\n  \n\n\t\n "))) == [{"a": "1", "b": "2"}]
    error = fails("data-ragged", put(tmp_path / "x.csv", "a,b\n1,2\n  \n3,4\n"))
    assert error.faults[0].where.endswith("line 3")


@pytest.mark.parametrize("encoding", ["iso2022_jp", "iso2022_jp_ext"])
def test_japanese_in_seven_bits_is_read_and_said(tmp_path, monkeypatch, encoding):
    word = "ｱｶ" if encoding.endswith("ext") else "赤"
    path = put(tmp_path / "x.csv", f"質問,答え\n何色ですか,{word}です\n", encoding)
    table = read(path)
    assert list(table) == [{"質問": "何色ですか", "答え": f"{word}です"}] and table.notes == (f"read as {encoding}",)
    assert list(read(put(tmp_path / "colours.csv", "a,b\n\x1b[31mred\x1b[0m,$\n"))) == [
        {"a": "\x1b[31mred\x1b[0m", "b": "$"}
    ]
    monkeypatch.setattr(encodings, "SMALL", 8)  # a larger file is not held to find out
    assert list(read(path)) == list(table)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_latin_1_is_recognised(tmp_path, encoding):
    text = "question,réponse\n" + "Qu'est-ce que c'est ?,C'est un café près de l'église à côté\n" * 5
    table = read(put(tmp_path / "x.csv", text, encoding))
    assert table.row(0)["réponse"] == "C'est un café près de l'église à côté"
    assert "read as" in table.notes[0]


def test_ambiguous_encoding_lists_candidates_and_says_encoding(tmp_path):
    path = put(tmp_path / "x.csv", "東京,大阪\n京都,神戸\n", "euc_jp")
    error = fails("data-encoding", path)
    assert "--encoding" in error.faults[0].fix and "euc_jp" in error.faults[0].allowed
    assert read(path, encoding="euc-jp").row(0) == {"東京": "京都", "大阪": "神戸"}


def test_bad_utf8_names_the_line(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes("a,b\n日本語の文章です,よい\n".encode() + b"\xff\xfe\n")
    assert "line 3" in fails("data-encoding", path).faults[0].where
    assert fails("data-encoding", path, encoding="no-such").faults[0].received == "no-such"


def test_ragged_rows_are_all_named_by_line(tmp_path):
    error = fails("data-ragged", put(tmp_path / "x.csv", 'a,b\n"1\n1",2\n1,2,3\n1\n'))
    assert [fault.where.split()[-1] for fault in error.faults] == ["4", "5"]


@pytest.mark.parametrize("text", ["", "  \n", "a,b\n"])
def test_empty_csv(tmp_path, text):
    fails("data-empty", put(tmp_path / "x.csv", text))


def test_unreadable_csv(tmp_path):
    assert "line 2" in fails("data-unreadable", put(tmp_path / "x.csv", 'a,b\n"never,closed\n')).faults[0].where
    assert "NUL" in str(fails("data-unreadable", put(tmp_path / "x.csv", "a,b\nx\0y,z\nab,c\n")))
    assert "same name" in str(fails("data-unreadable", put(tmp_path / "x.csv", "a,a\n1,2\n")))
    fails("data-unreadable", put(tmp_path / "x.xyz", "a"))
    error = fails("data-unreadable", tmp_path / "x.csb")
    assert "x.csv" in error.faults[0].fix


def test_limits(tmp_path):
    path = put(tmp_path / "x.csv", "a,b\n" + "x" * 500 + ",1\n")
    fails("data-limit", path, limits=Limits(field_chars=100))
    fails("data-limit", path, limits=Limits(file_bytes=100))
    assert len(read(path).row(0)["a"]) == 500


def test_json_keeps_types_and_differing_objects(tmp_path):
    rows = [{"a": 1, "b": 1.5, "c": {"x": 1}, "d": True}, {"a": 2, "b": None, "c": {"y": [1, "z"]}, "d": "true"}]
    assert list(read(put(tmp_path / "x.json", json.dumps(rows)))) == rows
    lines = "\n".join(json.dumps(row) for row in rows)
    assert list(read(put(tmp_path / "x.jsonl", lines))) == rows
    assert list(read(put(tmp_path / "y.json", lines))) == rows
    assert list(read(put(tmp_path / "z.json", json.dumps({"data": rows, "version": 1})))) == rows
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    assert list(read(put(tmp_path / "w.json", json.dumps(columns)))) == rows


def test_json_parts_become_a_split_column(tmp_path):
    parts = {"train": [{"a": "x"}], "test": [{"a": "y"}]}
    assert read(put(tmp_path / "x.json", json.dumps(parts))).column("split") == [0, 2]


@pytest.mark.parametrize("text", ['[{"a": 1,}]', '[{"a": 1, "a": 2}]', "[1]", "3"])
def test_unreadable_json(tmp_path, text):
    fails("data-unreadable", put(tmp_path / "x.json", text))


FRAME = pd.DataFrame({"q": ["a", "b", "c"], "n": [1, 2, 3]})
MADE = [{"q": "a", "n": 1}, {"q": "b", "n": 2}, {"q": "c", "n": 3}]


@pytest.mark.parametrize("orient", ["columns", "index", "records", "split"])
@pytest.mark.parametrize("labels", [[0, 1, 2], [7, 3, 12]])
def test_json_of_pandas_is_never_read_transposed(tmp_path, orient, labels):
    frame = FRAME.set_axis(labels)
    frame.to_json(tmp_path / "x.json", orient=orient)
    table = read(tmp_path / "x.json")
    assert list(table) == MADE
    assert any("labels of the rows ('7', '3', '12')" in note for note in table.notes) == (
        labels[0] == 7 and orient in ("columns", "index")
    )
    if orient in ("columns", "index"):
        assert list(read(frame.to_dict("dict" if orient == "columns" else "index"))) == MADE


def test_json_of_pandas_whose_columns_are_called_by_numbers(tmp_path):
    named = FRAME.set_axis(["q", "2024"], axis=1)
    for orient in ("columns", "index"):
        named.to_json(tmp_path / "x.json", orient=orient)
        assert list(read(tmp_path / "x.json")) == [{"q": r["q"], "2024": r["n"]} for r in MADE]


@pytest.mark.parametrize("orient", ["columns", "index"])
@pytest.mark.parametrize(
    "frame",
    [FRAME.set_axis(["2023", "2024"], axis=1), FRAME.set_axis(["x", "y", "z"]), FRAME.set_axis(["x", "2", "z"])],
)
def test_json_that_could_be_either_way_round_lists_both_readings(tmp_path, orient, frame):
    frame.to_json(tmp_path / "x.json", orient=orient)
    error = fails("data-unreadable", tmp_path / "x.json")
    columns, rows = (", ".join(repr(str(k)) for k in axis) for axis in (frame.columns, frame.index))
    assert {f"columns {columns} with rows {rows}", f"rows {rows} with columns {columns}"} & set(error.faults[0].allowed)
    assert len(error.faults[0].allowed) == 2
    assert "orient='records'" in error.faults[0].fix


def test_json_of_columns_with_labels_goes_by_the_labels_and_not_by_their_order(tmp_path):
    text = '{"q": {"0": "a", "1": "b"}, "n": {"1": 2, "0": 1}, "m": {"1": "only b"}}'
    rows = [{"q": "a", "n": 1, "m": None}, {"q": "b", "n": 2, "m": "only b"}]
    assert list(read(put(tmp_path / "x.json", text))) == rows


@pytest.mark.parametrize(
    "text",
    [
        '{"rows": [{"q": "a"}], "about": {"version": 1}}',
        '{"table": {"q": ["a", "b"], "n": [1, 2]}}',
        '{"train": {"q": "a", "n": 1}, "test": {"q": "b", "n": 2}}',
        '{"columns": ["q", "n"], "data": [["a", 1], ["b"]]}',
    ],
)
def test_json_objects_beside_lists_or_in_objects_are_no_columns(tmp_path, text):
    fails("data-unreadable", put(tmp_path / "x.json", text))


def test_json_of_the_table_orient_is_refused_and_not_made_columns(tmp_path):
    FRAME.to_json(tmp_path / "x.json", orient="table")
    fails("data-unreadable", tmp_path / "x.json")


def test_an_empty_part_is_no_column(tmp_path):
    path = put(tmp_path / "x.json", '{"train": [{"a": 1}, {"a": 2}], "validation": [], "test": [{"a": 3}]}')
    assert list(read(path)) == [{"a": 1, "split": 0}, {"a": 2, "split": 0}, {"a": 3, "split": 2}]
    frame = pd.DataFrame({"a": [1]})
    table = read({"train": frame, "test": frame.head(0), "unsupervised": frame})
    assert list(table) == [{"a": 1}] and any("'unsupervised' (1 rows)" in note for note in table.notes)
    fails("data-unreadable", {"one": frame, "two": frame})


def test_keys_of_rows_that_are_no_text_keep_their_values():
    assert list(read([{0: "a", 1: "b"}, {"0": "c", 1: "d"}])) == [{"0": "a", "1": "b"}, {"0": "c", "1": "d"}]
    fails("data-unreadable", [{0: "a", "0": "b"}])


def test_unreadable_jsonl_names_the_line(tmp_path):
    assert ":3:" in fails("data-unreadable", put(tmp_path / "x.jsonl", '{"a": 1}\n\n{"a": \n')).faults[0].where
    fails("data-empty", put(tmp_path / "x.json", "[]"))
    fails("data-encoding", put(tmp_path / "x.jsonl", '{"a": "\\ud800"}'))


def test_frames_dicts_and_lists():
    rows = [{"a": "NA", "n": 1, "f": 1.5, "l": [1]}, {"a": None, "n": 2, "f": None, "l": {"k": 2}}]
    frame = pd.DataFrame(rows)
    assert list(read(frame)) == rows
    assert list(read({k: [r[k] for r in rows] for k in rows[0]})) == rows
    assert list(read(rows)) == rows
    assert read(frame).content_hash == read(rows).content_hash != read(rows[::-1]).content_hash
    fails("data-empty", frame.head(0))
    fails("data-ragged", {"a": [1], "b": [1, 2]})
    fails("data-unreadable", 3)
    fails("data-unreadable", ["x"])
    fails("data-unreadable", {"a": "text"})


def test_parquet_drops_the_stored_index(tmp_path):
    frame = pd.DataFrame({"a": ["007", None], "n": [1, 2]}, index=[5, 9])
    frame.to_parquet(tmp_path / "x.parquet")
    table = read(tmp_path / "x.parquet")
    assert list(table) == [{"a": "007", "n": 1}, {"a": None, "n": 2}] and table.notes
    fails("data-unreadable", put(tmp_path / "y.parquet", "not parquet"))
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "z.parquet")
    fails("data-empty", tmp_path / "z.parquet")


def test_folder_saved_by_datasets(tmp_path):
    def save(folder, values):
        folder.mkdir(parents=True)
        rows = pa.table({"a": values})
        with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), rows.schema) as writer:
            writer.write_table(rows)
        (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')

    save(tmp_path / "one", ["x", "y"])
    assert read(tmp_path / "one").column("a") == ["x", "y"]
    save(tmp_path / "all" / "train", ["x"])
    save(tmp_path / "all" / "test", ["y"])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert list(read(tmp_path / "all")) == [{"a": "x", "split": 0}, {"a": "y", "split": 2}]
    fails("data-unreadable", tmp_path)


NO_DATASETS = "datasets is not installed: the extras hub and dev have it"
CELLS = {
    "id": ["007", "NA", "1e5", "true"],
    "answer": ["日本", "", None, "None"],
    "n": [1, None, 3, 4],
    "messages": [[{"role": "user", "content": f"say {i}"}] for i in range(4)],
}
ROWS = [dict(zip(CELLS, row, strict=True)) for row in zip(*CELLS.values(), strict=True)]


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, and those of what it imports
        return pytest.importorskip("datasets", reason=NO_DATASETS)


HEADINGS = ["\ufeff question ", "answer\u3000", "n"]
CLEAN = [{"question": "a", "answer": "b", "n": 1}]


@pytest.mark.parametrize(
    "kind", ["csv", "xlsx", "parquet", "feather", "arrow", "jsonl", "json", "frame", "table", "rows"]
)
def test_headings_are_cleaned_and_told_of_whatever_held_them(tmp_path, kind):
    frame, path = pd.DataFrame([["a", "b", 1]], columns=HEADINGS), tmp_path / f"x.{kind}"
    rows = pa.Table.from_pandas(frame, preserve_index=False)
    write = {
        "csv": lambda: frame.to_csv(path, index=False),
        "xlsx": lambda: frame.to_excel(path, index=False),
        "parquet": lambda: frame.to_parquet(path),
        "feather": lambda: frame.to_feather(path),
        "arrow": lambda: pa.ipc.new_file(str(path), rows.schema).write_table(rows),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "json": lambda: frame.to_json(path, orient="records"),
    }
    given = {"frame": frame, "table": rows, "rows": frame.to_dict("records")}.get(kind, path)
    if kind in write:
        write[kind]()
    table = read(given)
    assert list(table) == ([{**CLEAN[0], "n": "1"}] if kind == "csv" else CLEAN)
    marks = {"csv": "blanks"}.get(kind, "blanks or byte order marks")  # in CSV it is the file's mark
    assert table.notes[-2:] == (
        f"{marks} around the heading 'question' were removed",
        "blanks around the heading 'answer' were removed",
    )


def test_headings_that_differ_in_blanks_alone_are_refused():
    for given in (pa.table({"a": [1], "a ": [2]}), [{"a": 1, "a ": 2}], pa.table([[1], [2]], names=["a", "a"])):
        assert "more than one column of the same name" in str(fails("data-unreadable", given))


def test_parts_of_other_types_keep_their_values(tmp_path):
    for part, values in (
        ("train", pa.array([1, 2])),
        ("validation", pa.array([0.1], pa.float32())),
        ("test", pa.nulls(1)),
    ):
        (tmp_path / part).mkdir()
        rows = pa.table({"n": values, f"only {part}": ["x"] * len(values)})
        with pa.ipc.new_stream(str(tmp_path / part / "data.arrow"), rows.schema) as writer:
            writer.write_table(rows)
        (tmp_path / part / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    table = read(tmp_path)
    assert [repr(n) for n in table.column("n")] == ["1", "2", "0.1", "None"] and table.column("split") == [0, 0, 1, 2]
    assert table.column("only test") == [None, None, None, "x"]


def test_datasets_objects_and_folders_have_clean_headings_and_no_index(datasets, tmp_path):
    made = datasets.Dataset.from_pandas(pd.DataFrame([["a", "b", 1]], columns=HEADINGS, index=[5]))
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "both")
    for given in (made, tmp_path / "one"):
        table = read(given)
        assert list(table) == CLEAN and any("index" in note for note in table.notes)
        assert "blanks around the heading 'answer' were removed" in table.notes
    both = read(datasets.DatasetDict(train=made, test=made))
    assert list(both) == [{**CLEAN[0], "split": 0}, {**CLEAN[0], "split": 2}] and "index" in both.notes[0]
    assert list(read(tmp_path / "both")) == [{**CLEAN[0], "split": 0}, {**CLEAN[0], "split": 2}]
    assert list(read(datasets.DatasetDict(train=made, test=made.select([])))) == CLEAN
    datasets.DatasetDict(train=made, other=made).save_to_disk(tmp_path / "other")
    assert list(read(tmp_path / "other")) == CLEAN  # and not a split of which nothing validates


@pytest.mark.parametrize("kept", ["column", "row"])
def test_one_column_without_its_table_is_refused_with_what_to_do(kept):
    frame = pd.DataFrame({"q": ["a", "b"], "n": ["1", "2"]})
    with pytest.raises(DataError, match="one column") as caught:
        read(frame["q"] if kept == "column" else frame.iloc[0])
    assert caught.value.code == "data-unreadable" and "to_frame" in str(caught.value.faults[0].fix)
    assert read(frame[["q"]]).column("q") == ["a", "b"]


def test_classes_that_datasets_numbers_are_read_by_their_names(datasets, tmp_path):
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [1, 0, -1, None]}, features=kinds)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "parts")
    for given in (made, str(tmp_path / "saved"), tmp_path / "rows.parquet"):
        table = read(given)
        assert table.column("label") == ["yes", "no", None, None]
        (note,) = [note for note in table.notes if "classes" in note]
        assert "no, yes" in note and "whose number has no name: 1" in note
    for given in (str(tmp_path / "parts"), datasets.DatasetDict({"train": made, "test": made})):
        assert read(given).column("label") == ["yes", "no", None, None] * 2


UNNAMED = b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}'
NUMBERED = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1]}}}}'


@pytest.mark.parametrize("said", [b"{", b"[]", b'{"info": 3}', UNNAMED, NUMBERED])
def test_what_else_stands_beside_a_schema_changes_nothing(said):
    rows = pa.table({"label": [1, 0]}).replace_schema_metadata({b"huggingface": said})
    assert read(rows).column("label") == [1, 0]


def test_what_datasets_itself_saved_is_read_as_it_was(datasets, tmp_path):
    made = datasets.Dataset.from_dict(CELLS)
    made.save_to_disk(tmp_path / "one")
    made.save_to_disk(tmp_path / "several", num_shards=3)
    for name in ("one", "several"):
        table = read(tmp_path / name)
        assert list(table) == ROWS
        assert table.column("answer")[2] is None and table.column("answer")[1] == "", "missing is not empty"
    made.filter(lambda row: row["n"] != 3).select([2, 0]).save_to_disk(tmp_path / "chosen")
    assert list(read(tmp_path / "chosen")) == [ROWS[3], ROWS[0]]


def test_a_dict_that_datasets_itself_saved_keeps_its_parts(datasets, tmp_path):
    made = datasets.Dataset.from_dict(CELLS)
    parts = datasets.DatasetDict(train=made, validation=made.select([1]), test=made.select([0, 2]))
    parts.save_to_disk(tmp_path / "all")
    wanted = [row | {"split": 0} for row in ROWS]
    wanted += [ROWS[1] | {"split": 1}, ROWS[0] | {"split": 2}, ROWS[2] | {"split": 2}]
    table = read(tmp_path / "all")
    assert list(table) == wanted and any("train 4, validation 1, test 2" in note for note in table.notes)
    assert list(read(parts)) == wanted and list(read(made)) == ROWS
    assert read(parts).content_hash == table.content_hash


def test_a_hub_dataset_without_plain_files_comes_through_datasets(datasets, monkeypatch):
    import huggingface_hub

    made = datasets.Dataset.from_dict(CELLS)
    parts = datasets.DatasetDict(train=made.select([0, 1]), test=made.select([2, 3]))
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["data/rows.arrow.zst"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: asked.append((given, named)) or parts)
    assert [row["id"] for row in read("owner/name:small@main")] == CELLS["id"]
    assert list(read("owner/name")) == [row | {"split": i // 2 * 2} for i, row in enumerate(ROWS)]
    assert asked == [(("owner/name", "small"), {"revision": "main"}), (("owner/name", None), {"revision": None})]


def workbook(path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Tickets"
    for row in (["Tickets of 2024"], [], ["group", "subject", "queue"], ["A", "007", 3], [None, "NA", 4]):
        sheet.append(row)
    sheet.merge_cells("A1:C1")
    sheet.merge_cells("A4:A5")
    book.create_sheet("Other").append(["x"])
    book["Other"].append(["y"])
    book.save(path)
    return path


def test_excel_passes_over_a_cover_sheet(tmp_path):
    book = pytest.importorskip("openpyxl").Workbook()
    book.active.title = "Cover"
    for line in ("Report 2025", "made by the night shift"):
        book.active.append([line])
    data = book.create_sheet("Data")
    for row in (["question", "answer"], ["a?", "b"]):
        data.append(row)
    book.save(tmp_path / "x.xlsx")
    table = read(tmp_path / "x.xlsx")
    assert list(table) == [{"question": "a?", "answer": "b"}]
    assert any("'Data' was read" in note and "Cover" in note for note in table.notes)


def test_excel_title_rows_merged_cells_and_sheets(tmp_path):
    path = workbook(tmp_path / "x.xlsx")
    table = read(path)
    assert list(table) == [
        {"group": "A", "subject": "007", "queue": 3},
        {"group": "A", "subject": "NA", "queue": 4},
    ]
    assert any("Tickets of 2024" in note for note in table.notes) and any("Other" in note for note in table.notes)
    assert list(read(path, sheet="Other")) == list(read(path, sheet=1)) == [{"x": "y"}]
    assert fails("data-unreadable", path, sheet="Othr").faults[0].allowed == ["Tickets", "Other"]
    fails("data-unreadable", put(tmp_path / "y.xlsx", "not a workbook"))
    fails("data-limit", path, limits=Limits(unpacked_bytes=10))
    fails("data-unreadable", put(tmp_path / "y.xls", "old"))


def sheet_of(path, rows, *merged):
    book = pytest.importorskip("openpyxl").Workbook()
    for row in rows:
        book.active.append(row)
    for area in merged:
        book.active.merge_cells(area)
    book.save(path)
    return path


PAIRS = [[f"q {i}", f"a {i}", f"note {i}"] for i in range(30)]


@pytest.mark.parametrize(
    "rows, columns",
    [
        ([["question", "answer", None], *PAIRS], ["question", "answer", "column_3"]),
        ([[None, "question", "answer"], *PAIRS], ["column_1", "question", "answer"]),
        ([["question", "answer", 2024], *PAIRS], ["question", "answer", "2024"]),
        ([["question", "answer"], *(row[: 3 if i == 20 else 2] for i, row in enumerate(PAIRS))],
         ["question", "answer", "column_3"]),
    ],
    ids=["unheaded remarks", "an index", "a year as heading", "one stray remark"],
)  # fmt: skip
def test_excel_keeps_the_header_and_every_row_where_the_sheet_is_not_tidy(tmp_path, rows, columns):
    table = read(sheet_of(tmp_path / "x.xlsx", rows))
    assert table.columns == columns and len(table) == 30
    assert [v for v in table.row(0).values() if v] == [v for v in rows[1] if v]
    assert not any("titles" in note for note in table.notes)


@pytest.mark.parametrize(
    "above, merged",
    [
        ([["Report", "Tickets"], ["Date", 2024], ["Author", "Ana"], []], ()),
        ([["Report", "Tickets"]], ()),
        ([["Ticket", None, "Queue"]], ("A1:B1",)),
        ([["Tickets"]], ("A1:C1",)),
    ],
    ids=["labels", "a title of two cells", "headings of groups", "a merged title"],
)
def test_excel_titles_that_fill_several_cells_are_passed_over(tmp_path, above, merged):
    rows = [["Subject", "Body", "Queue"], *([f"s {i}", f"b {i}", "abc"[i % 3]] for i in range(30))]
    table = read(sheet_of(tmp_path / "x.xlsx", [*above, *rows], *merged))
    assert table.columns == rows[0] and len(table) == 30 and table.row(0) == dict(zip(*rows[:2], strict=True))


def test_excel_rows_as_wide_as_the_table_are_no_titles(tmp_path):
    rows = [*([i, i] for i in range(5)), ["a", "b"], ["x", "y"], ["z", "y"]]
    fault = fails("data-unreadable", sheet_of(tmp_path / "x.xlsx", rows)).faults[0]
    assert "header" in fault.message and "5 rows" in fault.received and "heading" in fault.fix
    two = [*(row[:2] for row in PAIRS), ["a", "b", "c"], *PAIRS]  # a second, wider table under the first
    fails("data-unreadable", sheet_of(tmp_path / "x.xlsx", two))


def test_a_workbook_with_a_value_in_a_far_corner_is_refused_by_its_cells(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["a", "b"], ["x", "y"]):
        book.active.append(row)
    book.active.cell(900_000, 1_000, "here")
    book.save(tmp_path / "x.xlsx")
    assert "preprocessing.limits.cells" in fails("data-limit", tmp_path / "x.xlsx").faults[0].fix


BOMB = """
import resource, sys
from luthier.data import sources
from luthier.errors import DataError
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    sources.read(sys.argv[1])
except DataError as error:
    print(error.code, error.faults[0].fix)
print([int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")][0], "MiB")
"""


def test_a_gigabyte_out_of_463_bytes_is_refused_in_little_memory(tmp_path):
    """The bomb's footer says 1 MB. Flat and nested, in a process that may not grow."""
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"a": ["x" * 1_000_000] * 1000}), path, compression="zstd")
    assert path.stat().st_size < 1000
    nested = tmp_path / "nested.parquet"
    pq.write_table(pa.table({"a": [[{"b": "x" * 1_000_000}]] * 1000}), nested, compression="zstd")
    for one in (path, nested):
        done = subprocess.run([sys.executable, "-c", BOMB, str(one)], capture_output=True, text=True)
        said, used = done.stdout.splitlines()
        assert said.startswith("data-limit") and "preprocessing.limits.unpacked_bytes" in said
        assert int(used.split()[0]) < 800, used
    honest = tmp_path / "honest.parquet"
    rows = [{"a": f"text {i % 7}", "b": ["x", None][i % 2], "n": i} for i in range(9000)]
    pq.write_table(pa.Table.from_pylist(rows), honest)
    assert list(read(honest)) == rows


def test_damage_in_arrow_files_is_told_before_it_is_looked_at(tmp_path):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, (rows := pa.table({"a": ["yes é"] * 50})).schema) as writer:
        writer.write_table(rows)
    content = sink.getvalue().to_pybytes()
    for wrong in (content.replace("é".encode(), b"\xc3("), content.replace(b"\x06\0\0\0\x0c\0\0\0", b"\xff" * 8)):
        assert wrong != content
        (tmp_path / "x.arrow").write_bytes(wrong)
        fails("data-unreadable", tmp_path / "x.arrow")


def test_excel_formula_without_a_result_is_refused(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["a", "b"], ["x", "=1+1"]):
        book.active.append(row)
    book.save(tmp_path / "x.xlsx")
    assert "B2" in fails("data-unreadable", tmp_path / "x.xlsx").faults[0].where


def test_excel_without_openpyxl_names_the_extra(tmp_path, monkeypatch):
    path = workbook(tmp_path / "x.xlsx")
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    assert "luthier[excel]" in fails("dependency-missing", path).faults[0].fix


def test_a_hub_dataset_that_is_not_cached_offline_says_to_go_online(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    def offline(*_, **__):
        raise OfflineModeIsEnabled("offline")

    def absent(*_, **__):
        raise LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    fault = fails("data-unreadable", "owner/name").faults[0]
    assert "unset HF_HUB_OFFLINE" in fault.fix and "log in" not in fault.fix


def test_hub_dataset_through_its_parquet_files(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import huggingface_hub
    for part, value in (("train", "x"), ("test", "y")):
        pq.write_table(pa.table({"a": [value]}), tmp_path / f"{part}.parquet")
    listed = ["default/train/0000.parquet", "default/test/0000.parquet"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, **k: listed)

    def fetch(name, file, **options):
        with options["tqdm_class"](total=4_000_000, unit="B", name="huggingface_hub.http_get") as bar:
            bar.update(1_000_000)
            bar.refresh()
        return str(tmp_path / (file.split("/")[1] + ".parquet"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    seen = []
    assert list(read("owner/name", sink=seen.append)) == [{"a": "x", "split": 0}, {"a": "y", "split": 2}]
    told = [(e.stage, e.completed, e.total, e.unit) for e in seen if isinstance(e, Progress)]
    assert ("fetch", 1.0, 4.0, "MB") in told
    pq.write_table(pa.table({"a": pa.array([0.1], pa.float32()), "image": [b"\xff"]}), tmp_path / "test.parquet")
    table = read("owner/name")
    assert table.columns == ["a", "split"] and table.column("a") == ["x", 0.1]
    assert table.notes[0] == "the column 'image' holds bytes that are no text, and is left out"
    assert fails("data-unreadable", "owner/name:other").faults[0].allowed == ["default"]
    listed[:] = []
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    fails("dependency-missing", "owner/name")


def test_values_of_parquet_and_frames_are_trained_as_they_were_written(tmp_path):
    rows = pa.table({
        "f": pa.array([0.1, None, 2.5], pa.float32()),
        "h": pa.array(np.array([0.1, 1, 2], np.float16)),
        "text": pa.array([b"yes", "é".encode(), None]),
        "image": pa.array([b"\xff\xd8", b"\x89PNG", b"\x00\xff"]),
    })  # fmt: skip
    pq.write_table(rows, tmp_path / "x.parquet")
    for given in (tmp_path / "x.parquet", rows):
        table = read(given)
        assert [plain_text(row["f"]) for row in table] == ["0.1", "", "2.5"]
        assert [plain_text(row["h"]) for row in table] == ["0.1", "1.0", "2.0"]
        assert table.column("text") == ["yes", "é", None] and table.columns == ["f", "h", "text"]
        assert any("'image' holds bytes that are no text" in note for note in table.notes)
    assert list(read(pd.DataFrame({"f": np.array([0.1, np.nan], np.float32)}))) == [{"f": 0.1}, {"f": None}]
    prices = [Decimal("1.10"), Decimal("2"), None]
    assert [plain_text(v) for v in read({"price": prices}).column("price")] == ["1.10", "2", ""]


def test_whole_numbers_beside_missing_ones_are_told_of_where_they_are_floats(tmp_path):
    frame = pd.DataFrame(
        {"n": [1, None], "whole": [1.0, 2.0], "part": [0.5, None], "big": pd.array([1, None], "Int64")}
    )
    frame.to_parquet(tmp_path / "x.parquet")
    for given in (frame, tmp_path / "x.parquet"):
        (note,) = read(given).notes
        assert "the column 'n' holds whole numbers as 1.0" in note and "they stay 1" in note


def test_a_large_parquet_file_keeps_what_was_tidied_and_its_hashes(tmp_path, monkeypatch):
    monkeypatch.setattr("luthier.data.sources.LARGE", 0)
    rows = {" f": pa.array([0.1, 0.2], pa.float32()), "n": [1.0, None]}
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    told = []
    for _ in range(2):
        table = read(tmp_path / "x.parquet")
        assert list(table) == [{"f": 0.1, "n": 1.0}, {"f": 0.2, "n": None}] and "_hashes" in vars(table)
        told.append(table.notes)
    assert told[0] == told[1] and [("heading 'f'" in note, "'n' holds" in note) for note in told[0]] == [
        (True, False), (False, True)
    ]  # fmt: skip


def test_excel_values_are_what_the_sheet_shows(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    for row in (["q", "day"], ["a_x000D_\nb", datetime.date(2024, 5, 1)], ["_x005F_x000D_", None], ["c", None]):
        sheet.append(row)
    sheet["B3"] = datetime.datetime(2024, 5, 2)
    sheet["B3"].number_format = "yyyy-mm-dd hh:mm"
    sheet["B4"] = datetime.datetime(2024, 5, 3, 12, 30)
    sheet.row_dimensions[4].hidden = True
    for row, value in enumerate(["zip", 501, 10001, 7], 1):
        sheet.cell(row, 3, value).number_format = "00000" if row < 4 else "General"
    book.save(tmp_path / "x.xlsx")
    table = read(tmp_path / "x.xlsx")
    assert table.column("zip") == ["00501", "10001", 7]
    assert table.column("q") == ["a\r\nb", "_x000D_", "c"]
    assert list(map(plain_text, table.column("day"))) == ["2024-05-01", "2024-05-02 00:00:00", "2024-05-03 12:30:00"]
    assert any("1 hidden rows are read" in note for note in table.notes)


@pytest.mark.parametrize(
    ("value", "number_format", "read_as", "told"),
    [
        (0.25, "0%", "25%", "percentages are read as the sheet shows them"),
        (0.2567, "0%", "26%", "A2 holds 0.2567 and is read as 26%"),
        (0.2567, "0.00%", "25.67%", "percentages"),
        (0.255, "0%", "26%", "rounded"),  # a half is rounded up, as a sheet does it
        (-0.005, "0.0##%;[Red]-0.0##%", "-0.5%", "percentages"),
        (12.5, "#,##0%", "1,250%", "percentages"),
        (1, "0 %", "100%", "percentages"),
        (1234.5, "#,##0", 1234.5, "1 numbers of column A are read as they are stored"),
        (1234, "#,##0_);[Red](#,##0)", 1234, "A2 is 1234 under the format #,##0_);[Red](#,##0)"),
        (-5, "#,##0_);(#,##0)", -5, "write them as text"),
        (5, '"$"#,##0', 5, "as they are stored"),
        (5, "[$¥-411]#,##0", 5, "as they are stored"),
        (5, "0.00", 5, "as they are stored"),
        (1.5e9, "0.0,,", 1.5e9, "as they are stored"),
        (0.5, "# ?/?", 0.5, "as they are stored"),
        (5, "#,##0", 5, ""),
        (0, "#,##0_);(#,##0)", 0, ""),
        (0, '0;-0;"-"', 0, "as they are stored"),
        (1.5e300, "0.00", 1.5e300, "as they are stored"),
        (-0.001, "0%", "0%", "is read as 0%"),
        (1.25, "0.00", 1.25, ""),
        (1.25, "0.##", 1.25, ""),
        (5, "[$-409]0", 5, ""),
        (5, "General", 5, ""),
        (0.25, "@", 0.25, ""),
        (True, "0%", True, ""),
    ],
)
def test_excel_numbers_are_percentages_or_as_stored_and_what_differs_is_told(
    tmp_path, value, number_format, read_as, told
):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["rate", "q"], [value, "a"], [None, "b"]):
        book.active.append(row)
    book.active["A2"].number_format = number_format
    book.save(tmp_path / "x.xlsx")
    table = read(tmp_path / "x.xlsx")
    assert table.column("rate") == [read_as, None]
    assert any(told in note for note in table.notes) if told else list(table.notes) == []


def test_excel_headings_that_are_numbers_do_not_make_a_row_the_header(tmp_path):
    pd.DataFrame([[1, 2], ["a", "x"], ["b", "y"]]).to_excel(tmp_path / "x.xlsx", index=False, header=False)
    assert "which row is the header" in str(fails("data-unreadable", tmp_path / "x.xlsx"))


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.json"])
@pytest.mark.parametrize("limit", [encodings.SMALL, 0])
def test_what_is_no_text_is_said_whatever_the_name_and_the_encoding(tmp_path, monkeypatch, name, limit):
    monkeypatch.setattr(encodings, "SMALL", limit)
    pq.write_table(pa.table({"a": ["x"]}), tmp_path / "x.parquet")
    for data, said in ((gzip.compress(b"a,b\n1,2\n"), "gzip"), ((tmp_path / "x.parquet").read_bytes(), "Parquet")):
        (tmp_path / name).write_bytes(data)
        assert said in str(fails("data-unreadable", tmp_path / name))
        assert said in str(fails("data-unreadable", tmp_path / name, encoding="latin-1"))


def test_packed_files_are_said_to_be_unpacked(tmp_path):
    for suffix in (".csv.gz", ".zip"):
        assert "unpack it" in fails("data-unreadable", put(tmp_path / f"x{suffix}", "PK")).faults[0].fix


def test_a_list_of_objects_beside_a_split_is_told_of_and_no_column(tmp_path):
    table = read(put(tmp_path / "x.json", '{"train": [{"q": "a"}], "extra": [{"q": "b"}]}'))
    assert list(table) == [{"q": "a"}] and any("'extra' (1 rows)" in note for note in table.notes)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "rows"])
def test_whole_numbers_beyond_64_bits_are_kept_as_written(tmp_path, name):
    rows = [{"a": 1, "b": 2**64}, {"a": -(2**63), "b": 123456789012345678901234567890}, {"a": 2**63 - 1, "b": 3}]
    text = json.dumps(rows) if name == "x.json" else "\n".join(map(json.dumps, rows))
    assert list(read(rows if name == "rows" else put(tmp_path / name, text))) == rows


def test_a_data_set_of_ludwigs_own_is_told_as_such():
    assert "its id on the hub" in fails("data-unreadable", "ludwig://alpaca").faults[0].fix
