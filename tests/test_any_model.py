"""What a model must be: it scores here as it does elsewhere, whatever its architecture, or is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, command_line, rows_of, write_rows
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from test_model import PAIRS, logits_of, models, plain_logits, tiny_bert  # noqa: F401
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RoFormerTokenizer,
)

from train_bert_rerank import BertRerankerModel, UserError, freeze_weights_without_gradient, train

TEXTS = [
    ("怎么退款", "请在七天之内联系客服，说明订单号。" * 2),
    ("S35充不进电", "请擦净S35底部的充电触点。"),
    ("how long", "Two years, for the battery and for the lamp, if nothing was opened."),
    ("?", "no"),
]
# Small configs of architectures; the names of sizes are BERT's unless an architecture has its own.
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
OWN_SIZES = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 2},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "opt": {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 32},
    "squeezebert": {**SIZES, "embedding_size": 32},
    "roformer": {**SIZES, "embedding_size": 32},
    "eurobert": {**SIZES, "num_key_value_heads": 2},
}


def save_model(kind, folder, tokenizer=TINY, **settings):
    """A random model of `kind` with the tokenizer of a folder: its own folder, as text. Weights are large, so that
    what a model reads changes its score."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos", "cls", "sep")}
    settings = {"vocab_size": len(tokenizer), "num_labels": 1, **ids, **OWN_SIZES.get(kind, SIZES), **settings}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 6
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def edit_json(path, **changes):
    path = Path(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def plain_scores(folder, **options):
    """Logits of TEXTS as transformers computes them, one pair at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    with torch.inference_mode():
        return torch.cat([model(**tokenizer(*pair, return_tensors="pt")).logits[0] for pair in TEXTS])


def assert_scores_as_elsewhere(folder, **options):
    """Ours in one batch, transformers' one by one and CrossEncoder's give the same logits, which are not all alike."""
    reranker = BertRerankerModel.from_pretrained(folder, **options)
    plain = plain_scores(folder, **options)
    assert plain.std() > 0.01
    torch.testing.assert_close(logits_of(reranker, TEXTS), plain, rtol=0, atol=1e-5)
    peer = CrossEncoder(folder, device="cpu", **options).predict(TEXTS, activation_fn=torch.nn.Identity())
    torch.testing.assert_close(torch.from_numpy(peer).flatten(), plain, rtol=0, atol=1e-5)
    return reranker


# ---- The short cut ---------------------------------------------------------------------------------------------------
MEAN_HEAD = """
from transformers import XLMRobertaForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

class MeanHead(XLMRobertaForSequenceClassification):
    def forward(self, input_ids, attention_mask, **_):
        states = self.roberta(input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask[:, :, None].to(states)
        mean = (states * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return SequenceClassifierOutput(logits=self.classifier(mean))
"""


def test_a_head_that_reads_all_tokens_gets_them_whatever_the_name_of_its_architecture(tmp_path):
    shutil.copytree(TINY, tmp_path / "mean")
    (tmp_path / "mean" / "mean_head.py").write_text(MEAN_HEAD)
    edit_json(tmp_path / "mean" / "config.json",
              auto_map={"AutoModelForSequenceClassification": "mean_head.MeanHead"})  # fmt: skip
    assert_scores_as_elsewhere(str(tmp_path / "mean"), trust_remote_code=True)


def test_bert_and_its_likes_still_compute_the_first_token_alone(reranker, tiny_bert):  # noqa: F811
    for model in (reranker, BertRerankerModel.from_pretrained(tiny_bert)):
        assert "forward" in vars(model.model.base_model.encoder.layer[-1].attention)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_a_caller_that_lets_torch_multiply_in_less_than_fp32_can_load_a_model(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        assert BertRerankerModel.from_pretrained(TINY)
    finally:
        torch.set_float32_matmul_precision("highest")


# ---- Padding ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["fnet", "yoso"])
def test_an_architecture_whose_scores_move_with_padding_is_refused(tmp_path, kind):
    folder = save_model(kind, tmp_path)
    with pytest.raises(UserError) as refusal:
        BertRerankerModel.from_pretrained(folder)
    assert f"({kind}) cannot be used: padding, or chance, changes what it computes." in str(refusal.value)
    assert re.search(r"A pair has the score -?\d+\.\d+ here and -?\d+\.\d+ in transformers", str(refusal.value))


def test_xlnet_which_pads_on_the_left_and_has_a_segment_of_its_own_for_the_class_token_is_refused(tmp_path):
    folder = save_model("xlnet", tmp_path)
    raw = Tokenizer.from_file(f"{folder}/tokenizer.json")
    template = json.loads(raw.to_str())
    template["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}},
                 {"SpecialToken": {"id": "<s>", "type_id": 2}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(template))
    edit_json(tmp_path / "tokenizer_config.json", padding_side="left",
              model_input_names=["input_ids", "token_type_ids", "attention_mask"])  # fmt: skip
    with pytest.raises(UserError, match=r"\(xlnet\) cannot be used: "):
        BertRerankerModel.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_decoder_without_a_padding_token_is_refused_with_what_to_do(tmp_path, kind):
    settings = {"num_key_value_heads": 2} if kind == "qwen2" else {}
    folder = save_model(kind, tmp_path, **settings)
    edit_json(tmp_path / "tokenizer_config.json", pad_token=None)
    with pytest.raises(UserError, match="has no padding token.*pad_token in tokenizer_config.json"):
        BertRerankerModel.from_pretrained(folder)


def test_a_decoder_whose_config_alone_lacks_the_padding_token_is_scored_as_one_by_one_and_saved_with_it(tmp_path):
    folder = save_model("gpt2", tmp_path / "gpt2", pad_token_id=None)
    reranker = BertRerankerModel.from_pretrained(folder)
    torch.testing.assert_close(logits_of(reranker, TEXTS), plain_scores(folder), rtol=0, atol=1e-5)
    reranker.save_pretrained(tmp_path / "saved")
    assert_scores_as_elsewhere(str(tmp_path / "saved"))


# ---- Segments --------------------------------------------------------------------------------------------------------
def test_a_roberta_with_one_segment_and_a_bert_tokenizer_scores_pairs_here_and_once_saved_everywhere(
    tmp_path, tiny_bert  # noqa: F811
):
    folder = save_model("roberta", tmp_path / "one", tiny_bert, type_vocab_size=1)
    with pytest.raises(IndexError):
        plain_scores(folder)
    reranker = BertRerankerModel.from_pretrained(folder)
    ours = logits_of(reranker, TEXTS)
    reranker.save_pretrained(tmp_path / "saved")
    assert_scores_as_elsewhere(str(tmp_path / "saved"))
    torch.testing.assert_close(plain_scores(tmp_path / "saved"), ours, rtol=0, atol=1e-5)


def test_the_tokenizer_of_a_saved_distilbert_makes_no_segment_ids_in_servers_with_transformers_4(
    tmp_path, tiny_bert  # noqa: F811
):
    reranker = BertRerankerModel.from_pretrained(save_model("distilbert", tmp_path / "model", tiny_bert))
    reranker.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    # The class that transformers 4 takes where transformers 5 has written TokenizersBackend.
    tokens = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")("问", "答")
    assert set(tokens) == {"input_ids", "attention_mask"}
    assert_scores_as_elsewhere(str(tmp_path / "saved"))


def test_a_bert_keeps_its_two_segments_when_it_is_saved(tmp_path, tiny_bert):  # noqa: F811
    folder = save_model("bert", tmp_path / "model", tiny_bert)
    BertRerankerModel.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    tokens = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")("问", "答")
    assert tokens["token_type_ids"] == [0, 0, 0, 1, 1]
    assert_scores_as_elsewhere(str(tmp_path / "saved"))


# ---- What a folder lacks ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["deberta-v2", "xlm-roberta", "bert"])
def test_a_folder_without_tokenizer_files_is_refused_whatever_tokenizer_transformers_makes_up(tmp_path, kind):
    folder = save_model(kind, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="okenizer"):
        BertRerankerModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "fewer"),
    [("modernbert", {"num_hidden_layers": 1, "layer_types": ["full_attention"]}),
     ("eurobert", {"num_hidden_layers": 1}), ("xlm", {"n_layers": 1}), ("gpt2", {"n_layer": 1})],
)  # fmt: skip
def test_a_config_with_fewer_layers_than_the_weights_is_refused_whatever_layers_are_called(tmp_path, kind, fewer):
    folder = save_model(kind, tmp_path)
    assert BertRerankerModel.from_pretrained(folder)
    edit_json(tmp_path / "config.json", **fewer)
    with pytest.raises(UserError, match=r"lacks \d+ weights of its encoder: .*\.1\."):
        BertRerankerModel.from_pretrained(folder)


def test_weights_beside_the_encoder_such_as_a_head_for_pretraining_are_no_lost_layer(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    weights = load_file(f"{TINY}/model.safetensors")
    weights.update({"lm_head.layers.0.weight": torch.zeros(4), "cls.predictions.1.bias": torch.zeros(4)})
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert BertRerankerModel.from_pretrained(str(tmp_path / "model"))


@pytest.fixture(scope="module")
def in_modules(tmp_path_factory):
    """Folder of a CrossEncoder whose head is a Dense module behind the pooled encoder."""
    folder = tmp_path_factory.mktemp("modules")
    encoder = Transformer(TINY)
    pooling = Pooling(encoder.get_embedding_dimension(), pooling_mode="cls")
    head = Dense(encoder.get_embedding_dimension(), 1, activation_function=torch.nn.Identity())
    CrossEncoder(modules=[encoder, pooling, head], device="cpu").save_pretrained(str(folder))
    return folder


def test_a_cross_encoder_whose_head_lies_in_modules_is_refused_rather_than_given_a_new_one(in_modules):
    with pytest.raises(UserError, match=r"modules of theirs \(Transformer, Pooling, Dense\)"):
        BertRerankerModel.from_pretrained(str(in_modules))


def test_the_way_out_that_the_refusal_names_starts_from_the_encoder_with_a_new_head(in_modules, tmp_path):
    shutil.copytree(in_modules, tmp_path / "copy")
    (tmp_path / "copy" / "modules.json").unlink()
    assert BertRerankerModel.from_pretrained(str(tmp_path / "copy")).new_weights


def test_a_prompt_of_sentence_transformers_is_refused_and_what_is_advised_gives_its_scores(tmp_path):
    folder = tmp_path / "prompted"
    prompted = CrossEncoder(TINY, device="cpu", prompts={"query": "查询："}, default_prompt_name="query")
    prompted.save_pretrained(str(folder))
    expected = CrossEncoder(str(folder), device="cpu").predict(TEXTS)
    with pytest.raises(UserError, match="puts '查询：' before each query.* give --query_format '查询：{}'"):
        BertRerankerModel.from_pretrained(str(folder))
    edit_json(folder / "config_sentence_transformers.json", default_prompt_name=None)
    reranker = BertRerankerModel.from_pretrained(str(folder))
    reranker.model.config.query_format = "查询：{}"
    assert reranker.predict(TEXTS) == pytest.approx(expected, abs=1e-6)


def test_a_cross_encoder_and_an_embedding_model_saved_by_sentence_transformers_are_loaded(tmp_path):
    CrossEncoder(TINY, device="cpu").save_pretrained(str(tmp_path / "cross_encoder"))
    assert not assert_scores_as_elsewhere(str(tmp_path / "cross_encoder")).new_weights
    AutoModel.from_pretrained(TINY).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "encoder")
    encoder = Transformer(str(tmp_path / "encoder"))
    dense = Dense(encoder.get_embedding_dimension(), 16)
    modules = [encoder, Pooling(encoder.get_embedding_dimension()), dense]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "embedding"))
    assert BertRerankerModel.from_pretrained(str(tmp_path / "embedding")).new_weights


# ---- RoFormer, and what its kind has of its own ----------------------------------------------------------------------
@pytest.fixture(scope="module")
def roformer(tmp_path_factory):
    """Folder of a RoFormer with its own tokenizer, which cuts Chinese by a Python function, and 64 positions."""
    folder = tmp_path_factory.mktemp("roformer")
    characters = sorted({*"".join(sum(TEXTS, ())).lower(), *"第问怎么办请看说明书。0123456789"} - {" "})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]))
    RoFormerTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "tokenizer")
    return save_model("roformer", folder / "model", folder / "tokenizer", max_position_embeddings=64)


@pytest.fixture
def run_settings(write_jsonl, tmp_path):
    """Settings of a run of two steps."""
    return {
        "train_dataset": write_jsonl("train.jsonl", rows_of(32, 4)), "eval_dataset": None, "epochs": 1, "max_len": 32,
        "mixed_precision": "no", "log_with": None, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip


def test_a_tokenizer_with_a_part_in_python_is_trained_with_and_scores_as_elsewhere(roformer, run_settings, tmp_path):
    train({**run_settings, "model_name_or_path": roformer, "max_len": 64})
    assert_scores_as_elsewhere(str(tmp_path / "out" / "final_model"))


@pytest.mark.parametrize("kind, usable", [("roformer", 64), ("gpt2", 64), ("opt", 64), ("xlm", 64)])
def test_max_len_is_the_number_of_positions_whatever_their_table_is_called(tmp_path, kind, usable):
    reranker = BertRerankerModel.from_pretrained(save_model(kind, tmp_path, max_position_embeddings=64))
    reranker.tokenizer.model_max_length = 10**9
    assert reranker.max_len == usable
    assert reranker.predict([("问", "答" * 200)])[0] >= 0, "the longest pair that fits is scored"


def test_no_weight_is_trained_on_which_no_score_depends(roformer):
    reranker = BertRerankerModel.from_pretrained(roformer)
    freeze_weights_without_gradient(reranker)
    reranker.train()(reranker.preprocess(TEXTS, 64), torch.zeros(4))["loss"].backward()
    trained = {name for name, weight in reranker.named_parameters() if weight.requires_grad}
    with_gradient = {name for name, weight in reranker.named_parameters() if weight.grad is not None}
    assert trained == with_gradient < {name for name, _ in reranker.named_parameters()}


@pytest.mark.slow
def test_two_processes_train_a_model_with_weights_that_get_no_gradient(roformer, run_settings, run_script):
    result = run_script(*command_line({**run_settings, "model_name_or_path": roformer}), processes=2)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("Model saved successfully!") == 1


def test_gradient_checkpointing_where_an_architecture_has_none_is_refused_by_name(tmp_path, run_settings):
    folder = save_model("squeezebert", tmp_path / "model")
    with pytest.raises(UserError, match="gradient_checkpointing: transformers has none for squeezebert") as refusal:
        train({**run_settings, "model_name_or_path": folder, "gradient_checkpointing": True})
    assert refusal.value.exit_status == 2


# ---- A base that could not rank --------------------------------------------------------------------------------------
def test_a_base_whose_head_was_drawn_at_random_is_said_to_be_no_ranker_in_verdict_and_report(
    tmp_path, run_settings, capsys
):
    AutoModel.from_pretrained(TINY).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "encoder")
    evaluation = write_rows(tmp_path / "eval.jsonl", rows_of(24, 4))
    for base, has_new_head in ((str(tmp_path / "encoder"), True), (TINY, False)):
        for epochs in (1, 0):
            result = train({**run_settings, "model_name_or_path": base, "eval_dataset": evaluation, "epochs": epochs})
            said = "The base could not rank: its head was drawn at random." in capsys.readouterr().out
            assert result["report"]["base_has_new_head"] is has_new_head
            assert said == (has_new_head and epochs == 1)


def test_the_pairs_that_the_look_at_loading_scores_fit_models_with_few_positions(tmp_path, tiny_bert):  # noqa: F811
    folder = save_model("bert", tmp_path, tiny_bert, max_position_embeddings=24)
    reranker = BertRerankerModel.from_pretrained(folder)
    assert reranker.max_len == 24
    torch.testing.assert_close(logits_of(reranker, PAIRS[3:]), plain_logits(folder, PAIRS[3:]), rtol=0, atol=1e-5)
    edit_json(tmp_path / "tokenizer_config.json", model_max_length=8)
    with pytest.raises(UserError, match="it takes 8 tokens, which is too few for a pair"):
        BertRerankerModel.from_pretrained(folder)


# ---- What an outside tester tried ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, said", [("fnet", "padding, or chance"), ("xlm-roberta", None)])
def test_a_head_of_zeros_hides_nothing_and_stays_as_it_is(tmp_path, kind, said):
    folder = save_model(kind, tmp_path)
    weights = load_file(f"{folder}/model.safetensors")
    [name] = [name for name in weights if re.fullmatch(r"classifier(\.out_proj)?\.weight", name)]
    weights[name].zero_()
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    if said:
        with pytest.raises(UserError, match=said):
            BertRerankerModel.from_pretrained(folder)
    else:
        assert not BertRerankerModel.from_pretrained(folder).model.get_parameter(name).any()


def test_what_a_tokenizer_would_do_otherwise_elsewhere_is_saved_as_it_is_done_here(tmp_path, tiny_bert):  # noqa: F811
    folder = save_model("bert", tmp_path / "model", tiny_bert)
    edit_json(tmp_path / "model" / "tokenizer_config.json", padding_side="left",
              model_input_names=["input_ids", "token_type_ids"])  # fmt: skip
    BertRerankerModel.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert_scores_as_elsewhere(str(tmp_path / "saved"))


@pytest.mark.parametrize("kind", ["xlm-roberta", "electra", "gpt2"])
def test_a_config_without_any_layer_is_refused(tmp_path, kind):
    folder = save_model(kind, tmp_path)
    edit_json(tmp_path / "config.json", **({"n_layer": 0} if kind == "gpt2" else {"num_hidden_layers": 0}))
    with pytest.raises(UserError, match=r"lacks \d+ weights of its encoder"):
        BertRerankerModel.from_pretrained(folder)


def test_a_trained_head_of_two_classes_is_said_to_be_there_and_not_used(tmp_path, run_settings, capsys):
    folder = save_model("xlm-roberta", tmp_path / "two", num_labels=2)
    train({**run_settings, "model_name_or_path": folder})
    assert "The head that is there has another number of outputs than one: it is not used." in capsys.readouterr().out
    train({**run_settings, "model_name_or_path": TINY})
    assert "number of outputs" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["modules.json", "config_sentence_transformers.json"])
@pytest.mark.parametrize("content", ["[", "[1]", '[{"path": ""}]'])
def test_damaged_settings_of_sentence_transformers_are_named(in_modules, tmp_path, name, content):
    shutil.copytree(in_modules, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text(content)
    with pytest.raises(UserError, match="one of modules.json, config_sentence_transformers.json is damaged"):
        BertRerankerModel.from_pretrained(str(tmp_path / "copy"))
