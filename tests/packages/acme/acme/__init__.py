"""A third-party package: everything that can be swapped, swapped, through the public API alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gymnasium
import turnwise


@turnwise.hookimpl
def register_envs():
    gymnasium.register("acme/Manners-v0", "acme.parts:Manners", max_episode_steps=3)


@turnwise.hookimpl
def register_judges(register):
    register("acme-polite", "acme.parts:Polite")
    register("acme-ranker", "acme.parts:Ranker")
    register("acme-people", "acme.parts:People")


@turnwise.hookimpl
def register_combiners(register):
    register("acme-best-of", "acme.parts:BestOf")


@turnwise.hookimpl
def register_credit(register):
    register("acme-learned", "acme.learning:LearnedSplit")


@turnwise.hookimpl
def register_optimizers(register):
    register("acme-actor-critic", "acme.learning:ActorCritic")
    register("acme-dpo", "acme.learning:DPO")


@turnwise.hookimpl
def register_backends(register):
    register("acme-backend", "acme.parts:Counted")


@turnwise.hookimpl
def register_stages(register):
    register("acme-offline", "acme.stage:Offline")


@turnwise.hookimpl
def register_commands(app):
    @app.command()
    def acme() -> None:
        """Says hello."""
        print("hello from acme")


def _note(event, **what):
    if path := os.environ.get("ACME_LOG"):
        with Path(path).open("a") as log:
            log.write(json.dumps({"event": event, **what}) + "\n")


@turnwise.hookimpl
def episodes_played(run, episodes):
    _note("episodes_played", stage=run.stage, count=len(episodes))


@turnwise.hookimpl
def feedback_received(run, feedback):
    _note(
        "feedback_received", sources=sorted({f.stamp.source for f in feedback}), count=len(feedback)
    )


@turnwise.hookimpl
def update_finished(run, update, metrics):
    _note("update_finished", update=update)


@turnwise.hookimpl
def run_finished():  # fewer arguments than specified: allowed
    _note("run_finished")
