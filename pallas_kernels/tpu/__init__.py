"""Attention kernels for TPU, written in Pallas and lowered by Mosaic."""
