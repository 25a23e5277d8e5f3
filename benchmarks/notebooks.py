"""The script in a notebook, as its users run it there, against the command: the same weights?

    pip install -r requirements-dev.txt
    python benchmarks/notebooks.py [--way run ...]

Each way is a notebook of its own, made here and run by nbclient in a new kernel: `%run` with settings, train() twice in
one kernel, main() after an import, and the whole file pasted into a cell, with train() and with main(). A run is one
epoch of tiny_reranker over a few default rows. Prints, of each way, whether it ended, whether its weights are those of
`python train_bert_rerank.py`, and whether what it printed is what the command prints, but for the folder; exits with 1
where one is not so.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_bert_rerank.py"
ROWS = 16
IMPORT = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_bert_rerank"


def settings(folder, model):
    """The settings of each run."""
    return {"model_name_or_path": model, "train_dataset": str(folder / "rows.jsonl"), "eval_proportion": 0.5,
            "epochs": 1, "max_len": 64, "mixed_precision": "no", "base_interpolation": (), "log_with": None,
            "output_dir": "out"}  # fmt: skip


def edited(source, values):
    """The script's source with other values in `args`, as a user edits them."""
    lines = source.splitlines(keepends=True)
    for number, line in enumerate(lines):
        key = line.strip().partition(":")[0].strip('"')
        if line.startswith('        "') and key in values:
            lines[number] = f'        "{key}": {values[key]!r},  #{line.partition("  #")[2]}'
    return "".join(lines)


def cells_of(way, values):
    """The cells of a notebook that trains in one of the WAYS."""
    source = SCRIPT.read_text(encoding="utf-8")
    options = " ".join(f'--{key} "{value}"' for key, value in values.items())
    again = {**values, "output_dir": "again"}
    return {
        "run": [f"%run {SCRIPT} {options}"],
        "train twice": [f"{IMPORT}\nresult = train_bert_rerank.train({again!r})",
                        f"result = train_bert_rerank.train({values!r})"],
        "main after import": [IMPORT.replace(str(ROOT), "module"), "train_bert_rerank.main()"],
        "pasted, train": [source.rpartition("\nif __name__")[0], f"result = train({values!r})"],
        "pasted, main": [edited(source, values)],
    }[way]  # fmt: skip


WAYS = ("run", "train twice", "main after import", "pasted, train", "pasted, main")


def run_notebook(cells, folder):
    """What the cells printed, run one after the other in a new kernel in `folder`."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs if output.output_type == "stream"]
    return "".join(output.text for output in outputs if output.name == "stdout")


def weights_in(folder):
    """The SHA-256 of the weights that a run left in `folder`."""
    return hashlib.sha256((folder / "out" / "final_model" / "model.safetensors").read_bytes()).hexdigest()


def prepare(folder, model):
    """(settings of a run, its weights' SHA-256, what it printed) of `python train_bert_rerank.py`, run in `folder`."""
    rows = (ROOT / "default_train_data.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    values = settings(folder, model)
    command = [sys.executable, str(SCRIPT)]
    for key, value in values.items():
        command += [f"--{key}", str(value)]
    (folder / "command").mkdir()
    done = subprocess.run(command, cwd=folder / "command", capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(done.stderr)
    return values, weights_in(folder / "command"), done.stdout


def outcome_of(way, folder, values):
    """(weights' SHA-256, what was printed) of a notebook in one of the WAYS, run in a new folder."""
    work = folder / way.replace(", ", "_").replace(" ", "_")
    (work / "module").mkdir(parents=True)
    source = SCRIPT.read_text(encoding="utf-8")
    (work / "module" / "train_bert_rerank.py").write_text(edited(source, values), encoding="utf-8")
    printed = run_notebook(cells_of(way, values), work)
    return weights_in(work), printed


def main():
    """Run the notebooks and print a line of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", nargs="+", choices=WAYS, default=WAYS)
    ways = parser.parse_args().way
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values, expected_weights, expected_text = prepare(folder, str(ROOT / "tiny_reranker"))
        for way in ways:
            try:
                weights, printed = outcome_of(way, folder, values)
            except CellExecutionError as error:
                print(f"{way}: FAILED: {error.ename}: {error.evalue}")
                failures += 1
                continue
            has_same_weights = weights == expected_weights
            has_same_text = printed.endswith(expected_text)
            print(f"{way}: ended; same weights: {has_same_weights}; same text: {has_same_text}")
            failures += not (has_same_weights and has_same_text)
    sys.exit(min(failures, 1))


if __name__ == "__main__":
    main()
