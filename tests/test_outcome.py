"""Whole runs: what is evaluated when, which weights are saved, what is written, and what is said of it."""

import io
import json
import math
import re
import shutil
from collections import UserList
from pathlib import Path
from textwrap import indent
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_equal_but_for_rounding, command_line, rows_of
from matplotlib.image import imread
from safetensors.numpy import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoTokenizer

import train_bert_rerank
from train_bert_rerank import METRICS, RANKING, BertRerankerModel, UserError, candidate_lists, measure, verdict_text


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """{"train", "eval", "inverted": paths}: the default data with 25 of its evaluation queries."""
    folder = tmp_path_factory.mktemp("data")
    train_rows, eval_rows = (read_jsonl(ROOT / f"default_{part}_data.jsonl") for part in ("train", "eval"))
    parts = {"train": train_rows, "eval": eval_rows[: 25 * 8],
             "inverted": [{**row, "label": 1 - row["label"]} for row in train_rows]}  # fmt: skip
    for name, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in parts}


def settings_of(data, output_dir, **changes):
    return {"model_name_or_path": TINY, "train_dataset": data["train"], "eval_dataset": data["eval"], "lr": 3e-4,
            "epochs": 3, "mixed_precision": "no", "output_dir": str(output_dir), **changes}  # fmt: skip


def ndcg_of(folder, data):
    """NDCG@10 of a saved model on the eval rows, by way of predict()."""
    rows = read_jsonl(data["eval"])
    pairs = [(row["query"], row["content"]) for row in rows]
    logits = BertRerankerModel.from_pretrained(folder).predict(pairs, activation_fn=torch.nn.Identity())
    labels = np.array([row["label"] for row in rows])
    lists = candidate_lists([row["query"] for row in rows], labels)
    return measure(lists, labels, logits.astype(float))[0]["ndcg@10"]


@pytest.fixture(scope="session")
def good_run(data, tmp_path_factory):
    """(folder, what train() returned) of a run that helps."""
    folder = tmp_path_factory.mktemp("good") / "out"
    return folder, train_bert_rerank.train(settings_of(data, folder, base_interpolation=(0.25, 0.5)))


def test_the_base_is_evaluated_before_the_first_step_and_then_each_epoch(good_run):
    folder, run = good_run
    report = json.loads((folder / "eval_report.json").read_text(encoding="utf-8"))
    assert report == run["report"]
    assert [(point["step"], point["epoch"]) for point in report["history"]] == [(0, 0), (13, 1), (26, 2), (39, 3)]
    assert {*report["history"][0]} == {"step", "epoch", *METRICS}
    assert {**report["history"][0], **report["before"]} == report["history"][0]
    assert report["queries"] == 25 and report["queries_left_out"] == 0 and report["metric"] == "ndcg@10"
    assert report["dataset"].endswith("eval.jsonl")


def test_eval_steps_evaluates_every_so_many_steps_and_after_the_last(data, tmp_path):
    run = train_bert_rerank.train(settings_of(data, tmp_path / "out", epochs=1, eval_steps=5, base_interpolation=[]))
    assert [point["step"] for point in run["report"]["history"]] == [0, 5, 10, 13]


def test_final_model_is_the_best_candidate_and_the_files_speak_of_it(good_run, data):
    folder, run = good_run
    report = run["report"]
    best = max(point["ndcg@10"] for point in report["history"][1:])
    assert report["after"] == report["fine_tuned"] and report["after"]["ndcg@10"] >= best > report["before"]["ndcg@10"]
    assert ndcg_of(folder / "final_model", data) == pytest.approx(report["after"]["ndcg@10"], abs=1e-6)
    rows, predictions = read_jsonl(data["eval"]), read_jsonl(folder / "predictions.jsonl")
    assert [{key: row[key] for key in ("query", "content", "label")} for row in predictions] == rows
    pairs = [(row["query"], row["content"]) for row in rows]
    for key, model in (("score_before", TINY), ("score_after", folder / "final_model")):
        expected = BertRerankerModel.from_pretrained(model).predict(pairs)
        assert [row[key] for row in predictions] == pytest.approx(expected.tolist(), abs=1e-5)
    labels, scores = np.array([row["label"] for row in rows]), np.array([row["score_after"] for row in predictions])
    found = (scores >= report["threshold"]) & (labels == 1)
    f1 = 2 * found.sum() / ((scores >= report["threshold"]).sum() + labels.sum())
    assert f1 == pytest.approx(report["after"]["best_f1"])
    for name in ("loss_curve.png", "score_distribution.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_log_holds_the_metrics_and_the_health_of_the_scores_at_each_evaluation(good_run):
    folder, run = good_run
    log = EventAccumulator(str(folder / "logs" / "train_bert_rerank"))
    log.Reload()
    for key in (*METRICS, "spread", "saturated", "relevant", "irrelevant"):
        events = log.Scalars(f"eval/{key}")
        assert [event.step for event in events] == [0, 13, 26, 39]
        if key in METRICS:
            values = [point[key] for point in run["report"]["history"]]
            assert [event.value for event in events] == pytest.approx(values, abs=1e-6)
            assert log.Scalars(f"eval/after/{key}")[0].value == pytest.approx(run["report"]["after"][key], abs=1e-6)
    assert log.Scalars("eval/delta")[0].value == pytest.approx(run["report"]["delta"]["mean"], abs=1e-6)


def test_the_log_holds_the_settings_the_verdict_and_the_pictures(good_run, capsys):
    folder, run = good_run
    log = EventAccumulator(str(folder / "logs" / "train_bert_rerank")).Reload()
    texts = {tag: log.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0] for tag in ("args", "verdict")}
    texts = {tag: text.decode() for tag, text in texts.items()}
    assert {"    lr: 0.0003", "    epochs: 3", "    base_interpolation: (0.25, 0.5)"} <= {*texts["args"].splitlines()}
    assert texts["verdict"] == indent(verdict_text(run["report"], run["args"]), "    ")
    for name in ("loss_curve", "score_distribution"):
        [image] = log.Images(name)
        logged, saved = imread(io.BytesIO(image.encoded_image_string)), imread(folder / f"{name}.png")[..., :3]
        assert logged.shape == saved.shape and np.abs(logged - saved).max() < 1.1 / 255 and np.ptp(logged) > 0.9


def test_a_mixture_with_the_base_is_the_mean_of_the_weights(data, tmp_path):
    # The lists are those of a base that ranks well and of training that spoils it: the most mixed candidate is best.
    settings = settings_of(data, tmp_path / "out", train_dataset=data["inverted"], epochs=1)
    last = train_bert_rerank.train({**settings, "load_best_model_at_end": False})
    fine_tuned = load_file(tmp_path / "out" / "final_model" / "model.safetensors")
    run = train_bert_rerank.train({**settings, "base_interpolation": [0.4, 0.9]})
    assert run["report"]["history"] == last["report"]["history"]
    assert run["report"]["fine_tuned"]["ndcg@10"] > last["report"]["after"]["ndcg@10"]
    folder = "fine_tuned_model" if run["report"]["chosen"] == "base" else "final_model"
    mixed, base = load_file(tmp_path / "out" / folder / "model.safetensors"), load_file(f"{TINY}/model.safetensors")
    for name, weight in mixed.items():
        np.testing.assert_allclose(weight, 0.1 * fine_tuned[name] + 0.9 * base[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [{"train_dataset": "inverted", "epochs": 3}, {"lr": 1e-1, "epochs": 1}])
def test_training_that_spoils_the_ranking_is_never_called_better_and_leaves_the_base_in_final_model(
    data, tmp_path, capsys, changes
):
    changes = {**changes, "train_dataset": data[changes.get("train_dataset", "train")]}
    run = train_bert_rerank.train(settings_of(data, tmp_path / "out", **changes, base_interpolation=[]))
    report, out = run["report"], capsys.readouterr().out
    assert report["verdict"] == "worse" and report["chosen"] == "base" and report["after"] == report["before"]
    assert report["fine_tuned"]["ndcg@10"] < report["before"]["ndcg@10"]
    folder, base = tmp_path / "out", load_file(f"{TINY}/model.safetensors")
    final = load_file(folder / "final_model" / "model.safetensors")
    assert all(np.array_equal(final[name], base[name]) for name in base)
    assert ndcg_of(folder / "fine_tuned_model", data) == pytest.approx(report["fine_tuned"]["ndcg@10"], abs=1e-6)
    assert "!!! FINE-TUNING DID NOT HELP !!!" in out and "!!! WARNING !!! Step 13" in out
    assert out.splitlines()[-2].startswith("Verdict: WORSE. NDCG@10 ")
    predictions = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    assert all(row["score_before"] == row["score_after"] for row in predictions)


def test_load_best_model_at_end_false_keeps_the_last_weights_and_only_reports(data, tmp_path):
    settings = settings_of(data, tmp_path / "out", train_dataset=data["inverted"], epochs=1)
    run = train_bert_rerank.train({**settings, "load_best_model_at_end": False})
    report = run["report"]
    assert report["verdict"] == "worse" and report["chosen"] == {"step": 13, "base_interpolation": 0.0}
    assert not (tmp_path / "out" / "fine_tuned_model").exists()
    assert ndcg_of(tmp_path / "out" / "final_model", data) == pytest.approx(report["history"][-1]["ndcg@10"], abs=1e-6)


def test_early_stopping_ends_the_run_after_that_many_evaluations_without_a_better_one(data, tmp_path, run_main):
    settings = settings_of(data, tmp_path / "out", epochs=9, lr=1e-3, base_interpolation=[], log_with=None)
    status, said = run_main(*command_line({**settings, "early_stopping_patience": 2}))
    assert status == 0, said
    report = json.loads((tmp_path / "out" / "eval_report.json").read_text(encoding="utf-8"))
    values = [point["ndcg@10"] for point in report["history"][1:]]
    assert len(values) < 9 and np.argmax(values) == len(values) - 3
    assert f"No better evaluation since step {13 * (len(values) - 2)}: stopping early." in said
    assert re.search(rf"Training: 100%\S*\| {13 * len(values)}/{13 * len(values)} ", said)


def test_one_row_a_query_is_compared_by_average_precision_from_end_to_end(write_jsonl, tmp_path, capsys):
    rows = read_jsonl(ROOT / "default_eval_data.jsonl")
    singles = [rows[8 * query + (query % 2) * 5] for query in range(160)]
    singles = [{**row, "query": f"{row['query']}{index}"} for index, row in enumerate(singles)]
    assert 20 < sum(row["label"] for row in singles) < 140
    data = {"train": str(ROOT / "default_train_data.jsonl"), "eval": write_jsonl("eval.jsonl", singles)}
    run = train_bert_rerank.train(settings_of(data, tmp_path / "out"))
    report = run["report"]
    assert report["metric"] == "average_precision" and report["queries"] == 160
    assert all(report["before"][key] is None for key in RANKING)
    assert report["after"]["average_precision"] > report["before"]["average_precision"]
    assert report["verdict"] in ("better", "unclear") and report["delta"]["ci95"][0] < report["delta"]["mean"]
    assert "AVERAGE_PRECISION" in capsys.readouterr().out.splitlines()[-2]


def test_a_run_after_one_that_failed_to_help_removes_what_it_does_not_write_itself(good_run, data, tmp_path, capsys):
    shutil.copytree(good_run[0], tmp_path / "out")
    shutil.copytree(tmp_path / "out" / "final_model", tmp_path / "out" / "fine_tuned_model")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    train_bert_rerank.train(settings_of(data, tmp_path / "out", epochs=1, eval_dataset=None))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cache", "final_model", "logs", "loss_curve.png",
                                                                   "run.json", "rows_to_check.jsonl", "notes.txt"}
    assert "fine_tuned_model, of an earlier run, is removed." in capsys.readouterr().out


def test_weights_that_are_not_finite_are_out(data, tmp_path, capsys):
    settings = settings_of(data, tmp_path / "out", epochs=1, lr=1e30, gradient_accumulation_steps=99)  # one step
    with pytest.raises(UserError, match="training left no finite weights: lower lr 1e\\+30"):
        train_bert_rerank.train(settings)
    assert "weights or scores are not finite" in capsys.readouterr().out
    assert not (tmp_path / "out" / "final_model").exists()


def test_a_new_head_is_not_mixed_with_the_base(data, tmp_path, capsys):
    shutil.copytree(TINY, tmp_path / "plain")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "classifier" not in name},
              tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    settings = settings_of(data, tmp_path / "out", epochs=1, base_interpolation=[0.5])
    train_bert_rerank.train({**settings, "model_name_or_path": str(tmp_path / "plain")})
    out = capsys.readouterr().out
    assert "Not in" in out and "mixed with" not in out
    assert f"!!! WARNING !!! {tmp_path / 'plain'}" not in out  # scores nearly alike are normal for a new head


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_offset_of_the_logits_is_taken_out_before_the_first_step_and_stays_in_the_base(
    data, tmp_path, run_main, run_script, processes
):
    shutil.copytree(TINY, tmp_path / "offset")
    weights = load_file(tmp_path / "offset" / "model.safetensors")
    weights["classifier.out_proj.bias"] = weights["classifier.out_proj.bias"] + np.float32(8)
    save_file(weights, tmp_path / "offset" / "model.safetensors", metadata={"format": "pt"})
    settings = settings_of(data, tmp_path / "out", train_dataset=data["inverted"], epochs=1)
    settings |= {"model_name_or_path": tmp_path / "offset", "base_interpolation": []}
    if processes == 1:
        status, said = run_main(*command_line(settings))
    else:
        done = run_script(*command_line(settings), processes=processes)
        status, said = done.returncode, done.stdout
    assert status == 0, said
    assert "The logits stand +7.7 off the labels: the head's bias is shifted by as much before training." in said
    log = EventAccumulator(str(tmp_path / "out" / "logs" / "train_bert_rerank"))
    log.Reload()
    assert log.Scalars("train/loss")[0].value < 1.2  # 4 without the shift
    final = load_file(tmp_path / "out" / "final_model" / "model.safetensors")  # the base, since labels are inverted
    assert all(np.array_equal(final[name], weights[name]) for name in weights)


@pytest.mark.parametrize("offset", [40, -150])
def test_an_offset_of_any_size_is_taken_out_and_mixtures_do_not_bring_it_back(data, tmp_path, capsys, offset):
    model = BertRerankerModel.from_pretrained(TINY)
    model.model.classifier.out_proj.bias.data += offset
    model.save_pretrained(tmp_path / "offset")
    settings = settings_of(data, tmp_path / "out", epochs=1, model_name_or_path=str(tmp_path / "offset"))
    train_bert_rerank.train(settings)
    out = capsys.readouterr().out
    assert float(re.search(r"The logits stand (\S+) off", out)[1]) == pytest.approx(offset, abs=1)
    mixtures = re.findall(r"mixed with \d+% of the base: .* saturated (\S+), relevant (\S+), irrelevant ([\d.]+)", out)
    assert len(mixtures) == 3 and all(float(share) == 0 for share, *_ in mixtures)
    assert all(0.1 < float(mean) < 0.9 for _, *means in mixtures for mean in means)


def test_a_head_without_a_bias_and_logits_that_are_not_finite_are_left_as_they_are(capsys):
    model = BertRerankerModel.from_pretrained(TINY)
    dataset = UserList(model.encode([("S35", "充电座")] * 9, 64))  # a list that can have labels
    dataset.labels = torch.zeros(9)

    def shifted():
        """The names of what fit_bias() shifts; it needs this of a Run."""
        run = SimpleNamespace(
            args={"seed": 42}, accelerator=train_bert_rerank.Accelerator(cpu=True), model=model, train_data=dataset,
            record={"micro_batch_tokens": 640, "micro_batch_cost": 16}, stop=train_bert_rerank.StopRequest(),
            unshifted_bias={},
        )  # fmt: skip
        train_bert_rerank.fit_bias(run)
        return list(run.unshifted_bias)

    assert shifted() == ["model.classifier.out_proj.bias"]
    model.model.classifier.out_proj.bias.data.fill_(torch.nan)
    assert shifted() == []
    model.model.classifier.out_proj.bias = None
    assert shifted() == []
    assert capsys.readouterr().out.count("The logits stand") == 1


@pytest.mark.parametrize("irrelevant", [3, 7])
def test_a_relevant_row_at_the_head_of_each_list_is_no_reason_to_shift_the_head(
    write_jsonl, tmp_path, capsys, irrelevant
):
    """Every fourth or eighth row would be a relevant one."""
    data = []
    for query in range(2048 // (1 + irrelevant)):
        for number in range(1 + irrelevant):
            content = f"型号{query}的说明" if number == 0 else f"型号{query + 500 * number}的说明书"
            data.append({"query": f"型号{query}", "content": content, "label": int(number == 0)})
    settings = {"model_name_or_path": str(TINY), "train_dataset": write_jsonl("train.jsonl", data), "epochs": 1,
                "eval_dataset": None, "lr": 0.0, "max_len": 32, "mixed_precision": "no", "log_with": None,
                "output_dir": str(tmp_path / "out")}  # fmt: skip
    train_bert_rerank.train(settings)
    shift = re.search(r"The logits stand (\S+) off", capsys.readouterr().out)
    assert not shift or abs(float(shift[1])) < 3


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of tiny_reranker's encoder, without its head."""
    folder = tmp_path_factory.mktemp("encoder")
    AutoModel.from_pretrained(TINY).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("relevant, rows", [(20, 40), (5, 30), (1, 60), (0, 30)], ids=str)
def test_a_new_head_starts_at_the_log_odds_of_the_labels_whatever_they_are(
    encoder, write_jsonl, tmp_path, capsys, relevant, rows
):
    data = [{**row, "label": int(index < relevant)} for index, row in enumerate(rows_of(rows))]
    settings = {"model_name_or_path": encoder, "train_dataset": write_jsonl("train.jsonl", data), "epochs": 1,
                "eval_dataset": None, "lr": 0.0, "max_len": 32, "mixed_precision": "no", "log_with": None,
                "output_dir": str(tmp_path / "out")}  # fmt: skip
    train_bert_rerank.train(settings)
    bias = load_file(tmp_path / "out" / "final_model" / "model.safetensors")["classifier.out_proj.bias"].item()
    share = max(relevant, 0.5) / rows  # none at all counts as half a row
    assert bias == pytest.approx(math.log(share / (1 - share)), abs=1e-5)
    assert f"The new head starts at the log-odds of the labels, {bias:+.1f}." in capsys.readouterr().out


def test_a_run_whose_loss_is_that_of_a_constant_answer_after_a_third_of_its_steps_says_so(
    data, encoder, tmp_path, capsys
):
    settings = settings_of(data, tmp_path / "out", model_name_or_path=encoder, epochs=3)
    warning = r"after 13 of 39 steps the loss, (\S+), is not clearly below that of a constant answer, (\S+): nothing"
    train_bert_rerank.train({**settings, "lr": 1e-7})
    [losses] = re.findall(warning, capsys.readouterr().out)
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=0.03)


@pytest.mark.slow
def test_soft_labels_that_leave_little_to_gain_are_no_sign_that_nothing_is_learnt(data, write_jsonl, tmp_path, capsys):
    rows = [{**row, "label": 0.5 + 0.15 * (2 * row["label"] - 1)} for row in read_jsonl(data["train"])]
    settings = settings_of(data, tmp_path / "out", train_dataset=write_jsonl("soft.jsonl", rows), epochs=10, lr=5e-4)
    train_bert_rerank.train({**settings, "eval_dataset": None})  # 0.693 for a constant, 0.647 for the best of models
    assert "constant answer" not in capsys.readouterr().out


def test_a_stop_at_a_third_of_the_steps_does_not_swallow_that_nothing_is_learnt(
    data, encoder, tmp_path, capsys, monkeypatch
):
    original = train_bert_rerank.train_step
    monkeypatch.setattr(train_bert_rerank, "train_step",
                        lambda run, window: original(run, window) or run.progress.step == 13)  # fmt: skip
    settings = settings_of(data, tmp_path / "out", model_name_or_path=encoder, epochs=3, lr=1e-7)
    with pytest.raises(UserError, match="Stopped by SIGTERM after step 13 of 39"):
        train_bert_rerank.train(settings)
    assert "after 13 of 39 steps the loss" in capsys.readouterr().out


def test_a_run_that_learns_or_is_too_short_to_tell_is_not_said_to_learn_nothing(data, write_jsonl, tmp_path, capsys):
    train_bert_rerank.train(settings_of(data, tmp_path / "out", epochs=3))
    short = write_jsonl("short.jsonl", rows_of(90))
    train_bert_rerank.train(settings_of(data, tmp_path / "short", train_dataset=short, epochs=3, lr=0.0))
    alike = write_jsonl("alike.jsonl", [{**row, "label": 1} for row in rows_of(400)])
    train_bert_rerank.train(settings_of(data, tmp_path / "alike", train_dataset=alike, epochs=1, lr=0.0))
    assert "constant answer" not in capsys.readouterr().out


def test_rows_that_training_never_came_to_are_no_rows_to_check(data, tmp_path):
    settings = settings_of(data, tmp_path / "out", train_dataset=data["inverted"], lr=1e-2, epochs=1, eval_steps=1)
    report = train_bert_rerank.train({**settings, "early_stopping_patience": 1, "base_interpolation": []})["report"]
    seen = 16 * report["history"][-1]["step"]
    assert seen < 99  # of 198
    rows = (tmp_path / "out" / "rows_to_check.jsonl").read_text(encoding="utf-8").splitlines()
    assert 0 < len(rows) <= seen and all(json.loads(row)["mean_probability"] > 0 for row in rows)


def test_under_20_queries_a_worse_model_is_kept_and_the_run_says_so_loudly(data, write_jsonl, tmp_path, capsys):
    rows = read_jsonl(data["eval"])[: 15 * 8] + [{"query": "只有一行", "content": "一行", "label": 1}]
    settings = settings_of(data, tmp_path / "out", train_dataset=data["inverted"], base_interpolation=[])
    train_bert_rerank.train({**settings, "eval_dataset": write_jsonl("few.jsonl", rows)})
    before, _, after = capsys.readouterr().out.partition("Start training")
    assert "Warning: 15 eval queries are too few: a verdict takes 20." in before
    *_, kept, warning, verdict, _ = after.splitlines()
    assert re.fullmatch(r"final_model: step \d+, with 0% of the base mixed in\.", kept)
    assert warning == "!!! WARNING !!! final_model ranks these queries worse than the base."
    assert re.fullmatch(r"Verdict: too few queries to tell\. 15 queries \(\d+ up, \d+ down, 1 left out\)\.", verdict)


def test_under_20_relevant_rows_of_24_queries_the_run_says_so_before_and_after_and_not_that_queries_are_too_few(
    data, write_jsonl, tmp_path, capsys
):
    rows = [{**row, "query": f"{row['query']}{index}"} for index, row in enumerate(read_jsonl(data["eval"])[:24])]
    relevant = sum(row["label"] for row in rows)
    settings = settings_of(data, tmp_path / "out", epochs=1, eval_dataset=write_jsonl("few.jsonl", rows))
    report = train_bert_rerank.train({**settings, "base_interpolation": []})["report"]
    before, _, after = capsys.readouterr().out.partition("Start training")
    assert "Warning: none of the 24 eval queries can be ranked, for each of them has one row: " in before
    assert f"Warning: {relevant} eval relevant rows are too few: a verdict takes 20.\n" in before
    assert "eval queries are too few" not in before and "too few queries" not in after
    assert f"Verdict: too few relevant rows to tell. 24 queries, {relevant} relevant rows.\n" in after
    assert f"takes 20 or more relevant rows ({relevant} here)" in after.splitlines()[-1]
    assert json.loads((tmp_path / "out" / "eval_report.json").read_text("utf-8"))["too_few"] == report["too_few"]
    assert (report["verdict"], report["too_few"]) == ("too few", {"relevant rows": relevant})


def test_hit_at_1_can_be_what_weights_are_compared_and_judged_by(data, tmp_path, run_main):
    status, said = run_main(*command_line(settings_of(data, tmp_path / "out", metric_for_best_model="hit@1")))
    report = json.loads((tmp_path / "out" / "eval_report.json").read_text("utf-8"))
    assert status == 0 and report["metric"] == "hit@1" and report["verdict"] in said
    best = max(point["hit@1"] for point in report["history"][1:])
    assert report["fine_tuned"]["hit@1"] >= best
    assert f"Step 13, epoch 1: hit@1 {report['history'][1]['hit@1']:.4f}" in said


def test_what_a_terminal_cannot_show_does_not_end_a_run(data, run_script):
    done = run_script("--model_name_or_path", TINY, "--epochs", 0, "--eval_dataset", data["eval"], "--mixed_precision",
                      "no", "--output_dir", "输出", PYTHONIOENCODING="ascii")  # fmt: skip
    assert done.returncode == 0 and "ndcg@10  " in done.stdout and "'output_dir': '??'" in done.stdout


def test_an_evaluation_alone_keeps_what_stands_in_its_folder_and_its_former_report_until_there_is_a_new_one(
    data, tmp_path
):
    folder = tmp_path / "out" / "evaluation"
    folder.mkdir(parents=True)
    shutil.copy(data["eval"], folder / "mine.jsonl")
    settings = settings_of(data, tmp_path / "out", epochs=0, eval_dataset=str(folder / "mine.jsonl"))
    train_bert_rerank.train(settings)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == {"mine.jsonl", "eval_report.json", "predictions.jsonl", "score_distribution.png"}
    model = BertRerankerModel.from_pretrained(TINY)
    model.model.classifier.out_proj.bias.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="gives no finite scores"):
        train_bert_rerank.train({**settings, "model_name_or_path": str(tmp_path / "broken")})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_epochs_0_evaluates_alone_and_writes_only_into_its_own_folder(
    good_run, data, tmp_path, run_main, run_script, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good_run[0], tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    command = ["--model_name_or_path", "out/final_model", "--epochs", 0, "--eval_dataset", data["eval"], "--output_dir",
               "out", "--mixed_precision", "no", "--train_dataset", "nowhere.jsonl"]  # fmt: skip
    reports = []
    for processes in (1, 2):
        if processes == 1:
            status, said = run_main(*command)
        else:
            done = run_script(*command, processes=processes)
            status, said = done.returncode, done.stdout
        assert status == 0, said
        assert f"processes: {processes}" in said and "Verdict" not in said
        reports.append(json.loads((tmp_path / "out" / "evaluation" / "eval_report.json").read_text(encoding="utf-8")))
        names = {path.name for path in (tmp_path / "out" / "evaluation").iterdir()}
        assert names == {"eval_report.json", "predictions.jsonl", "score_distribution.png"}
    assert_equal_but_for_rounding(*reports)
    assert reports[0]["queries"] == 25  # which two does not divide
    assert reports[0]["before"] == pytest.approx(good_run[1]["report"]["after"], abs=1e-9)
    assert reports[0]["chosen"] == "base" and reports[0]["after"] == reports[0]["fine_tuned"] == reports[0]["before"]
    after = {path: path.read_bytes() for path in before}
    assert after == before


def test_epochs_0_without_rows_to_evaluate_is_an_error(data, tmp_path):
    with pytest.raises(UserError, match="no eval rows with labels to measure ndcg@10 or average_precision by"):
        train_bert_rerank.train(settings_of(data, tmp_path / "out", epochs=0, eval_dataset=None))


def test_formats_of_a_saved_model_stay_unless_new_ones_are_given(small_model, write_jsonl, tmp_path):
    rows = write_jsonl("rows.jsonl", rows_of(4))
    base = {"model_name_or_path": small_model, "train_dataset": rows, "eval_dataset": None, "epochs": 1,
            "mixed_precision": "no", "output_dir": str(tmp_path / "a")}  # fmt: skip
    train_bert_rerank.train({**base, "query_format": "问：{}"})
    again = {**base, "model_name_or_path": str(tmp_path / "a" / "final_model"), "output_dir": str(tmp_path / "b")}
    train_bert_rerank.train({**again, "document_format": "文：{}"})
    config = json.loads((tmp_path / "b" / "final_model" / "config.json").read_text(encoding="utf-8"))
    assert config["query_format"] == "问：{}" and config["document_format"] == "文：{}"


def test_the_rows_to_check_are_those_whose_label_the_model_contradicts_worst_first(good_run, data):
    rows, listed = read_jsonl(data["train"]), read_jsonl(good_run[0] / "rows_to_check.jsonl")
    assert 0 < len(listed) < len(rows) / 2
    for row in listed:
        source = rows[row["line"] - 1]
        assert row["file"] == data["train"] and {key: row[key] for key in source} == source
        assert (row["mean_probability"] < 0.5) == (row["label"] == 1)
    doubts = [abs(row["label"] - row["mean_probability"]) for row in listed]
    assert doubts == sorted(doubts, reverse=True)


# ---- What was found by reading ---------------------------------------------------------------------------------------
def test_the_model_card_names_no_path_where_the_base_is_kept(data, tmp_path):
    base = tmp_path / "private folder" / "my_base"
    shutil.copytree(TINY, base)
    settings = settings_of(data, tmp_path / "out", train_dataset=data["inverted"], model_name_or_path=str(base))
    report = train_bert_rerank.train({**settings, "base_interpolation": []})["report"]
    card = (tmp_path / "out" / "final_model" / "README.md").read_text(encoding="utf-8")
    assert report["chosen"] == "base" and "final_model holds my_base with unchanged weights" in card
    assert "private" not in card and str(tmp_path) not in card and str(ROOT) not in card


def test_a_change_that_was_not_measured_is_not_logged(write_jsonl, tmp_path):
    settings = {"model_name_or_path": TINY, "train_dataset": write_jsonl("train.jsonl", rows_of(16)), "epochs": 1,
                "max_len": 32, "mixed_precision": "no"}  # fmt: skip
    for queries, is_logged in ((2, False), (8, True)):
        rows = [{"query": f"问{number}", "content": f"答{label}{number}" * 3, "label": label}
                for number in range(queries) for label in (0, 1)]  # fmt: skip
        folder = tmp_path / f"out_{queries}"
        evaluation = write_jsonl("eval.jsonl", rows)
        train_bert_rerank.train({**settings, "eval_dataset": evaluation, "output_dir": str(folder)})
        log = EventAccumulator(str(folder / "logs" / "train_bert_rerank"))
        log.Reload()
        assert ("eval/delta" in log.Tags()["scalars"]) == is_logged
