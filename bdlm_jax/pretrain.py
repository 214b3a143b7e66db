"""python -m bdlm_jax.pretrain --corpus FILES… --out models/film-25m [--width 512 …]: a small general language model.

It trains a tokenizer and a Llama-shaped decoder on text, and writes a Hugging Face directory, which `lm.path` takes and
transformers loads. Stopped or killed, the same command goes on where it was.
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence

from bdlm_jax.run.pretraining import Settings, pretrain
from bdlm_jax.runtime import malloc
from bdlm_jax.runtime.door import REFUSED, memory_explained, refuse


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdlm_jax.pretrain", description="Trains a small language model.")
    parser.add_argument("--corpus", nargs="+", required=True, help=".txt, a document a line, or .jsonl; .gz, .xz")
    parser.add_argument("--out", required=True, help="the Hugging Face directory to write")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=f"default {field.default}")
    given = vars(parser.parse_args(arguments))
    corpus, out = given.pop("corpus"), given.pop("out")
    malloc.one_arena()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("bdlm_jax").setLevel(logging.INFO)
    try:
        with memory_explained("lower --batch_rows, --width or --layers"):
            facts = pretrain(corpus, out, Settings(**given))
    except FloatingPointError as error:
        print(f"bdlm_jax: {error}", file=sys.stderr)
        return 1
    except REFUSED as error:
        return refuse(error)
    print(
        f"{out}: {facts['parameters']:,} parameters, perplexity {facts['perplexity']:.2f} a token on "
        f"{facts['held_out_tokens']:,} tokens held out (epoch {facts['epoch']} of {given['epochs']})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
