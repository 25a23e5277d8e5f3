"""`pip install .`: the module, the command, and what they need."""

import ast
import os
import re
import shutil
import subprocess
import sys
from email.parser import Parser
from inspect import signature

import pytest
from conftest import ROOT, TINY, rows_of

from train_bert_rerank import BertRerankerModel, seed_everything, train


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The folder that pip installed the repository to, from a copy, since a build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("packaging")
    (folder / "source").mkdir()
    for name in ("pyproject.toml", "README.md", "requirements.txt", "LICENSE", "train_bert_rerank.py"):
        shutil.copy(ROOT / name, folder / "source")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
                    "--no-build-isolation", "--target", "site", "./source"], check=True, cwd=folder)  # fmt: skip
    return folder / "site"


def run_command(installed, folder, *arguments):
    """CompletedProcess of `train-bert-rerank …`, in a folder that holds nothing of the repository."""
    return subprocess.run(
        [str(installed / "bin" / "train-bert-rerank"), *map(str, arguments)], cwd=folder, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip


def test_the_command_trains_and_the_module_loads_what_it_wrote(installed, small_model, tmp_path, write_jsonl):
    done = run_command(installed, tmp_path, "--model_name_or_path", small_model, "--train_dataset",
                       write_jsonl("rows.jsonl", rows_of(8, 2)), "--eval_dataset", None, "--epochs", 1,
                       "--mixed_precision", "no", "--output_dir", "out")  # fmt: skip
    assert done.returncode == 0 and "Model saved successfully!" in done.stdout, done.stdout
    code = ("import train_bert_rerank as module; print(module.__file__); "
            "print(module.BertRerankerModel.from_pretrained('out/final_model').predict(('q', 'c')))")
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)},
                           capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    assert found[0] == str(installed / "train_bert_rerank.py") and 0 < float(found[1]) < 1


def test_help_of_the_command_shows_the_settings_and_a_missing_file_is_one_error(installed, tmp_path):
    shown = run_command(installed, tmp_path, "--help").stdout
    assert "usage: train-bert-rerank [--key value ...]" in shown and "--model_name_or_path" in shown
    done = run_command(installed, tmp_path, "--model_name_or_path", TINY)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("Error: default_train_data.jsonl: cannot be read")


def test_the_package_asks_for_what_requirements_txt_names_and_for_a_python_that_is_supported(installed):
    [metadata] = installed.glob("train_bert_rerank-*.dist-info/METADATA")
    fields = Parser().parsestr(metadata.read_text(encoding="utf-8"))
    wanted = re.findall(r"^[a-z].*?(?=\s*(?:#|$))", (ROOT / "requirements.txt").read_text(), re.M)
    assert len(wanted) >= 7 and sorted(fields.get_all("Requires-Dist")) == sorted(wanted)
    assert fields["Requires-Python"] == ">=3.10"
    assert not [path for path in installed.glob("*") if path.name not in (
        "bin", "train_bert_rerank.py", "__pycache__", metadata.parent.name)]  # fmt: skip


PUBLIC = ["from_pretrained", "save_pretrained", "preprocess", "forward", "predict", "rank"]


@pytest.mark.parametrize("function", [seed_everything, train, *(getattr(BertRerankerModel, name) for name in PUBLIC)])
def test_every_parameter_of_the_public_interface_has_a_type(function):
    parameters = [each for name, each in signature(function).parameters.items() if name != "self"]
    assert parameters and all(each.annotation is not each.empty for each in parameters)


def test_every_package_that_the_script_imports_is_named_in_requirements_txt():
    source = (ROOT / "train_bert_rerank.py").read_text(encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    recorded = set(re.findall(r'"(\w+)"', re.search(r"packages = \((.*)\)", source)[1]))
    named = set(re.findall(r"^[a-z_]+", (ROOT / "requirements.txt").read_text(), re.M))
    assert (imported | recorded) - sys.stdlib_module_names <= named
