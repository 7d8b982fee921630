"""Execute a plan inside Megatron-core."""
