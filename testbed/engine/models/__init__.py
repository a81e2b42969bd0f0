"""Decoders of six families: their configuration, their weights, their forward pass."""
