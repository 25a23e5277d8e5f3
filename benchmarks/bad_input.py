"""What comes out of bad files, settings and model folders: one clear message, or the right result.

    python benchmarks/bad_input.py [CASE ...]
    python benchmarks/bad_input.py > benchmarks/bad_input.md

Each case is a run of the script's own main() on tiny_reranker, in an empty folder and in a process of its own, which is
forked after the imports, so that a case costs its run alone. Whatever the case expects, its output has no traceback, no
control character out of a file,
and one "Error: " line where the exit status is not 0; the run asks for no network and ends
within a time and a memory limit, and leaves nothing beside a finished run's results: after a refusal the folder holds
what it held before. Prints a table in Markdown and a count; the exit status is 1 where a case is not as expected."""

import gc
import gzip
import json
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
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny_reranker"
SMALL_RUN = {"model_name_or_path": str(TINY), "train_dataset": "train.jsonl", "eval_dataset": None, "epochs": 1,
             "max_len": 48, "gradient_accumulation_steps": 1, "mixed_precision": "no", "log_with": None,
             "output_dir": "output"}  # fmt: skip
EVALUATION = {"epochs": 0, "eval_dataset": "train.jsonl", "train_dataset": "nowhere.jsonl", "max_len": 512}
TRAINED = {"final_model", "loss_curve.png", "logs", "run.json", "rows_to_check.jsonl", "cache"}
EVALUATED = {"evaluation", "cache"}
# Steers a terminal: C0 and C1 but for the line feed, the marks that reorder text, and halves of surrogate pairs.
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Case(NamedTuple):
    """A run and what has to come out of it."""
    name: str
    make: object  # make(folder) puts the input there
    said: tuple  # pieces of the output; of a refusal, of what stands from "Error: " on
    status: int = 1
    settings: dict = {}  # on top of SMALL_RUN; with the key "argv" the words of the command line as they are
    check: object = None  # check(folder, output) -> what is wrong with a right result, None where nothing is
    meddle: object = None  # meddle(script, folder) in the run's own process, before main(): what happens meanwhile
    memory: int = 1000  # MB that the run may need on top of the imports
    left: tuple = ()  # what a refusal may leave in output_dir, each complete in itself


# ---- Input -----------------------------------------------------------------------------------------------------------
def line(**changes):
    """A line of JSONL, with some keys changed; with ... as value: without the key."""
    sample = {"query": "怎么退款", "content": "请在七天之内联系客服。", "label": 1, **changes}
    return json.dumps({key: value for key, value in sample.items() if value is not ...}, ensure_ascii=False).encode()


GOOD = [line(), line(content="本店周末休息。", label=0), line(query="how", content="?"), line(query="how", label=0)]
GOOD_ROWS = [(*json.loads(each).values(), number) for number, each in enumerate(GOOD, start=1)]


def write(data, name="train.jsonl"):
    """A maker of one file with these bytes."""
    return lambda folder: (folder / name).write_bytes(data)


def good(folder):
    write(b"\n".join(GOOD))(folder)


def beside(act):
    """A maker of good rows and of what act(folder) adds."""
    return lambda folder: (good(folder), act(folder))


def with_line(bad):
    """A maker of a file whose third line is `bad`, among good ones."""
    return write(b"\n".join([*GOOD[:2], bad, *GOOD[2:]]))


def model(change):
    """A maker of good rows and of a copy of tiny_reranker in `model`, with a change."""
    def make(folder):
        good(folder)
        shutil.copytree(TINY, folder / "model")
        change(folder / "model")
    return make


def edit(name, **changes):
    """A change of keys in a model folder's JSON file; ... takes the key away."""
    def change(folder):
        content = {**json.loads((folder / name).read_text()), **changes}
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / name).write_text(json.dumps(content))
    return change


def put(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def cut_short(name, size):
    return lambda folder: os.truncate(folder / name, size)


def reweigh(change, name="model.safetensors"):
    """A change of a model folder's weights: change({name: tensor}) -> those to save, as `name`."""
    def save(folder):
        import torch
        from safetensors.torch import load_file, save_file
        weights = change(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").unlink()
        save_file(weights, folder / name, {"format": "pt"}) if name.endswith("s") else torch.save(weights,
                                                                                                  folder / name)
    return save


def huge_line(start, megabytes, opener=open):
    """A maker of a file that begins with `start` and goes on without a line feed."""
    def make(folder):
        with opener(folder / "train.jsonl", "wb") as file:
            file.write(start)
            for _ in range(megabytes):
                file.write(b"a" * 10**6)
            file.write(b'"}')
    return make


class MarksThatItRan:
    """What makes a folder, `the_code_ran`, where it is unpickled."""
    def __reduce__(self):
        return os.mkdir, ("the_code_ran",)


REMOTE_CODE = b"""import os
os.mkdir("the_code_ran")
from transformers import XLMRobertaConfig as Theirs, XLMRobertaForSequenceClassification as TheirModel
"""


def encoder_decoder(folder):
    from transformers import T5Config, T5Model
    T5Model(T5Config(vocab_size=7124, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)).save_pretrained(folder)


def two_labels(weights):
    import torch
    return {**weights, "classifier.out_proj.weight": torch.ones(2, 128), "classifier.out_proj.bias": torch.zeros(2)}


# ---- Right results ---------------------------------------------------------------------------------------------------
def trained(folder, output, kept=TRAINED):
    """Whether a run has left its results, all finite, and nothing else."""
    from safetensors.torch import load_file
    found = set(os.listdir(folder / "output"))
    if found != kept:
        return f"output_dir holds {sorted(found)}"
    weights = load_file(folder / "output" / "final_model" / "model.safetensors").values()
    if not all(weight.isfinite().all() for weight in weights):
        return "weights are not finite"


def scored(rows, reference=TINY):
    """A check that an evaluation read `rows`, (query, content, label, line), and scored them as transformers does with
    the `reference`, TINY or a folder beside the data; None where the head is a new one."""
    def check(folder, output):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        written = (folder / "output/evaluation/predictions.jsonl").read_text(encoding="utf-8").split("\n")
        found = [json.loads(each) for each in written[:-1]]
        read = [(row["query"], row["content"], row["label"], row["line"]) for row in found]
        if read != rows or set(os.listdir(folder / "output")) != EVALUATED:
            return f"rows read: {ascii(read)[:300]}"
        if not reference:
            return None
        tokens = AutoTokenizer.from_pretrained(folder / reference)([row[:2] for row in rows], padding=True,
                                                                   return_tensors="pt")
        scorer = AutoModelForSequenceClassification.from_pretrained(folder / reference).eval()
        with torch.inference_mode():
            expected = scorer(**tokens).logits[:, 0].sigmoid().tolist()
        furthest = max(abs(row["score_before"] - score) for row, score in zip(found, expected, strict=True))
        return f"scores are {furthest} off" if furthest > 1e-6 else None
    return check


# ---- The cases -------------------------------------------------------------------------------------------------------
def bad_line(name, bad, *said):
    return Case(name, with_line(bad), ("train.jsonl: 1 bad line\n  line 3: ", *said, "Each line should be"))


def bad_file(name, data, *said):
    return Case(name, write(data), ("train.jsonl", *said))


def fine_file(name, data, rows=None):
    return Case(name, write(data), (), 0, EVALUATION, scored(rows or GOOD_ROWS))


def fine_text(name, text, escaped=False):
    """A text that is read, scored and written again exactly as it is, in query and content."""
    rows = [(text, "答", 1, 1), ("问", text, 0, 2), (text, text, 0, 3), ("问", "答", 1, 4)]
    data = [json.dumps(dict(zip(("query", "content", "label"), row[:3], strict=True)),
                       ensure_ascii=escaped) for row in rows]
    return Case(name, write("\n".join(data).encode()), (), 0, EVALUATION, scored(rows))


def bad_setting(name, said, **settings):
    return Case(name, good, (said,), 2, settings)


def bad_model(name, change, *said, left=(), **settings):
    return Case(name, model(change), said, 1, {"model_name_or_path": "model", **settings}, left=left)


def fine_model(name, change, *said, reference=TINY):
    return Case(name, model(change), said, 0, {"model_name_or_path": "model", **EVALUATION},
                scored(GOOD_ROWS, reference))
def data_cases():
    """Files and lines."""
    deep, long = 100_000, b'{"query": "q", "label": 1, "content": "'
    zipped = gzip.compress(b"\n".join(GOOD) * 50, mtime=0)
    bidi = "\u202eevil\u2066\u2069"
    yield from [
        # Encodings
        fine_file("UTF-8 with a byte-order mark", b"\xef\xbb\xbf" + b"\n".join(GOOD)),
        fine_file("CRLF line ends", b"\r\n".join(GOOD) + b"\r\n"),
        fine_file("no last line feed, blank lines", b"\n\n" + b"\n \t\n".join(GOOD),
                  [(*row[:3], 2 * row[3] + 1) for row in GOOD_ROWS]),
        fine_file("\\u escapes throughout", b"\n".join(json.dumps(json.loads(each)).encode() for each in GOOD)),
        fine_file("spaces around and keys beside", b"\n".join(b"  " + each[:-1] + b', "id": [{}]}\t' for each in GOOD)),
        bad_file("UTF-16 with a byte-order mark", "\n".join(each.decode() for each in GOOD).encode("utf-16"),
                 ": 4 bad lines\n  line 1: not JSON in UTF-8"),
        bad_file("UTF-16 big-endian, bare", "\n".join(each.decode() for each in GOOD).encode("utf-16-be"),
                 "line 1: not JSON in UTF-8"),
        bad_file("UTF-32", "\n".join(each.decode() for each in GOOD).encode("utf-32"), "line 1: not JSON in UTF-8"),
        bad_file("GBK", b"\n".join(each.decode().encode("gbk") for each in GOOD),
                 ": 3 bad lines\n  line 1: not JSON in UTF-8", "\n  line 2: ", "\n  line 4: "),
        bad_line("Big5", '{"query": "申請退款", "content": "c", "label": 1}'.encode("big5"), "not JSON in UTF-8"),
        bad_line("Latin-1", '{"query": "é", "content": "c", "label": 1}'.encode("latin-1"), "not JSON in UTF-8"),
        bad_line("overlong UTF-8", b'{"query": "\xc0\xaf", "content": "c", "label": 1}', "invalid start byte"),
        bad_line("a surrogate in UTF-8 bytes", b'{"query": "\xed\xa0\xbd", "content": "c", "label": 1}',
                 "not JSON in UTF-8"),
        bad_line("UTF-8 cut inside a character", line()[:13], "not JSON in UTF-8"),
        bad_line("a byte-order mark on a later line", b"\xef\xbb\xbf" + line(), "not JSON in UTF-8"),
        bad_line("old Mac line ends", b"\r".join(GOOD[:2]), "Extra data"),
        # Files
        bad_file("an empty file", b"", ": no rows."),
        bad_file("blank lines only", b"\n \r\n\t\n", ": no rows."),
        bad_file("nothing but a byte-order mark", b"\xef\xbb\xbf", ": no rows."),
        Case("a missing file", lambda folder: None, ("train.jsonl: cannot be read: No such file or directory",)),
        Case("a folder in place of a file", lambda folder: (folder / "train.jsonl").mkdir(),
             ("train.jsonl: cannot be read: ",)),
        Case("a FIFO that nobody writes", lambda folder: os.mkfifo(folder / "train.jsonl"),
             ("train.jsonl: cannot be read: no regular file",)),
        Case("a FIFO for eval data", beside(lambda folder: os.mkfifo(folder / "eval.jsonl")),
             ("eval.jsonl: cannot be read: no regular file",), settings={"eval_dataset": "eval.jsonl"}),
        Case("a FIFO for one of several files", beside(lambda folder: os.mkfifo(folder / "b.jsonl")),
             ("b.jsonl: cannot be read: no regular file",), settings={"train_dataset": ["train.jsonl", "b.jsonl"]}),
        Case("a socket in place of a file", lambda folder: socket.socket(socket.AF_UNIX).bind(f"{folder}/train.jsonl"),
             ("train.jsonl: cannot be read: no regular file",)),
        Case("/dev/zero", good, ("/dev/zero: cannot be read: no regular file",),
             settings={"train_dataset": "/dev/zero"}),
        Case("/dev/null", good, ("/dev/null: cannot be read: no regular file",),
             settings={"train_dataset": "/dev/null"}),
        Case("a link that leads to itself", lambda folder: (folder / "train.jsonl").symlink_to("train.jsonl"),
             ("train.jsonl: cannot be read: ",)),
        Case("a link that leads nowhere", lambda folder: (folder / "train.jsonl").symlink_to("nowhere"),
             ("train.jsonl: cannot be read: No such file",)),
        Case("a link to a good file", lambda folder: (write(b"\n".join(GOOD), "data")(folder),
                                                      (folder / "train.jsonl").symlink_to("data")),
             (), 0, EVALUATION, scored(GOOD_ROWS)),
        Case("an eval file that is missing", good, ("eval.jsonl: cannot be read: No such file",),
             settings={"eval_dataset": "eval.jsonl"}),
        Case("a bad line in the eval file alone", beside(write(b"[]", "eval.jsonl")),
             ("eval.jsonl: 1 bad line\n  line 1: not a JSON object",), settings={"eval_dataset": "eval.jsonl"}),
        Case("a bad line in the second of two files", beside(write(b"\n\n[]", "b.jsonl")),
             ("b.jsonl: 1 bad line\n  line 3: not a JSON object",),
             settings={"train_dataset": ["train.jsonl", "b.jsonl"]}),
        Case("a name longer than names may be", good, ("cannot be read: File name too long",),
             settings={"train_dataset": "x" * 300}),
        Case("a name with NUL", good, ("a\\x00b']: cannot be read: No such file",),
             settings={"train_dataset": ["a\0b"]}),
        Case("a name with escape sequences", write(b"[]", "\x1b[2J\x9b31m\r.jsonl"),
             ("\\x1b[2J\\x9b31m\\r.jsonl: 1 bad line",), settings={"train_dataset": "\x1b[2J\x9b31m\r.jsonl"}),
        Case("a name that is read from right to left", write(b"", bidi), ("\\u202eevil\\u2066\\u2069: no rows",),
             settings={"train_dataset": bidi}),
        Case("a name that is no UTF-8", lambda folder: (folder / "\udcff").write_bytes(b"[]"), ("\\udcff: 1 bad line",),
             settings={"train_dataset": "\udcff"}),
        Case("a name with escape sequences, as the eval file", beside(write(b"\n".join(GOOD), "\x1b]0;x\x07")),
             ("4 rows) of \\x1b]0;x\\x07.",), 0, {**EVALUATION, "eval_dataset": "\x1b]0;x\x07"}, scored(GOOD_ROWS)),
        # Gzip
        fine_file("gzip under a name without .gz", gzip.compress(b"\n".join(GOOD))),
        fine_file("gzip in two members, cut within a line",
                  gzip.compress(b"\n".join(GOOD)[:30]) + gzip.compress(b"\n".join(GOOD)[30:])),
        bad_file("gzip cut in its header", zipped[:6], ": cannot be read: "),
        bad_file("gzip cut in its data", zipped[:len(zipped) // 2], ": cannot be read: "),
        bad_file("gzip cut in its checksum", zipped[:-5], ": cannot be read: "),
        bad_file("gzip with a wrong checksum", zipped[:-8] + bytes(8), ": cannot be read: CRC check failed"),
        bad_file("gzip with damaged data", zipped[:30] + b"\xff\xff\xff" + zipped[33:], ": cannot be read: "),
        bad_file("gzip with rubbish behind it", zipped + b"rubbish", ": cannot be read: Not a gzipped file"),
        bad_file("gzip of gzip", gzip.compress(zipped, mtime=0), ": ", "not JSON in UTF-8"),
        bad_file("gzip of nothing", gzip.compress(b""), ": no rows."),
        bad_file("gzip of a bad line", gzip.compress(b"\n".join([*GOOD, b"{}"])),
                 ": 1 bad line\n  line 5: query is missing"),
        Case("gzip of 400 MB in one line", huge_line(b"", 400, partial(gzip.open, compresslevel=1)),
             ("train.jsonl: line 1 is longer than 16 MB",)),
        bad_file("zip, named .jsonl", b"PK\x03\x04" + bytes(range(256)), "line 1: not JSON in UTF-8"),
        # Size
        Case("a line of 100 MB", huge_line(GOOD[0] + b"\n" + long, 100), ("train.jsonl: line 2 is longer than 16 MB",)),
        Case("100 MB of NUL", lambda folder: (good(folder), os.truncate(folder / "train.jsonl", 10**8)),
             ("train.jsonl: line 4 is longer than 16 MB",)),
        Case("a line of 10 MB", write(b"\n".join([*GOOD, long + "书".encode() * 3_400_000 + b'"}'])),
             ("Label 1.00: 3 (60.00%)", "max_len truncates 1 train pairs"), 0, {}, trained, memory=2500),
        bad_file("20,000 bad lines", b"{}\n" * 20_000, ": 20000 bad lines\n  line 1: query is missing",
                 "\n  … and 19990 more\n"),
        # Shape
        bad_line("nested 100,000 deep", b"[" * deep + b"]" * deep, "not JSON in UTF-8 (maximum recursion depth"),
        bad_line("objects nested 100,000 deep", b'{"query":' * deep + b"1" + b"}" * deep, "not JSON in UTF-8"),
        bad_line("a label nested 900 deep",
                 b'{"query": "q", "content": "c", "label": ' + b"[" * 900 + b"]" * 900 + b"}", "label is [[["),
        bad_line("a query nested 900 deep", b'{"content": "c", "label": 1, "query": ' + b"[" * 900 + b"]" * 900 + b"}",
                 "query is no text: [[["),
        Case("the same key twice: the last counts, as JSON readers have it",
             write(b"\n".join([*GOOD, b'{"query": "q", "content": "c", "label": 1, "label": 0}'])),
             ("Label 0.00: 3 (60.00%)",), 0, {}, trained),
        bad_line("keys in capitals", b'{"Query": "q", "Content": "c", "Label": 1}', "query is missing"),
        bad_line("single quotes", b"{'query': 'q', 'content': 'c', 'label': 1}", "not JSON in UTF-8"),
        bad_line("a comma too many", b'{"query": "q", "content": "c", "label": 1,}', "not JSON in UTF-8"),
        bad_line("a comment", line() + b" // relevant", "Extra data"),
        bad_line("a line of CSV", b"query,content,1", "not JSON in UTF-8 (Expecting value: column 1"),
        bad_line("a bare NUL", b"\0", "not JSON in UTF-8"),
        bad_line("NUL bytes in a text", b'{"query": "a\0b", "content": "c", "label": 1}', "Invalid control character"),
        bad_line("a bare escape character in a text", b'{"query": "\x1b[2J", "content": "c", "label": 1}',
                 "Invalid control character"),
        bad_line("a list of rows", b"[" + line() + b"]", "not a JSON object"),
        bad_line("content and pos at once", line(pos=["a"]), "two shapes at once"),
        bad_line("pos as a text", b'{"query": "q", "pos": "c"}', "pos and neg should be lists"),
        bad_line("hits of hits", b'{"query": "q", "hits": [[{"content": "c", "label": 1}]]}', "hits a list of"),
        bad_line("a blank text of wide spaces", line(content="\u3000\u2003"), "content is blank"),
        bad_line("a text of escape sequences where a label goes", line(label="\x1b[31m\u202e\x07"),
                 'label is "\\u001b[31m\\u202e\\u0007": drop the quotes'),
        bad_line("escape sequences where a text goes", line(query=["\x1b[31m\u202e\x9b"]),
                 'query is no text: ["\\u001b[31m\\u202e\\u009b"]'),
        bad_line("half of a surrogate pair", b'{"query": "\\ud83d", "content": "c", "label": 1}',
                 "surrogates not allowed"),
        bad_line("a surrogate pair in the wrong order", b'{"query": "\\ude00\\ud83d", "content": "c", "label": 1}',
                 "surrogates not allowed"),
        bad_line("half of a surrogate pair where a label goes", b'{"query": "q", "content": "c", "label": "\\ud83d"}',
                 'label is "\\ud83d": drop the quotes'),
        # Numbers
        bad_line("NaN", b'{"query": "q", "content": "c", "label": NaN}', "label nan is outside [0, 1]"),
        bad_line("Infinity", b'{"query": "q", "content": "c", "label": Infinity}', "label inf is outside [0, 1]"),
        bad_line("-Infinity", b'{"query": "q", "content": "c", "label": -Infinity}', "label -inf is outside [0, 1]"),
        bad_line("1e400", b'{"query": "q", "content": "c", "label": 1e400}', "label inf is outside [0, 1]"),
        bad_line("an integer of 400 digits", b'{"query": "q", "content": "c", "label": ' + b"9" * 400 + b"}",
                 "is outside [0, 1]"),
        bad_line("an integer of 5,000 digits", b'{"query": "q", "content": "c", "label": ' + b"9" * 5000 + b"}",
                 "not JSON in UTF-8"),
        bad_line("a label of -0.1", line(label=-0.1), "label -0.1 is outside [0, 1] (min_label, max_label)"),
        bad_line("a text label", line(label="1"), 'label is "1": drop the quotes'),
        bad_line("a label of true", line(label=True), "label is true: it should be a number"),
        bad_line("no label", line(label=...), "label is missing"),
        Case("a label of -0.0 and one of 5e-324",
             write(b"\n".join([line(label=-0.0), line(content="b", label=5e-324),
                               GOOD[0]])), ("Label 0.00: 2 (66.67%)\nLabel 1.00: 1 (33.33%)",), 0, {}, trained),
        Case("labels from -1e300 to 1e300",
             write(b"\n".join(line(content=str(label), label=label) for label in (-1e300, 1e300, 0))),
             ("Label 0.00: 1 (33.33%)",), 0, {"min_label": -1e300, "max_label": 1e300}, trained),
        Case("labels up to 10**300", write(b"\n".join([line(label=10**300), line(content="b", label=0)])),
             ("Label 0.00: 1 (50.00%)",), 0, {"max_label": 10**300}, trained),
        Case("one label for all rows", write(b"\n".join([line(), line(content="b")])),
             ("Warning: 2 train rows, all there are, have one and the same label.",), 0, {}, trained),
        Case("one row", write(GOOD[0]), ("Label 1.00: 1 (100.00%)",), 0, {}, trained),
        Case("an evaluation without a relevant row", write(b"\n".join(GOOD[1::2])),
             ("there are no eval rows with labels to measure",), 2, EVALUATION, left=("cache",)),
        # Text
        fine_text("right-to-left text", "مرحبا بالعالم שלום 123"),
        fine_text("marks of direction", "\u202eabc\u202c \u2066שלום\u2069 \u200e\u200f"),
        fine_text("zero-width text", "a\u200bb\u200c\u200dc\ufeffd\u2060"),
        fine_text("emoji of several code points", "👩‍👩‍👧‍👦 🇨🇳 👍🏽 🏴󠁧󠁢󠁥󠁮󠁧󠁿"),
        fine_text("marks piled up", "Z" + "\u0300\u0301\u0489" * 40 + " é e\u0301"),
        fine_text("NUL as an escape", "a\0b\x01\x1f", escaped=True),
        fine_text("escape sequences", "\x1b[2J\x1b]0;title\x07\x9b31m\x85", escaped=True),
        fine_text("line and paragraph separators", "one\u2028two\u2029three\x0bfour\x0cfive"),
        fine_text("noncharacters, private use, the last code point", "\ufffe\uffff\ue000\U0010ffff\ufffd"),
        fine_text("texts like special tokens", "</s> <s> <pad> <mask> [SEP] <unk>"),
        fine_text("braces and percents", "{} {0} %s %(a)s \\{ ${x}"),
    ]


def changed_after_loading(name, change, said, kept=None):
    """The file changes once it has been read and checked, before its texts are read again for their tokens."""
    def meddle(script, folder):
        check_rows = script.check_rows

        def changed(*arguments):
            change(folder / "train.jsonl")
            return check_rows(*arguments)
        script.check_rows = changed
    return Case(name, good, said, 1 if kept is None else 0, {}, kept, meddle)


def changing_files():
    """Files that are not what they were."""
    changed = "train.jsonl has changed since this run loaded it"
    yield from [
        changed_after_loading("a file of which a text changes after loading",
                              lambda path: path.write_bytes(b"\n".join([*GOOD[:3], line(query="who", label=0)])),
                              (changed,)),
        changed_after_loading("a file that shrinks after loading", lambda path: path.write_bytes(GOOD[0]), (changed,)),
        changed_after_loading("a file that is emptied after loading", lambda path: path.write_bytes(b""), (changed,)),
        changed_after_loading("a file that is gone after loading", lambda path: path.unlink(),
                              ("train.jsonl: cannot be read: No such file",)),
        changed_after_loading("a file that is rubbish after loading", lambda path: path.write_bytes(b"\x1f\x8brubbish"),
                              ("train.jsonl: cannot be read: ",)),
        changed_after_loading("a file whose rows are in another order after loading",
                              lambda path: path.write_bytes(b"\n".join(GOOD[::-1])), (changed,)),
        changed_after_loading("a FIFO in place of the file after loading",
                              lambda path: (path.unlink(), os.mkfifo(path)),
                              ("train.jsonl: cannot be read: no regular file",)),
    ]


def settings_cases():
    """Settings."""
    yield from [
        bad_setting("text for a number", "epochs should be int 0.., not 'three'", epochs="three"),
        bad_setting("a float for an integer", "epochs should be int 0.., not '1.5'", epochs=1.5),
        bad_setting("a list for a number", "lr should be float 0.., not '[1e-05]'", lr=[1e-5]),
        bad_setting("a number for true or false", "trust_remote_code should be bool, not '1'", trust_remote_code=1),
        bad_setting("nested 10,000 deep", "max_len should be int 8.., not '[[[", max_len="[" * 10_000),
        bad_setting("an integer of 10,000 digits", "seed should be int 0..4294967295, not '999", seed="9" * 10_000),
        bad_setting("a call in place of a number", "seed should be int 0..4294967295, not \"__import__",
                    seed="__import__('os').mkdir('the_code_ran')"),
        bad_setting("epochs of -1", "epochs should be int 0.., not '-1'", epochs=-1),
        bad_setting("a learning rate below 0", "lr should be float 0.., not '-0.1'", lr=-0.1),
        bad_setting("a learning rate of NaN", "lr should be float 0.., not 'nan'", lr="nan"),
        bad_setting("a learning rate of 1e999", "lr should be float 0.., not ", lr="1e999"),
        bad_setting("warm-up above 1", "warmup_proportion should be float 0..1, not '1.5'", warmup_proportion=1.5),
        bad_setting("an eval_proportion below 0", "eval_proportion should be float 0..1, not '-0.1'",
                    eval_proportion=-0.1),
        bad_setting("a batch of 0", "batch_size should be int 1.., not '0'", batch_size=0),
        bad_setting("accumulation over -1 steps", "gradient_accumulation_steps should be int 1.., not '-1'",
                    gradient_accumulation_steps=-1),
        bad_setting("a weight decay below 0", "weight_decay should be float 0.., not '-1'", weight_decay=-1),
        bad_setting("a seed of 2**32", "seed should be int 0..4294967295, not '4294967296'", seed=2**32),
        bad_setting("a share of the base above 1", "base_interpolation should be tuple 0.01..0.99",
                    base_interpolation=(0.5, 1.5)),
        bad_setting("a metric that does not exist", "metric_for_best_model should be", metric_for_best_model="ndcg"),
        bad_setting("a precision that does not exist", "mixed_precision should be", mixed_precision="fp8"),
        bad_setting("max_len of 7", "max_len should be int 8.., not '7'", max_len=7),
        bad_setting("max_len of 513 where XLM-R's 514 positions take 512", "max_len 513: ", max_len=513),
        bad_setting("max_len of 514, all of XLM-R's positions", "takes 512 (positions, model_max_length)", max_len=514),
        bad_setting("max_len of 10**30", "takes 512 (positions, model_max_length)", max_len=10**30),
        Case("max_len of 512 where XLM-R's 514 positions take 512",
             write(b"\n".join([line(content="书" * 600), *GOOD])),
             ("max_len truncates 1 train pairs",), 0, {"max_len": 512}, trained),
        Case("max_len of 8", good, ("max_len truncates 3 train pairs (75.00%), in 2 the query too.",), 0,
             {"max_len": 8}, trained),
        bad_setting("min_label above max_label", "min_label 2 is not below max_label 1", min_label=2),
        bad_setting("a format without its place", "query_format and document_format should each hold {} once",
                    query_format="query:"),
        bad_setting("a format with two places", "query_format and document_format should each hold {} once",
                    document_format="{}{}"),
        bad_setting("an unknown key", "unknown setting epoch; the nearest is epochs", epoch=3),
        Case("no data file", good, ("[]: cannot be read: No such file",), settings={"train_dataset": []}),
        Case("numbers for data files", good, ("[1, 2]: cannot be read: No such file",),
             settings={"train_dataset": [1, 2]}),
        Case("an empty name of a data file", good, (": cannot be read: ",), settings={"train_dataset": ""}),
        Case("a key without a value", good, ("--lr: expected one argument",), 2, {"argv": ["--lr"]}),
        Case("an unknown key with escape sequences", good, ("unknown setting \\x1b[2J; the nearest is ",), 2,
             {"argv": ["--\x1b[2J", "1"]}),
        Case("escape sequences for a number", good, ("epochs should be int 0.., not '\\x1b[2J\\u202e'",), 2,
             {"epochs": "\x1b[2J\u202e"}),
        Case("a batch of 10**30", good, ("Model saved successfully!",), 0, {"batch_size": 10**30}, trained),
        Case("a batch of 10**9", good, ("Model saved successfully!",), 0, {"batch_size": 10**9}, trained),
        Case("accumulation over 10**30 steps", good, ("Model saved successfully!",), 0,
             {"gradient_accumulation_steps": 10**30}, trained),
        Case("micro-batches of 10**30 tokens", good, ("Model saved successfully!",), 0, {"micro_batch_tokens": 10**30},
             trained),
        Case("micro-batches of 1 token", good, ("micro-batches of 1 tokens",), 0, {"micro_batch_tokens": 1}, trained),
        Case("a learning rate of 0", good, ("Model saved successfully!",), 0, {"lr": 0}, trained),
        Case("a learning rate of 1e38", good, ("left no finite weights: lower lr 1e+38",), 1, {"lr": 1e38},
             left=("cache", "unfinished_run")),
        Case("a learning rate of 1e38 in the only step before an evaluation", good,
             ("training left no finite weights: lower lr 1e+38",), 1,
             {"lr": 1e38, "batch_size": 8, "eval_dataset": "train.jsonl"}, left=("cache", "unfinished_run")),
        Case("a weight decay of 1e308", good, ("left no finite weights: lower lr",), 1, {"weight_decay": 1e308},
             left=("cache", "unfinished_run")),
        Case("a norm of 1e308", good, ("Model saved successfully!",), 0, {"max_grad_norm": 1e308}, trained),
        Case("a norm of 5e-324", good, ("Model saved successfully!",), 0, {"max_grad_norm": 5e-324}, trained),
        Case("an output_dir that is a file", good, ("train.jsonl is no folder that this run may write to",), 2,
             {"output_dir": "train.jsonl"}),
        Case("an output_dir below a file", good, ("train.jsonl is no folder that this run may write to",), 2,
             {"output_dir": "train.jsonl/output"}),
        Case("an output_dir with NUL, in quotes: taken as it was typed", good, ("Model saved successfully!",), 0,
             {"output_dir": repr("a\0b")},
             lambda folder, output: None if (folder / repr("a\0b") / "final_model").is_dir() else "no model"),
        Case("an output_dir with a name too long", good, ("File name too long",), 1, {"output_dir": "x" * 300}),
        Case("an output_dir that holds someone's logs",
             beside(lambda folder: (folder / "output/logs").mkdir(parents=True)),
             ("holds a model or logs that no run left there",), 2),
        Case("an output_dir with escape sequences", beside(lambda folder: (folder / "\x1b[2J").write_text("")),
             ("\\x1b[2J is no folder that this run may write to",), 2, {"output_dir": "\x1b[2J"}),
    ]


def model_cases():
    """Model folders."""
    def few_embeddings(weights):
        name = "roberta.embeddings.word_embeddings.weight"
        return {**weights, name: weights[name][:5000].clone()}

    def all_nan(weights):
        return {name: each * float("nan") for name, each in weights.items()}

    adapter = {"peft_type": "LORA", "base_model_name_or_path": "someone/else", "target_modules": ["query"]}
    from_remote = {"auto_map": {"AutoConfig": "theirs.Theirs",
                                "AutoModelForSequenceClassification": "theirs.TheirModel"}}
    yield from [
        Case("no folder and no hub in reach", good,
             ("nowhere/at-all is no folder, not in the cache, and the hub is out of reach",), 1,
             {"model_name_or_path": "nowhere/at-all"}),
        Case("a path that is no name of a model", good, ("./no/such/folder is no local folder",), 1,
             {"model_name_or_path": "./no/such/folder"}),
        Case("a file in place of a model folder", good, ("train.jsonl",), 1, {"model_name_or_path": "train.jsonl"}),
        Case("an empty name of a model", good, ("cannot load",), 1, {"model_name_or_path": ""}),
        Case("a model name with escape sequences", good, ("\\x1b[2J",), 1, {"model_name_or_path": "\x1b[2J"}),
        Case("a model name with NUL", good, ("a\\x00b",), 1, {"model_name_or_path": repr("a\0b")}),
        Case("an empty model folder", beside(lambda folder: (folder / "model").mkdir()), ("cannot load model",), 1,
             {"model_name_or_path": "model"}),
        bad_model("no config.json", without("config.json"), "cannot load model"),
        bad_model("config.json cut short", put("config.json", b'{"model_type": "xlm-roberta",'), "cannot load model",
                  "not a valid JSON file"),
        bad_model("config.json that is a list", put("config.json", b"[]"), "cannot load model"),
        bad_model("config.json that is no UTF-8", put("config.json", b"\xff\xfe{}"), "cannot load model"),
        bad_model("config.json nested 100,000 deep", put("config.json", b"[" * 100_000), "cannot load model"),
        bad_model("an empty config.json", put("config.json", b""), "cannot load model"),
        bad_model("config.json without a model_type", edit("config.json", model_type=..., architectures=...),
                  "cannot load model"),
        bad_model("an unknown model_type", edit("config.json", model_type="\x1b[31mevil\u202e"), "cannot load model",
                  "\\x1b[31mevil\\u202e"),
        bad_model("a hidden_size that the heads do not divide", edit("config.json", hidden_size=130),
                  "cannot load model"),
        bad_model("a hidden_size of text", edit("config.json", hidden_size="wide"), "cannot load model"),
        bad_model("a hidden_size below 0", edit("config.json", hidden_size=-128), "cannot load model"),
        bad_model("no layers", edit("config.json", num_hidden_layers=0),
                  "model or its config.json lacks 48 weights of its encoder"),
        bad_model("fewer layers than weights", edit("config.json", num_hidden_layers=2),
                  "model or its config.json lacks 16 weights of its encoder: roberta.encoder.layer.2."),
        bad_model("more layers than weights", edit("config.json", num_hidden_layers=4),
                  "model or its config.json lacks 16 weights of its encoder"),
        bad_model("another hidden_size than the weights", edit("config.json", hidden_size=64),
                  "model or its config.json lacks"),
        bad_model("a vocabulary of 10**15", edit("config.json", vocab_size=10**15), "cannot load model", "memory"),
        bad_model("an activation that does not exist", edit("config.json", hidden_act="\x1b[2J"), "cannot load model"),
        bad_model("a quantization that is not installed",
                  edit("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
                  "cannot load model"),
        bad_model("no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "model", "tokenizer"),
        bad_model("tokenizer.json alone missing", without("tokenizer.json"), "cannot load model"),
        bad_model("tokenizer.json cut short", cut_short("tokenizer.json", 5000), "cannot load model"),
        bad_model("tokenizer.json that is a list", put("tokenizer.json", b"[]"), "cannot load model"),
        bad_model("tokenizer_config.json cut short", put("tokenizer_config.json", b"{"), "cannot load model"),
        bad_model("a tokenizer without padding", edit("tokenizer_config.json", pad_token=...),
                  "model has another model's tokenizer: no padding"),
        bad_model("a tokenizer of a larger vocabulary than the model's",
                  both(edit("config.json", vocab_size=5000), reweigh(few_embeddings)),
                  "model has another model's tokenizer: "),
        bad_model("no weights", without("model.safetensors"), "cannot load model", "no file named model.safetensors"),
        bad_model("weights cut short", cut_short("model.safetensors", 100_000), "cannot load model"),
        bad_model("an empty file of weights", put("model.safetensors", b""), "cannot load model"),
        bad_model("weights with a header of 2**63 bytes", put("model.safetensors", b"\xff" * 7 + b"\x7f" + b"{}"),
                  "cannot load model"),
        bad_model("a pointer file of Git LFS for weights",
                  put("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
                  "cannot load model"),
        bad_model("an index of weights that leads out of the folder",
                  both(without("model.safetensors"), put("model.safetensors.index.json", b'{"metadata": {}, '
                                                         b'"weight_map": {"a": "../../../etc/passwd"}}')),
                  "cannot load model"),
        bad_model("weights without a layer",
                  reweigh(lambda weights: {name: weights[name] for name in weights if ".layer.1." not in name}),
                  "model or its config.json lacks 16 weights of its encoder"),
        bad_model("weights of another vocabulary", reweigh(few_embeddings),
                  "model or its config.json lacks 1 weights of its encoder"),
        bad_model("weights that are NaN", reweigh(all_nan), "model gives no finite scores", left=("cache",),
                  **EVALUATION),
        bad_model("weights that are NaN, without evaluation", reweigh(all_nan), "training left no finite weights",
                  left=("cache", "unfinished_run")),
        fine_model("weights in fp16", reweigh(lambda weights: {name: each.half() for name, each in weights.items()}),
                   reference="model"),
        fine_model("names of weights with escape sequences",
                   reweigh(lambda weights: {**weights, "\x1b[2J\u202e": next(iter(weights.values())).clone()})),
        fine_model("pytorch_model.bin with plain weights", reweigh(dict, "pytorch_model.bin")),
        bad_model("pytorch_model.bin that needs more than weights_only",
                  reweigh(lambda weights: {**weights, "extra": MarksThatItRan()}, "pytorch_model.bin"),
                  "cannot load model", "Weights only load failed"),
        bad_model("pytorch_model.bin of a plain pickle",
                  both(without("model.safetensors"), put("pytorch_model.bin", pickle.dumps(MarksThatItRan()))),
                  "cannot load model", "Weights only load failed"),
        bad_model("pytorch_model.bin cut short",
                  both(reweigh(dict, "pytorch_model.bin"), cut_short("pytorch_model.bin", 100_000)),
                  "cannot load model"),
        fine_model("two labels: a new head", reweigh(two_labels),
                   "Not in model, so drawn with seed 42: classifier.out_proj.bias, classifier.out_proj.weight",
                   reference=None),
        fine_model("id2label of three names",
                   edit("config.json", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})),
        bad_model("an encoder-decoder", encoder_decoder,
                  "model is no BERT-family encoder with a fast tokenizer, but t5"),
        bad_model("an encoder-decoder of an unknown layout", edit("config.json", is_encoder_decoder=True),
                  "model is no BERT-family encoder with a fast tokenizer"),
        bad_model("a model type of its own code",
                  both(edit("config.json", model_type="theirs", **from_remote), put("theirs.py", REMOTE_CODE)),
                  "cannot load model", "trust_remote_code"),
        fine_model("a known model type with code of its own",
                   both(edit("config.json", **from_remote), put("theirs.py", REMOTE_CODE))),
        fine_model("a tokenizer with code of its own",
                   both(edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}),
                        put("theirs.py", REMOTE_CODE))),
        bad_model("code in another repository",
                  edit("config.json", model_type="theirs", auto_map={"AutoConfig": "someone/else--theirs.Theirs"}),
                  "cannot load model"),
        bad_model("an adapter of a model that is not here",
                  both(without("model.safetensors"), put("adapter_config.json", json.dumps(adapter).encode())),
                  "cannot load model"),
    ]


def cases():
    """All of them, by name."""
    found = [*data_cases(), *changing_files(), *settings_cases(), *model_cases()]
    assert len({case.name for case in found}) == len(found), "two cases of one name"
    return {case.name: case for case in found}


# ---- Running them ----------------------------------------------------------------------------------------------------
def snapshot(folder):
    """What a folder holds: {path: bytes of a file, else its kind}."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else path.lstat().st_mode
            for path in sorted(folder.rglob("*"))}  # fmt: skip


def in_child(script, case, folder, argv, limit):
    """main() as the last thing of a forked process; what it prints goes to folder/stdout and folder/stderr."""
    def refuse(*arguments, **options):
        print("ASKED FOR THE NETWORK", file=sys.stderr)
        raise OSError("no network here")

    status = 70
    try:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream)
        sys.stdout, sys.stderr = (open(each, "w", encoding="utf-8", errors="backslashreplace",
                                       buffering=1) for each in (1, 2))
        signal.alarm(limit)  # ends a run that hangs, in whatever it hangs
        resource.setrlimit(resource.RLIMIT_AS, (2**34,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder / "work")
        tempfile.tempdir = str(folder / "temporary")
        for name in ("connect", "connect_ex"):
            setattr(socket.socket, name, refuse)
        socket.getaddrinfo = socket.create_connection = refuse
        if case.meddle:
            case.meddle(script, folder / "work")
        sys.argv = ["train_bert_rerank.py", *argv]
        script.main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_case(script, case, limit=60):
    """Run a case: its exit status, the end of what it printed, its seconds and MB, and what is not as it should be."""
    settings = {**SMALL_RUN, **case.settings}
    argv = settings.pop("argv", []) + [f"--{key}={value}" for key, value in settings.items()]
    with tempfile.TemporaryDirectory() as name:
        folder, complaints = Path(name), []
        for each in ("work", "temporary"):
            (folder / each).mkdir()
        case.make(folder / "work")
        before, started = snapshot(folder / "work"), time.monotonic()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        child = os.fork()
        if not child:
            in_child(script, case, folder, argv, limit)
        _, status, usage = os.wait4(child, 0)
        seconds, memory = time.monotonic() - started, (usage.ru_maxrss * 1024 - resident) / 1e6
        status = os.waitstatus_to_exitcode(status)
        stdout, stderr = ((folder / each).read_bytes().decode(errors="surrogateescape") for each in ("stdout",
                                                                                                     "stderr"))
        output, after = stdout + stderr, snapshot(folder / "work")
        left = {path for path in {*after} ^ {*before} if path != "output" * bool(case.left) and not (
            path.startswith(tuple(f"output/{each}" for each in case.left)))} if status else {}
        errors = [found.start() for found in re.finditer("^(Error|train_bert_rerank.py: error): ", stderr, re.M)]
        said = stderr[errors[0] :] if errors else output
        bars = stderr.replace("\x1b[A", "").replace("\r", "")  # how tqdm moves; no text of a file comes before an error
        steers = CONTROL.findall(stdout) + CONTROL.findall(bars) + CONTROL.findall(said if errors else "")
        for complaint, is_so in {
            f"did not end in {limit} s": status == -signal.SIGALRM,
            f"exit status {status}, not {case.status}": status != case.status,
            "a traceback": "Traceback" in output,
            "not one line with 'Error: '": len(errors) != (status != 0),
            f"control characters printed: {ascii(steers[:5])}": steers,
            "asked for the network": "ASKED FOR THE NETWORK" in output and "hub" not in said,
            f"{memory:.0f} MB, more than {case.memory}": memory > case.memory,
            "code of the model ran": (folder / "work/the_code_ran").exists(),
            "left a temporary file": any((folder / "temporary").iterdir()),
            f"left or took away {sorted(left)[:5]}": left and not case.meddle or {*left} - {*before},
            "changed what was there": not case.meddle and any(after.get(key, it) != it for key, it in before.items()),
        }.items():
            complaints += [complaint] * bool(is_so)
        complaints += [f"does not say {piece!r}" for piece in case.said if piece not in said]
        if not complaints and case.check:
            try:
                wrong = case.check(folder / "work", output)
            except OSError as error:  # a result that is not there
                wrong = str(error)
            complaints += [wrong] if wrong else []
    return {"name": case.name, "status": status, "said": said.replace(f"{folder}/work/", ""), "seconds": seconds,
            "memory": memory, "complaints": complaints}


def load_script():
    """The script, imported once with all that a run imports later, and set up so that a process may be forked."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_ENDPOINT="http://127.0.0.1:9")
    os.environ.pop("HF_HUB_OFFLINE", None)
    sys.path.insert(0, str(ROOT))
    import matplotlib.figure  # noqa: F401  a run imports it where it draws

    import train_bert_rerank
    train_bert_rerank.BertRerankerModel.from_pretrained(str(TINY))
    gc.collect()
    gc.freeze()  # else each child's first collection copies all that the parent holds
    return train_bert_rerank


def main():
    """Run the cases named on the command line, or all, and print the table."""
    script, found = load_script(), cases()
    if sys.argv[1:] == ["--serve"]:  # for the tests: [name, changes] in, outcomes out, a line each
        for request in sys.stdin:
            name, changes = json.loads(request)
            case = found[name]._replace(settings={**found[name].settings, **changes})
            print(json.dumps(run_case(script, case)), flush=True)
        return
    started, failed = time.monotonic(), 0
    print("| case | exit status | what it says |\n| --- | --- | --- |")
    for name in sys.argv[1:] or found:
        outcome = run_case(script, found[name])
        said = outcome["said"] if outcome["status"] else "right: " + "; ".join(found[name].said or ["rows and scores"])
        if outcome["complaints"]:
            said = "**NOT AS EXPECTED** " + "; ".join(outcome["complaints"])
        said = " ".join(said.replace(f"{ROOT}/", "").replace(script.ADVICE, "").replace("|", "\\|").split())
        print(f"| {name} | {outcome['status']} | {said[:170]}{'…' * (len(said) > 170)} |", flush=True)
        failed += bool(outcome["complaints"])
    count = len(sys.argv[1:] or found)
    print(f"\n{count - failed} of {count} cases as expected, in {time.monotonic() - started:.0f} s.")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
