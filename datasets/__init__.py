"""Data sets: each module holds the LightningDataModule of one data set, a subclass of BaseDataModule."""
