"""Attention over MLA's latent cache: one function for every caller, whatever runs underneath."""

from mla_fp8.attention.attend import attend_latents

__all__ = ["attend_latents"]
