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

TRAIN, EVAL = "default_train_data.jsonl", "default_eval_data.jsonl"


def characters(text):
    """The letters, digits and Chinese characters of a text, as a list."""
    return [character for character in text.lower() if character.isalnum()]


def bm25_scores(rows):
    """BM25 of each row, with single characters as terms, over the passages of the file."""
    passages = list(dict.fromkeys(row["content"] for row in rows))
    place = {passage: index for index, passage in enumerate(passages)}
    index = bm25s.BM25()
    index.index([characters(passage) for passage in passages], show_progress=False)
    scores = {row["query"]: index.get_scores(characters(row["query"])) for row in rows}
    return [scores[row["query"]][place[row["content"]]] for row in rows]


def scores_of(name, rows, train_rows):
    """{what is scored: (scores of the rows, whether it may beat chance)}."""
    relevant = Counter(row["content"] for row in train_rows if row["label"] == 1)
    own = [row["label"] if name == TRAIN else 0 for row in rows]
    return {
        "chance": (np.zeros(len(rows)), True),
        "character overlap": ([len(set(characters(row["query"])) & set(characters(row["content"])))
                               / len(set(characters(row["query"]))) for row in rows], True),
        "BM25 on characters": (bm25_scores(rows), True),
        "long passages first": ([len(row["content"]) for row in rows], False),
        "short passages first": ([-len(row["content"]) for row in rows], False),
        "often relevant in training": ([relevant[row["content"]] - mine
                                        for row, mine in zip(rows, own, strict=True)], False),
    }  # fmt: skip


def main():
    """Print the table; exit with 1 where something beats chance that should not."""
    files = {name: [json.loads(line) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
             for name in (TRAIN, EVAL)}
    leaks = 0
    for name, rows in files.items():
        queries, labels = [row["query"] for row in rows], np.array([row["label"] for row in rows], dtype=float)
        print(f"{name}: {len(rows)} rows, {int(labels.sum())} relevant, {len(set(queries))} queries, "
              f"{len({row['content'] for row in rows})} passages")
        lists = candidate_lists(queries, labels)
        chance = 0.0
        for what, (scores, may_help) in scores_of(name, rows, files[TRAIN]).items():
            ndcg = measure(lists, labels, np.array(scores, dtype=float))[0]["ndcg@10"]
            chance = ndcg if what == "chance" else chance  # the first of them
            leak = not may_help and ndcg > chance + 0.04
            leaks += leak
            print(f"  {what:28} NDCG@10 {ndcg:.3f}{'   LEAK' if leak else ''}")
    shared = {row["query"] for row in files[TRAIN]} & {row["query"] for row in files[EVAL]}
    print(f"Queries in both files: {len(shared)}")
    sys.exit(1 if leaks or shared else 0)


if __name__ == "__main__":
    main()
