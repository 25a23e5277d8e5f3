"""tools/convert_data.py: each shape from real files, what it cannot know refused with a command that decides."""

import bz2
import csv
import gzip
import importlib.util
import io
import json
import lzma
import os
import pickle
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import tarfile
import zipfile

import datasets
import numpy as np
import pyarrow.feather
import pytest
import torch
from conftest import ROOT, TINY

from train_bert_rerank import read_rows

Q, D, N = "怎么退款，要多久？", "七天内，可退,\n“全额”退", 'no "refund"'  # commas of both kinds, quotes, a line end
PASSAGE = "It is found in coffee, tea and the leaves of some other plants."


def load_tool():
    spec = importlib.util.spec_from_file_location("convert_data", ROOT / "tools" / "convert_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """convert(input, …, "--columns", …) -> rows of rows.jsonl as train_bert_rerank.py reads them, and what was printed;
    where the tool exits: its exit status and the message. All in the test's folder."""
    monkeypatch.chdir(tmp_path)

    def convert(*arguments, output="rows.jsonl", labels=(0, 1)):
        monkeypatch.setattr(sys, "argv", ["convert_data.py", *map(str, arguments), "--output", output])
        capsys.readouterr()
        try:
            tool.main()
        except SystemExit as end:
            assert not os.path.exists(output), "nothing is written"
            return end.code, capsys.readouterr().err.rpartition("Error: ")[2].strip()
        return [row[:3] for row in read_rows(output, *labels)], capsys.readouterr().out

    return convert


def write_csv(path, rows, delimiter=",", opener=open):
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def write_lines(path, *lines):
    path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines), encoding="utf-8")


# ---- Tables ----------------------------------------------------------------------------------------------------------
TABLES = {  # columns, and the rows that they become
    "labelled pairs": ({"sentence1": [Q, "b"], "sentence2": [D, N], "label": [1, 0]}, [(Q, D, 1), ("b", N, 0)]),
    "scored pairs": ({"sentence_A": [Q], "sentence_B": [D], "score": [0.25]}, [(Q, D, 0.25)]),
    "answers": ({"question": [Q], "answer": [D]}, [(Q, D, 1)]),
    "answers with labels": ({"query": [Q, Q], "answer": [D, N], "label": [True, False]}, [(Q, D, 1), (Q, N, 0)]),
    "positives": ({"anchor": [Q], "positive": [D]}, [(Q, D, 1)]),
    "triplets": ({"anchor": [Q], "positive": [D], "negative": [N]}, [(Q, D, 1), (Q, N, 0)]),
    "n-tuples": ({"query": [Q], "positive": [D], "negative_1": [N], "negative_2": ["o"]},
                 [(Q, D, 1), (Q, N, 0), (Q, "o", 0)]),
    "passages with other columns": ({"id": [7], "Query": [Q], "passage": [D], "relevance": [0.5]}, [(Q, D, 0.5)]),
    "Chinese names": ({"问题": [Q], "段落": [D], "标签": [1]}, [(Q, D, 1)]),
}  # fmt: skip
LISTS = {
    "lists with labels": ({"query": [Q, "b"], "docs": [[D, N], ["o"]], "labels": [[1, 0], [1]]},
                          [(Q, D, 1), (Q, N, 0), ("b", "o", 1)]),
    "lists of two kinds": ({"query": [Q], "pos": [[D]], "neg": [[N, "o"]]}, [(Q, D, 1), (Q, N, 0), (Q, "o", 0)]),
    "lists of two kinds with scores": (
        {"query": [Q], "pos": [[D]], "neg": [[N, "o"]], "neg_scores": [[0.1, 0.2]], "pos_scores": [[0.9]]},
        [(Q, D, 0.9), (Q, N, 0.1), (Q, "o", 0.2)]),
    "scores of a triplet": ({"query": [Q], "positive": [D], "negative": [N], "scores": [[0.75, 0.5]]},
                            [(Q, D, 0.75), (Q, N, 0.5)]),
}  # fmt: skip


def write_table(columns, kind, path):
    """Write {column: values} as a file or folder of this kind; its name."""
    table, name = datasets.Dataset.from_dict(columns), f"data.{kind}"
    numbers = [[int(each) if isinstance(each, bool) else each for each in values] for values in columns.values()]
    rows = [[*columns], *zip(*numbers, strict=True)]
    if kind == "folder":
        table.save_to_disk(path / name)
    elif kind == "parquet":
        table.to_parquet(path / name)
    elif kind in ("jsonl", "jsonl.gz"):
        opener = gzip.open if kind.endswith("gz") else open
        with opener(path / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
    elif kind == "json":
        (path / name).write_text(json.dumps([*table], indent=1), encoding="utf-8")
    else:
        write_csv(path / name, rows, "\t" if "tsv" in kind else ",", gzip.open if kind.endswith("gz") else open)
    return name


@pytest.mark.parametrize("name, kind", [
    *((name, kind) for name in [*TABLES, *LISTS] for kind in ("folder", "parquet", "jsonl")),
    *((name, "csv") for name in TABLES),  # which holds no lists
])  # fmt: skip
def test_a_table_becomes_the_rows_that_its_columns_mean(convert, tmp_path, name, kind):
    columns, expected = {**TABLES, **LISTS}[name]
    rows, said = convert(write_table(columns, kind, tmp_path))
    assert rows == expected
    assert f"rows.jsonl: {len(expected)} rows, skipped: none; repetitions written once: 0\n" in said


def test_csv_as_excel_writes_it(convert, tmp_path):
    for separator in (",", ";", "\t"):
        text = separator.join(["query", "passage", "label"]) + "\r\n" + separator.join(["问，", "“答”", "1"])
        (tmp_path / "data.csv").write_bytes(text.encode("utf-8-sig"))
        assert convert("data.csv")[0] == [("问，", "“答”", 1)]


@pytest.mark.parametrize("kind", ["csv.gz", "tsv", "tsv.gz", "json", "jsonl.gz"])
def test_other_containers_of_the_same_table(convert, tmp_path, kind):
    columns, expected = TABLES["labelled pairs"]
    assert convert(write_table(columns, kind, tmp_path))[0] == expected


def test_what_was_detected_is_printed(convert, tmp_path):
    columns = {"id": [7, 8], "question": [Q, Q], "passage": [D, N], "label": [1, 0]}
    said = convert(write_table(columns, "csv", tmp_path))[1].splitlines()
    roles = "query from column question, content from column passage, label from column label"
    assert said[0] == f"data.csv: table: {roles}; not used: id"
    assert said[1:] == ["rows.jsonl: 2 rows, skipped: none; repetitions written once: 0", "Label 0.00: 1 (50.00%)",
                        "Label 1.00: 1 (50.00%)",
                        "Next: python train_bert_rerank.py --train_dataset rows.jsonl"]  # fmt: skip


def test_csv_is_read_as_datasets_reads_it(convert, tmp_path):
    texts = [f"{a}{b}{a}" for a in (",", '"', "\n", "\r\n", "，", "; ", "\t", "'") for b in ("x", "“二”", '""', ",\n")]
    write_csv(tmp_path / "data.csv", [("query", "passage", "label"), *((f"q{text}", text, 1) for text in texts)])
    reference = datasets.load_dataset("csv", data_files="data.csv", split="train", cache_dir=str(tmp_path / "cache"))
    assert convert("data.csv")[0] == [tuple(row.values()) for row in reference] and len(reference) == 32


def test_several_inputs_are_one_output_and_a_repetition_is_written_once(convert, tmp_path):
    write_csv(tmp_path / "a.csv", [("anchor", "positive", "negative"), (Q, D, N), (Q, D, "o")])
    write_csv(tmp_path / "b.csv", [("query", "passage", "label"), (Q, N, 0), (Q, N, 1)], "\t")
    rows, said = convert("a.csv", "b.csv", output="rows.jsonl.gz")
    assert rows == [(Q, D, 1), (Q, N, 0), (Q, "o", 0), (Q, N, 1)]
    assert "rows.jsonl.gz: 4 rows, skipped: none; repetitions written once: 2" in said
    assert (tmp_path / "rows.jsonl.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_a_name_is_no_pattern(convert, tmp_path):
    for name in ("data[1].parquet", "data1.parquet"):
        datasets.Dataset.from_dict({"anchor": [name], "positive": [D]}).to_parquet(tmp_path / name)
    assert convert("data[1].parquet")[0] == [("data[1].parquet", D, 1)]


def test_named_and_counted_columns(convert, tmp_path):
    write_csv(tmp_path / "data.csv", [("题 目", "b=c,d", "e"), (Q, D, 3), (Q, N, 0)])
    named = convert("data.csv", "--columns", "label=e", "query=题 目", "content=b=c,d", labels=(0, 3))[0]
    assert named == [(Q, D, 3), (Q, N, 0)]
    for name, delimiter in (("data.csv", ","), ("data.tsv", "\t")):
        write_csv(tmp_path / name, [(Q, 1, "甲"), (Q, 0, "乙")], delimiter)
        assert convert(name, "--columns", "query=1", "content=3", "label=2")[0] == [(Q, "甲", 1), (Q, "乙", 0)]


def test_a_label_outside_of_0_to_1_is_told_with_the_command_that_trains_on_it(convert, tmp_path, monkeypatch):
    write_csv(tmp_path / "data.csv", [("query", "passage", "score"), (Q, D, 4.5), (Q, N, -5e-05)])
    rows, said = convert("data.csv", labels=(-5e-05, 4.5))
    assert rows == [(Q, D, 4.5), (Q, N, -5e-05)] and "Labels go from -5e-05 to 4.5; " in said
    words = shlex.split(said.rpartition("Next: python train_bert_rerank.py ")[2])
    from train_bert_rerank import check_settings, load_data, parse_command_line

    train_rows, *_ = load_data({**check_settings({}), "eval_dataset": None, **parse_command_line(words)})
    assert train_rows["label"].tolist() == [4.5, -5e-05]


def test_relevant_rows_alone_are_said_with_the_command_that_finds_others(convert, tmp_path):
    said = convert(write_table({"anchor": [Q], "positive": [D]}, "csv", tmp_path))[1]
    assert "All rows have label 1, and training needs others too." in said
    assert "python tools/mine_hard_negatives.py rows.jsonl --corpus corpus.jsonl --output mined.jsonl\n" in said


# ---- What could mean two things --------------------------------------------------------------------------------------
UNCLEAR = {  # columns, part of the message, and what the commands that it offers give, in their order
    "two labels": ({"query": [Q], "passage": [D], "label": [1], "score": [0.5]}, "more than one way to read it",
                   [[(Q, D, 1)], [(Q, D, 0.5)]]),
    "two queries and two documents": (
        {"query": ["a"], "question": ["b"], "text": ["c"], "passage": ["d"], "label": [1]}, "more than one way",
        [[("a", "c", 1)], [("a", "d", 1)], [("b", "c", 1)], [("b", "d", 1)]]),
    "an answer and a passage": ({"query": ["a"], "answer": ["b"], "passage": ["c"], "label": [1]}, "more than one way",
                                [[("a", "b", 1)], [("a", "c", 1)]]),
    "no label": ({"query": ["a"], "passage": ["c"], "NAME": [0]}, "to be the label. All documents are relevant, or",
                 [[("a", "c", 1)], [("a", "c", 0)]]),
    "a margin": ({"query": ["a"], "positive": ["b"], "negative": ["c"], "score": [0.5]}, "score is one number",
                 [[("a", "b", 1), ("a", "c", 0)]]),
}  # fmt: skip


def commands_in(message):
    """The arguments of the commands in a message, without their output."""
    words = [shlex.split(line.partition("#")[0])[2:] for line in message.splitlines()[1:]]
    for each in words:
        place = each.index("--output")
        del each[place : place + 2]
    return words


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("columns, problem, outcomes", UNCLEAR.values(), ids=UNCLEAR)
def test_an_unclear_table_is_refused_and_each_command_that_is_offered_works(
        convert, tmp_path, columns, problem, outcomes, kind):  # fmt: skip
    status, message = convert(write_table(columns, kind, tmp_path))
    assert status == 1 and problem in message and f"(columns {', '.join(columns)})" in message
    results = []
    for words in commands_in(message):
        results.append(convert(*words)[0])
        os.remove("rows.jsonl")
    assert results == outcomes


def test_classes_whose_numbers_are_no_grades_are_refused_and_taken_if_asked(convert, tmp_path):
    kinds = {"query": datasets.Value("string"), "text": datasets.Value("string"),
             "label": datasets.ClassLabel(names=["entailment", "not_entailment"])}  # fmt: skip
    table = datasets.Dataset.from_dict({"query": [Q], "text": [D], "label": [0]}, datasets.Features(kinds))
    table.save_to_disk(tmp_path / "data")
    status, message = convert("data")
    assert status == 1 and "label numbers classes, 0 = entailment, 1 = not_entailment; if a higher number" in message
    assert convert(*commands_in(message)[0])[0] == [(Q, D, 0)]
    kinds["label"] = datasets.ClassLabel(names=["0", "1"])
    datasets.Dataset.from_dict(table.to_dict(), datasets.Features(kinds)).save_to_disk(tmp_path / "grades")
    assert convert("grades")[0] == [(Q, D, 0)]


def test_unknown_names_are_listed_with_the_three_ways_to_name_them(convert, tmp_path):
    status, message = convert(write_table({"frage": ["a"], "gut": ["b"], "schlecht": ["c"]}, "tsv", tmp_path))
    assert status == 1 and "(columns frage, gut, schlecht)" in message and "no column is known by its name" in message
    words = commands_in(message)[2]
    for name in ("frage", "gut", "schlecht"):
        words[words.index("NAME") if "NAME" in words else next(
            place for place, word in enumerate(words) if word.endswith("=NAME"))] = (
            next(word for word in words if word.endswith("=NAME")).replace("NAME", name))
    assert convert(*words)[0] == [("a", "b", 1), ("a", "c", 0)]


def test_a_folder_with_splits_is_refused_until_one_is_named(convert, tmp_path):
    tables = {name: datasets.Dataset.from_dict({"anchor": [name], "positive": [D]}) for name in ("train", "test")}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "splits")
    status, message = convert("splits")
    assert status == 1 and message.startswith("splits: which split?")
    for name, words in zip(tables, commands_in(message), strict=True):
        assert convert(*words)[0] == [(name, D, 1)]
        os.remove("rows.jsonl")
    datasets.DatasetDict(train=tables["train"]).save_to_disk(tmp_path / "one")
    assert convert("one", "--split", "dev")[1].startswith("one: which split?")
    assert convert("one")[0] == [("train", D, 1)]


# ---- Bad rows --------------------------------------------------------------------------------------------------------
def test_bad_rows_are_counted_and_the_first_ten_shown_by_line(convert, tmp_path):
    rows = [("query", "passage", "label"), (Q, D, 1), ("", D, 1), (Q, D), (Q, D, 1, 1), (Q, D, "nan"), (Q, D, "yes"),
            (Q, D, ""), (Q, " ", 1), *[(Q,)] * 5]  # fmt: skip
    write_csv(tmp_path / "data.csv", rows)
    status, message = convert("data.csv")
    assert status == 1 and message.splitlines() == [
        "bad rows: 12, so nothing is written",
        "  data.csv: line 4: query is blank",  # D holds a line end
        "  data.csv: line 6: 2 fields instead of 3",
        "  data.csv: line 8: 4 fields instead of 3",
        "  data.csv: line 10: label nan is no number",
        "  data.csv: line 12: label yes is no number",
        "  data.csv: line 14: label is missing",
        "  data.csv: line 16: content is blank",
        *(f"  data.csv: line {line}: 1 fields instead of 3" for line in (17, 18, 19)),
        "  … and 2 more",
    ]


@pytest.mark.parametrize("kind", ["folder", "parquet", "jsonl"])
def test_bad_rows_of_typed_tables_are_shown_by_row(convert, tmp_path, kind):
    columns = {"query": [Q, None, Q, Q], "docs": [[D], [D], [D, None], [D, N]],
               "labels": [[1.0], [1.0], [1.0, 0.0], [1.0]]}  # fmt: skip
    status, message = convert(write_table(columns, kind, tmp_path))
    name = f"data.{kind}"
    assert status == 1 and message.splitlines()[1:] == [
        f"  {name}: row 2: query is missing", f"  {name}: row 3: content is missing",
        f"  {name}: row 4: 1 labels for 2 documents"]  # fmt: skip


def test_texts_and_labels_of_another_type(convert, tmp_path):
    columns = {"query": [7, 8], "passage": [D, D], "label": [float("nan"), float("inf")]}
    status, message = convert(write_table(columns, "parquet", tmp_path))
    assert status == 1 and "row 1: label nan is no number" in message and "row 2: label inf is no number" in message
    status, message = convert(write_table({**columns, "label": [1, 0]}, "parquet", tmp_path))
    assert status == 1 and "row 1: query is no text: 7" in message


BROKEN = {
    "an unclosed quote": (b'query,passage,label\n"a,b,1\nc,d,0\n', "line 2: unexpected end of data"),
    "text after a quote": (b'query,passage,label\n"a" b,c,1\n', "line 2: ',' expected after '\"'"),
    "GBK": ("query,passage,label\n退款,d,1\n".encode("gbk"), "iconv -f GB18030 -t UTF-8 data.x"),
    "nothing": (b"", "no rows"),
    "a header": (b"query,passage,label\n", "no rows"),
    "two columns of one name": (b"query,passage,query\na,b,1\n", "2 columns are called query"),
    "half of a gzip file": (gzip.compress(os.urandom(999))[:500], "cannot be read"),
    "half of a parquet file": (b"PAR1 and no more", "cannot be read"),
    "half of a JSON file": (b'{"query": "a", "passage"', "cannot be read"),
}


@pytest.mark.parametrize("data, problem", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(convert, tmp_path, data, problem):
    (tmp_path / "data.x").write_bytes(data)
    status, message = convert("data.x")
    assert status == 1 and message.startswith("data.x: ") and problem in message


def test_wrong_arguments_are_refused(convert, tmp_path):
    write_csv(tmp_path / "data.csv", [("a", "b"), (Q, D)])
    (tmp_path / "folder").mkdir()
    for arguments, problem in [
        (["none.csv"], "none.csv: cannot be read: No such file"),
        (["folder"], "folder: cannot be read (of a folder that save_to_disk did not write, name the files)"),
        (["data.csv", "--columns", "query=a", "content=c", "label=b"], "0 columns are called c: a, b"),
        (["data.csv", "--columns", "query=a", "content=b"], "a content needs a label"),
        (["data.csv", "--columns", "query=a", "label=b"], "one query and one or more documents"),
        (["data.csv", "--columns", "frage=a"], "one query and one or more documents"),
    ]:  # fmt: skip
        status, message = convert(*arguments)
        assert status == 1 and problem in message


def test_the_input_is_not_overwritten(convert, tmp_path, monkeypatch, capsys):
    path = tmp_path / write_table({"anchor": [Q], "positive": [D]}, "csv", tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(sys, "argv", ["convert_data.py", "data.csv", "--output", str(path)])
    with pytest.raises(SystemExit):
        tool.main()
    assert "is an input" in capsys.readouterr().err and path.read_bytes() == before


# ---- Files of another encoding ---------------------------------------------------------------------------------------
TEXT = "query,passage,label\n退款要几天,七天内可退,1\n發票怎麼開,在設置裏開,0\n"
ROWS = [("退款要几天", "七天内可退", 1), ("發票怎麼開", "在設置裏開", 0)]
OBJECTS = [dict(zip(("query", "passage", "label"), row, strict=True)) for row in ROWS]
FRENCH = "query,passage,label\nqui a été là,un élève,1\n"
TRADITIONAL = "query,passage,label\n發票怎麼開,在設定裡開,1\n"


@pytest.mark.parametrize("encoding, mark", [
    ("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff"), ("utf-32-le", b"\xff\xfe\0\0"),
    ("utf-32-be", b"\0\0\xfe\xff")])  # fmt: skip
@pytest.mark.parametrize("text", [
    TEXT, TEXT.replace(",", "\t").replace("\n", "\r\n"), json.dumps(OBJECTS, ensure_ascii=False, indent=1),
    "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in OBJECTS)],
    ids=["csv", "tsv", "json", "jsonl"])  # fmt: skip
def test_what_announces_its_encoding_by_a_byte_order_mark_is_read(convert, tmp_path, encoding, mark, text):
    (tmp_path / "data.x").write_bytes(mark + text.encode(encoding))
    assert convert("data.x")[0] == ROWS
    (tmp_path / "data.gz").write_bytes(gzip.compress(mark + text.encode(encoding)))
    assert convert("data.gz", output="of_gzip.jsonl")[0] == ROWS


def test_ids_and_triples_with_a_byte_order_mark_are_read(convert, tmp_path, marco):
    for name in ("queries.tsv", "collection.tsv", "qrels.tsv"):
        (tmp_path / name).write_text((tmp_path / name).read_text("utf-8"), "utf-16")
    rows = convert("queries.tsv", "collection.tsv", "qrels.tsv")[0]
    assert rows == [(query, marco(number), label) for query, number, label in JUDGED]


def run_command(line, folder):
    """Run a command of a message in a shell, in this folder."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(line, shell=True, cwd=folder, env={**os.environ, "PATH": path}, timeout=120, text=True,
                          capture_output=True, encoding="utf-8")  # fmt: skip
    assert done.returncode == 0, done.stderr


OTHER_ENCODINGS = {  # the name in the command, and what the file holds
    "GB18030": (TEXT, ROWS),
    "BIG5": (TRADITIONAL, [("發票怎麼開", "在設定裡開", 1)]),
    "WINDOWS-1252": (FRENCH, [("qui a été là", "un élève", 1)]),
    "UTF-16LE": (TEXT, ROWS),
    "UTF-16BE": (TEXT, ROWS),
    "UTF-32LE": (TEXT, ROWS),
    "UTF-32BE": (TEXT, ROWS),
}


@pytest.mark.parametrize("name", ["a b.csv", "数据.csv.gz"])
@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
def test_the_command_for_another_encoding_works_as_it_is_copied(convert, tmp_path, encoding, name):
    text, rows = OTHER_ENCODINGS[encoding]
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    status, message = convert(name)
    [line] = [line for line in message.splitlines() if f"-f {encoding} " in line]
    assert status == 1 and message.startswith(name)
    if "UTF" not in encoding:
        assert line.rpartition("# ")[2] == " ".join(text.splitlines()[1].split()), "what it makes of the text is shown"
    run_command(line, tmp_path)
    output = shlex.split(line.partition("#")[0])[-1]
    assert convert(output)[0] == rows


def test_a_damaged_line_of_a_file_in_utf8_is_named_and_not_taken_for_another_encoding(convert, tmp_path):
    data = TEXT.encode()
    (tmp_path / "data.csv").write_bytes(data + "退款,好,1\n".encode().replace(b"\xe6", b""))
    status, message = convert("data.csv")
    assert status == 1 and "data.csv: line 4 holds bytes that are not UTF-8, as the lines before it are" in message
    assert [line for line in message.splitlines() if "iconv" in line] == [
        "  iconv -c -f UTF-8 -t UTF-8 data.csv > data.utf8.csv"]  # fmt: skip
    (tmp_path / "cut.csv").write_bytes(TEXT.encode("utf-16")[:-1])
    message = convert("cut.csv")[1]
    assert message.startswith("cut.csv: it begins with the mark of UTF-16") and "iconv" not in message


# ---- Files that are no text ------------------------------------------------------------------------------------------
def zip_of(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, TEXT)
    return file.getvalue()


def ods():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
    return file.getvalue()


def saved(save, *arguments):
    file = io.BytesIO()
    save(*arguments, file)
    return file.getvalue()


def tar_of(data):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("rows.csv")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


NO_TEXT = {  # first bytes, and what is said of them
    "xlsx": (zip_of("[Content_Types].xml", "xl/workbook.xml"), "Excel workbook (xlsx). Open it in Excel", "CSV UTF-8"),
    "xls": (bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600), "an Excel (xls)", "save its sheet as 'CSV UTF-8'"),
    "xls that is HTML": (b"<html><table><tr><td>a</td></tr></table></html>", "HTML (which", "CSV UTF-8"),
    "ods": (ods(), "LibreOffice spreadsheet (ods)", "CSV UTF-8"),
    "docx": (zip_of("[Content_Types].xml", "word/document.xml"), "Word document (docx)", "into a spreadsheet"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF", "into a spreadsheet"),
    "rtf": (b"{\\rtf1\\ansi a}", "RTF", "into a spreadsheet"),
    "npz": (zip_of("a.npy"), "NumPy arrays", "JSONL or parquet"),
    "npy": (saved(lambda file: np.save(file, np.zeros(3))), "a NumPy array", "JSONL or parquet"),
    "pt": (saved(lambda file: torch.save({}, file)), "data of PyTorch", "JSONL or parquet"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(9), "a 7z archive", "7z x data.x"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS", "git lfs pull"),
    "zeros": (bytes(500), "a binary file", "JSONL or parquet"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a binary file", "JSONL or parquet"),
    "a workbook in gzip": (gzip.compress(zip_of("xl/workbook.xml")), "Excel workbook", "gzip -cd data.x > "),
}


@pytest.mark.parametrize("data, kind, advice", NO_TEXT.values(), ids=NO_TEXT)
def test_a_file_that_is_no_text_is_told_by_what_is_in_it(convert, tmp_path, data, kind, advice):
    (tmp_path / "data.x").write_bytes(data)
    status, message = convert("data.x")
    assert status == 1 and message.startswith("data.x: ") and kind in message and advice in message
    assert "iconv" not in message and "--columns" not in message


def write_sqlite(path):
    connection = sqlite3.connect(path)
    connection.execute("create table NAME (query, passage, label)")
    connection.executemany("insert into NAME values (?, ?, ?)", ROWS)
    connection.commit()
    connection.close()


TABLE = {name: [row[name] for row in OBJECTS] for name in OBJECTS[0]}
UNPACKED = {  # how it is written, and the file that is there after the command
    "zip": (lambda path: path.write_bytes(zip_of("rows.csv")), "rows.csv"),
    "tar": (lambda path: path.write_bytes(tar_of(TEXT.encode())), "rows.csv"),
    "tar.gz": (lambda path: path.write_bytes(gzip.compress(tar_of(TEXT.encode()))), "rows.csv"),
    "bz2": (lambda path: path.write_bytes(bz2.compress(TEXT.encode())), "my data"),
    "xz": (lambda path: path.write_bytes(lzma.compress(TEXT.encode())), "my data"),
    "gzip twice": (lambda path: path.write_bytes(gzip.compress(gzip.compress(TEXT.encode()))), "my data.unpacked"),
    "parquet in gzip": (lambda path: path.write_bytes(gzip.compress(saved(
        datasets.Dataset.from_dict(TABLE).to_parquet))), "my data.unpacked"),
    "sqlite": (write_sqlite, "my data.csv"),
    "feather": (lambda path: pyarrow.feather.write_feather(pyarrow.table(TABLE), path), "my data.parquet"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(OBJECTS)), "my data.parquet"),
    "one object": (lambda path: path.write_text(json.dumps({"version": 1, "rows": OBJECTS})), "my data.rows.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("write, output", UNPACKED.values(), ids=UNPACKED)
def test_the_command_that_unpacks_a_file_works_as_it_is_copied(convert, tmp_path, write, output):
    write(tmp_path / "my data.x")
    status, message = convert("my data.x")
    assert status == 1 and message.startswith("my data.x: ")
    [line] = [line for line in message.splitlines() if line.startswith("  ")]
    if shutil.which(shlex.split(line)[0]) is None:
        pytest.skip(f"this machine has no {shlex.split(line)[0]}")
    run_command(line, tmp_path)
    assert convert(output)[0] == ROWS


# ---- What is no table ------------------------------------------------------------------------------------------------
NO_TABLE = {
    "a list without items": (b"[]", "no rows"),
    "an object without keys": (b"{}", "its objects are empty"),
    "a list of empty objects": (b"[{}]", "its objects are empty"),
    "null before an object": (b'[null, {"query": "a"}]', "row 1 is null. Each row should be an object"),
    "lists a line": (b'["a", "b", 1]\n["c", "d", 0]\n', 'row 1 is "a". Each row should be an object'),
    "a key twice": (b'{"query": "a", "query": "b"}', "query is there twice"),
    "too deep": (b'{"query": ' + b"[" * 5000 + b"]" * 5000 + b"}", "row 1 is none: maximum recursion"),
    "a label of 400 digits": (b'{"query": "a", "passage": "b", "label": ' + b"9" * 400 + b"}", "is no number"),
    "three words a line": (b"hello dear averyveryveryveryverylongword\nhow are you\n", "it has one column, hello dear"),
    "bars": (b"query|passage|label\na|b|1\n", "it has one column, query|passage|label"),
    "TREC's run": (b"10 Q0 3 1 12.5 bm25\n10 Q0 4 2 11.5 bm25\n", "it has the ranks of a run"),
}


@pytest.mark.parametrize("data, problem", NO_TABLE.values(), ids=NO_TABLE)
def test_what_is_no_table_is_one_message(convert, tmp_path, data, problem):
    (tmp_path / "data.x").write_bytes(data)
    status, message = convert("data.x")
    assert status == 1 and "data.x: " in message and problem in message and "=NAME" not in message


def test_an_output_that_is_no_file_is_refused_and_stays(convert, tmp_path, monkeypatch, capsys):
    write_csv(tmp_path / "data.csv", [("query", "passage", "label"), (Q, D, 1)])
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for output, problem in [(".", "'.' is a folder"), ("", "'' is a folder"), ("folder", "'folder' is a folder"),
                            ("pipe", "pipe is a device or a pipe"), ("data.csv/a", "data.csv is no folder")]:
        monkeypatch.setattr(sys, "argv", ["convert_data.py", "data.csv", "--output", output])
        with pytest.raises(SystemExit):
            tool.main()
        assert problem in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", "folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_pipe_as_an_input_is_refused(convert, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert convert("pipe")[1].startswith("pipe: no regular file: save it as one")


# ---- MS MARCO --------------------------------------------------------------------------------------------------------
def test_triples_of_texts_without_a_header_take_quotes_as_they_are(convert, tmp_path):
    write_lines(tmp_path / "triples.train.small.tsv", ("what is caffeine", f'"{PASSAGE}', 'a "b'),
                ("what is caffeine", f'"{PASSAGE}', "c\rd"))  # fmt: skip
    rows, said = convert("triples.train.small.tsv")
    assert rows == [("what is caffeine", f'"{PASSAGE}', 1), ("what is caffeine", 'a "b', 0),
                    ("what is caffeine", "c\rd", 0)]  # fmt: skip
    assert "triples: query from column 1, positive from column 2, negative from column 3" in said
    write_lines(tmp_path / "triples.train.small.tsv", ("what is caffeine", PASSAGE, "b"), ("a", "b"), ("a", "b", ""))
    os.remove("rows.jsonl")
    assert convert("triples.train.small.tsv")[1].splitlines()[1:] == [
        "  triples.train.small.tsv: line 2: 2 fields instead of 3",
        "  triples.train.small.tsv: line 3: content is blank"]  # fmt: skip


@pytest.fixture
def marco(tmp_path):
    """queries.tsv (ids 10 and 12), collection.tsv (0 to 29), qrels.tsv: 10 has passage 3, 12 has 4."""
    write_lines(tmp_path / "queries.tsv", (10, "what is ten"), (12, "twelve?"))
    write_lines(tmp_path / "collection.tsv", *((number, f'Passage "{number}, the {number}th') for number in range(30)))
    write_lines(tmp_path / "qrels.tsv", (10, 0, 3, 1), (12, 0, 4, 1))
    return lambda number: f'Passage "{number}, the {number}th'


JUDGED = [("what is ten", 3, 1), ("twelve?", 4, 1)]


@pytest.mark.parametrize("names", ["queries collection qrels", "qrels collection queries"])
def test_queries_collection_and_qrels_in_any_order(convert, marco, names):
    rows, said = convert(*(f"{name}.tsv" for name in names.split()))
    assert rows == [(query, marco(number), label) for query, number, label in JUDGED]
    assert "queries from queries.tsv, passages from collection.tsv" in said


def test_qrels_with_spaces_grades_and_gzip(convert, tmp_path, marco):
    with gzip.open(tmp_path / "qrels.gz", "wt") as file:
        file.write("10 Q0 3 2\n12 Q0 4 0\n")
    rows = convert("qrels.gz", "queries.tsv", "collection.tsv", labels=(0, 3))[0]
    assert rows == [("what is ten", marco(3), 2), ("twelve?", marco(4), 0)]


def test_candidates_are_irrelevant_unless_judged(convert, tmp_path, marco):
    write_lines(tmp_path / "top1000.dev", (10, 3, "what is ten", marco(3)), (10, 9, "what is ten", marco(9)))
    files = ["top1000.dev", "collection.tsv", "queries.tsv", "qrels.tsv"]
    assert convert(*files)[0] == [(query, marco(number), label) for query, number, label in
                                  [*JUDGED, ("what is ten", 9, 0)]]  # fmt: skip
    write_lines(tmp_path / "top1000.dev", (10, 9, "what is ten", marco(9)), (11, 9, "what is 11", marco(9)), (10, 9))
    os.remove("rows.jsonl")
    assert convert(*files)[1].splitlines()[1:] == [
        "  top1000.dev: line 2: query 11 is not in the qrels: which of its passages are relevant is not known",
        "  top1000.dev: line 3: 2 fields instead of 4"]  # fmt: skip


def test_triples_of_ids(convert, tmp_path, marco):
    write_lines(tmp_path / "qidpidtriples.tsv", (10, 3, 8), (10, 3, 7), (12, 4, 7))
    rows = convert("qidpidtriples.tsv", "collection.tsv", "queries.tsv")[0]
    assert rows == [(query, marco(number), label) for query, number, label in [
        ("what is ten", 3, 1), ("what is ten", 8, 0), ("what is ten", 7, 0), ("twelve?", 4, 1), ("twelve?", 7, 0)]]


def test_ids_that_both_files_have_are_refused_until_the_files_are_named(convert, tmp_path, marco):
    write_lines(tmp_path / "queries.tsv", *((number, f"question {number}") for number in range(30)))
    status, message = convert("qrels.tsv", "queries.tsv", "collection.tsv")
    assert status == 1 and message.startswith("which file has the queries")
    first, second = (convert(*words, output=f"{words[-1]}.jsonl")[0] for words in commands_in(message))
    assert first == [("question 10", marco(3), 1), ("question 12", marco(4), 1)]
    assert second == [(marco(10), "question 3", 1), (marco(12), "question 4", 1)]


def test_what_ids_lack_is_said(convert, tmp_path, marco):
    write_lines(tmp_path / "qrels.tsv", (10, 0, 3, 1), (12, 0, 99, 1), (13, 0, 4, 1))
    status, message = convert("qrels.tsv", "queries.tsv", "collection.tsv")
    assert status == 1 and "# texts missing: 1 queries, 1 passages" in message
    assert convert(*commands_in(message)[0])[1].splitlines()[1:] == [
        "  qrels.tsv: line 2: no text of passage 99", "  qrels.tsv: line 3: no text of query 13"]  # fmt: skip
    assert "are given together" in convert("qrels.tsv", "queries.tsv")[1]
    write_lines(tmp_path / "collection.tsv", (3, "three"), (4,), (4, "five", "more"))
    assert convert("qrels.tsv", "queries.tsv", "collection.tsv")[1].splitlines()[1:] == [
        "  collection.tsv: line 2: 1 fields instead of 2", "  collection.tsv: line 3: 3 fields instead of 2"]
    write_lines(tmp_path / "run.tsv", (10, 3, 1), (10, 4, 2))
    assert "ranks of a run" in convert("run.tsv", "queries.tsv", "collection.tsv")[1]


@pytest.mark.parametrize("lines, ways", [
    ("10 Q0 3 2\n12 Q0 4 0\n", ["query=1", "content=3", "label=4"]),
    ("10 3 2\n12 4 0\n", ["query=1", "content=2", "label=3"]),
])  # fmt: skip
def test_named_columns_of_lines_with_spaces_are_read_and_no_network_is_asked(
        convert, tmp_path, monkeypatch, lines, ways):  # fmt: skip
    (tmp_path / "qrels").write_text(lines)
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *host, **_: asked.append(host))
    assert convert("qrels", "--columns", *ways, labels=(0, 2))[0] == [("10", "3", 2), ("12", "4", 0)]
    assert not asked


@pytest.mark.parametrize("named", [
    ["query=qrels.tsv", "content=collection.tsv"], ["query=queries.tsv", "content=qrels.tsv"],
    ["query=queries.tsv", "content=collection.tsv", "label=qrels.tsv"],
])  # fmt: skip
def test_files_of_ids_named_wrongly_are_refused_with_the_commands_that_name_them(convert, marco, named):
    files = ["queries.tsv", "collection.tsv", "qrels.tsv"]
    status, message = convert(*files, "--columns", *named)
    assert status == 1 and "--columns names that of the queries and that of the passages" in message
    rows = convert(*commands_in(message)[0])[0]
    assert rows == [(query, marco(number), label) for query, number, label in JUDGED]


def test_a_short_line_of_triples_of_ids_is_named(convert, tmp_path, marco):
    write_lines(tmp_path / "triples.tsv", (10, 3, 8), (12, 4))
    status, message = convert("triples.tsv", "queries.tsv", "collection.tsv")
    assert status == 1 and message.splitlines()[1:] == ["  triples.tsv: line 2: 2 fields instead of 3"]


# ---- Against sentence-transformers, and the way from its error to a trained model ------------------------------------
@pytest.mark.parametrize("output_format", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
def test_the_formats_of_mine_hard_negatives_hold_the_same_rows(convert, tmp_path, output_format):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    model = SentenceTransformer(TINY, device="cpu")  # its encoder, with mean pooling
    pairs = {"query": [f"第{number}问：怎么，退款" for number in range(6)],
             "answer": [f"答{number}。" * 3 for number in range(6)]}  # fmt: skip
    mined = mine_hard_negatives(datasets.Dataset.from_dict(pairs), model, num_negatives=2, output_format=output_format,
                                verbose=False)  # fmt: skip
    mined.save_to_disk(tmp_path / "mined")
    rows = convert("mined")[0]
    positives = {*zip(pairs["query"], pairs["answer"], strict=True)}
    assert {(query, text) for query, text, label in rows if label == 1} == positives
    negatives = [(query, text) for query, text, label in rows if label == 0]
    assert len(negatives) == len({*negatives}) == 12 and not {*negatives} & positives and len(rows) == 18
    scored = mine_hard_negatives(datasets.Dataset.from_dict(pairs), model, num_negatives=2, output_format=output_format,
                                 output_scores=True, verbose=False)  # fmt: skip
    scored.save_to_disk(tmp_path / "scored")
    found = convert("scored", labels=(-1.1, 1.1))[0]
    cosine = model.similarity_pairwise(*(model.encode(texts, normalize_embeddings=True)
                                         for texts in list(zip(*found, strict=True))[:2]))  # fmt: skip
    assert [label for *_, label in found] == pytest.approx(cosine.tolist(), abs=1e-4) and len({*cosine.tolist()}) > 9
    assert {row[:2] for row in found} == positives | {*negatives}


def test_from_the_scripts_error_on_a_csv_to_a_trained_model(tmp_path, small_model, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [("问题", "passage", "label")]
    rows += [(f"第{number}问，怎么办", f"答{number if label else number + 1}，“请看”\n说明书", label)
             for number in range(30) for label in (1, 0)]  # fmt: skip
    write_csv(tmp_path / "x y.csv", rows)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    options = ["--model_name_or_path", small_model, "--epochs", 1, "--mixed_precision", "no", "--output_dir", "out"]
    status, said = run_main("--train_dataset", "x y.csv", *options)
    assert status == 1
    [command] = re.findall("python tools/convert_data.py .*", said)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(command, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, timeout=120, text=True,
                          capture_output=True, encoding="utf-8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    [name] = re.findall("Next: python train_bert_rerank.py --train_dataset (.*)", done.stdout)
    status, said = run_main("--train_dataset", *shlex.split(name), *options)
    assert status == 0 and "Model saved successfully!" in said, said
    assert "Label 0.00: 30 (50.00%)" in said and (tmp_path / "out" / "final_model").is_dir()
