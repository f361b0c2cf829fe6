"""The policy: chat rendering, log-probs, sampling, saving."""
