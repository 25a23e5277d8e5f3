"""Mine hard negatives: documents of a corpus that a retriever finds for a query, and that are not relevant to it.

    pip install bm25s PyStemmer    # for Chinese: bm25s jieba; for --embedding_model: sentence-transformers
    python tools/mine_hard_negatives.py rows.jsonl --corpus corpus.jsonl --output mined.jsonl

The rows have any shape that train_bert_rerank.py reads; of a query, those with a label in the upper half of the
scale are its positives, the others are known to be irrelevant. `--corpus` is JSONL with the text under content, text or
contents (a title, if there, is put before it), or TSV, id<TAB>text; plain or gzip. The output holds all rows as they
were and after those of a query with a positive its mined negatives, with `min_label`: a complete training file.

Candidates are BM25's first `--range_max` documents, or with `--embedding_model` those of BM25 and of the embeddings by
reciprocal rank fusion (Cormack et al. 2009). The reranker scores them, and what may be relevant though nobody labelled
it is left out: the margins compare its probability with the positive's, with the median of a query's positives where
there are several. `--relative_margin 0.05` is NV-Retriever's TopK-PercPos at 95 % (Moreira et al. 2024,
arXiv 2407.15831), which applies it to the similarity of embeddings. Margins and sampling are named as in
sentence-transformers' mine_hard_negatives. Look at the examples that are printed: what a margin keeps and leaves out
depends on the reranker.

A call that was interrupted goes on where it was, from OUTPUT.unfinished, and gives the same bytes. Counts and examples
are printed and kept in OUTPUT.report.md.
"""

import argparse
import gzip
import hashlib
import json
import math
import random
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convert_data import check_output  # noqa: E402
from retrieval import (  # noqa: E402
    DEVICE,
    WORDS_BY,
    Corpus,
    Retriever,
    bare,
    read_corpus,
    search_language,
)

from train_bert_rerank import (  # noqa: E402
    BertRerankerModel,
    UserError,
    printable,
    read_rows,
    say,
    seed_everything,
    whole_file,
)


# ---- Queries ---------------------------------------------------------------------------------
@dataclass
class Query:
    """A query, its rows, and what a run finds for it."""
    text: str
    rows: list = field(default_factory=list)  # (content, label)
    positives: list = field(default_factory=list)  # texts; without one nothing is mined for it
    numbers: list = field(default_factory=list)  # of the documents that the retriever found
    scores: list | None = None  # probabilities of the positives, then of the scored candidates


def read_queries(options, digest):
    """The queries of the rows, in their order; all bytes of the file go into `digest`."""
    queries = {}
    rows = read_rows(options.rows, options.min_label, options.max_label, digest)
    for text, content, label, _ in rows:
        query = queries.setdefault(text, Query(text))
        query.rows.append((content, label))
        if label >= options.middle:
            query.positives.append(content)
    return list(queries.values())


# ---- Candidates of a query -------------------------------------------------------------------
NOT_NEEDED = "not needed"  # it could be a negative, but there are enough


@dataclass
class Candidate:
    """A document that the retriever found for a query."""
    rank: int
    text: str
    score: float | None = None  # the reranker's probability
    reason: str = ""  # why it is no negative


@dataclass
class Mined:
    """What became of the candidates of a query."""
    negatives: list  # Candidates, highest probability first
    others: list  # Candidates that were scored and are no negatives, with their reasons
    reasons: list  # why each of those that were not scored is none

    def texts(self):
        """The texts of the negatives."""
        return [negative.text for negative in self.negatives]


def screen(query, corpus, options):
    """The Candidates of a query that are to be scored, and why each other is not: [reason]."""
    reason_of = {}  # {bare text: why a candidate with it is out}
    for content, label in query.rows:
        is_positive = label >= options.middle
        reason_of[bare(content)] = "known positive" if is_positive else "known irrelevant"

    to_score, reasons = [], []
    for rank in range(options.range_min, len(query.numbers)):
        text = corpus.text(query.numbers[rank])
        reason = reason_of.get(bare(text))
        if reason:
            reasons.append(reason)
        else:
            reason_of[bare(text)] = "same text as another candidate"
            to_score.append(Candidate(rank, text))
    return to_score, reasons


def limit_passed(score, positive, options):
    """The name of the first limit that a candidate's probability lies above, "" for none.

    `positive` is the probability that the margins start from.
    """
    limits = {}
    if options.max_score is not None:
        limits["max_score"] = options.max_score
    if options.absolute_margin is not None:
        limits["absolute_margin"] = positive - options.absolute_margin
    if options.relative_margin is not None:
        limits["relative_margin"] = positive * (1 - options.relative_margin)
    for name, limit in limits.items():
        if score > limit:
            return name
    return ""


def drawn_places(fit, query, options):
    """The places, in `fit`, of the candidates that become the negatives of a query."""
    count = min(options.num_negatives, len(fit))
    if options.sampling_strategy == "top":
        return list(range(count))
    # Of each query on its own: what other queries there are changes nothing.
    draw = random.Random(f"{options.seed} {query.text}")
    return sorted(draw.sample(range(len(fit)), count))


def choose(query, corpus, options):
    """What became of the candidates of a query that was scored, as Mined."""
    candidates, reasons = screen(query, corpus, options)
    count = len(query.positives)
    for candidate, score in zip(candidates, query.scores[count:], strict=True):
        candidate.score = score
    positive = float(np.median(query.scores[:count]))

    fit, others = [], []
    for candidate in sorted(candidates, key=lambda candidate: (-candidate.score, candidate.rank)):
        candidate.reason = limit_passed(candidate.score, positive, options)
        if candidate.reason:
            others.append(candidate)
        else:
            fit.append(candidate)

    places = drawn_places(fit, query, options)
    for place, candidate in enumerate(fit):
        if place not in places:
            candidate.reason = NOT_NEEDED
            others.append(candidate)
    return Mined([fit[place] for place in places], others, reasons)


# ---- Scoring, which goes on where it was -----------------------------------------------------
# OUTPUT.unfinished holds a key of all that candidates and scores depend on, then in JSON a line
# with the candidates' numbers of all queries, and for each query a line of probabilities.
def key_of(digest, model, settings):
    """The first line of a sidecar: `digest`, of rows and corpus, with the model and `settings`."""
    for part in (model.plain_tokenizer.to_str(), model.model.config.to_json_string(), settings):
        digest.update(part.encode())
    for weight in model.state_dict().values():
        digest.update(weight.numpy())
    return digest.hexdigest().encode()


def earlier_lines(sidecar, key):
    """The whole lines after the first, `key`, that an earlier call left in its sidecar."""
    if not sidecar.exists():
        return []
    first_line = key + b"\n"
    content = sidecar.read_bytes()
    if first_line.startswith(content):  # that call ended before it had written more
        return []
    if not content.startswith(first_line):
        raise UserError(f"{sidecar} is of other data, another model or other settings: remove it, "
                        "or change --output")
    lines = content.splitlines(keepends=True)[1:]
    return [line for line in lines if line.endswith(b"\n")]  # the last may have been cut off


def restore(queries, lines, corpus, options):
    """Give queries what the lines of a sidecar hold; scores may be there of the first alone.

    ValueError where the lines are not of these queries and this corpus.
    """
    numbers, *scores = map(json.loads, lines)
    check_lists(numbers, int, len(queries))
    for query, numbers_of_query in zip(queries, numbers, strict=True):
        if not all(0 <= number < len(corpus) for number in numbers_of_query):
            raise ValueError("a candidate is not in the corpus")
        query.numbers = numbers_of_query

    if len(scores) > len(queries):
        raise ValueError("more lines than queries")
    check_lists(scores, float, len(scores))
    for query, scores_of_query in zip(queries, scores, strict=False):
        candidates, _ = screen(query, corpus, options)
        if len(scores_of_query) != len(query.positives) + len(candidates):
            raise ValueError("a line has not as many scores as its query has texts")
        query.scores = scores_of_query


def check_lists(lists, kind, count):
    """ValueError unless `lists` are `count` lists of values of this kind."""
    if not isinstance(lists, list) or len(lists) != count:
        raise ValueError("not as many lists as queries")
    for values in lists:
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise ValueError("other values than there should be")


def load_reranker(name):
    """The reranker that scores; UserError for an encoder without a head: its scores are noise."""
    model = BertRerankerModel.from_pretrained(name).eval()
    if model.new_weights:
        raise UserError(f"{name} is no reranker: it lacks {', '.join(model.new_weights)}")
    return model


def score(model, query, corpus, options):
    """Probabilities of a query's positives, then of its candidates."""
    candidates, _ = screen(query, corpus, options)
    texts = query.positives + [candidate.text for candidate in candidates]
    pairs = [(query.text, text) for text in texts]
    return model.predict(pairs, show_progress_bar=False).tolist()


# ---- Output and report -----------------------------------------------------------------------
SHOWN_QUERIES = 5  # in the report, from all over the file
SHOWN_TEXTS = 3  # of each kind


@dataclass
class Tally:
    """What the report says of the queries so far."""
    queries: int = 0
    too_few: int = 0  # queries with fewer negatives than asked for
    counts: Counter = field(default_factory=Counter)  # {what became of a candidate: how many}
    examples: list = field(default_factory=list)  # lines

    def add(self, mined, options):
        """Count what was mined for a query."""
        self.queries += 1
        if len(mined.negatives) < options.num_negatives:
            self.too_few += 1
        self.counts.update("negative" for _ in mined.negatives)
        self.counts.update(mined.reasons)
        self.counts.update(candidate.reason for candidate in mined.others)


def examples_of(query, mined):
    """Lines that show some positives, negatives and texts that a limit kept out."""
    lines = [f"\n{' '.join(query.text.split())}\n"]
    for score, text in list(zip(query.scores, query.positives, strict=False))[:SHOWN_TEXTS]:
        lines.append(example_line(score, "positive", text))

    for candidate in mined.negatives[:SHOWN_TEXTS]:
        what = f"negative, rank {candidate.rank}"
        lines.append(example_line(candidate.score, what, candidate.text))

    left_out = [candidate for candidate in mined.others if candidate.reason != NOT_NEEDED]
    for candidate in left_out[:SHOWN_TEXTS]:
        what = f"out by {candidate.reason}, rank {candidate.rank}"
        lines.append(example_line(candidate.score, what, candidate.text))
    return lines


def example_line(score, what, text):
    """A document as the report shows it: its score, what became of it, how it begins."""
    return f"- {score:.3f} {what}: {' '.join(text.split())[:150]}"


def report_of(tally, queries, options):
    """The report of a run on `queries`, Markdown."""
    lines = [
        f"{tally.queries} queries with a positive of {len(queries)}; {tally.too_few} of them have "
        f"fewer than {options.num_negatives} negatives.",
        "",
        "| candidates | count | share |",
        "| --- | --- | --- |",
    ]
    for what, count in tally.counts.most_common():
        lines.append(f"| {what} | {count} | {count / tally.counts.total():.1%} |")
    lines += ["", "Examples, with the reranker's probabilities:", *tally.examples]
    return "\n".join(lines)


def write(output, queries, corpus, options):
    """Write rows and negatives to `output`, gzip where its name ends so; returns the report."""
    searched = [query.text for query in queries if query.positives]
    shown = set(searched[:: math.ceil(len(searched) / SHOWN_QUERIES)])
    tally = Tally()
    with whole_file(output) as raw:
        is_gzip = output.suffix == ".gz"
        with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if is_gzip else nullcontext(raw) as file:
            for query in queries:
                rows = query.rows
                if query.positives:
                    mined = choose(query, corpus, options)
                    rows = rows + [(text, options.min_label) for text in mined.texts()]
                    tally.add(mined, options)
                    if query.text in shown:
                        tally.examples += examples_of(query, mined)
                file.write(lines_of(query.text, rows))
    return report_of(tally, queries, options)


def lines_of(query, rows):
    """The (content, label) rows of a query as JSONL in UTF-8."""
    lines = ""
    for content, label in rows:
        row = {"query": query, "content": content, "label": label}
        lines += json.dumps(row, ensure_ascii=False) + "\n"
    return lines.encode()


# ---- A run -----------------------------------------------------------------------------------
def mine(options):
    """Mine as the command line says; returns the report."""
    output = Path(options.output)
    check_output(options.output)
    sidecar = output.with_name(f"{output.name}.unfinished")
    if output.exists() and not sidecar.exists():
        raise UserError(f"{output} exists already: remove it, or take another --output")

    seed_everything(options.seed)
    model = load_reranker(options.model_name_or_path)
    digest = hashlib.sha256()
    queries = read_queries(options, digest)
    searched = [query for query in queries if query.positives]
    if not searched:
        raise UserError(f"{options.rows}: no row has a label of {options.middle} or more: nothing "
                        "to mine for")

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output.parent) as store:  # of as many bytes as the texts have
        corpus = Corpus(store)
        read_corpus(options.corpus, corpus, digest)
        texts = [query.text for query in searched]
        language = search_language(options.language, texts, corpus)
        say(f"{len(corpus)} documents, {len(texts)} queries. Words by {WORDS_BY[language]}.")
        settings = [language, options.embedding_model, options.range_min, options.range_max,
                    options.middle]
        key = key_of(digest, model, repr(settings))

        lines = earlier_lines(sidecar, key)
        if not lines:
            retriever = Retriever(language, options.embedding_model)
            rankings = retriever.search(texts, corpus, options.range_max)
            numbers = [ranking.numbers for ranking in rankings]
            lines = [json.dumps(numbers).encode() + b"\n"]
        try:
            restore(searched, lines, corpus, options)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{sidecar} is damaged: remove it, and the call starts afresh "
                            f"({error})") from error
        with whole_file(sidecar) as file:  # without a line that was cut off
            file.writelines([key + b"\n", *lines])

        model.to(DEVICE)
        with open(sidecar, "ab") as file:
            for query in tqdm(searched, "Scoring"):
                if query.scores is None:  # else an earlier call did it
                    query.scores = score(model, query, corpus, options)
                    file.write(json.dumps(query.scores).encode() + b"\n")
                    file.flush()
        report = write(output, queries, corpus, options)

    with whole_file(output.with_name(f"{output.name}.report.md")) as file:
        file.write(report.encode())
    sidecar.unlink()
    return report


# ---- Command line ----------------------------------------------------------------------------
def number_or_none(text):
    """The number in `text`; None for "None"."""
    return None if text == "None" else float(text)


def parse_command_line():
    """The options, as argparse gives them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("rows", metavar="ROWS", help="JSONL rows with queries and their positives, plain or gzip")
    add("--corpus", required=True, help="documents to mine from")
    add("--output", required=True, help="JSONL to write; gzip where it ends in .gz")
    add("--model_name_or_path", default="BAAI/bge-reranker-large",
        help="the reranker that scores candidates: your best one (default BAAI/bge-reranker-large)")
    add("--embedding_model", help="of sentence-transformers: its candidates join those of BM25")
    add("--language", choices=("auto", "zh", "en"), default="auto",
        help="how BM25 finds words (default auto)")
    add("--num_negatives", type=int, default=4, help="of each query (default 4)")
    add("--range_min", type=int, default=0,
        help="the retriever's rank of the first candidate, from 0 (default 0)")
    add("--range_max", type=int, default=50,
        help="rank before which candidates end (default 50)")
    add("--sampling_strategy", choices=("top", "random"), default="top",
        help="top (default): highest probabilities")
    add("--max_score", type=number_or_none, help="no negatives of a probability above this")
    add("--absolute_margin", type=number_or_none, help="nor above the positive's less this")
    add("--relative_margin", type=number_or_none, default=0.05,
        help="nor above the positive's times 1 - this (default 0.05; None: no such limit)")
    add("--min_label", type=float, default=0.0,
        help="of irrelevant rows, and of those mined (default 0)")
    add("--max_label", type=float, default=1.0, help="of fully relevant rows (default 1)")
    add("--seed", type=int, default=42, help="of random sampling (default 42)")

    options = parser.parse_args()
    options.middle = (options.min_label + options.max_label) / 2
    if options.min_label.is_integer():
        options.min_label = int(options.min_label)  # rows say 0, not 0.0
    return options


def check_options(options):
    """UserError where options contradict each other."""
    for name in ("min_label", "max_label", "max_score", "absolute_margin", "relative_margin"):
        value = getattr(options, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{name} is {value}: it should be a number")
    if not 0 <= options.seed < 1 << 32:  # what numpy takes
        raise UserError(f"seed {options.seed}: it should be from 0 to {(1 << 32) - 1}")
    if options.min_label >= options.max_label:
        raise UserError(f"min_label {options.min_label} is not below max_label {options.max_label}")
    room = options.range_max - options.range_min
    if options.range_min < 0 or not 1 <= options.num_negatives <= room:
        raise UserError(
            f"{options.num_negatives} negatives of ranks {options.range_min} to "
            f"{options.range_max}: range_min counts from 0, and range_max is to leave room for "
            "num_negatives")


def main():
    """Parse the command line, mine, print the report."""
    options = parse_command_line()
    try:
        check_options(options)
        say("\n" + mine(options))
    except ModuleNotFoundError as error:
        sys.exit(f"Error: {error}: pip install bm25s PyStemmer jieba sentence-transformers")
    except (UserError, OSError) as error:
        sys.exit(f"Error: {printable(error)}")
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on from where it was.")


if __name__ == "__main__":
    main()
