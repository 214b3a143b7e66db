"""Serving artefacts."""


def write_serving(run, lm_params, domain_params):
    return None
