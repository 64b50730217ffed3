"""Offline preparation of data: pack, index, verify, stats, preview."""
