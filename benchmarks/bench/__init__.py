"""What every benchmark shares, from contenders and buffers to the tables of README and docs."""
