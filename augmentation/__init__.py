"""Augmentation: policies (sample part and batch part), distortions and mixing on the device."""
