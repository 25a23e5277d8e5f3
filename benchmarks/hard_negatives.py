"""Does a reranker learn more from mined negatives than from random ones? And what mining takes for a million documents.

    pip install bm25s PyStemmer rank_bm25
    python benchmarks/hard_negatives.py mine --data CRANFIELD --base cranfield_base --folder mined
    python benchmarks/hard_negatives.py train --base cranfield_base --folder mined
    python benchmarks/hard_negatives.py mine --data default --base tiny_reranker --folder md --num_negatives 4
    python benchmarks/hard_negatives.py train --base tiny_reranker --folder md --lr 3e-4 --epochs 10
    python benchmarks/hard_negatives.py recall --data CRANFIELD    # tools/mine_hard_negatives.py's BM25 and rank_bm25's
    python benchmarks/hard_negatives.py memory                     # a million documents

The corpus is all 1,337 abstracts of the two Cranfield files, the positives are those of the 75 training queries that
the Cranfield base (cranfield_base.py) has not seen; or the default data's texts and questions. Rows known to be
irrelevant are not used. `mine` writes a training file for each arm: negatives drawn at random among all but the query's
positives, the hardest by the base's own probability with `--relative_margin 0.05`, the hardest with no filter, and half
of each of the first two; each arm has as many negatives of a query as the filter left. It also writes BM25's first 50
abstracts of each evaluation query. `train` needs none of the packages above: it fine-tunes the base on each file at
max_len 128 and keeps the last weights, so that nothing is chosen on the evaluation queries. NDCG@10 is that of the
evaluation file's candidate lists, and of BM25's 50 reranked (relevant abstracts that BM25 did not find count in the
ideal ranking). Differences are paired by query, averaged over the seeds; the interval is the product's, over queries.
Runs are kept in the folder.
"""

import argparse
import contextlib
import gzip
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from cranfield_base import SETTINGS, halves
from default_run import ROOT, read, write_rows

sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import mine_hard_negatives as miner  # noqa: E402
import retrieval  # noqa: E402

import train_bert_rerank as product  # noqa: E402

ARMS = ("random", "mined_filtered", "mined_unfiltered", "half_mined_half_random")
LISTS = {"evaluation file": "eval.jsonl.gz", "BM25 top 50": "bm25.jsonl.gz"}
TOOL = str(ROOT / "tools" / "mine_hard_negatives.py")


def collection(data):
    """Rows to train on, rows of the evaluation file, all distinct texts of both files, and the texts' language."""
    is_default = data == "default"
    name = "default_{}_data.jsonl" if is_default else str(Path(data, "cranfield_{}.jsonl").resolve())
    train_rows, eval_rows = (read(name.format(part)) for part in ("train", "eval"))
    documents = list(dict.fromkeys(row["content"] for row in train_rows + eval_rows))
    return train_rows if is_default else halves(data)[1], eval_rows, documents, "zh" if is_default else "en"


def write_gzip(path, rows):
    """Write rows as gzipped JSONL."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_gzip(path):
    """The rows of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(map(json.loads, file))


def mine(options):
    """Write the arms' training files and the candidate lists into a folder; print the tool's report of both arms."""
    train_rows, eval_rows, documents, language = collection(options.data)
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    positives = [row for row in train_rows if row["label"] == 1]
    found, scores, predict = {}, {}, product.BertRerankerModel.predict

    def predict_once(self, pairs, **settings):
        """The same pairs are scored in both arms: the second time from memory."""
        key = tuple(pairs)
        if key not in scores:
            scores[key] = predict(self, pairs, **settings)
        return scores[key]

    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(
            product.BertRerankerModel, "predict", predict_once):  # fmt: skip
        command = ["tool", write_rows(f"{scratch}/positives.jsonl", positives), "--corpus",
                   write_rows(f"{scratch}/corpus.jsonl", [{"text": text} for text in documents]),
                   "--model_name_or_path", options.base, "--num_negatives", str(options.num_negatives)]  # fmt: skip
        for arm, margin in zip(ARMS[1:3], ("0.05", "None"), strict=True):
            print(f"\n{arm}:", flush=True)
            output = f"{scratch}/{margin}.jsonl"
            with mock.patch.object(sys, "argv", [*command, "--output", output, "--relative_margin", margin]):
                miner.main()
            found[arm] = {}
            for row in read(output):
                if row["label"] == 0:
                    found[arm].setdefault(row["query"], []).append(row["content"])
    of_query = {}
    for row in positives:
        of_query.setdefault(row["query"], set()).add(row["content"])
    counts = {query: len(found[ARMS[1]].get(query, [])) for query in of_query}
    draw = random.Random(0)
    found["random"] = {query: draw.sample([text for text in documents if text not in of_query[query]], count)
                       for query, count in counts.items()}  # fmt: skip
    found[ARMS[3]] = {query: found[ARMS[1]].get(query, [])[: (count + 1) // 2] + found["random"][query][: count // 2]
                      for query, count in counts.items()}  # fmt: skip
    for arm in ARMS:
        negatives = [{"query": query, "content": text, "label": 0} for query, count in counts.items()
                     for text in found[arm].get(query, [])[:count]]  # fmt: skip
        write_gzip(folder / f"{arm}.jsonl.gz", positives + negatives)
        print(f"{arm}: {len(positives)} positives, {len(negatives)} negatives")
    labels = {(row["query"], row["content"]): row["label"] for row in eval_rows}
    queries, rows = list(dict.fromkeys(row["query"] for row in eval_rows)), []
    rankings = retrieval.bm25_candidates(documents, queries, retrieval.tokenizer_of(language), 50)
    for query, ranking in zip(queries, rankings, strict=True):
        texts = {documents[number]: rank for rank, number in enumerate(ranking.numbers)}
        texts |= {text: None for each, text in labels if each == query and labels[each, text] and text not in texts}
        rows += [{"query": query, "content": text, "label": labels.get((query, text), 0), "rank": rank}
                 for text, rank in texts.items()]  # fmt: skip
    write_gzip(folder / LISTS["BM25 top 50"], rows)
    write_gzip(folder / LISTS["evaluation file"], eval_rows)


def ndcg(rows, scores):
    """NDCG@10 of each query [Q]; rows that BM25 did not find stand last."""
    labels = np.array([row["label"] for row in rows], dtype=float)
    is_found = np.array([row.get("rank", 0) is not None for row in rows])
    scores = np.where(is_found, scores, scores[is_found].min() - 1)
    lists = product.candidate_lists([row["query"] for row in rows], labels)["ndcg@10"]
    return product.metric_values("ndcg@10", lists, labels, scores)


def measure(name, lists):
    """NDCG@10 of each query of each of the lists by the model `name`: {title: [Q]}."""
    model = product.BertRerankerModel.from_pretrained(name).eval().to(miner.DEVICE)
    model.tokenizer.model_max_length = SETTINGS["max_len"]
    pairs = {title: [(row["query"], row["content"]) for row in rows] for title, rows in lists.items()}
    return {title: ndcg(lists[title], model.predict(pairs[title], show_progress_bar=False,
                                                    activation_fn=torch.nn.Identity()).astype(float))
            for title in lists}  # fmt: skip


def change(differences):
    """Mean and interval of differences [Q] as text."""
    interval = product.confidence_interval(differences, 0)
    interval = "fewer than six queries differ" if interval is None else "[{:+.4f}, {:+.4f}]".format(*interval)
    return f"{differences.mean():+.4f} {interval}"


def fine_tuned(options, arm, seed, lists):
    """NDCG@10 of each query, {title: [Q]}, after fine-tuning the base on an arm's file; from the folder, if there."""
    folder = Path(options.folder)
    kept = folder / f"{arm}, lr {options.lr}, {options.epochs} epochs, seed {seed}.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as scratch:
            silence = io.StringIO()
            with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
                product.train({**SETTINGS, "model_name_or_path": options.base, "lr": options.lr, "seed": seed,
                               "train_dataset": str(folder / f"{arm}.jsonl.gz"), "eval_dataset": None,
                               "epochs": options.epochs, "output_dir": f"{scratch}/run"})  # fmt: skip
            found = measure(f"{scratch}/run/final_model", lists)
        kept.write_text(json.dumps({title: each.tolist() for title, each in found.items()}))
    return {title: np.array(each) for title, each in json.loads(kept.read_text()).items()}


def train(options):
    """Fine-tune the base on each arm's file with each seed; print a Markdown table."""
    lists = {title: read_gzip(Path(options.folder, name)) for title, name in LISTS.items()}
    base = measure(options.base, lists)
    bm25 = np.array([-1.0 * (row["rank"] or 0) for row in lists["BM25 top 50"]])
    arms = {}
    for arm in ARMS:
        values = [fine_tuned(options, arm, seed, lists) for seed in options.seeds]
        arms[arm] = {title: np.mean([each[title] for each in values], axis=0) for title in LISTS}
        print(arm, *(f"{title} {' '.join(f'{each[title].mean():.4f}' for each in values)}" for title in LISTS),
              sep=", ", flush=True)  # fmt: skip
    print(f"\n{len(options.seeds)} seeds, {options.epochs} epochs, lr {options.lr}, {miner.DEVICE.type}. NDCG@10 of "
          f"BM25's own order: {ndcg(lists['BM25 top 50'], bm25).mean():.4f}.\n")  # fmt: skip
    print(f"| | {' | '.join(LISTS)} |\n| --- | --- | --- |")
    print(f"| base, NDCG@10 | {' | '.join(f'{base[title].mean():.4f}' for title in LISTS)} |")
    for arm in ARMS:
        after = (f"{arms[arm][title].mean():.4f}, {change(arms[arm][title] - base[title])}" for title in LISTS)
        print(f"| {arm}: NDCG@10, change from the base, 95 % interval | {' | '.join(after)} |")
    for arm in ARMS[1:]:
        print(f"| {arm} less random | "
              + " | ".join(change(arms[arm][title] - arms["random"][title]) for title in LISTS) + " |")  # fmt: skip


def recall(options):
    """Share of the relevant abstracts among the first 10, 50 and 100 of bm25s and of rank_bm25 on the same terms."""
    from rank_bm25 import BM25Okapi

    _, eval_rows, documents, language = collection(options.data)
    relevant = {}
    for row in eval_rows:
        if row["label"] > 0:
            relevant.setdefault(row["query"], set()).add(row["content"])
    tokenize = retrieval.tokenizer_of(language)
    other = BM25Okapi(list(map(tokenize, documents)), k1=1.5, b=0.75)
    ours = retrieval.bm25_candidates(documents, list(relevant), tokenize, 100)
    rankings = {"bm25s, Lucene's variant": [ranking.numbers for ranking in ours],
                "rank_bm25, BM25Okapi": [np.argsort(-other.get_scores(tokenize(query)), kind="stable")[:100].tolist()
                                         for query in relevant]}  # fmt: skip
    print(f"| mean over {len(relevant)} queries | recall@10 | recall@50 | recall@100 |\n{'| --- ' * 4}|")
    for name, found in rankings.items():
        shares = [np.mean([len(texts & {documents[number] for number in numbers[:k]}) / len(texts)
                           for texts, numbers in zip(relevant.values(), found, strict=True)])
                  for k in (10, 50, 100)]  # fmt: skip
        print(f"| {name} | " + " | ".join(f"{share:.4f}" for share in shares) + " |")
    same = [np.mean([len({*one[:k]} & {*two[:k]}) / k for one, two in zip(*rankings.values(), strict=True)])
            for k in (10, 50, 100)]  # fmt: skip
    print("| documents that both have | " + " | ".join(f"{share:.1%}" for share in same) + " |")


def memory(options):
    """Peak memory and time of the tool for made-up documents of 60 words, Zipf's law over 50,000; 100 queries of 500
    words have them all between them, so that the index leaves none out."""
    generator, vocabulary = np.random.default_rng(0), 50_000
    words = np.array(["".join(chr(97 + number // 26**place % 26) for place in range(4))
                      for number in range(vocabulary)])  # fmt: skip
    shares = np.cumsum(1 / np.arange(1, vocabulary + 1))
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/corpus.tsv", "w", encoding="utf-8") as file:
            for start in range(0, options.documents, 10_000):
                chosen = np.searchsorted(shares, generator.random((10_000, 60)) * shares[-1])
                file.writelines(f"{start + place}\t{' '.join(text)}\n" for place, text in enumerate(words[chosen]))
        queries = generator.permutation(words).reshape(100, -1)
        rows = [{"query": " ".join(query), "content": " ".join(query[:60]), "label": 1} for query in queries]
        started = time.perf_counter()
        subprocess.run([sys.executable, TOOL, write_rows(f"{folder}/rows.jsonl", rows), "--corpus",
                        f"{folder}/corpus.tsv", "--output", f"{folder}/mined.jsonl", "--model_name_or_path",
                        str(ROOT / "tiny_reranker"), "--language", "en", "--range_max", "10", "--relative_margin",
                        "None"], check=True)  # fmt: skip
        seconds, size = time.perf_counter() - started, Path(folder, "corpus.tsv").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"{options.documents:,} documents, {size / 1e6:.0f} MB: peak {peak / 2**20:.1f} GiB, {seconds:.0f} s")


def main():
    """Run the part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("mine", "train", "recall", "memory"))
    parser.add_argument("--data", help="folder of cranfield_train.jsonl and cranfield_eval.jsonl, or default")
    parser.add_argument("--base", help="folder of the model that cranfield_base.py makes")
    parser.add_argument("--folder", help="what mine writes and train reads")
    parser.add_argument("--num_negatives", type=int, default=8, help="of a query, at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--documents", type=int, default=1_000_000, help="of memory")
    options = parser.parse_args()
    {"mine": mine, "train": train, "recall": recall, "memory": memory}[options.part](options)


if __name__ == "__main__":
    main()
