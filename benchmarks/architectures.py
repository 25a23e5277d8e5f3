"""What comes out of each architecture: the scores of transformers before and after training, or a
refusal.

    python benchmarks/architectures.py [MODEL ...]
    python benchmarks/architectures.py > docs/architectures.md

Small random models of the architectures with a sequence-classification head in transformers, each
with a tokenizer of its kind's conventions, and some folders that are not as they seem. The
weights are strong: logits of different pairs differ, and whoever ignores padding or segments gets
others. Each model is loaded by the script, trained for two steps and loaded again. Both times its
logits are compared with those of transformers, one pair at a time, and of sentence-transformers'
CrossEncoder, in padded batches. Each model has a process of its own, which is forked after the
imports. Prints a page in Markdown; the exit status is 1 where a model is neither equal nor refused.
"""

import gc
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5  # of a logit, absolute
LIMIT = 300  # seconds that a model may take


# ---- Texts ---------------------------------------------------------------------------------------
# Torch, transformers and tokenizers are imported in functions alone: load_script() first says how
# many threads they may use.
ENGLISH = [
    ("reset", "Hold the power button for ten seconds."),
    (
        "how long does the battery last?",
        "About six hours with the screen on, less when it is cold.",
    ),
    ("return policy", "You may return what you bought within fourteen days."),
    ("can it be washed", "No."),
    (
        "which plug do I need in another country?",
        "A plain adapter is enough; the charger takes both.",
    ),
    ("the lamp blinks red", "The filter is full: take it out, rinse it, and let it dry for a day."),
]
STRONG_SPREAD = 1.1  # standard deviation of a strong model's logits
GAINS = (1, 2)  # how strong the matrices are, by turns: which rounds less differs by architecture
MOST_ROUNDING = TOLERANCE / 3  # that the logits of a strong model have in fp32
MOST_DRAWS = 40  # of weights, to find such
VISIBLE = 1000 * TOLERANCE  # what ignoring the padding or the segments changes at least
TRAINED = 1e-3  # what training changes at least


@cache
def default_rows(name):
    """The rows of one of the repository's data files."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def pairs_to_compare():
    """24 (query, document) pairs in two languages, of a few tokens up to a few hundred."""
    pairs = list(ENGLISH)
    rows = default_rows("default_train_data.jsonl")
    for number in range(18):
        query = rows[number]["query"]
        documents = [row["content"] for row in rows[number : number + 1 + number % 4]]
        document = " ".join(documents)
        if number % 3 == 0:
            document = document[: 3 + number]
        pairs.append((query, document))
    return pairs


def write_data(folder):
    """Rows for two optimizer steps of eight samples, some long and some short, and the lists of
    four evaluation queries."""
    train_rows = []
    for number, row in enumerate(default_rows("default_train_data.jsonl")[:16]):
        if number % 2:
            row = {**row, "content": row["content"][: 4 + number]}
        train_rows.append(row)

    eval_rows = default_rows("default_eval_data.jsonl")
    queries = list(dict.fromkeys(row["query"] for row in eval_rows))[:4]
    eval_rows = [row for row in eval_rows if row["query"] in queries]

    for name, rows in (("train.jsonl", train_rows), ("eval.jsonl", eval_rows)):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / name).write_text("\n".join(lines), encoding="utf-8")


# ---- Tokenizers ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Convention:
    """How the tokenizer of a kind of models makes a sequence of a pair."""

    kind: str  # "WordPiece", "Unigram" or "BPE"
    specials: tuple  # special tokens, in the order of their ids
    roles: dict  # the padding token and its likes
    pair: str  # as in tokenizers' TemplateProcessing
    inputs: tuple = ("input_ids", "attention_mask")
    padding_side: str = "right"

    @property
    def padding_id(self):
        if "pad_token" not in self.roles:
            return None
        return self.specials.index(self.roles["pad_token"])


WITH_SEGMENTS = ("input_ids", "token_type_ids", "attention_mask")
BERT_ROLES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
ROBERTA_ROLES = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
BERT_PAIR = "[CLS] $A [SEP] $B:1 [SEP]:1"

BERT = Convention("WordPiece", tuple(BERT_ROLES.values()), BERT_ROLES, BERT_PAIR, WITH_SEGMENTS)
DISTILBERT = replace(BERT, inputs=("input_ids", "attention_mask"))
ALBERT = replace(BERT, kind="Unigram")
FNET = replace(ALBERT, inputs=("input_ids", "token_type_ids"))
DEBERTA = replace(BERT, kind="BPE")
MODERNBERT = replace(DISTILBERT, kind="BPE", pair="[CLS] $A [SEP] $B [SEP]")
ROBERTA = Convention(
    "BPE", ("<s>", "<pad>", "</s>", "<unk>", "<mask>"), ROBERTA_ROLES, "<s> $A </s> </s> $B </s>"
)
XLM_R = replace(ROBERTA, kind="Unigram")
MPNET = replace(ROBERTA, kind="WordPiece")
T5 = replace(XLM_R, specials=("<pad>", "</s>", "<unk>", "<s>", "<mask>"), pair="$A </s> $B </s>")
XLM = replace(
    ROBERTA, specials=("<s>", "</s>", "<pad>", "<unk>", "<mask>"), pair="<s> $A </s> $B </s>"
)
XLNET_ROLES = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
XLNET = Convention(
    "Unigram",
    tuple(XLNET_ROLES.values()),
    XLNET_ROLES,
    "$A <sep> $B:1 <sep>:1 <cls>:2",
    WITH_SEGMENTS,
    padding_side="left",
)
FUNNEL = replace(
    XLNET, kind="WordPiece", pair="<cls>:2 $A <sep> $B:1 <sep>:1", padding_side="right"
)
GPT_ROLES = {"bos_token": "<|end|>", "eos_token": "<|end|>", "unk_token": "<|end|>"}
GPT = Convention("BPE", ("<|end|>",), GPT_ROLES, "$A $B")
PADDED_GPT = replace(
    GPT, specials=("<|end|>", "<|pad|>"), roles={**GPT_ROLES, "pad_token": "<|pad|>"}
)
END_PADDED_GPT = replace(GPT, roles={**GPT_ROLES, "pad_token": "<|end|>"})
LLAMA_ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
LLAMA = Convention("Unigram", ("<unk>", "<s>", "</s>", "<pad>"), LLAMA_ROLES, "<s> $A <s> $B")
PADDED_LLAMA = replace(LLAMA, roles={**LLAMA_ROLES, "pad_token": "<pad>"})
LEFT_LLAMA = replace(PADDED_LLAMA, padding_side="left")
EUROBERT = replace(
    PADDED_GPT,
    specials=("<|begin|>", "<|end|>", "<|pad|>"),
    roles={**GPT_ROLES, "bos_token": "<|begin|>", "pad_token": "<|pad|>"},
    pair="<|begin|> $A <|end|> $B <|end|>",
)


@cache
def trained_model(kind):
    """The model of a tokenizer made on the repository's own texts, as tokenizer.json has it."""
    from tokenizers import Tokenizer, models, trainers

    texts = [text for pair in ENGLISH for text in pair]
    for row in default_rows("default_train_data.jsonl"):
        texts += [row["query"], row["content"]]

    if kind == "Unigram":
        return {"vocab": frequent_pieces(texts)}
    if kind == "WordPiece":
        pieces = [piece for piece, _ in frequent_pieces(texts)]
        return {"vocab": [*pieces, *(f"##{piece}" for piece in pieces)]}

    pre_tokenizer = pre_tokenizer_of(kind)
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizer.alphabet(), show_progress=False
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())["model"]


def frequent_pieces(texts):
    """[(piece, logarithm of its share)] of all characters and the most frequent longer pieces: the
    trainers of Unigram and WordPiece give other ones each time."""
    counts = Counter()
    for text in texts:
        text = "▁" + text.replace(" ", "▁")
        for length in (1, 2, 3, 4):
            counts.update(text[start : start + length] for start in range(len(text) - length + 1))

    pieces = [piece for piece in counts if len(piece) == 1]
    pieces += [piece for piece, _ in counts.most_common(1500) if len(piece) > 1]
    return [(piece, math.log(counts[piece] / counts.total())) for piece in pieces]


def pre_tokenizer_of(kind):
    from tokenizers import pre_tokenizers

    if kind == "WordPiece":
        return pre_tokenizers.BertPreTokenizer()
    if kind == "Unigram":
        return pre_tokenizers.Metaspace()
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def model_with(specials, unknown, kind):
    """A trained model whose first ids are the `specials`."""
    from tokenizers import models

    trained = trained_model(kind)
    if kind == "Unigram":
        pieces = [(piece, score) for piece, score in trained["vocab"] if piece not in specials]
        pieces = [*((special, 0.0) for special in specials), *pieces]
        return models.Unigram(pieces, unk_id=specials.index(unknown))

    pieces = [piece for piece in trained["vocab"] if piece not in specials]
    vocab = {piece: number for number, piece in enumerate([*specials, *pieces])}
    if kind == "WordPiece":
        return models.WordPiece(vocab, unk_token=unknown)
    return models.BPE(vocab, [tuple(merge) for merge in trained["merges"]])


def make_tokenizer(convention):
    """A fast tokenizer of this convention."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    specials = convention.specials
    unknown = convention.roles["unk_token"]
    tokenizer = Tokenizer(model_with(specials, unknown, convention.kind))
    tokenizer.pre_tokenizer = pre_tokenizer_of(convention.kind)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A",
        pair=convention.pair,
        special_tokens=[(token, number) for number, token in enumerate(specials)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=list(convention.inputs),
        model_max_length=512,
        padding_side=convention.padding_side,
        **convention.roles,
    )


# ---- Models --------------------------------------------------------------------------------------
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 514,
    "type_vocab_size": 2,
    "num_labels": 1,
}


@dataclass(frozen=True)
class Model:
    """A model that is to be made, and what is peculiar about it."""

    name: str
    model_type: str  # transformers' name of the architecture
    convention: Convention  # of its tokenizer
    settings: dict = field(default_factory=dict)  # of the config, on top of SMALL
    reads_padding: bool = True  # False: tokens after a position, or a mask, change nothing there
    reads_segments: bool = False
    code: str = ""  # of its own, in place of transformers' class
    damage: Callable | None = None  # damage(folder) changes the folder after it is saved
    has_another_head: bool = False  # after the damage
    fails_elsewhere: bool = False  # after the damage: transformers or CrossEncoder raise on a batch
    is_extra: bool = False  # a folder that is not as it seems

    @property
    def trust(self):
        """trust_remote_code"""
        return bool(self.code)


def encoder(model_type, convention, name=None, **settings):
    """A model whose tokens see all others."""
    has_segments = settings.get("type_vocab_size") != 0
    reads_segments = has_segments and "token_type_ids" in convention.inputs
    return Model(
        name or model_type, model_type, convention, settings, reads_segments=reads_segments
    )


def decoder(model_type, convention, name=None, **settings):
    """A model whose last token sees those before it alone."""
    return Model(name or model_type, model_type, convention, settings, reads_padding=False)


def extra(name, model, damage=None, code=""):
    """A folder that is not as it seems."""
    return replace(model, name=name, damage=damage, code=code, is_extra=True)


FEW_HEADS = {"num_key_value_heads": 2, "head_dim": 16}


def models():
    """All models by their names, in the order of the tables."""
    return {model.name: model for model in [*encoders(), *others(), *extras()]}


def encoders():
    return [
        encoder("bert", BERT),
        encoder("electra", BERT, embedding_size=64),
        encoder("distilbert", DISTILBERT, dim=64, hidden_dim=128, n_layers=2, n_heads=4),
        encoder("ernie", BERT),
        encoder("convbert", BERT, embedding_size=64),
        encoder("squeezebert", BERT, embedding_size=64),
        encoder("megatron-bert", BERT),
        encoder("mobilebert", BERT, intra_bottleneck_size=32, embedding_size=32),
        encoder("roformer", BERT, embedding_size=64),
        encoder("layoutlm", BERT),
        encoder("nystromformer", ALBERT),
        encoder("mpnet", MPNET),
        encoder("nomic_bert", BERT),
        encoder("xlm-roberta", XLM_R, type_vocab_size=1),
        encoder("xlm-roberta-xl", XLM_R, type_vocab_size=1),
        encoder("camembert", XLM_R, type_vocab_size=1),
        encoder("xmod", XLM_R, languages=("zh_CN",), default_language="zh_CN"),
        encoder("albert", ALBERT, embedding_size=32),
        encoder("rembert", ALBERT, input_embedding_size=32),
        encoder("big_bird", ALBERT),
        encoder("deberta-v2", ALBERT, type_vocab_size=0),
        encoder("deberta", DEBERTA, type_vocab_size=0),
        encoder("yoso", ALBERT),
        encoder("lilt", ROBERTA, type_vocab_size=1, hidden_size=48),
        encoder("luke", ROBERTA, type_vocab_size=1, entity_vocab_size=10, entity_emb_size=16),
        encoder("gte", XLM_R),
        encoder("jina_embeddings_v3", XLM_R, type_vocab_size=1),
        encoder("roberta", ROBERTA, type_vocab_size=1),
        encoder("roberta-prelayernorm", ROBERTA, type_vocab_size=1),
        encoder("ibert", ROBERTA, type_vocab_size=1),
        encoder("longformer", ROBERTA, type_vocab_size=1, attention_window=[16, 16]),
        encoder("data2vec-text", ROBERTA, type_vocab_size=1),
        encoder("esm", ROBERTA, mask_token_id=4),
        encoder("modernbert", MODERNBERT, local_attention=16),
        encoder(
            "modernbert",
            MODERNBERT,
            "modernbert, head on the mean",
            local_attention=16,
            classifier_pooling="mean",
        ),
        encoder("eurobert", EUROBERT, **FEW_HEADS),
        encoder(
            "eurobert",
            EUROBERT,
            "eurobert, head on the mean",
            classifier_pooling="mean",
            **FEW_HEADS,
        ),
        encoder("flaubert", XLM, emb_dim=64, n_layers=2, n_heads=4),
        encoder("xlm", XLM, emb_dim=64, n_layers=2, n_heads=4),
        encoder(
            "xlm",
            XLM,
            "xlm, head on the mean",
            emb_dim=64,
            n_layers=2,
            n_heads=4,
            summary_type="mean",
        ),
        encoder("xlnet", XLNET, d_model=64, n_layer=2, n_head=4, d_inner=128),
        encoder("funnel", FUNNEL, d_model=64, n_head=4, d_head=16, d_inner=128, block_sizes=[1, 1]),
        encoder("fnet", FNET),
    ]


def others():
    """Decoders, which score a pair by its last token, and two with both."""
    return [
        decoder("modernbert-decoder", MODERNBERT, local_attention=16),
        decoder("gpt2", GPT, "gpt2, no padding token"),
        decoder("gpt2", PADDED_GPT),
        decoder("gpt2", END_PADDED_GPT, "gpt2, padded with its end token"),
        decoder("qwen2", PADDED_GPT, **FEW_HEADS),
        decoder("qwen3", PADDED_GPT, **FEW_HEADS),
        decoder("llama", LLAMA, "llama, no padding token", **FEW_HEADS),
        decoder("llama", PADDED_LLAMA, **FEW_HEADS),
        decoder("llama", LEFT_LLAMA, "llama, padded on the left", **FEW_HEADS),
        decoder("gemma", PADDED_LLAMA, **FEW_HEADS),
        decoder("opt", PADDED_GPT, ffn_dim=128, word_embed_proj_dim=64),
        decoder("bloom", PADDED_GPT),
        decoder("openai-gpt", PADDED_GPT),
        encoder("bart", ROBERTA, "bart, an encoder-decoder", d_model=64, encoder_layers=2),
        encoder(
            "t5",
            T5,
            "t5, an encoder-decoder",
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
    ]


def extras():
    """Folders that are not as they seem."""
    short = edit_config(num_hidden_layers=1)
    return [
        extra("own code, head on the mean", encoder("xlm-roberta", XLM_R), code=MEAN_HEAD),
        replace(
            extra(
                "segment ids and one segment",
                encoder("roberta", DISTILBERT, type_vocab_size=1),
                give_segments,
            ),
            fails_elsewhere=True,
        ),
        replace(
            extra("head in modules", encoder("bert", BERT), move_head_to_modules),
            has_another_head=True,
        ),
        extra("a prompt of sentence-transformers", encoder("bert", BERT), give_prompt),
        extra("bert, a layer less in config.json", encoder("bert", BERT), short),
        extra(
            "modernbert, a layer less in config.json",
            encoder("modernbert", MODERNBERT, local_attention=16),
            edit_config(num_hidden_layers=1, layer_types=["full_attention"]),
        ),
        extra(
            "eurobert, a layer less in config.json",
            encoder("eurobert", EUROBERT, **FEW_HEADS),
            short,
        ),
        extra(
            "xlm, a layer less in config.json",
            encoder("xlm", XLM, emb_dim=64, n_layers=2, n_heads=4),
            edit_config(n_layers=1),
        ),
        extra(
            "deberta-v2, no tokenizer files",
            encoder("deberta-v2", ALBERT, type_vocab_size=0),
            remove_tokenizer,
        ),
        replace(
            extra(
                "llama, padding token in the tokenizer alone",
                decoder("llama", PADDED_LLAMA, **FEW_HEADS),
                edit_config(pad_token_id=None),
            ),
            fails_elsewhere=True,
        ),
        extra(
            "gpt2, another padding token in config.json",
            decoder("gpt2", PADDED_GPT),
            edit_config(pad_token_id=0),
        ),
    ]


# ---- Folders not as they seem --------------------------------------------------------------------
MEAN_HEAD = '''
import torch
from transformers import XLMRobertaForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanHead(XLMRobertaForSequenceClassification):
    """The head reads the mean of all tokens."""

    def forward(self, input_ids, attention_mask=None, **_):
        states = self.roberta(input_ids, attention_mask=attention_mask)[0]
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        weights = attention_mask[:, :, None].to(states)
        mean = (states * weights).sum(1) / weights.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(mean[:, None]))
'''


def edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return edit


def give_segments(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model_input_names"] = list(WITH_SEGMENTS)
    path.write_text(json.dumps(config), encoding="utf-8")


def remove_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def give_prompt(folder):
    """The folder of a CrossEncoder that puts a prompt before each query."""
    from sentence_transformers import CrossEncoder

    prompts = {"query": "Is this an answer? "}
    peer = CrossEncoder(str(folder), device="cpu", prompts=prompts, default_prompt_name="query")
    peer.save_pretrained(str(folder))


def move_head_to_modules(folder):
    """The folder of a CrossEncoder whose head is a Dense module on the pooled encoder."""
    import torch
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    body = Transformer(str(folder))
    size = body.get_embedding_dimension()
    pooling = Pooling(size, pooling_mode="cls")
    head = Dense(size, 1, activation_function=torch.nn.Identity(), module_output_name="scores")
    for path in folder.iterdir():
        path.unlink()
    CrossEncoder(modules=[body, pooling, head], device="cpu").save_pretrained(str(folder))


# ---- Making a model ------------------------------------------------------------------------------
# Keys of SMALL that these configs refuse: they compute them from others.
UNWELCOME = {
    "xlnet": ("max_position_embeddings",),
    "funnel": ("num_hidden_layers",),
}


def make_model(model, folder):
    """Save a model with strong weights and its tokenizer; returns its logits [24] and how strong it
    is. Weights are drawn anew until a difference can be seen, and rounding alone is none."""
    import torch

    tokenizer = make_tokenizer(model.convention)
    tokenizer.save_pretrained(folder)
    config = config_of(model, tokenizer)
    if model.code:
        (folder / "mean_head.py").write_text(model.code, encoding="utf-8")
        config.auto_map = {"AutoModelForSequenceClassification": "mean_head.MeanHead"}

    for seed in range(MOST_DRAWS):
        torch.manual_seed(seed)
        save_strong_network(config, GAINS[seed % 2], folder)
        network, tokenizer = load_plainly(model, folder)
        logits = normalise(network, tokenizer)
        strength = {
            "rounding": change_by_rounding(network, tokenizer, logits),
            "spread": logits.std().item(),
            "padding": change_without_mask(network, tokenizer, logits),
            "segments": change_without_segments(network, tokenizer, logits),
            "batch": change_in_a_batch(network, tokenizer, logits),
        }
        if not list(weaknesses(model, strength)):
            break

    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return logits.tolist(), strength


def config_of(model, tokenizer):
    from transformers import AutoConfig

    settings = {"vocab_size": len(tokenizer), **SMALL}
    for role in ("pad", "bos", "eos", "cls", "sep"):
        if getattr(tokenizer, f"{role}_token"):
            settings[f"{role}_token_id"] = getattr(tokenizer, f"{role}_token_id")
    settings.update(model.settings)
    for key in UNWELCOME.get(model.model_type, ()):
        del settings[key]
    return AutoConfig.for_model(model.model_type, **settings)


def save_strong_network(config, gain, folder):
    """Save a new network with all matrices scaled so that what they make is `gain` times as large
    as what they get: the small weights of a new network hardly let one token change another."""
    import torch
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() < 2 or not weight.requires_grad:
                continue
            spread = weight.std(correction=0)
            if spread > 0:
                weight *= gain / (spread * math.sqrt(weight[0].numel()))
    network.save_pretrained(folder)
    config.save_pretrained(folder)  # from_config() drops the name of code of its own


def normalise(network, tokenizer):
    """Scale the head so that the logits have the standard deviation that is wanted; returns
    them."""
    import torch

    logits = plain_logits(network, tokenizer)
    heads = []
    for module in network.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features == 1:
            heads.append(module)
    with torch.no_grad():
        heads[-1].weight *= STRONG_SPREAD / logits.std()
    return plain_logits(network, tokenizer)


def change_by_rounding(network, tokenizer, logits):
    """The largest change of a logit where all is computed in fp64."""
    exact = plain_logits(network.double(), tokenizer)
    network.float()
    return (exact - logits).abs().max().item()


def load_plainly(model, folder):
    """The network and tokenizer of a folder, from transformers itself."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options = {"trust_remote_code": model.trust, "local_files_only": True}
    network = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return network.eval(), tokenizer


def plain_logits(network, tokenizer, segments=True):
    """Logits [24] of transformers, one pair at a time, so without any padding."""
    import torch

    logits = []
    for query, document in pairs_to_compare():
        tokens = tokenizer(query, document, return_tensors="pt")
        if not segments:
            tokens["token_type_ids"].zero_()
        with torch.inference_mode():
            logits.append(network(**tokens).logits.item())
    return torch.tensor(logits, dtype=torch.float64)


def change_without_mask(network, tokenizer, logits):
    """The largest change of a logit where padding is read like any token; None where there is no
    padding, or no mask."""
    import torch

    if tokenizer.pad_token is None or "attention_mask" not in tokenizer.model_input_names:
        return None
    tokens = tokenizer(pairs_to_compare(), padding=True, return_tensors="pt")
    tokens["attention_mask"].fill_(1)
    with torch.inference_mode():
        others = network(**tokens).logits[:, 0]
    return (others - logits).abs().max().item()


def change_in_a_batch(network, tokenizer, logits):
    """The largest change of a logit in transformers' own padded batch: what the architecture itself
    makes of padding. None where there is no padding."""
    import torch

    if tokenizer.pad_token is None:
        return None
    tokens = tokenizer(pairs_to_compare(), padding=True, return_tensors="pt")
    with torch.inference_mode():
        others = network(**tokens).logits[:, 0]
    return (others - logits).abs().max().item()


def change_without_segments(network, tokenizer, logits):
    """The largest change of a logit where all is one segment; None where there are none."""
    if "token_type_ids" not in tokenizer.model_input_names:
        return None
    others = plain_logits(network, tokenizer, segments=False)
    return (others - logits).abs().max().item()


# ---- Looking at a model --------------------------------------------------------------------------
@dataclass
class Outcome:
    """What came out of a model."""

    strength: dict = field(default_factory=dict)  # what make_model() says
    before: dict = field(default_factory=dict)  # largest differences: {whose logits: difference}
    after: dict = field(default_factory=dict)
    moved: float | None = None  # largest change of a logit by the training
    refusal: str = ""
    failures: list = field(default_factory=list)


def look_at(script, model, folder, outcome):
    """Make a model, compare it, train it, compare it again. What is known stands in `outcome`."""
    path = folder / "model"
    path.mkdir()
    made, outcome.strength = make_model(model, path)
    outcome.failures += weaknesses(model, outcome.strength)
    if model.damage:
        model.damage(path)

    try:
        if model.fails_elsewhere:
            logits_before = predict(script, model, path)
        else:
            logits_before = compare(script, model, path, outcome.before)
        if not model.has_another_head:
            outcome.before["the model as made"] = largest_difference(logits_before, made)
        write_data(folder)
        train(script, model, path, folder)
    except script.UserError as error:
        outcome.refusal = str(error)
        return
    logits_after = compare(script, model, folder / "output" / "final_model", outcome.after)
    changes = [abs(a - b) for a, b in zip(logits_after, logits_before, strict=True)]
    outcome.moved = max(changes)


def weaknesses(model, strength):
    """Complaints about a model by which nothing could be told."""
    if not strength["spread"] >= 1:
        yield f"weak: logits spread by {strength['spread']:.2g}"
    if not strength["rounding"] <= MOST_ROUNDING:
        yield f"weak: rounding changes logits by {strength['rounding']:.2g}"
    if model.reads_padding and strength["padding"] is not None:
        if not strength["padding"] >= VISIBLE:
            yield f"weak: without the mask logits change by {strength['padding']:.2g}"
    if model.reads_segments and not strength["segments"] >= VISIBLE:
        yield f"weak: without segments logits change by {strength['segments']:.2g}"


def compare(script, model, folder, differences):
    """The script's logits of a folder's model, by predict(). Writes into `differences` how far off
    those of the others are, at most."""
    predicted = predict(script, model, folder)
    expected = plain_logits(*load_plainly(model, folder)).tolist()
    differences["transformers"] = largest_difference(predicted, expected)
    differences["CrossEncoder"] = largest_difference(predicted, peer_logits(model, folder))
    return predicted


def predict(script, model, folder):
    """The script's logits [24] of a folder's model by predict(), which have to be those of one
    padded batch."""
    import torch

    reranker = script.BertRerankerModel.from_pretrained(str(folder), trust_remote_code=model.trust)
    pairs = pairs_to_compare()
    assert max(len(ids) for ids, *_ in reranker.encode(pairs, 10**6)) <= reranker.max_len
    identity = torch.nn.Identity()
    predicted = reranker.predict(pairs, batch_size=4, activation_fn=identity)
    with torch.inference_mode():
        in_one_batch = reranker(reranker.preprocess(pairs, reranker.max_len))["logits"]
    torch.testing.assert_close(
        in_one_batch[:, 0], torch.from_numpy(predicted), rtol=0, atol=TOLERANCE
    )
    return predicted.tolist()


def peer_logits(model, folder):
    """Logits [24] of sentence-transformers, in padded batches."""
    import torch
    from sentence_transformers import CrossEncoder

    peer = CrossEncoder(
        str(folder), device="cpu", local_files_only=True, trust_remote_code=model.trust
    )
    logits = peer.predict(
        pairs_to_compare(),
        batch_size=8,
        show_progress_bar=False,
        activation_fn=torch.nn.Identity(),
    )
    return logits.tolist()


def largest_difference(logits, expected):
    """The largest absolute difference, NaN where one is NaN."""
    differences = [abs(a - b) for a, b in zip(logits, expected, strict=True)]
    if any(math.isnan(difference) for difference in differences):
        return math.nan
    return max(differences)


def train(script, model, path, folder):
    """Two optimizer steps, each of several micro-batches, and the last weights saved."""
    script.train(
        {
            "model_name_or_path": str(path),
            "trust_remote_code": model.trust,
            "train_dataset": str(folder / "train.jsonl"),
            "eval_dataset": str(folder / "eval.jsonl"),
            "output_dir": str(folder / "output"),
            "epochs": 1,
            "lr": 1e-4,
            "batch_size": 2,
            "gradient_accumulation_steps": 4,
            "micro_batch_tokens": 512,
            "load_best_model_at_end": False,
            "mixed_precision": "no",
            "log_with": None,
        }
    )


# ---- A process of its own ------------------------------------------------------------------------
def load_script():
    """The script, imported once with all that a model needs later, and set up so that a process
    may be forked."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"

    sys.path.insert(0, str(ROOT))
    import matplotlib.figure  # noqa: F401  a run imports it where it draws
    import sentence_transformers  # noqa: F401

    import train_bert_rerank

    train_bert_rerank.logging.set_verbosity_error()
    for kind in ("WordPiece", "Unigram", "BPE"):
        trained_model(kind)
    gc.collect()
    gc.freeze()  # else each child's first collection copies all that the parent holds
    return train_bert_rerank


def run_model(script, model):
    """Look at a model in a process of its own; a crash of that is an outcome too."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = os.fork()
        if child == 0:
            run_as_child(script, model, folder)
        _, status = os.waitpid(child, 0)

        status = os.waitstatus_to_exitcode(status)
        if status != 0:
            return Outcome(failures=[f"ended with status {status}"])
        text = (folder / "outcome.json").read_text(encoding="utf-8")
    outcome = Outcome(**json.loads(text))
    outcome.refusal = outcome.refusal.replace(f"{folder}/", "")
    return outcome


def run_as_child(script, model, folder):
    """Looking at the model is the last thing that a forked process does."""
    status = 70  # stays where not even an outcome can be written
    try:
        silence(folder)
        signal.alarm(LIMIT)  # ends a model that hangs, in whatever it hangs
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        outcome = Outcome()
        try:
            look_at(script, model, folder, outcome)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            step = next((at.name for at in reversed(where) if at.filename == __file__), "")
            outcome.failures.append(f"{step}(): {type(error).__name__}: {error}")
        text = json.dumps(asdict(outcome))
        (folder / "outcome.json").write_text(text, encoding="utf-8")
        status = 0
    finally:
        os._exit(status)


def silence(folder):
    """What a run prints goes into a file, also that of libraries, which know descriptors alone."""
    file = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)


# ---- The page ------------------------------------------------------------------------------------
INTRODUCTION = """# Architectures

```bash
python benchmarks/architectures.py > docs/architectures.md
```

Small random models, each loaded, trained for two steps and loaded again: either all logits of 24
pairs are those of transformers (one pair at a time) and of sentence-transformers' CrossEncoder (in
padded batches) to {tolerance}, before and after training, or the model is refused with a message.
The last table shows that the comparison can tell a difference.

{date}, CPU, Python {python}, {versions}."""
DIFFERENCES = """
The largest differences of a logit: before training from transformers and from CrossEncoder, after
it from both.

| model | outcome | before: transformers | CrossEncoder | after: transformers | CrossEncoder |
| --- | --- | --- | --- | --- | --- |"""
STRENGTHS = """
## How strong the models are

The standard deviation of the logits, then by how much one of them changes at most: where padding
is read as text, where both texts are one segment, by the training, by rounding (fp32 against fp64),
and in a padded batch of transformers itself, mask and all. Where the last is no rounding,
the architecture makes padding part of the score.

| model | deviation | padding read | one segment | training | rounding | in a padded batch |
| --- | --- | --- | --- | --- | --- | --- |"""


def failures_of(outcome):
    """What is neither equal scores nor a refusal."""
    failures = list(outcome.failures)
    for when, differences in (("before", outcome.before), ("after", outcome.after)):
        for whose, difference in differences.items():
            if not difference <= TOLERANCE:  # NaN fails too
                failures.append(f"{when} training {difference:.2g} off {whose}")
    if outcome.moved is not None and not outcome.moved >= TRAINED:
        failures.append(f"training moved logits by {outcome.moved:.2g} only")
    return failures


def result_of(outcome):
    """What came out, in a word."""
    if failures_of(outcome):
        return "failed"
    if outcome.refusal:
        return "refused"
    return "trained"


def what_it_says(outcome):
    """What came out, in a line."""
    result = result_of(outcome)
    if result == "failed":
        return "**FAILURE** " + one_line("; ".join(failures_of(outcome)), 250)
    if result == "refused":
        when = "in training" if outcome.before else "at loading"
        return f"refused {when}: " + one_line(outcome.refusal, 160)
    return "trained, equal"


def one_line(text, length):
    """A text that fits into a cell of a table."""
    text = " ".join(text.replace("|", "\\|").split())
    if len(text) > length:
        text = text[:length] + "…"
    return text


def row(name, text, numbers):
    """A row of a table, with nothing where there is no number."""
    cells = [name, *text]
    for number in numbers:
        if number is None:
            cells.append("")
        elif 0 < number < 0.01:
            cells.append(f"{number:.1e}")
        else:
            cells.append(f"{number:.2f}")
    return "| " + " | ".join(cells) + " |"


def row_of_differences(name, outcome):
    numbers = []
    for differences in (outcome.before, outcome.after):
        numbers += [differences.get("transformers"), differences.get("CrossEncoder")]
    return row(name, [what_it_says(outcome)], numbers)


def row_of_strengths(name, outcome):
    numbers = [outcome.strength.get(key) for key in ("spread", "padding", "segments")]
    numbers.append(outcome.moved)
    numbers += [outcome.strength.get(key) for key in ("rounding", "batch")]
    return row(name, [], numbers)


def show(script, models):
    """Look at these models and print the page; returns how many failed."""
    started = time.monotonic()
    packages = ("torch", "transformers", "sentence-transformers", "tokenizers")
    introduction = INTRODUCTION.format(
        tolerance=f"{TOLERANCE:g}",
        date=date.today(),
        python=sys.version.split()[0],
        versions=", ".join(f"{package} {version(package)}" for package in packages),
    )
    print(introduction)

    outcomes = {}
    for title, is_extra in (("Architectures", False), ("Folders not as they seem", True)):
        members = [model for model in models if model.is_extra == is_extra]
        if not members:
            continue
        if is_extra:
            print(f"\n## {title}")
        print(DIFFERENCES, flush=True)
        for model in members:
            outcomes[model.name] = run_model(script, model)
            print(row_of_differences(model.name, outcomes[model.name]), flush=True)

    print(STRENGTHS)
    for name, outcome in outcomes.items():
        print(row_of_strengths(name, outcome))

    results = [result_of(outcome) for outcome in outcomes.values()]
    print(
        f"\n{len(results)} models: {results.count('trained')} trained and equal, "
        f"{results.count('refused')} refused, {results.count('failed')} failed, "
        f"in {time.monotonic() - started:.0f} s."
    )
    return results.count("failed")


def main():
    """Look at the models named on the command line, or at all."""
    script = load_script()
    known = models()
    unknown = [name for name in sys.argv[1:] if name not in known]
    if unknown:
        sys.exit(f"No model {unknown[0]}; there are: {'; '.join(known)}")
    failed = show(script, [known[name] for name in sys.argv[1:] or known])
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
