"""The optimizer step: its arithmetic against a plain PyTorch loop, its number, its schedule, one process or two."""

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import ROOT, TINY, rows_of
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import train_bert_rerank
from train_bert_rerank import BertRerankerModel, UserError

SCRIPT = (ROOT / "train_bert_rerank.py").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("small_pictures")
KEY_BIAS = "attention.self.key.bias"  # its gradient is zero but for rounding noise, which Adam turns into steps


@pytest.fixture(scope="session")
def without_dropout(tmp_path_factory):
    """tiny_reranker with dropout 0."""
    folder = tmp_path_factory.mktemp("models") / "without_dropout"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def graded_rows(count):
    return [{**row, "label": index % 5} for index, row in enumerate(rows_of(count))]


def scalars_of(output_dir):
    """{tag: [(step, value)]} of a run's TensorBoard log, without times, which no two runs share."""
    log = EventAccumulator(str(Path(output_dir) / "logs" / "train_bert_rerank"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in log.Tags()["scalars"] if not tag.startswith("time/")]
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in tags}


@pytest.fixture(scope="module")
def plain_steps(without_dropout):
    """What plain_loop() makes of 21 rows in windows of 8, 8 and 5."""
    return plain_loop(without_dropout, graded_rows(21), 8, 2, 1e-3, 7)


def plain_loop(model_folder, rows, samples_per_step, epochs, peak, seed):
    """Fine-tune one sample at a time with nothing but PyTorch: (gradients of each step, norms, losses, weights)."""
    model = AutoModelForSequenceClassification.from_pretrained(model_folder).float()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    named = dict(model.named_parameters())
    is_plain = {name: name.endswith("bias") or "LayerNorm" in name for name in named}
    optimizer = torch.optim.AdamW([
        {"params": [named[name] for name in named if not is_plain[name]], "weight_decay": 0.01},
        {"params": [named[name] for name in named if is_plain[name]], "weight_decay": 0.0},
    ])  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    total = epochs * math.ceil(len(rows) / samples_per_step)
    warmup = math.ceil(0.1 * total)
    gradients, norms, losses = [], [], []
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows), samples_per_step):
            window = [rows[index] for index in order[start : start + samples_per_step]]
            mean_loss = 0.0
            for row in window:
                cut = {"truncation": "only_second", "max_length": 64, "return_tensors": "pt"}
                inputs = tokenizer(row["query"], row["content"], **cut)
                target = torch.tensor([[row["label"] / 4]])
                loss = binary_cross_entropy_with_logits(model(**inputs).logits, target) / len(window)
                loss.backward()
                mean_loss += loss.item()
            step = len(losses) + 1
            done = max(0, step - 1 - warmup) / max(1, total - warmup)
            for group in optimizer.param_groups:
                group["lr"] = peak * (step / warmup if step <= warmup else 0.5 + 0.5 * math.cos(math.pi * done))
            gradients.append({f"model.{name}": weight.grad.clone() for name, weight in named.items()})
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            losses.append(mean_loss)
            optimizer.step()
            optimizer.zero_grad()
    return gradients, norms, losses, model.state_dict()


def update_errors(weights, reference, base):
    """‖difference‖ / ‖update‖ of each tensor, but for the attention keys' biases."""
    return {
        name: ((weights[name] - reference[name]).norm() / (reference[name] - base[name]).norm()).item()
        for name in reference
        if KEY_BIAS not in name
    }


def check_against_plain_loop(module, model_folder, plain_steps, tmp_path, write_jsonl, monkeypatch):
    """Train with `module`, then assert that each gradient, norm, loss and weight is the plain loop's."""
    expected, norms, losses, weights = plain_steps
    gradients, original = [], accelerate.Accelerator.clip_grad_norm_

    def recording(accelerator, parameters, max_norm):
        recorded.append(True)
        gradients.append({name: weight.grad.clone() for name, weight in models[0].named_parameters()})
        return original(accelerator, parameters, max_norm)

    recorded, models, prepare = [], [], accelerate.Accelerator.prepare
    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", recording)
    monkeypatch.setattr(
        accelerate.Accelerator, "prepare", lambda self, *args: models.append(args[0]) or prepare(self, *args)
    )
    output_dir = tmp_path / "out"
    module.train({
        "model_name_or_path": model_folder, "train_dataset": write_jsonl("rows.jsonl", graded_rows(21)),
        "eval_dataset": None, "output_dir": str(output_dir), "max_label": 4, "epochs": 2, "lr": 1e-3, "batch_size": 2,
        "gradient_accumulation_steps": 4, "max_len": 64, "mixed_precision": "no", "seed": 7,
    })  # fmt: skip
    assert len(gradients) == len(expected) == 2 * 3
    for step, (ours, theirs) in enumerate(zip(gradients, expected, strict=True), start=1):
        difference = math.sqrt(sum((ours[name] - theirs[name]).square().sum().item() for name in theirs))
        size = math.sqrt(sum(theirs[name].square().sum().item() for name in theirs))
        assert difference < 1e-4 * size, f"gradient of step {step}: {difference / size:.1e} off"
    scalars = scalars_of(output_dir)
    assert [value for _, value in scalars["train/grad_norm"]] == pytest.approx(norms, rel=1e-4)
    assert [value for _, value in scalars["train/loss"]] == pytest.approx(losses, rel=1e-4)
    base = load_file(f"{model_folder}/model.safetensors")
    errors = update_errors(load_file(output_dir / "final_model" / "model.safetensors"), weights, base)
    assert max(errors.values()) < 1e-3, max(errors.items(), key=lambda item: item[1])


def test_each_step_is_that_of_a_plain_loop(without_dropout, plain_steps, tmp_path, write_jsonl, monkeypatch):
    check_against_plain_loop(train_bert_rerank, without_dropout, plain_steps, tmp_path, write_jsonl, monkeypatch)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('loss = output["loss"] * weight', 'loss = output["loss"] * weight * 8'),
        ('loss = output["loss"] * weight', 'loss = output["loss"] * weight / 8'),
        ("0.0 if is_idle else len(rows) / window_size", "0.0 if is_idle else len(rows) / 8"),
    ],
    ids=["loss x 8", "loss / 8", "last window divided by the full size"],
)
def test_a_wrong_divisor_would_be_seen(right, wrong, without_dropout, plain_steps, tmp_path, write_jsonl, monkeypatch):
    assert SCRIPT.count(right) == 1
    (tmp_path / "broken.py").write_text(SCRIPT.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("broken", tmp_path / "broken.py")
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    with pytest.raises(AssertionError, match="gradient of step"):
        check_against_plain_loop(broken, without_dropout, plain_steps, tmp_path, write_jsonl, monkeypatch)


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (15, 1), (16, 1), (17, 2), (198, 13)])
def test_steps_an_epoch_are_rows_over_samples_per_step_rounded_up(
    rows, steps, small_model, tmp_path, write_jsonl, capfd
):
    train_bert_rerank.train({
        "model_name_or_path": small_model, "train_dataset": write_jsonl("rows.jsonl", rows_of(rows)),
        "eval_dataset": None, "output_dir": str(tmp_path / "out"), "epochs": 2, "mixed_precision": "no", "lr": 1e-3,
    })  # fmt: skip
    scalars = scalars_of(tmp_path / "out")
    for tag in ("train/loss", "train/lr", "train/grad_norm"):
        assert [step for step, _ in scalars[tag]] == list(range(1, 2 * steps + 1))
    warmup = math.ceil(0.1 * 2 * steps)
    rates = [value for _, value in scalars["train/lr"]]
    assert rates[:warmup] == pytest.approx([1e-3 * (step + 1) / warmup for step in range(warmup)])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) == pytest.approx(1e-3) and min(rates) > 0
    bar = re.findall(r"Training: +(\d+)%\|.*?\| (\d+)/(\d+) ", capfd.readouterr().err)[-1]
    assert bar == ("100", str(2 * steps), str(2 * steps))


def test_the_learning_rate_warms_up_from_the_first_step_and_reaches_zero_after_the_last():
    rates = [train_bert_rerank.learning_rate(step, 50, 1.0, 0.1) for step in range(1, 52)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * index / 45) for index in range(46)])
    assert rates[49] > 0 and rates[50] == pytest.approx(0, abs=1e-12)
    assert train_bert_rerank.learning_rate(1, 1, 1.0, 0.1) == 1.0  # a run of one step learns
    assert train_bert_rerank.learning_rate(1, 10, 1.0, 0.0) == 1.0
    assert train_bert_rerank.learning_rate(10, 10, 1.0, 1.0) == 1.0


def test_a_run_prints_its_stages_in_order_and_a_second_one_replaces_the_first(
    run_main, small_model, write_jsonl, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_jsonl("my_train.jsonl", rows_of(20))
    write_jsonl("my_eval.jsonl", rows_of(21, 7))
    command = ["--model_name_or_path", small_model, "--train_dataset", "my_train.jsonl", "--output_dir", "out",
               "--epochs", 2, "--mixed_precision", "no"]  # fmt: skip
    status, said = run_main(*command)
    assert status == 0, said
    stages = [
        "Training Args: {", "Loading data: ", "----- Label Distribution -----", "Label 0.00: 10 (50.00%)",
        "Label 1.00: 10 (50.00%)", "Evaluating on 7 queries (21 rows) of my_eval.jsonl", "0.1 M parameters",
        "Start training for 2 epochs ...", "Training: 100%", "Training finished! Saving model ...",
        "Model saved successfully!", "ndcg@10  ", "best_f1  ", "Verdict: too few queries to tell. 7 queries (",
    ]  # fmt: skip
    places = [said.index(stage) for stage in stages]
    assert places == sorted(places)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"cache", "final_model", "loss_curve.png", "logs", "run.json", "eval_report.json",
                       "predictions.jsonl", "score_distribution.png", "rows_to_check.jsonl"}  # fmt: skip
    assert (tmp_path / "out" / "loss_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    run = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert run["args"]["epochs"] == 2 and run["args"]["lr"] == 1e-5
    assert set(run["data_sha256"]) == {"my_train.jsonl", "my_eval.jsonl"}
    assert run["seconds"]["training"] > 0 and run["peak_memory_bytes"] > 1e8 and run["versions"]["torch"]

    (tmp_path / "out" / "final_model" / "stale").touch()
    status, said = run_main(*command, "--epochs", 1)
    assert status == 0, said
    assert "final_model, of an earlier run, is replaced." in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    assert not (tmp_path / "out" / "final_model" / "stale").exists()
    assert [step for step, _ in scalars_of(tmp_path / "out")["train/loss"]] == [1, 2]


def test_a_run_that_fails_leaves_the_earlier_results_alone(small_run, tmp_path, monkeypatch):
    args = {**small_run, "log_with": "tensorboard"}
    train_bert_rerank.train(args)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def fail(*_):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(train_bert_rerank, "draw_loss_curve", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        train_bert_rerank.train(args)
    assert {path: path.read_bytes() for path in before} == before


def test_a_model_without_evaluation_claims_nothing(small_run, capsys):
    run = train_bert_rerank.train(small_run)
    assert run["report"] is None
    out = capsys.readouterr().out
    assert "No evaluation" in out and "ndcg" not in out.lower().partition("start training")[2]


def test_max_grad_norm_clips_and_zero_never_does(small_run, without_dropout, monkeypatch):
    norms, original = [], accelerate.Accelerator.clip_grad_norm_

    def recording(accelerator, parameters, max_norm):
        parameters = list(parameters)
        before = original(accelerator, parameters, max_norm)
        norms.append((before.item(), math.sqrt(sum(weight.grad.square().sum().item() for weight in parameters))))
        return before

    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", recording)
    args = {**small_run, "model_name_or_path": without_dropout, "lr": 0.0}
    for max_grad_norm in (1e-3, 0.0):
        train_bert_rerank.train({**args, "max_grad_norm": max_grad_norm})
    (raw, clipped), (raw_again, untouched) = norms
    assert raw == raw_again == pytest.approx(untouched, rel=1e-5) and clipped == pytest.approx(1e-3, rel=1e-3)


def test_weight_decay_spares_biases_and_layer_norm(small_run, without_dropout, tmp_path):
    args = {**small_run, "model_name_or_path": without_dropout, "lr": 1e-3}
    weights = []
    for weight_decay in (0.0, 0.5):
        train_bert_rerank.train({**args, "weight_decay": weight_decay})
        weights.append(load_file(tmp_path / "out" / "final_model" / "model.safetensors"))
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert changed == {name for name in weights[0] if not name.endswith("bias") and "LayerNorm" not in name}


@pytest.fixture
def small_run(small_model, write_jsonl, tmp_path):
    """Settings of a run of one step, into a folder `out`."""
    return {"model_name_or_path": small_model, "train_dataset": write_jsonl("rows.jsonl", rows_of(4)),
            "eval_dataset": None, "output_dir": str(tmp_path / "out"), "epochs": 1, "mixed_precision": "no",
            "log_with": None}  # fmt: skip


@pytest.mark.parametrize("kept", ["final_model/mine.txt", "logs/mine.txt"])
def test_what_no_finished_run_left_in_output_dir_is_not_deleted(kept, small_run, tmp_path):
    file = tmp_path / "out" / kept
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match="take another output_dir"):
        train_bert_rerank.train(small_run)
    assert file.read_text() == "mine"


def test_an_output_dir_that_is_a_file_is_refused(small_run, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="is no folder that this run may write to"):
        train_bert_rerank.train(small_run)


def test_a_link_in_output_dir_is_replaced_and_what_it_points_to_stays(small_run, tmp_path):
    train_bert_rerank.train(small_run)
    (tmp_path / "out" / "final_model").rename(tmp_path / "elsewhere")
    (tmp_path / "out" / "final_model").symlink_to(tmp_path / "elsewhere")
    train_bert_rerank.train(small_run)
    assert not (tmp_path / "out" / "final_model").is_symlink()
    assert (tmp_path / "out" / "final_model" / "model.safetensors").is_file()
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()


def test_a_run_that_diverges_stops_and_replaces_nothing(small_run, tmp_path):
    train_bert_rerank.train(small_run)
    before = (tmp_path / "out" / "final_model" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="three steps in a row were not applied: start over"):
        train_bert_rerank.train({**small_run, "lr": 1e30, "warmup_proportion": 0.0, "epochs": 4})
    assert (tmp_path / "out" / "final_model" / "model.safetensors").read_bytes() == before


def test_the_wrapped_model_goes_before_the_process_group(small_run, monkeypatch):
    # DDP that outlives its group joins gloo's threads with the GIL held, for which they may wait: a hang now and then.
    left, end = [], train_bert_rerank.Accelerator.end_training
    monkeypatch.setattr(train_bert_rerank.Accelerator, "end_training",
                        lambda self: (left.append(len(self._models)), end(self)))  # fmt: skip
    train_bert_rerank.train(small_run)
    assert left == [0]


def test_after_an_interrupted_run_another_can_start_in_the_same_process(small_run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train_bert_rerank, "learning_rate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_bert_rerank.train(small_run)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert train_bert_rerank.train({**small_run, "mixed_precision": "bf16"})["precision"] == "bf16"


def test_an_evaluation_with_nothing_to_measure_says_so(small_run, write_jsonl, tmp_path, capsys):
    rows = [{**row, "label": 1} for row in rows_of(3)]
    with pytest.raises(UserError, match="no eval rows with labels to measure ndcg@10 or average_precision"):
        train_bert_rerank.train({**small_run, "eval_dataset": write_jsonl("eval.jsonl", rows)})
    small_run = {**small_run, "train_dataset": write_jsonl("train.jsonl", rows), "eval_dataset": "auto"}
    run = train_bert_rerank.train(small_run)
    assert "no evaluation, and nothing will be claimed about the ranking" in capsys.readouterr().out
    assert run["report"] is None and not (tmp_path / "out" / "eval_report.json").exists()


def test_an_fp16_checkpoint_is_trained_in_fp32(small_run, tmp_path):
    shutil.copytree(TINY, tmp_path / "half")
    AutoModelForSequenceClassification.from_pretrained(TINY).half().save_pretrained(tmp_path / "half")
    assert {weight.dtype for weight in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    train_bert_rerank.train({**small_run, "model_name_or_path": str(tmp_path / "half"), "lr": 1e-6})
    weights = load_file(tmp_path / "out" / "final_model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    trained = weights["classifier.dense.weight"]  # a step of 1e-6 would be lost in fp16
    assert not torch.equal(trained, trained.half().float())


def test_a_plain_encoder_is_trained_with_a_new_head_and_the_run_says_so(small_run, tmp_path, capsys):
    shutil.copytree(TINY, tmp_path / "encoder")
    AutoModel.from_pretrained(TINY).save_pretrained(tmp_path / "encoder")
    train_bert_rerank.train({**small_run, "model_name_or_path": str(tmp_path / "encoder")})
    assert "so drawn with seed 42: classifier.dense.bias, classifier.dense.weight" in capsys.readouterr().out
    assert BertRerankerModel.from_pretrained(str(tmp_path / "out" / "final_model")).new_weights == []
