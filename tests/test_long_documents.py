"""Documents that do not fit: cut, or scored by the best of their passages; in rank(), predict() and evaluation."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_equal_but_for_rounding, command_line
from test_model import models, tiny_bert  # noqa: F401
from test_recovery import train_until
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from train_bert_rerank import (
    BertRerankerModel,
    RerankDataset,
    UserError,
    check_settings,
    load_data,
    mixture,
    ndcg_at_k,
    train,
)

pytestmark = pytest.mark.usefixtures("small_pictures")
QUERY = "S35充不进电怎么办"
SENTENCES = [
    "请看说明书第三页。", "R42支持访客网络。", "请擦净S35底部的充电触点，再把它推回充电座。", "退款要七天。",
    "The lamp is new.",
]  # fmt: skip
SHORT = "请擦净触点。"


def long_text(count, place=None, seed=0):
    """`count` sentences, of which that one about the contacts stands at `place` alone."""
    others = [sentence for sentence in SENTENCES if "触点" not in sentence]
    chosen = np.random.default_rng(seed).choice(others, count).tolist()
    if place is not None:
        chosen[place] = SENTENCES[2]
    return "".join(chosen)


DOCUMENTS = [long_text(30, 25), SHORT, long_text(30), long_text(12, 11, seed=1), "R42支持访客网络。"]


def model_of(folder=TINY, max_len=64, way="best_passage", **changes):
    model = BertRerankerModel.from_pretrained(folder).eval()
    model.tokenizer.model_max_length = max_len
    model.model.config.update({"long_documents": way, **changes})
    return model


def logits_of(model, pairs):
    return model.predict(pairs, activation_fn=torch.nn.Identity())


@pytest.fixture
def keeps_blanks(tmp_path):
    """Folder of tiny_reranker with a tokenizer that has a token for each byte, blanks too, as ModernBERT's has."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    raw = Tokenizer(BPE(vocabulary, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.normalizer = normalizers.NFC()
    raw.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> </s> $B </s>", [("<s>", 0), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=512, model_input_names=["input_ids", "attention_mask"])
    BertRerankerModel.from_pretrained(TINY).model.save_pretrained(tmp_path / "blanks")
    tokenizer.save_pretrained(tmp_path / "blanks")
    return str(tmp_path / "blanks")


# ---- Passages --------------------------------------------------------------------------------------------------------
def expected_places(folder, query, document, max_len):
    """By transformers' own way of cutting a text into overlapping windows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    taken = len(tokenizer(query, add_special_tokens=False)["input_ids"])
    room = max_len - tokenizer.num_special_tokens_to_add(pair=True) - taken
    windows = tokenizer(
        document, add_special_tokens=False, truncation=True, max_length=room, stride=room // 4,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    return [(offsets[0][0], offsets[-1][1]) for offsets in windows["offset_mapping"]]


@pytest.mark.parametrize("max_len", [32, 64, 101])
@pytest.mark.parametrize("kind", ["xlm-roberta", "bert"])
def test_passages_are_the_overlapping_windows_of_transformers(request, kind, max_len):
    folder = TINY if kind == "xlm-roberta" else request.getfixturevalue("tiny_bert")
    model = model_of(folder, max_len)
    for document in (DOCUMENTS[0], DOCUMENTS[3], long_text(11, seed=3), long_text(60, seed=4)):
        [(places, _)] = model.encode_passages([(QUERY, document)], max_len)
        assert places == expected_places(folder, QUERY, document, max_len)
        assert len(places) > 1 and (places[0][0], places[-1][1]) == (0, len(document)), "nothing is left out"
        for (_, end), (start, _) in zip(places, places[1:], strict=False):
            assert start < end


def test_one_token_more_than_fits_makes_a_second_passage_and_one_token_less_none():
    model, tokenizer = model_of(), AutoTokenizer.from_pretrained(TINY)
    room = 64 - tokenizer.num_special_tokens_to_add(pair=True) - len(tokenizer.tokenize(QUERY))
    text = "电" * 200
    assert len(tokenizer.tokenize(text)) == 200, "else this test would count wrongly"
    counts = [len(places) for places, _ in model.encode_passages([(QUERY, text[:room + n]) for n in (-1, 0, 1)], 64)]
    assert counts == [1, 1, 2]


def test_a_document_has_the_score_of_its_best_passage_which_any_client_gives():
    model = model_of()
    plain = AutoModelForSequenceClassification.from_pretrained(TINY).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    hits = model.rank(QUERY, DOCUMENTS, return_passages=True, activation_fn=torch.nn.Identity())
    for hit in hits:
        document = DOCUMENTS[hit["corpus_id"]]
        scores = {}
        for start, end in expected_places(TINY, QUERY, document, 64):
            tokens = tokenizer(QUERY, document[start:end], return_tensors="pt")
            assert tokens["input_ids"].shape[1] <= 64
            with torch.inference_mode():
                scores[(start, end)] = plain(**tokens).logits.item()
        assert hit["score"] == pytest.approx(max(scores.values()), abs=1e-5)
        assert hit["passage"] == max(scores, key=scores.get)
    assert "触点" in DOCUMENTS[0][slice(*hits[0]["passage"])] or hits[0]["corpus_id"] != 0
    cut = logits_of(model_of(way="cut"), [(QUERY, DOCUMENTS[0])])
    assert logits_of(model, [(QUERY, DOCUMENTS[0])]) > cut + 0.1, "what tells stands at its end"


def test_what_fits_has_the_same_bits_as_before_and_is_a_passage_itself():
    pairs = [(QUERY, text) for text in (SHORT, SENTENCES[1], "", SENTENCES[4])]
    assert logits_of(model_of(), pairs).tobytes() == logits_of(model_of(way="cut"), pairs).tobytes()
    hits = model_of().rank(QUERY, [SHORT, SENTENCES[1]], return_passages=True, return_documents=True)
    assert [hit["passage"] for hit in hits] == [(0, len(hit["text"])) for hit in hits]


@pytest.mark.parametrize("text", [
    "😀" * 150, "Orthogenicunbelievably" * 30, "﷽" * 40, "a" * 900, "é̂" * 200, "The lamp is new. " * 40,
    "第" + " " * 300 + "页" * 80, "\u200b" * 50 + "电" * 90, "𠮷野家" * 60,
])  # fmt: skip
@pytest.mark.parametrize("kind", ["xlm-roberta", "bert", "bytes"])
def test_each_passage_is_scored_whole_and_nothing_is_between_two_of_them(request, kind, text):
    folder = {"xlm-roberta": lambda: TINY, "bert": lambda: request.getfixturevalue("tiny_bert"),
              "bytes": lambda: request.getfixturevalue("keeps_blanks")}[kind]()  # fmt: skip
    model = model_of(folder, 64)
    [(places, encoded)] = model.encode_passages([("Q", text)], 64)
    assert [cut for _, _, cut in encoded] == [0] * len(encoded)
    assert all(start < end for start, end in places)
    for (start, end), (next_start, next_end) in zip(places, places[1:], strict=False):
        assert start < next_start and end < next_end
        assert next_start < end or not text[end:next_start].strip(), "blanks alone are left out"
    tokens = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_offsets_mapping=True)
    for begins, ends in tokens["offset_mapping"]:
        is_seen = any(start <= begins and ends <= end for start, end in places)
        assert is_seen or not text[begins:ends].strip()


def test_a_character_of_more_tokens_than_there_is_room_for_ends_too():
    model = model_of(max_len=24)
    document = "﷽" * 9
    [(places, _)] = model.encode_passages([("Q", document)], 24)
    assert places[0][0] == 0 and places[-1][1] == 9
    assert np.isfinite(model.predict([("Q", document)])).all()


def test_each_passage_gets_the_formats_and_none_is_cut():
    formats = {"query_format": "问：{}", "document_format": "标题 {} [完]"}
    model = model_of(**formats)
    [(places, encoded)] = model.encode_passages([(QUERY, DOCUMENTS[0])], 64)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for (start, end), (ids, _, cut) in zip(places, encoded, strict=True):
        text = f"标题 {DOCUMENTS[0][start:end]} [完]"
        assert ids.tolist() == tokenizer(f"问：{QUERY}", text)["input_ids"] and len(ids) <= 64 and not cut
    assert (places[0][0], places[-1][1]) == (0, len(DOCUMENTS[0]))


def test_predict_takes_and_gives_what_it_did():
    model = model_of()
    pairs = [(QUERY, document) for document in DOCUMENTS]
    scores = model.predict(pairs, batch_size=2)
    assert scores.shape == (5,) and scores.dtype == np.float32
    torch.testing.assert_close(model.predict(pairs, convert_to_tensor=True), torch.from_numpy(scores))
    assert model.predict(pairs[0]) == pytest.approx(scores[0], abs=1e-6)
    assert len(model.predict([])) == 0 and model.rank(QUERY, []) == []
    assert [hit["corpus_id"] for hit in model.rank(QUERY, DOCUMENTS)] == np.argsort(-scores).tolist()
    assert "passage" not in model.rank(QUERY, DOCUMENTS)[0]


def test_places_of_passages_are_asked_of_a_model_that_cuts_in_vain():
    with pytest.raises(ValueError, match="return_passages: this model cuts long documents"):
        model_of(way="cut").rank(QUERY, DOCUMENTS, return_passages=True)


@pytest.mark.parametrize("way", ["best", 1, ["cut"], "", [], False])
def test_what_is_no_way_to_score_long_documents_is_named(way):
    with pytest.raises(UserError, match="long_documents in the model's config.json is .* cut or best_passage"):
        model_of(way=way).predict([(QUERY, SHORT)])


def test_a_query_that_leaves_a_passage_fewer_than_16_tokens_is_an_error_where_the_document_does_not_fit():
    model = model_of(max_len=32)
    query = "充电" * 7  # 14 tokens or so of 28
    with pytest.raises(ValueError, match=r"max_len 32 leaves 1\d tokens to a passage beside the query '充电") as error:
        model.predict([(QUERY, SHORT), (query, long_text(20))])
    assert isinstance(error.value, UserError), "a tool says it without a traceback"
    assert model.predict([(query, SHORT)]).shape == (1,), "what fits needs no passage"
    with pytest.raises(ValueError, match=r"leaves 1\d tokens to a passage"):
        model_of(max_len=32, document_format="标题：{}（完）").predict([("充电" * 4, long_text(20))])
    with pytest.raises(ValueError, match="leaves 0 tokens"):
        model.predict([("充电" * 40, long_text(20))])


def test_mixed_with_a_retriever_it_is_the_best_passage_that_counts():
    model = model_of(retriever_weight=0.4)
    retrieved = [1.0, 5.0, 2.0, 4.0, 3.0]
    logits = logits_of(model, [(QUERY, document) for document in DOCUMENTS]).astype(float)
    mixed = mixture(logits, np.array(retrieved), 0.4)
    hits = model.rank(QUERY, DOCUMENTS, retriever_scores=retrieved, return_passages=True)
    assert [hit["corpus_id"] for hit in hits] == np.argsort(-mixed).tolist()
    assert [hit["mixed_score"] for hit in hits] == pytest.approx(np.sort(mixed)[::-1].tolist(), abs=1e-5)
    plain = {hit["corpus_id"]: hit["passage"] for hit in model.rank(QUERY, DOCUMENTS, return_passages=True)}
    assert {hit["corpus_id"]: hit["passage"] for hit in hits} == plain


MILLION = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
from train_bert_rerank import BertRerankerModel
model = BertRerankerModel.from_pretrained(sys.argv[2])
model.tokenizer.model_max_length = 512
model.model.config.update({"long_documents": "best_passage"})
query, text = "S35充不进电", "R42支持访客网络。" * int(sys.argv[3]) + "请擦净S35底部的充电触点。"
model.predict([(query, text[:2000])] * 20, batch_size=4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
[first, *_] = model.rank(query, [text, "退款要七天"], batch_size=4, show_progress_bar=True, return_passages=True)
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, text[slice(*first["passage"])][-12:]]))
"""


@pytest.mark.slow
def test_a_document_of_a_million_characters_is_scored_in_bounded_memory_with_a_bar():
    done = subprocess.run([sys.executable, "-c", MILLION, str(ROOT), TINY, "100000"], capture_output=True, text=True)
    kilobytes, passage = json.loads(done.stdout)
    assert passage.endswith("的充电触点。") and "Scoring: 100%" in done.stderr
    assert kilobytes < 600_000, "an Encoding of all its tokens, and the ids of its passages"


# ---- A run -----------------------------------------------------------------------------------------------------------
def rows_of_lists(queries=24):
    """Lists of three, mostly long: the relevant document tells at its end, beyond what fits in 48 tokens."""
    rows = []
    for number in range(queries):
        query = f"S{number + 10}充不进电"
        relevant = long_text(8 + number % 5, seed=number) + f"请擦净S{number + 10}的触点。"
        rows.append({"query": query, "content": relevant, "label": 1, "score": 1.0 + number % 3})
        rows.append({"query": query, "content": long_text(9, seed=100 + number), "label": 0, "score": 2.0})
        rows.append({"query": query, "content": SENTENCES[number % 5], "label": 0, "score": 0.5})
    return rows


@pytest.fixture
def settings(write_jsonl, tmp_path):
    path = write_jsonl("eval.jsonl", rows_of_lists())
    return {"model_name_or_path": TINY, "train_dataset": str(ROOT / "default_train_data.jsonl"), "eval_dataset": path,
            "output_dir": str(tmp_path / "out"), "max_len": 48, "epochs": 1, "lr": 1e-4, "mixed_precision": "no",
            "log_with": None, "long_documents": "best_passage"}  # fmt: skip


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_an_evaluation_measures_what_rank_and_predict_give_and_the_folder_keeps_it(settings, capsys):
    report = train(settings)["report"]
    said = capsys.readouterr().out
    assert re.search(r"\d\d eval pairs \(\d\d\.\d\d%\) do not fit max_len: the best of their passages counts", said)
    assert re.search("Warning: max_len truncates .* train .* training sees the beginning of a document, whatever", said)
    out = Path(settings["output_dir"])
    model = BertRerankerModel.from_pretrained(out / "final_model")
    assert model.long_documents == "best_passage" and model.max_len == 48
    rows = read_jsonl(out / "predictions.jsonl")
    scores = model.predict([(row["query"], row["content"]) for row in rows])
    np.testing.assert_allclose(scores, [row["score_after"] for row in rows], atol=1e-6, rtol=0)
    labels = np.array([row["label"] for row in rows], dtype=float)
    by_hand = np.mean([ndcg_at_k(labels[i : i + 3], scores[i : i + 3]) for i in range(0, 72, 3)])
    assert report["after"]["ndcg@10"] == pytest.approx(by_hand, abs=1e-9)
    assert "## Long documents" in (out / "final_model" / "README.md").read_text("utf-8")

    # With no word on it a saved model is measured as it was saved; "cut" takes it back.
    evaluation = {**settings, "epochs": 0, "model_name_or_path": str(out / "final_model")}
    as_saved = train({**evaluation, "long_documents": None})["report"]
    assert as_saved["after"]["ndcg@10"] == report["after"]["ndcg@10"]
    assert as_saved["retriever"] == report["retriever"]
    cut = train({**evaluation, "long_documents": "cut"})["report"]
    assert cut["after"]["ndcg@10"] < report["after"]["ndcg@10"] - 0.05
    capsys.readouterr()


def test_the_warning_of_pairs_that_are_cut_names_the_setting(settings, capsys):
    train({**settings, "long_documents": None, "epochs": 0})
    said = capsys.readouterr().out
    assert re.search(r"Warning: max_len truncates \d+ eval pairs .*; --long_documents best_passage scores all", said)


def test_training_sees_the_first_passage_so_that_weights_have_the_same_bits_either_way(settings, tmp_path):
    last = {**settings, "load_best_model_at_end": False}
    train(last)
    train({**last, "long_documents": "cut", "output_dir": str(tmp_path / "cut")})
    saved = [(tmp_path / name / "final_model" / "model.safetensors").read_bytes() for name in ("out", "cut")]
    assert saved[0] == saved[1]


def test_the_base_is_kept_where_best_passages_say_so_with_the_way_they_are_scored(settings, write_jsonl):
    rows = read_jsonl(ROOT / "default_train_data.jsonl")
    turned = write_jsonl("turned.jsonl", [{**row, "label": 1 - row["label"]} for row in rows])
    report = train({**settings, "train_dataset": turned, "lr": 1e-3, "epochs": 2, "base_interpolation": ()})["report"]
    assert report["chosen"] == "base"
    model = BertRerankerModel.from_pretrained(Path(settings["output_dir"], "final_model"))
    assert model.long_documents == "best_passage"


def test_pairs_that_are_measured_together_are_measured_by_best_passages_too(settings):
    settings = {**settings, "epochs": 0, "metric_for_best_model": "average_precision"}
    report = train(settings)["report"]
    cut = train({**settings, "long_documents": "cut"})["report"]
    assert report["metric"] == "average_precision"
    assert report["after"]["average_precision"] > cut["after"]["average_precision"] + 0.02


def test_the_mixture_of_the_report_is_that_of_best_passages(settings, tmp_path):
    model_of(max_len=48, retriever_weight=0.4).save_pretrained(tmp_path / "mixed")
    settings = {**settings, "model_name_or_path": str(tmp_path / "mixed"), "long_documents": None}
    report = train({**settings, "epochs": 0})["report"]
    rows = read_jsonl(Path(settings["output_dir"], "evaluation", "predictions.jsonl"))
    given = [row["score"] for row in read_jsonl(settings["eval_dataset"])]
    values = []
    for first in range(0, len(rows), 3):
        part = slice(first, first + 3)
        probabilities = np.array([row["score_after"] for row in rows[part]])
        mixed = mixture(np.log(probabilities / (1 - probabilities)), np.array(given[part]), 0.4)
        values.append(ndcg_at_k(np.array([row["label"] for row in rows[part]], dtype=float), mixed))
    assert report["mixed"]["weight"] == 0.4
    assert report["mixed"]["metrics"]["ndcg@10"] == pytest.approx(np.mean(values), abs=1e-9)


def test_two_processes_give_the_scores_of_one(settings, run_script, tmp_path):
    for processes in (1, 2):
        folder = tmp_path / f"by_{processes}"
        done = run_script(*command_line({**settings, "epochs": 0, "output_dir": folder}), processes=processes)
        assert done.returncode == 0, done.stdout
    paths = [tmp_path / f"by_{processes}" / "evaluation" / "predictions.jsonl" for processes in (1, 2)]
    assert_equal_but_for_rounding(*([json.loads(line) for line in path.open(encoding="utf-8")] for path in paths))


def test_a_run_that_was_stopped_goes_on_to_the_same_bits_and_not_with_another_way(settings, tmp_path):
    whole = {**settings, "epochs": 2, "output_dir": str(tmp_path / "whole")}
    train(whole)
    train_until(15, {**settings, "epochs": 2})
    with pytest.raises(UserError, match="long_documents: best_passage → cut"):
        train({**settings, "epochs": 2, "long_documents": "cut", "resume_from_checkpoint": "latest"})
    train({**settings, "epochs": 2, "resume_from_checkpoint": "latest"})
    for name in ("final_model/model.safetensors", "eval_report.json", "predictions.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


# ---- What leaves no room, or nothing ---------------------------------------------------------------------------------
def test_a_line_whose_query_leaves_its_document_no_room_is_named_before_training(settings, write_jsonl, capsys):
    rows = rows_of_lists()
    rows.insert(4, {**rows[3], "query": "充电" * 20, "content": long_text(30)})
    for row in rows:
        del row["score"]
    with pytest.raises(UserError, match=r"eval2\.jsonl: line 5: max_len 48 leaves \d+ tokens to a passage"):
        train({**settings, "eval_dataset": write_jsonl("eval2.jsonl", rows)})
    assert "Start training" not in capsys.readouterr().out
    assert not Path(settings["output_dir"], "unfinished_run").exists()


@pytest.mark.parametrize("blanks", [" ", "\n", "\u3000", " \t\n"])
def test_a_text_of_which_the_cut_leaves_blanks_alone_is_named_and_best_passage_finds_what_comes_after(
    settings, keeps_blanks, write_jsonl, capsys, blanks
):
    rows = [{"query": "lamp", "content": blanks * 100 + "The lamp is new.", "label": 1},
            {"query": "lamp", "content": "  No.", "label": 0}] * 2  # fmt: skip
    path = write_jsonl("blank.jsonl", rows)
    with pytest.raises(UserError) as error:
        train({**settings, "model_name_or_path": keeps_blanks, "train_dataset": path, "long_documents": None})
    assert re.search(r"blank\.jsonl: line 1: content begins with so many blanks that max_len leaves nothing else of it:"
                     r" take them out", str(error.value))  # fmt: skip
    capsys.readouterr()
    model = model_of(keeps_blanks, 48)
    [hit] = model.rank("lamp", [rows[0]["content"]], return_passages=True)
    assert "lamp" in rows[0]["content"][slice(*hit["passage"])] and not rows[0]["content"][: hit["passage"][0]].strip()
    assert 0 < model.predict([("lamp", blanks * 100)])[0] < 1, "an empty text can be scored"


def test_passages_of_blanks_are_none(keeps_blanks):
    model = model_of(keeps_blanks, 48)
    text = "The lamp is new." + " " * 400 + "ok"
    [(places, _)] = model.encode_passages([("lamp", text)], 48)
    assert len(places) == 2 and [bool(text[start:end].strip()) for start, end in places] == [True, True]
    [(places, encoded)] = model.encode_passages([("lamp", " " * 400)], 48)
    assert len(places) == len(encoded) == 1


@pytest.mark.parametrize("query, content", [
    ("充电" * 60, " 充电灯不亮"),  # the query leaves one token, of which a blank takes a part
    ("充电" * 60, "  \n 充电灯不亮" * 20), ("q" * 43, " 充电灯不亮"), ("q" * 42, " 充电灯不亮"),
    ("充电", " " + "😀" * 300), ("充电", "\u3000" + "𠀀" * 300),
    ("充电", " \ufffd\ufffd" * 200), ("充电", "\n" + "电" * 300),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["xlm-roberta", "bytes"])
def test_what_is_cut_and_begins_with_a_blank_is_no_error(request, kind, settings, write_jsonl, query, content):
    folder = TINY if kind == "xlm-roberta" else request.getfixturevalue("keeps_blanks")
    path = write_jsonl("blank.jsonl", [{"query": query, "content": content, "label": 1},
                                       {"query": query, "content": "不亮", "label": 0}])  # fmt: skip
    args = check_settings({**settings, "train_dataset": path, "eval_dataset": path, "long_documents": None})
    train_rows, _, paths, _ = load_data(args)
    model = model_of(folder, 48, "cut")
    assert len(RerankDataset(train_rows, paths, "train", model, args)) == 2


def test_formats_that_leave_the_texts_no_room_are_named(settings):
    forms = {"document_format": "前缀" * 15 + "{}", "query_format": "{}问"}
    for way in ("cut", "best_passage"):
        with pytest.raises(UserError, match=r"query_format and document_format take 3\d of max_len 48 tokens: shorten"):
            train({**settings, **forms, "long_documents": way})


def test_blanks_that_a_format_stands_before_are_told_too(keeps_blanks, settings, write_jsonl):
    path = write_jsonl("blank.jsonl", [{"query": "lamp", "content": " " * 500 + "new", "label": 1}])
    args = check_settings({**settings, "train_dataset": path, "long_documents": None})
    train_rows, _, paths, _ = load_data(args)
    with pytest.raises(UserError, match="line 1: content begins with so many blanks"):
        RerankDataset(train_rows, paths, "train", model_of(keeps_blanks, 48, document_format="d: {}"), args)


def test_characters_of_many_tokens_make_no_more_passages_than_there_are_characters():
    model = model_of(max_len=64)
    text = "\ufdfa" * 60 + "电" * 100  # 33 tokens each
    [(places, encoded)] = model.encode_passages([("Q", text)], 64)
    starts = [start for start, _ in places]
    assert starts == sorted(set(starts)) and [cut for *_, cut in encoded] == [0] * len(encoded)


# ---- The file of token ids -------------------------------------------------------------------------------------------
def test_token_ids_of_passages_are_kept_apart_from_those_that_are_cut(settings):
    args = check_settings(settings)
    train_rows, eval_rows, paths, _ = load_data(args)
    datasets = {}
    for way in ("cut", "best_passage"):
        model = model_of(max_len=48, way=way)
        datasets[way] = RerankDataset(eval_rows, paths, "eval", model, args)
        assert len(RerankDataset(train_rows, paths, "train", model, args)) == len(train_rows)
        pairs = [(row["query"], row["content"]) for row in read_jsonl(settings["eval_dataset"])]
        expected = [pair for _, passages in model.encode_passages(pairs, 48) for pair in passages]
        if way == "cut":
            expected = list(model.encode(pairs, 48))
        assert len(datasets[way]) == len(expected)
        for (ids, boundary, _), number in zip(expected, range(len(expected)), strict=True):
            assert np.array_equal(datasets[way][number][0], ids) and datasets[way][number][1] == boundary
    assert datasets["cut"].cache != datasets["best_passage"].cache
    assert datasets["best_passage"].counts.sum() == len(datasets["best_passage"]) > len(eval_rows)
