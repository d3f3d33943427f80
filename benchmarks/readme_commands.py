"""How long the README's commands take.

python benchmarks/readme_commands.py MODEL --folder EMPTY --output benchmarks/results/readme-commands-NAME.json

Runs each command of the section "Your model" as it stands there, in an empty folder, and keeps its exit status and
seconds. A command that needs the network fails without it, and has no duration.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from countdown.results import meta, write
from documents import commit

README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--folder", type=Path, required=True, help="where they run")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    records = [timed(command, arguments.model, arguments.folder) for command in commands(README.read_text())]
    header = meta("python benchmarks/readme_commands.py MODEL", commit=commit())
    write(arguments.output, {"meta": header, "records": records})


def commands(text: str) -> list[str]:
    """Return the commands that a text has, without their comments."""
    lines = re.findall(r"^(countdown \w.*MODEL.*|countdown report .*)$", text, flags=re.MULTILINE)
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def timed(command: str, model: str, folder: Path) -> dict[str, object]:
    """Return how long a command took."""
    # That of this interpreter's environment.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started = time.perf_counter()
    done = subprocess.run(command.replace("MODEL", model), shell=True, cwd=folder, env=environment, check=False)
    seconds = time.perf_counter() - started
    print(f"{seconds:7.1f} s, {done.returncode}: {command}", file=sys.stderr, flush=True)
    return {"command": command, "status": done.returncode, "seconds": round(seconds, 1)}


if __name__ == "__main__":
    main()
