"""The options of the one decoder: every family of language models that we read is a choice of them.

The names are ours; the families' own are in `hf_config`.
"""

import dataclasses
from collections.abc import Iterator

from bdlm_jax.types import InputError

_CHOICES = {
    "norm": ("rms", "layer"),
    "activation": ("silu", "gelu_tanh", "gelu"),
    "positions": ("rotary", "learned"),
    "dtype": ("float32", "bfloat16"),
    "remat": (False, True, "dots"),
    "attention": ("einsum", "xla", "cudnn"),
}
_ROPE_SCALINGS = {  # the numbers that follow the name
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position"),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position", "attention_factor", "beta_fast", "beta_slow", "truncate (0 or 1)"),
}


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Shape and numerics of a decoder: hashable, so that it can be a static argument of a jitted function."""

    vocab_size: int  # V, rows of the text embedding (`Vocabulary.n_text`)
    width: int  # M, of the residual stream
    n_layers: int
    n_heads: int  # H, query heads
    n_kv_heads: int  # key and value heads; divides n_heads
    mlp_width: int  # inner width of the MLP
    head_width: int | None = None  # K; None is width // n_heads
    rope_theta: float = 1e4  # base of the rotary frequencies
    rope_scaling: tuple | None = None  # a name and numbers as in _ROPE_SCALINGS
    norm_eps: float = 1e-5
    attention_bias: bool = False  # on the query, key and value projections (Qwen 2)
    tie_embeddings: bool = True  # the output head is the text embedding
    dtype: str = "float32"  # of the computation; parameters are float32 unless loaded otherwise
    remat: bool | str = False  # recompute layers in the backward pass; "dots" keeps their products with weights
    dropout: float = 0.0  # on the embedding and on both residual branches
    family: str = "llama"  # Hugging Face's model_type, to export as; no computation reads it
    norm: str = "rms"  # or "layer" with scale and bias (GPT-2)
    norm_offset: bool = False  # norms multiply by 1 + scale (Gemma)
    post_norms: bool = False  # a norm behind each residual branch too (Gemma)
    qk_norm: bool = False  # a norm of each head's queries and keys (Qwen 3, Gemma 3)
    activation: str = "silu"
    gated: bool = True  # the MLP multiplies the activation with a second projection (SwiGLU, GeGLU)
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    positions: str = "rotary"  # or "learned": rows added to the embedding (GPT-2)
    max_positions: int | None = None  # longest row the model was made for; the number of learned positions
    window: int | None = None  # a position sees this many positions at most, itself included; None is all
    local_layers: tuple[bool, ...] | None = None  # in which layers window and local_rope_theta hold; None is all
    local_rope_theta: float | None = None  # base of the local layers' frequencies, unscaled (Gemma 3); None is no other
    attention_softcap: float | None = None  # attention scores x become cap·tanh(x / cap) (Gemma 2)
    logit_softcap: float | None = None  # the same for the logits
    query_scalar: float | None = None  # attention scores are divided by its square root; None is the head width
    # Text rows are multiplied by √M, rounded to dtype (Gemma). Rows of id tokens never are: they are set to the size of
    # the text rows as the first layer sees them.
    scale_embedding: bool = False
    attention: str = "einsum"  # ours, or "xla" or "cudnn" of jax.nn.dot_product_attention

    def __post_init__(self):
        for name in ("rope_scaling", "local_layers"):  # JSON has lists, and a list cannot be hashed
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for fault in self._faults():
            raise InputError(fault)

    def _faults(self) -> Iterator[str]:
        if min(self.vocab_size, self.width, self.n_layers, self.n_heads, self.n_kv_heads, self.mlp_width) < 1:
            yield f"every size of the language model must be at least 1, got {self}."
        if self.head_width is None and self.width % self.n_heads:
            yield f"width {self.width} is no multiple of n_heads {self.n_heads}: change one, or set head_width."
        if self.n_heads % self.n_kv_heads:
            yield f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}: change one of them."
        if self.positions == "rotary" and self.head_dim % 2:
            yield f"the head width {self.head_dim} is odd, rotary positions need it even: change n_heads."
        if not 0 <= self.dropout < 1:
            yield f"dropout is {self.dropout}, it must be at least 0 and below 1."
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                words = ", ".join(f'"{c}"' if isinstance(c, str) else str(c) for c in choices)
                yield f"{name} is {getattr(self, name)!r}, write one of {words}."
        if self.rope_scaling is not None:
            name, *numbers = self.rope_scaling
            if len(numbers) != len(_ROPE_SCALINGS.get(name, ())) or not numbers:
                known = ", ".join(f'("{name}", {", ".join(numbers)})' for name, numbers in _ROPE_SCALINGS.items())
                yield f"rope_scaling {self.rope_scaling} is not known: only None, {known} are."
        for name in ("window", "max_positions", "attention_softcap", "logit_softcap", "query_scalar"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                yield f"{name} is {getattr(self, name)}, it must be above 0, or None."
        if self.local_layers is not None and len(self.local_layers) != self.n_layers:
            yield f"local_layers has {len(self.local_layers)} entries for n_layers {self.n_layers}: give one for each."
        if self.positions == "learned" and self.max_positions is None:
            yield "learned positions need max_positions, the number of their rows."
        if self.attention != "einsum" and self.attention_softcap is not None:
            cap = self.attention_softcap
            yield f'attention "{self.attention}" cannot cap scores (attention_softcap {cap}): use "einsum".'
        if self.attention == "cudnn" and (self.dtype == "float32" or self.head_dim % 8):
            yield (
                f'attention "cudnn" needs dtype "bfloat16" and a head width that 8 divides, got "{self.dtype}" and '
                f'{self.head_dim}: use "xla".'
            )

    @property
    def head_dim(self) -> int:
        """K, the width of one attention head."""
        return self.width // self.n_heads if self.head_width is None else self.head_width

    @property
    def is_local(self) -> tuple[bool, ...]:
        """For each layer, whether the window and the local rotary base hold in it."""
        if self.window is None and self.local_rope_theta is None:
            return (False,) * self.n_layers
        return (True,) * self.n_layers if self.local_layers is None else self.local_layers
