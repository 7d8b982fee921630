"""Padding of embeddings in checkpoints, told apart from other vocabularies."""

from dataclasses import dataclass

from megatron.training.global_vars import get_tokenizer

from galvatron_megatron.errors import PlanError


@dataclass(kw_only=True, frozen=True, slots=True)
class Vocabulary:
    """Tokens of this job."""

    tokens: int
    """Of the tokenizer."""
    divisor: int
    """``--make-vocab-size-divisible-by``: a job pads to a multiple of it times its tensor-parallel degree."""

    @classmethod
    def of_job(cls, divisor: int) -> "Vocabulary":
        """That of the job in this process, whose tokenizer is built.

        Args:
            divisor: ``--make-vocab-size-divisible-by``.
        """
        return cls(tokens=get_tokenizer().vocab_size, divisor=divisor)

    def check(self, rows: int, name: str, tensor_parallel: int, *, divisor: int | None = None) -> None:
        """Refuses embeddings of another vocabulary.

        Args:
            rows: of the embedding in the checkpoint, with or without padding.
            name: of the parameter, behind what holds it.
            tensor_parallel: degree of the job that saved it.
            divisor: that job's ``--make-vocab-size-divisible-by``; this job's by default.

        Raises:
            PlanError: tokens are missing, or there are more rows than padding explains.
        """
        multiple = (divisor or self.divisor) * tensor_parallel
        most = -(-self.tokens // multiple) * multiple
        if not self.tokens <= rows <= most:
            raise PlanError(
                f"{name} has {rows} rows, but the tokenizer {self.tokens} tokens; valid: {self.tokens} to "
                f"{most} rows (the vocabulary and --make-vocab-size-divisible-by as they were)"
            )
