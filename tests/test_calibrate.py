"""tools/calibrate.py: a fit against SciPy's, folded weights against transformers', and what is refused."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from FlagEmbedding import FlagReranker
from scipy.optimize import minimize
from sentence_transformers import CrossEncoder
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(ROOT / "tools"))
import calibrate as tool  # noqa: E402

from train_bert_rerank import BertRerankerModel, UserError  # noqa: E402

EVAL_ROWS = [json.loads(line) for line in (ROOT / "default_eval_data.jsonl").read_text("utf-8").splitlines()]
ROWS = EVAL_ROWS[:240]  # 30 queries
PAIRS = [(row["query"], row["content"]) for row in ROWS]
LABELS = np.array([row["label"] for row in ROWS], dtype=float)
QUERIES = list(dict.fromkeys(query for query, _ in PAIRS))


@pytest.fixture
def calibrate(monkeypatch, capsys, tmp_path):
    """calibrate(argument, …) -> what is printed, without bars, of the tool in this process, in the test's folder."""

    def calibrate(*arguments):
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        capsys.readouterr()
        tool.main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    return calibrate


@pytest.fixture
def data(write_jsonl):
    """Path of the rows of 30 queries."""
    return write_jsonl("eval.jsonl", ROWS)


@pytest.fixture
def model(tmp_path):
    """Folder of a copy of tiny_reranker, to be changed."""
    shutil.copytree(TINY, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def logits(reranker):
    return logits_by(reranker)


def logits_by(reranker, pairs=PAIRS):
    return reranker.predict(pairs, show_progress_bar=False, activation_fn=torch.nn.Identity()).astype(float)


def transformers_logits(folder, pairs):
    """Logits of pairs as transformers computes them, one at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return np.array([model(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in pairs])


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder, change):
    """Let `change(head)` change the last layer of the model in a folder."""
    reranker = BertRerankerModel.from_pretrained(folder)
    with torch.no_grad():
        change(reranker.model.classifier.out_proj)
    reranker.save_pretrained(folder)


def line_in(printed):
    """Slope and offset as they are printed."""
    return [float(number) for number in re.search(r"slope (\S+), offset (\S+);", printed).groups()]


def platt_by_scipy(logits, labels):
    """Slope and offset by Platt's loss, written out, and SciPy's minimiser without gradients."""
    relevant, irrelevant = sum(labels), sum(1 - labels)
    targets = labels * (relevant + 1) / (relevant + 2) + (1 - labels) / (irrelevant + 2)

    def loss(line):
        calibrated = line[0] * logits + line[1]
        return np.sum(np.logaddexp(0, calibrated) - targets * calibrated)

    options = {"xatol": 1e-10, "fatol": 1e-12, "maxiter": 20_000, "maxfev": 20_000}
    return minimize(loss, [1.0, 0.0], method="Nelder-Mead", options=options).x


# ---- The fit ---------------------------------------------------------------------------------------------------------
GENERATOR = np.random.default_rng(0)
NOISE = GENERATOR.normal(size=300)
FITS = {
    "ordinary": (3 * NOISE, (NOISE + GENERATOR.logistic(size=300) > 1).astype(float)),
    "graded": (2 * NOISE - 4, np.clip(np.round(NOISE + 1), 0, 3) / 3),
    "told apart without error": (NOISE, (NOISE > 0).astype(float)),
    "far off, hardly different": (80 + 0.01 * NOISE, (NOISE + GENERATOR.logistic(size=300) > 0).astype(float)),
    "one relevant row": (NOISE, (NOISE == NOISE.max()).astype(float)),
}


@pytest.mark.parametrize("name", FITS)
def test_slope_and_offset_are_those_of_scipy_with_platts_targets(name):
    logits, labels = FITS[name]
    # Nelder and Mead's simplex needs logits of usual size.
    mean, deviation = logits.mean(), logits.std()
    slope, offset = platt_by_scipy((logits - mean) / deviation, labels)
    line = tool.fit(logits, labels)
    assert line.slope * deviation == pytest.approx(slope, rel=1e-5)
    assert line.of(mean) == pytest.approx(offset, abs=1e-5 * (1 + abs(offset)))
    assert tool.fit(logits, labels) == line, "the same every time"


def test_targets_are_smoothed_as_platt_has_them():
    """Of 2 relevant rows at 1 and 3 irrelevant ones at -1 the probabilities are 3/4 and 1/5."""
    line = tool.fit(np.array([1.0, 1, -1, -1, -1]), np.array([1.0, 1, 0, 0, 0]))
    assert 1 / (1 + np.exp(-line.of(np.array([1, -1])))) == pytest.approx([3 / 4, 1 / 5], abs=1e-6)


def test_what_is_measured_of_a_query_depends_on_no_label_of_it(logits):
    """Red where folds are of rows, or where they are fitted and measured on the same ones."""
    lists = [np.flatnonzero([query == one for query, _ in PAIRS]) for one in QUERIES]
    calibrated = tool.cross_fitted(logits, LABELS, lists)
    for rows in lists[::5]:
        turned = LABELS.copy()
        turned[rows] = 1 - turned[rows]
        again = tool.cross_fitted(logits, turned, lists)
        assert (again[rows] == calibrated[rows]).all()
        assert (again != calibrated).mean() > 0.7, "the four other folds are fitted on them"


def test_there_are_five_folds_of_as_many_queries(logits):
    lists = [np.flatnonzero([query == one for query, _ in PAIRS]) for one in QUERIES]
    calibrated = tool.cross_fitted(logits, LABELS, lists)
    lines = [np.polyfit(logits[rows], calibrated[rows], 1).round(6).tolist() for rows in lists]
    assert sorted(lines.count(line) for line in lines) == [6] * 30
    assert lines != sorted(lines) and len({tuple(line) for line in lines[:6]}) > 1, "drawn, not cut in order"


# ---- The folder that is written --------------------------------------------------------------------------------------
def test_by_command_transformers_cross_encoder_and_flag_reranker_give_the_calibrated_scores(tmp_path, data, logits):
    command = [sys.executable, str(ROOT / "tools" / "calibrate.py"), TINY, "--data", data, "--output", "calibrated"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8",
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibrated", "eval.jsonl"]
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "calibrated").stat().st_mode == (tmp_path / "usual").stat().st_mode

    slope, offset = line_in(result.stdout)
    assert [slope, offset] == pytest.approx(platt_by_scipy(logits, LABELS), rel=1e-4)
    expected = slope * logits + offset
    folded = transformers_logits(tmp_path / "calibrated", PAIRS[:60])
    assert folded == pytest.approx(expected[:60], abs=1e-4)  # slope and offset are printed with six digits
    assert (np.argsort(folded) == np.argsort(logits[:60])).all()
    probabilities = 1 / (1 + np.exp(-expected))
    scores = CrossEncoder(str(tmp_path / "calibrated"), device="cpu").predict(PAIRS, show_progress_bar=False)
    assert scores == pytest.approx(probabilities, abs=1e-5)
    flag = FlagReranker(str(tmp_path / "calibrated"), normalize=True, max_length=512, devices="cpu")
    assert flag.compute_score(PAIRS[:60]) == pytest.approx(probabilities[:60], abs=1e-5)


def test_the_figures_are_measured_before_and_cross_fitted_after(calibrate, data, logits, model, monkeypatch):
    change_weights(model, lambda head: head.bias.add_(2))  # so that some rows have 0.8 or more
    logits = logits + 2
    measured = []
    figures_of = tool.figures_of
    monkeypatch.setattr(tool, "figures_of", lambda *arguments: measured.append(arguments) or figures_of(*arguments))
    printed = calibrate(model, "--data", data, "--output", "out")
    [(before, after, rows)] = measured
    assert before == pytest.approx(logits, abs=1e-5)
    assert (after == tool.cross_fitted(before, LABELS, rows.lists)).all()
    brier = [np.mean((1 / (1 + np.exp(-scores)) - LABELS) ** 2) for scores in (before, after)]
    assert re.search(rf"Brier score +{brier[0]:.3f} +{brier[1]:.3f}\n", printed) and brier[1] < brier[0]
    assert re.search(r"calibration error, 95 % interval +0\.\d{3} \[0\.\d{3}, 0\.\d{3}\] +0\.\d{3} \[0", printed)
    high = [LABELS[scores >= np.log(4)] for scores in (before, after)]
    texts = [f"{len(labels)}, {labels.mean():.0%} relevant" if len(labels) else "none" for labels in high]
    assert re.search(rf"rows with 0.8 or more +{texts[0]} +{texts[1]}\n", printed)
    assert "the probability of being labelled relevant in lists like these (8.0 rows of a query" in printed
    assert ", not in other lists." in printed


def test_the_command_that_is_named_next_evaluates_the_calibrated_model(calibrate, data, run_main):
    printed = calibrate(TINY, "--data", data, "--output", "out")
    command = re.search(r"Next, on queries that were not used here: python train_bert_rerank.py (.*)", printed)[1]
    status, printed = run_main(*command.replace("unseen.jsonl", data).split())
    assert status == 0 and "Probabilities of" in printed


def test_no_ranking_changes_also_not_with_a_retrievers_scores_mixed_in(calibrate, data, model):
    edit_json(model / "config.json", retriever_weight=0.4)
    calibrate(model, "--data", data, "--output", "out")
    before, after = BertRerankerModel.from_pretrained(model), BertRerankerModel.from_pretrained("out")
    assert after.retriever_weight == 0.4
    generator = np.random.default_rng(0)
    for query in QUERIES[:10]:
        documents = [row["content"] for row in ROWS if row["query"] == query]
        for scores in (None, generator.normal(size=len(documents)).tolist()):
            orders = []
            for reranker in (before, after):
                hits = reranker.rank(query, documents, retriever_scores=scores)
                orders.append([hit["corpus_id"] for hit in hits])
            assert orders[0] == orders[1]


def test_best_passages_stay_the_best_and_are_what_is_calibrated(calibrate, write_jsonl, model):
    edit_json(model / "config.json", long_documents="best_passage", query_format="问：{}")
    edit_json(model / "tokenizer_config.json", model_max_length=64)
    long = []
    for row, before, behind in zip(ROWS, EVAL_ROWS[300:540], EVAL_ROWS[600:840], strict=True):
        long.append({**row, "content": before["content"] + row["content"] + behind["content"]})
    printed = calibrate(model, "--data", write_jsonl("long.jsonl", long), "--output", "out")
    assert "--max_len 64" in printed
    before, after = BertRerankerModel.from_pretrained(model), BertRerankerModel.from_pretrained("out")
    assert (after.long_documents, after.formats, after.max_len) == ("best_passage", ["问：{}", "{}"], 64)
    pairs = [(row["query"], row["content"]) for row in long]
    logits = logits_by(before, pairs)
    assert line_in(printed) == pytest.approx(platt_by_scipy(logits, LABELS), rel=1e-4)
    passages = []
    for reranker in (before, after):
        hits = reranker.rank(pairs[0][0], [content for _, content in pairs[:8]], return_passages=True)
        passages.append([(hit["corpus_id"], hit["passage"]) for hit in hits])
    assert passages[0] == passages[1] and max(start for _, (start, _) in passages[0]) > 0


def test_a_calibrated_model_calibrated_again_stays_as_it_is(calibrate, data):
    assert "NOT BETTER" not in calibrate(TINY, "--data", data, "--output", "once")
    printed = calibrate("once", "--data", data, "--output", "twice")
    slope, offset = line_in(printed)
    assert slope == pytest.approx(1, abs=1e-4) and offset == pytest.approx(0, abs=1e-4)
    assert printed.count("!!! NOT BETTER !!! On queries that were not fitted the Brier score is no lower") == 1


def test_graded_labels_are_fitted_as_expected_labels(calibrate, write_jsonl, logits, model):
    change_weights(model, lambda head: head.bias.add_(2))
    logits = logits + 2
    grades = np.where(LABELS == 1, 3 - np.arange(len(ROWS)) % 2, np.arange(len(ROWS)) % 7 == 0)
    rows = [{**row, "label": int(grade)} for row, grade in zip(ROWS, grades, strict=True)]
    printed = calibrate(model, "--data", write_jsonl("graded.jsonl", rows), "--output", "out", "--max_label", 3)
    assert line_in(printed) == pytest.approx(platt_by_scipy(logits, grades / 3), rel=1e-4)
    high = (grades / 3)[logits >= np.log(4)]
    assert f"{len(high)}, mean label {high.mean():.2f}" in printed and "%" not in printed.split("rows with")[1]
    assert "the expected label, on a scale from 0 to 1, in lists like these" in printed
    assert "--max_label=3" in printed.split("Next")[1]


def test_lists_of_hits_with_the_retrievers_scores_are_read_as_a_run_reads_them(calibrate, data, tmp_path):
    lines = []
    for query in QUERIES:
        rows = [row for row in ROWS if row["query"] == query]
        hits = [{"content": row["content"], "label": row["label"], "score": 0.5} for row in rows]
        lines.append(json.dumps({"query": query, "hits": hits, "relevant": 9}))
    (tmp_path / "hits.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    of_hits = calibrate(TINY, "--data", "hits.jsonl.gz", "--output", "of_hits")
    of_rows = calibrate(TINY, "--data", data, "--output", "of_rows")
    assert line_in(of_hits) == line_in(of_rows)


def test_a_query_that_is_written_in_two_ways_is_one(calibrate, write_jsonl):
    """Each has all its relevant rows in one spelling, and the irrelevant ones in the other."""
    rows = [{**row, "query": row["query"] + "\u200b " * row["label"]} for row in ROWS[: 20 * 8]]
    printed = calibrate(TINY, "--data", write_jsonl("spelt.jsonl", rows), "--output", "out")
    assert "rows of 20 queries" in printed and "written in several ways" in printed


CARDS = {"a card": "---\nlicense: mit\n---\n\n# A model\n\nno newline", "no UTF-8": b"# \xff\r\n", "no card": None}


@pytest.mark.parametrize("name", CARDS)
def test_the_model_card_gains_a_section_and_loses_nothing(calibrate, data, model, tmp_path, name):
    (model / "README.md").unlink()
    if CARDS[name]:
        content = CARDS[name]
        (model / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    printed = calibrate(model, "--data", data, "--output", "out")
    card = (tmp_path / "out" / "README.md").read_bytes()
    if CARDS[name]:
        assert card.startswith((model / "README.md").read_bytes() + b"\n\n## Calibrated probabilities\n")
    else:
        assert card.startswith(b"# out\n")
    section = card.partition(b"## Calibrated probabilities\n")[2].decode()
    slope, offset = re.search(r"slope (\S+), offset (\S+);", printed).groups()
    assert f"slope {slope} and offset {offset}" in section
    assert "240 rows of 30 queries of eval.jsonl" in section and "classifier.out_proj" in section
    brier = re.search(r"Brier score +(\S+) +(\S+)", printed).groups()
    assert f"| Brier score | {brier[0]} | {brier[1]} |" in section
    assert str(tmp_path) not in section and "not in other lists" in section


def test_other_files_are_copied_and_weights_that_are_not_calibrated_are_not(calibrate, data, model, tmp_path):
    for name in ("LICENSE", "sentence_bert_config.json", "spm.model", "model.safetensors.index.json"):
        (model / name).write_text("{}")
    (model / "model.onnx").write_text("weights")
    (model / "pytorch_model.bin").write_text("weights")
    (model / "onnx").mkdir()
    printed = calibrate(model, "--data", data, "--output", "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "sentence_bert_config.json", "spm.model"} <= names
    assert not names & {"model.safetensors.index.json", "model.onnx", "pytorch_model.bin", "onnx"}
    assert "Not copied from" in printed and ": model.onnx, onnx, pytorch_model.bin\n" in printed


def test_a_config_that_has_cross_encoder_give_logits_is_brought_to_probabilities(calibrate, data, model):
    edit_json(model / "config.json", sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"})
    calibrate(model, "--data", data, "--output", "out")
    ours = BertRerankerModel.from_pretrained("out").predict(PAIRS[:9])
    assert CrossEncoder("out", device="cpu").predict(PAIRS[:9]) == pytest.approx(ours, abs=1e-6)


# ---- Architectures ---------------------------------------------------------------------------------------------------
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
OWN_SIZES = {
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "qwen2": {**SIZES, "num_key_value_heads": 2},
}
HEADS = {
    "bert": "classifier", "xlm-roberta": "classifier.out_proj", "modernbert": "classifier",
    "electra": "classifier.out_proj", "deberta-v2": "classifier", "distilbert": "classifier",
    "mpnet": "classifier.out_proj", "camembert": "classifier.out_proj", "albert": "classifier",
}  # fmt: skip


def save_random(kind, folder):
    """A model of `kind` with random weights, large enough for what it reads to change its score."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos", "cls", "sep")}
    settings = {"vocab_size": len(tokenizer), "num_labels": 1, "max_position_embeddings": 512, **ids}
    config = AutoConfig.for_model(kind, **settings, **OWN_SIZES.get(kind, SIZES))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 6
            if weight.shape == (1, 32):
                weight *= 6  # of the last layer, so that logits differ as trained ones do
    model.save_pretrained(folder)
    tokenizer.model_max_length = 500
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rows_it_ranks(write_jsonl):
    """Function that writes rows of 20 queries of which a model ranks most as labelled; returns their path."""

    def write(folder):
        pairs = PAIRS[: 20 * 8]
        scores = logits_by(BertRerankerModel.from_pretrained(folder), pairs).reshape(20, 8)
        labels = (scores >= np.quantile(scores, 0.7, axis=1, keepdims=True)).astype(int)
        labels[:, 3] = 1 - labels[:, 3]
        rows = [{"query": query, "content": content, "label": int(label)}
                for (query, content), label in zip(pairs, labels.ravel(), strict=True)]  # fmt: skip
        return write_jsonl("ranked.jsonl", rows)

    return write


@pytest.mark.parametrize("kind", HEADS)
def test_an_architecture_is_folded_exactly(calibrate, tmp_path, rows_it_ranks, kind):
    folder = save_random(kind, tmp_path / kind)
    printed = calibrate(folder, "--data", rows_it_ranks(folder), "--output", "out")
    assert f"folded into {HEADS[kind]}." in printed
    logits, folded = (transformers_logits(model, PAIRS[:16]) for model in (folder, "out"))
    line = np.polyfit(logits, folded, 1)
    assert line == pytest.approx(line_in(printed), rel=1e-5)  # of which six digits are printed
    assert folded == pytest.approx(np.polyval(line, logits), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_an_architecture_without_a_bias_is_refused_by_name(calibrate, tmp_path, data, kind):
    folder = save_random(kind, tmp_path / kind)
    with pytest.raises(SystemExit, match=r"^Error: \w+ForSequenceClassification cannot be calibrated here: .* score, "
                                         r"Linear\(in_features=32, out_features=1, bias=False\)"):  # fmt: skip
        calibrate(folder, "--data", data, "--output", "out")
    assert not (tmp_path / "out").exists()


HEADS_REFUSED = {
    "a layer after the linear one": (lambda layer: torch.nn.Sequential(layer, torch.nn.Tanh()), "out_proj.0, Linear"),
    "no bias": (lambda layer: torch.nn.Linear(layer.in_features, 1, bias=False), "out_proj, Linear.*bias=False"),
}


@pytest.mark.parametrize("name", HEADS_REFUSED)
def test_a_head_that_slope_and_offset_do_not_go_into_is_refused_by_name(name):
    change, message = HEADS_REFUSED[name]
    reranker = BertRerankerModel.from_pretrained(TINY)
    head = reranker.model.classifier
    head.out_proj = change(head.out_proj)
    with pytest.raises(UserError, match=f"XLMRobertaForSequenceClassification .* linear layer is classifier.{message}"):
        tool.head_of(reranker)


# ---- Refusals: nothing is written ------------------------------------------------------------------------------------
@pytest.fixture
def refused(calibrate, tmp_path):
    """refused(argument, …, match=…): it is one message, and the folder is as before."""

    def refused(*arguments, match):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit, match=match) as refusal:
            calibrate(*arguments)
        assert str(refusal.value).startswith("Error: ")
        assert sorted(tmp_path.rglob("*")) == before

    return refused


def test_what_is_no_model_is_refused(refused, data, tmp_path):
    (tmp_path / "run" / "final_model").mkdir(parents=True)
    refused("nowhere", "--data", data, "--output", "out", match="nowhere is no folder")
    refused(data, "--data", data, "--output", "out", match="eval.jsonl is no folder")
    refused("run", "--data", data, "--output", "out", match="run has no config.json: name the folder")
    shutil.copy(f"{TINY}/config.json", tmp_path / "run" / "final_model")
    refused("run", "--data", data, "--output", "run/out", match="run has no config.json: did you mean run/final_model?")
    refused("run/final_model", "--data", data, "--output", "out", match="cannot load run/final_model")


def test_a_model_whose_head_was_drawn_is_refused(refused, data, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(TINY).roberta.save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "encoder")
    refused("encoder", "--data", data, "--output", "out", match="is no reranker: it lacks classifier")


def test_an_output_that_is_there_lies_in_the_model_or_cannot_be_made_is_refused(refused, data, model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "to_model").symlink_to(model)
    for output in ("full", "eval.jsonl", "dangling", ".", model):
        refused(model, "--data", data, "--output", output, match="exists already: take another --output")
    refused(model, "--data", data, "--output", "", match="output is empty: it should be a path")
    for output in (model / "out", "full/../model/out", "to_model/out"):
        refused(model, "--data", data, "--output", output, match="lies inside of .*model: name a folder outside")
    for output in ("eval.jsonl/out", "no/out", "/proc/out", "o" * 300):
        refused(model, "--data", data, "--output", output, match="cannot be made: .* should be a folder that can be")


BAD_DATA = {
    "no labels": ([{"query": "a", "content": "b"}], "1 bad line\n  line 1: label is missing"),
    "a label out of scale": ([*ROWS, {**ROWS[0], "label": 2}], r"line 241: label 2 is outside \[0, 1\]"),
    "scores of some rows": ([{**ROWS[0], "score": 1}, *ROWS[1:]], "line 2: score is missing"),
    "19 queries": (ROWS[: 19 * 8], "of 19 queries 19 have both a relevant row .* 20 or more are needed"),
    "relevant rows only": ([{**row, "label": 1} for row in ROWS], "of 30 queries 0 have both"),
    "labels swapped": ([{**row, "label": 1 - row["label"]} for row in ROWS], "the slope .* is -.* labels swapped"),
    "no rows": ([], "no rows"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_do_not_serve_are_refused(refused, write_jsonl, name):
    rows, message = BAD_DATA[name]
    refused(TINY, "--data", write_jsonl("bad.jsonl", rows), "--output", "out", match=message)


def test_a_slope_that_is_not_above_zero_in_one_fold_only_is_refused(logits):
    """One query carries all that there is: without it the slope is below 0."""
    lists = np.split(np.arange(60), 20)
    labels = np.tile([0.0, 1, 1], 20)
    scores = np.tile([0.1, 0.0, 0.0], 20)
    scores[:3] = -40, 40, 40
    assert tool.fit(scores, labels).slope > 0
    with pytest.raises(UserError, match="the slope that fits 48 of the rows is -"):
        tool.cross_fitted(scores, labels, lists)


def test_options_that_cannot_be_meant_are_refused(refused, data):
    common = (TINY, "--data", data, "--output", "out")
    refused(*common, "--batch_size", 0, match="batch_size 0: it should be 1 or more")
    refused(*common, "--min_label", 1, match="min_label 1 is not below max_label 1")
    refused(*common, "--max_label", "nan", match="max_label is nan")
    refused(TINY, "--data", "nowhere.jsonl", "--output", "out", match="nowhere.jsonl: cannot be read")


WEIGHTS = {
    "not finite": (lambda head: head.bias.fill_(torch.nan), "gives logits that are no finite numbers: its weights"),
    "overflow": (lambda head: head.weight.fill_(3e38), "gives logits that are no finite numbers: its weights"),
    "all alike": (lambda head: head.weight.zero_(), "the model gives all rows the same logit"),
    "far too large": (lambda head: head.bias.fill_(1e8), "the model gives all rows the same logit"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_with_which_nothing_can_be_calibrated_are_refused(refused, data, model, name):
    change, message = WEIGHTS[name]
    change_weights(model, change)
    refused(model, "--data", data, "--output", "out", match=message)


def test_a_row_without_a_finite_logit_is_named_by_line(refused, write_jsonl, model):
    reranker = BertRerankerModel.from_pretrained(model)
    number = reranker.tokenizer.convert_tokens_to_ids("鳄")
    assert number != reranker.tokenizer.unk_token_id
    with torch.no_grad():
        reranker.model.get_input_embeddings().weight[number] = torch.nan
    reranker.save_pretrained(model)
    rows = [*ROWS, {"query": "鳄", "content": "鱼", "label": 0}]
    path = write_jsonl("rare.jsonl", rows)
    refused(model, "--data", path, "--output", "out", match="line 241 has a logit that is no finite number, and 0")


def test_weights_that_do_not_give_what_was_fitted_are_refused_by_the_layers_name(refused, data, monkeypatch):
    monkeypatch.setattr(tool, "fold", lambda line, head: head.bias.data.add_(line.offset))
    refused(TINY, "--data", data, "--output", "out", match="slope .* cannot be folded into classifier.out_proj: a")


def test_logits_that_stand_far_off_are_calibrated_too(calibrate, data, model):
    """As after a listwise loss; slope times logit and offset cancel each other."""
    near = line_in(calibrate(TINY, "--data", data, "--output", "near"))
    change_weights(model, lambda head: head.bias.add_(300))
    far = line_in(calibrate(model, "--data", data, "--output", "far"))
    assert far[0] == pytest.approx(near[0], rel=1e-3) and far[1] < -100
    assert transformers_logits("far", PAIRS[:8]) == pytest.approx(transformers_logits("near", PAIRS[:8]), abs=1e-3)


def test_a_ranking_that_would_change_is_refused_with_the_lines(logits):
    lists = np.split(np.arange(240), 30)
    rows = tool.LabelledRows("eval.jsonl", PAIRS, np.arange(1, 241), LABELS, lists)
    tool.require_same_ranking(logits, 0.3 * logits - 2, rows)
    first, second = np.argsort(logits[:8])[3:5]
    changed = logits.copy()
    changed[[first, second]] = changed[[second, first]]
    with pytest.raises(UserError, match=f"rank lines {first + 1} and {second + 1} of eval.jsonl in an"):
        tool.require_same_ranking(logits, changed, rows)


def test_a_document_of_which_cutting_leaves_blanks_is_named_by_line(refused, write_jsonl):
    path = write_jsonl("blanks.jsonl", [*ROWS, {**ROWS[0], "content": " " * 5000 + "答"}])
    refused(TINY, "--data", path, "--output", "out", match="line 241: content begins with so many blanks that 512")


def test_a_query_that_leaves_its_passages_no_room_is_named_by_line(refused, write_jsonl, model):
    edit_json(model / "config.json", long_documents="best_passage")
    rows = [*ROWS, {"query": "问" * 600, "content": "答" * 600, "label": 1}]
    path = write_jsonl("long.jsonl", rows)
    refused(model, "--data", path, "--output", "out", match="line 241: .* best_passage takes 16 or more")


@pytest.mark.parametrize("step", ["copy_other_files", "flush_to_disk"])
@pytest.mark.parametrize("error, message", [(OSError("no space left"), "Error: no space left"),
                                            (KeyboardInterrupt(), "Stopped; nothing is written.")])  # fmt: skip
def test_a_call_that_is_cut_off_while_it_writes_leaves_nothing(calibrate, data, tmp_path, monkeypatch, step, error,
                                                               message):  # fmt: skip
    def stop(*_):
        raise error

    monkeypatch.setattr(tool, step, stop)
    with pytest.raises(SystemExit, match=message):
        calibrate(TINY, "--data", data, "--output", "out")
    assert [path.name for path in tmp_path.iterdir()] == ["eval.jsonl"]
