"""What every benchmark shares, from a contender and its buffers to the tables of README and docs."""
