"""What a finished run hands to serving: the fields of its records, as plain arrays and facts."""

import dataclasses

import jax
import numpy as np

from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION
from bdlm_jax.evaluation import scorers
from bdlm_jax.lm import lora
from bdlm_jax.mutual import sharing
from bdlm_jax.run.build import Run, make_arm, parts_at_test
from bdlm_jax.run.prepare import domain_settings
from bdlm_jax.run.rows import prompt_options
from bdlm_jax.run.stages import Reader
from bdlm_jax.types import Params


def catalogue_fields(run: Run) -> dict:
    """Raw ids, titles and all that is known of who had what."""
    table = run.data.split.interactions
    indptr, item = run.data.split.histories(TRAIN, VALIDATION, TEST)
    names = {"user_ids": table.user_ids, "item_ids": table.item_ids, "titles": table.item_fields["title"]}
    return {
        **{name: column.tolist() for name, column in names.items()},
        "indptr": indptr,
        "item": item,
        "dropped": run.data.dropped,
    }


def domain_fields(run: Run, model: str, params: Params) -> dict:
    """A domain model's tables as they stand at test time, and what rebuilds the model."""
    parts = parts_at_test(run.config)
    arm = make_arm(run, model, parts=parts)
    view = scorers.domain_view(arm, params)
    return {
        "model": model,
        "user_UD": np.asarray(view["user"], np.float32),
        "item_ID": np.asarray(view["item"], np.float32),
        "degree_I": run.data.split.degree(*parts),
        "domain": params["domain"],
        "options": domain_settings(run.config, model),
        "dot": arm.dot,
        "reads_history": arm.read is not None,
    }


def lm_fields(run: Run, reader: Reader, params: Params, *, kind: str) -> dict:
    """The decoder, the rows of the id tokens, what makes prompts, and what texts add.

    Adapters are merged, but stay beside the decoder where that writes plain text without them (`lm.speaks`).
    `reader` is how its states are read for the test, of prompts of that kind.
    """
    id_rows = jax.jit(sharing.id_rows, static_argnames=("meeting", "arm"))
    meeting = dataclasses.replace(reader.meeting, shows_users=True)
    rows_XM, _ = id_rows(params, meeting=meeting, arm=reader.arm)
    lm = params["lm"] if run.config.lm.speaks == "base" else lora.merge(params["lm"])
    return {
        "params": {name: value for name, value in lm.items() if name != "bridge"},
        "config": run.lm,
        "id_rows_XM": np.asarray(rows_XM, np.float32),
        "vocabulary": run.texts.vocabulary,
        "titles": run.texts.titles,
        "contexts": run.texts.contexts,
        "texts": reader.texts,
        "prompts": prompt_options(run, kind, unnamed=not run.config.prompts.read_named),
    }
