"""What can be guessed about the default data without understanding it.

    python tools/check_default_data.py

Prints, for both files, the mean NDCG@10 of simple scores. Overlap with the query may help; the length of a passage, or
how often it was relevant in the training file, may not: beyond chance by 0.04 either would be a leak, and the tool
exits with status 1. In the training file a row's own label does not count towards the frequency of its passage.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from train_bert_rerank import candidate_lists, measure  # noqa: E402

TRAIN = "default_train_data.jsonl"
EVAL = "default_eval_data.jsonl"


# ---- Simple scores, each [N] of N rows -------------------------------------------------------
def characters(text):
    """The letters, digits and Chinese characters of a text, as a list."""
    return [character for character in text.lower() if character.isalnum()]


def overlap(row):
    """The share of the query's different characters that the passage has."""
    query = set(characters(row["query"]))
    return len(query & set(characters(row["content"]))) / len(query)


def bm25_scores(rows):
    """BM25 of each row, with single characters as terms, over the passages of the file."""
    passages = list(dict.fromkeys(row["content"] for row in rows))
    place_of = {passage: place for place, passage in enumerate(passages)}
    index = bm25s.BM25()
    index.index([characters(passage) for passage in passages], show_progress=False)

    scores = []
    for row in rows:
        scores_of_query = index.get_scores(characters(row["query"]))  # of all passages
        scores.append(scores_of_query[place_of[row["content"]]])
    return scores


def frequencies(rows, train_rows):
    """How often the passage of each row is relevant in training, the row's own label left out."""
    relevant = Counter(row["content"] for row in train_rows if row["label"] == 1)
    counts = []
    for row in rows:
        count = relevant[row["content"]]
        if rows is train_rows:
            count -= row["label"]
        counts.append(count)
    return counts


# ---- The table -------------------------------------------------------------------------------
MARGIN = 0.04  # NDCG@10 above chance that is no accident


def read_rows(name):
    """The rows of a file of the repository."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def count_leaks(rows, train_rows):
    """Print the mean NDCG@10 of simple scores; how many beat chance that may not."""
    queries = [row["query"] for row in rows]
    labels = np.array([row["label"] for row in rows], dtype=float)
    lists = candidate_lists(queries, labels)

    def ndcg(scores):
        metrics, _ = measure(lists, labels, np.array(scores, dtype=float))
        return metrics["ndcg@10"]

    lengths = np.array([len(row["content"]) for row in rows])
    chance = ndcg(np.zeros(len(rows)))
    helpful = {  # scores that may beat chance
        "chance": chance,
        "character overlap": ndcg([overlap(row) for row in rows]),
        "BM25 on characters": ndcg(bm25_scores(rows)),
    }
    harmful = {  # scores that may not
        "long passages first": ndcg(lengths),
        "short passages first": ndcg(-lengths),
        "often relevant in training": ndcg(frequencies(rows, train_rows)),
    }

    leaks = 0
    for name, value in helpful.items():
        print(f"  {name:28} NDCG@10 {value:.3f}")
    for name, value in harmful.items():
        remark = ""
        if value > chance + MARGIN:
            leaks += 1
            remark = "   LEAK"
        print(f"  {name:28} NDCG@10 {value:.3f}{remark}")
    return leaks


def main():
    """Print the table; exit with 1 where something beats chance that should not."""
    files = {TRAIN: read_rows(TRAIN), EVAL: read_rows(EVAL)}
    queries_of = {}
    leaks = 0
    for name, rows in files.items():
        queries_of[name] = {row["query"] for row in rows}
        passages = {row["content"] for row in rows}
        relevant = int(sum(row["label"] for row in rows))
        print(f"{name}: {len(rows)} rows, {relevant} relevant, {len(queries_of[name])} queries, "
              f"{len(passages)} passages")
        leaks += count_leaks(rows, files[TRAIN])

    shared = queries_of[TRAIN] & queries_of[EVAL]
    print(f"Queries in both files: {len(shared)}")
    sys.exit(1 if leaks or shared else 0)


if __name__ == "__main__":
    main()
