"""What a model takes, layer by layer, so that it can be divided between the host and graphics devices."""

from __future__ import annotations

from dataclasses import dataclass

from chorus.core.fitting.memory import LoadPlan, ModelShape, estimate_memory


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a loaded model, part by part.

    `input_bytes` (the token embeddings) stay on the host. `layer_bytes` are weights and KV memory of each layer.
    `output_bytes` is the last matrix; where `tied`, it is the embeddings again, and costs nothing on the host. Each
    device that computes needs `compute_bytes`, and the host the logits' `logits_bytes`. `companion_bytes` is what goes
    whole to where the output is: a model that drafts for this one.
    """

    input_bytes: int
    layer_bytes: tuple[int, ...]
    output_bytes: int
    compute_bytes: int
    logits_bytes: int = 0
    tied: bool = False
    companion_bytes: int = 0

    @property
    def offloadable(self) -> tuple[int, ...]:
        """What can be put on a graphics device: the layers, and the output as the last of them."""
        return (*self.layer_bytes, self.output_bytes + self.companion_bytes)

    @property
    def total_bytes(self) -> int:
        """All of it on the host."""
        return self.on_host(0)

    def on_host(self, offloaded: int) -> int:
        """What the host holds where the last `offloaded` of `offloadable` are elsewhere."""
        kept = sum(self.layer_bytes[: len(self.layer_bytes) + 1 - offloaded]) if offloaded else sum(self.layer_bytes)
        output = 0 if offloaded else self.companion_bytes + (0 if self.tied else self.output_bytes)
        return self.input_bytes + kept + output + self.compute_bytes + self.logits_bytes


def footprint(shape: ModelShape, plan: LoadPlan) -> Footprint:
    """What `shape` takes when it is loaded as `plan` says. Its total on the host is that of `estimate_memory`."""
    memory = estimate_memory(shape, plan)
    layers = max(shape.layer_count, 1)
    tied = not shape.output_bytes
    weights = max(memory.weights_bytes - shape.input_bytes - shape.output_bytes, 0)
    return Footprint(
        input_bytes=memory.weights_bytes - weights - shape.output_bytes,
        layer_bytes=_shared_out(weights + memory.cache_bytes, layers),
        output_bytes=shape.output_bytes or shape.input_bytes,
        compute_bytes=memory.compute_bytes,
        logits_bytes=memory.output_bytes,
        tied=tied,
    )


def _shared_out(count: int, parts: int) -> tuple[int, ...]:
    each, more = divmod(count, parts)
    return tuple(each + (1 if part < more else 0) for part in range(parts))
