"""Best passages, a retriever's scores, mixtures and a calibrated model together, through all ways that a run can go."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_long_documents
from conftest import ROOT, TINY, command_line
from test_long_documents import SENTENCES, long_text
from test_recovery import train_until

from train_bert_rerank import BertRerankerModel, calibration_of, candidate_lists, train

sys.path.insert(0, str(ROOT / "tools"))
import calibrate as tool  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_pictures")
MAX_LEN = 48


def rows_of_lists(queries):
    """Lists of five with the retriever's scores; what tells stands beyond what fits, in some of the irrelevant too."""
    generator = np.random.default_rng(3)
    rows = []
    for number in range(queries):
        query = f"S{number + 10}充不进电"
        for place in range(5):
            ends = f"请擦净S{number + 10}的触点。" if place == 0 else f"S{number + 10 + place % 3}充电灯。"
            text = long_text(4 + int(generator.integers(8)), seed=5 * number + place) + ends
            if place == 4:
                text = SENTENCES[number % 5]
            score = float(generator.normal(place == 0))
            rows.append({"query": query, "content": text, "label": int(place == 0), "score": score})
    return rows


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(folder of a calibrated model with best passages, the Line that was folded in, path of its data)."""
    folder = tmp_path_factory.mktemp("together")
    data = folder / "eval.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of_lists(30)), encoding="utf-8")
    model = BertRerankerModel.from_pretrained(TINY)
    model.tokenizer.model_max_length = MAX_LEN
    model.model.config.update({"long_documents": "best_passage"})
    model.save_pretrained(folder / "model")
    options = {"folder": str(folder / "model"), "data": str(data), "output": str(folder / "calibrated"),
               "min_label": 0, "max_label": 1, "batch_size": 32}  # fmt: skip
    tool.calibrate(SimpleNamespace(**options))
    return folder / "calibrated", str(data)


@pytest.fixture
def settings(calibrated, tmp_path):
    folder, data = calibrated
    return {"model_name_or_path": str(folder), "train_dataset": str(ROOT / "default_train_data.jsonl"),
            "eval_dataset": data, "output_dir": str(tmp_path / "out"), "max_len": MAX_LEN, "epochs": 1, "lr": 1e-4,
            "mixed_precision": "no", "log_with": None}  # fmt: skip


def predictions(folder, key="score_after"):
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([json.loads(line)[key] for line in lines])


def test_epochs_0_measures_a_calibrated_model_by_its_best_passages_beside_and_with_the_retriever(settings, tmp_path):
    report = train({**settings, "epochs": 0})["report"]
    scores = predictions(tmp_path / "out" / "evaluation")
    rows = rows_of_lists(30)
    model = BertRerankerModel.from_pretrained(settings["model_name_or_path"])
    np.testing.assert_allclose(scores, model.predict([(row["query"], row["content"]) for row in rows]), atol=1e-6)
    labels = np.array([row["label"] for row in rows], dtype=float)
    lists = candidate_lists([row["query"] for row in rows], labels)["all"]
    expected = calibration_of(np.log(scores / (1 - scores)), labels, lists, 42)
    after = report["calibration"]["after"]
    assert (after["brier"], after["error"]) == pytest.approx((expected["brier"], expected["error"]), abs=1e-6)

    # The same model before it was calibrated orders alike, with the retriever's scores too, and knows less.
    plain = str(Path(settings["model_name_or_path"]).with_name("model"))
    before = train({**settings, "epochs": 0, "model_name_or_path": plain})["report"]
    assert before["after"] == pytest.approx(report["after"], abs=1e-9)
    assert before["mixed"]["metrics"] == pytest.approx(report["mixed"]["metrics"], abs=1e-9)
    assert before["mixed"]["weight"] == report["mixed"]["weight"]
    assert before["retriever"] == report["retriever"]
    assert before["calibration"]["after"]["error"] > after["error"] + 0.02
    assert before["calibration"]["after"]["brier"] > after["brier"] + 0.01
    for precision, threshold in before["thresholds"].items():
        if threshold:
            found = report["thresholds"][precision]
            assert (found["precision"], found["recall"]) == pytest.approx((threshold["precision"], threshold["recall"]))


def test_average_precision_as_the_metric_changes_nothing_of_calibration_and_thresholds(settings, tmp_path):
    reports = []
    for metric in ("ndcg@10", "average_precision"):
        reports.append(train({**settings, "epochs": 0, "metric_for_best_model": metric})["report"])
    for key in ("calibration", "thresholds", "after", "retriever", "mixed"):
        assert reports[0][key] == reports[1][key], key


def test_where_the_base_is_chosen_final_model_is_the_calibrated_one_with_its_way(settings, write_jsonl, tmp_path):
    rows = [json.loads(line) for line in (ROOT / "default_train_data.jsonl").read_text("utf-8").splitlines()]
    turned = write_jsonl("turned.jsonl", [{**row, "label": 1 - row["label"]} for row in rows])
    data = write_jsonl("eval.jsonl", test_long_documents.rows_of_lists())  # which the base ranks well
    settings = {**settings, "train_dataset": turned, "eval_dataset": data, "lr": 1e-3, "epochs": 2,
                "base_interpolation": ()}  # fmt: skip
    report = train(settings)["report"]
    assert report["chosen"] == "base" and report["calibration"]["after"] == report["calibration"]["before"]
    folder, base = tmp_path / "out" / "final_model", Path(settings["model_name_or_path"])
    assert (folder / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert BertRerankerModel.from_pretrained(folder).long_documents == "best_passage"
    card = (folder / "README.md").read_text("utf-8")
    assert "## Long documents" in card and "Probabilities of final_model: Brier score" in card
    after = predictions(tmp_path / "out")
    assert after.tolist() == predictions(tmp_path / "out", "score_before").tolist()


@pytest.mark.parametrize("metric", ["ndcg@10", "average_precision"])
def test_a_run_that_was_killed_and_goes_on_has_the_same_report_of_all_of_it(settings, tmp_path, metric):
    settings = {**settings, "epochs": 2, "metric_for_best_model": metric}
    whole = train({**settings, "output_dir": str(tmp_path / "whole")})["report"]
    train_until(15, settings)
    assert train({**settings, "resume_from_checkpoint": "latest"})["report"] == whole
    saved = ("config.json", "README.md", "model.safetensors")
    for name in ("predictions.jsonl", *(f"final_model/{name}" for name in saved)):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert whole["mixed"] and whole["retriever"] and whole["calibration"]["after"]["ci95"]


@pytest.mark.slow
def test_two_processes_evaluate_all_of_it_as_one_does(settings, run_script, tmp_path):
    reports = []
    for processes in (1, 2):
        out = tmp_path / f"by_{processes}"
        done = run_script(*command_line({**settings, "epochs": 0, "output_dir": out}), processes=processes)
        assert done.returncode == 0, done.stdout
        reports.append((out / "evaluation" / "eval_report.json").read_bytes())
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_what_two_processes_train_is_measured_and_saved_as_what_one_trains(settings, run_script, tmp_path):
    size = {"gradient_accumulation_steps": 4, "output_dir": tmp_path / "two"}
    done = run_script(*command_line({**settings, **size}), processes=2)
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "two" / "eval_report.json").read_text("utf-8"))
    again = {**settings, "epochs": 0, "model_name_or_path": str(tmp_path / "two" / "final_model")}
    alone = train(again)["report"]
    for key in ("after", "retriever", "thresholds"):
        assert alone[key] == pytest.approx(report[key], abs=1e-6), key
    for key in ("brier", "error", "high"):
        assert alone["calibration"]["after"][key] == pytest.approx(report["calibration"]["after"][key], abs=1e-6), key
