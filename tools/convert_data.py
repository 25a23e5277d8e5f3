"""Turn data in other shapes into the rows that train_bert_rerank.py reads: {"query", "content", "label"}, one a line.

    python tools/convert_data.py INPUT [INPUT …] --output rows.jsonl

| INPUT | read as |
| --- | --- |
| CSV, TSV, parquet, JSON or JSONL (all but parquet also as .gz), a folder of `Dataset.save_to_disk` | a table: its columns are known by name (ROLES below), or named: `--columns query=问题 content=答案 label=分数` |
| triples.train.small.tsv | query, relevant passage, irrelevant passage, no header |
| queries.tsv, collection.tsv and qrels (4 columns) or qidpidtriples (3 ids), all given together | MS MARCO's ids, told apart by their columns and ids |
| top1000 (qid, pid, query, passage), together with these | candidates: those that are not in the qrels are irrelevant |

A table has a query and one of: a document and a label (one each, or lists); relevant and irrelevant ones in columns
`positive`, `negative`, `negative_1` … or lists (`pos`, `neg`), labels 1 and 0, or the numbers of a list `scores`. Names
of columns that are numbers, `--columns query=1 content=2 label=3`, count the columns of a file without a header.

What is found is printed. What could mean two things is an error with the commands that decide; a bad row is one with
its line, and then there is no output. Nothing is skipped, but a row that says the same as an earlier one is written
once: triples repeat their positives. Everything is read as a stream; memory goes to 64 bits for each row written (in a
set of Python's, some 80 bytes) and to the texts that qrels or triples of ids name. Parquet, JSON and folders are read
by the package `datasets`.
"""  # noqa: E501

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
from functools import partial
from itertools import chain, islice, product
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_bert_rerank import LONGEST_LINE, UserError, fingerprints, parse_line, printable, say, whole_file  # noqa: E402

ROLES = {  # role: pattern of the names, in lower case, of the columns that have it
    "query": "query|question|anchor|(sentence|text)_?[1a]|查询|问题",
    "content": "content|(passage|document|doc)s?|text|(sentence|text)_?[2b]|内容|段落|文档|文本",
    "positive": "positives?|pos|answers?|正例|答案|回答",
    "negative": r"(hard_)?(negatives?|neg)(_?\d+)?|负例",
    "label": "labels?|scores?|(pos|neg)_scores|relevance|标签|分数|相关性",
}
IDS = {"iiii": "qrels", "iitt": "candidates", "iiit": "candidates", "iii": "triples of ids", "it": "texts", "ii": "texts"}
FIELDS = {"qrels": 4, "candidates": 4, "triples of ids": 3, "texts": 2}


def command(args, columns=(), split=None):
    """The command of this run with other columns or another split, for a user to copy."""
    words = [*args.inputs, "--output", args.output, *(["--split", split] if split else [])]
    return f"python tools/convert_data.py {shlex.join([*words, *(['--columns', *columns] if columns else [])])}"


# ---- Reading ---------------------------------------------------------------------------------------------------------
def text_records(path, separator, quoted=False):
    """Yield (line, fields) of a text file, plain or gzip; line is where a record ends, as quoted fields hold line ends.
    Not quoted: each line is split at `separator`, at any white space if that is None, as in MS MARCO's files."""
    try:
        with open(path, "rb") as raw:
            file = gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            text = io.TextIOWrapper(file, "utf-8-sig", newline="" if quoted else "\n")
            if quoted:
                reader = csv.reader(text, delimiter=separator, strict=True)
                try:
                    yield from ((reader.line_num, fields) for fields in reader if fields)
                except csv.Error as error:
                    raise UserError(f"{path}: line {reader.line_num}: {error}") from error
            else:
                yield from ((number, line.rstrip("\r\n").split(separator)) for number, line in enumerate(text, start=1)
                            if line.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}): save it as UTF-8, or, where it is Chinese of Excel, "
                        f"iconv -f GB18030 -t UTF-8 {shlex.quote(path)} > utf8_{Path(path).name}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def shape_of(path):
    """What `path` holds, "folder", "parquet", "json", "table", "triples" or a value of IDS, and how text is separated."""
    if os.path.isdir(path):
        return "folder", None
    with open(path, "rb") as raw:
        start = (gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw).read(1 << 16)
    if start.startswith(b"PAR1") or start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return "parquet" if start.startswith(b"PAR1") else "json", None
    line = start.decode("utf-8", "ignore").strip().partition("\n")[0]
    separator = next((each for each in "\t,;" if each in line), None)
    head = [fields for _, fields in islice(text_records(path, separator), 20)] if separator in ("\t", None) else []
    kinds = "".join("i" if all(re.fullmatch(r"[\w.:-]*\d[\w.:-]*", each, re.ASCII) for each in column) else "t"
                    for column in zip(*head, strict=False))
    names = [each.strip().lower() for each in head[0]] if head else []
    has_header = all(any(re.fullmatch(pattern, name) for name in names)
                     for pattern in (ROLES["query"], f"{ROLES['content']}|{ROLES['positive']}"))
    if has_header or kinds == "iiii" and not {fields[1] for fields in head} <= {"0", "Q0"}:
        return "table", separator
    if kinds == "iii" and [fields[2] for fields in head[:2]] == ["1", "2"]:
        raise UserError(f"{path}: its third column counts, as the ranks of a run do: ids of passages were expected. "
                        "Candidates are read with their texts: qid, pid, query, passage (top1000)")
    if kinds == "ttt" and max(map(len, head[0])) > 30:  # shorter ones may be a header with names of its own
        return "triples", separator
    return IDS.get(kinds, "table"), separator


def open_table(path, shape, separator, columns, args):
    """The names of a table's columns, (place, values) of each row, and {column: names of its classes}."""
    if shape in ("table", "triples"):
        is_numbered = shape == "triples" or bool(columns) and all(name.isdecimal() for _, name in columns)
        records = text_records(path, separator or ",", quoted=not (is_numbered and separator == "\t"))
        first = next(records, None)
        if first is None:
            raise UserError(f"{path}: no rows")
        names = [str(number) for number in range(1, len(first[1]) + 1)] if is_numbered else first[1]
        rows = chain([first] if is_numbered else [], records)
        return names, ((f"line {number}", values) for number, values in rows), {}
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: parquet, JSON and folders are read by a package: pip install datasets") from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it says of a bad file stands in the exception too
    try:
        if shape == "folder":
            table = datasets.load_from_disk(path)
        else:
            table = datasets.load_dataset(shape, data_files=glob.escape(path), split="train", streaming=True)
        if isinstance(table, dict):
            split = args.split or (next(iter(table)) if len(table) == 1 else None)
            if split not in table:
                commands = "".join(f"\n  {command(args, args.columns, each)}" for each in table)
                raise UserError(f"{path}: which split: {', '.join(table)}?{commands}")
            table = table[split]
        names = list(table.features or next(iter(table), {}))
    except (FileNotFoundError, *((ValueError,) if shape != "folder" else ())) as error:
        files = shlex.join(sorted(str(each) for each in Path(path).rglob("*") if each.suffix in (".parquet", ".csv")))
        hint = f": name its files instead: {files or 'there are none'}" if shape == "folder" else f": {error}"
        raise UserError(f"{path}: cannot be read{hint}") from error

    def rows():
        try:
            for number, row in enumerate(table, start=1):
                yield f"row {number}", [row.pop(name, None) for name in names] + [*row]  # keys that the first has not
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
    return names, rows(), {name: getattr(kind, "names", None) for name, kind in (table.features or {}).items()}


# ---- Columns ---------------------------------------------------------------------------------------------------------
def roles_of(path, names, first, classes, args):
    """[(role, column)] of a table, documents in their order; UserError where a role has no column, or two could be it.
    `first` holds the values of the first row, `classes` {column: names of its classes}."""
    found = {role: [name for name in names if re.fullmatch(pattern, name.strip().lower())]
             for role, pattern in ROLES.items()}
    documents = [(role, name) for role in ("positive", "content") for name in found[role]]
    negatives, labels = [("negative", name) for name in found["negative"]], [[("label", each)] for each in found["label"]]
    if {*found["label"]} == {"pos_scores", "neg_scores"} and negatives:
        labels = [[("label", "pos_scores"), ("label", "neg_scores")]]
    choices = [[("query", query), document, *negatives, *label]
               for query, document, label in product(found["query"], documents, labels or [[]])]
    listed, missing = printable(", ".join(map(str, names)))[:300], [
        what for what, columns in (("query", found["query"]), ("document", documents)) if not columns]
    if len({*names}) < len(names):
        raise UserError(f"{path}: two columns have one name: {listed}")
    if missing:
        known = [f"query={name}" for name in found["query"]] or ["query=NAME"]
        raise UserError(
            f"{path}: no column is known to be the {' or the '.join(missing)}. Its columns: {listed}\nName them (in a "
            f"file without a header count them: query=1 …):\n  {command(args, [*known, 'content=NAME', 'label=NAME'])}\n"
            f"or, if all documents are relevant:\n  {command(args, [*known, 'positive=NAME'])}")
    roles, texts = choices[0], len(choices[0]) - 1 - sum(role == "label" for role, _ in choices[0])
    problem, commands = None, choices
    if len(choices) > 1:
        problem = f"more than one way to read its columns ({listed})"
    elif not labels and texts == 1 and roles[1][0] == "content":
        problem, commands = f"no column is known to be the label ({listed}); if all documents are relevant", [
            [roles[0], ("positive", roles[1][1])], [*roles, ("label", "NAME")]]
    elif len(labels) == 1 and texts > 1 and not isinstance(first.get(roles[-1][1]), list):
        problem = f"{roles[-1][1]} is one number (a margin?) for {texts} documents. Without it, labels are 1 and 0"
        commands = [roles[:-1]]
    elif classes.get(roles[-1][1]) and not all(name.isdecimal() for name in classes[roles[-1][1]]):
        numbered = ", ".join(f"{number} = {name}" for number, name in enumerate(classes[roles[-1][1]]))
        problem = f"{roles[-1][1]} numbers classes ({numbered}); if a higher number is more relevant"
    if problem:
        lines = [command(args, [f"{role}={name}" for role, name in each]) for each in commands]
        raise UserError("\n  ".join([f"{path}: {problem}:", *lines]))
    return roles


def pairs_of(values, names, roles):
    """The (query, content, label) rows of a table's row; ValueError where they do not fit."""
    if len(values) != len(names):
        raise ValueError(f"{len(values)} fields instead of {len(names)}")
    row = dict(zip(names, values, strict=True))
    cells = [(role, each) for role, name in roles
             for each in (row[name] if isinstance(row[name], list) else [row[name]])]
    documents = [(role, text) for role, text in cells if role in ("content", "positive", "negative")]
    labels = [label for role, label in cells if role == "label"] if any(role == "label" for role, _ in roles) else (
        [int(role == "positive") for role, _ in documents])
    if len(labels) != len(documents) or not documents:
        raise ValueError(f"{len(labels)} labels for {len(documents)} documents")
    return [(row[roles[0][1]], text, label) for (_, text), label in zip(documents, labels, strict=True)]


def table_rows(path, shape, separator, columns, args):
    """Yield (place, function that returns rows) of a table, after saying how it is read."""
    names, rows, classes = open_table(path, shape, separator, columns, args)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: no rows")
    if unknown := [name for _, name in columns if name not in names]:
        raise UserError(f"{path}: no column {unknown[0]!r}; it has {printable(', '.join(names))[:300]}")
    roles = columns or (list(zip(("query", "positive", "negative"), names, strict=True)) if shape == "triples" else
                        roles_of(path, names, dict(zip(names, first[1], strict=False)), classes, args))
    unused = [name for name in names if name not in dict(map(reversed, roles))]
    say(f"{path}: {shape}, " + ", ".join(f"{role} from column {name}" for role, name in roles)
        + ("" if any(role == "label" for role, _ in roles) else ", labels 1 (positive) and 0 (negative)")
        + f"; not used: {', '.join(unused) or 'none'}")
    yield from ((place, partial(pairs_of, values, names, roles)) for place, values in chain([first], rows))


# ---- MS MARCO's ids --------------------------------------------------------------------------------------------------
def id_rows(files, columns, args):
    """Yield (path, place, function that returns rows) of files {path: (shape, separator)} with ids of texts."""
    def records(*shapes):
        for path, (shape, separator) in files.items():
            for number, fields in text_records(path, separator) if shape in shapes else ():
                if len(fields) != FIELDS[shape]:
                    raise UserError(f"{path}: line {number}: {len(fields)} fields instead of {FIELDS[shape]} ({shape})")
                yield path, f"line {number}", fields

    for path, (shape, _) in files.items():
        say(f"{path}: {shape}")
    shapes, texts = Counter(shape for shape, _ in files.values()), [
        path for path, (shape, _) in files.items() if shape == "texts"]
    if len(texts) != 2 or not shapes["qrels"] + shapes["triples of ids"]:
        raise UserError(f"ids and texts have to be given together: one file of queries and one of passages (two columns, "
                        f"id and text), and qrels or triples of ids; here are {dict(shapes)}")
    relevance, passages = defaultdict(dict), set()  # {query: {passage: label}}
    for *_, (query, _, passage, label) in records("qrels"):
        relevance[query][passage] = label
        passages.add(passage)
    queries = {*relevance}
    for *_, (query, *pair) in records("triples of ids"):
        queries.add(query)
        passages.update(pair)
    found = {path: {} for path in texts}
    for path, _, (name, text) in tqdm(records("texts"), desc="Reading texts", unit=" texts"):
        if name in passages or name in queries:
            found[path][name] = text
    lacks = {pair: (len(queries - found[pair[0]].keys()), len(passages - found[pair[1]].keys()))
             for pair in (texts, texts[::-1]) for pair in [tuple(pair)]}
    fitting = [tuple(name for role in ("query", "content") for each, name in columns if each == role)] if columns else [
        pair for pair, counts in lacks.items() if not any(counts)]
    if len(fitting) != 1:
        lines = [command(args, [f"query={pair[0]}", f"content={pair[1]}"])
                 + f"  # {counts[0]} queries and {counts[1]} passages are missing" for pair, counts in lacks.items()]
        raise UserError("\n  ".join(["which file has the queries, and which the passages:", *lines]))
    query_texts, passage_texts = (found[path] for path in fitting[0])
    say(f"{fitting[0][0]} has the queries, {fitting[0][1]} the passages.")

    def row(query, passage, label):
        return query_texts[query], passage_texts[passage], label

    yield from ((path, place, partial(lambda *ids: [row(*ids)], query, passage, label))
                for path, place, (query, _, passage, label) in records("qrels"))
    yield from ((path, place, partial(lambda *ids: [row(ids[0], ids[1], 1), row(ids[0], ids[2], 0)], *fields))
                for path, place, fields in records("triples of ids"))
    yield from ((path, place, partial(lambda query, passage, *texts: [(*texts, 0)] * (passage not in relevance[query]),
                                      *fields)) for path, place, fields in records("candidates"))


# ---- Writing ---------------------------------------------------------------------------------------------------------
def line_of(query, content, label):
    """A row as a line of JSONL and its label as a number; ValueError where train_bert_rerank.py would refuse it."""
    try:
        number = float(label) if label not in (None, "") else None
    except (TypeError, ValueError):
        raise ValueError(f"label {str(label)[:40]!r} is no number") from None
    if number is not None and not math.isfinite(number):
        raise ValueError(f"label is {number}")
    number = int(number) if number is not None and number.is_integer() else number
    line = json.dumps({"query": query, "content": content, "label": number}, ensure_ascii=False, default=str).encode()
    parse_line(line, -math.inf, math.inf)
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE >> 20} MB")
    return line, number


def convert(args):
    """Write args.output from args.inputs and say what it holds."""
    columns = [tuple(each.partition("=")[::2]) for each in args.columns]
    if wrong := [each for each in args.columns if each.partition("=")[0] not in ROLES or not each.partition("=")[2]]:
        raise UserError(f"--columns {wrong[0]}: write ROLE=NAME, with a ROLE of {', '.join(ROLES)}")
    columns.sort(key=lambda each: list(ROLES).index(each[0]))
    if columns and ([role for role, _ in columns].count("query") != 1 or columns[1:2] == [] or columns[1][0] == "label"):
        raise UserError("--columns needs one query, and a content (with a label), positive or negative")
    if missing := [path for path in args.inputs if not os.path.exists(path)]:
        raise UserError(f"{missing[0]}: no such file or folder")
    if os.path.abspath(args.output) in map(os.path.abspath, args.inputs):
        raise UserError(f"{args.output} is an input: give the output another name")
    is_of_files = {name for _, name in columns} <= {*args.inputs}  # no columns, or which files have queries and passages
    shapes = {path: shape_of(path) for path in args.inputs}
    files = {path: each for path, each in shapes.items() if each[0] in FIELDS and is_of_files}
    sources = [((path, *each) for each in table_rows(path, "table" if columns and shape in FIELDS else shape, separator,
                                                     columns, args))
               for path, (shape, separator) in shapes.items() if path not in files]
    sources += [id_rows(files, columns, args)] if files else []
    bad, bad_count, labels, seen, repeated = "", 0, Counter(), set(), 0
    with whole_file(Path(args.output)) as raw:
        file = gzip.GzipFile("", "wb", 6, raw, mtime=0) if args.output.endswith(".gz") else raw
        for path, place, pairs in tqdm(chain.from_iterable(sources), desc="Converting", unit=" rows"):
            try:
                for row in pairs():
                    line, label = line_of(*row)
                    key = hash((*fingerprints(*row[:2]), label))
                    if key in seen:
                        repeated += 1
                        continue
                    seen.add(key)
                    labels[label] += 1
                    file.write(line + b"\n")
            except ValueError as error:
                bad_count += 1
                bad += f"\n  {path}: {place}: {error}" if bad_count <= 10 else ""
        if bad:
            raise UserError(f"{bad_count} bad rows{bad}" + f"\n  … and {bad_count - 10} more" * (bad_count > 10))
        if not labels:
            raise UserError("no rows")
        if file is not raw:
            file.close()
    low, high, total = min(labels), max(labels), labels.total()
    say(f"{args.output}: {total} rows, skipped: none" + f", {repeated} repetitions written once" * bool(repeated))
    rounded = Counter()
    for label, number in labels.items():
        rounded[round(label, 2) + 0.0] += number
    for label, number in sorted(rounded.most_common(20)):
        say(f"Label {label:.2f}: {number} ({number / total:.2%})")
    scale = "" if 0 <= low and high <= 1 else f" --min_label={low} --max_label={high}"
    if scale:
        say(f"Labels go from {low} to {high}: give min_label and max_label, the ends of your scale if they lie outside.")
    if low == high == 1:
        say("All rows are relevant: a reranker needs irrelevant ones too. Find some in your corpus:\n  python tools/"
            f"mine_hard_negatives.py {shlex.quote(args.output)} --corpus corpus.jsonl --output mined.jsonl")
    else:
        say(f"Next: python train_bert_rerank.py --train_dataset {shlex.quote(args.output)}{scale}")


def main():
    """Parse the command line; a user's mistake is one message and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--output", required=True, help="JSONL file to write, compressed if its name ends in .gz")
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=NAME", help="roles: " + ", ".join(ROLES))
    parser.add_argument("--split", help="of a folder with several: train, test …")
    args = parser.parse_args()
    csv.field_size_limit(LONGEST_LINE)
    try:
        convert(args)
    except (UserError, OSError) as error:
        print(f"Error: {printable(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
