"""Memory: micro-batches that do not fit, those that are found to fit, options that save some, and the token cache."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter, UserList
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, command_line, rows_of, write_rows
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import scalars_of, update_errors, without_dropout  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

import train_bert_rerank
from train_bert_rerank import BertRerankerModel, RerankDataset, UserError, check_settings, first_token_only

FAILURES = ["CUDA out of memory. Tried to allocate 2.00 GiB.", "MPS backend out of memory (MPS allocated: 9 GB)",
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]  # fmt: skip


pytestmark = pytest.mark.usefixtures("small_pictures")


def settings_in(folder, model):
    """Settings of a run of two epochs with four windows each, 40 rows of 15 to 75 tokens."""
    return {"model_name_or_path": model, "train_dataset": write_rows(folder / "rows.jsonl", rows_of(40)),
            "eval_dataset": None, "output_dir": str(folder / "out"), "max_len": 128, "epochs": 2, "lr": 1e-3,
            "batch_size": 2, "gradient_accumulation_steps": 5, "mixed_precision": "no"}  # fmt: skip


@pytest.fixture
def settings(small_model, tmp_path):
    return settings_in(tmp_path, small_model)


def weights_of(settings, **changes):
    """Train; the bound at the end and the weights of final_model."""
    run = train_bert_rerank.train({**settings, **changes})
    return run["micro_batch_tokens"], load_file(f"{settings['output_dir']}/final_model/model.safetensors")


def assert_equal(weights, others):
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def fails_above(limit, monkeypatch, message=FAILURES[0]):
    """Make training forwards of more than `limit` padded tokens run out of memory; returns the shapes that passed."""
    forward, passed = BertRerankerModel.forward, []

    def limited(self, batch, labels=None):
        if self.training and batch["input_ids"].numel() > limit:
            raise torch.OutOfMemoryError(message) if "CUDA out" in message else RuntimeError(message)
        passed.append(tuple(batch["input_ids"].shape))
        return forward(self, batch, labels)

    monkeypatch.setattr(BertRerankerModel, "forward", limited)
    return passed


# ---- Out of memory ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def smaller_bound(small_model, tmp_path_factory, small_pictures):
    """The bound and the weights of a run whose micro-batches have 128 tokens from the start."""
    return weights_of(settings_in(tmp_path_factory.mktemp("bound"), small_model), micro_batch_tokens=128)


@pytest.mark.parametrize("message", FAILURES)
def test_out_of_memory_in_the_first_step_gives_the_bits_of_a_run_with_the_smaller_bound(
    settings, smaller_bound, monkeypatch, capsys, message
):
    fails_above(128, monkeypatch, message)
    found = weights_of(settings, micro_batch_tokens=512)
    assert found[0] == smaller_bound[0] == 128
    assert_equal(found[1], smaller_bound[1])  # so no random state was lost, no row lost or seen twice
    out = capsys.readouterr().out
    assert re.findall(r"Out of memory: step (\d+) was done .* at most (\d+) tokens", out) == [("1", "128")]
    assert "--micro_batch_tokens 128 does so from the start." in out


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_window_that_ran_out_of_memory_half_way_is_redone_with_the_same_gradient(
    settings, without_dropout, monkeypatch, tmp_path, where  # noqa: F811
):
    settings = {**settings, "model_name_or_path": without_dropout, "micro_batch_tokens": 160}
    _, expected = weights_of(settings)
    logged, calls = scalars_of(tmp_path / "out"), []
    owner, name = {"forward": (BertRerankerModel, "forward"),
                   "backward": (train_bert_rerank.Accelerator, "backward")}[where]  # fmt: skip
    original = getattr(owner, name)

    def fails_once(self, *arguments):
        calls.extend([name] * torch.is_grad_enabled() * (not torch.is_inference_mode_enabled()))
        if len(calls) == 12:
            raise torch.OutOfMemoryError(FAILURES[0])
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, fails_once)
    bound, weights = weights_of(settings)
    assert bound == 80 and len(calls) > 12
    errors = update_errors(weights, expected, load_file(f"{without_dropout}/model.safetensors"))
    assert max(errors.values()) < 1e-3
    for tag, values in scalars_of(tmp_path / "out").items():
        assert [step for step, _ in values] == list(range(1, 9))
        assert [value for _, value in values] == pytest.approx([value for _, value in logged[tag]], rel=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows_to_check.jsonl").read_text("utf-8").splitlines()]
    assert all(0 < row["mean_probability"] < 1 for row in rows)


def test_one_pair_that_does_not_fit_is_an_error_with_its_size_and_what_to_change(settings, monkeypatch):
    fails_above(60, monkeypatch)
    with pytest.raises(UserError) as caught:
        train_bert_rerank.train({**settings, "micro_batch_tokens": 256})
    message = str(caught.value)
    assert re.search(r"out of memory at 64 tokens, and one pair has [67]\d: lower max_len", message), message
    assert "gradient_checkpointing" in message and "freeze_embeddings" in message


def test_another_error_of_the_same_type_is_no_reason_to_try_again(settings, monkeypatch):
    fails_above(128, monkeypatch, "Expected all tensors to be on the same device")
    with pytest.raises(RuntimeError, match="same device"):
        train_bert_rerank.train({**settings, "micro_batch_tokens": 512})


DRIVER = """
import os, sys
sys.path.insert(0, {root!r})
import torch, train_bert_rerank as script
accelerator_class, model_class = script.Accelerator, script.BertRerankerModel
forward, backward, calls = model_class.forward, accelerator_class.backward, []
def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
def patched_forward(self, *arguments):
    calls.extend([1] * self.training)
    if os.environ["RANK"] == "1" and {where!r} == "forward" and self.training and len(calls) in {failing}:
        out_of_memory()
    return forward(self, *arguments)
def patched_backward(self, loss, **options):
    if os.environ["RANK"] == "1" and {where!r} == "synchronised backward" and models[0].require_backward_grad_sync:
        out_of_memory()
    return backward(self, loss, **options)
models, step = [], script.forward_backward
def patched_forward_backward(run, *rest, **named):
    models.append(run.wrapped)
    return step(run, *rest, **named)
script.forward_backward = patched_forward_backward
model_class.forward, accelerator_class.backward = patched_forward, patched_backward
train_window = script.train_window
def patched_train_window(*arguments):
    os.write(1, b"drops out with seed %d\\n" % arguments[-1])
    return train_window(*arguments)
script.train_window = patched_train_window
script.main()
"""


def run_two_processes(tmp_path, settings, where=None, failing=()):
    """Run the script on two processes, the second of which runs out of memory at the forwards numbered `failing`, or in
    the backward that all take part in: the completed process."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT), where=where, failing=failing), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, str(driver), *command_line(settings)],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def two_that_fit(without_dropout, tmp_path_factory):  # noqa: F811
    """(settings, output folder, output) of a run of two processes that do not run out of memory."""
    folder = tmp_path_factory.mktemp("two_processes")
    settings = {**settings_in(folder, without_dropout), "log_with": None, "micro_batch_tokens": 320}
    done = run_two_processes(folder, settings)
    assert done.returncode == 0 and "processes: 2" in done.stdout, done.stdout
    return settings, folder / "out", done.stdout


@pytest.mark.parametrize(
    "failing", [pytest.param((1,), marks=pytest.mark.slow), pytest.param((4,), marks=pytest.mark.slow), (3, 7)]
)
def test_of_two_processes_both_redo_the_window_that_did_not_fit_one(two_that_fit, tmp_path, failing):
    settings, whole, output = two_that_fit
    seeds = re.findall(r"drops out with seed (\d+)", output)
    assert len(set(seeds)) == len(seeds) == 2 * 4, "each process and each step drops out on its own"
    done = run_two_processes(tmp_path, {**settings, "output_dir": str(tmp_path / "out")}, "forward", failing)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("Out of memory: step ") in (1, len(failing))
    folders = tmp_path / "out", whole
    weights, expected = (load_file(folder / "final_model" / "model.safetensors") for folder in folders)
    errors = update_errors(weights, expected, load_file(f"{settings['model_name_or_path']}/model.safetensors"))
    assert max(errors.values()) < 1e-3
    bounds = [json.loads((folder / "run.json").read_text())["micro_batch_tokens"] for folder in folders]
    assert bounds == [320 // 2 ** len(failing), 320]


def test_out_of_memory_in_the_synchronised_backward_ends_all_processes(settings, tmp_path):
    done = run_two_processes(tmp_path, settings, "synchronised backward")
    assert done.returncode == 1 and "torch.OutOfMemoryError: CUDA out of memory." in done.stdout, done.stdout


# ---- What fits -------------------------------------------------------------------------------------------------------
def test_on_a_cpu_auto_is_a_fixed_number_that_run_json_records(settings, tmp_path):
    expected = weights_of(settings, micro_batch_tokens=1024)
    found = weights_of(settings, micro_batch_tokens="auto")
    assert found[0] == 1024 == json.loads((tmp_path / "out" / "run.json").read_text())["micro_batch_tokens"]
    assert_equal(found[1], expected[1])


class Card:
    """A GPU that is not there: `memory` bytes, of which others hold some, and 1,000 bytes for each padded token of a
    training forward on top of what the weights take."""

    name, major, minor, multi_processor_count = "Card", 9, 0, 132

    def __init__(self, monkeypatch, memory, others=0, weights=0):
        self.memory, self.others, self.weights = memory, others, weights
        self.peak, self.passes = 0, []
        forward = BertRerankerModel.forward

        def limited(model, batch, labels=None):
            self.passes.append(tuple(batch["input_ids"].shape))
            needed = self.weights + 1000 * batch["input_ids"].numel()
            if needed > self.memory - self.others:
                raise torch.OutOfMemoryError(FAILURES[0])
            self.peak = max(self.peak, needed)
            return forward(model, batch, labels)

        def forget():
            self.peak = 0

        monkeypatch.setattr(BertRerankerModel, "forward", limited)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (self.memory - self.others - self.weights, self.memory))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: self.weights)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forget)


def run_of_rows(longest=100, samples=64, cost=10_000):
    """What largest_micro_batch() needs of a Run whose longest row has so many tokens."""
    model, accelerator = BertRerankerModel.from_pretrained(TINY), train_bert_rerank.Accelerator(cpu=True)
    pairs = [("问" * 8, "答" * length) for length in range(10, longest - 11)]
    dataset = UserList(model.encode(pairs, 512))
    dataset.labels, dataset.lengths = torch.zeros(len(pairs)), np.array([len(ids) for ids, *_ in dataset])
    assert dataset.lengths.max() == longest
    return SimpleNamespace(
        accelerator=accelerator, model=model, wrapped=model, train_data=dataset, samples_per_step=samples,
        record={"micro_batch_cost": cost},
    )  # fmt: skip


@pytest.mark.parametrize("memory, samples, found", [
    (1_000_000, 64, 800),  # 900,000 bytes: 900 tokens fit, of which at most a quarter is left unused
    (10**9, 10, 1000),  # a whole step
    (320_000, 64, 200),
])  # fmt: skip
def test_on_a_gpu_auto_is_what_nine_tenths_of_all_its_memory_hold(monkeypatch, memory, samples, found):
    run = run_of_rows(samples=samples)
    card = Card(monkeypatch, memory)
    assert train_bert_rerank.largest_micro_batch(run) == (found, 1000 * found, memory)
    assert all(length == 100 for _, length in card.passes), "the longest row"
    # A backward beside a gradient, and one more forward: the first backward makes that gradient.
    assert all(card.passes.count(shape) == 3 for shape in card.passes)
    assert max(count for count, _ in card.passes) <= samples
    assert all(weight.grad is None for weight in run.model.parameters())


def test_what_others_hold_of_a_gpu_changes_nothing_as_long_as_there_is_room(monkeypatch):
    found = set()
    for others in (0, 50_000, 100_000):
        run = run_of_rows()
        card = Card(monkeypatch, 1_000_000, others, weights=100_000)
        found.add(train_bert_rerank.largest_micro_batch(run))
        monkeypatch.undo()
    assert found == {(800, 900_000, 1_000_000)} and card.passes
    run = run_of_rows(longest=30, samples=9)
    Card(monkeypatch, 1_000_000, others=700_000)  # nine rows need no more than is left
    assert train_bert_rerank.largest_micro_batch(run)[0] == 270


def test_where_others_hold_what_a_run_would_use_it_says_what_there_is_and_a_bound_that_fits(monkeypatch):
    run = run_of_rows()
    Card(monkeypatch, 1_000_000_000, others=999_500_000)
    with pytest.raises(UserError) as error:
        train_bert_rerank.largest_micro_batch(run)
    message = str(error.value)
    assert re.search(r"use up to 0\.9 of 1\.0 GB, and 0\.0 are free for it: end what else", message), message
    assert "--micro_batch_tokens 400, which needs 0.0 GB" in message, "twice as many did not fit"
    Card(monkeypatch, 1_000_000_000, others=999_950_000)
    with pytest.raises(UserError, match="or take --freeze_embeddings true"):  # not one row fits beside them
        train_bert_rerank.largest_micro_batch(run)


def test_what_would_not_fit_an_empty_card_either_is_no_reason_to_complain_of_others(monkeypatch):
    """800 tokens fit, 900 at most would; others hold more than the tenth that is left free."""
    run = run_of_rows()
    card = Card(monkeypatch, 1_000_000, others=150_000)
    assert train_bert_rerank.largest_micro_batch(run)[0] == 800
    assert max(count for count, _ in card.passes) < 16, "what is known not to fit is not tried"


def test_memory_of_the_host_in_the_place_of_the_gpus_is_not_taken_for_it(monkeypatch):
    run = run_of_rows()
    card = Card(monkeypatch, 1_000_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (500_000, 1_000_000))  # but passes succeed, as on Windows
    with pytest.raises(UserError, match="--micro_batch_tokens 400, which"):
        train_bert_rerank.largest_micro_batch(run)
    assert card.passes


def test_no_more_rows_are_tried_than_there_are(monkeypatch):
    run = run_of_rows(longest=30, samples=1000)
    card = Card(monkeypatch, 10**9)
    assert train_bert_rerank.largest_micro_batch(run)[0] == len(run.train_data) * 30
    assert max(count for count, _ in card.passes) == len(run.train_data)


def test_all_processes_plan_with_one_cost_on_unlike_cards_too(monkeypatch, reranker):
    monkeypatch.setattr(train_bert_rerank, "micro_batch_cost", lambda *_: 2800)
    monkeypatch.setattr(train_bert_rerank, "gather_object", lambda costs: [*costs, 1200])
    run = SimpleNamespace(
        args=check_settings({}), record={"precision": "no"}, progress=SimpleNamespace(max_tokens=0), model=reranker,
        accelerator=SimpleNamespace(device=torch.device("cpu")), checkpoint=None,
    )  # fmt: skip
    train_bert_rerank.choose_bound(run)
    assert run.record["micro_batch_cost"] == 1200


def test_cards_of_rocm_have_no_rate_of_nvidias(monkeypatch, reranker):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert train_bert_rerank.micro_batch_cost(None, torch.device("cuda"), "bf16") == 256
    run = SimpleNamespace(
        throughput=train_bert_rerank.Throughput(pairs=10, tokens=1000, squared_lengths=110_000, seconds=0.5),
        accelerator=SimpleNamespace(device=torch.device("cuda")),
    )  # fmt: skip
    assert train_bert_rerank.speed_of(run) == {"tokens_per_second": 2000}


@pytest.mark.parametrize("device, epochs, bound", [("cpu", 0, 1024), ("mps", 0, 4096), ("xpu", 3, 4096)])
def test_auto_is_a_fixed_number_on_other_devices_also_where_nothing_is_trained(reranker, device, epochs, bound):
    run = SimpleNamespace(
        args=check_settings({"epochs": epochs}), record={"precision": "no"}, progress=SimpleNamespace(max_tokens=0),
        model=reranker, accelerator=SimpleNamespace(device=torch.device(device)), checkpoint=None,
    )  # fmt: skip
    assert train_bert_rerank.choose_bound(run) == f"micro-batches of up to {bound:,} tokens"


def test_a_micro_batch_is_no_larger_than_pays(monkeypatch):
    for cost, samples, found in ((10_000, 64, 6400), (2500, 64, 5000), (1, 64, 4000), (1, 16, 1600)):
        run = run_of_rows(samples=samples, cost=cost)
        Card(monkeypatch, 10**9)
        assert train_bert_rerank.largest_micro_batch(run)[0] == found
        monkeypatch.undo()


def test_a_gpu_that_has_no_room_for_one_pair_is_an_error_that_says_what_to_change(monkeypatch):
    run = run_of_rows()
    Card(monkeypatch, 99_000)
    with pytest.raises(UserError, match="out of memory at 100 tokens, and one pair has 100: lower max_len"):
        train_bert_rerank.largest_micro_batch(run)


def test_a_gpu_without_room_for_the_optimizers_state_is_an_error_that_says_what_is_needed(monkeypatch):
    run = run_of_rows()
    Card(monkeypatch, 24 * 10**9, others=21 * 10**9)
    monkeypatch.setattr(train_bert_rerank, "bytes_of", lambda tensors: 1_205_000_000)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.41 GiB")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match=r"no room for the optimizer: 2\.4 GB are needed .* 3\.0 of 24\.0 GB are there"):
        train_bert_rerank.largest_micro_batch(run)


@pytest.mark.parametrize("most", [1, 2, 7, 64, 1000])
def test_the_largest_number_that_fits_is_found_but_for_a_quarter(most):
    for limit in range(most + 3):
        asked = []

        def fits(number, limit=limit, asked=asked):
            asked.append(number)
            return number <= limit

        found = train_bert_rerank.largest(most, fits)
        best = min(limit, most)
        assert best * 3 / 4 <= found <= best and (found == best or best > 4) and (found == most or limit < most)
        assert 1 <= min(asked) and max(asked) <= min(most, max(1, 2 * limit)) and len(asked) <= 14


# ---- What one more micro-batch costs ---------------------------------------------------------------------------------
CARDS = {  # compute capability, multiprocessors; TFLOP/s in 16 and in 32 bits, as NVIDIA has them
    "V100": (7, 0, 80, 125, 15.7), "T4": (7, 5, 40, 65, 8.1), "A100": (8, 0, 108, 312, 19.5),
    "NVIDIA GeForce RTX 3090": (8, 6, 82, 71, 35.6), "NVIDIA A10": (8, 6, 72, 125, 31.2), "H200": (9, 0, 132, 989, 67),
    "NVIDIA GeForce RTX 4090": (8, 9, 128, 165, 82.6), "NVIDIA L40S": (8, 9, 142, 362, 91.6),
    "B200": (10, 0, 148, 2250, 80), "NVIDIA GeForce RTX 5090": (12, 0, 170, 210, 105),
}  # fmt: skip


def card(name="Card", major=9, minor=0, multi_processor_count=132):
    """What torch.cuda.get_device_properties() would tell of a GPU that is not there."""
    return SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=multi_processor_count)


def large_shape(layers):
    """A model of bge-reranker-large's shape but for the number of layers, without memory."""
    shape = {"vocab_size": 250_002, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    config = XLMRobertaConfig(**shape, num_hidden_layers=layers, num_labels=1)
    with torch.device("meta"):
        return XLMRobertaForSequenceClassification(config)


@pytest.fixture
def cost_on(monkeypatch):
    """cost_on(card, precision, layers=24) -> what a micro-batch costs there, of bge-reranker-large's shape."""

    def cost(of_card, precision="bf16", layers=24):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of_card)
        return train_bert_rerank.micro_batch_cost(large_shape(layers), torch.device("cuda"), precision)

    return cost


@pytest.mark.parametrize("name", CARDS)
def test_the_rates_of_cards_are_their_makers(name):
    *kind, half, single = CARDS[name]
    for precision, teraflops in (("bf16", half), ("fp16", half), ("no", single)):
        flops, capability = train_bert_rerank.card_rate(card(name, *kind), precision)
        assert flops / 1e12 == pytest.approx(teraflops, rel=0.01) and capability == tuple(kind[:2])


def test_one_more_micro_batch_costs_what_a_card_computes_while_the_processor_starts_it(cost_on):
    h200 = cost_on(card())
    # 94 ms of those that 1,024 tokens took, of which 6 were arithmetic: benchmarks/README.md.
    assert h200 == pytest.approx(94 / 6 * 1024, rel=0.1)
    assert cost_on(card()) == h200 == cost_on(card(), "fp16"), "nothing is timed"
    assert cost_on(card(multi_processor_count=66)) == pytest.approx(h200 / 2, abs=1)
    assert cost_on(card(), "no") == pytest.approx(h200 * 67 / 989, rel=0.01)
    # Twice the layers take the processor twice as long, and a token twice the operations.
    assert cost_on(card(), layers=12) == pytest.approx(h200, rel=0.01)
    assert cost_on(card("T4", 7, 5, 40)) == pytest.approx(h200 * 65 / 989, rel=0.01)


@pytest.mark.parametrize("kind, cost", [("cpu", 16), ("mps", 256), ("xpu", 256), ("npu", 256)])
def test_one_more_micro_batch_has_a_cost_on_other_devices(kind, cost):
    assert train_bert_rerank.micro_batch_cost(None, SimpleNamespace(type=kind), "no") == cost


def test_the_weights_are_counted_once_for_all_queries_and_again_in_another_precision(monkeypatch):
    model, asked = BertRerankerModel.from_pretrained(TINY), []
    monkeypatch.setattr(train_bert_rerank, "micro_batch_cost", lambda *what: asked.append(what[1:]) or 16)
    for _ in range(3):
        model.rank("怎么退款", ["联系客服", "擦净触点"])
    model.bfloat16().predict([("怎么退款", "联系客服")])
    assert asked == [(torch.device("cpu"), "no"), (torch.device("cpu"), "bf16")]


def test_windows_are_cut_at_the_cost_of_one_more_micro_batch_which_run_json_has(settings, monkeypatch, tmp_path):
    counts = {}
    for cost in (1, 10_000):
        monkeypatch.setattr(train_bert_rerank, "micro_batch_cost", lambda model, device, precision, cost=cost: cost)
        shapes = fails_above(10**9, monkeypatch)
        train_bert_rerank.train({**settings, "eval_dataset": settings["train_dataset"], "epochs": 1})
        assert json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))["micro_batch_cost"] == cost
        counts[cost] = Counter(count for count, _ in shapes)
        monkeypatch.undo()
    assert counts[10_000][10] == 4, "40 rows, ten a step"
    assert counts[10_000].keys() >= {11, 14, 15}, "an evaluation, in as few as 1,024 tokens allow"
    assert counts[1].total() > 3 * counts[10_000].total() and counts[1][10] == 0


@pytest.mark.parametrize("own, taken", [((8, 7), "8.6"), ((9, 9), "9.0"), ((6, 1), "7.0"), ((13, 0), "12.0")])
def test_an_unknown_card_takes_the_rates_of_the_nearest_and_the_run_says_so(capsys, own, taken):
    train_bert_rerank.mention_unknown_card(card("Orin", *own, 16), "bf16")
    said = f"Orin: the rates of compute capability {own[0]}.{own[1]} are not known, those of {taken} are taken"
    assert capsys.readouterr().out == f"{said} to cut micro-batches.\n"
    train_bert_rerank.mention_unknown_card(card(), "bf16")
    assert capsys.readouterr().out == ""


def test_on_a_gpu_one_line_tells_the_bound_and_what_it_needs_and_the_record_has_both(monkeypatch, reranker):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card())
    monkeypatch.setattr(train_bert_rerank, "largest_micro_batch", lambda run: (16384, 12.4e9, 24e9))
    run = SimpleNamespace(
        args=check_settings({}), record={"precision": "bf16"}, progress=SimpleNamespace(max_tokens=0), model=reranker,
        accelerator=SimpleNamespace(device=torch.device("cuda")), checkpoint=None,
    )  # fmt: skip
    said = train_bert_rerank.choose_bound(run)
    assert said == "micro-batches of up to 16,384 tokens; needs 12.4 of 24.0 GB"
    assert run.record["micro_batch_tokens"] == run.progress.max_tokens == 16384
    assert run.record["micro_batch_cost"] > 1000
    for bound, expected in ((None, 2 * 512), (777, 777)):
        run.args["micro_batch_tokens"] = bound
        assert train_bert_rerank.choose_bound(run) == f"micro-batches of up to {expected:,} tokens"


@pytest.mark.parametrize("length", [50, 500])
def test_operations_are_those_that_pytorch_counts(length):
    shape = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "num_hidden_layers": 6}
    config = XLMRobertaConfig(**shape, vocab_size=300, max_position_embeddings=514, num_labels=1)
    config._attn_implementation = "eager"  # of which all products are counted
    model = XLMRobertaForSequenceClassification(config)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.full((4, length), 5)).logits.sum().backward()
    counted = train_bert_rerank.operations(model, tokens=4 * length, squared_lengths=4 * length**2)
    # The head, which reads one token, is counted for all of them.
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.03)


def test_speed_is_logged_step_by_step_and_kept_in_run_json(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(train_bert_rerank.tqdm, "set_postfix_str", lambda bar, text: shown.append(text))
    shown = []
    run = train_bert_rerank.train(settings)
    log = EventAccumulator(str(tmp_path / "out" / "logs" / "train_bert_rerank")).Reload()
    speeds = [event.value for event in log.Scalars("time/tokens_per_second")]
    steps = [event.step for event in log.Scalars("time/tokens_per_second")]
    assert steps == list(range(1, 9)) and min(speeds) <= run["tokens_per_second"] <= max(speeds)
    assert "model_flops_utilisation" not in run, "no card, no rate"
    assert re.search(r", [\d.]+ pairs/s, ", shown[-1]) and f", {run['tokens_per_second']:,.0f} tokens/s" in shown[-1]

    encoded = BertRerankerModel.from_pretrained(TINY).encode([row[:2] for row in rows_of_settings(settings)], 128)
    tokens = 2 * sum(len(ids) for ids, *_ in encoded)
    assert tokens / run["tokens_per_second"] <= run["seconds"]["training"]


def rows_of_settings(settings):
    """(query, content, label) of the train rows."""
    return [tuple(json.loads(line).values()) for line in open(settings["train_dataset"], encoding="utf-8")]


def test_the_share_of_a_cards_rate_is_that_of_all_processes_real_tokens(monkeypatch, reranker):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card())
    throughput = train_bert_rerank.Throughput(pairs=10, tokens=1000, squared_lengths=110_000, seconds=0.5)
    run = SimpleNamespace(
        throughput=throughput, record={"precision": "bf16"}, model=reranker,
        accelerator=SimpleNamespace(device=torch.device("cuda"), num_processes=2),
    )  # fmt: skip
    speed = train_bert_rerank.speed_of(run)
    expected = train_bert_rerank.operations(reranker.model, 1000, 110_000) / 0.5 / (2 * 989e12)
    assert speed["tokens_per_second"] == 2000
    assert speed["model_flops_utilisation"] == pytest.approx(expected, rel=0.01)
    run.throughput = train_bert_rerank.Throughput()
    assert train_bert_rerank.speed_of(run) == {}, "nothing was left to train"


# ---- Options that save memory ----------------------------------------------------------------------------------------
def test_gradient_checkpointing_gives_the_same_bits(settings, monkeypatch):
    computed, weights = [], []
    forward = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *each, **more: computed.append(torch.is_grad_enabled()) or forward(*each, **more))
    for checkpointing in (False, True):
        computed.clear()
        weights.append((weights_of(settings, gradient_checkpointing=checkpointing)[1], sum(computed)))
    assert_equal(weights[0][0], weights[1][0])
    for_preparation = 1  # what gets a gradient is looked at once, before training, in a model of one layer
    computed_in_training = [count - for_preparation for _, count in weights]
    assert computed_in_training[1] == 2 * computed_in_training[0] > 0, "each layer is computed once more"


def test_frozen_word_embeddings_stay_and_cost_no_gradient_and_no_optimizer_state(
    settings, small_model, monkeypatch, write_jsonl
):
    prepared, prepare = [], train_bert_rerank.Accelerator.prepare
    monkeypatch.setattr(train_bert_rerank.Accelerator, "prepare",
                        lambda self, *each: prepared.append(each) or prepare(self, *each))  # fmt: skip
    evaluation = write_jsonl("eval.jsonl", rows_of(60, 20))
    _, weights = weights_of(settings, freeze_embeddings=True, eval_dataset=evaluation, base_interpolation=(),
                            load_best_model_at_end=False)  # fmt: skip
    base = load_file(f"{small_model}/model.safetensors")
    same = {name for name in base if torch.equal(weights[name], base[name])}
    assert same == {name for name in base if "word_embeddings" in name}
    [(model, optimizer)] = prepared
    trained = sum(weight.numel() for group in optimizer.param_groups for weight in group["params"])
    embeddings = model.model.get_input_embeddings().weight
    assert trained == sum(weight.numel() for weight in model.parameters()) - embeddings.numel()
    assert embeddings.grad is None


# ---- The last layer --------------------------------------------------------------------------------------------------
SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_labels": 1,
         "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 1}  # fmt: skip


def small_model(kind, **changes):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **{**SMALL, **changes})).eval()


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("padded", [True, False])
def test_the_first_token_alone_gives_the_logits_and_gradients_of_the_plain_forward(kind, padded):
    plain = small_model(kind)
    fast = copy.deepcopy(plain)
    first_token_only(fast)
    ids = torch.randint(2, 100, (5, 40), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(40) < torch.tensor([[40], [31], [22], [13], [4]])).long() if padded else torch.ones_like(ids)
    batch = {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}
    widths = []
    for model in (plain, fast, copy.deepcopy(fast)):
        hook = model.base_model.encoder.layer[-1].register_forward_hook(
            lambda module, inputs, output: widths.append((output if torch.is_tensor(output) else output[0]).shape[1]))
        model.logits = model(**batch).logits
        model.logits.square().sum().backward()
        hook.remove()
        assert (model.logits - plain.logits).abs().max() < 1e-6
        for weight, expected in zip(model.parameters(), plain.parameters(), strict=True):
            assert (weight.grad - expected.grad).abs().max() <= 1e-6 * max(1, expected.grad.abs().max())
    assert widths == [40, 1, 1]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_computes_with_weights_of_its_own(duplicate):
    model = small_model("bert")
    first_token_only(model)
    other, ids = duplicate(model), torch.arange(2, 20)[None]
    before = model(input_ids=ids).logits
    other.base_model.encoder.layer[-1].attention.self.value.weight.data.zero_()
    assert torch.equal(model(input_ids=ids).logits, before) and not torch.equal(other(input_ids=ids).logits, before)


@pytest.mark.parametrize("changes", [{"attn_implementation": "eager"}, {"is_decoder": True}])
def test_what_is_not_recognised_computes_all_tokens(changes):
    model = small_model("bert", **changes)
    first_token_only(model)
    assert "forward" not in vars(model.base_model.encoder.layer[-1].attention)


def test_other_architectures_are_left_as_they_are():
    for kind in ("electra", "distilbert", "mpnet"):
        model = small_model(kind)
        before = [dict(vars(module)) for module in model.modules()]
        first_token_only(model)
        assert [dict(vars(module)) for module in model.modules()] == before


# ---- The token cache -------------------------------------------------------------------------------------------------
@pytest.fixture
def tokens(tmp_path, reranker):
    """tokens(rows, **settings) -> (dataset, number of texts tokenised for it)."""

    def tokens(rows, model=reranker, **changes):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = check_settings({"output_dir": str(tmp_path / "out"), **changes})
        counted, encode = [], model.encode
        spy = copy.copy(model)
        spy.encode = lambda pairs, max_len: encode((counted.append(1) or pair for pair in pairs), max_len)
        loaded, _ = train_bert_rerank.load_file(str(path), 0, settings)
        return RerankDataset(loaded, [str(path)], "train", spy, settings), len(counted)

    return tokens


def test_the_cache_holds_what_the_tokenizer_gives_and_spares_the_next_run_the_work(tokens, reranker):
    rows = rows_of(30)
    for expected in (30, 0):
        data, counted = tokens(rows, max_len=24)
        assert counted == expected
        encoded = list(reranker.encode([(row["query"], row["content"]) for row in rows], 24))
        assert len(data) == len(encoded) == len(list(data)) == 30
        assert all(np.array_equal(ours[0], theirs[0]) and ours[1] == theirs[1]
                   for ours, theirs in zip(data, encoded, strict=True))  # fmt: skip
        batches = [reranker.collate(each) for each in (list(data), encoded)]
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[1])
    assert data.cache.parent.name == "cache" and len(list(data.cache.parent.iterdir())) == 1


def test_a_changed_row_or_setting_or_tokenizer_never_finds_the_old_tokens(tokens, tmp_path):
    rows = rows_of(5)
    assert tokens(rows)[1] == 5
    for changed in (
        [{**rows[0], "content": rows[0]["content"] + "！"}, *rows[1:]], [*rows[:4], {**rows[4], "query": "别的"}],
        [{**rows[0], "label": 1 - rows[0]["label"]}, *rows[1:]], rows[::-1],
    ):  # fmt: skip
        assert tokens(changed)[1] == 5
    assert tokens(rows[:4])[1] == 4
    assert tokens(rows, max_len=20)[1] == 5
    other = BertRerankerModel.from_pretrained(TINY)
    other.model.config.query_format = "问：{}"
    assert tokens(rows, other)[1] == 5
    del other.model.config.query_format
    assert tokens(rows, other)[1] == 0
    other.tokenizer.add_tokens(["说明书"])
    assert tokens(rows, other)[1] == 5
    assert tokens(rows)[1] == 0


def test_a_write_that_was_cut_off_is_never_used_and_leaves_nothing(tokens, reranker, tmp_path, monkeypatch):
    monkeypatch.setattr(train_bert_rerank.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        tokens(rows_of(5))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert tokens(rows_of(5))[1] == 5


def test_a_killed_write_is_not_taken_for_a_cache_and_goes_with_the_next_run(settings, tmp_path):
    code = (f"import sys, os; sys.path.insert(0, {str(ROOT)!r}); import train_bert_rerank as script\n"
            "script.os.fsync = lambda _: os._exit(9)\nscript.train(eval(sys.argv[1]))")  # fmt: skip
    killed = subprocess.run([sys.executable, "-c", code, repr(settings)], capture_output=True)
    assert killed.returncode == 9
    [left] = (tmp_path / "out" / "cache").iterdir()
    assert left.suffix != ".tokens"
    (left.parent / "mine.csv").touch()
    (left.parent / "folder").mkdir()
    train_bert_rerank.train(settings)
    names = {path.suffix or path.name for path in left.parent.iterdir()}
    assert not left.exists() and names == {".tokens", ".csv", "folder"}


def test_a_file_that_changes_between_reading_and_tokenising_is_an_error(tokens, tmp_path, reranker):
    data, _ = tokens(rows_of(5))
    for content in (rows_of(4), [*rows_of(4), {**rows_of(5)[4], "content": "neu"}]):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        with pytest.raises(UserError, match="data.jsonl has changed since this run loaded it"):
            list(data.pairs())


def test_data_that_change_during_a_run_cost_the_list_of_texts_alone(settings, tmp_path, monkeypatch, capsys):
    judge = train_bert_rerank.judge
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text("".join(json.dumps(row) + "\n" for row in rows_of(60, 20)), encoding="utf-8")
    monkeypatch.setattr(train_bert_rerank, "judge", lambda *each: (evaluation.write_text("{}"), judge(*each))[1])
    train_bert_rerank.train({**settings, "eval_dataset": str(evaluation)})
    assert "Warning: predictions.jsonl is not written: " in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "predictions.jsonl" not in written
    assert {"final_model", "run.json", "eval_report.json", "rows_to_check.jsonl", "score_distribution.png"} <= written


def test_rows_that_are_not_neighbours_are_read_anew_by_number(tokens):
    rows = [{"query": f"q{index}", "pos": [f"a{index}", f"b{index}"], "neg": ["c"]} for index in range(5)]
    data, _ = tokens(rows)
    assert list(data.pairs(np.array([0, 4, 5, 14]))) == [("q0", "a0"), ("q1", "b1"), ("q1", "c"), ("q4", "c")]
