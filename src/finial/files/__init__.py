"""Files: checkpoints, tokenizers and where they come from.  Knows nothing of graphs, backends or the engine."""
