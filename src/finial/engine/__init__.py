"""The engine: requests in, tokens out.

`sampling` (logits to a token), `kvcache` (page numbers), `scheduler` (who computes what in the next step),
`handle` (what the asker sees), `batch` (a plan as arrays) and `generate`, the one loop that joins them.

    from finial.engine.generate import Engine
"""
