"""What the tools that search a corpus share: reading it, BM25, the cosine of embeddings, and both fused."""

import gzip
import json
import os
import re
import shlex
import sys
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_bert_rerank import LONGEST_LINE, BadLines, UserError, language_of  # noqa: E402

DEVICE = torch.device("cpu")
if torch.accelerator.is_available():
    DEVICE = torch.accelerator.current_accelerator()


# ---- Corpus ----------------------------------------------------------------------------------
ADVICE = ('A line of a corpus, in UTF-8, should be {"content": "…"} in JSON (or text, contents; '
          "title before it), or id<TAB>text.")
NOT_UTF8 = "not UTF-8"
GZIP_MAGIC = b"\x1f\x8b"
DOCUMENT_IDS = ("_id", "id", "docid")


@dataclass
class Corpus:
    """The texts of the documents, on disk, since a million Python strings would fill the memory."""
    store: BinaryIO  # the texts, one after the other
    # [N + 1]: 0, and where each of N texts ends
    ends: array = field(default_factory=lambda: array("q", [0]))

    def __len__(self):
        return len(self.ends) - 1

    def add(self, name, text):
        """Take a document in, with its id, or None; here ids are not kept."""
        self.ends.append(self.ends[-1] + self.store.write(text.encode()))

    def text(self, number):
        """The text of a document."""
        self.store.seek(self.ends[number])
        return self.store.read(self.ends[number + 1] - self.ends[number]).decode()

    def texts(self):
        """All texts in their order, one at a time."""
        return map(self.text, range(len(self)))


def bare(text):
    """A text without its white space: texts that differ in that alone are the same."""
    return "".join(text.split())


def id_of(sample, keys):
    """The id in an object of JSON, a text, under the first of these keys that has one, or None.

    Numbers are ids as well: of 7, and of 7.0, as pandas writes it, the id is "7".
    """
    for key in keys:
        value = sample.get(key)
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) in (int, float):
            value = str(value)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def text_of_json(sample):
    """Title and body of a document in JSON; ValueError says what is wrong."""
    bodies = [sample.get(key) for key in ("content", "text", "contents")]
    body = next((body for body in bodies if body is not None), None)
    title = sample.get("title") or ""
    if body is None:
        raise ValueError("content is missing")
    if not isinstance(body, str) or not isinstance(title, str):
        raise ValueError("content or title is no text")

    text = f"{title} {body}".strip()
    text.encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair
    return text


def object_of(line):
    """The object in a line of JSON; ValueError where it holds anything else."""
    sample = json.loads(line)
    if not isinstance(sample, dict):
        raise ValueError("not a JSON object")
    return sample


def parse_document(line, is_json):
    """Id, None where it has none, and text in a line of a corpus; ValueError says what is wrong."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(NOT_UTF8) from error
    if is_json:
        sample = object_of(text)
        name = id_of(sample, DOCUMENT_IDS)
        text = text_of_json(sample)
    else:
        name, tab, text = text.partition("\t")
        if not tab:
            raise ValueError("neither a JSON object nor id<TAB>text")
        name = name.strip() or None
    if not text.strip():
        raise ValueError("the text is blank")
    return name, text.strip()


def corpus_lines(path, digest):
    """Yield (number, line) of a corpus, plain or gzip, blank lines left out.

    All its bytes go into `digest`, unless it is None. UserError where a line is too long.
    """
    with open(path, "rb") as raw, tqdm(desc="Loading corpus", total=os.path.getsize(path),
                                       unit="B", unit_scale=True) as bar:
        is_gzip = raw.peek(2)[:2] == GZIP_MAGIC
        file = gzip.GzipFile(fileobj=raw) if is_gzip else raw
        read_line = partial(file.readline, LONGEST_LINE + 1)
        for number, line in enumerate(iter(read_line, b""), start=1):
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}: line {number} is longer than {LONGEST_LINE >> 20} MB. "
                                f"{ADVICE}")
            if digest:
                digest.update(line)
            bar.update(raw.tell() - bar.n)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line


def read_corpus(path, corpus, digest=None):
    """Take all documents of a file into a Corpus, all its bytes into `digest`.

    UserError with the first ten bad lines.
    """
    bad_lines = BadLines()
    is_json = None
    try:
        for number, line in corpus_lines(path, digest):
            if is_json is None:  # as the first line has it
                is_json = line.lstrip().startswith(b"{")
            try:
                name, text = parse_document(line, is_json)
                corpus.add(name, text)
            except (ValueError, RecursionError) as error:
                bad_lines.add(number, error)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read or copied: {reason}") from error

    if bad_lines.count:
        advice = ADVICE
        if any(NOT_UTF8 in line for line in bad_lines.first):
            advice = advice_on_encoding(path) + ADVICE
        raise UserError(bad_lines.message(path, advice))
    if not len(corpus):
        raise UserError(f"{path}: no lines\n{ADVICE}")


def advice_on_encoding(path):
    """Lines with the commands that make a corpus UTF-8."""
    advice = ""
    for name, encoding in (("Chinese of Windows", "GB18030"), ("'Unicode text'", "UTF-16")):
        words = ["iconv", "-f", encoding, "-t", "UTF-8", path]
        advice += f"{name} is made UTF-8 by: {shlex.join(words)} > corpus.utf8\n"
    return advice


# ---- Words -----------------------------------------------------------------------------------
WORDS_BY = {"zh": "jieba (zh)", "en": "the English stemmer of PyStemmer (en)"}


def search_language(language, queries, corpus):
    """The language, "zh" or "en", by whose words BM25 searches.

    UserError where "auto" cannot tell it from the first 500 `queries` and documents.
    """
    if language != "auto":
        return language
    language = language_of(chain(queries[:500], islice(corpus.texts(), 500)))
    if language not in ("zh", "en"):
        raise UserError("the language is neither clearly Chinese nor English: pass --language zh "
                        "or en")
    return language


def tokenizer_of(language):
    """A function from a text to its terms.

    Of Chinese: jieba's words with the shorter ones in them; of English: the stems of words.
    """
    if language == "zh":
        import jieba

        jieba.setLogLevel("WARNING")

        def words(text):
            return [word for word in jieba.lcut_for_search(text.lower()) if word[0].isalnum()]

        return words
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    return lambda text: stemmer.stemWords(re.findall(r"\w+", text.lower()))


# ---- Search ----------------------------------------------------------------------------------
CHUNK = 10_000  # documents that are embedded before the best so far are kept
MOST_SCORES = 100_000_000  # of queries and documents at once: 0.4 GB
RRF_K = 60  # Cormack et al.'s constant; their ranks count from 1


class Ranking(NamedTuple):
    """The documents that a search found for a query, best first."""
    numbers: list  # of the documents in the corpus
    scores: list  # what they are sorted by


@dataclass
class Retriever:
    """What searches: BM25, the embeddings of a model, or both fused by reciprocal ranks."""
    language: str | None  # "zh" or "en", by whose words BM25 searches; None: no BM25
    embedding_model: str | None  # of sentence-transformers; None: no embeddings

    def search(self, queries, corpus, count):
        """The Ranking of the first `count` documents for each query."""
        searches = []
        if self.language:
            tokenize = tokenizer_of(self.language)
            searches.append(bm25_candidates(corpus.texts(), queries, tokenize, count))
        if self.embedding_model:
            name = self.embedding_model
            searches.append(embedding_candidates(corpus.texts(), queries, name, count))
        if len(searches) == 1:
            return searches[0]
        return [fuse(rankings, count) for rankings in zip(*searches, strict=True)]


def bm25_candidates(documents, queries, tokenize, count):
    """The Ranking of the `count` documents with the highest BM25 above 0 for each query.

    Of equals the first comes first. Lucene's variant, k1 1.5, b 0.75. All terms that are in no
    query are one to the index: they only count towards the length of a document.
    """
    import bm25s

    terms = [tokenize(query) for query in queries]
    vocabulary = {"": 0}  # 0: the terms that are in no query
    for term in chain(*terms):
        vocabulary.setdefault(term, len(vocabulary))

    ids = []
    for text in tqdm(documents, "Tokenizing corpus"):
        ids.append(array("i", [vocabulary.get(term, 0) for term in tokenize(text)]))
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index((ids, vocabulary))

    count = min(count, len(ids))
    candidates = []
    for query_terms in tqdm(terms, "Searching by BM25"):
        scores = index.get_scores_from_ids([vocabulary[term] for term in query_terms])
        places = best_above_zero(scores, count)
        candidates.append(Ranking(places.tolist(), scores[places].tolist()))
    return candidates


def best_above_zero(scores, count):
    """The places of the `count` highest scores [N] above 0, highest first, of equals the first.

    [0, 2, 1, 2, 1] and 3: [1, 3, 2].
    """
    # Of a million scores only those are sorted that are as high as the lowest of the result.
    lowest = np.partition(scores, -count)[-count]
    lowest = max(lowest, np.finfo(scores.dtype).tiny)
    places = np.flatnonzero(scores >= lowest)
    order = np.argsort(-scores[places], kind="stable")
    return places[order][:count]


def embedding_candidates(documents, queries, name, count):
    """The Ranking of the `count` documents nearest to each query.

    By the cosine under the embedding model `name`.
    """
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(name, device=str(DEVICE))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error)[:500]
        raise UserError(f"--embedding_model {name} cannot be loaded: {reason}") from error
    options = {"normalize_embeddings": True, "convert_to_tensor": True, "show_progress_bar": False}
    query_vectors = model.encode_query(queries, **options)  # [Q, H]

    # The best so far: scores and numbers, both [Q, up to `count`]
    scores = query_vectors.new_zeros(len(queries), 0)
    numbers = torch.zeros(len(queries), 0, dtype=torch.long).to(DEVICE)
    documents = iter(documents)
    size = min(CHUNK, MOST_SCORES // len(queries) + 1)
    with tqdm(desc="Searching by embeddings", unit="documents") as bar:
        while chunk := list(islice(documents, size)):
            vectors = model.encode_document(chunk, **options)  # [C, H]
            chunk_numbers = torch.arange(bar.n, bar.n + len(chunk), device=DEVICE)
            chunk_numbers = chunk_numbers.expand(len(queries), -1)  # [Q, C]
            scores = torch.cat([scores, query_vectors @ vectors.T], dim=1)
            numbers = torch.cat([numbers, chunk_numbers], dim=1)

            scores, kept = scores.topk(min(count, scores.shape[1]))
            numbers = numbers.gather(1, kept)
            bar.update(len(chunk))
    return [Ranking(*ranking) for ranking in zip(numbers.tolist(), scores.tolist(), strict=True)]


def fuse(rankings, count):
    """The Ranking of the first `count` documents of several rankings: reciprocal rank fusion.

    The score is the sum of a document's reciprocal ranks; of equals the first comes first.
    """
    weights = Counter()
    for ranking in rankings:
        for rank, number in enumerate(ranking.numbers, start=1):
            weights[number] += 1 / (RRF_K + rank)
    numbers = sorted(weights, key=lambda number: (-weights[number], number))[:count]
    return Ranking(numbers, [weights[number] for number in numbers])
