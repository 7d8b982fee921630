"""Attach to Megatron-LM."""
