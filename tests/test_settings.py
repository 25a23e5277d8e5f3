"""The settings: one dict in main(), from which defaults, types, --help and train(args) are read."""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

import matplotlib  # noqa: F401  one test takes away the path that packages are found on
import numpy as np
import pytest
from conftest import ROOT, TINY, rows_of

import train_bert_rerank
from train_bert_rerank import UserError, check_settings, parse_command_line, read_settings

DEFAULTS = {  # the table of the contract
    "model_name_or_path": "BAAI/bge-reranker-large",
    "revision": None,
    "trust_remote_code": False,
    "train_dataset": "default_train_data.jsonl",
    "eval_dataset": "auto",
    "eval_proportion": 0.1,
    "output_dir": "./output_bge_reranker_large_finetuned",
    "max_len": 512,
    "min_label": 0,
    "max_label": 1,
    "query_format": "{}",
    "document_format": "{}",
    "long_documents": None,
    "epochs": 3,
    "lr": 1e-5,
    "listwise_weight": 0.0,
    "batch_size": 2,
    "gradient_accumulation_steps": 8,
    "micro_batch_tokens": "auto",  # this and the next two came with memory
    "gradient_checkpointing": False,
    "freeze_embeddings": False,
    "warmup_proportion": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "eval_steps": None,  # this and the next four came with evaluation
    "metric_for_best_model": "auto",
    "load_best_model_at_end": True,
    "save_steps": None,
    "save_total_limit": 2,
    "resume_from_checkpoint": None,
    "overwrite_output_dir": False,
    "early_stopping_patience": None,
    "base_interpolation": (0.25, 0.5, 0.75),
    "seed": 42,
    "mixed_precision": "bf16",
    "log_with": "tensorboard",
}
SETTINGS = read_settings()
SMALL_RUN = {"model_name_or_path": TINY, "mixed_precision": "no", "epochs": 1, "eval_dataset": None}


def refusal(capsys, script, *arguments, monkeypatch):
    """What main() prints for a command line that it refuses with exit status 2."""
    monkeypatch.setattr(sys, "argv", ["train_bert_rerank.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err


@pytest.fixture
def refused(capsys, monkeypatch):
    """refused("--key", "value", …) -> what main() says on leaving with exit status 2."""
    return lambda *arguments: refusal(capsys, train_bert_rerank, *arguments, monkeypatch=monkeypatch)


# ---- Defaults --------------------------------------------------------------------------------------------------------
def test_names_values_and_types_of_the_defaults_are_those_of_the_contract():
    settings = {key: default for key, (_, _, default) in SETTINGS.items()}
    assert {key: settings.get(key) for key in DEFAULTS} == DEFAULTS
    assert {key: type(settings[key]) for key in DEFAULTS} == {key: type(value) for key, value in DEFAULTS.items()}
    assert check_settings({}) == settings, "the defaults pass their own checks"


def test_each_setting_has_a_comment_with_its_kinds_and_its_meaning():
    names = {"str", "list", "bool", "None", "int", "float", "tuple"}
    for key, (kinds, meaning, default) in SETTINGS.items():
        assert kinds and all(kind.split()[0] in names or kind[0] == kind[-1] == '"' for kind in kinds), key
        assert len(meaning) > 10, key
        assert any(train_bert_rerank.fits(default, kind) for kind in kinds), key


def test_help_lists_each_setting_with_meaning_kinds_and_default_and_exits_with_0(run_main, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.chdir(tmp_path)
    status, printed = run_main("--help")
    assert status == 0
    shown = " ".join(printed.split())
    for key, (kinds, meaning, default) in SETTINGS.items():
        assert f"--{key} {meaning} ({' or '.join(kinds)}; default {default!r})" in shown
    assert os.listdir(tmp_path) == []


def test_train_takes_what_a_dict_leaves_out_from_main(write_jsonl, tmp_path):
    files = {"train_dataset": write_jsonl("data.jsonl", rows_of(2)), "output_dir": str(tmp_path / "output")}
    run = train_bert_rerank.train({**SMALL_RUN, **files, "log_with": None})
    defaults = {key: default for key, (_, _, default) in SETTINGS.items()}
    assert run["args"] == {**defaults, **SMALL_RUN, **files, "log_with": None}
    assert [path for path in (tmp_path / "output" / "logs").rglob("*") if path.is_file()] == [], "log_with None: no log"


# ---- The command line ------------------------------------------------------------------------------------------------
OVERRIDES = [
    ("model_name_or_path", "tiny_reranker", "tiny_reranker"),
    ("model_name_or_path", "123", "123"),
    ("model_name_or_path", "./null", "./null"),
    ("revision", "v1.5", "v1.5"),
    ("revision", "0123456", "0123456"),
    ("revision", "1e5", "1e5"),
    ("revision", "None", None),
    ("revision", "null", None),
    ("revision", "NONE", None),
    ("trust_remote_code", "true", True),
    ("trust_remote_code", "false", False),
    ("trust_remote_code", "TRUE", True),
    ("train_dataset", "my data.jsonl", "my data.jsonl"),
    ("train_dataset", '["a.jsonl", "b.jsonl"]', ["a.jsonl", "b.jsonl"]),
    ("eval_dataset", "None", None),
    ("eval_dataset", "none", None),
    ("eval_dataset", "Null", None),
    ("eval_dataset", "./none", "./none"),
    ("eval_dataset", "auto", "auto"),
    ("eval_dataset", "held_out.jsonl", "held_out.jsonl"),
    ("eval_proportion", "0.25", 0.25),
    ("eval_proportion", "1", 1),
    ("output_dir", "2026", "2026"),
    ("output_dir", "输出", "输出"),
    ("max_len", "256", 256),
    ("min_label", "-1", -1),
    ("min_label", "-0.5", -0.5),
    ("max_label", "4", 4),
    ("query_format", "query: {}", "query: {}"),
    ("document_format", "标题{}", "标题{}"),
    ("long_documents", "best_passage", "best_passage"),
    ("long_documents", "None", None),
    ("epochs", "10", 10),
    ("lr", "2e-5", 2e-5),
    ("lr", "3E-4", 3e-4),
    ("lr", "0.001", 0.001),
    ("lr", "0", 0),
    ("listwise_weight", "0.3", 0.3),
    ("batch_size", "16", 16),
    ("gradient_accumulation_steps", "1", 1),
    ("micro_batch_tokens", "auto", "auto"),
    ("micro_batch_tokens", "4096", 4096),
    ("micro_batch_tokens", "None", None),
    ("gradient_checkpointing", "true", True),
    ("freeze_embeddings", "true", True),
    ("warmup_proportion", "0", 0),
    ("weight_decay", "0.1", 0.1),
    ("max_grad_norm", "0", 0),
    ("max_grad_norm", "2.5", 2.5),
    ("seed", "0", 0),
    ("seed", "4294967295", 4294967295),
    ("mixed_precision", "no", "no"),
    ("mixed_precision", "fp16", "fp16"),
    ("log_with", "None", None),
    ("log_with", "none", None),
    ("log_with", "NULL", None),
    ("log_with", "wandb", "wandb"),
    ("eval_steps", "50", 50),
    ("metric_for_best_model", "mrr@10", "mrr@10"),
    ("metric_for_best_model", "hit@1", "hit@1"),
    ("load_best_model_at_end", "false", False),
    ("save_steps", "500", 500),
    ("save_total_limit", "3", 3),
    ("resume_from_checkpoint", "latest", "latest"),
    ("overwrite_output_dir", "false", False),
    ("early_stopping_patience", "2", 2),
    ("base_interpolation", "[0.25, 0.5]", [0.25, 0.5]),
    ("base_interpolation", "[]", []),
    ("base_interpolation", "()", ()),
    ("base_interpolation", "(0.5,)", (0.5,)),
]


def test_the_overrides_below_cover_each_setting():
    assert {key for key, *_ in OVERRIDES} == set(DEFAULTS)


@pytest.mark.parametrize("key, text, value", OVERRIDES)
def test_each_setting_can_be_overridden_in_its_own_type(key, text, value):
    given = parse_command_line([f"--{key}", text])
    assert given == {key: value} and type(given[key]) is type(value)
    assert check_settings(given) == {**{key: default for key, (_, _, default) in SETTINGS.items()}, key: value}


def test_all_settings_can_be_overridden_at_once_with_an_equals_sign_too():
    values = {key: (text, value) for key, text, value in OVERRIDES}
    given = parse_command_line([f"--{key}={text}" for key, (text, _) in values.items()])
    assert given == {key: value for key, (_, value) in values.items()}
    assert check_settings(given) == {**check_settings({}), **given}


def test_several_overrides_are_taken_together_and_the_last_of_a_key_wins():
    arguments = ["--lr", "1e-4", "--log_with=None", "--epochs", "2", "--lr=1e-3", "--query_format=-{}"]
    assert parse_command_line(arguments) == {"lr": 1e-3, "log_with": None, "epochs": 2, "query_format": "-{}"}


WRONG_NAMES = [
    (["--epoch", "3"], "epoch", "epochs"),
    (["--batchsize", "4"], "batchsize", "batch_size"),
    (["--max_length", "128"], "max_length", "max_len"),
    (["--model", "x"], "model", "model_name_or_path"),
    (["--gradient-accumulation-steps", "2"], "gradient-accumulation-steps", "gradient_accumulation_steps"),
    (["--lr", "1e-4", "--epochz", "3", "--seed", "1"], "epochz", "epochs"),
    (["--epoch=3"], "epoch", "epochs"),
    (["--batch=auto"], "batch", "batch_size"),
    (["--learning_rate", "1e-5"], "learning_rate", "lr"),
    (["--LR", "1e-5"], "LR", "lr"),
    (["--num-train-epochs", "1"], "num-train-epochs", "epochs"),
]


@pytest.mark.parametrize("arguments, name, nearest", WRONG_NAMES)
def test_an_unknown_key_is_refused_with_the_nearest_key(arguments, name, nearest):
    with pytest.raises(UserError, match=f"^unknown setting '?{name}'?; the nearest is {nearest}$") as error:
        check_settings(parse_command_line(arguments))
    assert error.value.exit_status == 2


@pytest.mark.parametrize("arguments, argument", [
    (["--train_dataset", "a.jsonl", "b.jsonl"], "b.jsonl"), (["--train_dataset=a", "b", "--seed", "1"], "b"),
    (["epochss"], "epochss"), (["--", "x"], "--"),
    (["--=3"], "--=3"), (["-lr", "3"], "-lr"), (["--base_interpolation", "0.25", "0.5"], "0.5"),
])  # fmt: skip
def test_a_word_that_belongs_to_no_setting_is_refused_with_how_a_list_is_written(refused, arguments, argument):
    assert refused(*arguments) == (
        f"Error: {argument!r} belongs to no setting: each is written --key value, and a list "
        """--train_dataset '["a.jsonl", "b.jsonl"]'\n"""
    )


@pytest.mark.parametrize("key, value, said", [
    ("output_dir", "", "output_dir is empty: it should be str"),
    ("output_dir", "  ", "output_dir is empty: it should be str"),
    ("train_dataset", "", "train_dataset is empty: it should be str or list"),
    ("train_dataset", '["a.jsonl", ""]', "train_dataset is empty: it should be str or list"),
    ("model_name_or_path", "", "model_name_or_path is empty: it should be str"),
    ("resume_from_checkpoint", "", "resume_from_checkpoint is empty: it should be str or None"),
    ("revision", "", "revision is empty: it should be str or None"),
    ("eval_dataset", "", "eval_dataset is empty: it should be str or None"),
    ("output_dir", "None", "output_dir cannot be None; of a file or folder of that name: ./None"),
    ("train_dataset", "none", "train_dataset cannot be None; of a file or folder of that name: ./none"),
    ("train_dataset", '["NULL"]', "train_dataset cannot be None; of a file or folder of that name: ./NULL"),
    ("model_name_or_path", "null", "model_name_or_path cannot be None; of a file or folder of that name: ./null"),
    ("train_dataset", "[]", "train_dataset []: there is no such file; a list is written --train_dataset '[\"a.jsonl"),
    ("train_dataset", "[a, b]", "train_dataset [a, b]: there is no such file; a list is written --train_dataset "),
    ("train_dataset", "a,b", "train_dataset a,b: there is no such file; a list is written --train_dataset "),
])  # fmt: skip
def test_a_text_that_names_nothing_is_refused_by_its_setting_before_anything_is_made(
    refused, monkeypatch, tmp_path, key, value, said
):
    monkeypatch.chdir(tmp_path)
    assert refused(f"--{key}", value).startswith(f"Error: {said}")
    with pytest.raises(UserError, match=f"^{re.escape(said)}") as error:
        train_bert_rerank.train(parse_command_line([f"--{key}", value]))
    assert error.value.exit_status == 2 and os.listdir(tmp_path) == []


def test_a_file_whose_name_looks_like_a_list_is_taken_where_it_is_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "[1].jsonl"):
        with pytest.raises(UserError, match="there is no such file; a list is written"):
            check_settings({"train_dataset": name})
        Path(name).write_text("")
        assert check_settings({"train_dataset": name})["train_dataset"] == name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_settings({"train_dataset": "~/a,b.jsonl"})["train_dataset"] == f"{tmp_path}/a,b.jsonl"


def test_a_tilde_is_the_home_folder_in_each_setting_that_is_a_path_and_in_no_other(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # of Windows
    given = {"model_name_or_path": "~/model", "train_dataset": ["~/a.jsonl", "b~.jsonl"], "eval_dataset": "~/e.jsonl",
             "output_dir": "~", "resume_from_checkpoint": "~/out/checkpoint-00000001",
             "query_format": "~/{}"}  # fmt: skip
    home = str(tmp_path)
    expected = {"model_name_or_path": f"{home}/model", "train_dataset": [f"{home}/a.jsonl", "b~.jsonl"],
                "eval_dataset": f"{home}/e.jsonl", "output_dir": home,
                "resume_from_checkpoint": f"{home}/out/checkpoint-00000001", "query_format": "~/{}"}  # fmt: skip
    assert check_settings(given) == {**check_settings({}), **expected}
    assert given["output_dir"] == "~", "the caller's dict stays as it was"
    assert check_settings(parse_command_line(["--output_dir=~/x"]))["output_dir"] == f"{home}/x"


@pytest.mark.parametrize("key", ["eval_dataset", "-eval_dataset", "log_with", "revision"])
def test_a_key_without_its_two_dashes_is_refused(key):
    with pytest.raises((UserError, SystemExit)) as error:
        check_settings(parse_command_line([key, "value"]))
    assert 2 in (getattr(error.value, "exit_status", None), getattr(error.value, "code", None))


def test_paths_and_numbers_of_numpy_in_a_dict_are_taken_for_what_they_stand_for(tmp_path):
    numbers = {"lr": np.float64(1e-3), "epochs": np.int64(2)}
    given = {"output_dir": tmp_path, "train_dataset": [tmp_path / "a", "b"], **numbers}
    args = check_settings(given)
    assert args["output_dir"] == str(tmp_path) and args["train_dataset"] == [str(tmp_path / "a"), "b"]
    assert [type(args[key]) for key in ("lr", "epochs")] == [float, int] and (args["lr"], args["epochs"]) == (1e-3, 2)


def test_an_unknown_key_in_a_dict_is_refused_with_the_nearest_key():
    with pytest.raises(UserError, match="unknown setting learning_rat; the nearest is ") as error:
        train_bert_rerank.train({"learning_rat": 1e-4})
    assert error.value.exit_status == 2


@pytest.mark.parametrize("arguments, said", [
    (["--epoch", "3"], "Error: unknown setting epoch; the nearest is epochs\n"),
    (["--epochs", "three"], "Error: epochs should be int 0.., not 'three'\n"),
    (["--lr"], "--lr: expected one argument"),
    (["--lr", "--epochs", "3"], "--lr: expected one argument"),
])  # fmt: skip
def test_a_wrong_command_line_ends_in_one_message_and_exit_status_2(refused, arguments, said):
    assert refused(*arguments).endswith(said) or said in refused(*arguments)


def test_exit_status_2_reaches_the_shell_without_a_traceback(run_script, tmp_path):
    run = run_script("--max_length", 128)
    assert run.returncode == 2
    assert run.stdout == "Error: unknown setting max_length; the nearest is max_len\n"
    assert os.listdir(tmp_path) == []


WRONG_VALUES = [
    ("save_steps", "0"), ("save_total_limit", "0"), ("save_total_limit", "None"), ("overwrite_output_dir", "1"),
    ("epochs", "-1"), ("epochs", "1.5"), ("epochs", "2.0"), ("epochs", "true"), ("epochs", "None"),
    ("epochs", "[3]"), ("epochs", ""), ("lr", "-1e-5"), ("lr", "fast"), ("lr", "NaN"), ("lr", "Infinity"),
    ("lr", "1e999"), ("lr", "true"), ("lr", '"1e-5"'), ("batch_size", "0"), ("gradient_accumulation_steps", "0"),
    ("max_len", "7"), ("max_len", "512.0"), ("eval_proportion", "1.5"), ("eval_proportion", "-0.1"),
    ("warmup_proportion", "1.01"), ("weight_decay", "-1"), ("max_grad_norm", "-1"), ("max_grad_norm", "None"),
    ("seed", "-1"), ("seed", "4294967296"), ("seed", "1e3"), ("trust_remote_code", "1"), ("trust_remote_code", "yes"),
    ("mixed_precision", "fp32"), ("mixed_precision", "None"), ("log_with", "mlflow"), ("log_with", "false"),
    ("min_label", "low"), ("max_label", "NaN"), ("max_label", "Infinity"), ("max_label", "0"), ("min_label", "2"),
    ("query_format", "query:"), ("query_format", "{} {}"), ("document_format", "{0}"),
    ("min_label", "-Infinity"),
]  # fmt: skip


@pytest.mark.parametrize("key, text", WRONG_VALUES)
def test_a_wrong_type_or_a_value_out_of_range_is_refused_by_name(key, text):
    with pytest.raises(UserError, match=key) as error:
        check_settings(parse_command_line([f"--{key}={text}"]))
    assert error.value.exit_status == 2 and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("key, value, kinds", [
    ("epochs", 3.0, "int 0.."), ("epochs", True, "int 0.."), ("epochs", "3", "int 0.."), ("lr", "1e-5", "float 0.."),
    ("output_dir", ["output"], "str"), ("train_dataset", ("a", "b"), "str or list"), ("revision", 1, "str or None"),
    ("train_dataset", None, "str or list"), ("base_interpolation", (0.5, 1.0), "tuple 0.01..0.99"),
    ("base_interpolation", 0.5, "tuple 0.01..0.99"), ("early_stopping_patience", 0, "int 1.. or None"),
    ("mixed_precision", "BF16", '"bf16" or "fp16" or "no"'),
    ("eval_proportion", 2, "float 0..1"), ("max_label", float("nan"), "float"), ("trust_remote_code", 0, "bool"),
    ("max_label", 10**400, "float"),
])  # fmt: skip
def test_a_dict_with_a_wrong_type_is_refused_with_the_kinds_that_the_setting_takes(key, value, kinds):
    with pytest.raises(UserError) as error:
        train_bert_rerank.train({key: value})
    assert str(error.value) == f"{key} should be {kinds}, not {value!r}"
    assert error.value.exit_status == 2


def test_a_min_label_that_is_not_below_max_label_is_refused_with_both():
    with pytest.raises(UserError, match="^min_label 3 is not below max_label 1$"):
        check_settings({"min_label": 3})


# ---- Edited defaults -------------------------------------------------------------------------------------------------
EDITS = [
    ('"lr": 1e-5,', '"lr": 3e-4,', "lr", 3e-4),
    ('"max_len": 512,', '"max_len": 2 * 32,', "max_len", 64),
    ('"epochs": 3,', '"epochs": 1,', "epochs", 1),
    ('"mixed_precision": "bf16",', '"mixed_precision": "no",', "mixed_precision", "no"),
    ('"log_with": "tensorboard",', '"log_with": None,', "log_with", None),
    ('"eval_dataset": "auto",', '"eval_dataset": None,', "eval_dataset", None),
    ('"query_format": "{}",', '"query_format": "问#" "：{}",', "query_format", "问#：{}"),
    ('"BAAI/bge-reranker-large",', f"{TINY!r},", "model_name_or_path", TINY),
    ('"default_train_data.jsonl",', '["train.jsonl"],', "train_dataset", ["train.jsonl"]),
    ('"./output_bge_reranker_large_finetuned",', '"output",', "output_dir", "output"),
]


@pytest.fixture
def edited_script(tmp_path, monkeypatch):
    """edited_script([(old, new), …]) -> the module of a copy of the script in the test's folder, which is entered."""

    def edit(edits):
        source = (ROOT / "train_bert_rerank.py").read_text(encoding="utf-8")
        for old, new in edits:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        (tmp_path / "edited_script.py").write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("edited_script", tmp_path / "edited_script.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.chdir(tmp_path)
        return module

    return edit


def test_edited_defaults_show_in_help_in_the_checks_in_train_and_when_the_file_is_run(
    edited_script, write_jsonl, monkeypatch, capsys
):
    script = edited_script([edit[:2] for edit in EDITS])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        script.parse_command_line(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for _, _, key, value in EDITS:
        kinds, meaning, _ = SETTINGS[key]
        assert f"--{key} {meaning} ({' or '.join(kinds)}; default {value!r})" in shown
    with pytest.raises(script.UserError, match="^epochs should be int 0.., not 'x'$"):
        script.check_settings(script.parse_command_line(["--epochs", "x"]))
    write_jsonl("train.jsonl", rows_of(2))
    run = script.train({"seed": 7})
    assert run["args"] == {**DEFAULTS, **{key: value for _, _, key, value in EDITS}, "seed": 7}
    monkeypatch.setattr(sys, "argv", ["edited_script.py", "--lr", "2e-4"])
    shutil.rmtree("output")
    capsys.readouterr()
    script.main()
    printed = capsys.readouterr().out.splitlines()[0]
    expected = {**DEFAULTS, **{key: value for _, _, key, value in EDITS}, "lr": 2e-4}
    assert printed == f"Training Args: {expected}" and Path("output/final_model/model.safetensors").is_file()


def test_a_new_setting_is_known_once_it_stands_in_the_dict(edited_script):
    new_line = '"new_steps": 0,  # int 0..: steps between something'
    script = edited_script([('"seed": 42,', f'{new_line}\n        "seed": 42,')])
    assert script.check_settings(script.parse_command_line(["--new_steps", "5"]))["new_steps"] == 5
    with pytest.raises(script.UserError, match="new_steps should be int 0.., not -5"):
        script.check_settings({"new_steps": -5})


MULTI_LINE = '[  # str | list: files\n            "a.jsonl",\n            "b.jsonl",\n        ],'


@pytest.mark.parametrize("key, old, new", [
    ("lr", '"lr": 1e-5,  # float 0..: peak learning rate', '"lr": 3e-4,'),
    ("lr", '"lr": 1e-5,  # float 0..: peak learning rate', '"lr": 3e-4,  # was 1e-5'),
    ("lr", '"lr": 1e-5,  # float 0..: peak learning rate', '"lr": 3e-4,  # was 1e-5: too low'),
    ("train_dataset", '"default_train_data.jsonl",  # str | list: JSONL file, plain or gzip, or a list of them',
     MULTI_LINE),
])  # fmt: skip
def test_a_key_whose_comment_an_edit_lost_or_moved_is_named(edited_script, key, old, new):
    script = edited_script([(old, new)])
    with pytest.raises(script.UserError, match=f"^{key} in main.. has lost its comment") as error:
        script.check_settings({})
    assert error.value.exit_status == 2


def test_a_statement_before_args_does_not_hide_them(edited_script):
    script = edited_script([("    args = {\n", '    print("my run")\n    args = {\n')])
    assert script.read_settings() == read_settings()


# ---- Logging ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def without_wandb(tmp_path, monkeypatch):
    """In the test's folder, the only one in which packages are looked for that are not imported yet."""
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.chdir(tmp_path)


def test_without_wandb_installed_log_with_wandb_says_how_to_install_it(without_wandb, run_main, tmp_path):
    said = run_main("--log_with", "wandb", "--model_name_or_path", TINY)
    assert said == (2, "Error: the package wandb is missing: pip install wandb\n")
    assert os.listdir(tmp_path) == []


def test_a_wandb_folder_of_earlier_runs_does_not_pass_for_the_package(without_wandb, tmp_path):
    (tmp_path / "wandb").mkdir()
    with pytest.raises(UserError, match="^the package wandb is missing: pip install wandb$"):
        check_settings({"log_with": "wandb"})


def test_log_with_wandb_offline_logs_each_step_under_output_dir_and_nowhere_else(
    run_script, small_model, write_jsonl, tmp_path
):
    write_jsonl("train.jsonl", rows_of(5))
    settings = {**SMALL_RUN, "model_name_or_path": small_model, "epochs": 2, "train_dataset": "train.jsonl",
                "output_dir": "output", "log_with": "wandb"}  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in {**settings, "gradient_accumulation_steps": 2}.items()]
    run = run_script(*arguments, WANDB_MODE="offline")
    assert run.returncode == 0, run.stdout
    assert sorted(os.listdir(tmp_path)) == ["output", "train.jsonl"]
    [log] = (tmp_path / "output" / "logs").glob("wandb/offline-run-*/run-*.wandb")
    logged = log.read_bytes()
    for name in (b"train/loss", b"train/lr", b"train/grad_norm"):
        assert logged.count(name) >= 4, "a record for each of the four steps"


def test_an_output_dir_that_cannot_be_made_ends_in_one_message(run_main, write_jsonl, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    status, printed = run_main("--model_name_or_path", TINY, "--train_dataset", write_jsonl("rows.jsonl", rows_of(4)),
                               "--eval_dataset", None, "--output_dir", "file/sub", "--mixed_precision", "no")
    assert status == 2 and "Loading" not in printed
    assert printed.endswith("Error: output_dir file/sub: file is no folder that this run may write to\n")
