"""What a step of either arm is told: the weights of its losses, and how the two arms meet."""

import dataclasses

from bdlm_jax.lm.config import LMConfig


@dataclasses.dataclass(frozen=True)
class LMWeights:
    """Weights of the LM arm's losses; 0 leaves a term out of the compiled program."""

    item: float = 1.0
    text: float = 0.1
    align_user: float = 0.0
    align_item: float = 0.0
    kl: float = 0.0


@dataclasses.dataclass(frozen=True)
class DomainWeights:
    """Weights of the domain arm's losses; 0 leaves a term out.

    `bpr` weighs what stands in its place for a model of histories too, the softmax over the catalogue;
    `regularisation` multiplies ½‖E⁰ of the batch‖²/B as LightGCN has it; `auxiliary` is the domain model's own loss,
    which the model has weighted already.
    """

    bpr: float = 1.0
    regularisation: float = 1e-4
    auxiliary: float = 1.0
    align_user: float = 0.0
    align_item: float = 0.0
    kl: float = 0.0

    @property
    def softmax(self) -> float:
        return self.bpr


@dataclasses.dataclass(frozen=True)
class Meeting:
    """How the two arms meet: static facts of the model that every step needs.

    `reads` is one of `sharing.READS`, `align` one of `losses.ALIGN`, `temperature` the T of the score-level term.
    Without `shows_users` no prompt has a <uid>, and their rows are left at zero: a model that reads histories would
    read everybody's for them.
    """

    lm: LMConfig
    reads: str = "layer0"
    align: str = "mse"
    temperature: float = 1.0
    shows_users: bool = True
