"""``finetune``: run a FineTuneJob on this machine, look at it, fetch and try its results."""
