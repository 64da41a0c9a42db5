"""Adapters of PEFT, merged into a model while it is loaded."""
