"""Measured training runs: read, predicted, and compared with what was predicted."""
