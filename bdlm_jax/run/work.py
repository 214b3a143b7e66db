"""What a step of the language model computes, and what known devices could: of the dry run, and of training's log."""

from typing import NamedTuple

import jax

from bdlm_jax.lm.config import LMConfig
from bdlm_jax.mutual.options import LMWeights


class Device(NamedTuple):
    """A vendor's public numbers: memory in bytes, dense bfloat16 FLOP/s, link bytes/s in and out together."""

    name: str
    memory: float
    flops: float
    link: float


DEVICES = {
    "a100": Device("NVIDIA A100 80 GB", 80e9, 312e12, 600e9),
    "h100": Device("NVIDIA H100 80 GB", 80e9, 989e12, 900e9),
    "h200": Device("NVIDIA H200", 141e9, 989e12, 900e9),
    "tpu_v5e": Device("TPU v5e", 16e9, 197e12, 200e9),
    "tpu_v5p": Device("TPU v5p", 95e9, 459e12, 600e9),
    "tpu_v6e": Device("TPU v6e", 32e9, 918e12, 448e9),
}
KINDS = {"H200": "h200", "H100": "h100", "A100": "a100", "v5 lite": "tpu_v5e", "v5p": "tpu_v5p", "v6 lite": "tpu_v6e"}


def this_device() -> Device | None:
    """The one of `DEVICES` that this process computes on, by a word of its kind; None where it is none of them."""
    kind = jax.devices()[0].device_kind
    return next((DEVICES[name] for word, name in KINDS.items() if word in kind), None)


def step_flops(
    lm: LMConfig, batch: dict, *, weights: LMWeights, trains: str, n_logits: int, item_width: int, adapters: int
) -> dict[str, float]:
    """Counts the multiplications and additions of matrix products in one step, over all devices.

    A product of (n, a) and (a, b) is 2·n·a·b; the backward pass is two of them, or one where the weights are frozen;
    attention is counted over the whole square, as it is computed. "model" is forward and backward, "hardware" also what
    rematerialisation computes again.

    Args:
      n_logits: items with which the state before each item is compared.
      item_width: the tables' width; where it is below the LM's, items are compared in it.
      adapters: the number of weights in those of the layers.
    """
    rows, length = batch["tokens"].shape
    projections = (lm.n_heads + lm.n_kv_heads) * 2 * lm.head_dim  # query and output; key and value
    layer = lm.width * (projections + (3 if lm.gated else 2) * lm.mlp_width)
    tokens = lm.n_layers * rows * length
    products, square = 2 * tokens * layer, 4 * tokens * length * lm.n_heads * lm.head_dim
    thin = 2 * rows * length * adapters
    items = rows * batch["item_target"].shape[1] * n_logits if weights.item else 0
    texts = rows * batch["text_target"].shape[1] * lm.vocab_size if weights.text else 0
    heads = 2 * (min(item_width, lm.width) * items + lm.width * texts)
    backward = products * (2 if trains == "full" else 1) + 2 * thin + 2 * square
    model = products + thin + square + backward + 3 * heads
    again = heads + (products + thin + square if lm.remat is True else 0)
    return {"model": float(model), "hardware": float(model + again)}


def step_rates(flops: float, n_tokens: int, seconds: float, *, n_devices: int) -> str:
    """Tokens a second and, on a device whose peak is known, the share of it that the model's FLOPs make (MFU)."""
    told, device = f"{n_tokens / seconds:,.0f} tokens/s", this_device()
    return f"{told}, MFU {flops / seconds / (n_devices * device.flops):.1%}" if device else told
