"""Show plans and estimates to people. Imports no torch, megatron or deepspeed."""
