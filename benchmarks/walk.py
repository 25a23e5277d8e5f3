"""Run every bash block of a page word for word, in order, in one shell, in a fresh clone of the repository.

    python benchmarks/walk.py docs/serving.md

Commands are echoed as they run; the first that fails ends the walk with its exit status. The clone is removed, and
what is not committed is not in it.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / sys.argv[1]).read_text(encoding="utf-8"), re.M | re.S)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), f"{folder}/clone"], check=True)
        status = subprocess.run(["bash", "-exo", "pipefail", "-c", "".join(blocks)], cwd=f"{folder}/clone").returncode
    print(f"{len(blocks)} blocks, exit status {status}")
    sys.exit(status)
