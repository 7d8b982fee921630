"""Predict step time and peak memory of a plan. Imports no torch, megatron or deepspeed."""
