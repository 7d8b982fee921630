"""What is under way while activations are resharded; imported on ranks only."""

from collections.abc import Callable
from typing import Any

from galvatron_megatron.runtime.resharding import Resharder


def watch_resharding(seen: list[dict[str, Any]], chunks: list[Any]) -> Callable[[], None]:
    """Notes, at every all-to-all, how many buckets of several ranks are being reduced and gathered meanwhile.

    Args:
        seen: filled, one entry for each exchange of activations.
        chunks: the wrapped model chunks of this rank, which may be built later.

    Returns:
        Undoes it.
    """
    start = Resharder._start_exchange

    def watched(self: Resharder, *arguments: Any) -> Any:
        finish = start(self, *arguments)

        def noted(moved: Any) -> None:
            # The exchange has been started and not yet waited for; so have these.
            buckets = [
                group
                for chunk in chunks
                for part in chunk.parts.values()
                if part.dp_cp_group.size() > 1
                for group in part.bucket_groups
            ]
            seen.append(
                {
                    # Megatron's training loop must have found its own kind of wrapper.
                    "held_back": chunks[0].module.config.no_sync_func is not None,
                    "backward": arguments[1] == self.target,
                    "reduced": sum(group.grad_reduce_handle is not None for group in buckets),
                    "gathered": sum(group.param_gather_handle is not None for group in buckets),
                }
            )
            finish(moved)

        return noted

    Resharder._start_exchange = watched
    return lambda: setattr(Resharder, "_start_exchange", start)
