"""`python -m transformers_llm2slm.cli`: the command line without its script."""

from . import main

main()
