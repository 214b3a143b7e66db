"""How fast the parts of an LM arm learn: as the config says or, where it says 0, by what trains and how large that is.

No one number suits language models of width 64 and 4096 whose rows are of other sizes. What is chosen for 0:
  decoder  full: .04 / width, adapters: ten times that, 5e-4 at most where plain text goes through them (`lm.speaks`).
           By 1 / width since that is how Adam's step in a matrix scales (Yang et al. 2022, µP, table 3); .04 is 1e-5
           at 4096, the lower of the usual steps of a 7B model's tuning, and adapters want ten times the step of full
           tuning (Schulman et al. 2025, LoRA Without Regret). Twice as much was too much for a small model's language
           (docs/experiments.md).
  tables   .03 of a row's standard deviation as the LM reads it, whatever that is: 3e-3 of the small decoders' .1.
  bridge   .02 of the standard deviation of its entries, for the same reason (both ours).
"""

from bdlm_jax.mutual.optimizer import make_schedule
from bdlm_jax.run.build import Decoder, Run
from bdlm_jax.run.prepare import domain_settings

OVER_WIDTH = {"full": 0.04, "lora": 0.4, "bridge": 0.4}  # by lm.trains; a frozen decoder's is the others' measure only
MOST_OF = {"trained": 5e-4, "base": 3e-3}  # by lm.speaks
OF_ROWS, OF_BRIDGE = 0.03, 0.02


def decoder_rate(run: Run) -> float:
    """The peak rate of what trains within the decoder."""
    c = run.config.lm
    return c.learning_rate or min(MOST_OF[c.speaks], OVER_WIDTH[c.trains] / run.lm.width)


def schedule(run: Run, phases: list):
    """The decoder's learning rate over all phases of an LM arm, as `lm.schedule` says."""
    steps, c = max(1, sum(phase.units for phase in phases)), run.config.lm
    return make_schedule(c.schedule, decoder_rate(run), warmup=min(c.warmup_steps, steps // 2), steps=steps)


def lm_rates(rate, *, bridge: float = 1.0, shared: float | None = None) -> dict:
    """The learning rates of an LM arm's groups, as multiples of one schedule; without `shared` the tables rest."""

    def times(factor):
        return lambda step: factor * rate(step)

    return {"lm": rate, "bridge": times(bridge), **({} if shared is None else {"shared": times(shared)})}


def bridge_rate(run: Run, decoder: Decoder, *, read_std: float, given: float) -> float:
    """The bridge's learning rate, as a multiple of the decoder's; `given` is what the config says, or 0."""
    # Orthogonal times a gain: `sharing.init_bridge`.
    entry_std = decoder.row_std / read_std / max(run.config.shared.width, run.lm.width) ** 0.5
    return (given or OF_BRIDGE * entry_std) / decoder_rate(run)


def shared_rate(run: Run, decoder: Decoder, *, read_std: float, reads: str) -> float:
    """The shared tables' learning rate, as a multiple of the decoder's.

    The bridge shrinks or stretches the tables to the LM's scale; their step is stretched back, so that a row moves as
    fast as one of an LM with its own table would. A propagated row answers to its own layer 0 by its share only.
    """
    rate = run.config.lm.learning_rate_shared or OF_ROWS * decoder.row_std
    scale = rate / decoder_rate(run) * read_std / decoder.row_std
    if reads == "layer0":
        return scale
    return scale * (domain_settings(run.config, run.config.domain.model)["n_layers"] + 1)
