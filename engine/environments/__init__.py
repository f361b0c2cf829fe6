"""Dialogues as Gymnasium environments: conventions, isolation, a pool of instances."""
