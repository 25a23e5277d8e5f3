"""The model: tokens, formats, saving and loading, and what happens where a checkpoint or the hub is not as hoped."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    T5Config,
    T5Model,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

from train_bert_rerank import BertRerankerModel, UserError, seed_everything, train

PAIRS = [
    ("怎么退款", "请在七天之内联系客服，说明订单号。"),
    ("S35充不进电", "请擦净S35底部的充电触点，再把它推回充电座。" * 4),
    ("a</s>b", "Tokens that look special: <s> [SEP] [CLS] and <pad>."),
    ("how", "?"),
]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_bert(models):
    """Folder of a BERT with one logit and 64 positions; its WordPiece tokenizer marks segments with token types."""
    folder = models / "tiny_bert"
    folder.mkdir()
    characters = sorted({*"".join(sum(PAIRS, ())).lower(), *"第问怎么办请看说明书。0123456789"} - {" "})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{one}" for one in characters), "special"]
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=1000)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(pieces), max_position_embeddings=64, num_labels=1, **shape)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", params=["tiny_reranker", "tiny_bert"])
def folder(request, tiny_bert):
    return TINY if request.param == "tiny_reranker" else tiny_bert


@pytest.fixture(scope="session")
def model(folder):
    return BertRerankerModel.from_pretrained(folder).eval()


@pytest.fixture
def changed(tmp_path):
    """changed(weights=…, without=…, config=…) -> folder of tiny_reranker with these changes."""

    def change(weights=None, without=(), **config):
        target = tmp_path / f"model_{len(os.listdir(tmp_path))}"
        shutil.copytree(TINY, target)
        for name in without:
            (target / name).unlink()
        if weights is not None:
            save_file(weights, target / "model.safetensors", {"format": "pt"})
        if config:
            old = json.loads((target / "config.json").read_text())
            (target / "config.json").write_text(json.dumps({**old, **config}))
        return str(target)

    return change


def tiny_weights():
    return load_file(f"{TINY}/model.safetensors")


def logits_of(model, pairs):
    with torch.inference_mode():
        return model.eval()(model.preprocess(pairs))["logits"].squeeze(-1)


def plain_logits(folder, pairs, **options):
    """The logits as transformers computes them, with none of our code."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(pairs, padding=True, return_tensors="pt", **options)
    with torch.inference_mode():
        return model(**tokens).logits.squeeze(-1)


# ---- Tokens ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pairs", [PAIRS[:1], PAIRS[2:], [*PAIRS[::3], PAIRS[2]]], ids=len)
def test_pairs_that_fit_become_the_tokens_of_the_tokenizers_own_call(model, pairs):
    ours, theirs = model.preprocess(pairs), model.tokenizer(pairs, padding=True, return_tensors="pt")
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_bert_gets_token_types_and_an_xlm_roberta_none(model):
    tokens = model.preprocess(PAIRS[:2], max_len=60)
    assert ("token_type_ids" in tokens) == (model.model.config.model_type == "bert")
    assert {tensor.dtype for tensor in tokens.values()} == {torch.int64}


@settings(max_examples=80, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(query=st.integers(1, 40), document=st.integers(1, 60), max_len=st.integers(8, 50))
def test_truncation_cuts_the_document_alone_and_a_query_only_where_it_leaves_no_room(model, query, document, max_len):
    pair = ("问怎么办" * 10)[:query], ("请看说明书。" * 10)[:document]
    tokenizer = model.tokenizer
    query_ids, document_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair)
    assert (len(query_ids), len(document_ids)) == (query, document), "one token a character"
    room = max_len - tokenizer.num_special_tokens_to_add(pair=True)
    [(ids, _, cut)] = model.encode([pair], max_len)
    tokens = model.preprocess([pair], max_len)
    assert cut == (query + document > room) + (query + document > room and query >= room)
    assert tokens["input_ids"].tolist() == [ids.tolist()]
    assert len(ids) == min(max_len, query + document + max_len - room)
    if cut < 2:
        reference = tokenizer(*pair, truncation="only_second", max_length=max_len, return_tensors="pt")
    else:  # transformers raises here; by hand: all but one token to the query, one to the document
        reference = tokenizer(pair[0][: room - 1], pair[1][:1], return_tensors="pt")
    for name in reference:
        assert torch.equal(tokens[name], reference[name]), name


def test_an_empty_document_is_scored_like_any_other(model):
    with torch.inference_mode():
        logits = model.model(**model.tokenizer([("how", "")], return_tensors="pt")).logits.squeeze(-1)
    assert torch.allclose(logits_of(model, [("how", "")]), logits, atol=1e-6)


@pytest.mark.parametrize("kind, positions, usable", [("tiny_reranker", 514, 512), ("tiny_bert", 64, 64)])
def test_max_len_is_the_number_of_tokens_that_the_model_can_take(tiny_bert, kind, positions, usable):
    model = BertRerankerModel.from_pretrained(TINY if kind == "tiny_reranker" else tiny_bert).eval()
    model.tokenizer.model_max_length = 10**30  # what transformers writes where the tokenizer has no limit of its own
    assert (model.model.config.max_position_embeddings, model.max_len) == (positions, usable)
    long = [("how", "书" * 600)]
    with torch.inference_mode():
        tokens = model.preprocess(long, usable)
        assert tokens["input_ids"].shape == (1, usable) and model(tokens)["logits"].isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(model.collate(list(model.encode(long, usable + 1))))


def test_a_tokenizer_that_allows_less_than_the_positions_sets_max_len(tmp_path):
    model = BertRerankerModel.from_pretrained(TINY)
    model.tokenizer.model_max_length = 100
    model.save_pretrained(tmp_path)
    assert BertRerankerModel.from_pretrained(str(tmp_path)).max_len == 100


@pytest.mark.parametrize("max_len", [65, 100_000])
def test_train_refuses_a_max_len_that_the_model_cannot_take_with_exit_status_2(
    tiny_bert, write_jsonl, tmp_path, max_len
):
    output_dir = tmp_path / "output"
    with pytest.raises(UserError, match=f"^max_len {max_len}: .*tiny_bert.* takes 64 ") as error:
        train({
            "model_name_or_path": tiny_bert, "train_dataset": write_jsonl("data.jsonl", rows_of(2)), "max_len": max_len,
            "output_dir": str(output_dir),
        })  # fmt: skip
    assert error.value.exit_status == 2 and not output_dir.exists()


# ---- Formats ---------------------------------------------------------------------------------------------------------
def test_formats_are_applied_in_training_kept_in_config_json_and_applied_again_after_loading(write_jsonl, tmp_path):
    formats = {"query_format": "问：{}", "document_format": "{} [完]"}
    train({
        "model_name_or_path": TINY, "train_dataset": write_jsonl("data.jsonl", rows_of(4)), "eval_dataset": None,
        "output_dir": str(tmp_path / "output"), "mixed_precision": "no", "log_with": None, "epochs": 1, **formats,
    })  # fmt: skip
    final_model = str(tmp_path / "output" / "final_model")
    config = json.loads(Path(final_model, "config.json").read_text(encoding="utf-8"))
    assert {key: config[key] for key in formats} == formats
    loaded = BertRerankerModel.from_pretrained(final_model)
    texts = [(f"问：{query}", f"{document} [完]") for query, document in PAIRS]
    tokens = AutoTokenizer.from_pretrained(TINY)(texts, padding=True, return_tensors="pt")
    assert torch.equal(loaded.preprocess(PAIRS)["input_ids"], tokens["input_ids"])
    assert torch.allclose(logits_of(loaded, PAIRS), plain_logits(final_model, texts), atol=1e-6)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(logits_of(BertRerankerModel.from_pretrained(str(again)), PAIRS), logits_of(loaded, PAIRS))


def test_braces_in_a_text_stay_as_they_are():
    model = BertRerankerModel.from_pretrained(TINY)
    model.model.config.update({"query_format": "<{}>", "document_format": "{}: {x}"})
    pairs, texts = [("{} {0} {{}}", "%s {}")], [("<{} {0} {{}}>", "%s {}: {x}")]
    ids = model.preprocess(pairs)["input_ids"]
    assert torch.equal(ids, model.tokenizer(texts, return_tensors="pt")["input_ids"])


def test_the_padding_of_a_longer_neighbour_changes_no_logit(model):
    together = logits_of(model, [PAIRS[0], PAIRS[3]])
    alone = torch.cat([logits_of(model, [PAIRS[0]]), logits_of(model, [PAIRS[3]])])
    assert torch.allclose(together, alone, atol=1e-6)


# ---- Saving and loading ----------------------------------------------------------------------------------------------
def test_the_logits_are_those_of_plain_transformers_before_saving_and_after(folder, model, tmp_path):
    pairs = [PAIRS[0], *PAIRS[2:]]
    expected = logits_of(model, pairs)
    assert torch.allclose(expected, plain_logits(folder, pairs), atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = BertRerankerModel.from_pretrained(str(tmp_path))
    assert loaded.new_weights == []
    assert torch.equal(logits_of(loaded, pairs), expected)
    assert torch.allclose(plain_logits(str(tmp_path), pairs), expected, atol=1e-6)


def test_the_loss_is_the_mean_bce_with_logits_of_soft_labels_and_none_without_labels(model):
    labels, tokens = torch.tensor([1, 0.25, 0, 0.73]), model.preprocess(PAIRS, max_len=60)
    with torch.inference_mode():
        out = model(tokens, labels)
        assert model(tokens)["loss"] is None
    probabilities = out["logits"].double().squeeze(-1).sigmoid()
    expected = -(labels * probabilities.log() + (1 - labels) * (1 - probabilities).log()).mean()
    assert out["logits"].shape == (4, 1) and out["loss"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_saved_weights_are_fp32_in_safetensors_and_nothing_else(model, tmp_path):
    model.save_pretrained(tmp_path)
    suffixes = [path.suffix for path in tmp_path.iterdir() if path.suffix not in (".json", ".txt")]  # of a vocabulary
    assert suffixes == [".safetensors"]
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_checkpoint_is_loaded_and_saved_as_fp32(changed, tmp_path, dtype):
    weights = {name: weight.to(dtype) for name, weight in tiny_weights().items()}
    model = BertRerankerModel.from_pretrained(changed(weights, dtype=str(dtype).removeprefix("torch.")))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    for name, weight in model.model.state_dict().items():
        assert torch.equal(weight, weights[name].float()), name
    model.save_pretrained(tmp_path / "saved")
    assert {weight.dtype for weight in load_file(tmp_path / "saved" / "model.safetensors").values()} == {torch.float32}
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").dtype == torch.float32


def test_pytorch_model_bin_with_nothing_but_weights_is_loaded(changed, reranker):
    folder = changed(without=["model.safetensors"])
    torch.save(tiny_weights(), f"{folder}/pytorch_model.bin")
    assert torch.equal(logits_of(BertRerankerModel.from_pretrained(folder), PAIRS), logits_of(reranker, PAIRS))


class MarksThatItRan:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pytorch_model_bin_that_needs_more_than_weights_is_refused_and_its_code_is_not_run(changed, tmp_path):
    folder, mark = changed(without=["model.safetensors"]), tmp_path / "the_code_ran"
    torch.save({**tiny_weights(), "extra": MarksThatItRan(str(mark))}, f"{folder}/pytorch_model.bin")
    with pytest.raises(UserError, match=f"^cannot load {folder}: "):
        BertRerankerModel.from_pretrained(folder)
    assert not mark.exists()


def test_code_in_a_checkpoint_is_not_run_unless_asked_for(changed, tmp_path):
    folder, mark = changed(auto_map={"AutoConfig": "theirs.Config"}, model_type="theirs"), tmp_path / "the_code_ran"
    Path(folder, "theirs.py").write_text(
        f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\n"
        "from transformers import PretrainedConfig\nclass Config(PretrainedConfig):\n    model_type = 'theirs'\n"
    )
    with pytest.raises(UserError):
        BertRerankerModel.from_pretrained(folder)
    assert not mark.exists()


# ---- New heads -------------------------------------------------------------------------------------------------------
def save_encoder(kind, folder):
    """A checkpoint without a one-logit head -> (the names of its head, its weights)."""
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(TINY)
    if kind == "two_labels":
        config.num_labels = 2
        model, head = XLMRobertaForSequenceClassification(config), ["out_proj.bias", "out_proj.weight"]
    else:
        model = XLMRobertaModel(config, add_pooling_layer=kind == "with_pooler")
        head = ["dense.bias", "dense.weight", "out_proj.bias", "out_proj.weight"]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return [f"classifier.{name}" for name in head], model.state_dict()


@pytest.mark.parametrize("kind", ["with_pooler", "without_pooler", "two_labels"])
def test_a_checkpoint_without_a_one_logit_head_gets_a_new_one_that_depends_on_the_seed_only(tmp_path, kind):
    head, saved = save_encoder(kind, tmp_path)
    states = []
    for seed in (7, 7, 8):
        np.random.rand(len(states))
        torch.rand(1 + len(states))
        seed_everything(seed)
        model = BertRerankerModel.from_pretrained(str(tmp_path))
        assert model.new_weights == head
        assert logits_of(model, PAIRS).shape == (4,)
        states.append(model.model.state_dict())
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["classifier.out_proj.weight"], other["classifier.out_proj.weight"])
    kept = [name for name in first if name not in head]
    for name in kept:
        assert torch.equal(first[name], saved[name.removeprefix("" if kind == "two_labels" else "roberta.")]), name
    assert len(kept) > 50


def test_train_says_which_weights_are_new_and_draws_the_same_ones_for_the_same_seed(
    tiny_bert, write_jsonl, tmp_path, capsys, small_pictures
):
    encoder, checksums = str(tmp_path / "encoder"), []
    shutil.copytree(tiny_bert, encoder)
    BertModel.from_pretrained(tiny_bert).save_pretrained(encoder)
    for seed in (3, 3, 4):
        run = train({
            "model_name_or_path": encoder, "train_dataset": write_jsonl("data.jsonl", rows_of(4)), "seed": seed,
            "output_dir": str(tmp_path / "output"), "mixed_precision": "no", "log_with": None, "epochs": 1,
            "eval_dataset": None, "max_len": 32,
        })  # fmt: skip
        said = f"Not in {encoder}, so drawn with seed {seed}: classifier.bias, classifier.weight\n"
        assert said in capsys.readouterr().out
        checksums.append(run["base_sha256"])
    assert checksums[0] == checksums[1] != checksums[2]


# ---- What cannot be loaded -------------------------------------------------------------------------------------------
def cut_short(folder):
    Path(folder, "model.safetensors").write_bytes(Path(TINY, "model.safetensors").read_bytes()[:100_000])


def broken_json(folder):
    Path(folder, "config.json").write_text('{"model_type": "xlm-roberta",')


def without_a_layer(folder):
    weights = {name: weight for name, weight in tiny_weights().items() if ".layer.1." not in name}
    save_file(weights, Path(folder, "model.safetensors"), {"format": "pt"})


def other_vocabulary(folder):
    weights = tiny_weights()
    weights["roberta.embeddings.word_embeddings.weight"] = torch.zeros(50, 128)
    save_file(weights, Path(folder, "model.safetensors"), {"format": "pt"})


def remove(*names):
    return lambda folder: [Path(folder, name).unlink() for name in names]


BROKEN_FOLDERS = {
    "no_config": (remove("config.json"), "cannot load"),
    "broken_config": (broken_json, "cannot load .* not a valid JSON file"),
    "no_tokenizer_json": (remove("tokenizer.json"), "cannot load"),
    "no_tokenizer_at_all": (remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "no_weights": (remove("model.safetensors"), "cannot load .* no file named .*model.safetensors"),
    "weights_cut_short": (cut_short, "cannot load"),
    "a_layer_missing": (without_a_layer, r"lacks 16 weights of its encoder: roberta\.encoder\.layer\.1\."),
    "other_vocabulary": (other_vocabulary, r"lacks 1 weights of its encoder: roberta\.embeddings\.word_embeddings"),
}


@pytest.mark.parametrize("damage, reason", BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)
def test_a_folder_that_lacks_something_is_refused_by_name_without_a_traceback(changed, damage, reason):
    folder = changed()
    damage(folder)
    with pytest.raises(UserError, match=f"(?s){folder}") as error:
        BertRerankerModel.from_pretrained(folder)
    assert error.value.exit_status == 1
    error.match(f"(?s){reason}")
    assert "Traceback" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_decoder_is_refused_as_no_bert_family_encoder(tmp_path, kind):
    if kind == "bart":
        parts = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
        sides = {f"{side}_{part}": size for side in ("encoder", "decoder") for part, size in parts.items()}
        model = BartModel(BartConfig(vocab_size=7124, d_model=16, max_position_embeddings=64, **sides))
    else:
        model = T5Model(T5Config(vocab_size=7124, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path} is no BERT-family encoder .* but {kind}"):
        BertRerankerModel.from_pretrained(str(tmp_path))


def test_a_bert_with_nothing_but_vocab_txt_for_a_tokenizer_is_loaded(tiny_bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "vocab.txt"]
    ours, complete = BertRerankerModel.from_pretrained(str(folder)), BertRerankerModel.from_pretrained(tiny_bert)
    assert torch.equal(ours.preprocess(PAIRS, 60)["input_ids"], complete.preprocess(PAIRS, 60)["input_ids"])


# ---- Network ---------------------------------------------------------------------------------------------------------
def test_a_local_model_is_loaded_scored_and_saved_without_a_look_at_the_network(monkeypatch, tmp_path):
    looks = []

    def refuse(*arguments, **options):
        looks.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    model = BertRerankerModel.from_pretrained(TINY)
    model.predict(PAIRS)
    model.save_pretrained(tmp_path)
    BertRerankerModel.from_pretrained(str(tmp_path))
    assert looks == []
    with pytest.raises(UserError, match="the hub is out of reach"):
        BertRerankerModel.from_pretrained("nobody/no-such-model")
    assert looks, "a look at the network would have been seen"


def start_without_hub(port, folder, *arguments):
    """Start the script in `folder`, which is HF_HOME too, with http://127.0.0.1:port for a hub and no proxy."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(key, None)
    environment |= {"HF_HOME": str(folder), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "OMP_NUM_THREADS": "1"}
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows_of(4))))
    settings = ("--train_dataset=data.jsonl", "--epochs=1", "--log_with=None", "--mixed_precision=no", *arguments)
    command = [sys.executable, str(ROOT / "train_bert_rerank.py"), "--output_dir=output", *settings]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_hub_that_never_answers_ends_within_15_seconds_in_the_three_ways_out(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts; nobody ever answers
        run = start_without_hub(silent.getsockname()[1], tmp_path, "--model_name_or_path=org/some-reranker")
        assert run.stdout.readline().startswith("Training Args"), "Python and torch have started"
        start = time.perf_counter()
        said, _ = run.communicate(timeout=90)
        seconds = time.perf_counter() - start
    assert run.returncode == 1 and "Traceback" not in said
    assert "Error: org/some-reranker is no folder, not in the cache, and the hub is out of reach" in said
    for way_out in ("path/to/the/folder", "HF_ENDPOINT=https://", "--model_name_or_path tiny_reranker"):
        assert way_out in said
    assert seconds < 15
    assert not (tmp_path / "output").exists()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def run_from_cache(tmp_path_factory):
    """run.json of a run from a complete local cache, while the hub refuses connections."""
    folder = tmp_path_factory.mktemp("hub_home")
    cached = folder / "hub" / "models--org--some-reranker"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    shutil.copytree(TINY, cached / "snapshots" / COMMIT)
    with socket.socket() as closed:  # bound, but not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        run = start_without_hub(closed.getsockname()[1], folder, "--model_name_or_path=org/some-reranker")
        said, _ = run.communicate(timeout=90)
    assert run.returncode == 0, said
    return json.loads((folder / "output" / "run.json").read_text(encoding="utf-8"))


def test_a_complete_local_cache_is_used_at_once_while_the_hub_is_dead(run_from_cache):
    assert run_from_cache["seconds"]["preparation"] < 8
    digest = hashlib.sha256()
    for weight in AutoModelForSequenceClassification.from_pretrained(TINY).state_dict().values():
        digest.update(weight.numpy().tobytes())
    assert run_from_cache["base_sha256"] == digest.hexdigest()


def test_the_revision_of_a_hub_model_is_recorded_in_run_json(run_from_cache):
    assert run_from_cache["base_revision"] == COMMIT


def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(tmp_path):
    for name in (str(tmp_path / "no" / "such" / "folder"), "./no/such/folder", f"{TINY}/config.json"):
        with pytest.raises(UserError, match=f"^{name} is no local folder"):
            BertRerankerModel.from_pretrained(name)


def test_a_long_query_with_a_long_document_takes_no_memory_beyond_their_tokens(reranker):
    import resource

    [(ids, _, cut)] = reranker.encode([("问" * 600, "答" * 5000)], 512)
    assert (len(ids), cut) == (512, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    list(reranker.encode([("问" * 2000, "答" * 2000)], 512))  # 3 GB if a cut kept all its pieces
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_integer_and_double_labels_give_the_loss_of_floats(reranker):
    batch = reranker.preprocess([("问题", "回答"), ("问题", "别的")])
    losses = [reranker(batch, torch.tensor([1, 0], dtype=dtype))["loss"] for dtype in (torch.int64, torch.float64)]
    assert losses[0] == losses[1] == reranker(batch, torch.tensor([1.0, 0.0]))["loss"]
    assert losses[0].dtype == losses[1].dtype == torch.float32
