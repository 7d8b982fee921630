"""Deliberate mistakes in the runtime, each of which the parity tests must notice."""

MUTATIONS = {}
