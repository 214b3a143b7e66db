"""BDLM in JAX: a LightGCN and a causal language model that teach each other through one shared embedding table."""

__version__ = "0.1.0"
