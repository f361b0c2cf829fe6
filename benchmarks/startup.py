"""How long one waits before anything happens: importing, and asking for help.

    python benchmarks/startup.py [--rounds 15]

Each command is started in a process of its own, in turns with the others, with its files in the
system's cache. Prints the median of seconds of each, and what it takes beyond Python itself. The
exit status says whether the limits hold, which are ratios: importing takes at most a tenth of what
`import torch` takes, help at most as long. What may not be loaded on the way (torch and other heavy
packages) is held by tests/test_architecture.py.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

TURNWISE = str(Path(sys.executable).with_name("turnwise"))
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import turnwise": [sys.executable, "-c", "import turnwise"],
    "turnwise --help": [TURNWISE, "--help"],
    "turnwise run --help": [TURNWISE, "run", "--help"],
    "import gymnasium": [sys.executable, "-c", "import gymnasium"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import transformers": [sys.executable, "-c", "import transformers"],
}


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for command in COMMANDS.values():
        seconds(command)
    taken = [{name: seconds(c) for name, c in COMMANDS.items()} for _ in range(rounds)]
    median = {name: statistics.median(row[name] for row in taken) for name in COMMANDS}
    beyond = {name: own - median["python -c pass"] for name, own in median.items()}
    print("| what | median seconds | beyond Python |\n| --- | --- | --- |")
    for name, own in median.items():
        print(f"| `{name}` | {own:.2f} | {beyond[name]:.2f} |")
    torch = beyond["import torch"]
    held = beyond["import turnwise"] <= torch / 10 and beyond["turnwise --help"] <= torch
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
