"""The data: what is read, what is refused and how that is said, what is warned of, what is held out."""

import gzip
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TINY, rows_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from train_bert_rerank import (
    ADVICE,
    NOT_THERE,
    ROW,
    RerankDataset,
    UserError,
    candidate_lists,
    check_rows,
    check_settings,
    fingerprints,
    load_data,
    load_file,
    read_rows,
)

GOOD = b'{"query": "q", "content": "c", "label": 1}'
GOOD_ROW = ("q", "c", 1)


@pytest.fixture
def read(tmp_path):
    """read(bytes) -> the (query, content, label) rows of a file that holds them."""

    def read(data, name="data.jsonl", min_label=0, max_label=1):
        (tmp_path / name).write_bytes(data)
        return [row[:3] for row in read_rows(str(tmp_path / name), min_label, max_label)]

    return read


@pytest.fixture
def dataset(tmp_path, reranker):
    """dataset(bytes, …) -> the RerankDataset of a file that holds them, tokenised afresh."""

    def dataset(data, name="eval", **changes):
        path, settings = tmp_path / "data.jsonl", check_settings({"output_dir": str(tmp_path / "out"), **changes})
        path.write_bytes(data)
        return RerankDataset(load_file(str(path), 0, settings)[0], [str(path)], name, reranker, settings)

    return dataset


def test_each_row_knows_its_file_and_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"\n\n" + b'{"query": "q", "pos": ["a", "b"], "neg": []}\n' + GOOD)
    rows, _ = load_file(str(path), 7, check_settings({}))
    assert rows[["file", "number", "line"]].tolist() == [(7, 0, 1), (7, 1, 3), (7, 2, 3), (7, 3, 4)]


def load(train_dataset, **settings):
    """load_data's answer for these settings: (query, content, label) rows to train and to evaluate on, checksums."""
    settings = check_settings({"train_dataset": train_dataset, **settings})
    *parts, paths, checksums = load_data(settings)
    texts = [RerankDataset.pairs(SimpleNamespace(rows=part, paths=paths, args=settings)) for part in parts]
    return *([(*pair, label) for pair, label in zip(*each, strict=True)]
             for each in zip(texts, (part["label"] for part in parts), strict=True)), checksums  # fmt: skip


def line(**changes):
    """The good line with some keys changed; None: without the key."""
    sample = {"query": "q", "content": "c", "label": 1, **changes}
    return json.dumps({key: value for key, value in sample.items() if value is not None}).encode()


def as_rows(rows):
    return [(row["query"], row["content"], row["label"]) for row in rows]


# ---- What is refused -------------------------------------------------------------------------------------------------
EMPTY = "give the query a text at least, or take the line out"
BAD_LINES = {
    "not_json": (b"query,content,1", "not JSON"),
    "json_cut_short": (b'{"query": "q", "content": "c', "not JSON"),
    "two_objects_in_a_line": (GOOD + GOOD, "not JSON"),
    "json_nested_too_deep": (b"[" * 100_000, "not JSON"),
    "a_list": (b'["q", "c", 1]', "not a JSON object"),
    "a_text": (b'"q"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "invalid_utf_8": (b'{"query": "\xff", "content": "c", "label": 1}', "UTF-8"),
    "gbk": ('{"query": "怎么退款", "content": "c", "label": 1}'.encode("gbk"), "UTF-8"),
    "lone_surrogate": (rb'{"query": "\ud83d", "content": "c", "label": 1}', "surrogates not allowed"),
    "query_missing": (line(query=None), "query is missing"),
    "query_null": (b'{"query": null, "content": "c", "label": 1}', "query is missing"),
    "query_blank": (line(query=" \t\u3000"), "query is blank"),
    "query_empty": (line(query=""), "query is blank"),
    "query_a_number": (line(query=7), "query is no text: 7"),
    "query_a_list": (line(query=["q"]), 'query is no text: ["q"]'),
    "query_invisible": (line(query="\u200b \u200e"), "query is blank"),
    "content_invisible": (line(content="\ufeff\u00a0"), "content is blank"),
    "pos_with_a_null": (b'{"query": "q", "pos": ["c", null]}', "content is missing (pos[1])"),
    "neg_with_a_blank": (b'{"query": "q", "pos": ["c"], "neg": [" "]}', "content is blank (neg[0])"),
    "neg_with_an_object": (
        b'{"query": "q", "pos": ["c"], "neg": [{"text": "d"}]}', 'content is no text: {"text": "d"} (neg[0])'),
    "content_missing": (line(content=None), "content is missing"),
    "content_blank": (line(content="\n"), "content is blank"),
    "content_an_object": (line(content={"text": "c"}), 'content is no text: {"text": "c"}'),
    "label_missing": (line(label=None), "label is missing"),
    "label_null": (b'{"query": "q", "content": "c", "label": null}', "label is missing"),
    "label_true": (line(label=True), "label is true: it should be a number"),
    "label_a_list": (line(label=[1]), "label is [1]: it should be a number"),
    "label_nan": (line(label=math.nan), "label nan is outside [0, 1]"),
    "label_infinite": (line(label=math.inf), "label inf is outside [0, 1]"),
    "label_minus_infinite": (line(label=-math.inf), "label -inf is outside [0, 1]"),
    "label_1e400": (b'{"query": "q", "content": "c", "label": 1e400}', "label inf is outside [0, 1]"),
    "label_too_large": (line(label=2), "label 2 is outside [0, 1] (min_label, max_label)"),
    "label_too_small": (line(label=-0.01), "label -0.01 is outside [0, 1] (min_label, max_label)"),
    "label_of_5000_digits": (b'{"query": "q", "content": "c", "label": ' + b"9" * 5000 + b"}", "not JSON"),
    "pos_a_text": (b'{"query": "q", "pos": "c", "neg": []}', "pos and neg should be lists"),
    "neg_a_number": (b'{"query": "q", "pos": ["c"], "neg": 0}', "pos and neg should be lists"),
    "pos_scores_a_number": (b'{"query": "q", "pos": ["c"], "pos_scores": 1}', "pos and neg should be lists"),
    "a_score_too_few": (
        b'{"query": "q", "pos": ["c", "d"], "neg": [], "pos_scores": [1], "neg_scores": []}', "a number for each text"),
    "pos_scores_alone": (b'{"query": "q", "pos": ["c"], "neg": ["d"], "pos_scores": [1]}', "a number for each text"),
    "a_score_above_1": (
        b'{"query": "q", "pos": ["c"], "neg": ["d"], "pos_scores": [1.5], "neg_scores": [0]}', "label 1.5 is outside"),
    "a_score_null": (
        b'{"query": "q", "pos": ["c"], "neg": ["d"], "pos_scores": [null], "neg_scores": [0]}', "label is missing"),
    "label_and_pos": (b'{"query": "q", "pos": ["c"], "label": 1}', "two shapes at once"),
    "pos_with_a_blank_text": (b'{"query": "q", "pos": ["c", " "]}', "content is blank"),
    "neg_with_a_number": (b'{"query": "q", "pos": ["c"], "neg": [3]}', "content is no text: 3"),
    "pos_and_neg_empty": (b'{"query": "q", "pos": [], "neg": []}', f"pos and neg are empty: {EMPTY}"),
    "pos_empty_and_neg_null": (b'{"query": "q", "pos": [], "neg": null}', f"pos and neg are empty: {EMPTY}"),
    "scores_alone_empty": (b'{"query": "q", "pos_scores": [], "neg_scores": []}', f"pos and neg are empty: {EMPTY}"),
    "hits_empty": (b'{"query": "q", "hits": []}', f"hits is empty: {EMPTY}"),
    "hits_of_texts": (b'{"query": "q", "hits": ["c"]}', "hits a list of"),
    "hits_an_object": (b'{"query": "q", "hits": {"content": "c", "label": 1}}', "hits a list of"),
    "a_hit_without_label": (b'{"query": "q", "hits": [{"content": "c"}]}', "label is missing"),
    "content_and_pos": (b'{"query": "q", "content": "c", "label": 1, "pos": ["c"]}', "two shapes at once"),
    "pos_and_hits": (b'{"query": "q", "pos": ["c"], "hits": [{"content": "c", "label": 1}]}', "two shapes at once"),
}


@pytest.mark.parametrize("bad, reason", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_refused_with_its_file_line_and_reason(read, tmp_path, bad, reason):
    with pytest.raises(UserError) as error:
        read(b"\n".join([GOOD, bad, GOOD]))
    [head, complaint, advice] = str(error.value).splitlines()
    assert advice == ADVICE
    assert head == f"{tmp_path / 'data.jsonl'}: 1 bad line"
    assert complaint.startswith("  line 2: ") and reason in complaint
    assert error.value.exit_status == 1


@pytest.mark.parametrize("sample, said", [
    ({"Query": "q", "content": "c", "label": 1}, 'query is missing: should "Query" read "query"?'),
    ({" query": "q", "content": "c", "label": 1}, 'query is missing: should " query" read "query"?'),
    ({"question": "q", "pos": ["c"]}, 'query is missing: should "question" read "query"?'),
    ({"querry": "q", "hits": [{"content": "c", "label": 1}]}, 'query is missing: should "querry" read "query"?'),
    ({"query": "q", "contents": "c", "label": 1}, 'content is missing: should "contents" read "content"?'),
    ({"id": 7, "query": "q", "text": "c", "label": 1}, 'content is missing: should "text" read "content"?'),
    ({"query": "q", "passage": "c", "content": None}, 'content is missing: should "passage" read "content"?'),
    ({"query": "q", "positive": ["c"], "negative": []}, 'content is missing: should "positive" read "pos"?'),
    ({"query": "q", "Hits": []}, 'content is missing: should "Hits" read "hits"?'),
    ({"query": "q", "content": "c", "score": 0.7}, 'label is missing: should "score" read "label"?'),
    ({"query": "q", "content": "c", "Label": 1}, 'label is missing: should "Label" read "label"?'),
    ({"query": "q", "hits": [{"text": "c", "label": 1}]}, 'content is missing: should "text" read "content"?'),
    ({"query": "q", "hits": [{"content": "c", "score": 1}]}, 'label is missing: should "score" read "label"?'),
])  # fmt: skip
def test_a_key_that_is_nearly_right_is_named_beside_the_one_that_is_missing(read, sample, said):
    with pytest.raises(UserError) as error:
        read(GOOD + b"\n" + json.dumps(sample).encode())
    assert str(error.value).splitlines()[1] == f"  line 2: {said}"
    with pytest.raises(UserError, match="\n  line 1: content is missing\n"):
        read(b'{"query": "q", "label": 1, "id": 3, "title": "t", "score": 2, "url": "u"}')


@pytest.mark.parametrize("text", ["1", "0.5", "relevant", ""])
def test_a_text_label_is_refused_with_the_advice_to_drop_the_quotes(read, text):
    with pytest.raises(UserError, match=re.escape(f"line 1: label is {json.dumps(text)}: drop the quotes")):
        read(line(label=text))


@pytest.mark.parametrize("low, high, label", [(1, 5, 0), (1, 5, 5.5), (-1, 1, -1.5), (0, 4, 5)])
def test_a_label_outside_of_the_scale_is_refused_with_the_scale(read, low, high, label):
    with pytest.raises(UserError, match=re.escape(f"line 1: label {label} is outside [{low}, {high}]")):
        read(line(label=label), min_label=low, max_label=high)


@pytest.mark.parametrize("data", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0)])
def test_a_file_without_rows_is_refused_with_what_a_line_should_read(dataset, tmp_path, data):
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}/data.jsonl: no rows. Each line should be "):
        dataset(data)


def test_a_missing_file_is_refused_by_its_name(tmp_path):
    path = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=f"^{re.escape(path)}: cannot be read: No such file or directory$"):
        load(path)


def test_a_folder_in_place_of_a_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}: cannot be read: no regular file: save"):
        load(str(tmp_path))


COMPRESSED = gzip.compress(b"\n".join([GOOD] * 200), mtime=0)
BROKEN_GZIP = {
    "cut_in_the_header": COMPRESSED[:5],
    "cut_in_the_data": COMPRESSED[: len(COMPRESSED) // 2],
    "cut_in_the_checksum": COMPRESSED[:-4],
    "wrong_checksum": COMPRESSED[:-8] + bytes(8),
    "wrong_method": b"\x1f\x8b\x07" + COMPRESSED[3:],
    "rubbish_behind_it": COMPRESSED + b"rubbish",
    "damaged_data": COMPRESSED[:12] + bytes([COMPRESSED[12] ^ 0xFF]) + COMPRESSED[13:],
    "damaged_further_on": COMPRESSED[:20] + bytes([COMPRESSED[20] ^ 0xFF]) + COMPRESSED[21:],
}


@pytest.mark.parametrize("data", BROKEN_GZIP.values(), ids=BROKEN_GZIP)
def test_a_broken_gzip_file_is_refused_by_its_name(read, tmp_path, data):
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}/data.jsonl: cannot be read: ."):
        read(data)


@pytest.mark.parametrize("paths", [[], "", ".", "/", [""], [1], [None, "a.jsonl"]], ids=repr)
def test_a_train_dataset_that_names_no_file_is_refused_as_the_mistake_it_is(paths):
    with pytest.raises(UserError):
        load(paths)


def test_all_bad_lines_are_counted_and_the_first_ten_shown_before_anything_is_written(
    run_main, monkeypatch, tmp_path
):
    kinds = [
        "not_json", "a_list", "invalid_utf_8", "query_missing", "query_blank", "content_a_number", "label_true",
        "label_missing", "label_nan", "pos_a_text", "label_too_large", "lone_surrogate",
    ]  # fmt: skip
    bad = [line(content=5) if kind == "content_a_number" else BAD_LINES[kind][0] for kind in kinds]
    (tmp_path / "bad_train.jsonl").write_bytes(b"\n".join([GOOD, *bad[:6], GOOD, *bad[6:]]))
    monkeypatch.chdir(tmp_path)
    options = ["--train_dataset", "bad_train.jsonl", "--output_dir", "output"]
    status, said = run_main("--model_name_or_path", TINY, *options)
    assert status == 1
    assert said.count("Error: ") == 1
    assert "Error: bad_train.jsonl: 12 bad lines\n" in said
    assert re.findall(r"^  line (\d+): .", said, re.M) == ["2", "3", "4", "5", "6", "7", "9", "10", "11", "12"]
    assert said.endswith(f"\n  … and 2 more\n{ADVICE}\n")
    assert os.listdir(tmp_path) == ["bad_train.jsonl"]


def test_a_bad_line_in_the_evaluation_file_or_a_second_train_file_names_that_file(write_jsonl):
    good, bad = write_jsonl("train.jsonl", rows_of(4)), write_jsonl("other.jsonl", [*rows_of(4), {"query": "q"}])
    for arguments in ({"train_dataset": good, "eval_dataset": bad}, {"train_dataset": [good, bad]}):
        with pytest.raises(UserError, match=f"^{re.escape(bad)}: 1 bad line\n  line 5: content is missing\n"):
            load(**arguments)


CHUNKS = st.one_of(
    st.just(GOOD),
    st.sampled_from([bad for bad, _ in BAD_LINES.values() if len(bad) < 200]),
    st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"")),
    st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=1)).map(
        lambda edit: (GOOD[: edit[0]] + edit[1] + GOOD[edit[0] + 1 :]).replace(b"\n", b"")
    ),
    st.text(max_size=20).map(lambda text: line(query=text) if text.isprintable() else b""),
)


@settings(max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(chunks=st.lists(CHUNKS, max_size=25))
@example(chunks=[b"\xef\xbb\xbf" + GOOD, b"\xef\xbb\xbf" + GOOD])
def test_any_bytes_give_rows_or_an_error_with_lines_that_exist(tmp_path, chunks):
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"\n".join(chunks))
    if path.read_bytes()[:2] == b"\x1f\x8b":
        return  # gzip has tests of its own
    try:
        rows = list(read_rows(str(path), 0, 1))
    except UserError as error:
        count = int(re.search(r"any\.jsonl: (\d+) bad line", str(error)).group(1))
        numbers = [int(number) for number in re.findall(r"^  line (\d+): ", str(error), re.M)]
        assert len(numbers) == min(count, 10) and numbers == sorted(set(numbers))
        assert all(1 <= number <= len(chunks) and chunks[number - 1].strip() for number in numbers)
        assert not any(chunks[number - 1] == GOOD for number in numbers)
    else:
        assert len(rows) >= chunks.count(GOOD)
        assert rows or not any(chunk.strip().removeprefix(b"\xef\xbb\xbf").strip() for chunk in chunks)
        for query, content, label, number in rows:
            assert query.strip() and content.strip() and 0 <= label <= 1 and chunks[number - 1].strip()


# ---- What is read ----------------------------------------------------------------------------------------------------
FINE_FILES = {
    "plain": b"\n".join([GOOD, GOOD, b""]),
    "byte_order_mark": b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD + b"\n",
    "crlf": GOOD + b"\r\n" + GOOD + b"\r\n",
    "blank_lines": b"\n\n" + GOOD + b"\n \t\r\n\n" + GOOD + b"\n\n\n",
    "no_last_newline": GOOD + b"\n" + GOOD,
    "spaces_around": b"  " + GOOD + b"\t\n" + GOOD + b"  \n",
    "gzip": gzip.compress(GOOD + b"\n" + GOOD + b"\n"),
    "gzip_with_byte_order_mark_and_crlf": gzip.compress(b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD),
    "gzip_in_two_members": gzip.compress(GOOD + b"\n" + GOOD[:9]) + gzip.compress(GOOD[9:]),
    "other_keys": b'{"id": 3, "query": "q", "content": "c", "label": 1, "source": "x"}\n' + GOOD,
}


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
@pytest.mark.parametrize("data", FINE_FILES.values(), ids=FINE_FILES)
def test_what_editors_and_other_systems_do_to_a_file_is_fine_and_gzip_is_known_by_its_content(read, data, name):
    assert read(data, name) == [GOOD_ROW, GOOD_ROW]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\u000b", "\u000c", "\u001e"])
def test_a_separator_inside_a_text_is_no_line_end(read, separator):
    text = f"one{separator}two"
    written = json.dumps({"query": text, "content": text, "label": 0}, ensure_ascii=separator < " ").encode()
    assert read(written + b"\n" + GOOD) == [(text, text, 0), GOOD_ROW]
    with pytest.raises(UserError, match="1 bad line\n  line 2: "):
        read(written + b"\n{}\n" + written)


@pytest.mark.parametrize(
    "low, high, labels, scaled",
    [
        (0, 1, [0, 1, 0.0, 1.0, 0.73, 1e-3], [0, 1, 0, 1, 0.73, 1e-3]),
        (0, 4, [0, 1, 2, 3, 4, 3.0], [0, 0.25, 0.5, 0.75, 1, 0.75]),
        (1, 5, [1, 2.5, 5], [0, 0.375, 1]),
        (-1, 1, [-1, 0, 1, -0.5], [0, 0.5, 1, 0.25]),
        (-10.5, 9.5, [-10.5, -0.5, 9.5], [0, 0.5, 1]),
    ],
)
def test_graded_and_soft_labels_are_scaled_linearly(dataset, low, high, labels, scaled):
    data = dataset(b"\n".join(line(label=label) for label in labels), min_label=low, max_label=high, max_len=64)
    assert data.rows["label"].tolist() == labels
    assert data.labels.tolist() == pytest.approx(scaled, abs=1e-7)


@pytest.mark.parametrize("low, high", [(0, 1), (0, 4), (-1, 1.5)])
def test_the_three_shapes_flatten_into_the_same_rows(read, low, high):
    flat = [{"query": "q", "content": text, "label": label} for text, label in zip("abcd", (high, high, low, low))]  # noqa: B905
    shapes = [
        flat,
        [{"query": "q", "pos": ["a", "b"], "neg": ["c", "d"]}],
        [{"query": "q", "pos": ["a", "b"]}, {"query": "q", "neg": ["c", "d"]}],
        [{"query": "q", "hits": [{"content": row["content"], "label": row["label"]} for row in flat]}],
        [flat[0], {"query": "q", "pos": ["b"], "neg": ["c"]}, {"query": "q", "hits": [flat[3]]}],
    ]
    for shape in shapes:
        assert read("\n".join(map(json.dumps, shape)).encode(), min_label=low, max_label=high) == as_rows(flat)


FLAG_EMBEDDING = [  # with the keys that its own examples carry, null where a data set's export has nothing
    {"query": "q", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [0.9], "neg_scores": [0.25, 0], "prompt": "x"},
    {"query": "q", "pos": ["d"], "neg": None, "pos_scores": None, "neg_scores": None, "type": "normal"},
    {"query": "q", "pos": [], "neg": ["e"], "pos_scores": [], "neg_scores": []},
]
RAG_RETRIEVAL = [
    {"query": "q", "content": "a", "label": 4},
    {"query": "q", "hits": [{"content": "b", "label": 2}, {"content": "c", "label": 0.0, "rank": 3}]},
]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("samples, high, rows, said", [
    (FLAG_EMBEDDING, 1, [("a", 0.9), ("b", 0.25), ("c", 0), ("d", 1), ("e", 0)],
     "2 × {query, pos, neg, pos_scores, neg_scores}, 1 × {query, pos}"),
    (RAG_RETRIEVAL, 4, [("a", 4), ("b", 2), ("c", 0.0)], "1 × {query, content, label}, 1 × {query, hits}"),
], ids=["FlagEmbedding", "RAG-Retrieval"])  # fmt: skip
def test_files_of_other_trainers_are_read_as_they_are_and_what_they_are_is_said(
    tmp_path, capsys, samples, high, rows, said, pack
):
    path = tmp_path / "theirs.jsonl"
    path.write_bytes(pack("\n".join(map(json.dumps, samples)).encode()))
    assert [row[1:3] for row in read_rows(str(path), 0, high)] == rows
    load_file(str(path), 0, check_settings({"max_label": high}))
    assert capsys.readouterr().out.splitlines()[0] == f"{path}: {said}"


FOREIGN = {
    "csv": b"query,content,label\nq,c,1\n",
    "other_keys": b'{"question": "q", "answer": "c"}\n',
    "parquet": b"PAR1" + bytes(20) + b"PAR1",
    "one_array": b'[{"query": "q", "content": "c", "label": 1}]',
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_shape_is_answered_with_the_command_that_converts_it(tmp_path, data):
    path = tmp_path / "my data.v2.csv"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        list(read_rows(str(path), 0, 1))
    command = f"python tools/convert_data.py '{path}' --output 'my data.v2_rows.jsonl'"
    assert str(error.value).endswith(command)
    path.write_bytes(GOOD + b"\n" + data)
    with pytest.raises(UserError) as error:
        list(read_rows(str(path), 0, 1))
    assert "convert_data" not in str(error.value), "a mistake in a file of ours is no other shape"


def test_a_data_sets_folder_is_answered_with_the_command_that_converts_it(tmp_path):
    with pytest.raises(UserError, match="no regular file.*\n.*python tools/convert_data.py .* --output .*_rows.jsonl$"):
        list(read_rows(str(tmp_path), 0, 1))


def test_the_checksum_is_that_of_the_text_plain_or_gzip(tmp_path):
    text = b"\xef\xbb\xbf" + GOOD + b"\r\n\n" + GOOD
    for name, data in (("plain.jsonl", text), ("packed.jsonl", gzip.compress(text))):
        (tmp_path / name).write_bytes(data)
        path = str(tmp_path / name)
        assert load(path)[2] == {path: hashlib.sha256(text).hexdigest()}


# ---- What is said ----------------------------------------------------------------------------------------------------
def test_the_label_distribution_of_the_default_data_is_printed_to_two_decimals(capsys):
    path = str(ROOT / "default_train_data.jsonl")
    load_file(path, 0, check_settings({}))
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"{path}: 198 × {{query, content, label}}", "----- Label Distribution -----", "Label 0.00: 99 (50.00%)",
        "Label 1.00: 99 (50.00%)",
    ]  # fmt: skip
    assert "Loading data" in said.err


def test_labels_that_print_alike_share_a_line_and_thirds_are_rounded(dataset, capsys):
    dataset(b"\n".join(line(label=label) for label in (0.731, 0.729, 1, 1.0, 0, 0.004)))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "Label 0.00: 2 (33.33%)", "Label 0.73: 2 (33.33%)", "Label 1.00: 2 (33.33%)",
    ]  # fmt: skip


def test_at_most_twenty_labels_are_listed_the_most_frequent_ones_in_ascending_order(dataset, capsys):
    labels = [index % 30 for index in range(70)]  # 0 to 9 three times, 10 to 29 twice
    dataset(b"\n".join(line(label=label) for label in labels), max_label=29)
    listed = capsys.readouterr().out.splitlines()[2:]
    assert len(listed) == 20
    assert listed[:10] == [f"Label {label:.2f}: 3 (4.29%)" for label in range(10)]
    assert listed == sorted(listed, key=lambda text: float(text.split()[1].rstrip(":")))


def test_small_negative_labels_do_not_print_a_negative_zero(dataset, capsys):
    dataset(b"\n".join(line(label=label) for label in (-0.001, 1)), min_label=-1)
    assert "Label 0.00: 1 (50.00%)" in capsys.readouterr().out


TWO = [("q", "relevant", 1), ("q", "irrelevant", 0)]
WARNINGS = {
    "clean": (TWO, [("r", "relevant", 1)], []),
    "duplicates": ([*TWO, TWO[0], TWO[0], TWO[1]], [], ["3 train rows are exact duplicates of others"]),
    "contradictions": (
        [*TWO, ("q", "irrelevant", 1), ("q", "irrelevant", 0.5), ("q", "relevant", 0), ("r", "relevant", 0)], [],
        ["2 train pairs have contradicting labels"],
    ),
    "shared_queries": (
        [*TWO, ("r", "x", 1), ("s", "x", 0)], [("q", "other", 1), ("q", "another", 1), ("s", "x", 0)],
        ["2 queries are in both train and eval data"],
    ),
    "one_label_only": (
        [("q", "a", 1), ("r", "b", 1), ("s", "c", 1.0)], [],
        ["3 train rows, all there are, have one and the same label"],
    ),
    "far_more_irrelevant": (
        [("q", "relevant", 1), *[("q", f"irrelevant {index}", 0.4) for index in range(20)]], [],
        ["21 train rows have only 1 relevant ones among them"],
    ),
    "nineteen_to_one_is_no_warning": (
        [("q", "relevant", 1), *[("q", f"irrelevant {index}", 0.4) for index in range(19)]], [], [],
    ),
    "several_at_once": (
        [TWO[0], TWO[0]], [TWO[0]],
        [
            "1 train rows are exact duplicates of others", "1 queries are in both train and eval data",
            "2 train rows, all there are, have one and the same label",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("train_rows, eval_rows, warnings", WARNINGS.values(), ids=WARNINGS)
def test_what_is_seldom_meant_is_warned_of_with_its_count(capsys, train_rows, eval_rows, warnings):
    check_rows(*(np.array([(0, number, number + 1, *fingerprints(*pair), label, *NOT_THERE) for number, (*pair, label)
                           in enumerate(rows)], dtype=ROW) for rows in (train_rows, eval_rows)), 0.5)  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [f"Warning: {warning}." for warning in warnings]


# The ways in which exports, forms and keyboards write one query, and a person sees no difference.
ONE_QUERY = "Café S35 怎么重置"
SPELLINGS = {
    "space_behind": f"{ONE_QUERY} ",
    "spaces_before": f"  {ONE_QUERY}",
    "no_break_space": ONE_QUERY.replace(" ", "\u00a0"),
    "ideographic_space": ONE_QUERY.replace(" ", "\u3000"),
    "two_spaces": ONE_QUERY.replace(" ", "  "),
    "carriage_return": f"{ONE_QUERY}\r",
    "line_separator": ONE_QUERY.replace(" ", "\u2028"),
    "tab_and_line_end": f"\t{ONE_QUERY}\n",
    "zero_width_space": f"{ONE_QUERY}\u200b",
    "zero_width_joiner": f"\u200d{ONE_QUERY}",
    "byte_order_mark": f"\ufeff{ONE_QUERY}",
    "soft_hyphen": ONE_QUERY.replace("f", "f\u00ad"),
    "direction_marks": f"\u202a{ONE_QUERY}\u202c\u200e",
    "word_joiner": ONE_QUERY.replace("重", "\u2060重"),
    "variation_selector": f"{ONE_QUERY}\ufe0f",
    "null_character": f"{ONE_QUERY}\x00",
    "nfd": unicodedata.normalize("NFD", ONE_QUERY),
    "nfd_that_a_zero_width_space_parts": ONE_QUERY.replace("é", "e\u200b\u0301"),
    "several_at_once": f" \ufeff{unicodedata.normalize('NFD', ONE_QUERY)}\u200b\r\n",
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_a_query_is_one_query_in_whichever_way_it_is_written_and_its_pair_is_told_apart(spelling):
    plain, written = fingerprints(ONE_QUERY, "c"), fingerprints(spelling, "c")
    assert written[0] == plain[0] and written[1] != plain[1]


@pytest.mark.parametrize("other", [
    "café S35 怎么重置", "Cafe S35 怎么重置", "Café S35怎么重置", "CaféS35 怎么重置", "Café Ｓ35 怎么重置",
    "Café S³5 怎么重置", "Café S35 怎麼重置", "Café S35 怎么重置？", "Café S35 怎么重置 \u0601",
    "Café S35 怎么重置\u3164",
])  # fmt: skip
def test_queries_that_differ_to_the_eye_are_two_as_well_where_they_are_written_with_a_space_behind(other):
    assert fingerprints(f"{other} ", "c")[0] == fingerprints(other, "c")[0] != fingerprints(ONE_QUERY, "c")[0]


def test_flags_that_differ_in_their_tags_alone_are_two_queries_with_a_selector_or_without():
    tags = {chr(code): chr(0xE0000 + code) for code in range(128)}
    england, scotland = ("🏴" + "".join(map(tags.get, region)) for region in ("gbeng\x7f", "gbsct\x7f"))
    assert fingerprints(f"{england}\ufe0f", "c")[0] == fingerprints(england, "c")[0] != fingerprints(scotland, "c")[0]


def spelled(rows, spellings):
    """The rows, each with its query in the next of the `spellings`, which are formats."""
    forms = cycle(spellings)
    return [{**row, "query": next(forms).format(row["query"])} for row in rows]


def test_rows_of_a_query_are_one_candidate_list_and_held_out_together_in_whichever_way_it_is_written(
    write_jsonl, capsys
):
    rows = rows_of(120, queries=40)
    plain, *_ = load(write_jsonl("plain.jsonl", rows), eval_proportion=0.25)
    assert "written in several ways" not in capsys.readouterr().out
    path = write_jsonl("data.jsonl", spelled(rows, ["{}", "{} ", "\u3000{}\u200b"]))
    settings = check_settings({"train_dataset": path, "eval_proportion": 0.25})
    train_rows, eval_rows, *_ = load_data(settings)
    said = capsys.readouterr().out
    assert len(np.unique(train_rows["query"])) == 30 and len(np.unique(eval_rows["query"])) == 10
    assert not np.isin(eval_rows["query"], train_rows["query"]).any()
    assert [rows[number]["query"] for number in train_rows["number"]] == [query for query, *_ in plain], "the same draw"
    lists = candidate_lists(eval_rows["query"].tolist(), eval_rows["label"])
    assert [len(list_of_query) for list_of_query in lists["all"]] == [3] * 10
    assert "Warning: 40 of 40 queries are written in several ways (120 in all), which differ in white space, " in said
    [places] = re.findall(r"Unicode form alone \((.*), for one\): each counts as one query\.", said)
    lines = [int(number) for number in re.findall(rf"line (\d+) of {re.escape(path)}", places)]
    assert len(lines) == 2 and (lines[0] - lines[1]) % 40 == 0


def test_a_query_that_is_written_one_way_in_train_and_another_in_eval_data_is_warned_of_as_in_both(
    write_jsonl, capsys
):
    rows = rows_of(20, queries=10)
    settings = check_settings({
        "train_dataset": write_jsonl("train.jsonl", rows),
        "eval_dataset": write_jsonl("other.jsonl", spelled(rows[:6], ["{}\u00a0"])),
    })  # fmt: skip
    train_rows, eval_rows, *_ = load_data(settings)
    check_rows(train_rows, eval_rows, 0.5)
    said = capsys.readouterr().out
    assert "Warning: 6 queries are in both train and eval data.\n" in said
    assert "Warning: 6 of 10 queries are written in several ways (12 in all), " in said


def test_of_a_list_of_files_the_ways_to_write_a_query_are_counted_over_all_of_them(write_jsonl, capsys):
    rows = rows_of(8, queries=4)
    paths = [write_jsonl("a.jsonl", rows), write_jsonl("b.jsonl", spelled(rows, ["{}\n"]))]
    load_data(check_settings({"train_dataset": paths, "eval_dataset": None}))
    said = capsys.readouterr().out
    assert "Warning: 4 of 4 queries are written in several ways (8 in all), " in said
    assert all(path in said.partition("Unicode form alone")[2] for path in paths)


def test_pairs_and_queries_that_max_len_truncates_are_counted_as_the_tokenizer_counts_them(reranker, dataset, capsys):
    rows = [("问" * (1 + 3 * index % 29), "答" * (1 + 7 * index % 31), index % 2) for index in range(100)]
    max_len, sizes = 24, []
    for query, content, _ in rows:
        encoded = reranker.tokenizer(query, content)
        sizes.append((len(encoded["input_ids"]), encoded.sequence_ids().count(0)))
    special = reranker.tokenizer.num_special_tokens_to_add(pair=True)
    cut = sum(size > max_len for size, _ in sizes)
    query_cut = sum(size > max_len and query >= max_len - special for size, query in sizes)
    assert 0 < query_cut < cut < 100
    data = b"\n".join(line(query=query, content=content, label=label) for query, content, label in rows)
    expected = (f"Warning: max_len truncates {cut} eval pairs ({cut}.00%), in {query_cut} the query too; "
                "--long_documents best_passage scores all of a document.\n")  # fmt: skip
    for _ in range(2):  # the second time from the cache
        dataset(data, max_len=max_len)
        assert capsys.readouterr().out.endswith(expected)
    dataset(data, max_len=128)
    assert "Warning" not in capsys.readouterr().out


# ---- What is held out ------------------------------------------------------------------------------------------------
def test_the_file_with_eval_for_train_in_its_name_beside_the_train_file_is_taken(write_jsonl, capsys):
    train, sibling = write_jsonl("my_train_1.jsonl", rows_of(4)), write_jsonl("my_eval_1.jsonl", rows_of(6, queries=3))
    train_rows, eval_rows, checksums = load(train)
    assert (train_rows, eval_rows) == (as_rows(rows_of(4)), as_rows(rows_of(6, queries=3)))
    assert list(checksums) == [train, sibling]
    assert f"Evaluating on 3 queries (6 rows) of {sibling}." in capsys.readouterr().out


def test_a_folder_named_train_is_no_reason_to_look_elsewhere(tmp_path, write_jsonl, capsys):
    for folder in ("train", "eval"):
        (tmp_path / folder).mkdir()
        write_jsonl(f"{folder}/data.jsonl", rows_of(20))
    load(str(tmp_path / "train" / "data.jsonl"))
    assert "held out of the train data" in capsys.readouterr().out


@pytest.mark.parametrize("proportion, count", [(0.1, 2), (0.5, 10), (0.01, 1), (1, 19)])
def test_without_a_file_beside_it_that_share_of_the_queries_is_held_out_by_query_never_by_row(
    write_jsonl, capsys, proportion, count
):
    rows = rows_of(95, queries=20)
    train_rows, eval_rows, _ = load(write_jsonl("train.jsonl", rows), eval_proportion=proportion)
    train_queries, eval_queries = ({query for query, *_ in part} for part in (train_rows, eval_rows))
    assert len(eval_queries) == count and not train_queries & eval_queries
    assert Counter(train_rows + eval_rows) == Counter(as_rows(rows))
    assert train_rows == [row for row in as_rows(rows) if row[0] in train_queries], "the order of the file is kept"
    expected = f"Evaluating on {count} queries ({len(eval_rows)} rows) held out of the train data."
    assert capsys.readouterr().out.splitlines()[-1] == expected


def test_of_a_list_of_paths_queries_are_held_out_over_all_files(write_jsonl):
    first, second = write_jsonl("a_train.jsonl", rows_of(10)), write_jsonl("b_train.jsonl", rows_of(40, queries=20))
    write_jsonl("a_eval.jsonl", rows_of(4))
    write_jsonl("b_eval.jsonl", rows_of(4))
    train_rows, eval_rows, checksums = load([first, second])
    assert list(checksums) == [first, second]
    assert len({query for query, *_ in eval_rows}) == 2
    assert Counter(train_rows + eval_rows) == Counter(as_rows(rows_of(10) + rows_of(40, queries=20)))


def test_a_named_evaluation_file_is_taken_whatever_stands_beside_the_train_file(write_jsonl, capsys):
    write_jsonl("eval.jsonl", rows_of(4))
    train, other = write_jsonl("train.jsonl", rows_of(4)), write_jsonl("other.jsonl", rows_of(7))
    assert load(train, eval_dataset=other)[1] == as_rows(rows_of(7))
    assert f"Evaluating on 7 queries (7 rows) of {other}." in capsys.readouterr().out


@pytest.mark.parametrize("rows, choice", [(20, {"eval_dataset": None}), (20, {"eval_proportion": 0}), (1, {})])
def test_where_nothing_is_evaluated_all_rows_are_trained_on_and_nothing_is_claimed(write_jsonl, capsys, rows, choice):
    train_rows, eval_rows, _ = load(write_jsonl("data.jsonl", rows_of(rows)), **choice)
    assert (len(train_rows), eval_rows) == (rows, [])
    assert "No evaluation: nothing will be claimed" in capsys.readouterr().out


def test_what_is_held_out_depends_on_the_seed_and_on_nothing_else(write_jsonl):
    path = write_jsonl("train.jsonl", rows_of(200, queries=50))
    held_out = {seed: load(path, seed=seed)[1] for seed in (0, 1, 42)}
    assert len({str(rows) for rows in held_out.values()}) == 3
    code = (
        "import sys, json, train_bert_rerank as script\n"
        "settings = script.check_settings({'train_dataset': sys.argv[1], 'epochs': 7, 'max_len': 33})\n"
        "print(json.dumps(script.load_data(settings)[1]['number'].tolist()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code, path], env=environment, stdout=subprocess.PIPE, check=True)
    rows = as_rows(rows_of(200, queries=50))
    assert [rows[number] for number in json.loads(answer.stdout.splitlines()[-1])] == held_out[42]
    assert load(path, seed=42)[1] == held_out[42]
