"""Commands that die with the process that started them."""

from __future__ import annotations

import sys

# On Linux a command dies with the thread that it was started by, however that ends.
_TIED = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
)
TIED = [sys.executable, "-S", "-E", "-c", _TIED] if sys.platform == "linux" else []
