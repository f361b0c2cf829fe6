from .engine.analysis.agreement import (
    EQUAL,
    alpha_interval,
    comparison_units,
    gwet_ac1,
    krippendorff_alpha,
    percent_agreement,
    rounded,
)
from .engine.analysis.bias import bias_report
from .engine.analysis.calibration import (
    KINDS,
    Correction,
    correlations,
    fit_correction,
    mean_interval,
    same_order,
)
from .engine.analysis.drift import Drift
from .engine.analysis.judge_report import (
    Feature,
    Ranges,
    calibrate,
    check_ranges,
    luck,
    named_features,
    on_scale,
    scores_of,
)
from .engine.analysis.prediction_powered import prediction_powered_mean
from .engine.analysis.preferences import (
    Pair,
    connected,
    opinion,
    opinions,
    pairs,
    rater_agreement,
    truth_agreement,
)
from .engine.analysis.style import LengthControl
from .engine.exchange.reading import import_data, read_records
from .engine.exchange.records import Unread, messages, rows
from .engine.exchange.writing import export_pairs, export_stepwise, export_unpaired, save
from .engine.feedback.judge_source import ask_judge
from .engine.feedback.sources import Sources
from .engine.feedback.specs import Member, Source, as_source, make_members, with_members

__all__ = [
    "Correction", "Drift", "EQUAL", "Feature", "KINDS", "LengthControl", "Member", "Pair",
    "Ranges", "Source", "Sources", "Unread", "alpha_interval", "as_source", "ask_judge",
    "bias_report", "calibrate", "check_ranges", "comparison_units", "connected", "correlations",
    "export_pairs", "export_stepwise", "export_unpaired", "fit_correction", "gwet_ac1",
    "import_data", "krippendorff_alpha", "luck", "make_members", "mean_interval", "messages",
    "named_features", "on_scale", "opinion", "opinions", "pairs", "percent_agreement",
    "prediction_powered_mean", "rater_agreement", "read_records", "rounded", "rows",
    "same_order", "save", "scores_of", "truth_agreement", "with_members",
]  # fmt: skip
