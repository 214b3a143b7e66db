"""The options of the one decoder: every family of language models that we read is a choice of them.

The names of the sizes are ours, the families' own names are in `families`.
"""

import dataclasses

from bdlm_jax.types import InputError

_CHOICES = {
    "norm": ("rms", "layer"),
    "activation": ("silu", "gelu_tanh", "gelu"),
    "positions": ("rotary", "learned"),
    "dtype": ("float32", "bfloat16"),
    "remat": (False, True, "dots"),
    "attention": ("einsum", "xla", "cudnn"),
}
_ROPE_SCALINGS = {  # how many numbers follow the name
    "llama3": 4,  # factor, low_freq_factor, high_freq_factor, original_max_position
    "linear": 1,  # factor
    "yarn": 6,  # factor, original_max_position, attention_factor, beta_fast, beta_slow, truncate (0 or 1)
}


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Shape and numerics of a decoder: hashable, so that it can be a static argument of a jitted function.

    Args:
        vocab_size: V, rows of the text embedding (`Vocabulary.n_text`).
        width: M, width of the residual stream.
        n_layers: number of decoder layers.
        n_heads: H, query heads.
        n_kv_heads: key and value heads; divides `n_heads`.
        mlp_width: inner width of the MLP.
        head_width: K, width of one head; None is `width // n_heads`.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, ("llama3", factor, low_freq_factor, high_freq_factor, original_max_position),
            ("linear", factor) or ("yarn", factor, original_max_position, attention_factor, beta_fast, beta_slow,
            truncate).
        norm_eps: epsilon of the norms.
        attention_bias: biases on the query, key and value projections (Qwen 2).
        tie_embeddings: the output head is the text embedding.
        dtype: compute dtype, "float32" or "bfloat16"; parameters are float32 in both cases unless loaded otherwise.
        remat: recompute each layer in the backward pass; "dots" keeps the results of its matrix products with
            weights and recomputes the rest.
        dropout: rate on the embedding and on both residual branches.
        family: Hugging Face's model_type that the weights come from and are exported as; no computation reads it.
        norm: "rms", or "layer" with scale and bias (GPT-2).
        norm_offset: the norms multiply by 1 + scale (Gemma).
        post_norms: a norm behind each residual branch too (Gemma).
        qk_norm: a norm of each head's queries and keys (Qwen 3, Gemma 3).
        activation: "silu", "gelu_tanh" or "gelu" of the MLP.
        gated: the MLP multiplies the activation with a second projection (SwiGLU, GeGLU).
        output_bias: bias on the attention's output projection.
        mlp_bias: biases in the MLP.
        positions: "rotary", or "learned": rows added to the embedding (GPT-2).
        max_positions: longest row that the model was made for; with learned positions, their number.
        window: a position sees this many positions at most, itself included; None is all.
        local_layers: for each layer, whether `window` and `local_rope_theta` hold in it; None is all layers.
        local_rope_theta: base of the rotary frequencies of the local layers, unscaled (Gemma 3); None is no other.
        attention_softcap: attention scores x become cap·tanh(x / cap) (Gemma 2).
        logit_softcap: as `attention_softcap`, for the logits.
        query_scalar: attention scores are divided by its square root; None is the head width.
        scale_embedding: text rows are multiplied by √M, rounded to `dtype` (Gemma). Rows of id tokens never are:
            they are set to the size of the text rows as the first layer sees them.
        attention: "einsum" (ours), or "xla" or "cudnn" of `jax.nn.dot_product_attention`.

    Raises:
        InputError: if the options do not fit together.
    """

    vocab_size: int
    width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_width: int
    head_width: int | None = None
    rope_theta: float = 1e4
    rope_scaling: tuple | None = None
    norm_eps: float = 1e-5
    attention_bias: bool = False
    tie_embeddings: bool = True
    dtype: str = "float32"
    remat: bool | str = False
    dropout: float = 0.0
    family: str = "llama"
    norm: str = "rms"
    norm_offset: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    gated: bool = True
    output_bias: bool = False
    mlp_bias: bool = False
    positions: str = "rotary"
    max_positions: int | None = None
    window: int | None = None
    local_layers: tuple[bool, ...] | None = None
    local_rope_theta: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    query_scalar: float | None = None
    scale_embedding: bool = False
    attention: str = "einsum"

    def __post_init__(self):
        for name in ("rope_scaling", "local_layers"):  # JSON has lists, and a list cannot be hashed
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_sizes()
        self._check_words()
        self._check_layers()
        self._check_attention()

    def _check_sizes(self) -> None:
        if min(self.vocab_size, self.width, self.n_layers, self.n_heads, self.n_kv_heads, self.mlp_width) < 1:
            raise InputError(f"every size of the language model must be at least 1, got {self}.")
        if self.head_width is None and self.width % self.n_heads:
            raise InputError(
                f"width {self.width} is no multiple of n_heads {self.n_heads}: change one, or set head_width."
            )
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}: change one of them."
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise InputError(f"the head width {self.head_dim} is odd, rotary positions need it even: change n_heads.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}, it must be at least 0 and below 1.")

    def _check_words(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                words = ", ".join(f'"{c}"' if isinstance(c, str) else str(c) for c in choices)
                raise InputError(f"{name} is {value!r}, write one of {words}.")
        scaling = self.rope_scaling
        if scaling is not None and (scaling[0] not in _ROPE_SCALINGS or len(scaling) != 1 + _ROPE_SCALINGS[scaling[0]]):
            known = ", ".join(f'("{name}", {n} numbers)' for name, n in _ROPE_SCALINGS.items())
            raise InputError(f"rope_scaling {scaling} is not known: only None, {known} are.")
        for name in ("window", "max_positions", "attention_softcap", "logit_softcap", "query_scalar"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} is {value}, it must be above 0, or None.")

    def _check_layers(self) -> None:
        if self.local_layers is not None and len(self.local_layers) != self.n_layers:
            raise InputError(
                f"local_layers has {len(self.local_layers)} entries for n_layers {self.n_layers}: give one for each."
            )
        if self.positions == "learned" and self.max_positions is None:
            raise InputError("learned positions need max_positions, the number of their rows.")

    def _check_attention(self) -> None:
        if self.attention != "einsum" and self.attention_softcap is not None:
            raise InputError(
                f'attention "{self.attention}" cannot cap scores (attention_softcap {self.attention_softcap}): '
                'use "einsum".'
            )
        if self.attention == "cudnn" and (self.dtype == "float32" or self.head_dim % 8):
            raise InputError(
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
