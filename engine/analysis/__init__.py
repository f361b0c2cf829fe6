"""Statistics over records: agreement, calibration, bias, preferences, scores."""
