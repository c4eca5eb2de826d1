"""Which compiled tile runs a problem, and why. `mla_fp8.config` has the public names."""
