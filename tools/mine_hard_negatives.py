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
import os
import random
import re
import sys
import tempfile
import zlib
from array import array
from collections import Counter
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_bert_rerank import (  # noqa: E402
    LONGEST_LINE,
    BertRerankerModel,
    UserError,
    language_of,
    printable,
    read_rows,
    say,
    seed_everything,
    whole_file,
)

ADVICE = 'A line of a corpus should be {"content": "…"} in JSON (or text, contents; title before it), or id<TAB>text.'
CHUNK = 10_000  # documents that are embedded before the best so far are kept
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def parse_document(line, is_json):
    """The text of a line of a corpus; ValueError says what is wrong."""
    text = line.decode("utf-8")
    if is_json:
        sample = json.loads(text)
        if not isinstance(sample, dict):
            raise ValueError("not a JSON object")
        body = next((sample[key] for key in ("content", "text", "contents") if sample.get(key) is not None), None)
        title = sample.get("title") or ""
        if not isinstance(body, str) or not isinstance(title, str):
            raise ValueError("content is missing" if body is None else "content or title is no text")
        text = f"{title} {body}".strip()
        text.encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair
    else:
        _, tab, text = text.partition("\t")
        if not tab:
            raise ValueError("neither a JSON object nor id<TAB>text")
    if not text.strip():
        raise ValueError("the text is blank")
    return text.strip()


def read_corpus(path, store, digest):
    """Write the texts of a corpus one after the other to the file `store` and all its bytes into `digest`; returns
    where each of N texts ends, after a 0: [N + 1]. UserError with the first ten bad lines."""
    ends, bad, is_json = array("q", [0]), [], None
    try:
        with open(path, "rb") as raw, tqdm(desc="Loading corpus", total=os.path.getsize(path), unit="B",
                                           unit_scale=True) as bar:  # fmt: skip
            file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), start=1):
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{path}: line {number} is longer than {LONGEST_LINE >> 20} MB. {ADVICE}")
                digest.update(line)
                bar.update(raw.tell() - bar.n)
                line = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"")
                if not line.strip():
                    continue
                is_json = line.lstrip().startswith(b"{") if is_json is None else is_json  # as the first line has it
                try:
                    ends.append(ends[-1] + store.write(parse_document(line, is_json).encode()))
                except (ValueError, RecursionError) as error:
                    bad.append(f"\n  line {number}: {error}" if len(bad) < 10 else "")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read or copied: {getattr(error, 'strerror', None) or error}") from error
    if bad or len(ends) == 1:
        more = f"\n  … and {len(bad) - 10} more" * (len(bad) > 10)
        raise UserError(f"{path}: {len(bad) or 'no'} {'bad ' * bool(bad)}lines{''.join(bad)}{more}\n{ADVICE}")
    return ends


def read_text(store, ends, number):
    """Document `number` of the corpus: on disk, since a million Python strings would fill the memory."""
    store.seek(ends[number])
    return store.read(ends[number + 1] - ends[number]).decode()


def tokenizer_of(language):
    """A function from a text to its terms: jieba's words with the shorter ones in them, or stems of English words."""
    if language == "zh":
        import jieba

        jieba.setLogLevel("WARNING")
        return lambda text: [word for word in jieba.lcut_for_search(text.lower()) if word[0].isalnum()]
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    return lambda text: stemmer.stemWords(re.findall(r"\w+", text.lower()))


def bm25_candidates(documents, queries, tokenize, count):
    """The numbers of the `count` documents with the highest BM25 above 0 for each query, best first, of equals the
    first. Lucene's variant, k1 1.5, b 0.75. All terms that are in no query are one to the index: they only count
    towards the length of a document."""
    import bm25s

    terms = [tokenize(query) for query in queries]
    vocabulary = {"": 0, **{term: number for number, term in enumerate(dict.fromkeys(chain(*terms)), start=1)}}
    ids = [array("i", (vocabulary.get(term, 0) for term in tokenize(text)))
           for text in tqdm(documents, "Tokenizing corpus")]  # fmt: skip
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index((ids, vocabulary))
    found, count = [], min(count, len(ids))
    for each in tqdm(terms, "Searching by BM25"):
        scores = index.get_scores_from_ids([vocabulary[term] for term in each])
        least = max(np.partition(scores, -count)[-count], np.finfo(scores.dtype).tiny)
        chosen = np.flatnonzero(scores >= least)
        found.append(chosen[np.argsort(-scores[chosen], kind="stable")][:count].tolist())
    return found


def embedding_candidates(documents, queries, name, count):
    """The numbers of the `count` documents nearest to each query by cosine, best first, under an embedding model."""
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(name, device=str(DEVICE))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--embedding_model {name} cannot be loaded: {str(error)[:500]}") from error
    options = {"normalize_embeddings": True, "convert_to_tensor": True, "show_progress_bar": False}
    of_queries = model.encode_query(queries, **options)
    scores, numbers = of_queries.new_zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.long).to(DEVICE)
    documents, size = iter(documents), min(CHUNK, 100_000_000 // len(queries) + 1)  # at most 0.4 GB of scores at once
    with tqdm(desc="Searching by embeddings", unit="documents") as bar:
        while chunk := list(islice(documents, size)):
            new = of_queries @ model.encode_document(chunk, **options).T
            own = torch.arange(bar.n, bar.n + len(chunk), device=DEVICE).expand(len(queries), -1)
            scores, numbers = torch.cat([scores, new], dim=1), torch.cat([numbers, own], dim=1)
            scores, kept = scores.topk(min(count, scores.shape[1]))
            numbers = numbers.gather(1, kept)
            bar.update(len(chunk))
    return numbers.tolist()


def fuse(rankings):
    """One ranking of several: reciprocal rank fusion."""
    weights = Counter()
    for rank, number in chain(*map(enumerate, rankings)):
        weights[number] += 1 / (61 + rank)
    return sorted(weights, key=lambda number: (-weights[number], number))


def earlier_lines(sidecar, key):
    """The complete lines that an earlier call with the same `key`, the first line, left in its sidecar."""
    first, *lines = sidecar.read_bytes().splitlines(keepends=True) if sidecar.exists() else [key]
    if first.strip() != key:
        raise UserError(f"{sidecar} is of other data, another model or other settings: remove it, or change --output")
    return [line for line in lines if line.endswith(b"\n")]  # the last may have been cut off


def screen(rows, numbers, read, options):
    """Candidates that are to be scored, [(rank, text)], and why each of the others is not: [reason]. Texts that differ
    in white space alone are the same."""
    known = {"".join(content.split()): "known positive" if label >= options.middle else "known irrelevant"
             for content, label in rows}  # fmt: skip
    to_score, reasons = [], []
    for rank, number in enumerate(numbers[options.range_min :], start=options.range_min):
        text = read(number)
        bare = "".join(text.split())
        if bare in known:
            reasons.append(known[bare])
        else:
            known[bare] = "same text as another candidate"
            to_score.append((rank, text))
    return to_score, reasons


def choose(query, scored, positive, options):
    """The negatives of a query, [(rank, text, score)], highest probability first, and the candidates that are none,
    [(rank, text, reason, score)]; `positive` is the probability that the margins start from."""
    fit, out = [], []
    for rank, text, score in sorted(scored, key=lambda each: (-each[2], each[0])):
        if options.max_score is not None and score > options.max_score:
            out.append((rank, text, "max_score", score))
        elif options.absolute_margin is not None and score > positive - options.absolute_margin:
            out.append((rank, text, "absolute_margin", score))
        elif options.relative_margin is not None and score > positive * (1 - options.relative_margin):
            out.append((rank, text, "relative_margin", score))
        else:
            fit.append((rank, text, score))
    count = min(options.num_negatives, len(fit))
    chosen = list(range(count))
    if options.sampling_strategy == "random":  # of each query on its own: other queries change nothing
        chosen = sorted(random.Random(f"{options.seed} {query}").sample(range(len(fit)), count))
    rest = [(rank, text, "not needed", score) for place, (rank, text, score) in enumerate(fit) if place not in chosen]
    return [fit[place] for place in chosen], out + rest


def write(output, options, rows, found, read):
    """Write rows and negatives to `output`, gzip where its name ends so; `found`: {query: (candidates, probabilities of
    its positives, then of the candidates that were scored)}. Returns the report, Markdown."""
    counts, too_few, examples, shown = Counter(), 0, [], set(list(found)[:: math.ceil(len(found) / 5)])
    with whole_file(output) as raw, (gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if output.suffix == ".gz" else
                                     nullcontext(raw)) as file:  # fmt: skip
        for query, known in rows.items():
            lines = [{"query": query, "content": content, "label": label} for content, label in known]
            if query in found:
                to_score, reasons = screen(known, found[query][0], read, options)
                texts = [content for content, label in known if label >= options.middle]
                scores, others = found[query][1][: len(texts)], found[query][1][len(texts) :]
                scored = [(*each, score) for each, score in zip(to_score, others, strict=True)]
                kept, rest = choose(query, scored, float(np.median(scores)), options)
                lines += [{"query": query, "content": text, "label": options.min_label} for _, text, _ in kept]
                counts.update(["negative"] * len(kept) + reasons + [reason for _, _, reason, _ in rest])
                too_few += len(kept) < options.num_negatives
                if query in shown:
                    parts = [("positive", score, text) for score, text in zip(scores, texts, strict=True)][:3]
                    parts += [(f"negative, rank {rank}", score, text) for rank, text, score in kept][:3]
                    parts += [(f"out by {reason}, rank {rank}", score, text) for rank, text, reason, score in rest
                              if reason != "not needed"][:3]  # fmt: skip
                    examples += [f"\n{' '.join(query.split())}\n", *(
                        f"- {score:.3f} {what}: {' '.join(text.split())[:150]}" for what, score, text in parts)]
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    table = [f"| {what} | {count} | {count / counts.total():.1%} |" for what, count in counts.most_common()]
    return "\n".join([f"{len(found)} queries with a positive of {len(rows)}; {too_few} of them have fewer than "
                      f"{options.num_negatives} negatives.\n\n| candidates | count | share |\n| --- | --- | --- |",
                      *table, "\nExamples, with the reranker's probabilities:", *examples])  # fmt: skip


def mine(options):
    """Mine as the command line says; returns the report."""
    output = Path(options.output)
    sidecar, report = (output.with_name(output.name + end) for end in (".unfinished", ".report.md"))
    if output.exists() and not sidecar.exists():
        raise UserError(f"{output} exists already: remove it, or take another --output")
    seed_everything(options.seed)
    model = BertRerankerModel.from_pretrained(options.model_name_or_path).eval()
    if model.new_weights:
        raise UserError(f"{options.model_name_or_path} is no reranker: it lacks {', '.join(model.new_weights)}")
    digest, rows = hashlib.sha256(), {}
    for query, content, label, _ in read_rows(options.rows, options.min_label, options.max_label, digest):
        rows.setdefault(query, []).append((content, label))
    queries = [query for query in rows if any(label >= options.middle for _, label in rows[query])]
    if not queries:
        raise UserError(f"{options.rows}: no row has a label of {options.middle} or more: nothing to mine for")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output.parent) as store:  # of as many bytes as the texts have
        ends = read_corpus(options.corpus, store, digest)
        read, count = partial(read_text, store, ends), len(ends) - 1
        language = options.language
        if language == "auto":
            language = language_of(chain(queries[:500], map(read, range(min(500, count)))))
            if language not in ("zh", "en"):
                raise UserError("the language is neither clearly Chinese nor English: pass --language zh or en")
        say(f"{count} documents, {len(queries)} queries. Words by "
            f"{'jieba (zh).' if language == 'zh' else 'the English stemmer of PyStemmer (en).'}")
        settings = [language, options.embedding_model, options.range_min, options.range_max, options.middle]
        for part in (model.plain_tokenizer.to_str(), model.model.config.to_json_string(), repr(settings)):
            digest.update(part.encode())
        for weight in model.state_dict().values():
            digest.update(weight.numpy())
        key = digest.hexdigest().encode()
        lines = earlier_lines(sidecar, key)
        if not lines:
            found = bm25_candidates(map(read, range(count)), queries, tokenizer_of(language), options.range_max)
            if options.embedding_model:
                nearest = embedding_candidates(map(read, range(count)), queries, options.embedding_model,
                                               options.range_max)  # fmt: skip
                found = [fuse(both)[: options.range_max] for both in zip(found, nearest, strict=True)]
            lines = [json.dumps(found).encode() + b"\n"]
        with whole_file(sidecar) as file:
            file.writelines([key + b"\n", *lines])
        numbers, *scores = map(json.loads, lines)
        model.to(DEVICE)
        with open(sidecar, "ab") as file:
            bar = tqdm(zip(queries, numbers, strict=True), "Scoring", len(queries))
            for place, (query, own) in enumerate(bar):
                if place >= len(scores):  # else an earlier call did it
                    texts = [content for content, label in rows[query] if label >= options.middle]
                    texts += [text for _, text in screen(rows[query], own, read, options)[0]]
                    scores.append(model.predict([(query, text) for text in texts], show_progress_bar=False).tolist())
                    file.write(json.dumps(scores[-1]).encode() + b"\n")
                    file.flush()
        found = dict(zip(queries, zip(numbers, scores, strict=True), strict=True))
        text = write(output, options, rows, found, read)
    with whole_file(report) as file:
        file.write(text.encode())
    sidecar.unlink()
    return text


def number_or_none(text):
    """The number in `text`; None for "None"."""
    return None if text == "None" else float(text)


def main():
    """Parse the command line, mine, print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("rows", metavar="ROWS", help="JSONL rows with queries and their positives, plain or gzip")
    add("--corpus", required=True, help="documents to mine from")
    add("--output", required=True, help="JSONL to write; gzip where it ends in .gz")
    add("--model_name_or_path", default="BAAI/bge-reranker-large",
        help="the reranker that scores candidates: your best one (default BAAI/bge-reranker-large)")  # fmt: skip
    add("--embedding_model", help="of sentence-transformers: its candidates join those of BM25")
    add("--language", choices=("auto", "zh", "en"), default="auto", help="how BM25 finds words (default auto)")
    add("--num_negatives", type=int, default=4, help="of each query (default 4)")
    add("--range_min", type=int, default=0, help="the retriever's rank of the first candidate, from 0 (default 0)")
    add("--range_max", type=int, default=50, help="rank before which candidates end (default 50)")
    add("--sampling_strategy", choices=("top", "random"), default="top", help="top (default): highest probabilities")
    add("--max_score", type=number_or_none, help="no negatives of a probability above this")
    add("--absolute_margin", type=number_or_none, help="nor above the positive's less this")
    add("--relative_margin", type=number_or_none, default=0.05, help="nor above the positive's times 1 - this "
        "(default 0.05; None: no such limit)")  # fmt: skip
    add("--min_label", type=float, default=0.0, help="of irrelevant rows, and of those mined (default 0)")
    add("--max_label", type=float, default=1.0, help="of fully relevant rows (default 1)")
    add("--seed", type=int, default=42, help="of random sampling (default 42)")
    options = parser.parse_args()
    options.middle = (options.min_label + options.max_label) / 2
    options.min_label = int(options.min_label) if options.min_label.is_integer() else options.min_label
    try:
        if options.min_label >= options.max_label:
            raise UserError(f"min_label {options.min_label} is not below max_label {options.max_label}")
        if options.range_min < 0 or not 1 <= options.num_negatives <= options.range_max - options.range_min:
            raise UserError(f"{options.num_negatives} negatives of ranks {options.range_min} to {options.range_max}: "
                            "range_min counts from 0, and range_max is to leave room for num_negatives")  # fmt: skip
        say("\n" + mine(options))
    except ModuleNotFoundError as error:
        sys.exit(f"Error: {error}: pip install bm25s PyStemmer jieba sentence-transformers")
    except (UserError, OSError) as error:
        sys.exit(f"Error: {printable(error)}")
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on from where it was.")


if __name__ == "__main__":
    main()
