"""Augmentation: policies (sample part and batch part), mixing, and the keyed random stream."""

from __future__ import annotations

from augmentation.mixing import MixingOptions, build_mixing

__all__ = ["MixingOptions", "build_mixing"]
