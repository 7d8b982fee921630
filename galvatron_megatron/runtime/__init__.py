"""Executes a plan in Megatron-core: each layer with its own groups, layout, recomputation and optimizer."""
