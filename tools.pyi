from .engine.util import files
from .engine.util.aio import background
from .engine.util.ids import canonical_json, derive_id
from .engine.util.lazy import from_stub
from .engine.util.secrets import config_in_use, in_use, redact, redacted, url_in_use
from .engine.util.suggest import did_you_mean, install
from .engine.util.wording import one_line

__all__ = [
    "background", "canonical_json", "config_in_use", "derive_id", "did_you_mean", "files",
    "from_stub", "in_use", "install", "one_line", "redact", "redacted", "url_in_use",
]  # fmt: skip
