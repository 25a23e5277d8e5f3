"""The listwise loss: its value and gradient against one large batch in plain PyTorch, out of memory, processes."""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, write_rows
from safetensors.torch import load_file
from test_memory import assert_equal, fails_above, run_two_processes, weights_of
from test_recovery import CpuScaler
from test_training import scalars_of, update_errors, without_dropout  # noqa: F401
from torch.nn.functional import binary_cross_entropy_with_logits

import train_bert_rerank
from train_bert_rerank import BertRerankerModel, UserError, listwise_loss

pytestmark = pytest.mark.usefixtures("small_pictures")
WEIGHT = 0.7
SIZES = (5, 1, 4, 2, 3, 6, 5, 9, 4, 3)  # of the lists; the one of nine is longer than a step of eight


def list_rows():
    """Lists of SIZES with graded labels 0 to 4, three of them with nothing to order or without a relevant row, their
    rows far apart."""
    rows = []
    for query, size in enumerate(SIZES):
        for place in range(size):
            label = (3 * place + query + 1) % 5
            label = {2: 0, 6: 4, 8: label % 2}.get(query, label)
            text = "请看说明书。" * (1 + (5 * place + 3 * query) % 8)
            rows.append({"query": f"第{query}问怎么办", "content": f"{place}、{text}", "label": label})
    return sorted(rows, key=lambda row: row["content"])


def settings_in(folder, model):
    """Settings of a run of two epochs of 42 rows in windows of eight, in several micro-batches each."""
    return {"model_name_or_path": model, "train_dataset": write_rows(folder / "rows.jsonl", list_rows()),
            "eval_dataset": None, "output_dir": str(folder / "out"), "max_len": 128, "max_label": 4, "epochs": 2,
            "lr": 1e-3, "batch_size": 2, "gradient_accumulation_steps": 4, "micro_batch_tokens": 128,
            "mixed_precision": "no", "listwise_weight": WEIGHT}  # fmt: skip


@pytest.fixture
def settings(small_model, tmp_path):
    return settings_in(tmp_path, small_model)


@pytest.fixture
def tiny_settings(without_dropout, tmp_path):  # noqa: F811
    return settings_in(tmp_path, without_dropout)


# ---- Against one large batch -----------------------------------------------------------------------------------------
def lists_of(rows, window):
    """The lists of a window that count, by the rule and with nothing of the script: {query: indices}."""
    sizes = Counter(row["query"] for row in rows)
    labels = {query: {row["label"] for row in rows if row["query"] == query} for query in sizes}
    lists = {}
    for index, row in enumerate(rows[number] for number in window):
        lists.setdefault(row["query"], []).append(index)
    return {query: indices for query, indices in lists.items()
            if len(indices) == sizes[query] and len(labels[query]) > 1 and max(labels[query]) >= 2}  # fmt: skip


def loss_of_one_batch(model, rows, window):
    """(loss, its lists) of all rows of a window in one padded batch."""
    batch = [rows[number] for number in window]
    inputs = model.preprocess([(row["query"], row["content"]) for row in batch], 128)
    logits = model.model(**inputs).logits.flatten()
    labels = torch.tensor([row["label"] / 4 for row in batch])
    lists = lists_of(rows, window)
    loss = binary_cross_entropy_with_logits(logits, labels)
    for indices in lists.values():
        shares = labels[indices] / labels[indices].sum()
        loss = loss - WEIGHT / len(lists) * (shares * logits[indices].log_softmax(0)).sum()
    return loss, lists


@pytest.fixture
def large_batches(monkeypatch):
    """Compares each window's gradient with that of one large batch: [(error, loss of one batch, its lists,
    micro-batches)]."""
    found, micro_batches = [], []
    train_window, forward_backward = train_bert_rerank.train_window, train_bert_rerank.forward_backward

    def counting(run, batches, *rest):
        micro_batches.append(len(batches))
        return forward_backward(run, batches, *rest)

    def comparing(run, window, seed):
        file_rows = [json.loads(line) for line in Path(run.args["train_dataset"]).open(encoding="utf-8")]
        rows = [file_rows[number] for number in run.train_data.rows["number"]]
        loss, lists = loss_of_one_batch(run.model, rows, window)
        named = {name: weight for name, weight in run.model.named_parameters() if weight.requires_grad}
        expected = dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))
        result = train_window(run, window, seed)
        scale = run.accelerator.scaler.get_scale() if run.accelerator.scaler else 1.0
        off = sum((named[name].grad / scale - expected[name]).square().sum() for name in named).sqrt()
        size = sum(gradient.square().sum() for gradient in expected.values()).sqrt()
        found.append(((off / size).item(), loss.item(), lists, micro_batches[-1]))
        return result

    monkeypatch.setattr(train_bert_rerank, "train_window", comparing)
    monkeypatch.setattr(train_bert_rerank, "forward_backward", counting)
    return found


def check_steps(large_batches, output_dir):
    """Each step's gradient and loss are those of one large batch, and the windows had lists whole, cut and none."""
    assert len(large_batches) == 2 * math.ceil(sum(SIZES) / 8)
    assert max(error for error, *_ in large_batches) < 1e-5
    losses = [value for _, value in scalars_of(output_dir)["train/loss"]]
    assert losses == pytest.approx([loss for _, loss, *_ in large_batches], rel=1e-5)
    counts = [len(lists) for *_, lists, _ in large_batches]
    assert min(counts) == 0 and max(counts) > 1, counts
    assert max(number for *_, number in large_batches) > 2


def test_the_gradient_of_a_window_is_that_of_one_large_batch(tiny_settings, large_batches, tmp_path):
    train_bert_rerank.train(tiny_settings)
    check_steps(large_batches, tmp_path / "out")


def test_the_scaler_of_fp16_takes_the_lists_gradient_with_the_rows(tiny_settings, large_batches, tmp_path, monkeypatch):
    CpuScaler(monkeypatch)
    train_bert_rerank.train(tiny_settings)
    check_steps(large_batches, tmp_path / "out")


def test_a_window_in_one_micro_batch_is_no_other(tiny_settings, large_batches):
    train_bert_rerank.train({**tiny_settings, "micro_batch_tokens": 4096, "batch_size": 21, "epochs": 1})
    [(first, _, lists, _), *_] = large_batches
    assert max(error for error, *_ in large_batches) < 1e-5 and first < 1e-5
    assert len(lists) > 4


# ---- The two passes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_both_passes_over_a_window_give_the_same_logits_with_dropout_on(
    settings, monkeypatch, precision, gradient_checkpointing
):
    monkeypatch.setattr(train_bert_rerank, "has_native_bf16", lambda device: True)
    passes, forward = [], BertRerankerModel.forward

    def recording(model, batch, labels=None):
        output = forward(model, batch, labels)
        if model.training:
            assert torch.is_grad_enabled() == (labels is not None), "the first pass keeps activations"
            model.eval()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                without = forward(model, batch)["logits"]
            model.train()
            passes.append((labels is not None, batch["input_ids"], output["logits"].detach(), without))
        return output

    monkeypatch.setattr(BertRerankerModel, "forward", recording)
    changes = {"mixed_precision": precision, "gradient_checkpointing": gradient_checkpointing}
    train_bert_rerank.train({**settings, "epochs": 1, **changes})
    waiting, compared = [], 0
    for has_labels, ids, logits, without in passes:
        assert not torch.equal(logits, without), "nothing was dropped out"
        if not has_labels:
            waiting.append((ids, logits))
        elif waiting:
            first_ids, first_logits = waiting.pop(0)
            assert torch.equal(ids, first_ids) and torch.equal(logits, first_logits)
            compared += 1
    assert not waiting and compared > 8


@pytest.mark.parametrize(("precision", "most"), [("no", 1e-5), ("bf16", 1e-2)])
def test_with_dropout_the_gradient_is_that_of_the_whole_windows_graph(settings, monkeypatch, precision, most):
    """Of micro-batches whose graphs are all kept, and the loss of all their logits taken at once."""
    monkeypatch.setattr(train_bert_rerank, "has_native_bf16", lambda device: True)
    try_window, errors = train_bert_rerank.try_window, []

    def comparing(run, window, micro_batches, seed):
        run.model.train()
        torch.manual_seed(seed)
        logits = torch.zeros(len(window))
        for indices in micro_batches:
            batch = run.model.collate([run.train_data[row] for row in window[indices]])
            logits[indices] = run.model(batch)["logits"].flatten()
        labels = run.train_data.labels[window]
        loss = binary_cross_entropy_with_logits(logits, labels)
        lists = run.lists_in(window)
        if lists:
            loss = loss + WEIGHT * listwise_loss(logits, labels, lists)
        weights = list(run.model.parameters())
        expected = torch.autograd.grad(loss, weights)
        result = try_window(run, window, micro_batches, seed)
        found = torch.cat([weight.grad.flatten() for weight in weights])
        expected = torch.cat([gradient.flatten() for gradient in expected])
        errors.append(((found - expected).norm() / expected.norm()).item())
        return result

    monkeypatch.setattr(train_bert_rerank, "try_window", comparing)
    train_bert_rerank.train({**settings, "mixed_precision": precision})
    assert len(errors) == 12 and max(errors) < most


def test_a_weight_of_zero_costs_no_pass(settings, monkeypatch):
    forward, passes = BertRerankerModel.forward, []

    def counting(model, batch, labels=None):
        if model.training:
            passes.append(labels is not None)
        return forward(model, batch, labels)

    monkeypatch.setattr(BertRerankerModel, "forward", counting)
    _, weights = weights_of({**settings, "listwise_weight": 0})
    assert passes and all(passes)
    del settings["listwise_weight"]
    assert_equal(weights, weights_of(settings)[1])


# ---- Out of memory ---------------------------------------------------------------------------------------------------
def test_out_of_memory_gives_the_bits_of_a_run_with_the_smaller_bound(settings, monkeypatch, capsys):
    expected = weights_of({**settings, "micro_batch_tokens": 128})
    passed = fails_above(128, monkeypatch)
    found = weights_of({**settings, "micro_batch_tokens": 256})
    assert found[0] == expected[0] == 128 and passed
    assert_equal(found[1], expected[1])
    assert "Out of memory: step 1 was done again" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["first pass", "second pass", "backward"])
def test_a_window_that_ran_out_of_memory_half_way_is_redone_with_the_same_gradient(
    tiny_settings, monkeypatch, tmp_path, where
):
    _, expected = weights_of(tiny_settings)
    losses = scalars_of(tmp_path / "out")["train/loss"]
    forward, backward, calls = BertRerankerModel.forward, train_bert_rerank.Accelerator.backward, []

    def fails_once(place):
        if place == where:
            calls.append(place)
            if len(calls) == 7:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    def patched_forward(model, batch, labels=None):
        if model.training:
            fails_once("first pass" if labels is None else "second pass")
        return forward(model, batch, labels)

    def patched_backward(accelerator, loss, **options):
        fails_once("backward")
        return backward(accelerator, loss, **options)

    monkeypatch.setattr(BertRerankerModel, "forward", patched_forward)
    monkeypatch.setattr(train_bert_rerank.Accelerator, "backward", patched_backward)
    bound, weights = weights_of(tiny_settings)
    assert bound == 64 and len(calls) > 7
    errors = update_errors(weights, expected, load_file(f"{tiny_settings['model_name_or_path']}/model.safetensors"))
    assert max(errors.values()) < 1e-3
    again = scalars_of(tmp_path / "out")["train/loss"]
    assert [value for _, value in again] == pytest.approx([value for _, value in losses], rel=1e-4)


# ---- Several processes, going on -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def one_process(without_dropout, tmp_path_factory):  # noqa: F811
    """(settings, output folder) of a run of one process."""
    folder = tmp_path_factory.mktemp("one_process")
    settings = settings_in(folder, without_dropout)
    train_bert_rerank.train(settings)
    return settings, folder / "out"


@pytest.mark.parametrize(
    "failing",
    [pytest.param((), id="all fits"), pytest.param((2,), id="out of memory in the first pass"),
     pytest.param((3,), marks=pytest.mark.slow), pytest.param((4,), marks=pytest.mark.slow)],
)  # fmt: skip
def test_two_processes_take_the_same_steps_as_one(one_process, tmp_path, failing):
    """A list's rows stand in micro-batches of both; where the second runs out of memory in its first or second pass,
    while the first would wait for it, both do the window again."""
    settings, one = one_process
    changes = {"gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "out")}
    done = run_two_processes(tmp_path, {**settings, **changes}, "forward" if failing else None, failing)
    assert done.returncode == 0 and "processes: 2" in done.stdout, done.stdout
    assert done.stdout.count("Out of memory: step ") == len(failing)
    check_same_steps(one, tmp_path / "out", settings["model_name_or_path"])


def check_same_steps(one, other, base):
    """Two runs' losses, gradient norms and final models are the same but for rounding."""
    scalars = [scalars_of(folder) for folder in (one, other)]
    for tag in ("train/loss", "train/grad_norm"):
        expected, found = ([value for _, value in each[tag]] for each in scalars)
        assert found == pytest.approx(expected, rel=1e-4)
    weights = [load_file(folder / "final_model" / "model.safetensors") for folder in (other, one)]
    errors = update_errors(*weights, load_file(f"{base}/model.safetensors"))
    assert max(errors.values()) < 1e-3, max(errors.items(), key=lambda item: item[1])


@pytest.mark.slow
def test_a_process_without_a_row_of_a_list_holds_up_nobody(without_dropout, tmp_path):  # noqa: F811
    """Three processes, and a last window of a list of two rows."""
    rows = [{"query": "怎么办", "content": text, "label": index} for index, text in enumerate(["请看书。", "请看报。"])]
    settings = {**settings_in(tmp_path, without_dropout), "train_dataset": write_rows(tmp_path / "two.jsonl", rows)}
    settings |= {"max_label": 1, "batch_size": 1, "gradient_accumulation_steps": 1}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", ROOT / "train_bert_rerank.py"]
    command += command_line(settings)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "processes: 3" in done.stdout, done.stdout + done.stderr
    train_bert_rerank.train({**settings, "batch_size": 3, "output_dir": str(tmp_path / "one")})
    check_same_steps(tmp_path / "one", tmp_path / "out", without_dropout)


def make_older(path, weight=None):
    """Take the setting out of a checkpoint, as one of an earlier version has none; or put it back."""
    state = torch.load(path, weights_only=True)
    if weight is None:
        del state["args"]["listwise_weight"]
    else:
        state["args"]["listwise_weight"] = weight
    torch.save(state, path)


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(settings, monkeypatch, tmp_path):
    settings["save_steps"] = 2
    _, expected = weights_of(settings)
    train_step, steps = train_bert_rerank.train_step, []

    def cut_off(run, window):
        steps.append(window)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return train_step(run, window)

    settings["output_dir"] = str(tmp_path / "other")
    monkeypatch.setattr(train_bert_rerank, "train_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train_bert_rerank.train(settings)
    with pytest.raises(UserError, match=f"listwise_weight: {WEIGHT} → 0.5"):
        train_bert_rerank.train({**settings, "listwise_weight": 0.5, "resume_from_checkpoint": "latest"})
    make_older(tmp_path / "other" / "unfinished_run" / "checkpoint-00000004" / "state.pt")
    with pytest.raises(UserError, match="checkpoint-00000004.* cannot be read: ValueError: it is older than listwise"):
        train_bert_rerank.train({**settings, "resume_from_checkpoint": "latest"})
    make_older(tmp_path / "other" / "unfinished_run" / "checkpoint-00000004" / "state.pt", WEIGHT)
    _, weights = weights_of({**settings, "resume_from_checkpoint": "latest"})
    assert len(steps) == 6 + 12 - 4
    assert_equal(weights, expected)


def test_a_finished_run_of_a_version_without_the_setting_is_not_taken_for_this_one(settings, tmp_path, capsys):
    train_bert_rerank.train(settings)
    train_bert_rerank.train({**settings, "resume_from_checkpoint": "latest"})
    assert capsys.readouterr().out.count("Start training") == 1
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    del run["args"]["listwise_weight"]
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    train_bert_rerank.train({**settings, "resume_from_checkpoint": "latest"})
    assert "starting afresh" in capsys.readouterr().out


# ---- The loss and what is said of it ---------------------------------------------------------------------------------
def test_the_loss_is_the_mean_over_lists_of_the_cross_entropy_of_their_softmax():
    logits, labels = torch.tensor([2.0, 2.0, 2.0, 0.0, 9.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 0.25])
    assert listwise_loss(logits, labels, [[0, 1, 2]]).item() == pytest.approx(math.log(3))
    expected = -math.log(1 / 2) * 2 / 3 - math.log(1 / 2) * 1 / 3  # shares 2/3 and 1/3, whatever the other row has
    assert listwise_loss(logits, labels, [[3, 5]]).item() == pytest.approx(expected)
    assert listwise_loss(logits, labels, [[0, 1, 2], [3, 5]]).item() == pytest.approx((math.log(3) + expected) / 2)


def said_of_lists(capsys):
    """(queries with lists, queries, lists whole in the first epoch, whether it is a warning and its advice)."""
    out = capsys.readouterr().out
    said = r"(Warning: )?(\d+) of (\d+) train queries have .* whole in a step of 8 rows, in the first epoch (\d+)"
    [(warning, *numbers)] = re.findall(said, out)
    advice = re.search(r"The longest list has (\d+) rows: a batch_size that makes a step several times as long", out)
    return *map(int, numbers), bool(warning), int(advice[1]) if advice else None


def test_a_run_says_how_many_lists_are_whole_in_a_step(settings, large_batches, write_jsonl, capsys):
    train_bert_rerank.train(settings)
    whole = sum(len(lists) for _, _, lists, _ in large_batches[:6])
    assert 3 <= whole < 6
    assert said_of_lists(capsys) == (6, 10, whole, False, None)

    rows = [{"query": f"第{index // 4}问", "content": f"答{index}", "label": index % 2} for index in range(16)]
    train_bert_rerank.train({**settings, "train_dataset": write_jsonl("even.jsonl", rows), "max_label": 1, "epochs": 1})
    assert said_of_lists(capsys) == (4, 4, 4, False, None)

    rows = [{"query": f"第{index // 7}问", "content": f"答{index}", "label": index % 2} for index in range(28)]
    train_bert_rerank.train({**settings, "train_dataset": write_jsonl("few.jsonl", rows), "max_label": 1, "epochs": 1})
    assert said_of_lists(capsys) == (4, 4, 1, True, 7)


NOTHING = "no query of the train data has rows with different labels, one of them relevant. Set it to 0"


@pytest.mark.parametrize(
    ("sizes", "relevant", "irrelevant", "message"),
    [((1, 1, 1), 1, 0, NOTHING), ((3, 3), 0, 0, NOTHING), ((3, 3), 1, 1, NOTHING), ((3, 3), 0.4, 0, NOTHING),
     ((9, 12), 1, 0,
      "the smallest list has 9 rows, an optimizer step 8. Raise batch_size, or set listwise_weight to 0")],
    ids=["one row a query", "no relevant row", "all relevant", "none from the middle on", "longer than a step"],
)  # fmt: skip
def test_a_weight_that_could_weigh_nothing_is_an_error_and_leaves_nothing(
    settings, write_jsonl, tmp_path, sizes, relevant, irrelevant, message
):
    rows = []
    for query, size in enumerate(sizes):
        for place in range(size):
            label = irrelevant if place else relevant
            rows.append({"query": f"第{query}问", "content": f"答{place}", "label": label})
    settings |= {"train_dataset": write_jsonl("train.jsonl", rows), "max_label": 1}
    with pytest.raises(UserError, match=f"listwise_weight has nothing to weigh: {message}"):
        train_bert_rerank.train(settings)
    assert not (tmp_path / "out" / "unfinished_run").exists() and not (tmp_path / "out" / "cache").exists()


def test_what_a_constant_answer_costs_has_its_lists_loss(settings, monkeypatch):
    runs, prepare = [], train_bert_rerank.prepare
    monkeypatch.setattr(train_bert_rerank, "prepare", lambda *rest: runs.append(prepare(*rest)) or runs[-1])
    train_bert_rerank.train(settings)
    [run] = runs
    windows = list(train_bert_rerank.windows_from(run, 1))
    expected = []
    for window in windows:
        labels = run.train_data.labels[window].double().numpy()
        sizes = [len(indices) for indices in run.lists_in(window)]
        of_lists = WEIGHT * np.mean(np.log(sizes)) if sizes else 0.0
        expected.append(of_lists - np.mean(labels * np.log(0.3) + (1 - labels) * np.log(0.7)))
    found = train_bert_rerank.loss_of(run, windows, torch.full([len(run.train_data)], 0.3))
    assert found == pytest.approx(np.average(expected, weights=[len(window) for window in windows]), rel=1e-5)


@pytest.mark.parametrize(("lr", "is_said"), [(1e-9, True), (1e-2, False)])
def test_a_run_that_learns_nothing_says_so_of_both_losses(settings, write_jsonl, capsys, lr, is_said):
    rows = list_rows()
    for row in rows:
        row.update({"content": "好" * 9, "label": 4} if row["label"] > 2 else {"label": 0})
    changes = {"train_dataset": write_jsonl("train.jsonl", rows), "lr": lr, "epochs": 18}
    train_bert_rerank.train({**settings, **changes})
    assert ("is not clearly below that of a constant answer" in capsys.readouterr().out) == is_said
