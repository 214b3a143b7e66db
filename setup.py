"""Packaging: `pip install -e ".[test]"`."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
# Read, not imported: importing the package would need its dependencies.
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "bdlm_jax" / "__init__.py").read_text(encoding="utf-8"), re.M)[1]
README = HERE / "README.md"


class BuildWithExperiments(build_py):
    """Puts experiments/, which stands beside the package here, into what is installed (bdlm_jax/run/shipped.py)."""

    def run(self):
        super().run()
        if not self.editable_mode:
            to = Path(self.build_lib) / "bdlm_jax" / "shipped" / "experiments"
            shutil.copytree(HERE / "experiments", to, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


setup(
    name="bdlm_jax",
    version=VERSION,
    description="BDLM in JAX: a LightGCN and a causal language model that teach each other through one shared table",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    cmdclass={"build_py": BuildWithExperiments},
    packages=find_packages(include=["bdlm_jax", "bdlm_jax.*"]),
    package_data={"bdlm_jax": ["py.typed"], "bdlm_jax.report": ["page.css", "page.js"]},
    install_requires=[
        "absl-py>=2.1",
        "filelock>=3.16",
        "flax>=0.12",
        "huggingface-hub>=1.0",
        "jax>=0.10",
        "jinja2>=3.1",  # transformers renders chat templates by it
        # A pre-release is jraph's last word (2022); naming it lets pip take it.
        "jraph>=0.0.6.dev0",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pandas>=2.2",
        "safetensors>=0.6",
        "scipy>=1.14",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "tensorboard": ["tensorboardX>=2.6"],
        "wandb": ["wandb>=0.20"],
        "parity": ["torch>=2.6", "peft>=0.21"],
        "tune": ["optuna>=4.0"],
        "http": ["fastapi>=0.115", "uvicorn>=0.30"],
        "parquet": ["pyarrow>=18"],
        "index": ["faiss-cpu>=1.10"],
        "test": [
            "fastapi>=0.115",
            "httpx>=0.27",
            "hypothesis>=6.100",
            "ipykernel>=6.29",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "optuna>=4.0",
            "pyarrow>=18",
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "rax>=0.4",
            # Its formatter changes with its minor version; .pre-commit-config.yaml names the same.
            "ruff~=0.17.0",
            "tensorboardX>=2.6",
            "uvicorn>=0.30",
            "wandb>=0.20",
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
