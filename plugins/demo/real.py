"""Runs `turnwise demo --real`: a pretrained chat model of 135 M parameters, trained by RL on the
outcome alone, without any demonstration.

Three tasks, each a pipeline of `rl` and `evaluate` in a folder of its own, which goes on where it
was stopped:

- guess: TextArena's GuessTheNumber, by its own rules and its own reward;
- sums: chain_sum of reasoning-gym, where a wrong answer gets a hint;
- desk: SupportDesk, asked in the model's own words.

The model as it came and the one that was trained play the same starts, none of which was trained
on. Two numbers say whether it still speaks: the share of replies that are whole sentences or
moves, and what the model as it came thinks of each token.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ...learning import Policy, make_batch
from ...protocols import ConfigError, Episode, Rewards
from ...running import Display, Run, fetch, known_folder, open_ledger, print_scores, quiet, transcript
from ...tools import install
