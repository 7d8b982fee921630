"""Random cost tables and tiny requests for exactness tests."""

import random
from functools import lru_cache

from galvatron_megatron.cost.protocol import LayerCost, Setting
from galvatron_megatron.describe.model import Attention, Layer, Mlp, Model
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.strategy import Offload, Strategy


def tiny_model(kinds: list[int], **changes: object) -> Model:
    """A model whose layer i is of kind kinds[i] (they differ in their feed-forward width)."""
    layers = tuple(
        Layer(
            kind=LayerKind.BLOCK,
            attention=Attention(heads=12, query_groups=12, head_dim=4),
            mlp=Mlp(ffn_hidden_size=48 * (1 + kind)),
        )
        for kind in kinds
    )
    values = {
        "name": "tiny",
        "hidden_size": 48,
        "seq_length": 4096,
        "vocab_size": 96,
        "layers": layers,
        **changes,
    }
    return Model(**values)


class RandomCosts:
    """Prices drawn from a seed and the arguments they may depend on; no structure that a search could lean on.

    Args:
        model: whose layers are priced.
        seed: of all prices.
        levels: times are multiples of 1/levels, so that few levels make many ties; 0 for continuous times.
        reshard: scale of resharding seconds.
        sync: scale of synchronisation seconds.
        trade: True lets faster strategies need more memory, as real ones do.
    """

    def __init__(
        self,
        model: Model,
        seed: int,
        *,
        levels: int = 0,
        reshard: float = 0.3,
        sync: float = 1.0,
        trade: bool = True,
    ) -> None:
        self.model, self.seed, self.levels = model, seed, levels
        self.reshard, self.sync, self.trade = reshard, sync, trade
        self._layer = lru_cache(maxsize=None)(self._draw_layer)

    def _random(self, *key: object) -> random.Random:
        return random.Random(repr((self.seed, key)))

    def _time(self, generator: random.Random, scale: float) -> float:
        value = generator.random()
        if self.levels:
            value = round(value * self.levels) / self.levels
        return value * scale

    def _draw_layer(
        self, layer: Layer, strategy: Strategy, pp: int, micro_batches: int, samples: int
    ) -> LayerCost:
        generator = self._random("layer", layer, strategy, pp, micro_batches, samples)
        seconds = 0.5 + self._time(generator, 1.0)
        scale = 2.0 - seconds if self.trade else 1.0
        return LayerCost(
            micro_batch_seconds=seconds * samples,
            sync_seconds=self._time(generator, self.sync),
            state_bytes=generator.randint(0, int(60 * scale)),
            activation_bytes=generator.randint(0, int(30 * scale)),
            transient_bytes=generator.choice([0, 0, generator.randint(0, 40)]),
            host_bytes=0 if strategy.offload is Offload.NONE else generator.randint(0, 20),
        )

    def layer_cost(self, layer: int, strategy: Strategy, setting: Setting) -> LayerCost:
        return self._layer(
            self.model.layers[layer], strategy, setting.pp, setting.micro_batches, setting.micro_batch_samples
        )

    def _end(self, name: str, setting: Setting) -> LayerCost:
        generator = self._random(name, setting)
        return LayerCost(
            micro_batch_seconds=self._time(generator, 0.7),
            sync_seconds=self._time(generator, self.sync),
            state_bytes=generator.randint(0, 20),
            activation_bytes=generator.randint(0, 10),
            transient_bytes=generator.randint(0, 30),
            host_bytes=0 if setting.base.offload is Offload.NONE else generator.randint(0, 20),
        )

    def embedding_cost(self, setting: Setting) -> LayerCost:
        return self._end("embedding", setting)

    def head_cost(self, setting: Setting) -> LayerCost:
        return self._end("head", setting)

    def reshard_seconds(self, layer: int, before: Strategy, after: Strategy, setting: Setting) -> float:
        if before.layout == after.layout:
            return 0.0
        generator = self._random(
            "reshard", before.layout, after.layout, setting.pp, setting.micro_batch_samples
        )
        return self._time(generator, self.reshard)

    def send_seconds(self, setting: Setting) -> float:
        return self._time(self._random("send", setting), 0.2)

    def overhead_bytes(self, setting: Setting, position: int) -> int:
        return self._random("overhead", setting, position).randint(0, 5)
