"""Make the evaluation file that a search gives: for each query the first documents of a corpus, and which are relevant.

    pip install bm25s PyStemmer    # for Chinese: bm25s jieba; for --embedding_model: sentence-transformers
    python tools/retrieve_candidates.py rows.jsonl --corpus corpus.jsonl --output eval.jsonl
    python tools/retrieve_candidates.py queries.tsv --qrels qrels.tsv --corpus corpus.jsonl --output eval.jsonl
    python train_bert_rerank.py --train_dataset train.jsonl --eval_dataset eval.jsonl

What is relevant is told in one of two ways:

- by rows of any shape that train_bert_rerank.py reads: their documents are found in the corpus by their texts, white
  space aside;
- by ids: queries as id<TAB>text or JSONL (_id, id or qid; text or query), and `--qrels` with lines "qid 0 docid grade",
  as TREC's, or "qid docid grade", with or without BEIR's header.

Relevant are documents with a label in the upper half of the scale from --min_label to --max_label. `--corpus` is JSONL
with the text under content, text or contents (a title, if there, is put before it) and the id under _id, id or docid,
or TSV, id<TAB>text. All files are plain or gzip.

`--retriever` is BM25; the cosine of embeddings; or both, the first k of each fused by reciprocal ranks (Cormack et al.
2009). A line of the output has a query, its first k documents as hits, best first, with the retriever's scores, and how
many relevant documents it has, found or not. A document that was not judged gets --min_label.

Printed is recall@k, the share of a query's relevant documents among its first k: a reranker orders what the search
found, so what is missing there no reranker can rank. The same files give the same bytes.
"""

import argparse
import gzip
import hashlib
import json
import math
import shlex
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convert_data import check_output, number_of, opened_text, scale_of  # noqa: E402
from retrieval import (  # noqa: E402
    DOCUMENT_IDS,
    WORDS_BY,
    Corpus,
    Retriever,
    bare,
    id_of,
    object_of,
    read_corpus,
    search_language,
)

from train_bert_rerank import (  # noqa: E402
    LONGEST_LINE,
    BadLines,
    UserError,
    check_text,
    normal_form,
    printable,
    read_rows,
    say,
    seed_everything,
    whole_file,
)


def digest_of(text):
    """64 bits of a text: in a dict they take less memory than the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# ---- Queries and judgements ------------------------------------------------------------------
QUERY_IDS = ("_id", "id", "qid")
QUERY_ADVICE = ('A line of queries should be id<TAB>text, or {"_id": "…", "text": "…"} in JSON '
                "(or id, qid; query). Rows that have their documents take no --qrels.")
QRELS_ADVICE = ('A line of qrels should be "qid 0 docid grade" or "qid docid grade", with tabs or '
                "spaces. --max_label is the highest grade of your scale.")
GRADE_HEADERS = ("score", "grade", "label", "rel", "relevance")


@dataclass
class Query:
    """A query, what was judged for it, and where that is in the corpus."""
    text: str
    names: set = field(default_factory=set)  # its ids, or the ways in which rows write it
    judgements: dict = field(default_factory=dict)  # {digest of a document's text or id: label}
    contradictions: int = 0  # judgements that differ from an earlier one of the same document
    labels: dict = field(default_factory=dict)  # {number of a judged document: label}
    relevant: set = field(default_factory=set)  # numbers of the relevant documents
    lost: set = field(default_factory=set)  # digests of those that the corpus has not

    def judge(self, document, label):
        """Note the label of the document with this digest; of several the highest counts."""
        earlier = self.judgements.get(document, label)
        if earlier != label:
            self.contradictions += 1
        self.judgements[document] = max(earlier, label)

    def has_relevant(self, middle):
        """Whether a document was judged relevant: its label is `middle` or more."""
        return any(label >= middle for label in self.judgements.values())

    def relevant_count(self):
        """How many relevant documents there are, in the corpus or not."""
        return len(self.relevant) + len(self.lost)

    def recall(self, numbers):
        """The share of the relevant documents that is among these."""
        return len(self.relevant.intersection(numbers)) / self.relevant_count()


def query_of(queries, text, name):
    """The Query of this text in `queries`, {normal form of the text: Query}, put in if need be."""
    query = queries.setdefault(normal_form(text), Query(text))
    query.names.add(name)
    return query


def read_judged_rows(options):
    """The queries of rows, with the judgements of the texts."""
    queries = {}
    rows = read_rows(options.queries, options.min_label, options.max_label)
    try:
        for text, content, label, _ in rows:
            query = query_of(queries, text, text)
            query.judge(digest_of(bare(content)), label)
    except UserError as error:
        if queries or not Path(options.queries).is_file():
            raise
        raise UserError(f"{error}\nQueries without documents take --qrels, a file that tells by "
                        "ids which are relevant") from error
    return list(queries.values())


def parsed_lines(path, parse, advice):
    """Yield what `parse(number, line)` makes of each line that is not blank, unless it is None.

    UserError after the last line: the first ten of which it raised ValueError.
    """
    bad_lines = BadLines()
    number = 0
    with opened_text(path, "\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                parsed = parse(number, line.rstrip("\r\n"))
            except (ValueError, RecursionError) as error:
                bad_lines.add(number, error)
                continue
            if parsed is not None:
                yield parsed
    if bad_lines.count:
        raise UserError(bad_lines.message(path, advice))
    if not number:
        raise UserError(f"{path}: no lines\n{advice}")


def parse_query(_, line):
    """Id and text in a line of queries; ValueError says what is wrong."""
    if line.lstrip().startswith("{"):
        sample = object_of(line)
        name = id_of(sample, QUERY_IDS)
        text = sample.get("text")
        if text is None:
            text = sample.get("query")
    else:
        name, tab, text = line.partition("\t")
        if not tab:
            raise ValueError("neither a JSON object nor id<TAB>text")
        name = name.strip()
    if not name:
        raise ValueError("the id is missing")
    check_text("query", text)
    return name, text.strip()


def parse_judgement(options, number, line):
    """Ids of query and document, and label, in a line of qrels; None for a header.

    ValueError says what is wrong.
    """
    separator = "\t" if "\t" in line else None
    fields = [text.strip() for text in line.strip().split(separator)]
    if len(fields) not in (3, 4):
        raise ValueError(f"{len(fields)} fields instead of 4, or 3")
    query, *_, document, grade = fields
    if number == 1 and grade.lower() in GRADE_HEADERS:
        return None
    label = number_of(grade)
    if label > options.max_label:
        raise ValueError(f"grade {label} is above max_label {options.max_label}")
    return query, document, max(label, options.min_label)


def read_judged_ids(options):
    """The queries of a file of them, with the judgements that qrels have of the ids."""
    queries, query_of_id = {}, {}
    repeated = 0
    for name, text in parsed_lines(options.queries, parse_query, QUERY_ADVICE):
        earlier = query_of_id.get(name)
        if earlier is None:
            query_of_id[name] = query_of(queries, text, name)
        elif normal_form(earlier.text) != normal_form(text):
            repeated += 1
    if repeated:
        say(f"{options.queries}: lines with the id of an earlier one and another text: {repeated}. "
            "The earlier one counts.")

    unknown = set()
    parse = partial(parse_judgement, options)
    for name, document, label in parsed_lines(options.qrels, parse, QRELS_ADVICE):
        if name in query_of_id:
            query_of_id[name].judge(digest_of(document), label)
        else:
            unknown.add(name)
    if unknown and not any(query.judgements for query in queries.values()):
        examples = f"{sorted(unknown)[0]!r}, and there {next(iter(query_of_id))!r}"
        raise UserError(f"{options.qrels}: no id of a query is one of {options.queries} (here "
                        f"{examples}, for one): are these the same queries, and is the query's id "
                        "the first column?")
    if unknown:
        say(f"{options.qrels}: queries that are not in {options.queries}: {len(unknown)}. Their "
            "judgements are not used.")
    return list(queries.values())


def read_judged_queries(options):
    """The queries that have a relevant document; the others are counted and said.

    UserError where there are none.
    """
    if options.qrels:
        queries = read_judged_ids(options)
    else:
        queries = read_judged_rows(options)

    path = options.queries
    joined = sum(len(query.names) - 1 for query in queries)
    if joined:
        say(f"{path}: queries that repeat the text of another: {joined}. Each text is one query, "
            "with the judgements of all.")
    contradictions = sum(query.contradictions for query in queries)
    if contradictions:
        say("Judgements that contradict another of the same query and document: "
            f"{contradictions}. The highest label counts.")

    judged = [query for query in queries if query.has_relevant(options.middle)]
    if not judged:
        raise UserError(f"{path}: no query has a relevant document, one with a label of "
                        f"{options.middle:g} or more")
    say(f"{path}: queries with a relevant document (label {options.middle:g} or more): "
        f"{len(judged)}. Without one, and left out: {len(queries) - len(judged)}.")
    return judged


# ---- Corpus ----------------------------------------------------------------------------------
@dataclass
class DistinctCorpus(Corpus):
    """A corpus with each text once, white space aside, whose documents are found by text or id."""
    number_of_text: dict = field(default_factory=dict)  # {digest of a bare text: document}
    number_of_id: dict = field(default_factory=dict)  # {digest of an id: document}
    repeated_texts: int = 0
    repeated_ids: int = 0  # with another text than before

    def add(self, name, text):
        """Take a document in, with its id, or None; ValueError where it could not be scored."""
        check_text("content", text)
        number = self.number_of_text.setdefault(digest_of(bare(text)), len(self))
        if number < len(self):
            self.repeated_texts += 1
        else:
            super().add(name, text)
        if name is not None and self.number_of_id.setdefault(digest_of(name), number) != number:
            self.repeated_ids += 1


def say_documents(corpus, path):
    """Say how many documents there are, and what was found twice."""
    say(f"{path}: documents: {len(corpus)}.")
    if corpus.repeated_texts:
        say(f"{path}: lines that repeat the text of an earlier one: {corpus.repeated_texts}. Each "
            "text is one document.")
    if corpus.repeated_ids:
        say(f"{path}: lines with the id of an earlier one and another text: "
            f"{corpus.repeated_ids}. The id means the earlier one.")


def find_judged(queries, corpus, options):
    """Note in the queries which documents of the corpus were judged; say how many it has not.

    UserError where it has no relevant one at all.
    """
    number_of = corpus.number_of_id if options.qrels else corpus.number_of_text
    for query in queries:
        for document, label in query.judgements.items():
            number = number_of.get(document)
            if number is not None:
                query.labels[number] = max(label, query.labels.get(number, label))
            elif label >= options.middle:
                query.lost.add(document)
        query.relevant = {number for number, label in query.labels.items()
                          if label >= options.middle}

    lost = set().union(*(query.lost for query in queries))
    if not any(query.relevant for query in queries):
        how = "whole text, white space aside; a title stands before its document's text"
        if options.qrels:
            how = f"id: in JSON {', '.join(DOCUMENT_IDS)}, in TSV the first column"
            if not corpus.number_of_id:
                how += ". No document has one"
        raise UserError(f"{options.corpus}: the relevant documents ({len(lost)}) are not in it. "
                        f"They are looked for by their {how}")
    if lost:
        count = sum(1 for query in queries if query.lost)
        say(f"{options.corpus}: relevant documents that are not in it: {len(lost)}; queries that "
            f"have one of them: {count}. They count as not found.")


# ---- Search ----------------------------------------------------------------------------------
def find_candidates(queries, corpus, options):
    """The Ranking of the first k documents for each query."""
    texts = [query.text for query in queries]
    language = None
    if options.retriever != "embeddings":
        language = search_language(options.language, texts, corpus)
        say(f"Words by {WORDS_BY[language]}.")
    rankings = Retriever(language, options.embedding_model).search(texts, corpus, options.k)
    for ranking in rankings:
        if not all(map(math.isfinite, ranking.scores)):
            raise UserError(f"{options.embedding_model} gives scores that are no numbers: take "
                            "another --embedding_model")
    return rankings


# ---- Output and report -----------------------------------------------------------------------
def write(queries, rankings, corpus, options):
    """Write the queries for which something was found, gzip where the output's name ends so.

    UserError, and nothing is written, where a line would be too long for train_bert_rerank.py.
    """
    output = Path(options.output)
    with whole_file(output) as raw:
        is_gzip = output.suffix == ".gz"
        with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if is_gzip else nullcontext(raw) as file:
            for query, ranking in zip(tqdm(queries, "Writing"), rankings, strict=True):
                if ranking.numbers:
                    file.write(line_of(query, ranking, corpus, options))


def line_of(query, ranking, corpus, options):
    """A query with its hits as a line of JSONL; UserError where it is too long to be read."""
    hits = []
    for number, score in zip(*ranking, strict=True):
        label = query.labels.get(number, options.min_label)
        hits.append({"content": corpus.text(number), "label": label, "score": score})
    sample = {"query": query.text, "hits": hits, "relevant": query.relevant_count()}
    line = json.dumps(sample, ensure_ascii=False).encode()
    if len(line) > LONGEST_LINE:
        raise UserError(f"the {len(hits)} documents of a query are longer than "
                        f"{LONGEST_LINE >> 20} MB, which a line may have: take a smaller --k, or "
                        "cut long documents into passages")
    return line + b"\n"


def say_outcome(queries, rankings, options):
    """Say what was written, and how much of what is relevant the search found."""
    found = [ranking.numbers for ranking in rankings]
    empty = found.count([])
    say(f"{options.output}: queries: {len(found) - empty}, candidates: {sum(map(len, found))}.")
    if empty:
        say(f"Queries for which nothing is found: {empty}. They are not in the file, and count as "
            "0 in recall.")
    say_recall(queries, found, options.k)
    say_unjudged(queries, found, options)

    scale = ""
    if (options.min_label, options.max_label) != (0, 1):
        scale = f" --min_label={options.min_label} --max_label={options.max_label}"
    say("Next: python train_bert_rerank.py --train_dataset train.jsonl --eval_dataset "
        f"{shlex.quote(options.output)}{scale}")


def recalls_at(cutoff, queries, found):
    """The recall of each query among the first `cutoff` of the documents found for it."""
    recalls = []
    for query, numbers in zip(queries, found, strict=True):
        recalls.append(query.recall(numbers[:cutoff]))
    return recalls


def say_recall(queries, found, k):
    """Say recall@10 and recall@k, means over the queries, of the documents found for each."""
    for cutoff in sorted({min(10, k), k}):
        recalls = recalls_at(cutoff, queries, found)
        mean = sum(recalls) / len(recalls)
        say(f"recall@{cutoff}: {mean:.4f} (the share of a query's relevant documents that is among "
            f"its first {cutoff}, mean over all {len(queries)})")

    recalls = recalls_at(k, queries, found)
    say(f"Queries with all their relevant documents among the first {k}: {recalls.count(1)}; with "
        f"none of them: {recalls.count(0)}.")
    if max(recalls) == 0:
        say("!!! WARNING !!! Nothing relevant is found for any query: is this the right corpus, and "
            "the right --language?")
    elif min(recalls) < 1:
        say("Relevant documents that were not found are the ceiling of every reranker: it can only "
            "order what the search found.")


def say_unjudged(queries, found, options):
    """Say how many candidates were judged, and what it means where most were not."""
    judged = 0
    for query, numbers in zip(queries, found, strict=True):
        judged += len(query.labels.keys() & set(numbers))
    total = sum(map(len, found))
    unjudged = total - judged
    say(f"Candidates: {judged} judged, {unjudged} not judged ({unjudged / total:.1%}), which count "
        f"as irrelevant (label {options.min_label}).")
    if unjudged > judged:
        say("Most candidates were never judged. Where some of them are relevant in truth, metrics "
            "are too low, and a model that ranks them high looks worse than it is.")


# ---- A run -----------------------------------------------------------------------------------
def retrieve(options):
    """Write options.output as the command line says."""
    output = Path(options.output)
    check_output(options.output)
    if output.exists():
        raise UserError(f"{output} exists already: remove it, or take another --output")

    seed_everything(0)
    queries = read_judged_queries(options)
    # The texts take as much room as in the corpus: they go where the output goes, whose folder may
    # have yet to be made.
    folder = next(folder for folder in output.absolute().parents if folder.exists())
    with tempfile.TemporaryFile(dir=folder) as store:
        corpus = DistinctCorpus(store)
        read_corpus(options.corpus, corpus)
        say_documents(corpus, options.corpus)
        find_judged(queries, corpus, options)
        rankings = find_candidates(queries, corpus, options)
        if not any(ranking.numbers for ranking in rankings):
            raise UserError("nothing is found for any query: no document has a word of one. Are "
                            "queries and corpus in the same language, and is it --language?")
        write(queries, rankings, corpus, options)
    say_outcome(queries, rankings, options)


# ---- Command line ----------------------------------------------------------------------------
def parse_command_line():
    """The options, as argparse gives them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("queries", metavar="ROWS_OR_QUERIES",
        help="JSONL rows with queries and their relevant documents; with --qrels: the queries")
    add("--qrels", help="which documents are relevant, by ids")
    add("--corpus", required=True, help="documents to search")
    add("--output", required=True, help="JSONL to write; gzip where it ends in .gz")
    add("--k", type=int, default=50, help="candidates of a query (default 50)")
    add("--retriever", choices=("bm25", "embeddings", "both"), default="bm25",
        help="what finds the candidates (default bm25)")
    add("--embedding_model", help="of sentence-transformers: for embeddings or both")
    add("--language", choices=("auto", "zh", "en"), default="auto",
        help="how BM25 finds words (default auto)")
    add("--min_label", type=float, default=0.0,
        help="of irrelevant documents, and of those that were not judged (default 0)")
    add("--max_label", type=float, default=1.0, help="of fully relevant documents (default 1)")

    return parser.parse_args()


def check_options(options):
    """UserError where options contradict each other."""
    if options.k < 1:
        raise UserError(f"k {options.k}: it should be 1 or more")
    if options.retriever == "bm25" and options.embedding_model:
        raise UserError("--retriever bm25 takes no --embedding_model: leave it out, or choose "
                        "embeddings or both")
    if options.retriever != "bm25" and not options.embedding_model:
        raise UserError(f"--retriever {options.retriever} takes a model of sentence-transformers: "
                        "add --embedding_model with its name or folder")


def main():
    """Parse the command line and retrieve; a user's mistake is one message and exit status 1."""
    options = parse_command_line()
    try:
        options.min_label, options.max_label = scale_of(options)
        options.middle = (options.min_label + options.max_label) / 2
        check_options(options)
        retrieve(options)
    except ModuleNotFoundError as error:
        sys.exit(f"Error: {error}: pip install bm25s PyStemmer jieba sentence-transformers")
    except (UserError, OSError) as error:
        sys.exit(f"Error: {printable(error)}")
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing is written.")


if __name__ == "__main__":
    main()
