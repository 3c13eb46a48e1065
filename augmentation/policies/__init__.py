"""Augmentation policies; each module holds the policies of one kind of data under the same names."""
