from .engine.exchange.tasks import (
    Splits,
    content_key,
    named,
    read_tasks,
    scored,
    split_tasks,
    task_of,
    time_of,
)
from .engine.util import files
from .engine.util.aio import background
from .engine.util.calls import (
    Call,
    UnknownForm,
    call_text,
    calls_in,
    tool_schema,
    without_thoughts,
    words_in,
)
from .engine.util.ids import canonical_json, derive_id
from .engine.util.json_schema import error_of, parsed, validator
from .engine.util.lazy import from_stub
from .engine.util.secrets import config_in_use, in_use, redact, redacted, url_in_use
from .engine.util.suggest import did_you_mean, install
from .engine.util.tied import TIED
from .engine.util.wording import one_line, worded

__all__ = [
    "TIED", "Call", "Splits", "UnknownForm", "background", "call_text", "calls_in",
    "canonical_json", "config_in_use", "content_key", "derive_id", "did_you_mean",
    "error_of", "files", "from_stub", "in_use", "install", "named", "one_line", "parsed",
    "read_tasks", "redact", "redacted", "scored", "split_tasks", "task_of", "time_of",
    "tool_schema", "url_in_use", "validator", "without_thoughts", "worded", "words_in",
]  # fmt: skip
