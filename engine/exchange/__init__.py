"""Preference data in and out, in the formats of other tools; docs/preference-data.md shows each of
them.

records   a file's rows, and the feedback in it, whatever the format: `Ranked` or `Scored`
tools     the forms of annotation tools; questions, argilla, label_studio read their exports
reading   `read_records` tells a record's format by its content; `import_data` makes episodes and
          answers of a file
writing   what a ledger holds as rows of TRL's dataset types, as JSON lines or as a `datasets`
          folder
"""

from .reading import Imported, import_data, read_records, shares_opening
from .records import Ranked, Scored, rows
from .writing import FORMATS, export_pairs, export_stepwise, export_unpaired, save

__all__ = [
    "FORMATS", "Imported", "Ranked", "Scored", "export_pairs", "export_stepwise", "export_unpaired",
    "import_data", "read_records",
    "rows", "save", "shares_opening",
]  # fmt: skip
