"""The saved folder in other libraries, as their users load it: transformers, sentence-transformers, FlagEmbedding; and
the model card that tells these users what to do."""

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY
from FlagEmbedding import FlagReranker
from huggingface_hub import ModelCard
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from train_bert_rerank import BertRerankerModel, language_of, train

QUERY = "S35充不进电"
DOCUMENTS = [
    "退款要七天", "请擦净S35底部的充电触点，再把它推回充电座。", "R42支持访客网络。", "S35", "充不进电时请看说明书。"
]  # fmt: skip
LONG = "充不进电时请看说明书。" * 40
MAX_LEN = 64


def trained(folder, queries=10, **changes):
    """What train() returned for a short run into folder/my_reranker, with half of the queries held out."""
    rows = (ROOT / "default_eval_data.jsonl").read_text(encoding="utf-8").splitlines()[: queries * 8]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    return train({"model_name_or_path": TINY, "train_dataset": str(path), "eval_proportion": 0.5, "epochs": 1,
                  "lr": 3e-4, "max_len": MAX_LEN, "mixed_precision": "no", "log_with": None, "base_interpolation": (),
                  "output_dir": str(folder / "my_reranker"), **changes})  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """(folder of the saved model, what train() returned)."""
    folder = tmp_path_factory.mktemp("clients")
    return str(folder / "my_reranker" / "final_model"), trained(folder, queries=60)


@pytest.fixture(scope="session")
def saved(run):
    return run[0]


@pytest.fixture(scope="session")
def ours(saved):
    """(probabilities, logits) by this module, of the query with each document."""
    model, pairs = BertRerankerModel.from_pretrained(saved), [(QUERY, each) for each in DOCUMENTS]
    logits = model.predict(pairs, activation_fn=torch.nn.Identity())
    assert np.ptp(model.predict(pairs)) > 0.1, "scores that all agree would show nothing"
    return model.predict(pairs), logits


# ---- transformers ----------------------------------------------------------------------------------------------------
def test_auto_model_for_sequence_classification_gives_our_logits(saved, ours):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    tokens = tokenizer([QUERY] * 5, DOCUMENTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**tokens).logits.squeeze(-1)
    np.testing.assert_allclose(logits.numpy(), ours[1], atol=1e-5, rtol=0)
    assert model.dtype == torch.float32 and tokenizer.model_max_length == MAX_LEN


def test_a_text_classification_pipeline_gives_our_probabilities_and_cuts_as_we_do(saved, ours):
    classify = pipeline("text-classification", saved, device="cpu", truncation="only_second")
    found = classify([{"text": QUERY, "text_pair": each} for each in DOCUMENTS])
    np.testing.assert_allclose([one["score"] for one in found], ours[0], atol=1e-5, rtol=0)
    [long] = classify([{"text": QUERY, "text_pair": LONG}])
    assert long["score"] == pytest.approx(BertRerankerModel.from_pretrained(saved).predict((QUERY, LONG)), abs=1e-5)


# ---- sentence-transformers -------------------------------------------------------------------------------------------
def test_cross_encoder_predicts_and_ranks_as_we_do_by_the_saved_config_alone(saved, ours):
    theirs, model = CrossEncoder(saved, device="cpu"), BertRerankerModel.from_pretrained(saved)
    assert isinstance(theirs.activation_fn, torch.nn.Sigmoid)
    assert theirs.max_seq_length == theirs.tokenizer.model_max_length == model.max_len == MAX_LEN
    pairs = [(QUERY, each) for each in [*DOCUMENTS, LONG]]  # the longest text is the document: cut alike
    np.testing.assert_allclose(theirs.predict(pairs), model.predict(pairs), atol=1e-5, rtol=0)
    np.testing.assert_allclose(theirs.predict(pairs[:5]), ours[0], atol=1e-5, rtol=0)
    ranked, expected = (each.rank(QUERY, DOCUMENTS, top_k=4, return_documents=True) for each in (model, theirs))
    assert [(hit["corpus_id"], hit["text"]) for hit in ranked] == [(hit["corpus_id"], hit["text"]) for hit in expected]
    assert [hit["score"] for hit in ranked] == pytest.approx([hit["score"] for hit in expected], abs=1e-5)


@pytest.mark.parametrize("name", ["predict", "rank"])
def test_names_and_defaults_of_predict_and_rank_are_the_cross_encoders(name):
    parameters = [inspect.signature(getattr(each, name)).parameters for each in (BertRerankerModel, CrossEncoder)]
    ours, theirs = ({key: value.default for key, value in each.items()} for each in parameters)
    if name == "rank":
        assert ours.pop("retriever_scores") is None and ours.pop("return_passages") is False
        assert not {"retriever_scores", "return_passages"} & {*theirs}
    assert {key: theirs.get(key, "not there") for key in ours} == ours
    issue = ["inputs", "batch_size", "activation_fn", "convert_to_numpy", "convert_to_tensor", "show_progress_bar"]
    assert {*(issue if name == "predict" else ["query", "documents", "top_k", "return_documents"])} <= {*ours}


def test_a_base_saved_for_logits_or_as_a_regression_becomes_a_folder_that_gives_probabilities(tmp_path):
    base = BertRerankerModel.from_pretrained(TINY)
    identity = "torch.nn.modules.linear.Identity"
    base.model.config.update({"problem_type": "regression", "sbert_ce_default_activation_function": identity,
                              "sentence_transformers": {"activation_fn": identity}})  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    theirs = CrossEncoder(str(tmp_path / "base"), device="cpu")
    assert isinstance(theirs.activation_fn, torch.nn.Identity), "else this test would show nothing"
    trained(tmp_path, model_name_or_path=str(tmp_path / "base"), eval_dataset=None)
    saved = str(tmp_path / "my_reranker" / "final_model")
    config = Path(saved, "config.json").read_text(encoding="utf-8")
    assert "sbert_ce" not in config, "sentence-transformers before 4, in servers too, takes it for the activation"
    expected = BertRerankerModel.from_pretrained(saved).predict([(QUERY, each) for each in DOCUMENTS])
    theirs = CrossEncoder(saved, device="cpu").predict([(QUERY, each) for each in DOCUMENTS])
    np.testing.assert_allclose(theirs, expected, atol=1e-5, rtol=0)
    pairs = [{"text": QUERY, "text_pair": each} for each in DOCUMENTS]
    found = pipeline("text-classification", saved, device="cpu")(pairs)
    np.testing.assert_allclose([one["score"] for one in found], expected, atol=1e-5, rtol=0)


# ---- FlagEmbedding ---------------------------------------------------------------------------------------------------
def test_flag_reranker_gives_our_logits_and_normalized_our_probabilities(saved, ours):
    pairs = [(QUERY, each) for each in DOCUMENTS]
    for normalize, expected in ((False, ours[1]), (True, ours[0])):
        theirs = FlagReranker(saved, normalize=normalize, max_length=MAX_LEN, devices="cpu")
        np.testing.assert_allclose(theirs.compute_score(pairs), expected, atol=1e-5, rtol=0)


def test_flag_reranker_cuts_a_query_at_three_quarters_where_we_keep_it(saved):
    model, query = BertRerankerModel.from_pretrained(saved), "充不进电怎么办呢请问" * 5  # 50 of 64 tokens: over 48
    [theirs] = FlagReranker(saved, normalize=True, max_length=MAX_LEN, devices="cpu").compute_score([(query, "充电")])
    cut = model.tokenizer.decode(model.tokenizer(query, add_special_tokens=False)["input_ids"][: MAX_LEN * 3 // 4])
    assert theirs == pytest.approx(model.predict((cut, "充电")), abs=1e-5)
    assert theirs != pytest.approx(model.predict((query, "充电")), abs=1e-4)


# ---- Formats and the model card --------------------------------------------------------------------------------------
FORMATS = {"query_format": "问：{}", "document_format": "{} [完]"}


@pytest.mark.parametrize("changes", [{}, FORMATS], ids=["plain", "formats"])
def test_the_cards_code_runs_word_for_word_and_four_libraries_give_our_scores(tmp_path, monkeypatch, capsys, changes):
    trained(tmp_path, **changes)
    monkeypatch.chdir(tmp_path / "my_reranker")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    card = Path("final_model", "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)
    assert '"…", ["…", "…"]' in code
    capsys.readouterr()
    exec(compile(code.replace('"…", ["…", "…"]', repr((QUERY, DOCUMENTS[:2]))[1:-1]), "README.md", "exec"), {})
    said = capsys.readouterr().out
    ranked, *others = (line for line in said.splitlines() if line.startswith("["))
    hits = sorted(eval(ranked), key=lambda hit: hit["corpus_id"])
    expected = [hit["score"] for hit in hits]
    assert expected == pytest.approx(
        BertRerankerModel.from_pretrained("final_model").predict([(QUERY, each) for each in DOCUMENTS[:2]]), abs=1e-6)
    assert len(others) == 3
    for line in others:
        found = re.findall(r"(?<![\w.])\d\.\d+(?:e-\d+)?", line)
        assert [float(each) for each in found] == pytest.approx(expected, abs=1e-5), line
    for form in changes.values():
        assert f"`{form}`" in card, "the card says what to prepend"


@pytest.mark.parametrize("changes", [{}, FORMATS], ids=["plain", "formats"])
def test_the_cards_passages_are_ours_and_give_other_libraries_our_score(tmp_path, monkeypatch, capsys, changes):
    trained(tmp_path, long_documents="best_passage", **changes)
    monkeypatch.chdir(tmp_path / "my_reranker")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    card = Path("final_model", "README.md").read_text(encoding="utf-8")
    usage, passages = re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)
    telling = "R42支持访客网络。" * 20 + "请擦净S35底部的充电触点。"
    documents = [telling, DOCUMENTS[0], LONG]
    code = usage.replace('"…", ["…", "…"]', repr((QUERY, documents))[1:-1]) + passages
    names = {}
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), names)
    printed = [float(line) for line in capsys.readouterr().out.splitlines()[-3:]]
    model = BertRerankerModel.from_pretrained("final_model")
    expected = model.predict([(QUERY, document) for document in documents])
    assert printed == pytest.approx(expected.tolist(), abs=1e-5)

    for document, score in zip(documents, expected, strict=True):
        [(places, _)] = model.encode_passages([(QUERY, document)], MAX_LEN)
        pieces = names["passages"](QUERY, document)
        assert pieces == [document[start:end] for start, end in places]
        forms = {"query_format": "{}", "document_format": "{}", **changes}
        query = forms["query_format"].replace("{}", QUERY)
        texts = [forms["document_format"].replace("{}", piece) for piece in pieces]
        flag = FlagReranker("final_model", normalize=True, max_length=MAX_LEN, devices="cpu")
        assert max(flag.compute_score([(query, text) for text in texts])) == pytest.approx(score, abs=1e-5)
        classify = pipeline("text-classification", "final_model", device="cpu", truncation="only_second")
        found = classify([{"text": query, "text_pair": text} for text in texts])
        assert max(one["score"] for one in found) == pytest.approx(score, abs=1e-5)
    with pytest.raises(ValueError, match="fewer than 16 tokens"):
        names["passages"]("充" * 45, telling)
    many = "﷽" * 20 + telling
    [(places, _)] = model.encode_passages([(QUERY, many)], MAX_LEN)
    assert names["passages"](QUERY, many) == [many[start:end] for start, end in places]
    alone = CrossEncoder("final_model", device="cpu").predict([(QUERY, telling)])
    assert alone < expected[0] - 0.05, "other software scores the beginning"


def test_the_cards_metadata_are_what_the_hub_reads(run):
    folder, result = run
    card = ModelCard.load(Path(folder, "README.md"))
    data = card.data.to_dict()
    assert (data["pipeline_tag"], data["library_name"]) == ("text-ranking", "sentence-transformers")
    assert data["language"] == "zh" and "base_model" not in data, "a local folder is no name on the hub"
    [model] = data["model-index"]
    [found] = model["results"]
    assert model["name"] == "tiny_reranker, fine-tuned" and found["task"]["type"] == "text-ranking"
    assert {each["type"]: each["value"] for each in found["metrics"]} == {
        key: round(value, 4) for key, value in result["report"]["after"].items() if value is not None}  # fmt: skip
    assert re.search("^Verdict: (better|no clear difference|WORSE)", card.text, re.M | re.I)
    for line in ("\nlr: 0.0003\n", "\nsamples of a step: 16\n", "\nseed: 42\n", "\ntorch: "):
        assert line in card.text


def test_the_card_names_no_path_of_the_machine_it_was_made_on(run):
    text = Path(run[0], "README.md").read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path(run[0]).parents[2]) not in text


def test_a_base_from_the_hub_is_named_in_the_card(run_from_hub_cache):
    data = yaml.safe_load((run_from_hub_cache / "final_model" / "README.md").read_text("utf-8").split("---")[1])
    assert data["base_model"] == "example/tiny"


@pytest.fixture
def run_from_hub_cache(tmp_path, monkeypatch):
    """The output folder of a run whose model was named as on the hub and found in the local cache."""
    snapshot = tmp_path / "hub" / "models--example--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in Path(TINY).iterdir():
        (snapshot / file.name).symlink_to(file)
    reference = tmp_path / "hub" / "models--example--tiny" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
    trained(tmp_path, model_name_or_path="example/tiny", eval_dataset=None)
    return tmp_path / "my_reranker"


def test_a_card_without_evaluation_claims_nothing(tmp_path):
    trained(tmp_path, eval_dataset=None)
    text = (tmp_path / "my_reranker" / "final_model" / "README.md").read_text("utf-8")
    assert "Not evaluated: nothing is claimed about its ranking." in text and "model-index" not in text


TEXTS = {
    "zh": ["S35充不进电怎么办", "扫地机 mini 2 的滤网多久换一次"],
    "ja": ["充電できない場合はどうすればいいですか", "このモデルの保証期間は"],
    "ko": ["충전이 안 될 때는 어떻게 하나요", "필터 교체 주기"],
    "en": ["what is the effect of the boundary layer on the wing", "how are the shocks computed"],
    None: ["comment fonctionne le chauffage de la maison", "wie lange hält der Akku", "x86 4090 kWh"],
}


@pytest.mark.parametrize("language", TEXTS)
def test_the_language_is_told_by_script_or_common_words_and_left_open_else(language):
    assert language_of(TEXTS[language]) == language


def test_the_languages_of_the_default_data_and_of_nothing():
    rows = (ROOT / "default_train_data.jsonl").read_text(encoding="utf-8").splitlines()
    assert language_of(json.loads(row)["query"] for row in rows) == "zh"
    assert language_of([]) is None and language_of(["123"]) is None


def test_the_tokenizers_class_is_one_that_transformers_4_knows_too(saved):
    """Servers have it; docs/serving.md and benchmarks/serving_http.py run one."""
    config = json.loads(Path(saved, "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
