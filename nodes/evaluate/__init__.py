"""Numbers for a checkpoint: prompt lists drawn with and without SafeCFG on the same seeds, judged, counted."""
