"""The twins world on two CPU cores."""

from experiments import defaults


def get_config():
    return defaults.get_config()
