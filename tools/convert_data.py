"""Turn data in other shapes into the rows that train_bert_rerank.py reads: {"query", "content", "label"}, one a line.

    python tools/convert_data.py INPUT [INPUT …] --output rows.jsonl

An INPUT is, plain or gzip, in UTF-8 or with the byte-order mark of UTF-16 or UTF-32, told apart by what is in it:

- a table: CSV, TSV, parquet, JSON, JSONL, or a folder that datasets' `save_to_disk` wrote. Columns are known by their
  names (ROLES), or named: `--columns query=问题 content=答案 label=分数`; numbers count the columns of a file without a
  header. A row has a query and either a document and its label, or lists of both, or relevant and irrelevant documents
  (positive, negative, negative_1 …, one each or lists), labels 1 and 0, or the numbers in a list `scores`;
- MS MARCO's triples of texts (query, relevant passage, irrelevant passage; no header);
- MS MARCO's ids, all files together: queries and collection (id, text), qrels (four columns) or triples of ids, and, if
  wanted, top1000 (qid, pid, query, passage), whose passages are irrelevant where the qrels do not name them.

How it was read is printed. What could mean two things is an error with the commands that decide. A bad row is an error
too: then nothing is written. No row is skipped; one that repeats another, as the positives of triples do, is written
once. All is read as a stream; memory holds a fingerprint of each row written, about 80 bytes, and the texts that ids
name; a JSON list is read whole. Parquet and folders take the package `datasets`.
"""

import argparse
import codecs
import csv
import glob
import gzip
import io
import json
import math
import os
import re
import shlex
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice, product
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_bert_rerank import (  # noqa: E402
    LONGEST_LINE,
    UserError,
    fingerprints,
    parse_line,
    printable,
    say,
    whole_file,
)


@dataclass
class Record:
    """A record of an input, with the rows that it becomes or what is wrong with it."""
    path: str
    place: str  # "line 3" of a text, "row 3" of other tables
    rows: list = field(default_factory=list)  # (query, content, label), the label as it stands
    problem: str | None = None


def record_of(path, place, make_rows, *arguments):
    """The record with the rows that `make_rows(*arguments)` returns, or with its ValueError.

    A generator that raised would be at its end; so the error goes into the record, and the
    records after it are still read.
    """
    try:
        return Record(path, place, make_rows(*arguments))
    except ValueError as error:
        return Record(path, place, problem=str(error))


def command(args, columns=(), split=None):
    """The command of this run with other columns or another split, for a user to copy."""
    words = [*args.inputs, "--output", args.output]
    if split:
        words += ["--split", split]
    if columns:
        words += ["--columns", *columns]
    return f"python tools/convert_data.py {shlex.join(words)}"


# ---- Reading text files ----------------------------------------------------------------------
GZIP_MAGIC = b"\x1f\x8b"
# What a file begins with that says its encoding. UTF-32's marks come first: one of them begins as
# one of UTF-16's does.
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# Encodings that nothing in a file announces, by the names that iconv and Python share.
WIDE_ENCODINGS = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")  # their ASCII has zero bytes
OTHER_ENCODINGS = ("GB18030", "BIG5", "WINDOWS-1252")


@contextmanager
def opened(path):
    """The bytes of a file, plain or gzip.

    UserError where it cannot be read or, by the code inside the with block, decoded.
    """
    try:
        with open(path, "rb") as raw:
            is_compressed = raw.peek(2)[:2] == GZIP_MAGIC
            yield gzip.open(raw) if is_compressed else raw
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {advice_on_encoding(path, error)}") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from error


@contextmanager
def opened_text(path, newline):
    """The text of a file, plain or gzip; `newline` and errors as in open() and opened()."""
    with opened(path) as file:
        yield io.TextIOWrapper(file, encoding_of(file.peek(4)), newline=newline)


def is_gzip(path):
    """Whether a file is compressed by gzip."""
    with open(path, "rb") as file:
        return file.read(2) == GZIP_MAGIC


def encoding_of(start):
    """The encoding that the first bytes of a file announce; without a mark it should be UTF-8."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return encoding
    return "utf-8-sig"


def plain_records(path, separator):
    """Yield (line, fields) of a text file in which quotes are letters, as MS MARCO's files are.

    Lines are split at `separator`; None: at white space.
    """
    with opened_text(path, "\n") as text:
        for number, line in enumerate(text, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n").split(separator)


def quoted_records(path, separator):
    """Yield (line, fields) of a CSV or TSV file.

    A record whose quoted fields hold line ends counts by its first line.
    """
    with opened_text(path, "") as text:
        reader = csv.reader(text, delimiter=separator, strict=True)
        number = 1
        try:
            for fields in reader:
                if fields:
                    yield number, fields
                number = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}: line {number}: {error}") from error


# ---- Text in another encoding ----------------------------------------------------------------
def advice_on_encoding(path, error):
    """What to do with a file that raised the UnicodeDecodeError `error`.

    The commands recode it, each followed by what the first line that is not UTF-8 says then.
    """
    if not error.encoding.startswith("utf-8"):
        return (f"it begins with the mark of {error.encoding.upper()}, and not all that follows is "
                f"that ({error.reason}): it is damaged, or its end is missing. Fetch it again")
    number, line, is_utf8 = foreign_line(path)
    if is_utf8:
        return (f"line {number} holds bytes that are not UTF-8, as the lines before it are. Mend "
                "it, or leave these bytes out and convert what this command writes:\n  "
                f"{recoding_command(path, 'UTF-8', '-c')}")

    lines = []
    for encoding in OTHER_ENCODINGS:
        text = decoded(line, encoding)
        if text:
            lines.append(f"{recoding_command(path, encoding)}  # {foreign_part(text)}")
    if is_mostly_utf8(line):
        text = line.decode("utf-8", "ignore")
        lines.append(f"{recoding_command(path, 'UTF-8', '-c')}  # {foreign_part(text)}")
    if not lines:
        return (f"line {number} is text in none of UTF-8, {', '.join(OTHER_ENCODINGS)}: it is "
                f"damaged, or the file is no text. {FROM_PROGRAM}")
    problem = (f"line {number} is not UTF-8. Of these commands, take the one whose text reads "
               "well, and convert what it writes:")
    return "\n  ".join([problem, *lines])


def decoded(line, encoding):
    """The text of a line in this encoding; "" where it is none."""
    try:
        text = line.decode(encoding)
    except UnicodeDecodeError:
        return ""
    return text if all(map(is_of_text, text)) else ""


def is_mostly_utf8(line):
    """Whether of the bytes of a line beyond ASCII more are UTF-8 than not."""
    foreign = sum(byte >= 128 for byte in line)
    good = sum(byte >= 128 for byte in line.decode("utf-8", "ignore").encode())
    return 2 * good > foreign


def foreign_line(path):
    """The number and the bytes of the first line that is not UTF-8.

    The third value: whether a line before it has letters beyond ASCII, and so shows that the file
    is UTF-8.
    """
    is_utf8 = False
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number, line, is_utf8
            if not line.isascii():
                is_utf8 = True
    raise UserError(f"{path} changed while it was read")


def foreign_part(text):
    """About 40 characters of a line, from a little before the first that is not ASCII."""
    place = next((place for place, letter in enumerate(text) if not letter.isascii()), 0)
    return " ".join(text[max(place - 10, 0) :].split())[:40]


def recoding_command(path, encoding, *options):
    """The command that writes a file of `encoding` as UTF-8, for a user to copy."""
    words = ["iconv", *options, "-f", encoding, "-t", "UTF-8"]
    name = Path(path).name
    if is_gzip(path):
        unpack = f"gzip -cd {shlex.quote(path)} | "
        name = name.removesuffix(".gz")
    else:
        unpack = ""
        words.append(path)
    output = f"{Path(name).stem}.utf8{Path(name).suffix}"
    return f"{unpack}{shlex.join(words)} > {shlex.quote(output)}"


def wide_encoding_of(start):
    """Which of WIDE_ENCODINGS the first bytes of a file are text in; None: in none of them."""
    for encoding in WIDE_ENCODINGS:
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(start)
        except UnicodeDecodeError:
            continue
        if "\n" in text and all(map(is_of_text, text)):
            return encoding
    return None


def is_of_text(letter):
    """Whether a character stands in texts: it is assigned, and controls nothing but white space."""
    return letter in "\t\r\n" or unicodedata.category(letter) not in ("Cc", "Cn", "Co", "Cs")


# ---- Files that are no text ------------------------------------------------------------------
# What to do with one; {path} and {stem} are filled in, quoted for a shell.
FROM_SPREADSHEET = (
    "Open it in Excel or LibreOffice, save its sheet as 'CSV UTF-8', and convert that file")
FROM_DOCUMENT = "Copy its table into a spreadsheet, save that as 'CSV UTF-8', and convert that file"
FROM_PANDAS = (
    "This command makes parquet of a table in it, which is read here:\n  "
    "python -c 'import pandas, sys; pandas.DataFrame(pandas.{reader}(sys.argv[1])).to_parquet"
    "(sys.argv[2])' {{path}} {{stem}}.parquet")
FROM_PICKLE = FROM_PANDAS.format(reader="read_pickle") + (
    "\n(reading pickle runs what is in it: only if you trust where it is from)")
FROM_ARRAY = (
    "An array has no names of columns: save its texts and labels as CSV in UTF-8, JSONL or parquet")
FROM_PROGRAM = "With the program that wrote it, save its rows as CSV in UTF-8, JSONL or parquet"
UNPACKED = "Unpack it, and convert the file that is in it:\n  "
# What a file that is no table here begins with: what it is, and what to do.
SIGNATURES = {
    b"\xd0\xcf\x11\xe0": ("an Excel (xls) or Word (doc) file of the old kind", FROM_SPREADSHEET),
    b"<html": ("HTML (which some programs call xls)", FROM_SPREADSHEET),
    b"<!doctype": ("HTML (which some programs call xls)", FROM_SPREADSHEET),
    b"<table": ("HTML (which some programs call xls)", FROM_SPREADSHEET),
    b"<?xml": ("XML", FROM_SPREADSHEET),
    b"%pdf-": ("a PDF", FROM_DOCUMENT),
    b"{\\rtf": ("RTF", FROM_DOCUMENT),
    b"sqlite format 3\0": (
        "an SQLite database",
        "Put the name of a table, as .tables prints it, in the place of NAME, and convert what "
        "comes out:\n  sqlite3 -header -csv {path} 'SELECT * FROM NAME' > {stem}.csv"),
    b"arrow1": ("Feather (an Arrow file)", FROM_PANDAS.format(reader="read_feather")),
    b"\xff\xff\xff\xff": (
        "an Arrow stream",
        "If data-*.arrow stand beside it, give their folder. If not, this command makes parquet of "
        "it:\n  python -c 'import datasets, sys; datasets.Dataset.from_file(sys.argv[1])"
        ".to_parquet(sys.argv[2])' {path} {stem}.parquet"),
    b"\x93numpy": ("a NumPy array", FROM_ARRAY),
    b"\x89hdf\r\n": ("HDF5", FROM_PANDAS.format(reader="read_hdf")),
    b"\x80\x02": ("pickle", FROM_PICKLE),
    b"\x80\x03": ("pickle", FROM_PICKLE),
    b"\x80\x04": ("pickle", FROM_PICKLE),
    b"\x80\x05": ("pickle", FROM_PICKLE),
    b"bzh91ay&sy": ("compressed by bzip2", UNPACKED + "bzip2 -cd {path} > {stem}"),
    b"\xfd7zxz\0": ("compressed by xz", UNPACKED + "xz -cd {path} > {stem}"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", UNPACKED + "zstd -cd {path} > {stem}"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACKED + "7z x {path}"),
    b"rar!\x1a": ("a rar archive", UNPACKED + "unrar x {path}"),
    b"version https://git-lfs": (
        "a pointer of Git LFS to the file, which is not there yet",
        "Run git lfs pull in its folder, and convert it then"),
}
# What a zip file's first bytes hold where it is more than an archive: the names of its parts.
ZIP_PARTS = {
    b"xl/": ("an Excel workbook (xlsx)", FROM_SPREADSHEET),
    b"opendocument.spreadsheet": ("a LibreOffice spreadsheet (ods)", FROM_SPREADSHEET),
    b"word/": ("a Word document (docx)", FROM_DOCUMENT),
    b"opendocument.text": ("a LibreOffice document (odt)", FROM_DOCUMENT),
    b".npy": ("NumPy arrays", FROM_ARRAY),
    b"data.pkl": ("data of PyTorch", FROM_PROGRAM),
}
ZIP_MAGIC = b"PK\x03\x04"
PARQUET_MAGIC = b"PAR1"
TAR_MAGIC = slice(257, 262)  # where a tar file says ustar


def check_is_text(path, start):
    """UserError where a file with these first bytes, unpacked, is no text or says no encoding."""
    kind, advice = kind_of_bytes(start)
    if kind:
        raise UserError(f"{path}: {kind}. {advice_on_binary(path, kind, advice)}")
    has_mark = encoding_of(start) in BYTE_ORDER_MARKS.values()
    if b"\0" not in start or has_mark or is_utf8_start(start):
        return

    encoding = wide_encoding_of(start)
    if encoding:
        raise UserError(f"{path}: text in {encoding} without a byte-order mark. Convert what this "
                        f"command writes:\n  {recoding_command(path, encoding)}")
    raise UserError(f"{path}: a binary file. {FROM_PROGRAM}")


def advice_on_binary(path, kind, advice):
    """The advice of SIGNATURES on a file, with its name; of one in gzip: to unpack it first."""
    name = Path(path).name
    if is_gzip(path) and kind != "a tar archive":  # tar unpacks both
        name = name.removesuffix(".gz")
        advice = "Unpack it, and run this again on it:\n  gzip -cd {path} > {stem}.unpacked"
    stem = shlex.quote(Path(name).stem)
    return advice.format(path=shlex.quote(path), stem=stem)


def kind_of_bytes(start):
    """What a file with these first bytes is, and what to do with it; ("", ""): it may be text."""
    begin = start.lstrip()[:32].lower()
    for signature, kind_and_advice in SIGNATURES.items():
        if begin.startswith(signature):
            return kind_and_advice
    if start.startswith(ZIP_MAGIC):
        for part, kind_and_advice in ZIP_PARTS.items():
            if part in start:
                return kind_and_advice
        return "a zip archive", UNPACKED + "unzip {path}"
    if start[TAR_MAGIC] == b"ustar":
        return "a tar archive", UNPACKED + "tar -xf {path}"
    if start.startswith(GZIP_MAGIC):
        return "compressed by gzip twice", ""
    if start.startswith(PARQUET_MAGIC):
        return "parquet in gzip", ""
    return "", ""


def is_utf8_start(start):
    """Whether the first bytes of a file are UTF-8, and no more than some of them zero."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return start.count(0) * 10 < len(start)


# ---- What an input holds ---------------------------------------------------------------------
# Role: pattern of the names, in lower case, of the columns that have it. Of several columns the
# roles are kept in this order: the query first, the documents, the labels last.
ROLES = {
    "query": "query|question|anchor|(sentence|text)_?[1a]|查询|问题",
    "positive": "positives?|pos|answers?|正例|答案|回答",
    "content": "content|(passage|document|doc)s?|text|(sentence|text)_?[2b]|内容|段落|文档|文本",
    "negative": r"(hard_)?(negatives?|neg)(_?\d+)?|负例",
    "label": "labels?|scores?|(pos|neg)_scores|relevance|标签|分数|相关性",
}
# MS MARCO's files of ids, by their columns: i holds ids (a passage "42" looks like one), t texts.
ID_KINDS = {
    "iiii": "qrels",
    "iitt": "top1000",
    "iiit": "top1000",
    "iii": "triples of ids",
    "it": "texts",
    "ii": "texts",
}
WIDTHS = {"qrels": 4, "top1000": 4, "triples of ids": 3, "texts": 2}
AN_ID = re.compile(r"[\w.:-]*\d[\w.:-]*", re.ASCII)


@dataclass
class Shape:
    """What an input holds."""
    kind: str  # "folder", "parquet", "json", "table", "triples" or a key of WIDTHS
    separator: str | None = None  # of the fields of a text; None: white space


def shape_of(path):
    """The Shape of an input, told by its first bytes and lines."""
    if os.path.isdir(path):
        return Shape("folder")

    if os.path.exists(path) and not os.path.isfile(path):  # a pipe can be read only once
        raise UserError(f"{path}: no regular file: save it as one, and give that")
    with opened(path) as file:
        start = file.read(1 << 16)
    if start.startswith(PARQUET_MAGIC) and not is_gzip(path):
        return Shape("parquet")
    check_is_text(path, start)
    text = start.decode(encoding_of(start), "ignore").strip()
    if text.startswith(("{", "[")):
        return Shape("json")

    first_line = text.partition("\n")[0]
    separator = next((mark for mark in "\t,;" if mark in first_line), None)
    if separator in (",", ";"):
        return Shape("table", separator)
    head = [fields for _, fields in islice(plain_records(path, separator), 20)]
    kind = kind_of_lines(path, head)
    # Texts have spaces in them: what spaces separate are ids alone.
    if separator is None and kind not in ("qrels", "triples of ids"):
        return Shape("table", ",")
    return Shape(kind, separator)


def kind_of_lines(path, head):
    """Whether `head`, the fields of a text's first lines, is of a table or a file of MS MARCO's."""
    if not head or is_header(head[0]):
        return "table"

    whole = [fields for fields in head if len(fields) == len(head[0])]
    letters = ""
    for column in zip(*whole, strict=True):
        letters += "i" if all(map(AN_ID.fullmatch, column)) else "t"

    counts = letters == "iii" and [fields[2] for fields in whole[:2]] == ["1", "2"]
    if counts or (len(head[0]) == 6 and head[0][1] == "Q0"):
        raise UserError(
            f"{path}: it has the ranks of a run, and does not say which passages are relevant. "
            "Candidates are read with their texts: qid, pid, query, passage (top1000)")
    if letters == "iiii" and head[0][1] not in ("0", "Q0"):
        return "table"  # four numbers, but qrels have nothing in their second column
    if letters == "ttt" and max(map(len, head[0])) > 30:
        return "triples"  # shorter ones may be a header with names of its own
    return ID_KINDS.get(letters, "table")


def is_header(fields):
    """Whether a line names a query and a document."""
    document = f"{ROLES['positive']}|{ROLES['content']}"
    return bool(columns_like(ROLES["query"], fields) and columns_like(document, fields))


def columns_like(pattern, names):
    """The names that a pattern of ROLES matches."""
    return [name for name in names if re.fullmatch(pattern, name.strip().lower())]


# ---- Tables ----------------------------------------------------------------------------------
@dataclass
class Table:
    """A table that is being read."""
    path: str
    names: list  # of its columns
    rows: Iterator  # (place, values) of each row
    classes: dict = field(default_factory=dict)  # {column that numbers classes: their names}


def table_records(path, shape, args):
    """Yield the Records of a table, after saying how it is read."""
    if shape.kind in ("table", "triples"):
        table = open_text(path, shape, args.roles)
    elif shape.kind == "json":
        table = open_json(path)
    else:
        table = open_dataset(path, shape.kind, args)
    first = next(table.rows, None)
    if first is None:
        raise UserError(f"{path}: no rows")
    check_columns(table, args.roles)

    if args.roles:
        roles = args.roles
    elif shape.kind == "triples":
        roles = list(zip(("query", "positive", "negative"), table.names, strict=False))
    else:
        first_row = dict(zip(table.names, first[1], strict=False))
        roles = roles_of(table, first_row, args)
    say(f"{path}: {shape.kind}: {roles_in_words(roles, table.names)}")

    for place, values in chain([first], table.rows):
        yield record_of(path, place, rows_of, values, table.names, roles)


def open_text(path, shape, roles):
    """The Table in a CSV, TSV or MS MARCO's triples; columns named by numbers: it has no header."""
    is_counted = shape.kind == "triples"
    if roles and all(name.isdecimal() for _, name in roles):
        is_counted = True
    if shape.separator is None or (is_counted and shape.separator == "\t"):
        records = plain_records(path, shape.separator)
    else:
        records = quoted_records(path, shape.separator)

    first = next(records, (0, []))
    names = first[1]
    if is_counted:
        names = [str(number) for number in range(1, len(first[1]) + 1)]
        records = chain([first], records)
    rows = ((f"line {number}", fields) for number, fields in records)
    return Table(path, names, rows)


OBJECT_ADVICE = 'Each row should be an object, {"query": "…", "content": "…", "label": 1}'
HEAD = 1000  # objects whose keys are the columns
JSON_SPACE = re.compile(r"\s*")


def open_json(path):
    """The Table in a JSON file: its columns are the keys of the first objects, its rows objects."""
    objects = json_objects(path)
    head = list(islice(objects, HEAD))
    names = list(dict.fromkeys(chain.from_iterable(head)))
    if head and not names:
        raise UserError(f"{path}: its objects are empty. {OBJECT_ADVICE}")
    if len(head) == 1:
        check_is_flat(path, head[0])

    def rows():
        for number, row in enumerate(chain(head, objects), start=1):
            values = [row.pop(name, None) for name in names]
            keys_of_its_own = list(row)  # too many values: an error of this row
            yield f"row {number}", values + keys_of_its_own

    return Table(path, names, rows())


def check_is_flat(path, only_object):
    """UserError where the only object of a JSON file has the rows in a list of its own."""
    for name, value in only_object.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            code = ("import json, sys; [print(json.dumps(row)) for row in "
                    'json.load(open(sys.argv[1], encoding="utf-8-sig"))[sys.argv[2]]]')
            words = shlex.join(["python", "-c", code, path, name])
            output = shlex.quote(f"{Path(path).stem}.{name}.jsonl")
            raise UserError(f"{path}: it is one object, with a list of objects in {name}. If these "
                            f"are the rows, convert what this command writes:\n  {words} > {output}")


def json_objects(path):
    """Yield the objects of a JSON file; UserError where there is anything else."""
    number = 0
    try:
        for number, value in enumerate(json_values(path), start=1):
            if not isinstance(value, dict):
                raise UserError(f"{path}: row {number} is {json.dumps(value)[:40]}. {OBJECT_ADVICE}")
            yield value
    except (json.JSONDecodeError, RepeatedKey, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: it begins as JSON does, and row {number + 1} is "
                        f"none: {error}. {OBJECT_ADVICE}") from error


def json_values(path):
    """Yield the values of a JSON file: one a line, or several lines each, or the items of lists."""
    decoder = json.JSONDecoder(object_pairs_hook=object_of)
    with opened_text(path, "\n") as file:
        first = next((line for line in file if line.strip()), "")
        try:
            value = decoder.decode(first)
        except json.JSONDecodeError:
            value = None
        if isinstance(value, dict):
            yield value
            for line in file:
                if line.strip():
                    yield decoder.decode(line)
            return
        text = first + file.read()

    end = JSON_SPACE.match(text).end()
    while end < len(text):
        value, end = decoder.raw_decode(text, end)
        yield from value if isinstance(value, list) else [value]
        end = JSON_SPACE.match(text, end).end()


class RepeatedKey(ValueError):
    """An object of JSON that has a key twice."""


def object_of(pairs):
    """The object of JSON with these (key, value) pairs; RepeatedKey where a key is there twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = Counter(key for key, _ in pairs)
        raise RepeatedKey(f"{keys.most_common(1)[0][0]} is there twice")
    return value


def open_dataset(path, kind, args):
    """The Table in a folder or a parquet file, which the package datasets reads."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: {kind} is read by a package that is missing: "
                        "pip install datasets") from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the exceptions have its reasons too
    unreadable = (ValueError, OSError, datasets.exceptions.DatasetsError)

    try:
        if kind == "folder":
            data = split_of(datasets.load_from_disk(path), path, args)
        else:
            data = datasets.load_dataset(kind, data_files=glob.escape(path), split="train",
                                         streaming=True)
        names = list(data.features or next(iter(data), {}))
    except unreadable as error:
        hint = ""
        if kind == "folder":
            hint = " (of a folder that save_to_disk did not write, name the files)"
        raise UserError(f"{path}: cannot be read{hint}: {error}") from error

    def rows():
        try:
            for number, row in enumerate(data, start=1):
                values = [row.pop(name, None) for name in names]
                keys_of_its_own = list(row)  # too many values: an error of this row
                yield f"row {number}", values + keys_of_its_own
        except unreadable as error:
            raise UserError(f"{path}: cannot be read: {error}") from error

    classes = {}
    for name, column in (data.features or {}).items():
        if getattr(column, "names", None):
            classes[name] = column.names
    return Table(path, names, rows(), classes)


def split_of(data, path, args):
    """The split of `data`, a folder's content, that is asked for, or its only one."""
    if not isinstance(data, dict):
        return data
    if args.split in data:
        return data[args.split]
    if len(data) == 1 and not args.split:
        return next(iter(data.values()))
    commands = [command(args, args.columns, split) for split in data]
    raise UserError("\n  ".join([f"{path}: which split?", *commands]))


def check_columns(table, roles):
    """UserError where a name is no column's or several columns', or `roles` lack a label."""
    names = table.names
    wrong = [name for name in names if names.count(name) > 1]
    wrong += [name for _, name in roles if name not in names]
    if wrong:
        raise UserError(f"{table.path}: {names.count(wrong[0])} columns are called {wrong[0]}: "
                        f"{', '.join(names)[:300]}")

    kinds = [role for role, _ in roles]
    if "content" in kinds and "label" not in kinds:
        raise UserError("--columns: a content needs a label; without one, name it positive or "
                        "negative")


def roles_in_words(roles, names):
    """Which column is taken for what, and which are not used."""
    words = ", ".join(f"{role} from column {name}" for role, name in roles)
    used = [name for _, name in roles]
    unused = [name for name in names if name not in used]
    if unused:
        words += f"; not used: {', '.join(unused)}"
    return words


def rows_of(values, names, roles):
    """The (query, content, label) rows of a table's row; ValueError where they do not fit.

    A cell is a text or a list of them. From query "q", positive "a" and negative ["b", "c"] come
    ("q", "a", 1), ("q", "b", 0) and ("q", "c", 0).
    """
    if len(values) != len(names):
        raise ValueError(wrong_width(values, len(names)))
    row = dict(zip(names, values, strict=True))

    query, documents, labels = None, [], []
    for role, name in roles:
        cells = row[name] if isinstance(row[name], list) else [row[name]]
        if role == "query":
            query = row[name]
        elif role == "label":
            labels += cells
        else:
            documents += [(role, text) for text in cells]
    if roles[-1][0] != "label":
        labels = [0 if role == "negative" else 1 for role, _ in documents]

    if len(labels) != len(documents) or not documents:
        raise ValueError(f"{len(labels)} labels for {len(documents)} documents")
    return [(query, text, label) for (_, text), label in zip(documents, labels, strict=True)]


def wrong_width(fields, width):
    """What is wrong with a line of too many or too few fields."""
    return f"{len(fields)} fields instead of {width}"


# ---- Roles of a table's columns by their names ------------------------------------------------
def roles_of(table, first_row, args):
    """[(role, column)] of a table.

    UserError, with the command for each way to read it, where a role has no column, two could
    have it, or what a label means is not known.
    """
    columns = {}  # {role: its (role, column) pairs}
    for role, pattern in ROLES.items():
        columns[role] = [(role, name) for name in columns_like(pattern, table.names)]
    readings = readings_of(columns)

    if len(table.names) == 1:
        raise UserError(f"{table.path}: it has one column, {table.names[0][:100]}. Rows take two or "
                        "more, such as query, content and label; in a text, commas, semicolons or "
                        "tabs are between them")
    if not readings:
        problem = ("no column is known by its name to be the query, or none the document. Name "
                   "them, or count them, query=1 …, if there is no header, in one of three ways")
        choices = ways_to_name(columns["query"])
    elif len(readings) > 1:
        problem, choices = "more than one way to read it", readings
    else:
        problem, choices = doubt_about(readings[0], first_row, table.classes)
    if not problem:
        return readings[0]

    lines = [f"{table.path} (columns {', '.join(table.names)[:300]}): {problem}:"]
    for roles in choices:
        lines.append(command(args, [f"{role}={name}" for role, name in roles], args.split))
    raise UserError("\n  ".join(lines))


def readings_of(columns):
    """The ways to read a table, each [(role, column)], of {role: its (role, column) pairs}.

    One column each is the query, the document and the label, if there is one; all negatives are
    read. Two queries and two labels: four ways.
    """
    labels = [[pair] for pair in columns["label"]] or [[]]
    label_names = {name for _, name in columns["label"]}
    if columns["negative"] and label_names == {"pos_scores", "neg_scores"}:
        labels = [[("label", "pos_scores"), ("label", "neg_scores")]]  # FlagEmbedding's: both

    readings = []
    documents = columns["positive"] + columns["content"]
    for query, document, label in product(columns["query"], documents, labels):
        readings.append([query, document, *columns["negative"], *label])
    return readings


def ways_to_name(queries):
    """The three kinds of columns that make a table, with NAME for a user to fill in."""
    query = queries[0] if queries else ("query", "NAME")
    return [
        [query, ("content", "NAME"), ("label", "NAME")],
        [query, ("positive", "NAME")],
        [query, ("positive", "NAME"), ("negative", "NAME")],
    ]


def doubt_about(reading, first_row, classes):
    """What is not known of the labels of a table's only reading, and the readings to choose from.

    (None, []) where all is known.
    """
    query, (role, document), *_ = reading
    labels = [name for kind, name in reading if kind == "label"]
    negatives = [name for kind, name in reading if kind == "negative"]

    if not labels:
        if role == "positive" or negatives:
            return None, []
        problem = ("no column is known by its name to be the label. All documents are relevant, "
                   "or name it")
        return problem, [[query, ("positive", document)], [*reading, ("label", "NAME")]]

    label = labels[-1]
    if len(labels) == 1 and negatives and not isinstance(first_row.get(label), list):
        problem = (f"{label} is one number (a margin?) for {len(negatives) + 1} documents; "
                   "without it, labels are 1 and 0")
        return problem, [reading[:-1]]

    names = classes.get(label, [])
    if not all(name.isdecimal() for name in names):
        numbered = ", ".join(f"{number} = {name}" for number, name in enumerate(names))
        problem = f"{label} numbers classes, {numbered}; if a higher number is more relevant"
        return problem, [reading]
    return None, []


# ---- MS MARCO's ids --------------------------------------------------------------------------
class IdFiles:
    """MS MARCO's files of ids and texts, {path: Shape}, which are read together."""
    def __init__(self, shapes):
        self.shapes = shapes
        self.kinds = {shape.kind for shape in shapes.values()}
        self.misfits = []  # Records of the lines of another width that reading has met

    def paths_of(self, kind):
        """The files of a kind of shape."""
        return [path for path, shape in self.shapes.items() if shape.kind == kind]

    def lines_of(self, kind):
        """Yield (path, place, fields) of the lines of a kind; those of another width are noted."""
        for path in self.paths_of(kind):
            for number, fields in plain_records(path, self.shapes[path].separator):
                place = f"line {number}"
                if len(fields) == WIDTHS[kind]:
                    yield path, place, fields
                else:
                    problem = wrong_width(fields, WIDTHS[kind])
                    self.misfits.append(Record(path, place, problem=problem))

    def judgements(self):
        """Yield (path, place, query's id, [(passage's id, label)])."""
        for path, place, (query, _, passage, label) in self.lines_of("qrels"):
            yield path, place, query, [(passage, label)]
        for path, place, (query, positive, negative) in self.lines_of("triples of ids"):
            yield path, place, query, [(positive, 1), (negative, 0)]


@dataclass
class JudgedIds:
    """The ids that judgements name."""
    queries: set = field(default_factory=set)
    passages: set = field(default_factory=set)
    passages_of: dict = field(default_factory=dict)  # {query: its passages}, if there is a top1000


def id_records(files, args):
    """Yield the Records of IdFiles, after saying what each of them is.

    Judgements are read twice: first for the ids whose texts are to be kept, then for the rows.
    """
    for path, shape in files.shapes.items():
        say(f"{path}: {shape.kind}")
    check_id_files(files)

    check_named_files(files, args)

    judged = judged_ids(files)
    texts = texts_of(files, judged)
    if files.misfits:  # a line that fits no more may be why a text is missing
        yield from files.misfits
        return
    if args.roles:
        query_file, passage_file = args.roles[0][1], args.roles[1][1]
    else:
        query_file, passage_file = query_and_passage_file(texts, judged, args)
    say(f"queries from {query_file}, passages from {passage_file}")
    query_texts, passage_texts = texts[query_file], texts[passage_file]

    for path, place, query, labels in files.judgements():
        yield record_of(path, place, judged_rows, query, labels, query_texts, passage_texts)
    for path, place, fields in files.lines_of("top1000"):
        yield record_of(path, place, candidate_rows, fields, judged)
    yield from files.misfits  # of top1000


def check_id_files(files):
    """UserError where a file is missing without which ids make no rows."""
    has_judgements = "qrels" in files.kinds or "triples of ids" in files.kinds
    lacks_qrels = "top1000" in files.kinds and "qrels" not in files.kinds
    if len(files.paths_of("texts")) != 2 or not has_judgements or lacks_qrels:
        raise UserError(
            "files of ids are given together: queries and passages (two columns, id and text), "
            "qrels or triples of ids, and top1000 only with qrels. Here are: "
            f"{', '.join(sorted(files.kinds))}")


def check_named_files(files, args):
    """UserError where --columns names anything but the file of the queries and the passages'."""
    first, second = files.paths_of("texts")
    named = [path for _, path in args.roles]
    if named and sorted(named) != sorted([first, second]):
        lines = ["of files of ids, --columns names that of the queries and that of the passages:"]
        for queries, passages in ((first, second), (second, first)):
            lines.append(command(args, [f"query={queries}", f"content={passages}"]))
        raise UserError("\n  ".join(lines))


def judged_ids(files):
    """The JudgedIds of all judgements."""
    judged = JudgedIds()
    for _, _, query, labels in files.judgements():
        passages = [passage for passage, _ in labels]
        judged.queries.add(query)
        judged.passages.update(passages)
        if "top1000" in files.kinds:
            judged.passages_of.setdefault(query, set()).update(passages)
    return judged


def texts_of(files, judged):
    """{path of a file of texts: {id: text}} of the ids that are judged.

    Which file has the queries is not known yet: the ids of both are kept from each.
    """
    texts = {path: {} for path in files.paths_of("texts")}
    for path, _, (name, text) in tqdm(files.lines_of("texts"), desc="Reading texts", unit=" texts"):
        if name in judged.queries or name in judged.passages:
            texts[path][name] = text
    return texts


def query_and_passage_file(texts, judged, args):
    """The paths of the queries and of the passages.

    UserError where not exactly one order of the two files has all the ids.
    """
    fitting = []
    lines = ["which file has the queries, and which the passages?"]
    first, second = texts
    for queries, passages in ((first, second), (second, first)):
        lost_queries = len(judged.queries - texts[queries].keys())
        lost_passages = len(judged.passages - texts[passages].keys())
        if not lost_queries and not lost_passages:
            fitting.append((queries, passages))
        this_way = command(args, [f"query={queries}", f"content={passages}"])
        lines.append(f"{this_way}  # texts missing: {lost_queries} queries, "
                     f"{lost_passages} passages")
    if len(fitting) != 1:
        raise UserError("\n  ".join(lines))
    return fitting[0]


def judged_rows(query, labels, query_texts, passage_texts):
    """The rows of a query's id and its [(passage's id, label)].

    ValueError names the ids that have no text.
    """
    lost = []
    if query not in query_texts:
        lost.append(f"query {query}")
    for passage, _ in labels:
        if passage not in passage_texts:
            lost.append(f"passage {passage}")
    if lost:
        raise ValueError(f"no text of {', '.join(lost)}")
    return [(query_texts[query], passage_texts[passage], label) for passage, label in labels]


def candidate_rows(fields, judged):
    """The row of a line of top1000: irrelevant.

    None where the passage is judged: the judgement is its row.
    """
    query, passage, query_text, passage_text = fields
    if query not in judged.passages_of:
        raise ValueError(f"query {query} is not in the qrels: which of its passages are relevant "
                         "is not known")
    if passage in judged.passages_of[query]:
        return []
    return [(query_text, passage_text, 0)]


# ---- Writing ---------------------------------------------------------------------------------
SHOWN = 10  # bad rows in a message


@dataclass
class Outcome:
    """What came of the records so far."""
    seen: set = field(default_factory=set)  # hashes of the rows that are written
    repeated: int = 0
    labels: Counter = field(default_factory=Counter)  # {label, two decimals: its rows}
    low: float = math.inf  # lowest label
    high: float = -math.inf
    bad: int = 0  # records
    problems: list = field(default_factory=list)  # of the first bad records, with their places


def number_of(label):
    """A label as a number, an int where it is whole; ValueError where it is none."""
    try:
        number = float(label)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"label {str(label)[:40]} is no number")
    return int(number) if number.is_integer() else number


def scale_of(options):
    """(min_label, max_label) of a tool's options, each an int where it is whole, as messages and
    files show it; UserError where they are no scale."""
    ends = []
    for name in ("min_label", "max_label"):
        value = getattr(options, name)
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}: it should be a number")
        ends.append(number_of(value))
    low, high = ends
    if low >= high:
        raise UserError(f"min_label {low} is not below max_label {high}")
    return low, high


def line_of(query, content, label):
    """A row as a line of JSONL, and its label as a number.

    ValueError where train_bert_rerank.py would refuse it.
    """
    is_missing = label is None or label == ""
    label = None if is_missing else number_of(label)
    for name, text in (("query", query), ("content", content)):
        if text is not None and not isinstance(text, str):
            # parse_line() would say so as well, but parquet has types that JSON has not.
            raise ValueError(f"{name} is no text: {str(text)[:40]}")

    row = {"query": query, "content": content, "label": label}
    line = json.dumps(row, ensure_ascii=False).encode()
    parse_line(line, -math.inf, math.inf)
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE >> 20} MB")
    return line + b"\n", label


def write_row(row, file, outcome):
    """Write a (query, content, label) row unless it was written before; ValueError: it is bad."""
    line, label = line_of(*row)
    query, content, _ = row
    _, pair = fingerprints(query, content)
    key = hash((pair, label))  # takes less memory than the two
    if key in outcome.seen:
        outcome.repeated += 1
        return

    file.write(line)
    outcome.seen.add(key)
    outcome.labels[round(label, 2) + 0.0] += 1  # + 0.0: -0.001 is counted as 0.00, not as -0.00
    outcome.low = min(outcome.low, label)
    outcome.high = max(outcome.high, label)


def write_record(record, file, outcome):
    """Write a record's rows; where it is bad, note that."""
    problem = record.problem
    try:
        for row in record.rows:
            write_row(row, file, outcome)
    except ValueError as error:
        problem = error
    except RecursionError:
        problem = "lists or objects in lists or objects, too deep to be read"
    if problem is not None:
        outcome.bad += 1
        if outcome.bad <= SHOWN:
            outcome.problems.append(f"{record.path}: {record.place}: {problem}")


def check_outcome(outcome):
    """UserError where a record was bad, or no row was written."""
    if outcome.bad:
        lines = [f"bad rows: {outcome.bad}, so nothing is written", *outcome.problems]
        if outcome.bad > SHOWN:
            lines.append(f"… and {outcome.bad - SHOWN} more")
        raise UserError("\n  ".join(lines))
    if not outcome.seen:
        raise UserError("no rows")


def report(outcome, output):
    """Say what was written to `output`, and what to do next."""
    count = len(outcome.seen)
    say(f"{output}: {count} rows, skipped: none; repetitions written once: {outcome.repeated}")
    for label, rows in sorted(outcome.labels.most_common(20)):
        say(f"Label {label:.2f}: {rows} ({rows / count:.2%})")

    low, high = outcome.low, outcome.high
    path = shlex.quote(output)
    if low == high:
        say(f"All rows have label {low}, and training needs others too. To find irrelevant ones in "
            f"your corpus:\n  python tools/mine_hard_negatives.py {path} --corpus corpus.jsonl "
            "--output mined.jsonl")
        return

    scale = ""
    if low < 0 or high > 1:
        say(f"Labels go from {low} to {high}; if your scale is wider, give its ends to min_label "
            "and max_label.")
        scale = f" --min_label={low} --max_label={high}"
    say(f"Next: python train_bert_rerank.py --train_dataset {path}{scale}")


# ---- A run -----------------------------------------------------------------------------------
def records_of(args):
    """The Records of all inputs, tables before files of ids."""
    shapes = {path: shape_of(path) for path in args.inputs}
    # --columns of files of ids says which of them has the queries: then all names are paths.
    ids = {}
    if all(name in shapes for _, name in args.roles):
        ids = {path: shape for path, shape in shapes.items() if shape.kind in WIDTHS}

    sources = []
    for path, shape in shapes.items():
        if path not in ids:
            if args.roles and (shape.kind in WIDTHS or shape.kind == "triples"):
                shape = Shape("table", shape.separator)  # as its columns are named, it is one
            sources.append(table_records(path, shape, args))
    if ids:
        sources.append(id_records(IdFiles(ids), args))
    return chain.from_iterable(sources)


def convert(args):
    """Write args.output from args.inputs; say how they were read, what came out, what is next."""
    records = records_of(args)
    outcome = Outcome()
    with whole_file(Path(args.output)) as raw:
        compress = args.output.endswith(".gz")
        with gzip.GzipFile("", "wb", 6, raw, mtime=0) if compress else nullcontext(raw) as file:
            for record in tqdm(records, desc="Converting", unit=" rows"):
                write_record(record, file, outcome)
        check_outcome(outcome)
    report(outcome, args.output)


def roles_named(columns):
    """[(role, column)] of the ROLE=NAME words of --columns, in the order of ROLES."""
    named = []
    for word in columns:
        role, _, name = word.partition("=")
        named.append((role, name))

    roles = [role for role, _ in named]
    documents = [role for role in roles if role not in ("query", "label")]
    is_known = all(role in ROLES and name for role, name in named)
    if columns and (not is_known or roles.count("query") != 1 or not documents):
        raise UserError(
            "--columns takes ROLE=NAME for one query and one or more documents (content with a "
            "label, positive, negative), such as --columns query=question content=passage "
            "label=grade")
    names = [name for _, name in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--columns names {name} twice")
    return sorted(named, key=lambda pair: list(ROLES).index(pair[0]))


def check_output(name):
    """UserError where the file `name` could not be written, or would replace what is no file."""
    output = Path(name)
    if not output.name or output.is_dir():
        raise UserError(f"--output '{name}' is a folder: add the name of a file to it")
    if output.exists() and not output.is_file():  # it would be replaced by a file
        raise UserError(f"--output {name} is a device or a pipe: name a file")
    for folder in output.parents:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {name}: {folder} is no folder")


def require_no_input(args):
    """UserError where the output is an input too."""
    if os.path.abspath(args.output) in map(os.path.abspath, args.inputs):
        raise UserError(f"{args.output} is an input: give the output another name")


def main():
    """Parse the command line and convert; a user's mistake is one message and exit status 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--output", required=True,
                        help="JSONL file to write; compressed if its name ends in .gz")
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=NAME",
                        help=f"ROLE is {', '.join(ROLES)}")
    parser.add_argument("--split", help="of a folder with several: train, test …")
    args = parser.parse_args()

    csv.field_size_limit(LONGEST_LINE)
    try:
        args.roles = roles_named(args.columns)
        check_output(args.output)
        require_no_input(args)
        convert(args)
    except (UserError, OSError) as error:
        print(f"Error: {printable(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing is written.")


if __name__ == "__main__":
    main()
