"""Writes the API reference that pdoc makes of the docstrings: `make docs`, or

python docs/reference.py build/docs
"""

import sys
from pathlib import Path

# What is public: the names in these modules' __all__.
MODULES = (
    "mla_fp8",
    "mla_fp8.attention",
    "mla_fp8.config",
    "mla_fp8.distributed",
    "mla_fp8.integrations.sglang",
    "mla_fp8.integrations.transformers",
    "mla_fp8.jit",
    "mla_fp8.reference",
    "mla_fp8.weights.block_fp8_weight",
)


def main(directory: str) -> None:
    import pdoc  # here, for the tests read the list without it

    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*MODULES, output_directory=Path(directory))


if __name__ == "__main__":
    main(*sys.argv[1:])
