"""The small GPT of the benchmarks that profile it."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds its sizes."""
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--sequence", type=int, default=256)


def size_words(options: argparse.Namespace, batch: int) -> list[str]:
    """Megatron's arguments of its sizes and of a global batch."""
    sizes = {
        "--num-layers": options.layers,
        "--hidden-size": options.hidden,
        "--num-attention-heads": 4,
        "--seq-length": options.sequence,
        "--max-position-embeddings": options.sequence,
        "--vocab-size": 1000,
        "--tokenizer-type": "NullTokenizer",
        "--global-batch-size": batch,
    }
    return [str(word) for pair in sizes.items() for word in pair]
