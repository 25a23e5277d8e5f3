"""Inference: the snippet that users copy, and predict and rank against sentence-transformers' CrossEncoder."""

import itertools
import json
import math
import os
import random
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY, rows_of
from datasets import Dataset
from sentence_transformers import CrossEncoder

from train_bert_rerank import BertRerankerModel

SPEC_SNIPPET = """
from train_bert_rerank import BertRerankerModel
model = BertRerankerModel.from_pretrained("tiny_reranker"); model.eval(); model.to(device)
tokens = model.preprocess([(query, document), (query, "R42支持访客网络。")], max_len=512)
out = model({k: v.to(device) for k, v in tokens.items()})
probability = torch.sigmoid(out["logits"].squeeze(-1))
"""
QUERY, DOCUMENT = "S35充不进电", "请擦净S35底部的充电触点，再把它推回充电座。"


def snippets():
    """The Python blocks of the READMEs that load a model; without a README the contract's."""
    blocks = {}
    for path in sorted(ROOT.glob("README*.md")):
        found = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
        blocks[path.name] = [block for block in found if "BertRerankerModel.from_pretrained" in block]
        assert blocks[path.name], f"{path.name} has no snippet for inference"
    blocks = blocks or {"contract": [SPEC_SNIPPET]}
    return [pytest.param(block, id=f"{name}-{number}") for name in blocks for number, block in enumerate(blocks[name])]


@pytest.fixture
def cross_encoder():
    """Anew for each test: up to sentence-transformers 5.1 it keeps an activation_fn that was given once."""
    return CrossEncoder(TINY, device="cpu")


@pytest.fixture(scope="module")
def pairs():
    """Pairs that fit, of many lengths, in no order of lengths: of the default data and of one to 400 tokens."""
    with open(ROOT / "default_train_data.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 20)] + rows_of(12)
    return [(row["query"], row["content"]) for row in rows] + [("问", "书" * count) for count in (400, 1, 77, 200, 3)]


# ---- The snippet -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("snippet", snippets())
def test_the_snippet_for_inference_runs_as_it_is(snippet, tmp_path, monkeypatch, cross_encoder):
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'from_pretrained\("([^"]+)"', snippet):
        os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
        os.symlink(TINY, name)
    given = {"torch": torch, "device": "cpu", "query": QUERY, "document": DOCUMENT} if snippet is SPEC_SNIPPET else {}
    names = dict(given)
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["out"]["loss"] is None
    count = len(names["tokens"]["input_ids"])
    assert names["out"]["logits"].shape == (count, 1) and names["probability"].shape == (count,)
    expected = cross_encoder.predict([(names["query"], names["document"])])[0]
    assert names["probability"][0].item() == pytest.approx(expected, abs=1e-5)


# ---- predict ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [1, 3, 32, 1000])
def test_predict_gives_the_scores_of_the_cross_encoder_in_the_order_of_the_pairs(
    reranker, cross_encoder, pairs, batch_size
):
    scores, expected = reranker.predict(pairs, batch_size=batch_size), cross_encoder.predict(pairs)
    assert type(scores) is type(expected) is np.ndarray and scores.dtype == expected.dtype == np.float32
    assert np.ptp(expected) > 0.1, "scores that all agree would show nothing"
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_predict_keeps_the_order_of_the_pairs_whatever_their_lengths(reranker, cross_encoder, pairs, order):
    ordered = sorted(pairs, key=lambda pair: len(pair[1]), reverse=order == "descending")
    if order == "shuffled":
        random.Random(0).shuffle(ordered)
    np.testing.assert_allclose(reranker.predict(ordered, 4), cross_encoder.predict(ordered), atol=1e-5, rtol=0)


INPUTS = {
    "list_of_tuples": [(QUERY, DOCUMENT), (QUERY, "退款")],
    "list_of_lists": [[QUERY, DOCUMENT], [QUERY, "退款"]],
    "tuple_of_tuples": ((QUERY, DOCUMENT), (QUERY, "退款")),
    "one_pair_in_a_list": [(QUERY, DOCUMENT)],
    "one_pair": (QUERY, DOCUMENT),
    "one_pair_as_a_list": [QUERY, DOCUMENT],
    "empty": [],
}
OPTIONS = {
    "default": {},
    "tensor": {"convert_to_tensor": True},
    "list_of_tensors": {"convert_to_numpy": False},
    "logits": {"activation_fn": torch.nn.Identity()},
    "tensor_of_logits": {"activation_fn": torch.nn.Identity(), "convert_to_tensor": True},
    "no_bar": {"show_progress_bar": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_predict_takes_and_returns_what_the_cross_encoder_does(reranker, cross_encoder, inputs, options):
    scores, expected = reranker.predict(inputs, **options), cross_encoder.predict(inputs, **options)
    assert type(scores) is type(expected) and np.shape(scores) == np.shape(expected)
    if isinstance(expected, list):
        assert [(type(one), one.shape, one.dtype) for one in scores] == [(type(x), x.shape, x.dtype) for x in expected]
    elif len(inputs):
        assert scores.dtype == expected.dtype
    ours, theirs = ([float(score) for score in np.ravel(each)] for each in (scores, expected))
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_predict_takes_pairs_from_a_generator_an_array_or_a_column(reranker):
    pairs = [(QUERY, DOCUMENT), (QUERY, "退款")]
    expected = reranker.predict(pairs)
    for same in (np.array(pairs), np.array(pairs, dtype=object), pd.Series(pairs, index=[7, 9])):
        assert reranker.predict(same).tolist() == expected.tolist()
    assert reranker.predict((QUERY, text) for text in (DOCUMENT, "退款")).tolist() == expected.tolist()
    assert reranker.predict(zip([QUERY, QUERY], [DOCUMENT, "退款"], strict=True)).tolist() == expected.tolist()
    assert reranker.predict(np.array([QUERY, DOCUMENT])) == expected[0]


A_PAIR = (QUERY, DOCUMENT)
PAIR_EXPECTED = "should be a pair (query, document) of two texts, not"
PAIRS_EXPECTED = "{name} should be a list of (query, document) pairs, not"
NO_PAIRS = {
    "a_row": ([A_PAIR, {"query": QUERY, "document": DOCUMENT}], TypeError, f"{{name}}[1] {PAIR_EXPECTED} dict {{{{'qu"),
    "a_row_alone": ({"query": QUERY, "document": DOCUMENT}, TypeError, f"{PAIRS_EXPECTED} dict {{{{'query': "),
    "a_data_set": (Dataset.from_list([{"query": QUERY, "document": DOCUMENT}]), TypeError,
                   f"{{name}}[0] {PAIR_EXPECTED} dict "),
    "a_table": (pd.DataFrame({"query": [QUERY], "document": [DOCUMENT]}), TypeError, f"{PAIRS_EXPECTED} DataFrame "),
    "a_rows_series": ([pd.Series(A_PAIR)], TypeError, f"{{name}}[0] {PAIR_EXPECTED} Series "),
    "a_text": (QUERY, TypeError, f"{PAIRS_EXPECTED} str '{QUERY}'"),
    "none": (None, TypeError, f"{PAIRS_EXPECTED} NoneType None"),
    "a_set": ({A_PAIR}, TypeError, f"{PAIRS_EXPECTED} set "),
    "one_text": ([QUERY], TypeError, f"{{name}}[0] {PAIR_EXPECTED} str '{QUERY}'"),
    "three_texts": ([QUERY, DOCUMENT, DOCUMENT], TypeError, f"{{name}}[0] {PAIR_EXPECTED} str '{QUERY}'"),
    "a_triple": ([A_PAIR, A_PAIR, (QUERY, DOCUMENT, 1)], ValueError, f"{{name}}[2] {PAIR_EXPECTED} 3 values"),
    "a_single": ([(QUERY,)], ValueError, f"{{name}}[0] {PAIR_EXPECTED} 1 values"),
    "document_none": ([A_PAIR, (QUERY, None)], TypeError, "the document of {name}[1] should be a text, not NoneType "),
    "document_nan": ([(QUERY, math.nan)], TypeError, "the document of {name}[0] should be a text, not float nan"),
    "document_a_number": ([(QUERY, 35)], TypeError, "the document of {name}[0] should be a text, not int 35"),
    "document_bytes": ([(QUERY, b"S35")], TypeError, "the document of {name}[0] should be a text, not bytes b'S35'"),
    "document_a_list": ([(QUERY, [DOCUMENT])], TypeError, "the document of {name}[0] should be a text, not list ['"),
    "query_none": ([(None, DOCUMENT)], TypeError, "the query of {name}[0] should be a text, not NoneType None"),
    "in_an_array": (np.array([[QUERY, None]], dtype=object), TypeError, "the document of {name}[0] should be a text"),
    "half_a_surrogate_pair": ([(QUERY, "\ud83d")], ValueError, "the document of {name}[0] is no text that can be "),
}  # fmt: skip


@pytest.mark.parametrize("inputs, kind, said", NO_PAIRS.values(), ids=NO_PAIRS)
def test_what_is_no_pair_of_texts_is_refused_with_its_number_and_what_is_wrong(reranker, inputs, kind, said):
    for name, call in (("inputs", reranker.predict), ("pairs", reranker.preprocess)):
        with pytest.raises(kind) as error:
            call(inputs)
        assert type(error.value) is kind and str(error.value).startswith(said.format(name=name))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("inputs", [[QUERY, None], (None, DOCUMENT), [QUERY, b"S35"]])
def test_one_pair_that_is_not_of_texts_is_refused_by_the_text_that_is_none(reranker, inputs):
    with pytest.raises(TypeError, match=r"^the (query|document) of inputs\[0\] should be a text, not (None|bytes)"):
        reranker.predict(inputs)


def test_preprocess_takes_no_pair_for_two_and_says_that_nothing_makes_no_tensors(reranker):
    with pytest.raises(TypeError, match=rf"^pairs\[0\] {re.escape(PAIR_EXPECTED)} str 'ab'$"):
        reranker.preprocess(("ab", "cd"))
    with pytest.raises(ValueError, match="^pairs is empty: "):
        reranker.preprocess([])


@pytest.mark.parametrize("max_len, kind, said", [
    (3, ValueError, "max_len 3 is too small: it takes 6 tokens or more, 4 special ones and one of "),
    (5, ValueError, "max_len 5 is too small: it takes 6 tokens or more"),
    (0, ValueError, "max_len 0 is too small: it takes 6 tokens or more"),
    (-1, ValueError, "max_len -1 is too small: it takes 6 tokens or more"),
    (None, TypeError, "max_len should be a whole number, not NoneType None"),
    ("64", TypeError, "max_len should be a whole number, not str '64'"),
    (64.0, TypeError, "max_len should be a whole number, not float 64.0"),
])  # fmt: skip
def test_a_max_len_that_leaves_no_room_for_a_token_of_both_texts_is_refused(reranker, max_len, kind, said):
    with pytest.raises(kind) as error:
        reranker.preprocess([A_PAIR], max_len=max_len)
    assert str(error.value).startswith(said)
    assert reranker.preprocess([A_PAIR], max_len=6)["input_ids"].shape == (1, 6)
    assert reranker.preprocess([A_PAIR], max_len=np.int64(512))["input_ids"].shape[0] == 1


@pytest.mark.parametrize("max_len", [513, 10**12])
def test_a_pair_that_max_len_leaves_longer_than_the_model_has_positions_for_is_refused_by_its_number(
    reranker, max_len
):
    assert reranker.preprocess([A_PAIR], max_len=max_len)["input_ids"].shape[0] == 1, "it is short enough"
    with pytest.raises(ValueError) as error:
        reranker.preprocess([A_PAIR, (QUERY, "书" * 600)], max_len=max_len)
    length = min(max_len, len(reranker.tokenizer(QUERY, "书" * 600)["input_ids"]))
    assert str(error.value) == (
        f"pairs[1] has {length} tokens with max_len {max_len}, and this model has positions for 512: "
        "take max_len 512 (model.max_len)"
    )


def test_a_pair_longer_than_a_model_was_trained_with_is_no_mistake_where_there_are_positions(small_model):
    model = BertRerankerModel.from_pretrained(small_model)
    model.tokenizer.model_max_length = 64
    tokens = model.preprocess([(QUERY, "书" * 200)], max_len=512)  # as the README's snippet has it
    assert tokens["input_ids"].shape[1] > 200 and model(tokens)["logits"].isfinite().all()
    with pytest.raises(ValueError, match=r"has positions for 512: take max_len 64 \(model.max_len\)$"):
        model.preprocess([(QUERY, "书" * 600)], max_len=600)


@pytest.mark.parametrize("batch_size, kind, said", [
    (0, ValueError, "batch_size is 0: it should be 1 or more"), (-8, ValueError, "batch_size is -8: "),
    (None, TypeError, "batch_size should be a whole number, not NoneType None"),
    (2.5, TypeError, "batch_size should be a whole number, not float 2.5"),
])  # fmt: skip
def test_a_batch_size_that_holds_no_pair_is_refused(reranker, batch_size, kind, said):
    for call, inputs in ((reranker.predict, ([A_PAIR],)), (reranker.rank, (QUERY, [DOCUMENT]))):
        with pytest.raises(kind) as error:
            call(*inputs, batch_size=batch_size)
        assert str(error.value).startswith(said)


def test_predict_computes_no_gradients_and_leaves_the_weights_as_they_were(reranker):
    before = {name: weight.clone() for name, weight in reranker.state_dict().items()}
    assert not reranker.predict([(QUERY, DOCUMENT)], convert_to_tensor=True).requires_grad
    assert all(torch.equal(weight, before[name]) for name, weight in reranker.state_dict().items())


def test_predict_switches_dropout_off_by_itself():
    model = BertRerankerModel.from_pretrained(TINY).train()
    assert model.predict([(QUERY, DOCUMENT)]) == model.predict([(QUERY, DOCUMENT)])


def test_a_document_that_does_not_fit_is_cut_at_its_end_as_the_cross_encoder_cuts_it(reranker, cross_encoder):
    long = [(QUERY, DOCUMENT * 40), ("问", "书" * 3000)]
    np.testing.assert_allclose(reranker.predict(long), cross_encoder.predict(long), atol=1e-5, rtol=0)


def test_a_query_that_does_not_fit_is_cut_and_scored(reranker):
    [score] = reranker.predict([("问" * 2000, DOCUMENT)])
    assert 0 < score < 1


def test_scores_do_not_depend_on_the_other_pairs_of_a_batch(reranker, pairs):
    alone = np.concatenate([reranker.predict([pair]) for pair in pairs])
    for chosen in (pairs, pairs[::-1]):
        together = dict(zip(chosen, reranker.predict(chosen), strict=True))
        np.testing.assert_allclose([together[pair] for pair in pairs], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_gives_finite_fp32_scores_in_the_same_order(reranker, pairs, dtype):
    model = BertRerankerModel.from_pretrained(TINY).to(dtype)
    scores, exact = model.predict(pairs), reranker.predict(pairs)
    assert scores.dtype == np.float32 and np.isfinite(scores).all()
    assert model(model.preprocess(pairs[:2]))["logits"].dtype == torch.float32
    far_apart = exact[:, None] - exact[None, :] > 0.05
    assert far_apart.sum() > 20 and (scores[:, None] > scores[None, :])[far_apart].all()


# ---- rank ------------------------------------------------------------------------------------------------------------
DOCUMENTS = ["退款要七天", DOCUMENT, "S35", "", "充不进电时请看说明书。" * 20, "R42支持访客网络。", "S35充电"]


@pytest.mark.parametrize("options", [
    {}, {"top_k": 3}, {"top_k": 100}, {"top_k": 1, "return_documents": True}, {"return_documents": True},
    {"activation_fn": torch.nn.Identity()}, {"batch_size": 2, "show_progress_bar": False},
], ids=str)  # fmt: skip
def test_rank_gives_what_the_cross_encoder_gives(reranker, cross_encoder, options):
    ours, theirs = reranker.rank(QUERY, DOCUMENTS, **options), cross_encoder.rank(QUERY, DOCUMENTS, **options)
    without_score = [[{key: hit[key] for key in hit if key != "score"} for hit in hits] for hits in (ours, theirs)]
    assert without_score[0] == without_score[1]
    assert all(set(one) == set(other) for one, other in zip(ours, theirs, strict=True))
    assert [hit["score"] for hit in ours] == pytest.approx([hit["score"] for hit in theirs], abs=1e-5)


def test_rank_of_no_documents_is_empty_and_of_equal_scores_keeps_the_order(reranker, cross_encoder):
    assert reranker.rank(QUERY, []) == cross_encoder.rank(QUERY, []) == []
    alike = torch.nn.Threshold(1e9, 0.0)  # 0 for all
    for each in (reranker, cross_encoder):
        assert [hit["corpus_id"] for hit in each.rank(QUERY, DOCUMENTS, activation_fn=alike)] == [*range(7)]


@pytest.mark.parametrize("query, documents, kind, said", [
    (None, [DOCUMENT], TypeError, "query should be a text, not NoneType None"),
    ([QUERY], [DOCUMENT], TypeError, "query should be a text, not list ['"),
    (QUERY, DOCUMENT, TypeError, "documents should be a list of texts, not str '"),
    (QUERY, None, TypeError, "documents should be a list of texts, not NoneType None"),
    (QUERY, {"a": DOCUMENT}, TypeError, "documents should be a list of texts, not dict {'a'"),
    (QUERY, {DOCUMENT}, TypeError, "documents should be a list of texts, not set {'"),
    (QUERY, pd.DataFrame({"text": [DOCUMENT]}), TypeError, "documents should be a list of texts, not DataFrame "),
    (QUERY, [DOCUMENT, None], TypeError, "documents[1] should be a text, not NoneType None"),
    (QUERY, [{"text": DOCUMENT}], TypeError, "documents[0] should be a text, not dict {'text': "),
    (QUERY, [DOCUMENT, DOCUMENT, math.nan], TypeError, "documents[2] should be a text, not float nan"),
    (QUERY, ["\ud83d"], ValueError, "documents[0] is no text that can be written in UTF-8: "),
])  # fmt: skip
def test_rank_refuses_what_is_no_text_by_its_number(reranker, query, documents, kind, said):
    with pytest.raises(kind) as error:
        reranker.rank(query, documents)
    assert str(error.value).startswith(said)


def test_rank_takes_documents_from_a_column_an_array_or_a_generator(reranker):
    expected = reranker.rank(QUERY, DOCUMENTS, return_documents=True)
    for same in (np.array(DOCUMENTS), pd.Series(DOCUMENTS, index=range(9, 16)), iter(DOCUMENTS)):
        assert reranker.rank(QUERY, same, return_documents=True) == expected


def test_the_results_of_rank_can_be_written_as_json(reranker):
    ranked = reranker.rank(QUERY, DOCUMENTS, return_documents=True)
    assert json.loads(json.dumps(ranked)) == ranked
