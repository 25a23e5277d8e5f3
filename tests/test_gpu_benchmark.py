"""benchmarks/gpu.py where no card is needed: what it reads out of a trace and tells of our own runs, and that neither a
process that dies nor one that hangs takes the other results with it."""

import gzip
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, write_rows
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
from step_profile import PREFIX, read_events, summarize  # noqa: E402
from train_throughput import CONTENDERS, Comparison, choose_rows, ours  # noqa: E402

EMBEDDINGS = (1000, 16)


# ---- The trace of a card, made by hand -------------------------------------------------------------------------------
def section(name, start, duration):
    return {"ph": "X", "cat": "user_annotation", "name": PREFIX + name, "tid": 1, "ts": start, "dur": duration}


def operation(name, number, start, duration, tid, shapes=()):
    return {"ph": "X", "cat": "cpu_op", "name": name, "tid": tid, "ts": start, "dur": duration,
            "args": {"External id": number, "Input Dims": list(map(list, shapes))}}  # fmt: skip


def launched(name, number, operation_number, call, start, duration, category="kernel"):
    """What the card does, from `start` on, and the call that started it, in a thread whose number tells nothing."""
    return [
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": 99, "ts": call, "dur": 1,
         "args": {"correlation": number, "External id": operation_number}},
        {"ph": "X", "cat": category, "name": name, "tid": 7, "ts": start, "dur": duration,
         "args": {"correlation": number, "stream": 7}},
    ]  # fmt: skip


@pytest.fixture
def trace():
    """A step of 1,000 µs. Autograd's thread, 2, starts the embeddings' gradient, in the zeros within it too."""
    return [
        section("whole", 0, 1000),
        section("tokens to the card", 100, 300),
        section("forward", 200, 150),
        section("backward", 500, 300),
        {"ph": "X", "cat": "gpu_user_annotation", "name": PREFIX + "forward", "tid": 7, "ts": 400, "dur": 90},
        operation("aten::to", 1, 110, 50, tid=1),
        *launched("Memcpy HtoD", 11, 1, call=120, start=300, duration=20, category="gpu_memcpy"),
        operation("aten::mm", 2, 210, 50, tid=1),
        *launched("gemm", 12, 2, call=220, start=320, duration=100),
        operation("aten::embedding_dense_backward", 3, 510, 100, tid=2),
        operation("aten::zero_", 4, 520, 30, tid=2, shapes=[EMBEDDINGS]),
        *launched("fill", 13, 4, call=530, start=600, duration=50),
        *launched("scatter", 14, 3, call=580, start=640, duration=40),  # beside the end of the fill
        operation("aten::mm", 5, 650, 50, tid=2),
        *launched("gemm", 15, 5, call=660, start=700, duration=200),
        operation("aten::add_", 6, 720, 20, tid=2, shapes=[EMBEDDINGS, EMBEDDINGS]),
        *launched("add", 18, 6, call=730, start=910, duration=10),
        operation("aten::copy_", 7, 540, 10, tid=1),  # at the same time as the gradient, in another thread
        *launched("copy", 19, 7, call=545, start=930, duration=5),
        *launched("of the step before", 16, 5, call=-10, start=-5, duration=30),
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaStreamSynchronize", "tid": 1, "ts": 820, "dur": 120,
         "args": {}},
        *launched("Memcpy DtoH (Device -> Pageable)", 20, 99, call=960, start=955, duration=5, category="gpu_memcpy"),
        {"ph": "X", "cat": "kernel", "name": "started by nobody", "tid": 7, "ts": 950, "dur": 9,
         "args": {"correlation": 17}},
        {"ph": "M", "name": "process_name"},
    ]  # fmt: skip


def profiled(tmp_path, events):
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    return summarize(read_events(path), EMBEDDINGS)


def test_kernels_belong_to_the_section_in_which_the_processor_started_them(tmp_path, trace):
    profile = profiled(tmp_path, trace)
    assert {name: pytest.approx(times) for name, times in profile.sections.items()} == {
        "tokens to the card": [0.150, 0.0, 0.020],  # processor, of it waiting, card, in ms
        "forward": [0.150, 0.0, 0.100],
        "backward": [0.300, 0.0, 0.305],
        "the rest": [0.400, 0.121, 0.005],  # a call to synchronise, and one for a copy
    }
    assert profile.embedding == pytest.approx(0.100)  # fill, scatter and add
    assert profile.micro_batches == 1 and profile.count == 8


def test_the_card_is_busy_where_a_kernel_runs_and_no_time_counts_twice(tmp_path, trace):
    profile = profiled(tmp_path, trace)
    assert profile.step == pytest.approx(1.0)
    # 300 to 420, 600 to 680, 700 to 900, 910 to 920, 930 to 935, 955 to 960 µs
    assert profile.busy == pytest.approx(0.120 + 0.080 + 0.200 + 0.010 + 0.005 + 0.005)
    assert profile.kernels[0] == ["gemm", pytest.approx(0.300), 2]


def test_on_a_cpu_operations_have_the_times_that_torch_itself_tells(tmp_path):
    weights = torch.randn(EMBEDDINGS, requires_grad=True)
    ids = torch.randint(0, EMBEDDINGS[0], (8, 32))
    with torch.profiler.profile(record_shapes=True) as profiler, torch.profiler.record_function(PREFIX + "whole"):
        hidden = torch.nn.functional.embedding(ids, weights)
        with torch.profiler.record_function(PREFIX + "backward"):
            (hidden @ torch.randn(16, 16)).sum().backward()
    path = str(tmp_path / "trace.json.gz")
    profiler.export_chrome_trace(path)
    profile = summarize(read_events(path), EMBEDDINGS)
    torchs = {event.key: event for event in profiler.key_averages()}
    for name, milliseconds, count in profile.kernels:
        assert milliseconds == pytest.approx(torchs[name].self_cpu_time_total / 1000, abs=0.002 * count), name
    gradient = torchs["aten::embedding_dense_backward"].cpu_time_total / 1000
    assert gradient * 0.99 - 0.01 <= profile.embedding <= profile.sections["backward"][2]


# ---- Processes that fail ---------------------------------------------------------------------------------------------
WORKER = """
import json, sys, time
def tell(result): print("\\n" + MARK + json.dumps(result), flush=True)
MARK = {mark!r}
jobs = json.loads(open(sys.argv[1]).read())["jobs"]
if "deaf" in sys.argv[0]:
    sys.exit(4)
tell({{"missing": ["x"]}})
if not sys.stdin.readline():
    sys.exit(5)
for job in jobs:
    print("a library has something to say")
    if job["do"] == "die":
        sys.exit(3)
    if job["do"] == "hang":
        time.sleep(600)
    tell({{"done": job["do"]}})
"""


@pytest.fixture
def answers_of(tmp_path, monkeypatch):
    """answers_of(what to do, …, seconds=…) -> the answers of a process that does so, of which there are `seconds`."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(mark=gpu.MARK), encoding="utf-8")
    monkeypatch.setattr(gpu, "WORKER", script)

    def answers(*what, seconds=60, missing="x"):
        jobs = [{"do": each} for each in what]
        with open(tmp_path / "log.txt", "w", encoding="utf-8", buffering=1) as log:
            process = gpu.Process("a process", jobs, tmp_path, None, log)
            assert process.wait_for_imports(time.monotonic() + 60) == missing
            found = [answer for _, answer in process.work(time.monotonic() + seconds)]
        assert process.process.poll() is not None  # nothing is left running
        return found

    return answers


def test_answers_come_one_by_one_and_what_libraries_print_goes_into_the_log(answers_of, tmp_path):
    assert answers_of("one", "two") == [{"done": "one"}, {"done": "two"}]
    assert (tmp_path / "log.txt").read_text().count("a library has something to say") == 2


def test_a_process_that_dies_costs_its_own_jobs_alone(answers_of):
    first, second, third = answers_of("one", "die", "two")
    assert first == {"done": "one"}
    assert "exit status 3" in second["error"] and third["error"].startswith("not begun")


def test_a_process_that_dies_while_it_imports_says_so_for_each_of_its_jobs(answers_of, tmp_path, monkeypatch):
    gpu.WORKER.rename(tmp_path / "deaf.py")
    monkeypatch.setattr(gpu, "WORKER", tmp_path / "deaf.py")
    reason = "its process ended with exit status 4, see log.txt"
    for answer in answers_of("one", "two", missing=reason):
        assert answer["error"] == f"not begun: before it, {reason}"


def test_a_job_that_hangs_is_cut_off(answers_of, monkeypatch):
    monkeypatch.setattr(gpu, "HANGS_AFTER", 2)
    started = time.monotonic()
    first, second, third = answers_of("one", "hang", "two")
    assert first == {"done": "one"}
    assert "over 2 seconds" in second["error"] and third["error"].startswith("not begun")
    assert time.monotonic() - started < 20


def test_what_the_minutes_do_not_suffice_for_is_cut_off(answers_of):
    started = time.monotonic()
    first, second = answers_of("one", "hang", seconds=2)
    assert first == {"done": "one"} and "no time was left" in second["error"]
    assert time.monotonic() - started < 20


# ---- Our own runs ----------------------------------------------------------------------------------------------------
def trained(contender, tmp_path):
    """What the worker answers where `contender` trains tiny_reranker on the default rows, two steps of 64."""
    import gpu_worker

    return gpu_worker.train(SimpleNamespace(
        contender=contender, folder=str(tmp_path), model=TINY, batch_size=8, accumulation=8, steps=2, warm_up=1,
        rows=write_rows(tmp_path / "rows.jsonl", choose_rows(None, 128)), bf16=False,
    ))  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the bound of a CPU")
@pytest.mark.parametrize(("contender", "bound"), [("ours", "1,024"), ("none", "4,096")])
def test_ours_is_measured_as_it_comes_and_with_the_bound_of_versions_before(tmp_path, contender, bound):
    answer = trained(contender, tmp_path)
    assert answer["taken"] == "2 steps, 1 of warm-up; each once"
    chosen = answer["run"]
    assert chosen["bound"] == f"micro-batches of up to {bound} tokens" and chosen["micro_batch_cost"] == 16
    assert chosen["tokens_per_second"] > 0


def test_every_contender_of_ours_says_that_it_is_deterministic_and_is_not_run_again_for_it():
    table = Comparison(job=None, peak=1.0, results={})
    names = [name for name, contender in CONTENDERS.items() if contender.train is ours]
    assert tuple(names) == gpu.OURS
    assert [table.deterministic_rate(name) for name in names] == ["it is", "it is"]


def logged(folder, loss, tokens_per_second):
    """The folder of a run that left this log."""
    with SummaryWriter(str(folder / "logs" / "train_bert_rerank")) as log:
        log.add_scalar("train/loss", loss, 1)
        log.add_scalar("time/tokens_per_second", tokens_per_second, 1)
    return folder


def test_two_runs_have_the_same_bits_whatever_their_speed_and_not_with_another_loss(tmp_path):
    from soak_kill import bits

    slow = bits(logged(tmp_path / "slow", loss=0.5, tokens_per_second=100.0))
    assert slow == bits(logged(tmp_path / "fast", loss=0.5, tokens_per_second=200.0)) == {"train/loss": [(1, 0.5)]}
    assert slow != bits(logged(tmp_path / "other", loss=0.25, tokens_per_second=100.0))


# ---- The report ------------------------------------------------------------------------------------------------------
@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--rows", "64", "--output", str(tmp_path)])
    return gpu.read_options()


CHOSEN = {"bound": "micro-batches of up to 9,216 tokens; needs 20.5 of 24.0 GB", "micro_batch_cost": 1234,
          "tokens_per_second": 5678.9, "model_flops_utilisation": 0.321}  # fmt: skip


def test_each_result_is_on_disk_as_soon_as_it_is_there(options, tmp_path):
    report = gpu.Report(options, time.monotonic())
    jobs = gpu.Planner(options, str(tmp_path)).plan()
    numbers = {"flops": 4e12, "padding": 0.9, "micro_batches": 8.0, "memory": 2**31, "taken": "each once"}
    report.add("preparation", jobs["preparation"][1], {"operations_a_second": 8e12})
    report.add("ours", jobs["ours"][0], {"rate": 30.0, **numbers, "run": CHOSEN})
    report.add("plain loop", jobs["plain loop"][1], {"rate": 10.0, **numbers})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| 16 | plain loop | 16 × 1 | 10.0 | 3.00 | 0.900 | 8.0 | 50.0% | 2.0 GiB | each once |" in text
    report.add("bits", jobs["bits"][0], {"error": "the package x is missing"})
    assert "- bits: the package x is missing" in (tmp_path / "report.md").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["answer"].get("rate") for line in lines] == [None, 30.0, 10.0, None]


def test_the_report_tells_what_each_run_of_ours_chose_and_needs_and_how_much_of_the_card_it_used(options, tmp_path):
    report = gpu.Report(options, time.monotonic())
    jobs = gpu.Planner(options, str(tmp_path)).plan()
    numbers = {"rate": 30.0, "flops": 4e12, "padding": 0.9, "micro_batches": 8.0, "memory": 2**31, "taken": "each once"}
    words = "micro-batches of up to 9,216 tokens; needs 20.5 of 24.0 GB; one more costs 1,234 tokens; 5,679 tokens/s"
    without_card = {"bound": "micro-batches of up to 1,024 tokens", "micro_batch_cost": 16, "tokens_per_second": 99.6}
    report.add("ours", jobs["ours"][0], {**numbers, "run": CHOSEN})
    report.add("ours", jobs["ours"][5], {**numbers, "run": without_card})
    report.add("plain loop", jobs["plain loop"][1], numbers)
    spent = {"spent": {"training steps": [1, 2.0]}, "seconds": 3.0, "steps": 1, "evaluated": 64}
    report.add("overhead", jobs["overhead"][0], {**spent, "run": CHOSEN})
    lines = report.path.read_text(encoding="utf-8").splitlines()
    assert f"- train_bert_rerank.py, 2 × 8: {words}; model FLOPs utilisation 32.1%." in lines
    assert (
        "- the same, `micro_batch_tokens=None`, 8 × 8, rows of 512 tokens: micro-batches of up to 1,024 tokens; "
        "one more costs 16 tokens; 100 tokens/s." in lines
    )
    assert f"The run, by its run.json: {words}; model FLOPs utilisation 32.1%." in lines
    assert not any(line.startswith("- plain loop") for line in lines)


def test_the_report_tells_how_long_the_card_is_idle_in_a_step_without_the_profiler(options, tmp_path):
    report = gpu.Report(options, time.monotonic())
    jobs = gpu.Planner(options, str(tmp_path)).plan()["profile"]
    sections = {"forward": [30.0, 4.0, 10.0], "the rest": [50.0, 1.0, 0.0]}
    for job, busy in zip(jobs, (10.0, 20.0), strict=True):
        report.add("profile", job, {
            "seconds": 0.04, "step": 80.0, "busy": busy, "count": 7, "micro_batches": 2, "sections": sections,
            "embedding": 3.0, "kernels": [["void at::native::fill|x", 5.0, 4]],
        })  # fmt: skip
    text = report.path.read_text(encoding="utf-8")
    assert "| forward | 30.00 | 4.00 | 10.00 | 30.00 | 4.00 | 10.00 |" in text
    assert "| the whole step | 80.00 | 5.00 | 10.00 | 80.00 | 5.00 | 20.00 |" in text
    for name, share in (("default", "75%"), ("none", "50%")):
        assert f"{name}: 2 micro-batches, 40.0 ms without the profiler (the median of three); " in text
        assert f"the card is idle for {share} of" in text
    assert "| `fill/x` | 5.00 | 4 | 50.0% |" in text


def test_lengthened_rows_have_512_tokens_also_where_the_query_is_long():
    import gpu_worker
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    texts = [("问" * 300, "答"), ("问", "一个很长的答案" * 100)]
    rows = [{"query": query, "content": content, "label": 1} for query, content in texts]
    found = gpu_worker.lengthened(rows, tokenizer)
    ids = tokenizer([row["query"] for row in found], [row["content"] for row in found], truncation=True, max_length=512)
    assert [len(each) for each in ids["input_ids"]] == [512, 512]
    assert [len(tokenizer(row["content"])["input_ids"]) >= 512 for row in found] == [True, True]


def test_results_that_are_there_are_not_written_over(options, tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(SystemExit):
        gpu.read_options()


def test_the_plan_has_every_contender_at_both_sizes_with_the_same_rows(options, tmp_path):
    jobs = [job for jobs in gpu.Planner(options, str(tmp_path)).plan().values() for job in jobs]
    trained = [job for job in jobs if job["kind"] == "train" and not job["is_long"]]
    assert {job["contender"] for job in trained} == gpu.TITLES.keys() == CONTENDERS.keys()
    for job in trained:
        assert job["batch_size"] * job["accumulation"] == job["samples"]
        assert job["rows"].endswith(f"{job['samples']}.jsonl")
    shapes = {(job["contender"], job["batch_size"]) for job in trained}
    for peer in gpu.TITLES.keys() - {*gpu.OURS}:
        assert {(peer, size) for size in (2, 16, 8, 64)} <= shapes
