"""Find and run the fastest parallel plan for training with Megatron-core and DeepSpeed."""

__version__ = "0.1.0"
