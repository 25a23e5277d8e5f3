"""What a million rows cost before the first step, in time and memory, here and elsewhere; and what planning costs.

    pip install sentence-transformers FlagEmbedding datasets
    python benchmarks/large_data.py make --output rows.jsonl [--rows 1000000] [--seed 0]
    python benchmarks/large_data.py load --rows-file rows.jsonl [--rows 100000] [--max_len 512] [--model FOLDER]
    python benchmarks/large_data.py plan [--pairs_per_second 100]

`make` writes 20 rows a query, five of them relevant, Chinese and English by turns; documents are log-normal in length
(median 200 characters, 150 words), characters and words Zipf-like in frequency. 1 GB for a million rows.

`load` measures each method in a process of its own, twice: the second run finds what the first left in its cache.
"Before training" starts when packages and model are loaded and ends where the first batch could be asked for; "epoch"
is every epoch's tokenising and padding, one pass in shuffled batches of 16 rows. Memory is the peak over both above
what is resident at the start: anonymous (RssAnon), and all (VmRSS), which counts mapped files as far as the system
keeps them in memory. Some of it does not grow with the rows, so bytes a row take many rows to mean anything. Tokenizers
use all cores for texts that they get as a list; RAYON_NUM_THREADS=1 keeps them to one.
- ours: train() itself, ended where it would score the first rows: it has read, checked and tokenised them all. Its
  epochs tokenise nothing; padding, a part of training, is not measured.
- sentence-transformers: load_dataset, or Dataset.from_list of the rows in a list; CrossEncoderTrainer's own batches,
  each tokenised by the model's preprocess, as its loss does.
- FlagEmbedding: its dataset class and collator, on a file in its format (one relevant and three irrelevant rows a
  line, so that an epoch takes every row once), written beforehand.
Only the first --rows rows are given to the other two; ours gets them all.

`plan` times what deals an epoch's rows out to optimizer steps, processes and micro-batches: lengths log-normal (median
250 tokens, at most 512), batch_size 8, gradient_accumulation_steps 8. Every process plans for all of them.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BATCH = 16  # rows of a batch of the other two
PER_QUERY, RELEVANT = 20, 5


# ---- make ------------------------------------------------------------------------------------------------------------
def zipf_table(items, draw):
    """65,536 places in which the items of a list stand as often as their rank under Zipf's law says."""
    weights = 1 / (np.arange(len(items)) + 2.7)
    return np.array(items)[draw.choice(len(items), 2**16, p=weights / weights.sum())]


def make_texts(table, separator, lengths, draw):
    """A text for each length: that many entries of the table, joined."""
    entries = table[draw.integers(0, 2**16, lengths.sum(), dtype=np.uint16)]
    ends = np.cumsum(lengths)
    return [separator.join(entries[start:end].tolist()) for start, end in zip(ends - lengths, ends, strict=True)]


def make(options):
    """Write the rows, 25 queries of a language at a time."""
    draw = np.random.default_rng(options.seed)
    codes = bytes(byte for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF) for byte in (high, low))
    characters = draw.permutation(list(codes.decode("gb2312", "ignore")))  # the 3,755 common ones
    letters = np.array(list("eeeeetttaaaooiiinnnsssrrrhhlldducmfpgwybvkxjqz"))
    words = ["".join(draw.choice(letters, size)) for size in draw.poisson(3, 20_000) + 2]
    languages = ((zipf_table(["，", "的", "。", *characters], draw), "", 200),
                 (zipf_table(["the", "of", "and", *words], draw), " ", 150))  # fmt: skip
    written = 0
    with open(options.output, "w", encoding="utf-8") as file:
        for language in itertools.cycle(languages):
            if written >= options.rows:
                break
            table, separator, median = language
            queries = make_texts(table, separator, draw.integers(5, 21, 25), draw)
            lengths = np.clip(median * np.exp(draw.normal(0, 0.6, 25 * PER_QUERY)), 5, 20 * median).astype(int)
            documents = make_texts(table, separator, lengths, draw)
            labels = draw.permuted(np.tile(np.arange(PER_QUERY) < RELEVANT, (25, 1)), axis=1).ravel().astype(int)
            rows = zip(np.repeat(queries, PER_QUERY).tolist(), documents, labels.tolist(), strict=True)
            for row in itertools.islice(rows, options.rows - written):
                row = dict(zip(("query", "content", "label"), row, strict=True))
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
    print(f"{options.rows} rows, {Path(options.output).stat().st_size / 1e6:.0f} MB")


# ---- load ------------------------------------------------------------------------------------------------------------
class Prepared(Exception):
    """Raised where train() has prepared its data and would go on to training."""


def ours(options):
    """train() up to its first use of the data."""
    import train_bert_rerank as script

    def stop(*_, **__):
        raise Prepared

    model = script.BertRerankerModel.from_pretrained(options.model)
    script.BertRerankerModel.from_pretrained = lambda *_, **__: model
    script.fit_bias = script.fine_tune = stop
    yield
    try:
        script.train({"model_name_or_path": options.model, "train_dataset": options.rows_file, "eval_dataset": None,
                      "output_dir": f"{options.folder}/out", "max_len": options.max_len, "mixed_precision": "no",
                      "log_with": None})  # fmt: skip
    except Prepared:
        yield


def sentence_transformers(options, from_list=False):
    """CrossEncoderTrainer over a dataset of rows, and the batches of an epoch."""
    from datasets import Dataset, load_dataset
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    model = CrossEncoder(options.model, max_length=options.max_len, device="cpu")
    settings = CrossEncoderTrainingArguments(f"{options.folder}/out", per_device_train_batch_size=BATCH, use_cpu=True,
                                             report_to="none")
    yield
    if from_list:
        with open(options.rows_file, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        dataset = Dataset.from_list(rows)
    else:
        dataset = load_dataset("json", data_files=options.rows_file, split="train", cache_dir=options.folder)
    trainer = CrossEncoderTrainer(model, settings, train_dataset=dataset, loss=BinaryCrossEntropyLoss(model))
    batches = trainer.get_train_dataloader()
    yield
    for batch in batches:
        texts, _ = trainer.collect_features(batch)
        model.preprocess(list(zip(*texts, strict=True)))
    yield


def flag_embedding(options):
    """FlagEmbedding's dataset of one relevant and three irrelevant rows an item, and the batches of an epoch."""
    from FlagEmbedding.abc.finetune.reranker import (
        AbsRerankerCollator,
        AbsRerankerDataArguments,
        AbsRerankerTrainDataset,
    )
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    lengths = {"query_max_len": options.max_len // 4, "passage_max_len": options.max_len - options.max_len // 4}
    yield
    settings = AbsRerankerDataArguments([options.rows_file], options.folder, train_group_size=4, **lengths)
    dataset = AbsRerankerTrainDataset(settings, tokenizer)
    collate = AbsRerankerCollator(tokenizer, **lengths)
    yield
    for _ in DataLoader(dataset, batch_size=BATCH // 4, shuffle=True, collate_fn=collate):
        pass
    yield


METHODS = {"ours": ours, "sentence-transformers, load_dataset": sentence_transformers,
           "sentence-transformers, list": lambda options: sentence_transformers(options, from_list=True),
           "FlagEmbedding": flag_embedding}  # fmt: skip


def resident():
    """Anonymous and all resident memory of this process in bytes."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return np.array([int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS")])


@contextmanager
def peak_memory():
    """Yield an array that a thread raises to the highest resident() above that of the start, 50 times a second."""
    start, peak, done = resident(), np.zeros(2, dtype=np.int64), threading.Event()

    def watch():
        while not done.wait(0.02):
            np.maximum(peak, resident() - start, out=peak)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def measure(options):
    """Take one method through its stages; writes {"seconds": of each stage, "bytes": anonymous and all}."""
    stages = METHODS[options.method](options)
    next(stages)
    clock = [time.perf_counter()]
    with peak_memory() as peak:
        for _ in stages:
            clock.append(time.perf_counter())
    found = {"seconds": np.diff(clock).tolist(), "bytes": peak.tolist()}
    Path(options.folder, "found.json").write_text(json.dumps(found), encoding="utf-8")


def as_groups(lines):
    """JSONL rows as FlagEmbedding's lines, one relevant and three irrelevant rows of a query each."""
    for query, rows in itertools.groupby(map(json.loads, lines), key=lambda row: row["query"]):
        sides = [], []
        for row in rows:
            sides[row["label"] > 0].append(row["content"])
        for number, relevant in enumerate(sides[1]):
            others = sides[0][3 * number : 3 * number + 3]
            if len(others) == 3:
                yield json.dumps({"query": query, "pos": [relevant], "neg": others}, ensure_ascii=False) + "\n"


def load(options):
    """Measure each method twice and print a table."""
    print("| | rows | before training, s | µs a row | epoch, s | µs a row | anonymous, MB | bytes a row | all, MB | "
          "bytes a row |\n" + "| --- " * 10 + "|", flush=True)
    for method in options.methods or METHODS:
        with tempfile.TemporaryDirectory() as folder, open(options.rows_file, encoding="utf-8") as file:
            lines = itertools.islice(file, None if method == "ours" else options.rows)
            is_grouped, rows_file, count = method == "FlagEmbedding", options.rows_file, 0
            if is_grouped or method != "ours" and options.rows:
                rows_file = f"{folder}/rows.jsonl"
                with open(rows_file, "w", encoding="utf-8") as part:
                    for line in as_groups(lines) if is_grouped else lines:
                        part.write(line)
                        count += 4 if is_grouped else 1
            else:
                count = sum(1 for _ in lines)
            for again in ("", ", again"):
                command = [sys.executable, __file__, "measure", method, "--rows-file", rows_file, "--folder", folder,
                           "--max_len", str(options.max_len), "--model", options.model]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True)
                cells = [done.stderr.strip().rpartition("\n")[2]]  # what it died of
                if not done.returncode:
                    found = json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))
                    cells = [f"{each:.1f} | {each / count * 1e6:.1f}" for each in found["seconds"]]
                    cells += ["– | –"] * (2 - len(cells))
                    cells += [f"{each / 1e6:.0f} | {each / count:.0f}" for each in found["bytes"]]
                print(f"| {method}{again} | {count} | {' | '.join(cells)} |", flush=True)


# ---- plan ------------------------------------------------------------------------------------------------------------
# What one more micro-batch is taken to cost, in padded tokens, as in the published table: a CPU's is 16, a large GPU's
# thousands. Where processes share a window, a quarter as many cuts are tried with 16, and as many with thousands.
BATCH_COST = 256


def plan_epoch(lengths, samples_per_step, max_tokens, processes):
    """Plan an epoch as train() does; returns the number of micro-batches."""
    import torch

    from train_bert_rerank import epoch_windows, plan_window
    plans = (plan_window(lengths[window], max_tokens, BATCH_COST, processes)
             for window in epoch_windows(len(lengths), samples_per_step, torch.Generator().manual_seed(0)))
    return sum(len(micro_batches) for plan in plans for micro_batches in plan)


def plan(options):
    """Time plan_epoch for three sizes and two numbers of processes and print a table."""
    rate = options.pairs_per_second
    print(f"| rows | processes | micro-batches | s | µs a row | share of training at {rate:g} pairs/s a process |\n"
          "| --- | --- | --- | --- | --- | --- |")
    plan_epoch(np.full(64, 512), 64, 8 * 512, 1)  # imports
    for rows, processes in itertools.product((10**4, 10**5, 10**6), (1, 4)):
        lengths = np.random.default_rng(0).lognormal(np.log(250), 0.6, rows).clip(8, 512).astype(np.int64)
        started = time.perf_counter()
        micro_batches = plan_epoch(lengths, 8 * 8 * processes, 8 * 512, processes)
        seconds = time.perf_counter() - started
        print(f"| {rows} | {processes} | {micro_batches} | {seconds:.1f} | {seconds / rows * 1e6:.1f} | "
              f"{seconds * rate * processes / rows:.2%} |", flush=True)


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="make | load | plan")
    command = commands.add_parser("make")
    command.add_argument("--output", required=True)
    command.add_argument("--rows", type=int, default=10**6)
    command.add_argument("--seed", type=int, default=0)
    for name in ("load", "measure"):
        command = commands.add_parser(name)
        command.add_argument("--rows-file", required=True)
        command.add_argument("--max_len", type=int, default=512)
        command.add_argument("--model", default=str(ROOT / "tiny_reranker"))
        if name == "load":
            command.add_argument("--rows", type=int, help="how many rows the others get; all unless given")
            command.add_argument("--methods", nargs="+", choices=METHODS)
        else:  # what load runs in a process of its own
            command.add_argument("method")
            command.add_argument("--folder")
    commands.add_parser("plan").add_argument("--pairs_per_second", type=float, default=100)
    options = parser.parse_args()
    {"make": make, "load": load, "measure": measure, "plan": plan}[options.command](options)


if __name__ == "__main__":
    main()
