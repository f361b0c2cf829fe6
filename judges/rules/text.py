"""Rules on the text of a conversation's replies: cheap, exact and deterministic. Scores lie in
[0, 1]; 1 is good.

Rules on an answer that is known are in `answers.py`, on replies that a program reads in
`structure.py`, on questions and what became of the answers in `economy.py`; `combine.py` makes one
judge of several. A plain function of an episode is a judge too: `feedback=[lambda episode:
float("please" in episode.turns[-1].action)]`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import regex

from ...protocols import Episode, Feedback, Judge
from ...tools import did_you_mean, install

INSTALL = f"install it with: {install('judges')}"


def share_within(count: int, least: int, most: int) -> float:
    """Scores a count: 1 within the limits. Below, the share of `least` that is there; above, it
    falls with the excess in proportion to `most`: twice as many is 0."""
    if count < least:
        return count / least
    return max(0.0, 1.0 - max(0, count - most) / most)


class Length(Judge):
    """Scores whether replies keep within a number of words. A reply over the limit loses in
    proportion: twice as long scores 0.

    Args:
        max_words: per reply.
        min_words: per reply; a shorter one scores its share of them.
    """

    def __init__(self, max_words: int = 60, min_words: int = 0) -> None:
        if max_words < 1:
            raise ValueError(f"max_words must be at least 1, got {max_words}")
        if not 0 <= min_words <= max_words:
            raise ValueError(
                f"min_words must lie between 0 and max_words={max_words}, got {min_words}"
            )
        self.max_words, self.min_words = max_words, min_words

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Scores the mean over replies of how well their words lie within the bounds."""
        answers = []
        for episode in episodes:
            words = [len(turn.action.split()) for turn in episode.turns]
            turns = tuple(share_within(n, self.min_words, self.max_words) for n in words)
            answers.append(Feedback(episode.id, score=sum(turns) / len(turns), turn_scores=turns))
        return answers


class Turns(Judge):
    """Scores whether conversations keep within a number of turns. One over the limit loses in
    proportion: twice as long scores 0.

    Args:
        max_turns: replies per conversation.
        min_turns: a shorter conversation scores its share of them.
    """

    def __init__(self, max_turns: int, min_turns: int = 0) -> None:
        if max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, got {max_turns}")
        if not 0 <= min_turns <= max_turns:
            raise ValueError(
                f"min_turns must lie between 0 and max_turns={max_turns}, got {min_turns}"
            )
        self.max_turns, self.min_turns = max_turns, min_turns

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Scores how well the number of turns lies within the bounds."""
        return [
            Feedback(e.id, score=share_within(len(e.turns), self.min_turns, self.max_turns))
            for e in episodes
        ]


class Regex(Judge):
    """Scores whether replies match a pattern, or do not.

    Args:
        pattern: a regular expression, searched without regard to case.
        where: "last" reply, "any" or "all" of them.
        forbid: score 1 when it does not match.
    """

    def __init__(
        self, pattern: str, where: Literal["last", "any", "all"] = "any", forbid: bool = False
    ) -> None:
        if where not in ("last", "any", "all"):
            raise ValueError(f"where must be 'last', 'any' or 'all', got {where!r}")
        self._pattern = Pattern(pattern)
        self.pattern, self.where, self.forbid = pattern, where, forbid

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Scores 1 where the last, any or all replies match, else 0; `forbid` turns it round."""
        answers = []
        for episode in episodes:
            hits = [bool(self._pattern.search(turn.action)) for turn in episode.turns]
            found = {"last": hits[-1], "any": any(hits), "all": all(hits)}[self.where]
            answers.append(Feedback(episode.id, score=float(found != self.forbid)))
        return answers


SECONDS = 5.0  # of the processor, for one look of a pattern at one text


class Pattern:
    """A user's regular expression, searched without regard to case, in bounded time: one such as
    `(a|aa)+$` would never end on some texts, and stop the run with it.

    Raises:
        ValueError: it is not a regular expression; from `search` and `finditer`, it took longer
            than `SECONDS`.
    """

    def __init__(self, pattern: str) -> None:
        try:
            re.compile(pattern)  # Python's own syntax is what the page promises
            self._found = regex.compile(pattern, regex.IGNORECASE)
        except (re.error, regex.error, TypeError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        self.pattern, self.groups = pattern, self._found.groups

    def search(self, text: str) -> Any:
        """Returns the first match in a text; None where there is none."""
        with self._bounded():
            return self._found.search(text, timeout=SECONDS)

    def finditer(self, text: str) -> list[Any]:
        """Returns all matches in a text."""
        with self._bounded():
            return list(self._found.finditer(text, timeout=SECONDS))

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise ValueError(
                f"the pattern {self.pattern!r} did not end within {SECONDS:g} seconds on a reply:"
                " write it without repetitions within repetitions"
            ) from None


class Forbidden(Judge):
    """Scores 1 where no reply contains a forbidden phrase, 0 where one does: a long conversation
    does not make up for it. Each reply is scored too, and `details["found"]` lists the phrases,
    `{"turn": 0, "said": [...]}`.

    Words and phrases are found as whole words, whatever their case, width, spacing and invisible
    characters, in any script; a phrase that begins or ends in a script without spaces (Chinese,
    Japanese, Thai, ...) is found anywhere on that side.

    Args:
        words: words, phrases, and regular expressions between slashes (`/colou?r/`); or the path of
            a text file with one a line, where empty lines and lines that begin with `#` are
            skipped.
    """

    def __init__(self, words: Sequence[str] | str) -> None:
        if isinstance(words, str):
            path = Path(words)
            if not path.is_file():
                raise ValueError(
                    "words is a list, or the path of a text file with one entry a line; there is"
                    f" no file {words!r}"
                )
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            words = [line for line in lines if line and not line.startswith("#")]
        self.words = list(words)
        if not self.words:
            raise ValueError("words names nothing that is forbidden")
        self._found = [_finder(entry) for entry in self.words]

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Scores 1 where no reply holds a forbidden phrase, else 0; each turn likewise."""
        answers = []
        for episode in episodes:
            phrases = [self._phrases_in(turn.action) for turn in episode.turns]
            turns = tuple(float(not each) for each in phrases)
            found = [{"turn": k, "said": each} for k, each in enumerate(phrases) if each]
            answers.append(
                Feedback(episode.id, score=min(turns), turn_scores=turns, details={"found": found})
            )
        return answers

    def _phrases_in(self, reply: str) -> list[str]:
        visible, folded = _visible(reply), _folded(reply)
        return [
            entry
            for entry, (pattern, whole) in zip(self.words, self._found, strict=True)
            if (
                any(_is_whole(folded, m) for m in pattern.finditer(folded))
                if whole
                else pattern.search(visible)
            )
        ]


def _finder(entry: Any) -> tuple[Pattern | re.Pattern[str], bool]:
    """Returns what to look for, and whether it is a phrase that must stand as whole words in folded
    text (else: a pattern, in text as it is)."""
    if not isinstance(entry, str) or not entry.strip():
        raise ValueError(
            f"a forbidden entry must be a word, a phrase or a /pattern/, got {entry!r}; numbers"
            " need quotes in YAML"
        )
    if len(entry) > 2 and entry.startswith("/") and entry.endswith("/"):
        return Pattern(entry[1:-1]), False
    return re.compile(r"\s+".join(map(re.escape, _folded(entry).split()))), True


def _visible(text: str) -> str:
    """Returns a text in one form for what looks the same: full-width letters, ligatures, and
    invisible characters."""
    return "".join(
        c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf"
    )


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", _visible(text).casefold())


def _is_whole(text: str, match: re.Match[str]) -> bool:
    start, end = match.span()
    return not (start > 0 and _joined(text[start - 1], text[start])) and not (
        end < len(text) and _joined(text[end - 1], text[end])
    )


def _joined(left: str, right: str) -> bool:
    """Returns whether two adjacent characters belong to one word: letters, marks, digits and
    underscores do, where words have spaces."""
    if any(unicodedata.name(c, "").startswith(_UNSPACED) for c in (left, right)):
        return False
    return all(unicodedata.category(c)[0] in "LMN" or c == "_" for c in (left, right))


_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


class Repetition(Judge):
    """Scores the share of replies that do not repeat an earlier reply of the conversation; case and
    spaces do not count.

    Args:
        ngram: compare runs of so many words instead of whole replies: a reply scores the share of
            its n-grams that the agent says for the first time, here or in an earlier reply
            (distinct-n, Li et al. 2016, arXiv:1510.03055, per reply). One too short for a single
            n-gram counts as one.
    """

    def __init__(self, ngram: int | None = None) -> None:
        if ngram is not None and ngram < 1:
            raise ValueError(f"ngram must be at least 1, got {ngram}")
        self.ngram = ngram

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Scores the mean over turns of the share of n-grams that were not there before."""
        answers = []
        for episode in episodes:
            seen: set[tuple[str, ...]] = set()
            turns = []
            for turn in episode.turns:
                grams = list(self._grams(turn.action.lower().split()))
                before = len(seen)
                seen.update(grams)
                turns.append((len(seen) - before) / len(grams))
            answers.append(
                Feedback(episode.id, score=sum(turns) / len(turns), turn_scores=tuple(turns))
            )
        return answers

    def _grams(self, words: list[str]) -> Iterator[tuple[str, ...]]:
        n = self.ngram or len(words)
        for i in range(max(1, len(words) - n + 1)):
            yield tuple(words[i : i + n])


class Questions(Judge):
    """Scores few questions: 1 up to `allowed` question marks in the agent's replies, then `cost`
    less for each further one. Whether the answers were of use is scored by `economy`.

    Args:
        allowed: free questions per conversation.
        cost: per further question.
    """

    def __init__(self, allowed: int = 3, cost: float = 0.25) -> None:
        if allowed < 0 or cost < 0:
            raise ValueError(f"allowed and cost must not be negative, got {allowed} and {cost}")
        self.allowed, self.cost = allowed, cost

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Scores 1 less `cost` for each question mark above those allowed, at least 0."""
        asked = [sum(turn.action.count("?") for turn in episode.turns) for episode in episodes]
        return [
            Feedback(episode.id, score=max(0.0, 1.0 - self.cost * max(0, n - self.allowed)))
            for episode, n in zip(episodes, asked, strict=True)
        ]


class Language(Judge):
    """Scores the share of replies in a given language. A reply whose language cannot be told (`ok`,
    `42`, a name) gets no opinion, and a conversation of nothing else abstains.
    `details["languages"]` has the likeliest language of each reply, null where none is certain.

    Languages are told by py3langid (naive Bayes on byte n-grams, Lui and Baldwin 2012), without a
    network.

    Args:
        languages: one or several ISO 639 codes: "en", or ["de", "gsw"].
        certainty: the probability from which a reply counts as being, or not being, in them.
    """

    def __init__(self, languages: str | Sequence[str], certainty: float = 0.5) -> None:
        self.languages = sorted({languages} if isinstance(languages, str) else set(languages))
        known = _identifier().labels
        for code in self.languages:
            if code not in known:
                raise ValueError(
                    f"no language {code!r}; languages are ISO 639"
                    f" codes.{did_you_mean(str(code), known)}"
                )
        if not self.languages:
            raise ValueError("languages names none")
        if not 0 < certainty <= 1:
            raise ValueError(f"certainty must lie above 0 and up to 1, got {certainty}")
        self.certainty = certainty

    def score(self, episodes: Sequence[Episode]) -> list[Feedback]:
        """Scores the mean over the replies whose language can be told; abstains without any."""
        answers = []
        for episode in episodes:
            languages = [self._language_of(turn.action) for turn in episode.turns]
            turns = tuple(score for score, _ in languages)
            sure = [score for score in turns if score is not None]
            details = {"languages": [language for _, language in languages]}
            if sure:
                answers.append(
                    Feedback(
                        episode.id, score=sum(sure) / len(sure), turn_scores=turns, details=details
                    )
                )
            else:
                answers.append(
                    Feedback.abstained(
                        episode.id, "the language of no reply can be told", details=details
                    )
                )
        return answers

    def _language_of(self, reply: str) -> tuple[float | None, str | None]:
        """Returns a reply's score and its language; both None where it cannot be told."""
        chances = dict(_identifier().rank(reply))
        likeliest = max(chances, key=lambda language: chances[language])
        if sum(chances[language] for language in self.languages) >= self.certainty:
            return 1.0, max(self.languages, key=lambda language: chances[language])
        # Zxx: no language at all, such as numbers.
        if likeliest != "zxx" and chances[likeliest] >= self.certainty:
            return 0.0, likeliest
        return None, None


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ImportError(f"the judge 'language' needs py3langid: {INSTALL}") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
