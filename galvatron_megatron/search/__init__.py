"""Choose a plan. Imports no torch, megatron or deepspeed."""
