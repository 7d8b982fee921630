"""The size of a job's vocabulary, from Megatron's arguments and the tokenizer's files."""

import json
from collections.abc import Callable
from pathlib import Path

from galvatron_megatron.describe.megatron_flags import option
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.checks import require_count

_TOKENIZERS_OF_GIVEN_SIZE = {
    None: None,
    "NullTokenizer": None,
    "NullMultimodalTokenizer": None,
    # Megatron's DEFAULT_TIKTOKEN_MAX_VOCAB.
    "TikTokenizer": 2**17,
}
"""Tokenizers whose vocabulary is what ``--vocab-size`` says, and its default; others have one of their own."""


USUAL_SIZES = {"GPT2BPETokenizer": 50257, "Llama2Tokenizer": 32000, "Llama3Tokenizer": 128256}
"""Entries of the vocabulary that a kind of tokenizer was made for; its files may be of another size."""


class UnknownVocabularyError(DescriptionError):
    """Nothing at hand says how large the vocabulary is."""


def vocabulary(get: Callable[[str], object], known: int | None) -> tuple[int, int]:
    """Finds the size of a job's vocabulary.

    Args:
        get: gives the value of a destination of Megatron's arguments.
        known: entries of the vocabulary, where the caller knows them.

    Returns:
        Entries before padding, and the divisor that they are padded to (times tp).

    Raises:
        DescriptionError: the divisor or the tensor-parallel size is no integer >= 1, or the tokenizer's files
            cannot be read.
        UnknownVocabularyError: nothing says how large the vocabulary is.
    """
    divisor = get("make_vocab_size_divisible_by")
    for dest in ("make_vocab_size_divisible_by", "tensor_model_parallel_size"):
        require_count(get(dest), option(dest), error=DescriptionError)
    size = known
    if size is None:
        size = _vocabulary_before_padding(get)
    padded = get("padded_vocab_size")
    if padded is not None:
        multiple = divisor * get("tensor_model_parallel_size")
        if size is not None and -(-size // multiple) * multiple == padded:
            return size, divisor
        # Megatron takes it as it is and pads no more.
        return padded, 1
    if size is None:
        raise UnknownVocabularyError(
            "model vocab_size: the command line does not say it and the tokenizer's files are not at hand; "
            f"valid: {option('vocab_size')} or {option('padded_vocab_size')}"
        )
    return size, divisor if get("pad_vocab_size") else 1


def _vocabulary_before_padding(get: Callable[[str], object]) -> int | None:
    kind, given = get("tokenizer_type"), get("vocab_size")
    if kind in _TOKENIZERS_OF_GIVEN_SIZE:
        return given or _TOKENIZERS_OF_GIVEN_SIZE[kind]
    counted = _tokenizer_vocabulary(get)
    # Megatron takes the tokenizer's; the flag helps where its files are elsewhere.
    return given if counted is None else counted


def _tokenizer_vocabulary(get: Callable[[str], object]) -> int | None:
    """Counts the entries of the tokenizer's files, where they are JSON and lie on this machine."""
    vocab_file, model = get("vocab_file"), get("tokenizer_model")
    try:
        if (
            vocab_file is not None
            and Path(str(vocab_file)).suffix == ".json"
            and Path(str(vocab_file)).is_file()
        ):
            return len(json.loads(Path(str(vocab_file)).read_text(encoding="utf-8")))
        tokenizer = Path(str(model)) / "tokenizer.json" if model is not None else None
        if tokenizer is None or not tokenizer.is_file():
            return None
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        entries = set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}
        return len(entries | {entry["content"] for entry in content.get("added_tokens", ())})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DescriptionError(
            f"tokenizer of the command line: cannot count its vocabulary ({error!r}); valid: the files of a "
            f"Hugging Face tokenizer, or {option('padded_vocab_size')} without {option('tokenizer_type')}"
        ) from error
