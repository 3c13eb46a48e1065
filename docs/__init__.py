"""The generators of the pages here that are generated: `python -m docs.generate`."""
