"""What there is to plan for: model, cluster and profile. Imports no torch, megatron or deepspeed."""
