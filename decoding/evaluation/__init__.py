"""Evaluation by other projects' tools: their models, under a policy."""
