"""What FP8 projections do to a small language model that is trained here."""
