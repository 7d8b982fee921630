"""The model that a job's command line describes."""

import copy
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from galvatron_megatron.describe.megatron_args import model_from_arguments
from galvatron_megatron.describe.model import Model
from galvatron_megatron.errors import GalvatronError


def job_model(args: Namespace, defaults: Mapping[str, Any]) -> Model:
    """Describes the model of a job.

    Args:
        args: Megatron's parsed arguments, before its validation.
        defaults: the script's ``args_defaults``, which count where nothing was given, as in that validation.

    Raises:
        GalvatronError: the arguments describe no model that can be planned for.
    """
    found = dict(vars(args))
    for name, value in defaults.items():
        if found.get(name) is None:
            found[name] = value
    return model_from_arguments(found, vocab_size=_vocabulary(args, found))


def _vocabulary(args: Namespace, found: dict[str, object]) -> int | None:
    """Entries of the vocabulary where only the tokenizer itself knows them."""
    if args.vocab_size is not None or args.padded_vocab_size is not None:
        return None
    kind = found.get("tokenizer_type")
    if kind is None:
        return None
    try:
        model_from_arguments(found)
    except GalvatronError:
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

        made = copy.copy(args)
        made.tokenizer_type = kind
        try:
            return build_tokenizer(made).vocab_size
        except Exception as error:
            raise GalvatronError(
                f"--tokenizer-type {kind}: the tokenizer cannot be built ({error}); "
                "valid: its files, or --vocab-size"
            ) from None
    return None
