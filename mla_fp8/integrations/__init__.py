"""One file a framework, and what they share: absorbed_layer.py. Importing mla_fp8 imports none of them."""
