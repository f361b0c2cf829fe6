"""The errors that Turnwise raises on purpose, in one tree.

    TurnwiseError
      ConfigError              a config that cannot work
        Damaged                the config.yaml in a run's folder cannot be read
      PluginError              a name that is not registered, options that a part does not take
        NameClash              two plugins registered one name
      PolicyError              a model that cannot be loaded, or used as a policy
        TemplateError          its chat template cannot carry a conversation
        UnfitModel             it cannot be sampled from, or trained, exactly
      PartFailed               a judge, player or environment broke its contract
        EnvironmentBroke       an environment raised, hung or broke its space
        UserFailed             the user of a dialogue gave no reply
        NoRoom                 a dialogue cannot begin before another one has ended
        NoAnswer               a coroutine did not come back in time
      UntrainableEpisode       replies that no policy sampled, an episode that failed
      PreferenceError          a comparison, or a file of them, that cannot be used
      DatabaseError            a database that is locked or cannot be used
        LedgerError            the same of a ledger, or what is written contradicts what it holds
      FileError                a file of a run or a model that is damaged
      CheckpointError          a checkpoint that cannot be written or read
      NonFiniteError           NaN or infinity where a number must be
      OutOfMemory              memory ran out
      TooManyFailures          more environments or judges failed than the run allows
      Paused                   a source or an environment waits for a decision: its budget is
                               spent, it is in quarantine
      Interrupted              the run was asked to end while a stage waited

Judges and plugins derive theirs from `TurnwiseError` too, in their own packages. The command line
prints an error of this tree as one line; any other one is a bug and keeps its traceback.
"""

from __future__ import annotations


class TurnwiseError(Exception):
    """The root of the tree. A message says what was asked, what there is, and what to do."""


class ConfigError(TurnwiseError, ValueError):
    """The config is wrong. The message says where, and what would be right."""


class Damaged(ConfigError):
    """The config.yaml in a run's folder is gone or cannot be read."""


class PluginError(TurnwiseError):
    """A plugin breaks the contract, a name is not registered, or its factory refuses its
    options."""


class NameClash(PluginError):
    """Two plugins registered one name."""

    def __init__(self, kind: str, entry: str, first: str, second: str) -> None:
        super().__init__(
            f"{kind} {entry!r} is registered by both {first!r} and {second!r}; rename or block one"
            " of them"
        )
        self.kind, self.entry = kind, entry


class PolicyError(TurnwiseError):
    """The model cannot be loaded or used as a policy. The message says what to do."""


class TemplateError(PolicyError, ValueError):
    """The tokenizer's chat template cannot carry a multi-turn conversation.

    The message says what to do.
    """


class UnfitModel(PolicyError, ValueError):
    """The model cannot be sampled from or trained exactly. The message says why."""


class PartFailed(TurnwiseError):
    """A part that is not the engine's own (a judge, a player, an environment) broke its contract.

    The message is the complete reason of the failure, as it is recorded.
    """


class NoAnswer(PartFailed):
    """A coroutine did not come back in time."""


class EnvironmentBroke(PartFailed):
    """An environment raised, hung or broke its space.

    The episode ends as failed with this reason.
    """


class UserFailed(PartFailed):
    """The user of a dialogue, a person or a model that plays one, gave no reply.

    The episode ends as failed; its reason has `WHOSE` right after the call that failed, so that it
    is told apart from an environment that broke.
    """

    WHOSE = "the user failed"

    def __str__(self) -> str:
        return f"{self.WHOSE}: {super().__str__()}"


class NoRoom(PartFailed):
    """A dialogue cannot begin now, because the server behind it plays as many as it can.

    Nothing has failed: it is begun again when another one has ended, or soon.
    """


class UntrainableEpisode(TurnwiseError, ValueError):
    """An episode that RL cannot train on: no policy of ours sampled its replies, or its environment
    failed."""


class PreferenceError(TurnwiseError, ValueError):
    """A file of preferences, or a comparison, that cannot be used. The message says where."""


class DatabaseError(TurnwiseError):
    """The database refuses: it is locked, or cannot be used.

    Attributes:
        broke_off: the connection did, and whether what was written is there is not known.
    """

    broke_off = False


class LedgerError(DatabaseError):
    """The ledger refuses: it is locked, newer than this version, or what was written contradicts
    what it holds."""


class FileError(TurnwiseError):
    """A file that a run or a model needs is damaged."""


class CheckpointError(TurnwiseError):
    """A checkpoint cannot be written or read.

    The message says what still stands, and what to do.
    """


class NonFiniteError(TurnwiseError, RuntimeError):
    """NaN or infinity in logits, a reward, an advantage or a gradient. The message names the batch.

    The step is not taken, though earlier steps of the same update stand; the run stops, and its
    last checkpoint is whole.
    """


class OutOfMemory(TurnwiseError, RuntimeError):
    """Memory ran out. The message says what to lower."""


class TooManyFailures(TurnwiseError, RuntimeError):
    """More environments or judges failed than the run allows."""


class Paused(TurnwiseError):
    """A source cannot go on before a decision is made: its budget is spent, or it is in quarantine.

    The run ends as if it had been interrupted, with everything kept and this message, and can be
    resumed.
    """


class Interrupted(TurnwiseError):
    """The run was asked to end while a stage waited for feedback.

    Raised within a stage. What was played and asked is kept, nothing trains; the run catches it and
    ends.
    """
