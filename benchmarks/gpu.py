"""How the script does on a GPU, beside its peers: one command, a bounded time, a result at a time.

    python benchmarks/gpu.py --data CRANFIELD [--packages WHEELS]                # on the card
    python benchmarks/gpu.py --data CRANFIELD --device cpu --layers 2 --rows 64  # a rehearsal

bge-reranker-large's shape (24 layers, 1,024 wide, a vocabulary of 250,002) with random weights, in
bf16, on rows of Cranfield, or without --data on the default ones, which are Chinese and shorter.
The parts; --parts chooses among them:

training    pairs/s of ours as it comes and with micro_batch_tokens None, of sentence-transformers,
            FlagEmbedding, transformers' Trainer and a plain loop. 16 and 64 samples a step, the
            peers in batches as our defaults have them and in batches as large as a step; then ours
            on rows of 512 tokens; and the bound of a micro-batch that each run of ours chose
profile     where the time of a step of 16 samples goes, as it comes and with micro_batch_tokens
            None
overhead    what a run spends besides training
prediction  predict() beside CrossEncoder and FlagReranker in fp32, bf16 and fp16, scores compared
bits        whether two runs on tiny_reranker leave the same bits, in bf16

A run of the first part takes eight steps, two of them to warm up, fewer where --rows does not
suffice; it is measured from outside, as train_throughput.py says. Processes import at the same time
and work one after the other. What is missing, a peer or an option of it, is left out, and what
takes longer than --minutes is cut off; the report says what.

--output gets report.md, written anew after each result, results.jsonl, a line for each, log.txt,
all that the processes print, and a trace of each profiled step, for chrome://tracing or Perfetto.
--packages is a folder of wheels, for a machine without a network: they are installed for this
command alone. Temporary files take up to 25 GB, in TMPDIR.

A rehearsal computes in fp32, unless --precision says otherwise, with a model 256 wide: it shows
that everything runs, and its figures say nothing about a GPU.
"""

import argparse
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from datetime import date
from pathlib import Path

MARK = "gpu.py: "  # what the lines of gpu_worker.py that are for this process begin with
# On recent cards PyTorch prefers cuDNN's attention, which plans anew for each shape of a batch. A
# long run spreads that cost, eight steps cannot: all processes but one ask for another attention.
NO_CUDNN = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
OWN_CHOICE = "plain loop, attention as PyTorch chooses it"


# ---- What is to be done --------------------------------------------------------------------------
OURS = ("ours", "none")  # the contenders that are our script
PARTS = ("training", "profile", "overhead", "prediction", "bits")
STEPS = 8
WARM_UP = 2
LIKE_THE_DEFAULTS = {16: (2, 8), 64: (8, 8)}  # samples of a step: batch, accumulation
LARGE_BATCHES = {16: (16, 1), 64: (64, 1)}
PEERS = {  # process: its contenders, of train_throughput.py
    "sentence-transformers": ("st",),
    "FlagEmbedding": ("flag",),
    "Trainer": ("rebalance",),
    "plain loop": ("plain",),
}
LAST_PEERS = {"Trainer, other samplings": ("grouped", "random")}  # where time is left
TITLES = {  # as in train_throughput.py, which imports torch: this process does not wait for that
    "ours": "train_bert_rerank.py",
    "none": "the same, `micro_batch_tokens=None`",
    "st": "sentence-transformers",
    "flag": "FlagEmbedding (softmax over groups of 2)",
    "rebalance": "Trainer, batch_rebalance",
    "grouped": "Trainer, group_by_length",
    "random": "Trainer, random",
    "plain": "plain loop",
}


class Planner:
    """Makes the jobs of the processes: dicts as gpu_worker.py takes them."""

    def __init__(self, options, folder):
        self.options = options
        self.folder = folder
        self.files = {}  # of rows, written by the first job
        for key in ("all", "one step", "16", "64", "long"):
            self.files[key] = f"{folder}/{key}.jsonl"
        self.steps = {}  # of a run, by the samples of a step
        for samples in LIKE_THE_DEFAULTS:
            self.steps[samples] = min(STEPS, options.rows // samples)

    def plan(self):
        """{process: its jobs} in the order in which they are done, the most telling first."""
        jobs = {"preparation": self.preparation()}
        if "training" in self.options.parts:
            jobs["ours"] = self.training_of_ours()
        if "profile" in self.options.parts:
            jobs["profile"] = self.profile()
        if "training" in self.options.parts:
            for process, contenders in PEERS.items():
                jobs[process] = self.training_of_peers(contenders)
            jobs[OWN_CHOICE] = self.training_with_own_attention()
        if "overhead" in self.options.parts:
            jobs["overhead"] = self.overhead()
        if "prediction" in self.options.parts:
            jobs["prediction"] = self.prediction()
        if "bits" in self.options.parts:
            jobs["bits"] = [self.job("bits")]
        if "training" in self.options.parts:
            for process, contenders in LAST_PEERS.items():
                jobs[process] = self.training_of_peers(contenders)
        return jobs

    def job(self, kind, **more):
        """A job for the function `kind` of gpu_worker.py."""
        return {
            "kind": kind,
            "folder": self.folder,
            "model": f"{self.folder}/model",
            "bf16": self.options.precision == "bf16",
            **more,
        }

    def preparation(self):
        options = self.options
        prepare = self.job(
            "prepare",
            data=options.data and os.path.abspath(options.data),
            row_count=options.rows,
            files=self.files,
            steps=self.steps,
            layers=options.layers,
            width=options.width,
            device=options.device,
        )
        return [prepare, self.job("rate")]

    def training(self, contender, split, is_long=False):
        """A contender's run: batches of `split`, (batch, accumulation), on rows as they are or long
        ones."""
        batch_size, accumulation = split
        samples = batch_size * accumulation
        steps = self.steps[samples]
        return self.job(
            "train",
            contender=contender,
            samples=samples,
            steps=steps,
            title=TITLES[contender],
            warm_up=min(WARM_UP, steps - 1),
            batch_size=batch_size,
            accumulation=accumulation,
            rows=self.files["long" if is_long else str(samples)],
            is_long=is_long,
        )

    def training_of_ours(self):
        jobs = []
        for samples, is_long in ((16, False), (64, False), (64, True)):
            for contender in OURS:
                jobs.append(self.training(contender, LIKE_THE_DEFAULTS[samples], is_long))
        return jobs

    def training_of_peers(self, contenders):
        jobs = []
        for contender in contenders:
            for samples in LIKE_THE_DEFAULTS:
                jobs.append(self.training(contender, LIKE_THE_DEFAULTS[samples]))
                jobs.append(self.training(contender, LARGE_BATCHES[samples]))
        return jobs

    def training_with_own_attention(self):
        job = self.training("plain", LIKE_THE_DEFAULTS[16])
        job["title"] = OWN_CHOICE
        return [job]

    def profile(self):
        batch_size, accumulation = LIKE_THE_DEFAULTS[16]
        output = os.path.abspath(self.options.output)
        jobs = []
        for name, bound in (("default", "auto"), ("none", None)):
            job = self.job(
                "profile",
                name=name,
                micro_batch_tokens=bound,
                batch_size=batch_size,
                accumulation=accumulation,
                rows=self.files["one step"],
                trace=f"{output}/{name}.trace.json.gz",
                embeddings=(250_002, self.options.width),
            )
            jobs.append(job)
        return jobs

    def overhead(self):
        batch_size, accumulation = LIKE_THE_DEFAULTS[16]
        job = self.job(
            "overhead",
            micro_batch_tokens="auto",
            batch_size=batch_size,
            accumulation=accumulation,
            rows=self.files["16"],
            eval_rows=self.files["all"],
        )
        return [job]

    def prediction(self):
        rows = self.files["all"]
        rounds = 2
        if self.options.device == "cpu":  # some processors have no half precision of their own
            rows = self.files["one step"]
            rounds = 1

        jobs = []
        for precision in ("fp32", "bf16", "fp16"):
            job = self.job(
                "predict",
                name=precision,
                precision=precision,
                rows=rows,
                rounds=rounds,
                reference=f"{self.folder}/logits.npy",
            )
            jobs.append(job)
        return jobs


# ---- Processes -----------------------------------------------------------------------------------
WORKER = Path(__file__).with_name("gpu_worker.py")
HANGS_AFTER = 150  # seconds of a job


def install(wheels, folder):
    """Install the wheels of one folder into another; returns why it failed, or None."""
    paths = sorted(map(str, Path(wheels).glob("*.whl")))
    pip = [sys.executable, "-m", "pip", "install"]
    how = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", folder]
    done = subprocess.run([*pip, *how, *paths], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()
    if said:
        return said[0]
    return f"pip ended with status {done.returncode}"


def environment(name, options, packages):
    """The variables of a process: no network, one card or none, `packages` before others."""
    variables = dict(os.environ)
    first_card, *_ = variables.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    variables["CUDA_VISIBLE_DEVICES"] = "" if options.device == "cpu" else first_card
    variables["PYTHONPATH"] = packages
    if "PYTHONPATH" in os.environ:
        variables["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    variables["HF_HUB_OFFLINE"] = "1"
    variables["TOKENIZERS_PARALLELISM"] = "true"
    variables[NO_CUDNN] = "0" if name == OWN_CHOICE else "1"
    return variables


class Process:
    """gpu_worker.py with its jobs: it imports at once, and works when it is told to."""

    def __init__(self, name, jobs, folder, variables, log):
        self.name = name
        self.jobs = jobs
        self.failure = None  # why no more answers will come, where that is so
        specification = Path(folder, f"{name}.json")
        specification.write_text(json.dumps({"name": name, "jobs": jobs}), "utf-8")
        command = [sys.executable, str(WORKER), str(specification)]
        self.process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # so that end() reaches its own children too
        )
        self.told = queue.Queue()  # its answers; None: it has ended
        threading.Thread(target=self.listen, args=(log,), daemon=True).start()

    def listen(self, log):
        """Sort what the process prints: its answers, and what libraries have to say."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.told.put(json.loads(line.removeprefix(MARK)))
            else:
                log.write(line)
        self.told.put(None)

    def next_answer(self, deadline, patience):
        """The next answer within so many seconds; {"error": …} where none comes."""
        if self.failure:
            return {"error": f"not begun: before it, {self.failure}"}
        left = deadline - time.monotonic()
        if left <= 0:
            return {"error": "not begun: no time was left"}
        try:
            answer = self.told.get(timeout=min(left, patience))
        except queue.Empty:
            self.failure = f"cut off: it took over {patience} seconds"
            if left < patience:
                self.failure = "cut off: no time was left"
            return {"error": self.failure}
        if answer is None:
            self.failure = f"its process ended with exit status {self.process.wait()}, see log.txt"
            return {"error": self.failure}
        return answer

    def wait_for_imports(self, deadline):
        """Until it has imported; returns what it could not import, as text."""
        answer = self.next_answer(deadline, patience=math.inf)
        if "error" in answer:
            return answer["error"]
        return "; ".join(answer["missing"])

    def work(self, deadline):
        """Let it work; yields each job with its answer."""
        with suppress(BrokenPipeError):  # it has ended: the answers will tell
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        for job in self.jobs:
            yield job, self.next_answer(deadline, HANGS_AFTER)
        self.end()

    def end(self):
        """End the process and those that it started, whatever they do."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


# ---- The report ----------------------------------------------------------------------------------
REHEARSAL = (
    "**A rehearsal on a CPU. The figures say nothing about a GPU; card and kernels stand for the "
    "processor and its operations.**"
)
ABOUT_TRAINING = (
    f"{NO_CUDNN}=1 but in the row that says otherwise. The share of matrix products counts real "
    "tokens only, in all layers."
)
ABOUT_OURS = (
    "What these runs say of themselves, warm-up included: what a micro-batch may hold and was found "
    "to need, what one more is taken to cost, and the speed. Model FLOPs utilisation counts real "
    "tokens only and is a share of what the card does at best, as its maker has it."
)
TRAINING_COLUMNS = [
    "samples a step",
    "contender",
    "batch × accumulation",
    "pairs/s",
    "ours / it",
    "padding efficiency",
    "micro-batches a step",
    "share of matrix products",
    "peak memory",
    "rows",
]
ABOUT_SECTIONS = (
    "Milliseconds. Processor: time in this section without the sections inside it, longer than "
    "usual under the profiler. Waits: of this, blocked on the card. Card: run time of the kernels "
    "that the section launched."
)
ABOUT_SCORES = (
    "Scores: the largest difference of a logit from ours in fp32, in standard deviations of ours, "
    "over the pairs that nobody cuts. With random weights, half precision moves scores further "
    "than it would a trained model's."
)
PREDICTION_COLUMNS = [
    "precision",
    "",
    "pairs/s",
    "ours / it",
    "largest difference",
    "pairs compared",
]


class Report:
    """What was found so far: a line for each result, and all of it as Markdown."""

    def __init__(self, options, started):
        self.options = options
        self.started = started
        self.results = []  # (name of the process, job, answer)
        self.left_out = {}  # why: titles of what
        self.path = Path(options.output, "report.md")
        self.lines = Path(options.output, "results.jsonl")

    def say(self, text):
        """A line for whoever waits, with the seconds since the start."""
        print(f"{time.monotonic() - self.started:5.0f} s  {text}", flush=True)

    def leave_out(self, title, reason):
        """Keep and say that something is missing."""
        self.left_out.setdefault(reason, []).append(title)
        self.say(f"{title}: left out: {reason}")

    def add(self, name, job, answer):
        """Keep and say a result of the process of this name."""
        self.results.append((name, job, answer))
        with open(self.lines, "a", encoding="utf-8") as file:
            file.write(json.dumps({"process": name, "job": job, "answer": answer}) + "\n")
        title = title_of(name, job)
        if "error" in answer:
            self.leave_out(title, answer["error"])
        elif job["kind"] == "train":
            self.say(f"{title}: {answer['rate']:.1f} pairs/s")
        else:
            self.say(f"{title}: done")
        unfinished = self.path.with_suffix(".new")
        unfinished.write_text(self.text(), "utf-8")
        os.replace(unfinished, self.path)

    def answers(self, kind, **wanted):
        """[(job, answer)] of the jobs of a kind that have these values and did not fail."""
        answers = []
        for _, job, answer in self.results:
            is_wanted = job["kind"] == kind and wanted.items() <= job.items()
            if is_wanted and "error" not in answer:
                answers.append((job, answer))
        return answers

    def text(self):
        """The report as Markdown."""
        lines = self.head()
        lines += self.training_table()
        lines += self.section_table()
        lines += self.kernel_tables()
        lines += self.overhead_table()
        lines += self.prediction_table()
        lines += self.bits_line()
        if self.left_out:
            lines += ["", "Left out:", ""]
        for reason, titles in self.left_out.items():
            lines.append(f"- {'; '.join(titles)}: {reason}")
        return "\n".join(lines) + "\n"

    def head(self):
        """Date, machine, versions, model and rows."""
        lines = []
        if self.options.device == "cpu":
            lines += [REHEARSAL, ""]
        for _, facts in self.answers("prepare"):
            lines += [machine_line(facts), self.model_line(facts)]
        for _, answer in self.answers("rate"):
            rate = answer["operations_a_second"] / 1e12
            lines.append(f"Matrix products in this precision reach {rate:.2f} TFLOP/s.")
        lines.append("Every run was measured once.")
        return lines

    def model_line(self, facts):
        """Model and rows."""
        options = self.options
        source = "Cranfield" if options.data else "default"
        return (
            f"{options.layers} layers, {options.width} wide, "
            f"{facts['parameters'] / 1e6:.0f} M parameters, {options.precision}; "
            f"{options.rows} {source} rows of {facts['tokens']:.0f} tokens on average."
        )

    def training_table(self):
        """Contenders side by side, those with the same samples a step one after the other."""
        rows = []
        for samples, is_long in ((16, False), (64, False), (64, True)):
            runs = self.answers("train", samples=samples, is_long=is_long)
            rate_of_ours = None
            for job, answer in runs:
                if job["contender"] == "ours":
                    rate_of_ours = answer["rate"]
            for job, answer in runs:
                rows.append(self.training_row(job, answer, rate_of_ours))
        if not rows:
            return []
        lines = ["", "### Training", "", ABOUT_TRAINING, "", *table(TRAINING_COLUMNS, rows)]
        return lines + self.lines_of_ours()

    def lines_of_ours(self):
        """What each run of ours chose, and how fast it found itself."""
        lines = []
        for job, answer in self.answers("train"):
            if job["contender"] in OURS:
                lines.append(f"- {title_of('ours', job)}: {in_words(answer['run'])}.")
        if not lines:
            return []
        return ["", ABOUT_OURS, "", *lines]

    def training_row(self, job, answer, rate_of_ours):
        """A contender's row; pairs/s of ours are those for the same rows, None where there are
        none."""
        samples = str(job["samples"])
        if job["is_long"]:
            samples += ", of 512 tokens"
        ratio = "–"
        if rate_of_ours:
            ratio = f"{rate_of_ours / answer['rate']:.2f}"
        share = "–"
        for _, peak in self.answers("rate"):
            share = f"{answer['flops'] / peak['operations_a_second']:.1%}"
        memory = "–"
        if answer["memory"]:
            memory = f"{answer['memory'] / 2**30:.1f} GiB"
        return [
            samples,
            job["title"],
            split_of(job),
            f"{answer['rate']:.1f}",
            ratio,
            f"{answer['padding']:.3f}",
            f"{answer['micro_batches']:.1f}",
            share,
            memory,
            answer["taken"],
        ]

    def section_table(self):
        """Where the time of a step goes, the bounds side by side."""
        profiles = self.answers("profile")
        if not profiles:
            return []
        columns = [""]
        for job, _ in profiles:
            columns += [f"{job['name']}: processor", "waits", "card"]
        rows = []
        for name in profiles[0][1]["sections"]:
            rows.append([name])
            for _, answer in profiles:
                rows[-1] += two_digits(answer["sections"][name])
        rows += self.last_section_rows(profiles)

        lines = ["", "### Where a step of 16 samples goes", "", ABOUT_SECTIONS, ""]
        lines += [*table(columns, rows), ""]
        for job, answer in profiles:
            lines.append(idle_line(job, answer))
        return lines

    def last_section_rows(self, profiles):
        """The embeddings' gradient, which is a part of backward, and the sums."""
        embeddings = ["of backward: the embeddings' gradient"]
        whole = ["the whole step"]
        for _, answer in profiles:
            waits = sum(waits for _, waits, _ in answer["sections"].values())
            embeddings += ["", "", *two_digits([answer["embedding"]])]
            whole += two_digits([answer["step"], waits, answer["busy"]])
        return [embeddings, whole]

    def kernel_tables(self):
        """The kernels that take longest."""
        columns = ["kernel", "ms", "times", "share of the card's time"]
        lines = []
        for job, answer in self.answers("profile"):
            rows = []
            for name, duration, count in answer["kernels"]:
                share = duration / answer["busy"]
                cells = [f"`{shortened(name)}`", f"{duration:.2f}", str(count), f"{share:.1%}"]
                rows.append(cells)
            lines += ["", f"The kernels that take longest, {job['name']}:", ""]
            lines += table(columns, rows)
        return lines

    def overhead_table(self):
        """What a run spends besides training."""
        lines = []
        for _, answer in self.answers("overhead"):
            rows = []
            for name, (count, seconds) in answer["spent"].items():
                rows.append([name, str(count), f"{seconds:.2f}"])
            title = f"A run of {answer['steps']} steps, {answer['seconds']:.1f} s in all"
            lines += ["", f"### {title}", ""]
            lines.append(f"An evaluation scores {answer['evaluated']} rows.")
            lines += [f"The run, by its run.json: {in_words(answer['run'])}.", ""]
            lines += table(["", "times", "seconds"], rows)
        return lines

    def prediction_table(self):
        """Prediction by precision."""
        answers = self.answers("predict")
        if not answers:
            return []
        rows = []
        for job, answer in answers:
            for name in answer["contenders"]:
                rows.append([job["precision"], name, *prediction_cells(answer, name)])
        job, answer = answers[0]
        size = f"{answer['pairs']} pairs, the median of {job['rounds']} rounds."
        lines = ["", "### Prediction", "", f"{size} {ABOUT_SCORES}", ""]
        return lines + table(PREDICTION_COLUMNS, rows)

    def bits_line(self):
        """Whether two runs left the same bits."""
        lines = []
        for _, answer in self.answers("bits"):
            outcome = "the same bits"
            if answer["differing"]:
                outcome = f"OTHER BITS in {', '.join(answer['differing'])}"
            precision = answer["precision"].replace("no", "fp32")
            lines += ["", "### The same bits", ""]
            lines.append(
                f"Two runs of ten steps on tiny_reranker in {precision}: {outcome} "
                f"({answer['compared']} files and series of scalars compared)."
            )
        return lines


def table(columns, rows):
    """Lines of Markdown."""
    lines = [table_row(columns), "| --- " * len(columns) + "|"]
    for cells in rows:
        lines.append(table_row(cells))
    return lines


def table_row(cells):
    return f"| {' | '.join(cells)} |"


def two_digits(values):
    return [f"{value:.2f}" for value in values]


def title_of(name, job):
    """What a job of the process of this name is about, in a few words."""
    if job["kind"] == "train":
        title = f"{job['title']}, {split_of(job)}"
        return title + ", rows of 512 tokens" if job["is_long"] else title
    if "name" in job:
        return f"{name}, {job['name']}"
    return job["kind"]


def in_words(facts):
    """What a run of ours chose and how fast it was, as gpu_worker.watched_run() has it."""
    words = (
        f"{facts['bound']}; one more costs {facts['micro_batch_cost']:,} tokens; "
        f"{facts['tokens_per_second']:,.0f} tokens/s"
    )
    if "model_flops_utilisation" in facts:
        words += f"; model FLOPs utilisation {facts['model_flops_utilisation']:.1%}"
    return words


def split_of(job):
    return f"{job['batch_size']} × {job['accumulation']}"


def machine_line(facts):
    """Date, machine and versions."""
    versions = []
    for package, version in facts["versions"].items():
        versions.append(f"{package} {version or 'missing'}")
    return (
        f"{date.today()}, {facts['device']}, {facts['processor']}, Python {facts['python']}; "
        f"{', '.join(versions)}; train_bert_rerank.py {facts['script']}."
    )


def idle_line(job, answer):
    """How long the card is idle in a step of a profile."""
    milliseconds = answer["seconds"] * 1000
    idle = max(0.0, 1 - answer["busy"] / milliseconds)
    return (
        f"- {job['name']}: {answer['micro_batches']} micro-batches, {milliseconds:.1f} ms without "
        f"the profiler (the median of three); the card is idle for {idle:.0%} of that; "
        f"{answer['count']} kernels."
    )


def prediction_cells(answer, name):
    """What one contender's prediction came to."""
    numbers = answer["contenders"][name]
    if "error" in numbers:
        return [f"left out: {numbers['error']}", "", "", ""]
    ratio = answer["contenders"]["ours"]["rate"] / numbers["rate"]
    return [
        f"{numbers['rate']:.1f}",
        f"{ratio:.2f}",
        f"{numbers['apart']:.1e}",
        str(answer["compared"]),
    ]


def shortened(name):
    """A kernel's name without what all have in common, for a cell of a table."""
    for part in ("void ", "at::native::", "(anonymous namespace)::", "at::"):
        name = name.replace(part, "")
    return name.replace("|", "/")[:90]


# ---- The command ---------------------------------------------------------------------------------
def read_options():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of cranfield_train.jsonl; else the default rows")
    parser.add_argument("--packages", help="folder of wheels to install for this command")
    parser.add_argument("--output", default="output_gpu", help="folder for the results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="cuda: bf16, cpu: fp32")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, help="a multiple of 64; cuda: 1024, cpu: 256")
    parser.add_argument("--rows", type=int, default=512, help="a multiple of 64; eight steps: 512")
    options = parser.parse_args()
    refuse_mistakes(options, parser)

    if options.precision is None:
        options.precision = "fp32" if options.device == "cpu" else "bf16"
    if options.width is None:
        options.width = 256 if options.device == "cpu" else 1024
    return options


def refuse_mistakes(options, parser):
    """Errors that are there before a process has begun."""
    if options.rows < 64 or options.rows % 64:
        parser.error("--rows should be a multiple of 64")
    if options.data and not Path(options.data, "cranfield_train.jsonl").is_file():
        parser.error(f"--data {options.data} has no cranfield_train.jsonl")
    if options.packages and not list(Path(options.packages).glob("*.whl")):
        parser.error(f"--packages {options.packages} has no *.whl")
    if Path(options.output, "results.jsonl").exists():
        parser.error(f"--output {options.output} has results already: name another folder")


def end_in_order():
    """Whoever ends this process lets `finally` end the others."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def measure(processes, report, deadline):
    """Let one process after the other work, and keep what they answer."""
    for process in processes:  # before one works: an import would disturb its figures
        missing = process.wait_for_imports(deadline)
        if missing:
            report.say(f"{process.name} lacks {missing}")

    for process in processes:
        for job, answer in process.work(deadline):
            report.add(process.name, job, answer)
            if job["kind"] == "prepare" and "error" in answer:
                log = f"{report.options.output}/log.txt"
                sys.exit(
                    f"Error: there is no model to measure: {answer['error']}\n"
                    f"What the processes printed: {log}"
                )


def main():
    """Start the processes, measure, print the report."""
    started = time.monotonic()
    options = read_options()
    end_in_order()
    deadline = started + 60 * options.minutes - 5  # to remove what was written, and to print
    Path(options.output).mkdir(parents=True, exist_ok=True)
    report = Report(options, started)

    processes = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        path = Path(options.output, "log.txt")
        log = stack.enter_context(open(path, "w", encoding="utf-8", buffering=1))
        try:
            packages = f"{folder}/packages"
            failure = options.packages and install(options.packages, packages)
            if failure:
                report.leave_out(f"the packages of {options.packages}", failure)
            for name, jobs in Planner(options, folder).plan().items():
                variables = environment(name, options, packages)
                processes.append(Process(name, jobs, folder, variables, log))
            measure(processes, report, deadline)
        finally:
            for process in processes:
                process.end()
    print(f"\n{report.text()}\nReport, results, log and traces: {options.output}")


if __name__ == "__main__":
    main()
