"""The same seed gives the same bits; the hardware decides the precision, and the run says so."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, rows_of
from test_training import scalars_of

import train_bert_rerank
from train_bert_rerank import seed_everything, supported_precision


def test_two_runs_give_the_same_bits_whatever_the_hash_seed_and_another_seed_gives_others(
    run_main, run_script, write_jsonl, tmp_path, monkeypatch
):
    write_jsonl("train.jsonl", rows_of(40, 20))
    monkeypatch.chdir(tmp_path)
    results = []
    for number, (hash_seed, seed) in enumerate([("1", 42), ("2", 42), (None, 43)]):
        command = ["--model_name_or_path", TINY, "--train_dataset", "train.jsonl", "--eval_proportion", 0.3,
                   "--output_dir", f"out{number}", "--epochs", 2, "--lr", "1e-3", "--seed", seed,
                   "--mixed_precision", "no"]  # fmt: skip
        if hash_seed:
            done = run_script(*command, PYTHONHASHSEED=hash_seed)
            assert done.returncode == 0, done.stdout
        else:
            assert run_main(*command)[0] == 0
        names = ("final_model/model.safetensors", "eval_report.json", "predictions.jsonl", "rows_to_check.jsonl",
                 "loss_curve.png", "score_distribution.png")  # fmt: skip
        files = [(tmp_path / f"out{number}" / name).read_bytes() for name in names]
        results.append((files, scalars_of(tmp_path / f"out{number}")))
    assert results[0] == results[1]
    assert results[0][0][0] != results[2][0][0] and results[0][1] != results[2][1]


def test_seed_everything_seeds_all_generators_and_turns_determinism_on():
    import random

    draws = []
    for _ in range(2):
        seed_everything(7)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("given", "cuda", "used"),
    [(None, False, ":4096:8"), (":16:8", True, ":16:8"), (":4096:2", True, ":4096:8"), (":4096:2", False, ":4096:2")],
)
def test_the_cublas_variable_is_set_respected_or_replaced_with_a_line_that_says_so(
    given, cuda, used, monkeypatch, capsys
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given or "")
    if given is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    seed_everything(1)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == used
    assert (":4096:2" in capsys.readouterr().out) == (given == ":4096:2" and cuda)


@pytest.mark.parametrize(
    ("asked", "native", "used"),
    [("no", False, "no"), ("fp16", True, "no"), ("bf16", False, "no"), ("bf16", True, "bf16")],
)
def test_where_the_processor_has_no_such_format_fp32_is_used_and_said(asked, native, used, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert supported_precision(asked, torch.device("cpu")) == used
    said = capsys.readouterr().out
    assert ("fp32" in said and asked in said) if used != asked else said == ""


def test_train_can_be_called_again_in_one_process_with_another_precision(
    small_model, write_jsonl, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    args = {"model_name_or_path": small_model, "train_dataset": write_jsonl("rows.jsonl", rows_of(4)),
            "eval_dataset": None, "output_dir": str(tmp_path / "out"), "epochs": 1}  # fmt: skip
    precisions = [train_bert_rerank.train({**args, "mixed_precision": each})["precision"] for each in ("no", "bf16")]
    assert precisions == ["no", "bf16"]
    from safetensors.torch import load_file

    weights = load_file(Path(args["output_dir"]) / "final_model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
