"""Bad input ends in one message or in the right result, and nothing out of a file or a model folder gets to act."""

import ast
import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, rows_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

import train_bert_rerank
from train_bert_rerank import UserError, printable, read_rows


def load_benchmark():
    spec = importlib.util.spec_from_file_location("bad_input", ROOT / "benchmarks" / "bad_input.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bad_input = load_benchmark()
CASES = bad_input.cases()
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the battery forks and asks /proc")


@pytest.fixture(scope="module")
def run():
    """run(name, **changes of settings) -> outcome of a case, in a process that has done the imports once."""
    command = [sys.executable, str(ROOT / "benchmarks" / "bad_input.py"), "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          encoding="utf-8") as server:  # fmt: skip
        def run(name, **changes):
            print(json.dumps([name, changes]), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield run
        server.stdin.close()


# ---- The battery -----------------------------------------------------------------------------------------------------
# Each shows at another place, or in another spelling, what a case of the default run shows.
REPEATS = (
    "a list of a name in GBK and another", "hits that are one hit", "pos that is null, and neg a text",
    "querry for query", "passage for content", "Label, and a space, for label",
    "one query, once with a no-break space", "one query, once with a carriage return behind",
    "one query, once with a wide space", "one query, once with a zero-width space in it",
    "one query, once with a byte-order mark", "two queries, by a wide letter", "two queries, by a space",
    "two queries, by the tags of a flag", "queries of one label each", "hit@1 as the metric",
    "a data file whose name looks like a list", "NONE and null for what may be None", "a ~ behind a =",
    "a cross-encoder of sentence-transformers", "a DeBERTa without its tokenizer",
    "fewer layers than the weights of a EuroBERT", "a YOSO, which hashes at random", "WORLD_SIZE=two",
    "DeepSpeed of accelerate config, off", "a file system that flushes nothing", "a disk that is full",
    "no memory to map a file into",
)  # fmt: skip


def each_case():
    """The cases, with the marks of those that are slow."""
    for name in CASES:
        marks = [pytest.mark.slow] if name in REPEATS else []
        if "EuroBERT" in name and "eurobert" not in CONFIG_MAPPING:
            marks.append(pytest.mark.skip(reason="transformers knows no EuroBERT before 5"))
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [*each_case()])
def test_bad_input_ends_in_one_clear_message_or_the_right_result(run, name):
    outcome = run(name)
    assert outcome["complaints"] == [], outcome["said"]


def test_the_battery_is_as_large_as_promised_and_has_refusals_and_right_results():
    statuses = [case.status for case in CASES.values()]
    assert len(statuses) >= 300 and {0, 1, 2} == {*statuses} and statuses.count(0) >= 70
    assert CASES.keys() >= {*REPEATS}


# ---- The battery can fail --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, changes, complaint", [
    ("a model type of its own code", {"trust_remote_code": True}, "code of the model ran"),
    ("a model type of its own code", {"model_name_or_path": "nowhere/at-all"}, "does not say 'cannot load model'"),
    ("UTF-8 with a byte-order mark", {"max_len": 8}, "scores are "),
    ("UTF-8 with a byte-order mark", {"output_dir": "elsewhere"}, "[Errno 2] No such file or directory: "),
    ("one row", {"eval_dataset": "train.jsonl", "batch_size": 1}, "exit status 2, not 0"),
    ("max_len of 8", {"eval_dataset": "train.jsonl"}, "output_dir holds "),
    ("a line of 10 MB", {"max_len": 7}, "exit status 2, not 0"),
    ("RANK=1 alone", {"seed": 7}, "weights are others than usual"),
    ("a head on the mean of all tokens, by code of its own", {"trust_remote_code": False}, "scores are "),
    ("too few relevant rows for a verdict", {"eval_dataset": None}, "does not say 'Verdict: too few relevant rows"),
    ("a data file with a name in GBK", {"output_dir": "output/again"}, "[Errno 2] No such file or directory: "),
])  # fmt: skip
def test_what_a_case_looks_at_shows_where_it_is_not_as_expected(run, name, changes, complaint):
    assert any(each.startswith(complaint) for each in run(name, **changes)["complaints"])


def test_the_pickles_of_the_battery_would_act_if_they_were_unpickled(tmp_path, monkeypatch):
    import pickle

    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(bad_input.MarksThatItRan())
    assert os.listdir() == []
    pickle.loads(data)
    assert os.listdir() == ["the_code_ran"]


# ---- The reader ------------------------------------------------------------------------------------------------------
GOOD = b'{"query": "q", "content": "c", "label": 1}'
FUZZ = settings(max_examples=400, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(HealthCheck))  # fmt: skip
AROUND_GOOD_LINES = st.lists(
    st.one_of(
        st.just(GOOD), st.just(b"\n"), st.just(b"\n" + GOOD + b"\n"), st.just(b"\r\n"), st.just(b"\xef\xbb\xbf"),
        st.just(b'{"query": "q", "pos": ["a", "b"], "neg": ["c"]}'), st.just(b'"label": 2'), st.binary(max_size=12),
    ), max_size=30,
).map(b"".join)  # fmt: skip


def outcome_of(path, data):
    """What the reader makes of a file: ("rows", rows), ("bad", {line: reason}) or ("unreadable", reason)."""
    path.write_bytes(data)
    try:
        return "rows", list(read_rows(str(path), 0, 1))
    except UserError as error:
        message = str(error)
    if message.startswith(f"{path}: cannot be read: "):
        return "unreadable", message
    head, *lines = message.split("\n")
    bad = dict(re.fullmatch(r"  line (\d+): (.+)", line).groups() for line in lines if line.startswith("  line "))
    count = int(re.fullmatch(rf"{re.escape(str(path))}: (\d+) bad lines?", head)[1])
    assert len(bad) == min(count, 10) and count >= 1
    return "bad", {int(number): reason for number, reason in bad.items()}


def line_by_line(path, data):
    """The same answer, put together from each line as a file of its own."""
    rows, bad = [], {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        start = b"" if number == 1 or not line.startswith(b"\xef\xbb\xbf") else b" "  # a mark only at a file's start
        kind, found = outcome_of(path, start + line if line[:2] != b"\x1f\x8b" else b" " + line)
        rows += [(*row[:3], number) for row in found] if kind == "rows" else []
        bad |= {number: found[1]} if kind == "bad" else {}
    return ("bad", dict(list(bad.items())[:10])) if bad else ("rows", rows)


@FUZZ
@given(data=st.one_of(st.binary(max_size=300), AROUND_GOOD_LINES))
@example(data=b"\xef\xbb\xbf" + GOOD + b"\n\n\xef\xbb\xbf" + GOOD)
@example(data=GOOD + b"\r" + GOOD + b"\n\x00\n" + GOOD)
@example(data=b"{}\n" * 12 + GOOD)
def test_any_bytes_give_the_rows_of_each_line_or_each_bad_line_by_its_own_number(tmp_path, data):
    path = tmp_path / "any.jsonl"
    if data[:2] == b"\x1f\x8b":
        data = b" " + data
    assert outcome_of(path, data) == line_by_line(path, data)


@FUZZ
@given(data=st.one_of(st.binary(max_size=300), AROUND_GOOD_LINES), level=st.integers(0, 9), split=st.integers(0, 300))
def test_compressed_bytes_in_one_or_two_members_give_what_the_bytes_give(tmp_path, data, level, split):
    path = tmp_path / "any.jsonl"
    data = b" " + data if data[:2] == b"\x1f\x8b" else data
    zipped = gzip.compress(data[:split], level, mtime=0) + gzip.compress(data[split:], level, mtime=0)
    assert outcome_of(path, zipped) == outcome_of(path, data)


@FUZZ
@given(edits=st.lists(st.tuples(st.integers(0, 120), st.binary(max_size=3)), max_size=4), cut=st.integers(2, 200))
def test_damaged_compressed_bytes_give_what_gzip_gives_or_an_error_that_names_the_file(tmp_path, edits, cut):
    path = tmp_path / "any.jsonl"
    data = bytearray(gzip.compress(b"\n".join([GOOD, b"{}", bytes(range(40, 90)), GOOD]), mtime=0))
    for place, change in edits:
        data[place + 2 : place + 2 + len(change)] = change
    data = bytes(data[:cut])
    try:
        plain = gzip.decompress(data)
    except Exception:
        assert outcome_of(path, data)[0] == "unreadable"
    else:
        assert outcome_of(path, data) == line_by_line(path, plain)


def test_the_longest_line_is_read_and_one_byte_more_is_refused_by_its_number(tmp_path, monkeypatch):
    path, longest = tmp_path / "any.jsonl", GOOD[:-1] + b" " * 158 + b"}"
    monkeypatch.setattr(train_bert_rerank, "LONGEST_LINE", len(longest))
    for opener in (open, gzip.open):
        with opener(path, "wb") as file:
            file.write(GOOD + b"\n\n" + longest)
        assert [number for *_, number in read_rows(str(path), 0, 1)] == [1, 3]
        with opener(path, "wb") as file:
            file.write(b"\n" + longest + b" \n" + GOOD)
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}: line 2 is longer than "):
            list(read_rows(str(path), 0, 1))


# ---- The terminal ----------------------------------------------------------------------------------------------------
@FUZZ
@given(text=st.text(st.characters()))  # all code points, surrogates too
def test_printed_text_holds_no_control_character_and_is_else_as_it_was(text):
    shown = printable(text)
    assert not bad_input.CONTROL.search(shown)
    assert shown == text or not text.isprintable()
    assert shown.encode("utf-8").decode("utf-8") == shown


@pytest.mark.parametrize("text", ["查询：怎么退款？", "שלום", "مرحبا", "👍🏽", "naïve → “…”", "two\nlines", ""])
def test_ordinary_text_of_any_script_is_printed_as_it_is(text):
    assert printable(text) == text


# ---- Network, remote code, pickle, shell -----------------------------------------------------------------------------
WITHOUT_NETWORK = """
import json, runpy, socket, sys

def refuse(*arguments, **options):
    print("ASKED FOR THE NETWORK", flush=True)
    raise OSError("no network here")

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse)
script, *runs = sys.argv[1:]
for arguments in map(json.loads, runs):
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    print("IT ENDED", flush=True)
"""


def run_without_network(folder, *runs):
    """CompletedProcess of runs with these settings, one after the other, in one process."""
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "huggingface")}
    arguments = [json.dumps([f"--{key}={value}" for key, value in settings.items()]) for settings in runs]
    return subprocess.run([sys.executable, "-c", WITHOUT_NETWORK, str(ROOT / "train_bert_rerank.py"), *arguments],
                          cwd=folder, env=environment, timeout=300, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, encoding="utf-8")  # fmt: skip


def test_a_whole_run_with_a_local_model_asks_for_no_network(small_model, write_jsonl, tmp_path):
    options = {"train_dataset": write_jsonl("train.jsonl", rows_of(40, 20)), "epochs": 1, "mixed_precision": "no"}
    done = run_without_network(tmp_path, {"model_name_or_path": small_model, "output_dir": "output", **options},
                               {"model_name_or_path": "someone/elses", "output_dir": "other", **options})
    local, ended, other = done.stdout.partition("IT ENDED")
    assert ended and "Verdict: " in local, done.stdout
    assert "ASKED FOR THE NETWORK" not in local
    assert done.returncode == 1 and "ASKED FOR THE NETWORK" in other, "it would have been seen"


def test_the_script_holds_no_pickle_no_shell_and_one_eval_which_is_of_its_own_source():
    tree = ast.parse(Path(train_bert_rerank.__file__).read_text(encoding="utf-8"))
    imported = {alias.name.partition(".")[0] for node in ast.walk(tree) for alias in getattr(node, "names", [])
                if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert not imported & {"pickle", "marshal", "shelve", "joblib", "dill", "pty", "runpy", "code"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [ast.unparse(call.func) for call in calls]
    assert names.count("eval") == 1 and "eval(compile(ast.Expression(value)" in ast.unparse(tree)
    assert not {"exec", "os.system", "os.popen", "np.load", "__import__"} & {*names}
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert loads and all("weights_only=True" in map(ast.unparse, call.keywords) for call in loads)
    assert not any(keyword.arg in ("shell", "allow_pickle") for call in calls for keyword in call.keywords)
    started = [call for call in calls if re.match(r"subprocess\.(?!list2)", ast.unparse(call.func))]
    assert [ast.unparse(call).partition(", ")[0] for call in started] == ["subprocess.run(command"]
    assert "command = ['git', " in ast.unparse(tree), "a list"
