"""What comes out of bad files, settings and model folders: one clear message, or the right result.

    python benchmarks/bad_input.py [CASE ...]
    python benchmarks/bad_input.py > benchmarks/bad_input.md

Each case is a run of the script's own main() on tiny_reranker, in an empty folder and in a process
of its own, which is forked after the imports, so that a case costs its run alone. Whatever the case
expects, its output has no traceback, no control character out of a file, and one "Error: " line
where the exit status is not 0; the run asks for no network and ends within a time and a memory
limit, and leaves nothing beside a finished run's results: after a refusal the folder holds what it
held before. Prints a table in Markdown and a count; the exit status is 1 where a case is not as
expected.
"""

import errno
import gc
import gzip
import json
import math
import mmap
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny_reranker"


# ---- A case --------------------------------------------------------------------------------------
# Torch is imported in functions alone: load_script() first says how many threads it may use.
SMALL_RUN = {
    "model_name_or_path": str(TINY),
    "train_dataset": "train.jsonl",
    "eval_dataset": None,
    "epochs": 1,
    "max_len": 48,
    "gradient_accumulation_steps": 1,
    "mixed_precision": "no",
    "log_with": None,
    "output_dir": "output",
}
EVALUATION = {
    "epochs": 0,
    "eval_dataset": "train.jsonl",
    "train_dataset": "nowhere.jsonl",
    "max_len": 512,
}


@dataclass(frozen=True)
class Case:
    """A run and what has to come out of it."""

    name: str
    make: Callable  # make(folder) puts the input there
    said: tuple  # pieces of the output; of a refusal, of what stands from "Error: " on
    status: int = 1
    settings: dict = field(default_factory=dict)  # on top of SMALL_RUN
    words: tuple = ()  # of the command line, before the settings, as they are
    check: Callable | None = None  # check(folder) -> what is wrong with a result, or None
    meddle: Callable | None = None  # meddle(script, folder), in the run's process, before main()
    environment: dict = field(default_factory=dict)  # variables on top of those that are there
    memory: int = 1000  # MB that the run may need on top of the imports
    left: tuple = ()  # what a refusal may leave in output_dir, each complete in itself


def refused(name, make, *said, status=1, left=(), **settings):
    """The run ends with a message that has these pieces."""
    return Case(name, make, said, status, settings, left=left)


def trains(name, make, *said, **settings):
    """The run trains and leaves a model."""
    return Case(name, make, said, 0, settings, check=wrong_training)


def evaluates(name, make, *said, rows=None, **settings):
    """The run reads these rows, else those of GOOD, and scores them as transformers does."""
    check = wrong_scores(rows or GOOD_ROWS, TINY)
    return Case(name, make, said, 0, {**EVALUATION, **settings}, check=check)


# ---- Right results -------------------------------------------------------------------------------
TRAINED = {"final_model", "loss_curve.png", "logs", "run.json", "rows_to_check.jsonl", "cache"}
MEASURED = TRAINED | {"eval_report.json", "predictions.jsonl", "score_distribution.png"}
EVALUATED = {"evaluation", "cache"}
WEIGHTS = Path("output", "final_model", "model.safetensors")


def wrong_training(folder, results=TRAINED):
    """What is wrong with a trained run: its results are there, all finite, and nothing else."""
    from safetensors.torch import load_file

    names = set(os.listdir(folder / "output"))
    if names != results:
        return f"output_dir holds {sorted(names)}"

    weights = load_file(folder / WEIGHTS)
    for weight in weights.values():
        if not weight.isfinite().all():
            return "weights are not finite"


wrong_measured_training = partial(wrong_training, results=MEASURED)


def other_weights(folder):
    """What is wrong with a run that should leave the weights that SMALL_RUN leaves of GOOD."""
    if (folder / WEIGHTS).read_bytes() != usual_weights():
        return "weights are others than usual"
    return wrong_training(folder)


@cache
def usual_weights():
    """The bytes of the weights that SMALL_RUN leaves of GOOD."""
    import train_bert_rerank

    usual = []

    def keep(folder):
        usual.append((folder / WEIGHTS).read_bytes())

    run_case(train_bert_rerank, Case("as usual", good, (), 0, check=keep))
    return usual[0]


def wrong_scores(rows, reference, trust_remote_code=False):
    """A check that an evaluation read `rows`, (query, content, label, line), and scored them as
    transformers does with the `reference`: a model folder, maybe beside the data; None where the
    head is a new one."""

    def check(folder):
        path = folder / "output" / "evaluation" / "predictions.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() splits at U+2028 too
        predictions = [json.loads(text) for text in lines[:-1]]

        read = [(row["query"], row["content"], row["label"], row["line"]) for row in predictions]
        if read != rows:
            return f"rows read: {ascii(read)[:300]}"
        names = set(os.listdir(folder / "output"))
        if names != EVALUATED:
            return f"output_dir holds {sorted(names)}"

        if reference is None:
            return None
        furthest = 0.0
        scores = scores_of(folder / reference, rows, trust_remote_code)
        for row, score in zip(predictions, scores, strict=True):
            furthest = max(furthest, abs(row["score_before"] - score))
        if furthest > 1e-6:
            return f"scores are {furthest} off"

    return check


def scores_of(model, rows, trust_remote_code):
    """The scores of the rows from transformers itself."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    pairs = [row[:2] for row in rows]
    tokens = AutoTokenizer.from_pretrained(model)(pairs, padding=True, return_tensors="pt")
    scorer = AutoModelForSequenceClassification.from_pretrained(
        model, trust_remote_code=trust_remote_code
    ).eval()
    with torch.inference_mode():
        logits = scorer(**tokens).logits  # [rows, 1]
    return logits[:, 0].sigmoid().tolist()


# ---- Input: lines --------------------------------------------------------------------------------
def line(**changes):
    """A line of JSONL, with some keys changed; with ... as value: without the key."""
    sample = {"query": "怎么退款", "content": "请在七天之内联系客服。", "label": 1}
    return json.dumps(changed_keys(sample, changes), ensure_ascii=False).encode()


def changed_keys(content, changes):
    """A dict with some keys changed; with ... as value: without the key."""
    merged = {**content, **changes}
    return {key: value for key, value in merged.items() if value is not ...}


def typed(query=b'"q"', label=b"1"):
    """A line as someone typed it: what stands for the query and the label may be no JSON at all."""
    return b'{"query": %b, "content": "c", "label": %b}' % (query, label)


GOOD = [
    line(),
    line(content="本店周末休息。", label=0),
    line(query="how", content="?"),
    line(query="how", label=0),
]
GOOD_FILE = b"\n".join(GOOD)
GOOD_TEXT = GOOD_FILE.decode()


def rows_of(lines):
    """The rows (query, content, label, line) of lines with a row each."""
    return [(*json.loads(text).values(), number) for number, text in enumerate(lines, start=1)]


GOOD_ROWS = rows_of(GOOD)


# ---- Input: steps. Each makes a function of a folder, which changes what is in there -------------
def put(name, data):
    """A file of these bytes."""
    return lambda folder: (folder / name).write_bytes(data)


def train_file(data):
    return put("train.jsonl", data)


def train_lines(*lines):
    return train_file(b"\n".join(lines))


good = train_lines(*GOOD)


def nothing(folder):
    """An empty folder."""


def in_turn(*steps):
    """These steps one after the other."""

    def take_them(folder):
        for step in steps:
            step(folder)

    return take_them


def beside(*steps):
    """Good rows, and what these steps add."""
    return in_turn(good, *steps)


def subfolder(name):
    return lambda folder: (folder / name).mkdir(parents=True)


def fifo(name):
    """A named pipe that nobody writes into."""
    return lambda folder: os.mkfifo(folder / name)


def unix_socket(name):
    return lambda folder: socket.socket(socket.AF_UNIX).bind(f"{folder}/{name}")


def link(name, target):
    return lambda folder: (folder / name).symlink_to(target)


def without(*names):
    """These files are gone."""
    return in_turn(*[partial(remove, name) for name in names])


def remove(name, folder):
    (folder / name).unlink()


def resized(name, size):
    """The file is cut to so many bytes, or filled up with NUL."""
    return lambda folder: os.truncate(folder / name, size)


def huge_line(start, megabytes, opener=open):
    """A file that begins with `start` and goes on without a line feed."""

    def write(folder):
        with opener(folder / "train.jsonl", "wb") as file:
            file.write(start)
            for _ in range(megabytes):
                file.write(b"a" * 10**6)
            file.write(b'"}')

    return write


# ---- Cases: files --------------------------------------------------------------------------------
def bad_line(name, bad, *said):
    """The third line, among good ones, is refused."""
    pieces = ("train.jsonl: 1 bad line\n  line 3: ", *said, "Each line should be")
    return refused(name, train_lines(*GOOD[:2], bad, *GOOD[2:]), *pieces)


def bad_file(name, data, *said):
    return refused(name, train_file(data), "train.jsonl", *said)


def fine_file(name, data):
    return evaluates(name, train_file(data))


def encodings():
    blank_between = b"\n\n" + b"\n \t\n".join(GOOD)
    odd_lines = [(*row[:3], 2 * row[3] + 1) for row in GOOD_ROWS]
    escaped = [json.dumps(json.loads(text)).encode() for text in GOOD]
    spaced = [b"  " + text[:-1] + b', "id": [{}]}\t' for text in GOOD]
    no_json = "not JSON in UTF-8"
    return [
        fine_file("UTF-8 with a byte-order mark", b"\xef\xbb\xbf" + GOOD_FILE),
        fine_file("CRLF line ends", b"\r\n".join(GOOD) + b"\r\n"),
        evaluates("no last line feed, blank lines", train_file(blank_between), rows=odd_lines),
        fine_file("\\u escapes throughout", b"\n".join(escaped)),
        fine_file("spaces around and keys beside", b"\n".join(spaced)),
        bad_file("UTF-16 with a byte-order mark", GOOD_TEXT.encode("utf-16"),
                 ": 4 bad lines\n  line 1: not JSON in UTF-8"),
        bad_file("UTF-16 big-endian, bare", GOOD_TEXT.encode("utf-16-be"), f"line 1: {no_json}"),
        bad_file("UTF-32", GOOD_TEXT.encode("utf-32"), f"line 1: {no_json}"),
        bad_file("GBK", GOOD_TEXT.encode("gbk"),
                 ": 3 bad lines\n  line 1: not JSON in UTF-8", "\n  line 2: ", "\n  line 4: "),
        bad_line("Big5", typed('"申請退款"'.encode("big5")), no_json),
        bad_line("Latin-1", typed('"é"'.encode("latin-1")), no_json),
        bad_line("overlong UTF-8", typed(b'"\xc0\xaf"'), "invalid start byte"),
        bad_line("a surrogate in UTF-8 bytes", typed(b'"\xed\xa0\xbd"'), no_json),
        bad_line("UTF-8 cut inside a character", line()[:13], no_json),
        bad_line("a byte-order mark on a later line", b"\xef\xbb\xbf" + line(), no_json),
        bad_line("old Mac line ends", b"\r".join(GOOD[:2]), "Extra data"),
    ]  # fmt: skip


def kinds_of_file():
    unreadable = "train.jsonl: cannot be read: "
    irregular = "cannot be read: no regular file"
    return [
        bad_file("an empty file", b"", ": no rows."),
        bad_file("blank lines only", b"\n \r\n\t\n", ": no rows."),
        bad_file("nothing but a byte-order mark", b"\xef\xbb\xbf", ": no rows."),
        refused("a missing file", nothing, f"{unreadable}No such file or directory"),
        refused("a folder in place of a file", subfolder("train.jsonl"), unreadable),
        refused("a FIFO that nobody writes", fifo("train.jsonl"), f"train.jsonl: {irregular}"),
        refused("a FIFO for eval data", beside(fifo("eval.jsonl")), f"eval.jsonl: {irregular}",
                eval_dataset="eval.jsonl"),
        refused("a FIFO for one of several files", beside(fifo("b.jsonl")), f"b.jsonl: {irregular}",
                train_dataset=["train.jsonl", "b.jsonl"]),
        refused("a socket in place of a file", unix_socket("train.jsonl"),
                f"train.jsonl: {irregular}"),
        refused("/dev/zero", good, f"/dev/zero: {irregular}", train_dataset="/dev/zero"),
        refused("/dev/null", good, f"/dev/null: {irregular}", train_dataset="/dev/null"),
        refused("a link that leads to itself", link("train.jsonl", "train.jsonl"), unreadable),
        refused("a link that leads nowhere", link("train.jsonl", "nowhere"),
                f"{unreadable}No such file"),
        evaluates("a link to a good file",
                  in_turn(put("data", GOOD_FILE), link("train.jsonl", "data"))),
    ]  # fmt: skip


def several_files():
    return [
        refused("an eval file that is missing", good,
                "eval.jsonl: cannot be read: No such file", eval_dataset="eval.jsonl"),
        refused("a bad line in the eval file alone", beside(put("eval.jsonl", b"[]")),
                "eval.jsonl: 1 bad line\n  line 1: not a JSON object", eval_dataset="eval.jsonl"),
        refused("a bad line in the second of two files", beside(put("b.jsonl", b"\n\n[]")),
                "b.jsonl: 1 bad line\n  line 3: not a JSON object",
                train_dataset=["train.jsonl", "b.jsonl"]),
    ]  # fmt: skip


def names_of_files():
    escapes = "\x1b[2J\x9b31m\r.jsonl"
    bidi = "\u202eevil\u2066\u2069"
    window_title = "\x1b]0;x\x07"
    return [
        refused("a name longer than names may be", good, "cannot be read: File name too long",
                train_dataset="x" * 300),
        refused("a name with NUL", good, "a\\x00b']: there is no such file", status=2,
                train_dataset=["a\0b"]),
        refused("a name with escape sequences", put(escapes, b"[]"),
                "\\x1b[2J\\x9b31m\\r.jsonl: 1 bad line", train_dataset=escapes),
        refused("a name that is read from right to left", put(bidi, b""),
                "\\u202eevil\\u2066\\u2069: no rows", train_dataset=bidi),
        refused("a name that is no UTF-8", put("\udcff", b"[]"), "\\udcff: 1 bad line",
                train_dataset="\udcff"),
        evaluates("a name with escape sequences, as the eval file",
                  beside(put(window_title, GOOD_FILE)),
                  "4 rows) of \\x1b]0;x\\x07.", eval_dataset=window_title),
    ]  # fmt: skip


def names_in_gbk():
    """Names whose bytes are no UTF-8, as an older archive has them."""
    name = os.fsdecode("数据".encode("gbk"))
    no_text = "\\udcca\\udcfd\\udcbe\\udcdd: its bytes are no text in utf-8"
    return [
        evaluates("a data file with a name in GBK", put(f"{name}.jsonl", GOOD_FILE),
                  "4 rows) of \\udcca\\udcfd\\udcbe\\udcdd.jsonl.",
                  eval_dataset=f"{name}.jsonl"),
        trains("a list of a name in GBK and another", beside(put(name, GOOD[0])),
               "Label 1.00: 1 (100.00%)", train_dataset=["train.jsonl", name]),
        bad_setting("an output_dir with a name in GBK", f"output_dir {no_text}", output_dir=name),
        refused("a model folder with a name in GBK", beside(subfolder(name)),
                f"model_name_or_path {no_text}", status=2, model_name_or_path=name),
    ]  # fmt: skip


def gzip_files():
    zipped = gzip.compress(GOOD_FILE * 50, mtime=0)
    half = len(zipped) // 2
    two_members = gzip.compress(GOOD_FILE[:30]) + gzip.compress(GOOD_FILE[30:])
    unreadable = ": cannot be read: "
    open_fast = partial(gzip.open, compresslevel=1)
    return [
        fine_file("gzip under a name without .gz", gzip.compress(GOOD_FILE)),
        fine_file("gzip in two members, cut within a line", two_members),
        bad_file("gzip cut in its header", zipped[:6], unreadable),
        bad_file("gzip cut in its data", zipped[:half], unreadable),
        bad_file("gzip cut in its checksum", zipped[:-5], unreadable),
        bad_file("gzip with a wrong checksum", zipped[:-8] + bytes(8),
                 f"{unreadable}CRC check failed"),
        bad_file("gzip with damaged data", zipped[:30] + b"\xff\xff\xff" + zipped[33:], unreadable),
        bad_file("gzip with rubbish behind it", zipped + b"rubbish",
                 f"{unreadable}Not a gzipped file"),
        bad_file("gzip of gzip", gzip.compress(zipped, mtime=0), ": ", "not JSON in UTF-8"),
        bad_file("gzip of nothing", gzip.compress(b""), ": no rows."),
        bad_file("gzip of a bad line", gzip.compress(GOOD_FILE + b"\n{}"),
                 ": 1 bad line\n  line 5: query is missing"),
        refused("gzip of 400 MB in one line", huge_line(b"", 400, open_fast),
                "train.jsonl: line 1 is longer than 16 MB"),
        bad_file("zip, named .jsonl", b"PK\x03\x04" + bytes(range(256)),
                 "line 1: not JSON in UTF-8"),
    ]  # fmt: skip


def sizes():
    start = b'{"query": "q", "label": 1, "content": "'
    ten_megabytes = start + "书".encode() * 3_400_000 + b'"}'
    said = ("Label 1.00: 3 (60.00%)", "max_len truncates 1 train pairs")
    return [
        refused("a line of 100 MB", huge_line(GOOD[0] + b"\n" + start, 100),
                "train.jsonl: line 2 is longer than 16 MB"),
        refused("100 MB of NUL", beside(resized("train.jsonl", 10**8)),
                "train.jsonl: line 4 is longer than 16 MB"),
        replace(trains("a line of 10 MB", train_lines(*GOOD, ten_megabytes), *said), memory=2500),
        bad_file("20,000 bad lines", b"{}\n" * 20_000,
                 ": 20000 bad lines\n  line 1: query is missing", "\n  … and 19990 more\n"),
    ]  # fmt: skip


def changed_after_loading(name, change, said):
    """The file changes once it has been read and checked, before its texts are read again for their
    tokens."""

    def meddle(script, folder):
        check_rows = script.check_rows

        def change_and_check(*arguments, **options):
            change(folder)
            return check_rows(*arguments, **options)

        script.check_rows = change_and_check

    return replace(refused(name, good, said), meddle=meddle)


def changing_files():
    """Files that are not what they were."""
    changed = "train.jsonl has changed since this run loaded it"
    another_text = train_lines(*GOOD[:3], line(query="who", label=0))
    becomes_fifo = in_turn(without("train.jsonl"), fifo("train.jsonl"))
    return [
        changed_after_loading("a file of which a text changes after loading", another_text,
                              changed),
        changed_after_loading("a file that shrinks after loading", train_file(GOOD[0]), changed),
        changed_after_loading("a file that is emptied after loading", train_file(b""), changed),
        changed_after_loading("a file that is gone after loading", without("train.jsonl"),
                              "train.jsonl: cannot be read: No such file"),
        changed_after_loading("a file that is rubbish after loading",
                              train_file(b"\x1f\x8brubbish"), "train.jsonl: cannot be read: "),
        changed_after_loading("a file whose rows are in another order after loading",
                              train_lines(*reversed(GOOD)), changed),
        changed_after_loading("a FIFO in place of the file after loading", becomes_fifo,
                              "train.jsonl: cannot be read: no regular file"),
    ]  # fmt: skip


# ---- Cases: lines --------------------------------------------------------------------------------
def shapes_of_line():
    deep = 100_000
    nested = b"[" * 900 + b"]" * 900
    no_json = "not JSON in UTF-8"
    twice = b'{"query": "q", "content": "c", "label": 1, "label": 0}'
    hits = b'{"query": "q", "hits": [[{"content": "c", "label": 1}]]}'
    return [
        bad_line("nested 100,000 deep", b"[" * deep + b"]" * deep,
                 f"{no_json} (maximum recursion depth"),
        bad_line("objects nested 100,000 deep", b'{"query":' * deep + b"1" + b"}" * deep, no_json),
        bad_line("a label nested 900 deep", typed(label=nested), "label is [[["),
        bad_line("a query nested 900 deep",
                 b'{"content": "c", "label": 1, "query": ' + nested + b"}",
                 "query is no text: [[["),
        trains("the same key twice: the last counts, as JSON readers have it",
               train_lines(*GOOD, twice), "Label 0.00: 3 (60.00%)"),
        bad_line("keys in capitals", b'{"Query": "q", "Content": "c", "Label": 1}',
                 "query is missing"),
        bad_line("single quotes", b"{'query': 'q', 'content': 'c', 'label': 1}", no_json),
        bad_line("a comma too many", b'{"query": "q", "content": "c", "label": 1,}', no_json),
        bad_line("a comment", line() + b" // relevant", "Extra data"),
        bad_line("a line of CSV", b"query,content,1", f"{no_json} (Expecting value: column 1"),
        bad_line("a bare NUL", b"\0", no_json),
        bad_line("NUL bytes in a text", typed(b'"a\0b"'), "Invalid control character"),
        bad_line("a bare escape character in a text", typed(b'"\x1b[2J"'),
                 "Invalid control character"),
        bad_line("a list of rows", b"[" + line() + b"]", "not a JSON object"),
        bad_line("content and pos at once", line(pos=["a"]), "two shapes at once"),
        bad_line("pos as a text", b'{"query": "q", "pos": "c"}', "pos and neg should be lists"),
        bad_line("hits of hits", hits, "hits a list of"),
    ]  # fmt: skip


def lists_of_texts():
    nothing_to_score = "give the query a text at least, or take the line out"
    should_be_lists = "pos and neg should be lists of texts"
    as_many = "pos_scores and neg_scores should have a number for each text of pos and neg"
    both = typed_lists(pos=["a", "b"], neg=["c"])
    no_neg = typed_lists(pos=["d"], neg=[])
    no_pos = typed_lists(pos=None, neg=["e", "f"], neg_scores=[0, 0.25], pos_scores=[])
    rows = [("q", "a", 1, 1), ("q", "b", 1, 1), ("q", "c", 0, 1), ("q", "d", 1, 2),
            ("q", "e", 0, 3), ("q", "f", 0.25, 3)]  # fmt: skip
    return [
        bad_line("pos and neg that are empty", typed_lists(pos=[], neg=[]),
                 f"pos and neg are empty: {nothing_to_score}"),
        bad_line("pos that is empty, without neg", typed_lists(pos=[]),
                 f"pos and neg are empty: {nothing_to_score}"),
        bad_line("hits that are empty", typed_lists(hits=[]), f"hits is empty: {nothing_to_score}"),
        bad_line("hits that are one hit", typed_lists(hits={"content": "c", "label": 1}),
                 should_be_lists),
        bad_line("pos that is null, and neg a text", typed_lists(pos=None, neg="c"),
                 should_be_lists),
        bad_line("fewer pos_scores than pos", typed_lists(pos=["a", "b"], pos_scores=[1]), as_many),
        bad_line("a null among pos", typed_lists(pos=["a", None]), "content is missing (pos[1])"),
        evaluates("pos without neg, neg without pos", train_lines(both, no_neg, no_pos), rows=rows),
    ]  # fmt: skip


def typed_lists(**keys):
    return json.dumps({"query": "q", **keys}).encode()


def nearly_right_keys():
    def instead_of(key, name):
        sample = {"query": "q", "content": "c", "label": 1, name: 1}
        return json.dumps(changed_keys(sample, {key: ...})).encode()

    def should_read(name, key):
        return f'{key} is missing: should "{name}" read "{key}"?'

    other_hits = typed_lists(hits=[{"text": "c", "score": 1}])
    unlike = json.dumps({"q": "a", "d": "b", "y": 1}).encode()
    return [
        bad_line("question for query", instead_of("query", "question"),
                 should_read("question", "query")),
        bad_line("querry for query", instead_of("query", "querry"), should_read("querry", "query")),
        bad_line("passage for content", instead_of("content", "passage"),
                 should_read("passage", "content")),
        bad_line("Label, and a space, for label", instead_of("label", "Label "),
                 should_read("Label ", "label")),
        bad_line("text for content, in a hit", other_hits, should_read("text", "content")),
        bad_line("positives for pos", b'{"query": "q", "positives": ["a"]}',
                 'content is missing: should "positives" read "pos"?'),
        bad_line("a key with escape sequences for query", instead_of("query", "query\x1b"),
                 'should "query\\x1b" read "query"?'),
        bad_file("a file of other keys in each line", b"\n".join([unlike] * 3),
                 ": 3 bad lines\n  line 1: query is missing\n",
                 "other keys, a data set's folder): python tools/convert_data.py train.jsonl"),
    ]  # fmt: skip


def two_ways(name, one, other, queries=1):
    """A query is written in two ways: its rows are read as they stand, and count as one query's,
    with a warning, or as two queries'."""
    rows = [(one, "七天", 1, 1), (other, "周末", 0, 2)]
    lines = [line(query=query, content=content, label=label) for query, content, label, _ in rows]
    found = f"Evaluating on {queries} queries (2 rows) of train.jsonl.\n"
    if queries == 1:
        warning = "\nWarning: 1 of 1 queries are written in several ways (2 in all), which differ "
        ending = " of train.jsonl, for one): each counts as one query.\n"
        said = ["\nndcg@10 ", warning, ending + found]
    else:
        before = "Label 1.00: 1 (50.00%)\n"  # so that no warning stands between
        said = ["none of the 2 eval queries can be ranked", before + found]
    return evaluates(name, train_lines(*lines), *said, rows=rows)


def spellings():
    def one_query(name, other, one="how long"):
        return two_ways(f"one query, {name}", one, other)

    def two_queries(name, other, one="how long"):
        return two_ways(f"two queries, {name}", one, other, queries=2)

    return [
        one_query("once with a space behind", "how long "),
        one_query("once with a no-break space", "how\u00a0long"),
        one_query("once with a carriage return behind", "how long\r"),
        one_query("once with a wide space", "how\u3000long"),
        one_query("once with a zero-width space in it", "how\u200b long"),
        one_query("once with a byte-order mark", "\ufeffhow long"),
        one_query("in NFC and in NFD", "cafe\u0301", one="caf\u00e9"),
        two_queries("by the case of a letter", "How long"),
        two_queries("by a wide letter", "\uff48ow long"),
        two_queries("by a space", "howlong"),
        two_queries("by the tags of a flag", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", one="🏴󠁧󠁢󠁥󠁮󠁧󠁿"),
    ]


def bad_texts():
    return [
        bad_line("a blank text of wide spaces", line(content="\u3000\u2003"), "content is blank"),
        bad_line("a text of escape sequences where a label goes", line(label="\x1b[31m\u202e\x07"),
                 'label is "\\u001b[31m\\u202e\\u0007": drop the quotes'),
        bad_line("escape sequences where a text goes", line(query=["\x1b[31m\u202e\x9b"]),
                 'query is no text: ["\\u001b[31m\\u202e\\u009b"]'),
        bad_line("half of a surrogate pair", typed(b'"\\ud83d"'), "surrogates not allowed"),
        bad_line("a surrogate pair in the wrong order", typed(b'"\\ude00\\ud83d"'),
                 "surrogates not allowed"),
        bad_line("half of a surrogate pair where a label goes", typed(label=b'"\\ud83d"'),
                 'label is "\\ud83d": drop the quotes'),
    ]  # fmt: skip


def bad_labels():
    return [
        bad_line("NaN", typed(label=b"NaN"), "label nan is outside [0, 1]"),
        bad_line("Infinity", typed(label=b"Infinity"), "label inf is outside [0, 1]"),
        bad_line("-Infinity", typed(label=b"-Infinity"), "label -inf is outside [0, 1]"),
        bad_line("1e400", typed(label=b"1e400"), "label inf is outside [0, 1]"),
        bad_line("an integer of 400 digits", typed(label=b"9" * 400), "is outside [0, 1]"),
        bad_line("an integer of 5,000 digits", typed(label=b"9" * 5000), "not JSON in UTF-8"),
        bad_line("a label of -0.1", line(label=-0.1),
                 "label -0.1 is outside [0, 1] (min_label, max_label)"),
        bad_line("a text label", line(label="1"), 'label is "1": drop the quotes'),
        bad_line("a label of true", line(label=True), "label is true: it should be a number"),
        bad_line("no label", line(label=...), "label is missing"),
    ]  # fmt: skip


def odd_labels():
    """Labels that are rare, and right."""
    around_zero = train_lines(line(label=-0.0), line(content="b", label=5e-324), GOOD[0])
    huge = [line(content=str(label), label=label) for label in (-1e300, 1e300, 0)]
    integer = train_lines(line(label=10**300), line(content="b", label=0))
    return [
        trains("a label of -0.0 and one of 5e-324", around_zero,
               "Label 0.00: 2 (66.67%)\nLabel 1.00: 1 (33.33%)"),
        trains("labels from -1e300 to 1e300", train_lines(*huge), "Label 0.00: 1 (33.33%)",
               min_label=-1e300, max_label=1e300),
        trains("labels up to 10**300", integer, "Label 0.00: 1 (50.00%)", max_label=10**300),
        trains("one label for all rows", train_lines(line(), line(content="b")),
               "Warning: 2 train rows, all there are, have one and the same label."),
        trains("one row", train_file(GOOD[0]), "Label 1.00: 1 (100.00%)"),
        refused("an evaluation without a relevant row", train_lines(*GOOD[1::2]),
                "there are no eval rows with labels to measure", status=2, left=("cache",),
                **EVALUATION),
    ]  # fmt: skip


def evaluations():
    """Data of which little can be measured."""
    one_row_each = [line(query=f"q{number}", label=number % 2) for number in range(6)]
    one_label_each = [line(query=text, content=other, label=label)
                      for label, text in enumerate("ab") for other in "cd"]  # fmt: skip
    rare = [line(query=f"q{number}", label=int(number < 5)) for number in range(30)]
    few = Case("too few relevant rows for a verdict", train_lines(*rare),
               ("Warning: 5 eval relevant rows are too few: a verdict takes 20.",
                "Verdict: too few relevant rows to tell. 30 queries, 5 relevant rows.",
                "a verdict takes 20 or more relevant rows (5 here)"),
               0, {"eval_dataset": "train.jsonl", "metric_for_best_model": "average_precision",
                   "base_interpolation": ()},
               check=wrong_measured_training)  # fmt: skip
    falls_back = "measured by average precision over all pairs, rather than by NDCG@10"
    nothing = "there are no eval rows with labels to measure hit@1 by"
    return [
        few,
        evaluates("queries of one row each", train_lines(*one_row_each),
                  "none of the 6 eval queries can be ranked, for each of them has one row: ",
                  falls_back, "\naverage_precision ",
                  rows=rows_of(one_row_each)),
        evaluates("queries of one label each", train_lines(*one_label_each),
                  "none of the 2 eval queries can be ranked, for all rows of a query have one and "
                  "the same label: ", falls_back,
                  rows=rows_of(one_label_each)),
        evaluates("hit@1 as the metric", good, "\nhit@1              0.",
                  metric_for_best_model="hit@1"),
        refused("hit@1 for queries of one row each", train_lines(*one_row_each), nothing, status=2,
                left=("cache",), **EVALUATION, metric_for_best_model="hit@1"),
    ]  # fmt: skip


def retrievers_scores():
    def scored(*scores):
        """GOOD with these scores; ...: without one."""
        rows = [json.loads(text) for text in GOOD]
        pairs = zip(rows, scores, strict=True)
        return train_lines(*(json.dumps(changed_keys(row, {"score": score})).encode()
                             for row, score in pairs))  # fmt: skip

    def bad_score(name, score, said):
        return refused(name, scored(3, score, 1, 2), f"line 2: score is {said}", **EVALUATION)

    def bad_relevant(name, relevant, said):
        lists = typed_lists(hits=[{"content": "c", "label": 1}], relevant=relevant)
        return refused(name, train_lines(lists), said, **EVALUATION)

    other_kind = beside(put("eval.jsonl", GOOD_FILE), scored("high", ..., 0.5, None))
    return [
        evaluates("scores of any size", scored(1e300, -1e300, 5e-324, 0),
                  "scores for 2 of 2 eval queries: its order has ndcg@10 1.0000",
                  "Against the retriever: too few queries to tell. 2 queries"),
        evaluates("scores for one of two queries", scored(1, 2, ..., ...), "for 1 of 2 eval queries",
                  "; retriever (1 queries) "),
        evaluates("scores that are all null", scored(None, None, None, None), "\nndcg@10 "),
        Case("a score of another kind in rows that are trained on alone", other_kind, (), 0,
             {"eval_dataset": "eval.jsonl"}, check=wrong_measured_training),
        bad_score("a score in quotes", "0.9", '"0.9": drop the quotes'),
        bad_score("a score that is NaN", math.nan, "nan: it should be a finite number"),
        bad_score("a score of 1 with 400 zeros", 10**400, "1000"),
        bad_score("a score that is true", True, "true: it should be a number"),
        refused("scores for some rows of a query", scored(3, ..., 1, 2),
                "line 2: score is missing, and other rows of its query have one", **EVALUATION),
        bad_relevant("2.5 relevant documents", 2.5, "relevant is 2.5: it should be a whole number"),
        bad_relevant("fewer relevant documents than are here", 0,
                     "relevant is less than the relevant documents that are here"),
        bad_model("a share of the retriever in quotes", config(retriever_weight="0.3"),
                  "retriever_weight in the model's config.json is '0.3': it should be a number",
                  **EVALUATION),
    ]  # fmt: skip


def long_documents():
    by_passages = {**EVALUATION, "long_documents": "best_passage"}
    long = line(content="请在七天之内联系客服。" * 20)
    million = train_lines(GOOD[1], line(content="请在七天之内联系客服。" * 91_000))
    no_room = "tokens to a passage beside the query"
    return [
        evaluates("best passages of documents that fit", good, **by_passages),
        Case("a document of a million characters, by its best passage", million,
             ("1 eval pairs (50.00%) do not fit max_len: the best of their passages counts", "Brier"),
             settings={**by_passages, "max_len": 128}, status=0),
        refused("a max_len that leaves a passage 12 tokens", train_lines(GOOD[1], long),
                f"line 2: max_len 20 leaves 12 {no_room}", left=("cache",),
                **{**by_passages, "max_len": 20}),
        refused("a query that leaves a passage no token",
                train_lines(GOOD[1], line(query="怎么退款" * 20)),
                f"line 2: max_len 64 leaves 0 {no_room} '怎么退款", left=("cache",),
                **{**by_passages, "max_len": 64}),
        bad_setting("a way to score long documents that is none",
                    'long_documents should be "cut" or "best_passage" or None, not ',
                    long_documents="best"),
        bad_setting("a format that leaves documents no room",
                    "query_format and document_format take 40 of max_len 48 tokens: shorten them",
                    document_format="前缀" * 20 + "{}"),
        bad_model("long documents scored in a way that is none", config(long_documents="Cut"),
                  "long_documents in the model's config.json is 'Cut': it should be cut or "
                  "best_passage", left=("cache",), **EVALUATION),
    ]  # fmt: skip


def fine_text(name, text, escaped=False):
    """A text is read, scored and written again exactly as it is, in query and content."""
    rows = [(text, "答", 1, 1), ("问", text, 0, 2), (text, text, 0, 3), ("问", "答", 1, 4)]
    lines = []
    for query, content, label, _ in rows:
        row = {"query": query, "content": content, "label": label}
        lines.append(json.dumps(row, ensure_ascii=escaped).encode())
    return evaluates(name, train_lines(*lines), rows=rows)


def fine_texts():
    separators = "one\u2028two\u2029three\x0bfour\x0cfive"
    rare = "\ufffe\uffff\ue000\U0010ffff\ufffd"
    return [
        fine_text("right-to-left text", "مرحبا بالعالم שלום 123"),
        fine_text("marks of direction", "\u202eabc\u202c \u2066שלום\u2069 \u200e\u200f"),
        fine_text("zero-width text", "a\u200bb\u200c\u200dc\ufeffd\u2060"),
        fine_text("emoji of several code points", "👩‍👩‍👧‍👦 🇨🇳 👍🏽 🏴󠁧󠁢󠁥󠁮󠁧󠁿"),
        fine_text("marks piled up", "Z" + "\u0300\u0301\u0489" * 40 + " é e\u0301"),
        fine_text("NUL as an escape", "a\0b\x01\x1f", escaped=True),
        fine_text("escape sequences", "\x1b[2J\x1b]0;title\x07\x9b31m\x85", escaped=True),
        fine_text("line and paragraph separators", separators),
        fine_text("noncharacters, private use, the last code point", rare),
        fine_text("texts like special tokens", "</s> <s> <pad> <mask> [SEP] <unk>"),
        fine_text("braces and percents", "{} {0} %s %(a)s \\{ ${x}"),
    ]


# ---- Cases: settings -----------------------------------------------------------------------------
SAVED = "Model saved successfully!"


A_LIST = """'["a.jsonl", "b.jsonl"]'"""


def bad_setting(name, said, **settings):
    return refused(name, good, said, status=2, **settings)


def settings_of_a_wrong_type():
    call = "__import__('os').mkdir('the_code_ran')"
    return [
        bad_setting("text for a number", "epochs should be int 0.., not 'three'", epochs="three"),
        bad_setting("a float for an integer", "epochs should be int 0.., not '1.5'", epochs=1.5),
        bad_setting("a list for a number", "lr should be float 0.., not '[1e-05]'", lr=[1e-5]),
        bad_setting("a number for true or false", "trust_remote_code should be bool, not '1'",
                    trust_remote_code=1),
        bad_setting("nested 10,000 deep", "max_len should be int 8.., not '[[[",
                    max_len="[" * 10_000),
        bad_setting("an integer of 10,000 digits", "seed should be int 0..4294967295, not '999",
                    seed="9" * 10_000),
        bad_setting("a call in place of a number",
                    'seed should be int 0..4294967295, not "__import__', seed=call),
    ]  # fmt: skip


def settings_out_of_range():
    return [
        bad_setting("epochs of -1", "epochs should be int 0.., not '-1'", epochs=-1),
        bad_setting("a learning rate below 0", "lr should be float 0.., not '-0.1'", lr=-0.1),
        bad_setting("a learning rate of NaN", "lr should be float 0.., not 'nan'", lr="nan"),
        bad_setting("a learning rate of 1e999", "lr should be float 0.., not ", lr="1e999"),
        bad_setting("warm-up above 1", "warmup_proportion should be float 0..1, not '1.5'",
                    warmup_proportion=1.5),
        bad_setting("an eval_proportion below 0",
                    "eval_proportion should be float 0..1, not '-0.1'", eval_proportion=-0.1),
        bad_setting("a batch of 0", "batch_size should be int 1.., not '0'", batch_size=0),
        bad_setting("accumulation over -1 steps",
                    "gradient_accumulation_steps should be int 1.., not '-1'",
                    gradient_accumulation_steps=-1),
        bad_setting("a weight decay below 0", "weight_decay should be float 0.., not '-1'",
                    weight_decay=-1),
        bad_setting("a seed of 2**32", "seed should be int 0..4294967295, not '4294967296'",
                    seed=2**32),
        bad_setting("a share of the base above 1", "base_interpolation should be tuple 0.01..0.99",
                    base_interpolation=(0.5, 1.5)),
        bad_setting("a metric that does not exist", "metric_for_best_model should be",
                    metric_for_best_model="ndcg"),
        bad_setting("a precision that does not exist", "mixed_precision should be",
                    mixed_precision="fp8"),
    ]  # fmt: skip


def lengths():
    takes_512 = "takes 512 (positions, model_max_length)"
    long_row = train_lines(line(content="书" * 600), *GOOD)
    return [
        bad_setting("max_len of 7", "max_len should be int 8.., not '7'", max_len=7),
        bad_setting("max_len of 513 where XLM-R's 514 positions take 512", "max_len 513: ",
                    max_len=513),
        bad_setting("max_len of 514, all of XLM-R's positions", takes_512, max_len=514),
        bad_setting("max_len of 10**30", takes_512, max_len=10**30),
        trains("max_len of 512 where XLM-R's 514 positions take 512", long_row,
               "max_len truncates 1 train pairs", max_len=512),
        trains("max_len of 8", good,
               "max_len truncates 3 train pairs (75.00%), in 2 the query too; ", max_len=8),
    ]  # fmt: skip


def settings_that_do_not_fit():
    formats = "query_format and document_format should each hold {} once"
    return [
        bad_setting("min_label above max_label", "min_label 2 is not below max_label 1",
                    min_label=2),
        bad_setting("a format without its place", formats, query_format="query:"),
        bad_setting("a format with two places", formats, document_format="{}{}"),
        bad_setting("an unknown key", "unknown setting epoch; the nearest is epochs", epoch=3),
    ]  # fmt: skip


def settings_for_data_files():
    no_file = f": there is no such file; a list is written --train_dataset {A_LIST}"
    return [
        bad_setting("no data file", f"train_dataset []{no_file}", train_dataset=[]),
        bad_setting("numbers for data files", f"train_dataset [1, 2]{no_file}",
                    train_dataset=[1, 2]),
        bad_setting("an empty name of a data file", "train_dataset is empty: it should be str",
                    train_dataset=""),
        bad_setting("a list without its quotes", f"train_dataset [train.jsonl, b.jsonl]{no_file}",
                    train_dataset="[train.jsonl, b.jsonl]"),
        bad_setting("two data files with a comma", f"train_dataset train.jsonl,b.jsonl{no_file}",
                    train_dataset="train.jsonl,b.jsonl"),
        bad_setting("an empty name in a list of data files", "train_dataset is empty",
                    train_dataset=["train.jsonl", ""]),
        evaluates("a data file whose name looks like a list", put("[a, b]", GOOD_FILE),
                  "4 rows) of [a, b].", eval_dataset="[a, b]"),
    ]  # fmt: skip


def names_of_nothing():
    """Texts that name no file or folder, or None."""
    home = {"HOME": "home"}
    at_home = in_turn(subfolder("home"), put("home/a.jsonl", GOOD_FILE))
    from_home = evaluates("a ~ behind a =", at_home, "4 rows) of home/a.jsonl.",
                          eval_dataset="~/a.jsonl")  # fmt: skip
    return [
        bad_setting("none for data files", "train_dataset cannot be None; of a file or folder of "
                    "that name: ./none", train_dataset="none"),
        bad_setting("NULL for an output_dir", "output_dir cannot be None", output_dir="NULL"),
        bad_setting("an output_dir of spaces", "output_dir is empty: it should be str",
                    output_dir=" \t"),
        bad_setting("an empty name of an eval file", "eval_dataset is empty: it should be str or "
                    "None", eval_dataset=""),
        bad_setting("an empty format", "query_format is empty", query_format=""),
        trains("NONE and null for what may be None", good,
               "No evaluation: nothing will be claimed about the ranking.", SAVED,
               eval_dataset="NONE", resume_from_checkpoint="null", revision="none"),
        replace(from_home, environment=home),
    ]  # fmt: skip


def command_lines():
    no_value = ("--lr: expected one argument",)
    unknown = ("unknown setting \\x1b[2J; the nearest is ",)
    stray = ("'b.jsonl' belongs to no setting: each is written --key value, and a list "
             f"--train_dataset {A_LIST}",)  # fmt: skip
    two_files = ("--train_dataset", "train.jsonl", "b.jsonl")
    return [
        Case("a second file behind a key", good, stray, 2, words=two_files),
        Case("a key with one dash", good, ("'-lr' belongs to no setting",), 2, words=("-lr", "1")),
        Case("a key without a value", good, no_value, 2, words=("--lr",)),
        Case("an unknown key with escape sequences", good, unknown, 2, words=("--\x1b[2J", "1")),
        bad_setting("escape sequences for a number",
                    "epochs should be int 0.., not '\\x1b[2J\\u202e'", epochs="\x1b[2J\u202e"),
    ]  # fmt: skip


def extreme_settings():
    no_finite_weights = "left no finite weights: lower lr"
    left = ("cache", "unfinished_run")
    return [
        trains("a batch of 10**30", good, SAVED, batch_size=10**30),
        trains("a batch of 10**9", good, SAVED, batch_size=10**9),
        trains("accumulation over 10**30 steps", good, SAVED, gradient_accumulation_steps=10**30),
        trains("micro-batches of 10**30 tokens", good, SAVED, micro_batch_tokens=10**30),
        trains("micro-batches of 1 token", good, "micro-batches of up to 1 tokens",
               micro_batch_tokens=1),
        trains("a learning rate of 0", good, SAVED, lr=0),
        refused("a learning rate of 1e38", good, f"{no_finite_weights} 1e+38", left=left, lr=1e38),
        refused("a learning rate of 1e38 in the only step before an evaluation", good,
                f"training {no_finite_weights} 1e+38", left=left,
                lr=1e38, batch_size=8, eval_dataset="train.jsonl"),
        refused("a weight decay of 1e308", good, no_finite_weights, left=left, weight_decay=1e308),
        trains("a norm of 1e308", good, SAVED, max_grad_norm=1e308),
        trains("a norm of 5e-324", good, SAVED, max_grad_norm=5e-324),
    ]  # fmt: skip


def output_dirs():
    no_folder = "is no folder that this run may write to"
    escapes = "\x1b[2J"
    quoted = repr("a\0b")

    def lacks_model(folder):
        if not (folder / quoted / "final_model").is_dir():
            return "no model"

    return [
        bad_setting("an output_dir that is a file", f"train.jsonl {no_folder}",
                    output_dir="train.jsonl"),
        bad_setting("an output_dir below a file", f"train.jsonl {no_folder}",
                    output_dir="train.jsonl/output"),
        Case("an output_dir with NUL, in quotes: taken as it was typed", good, (SAVED,), 0,
             {"output_dir": quoted}, check=lacks_model),
        refused("an output_dir with a name too long", good, "File name too long",
                output_dir="x" * 300),
        refused("an output_dir that holds someone's logs", beside(subfolder("output/logs")),
                "holds a model or logs that no run left there", status=2),
        refused("an output_dir with escape sequences", beside(put(escapes, b"")),
                f"\\x1b[2J {no_folder}", status=2, output_dir=escapes),
    ]  # fmt: skip


# ---- Cases: model folders ------------------------------------------------------------------------
CANNOT_LOAD = "cannot load model"
LACKS = "model or its config.json lacks"  # … so many weights


def model(*changes):
    """Good rows, and a copy of tiny_reranker in `model`, which these steps change."""

    def copy(folder):
        good(folder)
        shutil.copytree(TINY, folder / "model")
        for change in changes:
            change(folder / "model")

    return copy


def edit(name, **changes):
    """Keys in a JSON file change; ... takes the key away."""

    def rewrite(folder):
        path = folder / name
        content = changed_keys(json.loads(path.read_text()), changes)
        path.write_text(json.dumps(content))

    return rewrite


def config(**changes):
    return edit("config.json", **changes)


def reweigh(change):
    """change({name: tensor}) gives the weights that stand in the place of the old ones."""

    def save(folder):
        from safetensors.torch import save_file

        weights = change(take_weights(folder))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return save


def pickled(change):
    """The same, but as pytorch_model.bin."""

    def save(folder):
        import torch

        weights = change(take_weights(folder))
        torch.save(weights, folder / "pytorch_model.bin")

    return save


def take_weights(folder):
    """{name: tensor} out of model.safetensors, which is gone then: its bytes are still mapped."""
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    return weights


def bad_model(name, change, *said, status=1, left=(), **settings):
    settings = {"model_name_or_path": "model", **settings}
    return refused(name, model(change), *said, status=status, left=left, **settings)


def fine_model(name, change, *said, reference=TINY):
    """It scores as the reference does."""
    settings = {"model_name_or_path": "model", **EVALUATION}
    check = wrong_scores(GOOD_ROWS, reference)
    return Case(name, model(change), said, 0, settings, check=check)


def models_that_are_no_folder():
    def named(name, value, said):
        return refused(name, good, said, model_name_or_path=value)

    return [
        named("no folder and no hub in reach", "nowhere/at-all",
              "nowhere/at-all is no folder, not in the cache, and the hub is out of reach"),
        named("a path that is no name of a model", "./no/such/folder",
              "./no/such/folder is no local folder"),
        named("a file in place of a model folder", "train.jsonl", "train.jsonl"),
        bad_setting("an empty name of a model", "model_name_or_path is empty: it should be str",
                    model_name_or_path=""),
        named("a model name with escape sequences", "\x1b[2J", "\\x1b[2J"),
        named("a model name with NUL", repr("a\0b"), "a\\x00b"),
        refused("an empty model folder", beside(subfolder("model")), CANNOT_LOAD,
                model_name_or_path="model"),
    ]  # fmt: skip


def configs():
    quantized = config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    nested = b"[" * 100_000
    return [
        bad_model("no config.json", without("config.json"), CANNOT_LOAD),
        bad_model("config.json cut short", put("config.json", b'{"model_type": "xlm-roberta",'),
                  CANNOT_LOAD, "not a valid JSON file"),
        bad_model("config.json that is a list", put("config.json", b"[]"), CANNOT_LOAD),
        bad_model("config.json that is no UTF-8", put("config.json", b"\xff\xfe{}"), CANNOT_LOAD),
        bad_model("config.json nested 100,000 deep", put("config.json", nested), CANNOT_LOAD),
        bad_model("an empty config.json", put("config.json", b""), CANNOT_LOAD),
        bad_model("config.json without a model_type", config(model_type=..., architectures=...),
                  CANNOT_LOAD),
        bad_model("an unknown model_type", config(model_type="\x1b[31mevil\u202e"), CANNOT_LOAD,
                  "\\x1b[31mevil\\u202e"),
        bad_model("a hidden_size that the heads do not divide", config(hidden_size=130),
                  CANNOT_LOAD),
        bad_model("a hidden_size of text", config(hidden_size="wide"), CANNOT_LOAD),
        bad_model("a hidden_size below 0", config(hidden_size=-128), CANNOT_LOAD),
        bad_model("no layers", config(num_hidden_layers=0), f"{LACKS} 48 weights of its encoder"),
        bad_model("fewer layers than weights", config(num_hidden_layers=2),
                  f"{LACKS} 16 weights of its encoder: roberta.encoder.layer.2."),
        bad_model("more layers than weights", config(num_hidden_layers=4),
                  f"{LACKS} 16 weights of its encoder"),
        bad_model("another hidden_size than the weights", config(hidden_size=64), LACKS),
        bad_model("a vocabulary of 10**15", config(vocab_size=10**15), CANNOT_LOAD, "memory"),
        bad_model("an activation that does not exist", config(hidden_act="\x1b[2J"), CANNOT_LOAD),
        bad_model("a quantization that is not installed", quantized, CANNOT_LOAD),
    ]  # fmt: skip


def few_embeddings(weights):
    name = "roberta.embeddings.word_embeddings.weight"
    return {**weights, name: weights[name][:5000].clone()}


def tokenizers():
    other = "model has another model's tokenizer: "
    small_vocabulary = in_turn(config(vocab_size=5000), reweigh(few_embeddings))
    return [
        bad_model("no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "model",
                  "tokenizer"),
        bad_model("tokenizer.json alone missing", without("tokenizer.json"), CANNOT_LOAD),
        bad_model("tokenizer.json cut short", resized("tokenizer.json", 5000), CANNOT_LOAD),
        bad_model("tokenizer.json that is a list", put("tokenizer.json", b"[]"), CANNOT_LOAD),
        bad_model("tokenizer_config.json cut short", put("tokenizer_config.json", b"{"),
                  CANNOT_LOAD),
        bad_model("a tokenizer without padding", edit("tokenizer_config.json", pad_token=...),
                  "model has no padding token", "name one of its vocabulary as pad_token"),
        bad_model("a tokenizer of a larger vocabulary than the model's", small_vocabulary, other),
    ]  # fmt: skip


def files_of_weights():
    huge_header = put("model.safetensors", b"\xff" * 7 + b"\x7f" + b"{}")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    outside = b'{"metadata": {}, "weight_map": {"a": "../../../etc/passwd"}}'
    index_outside = in_turn(without("model.safetensors"),
                            put("model.safetensors.index.json", outside))  # fmt: skip
    return [
        bad_model("no weights", without("model.safetensors"), CANNOT_LOAD,
                  "no file named model.safetensors"),
        bad_model("weights cut short", resized("model.safetensors", 100_000), CANNOT_LOAD),
        bad_model("an empty file of weights", put("model.safetensors", b""), CANNOT_LOAD),
        bad_model("weights with a header of 2**63 bytes", huge_header, CANNOT_LOAD),
        bad_model("a pointer file of Git LFS for weights", put("model.safetensors", pointer),
                  CANNOT_LOAD),
        bad_model("an index of weights that leads out of the folder", index_outside, CANNOT_LOAD),
    ]  # fmt: skip


def without_a_layer(weights):
    return {name: weight for name, weight in weights.items() if ".layer.1." not in name}


def all_nan(weights):
    return {name: weight * float("nan") for name, weight in weights.items()}


def halved(weights):
    return {name: weight.half() for name, weight in weights.items()}


def one_of_a_strange_name(weights):
    first = next(iter(weights.values()))
    return {**weights, "\x1b[2J\u202e": first.clone()}


def values_of_weights():
    nan = reweigh(all_nan)
    return [
        bad_model("weights without a layer", reweigh(without_a_layer),
                  f"{LACKS} 16 weights of its encoder"),
        bad_model("weights of another vocabulary", reweigh(few_embeddings),
                  f"{LACKS} 1 weights of its encoder"),
        bad_model("weights that are NaN", nan, "model gives no finite scores", left=("cache",),
                  **EVALUATION),
        bad_model("weights that are NaN, without evaluation", nan,
                  "training left no finite weights", left=("cache", "unfinished_run")),
        fine_model("weights in fp16", reweigh(halved), reference="model"),
        fine_model("names of weights with escape sequences", reweigh(one_of_a_strange_name)),
    ]  # fmt: skip


class MarksThatItRan:
    """What makes a folder, `the_code_ran`, where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("the_code_ran",)


def and_one_that_acts(weights):
    return {**weights, "extra": MarksThatItRan()}


def pickles():
    refusal = "Weights only load failed"
    name = "pytorch_model.bin"
    plain = in_turn(without("model.safetensors"), put(name, pickle.dumps(MarksThatItRan())))
    cut_short = in_turn(pickled(dict), resized(name, 100_000))
    return [
        fine_model("pytorch_model.bin with plain weights", pickled(dict)),
        bad_model("pytorch_model.bin that needs more than weights_only",
                  pickled(and_one_that_acts), CANNOT_LOAD, refusal),
        bad_model("pytorch_model.bin of a plain pickle", plain, CANNOT_LOAD, refusal),
        bad_model("pytorch_model.bin cut short", cut_short, CANNOT_LOAD),
    ]  # fmt: skip


def two_labels(weights):
    import torch

    head = "classifier.out_proj"
    return {**weights, f"{head}.weight": torch.ones(2, 128), f"{head}.bias": torch.zeros(2)}


def heads():
    new_head = ("Not in model, so drawn with seed 42: "
                "classifier.out_proj.bias, classifier.out_proj.weight")  # fmt: skip
    three_names = config(id2label={"0": "a", "1": "b", "2": "c"},
                         label2id={"a": 0, "b": 1, "c": 2})  # fmt: skip
    return [
        fine_model("two labels: a new head", reweigh(two_labels), new_head, reference=None),
        fine_model("id2label of three names", three_names),
    ]


# Small, with BERT's names of sizes; what an architecture calls otherwise is added where it is made.
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 1,
}


def becomes(kind, **settings):
    """The model becomes a random one of another architecture, with weights so large that what it
    reads changes its score."""

    def replace_model(folder):
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification

        vocabulary = {"vocab_size": 7124, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
                      "cls_token_id": 0, "sep_token_id": 2, "mask_token_id": 4}  # fmt: skip
        shape = AutoConfig.for_model(kind, **{**vocabulary, **SMALL, **settings})
        torch.manual_seed(0)
        scorer = AutoModelForSequenceClassification.from_config(shape)
        with torch.no_grad():
            for weight in scorer.parameters():
                if weight.ndim > 1:
                    weight *= 3
        scorer.save_pretrained(folder)

    return replace_model


def tokenizer_of_bert(folder):
    """Its tokenizer becomes a WordPiece one, which marks two segments."""
    from transformers import BertTokenizerFast

    (folder / "tokenizer.json").unlink()
    letters = sorted({*"怎么退款请在七天之内联系客服本店周末休息。？?"})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "h", "##o", "##w"]
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


def encoder_decoder(folder):
    """The model becomes a T5."""
    from transformers import T5Config, T5Model

    shape = T5Config(vocab_size=7124, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
    T5Model(shape).save_pretrained(folder)


def encoder_decoders():
    no_encoder = "model is no BERT-family encoder with a fast tokenizer"
    return [
        bad_model("an encoder-decoder", encoder_decoder, f"{no_encoder}, but t5"),
        bad_model("an encoder-decoder of an unknown layout", config(is_encoder_decoder=True),
                  no_encoder),
    ]  # fmt: skip


REMOTE_CODE = b"""import os
os.mkdir("the_code_ran")
from transformers import XLMRobertaConfig as Theirs
from transformers import XLMRobertaForSequenceClassification as TheirModel
"""


def models_that_lead_elsewhere():
    code = put("theirs.py", REMOTE_CODE)
    model_code = {
        "AutoConfig": "theirs.Theirs",
        "AutoModelForSequenceClassification": "theirs.TheirModel",
    }
    tokenizer_code = {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}
    elsewhere = {"AutoConfig": "someone/else--theirs.Theirs"}
    adapter = {
        "peft_type": "LORA",
        "base_model_name_or_path": "someone/else",
        "target_modules": ["query"],
    }
    adapter_alone = in_turn(without("model.safetensors"),
                            put("adapter_config.json", json.dumps(adapter).encode()))  # fmt: skip
    return [
        bad_model("a model type of its own code",
                  in_turn(config(model_type="theirs", auto_map=model_code), code),
                  CANNOT_LOAD, "trust_remote_code"),
        fine_model("a known model type with code of its own",
                   in_turn(config(auto_map=model_code), code)),
        fine_model("a tokenizer with code of its own",
                   in_turn(edit("tokenizer_config.json", auto_map=tokenizer_code), code)),
        bad_model("code in another repository", config(model_type="theirs", auto_map=elsewhere),
                  CANNOT_LOAD),
        bad_model("an adapter of a model that is not here", adapter_alone, CANNOT_LOAD),
    ]  # fmt: skip


# A head on the mean of all tokens, under a name for which the first token's would do.
HEAD_ON_THE_MEAN = b"""from transformers import XLMRobertaForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

class OnTheMean(XLMRobertaForSequenceClassification):
    def forward(self, input_ids, attention_mask, **others):
        tokens = self.roberta(input_ids, attention_mask=attention_mask).last_hidden_state
        is_token = attention_mask.unsqueeze(2).to(tokens.dtype)
        mean = (tokens * is_token).sum(dim=1) / is_token.sum(dim=1)
        return SequenceClassifierOutput(logits=self.classifier(mean.unsqueeze(1)))
"""


def heads_of_their_own():
    code = config(auto_map={"AutoModelForSequenceClassification": "on_the_mean.OnTheMean"})
    with_code = in_turn(code, put("on_the_mean.py", HEAD_ON_THE_MEAN))
    on_the_mean = fine_model("a head on the mean of all tokens, by code of its own", with_code)
    return [
        replace(on_the_mean, settings={**on_the_mean.settings, "trust_remote_code": True},
                check=wrong_scores(GOOD_ROWS, "model", trust_remote_code=True)),
        bad_model("a head in modules of sentence-transformers",
                  of_sentence_transformers("Transformer", "Pooling", "Dense"),
                  "computes its score in modules of theirs (Transformer, Pooling, Dense): "
                  "its trained head would be lost here"),
        bad_model("a prompt of sentence-transformers",
                  of_sentence_transformers("Transformer", default_prompt_name="ask",
                                           prompts={"ask": "问：\x1b"}),
                  "puts '问：\\x1b' before each query", "give --query_format '问：\\x1b{}'"),
        fine_model("a cross-encoder of sentence-transformers",
                   of_sentence_transformers("Transformer", prompts={"ask": "问："})),
    ]  # fmt: skip


def of_sentence_transformers(*names, **settings):
    """What sentence-transformers writes beside a cross-encoder made of these modules."""
    modules = [{"idx": index, "type": f"sentence_transformers.models.{name}"}
               for index, name in enumerate(names)]  # fmt: skip
    settings = {"model_type": "CrossEncoder", "default_prompt_name": None, **settings}
    return in_turn(
        put("modules.json", json.dumps(modules).encode()),
        put("config_sentence_transformers.json", json.dumps(settings).encode()),
    )


def other_architectures():
    moves = "padding, or chance, changes what it computes"
    no_files = without("tokenizer.json", "tokenizer_config.json")
    decoder = in_turn(becomes("gpt2", n_embd=32, n_layer=2, n_head=2, n_inner=32),
                      edit("tokenizer_config.json", pad_token=...))  # fmt: skip
    fewer_of_modernbert = config(num_hidden_layers=1, layer_types=["full_attention"])
    eurobert = becomes("eurobert", num_key_value_heads=2)
    squeezebert = becomes("squeezebert", embedding_size=32)
    xlnet = becomes("xlnet", d_model=32, n_layer=2, n_head=2, d_inner=32)
    return [
        bad_model("a decoder without a padding token", decoder,
                  "model has no padding token", "as is usual for decoders"),
        bad_model("a BERT without its tokenizer", in_turn(becomes("bert"), no_files), CANNOT_LOAD,
                  "tokenizer"),
        bad_model("a DeBERTa without its tokenizer", in_turn(becomes("deberta-v2"), no_files),
                  CANNOT_LOAD, "tokenizer"),
        bad_model("fewer layers than the weights of a ModernBERT",
                  in_turn(becomes("modernbert"), fewer_of_modernbert),
                  f"{LACKS} 6 weights of its encoder: model.layers.1."),
        bad_model("fewer layers than the weights of a EuroBERT",
                  in_turn(eurobert, config(num_hidden_layers=1)),
                  f"{LACKS} 9 weights of its encoder: model.layers.1."),
        bad_model("no layers of an ELECTRA",
                  in_turn(becomes("electra"), config(num_hidden_layers=0)),
                  f"{LACKS} 32 weights of its encoder: electra.encoder.layer.0."),
        bad_model("an FNet, which sees padding", becomes("fnet"),
                  f"(fnet) cannot be used: {moves}"),
        bad_model("a YOSO, which hashes at random", becomes("yoso"),
                  f"(yoso) cannot be used: {moves}"),
        bad_model("an XLNet padded on the left",
                  in_turn(xlnet, edit("tokenizer_config.json", padding_side="left")),
                  "(xlnet) cannot be used: "),
        bad_model("gradient_checkpointing of a SqueezeBERT", squeezebert,
                  "gradient_checkpointing: transformers has none for squeezebert models",
                  status=2, left=("cache",), gradient_checkpointing=True),
    ]  # fmt: skip


def segments_and_positions():
    roberta = becomes("roberta", type_vocab_size=1, pad_token_id=0, max_position_embeddings=513)
    one_segment = in_turn(tokenizer_of_bert, roberta)
    no_segment_ids = edit("tokenizer_config.json",
                          model_input_names=["input_ids", "attention_mask"])  # fmt: skip

    def make(folder):
        model(one_segment)(folder)
        shutil.copytree(folder / "model", folder / "reference")
        no_segment_ids(folder / "reference")

    settings = {"model_name_or_path": "model", **EVALUATION}
    check = wrong_scores(GOOD_ROWS, "reference")
    return [
        Case("one segment, and a tokenizer that marks two", make, (), 0, settings, check=check),
        bad_model("a tokenizer that takes 8 tokens",
                  edit("tokenizer_config.json", model_max_length=8),
                  "model cannot score pairs of texts: ",
                  "it takes 8 tokens, which is too few for a pair"),
        bad_model("a tokenizer that takes 2 tokens",
                  edit("tokenizer_config.json", model_max_length=2),
                  "model cannot score pairs of texts: ",
                  "max_len 2 is too small: it takes 6 tokens or more"),
        bad_model("a tokenizer that takes 40 tokens, and max_len of 48",
                  edit("tokenizer_config.json", model_max_length=40),
                  "max_len 48: model takes 40 (positions, model_max_length)", status=2),
    ]  # fmt: skip


# ---- Cases: where it runs ------------------------------------------------------------------------
def in_environment(case, **environment):
    return replace(case, environment=environment)


def as_usual(name, *said, **settings):
    """The run leaves the weights that it leaves elsewhere."""
    return Case(name, good, said, 0, settings, check=other_weights)


def variables():
    def refuses(name, *said, **environment):
        return in_environment(refused(name, good, *said, status=2), **environment)

    unset = "  one process:      unset them"
    accumulation = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}
    return [
        in_environment(as_usual("RANK=1 alone", SAVED), RANK="1"),
        refuses("LOCAL_RANK=0 alone", "the processes cannot start: ",
                "LOCAL_RANK=0", unset, LOCAL_RANK="0"),
        refuses("WORLD_SIZE=2 alone", "the processes cannot start: ", "WORLD_SIZE=2", unset,
                WORLD_SIZE="2"),
        refuses("WORLD_SIZE=two", "the processes cannot start: ", "WORLD_SIZE=two", unset,
                WORLD_SIZE="two"),
        refuses("DeepSpeed of accelerate config", "accelerate asks for DeepSpeed, which this "
                "script cannot use: unset ACCELERATE_USE_DEEPSPEED (it is true)",
                ACCELERATE_USE_DEEPSPEED="true"),
        refuses("Megatron-LM of accelerate config", "accelerate asks for Megatron-LM, which this "
                "script cannot use: unset ACCELERATE_USE_MEGATRON_LM (it is 1)",
                ACCELERATE_USE_MEGATRON_LM="1"),
        refuses("a device of accelerate with escape sequences", "for the device \\x1b[2J: unset",
                ACCELERATE_TORCH_DEVICE="\x1b[2J"),
        in_environment(as_usual("8 accumulation steps of accelerate config"), **accumulation),
        in_environment(as_usual("DeepSpeed of accelerate config, off"),
                       ACCELERATE_USE_DEEPSPEED="False"),
    ]  # fmt: skip


def failing(number, fails=lambda *_: True):
    """A system call that fails with this error where `fails` says so of its first argument."""

    def call(descriptor, *_, **__):
        if fails(descriptor):
            raise OSError(number, os.strerror(number))

    return call


def is_folder(descriptor):
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


def file_systems():
    """What file systems of other machines, and disks that fail, answer."""

    def on_file_system(case, flush=os.fsync, map_file=mmap.mmap):
        def meddle(script, folder):
            os.fsync = flush
            mmap.mmap = map_file

        return replace(case, meddle=meddle)

    def disk_fails(name, said, flush):
        # The names in the folder may be lost, which is no reason to take the file away.
        case = refused(name, good, f"{said}: 'output/cache'", left=("cache",))
        return on_file_system(case, flush)

    no_folder_flushed = failing(errno.EINVAL, is_folder)
    read = "cannot be mapped into memory there (No such device): each process reads its "
    refused_memory = refused("no memory to map a file into", good, "Cannot allocate memory",
                             left=("cache",))  # fmt: skip
    return [
        on_file_system(as_usual("a file system that flushes no folders and maps no files", read),
                       no_folder_flushed, failing(errno.ENODEV)),
        on_file_system(as_usual("a file system that flushes nothing"), failing(errno.ENOSYS)),
        disk_fails("a disk that fails", "[Errno 5] Input/output error",
                   failing(errno.EIO, is_folder)),
        disk_fails("a disk that is full", "[Errno 28] No space left on device",
                   failing(errno.ENOSPC, is_folder)),
        on_file_system(refused_memory, map_file=failing(errno.ENOMEM)),
    ]  # fmt: skip


# ---- All cases -----------------------------------------------------------------------------------
THEMES = (
    # files
    encodings, kinds_of_file, several_files, names_of_files, names_in_gbk, gzip_files, sizes,
    # lines
    shapes_of_line, lists_of_texts, nearly_right_keys, spellings, bad_texts, bad_labels, odd_labels,
    evaluations, retrievers_scores, long_documents, fine_texts, changing_files,
    # settings
    settings_of_a_wrong_type, settings_out_of_range, lengths, settings_that_do_not_fit,
    settings_for_data_files, names_of_nothing, command_lines, extreme_settings, output_dirs,
    # model folders
    models_that_are_no_folder, configs, tokenizers, files_of_weights, values_of_weights, pickles,
    heads, heads_of_their_own, encoder_decoders, other_architectures, segments_and_positions,
    models_that_lead_elsewhere,
    # where it runs
    variables, file_systems,
)  # fmt: skip


def cases():
    """{name: case} of all themes."""
    by_name = {}
    for theme in THEMES:
        for case in theme():
            assert case.name not in by_name, f"two cases are named {case.name}"
            by_name[case.name] = case
    return by_name


# ---- The run of a case ---------------------------------------------------------------------------
LIMIT = 60  # seconds
ASKED = "ASKED FOR THE NETWORK"


def load_script():
    """The script, imported once with all that a run imports later, and set up so that a process may
    be forked."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    os.environ.pop("HF_HUB_OFFLINE", None)

    sys.path.insert(0, str(ROOT))
    import matplotlib.figure  # noqa: F401  a run imports it where it draws

    import train_bert_rerank

    train_bert_rerank.BertRerankerModel.from_pretrained(str(TINY))
    gc.collect()
    gc.freeze()  # else each child's first collection copies all that the parent holds
    return train_bert_rerank


@dataclass
class Run:
    """A run that has ended."""

    status: int  # below 0: the signal that ended it
    seconds: float
    memory: float  # MB on top of what the imports need
    stdout: str
    stderr: str
    before: dict  # what the folder held: {path: bytes of a file, else its kind}
    after: dict

    @property
    def output(self):
        return self.stdout + self.stderr

    @property
    def errors(self):
        """Where the lines begin that say what was wrong."""
        lines = re.finditer("^(Error|train_bert_rerank.py: error): ", self.stderr, re.M)
        return [match.start() for match in lines]

    @property
    def said(self):
        """What a refusal says, from its first such line on; else all that was printed."""
        if self.errors:
            return self.stderr[self.errors[0] :]
        return self.output


def run_main(script, case, folder):
    """The script's main() in a child; `folder` has `work`, with the input, and `temporary`, and
    gets what the child prints, in `stdout` and `stderr`."""
    before = snapshot(folder / "work")
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * resource.getpagesize()
    started = time.monotonic()

    child = os.fork()
    if child == 0:
        run_as_child(script, case, folder)
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - started

    return Run(
        status=os.waitstatus_to_exitcode(status),
        seconds=seconds,
        memory=(usage.ru_maxrss * 1024 - resident) / 1e6,
        stdout=(folder / "stdout").read_bytes().decode(errors="surrogateescape"),
        stderr=(folder / "stderr").read_bytes().decode(errors="surrogateescape"),
        before=before,
        after=snapshot(folder / "work"),
    )


def snapshot(folder):
    """What a folder holds: {path: bytes of a file, else its kind}."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file():
            contents[name] = path.read_bytes()
        else:
            contents[name] = path.lstat().st_mode
    return contents


def run_as_child(script, case, folder):
    """main() is the last thing that a forked process does."""
    status = 70  # stays where not even a traceback can be printed
    try:
        redirect_output(folder)
        limit_resources()
        refuse_network()
        os.chdir(folder / "work")
        tempfile.tempdir = str(folder / "temporary")
        os.environ.update(case.environment)
        if case.meddle:
            case.meddle(script, folder / "work")
        sys.argv = ["train_bert_rerank.py", *command_line(case)]
        script.main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def redirect_output(folder):
    """Output and errors go into files, also those of libraries, which know descriptors alone."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        stream = open(descriptor, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        setattr(sys, name, stream)


def limit_resources():
    signal.alarm(LIMIT)  # ends a run that hangs, in whatever it hangs
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def refuse_network():
    """Whoever asks for a connection gets an error, and is heard of."""

    def refuse(*arguments, **options):
        print(ASKED, file=sys.stderr)
        raise OSError("no network here")

    socket.socket.connect = refuse
    socket.socket.connect_ex = refuse
    socket.getaddrinfo = refuse
    socket.create_connection = refuse


def command_line(case):
    settings = {**SMALL_RUN, **case.settings}
    return [*case.words, *(f"--{key}={value}" for key, value in settings.items())]


# ---- What has to come out of it ------------------------------------------------------------------
# Steers a terminal: C0 and C1 but for the line feed, the marks that reorder text, and halves of
# surrogate pairs.
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f"
                     "\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # fmt: skip


@dataclass
class Outcome:
    """What came out of a case."""

    name: str
    status: int
    said: str
    seconds: float
    memory: float
    complaints: list  # what is not as it should be


def run_case(script, case):
    """Run a case, and look at what came out of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "work").mkdir()
        (folder / "temporary").mkdir()
        case.make(folder / "work")

        run = run_main(script, case, folder)
        complaints = [*wrong_end(case, run), *wrong_output(run), *wrong_traces(case, run, folder)]
        complaints += [f"does not say {piece!r}" for piece in case.said if piece not in run.said]
        if not complaints:
            complaints += wrong_result(case, folder)

    said = run.said.replace(f"{folder}/work/", "")
    return Outcome(case.name, run.status, said, run.seconds, run.memory, complaints)


def wrong_end(case, run):
    """Complaints about how the run ended and what it took."""
    if run.status == -signal.SIGALRM:
        yield f"did not end in {LIMIT} s"
    if run.status != case.status:
        yield f"exit status {run.status}, not {case.status}"
    if run.memory > case.memory:
        yield f"{run.memory:.0f} MB, more than {case.memory}"


def wrong_output(run):
    """Complaints about what was printed."""
    if "Traceback" in run.output:
        yield "a traceback"

    is_refused = run.status != 0
    if len(run.errors) != is_refused:
        yield "not one line with 'Error: '"

    # How tqdm moves the cursor is no text of a file; no bar comes after an error.
    bars = run.stderr.replace("\x1b[A", "").replace("\r", "")
    steers = CONTROL.findall(run.stdout) + CONTROL.findall(bars)
    if run.errors:
        steers += CONTROL.findall(run.said)
    if steers:
        yield f"control characters printed: {ascii(steers[:5])}"

    if ASKED in run.output and "hub" not in run.said:
        yield "asked for the network"


def wrong_traces(case, run, folder):
    """Complaints about what the run left behind, less what the case itself meddled with."""
    if (folder / "work" / "the_code_ran").exists():
        yield "code of the model ran"
    if any((folder / "temporary").iterdir()):
        yield "left a temporary file"

    added = run.after.keys() - run.before.keys()
    unexpected = {path for path in added if not may_be_left(case, path)}
    if not case.meddle:
        unexpected |= run.before.keys() - run.after.keys()
    if run.status != 0 and unexpected:
        yield f"left or took away {sorted(unexpected)[:5]}"

    kept = run.before.keys() & run.after.keys()
    is_changed = any(run.before[path] != run.after[path] for path in kept)
    if is_changed and not case.meddle:
        yield "changed what was there"


def may_be_left(case, path):
    """Whether the case allows its refusal to leave this path."""
    if path == "output":
        return bool(case.left)
    return path.startswith(tuple(f"output/{name}" for name in case.left))


def wrong_result(case, folder):
    """Complaints about a result, where the case has a check."""
    if case.check is None:
        return []
    try:
        wrong = case.check(folder / "work")
    except OSError as error:  # a result that is not there
        wrong = str(error)
    return [wrong] if wrong else []


# ---- The command ---------------------------------------------------------------------------------
def cell(script, case, outcome):
    """What the table says about a case."""
    text = outcome.said
    if outcome.status == 0:
        text = "right: " + "; ".join(case.said or ["rows and scores"])
    if outcome.complaints:
        text = "**NOT AS EXPECTED** " + "; ".join(outcome.complaints)

    text = text.replace(f"{ROOT}/", "").replace(script.ADVICE, "").replace("|", "\\|")
    text = " ".join(text.split())
    if len(text) > 170:
        text = text[:170] + "…"
    return text


def show(script, names):
    """Run these cases and print the table; returns how many are not as expected."""
    known = cases()
    started = time.monotonic()
    failed = 0
    print("| case | exit status | what it says |\n| --- | --- | --- |")
    for name in names or known:
        case = known[name]
        outcome = run_case(script, case)
        print(f"| {name} | {outcome.status} | {cell(script, case, outcome)} |", flush=True)
        if outcome.complaints:
            failed += 1

    count = len(names or known)
    seconds = time.monotonic() - started
    print(f"\n{count - failed} of {count} cases as expected, in {seconds:.0f} s.")
    return failed


def serve(script):
    """For the tests: [name, changes of settings] come in, outcomes go out, a line each."""
    known = cases()
    for request in sys.stdin:
        name, changes = json.loads(request)
        case = known[name]
        case = replace(case, settings={**case.settings, **changes})
        print(json.dumps(asdict(run_case(script, case))), flush=True)


def main():
    """Run the cases named on the command line, or all, and print the table."""
    script = load_script()
    names = sys.argv[1:]
    if names == ["--serve"]:
        serve(script)
        return
    failed = show(script, names)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
