"""What the processes of gpu.py do: each imports what its jobs need, waits for a line, does them.

    python benchmarks/gpu_worker.py JOBS.json      # gpu.py calls it so

A job is a dict with "kind", the name of a function in JOBS below. What the function returns, or the
error that ended it, is printed as a line of JSON behind MARK; all else that is printed belongs to
the libraries.
"""

import gc
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from default_run import ROOT, read, write_rows
from gpu import MARK
from predict_throughput import PRECISIONS, time_all, uncut
from step_profile import PREFIX, has_card, read_events, summarize
from train_throughput import (
    CONTENDERS,
    CUDA,
    MAX_LEN,
    Finished,
    Job,
    choose_rows,
    matmul_peak,
    measure,
    rows_taken,
    tokenize,
)
from true_size import shape

sys.path.insert(0, str(ROOT))
import train_bert_rerank as script  # noqa: E402

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "sentence-transformers",
            "FlagEmbedding", "datasets")  # fmt: skip
IMPORTS = {  # by process; without them "prediction" still measures ours, the others nothing
    "sentence-transformers": ["sentence_transformers", "datasets"],
    "FlagEmbedding": ["FlagEmbedding.finetune.reranker.encoder_only.base"],
    "prediction": ["sentence_transformers", "FlagEmbedding"],
}
VOCABULARY = 3500  # gives Cranfield's rows as many tokens as MiniLM's tokenizer does, about 229


# ---- What of our script is reached by name ---------------------------------------------------------
# Besides these, script.train_step in profile(): each is called with whatever the script gives it. Two
# more, which are given the run, in watched_run().
OF_OUR_FORWARD = "batch, tokens to the card, loss"  # what is not transformers' own
SECTIONS_OF_STEP = [  # owner, function, section
    (script, "plan_window", "planning"),
    (script.BertRerankerModel, "collate", OF_OUR_FORWARD),
    (script.BertRerankerModel, "forward", OF_OUR_FORWARD),
    (transformers.XLMRobertaForSequenceClassification, "forward", "forward"),
    (Accelerator, "backward", "backward"),
    (Accelerator, "clip_grad_norm_", "clipping"),
    (AcceleratedOptimizer, "step", "AdamW"),
    (torch.Tensor, "cpu", "reading the loss"),
]
PARTS_OF_RUN = [  # title, owner, function
    ("reading and checking the data", script, "load_data"),
    ("loading the model", script, "load_base"),
    ("checksums of weights and rows", script, "identity_of"),
    ("tokenising", script.RerankDataset, "__init__"),
    ("model to the card, optimizer", Accelerator, "prepare"),
    ('the probe of "auto"', script, "largest_micro_batch"),
    ("evaluations", script, "evaluate"),
    ("shift of the head's bias", script, "fit_bias"),
    ("copies of weights to the host's memory", script, "host_copy"),
    ("training steps", script, "train_step"),
    ("checkpoints", script, "save_checkpoint"),
    ("verdict", script, "judge"),
    ("saving models", script.BertRerankerModel, "save_pretrained"),
    ("report and pictures", script, "write_evaluation"),
    ("picture of the loss", script, "draw_loss_curve"),
    ("model card", script, "write_model_card"),
    ("rows to check", script, "write_rows_to_check"),
    ("verdict and pictures into TensorBoard", script, "log_outcome"),
    ("results to the disk for good", script, "flush_to_disk"),
    ("results into their place", script, "publish"),
]


# ---- What the parts share ------------------------------------------------------------------------
def prepare(job):
    """Make the model, with random weights, and the rows; returns what the report's head tells."""
    if job.device == "cuda" and not CUDA:
        raise RuntimeError("torch finds no card; --device cpu rehearses without one")
    rows = choose_rows(job.data, job.row_count)
    if len(rows) < job.row_count:
        raise ValueError(f"--rows {job.row_count}: there are {len(rows)}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tiny_reranker")
    if job.data:
        tokenizer = english_tokenizer(tokenizer, choose_rows(job.data))
    torch.manual_seed(0)
    config = shape(job.layers, job.width)
    # Wide enough for attention to tell tokens apart: otherwise all pairs score alike.
    config.initializer_range = 1.6 / math.sqrt(job.width)
    with torch.device("cuda" if CUDA else "cpu"):
        model = transformers.XLMRobertaForSequenceClassification(config)
    model.save_pretrained(job.model)
    tokenizer.save_pretrained(job.model)

    write_rows(job.files["all"], rows)
    write_rows(job.files["one step"], rows[:16])
    for samples, steps in job.steps.items():
        write_rows(job.files[samples], rows[: int(samples) * steps])
    write_rows(job.files["long"], lengthened(rows[: 64 * job.steps["64"]], tokenizer))

    lengths = [len(ids) for ids in tokenize(tokenizer, rows)["input_ids"]]
    source = Path(script.__file__).read_bytes()
    return {
        "script": hashlib.sha256(source).hexdigest()[:12],
        "device": card_name() if CUDA else "CPU",
        "processor": f"{os.cpu_count()} cores of {processor_name()}",
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "tokens": float(np.mean(lengths)),
    }


def lengthened(rows, tokenizer):
    """The rows with documents repeated until every pair has MAX_LEN tokens and more."""
    found = []
    for row in rows:
        tokens = len(tokenizer(row["content"], add_special_tokens=False)["input_ids"])
        copies = math.ceil(1.2 * MAX_LEN / tokens)  # more: where copies meet, tokens may merge
        found.append({**row, "content": " ".join([row["content"]] * copies)})
    shortest = min(len(ids) for ids in tokenize(tokenizer, found)["input_ids"])
    if shortest < MAX_LEN:
        raise ValueError(f"a lengthened row has {shortest} tokens")
    return found


def english_tokenizer(tokenizer, rows):
    """One of the same kind with the words of these rows: tiny_reranker's knows single letters."""
    from tokenizers import decoders, pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    texts = sorted({row[key] for row in rows for key in ("query", "content")})
    return tokenizer.train_new_from_iterator(texts, VOCABULARY, show_progress=False)


def card_name():
    """The card, its memory, its compute capability and the CUDA that torch was built with."""
    card = torch.cuda.get_device_properties(0)
    return (
        f"{card.name}, {card.total_memory / 2**30:.0f} GiB, "
        f"compute capability {card.major}.{card.minor}, CUDA {torch.version.cuda}"
    )


def processor_name():
    """What the machine's processor calls itself, where Linux tells."""
    with suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))
        if found:
            return found[1]
    return platform.machine()


def version_of(package):
    """The version of a package; None where it is missing."""
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def wait_for_card():
    """Until the card has done what it was given, so that a clock tells when that was."""
    if CUDA:
        torch.cuda.synchronize()


def settings_of(job):
    """The arguments of a run of ours in this job; the rest is as main() has it."""
    return {
        "model_name_or_path": job.model,
        "train_dataset": job.rows,
        "eval_dataset": None,
        "output_dir": f"{job.folder}/out",
        "batch_size": job.batch_size,
        "gradient_accumulation_steps": job.accumulation,
        "micro_batch_tokens": job.micro_batch_tokens,
        "mixed_precision": "bf16" if job.bf16 else "no",
        "log_with": None,
        "save_total_limit": 1,  # less room is asked for
    }


@contextmanager
def watched_run():
    """Yields a dict that gets, of a run of ours within, what it says of the bound of its
    micro-batches, and after the last step what run.json is to have of their cost and of the
    speed."""
    facts = {}
    choose_bound = script.choose_bound
    save_if_due = script.save_if_due

    def noting_bound(run):
        facts["bound"] = choose_bound(run)
        return facts["bound"]

    def noting_speed(run):
        if run.progress.step == run.total_steps:
            facts["micro_batch_cost"] = run.record["micro_batch_cost"]
            facts.update(script.speed_of(run))
        save_if_due(run)

    with ExitStack() as stack:
        stack.enter_context(patch.object(script, "choose_bound", noting_bound))
        stack.enter_context(patch.object(script, "save_if_due", noting_speed))
        yield facts


# ---- Training ------------------------------------------------------------------------------------
def rate(job):
    """The rate of matrix products in the precision of the run, in operations a second."""
    return {"operations_a_second": matmul_peak(os.cpu_count(), job.bf16)}


def train(job):
    """A contender's run, measured from outside as in train_throughput.py."""
    run = Job(
        contender=job.contender,
        folder=job.folder,
        model=job.model,
        rows=job.rows,
        batch_size=job.batch_size,
        accumulation=job.accumulation,
        steps=job.steps,
        warm_up=job.warm_up,
        threads=os.cpu_count(),
        bf16=job.bf16,
        **CONTENDERS[job.contender].special,
    )
    with watched_run() as facts:
        numbers = measure(run)
    if facts:  # it was ours
        numbers["run"] = facts
    taken = rows_taken(run, numbers)
    numbers["taken"] = f"{numbers['steps']} steps, {job.warm_up} of warm-up; {taken}"
    if not CUDA:
        numbers["memory"] = None  # it would be the highest of all jobs of this process
    return numbers


# ---- Where the time of a step goes ---------------------------------------------------------------
def labelled(function, name):
    """`function` as a section that a profiler sees."""
    @wraps(function)
    def visible(*arguments, **options):
        with torch.profiler.record_function(PREFIX + name):
            return function(*arguments, **options)

    return visible


@contextmanager
def labelled_sections():
    """Within it the parts of train_step() are sections that a profiler sees."""
    with ExitStack() as stack:
        for owner, function, name in SECTIONS_OF_STEP:
            visible = labelled(getattr(owner, function), name)
            stack.enter_context(patch.object(owner, function, visible))
        yield


class WatchedSteps:
    """Takes the place of train_step() in a run: some steps of warm-up, some that are timed as they
    are, one that warms the profiler up, and one whose trace is kept. Then the run is over."""

    WARM_UP, TIMED, PROFILED = 2, 3, 2

    def __init__(self, train_step, trace):
        self.train_step = train_step
        self.trace = trace  # the path of a file to write
        self.seconds = []  # of the steps before the profiler came

    def __call__(self, *arguments, **options):
        """The next step."""
        step = partial(self.train_step, *arguments, **options)
        if len(self.seconds) < self.WARM_UP + self.TIMED:
            return self.timed(step)
        self.profiled(step)
        self.profiled(step).export_chrome_trace(self.trace)
        raise Finished

    def timed(self, step):
        """The step as it is."""
        wait_for_card()
        started = time.perf_counter()
        result = step()
        wait_for_card()
        self.seconds.append(time.perf_counter() - started)
        return result

    def profiled(self, step):
        """The step under the profiler, which is returned."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if CUDA:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            with torch.profiler.record_function(PREFIX + "whole"):
                step()
            wait_for_card()
        return profiler


def profile(job):
    """Seconds of a step, and the StepProfile of one like it: the file holds the rows of one step,
    so that every step has the same."""
    steps = WatchedSteps(script.train_step, job.trace)
    with ExitStack() as stack:
        stack.enter_context(suppress(Finished))
        stack.enter_context(patch.object(script, "train_step", steps))
        stack.enter_context(labelled_sections())  # before accelerate binds the model's forward
        steps_in_all = WatchedSteps.WARM_UP + WatchedSteps.TIMED + WatchedSteps.PROFILED
        script.train({**settings_of(job), "epochs": steps_in_all, "save_steps": 10**6})
    events = read_events(job.trace)
    if CUDA and not has_card(events):
        raise RuntimeError("the profiler saw nothing of the card")
    return {
        "seconds": float(np.median(steps.seconds[WatchedSteps.WARM_UP :])),
        **asdict(summarize(events, job.embeddings)),
    }


# ---- Prediction ----------------------------------------------------------------------------------
def predict(job):
    """Pairs a second of predict() and its peers in a precision, and how far their logits are from
    ours in fp32, in standard deviations of those. The job in fp32 comes first: the others read its
    logits."""
    pairs = [(row["query"], row["content"]) for row in read(job.rows)]
    place = {"device": "cuda" if CUDA else "cpu", "dtype": PRECISIONS[job.precision]}
    found = time_all(job.model, pairs, place, job.rounds)

    if job.precision == "fp32":
        np.save(job.reference, logits_of(found["ours"]["scores"]))
    exact = np.load(job.reference)
    is_compared = uncut(job.model, pairs)

    contenders = {}
    for name, numbers in found.items():
        if "error" in numbers:
            contenders[name] = numbers
            continue
        apart = np.abs(logits_of(numbers["scores"]) - exact)[is_compared]
        contenders[name] = {
            "rate": len(pairs) / float(np.median(numbers["seconds"])),
            "apart": float(apart.max() / exact.std()),
        }
    return {
        "contenders": contenders,
        "pairs": len(pairs),
        "compared": int(is_compared.sum()),
    }


def logits_of(probabilities):
    """The logits behind probabilities, in fp64; half precision rounds some to 0 or 1."""
    probabilities = np.clip(np.asarray(probabilities, dtype=np.float64), 1e-7, 1 - 1e-7)
    return np.log(probabilities / (1 - probabilities))


# ---- The same bits -------------------------------------------------------------------------------
def bits(job):
    """Whether two runs of ten steps on tiny_reranker leave the same bits."""
    from soak_kill import bits as bits_of  # needs tensorboard's reader, and nothing else here does

    rows = write_rows(f"{job.folder}/ten_steps.jsonl", read("default_train_data.jsonl")[:160])
    eval_rows = write_rows(f"{job.folder}/lists.jsonl", read("default_eval_data.jsonl")[:200])
    outcomes = []
    for name in ("first", "second"):
        output_dir = Path(job.folder, name)
        settings = {"model_name_or_path": ROOT / "tiny_reranker", "train_dataset": rows,
                    "eval_dataset": eval_rows, "output_dir": output_dir, "epochs": 1, "lr": 3e-4,
                    "mixed_precision": "bf16"}  # fmt: skip
        command = [sys.executable, str(ROOT / "train_bert_rerank.py")]
        for key, value in settings.items():
            command += [f"--{key}", str(value)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        outcomes.append(bits_of(output_dir))

    run = json.loads((output_dir / "run.json").read_text("utf-8"))
    first, second = outcomes
    return {
        "precision": run["precision"],
        "compared": len(first),
        "differing": sorted(name for name in first if first[name] != second.get(name)),
    }


# ---- What a run spends besides training ----------------------------------------------------------
def overhead(job):
    """{what: [calls, seconds]} of a run of one epoch and otherwise the defaults, but that it keeps
    one checkpoint. The rows of its evaluation are of the training file, its own among them: how
    well it ranks is not the question."""
    spent = {title: [0, 0.0] for title, _, _ in PARTS_OF_RUN}
    running = []  # the part that is timed now: what it calls is a part of it

    def timed(function, title):
        @wraps(function)
        def timing(*arguments, **options):
            if running:
                return function(*arguments, **options)
            running.append(title)
            wait_for_card()
            started = time.perf_counter()
            result = function(*arguments, **options)
            wait_for_card()
            spent[title][0] += 1
            spent[title][1] += time.perf_counter() - started
            running.clear()
            return result

        return timing

    with ExitStack() as stack:
        for title, owner, name in PARTS_OF_RUN:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), title)))
        facts = stack.enter_context(watched_run())
        started = time.perf_counter()
        more = {"eval_dataset": job.eval_rows, "epochs": 1, "log_with": "tensorboard"}
        script.train({**settings_of(job), **more})
        seconds = time.perf_counter() - started
    spent["the rest"] = [1, seconds - sum(taken for _, taken in spent.values())]
    return {
        "spent": spent,
        "seconds": seconds,
        "steps": spent["training steps"][0],
        "evaluated": len(read(job.eval_rows)),
        "run": facts,
    }


# ---- The process ---------------------------------------------------------------------------------
JOBS = {job.__name__: job for job in (prepare, rate, train, profile, predict, bits, overhead)}


def do(job):
    """The result of a job, or {"error": …}: that a peer does not run is a result as well."""
    try:
        return JOBS[job.kind](job)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        shutil.rmtree(job.folder, ignore_errors=True)  # the job's own: models of several GB
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def tell(result):
    """Print a result for the parent."""
    print(f"\n{MARK}{json.dumps(result)}", flush=True)


def main():
    """Import, wait for the parent's word, work."""
    [path] = sys.argv[1:]
    specification = json.loads(Path(path).read_text("utf-8"))
    name = specification["name"]
    missing = []
    for module in IMPORTS.get(name, []):
        try:
            importlib.import_module(module)
        except Exception as error:  # a package that does not suit the others raises anything
            missing.append(f"{type(error).__name__}: {error}")
    tell({"missing": missing})
    if not sys.stdin.readline():  # the parent has gone
        return
    for number, job in enumerate(specification["jobs"]):
        if missing and name != "prediction":
            tell({"error": missing[0]})
            continue
        job["folder"] = f"{job['folder']}/{name} {number}"
        os.makedirs(job["folder"], exist_ok=True)
        tell(do(SimpleNamespace(**job)))


if __name__ == "__main__":
    main()
