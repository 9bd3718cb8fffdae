"""What a run reads: sources, prompts, masks, mixtures, packing and the order of batches."""
