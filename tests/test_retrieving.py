"""tools/retrieve_candidates.py: its candidates, scores and recall are those of other implementations, and what it
leaves out, joins or cannot find is said with the count."""

import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, TINY

sys.path.insert(0, str(ROOT / "tools"))
import retrieval  # noqa: E402
import retrieve_candidates as tool  # noqa: E402

from train_bert_rerank import read_rows  # noqa: E402

ROWS = [json.loads(line) for line in (ROOT / "default_train_data.jsonl").read_text("utf-8").splitlines()]
POSITIVES = [row for row in ROWS if row["label"] == 1][:10]
DOCUMENTS = list(dict.fromkeys(row["content"] for row in ROWS))
# A small collection, whose terms are seen at once: documents of fruits, in English.
FRUITS = {
    "d1": "apple apple pie", "d2": "apple and pear", "d3": "pear tart with cream", "d4": "plum jam",
    "d5": "cherry cake with cream and jam", "d6": "the oven is hot",
}  # fmt: skip
QUERIES = {"q1": "apple", "q2": "pear cream", "q3": "plum"}
QRELS = [("q1", "d1", 1), ("q1", "d2", 1), ("q2", "d3", 1), ("q3", "d4", 1)]


@pytest.fixture
def retrieve(tmp_path, monkeypatch, capsys):
    """retrieve(*arguments, output=) -> (lines of the output, what was printed) of the tool's main(), in its folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, output="eval.jsonl"):
        capsys.readouterr()
        (tmp_path / output).unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments), "--output", output])
        tool.main()
        data = (tmp_path / output).read_bytes()
        text = gzip.decompress(data) if output.endswith(".gz") else data
        return [json.loads(line) for line in text.splitlines()], capsys.readouterr().out

    return run


@pytest.fixture
def write_text(tmp_path):
    """write_text(name, line, …): a text file in the test's folder; its name."""

    def write(name, *lines):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), "utf-8")
        return name

    return write


@pytest.fixture
def fruits(retrieve, write_text):
    """fruits(*arguments, documents=, queries=, qrels=) -> as retrieve() of these, all as TSV."""

    def run(*arguments, documents=FRUITS, queries=QUERIES, qrels=QRELS):
        corpus = write_text("corpus.tsv", *("\t".join(pair) for pair in pairs_of(documents)))
        queries = write_text("queries.tsv", *("\t".join(pair) for pair in pairs_of(queries)))
        qrels = write_text("qrels.tsv", *("\t".join(map(str, line)) for line in qrels))
        return retrieve(queries, "--qrels", qrels, "--corpus", corpus, "--language", "en", *arguments)

    return run


def pairs_of(texts):
    """The (id, text) pairs of a dict, or as they are."""
    return texts.items() if isinstance(texts, dict) else texts


def hits_of(line, key="content"):
    """The contents, or the values of another key, of a line's hits."""
    return [hit[key] for hit in line["hits"]]


# ---- Candidates and scores -------------------------------------------------------------------
def test_bm25s_order_and_scores_are_those_of_another_implementation(retrieve, write_jsonl):
    """Of rank_bm25 with Lucene's idf, which leaves out the constant k1 + 1 of the numerator."""
    from rank_bm25 import BM25Okapi

    corpus = write_jsonl("corpus.jsonl", [{"text": text} for text in DOCUMENTS])
    lines, _ = retrieve(write_jsonl("rows.jsonl", POSITIVES), "--corpus", corpus, "--k", 20)
    tokenize = retrieval.tokenizer_of("zh")
    other = BM25Okapi(list(map(tokenize, DOCUMENTS)), k1=1.5, b=0.75)
    containing = Counter(term for frequencies in other.doc_freqs for term in frequencies)
    for term, count in containing.items():
        other.idf[term] = math.log(1 + (len(DOCUMENTS) - count + 0.5) / (count + 0.5))
    assert [line["query"] for line in lines] == [row["query"] for row in POSITIVES]
    for line in lines:
        scores = other.get_scores(tokenize(line["query"])) / 2.5
        expected = np.sort(scores[scores > 0])[::-1][:20]
        assert hits_of(line, "score") == sorted(hits_of(line, "score"), reverse=True)
        np.testing.assert_allclose(hits_of(line, "score"), expected, rtol=1e-5)
        by_text = dict(zip(DOCUMENTS, scores, strict=True))
        np.testing.assert_allclose([by_text[text] for text in hits_of(line)], expected, rtol=1e-5)


def test_embeddings_order_and_score_by_the_cosine_and_need_no_language(retrieve, write_jsonl):
    """Against a full search by sentence-transformers' own functions; the queries are in no language that BM25 knows."""
    from sentence_transformers import SentenceTransformer, util

    texts = ["대답 하나", "다른 문서", "세 번째 글입니다"]
    rows = [{"query": "질문", "content": text, "label": 1} for text in texts[:2]]
    corpus = write_jsonl("corpus.jsonl", [{"text": text} for text in texts])
    [line], printed = retrieve(write_jsonl("rows.jsonl", rows), "--corpus", corpus, "--retriever", "embeddings",
                               "--embedding_model", TINY)  # fmt: skip
    model = SentenceTransformer(TINY, device=str(retrieval.DEVICE))
    [expected] = util.semantic_search(model.encode(["질문"]), model.encode(texts))
    assert hits_of(line) == [texts[hit["corpus_id"]] for hit in expected]
    assert hits_of(line, "score") == pytest.approx([hit["score"] for hit in expected], abs=1e-5)
    assert "Words by" not in printed


def test_both_are_fused_by_the_sum_of_reciprocal_ranks(fruits):
    """Of the first k of each; a document that one of them has not adds nothing for it."""
    rankings = {}
    for retriever in ("bm25", "embeddings", "both"):
        model = [] if retriever == "bm25" else ["--embedding_model", TINY]
        lines, _ = fruits("--retriever", retriever, "--k", 3, *model)
        rankings[retriever] = lines
    for bm25, nearest, both in zip(*rankings.values(), strict=True):
        sums = Counter()
        for line in (bm25, nearest):
            for rank, text in enumerate(hits_of(line), start=1):
                sums[text] += 1 / (60 + rank)
        order = sorted(sums, key=lambda text: (-sums[text], [*FRUITS.values()].index(text)))[:3]
        assert hits_of(both) == order and hits_of(both, "score") == [sums[text] for text in order]


def test_k_is_the_number_of_candidates_and_the_first_of_more(fruits):
    more, _ = fruits("--k", 4)
    for k in (1, 2):
        lines, printed = fruits("--k", k)
        assert [hits_of(line) for line in lines] == [hits_of(line)[:k] for line in more]
        assert f"recall@{k}: " in printed and "recall@10" not in printed
    assert list(map(len, map(hits_of, more))) == [2, 3, 1]  # no more have a word of the query


# ---- Judgements ------------------------------------------------------------------------------
def test_rows_are_found_by_their_text_and_their_labels_are_carried_into_the_hits(retrieve, write_text, write_jsonl):
    """White space aside; in each shape that the trainer reads, irrelevant rows as well as relevant ones."""
    corpus = write_text("corpus.tsv", *("\t".join(pair) for pair in FRUITS.items()))
    rows = [{"query": "apple", "content": " apple   apple\npie", "label": 3},
            {"query": "pear cream", "hits": [{"content": "pear tart with cream", "label": 4},
                                             {"content": "apple and pear", "label": 1}]},
            {"query": "plum", "pos": ["plum jam"], "neg": ["the oven is hot"]}]  # fmt: skip
    lines, printed = retrieve(write_jsonl("rows.jsonl", rows), "--corpus", corpus, "--max_label", 4, "--language", "en")
    assert [dict(zip(hits_of(line), hits_of(line, "label"), strict=True)) for line in lines] == [
        {"apple apple pie": 3, "apple and pear": 0},
        {"pear tart with cream": 4, "apple and pear": 1, "cherry cake with cream and jam": 0}, {"plum jam": 4},
    ]  # fmt: skip
    assert [line["relevant"] for line in lines] == [1, 1, 1]
    assert "queries with a relevant document (label 2 or more): 3." in printed
    assert "Candidates: 4 judged, 2 not judged (33.3%), which count as irrelevant (label 0)." in printed
    assert "--eval_dataset eval.jsonl --min_label=0 --max_label=4" in printed


def test_ids_give_the_file_that_rows_give(fruits, retrieve, write_jsonl, write_text):
    by_ids, _ = fruits()
    rows = [{"query": QUERIES[query], "content": FRUITS[document], "label": label} for query, document, label in QRELS]
    by_rows, _ = retrieve(write_jsonl("rows.jsonl", rows), "--corpus", "corpus.tsv", "--language", "en")
    assert by_ids == by_rows and [line["relevant"] for line in by_ids] == [2, 1, 1]


QRELS_FORMS = {
    "TREC": ["q1 0 d1 1", "q1 0 d2 1", "q2 Q0 d3 1", "q3  0 d4 1 "],
    "TREC with tabs": ["q1\t0\td1\t1", "q1\t0\td2\t1", "q2\t0\td3\t1", "q3\t0\td4\t1"],
    "three columns": ["q1\td1\t1", "q1\td2\t1", "q2\td3\t1", "q3\td4\t1.0"],
    "three columns with spaces": ["q1 d1 1", "q1 d2 1", "", "q2 d3 1", "q3 d4 1"],
    "BEIR": ["query-id\tcorpus-id\tscore", "q1\td1\t1", "q1\td2\t1", "q2\td3\t1", "q3\td4\t1"],
}


def test_queries_qrels_and_corpora_of_each_form_give_the_same_bytes(fruits, retrieve, write_text, tmp_path):
    """Plain or gzip, with a byte-order mark or without."""
    fruits()
    expected = (tmp_path / "eval.jsonl").read_bytes()
    for lines in QRELS_FORMS.values():
        write_text("qrels.tsv", *lines)
        retrieve("queries.tsv", "--qrels", "qrels.tsv", "--corpus", "corpus.tsv", "--language", "en")
        assert (tmp_path / "eval.jsonl").read_bytes() == expected, lines
    for name, text in (("_id", "text"), ("id", "query"), ("qid", "query")):
        samples = [json.dumps({name: key, text: query}) for key, query in QUERIES.items()]
        (tmp_path / "queries.gz").write_bytes(gzip.compress("\ufeff".encode() + "\n".join(samples).encode()))
        for key in ("_id", "id", "docid"):
            documents = [json.dumps({key: document, "contents": content}) for document, content in FRUITS.items()]
            corpus = write_text("corpus.jsonl", *documents)
            retrieve("queries.gz", "--qrels", "qrels.tsv", "--corpus", corpus, "--language", "en")
            assert (tmp_path / "eval.jsonl").read_bytes() == expected, (name, key)


def test_ids_may_be_numbers_in_json(retrieve, write_text):
    """7 and 7.0, as pandas writes a column with gaps, are the 7 of the qrels."""
    queries = write_text("queries.jsonl", '{"_id": 7, "text": "apple"}', '{"_id": 8.0, "text": "plum"}')
    corpus = write_text("corpus.jsonl", '{"id": 0, "text": "apple pie"}', '{"id": 12.0, "text": "plum jam"}')
    qrels = write_text("qrels.txt", "7 0 0 1", "8 0 12 1")
    lines, printed = retrieve(queries, "--qrels", qrels, "--corpus", corpus, "--language", "en")
    assert [hits_of(line, "label") for line in lines] == [[1], [1]] and "not in it" not in printed


def test_grades_below_the_scale_are_its_lowest_and_those_above_need_max_label(fruits, tmp_path):
    qrels = [("q1", "d1", 3), ("q1", "d2", -2), ("q2", "d3", 2), ("q2", "d2", 1)]
    lines, _ = fruits("--max_label", 3, qrels=qrels)
    assert [hits_of(line, "label") for line in lines] == [[3, 0], [2, 1, 0]]
    assert [line["relevant"] for line in lines] == [1, 1]
    (tmp_path / "eval.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"^Error: qrels.tsv: 2 bad lines\n  line 1: grade 3 is above max_label 1\n"
                       r"  line 3: grade 2 is above max_label 1\n.*--max_label is the highest grade"):  # fmt: skip
        fruits(qrels=qrels)
    assert not (tmp_path / "eval.jsonl").exists()


# ---- What is left out, joined or not found ---------------------------------------------------
def test_documents_of_the_same_text_are_one_document(fruits):
    """White space aside; all its ids mean it, so that it is relevant once."""
    documents = {**FRUITS, "d7": "apple  apple pie ", "d8": "plum\xa0jam"}
    lines, printed = fruits(documents=documents, qrels=[("q1", "d1", 0), ("q1", "d7", 1), ("q3", "d8", 1)])
    assert [hits_of(line) for line in lines] == [["apple apple pie", "apple and pear"], ["plum jam"]]
    assert [(hits_of(line, "label"), line["relevant"]) for line in lines] == [([1, 0], 1), ([1], 1)]
    assert "corpus.tsv: documents: 6.\n" in printed
    assert "corpus.tsv: lines that repeat the text of an earlier one: 2. Each text is one document.\n" in printed


def test_an_id_with_two_texts_means_the_first(fruits):
    documents = [*FRUITS.items(), ("d1", "apple crumble"), ("d6", FRUITS["d6"])]
    lines, printed = fruits(documents=documents)
    labels = dict(zip(hits_of(lines[0]), hits_of(lines[0], "label"), strict=True))
    assert labels == {"apple apple pie": 1, "apple and pear": 1, "apple crumble": 0}
    assert "corpus.tsv: lines with the id of an earlier one and another text: 1. The id means the earlier" in printed
    queries = [*QUERIES.items(), ("q1", "plum"), ("q2", "pear  cream")]
    lines, printed = fruits(queries=queries)
    assert [line["query"] for line in lines] == [*QUERIES.values()] and lines[2]["relevant"] == 1
    assert "queries.tsv: lines with the id of an earlier one and another text: 1. The earlier one counts." in printed


def test_relevant_documents_that_the_corpus_has_not_count_as_not_found(fruits, retrieve, write_jsonl):
    qrels = [*QRELS, ("q1", "none", 1), ("q2", "none", 1), ("q2", "gone", 1), ("q3", "other", 0)]
    lines, printed = fruits(qrels=qrels)
    assert [line["relevant"] for line in lines] == [3, 3, 1]
    said = "corpus.tsv: relevant documents that are not in it: 2; queries that have one of them: 2. They count as not"
    assert said in printed and "recall@10: 0.6667 (" in printed  # (2/3 + 1/3 + 1) / 3
    rows = [{"query": "apple", "content": text, "label": 1} for text in ("apple and pear", "nowhere", "no where")]
    [line], printed = retrieve(write_jsonl("rows.jsonl", rows), "--corpus", "corpus.tsv", "--language", "en")
    assert line["relevant"] == 2 and said.replace("2", "1") in printed


def test_queries_without_a_relevant_document_are_left_out(fruits):
    lines, printed = fruits(qrels=[*QRELS[:2], ("q2", "d3", 0)])
    assert [line["query"] for line in lines] == ["apple"]
    said = "queries.tsv: queries with a relevant document (label 0.5 or more): 1. Without one, and left out: 2."
    assert said in printed


def test_queries_for_which_nothing_is_found_are_not_written_and_count_as_0(fruits):
    queries = {**QUERIES, "q4": "quince", "q5": "???"}
    lines, printed = fruits(queries=queries, qrels=[*QRELS, ("q4", "d5", 1), ("q5", "d5", 1)])
    assert [line["query"] for line in lines] == [*QUERIES.values()]
    said = "eval.jsonl: queries: 3, candidates: 6.\nQueries for which nothing is found: 2. They are not in the file"
    assert said in printed and "recall@50: 0.6000 (" in printed and "mean over all 5)" in printed
    assert "Queries with all their relevant documents among the first 50: 3; with none of them: 2." in printed


def test_a_search_that_finds_nothing_relevant_for_any_query_says_so_loudly(retrieve, write_text):
    write_text("queries.tsv", "q1\tapple")
    write_text("qrels.tsv", "q1 0 d2 1")
    write_text("corpus.tsv", "d1\tapple pie", "d2\tquince jelly")
    _, said = retrieve("queries.tsv", "--qrels", "qrels.tsv", "--corpus", "corpus.tsv", "--language", "en")
    assert "!!! WARNING !!! Nothing relevant is found for any query" in said and "recall@10: 0.0000" in said


def test_qrels_of_unknown_queries_are_counted(fruits):
    expected, printed = fruits()
    assert "are not in queries.tsv" not in printed
    lines, printed = fruits(qrels=[*QRELS, ("q8", "d1", 1), ("q8", "d2", 1), ("q9", "d1", 0)])
    assert lines == expected and "qrels.tsv: queries that are not in queries.tsv: 2. Their judgements" in printed


def test_queries_of_the_same_text_are_one_query_with_the_judgements_of_all(fruits, retrieve, write_jsonl):
    """The trainer takes spellings that differ in white space for one query as well."""
    queries = {**QUERIES, "q4": "apple", "q5": "pear   cream"}
    lines, printed = fruits(queries=queries, qrels=[*QRELS, ("q4", "d2", 1), ("q4", "d3", 1), ("q5", "d1", 1)])
    assert [(line["query"], line["relevant"]) for line in lines] == [("apple", 3), ("pear cream", 2), ("plum", 1)]
    assert "queries.tsv: queries that repeat the text of another: 2." in printed
    rows = [{"query": query, "content": FRUITS["d1"], "label": 1} for query in ("apple", "apple", " apple")]
    [line], printed = retrieve(write_jsonl("rows.jsonl", rows), "--corpus", "corpus.tsv", "--language", "en")
    assert line["relevant"] == 1 and "rows.jsonl: queries that repeat the text of another: 1." in printed


def test_of_judgements_that_contradict_each_other_the_highest_counts(fruits):
    lines, printed = fruits(qrels=[*QRELS, ("q1", "d1", 0), ("q2", "d2", 0), ("q2", "d2", 1), ("q2", "d2", 1)])
    assert [(hits_of(line, "label"), line["relevant"]) for line in lines][:2] == [([1, 1], 2), ([1, 1, 0], 2)]
    said = "Judgements that contradict another of the same query and document: 2. The highest label counts."
    assert said in printed


# ---- What is printed -------------------------------------------------------------------------
def test_recall_is_that_of_plain_python_and_of_trec_eval(retrieve, write_text, write_jsonl):
    import pytrec_eval

    draw = random.Random(0)
    queries = {f"q{number}": row["query"] for number, row in enumerate(POSITIVES)}
    documents = {f"d{number}": text for number, text in enumerate(DOCUMENTS)}
    judged = {query: {name: draw.randint(0, 1) for name in draw.sample([*documents, "lost"], 12)} for query in queries}
    write_jsonl("corpus.jsonl", [{"_id": name, "text": text} for name, text in documents.items()])
    write_text("queries.tsv", *("\t".join(pair) for pair in queries.items()))
    qrels = [f"{query} 0 {name} {label}" for query, labels in judged.items() for name, label in labels.items()]
    write_text("qrels.tsv", *qrels)
    lines, printed = retrieve("queries.tsv", "--qrels", "qrels.tsv", "--corpus", "corpus.jsonl", "--k", 30)

    name_of = {text: name for name, text in documents.items()}
    found = {line["query"]: [name_of[text] for text in hits_of(line)] for line in lines}
    run = {query: {name: -rank for rank, name in enumerate(found[text])} for query, text in queries.items()}
    theirs = pytrec_eval.RelevanceEvaluator(judged, {"recall.10,30"}).evaluate(run).values()
    for k in (10, 30):
        shares = []
        for query, text in queries.items():
            relevant = {name for name, label in judged[query].items() if label == 1}
            shares.append(len(relevant & {*found[text][:k]}) / len(relevant))
        assert np.mean(shares) == pytest.approx(np.mean([each[f"recall_{k}"] for each in theirs]))
        assert f"recall@{k}: {np.mean(shares):.4f} (" in printed and 0 < np.mean(shares) < 1
    assert (f"Queries with all their relevant documents among the first 30: {shares.count(1)}; with none of them: "
            f"{shares.count(0)}.") in printed  # fmt: skip
    hits = sum(name in judged[query] for query, text in queries.items() for name in found[text])
    assert f"Candidates: {hits} judged, {sum(map(len, found.values())) - hits} not judged" in printed


def test_the_ceiling_and_what_unjudged_candidates_mean_are_said_where_there_are_any(fruits):
    ceiling, unjudged = "are the ceiling of every reranker", "Most candidates were never judged."
    every = [(query, document, int((query, document, 1) in QRELS)) for query in QUERIES for document in FRUITS]
    _, printed = fruits(qrels=every)
    assert ceiling not in printed and unjudged not in printed and "6 judged, 0 not judged (0.0%)" in printed
    _, printed = fruits("--k", 1)
    assert ceiling in printed and unjudged not in printed
    _, printed = fruits(qrels=[("q2", "d1", 1), ("q2", "d3", 1)])
    assert ceiling in printed and unjudged in printed and "1 judged, 2 not judged (66.7%)" in printed


# ---- The output ------------------------------------------------------------------------------
def test_the_trainer_reads_the_rows_in_the_order_of_queries_and_candidates(retrieve, write_jsonl, tmp_path):
    corpus = write_jsonl("corpus.jsonl", [{"text": text} for text in DOCUMENTS])
    rows = write_jsonl("rows.jsonl", POSITIVES[::-1])
    lines, _ = retrieve(rows, "--corpus", corpus, "--k", 5)
    assert all({*line} == {"query", "hits", "relevant"} for line in lines)
    assert all({*hit} == {"content", "label", "score"} for line in lines for hit in line["hits"])
    expected = [(line["query"], hit["content"], hit["label"]) for line in lines for hit in line["hits"]]
    assert [row[:3] for row in read_rows(str(tmp_path / "eval.jsonl"), 0, 1)] == expected
    assert list(dict.fromkeys(query for query, _, _ in expected)) == [row["query"] for row in POSITIVES[::-1]]
    assert b'"label": 0,' in (tmp_path / "eval.jsonl").read_bytes()  # not 0.0


def test_same_input_same_bytes_in_another_process_and_gzip_holds_them(retrieve, write_jsonl, tmp_path):
    corpus = write_jsonl("corpus.jsonl", [{"text": text} for text in DOCUMENTS])
    arguments = [write_jsonl("rows.jsonl", POSITIVES), "--corpus", corpus, "--retriever", "both", "--embedding_model",
                 TINY, "--k", "7"]  # fmt: skip
    retrieve(*arguments)
    retrieve(*arguments, output="a.jsonl.gz")
    command = [sys.executable, str(ROOT / "tools" / "retrieve_candidates.py"), *arguments, "--output"]
    for name in ("folder/new/b.jsonl", "b.jsonl.gz"):
        subprocess.run([*command, name], check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    expected = (tmp_path / "eval.jsonl").read_bytes()
    assert (tmp_path / "folder/new/b.jsonl").read_bytes() == expected == gzip.decompress(
        (tmp_path / "a.jsonl.gz").read_bytes())  # fmt: skip
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_texts_are_not_held_in_memory(tmp_path):
    """60 MB of documents: their digests take a hundredth of that."""
    import tracemalloc

    with open(tmp_path / "store", "w+b") as store:
        corpus = tool.DistinctCorpus(store)
        tracemalloc.start()
        for number in range(600):
            corpus.add(str(number), f"{number} " * (100_000 // (len(str(number)) + 1)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(corpus) == 600 and store.tell() > 55e6 and peak < 3e6
        assert corpus.text(17).startswith("17 17 ")


# ---- Bad input -------------------------------------------------------------------------------
GOOD = {
    "queries.tsv": ["q1\tapple"], "qrels.tsv": ["q1 0 d1 1"], "corpus.tsv": ["d1\tapple pie"],
    "rows.jsonl": ['{"query": "apple", "content": "apple pie", "label": 1}'],
}  # fmt: skip
BAD = [
    ("queries.tsv", ["", "q1 apple", '{"text": "apple"}', '{"id": 1}', "q2\t \u200b", '{"id": 1, "text": 5}', "\tpear",
                     '{"id"'],
     r"queries.tsv: 7 bad lines\n  line 2: neither a JSON object nor id<TAB>text\n  line 3: the id is missing\n  line "
     r"4: query is missing\n  line 5: query is blank\n  line 6: query is no text: 5\n  line 7: the id is missing\n  "
     r"line 8: .*\nA line of queries should be id<TAB>text"),
    ("queries.tsv", [], r"queries.tsv: no lines\nA line of queries"),
    ("queries.tsv", None, r"queries.tsv: cannot be read: No such file"),
    ("queries.tsv", ["q2\tapple"],
     r"qrels.tsv: no id of a query is one of queries.tsv \(here 'q1', and there 'q2', for one\)"),
    ("corpus.jsonl", ['{"text": "apple pie"}'],
     r"corpus.jsonl: the relevant documents \(1\) are not in it. .* by their id: .* No document has one$"),
    ("qrels.tsv", ["q1 0 d1 1", "q1 d1", "q1 0 d1 good", "q1 Q0 d1 1 7.5 run", "q1 d1 nan", "score"],
     r"qrels.tsv: 5 bad lines\n  line 2: 2 fields instead of 4, or 3\n  line 3: label good is no number\n  line 4: 6 "
     r"fields instead of 4, or 3\n  line 5: label nan is no number\n  line 6: 1 fields instead of 4, or 3\nA line of "
     r'qrels should be "qid 0 docid grade"'),
    ("qrels.tsv", ["q1 0 d1"] * 12, r"qrels.tsv: 12 bad lines\n(.*\n){10}  … and 2 more\n"),
    ("qrels.tsv", [], r"qrels.tsv: no lines"),
    ("qrels.tsv", None, r"qrels.tsv: cannot be read: No such file"),
    ("qrels.tsv", ["q1 0 d1 0"], r"queries.tsv: no query has a relevant document"),
    ("qrels.tsv", ["q1 0 d7 1"], r"corpus.tsv: the relevant documents \(1\) are not in it. They are looked for by "
                                 r"their id: in JSON _id, id, docid, in TSV the first column"),
    ("corpus.tsv", ["d1\tapple", "pear", "d2\t\u200b"],
     r"corpus.tsv: 2 bad lines\n  line 2: neither .*\n  line 3: content is blank\nA line of a corpus"),
    ("corpus.tsv", ["d1\tquince"], r"nothing is found for any query: no document has a word of one"),
    ("rows.jsonl", ['{"query": "apple", "content": "apple pie", "label": "1"}'], r"rows.jsonl: 1 bad line\n  line 1: "),
    ("rows.jsonl", ["q1\tapple"], r"rows.jsonl: 1 bad line\n(.*\n)*Queries without documents take --qrels, a file"),
    ("rows.jsonl", None, r"rows.jsonl: cannot be read: No such file or directory$"),
    ("queries.tsv", GOOD["rows.jsonl"], r"queries.tsv: 1 bad line\n(.*\n)*.* Rows that have their documents take"),
    ("rows.jsonl", ['{"query": "apple", "content": "apple pie", "label": 0}'], r"rows.jsonl: no query has a relevant"),
    ("rows.jsonl", ['{"query": "apple", "content": "pie", "label": 1}'],
     r"corpus.tsv: the relevant documents \(1\) are not in it. They are looked for by their whole text"),
]  # fmt: skip


@pytest.mark.parametrize("name, lines, message", BAD)
def test_bad_input_is_an_error_that_names_file_and_line(retrieve, write_text, tmp_path, name, lines, message):
    for each, content in {**GOOD, name: lines}.items():
        if content is not None:
            write_text(each, *content)
    inputs = ["rows.jsonl"] if name == "rows.jsonl" else ["queries.tsv", "--qrels", "qrels.tsv"]
    with pytest.raises(SystemExit, match=f"^Error: {message}"):
        corpus = "corpus.jsonl" if name == "corpus.jsonl" else "corpus.tsv"
        retrieve(*inputs, "--corpus", corpus, "--language", "en", output="new/eval.jsonl")
    assert not (tmp_path / "new").exists()


def test_text_that_is_not_utf8_is_told_with_a_command(retrieve, write_text, tmp_path):
    for name, content in GOOD.items():
        write_text(name, *content)
    for name, message in (("queries.tsv", "iconv -f GB18030"), ("corpus.tsv", "line 1: not UTF-8")):
        (tmp_path / name).write_bytes("q1\t苹果在哪里买".encode("gb18030"))
        with pytest.raises(SystemExit, match=f"^Error: {name}: (.*\n)*.*{message}"):
            retrieve("queries.tsv", "--qrels", "qrels.tsv", "--corpus", "corpus.tsv")
        write_text(name, *GOOD[name])


@pytest.mark.parametrize("words, message", [
    ("--k 0", "k 0: it should be 1 or more"), ("--k -3", "k -3"), ("--min_label nan", "min_label is nan"),
    ("--max_label inf", "max_label is inf"), ("--min_label 1", "min_label 1 is not below max_label 1"),
    ("--embedding_model m", "--retriever bm25 takes no --embedding_model: leave it out, or choose embeddings or both"),
    ("--retriever both", "--retriever both takes a model of sentence-transformers: add --embedding_model"),
    ("--retriever embeddings --embedding_model none", "--embedding_model none cannot be loaded"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(retrieve, write_text, tmp_path, words, message):
    for name, content in GOOD.items():
        write_text(name, *content)
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match=f"^Error: {message}"):
        retrieve("rows.jsonl", "--corpus", "corpus.tsv", "--language", "en", *words.split())
    assert not (tmp_path / "eval.jsonl").exists()


def test_an_output_that_exists_or_is_no_file_is_refused(retrieve, write_text, tmp_path, monkeypatch):
    for name, content in GOOD.items():
        write_text(name, *content)
    os.mkfifo(tmp_path / "pipe")
    refused = {"rows.jsonl": "rows.jsonl exists already: remove it, or take another --output", ".": "'.' is a folder",
               "pipe": "pipe is a device or a pipe", "corpus.tsv/a.jsonl": "corpus.tsv is no folder"}  # fmt: skip
    for output, message in refused.items():
        monkeypatch.setattr(sys, "argv", ["tool", "rows.jsonl", "--corpus", "corpus.tsv", "--output", output])
        with pytest.raises(SystemExit, match=f"^Error: .*{re.escape(message)}"):
            tool.main()
    assert (tmp_path / "rows.jsonl").read_text("utf-8") == GOOD["rows.jsonl"][0] + "\n"


def test_a_line_that_the_trainer_could_not_read_is_refused(retrieve, write_jsonl, tmp_path, monkeypatch):
    """Then nothing is written."""
    texts = [f"apple {number} " + "pie " * 2000 for number in range(30)]
    corpus = write_jsonl("corpus.jsonl", [{"text": text} for text in texts])
    rows = write_jsonl("rows.jsonl", [{"query": "apple", "content": texts[0], "label": 1}])
    monkeypatch.setattr(tool, "LONGEST_LINE", 100_000)
    with pytest.raises(SystemExit, match="^Error: the 30 documents of a query are longer than .* a smaller --k"):
        retrieve(rows, "--corpus", corpus, "--language", "en")
    assert not (tmp_path / "eval.jsonl").exists()
    assert retrieve(rows, "--corpus", corpus, "--language", "en", "--k", 9)[0]


def test_a_missing_package_is_named_with_the_line_that_installs_it(retrieve, write_text, monkeypatch):
    for name, content in GOOD.items():
        write_text(name, *content)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(SystemExit, match="^Error: .*bm25s.*: pip install bm25s PyStemmer jieba sentence-transformers"):
        retrieve("rows.jsonl", "--corpus", "corpus.tsv", "--language", "en")


def test_a_stopped_call_writes_nothing(retrieve, write_text, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    for name, content in GOOD.items():
        write_text(name, *content)
    monkeypatch.setattr(tool, "line_of", stop)
    with pytest.raises(SystemExit, match="^Stopped; nothing is written.$"):
        retrieve("rows.jsonl", "--corpus", "corpus.tsv", "--language", "en")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(GOOD)


def test_a_model_whose_scores_are_no_numbers_is_refused(retrieve, write_text, tmp_path):
    """JSON has no NaN, and the trainer would refuse the file."""
    from sentence_transformers import SentenceTransformer

    for name, content in GOOD.items():
        write_text(name, *content)
    model = SentenceTransformer(TINY)
    for weight in model.parameters():
        weight.data.fill_(math.nan)
    model.save(str(tmp_path / "model"))
    with pytest.raises(SystemExit, match="^Error: model gives scores that are no numbers: take another"):
        retrieve("rows.jsonl", "--corpus", "corpus.tsv", "--retriever", "embeddings", "--embedding_model", "model")
    assert not (tmp_path / "eval.jsonl").exists()
