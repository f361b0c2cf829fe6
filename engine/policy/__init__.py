"""The policy: chat rendering, log-probs, sampling, saving."""

from .backends import Backend, Conversation, Sample, Sampling
from .chat import CHATML, ChatFormat, TemplateError
from .model import Micro, Output, Policy, PolicyError

__all__ = [
    "CHATML",
    "Backend",
    "ChatFormat",
    "Conversation",
    "Micro",
    "Output",
    "Policy",
    "PolicyError",
    "Sample",
    "Sampling",
    "TemplateError",
]
