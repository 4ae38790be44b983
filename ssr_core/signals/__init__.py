"""Calibration records: what one LoRA's pass says about its layer inputs, kept for merges with any other LoRA.

A record holds low-rank factors F of the second moments `C = X X^T ~ F F^T` of each layer's inputs
while its LoRA was active alone. `Z Z^T = D C D^T` follows for any stacked downs D that come later.
Data flows sketch -> factor -> recorder -> record_io, library -> estimate.
"""
