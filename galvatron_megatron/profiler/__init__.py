"""Fill a profile by measuring or tracing. Needs torch and megatron-core."""
