"""The stages of a FineTuneJob: each runs as ``python -m finetune_jobs stage.json``, in a pod or as a process."""
