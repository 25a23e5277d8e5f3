"""tools/mine_hard_negatives.py: its candidates are those of other libraries, its filters do what they say, and a run
that was killed gives the same bytes."""

import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

sys.path.insert(0, str(ROOT / "tools"))
import mine_hard_negatives as miner  # noqa: E402
import retrieval  # noqa: E402

from train_bert_rerank import BertRerankerModel  # noqa: E402

ROWS = [json.loads(line) for line in (ROOT / "default_train_data.jsonl").read_text("utf-8").splitlines()]
POSITIVES = [row for row in ROWS if row["label"] == 1][:10]
DOCUMENTS = list(dict.fromkeys(row["content"] for row in ROWS))
ENGLISH = [each for each in (ROOT / "README.md").read_text("utf-8").split("\n\n") if len(re.findall(r"\w+", each)) > 7]
ALL = "--num_negatives", 20, "--range_max", 20, "--relative_margin", None  # every candidate that is not known


@pytest.fixture
def mine(tmp_path, write_jsonl, monkeypatch, capsys):
    """mine(name, rows, documents, *arguments) -> (negatives of each query, what was printed) of the tool's main()."""

    def run(name, rows, documents, *arguments):
        corpus = documents if isinstance(documents, str) else write_jsonl(
            "corpus.jsonl", [{"text": each} for each in documents])  # fmt: skip
        output = tmp_path / name
        output.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", [
            "tool", write_jsonl("rows.jsonl", rows), "--corpus", corpus, "--output", str(output),
            "--model_name_or_path", TINY, "--language", "zh", *map(str, arguments)])  # fmt: skip
        miner.main()
        text = (gzip.decompress(output.read_bytes()) if name.endswith(".gz") else output.read_bytes()).decode()
        written, negatives = [json.loads(line) for line in text.splitlines()], {}
        given = Counter(json.dumps(row) for row in rows)
        for row in written:
            if given[json.dumps(row)]:
                given[json.dumps(row)] -= 1
            else:
                assert row["label"] == 0
                negatives.setdefault(row["query"], []).append(row["content"])
        assert not given.total(), "rows of the input are missing in the output"
        return negatives, capsys.readouterr().out

    return run


@pytest.mark.parametrize("language", ["zh", "en"])
def test_bm25_ranks_as_another_implementation(language):
    """rank_bm25 with Lucene's idf gives the same scores, so the same ranking up to ties; its own variant, which differs
    for words in over half the documents, finds the known document about as often."""
    from rank_bm25 import BM25Okapi

    tokenize, draw = retrieval.tokenizer_of(language), random.Random(0)
    documents = DOCUMENTS if language == "zh" else ENGLISH
    queries, known = [row["query"] for row in ROWS], [DOCUMENTS.index(row["content"]) for row in ROWS]
    if language == "en":
        known = draw.choices(range(len(ENGLISH)), k=60)
        queries = [" ".join(draw.sample(re.findall(r"\w+", ENGLISH[number]), 5)) for number in known]
    else:
        known = [number for number, row in zip(known, ROWS, strict=True) if row["label"] == 1]
        queries = [row["query"] for row in ROWS if row["label"] == 1]
    found = retrieval.bm25_candidates(documents, queries, tokenize, 10)
    ours = [ranking.numbers for ranking in found]
    other = BM25Okapi(list(map(tokenize, documents)), k1=1.5, b=0.75)
    theirs = [np.argsort(-other.get_scores(tokenize(query)), kind="stable")[:10] for query in queries]
    recalls = [np.mean([number in numbers for number, numbers in zip(known, each, strict=True)])
               for each in (ours, theirs)]  # fmt: skip
    assert recalls[0] > 0.6 and abs(recalls[0] - recalls[1]) < 0.08
    containing = Counter(term for each in other.doc_freqs for term in each)
    other.idf = {term: math.log(1 + (len(documents) - count + 0.5) / (count + 0.5))
                 for term, count in containing.items()}  # fmt: skip
    for query, (numbers, _) in zip(queries, found, strict=True):
        scores = other.get_scores(tokenize(query))
        expected = np.sort(scores[scores > 0])[::-1][:10]
        assert len(set(numbers)) == len(numbers) == len(expected)
        np.testing.assert_allclose(scores[numbers], expected, rtol=1e-5)


def test_words_are_stems_and_those_of_jieba():
    """Punctuation is no word, and case does not count."""
    assert retrieval.tokenizer_of("en")("Wings, fluttering") == ["wing", "flutter"]
    assert retrieval.tokenizer_of("zh")("清洗 S21 的滤网。") == ["清洗", "s21", "的", "滤网"]


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_embedding_candidates_are_those_of_a_full_search(monkeypatch, chunk):
    """Whether the corpus is embedded in one go or in pieces."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(TINY, device=str(retrieval.DEVICE))  # the mean over its tokens
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    queries = [row["query"] for row in POSITIVES]
    rankings = retrieval.embedding_candidates(iter(DOCUMENTS[:40]), queries, TINY, 12)
    found = [ranking.numbers for ranking in rankings]
    sides = torch.tensor(model.encode(queries))[:, None], torch.tensor(model.encode(DOCUMENTS[:40]))
    scores = torch.nn.functional.cosine_similarity(*sides, dim=-1)
    torch.testing.assert_close(scores.gather(1, torch.tensor(found)), scores.topk(12).values, rtol=0, atol=1e-5)
    assert all(len(set(numbers)) == 12 for numbers in found)


def test_fusion_is_reciprocal_rank_fusion():
    """Of equals the first document comes first."""
    rankings = [retrieval.Ranking(numbers, [3, 2, 1]) for numbers in ([4, 5, 3], [1, 2, 3])]
    expected = [3, 1, 4, 2, 5], [2 / 63, 1 / 61, 1 / 61, 1 / 62, 1 / 62]
    assert retrieval.fuse(rankings, 5) == expected and retrieval.fuse(rankings, 2).numbers == [3, 1]


def test_each_filter_keeps_what_is_below_its_limit_and_nothing_else(mine, reranker):
    """Against a plain loop over the scores of all candidates."""
    everything, _ = mine("all.jsonl", POSITIVES, DOCUMENTS, *ALL)
    scores = {row["query"]: dict(zip(everything[row["query"]], reranker.predict(
        [(row["query"], text) for text in everything[row["query"]]]).tolist(), strict=True)) for row in POSITIVES}
    positive = dict(zip(scores, reranker.predict([(row["query"], row["content"]) for row in POSITIVES]).tolist(),
                        strict=True))  # fmt: skip
    for name, value, limit in (("max_score", 0.4, lambda score: 0.4),
                               ("absolute_margin", 0.2, lambda score: score - 0.2),
                               ("absolute_margin", 0.0, lambda score: score),
                               ("relative_margin", 0.3, lambda score: score * 0.7)):  # fmt: skip
        mined, printed = mine("some.jsonl", POSITIVES, DOCUMENTS, *ALL, f"--{name}", value)
        expected = {query: {text for text, score in each.items() if score <= limit(positive[query])}
                    for query, each in scores.items()}  # fmt: skip
        assert {query: {*mined.get(query, [])} for query in expected} == expected, name
        out = sum(map(len, scores.values())) - sum(map(len, expected.values()))
        assert out and f"| {name} | {out} |" in printed
        assert all(each == sorted(each, key=lambda text: -scores[query][text]) for query, each in mined.items())
        few = sum(len(each) < 20 for each in expected.values())
        assert f"{few} of them have fewer than 20 negatives" in printed


def test_the_median_of_several_positives_counts(mine, reranker):
    query, *_ = [row["query"] for row in POSITIVES]
    rows = [{"query": query, "content": text, "label": 1} for text in DOCUMENTS[:3]]
    middle = np.median(reranker.predict([(query, text) for text in DOCUMENTS[:3]]))
    everything, _ = mine("all.jsonl", rows, DOCUMENTS, *ALL)
    mined, _ = mine("some.jsonl", rows, DOCUMENTS, *ALL, "--absolute_margin", 0)
    scores = reranker.predict([(query, text) for text in everything[query]])
    expected = {text for text, score in zip(everything[query], scores, strict=True) if score <= middle}
    assert {*mined[query]} == expected and 0 < len(expected) < len(scores)


def test_known_rows_and_repeated_texts_are_not_mined(mine):
    """Not even where white space differs; labels above the middle of the scale are positives, those below are not."""
    query, text = POSITIVES[0]["query"], POSITIVES[0]["content"]
    candidates = retrieval.bm25_candidates(DOCUMENTS, [query], retrieval.tokenizer_of("zh"), 5)[0].numbers
    irrelevant, repeated = [DOCUMENTS[number] for number in candidates if DOCUMENTS[number] != text][:2]
    rows = [{"query": query, "content": text, "label": 3}, {"query": query, "content": irrelevant, "label": 1},
            {"query": "别的问题", "content": text, "label": 0}]  # fmt: skip
    documents = [*DOCUMENTS, text.replace("，", "， \n"), irrelevant + "  ", " " + repeated.replace("，", " ， ")]
    mined, printed = mine("out.jsonl", rows, documents, *ALL, "--max_label", 4)
    bare = ["".join(each.split()) for each in mined[query]]
    assert "".join(text.split()) not in bare and "".join(irrelevant.split()) not in bare
    assert bare.count("".join(repeated.split())) == 1 and "别的问题" not in mined
    assert "1 queries with a positive of 2" in printed
    counts = {line.split(" | ")[0][2:]: int(line.split(" | ")[1]) for line in printed.splitlines() if "%" in line}
    assert counts == {"negative": len(bare), "known positive": 2, "known irrelevant": 2,
                      "same text as another candidate": 1}  # fmt: skip


def test_ranks_and_number_of_negatives(mine):
    queries = [row["query"] for row in POSITIVES]
    found = retrieval.bm25_candidates(DOCUMENTS, queries, retrieval.tokenizer_of("zh"), 9)
    mined, _ = mine("out.jsonl", POSITIVES, DOCUMENTS, *ALL, "--range_min", 4, "--range_max", 9, "--num_negatives", 5)
    for row, (numbers, _) in zip(POSITIVES, found, strict=True):
        assert {*mined[row["query"]]} == {DOCUMENTS[number] for number in numbers[4:]} - {row["content"]}
    mined, _ = mine("out.jsonl", POSITIVES, DOCUMENTS, *ALL, "--num_negatives", 3)
    assert all(len(mined[query]) == 3 for query in queries)


def test_same_seed_same_bytes_and_plain_or_packed_files_the_same_rows(mine, tmp_path):
    """Another seed draws others; a query draws the same whatever other queries there are."""
    arguments = "--sampling_strategy", "random", "--relative_margin", None, "--num_negatives", 4
    (tmp_path / "corpus.tsv").write_text("".join(f"{len(each)}\t{each}\n" for each in DOCUMENTS), "utf-8")
    titled = [{"id": 1, "title": each[:3], "contents": each[3:]} for each in DOCUMENTS]
    (tmp_path / "corpus.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, titled)).encode()))
    first, _ = mine("a.jsonl", POSITIVES, DOCUMENTS, *arguments)
    mine("b.jsonl", POSITIVES, str(tmp_path / "corpus.tsv"), *arguments)
    mine("c.jsonl.gz", POSITIVES, DOCUMENTS, *arguments)
    mine("d.jsonl.gz", POSITIVES, DOCUMENTS, *arguments)
    other, _ = mine("e.jsonl", POSITIVES, DOCUMENTS, *arguments, "--seed", 1)
    fewer, _ = mine("f.jsonl", POSITIVES[4:], DOCUMENTS, *arguments)
    titled, _ = mine("g.jsonl", POSITIVES, str(tmp_path / "corpus.gz"), *arguments)
    a, b, c, d = ((tmp_path / name).read_bytes() for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz", "d.jsonl.gz"))
    assert a == b == gzip.decompress(c) and c == d
    assert other != first and {query: first[query] for query in fewer} == fewer
    assert {text for each in titled.values() for text in each} <= {f"{text[:3]} {text[3:]}" for text in DOCUMENTS}


def test_killed_and_started_again_gives_the_same_bytes(mine, write_jsonl, tmp_path, monkeypatch, capsys):
    """What was scored is not scored again; a sidecar of other settings is not gone on with."""
    rows = [row for row in ROWS if row["label"] == 1][:13]  # their scores fit into a 4 kB buffer: it is flushed
    mine("whole.jsonl", rows, DOCUMENTS, "--range_max", 12)
    output, sidecar = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.unfinished"
    command = [sys.executable, str(ROOT / "tools" / "mine_hard_negatives.py"), *sys.argv[1:]]
    command[command.index("--output") + 1] = str(output)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={
            **os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}) as process:  # fmt: skip
        while not sidecar.exists() or sidecar.read_bytes().count(b"\n") < 5:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    done = sidecar.read_bytes().count(b"\n") - 2  # after key and candidates
    assert not output.exists() and 3 <= done < len(rows)
    with open(sidecar, "ab") as file:
        file.write(b"[0.123, 0.4")  # a line that the kill cut off
    monkeypatch.setattr(sys, "argv", [*command[1:], "--range_max", "11"])
    with pytest.raises(SystemExit, match="killed.jsonl.unfinished is of other data, another model or other"):
        miner.main()
    calls, predict = [], BertRerankerModel.predict
    monkeypatch.setattr(BertRerankerModel, "predict", lambda self, *a, **k: calls.append(1) or predict(self, *a, **k))
    monkeypatch.setattr(sys, "argv", command[1:])
    miner.main()
    assert len(calls) == len({row["query"] for row in rows}) - done
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    report, whole = (tmp_path / f"{name}.jsonl.report.md" for name in ("killed", "whole"))
    assert report.read_bytes() == whole.read_bytes() and not sidecar.exists()
    with pytest.raises(SystemExit, match="killed.jsonl exists already"):
        miner.main()


@pytest.fixture
def stopped(mine, tmp_path, monkeypatch):
    """Call the tool as it is stopped after all is scored; the path of the sidecar it leaves."""

    def stop(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="no space left"):
        patch.setattr(miner, "write", stop)
        mine("out.jsonl", POSITIVES, DOCUMENTS)
    return tmp_path / "out.jsonl.unfinished"


def test_a_sidecar_in_which_nothing_is_done_yet_is_started_afresh(mine, stopped):
    """It is empty, or its key is cut off."""
    content = stopped.read_bytes()
    whole, _ = mine("out.jsonl", POSITIVES, DOCUMENTS)
    for left in (0, 20, 64):
        stopped.write_bytes(content[:left])
        assert mine("out.jsonl", POSITIVES, DOCUMENTS)[0] == whole and not stopped.exists()


DAMAGED = {  # what the lines become, the key first, then the candidates, then the scores
    "zeros": lambda lines: [*lines[:4], bytes(30)],
    "no JSON": lambda lines: [*lines[:4], b"x"],
    "a number": lambda lines: [*lines[:4], b"5"],
    "texts": lambda lines: [*lines[:4], b'["a"]'],
    "scores of another query": lambda lines: [*lines[:4], b"[0.5]"],
    "more lines than queries": lambda lines: [*lines, lines[-1]],
    "fewer candidates than queries": lambda lines: [lines[0], b"[[1]]"],
    "candidates that the corpus has not": lambda lines: [lines[0], str([[10**6]] * len(POSITIVES)).encode()],
    "too deep": lambda lines: [lines[0], b"[" * 5000],
}


def test_a_damaged_sidecar_is_an_error_that_says_what_to_do_and_it_works(mine, stopped, tmp_path):
    lines = stopped.read_bytes().splitlines()
    for name, damage in DAMAGED.items():
        left = b"".join(line + b"\n" for line in damage(lines))
        stopped.write_bytes(left)
        with pytest.raises(SystemExit, match="out.jsonl.unfinished is damaged: remove it, and the call starts afresh"):
            mine("out.jsonl", POSITIVES, DOCUMENTS)
        assert stopped.read_bytes() == left and not (tmp_path / "out.jsonl").exists(), name
    stopped.unlink()
    assert mine("out.jsonl", POSITIVES, DOCUMENTS)[0]


@pytest.mark.parametrize("output, problem", [
    (".", "is a folder"), ("", "is a folder"), ("folder", "is a folder"), ("pipe", "is a device or a pipe"),
    ("file/out.jsonl", "file is no folder")])  # fmt: skip
def test_an_output_that_is_no_file_is_refused(tmp_path, monkeypatch, output, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo("pipe")
    monkeypatch.setattr(sys, "argv", ["tool", "file", "--corpus", "file", "--output", output])
    with pytest.raises(SystemExit, match=f"^Error: --output .*{problem}"):
        miner.main()


@pytest.mark.parametrize("words, problem", [
    ("--seed -1", "seed -1: it should be from 0"), ("--min_label nan", "min_label is nan"),
    ("--max_label inf", "max_label is inf"), ("--relative_margin nan", "relative_margin is nan")])  # fmt: skip
def test_a_number_that_can_be_none_is_refused(tmp_path, monkeypatch, words, problem):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tool", "rows", "--corpus", "rows", "--output", "out", *words.split()])
    with pytest.raises(SystemExit, match=f"^Error: {problem}"):
        miner.main()


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_a_corpus_of_another_encoding_is_told_with_the_command_that_mends_it(mine, tmp_path, encoding):
    corpus = tmp_path / "a corpus.tsv"
    corpus.write_text("".join(f"{len(text)}\t{text}\n" for text in DOCUMENTS), encoding)
    with pytest.raises(SystemExit, match="  line 2: not UTF-8\n") as error:
        mine("out.jsonl", POSITIVES, str(corpus))
    [line] = [line for line in str(error.value).splitlines() if f" {encoding.upper()} " in line]
    subprocess.run(line.partition(" is made UTF-8 by: ")[2], shell=True, cwd=tmp_path, check=True)
    assert mine("out.jsonl", POSITIVES, str(tmp_path / "corpus.utf8"))[0]


@pytest.mark.parametrize("name, lines, message", [
    ("corpus.jsonl", ['{"text": "好"}', '{"text": "坏"', '{"id": 3}', '{"text": 4}', '{"text": " "}', "5"],
     r"corpus.jsonl: 5 bad lines\n  line 2: Expecting .*\n  line 3: content is missing\n  line 4: content or title is "
     r"no text\n  line 5: the text is blank\n  line 6: not a JSON object\nA line of a corpus, in UTF-8, should"),
    ("corpus.tsv", ["1\t好", "", "坏"], r"corpus.tsv: 1 bad line\n  line 3: neither a JSON object nor id<TAB>text"),
    ("corpus.jsonl", [], r"corpus.jsonl: no lines"),
    ("corpus.jsonl", None, r"corpus.jsonl: cannot be read or copied: No such file"),
    ("rows.jsonl", ['{"query": "好", "content": "好", "label": "1"}'], r"rows.jsonl: 1 bad line\n  line 1: label is"),
    ("rows.jsonl", ['{"query": "好", "content": "好", "label": 0}'], r"rows.jsonl: no row has a label of 0.5 or more"),
])  # fmt: skip
def test_bad_input_is_an_error_that_names_file_and_line(tmp_path, monkeypatch, name, lines, message):
    good = {"rows.jsonl": ['{"query": "好", "content": "好", "label": 1}'], "corpus.jsonl": ['{"text": "好"}']}
    for each, content in {**good, name: lines}.items():
        if content is not None:
            (tmp_path / each).write_text("\n".join(content), "utf-8")
    corpus = name if name.startswith("corpus") else "corpus.jsonl"
    monkeypatch.setattr(sys, "argv", [
        "tool", str(tmp_path / "rows.jsonl"), "--corpus", str(tmp_path / corpus), "--output",
        str(tmp_path / "out.jsonl"), "--model_name_or_path", TINY])  # fmt: skip
    with pytest.raises(SystemExit, match=f"^Error: .*{message}"):
        miner.main()
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out.jsonl.unfinished").exists()


def test_the_language_is_detected_or_asked_for(mine, capsys):
    _, printed = mine("zh.jsonl", POSITIVES, DOCUMENTS, "--language", "auto")
    assert "Words by jieba (zh)" in printed
    rows = [{"query": "how is the report of a run written", "content": ENGLISH[0], "label": 1}]
    _, printed = mine("en.jsonl", rows, ENGLISH, "--language", "auto")
    assert "English stemmer of PyStemmer (en)" in printed
    with pytest.raises(SystemExit, match="pass --language zh or en"):
        mine("ko.jsonl", [{"query": "질문", "content": "대답", "label": 1}], ["문서", "대답"], "--language", "auto")


def test_an_encoder_without_a_head_is_refused(mine, reranker, tmp_path):
    """Its scores would be noise."""
    reranker.model.base_model.save_pretrained(tmp_path / "encoder")
    reranker.tokenizer.save_pretrained(tmp_path / "encoder")
    with pytest.raises(SystemExit, match="encoder is no reranker: it lacks classifier"):
        mine("out.jsonl", POSITIVES, DOCUMENTS, "--model_name_or_path", tmp_path / "encoder")


def test_a_failed_search_leaves_nothing_that_is_in_the_way(mine, tmp_path):
    """A mistyped embedding model is an error, and the call with the right one starts."""
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="--embedding_model .*none cannot be loaded"):
        mine("out.jsonl", POSITIVES, DOCUMENTS, "--embedding_model", tmp_path / "none")
    assert not list(tmp_path.glob("out.jsonl*"))
    negatives, _ = mine("out.jsonl", POSITIVES, DOCUMENTS, "--embedding_model", TINY)
    assert len(negatives) == len(POSITIVES)
