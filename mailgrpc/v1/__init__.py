"""The stubs of the contract, generated from proto/ by scripts/generate.py; never edited."""
