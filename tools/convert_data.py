"""Turn data in other shapes into the rows that train_bert_rerank.py reads: {"query", "content", "label"}, one a line.

    python tools/convert_data.py INPUT [INPUT …] --output rows.jsonl

An INPUT is, plain or gzip, told apart by what is in it:

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
name. Parquet, JSON and folders take the package `datasets`.
"""

import argparse
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
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain, islice, product
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_bert_rerank import LONGEST_LINE, UserError, fingerprints, parse_line, printable, say, whole_file  # noqa: E402

ROLES = {  # role: pattern of the names, in lower case, of the columns that have it
    "query": "query|question|anchor|(sentence|text)_?[1a]|查询|问题",
    "positive": "positives?|pos|answers?|正例|答案|回答",
    "content": "content|(passage|document|doc)s?|text|(sentence|text)_?[2b]|内容|段落|文档|文本",
    "negative": r"(hard_)?(negatives?|neg)(_?\d+)?|负例",
    "label": "labels?|scores?|(pos|neg)_scores|relevance|标签|分数|相关性",
}
IDS = {"iiii": "qrels", "iitt": "top1000", "iiit": "top1000", "iii": "triples of ids", "it": "texts", "ii": "texts"}
WIDTHS = {"qrels": 4, "top1000": 4, "triples of ids": 3, "texts": 2}


def command(args, columns=(), split=None):
    """The command of this run with other columns or another split, for a user to copy."""
    words = [*args.inputs, "--output", args.output, *(["--split", split] if split else [])]
    return f"python tools/convert_data.py {shlex.join([*words, *(['--columns', *columns] if columns else [])])}"


# ---- Reading ---------------------------------------------------------------------------------------------------------
@contextmanager
def opened(path):
    """The bytes of a file, plain or gzip; UserError where it cannot be read or, by who reads, decoded."""
    try:
        with open(path, "rb") as raw:
            yield gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}). Save it as UTF-8; Chinese from Excel: "
                        f"iconv -f GB18030 -t UTF-8 {shlex.quote(path)} > utf8.csv") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def text_records(path, separator, quoted=False):
    """Yield (line, fields) of a text file; a record whose quoted fields hold line ends counts by its first line.
    Not quoted: lines are split at `separator`, None: at white space. MS MARCO's files are so."""
    with opened(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", newline="" if quoted else "\n")
        if quoted:
            reader, number = csv.reader(text, delimiter=separator, strict=True), 1
            try:
                for fields in reader:
                    if fields:
                        yield number, fields
                    number = reader.line_num + 1
            except csv.Error as error:
                raise UserError(f"{path}: line {number}: {error}") from error
        else:
            yield from ((number, line.rstrip("\r\n").split(separator))
                        for number, line in enumerate(text, start=1) if line.strip())


def shape_of(path):
    """What `path` holds, "folder", "parquet", "json", "table", "triples" or a key of WIDTHS, and its separator."""
    if os.path.isdir(path):
        return "folder", None
    with opened(path) as file:
        start = file.read(1 << 16)
    if start.startswith(b"PAR1") or start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return "parquet" if start.startswith(b"PAR1") else "json", None
    line = start.decode("utf-8", "ignore").strip().partition("\n")[0]
    separator = next((each for each in "\t,;" if each in line), None)
    head = [fields for _, fields in islice(text_records(path, separator), 20)] if separator in ("\t", None) else [[]]
    names = [each.strip().lower() for each in head[0]] if head else []
    if all(any(re.fullmatch(pattern, name) for name in names)
           for pattern in (ROLES["query"], f"{ROLES['positive']}|{ROLES['content']}")):
        return "table", separator
    kinds = "".join("i" if all(re.fullmatch(r"[\w.:-]*\d[\w.:-]*", each, re.ASCII) for each in column) else "t"
                    for column in zip(*(fields for fields in head if len(fields) == len(head[0])), strict=True))
    if kinds == "iii" and [fields[2] for fields in head[:2]] == ["1", "2"]:
        raise UserError(f"{path}: its third column counts, as the ranks of a run do, and is no id of a passage. "
                        "Candidates are read with their texts: qid, pid, query, passage (top1000)")
    if kinds == "ttt" and max(map(len, head[0])) > 30:  # else it may be a header with names of its own
        return "triples", separator
    return IDS.get(kinds, "table") if kinds != "iiii" or head[0][1] in ("0", "Q0") else "table", separator


def open_table(path, shape, separator, columns, args):
    """The names of a table's columns, (place, values) of each row, and {column: names of its classes or None}."""
    if shape in ("table", "triples"):
        is_numbered = shape == "triples" or bool(columns) and all(name.isdecimal() for _, name in columns)
        records = text_records(path, separator or ",", quoted=not (is_numbered and separator == "\t"))
        first = next(records, (0, []))
        names = [str(number) for number in range(1, len(first[1]) + 1)] if is_numbered else first[1]
        return names, ((f"line {number}", values) for number, values in chain([first] * is_numbered, records)), {}
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: {shape} is read by a package that is missing: pip install datasets") from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its reasons stand in the exceptions too
    try:
        table = datasets.load_from_disk(path) if shape == "folder" else datasets.load_dataset(
            shape, data_files=glob.escape(path), split="train", streaming=True)
        if isinstance(table, dict) and args.split not in table and (args.split or len(table) > 1):
            commands = [command(args, args.columns, each) for each in table]
            raise UserError("\n  ".join([f"{path}: which split?", *commands]))
        table = table[args.split or next(iter(table))] if isinstance(table, dict) else table
        names = list(table.features or next(iter(table)))
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        hint = " (of a folder that save_to_disk did not write, name the files)" if shape == "folder" else ""
        raise UserError(f"{path}: cannot be read{hint}: {error}") from error

    def rows():
        try:
            for number, row in enumerate(table, start=1):
                yield f"row {number}", [row.pop(name, None) for name in names] + [*row]  # keys that the first has not
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
    return names, rows(), {name: getattr(kind, "names", None) for name, kind in (table.features or {}).items()}


# ---- Tables ----------------------------------------------------------------------------------------------------------
def roles_of(path, row, classes, args):
    """[(role, column)] of a table by its names, the query first, documents, labels. UserError where a role has no
    column, or two could have it. `row` is the first, `classes` {column: names of its classes}."""
    found = {role: [(role, name) for name in row if re.fullmatch(pattern, str(name).strip().lower())]
             for role, pattern in ROLES.items()}
    documents, labels = found["positive"] + found["content"], [[each] for each in found["label"]]
    if found["negative"] and {name for _, name in found["label"]} == {"pos_scores", "neg_scores"}:
        labels = [[("label", "pos_scores"), ("label", "neg_scores")]]
    choices = [[query, document, *found["negative"], *label]
               for query, document, label in product(found["query"], documents, labels or [[]])]
    roles = choices[0] if choices else []
    label, texts = labels[0][-1][1] if labels else None, len(found["negative"]) + 1
    if not choices:
        query, name = (found["query"] or [("query", "NAME")])[0], "NAME"
        problem = "no column is known by its name to be the query, or none the document. Name them, or count them, "
        problem += "query=1 …, if there is no header, in one of three ways"
        choices = [[query, ("content", name), ("label", name)], [query, ("positive", name)],
                   [query, ("positive", name), ("negative", name)]]
    elif len(choices) > 1:
        problem = "more than one way to read it"
    elif not labels and texts == 1 and roles[1][0] == "content":
        problem = "no column is known by its name to be the label. All documents are relevant, or name it"
        choices = [[roles[0], ("positive", roles[1][1])], [*roles, ("label", "NAME")]]
    elif len(labels) == 1 == len(labels[0]) and texts > 1 and not isinstance(row[label], list):
        problem = f"{label} is one number (a margin?) for {texts} documents; without it, labels are 1 and 0"
        choices = [roles[:-1]]
    elif classes.get(label) and not all(name.isdecimal() for name in classes[label]):
        numbered = ", ".join(f"{number} = {name}" for number, name in enumerate(classes[label]))
        problem = f"{label} numbers classes, {numbered}; if a higher number is more relevant"
    else:
        return roles
    commands = [command(args, [f"{role}={name}" for role, name in each], args.split) for each in choices]
    raise UserError("\n  ".join([f"{path} (columns {', '.join(map(str, row))[:300]}): {problem}:", *commands]))


def pairs_of(values, names, roles):
    """The (query, content, label) rows of a table's row; ValueError where they do not fit."""
    if len(values) != len(names):
        raise ValueError(f"{len(values)} fields instead of {len(names)}")
    row = dict(zip(names, values, strict=True))
    cells = [(role, each) for role, name in roles
             for each in (row[name] if isinstance(row[name], list) else [row[name]])]
    documents = [(role, text) for role, text in cells if role in ("content", "positive", "negative")]
    labels = [label for role, label in cells if role == "label"] if roles[-1][0] == "label" else (
        [int(role != "negative") for role, _ in documents])
    if len(labels) != len(documents) or not documents:
        raise ValueError(f"{len(labels)} labels for {len(documents)} documents")
    return [(row[roles[0][1]], text, label) for (_, text), label in zip(documents, labels, strict=True)]


def table_rows(path, shape, separator, columns, args):
    """Yield (path, place, function that returns rows) of a table, after saying how it is read."""
    names, rows, classes = open_table(path, shape, separator, columns, args)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: no rows")
    if wrong := [name for name in names if names.count(name) > 1] + [name for _, name in columns if name not in names]:
        raise UserError(f"{path}: {names.count(wrong[0])} columns are called {wrong[0]}: {', '.join(names)[:300]}")
    if {"content", "label"} & {role for role, _ in columns} == {"content"}:
        raise UserError("--columns: a content needs a label; without one, name it positive or negative")
    triple = list(zip(("query", "positive", "negative"), names, strict=False)) if shape == "triples" else []
    roles = columns or triple or roles_of(path, dict(zip(names, [*first[1], *names], strict=False)), classes, args)
    unused = [name for name in names if name not in dict(map(reversed, roles))]
    say(f"{path}: {shape}: " + ", ".join(f"{role} from column {name}" for role, name in roles)
        + (f"; not used: {', '.join(unused)}" if unused else ""))
    yield from ((path, place, partial(pairs_of, values, names, roles)) for place, values in chain([first], rows))


# ---- MS MARCO's ids --------------------------------------------------------------------------------------------------
def id_rows(files, columns, args):
    """Yield (path, place, function that returns rows) of {path: (shape, separator)}, files of ids and texts."""
    wrong = []  # lines of another width: returned as rows that raise

    def records(wanted):
        for path, (shape, separator) in files.items():
            for number, fields in text_records(path, separator) if shape == wanted else ():
                if len(fields) == WIDTHS[shape]:
                    yield path, f"line {number}", fields
                else:
                    wrong.append((path, f"line {number}", partial(pairs_of, fields, [""] * WIDTHS[shape], ())))

    for path, (shape, _) in files.items():
        say(f"{path}: {shape}")
    texts, shapes = [path for path in files if files[path][0] == "texts"], {shape for shape, _ in files.values()}
    if len(texts) != 2 or not shapes & {"qrels", "triples of ids"} or {"top1000", "qrels"} & shapes == {"top1000"}:
        raise UserError("files of ids are given together: queries and passages (two columns, id and text), qrels or "
                        f"triples of ids, and top1000 only with qrels. Here are: {', '.join(sorted(shapes))}")

    def judged():
        for path, place, (query, _, passage, label) in records("qrels"):
            yield path, place, query, [(passage, label)]
        for path, place, (query, positive, negative) in records("triples of ids"):
            yield path, place, query, [(positive, 1), (negative, 0)]

    relevance, queries, passages = defaultdict(set), set(), set()  # relevance: {query: its judged passages}
    for *_, query, labels in judged():
        queries.add(query)
        passages.update(passage for passage, _ in labels)
        if "top1000" in shapes:
            relevance[query].update(passage for passage, _ in labels)
    found = {path: {} for path in texts}
    for path, _, (name, text) in tqdm(records("texts"), desc="Reading texts", unit=" texts"):
        if name in passages or name in queries:
            found[path][name] = text
    yield from wrong
    if wrong:
        return
    choices = [(first, second, len(queries - found[first].keys()), len(passages - found[second].keys()))
               for first, second in (texts, texts[::-1])]
    fitting = [(columns[0][1], columns[1][1])] if columns else [each[:2] for each in choices if not any(each[2:])]
    if len(fitting) != 1:
        raise UserError("\n  ".join(["which file has the queries, and which the passages?", *(
            f"{command(args, [f'query={first}', f'content={second}'])}  # texts missing: {no_query} queries, "
            f"{no_passage} passages" for first, second, no_query, no_passage in choices)]))
    say(f"queries from {fitting[0][0]}, passages from {fitting[0][1]}")
    query_texts, passage_texts = (found[path] for path in fitting[0])

    def rows(query, labels):
        if lost := [f"query {query}"] * (query not in query_texts) + [f"passage {each}" for each, _ in labels
                                                                      if each not in passage_texts]:
            raise ValueError(f"no text of {', '.join(lost)}")
        return [(query_texts[query], passage_texts[passage], label) for passage, label in labels]

    def candidate(query, passage, *texts):
        if query not in relevance:
            raise ValueError(f"query {query} is not in the qrels: which of its passages are relevant is not known")
        return [] if passage in relevance[query] else [(*texts, 0)]

    yield from ((path, place, partial(rows, query, labels)) for path, place, query, labels in judged())
    yield from ((path, place, partial(candidate, *fields)) for path, place, fields in records("top1000"))
    yield from wrong


# ---- Writing ---------------------------------------------------------------------------------------------------------
def line_of(query, content, label):
    """A row as a line of JSONL, and its label as a number; ValueError where train_bert_rerank.py would refuse it."""
    label = None if label == "" else label
    if label is not None:
        try:
            number = float(label)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"label {str(label)[:40]} is no number")
        label = int(number) if number.is_integer() else number
    for name, text in (("query", query), ("content", content)):
        if not isinstance(text, str | type(None)):
            raise ValueError(f"{name} is no text: {str(text)[:40]}")  # of a type, too, that JSON does not have
    line = json.dumps({"query": query, "content": content, "label": label}, ensure_ascii=False).encode()
    parse_line(line, -math.inf, math.inf)
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE >> 20} MB")
    return line + b"\n", label


def convert(args, columns):
    """Write args.output from args.inputs; print how they were read, what came out and what to do next."""
    shapes = {path: shape_of(path) for path in args.inputs}
    names_files = {name for _, name in columns} <= shapes.keys()  # or there are none
    ids = {path: each for path, each in shapes.items() if each[0] in WIDTHS and names_files}
    sources = [table_rows(path, "table" if columns and separator else shape, separator, columns, args)
               for path, (shape, separator) in shapes.items() if path not in ids]
    sources += [id_rows(ids, columns, args)] if ids else []
    bad, bad_count, repeated, seen, labels = "", 0, 0, set(), Counter()
    low, high = math.inf, -math.inf
    with whole_file(Path(args.output)) as raw:
        is_gzip = args.output.endswith(".gz")
        with gzip.GzipFile("", "wb", 6, raw, mtime=0) if is_gzip else nullcontext(raw) as file:
            for path, place, pairs in tqdm(chain.from_iterable(sources), desc="Converting", unit=" rows"):
                try:
                    for row in pairs():
                        line, label = line_of(*row)
                        key = hash((fingerprints(*row[:2])[1], label))
                        repeated += key in seen
                        if key not in seen:
                            seen.add(key)
                            labels[round(label + 0.0, 2) + 0.0] += 1
                            low, high = min(low, label), max(high, label)
                            file.write(line)
                except ValueError as error:
                    bad_count += 1
                    bad += f"\n  {path}: {place}: {error}" if bad_count <= 10 else ""
            if bad or not seen:
                more = f"\n  … and {bad_count - 10} more" * (bad_count > 10)
                raise UserError(f"bad rows: {bad_count}, so nothing is written{bad}{more}" if bad else "no rows")
    say(f"{args.output}: {len(seen)} rows, skipped: none; repetitions written once: {repeated}")
    for label, count in sorted(labels.most_common(20)):
        say(f"Label {label:.2f}: {count} ({count / len(seen):.2%})")
    output, scale = shlex.quote(args.output), "" if 0 <= low and high <= 1 else f" --min_label={low} --max_label={high}"
    if low == high:
        say(f"All rows have label {low}, and training needs others too. To find irrelevant ones in your corpus:\n"
            f"  python tools/mine_hard_negatives.py {output} --corpus corpus.jsonl --output mined.jsonl")
        return
    if scale:
        say(f"Labels go from {low} to {high}; if your scale is wider, give its ends to min_label and max_label.")
    say(f"Next: python train_bert_rerank.py --train_dataset {output}{scale}")


def main():
    """Parse the command line and convert; a user's mistake is one message and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--output", required=True, help="JSONL file to write; compressed if its name ends in .gz")
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=NAME", help=f"ROLE is {', '.join(ROLES)}")
    parser.add_argument("--split", help="of a folder with several: train, test …")
    args = parser.parse_args()
    csv.field_size_limit(LONGEST_LINE)
    columns = [each.partition("=")[::2] for each in args.columns]
    columns.sort(key=lambda each: [*ROLES, each[0]].index(each[0]))
    roles = [role for role, _ in columns]
    try:
        if columns and (not {*roles} <= {*ROLES} or roles.count("query") != 1 or not {*roles[1:]} - {"label"}):
            raise UserError("--columns takes ROLE=NAME for one query and one or more documents (content with a label, "
                            "positive, negative), such as --columns query=question content=passage label=grade")
        if os.path.abspath(args.output) in map(os.path.abspath, args.inputs):
            raise UserError(f"{args.output} is an input: give the output another name")
        convert(args, columns)
    except (UserError, OSError) as error:
        print(f"Error: {printable(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
