"""Engines: the table of them, how each is installed and fed, and an adapter file for each.

`adapters/` is never imported: each file there is run by its engine's own interpreter.

    from finial.lab.engines.table import ENGINES
"""
