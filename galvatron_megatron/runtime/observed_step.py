"""Times what a rank of a training job does once per step: zeroing gradients and Megatron's optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

from galvatron_megatron.runtime.observed_passes import Mark


class WatchedOptimizer:
    """Times the calls of ``train_step`` that a step of the optimizer consists of.

    Megatron's distributed optimizer ends its step by gathering the parameters; that part is left out, as in a
    profile. Methods are replaced on the objects of the job alone, until :meth:`remove`.

    Args:
        about: fields that say what is updated; written with the times.
        chunks: the model's, in Megatron's data-parallel wrappers.
        optimizer: Megatron's.
        on_gpu: whether there is a device with a stream of its own.
    """

    def __init__(self, about: dict[str, Any], chunks: Sequence[Any], optimizer: Any, on_gpu: bool) -> None:
        self._about = about
        self._on_gpu = on_gpu
        self._working: list[tuple[Mark, Mark]] = []
        self._gathering: list[tuple[Mark, Mark]] = []
        self._replaced: list[tuple[Any, str]] = []
        for chunk in chunks:
            self._time(chunk, "zero_grad_buffer", self._working)
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                self._time(group, "start_param_sync", self._gathering)
        self._time(optimizer, "zero_grad", self._working)
        self._time(optimizer, "step", self._working)

    def _time(self, owner: Any, name: str, spans: list[tuple[Mark, Mark]]) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = Mark.now(self._on_gpu)
            result = original(*args, **kwargs)
            spans.append((begin, Mark.now(self._on_gpu)))
            return result

        setattr(owner, name, timed)
        self._replaced.append((owner, name))

    def remove(self) -> None:
        """Gives the objects their own methods back."""
        for owner, name in self._replaced:
            delattr(owner, name)
        self._replaced.clear()

    def take(self) -> dict[str, Any]:
        """What a step took since the last call; the device must have done its work."""
        working, gathering = (
            sum(begin.seconds_until(end) for begin, end in spans) for spans in (self._working, self._gathering)
        )
        self._working.clear()
        self._gathering.clear()
        return {**self._about, "seconds": max(working - gathering, 0.0)}
